"""What estimators are given, made into what the library takes: rows of two axes or four, and settings from grids."""

from __future__ import annotations

import contextlib
import math
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import Tags
from sklearn.utils.validation import validate_data

from vaefeat.data import Rows
from vaefeat.errors import ConfigError, InputError
from vaefeat.input_spec import InputSpec
from vaefeat.settings import plain_value
from vaefeat.table_columns import column_names
from vaefeat.table_fitting import fit_table, is_table
from vaefeat.table_schema import HandleUnknown

__all__ = [
    "checked_rows",
    "flat_images",
    "given_settings",
    "named_as",
    "named_augmentations",
    "plain_settings",
    "taking_tables",
    "training_data",
    "training_rows",
]


def training_data(
    estimator: BaseEstimator,
    X: Any,
    image_shape: tuple[int, int, int] | None,
    *,
    categorical: Any,
    handle_unknown: HandleUnknown,
    like: InputSpec | None = None,
) -> Rows:
    """Check the rows that an estimator is fitted to, and fit the columns of a table.

    Parameters
    ----------
    estimator, X, image_shape
        As of :func:`training_rows`; `X` may also be what :func:`vaefeat.table_fitting.is_table` calls a table.
    categorical : list of str or int, or None
    handle_unknown : {"error", "ignore"}
        As of :func:`vaefeat.table_fitting.fit_table`.
    like : InputSpec, optional
        Of the rows before, which these must be like; their columns are not fitted again.

    Raises
    ------
    ValueError
        What those two raise.
    """
    if categorical is not None and not isinstance(categorical, list | tuple | np.ndarray):
        raise InputError(f"got categorical_features={categorical!r}, wanted a list of column names or numbers, or None")
    if handle_unknown not in get_args(HandleUnknown):
        raise InputError(f"got handle_unknown={handle_unknown!r}, wanted 'error' or 'ignore'")
    if like is not None and like.table is not None:
        return Rows(array=like.prepare(checked_rows(estimator, X, like, reset=False)), table=like.table)
    if image_shape is not None or not (categorical is not None or is_table(X)):
        return Rows(array=training_rows(estimator, X, image_shape, reset=like is None), columns=column_names(X))
    told = None if categorical is None else list(categorical)
    schema, rows = fit_table(X, categorical=told, handle_unknown=handle_unknown)
    validate_data(estimator, X, skip_check_array=True)
    return Rows(array=rows, table=schema)


def checked_rows(estimator: BaseEstimator, X: Any, spec: InputSpec, *, reset: bool, finite: bool = True) -> Any:
    """Check rows in scikit-learn's way, as far as it knows them, for :meth:`InputSpec.prepare` to take.

    Names of columns are compared with those in the bundle, too: the estimator may never have seen its training rows. Of
    tables it is given the columns' names and number: what stands in them is the schema's to judge. With ``finite``
    false NaN and infinity are left to :meth:`InputSpec.prepare`, too.
    """
    if spec.table is None:
        flat = flat_images(X, spec.shape)
        rows = validate_data(estimator, flat, dtype="numeric", ensure_all_finite=finite, reset=reset)
        spec.compare_names(X)
        return rows
    validate_data(estimator, X, skip_check_array=True, reset=reset)
    return X


def taking_tables(tags: Tags) -> Tags:
    """Say in scikit-learn's tags that text, categories and missing values are taken."""
    inputs = tags.input_tags
    inputs.allow_nan = inputs.categorical = inputs.string = True
    return tags


def training_rows(
    estimator: BaseEstimator, X: Any, image_shape: tuple[int, int, int] | None, *, reset: bool = True
) -> NDArray[Any]:
    """Check the rows that an estimator is fitted to, in scikit-learn's way, and give them their shape.

    Parameters
    ----------
    estimator : BaseEstimator
        Gets ``n_features_in_`` and, where `X` has column names, ``feature_names_in_``.
    X : array-like of shape (n, n_features) or (n, C, H, W)
    image_shape : tuple of int, optional
        (C, H, W) of the images in flat rows.
    reset : bool
        Whether these are the first rows, and not ones that must be like those before.

    Returns
    -------
    ndarray of shape (n, n_features) or (n, C, H, W), uint8 or float32

    Raises
    ------
    ValueError
        Fewer than two rows, values that are not finite numbers, or (InputError) another shape.
    """
    shape = _image_shape(X, image_shape)
    rows: NDArray[Any] = validate_data(
        estimator, flat_images(X, shape), dtype=[np.float32, np.uint8], ensure_min_samples=2, reset=reset
    )
    if shape is None:
        return rows
    if rows.shape[1] != (n_pixels := math.prod(shape)):
        raise InputError(
            f"got rows of {rows.shape[1]} values, wanted {n_pixels} values for image_shape={shape}; "
            "give the (C, H, W) that the rows have"
        )
    return rows.reshape(len(rows), *shape)


def flat_images(X: Any, image_shape: tuple[int, ...] | None) -> Any:
    """Flatten images (n, C, H, W) of the expected shape, so that scikit-learn's two-dimensional checks apply.

    Anything else is handed on as it is, for those checks to judge.
    """
    if np.ma.is_masked(X):
        raise InputError("got rows with masked values, wanted plain ones; fill them first with X.filled(...)")
    shape = tuple(getattr(X, "shape", ()))
    if len(shape) == 4 and shape[1:] == image_shape:
        return np.asarray(X).reshape(shape[0], -1)
    return X


def _image_shape(X: Any, asked: tuple[int, int, int] | None) -> tuple[int, ...] | None:
    shape = tuple(getattr(X, "shape", ()))
    if asked is None:
        return shape[1:] if len(shape) == 4 else None
    try:
        wanted = tuple(operator.index(size) for size in asked)
    except TypeError:
        wanted = ()
    if len(wanted) != 3 or min(wanted) < 1:
        raise InputError(f"got image_shape={asked!r}, wanted (channels, height, width), all at least 1")
    if len(shape) == 4 and shape[1:] != wanted:
        raise InputError(
            f"got rows of shape {shape[1:]}, wanted image_shape={wanted}; give the (C, H, W) that they have"
        )
    return wanted


def named_augmentations(asked: Any) -> tuple[str, ...]:
    """Refuse augmentations that are no sequence of names."""
    if not isinstance(asked, tuple | list) or not all(isinstance(name, str) for name in asked):
        raise ConfigError(f"got augmentations={asked!r}, wanted 'auto' or a tuple of names; () for none")
    return tuple(asked)


def plain_settings(own: Mapping[str, Any], options: Mapping[str, Any] | None, *, what: str) -> Mapping[str, Any]:
    """Lay options beside the estimator's own settings, and turn NumPy's numbers, as grids have, into Python's."""
    if options is not None and not isinstance(options, Mapping):
        raise InputError(f"got {what}={options!r}, wanted a mapping of field names to values, or None")
    if both := sorted(own.keys() & (options or {}).keys()):
        raise InputError(f"got {both[0]!r} in {what}, which the estimator sets itself; give it as its own parameter")
    return {key: plain_value(value) for key, value in {**own, **(options or {})}.items()}


@contextlib.contextmanager
def named_as(**own: str) -> Iterator[None]:
    """Have errors about a field of the configuration, its name given first, speak of the estimator's own parameter."""
    try:
        yield
    except ConfigError as error:
        text = str(error)
        for field, parameter in own.items():
            text = re.sub(rf"\b{field}\b", parameter, text)
        raise type(error)(text) from error


def given_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is None: the preset sets it."""
    return {key: value for key, value in settings.items() if value is not None}
