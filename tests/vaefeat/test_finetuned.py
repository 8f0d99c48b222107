"""What a classifier's bundle holds: the decoder where it was trained along, and a name of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from vaefeat import Bundle, FineTuneClassifier, OnnxEncoder, VAEClassifier, generation, inference, load_bundle
from vaefeat.cli import app
from vaefeat.decoder import OnnxDecoder
from vaefeat.errors import InputError
from vaefeat.model_card import renamed

N_TRAIN = 1400


def quick(bundle: Any, **settings: Any) -> FineTuneClassifier:
    return FineTuneClassifier(bundle, **{"max_steps": 60, "batch_size": 32, "random_state": 0, **settings})


@pytest.fixture(scope="module")
def X(digits_rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return digits_rows.reshape(len(digits_rows), -1)


@pytest.fixture(scope="module")
def few() -> NDArray[np.int64]:
    """Give the labels of the first hundred training rows."""
    return np.where(np.arange(N_TRAIN) < 100, load_digits().target[:N_TRAIN], -1)


@pytest.fixture(scope="module")
def fitted(digits_bundle: Path, X: NDArray[np.uint8], few: NDArray[np.int64]) -> FineTuneClassifier:
    return quick(digits_bundle).fit(X[:N_TRAIN], few)


def test_bundle_of_an_encoder_that_left_its_decoder_behind_has_none_and_says_so(
    fitted: FineTuneClassifier, digits_bundle: Path, digits_rows: NDArray[np.uint8]
) -> None:
    bundle = fitted.bundle_
    assert not bundle.manifest.decodes
    assert sorted(bundle.files) == [
        *("README.md", "encoder.onnx", "head.safetensors", "reference.safetensors", "weights.safetensors")
    ]
    assert "there is no decoder" in bundle.read("README.md").decode()
    assert "reconstruction" not in bundle.manifest.parity["outputs"]


@pytest.mark.parametrize(
    "use",
    [
        lambda bundle, rows: generation.sample(bundle, 2),
        lambda bundle, rows: generation.sample_around(bundle, rows[0], 2),
        lambda bundle, rows: inference.denoise(bundle, rows),
        lambda bundle, rows: inference.anomaly_scores(bundle, rows),
        lambda bundle, rows: OnnxDecoder(bundle, device="cpu"),
        lambda bundle, rows: VAEClassifier("m1m2", encoder=bundle).fit(rows, np.arange(len(rows)) % 2),
    ],
)
def test_whatever_needs_the_decoder_that_was_left_behind_refuses_the_bundle(
    fitted: FineTuneClassifier, digits_rows: NDArray[np.uint8], use: Any
) -> None:
    with pytest.raises(InputError, match=r"fine-tuned with elbo_weight=0.*take the pretrained bundle"):
        use(fitted.bundle_, digits_rows[:8])


def test_diagnosis_of_a_decoder_that_was_left_behind_is_refused_on_the_command_line(
    fitted: FineTuneClassifier, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    fitted.save_bundle(tmp_path / "classifier")
    np.save(tmp_path / "rows.npy", digits_rows[:20])
    with pytest.raises(InputError, match="elbo_weight=0"):
        CliRunner().invoke(
            app, ["diagnose", str(tmp_path / "classifier"), str(tmp_path / "rows.npy")], catch_exceptions=False
        )


def test_bundle_from_before_that_still_holds_the_decoder_is_refused_all_the_same(
    fitted: FineTuneClassifier, digits_bundle: Path
) -> None:
    bundle = fitted.bundle_
    contents = {name: bundle.read(name) for name in bundle.files}
    contents["decoder.onnx"] = load_bundle(digits_bundle).read("decoder.onnx")
    with pytest.raises(InputError, match="elbo_weight=0"):
        OnnxDecoder(Bundle.of(bundle.manifest, contents))


def test_decoder_trained_along_reconstructs_as_before_and_one_left_behind_does_not(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], X: NDArray[np.uint8], few: NDArray[np.int64]
) -> None:
    rows, base = digits_rows[N_TRAIN:], load_bundle(digits_bundle)

    def squared_error(features: NDArray[np.float32], decoder: Bundle) -> float:
        made = OnnxDecoder(decoder, device="cpu").decode(features)
        return float(((made - rows) ** 2).sum(axis=(1, 2, 3)).mean())

    along, left = (
        quick(digits_bundle, elbo_weight=weight, max_steps=300).fit(X[:N_TRAIN], few).bundle_ for weight in (1, 0)
    )
    pretrained = squared_error(OnnxEncoder(base, device="cpu").embed(rows), base)
    assert squared_error(OnnxEncoder(along, device="cpu").embed(rows), along) < 1.1 * pretrained
    # Fine-tuning left the decoder as it was.
    assert squared_error(OnnxEncoder(left, device="cpu").embed(rows), base) > 1.2 * pretrained
    assert "reconstructions.png" in along.files


def test_bundle_has_a_name_of_its_own_that_is_short_enough(
    fitted: FineTuneClassifier, digits_bundle: Path, X: NDArray[np.uint8], few: NDArray[np.int64]
) -> None:
    base = load_bundle(digits_bundle)
    assert fitted.bundle_.name == f"{base.name}-classifier"
    long = renamed(base, "a" * 64)
    assert quick(long, max_steps=1).fit(X[:N_TRAIN], few).bundle_.name == "a" * 53 + "-classifier"
