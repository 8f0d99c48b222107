"""What Ray Serve's proxy process loads of ours, named to it by an environment variable."""

from __future__ import annotations

import os

from starlette.middleware import Middleware

from serving.edge import Edge
from serving.settings import Limits

__all__ = ["LIMITS_VARIABLE", "middlewares"]

LIMITS_VARIABLE = "VAEFEAT_SERVING_LIMITS"


def middlewares() -> list[Middleware]:
    """Put the edge around Serve's proxy; Ray calls this without arguments, in the proxy."""
    return [Middleware(Edge, limits=Limits.from_json(os.environ[LIMITS_VARIABLE]))]
