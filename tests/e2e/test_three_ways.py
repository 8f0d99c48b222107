"""One bundle, three ways to its features, one answer to the last bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from pipelines.server import running_server
from vaefeat import ModelConfig, OnnxEncoder, RemoteEncoder, TrainConfig, VAEFeatures, pretrain
from vaefeat.data import load_rows

N_ROWS = 1000


@pytest.fixture(scope="module")
def mnist_rows(data_dir: Path) -> np.ndarray:
    return load_rows(data_dir / "MNIST", split="test", max_rows=N_ROWS).array


@pytest.fixture(scope="module")
def mnist_bundle(mnist_rows: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "mnist"
    pretrain(mnist_rows, model=ModelConfig(latent_dim=16), train=TrainConfig(max_epochs=2), out=folder, progress=False)
    return folder


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.serve)])
@pytest.mark.parametrize("output", ["mean", "hidden"])
def test_library_pipeline_and_service_give_the_same_bits(
    engine: str, output: str, mnist_bundle: Path, mnist_rows: np.ndarray
) -> None:
    wanted = OnnxEncoder(mnist_bundle).embed(mnist_rows, output=output)
    assert wanted.shape[0] == N_ROWS
    assert wanted.std() > 0.01

    pipe = make_pipeline(VAEFeatures(mnist_bundle, output=output), LogisticRegression(max_iter=50))
    flat = mnist_rows.reshape(N_ROWS, -1)
    pipe[:-1].fit(flat)
    np.testing.assert_array_equal(pipe[:-1].transform(flat).view(np.uint32), wanted.view(np.uint32))

    with running_server(mnist_bundle, engine=engine, start_timeout_s=120) as address:
        with RemoteEncoder(address, batch_size=97) as remote:
            got = remote.embed(mnist_rows, output=output)
            assert remote.digest == OnnxEncoder(mnist_bundle).digest
        over_http = VAEFeatures(address, output=output).fit_transform(flat)
    np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))
    np.testing.assert_array_equal(over_http.view(np.uint32), wanted.view(np.uint32))
