"""How many processors there are to use, and how much memory."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["allowed_threads", "available_cpus", "available_memory"]


def available_cpus() -> int:
    """Processors that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allowed_threads() -> int:
    """Threads that one computation may use: ``OMP_NUM_THREADS`` where it is set, else all available processors.

    joblib sets it in its workers, to their part of the processors, and so does Ray: what torch and scikit-learn heed
    there, ONNX Runtime heeds in this way, and two workers on two processors do not run four threads.
    """
    # OpenMP takes a list, too: a number for each level of nesting, of which the first is meant.
    told = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    most = available_cpus()
    return min(int(told), most) if told.isdecimal() and int(told) else most


def available_memory() -> int | None:
    """Bytes of memory that are free or can be freed, within the container's limit; None where nobody tells."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) << 10
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        # What was read from files and may be dropped is counted as used.
        stat = Path("/sys/fs/cgroup/memory.stat")
        counted = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
        free = min(free, int(most) - int(used.read_text()) + int(counted.get("inactive_file", 0)))
    return max(0, free)
