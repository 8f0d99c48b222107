"""What is sent to servers, and what they must answer: files that load clients read.

All servers get the same rows. Ours must answer with the bits that the encoder gives on this machine; others join rows
of several requests to batches of any size, in which ONNX Runtime may round differently; so may ours on a GPU.
"""

from __future__ import annotations

import io
import json
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks.expected import Form
from vaefeat import ModelConfig, OnnxEncoder, TrainConfig, pretrain
from vaefeat.image_decoding import decode_image

__all__ = ["SHAPES", "Payload", "Payloads", "Workload", "bundle_and_rows"]

_PEERS = Path(__file__).parent / "serve_peers"
_SIDE = 28
_OTHERS_TOLERANCE = 1e-4

Kind = Literal["raw", "oip_binary", "json", "jpeg", "png"]


@dataclass(frozen=True)
class Workload:
    """Rows in a request, requests in flight, and the form of both directions."""

    rows: int
    in_flight: int
    kind: Kind = "raw"

    @property
    def name(self) -> str:
        """Such as ``64x8``, or ``json_64x8``."""
        shape = f"{self.rows}x{self.in_flight}"
        return shape if self.kind == "raw" else f"{self.kind}_{shape}"


SHAPES = (Workload(1, 1), Workload(1, 32), Workload(8, 8), Workload(64, 8), Workload(512, 8))


@dataclass(frozen=True, kw_only=True)
class Payload:
    """A request, and the features that belong to it.

    Attributes
    ----------
    path : str
        Of the address.
    headers : tuple of str
        Lines.
    body : Path
    expected : tuple of str
        An npy file of the right features, or one for each version as ``DIGEST=FILE``.
    form : {"binary", "json"}
        Of the answer.
    tolerance : float
    """

    path: str
    headers: tuple[str, ...]
    body: Path
    expected: tuple[str, ...]
    form: Form = "binary"
    tolerance: float = 0.0


def bundle_and_rows(folder: Path, *, hidden_dims: tuple[int, ...] = (512, 512)) -> NDArray[np.uint8]:
    """Pretrain the encoder that is served, and give the rows that are sent.

    One epoch is enough: what is measured does not depend on what the weights are.

    Parameters
    ----------
    folder : Path
        The bundle's.
    hidden_dims : tuple of int

    Returns
    -------
    ndarray of shape (512, 1, 28, 28), uint8
        scikit-learn's digits at the size of MNIST's.
    """
    small = (load_digits().images * (255 / 16)).astype(np.uint8)[:, None]
    index = np.arange(_SIDE) * 8 // _SIDE
    rows = np.ascontiguousarray(small[:, :, index][:, :, :, index])
    pretrain(
        rows,
        model=ModelConfig(latent_dim=64, network="mlp", hidden_dims=hidden_dims, normalization=False),
        train=TrainConfig(max_epochs=1),
        out=folder,
        progress=False,
    )
    return rows[:512]


class Payloads:
    """Writes the files.

    Parameters
    ----------
    bundle : Path
    rows : ndarray of shape (n, C, H, W)
    folder : Path
        For the files.
    triton : Path, optional
        A Python that has Triton's client; without it there is no body of its own making.
    device : {"cpu", "cuda"}
        Where our servers compute.
    """

    def __init__(
        self, bundle: Path, rows: NDArray[np.uint8], folder: Path, *, triton: Path | None = None, device: str = "cpu"
    ) -> None:
        self._tolerance = 0.0 if device == "cpu" else _OTHERS_TOLERANCE
        self._encoder = OnnxEncoder(bundle, device="cpu", threads=1)
        self._rows, self._folder, self._triton = rows, folder, triton
        features = self._encoder.embed(rows)
        # What is compared must tell rows apart, or a mixed-up answer would pass.
        apart = np.abs(features[:, None] - features[None]).max(axis=2) + np.eye(len(rows))
        if apart.min() <= 10 * _OTHERS_TOLERANCE:
            raise ValueError(f"got rows whose features differ by {apart.min():.2g}, wanted ten times the tolerance")
        self.infer_path = f"/v2/models/{self._encoder.name}/infer"

    def of_ours(self, workload: Workload) -> Payload:
        """Write a request for our service."""
        rows, kind = self._rows[: workload.rows], workload.kind
        if kind == "raw":
            return self._payload(workload, "/v1/embed", rows.tobytes(), ["Content-Type: application/octet-stream"])
        if kind == "json":
            return self._json(workload, tolerance=self._tolerance)
        if kind == "oip_binary":
            return self._triton_s(workload, rows)
        images = encoded(rows, kind)
        decoded = [decode_image(image, name=kind, shape=(1, _SIDE, _SIDE)) for image in images]
        body, length = _images_body(images)
        headers = [f"Inference-Header-Content-Length: {length}"]
        return self._payload(workload, self.infer_path, body, headers, rows=np.stack(decoded))

    def of_peers(self, workload: Workload) -> Payload:
        """Write a request for servers that take rows as they are, and give means as they are."""
        rows = self._rows[: workload.rows].tobytes()
        headers = ["Content-Type: application/octet-stream"]
        return self._payload(workload, "/embed", rows, headers, tolerance=_OTHERS_TOLERANCE)

    def of_mlserver(self, workload: Workload) -> Payload:
        """Write the same JSON that ours gets."""
        return self._json(workload, tolerance=_OTHERS_TOLERANCE)

    def image_folder(self, kind: Literal["jpeg", "png"], n: int) -> Path:
        """Write images as files, for the decoder alone."""
        folder = self._folder / kind
        folder.mkdir(exist_ok=True)
        for number, image in enumerate(encoded(self._rows[:n], kind)):
            (folder / f"{number:04}").write_bytes(image)
        return folder

    def _json(self, workload: Workload, *, tolerance: float) -> Payload:
        rows = self._rows[: workload.rows].reshape(workload.rows, -1)
        tensor = {"name": "rows", "shape": list(rows.shape), "datatype": "UINT8", "data": rows.tolist()}
        # With an id of our own an answer is the same every time; MLServer makes up another one otherwise.
        body = json.dumps({"id": "1", "inputs": [tensor]}, separators=(",", ":")).encode()
        headers = ["Content-Type: application/json"]
        return self._payload(workload, self.infer_path, body, headers, form="json", tolerance=tolerance)

    def _triton_s(self, workload: Workload, rows: NDArray[np.uint8]) -> Payload:
        if self._triton is None or not self._triton.exists():
            raise FileNotFoundError("no Triton client here; make .venv-peers/.ready")
        sample, body = self._folder / f"{workload.name}.npy", self._folder / f"{workload.name}.triton"
        np.save(sample, rows)
        command = [str(self._triton), str(_PEERS / "triton_body.py"), str(sample), str(body)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - a script of ours
        headers = [f"Inference-Header-Content-Length: {done.stdout.strip()}"]
        return self._payload(workload, self.infer_path, body.read_bytes(), headers)

    def _payload(
        self,
        workload: Workload,
        path: str,
        body: bytes,
        headers: Sequence[str],
        *,
        rows: NDArray[np.uint8] | None = None,
        form: Form = "binary",
        tolerance: float | None = None,
    ) -> Payload:
        tolerance = self._tolerance if tolerance is None else tolerance
        place = self._folder / f"{workload.name}{'' if tolerance else '.ours'}"
        body_file, expected = place.with_name(f"{place.name}.body"), place.with_name(f"{place.name}.expected.npy")
        body_file.write_bytes(body)
        np.save(expected, self._encoder.embed(self._rows[: workload.rows] if rows is None else rows))
        return Payload(
            path=path,
            headers=tuple(headers),
            body=body_file,
            expected=(str(expected),),
            form=form,
            tolerance=tolerance,
        )


def encoded(rows: NDArray[np.uint8], kind: str) -> list[bytes]:
    """Write grey rows (n, 1, H, W) as images."""
    files = []
    for row in rows:
        buffer = io.BytesIO()
        Image.fromarray(row[0]).save(buffer, format=kind.upper())
        files.append(buffer.getvalue())
    return files


def _images_body(images: Sequence[bytes]) -> tuple[bytes, int]:
    """Write a request of the Open Inference Protocol with encoded images, and the length of its JSON."""
    blob = b"".join(struct.pack("<I", len(image)) + image for image in images)
    tensor: Mapping[str, Any] = {
        "name": "images",
        "shape": [len(images)],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": len(blob)},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + blob, len(head)
