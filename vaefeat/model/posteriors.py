"""Posteriors q(z|x): from the encoder's hidden layer to a distribution over latents.

B batch, F width of the hidden layer, L latents, S samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from vaefeat.config import ModelConfig

__all__ = ["POSTERIORS", "DiagonalGaussian", "Posterior"]

#: exp(-12) is a variance of 6e-6, exp(12) one of 1.6e5: beyond either, float32 loses the KL term.
_LOGVAR_LIMIT = 12.0


class Posterior(nn.Module, ABC):
    """q(z|x), parametrised by the encoder's hidden layer.

    Parameters
    ----------
    config : ModelConfig
    hidden_dim : int
        F.
    """

    def __init__(self, config: ModelConfig, hidden_dim: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.latent_dim = config.latent_dim

    @abstractmethod
    def forward(self, h_BF: Tensor) -> Distribution:
        """Give q(z|x) with batch shape (B,), event shape (L,) and a reparameterized ``rsample``.

        ``log_prob`` must take what ``rsample`` gave; a flow may rely on torch's cache of the last transformation.
        """

    @abstractmethod
    def draw(self, h_BF: Tensor, noise_SL: Tensor) -> tuple[Tensor, Tensor]:
        """Give S samples (S, B, L) from standard normal noise that all rows share, and log q of each (S, B)."""

    @abstractmethod
    def statistics(self, h_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Give what is exported: the mean (the feature) and the logarithm of the variance, each (B, L)."""


class DiagonalGaussian(Posterior):
    """q(z|x) = N(mu(x), diag(sigma^2(x))); Kingma and Welling 2013 (arXiv:1312.6114), equation 9 and appendix C.2."""

    def __init__(self, config: ModelConfig, hidden_dim: int) -> None:
        super().__init__(config, hidden_dim)
        self.mean = nn.Linear(hidden_dim, config.latent_dim)
        self.logvar = nn.Linear(hidden_dim, config.latent_dim)

    def forward(self, h_BF: Tensor) -> Distribution:
        """Give N(mu, diag(sigma^2)) with batch shape (B,)."""
        mu_BL, logvar_BL = self.statistics(h_BF)
        return Independent(Normal(mu_BL, torch.exp(0.5 * logvar_BL), validate_args=False), 1, validate_args=False)

    def draw(self, h_BF: Tensor, noise_SL: Tensor) -> tuple[Tensor, Tensor]:
        """Give mu + sigma * noise, and log q of it."""
        mu_BL, logvar_BL = self.statistics(h_BF)
        z_SBL = mu_BL + torch.exp(0.5 * logvar_BL) * noise_SL.unsqueeze(1)
        return z_SBL, self(h_BF).log_prob(z_SBL)

    def statistics(self, h_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Give mean and log-variance, each (B, L)."""
        return self.mean(h_BF), self.logvar(h_BF).clamp(-_LOGVAR_LIMIT, _LOGVAR_LIMIT)


POSTERIORS: dict[str, type[Posterior]] = {"diagonal": DiagonalGaussian}
