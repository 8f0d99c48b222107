"""The stage that logs a job to MLflow, where that is asked for: settings, figures, learning curves, files."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.config import RunConfig
from pipelines.environment import CONFIG_FILE, ENVIRONMENT_FILE
from pipelines.evaluate import METRICS_FILE
from pipelines.finetuning.stage import CLASSIFIER_FOLDER, COMPARISON, COMPARISON_PICTURE
from pipelines.job import Job
from pipelines.pretrain import HISTORY
from pipelines.report import REPORT_FILE
from pipelines.stages import Outcome, Stage
from vaefeat.atomic import replace_file
from vaefeat.bundle import MANIFEST_FILE, load_bundle
from vaefeat.errors import ConfigError

__all__ = ["TRACK", "refuse_untrackable"]

_TRACKED_FILE = "tracked.json"
_ARTIFACTS = (CONFIG_FILE, ENVIRONMENT_FILE, MANIFEST_FILE, REPORT_FILE)
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
    with mlflow.start_run(run_name=job.config.name, tags={"vaefeat.digest": bundle.digest}) as run:
        _log_parameters(
            mlflow,
            {
                **job.config.picked("preset", "effort", "data", *_tables_of_judging(job)),
                # Not only what the configuration says, but all that the preset made of it.
                **{f"model.{key}": value for key, value in bundle.manifest.model.items()},
                **{f"train.{key}": value for key, value in bundle.manifest.train.items()},
            },
        )
        mlflow.log_metrics(
            dict(_numbers({**bundle.manifest.metrics, "active_units": len(bundle.manifest.active_units)}))
        )
        if job.is_labelled:
            mlflow.log_metrics(dict(_judgement(json.loads((job.folder / METRICS_FILE).read_text()))))
            mlflow.log_artifact(str(job.folder / METRICS_FILE))
        if job.config.finetune.files:
            mlflow.log_metrics(dict(_comparison(json.loads((job.folder / COMPARISON).read_text()))))
            for name in (COMPARISON, COMPARISON_PICTURE):
                mlflow.log_artifact(str(job.folder / name), CLASSIFIER_FOLDER)
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


def _tables_of_judging(job: Job) -> tuple[str, ...]:
    return ("probe",) * job.is_labelled + ("finetune",) * bool(job.config.finetune.files)


def _numbers(training: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Name the figures that say how training did."""
    for name, value in training.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)


def _judgement(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Name the figures that say what the features are worth."""
    for found in metrics["test_error_percent"]:
        # MLflow's names hold no commas.
        yield f"test error percent/{found['features'].replace(',', '')}/{found['head']}", found["mean"]
    yield "calibration error", metrics["calibration"]["error"]
    yield "neighbours of the same class percent", metrics["neighbours"]["same_class_percent"]


def _comparison(comparison: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Name the error of every classifier, the interval of the one that is shipped, and its error on other rows.

    A name that is the beginning of another one up to a slash is a file where MLflow wants a folder.
    """
    for one in comparison["classifiers"]:
        yield f"classifier error percent/{one['name']}", one["error_percent"]
        if one["name"] == comparison["shipped"]:
            low, high = one["interval_percent"]
            yield "shipped classifier error percent", one["error_percent"]
            yield "shipped classifier error percent low", low
            yield "shipped classifier error percent high", high
    if (test := comparison["test"]) is not None:
        yield "shipped classifier test error percent", test["error_percent"]


TRACK = Stage(
    name="track",
    does="log to MLflow",
    settings=lambda config: config.picked("track"),
    rows=None,
    reads=(METRICS_FILE, MANIFEST_FILE, HISTORY, REPORT_FILE, COMPARISON, COMPARISON_PICTURE),
    writes=(_TRACKED_FILE,),
    work=_track,
)
