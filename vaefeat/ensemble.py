"""Several models trained at once, each as if it were alone: its own order of rows, split, schedule, and best weights.

M models, B rows of each in a minibatch, L latents.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vaefeat.config import ModelConfig, TrainConfig
from vaefeat.errors import ConfigError, NonFiniteLossError
from vaefeat.feeds import make_feed
from vaefeat.model.evaluation import active_units, evaluate, evaluating, fixed_noise
from vaefeat.model.objectives import OBJECTIVES
from vaefeat.model.stacked import StackedVAE
from vaefeat.model.vae import VAE
from vaefeat.observers import EpochRecord, Observer
from vaefeat.optimizers import log_weight_prior, make_optimizers
from vaefeat.placement import resolve_device, threads_for, using_threads
from vaefeat.schedules import kl_warmup_factor, learning_rate_factor
from vaefeat.training import TrainingResult
from vaefeat.tuning import Engine
from vaefeat.world import World

__all__ = ["OWN_SETTINGS", "Ensemble", "bytes_of", "refuse_alone"]

#: Settings of training that each model may have for itself.
OWN_SETTINGS = ("kl_weight", "learning_rate", "weight_decay", "seed")
#: What looks at one row, or at one weight, at a time, and can therefore be computed for many models in one go.
_TOGETHER = {
    "posterior": ("diagonal", "full", "deterministic", "categorical", "joint"),
    "prior": ("standard",),
    "likelihood": ("auto", "bernoulli", "gaussian", "categorical", "continuous_bernoulli"),
    "objective": ("elbo", "iwae", "reconstruction"),
    "corruption": ("none", "gaussian", "masking"),
    "optimizer": ("adamw", "adam", "adagrad", "sgd"),
    "precision": ("auto", "float32"),
    "compile": ("auto", False),
    "free_bits": (0,),
}
_STEPS_PER_READING = 50
_TERMS = ("objective", "log-likelihood", "KL divergence", "gradient")
_EVALUATED_ROWS = 512


def refuse_alone(models: Sequence[ModelConfig], train: TrainConfig) -> None:
    """Refuse what can only be trained one model after another.

    Raises
    ------
    ConfigError
        It names the setting, and what can be trained together.
    """
    advice = "or train the models one after another with vaefeat.pretrain"
    for name, choices in _TOGETHER.items():
        got = getattr(train, name) if hasattr(train, name) else getattr(models[0], name)
        if got not in choices:
            known = " or ".join(repr(choice) for choice in choices)
            raise ConfigError(
                f"got {name}={got!r}, with which models cannot be trained together; take {known}, {advice}"
            )
    if models[0].gaussian_std == "optimal" and models[0].likelihood in {"auto", "gaussian"}:
        raise ConfigError(
            "got gaussian_std='optimal', which one minibatch sets for all its rows, so that models cannot be trained "
            f"together; take gaussian_std='learned' or a number, {advice}"
        )
    latents = sorted({model.latent_dim for model in models})
    if models[0].posterior == "joint" and len(latents) > 1:
        raise ConfigError(
            f"got posterior='joint' with latent_dim of {latents}: its continuous latents cannot be padded, having "
            f"categorical ones behind them; give one latent_dim, {advice}"
        )


@torch.no_grad()
def bytes_of(vae: VAE, train: TrainConfig) -> int:
    """Estimate the memory that a model takes in training, in bytes.

    Its weights count four times (with gradients and an optimizer's two moments), what its layers give for a minibatch
    three times (kept, differentiated, and in between).
    """
    n_values = _values_between(vae.encoder, torch.zeros(1, *vae.row_shape))
    n_values += train.n_samples * _values_between(vae.decoder, torch.zeros(1, vae.config.latent_dim))
    n_weights = sum(weight.numel() for weight in vae.parameters())
    return 4 * (4 * n_weights + 3 * train.batch_size * n_values)


def _values_between(network: nn.Module, example: Tensor) -> int:
    """Count the values that the layers of a network give."""
    counts: list[int] = []
    layers = [layer for layer in network.modules() if not list(layer.children())]
    hooks = [layer.register_forward_hook(lambda *given: counts.append(given[2].numel())) for layer in layers]
    try:
        network(example)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(counts)


@dataclass
class _Member:
    """One of the models, and what became of it."""

    vae: VAE
    config: TrainConfig
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    history: list[EpochRecord] = field(default_factory=list)
    best_epoch: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    failure: NonFiniteLossError | None = None
    stopped: bool = False

    @property
    def trains(self) -> bool:
        return not self.stopped and self.failure is None


class Ensemble:
    """One run that trains M models side by side, on minibatches of their own.

    Every model gets the rows, the order, the held-out split, the schedules and the optimizer that
    :class:`~vaefeat.training.Trainer` would give it, and a gradient clipped by its own norm; only its noise is another.
    One whose loss becomes infinite or NaN is given up, and one whose patience runs out is left at its best; the others
    do not notice, not even in their noise.

    Parameters
    ----------
    vaes : sequence of VAE
        Of one configuration but for ``latent_dim``. Trained in place; on return each holds the weights with its best
        held-out objective.
    rows : ndarray of shape (n, ...)
        uint8 or float32, n of at least 2.
    configs : sequence of TrainConfig
        One for each model, equal but for :data:`OWN_SETTINGS`.
    observers : sequence of Observer
        Told the means over the models that still train, their rows per second all together, and at the end of an epoch
        the record of the model with the highest held-out bound.

    Raises
    ------
    ConfigError
        See :func:`refuse_alone`.
    DeviceError
        CUDA was asked for and there is none.
    """

    def __init__(
        self,
        vaes: Sequence[VAE],
        rows: NDArray[Any],
        configs: Sequence[TrainConfig],
        *,
        observers: Sequence[Observer] = (),
    ) -> None:
        refuse_alone([vae.config for vae in vaes], configs[0])
        # Models that share an optimizer lie side by side in the stacked weights.
        self._order = sorted(range(len(vaes)), key=lambda model: _rates(configs[model]))
        self.config, self.observers = configs[0], observers
        self.device = resolve_device(self.config.device)
        self.members = [_Member(vaes[model].to(self.device), configs[model]) for model in self._order]
        seeds = list(dict.fromkeys(config.seed for config in configs))
        self._feed_of = [seeds.index(member.config.seed) for member in self.members]
        self.feeds = [
            make_feed(
                rows,
                heldout=self.config.heldout,
                seed=seed,
                batch_size=self.config.batch_size,
                device=self.device,
                world=World(),
            )
            for seed in seeds
        ]
        with fixed_noise(self.config.seed, self.device):
            self.stack = StackedVAE([member.vae for member in self.members], self._feed_of)
        self.objective = OBJECTIVES[self.config.objective](self.config)
        self.n_train, self.steps_per_epoch = self.feeds[0].n_train, self.feeds[0].steps_per_epoch
        self.total_steps = self.config.max_epochs * self.steps_per_epoch
        self._kl_weights = torch.tensor([member.config.kl_weight for member in self.members], device=self.device)
        self._optimizers = self._make_optimizers()
        self._heldout_rows = [feed.heldout_rows for feed in self.feeds]
        self._heldout = torch.from_numpy(np.stack(self._heldout_rows)).to(self.device)

    def run(self) -> list[TrainingResult | NonFiniteLossError]:
        """Train to the end.

        Returns
        -------
        list of TrainingResult or NonFiniteLossError
            In the order of `vaes`: what :class:`~vaefeat.training.Trainer` returns or would have raised.
        """
        threads = self.config.threads or threads_for(
            self.members[0].vae, self.feeds[0].batch_size * len(self.members), self.config.n_samples
        )
        with fixed_noise(self.config.seed, self.device), using_threads(threads), ExitStack() as observed:
            for observer in self.observers:
                observed.callback(observer.on_end)
                observer.on_start(epochs=self.config.max_epochs, steps_per_epoch=self.steps_per_epoch, epoch=0)
            for epoch in range(self.config.max_epochs):
                if any(member.trains for member in self.members):
                    self._run_epoch(epoch)
            outcomes = [self._outcome(member, feed) for member, feed in zip(self.members, self._feed_of, strict=True)]
        return [outcomes[self._order.index(model)] for model in range(len(outcomes))]

    def _make_optimizers(self) -> list[tuple[slice, list[nn.Parameter], torch.optim.Optimizer]]:
        """Make an optimizer for each run of models with the same rates, over parts of the stacked weights."""
        rates = [_rates(member.config) for member in self.members]
        optimizers = []
        for rate in dict.fromkeys(rates):
            models = slice(rates.index(rate), rates.index(rate) + rates.count(rate))
            parts = [nn.Parameter(weight.detach()[models]) for weight in self.stack.stacked.values()]
            (optimizer,) = make_optimizers(nn.ParameterList(parts), self.members[models.start].config)
            optimizers.append((models, parts, optimizer))
        return optimizers

    def _run_epoch(self, epoch: int) -> None:
        self.stack.train()
        started, figures = time.perf_counter(), []
        read_at = started
        for step, minibatches in enumerate(zip(*(feed.epoch(epoch) for feed in self.feeds), strict=True)):
            figures.append(self._step(torch.cat(minibatches), epoch * self.steps_per_epoch + step))
            if len(figures) == _STEPS_PER_READING or step == self.steps_per_epoch - 1:
                self._read(torch.stack(figures).cpu(), epoch, step + 1 - len(figures), time.perf_counter() - read_at)
                figures, read_at = [], time.perf_counter()
        self._close_epoch(epoch, started, self.n_train / (time.perf_counter() - started))

    def _step(self, rows: Tensor, step: int) -> Tensor:
        """Take a step; give the sums of objective, log-likelihood and KL, and the gradient's norm: (4, M), float64."""
        n_rows, weights = len(rows) // len(self.feeds), list(self.stack.stacked.values())
        self.stack.posterior.anneal(step / self.total_steps, self.config)
        warm = kl_warmup_factor(step, self.total_steps, self.config.kl_warmup)
        terms = self.objective(self.stack, rows, kl_weight=warm * self._kl_weights.repeat_interleave(n_rows))
        # No model's term depends on another's weights, so that the gradient of the sum is that of each.
        objective = terms.objective.sum() / n_rows
        if self.config.weight_prior_std is not None:
            prior = log_weight_prior(self.stack.stacked.values(), self.config.weight_prior_std)
            objective = objective + prior / self.n_train
        gradients = torch.autograd.grad(-objective, weights, allow_unused=True)
        for name, gradient in zip(self.stack.stacked, gradients, strict=True):
            if gradient is not None and name in self.stack.masks:
                gradient.mul_(self.stack.masks[name])
        norm_M = _clipped([gradient for gradient in gradients if gradient is not None], self.config.gradient_clip)
        factor = learning_rate_factor(step, self.total_steps, self.config.lr_warmup, self.config.lr_schedule)
        for models, parts, optimizer in self._optimizers:
            for part, gradient in zip(parts, gradients, strict=True):
                # The fused optimizers read a gradient in the order of its memory, whatever its strides.
                part.grad = None if gradient is None else gradient[models].contiguous()
            for group in optimizer.param_groups:
                group["lr"] = self.members[models.start].config.learning_rate * factor
            optimizer.step()
        sums = [term.detach().view(len(self.members), -1).sum(dim=1, dtype=torch.float64) for term in terms]
        return torch.stack([*sums, norm_M.double()])

    def _read(self, figures: Tensor, epoch: int, first_step: int, seconds: float) -> None:
        """Take note of the figures (steps, 4, M) of the steps from `first_step` of an epoch."""
        for model, member in enumerate(self.members):
            finite = torch.isfinite(figures[:, :, model])
            if member.trains and not finite.all():
                step, term = (int(index) for index in torch.nonzero(~finite)[0])
                # The objective holds the other two: name the one that spoiled it.
                term = next((i for i in (1, 2) if not finite[step, i]), term)
                member.failure = _failure(
                    member.config,
                    f"the {_TERMS[term]} became {figures[step, term, model].item()} in epoch {epoch + 1}, batch "
                    f"{first_step + step + 1} of {self.steps_per_epoch}",
                )
            member.sums += figures[:, :3, model].sum(dim=0)
        training = [model for model, member in enumerate(self.members) if member.trains]
        if not training:
            return
        n_rows = min((first_step + len(figures)) * self.feeds[0].batch_size, self.n_train)
        n_rows -= first_step * self.feeds[0].batch_size
        _, log_likelihood, kl, _ = (figures[:, :, training].sum(dim=0).mean(dim=1) / n_rows).tolist()
        for observer in self.observers:
            observer.on_steps(
                epoch=epoch + 1,
                step=first_step + len(figures),
                elbo=log_likelihood - kl,
                log_likelihood=log_likelihood,
                kl=kl,
                rows_per_s=len(training) * n_rows / seconds,
            )

    def _close_epoch(self, epoch: int, started: float, rows_per_s: float) -> None:
        last_step = (epoch + 1) * self.steps_per_epoch - 1
        warm = kl_warmup_factor(last_step, self.total_steps, self.config.kl_warmup)
        rate = learning_rate_factor(last_step, self.total_steps, self.config.lr_warmup, self.config.lr_schedule)
        figures, active = self._evaluate()
        records = []
        for model, member in enumerate(self.members):
            _, log_likelihood, kl = (member.sums / self.n_train).tolist()
            member.sums.zero_()
            if not member.trains:
                continue
            objective, heldout_log_likelihood, heldout_kl = figures[:, model].tolist()
            record = EpochRecord(
                epoch=epoch + 1,
                train_elbo=log_likelihood - kl,
                train_log_likelihood=log_likelihood,
                train_kl=kl,
                heldout_elbo=heldout_log_likelihood - heldout_kl,
                heldout_log_likelihood=heldout_log_likelihood,
                heldout_kl=heldout_kl,
                heldout_objective=objective,
                active_units=active[model],
                kl_weight=warm * member.config.kl_weight,
                learning_rate=rate * member.config.learning_rate,
                rows_per_s=rows_per_s,
                seconds=time.perf_counter() - started,
            )
            member.history.append(record)
            records.append(record)
            self._judge(member, record, warm=warm == 1)
        if records:
            best = max(records, key=lambda record: record.heldout_elbo)
            for observer in self.observers:
                observer.on_epoch(best)

    def _judge(self, member: _Member, record: EpochRecord, *, warm: bool) -> None:
        """Keep the best weights, and stop as :class:`~vaefeat.training.Trainer` would."""
        best = member.history[member.best_epoch - 1].heldout_objective if member.best_epoch else -math.inf
        if record.heldout_objective > best:
            member.best_epoch = record.epoch
            member.best_weights = {name: weight.detach().clone() for name, weight in member.vae.named_parameters()}
        elif not math.isfinite(record.heldout_objective):
            member.failure = _failure(
                member.config, f"the held-out objective became {record.heldout_objective} in epoch {record.epoch}"
            )
        if self.config.patience is not None and warm:
            warm_epoch = math.ceil(self.config.kl_warmup * self.config.max_epochs)
            member.stopped = record.epoch - max(member.best_epoch, warm_epoch) >= self.config.patience

    @torch.no_grad()
    def _evaluate(self) -> tuple[Tensor, list[int]]:
        """Measure objective, log-likelihood and KL on each model's held-out rows, (3, M), and count active units."""
        n_models, n_heldout = len(self.members), self._heldout.shape[1]
        at_a_time = max(self.feeds[0].batch_size, math.ceil(_EVALUATED_ROWS / n_models))
        sums, means = torch.zeros(3, n_models, dtype=torch.float64, device=self.device), []
        with fixed_noise(self.config.seed, self.device), evaluating(self.stack):
            for start in range(0, n_heldout, at_a_time):
                rows = self._heldout[:, start : start + at_a_time].flatten(0, 1)
                n_rows = len(rows) // len(self.feeds)
                terms = self.objective(self.stack, rows, kl_weight=self._kl_weights.repeat_interleave(n_rows))
                sums += torch.stack([term.view(n_models, -1).sum(dim=1, dtype=torch.float64) for term in terms])
                mu_BL, _ = self.stack.posterior.statistics(self.stack.hidden(self.stack.distribute(rows)))
                means.append(mu_BL.unflatten(0, (n_models, -1)).cpu())
        # A padded latent does not vary, and what a model that was given up computes is nobody's concern.
        with np.errstate(invalid="ignore", over="ignore"):
            active = [len(active_units(mu_BL.numpy())) for mu_BL in torch.cat(means, dim=1)]
        return (sums / n_heldout).cpu(), active

    def _outcome(self, member: _Member, feed: int) -> TrainingResult | NonFiniteLossError:
        # Weights of its own again, no longer parts of the stacked ones.
        for name, weight in member.vae.named_parameters():
            weight.data = member.best_weights.get(name, weight.data).clone(memory_format=torch.contiguous_format)
        member.vae.eval()
        if member.failure is not None:
            return member.failure
        evaluation = evaluate(
            member.vae,
            self.objective,
            self._heldout_rows[feed],
            kl_weight=member.config.kl_weight,
            batch_size=max(self.feeds[feed].batch_size, _EVALUATED_ROWS),
            seed=member.config.seed,
        )
        return TrainingResult(
            tuple(member.history), evaluation, self.feeds[feed].heldout, self._heldout_rows[feed], Engine()
        )


def _failure(config: TrainConfig, reason: str) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"{reason}. Lower learning_rate (now {config.learning_rate:g}) or gradient_clip, and look for extreme values "
        "in the rows"
    )


def _rates(config: TrainConfig) -> tuple[float, float]:
    return config.learning_rate, config.weight_decay


def _clipped(gradients: list[Tensor], limit: float) -> Tensor:
    """Scale gradients (M, ...) in place to a norm of at most `limit` for each model; give the norms they had, (M,)."""
    norms = [torch.linalg.vector_norm(gradient.reshape(len(gradient), -1), dim=1) for gradient in gradients]
    norm_M: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    factor_M = (limit / (norm_M + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor_M.view(-1, *[1] * (gradient.ndim - 1)))
    return norm_M
