"""Everything that vaefeat raises on purpose, and what a caller can do about it.

::

    VaefeatError
    ├── InputError (ValueError)           rows, labels or arguments that cannot be used; the caller's to mend
    │   ├── ConfigError                   an unknown key, an impossible value or combination of settings
    │   └── MissingSplitError             the data have no such split; the rest of them may be fine
    ├── BundleError (ValueError)          a bundle that is missing, corrupt, edited, or of a newer schema
    ├── ExportError (RuntimeError)        the ONNX graph does not compute what the torch model computes
    ├── QuantizationError (RuntimeError)  the encoder in fewer bits gives features that are not good enough
    ├── DeviceError (RuntimeError)        a device was asked for and is not there
    ├── MissingExtraError (ImportError)   an optional dependency is not installed; names the command
    ├── TrainingError (RuntimeError)
    │   ├── NonFiniteLossError            the loss became NaN or infinite; epoch and batch are named
    │   ├── CompileError                  torch.compile was asked for and cannot; names the reason
    │   ├── OutOfMemoryError              names the batch size and one that fits; the checkpoint is kept
    │   ├── CheckpointError               a checkpoint that cannot be written, read, or continued
    │   ├── WorkerLostError               another worker of the run died; a new group of workers can go on
    │   └── TrainingInterrupted           stopped on request, the checkpoint is on disk
    ├── JobError (RuntimeError)           an offline job cannot go on; what it finished is kept
    └── RemoteError (ConnectionError)     the embedding server cannot be reached or answered with a failure

Every message says what was got, what was wanted, and what to do. An :class:`InputError` or :class:`BundleError` is safe
to show to whoever sent the request: it never holds secrets or file contents.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

__all__ = [
    "BundleError",
    "CheckpointError",
    "CompileError",
    "ConfigError",
    "DeviceError",
    "ExportError",
    "InputError",
    "JobError",
    "MissingExtraError",
    "MissingSplitError",
    "NonFiniteLossError",
    "OutOfMemoryError",
    "QuantizationError",
    "RemoteError",
    "TrainingError",
    "TrainingInterrupted",
    "VaefeatError",
    "WorkerLostError",
    "requiring",
]


class VaefeatError(Exception):
    """Base class of all errors that vaefeat raises on purpose."""


class InputError(VaefeatError, ValueError):
    """Rows, labels or arguments that cannot be used."""


class ConfigError(InputError):
    """An unknown setting, an impossible value, or settings that exclude each other."""


class MissingSplitError(InputError):
    """The data come without the split that was asked for."""


class BundleError(VaefeatError, ValueError):
    """A bundle that is missing, incomplete, corrupt, edited, or written by a newer version."""


class ExportError(VaefeatError, RuntimeError):
    """The exported ONNX graph is not what was trained."""


class QuantizationError(VaefeatError, RuntimeError):
    """An encoder in fewer bits whose features differ by more than was allowed."""


class DeviceError(VaefeatError, RuntimeError):
    """A device was asked for by name and is not available."""


class MissingExtraError(VaefeatError, ImportError):
    """An optional dependency is not installed.

    Parameters
    ----------
    what : str
        The feature that needs it, as the subject of a sentence.
    extra : str
        The extra of the ``vaefeat`` distribution that brings it.
    """

    def __init__(self, what: str, *, extra: str) -> None:
        super().__init__(
            f"{what} needs packages that are not installed; install them with: pip install 'vaefeat[{extra}]'"
        )
        self.what, self.extra = what, extra

    def __reduce__(self) -> tuple[Any, ...]:
        # By itself, an exception is unpickled from its message alone; workers send this one to their caller.
        return partial(MissingExtraError, extra=self.extra), (self.what,)


@contextmanager
def requiring(extra: str, *, what: str) -> Iterator[None]:
    """Turn a missing package, imported inside, into the error that names the extra which brings it.

    Parameters
    ----------
    extra : str
        The extra of the ``vaefeat`` distribution.
    what : str
        The feature that needs it, as the subject of a sentence.

    Raises
    ------
    MissingExtraError
        A package that is not ours is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in {"vaefeat", "serving", "pipelines"}:
            raise  # a module of ours that is not there is a defect, not a missing extra
        raise MissingExtraError(what, extra=extra) from error


class TrainingError(VaefeatError, RuntimeError):
    """Training could not go on."""


class NonFiniteLossError(TrainingError):
    """The loss became NaN or infinite."""


class CompileError(TrainingError):
    """A training step cannot be compiled on this machine."""


class OutOfMemoryError(TrainingError):
    """A minibatch does not fit into memory."""


class CheckpointError(TrainingError):
    """A checkpoint that cannot be written, read, or continued from."""


class WorkerLostError(TrainingError):
    """Another worker of a data-parallel run cannot be reached any more."""


class TrainingInterrupted(TrainingError):
    """Training was asked to stop; what was reached is in the checkpoint."""


class JobError(VaefeatError, RuntimeError):
    """An offline job cannot go on; the same command continues from what it finished."""


class RemoteError(VaefeatError, ConnectionError):
    """The embedding server cannot be reached, or it answered with a failure."""
