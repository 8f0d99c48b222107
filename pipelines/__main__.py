"""``python -m pipelines VERB``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vaefeat.cli import run_command_line
from vaefeat.errors import requiring
from vaefeat.observers import shown_activity

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Offline jobs of vaefeat."
)


@app.callback()
def jobs() -> None:
    """Offline jobs of vaefeat."""


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A TOML file, such as pipelines/configs/digits.toml.")],
    override: Annotated[
        list[str] | None, typer.Option("--set", help="table.key=value, over the file's; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted training.")] = False,
) -> None:
    """Pretrain, export, serve, embed over HTTP, classify with few labels, report."""
    from pipelines.config import load_config

    loaded = load_config(config, override or ())
    with shown_activity("load torch and the rest"), requiring("jobs", what="This job"):
        from pipelines.run import run as run_job

    run_job(loaded, console=Console(), resume=resume)


@app.command()
def pretrain(
    config: Annotated[Path, typer.Argument(help="A TOML file, such as pipelines/configs/digits.toml.")],
    override: Annotated[
        list[str] | None, typer.Option("--set", help="table.key=value, over the file's; may be repeated.")
    ] = None,
    workers: Annotated[
        str | None, typer.Option(help="Train in N processes of Ray, or in MIN:MAX, as many as there is room for.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted training.")] = False,
) -> None:
    """Pretrain on the configuration's rows, in one process or in many, and write the bundle.

    Also under torchrun: torchrun --nproc-per-node 2 -m pipelines pretrain CONFIG
    """
    from pipelines.config import load_config, with_workers
    from pipelines.group import leads_group

    loaded = with_workers(load_config(config, override or ()), workers)
    with shown_activity("load torch and the rest", shown=leads_group()), requiring("jobs", what="This job"):
        from pipelines.pretrain import pretrain as pretrain_job

    pretrain_job(loaded, console=Console(), resume=resume)


if __name__ == "__main__":
    run_command_line(app)
