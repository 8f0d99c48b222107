"""Latents in, rows out: shape, units, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from vaefeat import Bundle, OnnxEncoder, load_bundle
from vaefeat.decoder import OnnxDecoder
from vaefeat.errors import BundleError, DeviceError, InputError
from vaefeat.weights import restore_vae

LATENTS = np.random.default_rng(0).normal(size=(90, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def bundle(digits_bundle: Path) -> Bundle:
    return load_bundle(digits_bundle)


def test_decoded_rows_have_the_shape_and_the_units_of_the_training_rows(
    bundle: Bundle, digits_rows: NDArray[np.uint8]
) -> None:
    rows = OnnxDecoder(bundle).decode(LATENTS)
    assert rows.dtype == np.float32
    assert rows.shape == (90, 1, 8, 8)
    # A Bernoulli mean is between 0 and 1; the digits are between 0 and 16.
    assert 0 <= rows.min() < 1
    assert 8 < rows.max() <= 16
    # Nearer to the digit that was encoded than the average of all digits is.
    back = OnnxDecoder(bundle).decode(OnnxEncoder(bundle).embed(digits_rows))
    assert np.abs(back - digits_rows).mean() < np.abs(digits_rows.mean(axis=0) - digits_rows).mean()


def test_decoder_computes_the_mean_of_the_likelihood(bundle: Bundle) -> None:
    vae = restore_vae(bundle)
    with torch.no_grad():
        expected = vae.decode(torch.from_numpy(LATENTS)).mean * 16
    np.testing.assert_allclose(OnnxDecoder(bundle).decode(LATENTS), expected.numpy(), atol=1e-3)


def test_decode_gives_the_same_for_any_batch_size_and_threads(bundle: Bundle) -> None:
    whole = OnnxDecoder(bundle, device="cpu").decode(LATENTS)
    for batch_size in (1, 7, 1000):
        decoder = OnnxDecoder(bundle, device="cpu", threads=1, batch_size=batch_size)
        np.testing.assert_array_equal(decoder.decode(LATENTS), whole)


@pytest.mark.parametrize("convert", [list, np.float64, pd.DataFrame, np.asfortranarray], ids=lambda f: f.__name__)
def test_decode_takes_any_array_of_numbers(bundle: Bundle, convert: Any) -> None:
    decoder = OnnxDecoder(bundle, device="cpu")
    np.testing.assert_array_equal(decoder.decode(convert(LATENTS)), decoder.decode(LATENTS))


@pytest.mark.parametrize("shape", [(8,), (3, 7), (3, 9), (0, 8), (2, 3, 8), ()])
def test_latents_of_another_shape_are_refused(bundle: Bundle, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"got latents of shape .*, wanted \(n, 8\) with n of at least 1"):
        OnnxDecoder(bundle).decode(np.zeros(shape))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_latents_that_are_not_finite_in_float32_are_refused(bundle: Bundle, bad: float) -> None:
    latents = LATENTS.astype(np.float64)
    latents[3, 3] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        OnnxDecoder(bundle).decode(latents)


def test_bundle_without_a_decoder_is_refused(bundle: Bundle) -> None:
    without = Bundle.of(bundle.manifest, {"encoder.onnx": bundle.read("encoder.onnx")})
    with pytest.raises(BundleError, match=r"got no decoder.onnx in bundle 'digits', it holds \['encoder.onnx'\]"):
        OnnxDecoder(without)


def test_decoder_that_does_not_fit_the_manifest_is_refused(bundle: Bundle) -> None:
    encoder, decoder = bundle.read("encoder.onnx"), bundle.read("decoder.onnx")
    flat = replace(bundle.manifest, input=replace(bundle.manifest.input, kind="vector", shape=(64,)))
    narrow = replace(bundle.manifest, latent_dim=7, outputs={"mean": 7}, active_units=())
    for forged in (
        Bundle.of(bundle.manifest, {"decoder.onnx": encoder}),
        Bundle.of(flat, {"decoder.onnx": decoder}),
        Bundle.of(narrow, {"decoder.onnx": decoder}),
    ):
        with pytest.raises(BundleError, match=r"decoder\.onnx of bundle 'digits' with the inputs and outputs"):
            OnnxDecoder(forged)


def test_unknown_device_is_refused(bundle: Bundle) -> None:
    with pytest.raises(DeviceError, match="got device='gpu'"):
        OnnxDecoder(bundle, device="gpu")
