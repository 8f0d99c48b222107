from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from serving.deploy.dashboard import PATH, dashboard
from serving.watching.drift import Drift
from serving.watching.metrics import Metrics


@pytest.fixture(scope="module")
def told() -> dict[str, set[str]]:
    """Give the names of all samples that are exported, with their labels."""
    metrics = Metrics(routes=["/v1/embed"])
    metrics.watch(
        queue_rows=lambda: 0,
        queue_bytes=lambda: 0,
        in_flight=lambda: 0,
        in_flight_bytes=lambda: 0,
        lanes_busy=lambda: 0,
    )
    drift = Drift(mean=np.zeros(2), variance=np.ones(2))
    drift.update(np.array([[0, 2], [2, 0]], dtype=np.float32))
    model = metrics.model("digits", digest="sha256:" + "0" * 64, drift=drift)
    model.answered("/v1/embed", 200, total_s=0.3, queue_s=0.1, decode_s=0.01)
    model.computed(rows=1, padded_rows=0, device_s=0.1)
    metrics.refused("overloaded")
    samples = [sample for family in parse(metrics.render()[0].decode()) for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


def queries(panel: dict[str, Any]) -> list[str]:
    return [target["expr"] for target in panel["targets"]]


def test_dashboard_file_is_what_the_generator_writes() -> None:
    assert orjson.loads(PATH.read_bytes()) == dashboard(), "run python -m serving.deploy.dashboard"


def test_dashboard_asks_only_for_metrics_and_labels_that_are_exported(told: dict[str, set[str]]) -> None:
    variables = dashboard()["templating"]["list"]
    asked = [query for panel in dashboard()["panels"] for query in queries(panel)]
    for query in [*asked, variables[1]["definition"]]:
        names = set(re.findall(r"\b(?:vaefeat|process)_\w+", query))
        assert names
        assert names <= told.keys(), query
        labels = {*re.findall(r"(\w+)=~", query)}
        for group in re.findall(r"by \(([^)]*)\)", query):
            labels |= set(group.split(", "))
        assert all(labels <= told[name] for name in names if "{" in query or "by" in query), query


def test_dashboard_shows_each_of_our_metrics(told: dict[str, set[str]]) -> None:
    text = PATH.read_text()
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in told if name.startswith("vaefeat_")}
    assert [name for name in sorted(ours) if name not in text] == []


def test_page_on_watching_lists_each_of_our_metrics_and_no_other(told: dict[str, set[str]]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "watching.md").read_text()
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in told if name.startswith("vaefeat_")}
    assert set(re.findall(r"vaefeat_\w+", page)) == ours


def test_dashboard_of_queries_has_balanced_brackets_and_panels_that_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    for query in [query for panel in panels for query in queries(panel)]:
        assert all(query.count(left) == query.count(right) for left, right in ("()", "{}", "[]"))
    covered = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(covered) == len(set(covered))
    assert max(x for x, _ in covered) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)
