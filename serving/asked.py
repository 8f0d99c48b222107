"""What signals ask of a service, as events that its engine looks at."""

from __future__ import annotations

import threading
from dataclasses import dataclass

__all__ = ["Asked"]


@dataclass(frozen=True)
class Asked:
    """Set by signal handlers.

    Attributes
    ----------
    stop : Event
        To answer what is in flight, and end.
    reload : Event
        To load every model's folder again; the engine clears it.
    """

    stop: threading.Event
    reload: threading.Event
