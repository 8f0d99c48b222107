"""Encoders in float16: which part of them, what a GPU would compute, and activations that do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from sklearn.datasets import load_digits

from vaefeat import ModelConfig, OnnxEncoder, TrainConfig, load_bundle, pretrain
from vaefeat.bundle import Bundle
from vaefeat.cli import app, run_command_line
from vaefeat.errors import BundleError, InputError, QuantizationError
from vaefeat.half_precision import simulate_half, to_half
from vaefeat.quantization import _LAYERS, _heads, _named, quantize


@pytest.fixture(scope="module")
def halved(digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> Bundle:
    return quantize(load_bundle(digits_bundle), digits_rows, to="float16", labels=load_digits().target)


@pytest.fixture(scope="module")
def table() -> NDArray[np.float32]:
    """Rows of numbers that float16 holds badly or not at all; only their differences say anything."""
    random = np.random.default_rng(0)
    columns = random.normal(size=(600, 2)) @ random.normal(size=(2, 5)) + random.normal(size=(600, 5)) / 10
    return (columns * [1, 10, 1e3, 1e-6, 1e7] + [3e4, 1e6, 0, 1e-5, 1e9]).astype(np.float32)


def scaled_first_layer(bundle: Bundle, factor: float) -> Bundle:
    """Multiply the first layer, which the normalization behind it divides out again."""
    model = onnx.load_model_from_string(bundle.read("encoder.onnx"))
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    for tensor in model.graph.initializer:
        if tensor.name in first.input[1:]:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
    contents = {name: bundle.read(name) for name in bundle.files}
    return Bundle.of(bundle.manifest, {**contents, "encoder.onnx": model.SerializeToString()})


def simulated(bundle: Bundle) -> Bundle:
    model = _named(bundle.read("encoder.onnx"))
    made = simulate_half(model, heads=_heads(model), layers=_LAYERS)
    contents = {name: bundle.read(name) for name in bundle.files}
    return Bundle.of(bundle.manifest, {**contents, "encoder.onnx": made.SerializeToString()})


def reference_mean(model: onnx.ModelProto, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    outputs: Any = ReferenceEvaluator(model).run(["mean"], {"rows": rows})
    return np.asarray(outputs[0], np.float32)


def test_to_half_leaves_preprocessing_heads_rows_and_features_in_float32(halved: Bundle, digits_bundle: Path) -> None:
    model = onnx.load_model_from_string(halved.read("encoder.onnx"))
    onnx.checker.check_model(model, full_check=True)
    assert {output.type.tensor_type.elem_type for output in model.graph.output} == {TensorProto.FLOAT}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    of_layers = {
        node.op_type: {types[name] for name in node.input[1:]}
        for node in model.graph.node
        if node.op_type in (*_LAYERS, "InstanceNormalization") and node.output[0] not in ("mean", "linear_2")
    }
    assert of_layers["Conv"] == of_layers["InstanceNormalization"] == {TensorProto.FLOAT16}
    for name in ("mean", "logvar"):
        assert types[f"model.posterior.{name}.weight"] == TensorProto.FLOAT
    assert types["model.preprocessing.scale"] == TensorProto.FLOAT
    assert len(halved.read("encoder.onnx")) < 0.6 * len(load_bundle(digits_bundle).read("encoder.onnx"))


def test_float16_encoder_gives_a_row_the_same_bits_in_any_batch(halved: Bundle, digits_rows: NDArray[np.uint8]) -> None:
    encoder = OnnxEncoder(halved, device="cpu", threads=1)
    whole = encoder.embed(digits_rows[:100])
    for size in (1, 2, 7, 33):
        parts = [encoder.embed(digits_rows[start : min(start + size, 100)]) for start in range(0, 100, size)]
        assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_simulation_computes_what_onnx_s_own_reference_does(
    digits_bundle: Path, digits_rows: NDArray[np.uint8]
) -> None:
    # Which computes every float16 operator in float16, and knows nothing of ours.
    bundle = load_bundle(digits_bundle)
    model = _named(bundle.read("encoder.onnx"))
    half = to_half(model, heads=_heads(model), layers=_LAYERS)
    rows = digits_rows[:64]
    expected = reference_mean(half, rows)
    exact = OnnxEncoder(bundle, device="cpu").embed(rows)
    found = OnnxEncoder(simulated(bundle), device="cpu").embed(rows)
    scale = exact.std(axis=0)
    assert np.abs((found - expected) / scale).max() < 0.03
    # Of the same size as float16's own rounding: not exact, and not much coarser.
    errors = [float(np.sqrt(np.mean(((features - exact) / scale) ** 2))) for features in (found, expected)]
    assert 0 < errors[1] < 2 * errors[0] < 6 * errors[1]


def test_simulation_overflows_where_onnx_s_own_reference_does(
    digits_bundle: Path, digits_rows: NDArray[np.uint8]
) -> None:
    large = scaled_first_layer(load_bundle(digits_bundle), 1e5)
    model = _named(large.read("encoder.onnx"))
    half = to_half(model, heads=_heads(model), layers=_LAYERS)
    with np.errstate(all="ignore"):
        expected = reference_mean(half, digits_rows[:16])
    found = OnnxEncoder(simulated(large), device="cpu").embed(digits_rows[:16])
    assert not np.isfinite(expected).all(axis=1).any()
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))


def test_quantize_refuses_float16_where_activations_do_not_fit(
    digits_bundle: Path, digits_rows: NDArray[np.uint8]
) -> None:
    # In float32 the same features, and every weight fits into float16; only what is computed on the way does not.
    large = scaled_first_layer(load_bundle(digits_bundle), 1e5)
    exact = OnnxEncoder(digits_bundle, device="cpu").embed(digits_rows)
    np.testing.assert_allclose(OnnxEncoder(large, device="cpu").embed(digits_rows), exact, atol=0.02)
    with pytest.raises(QuantizationError, match=r"in float16 the means of 1797 of 1797 rows are not finite"):
        quantize(large, digits_rows, to="float16")


def test_quantize_to_float16_keeps_rows_of_large_numbers_exact(table: NDArray[np.float32], tmp_path: Path) -> None:
    bundle = pretrain(
        table,
        model=ModelConfig(latent_dim=2, network="mlp", hidden_dims=(32,)),
        train=TrainConfig(max_epochs=20, batch_size=64),
        out=tmp_path / "table",
        progress=False,
    )
    made = quantize(bundle, table, to="float16")
    assert made.manifest.parity["quantization"]["difference"] < 0.01
    exact, half = (OnnxEncoder(each, device="cpu").embed(table) for each in (bundle, made))
    assert np.abs((half - exact) / exact.std(axis=0)).max() < 0.03


def test_float16_bundle_says_what_it_is(halved: Bundle, digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> None:
    found = halved.manifest.parity["quantization"]
    assert (halved.name, halved.manifest.precision) == ("digits-float16", "float16")
    assert OnnxEncoder(halved, device="cpu").mode.precision == "float16"
    assert found["base"] == load_bundle(digits_bundle).digest
    assert 0 < found["difference"] < 0.02
    assert abs(found["error_float16"] - found["error"]) < 0.5
    assert "| arithmetic | float16;" in halved.read("README.md").decode()
    with pytest.raises(InputError, match="which is in float16 already"):
        quantize(halved, digits_rows)


@pytest.mark.parametrize("quantization", [{"format": "float8"}, {}, "int8", [], None])
def test_bundle_quantized_in_an_unknown_way_is_refused(digits_bundle: Path, quantization: object) -> None:
    manifest = load_bundle(digits_bundle).manifest
    with pytest.raises(BundleError, match="wanted int8 or float16"):
        replace(manifest, parity={**manifest.parity, "quantization": quantization})


def test_quantize_to_float16_at_the_command_line_is_shown_by_inspect(
    digits_bundle: Path,
    digits_rows: NDArray[np.uint8],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    np.save(tmp_path / "rows.npy", digits_rows)

    def run(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["vaefeat", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_command_line(app)
        assert not ended.value.code
        return capsys.readouterr().out

    run("quantize", digits_bundle, tmp_path / "out", "--data", tmp_path / "rows.npy", "--to", "float16")
    assert "arithmetic     float16" in run("inspect", tmp_path / "out")
    assert "arithmetic     float32" in run("inspect", digits_bundle)


@pytest.mark.gpu
def test_float16_on_a_gpu_computes_what_was_simulated(
    halved: Bundle, digits_bundle: Path, digits_rows: NDArray[np.uint8]
) -> None:
    expected = OnnxEncoder(simulated(load_bundle(digits_bundle)), device="cpu").embed(digits_rows)
    encoder = OnnxEncoder(halved, device="cuda", buckets=(1, 64, 256))
    found = encoder.embed(digits_rows)
    assert np.abs((found - expected) / expected.std(axis=0)).max() < 0.02
    assert encoder.mode.graphs == "on"
