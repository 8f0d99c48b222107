"""The benchmark of offline jobs: what is made of its figures."""

from __future__ import annotations

import pytest

from benchmarks.jobs_report import billion, ratios


def test_ratios_are_of_medians() -> None:
    found = {
        "loop_rows": [{"rows_per_s": 100.0}, {"rows_per_s": 90.0}, {"rows_per_s": 1.0}],
        "job_rows": [{"rows_per_s": 81.0}, {"rows_per_s": 500.0}, {"rows_per_s": 80.0}],
        "loop_memory": [{"rows_per_s": 180.0}],
        "loop_images": [{"rows_per_s": 10.0}],
        "job_images": [{"rows_per_s": 17.0}],
    }
    assert ratios(found) == {"embed_vs_loop": 0.9, "embed_vs_memory": 0.45, "jpeg_vs_pillow": 1.7}


def test_a_billion_images_need_machines_for_a_day_at_most() -> None:
    # 20,000 images/s on two processors: a billion take 27.8 processor hours, less than one machine's day.
    plan = billion(images_per_s=20_000, cpus=2, read_bytes=1000, written_bytes=250)
    assert plan["processor_hours"] == pytest.approx(27.8, abs=0.05)
    assert (plan["machines"], plan["input_tb"], plan["output_tb"]) == (1, 1.0, 0.25)
    assert plan["hours"] == pytest.approx(plan["processor_hours"] / 32, abs=0.01)
    # A hundred times as slow: 2,778 processor hours are four machines of 32 for a day.
    slow = billion(images_per_s=200, cpus=2, read_bytes=1000, written_bytes=250)
    assert slow["machines"] == 4
    assert slow["hours"] <= 24
    assert slow["read_mb_per_s"] == pytest.approx(1e6 / (slow["hours"] * 3600), rel=0.01)
