"""Whether the service keeps its promises under overload, bad clients, killed replicas and changing models.

``python -m benchmarks.soak`` takes ten minutes: it finds the peak and the load that can be sustained, sends 1.5 and
then 3 times that in an open loop, and meanwhile lets clients hang up, dribble and stay silent
(:mod:`benchmarks.soak_trouble`), kills a replica every minute (``--engine ray``) and swaps the model every minute.
Every vector is compared with the version whose digest the answer carries. The last line is JSON.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.processes import Server, free_port, waiting
from benchmarks.serve import run_load
from benchmarks.serve_payloads import Payloads, Workload, bundle_and_rows
from benchmarks.soak_report import goodput_back_s, growth, judged, outside
from benchmarks.surroundings import surroundings
from benchmarks.versions import scaled
from vaefeat import OnnxEncoder
from vaefeat.atomic import replace_file
from vaefeat.bundle import Bundle, load_bundle
from vaefeat.cli import run_command_line
from vaefeat.errors import TrainingError

__all__ = ["Soak", "main"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_ROOT = Path(__file__).parents[1]
_ROWS = 64
#: More than all replicas take at the same time, so that some are refused.
_CONNECTIONS = 3000
_PEAK_CONNECTIONS = 64
_LOADS = (1.5, 3.0)
#: Of the peak; the first one that is answered in time is the load that can be sustained.
_SHARES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
_IN_TIME_MS, _ANSWERED = 1000.0, 0.99
_START_S, _SWAP_S, _REPLACE_S = 120.0, 30.0, 60.0
#: At the end of each overload, without disturbances.
_HEALING_S = 12.0
_LOG_LINES = 200


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Seconds: of the search for the sustainable load, of both overloads together, between kills and between swaps."""

    search_s: float
    storm_s: float
    every_s: float


class Soak:
    """One run.

    Parameters
    ----------
    engine : {"ray", "local"}
    replicas : int
    lengths : Lengths
    folder : Path
    """

    def __init__(self, engine: str, *, replicas: int, lengths: Lengths, folder: Path) -> None:
        self._engine, self._replicas, self._lengths, self._folder = engine, replicas, lengths, folder
        rows = bundle_and_rows(folder / "first")
        first = load_bundle(folder / "first")
        # Both carry the name of the folder that they were made in, so that one takes over from the other.
        self._versions = [first, scaled(first)]
        self._live = folder / "live"
        first.save(self._live)
        expected = tuple(self._write_expected(version, rows[:_ROWS]) for version in self._versions)
        payload = Payloads(folder / "first", rows, folder).of_ours(Workload(_ROWS, 1))
        self._payload = replace(payload, expected=expected)
        self._swaps: list[dict[str, Any]] = []
        self._kills: list[dict[str, Any]] = []
        self._memory: list[tuple[float, float]] = []
        self._port = free_port()
        self._url = f"http://127.0.0.1:{self._port}"

    def run(self) -> dict[str, Any]:
        """Start the service, soak it and give what was found, as plain values."""
        words = ["-m", "serving", str(self._live), "--engine", self._engine, "--port", str(self._port)]
        words += ["--device", "cpu", "--replicas", str(self._replicas)]
        with Server([sys.executable, *words], log=self._folder / "log", cwd=_ROOT) as server:
            self._wait_until_ready(server)
            _say("finding the peak and what can be sustained")
            peak = self._load(connections=_PEAK_CONNECTIONS, seconds=self._lengths.search_s)["requests_per_s"]
            if not peak:
                raise TrainingError(f"the service answered nothing at all: {server.said()[-2000:]}")
            sustainable, is_sustained = self._sustainable(peak)
            word = "sustainable" if is_sustained else "nothing was sustained, so overload is counted from"
            _say(f"peak {peak * _ROWS:,.0f} rows/s, {word} {sustainable * _ROWS:,.0f} rows/s")
            phases, trouble = self._storm(server, sustainable)
            said = server.said()
        report = {
            "peak_requests_per_s": peak,
            "sustainable_requests_per_s": sustainable,
            "is_sustained": is_sustained,
            "rows_per_request": _ROWS,
            "phases": self._phases(phases, peak),
            "trouble": trouble,
            "kills": [self._recovery(kill, phases) for kill in self._kills],
            "swaps": self._swaps,
            "memory": growth(self._memory),
            # Not that of each refused request: under overload there are thousands.
            "log": [line for line in said.splitlines() if '"serving.requests"' not in line][-_LOG_LINES:],
        }
        return {**report, "targets": judged(report)}

    def _write_expected(self, version: Bundle, rows: Any) -> str:
        file = self._folder / f"{version.digest[-12:]}.npy"
        np.save(file, OnnxEncoder(version, device="cpu", threads=1).embed(rows))
        return f"{version.digest}={file}"

    def _wait_until_ready(self, server: Server) -> None:
        for _ in waiting(_START_S):
            if server.process.poll() is not None:
                break
            if self._served_digest():
                return
        raise TrainingError(f"the service did not start: {server.said()[-2000:]}")

    def _sustainable(self, peak: float) -> tuple[float, bool]:
        """Find the load, and whether it was sustained: the least that is tried is taken if none was."""
        for share in _SHARES:
            found = self._load(rate=share * peak, seconds=self._lengths.search_s)
            p99 = found["p99_ms"]
            if found["requests_per_s"] >= _ANSWERED * share * peak and p99 is not None and p99 <= _IN_TIME_MS:
                return share * peak, True
        return _SHARES[-1] * peak, False

    def _load(self, *, connections: int = _CONNECTIONS, rate: float = 0.0, seconds: float) -> dict[str, Any]:
        return run_load(
            self._url,
            self._payload,
            connections=connections,
            rate=rate,
            seconds=seconds,
            warm_up_s=0.5,
            extra=["--timeline"],
        )

    def _storm(self, server: Server, sustainable: float) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Send too much, with everything else that happens; gives what each load found, and the bad clients."""
        over = threading.Event()
        phases = {}
        phase_s = self._lengths.storm_s / len(_LOADS)
        with (
            subprocess.Popen(self._trouble_command(), cwd=_ROOT, stdout=subprocess.PIPE, text=True) as trouble,  # noqa: S603 - ours
            _running(over, lambda: self._watch_memory(server, over)),
        ):
            for load in _LOADS:
                _say(f"{load:g} times the sustainable load")
                ended = threading.Event()
                with _running(ended, partial(self._disturb, server, ended, seconds=phase_s)):
                    phases[f"{load:g}"] = self._load(rate=load * sustainable, seconds=phase_s)
            said, _ = trouble.communicate()
        return phases, json.loads(said.splitlines()[-1])

    def _trouble_command(self) -> list[str]:
        words = [f"{self._url}{self._payload.path}", str(self._payload.body), "--seconds", str(self._lengths.storm_s)]
        for header in self._payload.headers:
            words += ["--header", header]
        for expected in self._payload.expected:
            words += ["--expected", expected]
        return [sys.executable, "-m", "benchmarks.soak_trouble", *words]

    def _watch_memory(self, server: Server, over: threading.Event) -> None:
        while not over.wait(1.0):
            self._memory.append((time.time(), server.rss_mib()))

    def _disturb(self, server: Server, over: threading.Event, *, seconds: float) -> None:
        """Kill and swap in turns, half a period apart: a replica that starts must not find half a bundle."""
        half_s = self._lengths.every_s / 2
        due, number = time.monotonic() + half_s / 2, 0
        # What happens later could not be seen to heal.
        end = time.monotonic() + seconds - _HEALING_S
        while due < end and not over.wait(max(0.0, due - time.monotonic())):
            if number % 2:
                self._swap(server, over)
            elif self._engine == "ray":
                self._kill(server, over)
            due, number = max(due + half_s, time.monotonic()), number + 1

    def _kill(self, server: Server, over: threading.Event) -> None:
        listening = self._listening_replicas(server)
        if not listening:
            return
        victim = min(listening, key=lambda process: process.create_time())
        kill: dict[str, Any] = {"at": time.time(), "replaced_s": None}
        self._kills.append(kill)
        victim.kill()
        # Until it is gone it still seems to listen, and would count as its own successor.
        psutil.wait_procs([victim], timeout=_SWAP_S)
        for _ in waiting(_REPLACE_S):
            if len(self._listening_replicas(server)) >= self._replicas:
                kill["replaced_s"] = time.time() - kill["at"]
                return
            if over.wait(0.25):
                return

    def _listening_replicas(self, server: Server) -> list[psutil.Process]:
        """Find replicas that accept connections; they take the socket when they are warmed up."""
        found = []
        for process in server.family():
            with contextlib.suppress(psutil.Error):
                if "ServeReplica" in process.name() and any(
                    connection.status == psutil.CONN_LISTEN and connection.laddr.port == self._port
                    for connection in process.net_connections(kind="tcp")
                ):
                    found.append(process)
        return found

    def _swap(self, server: Server, over: threading.Event) -> None:
        version = self._versions[(len(self._swaps) + 1) % 2]
        swap: dict[str, Any] = {"at": time.time(), "digest": version.digest, "swapped_s": None}
        self._swaps.append(swap)
        version.save(self._live)
        server.process.send_signal(signal.SIGHUP)
        for _ in waiting(_SWAP_S):
            if self._served_digest() == version.digest:
                swap["swapped_s"] = time.time() - swap["at"]
                return
            if over.wait(0.25):
                return

    def _served_digest(self) -> str:
        """Ask what is served; empty where nobody can say."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            ready = connection.getresponse()
            ready.read()
            connection.request("GET", "/v1/models")
            models = json.loads(connection.getresponse().read())
        except (OSError, ValueError, http.client.HTTPException):
            return ""
        finally:
            connection.close()
        return str(models["data"][0]["digest"]) if ready.status == 200 else ""

    def _phases(self, phases: dict[str, dict[str, Any]], peak: float) -> dict[str, dict[str, Any]]:
        kills = [kill["at"] for kill in self._kills]
        reported = {}
        for load, found in phases.items():
            steady = outside(found["good"], bin_s=found["bin_s"], began=found["began"], kills=kills)
            kept = (
                "statuses",
                "wrong",
                "how_wrong",
                "broken",
                "unanswered",
                "unsent",
                "p50_ms",
                "p99_ms",
                "client_cpu",
            )
            reported[load] = {
                "goodput_requests_per_s": found["requests_per_s"],
                "goodput_over_peak": None if steady is None else steady / peak,
                **{name: found[name] for name in kept},
            }
        return reported

    def _recovery(self, kill: dict[str, Any], phases: dict[str, dict[str, Any]]) -> dict[str, Any]:
        back = None
        for found in phases.values():
            if found["began"] <= kill["at"] < found["began"] + found["bin_s"] * len(found["good"]):
                back = goodput_back_s(found["good"], bin_s=found["bin_s"], began=found["began"], kill=kill["at"])
        return {**kill, "goodput_back_s": back}


@contextlib.contextmanager
def _running(over: threading.Event, task: Callable[[], None]) -> Iterator[None]:
    """Run a task in a thread until it has noticed that all is over."""
    thread = threading.Thread(target=task, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@app.command()
def main(
    engine: Annotated[Literal["ray", "local"], typer.Option(help="Which is soaked.")] = "ray",
    minutes: Annotated[float, typer.Option(min=2.0, help="How long, all in all.")] = 10.0,
    replicas: Annotated[int, typer.Option(min=1, help="With --engine ray.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes: whether it works.")] = False,
    out: Annotated[Path | None, typer.Option("--results", help="A JSON file for everything that was found.")] = None,
) -> None:
    """Soak, print a table and one line of JSON."""
    search_s = 1.0 if quick else 5.0
    # The search takes three loads as a rule, and starting up a while.
    storm_s = 60.0 if quick else max(60.0, 60 * minutes - 4 * search_s - 30)
    lengths = Lengths(search_s=search_s, storm_s=storm_s, every_s=12.0 if quick else 60.0)
    where = surroundings()
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        soak = Soak(engine, replicas=replicas if engine == "ray" else 1, lengths=lengths, folder=Path(place))
        results = {**where, "engine": engine, "quick": quick, **soak.run()}
    Console(width=120).print(_table(results["targets"]), highlight=False)
    if out is not None:
        replace_file(out, (json.dumps(results, indent=1) + "\n").encode())
    print(json.dumps({name: value for name, value in results.items() if name != "log"}))


def _table(targets: dict[str, dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("target", "wanted", "got", ""):
        table.add_column(column)
    words = {True: "passed", False: "FAILED", None: "not measured"}
    for name, one in targets.items():
        table.add_row(name, one["wanted"], str(one["got"]), words[one["passed"]])
    return table


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command_line(app)
