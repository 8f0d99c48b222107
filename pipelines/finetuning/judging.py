"""How good a classifier of few labels is, found out from these labels: some are hidden, again and again.

The draws share labels, so that their errors are more alike than those of independent ones: the interval is that of
Nadeau and Bengio (Inference for the generalization error, Machine Learning 52, 2003), whose variance of the mean over J
draws that learn from n labels and ask for m is (1/J + m/n) s^2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.model_selection import StratifiedShuffleSplit

from pipelines.finetuning.contenders import Contender, Ground, labelled, train
from vaefeat.labels import UNLABELLED
from vaefeat.temperature import find_temperature, log_loss, tempered

__all__ = ["Draw", "Interval", "Judged", "draw_splits", "judge", "mean_interval", "share_interval"]

CONFIDENCE = 0.95
#: Of the labels, how many are asked for in a draw.
_HIDDEN = 0.2
#: Different rows that a temperature is found on, at least.
_LEAST_TO_CALIBRATE = 20


class Draw(NamedTuple):
    """Positions of rows (m,), int64."""

    shown: NDArray[np.int64]
    hidden: NDArray[np.int64]


class Interval(NamedTuple):
    """Of 95 % confidence."""

    low: float
    high: float
    kind: str
    """``corrected t`` over draws, or ``Wilson`` of the rows asked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """What is known of a contender from labels that it had not seen.

    Attributes
    ----------
    contender : Contender
    errors : tuple of float
        In percent, one of each draw.
    interval : Interval
        Of their mean.
    log_loss : float
        Mean over the draws, in nats, of probabilities as they came.
    calibrated_log_loss : float or None
        With a temperature that was found on rows that are not among those of the draw; None where these are too few.
    confidence : float
        Mean probability of the class that was said, in percent, calibrated where that is known; 100 - error where it is
        well calibrated.
    temperature : float
        Found on all hidden labels; 1 where they are too few for one.
    seconds : float
        Mean of a fit.
    """

    contender: Contender
    errors: tuple[float, ...]
    interval: Interval
    log_loss: float
    calibrated_log_loss: float | None
    confidence: float
    temperature: float
    seconds: float

    @property
    def error(self) -> float:
        """Mean over the draws, in percent: what the best is chosen by."""
        return float(np.mean(self.errors))


def draw_splits(labels: NDArray[Any], *, n_draws: int, seed: int) -> list[Draw]:
    """Hide a fifth of the labels, or one of each class where that is more, as often as there are draws.

    Parameters
    ----------
    labels : ndarray of shape (n,)
        -1 where there is none; at least two of each class.
    n_draws : int
    seed : int

    Returns
    -------
    list of Draw
        The classes' shares are those among all labels; every class keeps a label that is shown.
    """
    places = labelled(labels)
    codes = np.unique(labels[places].astype(str), return_inverse=True)[1]
    n_hidden = max(int(codes.max()) + 1, round(_HIDDEN * len(places)))
    splitter = StratifiedShuffleSplit(n_draws, test_size=n_hidden, random_state=seed)
    return [Draw(places[shown], places[hidden]) for shown, hidden in splitter.split(places, codes)]


def judge(
    contender: Contender,
    ground: Ground,
    labels: NDArray[Any],
    draws: Sequence[Draw],
    *,
    seed: int,
    on_fit: Callable[[], None] = lambda: None,
) -> Judged:
    """Fit a contender to the labels that each draw shows, and ask it for those that the draw hides.

    Rows with a hidden label stay among the unlabelled ones: so are the rows that a classifier of few labels is for.

    Parameters
    ----------
    contender : Contender
    ground : Ground
    labels : ndarray of shape (n,)
    draws : sequence of Draw
        The same for all contenders.
    seed : int
    on_fit : callable
        Called after each fit.
    """
    classes = np.array(sorted({label for label in labels.tolist() if label != UNLABELLED}))
    found, codes, seconds = [], [], []
    for number, draw in enumerate(draws):
        partial = labels.copy()
        partial[draw.hidden] = UNLABELLED
        trained = train(contender, ground, partial, seed=seed + number)
        found.append(trained.predict_proba(ground, draw.hidden))
        codes.append(np.searchsorted(classes, labels[draw.hidden].astype(classes.dtype)))
        seconds.append(trained.seconds)
        on_fit()
    wrong = [one.argmax(axis=1) != code for one, code in zip(found, codes, strict=True)]
    errors = tuple(100 * float(np.mean(one)) for one in wrong)
    temperatures = [_temperature_without(draw, draws, found, codes) for draw in draws]
    known = None not in temperatures
    calibrated = (
        [tempered(one, value or 1.0) for one, value in zip(found, temperatures, strict=True)] if known else found
    )
    return Judged(
        contender=contender,
        errors=errors,
        interval=_interval(errors, wrong, draws),
        log_loss=_mean_log_loss(found, codes),
        calibrated_log_loss=_mean_log_loss(calibrated, codes) if known else None,
        confidence=100 * float(np.mean([one.max(axis=1).mean() for one in calibrated])),
        temperature=_temperature(
            np.concatenate([draw.hidden for draw in draws]), np.concatenate(found), np.concatenate(codes)
        )
        or 1.0,
        seconds=float(np.mean(seconds)),
    )


def mean_interval(values: Sequence[float], *, hidden_to_shown: float) -> tuple[float, float]:
    """Give the 95 % interval of the mean of percentages over draws that share labels.

    Parameters
    ----------
    values : sequence of float
        At least two.
    hidden_to_shown : float
        Labels that are asked for in a draw over those that are learned from.
    """
    spread = np.sqrt((1 / len(values) + hidden_to_shown) * np.var(values, ddof=1))
    reach = spread * stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return max(0.0, float(np.mean(values) - reach)), min(100.0, float(np.mean(values) + reach))


def share_interval(n_wrong: int, n_rows: int) -> tuple[float, float]:
    """Give Wilson's 95 % interval of an error in percent, from independent rows."""
    found = stats.binomtest(n_wrong, n_rows).proportion_ci(CONFIDENCE, method="wilson")
    return 100 * float(found.low), 100 * float(found.high)


def _interval(errors: Sequence[float], wrong: Sequence[NDArray[np.bool_]], draws: Sequence[Draw]) -> Interval:
    if np.ptp(errors) > 0:
        ratio = len(draws[0].hidden) / len(draws[0].shown)
        return Interval(*mean_interval(errors, hidden_to_shown=ratio), "corrected t")
    # Draws that agree, as where none has an error, say nothing of how far off they all may be: their rows do.
    n_rows = len(np.unique(np.concatenate([draw.hidden for draw in draws])))
    return Interval(*share_interval(round(errors[0] / 100 * n_rows), n_rows), "Wilson")


def _temperature_without(
    draw: Draw, draws: Sequence[Draw], found: Sequence[NDArray[np.float64]], codes: Sequence[NDArray[np.int64]]
) -> float | None:
    """Find a temperature on the hidden rows of all draws but for those that this one hides; None if they are few."""
    kept = [~np.isin(other.hidden, draw.hidden) for other in draws]
    return _temperature(
        np.concatenate([other.hidden[keep] for other, keep in zip(draws, kept, strict=True)]),
        np.concatenate([one[keep] for one, keep in zip(found, kept, strict=True)]),
        np.concatenate([one[keep] for one, keep in zip(codes, kept, strict=True)]),
    )


def _temperature(rows: NDArray[np.int64], probabilities: NDArray[np.float64], codes: NDArray[np.int64]) -> float | None:
    n_rows = len(np.unique(rows))
    return find_temperature(probabilities, codes, n_rows=n_rows) if n_rows >= _LEAST_TO_CALIBRATE else None


def _mean_log_loss(probabilities: Sequence[NDArray[np.float64]], codes: Sequence[NDArray[np.int64]]) -> float:
    return float(np.mean([log_loss(one, code) for one, code in zip(probabilities, codes, strict=True)]))
