"""The waiting: drivers that perform the steps of :mod:`vaefeat.remote_exchange` over HTTP, with threads or asyncio."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from typing import Any

import httpx

from vaefeat.errors import InputError
from vaefeat.remote_exchange import Ask, Failed, Pause, Reply, Steps, T, Terms

__all__ = ["AsyncLine", "Line"]

#: Longer than servers keep idle connections: a closed one is noticed before or repeated after, and costs a handshake.
_IDLE_S = 60.0


class Line:
    """Connections to one server, for threads.

    Parameters
    ----------
    terms : Terms
    api_key : str, optional

    Raises
    ------
    InputError
        A key that no header can hold.
    """

    def __init__(self, terms: Terms, *, api_key: str | None) -> None:
        self._terms, self._headers = terms, _authorization(api_key)
        self._closed = False
        self._open()

    def _open(self) -> None:
        self._pid = os.getpid()
        self._sockets = _Sockets()
        self._client = httpx.Client(**_client_arguments(self._terms, self._headers))
        # Inside a scikit-learn pipeline there is nobody who could call close. At exit the system does it.
        self._finalizer = weakref.finalize(self, self._client.close)
        self._finalizer.atexit = False

    def run(self, steps: Steps[T], *, stop: threading.Event | None = None) -> T:
        """Perform steps in this thread.

        Raises
        ------
        InputError
            The line was closed.
        concurrent.futures.CancelledError
            `stop` was set: nothing more is sent.
        """
        stop = stop or threading.Event()
        reply: Reply | None = None
        while True:
            if stop.is_set():
                steps.close()
                raise CancelledError
            try:
                step = steps.send(reply)
            except StopIteration as end:
                result: T = end.value
                return result
            if isinstance(step, Pause):
                stop.wait(step.seconds)
                reply = None
            else:
                reply = self._exchange(step, stop)

    def run_all(self, many: Sequence[Steps[None]]) -> None:
        """Perform several series of steps side by side; the first error of any stops them all."""
        if len(many) == 1:
            return self.run(many[0])
        stop = threading.Event()
        with ThreadPoolExecutor(len(many), thread_name_prefix="vaefeat-remote") as pool:
            try:
                for ended in as_completed([pool.submit(self.run, steps, stop=stop) for steps in many]):
                    ended.result()
            except BaseException as error:
                stop.set()
                if not isinstance(error, Exception):  # Ctrl-C is not going to wait for answers
                    self._sockets.break_all()
                raise

    def _exchange(self, ask: Ask, stop: threading.Event) -> Reply:
        client, sockets = self._live_client(), self._sockets
        reused = True

        def watch(event: str, told: dict[str, Any]) -> None:
            nonlocal reused
            if _tells_of_a_connection(event):
                reused = False
                sockets.add(told["return_value"].get_extra_info("socket"))
                if stop.is_set() or self._closed:
                    sockets.break_all()

        try:
            return _let_go(client.request(**_request_arguments(ask), extensions={"trace": watch}))
        except httpx.RequestError as error:
            return Failed(error, reused)

    def _live_client(self) -> httpx.Client:
        if self._closed:
            raise InputError("this RemoteEncoder was closed; make a new one")
        if self._pid != os.getpid():
            # After a fork, two processes would read each other's answers from one connection. The old connections are
            # left alone: a thread that is not in this process may hold their locks.
            self._finalizer.detach()
            self._open()
        return self._client

    def authenticate(self, api_key: str | None) -> None:
        """Send this key from now on."""
        self._headers = _authorization(api_key)
        self._client.headers.pop("authorization", None)
        self._client.headers.update(self._headers)

    def close(self) -> None:
        """Close the connections, under whoever may be waiting for an answer."""
        self._closed = True
        self._sockets.break_all()
        self._client.close()


class AsyncLine:
    """Connections to one server, for one event loop; see :class:`Line`."""

    def __init__(self, terms: Terms, *, api_key: str | None) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client = httpx.AsyncClient(**_client_arguments(terms, _authorization(api_key)))

    async def run(self, steps: Steps[T]) -> T:
        """Perform steps; cancelling this closes the connection in use."""
        reply: Reply | None = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as end:
                result: T = end.value
                return result
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
                reply = None
            else:
                reply = await self._exchange(step)

    async def run_all(self, many: Sequence[Steps[None]]) -> None:
        """Perform several series of steps side by side; the first error of any cancels them all."""
        tasks = [asyncio.ensure_future(self.run(steps)) for steps in many]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _exchange(self, ask: Ask) -> Reply:
        if self._client.is_closed:
            raise InputError("this AsyncRemoteEncoder was closed; connect a new one")
        loop = asyncio.get_running_loop()
        self._loop = self._loop or loop
        if self._loop is not loop:
            raise InputError("this AsyncRemoteEncoder was connected in another event loop; connect one in each")
        reused = True

        async def watch(event: str, told: dict[str, Any]) -> None:
            nonlocal reused
            reused = reused and not _tells_of_a_connection(event)

        try:
            return _let_go(await self._client.request(**_request_arguments(ask), extensions={"trace": watch}))
        except httpx.RequestError as error:
            return Failed(error, reused)

    def authenticate(self, api_key: str | None) -> None:
        """Send this key from now on."""
        self._client.headers.pop("authorization", None)
        self._client.headers.update(_authorization(api_key))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


class _Sockets:
    """Open sockets, so that a thread that waits in one can be woken: closing alone does not on Linux."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def add(self, one: socket.socket) -> None:
        with self._lock:
            self._all.add(one)

    def break_all(self) -> None:
        with self._lock:
            for one in list(self._all):
                try:
                    # Not ssl.SSLSocket's own method, which takes away what the waiting thread is using.
                    socket.socket.shutdown(one, socket.SHUT_RDWR)
                except OSError:
                    pass  # closed already


def _tells_of_a_connection(event: str) -> bool:
    # TLS wraps the socket in a new one, which is told separately.
    return event.endswith(("connect_tcp.complete", "start_tls.complete"))


def _client_arguments(terms: Terms, headers: dict[str, str]) -> dict[str, Any]:
    return {
        "base_url": terms.url,
        "headers": headers,
        # Waiting for one of our own connections is not the server's fault.
        "timeout": httpx.Timeout(terms.timeout_s, pool=None),
        "limits": httpx.Limits(max_connections=100, max_keepalive_connections=100, keepalive_expiry=_IDLE_S),
        # A proxy that the environment names stands between this machine and others, never before the machine itself.
        "trust_env": not _is_loopback(terms.url),
    }


def _request_arguments(ask: Ask) -> dict[str, Any]:
    return {
        "method": ask.method,
        "url": ask.path,
        "params": ask.params,
        "headers": ask.headers,
        "content": ask.content,
    }


def _let_go(answer: httpx.Response) -> httpx.Response:
    """Break the circle of a response and its stream, in which dozens of bodies would wait for the garbage collector."""
    answer.stream = httpx.ByteStream(b"")
    return answer


def _authorization(api_key: str | None) -> dict[str, str]:
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
        # httpx would say so, too, and quote the key.
        raise InputError(
            "got an api_key with characters that a header cannot hold, wanted printable ASCII without blanks; "
            "is there a line break at its end?"
        )
    return {"authorization": f"Bearer {api_key}"}


def _is_loopback(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
