"""Sweeps as a shell starts them, under a Ray of their own."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from pipelines.__main__ import app
from pipelines.config import load_config
from pipelines.datasets import load_validation
from pipelines.probes import HEADS, draw_labels
from vaefeat import OnnxEncoder

CHECKOUT = Path(__file__).parents[2]
CONFIG = CHECKOUT / "pipelines" / "configs" / "digits.toml"
SMALL = (
    "preset=textbook",
    "data.pretrain_on=train",
    "model.network=mlp",
    "model.hidden_dims=[32]",
    "train.max_epochs=2",
    "train.device=cpu",
    "probe.n_draws=3",
)


def words(out: Path, over: list[str], *more: str, settings: tuple[str, ...] = ()) -> list[str]:
    set_ = [word for text in (f"out={out}", *SMALL, *settings) for word in ("--set", text)]
    swept = [word for text in over for word in ("--over", text)]
    return ["sweep", str(CONFIG), *set_, *swept, *more]


def command(out: Path, over: list[str], *more: str, settings: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, "-m", "pipelines", *words(out, over, *more, settings=settings)]


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        cwd=CHECKOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, errors = process.communicate(timeout=280)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"still running: {process.communicate()}")
    return process.returncode, out, errors


def table(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))


@pytest.mark.serve
@pytest.mark.timeout(600)
def test_sweep_ranks_by_few_labels_reports_failures_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    code, told, errors = finish(start(command(out, ["model.latent_dim=1,12", "train.kl_weight=1,-5"])))
    assert code == 0, errors
    assert "Traceback" not in errors + told
    assert told.count("got kl_weight=-5") == 2
    rows = table(out)
    assert [row["model.latent_dim"] for row in rows[:2]] == ["12", "1"]
    assert float(rows[0]["few_label_error"]) < float(rows[1]["few_label_error"])
    assert [row["failed"] != "" for row in rows] == [False, False, True, True]
    with Image.open(out / "sweep.png") as picture:
        assert picture.size[0] > 600

    best = load_config(out / "best.toml")
    assert (best.model["latent_dim"], best.train["kl_weight"], best.preset) == (12, 1, "textbook")
    assert Path(best.out) == out / "best"
    judge_by_hand(out, rows[0])

    kept = out / "trials" / rows[0]["trial"] / "result.json"
    before = kept.stat().st_mtime_ns
    code, told, errors = finish(start(command(out, ["model.latent_dim=12,2", "train.kl_weight=1"], "--resume")))
    assert code == 0, errors
    assert kept.stat().st_mtime_ns == before
    assert {row["model.latent_dim"] for row in table(out)} == {"12", "2"}


def judge_by_hand(out: Path, row: dict[str, str]) -> None:
    """Compute a trial's error again, from its bundle and with features of all rows."""
    config = load_config(out / "best.toml")
    data = load_validation(config.data, seed=0)
    encoder = OnnxEncoder(out / "trials" / row["trial"])
    train, held = encoder.embed(data.train), encoder.embed(data.test)
    errors = []
    for seed in range(3):
        chosen = draw_labels(data.train_labels, n_labels=config.probe.n_labels, seed=seed)
        head = HEADS[row["head"]]().fit(train[chosen], data.train_labels[chosen])
        errors.append(100 * np.mean(head.predict(held) != data.test_labels))
    assert float(row["few_label_error"]) == pytest.approx(np.mean(errors))
    assert float(row["elbo"]) == pytest.approx(
        json.loads((out / "trials" / row["trial"] / "bundle.json").read_text())["metrics"]["elbo"]
    )


@pytest.mark.serve
@pytest.mark.timeout(600)
def test_sweep_stopped_by_sigterm_while_trials_run_side_by_side_is_finished_by_resume(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    words = command(out, ["train.seed=0,1"], settings=("train.max_epochs=60", "train.batch_size=8"))
    out.mkdir()
    (out / "best.toml").write_text("of an older sweep")
    process = start(words)
    until = time.monotonic() + 200
    while len(checkpoints := list(out.glob("trials/*/training/checkpoint.safetensors"))) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, checkpoints
        time.sleep(0.1)
    assert not list(out.glob("trials/*/result.json"))
    process.send_signal(signal.SIGTERM)
    code, _, errors = finish(process)
    assert code == 130, errors
    assert "--resume" in errors
    assert not (out / "sweep.csv").exists()
    assert not (out / "best.toml").exists()
    # The end of a shorter training is nearer, but another setting: continuing must be of the same one.
    code, _, errors = finish(start([*words, "--resume"]))
    assert code == 0, errors
    assert [row["epochs"] for row in table(out)] == ["60", "60"]


@pytest.mark.parametrize(
    ("over", "more", "message"),
    [
        ("model.latent_dims=1,2", (), "did you mean 'model.latent_dim'"),
        ("model.latent_dim=1,2", ("--trials", "3"), "wanted 1 to 2"),
        ("model.latent_dim=1,2", ("--set", "probe.n_labels=5"), "at least one label a class"),
        ("model.latent_dim=1,2", ("--set", "workers.count=2"), "wanted none"),
    ],
)
def test_bad_input_is_one_error_before_ray_starts(
    over: str,
    more: tuple[str, ...],
    message: str,
    tmp_path: Path,
    run_here: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_here(app, *words(tmp_path / "out", [over], *more))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not ray.is_initialized()
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()
