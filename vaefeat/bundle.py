"""The bundle: one folder that holds a trained encoder, or a pipeline around one, and all that is known about it.

==========================  =======================================================================================
``bundle.json``             the manifest: schema version, name, SHA-256 and size of every other file, the bundle's
                            digest, input, outputs, configuration, data fingerprint, figures, versions, parity
``encoder.onnx``            rows -> mean, logvar, hidden, of a classifier also probability (float32); preprocessing
                            inside, any batch size
``pipeline.onnx``           of a whole pipeline, in place of all encoder's files: rows -> label, probabilities
``decoder.onnx``            latents -> rows in the units of the training rows (float32); not where the encoder was
                            fine-tuned away from it
``weights.safetensors``     the torch weights, to fine-tune
``head.safetensors``        of a classifier: the weights of its last layer
``reference.safetensors``   some rows with their means, and the means' distribution, or with their labels and
                            probabilities: what a server checks itself by
``README.md``, ``*.png``    model card and pictures, written by the code
==========================  =======================================================================================

This module is the only reader and writer. There is no pickle anywhere, and a folder may hold other files (checkpoints,
reports): what the manifest does not list is never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any, Self

from vaefeat.atomic import exchange_files, replace_file
from vaefeat.errors import BundleError, InputError
from vaefeat.input_spec import InputSpec

__all__ = ["MAX_NAME_LENGTH", "SCHEMA_VERSION", "Bundle", "Manifest", "load_bundle"]

SCHEMA_VERSION = 5
#: What bundles of less still are: readers from before there were names of columns and means of pipelines, pipelines,
#: tables, or classes, understand them, and their digests stay.
_WITHOUT_NAMES, _WITHOUT_PIPELINE, _WITHOUT_TABLE, _WITHOUT_CLASSES = 4, 3, 2, 1
MANIFEST_FILE = "bundle.json"
MAX_NAME_LENGTH = 64
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME_LENGTH - 1}}}")
_MAX_MANIFEST_BYTES = 16 * 2**20
#: What JSON holds under each key; whoever reads the values relies on it.
_FORMS = {
    "input": dict,
    "outputs": dict,
    "latent_dim": int,
    "active_units": list,
    "objective": str,
    "model": dict,
    "train": dict,
    "data": dict,
    "metrics": dict,
    "parity": dict,
    "versions": dict,
    "classes": list,
    "pipeline": dict,
}
#: What there is only in some bundles.
_OPTIONAL = {"classes", "pipeline"}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``bundle.json`` says about the encoder, apart from files and digest.

    Parameters
    ----------
    name : str
        Letters, digits, ``.``, ``_`` and ``-``, at most 64; the model's name in the service.
    input : InputSpec
        The rows it takes.
    outputs : dict of str to int
        Width of each output of the encoder: ``mean``, ``logvar``, ``hidden``, of a classifier also ``probability``.
    latent_dim : int
        Number of latent variables.
    active_units : tuple of int
        Latent variables whose mean varies over the data (variance over 0.01; Burda et al. 2015, section 5).
    objective : str
        What was maximised, a name of :data:`vaefeat.model.objectives.OBJECTIVES`.
    model, train : dict
        The configurations, as :meth:`ModelConfig.to_dict` and :meth:`TrainConfig.to_dict` give them.
    data : dict
        ``fingerprint`` and ``n_rows`` of the rows it was trained on.
    metrics : dict
        Held-out figures in nats per row: ``elbo``, ``log_likelihood``, ``kl``; ``epochs``.
    parity : dict
        Largest difference between the ONNX graph and the torch model on real rows, and the latents' scale.
    versions : dict
        Versions of the libraries that trained and exported it.
    classes : tuple of str, int, float or bool
        What a classifier tells apart, in the order of its probabilities; empty where it is none.
    pipeline : dict, optional
        Of a whole pipeline: ``encoder`` (name, digest and output of what it begins with, which all but `name`,
        `outputs` and `classes` describe), ``steps`` (name and class of what follows) and ``parity`` with scikit-learn.
        Its one output is ``probabilities``, besides labels; with ``means``, the width of the encoder's, the graph has
        these, too, for a service to watch.
    """

    name: str
    input: InputSpec
    outputs: dict[str, int]
    latent_dim: int
    active_units: tuple[int, ...]
    objective: str
    model: dict[str, Any]
    train: dict[str, Any]
    data: dict[str, Any]
    metrics: dict[str, Any]
    parity: dict[str, Any]
    versions: dict[str, str]
    classes: tuple[str | int | float | bool, ...] = ()
    pipeline: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        units_exist = all(isinstance(unit, int) and 0 <= unit < self.latent_dim for unit in self.active_units)
        if (self.pipeline is None and self.outputs.get("mean") != self.latent_dim) or not units_exist:
            raise BundleError(
                f"got outputs {self.outputs} and active units {self.active_units} for {self.latent_dim} latent "
                "variables, wanted a mean of that width and units among them"
            )
        quantization = self.parity.get("quantization")
        if "quantization" in self.parity and (
            not isinstance(quantization, dict) or quantization.get("format") not in {"int8", "float16"}
        ):
            raise BundleError(
                f"got an encoder quantized in the way of {quantization!r:.100}, wanted int8 or float16; a newer "
                "version of vaefeat may know it"
            )
        plain = all(isinstance(name, str | int | float) for name in self.classes)
        expected = self.outputs.get("probability", 0)
        if self.pipeline is not None:
            expected = self.outputs.get("probabilities", 0) if self.outputs.keys() == {"probabilities"} else 0
        if not plain or expected != len(self.classes) or (self.pipeline is not None and not self.classes):
            raise BundleError(
                f"got outputs {self.outputs} and {len(self.classes)} classes, wanted a name, text or number, for each "
                "probability"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; classes and pipeline only where there are some."""
        values = {**asdict(self), "input": self.input.to_dict(), "active_units": list(self.active_units)}
        values["classes"] = list(self.classes)
        return {key: value for key, value in values.items() if value or key not in _OPTIONAL}

    @property
    def graph_file(self) -> str:
        """Name of the file that takes rows."""
        return "encoder.onnx" if self.pipeline is None else "pipeline.onnx"

    @property
    def gives_means(self) -> bool:
        """Whether its graph gives posterior means: of pipelines only those exported with their reference."""
        return self.pipeline is None or "means" in self.pipeline

    @property
    def decodes(self) -> bool:
        """Whether the decoder belongs to the encoder: not after fine-tuning that left it behind (``elbo_weight=0``)."""
        run = self.data.get("finetuning")
        return self.pipeline is None and (run is None or run["config"]["elbo_weight"] > 0)

    @property
    def precision(self) -> str:
        """Of the encoder's arithmetic: ``float32``, or what :func:`vaefeat.quantization.quantize` made of it."""
        return str(self.parity["quantization"]["format"]) if "quantization" in self.parity else "float32"

    @property
    def schema_version(self) -> int:
        """Of the form that it is written in: the oldest that has all it says."""
        if self.input.names is not None or (self.pipeline is not None and self.gives_means):
            return SCHEMA_VERSION
        if self.pipeline is not None:
            return _WITHOUT_NAMES
        if self.input.table is not None:
            return _WITHOUT_PIPELINE
        return _WITHOUT_TABLE if self.classes else _WITHOUT_CLASSES

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`'s JSON form; raises BundleError on keys that are missing or unknown."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise BundleError(f"got a {MANIFEST_FILE} with unknown keys {unknown}, wanted only {sorted(known)}")
        if missing := sorted(known - values.keys() - _OPTIONAL):
            raise BundleError(f"got a {MANIFEST_FILE} without {missing}; export the bundle again")
        for key, form in _FORMS.items():
            if key in values and not isinstance(values[key], form):
                raise BundleError(f"got a {MANIFEST_FILE} with {key} of the wrong form, wanted a {form.__name__}")
        try:
            return cls(
                **{
                    **values,
                    "input": InputSpec.from_dict(values["input"]),
                    "active_units": tuple(values["active_units"]),
                    "classes": tuple(values.get("classes", ())),
                }
            )
        except (TypeError, KeyError, ValueError) as error:
            raise BundleError(f"got a {MANIFEST_FILE} with a value of the wrong form: {error}") from error


@dataclass(frozen=True, kw_only=True, repr=False)
class Bundle:
    """A trained encoder with its manifest; on disk (after :func:`load_bundle`) or in memory (after training).

    Attributes
    ----------
    manifest : Manifest
    files : dict of str to dict
        ``sha256`` and ``bytes`` of every file.
    digest : str
        ``sha256:`` and the hash of the manifest with all file hashes: two bundles with one digest are the same.
    path : Path or None
        The folder, None while the bundle is only in memory.
    """

    manifest: Manifest
    files: dict[str, dict[str, Any]]
    digest: str
    path: Path | None = None
    _contents: dict[str, bytes] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else f"in {str(self.path)!r}"
        return f"Bundle({self.name!r}, {self.manifest.input}, {self.digest[:19]}, {where})"

    @classmethod
    def of(cls, manifest: Manifest, contents: Mapping[str, bytes]) -> Self:
        """Make a bundle in memory from its manifest and the bytes of its files."""
        files = {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            for name, content in sorted(contents.items())
        }
        return cls(manifest=manifest, files=files, digest=_digest(manifest, files), _contents=dict(contents))

    @property
    def name(self) -> str:
        """Name of the encoder."""
        return self.manifest.name

    def read(self, name: str) -> bytes:
        """Bytes of one file, checked against its hash at the moment of reading.

        Raises
        ------
        BundleError
            The bundle has no such file, or it was changed on the disk.
        """
        if name not in self.files:
            raise BundleError(f"got no {name} in bundle {self.name!r}, it holds {sorted(self.files)}")
        if name in self._contents:
            return self._contents[name]
        assert self.path is not None  # a bundle without contents comes from load_bundle
        content = _read(self.path, name, limit=self.files[name]["bytes"])
        if hashlib.sha256(content).hexdigest() != self.files[name]["sha256"]:
            raise _changed(self.path / name)
        return content

    def refuse_decoding(self) -> None:
        """Raise InputError where the decoder knows nothing of what the encoder now says (:attr:`Manifest.decodes`)."""
        if self.manifest.pipeline is not None:
            raise InputError(
                f"got bundle {self.name!r}, a whole pipeline, which has no decoder; take the bundle of the "
                "encoder that it was made with"
            )
        if not self.manifest.decodes:
            raise InputError(
                f"got bundle {self.name!r}, a classifier that was fine-tuned with elbo_weight=0: its decoder is still "
                "that of the pretrained encoder, and rows and bounds from both together would be wrong; take the "
                "pretrained bundle, or fine-tune with elbo_weight above 0"
            )

    def save(self, path: str | PathLike[str]) -> Bundle:
        """Write the bundle to a folder, the manifest last, and load it back verified.

        A file that cannot be written leaves a bundle that was there before as it was.

        Parameters
        ----------
        path : path-like
            Made when missing. Other files in it are left alone.

        Raises
        ------
        BundleError
            The folder cannot be written, for instance because the disk is full.
        """
        folder = Path(path)
        staged = {name: self.read(name) for name in self.files}
        staged[MANIFEST_FILE] = _manifest_bytes(self.manifest, self.files, self.digest)
        staging = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder))
            # Everything is on the disk before the first name changes, so that a full disk spoils nothing.
            for name, content in staged.items():
                replace_file(staging / name, content)
            exchange_files(staging, folder, list(staged))
        except OSError as error:
            raise BundleError(
                f"could not write bundle {self.name!r} to {folder}: {error.strerror or error}; "
                "free some space or choose another folder; what was there before is unchanged"
            ) from error
        finally:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
        return load_bundle(folder)


def load_bundle(path: str | PathLike[str]) -> Bundle:
    """Read a bundle's manifest and verify every file against it.

    Parameters
    ----------
    path : path-like
        The folder that holds ``bundle.json``.

    Returns
    -------
    Bundle

    Raises
    ------
    BundleError
        No bundle there, a newer schema, unknown keys, a file missing or changed, or a manifest that was edited.
    """
    if not isinstance(path, str | PathLike):
        raise BundleError(f"got a {type(path).__name__}, wanted the path of a bundle's folder, or a Bundle")
    folder = Path(path)
    with _reading(folder / MANIFEST_FILE):
        is_bundle = (folder / MANIFEST_FILE).is_file()
    if not is_bundle and folder.suffix == ".onnx" and folder.is_file():
        raise BundleError(
            f"got {folder}, wanted the folder of a bundle: that is the file alone; give vaefeat.export_pipeline a "
            f"folder's name, such as {folder.with_suffix('').name!r}, without .onnx"
        )
    if not is_bundle:
        raise BundleError(
            f"got {folder}, wanted the folder of a bundle; it has no {MANIFEST_FILE}. "
            "Make one with vaefeat.pretrain(rows, out=folder)"
        )
    content = _read(folder, MANIFEST_FILE, limit=_MAX_MANIFEST_BYTES)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"got a {MANIFEST_FILE} in {folder} that is not JSON: {error}; export it again") from error
    if not isinstance(values, dict):
        raise BundleError(f"got a {MANIFEST_FILE} in {folder} that holds no object; export it again")
    _check_schema(values.pop("schema_version", None), folder)
    digest, files = values.pop("digest", None), values.pop("files", None)
    manifest = Manifest.from_dict(values)
    files = _checked_files(files, folder, graph=manifest.graph_file)
    if digest != _digest(manifest, files):
        raise _changed(folder / MANIFEST_FILE)
    for name, entry in files.items():
        _verify(folder / name, entry)
    return Bundle(manifest=manifest, files=files, digest=digest, path=folder)


def check_name(name: str) -> None:
    """Raise InputError unless `name` can name a bundle: it becomes a file name and part of a URL."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(
            f"got the bundle name {name!r}, wanted 1 to {MAX_NAME_LENGTH} letters, digits, '.', '_' or '-', not "
            "starting with a dot or dash; choose one with name="
        )


def _check_schema(version: object, folder: Path) -> None:
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BundleError(
            f"got a bundle of schema {version} in {folder}, wanted at most {SCHEMA_VERSION}; "
            "it was written by a newer vaefeat: upgrade with pip install -U vaefeat"
        )
    if version not in range(_WITHOUT_CLASSES, SCHEMA_VERSION + 1):
        raise BundleError(
            f"got schema {version!r} in {folder / MANIFEST_FILE}, wanted {_WITHOUT_CLASSES} to {SCHEMA_VERSION}"
        )


def _checked_files(files: Any, folder: Path, *, graph: str) -> dict[str, dict[str, Any]]:
    """Refuse anything but plain names with a hash and a size: a name is going to be opened."""
    if not isinstance(files, dict) or graph not in files:
        raise BundleError(f"got a {MANIFEST_FILE} in {folder} that lists no {graph}; export the bundle again")
    for name, entry in files.items():
        plain = _NAME.fullmatch(name) and name != MANIFEST_FILE
        if not (plain and isinstance(entry, dict) and entry.keys() == {"sha256", "bytes"}):
            raise BundleError(f"got a {MANIFEST_FILE} in {folder} with the file entry {name!r}: {entry!r}, not ours")
        if not (isinstance(entry["bytes"], int) and entry["bytes"] >= 0 and isinstance(entry["sha256"], str)):
            raise BundleError(f"got a {MANIFEST_FILE} in {folder} with a bad size or hash for {name!r}")
    return files


def _verify(path: Path, entry: Mapping[str, Any]) -> None:
    with _reading(path):
        if not path.is_file():
            raise BundleError(f"got no file {path}, which the bundle lists; copy the whole folder again")
        if path.stat().st_size != entry["bytes"]:
            raise _changed(path)
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise _changed(path)


def _read(folder: Path, name: str, *, limit: int) -> bytes:
    with _reading(folder / name), (folder / name).open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise _changed(folder / name)
    return content


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BundleError(f"could not read {path}: {error.strerror or error}") from error


def _changed(path: Path) -> BundleError:
    return BundleError(
        f"got {path} with contents that do not match the bundle's hashes; it is corrupt or was edited: "
        "copy the whole folder again, or export it again"
    )


def _manifest_bytes(manifest: Manifest, files: Mapping[str, Any], digest: str) -> bytes:
    values = {"schema_version": manifest.schema_version, "digest": digest, **manifest.to_dict(), "files": files}
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()


def _digest(manifest: Manifest, files: Mapping[str, Any]) -> str:
    values = {"schema_version": manifest.schema_version, **manifest.to_dict(), "files": files}
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
