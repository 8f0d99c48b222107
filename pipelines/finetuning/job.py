"""The job: labels and rows in, the best classifier of several out, as a bundle that is served."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from sklearn.frozen import FrozenEstimator

from pipelines.finetuning.contenders import CONTENDERS, FINETUNE, Contender, Ground, labelled, train
from pipelines.finetuning.judging import Draw, Interval, Judged, draw_splits, judge, share_interval
from pipelines.finetuning.labels import refuse_mixing, require_two_each
from pipelines.finetuning.results import Tested, as_markdown, as_table, as_values, draw_comparison
from pipelines.finetuning.rows import NamedRows, embed_rows, read_features, read_rows
from pipelines.label_files import GivenLabels, read_labels
from pipelines.progress import shown_progress
from vaefeat.atomic import replace_file
from vaefeat.bundle import Bundle, check_name, load_bundle
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import InputError
from vaefeat.observers import shown_activity
from vaefeat.onnx_pipeline import export_pipeline
from vaefeat.predictor import OnnxPredictor
from vaefeat.settings import check_choice, check_int
from vaefeat.temperature import TemperedClassifier, log_loss

__all__ = ["FinetuneOptions", "Shipped", "finetune"]

RESULTS_FILE, TABLE_FILE, PICTURE_FILE = "results.json", "comparison.md", "comparison.png"
_MANIFEST, _WEIGHTS = "bundle.json", "weights.safetensors"
#: On which the file is compared with scikit-learn, besides those with a label.
_COMPARED_ROWS = 1000
#: Whose number of labels is told.
_MOST_CLASSES = 30


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """What is asked for.

    Parameters
    ----------
    bundle, data, out : Path
    labels : sequence of Path
        Files of the labels there are.
    features : Path, optional
        Of all rows, as ``python -m pipelines embed`` writes them; encoded here when None.
    test_labels : Path, optional
        Labels of other rows of the data, which the shipped classifier is asked for at the end.
    id_column, label_column : str
        Of the files of labels.
    data_id_column : str, optional
        Of the data, where they are Parquet or a table.
    split : {"train", "test"}
    image_size : int, optional
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

    bundle: Path
    data: Path
    labels: Sequence[Path]
    out: Path
    features: Path | None = None
    test_labels: Path | None = None
    id_column: str = "id"
    label_column: str = "label"
    data_id_column: str | None = None
    split: Literal["train", "test"] = "train"
    image_size: int | None = None
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Shipped:
    """What came out.

    Attributes
    ----------
    bundle : Bundle
        In the folder.
    classifier : Pipeline, FineTuneClassifier or TemperedClassifier
        The same in Python, from rows to labels.
    judged : list of Judged
        All that were tried.
    best : Judged
    """

    bundle: Bundle
    classifier: Any
    judged: list[Judged]
    best: Judged


def finetune(options: FinetuneOptions, *, console: Console) -> Shipped:
    """Compare classifiers on the labels there are, and ship the best.

    Parameters
    ----------
    options : FinetuneOptions
    console : Console
        Where the table goes; progress goes to standard error.

    Returns
    -------
    Shipped

    Raises
    ------
    InputError
        Labels, ids, rows or features that cannot be used or do not fit together; a folder that cannot be written.
    BundleError, ExportError, TrainingError
        Whatever a stage raises.
    """
    _refuse_used(options.out)
    given = read_labels(options.labels, id_column=options.id_column, label_column=options.label_column)
    require_two_each(given, column=options.label_column)
    test = _test_labels(options, given)
    bundle = load_bundle(options.bundle)
    encoder = OnnxEncoder(bundle)
    contenders, left_out = _chosen(options, given, bundle)
    console.print(_counted(given), highlight=False, markup=False)
    rows = read_rows(
        bundle.manifest.input,
        options.data,
        split=options.split,
        image_size=options.image_size,
        id_column=options.data_id_column,
    )
    labels = given.join(rows.ids, source=rows.source)
    test_labels = None if test is None else test.join(rows.ids, source=rows.source)
    ground = Ground(
        bundle=bundle,
        rows=rows.array,
        features=_features(options, encoder, rows),
        max_steps=options.max_steps,
    )
    draws = draw_splits(labels, n_draws=options.n_draws, seed=options.seed)
    judged = _judge_all(contenders, ground, labels, draws, seed=options.seed)
    # Of equal ones, min takes the first, and the cheapest comes first.
    best = min(judged, key=lambda one: round(one.error, 9))
    with shown_activity(f"train {best.contender.title} on all labels, and export it"):
        classifier = _fitted(best, ground, labels, seed=options.seed)
        made = export_pipeline(classifier, None, X=_compared(ground, labels), name=options.name)
    tested = None if test_labels is None else _test(made, ground, test_labels)
    title = f"{len(given.labels):,} labels of {len(given.classes)} classes, {options.n_draws} draws of hidden ones"
    _show(console, options, judged, best, left_out, tested, title=title)
    saved = _write(options, made, given, judged, best, draws, left_out, tested, title=title, n_rows=len(rows.ids))
    return Shipped(bundle=saved, classifier=classifier, judged=judged, best=best)


def _refuse_used(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"got {out}, which is a file; wanted the name of a folder for the classifier")
    if (out / _MANIFEST).exists():
        raise InputError(f"got {out}, which holds a bundle already; choose another --out, or remove the folder")


def _test_labels(options: FinetuneOptions, given: GivenLabels) -> GivenLabels | None:
    if options.test_labels is None:
        return None
    test = read_labels([options.test_labels], id_column=options.id_column, label_column=options.label_column)
    refuse_mixing(given, test)
    return test


def _chosen(options: FinetuneOptions, given: GivenLabels, bundle: Bundle) -> tuple[list[Contender], dict[str, str]]:
    """Give what is tried, cheap ones first, and why the others are not."""
    rarest, count = next(iter(given.counts.items()))
    # A draw hides up to half of a class, or one more than a fifth of it.
    left_out = {}
    tried = []
    for name, contender in CONTENDERS.items():
        if options.only and name not in options.only:
            continue
        if count < 2 * contender.labels_a_class:
            left_out[name] = f"needs {2 * contender.labels_a_class} labels a class, {rarest!r} has {count}"
        elif name == FINETUNE and _WEIGHTS not in bundle.files:
            left_out[name] = f"bundle {bundle.name!r} has no {_WEIGHTS} to begin with"
        else:
            tried.append(contender)
    if not tried:
        reasons = "; ".join(f"{name} {reason}" for name, reason in left_out.items())
        raise InputError(f"got nothing to try: {reasons}. Give more labels, or other names with --try")
    return tried, left_out


def _counted(given: GivenLabels) -> str:
    shown = [f"{label} {count:,}" for label, count in islice(given.counts.items(), _MOST_CLASSES)]
    rest = len(given.counts) - len(shown)
    return f"labels of each class: {', '.join(shown)}{f', and {rest} classes with more' if rest else ''}"


def _features(options: FinetuneOptions, encoder: OnnxEncoder, rows: NamedRows) -> NDArray[np.float32]:
    if options.features is None:
        return embed_rows(encoder, rows.array)
    return read_features(options.features, encoder, rows)


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


def _show(
    console: Console,
    options: FinetuneOptions,
    judged: Sequence[Judged],
    best: Judged,
    left_out: dict[str, str],
    tested: Tested | None,
    *,
    title: str,
) -> None:
    console.print(as_table(judged, best, title=title))
    for name, reason in left_out.items():
        console.print(f"{name} was left out: {reason}", highlight=False, soft_wrap=True)
    if tested is not None:
        console.print(
            f"on {tested.n_rows:,} test rows: error {tested.error:.1f} % ({tested.interval.low:.1f} to "
            f"{tested.interval.high:.1f}, {tested.interval.kind}), confidence {tested.confidence:.1f} %",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"{best.contender.title}: python -m serving {options.out}", highlight=False, soft_wrap=True)


def _write(
    options: FinetuneOptions,
    made: Bundle,
    given: GivenLabels,
    judged: Sequence[Judged],
    best: Judged,
    draws: Sequence[Draw],
    left_out: dict[str, str],
    tested: Tested | None,
    *,
    title: str,
    n_rows: int,
) -> Bundle:
    assert made.manifest.pipeline is not None
    values = {
        "shipped": best.contender.name,
        "digest": made.digest,
        "encoder": made.manifest.pipeline["encoder"],
        "temperature": best.temperature,
        "n_rows": n_rows,
        "n_labels": len(given.labels),
        "classes": list(given.classes),
        "n_hidden_a_draw": len(draws[0].hidden),
        **as_values(judged, left_out, tested),
        "config": {name: _plain(value) for name, value in vars(options).items()},
        "environment": {
            "date": datetime.now(UTC).date().isoformat(),
            "python": platform.python_version(),
            **made.manifest.versions,
        },
    }
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        replace_file(options.out / PICTURE_FILE, draw_comparison(judged, best, title=title))
        replace_file(options.out / TABLE_FILE, as_markdown(judged, best, title=title).encode())
        replace_file(options.out / RESULTS_FILE, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise InputError(f"could not write {options.out}: {error.strerror or error}; choose another place") from error
    # Last: its manifest says that the folder is whole.
    return made.save(options.out)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
