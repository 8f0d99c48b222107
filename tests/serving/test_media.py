from __future__ import annotations

import pytest

from serving.errors import RequestError
from serving.media import JSON, NPY, RAW, answer_type, body_type


@pytest.mark.parametrize(
    ("accept", "default", "chosen"),
    [
        (None, NPY, NPY),
        ("", JSON, JSON),
        ("*/*", NPY, NPY),
        ("*/*", JSON, JSON),
        ("application/*", JSON, JSON),
        ("application/json", NPY, JSON),
        ("Application/X-NPY", JSON, NPY),
        ("application/json;q=0.5, application/x-npy", JSON, NPY),
        ("application/json, */*;q=0.1", NPY, JSON),
        ("text/html, application/xhtml+xml, application/xml;q=0.9, */*;q=0.8", NPY, NPY),
        ("application/x-npy;q=0, */*", NPY, JSON),
        ("application/json; charset=utf-8; q=0.9, application/x-npy;q=0.8", NPY, JSON),
        ("application/json;q=nonsense, application/x-npy;q=0.1", JSON, NPY),
    ],
)
def test_answer_type_follows_accept_and_prefers_the_request_s_own(accept: str, default: str, chosen: str) -> None:
    assert answer_type(accept, default=default) == chosen


def test_answer_type_of_raw_bytes_is_given_only_where_it_is_asked_for_or_came() -> None:
    assert answer_type("application/octet-stream", default=JSON) == RAW
    assert answer_type("*/*", default=RAW) == RAW


@pytest.mark.parametrize("accept", ["text/html", "application/json;q=0, application/x-npy;q=0", "image/*", "*/*;q=0"])
def test_answer_type_where_nothing_is_acceptable_is_406(accept: str) -> None:
    with pytest.raises(RequestError) as caught:
        answer_type(accept, default=NPY)
    assert caught.value.status == 406


@pytest.mark.parametrize("given", ["application/json", "Application/JSON; charset=utf-8", " application/json "])
def test_body_type_ignores_case_and_parameters(given: str) -> None:
    assert body_type({b"content-type": given.encode()}) == JSON


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"content-type": b"application/x-www-form-urlencoded"},
        {b"content-type": b"image/gif"},
        {b"content-type": b"\xff/\x00"},
        {b"content-type": NPY.encode(), b"content-encoding": b"gzip"},
    ],
)
def test_body_type_of_anything_else_is_415(headers: dict[bytes, bytes]) -> None:
    with pytest.raises(RequestError) as caught:
        body_type(headers)
    assert caught.value.status == 415
    assert "wanted" in caught.value.message
