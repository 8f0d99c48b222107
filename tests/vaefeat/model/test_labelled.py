"""Bounds of the generative classifiers against loops over classes, torch.distributions and Monte Carlo."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal
from torch.nn import functional

from vaefeat import ModelConfig
from vaefeat.model.labelled import ADGM, LABELLED_MODELS, M1M2, M2, SDGM, JoinedLayer, LabelledVAE, Look
from vaefeat.model.networks import hidden_layer
from vaefeat.model.vae import VAE

N_CLASSES, N_ROWS, N_FEATURES = 3, 5, 6
CONFIG = ModelConfig(latent_dim=2, network="mlp", hidden_dims=(8,), likelihood="bernoulli")
LOG_PRIOR = torch.tensor([0.5, 0.3, 0.2]).log()
KINDS = ["m2", "m1m2", "adgm", "sdgm"]


def build(kind: str, config: ModelConfig = CONFIG, log_prior_K: Tensor = LOG_PRIOR) -> LabelledVAE:
    torch.manual_seed(0)
    if kind == "m1m2":
        base = VAE(ModelConfig(latent_dim=4, network="mlp", hidden_dims=(8,), likelihood="bernoulli"), (N_FEATURES,))
        return M1M2(config, base, log_prior_K=log_prior_K)
    auxiliary_dim = 0 if kind == "m2" else 3
    return LABELLED_MODELS[kind](config, (N_FEATURES,), log_prior_K=log_prior_K, auxiliary_dim=auxiliary_dim)


@pytest.fixture
def rows() -> Tensor:
    torch.manual_seed(1)
    return torch.rand(N_ROWS, N_FEATURES)


def given(model: LabelledVAE, rows: Tensor) -> Tensor:
    return model.eval().observe(rows)


def one_hot(label: int, n_rows: int) -> Tensor:
    return functional.one_hot(torch.full((n_rows,), label), N_CLASSES).float()


def concatenated(layer: JoinedLayer, *inputs: Tensor) -> Tensor:
    """Compute what a joined layer does, by the plain layer that it stands for."""
    joined: Tensor = layer.after(layer.linear(torch.cat(inputs, dim=-1)))
    return joined


def explicit_bound(model: LabelledVAE, x: Tensor, look: Look, label: int, noise: Tensor, kl_weight: float) -> Tensor:
    """Compute L(x, y) at given noise, for one class, from torch's own densities."""
    y = one_hot(label, len(x))
    gaussian = model.latents.gaussian
    hidden = concatenated(model.latents.joined, look.h_BF, y, look.a_BA)
    mean, std = gaussian.mean(hidden), (0.5 * gaussian.logvar(hidden)).exp()
    z = mean + std * noise
    auxiliary = [look.a_BA] if isinstance(model, SDGM) else []
    output = model.decoder(concatenated(model.decoded, z, y, *auxiliary))
    if isinstance(model, M1M2):
        std_x = model.likelihood.std
        assert isinstance(std_x, Tensor)
        log_likelihood = Normal(output.squeeze(1), std_x).log_prob(x).sum(dim=1)
    else:
        log_likelihood = Bernoulli(logits=output.squeeze(1), validate_args=False).log_prob(x).sum(dim=1)
    cost = -0.5 * (1 + 2 * std.log() - mean**2 - std**2).sum(dim=1)
    if isinstance(model, ADGM):
        q_mean, q_logvar = model.auxiliary_posterior.statistics(look.h_BF)
        seen = [y, z] if isinstance(model, SDGM) else [look.h_BF, y, z]
        p_mean, p_logvar = model.auxiliary_prior.gaussian.statistics(concatenated(model.auxiliary_prior.joined, *seen))
        cost = cost + Normal(q_mean, (0.5 * q_logvar).exp()).log_prob(look.a_BA).sum(dim=1)
        cost = cost - Normal(p_mean, (0.5 * p_logvar).exp()).log_prob(look.a_BA).sum(dim=1)
    bound: Tensor = log_likelihood + LOG_PRIOR[label] - kl_weight * cost
    return bound


@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_bound_of_a_labelled_row_equals_the_densities_of_torch(kind: str, rows: Tensor, kl_weight: float) -> None:
    model = build(kind)
    x = given(model, rows)
    torch.manual_seed(2)
    look = model.look(x)
    noise = torch.randn(N_ROWS, 2)
    for label in range(N_CLASSES):
        torch.manual_seed(2)
        terms = model.labelled(x, torch.full((N_ROWS,), label), kl_weight=kl_weight)
        # The first draw of a generator of this seed is a's; z's is the one after it.
        torch.manual_seed(2)
        model.look(x)
        noise = torch.randn(N_ROWS, 2)
        torch.testing.assert_close(terms.bound, explicit_bound(model, x, look, label, noise, kl_weight))


@pytest.mark.parametrize("kind", KINDS)
def test_bound_of_an_unlabelled_row_equals_a_loop_over_classes(kind: str, rows: Tensor) -> None:
    model = build(kind)
    x = given(model, rows)
    torch.manual_seed(3)
    terms = model.unlabelled(x)
    torch.manual_seed(3)
    look = model.look(x)
    noise_KBL = torch.randn(N_CLASSES, N_ROWS, 2)
    q_BK = torch.softmax(look.logits_BK, dim=1)
    expected = sum(
        q_BK[:, label] * (explicit_bound(model, x, look, label, noise_KBL[label], 1.0) - torch.log(q_BK[:, label]))
        for label in range(N_CLASSES)
    )
    torch.testing.assert_close(terms.bound, expected)


def test_bound_of_an_unlabelled_row_is_that_of_all_classes_less_a_kl_divergence(rows: Tensor) -> None:
    """U = log sum_y exp L(y) - KL(q(y|x) || softmax L): never above, and equal at the best q."""
    model = build("m2")
    x = given(model, rows)
    torch.manual_seed(4)
    bound_KB = model.joint_bound(model.look(x), x, torch.eye(N_CLASSES).unsqueeze(1)).detach()
    torch.manual_seed(4)
    terms = model.unlabelled(x)
    best = torch.log_softmax(bound_KB.T, dim=1)
    gap = (terms.log_q.exp() * (terms.log_q - best)).sum(dim=1)
    torch.testing.assert_close(terms.bound, bound_KB.logsumexp(dim=0) - gap)
    assert (gap > 0).all()


@pytest.mark.parametrize("kind", ["m2", "adgm", "sdgm"])
def test_bounds_lie_below_the_likelihood_that_sampling_finds(kind: str, rows: Tensor) -> None:
    """p(x, y), with z (and a) drawn from the model itself, and no q anywhere."""
    model = build(kind)
    n_draws = 200_000
    with torch.no_grad():
        x = given(model, rows[:1])
        torch.manual_seed(5)
        joint = []
        for label in range(N_CLASSES):
            z, y = torch.randn(n_draws, 2), one_hot(label, n_draws)
            parts = [z, y]
            if isinstance(model, SDGM):
                parts.append(model.auxiliary_prior(z[:, :0], y, z).sample())
            log_p = Bernoulli(logits=model.decoder(concatenated(model.decoded, *parts)).squeeze(1), validate_args=False)
            joint.append(log_p.log_prob(x).sum(dim=1).logsumexp(dim=0) - math.log(n_draws) + LOG_PRIOR[label])
        many = x.expand(4000, -1)
        for label, exact in enumerate(joint):
            bounds = model.labelled(many, torch.full((len(many),), label)).bound
            assert bounds.mean() < exact + 4 * bounds.std() / math.sqrt(len(many))
        bounds = model.unlabelled(many).bound
        marginal = torch.stack(joint).logsumexp(dim=0)
        assert bounds.mean() < marginal + 4 * bounds.std() / math.sqrt(len(many))
        # An untrained q is loose, but not lost.
        assert bounds.mean() > marginal - 10


@pytest.mark.parametrize("kind", KINDS)
def test_kl_divergence_is_part_of_both_bounds(kind: str, rows: Tensor) -> None:
    model = build(kind)
    x = given(model, rows)
    y = torch.arange(N_ROWS) % N_CLASSES
    for labelled in (True, False):
        found = []
        for weight in (0.0, 1.0, 2.0):
            torch.manual_seed(6)
            terms = model.labelled(x, y, kl_weight=weight) if labelled else model.unlabelled(x, kl_weight=weight)
            found.append(terms.bound)
        cost = found[0] - found[1]
        assert cost.abs().min() > 1e-4
        torch.testing.assert_close(found[1] - found[2], cost, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_log_q_is_that_of_logits_and_reaches_certainty(kind: str, rows: Tensor) -> None:
    """Fed with probabilities in the place of logits, log q of K classes could not rise above -log(1 + (K - 1) / e)."""
    model = build(kind)
    x = given(model, rows)
    logits = model.logits
    assert isinstance(logits, nn.Linear)
    with torch.no_grad():
        logits.weight.zero_()
        logits.bias.copy_(torch.tensor([30.0, 0.0, 0.0]))
        terms = model.labelled(x, torch.zeros(N_ROWS, dtype=torch.int64))
        torch.testing.assert_close(terms.log_q[:, 0], torch.zeros(N_ROWS), atol=1e-6, rtol=0)
        torch.testing.assert_close(terms.log_q[:, 1], torch.full((N_ROWS,), -30.0))
        log_p = model.class_log_probabilities(x)
    torch.testing.assert_close(log_p.exp().sum(dim=1), torch.ones(N_ROWS, dtype=torch.float64))
    torch.testing.assert_close(log_p[:, 1], torch.full((N_ROWS,), -30.0, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_both_bounds_have_gradients_for_every_part(kind: str, rows: Tensor) -> None:
    model = build(kind)
    x = given(model, rows)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert not any(name.startswith("base.") for name in trained)
    log_q = model.labelled(x, torch.zeros(N_ROWS, dtype=torch.int64))
    objective = model.unlabelled(x).bound.sum() + log_q.bound.sum()
    objective.backward()
    without = {name for name, weight in trained.items() if weight.grad is None or not weight.grad.any()}
    assert without == set()


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_rows_and_certain_classifiers_leave_bounds_and_gradients_finite(kind: str) -> None:
    model = build(kind)
    logits = model.logits
    assert isinstance(logits, nn.Linear)
    with torch.no_grad():
        logits.bias.copy_(torch.tensor([1e4, 0.0, -1e4]))
    x = given(model, torch.tensor([[0.0] * N_FEATURES, [1.0] * N_FEATURES]))
    bound = model.unlabelled(x).bound
    bound.sum().backward()
    assert torch.isfinite(bound).all()
    assert all(torch.isfinite(w.grad).all() for w in model.parameters() if w.grad is not None)


def test_joined_layer_equals_a_layer_over_the_concatenation_for_inputs_that_broadcast() -> None:
    torch.manual_seed(0)
    config = ModelConfig(hidden_dims=(8,))
    layer = JoinedLayer(config, (4, 0, 3))
    h_BF, y_K1K = torch.randn(5, 4), torch.eye(3).unsqueeze(1)
    found = layer(h_BF, h_BF[:, :0], y_K1K)
    expected = layer.after(layer.linear(torch.cat([h_BF.expand(3, 5, 4), y_K1K.expand(3, 5, 3)], dim=-1)))
    torch.testing.assert_close(found, expected)
    assert type(hidden_layer(config, 8)) is type(layer.after)


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_of_a_row_is_the_same_beside_others_and_in_training_mode(kind: str, rows: Tensor) -> None:
    """No layer normalises over the batch, and nothing is drawn."""
    model = build(kind)
    x = given(model, rows)
    with torch.no_grad():
        whole = model.class_log_probabilities(x)
        alone = torch.cat([model.class_log_probabilities(row[None]) for row in x])
        torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.train().class_log_probabilities(x), whole)


def test_prediction_with_an_auxiliary_variable_averages_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("adgm")
    x = torch.rand(1, N_FEATURES)
    with torch.no_grad():
        # So that a matters, and the mean of a's classes is not the class of a's mean.
        model.get_parameter("logits.weight").mul_(6)
        torch.manual_seed(0)
        drawn = torch.stack([model.look(x).logits_BK.softmax(dim=1)[0] for _ in range(4000)])
        monkeypatch.setattr("vaefeat.model.labelled._PREDICTION_SAMPLES", 4000)
        predicted = model.class_log_probabilities(x).exp()[0]
    error = float(drawn.std(dim=0).max()) / math.sqrt(4000)
    assert drawn.std(dim=0).max() > 0.05
    torch.testing.assert_close(predicted.float(), drawn.mean(dim=0), atol=6 * error, rtol=0)


def test_m2_over_m1_sees_m1s_posterior_means_while_training_too(rows: Tensor) -> None:
    model = build("m1m2")
    assert isinstance(model, M1M2)
    mean = model.base.encode(model.base.preprocessing(rows)).mean
    torch.testing.assert_close(model.train().observe(rows), mean)
    torch.testing.assert_close(model.eval().observe(rows), mean)


@pytest.mark.parametrize("kind", KINDS)
def test_style_and_generation_have_the_shape_and_range_of_rows(kind: str, rows: Tensor) -> None:
    model = build(kind).eval()
    with torch.no_grad():
        z = model.style(rows, one_hot(1, N_ROWS))
        made = model.generate(z, one_hot(2, N_ROWS))
        again = model.generate(model.style(rows, one_hot(1, N_ROWS)), one_hot(2, N_ROWS))
    assert z.shape == (N_ROWS, 2)
    assert made.shape == rows.shape
    assert (made >= 0).all()
    assert (made <= 1).all()
    torch.testing.assert_close(made, again, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["m2", "adgm", "sdgm"])
def test_style_and_generation_are_at_the_means_of_what_they_depend_on(kind: str, rows: Tensor) -> None:
    model, y = build(kind).eval(), one_hot(1, N_ROWS)
    with torch.no_grad():
        h_BF = model.encoder(rows)
        a_BA = h_BF[:, :0]
        if isinstance(model, ADGM):
            a_BA = model.auxiliary_posterior.statistics(h_BF)[0]
        wanted = model.latents.gaussian.mean(concatenated(model.latents.joined, h_BF, y, a_BA))
        z = model.style(rows, y)
        torch.testing.assert_close(z, wanted)
        seen = [z, y]
        if isinstance(model, SDGM):
            seen.append(model.auxiliary_prior.gaussian.mean(concatenated(model.auxiliary_prior.joined, y, z)))
        made = torch.sigmoid(model.decoder(concatenated(model.decoded, *seen)).squeeze(1))
        torch.testing.assert_close(model.generate(z, y), made)


def test_rows_that_are_coins_are_tossed_anew_at_each_look() -> None:
    model = M2(ModelConfig(latent_dim=2, binarize=True), (N_FEATURES,), log_prior_K=LOG_PRIOR)
    rows = torch.full((400, N_FEATURES), 0.25)
    first, second = model.observe(rows), model.observe(rows)
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert first.mean() == pytest.approx(0.25, abs=0.05)
    assert not torch.equal(first, second)


def test_changed_rows_stay_where_the_likelihood_has_a_meaning() -> None:
    config = ModelConfig(latent_dim=2, network="mlp", hidden_dims=(8,))
    images = torch.randint(0, 2, (6, 1, 8, 8), generator=torch.Generator().manual_seed(0)).float().numpy()
    model = M2.for_rows(config, images, log_prior_K=LOG_PRIOR)
    changed = model.observe(torch.from_numpy(images), ["brightness"])
    assert 0 <= changed.min() < changed.max() <= 1
    assert not torch.equal(changed, torch.from_numpy(images))


def test_images_are_enumerated_with_convolutional_encoders() -> None:
    config = ModelConfig(latent_dim=2, channels=(4,), hidden_dims=(8,))
    model = M2(config, (1, 8, 8), log_prior_K=LOG_PRIOR)
    x = torch.rand(4, 1, 8, 8)
    settings: dict[str, Any] = {"kl_weight": 0.5}
    assert model.unlabelled(x, **settings).bound.shape == (4,)
    assert any(isinstance(layer, nn.Conv2d) for layer in model.classifier.modules())
