"""The stage that ships a classifier: planned, run and skipped as its labels and settings say."""

from __future__ import annotations

import io
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
from sklearn.datasets import load_digits, load_wine

from pipelines.__main__ import app
from pipelines.config import DataConfig, FinetuneConfig, RunConfig, load_config
from pipelines.datasets import load_named_rows
from pipelines.finetuning.comparison import Terms
from pipelines.finetuning.job import FinetuneOptions, finetune
from pipelines.finetuning.stage import FINETUNE
from pipelines.job import Job
from pipelines.run import run, run_stage, show_plan, stages_of
from pipelines.stages import Record, plan
from vaefeat import OnnxPredictor, load_bundle
from vaefeat.errors import ConfigError, InputError

TARGET = load_digits().target
LABELLED, TEST = np.split(np.random.default_rng(0).permutation(len(TARGET))[:400], [100])
QUIET = Console(quiet=True)


def write_labels(path: Path, ids: NDArray[np.int64], labels: NDArray[np.int64] | None = None) -> Path:
    said = TARGET[ids] if labels is None else labels
    path.write_text("id,label\n" + "".join(f"{i},{label}\n" for i, label in zip(ids, said, strict=True)))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with a configuration and labels, where the encoder is trained and exported."""
    folder = tmp_path_factory.mktemp("job")
    write_labels(folder / "labels.csv", LABELLED)
    write_labels(folder / "test.csv", TEST)
    (folder / "job.toml").write_text(
        f'name = "digits"\nout = "{folder / "run"}"\npreset = "textbook"\n'
        "[model]\nlatent_dim = 8\nchannels = [8, 8]\nhidden_dims = [32]\n"
        "[train]\nmax_epochs = 4\n[probe]\nn_draws = 2\n[serve]\nengine = 'local'\n"
        f'[finetune]\nlabels = "{folder / "labels.csv"}"\nonly = ["logistic", "knn"]\nn_draws = 2\n'
    )
    for stage in ("pretrain", "export"):
        run_stage(stage, load_config(folder / "job.toml"), console=QUIET)
    return folder


@pytest.fixture
def config(place: Path) -> RunConfig:
    return load_config(place / "job.toml")


def with_labels(config: RunConfig, *files: Path) -> RunConfig:
    return replace(config, finetune=replace(config.finetune, labels=tuple(map(str, files))))


def verdicts(config: RunConfig) -> dict[str, tuple[str, ...]]:
    job = Job(config)
    return {verdict.stage.name: verdict.reasons for verdict in plan(stages_of(job), job)}


def test_stage_is_planned_only_where_labels_are_named(config: RunConfig) -> None:
    without = replace(config, finetune=FinetuneConfig())
    assert FINETUNE not in stages_of(Job(without))
    assert [stage.name for stage in stages_of(Job(config))] == [
        "pretrain",
        "export",
        "embed",
        "check",
        "evaluate",
        "finetune",
        "report",
    ]
    with pytest.raises(InputError, match=r"'finetune' of a job without labels.*finetune.labels"):
        run_stage("finetune", without, console=QUIET)


def test_stage_runs_once_and_again_when_its_labels_or_settings_change(
    config: RunConfig, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = write_labels(tmp_path / "labels.csv", LABELLED)
    config = with_labels(config, labels)
    told = []
    for changed in (
        config,
        config,
        replace(config, finetune=replace(config.finetune, n_draws=3)),
        replace(config, probe=replace(config.probe, n_labels=60)),
    ):
        run_stage("finetune", changed, console=QUIET)
        told += re.findall(r"^finetune: (.*)$", capsys.readouterr().err, flags=re.M)
    assert told[1] == "done before"
    assert told[2:] == ["finetune.n_draws is 3, was 2", "finetune.n_draws is 2, was 3"]
    before = (place / "run" / "classifier" / "bundle.json").read_bytes()
    write_labels(labels, np.concatenate([LABELLED, TEST[:50]]))
    assert verdicts(config)["finetune"] == (f"finetune.labels {labels} is not what it was",)
    run_stage("finetune", config, console=QUIET)
    assert (place / "run" / "classifier" / "bundle.json").read_bytes() != before
    (place / "run" / "classifier" / "comparison.png").unlink()
    assert verdicts(config)["finetune"] == ("classifier/comparison.png is missing",)
    tested = replace(config, finetune=replace(config.finetune, test_labels=str(place / "test.csv")))
    with pytest.raises(InputError, match=r"50 ids .* too"):
        run_stage("finetune", tested, console=QUIET)


def test_record_names_bundle_rows_and_labels_and_holds_wherever_the_command_is_given(
    config: RunConfig, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stage("finetune", config, console=QUIET)
    record = Record.read(Job(config), "finetune")
    assert record is not None
    assert record.inputs.files.keys() == {"bundle.json", f"finetune.labels {place / 'labels.csv'}"}
    assert record.inputs.rows is not None
    assert {"classifier/bundle.json", "classifier/results.json"} <= record.outputs.keys()
    monkeypatch.chdir(place)
    assert verdicts(with_labels(config, Path("labels.csv")))["finetune"] == ()


def test_stage_ships_what_the_verb_ships(config: RunConfig, place: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "digits.npy", load_digits().images.astype(np.uint8)[:, None])
    run_stage("finetune", config, console=QUIET)
    options = FinetuneOptions(
        bundle=place / "run",
        data=tmp_path / "digits.npy",
        labels=(place / "labels.csv",),
        out=tmp_path / "out",
        only=("logistic", "knn"),
        n_draws=2,
    )
    assert load_bundle(place / "run" / "classifier").digest == finetune(options, console=QUIET).bundle.digest
    said = OnnxPredictor(place / "run" / "classifier", device="cpu").predict(np.load(options.data)[TEST])
    assert np.mean(said == TARGET[TEST]) > 0.4  # a tenth where rows get one another's labels


def test_dry_run_prints_the_stage_and_changes_nothing(config: RunConfig, tmp_path: Path) -> None:
    console = Console(width=300, file=io.StringIO())
    show_plan(replace(config, out=str(tmp_path / "out")), console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert re.search(r"finetune +will run +ship a classifier of the labels: has not run yet", shown)
    assert "labels.csv -> classifier/bundle.json" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("id,label\n0,a\n1,a\n7,b\n", [], "one row of the class 'b'"),
        ("id,label\n0,a\n1,a\n5000,b\n2,b\n", [], "ids that are not in digits: '5000'"),
        ("row,label\n0,a\n", [], "no column 'id'"),
        ("id,label\n0,a\n1,a\n2,b\n3,b\n", ["finetune.only=['svc']"], "svc needs 4 labels a class"),
        ("id,label\n0,a\n1,a\n2,b\n3,b\n", ["finetune.only=['svm']"], "did you mean 'svc'"),
        ("id,label\n0,a\n1,a\n2,b\n3,b\n", ["finetune.test_labels=no.csv"], "no.csv, which does not exist"),
        ("id,label\n0,a\n1,a\n2,b\n3,b\n", ["finetune.id_column=x"], r"finetune.id_column\) 'x' for digits"),
        ("id,label\n0,a\n1,a\n2,b\n3,b\n", ["finetune.name=a b"], "name"),
    ],
)
def test_bad_labels_are_one_line_before_anything_is_trained(
    text: str,
    overrides: list[str],
    message: str,
    place: Path,
    tmp_path: Path,
    run_here: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    (tmp_path / "bad.csv").write_text(text)
    settings = [f"out={tmp_path / 'out'}", f"finetune.labels={tmp_path / 'bad.csv'}", *overrides]
    done = run_here(app, "run", str(place / "job.toml"), *(word for one in settings for word in ("--set", one)))
    assert done.returncode == 2
    assert re.search(message, done.stderr.replace("\n", " "))
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["job.toml", "--draws", "3"], r"got --draws beside .*wanted it in the file's table \[finetune\]"),
        (["--bundle", "run", "--labels", "labels.csv"], "got no --data, --out; wanted --bundle, --data, --labels"),
        (["--bundle", "b", "--data", "d", "--labels", "l", "--out", "o", "--force"], "or a TOML file"),
    ],
)
def test_command_takes_a_file_or_options_and_not_both(
    words: list[str], message: str, run_here: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_here(app, "finetune", *words)
    assert done.returncode == 2
    assert re.search(message, done.stderr.replace("\n", " "))


def test_verb_with_a_file_does_the_stage(
    config: RunConfig, place: Path, run_here: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_here(app, "finetune", str(place / "job.toml"), "--force")
    assert done.returncode == 0, done.stderr
    assert "labels of each class: " in done.stderr
    assert re.search(r"error \d+\.\d % \(.*python -m serving .*/classifier", done.stdout)


def test_run_puts_the_comparison_into_the_report(config: RunConfig, place: Path) -> None:
    config = replace(config, finetune=replace(config.finetune, test_labels=str(place / "test.csv")))
    run(config, console=QUIET)
    page = (place / "run" / "report.html").read_text()
    assert "The classifier of 100 labels" in page
    assert load_bundle(place / "run" / "classifier").digest in page
    assert 'alt="Errors of the classifiers' in page
    assert re.search(r"Asked for 300 labels that nothing was chosen by, it errs in\s+\d", page)
    assert "<td>finetune</td>" in page
    assert all(reasons == () for reasons in verdicts(config).values())
    without = verdicts(replace(config, finetune=FinetuneConfig()))
    assert "classifier/results.json is no longer read" in without["report"]


def test_ids_are_a_column_of_parquet_that_is_no_feature(tmp_path: Path) -> None:
    wine = load_wine()
    columns = {name: wine.data[:, i].astype(np.float32) for i, name in enumerate(wine.feature_names)}
    numbers = np.arange(1000, 1000 + len(wine.target))
    keys = [f"w{number}" for number in numbers]
    pq.write_table(pa.table({"key": keys, "number": numbers, **columns}), tmp_path / "wine.parquet")
    data = DataConfig(path=str(tmp_path / "wine.parquet"))
    assert load_named_rows(data, id_column="key").ids == keys
    assert load_named_rows(data, id_column=None).ids[:2] == ["0", "1"]
    jobs = [Job(RunConfig(data=data, finetune=FinetuneConfig(id_column=name))) for name in ("key", "", "key")]
    by_key, by_number, again = (job.digest_of_rows("named") for job in jobs)
    assert by_key == again != by_number
    with pytest.raises(InputError, match=r"finetune.id_column='number' .* trained on like any other"):
        load_named_rows(data, id_column="number")


def test_ids_of_images_are_their_paths_in_the_order_of_the_rows(digits_rows: NDArray[np.uint8], tmp_path: Path) -> None:
    for row in range(40):
        path = tmp_path / "train" / str(TARGET[row]) / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits_rows[row, 0]).save(path)
    rows = load_named_rows(DataConfig(path=str(tmp_path)), id_column=None)
    for name, row in zip(rows.ids, rows.array, strict=True):
        number = int(Path(name).stem)
        assert name == f"train/{TARGET[number]}/{number}.png"
        np.testing.assert_array_equal(row, digits_rows[number])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"labels": 3}, "finetune.labels=3"),
        ({"labels": ["a.csv", ""]}, "the name of a file, or a list"),
        ({"labels": "a.csv", "n_draws": 1}, "finetune.n_draws"),
        ({"labels": "a.csv", "only": "svc"}, "wanted a list"),
        ({"test_labels": "a.csv"}, "finetune.test_labels without finetune.labels"),
        ({"label": "a.csv", "max_step": 3}, "did you mean 'max_steps'"),
    ],
)
def test_impossible_table_is_refused_by_name(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict({"finetune": table})


def test_defaults_are_those_of_the_verb() -> None:
    wanted, verb = FinetuneConfig(), Terms()
    assert (wanted.n_draws, wanted.max_steps, wanted.seed) == (verb.n_draws, verb.max_steps, verb.seed)
    assert (tuple(wanted.only), wanted.name or None) == (verb.only, verb.name)
