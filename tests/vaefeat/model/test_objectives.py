"""The bound against routes that do not share its code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from vaefeat import ModelConfig, TrainConfig
from vaefeat.model.evaluation import active_units, evaluate, importance_weighted_bound
from vaefeat.model.objectives import ELBO
from vaefeat.model.vae import VAE

BOUND = ELBO(TrainConfig())


@pytest.fixture
def linear() -> tuple[VAE, np.ndarray, Tensor]:
    """Make a linear-Gaussian model, its rows and their log p(x), which is known in closed form.

    x = W z + noise, so p(x) = N(0, W W^T + s^2 I), and the posterior is a Gaussian with one covariance for all rows.
    """
    torch.manual_seed(0)
    n_features, latent_dim, std = 6, 2, 0.5
    vae = VAE(ModelConfig(network="mlp", latent_dim=latent_dim, hidden_dims=(n_features,), gaussian_std=std), (6,))
    # Orthogonal columns make the exact posterior diagonal, so that a diagonal q can equal it.
    weight = torch.linalg.qr(torch.randn(n_features, latent_dim))[0] * torch.tensor([1.5, 0.7])
    precision = 1 + (weight**2).sum(dim=0) / std**2
    decoder = torch.nn.Linear(latent_dim, n_features)
    vae.encoder = torch.nn.Identity()  # type: ignore[assignment]
    vae.decoder = torch.nn.Sequential(decoder, torch.nn.Unflatten(1, (1, -1)))  # type: ignore[assignment]
    with torch.no_grad():
        decoder.weight.copy_(weight)
        decoder.bias.zero_()
        vae.posterior.get_parameter("mean.weight").copy_((weight / std**2 / precision).T)
        vae.posterior.get_parameter("mean.bias").zero_()
        vae.posterior.get_parameter("logvar.weight").zero_()
        vae.posterior.get_parameter("logvar.bias").copy_(-precision.log())
    marginal = MultivariateNormal(torch.zeros(6), weight @ weight.T + std**2 * torch.eye(6))
    rows = marginal.sample(torch.Size([40]))
    return vae, rows.numpy(), marginal.log_prob(rows)


def test_elbo_with_the_exact_posterior_is_the_marginal_likelihood(linear: tuple[VAE, np.ndarray, Tensor]) -> None:
    vae, rows, log_marginal = linear
    with torch.no_grad():
        bounds = torch.stack(
            [terms.objective for terms in (BOUND(vae, torch.from_numpy(rows), kl_weight=1.0) for _ in range(4000))]
        )
    standard_error = bounds.std(dim=0) / math.sqrt(len(bounds))
    assert ((bounds.mean(dim=0) - log_marginal).abs() < 5 * standard_error + 1e-4).all()


def test_importance_weights_of_the_exact_posterior_are_all_equal(linear: tuple[VAE, np.ndarray, Tensor]) -> None:
    vae, rows, log_marginal = linear
    # p(x|z) p(z) / q(z|x) = p(x) for every z: one sample is exact.
    for n_samples in (1, 7):
        got = importance_weighted_bound(vae, rows, n_samples=n_samples)
        np.testing.assert_allclose(got, log_marginal.numpy(), atol=2e-5)


def test_importance_weighted_bound_grows_with_samples(linear: tuple[VAE, np.ndarray, Tensor]) -> None:
    vae, rows, log_marginal = linear
    with torch.no_grad():
        vae.posterior.get_parameter("logvar.bias").add_(1.0)  # a posterior that is too wide
    means = [
        np.mean([importance_weighted_bound(vae, rows, n_samples=k, seed=seed).mean() for seed in range(20)])
        for k in (1, 8, 128)
    ]
    assert means[0] < means[1] < means[2] <= log_marginal.mean().item() + 0.02


def test_importance_weighted_bound_of_a_row_ignores_its_neighbours(linear: tuple[VAE, np.ndarray, Tensor]) -> None:
    vae, rows, _ = linear
    vae.posterior.get_parameter("logvar.bias").data.add_(1.0)
    together = importance_weighted_bound(vae, rows, n_samples=4)
    alone = np.concatenate([importance_weighted_bound(vae, rows[i : i + 1], n_samples=4) for i in range(len(rows))])
    backwards = importance_weighted_bound(vae, rows[::-1].copy(), n_samples=4)[::-1]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together, backwards)


@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0, 4.0])
def test_kl_weight_scales_the_kl_term_alone(kl_weight: float) -> None:
    torch.manual_seed(0)
    vae, rows = VAE(ModelConfig(latent_dim=3, hidden_dims=(8,)), (5,)), torch.randn(16, 5)
    terms = BOUND(vae, rows, kl_weight=kl_weight)
    torch.testing.assert_close(terms.objective, terms.log_likelihood - kl_weight * terms.kl)
    assert (terms.kl > 0).all()


def test_gradients_reach_every_weight() -> None:
    torch.manual_seed(0)
    vae = VAE(ModelConfig(latent_dim=3, hidden_dims=(8,), likelihood="gaussian", channels=(4,)), (1, 8, 8))
    BOUND(vae, torch.rand(16, 1, 8, 8), kl_weight=1.0).objective.mean().backward()
    silent = [name for name, weight in vae.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert silent == []


def test_evaluation_repeats_itself_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(0)
    vae, rows = VAE(ModelConfig(latent_dim=3, hidden_dims=(8,)), (5,)), np.random.default_rng(0).normal(size=(50, 5))
    state = torch.get_rng_state()
    first, second = (
        evaluate(vae, BOUND, rows.astype(np.float32), kl_weight=1.0, batch_size=16, seed=3) for _ in range(2)
    )
    assert first == second
    assert torch.equal(state, torch.get_rng_state())
    assert first.elbo == pytest.approx(first.log_likelihood - first.kl)


def test_active_units_are_those_whose_mean_varies() -> None:
    means = np.random.default_rng(0).normal(size=(1000, 3)) * [1.0, 0.05, 0.2]
    assert active_units(means) == (0, 2)
