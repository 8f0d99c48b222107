"""Graphs that are refused before they run, and the choice of a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vaefeat import Bundle, OnnxEncoder, load_bundle
from vaefeat.errors import BundleError, DeviceError
from vaefeat.processors import available_cpus
from vaefeat.runtime import check_graph, open_graph

WEIGHTS = numpy_helper.from_array(np.diag([1, 2, 3, 4]).astype(np.float32), "weights")


def graph(
    *nodes: onnx.NodeProto,
    initializers: tuple[onnx.TensorProto, ...] = (),
    sparse: tuple[onnx.SparseTensorProto, ...] = (),
    domains: tuple[str, ...] = ("",),
    functions: tuple[onnx.FunctionProto, ...] = (),
) -> onnx.ModelProto:
    """Make a model from rows (batch, 4) to mean (batch, 4)."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("rows", "mean")]
    return helper.make_model(
        helper.make_graph(
            list(nodes), "graph", ends[:1], ends[1:], initializer=list(initializers), sparse_initializer=list(sparse)
        ),
        opset_imports=[helper.make_opsetid(domain, 20 if domain == "" else 1) for domain in domains],
        functions=list(functions),
        ir_version=10,
    )


def node(operator: str, *inputs: str, output: str = "mean", domain: str | None = None, **attributes: Any) -> Any:
    return helper.make_node(operator, list(inputs), [output], domain=domain, **attributes)


def external(tensor: onnx.TensorProto, location: str) -> onnx.TensorProto:
    """Point a tensor to a file, as a bundle made to read other files would."""
    moved = onnx.TensorProto()
    moved.CopyFrom(tensor)
    moved.ClearField("raw_data")
    moved.data_location = TensorProto.EXTERNAL
    entry = moved.external_data.add()
    entry.key, entry.value = "location", location
    return moved


def sparse_external(location: str) -> onnx.SparseTensorProto:
    values = external(numpy_helper.from_array(np.ones(2, np.float32), "weights"), location)
    indices = numpy_helper.from_array(np.array([0, 5]), "indices")
    return helper.make_sparse_tensor(values, indices, [4, 4])


PRODUCT = node("MatMul", "rows", "weights")
PLAIN = graph(PRODUCT, initializers=(WEIGHTS,))


def test_plain_graph_is_opened_and_computes() -> None:
    opened = open_graph(PLAIN.SerializeToString(), what="a graph", device="cpu")
    assert (opened.device, opened.reason, opened.provider) == ("cpu", "asked for", "CPUExecutionProvider")
    (result,) = opened.session.run(["mean"], {"rows": np.ones((3, 4), np.float32)})
    np.testing.assert_array_equal(result, np.tile([1, 2, 3, 4], (3, 1)))


def branches() -> onnx.ModelProto:
    value = helper.make_tensor_value_info("chosen", TensorProto.FLOAT, ["batch", 4])
    branch = helper.make_graph([node("Identity", "rows", output="chosen")], "branch", [], [value])
    condition = numpy_helper.from_array(np.array(True), "condition")
    return graph(node("If", "condition", then_branch=branch, else_branch=branch), initializers=(condition,))


def local_function() -> onnx.ModelProto:
    body = helper.make_function(
        "ours", "Twice", ["x"], ["y"], [node("Add", "x", "x", output="y")], [helper.make_opsetid("", 20)]
    )
    return graph(node("Twice", "rows", domain="ours"), domains=("", "ours"), functions=(body,))


def hidden_function() -> onnx.ModelProto:
    model = local_function()
    del model.opset_import[1:]
    del model.graph.node[:]
    model.graph.node.append(node("Identity", "rows"))
    return model


def dropout() -> onnx.ModelProto:
    ratio, training = (
        numpy_helper.from_array(np.array(0.5, np.float32), "ratio"),
        numpy_helper.from_array(np.array(True), "on"),
    )
    return graph(node("Dropout", "rows", "ratio", "on"), initializers=(ratio, training))


REFUSED: dict[str, tuple[onnx.ModelProto, str]] = {
    "external": (graph(PRODUCT, initializers=(external(WEIGHTS, "secret"),)), r"external data \(weights\)"),
    "external-in-a-constant": (
        graph(node("Constant", output="weights", value=external(WEIGHTS, "secret")), PRODUCT),
        "external data",
    ),
    "external-sparse": (graph(PRODUCT, sparse=(sparse_external("secret"),)), "external data"),
    "external-sparse-constant": (
        graph(node("Constant", output="weights", sparse_value=sparse_external("secret")), PRODUCT),
        "external data",
    ),
    "custom-domain": (graph(node("Mine", "rows", domain="com.mine"), domains=("", "com.mine")), r"\['com.mine'\]"),
    "undeclared-domain": (graph(node("FusedGelu", "rows", domain="com.microsoft")), "com.microsoft.FusedGelu"),
    "ml-domain": (graph(node("Scaler", "rows", domain="ai.onnx.ml"), domains=("", "ai.onnx.ml")), "ai.onnx.ml"),
    "local-function": (local_function(), r"domains \['ours'\]"),
    "hidden-function": (hidden_function(), "local functions"),
    "subgraph": (branches(), "a subgraph in If"),
    "dropout": (dropout(), "random node Dropout"),
    "random-normal": (graph(node("RandomNormalLike", "rows")), "random node RandomNormalLike"),
    "random-uniform": (graph(node("RandomUniform", shape=[2, 4])), "random node RandomUniform"),
    "bernoulli": (graph(node("Bernoulli", "rows")), "random node Bernoulli"),
    "no-nodes": (graph(initializers=(WEIGHTS,)), "it has no nodes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_graph_with_what_an_encoder_never_has_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What ONNX Runtime would read if it were let: it looks in the working directory.
    (tmp_path / "secret").write_bytes(np.arange(16, dtype=np.float32).tobytes())
    monkeypatch.chdir(tmp_path)
    model, message = REFUSED[name]
    with pytest.raises(BundleError, match=f"got the graph with .*{message}|not an ONNX graph: {message}"):
        open_graph(model.SerializeToString(), what="the graph", device="cpu")


@pytest.mark.parametrize("content", [b"", b"\x00", b"not a graph at all", b"\xff" * 1000, b"{}", bytes(range(256))])
def test_bytes_that_are_no_graph_are_refused(content: bytes) -> None:
    with pytest.raises(BundleError, match="got x that is not an ONNX graph"):
        open_graph(content, what="x")


def test_graph_that_onnx_runtime_does_not_load_is_refused_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    # By default ONNX Runtime prints what it makes of the error, and tries again with another provider.
    unknown = graph(node("NoSuchOperator", "rows"))
    with pytest.raises(BundleError, match=r"got x that ONNX Runtime does not load: .*NoSuchOperator"):
        open_graph(unknown.SerializeToString(), what="x", device="cpu")
    assert "Falling back" not in capfd.readouterr().out


def test_session_never_falls_back_to_another_device_by_itself() -> None:
    assert open_graph(PLAIN.SerializeToString(), what="x", device="cpu").session._enable_fallback is False


def test_check_graph_gives_the_graph_back() -> None:
    assert check_graph(PLAIN.SerializeToString(), what="x") == PLAIN


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_below_one_are_refused(threads: int) -> None:
    with pytest.raises(DeviceError, match=rf"got threads={threads}, wanted at least 1, or None"):
        open_graph(PLAIN.SerializeToString(), what="x", threads=threads)


@pytest.mark.parametrize("device", ["gpu", "CPU", "cuda:0", "", None])
def test_unknown_device_is_refused(device: Any) -> None:
    with pytest.raises(DeviceError, match=f"got device={device!r}, wanted 'auto', 'cpu', 'cuda' or 'tensorrt'"):
        open_graph(PLAIN.SerializeToString(), what="x", device=device)


@pytest.mark.parametrize(
    ("asked", "told", "given"),
    [
        (None, None, available_cpus()),
        (None, "1", 1),
        (None, "1,4", 1),
        (None, "1000", available_cpus()),
        (None, "0", available_cpus()),
        (None, "many", available_cpus()),
        (1, None, 1),
        (3, "1", 3),
    ],
)
def test_threads_are_those_asked_for_or_openmps_or_one_for_each_processor(
    asked: int | None, told: str | None, given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    opened = open_graph(PLAIN.SerializeToString(), what="x", device="cpu", threads=asked)
    assert opened.session.get_session_options().intra_op_num_threads == given


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.mark.skipif(has_cuda(), reason="there is a CUDA device")
def test_cuda_asked_for_and_not_there_says_what_to_do(digits_bundle: Path) -> None:
    with pytest.raises(DeviceError, match=r"got device='cuda', but .+; use device='cpu' or 'auto'"):
        OnnxEncoder(digits_bundle, device="cuda")


@pytest.mark.skipif(has_cuda(), reason="there is a CUDA device")
def test_auto_without_cuda_takes_the_cpu_and_says_why(digits_bundle: Path) -> None:
    encoder = OnnxEncoder(digits_bundle, device="auto")
    assert (encoder.device, encoder.provider) == ("cpu", "CPUExecutionProvider")
    assert any(why in encoder.device_reason for why in ("no NVIDIA driver", "sees no device", "without CUDA"))


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_cuda_that_is_there_is_taken_and_gives_the_same_features(
    digits_bundle: Path, digits_rows: Any, device: str
) -> None:
    encoder = OnnxEncoder(digits_bundle, device=device)
    assert (encoder.device, encoder.provider) == ("cuda", "CUDAExecutionProvider")
    expected = OnnxEncoder(digits_bundle, device="cpu").embed(digits_rows)
    np.testing.assert_allclose(encoder.embed(digits_rows), expected, atol=1e-4)


def changed_encoder(folder: Path, **changes: Any) -> Bundle:
    """Give the bundle's encoder other ends; the hashes fit, as they would for a bundle made by other code."""
    bundle = load_bundle(folder)
    model = onnx.load_model_from_string(bundle.read("encoder.onnx"))
    for end in (*model.graph.input, *model.graph.output):
        sizes = end.type.tensor_type.shape.dim
        if "n_rows" in changes:
            sizes[0].Clear()
            sizes[0].dim_value = changes["n_rows"]
        if end.name == changes.get("rename"):
            for each in model.graph.node:
                each.input[:] = ["other" if name == end.name else name for name in each.input]
                each.output[:] = ["other" if name == end.name else name for name in each.output]
            end.name = "other"
    contents = {name: bundle.read(name) for name in bundle.files}
    return Bundle.of(bundle.manifest, {**contents, "encoder.onnx": model.SerializeToString()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rename": "rows"}, r"inputs \[\('other'"),
        ({"rename": "logvar"}, r"outputs \{.*'other': 8"),
        ({"n_rows": 2}, "takes 2 rows at a time, wanted any number"),
    ],
)
def test_encoder_with_other_ends_is_refused(digits_bundle: Path, changes: dict[str, Any], message: str) -> None:
    OnnxEncoder(changed_encoder(digits_bundle), device="cpu")
    with pytest.raises(BundleError, match=message):
        OnnxEncoder(changed_encoder(digits_bundle, **changes), device="cpu")
