"""Stages run when what they read or wrote has changed, and only then; nothing partial counts as done."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.config import DataConfig, ProbeConfig, RunConfig
from pipelines.folder_lock import at_work_in, working_in
from pipelines.job import Job
from pipelines.stages import Outcome, Record, Stage, perform, plan, run_one, run_stages
from vaefeat.errors import ConfigError, InputError


def note(job: Job, attempt: str) -> None:
    with (job.folder / "attempts").open("a") as file:
        file.write(f"{attempt}\n")


def letters(job: Job, attempt: str) -> Outcome:
    """Write the name of the run, which the second stage makes longer."""
    (job.folder / "letters").write_text(job.config.name)
    note(job, attempt)
    return Outcome(("letters",), "letters")


def doubled(job: Job, attempt: str) -> Outcome:
    (job.folder / "doubled").write_text(2 * (job.folder / "letters").read_text())
    note(job, attempt)
    return Outcome(("doubled",), "doubled", {"rows_per_s": 2.0})


FIRST = Stage(
    name="first",
    does="letters",
    settings=lambda config: config.picked("name", "probe"),
    rows=None,
    reads=(),
    writes=("letters",),
    work=letters,
)
SECOND = Stage(
    name="second",
    does="doubled",
    settings=lambda config: {},
    rows="labelled",
    reads=("letters",),
    writes=("doubled",),
    work=doubled,
)
BOTH = (FIRST, SECOND)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(name="abc", out=str(tmp_path / "out"))


def ran(config: RunConfig, *, force: tuple[str, ...] = ()) -> list[str]:
    """Run both stages, and tell which had to and why."""
    told: list[str] = []
    run_stages(BOTH, Job(config), force=force, tell=told.append)
    return told


def test_stages_run_once_and_leave_records(config: RunConfig) -> None:
    assert ran(config) == ["first: has not run yet", "second: has not run yet"]
    assert (Path(config.out) / "doubled").read_text() == "abcabc"
    assert ran(config) == ["first: done before", "second: done before"]
    record = Record.read(Job(config), "second")
    assert record is not None
    assert record.summary == "doubled"
    assert record.figures == {"rows_per_s": 2.0}
    assert record.versions["python"]
    assert not list((Path(config.out) / "stages").glob("*.attempt"))


def test_changed_setting_runs_what_reads_it_and_what_reads_its_output(config: RunConfig) -> None:
    ran(config)
    other = replace(config, name="abd")
    assert ran(other) == ['first: name is "abd", was "abc"', "second: letters is not what it was"]
    assert (Path(config.out) / "doubled").read_text() == "abdabd"


def test_output_that_comes_out_the_same_runs_nothing_after_it(config: RunConfig) -> None:
    ran(config)
    other = replace(config, probe=ProbeConfig(n_draws=3))
    assert ran(other) == ["first: probe.n_draws is 3, was 10", "second: done before"]


def test_other_rows_run_what_reads_them(config: RunConfig) -> None:
    ran(config)
    assert ran(replace(config, data=DataConfig(test_share=0.3))) == [
        "first: done before",
        "second: the rows are others",
    ]


@pytest.mark.parametrize(("content", "reason"), [(None, "is missing"), ("x", "is not what was written")])
def test_damaged_output_is_written_again(config: RunConfig, content: str | None, reason: str) -> None:
    ran(config)
    path = Path(config.out) / "doubled"
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert ran(config) == ["first: done before", f"second: doubled {reason}"]
    assert path.read_text() == "abcabc"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 1}', '{"schema_version": 99}'])
def test_record_that_cannot_be_read_counts_for_nothing(config: RunConfig, content: str) -> None:
    ran(config)
    (Path(config.out) / "stages" / "first.json").write_text(content)
    assert ran(config)[0] == "first: its record cannot be read"
    assert ran(config)[0] == "first: done before"


def test_files_from_outside_run_what_reads_them_when_they_change_come_or_go(config: RunConfig, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("one", "other")}
    for path in files.values():
        path.write_text("1")
    one = files["one"]
    both, alone = replace(FIRST, outside=lambda config: files), replace(FIRST, outside=lambda config: {"one": one})
    told: list[str] = []
    for stage in (alone, alone, both, alone):
        run_stages([stage], Job(config), tell=told.append)
    one.write_text("2")
    run_stages([alone], Job(config), tell=told.append)
    one.unlink()
    told += plan([alone], Job(config))[0].reasons
    assert told == [
        "first: has not run yet",
        "first: done before",
        "first: other is new",
        "first: other is no longer read",
        "first: one is not what it was",
        "one is missing",
    ]


def test_forced_stage_runs_again_and_unknown_one_is_refused(config: RunConfig) -> None:
    ran(config)
    assert ran(config, force=("first",)) == ["first: asked for with --force", "second: done before"]
    with pytest.raises(ConfigError, match="did you mean 'second'"):
        ran(config, force=("secnod",))


def test_plan_tells_what_may_follow_and_changes_nothing(config: RunConfig) -> None:
    folder = Path(config.out)
    nothing = plan(BOTH, Job(config))
    assert [verdict.due for verdict in nothing] == [True, True]
    assert not folder.exists()
    ran(config)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    first, second = plan(BOTH, Job(replace(config, name="abd")))
    assert (first.reasons, first.certain) == (('name is "abd", was "abc"',), True)
    assert (second.reasons, second.certain) == (("first writes letters",), False)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def failing(job: Job, attempt: str) -> Outcome:
    (job.folder / "doubled").write_text("abc")  # half of it
    note(job, attempt)
    raise OSError(28, "No space left on device")


def attempts(config: RunConfig) -> list[str]:
    return (Path(config.out) / "attempts").read_text().split()


def test_stage_that_failed_is_not_done_and_goes_on_under_the_name_of_its_attempt(config: RunConfig) -> None:
    job = Job(config)
    run_stages([FIRST], job)
    with pytest.raises(OSError, match="No space left"):
        run_stages([replace(SECOND, work=failing)], job)
    assert (Path(config.out) / "doubled").exists()
    assert Record.read(job, "second") is None
    assert ran(config) == ["first: done before", "second: was interrupted"]
    assert (Path(config.out) / "doubled").read_text() == "abcabc"
    _, failed, finished = attempts(config)
    assert failed == finished


def test_attempt_at_something_else_and_forced_one_get_names_of_their_own(config: RunConfig) -> None:
    job = Job(config)
    run_stages([FIRST], job)
    with pytest.raises(OSError, match="No space left"):
        perform(replace(SECOND, work=failing), job)
    (Path(config.out) / "letters").write_text("x")
    assert plan([SECOND], job)[0].reasons == ("was interrupted, at something else",)
    (Path(config.out) / "letters").write_text("abc")
    perform(SECOND, job, anew=True)
    perform(SECOND, job)
    assert len(set(attempts(config))) == 4


def test_failure_of_a_rerun_takes_the_record_of_the_run_before_away(config: RunConfig) -> None:
    ran(config)
    with pytest.raises(OSError, match="No space left"):
        run_stages([replace(SECOND, work=failing)], Job(config), force=["second"])
    assert ran(config)[1] == "second: was interrupted"


def test_one_stage_refuses_to_run_on_what_is_out_of_date(config: RunConfig) -> None:
    with pytest.raises(InputError, match="what stage 'first' writes, which has to run first"):
        run_one(BOTH, "second", Job(config))
    ran(config)
    other = Job(replace(config, name="abd"))
    with pytest.raises(InputError, match='name is "abd", was "abc"'):
        run_one(BOTH, "second", other)
    assert run_one(BOTH, "first", other)
    assert run_one(BOTH, "second", other)
    assert not run_one(BOTH, "second", other)


def _hold(folder: Path, ready: str) -> None:
    with working_in(folder, lock="stages/lock"):
        Path(ready).touch()
        time.sleep(60)


def test_second_job_in_a_folder_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    holder = multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path, str(ready)))
    holder.start()
    while not ready.exists():
        assert holder.is_alive()
        time.sleep(0.02)
    with pytest.raises(InputError, match="another job is at work"), working_in(tmp_path, lock="stages/lock"):
        pass
    assert at_work_in(tmp_path, lock="stages/lock")
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert not at_work_in(tmp_path, lock="stages/lock")
    assert not at_work_in(tmp_path / "nobody's", lock="stages/lock")
    with working_in(tmp_path, lock="stages/lock"):
        pass


def test_record_is_json_that_says_what_was_read(config: RunConfig) -> None:
    ran(config)
    record = json.loads((Path(config.out) / "stages" / "second.json").read_text())
    assert record["inputs"]["files"]["letters"].startswith("sha256:")
    assert record["inputs"]["rows"].startswith("sha256:")
    assert record["outputs"].keys() == {"doubled"}
