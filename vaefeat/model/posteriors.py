"""Posteriors q(z|x): from the encoder's hidden layer to a distribution over latents.

B batch, F width of the hidden layer, L latents, S samples, V categorical variables, C categories of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal, TransformedDistribution

from vaefeat.config import ModelConfig, TrainConfig
from vaefeat.model.distributions import Deterministic, Joint, OneHot
from vaefeat.model.flows import AutoregressiveFlow, AutoregressiveStep, FlowTransform, PlanarFlow, PlanarStep

__all__ = [
    "POSTERIORS",
    "CategoricalPosterior",
    "DeterministicPosterior",
    "DiagonalGaussian",
    "FullGaussian",
    "GaussianPosterior",
    "IAFPosterior",
    "JointPosterior",
    "PlanarPosterior",
    "Posterior",
]

#: exp(-12) is a variance of 6e-6, exp(12) one of 1.6e5: beyond either, float32 loses the KL term.
_LOGVAR_LIMIT = 12.0
#: Added to a logarithm, it leaves nothing of what it was.
_NEVER = -1e9


class Posterior(nn.Module, ABC):
    """q(z|x), parametrised by the encoder's hidden layer.

    Parameters
    ----------
    config : ModelConfig
    hidden_dim : int
        F.
    """

    #: False where q(z|x) is a point, whose KL divergence is infinite.
    has_density: ClassVar[bool] = True

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
    def draw(self, h_BF: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Turn standard normal noise (S, B, L), or (S, 1, L) that all rows share, into exact samples.

        Returns
        -------
        z_SBL, log_q_SB : Tensor
        """

    @abstractmethod
    def statistics(self, h_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Give what is exported: the mean (the feature) and the logarithm of the variance, each (B, L)."""

    def held(self, h_BF: Tensor) -> Distribution | None:
        """Give q(z|x) with its parameters held fixed, for the doubly reparameterized gradient.

        None where the density of a z cannot be followed back to it.
        """
        return None

    def anneal(self, progress: float, config: TrainConfig) -> None:
        """Take note that a share `progress` of training is done, for posteriors with a temperature."""
        return


class GaussianPosterior(Posterior):
    """A posterior whose density can be evaluated anywhere, from its parameters."""

    @abstractmethod
    def parametrise(self, h_BF: Tensor) -> tuple[Tensor, ...]:
        """Give the distribution's parameters, (B, ...) each."""

    @staticmethod
    @abstractmethod
    def distribution(*parameters: Tensor) -> Distribution:
        """Give the distribution with these parameters."""

    def forward(self, h_BF: Tensor) -> Distribution:
        """Give the Gaussian with batch shape (B,)."""
        return self.distribution(*self.parametrise(h_BF))

    def held(self, h_BF: Tensor) -> Distribution | None:
        """Give the Gaussian with its parameters held fixed."""
        return self.distribution(*(parameter.detach() for parameter in self.parametrise(h_BF)))

    def draw(self, h_BF: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift the noise."""
        parameters = self.parametrise(h_BF)
        z_SBL = self.reparametrise(noise, *parameters)
        return z_SBL, self.distribution(*parameters).log_prob(z_SBL)

    @staticmethod
    @abstractmethod
    def reparametrise(noise: Tensor, *parameters: Tensor) -> Tensor:
        """Turn noise (S, B or 1, L) into samples (S, B, L)."""


class DiagonalGaussian(GaussianPosterior):
    """q(z|x) = N(mu(x), diag(sigma^2(x))); Kingma and Welling 2013 (arXiv:1312.6114), equation 9 and appendix C.2."""

    def __init__(self, config: ModelConfig, hidden_dim: int) -> None:
        super().__init__(config, hidden_dim)
        self.mean = nn.Linear(hidden_dim, config.latent_dim)
        self.logvar = nn.Linear(hidden_dim, config.latent_dim)

    def parametrise(self, h_BF: Tensor) -> tuple[Tensor, ...]:
        """Give mean and standard deviation, each (B, L)."""
        mu_BL, logvar_BL = self.statistics(h_BF)
        return mu_BL, torch.exp(0.5 * logvar_BL)

    @staticmethod
    def distribution(*parameters: Tensor) -> Distribution:
        """Give N(mu, diag(sigma^2))."""
        mu_BL, sigma_BL = parameters
        return Independent(Normal(mu_BL, sigma_BL, validate_args=False), 1, validate_args=False)

    @staticmethod
    def reparametrise(noise: Tensor, *parameters: Tensor) -> Tensor:
        """Give mu + sigma * noise."""
        mu_BL, sigma_BL = parameters
        return mu_BL + sigma_BL * noise

    def statistics(self, h_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Give mean and log-variance, each (B, L)."""
        return self.mean(h_BF), _bounded(self.logvar(h_BF))


class FullGaussian(GaussianPosterior):
    """q(z|x) = N(mu(x), A(x) A(x)^T) with a lower triangular factor A; Kingma and Welling 2013, section 2.4.

    Kingma and Welling 2019 (arXiv:1906.02691), section 2.5.1: z = mu + A * noise.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, config: ModelConfig, hidden_dim: int) -> None:
        super().__init__(config, hidden_dim)
        n_below = config.latent_dim * (config.latent_dim - 1) // 2
        self.mean = nn.Linear(hidden_dim, config.latent_dim)
        self.log_diagonal = nn.Linear(hidden_dim, config.latent_dim)
        self.below = nn.Linear(hidden_dim, n_below)
        # Correlations are small at first: the start is a diagonal Gaussian, nearly.
        with torch.no_grad():
            self.below.weight.mul_(0.1)
            self.below.bias.zero_()
        indices = torch.tril_indices(config.latent_dim, config.latent_dim, offset=-1)
        self.register_buffer("rows", indices[0], persistent=False)
        self.register_buffer("columns", indices[1], persistent=False)

    def parametrise(self, h_BF: Tensor) -> tuple[Tensor, ...]:
        """Give the mean (B, L) and the factor (B, L, L)."""
        diagonal_BL = torch.exp(0.5 * _bounded(self.log_diagonal(h_BF)))
        factor_BLL = torch.diag_embed(diagonal_BL)
        places = (torch.arange(len(h_BF), device=h_BF.device)[:, None], self.rows, self.columns)
        factor_BLL = factor_BLL.index_put(places, self.below(h_BF))
        return self.mean(h_BF), factor_BLL

    @staticmethod
    def distribution(*parameters: Tensor) -> Distribution:
        """Give N(mu, A A^T)."""
        mu_BL, factor_BLL = parameters
        return MultivariateNormal(mu_BL, scale_tril=factor_BLL, validate_args=False)

    @staticmethod
    def reparametrise(noise: Tensor, *parameters: Tensor) -> Tensor:
        """Give mu + A * noise."""
        mu_BL, factor_BLL = parameters
        return mu_BL + (factor_BLL @ noise.unsqueeze(-1)).squeeze(-1)

    def statistics(self, h_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Give the mean, and the logarithm of the covariance's diagonal."""
        # By a product with a constant matrix: the exporter cannot fill triangles of a batch of unknown size.
        below_variance_BL = self.below(h_BF).pow(2) @ nn.functional.one_hot(self.rows, self.latent_dim).to(h_BF.dtype)
        variance_BL = torch.exp(_bounded(self.log_diagonal(h_BF))) + below_variance_BL
        return self.mean(h_BF), variance_BL.log()


class _FlowPosterior(DiagonalGaussian):
    """A diagonal Gaussian, pushed through a flow that sees the hidden layer.

    What is exported is the mean and the log-variance of the Gaussian before the flow: the flow's own mean has no closed
    form.
    """

    @abstractmethod
    def flow(self, h_BF: Tensor) -> FlowTransform:
        """Give the flow of these rows."""

    def forward(self, h_BF: Tensor) -> Distribution:
        """Give the transformed Gaussian."""
        return TransformedDistribution(super().forward(h_BF), [self.flow(h_BF)], validate_args=False)

    def held(self, h_BF: Tensor) -> Distribution | None:
        """Give None: only what the flow has just drawn has a cheap density."""
        return None

    def draw(self, h_BF: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Push mu + sigma * noise through the flow."""
        base_SBL, log_base_SB = super().draw(h_BF, noise)
        flow = self.flow(h_BF)
        z_SBL = flow(base_SBL)
        return z_SBL, log_base_SB - flow.log_abs_det_jacobian(base_SBL, z_SBL)


class PlanarPosterior(_FlowPosterior):
    """Planar flows; Rezende and Mohamed 2015, arXiv:1505.05770, section 4.1."""

    def __init__(self, config: ModelConfig, hidden_dim: int) -> None:
        super().__init__(config, hidden_dim)
        self.steps = nn.ModuleList(PlanarStep(config.latent_dim, hidden_dim) for _ in range(config.posterior_flows))

    def flow(self, h_BF: Tensor) -> FlowTransform:
        """Give the planar flow of these rows."""
        return PlanarFlow(self.steps, h_BF)


class IAFPosterior(_FlowPosterior):
    """Inverse autoregressive flow; Kingma et al. 2016, arXiv:1606.04934, algorithm 1."""

    def __init__(self, config: ModelConfig, hidden_dim: int) -> None:
        super().__init__(config, hidden_dim)
        self.steps = nn.ModuleList(
            AutoregressiveStep(
                config.latent_dim, config.flow_hidden_dim, context_dim=hidden_dim, reverse=bool(index % 2)
            )
            for index in range(config.posterior_flows)
        )

    def flow(self, h_BF: Tensor) -> FlowTransform:
        """Give the autoregressive flow of these rows."""
        return AutoregressiveFlow(self.steps, h_BF)


class CategoricalPosterior(Posterior):
    """V categorical variables of C categories each, one-hot side by side: L = V * C.

    Jang et al. 2017, arXiv:1611.01144. What is exported is the probabilities, and as log-variance that of p (1 - p).
    """

    temperature: Tensor

    def __init__(self, config: ModelConfig, hidden_dim: int) -> None:
        super().__init__(config, hidden_dim)
        self.n_categories = config.n_categories
        self.n_variables = config.latent_dim // config.n_categories
        self.logits = nn.Linear(hidden_dim, self.n_variables * self.n_categories)
        # A buffer and no number, which a compiled graph would take for a constant; no part of the trained model.
        self.register_buffer("temperature", torch.ones(()), persistent=False)
        self.straight_through = True

    def forward(self, h_BF: Tensor) -> OneHot:
        """Give the categorical distribution; in evaluation ``rsample`` is straight-through, thus hard."""
        return OneHot(
            self.logits(h_BF).unflatten(-1, (self.n_variables, self.n_categories)),
            temperature=self.temperature,
            straight_through=self.straight_through or not self.training,
        )

    def draw(self, h_BF: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the noise into Gumbel's and take the largest of each variable."""
        q = self(h_BF)
        # -log(-log u) with u the Gaussian's distribution function; log_ndtr keeps the far tail.
        gumbel = -torch.log(-torch.special.log_ndtr(noise.clamp(-8, 5)))
        z_SBL = q.from_gumbel(gumbel.unflatten(-1, (self.n_variables, self.n_categories)), relaxed=False)
        return z_SBL, q.log_prob(z_SBL)

    def statistics(self, h_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Give the probabilities, and the logarithm of their variance."""
        log_p_BVC = torch.log_softmax(self.logits(h_BF).unflatten(-1, (self.n_variables, self.n_categories)), dim=-1)
        # log(1 - p) as the sum of the others: 1 - p itself has no digits left where p is nearly 1.
        others = log_p_BVC.unsqueeze(-2) + _NEVER * torch.eye(self.n_categories, device=h_BF.device)
        log_variance = log_p_BVC + torch.logsumexp(others, dim=-1)
        return log_p_BVC.exp().flatten(-2), _bounded(log_variance.flatten(-2))

    def anneal(self, progress: float, config: TrainConfig) -> None:
        """Lower the temperature, exponentially in the share of steps done."""
        ratio = config.temperature_end / config.temperature_start
        self.temperature.fill_(config.temperature_start * ratio**progress)
        self.straight_through = config.straight_through


class JointPosterior(Posterior):
    """A diagonal Gaussian beside categorical variables; Dupont 2018, arXiv:1804.00104.

    The Gaussian's latents come first. What is exported is its mean, then the probabilities.
    """

    def __init__(self, config: ModelConfig, hidden_dim: int) -> None:
        super().__init__(config, hidden_dim)
        n_onehot = config.n_categorical * config.n_categories
        self.n_continuous = config.latent_dim - n_onehot
        self.gaussian = DiagonalGaussian(
            replace(config, posterior="diagonal", latent_dim=self.n_continuous), hidden_dim
        )
        self.categorical = CategoricalPosterior(
            replace(config, posterior="categorical", latent_dim=n_onehot), hidden_dim
        )

    def forward(self, h_BF: Tensor) -> Joint:
        """Give both distributions side by side."""
        return Joint(self.gaussian(h_BF), self.categorical(h_BF))

    def draw(self, h_BF: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draw each part from its share of the noise."""
        continuous, categorical = noise.tensor_split([self.n_continuous], dim=-1)
        z, log_density = self.gaussian.draw(h_BF, continuous)
        onehot, log_mass = self.categorical.draw(h_BF, categorical)
        return torch.cat([z, onehot], dim=-1), log_density + log_mass

    def statistics(self, h_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Give means and probabilities, and the logarithms of their variances."""
        parts = zip(self.gaussian.statistics(h_BF), self.categorical.statistics(h_BF), strict=True)
        mean, logvar = (torch.cat(pair, dim=-1) for pair in parts)
        return mean, logvar

    def anneal(self, progress: float, config: TrainConfig) -> None:
        """Lower the categorical part's temperature."""
        self.categorical.anneal(progress, config)


class DeterministicPosterior(Posterior):
    """One point for each row: an auto-encoder. What is exported is the point, and the smallest log-variance."""

    has_density = False

    def __init__(self, config: ModelConfig, hidden_dim: int) -> None:
        super().__init__(config, hidden_dim)
        self.mean = nn.Linear(hidden_dim, config.latent_dim)

    def forward(self, h_BF: Tensor) -> Deterministic:
        """Give the point."""
        return Deterministic(self.mean(h_BF))

    def draw(self, h_BF: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Refuse: a point has no density."""
        raise NotImplementedError("a deterministic encoder has no posterior density")

    def statistics(self, h_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Give the point and a constant."""
        mu_BL = self.mean(h_BF)
        return mu_BL, torch.full_like(mu_BL, -_LOGVAR_LIMIT)


def _bounded(logvar: Tensor) -> Tensor:
    return logvar.clamp(-_LOGVAR_LIMIT, _LOGVAR_LIMIT)


POSTERIORS: dict[str, type[Posterior]] = {
    "diagonal": DiagonalGaussian,
    "full": FullGaussian,
    "planar": PlanarPosterior,
    "iaf": IAFPosterior,
    "categorical": CategoricalPosterior,
    "joint": JointPosterior,
    "deterministic": DeterministicPosterior,
}
