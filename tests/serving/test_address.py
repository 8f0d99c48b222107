from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from serving.address import base_url, claim, hand_over, require_loopback
from serving.errors import SetupError
from serving.models import find_bundles
from serving.settings import Limits
from vaefeat.bundle import load_bundle
from vaefeat.errors import BundleError


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_require_loopback_with_a_loopback_host_is_silent(host: str) -> None:
    require_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", ""])
def test_require_loopback_with_a_public_host_says_what_to_do(host: str) -> None:
    with pytest.raises(SetupError, match=r"--insecure|no address"):
        require_loopback(host)


def test_require_loopback_with_an_unknown_host_says_so() -> None:
    with pytest.raises(SetupError, match="no address of this machine"):
        require_loopback("no such host")


def test_claim_of_port_0_takes_a_free_one_and_holds_it() -> None:
    with claim("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert base_url(listener) == f"http://127.0.0.1:{port}"
        with pytest.raises(SetupError, match=f"127.0.0.1 port {port}"):
            claim("127.0.0.1", port)
    claim("127.0.0.1", port).close()


def test_claim_of_an_address_of_another_machine_says_so() -> None:
    with pytest.raises(SetupError, match=r"192\.0\.2\.77"):
        claim("192.0.2.77", 0)


@pytest.mark.parametrize(("host", "shown"), [("0.0.0.0", "http://127.0.0.1:"), ("::1", "http://[::1]:")])
def test_base_url_is_one_that_this_machine_can_use(host: str, shown: str) -> None:
    if ":" in host and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with claim(host, 0) as listener:
        assert base_url(listener).startswith(shown)


def test_find_bundles_of_two_bundles_with_one_name_names_both_folders(digits_bundle: Path, tmp_path: Path) -> None:
    load_bundle(digits_bundle).save(tmp_path / "copy")
    with pytest.raises(SetupError, match="two bundles named 'digits'") as caught:
        find_bundles([digits_bundle, tmp_path / "copy"])
    assert str(digits_bundle) in str(caught.value)
    assert str(tmp_path / "copy") in str(caught.value)


def test_find_bundles_of_no_bundle_is_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="wanted the folder of a bundle"):
        find_bundles([tmp_path])


def test_limits_survive_their_environment_variable() -> None:
    limits = Limits(max_rows=7, body_timeout_s=0.25)
    assert Limits.from_json(limits.to_json()) == limits


@pytest.mark.parametrize("bound", ["max_rows", "max_body_bytes", "max_in_flight", "compute_timeout_s"])
def test_limits_of_nothing_are_refused(bound: str) -> None:
    with pytest.raises(SetupError, match=f"{bound}=0"):
        Limits(**{bound: 0})


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the port is simply given up")
def test_hand_over_keeps_the_port_from_all_but_a_socket_that_shares_it() -> None:
    with claim("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        hand_over(listener)
        with pytest.raises(SetupError):
            claim("127.0.0.1", port)
        with socket.socket() as plain, pytest.raises(OSError, match="in use"):
            plain.bind(("127.0.0.1", port))
        with socket.socket() as sharing:
            sharing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sharing.bind(("127.0.0.1", port))
            sharing.listen()
            for _ in range(20):  # and all connections are the new listener's
                with socket.create_connection(("127.0.0.1", port), timeout=5):
                    sharing.accept()[0].close()
