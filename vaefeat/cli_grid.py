"""The verb that trains many models at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from vaefeat.cli_files import DATA, IMAGE_SIZE
from vaefeat.errors import ConfigError, requiring
from vaefeat.observers import shown_activity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vaefeat.grid import GridRun

__all__ = ["app"]

app = typer.Typer()
_TABLES = ("model", "train")


@app.command()
def grid(
    data: Annotated[Path, typer.Argument(help=DATA)],
    out: Annotated[Path, typer.Option(help="Folder that gets grid.json and a bundle for each model.")],
    over: Annotated[
        list[str],
        typer.Option(
            "--over",
            help="A setting and its values, such as model.latent_dim=8,16 or train.seed=0,1,2; may be repeated.",
        ),
    ],
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="model.KEY=VALUE or train.KEY=VALUE for all models; may be repeated."),
    ] = None,
    bundles: Annotated[
        Literal["all", "best", "none"], typer.Option(help="Of which models; each takes about a second to write.")
    ] = "all",
    models_at_once: Annotated[
        int | None, typer.Option(help="Models in one batched run; what 2 GiB hold when not given.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help=IMAGE_SIZE)] = None,
) -> None:
    """Train all combinations of latents, KL weights, seeds and rates side by side."""
    from vaefeat.config import ModelConfig, TrainConfig
    from vaefeat.data import load_rows
    from vaefeat.settings import unknown_name, with_overrides

    settings = with_overrides({"model": {}, "train": {}}, override or ())
    if unknown := sorted(settings.keys() - set(_TABLES)):
        raise unknown_name("--set table", unknown[0], _TABLES)
    model, train = ModelConfig.from_dict(settings["model"]), TrainConfig.from_dict(settings["train"])
    values = _values(over)
    with shown_activity("load torch and the rest"), requiring("train", what="Training"):
        from vaefeat.grid import best_run, pretrain_grid
    runs = pretrain_grid(
        load_rows(data, image_size=image_size),
        model=model,
        train=train,
        grid=values,
        out=out,
        bundles=bundles,
        models_at_once=models_at_once or "auto",
    )
    best = best_run(runs)
    console = Console()
    console.print(_table(runs, best))
    console.print(
        f"{out}: {len(runs)} models, {sum(run.path is not None for run in runs)} bundles; the highest held-out ELBO "
        f"has {best.name}",
        highlight=False,
        soft_wrap=True,
    )


def _values(over: Sequence[str]) -> dict[str, list[Any]]:
    """Read ``table.key=a,b`` texts."""
    from vaefeat.config import ModelConfig, TrainConfig
    from vaefeat.settings import unknown_name, with_overrides

    known = {
        f"{table}.{key}": key
        for table, config in (("model", ModelConfig()), ("train", TrainConfig()))
        for key in config.to_dict()
    }
    values: dict[str, list[Any]] = {}
    for text in over:
        path, equals, listed = text.partition("=")
        if not equals or not listed:
            raise ConfigError(f"got --over {text!r}, wanted key=value,value, for instance --over model.latent_dim=8,16")
        if path not in known:
            raise unknown_name("--over key", path, known)
        if known[path] in values:
            raise ConfigError(f"got --over {path} twice, wanted all its values in one: --over {path}=1,2,3")
        values[known[path]] = with_overrides({}, [f"values=[{listed}]"])["values"]
        if not isinstance(values[known[path]], list):
            raise ConfigError(f"got --over {text!r}, wanted numbers with commas between, such as {path}=1,2,3")
    return values


def _table(runs: Sequence[GridRun], best: GridRun) -> Table:
    table = Table(caption="nats per row, on held-out rows")
    for name in (*runs[0].settings, "ELBO", "log p(x|z)", "KL", "active", "epochs", "rows/s"):
        table.add_column(name, justify="right")
    for run in runs:
        shown = [str(value) for value in run.settings.values()]
        if run.failed is not None:
            table.add_row(*shown, "failed", style="red")
            continue
        figures = run.figures
        shown += [f"{figures[name]:.2f}" for name in ("elbo", "log_likelihood", "kl")]
        shown += [f"{figures['active_units']} of {run.model.latent_dim}", str(figures["epochs"])]
        table.add_row(*shown, f"{figures['rows_per_s']:,.0f}", style="bold" if run is best else None)
    return table
