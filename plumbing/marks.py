"""Positions: a number of a count that goes up, and the mark of the call that took it.

A number alone tells how far somebody is; the mark vouches that both mean the same history.
"""

import itertools
import secrets

from plumbing.endpoints import INT8_MAX, invalid

MARK_BYTES = 8  # random
RUN_GAP = 100  # between two numbers, up to which they belong to one run
NO_MARK = "0"  # of a count that has not begun, and of what is older than marks


def new_mark() -> str:
    """Make the mark of one call that takes numbers."""
    return secrets.token_urlsafe(MARK_BYTES)


def position_of(number: int, mark: str) -> str:
    """Write a position; before the first number there is no mark."""
    return f"{number}.{mark}" if number else "0"


def mark_of(position: str) -> str:
    """Tell the mark of a position that was written here."""
    return position.partition(".")[2] or NO_MARK


def read_position(loc: str, given: int | str) -> tuple[int, str | None]:
    """Read a position, or a bare number, which has no mark, as 0 has none. Raises InvalidInput."""
    number, _, mark = str(given).partition(".")
    if int(number) > INT8_MAX:
        raise invalid(loc, f"must be at most {INT8_MAX}")
    return int(number), mark if mark and int(number) else None


def run_ends(numbers: list[int]) -> tuple[list[int], list[int]]:
    """Divide rising numbers into runs wherever many others may lie between two of them.

    Answers the first number of each run, and the last.
    """
    pairs = [pair for pair in itertools.pairwise(numbers) if pair[1] - pair[0] > RUN_GAP]
    return [numbers[0], *[pair[1] for pair in pairs]], [*[pair[0] for pair in pairs], numbers[-1]]
