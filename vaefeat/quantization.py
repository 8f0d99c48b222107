"""An encoder in fewer bits, and the proof that its features are as good.

**int8**, for processors. Weights and inputs of the hidden layers become 8-bit integers (quantize and dequantize nodes
with fixed scales, "static QDQ"); activations in between stay float32. Fixed scales matter: with scales taken from each
batch, a row's features would depend on the rows around it. Where the pace of an encoder is that of its matrix products,
a processor with int8 instructions computes it several times faster.

**float16**, for GPUs (:mod:`vaefeat.half_precision`). On a processor it gains nothing.

In both, the layers that compute mean, log-variance and probabilities stay float32, and so do rows and features. Whether
the features bear it is measured, and a bundle that fails is not written.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from vaefeat.bundle import Bundle
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import InputError, QuantizationError
from vaefeat.half_precision import simulate_half, to_half
from vaefeat.model_card import renamed
from vaefeat.reference import REFERENCE_FILE, TOLERANCES, Reference

__all__ = ["QuantizationGate", "quantize"]

_log = logging.getLogger("vaefeat")
_CALIBRATION_ROWS, _JUDGED_ROWS = 512, 4096
_LEAST_ROWS = 64
_LAYERS = ("Gemm", "MatMul", "Conv")
#: What makes another byte of a byte, or none, whatever the others are.
_BYTE_BY_BYTE = ("Cast", "Sub", "Mul", "Clip", "Reshape")
_LABELS_A_CLASS, _DRAWS = 10, 5


@dataclass(frozen=True, kw_only=True)
class QuantizationGate:
    """What an encoder in fewer bits has to keep.

    Parameters
    ----------
    difference : float
        Largest root mean square, over the rows, of a latent's difference, in its standard deviations.
    error : float
        Largest rise of the error of logistic regression with 10 labels a class, in percentage points; looked at where
        there are labels.
    probability : float
        Of a classifier, the largest difference of any class's probability in any row.
    """

    difference: float = 0.1
    error: float = 0.5
    probability: float = 0.2


def quantize(
    bundle: Bundle,
    rows: NDArray[Any],
    *,
    to: Literal["int8", "float16"] = "int8",
    labels: NDArray[Any] | None = None,
    name: str | None = None,
    gate: QuantizationGate | None = None,
) -> Bundle:
    """Make a bundle whose encoder computes in fewer bits.

    Parameters
    ----------
    bundle : Bundle
    rows : ndarray of shape (n, ...)
        Real rows such as it is going to embed. For int8 half of them, 512 at most, set the scales; the others judge.
    to : {"int8", "float16"}
    labels : ndarray of shape (n,), optional
        Of the rows; with them the error of a classifier is compared, too, over the classes that have more than 10 rows
        among those that judge. What that leaves out is told to the logger ``vaefeat``, as a warning.
    name : str, optional
        Of the new bundle; the old one's with ``-int8`` or ``-float16`` when None.
    gate : QuantizationGate, optional

    Returns
    -------
    Bundle
        In memory. What was measured is in its manifest, under ``parity["quantization"]``.

    Raises
    ------
    InputError
        Too few rows, or others than the bundle takes; another number of labels.
    QuantizationError
        The features change by more than the gate allows, or are not finite: float16 ends at 65,504.
    """
    gate = gate or QuantizationGate()
    prepared = bundle.manifest.input.prepare(rows)
    if len(prepared) < _LEAST_ROWS:
        raise InputError(f"got {len(prepared)} rows to set scales with and to judge by, wanted {_LEAST_ROWS} or more")
    if "quantization" in bundle.manifest.parity:
        raise InputError(
            f"got bundle {bundle.name!r}, which is in {bundle.manifest.precision} already; take the one that it was "
            "made of"
        )
    if labels is not None and len(labels) != len(prepared):
        raise InputError(f"got {len(labels)} labels of {len(prepared)} rows, wanted one for each, or none")
    order = np.random.default_rng(0).permutation(len(prepared))
    n_calibrating = min(_CALIBRATION_ROWS, len(prepared) // 2) if to == "int8" else 0
    judging = order[n_calibrating:][:_JUDGED_ROWS]

    model = _named(bundle.read("encoder.onnx"))
    if to == "int8":
        coarse = _with_encoder(bundle, _quantized(model, prepared[order[:n_calibrating]]))
        judged = coarse
    else:
        coarse = _with_encoder(bundle, to_half(model, heads=_heads(model), layers=_LAYERS))
        judged = _with_encoder(bundle, simulate_half(model, heads=_heads(model), layers=_LAYERS))
    chosen = None if labels is None else np.asarray(labels)[judging]
    found = _compared(bundle, judged, prepared[judging], chosen, to=to)
    _hold(found, gate, to=to)
    reference = Reference.of(coarse, prepared[judging], seed=0)
    _hold_reference(reference, judged, to=to)
    contents = {file: coarse.read(file) for file in coarse.files} | {REFERENCE_FILE: reference.to_bytes()}
    parity = {**bundle.manifest.parity, "quantization": {"format": to, "base": bundle.digest, **found}}
    return renamed(
        Bundle.of(replace(bundle.manifest, parity=parity), contents), name or f"{bundle.name[: 63 - len(to)]}-{to}"
    )


def _with_encoder(bundle: Bundle, model: onnx.ModelProto) -> Bundle:
    contents = {file: bundle.read(file) for file in bundle.files}
    return Bundle.of(bundle.manifest, {**contents, "encoder.onnx": model.SerializeToString()})


def _named(content: bytes) -> onnx.ModelProto:
    """Read a graph and name its nodes: by names nodes are left out."""
    model = onnx.load_model_from_string(content)
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    return model


def _heads(model: onnx.ModelProto) -> list[str]:
    outputs = {output.name for output in model.graph.output} - {"hidden"}
    return [node.name for node in model.graph.node if _leads_straight_to(node, outputs, model)]


class _Rows:
    """Hands rows to ONNX Runtime's calibration, batch by batch."""

    def __init__(self, rows: NDArray[Any]) -> None:
        self._batches: Iterator[NDArray[Any]] = iter(np.array_split(rows, max(1, len(rows) // 64)))

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"rows": batch}


def _quantized(model: onnx.ModelProto, rows: NDArray[Any]) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    with _quiet(), tempfile.TemporaryDirectory(prefix="vaefeat-") as folder:
        written = Path(folder) / "encoder.onnx"
        quantize_static(
            model,
            written,
            _Rows(rows),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_LAYERS),
            nodes_to_exclude=_heads(model),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # Activations are computed of what a product gives in float32: to round that first saves nothing, because
            # it would be made float32 again, twice, and takes most of the precision.
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )
        quantized = onnx.load_model(written)
    _feed_bytes(quantized)
    # The opset of the layers that ONNX Runtime could have put in has no place in a bundle.
    domains = [entry for entry in quantized.opset_import if entry.domain in ("", "ai.onnx")]
    del quantized.opset_import[:]
    quantized.opset_import.extend(domains)
    del quantized.metadata_props[:]
    return quantized


def _feed_bytes(model: onnx.ModelProto) -> None:
    """Give rows of bytes to the first layer as they are, where a byte that is scaled and rounded is that byte again."""
    (rows,) = model.graph.input
    if rows.type.tensor_type.elem_type != onnx.TensorProto.UINT8:
        return
    by_output = {name: node for node in model.graph.node for name in node.output}
    for rounding in [node for node in model.graph.node if node.op_type == "QuantizeLinear"]:
        path, name = [rounding], rounding.input[0]
        while (node := by_output.get(name)) is not None and node.op_type in _BYTE_BY_BYTE:
            path.append(node)
            name = node.input[0]
        if name == rows.name and _leaves_bytes(model, rounding.output[0]):
            _leave_out(model, path[::-1])


def _leaves_bytes(model: onnx.ModelProto, output: str) -> bool:
    """Whether a value of the graph is, for each of the 256 bytes, that byte."""
    import onnxruntime as ort

    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    probed.graph.output.append(onnx.helper.make_empty_tensor_value_info(output))
    shape = [axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim][1:]
    every_byte = np.arange(256, dtype=np.uint8).reshape(256, *[1] * len(shape))
    session = ort.InferenceSession(probed.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run([output], {"rows": np.broadcast_to(every_byte, (256, *shape))})
    return found.dtype == np.uint8 and bool((found.reshape(256, -1) == every_byte.reshape(256, 1)).all())


def _leave_out(model: onnx.ModelProto, path: list[onnx.NodeProto]) -> None:
    """Take a path of nodes that starts at the rows out of the graph, except for what gives rows their shape."""
    graph, name = model.graph, "rows"
    for node in path:
        if node.op_type == "Reshape":
            node.input[0] = name
            name = node.output[0]
        else:
            graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [name if given == path[-1].output[0] else given for given in node.input]
    # Types of what was between have changed, and constants of what is gone are nobody's.
    del graph.value_info[:]
    used = {given for node in graph.node for given in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back advice to let ONNX Runtime rewrite the graph first, which would put operators of its own into it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _leads_straight_to(node: onnx.NodeProto, outputs: set[str], model: onnx.ModelProto) -> bool:
    """Whether what a node computes reaches an output through no other layer."""
    if node.op_type not in _LAYERS:
        return False
    reached, users = set(node.output), list(model.graph.node)
    # Nodes are in the order of computing.
    for user in users:
        if reached & set(user.input) and user.op_type not in _LAYERS:
            reached |= set(user.output)
    return bool(reached & outputs) and not any(
        user.op_type in _LAYERS and reached & set(user.input) for user in users if user is not node
    )


def _compared(
    before: Bundle, after: Bundle, rows: NDArray[Any], labels: NDArray[Any] | None, *, to: str
) -> dict[str, Any]:
    """Measure both on rows that no scale was set with."""
    encoders = [OnnxEncoder(bundle, device="cpu") for bundle in (before, after)]
    exact, coarse = (encoder.embed(rows) for encoder in encoders)
    if lost := np.count_nonzero(~np.isfinite(coarse).all(axis=1)):
        raise QuantizationError(
            f"in {to} the means of {lost} of {len(rows)} rows are not finite, because a value on the way is too large "
            f"for {to}; nothing was written. Serve it in float32"
        )
    scale = np.maximum(exact.std(axis=0), 1e-3 * max(float(exact.std(axis=0).max()), 1e-12))
    differences = (coarse - exact) / scale
    found: dict[str, Any] = {
        # Of the worst latent: over all of them, one that is lost would not be seen.
        "difference": float(np.sqrt(np.mean(differences**2, axis=0)).max()),
        "max_difference": float(np.abs(differences).max()),
        "n_rows": len(rows),
    }
    if "probability" in before.manifest.outputs:
        sure, unsure = (encoder.embed(rows, output="probability") for encoder in encoders)
        found["probability_difference"] = float(np.abs(unsure - sure).max())
    if labels is not None and (judging := _judging(labels)).any():
        errors = [_errors(features[judging], labels[judging]) for features in (exact, coarse)]
        found |= {"error": float(np.mean(errors[0])), f"error_{to}": float(np.mean(errors[1]))}
    return found


def _judging(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Tell which rows are of classes that have enough of them; none where fewer than two have."""
    names, counts = np.unique(labels, return_counts=True)
    large = names[counts > _LABELS_A_CLASS]
    if len(large) < 2:
        _log.warning(
            "labels do not judge: %d of %d classes have more than %d rows among the %d that judge, and two are needed",
            *(len(large), len(names), _LABELS_A_CLASS, len(labels)),
        )
        return np.zeros(len(labels), bool)
    if len(large) < len(names):
        _log.warning(
            "%d of %d classes are left out of the comparison of errors: they have %d rows or fewer among the %d that "
            "judge",
            *(len(names) - len(large), len(names), _LABELS_A_CLASS, len(labels)),
        )
    return np.isin(labels, large)


def _errors(features: NDArray[np.float32], labels: NDArray[Any]) -> list[float]:
    """Errors in percent of logistic regression on some draws of labels."""
    from sklearn.linear_model import LogisticRegression

    names = np.unique(labels)
    errors = []
    for seed in range(_DRAWS):
        random = np.random.default_rng(seed)
        chosen = np.concatenate(
            [random.choice(np.flatnonzero(labels == name), _LABELS_A_CLASS, replace=False) for name in names]
        )
        others = np.setdiff1d(np.arange(len(labels)), chosen)
        head = LogisticRegression(max_iter=5000).fit(features[chosen], labels[chosen])
        errors.append(100 * (1 - head.score(features[others], labels[others])))
    return errors


def _hold(found: dict[str, Any], gate: QuantizationGate, *, to: str) -> None:
    if not found["difference"] <= gate.difference:
        raise QuantizationError(
            f"in {to} the means differ by {found['difference']:.3g} standard deviations (the worst latent), wanted at "
            f"most {gate.difference:g}; nothing was written. Serve it in float32, or allow more if classifiers bear it"
        )
    if "error" in found and not found[f"error_{to}"] - found["error"] <= gate.error:
        raise QuantizationError(
            f"in {to} the error with {_LABELS_A_CLASS} labels a class is {found[f'error_{to}']:.2f} %, in float32 "
            f"{found['error']:.2f} %, wanted at most {gate.error:g} points more; nothing was written"
        )
    if not found.get("probability_difference", 0.0) <= gate.probability:
        raise QuantizationError(
            f"in {to} a class's probability differs by {found['probability_difference']:.3g} in one of the rows, "
            f"wanted at most {gate.probability:g}; nothing was written. Serve it in float32, or allow more if "
            "decisions bear it"
        )


def _hold_reference(reference: Reference, judged: Bundle, *, to: str) -> None:
    """Refuse a bundle whose canary would find a sound GPU faulty, which rounds where a CPU does not."""
    difference = reference.difference(OnnxEncoder(judged, device="cpu").embed(reference.rows))
    if not difference <= (allowed := TOLERANCES[to] / 2):
        raise QuantizationError(
            f"in {to} devices that round differently differ by {difference:.3g} standard deviations, wanted at most "
            f"{allowed:g}, half of what a service takes for a fault; nothing was written. Serve it in float32"
        )
