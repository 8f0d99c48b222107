"""The embedding job on tables: text, booleans and gaps, in Parquet, in CSV and as codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from pipelines.server import running_server
from tests.pipelines.embedding_rows import Here, embedding_of
from vaefeat import OnnxEncoder, RemoteEncoder, VAEFeatures, pretrain
from vaefeat.errors import InputError
from vaefeat.table_files import read_frame

N = 250
COLUMNS = ["height", "city", "owns", "storeys", "rent"]


@pytest.fixture(scope="module")
def houses() -> pd.DataFrame:
    """Categories that CSV has to quote, or could take for numbers; numbers that float32 rounds; gaps."""
    rng = np.random.default_rng(0)

    def with_gaps(values: Any) -> Any:
        return [None if rng.random() < 0.1 else value for value in values]

    cities = np.array(["Bonn", 'Rome, "the city"', "São\nPaulo", "007", "12"])
    return pd.DataFrame(
        {
            "key": [f"house {i}" for i in range(N)],
            "height": with_gaps(rng.normal(10, 3, N)),
            "city": with_gaps(cities[rng.integers(0, 5, N)]),
            "owns": pd.array(with_gaps(rng.random(N) < 0.5), dtype="boolean"),
            "storeys": rng.integers(1, 4, N),
            "rent": rng.integers(0, 10**9, N),
            "label": rng.integers(0, 2, N),
        }
    )


@pytest.fixture(scope="module")
def bundle(houses: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vaefeat.data import load_rows

    rows = load_rows(houses[COLUMNS], categorical=["storeys"])
    out = tmp_path_factory.mktemp("houses") / "bundle"
    pretrain(rows, model={"latent_dim": 4}, train={"max_epochs": 1}, out=out, progress=False)
    return out


@pytest.fixture(scope="module")
def wanted(bundle: Path, houses: pd.DataFrame) -> NDArray[np.float32]:
    features: NDArray[np.float32] = VAEFeatures(bundle).fit(houses[COLUMNS]).transform(houses[COLUMNS])
    return features


def as_parquet(path: Path, houses: pd.DataFrame) -> Path:
    houses[["label", *reversed(COLUMNS), "key"]].to_parquet(path / "houses.parquet", row_group_size=60)
    return path / "houses.parquet"


def as_dictionaries(path: Path, houses: pd.DataFrame) -> Path:
    houses.assign(city=houses["city"].astype("category")).to_parquet(path / "houses.parquet")
    return path / "houses.parquet"


def as_csv(path: Path, houses: pd.DataFrame) -> Path:
    houses[["label", *reversed(COLUMNS), "key"]].to_csv(path / "houses.csv", index=False)
    return path / "houses.csv"


def as_several_csv(path: Path, houses: pd.DataFrame) -> Path:
    # By itself, the first would hold whole numbers as its cities, and the second only empty ones.
    order = houses["city"].isin(["12"]), houses["city"].isna()
    parts = [houses[order[0]], houses[order[1]], houses[~order[0] & ~order[1]]]
    for number, part in enumerate(parts):
        part.to_csv(path / f"{number}.csv", index=False)
    return path


FORMS = [as_parquet, as_dictionaries, as_csv, as_several_csv]


@pytest.mark.parametrize("write", FORMS)
@pytest.mark.parametrize("part_rows", [None, 37])
def test_tables_in_any_form_get_the_bits_of_the_transformer(
    write: Callable[..., Path], part_rows: int | None, bundle: Path, houses: pd.DataFrame, wanted: Any, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    data = write(tmp_path / "in", houses)
    here = Here(bundle, data, tmp_path / "out", part_rows=part_rows, id_column="key", keep=("label",))
    assert here.run()["rows_embedded"] == N
    ids, features, table = embedding_of(tmp_path / "out")
    order = [int(one.removeprefix("house ")) for one in ids]
    assert write is as_several_csv or order == list(range(N))
    assert sorted(order) == list(range(N))
    np.testing.assert_array_equal(features.view(np.uint32), wanted[order].view(np.uint32))
    assert [int(one) for one in table.column("label").to_pylist()] == houses["label"][order].tolist()
    assert len(here.plan.parts) >= (1 if part_rows is None else N // part_rows)


def test_tables_get_the_bits_of_the_http_answer(bundle: Path, houses: pd.DataFrame, tmp_path: Path) -> None:
    Here(bundle, as_csv(tmp_path, houses), tmp_path / "out").run()
    with running_server(bundle, engine="local", start_timeout_s=120) as address, RemoteEncoder(address) as remote:
        served = remote.embed(houses[COLUMNS])
    ids, features, _ = embedding_of(tmp_path / "out")
    assert ids == list(range(N))
    np.testing.assert_array_equal(features.view(np.uint32), served.view(np.uint32))


def test_codes_and_gaps_in_an_array_are_rows_of_a_table(
    bundle: Path, houses: pd.DataFrame, wanted: Any, tmp_path: Path
) -> None:
    table = OnnxEncoder(bundle).input.table
    assert table is not None
    codes = table.encode(houses[COLUMNS])
    spoilt = np.concatenate([codes, [[1, 9, 0, 0, 5], [1, 0, 0, 0, np.nan], [np.inf, 0, 0, 0, 5]]]).astype(np.float32)
    np.save(tmp_path / "codes.npy", spoilt[::-1])
    assert Here(bundle, tmp_path / "codes.npy", tmp_path / "out").run()["rows_quarantined"] == 3
    ids, features, _ = embedding_of(tmp_path / "out")
    assert ids == list(range(3, N + 3))
    np.testing.assert_array_equal(features[::-1].view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_rows_of_a_table_that_are_refused_are_set_aside_one_by_one(
    suffix: str, bundle: Path, houses: pd.DataFrame, wanted: Any, tmp_path: Path
) -> None:
    spoilt = houses.astype({"storeys": "Int64"})
    spoilt.loc[3, "city"] = "Atlantis"
    spoilt.loc[100, "storeys"] = pd.NA
    spoilt.loc[249, "height"] = np.inf
    path = tmp_path / f"houses.{suffix}"
    if suffix == "csv":
        spoilt.astype({"rent": object}).assign(rent=spoilt["rent"].astype(str).where(spoilt.index != 7, "much")).to_csv(
            path, index=False
        )
    else:
        spoilt.to_parquet(path)
    Here(bundle, path, tmp_path / "out", part_rows=90, id_column="key").run()
    aside = pq.read_table(tmp_path / "out" / "_quarantine").to_pylist()
    reasons = {
        3: "the category 'Atlantis' in column 'city', wanted",
        7: "'much' in column 'rent', wanted a number",
        100: "no value in column 'storeys', where none",
        249: "column 'height', wanted numbers that are finite",
    }
    if suffix == "parquet":
        del reasons[7]
    assert {row["row"]: row["id"] for row in aside} == {row: f"house {row}" for row in reasons}
    for row in aside:
        assert reasons[row["row"]] in row["reason"]
    ids, features, _ = embedding_of(tmp_path / "out")
    order = [i for i in range(N) if i not in reasons]
    assert ids == [f"house {i}" for i in order]
    np.testing.assert_array_equal(features.view(np.uint32), wanted[order].view(np.uint32))


def test_csv_of_numbers_alone_is_embedded_as_the_library_reads_it(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(90, 3))
    frame = pd.DataFrame(rows, columns=["a", "b", "c"])
    pretrain(rows.astype(np.float32), train={"max_epochs": 1}, out=tmp_path / "bundle", progress=False)
    frame.assign(id=range(90), label="x").to_csv(tmp_path / "rows.csv", index=False)
    Here(tmp_path / "bundle", tmp_path / "rows.csv", tmp_path / "out", part_rows=40).run()
    read = read_frame(tmp_path / "rows.csv", columns=["a", "b", "c"])[0].to_pandas().to_numpy()
    again = OnnxEncoder(tmp_path / "bundle").embed(read)
    np.testing.assert_array_equal(embedding_of(tmp_path / "out")[1].view(np.uint32), again.view(np.uint32))


def test_tables_that_do_not_fit_are_refused_before_anything_is_written(
    bundle: Path, houses: pd.DataFrame, tmp_path: Path
) -> None:
    def refused(frame: pd.DataFrame, message: str, **request: Any) -> None:
        for name in ("t.csv", "t.parquet"):
            path = tmp_path / name
            (frame.to_csv if name == "t.csv" else frame.to_parquet)(path, index=False)
            with pytest.raises(InputError, match=message) as told:
                Here(bundle, path, tmp_path / "out", **request)
            assert "\n" not in str(told.value)
            assert name in str(told.value)
            assert not (tmp_path / "out").exists()

    refused(houses.drop(columns="city"), "no column 'city'")
    refused(houses, "no column 'kye'; did you mean 'key'", id_column="kye")
    refused(houses, "wanted a table of 5 columns", columns=("height", "city"))
    refused(houses.assign(storeys=7), "none of the first 250 rows.* category 7 in column 'storeys'")
    refused(
        houses.assign(key=["a", *houses["key"][1:-1], "a"]), "'a' twice: in row 0 of .* in row 249", id_column="key"
    )
    refused(houses.assign(key=[*houses["key"][:-1], None]), "no id in row 249", id_column="key")
    refused(houses[:0], "0 rows")
    with pytest.raises(InputError, match=r"got images in .* for an encoder of a table"):
        Here(bundle, Path(__file__).parents[2] / "docs" / "images", tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"), [(b"", r"rows.csv: Empty CSV file"), (b"height,city\n1\n", "rows.csv"), (b"\xff,a", "rows")]
)
def test_csv_that_is_damaged_is_refused_by_its_name(content: bytes, message: str, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        Here(bundle, tmp_path / "rows.csv", tmp_path / "out")


def test_csv_line_of_another_width_names_its_row(bundle: Path, houses: pd.DataFrame, tmp_path: Path) -> None:
    path = as_csv(tmp_path, houses.assign(city="Bonn"))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:30], f"{lines[30]},too,much", *lines[31:]]))
    with pytest.raises(InputError, match=r"houses.csv: .*#31.* 7 columns, got 9"):
        Here(bundle, path, tmp_path / "out")


def test_labels_beside_images_are_not_the_rows(digits_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (8, 8), 9).save(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("id,label\na.png,nine\n")
    Here(digits_bundle, tmp_path, tmp_path / "out").run()
    assert embedding_of(tmp_path / "out")[0] == ["a.png"]


def test_columns_of_an_array_are_taken_in_their_order(tmp_path: Path) -> None:
    """A table without names, of an array of objects, has nothing to compare with a file's columns but their number."""
    rng = np.random.default_rng(0)
    rows = np.array([[rng.normal(), "ab"[i % 2]] for i in range(40)], dtype=object)
    pretrain(rows, model={"latent_dim": 2}, train={"max_epochs": 1}, out=tmp_path / "bundle", progress=False)
    pq.write_table(
        pa.table({"n": pa.array(rows[:, 0], pa.float64()), "id": range(40), "t": pa.array(rows[:, 1], pa.string())}),
        tmp_path / "rows.parquet",
    )
    Here(tmp_path / "bundle", tmp_path / "rows.parquet", tmp_path / "out", id_column="id").run()
    again = OnnxEncoder(tmp_path / "bundle").embed(rows)
    np.testing.assert_array_equal(embedding_of(tmp_path / "out")[1].view(np.uint32), again.view(np.uint32))
