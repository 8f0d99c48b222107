"""The calls of :mod:`serving.protocols.oip_grpc` as methods of a deployment, for Ray Serve's gRPC proxy.

Serve takes gRPC's place between a client and the servicers: a method gets the message, and a record of the call in
place of its context, for both may come from another process. The status is what the record holds in the end. The
client's deadline is not in it, because gRPC keeps that to itself: when it passes, Serve cancels the method. A timeout
that rows should be given up after belongs into the request's parameter of that name.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc

import serving.protocols.oip_messages as messages
from serving.protocols.oip_grpc import HealthServicer, InferenceServicer

__all__ = ["GrpcCalls", "RecordedContext"]

#: A stream counts as a request in flight, and a replica that is to go waits for those.
_MAX_WATCH_S = 20.0


class _RefusedError(Exception):
    """The status has been set, and there is nothing to answer."""


class RecordedContext:
    """What the servicers use of gRPC's context, over Serve's record of the call.

    Parameters
    ----------
    record : ray.serve.grpc_util.RayServegRPCContext
    """

    def __init__(self, record: Any) -> None:
        self._record = record

    def invocation_metadata(self) -> list[tuple[str, str]]:
        """Give what the client sent along."""
        metadata: list[tuple[str, str]] = self._record.invocation_metadata()
        return metadata

    def time_remaining(self) -> None:
        """Give no deadline; see the module."""

    async def abort(self, code: grpc.StatusCode, details: str = "", trailers: Iterable[tuple[str, str]] = ()) -> None:
        """End the call with a status."""
        self._record.set_code(code)
        self._record.set_details(details)
        self._record.set_trailing_metadata(list(trailers))
        raise _RefusedError


def _unary(name: str, answer: str) -> Any:
    async def call(self: GrpcCalls, request: Any, grpc_context: Any) -> Any:
        try:
            return await getattr(self.servicers[name], name)(request, RecordedContext(grpc_context))
        except _RefusedError:
            # Raised further, it would lose its trailers, and Serve would log a traceback for whatever a client can
            # send. No message reaches a client beside a status that is not OK.
            return getattr(messages, answer)()

    call.__name__ = name
    call.__doc__ = f"Answer {name}; Serve finds the method by the call's name."
    return call


class GrpcCalls:
    """The methods, to be inherited by a deployment.

    Attributes
    ----------
    servicers : dict of str to object
        By call; :meth:`take_servicers` sets it before Serve sends the first.
    """

    servicers: dict[str, Any]

    def take_servicers(self, inference: InferenceServicer, health: HealthServicer) -> None:
        """Answer calls with these from now on."""
        self.servicers = dict.fromkeys(
            ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer"), inference
        )
        self.servicers |= {"Check": health, "Watch": health}

    ServerLive = _unary("ServerLive", "ServerLiveResponse")
    ServerReady = _unary("ServerReady", "ServerReadyResponse")
    ModelReady = _unary("ModelReady", "ModelReadyResponse")
    ServerMetadata = _unary("ServerMetadata", "ServerMetadataResponse")
    ModelMetadata = _unary("ModelMetadata", "ModelMetadataResponse")
    ModelInfer = _unary("ModelInfer", "ModelInferResponse")
    Check = _unary("Check", "HealthCheckResponse")

    async def Watch(self, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
        """Tell how the service is, and whenever that changes, for a while; clients ask again when it ends."""
        until = time.monotonic() + _MAX_WATCH_S
        async for answer in self.servicers["Watch"].Watch(request, RecordedContext(grpc_context)):
            yield answer
            if time.monotonic() > until:
                return
