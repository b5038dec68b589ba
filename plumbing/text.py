"""Text as people write it: folded so that it compares, and without what no language has."""

import unicodedata

MARKS_MAX = 30  # in a row (Unicode UAX #15, Stream-Safe Text)


def folded(text: str) -> str:
    """Fold a text so that it compares without regard to case, in any script (Unicode, NFKC).

    Turkish's dotted and dotless i become one: a text does not tell which of them its `I` is.
    """
    folded_once = unicodedata.normalize("NFKC", text).casefold()
    return unicodedata.normalize("NFKC", folded_once).replace("i\u0307", "i").replace("ı", "i")


def stream_safe(text: str) -> str:
    """Drop the marks beyond 30 in a row: no language has them, and to sort a run of marks, as every
    normalisation does, takes quadratic time.
    """
    if text.isascii():
        return text
    kept, run = [], 0
    for c in text:
        is_mark = unicodedata.combining(unicodedata.normalize("NFKD", c)[0])
        run = run + 1 if is_mark else 0
        if run <= MARKS_MAX:
            kept.append(c)
    return "".join(kept)
