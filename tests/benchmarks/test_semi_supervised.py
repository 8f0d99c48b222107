"""The benchmark of learning from rows without a label: what it prints for a bundle."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from benchmarks.semi_supervised import FINE_TUNED, LABELLED_ONLY, WAYS, app


def test_ways_are_measured_on_the_same_draws_and_test_rows(digits_bundle: Path) -> None:
    arguments = [str(digits_bundle), "--labels", "2", "--draws", "3", "--fine-tuned", "1", "--max-steps", "10"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["rows"] + report["test_rows"] == 1797
    assert set(report["ways"]) == {*WAYS, FINE_TUNED}
    errors = {name: way["2"]["error"] for name, way in report["ways"].items()}
    assert all(2 < error < 70 for error in errors.values())
    assert errors["few_label_head()"] < errors[LABELLED_ONLY]
    assert report["ways"][FINE_TUNED]["2"]["draws"] == 1
