"""Training on a linear-Gaussian model, whose marginal likelihood and its maximum are known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.distributions import MultivariateNormal

from vaefeat import ModelConfig, TrainConfig
from vaefeat.model.likelihoods import GaussianLikelihood
from vaefeat.model.objectives import ELBO
from vaefeat.model.vae import VAE
from vaefeat.training import Trainer

N_FEATURES, LATENT_DIM = 6, 2


@pytest.fixture(scope="module")
def rows() -> NDArray[np.float32]:
    """Rows x = W z + noise; the noise is large enough that the bound's optimum is not at the edge of anything."""
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(N_FEATURES, LATENT_DIM))
    latents = generator.normal(size=(2000, LATENT_DIM))
    return (latents @ weight.T + 0.6 * generator.normal(size=(2000, N_FEATURES))).astype(np.float32)


def best_log_likelihood(x: NDArray[np.float64]) -> float:
    """Give the largest mean log p(x) of any such model: probabilistic principal component analysis.

    Tipping and Bishop 1999, J. R. Statist. Soc. B 61, equations 7 and 8: the covariance's largest eigenvalues are kept,
    and the noise is the mean of the others.
    """
    eigenvalues = np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1]
    noise = eigenvalues[LATENT_DIM:].mean()
    log_determinant = np.log(eigenvalues[:LATENT_DIM]).sum() + (N_FEATURES - LATENT_DIM) * math.log(noise)
    return float(-0.5 * (N_FEATURES * math.log(2 * math.pi) + log_determinant + N_FEATURES))


def linear(rows: NDArray[np.float32], posterior: str) -> VAE:
    """Make a VAE whose networks are linear maps."""
    torch.manual_seed(0)
    config = ModelConfig(
        network="mlp",
        latent_dim=LATENT_DIM,
        hidden_dims=(N_FEATURES,),
        likelihood="gaussian",
        gaussian_std="learned",
        posterior=posterior,
    )
    vae = VAE.for_rows(config, rows)
    vae.encoder = torch.nn.Identity()  # type: ignore[assignment]
    vae.decoder = torch.nn.Sequential(  # type: ignore[assignment]
        torch.nn.Linear(LATENT_DIM, N_FEATURES), torch.nn.Unflatten(1, (1, -1))
    )
    return vae


def marginal(vae: VAE) -> MultivariateNormal:
    """Give the model's own p(x) = N(b, W W^T + s^2 I)."""
    layer = vae.decoder.get_submodule("0")
    assert isinstance(layer, torch.nn.Linear)
    assert isinstance(vae.likelihood, GaussianLikelihood)
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    noise = vae.likelihood.std.detach().double() ** 2 * torch.eye(N_FEATURES).double()
    return MultivariateNormal(bias, weight @ weight.T + noise)


@pytest.mark.parametrize(
    ("posterior", "objective", "n_samples"),
    [("diagonal", "elbo", 1), ("full", "elbo", 1), ("diagonal", "iwae", 8)],
)
def test_training_reaches_the_largest_marginal_likelihood_there_is(
    rows: NDArray[np.float32], posterior: str, objective: str, n_samples: int
) -> None:
    vae = linear(rows, posterior)
    train = TrainConfig(
        objective=objective,
        n_samples=n_samples,
        max_epochs=25,
        batch_size=100,
        learning_rate=0.02,
        weight_decay=0.0,
        heldout=0.02,
        device="cpu",
    )
    trainer = Trainer(vae, rows, train)
    result = trainer.run()
    seen = rows[np.setdiff1d(np.arange(len(rows)), result.heldout)]
    with torch.no_grad():
        x = vae.preprocessing(torch.from_numpy(seen)).double()
    reached = marginal(vae).log_prob(x).mean().item()
    best = best_log_likelihood(x.numpy())
    assert reached <= best + 1e-9
    assert best - reached < 0.02 * N_FEATURES
    # A posterior that can be the exact one makes the bound tight.
    with torch.no_grad():
        trained = torch.from_numpy(seen)
        bound = ELBO(TrainConfig(n_samples=50))(vae, trained, kl_weight=1.0).objective.mean().item()
    assert bound == pytest.approx(reached, abs=0.02 * N_FEATURES)
    print(
        f"\n{posterior}, {objective}: best {best:.4f}, reached {reached:.4f} nats per row, {best - reached:.4f} off"
        f" ({(best - reached) / N_FEATURES:.5f} per dimension); evidence lower bound {bound:.4f}"
    )


def test_largest_marginal_likelihood_is_that_of_a_fit_by_another_library(rows: NDArray[np.float32]) -> None:
    from sklearn.decomposition import PCA

    x = rows.astype(np.float64)
    # scikit-learn's noise is of the covariance over n - 1.
    assert PCA(LATENT_DIM).fit(x).score(x) == pytest.approx(best_log_likelihood(x), abs=1e-3)
