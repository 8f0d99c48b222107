"""From torch to ONNX, and the proof that both compute the same."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnxscript  # noqa: F401 - what torch.onnx.export needs is missed here, not after hours of training
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vaefeat.bundle import Bundle
from vaefeat.decoder import OnnxDecoder
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import BundleError, ExportError
from vaefeat.model.classifier import Classifier
from vaefeat.model.vae import VAE
from vaefeat.runtime import check_graph

__all__ = [
    "OPSET",
    "PARITY_TOLERANCE",
    "export_decoder",
    "export_encoder",
    "measure_parity",
]

#: skl2onnx, which appends classifiers to the graph, goes no further than 22.
OPSET = 20
#: Largest difference between ONNX Runtime and torch, in units of the output's own scale.
PARITY_TOLERANCE = 1e-4


def export_encoder(model: VAE | Classifier, example: NDArray[Any]) -> bytes:
    """Export rows -> (mean, logvar, hidden), and of a classifier probability after them, scaling included.

    Parameters
    ----------
    model : VAE or Classifier
        On the CPU.
    example : ndarray of shape (n, ...)
        Rows of the dtype that the graph will take; n of any size.

    Returns
    -------
    bytes
        A ``ModelProto`` with a dynamic batch axis, no random node and no external data.

    Raises
    ------
    ExportError
        The graph has what it must not have.
    """
    # Two rows: torch.export takes an axis of one row for a constant.
    rows = torch.from_numpy(np.resize(example, (2, *example.shape[1:])))
    probability = ("probability",) if isinstance(model, Classifier) else ()
    return _export(_Encoder(model), rows, name="rows", outputs=("mean", "logvar", "hidden", *probability))


def export_decoder(vae: VAE) -> bytes:
    """Export features -> rows in the units of the training rows, float32; see :func:`export_encoder`."""
    return _export(_Decoder(vae), torch.zeros(2, vae.config.latent_dim), name="latents", outputs=("rows",))


def measure_parity(model: VAE | Classifier, bundle: Bundle, rows: NDArray[Any]) -> dict[str, Any]:
    """Compare ONNX Runtime with torch on real rows.

    Parameters
    ----------
    model : VAE or Classifier
        What `bundle` was exported from, on the CPU.
    bundle : Bundle
    rows : ndarray of shape (n, ...)

    Returns
    -------
    dict
        ``n_rows``, ``tolerance``, and per output ``max_abs_difference`` and ``scale``. The scale of the mean is the
        smallest standard deviation among the latents under the aggregate posterior (variance of the mean and mean of
        the variance together); that of the log-variance is 1, since it is a logarithm; that of the hidden layer is its
        standard deviation; that of probabilities is 1; reconstructions, where the bundle decodes, are compared
        in the scale of the network's input, of which 1 is the unit.

    Raises
    ------
    ExportError
        An output differs by more than `tolerance` of its scale.
    """
    encoder = OnnxEncoder(bundle, device="cpu")
    vae = model.vae if isinstance(model, Classifier) else model
    with torch.no_grad():
        wanted = dict(
            zip(encoder.outputs, (t.numpy() for t in model.features(torch.from_numpy(np.array(rows)))), strict=True)
        )
    differences = {name: np.abs(encoder.embed(rows, output=name) - wanted[name]) for name in wanted}
    if bundle.manifest.decodes:
        differences["reconstruction"] = _decoded_apart(vae, bundle, wanted["mean"])
    latent_variance = wanted["mean"].var(axis=0) + np.exp(wanted["logvar"]).mean(axis=0)
    scales = {
        "mean": float(np.sqrt(latent_variance.min())),
        "logvar": 1.0,
        "hidden": float(wanted["hidden"].std()) or 1.0,
        "probability": 1.0,
        "reconstruction": 1.0,
    }
    outputs = {
        name: {"max_abs_difference": float(difference.max()), "scale": scales[name]}
        for name, difference in differences.items()
    }
    for name, figures in outputs.items():
        if not figures["max_abs_difference"] <= PARITY_TOLERANCE * figures["scale"]:
            raise ExportError(
                f"the ONNX graph's {name} differs from torch's by {figures['max_abs_difference']:.3g} on {len(rows)} "
                f"rows, wanted at most {PARITY_TOLERANCE:g} of its scale {figures['scale']:.3g}; nothing was written. "
                "Please report it with the model's configuration"
            )
    return {"n_rows": len(rows), "tolerance": PARITY_TOLERANCE, "outputs": outputs}


def _decoded_apart(vae: VAE, bundle: Bundle, features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Compare reconstructions in the scale of the network's input, where every column counts alike."""
    with torch.no_grad():
        z = vae.latents(torch.from_numpy(features))
        wanted, decided = vae.reconstruct(z).numpy(), vae.likelihood.decided(vae.decoder(z)).numpy()
    apart = np.abs(OnnxDecoder(bundle, device="cpu").decode(features) - wanted)
    # What float32 cannot tell apart in the units of the rows is no difference.
    beyond = np.maximum(apart - 2 * np.spacing(np.abs(wanted)), 0)
    # Of two categories as likely as each other either is right.
    scaled: NDArray[np.float32] = np.where(decided, beyond * vae.preprocessing.scale.numpy(), np.float32(0))
    return scaled


class _Encoder(nn.Module):
    def __init__(self, model: VAE | Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        return self.model.features(rows)


class _Decoder(nn.Module):
    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.reconstruct(self.vae.latents(latents))


def _export(module: nn.Module, example: Tensor, *, name: str, outputs: Sequence[str]) -> bytes:
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            input_names=[name],
            output_names=list(outputs),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    assert program is not None  # torch.onnx.export returns None only without dynamo
    model = program.model_proto
    _strip(model)
    content: bytes = model.SerializeToString()
    try:
        check_graph(content, what="the exported graph")
    except BundleError as error:
        raise ExportError(f"{error}; nothing was written") from error
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    if opset > OPSET:
        raise ExportError(f"the exported graph has opset {opset}, wanted at most {OPSET}; nothing was written")
    return content


def _strip(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes: they hold stack traces with paths of this machine, and make equal models differ."""
    del model.metadata_props[:]
    model.doc_string = model.graph.doc_string = ""
    del model.graph.metadata_props[:]
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        part.doc_string = ""
        del part.metadata_props[:]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks, which nobody can act on, off the terminal; its errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
