"""Figures of latents and of bounds; :mod:`vaefeat.plots` names them, too.

n rows, L latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from vaefeat.drawing import BLUE, GREY, INK, ORANGE, PALE, draw_title, figure, style

__all__ = [
    "aggregate_posterior",
    "draw_map",
    "kl_per_latent",
    "latent_map",
    "learning_curves",
    "rate_distortion",
    "trade_off",
]

_MOST_BARS, _FEWEST_BARS, _MOST_PANELS = 40, 12, 12
#: Labels in a legend; more colours are not told apart.
_MOST_NAMED = 20
_ACTIVE_NATS = 0.01


def draw_map(axes: Axes, points: NDArray[Any], labels: NDArray[Any] | None, *, title: str) -> None:
    """Draw points (n, 2), coloured by their labels where those are known, and named at each label's middle.

    Where some labels are None, these points are grey, and the others larger and named in a legend: few points have no
    middle.
    """
    if labels is None:
        axes.scatter(points[:, 0], points[:, 1], s=5, color=BLUE, linewidths=0)
    elif not (known := np.array([label is not None for label in labels])).all():
        axes.scatter(points[~known, 0], points[~known, 1], s=5, color=PALE, linewidths=0)
        draw_few(axes, points[known], labels[known])
    else:
        colours = mpl.colormaps["tab10" if len(np.unique(labels)) <= 10 else "tab20"]
        for index, label in enumerate(np.unique(labels)):
            chosen = points[labels == label]
            axes.scatter(chosen[:, 0], chosen[:, 1], s=6, color=colours(index % colours.N), linewidths=0, alpha=0.75)
            middle = np.median(chosen, axis=0)
            axes.annotate(
                str(label),
                middle,
                ha="center",
                va="center",
                weight="bold",
                bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8},
            )
    axes.set(xticks=[], yticks=[])
    draw_title(axes, title)
    axes.spines[:].set_visible(False)


def draw_few(axes: Axes, points: NDArray[Any], labels: NDArray[Any]) -> None:
    """Draw a few points (n, 2) that stand for their labels, large and coloured, with a legend beneath."""
    # Numbers in their own order: 10 after 9.
    names = sorted(set(map(str, labels)), key=lambda name: (len(name) if name.isdecimal() else np.inf, name))
    colours = mpl.colormaps["tab10" if len(names) <= 10 else "tab20"]
    for index, name in enumerate(names):
        own = points[labels.astype(str) == name]
        shown = name if index < _MOST_NAMED else None
        axes.scatter(
            own[:, 0], own[:, 1], s=34, color=colours(index % colours.N), edgecolors=INK, linewidths=0.6, label=shown
        )
    if len(names) > _MOST_NAMED:
        axes.scatter([], [], s=0, label=f"and {len(names) - _MOST_NAMED} more")
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=5,
        frameon=False,
        columnspacing=1.0,
        handletextpad=0.1,
    )


def latent_map(
    points: NDArray[Any],
    labels: NDArray[Any] | None = None,
    *,
    latents: tuple[int, int] = (0, 1),
    title: str = "Rows in the latent space",
) -> Figure:
    """Show rows by two of their latents.

    Parameters
    ----------
    points : ndarray of shape (n, 2)
        Posterior means in these latents, whose scale is shown.
    labels : ndarray of shape (n,), optional
    latents : (int, int)
        Which they are.
    title : str
    """
    made, axes = figure(width=6.4, height=6.0)
    draw_map(axes, points, labels, title=title)
    axes.set_aspect("equal", adjustable="datalim")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.set(xlabel=f"latent {latents[0]}", ylabel=f"latent {latents[1]}")
    axes.tick_params(color=GREY)
    return made


def aggregate_posterior(posterior: NDArray[Any], prior: NDArray[Any], *, names: Sequence[str] | None = None) -> Figure:
    """Show whether the rows' posteriors, taken together, fill the prior: where not, samples come from nowhere.

    Two latents are shown as points, others as densities, at most the twelve that differ most from the prior.

    Parameters
    ----------
    posterior : ndarray of shape (n, L)
        One draw of q(z|x) for each row.
    prior : ndarray of shape (m, L)
        Draws of p(z).
    names : sequence of str, optional
        Of the latents; their numbers when None.
    """
    names = names or [f"latent {index}" for index in range(posterior.shape[1])]
    if posterior.shape[1] == 2:
        return _both_clouds(posterior, prior, names)
    gaps = [_largest_gap(posterior[:, i], prior[:, i]) for i in range(posterior.shape[1])]
    shown = np.argsort(gaps, kind="stable")[::-1][:_MOST_PANELS]
    columns = min(4, len(shown))
    n_lines = -(-len(shown) // columns)
    with style():
        made = Figure(figsize=(2.3 * columns, 1.5 * n_lines + 0.8), layout="constrained")
        panels = np.atleast_1d(made.subplots(n_lines, columns, squeeze=False)).ravel()
    for axes, latent in zip(panels, shown, strict=False):
        both = np.concatenate([posterior[:, latent], prior[:, latent]])
        bins = list(np.linspace(np.quantile(both, 0.001), np.quantile(both, 0.999), 46))
        axes.hist(prior[:, latent], bins=bins, density=True, color=PALE, label="prior")
        axes.hist(posterior[:, latent], bins=bins, density=True, histtype="step", color=BLUE, lw=1.4, label="rows")
        axes.set_title(names[latent], size=10)
        axes.set(yticks=[])
        axes.spines["left"].set_visible(False)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    more = f" ({len(shown)} of {posterior.shape[1]} latents)" if len(shown) < posterior.shape[1] else ""
    made.suptitle(f"Aggregate posterior against the prior{more}", x=0.01, ha="left", weight="bold", size=11)
    return made


def kl_per_latent(kl: ArrayLike, *, names: Sequence[str] | None = None) -> Figure:
    """Show how much each latent says about rows: its KL divergence from the prior, in nats, sorted.

    Parameters
    ----------
    kl : array-like of shape (L,)
        Means over rows.
    names : sequence of str, optional
        Of the latents; their numbers when None.
    """
    values = np.asarray(kl, dtype=np.float64)
    n_active = int((values >= _ACTIVE_NATS).sum())
    # Latents that say nothing are no news one by one.
    order = np.argsort(-values, kind="stable")[: min(max(n_active + 3, _FEWEST_BARS), _MOST_BARS)]
    names = names or [str(index) for index in range(len(values))]
    made, axes = figure(width=max(4.6, 0.26 * len(order) + 1.2), height=3.2)
    axes.bar(
        np.arange(len(order)),
        values[order],
        color=[BLUE if values[index] >= _ACTIVE_NATS else PALE for index in order],
        width=0.75,
    )
    crowded = len(order) > 24
    axes.set_xticks(
        np.arange(len(order)),
        [names[index] for index in order],
        rotation=90 if crowded else 0,
        size=8 if crowded else 9,
    )
    axes.margins(x=0.01)
    axes.tick_params(axis="x", length=0)
    axes.set(xlabel="latent", ylabel="KL divergence (nats)")
    rest = f", the first {len(order)} shown" if len(order) < len(values) else ""
    draw_title(axes, f"{values.sum():.1f} nats in {n_active} of {len(values)} latents{rest}")
    return made


def rate_distortion(
    rates: ArrayLike, distortions: ArrayLike, labels: Sequence[str], *, kept: int | None = None
) -> Figure:
    """Show what a code costs against what it loses, one point a model, joined in the order of the rates.

    On a line from corner to corner the sum is constant: minus the ELBO (Alemi et al. 2018, arXiv:1711.00464).

    Parameters
    ----------
    rates, distortions : array-like of shape (n,)
        KL and minus the expected log-likelihood, in nats per row.
    labels : sequence of str
        Of each point, such as ``beta 0.5``.
    kept : int, optional
        The point to mark.
    """
    x, y = np.asarray(rates, dtype=np.float64), np.asarray(distortions, dtype=np.float64)
    order = np.argsort(x, kind="stable")
    made, axes = figure(width=5.6, height=4.2)
    best = (x + y).min()
    span = np.array([0.0, max(x.max() * 1.1, 1e-9)])
    axes.plot(span, best - span, color=PALE, lw=1, ls="--", zorder=0)
    axes.plot(x[order], y[order], color=GREY, lw=1.2, zorder=1)
    axes.scatter(x, y, s=36, color=[ORANGE if index == kept else BLUE for index in range(len(x))], zorder=2)
    for index, label in enumerate(labels):
        axes.annotate(label, (x[index], y[index]), xytext=(6, 6), textcoords="offset points", color=INK)
    axes.annotate(
        f"sum {best:.1f}",
        (span[1], best - span[1]),
        xytext=(4, 0),
        textcoords="offset points",
        color="#6b7683",
        va="center",
        size=9,
    )
    axes.set_xlim(0, x.max() * 1.2 or 1)
    axes.margins(y=0.12)
    axes.set(xlabel="rate: KL divergence (nats per row)", ylabel="distortion: -log p(x|z) (nats per row)")
    draw_title(axes, "Rate and distortion")
    return made


def trade_off(
    bounds: ArrayLike,
    errors: ArrayLike,
    spreads: ArrayLike,
    settings: Mapping[str, Sequence[Any]],
    *,
    n_labels: int,
) -> Figure:
    """Show what features are worth against how well the model fits, a point a model and a panel a setting.

    Parameters
    ----------
    bounds : array-like of shape (n,)
        Held-out ELBO, in nats per row.
    errors, spreads : array-like of shape (n,)
        Of a classifier with few labels, in percent: mean and standard deviation over draws.
    settings : mapping of str to sequence of n values
        What colours the points of each panel.
    n_labels : int
    """
    x, y, around = (np.asarray(values, dtype=np.float64) for values in (bounds, errors, spreads))
    with style():
        made = Figure(figsize=(0.6 + 4.6 * len(settings), 4.0), layout="constrained")
        panels = made.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    for axes, (name, values) in zip(panels, settings.items(), strict=True):
        kinds = list(dict.fromkeys(map(str, sorted(values, key=_sorting))))
        colours = mpl.colormaps["viridis"](np.linspace(0.0, 0.9, max(2, len(kinds))))
        axes.errorbar(x, y, around, fmt="none", ecolor=PALE, elinewidth=1, zorder=0)
        for kind, colour in zip(kinds, colours, strict=False):
            those = np.array([str(value) == kind for value in values])
            axes.scatter(x[those], y[those], s=40, color=colour, label=kind, zorder=2)
        best = int(y.argmin())
        axes.scatter(x[best], y[best], s=130, facecolor="none", edgecolor=ORANGE, linewidth=1.8, zorder=1)
        axes.margins(0.1)
        axes.set_xlabel("held-out ELBO (nats per row)")
        axes.legend(title=name, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    panels[0].set_ylabel(f"error with {n_labels} labels (%)")
    draw_title(panels[0], "What features are worth against the bound")
    return made


def _sorting(value: Any) -> tuple[bool, Any]:
    """Put numbers in their order, and texts behind them."""
    number = isinstance(value, int | float)
    return not number, value if number else str(value)


def learning_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], *, title: str = "Bound against rows seen"
) -> Figure:
    """Show how the bound grows with the rows seen (Kingma and Welling 2013, arXiv:1312.6114, figure 2).

    Parameters
    ----------
    curves : mapping of str to sequence of (rows seen, held-out bound in nats per row)
        One for each model, by its name.
    title : str
    """
    made, axes = figure(width=6.6, height=4.2)
    colours = mpl.colormaps["viridis"](np.linspace(0.05, 0.85, max(2, len(curves))))
    ends = {}
    for colour, (name, points) in zip(colours, curves.items(), strict=False):
        seen, bounds = np.array(points, dtype=np.float64).T
        axes.plot(seen, bounds, color=colour, lw=1.6)
        ends[name] = (seen[-1], bounds[-1], colour)
    axes.set_xscale("log")
    axes.margins(x=0)
    _name_ends(axes, ends)
    axes.set(xlabel="training rows seen", ylabel="held-out ELBO (nats per row)")
    draw_title(axes, title)
    return made


def _name_ends(axes: Axes, ends: Mapping[str, tuple[float, float, Any]]) -> None:
    """Write each curve's name at its end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    least = 0.055 * (high - low)
    names = sorted(ends, key=lambda name: ends[name][1])
    places = np.array([ends[name][1] for name in names])
    # Neighbours that are too close share the way apart; a few rounds settle a crowd.
    for _ in range(50):
        overlaps = np.clip(least - np.diff(places), 0, None) / 2
        places[:-1] -= overlaps
        places[1:] += overlaps
    for name, place in zip(names, places, strict=True):
        axes.annotate(
            name,
            (1.0, place),
            xytext=(6, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            color=ends[name][2],
            weight="bold",
            annotation_clip=False,
        )


def _both_clouds(posterior: NDArray[Any], prior: NDArray[Any], names: Sequence[str]) -> Figure:
    made, axes = figure(width=6.0, height=5.6)
    axes.scatter(prior[:, 0], prior[:, 1], s=7, color=PALE, linewidths=0, label="prior")
    axes.scatter(posterior[:, 0], posterior[:, 1], s=7, color=BLUE, linewidths=0, alpha=0.55, label="rows")
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xlabel=names[0], ylabel=names[1])
    draw_title(axes, "Aggregate posterior against the prior")
    axes.legend(loc="upper right", markerscale=2.5, frameon=False)
    return made


def _largest_gap(left: NDArray[Any], right: NDArray[Any]) -> float:
    """Give the largest gap between two samples' distribution functions (Kolmogorov and Smirnov)."""
    both = np.sort(np.concatenate([left, right]))
    functions = (np.searchsorted(np.sort(part), both, side="right") / len(part) for part in (left, right))
    first, second = functions
    return float(np.abs(first - second).max())
