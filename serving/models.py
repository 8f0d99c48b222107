"""What is served: models by name, each in one or more versions, loaded, proved and then put in place.

A version is a bundle's digest. A new one is loaded beside the old, warmed up on batches of every usual size and
compared with the reference in its bundle; only then does it take the name over, in one assignment. The one before
stays addressable, and can be chosen again. What fails on the way leaves everything as it was.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from serving.errors import ModelError, RequestError, SetupError
from serving.served_model import Place, ServedModel
from vaefeat.bundle import Bundle, load_bundle
from vaefeat.errors import BundleError, DeviceError
from vaefeat.runtime import Interruption

__all__ = ["Models", "find_bundles"]

_log = logging.getLogger("serving")
#: Of one name, the newest first: the one that is served and the one before.
_KEPT = 2
#: Digits of a version that name it; as many as the log has.
_SHORTEST_VERSION = 12


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
        #: What each folder held when it was last loaded from, which need not be what is served: see :meth:`choose`.
        self._loaded: dict[str, str] = {}
        #: Of whatever is being loaded or warmed up.
        self._interruption = Interruption()
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
            model = ServedModel(load_bundle(folder), place=place)
            models._versions[name], models._loaded[name] = (model,), model.digest
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
            A digest with or without ``sha256:``, or its first digits, 12 or more, where no other version of the name
            begins with them; the newest when None or empty.

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
        found = [model for model in versions if model.version.startswith(wanted)]
        if len(found) == 1 and len(wanted) >= _SHORTEST_VERSION:
            return found[0]
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
            raise RequestError(
                404,
                "unknown_model",
                f"got model={name[:100]!r}, wanted one of {self.available()}; folders are listed when the service "
                "starts: a model that is new needs a restart",
            )
        interruption = self._interruption
        with _told(name):
            return self._serve(name, self._read(name), interruption)

    def reload(self, name: str) -> None:
        """Load a name's folder if it holds another bundle than when it was last loaded; in a thread, as :meth:`load`.

        A name that was unloaded stays so, even while this waited for its turn, and what :meth:`choose` chose is served
        until the folder changes.

        Raises
        ------
        ModelError
            As :meth:`load`.
        """
        if name not in self._versions:
            return
        interruption = self._interruption
        with _told(name):
            bundle = self._read(name)
            if bundle.digest != self._loaded[name]:
                self._serve(name, bundle, interruption)

    def _read(self, name: str) -> Bundle:
        folder = self._sources[name]
        bundle = load_bundle(folder)
        if bundle.name != name:
            raise ModelError(f"got a bundle named {bundle.name!r} in {folder}, wanted {name!r}; export it again")
        return bundle

    def _serve(self, name: str, bundle: Bundle, interruption: Interruption) -> ServedModel:
        """Put a bundle in place, once it is warmed up and proved."""
        before = self._versions.get(name, ())
        if before and before[0].digest == bundle.digest:
            self._loaded[name] = bundle.digest
            return before[0]
        # A version that is still held need not be opened twice.
        held = next((model for model in before if model.digest == bundle.digest), None)
        model = held or ServedModel(bundle, place=self._place)
        model.warm_up(interruption)
        others = tuple(other for other in before if other is not model)
        self._versions = {**self._versions, name: (model, *others)[:_KEPT]}
        self._loaded[name] = bundle.digest
        self.generation += 1
        _log.warning("serving %s in version %s", name, model.version[:_SHORTEST_VERSION])
        return model

    def choose(self, name: str, version: str) -> ServedModel:
        """Serve one of the versions that are held, which is how to roll back.

        It is served until the folder holds another bundle than now, or :meth:`load` is called; a new process begins
        with what the folder holds.

        Raises
        ------
        RequestError
            404 for a name or version that is not held.
        """
        model = self.find(name, version)
        if model is self._of(name)[0]:
            return model
        model.prove()
        others = tuple(other for other in self._of(name) if other is not model)
        self._versions = {**self._versions, name: (model, *others)}
        self.generation += 1
        _log.warning("serving %s in version %s, as asked", name, model.version[:_SHORTEST_VERSION])
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
        interruption = self._interruption
        for model in self.current:
            told(model.name)
            model.warm_up(interruption)
        # What was said of a model before may have changed: its CUDA graphs, for instance, could not be captured.
        self.generation += 1

    def stop(self) -> None:
        """End warm-ups that are under way, and those of loads that have begun; from any thread."""
        before, self._interruption = self._interruption, Interruption()
        before.interrupt()

    def _of(self, name: str) -> tuple[ServedModel, ...]:
        versions = self._versions.get(name)
        if versions is None:
            raise RequestError(404, "unknown_model", f"got model={name[:100]!r}, wanted one of {self._served}")
        return versions

    @property
    def _served(self) -> str:
        return ", ".join(map(repr, self._versions))


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Say of a bundle that cannot be served which model it was meant for."""
    try:
        yield
    except (BundleError, DeviceError) as error:
        raise ModelError(f"model {name!r} was not loaded, and what was served still is: {error}") from error


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
