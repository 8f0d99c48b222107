"""Which bundle a client stands for, and who may know its key."""

from __future__ import annotations

import asyncio
import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import joblib
import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.base import clone

from tests.vaefeat.remote_servers import DIGEST, OTHER_DIGEST, Faulty, answering, faulty, features_of
from vaefeat import OnnxEncoder, VAEFeatures
from vaefeat.errors import InputError, RemoteError
from vaefeat.remote import AsyncRemoteEncoder, RemoteEncoder

ROWS = np.random.default_rng(0).integers(0, 256, size=(9, 1, 8, 8), dtype=np.uint8)
GONE = answering(404, b'{"error": {"type": "unknown_model", "message": "no such version"}}')
HEX, OTHER_HEX = DIGEST.removeprefix("sha256:"), OTHER_DIGEST.removeprefix("sha256:")


@pytest.fixture
def server() -> Iterator[Faulty]:
    with faulty() as state:
        yield state


def test_encoder_of_a_server_without_versions_asks_by_name(server: Faulty) -> None:
    with RemoteEncoder(server.url, digest=DIGEST) as encoder:
        encoder.embed(ROWS)
    assert server.queries == [{"model": "digits", "output": "mean"}]


def test_encoder_of_a_server_with_versions_asks_for_the_pinned_one(server: Faulty) -> None:
    server.card["versions"] = [HEX]
    with RemoteEncoder(server.url) as encoder:
        server.card.update(digest=OTHER_DIGEST, versions=[OTHER_HEX, HEX])  # a swap, which nobody need notice
        np.testing.assert_array_equal(encoder.embed(ROWS), features_of(ROWS))
    assert server.queries == [{"model": "digits", "output": "mean", "version": HEX}]


def test_encoder_whose_version_the_server_holds_no_more_says_so(server: Faulty) -> None:
    server.card["versions"] = [HEX]
    with RemoteEncoder(server.url, patience_s=0.5) as encoder:
        server.always = GONE
        with pytest.raises(RemoteError, match=f"serves another bundle.*no such version.*wanted {DIGEST}"):
            encoder.embed(ROWS)


def test_encoder_whose_version_another_process_has_comes_to_it_over_a_new_connection(server: Faulty) -> None:
    server.card["versions"] = [HEX]
    # The first two connections lead to a process that has not loaded it yet.
    server.always = lambda exchange: exchange.faulty.n_connections < 3 and GONE(exchange)
    with RemoteEncoder(server.url) as encoder:
        np.testing.assert_array_equal(encoder.embed(ROWS), features_of(ROWS))


def test_encoder_without_patience_takes_a_missing_version_for_gone(server: Faulty) -> None:
    server.card["versions"] = [HEX]
    server.faults.append(GONE)
    with RemoteEncoder(server.url, patience_s=0) as encoder, pytest.raises(RemoteError, match="serves another bundle"):
        encoder.embed(ROWS)


def test_encoder_with_a_digest_that_is_not_served_is_refused_at_once(server: Faulty) -> None:
    with pytest.raises(RemoteError, match=f"got digest {DIGEST}, wanted {OTHER_DIGEST}"):
        RemoteEncoder(server.url, digest=OTHER_DIGEST)
    with pytest.raises(RemoteError, match=f"got digest {DIGEST}, wanted {OTHER_DIGEST}"):
        asyncio.run(AsyncRemoteEncoder.connect(server.url, digest=OTHER_DIGEST))


def test_encoder_with_the_digest_of_an_older_version_takes_its_card(server: Faulty) -> None:
    server.older = {**server.card, "latent_dim": 7, "versions": [OTHER_HEX, HEX]}
    server.card.update(digest=OTHER_DIGEST, versions=[OTHER_HEX, HEX])
    with RemoteEncoder(server.url, digest=DIGEST) as encoder:
        assert (encoder.digest, encoder.latent_dim) == (DIGEST, 7)
        encoder.embed(ROWS)
    assert server.queries[0]["version"] == HEX
    server.older = server.card
    with pytest.raises(RemoteError, match=f"got digest {OTHER_DIGEST}, wanted {DIGEST}"):
        RemoteEncoder(server.url, digest=DIGEST)


@pytest.mark.parametrize("digest", ["", HEX, "sha256:12", "sha512:" + HEX])
def test_encoder_with_something_that_is_no_digest_says_so(server: Faulty, digest: str) -> None:
    with pytest.raises(InputError, match="wanted sha256: and 64 hexadecimal digits"):
        RemoteEncoder(server.url, digest=digest)


@pytest.mark.parametrize("key", ["sesame\n", "open sesame", "sésame", "sesame\0"])
def test_key_that_no_header_can_hold_is_refused_without_being_told(server: Faulty, key: str) -> None:
    with pytest.raises(InputError, match="api_key") as caught:
        RemoteEncoder(server.url, api_key=key)
    assert "same" not in str(caught.value)
    with pytest.raises(InputError, match="api_key"):
        asyncio.run(AsyncRemoteEncoder.connect(server.url, api_key=key))


def saved_with_joblib(thing: object) -> bytes:
    file = io.BytesIO()
    joblib.dump(thing, file)
    return file.getvalue()


@pytest.mark.parametrize("dump", [pickle.dumps, saved_with_joblib])
def test_features_of_an_encoder_with_a_key_keep_it_in_copies_and_out_of_pickles(
    server: Faulty, dump: Callable[[object], bytes]
) -> None:
    with RemoteEncoder(server.url, api_key="sesame") as encoder:
        features = clone(VAEFeatures(encoder, digest=DIGEST)).fit(ROWS)
        copy.deepcopy(features).transform(ROWS)
        assert server.keys == ["Bearer sesame"] * 2
        stored = dump(features)
        assert b"sesame" not in stored
        for text in (repr(features), repr(encoder), str(vars(encoder))):
            assert "sesame" not in text
    loaded = joblib.load(io.BytesIO(stored)) if dump is saved_with_joblib else pickle.loads(stored)
    np.testing.assert_array_equal(loaded.transform(ROWS), features_of(ROWS))
    loaded.encoder_.authenticate("mellon").embed(ROWS)
    loaded.encoder_.authenticate(None).embed(ROWS)
    loaded.encoder_.close()
    assert server.keys[2:] == [None, "Bearer mellon", None]


def test_async_encoder_pickled_keeps_the_pinned_bundle_and_drops_the_key(server: Faulty) -> None:
    async def run() -> NDArray[np.float32]:
        async with await AsyncRemoteEncoder.connect(server.url, api_key="sesame") as encoder:
            pickled = pickle.dumps(encoder)
        assert b"sesame" not in pickled
        async with pickle.loads(pickled) as unpickled:
            assert unpickled.digest == DIGEST
            await unpickled.authenticate("mellon").embed(ROWS)
            features: NDArray[np.float32] = await unpickled.authenticate(None).embed(ROWS)
            return features

    np.testing.assert_array_equal(asyncio.run(run()), features_of(ROWS))
    assert server.keys == ["Bearer sesame", "Bearer mellon", None]


def test_features_pinned_to_a_digest_refuse_another_bundle(server: Faulty, digits_bundle: Path) -> None:
    with pytest.raises(RemoteError, match=f"wanted {OTHER_DIGEST}"):
        VAEFeatures(server.url, digest=OTHER_DIGEST).fit(ROWS)
    with pytest.raises(InputError, match="leave out digest="):
        VAEFeatures(digits_bundle, digest=OTHER_DIGEST).fit(ROWS)
    local = OnnxEncoder(digits_bundle)
    assert VAEFeatures(digits_bundle, digest=local.digest).fit(ROWS).digest_ == local.digest


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"in_flight": 0}, {"timeout_s": 0}, {"patience_s": -1}, {"timeout_s": float("nan")}]
)
def test_encoder_with_a_number_that_makes_no_sense_says_which(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(InputError, match=f"got {name}={value}"):
        RemoteEncoder("http://127.0.0.1:9", **wrong)  # type: ignore[arg-type]
