"""Closed forms against Monte Carlo, and densities against independent formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from vaefeat import ModelConfig, TrainConfig, pretrain
from vaefeat.model.objectives import kl_of
from vaefeat.model.posteriors import DiagonalGaussian
from vaefeat.model.priors import PRIORS, Encode, Prior, StandardPrior


@pytest.fixture
def posterior() -> DiagonalGaussian:
    torch.manual_seed(0)
    return DiagonalGaussian(ModelConfig(latent_dim=3), 7)


@pytest.fixture
def h_BF() -> torch.Tensor:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(1))


def test_diagonal_gaussian_log_prob_equals_multivariate_normal(posterior: DiagonalGaussian, h_BF: torch.Tensor) -> None:
    mu, logvar = posterior.statistics(h_BF)
    z = torch.randn(5, 3)
    independent = MultivariateNormal(mu, covariance_matrix=torch.diag_embed(logvar.exp()))
    torch.testing.assert_close(posterior(h_BF).log_prob(z), independent.log_prob(z))


def test_kl_closed_form_equals_monte_carlo_and_the_papers_formula(
    posterior: DiagonalGaussian, h_BF: torch.Tensor
) -> None:
    q, p = posterior(h_BF), StandardPrior(ModelConfig(latent_dim=3), (1,))(posterior)
    closed = kl_divergence(q, p)
    mu, logvar = posterior.statistics(h_BF)
    # Kingma and Welling 2013, appendix B.
    formula = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(dim=1)
    torch.testing.assert_close(closed, formula)
    z = q.sample(torch.Size([200_000]))
    ratios = q.log_prob(z) - p.log_prob(z)
    standard_error = ratios.std(dim=0) / math.sqrt(len(z))
    assert ((ratios.mean(dim=0) - closed).abs() < 5 * standard_error).all()


def test_shared_noise_draws_have_the_posteriors_moments(posterior: DiagonalGaussian, h_BF: torch.Tensor) -> None:
    noise = torch.randn(100_000, 1, 3, generator=torch.Generator().manual_seed(2))
    z_SBL, log_q_SB = posterior.draw(h_BF, noise)
    torch.testing.assert_close(log_q_SB, posterior(h_BF).log_prob(z_SBL))
    mu, logvar = posterior.statistics(h_BF)
    torch.testing.assert_close(z_SBL.mean(dim=0), mu, atol=0.02, rtol=0)
    torch.testing.assert_close(z_SBL.var(dim=0), logvar.exp(), atol=0, rtol=0.03)


def test_reparameterized_gradient_equals_finite_differences(posterior: DiagonalGaussian, h_BF: torch.Tensor) -> None:
    noise = torch.randn(4, 1, 3, dtype=torch.float64)
    posterior = posterior.double()
    assert torch.autograd.gradcheck(
        lambda h: posterior.draw(h, noise)[0].pow(2).sum(), h_BF.double().requires_grad_(), atol=1e-6
    )


def test_logvar_of_extreme_inputs_stays_finite(posterior: DiagonalGaussian) -> None:
    q = posterior(torch.full((2, 7), 1e6))
    assert torch.isfinite(kl_divergence(q, StandardPrior(ModelConfig(latent_dim=3), (1,))(posterior))).all()


def test_diagonal_gaussian_density_integrates_to_one() -> None:
    grid = torch.linspace(-12, 12, 4801)
    step = (grid[1] - grid[0]).item()
    posterior = DiagonalGaussian(ModelConfig(latent_dim=1), 2)(torch.randn(1, 2))
    assert posterior.log_prob(grid[:, None]).exp().sum().item() * step == pytest.approx(1, abs=1e-4)


class TwoHills(Prior):
    """A prior without a closed-form KL: what an extension looks like."""

    def forward(self, encode: Encode) -> MixtureSameFamily:
        parts = Independent(Normal(torch.tensor([[-2.0] * 3, [2.0] * 3]), torch.ones(2, 3)), 1)
        return MixtureSameFamily(Categorical(logits=torch.zeros(2)), parts)


def test_kl_without_a_closed_form_is_estimated_without_bias(posterior: DiagonalGaussian, h_BF: torch.Tensor) -> None:
    q, p = posterior(h_BF), TwoHills(ModelConfig(latent_dim=3), (1,))(posterior)
    estimates = torch.stack([kl_of(q, p, q.rsample(torch.Size([1]))) for _ in range(4000)])
    z = q.sample(torch.Size([200_000]))
    wanted = (q.log_prob(z) - p.log_prob(z)).mean(dim=0)
    standard_error = estimates.std(dim=0) / math.sqrt(len(estimates))
    assert ((estimates.mean(dim=0) - wanted).abs() < 6 * standard_error).all()


def test_prior_without_a_closed_form_trains_and_exports(
    digits_rows: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One class and one name in the registry: nothing else has to know."""
    monkeypatch.setitem(PRIORS, "two_hills", TwoHills)
    bundle = pretrain(
        digits_rows[:200],
        model=ModelConfig(latent_dim=3, prior="two_hills", hidden_dims=(16,), network="mlp"),
        train=TrainConfig(max_epochs=1),
        progress=False,
    )
    assert bundle.manifest.model["prior"] == "two_hills"
    assert np.isfinite(bundle.manifest.metrics["kl"])
