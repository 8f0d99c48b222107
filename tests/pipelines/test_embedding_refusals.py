"""Input that the embedding job refuses, in one line that names files and rows, before anything is written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from pipelines.embedding import ids as ids_module
from pipelines.embedding.sources import Request, open_source
from pipelines.embedding.storage import Place
from tests.pipelines.embedding_rows import (
    Here,
    fixed_lists,
    npy,
    open_spec,
    table_of,
)
from vaefeat.bundle import Bundle
from vaefeat.errors import InputError

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows(digits_rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return digits_rows[:300]


@pytest.mark.parametrize("pass_ids", [50, 1 << 20])
def test_an_id_that_comes_twice_names_files_and_rows(pass_ids: int, rows: NDArray[np.uint8], tmp_path: Path) -> None:
    table = table_of(rows)
    pq.write_table(table[:200], tmp_path / "a.parquet")
    spoilt = table[200:].set_column(0, "key", pa.array([f"row {i}" for i in range(200, 299)] + ["row 17"]))
    pq.write_table(spoilt, tmp_path / "b.parquet")
    source = open_source(Place(tmp_path), open_spec(), Request(id_column="key"))
    with pytest.raises(InputError, match=r"'row 17' twice: in row 17 of a.parquet and in row 99 of b.parquet"):
        ids_module.refuse_doubtful_ids(source, pass_ids=pass_ids)
    (tmp_path / "b.parquet").unlink()
    ids_module.refuse_doubtful_ids(
        open_source(Place(tmp_path), open_spec(), Request(id_column="key")), pass_ids=pass_ids
    )


def misfits(folder: Path, rows: NDArray[np.uint8]) -> Iterator[tuple[str, Path, dict[str, Any], str]]:
    yield "missing column", fixed_lists(folder, rows), {"columns": ("pixles",)}, "did you mean 'pixels'"
    yield "missing id", folder / "rows.parquet", {"id_column": "kye"}, "did you mean 'key'"
    yield "missing kept", folder / "rows.parquet", {"keep": ("lable",)}, "did you mean 'label'"
    yield "reserved", folder / "rows.parquet", {"keep": ("embedding",)}, "a name that the output has for itself"
    yield "text as rows", folder / "rows.parquet", {"columns": ("key",)}, "wanted numbers"
    yield "one number", folder / "rows.parquet", {"columns": ("label",)}, "wanted 64"
    (folder / "bytes").mkdir()
    pq.write_table(pa.table({"pixels": pa.array([b"four"], pa.binary(4))}), folder / "bytes" / "a.parquet")
    yield "other bytes", folder / "bytes", {"columns": ("pixels",)}, "rows of 4 bytes"
    yield "no split", folder / "rows.parquet", {"split": "test"}, "begin with test"
    yield "lists as ids", folder / "rows.parquet", {"id_column": "pixels"}, "wanted integers or text"
    (folder / "narrow").mkdir()
    yield "other shape", npy(folder / "narrow", rows[..., :-1]), {}, "wanted uint8 rows of shape"
    yield "columns of an array", folder / "narrow" / "rows.npy", {"columns": ("a",)}, "has no columns"
    (folder / "scaled").mkdir()
    yield "other scale", npy(folder / "scaled", rows / np.float32(16)), {}, "none of the first 300 rows"
    (folder / "cut").mkdir()
    cut = npy(folder / "cut", rows)
    cut.write_bytes(cut.read_bytes()[:-1])
    yield "cut short", cut, {}, "fetch or write it again"
    (folder / "damaged").mkdir()
    (folder / "damaged" / "a.parquet").write_bytes((folder / "rows.parquet").read_bytes()[:-20])
    yield "damaged footer", folder / "damaged", {}, "a.parquet"
    (folder / "two").mkdir()
    pq.write_table(pa.table({"pixels": [1], "other": [2]}), folder / "two" / "z.parquet")
    fixed_lists(folder / "two", rows)
    yield "other schema", folder / "two", {}, "z.parquet"
    (folder / "empty").mkdir()
    yield "nothing there", folder / "empty", {}, "without anything to read"
    yield "nowhere", folder / "nowhere", {}, "does not exist"
    yield "no such scheme", Path("nothing://here"), {}, "wanted a path"


def test_input_that_does_not_fit_is_refused_before_anything_is_written(
    digits_bundle: Path, rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for what, data, request, message in misfits(tmp_path / "in", rows):
        address = "nothing://here" if what == "no such scheme" else data
        with pytest.raises(InputError, match=message) as told:
            Here(digits_bundle, address, tmp_path / "out", **request)
        assert "\n" not in str(told.value), what
        assert not (tmp_path / "out").exists(), what


def test_an_output_of_something_else_is_left_alone(
    digits_bundle: Path, variant: Callable[..., Bundle], rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    data, out = npy(tmp_path, rows), tmp_path / "out"
    Here(digits_bundle, data, out).run()
    before = {path: path.read_bytes() for path in out.iterdir()}
    other = variant().save(tmp_path / "other")
    assert other.path is not None
    with pytest.raises(InputError, match="another bundle"):
        Here(other.path, data, out).run()
    np.save(data, rows[::-1])
    with pytest.raises(InputError, match="another input"):
        Here(digits_bundle, data, out).run()
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        Here(digits_bundle, data, tmp_path / "full").run()
    with pytest.raises(InputError, match="which is a file"):
        Here(digits_bundle, data, tmp_path / "full" / "notes.txt").run()


def test_address_where_no_ray_is_is_one_line_and_soon(
    digits_bundle: Path, rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    words = ["--bundle", str(digits_bundle), "--data", str(npy(tmp_path, rows)), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "embed", *words, "--address", "127.0.0.1:1"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: got the address 127.0.0.1:1, where no Ray answers")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out" / "_manifest.json").exists()


def test_bad_input_on_the_command_line_is_one_line(digits_bundle: Path, tmp_path: Path) -> None:
    words = ["--bundle", str(digits_bundle), "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "embed", *words], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: got")
    assert done.stdout == ""
