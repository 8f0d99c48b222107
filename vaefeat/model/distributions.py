"""Distributions of latents that torch does not have, and their KL divergences.

B batch, L latents, V categorical variables, C categories of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal, constraints, register_kl
from torch.distributions.kl import kl_divergence

#: The form that torch gives the argument of ``sample``.
_Shape = torch.Size | list[int] | tuple[int, ...]
_ONE = torch.Size()

__all__ = ["Deterministic", "Joint", "OneHot", "factors", "standard_normal"]


class Deterministic(Distribution):
    """All mass at one point (..., L): what an auto-encoder's encoder gives. It has no density."""

    arg_constraints = {}  # noqa: RUF012 - torch's own name and form
    has_rsample = True

    def __init__(self, location: Tensor) -> None:
        self.location = location
        super().__init__(location.shape[:-1], location.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The point."""
        return self.location

    def rsample(self, sample_shape: _Shape = _ONE) -> Tensor:
        """Repeat the point."""
        return self.location.expand(self._extended_shape(torch.Size(sample_shape)))


class OneHot(Distribution):
    """V independent categorical variables as V * C values, one-hot each.

    ``sample`` gives hard samples. ``rsample`` gives them too, with the gradient of the Gumbel-softmax relaxation at
    `temperature` (straight-through; Jang et al. 2017, arXiv:1611.01144, equations 1 and 2 and section 2.2; Maddison et
    al. 2017, arXiv:1611.00712), or the relaxed values themselves where not `straight_through`. ``log_prob`` is the
    logarithm of the mass of hard values, and linear in between.

    Parameters
    ----------
    logits : Tensor
        (..., V, C), normalised or not.
    temperature : float or scalar Tensor
    straight_through : bool
    """

    arg_constraints = {}  # noqa: RUF012 - torch's own name and form
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, logits: Tensor, *, temperature: float | Tensor = 1.0, straight_through: bool = True) -> None:
        self.log_probabilities = torch.log_softmax(logits, dim=-1)
        self.temperature = temperature
        self.straight_through = straight_through
        n_values = logits.shape[-2] * logits.shape[-1]
        super().__init__(logits.shape[:-2], torch.Size([n_values]), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The probabilities (..., V * C)."""
        return self.log_probabilities.exp().flatten(-2)

    @property
    def variance(self) -> Tensor:
        """Of each value, which is 0 or 1: p (1 - p)."""
        return self.mean * (1 - self.mean)

    def from_gumbel(self, gumbel: Tensor, *, relaxed: bool) -> Tensor:
        """Turn Gumbel noise (..., V, C) into samples (..., V * C)."""
        noisy = self.log_probabilities + gumbel
        hard = torch.zeros_like(noisy).scatter_(-1, noisy.argmax(dim=-1, keepdim=True), 1.0)
        if not relaxed:
            return hard.flatten(-2)
        soft = torch.softmax(noisy / self.temperature, dim=-1)
        # In the forward pass the hard sample to the bit: soft - soft is zero.
        return (hard + (soft - soft.detach()) if self.straight_through else soft).flatten(-2)

    def _gumbel(self, sample_shape: torch.Size) -> Tensor:
        uniform = torch.rand(sample_shape + self.log_probabilities.shape, device=self.log_probabilities.device)
        tiny = torch.finfo(uniform.dtype).tiny
        return -torch.log((-torch.log(uniform.clamp_min(tiny))).clamp_min(tiny))

    def rsample(self, sample_shape: _Shape = _ONE) -> Tensor:
        """Draw with gradients."""
        return self.from_gumbel(self._gumbel(torch.Size(sample_shape)), relaxed=True)

    @torch.no_grad()
    def sample(self, sample_shape: _Shape = _ONE) -> Tensor:
        """Draw hard samples."""
        return self.from_gumbel(self._gumbel(torch.Size(sample_shape)), relaxed=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Give log q of one-hot values (..., V * C), of shape (...)."""
        return (value * self.log_probabilities.flatten(-2)).sum(dim=-1)

    def entropy(self) -> Tensor:
        """In nats."""
        return -(self.log_probabilities.exp() * self.log_probabilities).sum(dim=(-2, -1))


class Joint(Distribution):
    """A continuous and a categorical part, independent of each other and side by side.

    Parameters
    ----------
    continuous : Distribution
        With event shape (L1,).
    categorical : OneHot
        With event shape (V * C,).
    """

    arg_constraints = {}  # noqa: RUF012 - torch's own name and form
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, continuous: Distribution, categorical: OneHot) -> None:
        self.continuous, self.categorical = continuous, categorical
        self._n_continuous = continuous.event_shape[0]
        n_values = continuous.event_shape[0] + categorical.event_shape[0]
        super().__init__(categorical.batch_shape, torch.Size([n_values]), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The continuous mean, then the probabilities."""
        return torch.cat([self.continuous.mean, self.categorical.mean], dim=-1)

    @property
    def variance(self) -> Tensor:
        """Of each value."""
        return torch.cat([self.continuous.variance, self.categorical.variance], dim=-1)

    def rsample(self, sample_shape: _Shape = _ONE) -> Tensor:
        """Draw with gradients."""
        shape = torch.Size(sample_shape)
        return torch.cat([self.continuous.rsample(shape), self.categorical.rsample(shape)], dim=-1)

    @torch.no_grad()
    def sample(self, sample_shape: _Shape = _ONE) -> Tensor:
        """Draw, hard where categorical."""
        shape = torch.Size(sample_shape)
        return torch.cat([self.continuous.sample(shape), self.categorical.sample(shape)], dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Give the sum of both parts' logarithms."""
        continuous, categorical = value.tensor_split([self._n_continuous], dim=-1)
        return self.continuous.log_prob(continuous) + self.categorical.log_prob(categorical)


def standard_normal(location: Tensor) -> Independent[Normal]:
    """Give N(0, I) on the device of `location`, a zero vector of shape (L,)."""
    return Independent(Normal(location, torch.ones_like(location), validate_args=False), 1, validate_args=False)


def factors(q: Distribution, p: Distribution) -> Tensor:
    """Give KL(q || p) latent by latent, (B, L): of Gaussians; of categories one figure a variable.

    Raises
    ------
    NotImplementedError
        The divergence is no sum over latents.
    """
    if isinstance(q, Joint) and isinstance(p, Joint):
        return torch.cat([factors(q.continuous, p.continuous), factors(q.categorical, p.categorical)], dim=-1)
    if isinstance(q, OneHot) and isinstance(p, OneHot):
        return (q.log_probabilities.exp() * (q.log_probabilities - p.log_probabilities)).sum(dim=-1)
    if isinstance(q, Independent) and isinstance(p, Independent):
        return kl_divergence(q.base_dist, p.base_dist)
    raise NotImplementedError(f"the KL divergence of {type(q).__name__} and {type(p).__name__} is no sum over latents")


@register_kl(OneHot, OneHot)  # type: ignore[untyped-decorator]
def _kl_onehot(q: OneHot, p: OneHot) -> Tensor:
    return factors(q, p).sum(dim=-1)


@register_kl(Joint, Joint)  # type: ignore[untyped-decorator]
def _kl_joint(q: Joint, p: Joint) -> Tensor:
    return kl_divergence(q.continuous, p.continuous) + kl_divergence(q.categorical, p.categorical)


@register_kl(MultivariateNormal, Independent)  # type: ignore[untyped-decorator]
def _kl_full_diagonal(q: MultivariateNormal, p: Independent[Any]) -> Tensor:
    base = p.base_dist
    if not isinstance(base, Normal) or p.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    scale = base.scale
    # tr(S_p^-1 S_q) is the squared norm of the scaled factor.
    trace = (q.scale_tril / scale.unsqueeze(-1)).pow(2).sum(dim=(-2, -1))
    distance = ((q.loc - base.loc) / scale).pow(2).sum(dim=-1)
    log_determinants = 2 * scale.log().sum(dim=-1) - 2 * q.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
    return 0.5 * (trace + distance - q.loc.shape[-1] + log_determinants)
