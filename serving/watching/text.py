"""Text of clients, made harmless for those who read logs and traces."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str, *, max_length: int = 300) -> str:
    """Cut a text, and put ``?`` for whatever a terminal might obey, forge a line with, or UTF-8 cannot hold.

    Parameters
    ----------
    text : str
    max_length : int
        Characters that are kept; an ellipsis tells that there were more.
    """
    kept = text[:max_length]
    if not kept.isprintable():
        kept = "".join(character if character.isprintable() else "?" for character in kept)
    return kept if len(text) <= max_length else kept + "…"
