"""Another application in a process that ends with the one that started it: ``python -m pipelines.leash MODULE ARG...``.

A job that is killed cannot stop what it started, but its end of a pipe closes.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


def _wait_for_the_end() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)  # not raised here: it is the main thread that has to wake up


if __name__ == "__main__":
    del sys.argv[0]
    threading.Thread(target=_wait_for_the_end, daemon=True).start()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
