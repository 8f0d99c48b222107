"""The ``Server-Timing`` header: where the time of one request went.

Browsers' developer tools draw it, and a client can tell waiting from computing by it.

References
----------
W3C, Server Timing, section 2: durations are milliseconds.
"""

from __future__ import annotations

__all__ = ["server_timing"]


def server_timing(*, queue: float, decode: float, device: float, total: float) -> bytes:
    """Write the header's value.

    Parameters
    ----------
    queue, decode, device, total : float
        Seconds: waiting for the device, taking the body apart, in the encoder, from the first byte to the answer.

    Returns
    -------
    bytes
        Such as ``queue;dur=0.120, decode;dur=0.031, device;dur=1.204, total;dur=1.490``.
    """
    return b"queue;dur=%.3f, decode;dur=%.3f, device;dur=%.3f, total;dur=%.3f" % (
        queue * 1e3,
        decode * 1e3,
        device * 1e3,
        total * 1e3,
    )
