#!/usr/bin/env python3
"""Counts the lines of code of messenger.py, and fails where they are too many.

Blank lines, comments, docstrings and the text of SQL cost nothing: the limit is there to make us
think, not to fold code.
"""

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

APPLICATION = Path(__file__).resolve().parent.parent / "messenger.py"
CODE_LINES_MAX = 2000
LAYOUT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
}
SQL = re.compile(
    r"(--.*\n\s*)*(select\s|insert into\s|update\s+\w+\s+set\s|delete from\s"
    r"|with\s+\w+\s+as\s+(materialized\s*)?\(|(create|alter|drop)\s+\w+\s|(listen|notify)\s+\w)",
    re.IGNORECASE,
)


def is_sql(node: ast.AST) -> bool:
    """Tell whether a node names a constant that is SQL."""
    value = node.value if isinstance(node, ast.Assign) else None
    is_text = isinstance(value, ast.Constant) and isinstance(value.value, str)
    return is_text and SQL.match(value.value.strip()) is not None  # type: ignore[union-attr]


def count_code_lines(source: str) -> int:
    """Count the lines of a file that hold code; of a constant of SQL that of its name."""
    counted: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            counted |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node) is not None:  # type: ignore[arg-type]
            text = node.body[0]  # type: ignore[attr-defined]
            counted -= set(range(text.lineno, text.end_lineno + 1))
        elif is_sql(node):
            last = node.end_lineno  # type: ignore[attr-defined]
            counted -= set(range(node.lineno + 1, last + 1))  # type: ignore[attr-defined]
    return len(counted)


def main() -> int:
    """Tell how many there are; answer the exit status."""
    count = count_code_lines(APPLICATION.read_text("utf-8"))
    print(f"{APPLICATION.name}: {count:,} lines of code, of {CODE_LINES_MAX:,}")
    return int(count > CODE_LINES_MAX)


if __name__ == "__main__":
    sys.exit(main())
