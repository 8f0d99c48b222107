"""The public clients of the protocols, as installed, each in a process of its own: their pins clash with ours."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from serving.models import Models, Place
from serving.protocols.oip_grpc import start_grpc
from serving.service import Service
from serving.settings import Limits
from tests.e2e.test_servers import CHECKOUT, RAY, launched, wait_until_ready
from vaefeat import OnnxEncoder

PYTHON = CHECKOUT / ".venv-clients" / "bin" / "python"
SCRIPTS = CHECKOUT / "tests" / "clients"


@pytest.fixture(scope="module")
def folder(digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, what the encoder on this machine makes of them, and the first of them as PNG files."""
    folder = tmp_path_factory.mktemp("samples")
    local = OnnxEncoder(digits_bundle, device="cpu")
    rows = digits_rows[:64]
    np.save(folder / "rows.npy", rows)
    for output in ("mean", "logvar"):
        np.save(folder / f"{output}.npy", local.embed(rows, output=output))
    for index in range(3):
        Image.fromarray(rows[index, 0]).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module", params=["local", RAY])
def url(request: pytest.FixtureRequest, digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    arguments = [digits_bundle, "--engine", request.param, "--port", 0, "--device", "cpu"]
    with launched(*arguments, tmp_path=tmp_path_factory.mktemp("server")) as started:
        yield wait_until_ready(started).url
        assert started.press_ctrl_c() == 0
        assert {line["status"] // 100 for line in started.log()} <= {4}


@pytest.fixture
def address(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve over gRPC from a thread of this process."""
    # The path of a Unix socket must be short.
    address = f"unix:{tmp_path_factory.getbasetemp()}/grpc"
    ready, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        models = Models.from_bundles([digits_bundle], place=Place(device="cpu", threads=1))
        service = Service(models, Limits(), lanes=1)
        await service.start()
        server = await start_grpc(service, address, max_message_bytes=2**20)
        while not stop.is_set():
            if service.ready:
                ready.set()
            await asyncio.sleep(0.02)
        await server.stop(None)
        await service.stop()

    thread = threading.Thread(target=asyncio.run, args=[serve()])
    thread.start()
    try:
        assert ready.wait(20)
        yield address
    finally:
        stop.set()
        thread.join()


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
def test_a_public_client_over_http_gets_the_bits_of_the_local_encoder(url: str, folder: Path, script: str) -> None:
    run(script, url, folder)


def test_tritonclient_over_grpc_gets_the_bits_of_the_local_encoder(address: str, folder: Path) -> None:
    run("tritonclient_grpc.py", address, folder)


def test_curl_posts_raw_rows_and_gets_raw_means_behind_the_json(url: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(np.load(folder / "rows.npy").tobytes())
    command = ["curl", "-sS", "--fail-with-body", "--data-binary", f"@{tmp_path}/rows", "-D", f"{tmp_path}/headers"]
    command += ["-H", "Inference-Header-Content-Length: 0", f"{url}/v2/models/digits/infer"]
    body = subprocess.run(command, check=True, capture_output=True).stdout
    headers = dict(
        line.lower().split(": ", 1) for line in (tmp_path / "headers").read_text().splitlines() if ": " in line
    )
    assert body[int(headers["inference-header-content-length"]) :] == np.load(folder / "mean.npy").tobytes()
