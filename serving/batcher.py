"""The row-level batcher: rows of many requests become batches for the device, and vectors of batches answers again.

A batch is cut the moment a lane (a thread that computes) is free, from whatever rows wait then: no timer holds rows
back from a free device, and no batch is cut before a busy one could take it, which under load would make small batches
of what arrives together. A request with more rows than a batch holds is split; requests with few are put together. What
comes out for a row is the same to the last bit whatever batch it went through, because the encoders are invariant to
their neighbours (tested), so that how rows are cut is a matter of speed alone.

Everything but computing happens on one event loop, and needs no lock.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from serving.batch import Batch, Computes, Job, collect, not_finite
from serving.errors import RequestError, overloaded, too_late
from serving.job_queue import JobQueue

if TYPE_CHECKING:
    from serving.watching.spans import Tracer

__all__ = ["RowBatcher"]

#: Rows that are not worth splitting over lanes: handing over to a thread costs as much as computing them.
_MIN_SHARE = 32
#: Of the queue, what bulk work may fill: the rest is for those who go before it.
_BULK_ROOM = 0.75
#: How often deadlines of rows that wait are looked at, in seconds; only while some do.
_SWEEP_S = 0.05
_MAX_RETRY_AFTER_S = 30


class _Lane:
    """A thread that computes one batch after the other."""

    def __init__(self, number: int, done: Callable[[_Lane, Batch], None], tracer: Tracer | None) -> None:
        self._inbox: SimpleQueue[Batch | None] = SimpleQueue()
        self._done, self._tracer = done, tracer
        self._thread = threading.Thread(target=self._run, name=f"lane-{number}", daemon=True)
        self._thread.start()

    def give(self, batch: Batch | None) -> None:
        self._inbox.put(batch)

    def _run(self) -> None:
        while (batch := self._inbox.get()) is not None:
            batch.compute(self._tracer)
            self._done(self, batch)
            del batch  # with its rows, and a model that may be served no more


class RowBatcher:
    """Takes rows of requests, gives features; see the module.

    Parameters
    ----------
    lanes : int
        Batches that are computed at the same time: processors, or 1 for a GPU.
    max_batch_rows : int
    max_queued_rows, max_queued_bytes : int
        What may wait; more is refused at once.
    told : callable
        Called with every batch that was computed.

    Attributes
    ----------
    tracer : Tracer or None
        Gives each batch a span; to be set before :meth:`start`.
    queue : JobQueue
        What waits.
    """

    def __init__(
        self,
        *,
        lanes: int,
        max_batch_rows: int,
        max_queued_rows: int,
        max_queued_bytes: int,
        told: Callable[[Batch], None],
    ) -> None:
        self._n_lanes, self._max_batch_rows = lanes, max_batch_rows
        self._max_queued_rows, self._max_queued_bytes = max_queued_rows, max_queued_bytes
        self._told = told
        self.tracer: Tracer | None = None
        self.queue = JobQueue(max_batch_rows=max_batch_rows)
        self._idle: list[_Lane] = []
        self._lanes: list[_Lane] = []
        self._running: dict[_Lane, tuple[Batch, float]] = {}
        self._dispatch_is_due = self._closed = False
        self._sweep: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start the lanes; on the event loop that all other calls come from."""
        self._loop = asyncio.get_running_loop()
        self._lanes = [_Lane(number, self._report, self.tracer) for number in range(self._n_lanes)]
        self._idle = list(self._lanes)

    def close(self) -> None:
        """End the lanes after the batches that they compute; what waits or comes later gets an error."""
        self._closed = True
        for lane in self._lanes:
            lane.give(None)
        for job in self.queue:
            self._fail(job, overloaded("the service is stopping; try again"))
        self.queue.clear()
        if self._sweep is not None:
            self._sweep.cancel()

    @property
    def queued_rows(self) -> int:
        """Rows that wait."""
        return self.queue.rows

    @property
    def queued_bytes(self) -> int:
        """What they take."""
        return self.queue.bytes

    @property
    def busy(self) -> int:
        """Lanes that compute."""
        return len(self._lanes) - len(self._idle)

    @property
    def stalled_s(self) -> float:
        """Seconds for which the slowest lane has been computing its batch."""
        now = time.perf_counter()
        return max((now - since for _, since in self._running.values()), default=0.0)

    def require_room(self, model: Computes, n_rows: int, n_bytes: int, *, timeout_s: float, bulk: bool = False) -> None:
        """Refuse rows that there is no room for, or that would not be cut in time.

        Raises
        ------
        RequestError
            503.
        """
        if self._closed:
            raise overloaded("the service is stopping; try again")
        queue = self.queue
        if not queue.rows:
            return
        share = _BULK_ROOM if bulk else 1.0
        if (
            queue.rows + n_rows > share * self._max_queued_rows
            or queue.bytes + n_bytes > share * self._max_queued_bytes
            or queue.wait_s(model, bulk=bulk) > timeout_s
        ):
            raise self._refusal(model, bulk=bulk)

    def submit(
        self,
        model: Computes,
        rows: NDArray[Any],
        outputs: tuple[str, ...],
        *,
        timeout_s: float,
        bulk: bool = False,
        span: Any = None,
    ) -> Job:
        """Queue the rows of a request.

        Returns
        -------
        Job
            Whose future is awaited. Who stops waiting calls :meth:`abandon`.

        Raises
        ------
        RequestError
            503, as :meth:`require_room` has it.
        """
        self.require_room(model, len(rows), rows.nbytes, timeout_s=timeout_s, bulk=bulk)
        now = time.perf_counter()
        job = Job(
            model,
            rows,
            outputs,
            bulk=bulk,
            deadline=now + timeout_s,
            queued=now,
            future=self._loop.create_future(),
            span=span,
        )
        self.queue.add(job)
        if self._idle and not self._dispatch_is_due:
            # After the other requests that this turn of the loop brings: they are there already.
            self._dispatch_is_due = True
            self._loop.call_soon(self._dispatch)
        if self._sweep is None:
            self._sweep = self._loop.call_later(_SWEEP_S, self._look_at_deadlines)
        return job

    def _refusal(self, model: Computes, *, bulk: bool) -> RequestError:
        """Say that there is too much to do, and when to come again."""
        wait_s = self.queue.wait_s(model, bulk=bulk)
        seconds = min(max(1, math.ceil(wait_s)), _MAX_RETRY_AFTER_S)
        return overloaded(
            f"{self.queued_rows} rows wait, and these would for {wait_s:.1f} s; try again in {seconds} s",
            retry_after_s=seconds,
        )

    def abandon(self, job: Job) -> None:
        """Forget a job that nobody waits for: its rows that are not cut yet are not computed."""
        if not job.future.done():
            job.future.cancel()
        self.queue.remove(job)

    def _dispatch(self) -> None:
        self._dispatch_is_due = False
        while self._idle and self.queue:
            batch = self._cut()
            if batch is not None:
                lane = self._idle.pop()
                self._running[lane] = (batch, time.perf_counter())
                lane.give(batch)

    def _cut(self) -> Batch | None:
        """Cut a batch from the jobs whose turn it is; None where nobody waits for any of them."""
        share = max(_MIN_SHARE, -(-self.queue.rows // len(self._idle)))
        wanted = min(self._max_batch_rows, share)
        batch: Batch | None = None
        now = time.perf_counter()
        jobs = self.queue.next()
        for job in jobs:
            left = len(job.rows) - job.taken
            if job.future.done() or job.deadline < now:
                self.queue.forget(job, left)
                self._fail(job, too_late("got no place on the device"))
                continue
            batch = batch or Batch(job.model)
            n_rows = min(left, wanted - batch.n_rows)
            if not n_rows:
                break
            if not job.taken:
                job.cut = now
            batch.add(job, n_rows)
            self.queue.forget(job, n_rows)
            if n_rows < left:
                break
        jobs.close()
        return batch

    def _report(self, lane: _Lane, batch: Batch) -> None:
        try:
            self._loop.call_soon_threadsafe(self._finish, lane, batch)
        except RuntimeError:
            pass  # the loop is closed: nobody waits any more

    def _finish(self, lane: _Lane, batch: Batch) -> None:
        self._idle.append(lane)
        del self._running[lane]
        now = time.perf_counter()
        if batch.error is None:
            rate = batch.n_rows / max(batch.device_s, 1e-6) * self._n_lanes
            # Small batches say little of how fast a long queue is worked off.
            self.queue.learn(batch.model, rate, weight=min(1.0, batch.n_rows / _MIN_SHARE))
            named = dict(zip(batch.outputs, batch.features, strict=True))
        position = 0
        for job, start, stop in batch.members:
            there = slice(position, position + stop - start)
            position = there.stop
            job.device_s += batch.device_s
            if job.future.done():
                continue
            if batch.error is not None:
                self._fail(job, batch.error)
            elif batch.unusable and (row := batch.unusable_row(job.outputs, there)) is not None:
                self._fail(job, not_finite(start + row))
            else:
                collect(job, named, start, stop, there)
                if not job.pending:
                    job.done = now
                    job.future.set_result(job.parts)
        self._told(batch)
        if self.queue:
            self._dispatch()

    def _fail(self, job: Job, error: Exception) -> None:
        if not job.future.done():
            job.future.set_exception(error)
        # What is left of it is passed over when its turn comes.

    def _look_at_deadlines(self) -> None:
        self._sweep = None
        now = time.perf_counter()
        for job in [job for job in self._waiting() if job.deadline < now]:
            self._fail(job, too_late("got no place on the device"))
            # Or it would keep its memory, and others out, until its turn comes; of a device that hangs, never.
            self.queue.remove(job)
        if self.queue or self.busy:
            self._sweep = self._loop.call_later(_SWEEP_S, self._look_at_deadlines)

    def _waiting(self) -> Iterator[Job]:
        yield from self.queue
        # A device that hangs must not keep those waiting whose rows it has.
        for batch, _ in self._running.values():
            yield from (job for job, _, _ in batch.members)
