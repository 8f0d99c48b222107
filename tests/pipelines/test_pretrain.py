"""The job that only pretrains: which rows it takes, when it goes on from a checkpoint, and what workers tell it."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from torch.distributed import HashStore  # type: ignore[attr-defined]

from pipelines.config import DataConfig, RunConfig, WorkersConfig, load_config, with_workers
from pipelines.datasets import load_dataset, open_rows
from pipelines.desk import Desk, Display, Teller
from pipelines.group import in_group, leads_group, meet
from pipelines.pretrain import train_worker
from pipelines.run import run_stage
from vaefeat import load_bundle
from vaefeat.blocks import Blocks
from vaefeat.data import Rows
from vaefeat.errors import ConfigError, InputError
from vaefeat.observers import EpochRecord, Observer

CHECKOUT = Path(__file__).parents[2]
CONFIG = CHECKOUT / "pipelines" / "configs" / "digits.toml"
SMALL = RunConfig(
    name="small",
    preset="textbook",
    model={"latent_dim": 4, "network": "mlp", "hidden_dims": [16]},
    train={"max_epochs": 2, "device": "cpu", "threads": 1},
    data=DataConfig(pretrain_on="all"),
)


class Epochs(Observer):
    """Notes where training began, and every epoch."""

    def __init__(self) -> None:
        self.began = -1
        self.seen: list[int] = []

    def on_start(self, *, epochs: int, steps_per_epoch: int, epoch: int) -> None:
        self.began = epoch

    def on_epoch(self, record: EpochRecord) -> None:
        self.seen.append(record.epoch)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, digits_rows: NDArray[np.uint8]) -> Path:
    """Give digits in several forms: with labels, without them, and with a split of their own."""
    folder = tmp_path_factory.mktemp("files")
    labels = np.arange(len(digits_rows)) % 10
    np.savez(folder / "labelled.npz", X=digits_rows, y=labels)
    np.save(folder / "plain.npy", digits_rows)
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    (folder / "split").mkdir()
    for name, part in (("train", digits_rows[:900]), ("test", digits_rows[900:])):
        columns = {f"p{i}": part.reshape(len(part), -1)[:, i] for i in range(64)}
        pq.write_table(pa.table(columns), folder / "split" / f"{name}.parquet")
    return folder


def with_data(path: Path | str, *, pretrain_on: str = "train", rows: str = "load") -> RunConfig:
    return replace(SMALL, data=DataConfig(path=str(path), pretrain_on=pretrain_on), workers=WorkersConfig(rows=rows))


def opened(config: RunConfig) -> NDArray[Any]:
    rows = open_rows(config)
    assert isinstance(rows, Rows)
    return rows.array


def test_rows_with_labels_and_no_split_are_those_of_the_main_job(files: Path) -> None:
    config = with_data(files / "labelled.npz")
    theirs = load_dataset(config.data, seed=config.probe.seed).pretraining.array
    assert len(theirs) < 1797
    np.testing.assert_array_equal(opened(config), theirs)
    assert len(opened(with_data(files / "labelled.npz", pretrain_on="all"))) == 1797
    assert len(opened(with_data("digits"))) == len(theirs)


def test_rows_without_labels_are_taken_whole(files: Path) -> None:
    assert len(opened(with_data(files / "plain.npy"))) == 1797


def test_test_split_is_only_trained_on_when_all_rows_are_wanted(files: Path) -> None:
    assert len(opened(with_data(files / "split"))) == 900
    assert len(opened(with_data(files / "split", pretrain_on="all"))) == 1797


def test_rows_are_streamed_when_asked_for(files: Path) -> None:
    blocks = open_rows(with_data(files / "plain.npy", rows="stream"))
    assert isinstance(blocks, Blocks)
    assert len(blocks) == 1797
    with pytest.raises(ConfigError, match="pretrain_on='all'"):
        open_rows(with_data(files / "split", pretrain_on="all", rows="stream"))
    with pytest.raises(ConfigError, match="embedded digits"):
        open_rows(with_data("digits", rows="stream"))


def test_stages_write_a_bundle_and_tell_where(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    config = replace(SMALL, out=str(tmp_path / "out"))
    run_stage("pretrain", config, console=console)
    assert not (tmp_path / "out" / "bundle.json").exists()
    run_stage("export", config, console=console)
    trained, exported = console.file.getvalue().splitlines()  # type: ignore[attr-defined]  # a StringIO
    assert trained.startswith(f"{tmp_path / 'out'}: 2 epochs, held-out ELBO")
    assert load_bundle(tmp_path / "out").digest in exported


def test_streamed_rows_are_trained_on(files: Path, tmp_path: Path) -> None:
    config = replace(with_data(files / "plain.npy", rows="stream"), out=str(tmp_path / "out"))
    for stage in ("pretrain", "export"):
        run_stage(stage, config, console=Console(file=io.StringIO()))
    assert load_bundle(tmp_path / "out").manifest.data["n_rows"] == 1797


def test_worker_of_the_same_launch_goes_on_and_another_launch_begins_anew(tmp_path: Path) -> None:
    config = replace(SMALL, out=str(tmp_path / "out"))

    def epochs(launch: str) -> tuple[int, list[int]]:
        watching = Epochs()
        train_worker(config, launch=launch, observers=[watching], progress=False)
        return watching.began, watching.seen

    assert epochs("first") == (0, [1, 2])
    assert epochs("first") == (2, [])
    assert epochs("second") == (0, [1, 2])


@pytest.mark.parametrize(
    ("count", "bounds", "elastic"),
    [("2", (2, 2), False), ("1:4", (1, 4), True), ("3:3", (3, 3), False), (None, (0, 0), False)],
)
def test_workers_are_a_number_or_bounds(count: str | None, bounds: tuple[int, int], elastic: bool) -> None:
    config = with_workers(load_config(CONFIG), count)
    assert config.workers.bounds == bounds
    assert config.workers.elastic is elastic
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("count", ["x", "-1", "3:1", "0:2", "1:", ":2", "1:2:3"])
def test_impossible_number_of_workers_is_refused(count: str) -> None:
    with pytest.raises(ConfigError, match="wanted a number such as 2"):
        with_workers(load_config(CONFIG), count)


@pytest.mark.parametrize(
    ("setting", "message"),
    [("workers.rows=lode", "did you mean 'load'"), ("workers.cpus=0", "workers.cpus=0"), ("workers.n=2", "known: ")],
)
def test_impossible_setting_of_workers_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(CONFIG, [setting])


def test_group_is_known_by_its_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert not in_group()
    assert leads_group()
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert in_group()
    assert not leads_group()
    with pytest.raises(InputError, match="leave one of them out"):
        run_stage("pretrain", replace(SMALL, out=str(tmp_path), workers=WorkersConfig(count=2)), console=Console())
    with pytest.raises(InputError, match="'export' under torchrun"):
        run_stage("export", replace(SMALL, out=str(tmp_path)), console=Console())


@pytest.mark.parametrize("first", [0, 1, 2])
def test_processes_meet_under_a_new_name_whatever_earlier_ones_left_in_the_store(first: int) -> None:
    store, size, told = HashStore(), 3, []
    for _ in range(3):
        names: dict[int, str] = {}

        def join(rank: int, names: dict[int, str] = names) -> None:
            names[rank] = meet(store, rank, size)

        threads = [threading.Thread(target=join, args=(rank,)) for rank in range(size)]
        threads[first].start()
        time.sleep(0.1)  # the others are late: what the first finds is from before
        for thread in threads[:first] + threads[first + 1 :]:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(names) == size
        assert len(set(names.values())) == 1
        told.append(names[0])
    assert len(set(told)) == 3


def test_group_leaves_no_thread_that_could_abort_the_process_at_its_end(tmp_path: Path) -> None:
    program = (
        "import os; from pathlib import Path; from pipelines.group import process_group\n"
        "def threads(): return [p.read_text() for p in Path('/proc/self/task').glob('*/comm')]\n"
        "with process_group('cpu'):\n"
        "    import torch, torch.distributed as dist\n"
        "    import torch._dynamo\n"  # as every optimizer of torch does
        "    dist.all_reduce(torch.ones(2))\n"
        "    assert any('gloo' in name for name in threads())\n"
        "assert not any('gloo' in name for name in threads()), threads()\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | place,
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


RECORD = EpochRecord(
    epoch=1,
    train_elbo=-1.0,
    train_log_likelihood=-1.0,
    train_kl=0.0,
    heldout_elbo=-1.0,
    heldout_log_likelihood=-1.0,
    heldout_kl=0.0,
    heldout_objective=-1.0,
    active_units=3,
    kl_weight=1.0,
    learning_rate=0.1,
    rows_per_s=10.0,
    seconds=1.0,
)


def test_what_the_first_worker_tells_is_shown_and_a_new_group_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    desk = Desk()
    for n_workers, epoch in ((2, 0), (1, 4)):
        teller = Teller(lambda *message: desk.tell(*pickle.loads(pickle.dumps(message))), n_workers=n_workers)
        teller.on_start(epochs=5, steps_per_epoch=10, epoch=epoch)
        teller.on_note("float32 is fast here")
        teller.on_steps(epoch=epoch + 1, step=10, elbo=-1.5, log_likelihood=-1.0, kl=0.5, rows_per_s=2000.0)
        teller.on_epoch(RECORD)
    teller.on_end()
    display = Display()
    report = desk.take()
    assert (report.failure, report.interruption) == (None, None)
    assert not desk.over()
    display.show(report)
    display.close()
    shown = capsys.readouterr().err
    assert "going on with 1 from the checkpoint, in epoch 5" in shown
    assert shown.count("float32 is fast here") == 2
    assert "ELBO -1.50" in shown
    assert desk.take().events == []


def test_first_failure_counts_and_a_request_to_stop_is_passed_on() -> None:
    desk = Desk()
    assert desk.listen() is None
    desk.ask_to_stop(15)
    assert desk.listen() == 15
    desk.fail("worker 1: no such folder")
    desk.fail("worker 0: lost it")
    assert desk.over()
    assert desk.take().failure == "worker 1: no such folder"
    other = Desk()
    other.interrupt("stopped")
    assert other.over()
    assert other.take().interruption == "stopped"
