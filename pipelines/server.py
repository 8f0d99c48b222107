"""A service of the other application, started as a process of its own and stopped for certain."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from vaefeat.errors import RemoteError

__all__ = ["ProcessError", "running_server"]

#: The service lets requests in flight finish for up to a minute, and then ends Ray.
_STOP_TIMEOUT_S = 90.0


class ProcessError(RemoteError):
    """The service did not start, or ended by itself."""


@contextmanager
def running_server(bundle: Path, *, engine: str, start_timeout_s: float) -> Iterator[str]:
    """Serve a bundle on a free loopback port for the time of a ``with`` block.

    Parameters
    ----------
    bundle : Path
    engine : {"ray", "local"}
    start_timeout_s : float

    Yields
    ------
    str
        The service's address, ``http://127.0.0.1:PORT``, once it is ready.

    Raises
    ------
    ProcessError
        It ended before it was ready, or was not ready in time; what it wrote to its log is in the message.
    """
    command = [sys.executable, "-m", "pipelines.leash", "serving", str(bundle), "--engine", engine, "--port", "0"]
    log: list[str] = []
    lines: queue.Queue[str] = queue.Queue()
    # A session of its own: Ctrl-C in the terminal reaches this process alone, which then stops the server in order.
    with subprocess.Popen(  # noqa: S603 - our own module, with arguments that are no shell text
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None  # a pipe
        assert process.stderr is not None
        # Both are read all the time: a full pipe would stop the service.
        readers = [
            threading.Thread(target=_forward, args=(process.stdout, lines.put)),
            threading.Thread(target=_forward, args=(process.stderr, log.append)),
        ]
        for reader in readers:
            reader.start()
        try:
            with _terminated_in_order():
                yield _address(process, lines, log, start_timeout_s)
        finally:
            _stop(process)
            for reader in readers:
                reader.join()


@contextmanager
def _terminated_in_order() -> Iterator[None]:
    """Let SIGTERM and SIGHUP, which would end this process at once, run its ``finally`` clauses."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _forward(stream: IO[str], take: Callable[[str], None]) -> None:
    for line in stream:
        take(line)


def _address(process: subprocess.Popen[str], lines: queue.Queue[str], log: list[str], timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            words = lines.get(timeout=0.1).split()
        except queue.Empty:
            if process.poll() is not None:
                raise ProcessError(f"the service ended with status {process.returncode}: {_tail(log)}") from None
            continue
        if words[:1] == ["ready"]:
            return words[1]
    raise ProcessError(f"the service was not ready within {timeout_s:g} s; give it longer with serve.start_timeout_s")


def _tail(log: list[str]) -> str:
    return " ".join(line.strip() for line in log[-5:]) or "it wrote nothing"


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        # Its session is its own, so the whole group of processes is the service.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
