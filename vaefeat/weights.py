"""A model's weights as a file without code, and the model back from a bundle; the exporter is not needed for either."""

from __future__ import annotations

import safetensors
import safetensors.torch
import torch
from torch import nn

from vaefeat.bundle import Bundle
from vaefeat.config import ModelConfig
from vaefeat.errors import BundleError, ConfigError, InputError
from vaefeat.model.classifier import Classifier
from vaefeat.model.evaluation import fixed_noise
from vaefeat.model.vae import VAE

__all__ = ["restore_classifier", "restore_vae", "weights_of"]


def weights_of(module: nn.Module) -> bytes:
    """Serialise weights: a VAE with its scaling as ``weights.safetensors``, a head as ``head.safetensors``."""
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in module.state_dict().items()})


def restore_vae(bundle: Bundle) -> VAE:
    """Rebuild the torch model from a bundle, on the CPU, in evaluation mode.

    Raises
    ------
    BundleError
        The weights do not fit the configuration.
    """
    weights = bundle.read("weights.safetensors")
    try:
        # Weights are drawn, and loaded over.
        with fixed_noise(0, torch.device("cpu")):
            vae = VAE(ModelConfig.from_dict(bundle.manifest.model), bundle.manifest.input.shape)
        tensors = safetensors.torch.load(weights)
        if "basis" in tensors:
            vae.basis = torch.empty(vae.config.latent_dim, vae.config.latent_dim)
        vae.load_state_dict(tensors)
    except (ConfigError, RuntimeError, safetensors.SafetensorError) as error:
        raise BundleError(
            f"got weights in bundle {bundle.name!r} that do not fit its configuration: {error}"
        ) from error
    return vae.eval()


def restore_classifier(bundle: Bundle) -> Classifier:
    """Rebuild a fine-tuned classifier from a bundle, on the CPU, in evaluation mode.

    Raises
    ------
    InputError
        The bundle holds no classifier.
    BundleError
        The weights do not fit the configuration.
    """
    if not bundle.manifest.classes:
        raise InputError(f"got bundle {bundle.name!r}, which is no classifier; make one with FineTuneClassifier")
    classifier = Classifier(restore_vae(bundle), len(bundle.manifest.classes))
    weights = bundle.read("head.safetensors")
    try:
        classifier.head.load_state_dict(safetensors.torch.load(weights))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise BundleError(
            f"got a head in bundle {bundle.name!r} that does not fit its configuration: {error}"
        ) from error
    return classifier.eval()
