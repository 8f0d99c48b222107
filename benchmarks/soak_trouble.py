"""Clients that behave badly, beside those that measure: ``python -m benchmarks.soak_trouble URL BODY``.

Some hang up as soon as they have sent a request, or half of one; some send a few bytes at a time, and are owed a right
answer all the same; some connect and say nothing, or ask and never read. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections import Counter
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import numpy as np
import typer

from benchmarks.expected import Expected
from benchmarks.load import request_bytes

__all__ = ["Trouble"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_HANG_UPS_PER_S = 20
_DRIBBLERS, _PIECES, _DRIBBLE_S = 4, 20, 4.0
_SILENT, _DEAF = 10, 5
_PATIENCE_S = 30.0
_ATTEMPTS = 5


class Trouble:
    """The clients, for a while.

    Parameters
    ----------
    url : str
    request : bytes
    expected : Expected
        What those who are owed an answer must get.
    """

    def __init__(self, url: str, request: bytes, expected: Expected) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._request, self._expected = request, expected
        self.hung_up = 0
        self.retried = 0
        self.unanswered = 0
        self.wrong = 0
        self.statuses: Counter[str] = Counter()

    async def run(self, seconds: float) -> None:
        """Make trouble; what is under way in the end is waited for."""
        end = time.perf_counter() + seconds
        await asyncio.gather(
            self._hang_up(end),
            *(self._dribble(end) for _ in range(_DRIBBLERS)),
            *(self._hold(end, b"") for _ in range(_SILENT)),
            *(self._hold(end, self._request) for _ in range(_DEAF)),
        )

    async def _hang_up(self, end: float) -> None:
        while time.perf_counter() < end:
            part = self._request if self.hung_up % 2 else self._request[: len(self._request) // 2]
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(self._host, self._port)
                writer.write(part)
                await writer.drain()
                # With nothing to linger for, closing resets the connection.
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.close()
            self.hung_up += 1
            await asyncio.sleep(1 / _HANG_UPS_PER_S)

    async def _dribble(self, end: float) -> None:
        while time.perf_counter() < end:
            for _ in range(_ATTEMPTS):
                try:
                    status, head, body = await asyncio.wait_for(self._ask_slowly(), _PATIENCE_S)
                    break
                except (OSError, EOFError):
                    self.retried += 1  # a killed replica takes its connections along
                    await asyncio.sleep(0.1)
                except TimeoutError:
                    pass
            else:
                self.unanswered += 1
                continue
            self.statuses[str(status)] += 1
            if status == 200 and not self._expected.includes(head, body):
                self.wrong += 1

    async def _ask_slowly(self) -> tuple[int, bytes, bytes]:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            step = -(-len(self._request) // _PIECES)
            for start in range(0, len(self._request), step):
                writer.write(self._request[start : start + step])
                await writer.drain()
                await asyncio.sleep(_DRIBBLE_S / _PIECES)
            head = await reader.readuntil(b"\r\n\r\n")
            fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:-2])
            return int(head[9:12]), head, await reader.readexactly(int(fields[b"content-length"]))
        finally:
            writer.close()

    async def _hold(self, end: float, said: bytes) -> None:
        """Keep a connection on which nothing is read."""
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(self._host, self._port, limit=1)
            writer.write(said)
            await asyncio.sleep(max(0.0, end - time.perf_counter()))
            del reader
            writer.close()


@app.command()
def main(
    url: Annotated[str, typer.Argument(help="Where to post.")],
    body: Annotated[Path, typer.Argument(help="File with the body.")],
    header: Annotated[list[str], typer.Option(help="A header line; may be repeated.")],
    expected: Annotated[list[str], typer.Option(help="DIGEST=FILE.npy; may be repeated.")],
    seconds: Annotated[float, typer.Option(help="How long.")],
) -> None:
    """Make trouble, and print what those got who were owed an answer."""
    features = {label: np.load(file) for label, _, file in (one.rpartition("=") for one in expected)}
    trouble = Trouble(url, request_bytes(url, body.read_bytes(), header), Expected(features, form="binary"))
    asyncio.run(trouble.run(seconds))
    found = {name: getattr(trouble, name) for name in ("hung_up", "retried", "unanswered", "wrong")}
    print(json.dumps({**found, "statuses": dict(trouble.statuses)}))


if __name__ == "__main__":
    app()
