"""Files that are larger inside than outside: refused by what their headers say, before a pixel is decoded."""

from __future__ import annotations

import io
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from serving.images import PixelRoom
from serving.models import Models
from serving.settings import Limits
from tests.serving.hostile import ROWS, assert_sound, told
from tests.serving.running import Running, running
from vaefeat.encoder import OnnxEncoder

LIMITS = Limits(max_image_pixels=4_000_000, max_rows=2000, compute_timeout_s=20.0)


@pytest.fixture(scope="module")
def service(digits_models: Models) -> Iterator[Running]:
    with running(digits_models, limits=LIMITS) as service:
        yield service


@pytest.fixture(scope="module")
def wanted(digits_bundle: Path) -> NDArray[np.float32]:
    return OnnxEncoder(digits_bundle, device="cpu").embed(ROWS)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes, pixels: bytes = b"") -> bytes:
    """Make a grey PNG, whose pixels need not be as many as its header says."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def saved(form: str, *sizes: tuple[int, int], **options: Any) -> bytes:
    # Equal frames are one picture to WebP.
    first, *others = [Image.new("L", size, 90 * number) for number, size in enumerate(sizes)]
    file = io.BytesIO()
    first.save(file, form, **({"save_all": True, "append_images": others} if others else {}), **options)
    return file.getvalue()


def resized_header(content: bytes, *, marker: bytes, offset: int, form: str, size: tuple[int, int]) -> bytes:
    """Let a file's header say another size."""
    changed = bytearray(content)
    struct.pack_into(form, changed, content.index(marker) + offset, *size)
    return bytes(changed)


def many_scans(n_scans: int) -> bytes:
    """Make a progressive JPEG that goes over its pixels again and again."""
    content = saved("JPEG", (64, 64), progressive=True)
    start = content.rindex(b"\xff\xda")
    return content[:start] + content[start:-2] * n_scans + content[-2:]


ITXT = b"a\x00\x01\x00\x00\x00" + zlib.compress(bytes(2**26), 9)
VP8X = b"VP8X" + struct.pack("<I", 10) + b"\x00\x00\x00\x00" + b"\xfe\x3f\x00" * 2
FILES: dict[str, bytes] = {
    "png of 60000 by 60000": png(60_000, 60_000),
    "png of 60000 by 60000 and pixels": png(60_000, 60_000, pixels=zlib.compress(bytes(2**26), 9)),
    "png of 1 by 2147483647": png(1, 2**31 - 1),
    "png of nothing": png(0, 0),
    "png just over the limit": png(2001, 2000, pixels=zlib.compress(bytes(2002 * 2000), 9)),
    "png without its pixels": png(2000, 2000),
    "png with a large text": png(8, 8, chunk(b"iTXt", ITXT), pixels=zlib.compress(bytes(72))),
    "png with a large compressed text": png(8, 8, chunk(b"zTXt", b"a\x00\x00" + ITXT[6:]), pixels=b""),
    "png with a large profile": png(8, 8, chunk(b"iCCP", b"a\x00\x00" + ITXT[6:]), pixels=b""),
    "png with many chunks": png(8, 8, chunk(b"teXt", b"a\x00b") * 50_000, pixels=b""),
    "png with a length over its end": png(8, 8)[:33] + b"\xff\xff\xff\xffIDAT",
    "animated png": saved("PNG", (8, 8), (8, 8)),
    "gif": saved("GIF", (8, 8), (9, 9)),
    "animated webp": saved("WEBP", (8, 8), (8, 8)),
    "webp of 16383 by 16383": b"RIFF" + struct.pack("<I", 22) + b"WEBP" + VP8X,
    "jpeg of 65500 by 65500": resized_header(
        saved("JPEG", (8, 8)), marker=b"\xff\xc0", offset=5, form=">HH", size=(65_500, 65_500)
    ),
    "jpeg of many scans": many_scans(2000),
    "tiff": saved("TIFF", (8, 8)),
    "bmp": saved("BMP", (8, 8)),
    "ico": saved("ICO", (16, 16)),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "half a jpeg": saved("JPEG", (64, 64))[:300],
    "half a webp": b"RIFF\x00\x00\x00\x00WEBPVP8 ",
}


@pytest.mark.parametrize("case", FILES)
def test_a_hostile_file_is_refused_and_takes_no_memory(
    service: Running, wanted: NDArray[np.float32], case: str
) -> None:
    before = psutil.Process().memory_info().rss
    answer = httpx.post(f"{service.url}/v1/embed", content=FILES[case], headers={"content-type": "image/png"})
    grown = psutil.Process().memory_info().rss - before
    assert (answer.status_code, answer.json()["error"]["type"]) == (422, "invalid_rows"), answer.text
    message = told("/v1/embed", answer)
    assert "item 0" in message
    assert "object at 0x" not in message
    assert grown < 80 * 2**20
    assert_sound(service, wanted)


def test_hostile_files_again_and_again_leave_memory_flat(service: Running, wanted: NDArray[np.float32]) -> None:
    process = psutil.Process()

    def send_all(times: int) -> int:
        with httpx.Client(base_url=service.url, timeout=60) as client:
            for _ in range(times):
                for content in FILES.values():
                    client.post("/v1/embed", content=content, headers={"content-type": "image/webp"})
        return int(process.memory_info().rss)

    send_all(2)
    before = send_all(1)
    assert send_all(8) - before < 24 * 2**20
    assert_sound(service, wanted)


def test_an_image_at_the_limit_is_embedded(service: Running) -> None:
    at_limit = png(2000, 2000, pixels=zlib.compress(bytes(2001 * 2000), 9))
    answer = httpx.post(f"{service.url}/v1/embed", content=at_limit, headers={"content-type": "image/png"})
    assert answer.json()["shape"] == [1, 8]


def test_one_bomb_among_images_fails_alone(service: Running, wanted: NDArray[np.float32]) -> None:
    files = []
    for index, row in enumerate(ROWS):
        file = io.BytesIO()
        Image.fromarray(row[0]).save(file, "PNG")
        files.append(("file", (str(index), file.getvalue(), "image/png")))
    files.insert(1, ("file", ("bomb", FILES["png just over the limit"], "image/png")))
    told = httpx.post(f"{service.url}/v1/embed", files=files).json()
    assert [error["index"] for error in told["errors"]] == [1]
    assert "2001 by 2000 pixels" in told["errors"][0]["message"]
    np.testing.assert_array_equal(np.array(told["embeddings"], np.float32)[[0, 2, 3]], wanted)


def test_many_large_images_stop_at_the_request_s_deadline(service: Running, wanted: NDArray[np.float32]) -> None:
    large = png(2000, 2000, pixels=zlib.compress(bytes(2001 * 2000), 9))
    files = [("file", (str(index), large, "image/png")) for index in range(600)]
    began = time.monotonic()
    answer = httpx.post(f"{service.url}/v1/embed?timeout_ms=300", files=files, timeout=30)
    assert (answer.status_code, answer.json()["error"]["type"]) == (504, "deadline_exceeded")
    assert time.monotonic() - began < 25
    assert_sound(service, wanted)


def test_more_rows_than_there_is_room_for_are_refused_before_they_are_made(digits_models: Models) -> None:
    tiny = [("file", (str(index), b"", "image/png")) for index in range(100)]
    with running(digits_models, limits=Limits(max_queued_bytes=64 * 99)) as service:
        refused = httpx.post(f"{service.url}/v1/embed", files=tiny)
        taken = httpx.post(f"{service.url}/v1/embed", files=tiny[:99])
    assert (refused.status_code, refused.json()["error"]["type"]) == (413, "too_large")
    assert taken.status_code == 422  # each is looked at, and is no image


def test_pixel_room_lets_large_images_in_one_after_the_other_and_small_ones_always() -> None:
    room = PixelRoom(4_000_000)
    present, most = 0, 0
    lock = threading.Lock()

    def hold(n_pixels: int) -> None:
        nonlocal present, most
        with room.take(n_pixels):
            with lock:
                present += n_pixels
                most = max(most, present)
            time.sleep(0.01)
            with lock:
                present -= n_pixels

    threads = [threading.Thread(target=hold, args=(n,)) for n in [4_000_000, 1_500_000, 2_500_000, 1_100_000] * 5]
    for thread in threads:
        thread.start()
    with room.take(1000):
        pass
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert most <= 4_000_000
