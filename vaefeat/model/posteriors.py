"""Posteriors q(z|x): from the encoder's hidden layer to a distribution over latents.

B batch, F width of the hidden layer, L latents, S samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

__all__ = ["POSTERIORS", "DiagonalGaussian", "Posterior"]

#: exp(-12) is a variance of 6e-6, exp(12) one of 1.6e5: beyond either, float32 loses the KL term.
_LOGVAR_LIMIT = 12.0


class Posterior(nn.Module, ABC):
    """q(z|x), parametrised by the encoder's hidden layer.

    Parameters
    ----------
    hidden_dim, latent_dim : int
    """

    def __init__(self, hidden_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.latent_dim = latent_dim

    @abstractmethod
    def forward(self, h_BF: Tensor) -> Distribution:
        """Give q(z|x) with batch shape (B,), event shape (L,) and a reparameterized ``rsample``."""

    @abstractmethod
    def draw(self, h_BF: Tensor, noise_SL: Tensor) -> Tensor:
        """Give S samples (S, B, L) from standard normal noise that all rows share."""

    @abstractmethod
    def statistics(self, h_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Give what is exported: the mean (the feature) and the logarithm of the variance, each (B, L)."""


class DiagonalGaussian(Posterior):
    """q(z|x) = N(mu(x), diag(sigma^2(x))); Kingma and Welling 2013 (arXiv:1312.6114), equation 9 and appendix C.2."""

    def __init__(self, hidden_dim: int, latent_dim: int) -> None:
        super().__init__(hidden_dim, latent_dim)
        self.mean = nn.Linear(hidden_dim, latent_dim)
        self.logvar = nn.Linear(hidden_dim, latent_dim)

    def forward(self, h_BF: Tensor) -> Distribution:
        """Give N(mu, diag(sigma^2)) with batch shape (B,)."""
        mu_BL, logvar_BL = self.statistics(h_BF)
        return Independent(Normal(mu_BL, torch.exp(0.5 * logvar_BL), validate_args=False), 1, validate_args=False)

    def draw(self, h_BF: Tensor, noise_SL: Tensor) -> Tensor:
        """Give mu + sigma * noise."""
        mu_BL, logvar_BL = self.statistics(h_BF)
        return mu_BL + torch.exp(0.5 * logvar_BL) * noise_SL.unsqueeze(1)

    def statistics(self, h_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Give mean and log-variance, each (B, L)."""
        return self.mean(h_BF), self.logvar(h_BF).clamp(-_LOGVAR_LIMIT, _LOGVAR_LIMIT)


POSTERIORS: dict[str, type[Posterior]] = {"diagonal": DiagonalGaussian}
