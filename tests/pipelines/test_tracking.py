"""MLflow gets what a job found out, and is an error where it is asked for and missing."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from sklearn.datasets import load_digits

from pipelines.config import DataConfig, FinetuneConfig, RunConfig, TrackConfig, load_config
from pipelines.job import Job
from pipelines.run import run, stages_of
from pipelines.stages import Record, named
from pipelines.tracking import TRACK, refuse_untrackable
from vaefeat.errors import ConfigError

CHECKOUT = Path(__file__).parents[2]
CONFIG = CHECKOUT / "pipelines" / "configs" / "digits.toml"
SMALL = (
    "model.channels=[8, 8]",
    "model.hidden_dims=[32]",
    "train.max_epochs=2",
    "probe.n_draws=2",
    "serve.engine=local",
)
HAS_MLFLOW = importlib.util.find_spec("mlflow") is not None


def test_tracking_reads_what_there_is_of_figures() -> None:
    asked = RunConfig(track=TrackConfig(mlflow=True))
    few = FinetuneConfig(labels="labels.csv")
    for labelled, finetune, figures in (
        (True, FinetuneConfig(), {"metrics.json"}),
        (True, few, {"metrics.json", "classifier/results.json"}),
        (False, few, {"classifier/results.json"}),
        (False, FinetuneConfig(), set()),
    ):
        config = replace(asked, data=DataConfig(labelled=labelled), finetune=finetune)
        track = named(stages_of(Job(config)), "track")
        assert {"metrics.json", "classifier/results.json"} & set(track.reads) == figures


def test_tracking_is_a_stage_where_it_is_asked_for() -> None:
    assert "track" not in [stage.name for stage in stages_of(Job(RunConfig()))]
    assert stages_of(Job(RunConfig(track=TrackConfig(mlflow=True))))[-1].work is TRACK.work


@pytest.mark.skipif(HAS_MLFLOW, reason="MLflow is installed")
def test_tracking_without_mlflow_is_refused_with_what_to_install() -> None:
    refuse_untrackable(RunConfig())
    with pytest.raises(ConfigError, match="pip install mlflow-skinny"):
        refuse_untrackable(RunConfig(track=TrackConfig(mlflow=True)))


@pytest.mark.skipif(not HAS_MLFLOW, reason="MLflow is not installed; it is no dependency")
@pytest.mark.filterwarnings("ignore")  # MLflow's own
@pytest.mark.parametrize("labelled", [True, False])
def test_mlflow_gets_the_comparison_of_classifiers_with_and_without_labels_in_the_data(
    labelled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri, target = f"file:{tmp_path / 'mlruns'}", load_digits().target
    for name, rows in (("labels", range(100)), ("test", range(100, 150))):
        lines = "".join(f"{row},{target[row]}\n" for row in rows)
        (tmp_path / f"{name}.csv").write_text(f"id,label\n{lines}")
    config = load_config(CONFIG, (f"out={tmp_path / 'out'}", f"data.labelled={str(labelled).lower()}", *SMALL))
    wanted = FinetuneConfig(
        labels=str(tmp_path / "labels.csv"),
        test_labels=str(tmp_path / "test.csv"),
        only=("logistic", "knn"),
        n_draws=2,
    )
    config = replace(config, track=TrackConfig(mlflow=True, uri=uri), finetune=wanted)
    run(config, console=Console(quiet=True))
    results = json.loads((tmp_path / "out" / "classifier" / "results.json").read_text())
    client = MlflowClient(uri)
    run_id = json.loads((tmp_path / "out" / "tracked.json").read_text())["run_id"]
    logged = client.get_run(run_id).data
    errors = {one["name"]: one["error_percent"] for one in results["classifiers"]}
    assert len(errors) == 2
    assert {name: logged.metrics[f"classifier error percent/{name}"] for name in errors} == pytest.approx(errors)
    best = next(one for one in results["classifiers"] if one["name"] == results["shipped"])
    assert logged.metrics["shipped classifier error percent"] == pytest.approx(best["error_percent"])
    interval = [logged.metrics[f"shipped classifier error percent {end}"] for end in ("low", "high")]
    assert interval == pytest.approx(best["interval_percent"])
    assert logged.metrics["shipped classifier test error percent"] == pytest.approx(results["test"]["error_percent"])
    assert logged.params["finetune.n_draws"] == "2"
    assert [found.path for found in client.list_artifacts(run_id, "classifier")] == [
        "classifier/comparison.png",
        "classifier/results.json",
    ]
    assert ("calibration error" in logged.metrics) == labelled
    assert ("metrics.json" in {found.path for found in client.list_artifacts(run_id)}) == labelled
    assert logged.metrics["active_units"] > 0


@pytest.mark.skipif(not HAS_MLFLOW, reason="MLflow is not installed; it is no dependency")
@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_mlflow_gets_settings_figures_curves_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path / 'mlruns'}"
    config = load_config(CONFIG, (f"out={tmp_path / 'out'}", *SMALL))
    config = replace(config, track=TrackConfig(mlflow=True, uri=uri, experiment="tests"))
    job = Job(config)
    run(config, console=Console(quiet=True))
    record = Record.read(job, "track")
    assert record is not None
    run_id = json.loads((tmp_path / "out" / "tracked.json").read_text())["run_id"]
    assert record.summary == f"MLflow run {run_id}"
    client = MlflowClient(uri)
    logged = client.get_run(run_id)
    assert logged.data.params["train.max_epochs"] == "2"
    assert logged.data.params["probe.n_labels"] == "50"
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert logged.data.metrics["elbo"] == pytest.approx(metrics["training"]["elbo"])
    assert logged.data.metrics["test error percent/raw pixels/standardised"] > 0
    assert [point.step for point in client.get_metric_history(run_id, "history.heldout_elbo")] == [1, 2]
    assert {found.path for found in client.list_artifacts(run_id)} >= {"report.html", "metrics.json", "config.toml"}
