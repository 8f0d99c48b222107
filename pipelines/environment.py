"""What a job ran on and with: versions, machine, commit; and the files in its folder that say so."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import tomli_w

from pipelines.config import RunConfig
from vaefeat.atomic import replace_file
from vaefeat.processors import available_cpus

__all__ = ["CONFIG_FILE", "ENVIRONMENT_FILE", "describe", "versions", "write_description"]

CONFIG_FILE = "config.toml"
ENVIRONMENT_FILE = "environment.json"
_REQUIREMENTS_FILE = "requirements.txt"
#: Those that results depend on.
_LIBRARIES = (
    "vaefeat",
    "numpy",
    "scikit-learn",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "ray",
)
_CHECKOUT = Path(__file__).parents[1]


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def describe() -> dict[str, Any]:
    """Tell where and with what this process runs.

    Returns
    -------
    dict
        ``date`` (UTC), ``commit`` (None outside a checkout; ending in ``+changes`` where files differ from it),
        ``system``, ``processor``, ``processors``, ``memory_bytes``, ``gpus``, ``versions``.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "system": platform.platform(),
        "processor": _processor(),
        "processors": available_cpus(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpus": _gpus(),
        "versions": versions(),
    }


def write_description(config: RunConfig, folder: Path) -> None:
    """Write into a job's folder what it takes to do the job again.

    ``config.toml`` is the configuration as it was resolved, with absolute paths: ``python -m pipelines run`` takes it.
    ``environment.json`` is what :func:`describe` tells, ``requirements.txt`` every installed distribution.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / CONFIG_FILE, tomli_w.dumps(config.everywhere().to_dict()).encode())
    replace_file(folder / ENVIRONMENT_FILE, f"{json.dumps(describe(), indent=1)}\n".encode())
    installed = sorted({f"{found.name}=={found.version}" for found in distributions()}, key=str.lower)
    replace_file(folder / _REQUIREMENTS_FILE, ("\n".join(installed) + "\n").encode())


def _commit() -> str | None:
    git = shutil.which("git")
    if git is None or not (_CHECKOUT / ".git").exists():
        return None

    def ask(*words: str) -> str:
        told = subprocess.run(  # noqa: S603 - git itself, with words of ours
            [git, "-C", str(_CHECKOUT), *words], capture_output=True, text=True, check=False
        )
        return told.stdout.strip() if told.returncode == 0 else ""

    commit = ask("rev-parse", "HEAD")
    return (commit + "+changes" * bool(ask("status", "--porcelain", "--untracked-files=no"))) or None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
