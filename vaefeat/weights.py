"""A model's weights as a file without code, and the model back from a bundle; the exporter is not needed for either."""

from __future__ import annotations

import safetensors
import safetensors.torch

from vaefeat.bundle import Bundle
from vaefeat.config import ModelConfig
from vaefeat.errors import BundleError, ConfigError
from vaefeat.model.vae import VAE

__all__ = ["restore_vae", "weights_of"]


def weights_of(vae: VAE) -> bytes:
    """Serialise the weights and the scaling, as ``weights.safetensors``."""
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in vae.state_dict().items()})


def restore_vae(bundle: Bundle) -> VAE:
    """Rebuild the torch model from a bundle, on the CPU, in evaluation mode.

    Raises
    ------
    BundleError
        The weights do not fit the configuration.
    """
    weights = bundle.read("weights.safetensors")
    try:
        vae = VAE(ModelConfig.from_dict(bundle.manifest.model), bundle.manifest.input.shape)
        vae.load_state_dict(safetensors.torch.load(weights))
    except (ConfigError, RuntimeError, safetensors.SafetensorError) as error:
        raise BundleError(
            f"got weights in bundle {bundle.name!r} that do not fit its configuration: {error}"
        ) from error
    return vae.eval()
