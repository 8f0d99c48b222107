"""The command line's ways to train: presets, streams, memory, grids."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from vaefeat import cli, load_bundle
from vaefeat.blocks_arrays import Blocks
from vaefeat.cli import app
from vaefeat.errors import InputError

SMALL = ("--set", "model.hidden_dims=[8]", "--set", "model.network=mlp", "--set", "model.latent_dim=2")


def run(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def rows_file(tmp_path: Path, digits_rows: NDArray[np.uint8]) -> Path:
    np.save(tmp_path / "rows.npy", digits_rows[:300])
    return tmp_path / "rows.npy"


def test_pretrain_with_a_preset_records_its_settings(rows_file: Path, tmp_path: Path) -> None:
    run("pretrain", rows_file, "--out", tmp_path / "b", "--preset", "textbook", "--set", "train.max_epochs=1", *SMALL)
    assert load_bundle(tmp_path / "b").manifest.train["learning_rate"] == 4e-3


def test_pretrain_streams_what_it_is_told_to(rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    choose = cli._rows

    def remembered(*arguments: object, **options: object) -> object:
        rows = choose(*arguments, **options)  # type: ignore[arg-type]
        seen.append(isinstance(rows, Blocks))
        return rows

    monkeypatch.setattr(cli, "_rows", remembered)
    for option in ((), ("--stream",), ("--in-memory",)):
        run("pretrain", rows_file, "--out", tmp_path / "b", "--set", "train.max_epochs=1", *SMALL, *option)
    assert seen == [False, True, False]


def test_pretrain_streams_by_itself_what_memory_cannot_hold_and_says_so(
    rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vaefeat.processors.available_memory", lambda: 1000)
    output = run("pretrain", rows_file, "--out", tmp_path / "b", "--set", "train.max_epochs=1", *SMALL)
    assert "read while training" in output.replace("\n", " ")
    assert load_bundle(tmp_path / "b").manifest.data["n_rows"] == 300


def test_streaming_what_cannot_be_read_in_pieces_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", X=np.zeros((3, 2)))
    with pytest.raises(InputError, match=r"\.npz"):
        run("pretrain", tmp_path / "rows.npz", "--out", tmp_path / "b", "--stream")


def test_advice_to_resume_is_in_words_of_the_command_line(
    rows_file: Path, tmp_path: Path, run_here: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    # A folder in the checkpoint's place: it cannot be written, as on a disk that is full.
    (tmp_path / "b" / "training" / "checkpoint.safetensors" / "in the way").mkdir(parents=True)
    done = run_here(app, "pretrain", rows_file, "--out", tmp_path / "b", "--set", "train.max_epochs=1", *SMALL)
    assert done.returncode == 2
    assert "Free some space and continue with the same command with --resume" in done.stderr
    assert "resume=True" not in done.stderr


def test_grid_trains_and_writes_a_bundle_for_each_combination(rows_file: Path, tmp_path: Path) -> None:
    over = ("--over", "model.latent_dim=2,3", "--over", "train.seed=0,1")
    few = ("--set", "train.max_epochs=1", "--set", "model.hidden_dims=[8]", "--set", "model.network=mlp")
    run("grid", rows_file, "--out", tmp_path / "grid", *over, *few)
    table = json.loads((tmp_path / "grid" / "grid.json").read_text())
    assert len(list((tmp_path / "grid").glob("*/bundle.json"))) == 4
    assert "latent_dim-3-seed-1" in json.dumps(table)
