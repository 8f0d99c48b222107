"""What the workers of a job and the job itself tell each other: progress, requests to stop, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vaefeat.observers import EpochRecord, Observer, ProgressBar

__all__ = ["Desk", "Display", "Report", "Teller"]


class Report(NamedTuple):
    """What the job is told.

    Attributes
    ----------
    events : sequence of tuple
        Calls of an observer's methods: name, positional and keyword arguments.
    failure : str or None
        An error that other workers would only make again.
    interruption : str or None
        Where training was stopped on request.
    silent_s : float
        Since any worker gave a sign of life.
    """

    events: Sequence[tuple[str, tuple[Any, ...], dict[str, Any]]]
    failure: str | None
    interruption: str | None
    silent_s: float


class Desk:
    """Where messages are left; an actor of Ray, which outlives the workers."""

    def __init__(self) -> None:
        self._events: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self._failure: str | None = None
        self._interruption: str | None = None
        self._stop: int | None = None
        self._heard = time.monotonic()

    def tell(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Leave what the first worker's observers are told."""
        self._events.append((name, args, kwargs))

    def fail(self, message: str) -> None:
        """Leave an error that is no other worker's; the first one counts."""
        self._failure = self._failure or message

    def interrupt(self, message: str) -> None:
        """Leave word that training was stopped."""
        self._interruption = message

    def over(self) -> bool:
        """Whether training ended for a reason that is no lost worker."""
        return self._failure is not None or self._interruption is not None

    def ask_to_stop(self, number: int) -> None:
        """Ask all workers to stop, as a signal of this number would."""
        self._stop = number

    def listen(self) -> int | None:
        """Give a worker the signal to stop by, if there is one, and take note that it lives."""
        self._heard = time.monotonic()
        return self._stop

    def take(self) -> Report:
        """Give the job everything since it last asked."""
        events, self._events = self._events, []
        return Report(events, self._failure, self._interruption, time.monotonic() - self._heard)


class Teller(Observer):
    """Tells the job what happens; lives in the first worker.

    Parameters
    ----------
    tell : callable
        Passes :meth:`Desk.tell` its arguments.
    n_workers : int
    """

    def __init__(self, tell: Callable[[str, tuple[Any, ...], dict[str, Any]], object], *, n_workers: int) -> None:
        self._tell, self._n_workers = tell, n_workers

    def on_start(self, *, epochs: int, steps_per_epoch: int, epoch: int) -> None:
        """Tell the size of the run and where it goes on."""
        counts = {"epochs": epochs, "steps_per_epoch": steps_per_epoch, "epoch": epoch, "n_workers": self._n_workers}
        self._tell("on_start", (), counts)

    def on_steps(
        self, *, epoch: int, step: int, elbo: float, log_likelihood: float, kl: float, rows_per_s: float
    ) -> None:
        """Tell the latest means."""
        means = {"elbo": elbo, "log_likelihood": log_likelihood, "kl": kl, "rows_per_s": rows_per_s}
        self._tell("on_steps", (), {"epoch": epoch, "step": step, **means})

    def on_note(self, text: str) -> None:
        """Tell it in words."""
        self._tell("on_note", (text,), {})

    def on_epoch(self, record: EpochRecord) -> None:
        """Tell an epoch's figures."""
        self._tell("on_epoch", (record,), {})

    def on_end(self) -> None:
        """Tell that training is over."""
        self._tell("on_end", (), {})


class Display:
    """Shows what a :class:`Teller` tells: a bar for each group of workers."""

    def __init__(self) -> None:
        self._bar: ProgressBar | None = None

    def show(self, report: Report) -> None:
        """Show the latest."""
        for name, args, kwargs in report.events:
            if name == "on_start":
                self._begin(**kwargs)
            elif self._bar is not None:
                getattr(self._bar, name)(*args, **kwargs)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.on_end()

    def _begin(self, *, n_workers: int, epoch: int, **counts: int) -> None:
        again = self._bar is not None
        self.close()
        self._bar = ProgressBar()
        if again:
            self._bar.on_note(
                f"workers were lost or came: going on with {n_workers} from the checkpoint, in epoch {epoch + 1}"
            )
        self._bar.on_start(epoch=epoch, **counts)
