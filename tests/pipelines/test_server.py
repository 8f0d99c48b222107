"""A service that a job starts ends with the job, however the job ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from pipelines.server import ProcessError, running_server

CHECKOUT = Path(__file__).parents[2]


def test_service_answers_inside_and_is_gone_after(digits_bundle: Path) -> None:
    with running_server(digits_bundle, engine="local", start_timeout_s=60) as address:
        assert httpx.get(f"{address}/readyz").json()["ready"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/readyz")


def test_service_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(ProcessError, match="wanted the folder of a bundle"),
        running_server(tmp_path, engine="local", start_timeout_s=60),
    ):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_service_ends_when_its_job_is_told_to_or_killed(digits_bundle: Path, number: signal.Signals) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom pipelines.server import running_server\n"
        "with running_server(Path(sys.argv[1]), engine='local', start_timeout_s=60) as address:\n"
        "    print(address, flush=True)\n    time.sleep(300)\n"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", program, str(digits_bundle)],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert job.stdout is not None
    address = job.stdout.readline().strip()
    children = psutil.Process(job.pid).children(recursive=True)
    assert children
    assert httpx.get(f"{address}/livez").status_code == 200
    os.kill(job.pid, number)
    job.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while any(child.is_running() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(child.is_running() for child in children)
