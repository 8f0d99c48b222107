"""Jobs that wait for the device: which go next, and how long others will have to wait.

Interactive jobs go before bulk ones, whatever model they are of; every ninth batch is of bulk work, so that it goes on
under any load. Models take turns, batch by batch, so that a slow one's long queue holds up nobody else's short one by
more than a batch each time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterator
from weakref import WeakKeyDictionary

from serving.batch import Computes, Job

__all__ = ["JobQueue"]

#: Interactive batches after which one of bulk work is cut.
_BULK_EVERY = 8
#: Weight of the newest batch in the measured rate.
_RATE_WEIGHT = 0.1


class _Line:
    """The jobs of one model: interactive ones and bulk, and their rows."""

    __slots__ = ("jobs", "rate", "rows")

    def __init__(self) -> None:
        self.jobs: tuple[deque[Job], deque[Job]] = deque(), deque()
        self.rows = [0, 0]
        self.rate = 0.0

    def seconds(self, kind: int, *, most_rows: float = math.inf) -> float:
        return min(self.rows[kind], most_rows) / self.rate if self.rate else 0.0


class JobQueue:
    """Jobs in the order in which batches are cut from them; belongs to one event loop.

    Parameters
    ----------
    max_batch_rows : int

    Attributes
    ----------
    rows, bytes : int
        What waits.
    """

    def __init__(self, *, max_batch_rows: int) -> None:
        self._max_batch_rows = max_batch_rows
        # Jobs hold their model; one that nobody waits for goes, with its session, when it is served no more.
        self._lines: WeakKeyDictionary[Computes, _Line] = WeakKeyDictionary()
        #: Lines with interactive jobs, and with bulk ones.
        self._turns: tuple[deque[_Line], deque[_Line]] = deque(), deque()
        self._since_bulk = 0
        self.rows = self.bytes = 0

    def __bool__(self) -> bool:
        return bool(self._turns[0] or self._turns[1])

    def __iter__(self) -> Iterator[Job]:
        for kind, turn in enumerate(self._turns):
            for line in turn:
                yield from line.jobs[kind]

    def add(self, job: Job) -> None:
        """Put a job at the end of its line."""
        line = self._lines.get(job.model)
        if line is None:
            line = self._lines[job.model] = _Line()
        if not line.jobs[job.bulk]:
            self._turns[job.bulk].append(line)
        line.jobs[job.bulk].append(job)
        self.rows += len(job.rows)
        self.bytes += job.rows.nbytes
        line.rows[job.bulk] += len(job.rows)

    def remove(self, job: Job) -> None:
        """Take a job out that nobody waits for, if it is still there."""
        line = self._lines.get(job.model)
        if line is not None and job in line.jobs[job.bulk]:
            line.jobs[job.bulk].remove(job)
            self.forget(job, len(job.rows) - job.taken)
            self._leave(line)

    def next(self) -> Generator[Job, None, None]:
        """Yield the jobs that the next batch may be cut from, all of one model; each stays until :meth:`forget`.

        Whoever takes the last rows of a job, or finds that nobody waits for it, goes on to the next one, and leaves one
        of which rows are left.
        """
        kind = int(bool(self._turns[1]) and (not self._turns[0] or self._since_bulk >= _BULK_EVERY))
        self._since_bulk = 0 if kind or not self._turns[1] else self._since_bulk + 1
        line = self._turns[kind][0]
        self._turns[kind].rotate(-1)
        try:
            # A batch that has room left takes the other kind's rows of the model.
            for jobs in (line.jobs[kind], line.jobs[1 - kind]):
                while jobs:
                    yield jobs[0]
                    jobs.popleft()
        finally:
            self._leave(line)

    def forget(self, job: Job, n_rows: int) -> None:
        """Count rows that wait no longer."""
        self.rows -= n_rows
        self.bytes -= n_rows * (job.rows.nbytes // len(job.rows))
        self._lines[job.model].rows[job.bulk] -= n_rows

    def clear(self) -> None:
        """Forget all jobs."""
        self._lines.clear()
        for turn in self._turns:
            turn.clear()
        self.rows = self.bytes = 0

    def learn(self, model: Computes, rate: float, *, weight: float) -> None:
        """Take note of how many rows of a model a second are computed; `weight` is below 1 for what says little."""
        line = self._lines.get(model)
        if line is not None:
            line.rate += (_RATE_WEIGHT * weight if line.rate else 1.0) * (rate - line.rate)

    def wait_s(self, model: Computes, *, bulk: bool) -> float:
        """Give the seconds after which rows of a model that come now are cut, as far as is known."""
        interactive, giving_way = self._turns
        if not giving_way and len(interactive) == 1 and interactive[0] is self._lines.get(model):  # most often
            return interactive[0].seconds(0)
        first = self._seconds(0, model, all_of_it=bulk)
        second = self._seconds(1, model)
        return first + (second if bulk else min(second, first / _BULK_EVERY))

    def _seconds(self, kind: int, model: Computes, *, all_of_it: bool = False) -> float:
        own = self._lines.get(model)
        n_batches = 1 + (own.rows[kind] // self._max_batch_rows if own is not None else 0)
        # In turn with others: of their lines, no more batches than of its own.
        most_rows = math.inf if all_of_it else n_batches * self._max_batch_rows
        return sum(line.seconds(kind, most_rows=math.inf if line is own else most_rows) for line in self._turns[kind])

    def _leave(self, line: _Line) -> None:
        for kind, turn in enumerate(self._turns):
            if not line.jobs[kind] and line in turn:
                turn.remove(line)
