"""Scaling against scikit-learn and by its promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from vaefeat.model.preprocessing import Preprocessing


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
