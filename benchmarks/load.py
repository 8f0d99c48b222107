"""A client that costs little beside the server that it measures: fixed bytes out, answers counted and compared.

It runs in a process of its own: ``python -m benchmarks.load URL BODY --connections 8`` prints one line of JSON.
Closed loop: each connection sends its next request when the last one is answered. Open loop (``--rate``): requests are
sent when they are due, whatever the server does, and latency counts from then, so that waiting is not hidden (Tene's
"coordinated omission").
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import deque
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import numpy as np
import typer
import uvloop

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class _Tally:
    """What the connections found."""

    def __init__(self, expected: bytes | None, *, counts_from: float) -> None:
        self.expected, self.counts_from = expected, counts_from
        self.latencies: list[float] = []
        self.statuses: dict[int, int] = {}
        self.wrong = 0
        self.broken = 0

    def note(self, status: int, due: float, body: memoryview) -> None:
        now = time.perf_counter()
        if now < self.counts_from:
            return
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status == 200:
            self.latencies.append(now - due)
            # What is compared is at the end of every peer's binary answer; JSON is compared by its length alone.
            if self.expected is not None and body[-len(self.expected) :] != self.expected:
                self.wrong += 1


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, request: bytes, tally: _Tally, idle: Any) -> None:
        self._request, self._tally, self._idle = request, tally, idle
        self._received = bytearray()
        self._wanted = 0
        self._due = 0.0
        self.waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def send(self, due: float) -> None:
        self._due, self.waiting = due, True
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._wanted:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            found = _LENGTH.search(self._received, 0, end)
            if found is None:
                raise RuntimeError(f"got an answer without a length: {bytes(self._received[:end])!r}")
            self._wanted = end + 4 + int(found[1])
        if len(self._received) >= self._wanted:
            status = int(self._received[9:12])
            view = memoryview(self._received)
            self._tally.note(status, self._due, view[: self._wanted])
            view.release()
            self._received = bytearray()
            self._wanted = 0
            self.waiting = False
            self._idle(self)

    def connection_lost(self, error: Exception | None) -> None:
        if self.waiting:
            self._tally.broken += 1
        self._idle(None)


@app.command()
def main(
    url: Annotated[str, typer.Argument(help="Where to post.")],
    body: Annotated[Path, typer.Argument(help="File with the body.")],
    header: Annotated[list[str] | None, typer.Option(help="A header line; may be repeated.")] = None,
    expected: Annotated[Path | None, typer.Option(help="File with the bytes that every answer ends in.")] = None,
    connections: Annotated[int, typer.Option(min=1, help="Requests in flight; the most, with --rate.")] = 8,
    rate: Annotated[float, typer.Option(help="Requests a second, open loop; 0 is a closed loop.")] = 0.0,
    seconds: Annotated[float, typer.Option(help="Measured.")] = 5.0,
    warm_up: Annotated[float, typer.Option(help="Seconds before that.")] = 1.0,
) -> None:
    """Post one body again and again."""
    parts = urlsplit(url)
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    content = body.read_bytes()
    lines = [f"POST {target} HTTP/1.1", f"Host: {parts.netloc}", *(header or []), f"Content-Length: {len(content)}"]
    request = ("\r\n".join(lines) + "\r\n\r\n").encode() + content
    wanted = expected.read_bytes() if expected is not None else None
    tally = _Tally(wanted, counts_from=time.perf_counter() + warm_up)
    uvloop.run(_drive(parts.hostname or "", parts.port or 80, request, tally, connections, rate, warm_up + seconds))
    print(json.dumps(_summary(tally, seconds)))


async def _drive(
    host: str, port: int, request: bytes, tally: _Tally, n_connections: int, rate: float, seconds: float
) -> None:
    loop = asyncio.get_running_loop()
    end = time.perf_counter() + seconds
    idle: deque[_Connection] = deque()
    late: deque[float] = deque()
    opened: list[_Connection] = []

    def again(connection: _Connection | None) -> None:
        now = time.perf_counter()
        if connection is None or now >= end:
            return
        if not rate:
            connection.send(now)
        elif late:
            connection.send(late.popleft())
        else:
            idle.append(connection)

    for _ in range(n_connections):
        _, connection = await loop.create_connection(lambda: _Connection(request, tally, again), host, port)
        opened.append(connection)
    if not rate:
        for connection in opened:
            connection.send(time.perf_counter())
        await asyncio.sleep(seconds)
        return
    idle.extend(opened)
    began, sent = time.perf_counter(), 0
    while (now := time.perf_counter()) < end:
        while began + sent / rate <= now:
            due = began + sent / rate
            sent += 1
            if idle:
                idle.popleft().send(due)
            else:
                late.append(due)
        await asyncio.sleep(max(0.0, began + sent / rate - time.perf_counter()))


def _summary(tally: _Tally, seconds: float) -> dict[str, Any]:
    latencies = np.array(tally.latencies) * 1e3
    found = {f"p{q}_ms": round(float(np.percentile(latencies, q)), 3) for q in (50, 99)} if len(latencies) else {}
    good = tally.statuses.get(200, 0)
    return {
        "requests_per_s": round(good / seconds, 2),
        **found,
        "statuses": {str(status): n for status, n in sorted(tally.statuses.items())},
        "wrong": tally.wrong,
        "broken": tally.broken,
    }


if __name__ == "__main__":
    app()
