"""Images built by buildah and run by runc, where there is no container engine and no registry of images.

The base, which stands for ``python:3.12-slim``, is made by mmdebstrap. Certificates, pip's and uv's configuration, and
folders of wheels are this machine's, mounted while building; nothing of them gets into an image.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
TOOLS = ("buildah", "mmdebstrap", "runc")
BASE = "localhost/base"
#: Debian bookworm's, on which the base is made.
PYTHON = "cp311"


def missing() -> str:
    """Say what this machine lacks to build and run images; empty, if nothing."""
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if sys.platform != "linux" or os.geteuid() != 0:
        lacking.append("root on Linux, to make a base and to mount")
    return ", ".join(lacking)


def run(*command: object, cwd: Path = CHECKOUT) -> str:
    """Run a command and give its standard output; fail with all that it said."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@dataclass
class Container:
    """A process of an image, with everything that it started."""

    name: str
    state: Path
    output: Path
    process: subprocess.Popen[bytes]

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command within the container, as its user."""
        return subprocess.run(
            ["runc", "--root", self.state, "exec", self.name, *command], capture_output=True, text=True, check=False
        )

    def stop(self, signal: str) -> int:
        run("runc", "--root", self.state, "kill", self.name, signal)
        return self.process.wait(60)


class ImageEngine:
    """Images and containers in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.buildah = ("buildah", "--root", folder / "images", "--runroot", folder / "mounts")
        self._roots: dict[str, Path] = {}

    def make_base(self) -> None:
        """Make what ``python:slim`` is: a minimal Debian with Python and certificates."""
        context = self.folder / "base"
        context.mkdir()
        packages = "ca-certificates,python3,python3-venv,python-is-python3"
        # slim images have no documentation either.
        left_out = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale")]
        run("mmdebstrap", "--variant=minbase", f"--include={packages}", *left_out, "bookworm", context / "base.tar")
        (context / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
        run(*self.buildah, "build", "--isolation", "chroot", "--tag", BASE, context)

    def build(self, target: str, **arguments: str) -> None:
        """Build a target of the Dockerfile, and tag it with its name."""
        machine, found = self._configuration()
        settings = {"BASE": BASE, **found, **arguments}
        words = [word for name, value in settings.items() for word in ("--build-arg", f"{name}={value}")]
        command = ("build", "--isolation", "chroot", "--format", "docker", "--target", target, "--tag", target)
        run(*self.buildah, *command, *words, *machine, ".")

    def context(self) -> set[str]:
        """Tell which files a build sees."""
        dockerfile = self.folder / "Dockerfile.context"
        dockerfile.write_text("FROM scratch\nCOPY . /\n")
        run(*self.buildah, "build", "--isolation", "chroot", "--file", dockerfile, "--tag", "context", ".")
        root = self.root("context")
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}

    def root(self, image: str) -> Path:
        """Mount an image, and give the folder."""
        if image not in self._roots:
            container = run(*self.buildah, "from", f"localhost/{image}").strip()
            self._roots[image] = Path(run(*self.buildah, "mount", container).strip())
        return self._roots[image]

    def configuration(self, image: str) -> dict[str, Any]:
        """Give what the image says about how it is to be run."""
        described = json.loads(run(*self.buildah, "inspect", "--type", "image", f"localhost/{image}"))
        configuration: dict[str, Any] = described["Docker"]["config"]
        return configuration

    def size_bytes(self, image: str) -> int:
        """Give an image's size as engines tell it: that of its files, unpacked."""
        return int(run("du", "--summarize", "--apparent-size", "--block-size=1", self.root(image)).split()[0])

    @contextlib.contextmanager
    def running(
        self, image: str, *command: str, volumes: Mapping[str, Path], environment: Mapping[str, str]
    ) -> Iterator[Container]:
        """Run an image as it asks to be: its user and entry point; with a read-only root, no capability, no network.

        ``volumes`` are folders of this machine by their place in the container; that of the name ``/runs`` is writable.
        """
        name = f"vaefeat-{uuid.uuid4().hex}"
        bundle = self.folder / name
        bundle.mkdir()
        specification = _specification(self.configuration(image), self.root(image), command, volumes, environment)
        (bundle / "config.json").write_text(json.dumps(specification))
        state, output = self.folder / "state", bundle / "output"
        with output.open("wb") as log:
            start = ["runc", "--root", str(state), "run", "--bundle", str(bundle), name]
            process = subprocess.Popen(start, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield Container(name, state, output, process)
        finally:
            if process.poll() is None:
                subprocess.run(["runc", "--root", state, "delete", "--force", name], check=False, capture_output=True)
            process.wait()

    def close(self) -> None:
        """Unmount and remove everything."""
        for words in (("umount", "--all"), ("rm", "--all"), ("rmi", "--all", "--force")):
            run(*self.buildah, *words)
        shutil.rmtree(self.folder)

    def _configuration(self) -> tuple[list[str], dict[str, str]]:
        """Find how this machine reaches packages: as mounts, and as arguments of the Dockerfile."""
        text = ""
        for place in (Path("/etc/uv/uv.toml"), Path.home() / ".config" / "uv" / "uv.toml"):
            text = place.read_text() if place.is_file() else text
        certificates = os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile
        mounted = {"/etc/ssl/certs/ca-certificates.crt": certificates}
        if Path("/etc/pip.conf").is_file():
            mounted["/etc/pip.conf"] = "/etc/pip.conf"
        arguments = {}
        wheel = _cpu_torch()
        if wheel is not None:
            text = f'find-links = ["{wheel.parent}"]\n{text}'
            mounted[str(wheel.parent)] = str(wheel.parent)
            arguments["TORCH"] = "torch==" + wheel.name.split("-")[1]
        (self.folder / "uv").mkdir(exist_ok=True)
        (self.folder / "uv" / "uv.toml").write_text(text)
        mounted["/etc/uv"] = str(self.folder / "uv")
        return [f"--volume={source}:{place}:ro" for place, source in mounted.items() if source], arguments


def _cpu_torch() -> Path | None:
    """Find a build of torch for the CPU in the folders of wheels that uv or pip are told of."""
    folders = [Path(folder) for name in ("UV_FIND_LINKS", "PIP_FIND_LINKS") for folder in _words(name)]
    wheels = [path for folder in folders for path in sorted(folder.glob(f"torch-*+cpu-{PYTHON}-*.whl"))]
    return wheels[-1] if wheels else None


def _words(variable: str) -> list[str]:
    return [word for word in re.split(r"[\s,]+", os.environ.get(variable, "")) if word]


def _specification(
    asked: Mapping[str, Any],
    root: Path,
    command: tuple[str, ...],
    volumes: Mapping[str, Path],
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """Write down a container as the OCI's runtime specification has it."""
    user, group = (int(number) for number in asked["User"].split(":"))
    scratch = [
        {"destination": place, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]}
        for place in ("/tmp", "/dev/shm")
    ]
    folders = [
        {
            "destination": place,
            "type": "bind",
            "source": str(source),
            "options": ["rbind", "rw" if place == "/runs" else "ro"],
        }
        for place, source in volumes.items()
    ]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": user, "gid": group},
            "args": [*asked["Entrypoint"], *(command or asked["Cmd"])],
            "env": [*asked["Env"], *(f"{name}={value}" for name, value in environment.items())],
            "cwd": asked["WorkingDir"],
            "capabilities": {},
            "noNewPrivileges": True,
        },
        "root": {"path": str(root), "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            *scratch,
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            *folders,
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")]},
    }
