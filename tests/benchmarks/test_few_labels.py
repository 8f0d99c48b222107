"""The benchmark of few labels: its draws, what is kept of a stopped row, and that its checks tell a failure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from typer.testing import CliRunner

from benchmarks.few_labels import NAMES, app
from benchmarks.few_labels_features import FEATURES, Plan
from benchmarks.few_labels_report import checks, figure, headlines, merge
from benchmarks.few_labels_rows import ROWS, Ledger
from benchmarks.few_labels_tasks import BUDGETS, TASKS, Task, make_table, open_task
from vaefeat.data import Rows
from vaefeat.errors import ConfigError, InputError
from vaefeat.plots import png


def row(**heads: dict[str, float]) -> dict[str, Any]:
    """Make a row of the results with these means by head and number of labels."""
    cells = {
        head: {
            budget: {"mean": mean, "interval": 0.1, "errors": [mean], "fit_seconds": 0.1} for budget, mean in of.items()
        }
        for head, of in heads.items()
    }
    return {"title": "a row", "draws": 1, "pretraining_seconds": 1.0, "heads": cells}


def verdict(rows: dict[str, Any], words: str) -> bool | None:
    (found,) = [check for check in checks(rows) if check.claim.startswith(words)]
    return found.holds


def as_set(rows: NDArray[Any]) -> set[bytes]:
    return {one.tobytes() for one in rows}


def test_quick_run_says_what_was_measured_and_lists_its_draws(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["--quick", "--work", str(tmp_path)])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report["rows"]) == {
        "digits/raw",
        "digits/pca",
        "digits/random",
        "digits/ours",
        "digits/supervised",
        "table/raw",
    }
    assert report["split"] == "validation"
    raw = report["rows"]["digits/raw"]["heads"]
    assert set(raw) == {"lr", "lr_scaled"}
    assert 5 < raw["lr"]["100"]["mean"] < 30
    ours = report["rows"]["digits/ours"]
    assert set(ours["heads"]) == {"lr", "lr_scaled", "prototype", "logistic", "mixture", "auto"}
    assert ours["settings"]["train"]["objective"] == "contrastive"
    assert ours["pretraining_seconds"] > 0
    assert set(report["draws"]["digits"]["100"]) == {"0", "1"}
    assert (tmp_path / "few-labels.png").read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(app, ["--quick", "--work", str(tmp_path), "--only", "digits/ours"])
    assert "draw" not in again.stderr.partition("wrote")[0].partition("\n")[2], "what was measured is not done again"
    assert json.loads(again.stdout.splitlines()[-1])["rows"]["digits/ours"]["heads"] == ours["heads"]


@pytest.mark.parametrize("name", ["digits", "table", "traits"])
@pytest.mark.parametrize("validation", [False, True])
def test_draws_are_balanced_apart_from_the_judges_and_listed(name: str, validation: bool) -> None:
    task = open_task(name, None, validation=validation)
    judges, truth = task.judges()
    assert len(judges) == len(truth)
    assert not as_set(task.train) & as_set(judges)
    listed = task.listed(3)
    assert set(listed) == {str(budget) for budget in task.budgets()}
    for budget in task.budgets():
        draws = [task.draw(budget, seed) for seed in range(3)]
        assert len({draw.tobytes() for draw in draws}) == 3, "draws differ"
        for seed, chosen in enumerate(draws):
            assert (np.bincount(task.train_labels[chosen]) == budget / task.n_classes).all()
            assert (task.draw(budget, seed) == chosen).all()
            if budget <= 100:
                assert listed[str(budget)][str(seed)] == chosen.tolist()
    partial = task.partial(task.draw(task.budgets()[0], 0))
    assert (partial >= 0).sum() == task.budgets()[0]


def test_validation_takes_the_last_training_rows_and_reads_no_test_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def parts(data: Path | None) -> Any:
        for split in ("train", "test"):
            asked.append(split)
            yield Rows(array=np.arange(60, dtype=np.float32)[:, None], labels=np.arange(60) % 2)

    monkeypatch.setitem(TASKS, "digits", parts)
    task = open_task("digits", None, validation=True)
    judges, truth = task.judges()
    assert judges[:, 0].tolist() == list(range(50, 60))
    assert truth.tolist() == [0, 1] * 5
    assert len(task.train) == 50
    assert asked == ["train"]
    open_task("digits", None, validation=False).judges()
    assert asked == ["train", "train", "test"]


def test_table_has_the_structure_that_it_says() -> None:
    rows, labels = make_table(6000, seed=0)
    others, _ = make_table(6000, seed=1)
    assert rows.shape == (6000, 38)
    assert np.bincount(labels).min() > 1350
    assert (rows[:, 10:].reshape(6000, -1).sum(axis=1) == 6).all(), "six one-hot columns"
    assert (rows[:, :3] > 0).all()
    tails = stats.kurtosis(rows[:, :10], axis=0)
    assert tails[:3].min() > 5 > tails[3:].max()
    assert not as_set(rows) & as_set(others)
    # Another seed draws other rows of the same table.
    np.testing.assert_allclose(rows[:, 3:].mean(axis=0), others[:, 3:].mean(axis=0), atol=0.15)


def test_table_without_labels_shows_its_clusters_and_not_its_classes() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.mixture import GaussianMixture
    from sklearn.preprocessing import StandardScaler

    rows, labels = make_table(4000, seed=0)
    rows = StandardScaler().fit_transform(np.clip(rows, -10, 10)).astype(np.float64)
    cluster = GaussianMixture(12, covariance_type="diag", random_state=0, reg_covar=1e-2).fit_predict(rows)
    purity = np.mean([np.bincount(labels[cluster == c]).max() / (cluster == c).sum() for c in np.unique(cluster)])
    assert purity > 0.6, "a cluster is of one class, mostly; 0.25 would be chance"
    few = np.arange(40)
    linear = LogisticRegression(C=0.1).fit(rows[few], labels[few]).score(rows[40:], labels[40:])
    assert linear < 0.8, "and few labels do not tell classes apart by themselves"


@pytest.mark.parametrize("name", ["raw", "pca", "random"])
def test_features_of_a_row_do_not_depend_on_its_neighbours(name: str, tmp_path: Path) -> None:
    for task_name in ("digits", "table"):
        task = open_task(task_name, None, validation=True)
        features = FEATURES[name](task, Plan(tmp_path))
        both = features.embed(task.train[:5])
        assert both.dtype == np.float32
        np.testing.assert_allclose(features.embed(task.train[2:3]), both[2:3], rtol=1e-4, atol=1e-4)


def test_encoder_of_other_rows_is_not_used_again(tmp_path: Path) -> None:
    plan = Plan(tmp_path, quick=True)
    task = open_task("table", None, validation=True)
    FEATURES["ours"](task, plan)
    changed = Task("table", "validation", task.train[1:], task.train_labels[1:], task.judges)
    with pytest.raises(InputError, match="other rows"):
        FEATURES["ours"](changed, plan)


def test_stopped_row_goes_on_and_one_of_other_settings_begins_anew(tmp_path: Path) -> None:
    truth = np.array([0, 1, 1, 0])
    path = tmp_path / "row.json"
    first = Ledger(path, {"C": 1.0})
    first.measure("lr", 10, 0, truth, lambda: (np.array([0, 1, 1, 1]), 0.5))

    def never() -> Any:
        raise AssertionError("measured before")

    second = Ledger(path, {"C": 1.0})
    second.measure("lr", 10, 0, truth, never)
    second.measure("lr", 10, 1, truth, lambda: (truth, 1.5))
    cell = second.cells(2)["lr"]["10"]
    assert cell["errors"] == [25.0, 0.0]
    assert cell["fit_seconds"] == 1.0
    low, high = stats.t.interval(0.95, 1, loc=12.5, scale=stats.sem([25.0, 0.0]))
    assert cell["interval"] == pytest.approx((high - low) / 2, abs=1e-3)
    assert second.cells(1)["lr"]["10"]["interval"] is None
    assert len(second.commits) == 1
    assert Ledger(path, {"C": 2.0}).cells(2) == {}


def test_checks_tell_a_baseline_that_is_better_and_a_curve_that_turns_up() -> None:
    rows = {
        f"mnist/{name}": row(lr_scaled={"100": 20.0, "1000": 10.0}) for name in ("raw", "pca", "textbook", "random")
    }
    rows["mnist/ours"] = row(lr_scaled={"10": 30.0, "100": 5.0, "1000": 3.0, "all": 2.0})
    assert verdict(rows, "mnist, ours, 100 labels, lr_scaled") is True
    assert verdict(rows, "mnist, ours, 1000 labels, lr_scaled") is True
    assert verdict(rows, "mnist, ours, lr_scaled") is True
    assert verdict(rows, "mnist, ours, 100 labels, lr:") is None
    rows["mnist/random"] = row(lr_scaled={"100": 5.0, "1000": 10.0})
    assert verdict(rows, "mnist, ours, 100 labels, lr_scaled") is False, "as good is not better"
    del rows["mnist/random"]
    assert verdict(rows, "mnist, ours, 100 labels, lr_scaled") is None, "a baseline is missing"
    rows["mnist/raw"] = row(lr_scaled={"100": 4.0})
    assert verdict(rows, "mnist, ours, 100 labels, lr_scaled") is False, "one that is better is enough"
    rows["mnist/ours"] = row(lr_scaled={"10": 30.0, "100": 5.0, "1000": 5.1, "all": 2.0})
    assert verdict(rows, "mnist, ours, lr_scaled") is False
    assert {check.holds for check in checks({})} == {None}


def test_results_take_rows_in_and_keep_the_others(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    ours = row(lr_scaled={"100": 5.0, "1000": 3.0}, auto={"100": 3.5})
    merge(path, {"mnist/ours": ours}, {"mnist": {"100": {"0": [1], "1": [2]}}}, split="test")
    merge(path, {"mnist/raw": row(lr={"100": 25.0})}, {"mnist": {"100": {"0": [1]}}}, split="test")
    known = json.loads(path.read_text())
    assert list(known["rows"]) == ["mnist/raw", "mnist/ours"]
    assert known["mnist"] == {"frozen_lr_100": 5.0, "frozen_lr_1000": 3.0, "frozen_best_100": 3.5}
    assert known["mnist"] == headlines(known["rows"])["mnist"]
    assert set(known["draws"]["mnist"]["100"]) == {"0", "1"}, "the longer list"
    with pytest.raises(InputError, match="test rows"):
        merge(path, {}, {}, split="validation")
    path.write_text("[]")
    with pytest.raises(InputError, match="no results file"):
        merge(path, {}, {}, split="test")


def test_figure_has_a_panel_for_each_data_set() -> None:
    rows = {"mnist/raw": row(lr_scaled={"10": 60.0, "100": 20.0}), "table/ours": row(auto={"4": 30.0, "40": 9.0})}
    made = figure(rows)
    assert made is not None
    assert [axes.get_title(loc="left") or axes.get_title() for axes in made.axes] == ["mnist", "table"]
    assert png(made).startswith(b"\x89PNG")
    assert figure({}) is None


def test_every_row_has_labels_to_be_measured_with() -> None:
    assert set(BUDGETS) == set(TASKS)
    assert {name.partition("/")[0] for name in NAMES} == set(TASKS)
    assert {name.partition("/")[2] for name in NAMES} == set(ROWS)


def test_rows_that_are_not_there_and_figures_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["--only", "digits/rawe"])
    assert isinstance(done.exception, ConfigError)
    assert "did you mean 'digits/raw'" in str(done.exception)
    done = CliRunner().invoke(app, ["--quick", "--results", str(tmp_path / "results.json")])
    assert isinstance(done.exception, InputError)
    done = CliRunner().invoke(app, ["--only", "mnist/raw", "--work", str(tmp_path)])
    assert isinstance(done.exception, InputError)
    assert "--data" in str(done.exception)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("digits/")])
def test_every_row_runs_on_digits(name: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["--quick", "--draws", "1", "--only", name, "--work", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout.splitlines()[-1])["rows"].values()
    means = [cell["mean"] for cells in found["heads"].values() for cell in cells.values()]
    assert means
    assert all(0 < mean < 95 for mean in means)
