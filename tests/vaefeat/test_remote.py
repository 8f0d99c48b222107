from __future__ import annotations

import asyncio
import copy
import gc
import json
import pickle
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from serving.address import base_url, claim
from serving.asked import Asked
from serving.settings import Limits
from tests.vaefeat.remote_servers import served, stranger
from vaefeat.bundle import Bundle, load_bundle
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import InputError, RemoteError
from vaefeat.remote import AsyncRemoteEncoder, RemoteEncoder


@pytest.fixture(scope="module")
def url(digits_bundle: Path) -> Iterator[str]:
    with served(digits_bundle) as address:
        yield address


@pytest.fixture(scope="module")
def local(digits_bundle: Path) -> OnnxEncoder:
    return OnnxEncoder(digits_bundle, device="cpu")


def renamed(bundle: Path, folder: Path, name: str) -> Path:
    """Write the same encoder under another name, which gives it another digest."""
    old = load_bundle(bundle)
    manifest = type(old.manifest).from_dict({**old.manifest.to_dict(), "name": name})
    Bundle.of(manifest, {file: old.read(file) for file in old.files}).save(folder)
    return folder


def test_remote_encoder_describes_the_bundle_as_the_local_one_does(url: str, local: OnnxEncoder) -> None:
    with RemoteEncoder(url, digest=local.digest) as remote:
        for attribute in ("name", "digest", "input", "outputs", "classes", "latent_dim", "active_units", "provider"):
            assert getattr(remote, attribute) == getattr(local, attribute)
        assert local.name in repr(remote)


@pytest.mark.parametrize("output", ["mean", "logvar", "hidden"])
@pytest.mark.parametrize("batch_size", [1, 7, 1024])
def test_embed_gives_the_local_encoder_s_bits_in_order(
    url: str, local: OnnxEncoder, digits_rows: NDArray[np.uint8], output: str, batch_size: int
) -> None:
    rows = digits_rows[:50]
    with RemoteEncoder(url, model=local.name, batch_size=batch_size) as remote:
        np.testing.assert_array_equal(remote.embed(rows, output=output), local.embed(rows, output=output))
        np.testing.assert_array_equal(remote.embed(rows.reshape(50, -1).astype(float)), local.embed(rows))


def test_embed_cuts_to_the_server_s_limits(digits_bundle: Path, local: OnnxEncoder, digits_rows: NDArray[Any]) -> None:
    for limits in (Limits(max_rows=10), Limits(max_body_bytes=128 + 10 * 64)):
        with served(digits_bundle, limits=limits) as url, RemoteEncoder(url) as remote:
            np.testing.assert_array_equal(remote.embed(digits_rows[:95]), local.embed(digits_rows[:95]))


def test_remote_encoder_where_no_row_fits_says_what_to_change(digits_bundle: Path) -> None:
    with (
        served(digits_bundle, limits=Limits(max_body_bytes=150)) as url,
        pytest.raises(InputError, match="larger --max-body-bytes"),
    ):
        RemoteEncoder(url)


@pytest.mark.parametrize(
    "rows", [np.zeros((2, 63)), np.full((2, 64), np.nan), np.zeros((0, 64)), np.array([["a"] * 64])]
)
def test_embed_of_bad_rows_is_refused_before_anything_is_sent(digits_bundle: Path, rows: NDArray[Any]) -> None:
    with served(digits_bundle) as url:
        remote = RemoteEncoder(url)
    with pytest.raises(InputError):  # and no RemoteError: the server is gone already
        remote.embed(rows)
    remote.close()


def test_embed_with_an_unknown_output_lists_the_outputs(url: str) -> None:
    with RemoteEncoder(url) as remote, pytest.raises(InputError, match=r"\['hidden', 'logvar', 'mean'\]"):
        remote.embed(np.zeros((1, 64)), output="median")


def test_remote_encoder_where_several_models_are_served_needs_a_name(digits_bundle: Path, tmp_path: Path) -> None:
    other = renamed(digits_bundle, tmp_path / "other", "other")
    with served(digits_bundle, other) as url:
        with pytest.raises(InputError, match=r"one of \['digits', 'other'\].*pass model="):
            RemoteEncoder(url)
        with pytest.raises(InputError, match=r"got model='third', wanted one of \['digits', 'other'\]"):
            RemoteEncoder(url, model="third")
        with RemoteEncoder(url, model="other") as remote:
            assert remote.digest == load_bundle(other).digest


def changed(bundle: Path, folder: Path) -> Bundle:
    """Write the same encoder under the same name with another digest."""
    old = load_bundle(bundle)
    manifest = type(old.manifest).from_dict({**old.manifest.to_dict(), "objective": "other"})
    return Bundle.of(manifest, {file: old.read(file) for file in old.files}).save(folder)


def test_embed_while_the_server_swaps_bundles_keeps_to_the_pinned_one(
    digits_bundle: Path, local: OnnxEncoder, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    folder, asked = tmp_path / "served", Asked()
    load_bundle(digits_bundle).save(folder)
    with served(folder, asked=asked) as url, RemoteEncoder(url) as remote:
        shutil.rmtree(folder)
        new = changed(digits_bundle, folder)
        asked.reload.set()
        deadline = time.monotonic() + 30
        while (newest := RemoteEncoder(url)).digest != new.digest and time.monotonic() < deadline:
            time.sleep(0.1)
        assert newest.digest == new.digest
        assert remote.digest == local.digest
        np.testing.assert_array_equal(remote.embed(digits_rows[:50]), local.embed(digits_rows[:50]))


def test_embed_after_the_server_changed_the_bundle_refuses_to_mix(
    digits_bundle: Path, tmp_path: Path, digits_rows: NDArray[np.uint8]
) -> None:
    old, new = load_bundle(digits_bundle), changed(digits_bundle, tmp_path / "changed")
    assert new.path is not None
    with served(digits_bundle) as url:
        remote = RemoteEncoder(url)
        remote.embed(digits_rows[:2])
    with served(new.path, port=int(url.rpartition(":")[2])), remote:
        with pytest.raises(RemoteError, match="serves another bundle") as caught:
            remote.embed(digits_rows[:2])
        for bundle in (old, new):
            assert bundle.digest.removeprefix("sha256:") in str(caught.value)


def test_embed_after_the_server_stopped_names_the_url_and_works_once_it_is_back(
    digits_bundle: Path, digits_rows: NDArray[np.uint8]
) -> None:
    with served(digits_bundle) as url:
        remote = RemoteEncoder(url, patience_s=2)
    with pytest.raises(RemoteError, match=f"{url} cannot be reached.*python -m serving"):
        remote.embed(digits_rows[:2])
    with served(digits_bundle, port=int(url.rpartition(":")[2])), remote:
        assert remote.embed(digits_rows[:2]).shape == (2, remote.latent_dim)


def test_embed_while_the_server_restarts_waits_for_it(
    digits_bundle: Path, local: OnnxEncoder, digits_rows: NDArray[np.uint8]
) -> None:
    with served(digits_bundle) as url:
        remote = RemoteEncoder(url, batch_size=10)
        remote.embed(digits_rows[:40])
    features: list[NDArray[np.float32]] = []
    waiting = threading.Thread(target=lambda: features.append(remote.embed(digits_rows[:40])))
    waiting.start()
    time.sleep(0.5)
    with served(digits_bundle, port=int(url.rpartition(":")[2])), remote:
        waiting.join()
    np.testing.assert_array_equal(features[0], local.embed(digits_rows[:40]))


def test_embed_after_a_restart_with_smaller_limits_cuts_smaller(
    digits_bundle: Path, local: OnnxEncoder, digits_rows: NDArray[np.uint8]
) -> None:
    rows = np.tile(digits_rows, (40, 1, 1, 1))  # 4.6 MB, more than a socket holds
    with served(digits_bundle, limits=Limits(max_rows=100_000)) as url:
        remote = RemoteEncoder(url, batch_size=100_000)
        remote.embed(rows[:10])
    smaller = Limits(max_rows=100_000, max_body_bytes=2**20)
    with served(digits_bundle, limits=smaller, port=int(url.rpartition(":")[2])), remote:
        np.testing.assert_array_equal(remote.embed(rows), local.embed(rows))


def test_remote_encoder_where_nobody_listens_says_so_at_once() -> None:
    begun = time.monotonic()
    with claim("127.0.0.1", 0) as listener:
        url = base_url(listener)
    with pytest.raises(RemoteError, match="cannot be reached"):
        RemoteEncoder(url)
    assert time.monotonic() - begun < 20


def test_async_remote_encoder_gives_the_local_encoder_s_bits_in_order(
    url: str, local: OnnxEncoder, digits_rows: NDArray[np.uint8]
) -> None:
    rows = digits_rows[:50]

    async def run() -> None:
        async with await AsyncRemoteEncoder.connect(url, batch_size=7) as remote:
            assert remote.digest == local.digest
            assert local.name in repr(remote)
            mean, logvar = await asyncio.gather(remote.embed(rows), remote.embed(rows, output="logvar"))
        np.testing.assert_array_equal(mean, local.embed(rows))
        np.testing.assert_array_equal(logvar, local.embed(rows, output="logvar"))

    asyncio.run(run())


def test_remote_encoder_of_a_listener_that_never_answers_times_out() -> None:
    with claim("127.0.0.1", 0) as silent, pytest.raises(RemoteError, match=r"did not answer within 0\.2 s"):
        RemoteEncoder(base_url(silent), timeout_s=0.2, patience_s=0)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://", "", "http://key@127.0.0.1:8000"])
def test_remote_encoder_of_something_that_is_no_url_says_so(url: str) -> None:
    with pytest.raises(InputError, match="url"):
        RemoteEncoder(url)


def test_remote_encoder_pickled_keeps_the_pinned_bundle_and_drops_the_key(
    url: str, local: OnnxEncoder, digits_rows: NDArray[np.uint8]
) -> None:
    with RemoteEncoder(url, api_key="sesame") as remote:
        pickled = pickle.dumps(remote)
    assert b"sesame" not in pickled
    assert "sesame" not in repr(remote)
    with pickle.loads(pickled) as unpickled:
        assert unpickled.digest == local.digest
        np.testing.assert_array_equal(unpickled.embed(digits_rows[:3]), local.embed(digits_rows[:3]))


def test_remote_encoder_copied_within_the_process_is_the_same_with_its_key(local: OnnxEncoder) -> None:
    seen: list[Any] = []
    answers: dict[str, tuple[int, dict[str, str], bytes]] = {
        "/v1/models": (200, {}, card(local)),
        "/v1/embed": (400, {}, b""),
    }
    with stranger(answers, seen) as url, copy.deepcopy(RemoteEncoder(url, api_key="sesame")) as remote:
        with pytest.raises(InputError):
            remote.embed(np.zeros((1, 64)))
    assert [headers["authorization"] for headers in seen] == ["Bearer sesame"] * 2


def test_remote_encoder_that_nobody_closes_leaves_no_open_connection(url: str, digits_rows: NDArray[np.uint8]) -> None:
    before = psutil.Process().net_connections(kind="tcp4")
    port = int(url.rpartition(":")[2])
    RemoteEncoder(url).embed(digits_rows[:2])
    gc.collect()
    left = [one for one in psutil.Process().net_connections(kind="tcp4") if one.raddr and one.raddr.port == port]
    assert [one for one in left if one not in before and one.status == psutil.CONN_ESTABLISHED] == []


def test_embed_after_close_says_so(url: str) -> None:
    remote = RemoteEncoder(url)
    remote.close()
    with pytest.raises(InputError, match="was closed"):
        remote.embed(np.zeros((1, 64)))


def test_embed_from_many_threads_gives_each_its_own_rows(
    url: str, local: OnnxEncoder, digits_rows: NDArray[np.uint8]
) -> None:
    wanted = local.embed(digits_rows[:320])
    got: dict[int, NDArray[np.float32]] = {}
    with RemoteEncoder(url, batch_size=8) as remote:

        def part(start: int) -> None:
            got[start] = remote.embed(digits_rows[start : start + 40])

        threads = [threading.Thread(target=part, args=(start,)) for start in range(0, 320, 40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    np.testing.assert_array_equal(np.concatenate([got[start] for start in range(0, 320, 40)]), wanted)


def card(encoder: OnnxEncoder) -> bytes:
    model = {
        "id": encoder.name,
        "digest": encoder.digest,
        "input": encoder.input.to_dict(),
        "outputs": encoder.outputs,
        "latent_dim": encoder.latent_dim,
        "active_units": encoder.active_units,
        "provider": encoder.provider,
        "limits": {"max_rows": 100, "max_body_bytes": 100_000},
    }
    return json.dumps({"object": "list", "data": [model]}).encode()


@pytest.mark.parametrize(
    ("status", "body", "error", "told"),
    [
        (200, b"<html>welcome</html>", RemoteError, "not a vaefeat server's"),
        (200, b'{"data": [{"id": "digits"}]}', RemoteError, "not a vaefeat server's"),
        (200, b'{"data": 3}', RemoteError, "not a vaefeat server's"),
        (401, b'{"error": {"message": "wanted a key"}}', InputError, "401: wanted a key"),
        (404, b"nothing here", InputError, "404: nothing here"),
        (429, b"slow down", RemoteError, "429: slow down"),
        (302, b"", RemoteError, "302: Found"),
        (503, b'{"error": {"message": "too much"}}', RemoteError, "503: too much; try again later"),
    ],
)
def test_remote_encoder_of_another_server_says_what_it_answered(
    status: int, body: bytes, error: type[Exception], told: str
) -> None:
    with stranger({"/v1/models": (status, {}, body)}, []) as url, pytest.raises(error, match=told) as caught:
        RemoteEncoder(url, patience_s=0)
    assert url in str(caught.value)


@pytest.mark.parametrize("body", [b"", b"PK\x03\x04 no archive", b"\x93NUMPY\x01\x00v\x00{", b"\x80\x04K\x01."])
def test_embed_answered_with_what_is_not_npy_is_a_remote_error(local: OnnxEncoder, body: bytes) -> None:
    answers = {
        "/v1/models": (200, {}, card(local)),
        "/v1/embed": (200, {"x-vaefeat-digest": local.digest}, body),
    }
    with stranger(answers, []) as url, RemoteEncoder(url) as remote, pytest.raises(RemoteError, match="not npy"):
        remote.embed(np.zeros((1, 64)))


@pytest.mark.parametrize("answer", [np.zeros((2, 8), np.float32), np.zeros((1, 8)), np.zeros((1, 9), np.float32)])
def test_embed_answered_with_other_features_is_a_remote_error(
    local: OnnxEncoder, answer: NDArray[Any], tmp_path: Path
) -> None:
    np.save(tmp_path / "answer.npy", answer)
    answers = {
        "/v1/models": (200, {}, card(local)),
        "/v1/embed": (200, {"x-vaefeat-digest": local.digest}, (tmp_path / "answer.npy").read_bytes()),
    }
    with (
        stranger(answers, []) as url,
        RemoteEncoder(url) as remote,
        pytest.raises(RemoteError, match=r"wanted float32 of shape \(1, 8\)"),
    ):
        remote.embed(np.zeros((1, 64)))


def test_remote_encoder_with_a_key_sends_it_as_a_bearer_token(local: OnnxEncoder) -> None:
    seen: list[Any] = []
    with stranger({"/v1/models": (200, {}, card(local))}, seen) as url, RemoteEncoder(url, api_key="sesame"):
        pass
    assert seen[0]["authorization"] == "Bearer sesame"


def test_proxy_of_the_environment_is_not_asked_for_this_machine(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with RemoteEncoder(url) as encoder:
        assert encoder.digest.startswith("sha256:")
