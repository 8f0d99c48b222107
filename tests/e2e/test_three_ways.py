"""One bundle, three ways to its features, one answer to the last bit."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from pipelines.server import running_server
from vaefeat import ModelConfig, OnnxEncoder, RemoteEncoder, TrainConfig, VAEFeatures, pretrain
from vaefeat.data import load_rows
from vaefeat.errors import InputError

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


def test_frame_rows_and_json_of_a_table_give_the_same_bits_over_http(
    table_bundle: Path, wine_table: pd.DataFrame
) -> None:
    wanted = OnnxEncoder(table_bundle, device="cpu").embed(wine_table)
    rows = load_rows(wine_table).array
    with running_server(table_bundle, engine="local", start_timeout_s=120) as address:
        with RemoteEncoder(address, batch_size=50) as remote:
            got = {"frame": remote.embed(wine_table), "rows": remote.embed(rows)}
            with pytest.raises(InputError, match="category 'zz' in column 'hue'"):
                remote.embed(wine_table.assign(hue="zz"))
        got["pipeline"] = VAEFeatures(address).fit_transform(wine_table)
        # The server itself, without a client that knows the columns: null is a missing value.
        body = {"rows": [[None if value != value else value for value in row] for row in rows.tolist()]}
        answer = httpx.post(f"{address}/v1/embed", json=body)
        got["json"] = np.array(answer.json()["embeddings"], dtype=np.float32)
        tensor = {"name": "rows", "datatype": "FP32", "shape": list(rows.shape), "data": body["rows"]}
        inferred = httpx.post(f"{address}/v2/models/wine/infer", json={"inputs": [tensor]}).json()
        mean = next(output for output in inferred["outputs"] if output["name"] == "mean")
        got["open inference"] = np.array(mean["data"], dtype=np.float32).reshape(mean["shape"])
        refused = httpx.post(f"{address}/v1/embed", json={"rows": [[7.0, *body["rows"][0][1:]]]})
    for door, features in got.items():
        np.testing.assert_array_equal(features.view(np.uint32), wanted.view(np.uint32), err_msg=door)
    assert refused.status_code == 422
    assert "got 7 in column 'alcohol'" in refused.text
