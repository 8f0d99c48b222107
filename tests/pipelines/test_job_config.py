"""What is shipped for clusters, against KubeRay's names and the job's own command line."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from pipelines.__main__ import app
from pipelines.embedding.storage import Place

DEPLOY = Path(__file__).parents[2] / "pipelines" / "deploy"
#: What a RayJob of KubeRay 1.6 may hold, where this one holds something; pods are Kubernetes's own.
FIELDS = {
    "RayJobSpec": {
        "entrypoint",
        "submissionMode",
        "backoffLimit",
        "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished",
        "rayClusterSpec",
    },
    "RayClusterSpec": {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"},
    "HeadGroupSpec": {"serviceType", "enableIngress", "rayStartParams", "template"},
    "WorkerGroupSpec": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
    return document


def test_ray_job_holds_fields_of_kuberay_alone(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    assert set(spec) == FIELDS["RayJobSpec"]
    assert spec["submissionMode"] == "K8sJobMode"
    assert set(cluster) == FIELDS["RayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert set(cluster["headGroupSpec"]) == FIELDS["HeadGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        assert set(group) == FIELDS["WorkerGroupSpec"]
        # Encoders are counted once, when the job begins.
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]


def test_ray_job_s_command_is_one_that_the_job_takes(job: dict[str, Any]) -> None:
    python, dash_m, module, verb, *words = shlex.split(job["spec"]["entrypoint"])
    assert (python, dash_m, module, verb) == ("python", "-m", "pipelines", "embed")
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]  # a group of commands
    given = command.make_context(verb, words).params
    assert given["address"] == "auto"
    for name in ("data", "out"):
        assert Place(f"{given[name]}?region=eu-west-1").local is None
    for pod in pods(job):
        (container,) = pod["spec"]["containers"]
        (mount,) = container["volumeMounts"]
        assert given["bundle"].is_relative_to(mount["mountPath"])
        assert mount["readOnly"]


def test_every_pod_is_unprivileged_and_the_head_has_no_encoders(job: dict[str, Any]) -> None:
    head, *workers = pods(job)
    for pod in (head, *workers):
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert workers


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
