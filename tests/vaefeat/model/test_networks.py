"""Shapes, independence of rows, first weights, and refusals of encoder and decoder networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vaefeat import ModelConfig
from vaefeat.errors import ConfigError
from vaefeat.model.networks import ResidualBlock, build_networks, count_multiply_adds
from vaefeat.model.vae import VAE


@pytest.mark.parametrize(
    ("shape", "channels"),
    [
        ((1, 8, 8), (8, 16)),
        ((1, 28, 28), (8, 16)),
        ((3, 32, 32), (8, 16, 24)),
        ((2, 9, 13), (8, 16)),
        ((1, 17, 8), (5,)),
    ],
)
def test_convolutions_of_any_size_come_back_to_the_rows_shape(
    shape: tuple[int, ...], channels: tuple[int, ...]
) -> None:
    config = ModelConfig(network="conv", channels=channels, hidden_dims=(24, 12), latent_dim=5)
    encoder, decoder = build_networks(config, shape, n_parameters=2)
    assert encoder(torch.randn(3, *shape)).shape == (3, encoder.hidden_dim) == (3, 12)
    assert decoder(torch.randn(4, 5)).shape == (4, 2, *shape)


@pytest.mark.parametrize("shape", [(1,), (30,), (3, 4, 5)])
def test_mlp_of_any_shape_comes_back_to_the_rows_shape(shape: tuple[int, ...]) -> None:
    config = ModelConfig(network="mlp", hidden_dims=(24, 12), latent_dim=5)
    encoder, decoder = build_networks(config, shape, n_parameters=1)
    assert encoder(torch.randn(3, *shape)).shape == (3, 12)
    assert decoder(torch.randn(4, 5)).shape == (4, 1, *shape)


@pytest.mark.parametrize(("shape", "wanted"), [((64,), "mlp"), ((1, 8, 8), "conv"), ((3, 7, 30), "mlp")])
def test_auto_network_takes_convolutions_for_images(shape: tuple[int, ...], wanted: str) -> None:
    encoder, _ = build_networks(ModelConfig(), shape, n_parameters=1)
    assert type(encoder).__name__ == {"mlp": "MLPEncoder", "conv": "ConvEncoder"}[wanted]


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_a_rows_features_do_not_depend_on_training_mode_or_neighbours(network: str) -> None:
    torch.manual_seed(0)
    vae = VAE(ModelConfig(network=network, latent_dim=4, hidden_dims=(16,), channels=(8,)), (1, 8, 8))
    rows = torch.randn(6, 1, 8, 8)
    alone = vae.train().features(rows[:1])[0]
    among = vae.eval().features(rows)[0][:1]
    torch.testing.assert_close(alone, among)


def test_convolutions_for_vectors_are_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"image_shape=.*network='mlp'"):
        build_networks(ModelConfig(network="conv"), (64,), n_parameters=1)


def test_more_halvings_than_pixels_are_refused() -> None:
    with pytest.raises(ConfigError, match="fewer channels"):
        build_networks(ModelConfig(network="conv", channels=(8, 8, 8, 8)), (1, 4, 4), n_parameters=1)


@pytest.mark.parametrize(
    ("setting", "value", "nearest"),
    [("posterior", "diagnal", "diagonal"), ("prior", "standart", "standard"), ("likelihood", "bernouli", "bernoulli")],
)
def test_unknown_distribution_is_refused_and_the_nearest_named(setting: str, value: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{nearest}'"):
        VAE(ModelConfig.from_dict({setting: value}), (4,))


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_multiply_adds_equal_half_of_torchs_own_flop_count(network: str) -> None:
    config = ModelConfig(network=network, channels=(8, 16, 24), hidden_dims=(32, 16), latent_dim=4)
    encoder, decoder = build_networks(config, (2, 19, 12), n_parameters=3)
    for module, example in ((encoder, torch.zeros(3, 2, 19, 12)), (decoder, torch.zeros(3, 4))):
        with FlopCounterMode(display=False) as counter:
            module(example)
        assert count_multiply_adds(module, example) == counter.get_total_flops() / 2


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_xavier_weights_fill_glorots_bound_and_biases_are_zero(network: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(network=network, hidden_dims=(128, 64), channels=(32, 48), initialization="xavier")
    layers = [
        layer
        for part in build_networks(config, (3, 16, 16), n_parameters=2)
        for layer in part.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
    ]
    assert len(layers) >= 5
    for layer in layers:
        # Each output is a sum over the inputs that reach it, and each input reaches so many outputs.
        places = math.prod(layer.weight.shape[2:])
        bound = math.sqrt(6 / (places * (layer.weight.shape[0] + layer.weight.shape[1])))
        assert 0.95 * bound < layer.weight.abs().max().item() <= bound
        assert layer.weight.var().item() == pytest.approx(bound**2 / 3, rel=0.1)
        assert layer.bias is not None
        assert not layer.bias.any()


def test_default_initialization_is_torchs_own() -> None:
    torch.manual_seed(0)
    encoder, _ = build_networks(ModelConfig(hidden_dims=(16,)), (9,), n_parameters=1)
    torch.manual_seed(0)
    reference = nn.Linear(9, 16)
    assert torch.equal(next(encoder.parameters()), reference.weight)


@pytest.mark.parametrize("initialization", ["default", "xavier"])
def test_residual_blocks_add_nothing_at_first_and_learn(initialization: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(network="conv", channels=(8,), residual_blocks=2, initialization=initialization)
    blocks = [
        module
        for part in build_networks(config, (1, 8, 8), n_parameters=1)
        for module in part.modules()
        if isinstance(module, ResidualBlock)
    ]
    assert len(blocks) == 4
    x = torch.randn(2, 8, 4, 4)
    for block in blocks:
        assert torch.equal(block(x), x)
        block(x).square().sum().backward()
        # The last layer is zero, but its gradient is not: the block is no dead end.
        gradient = block.get_parameter("layers.3.weight").grad
        assert gradient is not None
        assert gradient.any()


@pytest.mark.parametrize(
    ("name", "layer"), [("silu", nn.SiLU), ("relu", nn.ReLU), ("tanh", nn.Tanh), ("gelu", nn.GELU)]
)
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_activation_is_the_one_asked_for_everywhere(network: str, name: str, layer: type[nn.Module]) -> None:
    config = ModelConfig(network=network, activation=name, channels=(8,), residual_blocks=1)
    kinds = (nn.SiLU, nn.ReLU, nn.Tanh, nn.GELU)
    found = [
        module
        for part in build_networks(config, (1, 8, 8), n_parameters=1)
        for module in part.modules()
        if isinstance(module, kinds)
    ]
    assert found
    assert all(type(module) is layer for module in found)


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_normalization_can_be_left_out_altogether(network: str) -> None:
    for wanted in (True, False):
        config = ModelConfig(network=network, normalization=wanted, channels=(8,), residual_blocks=1)
        parts = build_networks(config, (1, 8, 8), n_parameters=1)
        found = any(isinstance(module, nn.LayerNorm | nn.GroupNorm) for part in parts for module in part.modules())
        assert found is wanted


def test_network_of_the_notes_example_is_linear_relu_linear() -> None:
    config = ModelConfig(latent_dim=2, hidden_dims=(512,), network="mlp", activation="relu", normalization=False)
    vae = VAE(config, (1, 28, 28))
    weights = {name: tuple(weight.shape) for name, weight in vae.named_parameters() if name.endswith("weight")}
    assert sorted(weights.values()) == sorted([(512, 784), (2, 512), (2, 512), (512, 2), (784, 512)])


def test_tokens_are_looked_up_and_not_measured() -> None:
    torch.manual_seed(0)
    config = ModelConfig(likelihood="tokens", levels=7, hidden_dims=(8,), latent_dim=2)
    encoder, _ = build_networks(config, (5,), n_parameters=7)
    ids = torch.tensor([[0, 1, 2, 3, 6]])
    before = encoder(ids.float())
    embedding = next(module for module in encoder.modules() if isinstance(module, nn.Embedding))
    assert embedding.weight.shape[0] == 7
    with torch.no_grad():
        embedding.weight[4] += 1  # an id that is not there
        assert torch.equal(encoder(ids.float()), before)
        embedding.weight[3] += 1
        assert not torch.equal(encoder(ids.float()), before)


def test_auto_network_of_tokens_is_no_convolution() -> None:
    encoder, _ = build_networks(ModelConfig(likelihood="tokens"), (1, 8, 8), n_parameters=256)
    assert type(encoder).__name__ == "MLPEncoder"


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_half_precision_networks_give_float32_close_to_the_exact(network: str) -> None:
    torch.manual_seed(0)
    vae = VAE(ModelConfig(network=network, latent_dim=4, hidden_dims=(16,), channels=(8,)), (1, 8, 8))
    x = torch.rand(6, 1, 8, 8)
    exact = vae.hidden(x)
    vae.network_dtype = torch.bfloat16
    half = vae.train().hidden(x)
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, atol=0.05, rtol=0.05)
    # Evaluation and export are exact whatever training was.
    assert torch.equal(vae.eval().hidden(x), exact)
    assert torch.equal(vae.train().features(x)[2], exact)
