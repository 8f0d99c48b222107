"""The client in C: it counts what a real server answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.wrk import WRK, run_wrk
from serving.models import Models
from serving.served_model import Place
from tests.serving.running import running

pytestmark = pytest.mark.skipif(WRK is None, reason="wrk is not installed; apt-get install wrk")


def test_run_wrk_counts_answers_and_refusals_apart(digits_bundle: Path, tmp_path: Path) -> None:
    models = Models.from_bundles([digits_bundle], place=Place(device="cpu", threads=1))
    (tmp_path / "rows").write_bytes(np.zeros((3, 64), np.uint8).tobytes())
    (tmp_path / "too few").write_bytes(b"abc")
    headers = ["Content-Type: application/octet-stream"]
    with running(models) as service:
        good, bad = (
            run_wrk(f"{service.url}/v1/embed", tmp_path / name, headers, connections=4, seconds=1, warm_up_s=1)
            for name in ("rows", "too few")
        )
    assert good["requests_per_s"] > 100
    assert list(good["statuses"]) == ["200"]
    assert 0 < good["p50_ms"] <= good["p99_ms"]
    assert good["broken"] == good["unanswered"] == 0
    assert bad["requests_per_s"] == bad["statuses"]["200"] == 0
    assert bad["statuses"]["refused"] > 100
