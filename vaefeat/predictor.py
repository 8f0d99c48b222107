"""OnnxPredictor: rows in, labels and probabilities out, with NumPy and ONNX Runtime alone."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vaefeat.bundle import Bundle, load_bundle
from vaefeat.encoder import Mode, OnnxEncoder, check_rows_input
from vaefeat.errors import BundleError, InputError
from vaefeat.input_spec import InputSpec
from vaefeat.runtime import Interruption, open_graph

__all__ = ["LABEL", "PROBABILITIES", "OnnxPredictor"]

#: What every classifier gives, whichever kind of bundle it is.
LABEL, PROBABILITIES = "label", "probabilities"


class OnnxPredictor:
    """A classifier's bundle, ready to predict: a whole pipeline, or a fine-tuned encoder.

    On the CPU, a row's label and probabilities are the same to the last bit for any number of rows and threads.

    Parameters
    ----------
    bundle : path-like or Bundle
        From :func:`vaefeat.export_pipeline` or :meth:`vaefeat.FineTuneClassifier.save_bundle`.
    device : {"auto", "cpu", "cuda", "tensorrt"}
    threads : int, optional
    batch_size : int
    buckets : sequence of int, optional
        See :class:`vaefeat.OnnxEncoder`. The classifiers behind a pipeline's encoder run on the processor, so that a
        pipeline's batches are never padded.

    Attributes
    ----------
    name, digest : str
        Of the bundle.
    input : InputSpec
        The rows it takes.
    classes : tuple of str, int, float or bool
        In the order of the probabilities.
    outputs : dict of str to int
        Width of each output of numbers: of a pipeline ``probabilities`` alone, of an encoder all that it has.
    latent_dim, active_units : int
        Of the encoder inside.
    precision : {"float32", "int8"}
        Of its arithmetic.
    provider, device, device_reason : str
        Where it runs, and why there.

    Raises
    ------
    BundleError
        The bundle is missing, corrupt, edited, or no classifier.
    DeviceError
        CUDA was asked for and there is none.

    Examples
    --------
    >>> from vaefeat import OnnxPredictor
    >>> OnnxPredictor("pipeline.onnx-bundle").predict(rows)  # doctest: +SKIP
    array([3, 1, 4])
    """

    def __init__(
        self,
        bundle: str | PathLike[str] | Bundle,
        *,
        device: str = "auto",
        threads: int | None = None,
        batch_size: int = 256,
        buckets: Sequence[int] | None = None,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"got batch_size={batch_size}, wanted at least 1")
        self.batch_size = batch_size
        self._buckets = None if buckets is None else tuple(buckets)
        self._bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
        self._device, self._threads = device, threads
        self._open()

    def _open(self) -> None:
        manifest = self._bundle.manifest
        if not manifest.classes:
            raise BundleError(
                f"got bundle {manifest.name!r}, an encoder without classes, wanted a classifier's; put a classifier "
                "behind it and export both with vaefeat.export_pipeline, or take OnnxEncoder for its features"
            )
        self.name: str = manifest.name
        self.digest: str = self._bundle.digest
        self.input: InputSpec = manifest.input
        self.classes: tuple[str | int | float | bool, ...] = manifest.classes
        self.outputs: dict[str, int] = dict(manifest.outputs)
        self.latent_dim: int = manifest.latent_dim
        self.active_units: int = len(manifest.active_units)
        self.precision: str = manifest.precision
        self._codes = {label: code for code, label in enumerate(manifest.classes)}
        opened: OnnxEncoder | _PipelineGraph
        if manifest.pipeline is None:
            opened = OnnxEncoder(self._bundle, device=self._device, threads=self._threads, buckets=self._buckets)
        else:
            opened = _PipelineGraph(self._bundle, device=self._device, threads=self._threads)
        self.provider: str = opened.provider
        self.device: str = opened.device
        self.device_reason: str = opened.device_reason
        self._opened = opened

    @property
    def mode(self) -> Mode:
        """How it computes; the first use of a bucket may change it."""
        return self._opened.mode

    def padding(self, n_rows: int) -> int:
        """Give the rows that :meth:`compute` computes beside so many."""
        return self._opened.padding(n_rows)

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Give the label of each row, (n,); rows as :meth:`InputSpec.prepare` takes them."""
        labels: NDArray[Any] = np.array(self.classes)[self._whole(X, LABEL)]
        return labels

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float32]:
        """Give the probability of each class, (n, n_classes) float32, in the order of ``classes``."""
        return self._whole(X, PROBABILITIES)

    def compute(
        self, rows: NDArray[Any], outputs: Sequence[str], *, interruption: Interruption | None = None
    ) -> list[NDArray[Any]]:
        """Compute one micro-batch, for those who check and cut rows themselves; several threads may call it at a time.

        Parameters
        ----------
        rows : ndarray of shape (n, ...)
            As :meth:`InputSpec.prepare` gives them.
        outputs : sequence of str
            Names among ``outputs``, ``probabilities``, and ``label``; ``mean``, too, where the graph gives it
            (:attr:`vaefeat.bundle.Manifest.gives_means`).
        interruption : Interruption, optional
            With which another thread may end this.

        Returns
        -------
        list of ndarray
            In the order that they are named in. Of labels, their places in ``classes``: (n,) int64.

        Raises
        ------
        DeviceError
            ONNX Runtime failed, for instance because the device's memory is full.
        """
        encodes = isinstance(self._opened, OnnxEncoder)
        # A fine-tuned encoder has no labels of its own, and another name for its probabilities.
        own = {LABEL: "probability", PROBABILITIES: "probability"} if encodes else {}
        names = list(dict.fromkeys(own.get(output, output) for output in outputs))
        computed = dict(zip(names, self._opened.compute(rows, names, interruption=interruption), strict=True))
        found = {output: computed[own.get(output, output)] for output in outputs}
        if LABEL in found:
            given: Any = found[LABEL]
            codes = given.argmax(axis=1) if encodes else [self._codes[label] for label in given.tolist()]
            found[LABEL] = np.asarray(codes, np.int64)
        return [found[output] for output in outputs]

    def _whole(self, X: ArrayLike, output: str) -> NDArray[Any]:
        rows = self.input.prepare(X)
        starts = range(0, len(rows), self.batch_size)
        return np.concatenate([self.compute(rows[start : start + self.batch_size], [output])[0] for start in starts])

    def __getstate__(self) -> dict[str, Any]:
        # A session cannot be pickled, but it opens in milliseconds where it arrives.
        kept = ("batch_size", "_buckets", "_bundle", "_device", "_threads")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __repr__(self) -> str:
        return f"OnnxPredictor({self.name!r}, {self.input}, {len(self.classes)} classes, device={self.device!r})"


class _PipelineGraph:
    """The graph of a whole pipeline, opened and looked at."""

    def __init__(self, bundle: Bundle, *, device: str, threads: int | None) -> None:
        manifest = bundle.manifest
        what = f"{manifest.graph_file} of bundle {manifest.name!r}"
        graph = open_graph(bundle.read(manifest.graph_file), what=what, device=device, threads=threads, pipeline=True)
        check_rows_input(graph.session, manifest.input, what)
        kind = "tensor(string)" if isinstance(manifest.classes[0], str) else "tensor(int64)"
        wanted = [(LABEL, kind, 1), (PROBABILITIES, "tensor(float)", 2)]
        if manifest.gives_means:
            wanted.append(("mean", "tensor(float)", 2))
        got = [(output.name, output.type, len(output.shape)) for output in graph.session.get_outputs()]
        if got != wanted or graph.session.get_outputs()[1].shape[1] != len(manifest.classes):
            raise BundleError(f"got {what} with the outputs {got}, wanted {wanted} for {len(manifest.classes)} classes")
        self._graph, self._precision = graph, manifest.precision
        self.provider, self.device, self.device_reason = graph.provider, graph.device, graph.reason

    @property
    def mode(self) -> Mode:
        """How it computes."""
        return Mode(device=self.device, provider=self.provider, precision=self._precision)

    def padding(self, n_rows: int) -> int:
        """Give none: classifiers behind an encoder run on the processor, where padding only costs."""
        return 0

    def compute(
        self, rows: NDArray[Any], outputs: Sequence[str], *, interruption: Interruption | None = None
    ) -> list[NDArray[Any]]:
        """Compute some of its outputs."""
        return list(self._graph.run(outputs, {"rows": rows}, interruption=interruption))
