from __future__ import annotations

from bisect import bisect_left

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as TheirHistogram
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from serving.watching.drift import Drift
from serving.watching.metrics import Histogram, Metrics

DIGEST = "sha256:" + "0123456789abcdef" * 4
MODEL = {"model": "digits", "version": "0123456789ab"}


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics(routes=["/v1/embed", "/readyz"])
    metrics.watch(
        queue_rows=lambda: 7,
        queue_bytes=lambda: 700,
        in_flight=lambda: 3,
        in_flight_bytes=lambda: 900,
        lanes_busy=lambda: 1,
    )
    return metrics


def told(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample, as Prometheus' own parser reads it."""
    body, kind = metrics.render()
    assert kind.startswith("text/plain; version=0.0.4")
    families: list[Metric] = list(parse_text(body.decode()))
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def labelled(**labels: str) -> frozenset[tuple[str, str]]:
    return frozenset(labels.items())


def test_metrics_count_requests_by_route_status_and_model(metrics: Metrics) -> None:
    model = metrics.model("digits", digest=DIGEST)
    for status in (200, 200, 422):
        model.answered("/v1/embed", status, total_s=0.3, queue_s=0.1, decode_s=0.01)
    metrics.answered("/readyz", 200)
    metrics.answered("/v1/embed", 404)
    found = told(metrics)
    counts = {labels: count for (name, labels), count in found.items() if name == "vaefeat_requests_total"}
    assert counts == {
        labelled(route="/v1/embed", status="200", **MODEL): 2,
        labelled(route="/v1/embed", status="422", **MODEL): 1,
        labelled(route="/readyz", status="200", model="", version=""): 1,
        labelled(route="/v1/embed", status="404", model="", version=""): 1,
    }
    assert found["vaefeat_request_seconds_count", labelled(route="/v1/embed", **MODEL)] == 3
    assert found["vaefeat_request_seconds_sum", labelled(route="/v1/embed", **MODEL)] == pytest.approx(0.9)
    assert found["vaefeat_queue_seconds_sum", labelled(**MODEL)] == pytest.approx(0.3)
    assert found["vaefeat_decode_seconds_bucket", labelled(le="0.01", **MODEL)] == 3
    assert found["vaefeat_decode_seconds_bucket", labelled(le="0.005", **MODEL)] == 0


def test_metrics_count_batches_rows_padding_refusals_and_gauges(metrics: Metrics) -> None:
    model = metrics.model("digits", digest=DIGEST)
    model.computed(rows=5, padded_rows=3, device_s=0.002)
    model.computed(rows=8, padded_rows=0, device_s=0.003)
    for reason in ("overloaded", "too_large", "overloaded"):
        metrics.refused(reason)
    found = told(metrics)
    assert found["vaefeat_rows_total", labelled(**MODEL)] == 13
    assert found["vaefeat_padded_rows_total", labelled(**MODEL)] == 3
    assert found["vaefeat_batch_rows_bucket", labelled(le="8.0", **MODEL)] == 2
    assert found["vaefeat_batch_rows_bucket", labelled(le="4.0", **MODEL)] == 0
    assert found["vaefeat_device_seconds_sum", labelled(**MODEL)] == pytest.approx(0.005)
    assert found["vaefeat_refused_total", labelled(reason="overloaded")] == 2
    assert found["vaefeat_models_info", labelled(digest=DIGEST, **MODEL)] == 1
    gauges = {"queue_rows": 7, "queue_bytes": 700, "in_flight": 3, "in_flight_bytes": 900, "lanes_busy": 1}
    assert {name: found[f"vaefeat_{name}", frozenset()] for name in gauges} == gauges
    assert found["process_resident_memory_bytes", frozenset()] > 1e6


def test_metrics_of_unknown_routes_share_one_label(metrics: Metrics) -> None:
    model = metrics.model("digits", digest=DIGEST)
    for number in range(1000):
        metrics.answered(f"/made/up/{number}", 404)
        model.answered(f"/made/up/{number}", 200, total_s=0.1, queue_s=0.0, decode_s=0.0)
    found = told(metrics)
    assert found["vaefeat_requests_total", labelled(route="other", status="404", model="", version="")] == 1000
    assert found["vaefeat_request_seconds_count", labelled(route="other", **MODEL)] == 1000
    assert len(metrics.render()[0].splitlines()) < 300


def test_metrics_of_a_forgotten_version_are_gone_and_of_one_loaded_again_go_on(metrics: Metrics) -> None:
    old = metrics.model("digits", digest=DIGEST)
    new = metrics.model("digits", digest="sha256:" + "f" * 64)
    old.computed(rows=1, padded_rows=0, device_s=0.1)
    new.computed(rows=2, padded_rows=0, device_s=0.1)
    assert metrics.model("digits", digest=DIGEST) is old
    metrics.forget(old)
    rows = {labels: count for (name, labels), count in told(metrics).items() if name == "vaefeat_rows_total"}
    assert rows == {labelled(model="digits", version="f" * 12): 2}


def test_metrics_with_drift_tell_it_once_there_are_rows(metrics: Metrics) -> None:
    drift = Drift(mean=np.zeros(2), variance=np.ones(2))
    metrics.model("digits", digest=DIGEST, drift=drift)
    assert not any(name.startswith("vaefeat_drift") for name, _ in told(metrics))
    drift.update(np.array([[0, 2], [2, 0], [0, 2], [2, 0]], dtype=np.float32))
    found = told(metrics)
    assert found["vaefeat_drift_mean_shift", labelled(**MODEL)] == pytest.approx(1.0, rel=1e-3)
    assert found["vaefeat_drift_largest_shift", labelled(**MODEL)] == pytest.approx(1.0, rel=1e-3)
    assert found["vaefeat_drift_variance_ratio", labelled(**MODEL)] == pytest.approx(4 / 3, rel=1e-3)
    assert found["vaefeat_drift_rows", labelled(**MODEL)] == pytest.approx(4.0, rel=1e-3)


@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=1.0.0,text/plain;q=0.5", "a/b;version=x"])
def test_metrics_in_either_form_are_read_by_its_parser(metrics: Metrics, accept: str) -> None:
    model = metrics.model('odd "name"\\', digest=DIGEST)
    model.answered("/v1/embed", 200, total_s=0.3, queue_s=0.1, decode_s=0.01)
    body, kind = metrics.render(accept)
    parse = parse_openmetrics if kind.startswith("application/openmetrics-text") else parse_text
    assert kind.startswith("application/openmetrics-text") == ("openmetrics" in accept)
    samples = [sample for family in parse(body.decode()) for sample in family.samples]
    assert 'odd "name"\\' in {sample.labels.get("model") for sample in samples}


def test_metrics_of_a_replica_carry_its_name_everywhere() -> None:
    metrics = Metrics(routes=["/v1/embed"], replica="r1")
    metrics.model("digits", digest=DIGEST).computed(rows=1, padded_rows=0, device_s=0.1)
    found = told(metrics)
    assert all(("replica", "r1") in labels for _, labels in found)
    assert found["vaefeat_rows_total", labelled(replica="r1", **MODEL)] == 1


@given(st.lists(st.floats(0.0, 20.0) | st.sampled_from([1.0, 2.0, 5.0])))
def test_histogram_of_any_values_agrees_with_prometheus_client(values: list[float]) -> None:
    bounds = (1.0, 2.0, 5.0)
    ours, registry = Histogram(bounds), CollectorRegistry()
    theirs = TheirHistogram("seconds", "-", buckets=bounds, registry=registry)
    for value in values:
        ours.observe(value)
        theirs.observe(value)
    reached = np.cumsum(ours.counts)
    for bound, count in zip((*bounds, "+Inf"), reached, strict=True):
        assert registry.get_sample_value("seconds_bucket", {"le": str(bound)}) == count
    assert registry.get_sample_value("seconds_sum") == pytest.approx(ours.total)
    assert ours.counts == np.bincount([bisect_left(bounds, value) for value in values], minlength=4).tolist()
