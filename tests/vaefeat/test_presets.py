"""Presets: what each kind of rows gets, and what may be changed of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vaefeat import ModelConfig, TrainConfig, VAETransformer, pretrain
from vaefeat.combinations import refuse_pair
from vaefeat.errors import ConfigError
from vaefeat.model.augmentation import suitable
from vaefeat.model.objectives import OBJECTIVES
from vaefeat.presets import backgrounds_differ, choose_settings, mirrored_rows_belong, refuse_changes

TABLE = np.random.default_rng(0).normal(size=(300, 7)).astype(np.float32)


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, size=shape, dtype=np.uint8)


def n_steps(train: TrainConfig, n_rows: int) -> int:
    return train.max_epochs * math.ceil(n_rows * (1 - train.heldout) / train.batch_size)


@pytest.mark.parametrize(("effort", "epochs", "steps"), [("fast", 8, 1000), ("best", 100, 5000)])
@pytest.mark.parametrize("n_rows", [2, 1000, 60_000, 10_000_000])
def test_textbook_trains_long_enough_for_few_rows_and_no_longer_for_many(
    effort: str, epochs: int, steps: int, n_rows: int
) -> None:
    _, train = choose_settings(TABLE, n_rows=n_rows, preset="textbook", effort=effort)
    steps_per_epoch = max(1, math.ceil(0.9 * n_rows / train.batch_size))
    assert train.objective == "elbo"
    assert train.max_epochs >= epochs
    assert train.max_epochs * steps_per_epoch >= steps
    assert train.max_epochs == epochs or (train.max_epochs - 1) * steps_per_epoch < steps


@pytest.mark.parametrize(
    "rows", [TABLE, noise(40, 1, 8, 8), noise(40, 1, 28, 28), noise(40, 3, 32, 32), noise(40, 1, 64, 64)]
)
def test_features_fit_rows_of_every_kind(rows: NDArray[Any]) -> None:
    model, train = choose_settings(rows, n_rows=len(rows))
    assert train.objective == "contrastive"
    assert model.style_dim == (model.latent_dim // 9 if rows.ndim == 4 else 0)
    suitable(rows.shape[1:], train.augmentations)
    # A whole epoch, with rows left over to tell apart from one another.
    short = {**train.to_dict(), "max_epochs": 1, "augmentations": train.augmentations, "device": "cpu"}
    bundle = pretrain(rows, model=model, train=short, progress=False)
    assert bundle.manifest.outputs["mean"] == model.latent_dim


def test_features_of_larger_images_end_in_as_few_places() -> None:
    sides = {side: choose_settings(noise(4, 1, side, side), n_rows=4)[0].channels for side in (28, 64, 128)}
    assert [math.ceil(side / 2 ** len(channels)) for side, channels in sides.items()] == [4, 4, 4]


def test_neighbours_are_as_large_a_part_of_few_rows_as_of_many() -> None:
    rows = noise(64, 1, 28, 28)
    found = {n: choose_settings(rows, n_rows=n)[1] for n in (64, 1638, 16_384, 1_000_000)}
    assert [(train.neighbours, train.remembered) for train in found.values()] == [
        (1, 64),
        (5, 1638),
        (50, 16_384),
        (50, 16_384),
    ]


def test_longer_run_looks_further_for_neighbours() -> None:
    rows = noise(64, 1, 28, 28)
    found = {effort: choose_settings(rows, n_rows=60_000, effort=effort)[1].neighbours for effort in ("fast", "best")}
    assert found == {"fast": 50, "best": 200}


def test_images_whose_light_differs_have_no_neighbours(digits_rows: NDArray[np.uint8]) -> None:
    dark = digits_rows[:600].astype(np.float32)
    lit = dark + np.linspace(0, 16, 600, dtype=np.float32)[:, None, None, None]
    assert choose_settings(dark, n_rows=16_384)[1].neighbours == 50
    assert choose_settings(lit, n_rows=16_384)[1].neighbours == 0
    assert choose_settings(lit, n_rows=16_384, train={"neighbours": 7})[1].neighbours == 7


def test_photographs_in_colour_are_cropped_at_a_lower_temperature() -> None:
    photographs = noise(600, 3, 16, 16) * 0.2 + np.linspace(0, 200, 600, dtype=np.float32)[:, None, None, None]
    _, train = choose_settings(photographs, n_rows=600)
    assert set(train.augmentations) - {"flip"} == {"crop", "brightness", "color"}
    assert (train.contrastive_temperature, train.neighbours) == (0.2, 0)
    drawings = np.where(noise(600, 3, 16, 16) > 200, 255, 0).astype(np.uint8)
    drawings[:, :, [0, -1]], drawings[..., [0, -1]] = 0, 0
    _, train = choose_settings(drawings, n_rows=600)
    assert {"affine", "erasing", "crop"} <= set(train.augmentations)
    assert train.contrastive_temperature == 0.5


def test_contrast_keeps_up_with_the_likelihood_of_larger_images() -> None:
    sides = {side: choose_settings(noise(4, 1, side, side), n_rows=4)[1].contrastive_weight for side in (8, 28, 42, 99)}
    assert list(sides.values()) == [20, 100, 225, 400]


def test_best_trains_twice_as_long_as_fast() -> None:
    rows = noise(64, 1, 28, 28)
    fast, best = (choose_settings(rows, n_rows=60_000, effort=effort)[1] for effort in ("fast", "best"))
    assert 1.8 < n_steps(best, 60_000) / n_steps(fast, 60_000) < 2.2


def test_mapping_changes_a_preset_field_by_field() -> None:
    model, train = choose_settings(TABLE, n_rows=300, model={"latent_dim": 9}, train={"max_epochs": 3, "seed": 4})
    assert (model.latent_dim, train.max_epochs, train.seed) == (9, 3, 4)
    assert train.objective == "contrastive"


@pytest.mark.parametrize("effort", ["fast", "best"])
@pytest.mark.parametrize("objective", sorted(set(OBJECTIVES) - {"contrastive"}))
def test_another_objective_leaves_out_what_only_views_have_a_use_for(objective: str, effort: str) -> None:
    images = noise(4, 1, 28, 28)
    model, train = choose_settings(images, n_rows=60_000, effort=effort, train={"objective": objective})
    assert (model.style_dim, train.neighbours, train.objective) == (0, 0, objective)
    refuse_pair(model, train)


@pytest.mark.parametrize(
    "asked",
    [
        {"train": {"objective": "elbo", "neighbours": 5}},
        {"train": {"objective": "elbo"}, "model": {"style_dim": 5}},
        {"preset": "textbook", "model": {"style_dim": 5}},
        {"model": ModelConfig(style_dim=5)},
    ],
)
def test_what_only_views_have_a_use_for_is_refused_where_it_was_asked_for(asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"=5 with objective='elbo', which has no views"):
        pretrain(TABLE, progress=False, **asked)


def test_configuration_takes_the_place_of_the_preset() -> None:
    own = ModelConfig(latent_dim=3)
    assert choose_settings(TABLE, n_rows=300, model=own) == (own, TrainConfig())
    assert choose_settings(TABLE, n_rows=300, train=TrainConfig(seed=3)) == (ModelConfig(), TrainConfig(seed=3))
    assert choose_settings(TABLE, n_rows=300, model=own, train={"seed": 3}) == (own, TrainConfig(seed=3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "feature"}, "did you mean 'features'"),
        ({"effort": "fastest"}, "did you mean 'fast'"),
        ({"model": {"latentdim": 3}}, "did you mean 'latent_dim'"),
        ({"train": {"batch_size": "many"}}, "batch_size='many'"),
        ({"preset": "textbook", "train": {"batchsize": 3}}, "did you mean 'batch_size'"),
    ],
)
def test_unknown_and_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_settings(TABLE, n_rows=300, **settings)


def test_changes_are_refused_before_any_row_is_read() -> None:
    refuse_changes({"style_dim": 40}, {"max_epochs": 3})
    with pytest.raises(ConfigError, match="latent_dim=0"):
        refuse_changes({"latent_dim": 0}, {})


def test_numpys_numbers_are_numbers() -> None:
    model, train = choose_settings(
        TABLE,
        n_rows=300,
        model={"latent_dim": np.int64(9), "hidden_dims": (np.int64(16), np.int64(8))},
        train={"max_epochs": np.int32(2)},
    )
    assert (model.latent_dim, model.hidden_dims, train.max_epochs) == (9, (16, 8), 2)


@pytest.mark.parametrize(
    "settings", [{"model": "conv"}, {"train": [2]}, {"model": TrainConfig()}, {"train": ModelConfig()}]
)
def test_what_is_neither_mapping_nor_configuration_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="wanted a mapping"):
        pretrain(TABLE, progress=False, **settings)


@pytest.mark.parametrize("chosen", [{"effort": "best"}, {"preset": "textbook"}])
def test_preset_beside_a_whole_configuration_is_refused(chosen: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="takes their place"):
        choose_settings(TABLE, n_rows=300, model=ModelConfig(), **chosen)  # type: ignore[arg-type]


def test_few_rows_make_for_more_epochs_within_reason() -> None:
    for effort, most in (("fast", 500), ("best", 1000)):
        _, train = choose_settings(TABLE[:5], n_rows=5, effort=effort)
        assert train.max_epochs == most
        assert most // train.checkpoint_every <= 100


def test_ids_are_left_alone() -> None:
    _, train = choose_settings(noise(40, 1, 8, 8), n_rows=40, model={"likelihood": "tokens"})
    assert train.augmentations == "auto"


def test_a_typing_error_is_told_as_such() -> None:
    with pytest.raises(ConfigError, match="did you mean 'diagonal'"):
        pretrain(TABLE, model={"posterior": "diag"}, progress=False)


def test_large_images_are_looked_at_in_part() -> None:
    images = np.random.default_rng(0).integers(0, 100, size=(200, 3, 300, 200), dtype=np.uint8)
    assert mirrored_rows_belong(images)
    images[..., :100] += 100
    assert not mirrored_rows_belong(images)


def test_blank_images_say_nothing_of_mirroring() -> None:
    images = np.zeros((5000, 1, 8, 8), dtype=np.uint8)
    images[17] = 3
    assert not mirrored_rows_belong(images)


def test_what_features_cannot_train_names_the_preset_that_can() -> None:
    with pytest.raises(ConfigError, match="preset='textbook'"):
        pretrain(TABLE, model={"posterior": "iaf"}, progress=False)


def test_transformer_takes_the_preset_for_what_it_is_not_told() -> None:
    features = VAETransformer(max_epochs=1, random_state=0).fit(TABLE).bundle_.manifest
    textbook = VAETransformer(preset="textbook", max_epochs=1, random_state=0).fit(TABLE).bundle_.manifest
    assert (features.objective, textbook.objective) == ("contrastive", "elbo")
    assert textbook.latent_dim == ModelConfig().latent_dim
    assert features.latent_dim == choose_settings(TABLE, n_rows=len(TABLE))[0].latent_dim


def test_mirrored_images_belong_where_nothing_tells_them_apart(digits_rows: NDArray[np.uint8]) -> None:
    assert not mirrored_rows_belong(digits_rows)
    # Half of these digits are mirrored already.
    either_way = digits_rows.copy()
    mirrored = np.random.default_rng(0).random(len(either_way)) < 0.5
    either_way[mirrored] = either_way[mirrored][..., ::-1]
    assert mirrored_rows_belong(either_way)


def test_light_changes_only_where_backgrounds_do(digits_rows: NDArray[np.uint8]) -> None:
    assert not backgrounds_differ(digits_rows)
    _, train = choose_settings(digits_rows, n_rows=len(digits_rows))
    assert train.augmentations == ("affine", "erasing")
    levels = np.random.default_rng(0).integers(0, 100, size=(len(digits_rows), 1, 1, 1))
    lit = (digits_rows + levels).astype(np.uint8)
    assert backgrounds_differ(lit)
    assert "brightness" in choose_settings(lit, n_rows=len(lit))[1].augmentations


def test_too_few_images_to_tell_are_not_mirrored() -> None:
    assert not mirrored_rows_belong(noise(10, 1, 8, 8))
