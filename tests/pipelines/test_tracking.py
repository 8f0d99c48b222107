"""MLflow gets what a job found out, and is an error where it is asked for and missing."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.config import RunConfig, TrackConfig, load_config
from pipelines.job import Job
from pipelines.run import run, stages_of
from pipelines.stages import Record
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


def test_tracking_is_a_stage_where_it_is_asked_for() -> None:
    assert TRACK not in stages_of(Job(RunConfig()))
    assert stages_of(Job(RunConfig(track=TrackConfig(mlflow=True))))[-1] is TRACK


@pytest.mark.skipif(HAS_MLFLOW, reason="MLflow is installed")
def test_tracking_without_mlflow_is_refused_with_what_to_install() -> None:
    refuse_untrackable(RunConfig())
    with pytest.raises(ConfigError, match="pip install mlflow-skinny"):
        refuse_untrackable(RunConfig(track=TrackConfig(mlflow=True)))


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
