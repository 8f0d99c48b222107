"""Logs: one JSON object a line, on standard error.

A line holds ``time`` (UTC), ``level``, ``logger`` and ``message``; one of a request also ``request_id``, ``route``,
``status`` and whatever of ``error``, ``detail``, ``model``, ``version``, ``key``, ``rows``, ``bytes``, ``queue_ms``,
``decode_ms``, ``device_ms``, ``total_ms`` and ``trace_id`` there is. Payloads, API keys and query strings have no place
in it, and every text is cut and stripped of control characters, wherever it came from.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TextIO

import orjson

from serving.watching.text import printable

__all__ = ["JsonLines", "RequestLog", "RequestRecord", "start_logging"]

_log = logging.getLogger("serving.requests")
#: Refusals that a client can cause as fast as it can send, so their lines are bounded.
_FLOODS = frozenset({*range(400, 500), 503})
_MAX_FLOOD_LINES_PER_S = 100
_MAX_TRACEBACK_LINES = 60


def start_logging(level: str, *, stream: TextIO | None = None) -> None:
    """Write the service's log from now on.

    Parameters
    ----------
    level : {"debug", "info", "warning", "error"}
        The least serious that is written of what the service says; other libraries are heard from ``warning`` on.
    stream : text file, optional
        Standard error when None.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("serving").setLevel(level.upper())
    logging.captureWarnings(True)


class JsonLines(logging.Formatter):
    """A record as one line of JSON; a record's ``fields`` come beside its message."""

    def format(self, record: logging.LogRecord) -> str:
        """Write the line; see the module."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": printable(record.getMessage(), max_length=2000),
        }
        for name, value in getattr(record, "fields", {}).items():
            line[name] = printable(value) if isinstance(value, str) else value
        if record.exc_info and record.exc_info[1]:
            line["traceback"] = _told(record.exc_info[1])
        return orjson.dumps(line).decode()


def _told(error: BaseException) -> list[str]:
    """Give the last lines of a traceback, each cut: an exception's message may quote what a client sent."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return [printable(line) for line in lines[-_MAX_TRACEBACK_LINES:]]


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """What is known of a request when it has been answered; fields that stay None are not written.

    Parameters
    ----------
    request_id, route : str
        The route as the application declares it.
    status : int
    error, detail : str, optional
        The error's kind, and its message as the client got it.
    model, version : str, optional
        The version is cut to twelve digits.
    key : str, optional
        The API key's id.
    rows, bytes : int, optional
    queue_s, decode_s, device_s, total_s : float, optional
        Seconds; written as milliseconds.
    trace_id : str, optional
    """

    request_id: str
    route: str
    status: int
    error: str | None = None
    detail: str | None = None
    model: str | None = None
    version: str | None = None
    key: str | None = None
    rows: int | None = None
    bytes: int | None = None
    queue_s: float | None = None
    decode_s: float | None = None
    device_s: float | None = None
    total_s: float | None = None
    trace_id: str | None = None

    def fields(self) -> dict[str, str | int | float]:
        """Give what there is, under the names of the log."""
        told: dict[str, str | int | float] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            if value is None:
                continue
            if name.endswith("_s"):
                told[f"{name[:-2]}_ms"] = round(1e3 * value, 3)
            else:
                told[name] = value[:12] if name == "version" else value
        return told


class RequestLog:
    """One line for every failed request, and for the others where they are asked for; the event loop owns it.

    Parameters
    ----------
    access : bool
        Write a line for every request.
    clock : callable
        Seconds that never run backwards.
    """

    def __init__(self, *, access: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._access = access
        self._clock = clock
        self._second = 0
        self._lines = 0
        self._left_out = 0

    def wants(self, status: int) -> bool:
        """Tell whether a request with this answer gets a line; asked before its record is put together."""
        return status >= 400 or self._access

    def write(self, record: RequestRecord, *, cause: Exception | None = None) -> None:
        """Write the line of a request that :meth:`wants` one.

        Of the refusals that clients can bring about as fast as they can send, those past a hundred in a second are only
        counted, and the next line tells in ``left_out`` how many there were: an overloaded service has better to do,
        and the metrics have them all.

        Parameters
        ----------
        record : RequestRecord
        cause : Exception, optional
            What is behind an answer that tells nothing; its traceback is written.
        """
        if record.status in _FLOODS and not self._has_room():
            self._left_out += 1
            return
        fields = record.fields()
        if self._left_out:
            fields["left_out"], self._left_out = self._left_out, 0
        if record.status < 400:
            level = logging.INFO
        else:
            level = logging.ERROR if record.status >= 500 and record.status not in _FLOODS else logging.WARNING
        message = "answered" if record.status < 400 else "failed"
        _log.log(level, message, extra={"fields": fields}, exc_info=cause)

    def _has_room(self) -> bool:
        second = int(self._clock())
        if second != self._second:
            self._second, self._lines = second, 0
        self._lines += 1
        return self._lines <= _MAX_FLOOD_LINES_PER_S
