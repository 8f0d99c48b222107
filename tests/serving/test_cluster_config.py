"""What is shipped for clusters, against the schemas of Ray Serve, Kubernetes and the service."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve import Application
from ray.serve._private.http_util import validate_http_proxy_callback_return
from ray.serve.config import gRPCOptions
from ray.serve.schema import ServeDeploySchema

from serving.cluster import ClusterArgs, ClusterReplica, build
from serving.errors import ModelError, SetupError
from serving.guard.middleware import guards
from serving.models import Models
from serving.protocols.oip_grpc import InferenceServicer
from serving.served_model import Place
from serving.service import Service
from serving.settings import Limits

DEPLOY = Path(__file__).parents[2] / "serving" / "deploy"
#: What a RayService of KubeRay 1.6 may hold, where this one holds something; pods are Kubernetes's own.
FIELDS = {
    "RayServiceSpec": {
        "upgradeStrategy",
        "rayClusterDeletionDelaySeconds",
        "excludeHeadPodFromServeSvc",
        "serveConfigV2",
        "rayClusterConfig",
    },
    "RayClusterSpec": {"rayVersion", "authOptions", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"},
    "HeadGroupSpec": {"serviceType", "enableIngress", "rayStartParams", "template"},
    "WorkerGroupSpec": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}


def serve_config() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    return config


@pytest.fixture(scope="module")
def documents() -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "rayservice.yaml").read_text())}


def pods(documents: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    cluster = documents["RayService"]["spec"]["rayClusterConfig"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def with_changes(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Change the one deployment of a config."""
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    return {**config, "applications": [{**application, "deployments": [{**deployment, **changes}]}]}


def check(config: dict[str, Any]) -> ServeDeploySchema:
    """Refuse what Serve refuses, and also the names that it would only leave out."""
    schema = ServeDeploySchema.model_validate(config)
    assert set(config) <= set(ServeDeploySchema.model_fields)
    for section, model in [("http_options", schema.http_options), ("grpc_options", schema.grpc_options)]:
        assert set(config[section]) <= set(type(model).model_fields), section
    (application,) = schema.applications
    (deployment,) = application.deployments
    told = config["applications"][0]
    assert set(told) <= set(type(application).model_fields)
    assert set(told["deployments"][0]) <= set(type(deployment).model_fields)
    assert deployment.name == "embedding"
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    return schema


def test_serve_config_is_one_that_serve_takes_and_build_builds() -> None:
    schema = check(serve_config())
    args = ClusterArgs.model_validate(schema.applications[0].args)
    assert isinstance(build(args), Application)
    # Those that a person reads there are those that would hold without them.
    assert (args.limits.max_body_bytes, args.limits.max_rows) == (Limits().max_body_bytes, Limits().max_rows)
    assert args.keys is not None


def test_serve_config_gives_replicas_time_for_what_they_have() -> None:
    schema = check(serve_config())
    limits = Limits()
    (deployment,) = schema.applications[0].deployments
    assert deployment.graceful_shutdown_timeout_s >= 30 + limits.compute_timeout_s
    assert deployment.max_surge_percent > 0, "old replicas would stop before new ones start"
    assert deployment.max_ongoing_requests > limits.max_in_flight
    for options in (schema.http_options, schema.grpc_options):
        assert options.request_timeout_s is not None
        assert options.request_timeout_s > limits.compute_timeout_s + limits.body_timeout_s


def test_serve_s_grpc_calls_are_methods_of_the_replica() -> None:
    options = check(serve_config()).grpc_options
    registered: list[str] = []

    class Server:
        def add_generic_rpc_handlers(self, handlers: Any) -> None:
            registered.extend(method for handler in handlers for method in handler._method_handlers)

        def add_registered_method_handlers(self, name: str, handlers: Any) -> None:
            pass

    for add in gRPCOptions(**options.model_dump()).grpc_servicer_func_callable:
        add(ClusterReplica, Server())
    assert len(registered) == 8
    for method in registered:
        call = getattr(ClusterReplica, method.rpartition("/")[2])
        assert {"request", "grpc_context"} <= set(inspect.signature(call).parameters)
    assert inspect.isasyncgenfunction(ClusterReplica.Watch)
    assert {name for name in vars(InferenceServicer) if name[0].isupper()} <= {m.rpartition("/")[2] for m in registered}


def test_kubernetes_gets_the_same_config_with_half_a_gpu(documents: dict[str, dict[str, Any]]) -> None:
    shipped = yaml.safe_load(documents["RayService"]["spec"]["serveConfigV2"])
    check(shipped)
    config = with_changes(serve_config(), ray_actor_options={"num_cpus": 2, "num_gpus": 0.5})
    config["applications"][0]["args"]["device"] = "cuda"
    assert shipped == config


def test_ray_service_holds_fields_of_kuberay_alone(documents: dict[str, dict[str, Any]]) -> None:
    spec = documents["RayService"]["spec"]
    cluster = spec["rayClusterConfig"]
    assert set(spec) == FIELDS["RayServiceSpec"]
    assert set(cluster) == FIELDS["RayClusterSpec"]
    assert set(cluster["headGroupSpec"]) == FIELDS["HeadGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        assert set(group) == FIELDS["WorkerGroupSpec"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for parameters in (cluster["headGroupSpec"]["rayStartParams"], cluster["workerGroupSpecs"][0]["rayStartParams"]):
        assert all(isinstance(value, str) for value in parameters.values())


def test_every_pod_has_the_environment_the_bundles_and_the_keys(documents: dict[str, dict[str, Any]]) -> None:
    environment, name = documents["ConfigMap"]["data"], documents["ConfigMap"]["metadata"]["name"]
    config = yaml.safe_load(documents["RayService"]["spec"]["serveConfigV2"])
    args = ClusterArgs.model_validate(config["applications"][0]["args"])
    assert all(isinstance(value, str) for value in environment.values())
    assert environment["VAEFEAT_KEYS"] == str(args.keys)
    assert int(environment["VAEFEAT_MAX_BODY_BYTES"]) == args.limits.max_body_bytes
    assert int(environment["RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"]) == args.limits.max_body_bytes
    assert environment["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == f"{guards.__module__}.{guards.__name__}"
    for pod in pods(documents):
        (container,) = pod["spec"]["containers"]
        assert container["envFrom"] == [{"configMapRef": {"name": name}}]
        mounts = {Path(mount["mountPath"]): mount for mount in container["volumeMounts"]}
        assert args.keys is not None
        assert {*args.bundles, args.keys.parent} == set(mounts)
        assert all(mount["readOnly"] for mount in mounts.values())
        (keys,) = [volume["secret"] for volume in pod["spec"]["volumes"] if "secret" in volume]
        assert keys["defaultMode"] & 0o007 == 0
        assert pod["spec"]["securityContext"]["runAsNonRoot"]


def test_from_outside_only_the_service_s_ports_are_open(documents: dict[str, dict[str, Any]]) -> None:
    policy, cluster = documents["NetworkPolicy"]["spec"], documents["RayService"]["spec"]["rayClusterConfig"]
    labels = policy["podSelector"]["matchLabels"].items()
    assert all(labels <= pod["metadata"]["labels"].items() for pod in pods(documents))
    for_all = [port["port"] for rule in policy["ingress"] if "from" not in rule for port in rule["ports"]]
    assert for_all == [8000, 9000]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not cluster["headGroupSpec"]["enableIngress"]


def test_gpu_pods_hold_two_replicas(documents: dict[str, dict[str, Any]]) -> None:
    shipped = check(yaml.safe_load(documents["RayService"]["spec"]["serveConfigV2"]))
    options = shipped.applications[0].deployments[0].ray_actor_options
    *_, pod = pods(documents)
    limits = pod["spec"]["containers"][0]["resources"]["limits"]
    assert options.num_gpus is not None
    assert options.num_cpus is not None
    assert int(limits["nvidia.com/gpu"]) >= 2 * options.num_gpus
    assert int(limits["cpu"]) >= 2 * options.num_cpus


def test_serve_takes_the_guard() -> None:
    assert len(validate_http_proxy_callback_return(guards())) == 1


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"bundles": []}, "bundles"),
        ({"bundles": ["/b"]}, "keys"),
        ({"bundles": ["/b"], "keys": "/k", "insecure": True}, "keys"),
        ({"bundles": ["/b"], "keys": "/k", "replicas": 2}, "replicas"),
        ({"bundles": ["/b"], "keys": "/k", "limits": {"max_row": 2}}, "max_row"),
        ({"bundles": ["/b"], "keys": "/k", "device": "tpu"}, "device"),
        ({"bundles": ["/b"], "keys": "/k", "threads": 0}, "threads"),
    ],
)
def test_cluster_args_that_make_no_sense_are_refused_by_name(args: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        ClusterArgs.model_validate(args)


def test_cluster_args_with_a_limit_that_is_not_positive_are_refused() -> None:
    with pytest.raises(SetupError, match="max_rows"):
        ClusterArgs.model_validate({"bundles": ["/b"], "insecure": True, "limits": {"max_rows": 0}})


def test_a_replica_whose_service_has_failed_is_unhealthy(digits_bundle: Path) -> None:
    replica = ClusterReplica(ClusterArgs(bundles=[digits_bundle], insecure=True))
    replica.check_health()
    models = Models.from_bundles([digits_bundle], place=Place(device="cpu"))
    replica._service = Service(models, Limits(), lanes=1)
    replica.check_health()
    replica._service.fail("the device is gone")
    with pytest.raises(ModelError, match="the device is gone"):
        replica.check_health()
