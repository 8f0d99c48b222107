"""The id of a request: the client's own where it is a plain one."""

from __future__ import annotations

import httpx
import pytest

from serving.models import Models
from tests.serving.running import within


def get(models: Models, path: str, *, headers: dict[str, bytes] | None = None) -> httpx.Response:
    answer = within(
        models,
        lambda client: client.get(path, headers=[(name.encode(), value) for name, value in (headers or {}).items()]),
    )
    assert isinstance(answer, httpx.Response)
    return answer


def test_a_sane_request_id_is_echoed_once(digits_models: Models) -> None:
    for path in ("/livez", "/nowhere"):
        answer = get(digits_models, path, headers={"x-request-id": b"run-7:row.3_a"})
        assert answer.headers.get_list("x-request-id") == ["run-7:row.3_a"]


@pytest.mark.parametrize("given", ["", "a b", "a" * 129, 'x"}', "é", "a\tb"])
def test_an_odd_request_id_is_replaced(digits_models: Models, given: str) -> None:
    answer = get(digits_models, "/livez", headers={"x-request-id": given.encode()})
    made = answer.headers["x-request-id"]
    assert made != given
    assert made.isalnum()


def test_request_ids_of_the_service_s_own_never_repeat(digits_models: Models) -> None:
    made = [get(digits_models, "/livez").headers["x-request-id"] for _ in range(20)]
    assert len(set(made)) == 20
