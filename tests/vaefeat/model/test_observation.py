"""What is random about a row belongs to the row, whoever asks for it, and in whatever parts."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaefeat import ModelConfig
from vaefeat.model.marginal_likelihood import (
    annealed_importance_sampling,
    hamiltonian_estimator,
    importance_sampling,
)
from vaefeat.model.observation import RowNoise
from vaefeat.model.vae import VAE


def coins() -> tuple[VAE, NDArray[np.float32], Tensor]:
    """Make a binarizing model whose decoder ignores z and whose posterior is the prior: log p(x) tells x itself."""
    vae = VAE(ModelConfig(network="mlp", latent_dim=2, hidden_dims=(8,), binarize=True), (5,))
    torch.manual_seed(0)
    logits = torch.tensor([-1.3, 0.2, 0.7, 2.9, 5.1])
    with torch.no_grad():
        for parameter in [*vae.posterior.parameters(), *vae.decoder.parameters()]:
            parameter.zero_()
        *_, bias = vae.decoder.parameters()
        bias.copy_(logits)
    rows = np.tile(np.array([[0.1, 0.5, 0.9, 0.3, 0.7]], dtype=np.float32), (2000, 1))
    return vae, rows, logits


def test_binarized_row_is_drawn_once_with_its_probabilities_and_the_same_for_all() -> None:
    vae, rows, logits = coins()
    estimate = importance_sampling(vae, rows, n_samples=30, samples_per_chunk=4)
    # Were a row drawn anew for a chunk, weights would differ.
    np.testing.assert_allclose(estimate.standard_errors, 0, atol=1e-5)
    probabilities = torch.sigmoid(logits)
    outcomes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 5)
    log_masses = torch.distributions.Bernoulli(probabilities).log_prob(outcomes).sum(dim=1).numpy()
    places = np.abs(estimate.values[:, None] - log_masses).argmin(axis=1)
    np.testing.assert_allclose(estimate.values, log_masses[places], atol=1e-4)
    frequencies = outcomes[places].mean(dim=0).numpy()
    np.testing.assert_allclose(frequencies, rows[0], atol=5 * math.sqrt(0.25 / 2000))

    some = annealed_importance_sampling(vae, rows[40:43], n_temperatures=2, n_chains=2, first_row=40, batch_size=2)
    np.testing.assert_allclose(some.values, estimate.values[40:43], atol=1e-4)
    drawn = hamiltonian_estimator(vae, rows[40:43], n_draws=20, n_warmup=10, first_row=40)
    np.testing.assert_allclose(drawn.values, estimate.values[40:43], atol=0.2)
    assert (importance_sampling(vae, rows, n_samples=2, seed=1).values != estimate.values).mean() > 0.5


def test_noise_of_a_row_is_one_stream_however_it_is_asked_for() -> None:
    at_once = RowNoise([3, 4], 5, torch.device("cpu"))(700)
    noise = RowNoise([4, 3], 5, torch.device("cpu"))
    bit_by_bit = torch.cat([noise(n) for n in (1, 255, 300, 144)])
    assert torch.equal(at_once, bit_by_bit.flip(1))
    assert len(at_once.unique()) > 6900
