from __future__ import annotations

import io
import logging
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.watching.logs import JsonLines, RequestLog, RequestRecord, start_logging
from serving.watching.text import printable

Read = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def written() -> Iterator[Read]:
    root, ours = logging.getLogger(), logging.getLogger("serving")
    handlers, levels = root.handlers, (root.level, ours.level)
    stream = io.StringIO()
    start_logging("info", stream=stream)
    yield lambda: [orjson.loads(line) for line in stream.getvalue().splitlines()]
    logging.captureWarnings(False)
    root.handlers = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def record(status: int, **fields: Any) -> RequestRecord:
    return RequestRecord(request_id="r1", route="/v1/embed", status=status, **fields)


def test_log_of_a_failed_request_is_one_line_of_json_with_what_is_known(written: Read) -> None:
    failed = record(422, error="invalid_rows", detail="got 7", version="f" * 64, key="ci", rows=3, queue_s=0.0015)
    RequestLog(access=False).write(failed)
    (line,) = written()
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "warning",
        "logger": "serving.requests",
        "message": "failed",
        "request_id": "r1",
        "route": "/v1/embed",
        "status": 422,
        "error": "invalid_rows",
        "detail": "got 7",
        "version": "f" * 12,
        "key": "ci",
        "rows": 3,
        "queue_ms": 1.5,
    }


@pytest.mark.parametrize(("access", "wanted"), [(False, [False, True, True]), (True, [True, True, True])])
def test_log_wants_failures_and_the_others_where_asked(access: bool, wanted: list[bool]) -> None:
    log = RequestLog(access=access)
    assert [log.wants(status) for status in (200, 400, 503)] == wanted


@pytest.mark.parametrize(
    ("status", "level"), [(200, "info"), (400, "warning"), (429, "warning"), (500, "error"), (503, "warning")]
)
def test_log_of_a_status_has_its_level(written: Read, status: int, level: str) -> None:
    RequestLog(access=True).write(record(status))
    assert [line["level"] for line in written()] == [level]


def test_log_of_a_defect_has_the_traceback_cut_and_harmless(written: Read) -> None:
    try:
        raise ValueError("\x1b[2J\r\n" + "p" * 10_000)
    except ValueError as error:
        RequestLog(access=False).write(record(500), cause=error)
    (line,) = written()
    assert any("test_logs.py" in frame for frame in line["traceback"])
    assert len(orjson.dumps(line)) < 3000
    assert "\x1b" not in "".join(line["traceback"])


def test_log_of_a_flood_of_refusals_is_bounded_and_says_what_it_left_out(written: Read) -> None:
    now = [5.0]
    log = RequestLog(access=False, clock=lambda: now[0])
    for _ in range(1000):
        log.write(record(429))
    log.write(record(500))
    now[0] = 6.0
    log.write(record(401))
    lines = written()
    assert len(lines) == 102
    assert [line.get("left_out") for line in lines[-2:]] == [900, None]
    assert [line["status"] for line in lines[-2:]] == [500, 401]


def test_log_of_another_library_is_json_too_and_heard_from_warning_on(written: Read) -> None:
    logging.getLogger("someone.else").info("chatter")
    logging.getLogger("someone.else").warning("trouble at %s", "line\nbreak")
    logging.getLogger("serving.models").info("loaded")
    assert [line["message"] for line in written()] == ["trouble at line?break", "loaded"]


@given(st.text(st.characters(), max_size=400))
def test_line_of_any_text_is_one_line_without_controls(text: str) -> None:
    made = logging.LogRecord("serving", logging.INFO, "", 0, "%s", (text,), None)
    made.fields = {"detail": text}
    line = JsonLines().format(made)
    read = orjson.loads(line)
    for value in (line, read["message"], read["detail"]):
        assert not {unicodedata.category(character) for character in value} & {"Cc", "Cf", "Cs", "Zl", "Zp"}


@given(st.text(st.characters(), max_size=50), st.integers(1, 60))
def test_printable_text_is_cut_and_what_was_harmless_stays(text: str, length: int) -> None:
    made = printable(text, max_length=length)
    assert len(made) == min(len(text), length) + (len(text) > length)
    assert all(ours in (theirs, "?") for ours, theirs in zip(made[:length], text, strict=False))
    if text.isprintable() and len(text) <= length:
        assert made == text
