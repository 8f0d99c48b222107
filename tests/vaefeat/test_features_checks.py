"""Scikit-learn's own checks of an estimator, on VAEFeatures.

A bundle takes rows of one width, and the checks fit rows of many: the estimator under test finds a tiny encoder for the
rows it is given, and is VAEFeatures from there on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Self

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.utils.estimator_checks import (
    check_dataframe_column_names_consistency,
    check_get_feature_names_out_error,
    check_global_output_transform_pandas,
    check_global_set_output_transform_polars,
    check_inplace_ensure_writeable,
    check_set_output_transform,
    check_set_output_transform_pandas,
    check_set_output_transform_polars,
    check_transformer_get_feature_names_out,
    check_transformer_get_feature_names_out_pandas,
    parametrize_with_checks,
)

from vaefeat import Bundle, ModelConfig, TrainConfig, VAEFeatures, pretrain


@cache
def tiny_bundle(width: int) -> Bundle:
    rows = np.random.default_rng(0).normal(size=(100, width)).astype(np.float32)
    model = ModelConfig(latent_dim=2, hidden_dims=(16,))
    return pretrain(rows, model=model, train=TrainConfig(max_epochs=1), progress=False)


class AnyWidthFeatures(VAEFeatures):
    """VAEFeatures with a bundle of its own for each width of rows."""

    def __init__(self, encoder: Any = None, *, output: str = "mean") -> None:
        super().__init__(encoder, output=output)

    def fit(self, X: Any, y: Any = None) -> Self:
        given, shape = self.encoder, np.asarray(X).shape
        # What has no rows, or no columns, is refused whatever the bundle.
        self.encoder = tiny_bundle(shape[1] if len(shape) == 2 and shape[1] else 4)
        try:
            return super().fit(X, y)
        finally:
            self.encoder = given


#: Scikit-learn runs these on its own estimators only.
EXTRA: list[Callable[[str, Any], None]] = [
    check_dataframe_column_names_consistency,
    check_get_feature_names_out_error,
    check_global_output_transform_pandas,
    check_global_set_output_transform_polars,
    check_inplace_ensure_writeable,
    check_set_output_transform,
    check_set_output_transform_pandas,
    check_set_output_transform_polars,
    check_transformer_get_feature_names_out,
    check_transformer_get_feature_names_out_pandas,
]


@parametrize_with_checks([AnyWidthFeatures()], xfail_strict=True)  # type: ignore[untyped-decorator]  # no types
def test_features_pass_the_estimator_check(estimator: AnyWidthFeatures, check: Callable[[Any], None]) -> None:
    check(estimator)


# Those for data frames fit on one and transform an array, or the other way round.
@pytest.mark.filterwarnings("ignore:X .*feature names:UserWarning")
@pytest.mark.parametrize("check", EXTRA, ids=lambda f: f.__name__)
def test_features_pass_the_check_for_scikit_learns_own(check: Callable[[str, Any], None]) -> None:
    check("AnyWidthFeatures", clone(AnyWidthFeatures(output="hidden")))
