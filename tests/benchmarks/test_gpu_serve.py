"""The benchmark of an encoder on a GPU: what it calls the same and different, and that it runs where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.gpu_serve import compared, make_ways, measure, shown
from vaefeat import OnnxEncoder, load_bundle
from vaefeat.quantization import quantize

ROOT = Path(__file__).parents[2]
ROWS = np.random.default_rng(0).normal(size=(512, 3)).astype(np.float32)


def test_compared_finds_a_way_that_gives_every_row_its_own_features_the_same() -> None:
    found = compared(lambda rows: rows * 2, ROWS, ROWS * 2)
    assert found == {"from_cpu": 0.0, "between_buckets": 0.0, "same_bits": True, "beside_others": True}


def test_compared_finds_buckets_that_differ() -> None:
    found = compared(lambda rows: rows * np.float32(1 + 1e-3 * len(rows)), ROWS, ROWS)
    assert not found["same_bits"]
    assert found["beside_others"]
    assert found["between_buckets"] > 0.1


def test_compared_finds_rows_that_depend_on_their_place() -> None:
    found = compared(lambda rows: rows + np.arange(len(rows), dtype=np.float32)[:, None], ROWS, ROWS)
    assert not found["beside_others"]


def test_compared_measures_the_difference_from_the_cpu_in_standard_deviations() -> None:
    scaled = ROWS * np.array([1, 10, 100], np.float32)
    found = compared(lambda rows: rows + scaled.std(axis=0) / 4, scaled, scaled)
    assert found["from_cpu"] == pytest.approx(0.25, rel=1e-3)


def test_every_way_is_measured_at_every_size_and_gives_the_encoder_s_features(
    digits_bundle: Path, digits_rows: NDArray[np.uint8]
) -> None:
    bundle = load_bundle(digits_bundle)
    ways, notes = make_ways(bundle, quantize(bundle, digits_rows, to="float16"), device="cpu")
    assert list(ways) == ["plain", "bound", "graphs", "float16 graphs"]
    assert len(notes) == 1
    assert "TensorRT" in notes[0]
    expected = OnnxEncoder(bundle, device="cpu").embed(digits_rows[:512])
    agreement = {name: compared(compute, digits_rows[:512], expected) for name, (compute, _) in ways.items()}
    assert [one["from_cpu"] < 0.05 for one in agreement.values()] == [True] * 4
    assert agreement["bound"]["from_cpu"] == 0 < agreement["float16 graphs"]["from_cpu"]
    computes = {name: compute for name, (compute, _) in ways.items()}
    found = measure(computes, digits_rows, seconds=0.001, rounds=1)
    for by_size in found.values():
        assert list(by_size) == ["1", "8", "32", "64", "128", "256", "512"]
        for size, one in by_size.items():
            assert one["rows_per_s"] == pytest.approx(int(size) * 1e6 / float(one["call_us"] or 0))
    console = Console(width=120, record=True)
    console.print(shown(found, agreement))
    assert "float16 graphs" in console.export_text()


@pytest.mark.parametrize(
    ("words", "environment", "status", "message"),
    [
        (["frob"], {}, 2, "got frob, wanted --dry-run or some of: tests encoder train serve"),
        ([], {"PYTHON": "no-such-python"}, 3, "missing: an environment"),
        (["--dry-run"], {"PYTHON": sys.executable, "DATA": "no-such-folder"}, 3, "missing: MNIST in no-such-folder"),
    ],
)
def test_script_says_at_once_what_is_missing(
    words: list[str], environment: dict[str, str], status: int, message: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *words],
        env={**os.environ, **environment, "OUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
