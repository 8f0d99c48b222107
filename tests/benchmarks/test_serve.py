"""The benchmark of the service: what is made of measurements, and that it runs from start to end."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import serve
from benchmarks.in_process import decoder_rate, encoder_rates
from benchmarks.processes import Server
from benchmarks.serve_contenders import CONTENDERS
from benchmarks.serve_payloads import SHAPES, Payloads, Workload, bundle_and_rows, encoded
from benchmarks.serve_report import TARGETS, described
from vaefeat.errors import ConfigError
from vaefeat.image_decoding import decode_image

ROOT = Path(__file__).parents[2]
#: Of the issue; others may be added.
RATIOS = {
    *("ray_512x8_vs_inprocess", "ray_64x8_vs_inprocess", "ray_1x32_vs_fastapi", "ray_1x32_vs_litserve"),
    *("ray_512x8_vs_fastapi", "local_1x32_vs_fastapi", "local_64x8_vs_inprocess", "int8_64x8_vs_fp32"),
}


def workload(rows: int, rows_per_s: float, **other: Any) -> dict[str, Any]:
    plain = {"p50_ms": 1.0, "p99_ms": 2.0, "statuses": {"200": 9}, "wrong": 0, "broken": 0, "unanswered": 0}
    return {"rows": rows, "requests_per_s": rows_per_s / rows, "client_cpu": 0.1, **plain, **other}


def server(workloads: dict[str, Any], ready_s: float = 1.0) -> dict[str, Any]:
    return {"ready_s": ready_s, "rss_mib": 100.0, "notes": [], "open": [], "workloads": workloads}


def one_round(operators: float, sessions: float, **servers: dict[str, Any]) -> dict[str, Any]:
    encoder = {"64": {"operators": operators, "sessions": sessions}}
    return {"in_process": {"encoder": encoder, "decoder": {"jpeg": 50.0}}, "servers": servers}


def test_described_takes_medians_over_rounds_and_the_better_way_in_process() -> None:
    rounds = [
        one_round(operators, 90.0, ray=server({"64x8": workload(64, rate)}))
        for operators, rate in [(100.0, 80.0), (10.0, 60.0), (80.0, 1.0)]
    ]
    found = described(rounds)
    assert found["in_process"]["encoder"]["64"] == {
        "rows_per_s": 90.0,
        "how": "sessions",
        "operators": 80.0,
        "sessions": 90.0,
    }
    assert found["servers"]["ray"]["workloads"]["64x8"]["rows_per_s"] == pytest.approx(60.0)
    assert found["ratios"]["ray_64x8_vs_inprocess"] == pytest.approx(60 / 90)
    assert found["reached"]["ray_64x8_vs_inprocess"] is False


def test_ratios_count_a_peer_in_its_better_way() -> None:
    measured = {
        "ray": server({"1x32": workload(1, 600.0)}),
        "fastapi": server({"1x32": workload(1, 100.0)}),
        "fastapi_workers": server({"1x32": workload(1, 150.0)}),
    }
    found = described([one_round(1.0, 1.0, **measured)])
    assert found["ratios"]["ray_1x32_vs_fastapi"] == pytest.approx(4.0)
    assert found["reached"]["ray_1x32_vs_fastapi"] is True


def test_what_was_not_measured_is_null_and_says_why() -> None:
    absent = {"workloads": {}, "open": [], "notes": ["not installed: make .venv-peers/.ready"]}
    found = described([one_round(1.0, 1.0, litserve=absent, local=server({}, ready_s=9.0))])
    assert found["ratios"].keys() >= RATIOS | TARGETS.keys()
    assert set(found["ratios"].values()) == {None}
    assert found["servers"]["litserve"]["notes"] == ["not installed: make .venv-peers/.ready"]
    assert found["ready_s"] == {"local": 9.0, "ray": None}
    assert (found["reached"]["local_ready_s"], found["reached"]["ray_ready_s"]) == (False, None)


def test_errors_are_refusals_and_lost_and_unanswered_requests_of_all_rounds() -> None:
    bad = workload(64, 1.0, statuses={"200": 5, "503": 3, "500": 1}, broken=4, unanswered=2, wrong=7)
    found = described([one_round(1.0, 1.0, ray=server({"64x8": bad})) for _ in range(2)])
    summary = found["servers"]["ray"]["workloads"]["64x8"]
    assert (summary["errors"], summary["wrong"]) == (20, 14)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("payloads")
    np.save(folder / "rows.npy", bundle_and_rows(folder / "bundle", hidden_dims=(16,)))
    return folder


def test_payloads_of_all_kinds_expect_what_the_encoder_gives(folder: Path) -> None:
    rows = np.load(folder / "rows.npy")
    payloads = Payloads(folder / "bundle", rows, folder)
    raw, peers = payloads.of_ours(Workload(8, 1)), payloads.of_peers(Workload(8, 1))
    assert raw.body.read_bytes() == peers.body.read_bytes() == rows[:8].tobytes()
    assert (raw.tolerance, peers.tolerance > 0) == (0.0, True)
    assert np.load(raw.expected[0]).shape == (8, 64)
    sent = json.loads(payloads.of_mlserver(Workload(8, 1)).body.read_bytes())
    assert sent["inputs"][0]["data"] == rows[:8].reshape(8, -1).tolist()
    with pytest.raises(FileNotFoundError, match=r"make .venv-peers/.ready"):
        payloads.of_ours(Workload(8, 1, "oip_binary"))


def test_payloads_for_a_gpu_allow_what_it_rounds_and_for_a_cpu_nothing(folder: Path, tmp_path: Path) -> None:
    rows = np.load(folder / "rows.npy")
    for device, allowed in (("cpu", [0.0, 0.0]), ("cuda", [1e-4, 1e-4])):
        payloads = Payloads(folder / "bundle", rows, tmp_path, device=device)
        assert [payloads.of_ours(Workload(8, 1, kind)).tolerance for kind in ("raw", "json")] == allowed


def test_payloads_refuse_rows_that_their_features_do_not_tell_apart(folder: Path) -> None:
    rows = np.load(folder / "rows.npy")
    with pytest.raises(ValueError, match="wanted ten times the tolerance"):
        Payloads(folder / "bundle", np.concatenate([rows[:4], rows[:1]]), folder)


def test_in_process_rates_are_measured_both_ways(folder: Path) -> None:
    rows = np.load(folder / "rows.npy")
    rates = encoder_rates((folder / "bundle" / "encoder.onnx").read_bytes(), rows[:8], threads=2, seconds=0.05)
    assert rates.keys() == {"operators", "sessions"}
    assert min(rates.values()) > 0
    images = encoded(rows[:3], "png")
    assert [decode_image(image, name="", shape=(1, 28, 28)).tobytes() for image in images] == [
        row.tobytes() for row in rows[:3]
    ]
    assert decoder_rate(images, shape=(1, 28, 28), threads=2, seconds=0.05) > 0


def test_a_peer_that_is_not_installed_says_so_and_fails_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTENDERS, "litserve", replace(CONTENDERS["litserve"], python=folder / "nowhere"))
    bench: Any = None  # nothing is asked of it
    assert serve.measure_server(bench, "litserve", folder) == {
        "workloads": {},
        "open": [],
        "notes": ["not installed: make .venv-peers/.ready"],
    }


def test_a_server_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        "print('started', flush=True)\n"
        "time.sleep(60)\n"
    )
    with Server([sys.executable, "-c", script], log=tmp_path / "log") as started:
        while "started" not in started.said():
            pass
        # The second process has our mark, too, once it runs.
        while len(started.family()) < 2:
            pass
        assert started.rss_mib() > 5
    assert started.family() == []


def test_benchmark_refuses_a_server_that_is_not_there() -> None:
    done = CliRunner().invoke(serve.app, ["--only", "fastap"])
    assert isinstance(done.exception, ConfigError)
    assert "did you mean" in str(done.exception)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", *(name for name in CONTENDERS if name != "local")])
def test_quick_benchmark_runs_and_every_vector_is_right(name: str, tmp_path: Path) -> None:
    if CONTENDERS[name].missing:
        pytest.skip(CONTENDERS[name].missing)
    results = tmp_path / "serve.json"
    command = [sys.executable, "-m", "benchmarks.serve", "--quick", "--only", name, "--results", str(results)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    line, found = json.loads(done.stdout.splitlines()[-1]), json.loads(results.read_text())
    assert line["ratios"] == found["ratios"]
    assert line["ratios"].keys() >= RATIOS
    (measured,) = found["servers"].values()
    assert measured["workloads"].keys() >= {shape.name for shape in SHAPES}, measured["notes"]
    assert {one["wrong"] for one in measured["workloads"].values()} == {0}
    assert {one["errors"] for one in measured["workloads"].values()} == {0}
    assert measured["ready_s"] > 0
    assert measured["rss_mib"] > 20
