"""What is served: models by name, each in one or more versions, loaded, proved and then put in place.

A version is a bundle's digest. A new one is loaded beside the old, warmed up on batches of every usual size and
compared with the reference in its bundle; only then does it take the name over, in one assignment. The one before
stays addressable, and can be chosen again. What fails on the way leaves everything as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import ModelError, RequestError, SetupError
from serving.watching.drift import Drift
from vaefeat.bundle import Bundle, load_bundle
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import BundleError, DeviceError
from vaefeat.input_spec import InputSpec
from vaefeat.predictor import LABEL, PROBABILITIES, OnnxPredictor
from vaefeat.reference import TOLERANCE, PredictionReference, Reference, load_reference

__all__ = ["Models", "Place", "ServedModel", "find_bundles"]

_log = logging.getLogger("serving")
#: Of one name, the newest first: the one that is served and the one before.
_KEPT = 2


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where models are computed.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
    threads : int, optional
        Processors to use; all that there are when None.
    max_batch_rows : int
        Most rows in a batch.
    """

    device: str = "auto"
    threads: int | None = None
    max_batch_rows: int = 256


class ServedModel:
    """One version of a model: an encoder or a classifier, with what is said of it.

    Parameters
    ----------
    bundle : Bundle
    place : Place

    Attributes
    ----------
    name, version, digest : str
        The version is the digest's hexadecimal part.
    input : InputSpec
    outputs : mapping of str to int
        Widths of what it gives as numbers.
    classes : tuple
        Empty where it is no classifier.
    names : tuple of str
        All that it can be asked for: its outputs, and of a classifier ``label`` and ``probabilities``.
    reference : Reference, PredictionReference or None
    provider, precision : str
        ONNX Runtime's execution provider, and what it computes in.
    """

    def __init__(self, bundle: Bundle, *, place: Place) -> None:
        # A batch is computed by one thread: lanes share out the processors, and wait for each other nowhere.
        opens = OnnxPredictor if bundle.manifest.classes else OnnxEncoder
        self._opened = opens(bundle, device=place.device, threads=1)
        self.name, self.digest = bundle.name, bundle.digest
        self.version = bundle.digest.removeprefix("sha256:")
        self.input: InputSpec = self._opened.input
        self.outputs: Mapping[str, int] = self._opened.outputs
        self.classes = self._opened.classes
        predicted = (LABEL, PROBABILITIES) if self.classes else ()
        self.names = (*(name for name in self.outputs if name not in predicted), *predicted)
        self.latent_dim, self.active_units = self._opened.latent_dim, self._opened.active_units
        self.provider, self.device = self._opened.provider, self._opened.device
        self.precision = self._opened.precision
        self.reference: Reference | PredictionReference | None = load_reference(bundle)
        #: How far what is served has moved from what it was trained on.
        self.drift = None
        if isinstance(self.reference, Reference):
            self.drift = Drift(mean=self.reference.mean, variance=self.reference.variance)
        self._max_batch_rows = place.max_batch_rows

    def compute(self, rows: NDArray[Any], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Compute some of `names` of checked rows; labels are places in `classes`."""
        return self._opened.compute(rows, outputs)

    def observe(self, outputs: Sequence[str], features: Sequence[NDArray[Any]]) -> None:
        """Take note of what was served; in a lane's thread."""
        if self.drift is not None and "mean" in outputs:
            self.drift.update(features[outputs.index("mean")])

    def warm_up(self) -> None:
        """Compute batches of every usual size, with every output, and compare with the reference.

        Raises
        ------
        ModelError
            The device computes something else than where the bundle was exported, or nothing that is finite.
        """
        n_rows = 1
        while True:
            rows = np.zeros((n_rows, *self.input.shape), self.input.dtype)
            for output, features in zip(self.outputs, self.compute(rows, list(self.outputs)), strict=True):
                if self.reference is None and not np.isfinite(features).all():
                    raise ModelError(f"model {self.name!r} computed NaN or infinity for rows of zeros ({output})")
            if n_rows >= self._max_batch_rows:
                break
            n_rows = min(2 * n_rows, self._max_batch_rows)
        self.prove()

    def prove(self) -> None:
        """Compute the reference's rows and compare, as :meth:`warm_up` does in the end."""
        if self.reference is None:
            return
        found = self.reference.difference(*self.compute(self.reference.rows, self.reference.outputs))
        if not found <= TOLERANCE:
            what = "means" if isinstance(self.reference, Reference) else "labels or probabilities"
            unit = " standard deviations" if isinstance(self.reference, Reference) else ""
            raise ModelError(
                f"model {self.name!r} computes {what} on {self.provider} that differ by {found:.3g}{unit} from those "
                f"in its bundle, wanted at most {TOLERANCE:g}; is the device sound? Try --device cpu"
            )

    def __repr__(self) -> str:
        return f"ServedModel({self.name!r}, {self.version[:12]})"


class Models:
    """The models that are served, by name and version.

    Parameters
    ----------
    sources : mapping of str to Path
        The folder that each name is loaded from, now and again.
    place : Place

    Attributes
    ----------
    generation : int
        Counts changes, for whoever keeps something made from this.
    """

    def __init__(self, sources: Mapping[str, Path], *, place: Place) -> None:
        self._place = place
        self._sources = dict(sources)
        #: Newest first. Lists are replaced, never changed, so that a lookup needs no lock.
        self._versions: dict[str, tuple[ServedModel, ...]] = {}
        self.generation = 0

    @classmethod
    def from_bundles(cls, folders: Iterable[Path], *, place: Place) -> Models:
        """Load bundles, one version of each.

        Raises
        ------
        SetupError, BundleError, DeviceError
        """
        models = cls(find_bundles(folders), place=place)
        for name, folder in models._sources.items():
            models._versions[name] = (ServedModel(load_bundle(folder), place=place),)
        return models

    @property
    def names(self) -> list[str]:
        """Names that are served."""
        return list(self._versions)

    @property
    def held(self) -> list[ServedModel]:
        """Every version that can be asked for."""
        return [model for versions in self._versions.values() for model in versions]

    @property
    def current(self) -> list[ServedModel]:
        """The version of each name that a request without a version gets."""
        return [versions[0] for versions in self._versions.values()]

    def versions(self, name: str) -> tuple[str, ...]:
        """Give the versions of a name, the newest first.

        Raises
        ------
        RequestError
            404.
        """
        return tuple(model.version for model in self._of(name))

    def find(self, name: str | None, version: str | None = None) -> ServedModel:
        """Find the model that a request means.

        Parameters
        ----------
        name : str, optional
            May be left out where one model is served.
        version : str, optional
            A digest with or without ``sha256:``; the newest when None or empty.

        Raises
        ------
        RequestError
            404 for what is not served, 400 where a name is needed.
        """
        if name is None:
            if len(self._versions) != 1:
                raise RequestError(
                    400, "invalid_parameter", f"got no model, wanted one of {self._served}; name it with ?model="
                )
            versions = next(iter(self._versions.values()))
        else:
            versions = self._of(name)
        if not version:
            return versions[0]
        wanted = version.removeprefix("sha256:")
        for model in versions:
            if model.version == wanted:
                return model
        held = ", ".join(model.version for model in versions)
        raise RequestError(
            404, "unknown_model", f"got version {version[:80]!r} of model {versions[0].name!r}, wanted one of {held}"
        )

    def available(self) -> list[str]:
        """Names that can be loaded: those that are served, and those that were unloaded."""
        return sorted(self._sources)

    def stamps(self) -> dict[str, tuple[int, ...]]:
        """Tell one content of each served folder's manifest from the next, without reading it."""
        found: dict[str, tuple[int, ...]] = {}
        for name in self._versions:
            try:
                status = (self._sources[name] / "bundle.json").stat()
            except OSError:
                continue  # it is just being exchanged, or has gone; there is nothing to load
            found[name] = (status.st_ino, status.st_size, status.st_mtime_ns)
        return found

    def load(self, name: str) -> ServedModel:
        """Load a name's folder again and serve what is there now; takes a while, and belongs into a thread.

        Returns
        -------
        ServedModel
            The version that is served now, which is the old one if the folder has not changed.

        Raises
        ------
        RequestError
            404: no such name.
        ModelError
            The bundle is bad or computes something else; what was served goes on being served.
        """
        if name not in self._sources:
            raise RequestError(404, "unknown_model", f"got model={name[:100]!r}, wanted one of {self.available()}")
        folder = self._sources[name]
        try:
            bundle = load_bundle(folder)
            if bundle.name != name:
                raise ModelError(f"got a bundle named {bundle.name!r} in {folder}, wanted {name!r}; export it again")
            before = self._versions.get(name, ())
            if before and before[0].digest == bundle.digest:
                return before[0]
            # A version that is still held need not be opened twice.
            held = next((model for model in before if model.digest == bundle.digest), None)
            model = held or ServedModel(bundle, place=self._place)
            model.warm_up()
        except (BundleError, DeviceError) as error:
            raise ModelError(f"model {name!r} was not loaded, and what was served still is: {error}") from error
        others = tuple(other for other in self._versions.get(name, ()) if other is not model)
        self._versions = {**self._versions, name: (model, *others)[:_KEPT]}
        self.generation += 1
        _log.info("serving %s in version %s", name, model.version[:12])
        return model

    def choose(self, name: str, version: str) -> ServedModel:
        """Serve one of the versions that are held, which is how to roll back.

        Raises
        ------
        RequestError
            404 for a name or version that is not held.
        """
        model = self.find(name, version)
        model.prove()
        others = tuple(other for other in self._of(name) if other is not model)
        self._versions = {**self._versions, name: (model, *others)}
        self.generation += 1
        _log.warning("serving %s in version %s, as asked", name, model.version[:12])
        return model

    def unload(self, name: str) -> None:
        """Serve a name no more.

        Raises
        ------
        RequestError
            404 for an unknown name, 409 for the last one.
        """
        self._of(name)
        if len(self._versions) == 1:
            raise RequestError(409, "conflict", f"model {name!r} is the only one that is served; stop the service")
        self._versions = {other: kept for other, kept in self._versions.items() if other != name}
        self.generation += 1

    def warm_up(self, *, told: Callable[[str], None]) -> None:
        """Warm up and prove every model; `told` hears what is under way.

        Raises
        ------
        ModelError, DeviceError
        """
        for model in self.current:
            told(model.name)
            model.warm_up()

    def _of(self, name: str) -> tuple[ServedModel, ...]:
        versions = self._versions.get(name)
        if versions is None:
            raise RequestError(404, "unknown_model", f"got model={name[:100]!r}, wanted one of {self._served}")
        return versions

    @property
    def _served(self) -> str:
        return ", ".join(map(repr, self._versions))


def find_bundles(folders: Iterable[Path]) -> dict[str, Path]:
    """Name folders: each is a bundle, or holds bundles in its sub-folders.

    Raises
    ------
    SetupError
        Two bundles with one name: a request could not say which it means; or a folder without any.
    BundleError
    """
    found: dict[str, Path] = {}
    for folder in folders:
        inner = [] if (folder / "bundle.json").is_file() or not folder.is_dir() else sorted(folder.iterdir())
        bundles = [place for place in inner if (place / "bundle.json").is_file()] or [folder]
        for place in bundles:
            name = load_bundle(place).name
            if other := found.get(name):
                raise SetupError(
                    f"got two bundles named {name!r}, {other} and {place}; a request chooses by name, "
                    "so export one of them under another name, or serve them on two ports"
                )
            found[name] = place
    return found
