"""Models trained together are the models that would be trained alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer
from torch import Tensor

from vaefeat import ModelConfig, TrainConfig
from vaefeat.ensemble import Ensemble, bytes_of
from vaefeat.errors import ConfigError, NonFiniteLossError
from vaefeat.model.distributions import OneHot
from vaefeat.model.evaluation import fixed_noise
from vaefeat.model.objectives import OBJECTIVES
from vaefeat.model.stacked import StackedVAE
from vaefeat.model.vae import VAE
from vaefeat.training import Trainer, TrainingResult

CPU = torch.device("cpu")
MODEL = ModelConfig(latent_dim=4, hidden_dims=(16,), network="mlp")
CONV = ModelConfig(latent_dim=4, hidden_dims=(16,), channels=(8, 16), residual_blocks=1)
#: Without noise, what is trained together must be what is trained alone, but for the rounding.
AUTOENCODER = replace(MODEL, posterior="deterministic")
TRAIN = TrainConfig(max_epochs=3, batch_size=64, device="cpu", threads=1, precision="float32", compile=False)
WITHOUT_NOISE = replace(TRAIN, objective="reconstruction")


def built(model: ModelConfig, train: TrainConfig, rows: NDArray[Any]) -> VAE:
    with fixed_noise(train.seed, CPU):
        return VAE.for_rows(model, rows)


def trained_together(
    models: Sequence[ModelConfig], trains: Sequence[TrainConfig], rows: NDArray[Any]
) -> tuple[list[VAE], list[TrainingResult | NonFiniteLossError]]:
    vaes = [built(model, train, rows) for model, train in zip(models, trains, strict=True)]
    return vaes, Ensemble(vaes, rows, trains).run()


def assert_same_training(models: Sequence[ModelConfig], trains: Sequence[TrainConfig], rows: NDArray[Any]) -> None:
    vaes, results = trained_together(models, trains, rows)
    for model, train, vae, result in zip(models, trains, vaes, results, strict=True):
        alone = built(model, train, rows)
        wanted = Trainer(alone, rows, train).run()
        assert isinstance(result, TrainingResult)
        assert vae.state_dict().keys() == alone.state_dict().keys()
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(vae.state_dict()[name], value, atol=2e-5, rtol=1e-4, msg=name)
        np.testing.assert_array_equal(result.heldout, wanted.heldout)
        np.testing.assert_array_equal(result.heldout_rows, wanted.heldout_rows)
        assert result.evaluation.elbo == pytest.approx(wanted.evaluation.elbo, rel=1e-5)
        assert result.evaluation.active == wanted.evaluation.active
        assert len(result.history) == len(wanted.history)
        for ours, theirs in zip(result.history, wanted.history, strict=True):
            for name in ("train_elbo", "heldout_elbo", "heldout_objective", "learning_rate", "kl_weight"):
                assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-5), name
            assert ours.active_units == theirs.active_units


def test_models_of_any_latents_rates_and_seeds_equal_those_trained_alone(digits_rows: NDArray[np.uint8]) -> None:
    models = [replace(AUTOENCODER, latent_dim=latent_dim) for latent_dim in (7, 2, 4, 2, 7)]
    trains = [
        replace(WITHOUT_NOISE, learning_rate=3e-3, seed=5),
        replace(WITHOUT_NOISE, learning_rate=1e-3, seed=1, weight_decay=0.3),
        replace(WITHOUT_NOISE, learning_rate=3e-3, seed=1, kl_weight=4.0),
        replace(WITHOUT_NOISE, learning_rate=3e-3, seed=5, weight_decay=0.3),
        replace(WITHOUT_NOISE, learning_rate=1e-3, seed=0, weight_decay=0.3),
    ]
    assert_same_training(models, trains, digits_rows)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (replace(CONV, posterior="deterministic"), {"max_epochs": 2}),
        (AUTOENCODER, {"gradient_clip": 0.5}),
        (AUTOENCODER, {"optimizer": "sgd", "learning_rate": 1e-3, "weight_prior_std": 0.5}),
        (AUTOENCODER, {"optimizer": "adagrad", "lr_schedule": "constant", "n_samples": 2}),
        (AUTOENCODER, {"optimizer": "adam", "batch_size": 5000}),
        (AUTOENCODER, {"learning_rate": 0.02, "kl_warmup": 0.0, "patience": 2, "max_epochs": 12}),
    ],
    ids=["conv", "clipped", "sgd", "adagrad", "one batch", "patience"],
)
def test_any_training_equals_that_of_the_models_alone(
    digits_rows: NDArray[np.uint8], model: ModelConfig, settings: dict[str, Any]
) -> None:
    trains = [replace(WITHOUT_NOISE, **settings, seed=seed) for seed in (0, 1)]
    assert_same_training([replace(model, latent_dim=3), model], trains, digits_rows[:700])


def test_tables_with_a_learned_deviation_equal_those_of_the_models_alone() -> None:
    rows = load_breast_cancer().data.astype(np.float32)
    trains = [replace(WITHOUT_NOISE, seed=seed, max_epochs=8) for seed in (0, 1, 2)]
    assert_same_training([replace(AUTOENCODER, latent_dim=latents) for latents in (2, 5, 5)], trains, rows)


LATENTS = (3, 5, 3)


class FixedNoise:
    """Gives all that draws the same numbers, whether models are drawn for together or alone, padded or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, n_samples: int, n_rows: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.table = torch.randn(n_samples, len(LATENTS), n_rows, 2 * max(LATENTS), generator=generator)
        self.model: int | None = None
        for module in ("normal", "multivariate_normal"):
            monkeypatch.setattr(f"torch.distributions.{module}._standard_normal", lambda shape, **_: self.drawn(shape))
        monkeypatch.setattr(OneHot, "_gumbel", lambda onehot, shape: self.drawn(shape + onehot.log_probabilities.shape))

    def drawn(self, shape: Sequence[int]) -> Tensor:
        table = self.table if self.model is None else self.table[:, self.model, None].transpose(1, 2)
        n_values = int(np.prod(shape[2:]))
        return table[..., :n_values].reshape(tuple(shape))


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (MODEL, {}),
        (CONV, {"n_samples": 2}),
        (MODEL, {"kl_estimator": "sampled", "n_samples": 3, "weight_prior_std": 1.0}),
        (MODEL, {"objective": "iwae", "n_samples": 3}),
        (MODEL, {"objective": "iwae", "n_samples": 3, "gradient": "reparameterized"}),
        (MODEL, {"objective": "reconstruction"}),
        (replace(MODEL, posterior="full"), {"n_samples": 2}),
        (replace(MODEL, posterior="categorical", n_categories=2), {}),
        (replace(MODEL, posterior="joint", n_categories=2, latent_dim=5), {}),
        (replace(MODEL, likelihood="gaussian"), {"n_samples": 2}),
        (replace(MODEL, likelihood="gaussian", gaussian_std=0.5, normalization=False), {}),
        (replace(MODEL, likelihood="categorical", levels=17), {"n_samples": 2}),
        (replace(MODEL, likelihood="continuous_bernoulli", hidden_dims=(16, 8)), {}),
    ],
)
def test_bound_and_gradient_with_the_same_noise_equal_those_of_the_models_alone(
    digits_rows: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch, model: ModelConfig, settings: dict[str, Any]
) -> None:
    n_rows = 20
    latents = {"categorical": (4, 8, 4), "joint": (5, 5, 5)}.get(model.posterior, LATENTS)
    train = replace(TRAIN, **settings)
    objective = OBJECTIVES[train.objective](train)
    kl_weights = (0.5, 1.0, 4.0)
    vaes = [
        built(replace(model, latent_dim=n), replace(train, seed=seed), digits_rows) for seed, n in enumerate(latents)
    ]
    batches = [torch.from_numpy(digits_rows[:n_rows]), torch.from_numpy(digits_rows[n_rows : 2 * n_rows])]
    noise = FixedNoise(monkeypatch, n_samples=train.n_samples, n_rows=n_rows)
    wanted = []
    for number, (vae, kl_weight) in enumerate(zip(vaes, kl_weights, strict=True)):
        noise.model = number
        terms = objective(vae, batches[number % 2], kl_weight=kl_weight)
        weights = [weight for weight in vae.parameters() if weight.requires_grad]
        gradients = torch.autograd.grad(terms.objective.sum(), weights)
        wanted.append((terms, [gradient.clone() for gradient in gradients]))
    noise.model = None
    stack = StackedVAE(vaes, [0, 1, 0])
    terms = objective(stack, torch.cat(batches), kl_weight=torch.tensor(kl_weights).repeat_interleave(n_rows))
    gradients = torch.autograd.grad(terms.objective.sum(), list(stack.stacked.values()))
    for number, (terms_alone, gradients_alone) in enumerate(wanted):
        for together, alone in zip(terms, terms_alone, strict=True):
            torch.testing.assert_close(together.view(3, -1)[number], alone, atol=1e-3, rtol=1e-4)
        for name, together, alone in zip(stack.stacked, gradients, gradients_alone, strict=True):
            own = together[number][tuple(slice(size) for size in alone.shape)]
            torch.testing.assert_close(own, alone, atol=2e-3, rtol=1e-3, msg=name)


def test_padding_stays_zero_however_long_models_train(digits_rows: NDArray[np.uint8]) -> None:
    models = [replace(MODEL, latent_dim=latent_dim) for latent_dim in (2, 6)]
    trains = [replace(TRAIN, weight_decay=0.5, seed=seed) for seed in (0, 1)]
    ensemble = Ensemble([built(*pair, digits_rows) for pair in zip(models, trains, strict=True)], digits_rows, trains)
    assert set(ensemble.stack.masks) == {
        *(f"posterior.{head}.{part}" for head in ("mean", "logvar") for part in ("weight", "bias")),
        "decoder.layers.0.0.0.weight",
    }
    ensemble.run()
    for name, mask in ensemble.stack.masks.items():
        weight = ensemble.stack.stacked[name].detach()
        assert not weight[mask == 0].any(), name
        assert weight[mask == 1].all(), name


def test_heldout_bound_with_noise_is_that_of_models_alone_up_to_the_noise(digits_rows: NDArray[np.uint8]) -> None:
    trains = [replace(TRAIN, max_epochs=8, seed=seed, kl_weight=weight) for seed in range(3) for weight in (0.5, 2.0)]
    _, results = trained_together([MODEL] * len(trains), trains, digits_rows)
    for train, result in zip(trains, results, strict=True):
        assert isinstance(result, TrainingResult)
        alone = Trainer(built(MODEL, train, digits_rows), digits_rows, train).run()
        # Four nats were learned in this time, of which other noise changes less than a tenth.
        assert alone.history[-1].heldout_elbo > alone.history[0].heldout_elbo + 4
        assert result.evaluation.elbo == pytest.approx(alone.evaluation.elbo, abs=0.4)
        assert result.evaluation.kl == pytest.approx(alone.evaluation.kl, abs=0.4)


def test_a_model_that_fails_is_named_and_does_not_change_the_others(digits_rows: NDArray[np.uint8]) -> None:
    trains = [replace(TRAIN, seed=seed) for seed in range(3)]
    kept, fine = trained_together([MODEL] * 3, trains, digits_rows)
    trains[2] = replace(trains[2], learning_rate=1e30)
    vaes, results = trained_together([MODEL] * 3, trains, digits_rows)
    assert isinstance(results[2], NonFiniteLossError)
    assert "became nan in epoch 1, batch 2 of 26. Lower learning_rate (now 1e+30)" in str(results[2])
    for model in (0, 1):
        result, wanted = results[model], fine[model]
        assert isinstance(result, TrainingResult)
        assert isinstance(wanted, TrainingResult)
        assert result.evaluation.elbo == pytest.approx(wanted.evaluation.elbo, rel=1e-6)
        for name, value in kept[model].state_dict().items():
            torch.testing.assert_close(vaes[model].state_dict()[name], value, msg=name)


def test_training_ends_when_no_model_is_left(digits_rows: NDArray[np.uint8]) -> None:
    trains = [replace(TRAIN, learning_rate=1e30, seed=seed) for seed in range(2)]
    _, results = trained_together([MODEL] * 2, trains, digits_rows)
    assert all(isinstance(result, NonFiniteLossError) for result in results)


def test_training_twice_gives_the_same_weights_and_leaves_the_generator_alone(digits_rows: NDArray[np.uint8]) -> None:
    trains = [replace(TRAIN, max_epochs=1, seed=seed) for seed in range(2)]
    state = torch.get_rng_state()
    first, _ = trained_together([MODEL] * 2, trains, digits_rows)
    assert torch.equal(state, torch.get_rng_state())
    second, _ = trained_together([MODEL] * 2, trains, digits_rows)
    for ours, theirs in zip(first, second, strict=True):
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
    different = [value for name, value in first[0].state_dict().items() if "weight" in name]
    assert not torch.equal(different[0], next(v for n, v in first[1].state_dict().items() if "weight" in n))


def test_binary_rows_are_drawn_for_each_model_by_itself(digits_rows: NDArray[np.uint8]) -> None:
    vaes = [VAE.for_rows(replace(MODEL, binarize=True), digits_rows) for _ in range(2)]
    stack = StackedVAE(vaes, [0, 0])
    x = stack.observe(torch.from_numpy(digits_rows[:50]))
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(x[:50], x[50:])
    torch.testing.assert_close(
        stack.distribute(torch.from_numpy(digits_rows[:50]))[:50].mean(), x.mean(), atol=0.03, rtol=0
    )


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        (replace(MODEL, posterior="iaf"), {}, "got posterior='iaf'.*take 'diagonal' or 'full'.*one after another"),
        (replace(MODEL, prior="vamp"), {}, "got prior='vamp'.*take 'standard'"),
        (replace(MODEL, likelihood="tokens"), {}, "got likelihood='tokens'"),
        (replace(MODEL, likelihood="gaussian", gaussian_std="optimal"), {}, "gaussian_std='optimal'.*take .*'learned'"),
        (replace(MODEL, posterior="joint", latent_dim=14), {}, r"posterior='joint' with latent_dim of \[14, 15\]"),
        (MODEL, {"objective": "mmd"}, "got objective='mmd'.*take 'elbo' or 'iwae'"),
        (MODEL, {"optimizer": "muon"}, "got optimizer='muon'"),
        (MODEL, {"free_bits": 0.1}, "got free_bits=0.1"),
        (MODEL, {"corruption": "salt_and_pepper"}, "got corruption='salt_and_pepper'"),
        (MODEL, {"precision": "bfloat16"}, "got precision='bfloat16'.*take 'auto' or 'float32'"),
        (MODEL, {"compile": True}, "got compile=True"),
    ],
)
def test_what_cannot_be_trained_together_is_refused_by_name(
    digits_rows: NDArray[np.uint8], model: ModelConfig, settings: dict[str, Any], words: str
) -> None:
    vaes = [VAE.for_rows(replace(model, latent_dim=model.latent_dim + extra), digits_rows) for extra in (0, 1)]
    with pytest.raises(ConfigError, match=words):
        Ensemble(vaes, digits_rows, [replace(TRAIN, **settings)] * 2)


def test_memory_is_estimated_from_weights_and_what_layers_give(digits_rows: NDArray[np.uint8]) -> None:
    vae = VAE.for_rows(replace(MODEL, normalization=False), digits_rows)
    n_weights = sum(weight.numel() for weight in vae.parameters())
    encoded, decoded = 64 + 16 + 16, 16 + 16 + 64 + 64
    assert bytes_of(vae, replace(TRAIN, n_samples=2)) == 16 * n_weights + 12 * 64 * (encoded + 2 * decoded)


@pytest.mark.gpu
def test_models_on_a_gpu_equal_those_on_a_processor(digits_rows: NDArray[np.uint8]) -> None:
    models = [replace(CONV, posterior="deterministic", latent_dim=latents) for latents in (2, 5)]
    # One minibatch holds all rows: on a GPU their order is drawn there.
    train = replace(WITHOUT_NOISE, max_epochs=5, batch_size=5000)
    of = {
        device: trained_together(models, [replace(train, device=device)] * 2, digits_rows)[0]
        for device in ("cpu", "cuda")
    }
    for on_cpu, on_gpu in zip(of["cpu"], of["cuda"], strict=True):
        for name, value in on_cpu.state_dict().items():
            torch.testing.assert_close(on_gpu.state_dict()[name].cpu(), value, atol=1e-3, rtol=1e-2, msg=name)
