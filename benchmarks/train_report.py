"""What is said about measured trainings: summaries over rounds, ratios, tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from benchmarks.train_tasks import OURS_TO_BOUND, SCALES, Part

__all__ = ["Found", "described", "ratios_of", "shown"]

#: What contenders gave: by part, by key, one for each round.
Found = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
_NAMES = {"dataloader": "PyTorch's example", "vaefeat": "vaefeat", "pythae": "pythae"}
#: Of the parts with a limit, the one whose share of it stands in the last line.
_MFU_PART = "mlp_b512"


def described(found: Found, parts: Iterable[Part]) -> dict[str, Any]:
    """Summarise rounds in plain values.

    Returns
    -------
    dict
        ``rates`` and ``limits`` (lists), ``time_to_elbo``, ``scaling``, ``grid``, ``not_measured`` and ``ratios``; None
        or empty where a part was left out.
    """
    report: dict[str, Any] = {"rates": [], "limits": [], "time_to_elbo": None, "scaling": [], "grid": None}
    report["not_measured"] = [f"{part.name}, {note}" for part in parts for note in part.notes]
    for part in parts:
        measured = found[part.name]
        if not all(measured.values()):
            report["not_measured"].append(f"{part.name}: not measured: no time was left")
        elif part.name == "time_to_elbo":
            report["time_to_elbo"] = _time_to_elbo(part, measured)
        elif part.name == "scaling":
            report["scaling"] = [_scaled(int(key), rounds) for key, rounds in measured.items()]
        elif part.name == "grid":
            (grid,) = measured["grid"]
            report["grid"] = {**grid, "speed_up": grid["alone_s"] / grid["together_s"]}
        else:
            report["rates"] += _rates(part, measured)
            report["limits"] += [
                {"part": part.name, "step_gflop": rounds[0]["step_gflop"], "gflops": _limit_gflops(rounds)}
                for key, rounds in measured.items()
                if key == "limit"
            ]
    return {**report, "ratios": ratios_of(report)}


def ratios_of(report: Mapping[str, Any]) -> dict[str, float | None]:
    """Compute what the last line says; None where something was not measured.

    ``conv_vs_pythae`` is the smaller one of the two kinds of images; ``mfu`` is that of minibatches of 512.
    """
    rates = {(row["part"], row["contender"]): row for row in report["rates"]}
    bound, grid = report["time_to_elbo"], report["grid"]
    costs = {row["n_rows"]: row["us_per_row"] for row in report["scaling"]}

    def over(part: str, other: str) -> float | None:
        ours, theirs = rates.get((part, "vaefeat")), rates.get((part, other))
        return ours["rows_per_s"] / theirs["rows_per_s"] if ours and theirs else None

    conv = {name: over(name, "pythae") for name in ("conv28", "conv32")}
    smallest, largest = costs.get(SCALES[0]), costs.get(SCALES[-1])
    return {
        "mlp_b128_vs_dataloader": over("mlp_b128", "dataloader"),
        "mlp_b512_vs_dataloader": over("mlp_b512", "dataloader"),
        "mlp_b128_vs_pythae": over("mlp_b128", "pythae"),
        "mlp_b512_vs_pythae": over("mlp_b512", "pythae"),
        "conv_vs_pythae": min((ratio for ratio in conv.values() if ratio is not None), default=None),
        **{f"{name}_vs_pythae": ratio for name, ratio in conv.items()},
        "time_to_elbo_vs_pythae": bound["ratio"] if bound else None,
        "mfu": rates.get((_MFU_PART, "vaefeat"), {}).get("mfu"),
        "cost_of_a_row_10m_vs_10k": largest / smallest if smallest and largest else None,
        "grid_vs_one_after_another": grid["speed_up"] if grid else None,
        "gpu_mlp_b4096_vs_pythae": over("gpu_mlp_b4096", "pythae"),
    }


def shown(results: Mapping[str, Any]) -> Group:
    """Show everything that was measured, for people."""
    return Group(*_shown(results))


def _shown(results: Mapping[str, Any]) -> Iterator[Table | Text]:
    rates: Sequence[Mapping[str, Any]] = results["rates"]
    if rates:
        table = Table(
            title="Training", box=None, pad_edge=False, caption="medians of rounds; start: of the first round"
        )
        for column in ("what", "contender"):
            table.add_column(column, no_wrap=True)
        for column in ("rows/s", "ours is", "of limit", "start s", "MiB"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("how")
        for row in rates:
            ours = next(one for one in rates if (one["part"], one["contender"]) == (row["part"], "vaefeat"))
            table.add_row(
                row["part"],
                _NAMES[row["contender"]],
                f"{row['rows_per_s']:,.0f}",
                "" if row is ours else f"{ours['rows_per_s'] / row['rows_per_s']:.2f} x",
                f"{row['mfu']:.0%}" if row.get("mfu") else "",
                f"{row['start_s']:.1f}",
                f"{row['peak_mib']:,.0f}" + (f" + {row['gpu_peak_mib']:,.0f}" if "gpu_peak_mib" in row else ""),
                row.get("how", ""),
            )
        yield table
    if bound := results["time_to_elbo"]:
        yield Text(
            f"Time to {bound['level']:.2f} nats held out, where pythae is after {bound['epochs']} epochs: pythae "
            f"{bound['pythae_s']:.1f} s, ours {_seconds(bound['vaefeat_s'])}, {bound['ratio']:.2f} times sooner; in "
            f"{bound['our_epochs']} epochs at a falling learning rate of {bound['settings']['learning_rate']:g}, "
            "pythae at its constant 0.001: that is a part of it"
        )
    for row in results["scaling"]:
        yield Text(
            f"A row among {row['n_rows']:>10,}: {row['us_per_row']:.2f} µs, {row['start_s']:.1f} s to the first steps, "
            f"{row['peak_mib']:,.0f} MiB"
        )
    if grid := results["grid"]:
        yield Text(
            f"{grid['models']} small models as one batch {grid['together_s']:.2f} s, one after another "
            f"{grid['alone_s']:.2f} s: {grid['speed_up']:.2f} times as fast"
        )
    for note in (*results["not_measured"], f"GPU: {results['gpu_rows']}"):
        yield Text(note)


def _seconds(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.1f} s"


def _rates(part: Part, measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    for entry in part.entries:
        if entry.contender == "limit":
            continue
        rounds, task = measured[entry.key], entry.task
        row: dict[str, Any] = {
            "part": part.name,
            "contender": entry.contender,
            "network": task.network,
            "batch_size": task.batch_size,
            "device": task.device,
            "rows_per_s": statistics.median(one["rows_per_s"] for one in rounds),
            "rounds": [round(one["rows_per_s"]) for one in rounds],
            # The later rounds find compiled kernels on the disk.
            "start_s": rounds[0]["first_s"],
            "peak_mib": max(one["peak_mib"] for one in rounds),
        }
        if "gpu_peak_mib" in rounds[0]:
            row["gpu_peak_mib"] = max(one["gpu_peak_mib"] for one in rounds)
        if entry.contender == "vaefeat":
            row |= {"how": _how(rounds), "notes": rounds[0]["notes"], "train": task.train}
            if "limit" in measured:
                row["mfu"] = statistics.median(
                    _limit_s(measured["limit"], one["precision"]) * one["rows_per_s"] / task.batch_size
                    for one in rounds
                )
        yield row


def _how(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Say how steps were computed, in every way that a round chose."""
    ways = {f"{one['precision']}, {'compiled' if one['compiled'] else 'not compiled'}" for one in rounds}
    return " or ".join(sorted(ways))


def _limit_s(rounds: Sequence[Mapping[str, Any]], precision: str) -> float:
    """Give the least seconds that the products of a step took in any round."""
    return float(min(one["step_s"][precision] for one in rounds))


def _limit_gflops(rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {name: rounds[0]["step_gflop"] / _limit_s(rounds, name) for name in rounds[0]["step_s"]}


def _time_to_elbo(part: Part, measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Compare the seconds to the bound that pythae has after its last epoch, in each round."""
    ratios, taken = [], []
    pairs = list(zip(measured["pythae"], measured["vaefeat"], strict=True))
    for theirs, ours in pairs:
        level = theirs["history"][-1][1]
        their_s, our_s = (_reaching(one["history"], level) for one in (theirs, ours))
        assert their_s is not None
        # What never gets there is infinitely slow.
        ratios.append(their_s / our_s if our_s is not None else 0.0)
        taken.append((their_s, our_s))
    first = pairs[0]
    reached = [ours for _, ours in taken if ours is not None]
    return {
        "ratio": statistics.median(ratios),
        "rounds": ratios,
        "level": first[0]["history"][-1][1],
        "epochs": part.entries[0].task.epochs,
        "our_epochs": part.entries[1].task.epochs,
        "settings": dict(OURS_TO_BOUND),
        "pythae_s": statistics.median(theirs for theirs, _ in taken),
        "vaefeat_s": statistics.median(reached) if reached else None,
        "pythae": first[0]["history"],
        "vaefeat": first[1]["history"],
    }


def _reaching(history: Iterable[Sequence[float]], level: float) -> float | None:
    return next((seconds for seconds, elbo in history if elbo >= level), None)


def _scaled(n_rows: int, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rates = [one["rows_per_s"] for one in rounds]
    return {
        "n_rows": n_rows,
        "us_per_row": 1e6 / statistics.median(rates),
        "rounds": [round(rate) for rate in rates],
        "start_s": rounds[0]["first_s"],
        "peak_mib": max(one["peak_mib"] for one in rounds),
        "how": _how(rounds),
    }
