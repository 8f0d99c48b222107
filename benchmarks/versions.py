"""Further versions of a bundle with known features: what swaps of models are tested with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import safetensors.numpy
from onnx import numpy_helper

from vaefeat.bundle import Bundle
from vaefeat.reference import REFERENCE_FILE

__all__ = ["scaled"]


def scaled(
    bundle: Bundle, *, factor: float = 2.0, honest: bool = True, name: str | None = None, reference: bool = True
) -> Bundle:
    """Make a version whose mean is multiplied.

    Parameters
    ----------
    bundle : Bundle
    factor : float
        A power of two changes no digit of the mean.
    honest : bool
        Whether its reference is multiplied, too; a service refuses a version where it is not.
    name : str, optional
        The bundle's own when None.
    reference : bool
        Whether it has one.

    Returns
    -------
    Bundle
        In memory.
    """
    contents = {file: bundle.read(file) for file in bundle.files}
    graph = onnx.load_model_from_string(contents["encoder.onnx"])
    (producer,) = [node for node in graph.graph.node if "mean" in node.output]
    producer.output[:] = ["unscaled" if output == "mean" else output for output in producer.output]
    graph.graph.initializer.append(numpy_helper.from_array(np.array(factor, np.float32), "factor"))
    graph.graph.node.append(onnx.helper.make_node("Mul", ["unscaled", "factor"], ["mean"]))
    contents["encoder.onnx"] = graph.SerializeToString()
    figures = safetensors.numpy.load(contents.pop(REFERENCE_FILE))
    if honest:
        figures["features"] = figures["features"] * np.float32(factor)
    if reference:
        contents[REFERENCE_FILE] = safetensors.numpy.save(figures)
    return Bundle.of(replace(bundle.manifest, name=name or bundle.name), contents)
