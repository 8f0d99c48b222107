"""Where the service listens, settled before anything expensive is started."""

from __future__ import annotations

import ipaddress
import os
import socket

from serving.errors import SetupError

__all__ = ["base_url", "claim", "require_loopback"]


def require_loopback(host: str) -> None:
    """Refuse a host that other machines can reach.

    Raises
    ------
    SetupError
        The host cannot be resolved, or one of its addresses is not a loopback address.
    """
    addresses = [str(entry[4][0]) for entry in _resolve(host, 0)]
    public = [address for address in addresses if not ipaddress.ip_address(address.partition("%")[0]).is_loopback]
    if public:
        raise SetupError(
            f"got --host {host}, which other machines can reach ({', '.join(public)}), wanted a loopback address such "
            "as 127.0.0.1: nobody is asked for a key. Pass --keys FILE (see python -m serving.keys) or --insecure"
        )


def claim(host: str, port: int) -> socket.socket:
    """Bind a TCP socket and listen, so that nobody else takes the port while the service is starting.

    Parameters
    ----------
    host : str
        Name or address.
    port : int
        0 for any free port; :func:`base_url` tells which it became.

    Raises
    ------
    SetupError
        The host is unknown or not of this machine, or the port is taken.
    """
    family, kind, protocol, _, address = _resolve(host, port)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            # Connections of a former server that are winding down do not matter; another listener still does.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise SetupError(
            f"could not listen on {host} port {port}: {error.strerror or error}; choose another port, "
            "0 for any that is free"
        ) from error
    if port == 0:
        # Once more by its number: Linux takes a port that it chose itself back when the socket stops listening.
        with listener:
            port = listener.getsockname()[1]
        return claim(host, port)
    return listener


def base_url(listener: socket.socket) -> str:
    """URL under which this machine reaches a claimed socket."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "::1" if listener.family == socket.AF_INET6 else "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[str, int]]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise SetupError(f"got --host {host!r}, which is no address of this machine: {error}") from error
    return found  # type: ignore[return-value]  # typeshed has a union of every family's addresses
