"""``python -m pipelines VERB``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from pipelines.config import RunConfig, load_config, with_workers
from pipelines.group import leads_group
from vaefeat.cli import run_command_line
from vaefeat.errors import requiring
from vaefeat.observers import shown_activity

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Offline jobs of vaefeat."
)

Config = Annotated[Path, typer.Argument(help="A TOML file, such as pipelines/configs/digits.toml.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="table.key=value, over the file's; may be repeated.")
]
Workers = Annotated[
    str | None, typer.Option(help="Train in N processes of Ray, or in MIN:MAX, as many as there is room for.")
]
Force = Annotated[bool, typer.Option("--force", help="Do it again, even where nothing has changed.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and why, and change nothing.")]


@app.callback()
def jobs() -> None:
    """Offline jobs of vaefeat."""


@app.command()
def run(
    config: Config,
    override: Overrides = None,
    workers: Workers = None,
    force: Annotated[
        list[str] | None, typer.Option("--force", help="A stage to run again in any case; may be repeated.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Do all stages that are not done: pretrain, export, embed, check, evaluate, report."""
    loaded = with_workers(load_config(config, override or ()), workers)
    with shown_activity("load torch and the rest"), requiring("jobs", what="This job"):
        from pipelines.run import run as run_job
        from pipelines.run import show_plan

    if dry_run:
        show_plan(loaded, console=Console(), force=force or ())
    else:
        run_job(loaded, console=Console(), force=force or ())


@app.command()
def pretrain(
    config: Config, override: Overrides = None, workers: Workers = None, force: Force = False, dry_run: DryRun = False
) -> None:
    """Train the encoder on the configuration's rows, in one process or in many.

    Also under torchrun: torchrun --nproc-per-node 2 -m pipelines pretrain CONFIG
    """
    _run_stage("pretrain", with_workers(load_config(config, override or ()), workers), force=force, dry_run=dry_run)


@app.command()
def export(config: Config, override: Overrides = None, force: Force = False, dry_run: DryRun = False) -> None:
    """Write the bundle of a trained encoder."""
    _run_stage("export", load_config(config, override or ()), force=force, dry_run=dry_run)


@app.command()
def embed(config: Config, override: Overrides = None, force: Force = False, dry_run: DryRun = False) -> None:
    """Write the features of the configuration's training and test rows."""
    _run_stage("embed", load_config(config, override or ()), force=force, dry_run=dry_run)


@app.command()
def check(config: Config, override: Overrides = None, force: Force = False, dry_run: DryRun = False) -> None:
    """Serve the bundle, embed every row over HTTP, and prove that file, library and service agree."""
    _run_stage("check", load_config(config, override or ()), force=force, dry_run=dry_run)


@app.command()
def evaluate(config: Config, override: Overrides = None, force: Force = False, dry_run: DryRun = False) -> None:
    """Judge the features with few labels."""
    _run_stage("evaluate", load_config(config, override or ()), force=force, dry_run=dry_run)


@app.command()
def report(config: Config, override: Overrides = None, force: Force = False, dry_run: DryRun = False) -> None:
    """Draw and write the report."""
    _run_stage("report", load_config(config, override or ()), force=force, dry_run=dry_run)


def _run_stage(name: str, config: RunConfig, *, force: bool, dry_run: bool) -> None:
    with shown_activity("load torch and the rest", shown=leads_group()), requiring("jobs", what="This job"):
        from pipelines.run import run_stage, show_plan

    if dry_run:
        show_plan(config, console=Console(), force=[name] if force else (), only=name)
    else:
        run_stage(name, config, console=Console(), force=force)


@app.command()
def suggest(
    bundle: Annotated[Path, typer.Option(help="Folder of a bundle.")],
    data: Annotated[Path, typer.Option(help="Rows without labels: Parquet, .npy, .npz, IDX or images.")],
    budget: Annotated[int, typer.Option(help="Rows to suggest.")],
    out: Annotated[Path, typer.Option(help="Folder that gets the pictures and the CSV file to fill in.")],
    labels: Annotated[
        list[Path] | None, typer.Option(help="A CSV file of labels that there are (id, label); may be repeated.")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Of Parquet; the row's number or the image's path otherwise.")
    ] = None,
    split: Annotated[Literal["train", "test"], typer.Option(help="Which, where the data have splits.")] = "train",
    image_size: Annotated[int | None, typer.Option(help="Resize images to this height and width.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same rows.")] = 0,
) -> None:
    """Choose the rows whose labels would say most, and write them as pictures and as a CSV file to fill in."""
    with shown_activity("load scikit-learn and the rest"), requiring("jobs", what="This job"):
        from pipelines.suggest import SuggestOptions
        from pipelines.suggest import suggest as suggest_job

    options = SuggestOptions(
        bundle=bundle,
        data=data,
        out=out,
        budget=budget,
        labels=tuple(labels or ()),
        id_column=id_column,
        split=split,
        image_size=image_size,
        seed=seed,
    )
    suggest_job(options, console=Console())


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(help="A TOML file, such as pipelines/configs/digits.toml.")],
    over: Annotated[
        list[str],
        typer.Option("--over", help="A setting and its values, such as model.latent_dim=8,16; may be repeated."),
    ],
    override: Annotated[
        list[str] | None, typer.Option("--set", help="table.key=value, over the file's; may be repeated.")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="So many combinations at random; all when not given.")] = None,
    side_by_side: Annotated[int, typer.Option(min=1, help="Trials at a time, which share the processors.")] = 2,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep finished trials, continue others, try failed ones again.")
    ] = False,
) -> None:
    """Train a model for each combination of settings with Ray Tune, and rank them by their error with few labels."""
    from pipelines.config import load_config

    loaded = load_config(config, override or ())
    with shown_activity("load torch and the rest"), requiring("jobs", what="This job"):
        from pipelines.sweep import sweep as sweep_job

    sweep_job(loaded, over=over, trials=trials, side_by_side=side_by_side, resume=resume, console=Console())


if __name__ == "__main__":
    run_command_line(app, again="the same command; a sweep with --resume")
