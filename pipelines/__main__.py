"""``python -m pipelines VERB``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from pipelines.config import RunConfig, load_config, with_workers
from pipelines.group import leads_group
from vaefeat.cli import run_command_line
from vaefeat.errors import InputError, requiring
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
    """Do all stages that are not done: pretrain, export, embed, check, evaluate, finetune if asked for, report.

    Rows without labels are not evaluated.
    """
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
def embed(
    config: Annotated[
        Path | None, typer.Argument(help="Do this stage of the job that a TOML file describes, and no more.")
    ] = None,
    override: Overrides = None,
    force: Force = False,
    dry_run: DryRun = False,
    bundle: Annotated[Path | None, typer.Option(help="Folder of a bundle.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Parquet, .npy, IDX, or images: a file or folder, s3://... or gs://...")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder of Parquet files to write, such as features.parquet.")] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", help="Of Parquet: the images, the lists of numbers, or numbers, repeated."),
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Unique; the row's number or the image's path otherwise.")
    ] = None,
    keep: Annotated[list[str] | None, typer.Option(help="A column that is carried along; may be repeated.")] = None,
    split: Annotated[Literal["train", "test"] | None, typer.Option(help="Only files of that name.")] = None,
    output: Annotated[str, typer.Option(help="mean, hidden, logvar, or probability of a classifier.")] = "mean",
    encoders: Annotated[int | None, typer.Option(min=1, help="As many as there is room for when not given.")] = None,
    gpus: Annotated[float | None, typer.Option(min=0.01, max=1, help="Share of a GPU for each encoder.")] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes GPUs where Ray has some.")
    ] = "auto",
    address: Annotated[str, typer.Option(help="local: a Ray of the job's own; else a cluster's, or auto.")] = "local",
    part_rows: Annotated[int | None, typer.Option(min=1, help="Rows of an output file, at most.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Embed a data set of any size into a folder of Parquet files; the same command goes on after a stop.

    Rows that cannot be read are left out, counted, and written to OUT/_quarantine with the reason.
    OUT/_manifest.json is written last: with it, the output is whole.

    With a TOML file instead: the features of a job's training and test rows, as its stage between export and check.
    """
    if config is not None:
        if bundle is not None or data is not None or out is not None:
            raise InputError(
                f"got {config} beside --bundle, --data or --out, wanted one of them: the file names all three"
            )
        _run_stage("embed", load_config(config, override or ()), force=force, dry_run=dry_run)
        return
    if bundle is None or data is None or out is None:
        missing = [name for name, value in {"--bundle": bundle, "--data": data, "--out": out}.items() if not value]
        raise InputError(
            f"got no {', '.join(missing)}; wanted --bundle, --data and --out to embed a data set, or a TOML file to do "
            "a stage of its job"
        )
    with shown_activity("load pyarrow"), requiring("jobs", what="This job"):
        from pipelines.embedding.job import EmbedOptions, summary
        from pipelines.embedding.job import embed as embed_job
        from pipelines.embedding.sources import Request

    done = embed_job(
        EmbedOptions(
            bundle=bundle,
            data=data,
            out=out,
            request=Request(split=split, columns=tuple(columns or ()), id_column=id_column, keep=tuple(keep or ())),
            output=output,
            encoders=encoders,
            gpus=gpus,
            device=device,
            address=address,
            part_rows=part_rows,
        )
    )
    typer.echo(json.dumps(done) if as_json else summary(done))


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
        list[Path] | None,
        typer.Option(help="A .csv or .parquet file of labels that there are (id, label); may be repeated."),
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
    config: Config,
    over: Annotated[
        list[str],
        typer.Option("--over", help="A setting and its values, such as model.latent_dim=8,16; may be repeated."),
    ],
    override: Overrides = None,
    trials: Annotated[int | None, typer.Option(help="So many combinations at random; all when not given.")] = None,
    side_by_side: Annotated[int, typer.Option(min=1, help="Trials at a time, which share the processors.")] = 2,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep finished trials, continue others, try failed ones again.")
    ] = False,
) -> None:
    """Train a model for each combination of settings with Ray Tune, and rank them by their error with few labels."""
    loaded = load_config(config, override or ())
    with shown_activity("load torch and the rest"), requiring("jobs", what="This job"):
        from pipelines.sweep import sweep as sweep_job

    sweep_job(loaded, over=over, trials=trials, side_by_side=side_by_side, resume=resume, console=Console())


@app.command()
def finetune(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(help="Do this stage of the job that a TOML file describes, and no more.")
    ] = None,
    override: Overrides = None,
    force: Force = False,
    dry_run: DryRun = False,
    bundle: Annotated[Path | None, typer.Option(help="Folder of a pretrained bundle.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="All rows: Parquet, .npy, .npz, IDX, images, or CSV of a table.")
    ] = None,
    labels: Annotated[
        list[Path] | None, typer.Option(help="A .csv or .parquet file with the labels there are; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the classifier, which python -m serving serves.")] = None,
    features: Annotated[
        Path | None, typer.Option(help="Of all rows, as embed writes them; encoded here when not given.")
    ] = None,
    test_labels: Annotated[
        Path | None, typer.Option(help="Labels of other rows of the data, to test what is shipped.")
    ] = None,
    id_name: Annotated[str, typer.Option("--id", help="Column of ids in the files of labels.")] = "id",
    label_name: Annotated[str, typer.Option("--label", help="Column of labels in them.")] = "label",
    id_column: Annotated[
        str | None, typer.Option(help="Of the data; the row's number or the image's path otherwise.")
    ] = None,
    split: Annotated[Literal["train", "test"], typer.Option(help="Which, where the data have splits.")] = "train",
    image_size: Annotated[int | None, typer.Option(help="Resize images to this height and width.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--try", help="logistic, knn, svc, few_label_head, finetune; may be repeated. All otherwise."),
    ] = None,
    draws: Annotated[int, typer.Option(help="How often labels are hidden, and every classifier is trained.")] = 5,
    max_steps: Annotated[int, typer.Option(help="Of fine-tuning.")] = 3000,
    name: Annotated[str | None, typer.Option(help="Of the classifier in the service.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same result.")] = 0,
) -> None:
    """Compare classifiers of the few labels, probes and the fine-tuned encoder, and ship the best as one ONNX file.

    With a TOML file instead: as a stage of its job, which the table finetune in it describes.
    """
    if config is not None:
        _refuse_beside_file(context)
        _run_stage("finetune", load_config(config, override or ()), force=force, dry_run=dry_run)
        return
    if bundle is None or data is None or not labels or out is None or override or force or dry_run:
        given = {"--bundle": bundle, "--data": data, "--labels": labels, "--out": out}
        missing = [name for name, value in given.items() if not value]
        raise InputError(
            f"got no {', '.join(missing) or 'TOML file'}; wanted --bundle, --data, --labels and --out to ship a "
            "classifier, or a TOML file (with --set, --force and --dry-run where needed) to do a stage of its job"
        )
    with shown_activity("load scikit-learn and the rest"), requiring("jobs", what="This job"):
        from pipelines.finetuning.job import FinetuneOptions
        from pipelines.finetuning.job import finetune as finetune_job

    options = FinetuneOptions(
        bundle=bundle,
        data=data,
        labels=tuple(labels),
        out=out,
        features=features,
        test_labels=test_labels,
        id_column=id_name,
        label_column=label_name,
        data_id_column=id_column,
        split=split,
        image_size=image_size,
        only=tuple(only or ()),
        n_draws=draws,
        max_steps=max_steps,
        name=name,
        seed=seed,
    )
    finetune_job(options, console=Console())


def _refuse_beside_file(context: typer.Context) -> None:
    """Refuse options of a verb that the table of its stage would have to give."""
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        if name not in {"config", "override", "force", "dry_run"}:
            raise InputError(
                f"got {parameter.opts[0]} beside {context.params['config']}, wanted it in the file's table "
                f"[{context.command.name}], or in --set {context.command.name}.KEY=VALUE; or no file, to do it without "
                "a job"
            )


if __name__ == "__main__":
    run_command_line(app, again="the same command, of a sweep with --resume")
