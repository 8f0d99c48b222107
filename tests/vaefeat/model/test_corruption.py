"""Corruption of rows: how much is changed, into what, and that the clean row is what must come out."""

from __future__ import annotations

import math

import pytest
import torch

from vaefeat import ModelConfig, TrainConfig
from vaefeat.model.corruption import CORRUPTIONS, corrupt
from vaefeat.model.objectives import Reconstruction
from vaefeat.model.vae import VAE


@pytest.fixture
def x() -> torch.Tensor:
    """Values strictly between the extremes 0 and 1, each of which is there once."""
    values = 0.1 + 0.8 * torch.rand(200, 100, generator=torch.Generator().manual_seed(0))
    values[0, 0], values[0, 1] = 0.0, 1.0
    return values


@pytest.mark.parametrize("kind", ["masking", "salt_and_pepper"])
@pytest.mark.parametrize("level", [0.1, 0.5])
def test_share_of_changed_values_is_the_level(kind: str, level: float, x: torch.Tensor) -> None:
    torch.manual_seed(1)
    changed = corrupt(x, kind, level) != x
    standard_error = math.sqrt(level * (1 - level) / x.numel())
    assert changed.float().mean().item() == pytest.approx(level, abs=5 * standard_error)
    # Value by value, not row by row.
    assert changed.float().mean(dim=1).std().item() < 2 * math.sqrt(level * (1 - level) / x.shape[1])


@pytest.mark.parametrize("kind", ["masking", "salt_and_pepper"])
def test_all_values_are_changed_at_a_level_of_one(kind: str, x: torch.Tensor) -> None:
    torch.manual_seed(1)
    wanted = {"masking": {0.0}, "salt_and_pepper": {0.0, 1.0}}[kind]
    assert set(corrupt(x, kind, 1.0).unique().tolist()) == wanted


def test_salt_is_as_frequent_as_pepper(x: torch.Tensor) -> None:
    torch.manual_seed(1)
    assert corrupt(x, "salt_and_pepper", 1.0).mean().item() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(x.numel()))


def test_gaussian_noise_has_the_levels_standard_deviation(x: torch.Tensor) -> None:
    torch.manual_seed(1)
    noise = corrupt(x, "gaussian", 0.25) - x
    assert noise.std().item() == pytest.approx(0.25, rel=0.03)
    assert noise.mean().item() == pytest.approx(0, abs=5 * 0.25 / math.sqrt(x.numel()))


def test_no_corruption_gives_the_rows_themselves(x: torch.Tensor) -> None:
    state = torch.get_rng_state()
    assert corrupt(x, "none", 0.3) is x
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_rows_are_not_changed_in_place(kind: str, x: torch.Tensor) -> None:
    before = x.clone()
    corrupt(x, kind, 0.5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corrupted_rows_are_encoded_and_clean_rows_must_come_out(kind: str) -> None:
    torch.manual_seed(0)
    vae = VAE(ModelConfig(latent_dim=3, hidden_dims=(8,), posterior="deterministic", gaussian_std=1.0), (6,))
    rows = torch.randn(16, 6)
    config = TrainConfig(objective="reconstruction", corruption=kind, corruption_level=0.4)
    torch.manual_seed(2)
    got = Reconstruction(config)(vae, rows, kl_weight=1.0).log_likelihood
    torch.manual_seed(2)
    given = corrupt(rows, kind, 0.4)
    assert (given != rows).any()
    decoded = vae.decoder(vae.encode(given).mean).squeeze(1)
    wanted = -0.5 * (rows - decoded).square().sum(dim=1) - 3 * math.log(2 * math.pi)
    torch.testing.assert_close(got, wanted)
