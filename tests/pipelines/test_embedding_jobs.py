"""The embedding job as a shell starts it, on Ray: killed again and again, on a machine that is lost, on a full disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from pipelines.folder_lock import working_in
from tests.pipelines.embedding_rows import Here, embedding_of

CHECKOUT = Path(__file__).parents[2]
N = 100_000
PART_ROWS = 500
#: Two for each row group of 900 rows, in two files.
N_PARTS = 222

pytestmark = [pytest.mark.serve, pytest.mark.slow]


@pytest.fixture(scope="module")
def data(digits_rows: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of which no two parts are the same, some of them unreadable, with keys of their own."""
    rng = np.random.default_rng(0)
    rows = digits_rows[rng.integers(0, len(digits_rows), N)].reshape(N, -1)
    folder = tmp_path_factory.mktemp("data")
    for number, start in enumerate(range(0, N, N // 2)):
        part = rows[start : start + N // 2]
        vectors = pa.FixedSizeListArray.from_arrays(
            pa.array(part.reshape(-1)), 64, mask=pa.array(np.arange(len(part)) % 9973 == 5000)
        )
        keys = pa.array([f"key {start + i}" for i in range(len(part))])
        pq.write_table(pa.table({"key": keys, "pixels": vectors}), folder / f"{number}.parquet", row_group_size=900)
    return folder


@pytest.fixture(scope="module")
def wanted(digits_bundle: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give what a plain loop in one process writes."""
    out = tmp_path_factory.mktemp("wanted") / "out.parquet"
    Here(digits_bundle, data, out, part_rows=PART_ROWS, id_column="key").run()
    return out


def start(bundle: Path, data: Path, out: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    told = ["--bundle", str(bundle), "--data", str(data), "--out", str(out), "--id-column", "key", "--json"]
    told += ["--part-rows", str(PART_ROWS), *words]
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", "embed", *told],
        cwd=CHECKOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"still running after four minutes: {process.communicate()}")
    return process.returncode, out, errors


def n_parts(out: Path) -> int:
    return len(list(out.glob("part-*.parquet")))


def wait_for_parts(process: subprocess.Popen[str], out: Path, count: int) -> None:
    while n_parts(out) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def assert_same(out: Path, wanted: Path) -> None:
    got, expected = embedding_of(out), embedding_of(wanted)
    assert got[0] == expected[0], "rows were lost, doubled or come in another order"
    np.testing.assert_array_equal(got[1].view(np.uint32), expected[1].view(np.uint32))
    aside = [pq.read_table(folder / "_quarantine").sort_by("row").to_pylist() for folder in (out, wanted)]
    assert aside[0] == aside[1]
    assert len(aside[0]) == 10
    assert not list(out.rglob(".*"))


def test_a_job_that_is_killed_again_and_again_ends_with_the_rows_of_a_plain_loop(
    digits_bundle: Path, data: Path, wanted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.parquet"
    killed_at = []
    for share in (0.05, 0.4):
        process = start(digits_bundle, data, out)
        wait_for_parts(process, out, int(share * N_PARTS))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed_at.append(n_parts(out))
        assert not (out / "_manifest.json").exists()
    assert killed_at[-1] < N_PARTS, "it was over before it was killed"
    code, told, errors = finish(start(digits_bundle, data, out))
    assert code == 0, errors
    assert errors == ""
    done = json.loads(told)
    assert done["parts_done_before"] >= killed_at[-1]
    assert done["rows"] + done["quarantined"] == N
    assert_same(out, wanted)
    code, told, errors = finish(start(digits_bundle, data, out))
    assert (code, errors) == (0, "")
    assert json.loads(told)["rows_per_s"] is None, "nothing was left to do"


def test_sigterm_stops_the_job_and_says_how_far_it_was(digits_bundle: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    # Where a Ray would put its files that nobody has told where to.
    process = start(digits_bundle, data, out, RAY_TMPDIR=str(tmp_path / "elsewhere"))
    wait_for_parts(process, out, 5)
    process.terminate()
    code, told, errors = finish(process)
    assert (code, told) == (130, "")
    assert f"of {N_PARTS} parts are done; the same command goes on" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "elsewhere").exists(), "another Ray was started while the job's own shut down"
    before = (out / "_job.json").read_bytes()
    with working_in(out, lock="_job.json"):  # as another job does while it is at work
        code, told, errors = finish(start(digits_bundle, data, out))
    assert (code, told) == (2, "")
    assert "another job is at work" in errors
    assert (out / "_job.json").read_bytes() == before


def test_what_is_being_written_when_the_next_part_fails_is_kept(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    rows = digits_rows[:1200].reshape(1200, -1)
    cells = pa.FixedSizeBinaryArray.from_buffers(pa.binary(64), len(rows), [None, pa.py_buffer(rows.tobytes())])
    settings: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "row_group_size": 100}
    pq.write_table(pa.table({"key": pa.array(range(1200)), "pixels": cells}), tmp_path / "rows.parquet", **settings)
    content = bytearray((tmp_path / "rows.parquet").read_bytes())
    # The third part of a share of four, of which the first page is damaged.
    page = pq.read_metadata(tmp_path / "rows.parquet").row_group(2).column(1).data_page_offset
    content[page + 40 : page + 400] = bytes(360)
    (tmp_path / "rows.parquet").write_bytes(content)
    out = tmp_path / "out.parquet"
    words = ("--encoders", "1", "--part-rows", "100")
    code, told, errors = finish(start(digits_bundle, tmp_path / "rows.parquet", out, *words))
    assert (code, told) == (2, "")
    assert "rows.parquet" in errors
    # Encoders may have gone on with other shares until the job heard of it.
    assert [path.name for path in sorted(out.glob("part-*"))[:2]] == ["part-00000000.parquet", "part-00000001.parquet"]
    assert not (out / "part-00000002.parquet").exists()
    assert not (out / "_manifest.json").exists()
    assert not list(out.rglob(".*.tmp"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_the_job_with_one_line_and_it_goes_on_where_there_is_room(
    small_disk: Path, digits_bundle: Path, data: Path, wanted: Path
) -> None:
    out = small_disk / "out.parquet"
    code, told, errors = finish(start(digits_bundle, data, out))
    assert (code, told) == (2, "")
    assert errors.startswith("error: could not write ")
    assert "No space left on device" in errors
    assert errors.count("\n") == 1
    assert not (out / "_manifest.json").exists()
    assert n_parts(out) > 0
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    code, told, errors = finish(start(digits_bundle, data, out))
    assert code == 0, errors
    assert json.loads(told)["parts_done_before"] > 0
    assert_same(out, wanted)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two machines of Ray on this one, each a raylet with an object store of its own."""
    for name, value in {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    store = 128 * 2**20
    started = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": store, "include_dashboard": False}
    )
    try:
        yield started, started.add_node(num_cpus=1, object_store_memory=store)
    finally:
        started.shutdown()


def test_a_machine_that_is_lost_in_the_middle_costs_no_row(
    cluster: Any, digits_bundle: Path, data: Path, wanted: Path, tmp_path: Path
) -> None:
    both, second = cluster
    out = tmp_path / "out.parquet"
    process = start(digits_bundle, data, out, "--address", both.address)
    wait_for_parts(process, out, N_PARTS // 10)
    both.remove_node(second, allow_graceful=False)
    at_loss = n_parts(out)
    code, told, errors = finish(process)
    assert code == 0, errors
    assert at_loss < N_PARTS, "it was over before the machine was lost"
    assert json.loads(told)["rows"] + json.loads(told)["quarantined"] == N
    assert_same(out, wanted)


def test_encoders_of_a_machine_that_cannot_open_the_bundle_say_why(
    digits_bundle: Path, data: Path, tmp_path: Path, variant: Callable[..., Any]
) -> None:
    out = tmp_path / "out.parquet"
    code, told, errors = finish(start(digits_bundle, data, out, "--device", "cuda"))
    assert (code, told) == (2, "")
    assert errors == "error: got device=cuda, and Ray finds no GPU; take --device cpu\n"
