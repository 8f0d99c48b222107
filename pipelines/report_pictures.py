"""The pictures of a report, as PNG files, and the neighbours of some rows.

C channels, H height, W width.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from pipelines.datasets import Dataset, Parts
from pipelines.evaluate import nearest
from pipelines.features import Features
from pipelines.finetuning.stage import labels_in_files
from pipelines.job import Job
from vaefeat import judging_plots, plots
from vaefeat.bundle import Bundle
from vaefeat.drawing import sheet
from vaefeat.generation import sample
from vaefeat.inference import denoise
from vaefeat.table_schema import Column

__all__ = ["CHART_SCALE", "Neighbour", "draw_pictures", "neighbourhoods", "rows_of_all_classes"]

_MAP_ROWS = 2000
#: Images in a line of the page: as many as fill it, of large ones so many made smaller.
_LEAST_IN_LINE, _LINE_PIXELS, _GAP = 14, 964, 4
_SAMPLES, _TABLE_SAMPLES = 36, 1000
_EXPLAINED_ROWS = 1000
_QUERIES, _NEIGHBOURS = 6, 8
#: Pixels of a chart for each of the page, for screens that show more than one.
CHART_SCALE = 1.5
_PAGE_DPI = 96
#: Width of one image on the page, about.
_IMAGE_PIXELS = 56


class Neighbour(NamedTuple):
    """A row in a list of neighbours.

    Attributes
    ----------
    label : str
        Of its class, or its number where there are no classes.
    same : bool
        Whether that is the class of the row whose neighbour it is; True where there are no classes.
    picture : str or None
        A PNG in base64; None for tables.
    """

    label: str
    same: bool
    picture: str | None


def draw_pictures(
    job: Job,
    bundle: Bundle,
    *,
    history: Sequence[dict[str, Any]],
    metrics: Mapping[str, Any] | None,
    features: Features,
) -> dict[str, bytes]:
    """Draw everything that is a picture, by name; without metrics, where rows have no labels, what can be."""
    data, spec = job.parts, bundle.manifest.input
    points, labels, chosen = _map(job, features)
    figures = {"curves": judging_plots.training_curves(history)}
    if metrics is None or labels is None:
        figures["maps"] = judging_plots.known_labels_map(points, labels)
    else:
        figures["maps"] = judging_plots.few_label_maps(points, labels, chosen=chosen)
        figures |= _judgements(job, metrics)
    pictures, pairs, samples = {}, None, None
    seed = bundle.manifest.train["seed"]
    if spec.kind == "image":
        columns = max(_LEAST_IN_LINE, _LINE_PIXELS // (_zoom(data.shown) * max(data.shown.shape[2:]) + _GAP))
        shown = data.shown[_examples(data, count=columns)]
        pairs = np.concatenate([shown, denoise(bundle, shown)])
        samples = sample(bundle, _SAMPLES, seed=seed)
        pictures["reconstructions"] = _picture(pairs, columns=len(shown), low=spec.low, high=spec.high)
        pictures["samples"] = _picture(samples[: 2 * columns], columns=columns, low=spec.low, high=spec.high)
    else:
        some = data.shown[:_EXPLAINED_ROWS]
        known = None if spec.table is None else spec.table.columns
        # The likeliest category of every row would say nothing of how common each is.
        drawn = sample(bundle, _TABLE_SAMPLES, kind="mean" if known is None else "draw", seed=seed)
        figures["explained"] = judging_plots.columns_explained(_explained(some, denoise(bundle, some), known), known)
        figures["marginals"] = judging_plots.marginals(some, drawn, known)
    figures["overview"] = plots.overview(
        history=history, pairs=pairs, samples=samples, points=points, labels=labels, low=spec.low, high=spec.high
    )
    return pictures | {name: plots.png(made, dpi=round(CHART_SCALE * _PAGE_DPI)) for name, made in figures.items()}


def neighbourhoods(
    data: Parts, train: NDArray[np.float32], test: NDArray[np.float32], bundle: Bundle
) -> list[tuple[Neighbour, list[Neighbour]]]:
    """Give some test rows, of as many classes as there are places, each with its nearest training rows.

    Parameters
    ----------
    data : Parts
        Where there are no test rows, training rows are given with the nearest others.
    train, test : ndarray of shape (n, d)
        Posterior means.
    bundle : Bundle
    """
    queries, spec = _examples(data, count=_QUERIES), bundle.manifest.input

    def shown(row: NDArray[Any], label: str, same: bool) -> Neighbour:
        picture = None
        if spec.kind == "image":
            picture = base64.b64encode(_picture(row[None], columns=1, low=spec.low, high=spec.high)).decode()
        return Neighbour(label, same, picture)

    found = []
    for query, near in zip(queries, _near(data, train, test, queries), strict=True):
        if isinstance(data, Dataset):
            own = data.test_labels[query]
            labels = [(data.names[other], bool(other == own)) for other in data.train_labels[near]]
            label = data.names[own]
        else:
            label, labels = f"row {query}", [(f"row {index}", True) for index in near]
        others = [shown(data.train[index], *known) for index, known in zip(near, labels, strict=True)]
        found.append((shown(data.shown[query], label, True), others))
    return found


def _near(
    data: Parts, train: NDArray[np.float32], test: NDArray[np.float32], queries: NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """Find the training rows that are nearest to some of the rows that are shown, and are not these themselves."""
    if data.has_test:
        return list(nearest(train, test[queries], count=_NEIGHBOURS))
    # A row need not be the first among its equals.
    near = nearest(train, train[queries], count=_NEIGHBOURS + 1)
    return [found[found != query][:_NEIGHBOURS] for query, found in zip(queries, near, strict=True)]


def _examples(data: Parts, *, count: int) -> NDArray[np.int64]:
    """Choose rows to show: of all classes, or from all over where there are none."""
    if isinstance(data, Dataset):
        return rows_of_all_classes(data.test_labels, count=count)
    return np.linspace(0, len(data.shown) - 1, min(count, len(data.shown))).astype(np.int64)


def rows_of_all_classes(labels: NDArray[np.int64], *, count: int) -> NDArray[np.int64]:
    """Choose rows of as many classes as there are places: folders of images come sorted by class.

    Parameters
    ----------
    labels : ndarray of shape (n,)
        Class indices.
    count : int

    Returns
    -------
    ndarray of shape (min(count, n),)
        The first row of each class, then the second one of each, and so on.
    """
    turns = np.zeros(len(labels), dtype=np.int64)
    for index in np.unique(labels):
        own = labels == index
        turns[own] = np.arange(own.sum())
    chosen: NDArray[np.int64] = np.lexsort((labels, turns))[:count]
    return chosen


def _picture(images: NDArray[Any], *, columns: int, low: float, high: float) -> bytes:
    """Lay images (n, C, H, W) out as one PNG, each pixel as a square."""
    zoom = _zoom(images)
    larger = images.repeat(zoom, axis=2).repeat(zoom, axis=3)
    gap = _GAP * (len(images) > 1)
    colours = sheet(larger, columns=columns, low=low, high=high, gap=gap)
    # Gaps are see-through, and have the colour of the page, light or dark.
    seen = 1 - sheet(np.zeros_like(larger), columns=columns, low=0, high=1, gap=gap)[..., :1]
    file = io.BytesIO()
    pixels = np.rint(np.concatenate([colours, seen], axis=2) * 255).astype(np.uint8)
    Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    return file.getvalue()


def _zoom(images: NDArray[Any]) -> int:
    side: int = max(images.shape[2:])
    return max(1, round(_IMAGE_PIXELS / side))


def _explained(
    rows: NDArray[Any], reconstructions: NDArray[np.float32], known: Sequence[Column] | None
) -> NDArray[np.float64]:
    """Give for each column the share of its variance, or of the errors of its commonest code, that is gone."""
    flat, again = rows.reshape(len(rows), -1).astype(np.float64), reconstructions.reshape(len(rows), -1)
    kept = np.empty(flat.shape[1])
    for place in range(flat.shape[1]):
        there = ~np.isnan(flat[:, place])
        values, ours = flat[there, place], again[there, place]
        if known is not None and known[place].n_codes:
            before = 1 - np.unique(values, return_counts=True)[1].max(initial=0) / max(1, len(values))
            errors = float((values != ours).mean()) if len(values) else 0.0
        else:
            before, errors = (float(values.var()), float(((values - ours) ** 2).mean())) if len(values) else (0.0, 0.0)
        # A constant column is kept if it comes back.
        kept[place] = 1 - errors / before if before > 0 else float(errors < 1e-6)
    return kept


def _map(job: Job, features: Features) -> tuple[NDArray[Any], NDArray[Any] | None, NDArray[np.bool_]]:
    """Lay rows out in two dimensions by their means alone; labels only colour them, and the first draw's are marked.

    Where rows come without labels, those that files have colour them, and are marked; there may be none.
    """
    data, seed = job.parts, job.config.probe.seed
    n_rows = len(data.train) + len(data.test)
    labels: NDArray[Any] | None
    if isinstance(data, Dataset):
        labels, marked = np.array(data.names)[np.concatenate([data.train_labels, data.test_labels])], job.draws[0]
    else:
        labels, marked = _known_labels(job, n_rows), np.arange(0)
        if labels is not None:
            marked = np.random.default_rng(seed).permutation(np.flatnonzero(labels != None))[:_MAP_ROWS]  # noqa: E711 - an array, element by element
    others = np.setdiff1d(np.arange(n_rows), marked)
    count = max(0, _MAP_ROWS - len(marked))
    some = np.concatenate([marked, np.random.default_rng(seed).permutation(others)[:count]])
    means = np.concatenate([features.train["mean"], features.test["mean"]])[some]
    points = _in_two_dimensions(means, seed=seed)
    return points, None if labels is None else labels[some], np.arange(len(some)) < len(marked)


def _known_labels(job: Job, n_rows: int) -> NDArray[Any] | None:
    """Give what files of labels say of the rows, training rows first; None for a row of which they say nothing."""
    found = labels_in_files(job)
    if found is None:
        return None
    known: NDArray[Any] = np.full(n_rows, None, dtype=object)
    # Files speak of training rows alone, in their order.
    known[: len(found)] = found
    return known


def _in_two_dimensions(means: NDArray[np.float32], *, seed: int) -> NDArray[Any]:
    if means.shape[1] == 1:
        return np.column_stack([means[:, 0], np.zeros(len(means))])
    if len(means) < 50 or means.shape[1] == 2:
        return np.asarray(PCA(2).fit_transform(means))
    with threadpool_limits(1):  # as in vaefeat.training: on a busy machine a second thread costs more than it brings
        return np.asarray(TSNE(2, init="pca", random_state=seed, max_iter=500).fit_transform(means))


def _judgements(job: Job, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Draw what labels tell: errors, by kind of features and by class, and calibration."""
    classes, calibration = metrics["class_errors"], metrics["calibration"]
    return {
        "errors": _errors(job, metrics),
        "classes": judging_plots.class_errors(
            [found["name"] for found in classes],
            [found["error"] for found in classes],
            [f"as {found['taken_for']}" if found["taken_for"] else "" for found in classes],
        ),
        "reliability": judging_plots.reliability(
            calibration["confidence"],
            calibration["accuracy"],
            calibration["counts"],
            error=calibration["error"],
            n_bins=calibration["n_bins"],
        ),
    }


def _errors(job: Job, metrics: Mapping[str, Any]) -> Any:
    head = metrics["detail"]["head"]
    probes = [found for found in metrics["test_error_percent"] if found["head"] == head]
    probes.sort(key=lambda found: found["mean"])
    drawn, axes = plots.figure(width=6.5, height=0.6 + 0.55 * len(probes))
    plots.draw_errors(
        axes,
        [found["features"] for found in probes],
        [found["mean"] for found in probes],
        [found["standard_deviation"] for found in probes],
        ours={found["features"] for found in probes if found["features"].startswith("vaefeat")},
        title=f"{job.config.probe.n_labels} labels, features {head}",
    )
    return drawn
