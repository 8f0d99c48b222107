"""The variational auto-encoder: its parts put together.

B batch, F width of the hidden layer, L latents, S samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Distribution

from vaefeat.config import ModelConfig
from vaefeat.model.likelihoods import LIKELIHOODS, refuse_rows
from vaefeat.model.networks import build_networks
from vaefeat.model.posteriors import POSTERIORS
from vaefeat.model.preprocessing import Preprocessing
from vaefeat.model.priors import PRIORS
from vaefeat.settings import unknown_name

__all__ = ["VAE", "likelihood_name"]


class VAE(nn.Module):
    """q(z|x), p(z) and p(x|z) over rows of one shape.

    Parameters
    ----------
    config : ModelConfig
    row_shape : tuple of int
        (F,) or (C, H, W).
    preprocessing : Preprocessing, optional
        Fitted scaling; one that changes nothing when None, to load weights into.

    Attributes
    ----------
    network_dtype : torch.dtype
        Of the networks' arithmetic; weights, latents and everything after the networks are float32.

    basis : Tensor of shape (L, L) or None
        Orthogonal axes, one a row, that features are coordinates along; None for the latents themselves.

    Raises
    ------
    ConfigError
        An unknown posterior, prior or likelihood, or a network that does not fit the rows.

    References
    ----------
    Kingma and Welling 2013, Auto-Encoding Variational Bayes, arXiv:1312.6114.
    """

    basis: Tensor | None

    def __init__(
        self, config: ModelConfig, row_shape: tuple[int, ...], *, preprocessing: Preprocessing | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.row_shape = row_shape
        self.network_dtype = torch.float32
        self.likelihood = LIKELIHOODS[likelihood_name(config, row_shape)](config)
        self.preprocessing = preprocessing or Preprocessing.identity(row_shape, self.likelihood.scaling)
        self.encoder, self.decoder = build_networks(config, row_shape, n_parameters=self.likelihood.n_parameters)
        if config.posterior not in POSTERIORS:
            raise unknown_name("posterior", config.posterior, POSTERIORS)
        if config.prior not in PRIORS:
            raise unknown_name("prior", config.prior, PRIORS)
        self.posterior = POSTERIORS[config.posterior](config, self.encoder.hidden_dim)
        self.prior = PRIORS[config.prior](config, row_shape)
        self.register_buffer("basis", None)

    @classmethod
    def for_rows(cls, config: ModelConfig, rows: NDArray[Any]) -> VAE:
        """Build an untrained model for training rows (n, F) or (n, C, H, W), with the scaling fitted to them.

        Raises
        ------
        ConfigError
            See the class.
        InputError
            Rows that the likelihood has no meaning for.
        """
        row_shape = tuple(int(size) for size in rows.shape[1:])
        name = likelihood_name(config, row_shape)
        refuse_rows(config.likelihood, config, rows)
        scaling = Preprocessing.fit(rows, LIKELIHOODS[name].scaling, levels=config.levels, columns=config.columns)
        vae = cls(config, row_shape, preprocessing=scaling)
        if vae.prior.n_starting_rows:
            # Spread over the rows, which may be sorted.
            step = max(1, len(rows) // vae.prior.n_starting_rows)
            chosen = rows[::step][: vae.prior.n_starting_rows]
            vae.prior.start(vae.preprocessing(torch.from_numpy(chosen.copy())))
        return vae

    def observe(self, rows: Tensor) -> Tensor:
        """Scale rows as they come (B, ...); where the model binarizes, draw 0 or 1 with these probabilities.

        What is drawn is new at each call, from torch's global generator (Burda et al. 2015, arXiv:1509.00519, section
        5: dynamic binarization).
        """
        x: Tensor = self.preprocessing(rows)
        return torch.bernoulli(x) if self.config.binarize else x

    def hidden(self, x: Tensor) -> Tensor:
        """Give the encoder's last layer (B, F) for scaled rows."""
        return self._computed(self.encoder, x)

    def encode(self, x: Tensor) -> Distribution:
        """Give q(z|x) for scaled rows x of shape (B, ...)."""
        return self.posterior(self.hidden(x))  # type: ignore[no-any-return]

    def prior_distribution(self) -> Distribution:
        """Give p(z)."""
        return self.prior(self.encode)  # type: ignore[no-any-return]

    def decode(self, z_BL: Tensor) -> Distribution:
        """Give p(x|z) over scaled rows."""
        return self.likelihood(self._computed(self.decoder, z_BL))  # type: ignore[no-any-return]

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Give log p(x|z) in nats per row: (B,) for z (B, L), and (S, B) for z (S, B, L), for scaled rows (B, ...)."""
        output = self._computed(self.decoder, z.flatten(0, -2))
        return self.likelihood.log_prob(output, x).view(z.shape[:-1])

    def features(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give what is exported for rows as they come: mean (B, L), log-variance (B, L), last hidden layer (B, F)."""
        h_BF = self.encoder(self.preprocessing(rows))
        mu_BL, logvar_BL = self.posterior.statistics(h_BF)
        if self.basis is not None:
            mu_BL, logvar_BL = mu_BL @ self.basis.T, (logvar_BL.exp() @ self.basis.square().T).log()
        return mu_BL, logvar_BL, h_BF

    def latents(self, features_BL: Tensor) -> Tensor:
        """Give the latents (B, L) that features are the coordinates of."""
        return features_BL if self.basis is None else features_BL @ self.basis

    def reconstruct(self, z_BL: Tensor) -> Tensor:
        """Give E[x|z] in the units of the rows, float32 of shape (B, ...)."""
        return self.preprocessing.inverse(self.likelihood.mean(self.decoder(z_BL)))

    def sample_prior(self, n: int) -> Tensor:
        """Draw z from p(z): (n, L), from torch's global generator."""
        return self.prior_distribution().sample(torch.Size([n]))

    def _computed(self, network: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        if self.network_dtype == torch.float32 or not self.training:
            return network(values)
        with torch.autocast(values.device.type, dtype=self.network_dtype):
            output = network(values)
        return output.float()


def likelihood_name(config: ModelConfig, row_shape: tuple[int, ...]) -> str:
    """Resolve ``auto``: Bernoulli for images and where rows are binarized, a kind for each column, or Gaussian."""
    name = config.likelihood
    if name == "auto" and config.columns:
        return "table"
    if name == "auto":
        name = "bernoulli" if len(row_shape) == 3 or config.binarize else "gaussian"
    if name not in LIKELIHOODS:
        raise unknown_name("likelihood", name, [*LIKELIHOODS, "auto"])
    return name
