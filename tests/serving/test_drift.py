from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from serving.watching.drift import Drift
from vaefeat.encoder import OnnxEncoder

Features = NDArray[np.float32]


@pytest.fixture(scope="module")
def encoder(digits_bundle: Path) -> OnnxEncoder:
    return OnnxEncoder(digits_bundle)


@pytest.fixture(scope="module")
def reference(encoder: OnnxEncoder, digits_rows: NDArray[np.uint8]) -> Features:
    return encoder.embed(digits_rows)


def against(reference: Features, *, window_rows: int = 10_000) -> Drift:
    return Drift(mean=reference.mean(axis=0), variance=reference.var(axis=0), window_rows=window_rows)


def fed(drift: Drift, features: Features, sizes: list[int]) -> Drift:
    start = 0
    for size in sizes:
        drift.update(features[start : start + size])
        start += size
    drift.update(features[start:])
    return drift


@given(st.integers(2, 900), st.lists(st.integers(0, 400), max_size=6), st.sampled_from([3, 50, 10_000]))
def test_drift_of_any_batches_equals_the_formula_row_by_row(n: int, sizes: list[int], window: int) -> None:
    rng = np.random.default_rng(n)
    features = rng.normal([3.0, -100.0, 0.0], [1.0, 2.0, 0.1], (n, 3)).astype(np.float32)
    mu, sigma2 = np.array([2.0, -100.5, 0.0]), np.array([1.0, 9.0, 0.02])
    got = fed(Drift(mean=mu, variance=sigma2, window_rows=window), features, sizes).read()

    weights = (1 - 1 / window) ** np.arange(n)[::-1]
    rows = weights.sum() ** 2 / (weights**2).sum()
    mean = np.average(features, axis=0, weights=weights)
    variance = np.average((features - mean) ** 2, axis=0, weights=weights) * rows / (rows - 1)
    shift = (mean - mu) / np.sqrt(sigma2)
    assert got is not None
    assert got.rows == pytest.approx(rows, rel=1e-4)
    assert got.mean_shift == pytest.approx(np.sqrt((shift**2).mean()), rel=1e-3, abs=1e-4)
    assert got.largest_shift == pytest.approx(np.abs(shift).max(), rel=1e-3, abs=1e-4)
    assert got.variance_ratio == pytest.approx(np.exp(np.log(variance / sigma2).mean()), rel=1e-2)


def test_drift_read_between_batches_changes_nothing(reference: Features) -> None:
    read, unread = against(reference), against(reference)
    for start in range(0, 1000, 50):
        read.update(reference[start : start + 50])
        read.read()
        unread.update(reference[start : start + 50])
    ours, theirs = read.read(), unread.read()
    assert ours is not None
    assert theirs is not None
    assert vars(ours) == pytest.approx(vars(theirs), rel=1e-5)


def test_drift_of_the_reference_rows_in_another_order_is_chance_alone(reference: Features) -> None:
    shuffled = np.random.default_rng(0).permutation(reference)
    reading = fed(against(reference), shuffled, [1, 7, 64, 512, 300]).read()
    assert reading is not None
    assert reading.rows > 1500
    assert reading.mean_shift < 3 / np.sqrt(reading.rows)
    assert reading.variance_ratio == pytest.approx(1.0, abs=0.05)


def test_drift_of_inverted_images_is_seen_and_passes_when_they_stop(
    encoder: OnnxEncoder, digits_rows: NDArray[np.uint8], reference: Features
) -> None:
    drift = against(reference, window_rows=300)
    drift.update(encoder.embed(16 - digits_rows))
    inverted = drift.read()
    assert inverted is not None
    assert inverted.mean_shift > 0.5
    assert inverted.largest_shift >= inverted.mean_shift
    for _ in range(2):
        drift.update(np.random.default_rng(0).permutation(reference))
    after = drift.read()
    assert after is not None
    assert after.mean_shift < 0.3 * inverted.mean_shift


def test_drift_of_one_row_again_and_again_shows_as_lost_variance(reference: Features) -> None:
    drift = against(reference)
    drift.update(np.repeat(reference[:1], 700, axis=0))
    reading = drift.read()
    assert reading is not None
    assert reading.variance_ratio < 1e-3


def test_drift_of_a_collapsed_latent_does_not_count(reference: Features) -> None:
    collapsed = np.concatenate([reference, np.full((len(reference), 1), 1e-7, np.float32)], axis=1)
    drift = Drift(mean=collapsed.mean(axis=0), variance=collapsed.var(axis=0) + 1e-14)
    collapsed[:, -1] += 1e-5
    drift.update(collapsed)
    reading = drift.read()
    assert reading is not None
    assert reading.largest_shift < 0.2


@pytest.mark.parametrize("rows", [0, 1])
def test_drift_of_hardly_any_rows_says_nothing(reference: Features, rows: int) -> None:
    drift = against(reference)
    drift.update(reference[:rows])
    assert drift.read() is None


def test_drift_against_a_reference_without_variance_says_nothing(reference: Features) -> None:
    drift = Drift(mean=np.zeros(8), variance=np.zeros(8))
    drift.update(reference[:100])
    assert drift.read() is None


def test_drift_fed_by_several_threads_loses_no_row(reference: Features) -> None:
    drift = against(reference)

    def feed() -> None:
        for start in range(0, 1500, 3):
            drift.update(reference[start : start + 3])

    lanes = [threading.Thread(target=feed) for _ in range(4)]
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
    fade = 1 - 1 / 10_000
    weight, weight2 = (1 - fade**6000) / (1 - fade), (1 - fade**12_000) / (1 - fade**2)
    reading = drift.read()
    assert reading is not None
    assert reading.rows == pytest.approx(weight**2 / weight2, rel=1e-3)


def test_drift_after_a_single_absurd_row_recovers(reference: Features) -> None:
    """A client can have any finite feature computed; no figure may be lost to it for good."""
    drift = against(reference)
    drift.update(np.full((1, 8), 1e30, np.float32))
    for _ in range(150):
        drift.update(reference)
    reading = drift.read()
    assert reading is not None
    assert reading.variance_ratio == pytest.approx(1.0, abs=0.05)
    assert reading.mean_shift < 0.05
