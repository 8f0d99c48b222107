"""What a stream takes in memory: a whole epoch under a limit that the rows themselves would break."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

_STREAM_UNDER_A_LIMIT = """
import resource, sys
import numpy as np
from vaefeat.blocks import open_blocks
from vaefeat.streams import RowStream

BUDGET, BUFFER = 48 << 20, 24 << 20

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))

def stream(path):
    return RowStream(open_blocks(path), buffer_bytes=BUFFER, workers=2)

small, large = sys.argv[1:]
assert sum(len(rows) for rows in stream(small).epoch(0, batch_size=128)) == 1800
resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + BUDGET,) * 2)
rows = stream(large)
n_steps, anonymous, numbers = rows.steps_per_epoch(128), [], 0
for batch in rows.epoch(0, batch_size=128):
    numbers += int(batch[:, :4].copy().view("<i4").sum())
    anonymous.append(status("RssAnon"))
assert len(anonymous) == n_steps
numbers += int(rows.heldout_rows[:, :4].copy().view("<i4").sum())
assert numbers == rows.n_rows * (rows.n_rows - 1) // 2, "not every row once"
quarter = n_steps // 4
print((max(anonymous[-quarter:]) - max(anonymous[1:quarter])) / 2**20)
try:
    np.load(large)
except MemoryError:
    print("does not fit")
"""


def test_epoch_of_four_times_the_memory_limit_stays_within_it(tmp_path: Path) -> None:
    n_rows, row_bytes = 4 * (48 << 20) // 1024, 1024
    np.save(tmp_path / "small.npy", np.zeros((2000, row_bytes), np.uint8))
    large = np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.uint8, (n_rows, row_bytes))
    large[:, :4] = np.arange(n_rows, dtype="<i4").view(np.uint8).reshape(-1, 4)
    del large
    done = subprocess.run(
        [sys.executable, "-c", _STREAM_UNDER_A_LIMIT, tmp_path / "small.npy", tmp_path / "large.npy"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    growth_mib, refused = done.stdout.splitlines()
    assert float(growth_mib) < 4
    assert refused == "does not fit"
