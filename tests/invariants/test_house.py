"""The rules of the house: the file's map, its limits, its SQL, its settings table."""

import ast
import inspect
import re
from pathlib import Path

import asyncpg
import msgspec
import pytest

import messenger
import plumbing
from plumbing.endpoints import Problem
from support.mutations import MUTATIONS
from support.source import (
    PRODUCT,
    ROOT,
    Function,
    built_sql,
    functions,
    lines_of_code,
    nesting,
    statements,
    text_of,
)
from tools.code_lines import CODE_LINES_MAX, count_code_lines

TESTS = Path(__file__).parents[1]
SOURCE = (ROOT / "messenger.py").read_text()
TREE = ast.parse(SOURCE)

COLUMNS_MAX = 100
FUNCTION_LINES_MAX = 40
NESTING_MAX = 3

each_file = pytest.mark.parametrize("name", PRODUCT)


def test_map_equals_the_banners() -> None:
    """The docstring's map names the sections of the file, all of them, in their order."""
    banners = re.findall(r"^# ==== (.+?) =+$", SOURCE, re.MULTILINE)
    mapped = re.findall(r"^    (\S.*?) {2,}\S", messenger.__doc__ or "", re.MULTILINE)
    assert len(banners) >= 13
    assert mapped == banners


def test_application_is_short() -> None:
    """The application has at most 2,000 lines of code."""
    assert count_code_lines(SOURCE) <= CODE_LINES_MAX


def test_product_is_all_there() -> None:
    """The rules that run over each file of the product see the application and the tools."""
    assert {"messenger.py", "tools/administer.py", "tools/documents.py"} < set(PRODUCT)


@each_file
def test_lines_are_short(name: str) -> None:
    """No line has over 100 columns."""
    lines = (ROOT / name).read_text().splitlines()
    assert [n for n, line in enumerate(lines, 1) if len(line) > COLUMNS_MAX] == []


@each_file
def test_functions_are_short(name: str) -> None:
    """No function has over 40 lines of code."""
    source = (ROOT / name).read_text()
    lines = source.splitlines()
    found = {each.name: lines_of_code(each, lines) for each in functions(ast.parse(source))}
    assert {name: size for name, size in found.items() if size > FUNCTION_LINES_MAX} == {}


@each_file
def test_functions_are_flat(name: str) -> None:
    """No function nests its blocks over three deep."""
    found = {each.name: nesting(each) for each in functions(ast.parse((ROOT / name).read_text()))}
    assert {name: depth for name, depth in found.items() if depth > NESTING_MAX} == {}


def test_application_has_what_the_measures_are_for() -> None:
    """The application has many functions and some that nest, so the measures measured something."""
    assert len(functions(TREE)) > 100
    assert max(map(nesting, functions(TREE))) >= 2


def test_lines_of_code_are_counted_as_a_reader_would() -> None:
    """Of a known source only the lines that hold code are counted."""
    source = '''"""Not counted.

Nor this.
"""
# nor this
import a

SELECT = """  -- counted: the line of the name
    -- not counted
    select 1"""
TEXT = """counted
and this
"""

class B:
    """Not counted."""

    def c(self):
        """Not counted,

        nor this."""
        return a(
            1,  # counted

            # not counted
            2)
'''
    assert count_code_lines(source) == 10


def test_measures_see_what_they_are_for() -> None:
    """The two measures of functions count a known function as a reader would."""
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
    assert len(statements()) > 40
    assert wrong == {}


def test_migrations_are_ascii() -> None:
    """yoyo reads the numbered files by the encoding of the locale, so they need none."""
    files = list(messenger.SQL.glob("[0-9]*.sql"))
    assert files
    assert [path.name for path in files if not path.read_bytes().isascii()] == []


# A call, also one within another, and a statement that does nothing but call a function.
CALL = re.compile(r"\b(?=(\w+)\(((?:[^()]|\([^()]*\))*)\))")
ONLY_CALLED = re.compile(r"select (?:\* from )?(\w+)\([^()]+\)")


def declared_functions() -> dict[str, list[str]]:
    """The functions in SQL, and the names of what each takes."""
    text = (messenger.SQL / "functions.sql").read_text()
    found = re.findall(r"\n--.*\ncreate or replace function (\w+)\(([^)]*)\)", text)
    assert len(found) == text.count("create or replace function"), "one has no comment"
    return {
        name: [each.split()[0] for each in taken.split(",")
               if each.strip() and each.split()[0] != "out"]
        for name, taken in found
    }


def strip_comments(text: str) -> str:
    """A statement without its comments."""
    return re.sub(r"--.*", "", text).strip()


async def test_every_statement_names_parameters_and_indexes(sql: asyncpg.Connection) -> None:
    """Each SQL constant starts with two lines of comment: as many parameters as it has, by name,
    and the indexes that serve it, which exist. Anything may follow a semicolon."""
    known = {row[0] for row in await sql.fetch("select indexname from pg_indexes")}
    for name, text in statements():
        assert re.fullmatch("[A-Z]+(_[A-Z]+)*", name)
        told = [re.fullmatch(r"\s*-- (\S.*)", line) for line in text.strip().splitlines()[:2]]
        parameters, indexes = [each[1].split(";")[0].split(", ") if each else [] for each in told]
        taken = len((await sql.prepare(text)).get_parameters())
        assert parameters == ["(none)"] if not taken else len(parameters) == taken, name
        assert all(re.fullmatch("[a-z_]+|[(]none[)]", each) for each in parameters), name
        assert indexes, name
        assert indexes == ["(none)"] or set(indexes) <= known, name


def test_functions_are_called_with_named_arguments() -> None:
    """A function in SQL is called with the names of what it takes; where that is all that a
    statement does, both bear one name, but for the function's version."""
    declared = declared_functions()
    seen = set()
    for name, text in statements():
        bare = strip_comments(text)
        if called := ONLY_CALLED.fullmatch(bare):
            assert re.sub(r"_\d$", "", called[1]) == name.lower()
        for function, given in CALL.findall(bare):
            if function in declared:
                arguments = re.sub(r"\([^()]*\)", "", given).split(",")
                named = [re.fullmatch(r"\s*(\w+) => [^=]+", each) for each in arguments]
                assert [each and each[1] for each in named] == declared[function], name
                seen.add(function)
    assert len(seen) > 15


def test_every_statement_is_used() -> None:
    """Each SQL constant is run by the application, by its heartbeat or by one of the tools."""
    used = set()
    for name in ("messenger.py", "plumbing/heartbeat.py",
                 *(each for each in PRODUCT if each.startswith("tools/"))):
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                used.add(node.id)
            elif isinstance(node, ast.Attribute):
                used.add(node.attr)
    assert {name for name, _ in statements()} - used == set()


def test_every_function_in_sql_is_used() -> None:
    """No function is left in SQL that neither a statement nor another one calls, nor the servers of
    the last release."""
    text = (messenger.SQL / "functions.sql").read_text()
    called = {name for _, statement in statements() for name, _ in CALL.findall(statement)}
    called |= set(re.findall(r"\n-- What the last release calls.*\n.* function (\w+)\(", text))
    for name in declared_functions():
        assert name in called or len(re.findall(rf"\b{name}\(", strip_comments(text))) > 1, name


def test_every_statement_stands_at_the_head_of_its_section() -> None:
    """SQL constants are written once, in one piece, before what else is in the section of the
    application that is the first to use them."""
    sections = re.split(r"^# ==== .+ =+$", SOURCE, flags=re.MULTILINE)[1:]
    known = dict(statements())
    for number, section in enumerate(sections):
        tree = ast.parse(section)
        names = [node.targets[0].id for node in tree.body
                 if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
        here = [name for name in names if name in known]
        assert names[: len(here)] == here, section[:200]
        for node in tree.body[: len(here)]:
            assert isinstance(node, ast.Assign)
            assert text_of(node.value) is not None
        used = [[name for name in here if re.search(rf"\b{name}\b", each)] for each in sections]
        assert all(name in used[number] for name in here), here
        assert not any(used[:number]), (here, used)


@each_file
def test_no_statement_is_built(name: str) -> None:
    """No SQL is put together from strings, nor run from an expression."""
    assert built_sql(ast.parse((ROOT / name).read_text())) == []


def test_built_statement_is_seen() -> None:
    """The test before would see each way of building SQL."""
    for source in (
        'f"select {a} from t"',
        '"select " + a',
        '"insert into t values (%s)" % a',
        '"update t set a = {}".format(a)',
        'database.rows(f"{a} from t", 1)',
        "database.row(SELECT + ORDER)",
        "database.value(QUERIES[a])",
        "database.value(module.query)",
        'f"delete from {t}"',
    ):
        assert built_sql(ast.parse(source)), source
    for source in (
        'f"no user: {a}"',
        "database.rows(SELECT_ONE)",
        "database.rows(module.SELECT_ONE)",
        'x.execute("select 1")',
        "a + 1",
    ):
        assert not built_sql(ast.parse(source)), source


def test_every_planted_bug_finds_its_place() -> None:
    """The text that each mutation of `./run torture --prove` replaces is there exactly once."""
    for mutation in MUTATIONS:
        for name, old, _ in mutation.changes:
            assert (ROOT / name).read_text().count(old) == 1, (mutation.name, name)


def test_plumbing_imports_only_what_is_below() -> None:
    """A file of plumbing/ imports only those above it in the package's list, and none imports the
    application; the list names every file."""
    names = re.findall(r"^    (\w+) {2,}\S", plumbing.__doc__ or "", re.MULTILINE)
    files = {path.stem for path in (ROOT / "plumbing").glob("*.py")} - {"__init__"}
    assert set(names) == files
    for number, name in enumerate(names):
        imported = {
            module
            for node in ast.walk(ast.parse((ROOT / f"plumbing/{name}.py").read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for module in [getattr(node, "module", None), *(each.name for each in node.names)]}
        assert not imported & {"messenger", *names[number + 1 :]}
        assert not imported & {f"plumbing.{each}" for each in names[number:]}, name


def test_modules_of_tests_stand_alone() -> None:
    """What tests share is in tests/support: no module imports a test module or conftest."""
    modules = {path.stem for path in TESTS.rglob("*.py") if re.match("test_|conftest", path.stem)}
    for path in TESTS.rglob("*.py"):
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported |= {each.name.rpartition(".")[2] for each in node.names}
            if isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).rpartition(".")[2])
        assert imported & modules == set(), path


def test_modules_of_tests_have_names_of_their_own() -> None:
    """No two test modules share a name, wherever they are."""
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert len(names) > 30
    assert len(set(names)) == len(names)


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
            getattr(messenger, node.name), Problem
        ))
    ]
    assert missing == []


def test_endpoints_are_each_one() -> None:
    """No two lines of the table share a method and path, or a handler."""
    keys = [(endpoint.method, endpoint.path) for endpoint in messenger.ENDPOINTS]
    assert len(set(keys)) == len(keys)
    handlers = [endpoint.handler for endpoint in messenger.ENDPOINTS]
    assert len(set(handlers)) == len(handlers)


def test_page_of_settings_lists_them() -> None:
    """Its table has each setting once, in order, with its default and what it is for."""
    page = (ROOT / "docs/settings.md").read_text()
    heading = re.search(
        r"^\| Variable \| Default \| Meaning \|\n\|[-| :]+\|\n", page, re.MULTILINE
    )
    assert heading is not None, "docs/settings.md has no table | Variable | Default | Meaning |"
    table = page[heading.end() :].split("\n\n")[0].strip()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    expected = []
    for field in msgspec.inspect.type_info(messenger.Settings).fields:  # type: ignore[attr-defined]
        default = f"`{field.default}`" if field.default != "" else ""
        expected.append([f"`{field.encode_name.upper()}`", default])
    assert [row[:2] for row in rows] == expected
    assert all(row[2].endswith(".") for row in rows)
