"""The batcher: whatever is submitted, cancelled and late, every request gets its own rows' features or an error."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.batch import Batch, Job
from serving.batcher import RowBatcher
from serving.errors import RequestError


class Arithmetic:
    """A model whose features tell which row they were computed from, and by which model."""

    name = "arithmetic"

    def __init__(self, factor: float = 3.0, *, gate: threading.Event | None = None) -> None:
        self.factor, self.gate = factor, gate
        self.sizes: list[int] = []
        self.begun = threading.Event()

    def compute(self, rows: NDArray[Any], outputs: Sequence[str]) -> list[NDArray[np.float32]]:
        self.begun.set()
        if self.gate is not None:
            assert self.gate.wait(20)
        self.sizes.append(len(rows))
        if (rows < 0).any():
            raise ArithmeticError("a batch that cannot be computed")
        return [self.expected(rows, output) for output in outputs]

    def observe(self, outputs: Sequence[str], features: Sequence[NDArray[np.float32]]) -> None:
        pass

    def expected(self, rows: NDArray[Any], output: str) -> NDArray[np.float32]:
        widths = {"mean": 2, "hidden": 3}
        with np.errstate(divide="ignore"):
            return np.asarray(np.repeat(self.factor / (rows - 7e6), widths[output], axis=1), np.float32)


def run(
    talk: Callable[[RowBatcher], Awaitable[Any]],
    *,
    lanes: int = 2,
    most: int = 16,
    queued: int = 10**6,
    told: Callable[[Batch], None] = lambda batch: None,
) -> Any:
    async def main() -> Any:
        batcher = RowBatcher(
            lanes=lanes, max_batch_rows=most, max_queued_rows=queued, max_queued_bytes=10**9, told=told
        )
        batcher.start()
        try:
            return await talk(batcher)
        finally:
            batcher.close()

    return asyncio.run(main())


def rows_of(start: int, n: int) -> NDArray[np.int64]:
    return np.arange(start, start + n)[:, None]


@pytest.mark.parametrize("seed", range(8))
def test_batcher_over_thousands_of_interleavings_gives_each_request_its_own(seed: int) -> None:
    """Random sizes, models, outputs, priorities, aborts and pauses; 1,000 requests each time."""
    chance = random.Random(seed)
    models = [Arithmetic(3.0), Arithmetic(5.0)]
    batches: list[Batch] = []

    async def one(batcher: RowBatcher, number: int) -> None:
        await asyncio.sleep(chance.random() * 0.2)
        model = chance.choice(models)
        outputs = chance.choice([("mean",), ("hidden",), ("hidden", "mean"), ("mean", "hidden")])
        rows = rows_of(1000 * number, chance.choice([1, 1, 1, 2, 3, 7, 16, 17, 40, 100]))
        job = batcher.submit(model, rows, outputs, timeout_s=30, bulk=chance.random() < 0.3)
        if chance.random() < 0.15:
            await asyncio.sleep(chance.random() * 0.002)
            batcher.abandon(job)
            return
        features = await job.future
        assert list(features) == list(outputs)
        for output in outputs:
            np.testing.assert_array_equal(features[output], model.expected(rows, output))

    async def talk(batcher: RowBatcher) -> tuple[int, int]:
        await asyncio.gather(*(one(batcher, number) for number in range(1000)))
        while batcher.busy:
            await asyncio.sleep(0.001)
        return batcher.queued_rows, batcher.queued_bytes

    assert run(talk, lanes=chance.choice([1, 2, 3]), told=batches.append) == (0, 0)
    assert max(batch.n_rows for batch in batches) <= 16
    assert any(len(batch.members) > 1 for batch in batches), "nothing was ever put together"
    for batch in batches:
        assert len({id(job.model) for job, _, _ in batch.members}) == 1


def test_batcher_while_the_device_is_busy_gathers_what_comes_into_one_batch() -> None:
    gate = threading.Event()
    model = Arithmetic(gate=gate)

    async def talk(batcher: RowBatcher) -> None:
        jobs = [batcher.submit(model, rows_of(0, 1), ("mean",), timeout_s=10)]
        await asyncio.to_thread(model.begun.wait)
        jobs += [batcher.submit(model, rows_of(i, 1), ("mean",), timeout_s=10) for i in range(1, 11)]
        gate.set()
        await asyncio.gather(*(job.future for job in jobs))

    run(talk, lanes=1)
    assert model.sizes == [1, 10]


def test_batcher_with_many_rows_and_idle_lanes_shares_them_out() -> None:
    model = Arithmetic()

    async def talk(batcher: RowBatcher) -> None:
        await batcher.submit(model, rows_of(0, 200), ("mean",), timeout_s=10).future

    run(talk, lanes=2, most=256)
    assert sorted(model.sizes) == [100, 100]


def test_batcher_with_a_failing_batch_fails_its_members_and_goes_on() -> None:
    model = Arithmetic()

    async def talk(batcher: RowBatcher) -> None:
        with pytest.raises(ArithmeticError):
            await batcher.submit(model, rows_of(-5, 3), ("mean",), timeout_s=10).future
        await batcher.submit(model, rows_of(5, 3), ("mean",), timeout_s=10).future

    run(talk)


def test_batcher_with_features_that_are_not_finite_fails_that_request_alone() -> None:
    gate = threading.Event()
    model = Arithmetic(gate=gate)

    async def talk(batcher: RowBatcher) -> None:
        first = batcher.submit(model, rows_of(0, 1), ("mean",), timeout_s=10)
        await asyncio.to_thread(model.begun.wait)
        good = batcher.submit(model, rows_of(10, 4), ("mean",), timeout_s=10)
        bad = batcher.submit(model, rows_of(6_999_998, 4), ("mean",), timeout_s=10)  # row 2 divides by zero
        gate.set()
        await asyncio.gather(first.future, good.future)
        with pytest.raises(RequestError, match="row 2") as caught:
            await bad.future
        assert caught.value.kind == "non_finite_output"

    run(talk, lanes=1)
    assert model.sizes == [1, 8], "the two were not in one batch, so that this shows nothing"


def test_batcher_with_a_full_queue_refuses_at_once_and_says_when_to_come_again() -> None:
    gate = threading.Event()
    model = Arithmetic(gate=gate)

    async def talk(batcher: RowBatcher) -> None:
        jobs = [batcher.submit(model, rows_of(0, 1), ("mean",), timeout_s=10)]
        await asyncio.to_thread(model.begun.wait)
        jobs.append(batcher.submit(model, rows_of(0, 90), ("mean",), timeout_s=10))
        with pytest.raises(RequestError, match="90 rows wait") as caught:
            batcher.submit(model, rows_of(0, 11), ("mean",), timeout_s=10)
        assert caught.value.status == 503
        assert int(caught.value.headers["retry-after"]) >= 1
        jobs.append(batcher.submit(model, rows_of(0, 10), ("mean",), timeout_s=10))
        gate.set()
        await asyncio.gather(*(job.future for job in jobs))

    run(talk, lanes=1, queued=100)


def test_batcher_with_a_request_larger_than_the_queue_takes_it_when_nothing_waits() -> None:
    model = Arithmetic()

    async def talk(batcher: RowBatcher) -> int:
        return len((await batcher.submit(model, rows_of(0, 500), ("mean",), timeout_s=10).future)["mean"])

    assert run(talk, queued=100) == 500


def test_batcher_past_a_deadline_answers_504_while_the_device_still_works() -> None:
    gate = threading.Event()
    model = Arithmetic(gate=gate)

    async def talk(batcher: RowBatcher) -> None:
        running = batcher.submit(model, rows_of(0, 1), ("mean",), timeout_s=10)
        stuck = batcher.submit(model, rows_of(5, 1), ("mean",), timeout_s=0.05)
        await asyncio.to_thread(model.begun.wait)
        waiting = batcher.submit(model, rows_of(1, 3), ("mean",), timeout_s=0.05)
        for late in (waiting, stuck):
            with pytest.raises(RequestError) as caught:
                await late.future
            assert (caught.value.status, caught.value.kind) == (504, "deadline_exceeded")
        gate.set()
        await running.future

    run(talk, lanes=1)
    assert model.sizes == [2], "rows whose time was over were computed"


def test_batcher_forgets_rows_that_are_late_though_the_device_hangs() -> None:
    gate = threading.Event()
    model = Arithmetic(gate=gate)

    async def talk(batcher: RowBatcher) -> tuple[int, int]:
        stuck = batcher.submit(model, rows_of(0, 4), ("mean",), timeout_s=20)
        while not batcher.busy:
            await asyncio.sleep(0)
        late = batcher.submit(model, rows_of(4, 3), ("mean",), timeout_s=0.05)
        patient = batcher.submit(model, rows_of(7, 2), ("mean",), timeout_s=20)
        with pytest.raises(RequestError, match="no place on the device"):
            await late.future
        found = batcher.queued_rows, batcher.queued_bytes
        gate.set()
        await asyncio.gather(stuck.future, patient.future)
        assert batcher.queued_rows == batcher.queued_bytes == 0
        return found

    assert run(talk, lanes=1) == (2, 16)


def test_batcher_serves_interactive_rows_first_and_bulk_ones_all_the_same() -> None:
    gate = threading.Event()
    model = Arithmetic(gate=gate)
    order: list[str] = []

    async def talk(batcher: RowBatcher) -> None:
        def submit(name: str, n: int, *, bulk: bool) -> Job:
            job = batcher.submit(model, rows_of(0, n), ("mean",), timeout_s=10, bulk=bulk)
            job.future.add_done_callback(lambda _: order.append(name))
            return job

        jobs = [submit("first", 1, bulk=False)]
        await asyncio.to_thread(model.begun.wait)
        jobs += [submit(f"bulk{i}", 16, bulk=True) for i in range(3)]
        jobs += [submit(f"fast{i}", 16, bulk=False) for i in range(20)]
        gate.set()
        await asyncio.gather(*(job.future for job in jobs))

    run(talk, lanes=1)
    assert order[1].startswith("fast")
    assert order.index("bulk0") < order.index("fast19"), "bulk work waits for ever under load"
    assert order.index("bulk2") > order.index("fast10")


def test_batcher_with_an_abandoned_request_does_not_compute_what_was_not_cut() -> None:
    gate = threading.Event()
    model = Arithmetic(gate=gate)

    async def talk(batcher: RowBatcher) -> int:
        running = batcher.submit(model, rows_of(0, 1), ("mean",), timeout_s=10)
        await asyncio.to_thread(model.begun.wait)
        gone = batcher.submit(model, rows_of(0, 50), ("mean",), timeout_s=10)
        batcher.abandon(gone)
        left = batcher.queued_rows
        gate.set()
        await running.future
        return left

    assert run(talk, lanes=1) == 0
    assert model.sizes == [1]


def test_batcher_that_closes_answers_those_who_wait() -> None:
    gate = threading.Event()
    model = Arithmetic(gate=gate)

    async def talk(batcher: RowBatcher) -> None:
        batcher.submit(model, rows_of(0, 1), ("mean",), timeout_s=10)
        await asyncio.to_thread(model.begun.wait)
        waiting = batcher.submit(model, rows_of(0, 1), ("mean",), timeout_s=10)
        batcher.close()
        with pytest.raises(RequestError, match="stopping"):
            await waiting.future
        gate.set()

    run(talk, lanes=1)


def test_batcher_with_many_small_interactive_requests_fills_batches_with_them_before_bulk_rows() -> None:
    gate = threading.Event()
    model = Arithmetic(gate=gate)

    async def talk(batcher: RowBatcher) -> int:
        first = batcher.submit(model, rows_of(0, 1), ("mean",), timeout_s=10)
        await asyncio.to_thread(model.begun.wait)
        bulk = batcher.submit(model, rows_of(0, 1600), ("mean",), timeout_s=10, bulk=True)
        fast = [batcher.submit(model, rows_of(i, 1), ("mean",), timeout_s=10) for i in range(64)]
        gate.set()
        await asyncio.gather(first.future, *(job.future for job in fast))
        left = len(bulk.rows) - bulk.taken
        await bulk.future
        return left

    assert run(talk, lanes=1) >= 1600 - 2 * 16, "bulk rows took places of those that go first"


def test_batcher_whose_queue_is_full_of_bulk_work_takes_interactive_rows() -> None:
    gate = threading.Event()
    model = Arithmetic(gate=gate)

    async def talk(batcher: RowBatcher) -> None:
        jobs = [batcher.submit(model, rows_of(0, 16), ("mean",), timeout_s=10)]
        await asyncio.to_thread(model.begun.wait)
        jobs.append(batcher.submit(model, rows_of(0, 75), ("mean",), timeout_s=10, bulk=True))
        with pytest.raises(RequestError, match="75 rows wait"):
            batcher.submit(model, rows_of(0, 1), ("mean",), timeout_s=10, bulk=True)
        # Bulk work for 75 s is none of the business of who goes before it.
        batcher.queue.learn(model, 1.0, weight=1.0)
        jobs.append(batcher.submit(model, rows_of(0, 5), ("mean",), timeout_s=10))
        gate.set()
        await asyncio.gather(*(job.future for job in jobs))

    run(talk, lanes=1, queued=100)


def test_batcher_of_two_models_cuts_interactive_rows_of_either_before_bulk_rows_of_the_other() -> None:
    gate = threading.Event()
    urgent, patient = Arithmetic(3.0, gate=gate), Arithmetic(5.0, gate=gate)
    order: list[str] = []

    async def talk(batcher: RowBatcher) -> None:
        def submit(model: Arithmetic, name: str, *, bulk: bool) -> Job:
            job = batcher.submit(model, rows_of(0, 16), ("mean",), timeout_s=10, bulk=bulk)
            job.future.add_done_callback(lambda _: order.append(name))
            return job

        jobs = [submit(patient, "first", bulk=True)]
        await asyncio.to_thread(patient.begun.wait)
        jobs += [submit(patient, f"bulk{i}", bulk=True) for i in range(5)]
        jobs += [submit(urgent, f"fast{i}", bulk=False) for i in range(18)]
        gate.set()
        await asyncio.gather(*(job.future for job in jobs))

    run(talk, lanes=1)
    bulk = [place for place, name in enumerate(order) if name.startswith("bulk")]
    assert bulk[:2] == [9, 18], f"not every ninth batch: {order}"
    assert order[1:9] == [f"fast{i}" for i in range(8)]


def test_batcher_of_two_models_knows_how_fast_each_is() -> None:
    gate = threading.Event()
    fast, slow = Arithmetic(3.0, gate=gate), Arithmetic(5.0)

    async def talk(batcher: RowBatcher) -> tuple[float, float, str]:
        jobs = [batcher.submit(fast, rows_of(0, 1), ("mean",), timeout_s=10)]
        await asyncio.to_thread(fast.begun.wait)
        for model, rate in ((fast, 1600.0), (slow, 16.0)):
            jobs.append(batcher.submit(model, rows_of(0, 160), ("mean",), timeout_s=10))
            batcher.queue.learn(model, rate, weight=1.0)
        waits = [batcher.queue.wait_s(model, bulk=False) for model in (fast, slow)]
        with pytest.raises(RequestError) as refused:
            batcher.submit(slow, rows_of(0, 1), ("mean",), timeout_s=5)
        jobs.append(batcher.submit(fast, rows_of(0, 1), ("mean",), timeout_s=20))
        gate.set()
        await asyncio.gather(*(job.future for job in jobs))
        return waits[0], waits[1], refused.value.headers["retry-after"]

    fast_s, slow_s, retry_after = run(talk, lanes=1)
    # 160 rows at 16 a second, and those of the other model in turn with them: ten batches of each.
    assert slow_s == pytest.approx(10.0 + 0.1)
    assert fast_s == pytest.approx(0.1 + 10.0)
    assert retry_after == "11"


def test_batcher_with_a_short_line_waits_for_one_batch_of_another_model_s_long_one() -> None:
    gate = threading.Event()
    short, long = Arithmetic(3.0), Arithmetic(5.0, gate=gate)

    async def talk(batcher: RowBatcher) -> float:
        jobs = [batcher.submit(long, rows_of(0, 1), ("mean",), timeout_s=10)]
        await asyncio.to_thread(long.begun.wait)
        jobs.append(batcher.submit(long, rows_of(0, 1600), ("mean",), timeout_s=10))
        batcher.queue.learn(long, 16.0, weight=1.0)
        wait_s = batcher.queue.wait_s(short, bulk=False)
        gate.set()
        await asyncio.gather(*(job.future for job in jobs))
        return wait_s

    assert run(talk, lanes=1) == pytest.approx(1.0)


def test_batcher_lets_go_of_models_that_are_asked_no_more() -> None:
    async def talk(batcher: RowBatcher) -> list[object]:
        known = []
        for _ in range(5):
            model = Arithmetic()
            known.append(weakref.ref(model))
            await batcher.submit(model, rows_of(0, 40), ("mean",), timeout_s=10).future
        del model
        while batcher.busy:
            await asyncio.sleep(0.001)
        gone_by = time.monotonic() + 60
        while any(model() is not None for model in known) and time.monotonic() < gone_by:
            await asyncio.sleep(0.01)  # the lane's thread is on its way back
            gc.collect()
        return [model for model in known if model() is not None]

    assert run(talk) == []


def test_batcher_that_is_closed_refuses_what_comes_later() -> None:
    async def talk(batcher: RowBatcher) -> None:
        await batcher.submit(Arithmetic(), rows_of(0, 1), ("mean",), timeout_s=10).future
        batcher.close()
        with pytest.raises(RequestError, match="stopping"):
            batcher.submit(Arithmetic(), rows_of(0, 1), ("mean",), timeout_s=10)

    run(talk)


def test_batcher_with_an_output_that_is_not_finite_fails_those_alone_who_asked_for_it() -> None:
    gate = threading.Event()

    class HalfBroken(Arithmetic):
        def expected(self, rows: NDArray[Any], output: str) -> NDArray[np.float32]:
            features = super().expected(rows, output)
            return features * np.float32("inf") if output == "hidden" else features

    model = HalfBroken(gate=gate)

    async def talk(batcher: RowBatcher) -> None:
        first = batcher.submit(model, rows_of(0, 1), ("mean",), timeout_s=10)
        await asyncio.to_thread(model.begun.wait)
        good = batcher.submit(model, rows_of(10, 4), ("mean",), timeout_s=10)
        bad = batcher.submit(model, rows_of(20, 4), ("mean", "hidden"), timeout_s=10)
        gate.set()
        await asyncio.gather(first.future, good.future)
        with pytest.raises(RequestError, match="row 0"):
            await bad.future

    run(talk, lanes=1)
    assert model.sizes == [1, 8], "the two were not in one batch, so that this shows nothing"
