"""What the batcher moves: a job is the rows of one request, a batch what a lane computes at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from serving.errors import RequestError

if TYPE_CHECKING:
    from serving.watching.spans import Tracer

__all__ = ["Batch", "Computes", "Features", "Job", "collect", "not_finite"]

#: By output; labels are places among the classes.
Features = dict[str, NDArray[Any]]


class Computes(Protocol):
    """What a job is computed by: a model of one version."""

    name: str

    def compute(self, rows: NDArray[Any], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Encode checked rows, in a lane's thread."""

    def observe(self, outputs: Sequence[str], features: Sequence[NDArray[Any]]) -> None:
        """Take note of features that go out, in a lane's thread."""


class Job:
    """The rows of one request on their way.

    Parameters
    ----------
    model : Computes
    rows : ndarray of shape (n, ...)
        As the model takes them, n > 0.
    outputs : tuple of str
    bulk : bool
        Whether it gives way to others.
    deadline : float
        On :func:`time.perf_counter`'s clock; rows that wait longer are not computed.
    future : Future
        Its result is a dict of features by output.

    Attributes
    ----------
    queued, cut, done : float
        On the same clock: when it came, when its first rows were cut, when its last vector was there.
    device_s : float
        Seconds that the batches it took part in were computed for, at most; they may overlap.
    """

    __slots__ = (
        "bulk",
        "cut",
        "deadline",
        "device_s",
        "done",
        "future",
        "model",
        "outputs",
        "parts",
        "pending",
        "queued",
        "rows",
        "span",
        "taken",
    )

    def __init__(
        self,
        model: Computes,
        rows: NDArray[Any],
        outputs: tuple[str, ...],
        *,
        bulk: bool,
        deadline: float,
        queued: float,
        future: asyncio.Future[Features],
        span: Any = None,
    ) -> None:
        self.model, self.rows, self.outputs, self.bulk, self.deadline = model, rows, outputs, bulk, deadline
        self.future, self.queued, self.span = future, queued, span
        self.taken = 0
        self.pending = len(rows)
        self.parts: Features = {}
        self.cut = self.done = queued
        self.device_s = 0.0


class Batch:
    """Rows of one model that are computed together.

    Attributes
    ----------
    members : list of (Job, int, int)
        Whose rows these are, from where to where.
    device_s : float
        Seconds of computing.
    """

    __slots__ = ("began", "device_s", "error", "features", "members", "model", "n_rows", "outputs", "unusable")

    def __init__(self, model: Computes) -> None:
        self.model = model
        self.members: list[tuple[Job, int, int]] = []
        self.n_rows = 0
        self.outputs: tuple[str, ...] = ()
        self.features: list[NDArray[Any]] = []
        self.error: Exception | None = None
        #: Which rows have features that are not finite, of the outputs where any has.
        self.unusable: dict[str, NDArray[np.bool_]] = {}
        self.began = self.device_s = 0.0

    def add(self, job: Job, n_rows: int) -> None:
        """Take the next rows of a job."""
        self.members.append((job, job.taken, job.taken + n_rows))
        job.taken += n_rows
        self.n_rows += n_rows
        if job.outputs != self.outputs:
            self.outputs = job.outputs if not self.outputs else tuple(dict.fromkeys(self.outputs + job.outputs))

    def unusable_row(self, outputs: Sequence[str], there: slice) -> int | None:
        """Give the first row of a part that has no usable features in these outputs; None where all have.

        Others may have asked for more outputs of the same rows, which is no reason to fail.
        """
        found = [np.flatnonzero(bad[there]) for output, bad in self.unusable.items() if output in outputs]
        return min((int(rows[0]) for rows in found if len(rows)), default=None)

    def compute(self, tracer: Tracer | None = None) -> None:
        """Compute, in a lane's thread; whatever goes wrong is kept."""
        spans = [] if tracer is None else [job.span for job, _, _ in self.members if job.span is not None]
        if tracer is None or not spans:
            self._compute()
            return
        with tracer.batch(spans, model=self.model.name, rows=self.n_rows):
            self._compute()

    def _compute(self) -> None:
        self.began = time.perf_counter()
        try:
            parts = [job.rows[start:stop] for job, start, stop in self.members]
            rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
            self.features = self.model.compute(rows, self.outputs)
            for output, features in zip(self.outputs, self.features, strict=True):
                # A sum is finite only if no term is NaN or infinite: one pass for the usual case.
                if not np.isfinite(features.sum(dtype=np.float64)):
                    self.unusable[output] = np.logical_not(np.isfinite(features).all(axis=1))
            if not self.unusable:
                self.model.observe(self.outputs, self.features)
        except Exception as error:  # to be told to the requests, by the event loop
            self.error = error
        self.device_s = time.perf_counter() - self.began


def collect(job: Job, features: Mapping[str, NDArray[Any]], start: int, stop: int, there: slice) -> None:
    """Put vectors of a batch where they belong in a job."""
    job.pending -= stop - start
    n_rows = len(job.rows)
    if stop - start == n_rows:
        # The whole job: a view, which keeps the batch's array alive no longer than the answer.
        job.parts = {output: features[output][there] for output in job.outputs}
        return
    for output in job.outputs:
        computed = features[output]
        if output not in job.parts:
            job.parts[output] = np.empty((n_rows, *computed.shape[1:]), computed.dtype)
        job.parts[output][start:stop] = computed[there]


def not_finite(row: int) -> RequestError:
    """Say that a row's features are no numbers."""
    return RequestError(
        500,
        "non_finite_output",
        f"got NaN or infinity computed for row {row}, wanted numbers; leave such rows out, or check the bundle",
    )
