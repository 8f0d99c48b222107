"""Diagnostics against closed forms of linear-Gaussian models, and collapse called by its name."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Categorical, MultivariateNormal, Normal, kl_divergence

from vaefeat import ModelConfig, TrainConfig
from vaefeat.errors import ConfigError, InputError
from vaefeat.model import diagnostics
from vaefeat.model.diagnostics import Bounds, diagnose, rate_distortion
from vaefeat.model.vae import VAE
from vaefeat.training import Trainer

N_FEATURES, LATENT_DIM, STD = 6, 2, 0.5


class Linear:
    """x = W z + noise, with q(z|x) = N(A x, diag(v)): everything about it is a Gaussian.

    A and v are those of the true posterior's mean and marginals, v times exp(`widen`).
    """

    def __init__(self, *, n_rows: int = 2000, widen: float = 0.0, **settings: Any) -> None:
        torch.manual_seed(0)
        config = ModelConfig(
            network="mlp",
            latent_dim=LATENT_DIM,
            hidden_dims=(N_FEATURES,),
            likelihood="gaussian",
            gaussian_std=STD,
            **settings,
        )
        self.vae = VAE(config, (N_FEATURES,))
        self.weight = torch.randn(N_FEATURES, LATENT_DIM)
        covariance = torch.linalg.inv(torch.eye(LATENT_DIM) + self.weight.T @ self.weight / STD**2)
        self.encode, self.variance = covariance @ self.weight.T / STD**2, covariance.diagonal() * math.exp(widen)
        decoder = torch.nn.Linear(LATENT_DIM, N_FEATURES)
        self.vae.encoder = torch.nn.Identity()  # type: ignore[assignment]
        self.vae.decoder = torch.nn.Sequential(decoder, torch.nn.Unflatten(1, (1, -1)))  # type: ignore[assignment]
        self.of_rows = self.weight @ self.weight.T + STD**2 * torch.eye(N_FEATURES)
        x = MultivariateNormal(torch.zeros(N_FEATURES), self.of_rows).sample(torch.Size([n_rows]))
        self.rows: NDArray[np.float32] = x.numpy()
        with torch.no_grad():
            decoder.weight.copy_(self.weight)
            decoder.bias.zero_()
            self.parameter("mean.weight").copy_(self.encode)
            self.parameter("mean.bias").zero_()
            if config.posterior != "deterministic":
                self.parameter("logvar.weight").zero_()
                self.parameter("logvar.bias").copy_(self.variance.log())

    def parameter(self, name: str) -> Tensor:
        return self.vae.posterior.get_parameter(name)

    def aggregate(self) -> MultivariateNormal:
        """Give q(z) for rows from the model."""
        covariance = self.encode @ self.of_rows @ self.encode.T + torch.diag(self.variance)
        return MultivariateNormal(torch.zeros(LATENT_DIM), covariance)


def prior() -> MultivariateNormal:
    return MultivariateNormal(torch.zeros(LATENT_DIM), torch.eye(LATENT_DIM))


@pytest.mark.parametrize("widen", [-1.0, 0.0, 2.0])
def test_information_and_aggregate_lie_within_their_bounds(widen: float) -> None:
    model = Linear(widen=widen)
    got = diagnose(model.vae, model.rows, n_mixture=1500)
    # I(x; z) is the entropy of q(z) less that of q(z|x).
    log_determinants = torch.logdet(model.aggregate().covariance_matrix) - model.variance.log().sum()
    information = 0.5 * log_determinants.item()
    divergence = kl_divergence(model.aggregate(), prior()).item()
    assert got.mutual_information is not None
    assert got.aggregate_kl is not None
    noise = 0.1
    assert got.mutual_information.lower - noise < information < got.mutual_information.upper + noise
    assert got.aggregate_kl.lower - noise < divergence < got.aggregate_kl.upper + noise
    assert got.mutual_information.upper - got.mutual_information.lower < 0.2
    assert got.aggregate_kl.upper - got.aggregate_kl.lower < 0.2


def test_rate_is_information_and_divergence_of_the_aggregate() -> None:
    model = Linear(widen=2.0)
    got = diagnose(model.vae, model.rows)
    assert got.rate is not None
    assert got.mutual_information is not None
    assert got.aggregate_kl is not None
    assert got.aggregate_kl.lower > 0.3  # not the trivial case
    assert got.mutual_information.lower + got.aggregate_kl.upper == pytest.approx(got.rate, abs=0.1)
    assert got.mutual_information.upper + got.aggregate_kl.lower == pytest.approx(got.rate, abs=0.1)


def test_information_is_at_most_the_logarithm_of_the_rows_and_its_upper_bound_says_so() -> None:
    model = Linear(n_rows=50)
    model.parameter("logvar.bias").data.fill_(-11.0)  # posteriors that do not touch
    got = diagnose(model.vae, model.rows)
    assert got.mutual_information is not None
    assert got.rate is not None
    assert got.mutual_information.lower == pytest.approx(math.log(50), abs=1e-4)
    assert got.mutual_information.upper == pytest.approx(got.rate)


def test_rate_and_distortion_equal_their_closed_forms() -> None:
    model = Linear(widen=0.7)
    got = diagnose(model.vae, model.rows, n_samples=32)
    x = torch.from_numpy(model.rows)
    mean_BL = x @ model.encode.T
    rate = 0.5 * (mean_BL.square() + model.variance - 1 - model.variance.log()).sum(dim=1).mean().item()
    error = (x - mean_BL @ model.weight.T).square().sum(dim=1).mean().item()
    error += (model.weight.square() * model.variance).sum().item()
    distortion = 0.5 * error / STD**2 + N_FEATURES * math.log(STD * math.sqrt(2 * math.pi))
    assert got.rate == pytest.approx(rate, rel=1e-5)
    assert got.distortion == pytest.approx(distortion, abs=0.05)
    assert got.rate is not None
    assert got.elbo == -got.rate - got.distortion
    assert rate_distortion(model.vae, model.rows, n_samples=32) == (got.rate, got.distortion)


def test_divergence_of_a_latent_is_its_own_and_sums_to_the_rate() -> None:
    model = Linear()
    got = diagnose(model.vae, model.rows)
    mean_BL = torch.from_numpy(model.rows) @ model.encode.T
    wanted = kl_divergence(Normal(mean_BL, model.variance.sqrt()), Normal(0.0, 1.0)).mean(dim=0)
    np.testing.assert_allclose(got.kl_per_unit, wanted, rtol=1e-5)  # type: ignore[arg-type]
    assert sum(got.kl_per_unit or ()) == pytest.approx(got.rate)


def untrained(rows: NDArray[Any], **settings: Any) -> VAE:
    torch.manual_seed(0)
    vae = VAE.for_rows(ModelConfig(hidden_dims=(16,), **{"latent_dim": 3, **settings}), rows)
    with torch.no_grad():
        for parameter in vae.posterior.parameters():
            parameter.mul_(2)
    return vae


@pytest.fixture
def rows() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)


def test_divergences_of_a_full_covariance_are_those_of_its_marginals(rows: NDArray[np.float32]) -> None:
    vae = untrained(rows, posterior="full")
    vae.posterior.get_parameter("below.bias").data.fill_(0.8)
    got = diagnose(vae, rows)
    with torch.no_grad():
        q = vae.encode(vae.preprocessing(torch.from_numpy(rows)))
        assert isinstance(q, MultivariateNormal)
        deviations = q.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
        wanted = kl_divergence(Normal(q.loc, deviations), Normal(0.0, 1.0)).mean(dim=0)
        standard = MultivariateNormal(torch.zeros(3), torch.eye(3))
        assert got.rate == pytest.approx(kl_divergence(q, standard).mean().item(), rel=1e-5)
    np.testing.assert_allclose(got.kl_per_unit, wanted, rtol=1e-4)  # type: ignore[arg-type]
    assert sum(got.kl_per_unit or ()) < (got.rate or 0) - 0.05


def test_categorical_divergence_is_one_figure_a_variable(rows: NDArray[np.float32]) -> None:
    vae = untrained(rows, posterior="categorical", latent_dim=12, n_categories=4)
    got = diagnose(vae, rows)
    with torch.no_grad():
        h_BF = vae.hidden(vae.preprocessing(torch.from_numpy(rows)))
        probabilities = vae.posterior.statistics(h_BF)[0].view(-1, 3, 4)
        wanted = kl_divergence(Categorical(probabilities), Categorical(torch.ones(4))).mean(dim=0)
    np.testing.assert_allclose(got.kl_per_unit, wanted, rtol=1e-4)  # type: ignore[arg-type]
    assert got.n_units == 3
    assert got.rate == pytest.approx(wanted.sum().item(), rel=1e-4)
    assert got.aggregate_mean == pytest.approx(probabilities.mean(dim=0).flatten().tolist(), rel=1e-4)
    # Each value is 0 or 1 under q(z).
    assert got.aggregate_variance == pytest.approx([m * (1 - m) for m in got.aggregate_mean], rel=1e-4)


def test_information_of_clear_categories_is_the_logarithm_of_their_number() -> None:
    rows = np.repeat(np.eye(4, dtype=np.float32), 100, axis=0)
    vae = untrained(rows, posterior="categorical", latent_dim=4, n_categories=4)
    vae.encoder = torch.nn.Identity()  # type: ignore[assignment]
    vae.posterior = type(vae.posterior)(vae.config, 4)
    with torch.no_grad():
        vae.posterior.get_parameter("logits.weight").copy_(20 * torch.eye(4))
    got = diagnose(vae, rows)
    assert got.mutual_information == pytest.approx((math.log(4), math.log(4)), abs=0.02)
    assert got.aggregate_kl == pytest.approx((0, 0), abs=0.02)
    assert got.rate == pytest.approx(math.log(4), abs=0.01)


@pytest.mark.parametrize(("posterior", "prior"), [("planar", "learned"), ("iaf", "mixture"), ("diagonal", "flow")])
def test_rate_without_a_closed_form_is_estimated(posterior: str, prior: str, rows: NDArray[np.float32]) -> None:
    rows = rows[:100]
    vae = untrained(rows, posterior=posterior, prior=prior, prior_components=3, flow_hidden_dim=16)
    got = diagnose(vae, rows, n_samples=64)
    with torch.no_grad():
        q, p = vae.encode(vae.preprocessing(torch.from_numpy(rows))), vae.prior_distribution()
        z_SBL = q.rsample(torch.Size([200]))
        wanted = (q.log_prob(z_SBL) - p.log_prob(z_SBL)).mean().item()
    assert got.rate == pytest.approx(wanted, abs=0.1)
    assert got.kl_per_unit is None
    assert got.aggregate_mean == pytest.approx(z_SBL.mean(dim=(0, 1)).tolist(), abs=0.1)
    assert got.aggregate_variance == pytest.approx(z_SBL.flatten(0, 1).var(dim=0).tolist(), rel=0.15)
    # A flow's density is only known where it has drawn.
    assert (got.mutual_information is None) == (posterior != "diagonal")


def silence(vae: VAE, latents: slice) -> None:
    """Make the posterior of some latents N(0, 1) for every row."""
    with torch.no_grad():
        for name in ("mean", "logvar"):
            vae.posterior.get_parameter(f"{name}.weight")[latents] = 0
            vae.posterior.get_parameter(f"{name}.bias")[latents] = 0


def test_model_that_uses_its_latents_has_no_collapse() -> None:
    model = Linear()
    got = diagnose(model.vae, model.rows)
    assert got.collapse == "none"
    assert got.active == got.informative == (0, 1)
    assert "all 2 latents" in got.advice


def test_full_collapse_is_named_with_what_to_try() -> None:
    model = Linear()
    silence(model.vae, slice(None))
    got = diagnose(model.vae, model.rows)
    assert got.collapse == "full"
    assert got.active == got.informative == ()
    assert got.rate == pytest.approx(0, abs=1e-6)
    assert got.mutual_information == pytest.approx((0, 0), abs=1e-6)
    for remedy in ("none of 2 latents", "kl_weight", "kl_warmup", "free_bits", "smaller decoder"):
        assert remedy in got.advice


def test_partial_collapse_is_named_with_its_latents() -> None:
    model = Linear()
    silence(model.vae, slice(0, 1))
    got = diagnose(model.vae, model.rows)
    assert got.collapse == "partial"
    assert got.informative == (1,)
    assert "1 of 2 latents" in got.advice


@pytest.mark.parametrize("posterior", ["planar", "iaf"])
def test_collapse_under_a_flow_is_named_though_means_of_its_samples_vary(
    posterior: str, rows: NDArray[np.float32]
) -> None:
    vae = untrained(rows, posterior=posterior)
    assert diagnose(vae, rows).collapse == "none"
    vae.encoder = torch.nn.Sequential(vae.encoder, torch.nn.Threshold(1e9, 1.0))  # type: ignore[assignment]
    got = diagnose(vae, rows)
    assert got.collapse == "full"
    assert "free_bits" not in got.advice  # which a flow cannot have


def test_categorical_variable_that_is_always_the_same_is_collapsed(rows: NDArray[np.float32]) -> None:
    vae = untrained(rows, posterior="joint", latent_dim=9, n_categories=4, n_categorical=2)
    with torch.no_grad():
        for name in ("weight", "bias"):
            vae.posterior.get_parameter(f"categorical.logits.{name}")[:4] = 0
    got = diagnose(vae, rows)
    assert got.n_units == 3
    assert got.informative == (0, 2)
    assert got.collapse == "partial"
    assert "2 of 3 latents and categorical variables" in got.advice


def test_scale_of_a_latent_decides_about_activity_but_not_about_collapse() -> None:
    model = Linear(prior="learned")
    with torch.no_grad():
        # The same model with latents a twentieth as large, and a prior that has followed.
        model.parameter("mean.weight").mul_(0.05)
        model.parameter("logvar.bias").add_(2 * math.log(0.05))
        next(model.vae.decoder.parameters()).mul_(20)
        model.vae.prior.get_parameter("log_scale").fill_(math.log(0.05))
    got = diagnose(model.vae, model.rows)
    assert got.active == ()
    assert got.informative == (0, 1)
    assert got.collapse == "none"
    assert got.rate == pytest.approx(diagnose(Linear().vae, model.rows).rate, rel=1e-4)


def test_likelihood_that_is_too_wide_is_told_as_the_reason(rows: NDArray[np.float32]) -> None:
    largest = np.linalg.eigvalsh(np.cov(rows.T, bias=True))[-1]
    config = ModelConfig(latent_dim=2, hidden_dims=(8,), gaussian_std=1.5)
    vae = VAE(config, (4,))
    silence(vae, slice(None))
    advice = diagnose(vae, rows).advice
    assert f"largest eigenvalue of the rows' covariance, {largest:.3g}" in advice
    assert "gaussian_std='learned'" in advice
    model = Linear()
    silence(model.vae, slice(None))
    assert "eigenvalue" not in diagnose(model.vae, model.rows).advice


def test_collapse_of_a_real_training_run_is_named(digits_rows: NDArray[np.uint8]) -> None:
    small = ModelConfig(network="mlp", latent_dim=4, hidden_dims=(32,))
    verdicts = {}
    for kl_weight in (0.5, 500.0):
        train = TrainConfig(max_epochs=8, kl_weight=kl_weight, batch_size=64, threads=1)
        torch.manual_seed(0)
        vae = VAE.for_rows(small, digits_rows[:600])
        Trainer(vae, digits_rows[:600], train).run()
        verdicts[kl_weight] = diagnose(vae, digits_rows[600:900]).collapse
    assert verdicts == {0.5: "none", 500.0: "full"}


def test_auto_encoder_is_told_what_makes_sense() -> None:
    model = Linear(posterior="deterministic")
    got = diagnose(model.vae, model.rows)
    with torch.no_grad():
        x = torch.from_numpy(model.rows)
        z_BL = x @ model.encode.T
        wanted = -model.vae.log_likelihood(x, z_BL).mean().item()
    assert got.distortion == pytest.approx(wanted, rel=1e-5)
    assert got.active == got.informative == (0, 1)
    assert got.collapse == "none"
    assert got.aggregate_variance == pytest.approx(z_BL.var(dim=0, correction=0).tolist(), rel=1e-4)
    missing = (got.rate, got.elbo, got.kl_per_unit, got.mutual_information, got.aggregate_kl)
    assert missing == (None,) * 5
    json.dumps(got.to_dict())
    with pytest.raises(ConfigError, match="posterior='deterministic'"):
        rate_distortion(model.vae, model.rows)


def test_aggregate_is_compared_in_pieces_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Linear(n_rows=101)
    wanted = diagnose(model.vae, model.rows)
    monkeypatch.setattr(diagnostics, "_VALUES_AT_A_TIME", 7 * 101 * LATENT_DIM)
    got = diagnose(model.vae, model.rows, batch_size=13)
    assert got.mutual_information == pytest.approx(wanted.mutual_information, abs=1e-5)
    assert got.aggregate_kl == pytest.approx(wanted.aggregate_kl, abs=1e-5)


def test_mixture_is_made_of_as_many_rows_as_asked_for() -> None:
    model = Linear()
    got = diagnose(model.vae, model.rows, n_mixture=20)
    assert got.n_mixture == 20
    assert got.n_rows == 2000
    assert got.mutual_information is not None
    assert got.mutual_information.lower < math.log(20)


def test_diagnostics_are_plain_values_for_json() -> None:
    model = Linear(n_rows=30)
    got = diagnose(model.vae, model.rows)
    plain = json.loads(json.dumps(got.to_dict()))
    assert plain["active"] == [0, 1]
    assert Bounds(**plain["mutual_information"]) == got.mutual_information
    assert plain["kl_per_unit"] == list(got.kl_per_unit or ())
    assert plain["collapse"] == "none"


def test_diagnostics_repeat_themselves_and_leave_generator_and_mode_as_they_were() -> None:
    vae = VAE(ModelConfig(latent_dim=2, hidden_dims=(8,), binarize=True), (5,)).train()
    rows = np.random.default_rng(0).random((40, 5)).astype(np.float32)
    state = torch.get_rng_state()
    assert diagnose(vae, rows) == diagnose(vae, rows)
    assert diagnose(vae, rows, seed=1) != diagnose(vae, rows)
    assert torch.equal(state, torch.get_rng_state())
    assert vae.training


@pytest.mark.parametrize("settings", [{"n_samples": 1}, {"n_mixture": 1}, {"batch_size": 0}])
def test_size_that_is_too_small_is_refused_by_name(settings: dict[str, int]) -> None:
    model = Linear(n_rows=4)
    ((name, value),) = settings.items()
    with pytest.raises(InputError, match=f"{name}={value}"):
        diagnose(model.vae, model.rows, **settings)


def test_single_row_is_refused() -> None:
    model = Linear(n_rows=1)
    with pytest.raises(InputError, match="at least two"):
        diagnose(model.vae, model.rows)
