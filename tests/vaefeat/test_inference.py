"""Imputation reaches the conditional distributions that are known in closed form; scores rank what is unusual."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from vaefeat import ModelConfig, OnnxEncoder, load_bundle
from vaefeat.decoder import OnnxDecoder
from vaefeat.errors import InputError
from vaefeat.inference import anomaly_scores, denoise, impute
from vaefeat.model.preprocessing import Preprocessing
from vaefeat.model.vae import VAE

# Strongly correlated latents given a row, so that a diagonal posterior is off by much.
WEIGHTS = np.array([[1.0, 0.8], [-0.9, -0.9], [0.3, 0.4], [0.6, 1.0]])
OFFSET = np.array([0.3, -0.2, 0.1, 0.6])
STD = 0.4
SHIFT, SCALE = np.array([5.0, -1.0, 0.0, 2.0]), np.array([0.5, 1.0, 2.0, 0.25])
COVARIANCE = WEIGHTS @ WEIGHTS.T + STD**2 * np.eye(4)
ROW = np.array([7.0, np.nan, 0.4, np.nan])
CHAINS = 1000


@pytest.fixture(scope="module")
def linear_vae() -> VAE:
    """Give a linear-Gaussian model whose q(z|x) has the exact means and variances, and no covariance."""
    config = ModelConfig(latent_dim=2, network="mlp", likelihood="gaussian", gaussian_std=STD)
    shift, scale = (torch.tensor(part, dtype=torch.float32) for part in (SHIFT, SCALE))
    vae = VAE(config, (4,), preprocessing=Preprocessing(shift, scale))
    precision = np.eye(2) + WEIGHTS.T @ WEIGHTS / STD**2
    to_mean = np.linalg.solve(precision, WEIGHTS.T) / STD**2
    decoder, mean, logvar = nn.Linear(2, 4), nn.Linear(4, 2), nn.Linear(4, 2)
    for layer, weight, bias in (
        (decoder, WEIGHTS, OFFSET),
        (mean, to_mean, -to_mean @ OFFSET),
        (logvar, np.zeros((2, 4)), np.log(np.diag(np.linalg.inv(precision)))),
    ):
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(torch.tensor(bias))
    vae.encoder = nn.Identity()  # type: ignore[assignment]
    vae.posterior.mean, vae.posterior.logvar = mean, logvar
    vae.decoder = nn.Sequential(decoder, nn.Unflatten(1, (1, 4)))  # type: ignore[assignment]
    return vae


def conditional(row: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Give mean and standard deviation of the missing values given the observed ones, in the units of the rows."""
    hidden, seen = np.isnan(row), ~np.isnan(row)
    gain = COVARIANCE[np.ix_(hidden, seen)] @ np.linalg.inv(COVARIANCE[np.ix_(seen, seen)])
    x = (row - SHIFT) * SCALE
    mean = OFFSET[hidden] + gain @ (x[seen] - OFFSET[seen])
    covariance = COVARIANCE[np.ix_(hidden, hidden)] - gain @ COVARIANCE[np.ix_(seen, hidden)]
    return mean / SCALE[hidden] + SHIFT[hidden], np.sqrt(np.diag(covariance)) / SCALE[hidden]


@pytest.mark.parametrize("row", [ROW, np.full(4, np.nan)], ids=["two missing", "all missing"])
def test_corrected_imputation_reaches_the_exact_conditional(linear_vae: VAE, row: NDArray[Any]) -> None:
    filled = impute(linear_vae, np.tile(row, (CHAINS, 1)), corrected=True, n_iterations=400, n_draws=1)
    hidden = np.isnan(row)
    mean, std = conditional(row)
    of_chains = filled.rows[:, hidden]
    # Chains are independent: their own spread is the Monte Carlo error.
    errors = of_chains.std(axis=0) / np.sqrt(CHAINS)
    assert (errors < 0.05 * std).all()
    np.testing.assert_array_less(np.abs(of_chains.mean(axis=0) - mean), 4 * errors)
    draws = filled.draws[0][:, hidden]
    np.testing.assert_array_less(np.abs(draws.mean(axis=0) - mean), 4 * std / np.sqrt(CHAINS))
    np.testing.assert_allclose(draws.std(axis=0), std, rtol=4 / np.sqrt(2 * CHAINS))
    assert 0.1 < filled.acceptance < 0.95


def test_reported_deviation_is_that_of_the_exact_conditional(linear_vae: VAE) -> None:
    filled = impute(linear_vae, ROW[None], corrected=True, n_iterations=6000)
    np.testing.assert_allclose(filled.std[0, [1, 3]], conditional(ROW)[1], rtol=0.1)
    np.testing.assert_array_equal(filled.std[0, [0, 2]], 0)


def test_uncorrected_imputation_is_off_by_as_much_as_the_posterior_is(linear_vae: VAE) -> None:
    """Its chain is linear, x' = F x + c + noise, so that the covariance it settles at is known, too."""
    filled = impute(linear_vae, np.tile(ROW, (CHAINS, 1)), n_iterations=300)
    draws, hidden = filled.draws[0][:, [1, 3]] * SCALE[[1, 3]], WEIGHTS[[1, 3]]
    precision = np.eye(2) + WEIGHTS.T @ WEIGHTS / STD**2
    forward = hidden @ np.linalg.solve(precision, hidden.T) / STD**2
    noise = hidden @ np.diag(np.diag(np.linalg.inv(precision))) @ hidden.T + STD**2 * np.eye(2)
    settled = np.linalg.solve(np.eye(4) - np.kron(forward, forward), noise.ravel()).reshape(2, 2)
    exact = conditional(ROW)[1] * SCALE[[1, 3]]
    tolerance = 4 / np.sqrt(2 * CHAINS)
    np.testing.assert_allclose(draws.std(axis=0), np.sqrt(np.diag(settled)), rtol=tolerance)
    assert (np.abs(np.sqrt(np.diag(settled)) / exact - 1) > tolerance).any()
    assert filled.acceptance == 1


def test_observed_values_come_back_to_the_bit(linear_vae: VAE) -> None:
    rows = np.random.default_rng(0).normal(size=(20, 4)) * 1e3 / 7
    rows[np.random.default_rng(1).random((20, 4)) < 0.4] = np.nan
    for dtype in (np.float64, np.float32):
        given = rows.astype(dtype)
        filled = impute(linear_vae, given, n_iterations=4, n_draws=2)
        assert filled.rows.dtype == filled.draws.dtype == dtype
        assert filled.draws.shape == (2, 20, 4)
        assert np.isfinite(filled.rows).all()
        np.testing.assert_array_equal(filled.missing, np.isnan(rows))
        for complete in (filled.rows, *filled.draws):
            np.testing.assert_array_equal(complete[~filled.missing], given[~filled.missing])
        assert np.isnan(given).any()  # the caller's rows are not written to


def test_imputation_follows_its_seed_and_what_stands_at_missing_places_counts_for_nothing(linear_vae: VAE) -> None:
    missing = np.isnan(ROW)
    first = impute(linear_vae, ROW[None], n_iterations=10, seed=3)
    with_numbers = impute(linear_vae, np.where(missing, 1e9, ROW)[None], missing=missing, n_iterations=10, seed=3)
    np.testing.assert_array_equal(first.rows, with_numbers.rows)
    masked = np.ma.MaskedArray(np.where(missing, -1.0, ROW)[None], missing[None])
    np.testing.assert_array_equal(first.rows, impute(linear_vae, masked, n_iterations=10, seed=3).rows)
    assert not np.array_equal(first.rows, impute(linear_vae, ROW[None], n_iterations=10, seed=4).rows)


def test_draws_are_states_of_one_chain_and_the_last_is_its_end(linear_vae: VAE) -> None:
    many = impute(linear_vae, ROW[None], n_iterations=10, n_draws=5)
    np.testing.assert_array_equal(many.draws[-1], impute(linear_vae, ROW[None], n_iterations=10).draws[0])
    assert len(np.unique(many.draws[:, 0, 1])) == 5


def test_inpainting_fills_half_of_an_image_better_than_the_average_image(
    digits_bundle: Path, digits_rows: NDArray[np.uint8]
) -> None:
    truth, mask = digits_rows[:100], np.zeros((8, 8), dtype=bool)
    mask[4:] = True
    filled = impute(digits_bundle, truth, missing=mask, n_iterations=60)
    assert filled.rows.dtype == np.float32
    np.testing.assert_array_equal(filled.rows[:, :, :4], truth[:, :, :4])
    flat = impute(
        digits_bundle, truth.reshape(100, 64).astype(float), missing=np.tile(mask.ravel(), (100, 1)), n_iterations=60
    )
    np.testing.assert_allclose(flat.rows.reshape(truth.shape), filled.rows, rtol=1e-5)
    error = ((filled.rows - truth)[:, :, 4:] ** 2).mean()
    assert error < 0.9 * ((digits_rows.mean(axis=0) - truth)[:, :, 4:] ** 2).mean()


def test_tokens_are_filled_with_the_most_frequent_one() -> None:
    torch.manual_seed(0)
    vae = VAE(ModelConfig(latent_dim=2, network="mlp", hidden_dims=(8,), likelihood="tokens", levels=4), (3,))
    for rows in (np.array([[0.0, np.nan, 3.0]]), np.full((1, 3), np.nan)):
        filled = impute(vae, rows, n_iterations=20)
        assert set(filled.rows.ravel()) <= {0.0, 1.0, 2.0, 3.0}


def test_denoising_decodes_the_mean_of_the_corrupted_row(digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> None:
    noise = np.random.default_rng(0).integers(-4, 5, digits_rows[:300].shape)
    corrupted = np.clip(digits_rows[:300] + noise, 0, 16).astype(np.uint8)
    cleaned = denoise(digits_bundle, corrupted)
    means = OnnxEncoder(digits_bundle, device="cpu").embed(corrupted)
    np.testing.assert_allclose(cleaned, OnnxDecoder(load_bundle(digits_bundle), device="cpu").decode(means), atol=1e-3)


def test_denoising_takes_noise_that_leaves_whole_numbers(digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> None:
    noise = np.random.default_rng(0).normal(0, 3, digits_rows[:300].shape)
    cleaned = denoise(digits_bundle, digits_rows[:300] + noise)
    assert ((cleaned - digits_rows[:300]) ** 2).mean() < (noise**2).mean()
    np.testing.assert_allclose(
        denoise(digits_bundle, digits_rows[:3].astype(float)), denoise(digits_bundle, digits_rows[:3])
    )
    with pytest.raises(InputError, match="leave out the division by 255"):
        denoise(digits_bundle, digits_rows[:3] / 16)


def test_noise_is_more_unusual_than_digits(digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> None:
    normal = anomaly_scores(digits_bundle, digits_rows[:100])
    noise = anomaly_scores(digits_bundle, np.random.default_rng(0).integers(0, 17, (100, 1, 8, 8)).astype(np.uint8))
    assert normal.shape == (100,)
    assert normal.dtype == np.float64
    assert normal.max() < noise.min()


def test_anomaly_score_is_close_above_the_exact_minus_log_likelihood(linear_vae: VAE) -> None:
    rows = np.random.default_rng(0).normal(size=(6, 4)) / SCALE + SHIFT
    x = torch.tensor((rows - SHIFT) * SCALE)
    exact = torch.distributions.MultivariateNormal(torch.tensor(OFFSET), torch.tensor(COVARIANCE)).log_prob(x)
    np.testing.assert_allclose(anomaly_scores(linear_vae, rows, n_samples=5000), -exact.numpy(), atol=0.1)
    of_one_sample = [anomaly_scores(linear_vae, rows, n_samples=1, seed=seed) for seed in range(200)]
    assert (np.mean(of_one_sample, axis=0) > -exact.numpy()).all()


def test_an_auto_encoder_scores_its_reconstruction() -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        latent_dim=2, hidden_dims=(8,), posterior="deterministic", likelihood="gaussian", gaussian_std=1.0
    )
    vae, rows = VAE(config, (5,)), np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    squared = ((denoise(vae, rows) - rows) ** 2).sum(axis=1)
    np.testing.assert_allclose(anomaly_scores(vae, rows), 0.5 * squared + 2.5 * np.log(2 * np.pi), rtol=1e-5)


@pytest.mark.parametrize("posterior", ["full", "iaf", "joint", "deterministic"])
def test_every_posterior_imputes(posterior: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        latent_dim=5, hidden_dims=(8,), posterior=posterior, n_categories=3, likelihood="gaussian", gaussian_std=1.0
    )
    vae = VAE(config, (4,))
    if posterior == "deterministic":
        assert np.isfinite(impute(vae, ROW[None], n_iterations=6).rows).all()
        with pytest.raises(InputError, match="posterior='deterministic', which has no density"):
            impute(vae, ROW[None], corrected=True)
        return
    filled = impute(vae, ROW[None], n_iterations=40, corrected=True)
    assert np.isfinite(filled.rows).all()
    assert filled.acceptance > 0


def test_bad_requests_are_refused_with_what_was_wanted(linear_vae: VAE) -> None:
    whole = np.zeros((2, 4))
    for call, message in (
        (lambda: impute(linear_vae, whole.astype(np.uint8)), "uint8 rows without missing="),
        (lambda: impute(linear_vae, whole, missing=np.zeros((2, 4))), "wanted bool of shape"),
        (lambda: impute(linear_vae, whole, missing=np.zeros(3, dtype=bool)), "wanted bool of shape"),
        (lambda: impute(linear_vae, ROW[None], missing=np.zeros(4, dtype=bool)), "NaN or infinite"),
        (lambda: impute(linear_vae, ROW), "pass a single row as"),
        (lambda: impute(linear_vae, np.array([["a"] * 4])), "dtype <U1"),
        (lambda: impute(linear_vae, whole, n_iterations=1), "n_iterations=1"),
        (lambda: impute(linear_vae, whole, n_iterations=10, n_draws=6), "wanted at most 5"),
        (lambda: denoise(linear_vae, np.zeros((2, 3))), "rows of shape"),
        (lambda: denoise(linear_vae, np.ma.masked_less(whole, 1)), "masked values"),
        (lambda: anomaly_scores(linear_vae, whole * np.nan), "NaN"),
        (lambda: anomaly_scores(linear_vae, whole, n_samples=0), "n_samples=0"),
    ):
        with pytest.raises(InputError, match=message):
            call()
