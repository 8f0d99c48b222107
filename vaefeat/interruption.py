"""Ctrl-C and SIGTERM as a request to stop at the next safe point."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopRequest", "request_stop", "stop_on_signals"]


class StopRequest:
    """Whether somebody asked to stop, and how.

    Attributes
    ----------
    signal : signal.Signals or None
        The signal that arrived.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def __str__(self) -> str:
        return self.signal.name if self.signal else "request"


_OPEN: set[StopRequest] = set()


def request_stop(number: signal.Signals) -> None:
    """Ask what runs under :func:`stop_on_signals` in this process to stop, from any thread: as if a signal had come."""
    for request in tuple(_OPEN):
        request.signal = number


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a :class:`StopRequest`; a second one interrupts at once.

    Only Python's main thread can install handlers: in another thread signals keep their meaning, and only
    :func:`request_stop` stops. The handlers that were there before are put back at the end.
    """
    request = StopRequest()
    _OPEN.add(request)
    try:
        with _handling(request):
            yield request
    finally:
        _OPEN.discard(request)


@contextmanager
def _handling(request: StopRequest) -> Iterator[None]:

    def note(number: int, frame: FrameType | None) -> None:
        if request:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
