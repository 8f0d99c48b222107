"""Pretraining in many processes, as a shell starts it: under torchrun, and in the workers of Ray Train."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from pipelines.config import load_config
from pipelines.run import run_stage
from vaefeat.bundle import Bundle, load_bundle

CHECKOUT = Path(__file__).parents[2]
CONFIG = CHECKOUT / "pipelines" / "configs" / "digits.toml"
EPOCHS = 20
SMALL = (
    "model.network=mlp",
    "model.latent_dim=8",
    "model.hidden_dims=[64]",
    "train.batch_size=8",
    "train.device=cpu",
    "train.threads=1",
    f"train.max_epochs={EPOCHS}",
)
#: Inherited by all processes of this module's jobs, by which those that are left behind are found.
MARK = uuid.uuid4().hex
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def words(out: Path, *overrides: str) -> list[str]:
    settings = [word for text in (f"out={out}", *SMALL, *overrides) for word in ("--set", text)]
    return ["-m", "pipelines", "pretrain", str(CONFIG), *settings]


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=CHECKOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "VAEFEAT_TEST": MARK},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"still running after four minutes: {process.communicate()}")
    return process.returncode, out, errors


def wait_for_epoch(process: subprocess.Popen[str], out: Path) -> None:
    """Return in the middle of an epoch, once there is a checkpoint."""
    checkpoint = out / "training" / "checkpoint.safetensors"
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(0.1)


def below(process: subprocess.Popen[str], wanted: Callable[[str], bool]) -> list[psutil.Process]:
    """Give the processes under this one whose command line is wanted."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if wanted(" ".join(child.cmdline()))]


def trained_epochs(out: Path) -> list[int]:
    history = json.loads((out / "training" / "history.json").read_text())
    return [record["epoch"] for record in history]


def exported(out: Path, *overrides: str) -> Bundle:
    """Give the bundle of what was trained."""
    run_stage("export", load_config(CONFIG, (f"out={out}", *SMALL, *overrides)), console=Console(quiet=True))
    return load_bundle(out)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give what two processes of torchrun made of as many epochs as those had that were disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "digits"
    code, _, errors = finish(start([*TORCHRUN, *words(out)]))
    assert code == 0, errors
    assert trained_epochs(out) == list(range(1, EPOCHS + 1))
    return out


def test_torchrun_trains_and_the_first_process_alone_prints(tmp_path: Path) -> None:
    out, short = tmp_path / "digits", ("train.max_epochs=2", "train.batch_size=64")
    code, told, errors = finish(start([*TORCHRUN, *words(out, *short)]))
    assert code == 0, errors
    assert exported(out, *short).manifest.metrics["epochs"] == 2
    assert "2 epochs, held-out ELBO" in told
    assert len(told.splitlines()) == 1
    assert "Warning" not in errors


@pytest.mark.slow
def test_torchrun_that_starts_a_killed_process_again_goes_on_to_the_same_bundle(
    undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "digits"
    process = start([*TORCHRUN, "--max-restarts", "1", *words(out)])
    wait_for_epoch(process, out)
    workers = below(process, lambda line: "-m pipelines" in line)
    assert len(workers) == 2
    workers[1].kill()
    code, told, errors = finish(process)
    assert code == 0, errors
    assert "Traceback" not in errors
    assert trained_epochs(out) == list(range(1, EPOCHS + 1))
    assert exported(out).digest == exported(undisturbed).digest
    assert told.count("held-out ELBO") == 1


@pytest.mark.slow
def test_error_that_all_processes_of_torchrun_meet_is_told_once(tmp_path: Path) -> None:
    code, told, errors = finish(start([*TORCHRUN, *words(tmp_path / "digits", "train.learning_rate=1e30")]))
    assert code != 0
    assert told == ""
    assert errors.count("error: the log-likelihood became nan") == 1
    assert "lost contact" not in errors
    assert left_running() == []


def left_running() -> list[str]:
    """Name the processes that jobs left behind; workers of Ray end soon after it, not before."""
    until = time.monotonic() + 15
    while (left := _running()) and time.monotonic() < until:
        time.sleep(0.2)
    return left


def _running() -> list[str]:
    left = []
    for other in psutil.process_iter():
        try:
            if other.environ().get("VAEFEAT_TEST") == MARK:
                left.append(" ".join(other.cmdline()))
        except psutil.Error:
            continue
    return left


@pytest.mark.serve
def test_killed_worker_of_ray_is_replaced_and_the_bundle_is_the_same(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "digits"
    process = start([sys.executable, *words(out), "--workers", "2"])
    wait_for_epoch(process, out)
    workers = below(process, lambda line: line.startswith("ray::RayTrainWorker"))
    assert len(workers) == 2
    workers[1].kill()
    code, told, errors = finish(process)
    assert code == 0, errors
    assert "going on with 2 from the checkpoint" in errors
    assert trained_epochs(out) == list(range(1, EPOCHS + 1))
    # Exact resume: the same bits as of two processes that nobody disturbed.
    assert exported(out).digest == exported(undisturbed).digest
    assert len(told.splitlines()) == 1
    assert "Traceback" not in errors
    assert left_running() == []


@pytest.mark.serve
def test_ray_stopped_by_ctrl_c_is_finished_by_another_number_of_workers(tmp_path: Path) -> None:
    out = tmp_path / "digits"
    process = start([sys.executable, *words(out), "--workers", "1:2"])
    wait_for_epoch(process, out)
    # As a terminal does: to every process of the job.
    os.killpg(process.pid, signal.SIGINT)
    code, told, errors = finish(process)
    assert code == 130, errors
    assert re.search("stopped by (SIGINT|request) in epoch", errors)
    assert "the same command" in errors
    assert told == ""
    assert "Traceback" not in errors
    assert left_running() == []
    assert not (out / "stages" / "pretrain.json").exists()

    code, told, errors = finish(start([sys.executable, *words(out, "workers.rows=share"), "--workers", "1"]))
    assert code == 0, errors
    assert "was interrupted" in errors
    assert trained_epochs(out) == list(range(1, EPOCHS + 1))
    assert exported(out).manifest.metrics["epochs"] == EPOCHS


@pytest.mark.serve
def test_error_of_a_worker_is_one_line_and_no_replacement(tmp_path: Path) -> None:
    process = start([sys.executable, *words(tmp_path / "digits", "train.learning_rate=1e30"), "--workers", "2"])
    code, told, errors = finish(process)
    assert code == 2, errors
    assert told == ""
    assert "the log-likelihood became nan" in errors
    assert errors.count("error: worker") == 1
    assert "Traceback" not in errors
    assert "going on" not in errors
    assert left_running() == []


@pytest.mark.serve
def test_more_workers_than_there_is_room_for_are_refused_at_once(tmp_path: Path) -> None:
    code, _, errors = finish(start([sys.executable, *words(tmp_path / "digits"), "--workers", "1000"]))
    assert code == 2, errors
    assert "got 1000 workers" in errors
    assert "this machine has" in errors
    assert "Traceback" not in errors
