"""Parquet files written by pandas and pyarrow, and damaged by hand."""

from __future__ import annotations

import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from vaefeat.data import load_rows
from vaefeat.errors import InputError, MissingExtraError


def _png(seed: int, shape: tuple[int, ...] = (4, 6, 3)) -> bytes:
    stream = BytesIO()
    Image.fromarray(_pixels(seed, shape)).save(stream, "PNG")
    return stream.getvalue()


def _pixels(seed: int, shape: tuple[int, ...] = (4, 6, 3)) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def _frame(n: int = 7) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "width": rng.normal(size=n),
            "name": [f"row {index}" for index in range(n)],
            "count": rng.integers(-5, 5, n),
            "label": rng.integers(0, 3, n),
            "flag": rng.integers(0, 2, n).astype(bool),
        }
    )


def test_numeric_columns_become_float32_without_label_and_text(tmp_path: Path) -> None:
    frame = _frame()
    frame.to_parquet(tmp_path / "rows.parquet", row_group_size=2)
    rows = load_rows(tmp_path / "rows.parquet")
    assert rows.array.dtype == np.float32
    np.testing.assert_array_equal(rows.array, frame[["width", "count", "flag"]].to_numpy(np.float32))
    np.testing.assert_array_equal(rows.labels, frame["label"])


def test_chosen_columns_come_in_the_order_asked_for(tmp_path: Path) -> None:
    frame = _frame()
    frame.to_parquet(tmp_path / "rows.parquet")
    rows = load_rows(tmp_path / "rows.parquet", columns=["label", "width"], label_column="name", max_rows=5)
    np.testing.assert_array_equal(rows.array, frame[["label", "width"]][:5].to_numpy(np.float32))
    assert rows.labels is not None
    assert rows.labels.tolist() == frame["name"][:5].tolist()


def test_label_column_none_reads_no_labels_and_makes_none_a_feature(tmp_path: Path) -> None:
    frame = _frame()
    frame.to_parquet(tmp_path / "rows.parquet")
    rows = load_rows(tmp_path / "rows.parquet", label_column=None)
    assert rows.labels is None
    assert rows.row_shape == (3,)


def test_uint8_columns_stay_uint8(tmp_path: Path) -> None:
    frame = pd.DataFrame(np.arange(12, dtype=np.uint8).reshape(3, 4)).rename(columns=str)
    frame.to_parquet(tmp_path / "rows.pq")
    rows = load_rows(tmp_path / "rows.pq")
    assert rows.array.dtype == np.uint8
    np.testing.assert_array_equal(rows.array, frame.to_numpy())


def test_several_batches_and_files_are_joined_in_order(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": np.arange(150_000), "label": np.arange(150_000) % 7})
    frame[:70_000].to_parquet(tmp_path / "part-0.parquet")
    frame[70_000:].to_parquet(tmp_path / "part-1.parquet")
    (tmp_path / "_metadata.parquet").write_bytes(b"not a part")
    rows = load_rows(tmp_path)
    np.testing.assert_array_equal(rows.array[:, 0], np.arange(150_000))
    np.testing.assert_array_equal(rows.labels, np.arange(150_000) % 7)
    np.testing.assert_array_equal(load_rows(tmp_path, max_rows=70_001).array[:, 0], np.arange(70_001))
    with pytest.raises(InputError, match="has no splits"):
        load_rows(tmp_path, split="test")


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet", "test.parquet"),
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("train/a.parquet", "test/b.parquet"),
    ],
)
def test_split_is_chosen_by_the_name_of_file_or_folder(tmp_path: Path, names: tuple[str, str]) -> None:
    for value, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pd.DataFrame({"a": [float(value)]}).to_parquet(tmp_path / name)
    assert load_rows(tmp_path).array.tolist() == [[0.0]]
    assert load_rows(tmp_path, split="test").array.tolist() == [[1.0]]


def test_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    pd.DataFrame({"a": [1.0]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"with train\.parquet, wanted test\.parquet"):
        load_rows(tmp_path, split="test")


@pytest.mark.parametrize("layout", ["struct", "binary"])
def test_encoded_images_are_decoded_with_their_labels(tmp_path: Path, layout: str) -> None:
    encoded = [_png(seed) for seed in range(300)]
    cells: list[Any] = [{"bytes": data, "path": None} for data in encoded] if layout == "struct" else encoded
    table = pa.table({"image": cells, "label": [f"class {seed % 5}" for seed in range(300)], "score": [0.5] * 300})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=128)
    rows = load_rows(tmp_path / "rows.parquet", max_rows=290)
    np.testing.assert_array_equal(rows.array, [_pixels(seed).transpose(2, 0, 1) for seed in range(290)])
    assert rows.labels is not None
    assert rows.labels.tolist() == [f"class {seed % 5}" for seed in range(290)]


def test_images_in_a_column_of_another_name_and_size(tmp_path: Path) -> None:
    table = pa.table({"png": [_png(0, (4, 4)), _png(1, (9, 7))], "digit": [3, 8]})
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = load_rows(tmp_path / "rows.parquet", image_column="png", label_column="digit", image_size=5)
    assert rows.array.shape == (2, 1, 5, 5)
    assert rows.labels is not None
    assert rows.labels.tolist() == [3, 8]


def test_columns_beside_images_can_be_asked_for(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [_png(0)], "score": [0.5]}), tmp_path / "rows.parquet")
    assert load_rows(tmp_path / "rows.parquet", columns=["score"]).array.tolist() == [[0.5]]


def test_unreadable_and_missing_images_are_named_by_row_and_path(tmp_path: Path) -> None:
    cells = [
        {"bytes": _png(0), "path": "a/0.png"},
        {"bytes": b"damaged", "path": "a/1.png"},
        {"bytes": None, "path": "a/2.png"},
        None,
        {"bytes": _png(4), "path": "a/4.png"},
    ]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"image": cells, "label": range(5)}), path)
    with pytest.raises(InputError, match=re.escape(f"unreadable image {path} row 1 (a/1.png) (")):
        load_rows(path)
    rows = load_rows(path, on_error="skip")
    assert rows.skipped == (f"{path} row 1 (a/1.png)", f"{path} row 2 (a/2.png)", f"{path} row 3")
    assert rows.labels is not None
    assert rows.labels.tolist() == [0, 4]
    np.testing.assert_array_equal(rows.array[1], _pixels(4).transpose(2, 0, 1))


def test_encoded_images_are_never_all_in_memory(tmp_path: Path) -> None:
    # 74 MB of noise, which does not compress, in one row group. A fresh process, because Arrow counts for a whole one.
    images = [_png(0, (64, 64, 3))] * 6000
    pq.write_table(pa.table({"image": images}), tmp_path / "rows.parquet", compression="none", use_dictionary=False)
    code = (
        "import sys, pyarrow; from vaefeat.data import load_rows; "
        "print(len(load_rows(sys.argv[1])), pyarrow.default_memory_pool().max_memory())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "rows.parquet")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    n_rows, peak_bytes = map(int, output.split())
    assert n_rows == 6000
    assert 0 < peak_bytes < sum(map(len, images)) / 2


def test_missing_column_offers_the_nearest(tmp_path: Path) -> None:
    _frame().to_parquet(tmp_path / "rows.parquet")
    for argument in ({"columns": ["witdh"]}, {"label_column": "witdh"}, {"image_column": "witdh"}):
        with pytest.raises(InputError, match=r"got no column 'witdh' in .*; did you mean 'width'\?"):
            load_rows(tmp_path / "rows.parquet", **argument)
    with pytest.raises(InputError, match="there are: width, name, count, label, flag"):
        load_rows(tmp_path / "rows.parquet", columns=["zzz"])


def test_column_of_another_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    _frame().to_parquet(path)
    with pytest.raises(InputError, match=r"got column 'name' of type .*string, wanted numbers"):
        load_rows(path, columns=["name"])
    with pytest.raises(InputError, match="got the label column 'width' of type double, wanted integers or strings"):
        load_rows(path, label_column="width")
    with pytest.raises(InputError, match="got the image column 'width' of type double, wanted binary"):
        load_rows(path, image_column="width")
    with pytest.raises(InputError, match="got image_size for numeric columns"):
        load_rows(path, image_size=8)


def test_nulls_name_the_column_and_the_row(tmp_path: Path) -> None:
    table = pa.table({"a": pa.array([1, 2, None], pa.int32()), "label": pa.array([None, 1, 2], pa.int64())})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(
        InputError, match=r"nulls in column 'label' .* row 0\), .* -1 \(unlabelled\).*label_column=None"
    ):
        load_rows(tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"nulls in column 'a' .*rows\.parquet \(first in row 2\)"):
        load_rows(tmp_path / "rows.parquet", label_column=None)


def test_null_in_a_later_batch_is_counted_from_the_start_of_its_file(tmp_path: Path) -> None:
    full, holed = np.zeros(70_000), np.zeros(70_000)
    holed[-1] = np.nan
    for name, values in (("0.parquet", full), ("1.parquet", holed)):
        pq.write_table(pa.table({"a": pa.array(values, from_pandas=True)}), tmp_path / name)
    with pytest.raises(InputError, match=r"nulls in column 'a' of .*1\.parquet \(first in row 69999\)"):
        load_rows(tmp_path)


def test_not_finite_number_names_the_column(tmp_path: Path) -> None:
    pd.DataFrame({"a": [1.0, 2.0], "b": [0.0, 1e39]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"1 NaN or infinite values in .*rows\.parquet \(first in row 1, column 'b'\)"):
        load_rows(tmp_path / "rows.parquet")


def test_pandas_categories_are_labels(tmp_path: Path) -> None:
    pd.DataFrame({"a": [1.0, 2, 3], "label": pd.Categorical(["x", "y", "x"])}).to_parquet(tmp_path / "rows.parquet")
    labels = load_rows(tmp_path / "rows.parquet").labels
    assert labels is not None
    assert labels.tolist() == ["x", "y", "x"]


def test_file_without_numbers_or_images_lists_its_columns(tmp_path: Path) -> None:
    pd.DataFrame({"text": ["a"], "label": [1]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(
        InputError,
        match=r"no numeric column, no single column of lists .* no column 'image' .*\(columns: text, label\)",
    ):
        load_rows(tmp_path / "rows.parquet")


def test_file_without_rows_is_refused(tmp_path: Path) -> None:
    _frame(0).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"got 0 rows in .*, wanted at least one"):
        load_rows(tmp_path / "rows.parquet")


def test_files_of_different_columns_are_not_joined(tmp_path: Path) -> None:
    pd.DataFrame({"a": [1.0]}).to_parquet(tmp_path / "0.parquet")
    pd.DataFrame({"b": [1.0]}).to_parquet(tmp_path / "1.parquet")
    with pytest.raises(InputError, match=r"1\.parquet with the columns b, wanted those of .*0\.parquet: a;"):
        load_rows(tmp_path)


def test_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"a": np.random.default_rng(0).normal(size=1000)}), path)
    content = bytearray(path.read_bytes())
    (tmp_path / "short.parquet").write_bytes(content[:-50])
    content[5:40] = bytes(35)  # the header of the first page: found only when the values are read
    (tmp_path / "page.parquet").write_bytes(content)
    (tmp_path / "empty.parquet").write_bytes(b"")
    for name in ("short", "page", "empty"):
        with pytest.raises(InputError, match=rf"{name}\.parquet, which is no readable Parquet file"):
            load_rows(tmp_path / f"{name}.parquet")


def test_file_that_announces_more_rows_than_it_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"a": np.zeros(12_345)}), path, row_group_size=10_000)
    content = path.read_bytes()
    # The total stands once in the footer, as a zigzag variable-length integer: 2 * 12,345 becomes 2 * 12,346.
    assert content.count(b"\xf2\xc0\x01") == 1
    path.write_bytes(content.replace(b"\xf2\xc0\x01", b"\xf4\xc0\x01"))
    with pytest.raises(InputError, match=r"got 12345 rows in .*, wanted the 12346 that the files announce"):
        load_rows(path)


def test_label_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"a": [1.0], "label": ["zebra"]}), path, use_dictionary=False, compression="none")
    path.write_bytes(path.read_bytes().replace(b"zebra", b"\xffebra"))
    with pytest.raises(InputError, match=r"no readable Parquet file .*UTF8"):
        load_rows(path)


def test_missing_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _frame().to_parquet(tmp_path / "rows.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'vaefeat\[parquet\]'"):
        load_rows(tmp_path / "rows.parquet")
