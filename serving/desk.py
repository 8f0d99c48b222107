"""Hands the listening socket to the replicas on this machine, over a Unix socket in a private folder.

All replicas accept from one queue of connections, which the starting process keeps open: while a replica is replaced,
connections wait in it instead of being refused, and a version that takes over leaves none behind.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from typing import Self

__all__ = ["Desk", "fetch_listener"]

_HERE = b"L"
_TIMEOUT_S = 30.0


class Desk:
    """Answers replicas; a context manager.

    Parameters
    ----------
    path : Path
        Of the Unix socket, in a folder that is this user's alone.
    listener : socket
        What is handed out.
    """

    def __init__(self, path: Path, listener: socket.socket) -> None:
        self._listener = listener
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._answer, name="desk", daemon=True)

    def _answer(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                caller, _ = self._socket.accept()
                with caller, contextlib.suppress(OSError):
                    socket.send_fds(caller, [_HERE], [self._listener.fileno()])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # A thread in accept is woken by shutdown, not by close.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def fetch_listener(path: Path) -> socket.socket:
    """Ask a desk for its listening socket; it is the same one in this process, too.

    Raises
    ------
    OSError
        Nobody is there.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as desk:
        desk.settimeout(_TIMEOUT_S)
        desk.connect(str(path))
        _, descriptors, _, _ = socket.recv_fds(desk, 1, 1)
    listener = socket.socket(fileno=descriptors[0])
    listener.setblocking(False)
    return listener
