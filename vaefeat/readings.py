"""Figures on their way from the device: a GPU is never waited for while an epoch runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vaefeat.errors import NonFiniteLossError

__all__ = ["Readings", "refuse_non_finite"]

_TERMS = ("objective", "log-likelihood", "KL divergence", "gradient")


class _Reading(NamedTuple):
    first_step: int
    figures: Tensor
    arrival: torch.cuda.Event | None


class Readings:
    """Figures of steps, in order, that are handed out once they have reached the processor."""

    def __init__(self) -> None:
        self._pending: deque[_Reading] = deque()

    def send(self, first_step: int, figures: Tensor) -> None:
        """Start the copy of figures (steps, ...) of the steps from `first_step` on."""
        if figures.device.type != "cuda":
            self._pending.append(_Reading(first_step, figures, None))
            return
        host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
        host.copy_(figures, non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record()
        self._pending.append(_Reading(first_step, host, arrival))

    def arrived(self, *, wait: bool = False) -> Iterator[tuple[int, Tensor]]:
        """Hand out (first step, figures) of what is there; with `wait`, of everything that was sent."""
        while self._pending:
            reading = self._pending[0]
            if reading.arrival is not None:
                if wait:
                    reading.arrival.synchronize()
                elif not reading.arrival.query():
                    return
            self._pending.popleft()
            yield reading.first_step, reading.figures


def refuse_non_finite(
    terms: Tensor, *, epoch: int, first: int, steps_per_epoch: int, learning_rate: float, kept: str
) -> None:
    """Refuse steps' objectives, log-likelihoods, KL divergences and gradients (steps, 4) that are no numbers.

    Raises
    ------
    NonFiniteLossError
        Names the first of them, and says what is `kept`.
    """
    finite = torch.isfinite(terms)
    if finite.all():
        return
    step, term = (int(index) for index in torch.nonzero(~finite)[0])
    # The objective holds the other two.
    term = next((i for i in (1, 2) if not finite[step, i]), term)
    raise NonFiniteLossError(
        f"the {_TERMS[term]} became {terms[step, term].item()} in epoch {epoch}, batch {first + step + 1} of "
        f"{steps_per_epoch}{kept}. Lower learning_rate (now {learning_rate:g}) or gradient_clip, and look for extreme "
        "values in the rows"
    )
