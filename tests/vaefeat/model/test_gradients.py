"""Gradients of bounds as estimators: their means against each other, and their variances.

A row is repeated many times, each time with a hidden layer of its own: one backward pass gives a gradient for each
draw of the noise.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vaefeat import ModelConfig, TrainConfig
from vaefeat.model.objectives import ELBO, IWAE
from vaefeat.model.vae import VAE
from vaefeat.training import Trainer


@pytest.fixture(scope="module")
def trained(digits_rows: NDArray[np.uint8]) -> tuple[VAE, Tensor]:
    """Train a small VAE for a while, and give a row: the gradients of a fresh one would be of little interest."""
    torch.manual_seed(0)
    config = ModelConfig(latent_dim=5, network="mlp", hidden_dims=(32,))
    vae = VAE.for_rows(config, digits_rows)
    Trainer(vae, digits_rows, TrainConfig(max_epochs=4, threads=1, device="cpu")).run()
    return vae, torch.from_numpy(digits_rows[:1])


def gradients_of_draws(
    vae: VAE, row: Tensor, config: TrainConfig, *, n_draws: int, kl_weight: float, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """Give the gradient with respect to the hidden layer, (draws, F) in float64, each with noise of its own."""
    with torch.no_grad():
        hidden = vae.hidden(vae.preprocessing(row)).expand(n_draws, -1).clone()
    hidden.requires_grad_()
    rows = row.expand(n_draws, *row.shape[1:])
    objective = (IWAE if config.objective == "iwae" else ELBO)(config)
    with monkeypatch.context() as patched:
        patched.setattr(vae, "hidden", lambda x: hidden)
        total = objective(vae, rows, kl_weight=kl_weight).objective.sum()
    return torch.autograd.grad(total, hidden)[0].double()


def score_function_gradients(vae: VAE, row: Tensor, n_draws: int) -> Tensor:
    """Give the gradient of the same bound by REINFORCE: the bound of a sample times the gradient of log q."""
    with torch.no_grad():
        hidden = vae.hidden(vae.preprocessing(row)).expand(n_draws, -1).clone()
    hidden.requires_grad_()
    q, p = vae.posterior(hidden), vae.prior_distribution()
    z = q.sample()
    log_q = q.log_prob(z)
    x = vae.preprocessing(row.expand(n_draws, *row.shape[1:]))
    bound = vae.decode(z).log_prob(x) + p.log_prob(z) - log_q
    return torch.autograd.grad((bound.detach() * log_q).sum(), hidden)[0].double()


def standard_scores(ours: Tensor, theirs: Tensor) -> Tensor:
    """Give the difference of two means over draws in units of its standard error."""
    errors = (ours.var(dim=0) / len(ours) + theirs.var(dim=0) / len(theirs)).sqrt()
    return (ours.mean(dim=0) - theirs.mean(dim=0)) / errors


def signal_to_noise(gradients: Tensor) -> float:
    """Give the norm of the mean over the root of the total variance."""
    ratio: float = (gradients.mean(dim=0).norm() / gradients.var(dim=0).sum().sqrt()).item()
    return ratio


def test_reparameterized_gradient_varies_far_less_than_the_score_functions(
    trained: tuple[VAE, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, row = trained
    torch.manual_seed(1)
    config = TrainConfig(kl_estimator="sampled")
    ours = gradients_of_draws(vae, row, config, n_draws=50_000, kl_weight=1.0, monkeypatch=monkeypatch)
    theirs = score_function_gradients(vae, row, 50_000)
    # Both are unbiased, and so agree in the mean: two derivations of one gradient.
    assert standard_scores(ours, theirs).abs().max() < 5
    ratio = (theirs.var(dim=0).sum() / ours.var(dim=0).sum()).item()
    print(f"\nvariance of the score-function gradient / reparameterized: {ratio:.0f}")
    assert ratio > 50


@pytest.mark.parametrize("kl_weight", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("n_samples", [1, 8])
def test_doubly_reparameterized_gradient_equals_the_ordinary_one_in_the_mean(
    trained: tuple[VAE, Tensor], monkeypatch: pytest.MonkeyPatch, n_samples: int, kl_weight: float
) -> None:
    vae, row = trained
    torch.manual_seed(2)
    ours, theirs = (
        gradients_of_draws(
            vae,
            row,
            TrainConfig(objective="iwae", n_samples=n_samples, gradient=gradient),
            n_draws=20_000,
            kl_weight=kl_weight,
            monkeypatch=monkeypatch,
        )
        for gradient in ("doubly_reparameterized", "reparameterized")
    )
    assert standard_scores(ours, theirs).abs().max() < 5


def test_doubly_reparameterized_signal_outgrows_the_ordinary_one_with_the_samples(
    trained: tuple[VAE, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, row = trained
    ratios = {}
    for n_samples in (4, 64):
        torch.manual_seed(3)
        gradients = [
            gradients_of_draws(
                vae,
                row,
                TrainConfig(objective="iwae", n_samples=n_samples, gradient=gradient),
                n_draws=1500,
                kl_weight=1.0,
                monkeypatch=monkeypatch,
            )
            for gradient in ("auto", "reparameterized")
        ]
        doubly, ordinary = gradients
        assert standard_scores(doubly, ordinary).abs().max() < 5
        assert doubly.var(dim=0).sum() < ordinary.var(dim=0).sum()
        ratios[n_samples] = signal_to_noise(doubly) / signal_to_noise(ordinary)
    print("\nsignal to noise, doubly over ordinarily reparameterized: ", {k: round(r, 1) for k, r in ratios.items()})
    # Rainforth et al. 2018 (arXiv:1802.04537): the ordinary one's signal to noise falls as 1 / sqrt(k).
    assert ratios[64] > 3
    assert ratios[64] > 1.5 * ratios[4]


@pytest.mark.parametrize("prior", ["standard", "mixture", "vamp"])
def test_doubly_reparameterized_gradient_leaves_decoder_and_prior_as_they_are(prior: str) -> None:
    torch.manual_seed(0)
    vae = VAE(ModelConfig(latent_dim=3, hidden_dims=(8,), prior=prior, prior_components=4), (5,))
    rows = torch.randn(16, 5)
    vae.prior.start(rows)
    found = []
    for gradient in ("doubly_reparameterized", "reparameterized"):
        objective = IWAE(TrainConfig(objective="iwae", n_samples=8, gradient=gradient))
        torch.manual_seed(1)
        vae.zero_grad()
        objective(vae, rows, kl_weight=1.0).objective.mean().backward()
        found.append({name: weight.grad for name, weight in vae.named_parameters() if weight.grad is not None})
    doubly, ordinary = found
    shared = [name for name in ordinary if name.startswith(("decoder", "likelihood", "prior"))]
    assert len(shared) >= 5
    for name in shared:
        torch.testing.assert_close(doubly[name], ordinary[name])
    assert not torch.equal(doubly["encoder.layers.1.0.0.weight"], ordinary["encoder.layers.1.0.0.weight"])


@pytest.mark.parametrize("posterior", ["diagonal", "full"])
@pytest.mark.parametrize("prior", ["standard", "vamp"])
def test_doubly_reparameterized_gradient_of_the_encoders_own_weights_is_unbiased(posterior: str, prior: str) -> None:
    # With a VampPrior the encoder has a second way into the bound, through the pseudo-inputs.
    torch.manual_seed(0)
    vae = VAE(ModelConfig(latent_dim=2, hidden_dims=(4,), prior=prior, posterior=posterior, prior_components=3), (3,))
    vae.prior.start(torch.randn(3, 3))
    rows = torch.randn(1, 3).expand(400, 3)
    encoder = [*vae.encoder.parameters(), *vae.posterior.parameters()]
    means = []
    for gradient in ("doubly_reparameterized", "reparameterized"):
        objective = IWAE(TrainConfig(objective="iwae", n_samples=8, gradient=gradient))
        torch.manual_seed(1)
        draws = []
        for _ in range(100):
            value = objective(vae, rows, kl_weight=1.0).objective.mean()
            draws.append(nn.utils.parameters_to_vector(torch.autograd.grad(value, encoder)).double())
        means.append(torch.stack(draws))
    scores = standard_scores(*means)
    scores = scores[scores.isfinite()]
    assert len(scores) > 20
    assert scores.abs().max() < 5
    assert math.sqrt(scores.square().mean().item()) < 2
