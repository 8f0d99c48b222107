"""Training of generative classifiers: in each step a minibatch of rows with labels beside one of rows without.

B rows without a label, C rows with one, in a minibatch.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaefeat.config import TrainConfig
from vaefeat.errors import NonFiniteLossError
from vaefeat.feeds import Feed, make_feed
from vaefeat.model.evaluation import fixed_noise
from vaefeat.model.labelled import LabelledVAE
from vaefeat.model.networks import count_multiply_adds
from vaefeat.observers import ProgressBar, TaskObserver
from vaefeat.optimizers import make_optimizers
from vaefeat.placement import resolve_device, threads_for_step, using_threads
from vaefeat.schedules import kl_warmup_factor, learning_rate_factor
from vaefeat.targets import Targets
from vaefeat.world import World

__all__ = ["LabelledEpoch", "LabelledTrainer"]

#: Pairs of a row and a class that one pass decodes; a minibatch of more goes in parts, whose gradients are added.
_PAIRS_AT_A_TIME = 2**14
#: log of the probability from which a guessed class counts.
_CERTAIN = math.log(0.95)
#: Reading a figure from a GPU waits for it.
_STEPS_PER_READING = 20


@dataclass(frozen=True, kw_only=True)
class LabelledEpoch:
    """Means over an epoch's minibatches.

    Attributes
    ----------
    objective : float
        What is maximised.
    unlabelled_bound, labelled_bound : float
        U(x) and L(x, y), nats per row; NaN where there are no such rows.
    log_q : float
        log q(y|x) of the labels, nats per row.
    kl_weight : float
        At the last step.
    """

    objective: float
    unlabelled_bound: float
    labelled_bound: float
    log_q: float
    kl_weight: float


class LabelledTrainer:
    """One training run of a generative classifier.

    A step maximises, with mean bounds over its minibatches,

        (B U(x) + C L(x, y)) / (B + C) + classification_weight * mean log q(y|x),

    the objective of Kingma et al. 2014 (arXiv:1406.5298), equation 9, per row, and where rows are augmented

        + classification_weight * consistency * mean log q(guess|changed x),

    over the rows without a label whose class the classifier is certain of as they are (FixMatch: Sohn et al. 2020,
    arXiv:2001.07685, equation 4). The latter is no part of the papers' models; 0 leaves it out.

    An epoch is one pass over the rows without a label (over those with one, where there are no others); labels come
    round as often as that takes. Rows with a label are in no other minibatch than those with it, and nothing is held
    out: there is no early stopping that would spend labels.

    Parameters
    ----------
    model : LabelledVAE
        Trained in place.
    rows : ndarray of shape (n, ...)
        uint8 or float32.
    targets : Targets
        At least one row has a label.
    config : TrainConfig
        Optimizer, schedules, ``max_epochs``, ``batch_size`` (B), device, seed.
    labelled_batch_size : int
        C.
    classification_weight, consistency : float
    augmentations : tuple of str
        Names of :mod:`vaefeat.model.augmentation`: each look at a row is at a changed one.
    progress : ProgressBar, optional
    observer : TaskObserver, optional
        Told of each epoch.

    Raises
    ------
    DeviceError
        CUDA was asked for and there is none.
    """

    def __init__(
        self,
        model: LabelledVAE,
        rows: NDArray[Any],
        targets: Targets,
        config: TrainConfig,
        *,
        labelled_batch_size: int,
        classification_weight: float,
        consistency: float = 0.0,
        augmentations: tuple[str, ...] = (),
        progress: ProgressBar | None = None,
        observer: TaskObserver | None = None,
    ) -> None:
        self.config, self.device = config, resolve_device(config.device)
        self.model = model.to(self.device)
        self.classification_weight, self.consistency = classification_weight, consistency
        self.augmentations, self.progress = augmentations, progress
        self.observer = observer or TaskObserver()
        known = targets.labelled
        self.labels = torch.from_numpy(targets.codes[known]).to(self.device)
        self.weights = torch.from_numpy(targets.weights[known]).to(self.device)
        self.labelled_rows = torch.from_numpy(rows[known]).to(self.device)
        # Places among the rows with labels, so that rows and labels stay together.
        places = np.arange(len(self.labels))
        self.labelled = self._feed(places, min(labelled_batch_size, len(places)), stream=1)
        others = targets.unlabelled
        self.unlabelled = self._feed(rows[others], config.batch_size, stream=0) if len(others) else None
        self.steps_per_epoch = (self.unlabelled or self.labelled).steps_per_epoch
        self.total_steps = config.max_epochs * self.steps_per_epoch
        self.optimizers = make_optimizers(model, config)
        self.threads = config.threads or threads_for_step(3 * self._multiply_adds())
        self.history: list[LabelledEpoch] = []

    def run(self) -> tuple[LabelledEpoch, ...]:
        """Train to the end, and leave the model in evaluation mode.

        Raises
        ------
        NonFiniteLossError
            The objective became NaN or infinite.
        """
        if self.progress:
            self.progress.on_start(epochs=self.config.max_epochs, steps_per_epoch=self.steps_per_epoch, epoch=0)
        try:
            with fixed_noise(self.config.seed, self.device), using_threads(self.threads):
                labelled = self._come_round()
                self.observer.on_start(n_tasks=self.config.max_epochs)
                for epoch in range(self.config.max_epochs):
                    self.observer.on_task_start()
                    self.model.train()
                    self._run_epoch(epoch, labelled)
                    # Whoever looks does not draw from the noise of the run.
                    with fixed_noise(self.config.seed, self.device):
                        stop = self.observer.on_task(self._copy, n_done=epoch + 1)
                    if stop:
                        break
        finally:
            self.model.eval()
            if self.progress:
                self.progress.on_end()
        return tuple(self.history)

    def _copy(self) -> LabelledVAE:
        return copy.deepcopy(self.model).cpu().eval()

    def _feed(self, rows: NDArray[Any], batch_size: int, *, stream: int) -> Feed:
        """Feed all rows: nothing is held out, and the two streams have orders of their own."""
        seed = 2 * self.config.seed + stream
        return make_feed(rows, heldout=0, seed=seed, batch_size=batch_size, device=self.device, world=World())

    def _come_round(self) -> Iterator[Tensor]:
        """Give places of labels, epoch after epoch of theirs."""
        epoch = 0
        while True:
            yield from self.labelled.epoch(epoch)
            epoch += 1

    def _run_epoch(self, epoch: int, labelled: Iterator[Tensor]) -> None:
        unlabelled = self.unlabelled.epoch(epoch) if self.unlabelled else iter(())
        sums, read = torch.zeros(4, dtype=torch.float64, device=self.device), time.perf_counter()
        for index in range(self.steps_per_epoch):
            step = epoch * self.steps_per_epoch + index
            sums += self._step(next(unlabelled, None), next(labelled), step)
            if self.progress and (index + 1) % _STEPS_PER_READING == 0:
                means = (sums / (index + 1)).tolist()
                pace = _STEPS_PER_READING * self._rows_per_step / (time.perf_counter() - read)
                figures = f"bound {means[1] or means[2]:.2f} log q {means[3]:.3f} {pace / 1000:.1f}k rows/s"
                self.progress.show(epoch=epoch + 1, step=index + 1, figures=figures)
                read = time.perf_counter()
        self._close_epoch((sums / self.steps_per_epoch).tolist(), epoch)

    def _step(self, rows: Tensor | None, places: Tensor, step: int) -> Tensor:
        """Take a step; give the objective, U, L and log q, not waited for."""
        kl_weight = self._turn(step)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        n_unlabelled, n_labelled = 0 if rows is None else len(rows), len(places)
        n_rows = n_unlabelled + n_labelled
        y_C, weight_C = self.labels[places], self.weights[places]
        x = self.model.observe(self.labelled_rows[places], self.augmentations)
        terms = self.model.labelled(x, y_C, kl_weight=kl_weight)
        log_q = (weight_C * terms.log_q.gather(1, y_C[:, None]).squeeze(1)).mean()
        labelled_bound = (weight_C * terms.bound).mean()
        objective = labelled_bound * (n_labelled / n_rows) + self.classification_weight * log_q
        (-objective).backward()
        figures = [objective.detach(), labelled_bound.new_zeros(()), labelled_bound.detach(), log_q.detach()]
        if rows is not None:
            for part in rows.split(max(1, _PAIRS_AT_A_TIME // self.model.n_classes)):
                terms = self.model.unlabelled(self.model.observe(part, self.augmentations), kl_weight=kl_weight)
                part_objective = terms.bound.sum() / n_rows
                if self.consistency and self.augmentations:
                    agreed = self._agreed(part, terms.log_q).sum() / n_unlabelled
                    part_objective = part_objective + self.classification_weight * self.consistency * agreed
                (-part_objective).backward()
                figures[0] = figures[0] + part_objective.detach()
                figures[1] = figures[1] + terms.bound.detach().sum() / n_unlabelled
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        return torch.stack(figures).double()

    def _agreed(self, rows: Tensor, log_q_BK: Tensor) -> Tensor:
        """Give log q(y|changed row), (B,), for the class y that the unchanged row shows; 0 where that is in doubt."""
        with torch.no_grad():
            log_p, guess_B = self.model.class_log_probabilities(self.model.observe(rows)).max(dim=1)
        return log_q_BK.gather(1, guess_B[:, None]).squeeze(1) * (log_p > _CERTAIN)

    def _turn(self, step: int) -> float:
        """Set what schedules turn; give the weight of the KL terms."""
        config = self.config
        factor = learning_rate_factor(step, self.total_steps, config.lr_warmup, config.lr_schedule)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor
        return config.kl_weight * kl_warmup_factor(step, self.total_steps, config.kl_warmup)

    def _close_epoch(self, means: list[float], epoch: int) -> None:
        if not np.isfinite(means).all():
            raise NonFiniteLossError(
                f"the objective became {means[0]} in epoch {epoch + 1}. Lower learning_rate (now "
                f"{self.config.learning_rate:g}) or classification_weight, and look for extreme values in the rows"
            )
        objective, unlabelled_bound, labelled_bound, log_q = means
        kl_weight = self.config.kl_weight * kl_warmup_factor(
            (epoch + 1) * self.steps_per_epoch - 1, self.total_steps, self.config.kl_warmup
        )
        self.history.append(
            LabelledEpoch(
                objective=objective,
                unlabelled_bound=unlabelled_bound if self.unlabelled else np.nan,
                labelled_bound=labelled_bound,
                log_q=log_q,
                kl_weight=kl_weight,
            )
        )

    @property
    def _rows_per_step(self) -> int:
        return self.labelled.batch_size + (self.unlabelled.batch_size if self.unlabelled else 0)

    def _multiply_adds(self) -> int:
        """Count the multiplications with weights in a step's forward pass, but for those of small layers."""
        model, device = self.model, self.device
        row = torch.zeros((1, *model.row_shape), device=device)
        encoded = count_multiply_adds(model.encoder, row) + count_multiply_adds(model.classifier, row)
        decoded = count_multiply_adds(model.decoder, torch.zeros((1, model.decoded.width), device=device))
        n_unlabelled = self.unlabelled.batch_size if self.unlabelled else 0
        n_pairs = self.labelled.batch_size + n_unlabelled * model.n_classes
        return self._rows_per_step * encoded + n_pairs * decoded
