"""Processes: servers, started with a mark that all their descendants inherit, measured and ended by it, and contenders.

A contender is a module that prints what it found as one line of JSON, the last one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from vaefeat.errors import TrainingError

__all__ = ["Server", "ask_module", "free_port", "waiting"]

_MARK = "VAEFEAT_BENCHMARK_MARK"
_ROOT = Path(__file__).parents[1]
_SAID_LINES = 3
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


def ask_module(
    module: str,
    arguments: Sequence[str],
    *,
    name: str,
    threads: int,
    longest_s: float,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run a contender in a process of its own, and wait.

    Parameters
    ----------
    module : str
        Of this checkout.
    arguments : sequence of str
    name : str
        What it is, for messages.
    threads : int
        For the libraries that read their number in the environment.
    longest_s : float
        Who takes longer hangs.
    environment : mapping of str to str, optional
        Beside this process's own.

    Raises
    ------
    TrainingError
        It failed, or took longer.
    """
    numbers = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "NUMBA")}
    try:
        done = subprocess.run(  # noqa: S603 - our own module
            [sys.executable, "-m", module, *arguments],
            cwd=_ROOT,
            env={**os.environ, **numbers, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=longest_s,
        )
    except subprocess.TimeoutExpired:
        raise TrainingError(f"{name} did not end within {longest_s:.0f} s") from None
    if done.returncode:
        last = " / ".join(done.stderr.strip().splitlines()[-_SAID_LINES:])
        raise TrainingError(f"{name} failed with status {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]  # what our module prints


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
