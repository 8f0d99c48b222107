from __future__ import annotations

import socket

import pytest

from serving.address import base_url, claim, require_loopback
from serving.errors import SetupError
from serving.settings import Limits


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


@pytest.mark.parametrize("bound", ["max_rows", "max_body_bytes", "max_in_flight", "compute_timeout_s"])
def test_limits_of_nothing_are_refused(bound: str) -> None:
    with pytest.raises(SetupError, match=f"{bound}=0"):
        Limits(**{bound: 0})
