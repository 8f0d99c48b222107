"""A whole pipeline, served: the labels and probabilities of scikit-learn, asked for with curl and from Python."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from pipelines.server import running_server
from vaefeat import OnnxPredictor, RemoteEncoder, VAEFeatures, export_pipeline

NAMES = np.array(["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"])


@pytest.fixture(scope="module")
def pipe(digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> Pipeline:
    forest = RandomForestClassifier(30, random_state=0)
    made = make_pipeline(VAEFeatures(digits_bundle, device="cpu"), StandardScaler(), forest)
    return made.fit(digits_rows[:400], NAMES[load_digits().target[:400]])


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.serve)])
def test_served_pipeline_gives_the_file_s_bits_and_scikit_learns_labels(
    engine: str, pipe: Pipeline, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    folder = tmp_path / "pipeline.onnx-bundle"
    export_pipeline(pipe, folder, X=digits_rows, name="numerals")
    np.save(tmp_path / "rows.npy", digits_rows)
    with running_server(folder, engine=engine, start_timeout_s=120) as address:
        told = json.loads(curl(f"{address}/v1/predict", "--data-binary", f"@{tmp_path / 'rows.npy'}"))
        with RemoteEncoder(address, batch_size=97) as remote:
            probabilities = remote.embed(digits_rows, output="probabilities")
            classes = remote.classes
    wanted = OnnxPredictor(folder, device="cpu").predict_proba(digits_rows)
    np.testing.assert_array_equal(np.array(told["probabilities"], np.float32), wanted)
    np.testing.assert_array_equal(probabilities, wanted)
    assert told["labels"] == pipe.predict(digits_rows).tolist()
    assert list(classes) == told["classes"] == pipe.classes_.tolist()


def curl(*arguments: str) -> bytes:
    """Ask as anybody would, without a line of ours."""
    program = shutil.which("curl")
    if program is None:
        pytest.skip("no curl on this machine")
    header = ["-H", "content-type: application/x-npy"]
    command = [program, "--silent", "--show-error", "--fail-with-body", "--noproxy", "*", *header, *arguments]
    return subprocess.run(command, capture_output=True, check=True).stdout
