"""A file appears whole or not at all, whatever the disk does."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from vaefeat.atomic import replace_file

pytestmark = pytest.mark.skipif(os.name != "posix", reason="limits, links and modes of POSIX")


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_replace_file_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"first", b"", b"a longer third"):
        replace_file(path, content)
        assert path.read_bytes() == content
    assert names(tmp_path) == ["file"]


def test_replaced_file_has_the_permissions_of_an_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_bytes(b"")
    replace_file(tmp_path / "replaced", b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "replaced")]
    assert modes[0] == modes[1]


def test_full_disk_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    # A limit on the size of files makes the system refuse a write half-way, as a full disk does.
    program = textwrap.dedent("""
        import resource, signal, sys
        from pathlib import Path
        from vaefeat.atomic import replace_file

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            replace_file(Path(sys.argv[1]), bytes(100_000))
        except OSError as error:
            print(type(error).__name__, error.strerror, error.filename)
    """)
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert done.stdout == f"OSError File too large {path}\n"
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_rename_that_fails_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="directory"):
        replace_file(tmp_path / "file", b"content")
    assert names(tmp_path) == ["file"]


def test_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "missing" / "file", b"content")


def test_link_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"target")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    replace_file(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_bytes() == b"target"
    assert (tmp_path / "link").read_bytes() == b"new"


def test_reader_sees_one_whole_content_or_the_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = {b"a" * 300_000, b"b" * 200_000}
    replace_file(path, min(contents))
    seen: set[bytes] = set()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        for content in contents:
            replace_file(path, content)
    stop.set()
    reader.join()
    assert seen <= contents


def test_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from vaefeat.atomic import replace_file

        path = Path(sys.argv[1])
        print("writing", flush=True)
        while True:
            replace_file(path, b"x" * 1_000_000)
            replace_file(path, b"y" * 1_000_000)
    """)
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1_000_000)
    with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        time.sleep(0.1)
        writer.send_signal(signal.SIGKILL)
    assert path.read_bytes() in {b"x" * 1_000_000, b"y" * 1_000_000}
