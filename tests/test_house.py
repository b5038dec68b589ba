"""The rules of the house: the file's map, its limits, its SQL, its settings table."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import msgspec
from torture_plants import PLANTS

import messenger

ROOT = Path(messenger.__file__).parent
SOURCE = Path(messenger.__file__).read_text()
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)

CODE_LINES_MAX = 2000
COLUMNS_MAX = 100
FUNCTION_LINES_MAX = 40
NESTING_MAX = 3

Function = ast.FunctionDef | ast.AsyncFunctionDef
BLOCKS = (
    ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar,
    ast.Match,
)  # fmt: skip
SQL = re.compile(
    r"(--.*\n\s*)*(select\s|insert into\s|update\s+\w+\s+set\s|delete from\s|with\s+\w+\s+as\s*\("
    r"|(create|alter|drop)\s+\w+\s|(listen|notify)\s+\w)",
    re.IGNORECASE,
)
RUNS_SQL = {
    "rows", "row", "value", "execute", "executemany", "fetch", "fetchrow", "fetchval", "prepare",
    "cursor",
}  # fmt: skip


def functions(tree: ast.AST = TREE) -> list[Function]:
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


def statements() -> Iterator[tuple[str, str]]:
    """Every SQL constant of the module: its name and its text."""
    for name, value in vars(messenger).items():
        if name.isupper() and isinstance(value, str) and SQL.match(value.strip()):
            yield name, value


def test_map_equals_the_banners() -> None:
    """The docstring's map names the rooms of the file, all of them, in their order."""
    banners = re.findall(r"^# ==== (.+?) =+$", SOURCE, re.MULTILINE)
    mapped = re.findall(r"^    (\S.*?) {2,}\S", messenger.__doc__ or "", re.MULTILINE)
    assert len(banners) >= 13
    assert mapped == banners


def count_code_lines(source: str) -> int:
    """How many lines hold code: no blank ones, comments, docstrings, or inside of a long text."""
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and text_of(node.value) is not None:
            skipped.update(range(node.lineno, (node.end_lineno or 0) + 1))
        elif isinstance(node, ast.Constant | ast.JoinedStr):
            skipped.update(range(node.lineno + 1, (node.end_lineno or 0) + 1))
    return sum(
        1 for number, line in enumerate(source.splitlines(), 1)
        if number not in skipped and re.match(r"\s*[^\s#]", line))


def test_file_is_short() -> None:
    """The application has at most 2,000 lines of code, of at most 100 columns."""
    assert 1000 < count_code_lines(SOURCE) <= CODE_LINES_MAX
    assert [n for n, line in enumerate(LINES, 1) if len(line) > COLUMNS_MAX] == []


def test_functions_are_short() -> None:
    """No function has over 40 lines of code."""
    found = {function.name: lines_of_code(function, LINES) for function in functions()}
    assert len(found) > 100
    assert {name: size for name, size in found.items() if size > FUNCTION_LINES_MAX} == {}


def test_functions_are_flat() -> None:
    """No function nests its blocks over three deep."""
    found = {function.name: nesting(function) for function in functions()}
    assert max(found.values()) >= 2
    assert {name: depth for name, depth in found.items() if depth > NESTING_MAX} == {}


def test_code_lines_are_counted_as_a_reader_would() -> None:
    """Neither air nor words count, nor the lines of a statement after its first."""
    source = '''
"""A docstring,
of two lines."""
# a comment

A = """select
    1"""

def b():
    """Another."""
    return (  # one
        2)
'''
    assert count_code_lines(source) == 4


def test_measures_see_what_they_are_for() -> None:
    """The two measures count a function that is known as a reader would."""
    source = '''
async def known(a,
                b):
    """Not counted.

    Nor this."""
    # nor this

    if a:
        return 1
    elif b:
        with a:
            for x in b:
                try:
                    x()
                except ValueError:
                    while x:
                        pass
    def inner():
        if a: pass
'''
    outer, inner = functions(ast.parse(source))
    assert lines_of_code(outer, source.splitlines()) == 14
    assert (nesting(outer), nesting(inner)) == (5, 1)


async def test_every_statement_prepares(sql: asyncpg.Connection) -> None:
    """Each SQL constant is right against the migrated schema."""
    wrong = {}
    for name, text in statements():
        try:
            await sql.prepare(text)
        except asyncpg.PostgresError as error:
            wrong[name] = str(error)
    assert len(list(statements())) > 20
    assert wrong == {}


def test_every_statement_names_parameters_and_index() -> None:
    """Each SQL constant starts with two comment lines, the first naming as many parameters as it
    has; a call of a function leaves that to the function's own declaration."""
    functions_file = (messenger.SQL / "post-apply.sql").read_text()
    for name, text in statements():
        assert re.fullmatch("[A-Z]+(_[A-Z]+)*", name)
        if called := re.fullmatch(r"select (?:\* from )?(\w+)\(([$\d, ]+)\)", text):
            declaration = rf"\n--.*\ncreate or replace function {called[1]}\(([^)]*)\)"
            declared = re.search(declaration, functions_file)
            assert declared is not None, f"{called[1]} is not declared, or has no comment"
            assert len(declared[1].split(",")) == len(called[2].split(",")), name
            continue
        lines = text.strip().splitlines()
        assert all(re.match(r"\s*-- \S", line) for line in lines[:2]), name
        assert not re.match(r"\s*--", lines[2]), name
        count = max((int(number) for number in re.findall(r"\$(\d+)", text)), default=0)
        named = lines[0].strip(" -").split(";")[0]
        expected = 0 if named == "(none)" else len(named.split(","))
        assert expected >= count, f"{name} has {count} parameters, its first line names {expected}"


def test_every_statement_is_in_the_room_of_queries() -> None:
    """SQL constants are written in one room, each once and in one piece."""
    room = re.search(r"^# ==== Queries =+\n.*?(?=^# ==== )", SOURCE, re.MULTILINE | re.DOTALL)
    assert room is not None
    first = SOURCE[: room.start()].count("\n") + 1
    last = SOURCE[: room.end()].count("\n") + 1
    places: dict[str, list[int]] = {}
    for node in ast.walk(TREE):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            places.setdefault(node.targets[0].id, []).append(node.lineno)
            if node.targets[0].id in dict(statements()):
                assert text_of(node.value) is not None, node.targets[0].id
    for name, _ in statements():
        assert len(places[name]) == 1, name
        assert first <= places[name][0] <= last, name


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
                whole = isinstance(query, ast.Name) or text_of(query) is not None
                if not whole and not from_file:
                    found.append(f"line {node.lineno}: {ast.unparse(node)}")
        if any(piece is not None and SQL.match(piece.lstrip()) for piece in pieces):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")  # type: ignore[attr-defined]
    return found


def test_no_statement_is_built() -> None:
    """No SQL is put together from strings, nor run from an expression."""
    assert built_sql(TREE) == []


def test_built_statement_is_seen() -> None:
    """Each way of building SQL is one that the test before would see."""
    for source in (
        'f"select {a} from t"',
        '"select " + a',
        '"insert into t values (%s)" % a',
        '"update t set a = {}".format(a)',
        'database.rows(f"{a} from t", 1)',
        "database.row(SELECT + ORDER)",
        "database.value(QUERIES[a])",
        'f"delete from {t}"',
    ):
        assert built_sql(ast.parse(source)), source
    for source in (
        'f"no user: {a}"',
        "database.rows(SELECT_ONE)",
        'x.execute("select 1")',
        "a + 1",
    ):
        assert not built_sql(ast.parse(source)), source


def test_every_planted_bug_finds_its_place() -> None:
    """What `./run torture --prove` replaces is there, once: a change of it shows at once."""
    for plant in PLANTS:
        for name, old, _ in plant.changes:
            assert (ROOT / name).read_text().count(old) == 1, (plant.name, name)


def test_every_endpoint_is_documented() -> None:
    """Each handler has a docstring whose first line is its summary, one sentence, once."""
    summaries = []
    for endpoint in messenger.ENDPOINTS:
        text = inspect.getdoc(endpoint.handler)
        assert text, endpoint.handler.__name__
        summary = text.splitlines()[0]
        assert summary.endswith("."), (endpoint.handler.__name__, summary)
        summaries.append(summary)
    assert len(set(summaries)) == len(summaries)


def test_every_function_is_documented() -> None:
    """Each public function, method and class says in a docstring what it is for."""
    missing = [
        node.name
        for parent in ast.walk(TREE)
        if isinstance(parent, ast.Module | ast.ClassDef)
        for node in parent.body
        if isinstance(node, Function | ast.ClassDef)
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
        and not (isinstance(node, ast.ClassDef) and issubclass(
            getattr(messenger, node.name), messenger.Problem
        ))
    ]  # fmt: skip
    assert missing == []


def test_endpoints_are_each_one() -> None:
    """No two lines of the table share a method and path, or a handler."""
    keys = [(endpoint.method, endpoint.path) for endpoint in messenger.ENDPOINTS]
    assert len(set(keys)) == len(keys)
    handlers = [endpoint.handler for endpoint in messenger.ENDPOINTS]
    assert len(set(handlers)) == len(handlers)


def test_readme_lists_the_settings() -> None:
    """The README's table has each setting once, in order, with its default and what it is for."""
    readme = (ROOT / "README.md").read_text()
    heading = re.search(
        r"^\| Variable \| Default \| Meaning \|\n\|[-| :]+\|\n", readme, re.MULTILINE
    )
    assert heading is not None, "README.md has no table | Variable | Default | Meaning |"
    table = readme[heading.end() :].split("\n\n")[0].strip()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    expected = []
    for field in msgspec.inspect.type_info(messenger.Settings).fields:  # type: ignore[attr-defined]
        default = f"`{field.default}`" if field.default != "" else ""
        expected.append([f"`{field.encode_name.upper()}`", default])
    assert [row[:2] for row in rows] == expected
    assert all(row[2].endswith(".") for row in rows)
