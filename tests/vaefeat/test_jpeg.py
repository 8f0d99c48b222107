"""Plain JPEG files against Pillow, which reads them by another way."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from vaefeat.errors import InputError
from vaefeat.image_decoding import UNREADABLE, decode_image, decode_pixels
from vaefeat.jpeg import plain_jpeg


def jpeg(image: Image.Image, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **settings)
    return file.getvalue()


def drawn(rng: np.random.Generator, *, mode: str = "RGB") -> Image.Image:
    """Give an image of any small size, of noise or smooth."""
    height, width = rng.integers(1, 41, 2)
    coarse = rng.integers(
        0, 256, (max(1, height // rng.integers(1, 8)), max(1, width // rng.integers(1, 8)), 3), np.uint8
    )
    return Image.fromarray(coarse).resize((int(width), int(height))).convert(mode)


def by_pillow(encoded: bytes) -> np.ndarray[Any, Any] | None:
    try:
        with Image.open(io.BytesIO(encoded), formats=("JPEG",)) as image:
            return np.asarray(image.convert("L" if image.mode == "L" else "RGB"))
    except UNREADABLE:
        return None


@pytest.mark.parametrize("seed", range(200))
def test_pixels_are_those_of_pillow(seed: int) -> None:
    rng = np.random.default_rng(seed)
    settings = {
        "quality": int(rng.integers(1, 101)),
        "subsampling": int(rng.integers(0, 3)),
        "progressive": bool(rng.integers(2)),
        "optimize": bool(rng.integers(2)),
        "restart_marker_blocks": int(rng.integers(0, 3)),
    }
    encoded = jpeg(drawn(rng, mode="L" if seed % 4 == 0 else "RGB"), **settings)
    plain = plain_jpeg(encoded)
    assert plain is not None
    np.testing.assert_array_equal(plain.pixels(), by_pillow(encoded))
    np.testing.assert_array_equal(decode_pixels("a", encoded, None), by_pillow(encoded))


def test_damaged_files_are_read_as_pillow_reads_them_or_not_at_all() -> None:
    chosen, rng = random.Random(0), np.random.default_rng(0)
    outcomes = {"same": 0, "left to Pillow": 0, "refused by both": 0}
    for _ in range(3000):
        encoded = bytearray(jpeg(drawn(rng), quality=chosen.randint(1, 100), progressive=chosen.random() < 0.3))
        if chosen.random() < 0.3:
            del encoded[chosen.randrange(4, len(encoded)) :]
        else:
            for _ in range(chosen.randint(1, 3)):
                encoded[chosen.randrange(2, len(encoded))] = chosen.randrange(256)
        plain = plain_jpeg(bytes(encoded))
        if plain is not None and plain.height * plain.width > 10**6:
            continue
        pixels, wanted = plain and plain.pixels(), by_pillow(bytes(encoded))
        if pixels is not None:
            np.testing.assert_array_equal(pixels, wanted)
        outcomes["same" if pixels is not None else "refused by both" if wanted is None else "left to Pillow"] += 1
    assert min(outcomes.values()) > 50, outcomes


def test_what_is_not_plain_is_left_to_pillow() -> None:
    image = drawn(np.random.default_rng(1))
    exif = Image.Exif()
    exif[0x0112] = 6
    two = io.BytesIO()
    image.save(two, "MPO", save_all=True, append_images=[image])
    odd = bytearray(jpeg(image, subsampling=2))
    place = odd.index(b"\xff\xc0") + 11  # how the first component is sampled
    odd[place] = 0x14
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>"
    others = {
        "exif": jpeg(image, exif=exif),
        "xmp": jpeg(image, extra=b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp),
        "two pictures": two.getvalue(),
        "cmyk": jpeg(image.convert("CMYK")),
        "rgb": jpeg(image, keep_rgb=True),
        "sampled in a way without a name": bytes(odd),
        "png": b"\x89PNG\r\n\x1a\n",
        "no header": b"\xff\xd8\xff",
        "nothing": b"",
    }
    assert {name: plain_jpeg(encoded) for name, encoded in others.items()} == dict.fromkeys(others)
    np.testing.assert_array_equal(decode_pixels("odd", bytes(odd), None), by_pillow(bytes(odd)))


def test_file_with_a_scan_that_is_cut_short_has_no_pixels() -> None:
    encoded = jpeg(Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)))
    plain = plain_jpeg(encoded[: len(encoded) // 2])
    assert plain is not None
    assert plain.pixels() is None
    with pytest.raises(InputError, match="truncated"):
        decode_image(encoded[: len(encoded) // 2], name="a photo", shape=(3, 64, 64))


def test_resized_pixels_are_those_of_pillow(tmp_path: Path) -> None:
    image = drawn(np.random.default_rng(3)).resize((37, 23))
    (tmp_path / "a.jpg").write_bytes(encoded := jpeg(image))
    with Image.open(io.BytesIO(encoded)) as opened:
        wanted = np.asarray(opened.resize((16, 20), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(decode_pixels("a", encoded, (20, 16)), wanted)
    np.testing.assert_array_equal(decode_pixels("a", tmp_path / "a.jpg", (20, 16)), wanted)


def test_pillow_decodes_with_libjpeg_turbo_too() -> None:
    # Of other libraries' pixels nothing is known, and rows of one encoder must not depend on who decodes them.
    assert features.check_feature("libjpeg_turbo")
