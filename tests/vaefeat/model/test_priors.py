"""Priors on a grid and against explicit sums, and every KL divergence in closed form against two other routes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, MultivariateNormal, Normal, kl_divergence

from vaefeat import ModelConfig
from vaefeat.model.distributions import Joint, OneHot, factors
from vaefeat.model.posteriors import POSTERIORS
from vaefeat.model.priors import PRIORS, FlowPrior, LearnedNormal, MixtureOfNormals, Prior, VampPrior
from vaefeat.model.vae import VAE

SMALL: dict[str, Any] = {"prior_components": 3, "prior_flows": 2, "flow_hidden_dim": 8}


def shaken(prior: Prior) -> Prior:
    """Move every weight from where it starts, in float64."""
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return prior.double()


def encode(x: Tensor) -> Distribution:
    """Stand in for a trained encoder: a correlated posterior around the first two values of a row."""
    factor = torch.tensor([[0.6, 0.0], [0.5, 0.4]], dtype=x.dtype)
    return MultivariateNormal(x[:, :2], scale_tril=factor.expand(len(x), 2, 2))


def distribution(name: str, latent_dim: int = 2) -> Distribution:
    """Give a prior with random weights."""
    torch.manual_seed(0)
    prior = shaken(PRIORS[name](ModelConfig(latent_dim=latent_dim, prior=name, **SMALL), (4,)))
    p: Distribution = prior(encode)
    return p


@torch.no_grad()
@pytest.mark.parametrize("name", ["standard", "learned", "mixture", "vamp", "flow"])
def test_two_latents_prior_integrates_to_one_and_its_samples_have_its_moments(name: str) -> None:
    p = distribution(name)
    line = torch.linspace(-15, 15, 751, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    mass = p.log_prob(grid).exp() * (30 / 750) ** 2
    assert mass.sum().item() == pytest.approx(1, abs=1e-3)
    n_samples = 20_000
    torch.manual_seed(1)
    samples = p.sample(torch.Size([n_samples]))
    assert samples.shape == (n_samples, 2)

    def moments(z: Tensor) -> Tensor:
        return torch.stack([z[:, 0], z[:, 1], z[:, 0] ** 2, z[:, 1] ** 2, z[:, 0] * z[:, 1]], dim=1)

    wanted = (mass[:, None] * moments(grid)).sum(dim=0)
    got = moments(samples.double())
    assert ((got.mean(dim=0) - wanted).abs() < 5 * got.std(dim=0) / math.sqrt(n_samples) + 1e-3).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["standard", "learned", "mixture", "flow"])
def test_one_latents_prior_integrates_to_one(name: str) -> None:
    line = torch.linspace(-20, 20, 20_001, dtype=torch.float64)
    density = distribution(name, latent_dim=1).log_prob(line[:, None]).exp()
    assert torch.trapezoid(density, line).item() == pytest.approx(1, abs=1e-4)


def test_mixture_equals_the_explicit_sum_of_its_components() -> None:
    torch.manual_seed(0)
    prior = shaken(MixtureOfNormals(ModelConfig(latent_dim=3, prior="mixture", prior_components=4), (2,)))
    assert isinstance(prior, MixtureOfNormals)
    z = torch.randn(5, 7, 3, dtype=torch.float64)
    covariances = torch.diag_embed((2 * prior.log_scales).exp())
    densities = MultivariateNormal(prior.locations, covariances).log_prob(z.unsqueeze(-2))
    wanted = torch.logsumexp(prior.logits.log_softmax(dim=0) + densities, dim=-1)
    torch.testing.assert_close(prior(encode).log_prob(z), wanted)


def test_fresh_mixture_has_components_that_differ() -> None:
    torch.manual_seed(0)
    prior = MixtureOfNormals(ModelConfig(latent_dim=3, prior="mixture"), (2,))
    assert torch.pdist(prior.locations).min() > 0.01


def test_vamp_prior_equals_the_explicit_sum_of_posteriors_at_its_pseudo_inputs() -> None:
    torch.manual_seed(0)
    for posterior in ("diagonal", "full"):
        config = ModelConfig(latent_dim=3, prior="vamp", posterior=posterior, prior_components=4, hidden_dims=(8,))
        vae = VAE(config, (6,))
        assert isinstance(vae.prior, VampPrior)
        nn.init.normal_(vae.prior.pseudo_inputs)
        nn.init.normal_(vae.prior.logits)
        z = torch.randn(5, 7, 3)
        densities = torch.stack(
            [vae.encode(vae.prior.pseudo_inputs[i : i + 1]).log_prob(z.flatten(0, 1)) for i in range(4)], dim=-1
        )
        wanted = torch.logsumexp(vae.prior.logits.log_softmax(dim=0) + densities, dim=-1).view(5, 7)
        torch.testing.assert_close(vae.prior_distribution().log_prob(z), wanted, rtol=1e-4, atol=1e-4)


def test_vamp_prior_starts_at_scaled_training_rows_spread_over_all() -> None:
    rows = np.arange(40, dtype=np.float32)[:, None] * np.ones((1, 3), dtype=np.float32)
    vae = VAE.for_rows(ModelConfig(latent_dim=2, prior="vamp", prior_components=4), rows)
    assert isinstance(vae.prior, VampPrior)
    wanted = vae.preprocessing(torch.from_numpy(rows[::10]))
    torch.testing.assert_close(vae.prior.pseudo_inputs.detach(), wanted)


def test_vamp_prior_of_more_components_than_rows_repeats_them() -> None:
    rows = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    vae = VAE.for_rows(ModelConfig(latent_dim=2, prior="vamp", prior_components=7), rows)
    assert isinstance(vae.prior, VampPrior)
    scaled = vae.preprocessing(torch.from_numpy(rows))
    torch.testing.assert_close(vae.prior.pseudo_inputs.detach(), scaled[[0, 1, 2, 0, 1, 2, 0]])


@pytest.mark.parametrize("latent_dim", [1, 2, 5])
def test_flow_priors_density_is_that_of_the_noise_times_autograds_jacobian(latent_dim: int) -> None:
    torch.manual_seed(0)
    prior = shaken(FlowPrior(ModelConfig(latent_dim=latent_dim, prior="flow", **SMALL), (4,)))
    p = prior(encode)
    z = torch.randn(latent_dim, dtype=torch.float64)

    def noise(value: Tensor) -> Tensor:
        for step in prior.get_submodule("steps"):  # type: ignore[attr-defined]
            log_gate, shift = step(value, None)
            value = log_gate.exp() * value + (1 - log_gate.exp()) * shift
        return value

    matrix = torch.autograd.functional.jacobian(noise, z)
    base = Normal(prior.get_parameter("location"), prior.get_parameter("log_scale").exp())
    wanted = base.log_prob(noise(z)).sum() + torch.linalg.slogdet(matrix).logabsdet
    torch.testing.assert_close(p.log_prob(z), wanted)


def test_flow_prior_learns_a_correlation_that_a_learned_gaussian_cannot() -> None:
    torch.manual_seed(0)
    correlation = 0.9
    entropy = math.log(2 * math.pi * math.e) + 0.5 * math.log(1 - correlation**2)
    source = MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, correlation], [correlation, 1.0]]))
    gaps = {}
    for name in ("flow", "learned"):
        prior = PRIORS[name](ModelConfig(latent_dim=2, prior=name, prior_flows=2, flow_hidden_dim=16), (1,))
        optimizer = torch.optim.Adam(prior.parameters(), lr=0.02)
        for _ in range(300):
            optimizer.zero_grad()
            loss: Tensor = -prior(encode).log_prob(source.sample(torch.Size([128]))).mean()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            rows = source.sample(torch.Size([20_000]))
            gaps[name] = (source.log_prob(rows) - prior(encode).log_prob(rows)).mean().item()
    assert gaps["flow"] < 0.05
    # The best product of independent Gaussians misses all of the mutual information.
    assert gaps["learned"] == pytest.approx(math.log(2 * math.pi * math.e) - entropy, abs=0.05)


@pytest.mark.parametrize(("posterior", "latent_dim", "n_variables"), [("categorical", 8, 2), ("joint", 11, 2)])
def test_standard_prior_is_uniform_over_categories(posterior: str, latent_dim: int, n_variables: int) -> None:
    config = ModelConfig(latent_dim=latent_dim, posterior=posterior, n_categories=4, n_categorical=2)
    p = PRIORS["standard"](config, (4,))(encode)
    z = p.sample(torch.Size([6]))
    assert z.shape == (6, latent_dim)
    n_continuous = latent_dim - 4 * n_variables
    assert (z[:, n_continuous:].unflatten(-1, (n_variables, 4)).sum(dim=-1) == 1).all()
    wanted = Normal(0.0, 1.0).log_prob(z[:, :n_continuous]).sum(dim=-1) - n_variables * math.log(4)
    torch.testing.assert_close(p.log_prob(z), wanted)


# --- KL divergences in closed form -----------------------------------------------------------------------------------


def gaussian(name: str) -> Distribution:
    torch.manual_seed(0)
    posterior = POSTERIORS[name](ModelConfig(posterior=name, latent_dim=3), 5)
    for parameter in posterior.parameters():
        nn.init.normal_(parameter, std=0.4)
    q: Distribution = posterior.double()(torch.randn(4, 5, dtype=torch.float64))
    return q


def learned(latent_dim: int) -> Distribution:
    torch.manual_seed(1)
    p: Distribution = shaken(LearnedNormal(ModelConfig(latent_dim=latent_dim, prior="learned"), (1,)))(encode)
    return p


def standard(latent_dim: int) -> Distribution:
    return Independent(Normal(torch.zeros(latent_dim).double(), 1.0), 1)


def one_hot(*shape: int) -> OneHot:
    return OneHot(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))


def joint() -> Joint:
    return Joint(gaussian("full"), one_hot(4, 2, 5))


def dense(q: Distribution) -> MultivariateNormal:
    """Give any Gaussian as torch's, with a covariance matrix."""
    if isinstance(q, MultivariateNormal):
        return MultivariateNormal(q.loc, covariance_matrix=q.scale_tril @ q.scale_tril.mT)
    return MultivariateNormal(q.mean, covariance_matrix=torch.diag_embed(q.variance))


def by_torch(q: Distribution, p: Distribution) -> Tensor:
    """Give KL(q || p) through torch's own pairs."""
    if isinstance(q, Joint) and isinstance(p, Joint):
        return by_torch(q.continuous, p.continuous) + by_torch(q.categorical, p.categorical)
    if isinstance(q, OneHot) and isinstance(p, OneHot):
        pair = (Categorical(logits=distribution.log_probabilities) for distribution in (q, p))
        return kl_divergence(*pair).sum(dim=-1)
    return kl_divergence(dense(q), dense(p))


PAIRS: dict[str, Callable[[], tuple[Distribution, Distribution]]] = {
    "diagonal-standard": lambda: (gaussian("diagonal"), standard(3)),
    "diagonal-learned": lambda: (gaussian("diagonal"), learned(3)),
    "full-standard": lambda: (gaussian("full"), standard(3)),
    "full-learned": lambda: (gaussian("full"), learned(3)),
    "categorical-uniform": lambda: (one_hot(4, 2, 5), OneHot(torch.zeros(2, 5).double())),
    "categorical-categorical": lambda: (one_hot(4, 2, 5), one_hot(1, 2, 5)),
    "joint-standard": lambda: (joint(), Joint(standard(3), OneHot(torch.zeros(2, 5).double()))),
}


@torch.no_grad()
@pytest.mark.parametrize("pair", PAIRS)
def test_kl_in_closed_form_equals_torchs_and_monte_carlo(pair: str) -> None:
    q, p = PAIRS[pair]()
    closed = kl_divergence(q, p)
    assert closed.shape == (4,)
    torch.testing.assert_close(closed, by_torch(q, p))
    torch.manual_seed(3)
    z = q.sample(torch.Size([50_000]))
    ratios = q.log_prob(z) - p.log_prob(z)
    assert ((ratios.mean(dim=0) - closed).abs() < 5 * ratios.std(dim=0) / math.sqrt(len(z))).all()


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if "full" not in pair and "joint" not in pair])
def test_factors_of_the_kl_are_those_of_each_latent_alone(pair: str) -> None:
    q, p = PAIRS[pair]()
    parts = factors(q, p)
    torch.testing.assert_close(parts.sum(dim=-1), kl_divergence(q, p))
    if isinstance(q, OneHot) and isinstance(p, OneHot):
        first: Distribution = OneHot(q.log_probabilities[:, :1])
        prior: Distribution = OneHot(p.log_probabilities[..., :1, :])
    else:
        first, prior = (Independent(Normal(d.mean[..., :1], d.stddev[..., :1]), 1) for d in (q, p))
    torch.testing.assert_close(parts[:, 0], kl_divergence(first, prior))


def test_factors_of_a_joint_kl_are_latents_then_variables() -> None:
    q = Joint(gaussian("diagonal"), one_hot(4, 2, 5))
    p = Joint(standard(3), OneHot(torch.zeros(2, 5).double()))
    parts = factors(q, p)
    assert parts.shape == (4, 5)
    torch.testing.assert_close(parts[:, :3], factors(q.continuous, p.continuous))
    torch.testing.assert_close(parts.sum(dim=-1), kl_divergence(q, p))


def test_factors_of_a_correlated_kl_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="no sum over latents"):
        factors(gaussian("full"), standard(3))


def test_kl_of_a_full_gaussian_to_a_prior_that_is_no_gaussian_has_no_closed_form() -> None:
    laplace = Independent(torch.distributions.Laplace(torch.zeros(3), 1.0), 1)
    with pytest.raises(NotImplementedError):
        kl_divergence(gaussian("full"), laplace)
