"""The AEVB loop: epochs of steps, schedules, held-out bound, early stopping, exact resume.

The steps themselves are in ``step``, what they are fed with in ``feeds``, how they are computed in ``tuning``. Where
torch's process group is there, every worker runs this loop on its part of each minibatch, with the same weights.

References
----------
Kingma and Welling 2013, Auto-Encoding Variational Bayes, arXiv:1312.6114, algorithm 1.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaefeat.checkpoint import (
    memory_tensors,
    noise_tensors,
    optimizer_tensors,
    read_checkpoint,
    refuse_other_run,
    restore_memory,
    restore_noise,
    restore_optimizers,
    under,
    write_checkpoint,
)
from vaefeat.combinations import refuse_pair, refuse_workers
from vaefeat.config import FREE_SETTINGS, TrainConfig
from vaefeat.errors import CompileError, NonFiniteLossError, TrainingInterrupted
from vaefeat.feeds import make_feed, sample_of
from vaefeat.heldout import HeldOut
from vaefeat.interruption import StopRequest, stop_on_signals
from vaefeat.memory import explaining_memory
from vaefeat.model.evaluation import Evaluation, fixed_noise
from vaefeat.model.objectives import OBJECTIVES
from vaefeat.model.vae import VAE
from vaefeat.observers import EpochRecord, Observer
from vaefeat.placement import resolve_device, threads_for, using_threads
from vaefeat.readings import Readings, refuse_non_finite
from vaefeat.schedules import kl_warmup_factor, learning_rate_factor
from vaefeat.settings import unknown_name
from vaefeat.step import Knobs, TrainingStep
from vaefeat.streams import RowStream
from vaefeat.tuning import Engine, settle_engine
from vaefeat.world import World

__all__ = ["Trainer", "TrainingResult"]

#: Reading a figure from a GPU waits for it: losses are collected on the device and read this often.
_STEPS_PER_READING = 50


@dataclass(frozen=True)
class TrainingResult:
    """What training leaves, apart from the weights in the model.

    Attributes
    ----------
    history : tuple of EpochRecord
    evaluation : Evaluation
        On the held-out rows, of the weights that were kept.
    heldout : ndarray of shape (m,)
        Indices of the rows that were never trained on.
    heldout_rows : ndarray of shape (m, ...)
        These rows.
    engine : Engine
        How steps were computed.
    """

    history: tuple[EpochRecord, ...]
    evaluation: Evaluation
    heldout: NDArray[np.int64]
    heldout_rows: NDArray[Any]
    engine: Engine


class Trainer:
    """One training run.

    Parameters
    ----------
    vae : VAE
        Trained in place; on return it holds the weights with the best held-out objective, or the last ones.
    rows : ndarray of shape (n, ...) or RowStream
        uint8 or float32, n of at least 2; an array is indexed by the minibatch, so a memory map works.
    config : TrainConfig
    checkpoint : Path, optional
        Where the state is kept. Without it nothing is written, and a signal interrupts at once.
    identity : dict, optional
        What a checkpoint must agree on to be continued, besides `config`: the model and the data.
    observers : sequence of Observer

    Raises
    ------
    ConfigError
        An unknown objective.
    DeviceError
        CUDA was asked for and there is none.
    """

    def __init__(
        self,
        vae: VAE,
        rows: NDArray[Any] | RowStream,
        config: TrainConfig,
        *,
        checkpoint: Path | None = None,
        identity: dict[str, Any] | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        if config.objective not in OBJECTIVES:
            raise unknown_name("objective", config.objective, OBJECTIVES)
        refuse_pair(vae.config, config)
        self.config = config
        self.device = resolve_device(config.device)
        self.world = World.current()
        refuse_workers(vae.config, config, n_workers=self.world.size)
        self.vae = vae.to(self.device)
        self.objective = OBJECTIVES[config.objective](config)
        self.objective.start(self.vae)
        self.feed = make_feed(
            rows,
            heldout=config.heldout,
            seed=config.seed,
            batch_size=config.batch_size,
            device=self.device,
            world=self.world,
        )
        self.sample = sample_of(rows)
        self.batch_size, self.steps_per_epoch = self.feed.batch_size, self.feed.steps_per_epoch
        self.total_steps = config.max_epochs * self.steps_per_epoch
        self.take_step = TrainingStep(
            vae, self.objective, config, n_train=self.feed.n_train, world=self.world, full=self.feed.batch_size
        )
        self.judge = HeldOut(self.objective, config, batch_size=self.batch_size, world=self.world, device=self.device)
        self.checkpoint = checkpoint
        self.observers = observers if self.world.leads else ()
        binding = {key: value for key, value in config.to_dict().items() if key not in FREE_SETTINGS}
        self.identity = {"train": binding, **(identity or {})}
        self.threads = config.threads or threads_for(
            self.vae,
            self.batch_size // self.world.size,
            config.n_samples,
            sharing=self.world.neighbours(self.device),
        )
        self.readings = Readings()
        self.notes: list[str] = []
        self._settled, self._saved_at, self._read_at = False, time.perf_counter(), 0.0
        # The state of the run, all of which goes into a checkpoint.
        self.epoch = 0
        self.step = 0
        self.sums = torch.zeros(3, dtype=torch.float64)
        self.history: list[EpochRecord] = []
        self.best_epoch = 0
        self.best_weights = self._weights()
        self.stopped_early = False
        self.engine: Engine | None = None
        self.has_checkpoint = False

    def run(self, *, resume: bool = False) -> TrainingResult:
        """Train to the end, from the start or from the checkpoint.

        Parameters
        ----------
        resume : bool
            Continue from the checkpoint where there is one; the result is that of a run that was never stopped.

        Raises
        ------
        NonFiniteLossError
            A term became NaN or infinite; the last good checkpoint is kept.
        TrainingInterrupted
            SIGINT or SIGTERM arrived; the state is in the checkpoint.
        CheckpointError
            A checkpoint cannot be written, or belongs to another run.
        OutOfMemoryError
            A minibatch does not fit; the last checkpoint is kept.
        CompileError
            ``compile=True``, and the step cannot be compiled.
        """
        with fixed_noise(self.world.seed(self.config.seed), self.device), using_threads(self.threads):
            if resume and self.checkpoint and self.checkpoint.is_file():
                self._load(self.checkpoint)
            self.world.refuse_disagreement(repr((self.identity, self.epoch, self.step)), self.device)
            with self._observed():
                self._run_epochs()
            return self._end(self.vae)

    def end_of_copy(self) -> tuple[VAE, TrainingResult]:
        """Give what training would leave if it ended now, after an epoch; for runs of one process."""
        with fixed_noise(self.config.seed, self.device):
            vae = copy.deepcopy(self.vae)
            return vae, self._end(vae)

    def _end(self, vae: VAE) -> TrainingResult:
        vae.load_state_dict(self.best_weights)
        vae.eval()
        self.objective.finish(vae, self.sample)
        feed, evaluation = self.feed, self._evaluate(vae)
        return TrainingResult(tuple(self.history), evaluation, feed.heldout, feed.heldout_rows, self.engine or Engine())

    @contextmanager
    def _observed(self) -> Iterator[None]:
        with ExitStack() as started:
            for observer in self.observers:
                started.callback(observer.on_end)
                observer.on_start(epochs=self.config.max_epochs, steps_per_epoch=self.steps_per_epoch, epoch=self.epoch)
            yield

    def _run_epochs(self) -> None:
        if self.checkpoint is None:
            while not self._finished():
                self._run_epoch(StopRequest())
            return
        with stop_on_signals() as stop:
            while not self._finished():
                self._run_epoch(stop)
                if self._finished() or self.epoch % self.config.checkpoint_every == 0:
                    self._save(self.checkpoint)
            if self.world.any(bool(stop), self.device):
                raise TrainingInterrupted(
                    f"stopped by {stop} after the last epoch; nothing is lost: continue with resume=True"
                )

    def _finished(self) -> bool:
        return self.stopped_early or self.epoch == self.config.max_epochs

    def _run_epoch(self, stop: StopRequest) -> None:
        for observer in self.observers:
            observer.on_epoch_start(epoch=self.epoch + 1)
        self.vae.train()
        with closing(self.feed.epoch(self.epoch, self.step)) as feed:
            minibatches: Iterator[Tensor] = feed
            # A run that was stopped after the last step of an epoch has only to close it.
            if not self._settled and self.step < self.steps_per_epoch:
                rows = next(feed)
                self._settle_engine(rows, stop)
                minibatches = chain([rows], feed)
            first, started = self.step, time.perf_counter()
            while self.step < self.steps_per_epoch:
                self._run_steps(minibatches, stop, started)
                stopping = self.world.any(bool(stop), self.device)
                due = time.perf_counter() - self._saved_at > self.config.checkpoint_seconds
                if self.checkpoint and (stopping or self.world.any(due, self.device)):
                    self._read(started, wait=True)
                    self._save(self.checkpoint)
                if self.checkpoint and stopping:
                    raise TrainingInterrupted(
                        f"stopped by {stop} in epoch {self.epoch + 1} after batch {self.step} of "
                        f"{self.steps_per_epoch}; nothing is lost: continue with resume=True"
                    )
            self._read(started, wait=True)
        n_rows = sum(self.feed.rows_in(step) for step in range(first, self.step))
        self._close_epoch(n_rows / (time.perf_counter() - started), started)

    def _run_steps(self, minibatches: Iterator[Tensor], stop: StopRequest, started: float) -> None:
        """Take steps up to the next reading of the losses, or up to a request to stop."""
        first, figures = self.step, []
        # Workers stop together, after as many steps.
        while self.step < min(first + _STEPS_PER_READING, self.steps_per_epoch) and not (stop and self.world.size == 1):
            rows = next(minibatches)
            n_rows = self.feed.rows_in(self.step)
            with self._explained_memory(rows, n_rows):
                figures.append(self.take_step(rows, self._knobs(), n_rows=n_rows))
            self.step += 1
        if figures:  # each row one step: summed terms, the norm of the gradient, the number of rows
            summed = torch.stack(figures)
            self.world.add([summed])
            self.readings.send(first, summed)
        self._read(started)

    def _read(self, started: float, *, wait: bool = False) -> None:
        """Take note of the figures that have arrived."""
        for first, figures in self.readings.arrived(wait=wait):
            refuse_non_finite(
                figures[:, :4],
                epoch=self.epoch + 1,
                first=first,
                steps_per_epoch=self.steps_per_epoch,
                learning_rate=self.config.learning_rate,
                kept=f"; the last good checkpoint is {self.checkpoint}" if self.has_checkpoint else "",
            )
            _, log_likelihood, kl, _, n_rows = figures.sum(dim=0).tolist()
            self.sums += figures[:, :3].sum(dim=0)
            elapsed, self._read_at = time.perf_counter() - max(started, self._read_at), time.perf_counter()
            for observer in self.observers:
                observer.on_steps(
                    epoch=self.epoch + 1,
                    step=first + len(figures),
                    elbo=(log_likelihood - kl) / n_rows,
                    log_likelihood=log_likelihood / n_rows,
                    kl=kl / n_rows,
                    rows_per_s=n_rows / elapsed,
                )

    def _settle_engine(self, rows: Tensor, stop: StopRequest) -> None:
        """Choose how steps are computed, or take up what the run before chose."""
        n_rows = self.feed.rows_in(self.step)
        steps_left = self.total_steps - self.epoch * self.steps_per_epoch - self.step
        try:
            with self._explained_memory(rows, n_rows):
                self.engine = settle_engine(
                    self.take_step,
                    rows,
                    self.config,
                    before=self.engine,
                    n_rows=n_rows,
                    n_steps=steps_left,
                    threads=self.threads,
                    world=self.world,
                    device=self.device,
                )
        except CompileError:
            if not stop or self.world.size > 1:
                raise
        if stop:
            # Ctrl-C reaches the compiler, too: its failure says nothing of what it can do.
            self.engine = None
        self._settled = True
        for note in (*self.notes, *(self.engine.notes if self.engine else ())):
            for observer in self.observers:
                observer.on_note(note)

    def _explained_memory(self, rows: Tensor, n_rows: int) -> AbstractContextManager[None]:
        kept = f" The last checkpoint, {self.checkpoint}, is kept." if self.has_checkpoint else ""
        attempt = partial(self.take_step.attempt, rows, n_rows)
        return explaining_memory(attempt, n_rows=len(rows), n_workers=self.world.size, device=self.device, kept=kept)

    def _knobs(self) -> Knobs:
        step = self.epoch * self.steps_per_epoch + self.step
        return Knobs(self._learning_rate(step), self._kl_weight(step), step / self.total_steps)

    def _learning_rate(self, step: int) -> float:
        factor = learning_rate_factor(step, self.total_steps, self.config.lr_warmup, self.config.lr_schedule)
        return self.config.learning_rate * factor

    def _kl_weight(self, step: int) -> float:
        return self.config.kl_weight * kl_warmup_factor(step, self.total_steps, self.config.kl_warmup)

    def _close_epoch(self, rows_per_s: float, started: float) -> None:
        _, log_likelihood, kl = (self.sums / self.feed.n_train).tolist()
        evaluation = self._evaluate(self.vae)
        last_step = self.epoch * self.steps_per_epoch + self.step - 1
        self.epoch, self.step = self.epoch + 1, 0
        self.sums.zero_()
        record = EpochRecord(
            epoch=self.epoch,
            train_elbo=log_likelihood - kl,
            train_log_likelihood=log_likelihood,
            train_kl=kl,
            heldout_elbo=evaluation.elbo,
            heldout_log_likelihood=evaluation.log_likelihood,
            heldout_kl=evaluation.kl,
            heldout_objective=evaluation.objective,
            active_units=len(evaluation.active),
            kl_weight=self._kl_weight(last_step),
            learning_rate=self._learning_rate(last_step),
            rows_per_s=rows_per_s,
            seconds=time.perf_counter() - started,
        )
        self.history.append(record)
        self._judge(record, last_step)
        # Every one of them is told, whatever the others answer, and none draws from the noise of the run.
        with fixed_noise(self.config.seed, self.device):
            answers = [observer.on_epoch(record) for observer in self.observers]
        self.stopped_early |= self.world.any(any(answers), self.device)

    def _judge(self, record: EpochRecord, last_step: int) -> None:
        """Keep the best weights, or the last; stop when none were better for `patience` epochs after the warm-up."""
        judged = self.best_epoch and self.objective.comparable
        best = self.history[self.best_epoch - 1].heldout_objective if judged else -math.inf
        if record.heldout_objective > best:
            self.best_epoch = self.epoch
            self.best_weights = self._weights()
        elif not math.isfinite(record.heldout_objective):
            raise NonFiniteLossError(
                f"the held-out objective became {record.heldout_objective} after epoch {self.epoch}; lower "
                f"learning_rate (now {self.config.learning_rate:g}), and look for extreme values in the rows"
            )
        warm = kl_warmup_factor(last_step, self.total_steps, self.config.kl_warmup) == 1
        if self.config.patience is not None and warm:
            warm_epoch = math.ceil(self.config.kl_warmup * self.config.max_epochs)
            self.stopped_early = self.epoch - max(self.best_epoch, warm_epoch) >= self.config.patience

    def _evaluate(self, vae: VAE) -> Evaluation:
        self.objective.anneal((self.epoch * self.steps_per_epoch + self.step) / self.total_steps)
        return self.judge.evaluate(vae, self.feed.heldout_rows)

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.vae.state_dict().items()}

    def _save(self, path: Path) -> None:
        """Write the checkpoint; all workers call this, the first one writes."""
        tensors = {f"model.{name}": tensor for name, tensor in self.vae.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        tensors |= optimizer_tensors(self.take_step.optimizers)
        tensors |= noise_tensors(self.device, self.world)
        tensors |= memory_tensors(self.objective.memory, self.world)
        tensors["sums"] = self.sums
        meta = {
            "identity": self.identity,
            "epoch": self.epoch,
            "step": self.step,
            "best_epoch": self.best_epoch,
            "stopped_early": self.stopped_early,
            "workers": self.world.size,
            "engine": None if self.engine is None else asdict(self.engine),
            "history": [asdict(record) for record in self.history],
        }
        if self.world.leads:
            write_checkpoint(path, tensors, meta)
        self.has_checkpoint, self._saved_at = True, time.perf_counter()

    def _load(self, path: Path) -> None:
        tensors, meta = read_checkpoint(path)
        self.has_checkpoint = True
        refuse_other_run(path, meta["identity"], self.identity)
        self.vae.load_state_dict(under("model.", tensors))
        self.best_weights = {name: value.to(self.device) for name, value in under("best.", tensors).items()}
        restore_optimizers(self.take_step.optimizers, tensors)
        restore_memory(self.objective.memory, tensors, self.world)
        self.sums = tensors["sums"]
        place = [self.config.seed, meta["epoch"], meta["step"]]
        restore_noise(tensors, self.device, self.world, n_workers=meta["workers"], place=place)
        self.epoch, self.step, self.best_epoch = meta["epoch"], meta["step"], meta["best_epoch"]
        if self.feed.order_of_workers and meta["workers"] != self.world.size and self.step:
            # The rows that are left of the epoch are not those that these workers would take.
            self.notes.append(f"{self.world.size} workers, not {meta['workers']}: epoch {self.epoch + 1} begins anew")
            self.step, self.sums = 0, torch.zeros_like(self.sums)
        self.stopped_early = meta["stopped_early"]
        self.history = [EpochRecord(**record) for record in meta["history"]]
        if meta["engine"] is not None:
            self.engine = Engine(meta["engine"]["precision"], meta["engine"]["compiled"])
