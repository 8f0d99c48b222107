"""The job from its options to its manifest: look, plan, go on from what is done, embed, say that it is whole."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from pipelines.embedding.encoding import PartEncoder
from pipelines.embedding.ids import refuse_doubtful_ids
from pipelines.embedding.output import JOB_FILE, LOG_FILE, Output, Receipt
from pipelines.embedding.parts import Part, Plan, plan_parts
from pipelines.embedding.sources import Request, Source, open_source
from pipelines.embedding.storage import Place
from pipelines.folder_lock import working_in
from pipelines.ray_environment import prepare_environment
from vaefeat.bundle import Bundle, load_bundle
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import InputError
from vaefeat.interruption import stop_on_signals
from vaefeat.observers import shown_activity

__all__ = ["EmbedOptions", "embed", "summary"]


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """What the job is to do.

    Parameters
    ----------
    bundle : Path
    data, out : str
        Paths or addresses of :class:`~pipelines.embedding.storage.Place`.
    request : Request
        Of the data, what to read.
    output : str
        Of the encoder's outputs.
    encoders : int, optional
    gpus : float, optional
        Share of a GPU for each encoder.
    device : {"auto", "cpu", "cuda"}
    address : str
        ``local`` for a Ray of the job's own, else a cluster's.
    part_rows : int, optional
        Rows of a part, at most.
    """

    bundle: Path
    data: str
    out: str
    request: Request
    output: str = "mean"
    encoders: int | None = None
    gpus: float | None = None
    device: str = "auto"
    address: str = "local"
    part_rows: int | None = None


def embed(options: EmbedOptions) -> dict[str, Any]:
    """Embed a data set; progress is shown on standard error.

    Parameters
    ----------
    options : EmbedOptions

    Returns
    -------
    dict
        What was done, as plain values.

    Raises
    ------
    VaefeatError
        The data, the bundle and the output do not go together, or something failed on the way; what is finished is
        kept, and the same call goes on from there.
    """
    began = time.perf_counter()
    bundle = load_bundle(options.bundle)
    encoder = OnnxEncoder(bundle, device="cpu", threads=1)
    if options.output not in encoder.outputs:
        raise InputError(f"got --output {options.output}, wanted one of {', '.join(sorted(encoder.outputs))}")
    with shown_activity(f"look at {options.data}"):
        source = open_source(Place(options.data), encoder.input, options.request)
        plan = plan_parts(source, encoder.input, width=encoder.outputs[options.output], part_rows=options.part_rows)
    output = Output(Place(options.out), _identity(bundle, source, plan, options))
    _refuse_misfit(encoder, source, plan, output, options.output)
    if not output.begun:
        with shown_activity("look for ids that come twice"):
            refuse_doubtful_ids(source)
    done = output.begin(len(plan.parts))
    finished = {receipt.index for receipt in done}
    left = [part for part in plan.parts if part.index not in finished]
    receipts, embedding_s = list(done), 0.0
    with _alone_in(output.place):
        if left:
            what = (bundle, source, plan, output)
            embedding_s = _embed(left, what, options, receipts=receipts)
        manifest = output.finish(receipts, n_parts=len(plan.parts), n_rows=plan.n_rows)
    worst = max(receipts, key=lambda receipt: receipt.n_quarantined)
    return {
        "out": str(output.place),
        "rows": manifest["rows_embedded"],
        "quarantined": manifest["rows_quarantined"],
        "quarantine_reason": output.commonest_reason(worst.index) if worst.n_quarantined else None,
        "features": encoder.outputs[options.output],
        "parts": len(plan.parts),
        "parts_done_before": len(done),
        "seconds": round(time.perf_counter() - began, 3),
        "embedding_s": round(embedding_s, 3),
        "rows_per_s": round(sum(part.n_rows for part in left) / embedding_s, 1) if left else None,
        "digest": bundle.digest,
    }


def _alone_in(place: Place) -> AbstractContextManager[None]:
    """Keep a folder of this machine to one job; two in a bucket do the same twice, and lose nothing."""
    return nullcontext() if place.local is None else working_in(place.local, lock=JOB_FILE)


def summary(done: dict[str, Any]) -> str:
    """Say in a line what :func:`embed` gives."""
    aside = (
        f", {done['quarantined']:,} unreadable rows in _quarantine (in the part with most of them mainly: "
        f"{done['quarantine_reason']})"
        if done["quarantined"]
        else ""
    )
    before = (
        f", {done['parts_done_before']} of {done['parts']} parts were done before" if done["parts_done_before"] else ""
    )
    rate = f", {done['rows_per_s']:,.0f} rows/s" if done["rows_per_s"] else ""
    return f"{done['out']}: {done['rows']:,} rows of {done['features']} features{aside}{before}{rate}, {done['digest']}"


def _identity(bundle: Bundle, source: Source, plan: Plan, options: EmbedOptions) -> dict[str, Any]:
    """Give what decides about the output: a job that differs in any of it is another job."""
    return {
        "bundle": bundle.digest,
        "name": bundle.name,
        "output": options.output,
        "width": bundle.manifest.outputs[options.output],
        "kind": source.kind,
        "columns": None if source.columns is None else asdict(source.columns),
        "input": source.fingerprint(),
        "rows": plan.n_rows,
        "parts": len(plan.parts),
        "part_rows": options.part_rows,
    }


def _refuse_misfit(encoder: OnnxEncoder, source: Source, plan: Plan, output: Output, name: str) -> None:
    """Try some rows here, before anything is started or written."""
    PartEncoder(encoder, source=source, headers=plan.headers, output=name, metadata=output.metadata).try_first(
        plan.parts[0]
    )


def _embed(
    left: list[Part],
    what: tuple[Bundle, Source, Plan, Output],
    options: EmbedOptions,
    *,
    receipts: list[Receipt],
) -> float:
    """Embed what is left on Ray, add what becomes of it to the receipts, and give the seconds that encoders took."""
    bundle, source, plan, output = what
    prepare_environment(options.address)
    from pipelines.embedding.workers import Job, embed_parts, find_room
    from pipelines.ray_session import aside, ray_errors_told_plainly, running_ray

    # Beside an output that is not on this machine there is no place for a log, and Ray's own folder has one.
    log = Path(os.devnull) if output.place.local is None else output.place.local / LOG_FILE
    with ray_errors_told_plainly(), aside(log) as people, running_ray(options.address):
        console = Console(file=people)
        encoders = find_room(encoders=options.encoders, gpus=options.gpus, device=options.device)
        # Encoders are told of their part alone what is in it.
        slim = replace(source, files=(), groups=())
        job = Job(bundle=bundle, source=slim, headers=plan.headers, output=output, name=options.output)
        with stop_on_signals() as stop, _progress(plan, receipts, console) as told:
            try:
                return embed_parts(left, job, encoders, stop=stop, told=told)
            except KeyboardInterrupt:
                console.print(
                    f"{len(receipts)} of {len(plan.parts)} parts are done; the same command goes on",
                    highlight=False,
                    soft_wrap=True,
                )
                raise


@contextmanager
def _progress(plan: Plan, receipts: list[Receipt], console: Console) -> Iterator[Callable[[Receipt], None]]:
    """Show rows, on a terminal, and collect receipts."""
    columns = (
        TextColumn("embed"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} rows"),
        TaskProgressColumn(show_speed=True),
        TimeRemainingColumn(),
        TextColumn("{task.fields[aside]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("embed", total=plan.n_rows, aside="")

        def show() -> None:
            n_bad = sum(one.n_quarantined for one in receipts)
            n_rows = n_bad + sum(one.n_rows for one in receipts)
            progress.update(task, completed=n_rows, aside=f"{n_bad:,} unreadable" if n_bad else "")

        def told(receipt: Receipt) -> None:
            receipts.append(receipt)
            show()

        show()
        yield told
