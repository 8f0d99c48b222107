"""What decides on retries, without a server: pauses, Retry-After, and the parts that rows are cut into."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vaefeat.remote import _Parts
from vaefeat.remote_exchange import Retries, retry_after_s


@given(
    patience_s=st.floats(0, 1000),
    asked=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 60), st.booleans()), min_size=1, max_size=40),
)
def test_pauses_heed_the_server_grow_within_bounds_and_end_with_the_patience(
    patience_s: float, asked: list[tuple[float, float, bool]]
) -> None:
    now = 50.0
    retries = Retries(patience_s, clock=lambda: now)
    for n_failures, (took_s, at_least_s, stale) in enumerate(asked):
        now += took_s
        pause_s = retries.pause_s(at_least_s=at_least_s, stale=stale)
        if pause_s is None:
            longest_s = min(5.0, 0.1 * 2**n_failures)
            assert now + at_least_s + longest_s >= 50.0 + patience_s
            return
        assert now + pause_s < 50.0 + patience_s
        assert at_least_s <= pause_s <= at_least_s + min(5.0, 0.1 * 2**n_failures)
        if stale and n_failures == 0:
            assert pause_s == at_least_s
        now += pause_s


def test_pauses_of_clients_that_failed_together_differ() -> None:
    assert len({Retries(60).pause_s() for _ in range(100)}) > 90


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0),
        ("", 0),
        ("0", 0),
        (" 7 ", 7),
        ("-3", 0),
        ("1.5", 0),
        ("soon", 0),
        ("٣", 0),
        ("9" * 400, float("inf")),
        ("1 Jan 2020 00:00:00 -0000", 0),
        ("1 Jan 99999999999999999999 00:00:00 GMT", 0),
    ],
)
def test_retry_after_in_seconds_is_read_and_anything_else_ignored(header: str | None, seconds: float) -> None:
    assert retry_after_s(header) == seconds


@given(now=st.integers(0, 4_000_000_000), later=st.integers(-1000, 1000))
def test_retry_after_as_a_date_is_the_time_until_then(now: int, later: int) -> None:
    if 0 <= now + later:
        date = format_datetime(datetime.fromtimestamp(now + later, UTC), usegmt=True)
        assert retry_after_s(date, now=now) == max(0, later)


@given(st.text() | st.from_regex(r"(\w{3}, )?\d{1,25} \w{3} \d{1,25} \d\d:\d\d:\d\d ([+-]\d{4}|GMT)?"))
def test_retry_after_of_any_text_is_a_number_of_seconds(header: str) -> None:
    assert retry_after_s(header, now=0) >= 0


@given(st.integers(1, 200), st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=60))
def test_parts_given_back_or_not_hold_every_row_once(n_rows: int, asked: list[tuple[int, bool]]) -> None:
    parts, taken = _Parts(n_rows), list[int]()
    for most, refused in [*asked, *[(7, False)] * n_rows]:
        part = parts.take(most)
        if part is not None:
            assert 1 <= part.stop - part.start <= most
            if refused:
                parts.give_back(part)
            else:
                taken.extend(range(n_rows)[part])
    assert sorted(taken) == list(range(n_rows))
