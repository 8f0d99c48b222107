"""The public clients of the protocols, as installed, each in a process of its own: their pins clash with ours."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.e2e.test_servers import CHECKOUT, RAY, launched, wait_until_ready
from vaefeat import OnnxEncoder

PYTHON = CHECKOUT / ".venv-clients" / "bin" / "python"
SCRIPTS = CHECKOUT / "tests" / "clients"


@pytest.fixture(scope="module")
def folder(digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("samples"), digits_bundle, digits_rows[:64])


def write_samples(folder: Path, bundle: Path, rows: NDArray[np.uint8]) -> Path:
    """Write rows, what the encoder on this machine makes of them, and the first of them as PNG files."""
    local = OnnxEncoder(bundle, device="cpu")
    np.save(folder / "rows.npy", rows)
    for output in ("mean", "logvar"):
        np.save(folder / f"{output}.npy", local.embed(rows, output=output))
    for index in range(3):
        Image.fromarray(rows[index, 0]).save(folder / f"{index}.png")
    return folder


@dataclass(frozen=True)
class Addresses:
    """Where one server listens."""

    url: str
    grpc: str


@pytest.fixture(scope="module", params=["local", RAY])
def served(
    request: pytest.FixtureRequest, digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Addresses]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [digits_bundle, "--engine", request.param, "--port", 0, "--grpc-port", port, "--device", "cpu"]
    with launched(*arguments, tmp_path=tmp_path_factory.mktemp("server")) as started:
        yield Addresses(wait_until_ready(started).url, f"127.0.0.1:{port}")
        assert started.press_ctrl_c() == 0
        assert {line["status"] // 100 for line in started.log()} <= {4}


def run(script: str, *arguments: object) -> None:
    if not PYTHON.exists():
        pytest.fail(
            f"got no {PYTHON.relative_to(CHECKOUT)}, wanted the public clients there: make .venv-clients/.ready"
        )
    done = subprocess.run([PYTHON, SCRIPTS / script, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "script", ["tritonclient_http.py", "tritonclient_http_aio.py", "kserve_rest.py", "openai_embeddings.py"]
)
def test_a_public_client_over_http_gets_the_bits_of_the_local_encoder(
    served: Addresses, folder: Path, script: str
) -> None:
    run(script, served.url, folder)


def test_tritonclient_over_grpc_gets_the_bits_of_the_local_encoder(served: Addresses, folder: Path) -> None:
    run("tritonclient_grpc.py", served.grpc, folder)


def test_curl_posts_raw_rows_and_gets_raw_means_behind_the_json(
    served: Addresses, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows").write_bytes(np.load(folder / "rows.npy").tobytes())
    command = ["curl", "-sS", "--fail-with-body", "--data-binary", f"@{tmp_path}/rows", "-D", f"{tmp_path}/headers"]
    command += ["-H", "Inference-Header-Content-Length: 0", f"{served.url}/v2/models/digits/infer"]
    body = subprocess.run(command, check=True, capture_output=True).stdout
    headers = dict(
        line.lower().split(": ", 1) for line in (tmp_path / "headers").read_text().splitlines() if ": " in line
    )
    assert body[int(headers["inference-header-content-length"]) :] == np.load(folder / "mean.npy").tobytes()
