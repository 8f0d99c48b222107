"""What a server says of a model, read from ``GET /v1/models``, and how a client comes to one of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import quote

import httpx

from vaefeat.errors import InputError, RemoteError
from vaefeat.input_spec import InputSpec
from vaefeat.remote_exchange import Ask, Steps, Terms, answered

__all__ = ["MODELS_ASK", "Card", "pinning", "read_cards"]

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
#: numpy.save puts the data of an array of numbers at byte 128 or before.
_NPY_HEADER_BYTES = 128


@dataclass(frozen=True, kw_only=True)
class Card:
    """One model of a server, as it was when it was asked.

    Parameters
    ----------
    name, digest : str
        Of the bundle.
    input : InputSpec
    outputs : dict of str to int
        Width of each output.
    classes : tuple of str, int, float or bool
    latent_dim, active_units : int
    provider : str
        ONNX Runtime's execution provider.
    versions : tuple of str, or None
        Hexadecimal digests of all bundles that the server holds under this name; None where it tells none, and cannot
        be asked for one of them.
    max_rows, max_body_bytes : int
        Limits of one request.
    """

    name: str
    digest: str
    input: InputSpec
    outputs: dict[str, int]
    classes: tuple[str | int | float | bool, ...]
    latent_dim: int
    active_units: int
    provider: str
    versions: tuple[str, ...] | None
    max_rows: int
    max_body_bytes: int

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Self:
        """Read one entry of the answer's ``data``."""
        return cls(
            name=str(fields["id"]),
            digest=str(fields["digest"]),
            input=InputSpec.from_dict(fields["input"]),
            outputs={str(name): int(width) for name, width in fields["outputs"].items()},
            # Servers from before there were classifiers say nothing of classes.
            classes=tuple(fields.get("classes", ())),
            latent_dim=int(fields["latent_dim"]),
            active_units=int(fields["active_units"]),
            provider=str(fields["provider"]),
            versions=tuple(map(str, fields["versions"])) if "versions" in fields else None,
            max_rows=int(fields["limits"]["max_rows"]),
            max_body_bytes=int(fields["limits"]["max_body_bytes"]),
        )

    def rows_per_request(self, batch_size: int, *, url: str) -> int:
        """Cut to the limits.

        Raises
        ------
        InputError
            Not even one row fits.
        """
        fitting = (self.max_body_bytes - _NPY_HEADER_BYTES) // self.input.row_bytes
        if fitting < 1:
            raise InputError(
                f"one row of {self.name!r} takes {self.input.row_bytes} bytes, and {url} accepts bodies of "
                f"{self.max_body_bytes}; start the server with a larger --max-body-bytes"
            )
        return max(1, min(batch_size, self.max_rows, fitting))

    @property
    def query(self) -> dict[str, str]:
        """What names this model in an address, and this very bundle where the server can tell several apart."""
        version = {} if self.versions is None else {"version": _hex(self.digest)}
        return {"model": self.name, **version}


MODELS_ASK = Ask(method="GET", path="/v1/models")


def read_cards(answer: httpx.Response, *, url: str) -> dict[str, Card]:
    """Read the answer to :data:`MODELS_ASK`, by name; or to the same about one model.

    Raises
    ------
    RemoteError
        It is not a vaefeat server's.
    """
    try:
        told = answer.json()
        return {(card := Card.of(fields)).name: card for fields in told.get("data", [told])}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RemoteError(
            f"{url} answered {answer.url.path} in a form that is not a vaefeat server's ({error!r}); check the URL"
        ) from error


def pinning(terms: Terms, *, model: str | None, digest: str | None) -> Steps[Card]:
    """Find the one bundle that an encoder is going to stand for.

    Parameters
    ----------
    terms : Terms
    model : str, optional
        Needed where there are several.
    digest : str, optional
        The only bundle to accept; whichever is newest when None.

    Raises
    ------
    InputError
        A model that is not served or not named where there are several, or a digest that is none.
    RemoteError
        The server cannot be reached, is none of ours, or does not hold the bundle.
    """
    if digest is not None and not _DIGEST.fullmatch(digest):
        raise InputError(f"got digest={digest!r}, wanted sha256: and 64 hexadecimal digits, as `digest` of an encoder")
    answer = yield from answered(MODELS_ASK, terms, first_contact=True)
    card = _chosen(read_cards(answer, url=terms.url), model, url=terms.url)
    if digest in {None, card.digest}:
        return card
    assert digest is not None
    served = card.digest
    if _hex(digest) in (card.versions or ()):
        # An older bundle may take other rows and tell other classes, so its own card is asked for.
        path, version = f"/v1/models/{quote(card.name, safe='')}", {"version": _hex(digest)}
        answer = yield from answered(Ask(method="GET", path=path, params=version), terms)
        card = _chosen(read_cards(answer, url=terms.url), card.name, url=terms.url)
        if card.digest == digest:
            return card
    raise RemoteError(
        f"{terms.url} serves another bundle as {card.name!r}: got digest {served}, wanted {digest}, which was asked "
        "for; serve that one, or leave out digest= to take what there is"
    )


def _chosen(cards: dict[str, Card], model: str | None, *, url: str) -> Card:
    if model is None and len(cards) != 1:
        raise InputError(f"got no model, wanted one of {sorted(cards)}, which {url} serves: pass model=")
    if model is not None and model not in cards:
        raise InputError(f"got model={model!r}, wanted one of {sorted(cards)}, which {url} serves")
    return cards[model] if model is not None else next(iter(cards.values()))


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")
