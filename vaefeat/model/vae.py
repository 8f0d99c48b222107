"""The variational auto-encoder: its parts put together.

B batch, F width of the hidden layer, L latents.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Distribution

from vaefeat.config import ModelConfig, unknown_name
from vaefeat.model.likelihoods import LIKELIHOODS
from vaefeat.model.networks import build_networks
from vaefeat.model.posteriors import POSTERIORS
from vaefeat.model.preprocessing import Preprocessing
from vaefeat.model.priors import PRIORS

__all__ = ["VAE"]


class VAE(nn.Module):
    """q(z|x), p(z) and p(x|z) over rows of one shape.

    Parameters
    ----------
    config : ModelConfig
    row_shape : tuple of int
        (F,) or (C, H, W).
    preprocessing : Preprocessing, optional
        Fitted scaling; one that changes nothing when None, to load weights into.

    Raises
    ------
    ConfigError
        An unknown posterior, prior or likelihood, or a network that does not fit the rows.

    References
    ----------
    Kingma and Welling 2013, Auto-Encoding Variational Bayes, arXiv:1312.6114.
    """

    def __init__(
        self, config: ModelConfig, row_shape: tuple[int, ...], *, preprocessing: Preprocessing | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.row_shape = row_shape
        self.preprocessing = preprocessing or Preprocessing.identity(row_shape)
        self.likelihood = LIKELIHOODS[likelihood_name(config, row_shape)](config)
        self.encoder, self.decoder = build_networks(config, row_shape, n_parameters=self.likelihood.n_parameters)
        if config.posterior not in POSTERIORS:
            raise unknown_name("posterior", config.posterior, POSTERIORS)
        if config.prior not in PRIORS:
            raise unknown_name("prior", config.prior, PRIORS)
        self.posterior = POSTERIORS[config.posterior](config, self.encoder.hidden_dim)
        self.prior = PRIORS[config.prior](config, row_shape)

    @classmethod
    def for_rows(cls, config: ModelConfig, rows: NDArray[Any]) -> VAE:
        """Build an untrained model for training rows (n, F) or (n, C, H, W), with the scaling fitted to them."""
        row_shape = tuple(int(size) for size in rows.shape[1:])
        scaling = LIKELIHOODS[likelihood_name(config, row_shape)].scaling
        return cls(config, row_shape, preprocessing=Preprocessing.fit(rows, scaling))

    def encode(self, x: Tensor) -> Distribution:
        """Give q(z|x) for scaled rows x of shape (B, ...)."""
        return self.posterior(self.encoder(x))  # type: ignore[no-any-return]

    def decode(self, z_BL: Tensor) -> Distribution:
        """Give p(x|z) over scaled rows."""
        return self.likelihood(self.decoder(z_BL))  # type: ignore[no-any-return]

    def features(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give what is exported for rows as they come: mean (B, L), log-variance (B, L), last hidden layer (B, F)."""
        h_BF = self.encoder(self.preprocessing(rows))
        mu_BL, logvar_BL = self.posterior.statistics(h_BF)
        return mu_BL, logvar_BL, h_BF

    def reconstruct(self, z_BL: Tensor) -> Tensor:
        """Give E[x|z] in the units of the rows, float32 of shape (B, ...)."""
        return self.preprocessing.inverse(self.likelihood.mean(self.decoder(z_BL)))

    def sample_prior(self, n: int) -> Tensor:
        """Draw z from p(z): (n, L), from torch's global generator."""
        return self.prior(self.encode).sample(torch.Size([n]))  # type: ignore[no-any-return]


def likelihood_name(config: ModelConfig, row_shape: tuple[int, ...]) -> str:
    """Resolve ``auto``: Bernoulli for images, Gaussian for tables."""
    name = config.likelihood
    if name == "auto":
        name = "bernoulli" if len(row_shape) == 3 else "gaussian"
    if name not in LIKELIHOODS:
        raise unknown_name("likelihood", name, [*LIKELIHOODS, "auto"])
    return name
