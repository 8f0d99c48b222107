"""Objectives: what training maximises, in nats per row.

B batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from vaefeat.config import TrainConfig

if TYPE_CHECKING:
    from vaefeat.model.vae import VAE

__all__ = ["ELBO", "OBJECTIVES", "Objective", "Terms", "kl_of"]


class Terms(NamedTuple):
    """An objective's parts for a batch, each of shape (B,), in nats per row.

    Attributes
    ----------
    objective : Tensor
        What is maximised, weights included.
    log_likelihood : Tensor
        E_q[log p(x|z)], estimated.
    kl : Tensor
        KL(q(z|x) || p(z)), unweighted.
    """

    objective: Tensor
    log_likelihood: Tensor
    kl: Tensor


class Objective(ABC):
    """What training maximises.

    Parameters
    ----------
    config : TrainConfig
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @abstractmethod
    def __call__(self, vae: VAE, rows: Tensor, *, kl_weight: float | Tensor) -> Terms:
        """Estimate the terms on rows (B, ...) as they came, with gradients to every weight.

        Parameters
        ----------
        vae : VAE
        rows : Tensor
            uint8 or float32, not yet scaled.
        kl_weight : float or scalar Tensor
            Weight of the KL term.
        """


class ELBO(Objective):
    """The evidence lower bound, one reparameterized sample, closed-form KL where there is one.

    log p(x) >= E_q[log p(x|z)] - KL(q(z|x) || p(z)): estimator B of Kingma and Welling 2013 (arXiv:1312.6114),
    equation 7, with L = 1; where posterior and prior have no closed form, estimator A, equation 6.
    """

    def __call__(self, vae: VAE, rows: Tensor, *, kl_weight: float | Tensor) -> Terms:
        """Estimate the bound."""
        x = vae.preprocessing(rows)
        q = vae.encode(x)
        z_BL = q.rsample()
        log_likelihood_B = vae.decode(z_BL).log_prob(x)
        kl_B = kl_of(q, vae.prior(vae.encode), z_BL)
        return Terms(log_likelihood_B - kl_weight * kl_B, log_likelihood_B, kl_B)


def kl_of(q: Distribution, p: Distribution, z_BL: Tensor) -> Tensor:
    """Give KL(q || p) of each row (B,): in closed form where torch knows one, else estimated at the sample z."""
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return q.log_prob(z_BL) - p.log_prob(z_BL)


OBJECTIVES: dict[str, type[Objective]] = {"elbo": ELBO}
