"""Shapes, independence of rows, and refusals of encoder and decoder networks."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vaefeat import ModelConfig
from vaefeat.errors import ConfigError
from vaefeat.model.networks import build_networks, count_multiply_adds
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
