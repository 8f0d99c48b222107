"""One version of a model, as the service computes it: opened, warmed up, compared with its reference."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import ModelError
from serving.watching.drift import Drift
from vaefeat.bundle import Bundle
from vaefeat.encoder import Mode, OnnxEncoder
from vaefeat.input_spec import InputSpec
from vaefeat.plan import buckets_up_to
from vaefeat.predictor import LABEL, PROBABILITIES, OnnxPredictor
from vaefeat.reference import REFERENCE_FILE, TOLERANCES, PredictionReference, Reference, load_reference
from vaefeat.runtime import Interruption, choose_device

__all__ = ["Place", "ServedModel"]

_log = logging.getLogger("serving")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where models are computed.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda", "tensorrt"}
    threads : int, optional
        Processors to use; all that there are when None.
    max_batch_rows : int
        Most rows in a batch.
    """

    device: str = "auto"
    threads: int | None = None
    max_batch_rows: int = 256


class ServedModel:
    """One version of a model: an encoder or a classifier, with what is said of it.

    Parameters
    ----------
    bundle : Bundle
    place : Place

    Attributes
    ----------
    name, version, digest : str
        The version is the digest's hexadecimal part.
    input : InputSpec
    outputs : mapping of str to int
        Widths of what it gives as numbers.
    classes : tuple
        Empty where it is no classifier.
    names : tuple of str
        All that it can be asked for: its outputs, and of a classifier ``label`` and ``probabilities``.
    reference : Reference, PredictionReference or None
    provider : str
        ONNX Runtime's execution provider.
    """

    def __init__(self, bundle: Bundle, *, place: Place) -> None:
        device, _ = choose_device(place.device)
        # A GPU waits for its kernels to be launched, so batches get a few sizes that it is prepared for; a CPU would
        # compute the padding. There a batch has one thread: lanes share out the processors, and wait nowhere.
        buckets = None if device == "cpu" else buckets_up_to(place.max_batch_rows)
        opens = OnnxPredictor if bundle.manifest.classes else OnnxEncoder
        self._opened = opens(bundle, device=place.device, threads=1, buckets=buckets)
        self.name, self.digest = bundle.name, bundle.digest
        self.version = bundle.digest.removeprefix("sha256:")
        self.input: InputSpec = self._opened.input
        self.outputs: Mapping[str, int] = self._opened.outputs
        self.classes = self._opened.classes
        predicted = (LABEL, PROBABILITIES) if self.classes else ()
        self.names = (*(name for name in self.outputs if name not in predicted), *predicted)
        #: Features and probabilities are float32, labels int64.
        self._feature_bytes = {name: 4 * width for name, width in self.outputs.items()}
        if self.classes:
            self._feature_bytes |= {LABEL: 8, PROBABILITIES: 4 * len(self.classes)}
        self.latent_dim, self.active_units = self._opened.latent_dim, self._opened.active_units
        self.provider, self.device = self._opened.provider, self._opened.device
        self.reference: Reference | PredictionReference | None = load_reference(bundle)
        #: How far what is served has moved from what it was trained on.
        self.drift = None
        known = self.reference
        if known is not None and known.mean is not None and known.variance is not None:
            self.drift = Drift(mean=known.mean, variance=known.variance)
        self._max_batch_rows = place.max_batch_rows

    @property
    def mode(self) -> Mode:
        """How it computes; known for good when it is warmed up."""
        return self._opened.mode

    def padding(self, n_rows: int) -> int:
        """Give the rows that are computed beside so many."""
        return self._opened.padding(n_rows)

    def feature_bytes(self, outputs: Iterable[str]) -> int:
        """Give the bytes that some of `names` take for each row."""
        return sum(self._feature_bytes[name] for name in outputs)

    def compute(self, rows: NDArray[Any], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Compute some of `names` of checked rows; labels are places in `classes`.

        Where nobody asked for the means, they are computed besides, and taken note of: they cost next to nothing beside
        the rest of the encoder.
        """
        if self.drift is None or "mean" in outputs:
            return self._opened.compute(rows, outputs)
        *computed, means = self._opened.compute(rows, [*outputs, "mean"])
        if np.isfinite(means.sum(dtype=np.float64)):
            self.drift.update(means)
        return computed

    def observe(self, outputs: Sequence[str], features: Sequence[NDArray[Any]]) -> None:
        """Take note of means that were asked for; in a lane's thread."""
        if self.drift is not None and "mean" in outputs:
            self.drift.update(features[outputs.index("mean")])

    def warm_up(self, interruption: Interruption | None = None) -> None:
        """Compute batches of every usual size, with every output, and compare with the reference.

        On a GPU the sizes are the buckets, and this captures their CUDA graphs.

        Parameters
        ----------
        interruption : Interruption, optional
            With which another thread may end this.

        Raises
        ------
        ModelError
            The device computes something else than where the bundle was exported, or nothing that is finite.
        """
        if not self.proved:
            _log.warning(
                "model %s in version %s is unproved: its bundle has no %s, which what is computed could be compared "
                "with; add one with vaefeat reference",
                self.name,
                self.version[:12],
                REFERENCE_FILE,
            )
        for n_rows in self._opened.mode.buckets or _doubling(self._max_batch_rows):
            rows = np.zeros((n_rows, *self.input.shape), self.input.dtype)
            computed = self._opened.compute(rows, list(self.outputs), interruption=interruption)
            for output, features in zip(self.outputs, computed, strict=True):
                if self.reference is None and not np.isfinite(features).all():
                    raise ModelError(f"model {self.name!r} computed NaN or infinity for rows of zeros ({output})")
        self.prove()

    @property
    def proved(self) -> bool:
        """Whether there is anything to compare with."""
        return self.reference is not None

    def prove(self, *, most_rows: int | None = None) -> None:
        """Compute the reference's rows, or the first of them, and compare, as :meth:`warm_up` does in the end."""
        if self.reference is None:
            return
        rows, size = self.reference.rows[:most_rows], self._max_batch_rows
        names = list(self.reference.outputs)
        # With the means among what is asked for, these rows are not taken for served ones.
        asked = names if self.drift is None or "mean" in names else [*names, "mean"]
        parts = [self.compute(rows[start : start + size], asked)[: len(names)] for start in range(0, len(rows), size)]
        found = self.reference.difference(*map(np.concatenate, zip(*parts, strict=True)))
        tolerance = TOLERANCES[self.mode.precision]
        if not found <= tolerance:
            what = "means" if isinstance(self.reference, Reference) else "labels or probabilities"
            unit = " standard deviations" if isinstance(self.reference, Reference) else ""
            raise ModelError(
                f"model {self.name!r} computes {what} on {self.provider} that differ by {found:.3g}{unit} from those "
                f"in its bundle, wanted at most {tolerance:g}; is the device sound? Try --device cpu"
            )

    def __repr__(self) -> str:
        return f"ServedModel({self.name!r}, {self.version[:12]})"


def _doubling(max_rows: int) -> Iterator[int]:
    n_rows = 1
    while n_rows < max_rows:
        yield n_rows
        n_rows *= 2
    yield max_rows
