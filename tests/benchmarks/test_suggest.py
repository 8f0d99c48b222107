"""The benchmark of suggestions: what it prints for a bundle, who judges, and how gains are counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import suggest
from benchmarks.few_labels_tasks import open_task
from benchmarks.suggest import HEADS, METHODS, OTHERS, app
from vaefeat.errors import ConfigError


@pytest.mark.parametrize("validation", [True, False])
def test_suggested_rows_are_measured_against_random_ones(digits_bundle: Path, validation: bool) -> None:
    # The digits need no folder of data.
    words = ["--data", ".", "--bundle", f"digits={digits_bundle}", "--draws", "2", "--rows", "500"]
    done = CliRunner().invoke(app, [*words, *(["--validation"] if validation else [])])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["split"] == ("validation" if validation else "test")
    methods = {**METHODS, **(OTHERS if validation else {})}
    measured = report["tasks"]["digits"]
    assert list(measured) == [f"{name}, {budget}" for name, (_, budgets) in methods.items() for budget in budgets]
    assert all(set(row) == set(HEADS) for row in measured.values())
    assert all(0 < cell["error"] < 70 for row in measured.values() for cell in row.values())
    assert measured["random, 50"]["few_label_head"]["gain"] == 0
    gain = measured["suggested, 50"]["standardised"]
    assert gain["gain"] == pytest.approx(measured["random, 50"]["standardised"]["error"] - gain["error"], abs=0.02)


@pytest.mark.parametrize("method", [*METHODS, *OTHERS])
def test_every_method_chooses_the_budget_without_repeats_and_again_the_same(method: str) -> None:
    task = open_task("digits", None, validation=True)
    rows = task.train[:400].reshape(400, -1).astype(np.float32)
    draw = suggest._Draw(rows, task.train_labels[:400], 3)
    choose, budgets = {**METHODS, **OTHERS}[method]
    chosen = choose(draw, budgets[-1])
    assert len(set(chosen.tolist())) == budgets[-1]
    np.testing.assert_array_equal(chosen, choose(draw, budgets[-1]))


def test_gains_are_paired_by_draw() -> None:
    figures = suggest._figures([10.0, 20.0, 30.0], [11.0, 22.0, 29.0])
    assert (figures["error"], figures["gain"], figures["draws_won"]) == (20.0, 0.67, 2)
    assert figures["gain_standard_error"] == pytest.approx(np.std([1, 2, -1], ddof=1) / 3**0.5, abs=0.005)


def test_bundle_without_its_task_is_refused(digits_bundle: Path) -> None:
    done = CliRunner().invoke(app, ["--data", ".", "--bundle", str(digits_bundle)])
    with pytest.raises(ConfigError, match="wanted TASK=FOLDER"):
        raise done.exception or AssertionError(done.output)
