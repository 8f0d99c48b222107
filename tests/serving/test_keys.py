from __future__ import annotations

import hashlib
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import RequestError, SetupError
from serving.guard.keys import Key, KeyRing, require_scope

SECRET = b"vf_alpha"
SHA256 = hashlib.sha256(SECRET).hexdigest()
TABLE = f'[keys.alpha]\nsha256 = "{SHA256}"\nscopes = ["embed"]\n'


def written(folder: Path, text: str = TABLE, *, mode: int = 0o600) -> Path:
    path = folder / "keys.toml"
    path.write_text(text)
    path.chmod(mode)
    return path


def table(name: str, secret: bytes, fields: str = 'scopes = ["embed"]') -> str:
    return f'[keys.{name}]\nsha256 = "{hashlib.sha256(secret).hexdigest()}"\n{fields}\n'


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serving.keys", "new", "--file", str(folder / "keys.toml"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("authorization", "x_api_key"),
    [
        (b"Bearer vf_alpha", None),
        (b"bearer  vf_alpha ", None),
        (None, SECRET),
        (b"Basic dTpw", SECRET),
        (b"Bearer ", SECRET),
    ],
)
def test_ring_with_a_known_key_in_either_header_identifies_it(
    tmp_path: Path, authorization: bytes | None, x_api_key: bytes | None
) -> None:
    ring = KeyRing.from_file(written(tmp_path))
    assert ring.identify(authorization, x_api_key) == Key(id="alpha", scopes=frozenset({"embed"}))


@pytest.mark.parametrize(
    ("authorization", "x_api_key"),
    [
        (None, None),
        (b"", b""),
        (b"Bearer vf_alph", None),
        (b"Bearer vf_alphaa", None),
        (b"vf_alpha", None),
        (b"Basic vf_alpha", None),
        (b"Bearer wrong", SECRET),
        (None, SHA256.encode()),
        (None, b"\xff\x00"),
    ],
)
def test_ring_without_a_known_key_identifies_nobody(
    tmp_path: Path, authorization: bytes | None, x_api_key: bytes | None
) -> None:
    assert KeyRing.from_file(written(tmp_path)).identify(authorization, x_api_key) is None


def test_ring_of_several_keys_tells_them_apart(tmp_path: Path) -> None:
    ring = KeyRing.from_file(written(tmp_path, "".join(table(f"k{n}", b"secret %d" % n) for n in range(20))))
    for n in range(20):
        key = ring.identify(None, b"secret %d" % n)
        assert key is not None
        assert key.id == f"k{n}"


def test_ring_compares_with_every_key_whichever_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = KeyRing.from_file(written(tmp_path, "".join(table(f"k{n}", b"secret %d" % n) for n in range(9))))
    compared: list[bytes] = []

    def note(known: bytes, digest: bytes) -> bool:
        compared.append(known)
        return known == digest

    monkeypatch.setattr("hmac.compare_digest", note)
    for presented in (b"secret 0", b"secret 8", b"none of them"):
        compared.clear()
        ring.identify(None, presented)
        assert len(compared) == 9


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> KeyRing:
    return KeyRing.from_file(written(tmp_path_factory.mktemp("keys")))


@given(st.none() | st.binary(), st.none() | st.binary())
def test_ring_of_any_headers_neither_fails_nor_admits(
    ring: KeyRing, authorization: bytes | None, x_api_key: bytes | None
) -> None:
    assert ring.identify(authorization, x_api_key) is None


def test_ring_knows_a_key_until_it_expires(tmp_path: Path) -> None:
    now = [0.0]
    path = written(tmp_path, TABLE + "expires = 1970-01-01T00:01:00Z\n")
    ring = KeyRing(path, clock=lambda: now[0])
    now[0] = 59.9
    assert ring.identify(None, SECRET) is not None
    now[0] = 60.0
    assert ring.identify(None, SECRET) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "without a key"),
        ("# nothing\n", "without a key"),
        ("keys = 3", "something else"),
        ("keys = {a = 1}", "something else"),
        (TABLE + "[other]", "something else"),
        ("[keys.alpha", "not TOML"),
        ("a = " + "[" * 100_000, "not TOML|nested"),
        (TABLE + TABLE, "not TOML"),
        (TABLE + TABLE.replace("alpha", "beta"), "same sha256"),
        (TABLE.replace(SHA256, SHA256.upper()), "64 small hexadecimal"),
        (TABLE.replace("sha256", "sha1"), "unknown fields"),
        ('[keys.alpha]\nscopes = ["embed"]', "64 small hexadecimal"),
        (TABLE.replace('["embed"]', '"embed"'), "a list"),
        (TABLE.replace('["embed"]', "[]"), "wanted some of"),
        (TABLE.replace('["embed"]', '["root"]'), "wanted some of"),
        (TABLE.replace("keys.alpha", "keys.'a b'"), "letters, digits"),
        (TABLE + "rows_per_s = 0", "more than 0"),
        (TABLE + "rows_per_s = true", "a number"),
        (TABLE + "bytes_per_s = inf", "more than 0"),
        (TABLE + "bytes_per_s = nan", "more than 0"),
        (TABLE + "expires = 2030-01-01", "with its zone"),
        (TABLE + "expires = 2030-01-01T00:00:00", "with its zone"),
    ],
)
def test_ring_of_a_file_that_is_no_key_file_is_refused(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(SetupError, match=told):
        KeyRing.from_file(written(tmp_path, text))


def test_ring_of_a_file_with_a_key_in_place_of_its_hash_does_not_quote_it(tmp_path: Path) -> None:
    secret = "vf_" + "s" * 43
    texts = [TABLE.replace(SHA256, secret), TABLE.replace("alpha", secret), f"{secret}\n", f'x = "{secret}']
    for text in texts:
        with pytest.raises(SetupError) as refused:
            KeyRing.from_file(written(tmp_path, text))
        assert secret not in str(refused.value)


def test_ring_of_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="No such file"):
        KeyRing.from_file(tmp_path / "none.toml")


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX")
@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602])
def test_ring_of_a_file_open_to_everybody_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(SetupError, match="chmod 600"):
        KeyRing.from_file(written(tmp_path, mode=mode))


def test_ring_with_a_changed_file_takes_it_over(tmp_path: Path) -> None:
    path = written(tmp_path)
    ring = KeyRing.from_file(path)
    assert not ring.reload_if_changed()
    written(tmp_path, table("beta", b"vf_beta"))
    assert ring.reload_if_changed()
    assert not ring.reload_if_changed()
    assert ring.identify(None, SECRET) is None
    assert ring.identify(None, b"vf_beta") is not None


@pytest.mark.parametrize("change", ["broken", "empty", "open", "gone"])
def test_ring_with_a_file_gone_bad_keeps_its_keys_logs_once_and_recovers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    path = written(tmp_path)
    ring = KeyRing.from_file(path)
    if change == "gone":
        path.unlink()
    else:
        written(tmp_path, {"broken": "[keys", "empty": "", "open": TABLE + "#"}[change], mode=0o600)
        path.chmod(0o644 if change == "open" else 0o600)
    with caplog.at_level(logging.INFO, logger="serving.guard"):
        assert not any(ring.reload_if_changed() for _ in range(3))
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert ring.identify(None, SECRET) is not None

    written(tmp_path, TABLE + table("beta", b"vf_beta"))
    assert ring.reload_if_changed()
    assert ring.ids == ("alpha", "beta")


def test_keys_and_rings_show_nothing_secret(tmp_path: Path) -> None:
    ring = KeyRing.from_file(written(tmp_path))
    shown = repr(ring) + repr(ring.identify(None, SECRET))
    assert SHA256 not in shown
    assert SECRET.decode() not in shown


def test_scope_without_a_key_is_401_and_with_another_scope_403() -> None:
    key = Key(id="alpha", scopes=frozenset({"embed"}))
    assert require_scope(key, "embed") is key
    with pytest.raises(RequestError) as missing:
        require_scope(None, "embed")
    assert (missing.value.status, missing.value.kind) == (401, "unauthorized")
    assert missing.value.headers["www-authenticate"].startswith("Bearer")
    with pytest.raises(RequestError, match="admin") as forbidden:
        require_scope(key, "admin")
    assert (forbidden.value.status, forbidden.value.kind) == (403, "forbidden")


def test_new_key_opens_a_ring_of_the_file_it_made(tmp_path: Path) -> None:
    first = make(tmp_path, "--id", "ci", "--scope", "embed", "--scope", "metrics", "--rows-per-s", "500", "--days", "1")
    second = make(tmp_path, "--id", "ops", "--scope", "admin")
    secrets = [first.stdout.strip(), second.stdout.strip()]
    path = tmp_path / "keys.toml"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not any(secret in path.read_text() for secret in secrets)

    ring = KeyRing.from_file(path)
    ci, ops = (ring.identify(b"Bearer " + secret.encode(), None) for secret in secrets)
    assert ci is not None
    assert ops == Key(id="ops", scopes=frozenset({"admin"}))
    assert (ci.id, sorted(ci.scopes), ci.rows_per_s, ci.bytes_per_s) == ("ci", ["embed", "metrics"], 500.0, None)
    assert ci.expires == pytest.approx(path.stat().st_mtime + 86_400, abs=60)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--id", "alpha", "--scope", "embed"], "which has a key"),
        (["--id", "b c", "--scope", "embed"], "letters, digits"),
        (["--id", "beta", "--scope", "root"], "wanted some of"),
        (["--id", "beta", "--scope", "embed", "--rows-per-s", "0"], "more than 0"),
        (["--id", "beta", "--scope", "embed", "--days", "1e12"], "36500"),
    ],
)
def test_new_key_that_cannot_be_leaves_the_file_alone(tmp_path: Path, arguments: list[str], told: str) -> None:
    path = written(tmp_path)
    done = make(tmp_path, *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert path.read_text() == TABLE
