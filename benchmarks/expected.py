"""Which answers of a server are right."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Expected", "Form"]

Form = Literal["binary", "json"]
_DIGEST = re.compile(rb"\r\nx-vaefeat-digest: *([^\r]+)", re.IGNORECASE)
#: Bodies that were found right and are compared with the next ones byte by byte.
_MOST_REMEMBERED = 64


class Expected:
    """Which answers are right.

    Parameters
    ----------
    features : mapping of str to ndarray of shape (n, d), float32
        By the digest that an answer carries; under the empty string for servers that send none.
    form : {"binary", "json"}
        Binary: the answer ends in the features' bytes, whatever comes before. JSON: of our own service, or of the Open
        Inference Protocol.
    tolerance : float
        Largest absolute difference; 0 asks for the same bits.

    Attributes
    ----------
    wrong : dict of str to int
        Answers that were not right, by what was wrong.
    """

    def __init__(self, features: Mapping[str, NDArray[np.float32]], *, form: Form, tolerance: float = 0.0) -> None:
        self._features = {label.encode(): wanted for label, wanted in features.items()}
        self._form, self._tolerance = form, tolerance
        self._right: dict[bytes, list[bytes]] = {label: [] for label in self._features}
        self.wrong: Counter[str] = Counter()

    def includes(self, head: bytes, body: bytes) -> bool:
        """Tell whether an answer is right."""
        label = b""
        if b"" not in self._features:
            found = _DIGEST.search(head)
            label = found[1] if found else b"none"
            if label not in self._features:
                self.wrong[f"unknown digest {label.decode('latin-1')[:20]}"] += 1
                return False
        remembered = self._right[label]
        if body in remembered:
            return True
        if not self._is_right(body, self._features[label]):
            self.wrong[self._described(label, body)] += 1
            return False
        if len(remembered) < _MOST_REMEMBERED:
            remembered.append(body)
        return True

    def _described(self, label: bytes, body: bytes) -> str:
        """Tell whose features they are instead."""
        said = f"said {label.decode('latin-1')[:20]}" if label else "answer"
        for other, wanted in self._features.items():
            if other != label and self._is_right(body, wanted):
                return f"{said}, was {other.decode('latin-1')[:20]}"
        n_bytes = self._features[label].nbytes
        if self._form == "json" or len(body) < n_bytes:
            return f"{said}, {len(body)} bytes that are no features of ours"
        found = np.frombuffer(body[-n_bytes:], "<f4").reshape(self._features[label].shape)
        off = np.abs(found - self._features[label])
        return f"{said}, {(off.max(axis=1) > 0).sum()} of {len(off)} rows off by up to {float(off.max()):.1e}"

    def _is_right(self, body: bytes, wanted: NDArray[np.float32]) -> bool:
        try:
            found = _from_json(body) if self._form == "json" else np.frombuffer(body[-wanted.nbytes :], "<f4")
            found = found.reshape(wanted.shape)
        except (ValueError, KeyError, IndexError, TypeError):
            return False
        if self._tolerance == 0:
            return found.tobytes() == wanted.tobytes()
        return bool(np.abs(found - wanted).max() <= self._tolerance)


def _from_json(body: bytes) -> NDArray[np.float32]:
    values = json.loads(body)
    return np.asarray(values["embeddings"] if "embeddings" in values else values["outputs"][0]["data"], np.float32)
