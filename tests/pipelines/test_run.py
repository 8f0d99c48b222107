"""The main job as a shell runs it, on real rows, with a real server."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_wine

from pipelines.__main__ import app
from pipelines.config import RunConfig, load_config
from pipelines.datasets import load_dataset
from pipelines.run import run, run_stage, show_plan
from vaefeat import OnnxEncoder, VAEFeatures, load_bundle
from vaefeat.checkpoint import read_checkpoint
from vaefeat.errors import InputError

CHECKOUT = Path(__file__).parents[2]
CONFIG = CHECKOUT / "pipelines" / "configs" / "digits.toml"
SMALL = ("model.channels=[8, 8]", "model.hidden_dims=[32]", "probe.n_draws=3", "serve.engine=local")


def words(out: Path, *overrides: str) -> list[str]:
    settings = [word for text in (f"out={out}", *SMALL, *overrides) for word in ("--set", text)]
    return ["run", str(CONFIG), *settings]


def command(out: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "pipelines", *words(out, *overrides)]


def pipelines_run(out: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, *overrides), capture_output=True, text=True, check=False, cwd=CHECKOUT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("run") / "digits"
    done = pipelines_run(out, "train.max_epochs=4")
    assert done.returncode == 0, done.stderr
    return out, done


def test_run_prints_a_table_of_features_and_baselines(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, done = finished
    for name in ("vaefeat, posterior mean", "vaefeat, last hidden layer", "raw pixels", "PCA, 32 components"):
        assert re.search(rf"{name}.*\d+\.\d ± \d+\.\d.*\d+\.\d ± \d+\.\d", done.stdout), name
    assert str(out) in done.stdout.replace("\n", "")


def test_run_leaves_a_bundle_a_report_and_every_figure(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, _ = finished
    results = json.loads((out / "metrics.json").read_text())
    assert results["digest"] == load_bundle(out).digest
    assert sum(found["n_rows"] for found in results["class_errors"]) == results["n_test"]
    assert results["n_train"] + results["n_test"] == 1797
    assert len(results["test_error_percent"]) == 8
    for entry in results["test_error_percent"]:
        assert len(entry["errors"]) == 3
        assert entry["mean"] == pytest.approx(np.mean(entry["errors"]))
        assert 0 <= entry["mean"] < 90  # chance is 90
    with Image.open(out / "overview.png") as picture:
        assert picture.size[0] > 1000


def test_report_is_self_contained_and_its_pictures_open(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    out, _ = finished
    page = (out / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"']?(http|/)|url\(|@import|<script", page)
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    # Curves, reconstructions, samples, maps, errors, classes, calibration; six rows with eight neighbours each.
    assert len(pictures) == 7 + 6 * 9
    for index, content in enumerate(pictures):
        (tmp_path / f"{index}.png").write_bytes(base64.b64decode(content))
        with Image.open(tmp_path / f"{index}.png") as picture:
            picture.load()
    results = json.loads((out / "metrics.json").read_text())
    for entry in results["test_error_percent"]:
        assert f"{entry['mean']:.1f} ± {entry['standard_deviation']:.1f}" in page
    assert f"{results['neighbours']['same_class_percent']:.1f} % are of the same class" in page
    for stage in ("pretrain", "export", "embed", "check", "evaluate"):
        assert f"<td>{stage}</td>" in page


def test_run_proves_that_service_file_and_library_agree(
    finished: tuple[Path, subprocess.CompletedProcess[str]], digits_rows: NDArray[np.uint8]
) -> None:
    out, _ = finished
    check = json.loads((out / "check.json").read_text())
    assert (check["same_bits"], check["rows"], check["largest_difference"]) == (True, 1797, 0.0)
    table = pq.read_table(out / "features.parquet")
    assert table["split"].to_pylist().count("train") == json.loads((out / "metrics.json").read_text())["n_train"]
    # An independent way: the rows of the file, found among the library's by their values.
    ours = {row.tobytes() for row in OnnxEncoder(out).embed(digits_rows)}
    kept = np.array(table["mean"].to_pylist(), dtype=np.float32)
    assert {row.tobytes() for row in kept} == ours


def settings(out: Path, *overrides: str) -> RunConfig:
    return load_config(CONFIG, (f"out={out}", *SMALL, *overrides))


def test_run_that_is_done_does_nothing_and_a_new_setting_would_run_what_reads_it(
    finished: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "lock"}
    run(settings(out, "train.max_epochs=4"), console=Console(quiet=True))
    assert capsys.readouterr().err.count("done before") == 6
    console = Console(width=200, file=io.StringIO())
    show_plan(settings(out, "train.max_epochs=4", "probe.n_labels=60"), console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    states = dict(re.findall(r"^ *(\w+) +(done|will run|may run)", shown, flags=re.M))
    expected = dict.fromkeys(("pretrain", "export", "embed", "check"), "done")
    assert states == expected | {"evaluate": "will run", "report": "will run"}
    assert "probe.n_labels is 60, was 50" in shown
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_folder_alone_is_enough_to_get_the_same_bundle_again(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    out, _ = finished
    again = load_config(out / "config.toml", (f"out={tmp_path / 'again'}",))
    for stage in ("pretrain", "export"):
        run_stage(stage, again, console=Console(quiet=True))
    assert load_bundle(tmp_path / "again").digest == load_bundle(out).digest
    environment = json.loads((out / "environment.json").read_text())
    assert environment["versions"]["numpy"] == np.__version__
    assert f"numpy=={np.__version__}" in (out / "requirements.txt").read_text().splitlines()


@pytest.mark.slow
def test_run_stopped_by_sigterm_goes_on_where_it_was(tmp_path: Path) -> None:
    long = ("train.max_epochs=12", "train.batch_size=32", "probe.n_draws=1")
    out = tmp_path / "digits"
    process = subprocess.Popen(
        command(out, *long), cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    checkpoint = out / "training" / "checkpoint.safetensors"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "nothing is lost: continue with the same command" in errors
    assert "resume=True" not in errors
    assert "Traceback" not in errors
    assert not (out / "bundle.json").exists()
    assert list((out / "stages").glob("*.json")) == []
    reached = read_checkpoint(checkpoint)[1]["epoch"]
    assert reached > 0
    done = pipelines_run(out, *long)
    assert done.returncode == 0, done.stderr
    assert "pretrain: was interrupted" in done.stderr
    history = json.loads((out / "training" / "history.json").read_text())
    assert [record["epoch"] for record in history] == list(range(1, 13))
    assert load_bundle(out).manifest.metrics["epochs"] == 12


def test_stage_whose_input_is_not_there_names_what_to_run_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stage 'evaluate' reads what stage 'pretrain' writes"):
        run_stage("evaluate", settings(tmp_path / "out"), console=Console(quiet=True))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=no/such/folder", "no/such/folder"),
        ("train.max_epoch=1", "did you mean 'max_epochs'"),
        ("probe.n_labels=5", "at least one label a class"),
        ("track.mlflow=1", "wanted true or false"),
    ],
)
def test_bad_input_is_one_error_and_no_traceback(
    override: str, message: str, tmp_path: Path, run_here: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_here(app, *words(tmp_path / "out", "train.max_epochs=1", override))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = pipelines_run(tmp_path / "file" / "out", "train.max_epochs=1")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr


@pytest.mark.slow
def test_table_with_categories_and_gaps_runs_whole(wine_table: pd.DataFrame, tmp_path: Path) -> None:
    labels = np.array(["red", "white", "rosé"])[load_wine().target]
    wine_table.assign(label=labels).to_csv(tmp_path / "wine.csv", index=False)
    over = (f"data.path={tmp_path / 'wine.csv'}", "train.max_epochs=2", "probe.n_labels=9", "probe.n_draws=2")
    config = load_config(CONFIG, (f"out={tmp_path / 'out'}", "serve.engine=local", "name=wine", *over))
    run(config, console=Console(quiet=True))
    encoder, data = OnnxEncoder(tmp_path / "out"), load_dataset(config.data, seed=config.probe.seed)
    assert encoder.input.table is not None
    table = pq.read_table(tmp_path / "out" / "features.parquet")
    kept = np.array(table["mean"].to_pylist(), dtype=np.float32)[np.array(table["split"]) == "train"]
    frame = encoder.input.table.frame(data.train)
    np.testing.assert_array_equal(kept, VAEFeatures(tmp_path / "out").fit(frame).transform(frame))
    assert json.loads((tmp_path / "out" / "check.json").read_text())["same_bits"]
    names = {
        found["features"] for found in json.loads((tmp_path / "out" / "metrics.json").read_text())["test_error_percent"]
    }
    assert "one-hot, imputed" in names
    again = load_config(tmp_path / "out" / "config.toml", (f"out={tmp_path / 'again'}",))
    for stage in ("pretrain", "export"):
        run_stage(stage, again, console=Console(quiet=True))
    assert load_bundle(tmp_path / "again").digest == encoder.digest


@pytest.mark.slow
def test_mnist_runs_whole(data_dir: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *command(
                tmp_path / "mnist", f"data.path={data_dir / 'MNIST'}", "data.pretrain_on=train", "train.max_epochs=1"
            )
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=CHECKOUT,
    )
    assert done.returncode == 0, done.stderr
    assert OnnxEncoder(tmp_path / "mnist").input.shape == (1, 28, 28)
