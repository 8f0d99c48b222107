"""The one line on stdout that scripts wait for."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TextIO

__all__ = ["announce"]


def announce(
    url: str, *, engine: str, models: Iterable[str], providers: Iterable[str], stream: TextIO | None = None
) -> None:
    """Print that the service answers requests now.

    ::

        ready http://127.0.0.1:8000 engine=ray models=digits provider=CPUExecutionProvider

    Parameters
    ----------
    url : str
        Where it answers.
    engine : {"ray", "local"}
    models : iterable of str
    providers : iterable of str
        ONNX Runtime's execution provider of each model; named once where they agree.
    stream : text file, optional
        Standard output when None.
    """
    line = f"ready {url} engine={engine} models={','.join(models)} provider={','.join(dict.fromkeys(providers))}"
    print(line, file=stream or sys.stdout, flush=True)  # this line is what stdout is for
