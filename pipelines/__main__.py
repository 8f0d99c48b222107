"""``python -m pipelines VERB``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vaefeat.errors import TrainingInterrupted, VaefeatError

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
    from pipelines.run import run as run_job

    run_job(load_config(config, override or ()), console=Console(), resume=resume)


def main() -> None:
    """Run a verb; an error of ours is one line on standard error and a status that is not zero."""
    console = Console(stderr=True, soft_wrap=True)
    try:
        app()
    except TrainingInterrupted as stop:
        console.print(f"{stop} (the same command with --resume)", style="yellow", highlight=False, markup=False)
        raise SystemExit(130) from None
    except VaefeatError as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        console.print("interrupted", style="yellow")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
