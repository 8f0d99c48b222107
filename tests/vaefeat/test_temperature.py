"""Temperatures: against scikit-learn's own, and inside the exported graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline

from vaefeat import OnnxPredictor, VAEFeatures, export_pipeline
from vaefeat.errors import ConfigError, InputError
from vaefeat.temperature import TemperedClassifier, find_temperature, log_loss, tempered

X, TARGET = load_digits(return_X_y=True)
LEARNED, HELD_OUT = slice(0, 200), slice(200, 900)


@pytest.fixture(scope="module")
def overconfident() -> LogisticRegression:
    return LogisticRegression(C=100.0, max_iter=5000).fit(X[LEARNED], TARGET[LEARNED])


def test_temperature_found_is_scikit_learns(overconfident: LogisticRegression) -> None:
    theirs = CalibratedClassifierCV(FrozenEstimator(overconfident), method="temperature", ensemble=False, cv=2)
    theirs.fit(X[HELD_OUT], TARGET[HELD_OUT])
    found = find_temperature(overconfident.predict_proba(X[HELD_OUT]), TARGET[HELD_OUT])
    assert found == pytest.approx(1 / theirs.calibrated_classifiers_[0].calibrators[0].beta_, rel=0.02)
    assert found > 1.2  # it was sure of itself


def test_temperature_lowers_the_log_loss_of_other_rows_and_keeps_labels(overconfident: LogisticRegression) -> None:
    found = find_temperature(overconfident.predict_proba(X[HELD_OUT]), TARGET[HELD_OUT])
    classifier = TemperedClassifier(FrozenEstimator(overconfident), temperature=found).fit(X[:10], TARGET[:10])
    raw, cooled = overconfident.predict_proba(X[900:]), classifier.predict_proba(X[900:])
    assert log_loss(cooled, TARGET[900:]) < log_loss(raw, TARGET[900:]) - 0.02
    np.testing.assert_array_equal(classifier.predict(X[900:]), overconfident.predict(X[900:]))
    np.testing.assert_array_equal(cooled.argmax(axis=1), raw.argmax(axis=1))
    np.testing.assert_allclose(cooled.sum(axis=1), 1)


def test_temperature_of_one_changes_nothing_and_probabilities_of_zero_have_a_logarithm() -> None:
    given = np.array([[0.25, 0.75], [1.0, 0.0]])
    np.testing.assert_allclose(tempered(given, 1.0), given, atol=2e-9)
    assert np.isfinite(log_loss(given, np.array([0, 1])))


@pytest.mark.parametrize("repeats", [1, 5])
def test_temperature_where_every_row_was_right_believes_one_of_n_plus_2_to_be_wrong(repeats: int) -> None:
    probabilities, codes = np.tile([0.9, 0.1], (20 * repeats, 1)), np.zeros(20 * repeats, np.int64)
    found = find_temperature(probabilities, codes, n_rows=20)
    assert tempered(probabilities[:1], found)[0, 0] == pytest.approx(21 / 22, abs=1e-4)


def test_temperature_without_rows_is_refused() -> None:
    with pytest.raises(InputError, match="no rows"):
        find_temperature(np.empty((0, 2)), np.empty(0, np.int64))


def test_tempered_classifier_with_an_impossible_temperature_is_refused(overconfident: LogisticRegression) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        TemperedClassifier(overconfident, temperature=0.0).fit(X[:50], TARGET[:50])


@pytest.mark.parametrize("classifier", [LogisticRegression(max_iter=2000), KNeighborsClassifier()])
@pytest.mark.parametrize("frozen", [True, False])
def test_exported_temperature_gives_the_estimators_probabilities(
    classifier: ClassifierMixin, frozen: bool, digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    pytest.importorskip("skl2onnx")
    pipe: Any = make_pipeline(VAEFeatures(digits_bundle, device="cpu"), classifier)
    if frozen:
        pipe = FrozenEstimator(pipe.fit(digits_rows[LEARNED], TARGET[LEARNED]))
    whole = TemperedClassifier(pipe, temperature=2.5).fit(digits_rows[LEARNED], TARGET[LEARNED])
    bundle = export_pipeline(whole, tmp_path / "whole.onnx", X=digits_rows)
    session = ort.InferenceSession((tmp_path / "whole.onnx").read_bytes(), providers=["CPUExecutionProvider"])
    label, probabilities = session.run(None, {"rows": digits_rows})
    np.testing.assert_allclose(probabilities, whole.predict_proba(digits_rows), atol=1e-6)
    assert np.mean(label == whole.predict(digits_rows)) > 0.999
    assert bundle.manifest.pipeline is not None
    assert bundle.manifest.pipeline["steps"][-1]["class"] == "TemperedClassifier"


def test_export_without_a_path_writes_nothing_until_it_is_saved(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("skl2onnx")
    monkeypatch.chdir(tmp_path)
    pipe = make_pipeline(VAEFeatures(digits_bundle, device="cpu"), LogisticRegression(max_iter=2000))
    made = export_pipeline(pipe.fit(digits_rows[LEARNED], TARGET[LEARNED]), None)
    assert list(tmp_path.iterdir()) == []
    saved = made.save(tmp_path / "saved")
    assert saved.digest == made.digest
    np.testing.assert_array_equal(
        OnnxPredictor(saved, device="cpu").predict_proba(digits_rows[:50]),
        OnnxPredictor(made, device="cpu").predict_proba(digits_rows[:50]),
    )
