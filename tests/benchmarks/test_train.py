"""The benchmark of training: fair contenders, clocks that count what they should, a last line that scripts can read."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

from benchmarks import train, train_contenders
from benchmarks.train_contenders import ExampleVAE, Stopwatch, make_pythae, make_vae, run, write_mnist
from benchmarks.train_report import described, ratios_of
from benchmarks.train_tasks import N_HELDOUT, NETWORKS, Entry, Part, Task, gpu_parts, parts
from vaefeat.errors import ConfigError, InputError, TrainingError
from vaefeat.model.vae import VAE
from vaefeat.training import Trainer

ROOT = Path(__file__).parents[2]
TRAINED = ("pythae", "dataloader", "vaefeat")
RATIOS = {
    "mlp_b128_vs_dataloader",
    "mlp_b512_vs_dataloader",
    "mlp_b128_vs_pythae",
    "conv_vs_pythae",
    "time_to_elbo_vs_pythae",
    "mfu",
}
#: Steps that are worth no measuring.
PLAIN = {"compile": False, "precision": "float32"}


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Task:
    """Give a task of 512 rows, drawn here, that lasts a twentieth of a second; held-out rows are others."""
    rng = np.random.default_rng(0)
    shape = {"mlp": (1, 28, 28), "conv28": (1, 28, 28), "conv32": (3, 32, 32)}
    known = {name: rng.integers(0, 256, (1024, *one), dtype=np.uint8) for name, one in shape.items()}
    monkeypatch.setattr(Task, "rows", lambda self: known[self.network][:512])
    monkeypatch.setattr(Task, "heldout", lambda self: known[self.network][512:])
    # The tests' own threads stay as they are.
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)
    return Task(data="nowhere", n_rows=512, seconds=0.05, warm_up_s=0.0, train=dict(PLAIN))


def shapes(module: torch.nn.Module) -> list[tuple[int, ...]]:
    return sorted(tuple(parameter.shape) for parameter in module.parameters())


def test_all_three_train_the_network_of_pytorchs_example(task: Task) -> None:
    layers = ((784, 400), (400, 20), (400, 20), (20, 400), (400, 784))
    wanted = sorted(shape for n_in, n_out in layers for shape in ((n_out, n_in), (n_out,)))
    vae = make_vae(task, task.rows())
    for network in (vae, make_pythae(vae), ExampleVAE()):
        assert shapes(network) == wanted
        assert sum(parameter.numel() for parameter in network.parameters()) == 652_824


@pytest.mark.parametrize("network", ["conv28", "conv32"])
def test_pythae_trains_our_convolutions_to_the_parameter(task: Task, network: str) -> None:
    vae = make_vae(replace(task, network=network), replace(task, network=network).rows())
    model = make_pythae(vae)
    assert {id(one) for one in model.parameters()} == {id(one) for one in vae.parameters()}


def test_pythae_computes_the_loss_that_we_compute(task: Task) -> None:
    vae = make_vae(task, task.rows())
    x = vae.preprocessing(torch.from_numpy(task.rows()[:8]))
    torch.manual_seed(3)
    theirs = make_pythae(vae)({"data": x}).loss
    torch.manual_seed(3)
    posterior = vae.encode(x)
    z = posterior.rsample()
    kl = torch.distributions.kl_divergence(posterior, vae.prior_distribution())
    torch.testing.assert_close(theirs, (kl - vae.log_likelihood(x, z[None])[0]).mean())


@pytest.mark.parametrize("contender", TRAINED)
def test_contender_trains_and_says_how_fast(
    task: Task, contender: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[torch.nn.Module] = []

    def remembered(make: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
        def remember(*arguments: Any) -> torch.nn.Module:
            trained.append(make(*arguments))
            before.append([parameter.detach().clone() for parameter in trained[-1].parameters()])
            return trained[-1]

        return remember

    before: list[list[torch.Tensor]] = []
    name = "ExampleVAE" if contender == "dataloader" else "make_vae"
    monkeypatch.setattr(train_contenders, name, remembered(getattr(train_contenders, name)))
    found = run(contender, task)
    assert found["rows_per_s"] > 0
    assert found["first_s"] > 0
    assert found["peak_mib"] > 10
    assert json.loads(json.dumps(found)) == found
    if contender == "vaefeat":
        assert (found["precision"], found["compiled"]) == ("float32", False)
    (network,), (untrained,) = trained, before
    assert not any(torch.equal(*pair) for pair in zip(network.parameters(), untrained, strict=True))
    assert not capsys.readouterr().out, "only the last line is JSON"


def test_way_to_a_bound_leaves_out_the_measuring_and_the_rows_that_judge(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[NDArray[np.uint8]] = []
    trained_on: list[NDArray[np.uint8]] = []

    def measure_slowly(vae: Any, rows: NDArray[np.uint8]) -> float:
        measured.append(rows)
        clock[0] += 1000.0
        return -float(len(measured))

    clock = [0.0]
    real = time.perf_counter
    monkeypatch.setattr("time.perf_counter", lambda: real() + clock[0])
    monkeypatch.setattr(train_contenders, "_heldout_elbo", measure_slowly)

    class Watched(Trainer):
        def __init__(self, vae: VAE, rows: NDArray[np.uint8], *arguments: Any, **others: Any) -> None:
            trained_on.append(rows)
            super().__init__(vae, rows, *arguments, **others)

    monkeypatch.setattr(train_contenders, "Trainer", Watched)
    for contender in ("pythae", "vaefeat"):
        history = run(contender, replace(task, epochs=2))["history"]
        (first_s, first_elbo), (second_s, second_elbo) = history
        assert 0 < first_s < second_s < 100
        assert second_elbo == first_elbo - 1
    (given,) = trained_on
    assert np.array_equal(given, task.rows())
    assert all(np.array_equal(rows, task.heldout()) for rows in measured)


def test_rows_that_judge_are_trained_on_by_nobody(data_dir: Path) -> None:
    task = Task(data=str(data_dir), n_rows=55_000)
    rows, heldout = task.rows(), task.heldout()
    assert (len(rows), len(heldout)) == (55_000, N_HELDOUT)
    assert not {row.tobytes() for row in heldout} & {row.tobytes() for row in rows}


def test_rows_are_repeated_where_there_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    real = np.arange(N_HELDOUT + 300, dtype=np.int64).astype(np.uint8)[:, None, None, None]
    monkeypatch.setattr(Task, "_real", lambda self, n_rows: real[:n_rows])
    rows = Task(data="", n_rows=700).rows()
    assert rows[:300].tolist() == rows[300:600].tolist() == real[N_HELDOUT:].tolist()
    assert rows[600:].tolist() == rows[:100].tolist()


def test_stopwatch_counts_rows_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    watch = Stopwatch(Task(data="", batch_size=100, seconds=4.0, warm_up_s=1.0), 250)
    # 20 s until the first step, a step a second from then on; the third one of an epoch has 50 rows.
    for step in range(1, 6):
        now[0] = 19.0 + step
        watch.took_steps(step)
    now[0] = 25.0
    with pytest.raises(train_contenders._EnoughError):
        watch.took_steps(6)
    assert watch.first_s == 20.0
    assert watch.rows_per_s == (500 - 200) / 4.0


def test_files_are_those_that_torchvision_reads(tmp_path: Path) -> None:
    from torchvision.datasets import MNIST

    rows = np.random.default_rng(1).integers(0, 256, (7, 1, 28, 28), dtype=np.uint8)
    write_mnist(tmp_path, rows)
    read = MNIST(str(tmp_path), train=True)
    assert np.array_equal(read.data.numpy(), rows[:, 0])
    assert len(read.targets) == 7


def test_limit_counts_the_operations_of_a_step() -> None:
    found = run("limit", Task(data="", batch_size=16, seconds=0.02, threads=torch.get_num_threads()))
    weights = 2 * 784 * 400 + 3 * 400 * 20
    # Forward and two products backward, but for the gradient of the rows themselves.
    assert found["step_gflop"] * 1e9 == pytest.approx(2 * 16 * (3 * weights - 784 * 400))
    for precision in ("float32", "bfloat16"):
        assert found["gflops"][precision] * found["step_s"][precision] == pytest.approx(found["step_gflop"])


def rate(value: float, **others: Any) -> dict[str, Any]:
    return {"rows_per_s": value, "first_s": 1.0, "peak_mib": 100.0, **others}


def ours(value: float) -> dict[str, Any]:
    return rate(value, precision="bfloat16", compiled=True, notes=[])


def test_ratios_are_of_medians_over_rounds() -> None:
    chosen = [part for part in parts(Path(), threads=1, quick=True) if part.name in {"mlp_b512", "conv28"}]
    limits = [{"step_s": {"bfloat16": seconds}, "step_gflop": 1.0} for seconds in (1, 2, 4)]
    found = {
        "mlp_b512": {
            "pythae": [rate(100.0), rate(300.0), rate(200.0)],
            "dataloader": [rate(50.0)] * 3,
            "vaefeat": [ours(512.0), ours(128.0), ours(256.0)],
            "limit": limits,
        },
        "conv28": {"pythae": [rate(10.0)], "vaefeat": [ours(25.0)]},
    }
    report = described(found, chosen)
    ratios = report["ratios"]
    assert ratios["mlp_b512_vs_pythae"] == 256 / 200
    assert ratios["mlp_b512_vs_dataloader"] == 256 / 50
    assert ratios["mfu"] == 0.5, "of the best round of the limit: the median of 1, 0.25 and 0.5"
    assert ratios["conv_vs_pythae"] == ratios["conv28_vs_pythae"] == 2.5
    assert ratios["mlp_b128_vs_pythae"] is ratios["time_to_elbo_vs_pythae"] is None
    assert ratios.keys() >= RATIOS


def test_convolutions_are_judged_by_the_worse_of_both() -> None:
    rates = [
        {"part": part, "contender": name, "rows_per_s": value}
        for part, name, value in (("conv28", "pythae", 2.0), ("conv28", "vaefeat", 8.0), ("conv32", "pythae", 2.0))
    ]
    rates.append({"part": "conv32", "contender": "vaefeat", "rows_per_s": 3.0})
    report = {"rates": rates, "time_to_elbo": None, "scaling": [], "grid": None}
    assert ratios_of(report)["conv_vs_pythae"] == 1.5


@pytest.mark.parametrize(
    ("history", "ratio"),
    [([(2.0, -120.0), (3.0, -109.0), (4.0, -100.0)], 5.0), ([(2.0, -120.0), (3.0, -111.0)], 0.0)],
)
def test_time_to_a_bound_ends_where_it_is_reached(history: Sequence[tuple[float, float]], ratio: float) -> None:
    (part,) = (part for part in parts(Path(), threads=1, quick=True) if part.name == "time_to_elbo")
    theirs = {"history": [(10.0, -115.0), (15.0, -110.0)]}
    found = described({part.name: {"pythae": [theirs], "vaefeat": [{"history": history}]}}, [part])["time_to_elbo"]
    assert (found["level"], found["ratio"]) == (-110.0, ratio)


def test_set_that_does_not_fit_into_memory_is_not_measured_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.train_tasks.available_memory", lambda: 5 * 2**30)
    (part,) = (part for part in parts(Path(), threads=1, quick=True) if part.name == "scaling")
    assert [entry.key for entry in part.entries] == ["10000", "1000000"]
    assert described({"scaling": {}}, [part])["not_measured"] == [
        "scaling, 10,000,000 rows: not measured: 5.0 GiB free, 9.7 needed"
    ]


def test_parts_on_a_gpu_have_contenders_of_the_same_task() -> None:
    found = gpu_parts(Path(), threads=2, quick=True)
    for part in found:
        assert len({repr(entry.task) for entry in part.entries}) == 1
        assert all(entry.task.device == "cuda" for entry in part.entries)


@pytest.mark.parametrize("quick", [True, False])
def test_contenders_differ_in_nothing_but_our_own_settings(quick: bool) -> None:
    for part in parts(Path(), threads=2, quick=quick):
        if part.name not in {"scaling", "grid"}:
            tasks = {repr(replace(entry.task, train={}, epochs=None)) for entry in part.entries}
            assert len(tasks) == 1, part.name


def test_rounds_alternate_and_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    order: list[str] = []

    def take(part: str, entry: Entry, kernels: Path) -> dict[str, Any]:
        now[0] += {"slow": 40.0, "fast": 5.0, "single": 5.0}[part]
        order.append(f"{part}-{entry.key}")
        return rate(1.0)

    monkeypatch.setattr(train, "_run", take)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    two = (Entry("a", "a", Task(data="")), Entry("b", "b", Task(data="")))
    chosen = [Part("slow", two), Part("fast", two), Part("single", two, once=True)]
    found = train.measure(chosen, rounds=3, until_s=130.0)
    assert order == [
        *("slow-a", "slow-b", "fast-a", "fast-b", "single-a", "single-b"),
        *("fast-a", "fast-b"),
        *("fast-a", "fast-b"),
    ]
    assert [len(found[part]["a"]) for part in ("slow", "fast", "single")] == [1, 3, 1]
    order.clear()
    late = [Part("slow", two), replace(chosen[2], once=False)]
    found = train.measure(late, rounds=2, until_s=79.0)
    assert order == ["slow-a", "slow-b"]
    assert described(found, late)["not_measured"] == ["single: not measured: no time was left"]


@pytest.mark.slow
def test_contender_that_fails_is_named_with_its_last_words() -> None:
    part = Part("mlp", (Entry("dataloader", "dataloader", Task(data="/nowhere")),))
    with pytest.raises(TrainingError, match=r"dataloader in mlp failed with status 1: .*/nowhere/MNIST"):
        train.measure([part], rounds=1)


@pytest.mark.slow
def test_benchmark_prints_a_table_and_one_json_line_last(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief = Task(data=str(data_dir.resolve()), n_rows=2000, seconds=0.1, warm_up_s=0.0, train=dict(PLAIN))
    part = Part("mlp_b128", tuple(Entry(name, name, brief) for name in ("dataloader", "vaefeat", "limit")))
    monkeypatch.setattr(train, "parts", lambda *_, **__: (part, Part("grid", ())))
    monkeypatch.setattr(train, "_ROUNDS", 1)
    path = tmp_path / "train.json"
    arguments = ["--data", str(data_dir), "--only", "mlp_b128", "--gpu", "--threads", "1", "--out", str(path)]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = CliRunner().invoke(train.app, arguments)
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout.splitlines()[-1])
    results = json.loads(path.read_text())
    assert line["ratios"] == results["ratios"]
    assert line["ratios"].keys() >= RATIOS
    assert line["ratios"]["mlp_b128_vs_dataloader"] > 0
    assert line["gpu_rows"] == "no CUDA device found: not measured"
    assert "GPU: no CUDA device found: not measured" in done.stdout
    assert {"commit", "date", "processor", "versions", "threads", "load_average"} <= line.keys()
    assert {row["contender"] for row in results["rates"]} == {"dataloader", "vaefeat"}
    assert 0 < next(row["mfu"] for row in results["rates"] if row["contender"] == "vaefeat") <= 1


def test_benchmark_refuses_missing_data_in_one_line_with_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.train", "--data", str(tmp_path), "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: got \S+, which does not exist; [^\n]*\n", done.stderr)


def test_benchmark_refuses_to_begin_without_pythae(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = CliRunner().invoke(train.app, ["--data", str(tmp_path)])
    assert isinstance(done.exception, InputError)
    assert "no package pythae" in str(done.exception)


def test_benchmark_refuses_a_part_that_is_not_there(tmp_path: Path) -> None:
    done = CliRunner().invoke(train.app, ["--data", str(tmp_path), "--only", "mlp_b129"])
    assert isinstance(done.exception, ConfigError)
    assert "did you mean" in str(done.exception)


def test_committed_results_have_every_ratio_and_say_what_they_were_measured_on() -> None:
    path = ROOT / "benchmarks/results/train.json"
    results = json.loads(path.read_text())
    assert {"commit", "date", "processor", "threads", "gpu_rows"} <= results.keys()
    assert all(isinstance(results["ratios"][name], float) for name in RATIOS)
    assert {row["network"] for row in results["rates"]} == set(NETWORKS)
    assert all(math.isfinite(row["rows_per_s"]) for row in results["rates"])
