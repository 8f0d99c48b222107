"""An encoder in half precision (float16), and what it will compute, simulated.

Half of the bits to move and, on a GPU, twice to eight times the products in a second; but 11 bits of mantissa and
nothing above 65,504. So the layers between the first and the heads become float16, and preprocessing, which sees raw
values, and the layers that compute mean, log-variance and probabilities stay float32, as do rows and features.

ONNX Runtime on a CPU computes many float16 operators in float32 and rounds now and then, so that it neither overflows
nor rounds as a GPU does. :func:`simulate_half` makes a graph that does, on any machine: every value of the inner layers
is rounded to float16 where a GPU stores it; a GPU's matrix products add up in float32, and so does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.utils import Extractor

from vaefeat.errors import QuantizationError

__all__ = ["simulate_half", "to_half"]


@dataclass(frozen=True)
class _Body:
    """The layers that become float16: their nodes, and the float32 values that go in and come out."""

    nodes: Sequence[onnx.NodeProto]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: frozenset[str]


def to_half(model: onnx.ModelProto, *, heads: Sequence[str], layers: Sequence[str]) -> onnx.ModelProto:
    """Give the graph with its inner layers in float16.

    Parameters
    ----------
    model : ModelProto
        A flat graph, its nodes named and in the order of computing.
    heads : sequence of str
        Names of the nodes that stay float32, with everything after them.
    layers : sequence of str
        Operators that have weights: the first of them begins what becomes float16.

    Raises
    ------
    QuantizationError
        There is nothing between the first layer and the heads.
    """
    # Its converter knows operators whose arguments stay float32; but left to itself it rounds rows and features, too.
    from onnxruntime.transformers.float16 import convert_float_to_float16

    typed = onnx.shape_inference.infer_shapes(model)
    body = _body(typed, heads=heads, layers=layers)
    inner = Extractor(typed).extract_model(list(body.inputs), list(body.outputs))
    converted = convert_float_to_float16(inner, keep_io_types=True, op_block_list=[], disable_shape_infer=True)
    # Weights that layers outside use as well are there twice.
    weights = {tensor.name: f"{tensor.name}/half" for tensor in converted.graph.initializer}
    for tensor in converted.graph.initializer:
        tensor.name = weights[tensor.name]
    for node in converted.graph.node:
        node.input[:] = [weights.get(name, name) for name in node.input]
    inside = {node.name for node in body.nodes}
    outside = [node for node in model.graph.node if node.name not in inside]
    first = next(number for number, node in enumerate(model.graph.node) if node.name in inside)
    before = {node.name for node in list(model.graph.node)[:first]}
    made = _renewed(
        model,
        [
            *(node for node in outside if node.name in before),
            *_sorted(converted.graph.node, known=set(body.inputs) | set(weights.values())),
            *(node for node in outside if node.name not in before),
        ],
    )
    used = {name for node in made.graph.node for name in node.input}
    kept = [tensor for tensor in [*model.graph.initializer, *converted.graph.initializer] if tensor.name in used]
    del made.graph.initializer[:]
    made.graph.initializer.extend(kept)
    return made


def simulate_half(model: onnx.ModelProto, *, heads: Sequence[str], layers: Sequence[str]) -> onnx.ModelProto:
    """Give a float32 graph that rounds, and overflows, as that of :func:`to_half` does on a GPU.

    Parameters and errors are those of :func:`to_half`.
    """
    body = _body(onnx.shape_inference.infer_shapes(model), heads=heads, layers=layers)
    inside = {node.name for node in body.nodes}
    entering = {name: f"{name}/entering" for name in body.inputs}
    made: list[onnx.NodeProto] = []
    for original in model.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        if node.name in inside:
            while entering and (name := next((name for name in node.input if name in entering), None)):
                made += _rounding(name, entering.pop(name))
            node.input[:] = [f"{name}/entering" if name in body.inputs else name for name in node.input]
        made.append(node)
        for number, name in enumerate(node.output):
            if node.name in inside and name in body.values:
                node.output[number] = f"{name}/exact"
                made += _rounding(f"{name}/exact", name)
    simulated = _renewed(model, made)
    used = {name for node in body.nodes for name in node.input}
    for tensor in simulated.graph.initializer:
        if tensor.name in used and tensor.data_type == TensorProto.FLOAT:
            with np.errstate(over="ignore"):
                coarse = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(coarse, tensor.name))
    return simulated


def _body(typed: onnx.ModelProto, *, heads: Sequence[str], layers: Sequence[str]) -> _Body:
    """Find what lies between the first layer and the heads."""
    floats = {
        value.name
        for value in [*typed.graph.value_info, *typed.graph.output, *typed.graph.input]
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    begun: set[str] = set()
    ended: set[str] = set()
    nodes = []
    for node in typed.graph.node:
        if node.name in heads or ended & set(node.input):
            ended |= set(node.output)
        elif node.op_type in layers or begun & set(node.input):
            begun |= set(node.output)
            nodes.append(node)
    values = frozenset(floats & begun)
    weights = {tensor.name for tensor in typed.graph.initializer}
    inside = {name for node in nodes for name in node.input}
    outside = {name for node in typed.graph.node if node not in nodes for name in node.input}
    outside |= {value.name for value in typed.graph.output}
    inputs = tuple(name for name in _ordered(nodes) if name in (inside - begun - weights) & floats)
    if not values or not inputs:
        raise QuantizationError("got an encoder without a layer before its heads, wanted one to compute in float16")
    return _Body(nodes, inputs, tuple(sorted(values & outside)), values)


def _ordered(nodes: Sequence[onnx.NodeProto]) -> dict[str, None]:
    return dict.fromkeys(name for node in nodes for name in node.input)


def _rounding(name: str, rounded: str) -> list[onnx.NodeProto]:
    half = f"{rounded}/half"
    return [
        helper.make_node("Cast", [name], [half], name=f"{half}/cast", to=TensorProto.FLOAT16),
        helper.make_node("Cast", [half], [rounded], name=f"{rounded}/cast", to=TensorProto.FLOAT),
    ]


def _sorted(nodes: Sequence[onnx.NodeProto], *, known: set[str]) -> list[onnx.NodeProto]:
    """Put nodes in the order of computing: the converter appends its casts at the end."""
    left, made = list(nodes), []
    while left:
        ready = [node for node in left if all(not name or name in known for name in node.input)]
        assert ready, "a graph has no cycles"
        made += ready
        known |= {name for node in ready for name in node.output}
        left = [node for node in left if node not in ready]
    return made


def _renewed(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    # Of types that have changed.
    del made.graph.value_info[:]
    return made
