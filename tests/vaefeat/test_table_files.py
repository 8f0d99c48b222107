"""Tables written to files: CSV that people, and their diff, can read."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import csv

from vaefeat.table_files import write_frame


def test_csv_of_plain_texts_has_no_quotes() -> None:
    frame = pa.table({"city": pa.array(["Rome", None]).dictionary_encode(), "age": [31.5, None], "owns": [True, False]})
    assert write_frame(Path("t.csv"), frame).decode() == "city,age,owns\nRome,31.5,true\n,,false\n"


@pytest.mark.parametrize("text", ["Rome, Italy", 'the "city"', "two\nlines", "two\rlines", ""])
@pytest.mark.parametrize("where", ["value", "category", "name"])
def test_csv_of_texts_that_need_quotes_is_read_back_as_it_was(text: str, where: str) -> None:
    values = pa.array([text if where != "name" else "Bonn", "Bonn"])
    name = text if where == "name" else "city"
    frame = pa.table({name: values.dictionary_encode() if where == "category" else values, "age": [1, 2]})
    options = csv.ParseOptions(newlines_in_values=True)
    back = csv.read_csv(pa.BufferReader(write_frame(Path("t.csv"), frame)), parse_options=options)
    assert back.column_names == [name, "age"]
    assert back.columns[0].to_pylist() == values.to_pylist()
