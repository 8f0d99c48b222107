from __future__ import annotations

from typing import Any

import httpx

from serving.app import Application
from serving.models import Models
from serving.openapi import describe_api
from serving.service import Service
from serving.settings import Limits
from tests.serving.running import within


def operations() -> dict[str, dict[str, Any]]:
    paths = describe_api()["paths"]
    return {f"{method.upper()} {place}": told for place, methods in paths.items() for method, told in methods.items()}


def test_openapi_json_describes_every_route_and_no_other(digits_models: Models) -> None:
    async def talk(client: httpx.AsyncClient) -> httpx.Response:
        return await client.get("/openapi.json")

    assert within(digits_models, talk).json() == describe_api()
    routes = Application(Service(digits_models, Limits(), lanes=1)).routes()
    assert sorted(operations()) == sorted(routes)
    assert len(routes) == len(set(routes))


def test_openapi_refers_only_to_schemas_that_are_there_and_to_all_of_them() -> None:
    document = describe_api()
    found: set[str] = set()

    def look(value: object) -> None:
        if isinstance(value, dict):
            if isinstance(reference := value.get("$ref"), str):
                found.add(reference.removeprefix("#/components/schemas/"))
            for inner in value.values():
                look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)

    look(document)
    assert found == document["components"]["schemas"].keys()
