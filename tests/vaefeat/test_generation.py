"""Generated rows have the moments, ends and coordinates that the mathematics gives them."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from vaefeat import ModelConfig, OnnxEncoder, load_bundle
from vaefeat.decoder import OnnxDecoder
from vaefeat.errors import BundleError, InputError
from vaefeat.generation import interpolate, manifold, sample, sample_around, sweep
from vaefeat.model.preprocessing import Preprocessing
from vaefeat.model.vae import VAE

WEIGHTS = np.array([[1.0, 0.5], [-0.3, 0.8], [0.2, -1.1]])
OFFSET = np.array([0.3, -0.2, 0.1])
STD = 0.4
SHIFT, SCALE = np.array([5.0, -1.0, 0.0]), np.array([0.5, 1.0, 2.0])


def linear_vae(weights: NDArray[Any] = WEIGHTS, offset: NDArray[Any] = OFFSET, **settings: Any) -> VAE:
    """Give a model whose encoder and decoder are one matrix each: p(x) = N(offset, W W^T + STD^2), scaled."""
    n_values, n_latents = weights.shape
    config = ModelConfig(latent_dim=n_latents, network="mlp", likelihood="gaussian", gaussian_std=STD, **settings)
    shift, scale = (torch.tensor(part[:n_values], dtype=torch.float32) for part in (SHIFT, SCALE))
    vae = VAE(config, (n_values,), preprocessing=Preprocessing(shift, scale))
    decoder = nn.Linear(n_latents, n_values)
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor(weights))
        decoder.bias.copy_(torch.tensor(offset))
    vae.decoder = nn.Sequential(decoder, nn.Unflatten(1, (1, n_values)))  # type: ignore[assignment]
    return vae


def small_vae(**settings: Any) -> VAE:
    torch.manual_seed(0)
    return VAE(ModelConfig(network="mlp", hidden_dims=(8,), likelihood="gaussian", **settings), (5,))


def in_units(x: NDArray[Any]) -> NDArray[Any]:
    units: NDArray[Any] = x / SCALE + SHIFT
    return units


def test_sample_of_a_linear_model_has_the_moments_of_the_marginal() -> None:
    vae, n = linear_vae(), 40_000
    to_units = np.diag(1 / SCALE)
    signal = WEIGHTS @ WEIGHTS.T
    for kind, covariance in (("mean", signal), ("draw", signal + STD**2 * np.eye(3))):
        rows = sample(vae, n, kind=kind, seed=1)  # type: ignore[arg-type]
        wanted = to_units @ covariance @ to_units
        assert rows.shape == (n, 3)
        assert rows.dtype == np.float32
        errors = 4 * np.sqrt(np.diag(wanted) / n)
        np.testing.assert_array_less(np.abs(rows.mean(0) - in_units(OFFSET)), errors)
        np.testing.assert_allclose(np.cov(rows.T), wanted, atol=4 * wanted.max() * np.sqrt(2 / n))


def test_sample_follows_its_seed_alone() -> None:
    vae = linear_vae()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = sample(vae, 5, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    np.testing.assert_array_equal(sample(vae, 5, seed=3), first)
    assert not np.array_equal(sample(vae, 5, seed=4), first)


def test_sample_is_the_same_from_folder_bundle_and_model(digits_bundle: Path) -> None:
    from vaefeat.weights import restore_vae

    bundle = load_bundle(digits_bundle)
    vae = restore_vae(bundle).train()
    wanted = sample(vae, 3)
    assert vae.training
    assert wanted.shape == (3, 1, 8, 8)
    np.testing.assert_array_equal(sample(bundle, 3), wanted)
    np.testing.assert_array_equal(sample(digits_bundle, 3), wanted)


def test_draws_of_a_bernoulli_model_are_black_and_white(digits_bundle: Path) -> None:
    assert set(np.unique(sample(digits_bundle, 20, kind="draw"))) == {0.0, 16.0}


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_sample_around_a_row_has_the_moments_of_its_posterior(scale: float) -> None:
    vae, n = linear_vae(), 40_000
    row = np.array([4.0, 0.5, 1.0], dtype=np.float32)
    with torch.no_grad():
        mean, logvar, _ = (part.numpy()[0] for part in vae.features(torch.from_numpy(row[None])))
    rows = (sample_around(vae, row, n, scale=scale) - SHIFT) * SCALE
    covariance = scale**2 * WEIGHTS @ np.diag(np.exp(logvar)) @ WEIGHTS.T
    np.testing.assert_array_less(np.abs(rows.mean(0) - WEIGHTS @ mean - OFFSET), 4 * np.sqrt(np.diag(covariance) / n))
    np.testing.assert_allclose(np.cov(rows.T), covariance, atol=4 * covariance.max() * np.sqrt(2 / n))


@pytest.mark.parametrize("posterior", ["planar", "iaf"])
def test_the_middle_of_a_flow_is_the_image_of_its_base(posterior: str) -> None:
    vae = small_vae(latent_dim=3, posterior=posterior)
    row = np.linspace(-1, 1, 5, dtype=np.float32)
    with torch.no_grad():
        h = vae.encoder(vae.preprocessing(torch.from_numpy(row[None])))
        base, _ = vae.posterior.statistics(h)
        wanted = vae.reconstruct(vae.posterior.flow(h)(base)).numpy()  # type: ignore[operator]
        assert not np.allclose(wanted, vae.reconstruct(base).numpy())
    np.testing.assert_allclose(sample_around(vae, row, 1, scale=0), wanted, rtol=1e-5)


@pytest.mark.parametrize("path", ["linear", "spherical"])
def test_interpolation_begins_and_ends_at_reconstructions(
    path: Any, digits_bundle: Path, digits_rows: NDArray[np.uint8]
) -> None:
    way = interpolate(digits_bundle, digits_rows[0], digits_rows[1], steps=7, path=path)
    means = OnnxEncoder(digits_bundle, device="cpu").embed(digits_rows[:2])
    ends = OnnxDecoder(load_bundle(digits_bundle), device="cpu").decode(means)
    assert way.shape == (7, 1, 8, 8)
    np.testing.assert_allclose(way[[0, -1]], ends, atol=1e-3)


def test_linear_interpolation_has_equal_steps() -> None:
    way = interpolate(linear_vae(), np.zeros(3), np.ones(3), steps=5)
    steps = np.diff(way, axis=0)
    np.testing.assert_allclose(steps, np.broadcast_to(steps[0], steps.shape), atol=1e-5)


def test_spherical_interpolation_turns_evenly_around_the_prior() -> None:
    vae = linear_vae(np.eye(2), np.zeros(2), prior="learned")
    with torch.no_grad():
        vae.prior.location.copy_(torch.tensor([0.5, -1.0]))  # type: ignore[operator]
        vae.prior.log_scale.copy_(torch.tensor([0.2, -0.4]))  # type: ignore[operator]
    # Encoder and decoder are the identity: a scaled row is its latents.
    vae.encoder = nn.Identity()  # type: ignore[assignment]
    vae.posterior.mean, vae.posterior.logvar = nn.Identity(), nn.Linear(2, 2)
    angles = np.array([0.3, 0.3 + 2 * np.pi / 3])
    ends = 1.5 * np.column_stack([np.cos(angles), np.sin(angles)]) * np.exp([0.2, -0.4]) + [0.5, -1.0]
    start, end = ends / SCALE[:2] + SHIFT[:2]
    way = interpolate(vae, start, end, steps=6, path="spherical")
    noise = ((way - SHIFT[:2]) * SCALE[:2] - [0.5, -1.0]) / np.exp([0.2, -0.4])
    np.testing.assert_allclose(np.linalg.norm(noise, axis=1), 1.5, rtol=1e-4)
    np.testing.assert_allclose(
        np.unwrap(np.arctan2(noise[:, 1], noise[:, 0])), np.linspace(angles[0], angles[1], 6), rtol=1e-4
    )


@pytest.mark.parametrize("prior", ["standard", "learned"])
def test_manifold_is_a_uniform_grid_of_the_priors_probability(prior: str) -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(3, 3))
    vae = linear_vae(weights, OFFSET, prior=prior)
    location, scale = np.zeros(3), np.ones(3)
    if prior == "learned":
        location, scale = np.array([0.5, -2.0, 1.0]), np.exp([0.3, -0.5, 0.1])
        with torch.no_grad():
            vae.prior.location.copy_(torch.tensor(location))  # type: ignore[operator]
            vae.prior.log_scale.copy_(torch.tensor(np.log(scale)))  # type: ignore[operator]
    grid = manifold(vae, side=8, latents=(2, 0))
    for axis, latent in zip(grid.coordinates, (2, 0), strict=True):
        cdf = NormalDist(location[latent], scale[latent]).cdf
        np.testing.assert_allclose([cdf(value) for value in axis], (np.arange(8) + 0.5) / 8, atol=1e-6)
    # The one that is not shown stays at the prior's mean.
    z = np.array([grid.coordinates[1][3], location[1], grid.coordinates[0][6]])
    np.testing.assert_allclose(grid.rows[3, 6], in_units(weights @ z + OFFSET), rtol=1e-4, atol=1e-5)
    assert grid.latents == (2, 0)


def test_sweep_moves_one_latent_and_begins_with_the_one_that_says_most() -> None:
    vae = linear_vae()
    row = np.array([9.0, 0.5, 1.0], dtype=np.float32)
    with torch.no_grad():
        mean, logvar, _ = (part.numpy()[0] for part in vae.features(torch.from_numpy(row[None])))
    divergences = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar)
    lines = sweep(vae, row, values=[-2, 0, 2])
    assert [line.name for line in lines] == [f"latent {i}" for i in np.argsort(-divergences)]
    for line in lines:
        latent = int(line.name.split()[1])
        for value, got in zip(line.values, line.rows, strict=True):
            z = mean.copy()
            z[latent] = value
            np.testing.assert_allclose(got, in_units(WEIGHTS @ z + OFFSET), rtol=1e-4, atol=1e-5)


def test_sweep_is_in_standard_deviations_of_a_mixture_prior() -> None:
    vae = small_vae(latent_dim=2, prior="mixture", prior_components=3)
    prior = vae.prior_distribution()
    with torch.no_grad():
        z = vae.posterior.statistics(vae.encoder(torch.zeros(1, 5)))[0]
        z[0, 1] = prior.mean[1] + 2 * prior.variance[1].sqrt()
        wanted = vae.reconstruct(z).numpy()
    (line,) = sweep(vae, np.zeros(5), latents=[1], values=[2.0])
    np.testing.assert_allclose(line.rows, wanted, rtol=1e-5)


def test_sweep_of_categories_goes_through_each() -> None:
    vae = small_vae(latent_dim=5, posterior="joint", n_categorical=1, n_categories=3)
    lines = sweep(vae, np.ones(5), latents=[0, 2])
    assert [(line.name, len(line.values)) for line in lines] == [("latent 0", 11), ("categories 0", 3)]
    with torch.no_grad():
        middle = vae.posterior.statistics(vae.encoder(torch.ones(1, 5)))[0]
        middle[:, 2:] = torch.tensor([0.0, 1.0, 0.0])
        np.testing.assert_allclose(lines[1].rows[1], vae.reconstruct(middle).numpy()[0], rtol=1e-5)
    assert len(sweep(vae, np.ones(5))) == 3


@pytest.mark.parametrize(
    ("prior", "posterior", "message"),
    [
        ("mixture", "diagonal", "prior='mixture'"),
        ("vamp", "diagonal", "prior='vamp'"),
        ("flow", "diagonal", "prior='flow'"),
        ("standard", "categorical", "posterior='categorical'"),
    ],
)
def test_manifold_of_a_prior_without_quantiles_is_refused(prior: str, posterior: str, message: str) -> None:
    vae = small_vae(latent_dim=4, prior=prior, posterior=posterior, n_categories=2)
    with pytest.raises(InputError, match=f"{message}.*sweep or sample"):
        manifold(vae)


def test_bad_requests_are_refused_with_what_was_wanted() -> None:
    vae, row = small_vae(latent_dim=3), np.zeros(5)
    for call, message in (
        (lambda: sample(vae, 0), "n=0"),
        (lambda: sample(vae, 2, kind="mode"), "kind 'mode'"),  # type: ignore[arg-type]
        (lambda: sample(vae, 2, seed=-1), "seed=-1"),
        (lambda: sample(3, 2), "type int"),  # type: ignore[arg-type]
        (lambda: sample_around(vae, np.zeros(4), 2), r"row of shape \(4,\), wanted one row of shape \(5,\)"),
        (lambda: sample_around(vae, np.zeros((2, 5)), 2), "one row"),
        (lambda: sample_around(vae, row, 2, scale=-1), "scale=-1"),
        (lambda: sample_around(vae, row * np.nan, 2), "NaN"),
        (lambda: interpolate(vae, row, np.zeros(6)), "end_row of shape"),
        (lambda: interpolate(vae, row, row, steps=1), "steps=1"),
        (lambda: interpolate(vae, row, row, path="curved"), "path 'curved'"),  # type: ignore[arg-type]
        (lambda: manifold(vae, latents=(0, 3)), "from 0 to 2"),
        (lambda: manifold(vae, latents=(1, 1)), "two different"),
        (lambda: manifold(small_vae(latent_dim=1)), "1 continuous latents"),
        (lambda: sweep(vae, row, latents=[3]), "latent 3, wanted numbers from 0 to 2"),
        (lambda: sweep(vae, row, values=[np.nan]), "finite"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(BundleError, match="wanted the folder of a bundle"):
        sample("nowhere", 1)


def test_requests_without_meaning_for_categories_and_points_are_refused() -> None:
    categorical = small_vae(latent_dim=4, posterior="categorical", n_categories=2)
    row = np.zeros(5)
    with pytest.raises(InputError, match="take path='linear'"):
        interpolate(categorical, row, row, path="spherical")
    with pytest.raises(InputError, match="scale=2"):
        sample_around(categorical, row, 2, scale=2)
    assert sample_around(categorical, row, 2).shape == (2, 5)
    with pytest.raises(InputError, match="posterior='deterministic'"):
        sample_around(small_vae(latent_dim=2, posterior="deterministic"), row, 2)
