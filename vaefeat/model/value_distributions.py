"""Distributions of single values that torch has not, or not as accurately: of levels, and on [0, 1]."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, constraints
from torch.nn import functional

__all__ = ["ContinuousBernoulli", "Levels", "expected_level", "level_index", "log_integral"]


class Levels(Distribution):
    """A categorical distribution whose categories 0 .. K - 1 stand for the values 0 .. (K - 1) / scale.

    Parameters
    ----------
    logits : Tensor
        (..., K), not normalised.
    scale : float
        Categories per unit of a value.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real

    def __init__(self, logits: Tensor, *, scale: float) -> None:
        self.categories = Categorical(logits=logits, validate_args=False)
        self.scale = scale
        super().__init__(logits.shape[:-1], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The expected value."""
        return expected_level(self.categories.logits, dim=-1) / self.scale

    @property
    def mode(self) -> Tensor:
        """The most probable value."""
        return self.categories.mode / self.scale

    def log_prob(self, value: Tensor) -> Tensor:
        """Give the log-probability of the level nearest to each value."""
        return self.categories.log_prob(level_index(value, self.scale))  # type: ignore[no-any-return]

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw values, without gradient."""
        return self.categories.sample(torch.Size(sample_shape)) / self.scale  # type: ignore[no-any-return]


class ContinuousBernoulli(Distribution):
    """The density proportional to exp(x * logit) on [0, 1], in float32 accurate at all logits.

    torch's own takes probabilities to the limits of float32, beyond which logits are cut, and is less accurate around
    a half.

    Parameters
    ----------
    logits : Tensor
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.unit_interval

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """1 / (1 - exp(-logit)) - 1 / logit; a half at 0."""
        near, far, is_near = _split(self.logits)
        around_half = 0.5 + near * (
            1 / 12 + near.square() * (-1 / 720 + near.square() * (1 / 30240 - near.square() / 1209600))
        )
        size = far.abs()
        below_half = 1 / size - (-size).exp() / (1 - (-size).exp())
        return torch.where(is_near, around_half, torch.where(far > 0, 1 - below_half, below_half))

    def log_prob(self, value: Tensor) -> Tensor:
        """Give the log-density of values in [0, 1]."""
        return value * self.logits - log_integral(self.logits)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw values by inverting the distribution function, without gradient."""
        with torch.no_grad():
            logits = self.logits.expand(self._extended_shape(torch.Size(sample_shape)))
            # By symmetry the falling density is enough.
            size = logits.abs().clamp_min(1e-6)
            falling = -torch.log1p(torch.rand_like(logits) * torch.expm1(-size)) / size
            return torch.where(logits > 0, 1 - falling, falling)


def level_index(x: Tensor, scale: float) -> Tensor:
    """Give the number of the level nearest to each value."""
    return (x * scale).round().long()


def expected_level(logits: Tensor, *, dim: int) -> Tensor:
    """Give the mean number of a level, with the levels along `dim`."""
    probabilities = logits.softmax(dim=dim).movedim(dim, -1)
    levels = torch.arange(probabilities.shape[-1], dtype=logits.dtype, device=logits.device)
    return (probabilities * levels).sum(dim=-1)


def log_integral(logits: Tensor) -> Tensor:
    """Give log of the integral of exp(x * logit) over [0, 1], log((exp(logit) - 1) / logit).

    It is the softplus minus the log-normaliser of Loaiza-Ganem and Cunningham, equation 6; its derivative is the mean.
    """
    near, far, is_near = _split(logits)
    square = near.square()
    around_zero = near / 2 + square * (1 / 24 + square * (-1 / 2880 + square * (1 / 181440 - square / 9676800)))
    size = far.abs()
    return torch.where(is_near, around_zero, functional.relu(far) + torch.log((1 - (-size).exp()) / size))


def _split(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give logits for a series around 0, for the closed form, and where to take the first.

    Either is harmless where the other is taken: a branch not taken still has a gradient, and NaN * 0 is NaN. Within 1
    of zero the closed form's gradient is the difference of large numbers, while the series has an error below 1e-7.
    """
    is_near = logits.abs() < 1
    return torch.where(is_near, logits, 0.0), torch.where(is_near, 1.0, logits), is_near
