"""The AEVB loop: minibatches, schedules, held-out bound, early stopping, exact resume.

References
----------
Kingma and Welling 2013, Auto-Encoding Variational Bayes, arXiv:1312.6114, algorithm 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaefeat.checkpoint import read_checkpoint, write_checkpoint
from vaefeat.combinations import refuse_pair
from vaefeat.config import TrainConfig
from vaefeat.errors import CheckpointError, InputError, NonFiniteLossError, TrainingInterrupted
from vaefeat.interruption import StopRequest, stop_on_signals
from vaefeat.model.evaluation import Evaluation, evaluate, fixed_noise
from vaefeat.model.objectives import OBJECTIVES
from vaefeat.model.vae import VAE
from vaefeat.observers import EpochRecord, Observer
from vaefeat.optimizers import log_weight_prior, make_optimizers
from vaefeat.placement import resolve_device, row_taker, threads_for, using_threads
from vaefeat.schedules import kl_warmup_factor, learning_rate_factor
from vaefeat.settings import unknown_name

__all__ = ["Trainer", "TrainingResult", "split_heldout"]

#: Reading a figure from a GPU waits for it: losses are collected on the device and read this often.
_STEPS_PER_READING = 50
_MAX_HELDOUT_ROWS = 10_000
_TERMS = ("objective", "log-likelihood", "KL divergence", "gradient")
#: What may differ between a run and its continuation without changing the result.
_FREE_SETTINGS = {"device", "threads", "checkpoint_every"}


@dataclass(frozen=True)
class TrainingResult:
    """What training leaves, apart from the weights in the model.

    Attributes
    ----------
    history : tuple of EpochRecord
    evaluation : Evaluation
        On the held-out rows, of the best weights.
    heldout : ndarray of shape (m,)
        Indices of the rows that were never trained on.
    """

    history: tuple[EpochRecord, ...]
    evaluation: Evaluation
    heldout: NDArray[np.int64]


class Trainer:
    """One training run.

    Parameters
    ----------
    vae : VAE
        Trained in place; on return it holds the weights with the best held-out objective.
    rows : ndarray of shape (n, ...)
        uint8 or float32, n of at least 2; indexed by the minibatch, so a memory map works.
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
        rows: NDArray[Any],
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
        self.vae = vae.to(self.device)
        self.vae.network_dtype = getattr(torch, config.precision)
        self.objective = OBJECTIVES[config.objective](config)
        self.rows = rows
        self.train, self.heldout = split_heldout(len(rows), config.heldout, config.seed)
        self.batch_size = min(config.batch_size, len(self.train))
        self.steps_per_epoch = math.ceil(len(self.train) / self.batch_size)
        self.total_steps = config.max_epochs * self.steps_per_epoch
        self.optimizers = make_optimizers(vae, config)
        self.checkpoint = checkpoint
        self.observers = observers
        self.identity = {"train": _binding(config), **(identity or {})}
        self._take = row_taker(rows, self.device)
        self.threads = config.threads or threads_for(self.vae, self.batch_size, config.n_samples)
        # The state of the run, all of which goes into a checkpoint.
        self.epoch = 0
        self.step = 0
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.history: list[EpochRecord] = []
        self.best_epoch = 0
        self.best_weights = self._weights()
        self.stopped_early = False
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
        """
        with fixed_noise(self.config.seed, self.device), using_threads(self.threads):
            if resume and self.checkpoint and self.checkpoint.is_file():
                self._load(self.checkpoint)
            with self._observed():
                self._run_epochs()
            self.vae.load_state_dict(self.best_weights)
            evaluation = self._evaluate()
        self.vae.eval()
        return TrainingResult(tuple(self.history), evaluation, self.heldout)

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
            if stop:
                raise TrainingInterrupted(
                    f"stopped by {stop} after the last epoch; nothing is lost: continue with resume=True"
                )

    def _finished(self) -> bool:
        return self.stopped_early or self.epoch == self.config.max_epochs

    def _run_epoch(self, stop: StopRequest) -> None:
        started = time.perf_counter()
        order = np.random.default_rng([self.config.seed, self.epoch]).permutation(self.train)
        first = self.step
        self.vae.train()
        while self.step < self.steps_per_epoch:
            self._run_steps(order, stop)
            if stop and self.checkpoint:
                self._save(self.checkpoint)
                raise TrainingInterrupted(
                    f"stopped by {stop} in epoch {self.epoch + 1} after batch {self.step} of {self.steps_per_epoch}; "
                    "nothing is lost: continue with resume=True"
                )
        trained = time.perf_counter() - started
        n_rows = min(len(order), (self.step - first) * self.batch_size)
        self._close_epoch(n_rows / trained, started)

    def _run_steps(self, order: NDArray[np.int64], stop: StopRequest) -> None:
        """Take steps up to the next reading of the losses, or up to a request to stop."""
        started = time.perf_counter()
        first, terms = self.step, []
        while self.step < min(first + _STEPS_PER_READING, self.steps_per_epoch) and not stop:
            rows = self._take(order[self.step * self.batch_size : (self.step + 1) * self.batch_size])
            terms.append(self._take_step(rows))
            self.step += 1
        if not terms:
            return
        # Each row one step: summed terms, the norm of the gradient, the number of rows.
        read = torch.stack(terms).cpu()
        self._refuse_non_finite(read[:, :4], first)
        _, log_likelihood, kl, _, n_rows = read.sum(dim=0).tolist()
        self.sums += read[:, :3].sum(dim=0).to(self.sums)
        for observer in self.observers:
            observer.on_steps(
                epoch=self.epoch + 1,
                step=self.step,
                elbo=(log_likelihood - kl) / n_rows,
                log_likelihood=log_likelihood / n_rows,
                kl=kl / n_rows,
                rows_per_s=n_rows / (time.perf_counter() - started),
            )

    def _take_step(self, rows: Tensor) -> Tensor:
        step = self.epoch * self.steps_per_epoch + self.step
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate(step)
            optimizer.zero_grad(set_to_none=True)
        self.vae.posterior.anneal(step / self.total_steps, self.config)
        terms = self.objective(self.vae, rows, kl_weight=self._kl_weight(step))
        (-self._with_weight_prior(terms.objective.mean())).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.vae.parameters(), self.config.gradient_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        sums = [term.detach().sum(dtype=torch.float64) for term in terms]
        # The norm tells of weights that have just been spoiled, a step before any loss does.
        return torch.stack([*sums, norm.to(sums[0]), sums[0].new_tensor(len(rows))])

    def _learning_rate(self, step: int) -> float:
        factor = learning_rate_factor(step, self.total_steps, self.config.lr_warmup, self.config.lr_schedule)
        return self.config.learning_rate * factor

    def _with_weight_prior(self, objective: Tensor) -> Tensor:
        if self.config.weight_prior_std is None:
            return objective
        # The objective is per row: of the whole set's posterior, each row carries its share of the prior.
        prior = log_weight_prior(self.vae.parameters(), self.config.weight_prior_std)
        return objective + prior / len(self.train)

    def _kl_weight(self, step: int) -> float:
        return self.config.kl_weight * kl_warmup_factor(step, self.total_steps, self.config.kl_warmup)

    def _refuse_non_finite(self, terms: Tensor, first_step: int) -> None:
        finite = torch.isfinite(terms)
        if finite.all():
            return
        step, term = (int(index) for index in torch.nonzero(~finite)[0])
        # The objective holds the other two: name the one that spoiled it.
        term = next((i for i in (1, 2) if not finite[step, i]), term)
        kept = f"; the last good checkpoint is {self.checkpoint}" if self.has_checkpoint else ""
        raise NonFiniteLossError(
            f"the {_TERMS[term]} became {terms[step, term].item()} in epoch {self.epoch + 1}, batch "
            f"{first_step + step + 1} of {self.steps_per_epoch}{kept}. Lower learning_rate (now "
            f"{self.config.learning_rate:g}) or gradient_clip, and look for extreme values in the rows"
        )

    def _close_epoch(self, rows_per_s: float, started: float) -> None:
        _, log_likelihood, kl = (self.sums / len(self.train)).tolist()
        evaluation = self._evaluate()
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
        for observer in self.observers:
            observer.on_epoch(record)

    def _judge(self, record: EpochRecord, last_step: int) -> None:
        """Keep the best weights, and stop when they have not improved for `patience` epochs after the warm-up."""
        best = self.history[self.best_epoch - 1].heldout_objective if self.best_epoch else -math.inf
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

    def _evaluate(self) -> Evaluation:
        return evaluate(
            self.vae,
            self.objective,
            self.rows[self.heldout],
            kl_weight=self.config.kl_weight,
            batch_size=max(self.batch_size, 512),
            seed=self.config.seed,
        )

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.vae.state_dict().items()}

    def _save(self, path: Path) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.vae.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{index}.{name}": value for name, value in state.items()}
        tensors |= {"sums": self.sums, "random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        meta = {
            "identity": self.identity,
            "epoch": self.epoch,
            "step": self.step,
            "best_epoch": self.best_epoch,
            "stopped_early": self.stopped_early,
            "history": [asdict(record) for record in self.history],
        }
        write_checkpoint(path, tensors, meta)
        self.has_checkpoint = True

    def _load(self, path: Path) -> None:
        tensors, meta = read_checkpoint(path)
        self.has_checkpoint = True
        _refuse_other_run(path, meta["identity"], self.identity)
        self.vae.load_state_dict(_under("model.", tensors))
        self.best_weights = {name: value.to(self.device) for name, value in _under("best.", tensors).items()}
        for number, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in _under(f"optimizer.{number}.", tensors).items():
                index, _, key = name.partition(".")
                state.setdefault(int(index), {})[key] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.sums = tensors["sums"].to(self.device)
        torch.set_rng_state(tensors["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        self.epoch, self.step, self.best_epoch = meta["epoch"], meta["step"], meta["best_epoch"]
        self.stopped_early = meta["stopped_early"]
        self.history = [EpochRecord(**record) for record in meta["history"]]


def split_heldout(n_rows: int, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose the rows that are trained on and those that measure: at least one of each, at most 10,000 that measure.

    Returns
    -------
    train, heldout : ndarray of int64, sorted
    """
    if n_rows < 2:
        raise InputError(f"got {n_rows} row to train on, wanted at least 2: one to train on and one to measure")
    n_heldout = min(max(1, round(share * n_rows)), n_rows - 1, _MAX_HELDOUT_ROWS)
    order = np.random.default_rng(seed).permutation(n_rows)
    return np.sort(order[n_heldout:]), np.sort(order[:n_heldout])


def _binding(config: TrainConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in _FREE_SETTINGS}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _refuse_other_run(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    differing = [
        f"{group}.{key}: {_nested(theirs, group, key)!r} there, {_nested(ours, group, key)!r} here"
        for group in sorted(theirs.keys() | ours.keys())
        for key in sorted({*theirs.get(group, {}), *ours.get(group, {})})
        if _nested(theirs, group, key) != _nested(ours, group, key)
    ]
    if differing:
        raise CheckpointError(
            f"got the checkpoint {path} of another run ({'; '.join(differing)}); continue with the settings and rows "
            "it was made with, or start over with resume=False"
        )


def _nested(values: dict[str, Any], group: str, key: str) -> Any:
    return values.get(group, {}).get(key)
