"""Optimizers: torch's own with the settings given, every weight in one of them, and the prior on the weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Normal

from vaefeat import ModelConfig, TrainConfig
from vaefeat.model.vae import VAE
from vaefeat.optimizers import log_weight_prior, make_optimizers
from vaefeat.training import Trainer

CLASSES: dict[str, list[type[torch.optim.Optimizer]]] = {
    "adamw": [torch.optim.AdamW],
    "adam": [torch.optim.Adam],
    "adagrad": [torch.optim.Adagrad],
    "sgd": [torch.optim.SGD],
    "muon": [torch.optim.Muon, torch.optim.AdamW],
}


@pytest.fixture
def vae() -> VAE:
    torch.manual_seed(0)
    config = ModelConfig(latent_dim=3, hidden_dims=(8,), prior="flow", posterior="iaf", flow_hidden_dim=8)
    return VAE(config, (5,))


@pytest.fixture
def rows() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)


@pytest.mark.parametrize("name", CLASSES)
def test_name_gives_torchs_class_with_the_settings(name: str, vae: VAE) -> None:
    config = TrainConfig(optimizer=name, learning_rate=0.03, weight_decay=0.2, momentum=0.7)
    optimizers = make_optimizers(vae, config)
    assert [type(optimizer) for optimizer in optimizers] == CLASSES[name]
    for optimizer in optimizers:
        (group,) = optimizer.param_groups
        assert group["lr"] == 0.03
        # Decay is decoupled, or there is none: it never becomes part of the gradient.
        decays = isinstance(optimizer, torch.optim.AdamW | torch.optim.Muon)
        assert group["weight_decay"] == (0.2 if decays else 0)
        if name == "sgd":
            assert group["momentum"] == 0.7


@pytest.mark.parametrize("name", CLASSES)
def test_every_weight_is_in_one_optimizer_once(name: str, vae: VAE) -> None:
    held = [
        id(weight)
        for optimizer in make_optimizers(vae, TrainConfig(optimizer=name))
        for weight in optimizer.param_groups[0]["params"]
    ]
    assert sorted(held) == sorted(id(weight) for weight in vae.parameters())


def test_muon_takes_matrices_of_linear_layers_alone(vae: VAE) -> None:
    muon, _ = make_optimizers(vae, TrainConfig(optimizer="muon"))
    names = {id(weight): name for name, weight in vae.named_parameters()}
    taken = {names[id(weight)] for weight in muon.param_groups[0]["params"]}
    assert "encoder.layers.1.0.0.weight" in taken
    assert "posterior.mean.weight" in taken
    assert all(vae.get_parameter(name).ndim == 2 for name in taken)
    assert not any(name.endswith(("bias", "log_scale", "location")) for name in taken)


@pytest.mark.parametrize(("name", "shrinks"), [("adamw", True), ("adam", False), ("adagrad", False), ("sgd", False)])
def test_weight_decay_moves_weights_without_a_gradient_only_where_it_is_decoupled(name: str, shrinks: bool) -> None:
    layer = nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    (optimizer,) = make_optimizers(layer, TrainConfig(optimizer=name, learning_rate=0.1, weight_decay=0.5))
    for weight in layer.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before * (1 - 0.1 * 0.5 if shrinks else 1))


@pytest.mark.parametrize("name", CLASSES)
def test_every_optimizer_raises_the_bound(name: str, rows: NDArray[np.float32]) -> None:
    torch.manual_seed(0)
    vae = VAE.for_rows(ModelConfig(latent_dim=2, hidden_dims=(16,)), rows)
    rate = {"sgd": 0.01, "adagrad": 0.02}.get(name, 0.01)
    config = TrainConfig(optimizer=name, learning_rate=rate, max_epochs=30, batch_size=10, kl_warmup=0, device="cpu")
    history = Trainer(vae, rows, config).run().history
    assert history[-1].train_elbo > history[0].train_elbo + 0.3


@pytest.mark.parametrize("std", [0.3, 2.0])
def test_log_prior_of_weights_is_torchs_normal_but_for_a_constant(std: float, vae: VAE) -> None:
    torch.manual_seed(1)
    values = []
    for _ in range(2):
        for weight in vae.parameters():
            nn.init.normal_(weight)
        reference: Tensor = sum(Normal(0.0, std).log_prob(weight).sum() for weight in vae.parameters())
        values.append((log_weight_prior(vae.parameters(), std), reference))
    (first, first_reference), (second, second_reference) = values
    torch.testing.assert_close(second - first, second_reference - first_reference, rtol=1e-4, atol=1e-2)


def test_gradient_of_the_weights_prior_is_minus_the_weight_over_the_variance(vae: VAE) -> None:
    log_weight_prior(vae.parameters(), 0.5).backward()
    for weight in vae.parameters():
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, -weight.detach() / 0.25)


def test_weights_that_are_not_learned_have_no_prior() -> None:
    layer = nn.Linear(3, 3)
    layer.bias.requires_grad_(False)
    layer.bias.fill_(100.0)
    torch.testing.assert_close(log_weight_prior(layer.parameters(), 1.0), -0.5 * layer.weight.square().sum())


def weights_after_a_step(rows: NDArray[np.float32], **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train for one step of plain gradient descent on all rows: weights before and after."""
    torch.manual_seed(0)
    vae = VAE.for_rows(ModelConfig(latent_dim=2, hidden_dims=(8,)), rows)
    before = {name: weight.detach().clone() for name, weight in vae.named_parameters()}
    config = TrainConfig(
        optimizer="sgd",
        momentum=0.0,
        learning_rate=0.01,
        lr_warmup=0.0,
        lr_schedule="constant",
        gradient_clip=1e9,
        kl_warmup=0.0,
        max_epochs=1,
        batch_size=len(rows),
        device="cpu",
        **settings,
    )
    Trainer(vae, rows, config).run()
    return before, {name: weight.detach() for name, weight in vae.named_parameters()}


def test_maximum_a_posteriori_adds_a_rows_share_of_the_priors_gradient(rows: NDArray[np.float32]) -> None:
    before, likely = weights_after_a_step(rows)
    _, probable = weights_after_a_step(rows, weight_prior_std=0.1)
    n_trained = 45  # a tenth of 50 rows is held out
    for name, weight in before.items():
        wanted = 0.01 * -weight / 0.1**2 / n_trained
        torch.testing.assert_close(probable[name] - likely[name], wanted, atol=1e-6, rtol=1e-3)
