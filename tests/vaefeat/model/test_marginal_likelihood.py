"""log p(x) against closed forms, sums over all categories and integrals over a grid, by code of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from vaefeat import ModelConfig
from vaefeat.errors import ConfigError, InputError
from vaefeat.model.hamiltonian import Path, Transition, adapted
from vaefeat.model.marginal_likelihood import (
    Estimate,
    annealed_importance_sampling,
    hamiltonian_estimator,
    importance_sampling,
)
from vaefeat.model.observation import RowNoise, observed
from vaefeat.model.posteriors import DiagonalGaussian
from vaefeat.model.vae import VAE

STD = 0.5
Estimator = Callable[..., Estimate]
ESTIMATORS: dict[str, Estimator] = {
    "importance": partial(importance_sampling, n_samples=400),
    "annealed_prior": partial(annealed_importance_sampling, n_temperatures=100, n_leapfrog=3),
    "annealed_posterior": partial(annealed_importance_sampling, n_temperatures=30, start="posterior"),
    "hamiltonian": partial(hamiltonian_estimator, n_draws=30, n_warmup=30),
    "hamiltonian_kernels": partial(hamiltonian_estimator, n_draws=15, n_warmup=30, density="kernels"),
}


class Linear:
    """A linear-Gaussian model: p(x) = N(0, W W^T + s^2 I), with a correlated Gaussian as the true posterior.

    Its q(z|x) is diagonal, with the true mean and marginal variances times exp(`widen`): never the true posterior.
    """

    def __init__(self, *, n_rows: int = 40, widen: float = 0.0, latent_dim: int = 2) -> None:
        torch.manual_seed(0)
        n_features = 6
        config = ModelConfig(
            network="mlp", latent_dim=latent_dim, hidden_dims=(n_features,), likelihood="gaussian", gaussian_std=STD
        )
        self.vae = VAE(config, (n_features,))
        self.weight = torch.randn(n_features, latent_dim)
        self.covariance = torch.linalg.inv(torch.eye(latent_dim) + self.weight.T @ self.weight / STD**2)
        decoder = torch.nn.Linear(latent_dim, n_features)
        self.vae.encoder = torch.nn.Identity()  # type: ignore[assignment]
        self.vae.decoder = torch.nn.Sequential(decoder, torch.nn.Unflatten(1, (1, -1)))  # type: ignore[assignment]
        with torch.no_grad():
            decoder.weight.copy_(self.weight)
            decoder.bias.zero_()
            self.parameter("mean.weight").copy_(self.covariance @ self.weight.T / STD**2)
            self.parameter("mean.bias").zero_()
            self.parameter("logvar.weight").zero_()
            self.parameter("logvar.bias").copy_(self.covariance.diagonal().log() + widen)
        self.marginal = MultivariateNormal(
            torch.zeros(n_features), self.weight @ self.weight.T + STD**2 * torch.eye(n_features)
        )
        rows = self.marginal.sample(torch.Size([n_rows]))
        self.rows: NDArray[np.float32] = rows.numpy()
        self.log_marginal: NDArray[np.float64] = self.marginal.log_prob(rows).double().numpy()

    def parameter(self, name: str) -> Tensor:
        return self.vae.posterior.get_parameter(name)

    def true_posterior(self) -> MultivariateNormal:
        mean_BL = torch.from_numpy(self.rows) @ self.weight @ self.covariance / STD**2
        return MultivariateNormal(mean_BL, self.covariance)


def elbo_of(estimate: Estimate) -> NDArray[np.float64]:
    assert estimate.elbo is not None
    return estimate.elbo


class Spy(DiagonalGaussian):
    """Counts what is drawn, and keeps it."""

    def __init__(self, model: Linear) -> None:
        super().__init__(model.vae.config, 6)
        self.load_state_dict(model.vae.posterior.state_dict())
        self.drawn: list[tuple[Tensor, Tensor]] = []

    def draw(self, h_BF: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        drawn = super().draw(h_BF, noise)
        self.drawn.append(drawn)
        return drawn


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimate_agrees_with_the_closed_form_within_its_own_error(name: str) -> None:
    model = Linear()
    estimate = ESTIMATORS[name](model.vae, model.rows)
    scores = (estimate.values - model.log_marginal) / estimate.standard_errors
    assert np.quantile(np.abs(scores), 0.9) < 2.5
    assert 0.6 < np.sqrt(np.square(scores).mean()) < 1.6
    assert abs(estimate.mean - model.log_marginal.mean()) < 4 * estimate.standard_error + 1e-5
    assert estimate.standard_errors.max() < 0.3  # small enough for all this to mean something


@pytest.mark.parametrize("name", ESTIMATORS)
def test_error_is_the_spread_over_independent_repetitions(name: str) -> None:
    model = Linear(n_rows=4)
    # Rows do not share their noise: copies of a row are repetitions.
    estimate = ESTIMATORS[name](model.vae, np.repeat(model.rows, 50, axis=0))
    values, errors = (column.reshape(4, 50) for column in (estimate.values, estimate.standard_errors))
    ratio = math.sqrt(values.var(axis=1, ddof=1).mean() / np.square(errors).mean())
    assert 1 / 1.5 < ratio < 1.5
    means = values.mean(axis=1) - model.log_marginal
    # What bias there is, is of second order in the error.
    assert np.abs(means).max() < np.square(errors).mean() + 4 * errors.mean() / math.sqrt(50)


def test_posterior_that_is_the_true_one_leaves_no_error() -> None:
    model = Linear()
    config = ModelConfig(
        network="mlp", latent_dim=2, hidden_dims=(6,), likelihood="gaussian", gaussian_std=STD, posterior="full"
    )
    vae = VAE(config, (6,))
    vae.encoder, vae.decoder = model.vae.encoder, model.vae.decoder
    factor_LL = torch.linalg.cholesky(model.covariance)
    with torch.no_grad():
        for name in ("mean", "log_diagonal", "below"):
            for parameter in vae.posterior.get_submodule(name).parameters():
                parameter.zero_()
        vae.posterior.get_parameter("mean.weight").copy_(model.parameter("mean.weight"))
        vae.posterior.get_parameter("log_diagonal.bias").copy_(2 * factor_LL.diagonal().log())
        vae.posterior.get_parameter("below.bias").fill_(factor_LL[1, 0])
    # p(x|z) p(z) / q(z|x) = p(x) for every z: one sample is exact.
    one, seven = (importance_sampling(vae, model.rows, n_samples=k) for k in (1, 7))
    np.testing.assert_allclose(one.values, model.log_marginal, atol=3e-5)
    np.testing.assert_allclose(elbo_of(seven), model.log_marginal, atol=3e-5)
    np.testing.assert_allclose(seven.standard_errors, 0, atol=3e-5)
    np.testing.assert_allclose(seven.effective_samples, 7, rtol=1e-6)
    assert np.isnan(one.standard_errors).all()


def test_values_errors_and_bound_are_those_of_all_weights_at_once() -> None:
    model = Linear(widen=6.0)  # weights that differ by hundreds of nats
    spy = model.vae.posterior = Spy(model)
    estimate = importance_sampling(model.vae, model.rows, n_samples=97, samples_per_chunk=10)
    z_SBL = torch.cat([z for z, _ in spy.drawn]).double()
    mean_BF = z_SBL @ model.weight.T.double()
    log_likelihood_SB = torch.distributions.Normal(mean_BF, STD).log_prob(torch.from_numpy(model.rows)).sum(dim=-1)
    log_prior_SB = torch.distributions.Normal(0, 1).log_prob(z_SBL).sum(dim=-1)
    log_weight_SB = (log_likelihood_SB + log_prior_SB - torch.cat([q for _, q in spy.drawn])).numpy()
    assert np.ptp(log_weight_SB, axis=0).min() > 100
    weight_SB = np.exp(log_weight_SB - log_weight_SB.max(axis=0))
    np.testing.assert_allclose(
        estimate.values, log_weight_SB.max(axis=0) + np.log(weight_SB.mean(axis=0)), rtol=1e-5, atol=1e-3
    )
    np.testing.assert_allclose(
        estimate.standard_errors,
        weight_SB.std(axis=0, ddof=1) / math.sqrt(97) / weight_SB.mean(axis=0),
        rtol=1e-3,
    )
    effective = weight_SB.sum(axis=0) ** 2 / np.square(weight_SB).sum(axis=0)
    np.testing.assert_allclose(estimate.effective_samples, effective, rtol=1e-3)
    np.testing.assert_allclose(elbo_of(estimate), log_weight_SB.mean(axis=0), rtol=1e-5)


def test_exactly_as_many_samples_are_drawn_as_were_asked_for_and_rows_are_encoded_once() -> None:
    model = Linear(n_rows=7)
    spy = model.vae.posterior = Spy(model)
    encoded: list[int] = []
    model.vae.encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(output)))
    importance_sampling(model.vae, model.rows, n_samples=5000, samples_per_chunk=300, batch_size=4)
    assert [len(z) for z, _ in spy.drawn] == 2 * ([300] * 16 + [200])
    assert encoded == [4, 3]
    z_SBL = torch.cat([z for z, _ in spy.drawn if z.shape[1] == 4])
    assert len(z_SBL.flatten().unique()) > 0.99 * z_SBL.numel()  # all of them different


@pytest.mark.parametrize("settings", [{"samples_per_chunk": 7}, {"samples_per_chunk": 1000}, {"batch_size": 3}])
def test_sizes_of_chunks_and_batches_do_not_change_importance_sampling(settings: dict[str, Any]) -> None:
    model = Linear(n_rows=8, widen=1.0)
    wanted = importance_sampling(model.vae, model.rows, n_samples=600)
    got = importance_sampling(model.vae, model.rows, n_samples=600, **settings)
    for column in ("values", "standard_errors", "effective_samples", "elbo"):
        np.testing.assert_allclose(getattr(got, column), getattr(wanted, column), rtol=2e-5)


@pytest.mark.parametrize("name", ["importance", "annealed_prior", "annealed_posterior", "hamiltonian"])
def test_rows_taken_part_by_part_get_the_values_that_they_have_together(name: str) -> None:
    model = Linear(n_rows=9)
    estimator = ESTIMATORS[name]
    settings: dict[str, int] = {} if name == "importance" else {"n_chains": 3, "n_leapfrog": 2, "batch_size": 4}
    if name == "hamiltonian":
        settings |= {"n_draws": 4, "n_warmup": 8}
    elif name != "importance":
        settings |= {"n_temperatures": 8}
    together = estimator(model.vae, model.rows, **settings)
    parts = [
        estimator(model.vae, model.rows[start : start + 2], first_row=start, **settings) for start in range(0, 9, 2)
    ]
    joined = Estimate.joined(parts)
    # Trajectories make the most of rounding.
    np.testing.assert_allclose(joined.values, together.values, atol=2e-3)
    other = estimator(model.vae, model.rows, seed=1, **settings)
    assert np.abs(other.values - together.values).min() > 0


def test_importance_sampling_rises_to_the_marginal_likelihood_with_its_samples() -> None:
    model = Linear(n_rows=4, widen=2.0)
    rows = np.repeat(model.rows, 100, axis=0)
    estimates = [importance_sampling(model.vae, rows, n_samples=k) for k in (1, 8, 64, 512)]
    means = [estimate.mean - model.log_marginal.mean() for estimate in estimates]
    assert means[0] < means[1] - 0.3 < means[2] - 0.3
    assert means[2] < means[3] < 4 * estimates[3].standard_error
    for estimate in estimates[1:]:
        assert (estimate.values > elbo_of(estimate)).all()


def test_hamiltonian_estimator_errs_upwards() -> None:
    model = Linear(n_rows=2)
    rows = np.repeat(model.rows, 300, axis=0)
    estimate = hamiltonian_estimator(
        model.vae, rows, density="kernels", n_chains=4, n_draws=2, n_warmup=15, batch_size=600
    )
    errors = estimate.values - np.repeat(model.log_marginal, 300)
    assert errors.mean() > 4 * errors.std() / math.sqrt(len(errors))


def test_elbo_is_short_of_the_marginal_likelihood_by_the_divergence_to_the_true_posterior() -> None:
    model = Linear(widen=0.5)
    estimate = importance_sampling(model.vae, model.rows, n_samples=4000)
    with torch.no_grad():
        q = model.vae.encode(torch.from_numpy(model.rows))
    diagonal = MultivariateNormal(q.mean, torch.diag_embed(q.variance))
    gap = kl_divergence(diagonal, model.true_posterior()).numpy()
    np.testing.assert_allclose(elbo_of(estimate), model.log_marginal - gap, atol=0.15)


def test_errors_of_the_mean_are_those_of_independent_rows() -> None:
    estimate = Estimate(np.array([1.0, 2.0, 6.0]), np.array([0.3, 0.4, 1.2]), np.ones(3))
    assert estimate.mean == 3
    assert estimate.standard_error == pytest.approx(1.3 / 3)
    assert estimate.sampling_error == pytest.approx(math.sqrt(7 / 3))


def test_annealing_does_not_need_a_posterior_density() -> None:
    model = Linear(n_rows=10)
    config = ModelConfig(
        network="mlp",
        latent_dim=2,
        hidden_dims=(6,),
        likelihood="gaussian",
        gaussian_std=STD,
        posterior="deterministic",
    )
    vae = VAE(config, (6,))
    vae.decoder = model.vae.decoder
    estimate = ESTIMATORS["annealed_prior"](vae, model.rows)
    assert abs(estimate.mean - model.log_marginal.mean()) < 4 * estimate.standard_error + 1e-4


def of_grid(vae: VAE, rows: NDArray[Any]) -> NDArray[np.float64]:
    """Integrate p(x|z) p(z) over two latents."""
    side = torch.linspace(-7, 7, 281)
    z_NL = torch.cartesian_prod(side, side)
    with torch.no_grad():
        log_prior_N = vae.prior_distribution().log_prob(z_NL)
        x = vae.preprocessing(torch.from_numpy(rows))
        log_likelihood_NB = vae.log_likelihood(x, z_NL[:, None].expand(-1, len(x), -1))
        cell = 2 * math.log(14 / 280)
        log_marginal: NDArray[np.float64] = torch.logsumexp(
            (log_likelihood_NB + log_prior_N[:, None]).double(), dim=0
        ).numpy()
    return log_marginal + cell


@pytest.mark.parametrize(
    ("posterior", "prior"),
    [
        ("diagonal", "standard"),
        ("full", "vamp"),
        ("planar", "learned"),
        ("iaf", "mixture"),
        ("iaf", "flow"),
        ("diagonal", "vamp"),
    ],
)
def test_every_posterior_and_prior_agrees_with_an_integral_over_a_grid(posterior: str, prior: str) -> None:
    torch.manual_seed(1)
    rows = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    config = ModelConfig(
        posterior=posterior, prior=prior, latent_dim=2, hidden_dims=(16,), prior_components=3, flow_hidden_dim=16
    )
    vae = VAE.for_rows(config, rows)
    if posterior in {"planar", "iaf"}:
        # Flows begin by narrowing, and weights of a posterior that is narrower than the true one have no variance.
        vae.posterior.get_parameter("logvar.bias").data.add_(2)
    wanted = of_grid(vae, rows)
    weighed = importance_sampling(vae, rows, n_samples=5000)
    annealed = annealed_importance_sampling(vae, rows, n_temperatures=15, n_leapfrog=2)
    drawn = hamiltonian_estimator(vae, rows, n_draws=10, n_warmup=15, n_leapfrog=3)
    for estimate in (weighed, annealed, drawn):
        assert (np.abs(estimate.values - wanted) < 5 * estimate.standard_errors + 1e-4).all()
        assert estimate.standard_errors.max() < 0.3


@pytest.mark.parametrize(("posterior", "n_continuous"), [("categorical", 0), ("joint", 1)])
def test_categorical_latents_agree_with_a_sum_over_their_values(posterior: str, n_continuous: int) -> None:
    torch.manual_seed(1)
    rows = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    config = ModelConfig(
        posterior=posterior, latent_dim=6 + n_continuous, n_categories=3, n_categorical=2, hidden_dims=(16,)
    )
    vae = VAE.for_rows(config, rows)
    first, second = (index.flatten() for index in torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"))
    onehot = torch.cat([torch.eye(3)[first], torch.eye(3)[second]], dim=1)
    with torch.no_grad():
        x = vae.preprocessing(torch.from_numpy(rows))
        line, weight = torch.zeros(1, 0), torch.zeros(1)
        if n_continuous:
            line = torch.linspace(-7, 7, 701)[:, None]
            weight = torch.distributions.Normal(0, 1).log_prob(line[:, 0]) + math.log(14 / 700)
        z_NL = torch.cat([line.repeat_interleave(9, dim=0), onehot.repeat(len(line), 1)], dim=1)
        log_prior_N = weight.repeat_interleave(9) - 2 * math.log(3)
        log_joint_NB = vae.log_likelihood(x, z_NL[:, None].expand(-1, len(x), -1)) + log_prior_N[:, None]
        wanted = torch.logsumexp(log_joint_NB.double(), dim=0).numpy()
    estimate = importance_sampling(vae, rows, n_samples=10_000)
    assert (np.abs(estimate.values - wanted) < 5 * estimate.standard_errors + 1e-5).all()
    assert estimate.standard_errors.max() < 0.05
    for refused in (annealed_importance_sampling, hamiltonian_estimator):
        with pytest.raises(ConfigError, match=f"posterior='{posterior}'.*importance_sampling"):
            refused(vae, rows)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
def test_transitions_draw_from_the_density_at_their_temperature(temperature: float) -> None:
    model = Linear(n_rows=2)
    x, ones = torch.from_numpy(model.rows), torch.ones(2, 2)
    with torch.no_grad():
        prior = model.vae.prior_distribution()
        path = Path(model.vae, x, prior, None, start_spread=ones, end_spread=0.3 * ones)
        transition = Transition(path, 4, RowNoise([1, 2], 3, torch.device("cpu")))
        state, step_B, draws = path.state(torch.zeros(300, 2, 2)), torch.full((2,), 0.5), []
        acceptances = []
        for count in range(90):
            state, acceptance_B = transition(state, temperature, step_B)
            if count < 40:
                step_B = adapted(step_B, acceptance_B, rate=(count + 1) ** -0.6)
            else:
                draws.append(state.z_CBL)
                acceptances.append(acceptance_B)
    z_SBL = torch.cat(draws)
    covariance = torch.linalg.inv(torch.eye(2) + temperature * model.weight.T @ model.weight / STD**2)
    mean_BL = temperature * x @ model.weight @ covariance / STD**2
    spread = covariance.diagonal().sqrt()
    assert ((z_SBL.mean(dim=0) - mean_BL).abs() / spread).max() < 0.07
    for row in range(2):
        assert ((torch.cov(z_SBL[:, row].T) - covariance).abs() / torch.outer(spread, spread)).max() < 0.07
    assert 0.5 < torch.stack(acceptances).mean() < 0.8
    # What is kept beside the latents is what belongs to them.
    torch.testing.assert_close(state.gain_CB, path.state(state.z_CBL).gain_CB)


def test_estimators_leave_generator_mode_and_weights_as_they_were() -> None:
    model = Linear()
    vae, rows = model.vae, model.rows
    vae.train()
    state = torch.get_rng_state()
    importance_sampling(vae, rows[:3], n_samples=2)
    annealed_importance_sampling(vae, rows[:3], n_temperatures=3)
    hamiltonian_estimator(vae, rows[:3], n_draws=2, n_warmup=2)
    assert torch.equal(state, torch.get_rng_state())
    assert vae.training
    assert all(parameter.grad is None for parameter in vae.parameters())


@pytest.mark.parametrize(
    "estimator",
    [
        partial(importance_sampling, n_samples=2),
        partial(annealed_importance_sampling, n_temperatures=2),
        partial(hamiltonian_estimator, n_draws=2, n_warmup=1),
    ],
)
def test_progress_counts_the_rows_that_are_done(estimator: Estimator) -> None:
    model = Linear()
    vae, rows = model.vae, model.rows
    seen: list[tuple[int, int]] = []
    estimator(vae, rows[:7], batch_size=3, on_rows=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_auto_encoder_is_refused_where_weights_need_a_density() -> None:
    vae = VAE(ModelConfig(latent_dim=2, posterior="deterministic"), (4,))
    with pytest.raises(ConfigError, match=r"posterior='deterministic'.*annealed_importance_sampling"):
        importance_sampling(vae, np.zeros((3, 4), np.float32))


@pytest.mark.parametrize("posterior", ["planar", "iaf", "deterministic"])
def test_start_at_a_posterior_without_a_known_density_is_refused(posterior: str) -> None:
    vae = VAE(ModelConfig(latent_dim=2, posterior=posterior), (4,))
    with pytest.raises(ConfigError, match=f"start='posterior' with posterior='{posterior}'.*start='prior'"):
        annealed_importance_sampling(vae, np.zeros((3, 4), np.float32), start="posterior")


@pytest.mark.parametrize(
    ("estimator", "settings", "message"),
    [
        (importance_sampling, {"n_samples": 0}, "n_samples=0"),
        (importance_sampling, {"samples_per_chunk": 0}, "samples_per_chunk=0"),
        (importance_sampling, {"batch_size": 0}, "batch_size=0"),
        (annealed_importance_sampling, {"n_temperatures": 0}, "n_temperatures=0"),
        (annealed_importance_sampling, {"start": "prioor"}, "did you mean 'prior'"),
        (annealed_importance_sampling, {"step_size": 0.0}, "step_size=0"),
        (hamiltonian_estimator, {"n_chains": 0}, "n_chains=0"),
        (hamiltonian_estimator, {"density": "gauss"}, "did you mean 'gaussian'"),
    ],
)
def test_impossible_setting_is_refused_by_name(estimator: Estimator, settings: dict[str, Any], message: str) -> None:
    model = Linear(n_rows=2)
    with pytest.raises(InputError, match=message):
        estimator(model.vae, model.rows, **settings)


def test_row_without_a_finite_likelihood_is_named() -> None:
    model = Linear(n_rows=8)
    model.rows[5, 2] = np.nan
    with pytest.raises(InputError, match="nan for row 15"):
        importance_sampling(model.vae, model.rows, n_samples=10, batch_size=3, first_row=10)


def test_no_rows_are_refused() -> None:
    model = Linear(n_rows=2)
    with pytest.raises(InputError, match="no rows"):
        list(observed(model.vae, model.rows[:0], batch_size=2, seed=0))
