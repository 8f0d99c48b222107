"""How many bytes clients occupy in this process, and how many they may: one budget for all that comes and goes.

Bodies over HTTP and messages over gRPC while they come and are worked on, features from the moment that they are going
to be computed, answers until they are taken. All of it is the same memory, so that it is one budget: with one for
answers beside one for bodies, each would have to be as large as what one kind may need alone, and a machine with memory
for both together. Who finds none is refused or waits; what is there already is counted in any case.
"""

from __future__ import annotations

import asyncio
from collections import deque

from serving.errors import overloaded

__all__ = ["Holding", "Room"]

#: Of the budget, from which on it is short: clients that let answers stand are not waited for as long as usual.
_SHORT = 0.75


class Room:
    """Bytes that clients may occupy; belongs to one event loop.

    Parameters
    ----------
    most : int

    Attributes
    ----------
    most, used : int
        May be occupied, and are; more than may be where answers are larger than what was known of them before.
    """

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def is_short(self) -> bool:
        """Whether little is left."""
        return self.used > _SHORT * self.most

    def has(self, n_bytes: int, *, beside: int = 0) -> bool:
        """Tell whether so many more may come, `beside` those that are kept for the same request already.

        What is larger than everything may come alone, or it never could.
        """
        return self.used + n_bytes <= self.most or self.used == beside

    def take(self, n_bytes: int, *, beside: int = 0) -> None:
        """Keep room for bytes that are going to come.

        Raises
        ------
        RequestError
            503.
        """
        if not self.has(n_bytes, beside=beside):
            raise overloaded("requests and answers take all the memory that there is for them")
        self.used += n_bytes

    def count(self, n_bytes: int) -> None:
        """Count bytes that are there, whether or not there was room for them."""
        self.used += n_bytes

    async def wait(self, n_bytes: int) -> None:
        """Keep room once there is some."""
        while not self.has(n_bytes):
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        self.used += n_bytes

    def give_back(self, n_bytes: int) -> None:
        """Give room back, to those who wait."""
        self.used -= n_bytes
        while self._waiting:
            # All of them: how many find room is for them to see, and few ever wait.
            if not (turn := self._waiting.popleft()).done():
                turn.set_result(None)


class Holding:
    """What one connection has of a room, whether or not there was room for it.

    Parameters
    ----------
    room : Room

    Attributes
    ----------
    n_bytes : int
    """

    __slots__ = ("_room", "n_bytes")

    def __init__(self, room: Room) -> None:
        self._room = room
        self.n_bytes = 0

    def become(self, n_bytes: int) -> None:
        """Count so many instead of those before."""
        more = n_bytes - self.n_bytes
        self.n_bytes = n_bytes
        if more > 0:
            self._room.count(more)
        elif more:
            self._room.give_back(-more)
