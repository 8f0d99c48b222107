"""Rows that do not fit into memory as shuffled minibatches.

An epoch permutes the blocks, reads consecutive ones into a buffer of bounded size, and hands out its rows in a random
order while threads fill a second buffer. A block's rows go straight to their random places, so that nothing is held
besides the two buffers and the blocks that are just being read. The order follows from the seed, the epoch and how the
rows are cut, never from which thread was faster.

How well rows are mixed depends on how many blocks a buffer holds. Rows that lie sorted in their source, with labels of
p in a class, have in each buffer of k blocks a share of p with a standard deviation of sqrt(p (1 - p) / k).
"""

from __future__ import annotations

import hashlib
import math
import operator
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaefeat.blocks_arrays import Blocks
from vaefeat.errors import InputError, TrainingError

__all__ = ["RowStream"]

_MAX_HELDOUT_ROWS = 10_000
_MAX_SAMPLE_ROWS = 8192
_MAX_KEPT_BYTES = 64 << 20
#: Held-out rows and the sample come from this many blocks, or from more where blocks hold few rows.
_LOOKED_AT_BLOCKS = 64
_ROWS_PER_KEPT_ROW = 4

#: Of the memory for buffering: two buffers take three eighths each, blocks that are being read take the rest.
_BUFFER_SHARE = 3 / 8
_READING_SHARE = 1 / 4
#: A block that is being read is there as it was stored, converted, and without its held-out rows.
_COPIES_OF_BLOCK = 3
_ORDER_BYTES = 8
_MAX_WORKERS = 8

#: What random numbers are for, so that no two uses draw the same ones.
_CHOICE, _BLOCK_ORDER, _ROW_ORDER = range(3)


class _Load(NamedTuple):
    """What is read into a buffer: parts of the training rows of blocks."""

    blocks: NDArray[np.int64]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    @property
    def n_rows(self) -> int:
        return int((self.stops - self.starts).sum())


class RowStream:
    """Minibatches of rows that are read as they are needed.

    Parameters
    ----------
    blocks : Blocks
        From :func:`vaefeat.blocks.open_blocks`.
    heldout : float
        Share of the rows that are never trained on, above 0 and below 1.
    seed : int
        Of the held-out rows and of all orders.
    buffer_bytes : int
        Memory for shuffling and reading ahead. The held-out rows and the sample come on top, each of 64 MiB at most.
    workers : int, optional
        Threads that read; fewer are used where their blocks would take more than a quarter of `buffer_bytes`. By
        default one for each processor, at most eight. The order of rows does not depend on it.

    Attributes
    ----------
    n_rows : int
        All rows.
    n_train : int
        Rows that are trained on in an epoch.
    heldout : ndarray of shape (m,), int64
        Sorted numbers of the rows that are never trained on: at least one, at most 10,000 and 64 MiB, drawn from at
        most 64 random blocks (more where blocks hold few rows), so that not everything has to be read for them.
    heldout_rows : ndarray of shape (m, ...)
        These rows, read once.
    sample : ndarray of shape (k, ...)
        Training rows from the same blocks, at most 8,192 and 64 MiB: to fit a scaling to, and to check.
    row_shape : tuple of int
    dtype : dtype
    source : str

    Raises
    ------
    InputError
        Fewer than two rows, an impossible argument, or blocks that are too large for the buffer.
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        heldout: float = 0.1,
        seed: int = 0,
        buffer_bytes: int = 128 << 20,
        workers: int | None = None,
    ) -> None:
        self.n_rows = len(blocks)
        if self.n_rows < 2:
            raise InputError(
                f"got {self.n_rows} row to train on, wanted at least 2: one to train on and one to measure"
            )
        if not 0 < heldout < 1:
            raise InputError(f"got heldout={heldout!r}, wanted a share above 0 and below 1")
        self._seed = _as_integer("seed", seed, least=0)
        self._blocks = blocks
        self.row_shape, self.dtype, self.source = blocks.row_shape, blocks.dtype, blocks.source
        self._starts = np.concatenate(([0], np.cumsum(blocks.sizes)))
        self._buffer_rows = self._capacity(_as_integer("buffer_bytes", buffer_bytes, least=1))
        self._workers = self._threads_for(buffer_bytes, workers)

        self.heldout, sampled = self._choose(np.random.default_rng([self._seed, _CHOICE]), heldout)
        self.n_train = self.n_rows - len(self.heldout)
        held_before = np.searchsorted(self.heldout, self._starts)
        self._train_sizes: NDArray[np.int64] = blocks.sizes - np.diff(held_before)
        self.heldout_rows, self.sample = self._pick(self.heldout, sampled)

    def fingerprint(self) -> str:
        """Tell sets of rows apart, see :meth:`vaefeat.blocks.Blocks.fingerprint`."""
        return self._blocks.fingerprint()

    def layout(self) -> str:
        """Tell orders of rows apart: a digest over all that decides them besides the epoch and the minibatches.

        A run that is continued with another layout (blocks or buffers of another size, another seed, other held-out
        rows) would see some rows twice and others not at all.
        """
        digest = hashlib.sha256(f"{self._seed} {self._buffer_rows}".encode())
        for numbers in (self._blocks.sizes, self.heldout):
            digest.update(numbers.astype("<i8").tobytes())
        return f"sha256:{digest.hexdigest()}"

    def steps_per_epoch(self, batch_size: int, world_size: int = 1) -> int:
        """Count the minibatches of an epoch, which is the same in every epoch and on every rank.

        Parameters
        ----------
        batch_size : int
            Rows in a minibatch, of all ranks.
        world_size : int
            Where there is one rank, the last minibatch may be short. Several ranks leave out the rows that do not fill
            one: other rows in every epoch.

        Raises
        ------
        InputError
            Fewer rows in a minibatch than ranks, or fewer training rows than in a minibatch of several ranks.
        """
        batch_size = _as_integer("batch_size", batch_size, least=1)
        if _as_integer("world_size", world_size, least=1) == 1:
            return math.ceil(self.n_train / batch_size)
        if not world_size <= batch_size <= self.n_train:
            raise InputError(
                f"got batch_size={batch_size} for {world_size} workers and {self.n_train} training rows, wanted a row "
                "for each worker and no more than there are; change batch_size or the number of workers"
            )
        return self.n_train // batch_size

    def epoch(
        self, epoch: int, *, batch_size: int, first_step: int = 0, rank: int = 0, world_size: int = 1
    ) -> Generator[NDArray[Any], None, None]:
        """Read the minibatches of an epoch in a random order.

        Parameters
        ----------
        epoch : int
            Another order for each.
        batch_size : int
            Rows in a minibatch, of all ranks together.
        first_step : int
            Begin with this minibatch. What lies in earlier buffers is not read.
        rank, world_size : int
            Every rank gets its share of each minibatch (the first ones a row more where it is uneven) from a part of
            the permuted blocks that no other rank gets. No more than one block is read by a rank and its neighbour,
            and then no row of it by both.

        Returns
        -------
        generator of ndarray of shape (b, ...)
            Each array is the caller's own. Closing the generator ends and joins its threads.

        Raises
        ------
        InputError
            An impossible argument; or, from the generator, rows that cannot be read.
        TrainingError
            From the generator: a thread ended without a result.
        """
        n_steps = self.steps_per_epoch(batch_size, world_size)
        first_step, epoch = _as_integer("first_step", first_step, least=0), _as_integer("epoch", epoch, least=0)
        if not 0 <= _as_integer("rank", rank, least=0) < world_size:
            raise InputError(f"got rank={rank} of world_size={world_size}, wanted 0 to {world_size - 1}")
        base, extra = divmod(batch_size, world_size)
        n_before, share = rank * base + min(rank, extra), base + (rank < extra)
        start = n_before * n_steps
        stop = min(start + share * n_steps, self.n_train)
        loads = self._loads(epoch, start, stop)
        return self._minibatches(loads, [self._seed, _ROW_ORDER, epoch, rank], share, first_step * share)

    def _capacity(self, buffer_bytes: int) -> int:
        """Rows that a buffer holds."""
        row_bytes = self._blocks.row_bytes + _ORDER_BYTES
        largest = int(self._blocks.sizes.max())
        wanted = math.ceil(largest * row_bytes * _COPIES_OF_BLOCK / _READING_SHARE)
        if buffer_bytes < wanted:
            raise InputError(
                f"got buffer_bytes={buffer_bytes:,} for {self.source}, whose blocks have up to {largest:,} rows of "
                f"{self._blocks.row_bytes:,} bytes, wanted at least {wanted:,}; "
                "raise buffer_bytes, or open the source with smaller block_bytes"
            )
        return int(buffer_bytes * _BUFFER_SHARE) // row_bytes

    def _threads_for(self, buffer_bytes: int, workers: int | None) -> int:
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted = min(processors, _MAX_WORKERS) if workers is None else _as_integer("workers", workers, least=1)
        block_bytes = int(self._blocks.sizes.max()) * (self._blocks.row_bytes + _ORDER_BYTES) * _COPIES_OF_BLOCK
        return max(1, min(wanted, int(buffer_bytes * _READING_SHARE) // block_bytes))

    def _choose(self, rng: np.random.Generator, heldout: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Draw the held-out rows and the sample from some random blocks; give their sorted numbers."""
        kept = max(1, _MAX_KEPT_BYTES // self._blocks.row_bytes)
        n_heldout = min(max(1, round(heldout * self.n_rows)), _MAX_HELDOUT_ROWS, kept, self.n_rows - 1)
        n_sample = min(_MAX_SAMPLE_ROWS, kept, self.n_rows - n_heldout)
        order = rng.permutation(len(self._blocks.sizes))
        enough = np.searchsorted(np.cumsum(self._blocks.sizes[order]), _ROWS_PER_KEPT_ROW * (n_heldout + n_sample)) + 1
        among = order[: max(_LOOKED_AT_BLOCKS, int(enough))]
        ends = np.cumsum(self._blocks.sizes[among])
        # Positions in the chosen blocks one after the other; their rows may be far too many to be numbered.
        positions = rng.choice(int(ends[-1]), min(n_heldout + n_sample, int(ends[-1])), replace=False)
        places = np.searchsorted(ends, positions, side="right")
        rows = positions - ends[places] + self._starts[among[places] + 1]
        return np.sort(rows[:n_heldout]), np.sort(rows[n_heldout:])

    def _pick(self, *choices: NDArray[np.int64]) -> list[NDArray[Any]]:
        """Read rows by their sorted numbers, each block once for all choices."""
        picked = [np.empty((len(rows), *self.row_shape), self.dtype) for rows in choices]
        bounds = [np.searchsorted(rows, self._starts) for rows in choices]
        wanted = np.flatnonzero(np.any([np.diff(bound) for bound in bounds], axis=0))

        def read(block: int) -> None:
            places = [slice(bound[block], bound[block + 1]) for bound in bounds]
            numbers = np.concatenate([rows[place] for rows, place in zip(choices, places, strict=True)])
            ascending = np.argsort(numbers)
            content = np.empty((len(numbers), *self.row_shape), self.dtype)
            content[ascending] = self._blocks.take(block, numbers[ascending] - self._starts[block])
            for rows, place in zip(picked, places, strict=True):
                count = place.stop - place.start
                rows[place], content = content[:count], content[count:]

        with _reading(self._workers) as pool:
            _wait([_submit(pool, read, int(block)) for block in wanted])
        return picked

    def _loads(self, epoch: int, start: int, stop: int) -> list[_Load]:
        """Cut rows `start` to `stop` of the permuted blocks into buffers of nearly the same size."""
        order = np.random.default_rng([self._seed, _BLOCK_ORDER, epoch]).permutation(len(self._blocks.sizes))
        ends = np.cumsum(self._train_sizes[order])
        begins = ends - self._train_sizes[order]
        among = np.flatnonzero((begins < stop) & (ends > start) & (begins < ends))
        order, begins, ends = order[among], begins[among], ends[among]
        lows, highs = np.maximum(begins, start), np.minimum(ends, stop)
        # A buffer takes the blocks that begin in its part: as many rows as all, and at most one block more.
        total, slack = stop - start, int((highs - lows).max())
        n_loads = 1 if total <= self._buffer_rows else math.ceil(total / (self._buffer_rows - slack))
        load_of = (lows - start) * n_loads // total
        bounds = [0, *(np.flatnonzero(np.diff(load_of)) + 1).tolist(), len(order)]
        # Views: a terabyte has a million blocks.
        lows, highs = lows - begins, highs - begins
        return [_Load(order[a:b], lows[a:b], highs[a:b]) for a, b in pairwise(bounds)]

    def _minibatches(
        self, loads: Sequence[_Load], seed: Sequence[int], size: int, n_skipped: int
    ) -> Generator[NDArray[Any], None, None]:
        """Hand out the rows of one buffer while the next is filled."""
        sizes = np.array([load.n_rows for load in loads])
        ends = np.cumsum(sizes)
        first = int(np.searchsorted(ends, n_skipped, side="right"))
        if first == len(loads):
            return
        # Two arrays for the whole epoch: fresh ones would be given to and taken from the system all the time.
        buffers = [np.empty((int(sizes[first:].max()), *self.row_shape), self.dtype) for _ in loads[first : first + 2]]
        with _reading(self._workers) as pool:
            pending = self._fill(pool, buffers[0], loads[first], [*seed, first])
            position = n_skipped - int(ends[first] - sizes[first])
            batch = nothing = np.empty((0, *self.row_shape), self.dtype)
            for index in range(first, len(loads)):
                _wait(pending)
                buffer = buffers[(index - first) % 2][: sizes[index]]
                if index + 1 < len(loads):
                    pending = self._fill(pool, buffers[(index + 1 - first) % 2], loads[index + 1], [*seed, index + 1])
                while position < len(buffer):
                    piece = buffer[position : position + size - len(batch)]
                    position += len(piece)
                    # Copied in any case: the buffer is filled anew while the caller still holds the minibatch.
                    batch = np.concatenate((batch, piece))
                    if len(batch) == size:
                        yield batch
                        batch = nothing
                position = 0
            if len(batch):
                yield batch

    def _fill(
        self, pool: ThreadPoolExecutor, buffer: NDArray[Any], load: _Load, seed: Sequence[int]
    ) -> list[Future[None]]:
        """Begin to read blocks and to put their rows down at random places."""
        places = np.random.default_rng(seed).permutation(load.n_rows)
        futures, position = [], 0
        for block, start, stop in zip(load.blocks.tolist(), load.starts.tolist(), load.stops.tolist(), strict=True):
            chosen = places[position : position + stop - start]
            futures.append(_submit(pool, self._put_down, buffer, chosen, block, start))
            position += len(chosen)
        return futures

    def _put_down(self, buffer: NDArray[Any], places: NDArray[np.int64], block: int, start: int) -> None:
        """Read a block, and put training rows of it, from its number `start` on, where they belong in the buffer."""
        rows = self._blocks.read(block)
        wanted = (int(self._blocks.sizes[block]), *self.row_shape)
        if rows.shape != wanted or rows.dtype != self.dtype:
            raise InputError(
                f"got rows of shape {rows.shape} and {rows.dtype} in block {block} of {self.source}, "
                f"wanted {wanted} and {self.dtype}; the source was changed while it was read: start again"
            )
        first, last = self._starts[block : block + 2]
        held = self.heldout[slice(*np.searchsorted(self.heldout, (first, last)))]
        if len(held):
            rows = rows[np.delete(np.arange(len(rows)), held - first)]
        buffer[places] = rows[start : start + len(places)]


@contextmanager
def _reading(n_threads: int) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="vaefeat-read")
    try:
        yield pool
    finally:
        # Whatever ended the epoch: blocks that are being read are finished, and no other is begun.
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ThreadPoolExecutor, work: Callable[..., None], *arguments: Any) -> Future[None]:
    try:
        return pool.submit(work, *arguments)
    except RuntimeError as error:
        raise TrainingError(
            f"no thread can be started to read rows ({error}); set fewer workers, or allow the process more threads"
        ) from error


def _wait(futures: Sequence[Future[None]]) -> None:
    """Wait for all; raise the first error in the order of the blocks, not of time."""
    for future in futures:
        error = future.exception()
        if isinstance(error, Exception):
            raise error
        if error is not None:
            raise TrainingError(
                f"a thread that reads rows ended without a result ({type(error).__name__}: {error}); "
                "train again, with resume=True where there is a checkpoint"
            ) from error


def _as_integer(name: str, value: int, *, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise InputError(f"got {name}={value!r}, wanted an integer of at least {least}")
    return number
