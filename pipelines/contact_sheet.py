"""Rows to label at a glance: a picture of numbered images, and a page that takes the labels in."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, select_autoescape
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vaefeat.drawing import INK, sheet

__all__ = ["draw_sheet", "write_page"]

#: Of an image on the sheet, in pixels: small ones are enlarged by a whole number, large ones made smaller.
_SIDE, _CAPTION, _GAP = 112, 16, 10
_COLUMNS = 10
_CAPTION_SIZE = 12
#: Of an image in the page, at most.
_LARGEST = 256
#: Digits of a table's values.
_DIGITS = 4


def draw_sheet(rows: NDArray[Any], ids: Sequence[str], *, low: float, high: float) -> bytes:
    """Draw images (n, C, H, W), black at `low` and white at `high`, each with its number and id, as PNG."""
    columns = min(_COLUMNS, len(rows))
    n_lines = -(-len(rows) // columns)
    width, height = _SIDE + _GAP, _SIDE + _CAPTION + _GAP
    canvas = Image.new("RGB", (columns * width + _GAP, n_lines * height + _GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_CAPTION_SIZE)
    for index, (row, name) in enumerate(zip(rows, ids, strict=True)):
        x, y = _GAP + (index % columns) * width, _GAP + (index // columns) * height
        image = _fitted(_picture(row, low, high))
        canvas.paste(image, (x + (_SIDE - image.width) // 2, y + (_SIDE - image.height) // 2))
        draw.text((x, y + _SIDE + 2), _shortened(f"{index + 1}: {name}", font), fill=INK, font=font)
    return _png(canvas)


def write_page(
    rows: NDArray[Any],
    ids: Sequence[str],
    *,
    columns: Sequence[str],
    low: float,
    high: float,
    classes: Sequence[str],
    title: str,
    file_name: str,
) -> str:
    """Give a self-contained page of rows, in which labels can be typed and saved as the CSV file.

    Parameters
    ----------
    rows : ndarray of shape (n, C, H, W) or (n, F)
    ids : sequence of str
    columns : sequence of str
        Names of the values of a row that is no image.
    low, high : float
        Black and white of images.
    classes : sequence of str
        Labels there are, to choose from.
    title : str
    file_name : str
        Under which the labels are saved.

    Returns
    -------
    str
        HTML.
    """
    pictures, values = [], []
    if rows.ndim == 4:
        pictures = [base64.b64encode(_png(_reduced(_picture(row, low, high)))).decode() for row in rows]
    else:
        values = [[f"{value:.{_DIGITS}g}" for value in row] for row in rows]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["html.j2", "j2"])
    )
    return environment.get_template("contact_sheet.html.j2").render(
        title=title, ids=ids, pictures=pictures, values=values, columns=columns, classes=classes, file_name=file_name
    )


def _picture(row: NDArray[Any], low: float, high: float) -> Image.Image:
    unit = sheet(row[None], columns=1, low=low, high=high)
    return Image.fromarray((255 * unit).round().astype(np.uint8))


def _fitted(image: Image.Image) -> Image.Image:
    """Fill the place of an image on the sheet; pixels stay squares."""
    if max(image.size) > _SIDE:
        image.thumbnail((_SIDE, _SIDE))
        return image
    scale = _SIDE // max(image.size)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _reduced(image: Image.Image) -> Image.Image:
    if max(image.size) > _LARGEST:
        image.thumbnail((_LARGEST, _LARGEST))
    return image


def _shortened(text: str, font: Any) -> str:
    """Cut the middle out of a caption that is wider than its image: what differs is at the ends."""
    if font.getlength(text) <= _SIDE:
        return text
    kept = next(
        n for n in range(len(text), 0, -1) if font.getlength(text[: n - n // 2] + "…" + text[-(n // 2) :]) <= _SIDE
    )
    return text[: kept - kept // 2] + "…" + text[-(kept // 2) :]


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return file.getvalue()
