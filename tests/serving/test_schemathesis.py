"""schemathesis sends what GET /openapi.json allows and what it does not; every answer must be as documented there."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from serving.codec import encode_npy
from serving.media import NPY, RAW
from serving.models import Models
from serving.openapi import describe_api
from tests.serving.running import Running, running

schema = schemathesis.openapi.from_dict(describe_api())


def png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


rows = st.integers(1, 5).map(lambda n: np.zeros((n, 1, 8, 8), np.uint8))
schemathesis.openapi.media_type(NPY, rows.map(encode_npy))
schemathesis.openapi.media_type(RAW, st.binary(max_size=200))
for kind in ("image/png", "image/jpeg", "image/webp"):
    schemathesis.openapi.media_type(kind, rows.map(lambda row: png(row[0, 0])) | st.binary(max_size=100))


@schemathesis.hook
def map_path_parameters(context: object, values: dict[str, str] | None) -> dict[str, str] | None:
    """Name the model that there is in most cases: what lies behind a 404 would never be reached."""
    if values and len(values.get("model", "")) > 1:
        values["model"] = "digits"
    return values


@pytest.fixture(scope="module")
def served(digits_models: Models) -> Iterator[Running]:
    with running(digits_models) as service:
        yield service


@schema.parametrize()
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_service_answers_as_its_description_says(case: schemathesis.Case[Any], served: Running) -> None:
    # No schema can say which shape the rows of a model have.
    unjust = [schemathesis.checks.positive_data_acceptance]
    case.call_and_validate(base_url=served.url, excluded_checks=unjust)
    assert served.service.ready
