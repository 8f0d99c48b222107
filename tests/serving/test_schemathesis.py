"""schemathesis sends what GET /openapi.json allows and what it does not; every answer must be as documented there."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from serving.codec import encode_npy
from serving.media import NPY, RAW
from serving.models import Models
from serving.openapi import describe_api
from serving.served_model import Place
from tests.serving.running import Running, running
from vaefeat import VAEFeatures, export_pipeline

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
    validate(case, served)


@pytest.fixture(scope="module")
def predicting(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("bundles") / "pipeline"
    pipe = make_pipeline(VAEFeatures(digits_bundle), LogisticRegression(max_iter=2000))
    export_pipeline(pipe.fit(digits_rows, load_digits().target.astype(str)), folder, X=digits_rows, name="digits")
    with running(Models.from_bundles([folder], place=Place(device="cpu", threads=1))) as service:
        yield service


@schema.include(path_regex="/v1/(predict|models)|/v2/models").parametrize()
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_service_of_a_pipeline_answers_as_its_description_says(
    case: schemathesis.Case[Any], predicting: Running
) -> None:
    validate(case, predicting)


def validate(case: schemathesis.Case[Any], served: Running) -> None:
    # No schema can say which shape the rows of a model have.
    unjust = [schemathesis.checks.positive_data_acceptance]
    case.call_and_validate(base_url=served.url, excluded_checks=unjust)
    assert served.service.ready
