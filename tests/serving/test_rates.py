from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.guard.keys import Key
from serving.guard.rates import RateLimiter, rate_limited


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def key(name: str = "a", *, rows: float | None = None, bytes: float | None = None) -> Key:
    return Key(id=name, scopes=frozenset({"embed"}), rows_per_s=rows, bytes_per_s=bytes)


def test_limiter_of_a_key_without_rates_admits_everything() -> None:
    limiter = RateLimiter(clock=Clock())
    assert not any(limiter.take(key(), rows=10**9, bytes=10**12) for _ in range(100))


def test_limiter_admits_two_seconds_at_once_and_then_the_rate() -> None:
    clock = Clock()
    limiter = RateLimiter(clock=clock)
    limited = key(rows=10)
    assert [limiter.take(limited, rows=10) for _ in range(3)] == [0.0, 0.0, 1.0]
    clock.now += 0.5
    assert limiter.take(limited, rows=10) == 0.5
    assert limiter.take(limited, rows=5) == 0.0
    clock.now += 100
    assert [limiter.take(limited, rows=10) for _ in range(3)] == [0.0, 0.0, 1.0]


def test_limiter_with_a_request_over_the_burst_admits_it_when_full_and_keeps_the_rate() -> None:
    clock = Clock()
    limiter = RateLimiter(clock=clock)
    limited = key(rows=10)
    assert limiter.take(limited, rows=100) == 0.0
    assert limiter.take(limited, rows=100) == 10.0
    assert limiter.take(limited, rows=1) == pytest.approx(8.1)
    clock.now += 10
    assert limiter.take(limited, rows=100) == 0.0


def test_limiter_refusing_for_bytes_takes_no_rows() -> None:
    clock = Clock()
    limiter = RateLimiter(clock=clock)
    limited = key(rows=10, bytes=100)
    assert limiter.take(limited, rows=1, bytes=200) == 0.0
    assert limiter.take(limited, rows=19, bytes=50) == 0.5
    assert limiter.take(limited, rows=19) == 0.0
    assert limiter.take(limited, rows=1) > 0.0


def test_limiter_in_debt_of_bytes_admits_what_needs_none() -> None:
    limiter = RateLimiter(clock=Clock())
    limited = key(rows=10, bytes=100)
    limiter.take(limited, bytes=1000)
    assert limiter.take(limited, bytes=1) > 0.0
    assert limiter.take(limited, rows=1) == 0.0


def test_limiter_keeps_keys_apart_and_their_debts_through_new_rates() -> None:
    clock = Clock()
    limiter = RateLimiter(clock=clock)
    assert limiter.take(key("a", rows=10), rows=20) == 0.0
    assert limiter.take(key("b", rows=10), rows=20) == 0.0
    assert limiter.take(key("a", rows=20), rows=40) == 1.0


@given(
    st.floats(0.5, 1000.0),
    st.lists(st.tuples(st.floats(0.0, 5.0), st.integers(1, 3000)), min_size=1, max_size=50),
)
def test_limiter_never_admits_more_than_rate_and_burst_and_its_wait_suffices(
    rate: float, requests: list[tuple[float, int]]
) -> None:
    clock = Clock()
    limiter = RateLimiter(clock=clock)
    limited = key(rows=rate)
    began, admitted, largest = clock.now, 0, 0
    for pause, rows in requests:
        clock.now += pause
        wait = limiter.take(limited, rows=rows)
        if wait:
            clock.now += wait * (1 + 1e-9) + 1e-9
            assert limiter.take(limited, rows=rows) == 0.0
        admitted, largest = admitted + rows, max(largest, rows)
        assert admitted <= (rate * (clock.now - began + 2.0) + largest) * (1 + 1e-6)


def test_limiter_with_ever_new_keys_stays_bounded() -> None:
    limiter = RateLimiter(clock=Clock())
    limiter.take(key("used", rows=1), rows=2)
    for number in range(20_000):
        limiter.take(key(f"k{number}", rows=1), rows=1)
        if number % 10_000 == 0:
            assert limiter.take(key("used", rows=1), rows=1) > 0.0
    assert len(limiter._buckets) <= 16_384


def test_rate_limited_answers_429_with_whole_seconds() -> None:
    error = rate_limited(1.2)
    assert (error.status, error.kind, error.headers["retry-after"]) == (429, "rate_limited", "2")
    assert rate_limited(0.001).headers["retry-after"] == "1"


def test_limiter_given_back_bytes_that_did_not_come_admits_them_again() -> None:
    clock = Clock()
    limiter = RateLimiter(clock=clock)
    limited = key(bytes=100)
    assert limiter.take(limited, bytes=200) == 0.0
    assert limiter.take(limited, bytes=50) > 0.0
    limiter.give_back(limited, bytes=50)
    assert limiter.take(limited, bytes=50) == 0.0
    limiter.give_back(limited, bytes=10**6)  # never more than a full bucket
    assert limiter.take(limited, bytes=200) == 0.0
    assert limiter.take(limited, bytes=1) > 0.0
    limiter.give_back(key("another"), bytes=1)
