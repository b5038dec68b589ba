"""Text: folded so that it compares, and without what no language has."""

import re
import unicodedata

import pytest

from plumbing.text import (
    DECOMPOSED_CHARS_MAX,
    MARKS_MAX,
    RUN,
    SHOWS_NOTHING,
    UNSEEN,
    composed,
    folded,
    holds_runs,
    stream_safe,
    words_and_runs,
    words_of,
    words_wanted,
)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Straße", "STRASSE"), ("ИВАН", "иван"), ("ΣΊΣΥΦΟΣ", "σίσυφος"), ("ﬁn", "FIN"),
        ("I", "ı"), ("İstanbul", "istanbul"), ("e\u0301", "É"), ("Ａｎｎ", "ann"),
    ],
)
def test_spellings_of_one_text_fold_alike(one: str, other: str) -> None:
    """Case, width, ligatures and how accents are written make no difference, in any script."""
    assert folded(one) == folded(other)
    assert folded(folded(one)) == folded(one)


@pytest.mark.parametrize(("one", "other"), [("ann", "anne"), ("é", "e"), ("и", "й")])
def test_other_texts_fold_otherwise(one: str, other: str) -> None:
    """What a reader tells apart stays apart."""
    assert folded(one) != folded(other)


@pytest.mark.parametrize("mark", ["\u0323", "\u0344", "\uff9e", "\u05b0"])
def test_long_runs_of_marks_are_cut(mark: str) -> None:
    """No more than 30 marks in a row are kept; texts that people write stay as they are."""
    run = "a" + mark * MARKS_MAX
    assert stream_safe(run + mark * 5 + "b") == run + "b"
    for text in ("plain", "naïve", unicodedata.normalize("NFD", "tiếng Việt"), "שָׁלוֹם", ""):
        assert stream_safe(text) == text


def test_nothing_composes_of_more_than_four() -> None:
    """A text in NFC has at least a quarter of the characters of any that becomes it: so a length
    that is checked before bounds the one after, and the other way round."""
    for c in map(chr, [*range(0xD800), *range(0xE000, 0x110000)]):
        assert len(unicodedata.normalize("NFD", c)) <= 4
        assert composed(unicodedata.normalize("NFD", c)) == composed(c)


@pytest.mark.parametrize("c", [
    "\u00ad", "\u034f", "\u115f", "\u1160", "\u200b", "\u3164", "\ufe00", "\ufe0f", "\ufeff",
    "\uffa0", "\U000e0100", "\U000e01ef"])
def test_characters_that_show_nothing_are_known(c: str) -> None:
    """What is in no font and moves nothing is told from letters and marks that show."""
    assert SHOWS_NOTHING.search(f"a{c}b")


def test_characters_that_show_are_not_taken_for_unseen() -> None:
    """Letters, marks and spaces of every script show."""
    shown = "aéß и́ ก็ ำ 漢字 한국어 \u1100\u1161 ŏ̈ _9٤ \u0300\u036f\u20e3 \u00a0"
    assert not SHOWS_NOTHING.search(shown)


@pytest.mark.parametrize(("text", "words", "runs"), [
    ("The quick_brown fox-2", ["the", "quick", "brown", "fox", "2"], []),
    ("我家在上海东边。很好", [], ["我家在上海东边", "很好"]),
    ("iPhoneを2台買う!", ["iphone", "2"], ["を", "台買う"]),
    ("ｶﾞｷﾞ データ ㍿", [], ["ガギ", "データ", "株式会社"]),
    ("ภาษาไทย ง่าย", [], ["ภาษาไทย", "ง่าย"]),
    ("한국어 漢字", ["한국어"], ["漢字"]),
    ("葛\U000e0100城 Schiff\u00adfahrt می\u200cخواهم", ["schifffahrt", "میخواهم"], ["葛城"]),
    ("ភាសា\u200bខ្មែរ foo\u200bbar", ["foo", "bar"], ["ភាសាខ្មែរ"]),
    ("... \u0301 🙂 \ufe0f", [], []),
])
def test_text_is_taken_apart(text: str, words: list[str], runs: list[str]) -> None:
    """Words are parted by what is no letter, mark or digit; where a script has no spaces, its runs
    stay whole, beside words of other scripts too; what shows nothing parts nothing."""
    assert words_and_runs(text) == (words, runs)


@pytest.mark.parametrize("asked", ["brown Fox", "上海", "在上海东", "海", "x" * 100, ""])
def test_index_has_what_is_asked_for(asked: str) -> None:
    """What an index must have of a text that holds some words and runs, it has."""
    text = f"The quick brown fox, 我家在上海东边, {'X' * 100}."
    words, runs = words_and_runs(asked)
    assert words_wanted(words, runs) <= words_of(text)
    assert holds_runs(text, runs)


def test_index_is_wrong_only_about_the_order_of_a_run() -> None:
    """Words that a text does not hold are not in the index; of a run it has the pairs, and only the
    text tells that they stand in a row."""
    assert not words_wanted(["row", "x" * 101], []) <= words_of("brown " + "x" * 100)
    assert words_wanted([], ["上海东"]) <= words_of("上海 海东")
    assert not holds_runs("上海 海东", ["上海东"])


def test_ascii_is_taken_apart_like_any_text() -> None:
    """The short way through a text of ASCII finds what the long way does, of every character."""
    text = " ".join(f"a{chr(c)}B" for c in range(128))
    words, runs = words_and_runs(f"{text} é")
    assert ([*words_and_runs(text)[0], "é"], []) == (words, runs)


def test_words_are_letters_and_digits_with_their_marks() -> None:
    """Of each character that does not stand for others a word has what Unicode calls a letter, a
    number or, behind one of those, a mark; all else parts words."""
    for c in map(chr, [*range(0x80, 0xD800), *range(0xE000, 0x20000)]):
        if folded(c) == c and not UNSEEN.fullmatch(c) and not RUN.fullmatch(c):
            is_within = unicodedata.category(c)[0] in "LNM"
            assert words_and_runs(f"é{c} {c}")[0][1:] == (
                [c] if is_within and unicodedata.category(c)[0] != "M" else []), hex(ord(c))
            assert (len(words_and_runs(f"é{c}x")[0]) == 1) == is_within, hex(ord(c))


@pytest.mark.parametrize("text", [
    "\U00010a0d" * 31, "a" + "\u0f73" * 31, "\ufdfa" * 700, "x" * 4097 + "\u0300" * 31,
    "\U0001f600" * 4096, "한" * 4096])
def test_texts_that_are_not_safe_are_seen(text: str) -> None:
    """Whatever looks at a whole text quickly finds what looking at each character does."""
    parts = [unicodedata.normalize("NFKD", c) for c in text]
    longest = max(map(len, re.findall("m*", "".join(
        "m" if unicodedata.combining(part[0]) else "-" for part in parts))))
    is_safe = longest <= MARKS_MAX and sum(map(len, parts)) <= DECOMPOSED_CHARS_MAX
    assert (stream_safe(text) == text) == is_safe
