"""Closed forms against Monte Carlo, and densities against independent formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from numpy.typing import NDArray
from torch.distributions import (
    Bernoulli,
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from vaefeat import ModelConfig, TrainConfig, pretrain
from vaefeat.model.likelihoods import BernoulliLikelihood, GaussianLikelihood
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


def test_bernoulli_of_logits_equals_scipy_per_row() -> None:
    logits = torch.tensor([[[-3.0, 0.5, 40.0]], [[2.0, -60.0, 0.0]]])
    x = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    got = BernoulliLikelihood(ModelConfig())(logits).log_prob(x)
    wanted = scipy.stats.bernoulli.logpmf(x.numpy(), torch.sigmoid(logits[:, 0].double()).numpy()).sum(axis=1)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-5)


def test_bernoulli_of_grey_values_is_the_expected_log_likelihood() -> None:
    logits, grey = torch.tensor([[[0.3, -1.2]]]), torch.tensor([[0.25, 0.7]])
    got = BernoulliLikelihood(ModelConfig())(logits).log_prob(grey)
    coins = Bernoulli(logits=logits[:, 0])
    wanted = grey * coins.log_prob(torch.ones(2)) + (1 - grey) * coins.log_prob(torch.zeros(2))
    torch.testing.assert_close(got, wanted.sum(dim=1))


@pytest.mark.parametrize("std", [0.5, 1.0, 2.5])
def test_gaussian_log_prob_equals_scipy_per_row(std: float) -> None:
    mean, x = torch.randn(4, 1, 2, 3), torch.randn(4, 2, 3)
    got = GaussianLikelihood(ModelConfig(gaussian_std=std))(mean).log_prob(x)
    wanted = scipy.stats.norm.logpdf(x.numpy(), mean[:, 0].numpy(), std).sum(axis=(1, 2))
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-5)


def test_gaussian_of_unit_std_differs_from_half_the_squared_error_by_a_constant() -> None:
    mean, x = torch.randn(6, 1, 10), torch.randn(6, 10)
    got = GaussianLikelihood(ModelConfig(gaussian_std=1.0))(mean).log_prob(x)
    squared = -0.5 * (x - mean[:, 0]).pow(2).sum(dim=1)
    torch.testing.assert_close(got - squared, torch.full((6,), -5 * math.log(2 * math.pi)))


def test_gaussian_std_is_learned_only_when_not_given() -> None:
    assert GaussianLikelihood(ModelConfig()).log_std.requires_grad
    assert not GaussianLikelihood(ModelConfig(gaussian_std=1.0)).log_std.requires_grad


def test_learned_gaussian_std_has_its_best_value_at_the_error() -> None:
    likelihood = GaussianLikelihood(ModelConfig())
    x = 3.0 * torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.LBFGS(likelihood.parameters(), max_iter=100)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value: torch.Tensor = -likelihood(torch.zeros(2000, 1, 4)).log_prob(x).mean()
        value.backward()
        return value

    optimizer.step(loss)
    assert likelihood.std.item() == pytest.approx(x.pow(2).mean().sqrt().item(), rel=1e-3)


def test_log_densities_integrate_to_one() -> None:
    grid = torch.linspace(-12, 12, 4801)
    step = (grid[1] - grid[0]).item()
    gaussian = GaussianLikelihood(ModelConfig(gaussian_std=0.8))(torch.full((1, 1, 1), 0.4))
    assert gaussian.log_prob(grid[:, None]).exp().sum().item() * step == pytest.approx(1, abs=1e-4)
    posterior = DiagonalGaussian(ModelConfig(latent_dim=1), 2)(torch.randn(1, 2))
    assert posterior.log_prob(grid[:, None]).exp().sum().item() * step == pytest.approx(1, abs=1e-4)
    bernoulli = BernoulliLikelihood(ModelConfig())(torch.tensor([[[0.7, -0.3]]]))
    outcomes = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    assert bernoulli.log_prob(outcomes).exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_learned_std_can_rise_again_from_its_floor() -> None:
    likelihood = GaussianLikelihood(ModelConfig())
    likelihood.log_std.data.fill_(-6.5)
    (-likelihood(torch.zeros(8, 1, 4)).log_prob(torch.full((8, 4), 5.0)).mean()).backward()
    assert likelihood.log_std.grad is not None
    assert likelihood.log_std.grad.item() < 0


@pytest.mark.parametrize("std", [1e-3, 0.5])
def test_given_std_is_taken_as_it_is(std: float) -> None:
    assert GaussianLikelihood(ModelConfig(gaussian_std=std)).std.item() == pytest.approx(std)


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
