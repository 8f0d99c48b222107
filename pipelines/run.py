"""The main job: pretrain, export, serve, embed over HTTP, classify with few labels, report."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.decomposition import PCA

from pipelines.config import RunConfig
from pipelines.datasets import Dataset, load_dataset
from pipelines.probes import HEADS, Probe, draw_labels, probe
from pipelines.report import write_report
from pipelines.server import running_server
from vaefeat.atomic import replace_file
from vaefeat.bundle import Bundle
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import RemoteError
from vaefeat.pretraining import pretrain
from vaefeat.remote import RemoteEncoder

__all__ = ["RunResult", "run"]

_ROWS_A_CALL = 4096
_ROWS_COMPARED = 256
#: As data sets are commonly reduced for few labels.
_PCA_COMPONENTS = 32
_FEATURES = {"mean": "vaefeat, posterior mean", "hidden": "vaefeat, last hidden layer"}


@dataclass(frozen=True)
class RunResult:
    """What a run found out; ``results.json`` holds it.

    Attributes
    ----------
    config : RunConfig
    bundle : Bundle
    probes : list of Probe
    seconds : dict of str to float
        Wall time of each stage.
    rows_per_s : float
        Rows embedded over HTTP in a second.
    environment : dict
        Date, hardware and versions.
    """

    config: RunConfig
    bundle: Bundle
    probes: list[Probe]
    seconds: dict[str, float]
    rows_per_s: float
    environment: dict[str, Any] = field(default_factory=dict)


def run(config: RunConfig, *, console: Console, resume: bool = False) -> RunResult:
    """Do the whole job and write the run's folder.

    Parameters
    ----------
    config : RunConfig
    console : Console
        Where the table goes; progress goes to standard error.
    resume : bool
        Continue an interrupted training.

    Returns
    -------
    RunResult

    Raises
    ------
    VaefeatError
        Whatever a stage raises.
    """
    seconds: dict[str, float] = {}
    out = Path(config.out)
    with _timed(seconds, "load"):
        data = load_dataset(config.data, seed=config.probe.seed)
    # Drawn before anything takes long: an impossible number of labels is found out at once.
    seeds = range(config.probe.seed, config.probe.seed + config.probe.n_draws)
    draws = [draw_labels(data.train_labels, n_labels=config.probe.n_labels, seed=seed) for seed in seeds]
    with _timed(seconds, "pretrain and export"):
        bundle = pretrain(
            data.pretraining,
            preset=config.preset,
            effort=config.effort,
            model=config.model,
            train=config.train,
            out=out,
            name=config.name,
            resume=resume,
        )
    features, rows_per_s = _embed(config, out, data, seconds)
    features |= _baselines(data, seed=config.probe.seed)
    with _timed(seconds, "classify"), _progress() as progress:
        task = progress.add_task("classify", total=len(features) * len(HEADS) * len(draws))
        probes = probe(
            features,
            data.train_labels,
            data.test_labels,
            draws=draws,
            on_fit=lambda: progress.advance(task),
        )
    result = RunResult(config, bundle, probes, seconds, rows_per_s, _environment(bundle))
    with _timed(seconds, "report"), _progress() as progress:
        progress.add_task("report", total=None)
        write_report(out, result, data, features[_FEATURES["mean"]])
    replace_file(out / "results.json", (json.dumps(_results(result, data), indent=1) + "\n").encode())
    _print(console, result, data)
    return result


def _embed(
    config: RunConfig, out: Path, data: Dataset, seconds: dict[str, float]
) -> tuple[dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]], float]:
    """Embed training and test rows through the service, as any client would."""
    features = {}
    with _progress() as progress:
        task = progress.add_task(f"start the service ({config.serve.engine})", total=None)
        started = time.perf_counter()
        with running_server(out, engine=config.serve.engine, start_timeout_s=config.serve.start_timeout_s) as address:
            seconds["start the service"] = time.perf_counter() - started
            progress.remove_task(task)
            total = len(_FEATURES) * (len(data.train) + len(data.test))
            task = progress.add_task("embed over HTTP", total=total)
            started = time.perf_counter()
            with RemoteEncoder(address, model=config.name) as encoder:
                _require_same_bits(encoder, OnnxEncoder(out), data.test[:_ROWS_COMPARED])
                for output, name in _FEATURES.items():
                    features[name] = (
                        _embed_rows(encoder, data.train, output, progress, task),
                        _embed_rows(encoder, data.test, output, progress, task),
                    )
            seconds["embed over HTTP"] = time.perf_counter() - started
            progress.remove_task(task)
            progress.add_task("stop the service", total=None)
    return features, total / seconds["embed over HTTP"]


def _require_same_bits(remote: RemoteEncoder, local: OnnxEncoder, rows: NDArray[Any]) -> None:
    """Compare the service with the library on a few rows: on processors both give the same bits."""
    if remote.provider != local.provider or local.device != "cpu":
        return
    if not np.array_equal(remote.embed(rows), local.embed(rows)):
        raise RemoteError(f"the service at {remote.url} gives other features than {local!r} itself; please report it")


def _embed_rows(
    encoder: RemoteEncoder, rows: NDArray[Any], output: str, progress: Progress, task: Any
) -> NDArray[np.float32]:
    parts = []
    for start in range(0, len(rows), _ROWS_A_CALL):
        parts.append(encoder.embed(rows[start : start + _ROWS_A_CALL], output=output))
        progress.advance(task, len(parts[-1]))
    return np.concatenate(parts)


def _baselines(data: Dataset, *, seed: int) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Give what the features must beat, from the rows that the encoder was trained on."""
    scale = max(1.0, float(np.abs(data.pretraining.array[:1000]).max()))
    raw = [(part.reshape(len(part), -1) / scale).astype(np.float32) for part in (data.train, data.test)]
    fitted_on = (data.pretraining.array.reshape(len(data.pretraining), -1) / scale).astype(np.float32)
    pca = PCA(min(_PCA_COMPONENTS, *fitted_on.shape), random_state=seed).fit(fitted_on)
    name = "pixels" if data.train.ndim == 4 else "columns"
    return {
        f"raw {name}": (raw[0], raw[1]),
        f"PCA, {pca.n_components_} components": (pca.transform(raw[0]), pca.transform(raw[1])),
    }


def _print(console: Console, result: RunResult, data: Dataset) -> None:
    config = result.config
    table = Table(
        title=f"{config.name}: test error (%) of logistic regression on {config.probe.n_labels} labels, "
        f"mean and standard deviation over {config.probe.n_draws} draws, {len(data.test):,} test rows",
        title_justify="left",
    )
    table.add_column("features")
    for head in HEADS:
        table.add_column(head, justify="right")
    for name in dict.fromkeys(p.features for p in result.probes):
        cells = [p for p in result.probes if p.features == name]
        table.add_row(name, *(f"{p.mean:.1f} ± {p.spread:.1f}" for p in cells))
    console.print(table)
    stages = ", ".join(f"{stage} {value:.1f} s" for stage, value in result.seconds.items())
    console.print(f"{stages}; {result.rows_per_s:,.0f} rows/s over HTTP", highlight=False)
    console.print(f"bundle  {config.out}\nreport  {config.out}/report.html", highlight=False)


def _results(result: RunResult, data: Dataset) -> dict[str, Any]:
    return {
        "config": result.config.to_dict(),
        "digest": result.bundle.digest,
        "environment": result.environment,
        "seconds": result.seconds,
        "rows_per_s": result.rows_per_s,
        "n_train": len(data.train),
        "n_test": len(data.test),
        "test_error_percent": [{**asdict(p), "mean": p.mean, "standard_deviation": p.spread} for p in result.probes],
    }


def _environment(bundle: Bundle) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": _processor(),
        "python": platform.python_version(),
        **bundle.manifest.versions,
    }


def _processor() -> str:
    from vaefeat.processors import available_cpus

    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.is_file()
        else []
    )
    return f"{available_cpus()} cores, {names[0] if names else platform.machine()}"


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
