from __future__ import annotations

from serving.watching.timing import server_timing


def test_server_timing_of_seconds_tells_milliseconds_by_stage() -> None:
    header = server_timing(queue=0.00012, decode=0.0, device=1.5, total=1.50049)
    assert header == b"queue;dur=0.120, decode;dur=0.000, device;dur=1500.000, total;dur=1500.490"
