"""Writes an ONNX graph operator by operator, and takes other graphs into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from vaefeat.errors import ExportError

__all__ = ["DOUBLE", "ML_OPSET", "SINGLE", "GraphBuilder"]

#: Of the operators of classical machine learning, ``ai.onnx.ml``: the first with trees in float64.
ML_OPSET = 3
SINGLE, DOUBLE = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
#: In which two tensors of different graphs cannot have the same name.
_SEPARATOR = "/"


class GraphBuilder:
    """A graph in the making; called with an operator and its inputs, it gives the name of the output.

    Parameters
    ----------
    opset : int
        Of ONNX's own operators.

    Examples
    --------
    >>> import numpy as np
    >>> graph = GraphBuilder(opset=20)
    >>> y = graph("Mul", graph("Neg", "x"), np.array([2.0]))
    """

    def __init__(self, *, opset: int) -> None:
        self.opset = opset
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._named = 0

    def __call__(self, op: str, *inputs: str | NDArray[Any], domain: str = "", **attributes: Any) -> str:
        """Add an operator; arrays among the inputs become constants."""
        return self.several(op, *inputs, n_outputs=1, domain=domain, **attributes)[0]

    def several(
        self, op: str, *inputs: str | NDArray[Any], n_outputs: int, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add an operator that has several outputs, and give their names."""
        names = [given if isinstance(given, str) else self._constant(given) for given in inputs]
        outputs = [self._name(op) for _ in range(n_outputs)]
        self._nodes.append(helper.make_node(op, names, outputs, domain=domain, **attributes))
        return outputs

    def include(self, model: onnx.ModelProto, x: str) -> list[str]:
        """Take in a graph of one input, which is to be the tensor `x`, and give the names of its outputs.

        Raises
        ------
        ExportError
            It is written in another version of ONNX's operators.
        """
        versions = {entry.domain: entry.version for entry in model.opset_import}
        if versions.get("", self.opset) != self.opset or versions.get("ai.onnx.ml", 0) > ML_OPSET or model.functions:
            raise ExportError(
                f"got a graph with operators of {versions}, wanted versions {self.opset} and at most {ML_OPSET}; "
                "nothing was written. Please report it with the versions of onnx and skl2onnx"
            )
        renamed = onnx.compose.add_prefix(model, prefix=self._name("part") + _SEPARATOR).graph
        (given,) = renamed.input
        self._nodes += [helper.make_node("Identity", [x], [given.name]), *renamed.node]
        self._constants += renamed.initializer
        return [output.name for output in renamed.output]

    def model(
        self, inputs: Sequence[onnx.ValueInfoProto], outputs: dict[str, onnx.ValueInfoProto], *, ir_version: int
    ) -> onnx.ModelProto:
        """Finish: `outputs` says under which description a tensor goes out."""
        for name, described in outputs.items():
            self._nodes.append(helper.make_node("Identity", [name], [described.name]))
        graph = helper.make_graph(self._nodes, "steps", inputs, list(outputs.values()), self._constants)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("ai.onnx.ml", ML_OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)

    def _constant(self, values: NDArray[Any]) -> str:
        name = self._name("constant")
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def _name(self, kind: str) -> str:
        self._named += 1
        return f"{kind}_{self._named}"
