"""Ids that sort by time."""

import time

from plumbing.uuids import uuid7


def test_ids_sort_by_time() -> None:
    """An id says that it is of version 7, and begins with the milliseconds since the epoch."""
    made = uuid7()
    assert (made.version, made.variant) == (7, "specified in RFC 4122")
    assert abs((made.int >> 80) - time.time() * 1000) < 60_000
    time.sleep(0.01)
    assert made < uuid7()


def test_ids_of_one_moment_differ() -> None:
    """Many made at once are all others."""
    assert len({uuid7() for _ in range(1000)}) == 1000
