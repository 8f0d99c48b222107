"""The stage that judges the features: few labels against baselines, class by class, calibration, neighbours."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.impute import SimpleImputer
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from threadpoolctl import threadpool_limits

from pipelines.calibration import class_errors, measure_calibration
from pipelines.datasets import Dataset
from pipelines.features import FEATURES_FILE, Features, read_features
from pipelines.job import Job
from pipelines.probes import HEADS, predict, probe
from pipelines.progress import shown_progress
from pipelines.stages import Outcome, Stage
from vaefeat.atomic import replace_file
from vaefeat.bundle import MANIFEST_FILE, load_bundle
from vaefeat.table_schema import TableSchema

__all__ = ["EVALUATE", "METRICS_FILE", "OURS", "baselines", "nearest"]

METRICS_FILE = "metrics.json"
#: What is judged, by the encoder's output; the first one in more detail.
OURS = {"mean": "vaefeat, posterior mean", "hidden": "vaefeat, last hidden layer"}
#: As data sets are commonly reduced for few labels.
_PCA_COMPONENTS = 32
_NEIGHBOURS = 10
_JUDGED_NEIGHBOURHOODS = 1000


def nearest(train: NDArray[np.float32], queries: NDArray[np.float32], *, count: int) -> NDArray[np.int64]:
    """Find the nearest training rows by the angle between their features, each feature standardised.

    Parameters
    ----------
    train : ndarray of shape (n, d)
    queries : ndarray of shape (m, d)
    count : int

    Returns
    -------
    ndarray of shape (m, min(count, n))
        Indices of training rows, the nearest first.
    """
    middle, scale = train.mean(axis=0), train.std(axis=0)
    # A latent that nothing varies says nothing, and its noise must not be made as large as the others.
    scale = np.where(scale > 1e-3 * scale.max(initial=0.0), scale, np.inf)
    index = NearestNeighbors(n_neighbors=min(count, len(train)), metric="cosine").fit((train - middle) / scale)
    with threadpool_limits(1):
        found: NDArray[np.int64] = index.kneighbors((queries - middle) / scale, return_distance=False)
    return found


def _evaluate(job: Job, attempt: str) -> Outcome:
    del attempt
    data, features, bundle = job.dataset, read_features(job.folder), load_bundle(job.folder)
    judged = {name: (features.train[output], features.test[output]) for output, name in OURS.items()}
    judged |= baselines(data, seed=job.config.probe.seed)
    with shown_progress() as progress:
        task = progress.add_task("classify", total=len(judged) * len(HEADS) * len(job.draws))
        probes = probe(
            judged,
            data.train_labels,
            data.test_labels,
            draws=job.draws,
            on_fit=lambda: progress.advance(task),
        )
    content = {
        "name": bundle.name,
        "digest": bundle.digest,
        "n_pretraining": bundle.manifest.data["n_rows"],
        "n_train": len(data.train),
        "n_test": len(data.test),
        "training": {**bundle.manifest.metrics, "active_units": len(bundle.manifest.active_units)},
        "test_error_percent": [{**asdict(p), "mean": p.mean, "standard_deviation": p.spread} for p in probes],
        **_in_detail(data, features, job.draws),
    }
    replace_file(job.folder / METRICS_FILE, f"{json.dumps(content, indent=1)}\n".encode())
    summary = f"test error {probes[0].mean:.1f} ± {probes[0].spread:.1f} % with {job.config.probe.n_labels} labels"
    return Outcome((METRICS_FILE,), summary, {"classifiers": len(judged) * len(HEADS) * len(job.draws)})


def _in_detail(data: Dataset, features: Features, draws: list[NDArray[np.int64]]) -> dict[str, Any]:
    """Judge the posterior mean behind the first head by class, by its probabilities, and by who is near whom."""
    head = next(iter(HEADS))
    train, test = features.train["mean"], features.test["mean"]
    probabilities = predict(train, test, data.train_labels, head=head, draws=draws, n_classes=len(data.names))
    some = np.linspace(0, len(test) - 1, min(len(test), _JUDGED_NEIGHBOURHOODS)).astype(np.int64)
    near = nearest(train, test[some], count=_NEIGHBOURS)
    same = data.train_labels[near] == data.test_labels[some][:, None]
    shares = np.bincount(data.train_labels, minlength=len(data.names)) / len(train)
    return {
        "detail": {"features": OURS["mean"], "head": head},
        "class_errors": [asdict(found) for found in class_errors(probabilities, data.test_labels, names=data.names)],
        "calibration": asdict(measure_calibration(probabilities, data.test_labels)),
        "neighbours": {
            "count": near.shape[1],
            "rows": len(some),
            "same_class_percent": 100 * float(same.mean()),
            "by_chance_percent": 100 * float(shares[data.test_labels[some]].mean()),
        },
    }


def baselines(data: Dataset, *, seed: int) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Give what the features must beat, from the rows that the encoder was trained on.

    Parameters
    ----------
    data : Dataset
    seed : int
        Of PCA.

    Returns
    -------
    dict of str to (train, test)
        Each of shape (n, d).
    """
    pretraining, table = data.pretraining.array, data.pretraining.table
    if table is None:
        scale = max(1.0, float(np.abs(pretraining[:1000]).max()))
        name = "raw pixels" if data.train.ndim == 4 else "raw columns"
        made = [
            (part.reshape(len(part), -1) / scale).astype(np.float32) for part in (data.train, data.test, pretraining)
        ]
    else:
        name, plain = "one-hot, imputed", _as_numbers(table).fit(pretraining)
        made = [plain.transform(part).astype(np.float32) for part in (data.train, data.test, pretraining)]
    train, test, fitted_on = made
    pca = PCA(min(_PCA_COMPONENTS, *fitted_on.shape), random_state=seed).fit(fitted_on)
    return {
        name: (train, test),
        f"PCA, {pca.n_components_} components": (pca.transform(train), pca.transform(test)),
    }


def _as_numbers(table: TableSchema) -> ColumnTransformer:
    """Give scikit-learn's own way with the codes and gaps of a table."""
    coded = [place for place, column in enumerate(table.columns) if column.n_codes]
    others = [place for place, column in enumerate(table.columns) if not column.n_codes]
    # A gap is one category more.
    words = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    numbers = make_pipeline(SimpleImputer(add_indicator=True, keep_empty_features=True), StandardScaler())
    return ColumnTransformer([("words", words, coded), ("numbers", numbers, others)])


EVALUATE = Stage(
    name="evaluate",
    does="judge the features with few labels",
    settings=lambda config: config.picked("probe", "data.pretrain_on"),
    rows="labelled",
    reads=(MANIFEST_FILE, FEATURES_FILE),
    writes=(METRICS_FILE,),
    work=_evaluate,
)
