"""Files on a disk or in a bucket, by one interface: pyarrow's file systems, and those of fsspec behind them."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import fs

from vaefeat.atomic import replace_file
from vaefeat.errors import InputError
from vaefeat.images import find_images

__all__ = ["Found", "Place"]

#: Where an object appears when all of it has arrived, so that it needs no second name on the way.
_OBJECT_STORES = ("s3", "gcs", "abfs")


class Found(NamedTuple):
    """A file below a place."""

    name: str
    """Relative to the place, with slashes."""

    size: int
    """In bytes."""

    changed_ns: int
    """When it was last written, since 1970."""


class Place:
    """A file or a folder, on this machine or anywhere that pyarrow or fsspec reaches.

    It is pickled as its address, so that every machine reaches it by its own means and no credentials travel.

    Parameters
    ----------
    address : str or path-like
        A path, or an address such as ``s3://bucket/folder``, ``gs://bucket/file.parquet``. Options of pyarrow's file
        systems stand behind a question mark: ``s3://bucket/folder?endpoint_override=localhost:9000&scheme=http``.

    Raises
    ------
    InputError
        No file system is known for the address.
    """

    def __init__(self, address: str | os.PathLike[str]) -> None:
        self.address = os.fspath(address)
        if "://" not in self.address:
            self.address = str(Path(self.address).resolve())
        self._filesystem, self.path = _resolved(self.address)

    def __reduce__(self) -> tuple[Any, ...]:
        return Place, (self.address,)

    def __str__(self) -> str:
        # Addresses may hold keys, which belong into no message and no file.
        bare = self.address.partition("?")[0]
        scheme, mark, rest = bare.partition("://")
        return f"{scheme}{mark}{rest.rpartition('@')[2]}" if mark else bare

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name

    @property
    def local(self) -> Path | None:
        """The path on this machine, where it is on this machine."""
        return Path(self.path) if self._filesystem.type_name == "local" else None

    def child(self, name: str) -> Place:
        """Give a file or folder below this one."""
        bare, mark, options = self.address.partition("?")
        return Place(f"{bare.rstrip('/')}/{name}{mark}{options}")

    @property
    def is_file(self) -> bool:
        """Whether there is a file of this name."""
        return bool(self._type() == fs.FileType.File)

    @property
    def is_folder(self) -> bool:
        """Whether there is a folder of this name; in a bucket, anything below it."""
        return bool(self._type() == fs.FileType.Directory)

    def _type(self) -> Any:
        with self.reading():
            return self._filesystem.get_file_info(self.path).type

    def open(self, name: str = "") -> Any:
        """Open the file, or one below the folder, for reading anywhere in it; a ``pyarrow.NativeFile``."""
        return self._filesystem.open_input_file(f"{self.path}/{name}" if name else self.path)

    def read(self, name: str = "") -> bytes:
        """Give the whole content of the file, or of one below the folder."""
        with self.open(name) as file:
            content: bytes = file.read()
        return content

    def find(self) -> list[Found]:
        """List the files at any depth, without hidden ones; this one itself, where it is a file. Sorted by name."""
        with self.reading():
            if self.is_file:
                return [_found(self._filesystem.get_file_info(self.path), self.name)]
            infos = self._filesystem.get_file_info(fs.FileSelector(self.path, recursive=True, allow_not_found=True))
        below = len(self.path.rstrip("/")) + 1
        files = [_found(info, info.path[below:]) for info in infos if info.type == fs.FileType.File]
        return sorted(file for file in files if not any(part[0] == "." for part in file.name.split("/")))

    def find_images(self) -> list[Found]:
        """List the images at any depth in the order of :func:`vaefeat.images.find_images`, which follows links."""
        if self.local is None:
            return self.find()
        paths = find_images(self.local)
        return [Found(path.relative_to(self.local).as_posix(), *_stat(path)) for path in paths]

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a file below the folder that appears whole or not at all; what was there is replaced.

        Raises
        ------
        InputError
            The disk is full, or the place cannot be written.
        """
        path = f"{self.path}/{name}"
        parent = str(PurePosixPath(path).parent)
        try:
            if self.local is not None:
                Path(parent).mkdir(parents=True, exist_ok=True)
                replace_file(Path(path), content)
            elif self._filesystem.type_name in _OBJECT_STORES:
                self._send(path, content)
            else:
                self._filesystem.create_dir(parent, recursive=True)
                staged = f"{parent}/.{PurePosixPath(path).name}.{uuid.uuid4().hex}.tmp"
                self._send(staged, content)
                self._filesystem.move(staged, path)
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"could not write {self}/{name}: {_reason(error)}; what is finished is kept: make room or mend the "
                "place, and the same command goes on"
            ) from error

    def _send(self, path: str, content: bytes | memoryview) -> None:
        stream = self._filesystem.open_output_stream(path)
        stream.write(content)
        # Not in a `with` block, which would also close, and so publish, what was cut short by an error.
        stream.close()

    def remove(self, name: str) -> None:
        """Remove a file below the folder."""
        with self.reading():
            self._filesystem.delete_file(f"{self.path}/{name}")

    @contextlib.contextmanager
    def reading(self, name: str = "") -> Iterator[None]:
        """Name the file in what goes wrong while it is read."""
        try:
            yield
        except (OSError, pa.ArrowException, EOFError, UnicodeDecodeError) as error:
            where = f"{self}/{name}" if name else str(self)
            raise InputError(
                f"could not read {where}: {_reason(error)}; mend it or leave it out, and start again"
            ) from error


def _resolved(address: str) -> tuple[Any, str]:
    if "://" not in address:
        return fs.LocalFileSystem(), address
    try:
        filesystem, path = fs.FileSystem.from_uri(address)
    except pa.ArrowInvalid:
        return _fsspec(address)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"could not open {address}: {_reason(error)}") from error
    return filesystem, path.rstrip("/")


def _fsspec(address: str) -> tuple[Any, str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(address)
    except (ValueError, ImportError) as error:
        raise InputError(
            f"got {address}, for which there is no file system ({_reason(error)}); wanted a path, s3://, gs://, or "
            "what an installed package of fsspec knows"
        ) from error
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path.rstrip("/")


def _found(info: Any, name: str) -> Found:
    return Found(name, info.size, info.mtime_ns or 0)


def _stat(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).splitlines()), type(error).__name__)
