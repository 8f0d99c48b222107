"""Fixtures that several folders of tests share: real rows, and one real bundle trained on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from sklearn.datasets import load_digits

from vaefeat import ModelConfig, TrainConfig, pretrain
from vaefeat.bundle import Bundle, load_bundle
from vaefeat.reference import REFERENCE_FILE


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data-dir",
        default=str(Path(__file__).parents[2] / "shared" / "data"),
        help="folder that holds MNIST/ and CIFAR10/; tests that need them are skipped where it is missing",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    without_gpu = pytest.mark.skip(reason="no CUDA device on this machine")
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(without_gpu)


@pytest.fixture(scope="session")
def data_dir(request: pytest.FixtureRequest) -> Path:
    folder = Path(request.config.getoption("--data-dir"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; give --data-dir")
    return folder


@pytest.fixture(scope="session")
def digits_rows() -> NDArray[np.uint8]:
    """scikit-learn's 1,797 digits, (n, 1, 8, 8)."""
    images: NDArray[Any] = load_digits().images
    return images.astype(np.uint8)[:, None]


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory, digits_rows: NDArray[np.uint8]) -> Path:
    """Give a small convolutional VAE, trained for fifteen epochs."""
    folder = tmp_path_factory.mktemp("bundles") / "digits"
    pretrain(
        digits_rows,
        model=ModelConfig(latent_dim=8, channels=(16, 32), hidden_dims=(64,)),
        train=TrainConfig(max_epochs=15, batch_size=32),
        out=folder,
        progress=False,
    )
    return folder


@pytest.fixture(scope="session")
def variant(digits_bundle: Path) -> Callable[..., Bundle]:
    """Make another version of the digits' bundle: its mean is multiplied, and its reference too if it is honest."""

    def make(*, factor: float = 2.0, honest: bool = True, name: str = "digits", reference: bool = True) -> Bundle:
        bundle = load_bundle(digits_bundle)
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
        return Bundle.of(replace(bundle.manifest, name=name), contents)

    return make
