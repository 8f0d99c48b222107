"""OnnxEncoder: rows in, features out, with NumPy and ONNX Runtime alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vaefeat.bundle import Bundle, load_bundle
from vaefeat.errors import BundleError, InputError
from vaefeat.input_spec import InputSpec
from vaefeat.plan import ExecutionPlan, buckets_up_to
from vaefeat.runtime import Interruption, OpenedGraph, choose_device, open_graph

__all__ = ["Mode", "OnnxEncoder", "check_rows_input"]


@dataclass(frozen=True, kw_only=True)
class Mode:
    """How an encoder computes: not what was asked for, but what is done.

    Attributes
    ----------
    device : {"cpu", "cuda", "tensorrt"}
    provider : str
        ONNX Runtime's execution provider.
    precision : {"float32", "float16", "int8"}
        Of the encoder's arithmetic.
    buckets : tuple of int
        Numbers of rows that batches are padded to; empty where they are not.
    io_binding : bool
        Whether rows and features lie in memory that is bound to the session.
    graphs, pinned : str
        ``on``, or ``off:`` and why: CUDA graphs, and pinned memory on the host.
    """

    device: str
    provider: str
    precision: str
    buckets: tuple[int, ...] = ()
    io_binding: bool = False
    graphs: str = "off: batches are not padded"
    pinned: str = "off: batches are not padded"

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {**asdict(self), "buckets": list(self.buckets)}


class OnnxEncoder:
    """The encoder of a bundle, ready to embed.

    A row's vector does not depend on the rows around it: rows are encoded in micro-batches, and on the CPU the result
    is the same to the last bit for any number of rows, order and number of threads.

    Parameters
    ----------
    bundle : path-like or Bundle
        Where the bundle is. Its hashes are verified and the graph is loaded from bytes.
    device : {"auto", "cpu", "cuda", "tensorrt"}
        ``cuda`` is an error where there is none; ``auto`` reports its choice in ``device`` and ``device_reason``.
        TensorRT is used where it is asked for; it builds an engine first, which may take minutes.
    threads : int, optional
        Threads within an operator. When None, ``OMP_NUM_THREADS`` where it is set, as in joblib's workers, and else all
        processors given to this process.
    batch_size : int
        Rows in a micro-batch. It bounds the memory and changes no result; 256 keeps activations in a CPU's cache.
    buckets : sequence of int, optional
        Pad batches to the next of these numbers of rows, and keep memory for each (:mod:`vaefeat.plan`). On a GPU that
        is the fast way for many calls with few rows; on a CPU it only costs.

    Attributes
    ----------
    name, digest : str
        Of the bundle.
    input : InputSpec
        The rows it takes.
    outputs : dict of str to int
        Width of each output: ``mean``, ``logvar``, ``hidden``, of a classifier also ``probability``.
    classes : tuple of str, int, float or bool
        What a classifier tells apart, in the order of its probabilities; empty where it is none.
    latent_dim, active_units : int
        Number of latent variables, and of those that carry something.
    precision : {"float32", "float16", "int8"}
        Of the encoder's arithmetic.
    provider : str
        ONNX Runtime's execution provider.
    device, device_reason : str
        Where it runs, and why there.

    Raises
    ------
    BundleError
        The bundle is missing, corrupt, edited or holds a graph that is not an encoder.
    DeviceError
        A device was asked for and is not there.

    Examples
    --------
    >>> from vaefeat import OnnxEncoder
    >>> encoder = OnnxEncoder("runs/digits")  # doctest: +SKIP
    >>> encoder.embed(rows).shape  # doctest: +SKIP
    (1797, 16)
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
        if buckets is not None and (not buckets or min(buckets) < 1 or list(buckets) != sorted(set(buckets))):
            raise InputError(f"got buckets={tuple(buckets)}, wanted rising numbers of rows, at least 1")
        self.batch_size = batch_size
        self._buckets = None if buckets is None else tuple(buckets)
        self._bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
        self._device, self._threads = device, threads
        self._open()

    def _open(self) -> None:
        manifest = self._bundle.manifest
        if manifest.pipeline is not None:
            raise BundleError(
                f"got bundle {manifest.name!r}, a whole pipeline, which gives labels and no features; take "
                "vaefeat.OnnxPredictor, or the bundle of the encoder that it was made with"
            )
        self.name: str = manifest.name
        self.digest: str = self._bundle.digest
        self.input: InputSpec = manifest.input
        self.outputs: dict[str, int] = dict(manifest.outputs)
        self.classes: tuple[str | int | float | bool, ...] = manifest.classes
        self.latent_dim: int = manifest.latent_dim
        self.active_units: int = len(manifest.active_units)
        self.precision: str = manifest.precision
        self._plan: ExecutionPlan | None = None
        device, _ = choose_device(self._device)
        buckets = self._buckets
        if buckets is None and device == "tensorrt":
            buckets = buckets_up_to(self.batch_size)  # an engine is built for known numbers of rows
        # Not a method: the plan's thread holds on to it, and would to this encoder.
        opening = partial(_open, self._bundle, device=self._device, threads=self._threads, buckets=buckets or ())
        if buckets is None:
            self._graph = opening(captures=False)
        else:
            self._plan = ExecutionPlan(
                opening,
                captures=device == "cuda",
                buckets=buckets,
                rows=self.input,
                outputs=self.outputs,
            )
            self._graph = self._plan.opened
        self.provider: str = self._graph.provider
        self.device: str = self._graph.device
        self.device_reason: str = self._graph.reason

    @property
    def mode(self) -> Mode:
        """How it computes; the first use of a bucket may change it."""
        mode, plan = Mode(device=self.device, provider=self.provider, precision=self.precision), self._plan
        if plan is None:
            return mode
        return replace(mode, buckets=plan.buckets, io_binding=True, graphs=plan.graphs, pinned=plan.pinned)

    def padding(self, n_rows: int) -> int:
        """Give the rows that :meth:`compute` computes beside so many."""
        return 0 if self._plan is None else self._plan.padding(n_rows)

    @property
    def bundle(self) -> Bundle:
        """What it was opened from."""
        return self._bundle

    def embed(self, X: ArrayLike, *, output: str = "mean") -> NDArray[np.float32]:
        """Encode rows.

        Parameters
        ----------
        X : array-like of shape (n, ...) or flat (n, n_features)
            As :meth:`InputSpec.prepare` takes them.
        output : {"mean", "logvar", "hidden", "probability"}
            The posterior's mean, the logarithm of its variance, the encoder's last hidden layer, or, of a classifier,
            the probability of each class.

        Returns
        -------
        ndarray of shape (n, outputs[output]), float32

        Raises
        ------
        InputError
            Rows of another shape or dtype, not finite, or an unknown `output`.
        """
        if output not in self.outputs:
            raise InputError(f"got output={output!r}, wanted one of {sorted(self.outputs)}")
        rows = self.input.prepare(X)
        features = np.empty((len(rows), self.outputs[output]), dtype=np.float32)
        for start in range(0, len(rows), self.batch_size):
            stop = start + self.batch_size
            (features[start:stop],) = self.compute(rows[start:stop], [output])
        return features

    def compute(
        self, rows: NDArray[Any], outputs: Sequence[str], *, interruption: Interruption | None = None
    ) -> list[NDArray[np.float32]]:
        """Encode one micro-batch, for those who check and cut rows themselves; several threads may call it at a time.

        Parameters
        ----------
        rows : ndarray of shape (n, ...)
            As :meth:`InputSpec.prepare` gives them. `batch_size` is not observed.
        outputs : sequence of str
            Names among ``outputs``.
        interruption : Interruption, optional
            With which another thread may end this.

        Returns
        -------
        list of ndarray of shape (n, outputs[output]), float32
            In the order that they are named in.

        Raises
        ------
        DeviceError
            ONNX Runtime failed, for instance because the device's memory is full; or it was interrupted.
        """
        if self._plan is not None:
            return self._plan.compute(rows, outputs, interruption=interruption)
        return self._graph.run(outputs, {"rows": rows}, interruption=interruption)

    def __getstate__(self) -> dict[str, Any]:
        # A session cannot be pickled, but it opens in milliseconds where it arrives.
        kept = ("batch_size", "_buckets", "_bundle", "_device", "_threads")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __repr__(self) -> str:
        return f"OnnxEncoder({self.name!r}, {self.input}, latent_dim={self.latent_dim}, device={self.device!r})"


def _open(bundle: Bundle, *, device: str, threads: int | None, buckets: Sequence[int], captures: bool) -> OpenedGraph:
    what = f"encoder.onnx of bundle {bundle.name!r}"
    content = bundle.read("encoder.onnx")
    graph = open_graph(content, what=what, device=device, threads=threads, buckets=buckets, captures=captures)
    # Everything after this relies on the graph's being what the manifest says.
    check_rows_input(graph.session, bundle.manifest.input, what)
    _check_outputs(graph.session, bundle.manifest.outputs, what)
    return graph


def check_rows_input(session: Any, spec: InputSpec, what: str) -> None:
    """Refuse a graph that does not take the rows that the manifest says, any number at a time.

    Raises
    ------
    BundleError
    """
    tensor = {"uint8": "tensor(uint8)", "float32": "tensor(float)"}[spec.dtype]
    got = [(i.name, i.type, tuple(i.shape[1:])) for i in session.get_inputs()]
    if got != [("rows", tensor, spec.shape)]:
        raise BundleError(f"got {what} with the inputs {got}, wanted rows of {tensor}, each of shape {spec.shape}")
    if isinstance(n_rows := session.get_inputs()[0].shape[0], int):
        raise BundleError(f"got {what} that takes {n_rows} rows at a time, wanted any number")


def _check_outputs(session: Any, outputs: dict[str, int], what: str) -> None:
    widths = {o.name: o.shape[1] for o in session.get_outputs() if len(o.shape) == 2 and o.type == "tensor(float)"}
    if widths != outputs:
        raise BundleError(f"got {what} with the outputs {widths}, wanted {outputs}")
