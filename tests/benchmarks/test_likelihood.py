"""The benchmark through its command line, on a few real images."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from benchmarks.likelihood import app
from benchmarks.likelihood_rows import ROWS, Row
from benchmarks.likelihood_runs import checkpoint_of, evaluate_row, read_row, shortened, train_row
from vaefeat.data import load_rows
from vaefeat.errors import CheckpointError, InputError, TrainingInterrupted
from vaefeat.observers import EpochRecord, Observer

_ROOT = Path(__file__).parents[2]
_SIZES = ["--max-rows", "300", "--test-rows", "20", "--samples", "30"]


@pytest.fixture(scope="module")
def mnist(data_dir: Path) -> Path:
    return data_dir / "MNIST"


@pytest.fixture(scope="module")
def images(mnist: Path) -> NDArray[Any]:
    return np.array(load_rows(mnist, max_rows=400).array)


@pytest.fixture(scope="module")
def unseen(mnist: Path) -> NDArray[Any]:
    return np.array(load_rows(mnist, split="test", max_rows=12).array)


def _command(data: Path, out: Path, *arguments: str) -> list[str]:
    named = ["--data", str(data), "--out", str(out), "--threads", "1"]
    return [sys.executable, "-m", "benchmarks.likelihood", *named, *arguments]


def _run(data: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(data, out, *arguments), cwd=_ROOT, capture_output=True, text=True, timeout=200)


def _invoke(data: Path, out: Path, *arguments: str) -> Result:
    """Run the command within this process, which saves starting Python; errors come as exceptions."""
    return CliRunner().invoke(app, ["--data", str(data), "--out", str(out), "--threads", "1", *arguments])


def _report(result: Result) -> dict[str, Any]:
    assert result.exception is None, result.output
    report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return report


def _three_epochs() -> Row:
    return shortened(ROWS["vae_1l"], epochs=3, threads=1)


def test_command_trains_evaluates_and_prints_json_last(mnist: Path, tmp_path: Path) -> None:
    results = tmp_path / "new" / "likelihood.json"
    results.parent.mkdir()
    results.write_text(json.dumps({"nll": {"best": 81.0, "vae_1l": 1.0}, "rows": {"best": {"nll": 81.0}}}))
    rows = ["--only", "vae_1l", "--only", "iwae50_1l", "--only", "curve_z3"]
    epochs = [part for row in ("vae_1l", "iwae50_1l", "curve_z3") for part in ("--epochs", f"{row}=1")]
    done = _run(mnist, tmp_path / "out", *rows, *epochs, *_SIZES, "--results", str(results))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["nll"].keys() == report["standard_error"].keys() == {"vae_1l", "iwae50_1l"}
    assert 0 < report["standard_error"]["vae_1l"] < report["sampling_error"]["vae_1l"]
    assert report["published"]["iwae50_1l"]["nll"] == 84.78
    assert report["rows"]["iwae50_1l"]["begins_with"] == "vae_1l"
    assert report["rows"]["vae_1l"]["finished"] is True
    assert report["rows"]["vae_1l"]["nll"] < -report["rows"]["vae_1l"]["elbo"]
    assert report["rows"]["curve_z3"]["curve"][0][0] == 295
    # Rows that were not run keep their figures.
    merged = json.loads(results.read_text())
    assert merged["nll"] == {"best": 81.0, **report["nll"]}
    assert merged["rows"]["best"] == {"nll": 81.0}
    assert (tmp_path / "out" / "likelihood-curve.png").stat().st_size > 1000


@pytest.mark.slow
def test_command_killed_and_resumed_gives_the_figures_of_an_unbroken_run(mnist: Path, tmp_path: Path) -> None:
    arguments = ["--only", "vae_1l", "--epochs", "vae_1l=30", *_SIZES]
    started = subprocess.Popen(
        _command(mnist, tmp_path / "parts", *arguments), cwd=_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    checkpoint = checkpoint_of("vae_1l", tmp_path / "parts")
    while not checkpoint.is_file() and started.poll() is None:
        time.sleep(0.02)
    started.kill()
    said = started.communicate()[1].decode()
    assert started.returncode == -signal.SIGKILL, said
    continued = _report(_invoke(mnist, tmp_path / "parts", *arguments, "--resume"))["rows"]["vae_1l"]
    unbroken = _report(_invoke(mnist, tmp_path / "whole", *arguments))["rows"]["vae_1l"]
    assert continued["sessions"][1]["from_epoch"] > 0
    assert [continued[key] for key in ("nll", "elbo", "epochs", "heldout_elbo")] == [
        unbroken[key] for key in ("nll", "elbo", "epochs", "heldout_elbo")
    ]


def test_training_reads_no_test_image(mnist: Path, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    for name in ("train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"):
        if (mnist / "raw" / name).is_file():
            (tmp_path / "half" / name).symlink_to((mnist / "raw" / name).resolve())
    arguments = ["--only", "vae_1l", "--epochs", "vae_1l=2", *_SIZES]
    without = _invoke(tmp_path / "half", tmp_path / "out", *arguments)
    assert isinstance(without.exception, InputError)
    assert "test" in str(without.exception)
    # Training is over all the same, and what it gave is what it gives where the test images are at hand.
    trained = _report(_invoke(mnist, tmp_path / "out", *arguments, "--resume"))["rows"]["vae_1l"]
    assert trained["finished"]
    assert [session["from_epoch"] for session in trained["sessions"]] == [0]


def test_checkpoint_is_neither_overwritten_nor_changed_by_a_look(mnist: Path, tmp_path: Path) -> None:
    arguments = ["--only", "vae_1l", "--epochs", "vae_1l=3", *_SIZES]
    stopped = _report(_invoke(mnist, tmp_path, *arguments, "--minutes", "0"))["rows"]["vae_1l"]
    assert (stopped["epochs"], stopped["epochs_planned"], stopped["finished"]) == (1, 3, False)
    assert "1 of 3 epochs" in stopped["note"]
    again = _invoke(mnist, tmp_path, *arguments)
    assert isinstance(again.exception, InputError)
    assert "--resume" in str(again.exception)
    before = checkpoint_of("vae_1l", tmp_path).read_bytes()
    looked = _report(_invoke(mnist, tmp_path, *arguments, "--evaluate-anyway"))["rows"]["vae_1l"]
    assert looked["nll"] == stopped["nll"]
    assert checkpoint_of("vae_1l", tmp_path).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "vae1l"], "vae_1l"),
        (["--epochs", "best"], "ROW=N"),
        (["--only", "iwae50_1l", "--max-rows", "50"], "train that one first"),
        (["--only", "best", "--evaluate-anyway", "--max-rows", "50"], "train it first"),
        (["--smoke", "--results", "x.json"], "leave one of them out"),
    ],
)
def test_command_with_nonsense_says_what_to_do(mnist: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    done = _invoke(mnist, tmp_path / "out", *arguments)
    assert isinstance(done.exception, InputError)
    assert said in str(done.exception)


def test_command_on_other_images_refuses_them_in_one_line(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((5, 1, 8, 8), dtype=np.uint8))
    done = _run(tmp_path / "rows.npy", tmp_path / "out")
    assert done.returncode == 2
    assert "wanted MNIST" in done.stderr
    assert "Traceback" not in done.stderr


def test_list_names_every_row_and_reads_nothing() -> None:
    done = CliRunner().invoke(app, ["--list"])
    assert done.exit_code == 0
    assert all(name in done.stdout for name in ROWS)


def test_row_stopped_evaluated_and_continued_gives_the_figures_of_an_unbroken_run(
    images: NDArray[Any], unseen: NDArray[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = _three_epochs()
    whole = train_row(row, images, tmp_path / "whole", resume=False, progress=False)
    wanted = evaluate_row(whole, unseen, tmp_path / "whole", n_samples=25, threads=1, progress=False)

    stopped = train_row(row, images, tmp_path / "parts", resume=False, minutes=1e-6, progress=False)
    assert not stopped.finished
    assert len(stopped.history) == 1
    early = evaluate_row(stopped, unseen, tmp_path / "parts", n_samples=25, threads=1, progress=False)
    assert early["nll"] > wanted["nll"] + 1
    continued = train_row(row, images, tmp_path / "parts", resume=True, progress=False)
    assert continued.finished
    # Not the figures of the weights that were evaluated before.
    got = evaluate_row(continued, unseen, tmp_path / "parts", n_samples=25, threads=1, progress=False)
    assert got["nll"] == wanted["nll"]

    # The evaluation itself continues from what is on the disk.
    monkeypatch.setattr("benchmarks.likelihood_runs._ROWS_AT_A_TIME", 5)
    for path in (tmp_path / "parts" / row.name).glob("evaluation-*.npy"):
        np.save(path, np.load(path)[:5])
    in_parts = evaluate_row(continued, unseen, tmp_path / "parts", n_samples=25, threads=1, progress=False)
    assert in_parts["nll"] == pytest.approx(wanted["nll"], abs=1e-3)


def test_row_whose_minutes_end_with_its_last_epoch_is_finished(images: NDArray[Any], tmp_path: Path) -> None:
    row = shortened(ROWS["vae_1l"], epochs=1, threads=1)
    assert train_row(row, images, tmp_path, resume=False, minutes=0, progress=False).finished


def test_seconds_add_up_over_continuations(images: NDArray[Any], tmp_path: Path) -> None:
    row = _three_epochs()
    first = train_row(row, images, tmp_path, resume=False, minutes=0, progress=False)
    both = train_row(row, images, tmp_path, resume=True, progress=False)
    assert [session["from_epoch"] for session in both.sessions] == [0, 1]
    assert both.seconds > first.seconds > 0
    assert both.seconds > 0.99 * sum(record["seconds"] for record in both.history)


def test_row_continued_on_other_images_is_refused(images: NDArray[Any], tmp_path: Path) -> None:
    train_row(_three_epochs(), images, tmp_path, resume=False, minutes=0, progress=False)
    with pytest.raises(CheckpointError, match="other training images"):
        train_row(_three_epochs(), images[:300], tmp_path, resume=True, progress=False)


def test_checkpoint_of_another_tool_is_continued(images: NDArray[Any], tmp_path: Path) -> None:
    # One that training wrote alone, without the notes beside it.
    train_row(_three_epochs(), images, tmp_path, resume=False, minutes=0, progress=False)
    (tmp_path / "vae_1l" / "sessions.json").unlink()
    continued = train_row(_three_epochs(), images, tmp_path, resume=True, progress=False)
    assert continued.finished
    assert continued.sessions[0] == {"from_epoch": 0, "seconds": continued.history[0]["seconds"]}


def test_signal_of_a_person_is_not_taken_for_the_clock(images: NDArray[Any], tmp_path: Path) -> None:
    class Person(Observer):
        def on_epoch(self, record: EpochRecord) -> None:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.likelihood_runs.ProgressBar", Person)
        with pytest.raises(TrainingInterrupted):
            train_row(_three_epochs(), images, tmp_path, resume=False)
    assert not read_row(_three_epochs(), images, tmp_path).finished


def test_row_without_the_one_it_begins_with_is_refused(tmp_path: Path) -> None:
    images: Any = np.random.default_rng(0).integers(0, 255, (20, 1, 28, 28)).astype(np.uint8)
    with pytest.raises(InputError, match="train that one first"):
        train_row(ROWS["iwae50_1l"], images, tmp_path, resume=False)


def test_figures_on_the_page_are_those_of_the_results() -> None:
    results = json.loads((_ROOT / "benchmarks" / "results" / "likelihood.json").read_text())
    page = (_ROOT / "docs" / "likelihood.md").read_text()
    for name, nll in results["nll"].items():
        line = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        row = results["rows"][name]
        wanted = f"**{nll:.2f}** | {row_published(name)} | {-row['elbo']:.2f} | {row['epochs']} |"
        assert wanted in line


def row_published(name: str) -> str:
    published = ROWS[name].published
    assert published is not None
    return f"{published.nll:.2f}"
