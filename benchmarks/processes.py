"""Servers as processes: started with a mark that all their descendants inherit, measured and ended by it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

__all__ = ["Server", "free_port", "waiting"]

_MARK = "VAEFEAT_BENCHMARK_MARK"
_STOP_S = 60.0
_TICK_S = 0.02


class Server:
    """A server and everything that it starts; a context manager that leaves nothing of it behind.

    Parameters
    ----------
    command : sequence of str
    log : Path
        Takes standard output and standard error.
    environment : mapping of str to str, optional
        Beside this process's own.
    cwd : Path, optional

    Attributes
    ----------
    process : Popen
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self._mark, self._log = uuid.uuid4().hex, log
        with log.open("w") as output:
            self.process = subprocess.Popen(  # noqa: S603 - commands of ours
                list(command),
                cwd=cwd,
                env={**os.environ, **(environment or {}), _MARK: self._mark},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._known: dict[int, psutil.Process] = {}
        self._others: set[tuple[int, float]] = set()

    def family(self) -> list[psutil.Process]:
        """Find all processes that inherited the mark, whoever their parent is by now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if self._is_ours(process) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _is_ours(self, process: psutil.Process) -> bool:
        # An environment is worth reading once: it stays as it was when the process began.
        identity = (process.pid, process.create_time())
        if identity in self._others:
            return False
        if self._known.get(process.pid) == process:
            return True
        if process.environ().get(_MARK) == self._mark:
            self._known[process.pid] = process
            return True
        # A process that has just been forked still has its parent's program, and so perhaps other words to read.
        if time.time() - process.create_time() > 1:
            self._others.add(identity)
        return False

    def rss_mib(self) -> float:
        """Sum up resident memory, in MiB; pages that processes share count in each."""
        total = 0
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total / 2**20

    def said(self) -> str:
        """Give what it printed."""
        return self._log.read_text(errors="replace").strip()

    def stop(self) -> None:
        """Ask it to end, and end whatever is left."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_S)
        left = self.family()
        while left:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=_TICK_S)
            left = self.family()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def free_port() -> int:
    """Find a port that nobody listens on; somebody else may take it before it is used."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def waiting(seconds: float) -> Iterator[float]:
    """Give the seconds that have passed, in small steps, until there were so many."""
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        yield passed
        time.sleep(_TICK_S)
