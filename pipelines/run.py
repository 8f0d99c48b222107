"""The stages of a job in their order, run together or one at a time."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.config import RunConfig
from pipelines.environment import write_description
from pipelines.evaluate import EVALUATE, METRICS_FILE
from pipelines.features import CHECK, CHECK_FILE, EMBED
from pipelines.finetuning.stage import CLASSIFIER_FOLDER, FINETUNE, refuse_unlearnable
from pipelines.folder_lock import at_work_in, working_in
from pipelines.group import in_group, leads_group
from pipelines.job import Job
from pipelines.pretrain import EXPORT, PRETRAIN
from pipelines.probes import HEADS
from pipelines.report import REPORT, REPORT_FILE
from pipelines.stages import RECORDS_FOLDER, Record, Stage, named, plan, run_one, run_stages
from pipelines.tracking import TRACK, refuse_untrackable
from vaefeat.errors import InputError

__all__ = ["STAGES", "run", "run_stage", "show_plan", "stages_of"]

#: In the order that they run in. A stage is declared where its work is.
STAGES = (PRETRAIN, EXPORT, EMBED, CHECK, EVALUATE, FINETUNE, REPORT, TRACK)
_LOCK_FILE = f"{RECORDS_FOLDER}/lock"


def stages_of(job: Job) -> tuple[Stage, ...]:
    """Give the stages that a job's configuration asks for and its rows have labels for."""
    left_out = {
        EVALUATE.name: not job.is_labelled,
        FINETUNE.name: not job.config.finetune.files,
        TRACK.name: not job.config.track.mlflow,
    }
    # Stages read what those before them write, as far as there are such.
    unwritten = {name for stage in STAGES if left_out.get(stage.name) for name in stage.writes}
    asked = [
        replace(stage, reads=tuple(name for name in stage.reads if name not in unwritten))
        for stage in STAGES
        if not left_out.get(stage.name)
    ]
    if not job.is_labelled:
        place = [stage.name for stage in asked].index(REPORT.name)
        asked[place] = replace(asked[place], outside=FINETUNE.outside)  # labels of files colour its map
    return tuple(asked)


def run(config: RunConfig, *, console: Console, force: Collection[str] = ()) -> None:
    """Do the whole job, as far as it is not done, and print what came out.

    Parameters
    ----------
    config : RunConfig
    console : Console
        Where the table goes; progress goes to standard error.
    force : collection of str
        Stages to run in any case.

    Raises
    ------
    VaefeatError
        Whatever a stage raises.
    """
    if in_group():
        raise InputError("got a whole run under torchrun, wanted the stage 'pretrain' alone; run the rest by itself")
    job = Job(config)
    stages = stages_of(job)
    for name in force:
        _refuse_unasked(name, job)
        named(stages, name)
    refuse_untrackable(config)
    _refuse_unusable(job)
    refuse_unlearnable(job)
    with working_in(job.folder, lock=_LOCK_FILE):
        if any(verdict.due for verdict in plan(stages, job, force=force)):
            write_description(config, job.folder)
        run_stages(stages, job, force=force, tell=_tell)
    _print(console, job)


def run_stage(name: str, config: RunConfig, *, console: Console, force: bool = False) -> None:
    """Do one stage of a job, as far as it is not done.

    Raises
    ------
    InputError
        A stage before it has to run first.
    VaefeatError
        Whatever the stage raises.
    """
    job = Job(config)
    stages = stages_of(job)
    if in_group() and name != PRETRAIN.name:
        raise InputError(f"got the stage {name!r} under torchrun, wanted 'pretrain'; run this one by itself")
    if force and in_group():
        raise InputError("got --force under torchrun, whose processes may start many times; remove the folder instead")
    _refuse_unasked(name, job)
    if name == FINETUNE.name:
        refuse_unlearnable(job)
    if not leads_group():
        # Records are the first process's; this one does its part if there is something to do.
        if plan([stage := named(stages, name)], job)[0].due:
            stage.work(job, "")
        return
    with working_in(job.folder, lock=_LOCK_FILE):
        if plan([named(stages, name)], job, force=[name] if force else ())[0].due:
            write_description(config, job.folder)
        run_one(stages, name, job, force=force, tell=_tell)
    record = Record.read(job, name)
    assert record is not None  # it has been written, or was there
    console.print(f"{config.out}: {record.summary}", highlight=False, soft_wrap=True)


def show_plan(config: RunConfig, *, console: Console, force: Collection[str] = (), only: str | None = None) -> None:
    """Print what a run would do and why, and change nothing.

    Parameters
    ----------
    config : RunConfig
    console : Console
    force : collection of str
        Stages to run in any case.
    only : str, optional
        The one stage that would run; all when None.
    """
    job = Job(config)
    stages = stages_of(job)
    for name in force if only is None else (only, *force):
        _refuse_unasked(name, job)
        named(stages, name)
    refuse_untrackable(config)
    if only is None:
        _refuse_unusable(job)
    if only in (None, FINETUNE.name):
        refuse_unlearnable(job)
    table = Table(title=f"{config.name} in {config.out}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("why, what it reads, and what it writes", overflow="fold")
    for verdict in plan([named(stages, only)] if only else stages, job, force=force):
        stage = verdict.stage
        state = "done" if not verdict.due else "will run" if verdict.certain else "may run"
        rows = () if stage.rows is None else (f"{_kind_of_rows(stage, job)} rows",)
        files = f"{', '.join((*rows, *stage.reads, *stage.outside(config)))} -> {', '.join(stage.writes)}"
        why = "; ".join(verdict.reasons) or "nothing has changed"
        table.add_row(stage.name, state, Text.assemble(f"{stage.does}: {why}\n", (files, "dim")))
    console.print(table)
    if at_work_in(job.folder, lock=_LOCK_FILE):
        console.print(
            f"another job is at work in {config.out} now: what it has begun looks interrupted here",
            highlight=False,
            soft_wrap=True,
        )
    if only is None and not job.is_labelled:
        console.print(_why_unjudged(config), highlight=False, soft_wrap=True)


def _refuse_unusable(job: Job) -> None:
    """Find out before anything takes long that rows cannot be read, or an impossible number of labels is asked for."""
    if job.is_labelled:
        job.draws  # noqa: B018  # computed once, and kept
    else:
        job.parts  # noqa: B018  # read once, and kept


def _why_unjudged(config: RunConfig) -> str:
    """Say what is left out where rows come without labels, and what would bring it."""
    left_out = "evaluate is left out: the rows come without labels to judge the features by"
    if config.finetune.files:
        return left_out
    return f"{left_out}; a file of the labels that there are ships a classifier: --set finetune.labels=labels.csv"


def _kind_of_rows(stage: Stage, job: Job) -> str:
    """Say for people which rows a stage reads."""
    if stage.rows != "parts":
        return str(stage.rows)
    if job.is_labelled:
        return "labelled"
    return "training and test" if job.parts.has_test else "all"


def _refuse_unasked(name: str, job: Job) -> None:
    if name == EVALUATE.name and not job.is_labelled:
        raise InputError(
            f"got the stage 'evaluate' for {job.config.data.path}, whose rows come without labels, wanted some to "
            "judge the features by: sub-folders named after classes, or a column 'label'. The few labels that there "
            "are in a file ship a classifier, and judge it: finetune.labels in the TOML file, or --set "
            "finetune.labels=labels.csv"
        )
    if name == FINETUNE.name and not job.config.finetune.files:
        raise InputError(
            "got the stage 'finetune' of a job without labels, wanted a file of them: finetune.labels in the TOML "
            "file, or --set finetune.labels=labels.csv"
        )


def _tell(line: str) -> None:
    Console(stderr=True).print(line, style="dim", highlight=False, markup=False, soft_wrap=True)


def _print(console: Console, job: Job) -> None:
    config = job.config
    if job.is_labelled:
        console.print(_table_of_errors(job))
    records = [record for stage in stages_of(job) if (record := Record.read(job, stage.name))]
    seconds = ", ".join(f"{record.stage} {record.seconds:.1f} s" for record in records)
    rate = json.loads((job.folder / CHECK_FILE).read_text())["rows_per_s"]
    console.print(f"{seconds}; {rate:,.0f} rows/s over HTTP", highlight=False)
    console.print(f"bundle  {config.out}\nreport  {config.out}/{REPORT_FILE}", highlight=False)
    if config.finetune.files and (record := Record.read(job, FINETUNE.name)):
        console.print(
            f"classifier  {config.out}/{CLASSIFIER_FOLDER}\n{record.summary}", highlight=False, soft_wrap=True
        )
    if not job.is_labelled:
        console.print(_why_unjudged(config), highlight=False, soft_wrap=True)


def _table_of_errors(job: Job) -> Table:
    config, metrics = job.config, json.loads((job.folder / METRICS_FILE).read_text())
    table = Table(
        title=f"{config.name}: test error (%) of logistic regression on {config.probe.n_labels} labels, "
        f"mean and standard deviation over {config.probe.n_draws} draws, {metrics['n_test']:,} test rows",
        title_justify="left",
    )
    table.add_column("features")
    for head in HEADS:
        table.add_column(head, justify="right")
    errors = metrics["test_error_percent"]
    for name in dict.fromkeys(found["features"] for found in errors):
        cells = [found for found in errors if found["features"] == name]
        table.add_row(name, *(f"{found['mean']:.1f} ± {found['standard_deviation']:.1f}" for found in cells))
    return table
