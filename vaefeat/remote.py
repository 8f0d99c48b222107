"""Encoders of a bundle that a server holds, with :class:`vaefeat.encoder.OnnxEncoder`'s interface: sync and async."""

from __future__ import annotations

import asyncio
import io
import math
import threading
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from vaefeat.errors import InputError, RemoteError
from vaefeat.remote_card import MODELS_ASK, Card, pinning, read_cards
from vaefeat.remote_exchange import Ask, Pause, RefusedError, Retries, Steps, Terms, answered
from vaefeat.remote_lines import AsyncLine, Line

__all__ = ["AsyncRemoteEncoder", "RemoteEncoder"]

_NPY = "application/x-npy"
#: For how long a pinned version may be missing: processes behind one address load a new one seconds apart.
_SWAP_S = 10.0


class _Parts:
    """The rows that are not embedded yet, from which several hands take."""

    def __init__(self, n_rows: int) -> None:
        self._lock = threading.Lock()
        self._left = [slice(0, n_rows)]

    def take(self, most: int) -> slice | None:
        with self._lock:
            if not self._left:
                return None
            left = self._left.pop()
            stop = min(left.start + most, left.stop)
            if stop < left.stop:
                self._left.append(slice(stop, left.stop))
            return slice(left.start, stop)

    def give_back(self, part: slice) -> None:
        """Put down a part that was too large, to be taken again in smaller ones."""
        with self._lock:
            self._left.append(part)


class _RemoteModel:
    """The pinned bundle, and everything about asking for its features but the waiting."""

    def __init__(self, terms: Terms, card: Card) -> None:
        self.url = terms.url
        self._terms, self._card = terms, card
        self.name: str = card.name
        self.digest: str = card.digest
        self.input = card.input
        self.outputs: dict[str, int] = dict(card.outputs)
        self.classes: tuple[str | int | float | bool, ...] = card.classes
        self.latent_dim: int = card.latent_dim
        self.active_units: int = card.active_units
        self.provider: str = card.provider
        self._rows_per_request = card.rows_per_request(terms.batch_size, url=terms.url)

    def _started(self, X: ArrayLike, output: str) -> tuple[NDArray[np.float32], list[Steps[None]]]:
        """Check the rows; make room for their features and the steps, in several hands, that fill it."""
        if output not in self.outputs:
            raise InputError(f"got output={output!r}, wanted one of {sorted(self.outputs)}")
        rows = self.input.prepare(X)
        features = np.empty((len(rows), self.outputs[output]), dtype=np.float32)
        parts = _Parts(len(rows))
        n_hands = min(self._terms.in_flight, math.ceil(len(rows) / self._rows_per_request))
        return features, [self._embedding(rows, features, parts, output) for _ in range(n_hands)]

    def _embedding(self, rows: NDArray[Any], features: NDArray[np.float32], parts: _Parts, output: str) -> Steps[None]:
        """Embed part after part, each into its place, until none is left."""
        while (part := parts.take(self._rows_per_request)) is not None:
            ask = Ask(
                method="POST",
                path="/v1/embed",
                params={**self._card.query, "output": output},
                # Features do not compress.
                headers={"content-type": _NPY, "accept": _NPY, "accept-encoding": "identity"},
                content=_npy(rows[part]),
            )
            try:
                answer = yield from self._answered(ask)
            except RefusedError as refused:
                yield from self._mended(refused, n_rows=part.stop - part.start)
                parts.give_back(part)
            else:
                features[part] = self._read_features(answer, wanted=features[part].shape)

    def _answered(self, ask: Ask) -> Steps[httpx.Response]:
        """Ask for the pinned version; where it is not to be had, ask again for a while, over other connections.

        Of several processes behind one address, one may still have to load what another has already.
        """
        swap = Retries(min(self._terms.patience_s, _SWAP_S))
        while True:
            try:
                return (yield from answered(ask, self._terms))
            except RefusedError as refused:
                if refused.status != 404 or self._card.versions is None:
                    raise
                pause_s = swap.pause_s()
                if pause_s is None:
                    raise RemoteError(self._other_bundle(f"the refusal {str(refused)!r}")) from refused
            yield Pause(pause_s)
            # Over this one, the same process would answer.
            ask = replace(ask, headers={**ask.headers, "connection": "close"})

    def _mended(self, refused: RefusedError, *, n_rows: int) -> Steps[None]:
        """Find what to do about a refusal: cut smaller, where the request was too large.

        Either the server's limits are smaller than they were, or something in between has a limit of its own.
        """
        if refused.status != 413 or n_rows == 1:
            raise refused
        if self._rows_per_request >= n_rows:  # else another hand has been here
            answer = yield from answered(MODELS_ASK, self._terms)
            card = read_cards(answer, url=self.url).get(self.name, self._card)
            told = card.rows_per_request(self._terms.batch_size, url=self.url)
            self._rows_per_request = min(self._rows_per_request, told if told < n_rows else n_rows // 2)

    def _read_features(self, answer: httpx.Response, *, wanted: tuple[int, ...]) -> NDArray[np.float32]:
        served = answer.headers.get("x-vaefeat-digest")
        if served != self.digest:
            raise RemoteError(self._other_bundle(f"digest {served}"))
        try:
            features: NDArray[np.float32] = np.lib.format.read_array(io.BytesIO(answer.content), allow_pickle=False)
        except Exception as error:  # a stranger's header can fail in many ways
            raise RemoteError(f"{self.url} answered with what is not npy ({error}); is a proxy in between?") from error
        if features.shape != wanted or features.dtype != np.float32:
            got = f"{features.dtype} of shape {features.shape}"
            raise RemoteError(f"{self.url} answered with {got}, wanted float32 of shape {wanted}")
        return features

    def _other_bundle(self, got: str) -> str:
        return (
            f"{self.url} now serves another bundle as {self.name!r}: got {got}, wanted {self.digest}, "
            f"which it had when this encoder was made; make a new {type(self).__name__}, and embed everything with it"
        )

    def __getstate__(self) -> dict[str, Any]:
        # The key stays out because it is only in the line; what was pinned goes along, so that an unpickled encoder
        # gives the same features or none.
        return {name: value for name, value in self.__dict__.items() if name != "_line"}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # sklearn.base.clone copies constructor arguments. What was pinned never changes, so the same object will do,
        # and unlike a pickle it still has its key.
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r}, model={self.name!r}, {self.input}, latent_dim={self.latent_dim})"


class RemoteEncoder(_RemoteModel):
    """The encoder of a bundle behind ``python -m serving``.

    What is served is asked once, here, and pinned: an answer from another bundle is an error, so that the features of
    one array are never made by two encoders. Where the server holds several versions of a model, the pinned one is
    asked for, and a newer one goes unnoticed. Rows are checked before they are sent, by the same rules as on the
    server, and cut to its limits; several requests are in flight at a time, and the features are in the rows' order.

    A request that fails for a reason that can pass (see :mod:`vaefeat.remote_exchange`) is sent again. Nothing is
    embedded twice into the result, and no row's features depend on how often it was sent. One encoder may be used from
    several threads, and after a fork.

    Parameters
    ----------
    url : str
        For instance ``http://127.0.0.1:8000``.
    model : str, optional
        Name of the model; may be left out where the server has exactly one.
    digest : str, optional
        The bundle to accept, ``sha256:...``; whichever is served when None.
    timeout_s : float
        For connecting, and for every wait for the server to go on.
    patience_s : float
        A request that fails is sent again, after pauses of 0.1 to 5 s or what ``Retry-After`` asks for, within so many
        seconds of its first attempt; 0 is to try once. It counts for each request anew, so it bounds how long the
        server may be away, and not how long many rows take. When nobody listens at the address to begin with, that is
        told at once.
    batch_size : int
        Most rows in a request. The server's own limits are observed besides.
    in_flight : int
        Most requests at a time, of one call of :meth:`embed`.
    api_key : str, optional
        Sent as a bearer token. It is not part of a pickle; see :meth:`authenticate`.

    Attributes
    ----------
    url : str
        Where it asks.
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
    provider : str
        ONNX Runtime's execution provider on the server.

    Raises
    ------
    InputError
        An URL that is none, or a model that is not served or not named where there are several.
    RemoteError
        The server cannot be reached, is none of ours, or has another bundle than `digest`.

    Examples
    --------
    >>> from vaefeat import RemoteEncoder
    >>> with RemoteEncoder("http://127.0.0.1:8000") as encoder:  # doctest: +SKIP
    ...     encoder.embed(rows).shape
    (1797, 16)
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        digest: str | None = None,
        timeout_s: float = 60.0,
        patience_s: float = 120.0,
        batch_size: int = 1024,
        in_flight: int = 4,
        api_key: str | None = None,
    ) -> None:
        terms = Terms(url=url, timeout_s=timeout_s, patience_s=patience_s, batch_size=batch_size, in_flight=in_flight)
        self._line = Line(terms, api_key=api_key)
        try:
            super().__init__(terms, self._line.run(pinning(terms, model=model, digest=digest)))
        except BaseException:
            self._line.close()
            raise

    def embed(self, X: ArrayLike, *, output: str = "mean") -> NDArray[np.float32]:
        """Encode rows on the server.

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
            Rows or `output` that the bundle does not take, found here or by the server.
        RemoteError
            The server cannot be reached, failed, or serves another bundle by now.
        """
        features, hands = self._started(X, output)
        self._line.run_all(hands)
        return features

    def authenticate(self, api_key: str | None) -> Self:
        """Send this key from now on: what an unpickled encoder lacks, or a new one where keys change.

        Returns
        -------
        RemoteEncoder
            Itself.
        """
        self._line.authenticate(api_key)
        return self

    def close(self) -> None:
        """Close the connections; an :meth:`embed` in another thread ends with an InputError."""
        self._line.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._line = Line(self._terms, api_key=None)


class AsyncRemoteEncoder(_RemoteModel):
    """:class:`RemoteEncoder` for asyncio; made by :meth:`connect`.

    It belongs to the event loop in which it is first used. Cancelling :meth:`embed` cancels its requests.

    Examples
    --------
    >>> from vaefeat import AsyncRemoteEncoder
    >>> async with await AsyncRemoteEncoder.connect("http://127.0.0.1:8000") as encoder:  # doctest: +SKIP
    ...     features = await encoder.embed(rows)
    """

    def __init__(self, terms: Terms, card: Card, line: AsyncLine) -> None:
        super().__init__(terms, card)
        self._line = line

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        model: str | None = None,
        digest: str | None = None,
        timeout_s: float = 60.0,
        patience_s: float = 120.0,
        batch_size: int = 1024,
        in_flight: int = 4,
        api_key: str | None = None,
    ) -> Self:
        """Ask what is served and pin it; arguments and errors are those of :class:`RemoteEncoder`."""
        terms = Terms(url=url, timeout_s=timeout_s, patience_s=patience_s, batch_size=batch_size, in_flight=in_flight)
        line = AsyncLine(terms, api_key=api_key)
        try:
            return cls(terms, await line.run(pinning(terms, model=model, digest=digest)), line)
        except BaseException:
            await line.close()
            raise

    async def embed(self, X: ArrayLike, *, output: str = "mean") -> NDArray[np.float32]:
        """Encode rows on the server; see :meth:`RemoteEncoder.embed`."""
        # Converting many rows takes time, in which the event loop can do other things.
        features, hands = await asyncio.to_thread(self._started, X, output)
        await self._line.run_all(hands)
        return features

    def authenticate(self, api_key: str | None) -> Self:
        """Send this key from now on; see :meth:`RemoteEncoder.authenticate`."""
        self._line.authenticate(api_key)
        return self

    async def close(self) -> None:
        """Close the connections."""
        await self._line.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._line = AsyncLine(self._terms, api_key=None)


def _npy(rows: NDArray[Any]) -> bytes:
    """Write what :func:`numpy.save` does, with one copy of the rows instead of two."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(rows))
    return b"".join((header.getvalue(), rows.data.cast("B")))
