"""What is wrong with a value, in words for people; msgspec says it to programmers."""

import functools
import itertools
import re
from typing import Any

import msgspec

CHOICES_REMEMBERED_MAX = 1000
NO_NUL = "^[^\\u0000]*$"  # PostgreSQL cannot store U+0000

# What msgspec says, and the words for it; with what the parentheses match in place of the braces.
WORDS = (
    ("Object missing required field `.*", "is missing"),
    ("Object contains unknown field `.*", "is not a field here"),
    ("Expected `str` of length >= 1", "must not be empty"),
    (r"Expected `str` of length >= (\d+)", "must have at least {} characters"),
    (r"Expected `str` of length <= (\d+)", "must have at most {} characters"),
    (r"Expected `\w+` of length >= (\d+)", "must have at least {} entries"),
    (r"Expected `\w+` of length <= (\d+)", "must have at most {} entries"),
    (r"Expected `\w+` >= (\S+)", "must be at least {}"),
    (r"Expected `\w+` <= (\S+)", "must be at most {}"),
    (r"(?:Integer value|Number) out of range", "is too large or too small a number"),
    (re.escape(f"Expected `str` matching regex {NO_NUL!r}"), "must not contain U+0000"),
    ("Invalid UUID", "must be a UUID, like 01a204e6-62a3-7c4a-8d5e-1f2a3b4c5d6e"),
    ("Invalid RFC3339 encoded .*", "must be a time or a date, like 2026-11-22T20:15:37Z"),
)
KINDS = {
    "array": "a list", "bool": "true or false", "float": "a number", "int": "a whole number",
    "object": "named fields in braces", "str": "text", "uuid": "a UUID"}
# How its messages end: where in the value that is wrong, or in the names of which fields.
WHERE = re.compile(r" - at `(key` in `)?(\$[\w.\[\]]*)`\Z")
OF_FIELD = re.compile("(?s)Object (?:missing required|contains unknown) field `(.*?)`?")


def describe(error: msgspec.ValidationError, shape: Any) -> tuple[str, str]:
    """Tell where a value is not of a shape, like `$.text`, and what is wrong there."""
    said, loc, of_names = str(error), "$", False
    if where := WHERE.search(said):
        said, loc, of_names = said[: where.start()], where[2], where[1] is not None
    if field := OF_FIELD.fullmatch(said):
        loc = f"{loc}.{field[1]}"
    words = in_words(said, shape, loc.rpartition(".")[2])
    return loc, f"has a name in it that {words}" if of_names else words


def in_words(said: str, shape: Any, field: str) -> str:
    """Put into words what msgspec says of a field of a shape."""
    for pattern, words in WORDS:
        if match := re.fullmatch(pattern, said, re.DOTALL):
            return words.format(*match.groups())
    if kinds := re.match(r"Expected `([\w |]+)`", said):
        names = [KINDS[each] for each in kinds[1].split(" | ") if each in KINDS]
        return f"must be {' or '.join(names)}" if names else "is not valid"
    if said.startswith("Invalid") and (known := choices(shape, field)):
        return f"must be one of {', '.join(known)}"
    return "is not valid"


@functools.lru_cache(CHOICES_REMEMBERED_MAX)  # to look into a union takes half a millisecond
def choices(shape: Any, field: str) -> tuple[str, ...]:
    """List what a field of a shape may be, where it has choices."""
    found: set[str] = set()
    for struct in members(msgspec.inspect.type_info(shape)):
        if getattr(struct, "tag_field", None) == field:
            found.add(str(struct.tag))
        kinds = [each.type for each in getattr(struct, "fields", ()) if each.encode_name == field]
        for kind in itertools.chain.from_iterable(map(members, kinds)):
            found |= set(map(str, getattr(kind, "values", ())))
    return tuple(sorted(found))


def members(info: Any) -> list[Any]:
    """List the types that a type may be: of a union its members, of any other itself."""
    return list(getattr(info, "types", [info]))
