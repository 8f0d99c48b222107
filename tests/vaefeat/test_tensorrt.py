"""TensorRT: what is missing, what ONNX Runtime is told, and a folder that nobody else writes to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from vaefeat import OnnxEncoder, load_bundle
from vaefeat.errors import DeviceError
from vaefeat.tensorrt import engine_folder, engine_options, why_no_tensorrt

LACKS_TENSORRT = bool(why_no_tensorrt())


def test_tensorrt_that_is_not_there_is_an_error_that_says_what_to_do(digits_bundle: Path) -> None:
    if not LACKS_TENSORRT:
        pytest.skip("TensorRT is installed")
    with pytest.raises(DeviceError, match=r"got device='tensorrt', but .+; use device='cpu' or 'auto'"):
        OnnxEncoder(digits_bundle, device="tensorrt")


@pytest.mark.skipif(not LACKS_TENSORRT, reason="TensorRT is installed")
def test_missing_library_is_named() -> None:
    assert "libnvinfer" in why_no_tensorrt() or "built without TensorRT" in why_no_tensorrt()


def test_engine_options_give_the_shapes_of_the_buckets_in_names_that_onnx_runtime_knows(
    digits_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    content = load_bundle(digits_bundle).read("encoder.onnx")
    options = engine_options(onnx.load_model_from_string(content), content, buckets=(1, 8, 32))
    assert options["trt_profile_min_shapes"] == "rows:1x1x8x8"
    assert options["trt_profile_opt_shapes"] == options["trt_profile_max_shapes"] == "rows:32x1x8x8"
    assert Path(options["trt_engine_cache_path"]).is_relative_to(tmp_path / ".cache")
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    if library.is_file():
        known = library.read_bytes()
        assert all(name.encode() in known for name in options)


def test_engine_options_without_buckets_are_refused(digits_bundle: Path) -> None:
    content = load_bundle(digits_bundle).read("encoder.onnx")
    with pytest.raises(DeviceError, match="without buckets"):
        engine_options(onnx.load_model_from_string(content), content, buckets=())


def test_engine_folder_is_closed_to_others_and_one_for_each_graph(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        first = engine_folder(tmp_path / "cache", b"graph")
    finally:
        os.umask(before)
    assert first.stat().st_mode & 0o777 == 0o700
    assert engine_folder(tmp_path / "cache", b"graph") == first
    assert engine_folder(tmp_path / "cache", b"another graph") != first


@pytest.mark.parametrize("level", ["parent", "folder"])
def test_engine_folder_that_others_can_write_to_is_refused(tmp_path: Path, level: str) -> None:
    folder = engine_folder(tmp_path / "cache", b"graph")
    (folder if level == "folder" else folder.parent).chmod(0o777)
    with pytest.raises(DeviceError, match="other users can write to"):
        engine_folder(tmp_path / "cache", b"graph")


def test_engine_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    folder = engine_folder(tmp_path / "cache", b"graph")
    folder.rmdir()
    (tmp_path / "theirs").mkdir()
    folder.symlink_to(tmp_path / "theirs")
    with pytest.raises(DeviceError, match="which is no folder"):
        engine_folder(tmp_path / "cache", b"graph")


def test_engine_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(DeviceError, match="could not make"):
        engine_folder(tmp_path / "cache", b"graph")


@pytest.mark.gpu
@pytest.mark.slow
def test_tensorrt_that_is_there_gives_nearly_the_same_features(
    digits_bundle: Path, digits_rows: NDArray[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if LACKS_TENSORRT:
        pytest.skip(why_no_tensorrt())
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    expected = OnnxEncoder(digits_bundle, device="cpu").embed(digits_rows)
    encoder = OnnxEncoder(digits_bundle, device="tensorrt")
    assert encoder.provider == "TensorrtExecutionProvider"
    assert encoder.mode.graphs == "off: not with tensorrt"
    # Its builder may use TF32, which has the exponents of float32 and ten bits of mantissa.
    np.testing.assert_allclose(encoder.embed(digits_rows), expected, atol=2e-2 * float(expected.std()))
    assert list((tmp_path / ".cache" / "vaefeat").rglob("*.engine"))
