"""The benchmark of training: fair contenders, and a last line that scripts can read."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks import train_contenders
from benchmarks.train import ratios_of
from benchmarks.train_contenders import NETWORKS, Task, run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    rows = np.random.default_rng(0).integers(0, 256, (256, 1, 28, 28), dtype=np.uint8)

    def few_rows(self: Task) -> NDArray[np.uint8]:
        return rows

    monkeypatch.setattr(Task, "rows", few_rows)
    monkeypatch.setattr(Task, "heldout", few_rows)
    monkeypatch.setattr(train_contenders, "_WARM_UP_S", 0.0)
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)
    return {"data": "", "threads": 1, "seconds": 0.05, "n_rows": 256}


def test_network_is_that_of_pytorchs_example(task: dict[str, object]) -> None:
    vae = Task(contender="vaefeat", **task).vae(np.zeros((2, 1, 28, 28), np.uint8))  # type: ignore[arg-type]
    shapes = sorted(tuple(parameter.shape) for parameter in vae.parameters())
    layers = ((784, 400), (400, 20), (400, 20), (20, 400), (400, 784))
    assert shapes == sorted(shape for n_in, n_out in layers for shape in ((n_out, n_in), (n_out,)))


@pytest.mark.parametrize("contender", ["pythae", "dataloader", "vaefeat"])
def test_contender_trains_the_network_that_all_train(
    task: dict[str, object], contender: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    make = Task.vae

    def remembered(self: Task, rows: NDArray[np.uint8]) -> torch.nn.Module:
        trained.append(make(self, rows))
        return trained[-1]

    monkeypatch.setattr(Task, "vae", remembered)
    done = run(Task(contender=contender, **task))  # type: ignore[arg-type]
    assert done["rows_per_s"] > 0
    assert done["peak_mib"] > 10
    untrained = make(Task(contender=contender, **task), np.zeros((2, 1, 28, 28), np.uint8))  # type: ignore[arg-type]
    (vae,) = trained
    for (name, after), before in zip(vae.named_parameters(), untrained.parameters(), strict=True):
        assert not torch.equal(after.cpu(), before), name


def test_both_report_the_way_to_a_heldout_bound(task: dict[str, object]) -> None:
    theirs = run(Task(contender="pythae", epochs=2, **task))["history"]  # type: ignore[arg-type]
    ours = run(Task(contender="vaefeat", epochs=2, level=-1000.0, **task))["history"]  # type: ignore[arg-type]
    for history in (theirs, ours):
        assert len(history) == 2
        assert history[0][0] < history[1][0]
        assert all(math.isfinite(elbo) for _, elbo in history)


def test_ratios_are_of_the_rates_and_none_where_nothing_was_measured() -> None:
    rows = [
        {"contender": name, "network": "mlp", "batch_size": 128, "device": "cpu", "rows_per_s": rate}
        for name, rate in (("vaefeat", 90.0), ("dataloader", 20.0), ("pythae", 30.0))
    ]
    ratios = ratios_of(rows, None, {"seconds": {}})
    assert ratios["mlp_b128_vs_dataloader"] == 4.5
    assert ratios["mlp_b128_vs_pythae"] == 3.0
    assert ratios["conv_vs_pythae"] is None
    assert ratios["mfu"] is None


def test_missing_data_are_one_line_before_anything_is_measured(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train", "--data", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.startswith("error: got --data")
    assert "Traceback" not in done.stderr


def test_committed_results_have_every_ratio_and_say_what_they_were_measured_on() -> None:
    path = ROOT / "benchmarks/results/train.json"
    if not path.is_file():
        pytest.skip("not measured yet")
    results = json.loads(path.read_text())
    assert {"commit", "date", "processor", "threads", "gpu"} <= results.keys()
    assert all(value is not None for value in results["ratios"].values())
    assert {row["network"] for row in results["rates"]} == set(NETWORKS)
