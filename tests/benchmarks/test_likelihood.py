"""The benchmark through its command line, on a few real images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.likelihood_rows import ROWS
from benchmarks.likelihood_runs import evaluate_row, shortened, train_row
from vaefeat.data import load_rows
from vaefeat.errors import InputError, TrainingInterrupted
from vaefeat.observers import EpochRecord

_ROOT = Path(__file__).parents[2]


def _run(data: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.likelihood", "--data", str(data), "--out", str(out), "--threads", "1"]
    return subprocess.run([*command, *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=200)


def test_command_trains_evaluates_and_prints_json_last(data_dir: Path, tmp_path: Path) -> None:
    results = tmp_path / "likelihood.json"
    results.write_text(json.dumps({"nll": {"best": 81.0, "vae_1l": 1.0}, "rows": {"best": {"nll": 81.0}}}))
    rows = ["--only", "vae_1l", "--only", "iwae50_1l", "--only", "curve_z3"]
    epochs = [part for row in ("vae_1l", "iwae50_1l", "curve_z3") for part in ("--epochs", f"{row}=1")]
    sizes = ["--max-rows", "300", "--test-rows", "20", "--samples", "30"]
    done = _run(data_dir / "MNIST", tmp_path / "out", *rows, *epochs, *sizes, "--results", str(results))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["nll"].keys() == {"vae_1l", "iwae50_1l"}
    assert report["published"]["iwae50_1l"]["nll"] == 84.78
    assert report["rows"]["iwae50_1l"]["begins_with"] == "vae_1l"
    assert report["rows"]["vae_1l"]["finished"] is True
    assert report["rows"]["curve_z3"]["curve"][0][0] == 295
    # Rows that were not run keep their figures.
    merged = json.loads(results.read_text())
    assert merged["nll"] == {"best": 81.0, **report["nll"]}
    assert merged["rows"]["best"] == {"nll": 81.0}
    assert (tmp_path / "out" / "likelihood-curve.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "vae1l"], "vae_1l"),
        (["--epochs", "best"], "ROW=N"),
        (["--only", "iwae50_1l", "--max-rows", "50"], "train that one first"),
    ],
)
def test_command_with_nonsense_says_so_in_one_line(
    data_dir: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    done = _run(data_dir / "MNIST", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_row_stopped_and_continued_gives_the_figures_of_an_unbroken_run(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.array(load_rows(data_dir / "MNIST", max_rows=400).array)
    unseen = np.array(load_rows(data_dir / "MNIST", split="test", max_rows=12).array)
    row = shortened(ROWS["vae_1l"], epochs=3, threads=1)
    whole = train_row(row, images, tmp_path / "whole", resume=False, progress=False)
    wanted = evaluate_row(row, whole, unseen, tmp_path / "whole", n_samples=25, progress=False)

    stopped = train_row(row, images, tmp_path / "parts", resume=False, minutes=1e-6, progress=False)
    assert not stopped.finished
    assert len(stopped.history) == 1
    continued = train_row(row, images, tmp_path / "parts", resume=True, progress=False)
    assert continued.finished
    got = evaluate_row(row, continued, unseen, tmp_path / "parts", n_samples=25, progress=False)
    assert got == wanted

    # The evaluation itself continues from what is on the disk.
    path = next((tmp_path / "parts" / row.name).glob("evaluation-*.npy"))
    np.save(path, np.load(path)[:0])
    monkeypatch.setattr("benchmarks.likelihood_runs._ROWS_AT_A_TIME", 5)
    in_parts = evaluate_row(row, continued, unseen, tmp_path / "parts", n_samples=25, progress=False)
    assert in_parts["nll"] == pytest.approx(wanted["nll"], abs=1e-3)


def test_signal_of_a_person_is_not_taken_for_the_clock(data_dir: Path, tmp_path: Path) -> None:
    import signal

    from vaefeat.observers import Observer

    class Person(Observer):
        def on_epoch(self, record: EpochRecord) -> None:
            signal.raise_signal(signal.SIGINT)

    images = np.array(load_rows(data_dir / "MNIST", max_rows=200).array)
    row = shortened(ROWS["vae_1l"], epochs=2, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.likelihood_runs.ProgressBar", Person)
        with pytest.raises(TrainingInterrupted):
            train_row(row, images, tmp_path, resume=False)


def test_row_without_the_one_it_begins_with_is_refused(tmp_path: Path) -> None:
    images: Any = np.random.default_rng(0).integers(0, 255, (20, 1, 28, 28)).astype(np.uint8)
    with pytest.raises(InputError, match="train that one first"):
        train_row(ROWS["iwae50_1l"], images, tmp_path, resume=False)
