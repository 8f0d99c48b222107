"""From a trained model to its bundle: export, prove, describe."""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaefeat.bundle import Bundle, Manifest
from vaefeat.config import ModelConfig, TrainConfig
from vaefeat.export import export_decoder, export_encoder, measure_parity
from vaefeat.inference import denoise
from vaefeat.input_spec import InputSpec
from vaefeat.model.diagnostics import diagnose
from vaefeat.model.networks import network_name
from vaefeat.model.vae import VAE, likelihood_name
from vaefeat.model_card import model_card, reconstruction_picture
from vaefeat.reference import REFERENCE_FILE, Reference
from vaefeat.table_schema import TableSchema
from vaefeat.training import TrainingResult
from vaefeat.weights import weights_of

__all__ = ["make_bundle", "resolved_model", "warn_of_collapse"]

_LOG = logging.getLogger("vaefeat")
_PARITY_ROWS = 1000
_DIAGNOSED_ROWS = 256
_PICTURE = "reconstructions.png"
_PICTURED = 12
_LIBRARIES = ("vaefeat", "torch", "onnx", "onnxscript", "numpy")


def make_bundle(
    vae: VAE,
    rows: NDArray[Any],
    result: TrainingResult,
    *,
    train: TrainConfig,
    name: str,
    data: dict[str, Any],
    table: TableSchema | None = None,
    columns: tuple[str, ...] | None = None,
) -> Bundle:
    """Export a trained model and describe it, in memory.

    Parameters
    ----------
    vae : VAE
    rows : ndarray of shape (n, ...)
        Training rows, or a sample of them.
    result : TrainingResult
    train : TrainConfig
    name : str
    data : dict
        What the manifest says of the training rows: their fingerprint and number.
    table : TableSchema, optional
        What their columns are.
    columns : tuple of str, optional
        What they are called, where all are numbers.

    The graphs are compared with torch on held-out rows first; see :func:`vaefeat.export.measure_parity`.
    """
    vae = vae.cpu().eval()
    shown = np.array(result.heldout_rows[:_PARITY_ROWS])
    contents = {
        "encoder.onnx": export_encoder(vae, shown),
        "decoder.onnx": export_decoder(vae),
        "weights.safetensors": weights_of(vae),
    }
    model = resolved_model(vae.config, vae.row_shape)
    evaluation = result.evaluation
    # One held-out row, all that a handful leaves, does not tell what varies.
    looked_at = shown if len(shown) > 1 else rows
    # The variance of a flow's mean over the rows is only known through samples, and two would drown it in noise.
    n_samples = 16 if model.posterior in {"planar", "iaf"} else 2
    found = diagnose(vae, np.array(looked_at[:_DIAGNOSED_ROWS]), n_samples=n_samples, seed=train.seed)
    manifest = Manifest(
        name=name,
        input=InputSpec.of(rows, table=_scaled(table, vae), names=columns),
        outputs={"mean": model.latent_dim, "logvar": model.latent_dim, "hidden": vae.encoder.hidden_dim},
        latent_dim=model.latent_dim,
        active_units=evaluation.active,
        objective=train.objective,
        model=model.to_dict(),
        train=train.to_dict(),
        data=data,
        metrics={
            "elbo": evaluation.elbo,
            "log_likelihood": evaluation.log_likelihood,
            "kl": evaluation.kl,
            "collapse": found.collapse,
            "advice": found.advice if found.severe else "",
            "epochs": len(result.history),
            "n_heldout": len(result.heldout),
            "precision": result.engine.precision,
            "compiled": result.engine.compiled,
        },
        parity={},
        versions={library: _version(library) for library in _LIBRARIES},
    )
    exported = Bundle.of(manifest, contents)
    manifest = replace(manifest, parity=measure_parity(vae, exported, shown))
    contents[REFERENCE_FILE] = Reference.of(exported, np.array(looked_at[:_PARITY_ROWS]), seed=train.seed).to_bytes()
    picture = None
    if manifest.input.kind == "image":
        picture = _PICTURE
        contents[picture] = reconstruction_picture(shown[:_PICTURED], denoise(vae, shown[:_PICTURED]))
    contents["README.md"] = model_card(manifest, picture=picture).encode()
    return Bundle.of(manifest, contents)


def warn_of_collapse(bundle: Bundle) -> None:
    """Warn, by the logger ``vaefeat``, where the posterior has collapsed, and say what to try."""
    # Latents that a good model leaves unused are no reason to worry; a code that says next to nothing is.
    if advice := bundle.manifest.metrics["advice"]:
        _LOG.warning("%s: %s", bundle.name, advice)


def resolved_model(model: ModelConfig, row_shape: tuple[int, ...]) -> ModelConfig:
    """Name what `auto` stands for."""
    return replace(model, likelihood=likelihood_name(model, row_shape), network=network_name(model, row_shape))


def _scaled(table: TableSchema | None, vae: VAE) -> TableSchema | None:
    if table is None:
        return None
    scaling = vae.preprocessing
    return table.scaled(scaling.shift.tolist(), (1 / scaling.scale).tolist())


def _version(library: str) -> str:
    if library == "vaefeat":
        from vaefeat import __version__

        return __version__
    return version(library)
