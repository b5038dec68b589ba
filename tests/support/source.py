"""Reads the source of the product: functions, their measures, SQL constants, and SQL in pieces."""

import ast
import re
from pathlib import Path

import messenger
from plumbing import heartbeat
from tools import administer
from tools.code_lines import SQL

ROOT = Path(messenger.__file__).parent
PRODUCT = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.py", "plumbing/*.py", "tools/*.py")
    for path in ROOT.glob(pattern))

Function = ast.FunctionDef | ast.AsyncFunctionDef
BLOCKS = (
    ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar,
    ast.Match,
)
RUNS_SQL = {
    "rows", "row", "value", "change", "execute", "executemany", "fetch", "fetchrow", "fetchval",
    "prepare", "cursor",
}


def functions(tree: ast.AST) -> list[Function]:
    """Every function and method, nested ones too."""
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def lines_of_code(function: Function, lines: list[str]) -> int:
    """How many lines a function has, from its `def` on, without docstring, comments and blanks."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    skipped = range(first.lineno, (first.end_lineno or 0) + 1) if documented else range(0)
    assert function.end_lineno is not None
    return sum(
        1
        for number in range(function.lineno, function.end_lineno + 1)
        if number not in skipped and re.match(r"\s*[^\s#]", lines[number - 1])
    )


def nesting(node: ast.AST, is_elif: bool = False) -> int:
    """How deep the blocks in a function are nested; a function in it is measured by itself."""
    own = isinstance(node, BLOCKS) and not is_elif
    deepest = 0
    for name, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        for child in children:
            if not isinstance(child, ast.AST) or isinstance(child, Function):
                continue
            only = isinstance(node, ast.If) and name == "orelse" and len(children) == 1
            chained = only and isinstance(child, ast.If)
            deepest = max(deepest, nesting(child, chained))
    return own + deepest


def text_of(node: ast.expr) -> str | None:
    """The text of a string constant."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def statements() -> list[tuple[str, str]]:
    """Every SQL constant of the application and its tools: its name and its text."""
    return [
        (name, value)
        for module in (messenger, administer, heartbeat) for name, value in vars(module).items()
        if name.isupper() and isinstance(value, str) and SQL.match(value.strip())]


def is_name(node: ast.expr) -> bool:
    """Whether an expression is a name, a constant of another module, or an attribute that is named
    after the statement that it holds."""
    return isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and (
        node.attr.isupper() or node.attr.strip("_").upper() in dict(statements())))


def built_sql(tree: ast.AST) -> list[str]:
    """Where SQL is put together from pieces, or run from anything but a name, one whole text or a
    file."""
    found = []
    for node in ast.walk(tree):
        pieces: list[str | None] = []
        if isinstance(node, ast.JoinedStr):
            pieces = [text_of(value) for value in node.values[:1]]
        elif isinstance(node, ast.BinOp):
            pieces = [text_of(node.left), text_of(node.right)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("format", "join", "replace", "format_map"):
                pieces = [text_of(node.func.value)]
            if node.func.attr in RUNS_SQL and node.args:
                query = node.args[0]
                from_file = isinstance(query, ast.Call) and ast.unparse(query.func).endswith(
                    ("sql').read_bytes", "sql').read_text")
                )
                whole = is_name(query) or text_of(query) is not None
                if not whole and not from_file:
                    found.append(f"line {node.lineno}: {ast.unparse(node)}")
        if any(piece is not None and SQL.match(piece.lstrip()) for piece in pieces):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")  # type: ignore[attr-defined]
    return found
