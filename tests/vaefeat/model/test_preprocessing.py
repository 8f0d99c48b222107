"""Scaling against scikit-learn and by its promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from vaefeat.model.preprocessing import Preprocessing, Scaling


def test_standard_scaling_of_a_table_equals_sklearns() -> None:
    table = load_breast_cancer().data.astype(np.float32)
    got = Preprocessing.fit(table, "standard")(torch.from_numpy(table)).numpy()
    np.testing.assert_allclose(got, StandardScaler().fit_transform(table.astype(np.float64)), atol=2e-5)


def test_unit_scaling_of_a_table_equals_sklearns() -> None:
    table = load_breast_cancer().data.astype(np.float32)
    got = Preprocessing.fit(table, "unit")(torch.from_numpy(table)).numpy()
    np.testing.assert_allclose(got, MinMaxScaler().fit_transform(table.astype(np.float64)), atol=2e-6)


def test_unit_scaling_of_byte_images_divides_by_255() -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 5, 5), dtype=np.uint8)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 0, 255
    got = Preprocessing.fit(images, "unit")(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(got, images / 255, rtol=1e-6)


def test_unit_scaling_of_images_with_few_levels_fills_the_unit_interval(digits_rows: np.ndarray) -> None:
    got = Preprocessing.fit(digits_rows, "unit")(torch.from_numpy(digits_rows))
    assert (got.min().item(), got.max().item()) == (0.0, 1.0)


def test_unit_scaling_of_signed_images_maps_the_lowest_value_to_zero() -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (50, 1, 5, 5)).astype(np.float32)
    got = Preprocessing.fit(images, "unit")(torch.from_numpy(images))
    assert got.min().item() == pytest.approx(0, abs=1e-6)
    assert got.max().item() == pytest.approx(1, abs=1e-6)


def test_standard_scaling_of_images_has_one_scale_a_channel() -> None:
    images = np.random.default_rng(0).normal([[[5]], [[0]]], [[[3]], [[1]]], (400, 2, 4, 4)).astype(np.float32)
    got = Preprocessing.fit(images, "standard")(torch.from_numpy(images))
    torch.testing.assert_close(got.mean(dim=(0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.std(dim=(0, 2, 3), correction=0), torch.ones(2), atol=1e-5, rtol=0)


def test_inverse_undoes_forward() -> None:
    table = load_breast_cancer().data.astype(np.float32)
    scaling = Preprocessing.fit(table, "standard")
    back = scaling.inverse(scaling(torch.from_numpy(table)))
    np.testing.assert_allclose(back.numpy(), table, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scaling", ["unit", "standard"])
def test_constant_column_becomes_zero_and_stays_finite(scaling: str) -> None:
    table = np.column_stack([np.full(30, 7.0), np.arange(30.0)]).astype(np.float32)
    got = Preprocessing.fit(table, scaling)(torch.from_numpy(table))  # type: ignore[arg-type]
    assert (got[:, 0] == 0).all()
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_ids_are_left_exactly_as_they_are(dtype: type[np.generic]) -> None:
    rows = np.arange(250).astype(dtype).reshape(-1, 5)
    scaling = Preprocessing.fit(rows, "none", levels=300)
    got = scaling(torch.from_numpy(rows))
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), rows)
    np.testing.assert_array_equal(scaling.inverse(got).numpy(), rows)


def test_ids_are_rounded_and_saturate_at_the_vocabulary() -> None:
    scaling = Preprocessing.fit(np.zeros((2, 4), dtype=np.float32), "none", levels=10)
    assert scaling(torch.tensor([[-3.0, 3.9999, 8.6, 200.0]])).tolist() == [[0, 4, 9, 9]]


def test_ids_saturate_at_the_highest_of_the_rows_when_the_vocabulary_is_unknown() -> None:
    scaling = Preprocessing.fit(np.array([[3.0, 1.0]], dtype=np.float32), "none")
    assert scaling(torch.tensor([[2.0, 4.0]])).tolist() == [[2, 3]]


@pytest.mark.parametrize("scaling", ["unit", "standard", "none"])
@pytest.mark.parametrize("shape", [(6,), (2, 3, 4)])
def test_state_loads_into_the_identity_of_the_same_scaling(scaling: Scaling, shape: tuple[int, ...]) -> None:
    rows = np.random.default_rng(0).integers(0, 9, (20, *shape)).astype(np.float32)
    fitted = Preprocessing.fit(rows, scaling, levels=9)
    restored = Preprocessing.identity(shape, scaling)
    restored.load_state_dict(fitted.state_dict())
    others = torch.from_numpy(rows) + 0.3
    torch.testing.assert_close(restored(others), fitted(others), rtol=0, atol=0)
