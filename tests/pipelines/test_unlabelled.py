"""Jobs on rows without labels: what is left out, what takes training rows, and what the few labels in a file bring."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits

from pipelines import report_pictures
from pipelines.__main__ import app
from pipelines.config import DataConfig, FinetuneConfig, RunConfig, TrackConfig, WorkersConfig, load_config
from pipelines.datasets import Dataset, Parts, is_labelled, load_parts, open_rows
from pipelines.features import Features, compare_features, read_features
from pipelines.finetuning.stage import labels_in_files
from pipelines.job import Job
from pipelines.report_pictures import neighbourhoods
from pipelines.run import run, run_stage, show_plan, stages_of
from pipelines.stages import plan
from vaefeat import OnnxEncoder, OnnxPredictor, load_bundle
from vaefeat.data import Rows, load_rows
from vaefeat.errors import InputError, RemoteError

TARGET = load_digits().target
QUIET = Console(quiet=True)
SMALL = (
    'preset = "textbook"\n[model]\nlatent_dim = 8\nchannels = [8, 8]\nhidden_dims = [32]\n[serve]\nengine = "local"\n'
)
LEFT_OUT = "evaluate is left out: the rows come without labels"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with a job on digits without their labels, which has run, and a file of 100 labels."""
    folder = tmp_path_factory.mktemp("unlabelled")
    np.save(folder / "rows.npy", load_digits().images.astype(np.uint8)[:, None])
    some = np.random.default_rng(0).permutation(len(TARGET))[:100]
    (folder / "labels.csv").write_text("id,label\n" + "".join(f"{row},{TARGET[row]}\n" for row in some))
    (folder / "job.toml").write_text(
        f'name = "plain"\nout = "{folder / "run"}"\n{SMALL}[train]\nmax_epochs = 4\n'
        f'[data]\npath = "{folder / "rows.npy"}"\n'
    )
    run(load_config(folder / "job.toml"), console=QUIET)
    return folder


@pytest.fixture
def config(place: Path) -> RunConfig:
    return load_config(place / "job.toml")


def with_labels(config: RunConfig, place: Path) -> RunConfig:
    wanted = FinetuneConfig(labels=str(place / "labels.csv"), only=("logistic", "knn"), n_draws=2)
    return replace(config, finetune=wanted)


def names_of_stages(config: RunConfig) -> list[str]:
    return [stage.name for stage in stages_of(Job(config))]


def test_stages_are_all_but_evaluate_and_nothing_reads_what_it_writes(config: RunConfig, place: Path) -> None:
    assert names_of_stages(config) == ["pretrain", "export", "embed", "check", "report"]
    asked = replace(with_labels(config, place), track=TrackConfig(mlflow=True))
    assert names_of_stages(asked) == ["pretrain", "export", "embed", "check", "finetune", "report", "track"]
    assert not any("metrics.json" in stage.reads for stage in stages_of(Job(asked)))
    assert "evaluate" in names_of_stages(replace(asked, data=DataConfig()))


def test_files_have_every_row_and_no_label(config: RunConfig, place: Path, digits_rows: NDArray[np.uint8]) -> None:
    out = place / "run"
    table = pq.read_table(out / "features.parquet")
    assert table.column_names == ["split", "row", "mean", "hidden"]
    assert set(table["split"].to_pylist()) == {"train"}
    np.testing.assert_array_equal(np.array(table["mean"].to_pylist(), np.float32), OnnxEncoder(out).embed(digits_rows))
    check = json.loads((out / "check.json").read_text())
    assert (check["same_bits"], check["rows"]) == (True, len(TARGET))
    assert load_bundle(out).manifest.data["n_rows"] == len(TARGET)
    assert not (out / "metrics.json").exists()
    assert all(not verdict.due for verdict in plan(stages_of(Job(config)), Job(config)))


def test_report_has_everything_that_needs_no_label(place: Path) -> None:
    page = (place / "run" / "report.html").read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == ["Training", "What the model learned", "Who is near whom", "What it cost", "How to get it again"]
    assert "Training rows, and their reconstructions" in page
    assert "there were none to judge its features by" in page
    for word in ("test error", "metrics.json", "evaluate", "same class"):
        assert word not in page
    # Curves, reconstructions, samples, the map; six rows with eight neighbours each.
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(pictures) == 4 + 6 * 9
    for content in pictures:
        with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
            picture.load()
    with Image.open(place / "run" / "overview.png") as picture:
        assert picture.size[0] > 1000


def test_plan_and_end_of_run_say_what_is_left_out(config: RunConfig, place: Path) -> None:
    for asked, more in ((config, True), (with_labels(config, place), False)):
        console = Console(width=300, file=io.StringIO())
        show_plan(asked, console=console)
        shown = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
        assert LEFT_OUT in shown
        assert ("--set finetune.labels=labels.csv" in shown) == more
        assert "all rows, bundle.json -> features.parquet" in shown
    console = Console(width=300, file=io.StringIO())
    run(config, console=console)
    assert LEFT_OUT in console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO


@pytest.mark.parametrize("words", [("evaluate",), ("evaluate", "--dry-run"), ("run", "--force", "evaluate")])
def test_evaluate_is_one_error_that_says_what_is_wanted(
    words: tuple[str, ...], place: Path, run_here: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    verb, *options = words
    done = run_here(app, verb, place / "job.toml", *options)
    assert done.returncode == 2
    assert re.search(r"'evaluate' for .*rows.npy, whose rows come without labels, wanted some", done.stderr)
    assert "Traceback" not in done.stderr


def test_labels_in_a_file_ship_a_classifier_and_colour_the_map(config: RunConfig, place: Path, tmp_path: Path) -> None:
    before = (place / "run" / "overview.png").read_bytes()
    asked = with_labels(config, place)
    run(asked, console=QUIET)
    said = OnnxPredictor(place / "run" / "classifier", device="cpu").predict(np.load(place / "rows.npy"))
    assert np.mean(said == TARGET) > 0.4  # a tenth where rows get one another's labels
    page = (place / "run" / "report.html").read_text()
    assert "beside it, a classifier of 100 labels" in page
    assert "<h2>The classifier of 100 labels</h2>" in page
    results = json.loads((place / "run" / "classifier" / "results.json").read_text())
    best = next(one for one in results["classifiers"] if one["name"] == results["shipped"])
    assert f"<b>{best['error_percent']:.1f} %</b>" in page
    assert (place / "run" / "overview.png").read_bytes() != before
    # Other labels are another map, whatever the classifiers say.
    other = tmp_path / "labels.csv"
    other.write_text((place / "labels.csv").read_text())
    job = Job(replace(asked, finetune=replace(asked.finetune, labels=str(other))))
    due = {verdict.stage.name: verdict.reasons for verdict in plan(stages_of(job), job)}
    assert any("labels.csv is new" in reason for reason in due["report"])
    run(config, console=QUIET)  # as the other tests expect it
    assert "The classifier of" not in (place / "run" / "report.html").read_text()


def test_labels_of_files_are_at_their_rows_on_the_map(config: RunConfig, place: Path) -> None:
    job = Job(with_labels(config, place))
    ids = [int(line.split(",")[0]) for line in (place / "labels.csv").read_text().splitlines()[1:]]
    found = labels_in_files(job)
    assert found is not None
    assert [row for row, label in enumerate(found) if label is not None] == sorted(ids)
    # One latent that is the number of the row is the first coordinate.
    numbers = np.arange(len(TARGET), dtype=np.float32)[:, None]
    points, labels, _ = report_pictures._map(job, Features({"mean": numbers}, {"mean": numbers[:0]}))
    assert labels is not None
    assert sorted(points[:, 0]) == numbers.ravel().tolist()
    said = {int(row): label for row, label in zip(points[:, 0], labels, strict=True) if label is not None}
    assert said == {row: str(TARGET[row]) for row in ids}


def test_rows_that_get_labels_are_judged_by_the_same_command(place: Path, config: RunConfig) -> None:
    np.savez(place / "rows.npz", X=np.load(place / "rows.npy"), y=TARGET)
    labelled = replace(config, data=DataConfig(path=str(place / "rows.npz")))
    due = {verdict.stage.name: verdict.reasons for verdict in plan(stages_of(Job(labelled)), Job(labelled))}
    assert "the rows are others" in due["embed"]
    assert due["evaluate"] == ("has not run yet",)
    # And the other way round: labels that came with the rows can be left out.
    assert not is_labelled(replace(labelled.data, labelled=False))
    again = Job(replace(labelled, data=replace(labelled.data, labelled=False)))
    assert all(not verdict.due for verdict in plan(stages_of(again), again))


def test_row_is_not_its_own_neighbour_even_among_its_equals(place: Path) -> None:
    rows = np.repeat(np.load(place / "rows.npy")[:20], 12, axis=0)
    bundle = load_bundle(place / "run")
    means = OnnxEncoder(bundle).embed(rows)
    found = neighbourhoods(Parts(pretraining=Rows(array=rows), train=rows, test=rows[:0]), means, means[:0], bundle)
    assert len(found) == 6
    for query, others in found:
        names = [other.label for other in others]
        assert len(set(names)) == len(names) == 8
        assert query.label not in names
        # Eleven others are the same to the bit.
        assert {int(name.split()[1]) // 12 for name in names} == {int(query.label.split()[1]) // 12}


def test_library_looks_at_training_rows_where_there_are_no_test_rows(place: Path, config: RunConfig) -> None:
    kept, local, data = read_features(place / "run"), OnnxEncoder(place / "run"), Job(config).parts
    off = {**kept.train, "mean": kept.train["mean"].copy()}
    off["mean"][3, 0] += 1
    served = {output: (off[output], kept.test[output]) for output in off}
    with pytest.raises(RemoteError, match=r"the library and the file differ in training rows: 1 rows .* number 3"):
        compare_features(served, Features(off, kept.test), local, data, provider=local.provider)


def save_images(folder: Path, rows: NDArray[np.uint8], *, sizes: bool = False) -> None:
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        size = tuple(random.integers(8, 20, 2)) if sizes else (8, 8)
        Image.fromarray(row[0] * 15).resize(size).save(folder / f"{number:04d}.png")


def test_split_of_the_data_is_kept_without_labels(digits_rows: NDArray[np.uint8], tmp_path: Path) -> None:
    save_images(tmp_path / "train", digits_rows[:30])
    save_images(tmp_path / "test", digits_rows[30:40])
    data = DataConfig(path=str(tmp_path))
    parts = load_parts(data)
    assert not isinstance(parts, Dataset)
    np.testing.assert_array_equal(parts.train, digits_rows[:30] * 15)
    np.testing.assert_array_equal(parts.shown, digits_rows[30:40] * 15)
    assert (len(parts.pretraining), len(load_parts(replace(data, pretrain_on="all")).pretraining)) == (30, 40)
    job = Job(RunConfig(data=data))
    digest = job.digest_of_rows("parts")
    assert digest != job.digest_of_rows("pretraining")
    (tmp_path / "test" / "0000.png").write_bytes((tmp_path / "test" / "0001.png").read_bytes())
    assert Job(RunConfig(data=data)).digest_of_rows("parts") != digest


def test_split_of_other_shapes_is_refused_to_pretrain_on(digits_rows: NDArray[np.uint8], tmp_path: Path) -> None:
    save_images(tmp_path / "train", digits_rows[:5])
    (tmp_path / "test").mkdir()
    Image.new("L", (6, 6)).save(tmp_path / "test" / "0000.png")
    with pytest.raises(InputError, match=r"shape \(1, 8, 8\) in .* and \(1, 6, 6\) in .*wanted one shape"):
        load_parts(DataConfig(path=str(tmp_path), pretrain_on="all"))


def test_mnists_test_files_are_test_rows_without_labels(data_dir: Path, tmp_path: Path) -> None:
    for name in ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"):
        (tmp_path / name).symlink_to((data_dir / "MNIST" / "raw" / name).resolve())
    job = Job(RunConfig(data=DataConfig(path=str(tmp_path))))
    assert not job.is_labelled
    assert (len(job.parts.train), len(job.parts.test)) == (60_000, 10_000)


@pytest.mark.parametrize(
    ("columns", "table", "labelled"),
    [
        ({"a": [None, 1.0, 2.0], "b": [None, "x", "y"]}, True, False),
        ({"a": [None, 1.0, 2.0], "b": [None, "x", "y"], "label": ["u", "v", "u"]}, True, True),
        ({"a": [1.0, 2.0], "label": ["u", "v"]}, False, True),
        ({"a": [1.0, 2.0]}, False, False),
    ],
)
def test_one_look_tells_whether_rows_have_labels(
    columns: dict[str, list[object]], table: bool, labelled: bool, tmp_path: Path
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    data = DataConfig(path=str(tmp_path / "rows.parquet"), table=table)
    assert is_labelled(data) == labelled


def test_labels_that_some_rows_have_can_be_left_out_and_are_no_feature(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1.0, 2.0, 4.0], "label": [3, None, 5]}), tmp_path / "rows.parquet")
    data = DataConfig(path=str(tmp_path / "rows.parquet"))
    with pytest.raises(InputError, match=r"data\.labelled=false"):
        load_parts(data)
    parts = load_parts(replace(data, labelled=False))
    np.testing.assert_array_equal(parts.train, [[1], [2], [4]])
    assert parts.pretraining.labels is None


def test_photos_of_mixed_sizes_in_folders_of_years_run_with_labels_by_their_paths(
    digits_rows: NDArray[np.uint8], tmp_path: Path, run_here: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    photos = tmp_path / "photos"
    for year in (0, 1):
        save_images(photos / str(2020 + year), digits_rows[year * 100 : (year + 1) * 100], sizes=True)
    ids = [f"{2020 + row // 100}/{row % 100:04d}.png" for row in range(0, 200, 2)]
    lines = [f"{name},is {TARGET[row] < 5}\n" for name, row in zip(ids, range(0, 200, 2), strict=True)]
    (tmp_path / "labels.csv").write_text("id,label\n" + "".join(lines))
    (tmp_path / "job.toml").write_text(
        f'name = "photos"\nout = "{tmp_path / "run"}"\n{SMALL}[train]\nmax_epochs = 2\n'
        f'[data]\npath = "{photos}"\nlabelled = false\n'
        f'[finetune]\nlabels = "{tmp_path / "labels.csv"}"\nonly = ["logistic"]\nn_draws = 2\n'
    )
    refused = run_here(app, "run", tmp_path / "job.toml")
    assert refused.returncode == 2
    assert "data.image_size = [height, width]" in refused.stderr
    assert not (tmp_path / "run").exists()
    done = run_here(app, "run", tmp_path / "job.toml", "--set", "data.image_size=[12, 16]")
    assert done.returncode == 0, done.stderr
    assert LEFT_OUT in done.stdout
    classifier = OnnxPredictor(tmp_path / "run" / "classifier", device="cpu")
    assert classifier.input.shape == OnnxEncoder(tmp_path / "run").input.shape == (1, 12, 16)
    rows = load_rows(photos, image_size=(12, 16)).array
    assert set(classifier.predict(rows)) <= {"is True", "is False"}
    kept = np.array(pq.read_table(tmp_path / "run" / "features.parquet")["mean"].to_pylist(), np.float32)
    np.testing.assert_array_equal(kept, OnnxEncoder(tmp_path / "run").embed(rows))
    # The folder is enough to do it again.
    again = load_config(tmp_path / "run" / "config.toml", (f"out={tmp_path / 'again'}",))
    for stage in ("pretrain", "export"):
        run_stage(stage, again, console=QUIET)
    assert load_bundle(tmp_path / "again").digest == load_bundle(tmp_path / "run").digest


def test_images_that_are_read_while_training_are_resized_too(digits_rows: NDArray[np.uint8], tmp_path: Path) -> None:
    save_images(tmp_path, digits_rows[:20], sizes=True)
    data = DataConfig(path=str(tmp_path), image_size=9)
    blocks = open_rows(RunConfig(data=data, workers=WorkersConfig(rows="stream")))
    assert not isinstance(blocks, Rows)
    assert blocks.row_shape == (1, 9, 9)
    np.testing.assert_array_equal(blocks.read(0), load_parts(data).train)


@pytest.mark.parametrize("size", [0, -3, "64", 2.5, [3], [3, 4, 5], [3, 0], [3, "4"], True])
def test_impossible_image_size_is_refused_by_name(size: object) -> None:
    with pytest.raises(InputError, match=r"data.image_size=.*wanted \[height, width\]"):
        DataConfig.from_dict({"path": "photos", "image_size": size})


def test_image_size_of_what_is_no_image_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.eye(10))
    with pytest.raises(InputError, match="it applies to encoded images only"):
        load_parts(DataConfig(path=str(tmp_path / "rows.npy"), image_size=(8, 8)))
    with pytest.raises(InputError, match="the embedded digits"):
        DataConfig(image_size=(8, 8))
