"""Rows at the door: accepted as they are, converted without loss, or refused with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from sklearn.preprocessing import OneHotEncoder

from vaefeat.errors import BundleError, InputError
from vaefeat.input_spec import InputSpec

PIXELS = InputSpec(kind="image", shape=(1, 2, 3), dtype="uint8", low=0, high=255)
TABLE = InputSpec(kind="vector", shape=(6,), dtype="float32", low=-4, high=9)
UNIT = InputSpec(kind="image", shape=(1, 2, 3), dtype="float32", low=0, high=1)
SIXTEENTHS = InputSpec(kind="vector", shape=(6,), dtype="float32", low=0, high=16)

ROWS = np.array([[0, 1, 2, 127, 128, 255], [9, 8, 7, 6, 5, 4]], dtype=np.uint8)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "uint64", "float16", "float32", "float64", ">f4", ">i2"])
def test_prepare_whole_numbers_of_any_dtype_gives_uint8(dtype: str) -> None:
    prepared = PIXELS.prepare(ROWS.astype(dtype))
    assert prepared.dtype == np.uint8
    np.testing.assert_array_equal(prepared, ROWS.reshape(2, 1, 2, 3))


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint8", "float16", "float64", ">f4", ">f8"])
def test_prepare_numbers_of_any_dtype_gives_native_float32(dtype: str) -> None:
    rows = (ROWS // 3).astype(dtype)
    prepared = TABLE.prepare(rows)
    assert prepared.dtype == np.dtype("=f4")
    np.testing.assert_array_equal(prepared, (ROWS // 3).astype(np.float32))


def test_prepare_booleans_become_zero_and_one() -> None:
    rows = ROWS > 5
    np.testing.assert_array_equal(PIXELS.prepare(rows).reshape(2, 6), rows)
    np.testing.assert_array_equal(TABLE.prepare(rows), rows)


def test_prepare_lists_and_frames_become_rows() -> None:
    for rows in (ROWS.tolist(), pd.DataFrame(ROWS), torch.from_numpy(ROWS)):
        np.testing.assert_array_equal(PIXELS.prepare(rows).reshape(2, 6), ROWS)


@pytest.mark.parametrize("bad", [0.5, 256.0, 1e9, -1.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_prepare_floats_that_are_no_pixels_names_the_row(bad: float, dtype: str) -> None:
    rows = ROWS.astype(dtype)
    rows[1, 4] = bad
    with pytest.raises(InputError, match=rf"got {dtype} rows .*whole numbers from 0 to 255 \(first in row 1\)"):
        PIXELS.prepare(rows)


def test_prepare_one_wrong_value_far_down_is_found_in_its_row() -> None:
    # Many parts are converted one after another, and the last one is short.
    rows = np.tile(ROWS, (10_000, 1)).astype(np.float64)
    np.testing.assert_array_equal(PIXELS.prepare(rows).reshape(rows.shape), rows)
    rows[19_999, 5] += 0.5
    with pytest.raises(InputError, match=r"\(first in row 19999\)"):
        PIXELS.prepare(rows)


@pytest.mark.parametrize("first", [1.0, 0.5], ids=["black and white", "grey"])
def test_prepare_floats_up_to_one_into_pixels_up_to_255_are_refused(first: float) -> None:
    rows = np.zeros((2, 6))
    rows[0, 0], rows[1, 5] = first, 1.0
    with pytest.raises(InputError, match=r"values up to 1, .*leave out the division by 255"):
        PIXELS.prepare(rows)


@pytest.mark.parametrize(("bad", "dtype"), [(256, "int64"), (-1, "int8"), (-1, "int64"), (2**32, "uint64")])
def test_prepare_integers_that_are_no_pixels_are_refused(bad: int, dtype: str) -> None:
    rows = np.minimum(ROWS, 100).astype(dtype)
    rows[0, 0] = bad
    with pytest.raises(InputError, match="whole numbers from 0 to 255"):
        PIXELS.prepare(rows)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39, -1e300])
def test_prepare_not_finite_in_float32_is_refused_with_count_and_row(bad: float) -> None:
    rows = ROWS.astype(np.float64)
    rows[1, 2:4] = bad
    with pytest.raises(InputError, match=r"got 2 NaN or infinite values \(first in row 1\).*SimpleImputer"):
        TABLE.prepare(rows)


def test_prepare_finite_values_whose_sum_overflows_are_accepted() -> None:
    # The check adds all values up; added in float32, these are infinite.
    rows = np.full((4, 6), np.finfo(np.float32).max, dtype=np.float32)
    np.testing.assert_array_equal(TABLE.prepare(rows), rows)
    rows[::2] *= -1
    np.testing.assert_array_equal(TABLE.prepare(rows), rows)


def test_prepare_opposite_infinities_do_not_cancel() -> None:
    rows = np.zeros((2, 6), dtype=np.float32)
    rows[0, 0], rows[1, 0] = np.inf, -np.inf
    with pytest.raises(InputError, match="got 2 NaN or infinite values"):
        TABLE.prepare(rows)


@pytest.mark.parametrize("spec", [PIXELS, UNIT], ids=["uint8", "float32"])
def test_prepare_flat_and_shaped_rows_give_the_same(spec: InputSpec) -> None:
    flat = (ROWS > 4).astype(spec.dtype)
    prepared = spec.prepare(flat)
    assert prepared.shape == (2, 1, 2, 3)
    np.testing.assert_array_equal(prepared, spec.prepare(flat.reshape(2, 1, 2, 3)))


@pytest.mark.parametrize(
    ("shape", "hint"),
    [((6,), True), ((1, 2, 3), True), ((2, 5), False), ((2, 2, 3), False), ((2, 1, 3, 2), False), ((), False)],
)
def test_prepare_another_shape_is_refused_and_a_single_row_gets_a_hint(shape: tuple[int, ...], hint: bool) -> None:
    with pytest.raises(InputError, match="wanted uint8 rows of shape") as caught:
        PIXELS.prepare(np.zeros(shape, np.uint8))
    assert f"got rows of shape {shape}" in str(caught.value)
    assert ("rows[None]" in str(caught.value)) == hint


@pytest.mark.parametrize("shape", [(0, 6), (0, 1, 2, 3)])
def test_prepare_no_rows_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="got 0 rows, wanted at least one"):
        PIXELS.prepare(np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    "rows",
    [
        np.array([["1", "2", "3", "4", "5", "6"]]),
        np.array([[b"1", b"2", b"3", b"4", b"5", b"6"]]),
        np.array([[1, 2, 3, 4, 5, None]]),
        ROWS.astype(np.complex64),
        ROWS.astype("datetime64[s]"),
        None,
    ],
    ids=lambda rows: type(rows).__name__ if not isinstance(rows, np.ndarray) else str(rows.dtype),
)
@pytest.mark.parametrize("spec", [PIXELS, TABLE], ids=["uint8", "float32"])
def test_prepare_what_is_not_real_numbers_is_refused_by_dtype(rows: Any, spec: InputSpec) -> None:
    with pytest.raises(InputError, match=r"got rows of dtype .*convert every column to numbers"):
        spec.prepare(rows)


@pytest.mark.parametrize("spec", [PIXELS, TABLE], ids=["uint8", "float32"])
def test_prepare_sparse_rows_are_refused_with_what_to_do(spec: InputSpec) -> None:
    with pytest.raises(InputError, match=r"got a sparse csr_matrix, .*pass X\.toarray\(\)"):
        spec.prepare(OneHotEncoder().fit_transform(ROWS.reshape(len(ROWS), -1)))


@pytest.mark.parametrize(
    "rows", [[[1.0], [1.0, 2.0]], torch.ones(2, 6, requires_grad=True)], ids=["ragged", "gradient"]
)
def test_prepare_what_numpy_cannot_read_is_an_input_error(rows: Any) -> None:
    with pytest.raises(InputError, match="that NumPy cannot read"):
        TABLE.prepare(rows)


def test_prepare_masked_values_are_refused_and_an_empty_mask_is_not() -> None:
    masked = np.ma.masked_greater(ROWS, 200)
    with pytest.raises(InputError, match=r"masked values.*filled"):
        PIXELS.prepare(masked)
    np.testing.assert_array_equal(PIXELS.prepare(np.ma.masked_array(ROWS)).reshape(2, 6), ROWS)


def test_prepare_uint8_for_a_bundle_trained_in_zero_to_one_is_refused() -> None:
    with pytest.raises(InputError, match="from 0 to 1; divide by 255"):
        UNIT.prepare(ROWS)
    np.testing.assert_array_equal(UNIT.prepare(ROWS / 255).reshape(2, 6), (ROWS / 255).astype(np.float32))


@pytest.mark.parametrize("spec", [SIXTEENTHS, TABLE], ids=["0..16", "-4..9"])
def test_prepare_uint8_for_a_float_bundle_of_larger_range_is_accepted(spec: InputSpec) -> None:
    np.testing.assert_array_equal(spec.prepare(ROWS), ROWS.astype(np.float32))


@pytest.mark.parametrize(("spec", "rows"), [(PIXELS, ROWS), (TABLE, ROWS.astype(np.float32))], ids=["uint8", "float32"])
def test_prepare_with_nothing_to_change_gives_a_view(spec: InputSpec, rows: NDArray[Any]) -> None:
    assert np.shares_memory(spec.prepare(rows), rows)


def test_prepare_never_changes_what_it_was_given() -> None:
    for rows in (ROWS.astype(np.float64), ROWS.astype(np.float32), ROWS.copy()):
        before = rows.copy()
        PIXELS.prepare(rows)
        np.testing.assert_array_equal(rows, before)


@pytest.mark.parametrize("spec", [PIXELS, SIXTEENTHS], ids=["uint8", "float32"])
def test_prepare_strided_rows_become_contiguous_with_the_same_values(spec: InputSpec) -> None:
    rows = np.zeros((4, 12), dtype=spec.dtype)
    rows[::2, ::2] = ROWS
    for strided in (rows[::2, ::2], np.asfortranarray(rows[::2, ::2]), rows[2::-2, ::2][::-1]):
        prepared = spec.prepare(strided)
        assert prepared.flags.c_contiguous
        np.testing.assert_array_equal(prepared.reshape(2, 6), ROWS)


@pytest.mark.parametrize("spec", [PIXELS, SIXTEENTHS], ids=["uint8", "float32"])
def test_prepare_read_only_memory_map_is_viewed_not_read_in(spec: InputSpec, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", ROWS.astype(spec.dtype))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    prepared = spec.prepare(mapped)
    assert np.shares_memory(prepared, mapped)
    np.testing.assert_array_equal(prepared.reshape(2, 6), ROWS)


@pytest.mark.parametrize(
    ("rows", "kind", "dtype"),
    [(ROWS, "vector", "uint8"), (ROWS.reshape(2, 1, 2, 3).astype(np.float32), "image", "float32")],
)
def test_spec_of_training_rows_survives_json(rows: NDArray[Any], kind: str, dtype: str) -> None:
    spec = InputSpec.of(rows)
    assert (spec.kind, spec.dtype, spec.shape, spec.low, spec.high) == (kind, dtype, rows.shape[1:], 0, 255)
    assert InputSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert (spec.n_features, spec.row_bytes) == (6, 6 * rows.itemsize)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "sound"},
        {"dtype": "int64"},
        {"shape": [6]},
        {"shape": [1, 2, "3"]},
        {"shape": [1, 2, 0]},
        {"shape": "123"},
        {"low": None},
        {"kind": ["image"]},
    ],
    ids=str,
)
def test_spec_with_fields_of_no_bundle_of_ours_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="got an input described by"):
        InputSpec.from_dict({**PIXELS.to_dict(), **change})


def test_unscaled_pixels_into_a_bundle_of_scaled_ones_are_refused() -> None:
    spec = InputSpec(kind="image", shape=(1, 2, 2), dtype="float32", low=0.0, high=1.0)
    with pytest.raises(InputError, match=r"got values up to 255.*divide by 255"):
        spec.prepare(np.full((3, 4), 255.0))
    assert spec.prepare(np.full((3, 4), 1.2)).max() == np.float32(1.2)


def test_pixels_become_rows_in_the_units_of_training() -> None:
    pixels = ROWS.reshape(2, 1, 2, 3)
    assert PIXELS.of_pixels(pixels).dtype == np.uint8
    np.testing.assert_array_equal(PIXELS.of_pixels(pixels), pixels)
    np.testing.assert_array_equal(UNIT.of_pixels(pixels), pixels * np.float32(1 / 255))
    wide = InputSpec(kind="image", shape=(1, 2, 3), dtype="float32", low=0, high=255)
    assert wide.of_pixels(pixels).dtype == np.float32
    np.testing.assert_array_equal(wide.of_pixels(pixels), pixels)
