"""Positions: numbers, and the marks that vouch for them."""

import re

import pytest

from plumbing.endpoints import INT8_MAX, InvalidInput
from plumbing.marks import (
    NO_MARK,
    RUN_GAP,
    mark_of,
    new_mark,
    position_of,
    read_position,
    run_ends,
)


def test_position_is_read_as_it_was_written() -> None:
    """A number and its mark come back; the start of a count has no mark."""
    assert read_position("$.after", position_of(7, "mark")) == (7, "mark")
    assert position_of(0, "mark") == "0"
    assert (mark_of(position_of(7, "mark")), mark_of("0")) == ("mark", NO_MARK)


@pytest.mark.parametrize(("given", "read"), [
    (7, (7, None)), ("7", (7, None)), ("0", (0, None)), ("0.mark", (0, None)),
    (f"{INT8_MAX}.m", (INT8_MAX, "m")),
])
def test_bare_number_has_no_mark(given: int | str, read: tuple[int, str | None]) -> None:
    """A number without a mark vouches for nothing, nor does the start of a count with one."""
    assert read_position("$.after", given) == read


def test_number_beyond_the_last_is_refused() -> None:
    """What PostgreSQL's largest number does not hold is refused at its place."""
    with pytest.raises(InvalidInput) as refused:
        read_position("$.after", f"{INT8_MAX + 1}.mark")
    assert [error.loc for error in refused.value.errors] == ["$.after"]


def test_marks_differ() -> None:
    """Each mark is another, and can stand in a position."""
    marks = {new_mark() for _ in range(1000)}
    assert len(marks) == 1000
    assert all(re.fullmatch("[A-Za-z0-9_-]+", mark) for mark in marks)


def test_numbers_far_from_each_other_are_runs() -> None:
    """A run ends where the next number is too far away; a lone number is one."""
    near, far = 5 + RUN_GAP, 6 + 2 * RUN_GAP
    assert run_ends([5]) == ([5], [5])
    assert run_ends([5, near]) == ([5], [near])
    assert run_ends([5, near, far]) == ([5, far], [near, far])
