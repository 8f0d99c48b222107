"""Measures with wrk, a client in C that takes a small part of the processor that our own takes.

A closed loop on one machine shares its processors between server and client: with a client in Python a server of small
requests is measured half. wrk is in the distributions (``apt-get install wrk``); where it is not installed,
:mod:`benchmarks.load` measures, and the results say so. It does not look at answers, so that load does, before.

References
----------
https://github.com/wg/wrk
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["WRK", "run_wrk"]

#: Where it is; None where it is not installed.
WRK = shutil.which("wrk")
_SCRIPT = """
wrk.method = "POST"
local file = io.open({body}, "rb")
wrk.body = file:read("*all")
file:close()
{headers}
function done(summary, latency, requests)
    local errors = summary.errors
    io.write(string.format(
        '\\nfound {{"requests": %d, "seconds": %f, "refused": %d, "broken": %d, "unanswered": %d, '
        .. '"p50_ms": %f, "p99_ms": %f}}\\n',
        summary.requests, summary.duration / 1e6, errors.status, errors.connect + errors.read + errors.write,
        errors.timeout, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
"""


def run_wrk(
    url: str, body: Path, headers: Sequence[str], *, connections: int, seconds: float, warm_up_s: float
) -> dict[str, Any]:
    """Post one body again and again, each connection when its last request is answered.

    Parameters
    ----------
    url : str
    body : Path
    headers : sequence of str
        Lines.
    connections : int
    seconds, warm_up_s : float
        What is measured, and what comes before; wrk counts whole seconds, at least one of each.

    Returns
    -------
    dict
        As :mod:`benchmarks.load` prints it, but for what wrk does not look at.
    """
    named = [header.split(": ", 1) for header in headers]
    lines = "\n".join(f"wrk.headers[{_lua(name)}] = {_lua(value)}" for name, value in named)
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "post.lua"
        script.write_text(_SCRIPT.format(body=_lua(str(body)), headers=lines))
        _run(url, script, connections, warm_up_s)
        before, began = _children_s(), time.perf_counter()
        found = _run(url, script, connections, seconds)
        cpu = (_children_s() - before) / (time.perf_counter() - began)
    good = found["requests"] - found["refused"]
    statuses = {"200": good} | ({"refused": found["refused"]} if found["refused"] else {})
    return {
        "requests_per_s": good / found["seconds"],
        "statuses": statuses,
        "client_cpu": cpu,
        **{name: found[name] for name in ("p50_ms", "p99_ms", "broken", "unanswered")},
    }


def _run(url: str, script: Path, connections: int, seconds: float) -> dict[str, Any]:
    assert WRK is not None
    words = [WRK, "--threads", "1", "--connections", str(connections), "--duration", f"{max(1, round(seconds))}s"]
    command = [*words, "--timeout", "30s", "--script", str(script), url]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - wrk with our script
    line = re.search(r"^found (.*)$", done.stdout, re.MULTILINE)
    if done.returncode or line is None:
        raise RuntimeError(f"wrk failed with status {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}")
    return json.loads(line[1])  # type: ignore[no-any-return]  # what the script writes


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _lua(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
