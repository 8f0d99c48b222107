"""New rows from a trained model: samples, neighbours of a row, ways between rows, the manifold, sweeps of latents.

Every function takes a bundle, its folder or a :class:`~vaefeat.model.vae.VAE`, and gives NumPy arrays in the units of
the training rows (0 to 255 where those were uint8). The same seed gives the same rows.

B rows, L latents, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vaefeat.config import ModelConfig
from vaefeat.errors import InputError
from vaefeat.settings import check_choice
from vaefeat.trained import Model, Trained, opened, whole

__all__ = ["Manifold", "Sweep", "interpolate", "manifold", "sample", "sample_around", "sweep"]

_SWEPT_LATENTS = 10


@dataclass(frozen=True)
class Manifold:
    """Rows on a grid over two latents.

    Attributes
    ----------
    rows : ndarray of shape (side, side, ...), float32
        ``rows[i, j]`` is decoded from ``coordinates[0, j]`` in the first latent, ``coordinates[1, i]`` in the second.
    latents : tuple of int
        Which two.
    coordinates : ndarray of shape (2, side), float64
        Ascending values of each latent.
    """

    rows: NDArray[np.float32]
    latents: tuple[int, int]
    coordinates: NDArray[np.float64]


@dataclass(frozen=True)
class Sweep:
    """What one latent variable does to a row, all others held.

    Attributes
    ----------
    name : str
        ``latent 3``, or ``categories 0`` for a categorical variable.
    values : ndarray of shape (k,), float64
        Of the latent, in standard deviations of the prior from its mean; of a categorical variable, the categories.
    rows : ndarray of shape (k, ...), float32
    """

    name: str
    values: NDArray[np.float64]
    rows: NDArray[np.float32]


def sample(model: Model, n: int, *, kind: Literal["mean", "draw"] = "mean", seed: int = 0) -> NDArray[np.float32]:
    """Draw rows from the model: z from the prior, then x given z.

    Parameters
    ----------
    model : VAE, Bundle or path-like
    n : int
    kind : {"mean", "draw"}
        The mean of p(x|z), which looks smooth, or a draw of it, which is a sample of p(x).
    seed : int

    Returns
    -------
    ndarray of shape (n, ...), float32

    Raises
    ------
    InputError
    """
    check_choice("kind", kind, ("mean", "draw"))
    with opened(model, seed=seed) as trained:
        return trained.decoded(trained.vae.sample_prior(whole("n", n)), kind=kind)


def sample_around(model: Model, row: ArrayLike, n: int, *, scale: float = 1.0, seed: int = 0) -> NDArray[np.float32]:
    """Draw rows like a given one: z from its posterior q(z|x), then the mean of p(x|z).

    Parameters
    ----------
    model : VAE, Bundle or path-like
    row : array-like of shape (...) or (1, ...)
    n : int
    scale : float
        Factor on the posterior's noise: 1 is the posterior itself, more is further away.
    seed : int

    Returns
    -------
    ndarray of shape (n, ...), float32

    Raises
    ------
    InputError
        Also where the posterior's noise cannot be scaled: that of categories, or an auto-encoder's, which has none.
    """
    if not (np.isfinite(scale) and scale >= 0):
        raise InputError(f"got scale={scale!r}, wanted a finite number of at least 0")
    with opened(model, seed=seed) as trained:
        posterior = trained.vae.config.posterior
        if posterior == "deterministic":
            raise InputError(
                "got a model with posterior='deterministic', which gives one code a row and no others around it; "
                "use interpolate or sweep, or train with posterior='diagonal'"
            )
        if posterior in {"categorical", "joint"} and scale != 1:
            raise InputError(
                f"got scale={scale:g} for posterior={posterior!r}, whose categories have no distance; leave it at 1"
            )
        x = trained.scaled_row(row)
        noise = torch.randn(whole("n", n), 1, trained.vae.config.latent_dim, device=trained.device)
        return trained.decoded(trained.draws(x, scale * noise)[:, 0])


def interpolate(
    model: Model,
    start_row: ArrayLike,
    end_row: ArrayLike,
    *,
    steps: int = 10,
    path: Literal["linear", "spherical"] = "linear",
) -> NDArray[np.float32]:
    """Go from one row to another through the latent space.

    Parameters
    ----------
    model : VAE, Bundle or path-like
    start_row, end_row : array-like of shape (...) or (1, ...)
    steps : int
        Rows on the way, both ends included.
    path : {"linear", "spherical"}
        A straight line, or an arc around the prior's mean, on which latents keep a length that is usual under a
        Gaussian prior (White 2016, arXiv:1609.04468, section 2.1). Two directions that are equal or opposite have no
        arc of their own, and take the line.

    Returns
    -------
    ndarray of shape (steps, ...), float32
        Means of p(x|z); the first and the last are the reconstructions of both rows.

    Raises
    ------
    InputError
    """
    check_choice("path", path, ("linear", "spherical"))
    with opened(model) as trained:
        if path == "spherical" and _has_categories(trained.vae.config):
            raise InputError(
                f"got path='spherical' with posterior={trained.vae.config.posterior!r}: categories lie on no sphere; "
                "take path='linear'"
            )
        x = torch.cat([trained.scaled_row(start_row, name="start_row"), trained.scaled_row(end_row, name="end_row")])
        start_L, end_L = trained.middles(x)
        t_S1 = torch.linspace(0, 1, whole("steps", steps, at_least=2), device=trained.device)[:, None]
        if path == "linear":
            z_SL = _line(start_L, end_L, t_S1)
        else:
            mean_L, std_L = trained.prior_moments()
            z_SL = mean_L + std_L * _arc((start_L - mean_L) / std_L, (end_L - mean_L) / std_L, t_S1)
        return trained.decoded(z_SL)


def manifold(model: Model, *, side: int = 20, latents: tuple[int, int] = (0, 1)) -> Manifold:
    """Lay out what two latents mean, evenly in the prior's probability.

    A uniform grid on the unit square goes through the inverse of the Gaussian's distribution function, and every point
    of it is decoded (Kingma and Welling 2013, arXiv:1312.6114, figure 4). Other latents stay at the prior's mean.

    Parameters
    ----------
    model : VAE, Bundle or path-like
    side : int
        Points along each latent, at the probabilities (i + 1/2) / side.
    latents : (int, int)
        Along the columns, and along the rows.

    Returns
    -------
    Manifold

    Raises
    ------
    InputError
        Also where the prior is not one Gaussian.
    """
    n = whole("side", side)
    with opened(model) as trained:
        config = trained.vae.config
        if config.prior not in {"standard", "learned"} or config.posterior == "categorical":
            got = "posterior='categorical'" if config.posterior == "categorical" else f"prior={config.prior!r}"
            raise InputError(
                f"got a model with {got}, wanted a Gaussian prior, whose distribution function has an inverse; use "
                "sweep or sample, or train with prior='standard' or 'learned' and a continuous posterior"
            )
        first, second = _two_latents(latents, n_continuous=_n_continuous(config))
        mean_L, std_L = trained.prior_moments()
        probabilities = (torch.arange(n, dtype=torch.float64, device=trained.device) + 0.5) / n
        quantiles = torch.special.ndtri(probabilities)
        axes = torch.stack([mean_L[i].double() + std_L[i].double() * quantiles for i in (first, second)])
        # Where categories stand beside the Gaussian, each is as probable as its prior has it.
        z_SL = mean_L.repeat(n * n, 1)
        z_SL[:, first] = axes[0].repeat(n).to(z_SL)
        z_SL[:, second] = axes[1].repeat_interleave(n).to(z_SL)
        rows = trained.decoded(z_SL)
    return Manifold(rows.reshape(n, n, *rows.shape[1:]), (first, second), axes.cpu().numpy())


def sweep(
    model: Model,
    row: ArrayLike,
    *,
    latents: Sequence[int] | None = None,
    values: ArrayLike | None = None,
) -> tuple[Sweep, ...]:
    """Change one latent variable of a row at a time.

    Parameters
    ----------
    model : VAE, Bundle or path-like
    row : array-like of shape (...) or (1, ...)
    latents : sequence of int, optional
        Which variables, counted with the continuous latents first and each categorical variable as one. The ten that
        say most about this row (largest KL divergence from the prior) when None, these first.
    values : array-like of shape (k,), optional
        In standard deviations of the prior from its mean; eleven from -3 to 3 when None. A categorical variable goes
        through its categories instead.

    Returns
    -------
    tuple of Sweep
        One for each variable.

    Raises
    ------
    InputError
    """
    steps = np.linspace(-3, 3, 11) if values is None else np.asarray(values, dtype=np.float64)
    if steps.ndim != 1 or not len(steps) or not np.isfinite(steps).all():
        raise InputError(f"got values of shape {steps.shape}, wanted a list of finite numbers")
    with opened(model) as trained:
        variables = _variables(trained.vae.config)
        x = trained.scaled_row(row)
        chosen = _most_telling(trained, x, variables)[:_SWEPT_LATENTS] if latents is None else list(latents)
        for variable in chosen:
            if variable not in range(len(variables)):
                raise InputError(f"got latent {variable!r}, wanted numbers from 0 to {len(variables) - 1}")
        middle_L, moments = trained.middles(x)[0], trained.prior_moments()
        return tuple(_swept(trained, middle_L, moments, variable, variables[variable], steps) for variable in chosen)


def _swept(
    trained: Trained,
    middle_L: Tensor,
    moments: tuple[Tensor, Tensor],
    variable: int,
    columns: slice,
    steps: NDArray[np.float64],
) -> Sweep:
    n_continuous = _n_continuous(trained.vae.config)
    if variable < n_continuous:
        mean, std = (moment[variable] for moment in moments)
        z_SL = middle_L.repeat(len(steps), 1)
        z_SL[:, variable] = mean + std * torch.from_numpy(steps).to(z_SL)
        return Sweep(f"latent {variable}", steps, trained.decoded(z_SL))
    n_categories = trained.vae.config.n_categories
    z_SL = middle_L.repeat(n_categories, 1)
    z_SL[:, columns] = torch.eye(n_categories, device=trained.device)
    name = f"categories {variable - n_continuous}"
    return Sweep(name, np.arange(n_categories, dtype=np.float64), trained.decoded(z_SL))


def _has_categories(config: ModelConfig) -> bool:
    return config.posterior in {"categorical", "joint"}


def _n_continuous(config: ModelConfig) -> int:
    if config.posterior == "categorical":
        return 0
    return config.latent_dim - (config.n_categorical * config.n_categories if config.posterior == "joint" else 0)


def _variables(config: ModelConfig) -> list[slice]:
    """Give the columns of z that each variable takes."""
    n_continuous = _n_continuous(config)
    starts = range(n_continuous, config.latent_dim, config.n_categories)
    return [
        *(slice(i, i + 1) for i in range(n_continuous)),
        *(slice(start, start + config.n_categories) for start in starts),
    ]


def _most_telling(trained: Trained, x: Tensor, variables: list[slice]) -> list[int]:
    """Order variables by the KL divergence of what is exported for this row from the prior, falling."""
    n_continuous = _n_continuous(trained.vae.config)
    feature, logvar = (t[0].double() for t in trained.vae.posterior.statistics(trained.vae.encoder(x)))
    mean, std = (moment.double() for moment in trained.prior_moments())
    gaussian = 0.5 * (((feature - mean) / std) ** 2 + logvar.exp() / std**2 - 1 - logvar + 2 * std.log())
    categorical = torch.special.xlogy(feature, feature / mean)
    divergences = [
        (gaussian if index < n_continuous else categorical)[columns].sum().item()
        for index, columns in enumerate(variables)
    ]
    return sorted(range(len(variables)), key=lambda index: -divergences[index])


def _two_latents(latents: tuple[int, int], *, n_continuous: int) -> tuple[int, int]:
    if n_continuous < 2:
        raise InputError(f"got a model with {n_continuous} continuous latents, wanted at least 2; use sweep")
    pair = tuple(latents)
    if len(pair) != 2 or pair[0] == pair[1] or any(latent not in range(n_continuous) for latent in pair):
        raise InputError(f"got latents={latents!r}, wanted two different numbers from 0 to {n_continuous - 1}")
    return int(pair[0]), int(pair[1])


def _line(start_L: Tensor, end_L: Tensor, t_S1: Tensor) -> Tensor:
    # Both ends to the bit, which start + t * (end - start) would miss.
    return (1 - t_S1) * start_L + t_S1 * end_L


def _arc(start_L: Tensor, end_L: Tensor, t_S1: Tensor) -> Tensor:
    cosine = torch.nn.functional.cosine_similarity(start_L.double(), end_L.double(), dim=0).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if torch.sin(angle) < 1e-6:
        return _line(start_L, end_L, t_S1)
    weights = torch.sin((1 - t_S1) * angle) / torch.sin(angle), torch.sin(t_S1 * angle) / torch.sin(angle)
    return (weights[0] * start_L + weights[1] * end_L).to(start_L)
