"""What is said about measured servers: medians over rounds, ratios, targets, tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from benchmarks.serve_contenders import CONTENDERS
from benchmarks.serve_payloads import SHAPES

__all__ = ["TARGETS", "described", "ratios_of", "reached", "shown"]

#: Servers that are measured in more ways than one; the better one counts.
_WAYS = {
    "ray": ("ray", "ray_replicas"),
    "fastapi": ("fastapi", "fastapi_workers"),
    "mlserver": ("mlserver", "mlserver_workers"),
}
_PEERS = ("fastapi", "litserve", "bentoml", "mlserver", "ray_batch")
#: A client that takes more than this share of a processor may be what was measured.
_BUSY_CLIENT = 0.85

#: At least so much, of what the last line gives; seconds are at most.
TARGETS = {
    "ray_512x8_vs_inprocess": 0.90,
    "ray_64x8_vs_inprocess": 0.80,
    "ray_1x32_vs_fastapi": 3.0,
    **{f"ray_1x32_vs_{peer}": 6.0 for peer in ("litserve", "bentoml", "mlserver")},
    **{f"ray_512x8_vs_{peer}": 1.6 for peer in _PEERS},
    "local_1x32_vs_fastapi": 6.0,
    "local_64x8_vs_inprocess": 0.95,
    "local_512x8_vs_inprocess": 0.95,
    # The same of one call at a time, whose operators are cut into threads: what one calls without a second thought.
    "ray_512x8_vs_one_call": 0.90,
    "ray_64x8_vs_one_call": 0.80,
    "local_64x8_vs_one_call": 0.95,
    "local_512x8_vs_one_call": 0.95,
    # And of one process of FastAPI, as the local engine is one.
    "local_1x32_vs_fastapi_process": 6.0,
    "int8_64x8_vs_fp32": 2.0,
    "ray_oip_binary_64x8_vs_raw": 0.9,
    "ray_json_64x8_vs_mlserver": 3.0,
    "ray_jpeg_64x8_vs_decoder": 0.9,
}
_READY_S = {"local": 2.0, "ray": 25.0}


def described(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise rounds in plain values.

    Parameters
    ----------
    rounds : sequence of mapping
        Each with ``in_process`` and ``servers``, as :func:`benchmarks.serve.measure` gives them.

    Returns
    -------
    dict
        ``in_process``, ``servers``, ``ready_s``, ``ratios`` and ``reached``.
    """
    in_process = _in_process([one["in_process"] for one in rounds])
    servers = {}
    for name in dict.fromkeys(name for one in rounds for name in one["servers"]):
        found = [one["servers"][name] for one in rounds if name in one["servers"]]
        servers[name] = _server(found, in_process["encoder"])
    report: dict[str, Any] = {"in_process": in_process, "servers": servers}
    report["ready_s"] = {name: servers[name]["ready_s"] if name in servers else None for name in _READY_S}
    report["ratios"] = ratios_of(report)
    return {**report, "reached": reached(report)}


def _in_process(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    encoder: dict[str, Any] = {}
    for rows in found[0]["encoder"]:
        ways = {way: statistics.median(one["encoder"][rows][way] for one in found) for way in ("operators", "sessions")}
        best = max(ways, key=lambda way: ways[way])
        encoder[str(rows)] = {"rows_per_s": ways[best], "how": best, **ways}
    decoder = {kind: statistics.median(one["decoder"][kind] for one in found) for kind in found[0]["decoder"]}
    return {"encoder": encoder, "decoder": decoder}


def _server(found: Sequence[Mapping[str, Any]], encoder: Mapping[str, Any]) -> dict[str, Any]:
    notes = list(dict.fromkeys(note for one in found for note in one["notes"]))
    measured = [one for one in found if "ready_s" in one]
    if not measured:
        return {"notes": notes, "ready_s": None, "rss_mib": None, "workloads": {}, "open": []}
    workloads = {}
    for name in dict.fromkeys(name for one in measured for name in one["workloads"]):
        rounds = [one["workloads"][name] for one in measured if name in one["workloads"]]
        workloads[name] = summary = _workload(rounds)
        alone = encoder.get(str(rounds[0]["rows"]))
        summary["over_in_process"] = summary["rows_per_s"] / alone["rows_per_s"] if alone else None
    return {
        "notes": notes,
        "ready_s": statistics.median(one["ready_s"] for one in measured),
        "rss_mib": max(one["rss_mib"] for one in measured),
        "workloads": workloads,
        "open": _open_loop([row for one in measured for row in one["open"]]),
    }


def _workload(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def median(name: str) -> float | None:
        values = [one[name] for one in rounds if one[name] is not None]
        return statistics.median(values) if values else None

    return {
        "rows_per_s": statistics.median(one["rows"] * one["requests_per_s"] for one in rounds),
        "rounds": [one["rows"] * one["requests_per_s"] for one in rounds],
        "p50_ms": median("p50_ms"),
        "p99_ms": median("p99_ms"),
        "errors": sum(_errors(one) for one in rounds),
        "wrong": sum(one["wrong"] for one in rounds),
        "client_cpu": median("client_cpu"),
    }


def _errors(one: Mapping[str, Any]) -> int:
    failed: int = sum(n for status, n in one["statuses"].items() if status != "200")
    return failed + int(one["broken"]) + int(one["unanswered"])


def _open_loop(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Put the rounds of each shape and load together."""
    keys = dict.fromkeys((row["workload"], row["load"]) for row in rows)
    found = []
    for workload, load in keys:
        rounds = [row for row in rows if (row["workload"], row["load"]) == (workload, load)]
        found.append({"workload": workload, "load": load, **_workload(rounds)})
    return found


def ratios_of(report: Mapping[str, Any]) -> dict[str, float | None]:
    """Compute what the last line says; None where something was not measured."""
    servers, in_process = report["servers"], report["in_process"]

    def rate(server: str, workload: str) -> float | None:
        """Give rows per second of a server, or of a peer in its better way."""
        found = [servers.get(way, {}).get("workloads", {}).get(workload) for way in _WAYS.get(server, (server,))]
        return max((one["rows_per_s"] for one in found if one), default=None)

    def over(ours: float | None, other: float | None) -> float | None:
        return ours / other if ours is not None and other else None

    def alone(rows: int, way: str = "rows_per_s") -> float | None:
        found = in_process["encoder"].get(str(rows))
        return found[way] if found else None

    ratios: dict[str, float | None] = {}
    for engine in ("ray", "local"):
        for rows in (512, 64):
            ratios[f"{engine}_{rows}x8_vs_inprocess"] = over(rate(engine, f"{rows}x8"), alone(rows))
            ratios[f"{engine}_{rows}x8_vs_one_call"] = over(rate(engine, f"{rows}x8"), alone(rows, "operators"))
        for shape in ("1x32", "512x8"):
            for peer in _PEERS:
                ratios[f"{engine}_{shape}_vs_{peer}"] = over(rate(engine, shape), rate(peer, shape))
        ratios[f"{engine}_oip_binary_64x8_vs_raw"] = over(rate(engine, "oip_binary_64x8"), rate(engine, "64x8"))
        # MLServer speaks nothing but JSON: its plain shapes are JSON too.
        ratios[f"{engine}_json_64x8_vs_mlserver"] = over(rate(engine, "json_64x8"), rate("mlserver", "64x8"))
        for kind in ("jpeg", "png"):
            ratios[f"{engine}_{kind}_64x8_vs_decoder"] = over(
                rate(engine, f"{kind}_64x8"), in_process["decoder"].get(kind)
            )
    process = servers.get("fastapi", {}).get("workloads", {}).get("1x32")
    ratios["local_1x32_vs_fastapi_process"] = over(rate("local", "1x32"), process and process["rows_per_s"])
    ratios["int8_64x8_vs_fp32"] = over(rate("local_int8", "64x8"), rate("local", "64x8"))
    return ratios


def reached(report: Mapping[str, Any]) -> dict[str, bool | None]:
    """Compare with the targets; None where something was not measured."""
    found: dict[str, bool | None] = {}
    for name, target in TARGETS.items():
        ratio = report["ratios"][name]
        found[name] = None if ratio is None else ratio >= target
    for engine, limit in _READY_S.items():
        seconds = report["ready_s"][engine]
        found[f"{engine}_ready_s"] = None if seconds is None else seconds <= limit
    return found


def shown(results: Mapping[str, Any]) -> Group:
    """Show everything that was measured, for people."""
    return Group(*_shown(results))


def _shown(results: Mapping[str, Any]) -> Iterator[Table | Text]:
    names = [shape.name for shape in SHAPES]
    others = {name for server in results["servers"].values() for name in server["workloads"] if name not in names}
    for name in (*names, *sorted(others)):
        if any(name in server["workloads"] for server in results["servers"].values()):
            yield _table(name, results)
    if any(server["open"] for server in results["servers"].values()):
        yield _open_table(results["servers"])
    for name, server in results["servers"].items():
        ready = "" if server["ready_s"] is None else f"ready in {server['ready_s']:.1f} s. "
        if text := ready + "; ".join(server["notes"]):
            yield Text(f"{CONTENDERS[name].title}: {text}")
    for kind, rate in results["in_process"]["decoder"].items():
        yield Text(f"{kind}: the decoder alone reads {rate:,.0f} images/s")
    if any(_is_busy(one) for server in results["servers"].values() for one in server["workloads"].values()):
        yield Text(f"* the client took more than {_BUSY_CLIENT:.0%} of a processor: the server may do more")


def _table(name: str, results: Mapping[str, Any]) -> Table:
    table = Table(title=name, title_justify="left", box=None, pad_edge=False)
    table.add_column("rows a request x in flight", no_wrap=True)
    for column in ("rows/s", "p50 ms", "p99 ms", "errors", "wrong", "MiB", "of in-process"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = name.rpartition("_")[2].partition("x")[0]
    if (alone := results["in_process"]["encoder"].get(rows)) is not None:
        table.add_row("ONNX Runtime in process, a session for each thread", f"{alone['sessions']:,.0f}")
        table.add_row("ONNX Runtime in process, one call in all threads", f"{alone['operators']:,.0f}")
    for key, server in results["servers"].items():
        one = server["workloads"].get(name)
        if one is None:
            continue
        share = f"{one['over_in_process']:.2f}" if one["over_in_process"] is not None else ""
        table.add_row(
            CONTENDERS[key].title,
            f"{one['rows_per_s']:,.0f}{'*' if _is_busy(one) else ''}",
            _ms(one["p50_ms"]),
            _ms(one["p99_ms"]),
            str(one["errors"]),
            str(one["wrong"]),
            f"{server['rss_mib']:,.0f}",
            share,
        )
    return table


def _open_table(servers: Mapping[str, Any]) -> Table:
    table = Table(title="open loop", title_justify="left", box=None, pad_edge=False)
    table.add_column("server", no_wrap=True)
    for column in ("shape", "of capacity", "rows/s", "p50 ms", "p99 ms", "errors", "wrong"):
        table.add_column(column, justify="right", no_wrap=True)
    for key, server in servers.items():
        for row in server["open"]:
            figures = (f"{row['rows_per_s']:,.0f}", _ms(row["p50_ms"]), _ms(row["p99_ms"]))
            wrong = (str(row["errors"]), str(row["wrong"]))
            table.add_row(CONTENDERS[key].title, row["workload"], f"{row['load']:g}", *figures, *wrong)
    return table


def _is_busy(one: Mapping[str, Any]) -> bool:
    return bool(one["client_cpu"] > _BUSY_CLIENT)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}"
