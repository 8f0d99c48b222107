"""Encoders in int8: as good as the gate asks for, invariant to the rows around a row, and faster only if that holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from sklearn.datasets import load_digits

from vaefeat import OnnxEncoder, load_bundle
from vaefeat.bundle import Bundle
from vaefeat.cli import app, run_command_line
from vaefeat.errors import InputError, QuantizationError
from vaefeat.quantization import QuantizationGate, quantize
from vaefeat.reference import Reference, load_reference


@pytest.fixture(scope="module")
def labels() -> NDArray[np.int64]:
    found: NDArray[np.int64] = load_digits().target
    return found


@pytest.fixture(scope="module")
def coarse(digits_bundle: Path, digits_rows: NDArray[np.uint8], labels: NDArray[np.int64]) -> Bundle:
    return quantize(load_bundle(digits_bundle), digits_rows, labels=labels, gate=QuantizationGate(error=2.0))


def test_quantize_puts_the_hidden_layers_into_int8_and_leaves_the_heads(coarse: Bundle, digits_bundle: Path) -> None:
    before, after = (
        onnx.load_model_from_string(bundle.read("encoder.onnx")) for bundle in (load_bundle(digits_bundle), coarse)
    )

    def stored(model: onnx.ModelProto) -> dict[int, int]:
        sizes: dict[int, int] = {}
        for tensor in model.graph.initializer:
            sizes[tensor.data_type] = sizes.get(tensor.data_type, 0) + int(np.prod(tensor.dims))
        return sizes

    def layers(model: onnx.ModelProto) -> int:
        return sum(node.op_type in ("Gemm", "Conv", "MatMul") for node in model.graph.node)

    in_int8 = stored(after).get(onnx.TensorProto.INT8, 0)
    assert in_int8 > 0.8 * stored(before)[onnx.TensorProto.FLOAT]
    # One for the weights of each layer but the two heads'.
    dequantized = {node.input[0] for node in after.graph.node if node.op_type == "DequantizeLinear"}
    weights = [t.name for t in after.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    assert len(dequantized & set(weights)) == layers(before) - 2
    # What a product gives is not rounded before its activation.
    rounded = {node.input[0] for node in after.graph.node if node.op_type == "QuantizeLinear"}
    assert not rounded & {node.output[0] for node in after.graph.node if node.op_type == "Gemm"}


def test_quantized_encoder_gives_nearly_the_same_features(
    coarse: Bundle, digits_bundle: Path, digits_rows: NDArray[np.uint8]
) -> None:
    exact, rough = (OnnxEncoder(bundle, device="cpu").embed(digits_rows) for bundle in (digits_bundle, coarse))
    difference = np.sqrt(np.mean(((rough - exact) / exact.std(axis=0)) ** 2, axis=0)).max()
    assert 0 < difference < 0.1
    figures = coarse.manifest.parity["quantization"]
    assert figures["difference"] == pytest.approx(difference, rel=0.3)
    assert figures["error_int8"] < figures["error"] + 2.0


def test_quantized_encoder_gives_a_row_the_same_bits_in_any_batch(
    coarse: Bundle, digits_rows: NDArray[np.uint8]
) -> None:
    encoder = OnnxEncoder(coarse, device="cpu", threads=1)
    whole = encoder.embed(digits_rows[:100])
    for size in (1, 2, 7, 33):
        parts = [encoder.embed(digits_rows[start : min(start + size, 100)]) for start in range(0, 100, size)]
        assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_quantized_bundle_is_a_bundle_of_its_own(coarse: Bundle, digits_bundle: Path, tmp_path: Path) -> None:
    saved = coarse.save(tmp_path / "coarse")
    before = load_bundle(digits_bundle)
    assert (saved.name, saved.manifest.precision, before.manifest.precision) == ("digits-int8", "int8", "float32")
    assert saved.digest != before.digest
    assert saved.manifest.parity["quantization"]["base"] == before.digest
    assert "int8" in saved.read("README.md").decode()
    reference = load_reference(saved)
    assert isinstance(reference, Reference)
    assert reference.difference(OnnxEncoder(saved, device="cpu").embed(reference.rows)) < 1e-3
    with pytest.raises(InputError, match="int8 already"):
        quantize(saved, np.zeros((100, 1, 8, 8), np.uint8))


def test_quantize_that_changes_more_than_the_gate_allows_is_refused(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], labels: NDArray[np.int64]
) -> None:
    bundle = load_bundle(digits_bundle)
    with pytest.raises(QuantizationError, match="standard deviations"):
        quantize(bundle, digits_rows, gate=QuantizationGate(difference=1e-4))
    with pytest.raises(QuantizationError, match="labels a class"):
        quantize(bundle, digits_rows, labels=labels, gate=QuantizationGate(error=-50.0))


def test_quantize_with_small_classes_leaves_them_out_and_says_so(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], labels: NDArray[np.int64], caplog: pytest.LogCaptureFixture
) -> None:
    bundle, lenient = load_bundle(digits_bundle), QuantizationGate(error=100.0)
    rare = labels.copy()
    rare[:3] = 10  # a class of three rows
    found = quantize(bundle, digits_rows, labels=rare, gate=lenient).manifest.parity["quantization"]
    assert 0 < found["error"] < 60
    assert "1 of 11 classes are left out" in caplog.text
    caplog.clear()
    alone = np.arange(len(labels))
    found = quantize(bundle, digits_rows, labels=alone, gate=lenient).manifest.parity["quantization"]
    assert "error" not in found
    assert "labels do not judge: 0 of 1285 classes" in caplog.text


def with_probabilities(bundle: Bundle, *, sharpness: float) -> Bundle:
    """Let a bundle tell two classes apart by the sign of its first latent."""
    graph = onnx.load_model_from_string(bundle.read("encoder.onnx"))
    weight = np.zeros((bundle.manifest.latent_dim, 2), np.float32)
    weight[0] = -sharpness, sharpness
    graph.graph.initializer.append(numpy_helper.from_array(weight, "sides"))
    graph.graph.node.append(helper.make_node("MatMul", ["mean", "sides"], ["logits"]))
    graph.graph.node.append(helper.make_node("Softmax", ["logits"], ["probability"]))
    graph.graph.output.append(helper.make_tensor_value_info("probability", onnx.TensorProto.FLOAT, ["batch", 2]))
    outputs = {**bundle.manifest.outputs, "probability": 2}
    contents = {file: bundle.read(file) for file in bundle.files} | {"encoder.onnx": graph.SerializeToString()}
    data = {
        **bundle.manifest.data,
        "finetuning": {"n_labelled": 20, "n_unlabelled": 0, "n_steps": 1, "config": {"elbo_weight": 1.0}},
    }
    return Bundle.of(replace(bundle.manifest, outputs=outputs, classes=("low", "high"), data=data), contents)


def test_quantize_of_a_classifier_is_judged_by_its_probabilities(
    digits_bundle: Path, digits_rows: NDArray[np.uint8]
) -> None:
    mild = quantize(with_probabilities(load_bundle(digits_bundle), sharpness=0.5), digits_rows)
    found = mild.manifest.parity["quantization"]["probability_difference"]
    assert 0 < found <= 0.2
    # The means differ as little as before; what is decided by them does not.
    sharp = with_probabilities(load_bundle(digits_bundle), sharpness=500.0)
    with pytest.raises(QuantizationError, match="probability differs by"):
        quantize(sharp, digits_rows)
    quantize(sharp, digits_rows, gate=QuantizationGate(probability=1.0))


def test_quantize_with_too_few_rows_is_refused(digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> None:
    with pytest.raises(InputError, match="63 rows"):
        quantize(load_bundle(digits_bundle), digits_rows[:63])


@pytest.mark.parametrize("n_labels", [1000, 2000])
def test_quantize_with_another_number_of_labels_is_refused(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], n_labels: int
) -> None:
    with pytest.raises(InputError, match=f"{n_labels} labels of 1797 rows"):
        quantize(load_bundle(digits_bundle), digits_rows, labels=np.arange(n_labels) % 10)


def test_quantize_at_the_command_line_writes_or_says_why_not(
    digits_bundle: Path,
    digits_rows: NDArray[np.uint8],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    np.save(tmp_path / "rows.npy", digits_rows)

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["vaefeat", "quantize", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_command_line(app)
        return int(ended.value.code or 0)

    assert run(digits_bundle, tmp_path / "out", "--data", tmp_path / "rows.npy", "--difference", 1e-5) == 2
    assert "standard deviations" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(digits_bundle, digits_bundle, "--data", tmp_path / "rows.npy") == 2
    assert run(digits_bundle, tmp_path / "out", "--data", tmp_path / "rows.npy") == 0
    assert load_bundle(tmp_path / "out").manifest.precision == "int8"


def test_quantized_encoder_of_bytes_gives_the_bits_that_it_gives_the_long_way(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = (digits_rows * (255 / 16)).astype(np.uint8)
    bundle = _of_pixels(load_bundle(digits_bundle))
    short = quantize(bundle, pixels)
    monkeypatch.setattr("vaefeat.quantization._feed_bytes", lambda model: None)
    long = quantize(bundle, pixels)
    assert ["Cast" in _operators(one) for one in (long, short)] == [True, False]
    # Also of bytes past those that it was calibrated with.
    every_byte = np.resize(np.arange(256, dtype=np.uint8), (64, *pixels.shape[1:]))
    for rows in (pixels, every_byte):
        wanted, got = (OnnxEncoder(one, device="cpu").embed(rows) for one in (long, short))
        assert got.tobytes() == wanted.tobytes()


def test_quantize_where_preprocessing_changes_bytes_leaves_it_in(coarse: Bundle) -> None:
    assert "Cast" in _operators(coarse)  # up to 16, of which 255 steps are made


def _of_pixels(bundle: Bundle) -> Bundle:
    """Scale rows by 1 / 255 instead of 1 / 16."""
    model = onnx.load_model_from_string(bundle.read("encoder.onnx"))
    (scale,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith("preprocessing.scale")]
    scale.CopyFrom(onnx.numpy_helper.from_array(np.full(scale.dims, 1 / 255, np.float32), scale.name))
    contents = {file: bundle.read(file) for file in bundle.files}
    return Bundle.of(bundle.manifest, contents | {"encoder.onnx": model.SerializeToString()})


def _operators(bundle: Bundle) -> set[str]:
    return {node.op_type for node in onnx.load_model_from_string(bundle.read("encoder.onnx")).graph.node}
