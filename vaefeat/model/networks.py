"""Encoder and decoder networks.

Normalisation is by row (LayerNorm, GroupNorm), never over the batch: a row's features must not depend on its
neighbours, and one row must be enough.

B batch, C channels, H height, W width, F width of the last hidden layer, L latents, K likelihood parameters per value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from vaefeat.config import ModelConfig
from vaefeat.errors import ConfigError

__all__ = [
    "ConvDecoder",
    "ConvEncoder",
    "MLPDecoder",
    "MLPEncoder",
    "build_networks",
    "count_multiply_adds",
    "network_name",
]

_SMALLEST_CONV_SIDE = 8
_GROUP_CHANNELS = 8


class MLPEncoder(nn.Module):
    """x_B... -> h_BF through fully connected layers.

    Parameters
    ----------
    shape : tuple of int
        Of one row.
    hidden_dims : sequence of int
        Widths of the layers; the last is F.
    """

    def __init__(self, shape: Sequence[int], hidden_dims: Sequence[int]) -> None:
        super().__init__()
        self.hidden_dim = hidden_dims[-1]
        self.layers = nn.Sequential(nn.Flatten(), _dense(math.prod(shape), hidden_dims))

    def forward(self, x: Tensor) -> Tensor:
        """Encode (B, ...) to (B, F)."""
        return self.layers(x)  # type: ignore[no-any-return]


class MLPDecoder(nn.Module):
    """z_BL -> likelihood parameters of shape (B, K, ...) through the encoder's widths in reverse.

    Parameters
    ----------
    latent_dim : int
    shape : tuple of int
        Of one row.
    hidden_dims : sequence of int
        The encoder's widths.
    n_parameters : int
        K.
    """

    def __init__(self, latent_dim: int, shape: Sequence[int], hidden_dims: Sequence[int], n_parameters: int) -> None:
        super().__init__()
        widths = tuple(reversed(hidden_dims))
        self.layers = nn.Sequential(
            _dense(latent_dim, widths),
            nn.Linear(widths[-1], n_parameters * math.prod(shape)),
            nn.Unflatten(1, (n_parameters, *shape)),
        )

    def forward(self, z_BL: Tensor) -> Tensor:
        """Decode (B, L) to (B, K, ...)."""
        return self.layers(z_BL)  # type: ignore[no-any-return]


class ConvEncoder(nn.Module):
    """x_BCHW -> h_BF: convolutions of stride 2, then fully connected layers.

    Parameters
    ----------
    shape : tuple of int
        (C, H, W) of one image, any sizes.
    channels : sequence of int
        Of each convolution; each halves height and width, rounding up.
    hidden_dims : sequence of int
        Widths of the layers after them; the last is F.
    """

    def __init__(self, shape: Sequence[int], channels: Sequence[int], hidden_dims: Sequence[int]) -> None:
        super().__init__()
        self.hidden_dim = hidden_dims[-1]
        blocks = [
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), _group_norm(after), nn.SiLU())
            for before, after in pairwise((shape[0], *channels))
        ]
        height, width = _sizes(shape, len(channels))[-1]
        self.layers = nn.Sequential(*blocks, nn.Flatten(), _dense(channels[-1] * height * width, hidden_dims))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Encode (B, C, H, W) to (B, F)."""
        return self.layers(x_BCHW)  # type: ignore[no-any-return]


class ConvDecoder(nn.Module):
    """z_BL -> likelihood parameters of shape (B, K, C, H, W), the encoder's way back.

    Parameters
    ----------
    latent_dim : int
    shape : tuple of int
        (C, H, W) of one image.
    channels, hidden_dims : sequence of int
        The encoder's.
    n_parameters : int
        K.
    """

    def __init__(
        self,
        latent_dim: int,
        shape: Sequence[int],
        channels: Sequence[int],
        hidden_dims: Sequence[int],
        n_parameters: int,
    ) -> None:
        super().__init__()
        sizes = _sizes(shape, len(channels))[::-1]
        height, width = sizes[0]
        widths = (*reversed(hidden_dims), channels[-1] * height * width)
        outputs = (*reversed(channels[:-1]), n_parameters * shape[0])
        blocks: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise((channels[-1], *outputs))):
            blocks.append(_doubling(before, after, sizes[i], sizes[i + 1]))
            if i < len(channels) - 1:
                blocks += [_group_norm(after), nn.SiLU()]
        self.layers = nn.Sequential(
            _dense(latent_dim, widths),
            nn.Unflatten(1, (channels[-1], height, width)),
            *blocks,
            nn.Unflatten(1, (n_parameters, shape[0])),
        )

    def forward(self, z_BL: Tensor) -> Tensor:
        """Decode (B, L) to (B, K, C, H, W)."""
        return self.layers(z_BL)  # type: ignore[no-any-return]


def build_networks(
    config: ModelConfig, shape: Sequence[int], *, n_parameters: int
) -> tuple[MLPEncoder | ConvEncoder, MLPDecoder | ConvDecoder]:
    """Make the encoder and decoder networks that a configuration asks for.

    Parameters
    ----------
    config : ModelConfig
    shape : tuple of int
        (F,) or (C, H, W) of one row.
    n_parameters : int
        Parameters of the likelihood per value of a row.

    Raises
    ------
    ConfigError
        Convolutions were asked for rows that are not images, or more of them than the image can be halved.
    """
    if network_name(config, shape) == "mlp":
        return (
            MLPEncoder(shape, config.hidden_dims),
            MLPDecoder(config.latent_dim, shape, config.hidden_dims, n_parameters),
        )
    if len(shape) != 3:
        raise ConfigError(
            f"got network='conv' for rows of shape {tuple(shape)}, wanted images (C, H, W); "
            "give image_shape=(C, H, W), or network='mlp'"
        )
    if min(shape[1:]) < 2 ** (len(config.channels) - 1):
        raise ConfigError(
            f"got {len(config.channels)} halving convolutions (channels={config.channels}) for images of "
            f"{shape[1]} by {shape[2]} pixels; give fewer channels, or network='mlp'"
        )
    return (
        ConvEncoder(shape, config.channels, config.hidden_dims),
        ConvDecoder(config.latent_dim, shape, config.channels, config.hidden_dims, n_parameters),
    )


def network_name(config: ModelConfig, shape: Sequence[int]) -> str:
    """Resolve ``auto``: convolutions for images of at least 8 by 8 pixels."""
    if config.network != "auto":
        return config.network
    return "conv" if len(shape) == 3 and min(shape[1:]) >= _SMALLEST_CONV_SIDE else "mlp"


def _dense(n_inputs: int, widths: Sequence[int]) -> nn.Sequential:
    blocks = [
        nn.Sequential(nn.Linear(before, after), nn.LayerNorm(after), nn.SiLU())
        for before, after in pairwise((n_inputs, *widths))
    ]
    return nn.Sequential(*blocks)


def _group_norm(n_channels: int) -> nn.GroupNorm:
    # Groups of eight channels where eight divides them; otherwise fewer and larger groups of equal size.
    return nn.GroupNorm(math.gcd(n_channels, max(1, n_channels // _GROUP_CHANNELS)), n_channels)


def _sizes(shape: Sequence[int], n_halvings: int) -> list[tuple[int, int]]:
    sizes = [(shape[1], shape[2])]
    for _ in range(n_halvings):
        height, width = sizes[-1]
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    return sizes


def _doubling(before: int, after: int, size: tuple[int, int], target: tuple[int, int]) -> nn.ConvTranspose2d:
    # A transposed convolution of stride 2 gives 2n - 1 pixels, and one more where the encoder halved an even number.
    height, width = (wanted - (2 * got - 1) for wanted, got in zip(target, size, strict=True))
    return nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=(height, width))


@torch.no_grad()
def count_multiply_adds(module: nn.Module, example: Tensor) -> int:
    """Count the multiplications with weights in one forward pass of `example`."""
    counts = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        # Every weight meets every place once: of the output, or where the convolution is transposed, of the input.
        places = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
        counts.append(weight.numel() * places.numel() // places.shape[1])

    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        module(example)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(counts)


def parameters_device(module: nn.Module) -> torch.device:
    """Tell where a module's weights are."""
    return next(module.parameters()).device
