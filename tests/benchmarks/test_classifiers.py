"""The benchmark of generative classifiers: what it prints and draws, and that its options reach the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner, Result

from benchmarks import classifiers
from vaefeat.errors import ConfigError


@pytest.fixture
def data(digits_rows: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    np.savez(tmp_path / "digits.npz", X=digits_rows, y=load_digits().target)
    monkeypatch.setattr(classifiers, "N_VALIDATION", 300)
    return tmp_path / "digits.npz"


def run(data: Path, *options: str) -> Result:
    arguments = ["--data", str(data), "--model", "m2", "--rows", "600", "--labels", "200", *options]
    return CliRunner().invoke(classifiers.app, arguments, catch_exceptions=False)


def test_model_is_measured_and_its_analogies_are_drawn(data: Path, tmp_path: Path) -> None:
    picture = tmp_path / "analogies.png"
    done = run(data, "--epochs", "25", "--hidden", "32", "--hidden", "24", "--picture", str(picture))
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["rows"], report["labels"], report["hidden"]) == (600, 200, [32, 24])
    assert 0 < report["models"]["m2"]["error"] < 60
    with Image.open(picture) as drawn:
        # A line for each of ten classes, and a column for each beside that of the rows.
        assert min(drawn.size) > 300


@pytest.mark.parametrize(("option", "setting"), [("--components", "latent_dim=0"), ("--hidden", "hidden_dims=0")])
def test_sizes_reach_the_model(data: Path, option: str, setting: str) -> None:
    with pytest.raises(ConfigError, match=setting):
        run(data, option, "0")
