"""One exchange with a server, without the waiting: what an answer means, and whether and when to ask again.

Whatever takes several steps is a generator: it yields an :class:`Ask` or a :class:`Pause`, is sent what came of it, and
returns its result. A driver performs the steps, with threads or with asyncio (:mod:`vaefeat.remote_lines`); every
decision is here, once for both.

What is tried again. Embedding has no side effect, so any request may be repeated. It is where the trouble can pass:

============================================  =========================================================================
connection refused, lost, silent, cut short   a server restarts, a replica died, a balancer closed an idle connection
408, 429, 502, 503, 504                       too slow, too much, or nobody behind the proxy; ``Retry-After`` is heeded
500 that is not in our envelope               a proxy's: Ray Serve's HAProxy turns the three above into it
============================================  =========================================================================

Nothing else is: a 4xx is about the request, a 500 of our own is a defect, and both would come again.

References
----------
RFC 9110, sections 9.2.2 (what may be repeated) and 10.2.3 (Retry-After). M. Brooker 2015, "Exponential Backoff And
Jitter", AWS Architecture Blog (full jitter).
"""

from __future__ import annotations

import logging
import math
import random
import ssl
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import TypeAlias, TypeVar

import httpx

from vaefeat.errors import InputError, RemoteError, VaefeatError

__all__ = ["Ask", "Failed", "Pause", "RefusedError", "Reply", "Retries", "Steps", "Terms", "answered", "retry_after_s"]

_LOG = logging.getLogger("vaefeat")
_PASSING_STATUS = {408, 429, 502, 503, 504}
_PASSING_FAILURE = (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError)
#: Bounds of the first and of the longest pause, in seconds.
_FIRST_S, _LONGEST_S = 0.1, 5.0


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How a client treats a server; see :class:`vaefeat.remote.RemoteEncoder`.

    Raises
    ------
    InputError
        An URL that is none, or a number that makes no sense.
    """

    url: str
    timeout_s: float
    patience_s: float
    batch_size: int
    in_flight: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _checked_url(self.url))
        for name in ("batch_size", "in_flight"):
            if getattr(self, name) < 1:
                raise InputError(f"got {name}={getattr(self, name)}, wanted at least 1")
        if not 0 < self.timeout_s < math.inf:
            raise InputError(f"got timeout_s={self.timeout_s}, wanted a number of seconds above 0")
        if not 0 <= self.patience_s < math.inf:
            raise InputError(f"got patience_s={self.patience_s}, wanted a number of seconds, or 0 to try only once")


def _checked_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise InputError(f"got url={url!r}, wanted one such as http://127.0.0.1:8000 ({error})") from error
    if parsed.userinfo:
        # It would be in every message and in every pickle.
        raise InputError("got an url with a user name or password in it; pass the key as api_key=")
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise InputError(f"got url={url!r}, wanted one such as http://127.0.0.1:8000")
    return url.rstrip("/")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A step: send this request."""

    method: str
    path: str
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None


@dataclass(frozen=True)
class Pause:
    """A step: wait."""

    seconds: float


@dataclass(frozen=True)
class Failed:
    """What came of an :class:`Ask` that got no answer.

    Parameters
    ----------
    error : httpx.RequestError
    reused : bool
        It went over a connection that had served before, which the server may have closed meanwhile.
    """

    error: httpx.RequestError
    reused: bool


Reply: TypeAlias = httpx.Response | Failed
T = TypeVar("T")
Steps: TypeAlias = Generator[Ask | Pause, Reply | None, T]


class RefusedError(InputError):
    """A request that the server refused for good.

    Attributes
    ----------
    status : int
        Of the answer.
    """

    status = 0


class Retries:
    """When one request is sent again, from its first attempt on.

    Pauses grow exponentially and are drawn from all of their range ("full jitter"), so that clients that failed
    together do not come back together.

    Parameters
    ----------
    patience_s : float
        A request is sent again only within so many seconds of its first attempt.
    clock : callable
        Seconds that never go back.
    """

    def __init__(self, patience_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = clock() + patience_s
        self._failures = 0

    def pause_s(self, *, at_least_s: float = 0.0, stale: bool = False) -> float | None:
        """Decide what to do after a failure.

        Parameters
        ----------
        at_least_s : float
            What the server asked for.
        stale : bool
            The connection was an old one: the failure says nothing about how the server is, so the first such is
            repeated without a pause.

        Returns
        -------
        float or None
            Seconds to wait; None to give up.
        """
        self._failures += 1
        if stale and self._failures == 1:
            pause_s = at_least_s
        else:
            longest_s = min(_LONGEST_S, math.ldexp(_FIRST_S, min(self._failures - 1, 30)))
            pause_s = at_least_s + random.uniform(0.0, longest_s)  # noqa: S311  (it keeps no secret)
        return pause_s if self._clock() + pause_s < self._until else None


def answered(ask: Ask, terms: Terms, *, first_contact: bool = False) -> Steps[httpx.Response]:
    """Send a request until it is answered well, or until the terms' patience ends.

    Parameters
    ----------
    ask : Ask
    terms : Terms
    first_contact : bool
        Nobody has answered at this address yet: that nobody listens there is told at once, since it is the address
        that is most likely wrong.

    Returns
    -------
    httpx.Response
        With a status of 2xx.

    Raises
    ------
    RefusedError
        4xx.
    RemoteError
        Anything else.
    """
    retries, attempts = Retries(terms.patience_s), 1
    while True:
        reply = yield ask
        assert reply is not None
        if isinstance(reply, httpx.Response) and reply.is_success:
            return reply
        trouble = _judged(reply, terms, first_contact=first_contact)
        cause = reply.error if isinstance(reply, Failed) else None
        if not trouble.passes:
            raise trouble.error from cause
        pause_s = retries.pause_s(at_least_s=trouble.retry_after_s, stale=trouble.stale)
        if pause_s is None:
            if attempts == 1:
                raise trouble.error from cause
            told = f"{trouble.error} (attempt {attempts}, within patience_s={terms.patience_s:g})"
            raise RemoteError(told) from cause
        _LOG.info("%s; asking again in %.1f s", trouble.error, pause_s)
        yield Pause(pause_s)
        attempts += 1


@dataclass(frozen=True, kw_only=True)
class _Trouble:
    """Why there is no good answer, and whether there may be one later."""

    error: VaefeatError
    passes: bool = False
    retry_after_s: float = 0.0
    stale: bool = False


def _judged(reply: Reply, terms: Terms, *, first_contact: bool) -> _Trouble:
    return (
        _judged_answer(reply, terms)
        if isinstance(reply, httpx.Response)
        else _judged_failure(reply, terms, first_contact=first_contact)
    )


def _judged_failure(failed: Failed, terms: Terms, *, first_contact: bool) -> _Trouble:
    error = failed.error
    if isinstance(error, httpx.TimeoutException):
        told = (
            f"{terms.url} did not answer within {terms.timeout_s:g} s; is it overloaded? Try a smaller batch_size or "
        )
        told += "a larger timeout_s"
    elif _is_distrusted(error):
        told = f"{terms.url} has a certificate that is not trusted ({error}); SSL_CERT_FILE can name whom to trust"
    else:
        told = f"{terms.url} cannot be reached ({str(error) or type(error).__name__}); is the server running "
        told += "(python -m serving BUNDLE), and is this its address?"
    wrong_address = first_contact and isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
    passes = isinstance(error, _PASSING_FAILURE) and not (wrong_address or _is_distrusted(error))
    return _Trouble(error=RemoteError(told), passes=passes, stale=failed.reused)


def _is_distrusted(error: BaseException) -> bool:
    """Whether a certificate was not accepted, which no waiting mends."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _judged_answer(answer: httpx.Response, terms: Terms) -> _Trouble:
    status, message = answer.status_code, _message(answer)
    told = f"{terms.url} answered {status}: {message or answer.text[:200].strip() or answer.reason_phrase}"
    if status in _PASSING_STATUS or (status == 500 and message is None):
        return _Trouble(
            error=RemoteError(f"{told}; try again later, and see the server's log if it stays so"),
            passes=True,
            retry_after_s=retry_after_s(answer.headers.get("retry-after")),
        )
    if answer.is_client_error:
        if status == 401:
            told += (
                "; pass RemoteEncoder(..., api_key=...), which VAEFeatures takes, too, or give the key to "
                "authenticate() of an encoder that was unpickled: pickles hold no key"
            )
        refused = RefusedError(told)
        refused.status = status
        return _Trouble(error=refused)
    if answer.is_redirect:
        return _Trouble(
            error=RemoteError(f"{told} to {answer.headers.get('location')}; give the address it leads to as url")
        )
    return _Trouble(error=RemoteError(f"{told}; see the server's log"))


def _message(answer: httpx.Response) -> str | None:
    """Take the message out of the server's envelope; None where the answer is somebody else's."""
    try:
        error = answer.json()["error"]
        request_id = error.get("request_id")
        return f"{error['message']}{f' (request {request_id})' if request_id else ''}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def retry_after_s(header: str | None, *, now: float | None = None) -> float:
    """Read ``Retry-After``: seconds, or the date of an HTTP clock.

    Parameters
    ----------
    header : str or None
    now : float, optional
        Seconds since 1970; the clock's when None.

    Returns
    -------
    float
        Seconds, not negative; 0 where the header is missing or neither of the two.
    """
    text = (header or "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return 0.0
    if date.tzinfo is None:  # -0000, which is UTC, too
        date = date.replace(tzinfo=UTC)
    return max(0.0, date.timestamp() - (time.time() if now is None else now))
