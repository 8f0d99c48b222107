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
from vaefeat.model.table import TableInput, TableLayout

__all__ = [
    "ConvDecoder",
    "ConvEncoder",
    "MLPDecoder",
    "MLPEncoder",
    "ResidualBlock",
    "build_networks",
    "build_outputs",
    "count_multiply_adds",
    "hidden_layer",
    "network_name",
]

_SMALLEST_CONV_SIDE = 8
_GROUP_CHANNELS = 8
_EMBEDDING_DIM = 16
_ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class MLPEncoder(nn.Module):
    """x_B... -> h_BF through fully connected layers.

    Parameters
    ----------
    config : ModelConfig
    shape : tuple of int
        Of one row. F is the last of the configuration's widths.
    """

    def __init__(self, config: ModelConfig, shape: Sequence[int]) -> None:
        super().__init__()
        self.hidden_dim = config.hidden_dims[-1]
        if config.likelihood == "tokens":
            first: nn.Module = nn.Sequential(nn.Flatten(), _Embedding(config.levels, _EMBEDDING_DIM), nn.Flatten())
            n_inputs = math.prod(shape) * _EMBEDDING_DIM
        elif config.columns:
            first = TableInput(config)
            n_inputs = first.n_outputs
        else:
            first, n_inputs = nn.Flatten(), math.prod(shape)
        self.layers = nn.Sequential(first, _dense(config, (n_inputs, *config.hidden_dims)))

    def forward(self, x: Tensor) -> Tensor:
        """Encode (B, ...) to (B, F)."""
        return self.layers(x)  # type: ignore[no-any-return]


class MLPDecoder(nn.Module):
    """z_BL -> likelihood parameters of shape (B, K, ...) through the encoder's widths in reverse.

    Parameters
    ----------
    config : ModelConfig
    shape : tuple of int
        Of one row.
    n_parameters : int
        K.
    """

    def __init__(self, config: ModelConfig, shape: Sequence[int], n_parameters: int) -> None:
        super().__init__()
        widths = tuple(reversed(config.hidden_dims))
        given = _output_shape(config, shape, n_parameters)
        self.layers = nn.Sequential(
            _dense(config, (config.latent_dim, *widths)),
            nn.Linear(widths[-1], math.prod(given)),
            nn.Unflatten(1, given),
        )

    def forward(self, z_BL: Tensor) -> Tensor:
        """Decode (B, L) to (B, K, ...), of a table to (B, 1, W)."""
        return self.layers(z_BL)  # type: ignore[no-any-return]


class ConvEncoder(nn.Module):
    """x_BCHW -> h_BF: convolutions of stride 2, then fully connected layers.

    Parameters
    ----------
    config : ModelConfig
        Each of its channels halves height and width, rounding up; F is the last of its widths.
    shape : tuple of int
        (C, H, W) of one image, any sizes.
    """

    def __init__(self, config: ModelConfig, shape: Sequence[int]) -> None:
        super().__init__()
        self.hidden_dim = config.hidden_dims[-1]
        blocks: list[nn.Module] = []
        for before, after in pairwise((shape[0], *config.channels)):
            blocks += [nn.Conv2d(before, after, 3, stride=2, padding=1), *_after(config, after)]
            blocks += [ResidualBlock(config, after) for _ in range(config.residual_blocks)]
        height, width = _sizes(shape, len(config.channels))[-1]
        n_values = config.channels[-1] * height * width
        self.layers = nn.Sequential(*blocks, nn.Flatten(), _dense(config, (n_values, *config.hidden_dims)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Encode (B, C, H, W) to (B, F)."""
        return self.layers(x_BCHW)  # type: ignore[no-any-return]


class ConvDecoder(nn.Module):
    """z_BL -> likelihood parameters of shape (B, K, C, H, W), the encoder's way back.

    Parameters
    ----------
    config : ModelConfig
    shape : tuple of int
        (C, H, W) of one image.
    n_parameters : int
        K.
    """

    def __init__(self, config: ModelConfig, shape: Sequence[int], n_parameters: int) -> None:
        super().__init__()
        channels = config.channels
        sizes = _sizes(shape, len(channels))[::-1]
        height, width = sizes[0]
        widths = (config.latent_dim, *reversed(config.hidden_dims), channels[-1] * height * width)
        outputs = (*reversed(channels[:-1]), n_parameters * shape[0])
        blocks: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise((channels[-1], *outputs))):
            blocks += [ResidualBlock(config, before) for _ in range(config.residual_blocks)]
            blocks.append(_doubling(before, after, sizes[i], sizes[i + 1]))
            if i < len(channels) - 1:
                blocks += _after(config, after)
        self.layers = nn.Sequential(
            _dense(config, widths),
            nn.Unflatten(1, (channels[-1], height, width)),
            *blocks,
            nn.Unflatten(1, (n_parameters, shape[0])),
        )

    def forward(self, z_BL: Tensor) -> Tensor:
        """Decode (B, L) to (B, K, C, H, W)."""
        return self.layers(z_BL)  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """x + f(x) with two convolutions in f, of which the last starts at zero: at first nothing is added.

    He et al. 2016, arXiv:1603.05027.
    """

    def __init__(self, config: ModelConfig, n_channels: int) -> None:
        super().__init__()
        last = nn.Conv2d(n_channels, n_channels, 3, padding=1)
        self.layers = nn.Sequential(nn.Conv2d(n_channels, n_channels, 3, padding=1), *_after(config, n_channels), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]  # there is one

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Add what the block has to say."""
        return x_BCHW + self.layers(x_BCHW)  # type: ignore[no-any-return]


class _Embedding(nn.Embedding):
    """Token ids (B, T) that come as floats -> (B, T, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.long())


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
    networks: tuple[MLPEncoder | ConvEncoder, MLPDecoder | ConvDecoder]
    if network_name(config, shape) == "mlp":
        networks = MLPEncoder(config, shape), MLPDecoder(config, shape, n_parameters)
    else:
        _refuse_convolutions(config, shape)
        networks = ConvEncoder(config, shape), ConvDecoder(config, shape, n_parameters)
    if config.initialization == "xavier":
        for network in networks:
            network.apply(_xavier)
    return networks


def build_outputs(config: ModelConfig, shape: Sequence[int], *, n_parameters: int) -> nn.Sequential:
    """Make what follows an MLP decoder's first hidden layer: (B, last of the widths) -> (B, K, ...)."""
    widths = tuple(reversed(config.hidden_dims))
    given = _output_shape(config, shape, n_parameters)
    return nn.Sequential(_dense(config, widths), nn.Linear(widths[-1], math.prod(given)), nn.Unflatten(1, given))


def network_name(config: ModelConfig, shape: Sequence[int]) -> str:
    """Resolve ``auto``: convolutions for images of at least 8 by 8 pixels, but not for tokens."""
    if config.network != "auto":
        return config.network
    image = len(shape) == 3 and min(shape[1:]) >= _SMALLEST_CONV_SIDE
    return "conv" if image and config.likelihood != "tokens" else "mlp"


def _output_shape(config: ModelConfig, shape: Sequence[int], n_parameters: int) -> tuple[int, ...]:
    return (1, TableLayout(config).n_outputs) if config.columns else (n_parameters, *shape)


def _refuse_convolutions(config: ModelConfig, shape: Sequence[int]) -> None:
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


def _xavier(layer: nn.Module) -> None:
    """Start a layer as Glorot and Bengio 2010 do, with biases of zero; what starts at zero stays so."""
    if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        if layer.weight.any():
            nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _dense(config: ModelConfig, widths: Sequence[int]) -> nn.Sequential:
    blocks = []
    for before, after in pairwise(widths):
        blocks.append(nn.Sequential(nn.Linear(before, after), *_after_linear(config, after)))
    return nn.Sequential(*blocks)


def hidden_layer(config: ModelConfig, width: int) -> nn.Sequential:
    """Make what follows the linear map of a hidden layer: normalisation and activation."""
    return nn.Sequential(*_after_linear(config, width))


def _after_linear(config: ModelConfig, width: int) -> list[nn.Module]:
    normalised: list[nn.Module] = [nn.LayerNorm(width)] if config.normalization else []
    return [*normalised, _ACTIVATIONS[config.activation]()]


def _after(config: ModelConfig, n_channels: int) -> list[nn.Module]:
    """Give what follows a convolution."""
    # Groups of eight channels where eight divides them; otherwise fewer and larger groups of equal size.
    n_groups = math.gcd(n_channels, max(1, n_channels // _GROUP_CHANNELS))
    normalised: list[nn.Module] = [nn.GroupNorm(n_groups, n_channels)] if config.normalization else []
    return [*normalised, _ACTIVATIONS[config.activation]()]


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
