"""Fixtures that several folders of tests share: real rows, and one real bundle trained on them."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from numpy.typing import NDArray
from sklearn.datasets import load_digits, load_wine
from torch.onnx._internal.exporter._registration import ONNXRegistry

from benchmarks.versions import scaled
from vaefeat import ModelConfig, TrainConfig, pretrain
from vaefeat.bundle import Bundle, load_bundle
from vaefeat.cli import run_command_line


def pytest_configure() -> None:
    # A shell starts what it puts in the background with Ctrl-C ignored, which this process and those that it starts
    # inherit; the tests of interruptions need it as a terminal gives it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session", autouse=True)
def exporter_lists_its_operators_once() -> Iterator[None]:
    """Keep what torch.onnx.export makes anew for every graph, in more than half of the time of a small fit.

    It parses the source of onnxscript's 500 operators, which does not change while the tests run.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


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
def wine_table() -> pd.DataFrame:
    """Give scikit-learn's 178 wines as people have tables: a category, text, a boolean, numbers, gaps."""
    table = load_wine(as_frame=True).data.copy()
    table["alcohol"] = pd.qcut(table["alcohol"], 4, labels=["low", "mid", "high", "top"])
    table["ash"] = table["ash"] > table["ash"].median()
    table["hue"] = pd.cut(table["hue"], 3, labels=["a", "b", "c"]).astype(str)
    random = np.random.default_rng(0)
    for column in ("alcohol", "magnesium", "hue", "proline"):
        table.loc[random.random(len(table)) < 0.15, column] = None
    return table


@pytest.fixture(scope="session")
def table_bundle(tmp_path_factory: pytest.TempPathFactory, wine_table: pd.DataFrame) -> Path:
    """Give a small model of the wines."""
    folder = tmp_path_factory.mktemp("bundles") / "wine"
    model = {"latent_dim": 4, "hidden_dims": (32,)}
    pretrain(wine_table, preset="textbook", model=model, train={"max_epochs": 150}, out=folder, progress=False)
    return folder


@pytest.fixture(scope="session")
def variant(digits_bundle: Path) -> Callable[..., Bundle]:
    """Make another version of the digits' bundle: its mean is multiplied, and its reference too if it is honest."""

    def make(*, name: str = "digits", **options: Any) -> Bundle:
        return scaled(load_bundle(digits_bundle), name=name, **options)

    return make


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command line as a shell does, status and streams, but in this process, which has loaded torch already."""

    def run(app: typer.Typer, *words: str | Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_command_line(app)
        told = capfd.readouterr()
        return subprocess.CompletedProcess(words, int(ended.value.code or 0), told.out, told.err)

    return run
