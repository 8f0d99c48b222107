"""Encoders as actors of Ray Data: told what to do part by part, watched, and given up where their machine is lost.

Importing this module imports Ray, which reads its environment then: :mod:`pipelines.ray_environment` comes first.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.embedding.arrays import ArrayHeader
from pipelines.embedding.encoding import Encoded, PartEncoder
from pipelines.embedding.output import Output, Receipt
from pipelines.embedding.parts import Part, shares
from pipelines.embedding.sources import Source
from pipelines.ray_session import last_line
from vaefeat.bundle import Bundle
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import ConfigError, DeviceError, JobError, VaefeatError
from vaefeat.interruption import StopRequest

__all__ = ["Encoders", "Job", "embed_parts", "find_room"]

_TICK_S = 0.3
_LOOK_S = 2.0
#: For an encoder whose machine was lost to find room on another.
_GRACE_S = 20.0
#: For any encoder to be there, after which nobody is expected any more.
_NOBODY_S = 180.0
#: One that is being embedded, and one that is there when it is done.
_SHARES_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class Encoders:
    """How many encoders there are, and what each has."""

    count: int
    cpus: int
    """Processors; as many threads decode images."""
    gpus: float


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every encoder is told once."""

    bundle: Bundle
    source: Source
    headers: Mapping[str, ArrayHeader]
    output: Output
    name: str
    """Of the encoder's output."""


class _News(NamedTuple):
    receipts: list[Receipt]
    failure: VaefeatError | None
    encoders: dict[str, tuple[str, Any]]
    """By the actor's id: the id of its machine, and its handle."""
    seconds: float
    """From the first encoder that was open to the last receipt."""


class Desk:
    """Where encoders tell what they did; an actor on the job's own machine."""

    def __init__(self) -> None:
        self._receipts: list[Receipt] = []
        self._failure: VaefeatError | None = None
        self._encoders: dict[str, tuple[str, Any]] = {}
        self._done: set[int] = set()
        self._opened = self._heard = 0.0

    def join(self, actor: str, node: str, handle: Any) -> None:
        """Take note of an encoder, or of its new machine."""
        self._encoders[actor] = (node, handle)

    def open(self) -> None:
        """Take note that an encoder can begin."""
        self._opened = self._opened or time.perf_counter()

    def undone(self, indices: Sequence[int]) -> list[int]:
        """Say which parts of a share are still to do: one that was lost half done comes again as a whole."""
        return [index for index in indices if index not in self._done]

    def tell(self, receipt: Receipt) -> None:
        """Take note of a part that is done."""
        self._receipts.append(receipt)
        self._done.add(receipt.index)
        self._heard = time.perf_counter()

    def fail(self, error: VaefeatError) -> None:
        """Take note of an error; the first one counts."""
        self._failure = self._failure or error

    def take(self) -> _News:
        """Give the job what is new."""
        receipts, self._receipts = self._receipts, []
        return _News(receipts, self._failure, dict(self._encoders), max(self._heard - self._opened, 0.0))


class EncodingActor:
    """What Ray Data runs in each actor of its pool.

    Parameters
    ----------
    job : ObjectRef of Job
        Fetched here: among the arguments of Ray Data, Ray resolves no references.
    encoders : Encoders
    desk : actor handle of Desk
    """

    def __init__(self, job: Any, encoders: Encoders, desk: Any) -> None:
        context = ray.get_runtime_context()
        ray.get(desk.join.remote(context.get_actor_id(), context.get_node_id(), context.current_actor))
        told: Job = ray.get(job)
        self._desk, self._output = desk, told.output
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="vaefeat-write")
        try:
            self._encoder = PartEncoder(
                OnnxEncoder(told.bundle, device="cuda" if encoders.gpus else "cpu", threads=1),
                source=told.source,
                headers=told.headers,
                output=told.name,
                metadata=told.output.metadata,
                threads=encoders.cpus,
            )
            self._encoder.warm_up()
        except VaefeatError as error:
            ray.get(desk.fail.remote(error))
            raise
        ray.get(desk.open.remote())

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Embed the parts of a batch's shares, and write them; what is returned are the shares' numbers."""
        for packed in batch["share"]:
            share: tuple[Part, ...] = pickle.loads(packed)  # noqa: S301 - our own job's, which Ray has pickled as a whole
            self._do(share, undone=set(ray.get(self._desk.undone.remote([part.index for part in share]))))
        return {"index": np.arange(len(batch["share"]))}

    def _do(self, share: Sequence[Part], *, undone: set[int]) -> None:
        """Embed the parts of a share, each while the one before is written: that is waiting for a disk."""
        before: Future[None] | None = None
        parts = [part for part in share if part.index in undone]
        with contextlib.closing(self._encoder.encode(parts)) as encoded_parts:
            for part in parts:
                with self._failures_told(part, before):
                    encoded = next(encoded_parts)
                if before is not None:
                    before.result()
                before = self._writer.submit(self._write, part, encoded)
        if before is not None:
            before.result()

    def _write(self, part: Part, encoded: Encoded) -> None:
        with self._failures_told(part):
            receipt = self._output.write(part.index, encoded)
        ray.get(self._desk.tell.remote(receipt))

    @contextlib.contextmanager
    def _failures_told(self, part: Part, before: Future[None] | None = None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if before is not None:
                wait([before])  # what is being written is worth keeping, and the job ends when it hears of this
            unforeseen = f"part {part.index} of {part.names[0]}: {type(error).__name__}: {error}"
            ray.get(self._desk.fail.remote(error if isinstance(error, VaefeatError) else JobError(unforeseen)))
            raise


def find_room(*, encoders: int | None, gpus: float | None, device: str) -> Encoders:
    """Share out what Ray has.

    Parameters
    ----------
    encoders : int, optional
        As many as there is room for when None.
    gpus : float, optional
        Share of a GPU for each; a whole one when None, where there are GPUs.
    device : {"auto", "cpu", "cuda"}

    Returns
    -------
    Encoders

    Raises
    ------
    DeviceError
        CUDA was asked for and Ray finds no GPU.
    ConfigError
        More encoders than there is room for.
    """
    resources = ray.cluster_resources()
    n_cpus, n_gpus = int(resources.get("CPU", 0)), resources.get("GPU", 0.0)
    if device == "cuda" and not n_gpus:
        raise DeviceError("got device=cuda, and Ray finds no GPU; take --device cpu")
    share = (gpus or 1.0) if n_gpus and device != "cpu" else 0.0
    room = min(int(n_gpus / share), n_cpus) if share else n_cpus
    count = encoders or room
    if not 0 < count <= room:
        kind = f"{share:g} GPUs and a processor" if share else "a processor"
        raise ConfigError(
            f"got {count} encoders, each with {kind}, and Ray has {n_cpus} processors and {n_gpus:g} GPUs; take at "
            f"most {room}"
        )
    return Encoders(count, n_cpus // count if share else 1, share)


def embed_parts(
    parts: Sequence[Part],
    job: Job,
    encoders: Encoders,
    *,
    stop: StopRequest,
    told: Callable[[Receipt], None],
) -> float:
    """Embed and write parts, in any order, until all are done.

    Parameters
    ----------
    parts : sequence of Part
    job : Job
    encoders : Encoders
    stop : StopRequest
        Asked all the while; what is done by then is done.
    told : callable
        Called with every receipt.

    Returns
    -------
    float
        Seconds from the first encoder that could begin to the last part that was written.

    Raises
    ------
    VaefeatError
        What an encoder met that another would meet, too.
    JobError
        All encoders were lost.
    KeyboardInterrupt
        A stop was asked for.
    """
    _keep_quiet()
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    desk = ray.remote(num_cpus=0)(Desk).options(scheduling_strategy=here).remote()
    left = {part.index: part for part in parts}
    seconds = 0.0
    # The whole job once for all actors of a machine, rather than in each actor's own arguments.
    everything = ray.put(job)
    while left:
        before = len(left)
        run = _Round(list(left.values()), everything, encoders, desk)
        # Ray Data takes its time to close, and nobody needs to wait for that.
        while left and not run.over_within(_TICK_S):
            seconds = _take(desk, run, left, told)
            if stop:
                raise KeyboardInterrupt
        seconds = _take(desk, run, left, told)
        if len(left) == before:
            raise JobError(
                f"{len(left)} parts are left, and the encoders failed at all of them: {run.error}; the same command "
                "goes on from what is finished"
            )
    return seconds


def _take(desk: Any, run: _Round, left: dict[int, Part], told: Callable[[Receipt], None]) -> float:
    news: _News = ray.get(desk.take.remote())
    for receipt in news.receipts:
        if left.pop(receipt.index, None) is not None:  # one that was given up may have been at its end
            told(receipt)
    if news.failure is not None:
        raise news.failure
    run.look_after(news.encoders)
    return news.seconds


class _Round:
    """Ray Data at work on parts, in a thread of its own: this one watches.

    What is lost with a machine is left out by Ray Data, and is for the next round.
    """

    def __init__(self, parts: Sequence[Part], job: Any, encoders: Encoders, desk: Any) -> None:
        count = min(encoders.count, len(parts))
        pool = ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=_SHARES_IN_FLIGHT)
        rows = [{"share": pickle.dumps(share)} for share in shares(parts, count)]
        self._data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            EncodingActor,
            batch_size=1,
            compute=pool,
            num_cpus=encoders.cpus,
            num_gpus=encoders.gpus or None,
            fn_constructor_kwargs={"job": job, "encoders": encoders, "desk": desk},
        )
        self.error = "they were lost"
        self._missing: dict[str, float] = {}
        self._given_up: set[str] = set()
        self._looked = self._somebody = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def over_within(self, seconds: float) -> bool:
        """Wait for the end for a while."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            for _ in self._data.iter_batches(batch_size=None):
                pass
        except Exception as error:  # told by the main thread if it keeps anything from being done
            self.error = last_line(str(error))

    def look_after(self, encoders: dict[str, tuple[str, Any]]) -> None:
        """Give up encoders whose machine is gone for good: Ray would wait for them to come back without an end."""
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for actor, (node, handle) in encoders.items():
            if node in alive:
                self._missing.pop(actor, None)
                self._somebody = now
            elif actor not in self._given_up and now - self._missing.setdefault(actor, now) > _GRACE_S:
                self._given_up.add(actor)
                ray.kill(handle, no_restart=True)
        if now - self._somebody > _NOBODY_S:
            raise JobError(
                f"no encoder has been there for {_NOBODY_S:.0f} s: their machines are gone, or Ray found no room; the "
                "same command goes on from what is finished"
            )


def _keep_quiet() -> None:
    """Let Ray Data print nothing, and leave blocks that were lost to the next round."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1
    # Shares of a slow encoder may take hours; what is lost is noticed here.
    context.execution_no_progress_timeout_s = -1
    # Looking for it takes a process that is at work some percents of its time.
    context.memory_usage_poll_interval_s = None
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
