"""RemoteEncoder: the encoder of a bundle that a server holds, with :class:`vaefeat.encoder.OnnxEncoder`'s interface."""

from __future__ import annotations

import io
import ipaddress
import weakref
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from vaefeat.errors import InputError, RemoteError
from vaefeat.input_spec import InputSpec

__all__ = ["RemoteEncoder"]

_NPY = "application/x-npy"
#: numpy.save puts the data of an array of numbers at byte 128 or before.
_NPY_HEADER_BYTES = 128
#: Client errors that are about the moment, not about the request.
_TRANSIENT = {408, 429}


class RemoteEncoder:
    """The encoder of a bundle behind ``python -m serving``.

    What is served is asked once, here, and pinned: an answer from another bundle is an error, so that the features of
    one array are never made by two encoders. Rows are checked before they are sent, by the same rules as on the server.

    Parameters
    ----------
    url : str
        For instance ``http://127.0.0.1:8000``.
    model : str, optional
        Name of the model; may be left out where the server has exactly one.
    timeout_s : float
        For connecting, and for every wait for the server to go on.
    batch_size : int
        Most rows in a request. The server's own limits are observed besides.
    api_key : str, optional
        Sent as a bearer token. It is not part of a pickle: an unpickled encoder sends none.

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
        The server cannot be reached or is none of ours.

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
        timeout_s: float = 60.0,
        batch_size: int = 1024,
        api_key: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"got batch_size={batch_size}, wanted at least 1")
        self.url = _checked_url(url)
        self.timeout_s, self.batch_size = timeout_s, batch_size
        self._client = self._connect(api_key)
        try:
            self._pin(model)
        except BaseException:
            self._client.close()
            raise

    def _connect(self, api_key: str | None) -> httpx.Client:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        # A proxy that the environment names stands between this machine and others, never before the machine itself.
        client = httpx.Client(
            base_url=self.url, timeout=self.timeout_s, headers=headers, trust_env=not _is_loopback(self.url)
        )
        # Inside a scikit-learn pipeline there is nobody who could call close.
        weakref.finalize(self, client.close)
        return client

    def _pin(self, model: str | None) -> None:
        """Read what is served and keep what this encoder stands for."""
        answer = self._request("GET", "/v1/models")
        try:
            cards = {card["id"]: card for card in answer.json()["data"]}
            if model is None and len(cards) != 1:
                raise InputError(f"got no model, wanted one of {sorted(cards)}, which {self.url} serves: pass model=")
            if model is not None and model not in cards:
                raise InputError(f"got model={model!r}, wanted one of {sorted(cards)}, which {self.url} serves")
            card = cards[model] if model is not None else next(iter(cards.values()))
            self.name: str = card["id"]
            self.digest: str = card["digest"]
            self.input = InputSpec.from_dict(card["input"])
            self.outputs: dict[str, int] = dict(card["outputs"])
            # Servers from before there were classifiers say nothing of classes.
            self.classes: tuple[str | int | float | bool, ...] = tuple(card.get("classes", ()))
            self.latent_dim: int = card["latent_dim"]
            self.active_units: int = card["active_units"]
            self.provider: str = card["provider"]
            limits = card["limits"]
            fitting = (limits["max_body_bytes"] - _NPY_HEADER_BYTES) // self.input.row_bytes
            self._rows_per_request = min(self.batch_size, limits["max_rows"], fitting)
        except InputError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RemoteError(
                f"{self.url} answered /v1/models in a form that is not a vaefeat server's ({error!r}); check the URL"
            ) from error
        if self._rows_per_request < 1:
            raise InputError(
                f"one row of {self.name!r} takes {self.input.row_bytes} bytes, and {self.url} accepts bodies of "
                f"{limits['max_body_bytes']}; start the server with a larger --max-body-bytes"
            )

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
        if output not in self.outputs:
            raise InputError(f"got output={output!r}, wanted one of {sorted(self.outputs)}")
        rows = self.input.prepare(X)
        features = np.empty((len(rows), self.outputs[output]), dtype=np.float32)
        for start in range(0, len(rows), self._rows_per_request):
            stop = min(start + self._rows_per_request, len(rows))
            features[start:stop] = self._embed_part(rows[start:stop], output)
        return features

    def _embed_part(self, rows: NDArray[Any], output: str) -> NDArray[np.float32]:
        body = io.BytesIO()
        np.save(body, rows, allow_pickle=False)
        answer = self._request(
            "POST",
            "/v1/embed",
            params={"model": self.name, "output": output},
            headers={"content-type": _NPY, "accept": _NPY},
            content=body.getvalue(),
        )
        served = answer.headers.get("x-vaefeat-digest")
        if served != self.digest:
            raise RemoteError(
                f"{self.url} now serves another bundle as {self.name!r}: got digest {served}, wanted {self.digest}, "
                "which it had when this encoder was made; make a new RemoteEncoder, and embed everything with it"
            )
        try:
            features: NDArray[np.float32] = np.lib.format.read_array(io.BytesIO(answer.content), allow_pickle=False)
        except Exception as error:  # a stranger's header can fail in many ways
            raise RemoteError(f"{self.url} answered with what is not npy ({error}); is a proxy in between?") from error
        wanted = (len(rows), self.outputs[output])
        if features.shape != wanted or features.dtype != np.float32:
            got = f"{features.dtype} of shape {features.shape}"
            raise RemoteError(f"{self.url} answered with {got}, wanted float32 of shape {wanted}")
        return features

    def _request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        if self._client.is_closed:
            raise InputError("this RemoteEncoder was closed; make a new one")
        try:
            answer = self._client.request(method, path, **arguments)
        except httpx.TimeoutException as error:
            raise RemoteError(
                f"{self.url} did not answer within {self.timeout_s:g} s; is it overloaded? Try a smaller batch_size "
                "or a larger timeout_s"
            ) from error
        except httpx.HTTPError as error:
            raise RemoteError(
                f"{self.url} cannot be reached ({error}); is the server running (python -m serving BUNDLE), and is "
                "this its address?"
            ) from error
        if answer.is_success:
            return answer
        told = f"{self.url} answered {answer.status_code}: {_message(answer)}"
        if answer.is_client_error and answer.status_code not in _TRANSIENT:
            raise InputError(told)
        if answer.is_redirect:
            raise RemoteError(f"{told} to {answer.headers.get('location')}; give the address it leads to as url")
        raise RemoteError(f"{told}; try again later, and see the server's log if it stays so")

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # The key stays out because it is only in the client; what was pinned goes along, so that an unpickled encoder
        # gives the same features or none.
        return {name: value for name, value in self.__dict__.items() if name != "_client"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._client = self._connect(api_key=None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # sklearn.base.clone copies constructor arguments. What was pinned never changes, so the same object will do,
        # and unlike a pickle it still has its key.
        return self

    def __repr__(self) -> str:
        return f"RemoteEncoder({self.url!r}, model={self.name!r}, {self.input}, latent_dim={self.latent_dim})"


def _checked_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise InputError(f"got url={url!r}, wanted one such as http://127.0.0.1:8000 ({error})") from error
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise InputError(f"got url={url!r}, wanted one such as http://127.0.0.1:8000")
    if parsed.userinfo:
        # It would be in every message and in every pickle.
        raise InputError("got an url with a user name or password in it; pass the key as api_key=")
    return url.rstrip("/")


def _is_loopback(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _message(answer: httpx.Response) -> str:
    """Take the message out of the server's envelope, or whatever text there is from something in between."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, TypeError, KeyError):
        return answer.text[:200].strip() or answer.reason_phrase
