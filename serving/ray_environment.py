"""Environment variables that Ray reads: when it is imported, and in every process that it starts."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["prepare_environment"]

_CHECKOUT = Path(__file__).resolve().parent.parent


def prepare_environment() -> None:
    """Set this process's environment for Ray; must run before Ray is imported."""
    # A service starts a Ray of its own, on one machine, whatever cluster the person works with otherwise.
    for variable in ("RAY_ADDRESS", "RAY_NAMESPACE", "RAY_REDIS_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        os.environ.pop(variable, None)
    os.environ.update(
        {
            # Ray's processes must find this package, from wherever it was started.
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_CHECKOUT), os.environ.get("PYTHONPATH")])),
            # Named for other systems, but it decides on Linux too whether Ray takes the loopback address for its own
            # and binds its servers to it; Ray replaces an address of 127.0.0.1 that it is given.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # Fixed ports by default, which a second service on this machine would not get.
            "AUTOSCALER_METRIC_PORT": "0",
            "DASHBOARD_METRIC_PORT": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            # A call that comes while Ray shuts down would start another one, open to everybody.
            "RAY_ENABLE_AUTO_CONNECT": "0",
            # It prints a stack trace for the SIGTERM that is our ordinary way to stop.
            "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
            # Both bind to every interface.
            "RAY_SERVE_ENABLE_HA_PROXY": "0",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0",
        }
    )
