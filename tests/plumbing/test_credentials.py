"""Emails, usernames and passwords: their spelling, and what makes two of them one."""

from collections.abc import Callable
from typing import Any

import pytest

from plumbing.credentials import (
    checked_email,
    checked_password,
    checked_username,
    name_start_key,
)
from plumbing.endpoints import InvalidInput


def test_spellings_of_one_email_have_one_key() -> None:
    """An email keeps how it is written, but its case does not make it another."""
    assert checked_email("Ann@Example.COM")[1] == checked_email("ann@example.com")[1]
    assert checked_email("ann@host.test")[0] == "ann@host.test"  # reserved, and fine


def test_username_is_composed_and_folded() -> None:
    """A username is kept in NFC; its key is without case, and begins as the key of its start."""
    assert checked_username("Ame\u0301lie") == ("Amélie", "amélie")
    assert checked_username("Amélie")[1].startswith(name_start_key("AME\u0301"))


def test_length_of_a_password_is_of_its_composed_form() -> None:
    """A hundred letters, each written with its accent apart, are a hundred characters."""
    assert checked_password("e\u0301" * 100) == "é" * 100


@pytest.mark.parametrize(("check", "given"), [
    (checked_email, "ann"), (checked_email, "a@" + "b" * 250 + ".test"),
    (checked_username, "ab"), (checked_username, "a b c"), (checked_username, "x" * 51),
    (checked_username, "abx" + "\u0327\u0323\u0331\u0332"), (checked_username, "ab\u200dc"),
    (checked_password, "1234567"), (checked_password, "x" * 101), (name_start_key, "x" * 51),
])
def test_what_is_misspelled_is_refused(check: Callable[[str], Any], given: str) -> None:
    """What is too short, too long, or has what does not belong into it is refused."""
    with pytest.raises(InvalidInput):
        check(given)
