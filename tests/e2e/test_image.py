"""The images as people get them: built from this checkout, run as a user on a read-only root. `make test-image`."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.e2e.image_engine import CHECKOUT, Container, ImageEngine, missing
from vaefeat import OnnxEncoder, load_bundle

pytestmark = [
    pytest.mark.image,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(missing()), reason=f"images cannot be built here without {missing()}"),
]

USER = 10001
# Ray and torch would each start a thread for every processor.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
TRY_TO_WRITE = """
import os, pathlib
print(os.getuid(), os.getgid())
for folder in ("/", "/app", "/opt/vaefeat", "/bundle", "/home"):
    try:
        pathlib.Path(folder, "mine").touch()
    except OSError as error:
        print(folder, error.strerror)
"""
EMBED = """
import sys, numpy as np
from vaefeat import RemoteEncoder
with RemoteEncoder("http://127.0.0.1:8000") as encoder:
    features = encoder.embed(np.arange(64 * 3, dtype=np.uint8).reshape(3, 1, 8, 8) % 17)
print(features.tobytes().hex())
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageEngine]:
    engine = ImageEngine(tmp_path_factory.mktemp("engine"))
    engine.make_base()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def serve(engine: ImageEngine) -> str:
    engine.build("serve", REVISION="0123abc")
    return "serve"


@pytest.fixture(scope="module")
def full(engine: ImageEngine) -> str:
    engine.build("full")
    return "full"


@pytest.fixture(scope="module")
def demo(engine: ImageEngine, full: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the image by itself, and give the folder that the demo leaves."""
    runs = tmp_path_factory.mktemp("runs")
    os.chown(runs, USER, USER)
    with engine.running(full, volumes={"/runs": runs}, environment=ONE_THREAD) as container:
        assert container.process.wait(1200) == 0, container.output.read_text()
    return runs / "digits"


def wait_until_ready(container: Container) -> str:
    deadline = time.monotonic() + 120
    while not (lines := re.findall(r"^ready .*$", container.output.read_text(), flags=re.MULTILINE)):
        assert container.process.poll() is None, container.output.read_text()
        assert time.monotonic() < deadline, container.output.read_text()
        time.sleep(0.2)
    return str(lines[0])


def packages(engine: ImageEngine, image: str) -> dict[str, str]:
    folders = engine.root(image).glob("opt/vaefeat/lib/python3*/site-packages/*.dist-info")
    named = (folder.name.removesuffix(".dist-info").partition("-") for folder in folders)
    return {name.lower().replace("_", "-"): version for name, _, version in named}


def test_context_holds_the_sources_and_nothing_else(engine: ImageEngine) -> None:
    files = engine.context()
    wanted = {"pyproject.toml", "requirements.lock", "README.md", "LICENSE"}
    assert wanted <= files
    assert {name.partition("/")[0] for name in files - wanted} == {"vaefeat", "serving", "pipelines"}
    assert not [name for name in files if name.endswith(".pyc")]


def size_of(engine: ImageEngine, image: str) -> int:
    """Give an image's bytes, and print them for docs/docker.md: pytest -s shows it."""
    size = engine.size_bytes(image)
    print(f"{image}: {size / 1e9:.2f} GB")
    return size


def test_service_image_has_no_torch_and_stays_under_its_size(engine: ImageEngine, serve: str) -> None:
    installed = packages(engine, serve)
    assert not {"torch", "onnxruntime-gpu", "uv", "pip"} & set(installed)
    assert size_of(engine, serve) < 1.1e9


def test_service_image_has_the_versions_of_the_lock(engine: ImageEngine, serve: str) -> None:
    lock = (CHECKOUT / "requirements.lock").read_text()
    pinned = set(re.findall(r"^([a-z0-9._-]+)==([^ ]+)", lock, flags=re.MULTILINE))
    strays = {
        (name, version)
        for name, version in packages(engine, serve).items()
        if (name.replace(".", "-"), version) not in pinned
    }
    assert strays == set()


def test_image_says_who_runs_it_and_what_it_is(engine: ImageEngine, serve: str) -> None:
    configuration = engine.configuration(serve)
    assert configuration["User"] == f"{USER}:{USER}"
    assert configuration["Labels"]["org.opencontainers.image.revision"] == "0123abc"
    assert configuration["ExposedPorts"] == {"8000/tcp": {}}
    assert not [
        name for name in configuration["Env"] if re.search("key|token|secret|password|index", name, re.IGNORECASE)
    ]


def test_nothing_of_the_machine_that_built_an_image_is_in_it(engine: ImageEngine, serve: str) -> None:
    root = engine.root(serve)
    certificates = "etc/ssl/certs/ca-certificates.crt"
    assert (root / certificates).read_bytes() == (engine.root("base") / certificates).read_bytes()
    # Of what was mounted while it was built, buildah leaves the places, empty.
    assert not (root / "etc/pip.conf").exists() or (root / "etc/pip.conf").stat().st_size == 0
    assert not list(root.glob("etc/uv/*"))
    for place in ("src", "opt/uv", "root/.cache"):
        assert not (root / place).exists(), place


def test_demo_runs_as_a_user_on_a_read_only_root(demo: Path, digits_rows: NDArray[np.uint8]) -> None:
    assert (demo / "report.html").stat().st_size > 10_000
    assert (demo / "report.html").stat().st_uid == USER
    assert json.loads((demo / "metrics.json").read_text())["digest"] == load_bundle(demo).digest
    assert OnnxEncoder(demo, device="cpu").embed(digits_rows[:8]).shape[0] == 8


def test_demo_image_stays_under_two_gigabytes(engine: ImageEngine, full: str) -> None:
    assert not [name for name in packages(engine, full) if name.startswith("nvidia") or name == "onnxruntime-gpu"]
    assert size_of(engine, full) < 2e9


@pytest.mark.parametrize("signal", ["TERM", "INT"])
@pytest.mark.parametrize("kind", ["local", "ray"])
def test_service_is_ready_serves_and_stops_on_a_signal(
    engine: ImageEngine, serve: str, demo: Path, kind: str, signal: str
) -> None:
    command = ("/bundle", "--host", "0.0.0.0", "--insecure", "--engine", kind)
    with engine.running(serve, *command, volumes={"/bundle": demo}, environment=ONE_THREAD) as container:
        assert "models=digits provider=CPUExecutionProvider" in wait_until_ready(container)
        check: dict[str, Any] = engine.configuration(serve)["Healthcheck"]
        assert container.execute(*check["Test"][1:]).returncode == 0

        wrote = container.execute("python", "-c", TRY_TO_WRITE).stdout.splitlines()
        assert wrote[0] == f"{USER} {USER}"
        assert [line.partition(" ")[2] for line in wrote[1:]] == ["Read-only file system"] * 5

        embedded = container.execute("python", "-c", EMBED)
        assert embedded.returncode == 0, embedded.stderr
        rows = np.arange(64 * 3, dtype=np.uint8).reshape(3, 1, 8, 8) % 17
        wanted = OnnxEncoder(demo, device="cpu").embed(rows)
        features = np.frombuffer(bytes.fromhex(embedded.stdout.strip()), np.float32).reshape(wanted.shape)
        np.testing.assert_allclose(features, wanted, atol=1e-5)

        assert container.stop(signal) == 0, container.output.read_text()
        # Beside the log and the one line there is nothing: no warning, no telemetry that could not be written.
        said = [line for line in container.output.read_text().splitlines() if not line.startswith('{"')]
        assert len(said) == 1


def test_health_check_fails_where_nothing_is_served(engine: ImageEngine, serve: str, demo: Path) -> None:
    command = ("/bundle", "--port", "8001", "--engine", "local")
    with engine.running(serve, *command, volumes={"/bundle": demo}, environment=ONE_THREAD) as container:
        wait_until_ready(container)
        assert container.execute(*engine.configuration(serve)["Healthcheck"]["Test"][1:]).returncode != 0
