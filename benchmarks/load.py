"""A client that costs little beside the server that it measures: fixed bytes out, every answer counted and compared.

It runs in a process of its own: ``python -m benchmarks.load URL BODY --connections 8`` prints one line of JSON.
Closed loop: each connection sends its next request when the last one is answered. Open loop (``--rate``): requests are
sent when they are due, whatever the server does, and latency counts from then, so that waiting is not hidden (Tene's
"coordinated omission"); those that have not even been sent in the end count with the time that they have waited.

What a slow client hides, and what is done about it: it answers late, so that the server looks idle and latencies long.
There is no event loop here but ``selectors``, no parser but for the two headers that matter, and one comparison with
the bytes that were right before; ``client_cpu`` tells how much of a processor the client took, so that a figure that
is the client's own is known as such.
"""

from __future__ import annotations

import json
import re
import resource
import selectors
import socket
import time
from array import array
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.expected import Expected, Form

__all__ = ["Load", "Plan", "request_bytes"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CLOSING = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
_BUFFER_BYTES = 2**20
#: Between two looks at requests that nobody answers, and two attempts at a connection that is refused.
_SWEEP_S, _RECONNECT_S = 0.25, 0.05
_BIN_S = 0.1
#: Of wrong answers, that are told.
_MOST_KINDS = 8
#: `select` wakes up within microseconds where `epoll` knows milliseconds only, but it takes no more than 1024 files.
_MOST_SELECTED = 512


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is sent, and how.

    Parameters
    ----------
    host : str
    port : int
    request : bytes
        Head and body.
    connections : int
        Requests in flight; the most, in an open loop.
    rate : float
        Requests per second; 0 is a closed loop.
    seconds, warm_up_s : float
        What is measured, and what comes before.
    patience_s : float
        After which a request counts as unanswered.
    """

    host: str
    port: int
    request: bytes
    connections: int = 8
    rate: float = 0.0
    seconds: float = 5.0
    warm_up_s: float = 1.0
    patience_s: float = 30.0


@dataclass
class _Tally:
    """What became of the requests."""

    latencies: array[float] = field(default_factory=lambda: array("d"))
    statuses: Counter[int] = field(default_factory=Counter)
    good: int = 0
    wrong: int = 0
    #: Connections that ended under a request; it is sent again.
    broken: int = 0
    unanswered: int = 0
    good_by_bin: Counter[int] = field(default_factory=Counter)
    broken_by_bin: Counter[int] = field(default_factory=Counter)


class _Connection:
    """A connection, with one request at a time."""

    __slots__ = ("due", "events", "is_open", "left", "received", "socket", "waiting", "wanted")

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.is_open = False
        self.events = 0
        self.received = bytearray()
        self.wanted = 0
        self.left: memoryview | None = None
        self.waiting = False
        self.due = 0.0


class Load:
    """Sends what a plan says.

    Parameters
    ----------
    plan : Plan
    expected : Expected, optional
        Without it answers are counted and not compared.
    """

    def __init__(self, plan: Plan, expected: Expected | None = None) -> None:
        self._plan, self._expected = plan, expected
        precise = plan.rate > 0 and plan.connections <= _MOST_SELECTED
        self._selector = selectors.SelectSelector() if precise else selectors.DefaultSelector()
        self._buffer = bytearray(_BUFFER_BYTES)
        self._tally = _Tally()
        self._all = [_Connection() for _ in range(plan.connections)]
        self._idle: deque[_Connection] = deque()
        self._late: deque[float] = deque()
        self._closed: list[tuple[float, _Connection]] = []
        self._began = self._from = self._end = 0.0

    def run(self) -> dict[str, Any]:
        """Send, receive and count; returns plain values."""
        plan = self._plan
        for connection in self._all:
            self._open(connection)
        connected_until = time.perf_counter() + plan.patience_s
        while not all(connection.is_open for connection in self._all) and time.perf_counter() < connected_until:
            self._turn(_RECONNECT_S)
        wall, cpu = time.time(), time.process_time()
        self._began = time.perf_counter()
        self._from, self._end = self._began + plan.warm_up_s, self._began + plan.warm_up_s + plan.seconds
        for connection in self._all:
            self._next(connection)
        sweep, sent = self._began, 0
        while (now := time.perf_counter()) < self._end:
            wait = _SWEEP_S
            if plan.rate:
                sent = self._send_due(sent, now)
                wait = self._began + sent / plan.rate - time.perf_counter()
            self._turn(min(wait, _RECONNECT_S if self._closed else _SWEEP_S))
            if now - sweep > _SWEEP_S:
                sweep = now
                self._give_up(now)
        cpu = time.process_time() - cpu
        self._drain()
        return self._summary(wall, cpu)

    def _send_due(self, sent: int, now: float) -> int:
        rate = self._plan.rate
        while (due := self._began + sent / rate) <= now:
            sent += 1
            if self._idle:
                self._send(self._idle.popleft(), due)
            else:
                self._late.append(due)
        return sent

    def _drain(self) -> None:
        """Wait for what is in flight, so that a late answer is not taken for none."""
        until = time.perf_counter() + self._plan.patience_s
        while any(connection.waiting for connection in self._all) and time.perf_counter() < until:
            self._turn(_RECONNECT_S)
        self._give_up(float("inf"))
        self._selector.close()
        for connection in self._all:
            if connection.socket is not None:
                connection.socket.close()

    def _turn(self, wait: float) -> None:
        for key, events in self._selector.select(max(0.0, wait)):
            connection: _Connection = key.data
            # It may have been closed by an event before, in the same turn.
            if events & selectors.EVENT_WRITE and connection.socket is key.fileobj:
                (self._write if connection.is_open else self._opened)(connection)
            if events & selectors.EVENT_READ and connection.socket is key.fileobj and connection.is_open:
                self._read(connection)
        if self._closed:
            now = time.perf_counter()
            ready = [connection for at, connection in self._closed if at <= now]
            self._closed = [(at, connection) for at, connection in self._closed if at > now]
            for connection in ready:
                self._open(connection)

    def _open(self, connection: _Connection) -> None:
        """Begin to connect; to wait for it would hold up all others."""
        connection.socket = socket.socket()
        connection.socket.setblocking(False)
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.socket.connect_ex((self._plan.host, self._plan.port))
        connection.events = selectors.EVENT_WRITE
        self._selector.register(connection.socket, connection.events, connection)

    def _opened(self, connection: _Connection) -> None:
        assert connection.socket is not None
        if connection.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._close(connection, reopen_s=_RECONNECT_S)
            return
        connection.is_open = True
        self._listen_for(connection, selectors.EVENT_READ)
        if connection.waiting:
            self._send(connection, connection.due)
        else:
            self._next(connection)

    def _listen_for(self, connection: _Connection, events: int) -> None:
        if events != connection.events:
            assert connection.socket is not None
            connection.events = events
            self._selector.modify(connection.socket, events, connection)

    def _send(self, connection: _Connection, due: float) -> None:
        connection.due, connection.waiting = due, True
        connection.left = memoryview(self._plan.request)
        self._write(connection)

    def _write(self, connection: _Connection) -> None:
        assert connection.socket is not None
        assert connection.left is not None
        try:
            sent = connection.socket.send(connection.left)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._broke(connection)
            return
        if sent == len(connection.left):
            connection.left = None
            self._listen_for(connection, selectors.EVENT_READ)
        else:
            connection.left = connection.left[sent:]
            self._listen_for(connection, selectors.EVENT_READ | selectors.EVENT_WRITE)

    def _read(self, connection: _Connection) -> None:
        assert connection.socket is not None
        try:
            n = connection.socket.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            n = 0
        if n == 0:
            self._broke(connection)
            return
        if connection.received:
            connection.received += memoryview(self._buffer)[:n]
            held, n = connection.received, len(connection.received)
        else:
            held = self._buffer
        if not connection.wanted:
            end = held.find(b"\r\n\r\n", 0, n)
            if end >= 0:
                found = _LENGTH.search(held, 0, end)
                if found is None:
                    raise RuntimeError(f"got an answer without a length: {bytes(held[:end])!r}")
                connection.wanted = end + 4 + int(found[1])
        if connection.wanted and n >= connection.wanted:
            self._answered(connection, held)
        elif held is self._buffer:
            connection.received += memoryview(held)[:n]

    def _answered(self, connection: _Connection, held: bytearray) -> None:
        now, tally, status = time.perf_counter(), self._tally, int(held[9:12])
        end = held.find(b"\r\n\r\n")
        head = bytes(held[: end + 2])
        is_right = status == 200
        if is_right and self._expected is not None:
            is_right = self._expected.includes(head, bytes(memoryview(held)[end + 4 : connection.wanted]))
            tally.wrong += not is_right
        if is_right:
            tally.good_by_bin[int((now - self._began) / _BIN_S)] += 1
            if connection.due >= self._from:
                tally.latencies.append(now - connection.due)
        if self._from <= now < self._end:
            tally.statuses[status] += 1
            tally.good += is_right
        connection.waiting, connection.wanted = False, 0
        if connection.received:
            connection.received = bytearray()
        # An answer may come before the whole request was taken, which then is no use to anybody.
        if connection.left is not None or (status != 200 and _CLOSING.search(head)):
            self._close(connection, reopen_s=0.0)
            return
        self._next(connection)

    def _next(self, connection: _Connection) -> None:
        now = time.perf_counter()
        if now >= self._end:
            return
        if not self._plan.rate:
            self._send(connection, now)
        elif self._late:
            self._send(connection, self._late.popleft())
        else:
            self._idle.append(connection)

    def _broke(self, connection: _Connection) -> None:
        """Note that a connection ended; what it was asked is asked again."""
        if connection.waiting:
            self._tally.broken += 1
            self._tally.broken_by_bin[int((time.perf_counter() - self._began) / _BIN_S)] += 1
        else:
            # An idle one may be in the line of those that are free.
            self._idle = deque(other for other in self._idle if other is not connection)
        self._close(connection, reopen_s=_RECONNECT_S)

    def _close(self, connection: _Connection, *, reopen_s: float) -> None:
        if connection.socket is None:
            return
        self._selector.unregister(connection.socket)
        connection.socket.close()
        connection.socket, connection.is_open = None, False
        connection.received, connection.wanted, connection.left = bytearray(), 0, None
        self._closed.append((time.perf_counter() + reopen_s, connection))

    def _give_up(self, now: float) -> None:
        for connection in self._all:
            if connection.waiting and now - connection.due > self._plan.patience_s:
                self._tally.unanswered += 1
                connection.waiting = False
                self._close(connection, reopen_s=0.0)

    def _summary(self, wall: float, cpu: float) -> dict[str, Any]:
        plan, tally = self._plan, self._tally
        ages = [self._end - due for due in self._late if due >= self._from]
        latencies = np.concatenate([np.frombuffer(tally.latencies, np.float64), ages]) * 1e3
        found = {f"p{q}_ms": float(np.percentile(latencies, q)) if len(latencies) else None for q in (50, 99)}
        bins = range(int((plan.warm_up_s + plan.seconds) / _BIN_S))
        return {
            "requests_per_s": tally.good / plan.seconds,
            **found,
            "statuses": {str(status): n for status, n in sorted(tally.statuses.items())},
            "wrong": tally.wrong,
            "how_wrong": dict(self._expected.wrong.most_common(_MOST_KINDS)) if self._expected else {},
            "broken": tally.broken,
            "unanswered": tally.unanswered,
            "unsent": len(self._late),
            "client_cpu": cpu / (plan.seconds + plan.warm_up_s),
            "began": wall,
            "bin_s": _BIN_S,
            "good": [tally.good_by_bin[number] for number in bins],
            "broken_at": sorted(tally.broken_by_bin.elements()),
        }


@app.command()
def main(
    url: Annotated[str, typer.Argument(help="Where to post.")],
    body: Annotated[Path, typer.Argument(help="File with the body.")],
    header: Annotated[list[str] | None, typer.Option(help="A header line; may be repeated.")] = None,
    expected: Annotated[
        list[str] | None, typer.Option(help="npy file of the right features; DIGEST=FILE where there are versions.")
    ] = None,
    form: Annotated[Form, typer.Option(help="Of the answer.")] = "binary",
    tolerance: Annotated[float, typer.Option(help="Of the features; 0 asks for the same bits.")] = 0.0,
    connections: Annotated[int, typer.Option(min=1, help="Requests in flight; the most, with --rate.")] = 8,
    rate: Annotated[float, typer.Option(help="Requests a second, open loop; 0 is a closed loop.")] = 0.0,
    seconds: Annotated[float, typer.Option(help="Measured.")] = 5.0,
    warm_up: Annotated[float, typer.Option(help="Seconds before that.")] = 1.0,
    patience: Annotated[float, typer.Option(help="Seconds after which a request is unanswered.")] = 30.0,
    timeline: Annotated[bool, typer.Option("--timeline", help="Also what was answered in each tenth of a second.")] = (
        False
    ),
) -> None:
    """Post one body again and again."""
    _allow_files(connections + 64)
    plan = Plan(
        **_address(url),
        request=request_bytes(url, body.read_bytes(), header or []),
        connections=connections,
        rate=rate,
        seconds=seconds,
        warm_up_s=warm_up,
        patience_s=patience,
    )
    wanted = dict(_labelled(one) for one in expected or [])
    found = Load(plan, Expected(wanted, form=form, tolerance=tolerance) if wanted else None).run()
    if not timeline:
        for name in ("began", "bin_s", "good", "broken_at"):
            del found[name]
    print(json.dumps(found))


def request_bytes(url: str, content: bytes, headers: Sequence[str]) -> bytes:
    """Write a whole POST request."""
    parts = urlsplit(url)
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    lines = [f"POST {target} HTTP/1.1", f"Host: {parts.netloc}", *headers, f"Content-Length: {len(content)}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + content


def _address(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    return {"host": parts.hostname or "", "port": parts.port or 80}


def _labelled(text: str) -> tuple[str, NDArray[np.float32]]:
    label, _, file = text.rpartition("=")
    return label, np.load(file)


def _allow_files(n: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, n), hard), hard))


if __name__ == "__main__":
    app()
