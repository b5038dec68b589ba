"""What people register with: emails, usernames and passwords, their shapes and their spelling."""

import re
import unicodedata
from typing import Annotated

import email_validator
from msgspec import Meta

from plumbing.endpoints import composed_text, invalid
from plumbing.text import SHOWS_NOTHING, folded
from plumbing.validation import NO_NUL

LABEL_CHARS_MAX = 63  # between the dots of a domain (RFC 1035, section 2.3.4)
EMAIL_CHARS_MAX = 254
USERNAME_CHARS_MAX = 50
USERNAME_MARKS_MAX = 3  # on one letter
PASSWORD_CHARS_MAX = 100

Email = Annotated[str, Meta(
    min_length=3, max_length=EMAIL_CHARS_MAX, description="An email address.")]
# Three that are counted in their composed form (composed_text), and may be longer as sent.
Username = Annotated[str, Meta(
    description="The user's name: 3 to 50 letters of any script, digits and `_`, counted in NFC.",
    extra_json_schema={"minLength": 3, "maxLength": USERNAME_CHARS_MAX})]
NameStart = Annotated[str, Meta(
    pattern=NO_NUL,
    description="How the name starts, in capital or small letters; up to 50 characters, counted in "
                "NFC.",
    extra_json_schema={"maxLength": USERNAME_CHARS_MAX})]
Password = Annotated[str, Meta(
    description="8 to 100 characters of any kind, counted in NFC.",
    extra_json_schema={"minLength": 8, "maxLength": PASSWORD_CHARS_MAX})]

# No mail is ever sent, and a server may be private: reserved domains are fine.
email_validator.SPECIAL_USE_DOMAIN_NAMES.clear()


def checked_email(email: str) -> tuple[str, str]:
    """Answer an email and its key, by which it is unique. Raises InvalidInput."""
    try:
        labels = email.rpartition("@")[2].split(".")
        # First: to normalise many marks takes quadratic time, to encode a long label milliseconds.
        if len(email) > EMAIL_CHARS_MAX or max(map(len, labels)) > LABEL_CHARS_MAX:
            raise email_validator.EmailSyntaxError
        valid = email_validator.validate_email(email, check_deliverability=False).normalized
    except email_validator.EmailNotValidError:
        raise invalid("$.email", "is not an email address") from None
    return valid, folded(valid)


def checked_username(username: str) -> tuple[str, str]:
    """Answer a username and its key, by which it is unique. Raises InvalidInput."""
    name = composed_text("$.username", username, 3, USERNAME_CHARS_MAX)
    # L for a letter, digit or underscore, M for a mark
    kinds = "".join(
        "L" if c.isdecimal() or c == "_" else unicodedata.category(c)[0] for c in name)
    if SHOWS_NOTHING.search(name) or not re.fullmatch(f"(LM{{0,{USERNAME_MARKS_MAX}}})+", kinds):
        raise invalid(
            "$.username", "must be letters with up to 3 marks each, digits or underscores")
    return name, folded(name)


def name_start_key(start: str) -> str:
    """Answer the start of the keys of those usernames that start so. Raises InvalidInput."""
    return folded(composed_text("$.q", start, 0, USERNAME_CHARS_MAX))


def checked_password(password: str) -> str:
    """Answer a new password. Raises InvalidInput."""
    return composed_text("$.password", password, 8, PASSWORD_CHARS_MAX)
