"""OnnxDecoder: latents in, rows out, with NumPy and ONNX Runtime alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vaefeat.bundle import Bundle
from vaefeat.errors import BundleError, InputError
from vaefeat.runtime import open_graph

__all__ = ["OnnxDecoder"]


class OnnxDecoder:
    """The decoder of a bundle: E[x|z] in the units of the training rows.

    Parameters
    ----------
    bundle : Bundle
    device : {"auto", "cpu", "cuda"}
    threads : int, optional
        As for :class:`vaefeat.encoder.OnnxEncoder`.
    batch_size : int
        Latents decoded at a time.

    Raises
    ------
    InputError
        The encoder was fine-tuned, and the decoder was not.
    """

    def __init__(
        self, bundle: Bundle, *, device: str = "auto", threads: int | None = None, batch_size: int = 256
    ) -> None:
        bundle.refuse_decoding()
        self.latent_dim = bundle.manifest.latent_dim
        self.row_shape = bundle.manifest.input.shape
        self.batch_size = batch_size
        what = f"decoder.onnx of bundle {bundle.name!r}"
        self._graph = open_graph(bundle.read("decoder.onnx"), what=what, device=device, threads=threads)
        ends = [*self._graph.session.get_inputs(), *self._graph.session.get_outputs()]
        got = [(end.name, end.type, tuple(end.shape[1:])) for end in ends]
        wanted = [("latents", "tensor(float)", (self.latent_dim,)), ("rows", "tensor(float)", self.row_shape)]
        if got != wanted:
            raise BundleError(f"got {what} with the inputs and outputs {got}, wanted {wanted}")

    def decode(self, Z: ArrayLike) -> NDArray[np.float32]:
        """Decode latents.

        Parameters
        ----------
        Z : array-like of shape (n, latent_dim)

        Returns
        -------
        ndarray of shape (n, ...), float32
            The likelihood's mean, in the shape and units of the training rows (0 to 255 where those were uint8).

        Raises
        ------
        InputError
            Another shape, or values that are not finite.
        """
        with np.errstate(over="ignore"):  # becomes infinite and is refused below
            latents = np.ascontiguousarray(np.asarray(Z, dtype=np.float32))
        if latents.ndim != 2 or latents.shape[1] != self.latent_dim or not len(latents):
            raise InputError(
                f"got latents of shape {latents.shape}, wanted (n, {self.latent_dim}) with n of at least 1"
            )
        if not np.isfinite(latents).all():
            raise InputError("got latents with NaN or infinite values, wanted finite ones")
        rows = np.empty((len(latents), *self.row_shape), dtype=np.float32)
        for start in range(0, len(latents), self.batch_size):
            stop = start + self.batch_size
            (rows[start:stop],) = self._graph.run(["rows"], {"latents": latents[start:stop]})
        return rows
