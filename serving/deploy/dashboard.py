"""The Grafana dashboard: ``python -m serving.deploy.dashboard`` writes ``grafana-dashboard.json`` beside this file.

Grafana imports the file as it is (Dashboards, New, Import) and asks for the Prometheus data source. It is generated
because its hundreds of lines hold a dozen facts: titles, units and queries, which are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

__all__ = ["PATH", "dashboard"]

PATH = Path(__file__).with_name("grafana-dashboard.json")
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT, _A_ROW = 8, 8, 24
_OF_MODEL = '{model=~"$model"}'
_NAMED = "{{model}} {{version}}"


def _rate(metric: str, labels: str = _OF_MODEL) -> str:
    return f"rate({metric}{labels}[$__rate_interval])"


def _quantile(share: float, metric: str) -> str:
    return f"histogram_quantile({share}, sum by (le) ({_rate(f'{metric}_bucket')}))"


def _by_stage(share: float) -> dict[str, str]:
    """Ask for the time of each stage that `share` of the requests do not exceed."""
    stages = {"whole request": "request", "queue": "queue", "decode": "decode", "device, a batch": "device"}
    return {legend: _quantile(share, f"vaefeat_{stage}_seconds") for legend, stage in stages.items()}


def _by_model(query: str) -> dict[str, str]:
    return {_NAMED: f"sum by (model, version) ({query})"}


_ROWS, _PADDED = _rate("vaefeat_rows_total"), _rate("vaefeat_padded_rows_total")
#: Title, what it tells, unit, and queries by legend.
_PANELS: tuple[tuple[str, str, str, Mapping[str, str]], ...] = (
    ("Rows", "Rows embedded in a second.", "rowsps", _by_model(_ROWS)),
    (
        "Requests",
        "Answered in a second, by status.",
        "reqps",
        {"{{status}}": f"sum by (status) ({_rate('vaefeat_requests_total', '')})"},
    ),
    (
        "Refusals",
        "Requests turned away in a second, by reason.",
        "reqps",
        {"{{reason}}": f"sum by (reason) ({_rate('vaefeat_refused_total', '')})"},
    ),
    ("Latency, median", "Half of the requests take longer.", "s", _by_stage(0.5)),
    ("Latency, p99", "One request in a hundred takes longer.", "s", _by_stage(0.99)),
    (
        "Rows per batch",
        "Few under load means that batches are cut too early.",
        "short",
        {
            "mean": f"sum({_rate('vaefeat_batch_rows_sum')}) / sum({_rate('vaefeat_batch_rows_count')})",
            "median": _quantile(0.5, "vaefeat_batch_rows"),
            "p99": _quantile(0.99, "vaefeat_batch_rows"),
        },
    ),
    (
        "Padding",
        "Share of the computed rows that only filled batches up.",
        "percentunit",
        {"padding": f"sum({_PADDED}) / (sum({_ROWS}) + sum({_PADDED}))"},
    ),
    (
        "In flight",
        "Requests between their first byte and their answer, rows that wait, device lanes that compute.",
        "short",
        {
            "requests": "sum(vaefeat_in_flight)",
            "rows waiting": "sum(vaefeat_queue_rows)",
            "lanes busy": "sum(vaefeat_lanes_busy)",
        },
    ),
    (
        "Memory",
        "Of the processes, and of it what clients occupy and what waits for the device.",
        "bytes",
        {
            "resident": "sum(process_resident_memory_bytes and on (instance, job) vaefeat_in_flight)",
            "in flight": "sum(vaefeat_in_flight_bytes)",
            "waiting": "sum(vaefeat_queue_bytes)",
        },
    ),
    (
        "Drift of the mean",
        "In standard deviations of the training rows; near 0 without drift, one over the root of the rows by chance.",
        "short",
        {
            f"all latents, {_NAMED}": f"max by (model, version) (vaefeat_drift_mean_shift{_OF_MODEL})",
            f"largest, {_NAMED}": f"max by (model, version) (vaefeat_drift_largest_shift{_OF_MODEL})",
        },
    ),
    (
        "Drift of the variance",
        "Over that of the training rows; near 1 without drift.",
        "short",
        {_NAMED: f"avg by (model, version) (vaefeat_drift_variance_ratio{_OF_MODEL})"},
    ),
    (
        "Rows behind the drift",
        "Recent rows that the drift gauges rest on.",
        "short",
        {_NAMED: f"min by (model, version) (vaefeat_drift_rows{_OF_MODEL})"},
    ),
)
_VERSIONS = f"sum by (model, version, digest) (vaefeat_models_info{_OF_MODEL})"


def dashboard() -> dict[str, Any]:
    """Build the dashboard as Grafana's JSON model has it."""
    panels = [
        _panel("timeseries", number, title, tells, unit, queries)
        for number, (title, tells, unit, queries) in enumerate(_PANELS)
    ]
    return {
        "title": "vaefeat",
        "uid": "vaefeat",
        "description": "The embedding service: load, latency by stage, batching, refusals, drift, versions.",
        "tags": ["vaefeat"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source_variable(), _model_variable()]},
        "panels": [*panels, _versions(len(panels))],
    }


def _panel(kind: str, number: int, title: str, tells: str, unit: str, queries: Mapping[str, str]) -> dict[str, Any]:
    place = number * _WIDTH
    return {
        "id": number + 1,
        "type": kind,
        "title": title,
        "description": tells,
        "datasource": _SOURCE,
        "gridPos": {"x": place % _A_ROW, "y": place // _A_ROW * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + letter), "datasource": _SOURCE, "expr": query, "legendFormat": legend}
            for letter, (legend, query) in enumerate(queries.items())
        ],
    }


def _versions(number: int) -> dict[str, Any]:
    """Make the table of what is served, and by how many processes."""
    panel = _panel("table", number, "Versions", "What is served, and by how many processes.", "short", {"": _VERSIONS})
    panel["targets"][0] |= {"format": "table", "instant": True}
    panel["gridPos"]["w"] = _A_ROW
    panel["options"] = {"showHeader": True}
    hidden = {"excludeByName": {"Time": True}, "renameByName": {"Value": "processes"}}
    panel["transformations"] = [{"id": "organize", "options": hidden}]
    return panel


def _source_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _model_variable() -> dict[str, Any]:
    query = "label_values(vaefeat_models_info, model)"
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": "models"},
        "definition": query,
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


if __name__ == "__main__":
    PATH.write_bytes(orjson.dumps(dashboard(), option=orjson.OPT_INDENT_2) + b"\n")
