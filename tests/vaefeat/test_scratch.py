"""Folders for Ray: private, removed at the end, and removed for those who could not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vaefeat.scratch import scratch_folder

HOLD = "from vaefeat.scratch import scratch_folder\nwith scratch_folder() as one: print(one, flush=True); input()"
HOUR_AGO = 1_000_000_000


def held(tmp: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env=os.environ | {"TMPDIR": str(tmp)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    (folder / "log").write_text("left")
    os.utime(folder, (HOUR_AGO, HOUR_AGO))
    return process, folder


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a folder whose name is as short as Ray's sockets need it."""
    with tempfile.TemporaryDirectory(prefix="v", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_folder_is_private_and_gone_afterwards(parent: Path) -> None:
    with scratch_folder() as folder:
        assert folder.parent == parent
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "sockets").mkdir()
    assert list(parent.iterdir()) == []


def test_folder_of_a_killed_process_is_removed_by_the_next_and_that_of_a_living_one_is_kept(parent: Path) -> None:
    (killed, left), (living, kept) = held(parent), held(parent)
    try:
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        others = [parent / "vaefeat-thesis", parent / "vaefeat-mythesis", parent / "vaefeat-my_notes"]
        for other in others:
            other.mkdir()
        (others[0] / ".vaefeat-lock").write_text("")
        (others[1] / "lock").write_text("")
        os.mkfifo(others[2] / ".vaefeat-lock")
        (link := parent / "vaefeat-1ink1ink").symlink_to(kept)
        for other in others:
            os.utime(other, (HOUR_AGO, HOUR_AGO))
        with scratch_folder():
            assert not left.exists()
            assert (kept / "log").read_text() == "left"
            assert all(other.exists() for other in others[:2])
            assert link.exists()
    finally:
        living.communicate("\n")
    assert not kept.exists()


def test_folder_is_short_where_the_temporary_folder_is_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (long := tmp_path / "a-folder-whose-name-is-longer-than-sockets-allow").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with scratch_folder() as folder:
        assert len(os.fsencode(folder.parent)) <= 25
