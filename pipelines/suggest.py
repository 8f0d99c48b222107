"""The job that says which rows to label next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from threadpoolctl import threadpool_limits

from pipelines.candidates import Candidates, open_candidates
from pipelines.contact_sheet import draw_sheet, write_page
from pipelines.label_files import GivenLabels, read_labels, written_labels
from vaefeat.atomic import replace_file
from vaefeat.data import Split
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import InputError
from vaefeat.labels import labelled_rows
from vaefeat.observers import shown_activity
from vaefeat.settings import check_int
from vaefeat.suggestions import suggest_rows

__all__ = ["SuggestOptions", "suggest"]

LABELS_FILE, PAGE_FILE, SHEET_FILE = "suggestions.csv", "suggestions.html", "suggestions.png"
#: Rows that are looked at, a random sample of more: whoever labels hundreds loses nothing, and memory is bounded.
_CANDIDATES = 50_000
#: Or as many as this for each row that is asked for, if that is more.
_CANDIDATES_PER_ROW = 20


@dataclass(frozen=True, kw_only=True)
class SuggestOptions:
    """What is asked for.

    Parameters
    ----------
    bundle, data, out : Path
    budget : int
        Rows to suggest.
    labels : sequence of Path
        CSV or Parquet files of labels that there are.
    id_column : str, optional
        Of Parquet.
    split : {"train", "test"}
    image_size : int, optional
    seed : int
    """

    bundle: Path
    data: Path
    out: Path
    budget: int
    labels: Sequence[Path] = ()
    id_column: str | None = None
    split: Split = "train"
    image_size: int | None = None
    seed: int = 0


def suggest(options: SuggestOptions, *, console: Console) -> list[str]:
    """Choose rows to label and write a sheet of them and a file to fill in.

    Parameters
    ----------
    options : SuggestOptions
    console : Console
        Where the result is told; progress goes to standard error.

    Returns
    -------
    list of str
        Ids of the suggested rows, in the order of :func:`vaefeat.suggestions.suggest_rows`.

    Raises
    ------
    InputError
        Data that cannot be read or that the bundle does not take; labels that do not join; a budget of more rows than
        there are.
    """
    check_int("budget", options.budget, at_least=1)
    encoder = OnnxEncoder(options.bundle)
    given = read_labels(options.labels)
    _refuse_filled_in(options.out / LABELS_FILE)
    rows = open_candidates(
        options.data, split=options.split, image_size=options.image_size, id_column=options.id_column
    )
    _refuse_misfit(encoder, rows, options)
    labels = given.join(rows.ids, source=str(options.data))
    known = labelled_rows(labels)
    passed_over = given.places_passed_over(rows.ids, source=str(options.data))
    positions = _sample(known, options, passed_over=passed_over)
    features = _embed(encoder, rows, positions)
    with shown_activity("choose rows"), threadpool_limits(1):
        chosen = positions[suggest_rows(features, budget=options.budget, labels=labels[positions], seed=options.seed)]
    ids = [rows.ids[position] for position in chosen]
    _write(options, encoder, rows, chosen, ids, given)
    how = f"{len(given.labels)} labels" if given.labels else "no labels yet"
    how += f", {len(passed_over)} passed over without one" if passed_over else ""
    seen = "" if len(positions) + len(passed_over) == len(rows.ids) else f", {len(positions):,} of them looked at"
    console.print(
        f"{options.out / LABELS_FILE}: {len(ids)} of {len(rows.ids):,} rows to label ({how}{seen}); "
        f"look at {PAGE_FILE} there, and give the filled-in file back with --labels",
        highlight=False,
        soft_wrap=True,
    )
    return ids


def _refuse_filled_in(path: Path) -> None:
    """Keep what somebody has typed into the file of an earlier call."""
    if path.is_file() and (labels := read_labels([path]).labels):
        raise InputError(
            f"got {path} with {len(labels)} labels filled in, wanted a folder without such a file; "
            f"give it with --labels, and another --out"
        )


def _refuse_misfit(encoder: OnnxEncoder, rows: Candidates, options: SuggestOptions) -> None:
    if rows.blocks.row_shape not in {encoder.input.shape, (encoder.input.n_features,)}:
        raise InputError(
            f"got rows of shape {rows.blocks.row_shape} in {options.data}, and the bundle {options.bundle} takes "
            f"{encoder.input}; give the data that it was trained on, or data like them"
        )


def _sample(known: NDArray[np.bool_], options: SuggestOptions, *, passed_over: Sequence[int]) -> NDArray[np.int64]:
    """Give rows to look at, ascending: all with a label, and a random sample of those that may get one."""
    free = ~known
    free[passed_over] = False
    if (n_free := int(free.sum())) < options.budget:
        raise InputError(
            f"got a budget of {options.budget} rows, and {options.data} has {n_free} without a label"
            f"{f' that were not passed over ({len(passed_over)} were)' if passed_over else ''}; ask for fewer"
        )
    some = np.flatnonzero(free)
    most = max(_CANDIDATES, _CANDIDATES_PER_ROW * options.budget)
    if len(some) > most:
        some = np.random.default_rng(options.seed).choice(some, most, replace=False)
    return np.sort(np.concatenate([some, np.flatnonzero(known)]))


def _embed(encoder: OnnxEncoder, rows: Candidates, positions: NDArray[np.int64]) -> NDArray[np.float32]:
    features = np.empty((len(positions), encoder.outputs["mean"]), dtype=np.float32)
    console, start = Console(stderr=True), 0
    for part in track(rows.read(positions), "embed", console=console, transient=True, disable=not console.is_terminal):
        features[start : start + len(part)] = encoder.embed(part)
        start += len(part)
    return features


def _write(
    options: SuggestOptions,
    encoder: OnnxEncoder,
    rows: Candidates,
    chosen: NDArray[np.int64],
    ids: Sequence[str],
    given: GivenLabels,
) -> None:
    order = np.argsort(chosen)
    shown: NDArray[Any] = np.concatenate(list(rows.read(chosen[order])))[np.argsort(order)]
    # Rows that are images for the bundle may lie flat in the data.
    shown = shown.reshape(-1, *encoder.input.shape)
    scale = {"low": encoder.input.low, "high": encoder.input.high}
    page = write_page(
        shown,
        ids,
        columns=rows.columns,
        classes=list(map(str, given.classes)),
        title=f"{len(ids)} rows of {options.data.name} to label",
        file_name=LABELS_FILE,
        **scale,
    )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        # Of an earlier call, without any label: it must not stand beside another page.
        (options.out / LABELS_FILE).unlink(missing_ok=True)
        replace_file(options.out / PAGE_FILE, page.encode())
        if encoder.input.kind == "image":
            replace_file(options.out / SHEET_FILE, draw_sheet(shown, ids, **scale))
        # Last: with it the suggestions are whole.
        replace_file(options.out / LABELS_FILE, written_labels(ids))
    except OSError as error:
        raise InputError(f"could not write {options.out}: {error.strerror or error}; choose another place") from error
