"""What a figure was measured with and on."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

__all__ = ["commit", "surroundings"]

_ROOT = Path(__file__).parents[1]


def commit() -> str:
    """Name the commit of this checkout, with ``+changes`` where files differ from it; ``unknown`` outside of git."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def surroundings() -> dict[str, Any]:
    """Describe hardware, versions, date and commit."""
    return {
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version(), "torch": version("torch")},
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True)  # noqa: S603, S607 - fixed words
    return done.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                cores = cpuinfo.read_text().count("model name")
                return f"{line.partition(':')[2].strip()}, {cores} cores"
    return platform.processor() or platform.machine()
