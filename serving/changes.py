"""Changes of what is served: loading, going back to a version, unloading; here, and where others answer too.

Where several processes answer at one address, a change is one for all of them, or a client would get another model with
every connection. Whoever is asked for one takes its turn with the others, makes the change and has them all make it;
so they all make the same ones in the same order, and the answer says whether all have.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import orjson

from serving.errors import ModelError, RequestError
from serving.models import Models
from serving.served_model import ServedModel

__all__ = ["RELOAD", "Change", "Changes", "Tell"]

_log = logging.getLogger("serving")
_T = TypeVar("_T")
#: Between two looks at watched folders.
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class Change:
    """What one process asks of the others.

    Attributes
    ----------
    verb : {"reload", "load", "prove", "choose", "unload"}
        Load what has changed, or a model's folder whatever was chosen; see whether a version could be chosen; choose
        it; serve the model no more.
    model, version : str
        Empty where the verb needs none.
    """

    verb: Literal["reload", "load", "prove", "choose", "unload"]
    model: str = ""
    version: str = ""

    def to_json(self) -> bytes:
        """Write it in one line."""
        return orjson.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: bytes) -> Change:
        """Read what :meth:`to_json` has written."""
        return cls(**orjson.loads(line))


RELOAD = Change("reload")
#: Has all processes make a change; raises ModelError where not all have, and says why.
Tell = Callable[[Change], Awaitable[None]]


class Changes:
    """Changes the models of one process, one change after the other, in a thread of its own.

    Parameters
    ----------
    models : Models

    Attributes
    ----------
    turn : callable or None
        Gives the turn among the processes that answer at the same address, with what tells them; None without others.
    """

    def __init__(self, models: Models) -> None:
        self._models = models
        self.turn: Callable[[], AbstractAsyncContextManager[Tell]] | None = None
        # Loading takes seconds; it must not stand in the way of bodies that wait to be decoded.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._under_way: set[asyncio.Task[Any]] = set()

    async def run(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Run a function when the changes before it are made."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def stop(self) -> None:
        """Begin no further change."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def load(self, name: str) -> ServedModel:
        """Load a name's folder again, everywhere.

        Raises
        ------
        RequestError, ModelError
            As :meth:`serving.models.Models.load`; or others have not loaded it.
        """
        return await self._to_its_end(self._load(name))

    async def choose(self, name: str, version: str) -> ServedModel:
        """Go back to a version that is held, everywhere or nowhere.

        Raises
        ------
        RequestError, ModelError
            As :meth:`serving.models.Models.choose`; or others do not hold it.
        """
        return await self._to_its_end(self._choose(name, version))

    async def unload(self, name: str) -> None:
        """Serve a name no more, anywhere.

        Raises
        ------
        RequestError, ModelError
            As :meth:`serving.models.Models.unload`; or others go on.
        """
        await self._to_its_end(self._unload(name))

    async def follow(self, changes: Sequence[Change]) -> list[str]:
        """Make changes that others have made.

        Returns
        -------
        list of str
            What could not be done, and why; it is logged as well.
        """
        failures: list[str] = []
        for change in changes:
            if change == RELOAD:
                failures += await self.reload()
            else:
                failures += await self._tried(change.model, self._make, change)
        return failures

    async def reload(self) -> list[str]:
        """Load every folder that has changed; what cannot be loaded is logged, and what was served goes on.

        Returns
        -------
        list of str
            What could not be loaded, and why.
        """
        return [line for name in self._models.names for line in await self._tried(name, self._models.reload, name)]

    async def watch(self) -> None:
        """Load a bundle again whenever its folder changes, until cancelled."""
        # Loaded once more to begin with, because a bundle may have come since; the same one is not opened again.
        before: dict[str, tuple[int, ...]] = {}
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            # Twice the same: whoever writes the bundle has finished with its manifest, which comes last.
            if (now := self._models.stamps()) != before and now == await self._stamps_later():
                before = now
                await self.reload()

    async def _stamps_later(self) -> dict[str, tuple[int, ...]]:
        await asyncio.sleep(_LOOK_EVERY_S / 4)
        return self._models.stamps()

    async def _load(self, name: str) -> ServedModel:
        async with self._turn() as tell:
            # Here first: a bundle that cannot be served is not even told of.
            model = await self.run(self._models.load, name)
            await tell(Change("load", name))
            return model

    async def _choose(self, name: str, version: str) -> ServedModel:
        async with self._turn() as tell:
            # The first digits may name one version here, and two elsewhere.
            found = self._models.find(name, version).version
            # A process that has replaced another holds what its folder does, and nothing before that.
            await tell(Change("prove", name, found))
            model = await self.run(self._models.choose, name, found)
            await tell(Change("choose", name, found))
            return model

    async def _unload(self, name: str) -> None:
        async with self._turn() as tell:
            await self.run(self._models.unload, name)
            await tell(Change("unload", name))

    def _make(self, change: Change) -> None:
        """Make a change, which this process may have asked for itself, and made."""
        models = self._models
        if change.verb == "load":
            models.load(change.model)
        elif change.verb == "prove":
            models.find(change.model, change.version).prove()
        elif change.verb == "choose":
            models.choose(change.model, change.version)
        elif change.verb == "unload" and change.model in models.names:
            models.unload(change.model)

    async def _tried(self, name: str, function: Callable[..., Any], *arguments: Any) -> list[str]:
        try:
            await self.run(function, *arguments)
        except (ModelError, RequestError) as error:
            _log.error("%s", error)
            return [str(error)]
        except Exception as error:  # whoever watches has to go on watching
            _log.exception("model %r was not changed, and what was served still is", name)
            return [f"model {name!r} was not changed: {type(error).__name__}"]
        return []

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[Tell]:
        if self.turn is None:
            yield _to_nobody
            return
        async with self.turn() as tell:
            yield tell

    async def _to_its_end(self, change: Coroutine[Any, Any, _T]) -> _T:
        """Go on where whoever asked for a change hangs up: others may have made it already."""
        task = asyncio.create_task(change)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_told_to_nobody)
            raise


async def _to_nobody(change: Change) -> None:
    """Tell no other process, for there is none."""


def _told_to_nobody(task: asyncio.Task[Any]) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        if (error := task.exception()) is not None:
            _log.error("a change whose client has gone failed: %s", error)
