"""Files of labels: what they say, and what they cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.label_files import ID, LABEL, GivenLabels, read_labels, written_labels
from vaefeat.errors import InputError


def csv_of(path: Path, *lines: str) -> Path:
    path.write_text("\n".join([f"{ID},{LABEL}", *lines]) + "\n", encoding="utf-8")
    return path


def parquet_of(path: Path, ids: list[Any], labels: Any) -> Path:
    pq.write_table(pa.table({ID: ids, LABEL: labels}), path)
    return path


def test_labels_saved_by_a_spreadsheet_are_read(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes('\ufeffid,note,label\r\n"a,1",x, cat \r\nb,,\r\nc,,-1\r\n'.encode())
    read = read_labels([tmp_path / "labels.csv"])
    assert (read.labels, read.passed_over) == ({"a,1": "cat"}, ("b", "c"))


def test_csv_is_read_whatever_separates_it(tmp_path: Path) -> None:
    for separator in (",", ";", "\t"):
        lines = ["id, label", "a,one", ' "b , c" ,two', "d", ",", ""]
        content = "\r\n".join(line if '"' in line else line.replace(",", separator) for line in lines)
        content = content.replace(' "b , c" ,two', f'"b , c"{separator}two')
        (tmp_path / "labels.csv").write_text(content)
        read = read_labels([tmp_path / "labels.csv"])
        assert (read.labels, read.passed_over) == ({"a": "one", "b , c": "two"}, ("d",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('id,label\na,one\n"b,two\nc,three\n', "up to its line 4 .*not closed"),
        ("id,label\na,one, or two\n", "3 values in line 2 of .*wanted 2: id, label; put quotes"),
        ("", "labels.csv, which is empty; wanted .* 'id' and 'label'"),
    ],
)
def test_damaged_csv_is_refused_with_its_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        read_labels([tmp_path / "labels.csv"])


def test_file_to_fill_in_is_read_as_rows_passed_over(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(written_labels(["7", 'a,"b"']))
    read = read_labels([tmp_path / "labels.csv"])
    assert (read.labels, read.passed_over) == ({}, ("7", 'a,"b"'))


def test_several_files_are_one_in_which_a_label_counts_more_than_none(tmp_path: Path) -> None:
    one = csv_of(tmp_path / "1.csv", "a,1", "b,", "c,3", "d,")
    two = parquet_of(tmp_path / "2.parquet", ["b", "c", "e"], pa.array([2.0, 3.0, None]))
    read = read_labels([one, two])
    assert (read.labels, read.passed_over) == ({"a": 1, "c": 3, "b": 2}, ("d", "e"))
    three = csv_of(tmp_path / "3.csv", "f,seven", "a,1")
    assert read_labels([one, two, three]).labels == {"a": "1", "c": "3", "b": "2", "f": "seven"}


@pytest.mark.parametrize(("texts", "labels"), [(("1", "-2"), [1, -2]), (("1", "02"), ["1", "02"])])
def test_texts_that_are_all_whole_numbers_are_numbers(
    texts: tuple[str, str], labels: list[Any], tmp_path: Path
) -> None:
    read = read_labels([csv_of(tmp_path / "l.csv", *(f"r{i},{text}" for i, text in enumerate(texts)))])
    assert list(read.labels.values()) == labels


@pytest.mark.parametrize(
    ("labels", "joined"), [({"c": 4, "a": 5}, [5, -1, 4]), ({"b": "x"}, [-1, "x", -1]), ({}, [-1, -1, -1])]
)
def test_labels_are_joined_by_id_and_rows_without_one_get_minus_one(labels: dict[str, Any], joined: list[Any]) -> None:
    found = GivenLabels(source="l.csv", labels=labels).join(["a", "b", "c"], source="rows")
    assert found.tolist() == joined
    assert found.dtype == (object if "x" in joined else np.int64)


def test_ids_that_are_in_no_row_are_named(tmp_path: Path) -> None:
    read = read_labels([csv_of(tmp_path / "l.csv", "a,1", "x,2", "y,")])
    with pytest.raises(InputError, match=r"l.csv for 1 of 2 ids that are not in rows: 'x'; wanted ids such as 'b'"):
        read.join(["b", "a"], source="rows")
    with pytest.raises(InputError, match="for 1 of 1 ids that are not in rows: 'y'"):
        read.places_passed_over(["b", "a"], source="rows")


def test_two_labels_of_a_row_name_file_and_line(tmp_path: Path) -> None:
    files = [csv_of(tmp_path / "1.csv", "a,cat"), csv_of(tmp_path / "2.csv", "b,cat", "a,dog")]
    with pytest.raises(InputError, match=r"'cat' and 'dog' for row 'a' \(line 3 of .*2.csv\)"):
        read_labels(files)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (pa.array([1.0, 2.5]), "label 2.5 in .*whole numbers"),
        (pa.array([True, False]), r"label True \(bool\)"),
        (pa.array([float("inf"), 1.0]), "label inf"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_labels([parquet_of(tmp_path / "l.parquet", ["a", "b"], labels)])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.csv", b"\xff\xfe\x00", "no CSV file in UTF-8"),
        ("l.csv", b"", "l.csv, which is empty; wanted"),
        ("l.parquet", b"PAR1", "l.parquet"),
        ("l.txt", b"id,label", "wanted a .csv or .parquet file"),
    ],
)
def test_files_that_hold_no_labels_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_labels([tmp_path / name])
