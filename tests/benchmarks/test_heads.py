"""The benchmark of heads: what it prints for a bundle, and which rows judge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from benchmarks.heads import HEADS, app
from vaefeat.errors import InputError


def test_heads_of_a_bundle_are_measured_on_the_last_rows(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    labels = load_digits().target
    np.savez(tmp_path / "digits.npz", X=digits_rows, y=labels)
    arguments = [str(digits_bundle), "--data", str(tmp_path / "digits.npz"), "--labels", "5", "--draws", "2"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["rows"] == 1797 - 1797 // 6
    assert set(report["heads"]) == set(HEADS)
    assert all(2 < head["5"]["error"] < 60 for head in report["heads"].values())


def test_rows_without_labels_are_refused(digits_bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((20, 1, 8, 8), dtype=np.uint8))
    done = CliRunner().invoke(app, [str(digits_bundle), "--data", str(tmp_path / "rows.npy")])
    with pytest.raises(InputError, match="without labels"):
        raise done.exception or AssertionError(done.output)
