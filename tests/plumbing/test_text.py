"""Text: folded so that it compares, and without what no language has."""

import unicodedata

import pytest

from plumbing.text import MARKS_MAX, folded, stream_safe


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
