"""One optimisation step, as it is run: kernel by kernel, compiled into one graph, or captured as a CUDA graph.

What is computed is the same in all three: rows are scaled (and corrupted), encoded, decoded and judged, the objective
is differentiated, workers add their gradients, the norm is clipped, the optimizers update the weights.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vaefeat.config import TrainConfig
from vaefeat.errors import CompileError
from vaefeat.model.evaluation import fixed_noise
from vaefeat.model.objectives import Objective
from vaefeat.model.vae import VAE
from vaefeat.optimizers import log_weight_prior, make_optimizers
from vaefeat.world import World

__all__ = ["Knobs", "TrainingStep"]

_LOG = logging.getLogger("vaefeat")
#: What a step returns: sums of the objective, log-likelihood and KL, the norm of the gradient, the number of rows.
N_FIGURES = 5
#: Steps that run as usual first, so that libraries have made their handles and workspaces.
_STEPS_BEFORE_CAPTURE = 3
#: Kinds of models that one process may compile; torch stops at eight, as a sign that something is wrong.
_GRAPHS = 256
#: Optimizers that keep all of their state on the device.
_CAPTURABLE = {"adamw", "adam", "sgd"}


class Knobs(NamedTuple):
    """What schedules turn from step to step.

    Attributes
    ----------
    learning_rate, kl_weight : float
    progress : float
        Share of training that is done, which sets temperatures.
    """

    learning_rate: float
    kl_weight: float
    progress: float


class TrainingStep:
    """A step of training, which changes the model's weights in place.

    Parameters
    ----------
    vae : VAE
        On its device, in training mode when the step is called.
    objective : Objective
    config : TrainConfig
    n_train : int
        Rows in an epoch, over which a prior on the weights is shared out.
    full : int
        Rows of all workers in a full minibatch: the shape that is captured on a GPU.
    world : World
        The workers whose gradients are added.
    """

    def __init__(
        self, vae: VAE, objective: Objective, config: TrainConfig, *, n_train: int, full: int, world: World
    ) -> None:
        self.vae, self.objective, self.config = vae, objective, config
        self._n_train, self._full, self._world = n_train, full, world
        self._parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
        self._device = self._parameters[0].device
        self.optimizers = make_optimizers(vae, config, capturable=self._device.type == "cuda")
        # Scalars that change are tensors: a compiled graph takes a Python number for a constant.
        self._kl_weight = torch.ones((), device=self._device)
        self._compiled: Callable[..., Any] | None = None
        self._share = world.share(full)
        self._compiled_shape: torch.Size | None = None
        self._graph: _CapturedStep | None = None
        self._eager_steps: float = 0

    def __call__(self, rows: Tensor, knobs: Knobs, *, n_rows: int) -> Tensor:
        """Take a step.

        Parameters
        ----------
        rows : Tensor of shape (b, ...)
            This worker's rows, on the model's device.
        knobs : Knobs
        n_rows : int
            Rows of all workers.

        Returns
        -------
        Tensor of shape (5,), float64
            Over this worker's rows; not waited for.
        """
        self._turn(knobs)
        if self._graph is not None and self._graph.fits(rows):
            return self._graph(rows)
        if self._may_be_captured(rows, n_rows):
            try:
                self._graph = _CapturedStep(lambda static: self._step(static, n_rows), rows)
            except RuntimeError as error:
                # Capturing computes nothing: weights and optimizer are as they were.
                _LOG.warning("steps are not captured as a CUDA graph: %s", str(error).splitlines()[0])
                self._eager_steps = -math.inf
            else:
                return self._graph(rows)
        self._eager_steps += 1
        return self._step(rows, n_rows)

    def gradients(self, rows: Tensor, *, n_rows: int) -> Tensor:
        """Compute what a step computes, and change no weight: for measuring."""
        figures, _ = self._fitting(rows, n_rows)(rows, n_rows)
        return figures

    def attempt(self, rows: Tensor, n_rows: int, n_first: int) -> None:
        """Compute with the first rows alone, to see whether they fit into memory."""
        self.gradients(rows[:n_first], n_rows=n_rows)

    def compile(self, rows: Tensor) -> None:
        """Compile for full minibatches; the short one at the end of an epoch goes on kernel by kernel.

        Parameters
        ----------
        rows : Tensor of shape (b, ...)
            Some of this worker's rows, of any minibatch.

        Raises
        ------
        CompileError
            This torch, compiler or model cannot; the step goes on as before.
        """
        config = torch._dynamo.config
        if not hasattr(config, "trace_autograd_ops"):
            raise CompileError("this torch cannot compile the backward pass with the forward pass; a newer one can")
        # Whatever minibatch a run that is continued comes upon first: the full ones are what is compiled.
        full = rows.new_zeros((self._share.stop - self._share.start, *rows.shape[1:]))
        full[: len(rows)] = rows
        # Models of one kind share a graph, whose inputs their weights are.
        compiled = torch.compile(self._differentiate, fullgraph=True, dynamic=False)
        try:
            with self.untouched():
                # Some tables of torch.distributions are filled at first use, which cannot be traced.
                self._differentiate(full, self._full)
                with config.patch(
                    trace_autograd_ops=True, recompile_limit=_GRAPHS, accumulated_recompile_limit=_GRAPHS
                ):
                    with _quiet():
                        compiled(full, self._full)
        except Exception as error:  # Inductor, its compiler and its cache each have their own
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise CompileError(f"{type(error).__name__}: {reason}") from error
        self._compiled, self._compiled_shape = compiled, full.shape
        self.forget_captured()

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Leave noise and running figures, such as the variance of an optimal Gaussian, as if nothing was computed."""
        buffers = [*self.vae.buffers(), *self.objective.memory.buffers()]
        before = [buffer.clone() for buffer in buffers]
        try:
            with fixed_noise(self.config.seed, self._device):
                yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)

    def forget_compiled(self) -> None:
        """Go back to kernel by kernel."""
        self._compiled = self._compiled_shape = None
        self.forget_captured()

    def forget_captured(self) -> None:
        """Capture anew: what is computed has changed."""
        self._graph = None

    def _may_be_captured(self, rows: Tensor, n_rows: int) -> bool:
        return (
            self._device.type == "cuda"
            and self.config.compile is not False
            and self._graph is None
            and self._eager_steps >= _STEPS_BEFORE_CAPTURE
            and self._world.size == 1
            and n_rows == self._full
            and self.config.optimizer in _CAPTURABLE
        )

    def _turn(self, knobs: Knobs) -> None:
        self._kl_weight.fill_(knobs.kl_weight)
        self.vae.posterior.anneal(knobs.progress, self.config)
        self.objective.anneal(knobs.progress)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(knobs.learning_rate)
                else:
                    group["lr"] = knobs.learning_rate

    def _fitting(self, rows: Tensor, n_rows: int) -> Callable[..., tuple[Tensor, list[Tensor | None]]]:
        # A worker's share of a short minibatch may be as large as of a full one; the graph holds the number of all.
        if self._compiled is not None and rows.shape == self._compiled_shape and n_rows == self._full:
            compiled = self._compiled
            # A graph holds the strides, too, and those of an axis of one channel are whatever NumPy left there.
            return lambda rows, n_rows: compiled(rows.reshape(-1).view(rows.shape), n_rows)
        return self._differentiate

    def _step(self, rows: Tensor, n_rows: int) -> Tensor:
        figures, gradients = self._fitting(rows, n_rows)(rows, n_rows) if len(rows) else self._nothing(rows, n_rows)
        if self._world.size > 1:
            pairs = zip(gradients, self._parameters, strict=True)
            # A weight that one worker has no gradient of has none anywhere, but messages must be of one length.
            whole = [torch.zeros_like(parameter) if gradient is None else gradient for gradient, parameter in pairs]
            self._world.add(whole)
            figures[3] = _clipped(whole, self.config.gradient_clip)
            gradients = [None if gradient is None else whole[i] for i, gradient in enumerate(gradients)]
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        for optimizer in self.optimizers:
            optimizer.step()
        return figures

    def _nothing(self, rows: Tensor, n_rows: int) -> tuple[Tensor, list[Tensor | None]]:
        """Give what a worker adds that has no row of a short minibatch: zeros, where others have gradients."""
        with self.untouched():
            figures, gradients = self._differentiate(rows.new_zeros((1, *rows.shape[1:])), n_rows)
        return torch.zeros_like(figures), [None if gradient is None else gradient.zero_() for gradient in gradients]

    def _differentiate(self, rows: Tensor, n_rows: int) -> tuple[Tensor, list[Tensor | None]]:
        terms = self.objective(self.vae, rows, kl_weight=self._kl_weight)
        # Sums over this worker's rows: added over the workers they give the mean over all.
        objective = terms.objective.sum() / n_rows
        if self.config.weight_prior_std is not None:
            # The objective is per row: of the whole set's posterior, each row carries its share of the prior.
            prior = log_weight_prior(self._parameters, self.config.weight_prior_std)
            objective = objective + prior * (len(rows) / n_rows / self._n_train)
        found = torch.autograd.grad(-objective, self._parameters, allow_unused=True)
        gradients = [_laid_like(*pair) for pair in zip(found, self._parameters, strict=True)]
        sums = [term.detach().sum(dtype=torch.float64) for term in terms]
        norm = sums[0].new_zeros(())
        if self._world.size == 1:
            # The norm tells of weights that have just been spoiled, a step before any loss does.
            norm = _clipped([g for g in gradients if g is not None], self.config.gradient_clip).to(norm)
            # With several workers that of their sum is clipped, once it is known.
        return torch.stack([*sums, norm, torch.full_like(norm, len(rows))]), gradients


class _CapturedStep:
    """A step as a CUDA graph: one launch for all of its kernels.

    Its random numbers come from torch's global generator, which advances with each replay.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], rows: Tensor) -> None:
        self._rows = rows.clone()
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph):
            self._figures = step(self._rows)

    def fits(self, rows: Tensor) -> bool:
        """Whether rows have the shape that was captured."""
        return rows.shape == self._rows.shape

    def __call__(self, rows: Tensor) -> Tensor:
        """Take a step."""
        self._rows.copy_(rows)
        self._graph.replay()
        return self._figures.clone()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the compiler warns of: it is its own, and nothing that people who train can mend."""
    # It says so on machines without CUDA, every time.
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


def _laid_like(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """Give a gradient the strides of its weight, as ``backward`` does: fused optimizers go by the order in memory."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _clipped(gradients: list[Tensor], limit: float) -> Tensor:
    """Scale gradients in place to a norm of at most `limit`; give the norm they had (Pascanu et al. 2013)."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)
    return norm
