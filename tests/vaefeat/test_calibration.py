"""Classifiers of few labels that calibrate themselves: by a temperature from labelled rows that copies did not see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from scipy.stats import norm
from sklearn.datasets import load_digits

from vaefeat import FineTuneClassifier, OnnxEncoder, OnnxPredictor, VAEClassifier, VAEFeatures
from vaefeat.calibration import folds, shrunken_temperature
from vaefeat.errors import ConfigError
from vaefeat.targets import Targets
from vaefeat.temperature import log_loss, tempered

TARGET: NDArray[np.int64] = load_digits().target
#: Ten of each class, and rows that no classifier here has seen.
FEW = np.concatenate([np.flatnonzero(TARGET[:900] == label)[:10] for label in range(10)])
NEW = slice(900, None)


def calibration_error(probabilities: NDArray[Any], codes: NDArray[np.int64]) -> float:
    """Ten bins of equal width (Naeini et al. 2015)."""
    sure, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == codes
    bins = np.minimum((sure * 10).astype(int), 9)
    gaps = [abs(sure[bins == b].mean() - right[bins == b].mean()) * np.mean(bins == b) for b in np.unique(bins)]
    return float(np.sum(gaps))


def answers(random: np.random.Generator, *, n: int, temperature: float) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Give probabilities that are right after division by a temperature, and classes drawn from what is right."""
    logits = random.normal(0, 3, (n, 4))
    codes = (softmax(logits, axis=1).cumsum(axis=1) > random.random((n, 1))).argmax(axis=1)
    return softmax(logits * temperature, axis=1), codes


@pytest.mark.parametrize("temperature", [0.5, 1.5, 3.0])
def test_temperature_of_many_rows_is_the_one_that_they_were_made_with_or_one(temperature: float) -> None:
    probabilities, codes = answers(np.random.default_rng(0), n=20_000, temperature=temperature)
    found = shrunken_temperature(probabilities, codes, np.ones(len(codes)))
    assert found == (pytest.approx(temperature, rel=0.03) if temperature > 1 else 1.0)


def test_temperature_of_few_rows_stays_nearer_to_one_and_calibrated_answers_hardly_suffer() -> None:
    found, losses = [], []
    for seed in range(40):
        random = np.random.default_rng(seed)
        probabilities, codes = answers(random, n=30, temperature=1.0)
        found.append(shrunken_temperature(probabilities, codes, np.ones(len(codes))))
        others, theirs = answers(random, n=3000, temperature=1.0)
        losses.append(log_loss(tempered(others, found[-1]), theirs) - log_loss(others, theirs))
    assert np.mean(np.array(found) == 1.0) > 0.3
    assert np.mean(losses) < 0.01


def test_temperature_is_the_mode_of_its_posterior_and_a_count_is_as_many_rows() -> None:
    probabilities, codes = answers(np.random.default_rng(1), n=40, temperature=2.0)
    counts = (np.arange(40) % 3).astype(np.float64)
    found = shrunken_temperature(probabilities, codes, counts)
    assert found == pytest.approx(
        shrunken_temperature(
            np.repeat(probabilities, counts.astype(int), axis=0), codes.repeat(counts.astype(int)), np.ones(39)
        ),
        rel=1e-4,
    )
    grid = np.linspace(-2, 2, 4001)
    fits = [(counts * log_softmax(np.log(probabilities) / np.exp(t), axis=1)[np.arange(40), codes]).sum() for t in grid]
    assert np.log(found) == pytest.approx(grid[np.argmax(np.array(fits) + norm(0, 0.5).logpdf(grid))], abs=2e-3)


def test_folds_hide_each_labelled_row_once_and_no_class_altogether() -> None:
    codes = np.array([0] * 7 + [1] * 2 + [2] + [-1] * 5)
    targets = Targets.of(codes)
    parts = list(folds(targets, n_folds=3))
    assert sorted(np.concatenate(parts).tolist()) == list(range(9)), "the only row of class 2 has to stay"
    assert {len(part) for part in parts} == {3}
    for part in parts:
        assert set(codes[np.setdiff1d(targets.labelled, part)]) == {0, 1, 2}
    assert list(folds(Targets.of(np.array([0, 1, -1])), n_folds=3)) == []


@pytest.mark.parametrize("kind", ["fine-tuning", "generative"])
def test_overconfident_classifier_of_few_labels_is_repaired_and_its_labels_stay(
    kind: str, digits_bundle: Path, digits_rows: NDArray[np.uint8]
) -> None:
    # Without changed views of its rows, either soon knows a hundred of them by heart.
    made: dict[str, Any] = {
        "fine-tuning": FineTuneClassifier(digits_bundle, max_steps=100, augmentations=(), random_state=0),
        "generative": VAEClassifier(max_epochs=60, augmentations=(), random_state=0),
    }
    raw = made[kind].fit(digits_rows[FEW], TARGET[FEW]).predict_proba(digits_rows[NEW])
    assert made[kind].temperature_ == 1.0
    calibrated = made[kind].set_params(calibration=3).fit(digits_rows[FEW], TARGET[FEW])
    cooled, truth = calibrated.predict_proba(digits_rows[NEW]), TARGET[NEW]
    assert calibrated.temperature_ > 1.1
    assert calibration_error(cooled, truth) < 0.8 * calibration_error(raw, truth)
    assert log_loss(cooled, truth) < log_loss(raw, truth) - 0.05
    # `tempered` takes smaller probabilities for one in a billion, whose root is what is between them.
    np.testing.assert_allclose(cooled, tempered(raw, calibrated.temperature_), atol=1e-3)
    np.testing.assert_array_equal(cooled.argmax(axis=1), raw.argmax(axis=1))


def test_classifier_that_is_as_sure_as_it_is_right_hardly_changes(
    digits_bundle: Path, digits_rows: NDArray[np.uint8]
) -> None:
    classifier = FineTuneClassifier(digits_bundle, max_steps=100, random_state=0, calibration=3)
    found = classifier.fit(digits_rows[FEW], TARGET[FEW]).predict_proba(digits_rows[NEW])
    raw, truth = tempered(found, 1 / classifier.temperature_), TARGET[NEW]
    assert calibration_error(found, truth) < calibration_error(raw, truth) + 0.01
    assert log_loss(found, truth) < log_loss(raw, truth) + 0.01


def test_calibrated_classifiers_bundle_gives_calibrated_probabilities_wherever_it_is_opened(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    names = np.array([f"digit {label}" for label in TARGET], dtype=object)
    classifier = FineTuneClassifier(digits_bundle, max_steps=50, augmentations=(), random_state=0, calibration=2)
    classifier.fit(digits_rows[FEW], names[FEW])
    assert classifier.temperature_ > 1.0
    bundle = classifier.save_bundle(tmp_path / "calibrated")
    assert bundle.manifest.data["finetuning"]["temperature"] == classifier.temperature_
    wanted = classifier.predict_proba(digits_rows[NEW])
    np.testing.assert_array_equal(OnnxPredictor(bundle).predict_proba(digits_rows[NEW]), wanted)
    np.testing.assert_array_equal(OnnxEncoder(bundle).embed(digits_rows[NEW], output="probability"), wanted)
    np.testing.assert_array_equal(VAEFeatures(bundle, output="probability").fit_transform(digits_rows[NEW]), wanted)


@pytest.mark.parametrize("folds", [1, 0, 2.5, "5"])
def test_impossible_number_of_folds_is_refused(folds: Any, digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> None:
    with pytest.raises(ConfigError, match="calibration"):
        FineTuneClassifier(digits_bundle, max_steps=1, calibration=folds).fit(digits_rows[FEW], TARGET[FEW])


def test_weights_and_copies_of_labelled_rows_give_the_same_temperature(digits_rows: NDArray[np.uint8]) -> None:
    rows, labels = digits_rows[FEW], TARGET[FEW]
    weights = 1 + np.arange(len(FEW)) % 2
    made = VAEClassifier(
        max_epochs=2, hidden_dims=(16,), network="mlp", augmentations=(), random_state=0, calibration=2
    )
    weighted = made.fit(rows, labels, sample_weight=weights).temperature_
    assert weighted == made.fit(rows.repeat(weights, axis=0), labels.repeat(weights)).temperature_ != 1.0
