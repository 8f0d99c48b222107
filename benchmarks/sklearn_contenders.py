"""One contender of :mod:`benchmarks.sklearn`, in a process of its own.

``python -m benchmarks.sklearn_contenders NAME '{"threads": 1, ...}'`` prints one line of JSON. All are given the same
rows, flat and uint8, as scikit-learn's users have them, and scale them on their own time. The process is pinned to as
many processors as it has threads.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil
from numpy.typing import NDArray
from sklearn.decomposition import PCA, KernelPCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer

from benchmarks.few_labels_tasks import Task, open_task
from pipelines.probes import HEADS, Probe
from vaefeat import OnnxEncoder, VAEFeatures, VAETransformer, load_bundle
from vaefeat.data import fingerprint
from vaefeat.errors import InputError
from vaefeat.processors import available_memory

__all__ = ["CONTENDERS", "Contender", "Job", "compare_with_runtime", "run"]

#: Features of all who are free to choose; ours are the preset's.
_COMPONENTS = 32
_LABELS = (100, 1000)
_HEAD = "standardised"
#: A kernel of these rows fills the share of the free memory that it may have, as float32 and a copy.
_KERNEL_SHARE, _KERNEL_BYTES = 0.5, 2 * 4
#: KernelPCA.transform holds a kernel between its rows and those of fit.
_ROWS_AT_A_TIME = 1000
_WARM_UP_ROWS = 600
_LEAST_ROUNDS = 3
#: Compared with bare calls. Pairs are shorter so, and more: other work on the machine hits both or is outvoted.
_PAIRED_ROWS = 2048

Transform = Callable[[NDArray[Any]], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a contender is given.

    Attributes
    ----------
    data : str or None
        Folder with MNIST's IDX files in ``MNIST/``.
    bundle : str
        Folder of the encoder that :class:`VAEFeatures` opens, and that :class:`VAETransformer` writes.
    threads : int
    draws : int
        Of labels.
    seconds : float
        Of measuring a rate, where the least number of rounds does not take longer.
    quick : bool
        scikit-learn's digits, networks so small that figures mean nothing, and no test row.
    """

    data: str | None
    bundle: str
    threads: int = 1
    draws: int = 10
    seconds: float = 10.0
    quick: bool = False

    def task(self) -> Task:
        """Open the data set."""
        folder = None if self.data is None else Path(self.data)
        return open_task("digits" if self.quick else "mnist", folder, validation=self.quick)


@dataclass(frozen=True)
class Contender:
    """A way to make features.

    Attributes
    ----------
    title : str
    fit : callable
        Fits to a task's rows; gives what transforms flat rows, and its settings.
    warm_up : callable
        Compiles what is compiled at the first call.
    """

    title: str
    fit: Callable[[Task, Job], tuple[Transform, Mapping[str, Any]]]
    warm_up: Callable[[Task, Job], object] = lambda task, job: None


def run(name: str, job: Job) -> dict[str, Any]:
    """Fit a contender, transform with it, and judge what it gives.

    Returns
    -------
    dict
        ``fit_seconds`` and ``fit_cpu_seconds``; ``rows_per_s`` of transform, the median of rounds; ``memory_mib`` of
        the process, resident ``before`` fitting (with the rows), ``after`` it and a transform, and at its ``peak``;
        ``errors`` by number of labels: ``mean``, ``spread`` and those of the ``draws``, in percent; ``features``,
        ``settings`` and ``threads``. Of VAEFeatures also ``runtime``, see :func:`compare_with_runtime`.
    """
    contender, task = CONTENDERS[name], job.task()
    contender.warm_up(task, job)
    process = psutil.Process()
    before = process.memory_info().rss
    began, cpu_began = time.perf_counter(), time.process_time()
    transform, settings = contender.fit(task, job)
    fitted = {"fit_seconds": time.perf_counter() - began, "fit_cpu_seconds": time.process_time() - cpu_began}
    images, truth = task.judges()
    rows = images.reshape(len(images), -1)
    rate = _rate(transform, rows, seconds=job.seconds)
    memory = {
        "before": before / 2**20,
        "after": process.memory_info().rss / 2**20,
        "peak": _peak_bytes() / 2**20,
    }
    judges = transform(rows)
    found = {
        "title": contender.title,
        "threads": job.threads,
        "rows": len(task.train),
        **fitted,
        "rows_per_s": rate,
        "memory_mib": memory,
        "features": judges.shape[1],
        "errors": _errors(transform, task, judges, truth, job.draws),
        "settings": dict(settings),
    }
    if name == "vaefeatures":
        found["runtime"] = compare_with_runtime(
            job.bundle, images[:_PAIRED_ROWS], threads=job.threads, seconds=job.seconds
        )
    return found


def compare_with_runtime(
    bundle: str, images: NDArray[np.uint8], *, threads: int, seconds: float
) -> dict[str, dict[str, float]]:
    """Time VAEFeatures.transform against bare calls of ONNX Runtime, one after the other, many times.

    Both have the same rows, threads and rows in a call; the calls get what the graph takes, already checked and of its
    dtype and shape, and their results are not put together.

    Parameters
    ----------
    bundle : str
    images : ndarray of shape (n, C, H, W), uint8
    threads : int
    seconds : float
        For each kind of input.

    Returns
    -------
    dict
        By what transform is given, ``uint8``, ``float32`` and ``float64`` flat, ``images`` as they are: rows/s of
        ``transform`` and of ``onnxruntime``, and the ``ratio``, all medians; that of ratios is of neighbours in time.
    """
    features = VAEFeatures(bundle, device="cpu", threads=threads).fit(images)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    content = load_bundle(bundle).read("encoder.onnx")
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    assert isinstance(features.encoder_, OnnxEncoder)
    step = features.encoder_.batch_size
    parts = [images[start : start + step] for start in range(0, len(images), step)]
    flat = images.reshape(len(images), -1)
    given = {"uint8": flat, "float32": flat.astype(np.float32), "float64": flat.astype(np.float64), "images": images}

    def call() -> list[Any]:
        return [session.run(["mean"], {"rows": part}) for part in parts]

    found = {}
    for kind, rows in given.items():
        pairs = _paired(call, lambda rows=rows: features.transform(rows), seconds=seconds)  # type: ignore[misc]  # a default
        found[kind] = {
            "transform": len(images) / statistics.median(ours for _, ours in pairs),
            "onnxruntime": len(images) / statistics.median(bare for bare, _ in pairs),
            "ratio": statistics.median(bare / ours for bare, ours in pairs),
        }
    return found


def _paired(one: Callable[[], object], other: Callable[[], object], *, seconds: float) -> list[tuple[float, float]]:
    """Time two in turns: whoever goes first finds the caches that the other one left, so that changes, too."""
    one(), other()
    pairs: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(pairs) < _LEAST_ROUNDS or time.perf_counter() - began < seconds:
        if len(pairs) % 2:
            second, first = _timed(other), _timed(one)
        else:
            first, second = _timed(one), _timed(other)
        pairs.append((first, second))
    return pairs


def _timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _peak_bytes() -> int:
    """Give the most memory that this program had resident; getrusage counts what its parent had at the fork."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [line for line in lines if line.startswith("VmHWM")]
    return int(peak.split()[1]) << 10


def _rate(transform: Transform, rows: NDArray[Any], *, seconds: float) -> float:
    transform(rows[:1])
    times: list[float] = []
    while len(times) < _LEAST_ROUNDS or sum(times) < seconds:
        times.append(_timed(lambda: transform(rows)))
    return len(rows) / statistics.median(times)


def _errors(
    transform: Transform, task: Task, judges: NDArray[np.float32], truth: NDArray[np.int64], n_draws: int
) -> dict[str, dict[str, Any]]:
    found = {}
    for budget in (budget for budget in task.budgets() if budget in _LABELS):
        draws = [task.draw(budget, seed) for seed in range(n_draws)]
        # Each row once: some transform slowly.
        needed, places = np.unique(np.concatenate(draws), return_inverse=True)
        labelled = transform(task.train[needed].reshape(len(needed), -1))
        errors = []
        for chosen, place in zip(draws, np.split(places, n_draws), strict=True):
            with warnings.catch_warnings():
                # A thousand steps are enough for the error; nobody reads the coefficients.
                warnings.simplefilter("ignore", ConvergenceWarning)
                head = HEADS[_HEAD]().fit(labelled[place], task.train_labels[chosen])
            errors.append(100 * (1 - head.score(judges, truth)))
        probe = Probe("", _HEAD, tuple(errors))
        found[str(budget)] = {"mean": probe.mean, "spread": probe.spread, "draws": errors}
    return found


def _flat(task: Task) -> NDArray[Any]:
    return task.train.reshape(len(task.train), -1)


def _scaler(task: Task) -> FunctionTransformer:
    highest = np.float32(task.train.max())
    return FunctionTransformer(lambda X: np.asarray(X, dtype=np.float32) / highest)


def _fit_pca(task: Task, job: Job) -> tuple[Transform, Mapping[str, Any]]:
    pipe = make_pipeline(_scaler(task), PCA(_COMPONENTS, random_state=0)).fit(_flat(task))
    return pipe.transform, {"components": _COMPONENTS}


def _fit_kernel_pca(task: Task, job: Job) -> tuple[Transform, Mapping[str, Any]]:
    free = available_memory()
    if free is None:
        raise InputError("got a system that does not tell its free memory, which decides how many rows a kernel is of")
    n_rows = min(len(task.train), math.isqrt(int(free * _KERNEL_SHARE / _KERNEL_BYTES)))
    kernel = KernelPCA(_COMPONENTS, kernel="rbf", eigen_solver="randomized", random_state=0, n_jobs=job.threads)
    pipe: Pipeline = make_pipeline(_scaler(task), kernel).fit(_flat(task)[:n_rows])

    def transform(rows: NDArray[Any]) -> NDArray[np.float32]:
        parts = range(0, len(rows), _ROWS_AT_A_TIME)
        return np.concatenate([pipe.transform(rows[start : start + _ROWS_AT_A_TIME]) for start in parts])

    return transform, {"components": _COMPONENTS, "kernel": "rbf", "rows": n_rows, "free_gib": free / 2**30}


def _make_umap(task: Task, job: Job) -> Pipeline:
    from umap import UMAP

    # A seed allows but one thread, with a warning; without one, as many as there are.
    seed = 0 if job.threads == 1 else None
    return make_pipeline(_scaler(task), UMAP(n_components=_COMPONENTS, random_state=seed, n_jobs=job.threads))


def _fit_umap(task: Task, job: Job) -> tuple[Transform, Mapping[str, Any]]:
    pipe = _make_umap(task, job).fit(_flat(task))
    return pipe.transform, {"components": _COMPONENTS, "neighbours": pipe[-1].n_neighbors}


def _compile_umap(task: Task, job: Job) -> object:
    some = _flat(task)[:_WARM_UP_ROWS]
    return _make_umap(task, job).fit(some).transform(some[: _WARM_UP_ROWS // 2])


def _fit_pythae(task: Task, job: Job) -> tuple[Transform, Mapping[str, Any]]:
    # Here, for the others' memory is measured without torch.
    from benchmarks.few_labels_features import FEATURES, Plan

    with tempfile.TemporaryDirectory() as folder:
        features = FEATURES["pythae"](task, Plan(Path(folder), job.threads, job.quick))
    shape = task.train.shape[1:]
    return lambda rows: features.embed(rows.reshape(len(rows), *shape)), features.settings


def _fit_vae_transformer(task: Task, job: Job) -> tuple[Transform, Mapping[str, Any]]:
    smaller: dict[str, Any] = {"max_epochs": 2, "hidden_dims": (32,), "channels": (8, 16)} if job.quick else {}
    vae = VAETransformer(
        image_shape=task.train.shape[1:],
        effort="fast",
        device="cpu",
        train_options={"threads": job.threads},
        random_state=0,
        **smaller,
    )
    vae.fit(_flat(task))
    return vae.transform, {"effort": "fast", "digest": vae.save_bundle(job.bundle).digest}


def _fit_vae_features(task: Task, job: Job) -> tuple[Transform, Mapping[str, Any]]:
    bundle = load_bundle(job.bundle)
    if not job.quick and bundle.manifest.data["fingerprint"] != fingerprint(task.train):
        raise InputError(f"got {job.bundle}, an encoder of other rows than these, wanted one of MNIST's training rows")
    features = VAEFeatures(bundle, device="cpu", threads=job.threads).fit(_flat(task))
    return features.transform, {"digest": bundle.digest, "epochs": bundle.manifest.metrics["epochs"]}


CONTENDERS: Mapping[str, Contender] = {
    "pca": Contender("PCA", _fit_pca),
    "kernel_pca": Contender("KernelPCA", _fit_kernel_pca),
    "umap": Contender("UMAP", _fit_umap, _compile_umap),
    "pythae": Contender("pythae's VAE", _fit_pythae),
    "vaetransformer": Contender("VAETransformer", _fit_vae_transformer),
    "vaefeatures": Contender("VAEFeatures", _fit_vae_features),
}


if __name__ == "__main__":
    asked = Job(**json.loads(sys.argv[2]))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: asked.threads])
    print(json.dumps(run(sys.argv[1], asked)))
