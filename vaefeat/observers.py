"""What can be watched in a training run, and two that watch: a progress bar and TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vaefeat.errors import requiring

if TYPE_CHECKING:
    from vaefeat.bundle import Bundle

__all__ = ["EpochRecord", "EventLog", "Observer", "ProgressBar", "TaskObserver", "shown_activity"]


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """Figures of one epoch, in nats per row.

    Attributes
    ----------
    epoch : int
        Counted from 1.
    train_elbo, train_log_likelihood, train_kl : float
        Means over the minibatches while the weights changed.
    heldout_elbo, heldout_log_likelihood, heldout_kl : float
        After the epoch, on the rows that are never trained on.
    heldout_objective : float
        With the KL term at its final weight: what chooses the best weights.
    active_units : int
        Latents whose mean varies over the held-out rows.
    kl_weight, learning_rate : float
        At the last step.
    rows_per_s, seconds : float
        Of training alone; of everything.
    """

    epoch: int
    train_elbo: float
    train_log_likelihood: float
    train_kl: float
    heldout_elbo: float
    heldout_log_likelihood: float
    heldout_kl: float
    heldout_objective: float
    active_units: int
    kl_weight: float
    learning_rate: float
    rows_per_s: float
    seconds: float


class Observer:
    """Told what happens in a training run; every method does nothing until overridden."""

    def on_start(self, *, epochs: int, steps_per_epoch: int, epoch: int) -> None:
        """Take note that training starts, or continues after `epoch` epochs."""

    def on_model(self, export: Callable[[], Bundle]) -> None:
        """Take note of what makes a bundle of the model as it stands after an epoch, in a second or so.

        The bundle is the one that training would leave if it ended there.
        """

    def on_epoch_start(self, *, epoch: int) -> None:
        """Take note that an epoch begins, or goes on where it was stopped; `epoch` is counted from 1."""

    def on_steps(
        self, *, epoch: int, step: int, elbo: float, log_likelihood: float, kl: float, rows_per_s: float
    ) -> None:
        """Take note of the means over the latest steps, in nats per row; `step` is counted within the epoch."""

    def on_note(self, text: str) -> None:
        """Take note of something in words, such as how steps are computed, and why."""

    def on_epoch(self, record: EpochRecord) -> bool | None:
        """Take note that an epoch is over; True ends the training of a model after it."""
        return None

    def on_end(self) -> None:
        """Take note that training is over, for whatever reason."""


class TaskObserver:
    """Told what happens in the training of a classifier; every method does nothing until overridden."""

    def on_start(self, *, n_tasks: int) -> None:
        """Take note that training starts, of so many parts at most."""

    def on_task_start(self) -> None:
        """Take note that a part begins."""

    def on_task(self, now: Callable[[], Any], *, n_done: int) -> bool | None:
        """Take note that a part is over; True ends the training.

        Parameters
        ----------
        now : callable
            Gives what training would leave if it ended here.
        n_done : int
            Epochs or steps up to here.
        """
        return None


class ProgressBar(Observer):
    """A bar on standard error: ELBO, reconstruction, KL, active units, rows per second, time left."""

    def __init__(self) -> None:
        # Short enough for a terminal of 80 columns.
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=8),
            TextColumn("{task.fields[figures]}", style="cyan"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
        )
        self._epochs = self._steps_per_epoch = self._active = 0

    def on_start(self, *, epochs: int, steps_per_epoch: int, epoch: int) -> None:
        """Show the bar."""
        self._epochs, self._steps_per_epoch = epochs, steps_per_epoch
        self._task = self._progress.add_task(
            "epoch", total=epochs * steps_per_epoch, completed=epoch * steps_per_epoch, figures=""
        )
        self._progress.start()

    def on_steps(
        self, *, epoch: int, step: int, elbo: float, log_likelihood: float, kl: float, rows_per_s: float
    ) -> None:
        """Move the bar."""
        figures = f"ELBO {elbo:.2f} rec {log_likelihood:.2f} KL {kl:.2f} " + f"active {self._active} " * (
            self._active > 0
        )
        self.show(epoch=epoch, step=step, figures=figures + f"{rows_per_s / 1000:.1f}k rows/s")

    def show(self, *, epoch: int, step: int, figures: str) -> None:
        """Move the bar to a step of an epoch, with other figures than those of an encoder's training."""
        self._progress.update(
            self._task,
            completed=(epoch - 1) * self._steps_per_epoch + step,
            description=f"epoch {epoch}/{self._epochs}",
            figures=figures,
        )

    def on_note(self, text: str) -> None:
        """Print it above the bar."""
        self._progress.console.print(text, style="dim", highlight=False)

    def on_epoch(self, record: EpochRecord) -> None:
        """Take over the number of active units."""
        self._active = record.active_units

    def on_end(self) -> None:
        """Leave the bar as it stands."""
        self._progress.stop()


class EventLog(Observer):
    """TensorBoard event files, a point per epoch.

    Parameters
    ----------
    folder : Path
        Where the files go: ``tensorboard --logdir`` takes it.
    """

    def __init__(self, folder: Path) -> None:
        with requiring("train", what="TensorBoard's event files"):
            from torch.utils.tensorboard import SummaryWriter
        self._folder = folder
        self._open: Any = SummaryWriter
        self._writer: Any = None

    def on_start(self, *, epochs: int, steps_per_epoch: int, epoch: int) -> None:
        """Open a file; a run from the start replaces the points of one before it."""
        if epoch == 0 and self._folder.is_dir():
            for old in self._folder.glob("events.out.tfevents.*"):
                old.unlink()
        self._writer = self._open(str(self._folder), purge_step=epoch + 1 if epoch else None)

    def on_epoch(self, record: EpochRecord) -> None:
        """Write the epoch's figures."""
        for name, value in asdict(record).items():
            if name != "epoch":
                group = name.partition("_")[0] if name.startswith(("train_", "heldout_")) else "run"
                self._writer.add_scalar(f"{group}/{name.removeprefix(group + '_')}", value, record.epoch)

    def on_end(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()


@contextmanager
def shown_activity(text: str, *, shown: bool = True) -> Iterator[None]:
    """Show on standard error that something goes on whose length nobody knows; nothing where that is no terminal."""
    console = Console(stderr=True)
    with console.status(text) if shown and console.is_terminal else nullcontext():
        yield
