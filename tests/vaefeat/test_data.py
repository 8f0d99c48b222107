"""Sources as :func:`load_rows` sees them: which reader a path gets, splits, arguments, fingerprints, batches."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from PIL import Image

from vaefeat.data import Rows, batches, fingerprint, load_rows
from vaefeat.errors import InputError


def test_import_in_a_fresh_process_loads_no_heavy_package() -> None:
    heavy = "{'torch', 'onnxruntime', 'sklearn', 'pyarrow', 'PIL', 'pandas'}"
    code = f"import sys, vaefeat.data; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_rows_of_images_describe_themselves() -> None:
    rows = load_rows(np.zeros((5, 3, 4, 6), np.uint8))
    assert (len(rows), rows.kind, rows.row_shape) == (5, "image", (3, 4, 6))
    assert (rows.labels, rows.names, rows.source, rows.skipped) == (None, None, "array", ())
    assert rows.fingerprint() == fingerprint(rows.array)


def test_rows_of_vectors_describe_themselves() -> None:
    rows = Rows(array=np.zeros((2, 7), np.float32))
    assert (len(rows), rows.kind, rows.row_shape) == (2, "vector", (7,))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"split": "validation"}, "got split='validation', wanted 'train' or 'test'"),
        ({"on_error": "ignore"}, "got on_error='ignore', wanted 'raise' or 'skip'"),
        ({"max_rows": 0}, "got max_rows=0, wanted a positive integer"),
        ({"max_rows": 1.5}, "got max_rows=1.5, wanted a positive integer"),
        ({"image_size": (8, 0)}, "got image_size=0, wanted a positive integer"),
        ({"image_size": (8, 8, 3)}, "wanted (height, width)"),
        ({"columns": "a"}, "pass columns=['a']"),
    ],
)
def test_load_rows_impossible_argument_is_refused(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_rows(np.zeros((2, 2)), **argument)


@pytest.mark.parametrize("argument", [{"image_size": 8}, {"columns": ["a"]}, {"split": "test"}])
def test_load_rows_argument_that_does_not_apply_is_refused(argument: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"got (image_size|columns|split='test') for an array"):
        load_rows(np.zeros((2, 2)), **argument)


def test_array_with_max_rows_is_cut_before_it_is_checked() -> None:
    rows = load_rows(np.array([[1.0, 2.0], [3.0, 4.0], [np.nan, 0.0]]), max_rows=2)
    np.testing.assert_array_equal(rows.array, np.array([[1, 2], [3, 4]], np.float32))
    assert rows.table is None


def test_dataframe_with_infinity_names_the_column() -> None:
    frame = pd.DataFrame({"height": [1.0, 2.0], "weight": [3.0, np.inf]})
    with pytest.raises(InputError, match=r"1 NaN or infinite values in array \(first in row 1, column 'weight'\)"):
        load_rows(frame)


def test_dataframe_with_text_that_is_to_be_no_table_says_how_to_select_numbers() -> None:
    with pytest.raises(InputError, match=r"df\.select_dtypes\('number'\)"):
        load_rows(pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}), table=False)


def test_npy_of_float32_stays_a_read_only_memory_map(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    np.save(tmp_path / "rows.npy", array)
    rows = load_rows(tmp_path / "rows.npy", max_rows=6)
    assert isinstance(rows.array, np.memmap)
    assert not rows.array.flags.writeable
    assert rows.source == str(tmp_path / "rows.npy")
    np.testing.assert_array_equal(rows.array, array[:6])


def test_npz_with_labels_returns_both(tmp_path: Path) -> None:
    images = np.arange(4 * 1 * 2 * 2, dtype=np.uint8).reshape(4, 1, 2, 2)
    np.savez(tmp_path / "rows.npz", images=images, y=np.array([3, 0, 2, 1], np.uint8), note=np.zeros(1))
    rows = load_rows(str(tmp_path / "rows.npz"), max_rows=3)
    np.testing.assert_array_equal(rows.array, images[:3])
    assert rows.labels is not None
    assert rows.labels.dtype == np.int64
    assert rows.labels.tolist() == [3, 0, 2]


def test_npz_with_another_number_of_labels_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", X=np.zeros((4, 2)), y=np.zeros(3, np.int64))
    with pytest.raises(InputError, match=r"got labels of shape \(3,\) .* each of the 4 rows"):
        load_rows(tmp_path / "rows.npz")


@pytest.mark.parametrize("name", ["rows.npy", "rows.parquet", "rows-idx1-ubyte"])
def test_single_file_with_split_test_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(InputError, match=r"has no splits; leave it out"):
        load_rows(tmp_path / name, split="test")


def test_missing_path_is_named() -> None:
    with pytest.raises(InputError, match="got /no/such/place, which does not exist"):
        load_rows("/no/such/place")


def test_file_of_another_format_lists_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("a,b\n1,2\n")
    with pytest.raises(
        InputError, match=r"rows\.txt, wanted a \.npy, \.npz, \.parquet, \.csv or IDX file, or a folder"
    ):
        load_rows(tmp_path / "rows.txt")


def test_single_image_file_points_to_its_folder(tmp_path: Path) -> None:
    Image.new("L", (2, 2)).save(tmp_path / "one.png")
    with pytest.raises(InputError, match="pass the folder that holds the images"):
        load_rows(tmp_path / "one.png")


def test_folder_without_rows_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(
        InputError, match=r"without anything to read; wanted train-images-idx3-ubyte.*\*\.parquet.*\.webp"
    ):
        load_rows(tmp_path)


@pytest.mark.parametrize("place", [".", "raw", "MNIST/raw"])
@pytest.mark.parametrize("zipped", [True, False])
def test_mnist_folder_is_read_by_split_from_where_torchvision_puts_it(tmp_path: Path, place: str, zipped: bool) -> None:
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    values = {"train": np.arange(24, dtype=np.uint8), "t10k": np.arange(100, 124, dtype=np.uint8)}
    for prefix, pixels in values.items():
        for name, header, data in (
            ("images-idx3", b"\0\0\x08\x03\0\0\0\2\0\0\0\3\0\0\0\4", pixels.tobytes()),
            ("labels-idx1", b"\0\0\x08\x01\0\0\0\2", pixels[:2].tobytes()),
        ):
            content = header + data
            path = tmp_path / place / f"{prefix}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)
    train, test = load_rows(tmp_path), load_rows(tmp_path, split="test")
    np.testing.assert_array_equal(train.array, values["train"].reshape(2, 1, 3, 4))
    np.testing.assert_array_equal(test.array, values["t10k"].reshape(2, 1, 3, 4))
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1]
    assert test.labels is not None
    assert test.labels.tolist() == [100, 101]
    # There must be room for scikit-learn's -1.
    assert test.labels.dtype == np.int64


def test_mnist_folder_without_labels_or_the_test_split(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + b"\0\0\0\1" * 3 + b"\7")
    assert load_rows(tmp_path).labels is None
    with pytest.raises(InputError, match=r"without t10k-images-idx3-ubyte\[\.gz\], which holds split='test'"):
        load_rows(tmp_path, split="test")


def test_mnist_folder_with_labels_of_another_file_is_refused_even_with_max_rows(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0\0\3\0\0\0\1\0\0\0\1" + b"abc")
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\2" + b"ab")
    with pytest.raises(InputError, match=r"got 2 labels in .* each of the 3 images"):
        load_rows(tmp_path, max_rows=1)


def test_fingerprint_depends_on_values_shape_and_dtype() -> None:
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    changed = array.copy()
    changed[1, 2] += 1
    variants: list[NDArray[Any]] = [array, changed, array.reshape(4, 3), array.astype(np.float32), array[:2]]
    prints = [fingerprint(variant) for variant in variants]
    assert len(set(prints)) == len(prints)
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in prints)


def test_fingerprint_is_the_same_for_a_copy_another_layout_and_byte_order(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    np.save(tmp_path / "rows.npy", array)
    expected = fingerprint(array)
    assert fingerprint(np.asfortranarray(array)) == expected
    assert fingerprint(array.astype(">f4")) == expected
    assert load_rows(tmp_path / "rows.npy").fingerprint() == expected
    # Spelt out, so that fingerprints in published bundles stay comparable across versions.
    small = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert fingerprint(small) == "sha256:" + hashlib.sha256(b"(2, 3) uint8" + bytes(range(6))).hexdigest()


def test_fingerprint_of_many_rows_looks_at_4096_evenly_spaced_ones() -> None:
    array = np.zeros((8192, 1), np.uint8)
    before = fingerprint(array)
    noticed = []
    for row in range(8192):
        if row in {0, 1, 2, 3, 4000, 4001, 8190, 8191}:
            array[row] = 1
            noticed.append(fingerprint(array) != before)
            array[row] = 0
    # Every second row, from the first to the last.
    assert noticed[0]
    assert noticed[-1]
    assert 3 <= sum(noticed) <= 5


def test_batches_cover_all_rows_in_order_without_copying() -> None:
    array = np.arange(14).reshape(7, 2)
    cut = list(batches(array, 3))
    assert [len(batch) for batch in cut] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(cut), array)
    assert all(np.shares_memory(batch, array) for batch in cut)


def test_batches_of_no_rows_fail_before_the_first_is_asked_for() -> None:
    with pytest.raises(InputError, match="got batch_size=0, wanted a positive integer"):
        batches(np.zeros((2, 2)), 0)


def test_mnist_files_give_what_torchvision_reads(data_dir: Path, tmp_path: Path) -> None:
    from torchvision.datasets import MNIST

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in (data_dir / "MNIST" / "raw").glob("t10k-*.gz"):
        (raw / archive.stem).write_bytes(gzip.decompress(archive.read_bytes()))
        # torchvision wants to see all four before it reads two.
        (raw / archive.stem.replace("t10k", "train")).touch()
    expected = MNIST(str(tmp_path), train=False)
    rows = load_rows(data_dir, split="test")
    np.testing.assert_array_equal(rows.array, expected.data.numpy()[:, None])
    np.testing.assert_array_equal(rows.labels, expected.targets.numpy())
    np.testing.assert_array_equal(load_rows(data_dir / "MNIST", split="test", max_rows=100).array, rows.array[:100])


def test_mnist_train_split_has_sixty_thousand_labelled_rows(data_dir: Path) -> None:
    rows = load_rows(data_dir / "MNIST")
    assert rows.array.shape == (60_000, 1, 28, 28)
    assert rows.labels is not None
    assert np.bincount(rows.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def test_cifar10_parquet_gives_what_pandas_and_pillow_read(data_dir: Path) -> None:
    rows = load_rows(data_dir / "CIFAR10", split="test")
    assert rows.array.shape == (10_000, 3, 32, 32)
    assert rows.labels is not None
    assert np.bincount(rows.labels).tolist() == [1000] * 10
    frame = pd.read_parquet(data_dir / "CIFAR10" / "test.parquet")
    np.testing.assert_array_equal(rows.labels, frame["label"])
    for row in range(0, 10_000, 997):
        with Image.open(io.BytesIO(frame["image"][row]["bytes"])) as image:
            np.testing.assert_array_equal(rows.array[row], np.asarray(image).transpose(2, 0, 1))


def test_cifar10_train_split_is_chosen_by_default(data_dir: Path) -> None:
    rows = load_rows(data_dir / "CIFAR10", max_rows=300)
    frame = pd.read_parquet(data_dir / "CIFAR10" / "train.parquet", columns=["label"])
    np.testing.assert_array_equal(rows.labels, frame["label"][:300])
    assert rows.array.shape == (300, 3, 32, 32)
