"""What a bundle computed where it was exported: rows with their means, and the means' distribution.

A server compares the first with what it computes itself before it answers anybody, and the second with what it computes
for others. Of a whole pipeline there are rows with their labels and probabilities instead. All of it is in
``reference.safetensors``; bundles from before there was one have none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from vaefeat.bundle import Bundle
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import BundleError, InputError
from vaefeat.input_spec import InputSpec
from vaefeat.predictor import LABEL, PROBABILITIES, OnnxPredictor

__all__ = ["REFERENCE_FILE", "TOLERANCES", "PredictionReference", "Reference", "load_reference", "with_reference"]

REFERENCE_FILE = "reference.safetensors"
_CANARIES = 8
#: Of their rows together; of larger rows there is one.
_MOST_ROW_BYTES = 16 * 2**20
#: What is read: a server computes all of it, and keeps it.
_MOST_ROWS, _MOST_FILE_BYTES = 256, 64 * 2**20
_LEAST_ROWS = 64
_NAMES = {"rows", "features", "mean", "variance"}
#: Of the latents' standard deviation, and of probabilities, by the encoder's arithmetic. float32 on another processor
#: or on a GPU stays a hundred times below; a wrong kernel or a damaged device does not. Of float16 a CPU computes much
#: in float32, so that what a sound GPU rounds on the way, for the least varied latent, is already a hundredth.
TOLERANCES = {"float32": 1e-2, "int8": 1e-2, "float16": 5e-2}
#: Two classes whose probabilities differ by less may change places.
_AS_PROBABLE = 1e-2


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
        """Give the largest difference of means from the reference, in standard deviations of their latent.

        Parameters
        ----------
        features : ndarray of shape (m, latent_dim)
            Means of the first m of `rows`.
        """
        scale = np.sqrt(self.variance)
        # A latent that says nothing has no scale of its own; the others' tells what is small.
        scale = np.maximum(scale, 1e-3 * max(float(scale.max()), 1e-6))
        found = float(np.abs((features - self.features[: len(features)]) / scale).max())
        return found if np.isfinite(found) else float("inf")


def with_reference(bundle: Bundle, rows: NDArray[Any], *, seed: int = 0) -> Bundle:
    """Give a bundle a reference, where it has none or another.

    Parameters
    ----------
    bundle : Bundle
    rows : ndarray of shape (n, ...)
        Rows that it was not trained on; some hundreds tell how its latents are distributed.
    seed : int
        For shuffling the columns of tables.

    Returns
    -------
    Bundle
        In memory, with a digest of its own: a service takes it for a new version.

    Raises
    ------
    InputError
        Other rows than the bundle takes, or too few.
    """
    prepared = bundle.manifest.input.prepare(rows)
    if len(prepared) < _LEAST_ROWS:
        raise InputError(f"got {len(prepared)} rows to make a reference of, wanted {_LEAST_ROWS} or more")
    made: Reference | PredictionReference
    if bundle.manifest.pipeline is not None:
        known = load_reference(bundle) if bundle.manifest.gives_means else None
        predictor = OnnxPredictor(bundle, device="cpu")
        made = PredictionReference.of(predictor, prepared, encoder=None)
        if isinstance(known, PredictionReference):
            made = replace(made, mean=known.mean, variance=known.variance)
    else:
        made = Reference.of(bundle, prepared, seed=seed)
    contents = {file: bundle.read(file) for file in bundle.files} | {REFERENCE_FILE: made.to_bytes()}
    return Bundle.of(bundle.manifest, contents)


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
    mean, variance : ndarray of shape (latent_dim,), float32, or None
        Those of its encoder's :class:`Reference`; None where the graph does not give means.
    """

    rows: NDArray[Any]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    mean: NDArray[np.float32] | None = None
    variance: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, predictor: OnnxPredictor, rows: NDArray[Any], *, encoder: Reference | None) -> Self:
        """Compute from rows (n, ...), a few of which are taken; of the encoder's reference, the distribution."""
        step = max(1, len(rows) // _CANARIES)  # rows may be sorted by class
        some = _nobodys(rows[::step], predictor.input, seed=0)
        labels, probabilities = predictor.compute(some, [LABEL, PROBABILITIES])
        known = {} if encoder is None else {"mean": encoder.mean, "variance": encoder.variance}
        return cls(rows=some, labels=labels, probabilities=probabilities, **known)

    @property
    def outputs(self) -> tuple[str, ...]:
        """What is to be computed of `rows`, to be compared."""
        return (LABEL, PROBABILITIES)

    def to_bytes(self) -> bytes:
        """Serialise as ``reference.safetensors``."""
        tensors = {"rows": self.rows, "labels": self.labels, "probabilities": self.probabilities}
        if self.mean is not None and self.variance is not None:
            tensors |= {"mean": self.mean, "variance": self.variance}
        return safetensors.numpy.save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})

    def difference(self, labels: NDArray[np.int64], probabilities: NDArray[np.float32]) -> float:
        """Give the largest difference of a probability; infinity where a label is another, but for one as probable.

        Parameters
        ----------
        labels, probabilities : ndarray of shape (m,), (m, n_classes)
            Of the first m of `rows`.
        """
        own_labels, own = self.labels[: len(labels)], self.probabilities[: len(labels)]
        other = np.flatnonzero(labels != own_labels)
        apart = own[other, labels[other]] - own[other, own_labels[other]]
        if (np.abs(apart) > _AS_PROBABLE).any():
            return float("inf")
        found = float(np.abs(probabilities - own).max())
        return found if np.isfinite(found) else float("inf")


def _nobodys(rows: NDArray[Any], spec: InputSpec, *, seed: int) -> NDArray[Any]:
    """Take a few rows; of tables, whose rows may be somebody's, with each column shuffled by itself."""
    k = max(1, min(_CANARIES, _MOST_ROW_BYTES // spec.row_bytes))
    some = rows[:k]
    if spec.kind == "vector":
        some = np.random.default_rng(seed).permuted(rows, axis=0)[:k]
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
    if (n_bytes := bundle.files[REFERENCE_FILE]["bytes"]) > _MOST_FILE_BYTES + spec.row_bytes:
        raise BundleError(
            f"got a {REFERENCE_FILE} of {n_bytes} bytes in bundle {bundle.name!r}, wanted at most {_MOST_FILE_BYTES}; "
            "make a smaller one with vaefeat reference"
        )
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
        wanted |= {"features": (k, width)}
    if bundle.manifest.gives_means:
        wanted |= {"mean": (width,), "variance": (width,)}
    if shapes != wanted or k == 0 or tensors["rows"].dtype != np.dtype(spec.dtype):
        raise BundleError(f"got a {REFERENCE_FILE} in bundle {bundle.name!r} with {shapes}, wanted {wanted}")
    if k > _MOST_ROWS:
        raise BundleError(
            f"got a {REFERENCE_FILE} of {k} rows in bundle {bundle.name!r}, wanted at most {_MOST_ROWS}; "
            "make a smaller one with vaefeat reference"
        )
    return PredictionReference(**tensors) if whole else Reference(**tensors)
