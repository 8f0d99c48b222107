"""``report.html``: one self-contained page about a run, with pictures, and ``overview.png`` for other pages."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, select_autoescape
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from vaefeat import plots
from vaefeat.atomic import replace_file
from vaefeat.generation import sample
from vaefeat.inference import denoise
from vaefeat.pretraining import HISTORY_FILE, TRAINING_FOLDER

if TYPE_CHECKING:
    from pipelines.datasets import Dataset
    from pipelines.run import RunResult

__all__ = ["write_report"]

_MAP_ROWS = 2000
_PAIRS = 14
_SAMPLES = 36


def write_report(out: Path, result: RunResult, data: Dataset, means: tuple[NDArray[Any], NDArray[Any]]) -> None:
    """Draw and write the report of a run.

    Parameters
    ----------
    out : Path
        The run's folder; it holds the training history.
    result : RunResult
    data : Dataset
    means : (train, test)
        Posterior means of the rows, each of shape (n, d).
    """
    history = json.loads((out / TRAINING_FOLDER / HISTORY_FILE).read_text())
    spec = result.bundle.manifest.input
    pairs, samples = _generated(result, data)
    points, labels = _map(np.concatenate(means), data, seed=result.config.probe.seed)
    overview = plots.png(
        plots.overview(
            history=history, pairs=pairs, samples=samples, points=points, labels=labels, low=spec.low, high=spec.high
        )
    )
    replace_file(out / "overview.png", overview)
    pictures = {"overview": overview, "errors": plots.png(_errors(result))}
    page = _template().render(
        result=result,
        manifest=result.bundle.manifest,
        history=history,
        n_train=len(data.train),
        n_test=len(data.test),
        n_pretraining=len(data.pretraining),
        images={name: base64.b64encode(picture).decode() for name, picture in pictures.items()},
        is_image=pairs is not None,
    )
    replace_file(out / "report.html", page.encode())


def _generated(result: RunResult, data: Dataset) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    """Give test rows with their reconstructions, and samples from the prior; nothing for tables."""
    if result.bundle.manifest.input.kind != "image":
        return None, None
    rows = data.test[:_PAIRS]
    pairs = np.concatenate([rows, denoise(result.bundle, rows)])
    return pairs, sample(result.bundle, _SAMPLES, seed=result.bundle.manifest.train["seed"])


def _map(means: NDArray[Any], data: Dataset, *, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Lay rows out in two dimensions by their means alone; the labels only colour them."""
    some = np.random.default_rng(seed).permutation(len(means))[:_MAP_ROWS]
    names = np.array(data.names)[np.concatenate([data.train_labels, data.test_labels])[some]]
    chosen = means[some]
    if chosen.shape[1] == 1:
        return np.column_stack([chosen[:, 0], np.zeros(len(chosen))]), names
    if len(chosen) < 50 or chosen.shape[1] == 2:
        return PCA(2).fit_transform(chosen), names
    with threadpool_limits(1):  # as in vaefeat.training: on a busy machine a second thread costs more than it brings
        return TSNE(2, init="pca", random_state=seed, max_iter=500).fit_transform(chosen), names


def _errors(result: RunResult) -> Any:
    probes = sorted((p for p in result.probes if p.head == result.probes[0].head), key=lambda p: p.mean)
    drawn, axes = plots.figure(width=6.5, height=0.5 + 0.55 * len(probes))
    plots.draw_errors(
        axes,
        [p.features for p in probes],
        [p.mean for p in probes],
        [p.spread for p in probes],
        ours={p.features for p in probes if p.features.startswith("vaefeat")},
        title=f"{result.config.probe.n_labels} labels, features {probes[0].head}",
    )
    return drawn


def _template() -> Any:
    folder = Path(__file__).parent
    return Environment(loader=FileSystemLoader(folder), autoescape=select_autoescape(["html.j2", "j2"])).get_template(
        "report.html.j2"
    )
