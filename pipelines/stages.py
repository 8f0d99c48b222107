"""Stages of a job: what each reads and writes, whether it has to run, and the record that it did.

A stage reads parts of the configuration, rows, and files of earlier stages; it writes files into the job's folder. When
it is done it leaves a record, ``stages/NAME.json``, with the digests of all of these: written last, and removed before
the stage runs again. What has no record is not done, however many files of it are there. A stage is done as long as
what it reads has the digests of the record and so has what it wrote.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from pipelines.config import RunConfig
from pipelines.environment import versions
from pipelines.job import Job
from vaefeat.atomic import replace_file
from vaefeat.errors import InputError
from vaefeat.settings import unknown_name

__all__ = [
    "RECORDS_FOLDER",
    "Outcome",
    "Record",
    "Stage",
    "Verdict",
    "named",
    "perform",
    "plan",
    "run_one",
    "run_stages",
]

#: Inside the job's folder.
RECORDS_FOLDER = "stages"
_SCHEMA_VERSION = 1
_NONE = "not there"


@dataclass(frozen=True)
class Outcome:
    """What a stage did.

    Attributes
    ----------
    files : sequence of str
        What it wrote, by their names in the job's folder.
    summary : str
        What came out, in a line for people.
    figures : mapping of str to float
        For the record, such as ``rows_per_s``.
    """

    files: Sequence[str]
    summary: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a job.

    Parameters
    ----------
    name : str
        Of its record, and of its verb.
    does : str
        In a few words, for people.
    settings : callable
        Gives the part of the configuration that its result depends on, as plain values by dotted names.
    rows : {"pretraining", "parts", "labelled", "named"} or None
        Which rows it reads: what is trained on; training and test rows, with their labels where there are some; the
        same, which must have labels; those that files of labels speak of.
    reads, writes : tuple of str
        Files in the job's folder. What stages write that a job leaves out is not read. What it writes may be more:
        :attr:`Outcome.files` has the last word.
    work : callable
        Does it, with the job and the name of the attempt: the same name for as long as the same thing is attempted, so
        that what an interrupted attempt left can be told from what is out of date.
    outside : callable
        Gives the files that it reads elsewhere, which people may change, by names that stay the same in every working
        directory.
    """

    name: str
    does: str
    settings: Callable[[RunConfig], Mapping[str, Any]]
    rows: Literal["pretraining", "parts", "labelled", "named"] | None
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    work: Callable[[Job, str], Outcome]
    outside: Callable[[RunConfig], Mapping[str, Path]] = lambda config: {}


@dataclass(frozen=True)
class _Inputs:
    """What a stage reads: settings as they are, rows and files by their digests."""

    settings: Mapping[str, Any]
    rows: str | None
    files: Mapping[str, str]

    @classmethod
    def of(cls, stage: Stage, job: Job) -> Self:
        # As JSON gives them back: a tuple there is a list.
        settings = json.loads(json.dumps(dict(stage.settings(job.config))))
        return cls(
            settings,
            None if stage.rows is None else job.digest_of_rows(stage.rows),
            {
                **{name: _digest_of_file(job.folder / name) for name in stage.reads},
                **{name: _digest_of_file(path) for name, path in stage.outside(job.config).items()},
            },
        )

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def differences(self, before: _Inputs, *, awaited: Collection[str]) -> list[str]:
        """Say what is not as it was before, leaving out files that are awaited."""
        found = [
            f"{key} is {_shown(self.settings, key)}, was {_shown(before.settings, key)}"
            for key in sorted(self.settings.keys() | before.settings.keys())
            if _shown(self.settings, key) != _shown(before.settings, key)
        ]
        if self.rows != before.rows:
            found.append("the rows are others")
        for name, digest in self.files.items():
            if digest != before.files.get(name) and name not in awaited:
                how = "not what it was" if name in before.files else "new"
                found.append(f"{name} is {'missing' if digest == _NONE else how}")
        return found + [f"{name} is no longer read" for name in before.files if name not in self.files]


@dataclass(frozen=True)
class Record:
    """That a stage was done: ``stages/NAME.json``.

    Attributes
    ----------
    stage : str
    inputs : _Inputs
    outputs : mapping of str to str
        The digest of every file it wrote.
    summary : str
        What came out, in a line for people.
    seconds : float
        Of the attempt that finished it.
    finished : str
        When, in UTC.
    figures : mapping of str to float
    versions : mapping of str to str
        Of the libraries it ran with. Other versions are no reason to run it again.
    """

    stage: str
    inputs: _Inputs
    outputs: Mapping[str, str]
    summary: str
    seconds: float
    finished: str
    figures: Mapping[str, float]
    versions: Mapping[str, str]

    @classmethod
    def read(cls, job: Job, name: str) -> Self | None:
        """Read the record of a stage; None where there is none, or none that can be understood."""
        try:
            values = json.loads(_record_path(job, name).read_text())
            if values.pop("schema_version") != _SCHEMA_VERSION:
                return None
            return cls(**{**values, "inputs": _Inputs(**values["inputs"])})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            # Written whole or not at all, so somebody else changed it: what it says cannot be relied on.
            return None

    def write(self, job: Job) -> None:
        """Write it, in one piece."""
        content = json.dumps({"schema_version": _SCHEMA_VERSION, **asdict(self)}, indent=1)
        replace_file(_record_path(job, self.stage), f"{content}\n".encode())

    def damages(self, job: Job) -> list[str]:
        """Say which of the outputs are not what was written."""
        found = {name: _digest_of_file(job.folder / name) for name in self.outputs}
        return [
            f"{name} is {'missing' if digest == _NONE else 'not what was written'}"
            for name, digest in found.items()
            if digest != self.outputs[name]
        ]


@dataclass(frozen=True)
class Verdict:
    """Whether a stage has to run.

    Attributes
    ----------
    stage : Stage
    reasons : tuple of str
        Why it has to; empty where it is done.
    certain : bool
        False where it only may have to, if an earlier stage that will run writes something new.
    """

    stage: Stage
    reasons: tuple[str, ...]
    certain: bool = True

    @property
    def due(self) -> bool:
        """Whether it has to run, or may have to."""
        return bool(self.reasons)


def named(stages: Sequence[Stage], name: str) -> Stage:
    """Find a stage by its name; raises ConfigError where there is none."""
    for stage in stages:
        if stage.name == name:
            return stage
    raise unknown_name("stage", name, [stage.name for stage in stages])


def plan(stages: Sequence[Stage], job: Job, *, force: Collection[str] = ()) -> list[Verdict]:
    """Say which stages would run, and why, without changing anything.

    Parameters
    ----------
    stages : sequence of Stage
        In their order.
    job : Job
    force : collection of str
        Stages that are to run in any case.

    Returns
    -------
    list of Verdict
        One for each stage.
    """
    for name in force:
        named(stages, name)
    coming: dict[str, str] = {}
    verdicts = []
    for stage in stages:
        verdict = _judged(stage, job, forced=stage.name in force, coming=coming)
        if verdict.due:
            coming |= dict.fromkeys(stage.writes, stage.name)
        verdicts.append(verdict)
    return verdicts


def run_stages(
    stages: Sequence[Stage], job: Job, *, force: Collection[str] = (), tell: Callable[[str], None] = lambda line: None
) -> bool:
    """Run the stages that have to.

    Parameters
    ----------
    stages : sequence of Stage
    job : Job
    force : collection of str
        Stages that are to run in any case.
    tell : callable
        Told in a line what becomes of each stage, and why.

    Returns
    -------
    bool
        Whether any had to run.
    """
    for name in force:
        named(stages, name)
    ran = False
    for stage in stages:
        verdict = _judged(stage, job, forced=stage.name in force, coming={})
        tell(f"{stage.name}: {'; '.join(verdict.reasons) or 'done before'}")
        if verdict.due:
            perform(stage, job, anew=stage.name in force)
            ran = True
    return ran


def run_one(
    stages: Sequence[Stage],
    name: str,
    job: Job,
    *,
    force: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> bool:
    """Run one stage, if it has to.

    Raises
    ------
    InputError
        A stage whose files it reads has to run first.
    """
    stage = named(stages, name)
    for earlier in _before(stage, stages):
        if reasons := _judged(earlier, job, forced=False, coming={}).reasons:
            raise InputError(
                f"stage {name!r} reads what stage {earlier.name!r} writes, which has to run first "
                f"({'; '.join(reasons)}): python -m pipelines {earlier.name}, or all that is needed with "
                "python -m pipelines run"
            )
    return run_stages([stage], job, force=[name] if force else (), tell=tell)


def perform(stage: Stage, job: Job, *, anew: bool = False) -> Record:
    """Run a stage, whatever its record says, and leave a new one.

    Parameters
    ----------
    stage : Stage
    job : Job
    anew : bool
        Begin at the beginning, whatever an interrupted attempt at the same thing left.
    """
    (job.folder / RECORDS_FOLDER).mkdir(parents=True, exist_ok=True)
    inputs, started = _Inputs.of(stage, job), time.perf_counter()
    _record_path(job, stage.name).unlink(missing_ok=True)
    attempt = None if anew else _attempt_before(job, stage, inputs)
    if attempt is None:
        attempt = uuid.uuid4().hex
        replace_file(_attempt_path(job, stage.name), json.dumps({"inputs": inputs.digest, "name": attempt}).encode())
    outcome = stage.work(job, attempt)
    record = Record(
        stage=stage.name,
        inputs=inputs,
        outputs={name: _digest_of_file(job.folder / name) for name in outcome.files},
        summary=outcome.summary,
        seconds=time.perf_counter() - started,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        figures=dict(outcome.figures),
        versions=versions(),
    )
    record.write(job)
    _attempt_path(job, stage.name).unlink(missing_ok=True)
    return record


def _judged(stage: Stage, job: Job, *, forced: bool, coming: Mapping[str, str]) -> Verdict:
    """Compare a stage with its record; `coming` has the files that earlier stages will write, with their names."""
    inputs, record = _Inputs.of(stage, job), Record.read(job, stage.name)
    reasons = ["asked for with --force"] if forced else []
    if record is None:
        reasons.append(_why_without_record(stage, job, inputs))
    else:
        reasons += inputs.differences(record.inputs, awaited=coming)
        reasons += record.damages(job)
    if reasons:
        return Verdict(stage, tuple(reasons))
    awaited = [f"{writer} writes {name}" for name, writer in coming.items() if name in stage.reads]
    return Verdict(stage, tuple(awaited), certain=not awaited)


def _why_without_record(stage: Stage, job: Job, inputs: _Inputs) -> str:
    if _record_path(job, stage.name).exists():
        return "its record cannot be read"
    if _attempt_before(job, stage, inputs) is not None:
        return "was interrupted"
    return "was interrupted, at something else" if _attempt_path(job, stage.name).exists() else "has not run yet"


def _attempt_before(job: Job, stage: Stage, inputs: _Inputs) -> str | None:
    """Give the name of an attempt at the same thing that did not come to its end."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        values = json.loads(_attempt_path(job, stage.name).read_text())
        if values["inputs"] == inputs.digest:
            return str(values["name"])
    return None


def _before(stage: Stage, stages: Sequence[Stage]) -> Iterator[Stage]:
    """Give the stages that a stage stands on, directly and through others, the first one first."""
    wanted, found = set(stage.reads), []
    for other in reversed(stages[: list(stages).index(stage)]):
        if wanted & set(other.writes):
            wanted |= set(other.reads)
            found.append(other)
    return reversed(found)


def _record_path(job: Job, name: str) -> Path:
    return job.folder / RECORDS_FOLDER / f"{name}.json"


def _attempt_path(job: Job, name: str) -> Path:
    return job.folder / RECORDS_FOLDER / f"{name}.attempt"


def _digest_of_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return _NONE


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key]) if key in settings else "not set"
