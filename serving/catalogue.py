"""From folders to encoders by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from serving.errors import SetupError
from vaefeat.bundle import Bundle, load_bundle
from vaefeat.encoder import OnnxEncoder

__all__ = ["load_encoders"]


def load_encoders(bundles: Iterable[Path], *, device: str, threads: int | None) -> dict[str, OnnxEncoder]:
    """Load bundles and open their encoders, by name.

    Parameters
    ----------
    bundles : iterable of Path
        Folders of bundles.
    device, threads
        As for :class:`vaefeat.encoder.OnnxEncoder`.

    Raises
    ------
    SetupError
        Two bundles with one name: a request could not say which it means.
    BundleError, DeviceError
        From the encoder.
    """
    verified: dict[str, Bundle] = {}
    for folder in bundles:
        bundle = load_bundle(folder)
        if other := verified.get(bundle.name):
            raise SetupError(
                f"got two bundles named {bundle.name!r}, {other.path} and {folder}; a request chooses by name, "
                "so export one of them under another name, or serve them on two ports"
            )
        verified[bundle.name] = bundle
    return {name: OnnxEncoder(bundle, device=device, threads=threads) for name, bundle in verified.items()}
