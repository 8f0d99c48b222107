"""The job that ships a classifier, on real digits: what it measures, what it refuses, and what is served in the end."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits, load_wine

from pipelines.__main__ import app
from pipelines.finetuning.comparison import Comparison
from pipelines.finetuning.job import FinetuneOptions, finetune
from pipelines.server import running_server
from tests.pipelines.embedding_rows import Here
from vaefeat import OnnxEncoder, OnnxPredictor, RemoteEncoder, load_bundle
from vaefeat.errors import ConfigError, InputError
from vaefeat.temperature import TemperedClassifier

CHECKOUT = Path(__file__).parents[2]
TARGET = load_digits().target
NAMES = np.array(["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"])
ORDER = np.random.default_rng(0).permutation(len(TARGET))
LABELLED, TEST = ORDER[:100], ORDER[100:600]
QUIET = Console(quiet=True)


def write_labels(
    path: Path, ids: Iterable[Any], labels: Iterable[Any], *, header: tuple[str, str] = ("id", "label")
) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(zip(ids, labels, strict=True))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, digits_rows: NDArray[np.uint8]) -> Path:
    """Give a folder with the rows, and labels of some."""
    folder = tmp_path_factory.mktemp("finetuning")
    np.save(folder / "digits.npy", digits_rows)
    write_labels(folder / "labels.csv", LABELLED, NAMES[TARGET[LABELLED]])
    write_labels(folder / "test.csv", TEST, NAMES[TARGET[TEST]])
    return folder


@pytest.fixture
def options(place: Path, digits_bundle: Path, tmp_path: Path) -> FinetuneOptions:
    """Give what is quick."""
    return FinetuneOptions(
        bundle=digits_bundle,
        data=place / "digits.npy",
        labels=(place / "labels.csv",),
        out=tmp_path / "out",
        only=("logistic",),
    )


@pytest.fixture(scope="module")
def shipped(place: Path, digits_bundle: Path) -> Comparison:
    """Give what the whole job ships, with all that it tries."""
    whole = FinetuneOptions(
        bundle=digits_bundle,
        data=place / "digits.npy",
        labels=(place / "labels.csv",),
        test_labels=place / "test.csv",
        out=place / "out",
        n_draws=3,
        max_steps=60,
        name="numerals",
    )
    return finetune(whole, console=QUIET)


def test_job_tries_all_on_the_same_draws_and_ships_the_best(shipped: Comparison, place: Path) -> None:
    assert [one.contender.name for one in shipped.judged] == ["logistic", "knn", "svc", "few_label_head", "finetune"]
    assert shipped.best.error == min(one.error for one in shipped.judged)
    results = json.loads((place / "out" / "results.json").read_text())
    assert results["shipped"] == shipped.best.contender.name
    assert results["digest"] == shipped.bundle.digest == load_bundle(place / "out").digest
    assert results["classes"] == sorted(NAMES)
    for told, one in zip(results["classifiers"], shipped.judged, strict=True):
        assert len(told["errors_percent"]) == 3
        assert told["error_percent"] == pytest.approx(np.mean(told["errors_percent"]))
        assert told["interval_percent"][0] <= one.error <= told["interval_percent"][1]
        assert one.error < 50  # chance is 90


def test_job_leaves_a_table_and_a_picture(shipped: Comparison, place: Path) -> None:
    page = (place / "out" / "comparison.md").read_text()
    for one in shipped.judged:
        assert f"{one.contender.title}" in page
        assert f"{one.error:.1f}" in page
    with Image.open(place / "out" / "comparison.png") as picture:
        assert picture.size[0] > 600


def test_test_figures_are_those_of_the_shipped_file(
    shipped: Comparison, place: Path, digits_rows: NDArray[np.uint8]
) -> None:
    told = json.loads((place / "out" / "results.json").read_text())["test"]
    said = OnnxPredictor(place / "out", device="cpu").predict(digits_rows[TEST])
    assert told["n_rows"] == len(TEST)
    assert told["error_percent"] == pytest.approx(100 * np.mean(said != NAMES[TARGET[TEST]]))
    assert told["interval_percent"][0] < told["error_percent"] < told["interval_percent"][1]


def test_served_classifier_gives_the_estimators_answers(
    shipped: Comparison, place: Path, digits_rows: NDArray[np.uint8]
) -> None:
    with (
        running_server(place / "out", engine="local", start_timeout_s=60) as address,
        RemoteEncoder(address) as remote,
    ):
        assert remote.classes is not None
        served = remote.embed(digits_rows, output="probabilities")
        classes = np.array(remote.classes)
    wanted = shipped.classifier.predict_proba(digits_rows)
    np.testing.assert_allclose(served, wanted, atol=1e-4)
    assert np.mean(classes[served.argmax(axis=1)] == shipped.classifier.predict(digits_rows)) > 0.998
    assert shipped.bundle.name == "numerals"


@pytest.mark.parametrize("name", ["knn", "svc", "few_label_head", "finetune"])
def test_each_contender_alone_is_shipped_calibrated_as_one_file(
    name: str, options: FinetuneOptions, digits_rows: NDArray[np.uint8]
) -> None:
    done = finetune(replace(options, only=(name,), n_draws=2, max_steps=20), console=QUIET)
    assert done.best.temperature != 1.0
    assert isinstance(done.classifier, TemperedClassifier)
    np.testing.assert_allclose(
        OnnxPredictor(options.out, device="cpu").predict_proba(digits_rows),
        done.classifier.predict_proba(digits_rows),
        atol=1e-4,
    )
    assert done.bundle.manifest.pipeline is not None
    assert done.bundle.manifest.pipeline["steps"][-1]["name"] == "temperature"


def test_same_seed_ships_the_same_bundle(options: FinetuneOptions, tmp_path: Path) -> None:
    one = finetune(options, console=QUIET)
    other = finetune(replace(options, out=tmp_path / "other"), console=QUIET)
    assert one.bundle.digest == other.bundle.digest


def test_labels_of_parquet_with_nulls_and_numbers_give_whole_numbers(options: FinetuneOptions, tmp_path: Path) -> None:
    given: list[int | None] = [int(label) for label in TARGET[LABELLED]]
    given[0] = None
    table = pa.table({"row": pa.array(LABELLED), "digit": pa.array(given)})
    pq.write_table(table, tmp_path / "labels.parquet")
    done = finetune(
        replace(options, labels=(tmp_path / "labels.parquet",), id_column="row", label_column="digit"), console=QUIET
    )
    assert done.bundle.manifest.classes == tuple(range(10))
    assert json.loads((options.out / "results.json").read_text())["n_labels"] == 99


def test_images_are_joined_by_their_paths(
    options: FinetuneOptions, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    for row in LABELLED:
        path = tmp_path / "images" / f"{row % 3}" / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits_rows[row, 0]).save(path)
    write_labels(tmp_path / "labels.csv", [f"{row % 3}/{row}.png" for row in LABELLED], TARGET[LABELLED])
    images = finetune(replace(options, data=tmp_path / "images", labels=(tmp_path / "labels.csv",)), console=QUIET)
    said = images.classifier.predict(digits_rows[TEST])
    assert np.mean(said == TARGET[TEST]) > 0.6  # a fifth of that where rows get one another's labels


def features_file(path: Path, ids: NDArray[Any], features: NDArray[np.float32], **notes: str) -> Path:
    """Write what the embedding job writes."""
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
    metadata = {f"vaefeat.{key}": value for key, value in notes.items()}
    pq.write_table(pa.table({"id": pa.array(ids), "embedding": vectors}).replace_schema_metadata(metadata), path)
    return path


def test_features_that_were_computed_before_give_the_same_bundle_in_any_order(
    options: FinetuneOptions, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    encoder = OnnxEncoder(options.bundle, device="cpu")
    file = features_file(
        tmp_path / "f.parquet", ORDER, encoder.embed(digits_rows)[ORDER], bundle=encoder.digest, output="mean"
    )
    with_features = finetune(replace(options, features=file, out=tmp_path / "with"), console=QUIET)
    assert with_features.bundle.digest == finetune(options, console=QUIET).bundle.digest


@pytest.mark.serve
def test_features_of_the_embedding_job_are_joined(options: FinetuneOptions, tmp_path: Path) -> None:
    words = ["--bundle", str(options.bundle), "--data", str(options.data), "--out", str(tmp_path / "f.parquet")]
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "embed", *words, "--part-rows", "500"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with_features = finetune(replace(options, features=tmp_path / "f.parquet", out=tmp_path / "with"), console=QUIET)
    assert with_features.bundle.digest == finetune(options, console=QUIET).bundle.digest
    (tmp_path / "f.parquet" / "_manifest.json").unlink()
    with pytest.raises(InputError, match="embedding has not finished"):
        finetune(replace(options, features=tmp_path / "f.parquet", out=tmp_path / "again"), console=QUIET)


def test_data_with_ids_among_their_columns_do_not_learn_from_them(tmp_path: Path) -> None:
    """Numbers as ids would be the best feature of all, where rows are sorted by class."""
    from sklearn.datasets import load_wine

    from vaefeat import pretrain

    wine = load_wine()
    ids = np.arange(1000, 1000 + len(wine.target))
    columns = {"number": ids, **{name: wine.data[:, i].astype(np.float32) for i, name in enumerate(wine.feature_names)}}
    pq.write_table(pa.table(columns), tmp_path / "wine.parquet")
    model = {"latent_dim": 4, "hidden_dims": (16,)}
    pretrain(wine.data, preset="textbook", model=model, train={"max_epochs": 30}, out=tmp_path / "b", progress=False)
    labels = write_labels(tmp_path / "labels.csv", ids[::3], wine.target[::3])
    made = FinetuneOptions(
        bundle=tmp_path / "b",
        data=tmp_path / "wine.parquet",
        labels=(labels,),
        out=tmp_path / "out",
        only=("logistic",),
        data_id_column="number",
    )
    assert finetune(made, console=QUIET).bundle.manifest.input.shape == (13,)


def test_table_is_joined_by_ids_that_stay_text_and_its_features_are_those_of_the_embedding_job(
    table_bundle: Path, wine_table: pd.DataFrame, tmp_path: Path
) -> None:
    ids = [f"{i:04}" for i in range(len(wine_table))]
    wine_table.assign(key=ids).to_csv(tmp_path / "wine.csv", index=False)
    labels = load_wine().target
    write_labels(tmp_path / "labels.csv", ids[::4], labels[::4])
    write_labels(tmp_path / "more.csv", [*ids[1::4], ids[2]], [*labels[1::4], ""])
    made = FinetuneOptions(
        bundle=table_bundle,
        data=tmp_path / "wine.csv",
        labels=(tmp_path / "labels.csv", tmp_path / "more.csv"),
        out=tmp_path / "out",
        only=("logistic",),
        data_id_column="key",
    )
    encoded_here = finetune(made, console=QUIET)
    Here(table_bundle, tmp_path / "wine.csv", tmp_path / "features.parquet", id_column="key").run()
    with_features = replace(made, features=tmp_path / "features.parquet", out=tmp_path / "with")
    assert finetune(with_features, console=QUIET).bundle.digest == encoded_here.bundle.digest
    said = OnnxPredictor(tmp_path / "out", device="cpu").predict(wine_table)
    assert np.mean(said[2::4] == labels[2::4]) > 0.7


Change = Callable[[FinetuneOptions, Path, NDArray[np.uint8]], FinetuneOptions]


def labels_of(ids: Iterable[Any], labels: Iterable[Any], **options: Any) -> Change:
    return lambda o, folder, rows: replace(o, labels=(write_labels(folder / "l.csv", ids, labels, **options),))


def features_of(order: NDArray[Any], **notes: str) -> Change:
    def change(o: FinetuneOptions, folder: Path, rows: NDArray[np.uint8]) -> FinetuneOptions:
        features = OnnxEncoder(o.bundle, device="cpu").embed(rows)[order]
        return replace(o, features=features_file(folder / "f.parquet", np.arange(len(order)), features, **notes))

    return change


def with_test_labels(o: FinetuneOptions, folder: Path, ids: Iterable[Any], labels: Iterable[Any]) -> FinetuneOptions:
    return replace(o, test_labels=write_labels(folder / "t.csv", ids, labels))


BAD: dict[str, tuple[Change, str]] = {
    "missing column": (labels_of([1], ["a"], header=("id", "class")), "no column 'label'.*id, class.*--label"),
    "duplicate ids": (labels_of([1, 2, 1], ["a", "b", "a"]), r"id '1' twice in .*l.csv \(line 2 and line 4\)"),
    "no id": (labels_of(["", 2], ["a", "b"]), "line 2 of .*l.csv without an id"),
    "ids that do not join": (
        labels_of([0, 1, 5000, "x"], ["a", "a", "b", "b"]),
        r"for 2 of 4 ids that are not in .*digits.npy: '5000', 'x'; wanted ids such as '0'",
    ),
    "one row of a class": (labels_of([0, 1, 7], ["a", "a", "b"]), "one row of the class 'b' .*id '7'"),
    "a class that is misspelt": (labels_of([0, 1, 7], ["cat", "cat", "Cta"]), "class 'Cta' .*did you mean 'cat'"),
    "one class": (labels_of([0, 1], ["a", "a"]), "one class only"),
    "no labels": (labels_of([0, 1], ["", "-1"]), "no label"),
    "fractions": (
        lambda o, folder, rows: replace(o, labels=(fractions(folder / "l.parquet"),)),
        "label 0.5 .*whole numbers",
    ),
    "no labels file": (lambda o, folder, rows: replace(o, labels=(folder / "no.csv",)), "no.csv, which does not exist"),
    "labels never seen": (
        lambda o, folder, rows: with_test_labels(o, folder, TEST[:3], ["eins", "elf", "elf"]),
        rf"1 classes .* not in .*: 'elf' \(id '{TEST[1]}' and 1 more\)",
    ),
    "test rows that were learned from": (
        lambda o, folder, rows: with_test_labels(o, folder, LABELLED[:1], ["eins"]),
        f"1 ids .*too: '{LABELLED[0]}'",
    ),
    "a bundle that does not fit": (
        lambda o, folder, rows: replace(o, data=saved(folder / "small.npy", rows[:, :, :4])),
        "does not take the rows of .*small.npy",
    ),
    "features of another bundle": (features_of(ORDER, bundle="sha256:0"), "vaefeat.bundle sha256:0"),
    "features of other rows": (features_of(ORDER), "other features .* for row"),
    "features of some rows": (features_of(np.arange(1000)), "without 797 of the 1,797 rows .* the first '1000'"),
    "features of an unfinished job": (lambda o, folder, rows: replace(o, features=folder), "_manifest.json"),
    "an id column of an array": (lambda o, folder, rows: replace(o, data_id_column="id"), "--id-column"),
    "too few labels for all that is asked for": (
        lambda o, folder, rows: replace(labels_of([0, 1, 2, 3], "abab")(o, folder, rows), only=("svc",)),
        "svc needs 4 labels a class, 'a' has 2",
    ),
}


def saved(path: Path, rows: NDArray[Any]) -> Path:
    np.save(path, rows)
    return path


def fractions(path: Path) -> Path:
    pq.write_table(pa.table({"id": [0, 1], "label": [0.5, 1.0]}), path)
    return path


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_clear_line_and_nothing_is_written(
    kind: str, options: FinetuneOptions, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    change, message = BAD[kind]
    with pytest.raises(InputError, match=message) as caught:
        finetune(change(options, tmp_path, digits_rows), console=QUIET)
    assert "\n" not in str(caught.value)
    assert not options.out.exists()


@pytest.mark.parametrize("wrong", [{"n_draws": 1}, {"max_steps": 0}, {"only": ("logistik",)}, {"name": "a b"}])
def test_impossible_settings_are_refused_before_anything_is_read(
    wrong: dict[str, Any], options: FinetuneOptions
) -> None:
    with pytest.raises((ConfigError, ValueError)):
        replace(options, bundle=Path("no"), **wrong)


def test_folder_with_a_bundle_is_refused_at_once(options: FinetuneOptions, digits_bundle: Path) -> None:
    with pytest.raises(InputError, match="holds a bundle already"):
        finetune(replace(options, out=digits_bundle, labels=(Path("no.csv"),)), console=QUIET)


def test_interrupted_write_leaves_no_bundle(options: FinetuneOptions) -> None:
    """A folder in the place of a file stands for any failure between the first file and the last."""
    (options.out / "results.json").mkdir(parents=True)
    with pytest.raises(InputError, match="could not write"):
        finetune(options, console=QUIET)
    assert not (options.out / "bundle.json").exists()


def test_command_prints_the_table_and_how_to_serve(options: FinetuneOptions) -> None:
    done = command(options, "--try", "logistic", "--try", "knn")
    assert done.returncode == 0, done.stderr
    assert "logistic regression" in done.stdout
    assert f"python -m serving {options.out}" in done.stdout.replace("\n", "")


def test_command_with_bad_input_is_one_line(
    options: FinetuneOptions, run_here: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_here(app, *words(replace(options, labels=(Path("no.csv"),))))
    assert done.returncode == 2
    assert "no.csv, which does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def words(options: FinetuneOptions) -> list[str]:
    given = {"bundle": options.bundle, "data": options.data, "labels": options.labels[0], "out": options.out}
    return ["finetune", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


def command(options: FinetuneOptions, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines", *words(options), *more],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
