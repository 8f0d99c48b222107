"""Changes of a row that leave alone what it is: the views of it that a representation should not tell apart.

All of it runs on the rows' device, for a whole minibatch at once, with noise from torch's global generator.

B batch, C channels, H height, W width, F values of a table's row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vaefeat.settings import unknown_name

__all__ = ["IMAGE_AUGMENTATIONS", "TABLE_AUGMENTATIONS", "augment", "suitable"]

#: At strength 1: largest rotation (radians), shear, change of scale and shift (shares of the image), smallest side that
#: a crop leaves, largest change of brightness, contrast and colour, largest side of what is erased.
_ROTATION, _SHEAR, _SCALE, _SHIFT = math.radians(20), 0.2, 0.2, 0.1
_CROP = 0.5
_CONTRAST, _BRIGHTNESS, _SATURATION, _GREY = 0.4, 0.2, 0.4, 0.2
_ERASED = 0.35
#: Share of a table's values that another row's take the place of.
_REPLACED = 0.5
_LUMA = (0.299, 0.587, 0.114)

#: What moves pixels: all of it together is one resampling.
_GEOMETRY = ("affine", "crop", "flip")
#: What `auto` stands for. Half of a digit may be another digit: images of one channel are not cropped.
_GREY_IMAGES = ("affine", "brightness", "erasing")
_COLOR_IMAGES = (*_GREY_IMAGES, "crop", "color")


def augment(x: Tensor, names: Sequence[str], *, strength: float = 1.0) -> Tensor:
    """Give a changed view of each row.

    Parameters
    ----------
    x : Tensor of shape (B, C, H, W) or (B, F)
        Scaled rows.
    names : sequence of str
        Keys of :data:`IMAGE_AUGMENTATIONS` for images, of :data:`TABLE_AUGMENTATIONS` for tables, in any order; none
        of them gives `x` itself.
    strength : float
        Factor of all ranges.

    References
    ----------
    Chen et al. 2020, SimCLR, arXiv:2002.05709, appendix A (crops and colours); Sinha and Dieng 2021, CR-VAE,
    arXiv:2105.14859, section 4 (affine maps); Zhong et al. 2020, arXiv:1708.04896 (erasing); Bahri et al. 2022, SCARF,
    arXiv:2106.15147, section 3 (tables).
    """
    if any(name in _GEOMETRY for name in names):
        x = _moved(x, names, strength)
    for name, change in {**IMAGE_AUGMENTATIONS, **TABLE_AUGMENTATIONS}.items():
        if name in names and change is not None:
            x = change(x, strength)
    return x


def suitable(row_shape: Sequence[int], names: str | Sequence[str] = "auto", *, ids: bool = False) -> tuple[str, ...]:
    """Give what ``auto`` stands for with rows of a shape, and any other names as they are.

    Images are not mirrored: whether they may be cannot be told from their shape. Ids, unlike pixels, have no values in
    between, so those of an image are a table's too.

    Raises
    ------
    ConfigError
        Names that rows of this shape have no meaning for.
    """
    channels = row_shape[0] if len(row_shape) == 3 and not ids else 0
    if isinstance(names, str):
        return {0: ("replacement",), 3: _COLOR_IMAGES}.get(channels, _GREY_IMAGES)
    possible = set(IMAGE_AUGMENTATIONS) - (set() if channels == 3 else {"color"}) if channels else TABLE_AUGMENTATIONS
    for name in names:
        if name not in possible:
            what = "ids" if ids else "rows"
            raise unknown_name(f"augmentation for {what} of shape {tuple(row_shape)}", name, possible)
    return tuple(names)


def _uniform(x: Tensor, low: float, high: float, *sizes: int) -> Tensor:
    return torch.empty(len(x), *sizes, device=x.device).uniform_(low, high)


def _moved(x_BCHW: Tensor, names: Sequence[str], strength: float) -> Tensor:
    """Turn, shear, scale, shift, crop and mirror, with one resampling; what comes in from outside is background."""
    turn_B, shear_B = torch.zeros_like(x_BCHW[:, 0, 0, 0]), torch.zeros_like(x_BCHW[:, 0, 0, 0])
    width_B, height_B = torch.ones_like(turn_B), torch.ones_like(turn_B)
    right_B, down_B = torch.zeros_like(turn_B), torch.zeros_like(turn_B)
    if "affine" in names:
        turn_B = _uniform(x_BCHW, -_ROTATION * strength, _ROTATION * strength)
        shear_B = _uniform(x_BCHW, -_SHEAR * strength, _SHEAR * strength)
        # Of the grid's coordinates, which go from -1 to 1.
        right_B, down_B = (_uniform(x_BCHW, -2 * _SHIFT * strength, 2 * _SHIFT * strength) for _ in range(2))
        width_B, height_B = (1 + _uniform(x_BCHW, -_SCALE * strength, _SCALE * strength) for _ in range(2))
    if "crop" in names:
        smallest = 1 - (1 - _CROP) * min(strength, 1.0)
        wide_B, high_B = (_uniform(x_BCHW, smallest, 1) for _ in range(2))
        right_B = right_B + (1 - wide_B) * _uniform(x_BCHW, -1, 1)
        down_B = down_B + (1 - high_B) * _uniform(x_BCHW, -1, 1)
        width_B, height_B = width_B * wide_B, height_B * high_B
    if "flip" in names:
        width_B = torch.where(_uniform(x_BCHW, 0, 1) < 0.5, width_B, -width_B)
    cosine_B, sine_B = torch.cos(turn_B), torch.sin(turn_B)
    across_B3 = torch.stack([cosine_B * width_B, (shear_B - sine_B) * height_B, right_B], dim=1)
    along_B3 = torch.stack([sine_B * width_B, cosine_B * height_B, down_B], dim=1)
    grid = functional.affine_grid(torch.stack([across_B3, along_B3], dim=1), list(x_BCHW.shape), align_corners=False)
    # Of each image its own: the commonest value along its border, or near it.
    border = torch.cat([x_BCHW[:, :, 0], x_BCHW[:, :, -1], x_BCHW[..., 0], x_BCHW[..., -1]], dim=2)
    background = border.median(dim=2).values[..., None, None]
    return functional.grid_sample(x_BCHW - background, grid, align_corners=False) + background


def _brightness(x_BCHW: Tensor, strength: float) -> Tensor:
    """Change contrast about each image's mean, and brightness in units of its own spread."""
    mean, spread = x_BCHW.mean(dim=(1, 2, 3), keepdim=True), x_BCHW.std(dim=(1, 2, 3), keepdim=True)
    contrast = 1 + _uniform(x_BCHW, -_CONTRAST * strength, _CONTRAST * strength, 1, 1, 1)
    shift = _uniform(x_BCHW, -_BRIGHTNESS * strength, _BRIGHTNESS * strength, 1, 1, 1)
    return mean + (x_BCHW - mean) * contrast + shift * spread


def _color(x_BCHW: Tensor, strength: float) -> Tensor:
    """Change each channel's weight and all colours' depth; now and then take them away."""
    red, green, blue = x_BCHW.split(1, dim=1)
    grey: Tensor = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
    depth = 1 + _uniform(x_BCHW, -_SATURATION * strength, _SATURATION * strength, 1, 1, 1)
    depth = torch.where(_uniform(x_BCHW, 0, 1, 1, 1, 1) < _GREY * strength, 0.0, depth)
    tint = 1 + _uniform(x_BCHW, -_SATURATION * strength / 2, _SATURATION * strength / 2, 3, 1, 1)
    return (grey + (x_BCHW - grey) * depth) * tint


def _erasing(x_BCHW: Tensor, strength: float) -> Tensor:
    """Fill a rectangle of half of the images with the image's mean."""
    height, width = x_BCHW.shape[2:]
    rows_H, columns_W = (torch.arange(size, device=x_BCHW.device) for size in (height, width))
    inside = _uniform(x_BCHW, 0, 1, 1, 1, 1) < 0.5
    for places, size, shape in ((rows_H, height, (1, 1, -1, 1)), (columns_W, width, (1, 1, 1, -1))):
        side = _uniform(x_BCHW, 0.1, 1, 1, 1, 1) * min(_ERASED * strength, 1.0) * size
        start = _uniform(x_BCHW, 0, 1, 1, 1, 1) * (size - side)
        at = places.view(shape)
        inside = inside & (at >= start) & (at < start + side)
    return torch.where(inside, x_BCHW.mean(dim=(1, 2, 3), keepdim=True), x_BCHW)


def _replacement(x_BF: Tensor, strength: float) -> Tensor:
    """Take some values of each row from other rows of the minibatch, each column for itself."""
    others_BF = torch.argsort(torch.rand_like(x_BF), dim=0)
    replaced_BF = torch.rand_like(x_BF) < min(_REPLACED * strength, 1.0)
    return torch.where(replaced_BF, x_BF.gather(0, others_BF), x_BF)


#: By name; None where :func:`_moved` does it with others. ``flip`` is for images whose mirror images could be theirs.
IMAGE_AUGMENTATIONS: dict[str, Callable[[Tensor, float], Tensor] | None] = {
    "affine": None,
    "crop": None,
    "flip": None,
    "brightness": _brightness,
    "color": _color,
    "erasing": _erasing,
}
TABLE_AUGMENTATIONS: dict[str, Callable[[Tensor, float], Tensor] | None] = {"replacement": _replacement}
