"""Environment variables that Ray reads: when it is imported, and in every process that it starts."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["CHECKOUT", "prepare_environment"]

CHECKOUT = Path(__file__).resolve().parent.parent


def prepare_environment(address: str, *, timeout_s: float = 120.0) -> None:
    """Set this process's environment for Ray; must run before Ray is imported.

    Parameters
    ----------
    address : str
        ``local`` for a Ray of the job's own, else a cluster's.
    timeout_s : float
        For Ray Train's workers to start, four times over.
    """
    os.environ.update(
        {
            # Workers must find this package, from wherever the job was started.
            "PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")])),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Threads of Ray Data that are at work while Ray shuts down would start another one, open to everybody.
            "RAY_ENABLE_AUTO_CONNECT": "0",
            # It prints a stack trace for the SIGTERM that is an ordinary way to stop.
            "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
            "RAY_TRAIN_V2_ENABLED": "1",
            "RAY_TRAIN_METRICS_ENABLED": "0",
            # After which Ray Train counts anew what there is: it learns late of machines that are gone.
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{timeout_s / 4:g}",
            # How soon a lost worker is noticed.
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        }
    )
    if address != "local":
        return
    # A Ray of the job's own, on one machine, whatever cluster the person works with otherwise.
    for variable in ("RAY_ADDRESS", "RAY_NAMESPACE", "RAY_REDIS_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        os.environ.pop(variable, None)
    os.environ.update(
        {
            # Named for other systems, but it decides on Linux too whether Ray takes the loopback address for its own
            # and binds its servers to it; Ray replaces an address of 127.0.0.1 that it is given.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # Fixed ports by default, which a second job on this machine would not get.
            "AUTOSCALER_METRIC_PORT": "0",
            "DASHBOARD_METRIC_PORT": "0",
            # What a dashboard would show, and there is none.
            "RAY_enable_metrics_collection": "0",
            "RAY_task_events_report_interval_ms": "0",
        }
    )
