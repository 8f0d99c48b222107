"""``python -m serving BUNDLE...``."""

from __future__ import annotations

import signal
import sys

from serving.asked import Asked
from vaefeat.errors import MissingExtraError, requiring


def main() -> None:
    """Run the command line; SIGINT and SIGTERM ask it to stop, from the first moment on, SIGHUP to load again."""
    asked = Asked()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.stop.set())
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda *_: asked.reload.set())
    # Only now: these imports take a while, and a signal during them would end in a traceback.
    try:
        with requiring("serve", what="The service"):
            from serving.command_line import app
    except MissingExtraError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None

    app(obj=asked)


if __name__ == "__main__":
    main()
