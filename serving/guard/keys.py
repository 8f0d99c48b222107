"""API keys: a file of hashes, and who a request comes from.

The file is TOML, one table for each key, named by the key's id::

    [keys.ci]
    sha256 = "5e88..."                  # of the key; the key itself is nowhere
    scopes = ["embed"]                  # of "embed", "admin", "metrics"
    rows_per_s = 5000                   # optional, as are the next two
    bytes_per_s = 1e7
    expires = 2030-01-01T00:00:00Z

``python -m serving.keys new`` makes a key and its table; a key is revoked by deleting its table. The file is read again
when it changes, and a broken one leaves the keys of the last good one in force.

A key is 256 random bits, so one round of SHA-256 is enough: there is nothing to guess that a slow hash would protect.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import logging
import os
import re
import stat
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.errors import RequestError, SetupError

__all__ = ["SCOPES", "Key", "KeyRing", "presented", "require_scope"]

#: What a key can be allowed: to embed and list models, to load and unload models, to read ``/metrics``.
SCOPES = ("embed", "admin", "metrics")

_log = logging.getLogger("serving.guard")
#: Shorter than a key, so that no key can stand where an id is wanted: ids are logged.
_ID = re.compile(r"[A-Za-z0-9_-]{1,32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_FILE_BYTES = 2**20
_FIELDS = ("sha256", "scopes", "rows_per_s", "bytes_per_s", "expires")
#: What tells one content of the file from the next, without reading it.
_Stamp = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Key:
    """One client of the service. It holds nothing secret, so it may be logged.

    Parameters
    ----------
    id : str
        The client's name: letters, digits, ``_`` and ``-``, at most 32.
    scopes : frozenset of str
        What it may do, of :data:`SCOPES`. None includes another.
    rows_per_s, bytes_per_s : float, optional
        Bounds on its rate; unbounded when None.
    expires : float, optional
        Seconds since 1970 after which the key is unknown; never when None.

    Raises
    ------
    SetupError
        A field that cannot be what is written above.
    """

    id: str
    scopes: frozenset[str]
    rows_per_s: float | None = None
    bytes_per_s: float | None = None
    expires: float | None = None

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise SetupError(f"got a key id of {len(self.id)} characters, wanted 1 to 32 letters, digits, '_' and '-'")
        if not self.scopes or not self.scopes <= set(SCOPES):
            raise SetupError(f"key {self.id}: got scopes {sorted(self.scopes)}, wanted some of {list(SCOPES)}")
        for name in ("rows_per_s", "bytes_per_s"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < float("inf"):
                raise SetupError(f"key {self.id}: got {name} = {rate}, wanted more than 0, or none for no bound")


class KeyRing:
    """All keys that are in force.

    Parameters
    ----------
    path : Path
        The file; see the module.
    clock : callable
        Seconds since 1970, for keys that expire.

    Raises
    ------
    SetupError
        The file is missing, readable by everyone, holds no key, or holds something else.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._entries, self._stamp = _read(path)

    @classmethod
    def from_file(cls, path: Path) -> KeyRing:
        """Read the keys of a file."""
        return cls(path)

    def __repr__(self) -> str:
        return f"KeyRing({len(self._entries)} keys of {self._path})"

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of all keys, in the order of the file."""
        return tuple(key.id for _, key in self._entries)

    def identify(self, authorization: bytes | None, x_api_key: bytes | None) -> Key | None:
        """Tell whose key a request presents.

        Parameters
        ----------
        authorization : bytes, optional
            The header's value; a key follows ``Bearer``. Any other scheme is not ours to read.
        x_api_key : bytes, optional
            The header's value, which counts where the other holds no key.

        Returns
        -------
        Key or None
            As :meth:`find`.
        """
        return self.find(presented(authorization, x_api_key))

    def find(self, digest: bytes | None) -> Key | None:
        """Find a key by its hash, as :func:`presented` gives it.

        Returns
        -------
        Key or None
            None where no key is presented, or one that is unknown or has expired.
        """
        if digest is None:
            return None
        found: Key | None = None
        # All of them, whichever fits: the time tells neither whether one did nor which.
        for known, key in self._entries:
            if hmac.compare_digest(known, digest):
                found = key
        if found is not None and found.expires is not None and self._clock() >= found.expires:
            return None
        return found

    def reload_if_changed(self) -> bool:
        """Take over a changed file; one that cannot be used is logged once, and the keys stay as they are.

        Returns
        -------
        bool
            There are new keys in force.
        """
        stamp: _Stamp | None = None
        try:
            stamp = _stamp_of(self._path.stat())
            if stamp == self._stamp:
                return False
            self._entries, self._stamp = _read(self._path)
        except (OSError, SetupError) as error:
            if stamp != self._stamp:
                self._stamp = stamp
                _log.error("the changed key file is not used, and the former keys stay in force: %s", error)
            return False
        _log.info("read %d API keys again", len(self._entries))
        return True


def presented(authorization: bytes | None, x_api_key: bytes | None) -> bytes | None:
    """Hash the key that a request presents, which is all that has to be kept of it; None where it presents none.

    Parameters
    ----------
    authorization, x_api_key : bytes, optional
        As :meth:`KeyRing.identify`.
    """
    key = _bearer(authorization) or x_api_key
    return hashlib.sha256(key).digest() if key else None


def require_scope(key: Key | None, scope: str) -> Key:
    """Let a known key of the right scope pass.

    Raises
    ------
    RequestError
        401 without a key in force, 403 with one that lacks `scope`.
    """
    if key is None:
        raise RequestError(
            401,
            "unauthorized",
            "got no API key that is known here, wanted one as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'",
            headers={"www-authenticate": 'Bearer realm="vaefeat"'},
        )
    if scope not in key.scopes:
        raise RequestError(
            403,
            "forbidden",
            f"got the API key {key.id!r} without the scope {scope!r}; ask the operator for one with it",
        )
    return key


def _bearer(authorization: bytes | None) -> bytes:
    if authorization is None or authorization[:7].lower() != b"bearer ":
        return b""
    return authorization[7:].strip()


def _read(path: Path) -> tuple[tuple[tuple[bytes, Key], ...], _Stamp | None]:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SetupError(f"could not read the key file {path}: {error.strerror or error}") from error
    if os.name == "posix" and stat.S_IMODE(status.st_mode) & stat.S_IRWXO:
        raise SetupError(
            f"got the key file {path} with mode {stat.S_IMODE(status.st_mode):04o}, which every user of this machine "
            "can open; chmod 600 it, or 640 for a group"
        )
    if len(content) > _MAX_FILE_BYTES:
        raise SetupError(f"got the key file {path} of more than {_MAX_FILE_BYTES} bytes, wanted a table for each key")
    return _parse(content, path), _stamp_of(status)


def _parse(content: bytes, path: Path) -> tuple[tuple[bytes, Key], ...]:
    # No message quotes a value: somebody may have written a key where its hash belongs.
    try:
        document = tomllib.loads(content.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        reason = error if isinstance(error, tomllib.TOMLDecodeError) else "not UTF-8, or nested without end"
        raise SetupError(f"got the key file {path}, which is not TOML: {reason}") from None
    tables = document.pop("keys", {})
    if document or not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise SetupError(f"got the key file {path} with something else in it, wanted only tables [keys.ID]")
    if not tables:
        raise SetupError(f"got the key file {path} without a key; make one with python -m serving.keys new")
    entries = tuple(_entry(name, table) for name, table in tables.items())
    if len({digest for digest, _ in entries}) < len(entries):
        raise SetupError(f"got the key file {path} with the same sha256 in two tables, wanted a key for each client")
    return entries


def _entry(name: str, table: Mapping[str, Any]) -> tuple[bytes, Key]:
    if unknown := sorted(table.keys() - set(_FIELDS)):
        raise SetupError(f"key {name}: got the unknown fields {unknown}, wanted some of {list(_FIELDS)}")
    sha256, scopes, expires = table.get("sha256"), table.get("scopes"), table.get("expires")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise SetupError(f"key {name}: wanted sha256 = 64 small hexadecimal digits, the hash of the key")
    if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
        raise SetupError(f"key {name}: wanted scopes = a list of some of {list(SCOPES)}")
    if expires is not None and not (isinstance(expires, datetime.datetime) and expires.tzinfo):
        raise SetupError(f"key {name}: wanted expires = a date and time with its zone, such as 2030-01-01T00:00:00Z")
    key = Key(
        id=name,
        scopes=frozenset(scopes),
        rows_per_s=_rate(name, table, "rows_per_s"),
        bytes_per_s=_rate(name, table, "bytes_per_s"),
        expires=expires.timestamp() if expires else None,
    )
    return bytes.fromhex(sha256), key


def _rate(name: str, table: Mapping[str, Any], field: str) -> float | None:
    value = table.get(field)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise SetupError(f"key {name}: wanted {field} = a number, or none for no bound")
    return value


def _stamp_of(status: os.stat_result) -> _Stamp:
    # The time of the last change of status as well: a file may be written twice within one tick of the other clock.
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
