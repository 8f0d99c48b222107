"""What signals ask of a service, as events that its engine looks at."""

from __future__ import annotations

import threading

__all__ = ["Asked"]


class Asked:
    """Set by signal handlers, which must be in place within milliseconds: so this imports next to nothing.

    Attributes
    ----------
    stop : Event
        To answer what is in flight, and end.
    reload : Event
        To load every model's folder again; the engine clears it.
    """

    def __init__(self) -> None:
        self.stop, self.reload = threading.Event(), threading.Event()
