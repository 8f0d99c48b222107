"""Bounds and other objectives against routes that do not share their code."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from vaefeat import ModelConfig, TrainConfig
from vaefeat.model.divergences import maximum_mean_discrepancy, sliced_wasserstein
from vaefeat.model.evaluation import active_units, evaluate, importance_weighted_bound
from vaefeat.model.objectives import ELBO, IWAE, OBJECTIVES, Reconstruction, Terms
from vaefeat.model.posteriors import POSTERIORS
from vaefeat.model.priors import PRIORS
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


def model(**settings: Any) -> VAE:
    """Make a small VAE for rows of five values."""
    torch.manual_seed(0)
    small = {"latent_dim": 3, "hidden_dims": (8,), "flow_hidden_dim": 8, "prior_components": 4, "n_categories": 3}
    return VAE(ModelConfig(**{**small, **settings}), (5,))


def rows_of(n: int) -> Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(7))


def measure(vae: VAE, rows: Tensor, *, kl_weight: float = 1.0, seed: int = 1, **settings: Any) -> Terms:
    """Estimate an objective's terms with noise that depends on `seed` alone."""
    config = TrainConfig(**settings)
    torch.manual_seed(seed)
    return OBJECTIVES[config.objective](config)(vae, rows, kl_weight=kl_weight)


def gradients(vae: VAE, objective_B: Tensor) -> dict[str, Tensor]:
    """Give the gradient of the mean objective with respect to every weight."""
    names, weights = zip(*((name, w) for name, w in vae.named_parameters() if w.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad(objective_B.mean(), weights, materialize_grads=True), strict=True))


WIDTHS = {"categorical": 6, "joint": 5}


@pytest.mark.parametrize(
    ("posterior", "prior", "objective"),
    [
        *((posterior, "standard", "elbo") for posterior in POSTERIORS if posterior != "deterministic"),
        *(("diagonal", prior, "elbo") for prior in PRIORS),
        *(("diagonal", prior, "iwae") for prior in PRIORS),
        *((posterior, "standard", "iwae") for posterior in ("full", "planar", "iaf", "categorical", "joint")),
        *((posterior, "standard", "mmd") for posterior in ("diagonal", "iaf", "deterministic", "categorical")),
        *(("full", prior, "infovae") for prior in PRIORS),
        ("iaf", "flow", "elbo"),
        ("planar", "mixture", "iwae"),
        ("full", "vamp", "iwae"),
        ("deterministic", "standard", "sliced_wasserstein"),
        ("deterministic", "standard", "reconstruction"),
    ],
)
def test_every_combination_gives_finite_terms_and_gradients_to_every_weight(
    posterior: str, prior: str, objective: str
) -> None:
    vae, rows = model(posterior=posterior, prior=prior, latent_dim=WIDTHS.get(posterior, 3)), rows_of(32)
    if prior == "vamp":
        vae.prior.start(rows)
    terms = measure(vae, rows, objective=objective, n_samples=3)
    assert all(term.shape == (32,) and term.isfinite().all() for term in terms)
    found = gradients(vae, terms.objective)
    assert [name for name, gradient in found.items() if not gradient.any() or not gradient.isfinite().all()] == []


def test_gradients_reach_every_weight_of_convolutions() -> None:
    torch.manual_seed(0)
    vae = VAE(ModelConfig(latent_dim=3, hidden_dims=(8,), likelihood="gaussian", channels=(4,)), (1, 8, 8))
    found = gradients(vae, BOUND(vae, torch.rand(16, 1, 8, 8), kl_weight=1.0).objective)
    assert [name for name, gradient in found.items() if not gradient.any()] == []


@pytest.mark.parametrize("posterior", ["diagonal", "full", "planar", "iaf", "joint"])
def test_iwae_of_one_sample_is_the_sampled_elbo(posterior: str) -> None:
    vae, rows = model(posterior=posterior, latent_dim=WIDTHS.get(posterior, 3)), rows_of(16)
    weighted = measure(vae, rows, objective="iwae", gradient="reparameterized")
    bound = measure(vae, rows, kl_estimator="sampled")
    for ours, theirs in zip(weighted, bound, strict=True):
        torch.testing.assert_close(ours, theirs)
    expected = gradients(vae, bound.objective)
    for name, gradient in gradients(vae, weighted.objective).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gradient", ["reparameterized", "doubly_reparameterized"])
def test_iwae_is_the_logarithm_of_the_mean_weight(gradient: str) -> None:
    vae, rows = model(), rows_of(4)
    got = measure(vae, rows, objective="iwae", n_samples=6, gradient=gradient, kl_weight=0.5).objective
    torch.manual_seed(1)
    q, p = vae.encode(rows), vae.prior_distribution()
    z_SBL = q.rsample(torch.Size([6]))
    weights_SB = torch.stack([vae.decode(z).log_prob(rows) for z in z_SBL]).double()
    weights_SB = weights_SB + 0.5 * (p.log_prob(z_SBL) - q.log_prob(z_SBL))
    torch.testing.assert_close(got.double(), weights_SB.exp().mean(dim=0).log())


def test_iwae_grows_with_its_samples_towards_the_marginal_likelihood(linear: tuple[VAE, np.ndarray, Tensor]) -> None:
    vae, rows, log_marginal = linear
    with torch.no_grad():
        vae.posterior.get_parameter("logvar.bias").add_(1.0)  # a posterior that is too wide
        means, errors = [], []
        for k in (1, 4, 16, 64):
            settings: dict[str, Any] = {"objective": "iwae", "n_samples": k}
            values = torch.stack(
                [measure(vae, torch.from_numpy(rows), seed=i, **settings).objective.mean() for i in range(100)]
            )
            means.append(values.mean().item())
            errors.append(values.std().item() / math.sqrt(len(values)))
    exact = log_marginal.mean().item()
    for i in range(3):
        assert means[i + 1] - means[i] > 4 * math.hypot(errors[i], errors[i + 1])
    assert means[-1] < exact + 4 * errors[-1]
    assert exact - means[-1] < 0.1 < exact - means[0]


@pytest.mark.parametrize("posterior", ["diagonal", "full", "categorical", "joint"])
def test_estimator_a_equals_b_in_the_mean_and_in_its_gradient(posterior: str) -> None:
    vae = model(posterior=posterior, latent_dim=WIDTHS.get(posterior, 3)).eval()
    one = rows_of(1)
    rows = one.expand(20_000, 5)
    sampled = measure(vae, rows, kl_estimator="sampled")
    closed = measure(vae, one)
    standard_error = sampled.kl.std().item() / math.sqrt(len(rows))
    assert sampled.kl.mean().item() == pytest.approx(closed.kl.item(), abs=5 * standard_error)
    assert standard_error > 0
    # The same samples are decoded, so the log-likelihood does not differ at all.
    torch.testing.assert_close(sampled.log_likelihood, measure(vae, rows).log_likelihood)


def test_gradient_of_estimator_a_equals_that_of_b_in_the_mean() -> None:
    vae, rows = model(), rows_of(1).expand(200_000, 5)
    theirs = gradients(vae, measure(vae, rows[:1]).kl)
    for name, gradient in gradients(vae, measure(vae, rows, kl_estimator="sampled").kl).items():
        torch.testing.assert_close(gradient, theirs[name], atol=0.02, rtol=0.02)


@pytest.mark.parametrize("kl_estimator", ["sampled", "analytic"])
def test_more_samples_lower_the_variance_as_their_number(kl_estimator: str) -> None:
    vae, rows = model(), rows_of(1).expand(4000, 5)
    one, many = (measure(vae, rows, n_samples=n, kl_estimator=kl_estimator).objective.var().item() for n in (1, 16))
    assert one / many == pytest.approx(16, rel=0.25)


@pytest.fixture
def two_latents() -> tuple[VAE, Tensor]:
    """Make a posterior, the same for all rows, with a KL of 0.02 nats in one latent and of 2 in the other.

    The decoder ignores the latents, so that every gradient comes from the KL term.
    """
    vae = model(latent_dim=2)
    with torch.no_grad():
        for name in ("mean.weight", "logvar.weight", "logvar.bias"):
            vae.posterior.get_parameter(name).zero_()
        vae.posterior.get_parameter("mean.bias").copy_(torch.tensor([0.2, 2.0]))
        for weight in vae.decoder.parameters():
            weight.zero_()
    return vae, rows_of(16)


def test_free_bits_of_a_latent_below_them_cost_their_floor_and_have_no_gradient(
    two_latents: tuple[VAE, Tensor],
) -> None:
    vae, rows = two_latents
    terms = measure(vae, rows, free_bits=0.5, kl_weight=0.8)
    torch.testing.assert_close(terms.kl, torch.full((16,), 2.02))  # reported as it is
    torch.testing.assert_close(terms.objective, terms.log_likelihood - 0.8 * (0.5 + 2.0))
    gradient = gradients(vae, terms.objective)["posterior.mean.bias"]
    torch.testing.assert_close(gradient, torch.tensor([0.0, -0.8 * 2.0]))


def test_free_bits_below_every_latents_kl_leave_the_bound_as_it_is(two_latents: tuple[VAE, Tensor]) -> None:
    vae, rows = two_latents
    free, bound = measure(vae, rows, free_bits=0.01), measure(vae, rows)
    torch.testing.assert_close(free.objective, bound.objective)
    ours, theirs = gradients(vae, free.objective), gradients(vae, bound.objective)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


def test_free_bits_are_of_the_minibatch_and_not_of_a_row() -> None:
    vae, rows = model(latent_dim=1), rows_of(2)
    with torch.no_grad():
        vae.posterior.get_parameter("logvar.weight").zero_()
        vae.posterior.get_parameter("logvar.bias").zero_()
    per_row = measure(vae, rows).kl
    between = per_row.mean().item()
    assert per_row.min().item() < 0.99 * between
    below, above = (measure(vae, rows, free_bits=share * between) for share in (0.99, 1.01))
    assert (below.log_likelihood - below.objective).mean().item() == pytest.approx(between, rel=1e-5)
    assert (above.log_likelihood - above.objective).mean().item() == pytest.approx(1.01 * between, rel=1e-5)


@pytest.mark.parametrize(("objective", "kl_weight"), [("mmd", 1.0), ("mmd", 0.3), ("sliced_wasserstein", 0.3)])
def test_wasserstein_auto_encoders_put_the_weighted_divergence_in_the_kls_place(
    objective: str, kl_weight: float
) -> None:
    vae, rows = model(), rows_of(16)
    settings: dict[str, Any] = {"objective": objective, "divergence_weight": 7.0, "n_samples": 2}
    terms = measure(vae, rows, kl_weight=kl_weight, **settings)
    torch.manual_seed(1)
    z_SBL, prior = vae.encode(rows).rsample(torch.Size([2])), torch.randn(32, 3)
    z = z_SBL.reshape(32, 3)
    wanted = (
        maximum_mean_discrepancy(z, prior) if objective == "mmd" else sliced_wasserstein(z, prior, n_projections=50)
    )
    cost = terms.log_likelihood - terms.objective
    torch.testing.assert_close(cost, (kl_weight * 7.0 * wanted).expand(16), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(terms.kl, measure(vae, rows).kl)  # for the record
    assert wanted > 1e-3


def test_infovae_has_the_kl_and_the_divergence_of_its_paper() -> None:
    vae, rows = model(), rows_of(16)
    alpha, scaling = 0.7, 5.0
    weights: dict[str, Any] = {"kl_weight": 1 - alpha, "divergence_weight": alpha + scaling - 1}
    terms = measure(vae, rows, objective="infovae", **weights)
    torch.manual_seed(1)
    z, prior = vae.encode(rows).rsample(), torch.randn(16, 3)
    mu, logvar = vae.posterior.statistics(vae.hidden(rows))
    kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(dim=1)
    # Zhao et al. 2019, equation 6.
    wanted = terms.log_likelihood - (1 - alpha) * kl - (alpha + scaling - 1) * maximum_mean_discrepancy(z, prior)
    torch.testing.assert_close(terms.objective, wanted)
    torch.testing.assert_close(terms.kl, kl)


def test_reconstruction_of_a_point_has_no_noise_and_is_the_squared_error() -> None:
    vae, rows = model(posterior="deterministic", gaussian_std=1.0), rows_of(16)
    objective = Reconstruction(TrainConfig(objective="reconstruction"))
    first, second = (objective(vae, rows, kl_weight=weight) for weight in (1.0, 0.0))
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)
    squared = (rows - vae.decoder(vae.posterior.statistics(vae.hidden(rows))[0]).squeeze(1)).square().sum(dim=1)
    torch.testing.assert_close(first.objective, -0.5 * squared - 2.5 * math.log(2 * math.pi))
    assert not first.kl.any()


def test_bound_of_binarized_rows_looks_at_new_coins_each_time() -> None:
    vae, rows = model(binarize=True), torch.full((8, 5), 0.5)
    seen = []
    vae.encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    for _ in range(2):
        BOUND(vae, rows, kl_weight=1.0)
    assert set(torch.stack(seen).unique().tolist()) == {0.0, 1.0}
    assert (seen[0] != seen[1]).any()


def test_iwae_without_gradients_can_be_evaluated() -> None:
    vae = model()
    with torch.no_grad():
        terms = IWAE(TrainConfig(objective="iwae", n_samples=4))(vae, rows_of(6), kl_weight=1.0)
    assert not terms.objective.requires_grad


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
