"""Text as people write it: composed, folded so that it compares, and taken apart into the words of
an index.

Python's unicodedata tells neither which characters show nothing nor which script one belongs to:
the ranges here are those of Unicode 17.
"""

import hashlib
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable

MARKS_MAX = 30  # in a row (Unicode UAX #15, Stream-Safe Text)
COMPOSED_FROM_MAX = 4  # characters that NFC may make one of (UAX #15, of which NFD tells the most)
WORD_CHARS_MAX = 64  # in an index of words
PARTS_MAX = 3  # of a character, but for few: U+FDFA alone becomes 18
DECOMPOSED_CHARS_MAX = 12_288  # of 4,096 syllables of Hangul
END_OF_BMP = 0x10000  # whose characters a regular expression tells apart quickly
END_OF_LETTERS = 0x20000  # and their marks: Han goes on beyond, and what shows nothing

# DerivedCoreProperties.txt, Default_Ignorable_Code_Point; but for U+200B, where a line may break.
_SHOWS_NOTHING = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200c-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff")
# Scripts that put no spaces between words. LineBreak.txt, SA (words are found in a dictionary):
# Thai, Lao, Myanmar, Khmer, Tai Le, New Tai Lue, Tai Tham, Tai Viet, Ahom; then, of Scripts.txt,
# Han, Hiragana, Katakana and Bopomofo, with what stands in their blocks.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\ua9e0-\ua9ff"
    "\uaa60-\uaadf\U00011700-\U0001174f"
    "\u2e80-\u2fdf\u3005-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U0001aff0-\U0001b16f\U00020000-\U0003ffff")


def _class_of(is_meant: Callable[[str], bool], end: int = END_OF_LETTERS) -> str:
    """List the ranges of characters that are meant, as a class of a regular expression has them."""
    ranges: list[list[str]] = []
    for c in filter(is_meant, map(chr, range(end))):
        if ranges and ord(ranges[-1][-1]) == ord(c) - 1:
            ranges[-1][-1] = c
        else:
            ranges.append([c, c])
    return "".join(map("-".join, ranges))


def _is_mark(c: str) -> bool:
    return unicodedata.category(c)[0] == "M"


def _is_combining(c: str) -> bool:
    return unicodedata.combining(unicodedata.normalize("NFKD", c)[0]) > 0


def _is_long(c: str) -> bool:
    return len(unicodedata.normalize("NFKD", c)) > PARTS_MAX


SHOWS_NOTHING = re.compile(f"[\u200b{_SHOWS_NOTHING}]")
RUN = re.compile(f"[{_UNSPACED}]+")
ASCII_WORD = re.compile("[a-z0-9]+")
WORD = re.compile(rf"\w[\w{_class_of(_is_mark)}]*")  # \w: a letter or digit of any script, or `_`
MAYBE_LONG = re.compile(
    f"[{_class_of(_is_combining, END_OF_BMP)}]{{{MARKS_MAX + 1}}}"
    f"|[{_class_of(_is_long, END_OF_BMP)}\U00010000-\U0010ffff]")
# Within a run also U+200B shows nothing; elsewhere it parts two words.
UNSEEN = re.compile(f"[{_SHOWS_NOTHING}]+|(?<=[{_UNSPACED}])\u200b+(?=[{_UNSPACED}])")


def composed(text: str) -> str:
    """Write each letter with its marks as one character where there is one (Unicode, NFC)."""
    return unicodedata.normalize("NFC", text)


def folded(text: str) -> str:
    """Fold a text so that it compares without regard to case, in any script (Unicode, NFKC).

    Turkish's dotted and dotless i become one: a text does not tell which of them its `I` is.
    """
    folded_once = unicodedata.normalize("NFKC", text).casefold()
    return unicodedata.normalize("NFKC", folded_once).replace("i\u0307", "i").replace("ı", "i")


def stream_safe(text: str) -> str:
    """Drop the marks beyond 30 in a row: no language has them, and to sort a run of marks, as every
    normalisation does, takes quadratic time. Drop the end of a text that would become very long.
    """
    if len(text) * PARTS_MAX <= DECOMPOSED_CHARS_MAX and not MAYBE_LONG.search(text):
        return text  # most are; what follows finds the same
    kept, run, size = [], 0, 0
    for c in text:
        parts = unicodedata.normalize("NFKD", c)
        run = run + 1 if unicodedata.combining(parts[0]) else 0
        if run <= MARKS_MAX:
            kept.append(c)
            size += len(parts)
        if size > DECOMPOSED_CHARS_MAX:
            break
    return "".join(kept)


def words_and_runs(text: str) -> tuple[list[str], list[str]]:
    """Take a text apart, folded: into words, which are letters and digits with their marks, and,
    of scripts that put no spaces between words, into runs of them.
    """
    if text.isascii():  # most are; what follows finds the same
        return ASCII_WORD.findall(text.lower()), []
    whole = folded(stream_safe(UNSEEN.sub("", text)))
    letters = " ".join(WORD.findall(whole.replace("_", " ")))
    return RUN.sub(" ", letters).split(), RUN.findall(letters)


def words_of(text: str) -> set[str]:
    """Tell what an index of words has of a text: its words, and of runs of a script that puts no
    spaces between words each character and each pair.
    """
    words, runs = words_and_runs(text)
    found = set(map(short_word, words))
    for run in runs:
        found.update(run, pairs(run))
    return found


def words_wanted(words: Iterable[str], runs: Iterable[str]) -> set[str]:
    """Tell what an index of words must have of a text that holds all of some words and runs.

    That it holds a run as it stands only the text itself can tell (holds_runs).
    """
    return {short_word(word) for word in words}.union(*map(pairs, runs))


def holds_runs(text: str, runs: Iterable[str]) -> bool:
    """Tell whether a text holds each of some runs as it stands."""
    held = " ".join(words_and_runs(text)[1])
    return all(run in held for run in runs)


def short_word(word: str) -> str:
    """Answer a word as it is in an index: a digest stands for one too long for it."""
    return word if len(word) <= WORD_CHARS_MAX else hashlib.sha256(word.encode()).hexdigest()


def pairs(run: str) -> list[str]:
    """List the pairs of characters of a run; of a single character, itself."""
    return [first + second for first, second in itertools.pairwise(run)] or [run]
