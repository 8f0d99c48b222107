"""The parts of the fine-tuning loop: streams, schedules, and noticing the end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vaefeat.config import ModelConfig
from vaefeat.finetuning import Schedule, Settling, endless, layers_joined
from vaefeat.model.classifier import Classifier
from vaefeat.model.vae import VAE


@pytest.mark.parametrize("max_steps", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_layers_join_from_the_head_and_all_have_joined_at_the_last_step(max_steps: int, share: float) -> None:
    joined = [layers_joined(step, max_steps, share, 4) for step in range(max_steps)]
    assert joined == sorted(joined)
    assert joined[0] >= 1
    assert joined[-1] == 4


def test_layers_join_one_by_one() -> None:
    assert {layers_joined(step, 1000, 0.3, 4) for step in range(1000)} == {1, 2, 3, 4}
    assert layers_joined(299, 1000, 0.3, 4) == 3
    assert layers_joined(300, 1000, 0.3, 4) == 4


def test_layers_of_a_classifier_hold_head_and_encoder_once_from_the_head_down() -> None:
    config = ModelConfig(latent_dim=2, channels=(4, 8), hidden_dims=(16, 12), residual_blocks=1)
    classifier = Classifier(VAE(config, (1, 8, 8)), 3)
    layers = classifier.layers()
    assert len(layers) == 1 + 2 + 2
    assert layers[0][0] is classifier.head.weight
    assert layers[-1][0] is next(classifier.vae.encoder.parameters())
    found = [id(weight) for layer in layers for weight in layer]
    wanted = [id(weight) for weight in [*classifier.head.parameters(), *classifier.vae.encoder.parameters()]]
    assert sorted(found) == sorted(wanted)


def test_stream_gives_every_row_once_before_any_again() -> None:
    stream = endless(np.arange(10), 4, np.random.default_rng(0))
    given = np.concatenate([next(stream) for _ in range(10)])
    for start in range(0, 40, 10):
        assert sorted(given[start : start + 10]) == list(range(10))


def test_stream_of_fewer_rows_than_are_wanted_repeats_them() -> None:
    assert sorted(next(endless(np.array([5, 7]), 6, np.random.default_rng(0)))) == [5, 5, 5, 7, 7, 7]


def test_schedule_falls_to_zero_over_the_last_quarter() -> None:
    schedule = Schedule(100)
    factors = []
    while schedule.step < schedule.end:
        factors.append(schedule.factor)
        schedule.step += 1
    assert factors[:76] == [1.0] * 76
    np.testing.assert_allclose(factors[75:], np.arange(25, 0, -1) / 25)


def test_schedule_that_cools_early_ends_early_with_the_same_share() -> None:
    schedule = Schedule(1000)
    schedule.step = 300
    schedule.cool()
    assert schedule.cooling
    assert schedule.end == 400
    assert schedule.factor == 1.0


def test_answers_have_settled_after_as_many_calm_checks_in_a_row_as_patience_says() -> None:
    settling = Settling(2)
    calm, other = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.6, 0.4]])
    assert [settling(answers) for answers in (calm, calm, other, calm, calm, calm)] == [False] * 5 + [True]


def test_answers_without_patience_never_settle() -> None:
    settling = Settling(None)
    assert not any(settling(torch.tensor([[1.0, 0.0]])) for _ in range(20))
