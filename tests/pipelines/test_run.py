"""The main job as a shell runs it, on real rows, with a real server."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaefeat import OnnxEncoder, load_bundle

CHECKOUT = Path(__file__).parents[2]
CONFIG = CHECKOUT / "pipelines" / "configs" / "digits.toml"
SMALL = ("model.channels=[8, 8]", "model.hidden_dims=[32]", "probe.n_draws=3", "serve.engine=local")


def command(out: Path, *overrides: str) -> list[str]:
    settings = [word for text in (f"out={out}", *SMALL, *overrides) for word in ("--set", text)]
    return [sys.executable, "-m", "pipelines", "run", str(CONFIG), *settings]


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
    results = json.loads((out / "results.json").read_text())
    assert results["digest"] == load_bundle(out).digest
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
    assert not re.search(r"(src|href)=[\"']?(http|/)", page)
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(pictures) == 2
    for index, content in enumerate(pictures):
        (tmp_path / f"{index}.png").write_bytes(base64.b64decode(content))
        with Image.open(tmp_path / f"{index}.png") as picture:
            picture.load()
    results = json.loads((out / "results.json").read_text())
    for entry in results["test_error_percent"]:
        assert f"{entry['mean']:.1f} ± {entry['standard_deviation']:.1f}" in page


def test_run_stopped_by_sigterm_is_finished_by_resume(tmp_path: Path) -> None:
    settings = ("train.max_epochs=12", "train.batch_size=32", "probe.n_draws=1")
    out = tmp_path / "digits"
    process = subprocess.Popen(
        command(out, *settings), cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    checkpoint = out / "training" / "checkpoint.safetensors"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert not (out / "bundle.json").exists()
    resumed = subprocess.run([*command(out, *settings), "--resume"], cwd=CHECKOUT, capture_output=True, check=False)
    assert resumed.returncode == 0
    assert load_bundle(out).manifest.metrics["epochs"] == 12


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=no/such/folder", "no/such/folder"),
        ("train.max_epoch=1", "did you mean 'max_epochs'"),
        ("probe.n_labels=5", "at least one label a class"),
    ],
)
def test_bad_input_is_one_error_and_no_traceback(override: str, message: str, tmp_path: Path) -> None:
    done = pipelines_run(tmp_path / "out", "train.max_epochs=1", override)
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
