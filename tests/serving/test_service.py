"""The service as a whole, in process: bits, versions, health, errors of single items, what is in flight."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from serving.codec import decode_npy, encode_npy, plain
from serving.errors import ModelError
from serving.guard.keys import KeyRing
from serving.images import _BYTES_PER_TASK, part_images
from serving.settings import Limits
from vaefeat.bundle import Bundle, load_bundle
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import DeviceError

NPY = {"content-type": "application/x-npy"}
Talk = Callable[..., Any]


def png(row: NDArray[np.uint8], *, size: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(row[0])
    (image if size is None else image.resize(size)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def wanted(digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    return OnnxEncoder(digits_bundle, device="cpu").embed(digits_rows)


def test_metrics_tell_of_models_that_nobody_has_asked(
    talk: Talk, digits_bundle: Path, variant: Callable[..., Bundle], tmp_path: Path
) -> None:
    variant(name="second").save(tmp_path / "second")

    async def conversation(client: Any) -> str:
        return str((await client.get("/metrics")).text)

    families = text_string_to_metric_families(talk(conversation, digits_bundle, tmp_path / "second"))
    told = {s.labels["model"] for family in families for s in family.samples if s.name == "vaefeat_models_info"}
    assert told == {"digits", "second"}


def test_rows_in_fortran_order_are_put_in_order_in_a_thread_where_they_are_many(
    talk: Talk,
    digits_bundle: Path,
    digits_rows: NDArray[np.uint8],
    wanted: NDArray[np.float32],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[str] = []

    def noted(array: NDArray[Any]) -> NDArray[Any]:
        threads.append(threading.current_thread().name.partition("_")[0])
        return plain(array)

    monkeypatch.setattr("serving.native.plain", noted)

    def npy(rows: NDArray[np.uint8]) -> bytes:
        file = io.BytesIO()
        np.save(file, rows)
        return file.getvalue()

    async def conversation(client: Any) -> None:
        for rows in (digits_rows, np.asfortranarray(digits_rows), np.asfortranarray(digits_rows[:5])):
            answer = await client.post("/v1/embed", content=npy(rows), headers=NPY)
            np.testing.assert_array_equal(decode_npy(answer.content), wanted[: len(rows)])

    talk(conversation, digits_bundle, limits=Limits(inline_bytes=65_536))
    assert threads == ["MainThread", "codec", "MainThread"]


def test_a_row_s_vector_is_the_same_bits_whatever_request_it_came_in(
    talk: Talk, digits_bundle: Path, digits_rows: NDArray[np.uint8], wanted: NDArray[np.float32]
) -> None:
    """Hundreds of requests of random rows, sizes, forms and orders at once, in small batches."""
    chance = random.Random(0)

    async def ask(client: Any, _: int) -> None:
        await asyncio.sleep(chance.random() * 0.3)
        chosen = [chance.randrange(len(digits_rows)) for _ in range(chance.choice([1, 1, 2, 5, 33, 100]))]
        rows = digits_rows[chosen]
        form = chance.choice(["npy", "raw", "json", "oip"])
        if form == "npy":
            answer = await client.post("/v1/embed", content=encode_npy(rows), headers=NPY)
            got = decode_npy(answer.content)
        elif form == "raw":
            headers = {"content-type": "application/octet-stream"}
            answer = await client.post("/v1/embed", content=rows.tobytes(), headers=headers)
            got = np.frombuffer(answer.content, np.float32).reshape(len(rows), -1)
        elif form == "json":
            answer = await client.post("/v1/embed", json={"rows": rows.tolist()})
            got = np.asarray(answer.json()["embeddings"], np.float32)
        else:
            tensor = {"name": "rows", "datatype": "UINT8", "shape": list(rows.shape), "data": rows.ravel().tolist()}
            answer = await client.post("/v2/models/digits/infer", json={"inputs": [tensor]})
            output = answer.json()["outputs"][0]
            got = np.asarray(output["data"], np.float32).reshape(output["shape"])
        assert answer.status_code == 200, answer.text
        assert got.tobytes() == wanted[chosen].tobytes()

    async def conversation(client: Any) -> None:
        await asyncio.gather(*(ask(client, number) for number in range(400)))
        assert client.app.admission.in_flight == client.app.service.room.used == 0

    talk(conversation, digits_bundle, limits=Limits(max_batch_rows=24))


def test_images_through_every_door_are_the_rows_that_they_show(
    talk: Talk, digits_bundle: Path, digits_rows: NDArray[np.uint8], wanted: NDArray[np.float32]
) -> None:
    images = [png(row) for row in digits_rows[:3]]
    uris = ["data:image/png;base64," + base64.b64encode(image).decode() for image in images]

    async def conversation(client: Any) -> list[NDArray[np.float32]]:
        files = [("file", (f"{i}.png", image)) for i, image in enumerate(images)]
        several = await client.post("/v1/embed", files=files, headers={"accept": "application/x-npy"})
        single = await client.post("/v1/embed", content=images[0], headers={"content-type": "image/png"})
        floats = await client.post("/v1/embeddings", json={"model": "digits", "input": uris})
        packed = await client.post("/v1/embeddings", json={"input": uris, "encoding_format": "base64"})
        part = {"type": "image_url", "image_url": {"url": uris[0]}}
        message = await client.post("/v1/embeddings", json={"messages": [{"role": "user", "content": [part]}]})
        objects = await client.post("/v1/embeddings", json={"input": [{"image": uri} for uri in uris]})
        return [
            decode_npy(several.content),
            np.asarray(single.json()["embeddings"], np.float32),
            np.asarray([item["embedding"] for item in floats.json()["data"]], np.float32),
            np.stack([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in packed.json()["data"]]),
            np.asarray([item["embedding"] for item in message.json()["data"]], np.float32),
            np.asarray([item["embedding"] for item in objects.json()["data"]], np.float32),
        ]

    for got in talk(conversation, digits_bundle):
        assert got.tobytes() == wanted[: len(got)].tobytes()


def test_one_bad_image_among_good_ones_fails_alone(
    talk: Talk, digits_bundle: Path, digits_rows: NDArray[np.uint8], wanted: NDArray[np.float32]
) -> None:
    parts = [png(digits_rows[0]), b"nonsense", png(digits_rows[2])]
    files = [("file", (f"{i}.png", part)) for i, part in enumerate(parts)]

    async def conversation(client: Any) -> tuple[Any, Any, Any]:
        told = await client.post("/v1/embed", files=files)
        as_npy = await client.post("/v1/embed", files=files, headers={"accept": "application/x-npy"})
        bad = await client.post("/v1/embed", content=b"nonsense", headers={"content-type": "image/png"})
        return told, as_npy, bad

    told, as_npy, bad = talk(conversation, digits_bundle)
    assert told.status_code == 200
    assert [error["index"] for error in told.json()["errors"]] == [1]
    got = np.asarray(told.json()["embeddings"], np.float32)
    np.testing.assert_array_equal(got[[0, 2]], wanted[[0, 2]])
    assert (as_npy.status_code, bad.status_code) == (422, 422)
    assert "item 1" in as_npy.json()["error"]["message"]


def test_a_new_version_takes_over_while_requests_run_and_none_is_mixed(
    talk: Talk, digits_bundle: Path, variant: Callable[..., Bundle], digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    load_bundle(digits_bundle).save(tmp_path / "digits")
    by_digest = {load_bundle(digits_bundle).digest: OnnxEncoder(digits_bundle).embed(digits_rows[:50])}
    new = variant()
    by_digest[new.digest] = OnnxEncoder(new).embed(digits_rows[:50])
    body = encode_npy(digits_rows[:50])
    seen: list[str] = []

    async def ask(client: Any) -> list[str]:
        own: list[str] = []
        while len(set(seen)) < 2 or seen[-20:].count(seen[-1]) < 20:
            answer = await client.post("/v1/embed", content=body, headers=NPY)
            assert answer.status_code == 200
            digest = answer.headers["x-vaefeat-digest"]
            assert decode_npy(answer.content).tobytes() == by_digest[digest].tobytes()
            seen.append(digest)
            own.append(digest)
        return own

    async def conversation(client: Any) -> tuple[Any, ...]:
        asking = [asyncio.create_task(ask(client)) for _ in range(4)]
        while not seen:  # what is served first is the old one
            await asyncio.sleep(0.01)
        await asyncio.to_thread(new.save, tmp_path / "digits")
        loaded = await client.post("/v2/repository/models/digits/load", content=b"")
        # An answer of the old version may come after one of the new, but to another client alone.
        for own in await asyncio.gather(*asking):
            assert own == sorted(own, key=lambda digest: digest == new.digest), "it went back and forth"
        old = by_digest.keys() - {new.digest}
        pinned = await client.post(f"/v1/embed?version={next(iter(old))[7:]}", content=body, headers=NPY)
        index = await client.post("/v2/repository/index", content=b"")
        back = {"parameters": {"version": next(iter(old))}}
        rolled = await client.post("/v2/repository/models/digits/load", json=back)
        after = await client.post("/v1/embed", content=body, headers=NPY)
        return loaded, pinned, index, rolled, after

    loaded, pinned, index, rolled, after = talk(conversation, tmp_path / "digits")
    first, last = seen[0], seen[-1]
    assert loaded.json()["version"] == last[7:] == new.digest[7:]
    assert pinned.headers["x-vaefeat-digest"] == after.headers["x-vaefeat-digest"] == first
    assert {entry["version"] for entry in index.json()} == {first[7:], last[7:]}
    assert rolled.status_code == 200


def test_a_bad_bundle_is_refused_with_409_and_the_old_one_answers(
    talk: Talk, digits_bundle: Path, variant: Callable[..., Bundle], digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    load_bundle(digits_bundle).save(tmp_path / "digits")

    async def conversation(client: Any) -> tuple[Any, Any, Any]:
        variant(honest=False).save(tmp_path / "digits")
        refused = await client.post("/v2/repository/models/digits/load", content=b"")
        answer = await client.post("/v1/embed", content=encode_npy(digits_rows[:1]), headers=NPY)
        return refused, answer, await client.get("/readyz")

    refused, answer, ready = talk(conversation, tmp_path / "digits")
    assert refused.status_code == 409
    assert "standard deviations" in refused.json()["error"]
    assert answer.headers["x-vaefeat-digest"] == load_bundle(digits_bundle).digest
    assert ready.status_code == 200


def test_a_service_whose_canary_fails_is_not_ready_and_answers_nobody(
    talk: Talk, variant: Callable[..., Bundle], digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    variant(honest=False).save(tmp_path / "digits")

    async def conversation(client: Any) -> list[Any]:
        body = encode_npy(digits_rows[:1])
        return [
            await client.get("/readyz"),
            await client.get("/v2/health/ready"),
            await client.get("/v2/models/digits/ready"),
            await client.post("/v1/embed", content=body, headers=NPY),
            await client.get("/livez"),
        ]

    *refused, alive = talk(conversation, tmp_path / "digits")
    assert [answer.status_code for answer in refused] == [503] * 4
    assert "standard deviations" in refused[0].json()["reason"]
    assert alive.status_code == 200


@pytest.mark.parametrize("error", [DeviceError("the device has gone"), ModelError("it computes something else")])
def test_a_device_that_fails_while_serving_takes_the_service_out(
    talk: Talk, digits_bundle: Path, digits_rows: NDArray[np.uint8], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.service._PROVE_EVERY_S", 0.05)

    def failing(rows: NDArray[Any], outputs: Sequence[str]) -> list[NDArray[np.float32]]:
        raise error

    async def conversation(client: Any) -> tuple[Any, Any]:
        (model,) = client.app.service.models.current
        model.compute = failing
        await client.post("/v1/embed", content=encode_npy(digits_rows[:1]), headers=NPY)
        deadline = time.monotonic() + 60
        while client.app.service.ready and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        ready = await client.get("/readyz")
        return ready, await client.post("/v1/embed", content=encode_npy(digits_rows[:1]), headers=NPY)

    ready, answer = talk(conversation, digits_bundle)
    assert (ready.status_code, answer.status_code) == (503, 503)
    assert str(error) in ready.json()["reason"]


def test_keys_are_asked_for_where_there_are_some_and_scopes_and_rates_hold(
    talk: Talk, digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    import hashlib

    def table(name: str, scope: str, extra: str = "") -> str:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return f'[keys.{name}]\nsha256 = "{digest}"\nscopes = ["{scope}"]\n{extra}\n'

    path = tmp_path / "keys.toml"
    path.write_text(table("reader", "embed", "rows_per_s = 10") + table("boss", "admin"))
    path.chmod(0o600)
    body = encode_npy(digits_rows[:15])

    async def conversation(client: Any) -> list[int]:
        def post(**headers: str) -> Any:
            return client.post("/v1/embed", content=body, headers={**NPY, **headers})

        reader, boss = {"authorization": "Bearer reader"}, {"x-api-key": "boss"}
        answers = [
            await post(),
            await post(authorization="Bearer nobody"),
            await post(**boss),
            await client.get("/v1/models"),
            await client.get("/readyz"),
            await client.post("/v2/repository/index", content=b"", headers=reader),
            await client.post("/v2/repository/index", content=b"", headers=boss),
            await client.get("/metrics", headers=boss),
            await post(**reader),
            await post(**reader),
        ]
        assert answers[0].headers["www-authenticate"].startswith("Bearer")
        assert int(answers[-1].headers["retry-after"]) >= 1
        return [answer.status_code for answer in answers]

    found = talk(conversation, digits_bundle, keys=KeyRing.from_file(path))
    assert found == [401, 401, 403, 401, 200, 403, 200, 403, 200, 429]


def test_a_web_page_cannot_change_the_models(talk: Talk, digits_bundle: Path) -> None:
    async def conversation(client: Any) -> list[int]:
        url, page = "/v2/repository/models/digits/load", {"origin": "http://elsewhere.example"}
        return [
            (await client.post(url, content=b"", headers=page)).status_code,
            (await client.post(url, content=b"")).status_code,
        ]

    assert talk(conversation, digits_bundle) == [403, 200]


def test_figures_tell_what_was_served_and_refused(
    talk: Talk, digits_bundle: Path, digits_rows: NDArray[np.uint8]
) -> None:
    async def conversation(client: Any) -> tuple[str, str]:
        answer = await client.post("/v1/embed", content=encode_npy(digits_rows), headers=NPY)
        await client.post("/v1/embed", content=b"nonsense", headers=NPY)
        await client.get("/absurd")
        return answer.headers["server-timing"], (await client.get("/metrics")).text

    timing, figures = talk(conversation, digits_bundle)
    assert [part.split(";")[0] for part in timing.split(", ")] == ["queue", "decode", "device", "total"]
    samples = {
        (sample.name, *(sample.labels.get(label) for label in ("route", "status", "reason", "model"))): sample.value
        for family in text_string_to_metric_families(figures)
        for sample in family.samples
    }
    assert samples["vaefeat_rows_total", None, None, None, "digits"] == len(digits_rows)
    assert samples["vaefeat_requests_total", "/v1/embed", "200", None, "digits"] == 1
    assert samples["vaefeat_refused_total", None, None, "malformed_body", None] == 1
    assert samples["vaefeat_refused_total", None, None, "not_found", None] == 1
    shift = samples["vaefeat_drift_mean_shift", None, None, None, "digits"]
    assert shift < 0.3, "rows like the trained ones were taken for drift"


@given(st.lists(st.integers(0, 2 * _BYTES_PER_TASK), max_size=40), st.integers(1, 9))
def test_part_images_gives_tasks_in_order_by_number_and_bytes(sizes: list[int], most: int) -> None:
    tasks = list(part_images([bytes(size) for size in sizes], most=most))
    assert [position for start, stop in tasks for position in range(start, stop)] == list(range(len(sizes)))
    for start, stop in tasks:
        assert stop - start <= most
        # None was added to a task that had its share.
        assert sum(sizes[start : stop - 1]) < _BYTES_PER_TASK
    # None ended before it had one.
    assert all(stop - start == most or sum(sizes[start:stop]) >= _BYTES_PER_TASK for start, stop in tasks[:-1])
