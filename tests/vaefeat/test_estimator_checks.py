"""Scikit-learn's own checks of an estimator, on the transformer that trains.

Every check trains and exports one or more models for real, so the networks are tiny.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

from vaefeat import VAETransformer

SMALL = VAETransformer(2, hidden_dims=(16,), max_epochs=2, random_state=0)

#: Scikit-learn runs these on its own estimators only. check_param_validation is left out: it asks for a private
#: attribute of theirs; tests/vaefeat/test_config.py has what it would find.
EXTRA: list[Callable[[str, Any], None]] = [
    check_dataframe_column_names_consistency,
    check_get_feature_names_out_error,
    check_inplace_ensure_writeable,
    check_set_output_transform,
    check_transformer_get_feature_names_out,
    check_transformer_get_feature_names_out_pandas,
]
#: Each of these trains a dozen models to say of data frames, or of a global setting, what the one for arrays says.
EXTRA_SLOW: list[Callable[[str, Any], None]] = [
    check_global_output_transform_pandas,
    check_global_set_output_transform_polars,
    check_set_output_transform_pandas,
    check_set_output_transform_polars,
]


@parametrize_with_checks([SMALL], xfail_strict=True)  # type: ignore[untyped-decorator]  # sklearn has no types
def test_transformer_passes_the_estimator_check(estimator: VAETransformer, check: Callable[[Any], None]) -> None:
    check(estimator)


# Those for data frames fit on one and transform an array, or the other way round.
@pytest.mark.filterwarnings("ignore:X .*feature names:UserWarning")
@pytest.mark.parametrize(
    "check", [*EXTRA, *(pytest.param(check, marks=pytest.mark.slow) for check in EXTRA_SLOW)], ids=lambda f: f.__name__
)
def test_transformer_passes_the_check_for_scikit_learns_own(check: Callable[[str, Any], None]) -> None:
    check("VAETransformer", clone(SMALL))
