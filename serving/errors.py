"""What can go wrong, and how it is told.

::

    SetupError      the service cannot start with these arguments; told at the command line, exit code 2
    EngineError     what was started failed, or died later; told at the command line, exit code 1
    ModelError      a model cannot be loaded or computes something else; told to whoever asked for it
    RequestError    a request cannot be answered; told to the client in the envelope

Every failed request is answered with one JSON envelope, whoever noticed the failure::

    {"error": {"type": "invalid_rows", "message": "got ..., wanted ...", "request_id": "..."}}

=========================  ======  ====================================================================================
type                       status  when
=========================  ======  ====================================================================================
``malformed_body``         400     not npy or JSON of the form that was announced
``malformed_request``      400     not HTTP
``invalid_parameter``      400     an unknown query parameter, output or key, or no model named where several are served
``unauthorized``           401     no API key, or one that is unknown or has expired
``forbidden``              403     an API key without the scope that this needs
``not_found``              404     no such address
``unknown_model``          404     no such model
``method_not_allowed``     405
``not_acceptable``         406     Accept leaves neither npy nor JSON
``body_timeout``           408     the body, or the headers, did not arrive in time
``conflict``               409     a model that cannot be loaded or unloaded as asked
``length_required``        411     a body whose length no Content-Length announces
``too_large``              413     more bytes or rows than the limits allow
``unsupported_media_type`` 415     neither npy nor JSON, or compressed
``invalid_rows``           422     well-formed, but not what the bundle takes (:class:`vaefeat.errors.InputError`)
``rate_limited``           429     more rows or bytes than the API key's rate; try again after Retry-After
``head_too_large``         431     a request line and headers that do not end
``internal_error``         500     a defect of ours; the server's log has it under the request id
``non_finite_output``      500     the encoder computed NaN or infinity
``overloaded``             503     too many requests or rows at once; try again after Retry-After
``deadline_exceeded``      504     not computed within the time that the request or the service allows
=========================  ======  ====================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import Repr

import orjson

from vaefeat.errors import InputError

__all__ = [
    "CodecError",
    "EngineError",
    "ModelError",
    "RequestError",
    "SetupError",
    "as_request_error",
    "envelope",
    "overloaded",
    "shown",
    "too_large",
    "too_late",
]

_repr = Repr()
_repr.maxstring = _repr.maxother = 80
_repr.maxlevel = 2


class SetupError(Exception):
    """The service cannot be started with these arguments, on this machine, now."""


class EngineError(Exception):
    """What runs the service did not come up, or went down under it."""


class ModelError(Exception):
    """A bundle that cannot be served, or a device that computes something else than where it was exported."""


class CodecError(ValueError):
    """Bytes that are not what they were announced to be."""


class RequestError(Exception):
    """A request that cannot be answered.

    Parameters
    ----------
    status : int
        HTTP status.
    kind : str
        The envelope's ``type``, from the table above.
    message : str
        What was got, what was wanted, what to do; safe to show to the client.
    headers : mapping of str to str
        Further response headers.
    param : str, optional
        Which part of the request it is about.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        headers: Mapping[str, str] | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.headers = dict(headers or {})
        self.param = param


def shown(value: object) -> str:
    """Quote what a client sent, however much it is: an error is a line, whatever it is about."""
    return _repr.repr(value)


def too_large(message: str) -> RequestError:
    """Answer 413; the connection closes, because the rest of such a body is not worth reading."""
    return RequestError(413, "too_large", message, headers={"connection": "close"})


def overloaded(message: str, *, retry_after_s: int = 1) -> RequestError:
    """Answer 503 with a time after which to try again."""
    return RequestError(503, "overloaded", message, headers={"retry-after": str(retry_after_s)})


def too_late(what: str) -> RequestError:
    """Answer 504 for what has not happened in time."""
    return RequestError(
        504,
        "deadline_exceeded",
        f"{what} before the request's time was over; send fewer rows, or allow more time",
        headers={"retry-after": "1"},
    )


def as_request_error(error: Exception) -> RequestError:
    """Translate whatever was raised while a request was handled."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, CodecError):
        return RequestError(400, "malformed_body", str(error))
    if isinstance(error, InputError):
        return RequestError(422, "invalid_rows", str(error))
    if isinstance(error, ModelError):
        return RequestError(409, "conflict", str(error))
    return RequestError(500, "internal_error", "the server failed on this request; its log has the details")


def envelope(error: RequestError, request_id: bytes) -> bytes:
    """Write an error in the form of the table above; OpenAI's clients find ``message`` and ``type`` where they look."""
    # A message may quote what the client sent, so it may hold what UTF-8 cannot.
    message = error.message.encode("utf-8", "backslashreplace").decode()
    return orjson.dumps({"error": {"type": error.kind, "message": message, "request_id": request_id.decode()}})
