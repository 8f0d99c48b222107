"""A fine-tuned classifier, served: the class names and the probabilities that the library gives, to the last bit."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from pipelines.server import running_server
from vaefeat import FineTuneClassifier, RemoteEncoder, VAEFeatures

NAMES = np.array(["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"], dtype=object)


@pytest.fixture(scope="module")
def fitted(digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> FineTuneClassifier:
    truth = NAMES[load_digits().target]
    y = np.where(np.arange(len(truth)) < 100, truth, np.array(None))
    return FineTuneClassifier(digits_bundle, max_steps=60, batch_size=32, random_state=0).fit(digits_rows, y)


@pytest.fixture(scope="module")
def folder(fitted: FineTuneClassifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = fitted.save_bundle(tmp_path_factory.mktemp("bundles") / "classifier", name="numerals").path
    assert path is not None
    return path


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.serve)])
def test_served_probabilities_are_the_librarys_bits_and_come_with_class_names(
    engine: str, fitted: FineTuneClassifier, folder: Path, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    wanted = fitted.predict_proba(digits_rows).view(np.uint32)
    with running_server(folder, engine=engine, start_timeout_s=120) as address:
        with RemoteEncoder(address, batch_size=97) as remote:
            got = remote.embed(digits_rows, output="probability")
            classes = remote.classes
        over_http = VAEFeatures(address, output="probability").fit_transform(digits_rows)
        np.save(tmp_path / "rows.npy", digits_rows)
        by_hand = curl(f"{address}/v1/embed?output=probability", "--data-binary", f"@{tmp_path / 'rows.npy'}")
        (card,) = json.loads(curl(f"{address}/v1/models"))["data"]
    np.testing.assert_array_equal(got.view(np.uint32), wanted)
    np.testing.assert_array_equal(over_http.view(np.uint32), wanted)
    np.testing.assert_array_equal(np.load(io.BytesIO(by_hand)).view(np.uint32), wanted)
    assert list(classes) == card["classes"] == fitted.classes_.tolist()
    np.testing.assert_array_equal(np.array(classes)[got.argmax(axis=1)], fitted.predict(digits_rows))


def curl(*arguments: str) -> bytes:
    """Ask as anybody would, without a line of ours."""
    program = shutil.which("curl")
    if program is None:
        pytest.skip("no curl on this machine")
    header = ["-H", "content-type: application/x-npy"]
    command = [program, "--silent", "--show-error", "--fail-with-body", "--noproxy", "*", *header, *arguments]
    return subprocess.run(command, capture_output=True, check=True).stdout
