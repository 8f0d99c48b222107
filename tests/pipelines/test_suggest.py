"""Suggestions as a shell asks for them: files to fill in, given back, and what does not fit."""

from __future__ import annotations

import base64
import csv
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from pipelines import suggest as job
from pipelines.__main__ import app
from pipelines.candidates import open_candidates
from pipelines.contact_sheet import draw_sheet
from vaefeat import OnnxEncoder, TrainConfig, pretrain
from vaefeat.errors import InputError
from vaefeat.suggestions import suggest_rows


def asked(bundle: Path, data: Path, out: Path, *more: object) -> str:
    words = ["suggest", "--bundle", bundle, "--data", data, "--out", out, *more]
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None:
        raise done.exception
    return done.stdout


def written(out: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO((out / "suggestions.csv").read_text())))


def fill_in(path: Path, labels: dict[str, object]) -> None:
    path.write_text("\n".join(["id,label", *(f"{name},{label}" for name, label in labels.items())]) + "\n")


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory: pytest.TempPathFactory, digits_rows: NDArray[np.uint8]) -> Path:
    path = tmp_path_factory.mktemp("rows") / "digits.npy"
    np.save(path, digits_rows)
    return path


def test_suggest_writes_what_the_library_chooses_and_a_file_to_fill_in(
    digits_bundle: Path, digits_file: Path, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    said = asked(digits_bundle, digits_file, tmp_path / "out", "--budget", 12)
    assert "12 of 1,797 rows to label (no labels yet)" in said
    chosen = suggest_rows(OnnxEncoder(digits_bundle).embed(digits_rows), budget=12)
    assert written(tmp_path / "out") == [["id", "label"], *([str(row), ""] for row in chosen)]
    page = (tmp_path / "out" / "suggestions.html").read_text()
    assert re.findall(r'data-id="(\d+)"', page) == [str(row) for row in chosen]
    assert not re.search(r"(src|href)=[\"']?(http|/)", page)
    first = base64.b64decode(re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)[0])
    shown = np.asarray(Image.open(io.BytesIO(first)).convert("L")).astype(float)
    np.testing.assert_allclose(shown, digits_rows[chosen[0], 0] * (255 / 16), atol=1)
    with Image.open(tmp_path / "out" / "suggestions.png") as sheet:
        assert sheet.width > 10 * 100


def test_labels_given_back_lead_to_other_rows_and_are_offered_to_choose_from(
    digits_bundle: Path, digits_file: Path, tmp_path: Path
) -> None:
    digits = load_digits().target
    asked(digits_bundle, digits_file, tmp_path / "one", "--budget", 15)
    names = [name for name, _ in written(tmp_path / "one")[1:]]
    labels: dict[str, object] = {name: f"digit {digits[int(name)]}" for name in names}
    labels[names[3]] = ""
    fill_in(tmp_path / "one" / "suggestions.csv", labels)
    said = asked(
        digits_bundle, digits_file, tmp_path / "two", "--budget", 15, "--labels", tmp_path / "one" / "suggestions.csv"
    )
    assert "(14 labels, 1 passed over without one)" in said
    again = [name for name, _ in written(tmp_path / "two")[1:]]
    # Neither those with a label nor the one that was passed over.
    assert not set(again) & set(names)
    page = (tmp_path / "two" / "suggestions.html").read_text()
    assert set(re.findall(r'<option value="([^"]+)">', page)) == {label for label in labels.values() if label}


def test_file_with_labels_filled_in_is_not_overwritten(digits_bundle: Path, digits_file: Path, tmp_path: Path) -> None:
    asked(digits_bundle, digits_file, tmp_path, "--budget", 3)
    asked(digits_bundle, digits_file, tmp_path, "--budget", 4)
    fill_in(tmp_path / "suggestions.csv", {"5": "five", "7": ""})
    with pytest.raises(InputError, match="with 1 labels filled in"):
        asked(digits_bundle, digits_file, tmp_path, "--budget", 3)
    assert "five" in (tmp_path / "suggestions.csv").read_text()


def test_images_of_a_folder_are_named_by_their_path(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    for index in range(40):
        folder = tmp_path / "images" / f"box {index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits_rows[index, 0]).save(folder / f"{index}.png")
    asked(digits_bundle, tmp_path / "images", tmp_path / "out", "--budget", 5)
    names = [name for name, _ in written(tmp_path / "out")[1:]]
    assert len(set(names)) == 5
    assert all((tmp_path / "images" / name).is_file() for name in names)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, NDArray[np.float32]]:
    """Give a bundle for a table, the table with an id, and its rows."""
    folder = tmp_path_factory.mktemp("table")
    rows = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    columns: dict[str, Any] = {"customer": np.arange(300) + 7000, **{f"v{i}": rows[:, i] for i in range(4)}}
    pq.write_table(pa.table(columns), folder / "rows.parquet", row_group_size=90)
    pretrain(rows, train=TrainConfig(max_epochs=1), out=folder / "bundle", progress=False)
    return folder / "bundle", folder / "rows.parquet", rows


def test_rows_of_a_table_are_shown_by_their_values_and_named_by_a_column(
    table: tuple[Path, Path, NDArray[np.float32]], tmp_path: Path
) -> None:
    bundle, data, rows = table
    asked(bundle, data, tmp_path, "--budget", 6, "--id-column", "customer")
    chosen = suggest_rows(OnnxEncoder(bundle).embed(rows), budget=6)
    assert [name for name, _ in written(tmp_path)[1:]] == [str(7000 + row) for row in chosen]
    page = (tmp_path / "suggestions.html").read_text()
    assert all(f"<th>v{i}</th>" in page for i in range(4))
    assert f"<td>{rows[chosen[0], 2]:.4g}</td>" in page
    assert not (tmp_path / "suggestions.png").exists()


@pytest.mark.parametrize(("ids", "message"), [([1, 2, 2], "'?2'? twice"), ([1, None, 2], "as a missing value")])
def test_ids_that_name_no_single_row_are_refused(ids: list[int | None], message: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ids, "v": [0.0, 1.0, 2.0]}), tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=message):
        open_candidates(tmp_path / "rows.parquet", id_column="id")


def test_many_rows_are_sampled_and_labelled_ones_are_all_kept(
    digits_bundle: Path,
    digits_file: Path,
    digits_rows: NDArray[np.uint8],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job, "_CANDIDATES", 200)
    fill_in(tmp_path / "labels.csv", {str(row): row % 2 for row in range(0, 1797, 100)})
    said = asked(digits_bundle, digits_file, tmp_path / "out", "--budget", 9, "--labels", tmp_path / "labels.csv")
    assert "218 of them looked at" in said
    shuffled = np.random.default_rng(0).permutation(1797)
    ascending = np.sort(shuffled[:50])
    rows = open_candidates(digits_file)
    np.testing.assert_array_equal(np.concatenate(list(rows.read(ascending))), digits_rows[ascending])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budget", 1798], "got a budget of 1798 rows, and .* has 1797 without a label; ask for fewer"),
        (["--budget", 0], "budget=0"),
        (["--budget", 3, "--id-column", "id"], "wanted Parquet"),
        (["--budget", 3, "--labels", "{folder}/unknown.csv"], "for 2 of 3 ids that are not in .*: '1797', 'x'"),
        (["--budget", 3, "--labels", "{folder}/twice.csv"], r"id '4' twice in .*twice.csv \(line 2 and line 3\)"),
        (["--budget", 3, "--labels", "{folder}/other.csv"], "no column 'id' in .*other.csv; there are: row, class"),
        (["--budget", 3, "--labels", "{folder}/nameless.csv"], "line 3 of .*nameless.csv without an id"),
        (["--budget", 3, "--labels", "{folder}/missing.csv"], "missing.csv, which does not exist"),
    ],
)
def test_bad_input_is_one_line(
    more: list[object], message: str, digits_bundle: Path, digits_file: Path, tmp_path: Path
) -> None:
    fill_in(tmp_path / "unknown.csv", {"1797": "a", "3": "b", "x": "c"})
    (tmp_path / "twice.csv").write_text("id,label\n4,a\n4,b\n")
    (tmp_path / "other.csv").write_text("row,class\n4,a\n")
    (tmp_path / "nameless.csv").write_text("id,label\n4,a\n,b\n")
    words = [str(word).format(folder=tmp_path) for word in more]
    with pytest.raises(InputError, match=message):
        asked(digits_bundle, digits_file, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_bundle_that_does_not_take_the_rows_is_refused(digits_bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((50, 3, 9, 9), dtype=np.uint8))
    with pytest.raises(InputError, match=r"rows of shape \(3, 9, 9\) in .* takes uint8 rows of shape \(n, 1, 8, 8\)"):
        asked(digits_bundle, tmp_path / "rows.npy", tmp_path / "out", "--budget", 5)


def test_caption_that_is_too_wide_keeps_both_ends() -> None:
    rows = np.full((2, 3, 300, 200), 255, dtype=np.uint8)
    with Image.open(io.BytesIO(draw_sheet(rows, ["x" * 300, "b"], low=0, high=255))) as sheet:
        assert sheet.size == (2 * 122 + 10, 138 + 10)
