"""What a bundle computed where it was exported: rows with their means, and the means' distribution.

A server compares the first with what it computes itself before it answers anybody, and the second with what it computes
for others. Of a whole pipeline there are rows with their labels and probabilities instead. All of it is in
``reference.safetensors``; bundles from before there was one have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from vaefeat.bundle import Bundle
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import BundleError
from vaefeat.input_spec import InputSpec
from vaefeat.predictor import LABEL, PROBABILITIES, OnnxPredictor

__all__ = ["REFERENCE_FILE", "PredictionReference", "Reference", "load_reference"]

REFERENCE_FILE = "reference.safetensors"
_CANARIES = 8
_NAMES = {"rows", "features", "mean", "variance"}
#: Of the latents' standard deviation, and of probabilities. float32 on another processor or on a GPU stays a hundred
#: times below; a wrong kernel, a damaged device or half precision that does not suit the model do not.
TOLERANCE = 1e-2


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Figures of one encoder.

    Parameters
    ----------
    rows : ndarray of shape (k, ...)
        Rows as the encoder takes them. Of tables each column is shuffled by itself, so that no row is anybody's.
    features : ndarray of shape (k, latent_dim), float32
        Their posterior means, computed by ONNX Runtime on a CPU.
    mean, variance : ndarray of shape (latent_dim,), float32
        Of the posterior mean over rows that were not trained on, where there are enough.
    """

    rows: NDArray[Any]
    features: NDArray[np.float32]
    mean: NDArray[np.float32]
    variance: NDArray[np.float32]

    @classmethod
    def of(cls, bundle: Bundle, rows: NDArray[Any], *, seed: int) -> Self:
        """Compute with a bundle, on the CPU, from some hundred rows of shape (n, ...)."""
        encoder = OnnxEncoder(bundle, device="cpu")
        computed = encoder.embed(rows)
        some = _nobodys(rows, bundle.manifest.input, seed=seed)
        return cls(
            rows=some,
            features=encoder.embed(some),
            mean=computed.mean(axis=0),
            variance=computed.var(axis=0),
        )

    @property
    def outputs(self) -> tuple[str, ...]:
        """What is to be computed of `rows`, to be compared."""
        return ("mean",)

    def to_bytes(self) -> bytes:
        """Serialise as ``reference.safetensors``."""
        return safetensors.numpy.save({name: np.ascontiguousarray(getattr(self, name)) for name in sorted(_NAMES)})

    def difference(self, features: NDArray[np.float32]) -> float:
        """Give the largest difference of means of `rows` from the reference, in standard deviations of their latent."""
        scale = np.sqrt(self.variance)
        # A latent that says nothing has no scale of its own; the others' tells what is small.
        scale = np.maximum(scale, 1e-3 * max(float(scale.max()), 1e-6))
        found = float(np.abs((features - self.features) / scale).max())
        return found if np.isfinite(found) else float("inf")


@dataclass(frozen=True, kw_only=True)
class PredictionReference:
    """Rows of one pipeline.

    Parameters
    ----------
    rows : ndarray of shape (k, ...)
        Rows as the encoder takes them. Of tables each column is shuffled by itself.
    labels : ndarray of shape (k,), int64
        Place of each one's label among the classes.
    probabilities : ndarray of shape (k, n_classes), float32
        Both computed by ONNX Runtime on a CPU.
    """

    rows: NDArray[Any]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]

    @classmethod
    def of(cls, predictor: OnnxPredictor, rows: NDArray[Any]) -> Self:
        """Compute from rows (n, ...), a few of which are taken."""
        step = max(1, len(rows) // _CANARIES)  # rows may be sorted by class
        some = _nobodys(rows[::step], predictor.input, seed=0)
        labels, probabilities = predictor.compute(some, [LABEL, PROBABILITIES])
        return cls(rows=some, labels=labels, probabilities=probabilities)

    @property
    def outputs(self) -> tuple[str, ...]:
        """What is to be computed of `rows`, to be compared."""
        return (LABEL, PROBABILITIES)

    def to_bytes(self) -> bytes:
        """Serialise as ``reference.safetensors``."""
        tensors = {"rows": self.rows, "labels": self.labels, "probabilities": self.probabilities}
        return safetensors.numpy.save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})

    def difference(self, labels: NDArray[np.int64], probabilities: NDArray[np.float32]) -> float:
        """Give the largest difference of a probability; infinity where a label is another, but for one as probable."""
        other = np.flatnonzero(labels != self.labels)
        apart = self.probabilities[other, labels[other]] - self.probabilities[other, self.labels[other]]
        if (np.abs(apart) > TOLERANCE).any():
            return float("inf")
        found = float(np.abs(probabilities - self.probabilities).max())
        return found if np.isfinite(found) else float("inf")


def _nobodys(rows: NDArray[Any], spec: InputSpec, *, seed: int) -> NDArray[Any]:
    """Take a few rows; of tables, whose rows may be somebody's, with each column shuffled by itself."""
    some = rows[:_CANARIES]
    if spec.kind == "vector":
        some = np.random.default_rng(seed).permuted(rows, axis=0)[:_CANARIES]
    return np.ascontiguousarray(some)


def load_reference(bundle: Bundle) -> Reference | PredictionReference | None:
    """Read the reference of a bundle; None where it has none.

    Raises
    ------
    BundleError
        The file does not fit the bundle.
    """
    if REFERENCE_FILE not in bundle.files:
        return None
    spec, width = bundle.manifest.input, bundle.manifest.latent_dim
    try:
        tensors = safetensors.numpy.load(bundle.read(REFERENCE_FILE))
    except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a type that NumPy has not
        raise BundleError(f"got a {REFERENCE_FILE} in bundle {bundle.name!r} that is none: {error}") from error
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    k = shapes.get("rows", (0,))[0]
    wanted: dict[str, tuple[int, ...]] = {"rows": (k, *spec.shape)}
    whole = bundle.manifest.pipeline is not None
    if whole:
        wanted |= {"labels": (k,), "probabilities": (k, len(bundle.manifest.classes))}
    else:
        wanted |= {"features": (k, width), "mean": (width,), "variance": (width,)}
    if shapes != wanted or k == 0 or tensors["rows"].dtype != np.dtype(spec.dtype):
        raise BundleError(f"got a {REFERENCE_FILE} in bundle {bundle.name!r} with {shapes}, wanted {wanted}")
    return PredictionReference(**tensors) if whole else Reference(**tensors)
