"""How fast the service is, against others and against the machine.

``python -m benchmarks.serve`` starts one server after the other on this machine and in rounds (A B C, A B C, ...), with
the same ONNX file, client and rows; see :mod:`benchmarks.serve_contenders` for each and
:mod:`benchmarks.serve_payloads` for what is sent. :mod:`benchmarks.load` compares every answer with the features that
belong to the rows; then :mod:`benchmarks.wrk` measures, or where there is no wrk, the former.
Before each round ONNX Runtime and the image decoder are called without a service. The last line is JSON.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from rich.console import Console

from benchmarks.expected import Expected
from benchmarks.processes import Server, free_port, waiting
from benchmarks.serve_contenders import CONTENDERS, TRITON
from benchmarks.serve_payloads import SHAPES, Payload, Payloads, Workload, bundle_and_rows
from benchmarks.serve_report import described, shown
from benchmarks.surroundings import surroundings
from benchmarks.wrk import WRK, run_wrk
from vaefeat.atomic import replace_file
from vaefeat.bundle import load_bundle
from vaefeat.cli import run_command_line
from vaefeat.processors import available_cpus
from vaefeat.quantization import quantize
from vaefeat.runtime import choose_device
from vaefeat.settings import unknown_name

__all__ = ["Bench", "main", "run_load"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_ROOT = Path(__file__).parents[1]
_START_S = 120.0
#: What else our own service is asked for.
_OURS = tuple(Workload(64, 8, kind) for kind in ("oip_binary", "json", "jpeg", "png"))
#: Shapes and shares of the capacity, in the open loop.
_OPEN = ("1x32", "64x8")
_LOADS = (0.5, 0.8, 1.2)
_OPEN_CONNECTIONS = 128
#: For which every answer is compared before wrk, which compares none, measures.
_COMPARED_S = 1.0
_VERSIONS = ("numpy", "onnxruntime-gpu", "onnxruntime", "ray", "uvicorn")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all servers share.

    Attributes
    ----------
    bundle, bundle_int8 : Path
        The encoder in float32, and the same quantized.
    payloads, payloads_int8 : Payloads
    workloads : tuple of Workload
    threads : int
        Processors that each server is told to use.
    seconds, warm_up_s : float
        Of each figure.
    is_open : bool
        Whether the open loop is measured, too.
    device : {"cpu", "cuda"}
        Of our servers, and of ONNX Runtime without a service.
    """

    bundle: Path
    bundle_int8: Path
    payloads: Payloads
    payloads_int8: Payloads
    workloads: tuple[Workload, ...]
    threads: int
    seconds: float
    warm_up_s: float
    is_open: bool
    device: str

    def payload(self, name: str, workload: Workload) -> Payload:
        """Write what a server is sent."""
        speaks = CONTENDERS[name].speaks
        if speaks.startswith("ours"):
            return (self.payloads_int8 if speaks == "ours_int8" else self.payloads).of_ours(workload)
        return self.payloads.of_mlserver(workload) if speaks == "json" else self.payloads.of_peers(workload)


@app.command()
def main(
    only: Annotated[list[str] | None, typer.Option(help="A server; may be repeated. All when not given.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Medians are taken over these.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each figure.")] = 4.0,
    open_loop: Annotated[bool, typer.Option("--open", help="Also with an open loop.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every server; all processors by default.")] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Of our servers; the others compute on the CPU.")
    ] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="One round of moments: whether it works.")] = False,
    out: Annotated[Path | None, typer.Option("--results", help="A JSON file for everything that was measured.")] = None,
) -> None:
    """Measure, print tables and one line of JSON."""
    for name in only or ():
        if name not in CONTENDERS:
            raise unknown_name("server", name, list(CONTENDERS))
    names = [name for name in CONTENDERS if not only or name in only]
    chosen, _ = choose_device(device)
    began, n_threads = time.perf_counter(), threads or available_cpus()
    where = {
        **surroundings(),
        "load_average": os.getloadavg()[0],
        "client": "benchmarks.load" if WRK is None else "wrk",
    }
    where["versions"] |= {name: found for name in _VERSIONS if (found := _version(name))}
    with tempfile.TemporaryDirectory(prefix="v-") as place:
        folder = Path(place)
        rows = bundle_and_rows(folder / "bundle")
        np.save(folder / "rows.npy", rows)
        quantize(load_bundle(folder / "bundle"), rows).save(folder / "int8")
        (folder / "of-int8").mkdir()
        bench = Bench(
            bundle=folder / "bundle",
            bundle_int8=folder / "int8",
            payloads=Payloads(folder / "bundle", rows, folder, triton=TRITON, device=chosen),
            payloads_int8=Payloads(folder / "int8", rows, folder / "of-int8", device=chosen),
            workloads=SHAPES,
            threads=n_threads,
            seconds=0.3 if quick else seconds,
            warm_up_s=0.1 if quick else 1.0,
            is_open=open_loop,
            device=chosen,
        )
        measured = [measure(bench, names, folder, number) for number in range(1 if quick else rounds)]
    results = {
        **where,
        "device": chosen,
        "threads": n_threads,
        "rounds": len(measured),
        "quick": quick,
        "seconds": round(time.perf_counter() - began),
        **described(measured),
    }
    Console(width=120).print(shown(results), highlight=False)
    if out is not None:
        replace_file(out, (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())
    said = (
        "ratios",
        "reached",
        "ready_s",
        "commit",
        "date",
        "processor",
        "device",
        "threads",
        "rounds",
        "load_average",
        "client",
        "quick",
    )
    print(json.dumps({name: results[name] for name in said}))


def measure(bench: Bench, names: Sequence[str], folder: Path, number: int) -> dict[str, Any]:
    """Measure everything once.

    Returns
    -------
    dict
        ``in_process``, and ``servers`` by name.
    """
    _say(f"round {number + 1}: in process")
    found: dict[str, Any] = {"in_process": _measure_in_process(bench, folder), "servers": {}}
    for name in names:
        # A short name: a path of a socket in it holds some hundred bytes, and HAProxy's own names take most of them.
        place = Path(tempfile.mkdtemp(dir=folder, prefix=""))
        found["servers"][name] = one = measure_server(bench, name, place)
        figures = ", ".join(
            f"{key} {part['rows'] * part['requests_per_s']:,.0f} rows/s" for key, part in one["workloads"].items()
        )
        _say(f"round {number + 1}: {name}: {figures} {'; '.join(one['notes'])}")
    return found


def measure_server(bench: Bench, name: str, folder: Path) -> dict[str, Any]:
    """Start a server, measure it, stop it.

    Returns
    -------
    dict
        ``workloads``, ``open`` and ``notes`` on what could not be measured; without ``ready_s`` it did not start.
    """
    found: dict[str, Any] = {"workloads": {}, "open": [], "notes": []}
    contender = CONTENDERS[name]
    if contender.missing:
        found["notes"].append(contender.missing)
        return found
    port = free_port()
    bundle = bench.bundle_int8 if contender.speaks == "ours_int8" else bench.bundle
    start = contender.start(bundle, port, bench.threads, folder)
    command = start.command + (("--device", bench.device) if contender.speaks.startswith("ours") else ())
    url, began = f"http://127.0.0.1:{port}", time.perf_counter()
    with Server(command, log=folder / "log", environment=start.environment, cwd=start.cwd) as server:
        if why := _wait_for_right_answer(server, port, bench.payload(name, bench.workloads[0])):
            found["notes"].append(f"does not start here: {why}")
            return found
        found["ready_s"], found["rss_mib"] = time.perf_counter() - began, server.rss_mib()
        for workload in bench.workloads + (_OURS if contender.speaks == "ours" else ()):
            try:
                payload = bench.payload(name, workload)
            except (FileNotFoundError, subprocess.CalledProcessError) as error:
                found["notes"].append(f"{workload.name} not measured: {error}")
                continue
            found["workloads"][workload.name] = one = _measured(bench, url, payload, workload)
            found["rss_mib"] = max(found["rss_mib"], server.rss_mib())
            if bench.is_open and workload.name in _OPEN and one["requests_per_s"]:
                found["open"] += _open_loop(bench, url, payload, workload, one["requests_per_s"])
    return found


def _open_loop(bench: Bench, url: str, payload: Payload, workload: Workload, capacity: float) -> list[dict[str, Any]]:
    return [
        {
            "workload": workload.name,
            "load": load,
            **_measured(bench, url, payload, workload, rate=load * capacity, connections=_OPEN_CONNECTIONS),
        }
        for load in _LOADS
    ]


def _measured(
    bench: Bench, url: str, payload: Payload, workload: Workload, *, rate: float = 0.0, connections: int | None = None
) -> dict[str, Any]:
    connections = connections or workload.in_flight
    counts = rate == 0 and WRK is not None
    found = run_load(
        url,
        payload,
        connections=connections,
        rate=rate,
        seconds=min(_COMPARED_S, bench.seconds) if counts else bench.seconds,
        warm_up_s=bench.warm_up_s,
    )
    if counts:
        by_wrk = run_wrk(
            f"{url}{payload.path}",
            payload.body,
            payload.headers,
            connections=connections,
            seconds=bench.seconds,
            warm_up_s=bench.warm_up_s,
        )
        statuses = Counter(found["statuses"]) + Counter(by_wrk["statuses"])
        both = {name: found[name] + by_wrk[name] for name in ("broken", "unanswered")}
        found = {**found, **by_wrk, "statuses": dict(statuses), **both}
    return {"rows": workload.rows, **found}


def run_load(
    url: str,
    payload: Payload,
    *,
    connections: int,
    rate: float = 0.0,
    seconds: float,
    warm_up_s: float,
    extra: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the client in a process of its own, and give what it counted; see :mod:`benchmarks.load`."""
    words = [f"{url}{payload.path}", str(payload.body), "--form", payload.form, "--tolerance", str(payload.tolerance)]
    for header in payload.headers:
        words += ["--header", header]
    for expected in payload.expected:
        words += ["--expected", expected]
    words += ["--connections", str(connections), "--rate", str(rate)]
    words += ["--seconds", str(seconds), "--warm-up", str(warm_up_s), *extra]
    return _json_from("benchmarks.load", words)


def _measure_in_process(bench: Bench, folder: Path) -> dict[str, Any]:
    words = [str(bench.bundle / "encoder.onnx"), str(folder / "rows.npy"), "--threads", str(bench.threads)]
    words += ["--device", bench.device]
    for rows in dict.fromkeys(workload.rows for workload in bench.workloads):
        words += ["--batch", str(rows)]
    for kind in ("jpeg", "png"):
        words += ["--images", str(bench.payloads.image_folder(kind, 64))]
    found = _json_from("benchmarks.in_process", [*words, "--seconds", str(bench.seconds / 2)])
    return {"encoder": {str(rows): ways for rows, ways in found["encoder"].items()}, "decoder": found["decoder"]}


def _json_from(module: str, words: Sequence[str]) -> dict[str, Any]:
    """Run one of our modules, and read its last line."""
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)  # noqa: S603 - ours
    if done.returncode:
        raise RuntimeError(f"{module} failed with status {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]  # what our module prints


def _wait_for_right_answer(server: Server, port: int, payload: Payload) -> str:
    """Ask until the answer is right; returns why it never was, or nothing."""
    expected = Expected({"": np.load(payload.expected[0])}, form=payload.form, tolerance=payload.tolerance)
    headers = dict(header.split(": ", 1) for header in payload.headers)
    why = "no answer"
    for _ in waiting(_START_S):
        if server.process.poll() is not None:
            return f"it ended with status {server.process.returncode}: {_last_line(server.said())}"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("POST", payload.path, payload.body.read_bytes(), headers)
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException):
            continue
        finally:
            connection.close()
        if answer.status == 200 and expected.includes(b"", content):
            return ""
        why = f"status {answer.status}, {'features that are not the rows' if answer.status == 200 else 'an error'}"
    return f"{why} within {_START_S:.0f} s: {_last_line(server.said())}"


def _last_line(text: str) -> str:
    return next((line.strip()[:200] for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ModuleNotFoundError:  # PackageNotFoundError is one
        return None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command_line(app)
