"""Draws of hidden labels, and the intervals of what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.datasets import load_digits

from pipelines.finetuning.contenders import CONTENDERS, Ground
from pipelines.finetuning.judging import draw_splits, judge, mean_interval, share_interval
from vaefeat.bundle import load_bundle
from vaefeat.encoder import OnnxEncoder
from vaefeat.labels import UNLABELLED


@pytest.mark.parametrize("counts", [(2, 2, 2), (2, 98), (3, 7, 40), (20,) * 10])
def test_draws_hide_a_fifth_and_leave_every_class_a_label(counts: tuple[int, ...]) -> None:
    labels = np.concatenate([np.full(30, -1), np.repeat(np.arange(len(counts)), counts)])
    draws = draw_splits(labels, n_draws=7, seed=0)
    assert len(draws) == 7
    for draw in draws:
        assert set(labels[draw.shown]) == set(range(len(counts)))
        assert len(draw.hidden) == max(len(counts), round(0.2 * sum(counts)))
        np.testing.assert_array_equal(np.sort(np.concatenate(draw)), np.arange(30, len(labels)))
    assert len({tuple(np.sort(draw.hidden)) for draw in draws}) > 1


def test_draws_of_texts_are_those_of_numbers() -> None:
    numbers = np.tile([-1, 0, 1, 2], 10)
    texts = np.array([label if label == -1 else "abc"[label] for label in numbers.tolist()], dtype=object)
    for one, other in zip(draw_splits(numbers, n_draws=3, seed=1), draw_splits(texts, n_draws=3, seed=1), strict=True):
        np.testing.assert_array_equal(one.hidden, other.hidden)


def test_interval_of_independent_draws_is_scipys_t_interval() -> None:
    values = [3.0, 5.0, 4.0, 6.0]
    wanted = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    np.testing.assert_allclose(mean_interval(values, hidden_to_shown=0.0), wanted)


def test_interval_of_draws_that_share_labels_is_wider_and_within_bounds() -> None:
    values = [30.0, 32.0, 31.0, 33.0]
    plain, shared = mean_interval(values, hidden_to_shown=0.0), mean_interval(values, hidden_to_shown=0.25)
    assert shared[1] - shared[0] == pytest.approx((plain[1] - plain[0]) * np.sqrt((1 / 4 + 1 / 4) / (1 / 4)))
    assert mean_interval([0.0, 10.0], hidden_to_shown=0.25)[0] == 0.0


@pytest.mark.parametrize("n_a_class", [3, 30])
def test_calibration_is_told_where_there_are_rows_to_judge_it_by(digits_bundle: Path, n_a_class: int) -> None:
    digits = load_digits()
    labels = np.full(len(digits.target), UNLABELLED)
    for label in range(10):
        labels[np.flatnonzero(digits.target == label)[:n_a_class]] = label
    encoder = OnnxEncoder(digits_bundle)
    rows = digits.images.astype(np.uint8)[:, None]
    ground = Ground(bundle=load_bundle(digits_bundle), rows=rows, features=encoder.embed(rows), max_steps=1)
    found = judge(CONTENDERS["knn"], ground, labels, draw_splits(labels, n_draws=2, seed=0), seed=0)
    if n_a_class == 3:
        # One hidden label of each class in either draw: ten, or fewer, that the other draw does not hide.
        assert found.calibrated_log_loss is None
    else:
        assert found.calibrated_log_loss is not None
        assert found.calibrated_log_loss != found.log_loss


def test_interval_of_rows_without_an_error_does_not_end_at_zero() -> None:
    low, high = share_interval(0, 60)
    z = stats.norm.ppf(0.975)
    assert low == pytest.approx(0.0, abs=1e-9)
    assert high == pytest.approx(100 * z**2 / (60 + z**2))  # Wilson's bound, where nothing is wrong
