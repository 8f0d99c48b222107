"""The stage that logs a job to MLflow, where that is asked for: settings, figures, learning curves, files."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.config import RunConfig
from pipelines.environment import CONFIG_FILE, ENVIRONMENT_FILE
from pipelines.evaluate import METRICS_FILE
from pipelines.job import Job
from pipelines.pretrain import HISTORY
from pipelines.report import REPORT_FILE
from pipelines.stages import Outcome, Stage
from vaefeat.atomic import replace_file
from vaefeat.bundle import MANIFEST_FILE, load_bundle
from vaefeat.errors import ConfigError

__all__ = ["TRACK", "refuse_untrackable"]

_TRACKED_FILE = "tracked.json"
_ARTIFACTS = (CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, MANIFEST_FILE, REPORT_FILE)
#: MLflow takes no more at a time.
_PARAMETERS_A_CALL = 100


def refuse_untrackable(config: RunConfig) -> None:
    """Find out before an hour of training that MLflow is asked for and missing.

    Raises
    ------
    ConfigError
    """
    if config.track.mlflow and importlib.util.find_spec("mlflow") is None:
        raise ConfigError(
            "got track.mlflow=true, and MLflow is not installed: install it with pip install mlflow-skinny, or leave "
            "[track] out"
        )


def _track(job: Job, attempt: str) -> Outcome:
    del attempt  # MLflow keeps an interrupted run, marked as failed
    import mlflow

    track, bundle = job.config.track, load_bundle(job.folder)
    if track.uri:
        mlflow.set_tracking_uri(track.uri)
    experiment = mlflow.set_experiment(track.experiment)
    metrics = json.loads((job.folder / METRICS_FILE).read_text())
    with mlflow.start_run(run_name=job.config.name, tags={"vaefeat.digest": bundle.digest}) as run:
        _log_parameters(
            mlflow,
            {
                **job.config.picked("preset", "effort", "data", "probe"),
                # Not only what the configuration says, but all that the preset made of it.
                **{f"model.{key}": value for key, value in bundle.manifest.model.items()},
                **{f"train.{key}": value for key, value in bundle.manifest.train.items()},
            },
        )
        mlflow.log_metrics(dict(_numbers(metrics)))
        for record in json.loads((job.folder / HISTORY).read_text()):
            curves = {f"history.{key}": value for key, value in record.items() if key != "epoch"}
            mlflow.log_metrics(curves, step=record["epoch"])
        for name in _ARTIFACTS:
            mlflow.log_artifact(str(job.folder / name))
    content = {"run_id": run.info.run_id, "experiment_id": experiment.experiment_id, "uri": mlflow.get_tracking_uri()}
    replace_file(job.folder / _TRACKED_FILE, f"{json.dumps(content, indent=1)}\n".encode())
    return Outcome((_TRACKED_FILE,), f"MLflow run {run.info.run_id}")


def _log_parameters(mlflow: Any, values: Mapping[str, Any]) -> None:
    names = list(values)
    for start in range(0, len(names), _PARAMETERS_A_CALL):
        mlflow.log_params({name: values[name] for name in names[start : start + _PARAMETERS_A_CALL]})


def _numbers(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Name the figures that say how a run did."""
    for name, value in metrics["training"].items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)
    for found in metrics["test_error_percent"]:
        # MLflow's names hold no commas.
        yield f"test error percent/{found['features'].replace(',', '')}/{found['head']}", found["mean"]
    yield "calibration error", metrics["calibration"]["error"]
    yield "neighbours of the same class percent", metrics["neighbours"]["same_class_percent"]


TRACK = Stage(
    name="track",
    does="log to MLflow",
    settings=lambda config: config.picked("track"),
    rows=None,
    reads=(METRICS_FILE, MANIFEST_FILE, HISTORY, REPORT_FILE),
    writes=(_TRACKED_FILE,),
    work=_track,
)
