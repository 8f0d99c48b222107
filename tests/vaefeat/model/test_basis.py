"""Axes along which all variances are the same."""

from __future__ import annotations

import numpy as np
import pytest

from vaefeat.model.basis import equal_variance_basis


@pytest.mark.parametrize(
    "variances", [[1.0], [3.0, 3.0], [5.0, 0.0, 0.0], [100.0, 1.0, 1e-6, 1e-6, 2.0], np.arange(40.0)]
)
def test_axes_are_orthogonal_and_variances_equal(variances: list[float]) -> None:
    n = len(variances)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(n, n)))[0]
    covariance = turn @ np.diag(variances) @ turn.T
    axes = equal_variance_basis(covariance)
    np.testing.assert_allclose(axes @ axes.T, np.eye(n), atol=1e-10)
    along = np.diag(axes @ covariance @ axes.T)
    np.testing.assert_allclose(along, np.mean(variances), rtol=1e-6)


def test_no_variance_at_all_has_axes_too() -> None:
    axes = equal_variance_basis(np.zeros((4, 4)))
    np.testing.assert_allclose(axes @ axes.T, np.eye(4), atol=1e-10)


def test_axes_are_the_same_each_time() -> None:
    covariance = np.diag([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(equal_variance_basis(covariance), equal_variance_basis(covariance))
