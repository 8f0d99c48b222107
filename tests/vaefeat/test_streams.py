"""Streams of minibatches: every row once, in an order that only the seed decides, in bounded memory."""

from __future__ import annotations

import gc
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from vaefeat.blocks import Blocks, open_blocks
from vaefeat.data import fingerprint
from vaefeat.errors import InputError, TrainingError
from vaefeat.streams import RowStream


class NumberedBlocks(Blocks):
    """Rows that hold their own number, in blocks of any sizes, which remembers what was read."""

    def __init__(self, sizes: list[int], *, n_features: int = 1) -> None:
        self.sizes = np.array(sizes, np.int64)
        self.row_shape, self.dtype, self.source = (n_features,), np.dtype(np.float32), "numbers"
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.read_blocks: list[int] = []

    def read(self, block: int) -> NDArray[Any]:
        self.read_blocks.append(block)
        rows = np.arange(self.starts[block], self.starts[block] + self.sizes[block], dtype=np.float32)
        return np.repeat(rows[:, None], self.row_shape[0], axis=1)


def _numbers(batches: Iterator[NDArray[Any]]) -> list[list[int]]:
    return [batch[:, 0].astype(int).tolist() for batch in batches]


def _flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


def _threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("vaefeat-read")}


def _least_buffer(sizes: list[int], n_features: int = 1) -> int:
    return 12 * max(sizes) * (4 * n_features + 8)


SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=25).filter(lambda sizes: sum(sizes) >= 2)


@settings(max_examples=60, deadline=None)
@given(
    sizes=SIZES,
    seed=st.integers(0, 2**40),
    batch_size=st.integers(1, 40),
    heldout=st.sampled_from([0.001, 0.1, 0.5, 0.99]),
    spare=st.integers(0, 5000),
)
def test_epoch_gives_every_training_row_once(
    sizes: list[int], seed: int, batch_size: int, heldout: float, spare: int
) -> None:
    blocks = NumberedBlocks(sizes)
    stream = RowStream(blocks, heldout=heldout, seed=seed, buffer_bytes=_least_buffer(sizes) + spare, workers=2)
    batches = _numbers(stream.epoch(0, batch_size=batch_size))
    assert sorted(_flat(batches) + stream.heldout.tolist()) == list(range(sum(sizes)))
    assert len(batches) == stream.steps_per_epoch(batch_size)
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    assert (stream.n_rows, stream.n_train) == (sum(sizes), sum(sizes) - len(stream.heldout))
    np.testing.assert_array_equal(stream.heldout_rows[:, 0], stream.heldout)
    assert not set(stream.sample[:, 0].astype(int)) & set(stream.heldout.tolist())
    assert len(stream.sample) >= 1


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, batch_size=st.integers(1, 40), world_size=st.integers(2, 5), epoch=st.integers(0, 3))
def test_ranks_give_disjoint_shares_in_as_many_steps(
    sizes: list[int], batch_size: int, world_size: int, epoch: int
) -> None:
    stream = RowStream(NumberedBlocks(sizes), buffer_bytes=_least_buffer(sizes), workers=1)
    if not world_size <= batch_size <= stream.n_train:
        with pytest.raises(InputError, match=f"batch_size={batch_size} for {world_size} workers"):
            stream.steps_per_epoch(batch_size, world_size)
        return
    ranks = [
        _numbers(stream.epoch(epoch, batch_size=batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    n_steps = stream.n_train // batch_size
    assert stream.steps_per_epoch(batch_size, world_size) == n_steps
    for rank, batches in enumerate(ranks):
        share = batch_size // world_size + (rank < batch_size % world_size)
        assert [len(batch) for batch in batches] == [share] * n_steps
    together = [number for batches in ranks for number in _flat(batches)]
    assert len(set(together)) == len(together) == n_steps * batch_size
    assert not set(together) & set(stream.heldout.tolist())


def test_ranks_read_hardly_any_block_twice() -> None:
    blocks = NumberedBlocks([10] * 60)
    stream = RowStream(blocks, buffer_bytes=3000)
    read = []
    for rank in range(4):
        blocks.read_blocks.clear()
        _numbers(stream.epoch(0, batch_size=16, rank=rank, world_size=4))
        assert len(set(blocks.read_blocks)) == len(blocks.read_blocks) <= 17
        read += blocks.read_blocks
    assert len(read) - len(set(read)) <= 3


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, batch_size=st.integers(1, 20), first_step=st.integers(0, 80), ranks=st.integers(1, 2))
def test_first_step_gives_the_rest_of_the_same_epoch(
    sizes: list[int], batch_size: int, first_step: int, ranks: int
) -> None:
    stream = RowStream(NumberedBlocks(sizes), buffer_bytes=_least_buffer(sizes), workers=2)
    if ranks > 1 and not ranks <= batch_size <= stream.n_train:
        return
    place: dict[str, int] = {"batch_size": batch_size, "rank": ranks - 1, "world_size": ranks}
    whole = _numbers(stream.epoch(5, **place))
    assert _numbers(stream.epoch(5, first_step=first_step, **place)) == whole[first_step:]


def test_first_step_does_not_read_the_buffers_before() -> None:
    blocks = NumberedBlocks([10] * 100)
    stream = RowStream(blocks, buffer_bytes=3000, workers=1)
    n_steps = stream.steps_per_epoch(8)
    blocks.read_blocks.clear()
    _numbers(stream.epoch(0, batch_size=8, first_step=n_steps - 1))
    assert 1 <= len(blocks.read_blocks) <= 12


def test_order_depends_on_seed_and_epoch_alone() -> None:
    sizes = [9, 20, 3, 14, 20, 1, 17] * 5

    def order(*, seed: int = 0, epoch: int = 0, workers: int | None = None, batch_size: int = 7) -> list[int]:
        stream = RowStream(NumberedBlocks(sizes), seed=seed, buffer_bytes=4000, workers=workers)
        return _flat(_numbers(stream.epoch(epoch, batch_size=batch_size)))

    expected = order()
    assert order(workers=8) == order(workers=1) == order(batch_size=20) == expected
    assert order(epoch=1) != expected
    assert order(seed=1) != expected


def test_order_does_not_depend_on_which_block_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = RowStream(NumberedBlocks([10] * 30), buffer_bytes=12_000, workers=4)
    expected = _numbers(stream.epoch(0, batch_size=8))
    read = NumberedBlocks.read

    def delayed(self: NumberedBlocks, block: int) -> NDArray[Any]:
        time.sleep((block * 7 % 5) / 1000)
        return read(self, block)

    monkeypatch.setattr(NumberedBlocks, "read", delayed)
    assert stream._workers == 4
    assert _numbers(stream.epoch(0, batch_size=8)) == expected


def test_order_is_spelt_out_so_that_runs_can_be_continued_by_later_versions() -> None:
    stream = RowStream(NumberedBlocks([4] * 5), seed=3, buffer_bytes=1200)
    assert stream.heldout.tolist() == [16, 19]
    order = _flat(_numbers(stream.epoch(2, batch_size=4)))
    assert order == [8, 13, 14, 4, 12, 10, 5, 18, 0, 2, 15, 9, 1, 6, 17, 7, 3, 11]


@pytest.mark.parametrize("block_rows", [10, 100])
def test_sorted_labels_are_mixed_as_the_number_of_blocks_in_a_buffer_promises(block_rows: int) -> None:
    """Ten classes one after the other: their shares in minibatches spread as the module's docstring says."""
    n_rows, batch_size, share = 50_000, 100, 0.1
    blocks = NumberedBlocks([block_rows] * (n_rows // block_rows))
    stream = RowStream(blocks, buffer_bytes=160_000, workers=1)
    labels = np.array(_numbers(stream.epoch(0, batch_size=batch_size))[:-1]) * 10 // n_rows
    shares = np.stack([(labels == label).mean(axis=1) for label in range(10)])
    per_buffer = stream._buffer_rows / block_rows
    expected = np.sqrt(share * (1 - share) * (1 / batch_size + 1 / per_buffer))
    assert shares.std() == pytest.approx(expected, rel=0.25)
    if per_buffer > batch_size:
        # As good as one shuffle of all rows, within what a minibatch of this size varies by itself.
        assert shares.std() < 1.3 * np.sqrt(share * (1 - share) / batch_size)


def test_neighbours_in_the_source_are_no_neighbours_in_the_stream() -> None:
    order = np.array(_flat(_numbers(RowStream(NumberedBlocks([50] * 40), seed=1).epoch(0, batch_size=10))))
    assert (np.abs(np.diff(order)) == 1).sum() <= 10
    # Any position holds any row: the mean of each tenth is the mean of all.
    for tenth in np.array_split(order, 10):
        assert tenth.mean() == pytest.approx(order.mean(), abs=5 * order.std() / np.sqrt(len(tenth)))


def test_heldout_rows_are_random_rows_of_the_share_asked_for() -> None:
    stream = RowStream(NumberedBlocks([100] * 50), heldout=0.2)
    assert len(stream.heldout) == 1000
    assert len(np.unique(stream.heldout // 100)) == 50
    assert np.mean(stream.heldout) == pytest.approx(2500, abs=250)
    assert len(stream.sample) == 4000


def test_heldout_rows_of_many_blocks_come_from_some_of_them() -> None:
    blocks = NumberedBlocks([2000] * 1000)
    stream = RowStream(blocks)
    assert len(blocks.read_blocks) == len(set(blocks.read_blocks)) <= 64
    assert (len(stream.heldout), len(stream.sample)) == (10_000, 8192)
    # Not neighbours: from the start to the end, and all over each block.
    chosen = np.unique(stream.heldout // 2000)
    assert chosen[0] < 150
    assert chosen[-1] > 850
    assert np.mean(stream.heldout % 2000) == pytest.approx(1000, abs=50)


def test_heldout_rows_and_sample_of_large_rows_are_bounded_in_bytes() -> None:
    stream = RowStream(NumberedBlocks([1] * 300, n_features=1 << 18), heldout=0.5, buffer_bytes=32 << 20)
    assert stream.heldout_rows.nbytes == stream.sample.nbytes == 64 << 20
    assert stream.n_train == 300 - 64


@pytest.mark.parametrize("kind", ["array", "npy", "parquet", "images"])
def test_heldout_rows_sample_and_epoch_are_rows_of_the_source(tmp_path: Path, kind: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (150, 1, 4, 3), np.uint8)
    source: Any = images
    if kind == "npy":
        source = tmp_path / "rows.npy"
        np.save(source, images)
    elif kind != "array":
        source = tmp_path / "rows"
        source.mkdir()
        for index, image in enumerate(images):
            Image.fromarray(image[0]).save(source / f"{index:03}.png")
    if kind == "parquet":
        cells = [path.read_bytes() for path in sorted(source.iterdir())]
        source = tmp_path / "rows.parquet"
        pq.write_table(pa.table({"image": cells}), source, row_group_size=60)
    stream = RowStream(open_blocks(source, block_bytes=300), buffer_bytes=9000, workers=2)
    np.testing.assert_array_equal(stream.heldout_rows, images[stream.heldout])
    number_of = {image.tobytes(): index for index, image in enumerate(images)}
    train = {number_of[row.tobytes()] for row in np.concatenate(list(stream.epoch(0, batch_size=16)))}
    assert len(train) == stream.n_train == 135
    assert not train & set(stream.heldout.tolist())
    assert len({number_of[row.tobytes()] for row in stream.sample} & train) == len(stream.sample) == 135


def test_plan_of_a_million_blocks_is_made_in_a_moment() -> None:
    stream = RowStream(NumberedBlocks([2] * 1_000_000), buffer_bytes=1 << 20)
    started = time.process_time()
    next(stream.epoch(0, batch_size=16, first_step=1000))
    assert time.process_time() - started < 5


def test_minibatches_are_the_callers_own() -> None:
    stream = RowStream(NumberedBlocks([10] * 60), buffer_bytes=3000)
    kept = list(stream.epoch(0, batch_size=16))
    assert _numbers(iter(kept)) == _numbers(stream.epoch(0, batch_size=16))
    assert all(batch.base is None for batch in kept)


def test_fingerprint_is_that_of_the_rows_and_layout_that_of_their_order(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (500, 8), np.uint8)
    np.save(tmp_path / "rows.npy", array)

    def stream(*, block_bytes: int = 400, **settings: Any) -> RowStream:
        return RowStream(open_blocks(tmp_path / "rows.npy", block_bytes=block_bytes), **settings)

    assert stream().fingerprint() == fingerprint(array)
    layouts = {stream(**one).layout() for one in ({}, {"seed": 1}, {"block_bytes": 200}, {"buffer_bytes": 20_000})}
    assert len(layouts) == 4
    assert stream().layout() == stream(workers=1).layout() in layouts


# What goes wrong


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heldout": 0}, "got heldout=0, wanted a share above 0 and below 1"),
        ({"heldout": 1.0}, "got heldout=1.0"),
        ({"seed": -1}, "got seed=-1, wanted an integer of at least 0"),
        ({"workers": 0}, "got workers=0, wanted an integer of at least 1"),
        ({"buffer_bytes": 1.5}, "got buffer_bytes=1.5, wanted an integer"),
        (
            {"buffer_bytes": 1000},
            "got buffer_bytes=1,000 for numbers, whose blocks have up to 50 rows of 4 bytes, wanted at least 7,200; "
            "raise buffer_bytes, or open the source with smaller block_bytes",
        ),
    ],
)
def test_stream_impossible_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        RowStream(NumberedBlocks([50, 50]), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "got batch_size=0"),
        ({"first_step": -1}, "got first_step=-1"),
        ({"rank": 2, "world_size": 2}, "got rank=2 of world_size=2, wanted 0 to 1"),
        ({"world_size": 9}, "for 9 workers"),
        ({"world_size": 2, "batch_size": 91}, "for 2 workers and 90 training rows"),
    ],
)
def test_epoch_impossible_setting_is_refused_at_once(settings: dict[str, Any], message: str) -> None:
    stream = RowStream(NumberedBlocks([50, 50]))
    with pytest.raises(InputError, match=message):
        stream.epoch(0, **{"batch_size": 8, **settings})


def test_single_row_is_refused() -> None:
    with pytest.raises(InputError, match="got 1 row to train on, wanted at least 2"):
        RowStream(NumberedBlocks([1]))


@pytest.mark.parametrize("error", [InputError("got a bad block"), MemoryError(), OSError(5, "disk")])
def test_error_in_a_thread_reaches_the_caller_as_it_is(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = RowStream(NumberedBlocks([10] * 60), buffer_bytes=3000, workers=2)
    read = NumberedBlocks.read
    expected = _numbers(stream.epoch(0, batch_size=8))
    bad = expected[40][0] // 10

    def failing(self: NumberedBlocks, block: int) -> NDArray[Any]:
        if block == bad:
            raise error
        return read(self, block)

    monkeypatch.setattr(NumberedBlocks, "read", failing)
    got: list[NDArray[Any]] = []
    with pytest.raises(type(error)) as caught:
        got.extend(stream.epoch(0, batch_size=8))
    assert caught.value is error
    # What was read before is handed out before.
    assert 0 < len(got) <= 40
    assert _numbers(iter(got)) == expected[: len(got)]
    assert not _threads()


@pytest.mark.parametrize("end", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_thread_that_dies_is_a_training_error(end: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = RowStream(NumberedBlocks([10] * 60), buffer_bytes=3000, workers=2)

    def dying(self: NumberedBlocks, block: int) -> NDArray[Any]:
        raise end

    monkeypatch.setattr(NumberedBlocks, "read", dying)
    with pytest.raises(TrainingError, match=rf"ended without a result \({type(end).__name__}"):
        next(stream.epoch(0, batch_size=8))
    assert not _threads()


def test_thread_that_cannot_be_started_is_a_training_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = RowStream(NumberedBlocks([10] * 60))

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(TrainingError, match=r"no thread can be started .*set fewer workers"):
        next(stream.epoch(0, batch_size=8))


def test_block_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = RowStream(NumberedBlocks([10] * 6))
    monkeypatch.setattr(NumberedBlocks, "read", lambda self, block: np.zeros((9, 1), np.float32))
    with pytest.raises(InputError, match=r"shape \(9, 1\) and float32 in block \d of numbers, wanted \(10, 1\)"):
        next(stream.epoch(0, batch_size=8))


def test_closed_generator_ends_its_threads_without_reading_on(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = NumberedBlocks([10] * 200)
    stream = RowStream(blocks, buffer_bytes=30_000, workers=2)
    read, held, closing = NumberedBlocks.read, threading.Event(), threading.Event()

    def slow(self: NumberedBlocks, block: int) -> NDArray[Any]:
        time.sleep(0.02)
        if held.is_set():
            closing.wait(60)
        return read(self, block)

    monkeypatch.setattr(NumberedBlocks, "read", slow)
    batches = stream.epoch(0, batch_size=8)
    next(batches)
    held.set()
    assert len(_threads()) == 2
    blocks.read_blocks.clear()
    threading.Timer(0.3, closing.set).start()
    batches.close()
    assert not _threads()
    # The second buffer wants some ninety; all but those that are just being read are called off.
    assert len(blocks.read_blocks) <= 20


def test_error_in_the_caller_ends_the_threads() -> None:
    stream = RowStream(NumberedBlocks([10] * 200), buffer_bytes=3000, workers=2)

    def fail_amid() -> None:
        for _ in stream.epoch(0, batch_size=8):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_amid()
    gc.collect()
    assert not _threads()


def test_epoch_that_is_not_begun_starts_no_thread() -> None:
    batches = RowStream(NumberedBlocks([10] * 60)).epoch(0, batch_size=8)
    assert not _threads()
    batches.close()


def test_file_that_shrinks_amid_an_epoch_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, np.zeros((1000, 8), np.uint8))
    stream = RowStream(open_blocks(path, block_bytes=80), buffer_bytes=3000)
    batches = stream.epoch(0, batch_size=8)
    next(batches)
    os.truncate(path, 128 + 500 * 8)
    with pytest.raises(InputError, match=r"rows\.npy with 500 of 1000 rows"):
        list(batches)
    assert not _threads()
