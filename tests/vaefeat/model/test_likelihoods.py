"""Likelihoods against scipy, torch.distributions, sums and integrals over everything that can come out."""

from __future__ import annotations

import math

import numpy as np
import onnxruntime
import pytest
import scipy.stats
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Bernoulli, Categorical
from torch.distributions import ContinuousBernoulli as TorchContinuousBernoulli

from vaefeat import ModelConfig, TrainConfig, pretrain
from vaefeat.errors import InputError
from vaefeat.model.likelihoods import (
    LIKELIHOODS,
    BernoulliLikelihood,
    CategoricalLikelihood,
    ContinuousBernoulliLikelihood,
    GaussianLikelihood,
    Likelihood,
    TokensLikelihood,
    refuse_rows,
)
from vaefeat.model.vae import VAE
from vaefeat.model.value_distributions import ContinuousBernoulli

CONFIG = ModelConfig(levels=5, gaussian_std=0.7)
#: Tables, whose likelihood needs their columns, are in test_table.py.
EVERY = sorted(LIKELIHOODS.keys() - {"table"})
SHAPE = (2, 3, 4)


def rows_for(likelihood: Likelihood, n: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    if likelihood.scaling == "none":
        return torch.randint(0, CONFIG.levels, (n, *SHAPE), generator=generator).float()
    return torch.rand(n, *SHAPE, generator=generator)


def output_for(likelihood: Likelihood, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return 2 * torch.randn(n, likelihood.n_parameters, *SHAPE, generator=generator)


@pytest.mark.parametrize("name", EVERY)
def test_log_prob_of_several_samples_equals_that_of_copied_rows(name: str) -> None:
    likelihood = LIKELIHOODS[name](CONFIG)
    x, output = rows_for(likelihood), output_for(likelihood, 4 * 3).requires_grad_()
    got = likelihood.log_prob(output, x)
    wanted = likelihood(output).log_prob(x.repeat(4, 1, 1, 1))
    assert got.shape == (12,)
    torch.testing.assert_close(got, wanted)
    (gradient,) = torch.autograd.grad(got.square().sum(), output)
    (wanted_gradient,) = torch.autograd.grad(wanted.square().sum(), output)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_log_prob_is_summed_over_the_values_of_a_row(name: str) -> None:
    likelihood = LIKELIHOODS[name](CONFIG)
    x, output = rows_for(likelihood), output_for(likelihood, 3)
    one_by_one = [
        likelihood.log_prob(output[:, :, c, h, w, None], x[:, c, h, w, None])
        for c in range(2)
        for h in range(3)
        for w in range(4)
    ]
    torch.testing.assert_close(likelihood.log_prob(output, x), torch.stack(one_by_one).sum(dim=0))


@pytest.mark.parametrize("name", EVERY)
def test_log_prob_gradient_equals_finite_differences(name: str) -> None:
    likelihood = LIKELIHOODS[name](CONFIG).double()
    x, output = rows_for(likelihood).double(), output_for(likelihood, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda values: likelihood.log_prob(values, x), output)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 50.0, 1e4])
@pytest.mark.parametrize("name", EVERY)
def test_log_prob_and_gradient_of_extreme_outputs_are_finite(name: str, size: float) -> None:
    likelihood = LIKELIHOODS[name](CONFIG)
    x = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    output = torch.zeros(1, likelihood.n_parameters, 4)
    output[:, 0] = torch.tensor([size, size, -size, -size])
    output.requires_grad_()
    log_prob = likelihood.log_prob(output, x)
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all()
    assert output.grad is not None
    assert torch.isfinite(output.grad).all()
    assert torch.isfinite(likelihood.mean(output)).all()


@pytest.mark.parametrize("name", EVERY)
def test_draws_have_the_mean_and_the_shape_of_a_row(name: str) -> None:
    likelihood = LIKELIHOODS[name](CONFIG)
    output = output_for(likelihood, 2)
    p = likelihood(output)
    assert (p.batch_shape, p.event_shape) == ((2,), SHAPE)
    torch.manual_seed(0)
    draws = p.sample(torch.Size([20_000]))
    assert draws.shape == (20_000, 2, *SHAPE)
    if name != "tokens":
        torch.testing.assert_close(likelihood.mean(output), p.mean)
    errors = (draws.mean(dim=0) - p.mean) / draws.std(dim=0).clamp_min(0.01) * math.sqrt(20_000)
    assert errors.abs().max().item() < 5
    assert torch.isfinite(p.log_prob(draws[:5])).all()


class Means(torch.nn.Module):
    def __init__(self, likelihoods: list[Likelihood]) -> None:
        super().__init__()
        self.likelihoods = likelihoods

    def forward(self, output: Tensor) -> tuple[Tensor, ...]:
        return tuple(likelihood.mean(output[:, : likelihood.n_parameters]) for likelihood in self.likelihoods)


def test_means_of_outputs_of_any_size_export_and_onnx_runtime_computes_the_same() -> None:
    means = Means([LIKELIHOODS[name](CONFIG) for name in EVERY]).eval()
    normal = output_for(LIKELIHOODS["tokens"](CONFIG), 3)
    output = torch.cat([normal, 30 * normal, 0.01 * normal])
    program = torch.onnx.export(
        means,
        (output[:2],),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=20,
        verbose=False,
    )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: output.numpy()})
    for values, wanted in zip(got, means(output), strict=True):
        np.testing.assert_allclose(values, wanted.numpy(), atol=2e-6)


@pytest.mark.parametrize("name", EVERY)
def test_every_likelihood_trains_and_exports(name: str, digits_rows: NDArray[np.uint8]) -> None:
    model = ModelConfig(
        latent_dim=3, likelihood=name, levels=17, gaussian_std="optimal", hidden_dims=(16,), network="mlp"
    )
    train = TrainConfig(max_epochs=1, threads=1)
    bundle = pretrain(digits_rows[:200], model=model, train=train, progress=False)
    assert bundle.manifest.model["likelihood"] == name
    assert np.isfinite(bundle.manifest.metrics["elbo"])


@pytest.mark.parametrize(("name", "levels"), [("bernoulli", 2), ("categorical", 3), ("tokens", 3)])
def test_probabilities_of_all_rows_sum_to_one(name: str, levels: int) -> None:
    likelihood = LIKELIHOODS[name](ModelConfig(levels=levels))
    ids = torch.cartesian_prod(torch.arange(float(levels)), torch.arange(float(levels)))
    x = ids / (levels - 1) if name == "categorical" else ids
    output = torch.randn(1, likelihood.n_parameters, 2).expand(levels**2, -1, -1)
    assert likelihood.log_prob(output, x).exp().sum().item() == pytest.approx(1, abs=1e-6)


# Bernoulli


def test_bernoulli_of_logits_equals_scipy_per_row() -> None:
    logits = torch.tensor([[[-3.0, 0.5, 40.0]], [[2.0, -60.0, 0.0]]])
    x = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    likelihood = BernoulliLikelihood(ModelConfig())
    wanted = scipy.stats.bernoulli.logpmf(x.numpy(), torch.sigmoid(logits[:, 0].double()).numpy()).sum(axis=1)
    np.testing.assert_allclose(likelihood(logits).log_prob(x).numpy(), wanted, rtol=1e-5)
    np.testing.assert_allclose(likelihood.log_prob(logits, x).numpy(), wanted, rtol=1e-5)


@pytest.mark.parametrize("logit", [-1e4, -300.0, -20.5, -19.5, -1e-3, 19.5, 20.5, 300.0, 1e4])
def test_bernoulli_of_any_logit_is_exact(logit: float) -> None:
    likelihood, logits = BernoulliLikelihood(ModelConfig()), torch.full((2, 1, 1), logit)
    got = likelihood.log_prob(logits, torch.tensor([[0.0], [1.0]]))
    wanted = np.array([-np.logaddexp(0, logit), -np.logaddexp(0, -logit)])
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-6, atol=abs(logit) * 2**-23)


def test_bernoulli_of_grey_values_is_the_expected_log_likelihood() -> None:
    logits, grey = torch.tensor([[[0.3, -1.2]]]), torch.tensor([[0.25, 0.7]])
    coins = Bernoulli(logits=logits[:, 0])
    wanted = grey * coins.log_prob(torch.ones(2)) + (1 - grey) * coins.log_prob(torch.zeros(2))
    likelihood = BernoulliLikelihood(ModelConfig())
    torch.testing.assert_close(likelihood(logits).log_prob(grey), wanted.sum(dim=1))
    torch.testing.assert_close(likelihood.log_prob(logits, grey), wanted.sum(dim=1))


# Gaussian


@pytest.mark.parametrize("std", [1e-3, 0.5, 1.0, 2.5])
def test_gaussian_log_prob_equals_scipy_per_row(std: float) -> None:
    mean, x = torch.randn(4, 1, 2, 3), torch.randn(4, 2, 3)
    likelihood = GaussianLikelihood(ModelConfig(gaussian_std=std))
    wanted = scipy.stats.norm.logpdf(x.numpy(), mean[:, 0].numpy(), std).sum(axis=(1, 2))
    np.testing.assert_allclose(likelihood(mean).log_prob(x).numpy(), wanted, rtol=1e-5)
    np.testing.assert_allclose(likelihood.log_prob(mean, x).numpy(), wanted, rtol=1e-5)


def test_gaussian_of_unit_std_differs_from_half_the_squared_error_by_a_constant() -> None:
    mean, x = torch.randn(6, 1, 10), torch.randn(6, 10)
    got = GaussianLikelihood(ModelConfig(gaussian_std=1.0)).log_prob(mean, x)
    squared = -0.5 * (x - mean[:, 0]).pow(2).sum(dim=1)
    torch.testing.assert_close(got - squared, torch.full((6,), -5 * math.log(2 * math.pi)))


def test_gaussian_density_integrates_to_one() -> None:
    grid = torch.linspace(-12, 12, 4801)
    step = (grid[1] - grid[0]).item()
    likelihood = GaussianLikelihood(ModelConfig(gaussian_std=0.8))
    density = likelihood.log_prob(torch.full((4801, 1, 1), 0.4), grid[:, None]).exp()
    assert density.sum().item() * step == pytest.approx(1, abs=1e-4)


def test_gaussian_std_is_learned_only_when_not_given() -> None:
    assert GaussianLikelihood(ModelConfig()).log_std.requires_grad
    assert not GaussianLikelihood(ModelConfig(gaussian_std=1.0)).log_std.requires_grad
    assert not list(GaussianLikelihood(ModelConfig(gaussian_std="optimal")).parameters())


def test_learned_std_can_rise_again_from_its_floor() -> None:
    likelihood = GaussianLikelihood(ModelConfig())
    likelihood.log_std.data.fill_(-6.5)
    (-likelihood.log_prob(torch.zeros(8, 1, 4), torch.full((8, 4), 5.0)).mean()).backward()
    assert likelihood.log_std.grad is not None
    assert likelihood.log_std.grad.item() < 0


def test_learned_std_converges_to_the_optimal_one() -> None:
    learned, optimal = GaussianLikelihood(ModelConfig()), GaussianLikelihood(ModelConfig(gaussian_std="optimal"))
    x, output = 3.0 * torch.randn(2000, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(2000, 1, 4)
    optimizer = torch.optim.LBFGS(learned.parameters(), max_iter=100)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = -learned.log_prob(output, x).mean()
        value.backward()
        return value

    optimizer.step(loss)
    best = optimal.log_prob(output, x)
    assert learned.std.item() == pytest.approx(x.pow(2).mean().sqrt().item(), rel=1e-3)
    assert optimal.std.item() == pytest.approx(learned.std.item(), rel=1e-3)
    assert best.mean().item() == pytest.approx(learned.log_prob(output, x).mean().item(), rel=1e-6)


def test_optimal_variance_in_training_is_that_of_all_samples_of_the_minibatch() -> None:
    likelihood = GaussianLikelihood(ModelConfig(gaussian_std="optimal"))
    x, output = torch.randn(3, 5), torch.randn(2 * 3, 1, 5)
    errors = output[:, 0] - x.repeat(2, 1)
    got = likelihood.log_prob(output, x)
    wanted = scipy.stats.norm.logpdf(errors.numpy(), 0, errors.square().mean().sqrt().item()).sum(axis=1)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-5)
    # Whatever the errors, their mean log-density is that of Rybkin et al., equation 9: -log(sigma) and a constant.
    closed = -2.5 * (math.log(2 * math.pi) + errors.square().mean().log().item() + 1)
    assert got.mean().item() == pytest.approx(closed, rel=1e-5)


def test_optimal_variance_passes_the_gradient_through_itself() -> None:
    likelihood = GaussianLikelihood(ModelConfig(gaussian_std="optimal")).double()
    x, output = torch.randn(3, 5, dtype=torch.float64), torch.randn(6, 1, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: likelihood.log_prob(values, x), output)


def test_optimal_variance_of_perfect_reconstructions_stops_at_the_floor() -> None:
    likelihood = GaussianLikelihood(ModelConfig(gaussian_std="optimal"))
    x = torch.randn(3, 5)
    output = x[:, None].clone().requires_grad_()
    log_prob = likelihood.log_prob(output, x)
    log_prob.sum().backward()
    assert output.grad is not None
    assert torch.isfinite(output.grad).all()
    wanted = -5 * (0.5 * math.log(2 * math.pi) - 6)
    torch.testing.assert_close(log_prob.detach(), torch.full((3,), wanted))


def test_optimal_std_in_evaluation_is_the_debiased_average_over_minibatches() -> None:
    likelihood = GaussianLikelihood(ModelConfig(gaussian_std="optimal"))
    assert likelihood.std.item() == 1
    output = torch.zeros(6, 1, 5)
    variances, weights = [], []
    for step in range(4):
        x = (step + 1.0) * torch.randn(6, 5)
        likelihood.log_prob(output, x)
        variances.append(x.square().mean().item())
        weights.append(0.99 ** (3 - step))
    wanted = math.sqrt(np.average(variances, weights=weights))
    assert likelihood.std.item() == pytest.approx(wanted, rel=1e-5)

    restored = GaussianLikelihood(ModelConfig(gaussian_std="optimal")).eval()
    restored.load_state_dict(likelihood.state_dict())
    for got in (restored.log_prob(output, x), restored(output).log_prob(x)):
        np.testing.assert_allclose(got, scipy.stats.norm.logpdf(x, 0, wanted).sum(axis=1), rtol=1e-5)
    assert restored.std.item() == likelihood.std.item()


# Categorical and tokens


@pytest.mark.parametrize("levels", [2, 17, 256, 1000])
def test_categorical_finds_the_level_of_every_scaled_value(levels: int) -> None:
    likelihood = CategoricalLikelihood(ModelConfig(levels=levels))
    rows = np.arange(levels, dtype=np.float32)[:, None]
    vae = VAE.for_rows(ModelConfig(levels=levels, likelihood="categorical"), rows)
    output = torch.randn(levels, levels, 1)
    got = likelihood.log_prob(output, vae.preprocessing(torch.from_numpy(rows)))
    torch.testing.assert_close(got, output[:, :, 0].log_softmax(dim=1).diagonal())


def test_categorical_rounds_to_the_nearest_level() -> None:
    likelihood = CategoricalLikelihood(ModelConfig(levels=5))
    x = torch.tensor([[0.0, 0.12, 0.13, 0.6, 0.9, 1.0]])
    output = torch.randn(1, 5, 6)
    wanted = Categorical(logits=output[0].T).log_prob(torch.tensor([0, 0, 1, 2, 4, 4])).sum()
    torch.testing.assert_close(likelihood.log_prob(output, x)[0], wanted)


def test_categorical_mean_is_the_expected_level() -> None:
    probabilities = np.array([0.1, 0.2, 0.7])
    output = torch.from_numpy(np.log(probabilities)).float().view(1, 3, 1) + 4.0
    got = CategoricalLikelihood(ModelConfig(levels=3)).mean(output)
    assert got.item() == pytest.approx(probabilities @ [0, 0.5, 1])


def test_tokens_log_prob_equals_torchs_categorical() -> None:
    likelihood = TokensLikelihood(ModelConfig(levels=6))
    ids = torch.randint(0, 6, (4, 7))
    output = torch.randn(4, 6, 7)
    wanted = Categorical(logits=output.transpose(1, 2)).log_prob(ids).sum(dim=1)
    torch.testing.assert_close(likelihood.log_prob(output, ids.float()), wanted)


def test_tokens_mean_is_the_most_probable_id() -> None:
    output = torch.zeros(1, 300, 3)
    output[0, [7, 0, 299], [0, 1, 2]] = 1.0
    assert TokensLikelihood(ModelConfig(levels=300)).mean(output).tolist() == [[7.0, 0.0, 299.0]]


# Continuous Bernoulli


def reference(logits: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give log integral and mean in float64: by quadrature, which knows nothing of the closed form."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    x, weights = (nodes + 1) / 2, weights / 2
    exponents = logits.double().numpy()[:, None] * x
    largest = exponents.max(axis=1, keepdims=True)
    terms = weights * np.exp(exponents - largest)
    return np.log(terms.sum(axis=1)) + largest[:, 0], (terms * x).sum(axis=1) / terms.sum(axis=1)


LOGITS = torch.cat(
    [torch.linspace(-50, 50, 401), torch.linspace(-2, 2, 401), torch.logspace(-30, 0, 31), -torch.logspace(-9, 0, 9)]
)


def test_continuous_bernoulli_normaliser_equals_quadrature_at_all_logits() -> None:
    log_integral, _ = reference(LOGITS)
    got = -ContinuousBernoulli(LOGITS).log_prob(torch.zeros_like(LOGITS))
    np.testing.assert_allclose(got.numpy(), log_integral, rtol=3e-7, atol=1e-7)


def test_continuous_bernoulli_mean_equals_quadrature_at_all_logits() -> None:
    np.testing.assert_allclose(ContinuousBernoulli(LOGITS).mean.numpy(), reference(LOGITS)[1], rtol=1e-6)


def test_continuous_bernoulli_gradient_is_the_value_minus_the_mean() -> None:
    logits = LOGITS.clone().requires_grad_()
    x = torch.linspace(0, 1, len(logits))
    ContinuousBernoulli(logits).log_prob(x).sum().backward()
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), x.numpy() - reference(LOGITS)[1], atol=3e-7)


def test_continuous_bernoulli_log_prob_equals_torchs_away_from_a_half() -> None:
    logits = torch.tensor([-8.0, -2.0, 1.0, 5.0], dtype=torch.float64)
    x = torch.tensor([0.2, 0.0, 1.0, 0.7], dtype=torch.float64)
    wanted = TorchContinuousBernoulli(logits=logits)
    torch.testing.assert_close(ContinuousBernoulli(logits).log_prob(x), wanted.log_prob(x))
    torch.testing.assert_close(ContinuousBernoulli(logits).mean, wanted.mean)


@pytest.mark.parametrize("logit", [-30.0, -1e-4, 0.0, 0.9, 1.1, 30.0])
def test_continuous_bernoulli_density_integrates_to_one_and_draws_follow_it(logit: float) -> None:
    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    p = ContinuousBernoulli(torch.tensor(logit, dtype=torch.float64))
    density = p.log_prob(grid).exp().numpy()
    assert np.trapezoid(density, grid.numpy()) == pytest.approx(1, abs=1e-5)
    torch.manual_seed(0)
    draws = p.sample(torch.Size([20_000])).numpy()
    cumulated = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)]) / 20_000
    assert scipy.stats.kstest(draws, lambda x: np.interp(x, grid.numpy(), cumulated)).pvalue > 1e-3


def test_continuous_bernoulli_exceeds_bernoulli_by_its_log_normaliser() -> None:
    output, grey = torch.randn(3, 1, 4), torch.rand(3, 4)
    excess = ContinuousBernoulliLikelihood(ModelConfig()).log_prob(output, grey) - BernoulliLikelihood(
        ModelConfig()
    ).log_prob(output, grey)
    # Loaiza-Ganem and Cunningham 2019, equation 6.
    probability = torch.sigmoid(output[:, 0].double())
    log_normaliser = torch.log(2 * torch.atanh(1 - 2 * probability) / (1 - 2 * probability)).sum(dim=1)
    torch.testing.assert_close(excess.double(), log_normaliser, rtol=1e-5, atol=1e-5)


# Rows without a meaning


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0.0, np.inf]], "value inf for likelihood='tokens', wanted whole token ids from 0 to 4"),
        ([[0.0, 3.5]], "value 3.5 for likelihood='tokens', wanted whole token ids from 0 to 4 .levels=5.; number"),
        ([[-1.0, 3.0]], "got rows from -1 to 3 for .*wanted whole token ids from 0 to 4.*; number the tokens from 0"),
        ([[0, 5]], "got rows from 0 to 5 for .*; take levels=6 or more"),
        ([[0.0, 7.0]], "got rows from 0 to 7 for .*wanted whole token ids from 0 to 4.*; take levels=8 or more"),
    ],
)
def test_tokens_refuse_what_is_no_id(rows: list[list[float]], message: str) -> None:
    config = ModelConfig(likelihood="tokens", levels=5)
    with pytest.raises(InputError, match=message):
        VAE.for_rows(config, np.array(rows, dtype=np.uint8 if rows == [[0, 5]] else np.float32))


@pytest.mark.parametrize("name", ["bernoulli", "continuous_bernoulli"])
def test_probabilities_asked_for_by_name_refuse_rows_outside_the_unit_interval(name: str) -> None:
    config = ModelConfig(likelihood=name)
    message = f"got rows from -0.5 to 2 for likelihood='{name}', wanted values in .0, 1.; scale the rows to .0, 1., or"
    with pytest.raises(InputError, match=message):
        VAE.for_rows(config, np.array([[-0.5, 2.0]], dtype=np.float32))
    VAE.for_rows(config, np.array([[0.0, 1.0]], dtype=np.float32))
    VAE.for_rows(config, np.array([[0, 255]], dtype=np.uint8))


@pytest.mark.parametrize(("row", "got"), [([0.0, 2.0], "0 to 2"), ([0.0, np.nan, 2.0], "nan to nan")])
def test_binarization_refuses_rows_outside_the_unit_interval(row: list[float], got: str) -> None:
    message = rf"got rows from {got} for binarize=True, wanted values in \[0, 1\]; .* take binarize=False and"
    with pytest.raises(InputError, match=message):
        refuse_rows("auto", ModelConfig(binarize=True), np.array([row], dtype=np.float32))


@pytest.mark.parametrize("name", ["auto", "gaussian", "categorical"])
def test_likelihoods_that_scale_any_rows_refuse_none(name: str) -> None:
    VAE.for_rows(ModelConfig(likelihood=name), np.array([[-5.0, 2.0], [3.0, 4.0]], dtype=np.float32))
