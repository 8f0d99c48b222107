"""Where minibatches come from: arrays and streams, for one worker and for several."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vaefeat import ModelConfig, TrainConfig, load_bundle, pretrain
from vaefeat.blocks import open_blocks
from vaefeat.checkpoint import read_checkpoint, write_checkpoint
from vaefeat.errors import CheckpointError, InputError, TrainingInterrupted
from vaefeat.feeds import ArrayFeed, Feed, StreamFeed, make_feed
from vaefeat.model.evaluation import fixed_noise
from vaefeat.model.vae import VAE
from vaefeat.observers import Observer
from vaefeat.streams import RowStream
from vaefeat.training import Trainer
from vaefeat.world import World

CPU = torch.device("cpu")
MODEL = ModelConfig(latent_dim=4, hidden_dims=(32,), network="mlp")


def array_feed(rows: NDArray[Any], *, batch_size: int = 10, world: World | None = None) -> Feed:
    return make_feed(rows, heldout=0.1, seed=3, batch_size=batch_size, device=CPU, world=world or World())


def numbered(n: int) -> NDArray[np.float32]:
    return np.arange(n, dtype=np.float32)[:, None]


def seen(feed: Feed, epoch: int = 0) -> list[float]:
    return [value for rows in feed.epoch(epoch) for value in rows[:, 0].tolist()]


def test_array_feed_gives_every_training_row_once_an_epoch_and_no_heldout_row() -> None:
    feed = array_feed(numbered(103))
    assert isinstance(feed, ArrayFeed)
    assert sorted([*seen(feed), *feed.heldout.tolist()]) == list(range(103))
    assert seen(feed, 0) == seen(feed, 0) != seen(feed, 1)
    assert [len(rows) for rows in feed.epoch(0)] == [feed.rows_in(step) for step in range(feed.steps_per_epoch)]


def test_array_feed_goes_on_in_mid_epoch_where_it_was_left() -> None:
    feed = array_feed(numbered(103))
    whole = [rows.tolist() for rows in feed.epoch(5)]
    assert [rows.tolist() for rows in feed.epoch(5, 4)] == whole[4:]


@pytest.mark.parametrize("size", [2, 3, 7])
def test_workers_share_each_minibatch_of_one_worker_out(size: int) -> None:
    alone = [rows.tolist() for rows in array_feed(numbered(103)).epoch(2)]
    parts = [
        [rows.tolist() for rows in array_feed(numbered(103), world=World(rank, size)).epoch(2)] for rank in range(size)
    ]
    assert [list(chain(*shares)) for shares in zip(*parts, strict=True)] == alone


def test_stream_feed_gives_the_streams_minibatches(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", numbered(1000))
    stream = RowStream(open_blocks(tmp_path / "rows.npy", block_bytes=64), heldout=0.1, seed=0)
    feed = make_feed(stream, heldout=0.1, seed=0, batch_size=32, device=CPU, world=World())
    assert isinstance(feed, StreamFeed)
    assert sorted([*seen(feed), *feed.heldout.tolist()]) == list(range(1000))
    np.testing.assert_array_equal(feed.heldout_rows[:, 0], feed.heldout)


@pytest.fixture
def digits_file(tmp_path: Path, digits_rows: NDArray[np.uint8]) -> Path:
    path = tmp_path / "digits.npy"
    np.save(path, digits_rows)
    return path


def test_training_on_a_stream_reaches_what_training_on_an_array_does(
    digits_file: Path, digits_rows: NDArray[np.uint8]
) -> None:
    train = TrainConfig(max_epochs=15, batch_size=64, device="cpu")
    streamed = pretrain(open_blocks(digits_file, block_bytes=1024), model=MODEL, train=train, progress=False)
    held = pretrain(digits_rows, model=MODEL, train=train, progress=False)
    # Other held-out rows, another order: what two seeds differ by.
    assert streamed.manifest.metrics["elbo"] == pytest.approx(held.manifest.metrics["elbo"], abs=1.0)
    assert streamed.manifest.data["n_rows"] == len(digits_rows)


def test_streamed_run_that_was_stopped_in_mid_epoch_goes_on_to_the_same_bundle(
    digits_file: Path, tmp_path: Path
) -> None:
    class Stop(Observer):
        def on_steps(self, *, epoch: int, step: int, **figures: Any) -> None:
            if (epoch, step) == (2, 50):
                raise TrainingInterrupted("enough")

    train = TrainConfig(max_epochs=3, batch_size=16, device="cpu", checkpoint_seconds=1e-9)
    settings: dict[str, Any] = {"model": MODEL, "train": train, "progress": False, "name": "digits"}
    whole = pretrain(open_blocks(digits_file, block_bytes=1024), **settings)
    with pytest.raises(TrainingInterrupted):
        pretrain(open_blocks(digits_file, block_bytes=1024), **settings, out=tmp_path / "run", observers=[Stop()])
    resumed = pretrain(open_blocks(digits_file, block_bytes=1024), **settings, out=tmp_path / "run", resume=True)
    assert resumed.digest == whole.digest
    assert load_bundle(tmp_path / "run").digest == whole.digest
    with pytest.raises(CheckpointError, match="order"):
        pretrain(open_blocks(digits_file, block_bytes=2048), **settings, out=tmp_path / "run", resume=True)


def test_streamed_epoch_begins_anew_for_another_number_of_workers(
    digits_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers take other rows in a minibatch than one does: what is left of the epoch is not what one leaves."""

    class Stop(Observer):
        def on_steps(self, *, epoch: int, step: int, **figures: Any) -> None:
            if (epoch, step) == (2, 100):
                raise TrainingInterrupted("enough")

    class Starts(Observer):
        def on_start(self, *, epochs: int, steps_per_epoch: int, epoch: int) -> None:
            self.trainer_at = trainer.epoch, trainer.step

        def on_note(self, text: str) -> None:
            self.note = text

    train = TrainConfig(max_epochs=3, batch_size=16, device="cpu", checkpoint_seconds=1e-9)
    checkpoint, starts = tmp_path / "checkpoint.safetensors", Starts()

    def make(*observers: Observer) -> Trainer:
        stream = RowStream(open_blocks(digits_file, block_bytes=1024), heldout=0.1, seed=0)
        with fixed_noise(0, CPU):
            vae = VAE.for_rows(MODEL, stream.sample)
        return Trainer(vae, stream, train, checkpoint=checkpoint, observers=observers)

    with pytest.raises(TrainingInterrupted):
        make(Stop()).run()
    tensors, meta = read_checkpoint(checkpoint)
    assert (meta["epoch"], meta["step"]) == (1, 50)
    write_checkpoint(checkpoint, tensors, {**meta, "workers": 2})
    trainer = make(starts)
    result = trainer.run(resume=True)
    assert starts.trainer_at == (1, 0)
    assert starts.note == "1 workers, not 2: epoch 2 begins anew"
    assert [record.epoch for record in result.history] == [1, 2, 3]


def test_file_that_shrinks_while_it_is_trained_on_is_one_clear_error_and_keeps_the_checkpoint(
    digits_file: Path, tmp_path: Path
) -> None:
    class Shrink(Observer):
        def on_epoch(self, record: object) -> None:
            with digits_file.open("r+b") as file:
                file.truncate(20_000)

    train = TrainConfig(max_epochs=3, device="cpu")
    blocks = open_blocks(digits_file, block_bytes=1024)
    with pytest.raises(InputError, match=r"digits\.npy"):
        pretrain(blocks, model=MODEL, train=train, progress=False, out=tmp_path / "run", observers=[Shrink()])
    assert (tmp_path / "run/training/checkpoint.safetensors").is_file()


LIMITED = """
    import resource, sys
    from pathlib import Path
    import numpy as np
    import torch
    from vaefeat import ModelConfig, TrainConfig
    from vaefeat.blocks import open_blocks
    from vaefeat.model.vae import VAE
    from vaefeat.streams import RowStream
    from vaefeat.training import Trainer

    def field(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10

    def train(path):
        stream = RowStream(open_blocks(path), heldout=0.02, seed=0, buffer_bytes=16 << 20, workers=2)
        vae = VAE.for_rows(ModelConfig(latent_dim=4, hidden_dims=(16,), network="mlp"), stream.sample)
        config = TrainConfig(max_epochs=1, batch_size=256, threads=1, device="cpu", compile=False, precision="float32")
        return Trainer(vae, stream, config).run()

    small, large, budget = sys.argv[1], sys.argv[2], int(sys.argv[3])
    train(small)
    before = field("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (before + budget, before + budget))
    result = train(large)
    print(result.evaluation.elbo, field("VmData") - before)
    try:
        np.fromfile(large, np.uint8)
    except MemoryError:
        print("the whole set does not fit")
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_training_on_four_times_the_allowed_memory_ends_well(tmp_path: Path) -> None:
    budget = 112 << 20
    rng = np.random.default_rng(0)
    piece = rng.integers(0, 256, (4096, 512), dtype=np.uint8)
    np.save(tmp_path / "small.npy", piece)
    large = np.lib.format.open_memmap(tmp_path / "large.npy", mode="w+", dtype=np.uint8, shape=(4 * budget // 512, 512))
    for start in range(0, len(large), len(piece)):
        large[start : start + len(piece)] = piece
    large.flush()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LIMITED), tmp_path / "small.npy", tmp_path / "large.npy", str(budget)],
        capture_output=True,
        text=True,
        check=False,
        env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    elbo, grown = map(float, done.stdout.splitlines()[0].split())
    assert np.isfinite(elbo)
    assert grown < budget
    assert "the whole set does not fit" in done.stdout


def test_memory_that_runs_out_is_an_error_with_a_batch_size_that_fits(tmp_path: Path) -> None:
    script = """
        import resource, sys
        from pathlib import Path
        import numpy as np
        from vaefeat import ModelConfig, TrainConfig, pretrain
        from vaefeat.errors import OutOfMemoryError

        rows = np.random.default_rng(0).integers(0, 256, (40_000, 64), dtype=np.uint8)
        model = ModelConfig(latent_dim=4, hidden_dims=(512, 512), network="mlp")
        settings = dict(model=model, progress=False)
        pretrain(rows[:64], train=TrainConfig(max_epochs=1, threads=1, device="cpu"), **settings)
        line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmData"))
        limit = (int(line.split()[1]) << 10) + (300 << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        train = TrainConfig(max_epochs=1, batch_size=32768, threads=1, device="cpu")
        try:
            pretrain(rows, train=train, out=sys.argv[1], **settings)
        except OutOfMemoryError as error:
            print(error)
            fitting = int(str(error).split("set batch_size=")[1].split(",")[0])
        train = TrainConfig(max_epochs=1, batch_size=fitting, threads=1, device="cpu")
        pretrain(rows[:9_000], train=train, out=sys.argv[1], **settings)
        print("trained with", fitting)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path / "run"],
        capture_output=True,
        text=True,
        check=False,
        env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert "batch_size=32768 does not fit into the memory of cpu" in done.stdout
    assert "trained with" in done.stdout


def test_gpu_that_can_hold_the_rows_keeps_them() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    device = torch.device("cuda")
    feed = make_feed(numbered(103), heldout=0.1, seed=3, batch_size=10, device=device, world=World())
    assert type(feed).__name__ == "DeviceFeed"
    assert sorted([*seen(feed), *feed.heldout.tolist()]) == list(range(103))


def test_stream_trains_from_the_trainer_with_its_own_heldout_rows(digits_file: Path) -> None:
    stream = RowStream(open_blocks(digits_file, block_bytes=512), heldout=0.2, seed=1)
    with fixed_noise(0, CPU):
        vae = VAE.for_rows(MODEL, stream.sample)
    result = Trainer(vae, stream, TrainConfig(max_epochs=1, device="cpu")).run()
    np.testing.assert_array_equal(result.heldout, stream.heldout)
