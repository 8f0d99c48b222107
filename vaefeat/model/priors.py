"""Priors p(z).

L latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from vaefeat.config import ModelConfig

__all__ = ["PRIORS", "Prior", "StandardNormal"]

#: From scaled rows x_B... to q(z|x): what a prior that is a mixture of posteriors needs.
Encode = Callable[[Tensor], Distribution]


class Prior(nn.Module, ABC):
    """p(z).

    Parameters
    ----------
    config : ModelConfig
    row_shape : tuple of int
        Shape of one scaled row, for priors that hold pseudo-inputs.
    """

    def __init__(self, config: ModelConfig, row_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.latent_dim = config.latent_dim
        self.row_shape = row_shape

    @abstractmethod
    def forward(self, encode: Encode) -> Distribution:
        """Give p(z) with event shape (L,)."""


class StandardNormal(Prior):
    """p(z) = N(0, I); Kingma and Welling 2013 (arXiv:1312.6114), section 3."""

    location: Tensor

    def __init__(self, config: ModelConfig, row_shape: tuple[int, ...]) -> None:
        super().__init__(config, row_shape)
        # A buffer, so that the distribution is on the model's device; it is no weight and is not saved.
        self.register_buffer("location", torch.zeros(config.latent_dim), persistent=False)

    def forward(self, encode: Encode) -> Distribution:
        """Give N(0, I)."""
        scale = torch.ones_like(self.location)
        return Independent(Normal(self.location, scale, validate_args=False), 1, validate_args=False)


PRIORS: dict[str, type[Prior]] = {"standard": StandardNormal}
