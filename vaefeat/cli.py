"""``vaefeat VERB``: what the library does, from a shell.

Each verb imports what it needs when it runs, so that ``vaefeat --help`` and ``vaefeat inspect`` are quick.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from vaefeat import cli_grid, cli_inference
from vaefeat.cli_files import BUNDLE, DATA, IMAGE_SIZE, SEED, SPLIT, parts, require_suffix, rows_for, write_array
from vaefeat.errors import InputError, TrainingInterrupted, VaefeatError, requiring
from vaefeat.observers import shown_activity

if TYPE_CHECKING:
    from vaefeat.blocks import Blocks
    from vaefeat.bundle import Manifest
    from vaefeat.data import Rows
    from vaefeat.encoder import OnnxEncoder
    from vaefeat.remote import RemoteEncoder

__all__ = ["main", "run_command_line"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Pretrain a variational auto-encoder on unlabelled rows and use its posterior mean as features.",
)
app.add_typer(cli_inference.app)
app.add_typer(cli_grid.app)


@app.command()
def pretrain(
    data: Annotated[Path, typer.Argument(help=DATA)],
    out: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    name: Annotated[str | None, typer.Option(help="Name of the encoder; the folder's when not given.")] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="model.KEY=VALUE or train.KEY=VALUE, such as train.max_epochs=5; may be repeated."),
    ] = None,
    preset: Annotated[
        Literal["features", "textbook"],
        typer.Option(help="A mean for few labels, or the plain variational auto-encoder."),
    ] = "features",
    effort: Annotated[
        Literal["fast", "best"], typer.Option(help="For a first look, or for the model that stays.")
    ] = "fast",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted training.")] = False,
    image_size: Annotated[int | None, typer.Option(help=IMAGE_SIZE)] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--in-memory", help="Read rows while training, or all of them before; by default by their size."
        ),
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Take text columns of Parquet for categories, and nulls for missing.")
    ] = False,
    categorical: Annotated[
        list[str] | None, typer.Option(help="A column of a table that numbers categories; may be repeated.")
    ] = None,
    handle_unknown: Annotated[
        Literal["error", "ignore"], typer.Option(help="Of categories that a table in training has not.")
    ] = "error",
) -> None:
    """Train on rows without labels and write a bundle."""
    from vaefeat.presets import refuse_changes
    from vaefeat.settings import unknown_name, with_overrides

    settings = with_overrides({"model": {}, "train": {}}, override or ())
    if unknown := sorted(settings.keys() - {"model", "train"}):
        raise unknown_name("--set table", unknown[0], ("model", "train"))
    refuse_changes(**settings, preset=preset)
    if resume and stream is None:
        # Not by the memory that is free today: rows that are streamed come in another order.
        stream = _was_streamed(out)
    rows: Rows | Blocks
    if table or categorical or data.suffix.lower() == ".csv":
        rows = _table(data, categorical=categorical, handle_unknown=handle_unknown, stream=stream)
    else:
        rows = _rows(data, image_size=image_size, stream=stream)
    with shown_activity("load torch and the rest"), requiring("train", what="Training"):
        from vaefeat.pretraining import pretrain as train_and_export
    bundle = train_and_export(rows, preset=preset, effort=effort, **settings, out=out, name=name, resume=resume)
    metrics = bundle.manifest.metrics
    Console().print(
        f"{out}: held-out ELBO {metrics['elbo']:.2f} nats per row, {len(bundle.manifest.active_units)} of "
        f"{bundle.manifest.latent_dim} latent units active, {bundle.digest}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help=BUNDLE)],
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole manifest as JSON.")] = False,
) -> None:
    """Verify a bundle's hashes and say what it is."""
    from vaefeat.bundle import load_bundle

    loaded = load_bundle(bundle)
    manifest = loaded.manifest
    if as_json:
        typer.echo(json.dumps({"digest": loaded.digest, **manifest.to_dict(), "files": loaded.files}, indent=2))
        return
    facts = {
        "name": manifest.name,
        "digest": loaded.digest,
        "input": str(manifest.input),
        "outputs": ", ".join(f"{name} ({width})" for name, width in manifest.outputs.items()),
        **_pipeline_facts(manifest),
        "arithmetic": manifest.precision,
        "active units": f"{len(manifest.active_units)} of {manifest.latent_dim}",
        "held-out ELBO": f"{manifest.metrics['elbo']:.2f} nats per row after {manifest.metrics['epochs']} epochs",
        "trained on": f"{manifest.data['n_rows']:,} rows, {manifest.data['fingerprint']}",
        "files": ", ".join(f"{name} ({entry['bytes']:,} bytes)" for name, entry in loaded.files.items()),
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    for fact, value in facts.items():
        typer.echo(f"{fact:<14} {value}")


def _pipeline_facts(manifest: Manifest) -> dict[str, str]:
    if manifest.pipeline is None:
        return {}
    encoder, parity = manifest.pipeline["encoder"], manifest.pipeline["parity"]
    difference = parity["outputs"]["probabilities"]["max_abs_difference"]
    return {
        "classes": ", ".join(map(str, manifest.classes)),
        "encoder": f"{encoder['output']} of {encoder['name']}, {encoder['digest']}",
        "steps": ", ".join(step["class"] for step in manifest.pipeline["steps"]) or "none",
        "parity": f"probabilities within {difference:.2g} of scikit-learn's on {parity['n_rows']:,} rows",
    }


@app.command()
def embed(
    encoder: Annotated[str, typer.Argument(help="Folder of a bundle, or the address of a service.")],
    data: Annotated[Path, typer.Argument(help=DATA)],
    out: Annotated[Path, typer.Argument(help="The .npy file to write.")],
    output: Annotated[str, typer.Option(help="mean, hidden or logvar.")] = "mean",
    split: Annotated[Literal["train", "test"], typer.Option(help=SPLIT)] = "train",
    image_size: Annotated[int | None, typer.Option(help=IMAGE_SIZE)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; for a bundle.")] = "auto",
    model: Annotated[str | None, typer.Option(help="Which model of a service that has several.")] = None,
) -> None:
    """Turn rows into features, as an array file (n, d) of float32."""
    import numpy as np

    require_suffix(out, ".npy")
    opened = _encoder(encoder, device=device, model=model)
    rows = rows_for(opened.input, data, split=split, image_size=image_size)
    features = np.concatenate([opened.embed(part, output=output) for part in parts(rows, "embed")])
    write_array(out, features)
    Console().print(f"{out}: {features.shape[0]:,} rows of {features.shape[1]} features", highlight=False)


@app.command()
def quantize(
    bundle: Annotated[Path, typer.Argument(help=BUNDLE)],
    out: Annotated[Path, typer.Argument(help="Folder of the new bundle.")],
    data: Annotated[Path, typer.Option(help=f"Rows to set scales with and to judge by. {DATA}")],
    to: Annotated[Literal["int8", "float16"], typer.Option(help="For processors, or for GPUs.")] = "int8",
    difference: Annotated[
        float,
        typer.Option(help="Largest difference of a latent, in its standard deviations, root mean square.", min=0.0),
    ] = 0.1,
    error: Annotated[
        float, typer.Option(help="Largest rise of a classifier's error, in points; where the rows have labels.")
    ] = 0.5,
    probability: Annotated[
        float, typer.Option(help="Largest difference of a class's probability in any row; of classifiers.", min=0.0)
    ] = 0.2,
    name: Annotated[
        str | None, typer.Option(help="Name of the new encoder; NAME-int8 or NAME-float16 when not given.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help=IMAGE_SIZE)] = None,
) -> None:
    """Make a bundle that computes in fewer bits, if its features stay good enough."""
    from vaefeat.bundle import load_bundle
    from vaefeat.data import load_rows
    from vaefeat.quantization import QuantizationGate, quantize

    if out.resolve() == bundle.resolve():
        raise InputError(f"got {out} for the new bundle, which is the old one's folder; choose another")
    loaded = load_bundle(bundle)
    if loaded.manifest.input.table is not None:
        raise InputError(
            f"got bundle {loaded.name!r} of {loaded.manifest.input.table}: only rows of numbers are quantized"
        )
    rows = load_rows(data, image_size=image_size)
    gate = QuantizationGate(difference=difference, error=error, probability=probability)
    with shown_activity("quantize, and compare with float32"):
        made = quantize(loaded, rows.array, to=to, labels=rows.labels, name=name, gate=gate).save(out)
    found = made.manifest.parity["quantization"]
    judged = ""
    if "error" in found:
        judged = f", error with 10 labels a class {found['error']:.2f} -> {found[f'error_{to}']:.2f} %"
    if "probability_difference" in found:
        judged += f", a class's probability by {found['probability_difference']:.3f} at most"
    Console().print(
        f"{out}: the worst latent differs by {found['difference']:.3f} standard deviations on {found['n_rows']:,} rows"
        f"{judged}, {made.digest}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def reference(
    bundle: Annotated[Path, typer.Argument(help=BUNDLE)],
    data: Annotated[Path, typer.Argument(help=f"Rows that it was not trained on. {DATA}")],
    out: Annotated[Path, typer.Argument(help="Folder of the bundle with the reference.")],
    split: Annotated[Literal["train", "test"], typer.Option(help=SPLIT)] = "train",
    image_size: Annotated[int | None, typer.Option(help=IMAGE_SIZE)] = None,
    max_rows: Annotated[int, typer.Option(help="Most rows that are looked at.", min=1)] = 2048,
    seed: Annotated[int, typer.Option(help=SEED)] = 0,
) -> None:
    """Add rows with their features, by which a service proves that it computes the same, to a bundle without them."""
    from vaefeat.bundle import load_bundle
    from vaefeat.reference import load_reference, with_reference

    loaded = load_bundle(bundle)
    rows = rows_for(loaded.manifest.input, data, split=split, image_size=image_size, max_rows=max_rows)
    with shown_activity(f"compute the features of {len(rows):,} rows"):
        made = with_reference(loaded, rows, seed=seed)
    found = load_reference(made.save(out))
    assert found is not None  # it has just been written
    Console().print(f"{out}: a reference of {len(found.rows)} rows, {made.digest}", highlight=False, soft_wrap=True)


@app.command()
def doctor(
    seconds: Annotated[float, typer.Option(help="Of measuring; compiling comes on top.", min=1.0)] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Say what this machine can do for training, measured, and what to change."""
    from dataclasses import asdict

    from rich.table import Table

    with shown_activity("load torch and the rest"), requiring("train", what="doctor"):
        from vaefeat.doctor import examine
    with shown_activity("measure"):
        found = examine(seconds=seconds)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    for fact, value in found.facts.items():
        typer.echo(f"{fact:<20} {value}")
    table = Table("training step, 28 x 28, batch 128", "computed in", "rows/s", box=None, pad_edge=False)
    table.columns[2].justify = "right"
    for rate in found.measured:
        table.add_row(rate.model, rate.how, f"{rate.rows_per_s:,.0f}")
    console = Console(soft_wrap=True)
    console.print()
    console.print(table)
    console.print("\nwhat to change")
    for line in found.advice:
        console.print(f"- {line}", highlight=False)


def _table(
    data: Path, *, categorical: list[str] | None, handle_unknown: Literal["error", "ignore"], stream: bool | None
) -> Rows:
    from vaefeat.data import load_rows

    if stream:
        raise InputError(f"got --stream for {data}, a table, whose columns are fitted to all of it; leave it out")
    return load_rows(data, table=True, categorical=categorical, handle_unknown=handle_unknown)


def _rows(data: Path, *, image_size: int | None, stream: bool | None) -> Rows | Blocks:
    """Read rows, or only open them where they would take more than half of the memory."""
    from vaefeat.blocks import open_blocks
    from vaefeat.data import load_rows
    from vaefeat.processors import available_memory

    if stream:
        return open_blocks(data, image_size=image_size)
    free = available_memory()
    if stream is None and free is not None:
        try:
            blocks = open_blocks(data, image_size=image_size)
        except VaefeatError:
            pass  # what cannot be read in pieces; load_rows says better what else is wrong
        else:
            n_bytes = len(blocks) * math.prod(blocks.row_shape) * blocks.dtype.itemsize
            if n_bytes > free / 2:
                Console(stderr=True).print(
                    f"{data}: {len(blocks):,} rows of {n_bytes / 2**30:.1f} GiB are read while training "
                    f"(--stream): {free / 2**30:.1f} GiB of memory are free",
                    style="dim",
                    highlight=False,
                )
                return blocks
    return load_rows(data, image_size=image_size)


def _was_streamed(out: Path) -> bool | None:
    """Tell from a checkpoint how the run before got its rows; None where there is none."""
    with requiring("train", what="Training"):
        from vaefeat.checkpoint import read_checkpoint
        from vaefeat.pretraining import CHECKPOINT_FILE, TRAINING_FOLDER
    path = out / TRAINING_FOLDER / CHECKPOINT_FILE
    return "order" in read_checkpoint(path)[1]["identity"].get("data", {}) if path.is_file() else None


def _encoder(address: str, *, device: str, model: str | None) -> OnnxEncoder | RemoteEncoder:
    if address.startswith(("http://", "https://")):
        from vaefeat.remote import RemoteEncoder

        if device != "auto":
            raise InputError(f"got --device {device} for a service, which decides that itself; leave it out")
        return RemoteEncoder(address, model=model)
    if model is not None:
        raise InputError(f"got --model {model} for a bundle, which holds one model; leave it out")
    from vaefeat.encoder import OnnxEncoder

    return OnnxEncoder(address, device=device)


def run_command_line(commands: typer.Typer, *, again: str = "the same command with --resume") -> None:
    """Run a verb; an error of ours is one line on standard error and a status that is not zero.

    Parameters
    ----------
    commands : typer.Typer
    again : str
        What goes on with a training that was interrupted.
    """
    console = Console(stderr=True, soft_wrap=True)
    try:
        commands()
    except TrainingInterrupted as stop:
        told = _as_typed(stop, again)
        console.print(told if again in told else f"{told} ({again})", style="yellow", highlight=False, markup=False)
        raise SystemExit(130) from None
    except VaefeatError as error:
        console.print(f"error: {_as_typed(error, again)}", style="red", highlight=False, markup=False)
        raise SystemExit(2) from None
    except OSError as error:
        # What no room foresaw of the disk and the network: a folder that vanished, a disk that filled.
        where = f": {error.filename}" if error.filename else ""
        console.print(f"error: {error.strerror or error}{where}", style="red", highlight=False, markup=False)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        console.print("interrupted", style="yellow")
        raise SystemExit(130) from None


def _as_typed(error: VaefeatError, again: str) -> str:
    """Say in words of the command line what the library says in Python's."""
    return str(error).replace("resume=True", again)


def main() -> None:
    """Run ``vaefeat``."""
    run_command_line(app)
