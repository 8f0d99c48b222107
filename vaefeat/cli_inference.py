"""Verbs that ask a trained model: generate, score, impute, diagnose."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from vaefeat.cli_files import (
    BUNDLE,
    DATA,
    IMAGE_SIZE,
    SEED,
    SPLIT,
    frame_for,
    parts,
    require_suffix,
    rows_for,
    write_array,
    write_file,
    write_rows,
)
from vaefeat.errors import InputError, requiring
from vaefeat.observers import shown_activity

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vaefeat.input_spec import InputSpec

__all__ = ["app"]

app = typer.Typer()
#: Options of ``generate`` that not everything has a use for.
_FROM_A_ROW = ("around", "interpolation", "sweeps")
_USED_BY = {
    **dict.fromkeys(("data", "row", "split", "image_size"), _FROM_A_ROW),
    **dict.fromkeys(("to_row", "steps", "path"), ("interpolation",)),
    **dict.fromkeys(("number", "seed"), ("samples", "around")),
    "kind": ("samples",),
    "scale": ("around",),
    "side": ("manifold",),
    "latents": ("manifold", "sweeps"),
}


@app.command()
def generate(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help=BUNDLE)],
    out: Annotated[
        Path,
        typer.Option(help="The .png file to draw, or the .npy file of rows to write; of tables also .csv, .parquet."),
    ],
    what: Annotated[
        Literal["samples", "around", "interpolation", "manifold", "sweeps"],
        typer.Option(help="Samples, samples around a row, the way between two rows, the manifold, sweeps of latents."),
    ] = "samples",
    data: Annotated[Path | None, typer.Option(help=f"Rows to begin from. {DATA}")] = None,
    row: Annotated[int, typer.Option(help="Which row of the data to begin from.")] = 0,
    to_row: Annotated[int, typer.Option(help="Which row an interpolation ends at.")] = 1,
    number: Annotated[int, typer.Option("--number", "-n", help="How many samples.")] = 64,
    kind: Annotated[str, typer.Option(help="Of samples: mean or draw of p(x|z).")] = "mean",
    scale: Annotated[float, typer.Option(help="Factor on the posterior's noise around a row.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Rows of an interpolation.")] = 12,
    path: Annotated[str, typer.Option(help="Of an interpolation: linear or spherical.")] = "linear",
    side: Annotated[int, typer.Option(help="Rows along each side of the manifold.")] = 20,
    latents: Annotated[
        str | None, typer.Option(help="Such as 0,1: two for the manifold, or those to sweep; else the most telling.")
    ] = None,
    split: Annotated[Literal["train", "test"], typer.Option(help=SPLIT)] = "train",
    image_size: Annotated[int | None, typer.Option(help=IMAGE_SIZE)] = None,
    seed: Annotated[int, typer.Option(help=SEED)] = 0,
) -> None:
    """Make new rows, as a picture or an array file."""
    import numpy as np

    from vaefeat.bundle import load_bundle

    require_suffix(out, ".png", ".npy", ".csv", ".parquet")
    _refuse_unused(context, what)
    chosen = _numbers(latents)
    loaded = load_bundle(bundle)
    spec = loaded.manifest.input
    if out.suffix == ".png" and spec.kind != "image":
        raise InputError(f"got the picture {out} to draw of {spec}, which are no images; give a name that ends in .npy")
    numbers = {"samples": [], "manifold": [], "interpolation": [row, to_row]}.get(what, [row])
    begin = _chosen_rows(spec, data, numbers, what=what, split=split, image_size=image_size)
    with shown_activity("load torch and the rest"), requiring("train", what="generate"):
        from vaefeat import generation, inference, plots
    made: Any
    match what:
        case "samples":
            made = generation.sample(loaded, number, kind=kind, seed=seed)  # type: ignore[arg-type]  # it checks
            draw: Any = partial(plots.samples, made)
        case "around":
            made = generation.sample_around(loaded, begin[0], number, scale=scale, seed=seed)
            draw = partial(plots.neighbours, begin[0], inference.denoise(loaded, begin)[0], made)
        case "interpolation":
            made = generation.interpolate(loaded, *begin, steps=steps, path=path)  # type: ignore[arg-type]
            draw = partial(plots.interpolations, made[None])
        case "manifold":
            grid = generation.manifold(loaded, side=side, latents=chosen or (0, 1))  # type: ignore[arg-type]
            made, draw = grid.rows, partial(plots.manifold, grid)
        case "sweeps":
            lines = generation.sweep(loaded, begin[0], latents=chosen)
            made, draw = [made_row for line in lines for made_row in line.rows], partial(plots.sweeps, lines)
    if out.suffix == ".png":
        write_file(out, plots.png(draw(low=spec.low, high=spec.high)))
    else:
        write_rows(out, np.asarray(made), spec)
    Console().print(f"{out}: {what} of {loaded.name}", highlight=False, soft_wrap=True)


@app.command()
def score(
    bundle: Annotated[Path, typer.Argument(help=BUNDLE)],
    data: Annotated[Path, typer.Argument(help=DATA)],
    out: Annotated[Path, typer.Option(help="The .npy or .csv file to write.")],
    samples: Annotated[int, typer.Option(help="Of the bound; more are closer to the log-likelihood.")] = 64,
    split: Annotated[Literal["train", "test"], typer.Option(help=SPLIT)] = "train",
    image_size: Annotated[int | None, typer.Option(help=IMAGE_SIZE)] = None,
    seed: Annotated[int, typer.Option(help=SEED)] = 0,
) -> None:
    """Say how unusual each row is: minus its log-likelihood in nats; higher is more unusual."""
    import numpy as np

    from vaefeat.bundle import load_bundle

    require_suffix(out, ".npy", ".csv")
    loaded = load_bundle(bundle)
    rows = rows_for(loaded.manifest.input, data, split=split, image_size=image_size)
    with shown_activity("load torch and the rest"), requiring("train", what="score"):
        from vaefeat.inference import anomaly_scores
    # A row's score does not depend on its neighbours.
    scores = np.concatenate(
        [anomaly_scores(loaded, part, n_samples=samples, seed=seed) for part in parts(rows, "score")]
    )
    if out.suffix == ".npy":
        write_array(out, scores)
    else:
        lines = ["row,minus_log_likelihood_nats", *(f"{row},{value!r}" for row, value in enumerate(scores.tolist()))]
        write_file(out, ("\n".join(lines) + "\n").encode())
    most = ", ".join(f"{row} ({scores[row]:.1f})" for row in np.argsort(-scores, kind="stable")[:5])
    Console().print(
        f"{out}: {len(scores):,} rows, median {np.median(scores):.1f} nats; most unusual: {most}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def impute(
    bundle: Annotated[Path, typer.Argument(help=BUNDLE)],
    data: Annotated[Path, typer.Argument(help=f"NaN is missing in .npy and .npz. {DATA}")],
    out: Annotated[
        Path, typer.Option(help="The .npy file of completed rows to write; of a table also .csv or .parquet.")
    ],
    mask: Annotated[
        Path | None, typer.Option(help="A .npy file of bool, True where missing: for all rows, or one for every row.")
    ] = None,
    kind: Annotated[Literal["mean", "draw"], typer.Option(help="Fill with the posterior mean, or one draw.")] = "mean",
    corrected: Annotated[
        bool, typer.Option("--corrected", help="Exact in the limit (Metropolis within Gibbs).")
    ] = False,
    iterations: Annotated[int, typer.Option(help="Steps of each row's chain.")] = 500,
    split: Annotated[Literal["train", "test"], typer.Option(help=SPLIT)] = "train",
    image_size: Annotated[int | None, typer.Option(help=IMAGE_SIZE)] = None,
    seed: Annotated[int, typer.Option(help=SEED)] = 0,
) -> None:
    """Fill missing values with what the model expects; observed ones stay as they are."""
    from vaefeat.arrays import read_npy
    from vaefeat.bundle import load_bundle

    require_suffix(out, ".npy", ".csv", ".parquet")
    loaded = load_bundle(bundle)
    spec, given = loaded.manifest.input, None
    if spec.table is None:
        rows = _rows_with_holes(data, split=split, image_size=image_size)
    elif data.suffix.lower() != ".npy":
        given = frame_for(spec.table, data)
        rows = spec.prepare(given, holes=True)
    else:
        rows = rows_for(spec, data, split=split, image_size=image_size, holes=True)
    holes = None if mask is None else read_npy(mask)
    with shown_activity("load torch and the rest"), requiring("train", what="impute"):
        from vaefeat import inference
    filled = inference.impute(loaded, rows, missing=holes, corrected=corrected, n_iterations=iterations, seed=seed)
    made = filled.rows if kind == "mean" else filled.draws[-1]
    write_rows(out, made, spec, given=given, holes=filled.missing)
    accepted = f", {filled.acceptance:.0%} of the proposals accepted" if corrected else ""
    Console().print(
        f"{out}: {filled.missing.sum():,} missing values in {len(rows):,} rows filled{accepted}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def diagnose(
    bundle: Annotated[Path, typer.Argument(help=BUNDLE)],
    data: Annotated[Path, typer.Argument(help=f"Rows that it was not trained on, at best. {DATA}")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    max_rows: Annotated[int, typer.Option(help="Look at so many rows from the start.")] = 5000,
    split: Annotated[Literal["train", "test"], typer.Option(help=SPLIT)] = "train",
    image_size: Annotated[int | None, typer.Option(help=IMAGE_SIZE)] = None,
    seed: Annotated[int, typer.Option(help=SEED)] = 0,
) -> None:
    """Say what the latents carry: active units, KL by latent, mutual information, collapse and what to try."""
    from vaefeat.bundle import load_bundle

    loaded = load_bundle(bundle)
    loaded.refuse_decoding()
    spec = loaded.manifest.input
    rows = spec.prepare(rows_for(spec, data, split=split, image_size=image_size, max_rows=max_rows))
    with shown_activity("load torch and the rest"), requiring("train", what="diagnose"):
        from vaefeat.model import diagnostics
        from vaefeat.weights import restore_vae
    with shown_activity(f"diagnose {len(rows):,} rows"):
        found = diagnostics.diagnose(restore_vae(loaded), rows, seed=seed)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        return
    facts = {
        "rows": f"{found.n_rows:,}",
        "ELBO": _nats(found.elbo),
        "rate": f"{_nats(found.rate)} (KL divergence from the prior)",
        "distortion": f"{_nats(found.distortion)} (minus the log-likelihood)",
        "information": f"{_between(found.mutual_information)} (between rows and latents)",
        "aggregate KL": f"{_between(found.aggregate_kl)} (of all rows' posteriors together from the prior)",
        "active": f"{len(found.active)} of {found.latent_dim} latents vary",
        "informative": f"{len(found.informative)} of {found.n_units} units say something about rows",
        "collapse": found.collapse,
        "KL by unit": _largest(found.kl_per_unit),
    }
    for fact, value in facts.items():
        typer.echo(f"{fact:<14} {value}")
    typer.echo(found.advice)


def _nats(value: float | None) -> str:
    return "no density" if value is None else f"{value:.2f} nats per row"


def _between(bounds: tuple[float, float] | None) -> str:
    return "not known for this posterior" if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f} nats per row"


def _largest(values: tuple[float, ...] | None, *, most: int = 16) -> str:
    if values is None:
        return "no sum over units"
    order = sorted(range(len(values)), key=lambda unit: -values[unit])
    rest = f", and {len(values) - most} with less" if len(values) > most else ""
    return ", ".join(f"{unit}: {values[unit]:.2f}" for unit in order[:most]) + rest


def _refuse_unused(context: typer.Context, what: str) -> None:
    """Refuse options of `generate` that what is made has no use for, rather than ignore what somebody asked for."""
    for name, users in _USED_BY.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and what not in users:
            raise InputError(
                f"got --{name.replace('_', '-')} with --what {what}, which has no use for it; leave it out (it is for "
                f"{', '.join(users)})"
            )


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"got --latents {text}, wanted numbers with commas between them, such as 0,1") from error


def _chosen_rows(
    spec: InputSpec,
    data: Path | None,
    numbers: list[int],
    *,
    what: str,
    split: Literal["train", "test"],
    image_size: int | None,
) -> NDArray[Any]:
    """Read the rows that something begins from, (k, ...)."""
    import numpy as np

    if not numbers:
        return np.empty(0)
    if data is None:
        raise InputError(f"got --what {what} without --data, wanted the rows to begin from: --data PATH --row NUMBER")
    rows = rows_for(spec, data, split=split, image_size=image_size)
    for number in numbers:
        if not 0 <= number < len(rows):
            raise InputError(f"got row {number} of {data}, wanted a number from 0 to {len(rows) - 1}")
    return rows[numbers]


def _rows_with_holes(data: Path, *, split: Literal["train", "test"], image_size: int | None) -> NDArray[Any]:
    """Read rows as every verb does, but let NumPy's files hold NaN."""
    import numpy as np

    from vaefeat.arrays import as_rows, read_npy, read_npz
    from vaefeat.data import load_rows

    if data.suffix not in {".npy", ".npz"} or not data.is_file():
        return load_rows(data, split=split, image_size=image_size).array
    array = read_npy(data) if data.suffix == ".npy" else read_npz(data)[0]
    if array.dtype.kind != "f":
        return as_rows(array, what=str(data))
    # Shape and everything else are judged without the holes, which come back afterwards.
    holes = np.isnan(array)
    rows = as_rows(np.where(holes, 0, array), what=str(data))
    return np.where(holes.reshape(rows.shape), np.float32(np.nan), rows)
