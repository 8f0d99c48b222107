"""Classifiers of few labels, on rows and features that are at hand: judged, and the best one fitted and exported.

Nothing here reads or writes a file; whoever has rows and labels can ask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.frozen import FrozenEstimator

from pipelines.finetuning.contenders import CONTENDERS, FINETUNE, Contender, Ground, labelled, train
from pipelines.finetuning.judging import Draw, Interval, Judged, draw_splits, judge, share_interval
from pipelines.label_files import GivenLabels
from pipelines.progress import shown_progress
from vaefeat.bundle import Bundle, check_name
from vaefeat.errors import InputError
from vaefeat.observers import shown_activity
from vaefeat.onnx_pipeline import export_pipeline
from vaefeat.predictor import OnnxPredictor
from vaefeat.settings import check_choice, check_int
from vaefeat.temperature import TemperedClassifier, log_loss

__all__ = ["Choice", "Comparison", "Terms", "Tested", "choose", "compare", "counted"]

_WEIGHTS = "weights.safetensors"
#: On which the file is compared with scikit-learn, besides those with a label.
_COMPARED_ROWS = 1000
#: Whose number of labels is told.
_MOST_CLASSES = 30


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What is tried, and how often.

    Parameters
    ----------
    only : tuple of str
        Names among :data:`pipelines.finetuning.contenders.CONTENDERS`; all when empty.
    n_draws : int
        Of hidden labels.
    max_steps : int
        Of a fine-tuning.
    name : str, optional
        Of the shipped bundle; the encoder's with ``-pipeline`` behind it when None.
    seed : int
    """

    only: tuple[str, ...] = ()
    n_draws: int = 5
    max_steps: int = 3000
    name: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("draws", self.n_draws, at_least=2)
        check_int("max_steps", self.max_steps, at_least=1)
        check_int("seed", self.seed, at_least=0)
        for name in self.only:
            check_choice("try", name, CONTENDERS)
        if self.name is not None:
            check_name(self.name)


class Choice(NamedTuple):
    """Which classifiers are tried."""

    tried: Sequence[Contender]
    """Cheap ones first."""

    left_out: Mapping[str, str]
    """Why the others are not, by their names."""


class Tested(NamedTuple):
    """What the exported file says of test rows."""

    n_rows: int
    error: float
    """In percent."""

    interval: Interval
    log_loss: float
    confidence: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """What came out.

    Attributes
    ----------
    bundle : Bundle
        The best as one ONNX file.
    classifier : Pipeline, FineTuneClassifier or TemperedClassifier
        The same in Python, from rows to labels.
    judged : list of Judged
        All that were tried.
    best : Judged
    left_out : mapping of str to str
        Why others were not tried.
    tested : Tested or None
    n_rows, n_labels, n_classes, n_draws, n_hidden : int
        `n_hidden` labels are hidden in a draw.
    """

    bundle: Bundle
    classifier: Any
    judged: list[Judged]
    best: Judged
    left_out: Mapping[str, str]
    tested: Tested | None
    n_rows: int
    n_labels: int
    n_classes: int
    n_draws: int
    n_hidden: int

    @property
    def title(self) -> str:
        """What was compared on, for people."""
        return f"{self.n_labels:,} labels of {self.n_classes} classes, {self.n_draws} draws of hidden ones"


def choose(terms: Terms, given: GivenLabels, bundle: Bundle | None) -> Choice:
    """Find out what can be tried with these labels.

    Parameters
    ----------
    terms : Terms
    given : GivenLabels
        At least two of each class.
    bundle : Bundle or None
        None where it is not trained yet, and will have its weights.

    Raises
    ------
    InputError
        Nothing can be tried.
    """
    rarest, count = next(iter(given.counts.items()))
    # A draw hides up to half of a class, or one more than a fifth of it.
    left_out = {}
    tried = []
    for name, contender in CONTENDERS.items():
        if terms.only and name not in terms.only:
            continue
        if count < 2 * contender.labels_a_class:
            left_out[name] = f"needs {2 * contender.labels_a_class} labels a class, {rarest!r} has {count}"
        elif name == FINETUNE and bundle is not None and _WEIGHTS not in bundle.files:
            left_out[name] = f"bundle {bundle.name!r} has no {_WEIGHTS} to begin with"
        else:
            tried.append(contender)
    if not tried:
        reasons = "; ".join(f"{name} {reason}" for name, reason in left_out.items())
        raise InputError(
            f"got nothing to try: {reasons}. Give more labels, or other names with --try (of a stage, finetune.only)"
        )
    return Choice(tried, left_out)


def counted(given: GivenLabels) -> str:
    """Tell the labels of each class, the rarest first: there a misspelt one is seen."""
    shown = [f"{label} {count:,}" for label, count in islice(given.counts.items(), _MOST_CLASSES)]
    rest = len(given.counts) - len(shown)
    return f"labels of each class: {', '.join(shown)}{f', and {rest} classes with more' if rest else ''}"


def compare(
    ground: Ground, labels: NDArray[Any], *, test_labels: NDArray[Any] | None, terms: Terms, choice: Choice
) -> Comparison:
    """Judge classifiers on labels that are hidden from them, and fit and export the best.

    Parameters
    ----------
    ground : Ground
        n rows.
    labels : ndarray of shape (n,)
        As :meth:`~pipelines.label_files.GivenLabels.join` gives them.
    test_labels : ndarray of shape (n,) or None
        Of other rows, which the exported file is asked for at the end.
    terms : Terms
    choice : Choice
        What :func:`choose` gave for them.

    Raises
    ------
    ExportError, TrainingError
        Whatever a classifier raises.
    """
    draws = draw_splits(labels, n_draws=terms.n_draws, seed=terms.seed)
    judged = _judge_all(choice.tried, ground, labels, draws, seed=terms.seed)
    # Of equal ones, min takes the first, and the cheapest comes first.
    best = min(judged, key=lambda one: round(one.error, 9))
    with shown_activity(f"train {best.contender.title} on all labels, and export it"):
        classifier = _fitted(best, ground, labels, seed=terms.seed)
        made = export_pipeline(classifier, None, X=_compared(ground, labels), name=terms.name)
    return Comparison(
        bundle=made,
        classifier=classifier,
        judged=judged,
        best=best,
        left_out=choice.left_out,
        tested=None if test_labels is None else _test(made, ground, test_labels),
        n_classes=len(np.unique(labels[labelled(labels)].astype(str))),
        n_rows=len(labels),
        n_labels=len(labelled(labels)),
        n_draws=len(draws),
        n_hidden=len(draws[0].hidden),
    )


def _judge_all(
    contenders: Sequence[Contender], ground: Ground, labels: NDArray[Any], draws: Sequence[Draw], *, seed: int
) -> list[Judged]:
    judged = []
    with shown_progress() as progress:
        for contender in contenders:
            task = progress.add_task(contender.title, total=len(draws))
            advance = partial(progress.advance, task)
            judged.append(judge(contender, ground, labels, draws, seed=seed, on_fit=advance))
    return judged


def _fitted(best: Judged, ground: Ground, labels: NDArray[Any], *, seed: int) -> Any:
    """Fit the best to all labels, with the temperature that held-out ones gave."""
    classifier = train(best.contender, ground, labels, seed=seed).classifier
    if best.temperature == 1.0:
        return classifier
    frozen = TemperedClassifier(FrozenEstimator(classifier), temperature=best.temperature)
    return frozen.fit(ground.rows[:1], labels[:1])


def _compared(ground: Ground, labels: NDArray[Any]) -> NDArray[Any]:
    spread = np.linspace(0, len(ground.rows) - 1, min(_COMPARED_ROWS, len(ground.rows))).round().astype(int)
    return np.asarray(ground.rows[np.union1d(labelled(labels)[:_COMPARED_ROWS], spread)])


def _test(made: Bundle, ground: Ground, labels: NDArray[Any]) -> Tested:
    """Ask the file itself."""
    places = labelled(labels)
    predictor = OnnxPredictor(made, device="cpu")
    probabilities = predictor.predict_proba(ground.rows[places])
    codes = np.array([predictor.classes.index(label) for label in labels[places].tolist()])
    n_wrong = int((probabilities.argmax(axis=1) != codes).sum())
    return Tested(
        n_rows=len(places),
        error=100 * n_wrong / len(places),
        interval=Interval(*share_interval(n_wrong, len(places)), "Wilson"),
        log_loss=log_loss(probabilities, codes),
        confidence=100 * float(probabilities.max(axis=1).mean()),
    )
