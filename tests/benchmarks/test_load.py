"""The load client against a small server whose answers and faults are known, each of them counted."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from benchmarks.expected import Expected
from benchmarks.load import Load, Plan, app, request_bytes

FEATURES: NDArray[np.float32] = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
BODY = b"x" * 100
Behave = Callable[[int], tuple[str, bytes]]


def right(_: int) -> tuple[str, bytes]:
    return "200", FEATURES.tobytes()


class Fake:
    """Answers the n-th request as it is told: a status and a body, or "hang", "drop", or "sleep" and seconds."""

    def __init__(self, behave: Behave, header: bytes = b"") -> None:
        self._behave, self._header = behave, header
        self.did: Counter[str] = Counter()
        self.sizes: set[int] = set()
        self.port = 0
        self._n = 0

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.sizes.add(len(await reader.readexactly(length)))
                what, body = self._behave(self._n)
                self._n += 1
                self.did[what] += 1
                if what == "hang":
                    await asyncio.sleep(60)
                if what == "drop":
                    return
                if what == "sleep":
                    await asyncio.sleep(float(body))
                    what, body = right(0)
                writer.write(b"HTTP/1.1 %s X\r\nContent-Length: %d\r\n" % (what.encode(), len(body)))
                writer.write(self._header + b"\r\n" + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@contextmanager
def serving(behave: Behave, header: bytes = b"") -> Iterator[Fake]:
    fake, ready, stop = Fake(behave, header), threading.Event(), threading.Event()

    async def main() -> None:
        server = await asyncio.start_server(fake.talk, "127.0.0.1", 0, limit=2**24)
        fake.port = server.sockets[0].getsockname()[1]
        ready.set()
        while not stop.is_set():
            await asyncio.sleep(0.01)
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    thread = threading.Thread(target=asyncio.run, args=[main()])
    thread.start()
    assert ready.wait(10)
    try:
        yield fake
    finally:
        stop.set()
        thread.join()


def load(fake: Fake, *, expected: Expected | None = None, content: bytes = BODY, **options: float) -> dict[str, object]:
    request = request_bytes(f"http://127.0.0.1:{fake.port}/embed", content, [])
    plan = {"connections": 4, "seconds": 0.5, "warm_up_s": 0.0, "patience_s": 5.0, **options}
    wanted = expected or Expected({"": FEATURES}, form="binary")
    return Load(Plan(host="127.0.0.1", port=fake.port, request=request, **plan), wanted).run()  # type: ignore[arg-type]


def test_load_of_a_sound_server_counts_every_answer_and_none_wrong() -> None:
    with serving(right) as fake:
        found = load(fake)
    # What was in flight in the end was answered, but not within what is measured.
    assert 0 <= fake.did["200"] - found["statuses"]["200"] <= 4  # type: ignore[index]
    assert found["requests_per_s"] == found["statuses"]["200"] / 0.5  # type: ignore[index]
    assert (found["wrong"], found["broken"], found["unanswered"]) == (0, 0, 0)
    assert fake.sizes == {len(BODY)}


def test_load_counts_exactly_the_answers_that_are_wrong() -> None:
    spoilt = bytearray(FEATURES.tobytes())
    spoilt[17] ^= 1

    def behave(n: int) -> tuple[str, bytes]:
        return ("200", bytes(spoilt)) if n % 5 == 2 else right(n)

    with serving(behave) as fake:
        found = load(fake)
    whole, fifths = divmod(fake.did["200"], 5)
    assert found["wrong"] == whole + (fifths > 2)
    assert found["requests_per_s"] * 0.5 <= fake.did["200"] - found["wrong"]  # type: ignore[operator]


def test_load_counts_refusals_by_status_and_not_as_work_done() -> None:
    with serving(lambda n: ("503", b"busy") if n % 2 else right(n)) as fake:
        found = load(fake)
    statuses = found["statuses"]
    assert abs(statuses["503"] - fake.did["503"]) <= 4  # type: ignore[index]
    assert found["requests_per_s"] == statuses["200"] / 0.5  # type: ignore[index]


def test_load_asks_again_what_a_lost_connection_took_along() -> None:
    with serving(lambda n: ("drop", b"") if n % 10 == 9 else right(n)) as fake:
        found = load(fake)
    assert fake.did["drop"] > 0
    assert found["broken"] == fake.did["drop"]
    assert (found["unanswered"], found["wrong"]) == (0, 0)


def test_load_tells_how_many_were_never_answered() -> None:
    with serving(lambda n: ("hang", b"") if n in (3, 5) else right(n)) as fake:
        found = load(fake, patience_s=0.2, seconds=1.0)
    assert found["unanswered"] == 2
    assert fake.did["200"] > 100, "the connections went on"


def load_at_rate(behave: Behave) -> dict[str, object]:
    """Load a server for a second with 200 requests; also gives how many it got."""
    with serving(behave) as fake:
        found = load(fake, rate=200.0, seconds=1.0)
        return {**found, "sent": sum(fake.did.values())}


def quietest(measure: Callable[[], dict[str, object]]) -> dict[str, object]:
    """Give the quickest of three: other work on the machine can only make it look worse."""
    return min((measure() for _ in range(3)), key=lambda found: found["p99_ms"])  # type: ignore[arg-type, return-value]


def test_open_loop_keeps_its_rate_where_the_server_does() -> None:
    found = quietest(lambda: load_at_rate(right))
    assert 190 <= found["sent"] <= 201  # type: ignore[operator]
    assert found["unsent"] == 0


def test_open_loop_counts_waiting_from_when_a_request_was_due() -> None:
    # Four connections and 50 ms for each answer make 80 a second of the 200 that are due.
    def late(n: int) -> tuple[str, bytes]:
        return "sleep", b"0.05"

    with serving(late) as fake:
        closed = quietest(lambda: load(fake, seconds=1.0))
    found = quietest(lambda: load_at_rate(late))
    assert closed["p99_ms"] < 150  # type: ignore[operator]
    # After a second those in turn are 0.6 s late, and the ones that are not sent yet count, too.
    assert found["p99_ms"] > 400  # type: ignore[operator]
    assert 80 <= found["unsent"] <= 140  # type: ignore[operator]


def test_load_takes_requests_and_answers_that_come_in_pieces() -> None:
    features = np.random.default_rng(1).normal(size=(500_000, 2)).astype(np.float32)
    wanted = Expected({"": features}, form="binary")
    with serving(lambda n: ("200", features.tobytes())) as fake:
        found = load(fake, expected=wanted, content=bytes(8 * 2**20), connections=2, patience_s=30.0)
    assert fake.sizes == {8 * 2**20}
    assert fake.did["200"] >= 2
    assert (found["wrong"], found["broken"]) == (0, 0)


@pytest.mark.parametrize(("digest", "wrong"), [("sha256:a", False), ("sha256:b", True), ("sha256:c", True)])
def test_load_compares_with_the_version_whose_digest_the_answer_carries(digest: str, wrong: bool) -> None:
    wanted = Expected({"sha256:a": FEATURES, "sha256:b": 2 * FEATURES}, form="binary")
    with serving(right, b"X-Vaefeat-Digest: %s\r\n" % digest.encode()) as fake:
        found = load(fake, expected=wanted)
    assert found["wrong"] == (fake.did["200"] if wrong else 0)


@pytest.mark.parametrize(
    "values", [{"embeddings": FEATURES.tolist()}, {"id": "1", "outputs": [{"data": FEATURES.ravel().tolist()}]}]
)
def test_json_of_both_forms_is_read_and_compared(values: dict[str, object]) -> None:
    wanted = Expected({"": FEATURES}, form="json")
    assert wanted.includes(b"", json.dumps(values).encode())
    assert not wanted.includes(b"", json.dumps(values).replace("0.", "0.9", 1).encode())
    assert not wanted.includes(b"", b"{}")


def test_tolerance_allows_so_much_and_no_more() -> None:
    wanted = Expected({"": FEATURES}, form="binary", tolerance=1e-3)
    assert wanted.includes(b"", (FEATURES + np.float32(5e-4)).tobytes())
    assert not wanted.includes(b"", (FEATURES + np.float32(2e-3)).tobytes())
    assert not wanted.includes(b"", (FEATURES * np.float32(np.nan)).tobytes())
    assert not wanted.includes(b"", FEATURES.tobytes()[4:])


def test_load_as_a_command_prints_one_line_of_json(tmp_path: Path) -> None:
    np.save(tmp_path / "features.npy", FEATURES)
    (tmp_path / "body").write_bytes(BODY)
    with serving(right) as fake:
        arguments = [f"http://127.0.0.1:{fake.port}/", str(tmp_path / "body"), "--header", "Content-Type: text/plain"]
        arguments += ["--expected", str(tmp_path / "features.npy"), "--seconds", "0.2", "--warm-up", "0.1"]
        done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["statuses"].keys() == {"200"}
    assert found["wrong"] == 0
    assert 0 < found["client_cpu"] <= 1.5
    assert "good" not in found
