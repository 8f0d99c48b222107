from __future__ import annotations

import gzip
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import CodecError, RequestError
from serving.protocols.content_coding import asked_coding, compress, inflate

CODINGS = st.sampled_from(["gzip", "deflate"])


@given(st.binary(max_size=2000), CODINGS)
def test_inflate_of_what_python_compressed_gives_it_back(body: bytes, coding: str) -> None:
    sent = gzip.compress(body, mtime=0) if coding == "gzip" else zlib.compress(body)
    assert inflate(sent, encoding=f" {coding.upper()}", limit=len(body)) == body


@given(st.binary(max_size=2000), CODINGS)
def test_compress_is_read_back_by_python(body: bytes, coding: str) -> None:
    told = compress(body, coding=coding)
    assert (gzip.decompress(told) if coding == "gzip" else zlib.decompress(told)) == body


@given(st.binary(min_size=1, max_size=200), CODINGS, st.data())
def test_inflate_of_a_body_cut_off_anywhere_raises_codec_error(body: bytes, coding: str, data: st.DataObject) -> None:
    sent = compress(body, coding=coding)
    with pytest.raises(CodecError):
        inflate(sent[: data.draw(st.integers(0, len(sent) - 1))], encoding=coding, limit=1000)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("more", [b"x", gzip.compress(b"more", mtime=0), zlib.compress(b"more")])
def test_inflate_of_a_body_with_something_behind_raises_codec_error(coding: str, more: bytes) -> None:
    with pytest.raises(CodecError, match="after the end"):
        inflate(compress(b"body", coding=coding) + more, encoding=coding, limit=1000)


@given(st.binary(max_size=300), CODINGS)
def test_inflate_of_any_bytes_raises_nothing_but_errors_of_ours(body: bytes, coding: str) -> None:
    try:
        inflate(body, encoding=coding, limit=1000)
    except (CodecError, RequestError):
        pass


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_inflate_of_a_bomb_is_refused_with_flat_memory(coding: str) -> None:
    bomb = compress(bytes(2**28), coding=coding)
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="more than 1048576 bytes when inflated") as refused:
            inflate(bomb, encoding=coding, limit=2**20)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
    assert refused.value.status == 413


def test_inflate_of_one_byte_too_many_is_refused_and_of_just_enough_is_not() -> None:
    sent = compress(bytes(100), coding="gzip")
    assert inflate(sent, encoding="gzip", limit=100) == bytes(100)
    with pytest.raises(RequestError):
        inflate(sent, encoding="gzip", limit=99)


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "gzip, deflate", "x" * 1000])
def test_inflate_of_other_or_several_codings_is_answered_415(encoding: str) -> None:
    with pytest.raises(RequestError, match="wanted gzip or deflate, once") as refused:
        inflate(b"", encoding=encoding, limit=10)
    assert refused.value.status == 415
    assert len(refused.value.message) < 200


@pytest.mark.parametrize("encoding", ["", "identity", " Identity "])
def test_inflate_of_a_plain_body_leaves_it(encoding: str) -> None:
    body = b"anything"
    assert inflate(body, encoding=encoding, limit=1) is body


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [("gzip", "gzip"), (" Deflate", "deflate"), ("", None), ("*", None), ("br", None), ("gzip, deflate, br", None)],
)
def test_asked_coding_is_the_one_that_is_named_alone(accepted: str, coding: str | None) -> None:
    assert asked_coding(accepted) == coding
