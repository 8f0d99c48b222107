"""What is said about a soaked service: from counts and times to targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["goodput_back_s", "growth", "judged", "outside"]

#: After a kill goodput has a target of its own.
RECOVERY_S = 10.0
#: Goodput counts as back when a second has so much of what the five before the kill had.
_BACK, _BEFORE_S, _WINDOW_S = 0.9, 5.0, 1.0
_GOODPUT = 0.9
#: Growth of resident memory over the last half of the run, as a share of it, up to which it counts as flat.
_FLAT = 0.05
#: What a client may be told: the answer, to come again, or that its time is over.
_ALLOWED = {"200", "429", "503", "504"}


def outside(good: Sequence[int], *, bin_s: float, began: float, kills: Iterable[float]) -> float | None:
    """Mean answers per second, without the seconds after kills.

    Parameters
    ----------
    good : sequence of int
        Answers in each bin.
    bin_s : float
    began : float
        When the first bin began, on the clock that `kills` are read from.
    kills : iterable of float

    Returns
    -------
    float or None
        None where every bin is after a kill.
    """
    times = began + bin_s * np.arange(len(good))
    kept = np.ones(len(good), bool)
    for kill in kills:
        kept &= ~((times >= kill - bin_s) & (times < kill + RECOVERY_S))
    return float(np.asarray(good)[kept].mean() / bin_s) if kept.any() else None


def goodput_back_s(good: Sequence[int], *, bin_s: float, began: float, kill: float) -> float | None:
    """Seconds from a kill until a whole second is as good as those before; None where none is, or nothing was before.

    Parameters
    ----------
    good, bin_s, began
        As for :func:`outside`.
    kill : float
    """
    at = int((kill - began) / bin_s)
    before = np.asarray(good[max(0, at - round(_BEFORE_S / bin_s)) : max(0, at)])
    if not before.size or not before.mean():
        return None
    width = round(_WINDOW_S / bin_s)
    for start in range(at, len(good) - width + 1):
        if np.mean(good[start : start + width]) >= _BACK * before.mean():
            return max(0.0, began + start * bin_s - kill)
    return None


def growth(samples: Sequence[tuple[float, float]]) -> dict[str, float] | None:
    """Fit a line to the last half of memory samples.

    Parameters
    ----------
    samples : sequence of (float, float)
        Seconds and MiB.

    Returns
    -------
    dict or None
        ``mib_per_h``, ``share``: what it grew in that half, as a share of its mean, and ``mean_mib``; None for fewer
        than three samples.
    """
    half = samples[len(samples) // 2 :]
    if len(half) < 3:
        return None
    seconds, mib = np.array(half).T
    slope = float(np.polyfit(seconds - seconds[0], mib, 1)[0])
    grown = slope * float(seconds[-1] - seconds[0])
    return {"mib_per_h": slope * 3600, "share": grown / float(mib.mean()), "mean_mib": float(mib.mean())}


def judged(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Compare with the targets.

    Parameters
    ----------
    report : mapping
        ``phases`` by load, ``trouble``, ``peak_requests_per_s``, ``kills``, ``swaps`` and ``memory``, as
        :mod:`benchmarks.soak` finds them.

    Returns
    -------
    dict
        By target: ``got``, ``wanted`` and ``passed``; the last is None for what was not measured.
    """
    phases, trouble = list(report["phases"].values()), report["trouble"]
    statuses: Counter[str] = Counter(trouble["statuses"])
    for phase in phases:
        statuses.update(phase["statuses"])
    unusual = {status: n for status, n in statuses.items() if status not in _ALLOWED}
    heaviest = report["phases"][max(report["phases"], key=float)]
    goodput = heaviest["goodput_over_peak"]
    kills = [kill[name] for kill in report["kills"] for name in ("goodput_back_s", "replaced_s")]
    slowest = None if not kills else max(float("inf") if one is None else one for one in kills)
    memory = report["memory"]
    wrong = sum(one["wrong"] for one in (*phases, trouble))
    unanswered = sum(one["unanswered"] for one in (*phases, trouble))
    return {
        "wrong_vectors": _target(wrong, "0", wrong == 0),
        "requests_without_answer": _target(unanswered, "0", unanswered == 0),
        "statuses": _target(unusual, f"none but {', '.join(sorted(_ALLOWED))}", not unusual),
        "goodput_over_peak": _target(goodput, f"at least {_GOODPUT}", None if goodput is None else goodput >= _GOODPUT),
        "recovery_s": _target(
            "never" if slowest == float("inf") else slowest,
            f"at most {RECOVERY_S:g}",
            None if slowest is None else slowest <= RECOVERY_S,
        ),
        "swaps_done": _target(
            sum(swap["swapped_s"] is not None for swap in report["swaps"]),
            f"all {len(report['swaps'])}",
            all(swap["swapped_s"] is not None for swap in report["swaps"]) if report["swaps"] else None,
        ),
        "memory_growth": _target(
            memory["share"] if memory else None,
            f"at most {_FLAT} of it in the last half",
            memory["share"] <= _FLAT if memory else None,
        ),
    }


def _target(got: Any, wanted: str, passed: bool | None) -> dict[str, Any]:
    return {"got": got, "wanted": wanted, "passed": passed}
