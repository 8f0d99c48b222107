"""How processes that accept from one queue of connections share them out: whoever has fewest goes first.

All of them hear of a new connection, and without more the quickest takes it; of clients that come together one process
would take nearly all, and the others' processors would stand still as long as the connections last. So each tells how
many it has, in memory that all share, and one that has more than another leaves a connection to that one for a moment:
for a moment only, so that nobody has to rely on the other living.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import socket
import tempfile
from collections.abc import Callable

import numpy as np

__all__ = ["Acceptor", "Counts", "Share"]

_log = logging.getLogger("serving")
#: Processes that may share a queue.
_N_PLACES = 1024
#: At a place that nobody has.
_NOBODY = -1
#: For which a connection is left to a process that has fewer.
_PATIENCE_S = 0.002
#: Accepted in one turn of the event loop.
_MOST_AT_ONCE = 16
#: Before the next try, where the process has no file or memory left for a connection.
_SHORT_S = 0.2


class Counts:
    """Numbers of connections in memory that processes share, a place for each; made where the queue is.

    Parameters
    ----------
    file : int, optional
        Descriptor of the memory, from another process's :attr:`file`; new when not given. It is closed with this.

    Attributes
    ----------
    file : int
        Descriptor, to be handed to another process.
    """

    def __init__(self, file: int | None = None) -> None:
        self.file = _nameless_file() if file is None else file
        n_bytes = _N_PLACES * np.dtype(np.int32).itemsize
        if file is None:
            os.ftruncate(self.file, n_bytes)
        self._numbers = np.frombuffer(mmap.mmap(self.file, n_bytes), np.int32)
        if file is None:
            self._numbers[:] = _NOBODY

    def __del__(self) -> None:
        """Close the descriptor."""
        with contextlib.suppress(OSError):
            os.close(self.file)

    def __getitem__(self, place: int) -> int:
        return int(self._numbers[place])

    def __setitem__(self, place: int, number: int) -> None:
        self._numbers[place] = number

    @property
    def least(self) -> int:
        """The number of connections that a process with fewest has."""
        return int(self._numbers.min(where=self._numbers != _NOBODY, initial=np.iinfo(np.int32).max))

    def enter(self) -> int:
        """Give the first place that nobody has to a process, which has no connection yet.

        Raises
        ------
        IndexError
            All are taken.
        """
        (free,) = np.nonzero(self._numbers == _NOBODY)
        place = int(free[0])
        self._numbers[place] = 0
        return place

    def leave(self, place: int) -> None:
        """Take a place back, whose process has gone."""
        self._numbers[place] = _NOBODY


def _nameless_file() -> int:
    """Make a file that nobody finds, and that goes with its last descriptor; not only Linux has these."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Share:
    """What one process has of the connections.

    Parameters
    ----------
    counts : Counts
    place : int
        Its own.
    held : socket
        Kept open as long as the process has the place: its end is how others hear that it is gone.
    """

    def __init__(self, counts: Counts, place: int, held: socket.socket) -> None:
        self._counts, self._place, self._held = counts, place, held

    def close(self) -> None:
        """Give the place back."""
        self._held.close()

    def add(self, n: int) -> None:
        """Tell that there are `n` more connections, or fewer."""
        self._counts[self._place] += n

    @property
    def is_least(self) -> bool:
        """Whether nobody has fewer connections."""
        return self._counts[self._place] <= self._counts.least


class Acceptor:
    """Accepts connections from a queue that other processes accept from, too; from its event loop's thread.

    Parameters
    ----------
    listener : socket
        Listening, and not blocking.
    share : Share
        Counts what is accepted; whoever sees a connection end takes it off.
    make : callable
        Makes the protocol of a connection.
    """

    def __init__(self, listener: socket.socket, share: Share, make: Callable[[], asyncio.BaseProtocol]) -> None:
        self._listener, self._share, self._make = listener, share, make
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.TimerHandle | None = None
        self._beginning: set[asyncio.Task[None]] = set()
        self._listen()

    def close(self) -> None:
        """Accept no more; what was accepted stays."""
        if self._waiting is not None:
            self._waiting.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()

    def _listen(self) -> None:
        self._waiting = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(_MOST_AT_ONCE):
            if not self._share.is_least:
                self._pause(_PATIENCE_S, self._accept_anyway)
                return
            if not self._accept_one():
                return

    def _accept_anyway(self) -> None:
        self._listen()
        self._accept_one()

    def _accept_one(self) -> bool:
        """Accept a connection, if there is one."""
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False  # another process was quicker, or the client has gone
        except OSError as error:
            _log.warning("no connection can be accepted now: %s", error)
            self._pause(_SHORT_S, self._listen)
            return False
        self._share.add(1)
        client.setblocking(False)
        task = self._loop.create_task(self._begin(client))
        self._beginning.add(task)
        task.add_done_callback(self._beginning.discard)
        return True

    async def _begin(self, client: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make, client)
        except OSError:  # the client has gone
            client.close()
            self._share.add(-1)

    def _pause(self, seconds: float, then: Callable[[], None]) -> None:
        self._loop.remove_reader(self._listener)
        self._waiting = self._loop.call_later(seconds, then)
