"""The stage that ships a classifier beside the encoder, where a job's configuration names files of labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from pipelines.config import FinetuneConfig, RunConfig
from pipelines.finetuning.comparison import Choice, Terms, choose, compare, counted
from pipelines.finetuning.contenders import CONTENDERS, Ground
from pipelines.finetuning.labels import read_both
from pipelines.finetuning.results import PICTURE_FILE, RESULTS_FILE, TABLE_FILE, save
from pipelines.finetuning.rows import embed_rows
from pipelines.job import Job
from pipelines.label_files import GivenLabels
from pipelines.stages import Outcome, Stage
from vaefeat.bundle import MANIFEST_FILE, Bundle, load_bundle
from vaefeat.encoder import OnnxEncoder
from vaefeat.labels import UNLABELLED
from vaefeat.settings import check_choice

__all__ = ["CLASSIFIER_FOLDER", "COMPARISON", "COMPARISON_PICTURE", "FINETUNE", "labels_in_files", "refuse_unlearnable"]

#: Inside the job's folder, and what of it is in the report.
CLASSIFIER_FOLDER = "classifier"
COMPARISON, COMPARISON_PICTURE = f"{CLASSIFIER_FOLDER}/{RESULTS_FILE}", f"{CLASSIFIER_FOLDER}/{PICTURE_FILE}"
#: Settings that say where something is; what is there has digests.
_PLACES = {"finetune.labels", "finetune.test_labels", "finetune.id_column"}


class _Asked(NamedTuple):
    given: GivenLabels
    labels: NDArray[Any]
    test_labels: NDArray[Any] | None
    terms: Terms
    choice: Choice


def refuse_unlearnable(job: Job) -> None:
    """Find out before an hour of training that labels cannot be learned from; nothing where there are none.

    Raises
    ------
    ConfigError, InputError
        Unknown classifiers; files, labels or ids that cannot be used.
    """
    if job.config.finetune.files:
        _open(job, bundle=None)


def labels_in_files(job: Job) -> NDArray[Any] | None:
    """Give what the files to learn from say of each row that they can speak of, in the order of the rows.

    Returns
    -------
    ndarray of shape (n,) or None
        Texts, and None for a row without a label; None in the place of all where no file is named.

    Raises
    ------
    ConfigError, InputError
        As :func:`refuse_unlearnable`.
    """
    if not job.config.finetune.files:
        return None
    found: NDArray[Any] = _open(job, bundle=None).labels
    return np.array([None if label == UNLABELLED else str(label) for label in found], dtype=object)


def _open(job: Job, *, bundle: Bundle | None) -> _Asked:
    """Read the labels and join them with the rows; `bundle` is None where it is not there yet."""
    wanted, rows = job.config.finetune, job.named_rows
    terms = _terms(wanted)
    given, test = read_both(
        [Path(file) for file in wanted.files],
        Path(wanted.test_labels) if wanted.test_labels else None,
        id_column=wanted.id,
        label_column=wanted.label,
    )
    return _Asked(
        given,
        given.join(rows.ids, source=rows.source),
        None if test is None else test.join(rows.ids, source=rows.source),
        terms,
        choose(terms, given, bundle),
    )


def _terms(wanted: FinetuneConfig) -> Terms:
    for name in wanted.only:
        check_choice("finetune.only", name, CONTENDERS)
    return Terms(
        only=tuple(wanted.only),
        n_draws=wanted.n_draws,
        max_steps=wanted.max_steps,
        name=wanted.name or None,
        seed=wanted.seed,
    )


def _finetune(job: Job, attempt: str) -> Outcome:
    del attempt  # a comparison begins anew: its draws belong together
    bundle = load_bundle(job.folder)
    asked = _open(job, bundle=bundle)
    Console(stderr=True).print(counted(asked.given), style="dim", highlight=False, markup=False, soft_wrap=True)
    rows = np.asarray(bundle.manifest.input.prepare(job.named_rows.array))
    ground = Ground(
        bundle=bundle,
        rows=rows,
        features=embed_rows(OnnxEncoder(bundle), rows),
        max_steps=asked.terms.max_steps,
    )
    found = compare(ground, asked.labels, test_labels=asked.test_labels, terms=asked.terms, choice=asked.choice)
    saved = save(found, job.folder / CLASSIFIER_FOLDER, config=job.config.everywhere().picked("data", "finetune"))
    written = (TABLE_FILE, PICTURE_FILE, RESULTS_FILE, MANIFEST_FILE, *saved.bundle.files)
    best = found.best
    summary = (
        f"{best.contender.title}, error {best.error:.1f} % ({best.interval.low:.1f} to {best.interval.high:.1f}) on "
        f"hidden ones of {found.n_labels:,} labels; python -m serving {job.config.out}/{CLASSIFIER_FOLDER}"
    )
    return Outcome(
        [f"{CLASSIFIER_FOLDER}/{name}" for name in written],
        summary,
        {"rows": len(rows), "labels": found.n_labels, "error_percent": best.error},
    )


def _files_of_labels(config: RunConfig) -> Mapping[str, Path]:
    wanted = config.finetune.everywhere()
    files = [("finetune.labels", file) for file in wanted.files]
    files += [("finetune.test_labels", file) for file in (wanted.test_labels,) if file]
    return {f"{setting} {file}": Path(file) for setting, file in files}


FINETUNE = Stage(
    name="finetune",
    does="ship a classifier of the labels",
    settings=lambda config: {key: value for key, value in config.picked("finetune").items() if key not in _PLACES},
    rows="named",
    reads=(MANIFEST_FILE,),
    writes=(f"{CLASSIFIER_FOLDER}/{MANIFEST_FILE}", COMPARISON, COMPARISON_PICTURE),
    work=_finetune,
    outside=_files_of_labels,
)
