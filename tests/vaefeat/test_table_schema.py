"""What columns are, and the way from frames to rows and back, for every library that people have frames in."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from scipy.sparse import csr_matrix

from vaefeat.errors import ConfigError, InputError
from vaefeat.input_spec import InputSpec
from vaefeat.table_fitting import fit_table, is_table
from vaefeat.table_schema import Column, TableSchema

VALUES: dict[str, list[Any]] = {
    "age": [1.5, None, 3.0, 3.0],
    "children": [1, 2, 3, 0],
    "owns": [True, None, False, True],
    "city": ["Rome", "Bonn", None, "Rome"],
    "code": [50, 7, 50, 50],
}
ROWS = np.array(
    [[1.5, 1, 1, 1, 1], [math.nan, 2, math.nan, 0, 0], [3, 3, 0, math.nan, 1], [3, 0, 1, 1, 1]], dtype=np.float32
)
FRAMES: dict[str, Any] = {
    "pandas": pd.DataFrame(VALUES),
    "pandas_nullable": pd.DataFrame(VALUES).convert_dtypes(),
    "polars": pl.DataFrame(VALUES),
    "pyarrow": pa.table(VALUES),
    "objects": np.array(list(zip(*VALUES.values(), strict=True)), dtype=object),
}


@pytest.mark.parametrize("library", FRAMES)
def test_columns_of_every_library_become_the_same_rows(library: str) -> None:
    schema, rows = fit_table(FRAMES[library], categorical=[4])
    np.testing.assert_array_equal(rows, ROWS)
    assert rows.dtype == np.float32
    assert [column.kind for column in schema.columns] == ["number", "number", "boolean", "category", "category"]
    assert [column.optional for column in schema.columns] == [True, False, True, True, False]
    assert [column.categories for column in schema.columns[3:]] == [("Bonn", "Rome"), (7, 50)]
    assert schema.sizes == (0, 0, 1, 2, 2)
    assert schema.optional_columns == (0, 2, 3)


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow"])
def test_rows_become_a_frame_whose_rows_they_are(library: Any) -> None:
    schema, rows = fit_table(FRAMES["pandas"], categorical=["code"])
    np.testing.assert_array_equal(schema.encode(schema.frame(rows, library=library)), rows)


def test_frame_has_categories_booleans_and_missing_values_of_its_library() -> None:
    schema, rows = fit_table(FRAMES["pandas"], categorical=["code"])
    frame = schema.frame(rows)
    assert frame["city"].tolist()[:2] == ["Rome", "Bonn"]
    assert frame["city"].cat.categories.tolist() == ["Bonn", "Rome"]
    assert frame.isna().to_numpy().tolist() == np.isnan(rows).tolist()
    assert frame["code"].tolist() == VALUES["code"]
    assert schema.frame(rows, library="polars")["city"].to_list() == VALUES["city"]
    assert schema.frame(rows, library="pyarrow")["owns"].to_pylist() == VALUES["owns"]
    np.testing.assert_array_equal(schema.frame(rows, library="numpy"), FRAMES["objects"])


def test_order_of_a_categorical_type_is_kept_with_categories_that_do_not_occur() -> None:
    sizes = pd.Categorical(["l", "s", "l"], categories=["s", "m", "l"], ordered=True)
    for frame in (pd.DataFrame({"size": sizes}), pl.DataFrame({"size": ["l", "s", "l"]}, {"size": pl.Enum("sml")})):
        schema, rows = fit_table(frame)
        assert schema.columns[0].categories == ("s", "m", "l")
        np.testing.assert_array_equal(rows, [[2], [0], [2]])


def test_polars_categories_of_other_columns_are_not_taken_in() -> None:
    frame = pl.DataFrame({"a": ["x", "y"], "b": ["y", "z"]}, {"a": pl.Categorical, "b": pl.Categorical})
    schema, _ = fit_table(frame)
    assert [column.categories for column in schema.columns] == [("x", "y"), ("y", "z")]


def test_numeric_array_is_rows_already() -> None:
    array = np.array([[0.5, 2], [math.nan, 0], [1.5, 4]])
    schema, rows = fit_table(array, categorical=[1])
    np.testing.assert_array_equal(rows, array.astype(np.float32))
    assert schema.columns[1].categories == (0, 1, 2, 3, 4)
    assert not schema.named


@pytest.mark.parametrize("codes", [[-1.0, 0.0], [0.5, 1.0]])
def test_numeric_array_whose_categories_are_not_numbered_is_refused(codes: list[float]) -> None:
    with pytest.raises(InputError, match=r"in column 'x0', wanted the numbers of categories.*OrdinalEncoder"):
        fit_table(np.array(codes)[:, None], categorical=[0])


def test_schema_survives_json_and_keeps_the_rows() -> None:
    schema, rows = fit_table(FRAMES["polars"], categorical=["code"], handle_unknown="ignore")
    schema = schema.scaled([2.5, 1.5, 0, 0, 0], [1.0, 2.0, 1, 1, 1])
    again = TableSchema.from_dict(json.loads(json.dumps(schema.to_dict(), allow_nan=False)))
    assert again == schema
    assert again.columns[0].mean == 2.5
    assert again.columns[2].mean is None
    np.testing.assert_array_equal(again.encode(FRAMES["pandas"]), rows)


@pytest.mark.parametrize(
    ("X", "told", "is_one"),
    [
        (np.ones((2, 2)), None, False),
        (np.ones((2, 2)), [0], True),
        (np.array([[1.0, np.nan]]), None, True),
        (np.full((1, 1, 2, 2), np.nan), None, False),
        (pd.DataFrame({"a": [1, 2]}), None, False),
        (pd.DataFrame({"a": [1.0, None]}), None, True),
        (pd.DataFrame({"a": [True, False]}), None, True),
        (pl.DataFrame({"a": ["x"]}), None, True),
        (np.array([[1, 2]], dtype=object), None, False),
        (np.array([[1, "x"]], dtype=object), None, True),
        ([[1.0, 2.0]], None, False),
        ([[1.0], [1.0, 2.0]], None, False),
        (csr_matrix(np.eye(2)), None, False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_table_is_what_has_categories_booleans_or_gaps(X: Any, told: Any, is_one: bool) -> None:
    assert is_table(X, categorical=told) is is_one


@pytest.mark.parametrize(
    ("X", "told", "message"),
    [
        (pd.DataFrame({"when": pd.to_datetime(["2020-01-01"])}), None, "column 'when' of type Datetime"),
        (pd.DataFrame({"a": [None, None]}, dtype=object), None, "'a' without a single value"),
        (pd.DataFrame({"a": [1.0, np.inf]}), [], "inf in column 'a' \\(row 1\\)"),
        (pd.DataFrame({"a": [1, "x"]}), None, "types int, str in column 'a'"),
        (pd.DataFrame({"id": [f"{i}" for i in range(1001)]}), None, "1,001 categories in column 'id'"),
        (pd.DataFrame({"a": ["x"]}), "a", "wanted a list of columns"),
        (pd.DataFrame({"height": ["x"]}), [3], "a number from 0 to 0"),
        (pd.DataFrame({"a": ["x"]}).iloc[:0], None, "0 rows"),
        (csr_matrix(np.eye(2)), None, "toarray"),
        (np.ma.masked_greater(np.ones((2, 2)), 0), [0], "X.filled"),
    ],
)
def test_what_cannot_be_a_column_is_refused_by_its_name(X: Any, told: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_table(X, categorical=told)


def test_unknown_column_among_the_categorical_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'height'"):
        fit_table(pd.DataFrame({"height": [1], "age": [2]}), categorical=["hieght"])


def changed(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame({**VALUES, **columns})


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (
            changed(city=["Rome", "Oslo", None, "Rome"]),
            r"category 'Oslo' in column 'city' \(row 1\), wanted 'Bonn', 'Rome'",
        ),
        (changed(code=[50, 7, 8, 7]), r"category 8 in column 'code' \(row 2\)"),
        (changed(children=[1, 2, None, 0]), r"no value in column 'children' \(row 2\), where none was missing"),
        (changed(age=["old"] * 4), "'old' in column 'age', wanted numbers"),
        (changed(owns=[2, 0, 1, 1]), "other values than true and false in column 'owns'"),
        (changed()[["children", "age", "owns", "city", "code"]], "another order"),
        (changed().rename(columns={"age": "years"}), r"without age, with years"),
        (changed().drop(columns="age"), r"got 4 columns \(without age\)"),
        (changed().iloc[:0], "0 rows"),
    ],
)
def test_frame_that_is_not_as_in_training_is_refused_with_column_and_value(frame: Any, message: str) -> None:
    schema, _ = fit_table(FRAMES["pandas"], categorical=["code"])
    with pytest.raises(InputError, match=message):
        schema.encode(frame)


def test_unknown_category_under_ignore_is_missing_in_frames_and_in_rows() -> None:
    schema, rows = fit_table(FRAMES["pandas"], categorical=["code"], handle_unknown="ignore")
    got = schema.encode(changed(city=["Rome", "Oslo", None, "Rome"], code=[50, 7, 8, 50]))
    wanted = rows.copy()
    wanted[1, 3] = wanted[2, 4] = np.nan
    np.testing.assert_array_equal(got, wanted)
    coded = rows.copy()
    coded[1, 3], coded[2, 4] = -1, 2
    np.testing.assert_array_equal(schema.checked(coded), wanted)
    assert coded[1, 3] == -1, "the caller's rows were changed"


@pytest.mark.parametrize(("column", "value"), [(3, 2.0), (3, -1.0), (3, 0.5), (2, 2.0), (0, np.inf), (1, np.nan)])
def test_rows_that_no_frame_gives_are_refused_by_column(column: int, value: float) -> None:
    schema, rows = fit_table(FRAMES["pandas"], categorical=["code"])
    spec = InputSpec.of(rows, table=schema)
    wrong = rows.copy()
    wrong[3, column] = value
    with pytest.raises(InputError, match=rf"column '{schema.columns[column].name}' \(row 3\)"):
        spec.prepare(wrong)


def test_input_spec_of_a_table_takes_frames_rows_and_no_other_width() -> None:
    schema, rows = fit_table(FRAMES["pandas"], categorical=["code"])
    spec = InputSpec.of(rows, table=schema)
    assert InputSpec.from_dict(json.loads(json.dumps(spec.to_dict(), allow_nan=False))) == spec
    for X in (FRAMES["polars"], rows.astype(np.float64), FRAMES["objects"], FRAMES["objects"].tolist()):
        np.testing.assert_array_equal(spec.prepare(X), rows)
    with pytest.raises(InputError, match=r"got rows of shape \(4, 4\), wanted a table of 5 columns"):
        spec.prepare(rows[:, :4])
    hole = rows.copy()
    hole[0, 1] = np.nan
    np.testing.assert_array_equal(spec.prepare(hole, holes=True), hole)


@pytest.mark.parametrize(
    "fields",
    [{"kind": "date"}, {"categories": ("a",)}, {"kind": "category"}, {"name": 3}, {"mean": "x"}, {"optional": 1}],
)
def test_column_that_no_table_has_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="of no column"):
        Column(**{"name": "a", "kind": "number", **fields})


def test_bundle_input_without_a_table_is_described_as_before() -> None:
    spec = InputSpec.of(np.ones((2, 3), np.float32))
    assert set(spec.to_dict()) == {"kind", "shape", "dtype", "low", "high"}
