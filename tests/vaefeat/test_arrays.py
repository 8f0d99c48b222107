"""Arrays as rows: shapes and dtypes that are taken or refused, values that are not finite, .npy and .npz files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vaefeat import arrays
from vaefeat.arrays import as_labels, as_rows, read_npy, read_npz
from vaefeat.errors import InputError


def test_as_rows_uint8_and_float32_are_passed_on_without_a_copy() -> None:
    for dtype in (np.uint8, np.float32):
        array = np.arange(6).reshape(2, 3).astype(dtype)
        rows = as_rows(array, what="array")
        assert rows.dtype == dtype
        assert np.shares_memory(rows, array)


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "int64", "uint16", "uint64", "float16", "float64", ">f4", "longdouble"]
)
def test_as_rows_other_real_dtypes_become_native_float32(dtype: str) -> None:
    array = np.array([[0, 1], [1, 0]]).astype(dtype)
    rows = as_rows(array, what="array")
    assert rows.dtype == np.float32
    assert rows.dtype.isnative
    np.testing.assert_array_equal(rows, [[0, 1], [1, 0]])


def test_as_rows_takes_lists_and_torch_tensors() -> None:
    np.testing.assert_array_equal(as_rows([[1, 2], [3, 4]], what="array"), np.array([[1, 2], [3, 4]], np.float32))
    assert as_rows(torch.ones(2, 3), what="array").shape == (2, 3)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_as_rows_images_with_channels_first_keep_their_shape(channels: int) -> None:
    # 4 x 3 pixels: also where the last axes could be channels, the second one decides.
    assert as_rows(np.zeros((2, channels, 4, 3), np.uint8), what="array").shape == (2, channels, 4, 3)


def test_as_rows_grey_images_without_channels_get_one() -> None:
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    rows = as_rows(images, what="array")
    assert rows.shape == (2, 1, 3, 4)
    np.testing.assert_array_equal(rows[:, 0], images)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_as_rows_images_with_channels_last_say_how_to_transpose(channels: int) -> None:
    images = np.zeros((2, 28, 28, channels), np.uint8)
    with pytest.raises(InputError, match=re.escape("pass X.transpose(0, 3, 1, 2)")):
        as_rows(images, what="array")
    assert as_rows(images.transpose(0, 3, 1, 2), what="array").shape == (2, channels, 28, 28)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.float64(3), "of shape (), a single number"),
        (np.zeros(5), "of shape (5,)"),
        (np.zeros(5), "X.reshape(1, -1) for a single row"),
        (np.zeros((2, 5, 5, 5)), "of shape (2, 5, 5, 5), wanted (n, features), (n, H, W), or (n, C, H, W)"),
        (np.zeros((2, 1, 5, 5, 5)), "X.reshape(len(X), -1)"),
        (np.zeros((0, 5)), "of shape (0, 5), wanted at least one row and one feature"),
        (np.zeros((5, 0)), "of shape (5, 0), wanted at least one row and one feature"),
        (np.zeros((5, 1, 0, 3), np.uint8), "wanted at least one row"),
        (np.array([["a", "b"]]), "dtype <U1, wanted real numbers"),
        (np.array([[1, "b"]], object), "dtype object, wanted real numbers"),
        (np.zeros((2, 2), complex), "dtype complex128, wanted real numbers"),
        (np.zeros((2, 2), "M8[s]"), "dtype datetime64[s], wanted real numbers"),
        (None, "of type NoneType and dtype object"),
        ([[1, 2], [3]], "of type list that NumPy cannot read"),
        (torch.ones(2, 2, requires_grad=True), "of type Tensor that NumPy cannot read"),
        (pytest.importorskip("scipy.sparse").csr_matrix(np.eye(3)), "X.toarray()"),
        (np.ma.masked_equal([[1.0, 2.0]], 2.0), "with masked values"),
    ],
)
def test_as_rows_what_cannot_be_rows_is_refused(array: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        as_rows(array, what="array")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_as_rows_not_finite_counts_all_and_names_the_first(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_PIECE_BYTES", 64)  # several pieces, with bad values in two of them
    array: NDArray[Any] = np.zeros((100, 3), dtype)
    array[41, 2] = np.nan
    array[41, 1] = -np.inf
    array[90, 0] = np.inf
    with pytest.raises(InputError, match=r"got 3 NaN or infinite values in here \(first in row 41, column 1\)"):
        as_rows(array, what="here")


def test_as_rows_not_finite_image_names_channel_and_pixel() -> None:
    images = np.zeros((4, 3, 5, 6), np.float32)
    images[2, 1, 3, 4] = np.nan
    with pytest.raises(InputError, match=r"first in row 2, channel 1, y 3, x 4"):
        as_rows(images, what="array")


def test_as_rows_overflow_of_float32_counts_as_infinite() -> None:
    assert as_rows(np.array([[3e38]]), what="array").dtype == np.float32
    with pytest.raises(InputError, match="got 1 NaN or infinite"):
        as_rows(np.array([[1e39]]), what="array")


def test_as_rows_conversion_in_pieces_equals_conversion_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(0).normal(size=(101, 7))
    monkeypatch.setattr(arrays, "_PIECE_BYTES", 1000)
    np.testing.assert_array_equal(as_rows(array, what="array"), array.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64, bool])
def test_as_labels_integers_become_int64(dtype: type) -> None:
    labels = as_labels(np.array([1, 0], dtype), what="file", count=2)
    assert labels.dtype == np.int64
    assert labels.tolist() == [1, 0]


def test_as_labels_strings_stay() -> None:
    assert as_labels(np.array(["cat", "dog"]), what="file", count=2).tolist() == ["cat", "dog"]


@pytest.mark.parametrize(
    "labels", [np.zeros((2, 1), int), np.zeros(3, int), np.array([0.5, 1.0]), np.array([b"a", b"b"])]
)
def test_as_labels_other_shape_or_dtype_is_refused(labels: NDArray[Any]) -> None:
    with pytest.raises(InputError, match=r"got labels of (shape|dtype) .* in file, wanted"):
        as_labels(labels, what="file", count=2)


def test_read_npy_float64_is_mapped_and_as_rows_converts_it(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(5, 3))
    np.save(tmp_path / "rows.npy", array)
    mapped = read_npy(tmp_path / "rows.npy")
    assert isinstance(mapped, np.memmap)
    rows = as_rows(mapped, what="rows.npy")
    assert not isinstance(rows, np.memmap)
    np.testing.assert_array_equal(rows, array.astype(np.float32))


def test_read_npy_pickled_objects_are_refused_without_running_them(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    np.save(tmp_path / "rows.npy", np.array([[Trap()]], object), allow_pickle=True)
    np.savez(tmp_path / "rows.npz", X=np.array([[Trap()]], object), allow_pickle=True)
    with pytest.raises(InputError, match=r"no readable \.npy file"):
        read_npy(tmp_path / "rows.npy")
    with pytest.raises(InputError, match=r"no readable \.npz file"):
        read_npz(tmp_path / "rows.npz")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("keep", [0, 6, 100, -1])
def test_read_npy_cut_short_is_refused(tmp_path: Path, keep: int) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((5, 3)))
    (tmp_path / "rows.npy").write_bytes((tmp_path / "rows.npy").read_bytes()[:keep])
    with pytest.raises(InputError, match=r"rows\.npy, which is no readable \.npy file"):
        read_npy(tmp_path / "rows.npy")


def test_read_npy_damaged_header_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((5, 3)))
    content = (tmp_path / "rows.npy").read_bytes()
    # An unclosed bracket makes NumPy's parser raise tokenize.TokenError, which is not a ValueError.
    (tmp_path / "rows.npy").write_bytes(content.replace(b"(5, 3)", b"((5,3)"))
    with pytest.raises(InputError, match=r"no readable \.npy file"):
        read_npy(tmp_path / "rows.npy")


@pytest.mark.parametrize("name", ["X", "x", "images", "data", "anything"])
@pytest.mark.parametrize("labels_name", ["y", "labels"])
def test_read_npz_finds_rows_and_labels_by_name(tmp_path: Path, name: str, labels_name: str) -> None:
    members: dict[str, Any] = {labels_name: np.array([1, 2]), name: np.eye(2)}
    np.savez(tmp_path / "rows.npz", **members)
    rows, labels = read_npz(tmp_path / "rows.npz")
    np.testing.assert_array_equal(rows, np.eye(2))
    np.testing.assert_array_equal(labels, [1, 2])


def test_read_npz_without_labels_has_none(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "rows.npz", np.eye(2))
    assert read_npz(tmp_path / "rows.npz")[1] is None


@pytest.mark.parametrize(
    "names", [("X", "data"), ("a", "b"), ("y",), ("X", "y", "labels"), ()], ids=lambda names: "+".join(names) or "empty"
)
def test_read_npz_ambiguous_lists_the_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    members: dict[str, Any] = {name: np.zeros((2, 2)) for name in names}
    np.savez(tmp_path / "rows.npz", **members)
    with pytest.raises(
        InputError, match=re.escape(f"with the arrays {', '.join(names) or '(none)'}, wanted one named")
    ):
        read_npz(tmp_path / "rows.npz")


def test_read_npz_damaged_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", X=np.arange(100.0).reshape(10, 10))
    content = bytearray((tmp_path / "rows.npz").read_bytes())
    content[300] ^= 0xFF
    (tmp_path / "changed.npz").write_bytes(content)
    (tmp_path / "short.npz").write_bytes(content[:-30])
    np.save(tmp_path / "single.npy", np.eye(2))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    for name in ("changed", "short", "single"):
        with pytest.raises(InputError, match=rf"{name}\.npz, which is no readable \.npz file"):
            read_npz(tmp_path / f"{name}.npz")
