"""A grid's models are ordinary models: in order, named, exported, and listed in a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from numpy.typing import NDArray
from typer.testing import CliRunner

from vaefeat import ModelConfig, OnnxEncoder, TrainConfig, cli_grid, load_bundle
from vaefeat.ensemble import Ensemble, bytes_of
from vaefeat.errors import BundleError, ConfigError, InputError, NonFiniteLossError
from vaefeat.grid import GridRun, best_run, pretrain_grid
from vaefeat.model.evaluation import evaluate
from vaefeat.model.objectives import OBJECTIVES
from vaefeat.model.vae import VAE

MODEL = ModelConfig(network="mlp", hidden_dims=(16,))
TRAIN = TrainConfig(max_epochs=2, device="cpu", threads=1)


def run_grid(rows: NDArray[Any], grid: dict[str, Any], **settings: Any) -> list[GridRun]:
    return pretrain_grid(rows, grid=grid, **{"model": MODEL, "train": TRAIN, "progress": False, **settings})


def test_every_combination_is_written_as_a_bundle_and_listed(digits_rows: NDArray[np.uint8], tmp_path: Path) -> None:
    runs = run_grid(digits_rows, {"latent_dim": [2, 5], "kl_weight": [0.5]}, out=tmp_path)
    assert [run.settings for run in runs] == [{"latent_dim": n, "kl_weight": 0.5} for n in (2, 5)]
    table = json.loads((tmp_path / "grid.json").read_text())
    for run, row in zip(runs, table, strict=True):
        assert row["name"] == row["bundle"] == run.name == f"latent_dim-{run.settings['latent_dim']}-kl_weight-0.5"
        assert run.path == tmp_path / run.name
        bundle = run.bundle()
        assert bundle.digest == load_bundle(tmp_path / run.name).digest
        assert bundle.manifest.latent_dim == run.settings["latent_dim"] == row["settings"]["latent_dim"]
        assert bundle.manifest.train == run.train.to_dict()
        assert bundle.manifest.metrics["elbo"] == row["elbo"]
        assert bundle.manifest.data["n_rows"] == len(digits_rows)
        assert (row["failed"], row["epochs"]) == (None, 2)
        features = OnnxEncoder(run.path).embed(digits_rows[:50])
        with torch.no_grad():
            wanted = run.vae.features(torch.from_numpy(digits_rows[:50]))[0]
        np.testing.assert_allclose(features, wanted.numpy(), atol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"grid.json", *(run.name for run in runs)}


def test_figures_are_those_of_the_models_on_their_heldout_rows(digits_rows: NDArray[np.uint8]) -> None:
    runs = run_grid(digits_rows, {"seed": [3, 4], "kl_weight": [1.0, 4.0]})
    assert len({tuple(run.result.heldout.tolist()) for run in runs if run.result}) == 2
    for run in runs:
        assert run.result is not None
        evaluation = evaluate(
            run.vae,
            OBJECTIVES["elbo"](run.train),
            digits_rows[run.result.heldout],
            kl_weight=run.train.kl_weight,
            batch_size=512,
            seed=run.train.seed,
        )
        assert run.figures["elbo"] == pytest.approx(evaluation.elbo, rel=1e-6)
        assert run.figures["elbo"] == pytest.approx(run.figures["log_likelihood"] - run.figures["kl"])
        assert run.figures["active_units"] == len(evaluation.active)
        assert run.figures["rows_per_s"] > 0


def test_best_is_the_only_bundle_when_the_best_is_wanted(digits_rows: NDArray[np.uint8], tmp_path: Path) -> None:
    runs = run_grid(digits_rows, {"learning_rate": [1e-4, 3e-3]}, out=tmp_path, bundles="best", models_at_once=1)
    assert best_run(runs) is runs[1]
    assert [run.path for run in runs] == [None, tmp_path / "learning_rate-0.003"]
    assert [row["bundle"] for row in json.loads((tmp_path / "grid.json").read_text())] == [None, "learning_rate-0.003"]
    assert runs[0].bundle().name == "learning_rate-0.0001"
    assert {path.name for path in tmp_path.iterdir()} == {"grid.json", "learning_rate-0.003"}


def test_a_failed_model_is_marked_and_has_no_bundle(
    digits_rows: NDArray[np.uint8], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = run_grid(digits_rows, {"learning_rate": [1e30, 1e-3]}, out=tmp_path, bundles="none")
    bad, good = runs
    assert bad.failed is not None
    assert "in epoch 1, batch 2" in bad.failed
    assert "learning_rate-1e30 is given up" in caplog.text
    assert (good.failed, best_run(runs)) == (None, good)
    with pytest.raises(NonFiniteLossError, match="got no model from learning_rate-1e30"):
        bad.bundle()
    with pytest.raises(InputError, match=r"got 1 runs that all failed.*lower learning_rate"):
        best_run([bad])
    rows = json.loads((tmp_path / "grid.json").read_text())
    assert [row["failed"] for row in rows] == [bad.failed, None]
    assert [row["elbo"] for row in rows] == [None, good.figures["elbo"]]


def test_models_that_do_not_fit_at_once_are_trained_in_several_runs(
    digits_rows: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without noise it makes no difference which models are trained beside one.
    settings = {
        "model": ModelConfig(network="mlp", hidden_dims=(16,), posterior="deterministic"),
        "train": TrainConfig(max_epochs=1, objective="reconstruction", device="cpu"),
    }
    grid = {"latent_dim": [2, 4, 3], "seed": [0, 1]}
    whole = run_grid(digits_rows, grid, **settings)
    sizes = []

    def counting(vaes: Sequence[VAE], *given: Any, **named: Any) -> Ensemble:
        sizes.append(len(vaes))
        return Ensemble(vaes, *given, **named)

    monkeypatch.setattr("vaefeat.grid.Ensemble", counting)
    monkeypatch.setattr("vaefeat.grid._MEMORY_BYTES", 4 * bytes_of(whole[2].vae, whole[2].train))
    parts = run_grid(digits_rows, grid, **settings)
    assert sizes == [4, 2]
    for one, other in zip(whole, parts, strict=True):
        assert one.name == other.name
        assert one.figures["elbo"] == pytest.approx(other.figures["elbo"], rel=1e-5)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({}, "got a grid without keys, wanted values for any of latent_dim, kl_weight"),
        ({"hidden_dims": [(8,), (16,)]}, "got 'hidden_dims' in a grid.*call pretrain_grid once for each hidden_dims"),
        ({"free_bits": [0, 0.1]}, "got 'free_bits' in a grid"),
        ({"latent_dims": [2, 4]}, "got grid key 'latent_dims'; did you mean 'latent_dim'"),
        ({"seed": []}, r"got seed=\[\] in a grid, wanted its values, such as \[0, 1, 2\]"),
        ({"seed": 3}, "got seed=3 in a grid"),
        ({"latent_dim": "8,16"}, "got latent_dim='8,16' in a grid"),
        ({"kl_weight": [1, 1.0]}, "got kl_weight=1 twice in a grid"),
        ({"kl_weight": [1, -1]}, "got kl_weight=-1"),
        ({"latent_dim": [2.5]}, "got latent_dim=2.5"),
    ],
)
def test_a_grid_that_is_none_is_refused(digits_rows: NDArray[np.uint8], grid: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run_grid(digits_rows, grid)


def test_what_cannot_be_used_is_refused_before_training(digits_rows: NDArray[np.uint8], tmp_path: Path) -> None:
    grid = {"seed": [0, 1]}
    with pytest.raises(ConfigError, match=r"got objective='mmd'.*one after another"):
        run_grid(digits_rows, grid, train=TrainConfig(objective="mmd"))
    with pytest.raises(ConfigError, match="got models_at_once=0"):
        run_grid(digits_rows, grid, models_at_once=0)
    with pytest.raises(ConfigError, match="got bundles 'some'"):
        run_grid(digits_rows, grid, bundles="some")
    with pytest.raises(InputError, match="all the same"):
        run_grid(np.ones((10, 4)), grid)
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="choose another with out="):
        run_grid(digits_rows, grid, out=tmp_path / "file" / "folder")


def test_values_from_numpy_are_taken_and_names_that_are_too_long_are_numbers(
    digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    grid = {"learning_rate": np.array([1e-3, 1 / 3000]), "weight_decay": np.linspace(1e-5, 1 / 3, 2), "latent_dim": [2]}
    runs = run_grid(digits_rows, grid, out=tmp_path, bundles="none")
    assert [run.name for run in runs] == ["run-0", "run-1", "run-2", "run-3"]
    assert json.loads((tmp_path / "grid.json").read_text())[3]["settings"]["learning_rate"] == 1 / 3000


def command(*arguments: str | Path) -> str:
    app = typer.Typer()
    app.add_typer(cli_grid.app)
    app.command("other")(lambda: None)  # with one command alone Typer leaves out its name
    done = CliRunner().invoke(app, ["grid", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_verb_prints_and_writes_the_table(digits_rows: NDArray[np.uint8], tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", digits_rows)
    settings = [*("--set", "train.max_epochs=1"), *("--set", "model.hidden_dims=[16]"), *("--set", "model.network=mlp")]
    over = ["--over", "model.latent_dim=2,3", "--over", "train.learning_rate=1e-3,1e30"]
    out = tmp_path / "out"
    shown = command(tmp_path / "rows.npy", "--out", out, *over, *settings, "--bundles", "best")
    assert "failed" in shown
    assert "4 models, 1 bundles" in shown
    rows = json.loads((out / "grid.json").read_text())
    assert [row["settings"]["latent_dim"] for row in rows] == [2, 2, 3, 3]
    assert [row["failed"] is None for row in rows] == [True, False, True, False]
    for row in rows[::2]:
        assert f"{row['elbo']:.2f}" in shown


@pytest.mark.parametrize(
    ("over", "words"),
    [
        (["latent_dim=2"], "got --over key 'latent_dim'; did you mean 'model.latent_dim'"),
        (["model.latent_dim"], "got --over 'model.latent_dim', wanted key=value,value"),
        (["model.latent_dim=2", "model.latent_dim=3"], "got --over model.latent_dim twice"),
        (["model.latent_dim=2,x"], "wanted numbers with commas between"),
        (["model.network=mlp"], "wanted numbers with commas between"),
    ],
)
def test_verb_refuses_what_is_no_grid(tmp_path: Path, over: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        command(tmp_path / "rows.npy", "--out", tmp_path, *(text for value in over for text in ("--over", value)))
