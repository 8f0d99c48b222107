"""The one way from a request's rows to features, whatever protocol the request came by.

Protocols decode bytes and encode answers; everything between is here: which model is meant, images made rows, rows
given to the batcher, and whether all this works (warm-up, canary, stalled devices).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from serving.batch import Batch, Job
from serving.batcher import RowBatcher
from serving.changes import Changes
from serving.errors import ModelError, RequestError, overloaded, too_large
from serving.images import ImageDecoder, spread
from serving.models import Models
from serving.room import Room
from serving.served_model import ServedModel
from serving.settings import Limits
from vaefeat.errors import DeviceError
from vaefeat.predictor import LABEL, PROBABILITIES

__all__ = ["Caller", "Embedded", "Service"]

_log = logging.getLogger("serving")
_T = TypeVar("_T")
#: Between two comparisons with the reference while serving, in seconds.
_PROVE_EVERY_S = 5.0
#: Rows of it that are compared then; all were when the model was loaded.
_PROVE_ROWS = 4


@dataclass(frozen=True, slots=True)
class Embedded:
    """What became of the rows of a request.

    Attributes
    ----------
    features : mapping of str to ndarray of shape (n, width), float32
        By output; finite. Labels are places among the classes, (n,) int64.
    errors : mapping of int to str
        Images that could not be read: position and why. Their features are zeros.
    job : Job or None
        With its times; None where no image could be read.
    decode_s : float
        Seconds that images took.
    """

    features: Mapping[str, NDArray[Any]]
    job: Job | None
    errors: Mapping[int, str] = field(default_factory=dict)
    decode_s: float = 0.0

    @property
    def n_rows(self) -> int:
        """Rows that were asked for."""
        return len(next(iter(self.features.values())))

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Waiting for the device, decoding images, in the encoder."""
        job = self.job
        return (job.cut - job.queued, self.decode_s, job.device_s) if job is not None else (0.0, self.decode_s, 0.0)


class Caller(Protocol):
    """Who asks for rows to be embedded.

    Attributes
    ----------
    span : object
        Of tracing, None without.
    """

    span: Any

    def admit_rows(self, n_rows: int, *, n_bytes: int) -> None:
        """Take rows off a rate, and keep room for the bytes of their features; raises RequestError 429 and 503."""


class Service:
    """Models, the batcher, threads for what is slow, and whether it all works.

    Parameters
    ----------
    models : Models
    limits : Limits
    lanes : int
        Batches that are computed at the same time.
    watches : bool
        Whether a bundle whose folder changes is loaded again.
    alone : bool
        Whether no other process answers at the same address.

    Attributes
    ----------
    changes : Changes
        Of what is served.
    told : callable or None
        Hears of every :class:`Batch` that was computed.
    room : Room
        What clients may occupy, whichever door they come through.
    ready : bool
        Every model is warmed up, agrees with its reference, and no device has failed since.
    failure : str
        Why not, empty otherwise; nothing but a new process mends it.
    stopping : bool
        Streams that only watch the service are to end.
    """

    def __init__(
        self, models: Models, limits: Limits, *, lanes: int, watches: bool = False, alone: bool = True
    ) -> None:
        self.models, self.limits = models, limits
        self.room = Room(limits.max_in_flight_bytes)
        self.watches, self.alone = watches, alone
        self.ready = self.stopping = False
        self.failure = ""
        self.state = "warming up"
        self.told: Callable[[Batch], None] | None = None
        self.changes = Changes(models)
        self.batcher = RowBatcher(
            lanes=lanes,
            max_batch_rows=limits.max_batch_rows,
            max_queued_rows=limits.max_queued_rows,
            max_queued_bytes=limits.max_queued_bytes,
            told=self._batch_done,
        )
        self._pool = ThreadPoolExecutor(limits.worker_threads, thread_name_prefix="codec")
        self._decoder = ImageDecoder(
            max_pixels=limits.max_image_pixels,
            max_bytes=limits.max_queued_bytes,
            images_per_task=limits.images_per_task,
            # One request with many images leaves a thread to the others.
            tasks=max(1, limits.worker_threads - 1),
            off_loop=self.off_loop,
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the lanes, and warm up in the background so that probes are answered meanwhile; only once."""
        if self._tasks:
            return
        self.batcher.start()
        self._tasks.append(asyncio.create_task(self._watch_over()))
        if self.watches:
            self._tasks.append(asyncio.create_task(self.changes.watch()))

    async def stop(self) -> None:
        """End everything; requests in flight were answered before."""
        self.ready, self.state = False, "stopping"
        for task in self._tasks:
            task.cancel()
        self.batcher.close()
        self.models.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.changes.stop()

    def find(self, name: str | None, version: str | None = None) -> ServedModel:
        """Find a model; see :meth:`serving.models.Models.find`."""
        return self.models.find(name, version)

    def versions(self, name: str) -> tuple[str, ...]:
        """Give the versions of a name, the newest first."""
        return self.models.versions(name)

    async def embed(
        self,
        model: ServedModel,
        batch: NDArray[Any] | Sequence[bytes],
        *,
        outputs: tuple[str, ...] = ("mean",),
        priority: int = 0,
        timeout_s: float | None = None,
        caller: Caller | None = None,
    ) -> Embedded:
        """Embed rows or encoded images.

        Parameters
        ----------
        model : ServedModel
        batch : ndarray, or sequence of bytes
            Rows as a client sent them, or PNG, JPEG or WebP files.
        outputs : tuple of str
        priority : int
            0 or 1: interactive. More: gives way to others.
        timeout_s : float, optional
            Seconds from now within which rows must be on the device; the service's own limit at most.
        caller : Caller, optional
            Who asks.

        Raises
        ------
        InputError
            Rows that the model does not take.
        RequestError
            400 for an unknown output, 413 for too many rows, 422 where no image can be read, 503 and 504 under load,
            500 for features that are not finite.
        """
        self.require_ready()
        if unknown := [output for output in outputs if output not in model.names]:
            hint = "" if "mean" in model.names else "; it is a whole pipeline, without features: POST to /v1/predict"
            raise RequestError(
                400,
                "invalid_parameter",
                f"got output={unknown[0][:80]!r} of {model.name!r}, wanted one of {sorted(model.names)}{hint}",
            )
        if LABEL in outputs and PROBABILITIES not in outputs:
            # Where these are no numbers, a label means nothing.
            outputs = (*outputs, PROBABILITIES)
        limit = self.limits.compute_timeout_s
        timeout_s = limit if timeout_s is None else min(timeout_s, limit)
        if isinstance(batch, np.ndarray):
            self._admit(model, len(batch) if batch.ndim else 0, outputs, priority, timeout_s, caller)
            # A float row is looked at value by value; that of many rows would hold up everybody else.
            plain = batch.dtype == np.uint8 and model.input.dtype == "uint8"
            slow = not plain and batch.nbytes > self.limits.inline_bytes
            rows = await self.off_loop(model.input.prepare, batch) if slow else model.input.prepare(batch)
            job = self._submit(model, rows, outputs, priority, timeout_s, caller)
            return Embedded(await self._result(job), job)
        return await self._embed_images(model, batch, outputs, priority, timeout_s, caller)

    async def off_loop(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Call a function in a bounded pool of threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def require_ready(self) -> None:
        """Refuse work that would not be done well.

        Raises
        ------
        RequestError
            503.
        """
        if not self.ready:
            raise overloaded(f"the service is not ready: {self.failure or self.state}")

    def require_room(self, model: ServedModel | None, *, priority: int = 0, timeout_s: float | None = None) -> None:
        """Refuse a request before its body is read, where not even one of its rows would find a place in time.

        Parameters
        ----------
        model : ServedModel or None
            None where the body says which is meant: it is refused if there is no place for any of them.
        priority : int
        timeout_s : float, optional
            As for :meth:`embed`.

        Raises
        ------
        RequestError
            503.
        """
        if not self.batcher.queued_rows:
            return
        limit = self.limits.compute_timeout_s
        timeout_s = limit if timeout_s is None else min(timeout_s, limit)
        refusal: RequestError | None = None
        for one in self.models.current if model is None else (model,):
            try:
                self.batcher.require_room(one, 1, one.input.row_bytes, timeout_s=timeout_s, bulk=_is_bulk(priority))
                return
            except RequestError as error:
                refusal = error
        if refusal is not None:
            raise refusal

    def fail(self, reason: str) -> None:
        """Take the service out: nobody is told 200 by what does not work."""
        if not self.failure:
            _log.error("not ready any more: %s", reason)
        self.ready, self.failure = False, self.failure or reason

    def _admit(
        self,
        model: ServedModel,
        n_rows: int,
        outputs: tuple[str, ...],
        priority: int,
        timeout_s: float,
        caller: Caller | None,
    ) -> None:
        if n_rows > self.limits.max_rows:
            raise too_large(f"got {n_rows} rows, wanted at most {self.limits.max_rows} at a time; send them in parts")
        # Before they are taken off a rate: whoever is refused comes again, and would pay twice.
        n_bytes = n_rows * model.input.row_bytes
        self.batcher.require_room(model, n_rows, n_bytes, timeout_s=timeout_s, bulk=_is_bulk(priority))
        if caller is not None:
            caller.admit_rows(n_rows, n_bytes=n_rows * model.feature_bytes(outputs))

    def _submit(
        self,
        model: ServedModel,
        rows: NDArray[Any],
        outputs: tuple[str, ...],
        priority: int,
        timeout_s: float,
        caller: Caller | None,
    ) -> Job:
        span = caller.span if caller is not None else None
        return self.batcher.submit(model, rows, outputs, bulk=_is_bulk(priority), timeout_s=timeout_s, span=span)

    async def _result(self, job: Job) -> Mapping[str, NDArray[Any]]:
        try:
            features = await job.future
        except asyncio.CancelledError:
            self.batcher.abandon(job)
            raise
        except DeviceError as error:
            self.fail(str(error))
            raise RequestError(
                503, "overloaded", "the device failed; try again elsewhere", headers={"retry-after": "1"}
            ) from error
        # Computed by a device that was found to be wrong meanwhile.
        if self.failure:
            self.require_ready()
        return features

    async def _embed_images(
        self,
        model: ServedModel,
        encoded: Sequence[bytes],
        outputs: tuple[str, ...],
        priority: int,
        timeout_s: float,
        caller: Caller | None,
    ) -> Embedded:
        if model.input.kind != "image":
            raise RequestError(422, "invalid_rows", f"got images, wanted {model.input}; send rows of numbers")
        self._admit(model, len(encoded), outputs, priority, timeout_s, caller)
        began = time.perf_counter()
        rows, errors = await self._decoder.decode(encoded, model.input, deadline=began + timeout_s)
        decode_s = time.perf_counter() - began
        if len(errors) == len(encoded):
            position, message = next(iter(sorted(errors.items())))
            raise RequestError(422, "invalid_rows", f"got no image that can be read; item {position}: {message}")
        if not errors:
            job = self._submit(model, rows, outputs, priority, timeout_s - decode_s, caller)
            return Embedded(await self._result(job), job, decode_s=decode_s)
        good = np.array([position for position in range(len(encoded)) if position not in errors], np.intp)
        job = self._submit(model, rows[good], outputs, priority, timeout_s - decode_s, caller)
        computed = await self._result(job)
        found = {output: spread(features, good, len(encoded)) for output, features in computed.items()}
        return Embedded(found, job, errors, decode_s)

    def _batch_done(self, batch: Batch) -> None:
        if self.told is not None:
            self.told(batch)

    async def _watch_over(self) -> None:
        """Warm up, then compare with the reference again and again."""
        try:
            await self.changes.run(lambda: self.models.warm_up(told=self._is_warming))
            self.ready = True
            while True:
                await asyncio.sleep(_PROVE_EVERY_S)
                if (stalled := self.batcher.stalled_s) > self.limits.compute_timeout_s:
                    self.fail(f"a batch has been on the device for {stalled:.0f} s")
                    return
                for model in self.models.current:
                    await self._proved(model)
        except (ModelError, DeviceError) as error:
            self.fail(str(error))
        except Exception as error:
            _log.exception("the watch over the models ended")
            self.fail(f"{type(error).__name__}: {error}")

    async def _proved(self, model: ServedModel) -> None:
        """Compare with the reference, in a thread that nobody joins: a device that hangs keeps it for good."""
        loop = asyncio.get_running_loop()
        proved: asyncio.Future[Exception | None] = loop.create_future()

        def prove() -> None:
            found: Exception | None = None
            try:
                model.prove(most_rows=_PROVE_ROWS)
            except Exception as error:  # raised again, on the event loop
                found = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(lambda: None if proved.done() else proved.set_result(found))

        threading.Thread(target=prove, name="canary", daemon=True).start()
        limit_s = self.limits.compute_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                error = await proved
        except TimeoutError:
            raise DeviceError(f"the device has not computed the reference of {model.name!r} in {limit_s:g} s") from None
        if error is not None:
            raise error

    def _is_warming(self, name: str) -> None:
        self.state = f"warming up {name}"


def _is_bulk(priority: int) -> bool:
    return priority > 1
