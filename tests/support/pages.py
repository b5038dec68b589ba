"""README.md and the pages of docs/, and what they show to be typed."""

import re

from support.servers import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}


def block(page: str, language: str, holding: str) -> str:
    """Find the code block of a language that holds a text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)
    [found] = [block for block in blocks if holding in block]
    return str(found)
