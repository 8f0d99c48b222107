"""What a bundle's encoder computed where it was exported: rows with their means, and the means' distribution.

A server compares the first with what it computes itself before it answers anybody, and the second with what it computes
for others. Both are in ``reference.safetensors``; bundles from before there was one have none.
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
from vaefeat.errors import BundleError, InputError

__all__ = ["REFERENCE_FILE", "TOLERANCES", "Reference", "load_reference", "with_reference"]

REFERENCE_FILE = "reference.safetensors"
_CANARIES = 8
#: Of their rows together; of larger rows there is one.
_MOST_ROW_BYTES = 16 * 2**20
#: What is read: a server computes all of it, and keeps it.
_MOST_ROWS, _MOST_FILE_BYTES = 256, 64 * 2**20
_LEAST_ROWS = 64
_NAMES = {"rows", "features", "mean", "variance"}
#: Of the latents' standard deviation, by the encoder's arithmetic. float32 on another processor or on a GPU stays a
#: hundred times below; a wrong kernel or a damaged device does not. Of float16 a CPU computes much in float32, so that
#: what a sound GPU rounds on the way, for the least varied latent, is already a hundredth.
TOLERANCES = {"float32": 1e-2, "int8": 1e-2, "float16": 5e-2}


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
        k = max(1, min(_CANARIES, _MOST_ROW_BYTES // bundle.manifest.input.row_bytes))
        some = rows[:k]
        if bundle.manifest.input.kind == "vector":
            random = np.random.default_rng(seed)
            some = random.permuted(rows, axis=0)[:k]
        return cls(
            rows=np.ascontiguousarray(some),
            features=encoder.embed(some),
            mean=computed.mean(axis=0),
            variance=computed.var(axis=0),
        )

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
    contents = {file: bundle.read(file) for file in bundle.files}
    contents[REFERENCE_FILE] = Reference.of(bundle, prepared, seed=seed).to_bytes()
    return Bundle.of(bundle.manifest, contents)


def load_reference(bundle: Bundle) -> Reference | None:
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
    wanted = {"rows": (k, *spec.shape), "features": (k, width), "mean": (width,), "variance": (width,)}
    if shapes != wanted or k == 0 or tensors["rows"].dtype != np.dtype(spec.dtype):
        raise BundleError(f"got a {REFERENCE_FILE} in bundle {bundle.name!r} with {shapes}, wanted {wanted}")
    if k > _MOST_ROWS:
        raise BundleError(
            f"got a {REFERENCE_FILE} of {k} rows in bundle {bundle.name!r}, wanted at most {_MOST_ROWS}; "
            "make a smaller one with vaefeat reference"
        )
    return Reference(**tensors)
