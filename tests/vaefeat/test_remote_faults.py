"""The client against servers that misbehave: what is tried again, what is not, and whose rows come back."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.vaefeat.remote_servers import (
    DIGEST,
    OTHER_DIGEST,
    Fault,
    Faulty,
    answering,
    cutting_short,
    dropping,
    dropping_what_is_reused,
    faulty,
    features_of,
    of_another_bundle,
    until,
    waiting,
)
from vaefeat.errors import InputError, RemoteError
from vaefeat.remote import AsyncRemoteEncoder, RemoteEncoder

ROWS = np.random.default_rng(0).integers(0, 256, size=(95, 1, 8, 8), dtype=np.uint8)
Embed = Callable[..., NDArray[np.float32]]


def embed_sync(url: str, rows: NDArray[Any], **options: Any) -> NDArray[np.float32]:
    with RemoteEncoder(url, **options) as encoder:
        return encoder.embed(rows)


def embed_async(url: str, rows: NDArray[Any], **options: Any) -> NDArray[np.float32]:
    async def run() -> NDArray[np.float32]:
        async with await AsyncRemoteEncoder.connect(url, **options) as encoder:
            return await encoder.embed(rows)

    return asyncio.run(run())


@pytest.fixture(params=[embed_sync, embed_async])
def embed(request: pytest.FixtureRequest) -> Embed:
    function: Embed = request.param
    return function


@pytest.fixture
def server() -> Iterator[Faulty]:
    with faulty() as state:
        yield state


PASSING: dict[str, Fault] = {
    "dropped": dropping,
    "cut short": cutting_short,
    "reused and dropped": dropping_what_is_reused,
    "408": answering(408),
    "429": answering(429, retry_after="0"),
    "502": answering(502, b"<html>"),
    "503": answering(503, b'{"error": {"message": "busy"}}'),
    "504": answering(504, retry_after="Fri, 01 Jan 2021 00:00:00 GMT"),
    "a proxy's 500": answering(500, b"Internal Server Error"),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_embed_through_a_fault_that_passes_gives_every_row_its_features(
    server: Faulty, embed: Embed, fault: Fault
) -> None:
    server.faults.extend([fault] * 3)
    np.testing.assert_array_equal(embed(server.url, ROWS, batch_size=10), features_of(ROWS))
    assert sorted(server.sizes) == [5, *[10] * 9]
    assert not server.faults


FINAL: dict[str, tuple[Fault, type[Exception], str]] = {
    "400": (answering(400, b"no"), InputError, "400: no"),
    "401": (
        answering(401, b'{"error": {"message": "no key"}}'),
        InputError,
        r"401: no key; pass RemoteEncoder\(\.\.\., api_key=",
    ),
    "403": (answering(403), InputError, "403: Forbidden"),
    "404": (answering(404), InputError, "404: Not Found"),
    "422": (
        answering(422, b'{"error": {"message": "bad rows", "request_id": "7"}}'),
        InputError,
        "bad rows .request 7",
    ),
    "our own 500": (answering(500, b'{"error": {"message": "a defect"}}'), RemoteError, "500: a defect"),
    "501": (answering(501), RemoteError, "501"),
    "a redirect": (answering(307, location="http://elsewhere"), RemoteError, "to http://elsewhere"),
    "another bundle": (of_another_bundle, RemoteError, f"got digest {OTHER_DIGEST}, wanted {DIGEST}"),
    "no npy": (answering(200, b"welcome", x_vaefeat_digest=DIGEST), RemoteError, "not npy"),
}


@pytest.mark.parametrize(("fault", "error", "told"), FINAL.values(), ids=FINAL)
def test_embed_with_a_fault_that_does_not_pass_asks_once_and_sends_no_more(
    server: Faulty, embed: Embed, fault: Fault, error: type[Exception], told: str
) -> None:
    server.faults.append(fault)
    with pytest.raises(error, match=told):
        embed(server.url, ROWS, batch_size=10, in_flight=1)
    assert len(server.queries) == 1


def test_embed_with_an_error_in_one_part_cancels_what_is_not_sent(server: Faulty, embed: Embed) -> None:
    over = threading.Event()
    server.faults.extend([until(over), answering(422)])
    server.always = until(over)
    # Answers that are under way are waited for, where a thread waits.
    threading.Timer(5, over.set).start()
    with pytest.raises(InputError, match="422"):
        embed(server.url, ROWS, batch_size=1, in_flight=3)
    assert len(server.queries) <= 3
    over.set()


def test_embed_with_another_bundle_behind_a_retry_refuses_to_mix(server: Faulty, embed: Embed) -> None:
    server.faults.extend([waiting(0), answering(503), of_another_bundle])
    with pytest.raises(RemoteError, match="serves another bundle"):
        embed(server.url, ROWS, batch_size=10, in_flight=1)


@pytest.mark.parametrize("answer", [answering(503), dropping])
def test_embed_out_of_patience_gives_up_and_tells_how_often_it_tried(
    server: Faulty, embed: Embed, answer: Fault
) -> None:
    server.always = answer
    begun = time.monotonic()
    with pytest.raises(RemoteError, match=r"attempt \d+, within patience_s=1.5") as caught:
        embed(server.url, ROWS, patience_s=1.5)
    assert time.monotonic() - begun < 20
    assert f"attempt {len(server.queries)}," in str(caught.value)
    assert len(server.queries) > 2


def test_embed_without_patience_asks_once(server: Faulty, embed: Embed) -> None:
    server.always = answering(503)
    with pytest.raises(RemoteError, match="503"):
        embed(server.url, ROWS, patience_s=0)
    assert len(server.queries) == 1


def test_embed_waits_as_long_as_the_server_asks(server: Faulty, embed: Embed) -> None:
    server.faults.append(answering(429, retry_after="1"))
    begun = time.monotonic()
    np.testing.assert_array_equal(embed(server.url, ROWS), features_of(ROWS))
    assert 1 <= time.monotonic() - begun < 20


def test_embed_asked_to_wait_beyond_its_patience_gives_up_at_once(server: Faulty, embed: Embed) -> None:
    server.faults.append(answering(429, b"come back tomorrow", retry_after="86400"))
    begun = time.monotonic()
    with pytest.raises(RemoteError, match="429: come back tomorrow"):
        embed(server.url, ROWS)
    assert time.monotonic() - begun < 20


def test_embed_of_a_silent_server_is_tried_again(server: Faulty, embed: Embed) -> None:
    server.faults.append(waiting(1.5))
    np.testing.assert_array_equal(embed(server.url, ROWS, timeout_s=0.5), features_of(ROWS))
    server.always = waiting(1.5)
    with pytest.raises(RemoteError, match=r"did not answer within 0\.3 s.*larger timeout_s"):
        embed(server.url, ROWS, timeout_s=0.3, patience_s=0.2)


def test_embed_keeps_so_many_in_flight_and_no_more(server: Faulty, embed: Embed) -> None:
    together = threading.Barrier(3)

    def meeting(_: Any) -> bool:
        together.wait(60)
        return False

    server.faults.extend([meeting] * 3)
    server.always = waiting(0.01)
    np.testing.assert_array_equal(embed(server.url, ROWS, batch_size=5, in_flight=3), features_of(ROWS))
    assert server.n_most == 3


def test_embed_reuses_connections(server: Faulty, embed: Embed) -> None:
    embed(server.url, ROWS, batch_size=1, in_flight=3)
    assert len(server.queries) == 95
    assert server.n_connections <= 4


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_embed_with_answers_in_any_order_gives_features_in_the_order_of_the_rows(embed: Embed, data: Any) -> None:
    n_rows = data.draw(st.integers(1, 95))
    faults = st.sampled_from(
        [waiting(0), waiting(0.002), waiting(0.01), dropping, answering(503), dropping_what_is_reused]
    )
    with faulty() as server:
        server.faults.extend(data.draw(st.lists(faults, max_size=30)))
        server.card["limits"]["max_rows"] = data.draw(st.integers(1, 20))
        options = {"batch_size": data.draw(st.integers(1, 40)), "in_flight": data.draw(st.integers(1, 8))}
        np.testing.assert_array_equal(embed(server.url, ROWS[:n_rows], **options), features_of(ROWS[:n_rows]))


@pytest.mark.parametrize("limits", [{"max_rows": 7}, {"max_body_bytes": 128 + 7 * 64}])
def test_embed_after_the_limits_shrank_asks_for_them_and_cuts_smaller(server: Faulty, limits: dict[str, int]) -> None:
    with RemoteEncoder(server.url, batch_size=20) as encoder:
        server.card["limits"].update(limits)
        np.testing.assert_array_equal(encoder.embed(ROWS), features_of(ROWS))
        assert max(server.sizes) == 7
        n_asked = len(server.queries)
        np.testing.assert_array_equal(encoder.embed(ROWS), features_of(ROWS))
    assert len(server.queries) - n_asked == 14, "it goes on as it has learned"


def test_embed_through_a_proxy_with_a_smaller_limit_halves_until_it_fits(server: Faulty, embed: Embed) -> None:
    server.proxy_bytes = 128 + 10 * 64
    np.testing.assert_array_equal(embed(server.url, ROWS), features_of(ROWS))
    assert 5 <= max(server.sizes) <= 10


def test_embed_refused_as_too_large_behind_a_retry_cuts_smaller_all_the_same(server: Faulty, embed: Embed) -> None:
    server.faults.append(answering(503))
    server.proxy_bytes = 128 + 10 * 64
    np.testing.assert_array_equal(embed(server.url, ROWS), features_of(ROWS))


def test_embed_where_not_even_one_row_passes_ends_with_the_refusal(server: Faulty, embed: Embed) -> None:
    server.proxy_bytes = 100
    with pytest.raises(InputError, match="413: <html>Request Entity Too Large"):
        embed(server.url, ROWS)


def test_embed_of_many_rows_holds_no_more_bodies_than_are_in_flight(server: Faulty, embed: Embed) -> None:
    rows = np.zeros((200_000, 1, 8, 8), np.uint8)  # 12.8 MB, in requests of 64 kB
    embed(server.url, rows[:1])  # what is loaded once is not meant
    tracemalloc.start()
    try:
        features = embed(server.url, rows, batch_size=1000, in_flight=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - features.nbytes < rows.nbytes / 4


def once_asked(server: Faulty, act: Callable[[], object]) -> None:
    """Act as soon as the server has a request to embed."""
    while not server.queries:
        time.sleep(0.01)
    act()


def test_embed_interrupted_leaves_no_thread_waiting(server: Faulty) -> None:
    over = threading.Event()
    server.always = until(over)
    with RemoteEncoder(server.url, batch_size=10) as encoder:
        threading.Thread(target=once_asked, args=[server, lambda: os.kill(os.getpid(), signal.SIGINT)]).start()
        with pytest.raises(KeyboardInterrupt):
            encoder.embed(ROWS)
        assert not over.is_set(), "it waited for an answer"
        # One that was being started at that moment is not waited for, but has nothing to wait for either.
        for thread in threading.enumerate():
            if thread.name.startswith("vaefeat-remote"):
                thread.join(20)
                assert not thread.is_alive()
        over.set()
        np.testing.assert_array_equal(encoder.embed(ROWS), features_of(ROWS))


@pytest.mark.parametrize("batch_size", [10, 1000])
def test_close_while_another_thread_embeds_ends_that_at_once(server: Faulty, batch_size: int) -> None:
    over = threading.Event()
    server.always = until(over)
    encoder = RemoteEncoder(server.url, batch_size=batch_size)
    threading.Thread(target=once_asked, args=[server, encoder.close]).start()
    with pytest.raises(InputError, match="was closed"):
        encoder.embed(ROWS)
    over.set()


def test_async_embed_cancelled_ends_at_once_and_sends_no_more(server: Faulty) -> None:
    over = threading.Event()
    server.always = until(over)

    async def run() -> None:
        async with await AsyncRemoteEncoder.connect(server.url, batch_size=10, in_flight=2) as encoder:
            embedding = asyncio.create_task(encoder.embed(ROWS))
            while len(server.queries) < 2:
                await asyncio.sleep(0.01)
            embedding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await embedding
            assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
    assert len(server.queries) == 2
    over.set()


def test_async_embed_of_many_at_a_time_gives_each_its_own_rows(server: Faulty) -> None:
    async def run() -> list[NDArray[np.float32]]:
        async with await AsyncRemoteEncoder.connect(server.url, batch_size=2) as encoder:
            return await asyncio.gather(*(encoder.embed(ROWS[start : start + 5]) for start in range(90)))

    for start, features in enumerate(asyncio.run(run())):
        np.testing.assert_array_equal(features, features_of(ROWS[start : start + 5]))


def test_async_encoder_in_another_event_loop_or_closed_says_so(server: Faulty) -> None:
    with asyncio.Runner() as first:
        encoder = first.run(AsyncRemoteEncoder.connect(server.url))
        with pytest.raises(InputError, match="another event loop"):
            asyncio.run(encoder.embed(ROWS))
        first.run(encoder.close())
        with pytest.raises(InputError, match="was closed"):
            first.run(encoder.embed(ROWS))


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_embed_after_a_fork_takes_connections_of_its_own(server: Faulty) -> None:
    with RemoteEncoder(server.url) as encoder:
        encoder.embed(ROWS)
        assert server.n_connections == 1
        child = os.fork()
        if child == 0:
            same = np.array_equal(encoder.embed(ROWS), features_of(ROWS))
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert server.n_connections == 2
        np.testing.assert_array_equal(encoder.embed(ROWS), features_of(ROWS))
        assert server.n_connections == 2
