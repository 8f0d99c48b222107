"""Views of rows: what may change, what must not, and where it is drawn from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from vaefeat.errors import ConfigError
from vaefeat.model import augmentation
from vaefeat.model.augmentation import IMAGE_AUGMENTATIONS, augment, suitable


@pytest.fixture
def digits(digits_rows: np.ndarray) -> Tensor:
    return torch.from_numpy(digits_rows[:64].copy()).float() / 16


@pytest.fixture
def photographs() -> Tensor:
    """Make colour images with soft shapes, in [0, 1]."""
    noise = np.random.default_rng(0).normal(size=(32, 3, 20, 20))
    smooth = ndimage.gaussian_filter(noise, (0, 0, 3, 3))
    return torch.from_numpy((smooth - smooth.min()) / np.ptp(smooth)).float()


@pytest.mark.parametrize("name", IMAGE_AUGMENTATIONS)
def test_view_has_the_shape_of_the_row_is_another_each_time_and_follows_the_seed(
    name: str, photographs: Tensor
) -> None:
    torch.manual_seed(0)
    first, second = augment(photographs, [name]), augment(photographs, [name])
    torch.manual_seed(0)
    again = augment(photographs, [name])
    assert first.shape == photographs.shape
    assert first.isfinite().all()
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, photographs)


def test_no_names_give_the_rows_themselves(digits: Tensor) -> None:
    assert augment(digits, ()) is digits


@pytest.mark.parametrize("name", ["affine", "crop", "brightness", "color", "erasing"])
def test_strength_of_nearly_nothing_changes_nearly_nothing(name: str, photographs: Tensor) -> None:
    view = augment(photographs, [name], strength=1e-4)
    # A rectangle of no size holds no pixel.
    assert (view - photographs).abs().max() < 1e-2


def test_flip_mirrors_about_half_of_the_images_and_nothing_else(photographs: Tensor) -> None:
    torch.manual_seed(1)
    view = augment(photographs, ["flip"])
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(view, photographs, strict=True)]
    mirrored = [torch.allclose(a, b.flip(-1), atol=1e-5) for a, b in zip(view, photographs, strict=True)]
    assert all(one != other for one, other in zip(same, mirrored, strict=True))
    assert 8 <= sum(mirrored) <= 24


def test_affine_map_is_that_of_an_independent_resampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn by a known angle, against SciPy's rotation about the centre."""
    angle = math.radians(15)
    drawn = iter([angle, 0.0, 0.0, 0.0, 0.0, 0.0])

    def draw(x: Tensor, low: float, high: float, *sizes: int) -> Tensor:
        return torch.full((len(x), *sizes), next(drawn))

    monkeypatch.setattr(augmentation, "_uniform", draw)
    image = np.zeros((41, 41), dtype=np.float32)
    image[10:30, 15:22] = 1
    image = ndimage.gaussian_filter(image, 2)
    view = augment(torch.from_numpy(image)[None, None], ["affine"])[0, 0].numpy()
    wanted = ndimage.rotate(image, 15, reshape=False, order=1)
    opposite = ndimage.rotate(image, -15, reshape=False, order=1)
    assert min(np.abs(view - wanted).max(), np.abs(view - opposite).max()) < 0.02


def test_what_comes_in_from_outside_is_the_background(photographs: Tensor) -> None:
    white = torch.ones(16, 1, 12, 12)
    white[:, :, 4:8, 4:8] = 0.25
    view = augment(white, ["affine"], strength=2)
    assert view.max() <= 1 + 1e-5
    assert torch.allclose(view[:, :, 0, 0], torch.ones(16, 1), atol=1e-5)


def test_erased_rectangle_is_the_images_mean_and_no_larger_than_a_third(photographs: Tensor) -> None:
    torch.manual_seed(0)
    view = augment(photographs, ["erasing"])
    changed = (view != photographs).any(dim=1)
    assert 0.2 < changed.flatten(1).any(dim=1).float().mean() < 0.8
    for mask, image, row in zip(changed, view, photographs, strict=True):
        places = mask.nonzero()
        if not len(places):
            continue
        sides = places.max(dim=0).values - places.min(dim=0).values + 1
        assert len(places) == sides.prod(), "a rectangle"
        assert (sides <= math.ceil(0.35 * 20)).all()
        assert torch.allclose(image[:, mask], row.mean())


def test_replaced_values_come_from_the_same_column(digits: Tensor) -> None:
    torch.manual_seed(0)
    x = torch.arange(200.0).view(50, 4) * torch.tensor([1.0, 10.0, 100.0, 1000.0])
    view = augment(x, ["replacement"])
    for column in range(4):
        assert set(view[:, column].tolist()) <= set(x[:, column].tolist())
        replaced = view[view[:, column] != x[:, column], column]
        assert len(replaced.unique()) == len(replaced), "each from a row of its own"
    assert 0.35 < (view != x).float().mean() < 0.6


def test_brightness_moves_the_mean_by_a_share_of_the_spread_and_turns_contrast_about_it(photographs: Tensor) -> None:
    torch.manual_seed(0)
    view = augment(photographs, ["brightness"])
    moved = view.mean(dim=(1, 2, 3)) - photographs.mean(dim=(1, 2, 3))
    assert (moved.abs() <= 0.2 * photographs.std(dim=(1, 2, 3)) * 1.001).all()
    contrast = view.std(dim=(1, 2, 3)) / photographs.std(dim=(1, 2, 3))
    assert 0.6 <= contrast.min() < 0.9 < 1.1 < contrast.max() <= 1.4


def test_color_tints_what_was_grey(photographs: Tensor) -> None:
    torch.manual_seed(0)
    grey = photographs[:, :1].expand(-1, 3, -1, -1).contiguous()
    ratio = augment(grey, ["color"]) / grey.clamp_min(1e-6)
    by_channel = ratio.flatten(2).median(dim=2).values
    assert by_channel.std(dim=1).min() > 1e-3
    assert 0.79 <= by_channel.min() < by_channel.max() <= 1.21


def test_auto_suits_the_kind_of_the_rows() -> None:
    assert suitable((12,)) == ("replacement",)
    assert "color" in suitable((3, 32, 32))
    assert "color" not in suitable((1, 28, 28))
    assert "flip" not in suitable((3, 32, 32))
    assert suitable((1, 8, 8), ("affine",)) == ("affine",)


def test_ids_of_an_image_are_replaced_and_not_moved() -> None:
    assert suitable((1, 8, 8), ids=True) == ("replacement",)
    assert suitable((1, 8, 8), ("replacement",), ids=True) == ("replacement",)
    with pytest.raises(ConfigError, match="augmentation for ids of shape"):
        suitable((1, 8, 8), ("affine",), ids=True)


@pytest.mark.parametrize(
    ("shape", "names"), [((12,), ("affine",)), ((1, 8, 8), ("color",)), ((3, 8, 8), ("replacement",))]
)
def test_names_that_rows_have_no_meaning_for_are_refused(shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=names[0]):
        suitable(shape, names)
