"""A table from end to end: trained on frames, and the same bits from every door; decoded, drawn, scored, filled."""

from __future__ import annotations

import json
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.datasets import load_wine
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils import get_tags
from typer.testing import CliRunner

from vaefeat import FineTuneClassifier, OnnxEncoder, VAEFeatures, VAETransformer, load_bundle, pretrain, pretrain_grid
from vaefeat.bundle import Bundle
from vaefeat.cli import app
from vaefeat.cli_files import rows_for
from vaefeat.data import load_rows
from vaefeat.decoder import OnnxDecoder
from vaefeat.errors import ConfigError, InputError
from vaefeat.generation import sample
from vaefeat.inference import anomaly_scores, denoise, impute
from vaefeat.model.diagnostics import diagnose
from vaefeat.table_files import completed, read_frame
from vaefeat.table_schema import TableSchema
from vaefeat.weights import restore_vae

Y = load_wine().target


def small(**settings: Any) -> VAETransformer:
    return VAETransformer(4, **{"hidden_dims": (16,), "max_epochs": 2, "random_state": 0, **settings})


@pytest.fixture(scope="module")
def bundle(table_bundle: Path) -> Bundle:
    return load_bundle(table_bundle)


@pytest.fixture(scope="module")
def schema(bundle: Bundle) -> TableSchema:
    assert bundle.manifest.input.table is not None
    return bundle.manifest.input.table


@pytest.fixture(scope="module")
def wanted(bundle: Bundle, wine_table: pd.DataFrame) -> np.ndarray:
    return OnnxEncoder(bundle, device="cpu").embed(wine_table)


@pytest.fixture(scope="module", params=["pandas", "polars", "numpy"])
def fitted(request: pytest.FixtureRequest, wine_table: pd.DataFrame) -> tuple[VAETransformer, Any]:
    frames = {
        "pandas": wine_table,
        "polars": pl.from_pandas(wine_table.astype({"alcohol": object})),
        "numpy": wine_table.astype(object).to_numpy(),
    }
    X = frames[request.param]
    return small().fit(X), X


def test_manifest_says_what_columns_are_and_by_what_they_are_scaled(bundle: Bundle, wine_table: pd.DataFrame) -> None:
    fields = json.loads(json.dumps(bundle.manifest.to_dict(), allow_nan=False))["input"]["table"]["columns"]
    assert fields[0] == {
        "name": "alcohol",
        "kind": "category",
        "optional": True,
        "categories": ["low", "mid", "high", "top"],
    }
    assert fields[2] == {"name": "ash", "kind": "boolean", "optional": False}
    assert fields[12]["mean"] == pytest.approx(wine_table["proline"].mean(), rel=1e-5)
    assert fields[12]["std"] == pytest.approx(wine_table["proline"].std(ddof=0), rel=1e-5)
    assert bundle.manifest.schema_version == 3
    assert bundle.manifest.model["likelihood"] == "table"


def test_every_door_gives_the_same_bits(
    table_bundle: Path, bundle: Bundle, wine_table: pd.DataFrame, wanted: np.ndarray
) -> None:
    assert np.isfinite(wanted).all()
    assert wanted.std() > 0.1
    rows = load_rows(wine_table).array
    encoder = OnnxEncoder(table_bundle, device="cpu")
    doors = {
        "rows": encoder.embed(rows),
        "one by one": np.concatenate([encoder.embed(rows[i : i + 1]) for i in range(len(rows))]),
        "polars": encoder.embed(pl.from_pandas(wine_table.astype({"alcohol": object}))),
        "pipeline": make_pipeline(VAEFeatures(table_bundle)).fit(wine_table).transform(wine_table),
        "pickled": pickle.loads(pickle.dumps(VAEFeatures(bundle).fit(wine_table))).transform(wine_table),
    }
    for door, features in doors.items():
        np.testing.assert_array_equal(features.view(np.uint32), wanted.view(np.uint32), err_msg=door)


def test_trained_model_gives_rows_more_than_columns_on_their_own_do(bundle: Bundle, wine_table: pd.DataFrame) -> None:
    def nats(column: pd.Series[Any]) -> float:
        present = column.dropna()
        if pd.api.types.is_float_dtype(column):
            return len(present) * 0.5 * (math.log(2 * math.pi) + 1)  # a Gaussian with the column's mean and variance
        shares = present.value_counts(normalize=True)
        entropy = float(-(shares * np.log(shares)).sum())
        return float(len(present) * entropy)

    alone = sum(nats(wine_table[column]) for column in wine_table) / len(wine_table)
    assert anomaly_scores(bundle, wine_table).mean() < alone - 2.5


def test_features_preset_learns_and_classifies_a_table(wine_table: pd.DataFrame) -> None:
    pipe = make_pipeline(small(max_epochs=20), LogisticRegression(max_iter=1000))
    assert pipe.fit(wine_table[::2], Y[::2]).score(wine_table[1::2], Y[1::2]) > 0.85
    assert pipe[0].bundle_.manifest.objective == "contrastive"


def test_transformer_fits_transforms_and_gives_back_what_it_was_fitted_to(fitted: tuple[VAETransformer, Any]) -> None:
    model, X = fitted
    features = model.transform(X)
    assert features.shape == (178, 4)
    for back in (model.inverse_transform(features), model.sample(178)):
        assert type(back) is type(X)
        assert back.shape == X.shape
        # What comes back is a table of this kind: it can be transformed again.
        assert np.isfinite(model.transform(back)).all()
    scores = model.score_samples(X)
    assert scores.shape == (178,)
    np.testing.assert_allclose(model.score_samples(X[5:7]), scores[5:7])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).transform(X), features)


def test_transformer_takes_codes_and_gaps_in_numeric_arrays() -> None:
    X = load_wine().data.copy()
    X[:, 0] = np.digitize(X[:, 0], [12.5, 13, 13.5])
    X[::7, 3] = np.nan
    model = small(categorical_features=[0]).fit(X)
    schema = model.bundle_.manifest.input.table
    assert schema is not None
    assert schema.sizes[:2] == (4, 0)
    assert schema.optional_columns == (3,)
    back = model.inverse_transform(model.transform(X))
    assert back.dtype == np.float32
    assert set(np.unique(back[:, 0])) <= {0, 1, 2, 3}
    X[0, 0] = 4
    with pytest.raises(ValueError, match=r"got 4 in column 'x0' \(row 0\)"):
        model.transform(X)


def test_transformer_of_a_table_works_in_clones_searches_and_set_output(wine_table: pd.DataFrame) -> None:
    pipe = make_pipeline(small(handle_unknown="ignore").set_output(transform="pandas"), LogisticRegression())
    assert cross_val_score(clone(pipe), wine_table, Y, cv=2, error_score="raise").shape == (2,)
    out = clone(pipe)[:1].fit_transform(wine_table.set_index(np.arange(178) + 1000))
    assert out.index[0] == 1000
    assert list(out) == [f"vaetransformer{i}" for i in range(4)]


def test_columns_are_compared_as_scikit_learn_does(wine_table: pd.DataFrame) -> None:
    model = small().fit(wine_table)
    assert model.feature_names_in_.tolist() == list(wine_table)
    with pytest.raises(ValueError, match="same order as they were in fit"):
        model.transform(wine_table[wine_table.columns[::-1]])
    with pytest.raises(ValueError, match="yet now missing:\n- hue"):
        model.transform(wine_table.drop(columns="hue"))
    with pytest.raises(InputError, match="category 'zz' in column 'hue'"):
        model.transform(wine_table.assign(hue="zz"))
    with pytest.raises(InputError, match="no value in column 'ash'"):
        model.transform(wine_table.assign(ash=None))
    features = VAEFeatures(model.bundle_)
    with pytest.raises(InputError, match="toarray"):
        features.fit(csr_matrix(np.ones((2, 13))))
    with pytest.raises(InputError, match="another order"):
        features.fit(wine_table[wine_table.columns[::-1]])


def test_unknown_category_under_ignore_has_the_features_of_a_missing_one(wine_table: pd.DataFrame) -> None:
    model = small(handle_unknown="ignore").fit(wine_table)
    unknown, missing = (model.transform(wine_table.assign(hue=value)) for value in ("zz", None))
    np.testing.assert_array_equal(unknown, missing)
    assert np.abs(unknown - model.transform(wine_table.assign(hue="a"))).max() > 1e-3


def test_tags_say_what_is_taken(bundle: Bundle, digits_bundle: Path, table_bundle: Path) -> None:
    def taken(estimator: Any) -> set[bool]:
        inputs = get_tags(estimator).input_tags
        return {inputs.allow_nan, inputs.categorical, inputs.string}

    assert taken(VAETransformer()) == {True}
    assert taken(VAEFeatures(bundle)) == {True}
    assert taken(VAEFeatures(load_bundle(digits_bundle))) == {False}
    assert taken(VAEFeatures(table_bundle)) == {False}, "nothing is known before fit"


def test_infinite_values_and_gaps_in_images_are_refused() -> None:
    with pytest.raises(ValueError, match="infinity"):
        small().fit(np.array([[1.0, np.inf], [2.0, 3.0]]))
    with pytest.raises(ValueError, match="NaN"):
        small(image_shape=(1, 1, 2)).fit(np.array([[1.0, np.nan], [2.0, 3.0]]))
    clean = small().fit(np.random.default_rng(0).normal(size=(20, 2)))
    with pytest.raises(ValueError, match="NaN"):
        clean.transform(np.array([[1.0, np.nan]]))


@pytest.mark.parametrize("setting", [{"handle_unknown": "drop"}, {"categorical_features": "hue"}])
def test_impossible_setting_of_tables_is_refused(setting: dict[str, Any], wine_table: pd.DataFrame) -> None:
    with pytest.raises(InputError, match=f"got {next(iter(setting))}="):
        small(**setting).fit(wine_table)


@pytest.mark.parametrize("corruption", ["gaussian", "salt_and_pepper"])
def test_noise_that_would_move_categories_is_refused(corruption: str, wine_table: pd.DataFrame) -> None:
    with pytest.raises(ConfigError, match="corruption='masking'"):
        pretrain(wine_table, train={"corruption": corruption}, progress=False)


def test_grids_refuse_tables(wine_table: pd.DataFrame) -> None:
    with pytest.raises(InputError, match="grids train no tables"):
        pretrain_grid(wine_table, grid={"seed": [0, 1]}, progress=False)


def test_decoder_gives_rows_that_the_encoder_takes(bundle: Bundle, schema: TableSchema, wanted: np.ndarray) -> None:
    rows = OnnxDecoder(bundle, device="cpu").decode(wanted)
    np.testing.assert_array_equal(schema.checked(rows), rows)
    made = schema.frame(sample(bundle, 50, kind="draw"))
    assert set(made["alcohol"]) <= {"low", "mid", "high", "top"}
    assert made["proline"].std() > 100


def test_fine_tuning_diagnosis_and_denoising_take_tables(bundle: Bundle, wine_table: pd.DataFrame) -> None:
    labels = np.where(np.arange(178) % 3 == 0, Y, -1)
    classifier = FineTuneClassifier(bundle, max_steps=30, random_state=0).fit(wine_table, labels)
    assert classifier.score(wine_table, Y) > 0.6
    assert diagnose(restore_vae(bundle), load_rows(wine_table).array).n_rows == 178
    assert denoise(bundle, wine_table).shape == (178, 13)


def test_anomaly_scores_find_the_row_with_an_odd_value(bundle: Bundle, wine_table: pd.DataFrame) -> None:
    odd = wine_table.copy()
    odd.loc[17, "ash"] = not odd.loc[17, "ash"]
    odd.loc[17, "flavanoids"] = 40.0
    assert anomaly_scores(bundle, odd).argmax() == 17


@pytest.mark.parametrize("corrected", [False, True])
def test_imputation_fills_categories_and_numbers_better_than_columns_do(
    corrected: bool, bundle: Bundle, schema: TableSchema, wine_table: pd.DataFrame
) -> None:
    complete = wine_table.dropna()
    holes = np.random.default_rng(5).random(complete.shape) < 0.2
    filled = impute(bundle, complete.mask(holes), corrected=corrected, n_iterations=60, seed=1)
    rows = schema.encode(complete)
    np.testing.assert_array_equal(filled.missing, holes)
    np.testing.assert_array_equal(filled.rows[~holes], rows[~holes])
    np.testing.assert_array_equal(schema.checked(filled.rows), filled.rows)
    names = np.array(schema.sizes) > 0
    guesses = np.where(names, "most_frequent", "mean")
    columns = [
        SimpleImputer(strategy=guess).fit_transform(np.where(holes, np.nan, rows)[:, [i]])
        for i, guess in enumerate(guesses)
    ]
    by_column = np.concatenate(columns, axis=1)
    coded = holes & names
    assert (filled.rows[coded] == rows[coded]).mean() > (by_column[coded] == rows[coded]).mean() + 0.05
    scale = np.nanstd(rows, axis=0)
    ours, theirs = (np.square((made - rows) / scale)[holes & ~names].mean() for made in (filled.rows, by_column))
    assert ours < 0.8 * theirs
    assert (filled.std[~holes] == 0).all()
    assert (filled.std[coded] <= 1).all()


# Files and the command line


@pytest.fixture(scope="module", params=[".csv", ".parquet"])
def table_file(
    request: pytest.FixtureRequest, wine_table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("files") / f"wine{request.param}"
    labelled = wine_table.astype({"alcohol": object}).assign(label=Y)
    pl.from_pandas(labelled).write_csv(path) if path.suffix == ".csv" else labelled.to_parquet(path)
    return path


def test_file_of_a_table_is_the_frame_that_was_written(table_file: Path, wine_table: pd.DataFrame) -> None:
    rows = load_rows(table_file, table=True)
    assert rows.table is not None
    assert [column.name for column in rows.table.columns] == list(wine_table)
    np.testing.assert_array_equal(rows.labels, Y)
    np.testing.assert_allclose(rows.array, load_rows(wine_table.astype({"alcohol": object})).array, rtol=1e-6)
    assert load_rows(table_file, table=True, columns=["hue", "ash"], max_rows=7).array.shape == (7, 2)


def test_parquet_that_is_not_said_to_be_a_table_keeps_to_its_numbers(tmp_path: Path) -> None:
    pd.DataFrame({"a": [1.0, 2.0], "city": ["Rome", "Bonn"]}).to_parquet(tmp_path / "rows.parquet")
    rows = load_rows(tmp_path / "rows.parquet")
    assert rows.table is None
    assert rows.array.shape == (2, 1)


def test_table_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"to read as a table, wanted a file that ends in \.csv or"):
        load_rows(tmp_path, table=True)


@pytest.mark.parametrize("name", ["none.csv", "none.parquet"])
def test_table_that_is_not_there_is_said_not_to_be(name: str, tmp_path: Path, table_bundle: Path) -> None:
    with pytest.raises(InputError, match=f"{name}, which does not exist"):
        load_rows(tmp_path / name, table=True)
    with pytest.raises(InputError, match=f"{name}, which does not exist"):
        rows_for(load_bundle(table_bundle).manifest.input, tmp_path / name, split="train", image_size=None)


def test_file_without_a_column_of_the_bundle_says_which(
    tmp_path: Path, wine_table: pd.DataFrame, table_bundle: Path
) -> None:
    wine_table.drop(columns="hue").astype({"alcohol": object}).to_parquet(tmp_path / "wine.parquet")
    with pytest.raises(InputError, match=r"wine\.parquet has no column 'hue', which the bundle was trained with"):
        rows_for(load_bundle(table_bundle).manifest.input, tmp_path / "wine.parquet", split="train", image_size=None)


def test_imputation_leaves_observed_values_as_they_were_read(table_file: Path, schema: TableSchema) -> None:
    table = read_frame(table_file)[0]
    rows = schema.encode(table, holes=True)
    holes = np.isnan(rows)
    assert holes.any()
    assert not holes.all()
    back = completed(table, schema.frame(np.where(holes, np.float32(1), rows), library="pyarrow"), holes)
    assert back.column_names == table.column_names
    for before, after, hole in zip(table.columns, back.columns, holes.T, strict=True):
        values, were = np.array(after.to_pylist(), dtype=object), np.array(before.to_pylist(), dtype=object)
        assert (values[~hole] == were[~hole]).all()
        assert not any(value is None for value in values)
    third = pa.table({"a": pa.array([None, 0.1])}), pa.table({"a": [float(np.float32(14.23)), 5.0]})
    assert completed(*third, np.array([[True], [False]])).to_pydict() == {"a": [14.23, 0.1]}


def test_column_that_the_file_lacks_names_the_nearest(table_file: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'proline'"):
        load_rows(table_file, table=True, columns=["prolin"])


def test_command_line_trains_embeds_scores_and_fills_a_table(
    table_file: Path, wine_table: pd.DataFrame, tmp_path: Path
) -> None:
    def run(*arguments: object) -> None:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output

    out = tmp_path / "wine"
    settings = ["--set", "train.max_epochs=2", "--set", "model.hidden_dims=[16]", "--preset", "textbook"]
    run("pretrain", table_file, "--table", "--out", out, *settings)
    run("embed", out, table_file, tmp_path / "z.npy", "--device", "cpu")
    features = OnnxEncoder(out, device="cpu").embed(load_rows(table_file, table=True).array)
    np.testing.assert_array_equal(np.load(tmp_path / "z.npy"), features)
    run("score", out, table_file, "--out", tmp_path / "scores.npy", "--samples", 4)
    assert np.load(tmp_path / "scores.npy").shape == (178,)
    filled = tmp_path / f"filled{table_file.suffix}"
    run("impute", out, table_file, "--out", filled, "--iterations", 4)
    for column, before in zip(read_frame(filled)[0].columns, read_frame(table_file)[0].columns, strict=True):
        pairs = zip(column.to_pylist(), before.to_pylist(), strict=True)
        assert all(after is not None and was in (None, after) for after, was in pairs)
    read = load_rows(filled, table=True)
    assert read.table is not None
    assert not read.table.allows_missing
    assert set(read.table.columns[0].categories) == {"low", "mid", "high", "top"}
    run("generate", out, "--out", tmp_path / "made.csv", "-n", 5)
    assert len(load_rows(tmp_path / "made.csv")) == 5
    run("diagnose", out, table_file)


def test_command_line_refuses_a_table_where_rows_are_plain(digits_bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((2, 64), np.uint8))
    with pytest.raises(InputError, match="which are no table"):
        CliRunner().invoke(
            app,
            ["generate", str(digits_bundle), "--out", str(tmp_path / "made.csv"), "-n", "2"],
            catch_exceptions=False,
        )


def test_python_on_the_page_of_tables_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tables.md").read_text()
    program = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE))
    assert "table.frame(rows)" in program
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "a table of 3 columns (1 number, 1 boolean, 1 category)" in done.stdout
