"""How our transformers do among scikit-learn's: fitting, transforming, memory, and what the features are worth.

``python -m benchmarks.sklearn --data PATH`` fits PCA, KernelPCA, UMAP, pythae's VAE and ours to MNIST, each in a
process of its own that is pinned to ``--threads`` processors, and says how long that takes, how many rows a second
they transform, in how much memory, and the error of one classifier with 100 and 1,000 labels, those of
:mod:`benchmarks.few_labels`. It needs Linux. VAEFeatures is timed against bare calls of ONNX Runtime, too.
:mod:`benchmarks.sklearn_contenders` says what each is given. What is compiled at a first call is compiled before.

VAETransformer trains for ten minutes and leaves its bundle to VAEFeatures; ``--bundle`` names another one to open.
``--only pca`` (repeated) measures one, ``--results FILE`` lays it over what the file has. The last line is JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.processes import ask_module
from benchmarks.sklearn_contenders import CONTENDERS, Job
from benchmarks.surroundings import surroundings
from vaefeat.atomic import replace_file
from vaefeat.cli import run_command_line
from vaefeat.errors import InputError
from vaefeat.processors import available_cpus
from vaefeat.settings import unknown_name

__all__ = ["main", "ratios_of"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

#: A contender that takes longer hangs.
_LONGEST_S = 3 * 3600.0
_QUICK_SECONDS, _QUICK_DRAWS = 0.1, 2
_PACKAGES = {"umap": "umap-learn", "pythae": "pythae"}
_VERSIONS = ("scikit-learn", "numpy", "onnxruntime-gpu", "onnxruntime", *_PACKAGES.values())


@app.command()
def main(
    data: Annotated[Path | None, typer.Option(help="Folder with MNIST's IDX files in MNIST/.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Of VAEFeatures; VAETransformer's own when not given.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A contender; may be repeated. All when not given.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="Of every contender; 0 for all processors.")] = 1,
    draws: Annotated[int, typer.Option(min=1, help="Of labels.")] = 10,
    results: Annotated[Path | None, typer.Option(help="A JSON file that takes the figures in.")] = None,
    work: Annotated[Path, typer.Option(help="Folder of VAETransformer's bundle.")] = Path("runs/sklearn"),
    quick: Annotated[bool, typer.Option("--quick", help="Tiny networks on digits: figures mean nothing.")] = False,
) -> None:
    """Measure, print a table and one line of JSON."""
    for name in only or ():
        if name not in CONTENDERS:
            raise unknown_name("contender", name, CONTENDERS)
    # A bundle that is given takes the place of ten minutes of training.
    standard = [name for name in CONTENDERS if bundle is None or name != "vaetransformer"]
    chosen = [name for name in CONTENDERS if name in (only or standard)]
    if quick and results is not None:
        raise InputError("got --quick with --results, whose figures mean nothing; leave one of them out")
    if bundle is not None and "vaetransformer" in chosen:
        raise InputError("got --bundle with vaetransformer, which makes its own; leave one of them out")
    _refuse_missing(chosen)
    n_threads = min(threads or available_cpus(), available_cpus())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if quick else work
        opened = (bundle or folder / f"mnist-{n_threads}").resolve()
        if "vaefeatures" in chosen and "vaetransformer" not in chosen and not opened.is_dir():
            raise InputError(f"got no bundle in {opened} for vaefeatures; add --only vaetransformer, or give --bundle")
        job = Job(
            data=None if data is None else str(data.resolve()),
            bundle=str(opened),
            threads=n_threads,
            draws=_QUICK_DRAWS if quick else draws,
            quick=quick,
            **({"seconds": _QUICK_SECONDS} if quick else {}),
        )
        found = _measure(chosen, job, results)
    Console(width=150).print(_table(found))
    where = {**_surroundings(), "quick": quick}
    print(json.dumps({"ratios": ratios_of(found), **where, "contenders": found}))


def ratios_of(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Say how VAEFeatures.transform compares with bare calls; None where that was not measured.

    Parameters
    ----------
    found : mapping
        What contenders gave, by name and threads; the ratio is of the fewest threads.

    Returns
    -------
    dict
        ``transform_vs_onnxruntime`` for flat uint8 rows, as MNIST's are, and with ``_float32``, ``_float64`` or
        ``_images`` for the others.
    """
    measured = [one for name, one in found.items() if name.startswith("vaefeatures")]
    if not measured:
        return {"transform_vs_onnxruntime": None}
    runtime = min(measured, key=lambda one: int(one["threads"]))["runtime"]
    suffixes = {kind: "" if kind == "uint8" else f"_{kind}" for kind in runtime}
    return {f"transform_vs_onnxruntime{suffixes[kind]}": round(one["ratio"], 3) for kind, one in runtime.items()}


def _measure(chosen: list[str], job: Job, results: Path | None) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    if results is not None and results.is_file():
        found = json.loads(results.read_text())["contenders"]
    for name in chosen:
        print(f"{name} ...", file=sys.stderr, flush=True)
        # Of the code as it is when this one begins.
        where = _surroundings()
        arguments = [name, json.dumps(asdict(job))]
        one = ask_module(
            "benchmarks.sklearn_contenders", arguments, name=name, threads=job.threads, longest_s=_LONGEST_S
        )
        found[f"{name}, threads={job.threads}"] = {**one, **where}
        if results is not None:
            # After each: the next one may take long.
            content = {"ratios": ratios_of(found), "contenders": found}
            replace_file(results, (json.dumps(content, indent=1) + "\n").encode())
    return found


def _surroundings() -> dict[str, Any]:
    where = {**surroundings(), "load_average": os.getloadavg()[0]}
    where["versions"] |= {name: known for name in _VERSIONS if (known := _version(name))}
    return where


def _version(name: str) -> str | None:
    try:
        return version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _refuse_missing(chosen: list[str]) -> None:
    """Refuse what would fail in the middle of it."""
    for name in chosen:
        if name in _PACKAGES and importlib.util.find_spec(name) is None:
            raise InputError(
                f"got no package {_PACKAGES[name]} to measure against; `make test` installs it, or leave {name} out "
                "with --only"
            )


def _table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    budgets = sorted({budget for one in found.values() for budget in one["errors"]}, key=int)
    table.add_column("")
    columns = ("threads", "rows", "s to fit", "s of CPU", "rows/s", "MiB before", "after", "peak", "features")
    for column in (*columns, *(f"%, {budget} labels" for budget in budgets)):
        table.add_column(column, justify="right")
    for one in found.values():
        errors = [one["errors"].get(budget) for budget in budgets]
        table.add_row(
            one["title"],
            str(one["threads"]),
            # KernelPCA takes fewer.
            f"{one['settings'].get('rows', one['rows']):,}",
            f"{one['fit_seconds']:,.1f}",
            f"{one['fit_cpu_seconds']:,.1f}",
            f"{one['rows_per_s']:,.0f}",
            *(f"{one['memory_mib'][when]:,.0f}" for when in ("before", "after", "peak")),
            str(one["features"]),
            *("" if error is None else f"{error['mean']:.2f} ± {error['spread']:.2f}" for error in errors),
        )
    ratios = {kind: ratio for kind, ratio in ratios_of(found).items() if ratio is not None}
    table.caption = "±: standard deviation over draws" + "".join(f"; {kind} {ratio}" for kind, ratio in ratios.items())
    return table


if __name__ == "__main__":
    run_command_line(app)
