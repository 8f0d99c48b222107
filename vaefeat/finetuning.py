"""The loop that trains encoder and head together on few labelled rows and many unlabelled ones.

B rows of a minibatch, K classes, N labelled rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional

from vaefeat.consistency import AdaptiveThresholds, Alignment, Teacher, consistency_loss
from vaefeat.errors import NonFiniteLossError
from vaefeat.finetune_config import FineTuneConfig
from vaefeat.model.augmentation import augment, suitable
from vaefeat.model.classifier import Classifier
from vaefeat.model.evaluation import fixed_noise
from vaefeat.model.objectives import Objective
from vaefeat.model.vae import VAE
from vaefeat.observers import TaskObserver
from vaefeat.placement import resolve_device, threads_for, using_threads
from vaefeat.propagation import spread_labels
from vaefeat.targets import Targets
from vaefeat.tuning import faster_precision, is_short

__all__ = ["FineTuned", "FineTuner", "Schedule", "Settling", "endless", "layers_joined"]

#: Weak views are moved, no more, and by this share of what strong ones are.
_WEAK = 0.3
_WEAK_NAMES = ("affine", "flip")
#: Share of the steps in which the learning rate falls.
_COOLDOWN = 0.25
_STEPS_PER_CHECK = 50
_WATCHED_ROWS = 1000
#: Rows whose labels are guessed before training; each looks for its neighbours among all.
_SPREAD_ROWS = 10_000
#: Answers have settled when, on average, no more than this part of their probability moved between two checks.
_SETTLED = 0.002
_ROWS_AT_A_TIME = 256
_LARGEST_GRADIENT = 10.0


@dataclass(frozen=True)
class FineTuned:
    """What fine-tuning leaves.

    Attributes
    ----------
    classifier : Classifier
        The teacher, on the CPU, in evaluation mode.
    n_steps : int
        Steps taken.
    settled : bool
        Whether training ended early, since answers no longer changed.
    """

    classifier: Classifier
    n_steps: int
    settled: bool


class FineTuner:
    """One fine-tuning run.

    Parameters
    ----------
    vae : VAE
        Trained in place; what it ends as is not what is served, which is the average over the run.
    rows : ndarray of shape (n, ...)
        As the model takes them, labelled or not.
    targets : Targets
        Labels of 0 to K - 1, each of them somewhere. A labelled row is never in the stream of unlabelled ones.
    shares : ndarray of shape (K,)
        What the share of each class among the unlabelled rows is taken to be.
    objective : Objective
        What the encoder was pretrained with.
    config : FineTuneConfig
    head : Module, optional
        A linear layer to begin with, which knows these classes; without it, what the pretrained features say is one.

    Raises
    ------
    ConfigError
        An augmentation that there is none of for such rows.
    DeviceError
        CUDA was asked for and there is none.
    """

    def __init__(
        self,
        vae: VAE,
        rows: NDArray[Any],
        targets: Targets,
        *,
        shares: NDArray[np.float64],
        objective: Objective,
        config: FineTuneConfig,
        head: nn.Module | None = None,
    ) -> None:
        self.config, self.objective, self.shares = config, objective, shares
        self.device = resolve_device(config.device)
        suitable(vae.row_shape, config.augmentations, ids=vae.preprocessing.whole)
        # Where pretraining ended: bundles do not hold the temperature of categories.
        vae.posterior.anneal(1.0, objective.config)
        self.rows, self.labels, self.weights = rows, targets.codes, targets.weights
        self.labelled = targets.labelled
        self.unlabelled = targets.unlabelled if config.unlabelled_weight else self.labelled[:0]
        self.student = Classifier(vae, len(shares))
        if head is not None:
            self.student.head.load_state_dict(head.state_dict())
        self._has_head = head is not None
        self.student.to(self.device)
        self.alignment = Alignment(torch.tensor(shares, dtype=torch.float32, device=self.device))
        self.thresholds = AdaptiveThresholds()
        self.schedule = Schedule(config.max_steps)
        self.settling = Settling(config.patience)

    def run(self, *, progress: bool = False, observer: TaskObserver | None = None) -> FineTuned:
        """Train to the end.

        Parameters
        ----------
        progress : bool
            Show a bar on standard error: loss, and the share of unlabelled rows whose labels were trusted.
        observer : TaskObserver, optional
            Told of every 50 steps.

        Raises
        ------
        NonFiniteLossError
            The loss became NaN or infinite.
        """
        n_rows = self.config.batch_size + self._n_unlabelled
        threads = self.config.threads or threads_for(self.student.vae, n_rows)
        seeded = fixed_noise(self.config.seed, self.device)
        with seeded, using_threads(threads), _shown(self.config.max_steps, shown=progress) as show:
            self._start()
            self.student.vae.network_dtype = getattr(torch, self._precision(n_rows, threads))
            self._run_steps(show, observer or TaskObserver())
        return self._found(self.teacher.model.cpu())

    def _run_steps(self, show: Callable[[int, float, float], None], observer: TaskObserver) -> None:
        observer.on_start(n_tasks=math.ceil(self.config.max_steps / _STEPS_PER_CHECK))
        stop: bool | None = False
        while self.schedule.step < self.schedule.end and not stop:
            observer.on_task_start()
            for _ in range(min(_STEPS_PER_CHECK, self.schedule.end - self.schedule.step)):
                self._join_layers()
                show(self.schedule.step, *self._take_step())
                self.schedule.step += 1
            if self.schedule.step % _STEPS_PER_CHECK == 0:
                self._check()
            # Whoever looks does not draw from the noise of the run.
            with fixed_noise(self.config.seed, self.device):
                stop = observer.on_task(self._found_now, n_done=self.schedule.step)

    def _found_now(self) -> FineTuned:
        return self._found(copy.deepcopy(self.teacher.model).cpu())

    def _found(self, model: nn.Module) -> FineTuned:
        assert isinstance(model, Classifier)
        return FineTuned(model, self.schedule.step, self.schedule.end < self.config.max_steps)

    @property
    def _n_unlabelled(self) -> int:
        wanted = math.ceil(self.config.batch_size * self.config.unlabelled_ratio)
        return min(wanted, len(self.unlabelled))

    def _start(self) -> None:
        orders = np.random.default_rng(self.config.seed)
        self._labelled_stream = endless(self.labelled, self.config.batch_size, orders)
        self._unlabelled_stream = endless(self.unlabelled, self._n_unlabelled, orders)
        self._watched = orders.permutation(self.unlabelled if len(self.unlabelled) else self.labelled)[:_WATCHED_ROWS]
        if not self._has_head:
            self._start_head(orders)
        self.teacher = Teacher(self.student, copy.deepcopy(self.student), decay=self.config.teacher_decay)
        self.student.train()
        self._layers = self.student.layers()
        self._optimizer = torch.optim.AdamW(self._groups(), lr=0.0, weight_decay=self.config.weight_decay, fused=True)

    def _start_head(self, orders: np.random.Generator) -> None:
        """Start from what the pretrained features say of the unlabelled rows, too, of which a sample is enough."""
        n_more = max(0, _SPREAD_ROWS - len(self.labelled))
        rows = np.concatenate([self.labelled, orders.permutation(self.unlabelled)[:n_more]])
        h_NF, labels, weights = self._hidden(rows), self.labels[rows], self.weights[rows]
        # A guessed label counts once, whatever its row does.
        weights[labels < 0] = 1
        if (labels < 0).any():
            labels = spread_labels(h_NF, labels, self.shares)
        known = labels >= 0
        self.student.start_head(h_NF[known], labels[known], weights[known])

    def _precision(self, n_rows: int, threads: int) -> str:
        """Settle ``auto``, on a step's rows without their changes: no noise is drawn, no row given."""
        vae, asked = self.student.vae, self.config.precision
        if asked != "auto":
            return asked
        if is_short(vae, n_steps=self.config.max_steps, n_rows=n_rows):
            return "float32"
        x = self._scaled(np.resize(np.arange(len(self.rows)), n_rows))
        y = torch.zeros(n_rows, dtype=torch.int64, device=self.device)
        key = ("fine-tuning", vae.config, x.shape, x.device, len(self.shares), threads)
        precision, _, _ = faster_precision(
            vae, lambda: functional.cross_entropy(self.student(x), y).backward(), key=key
        )
        self._optimizer.zero_grad(set_to_none=True)
        return precision

    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [
            {"params": layer, "share": self.config.layer_decay**depth} for depth, layer in enumerate(self._layers)
        ]
        taken = {id(weight) for layer in self._layers for weight in layer}
        others = [weight for weight in self.student.parameters() if id(weight) not in taken]
        for weight in others:
            weight.requires_grad_(bool(self.config.elbo_weight) and weight.requires_grad)
        if self.config.elbo_weight:
            groups.append({"params": [weight for weight in others if weight.requires_grad], "share": 1.0})
        return groups

    def _join_layers(self) -> None:
        joined = layers_joined(self.schedule.step, self.config.max_steps, self.config.unfreezing, len(self._layers))
        for depth, layer in enumerate(self._layers):
            for weight in layer:
                weight.requires_grad_(depth < joined)
        rate = self.config.learning_rate * self.schedule.factor
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["share"]

    def _take_step(self) -> tuple[float, float]:
        chosen = next(self._labelled_stream)
        x_labelled = self._scaled(chosen)
        labels, weights = (torch.from_numpy(values[chosen]).to(self.device) for values in (self.labels, self.weights))
        views = [self._strong(x_labelled)]
        if len(self.unlabelled):
            given = next(self._unlabelled_stream)
            x_unlabelled = self._scaled(given)
            views.append(self._strong(x_unlabelled))
        logits_BK = self.student(torch.cat(views))
        loss = (weights * functional.cross_entropy(logits_BK[: len(chosen)], labels, reduction="none")).mean()
        trusted = math.nan
        if len(self.unlabelled):
            with torch.no_grad():
                probability_BK = torch.softmax(self.teacher.model(self._weak(x_unlabelled)), dim=1)
            pseudo = self.thresholds(self.alignment(probability_BK))
            loss = loss + self.config.unlabelled_weight * consistency_loss(logits_BK[len(chosen) :], pseudo)
            trusted = float(pseudo.trusted_B.float().mean())
        if self.config.elbo_weight:
            loss = loss + self.config.elbo_weight * self._pretraining_loss(given if len(self.unlabelled) else chosen)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), _LARGEST_GRADIENT)
        self._optimizer.step()
        self.teacher.follow()
        if not math.isfinite(value := float(loss.detach())):
            raise NonFiniteLossError(
                f"the loss became {value} at step {self.schedule.step + 1} of {self.config.max_steps}. Lower "
                f"learning_rate (now {self.config.learning_rate:g}) and look for extreme values in the rows"
            )
        return value, trusted

    def _pretraining_loss(self, chosen: NDArray[np.int64]) -> Tensor:
        terms = self.objective(self.student.vae, self._batch(chosen), kl_weight=self.objective.config.kl_weight)
        loss: Tensor = -terms.objective.mean() / self.rows[0].size
        return loss

    def _check(self) -> None:
        if self.schedule.cooling or self._any_frozen():
            return
        answers = self._answers(self._watched)
        if self.settling(answers):
            self.schedule.cool()

    def _any_frozen(self) -> bool:
        return layers_joined(
            self.schedule.step, self.config.max_steps, self.config.unfreezing, len(self._layers)
        ) < len(self._layers)

    def _batch(self, chosen: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.asarray(self.rows[chosen])).to(self.device)

    def _scaled(self, chosen: NDArray[np.int64]) -> Tensor:
        return self.student.vae.preprocessing(self._batch(chosen))  # type: ignore[no-any-return]

    def _strong(self, x: Tensor) -> Tensor:
        return augment(x, self.config.augmentations, strength=self.config.strength)

    def _weak(self, x: Tensor) -> Tensor:
        names = [name for name in self.config.augmentations if name in _WEAK_NAMES]
        return augment(x, names, strength=_WEAK * self.config.strength)

    @torch.no_grad()
    def _hidden(self, chosen: NDArray[np.int64]) -> NDArray[np.float32]:
        self.student.eval()
        parts = np.split(chosen, range(_ROWS_AT_A_TIME, len(chosen), _ROWS_AT_A_TIME))
        return np.concatenate([self.student.vae.hidden(self._scaled(part)).cpu().numpy() for part in parts])

    @torch.no_grad()
    def _answers(self, chosen: NDArray[np.int64]) -> Tensor:
        parts = np.split(chosen, range(_ROWS_AT_A_TIME, len(chosen), _ROWS_AT_A_TIME))
        return torch.cat([torch.softmax(self.teacher.model(self._scaled(part)), dim=1) for part in parts])


class Schedule:
    """How long training goes on, and the learning rate's factor: 1, then a straight line to zero at the end.

    Parameters
    ----------
    max_steps : int

    Attributes
    ----------
    step : int
        Steps taken.
    end : int
        Steps to take in all.
    """

    def __init__(self, max_steps: int) -> None:
        self.step, self.end = 0, max_steps
        self._falls_from = max_steps - round(_COOLDOWN * max_steps)

    @property
    def cooling(self) -> bool:
        """Whether the end is fixed."""
        return self.step >= self._falls_from

    @property
    def factor(self) -> float:
        """Of the learning rate, for the next step."""
        return 1.0 if not self.cooling else (self.end - self.step) / (self.end - self._falls_from)

    def cool(self) -> None:
        """Begin to end now: the fall takes the same share of the shorter run."""
        self._falls_from = self.step
        self.end = min(self.end, self.step + math.ceil(self.step * _COOLDOWN / (1 - _COOLDOWN)))


class Settling:
    """Notice without labels that a model has learned what it will: its answers stay the same.

    Parameters
    ----------
    patience : int or None
        How often in a row they must; None never notices.
    """

    def __init__(self, patience: int | None) -> None:
        self._patience, self._calm = patience, 0
        self._before: Tensor | None = None

    def __call__(self, probability_BK: Tensor) -> bool:
        """Take note of the answers (B, K) for the same rows as before, and tell whether they have settled."""
        if self._before is not None:
            # Half of the absolute differences is the probability that moved: the total variation distance.
            moved = float((probability_BK - self._before).abs().sum(dim=1).mean()) / 2
            self._calm = self._calm + 1 if moved <= _SETTLED else 0
        self._before = probability_BK
        return self._patience is not None and self._calm >= self._patience


def layers_joined(step: int, max_steps: int, share: float, n_layers: int) -> int:
    """Tell how many layers learn at a step, from the head down: one at first, all after a share of the steps.

    All of them do at the last step of a run of any length. Howard and Ruder 2018, ULMFiT, arXiv:1801.06146, section
    3.3.
    """
    n_steps = min(share * max_steps, max_steps - 1)
    return n_layers if step >= n_steps else 1 + math.floor(step / n_steps * (n_layers - 1))


def endless(indices: NDArray[np.int64], count: int, orders: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Give `count` of `indices` at a time, for ever: all of them once, in a new order, before any of them again."""
    waiting = indices[:0]
    while True:
        while len(waiting) < count:
            waiting = np.concatenate([waiting, orders.permutation(indices)])
        yield waiting[:count]
        waiting = waiting[count:]


@contextmanager
def _shown(max_steps: int, *, shown: bool) -> Iterator[Callable[[int, float, float], None]]:
    """Show a bar, and give what moves it: the step, the loss, the share of rows that are trusted."""
    bar = Progress(
        TextColumn("[bold]fine-tuning"),
        BarColumn(bar_width=8),
        TextColumn("{task.fields[figures]}", style="cyan"),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        disable=not shown,
    )
    task = bar.add_task("", total=max_steps, figures="")

    def show(step: int, loss: float, trusted: float) -> None:
        figures = f"loss {loss:.3f}" + ("" if math.isnan(trusted) else f" trusted {trusted:.0%}")
        bar.update(task, completed=step + 1, figures=figures)

    with bar:
        yield show
