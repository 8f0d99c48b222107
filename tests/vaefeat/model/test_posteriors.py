"""Posteriors by routes that share no code with them: autograd's Jacobian, areas of a grid, counts, torch's own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Categorical, MultivariateNormal, Normal

from vaefeat import ModelConfig, TrainConfig
from vaefeat.model.distributions import Joint, OneHot
from vaefeat.model.posteriors import POSTERIORS, CategoricalPosterior, DiagonalGaussian, JointPosterior, Posterior

HIDDEN_DIM = 7
CONTINUOUS = ["diagonal", "full", "planar", "iaf"]
#: Settings of a small posterior of each kind that has a density.
SMALL: dict[str, dict[str, int]] = {
    "diagonal": {"latent_dim": 3},
    "full": {"latent_dim": 3},
    "planar": {"latent_dim": 3},
    "iaf": {"latent_dim": 3},
    "categorical": {"latent_dim": 8, "n_categories": 4},
    "joint": {"latent_dim": 10, "n_categories": 4, "n_categorical": 2},
}


def make(name: str, **settings: Any) -> Posterior:
    """Make a posterior with weights that are far from those of the start, where much would pass."""
    torch.manual_seed(0)
    settings = {"flow_hidden_dim": 12, **(settings or SMALL[name])}
    posterior = POSTERIORS[name](ModelConfig(posterior=name, **settings), HIDDEN_DIM)
    for parameter in posterior.parameters():
        nn.init.normal_(parameter, std=0.3)
    return posterior


def noise_of(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def h_BF() -> Tensor:
    return noise_of(5, HIDDEN_DIM, seed=1)


# A full Gaussian needs two latents.
@pytest.mark.parametrize(
    ("name", "latent_dim"),
    [(name, size) for name in CONTINUOUS for size in (1, 2, 5) if (name, size) != ("full", 1)],
)
def test_drawn_density_is_that_of_the_noise_over_autograds_jacobian(name: str, latent_dim: int) -> None:
    posterior = make(name, latent_dim=latent_dim).double()
    h_BF = noise_of(1, HIDDEN_DIM, dtype=torch.float64)
    for seed in range(4):
        noise = noise_of(latent_dim, seed=seed, dtype=torch.float64)

        def drawn(noise_L: Tensor) -> Tensor:
            return posterior.draw(h_BF, noise_L.view(1, 1, -1))[0].flatten()

        jacobian = torch.autograd.functional.jacobian(drawn, noise)
        wanted = Normal(0.0, 1.0).log_prob(noise).sum() - torch.linalg.slogdet(jacobian).logabsdet
        _, log_q_SB = posterior.draw(h_BF, noise.view(1, 1, -1))
        torch.testing.assert_close(log_q_SB.squeeze(), wanted)


@pytest.mark.parametrize("name", ["diagonal", "full", "iaf", "categorical", "joint"])
@pytest.mark.parametrize("shared", [False, True])
def test_drawn_density_equals_that_of_the_distribution(name: str, shared: bool, h_BF: Tensor) -> None:
    posterior = make(name).double()
    noise = noise_of(6, 1 if shared else 5, posterior.latent_dim, dtype=torch.float64)
    z_SBL, log_q_SB = posterior.draw(h_BF.double(), noise)
    assert z_SBL.shape == (6, 5, posterior.latent_dim)
    assert log_q_SB.shape == (6, 5)
    # A copy: flows remember the tensor that they have just drawn.
    torch.testing.assert_close(posterior(h_BF.double()).log_prob(z_SBL.clone()), log_q_SB)


@pytest.mark.parametrize("name", SMALL)
def test_samples_and_draws_agree_in_mean_and_entropy(name: str, h_BF: Tensor) -> None:
    posterior = make(name).eval()
    q, n_samples = posterior(h_BF), 20_000
    torch.manual_seed(3)
    with torch.no_grad():
        sampled = q.rsample(torch.Size([n_samples]))
        pairs = [(sampled, q.log_prob(sampled)), posterior.draw(h_BF, noise_of(n_samples, 5, posterior.latent_dim))]
    for ours, theirs in zip(*pairs, strict=True):
        standard_error = ((ours.var(dim=0) + theirs.var(dim=0)) / n_samples).sqrt()
        assert ((ours.mean(dim=0) - theirs.mean(dim=0)).abs() < 5 * standard_error + 1e-6).all()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shared", [False, True])
def test_a_rows_draws_do_not_depend_on_its_neighbours(name: str, shared: bool, h_BF: Tensor) -> None:
    posterior = make(name)
    noise = noise_of(6, 1 if shared else 5, posterior.latent_dim)
    together = posterior.draw(h_BF, noise)
    for row in range(5):
        alone = posterior.draw(h_BF[row : row + 1], noise if shared else noise[:, row : row + 1])
        for ours, theirs in zip(alone, together, strict=True):
            torch.testing.assert_close(ours[:, 0], theirs[:, row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["diagonal", "full", "categorical", "joint"])
def test_draws_have_the_moments_that_are_exported(name: str, h_BF: Tensor) -> None:
    posterior, n_samples = make(name), 100_000
    with torch.no_grad():
        z_SBL, _ = posterior.draw(h_BF, noise_of(n_samples, 1, posterior.latent_dim))
        mean_BL, logvar_BL = posterior.statistics(h_BF)
    deviation_BL = torch.exp(0.5 * logvar_BL)
    assert ((z_SBL.mean(dim=0) - mean_BL).abs() < 5 * deviation_BL / math.sqrt(n_samples)).all()
    torch.testing.assert_close(z_SBL.std(dim=0), deviation_BL, atol=2e-3, rtol=0.02)


def test_full_gaussian_has_the_covariance_of_its_factor_and_correlates(h_BF: Tensor) -> None:
    posterior = make("full")
    with torch.no_grad():
        z_SL = posterior.draw(h_BF[:1], noise_of(100_000, 1, 3))[0][:, 0]
        q = posterior(h_BF[:1])
    wanted = q.covariance_matrix[0]
    assert (wanted - wanted.diagonal().diag()).abs().max() > 0.1
    torch.testing.assert_close(torch.cov(z_SL.T), wanted, atol=0.03, rtol=0.02)
    assert not q.scale_tril.triu(1).any()


@pytest.mark.parametrize("name", ["planar", "iaf"])
def test_flow_exports_the_gaussian_before_the_flow(name: str, h_BF: Tensor) -> None:
    posterior = make(name)
    base = DiagonalGaussian(ModelConfig(latent_dim=3), HIDDEN_DIM)
    base.load_state_dict({key: value for key, value in posterior.state_dict().items() if not key.startswith("steps")})
    for ours, theirs in zip(posterior.statistics(h_BF), base.statistics(h_BF), strict=True):
        assert torch.equal(ours, theirs)
    assert (posterior.draw(h_BF, noise_of(1, 5, 3))[0] - base.draw(h_BF, noise_of(1, 5, 3))[0]).abs().max() > 0.1


@pytest.mark.parametrize("name", CONTINUOUS)
def test_reparameterized_gradient_equals_finite_differences(name: str) -> None:
    posterior = make(name).double()
    noise = noise_of(2, 1, 3, dtype=torch.float64)
    h_BF = noise_of(2, HIDDEN_DIM, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: posterior.draw(h, noise), h_BF)


def density_over(values: Tensor) -> float:
    """Integrate a density over pushed points (n, 2) or (n, n, 3): coordinates, then the density there.

    Lengths and areas are measured on the points themselves, so that a wrong log-determinant cannot cancel.
    """
    if values.ndim == 2:
        return torch.trapezoid(values[:, 1], values[:, 0]).item()
    corners = [values[:-1, :-1], values[1:, :-1], values[1:, 1:], values[:-1, 1:]]
    area = torch.zeros(())
    for a, b in zip(corners, [*corners[1:], corners[0]], strict=True):
        area = area + 0.5 * (a[..., 0] * b[..., 1] - b[..., 0] * a[..., 1])
    return (area.abs() * torch.stack([corner[..., 2] for corner in corners]).mean(dim=0)).sum().item()


@torch.no_grad()
@pytest.mark.parametrize("name", ["diagonal", "planar", "iaf"])
def test_one_latents_density_integrates_to_one(name: str) -> None:
    posterior = make(name, latent_dim=1).double()
    noise = torch.linspace(-7, 7, 20_001, dtype=torch.float64)
    z_SBL, log_q_SB = posterior.draw(noise_of(1, HIDDEN_DIM, dtype=torch.float64), noise.view(-1, 1, 1))
    assert density_over(torch.stack([z_SBL.flatten(), log_q_SB.flatten().exp()], dim=1)) == pytest.approx(1, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", CONTINUOUS)
def test_two_latents_density_integrates_to_one(name: str) -> None:
    posterior = make(name, latent_dim=2).double()
    line = torch.linspace(-6, 6, 401, dtype=torch.float64)
    noise = torch.cartesian_prod(line, line)[:, None]
    z_SBL, log_q_SB = posterior.draw(noise_of(1, HIDDEN_DIM, dtype=torch.float64), noise)
    pushed = torch.cat([z_SBL, log_q_SB.exp().unsqueeze(-1)], dim=-1).view(401, 401, 3)
    assert density_over(pushed) == pytest.approx(1, abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["diagonal", "full", "iaf"])
def test_density_on_a_grid_of_latents_integrates_to_one(name: str) -> None:
    posterior = make(name, latent_dim=2).double()
    q = posterior(noise_of(1, HIDDEN_DIM, dtype=torch.float64))
    line = torch.linspace(-6, 6, 801, dtype=torch.float64)
    density = q.log_prob(torch.cartesian_prod(line, line)[:, None]).exp()
    assert density.sum().item() * (12 / 800) ** 2 == pytest.approx(1, abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["diagonal", "full", "iaf"])
def test_density_far_from_the_mass_is_tiny_and_never_nan(name: str) -> None:
    # As when one row's latents are judged under another row's posterior.
    q = make(name, latent_dim=4)(noise_of(3, HIDDEN_DIM))
    for distance in (10.0, 100.0, 1e4):
        log_density = q.log_prob(distance * noise_of(1000, 1, 4).sign())
        assert not log_density.isnan().any()
        assert (log_density < -10).all()


@pytest.mark.parametrize("name", SMALL)
def test_extreme_inputs_give_finite_draws_and_densities(name: str) -> None:
    posterior = make(name)
    noise = torch.cat([noise_of(4, 2, posterior.latent_dim), torch.full((1, 2, posterior.latent_dim), 9.0)])
    z_SBL, log_q_SB = posterior.draw(torch.full((2, HIDDEN_DIM), 1e3), torch.cat([noise, -noise]))
    assert z_SBL.isfinite().all()
    assert log_q_SB.isfinite().all()
    assert all(value.isfinite().all() for value in posterior.statistics(torch.full((2, HIDDEN_DIM), 1e6)))


@pytest.mark.parametrize("name", ["diagonal", "full"])
def test_held_gaussian_has_the_same_density_and_no_gradient_but_through_z(name: str, h_BF: Tensor) -> None:
    posterior = make(name)
    z = noise_of(4, 5, 3).requires_grad_()
    held = posterior.held(h_BF)
    assert held is not None
    density = held.log_prob(z)
    torch.testing.assert_close(density, posterior(h_BF).log_prob(z))
    density.sum().backward()
    assert z.grad is not None
    assert all(parameter.grad is None for parameter in posterior.parameters())


@pytest.mark.parametrize("name", ["planar", "iaf", "categorical", "joint", "deterministic"])
def test_posterior_whose_density_cannot_be_followed_holds_none(name: str, h_BF: Tensor) -> None:
    assert make(name, **SMALL.get(name, {"latent_dim": 3})).held(h_BF) is None


def counts(z_NL: Tensor, n_categories: int) -> NDArray[Any]:
    """Count one-hot values: (variables, categories)."""
    totals: NDArray[Any] = z_NL.unflatten(-1, (-1, n_categories)).sum(dim=0).numpy()
    return totals


@pytest.mark.parametrize("route", ["draw", "sample", "rsample"])
def test_categorical_samples_have_the_probabilities_frequencies(route: str, h_BF: Tensor) -> None:
    posterior, n_samples = make("categorical"), 20_000
    torch.manual_seed(5)
    with torch.no_grad():
        q = posterior(2 * h_BF)  # some categories are rare
        if route == "draw":
            z_SBL, _ = posterior.draw(2 * h_BF, noise_of(n_samples, 1, 8))
        else:
            z_SBL = getattr(q, route)(torch.Size([n_samples]))
        expected = n_samples * posterior.statistics(2 * h_BF)[0].unflatten(-1, (2, 4)).double().numpy()
    observed = np.stack([counts(z_SBL[:, row], 4) for row in range(5)])
    assert expected.min() > 5  # what the test's approximation asks for
    p_values = scipy.stats.chisquare(observed, expected, axis=-1, sum_check=False).pvalue
    assert p_values.min() > 1e-3 / p_values.size


def test_draws_of_categories_are_one_hot_and_deterministic(h_BF: Tensor) -> None:
    posterior, noise = make("categorical"), noise_of(50, 1, 8)
    z_SBL, _ = posterior.draw(h_BF, noise)
    assert set(z_SBL.unique().tolist()) == {0.0, 1.0}
    assert (z_SBL.unflatten(-1, (2, 4)).sum(dim=-1) == 1).all()
    assert torch.equal(z_SBL, posterior.draw(h_BF, noise)[0])


def test_straight_through_is_hard_forwards_and_soft_backwards() -> None:
    logits = noise_of(3, 2, 4).requires_grad_()
    weight = noise_of(6, 3, 8, seed=4)
    gradients, values = [], []
    for straight_through in (True, False):
        q = OneHot(logits, temperature=0.7, straight_through=straight_through)
        torch.manual_seed(6)
        z = q.rsample(torch.Size([6]))
        gradients.append(torch.autograd.grad((z * weight).sum(), logits)[0])
        values.append(z.detach().unflatten(-1, (2, 4)))
    hard, soft = values
    assert torch.equal(hard, nn.functional.one_hot(soft.argmax(dim=-1), 4).float())
    assert ((soft > 0) & (soft < 1)).all()
    torch.testing.assert_close(soft.sum(dim=-1), torch.ones(6, 3, 2))
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_relaxed_samples_are_the_papers_softmax_of_logits_and_gumbel_noise(temperature: float) -> None:
    logits, gumbel = noise_of(3, 2, 4), -torch.log(-torch.log(torch.rand(7, 3, 2, 4)))
    q = OneHot(logits, temperature=temperature, straight_through=False)
    exponents = torch.exp((logits + gumbel) / temperature)
    wanted = (exponents / exponents.sum(dim=-1, keepdim=True)).flatten(-2)
    torch.testing.assert_close(q.from_gumbel(gumbel, relaxed=True), wanted)


def test_categories_are_hard_in_evaluation_even_where_training_decodes_soft_ones(h_BF: Tensor) -> None:
    posterior = make("categorical")
    posterior.anneal(0.0, TrainConfig(straight_through=False))
    assert (posterior.train()(h_BF).rsample() % 1 > 0).any()
    assert not (posterior.eval()(h_BF).rsample() % 1).any()


@pytest.mark.parametrize("name", ["categorical", "joint"])
def test_temperature_falls_exponentially_from_start_to_end(name: str) -> None:
    posterior, config = make(name), TrainConfig(temperature_start=2.0, temperature_end=0.5)
    inner = posterior.categorical if isinstance(posterior, JointPosterior) else posterior
    assert isinstance(inner, CategoricalPosterior)
    temperatures = []
    for progress in (0.0, 0.5, 1.0):
        posterior.anneal(progress, config)
        temperatures.append(float(inner.temperature))
    assert temperatures == pytest.approx([2.0, 1.0, 0.5])


def test_one_hot_agrees_with_torchs_categorical() -> None:
    logits = noise_of(3, 2, 4)
    q, reference = OneHot(logits), Categorical(logits=logits)
    indices = reference.sample()
    value = nn.functional.one_hot(indices, 4).float().flatten(-2)
    torch.testing.assert_close(q.log_prob(value), reference.log_prob(indices).sum(dim=-1))
    torch.testing.assert_close(q.entropy(), reference.entropy().sum(dim=-1))
    torch.testing.assert_close(q.mean, reference.probs.flatten(-2))


def test_masses_of_all_one_hot_values_sum_to_one() -> None:
    q = OneHot(noise_of(2, 3))
    first, second = torch.eye(3), torch.eye(3)
    every = torch.stack([torch.cat([a, b]) for a in first for b in second])
    assert q.log_prob(every).exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_joint_puts_its_continuous_latents_first_and_adds_both_densities(h_BF: Tensor) -> None:
    posterior = make("joint")
    assert isinstance(posterior, JointPosterior)
    q = posterior(h_BF)
    assert isinstance(q, Joint)
    z_BL = q.sample()
    assert ((z_BL[:, 2:] == 0) | (z_BL[:, 2:] == 1)).all()
    mean_BL, logvar_BL = posterior.gaussian.statistics(h_BF)
    gaussian = MultivariateNormal(mean_BL, torch.diag_embed(logvar_BL.exp()))
    logits = posterior.categorical.logits(h_BF).unflatten(-1, (2, 4))
    mass = Categorical(logits=logits).log_prob(z_BL[:, 2:].unflatten(-1, (2, 4)).argmax(dim=-1))
    torch.testing.assert_close(q.log_prob(z_BL), gaussian.log_prob(z_BL[:, :2]) + mass.sum(dim=-1))


def test_deterministic_posterior_is_its_point_and_has_no_density(h_BF: Tensor) -> None:
    posterior = make("deterministic", latent_dim=3)
    q, (mean_BL, logvar_BL) = posterior(h_BF), posterior.statistics(h_BF)
    assert not posterior.has_density
    assert torch.equal(q.rsample(torch.Size([4])), mean_BL.expand(4, 5, 3))
    assert logvar_BL.unique().numel() == 1
    with pytest.raises(NotImplementedError, match="no posterior density"):
        posterior.draw(h_BF, noise_of(1, 5, 3))
