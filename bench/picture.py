"""Draws the rows as one picture: a bar for each, as long as it is better than what was to reach."""

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from rig import Row

WIDTH, LABELS, VALUES = 1080, 440, 240
BAR, STEP, TOP, BOTTOM = 14, 24, 84, 40
LEAST, MOST = 0.25, 16.0  # what the axis shows, as times of what was to reach
REACHED, MISSED, INK, QUIET = "#2f7d4f", "#b3402e", "#222222", "#8a8a8a"
TITLE = "How many times better than what it has to reach (1) each measurement came out"
STYLE = "font-family:system-ui,sans-serif;font-size:13px"


def place(reach: float) -> float:
    """Answer where on the axis, in pixels, a multiple of what was to reach is."""
    shown = min(max(reach, LEAST), MOST)
    part = math.log(shown / LEAST) / math.log(MOST / LEAST)
    return LABELS + part * (WIDTH - LABELS - VALUES)


def text(x: float, y: float, words: str, anchor: str = "start", color: str = INK) -> str:
    """Write a line."""
    where = f'x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{color}"'
    return f"<text {where}>{escape(words)}</text>"


def axis(height: int) -> list[str]:
    """Draw the multiples of what was to reach."""
    parts, multiple = [], LEAST
    while multiple <= MOST:
        x, color = place(multiple), INK if multiple == 1 else "#dddddd"
        parts.append(f'<path d="M{x:.0f} {TOP - 10}V{height - BOTTOM}" stroke="{color}"/>')
        parts.append(text(x, TOP - 16, f"{multiple:g}", "middle", QUIET))
        multiple *= 2
    return parts


def bar(row: Row, y: int) -> list[str]:
    """Draw a row: from the line of what was to reach to where it came."""
    reach = row.reach() or 1
    start, end = sorted((place(1), place(reach)))
    color = REACHED if reach >= 1 else MISSED
    size = f'width="{max(end - start, 1):.1f}" height="{BAR}"'
    middle = y + BAR - 3
    return [
        text(LABELS - 12, middle, row.work, "end"),
        f'<rect x="{start:.1f}" y="{y}" {size} rx="2" fill="{color}"/>',
        text(WIDTH - VALUES + 12, middle, f"{row.value:.3g} ({row.wanted()})", color=color),
    ]


def drawn(rows: Sequence[Row], caption: str) -> str:
    """Draw the rows that have something to reach."""
    judged = [row for row in rows if row.reach() is not None]
    height = TOP + STEP * len(judged) + BOTTOM
    box = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box} style="{STYLE}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        text(20, 28, TITLE),
        *axis(height),
    ]
    for number, row in enumerate(judged):
        parts += bar(row, TOP + STEP * number)
    parts += [text(20, height - 14, caption, color=QUIET), "</svg>"]
    return "\n".join(parts) + "\n"
