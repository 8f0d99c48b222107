"""The soak: what is made of counts and times, versions of the bundle, and that it runs from start to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.soak_report import goodput_back_s, growth, judged, outside
from benchmarks.versions import scaled
from vaefeat import OnnxEncoder
from vaefeat.bundle import load_bundle

ROOT = Path(__file__).parents[2]


def test_goodput_is_back_when_a_whole_second_is_as_good_as_before() -> None:
    # 100 a second; a kill at 6 s leaves nothing for 2 s, half for 1 s, then all.
    good = [10] * 60 + [0] * 20 + [5] * 10 + [10] * 40
    back = goodput_back_s(good, bin_s=0.1, began=1000.0, kill=1006.0)
    assert back == pytest.approx(2.8, abs=0.11)
    assert goodput_back_s(good[:95], bin_s=0.1, began=1000.0, kill=1006.0) is None, "nobody saw it come back"
    assert goodput_back_s([0] * 60 + [10] * 40, bin_s=0.1, began=0.0, kill=6.0) is None, "there was none before"


def test_goodput_outside_leaves_ten_seconds_after_kills_out() -> None:
    good = [10] * 100 + [0] * 100 + [10] * 100
    assert outside(good, bin_s=0.1, began=50.0, kills=[60.0]) == pytest.approx(100.0, rel=0.02)
    assert outside(good, bin_s=0.1, began=50.0, kills=[]) == pytest.approx(200 / 3)
    assert outside(good[:100], bin_s=0.1, began=50.0, kills=[50.0]) is None


def test_growth_fits_the_last_half_alone() -> None:
    # It climbs while it warms up, and then by 1 MiB a minute.
    samples = [(float(t), 100.0 + 10 * t) for t in range(60)]
    samples += [(float(t), 700.0 + (t - 60) / 60) for t in range(60, 120)]
    found = growth(samples)
    assert found is not None
    assert found["mib_per_h"] == pytest.approx(60.0)
    assert found["share"] == pytest.approx(1 / 700, rel=0.05)
    assert growth(samples[:4]) is None


def report(**changes: Any) -> dict[str, Any]:
    phase = {"statuses": {"200": 9, "503": 4}, "wrong": 0, "unanswered": 0, "goodput_over_peak": 0.95}
    plain: dict[str, Any] = {
        "phases": {"1.5": {**phase, "goodput_over_peak": 0.5}, "3": phase},
        "trouble": {"statuses": {"200": 3}, "wrong": 0, "unanswered": 0},
        "kills": [{"goodput_back_s": 2.0, "replaced_s": 6.0}],
        "swaps": [{"swapped_s": 1.0}],
        "memory": {"share": 0.01},
    }
    return {**plain, **changes}


def test_judged_passes_a_service_that_keeps_its_promises() -> None:
    targets = judged(report())
    assert {one["passed"] for one in targets.values()} == {True}
    assert targets["recovery_s"]["got"] == 6.0


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ("wrong_vectors", {"trouble": {"statuses": {}, "wrong": 1, "unanswered": 0}}),
        ("requests_without_answer", {"trouble": {"statuses": {}, "wrong": 0, "unanswered": 1}}),
        ("statuses", {"trouble": {"statuses": {"500": 1}, "wrong": 0, "unanswered": 0}}),
        ("recovery_s", {"kills": [{"goodput_back_s": 2.0, "replaced_s": None}]}),
        ("recovery_s", {"kills": [{"goodput_back_s": 11.0, "replaced_s": 1.0}]}),
        ("swaps_done", {"swaps": [{"swapped_s": 1.0}, {"swapped_s": None}]}),
        ("memory_growth", {"memory": {"share": 0.06}}),
    ],
)
def test_judged_fails_the_target_that_is_missed_and_no_other(target: str, changes: dict[str, Any]) -> None:
    targets = judged(report(**changes))
    assert [name for name, one in targets.items() if one["passed"] is False] == [target]


def test_judged_leaves_open_what_was_not_measured() -> None:
    targets = judged(report(kills=[], swaps=[], memory=None))
    assert [name for name, one in targets.items() if one["passed"] is None] == [
        "recovery_s",
        "swaps_done",
        "memory_growth",
    ]


def test_a_scaled_version_has_other_features_under_the_same_name(
    digits_bundle: Path, digits_rows: NDArray[np.uint8]
) -> None:
    bundle = load_bundle(digits_bundle)
    other = scaled(bundle)
    assert (other.name, other.digest != bundle.digest) == (bundle.name, True)
    wanted = 2 * OnnxEncoder(bundle, device="cpu").embed(digits_rows[:9])
    assert OnnxEncoder(other, device="cpu").embed(digits_rows[:9]).tobytes() == wanted.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.serve)])
def test_quick_soak_runs_and_loses_and_mixes_nothing(engine: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.soak", "--quick", "--engine", engine]
    done = subprocess.run(
        [*command, "--results", str(tmp_path / "soak.json")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    results = json.loads((tmp_path / "soak.json").read_text())
    assert found == {name: value for name, value in results.items() if name != "log"}
    # How much is answered depends on what else the machine does; these do not.
    for target in ("wrong_vectors", "requests_without_answer", "statuses", "swaps_done"):
        assert found["targets"][target]["passed"] is True, (target, found["targets"][target], results["log"])
    assert found["peak_requests_per_s"] > 0
    assert found["trouble"]["hung_up"] > 0
    # One in each overload; a replica that is replaced at once leaves time for another.
    assert bool(found["kills"]) == (engine == "ray")
    assert found["phases"].keys() == {"1.5", "3"}
