"""A table's likelihood, input and scaling against torch.distributions, scikit-learn and sums over all that can be."""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnxruntime
import pytest
import torch
from sklearn.preprocessing import OneHotEncoder
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal

from vaefeat import ModelConfig, TrainConfig
from vaefeat.errors import ConfigError, InputError
from vaefeat.export import export_encoder
from vaefeat.model.augmentation import augment
from vaefeat.model.evaluation import importance_weighted_bound
from vaefeat.model.likelihoods import TableLikelihood
from vaefeat.model.objectives import OBJECTIVES
from vaefeat.model.preprocessing import Preprocessing
from vaefeat.model.table import TableInput
from vaefeat.model.vae import VAE

#: A category of three, a quantity, yes or no, a category of two, a quantity: kinds in no order.
COLUMNS = (3, 0, 1, 2, 0)
CONFIG = ModelConfig(columns=COLUMNS, optional_columns=(0, 4), latent_dim=3, hidden_dims=(16,), gaussian_std=0.7)
N_OUTPUTS = 2 + 1 + 3 + 2


def rows_of(n: int = 40, *, gaps: float = 0.3) -> np.ndarray:
    random = np.random.default_rng(1)
    rows = np.stack(
        [
            random.integers(3, size=n),
            random.normal(50, 7, size=n),
            random.integers(2, size=n),
            random.integers(2, size=n),
            random.normal(-3, 0.1, size=n),
        ],
        axis=1,
    ).astype(np.float32)
    for column in (0, 4):
        rows[random.random(n) < gaps, column] = np.nan
    return rows


def output_for(n: int) -> Tensor:
    output: Tensor = 2 * torch.randn(n, 1, N_OUTPUTS, generator=torch.Generator().manual_seed(3))
    return output


def by_torch(output: Tensor, x: Tensor) -> Tensor:
    """Give each column's log-probability, (n, 5), by torch's own distributions; 0 where missing."""
    y = output.squeeze(1)
    found = torch.stack(
        [
            Categorical(logits=y[:, 3:6]).log_prob(x[:, 0].nan_to_num()),
            Normal(y[:, 0], 0.7).log_prob(x[:, 1]),
            Bernoulli(logits=y[:, 2]).log_prob(x[:, 2]),
            Categorical(logits=y[:, 6:8]).log_prob(x[:, 3]),
            Normal(y[:, 1], 0.7).log_prob(x[:, 4].nan_to_num()),
        ],
        dim=1,
    )
    observed: Tensor = torch.where(x.isnan(), 0.0, found)
    return observed


def scaled_rows(n: int = 40) -> Tensor:
    rows = rows_of(n)
    x: Tensor = Preprocessing.fit(rows, "table", columns=COLUMNS)(torch.from_numpy(rows))
    return x


def test_log_prob_is_the_sum_over_the_observed_columns_of_torchs_own() -> None:
    x, output = scaled_rows(6), output_for(4 * 6)
    got = TableLikelihood(CONFIG).log_prob(output, x)
    torch.testing.assert_close(got, by_torch(output, x.repeat(4, 1)).sum(dim=1))


def test_distributions_log_prob_equals_the_likelihoods() -> None:
    x, output = scaled_rows(6), output_for(6)
    likelihood = TableLikelihood(CONFIG)
    torch.testing.assert_close(likelihood(output).log_prob(x), likelihood.log_prob(output, x))


def test_log_prob_of_a_missing_value_is_that_of_the_row_without_its_column() -> None:
    whole, part = (ModelConfig(columns=columns, gaussian_std=0.7) for columns in ((0, 2), (2,)))
    output = torch.randn(5, 1, 3)
    x = torch.tensor([[math.nan, 1.0]]).repeat(5, 1)
    got = TableLikelihood(whole).log_prob(output, x)
    torch.testing.assert_close(got, TableLikelihood(part).log_prob(output[..., 1:], x[:, 1:]))


def test_log_prob_gradient_equals_finite_differences_and_missing_values_have_none() -> None:
    likelihood = TableLikelihood(CONFIG).double()
    x, output = scaled_rows(6).double(), output_for(12).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda values: likelihood.log_prob(values, x), output)
    (gradient,) = torch.autograd.grad(likelihood.log_prob(output, x).sum(), output)
    assert not gradient[:, 0, 3:6][x[:, 0].isnan().repeat(2)].any()
    assert gradient[:, 0, 3:6][~x[:, 0].isnan().repeat(2)].any()


@pytest.mark.parametrize("size", [0.0, 1e-30, 50.0, 1e4])
def test_log_prob_and_gradient_of_extreme_outputs_are_finite(size: float) -> None:
    likelihood, x = TableLikelihood(CONFIG), scaled_rows(8)
    output = (size * output_for(8).sign()).requires_grad_()
    log_prob = likelihood.log_prob(output, x)
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all()
    assert output.grad is not None
    assert torch.isfinite(output.grad).all()


def test_probabilities_of_all_rows_of_names_add_up_to_one() -> None:
    config = ModelConfig(columns=(3, 1, 2, 4))
    every = torch.tensor(list(itertools.product(range(3), range(2), range(2), range(4))), dtype=torch.float32)
    output = torch.randn(1, 1, 10).repeat(len(every), 1, 1)
    assert TableLikelihood(config)(output).log_prob(every).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_draws_have_the_probabilities_and_moments_of_their_columns() -> None:
    output, n = output_for(2), 20_000
    torch.manual_seed(0)
    draws = TableLikelihood(CONFIG)(output).sample(torch.Size([n]))
    assert draws.shape == (n, 2, 5)
    y = output.squeeze(1)
    for column, logits in ((0, y[:, 3:6]), (3, y[:, 6:8])):
        shares = torch.stack([(draws[..., column] == code).float().mean(dim=0) for code in range(logits.shape[1])], 1)
        torch.testing.assert_close(shares, logits.softmax(dim=1), atol=0.02, rtol=0)
    torch.testing.assert_close(draws[..., 2].mean(dim=0), y[:, 2].sigmoid(), atol=0.02, rtol=0)
    torch.testing.assert_close(draws[..., [1, 4]].mean(dim=0), y[:, :2], atol=0.03, rtol=0)
    torch.testing.assert_close(draws[..., [1, 4]].std(dim=0), torch.full((2, 2), 0.7), atol=0.03, rtol=0)


def test_mean_has_means_of_quantities_and_the_likeliest_of_all_else() -> None:
    output = output_for(30)
    y = output.squeeze(1)
    likely = (y[:, 3:6].argmax(dim=1), y[:, 0], y[:, 2] > 0, y[:, 6:8].argmax(dim=1), y[:, 1])
    torch.testing.assert_close(TableLikelihood(CONFIG).mean(output), torch.stack([part.float() for part in likely], 1))


def test_values_as_likely_as_others_are_not_decided() -> None:
    output = torch.tensor([[[0.0, 0.0, 1e-5, 1.0, 1.0, 0.0, 1.0, 2.0]], [[0.0, 0.0, 1.0, 1.0, 2.0, 0.0, 1.0, 1.0001]]])
    got = TableLikelihood(CONFIG).decided(output)
    assert got.tolist() == [[False, True, False, True, True], [True, True, True, False, True]]


def test_learned_std_of_each_column_converges_to_that_of_its_values() -> None:
    likelihood = TableLikelihood(ModelConfig(columns=(0, 2, 0)))
    x = torch.stack([3 * torch.randn(2000), torch.zeros(2000), 0.2 * torch.randn(2000)], dim=1)
    x[:500, 2] = math.nan
    optimizer = torch.optim.LBFGS(likelihood.parameters(), max_iter=200)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = -likelihood.log_prob(torch.zeros(2000, 1, 4), x).mean()
        value.backward()
        return value

    optimizer.step(loss)
    wanted = torch.stack([x[:, 0].square().mean().sqrt(), x[500:, 2].square().mean().sqrt()])
    torch.testing.assert_close(likelihood.std.detach(), wanted, rtol=1e-2, atol=0)


def test_input_is_scikit_learns_one_hot_beside_values_and_channels_of_gaps() -> None:
    x = scaled_rows()
    got = TableInput(CONFIG)(x)
    codes = x[:, [0, 3]].numpy()
    one_hot = OneHotEncoder(categories=[[0, 1, 2], [0, 1]], handle_unknown="ignore", sparse_output=False)
    wanted = np.concatenate(
        [x[:, [1, 2, 4]].nan_to_num(), one_hot.fit(np.zeros((1, 2))).transform(codes), x[:, [0, 4]].isnan()], axis=1
    )
    np.testing.assert_array_equal(got.numpy(), wanted)


def test_scaling_is_of_observed_quantities_alone_and_leaves_codes_and_gaps() -> None:
    rows = rows_of()
    scaling = Preprocessing.fit(rows, "table", columns=COLUMNS)
    x = scaling(torch.from_numpy(rows)).numpy()
    np.testing.assert_array_equal(x[:, [0, 2, 3]], rows[:, [0, 2, 3]])
    np.testing.assert_allclose(np.nanmean(x[:, [1, 4]], axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.nanstd(x[:, [1, 4]], axis=0), 1, rtol=1e-4)
    np.testing.assert_array_equal(np.isnan(x), np.isnan(rows))
    np.testing.assert_allclose(scaling.inverse(torch.from_numpy(x)).numpy(), rows, rtol=1e-5)


def test_views_of_a_row_hold_values_of_the_columns_they_stand_in() -> None:
    x = scaled_rows(200)
    torch.manual_seed(0)
    view = augment(x, ("replacement",))
    assert not torch.equal(view.nan_to_num(9), x.nan_to_num(9))
    for column in range(5):
        # The replaced values come from another row: NaN from NaN, a whole code from a whole code.
        got, had = (set(values[:, column].nan_to_num(-99).tolist()) for values in (view, x))
        assert got <= had


def test_masking_makes_values_missing_and_the_clean_row_must_come_out() -> None:
    vae = VAE.for_rows(CONFIG, rows_of())
    objective = OBJECTIVES["elbo"](TrainConfig(corruption="masking", corruption_level=0.5))
    rows = torch.from_numpy(rows_of())
    x, given = objective.look(vae, rows)
    changed = given.isnan() & ~x.isnan()
    assert 0.35 < changed.float().mean() < 0.65
    torch.testing.assert_close(given[~given.isnan()], x[~given.isnan()])


@pytest.mark.parametrize("name", ["elbo", "contrastive", "iwae", "mmd"])
def test_objective_of_rows_with_gaps_is_finite_and_so_are_its_gradients(name: str) -> None:
    vae = VAE.for_rows(CONFIG, rows_of()).train()
    terms = OBJECTIVES[name](TrainConfig(objective=name, n_samples=2))(vae, torch.from_numpy(rows_of()), kl_weight=1.0)
    terms.objective.mean().backward()
    assert all(torch.isfinite(term).all() for term in terms)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in vae.parameters())


def test_bound_of_a_row_grows_when_an_unlikely_value_goes_missing() -> None:
    vae = VAE.for_rows(CONFIG, rows_of())
    odd = rows_of(1, gaps=0)
    odd[0, 4] = 90.0
    gap = odd.copy()
    gap[0, 4] = np.nan
    whole, part = importance_weighted_bound(vae, np.concatenate([odd, gap]))
    assert part > whole + 100


def test_exported_encoder_takes_gaps_as_torch_does_row_by_row() -> None:
    rows = rows_of(9)
    rows[0, [0, 4]] = np.nan
    vae = VAE.for_rows(CONFIG, rows_of()).eval()
    session = onnxruntime.InferenceSession(export_encoder(vae, rows), providers=["CPUExecutionProvider"])
    (mean,) = session.run(["mean"], {"rows": rows})
    with torch.no_grad():
        np.testing.assert_allclose(mean, vae.features(torch.from_numpy(rows))[0].numpy(), atol=1e-5)
    one_by_one = np.concatenate([session.run(["mean"], {"rows": row[None]})[0] for row in rows])
    np.testing.assert_array_equal(mean, one_by_one)


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"likelihood": "gaussian"}, "likelihood='auto'"),
        ({"network": "conv"}, "network='mlp'"),
        ({"prior": "vamp"}, "prior='mixture'"),
        ({"gaussian_std": "optimal"}, "gaussian_std='learned'"),
        ({"binarize": True}, "leave it out"),
        ({"optional_columns": (2,)}, "optional_columns"),
        ({"columns": (-1,)}, "columns"),
    ],
)
def test_settings_that_a_table_cannot_have_are_refused_with_those_it_can(
    settings: dict[str, object], advice: str
) -> None:
    with pytest.raises(ConfigError, match=advice):
        ModelConfig(**{"columns": (0, 2), **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [np.full((3, 5), 0.5), np.full((3, 5), 7.0), np.zeros((3, 4))])
def test_rows_that_are_not_the_tables_are_refused(rows: np.ndarray) -> None:
    with pytest.raises(InputError, match="column"):
        VAE.for_rows(CONFIG, rows.astype(np.float32))


def test_table_likelihood_without_columns_says_how_to_get_them() -> None:
    with pytest.raises(ConfigError, match=r"load_rows\(X, categorical="):
        VAE.for_rows(ModelConfig(likelihood="table"), np.zeros((3, 4), np.float32))
