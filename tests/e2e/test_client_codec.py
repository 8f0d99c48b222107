"""The codec of the Open Inference Protocol against the one in Triton's client, in both directions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.protocols.oip import InferRequest, decode_infer
from serving.protocols.oip_outputs import InferEncoder
from tests.e2e.test_clients import run
from vaefeat.input_spec import InputSpec

SPEC = InputSpec(kind="image", shape=(1, 2, 3), dtype="uint8", low=0.0, high=255.0)
DTYPES = ["?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"]


def test_decode_infer_reads_what_tritonclient_writes_bit_for_bit(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    sent: dict[str, NDArray[Any]] = {}
    for dtype in DTYPES:
        for form in ("json", "binary"):
            if (dtype, form) == ("f2", "json"):
                continue  # the protocol has no such thing
            n = int(generator.integers(1, 5))
            whole = generator.integers(-(2**15), 2**15, (n, 1, 2, 3) if form == "json" else (n, 6))
            array = whole / 7.0 if dtype.startswith("f") else whole % 2 if dtype == "?" else whole
            sent[f"{dtype.replace('?', 'bool')}_{form}"] = array.astype(dtype)
    for name, array in sent.items():
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "images_binary.npy", np.array([b"\x89PNG\x01", b"x", b"\xff\xd8"]))
    run("tritonclient_codec.py", "write", tmp_path)

    def decoded(name: str) -> InferRequest:
        body, length = (tmp_path / f"{name}.body").read_bytes(), (tmp_path / f"{name}.length").read_text()
        json_length = int(length) if length else None
        return decode_infer(body, json_length=json_length, spec=SPEC, outputs={"mean": 2}, max_rows=10)

    for name, array in sent.items():
        got = decoded(name)
        assert got.id == name
        assert got.outputs == (("mean", True),), "it asks for bytes where its caller says nothing"
        assert got.rows is not None
        assert (got.rows.dtype, got.rows.shape) == (array.dtype, array.shape), name
        assert got.rows.tobytes() == array.tobytes(), name
    assert decoded("images_binary").images == [b"\x89PNG\x01", b"x", b"\xff\xd8"]


def test_tritonclient_reads_what_infer_encoder_writes_bit_for_bit(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    features = {
        name: generator.normal(size=(5, width)).astype(np.float32)
        for name, width in [("mean", 3), ("logvar", 3), ("hidden", 7)]
    }
    model: Any = SimpleNamespace(
        name="digits",
        version="ab",
        digest="sha256:ab",
        outputs={name: f.shape[1] for name, f in features.items()},
        classes=(),
    )
    asked = InferRequest("é", None, None, (("hidden", True), ("mean", False), ("logvar", True)), 0, None)
    embedded: Any = SimpleNamespace(features=features, errors={})
    body, headers = InferEncoder(model).encode(asked, embedded)
    (tmp_path / "answer.body").write_bytes(body)
    (tmp_path / "answer.length").write_bytes(dict(headers)[b"inference-header-content-length"])
    run("tritonclient_codec.py", "read", tmp_path)
    for name, array in features.items():
        read = np.load(tmp_path / f"{name}.read.npy")
        assert (read.dtype, read.shape) == (array.dtype, array.shape)
        assert read.tobytes() == array.tobytes()
