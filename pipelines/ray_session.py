"""Ray for the length of a job: one of its own on the loopback address, or a cluster that is there.

Importing this module imports Ray, which reads its environment then: :mod:`pipelines.ray_environment` comes first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import ray
from ray.exceptions import RayError

from pipelines.ray_environment import CHECKOUT
from vaefeat.errors import JobError, TrainingError, VaefeatError
from vaefeat.observers import shown_activity
from vaefeat.processors import available_cpus
from vaefeat.scratch import scratch_folder

__all__ = ["aside", "last_line", "ray_errors_told_plainly", "running_ray"]

#: Ray wants this much for its object store, whatever is put into it.
_LEAST_STORE_BYTES = 128 * 2**20
_ANSWER_S = 10.0


@contextlib.contextmanager
def running_ray(address: str, *, store_bytes: int = 0) -> Iterator[None]:
    """Start a Ray on the loopback address, or join a cluster; end every process that is ours.

    Parameters
    ----------
    address : str
        ``local`` for a Ray of the job's own, else a cluster's.
    store_bytes : int
        What the job puts into the object store of a Ray of its own.

    Raises
    ------
    JobError
        It did not start, or there is none at the address.
    """
    quiet: dict[str, Any] = {"include_dashboard": False, "logging_level": logging.ERROR, "log_to_driver": False}
    with scratch_folder() as folder:
        try:
            with shown_activity("start Ray"), _told_if_it_fails(address):
                if address == "local":
                    ray.init(
                        address="local",  # never one that happens to run on this machine
                        num_cpus=available_cpus(),
                        object_store_memory=_LEAST_STORE_BYTES + int(1.1 * store_bytes),
                        _temp_dir=str(folder / "r"),
                        **quiet,
                    )
                else:
                    _refuse_where_nobody_answers(address)
                    found = {"env_vars": {"PYTHONPATH": str(CHECKOUT)}}
                    ray.init(address=address, runtime_env=found, logging_level=logging.ERROR, log_to_driver=False)
            yield
        finally:
            ray.shutdown(wait_for_processes=True)


@contextlib.contextmanager
def _told_if_it_fails(address: str) -> Iterator[None]:
    try:
        yield
    except VaefeatError:
        raise
    except Exception as error:  # of no class of its own, where processes are not there in time
        where = "on this machine" if address == "local" else f"at {address}"
        raise JobError(
            f"Ray did not start {where}: {last_line(str(error))}; is there memory and a processor for it? The same "
            "command tries again"
        ) from error


def _refuse_where_nobody_answers(address: str) -> None:
    """Look whether there is anything at an address before Ray does, which tries for minutes and without a word."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise JobError(
            f"got the address {address}, where no Ray answers ({error}); wanted that of a cluster's head, such as "
            "HEAD:6379, or local"
        ) from error


@contextlib.contextmanager
def aside(log: Path) -> Iterator[TextIO]:
    """Write to a file what Ray, its core and its processes print; give the standard error that is for people.

    Parameters
    ----------
    log : Path
        Written over.

    Yields
    ------
    text file
        Standard error as it was.
    """
    sys.stderr.flush()
    with (
        os.fdopen(os.dup(2), "w", buffering=1) as people,
        log.open("w", buffering=1) as file,
        contextlib.redirect_stdout(file),
    ):
        # The number itself: Ray's core is no Python, and its processes inherit it.
        os.dup2(file.fileno(), 2)
        try:
            yield people
        finally:
            sys.stderr.flush()
            os.dup2(people.fileno(), 2)


@contextlib.contextmanager
def ray_errors_told_plainly() -> Iterator[None]:
    """Turn what Ray raises, whole tracebacks of other processes among it, into one line."""
    try:
        yield
    except VaefeatError:
        raise
    except (RayError, RuntimeError, ConnectionError) as error:
        raise TrainingError(f"Ray failed: {last_line(str(error))}") from error


def last_line(text: str) -> str:
    """Give the error that is the last line of a traceback, which is what Ray reports."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "Ray gave no reason")
