"""What is said about measured rows: the table, the JSON, the results file, the figure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from benchmarks.likelihood_rows import ROWS, Row
from benchmarks.likelihood_runs import Trained
from benchmarks.surroundings import surroundings
from vaefeat.atomic import replace_file
from vaefeat.errors import InputError
from vaefeat.feeds import split_heldout
from vaefeat.latent_plots import learning_curves
from vaefeat.model.networks import count_multiply_adds
from vaefeat.model.vae import VAE
from vaefeat.plots import png

__all__ = ["described", "listed", "merge", "report", "results_table", "write_curves"]

_HEADLINES = ("vae_1l", "iwae50_1l", "best")
_IMAGE_SHAPE = (1, 28, 28)
#: What one processor thread does in single precision, roughly: for expectations, not for claims.
_GFLOPS = 100


def described(trained: Trained, n_rows: int) -> dict[str, Any]:
    """Describe a row's training in plain values.

    Parameters
    ----------
    trained : Trained
    n_rows : int
        Training images, with those held out.
    """
    row, history = trained.row, trained.history
    best = max(history, key=lambda record: record["heldout_objective"])
    planned = row.train.max_epochs
    facts = {
        "title": row.title,
        "finished": trained.finished,
        "epochs": len(history),
        "epochs_planned": planned,
        "best_epoch": best["epoch"],
        "n_train_rows": n_rows,
        "training_seconds": round(trained.seconds),
        "rows_per_s": round(float(np.median([record["rows_per_s"] for record in history]))),
        "heldout_elbo": best["heldout_elbo"],
        "active_units": best["active_units"],
        "begins_with": row.after,
        "model": row.model.to_dict(),
        "train": row.train.to_dict(),
        "commit_of_training": trained.sessions[0].get("commit", "unknown"),
        "sessions": trained.sessions,
        **surroundings(),
    }
    if not trained.finished:
        facts["note"] = f"stopped after {len(history)} of {planned} epochs" + (
            ", before the learning rate had come down" if row.train.lr_schedule == "cosine" else ""
        )
    if row.name.startswith("curve_"):
        n_train = len(split_heldout(n_rows, row.train.heldout, row.train.seed)[0])
        facts["curve"] = [
            [record["epoch"] * n_train, round(record["heldout_elbo"], 2), round(record["train_elbo"], 2)]
            for record in history
        ]
    return facts


def report(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Put the figures of rows together, the headlines first: nats per image, and their standard errors."""
    headlines = {name: figures[name] for name in _HEADLINES if "nll" in figures.get(name, {})}
    return {
        "nll": {name: round(row["nll"], 3) for name, row in headlines.items()},
        # For these test images; for any test images there might have been, sampling_error is what counts.
        "standard_error": {name: round(row["monte_carlo_error"], 4) for name, row in headlines.items()},
        "sampling_error": {name: round(row["sampling_error"], 3) for name, row in headlines.items()},
        "published": {name: vars(ROWS[name].published) for name in figures if ROWS[name].published is not None},
        "rows": dict(figures),
    }


def merge(path: Path, new: Mapping[str, Any]) -> dict[str, Any]:
    """Lay figures over those of a results file, which may not be there yet; rows that were not run stay as they are.

    Raises
    ------
    InputError
        The file is not one of ours.
    """
    try:
        before = json.loads(path.read_text()) if path.is_file() else {}
        merged = {key: {**before.get(key, {}), **part} for key, part in new.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"got {path}, which is no results file ({error}); choose another with --results") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(merged, indent=1) + "\n").encode())
    return merged


def write_curves(path: Path, figures: Mapping[str, Mapping[str, Any]]) -> bool:
    """Draw the bound against rows seen, of the rows that have a curve; False where none has."""
    curves = {
        f"{figures[name]['model']['latent_dim']} latents": [(seen, bound) for seen, bound, _ in figures[name]["curve"]]
        for name in ROWS
        if "curve" in figures.get(name, {})
    }
    if curves:
        replace_file(path, png(learning_curves(curves)))
    return bool(curves)


def results_table(figures: Mapping[str, Mapping[str, Any]]) -> Table:
    """Show figures beside the published ones, in nats per image."""
    table = Table(
        title="Negative log-likelihood of MNIST's test images, dynamically binarized, in nats",
        caption="in brackets: of held-out training images",
        box=None,
        pad_edge=False,
    )
    table.add_column("row", no_wrap=True)
    for column in ("NLL", "error", "published", "diff.", "-ELBO", "epochs", "minutes"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, found in figures.items():
        published, measured = ROWS[name].published, "nll" in found
        table.add_row(
            name,
            f"{found['nll']:.2f}" if measured else "",
            f"{found['monte_carlo_error']:.2f}" if measured else "",
            f"{published.nll:.2f}" if published else "",
            f"{found['nll'] - published.nll:+.2f}" if published and measured else "",
            f"{-found['elbo']:.2f}" if measured else f"({-found['heldout_elbo']:.2f})",
            f"{found['epochs']}" + ("" if found["finished"] else f" of {found['epochs_planned']}"),
            f"{found['training_seconds'] / 60:.1f}",
        )
    return table


def listed(rows: Iterable[Row]) -> Table:
    """Show rows, and what they will cost."""
    table = Table(box=None, pad_edge=False, caption=f"hours: at least, of the networks alone, at {_GFLOPS} GFLOP/s")
    for column in ("row", "what", "epochs", "hours", "samples", "published"):
        table.add_column(column, justify="left" if column in {"row", "what"} else "right")
    for row in rows:
        table.add_row(
            row.name,
            row.title + (f" (after {row.after})" if row.after else ""),
            str(row.train.max_epochs),
            f"{_expected_hours(row):.1f}",
            f"{row.n_samples:,}" if row.n_samples else "",
            f"{row.published.nll:.2f}" if row.published else "",
        )
    return table


def _expected_hours(row: Row, n_train: int = 60_000, n_test: int = 10_000) -> float:
    vae = VAE(row.model, _IMAGE_SHAPE).eval()
    with torch.no_grad():
        encode = count_multiply_adds(vae.encoder, torch.zeros((1, *_IMAGE_SHAPE)))
        decode = count_multiply_adds(vae.decoder, torch.zeros((1, row.model.latent_dim)))
    # Two operations each; the backward pass is twice the forward one.
    training = 6 * (encode + row.train.n_samples * decode) * n_train * row.train.max_epochs
    evaluation = 2 * decode * (row.n_samples or 0) * n_test
    return (training + evaluation) / (_GFLOPS * 1e9) / 3600
