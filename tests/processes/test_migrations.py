"""The schema comes about whatever happens: started together, killed in the middle, run again."""

import asyncio
import itertools
import os
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest

import messenger
from plumbing.schema import migrate, migrate_when_up, schema_number
from support.databases import drop_database, on_cluster, until_waiting, with_database
from support.people import SOON_SECONDS, Person
from support.releases import BEFORE_THAT, LAST_RELEASE, files_of
from support.servers import ROOT, SECRET_KEY, refused

MIGRATE = """
import sys
sys.path.insert(0, sys.argv[1])
import messenger
try:
    from postgres import migrate  # where it was in the last release
except ModuleNotFoundError:
    from plumbing.schema import migrate
migrate(sys.argv[2], messenger.SQL)
"""
SERVE_SECONDS = 50

# All that a schema consists of, in words of PostgreSQL's own.
SELECT_SCHEMA = """
    select 'column ' || attrelid::regclass || '.' || attname || ' '
        || format_type(atttypid, atttypmod) || ' ' || attnotnull || ' ' || attidentity::text || ' '
        || coalesce(pg_get_expr(adbin, adrelid), '') as thing
    from pg_attribute join pg_class c on c.oid = attrelid
    left join pg_attrdef on adrelid = attrelid and adnum = attnum
    where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'v') and attnum > 0
      and not attisdropped and c.relname !~ 'yoyo'
    union all
    select indexdef from pg_indexes where schemaname = 'public' and tablename !~ 'yoyo'
    union all
    select conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid)
    from pg_constraint
    where connamespace = 'public'::regnamespace and conrelid::regclass::text !~ 'yoyo'
    union all
    select pg_get_functiondef(oid) from pg_proc where pronamespace = 'public'::regnamespace
    union all
    select viewname || definition from pg_views where schemaname = 'public'
    order by 1
"""
SELECT_MARKS = "select migration_id from _yoyo_migration order by 1"


async def asked(url: str, query: str) -> list[Any]:
    """Answer the first column of a query."""
    connection = await asyncpg.connect(url)
    try:
        return [row[0] for row in await connection.fetch(query)]
    finally:
        await connection.close()


numbers = itertools.count(1)


@pytest.fixture
async def schema(database_url: str) -> list[Any]:
    """The schema as it should be."""
    right = await asked(database_url, SELECT_SCHEMA)
    assert len(right) > 50
    return right


async def migrates(url: str, folder: Path = ROOT) -> asyncio.subprocess.Process:
    """Start a process that migrates, with the files of a folder."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", MIGRATE, str(folder), url,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )


async def test_four_at_once_make_one_schema(empty_url: str, schema: list[Any]) -> None:
    """Four processes that start together on an empty database all succeed, and the schema is
    right."""
    processes = [await migrates(empty_url) for _ in range(4)]
    said = [await process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    assert said == [(b"", b"")] * 4
    assert await asked(empty_url, SELECT_SCHEMA) == schema
    files = sorted(path.stem for path in (ROOT / "sql").glob("[0-9]*.sql"))
    assert await asked(empty_url, SELECT_MARKS) == files


async def test_twice_changes_nothing(database_url: str, schema: list[Any]) -> None:
    """Migrating a database that is up to date leaves schema, marks and data as they are."""
    await asked(database_url, "insert into users (username) values ('kept')")
    marks = await asked(database_url, SELECT_MARKS)
    tables = "select oid from pg_class where relkind in ('r', 'v', 'i') order by oid"
    before = await asked(database_url, tables)
    for _ in range(2):
        await asyncio.to_thread(migrate, database_url, messenger.SQL)
    assert await asked(database_url, SELECT_SCHEMA) == schema
    assert await asked(database_url, SELECT_MARKS) == marks
    assert await asked(database_url, tables) == before
    assert await asked(database_url, "select username from users") == ["kept"]


async def test_lock_of_a_dead_server_is_broken(database_url: str, schema: list[Any]) -> None:
    """A row that a killed server left in yoyo's lock table stops nobody."""
    await asked(
        database_url, "insert into yoyo_lock (locked, ctime, pid) values (1, now(), 999999999)"
    )
    async with asyncio.timeout(SERVE_SECONDS):
        await asyncio.to_thread(migrate, database_url, messenger.SQL)
    assert await asked(database_url, "select pid from yoyo_lock") == []
    assert await asked(database_url, SELECT_SCHEMA) == schema


async def test_migration_that_was_applied_but_not_marked_runs_again(
    database_url: str, schema: list[Any]
) -> None:
    """A migration whose process was killed before marking it runs again, over what is there, and
    the data stay."""
    marks = await asked(database_url, SELECT_MARKS)
    await asked(database_url, "insert into users (username) values ('kept')")
    await asked(database_url, "delete from _yoyo_migration")
    await asyncio.to_thread(migrate, database_url, messenger.SQL)
    assert await asked(database_url, SELECT_SCHEMA) == schema
    assert await asked(database_url, SELECT_MARKS) == marks
    assert await asked(database_url, "select username from users") == ["kept"]


@pytest.mark.parametrize("obstacle", ["participants", "message_words", "message_view"])
async def test_kill_in_the_middle_needs_no_hand(
    empty_url: str, schema: list[Any], obstacle: str
) -> None:
    """After a server was killed half-way through a migration the next one completes it."""
    blocker = await asyncpg.connect(empty_url)
    # A table of this name that is not committed yet: who wants to make one waits for it.
    await blocker.execute(f"begin; create table {obstacle} ()")
    process = await migrates(empty_url)
    async with asyncio.timeout(SERVE_SECONDS):
        await until_waiting(blocker)
    assert process.returncode is None
    process.kill()
    await process.communicate()
    await blocker.close()
    async with asyncio.timeout(SERVE_SECONDS):
        await asyncio.to_thread(migrate, empty_url, messenger.SQL)
    assert await asked(empty_url, SELECT_SCHEMA) == schema


BEFORE_EACH_START = {"as they were": "select 1", "changed": "delete from schema_files"}


@pytest.mark.parametrize("texts", BEFORE_EACH_START)
async def test_restart_beside_a_serving_one_disturbs_nobody(
    database_url: str, alice: Person, bob: Person, texts: str
) -> None:
    """While servers start on a database, with the views and functions that it has or with others,
    the requests of another server on it go on."""
    chat = await alice.opens(bob)
    stop = asyncio.Event()

    async def asks(ask: Callable[[], Awaitable[Any]]) -> None:
        while not stop.is_set():
            await ask()

    asking = [
        asyncio.create_task(asks(ask))
        for ask in (
            lambda: alice.says(chat, "hello"),
            *[lambda: bob.gets("/chats")] * 4,  # it reads each of the views
            lambda: bob.gets(f"/chats/{chat}/messages"),
        )
    ]
    for _ in range(10):
        await asked(database_url, BEFORE_EACH_START[texts])
        await asyncio.to_thread(migrate, database_url, messenger.SQL)
    stop.set()
    await asyncio.gather(*asking)


@pytest.fixture
async def ascii_url(cluster: str) -> AsyncIterator[str]:
    """A database that is not UTF8."""
    name = f"messenger_migrated_{os.getpid()}_{next(numbers)}"
    await on_cluster(
        cluster,
        f"create database {name} template template0 encoding 'SQL_ASCII' locale 'C'"
        " locale_provider libc",
    )
    yield with_database(cluster, name)
    drop_database(cluster, name)


async def test_database_that_is_not_utf8_is_refused_in_one_line(
    ascii_url: str, tmp_path: Path
) -> None:
    """A database of another encoding is left alone, and the server says why it does not start."""
    line = await refused(tmp_path, DATABASE_URL=ascii_url, SECRET_KEY=SECRET_KEY)
    assert "UTF8" in line
    assert "SQL_ASCII" in line
    assert await asked(ascii_url, "select relname from pg_class where relname = 'users'") == []


async def test_failed_migration_leaves_no_lock(empty_url: str, schema: list[Any]) -> None:
    """Where another thing holds a name that a migration needs, the error says so; once that is gone
    the migration succeeds."""
    await asked(empty_url, "create view chats as select 1 as one")
    with pytest.raises(psycopg.Error):
        await asyncio.to_thread(migrate, empty_url, messenger.SQL)
    await asked(empty_url, "drop view chats")
    await asyncio.to_thread(migrate, empty_url, messenger.SQL)
    assert await asked(empty_url, SELECT_SCHEMA) == schema


SELECT_FUNCTIONS = """
    select oid::regprocedure || ' of ' || pg_get_function_arguments(oid) || ' to '
        || pg_get_function_result(oid)
    from pg_proc where pronamespace = 'public'::regnamespace order by 1
"""
SELECT_COMMENT = "select obj_description('message_view'::regclass)"
SELECT_BODIES = "select md5(prosrc) from pg_proc where proname !~ 'yoyo' order by oid"


async def migrates_quietly(url: str, folder: Path) -> None:
    """Migrate with the files of a folder, without a word."""
    process = await migrates(url, folder)
    assert await process.communicate() == (b"", b"")
    assert process.returncode == 0


@pytest.mark.parametrize("commit", [BEFORE_THAT, LAST_RELEASE])
async def test_last_release_goes_on_beside_this_one(
    empty_url: str, tmp_path: Path, commit: str
) -> None:
    """A database that is upgraded keeps what servers of the last release call, as they call it; one
    that starts again leaves the functions of this release in place."""
    last_release = files_of(commit, tmp_path)
    await migrates_quietly(empty_url, last_release)
    before = await asked(empty_url, SELECT_FUNCTIONS)
    comment = await asked(empty_url, SELECT_COMMENT)
    await asyncio.to_thread(migrate, empty_url, messenger.SQL)
    assert set(before) <= set(await asked(empty_url, SELECT_FUNCTIONS))
    assert comment == await asked(empty_url, SELECT_COMMENT)
    bodies = await asked(empty_url, SELECT_BODIES)
    await migrates_quietly(empty_url, last_release)
    assert await asked(empty_url, SELECT_BODIES) == bodies


async def test_last_release_leaves_a_new_database_as_it_is(
    database_url: str, tmp_path: Path
) -> None:
    """A server of the last release puts its functions in place of none in a database that this one
    made, also where they are others."""
    last_release = files_of(LAST_RELEASE, tmp_path)
    await asked(database_url, "create or replace function new_mark() returns text language sql"
                              " volatile as $$ select text 'of this release' $$")
    bodies = await asked(database_url, SELECT_BODIES)
    await migrates_quietly(database_url, last_release)
    assert await asked(database_url, SELECT_BODIES) == bodies


# ---- What a release may change


def broken_rules(ours: Path, released: Path) -> list[str]:
    """Tell which files of the schema break a rule, beside those of the last release: a migration
    stays as it is, a new one has a higher number, and one comes with each change of the others.

    By the number of its schema a server knows whose views and functions are the newer ones.
    """
    before = {path.name: path.read_bytes() for path in released.glob("*.sql")}
    now = {path.name: path.read_bytes() for path in ours.glob("*.sql")}
    number = schema_number(released)
    broken = [name for name, text in before.items() if name[0].isdigit() and now.get(name) != text]
    broken += [name for name in now.keys() - before.keys() if int(name[:4]) <= number]
    if schema_number(ours) == number:
        texts = ("views.sql", "functions.sql")
        broken += [name for name in texts if now[name] != before[name]]
    return sorted(broken)


def test_schema_differs_from_the_last_release_by_new_migrations(tmp_path: Path) -> None:
    """Migrations that were released are as they were, and views and functions are others only where
    there is a new one: else a server of the last release would put its own back."""
    assert broken_rules(messenger.SQL, files_of(LAST_RELEASE, tmp_path) / "sql") == []


@pytest.mark.parametrize(
    ("changes", "broken"),
    [({}, []),
     ({"functions.sql": "-- x"}, ["functions.sql"]),
     ({"views.sql": "-- x"}, ["views.sql"]),
     ({"functions.sql": "-- x", "views.sql": "-- x", "9000_new.sql": "select 1"}, []),
     ({"0001_schema.sql": "-- x", "9000_new.sql": "select 1"}, ["0001_schema.sql"]),
     ({"0003_administration.sql": None}, ["0003_administration.sql"]),
     ({"0002_beside.sql": "select 1", "views.sql": "-- x"}, ["0002_beside.sql", "views.sql"])])
def test_change_that_breaks_a_rule_of_releases_is_seen(
    tmp_path: Path, changes: dict[str, str | None], broken: list[str]
) -> None:
    """The test before sees a changed, a missing and a late migration, and texts without one."""
    ours = tmp_path / "sql"
    shutil.copytree(messenger.SQL, ours)
    for name, text in changes.items():
        if text is None:
            (ours / name).unlink()
        else:
            (ours / name).write_text(text)
    assert broken_rules(ours, messenger.SQL) == broken


# ---- Schemas of higher numbers


def later_files(folder: Path, *migrations: str) -> Path:
    """Write the files of a later release: with these migrations, and another function."""
    later = folder / "later"
    shutil.copytree(messenger.SQL, later)
    for number, text in enumerate(migrations, schema_number(messenger.SQL) + 1):
        (later / f"{number:04}_later.sql").write_text(text)
    with (later / "functions.sql").open("a") as file:
        file.write("create or replace function later() returns int language sql as 'select 1';")
    return later


async def test_older_server_leaves_a_later_schema_as_it_is(
    database_url: str, tmp_path: Path
) -> None:
    """A server whose schema has a lower number than the database's applies nothing."""
    later = later_files(tmp_path, "alter table users add column if not exists later int;")
    (tmp_path / "this").mkdir()
    ours = later_files(tmp_path / "this")  # of this release, with the other function
    await asyncio.to_thread(migrate, database_url, later)
    with (ours / "functions.sql").open("a") as file:
        file.write("create or replace function later() returns int language sql as 'select 2';")
    schema = await asked(database_url, SELECT_SCHEMA)
    noted = await asked(database_url, "select digest from schema_files order by name")
    await asyncio.to_thread(migrate, database_url, ours)
    assert await asked(database_url, SELECT_SCHEMA) == schema
    assert await asked(database_url, "select digest from schema_files order by name") == noted


OUTGROWN = "update schema_needs set oldest = 9999"
MOVED = "update schema_needs set moved_at = now()"


@pytest.mark.parametrize(("change", "reason"), [(OUTGROWN, "schema 9999"), (MOVED, "moved")])
async def test_database_that_needs_another_server_is_refused_in_one_line(
    database_url: str, tmp_path: Path, change: str, reason: str
) -> None:
    """A server does not start on a database that says it is for newer ones, or was moved."""
    await asked(database_url, change)
    line = await refused(tmp_path, DATABASE_URL=database_url, SECRET_KEY=SECRET_KEY)
    assert line.startswith("messenger: DATABASE_URL: ")
    assert reason in line


async def test_serving_server_that_is_outgrown_sends_everybody_away(
    alice: Person, bob: Person, sql: asyncpg.Connection
) -> None:
    """Where the database comes to need newer servers, one that serves turns unready, closes its
    sockets with 1001 and writes nothing; when it may be used again it goes on."""
    chat = await alice.opens(bob)
    line = await alice.listens_live(chat)
    await sql.execute(OUTGROWN)
    async with asyncio.timeout(SOON_SECONDS):
        assert await line.is_closed() == 1001
    await bob.expects(503, "GET", "/health/readiness")
    await bob.says(chat, "refused", 503)
    assert await sql.fetchval("select count(*) from messages") == 0
    await sql.execute("update schema_needs set oldest = 0")
    async with asyncio.timeout(SOON_SECONDS):
        while (await bob.asks("GET", "/health/readiness")).status != 200:
            await asyncio.sleep(0.05)
    await bob.says(chat, "accepted")


async def test_migration_beside_a_backup_lets_those_who_serve_go_on(
    database_url: str, sql: asyncpg.Connection, alice: Person, bob: Person, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A migration that waits for a lock which pg_dump holds says so, and refuses nobody; it is
    applied once the lock is free."""
    chat = await alice.opens(bob)
    await sql.execute("set application_name = 'pg_dump'")
    await sql.execute("begin; lock table messages in access share mode")
    later = later_files(tmp_path, "alter table messages add column if not exists later int;")
    migrating = asyncio.create_task(migrate_when_up(database_url, later))
    async with asyncio.timeout(SOON_SECONDS):
        while "(pg_dump) holds" not in caplog.text:
            await alice.says(chat, "hello")
    for _ in range(20):
        await bob.says(chat, "and still")
    assert not migrating.done()
    await sql.execute("commit")
    async with asyncio.timeout(SERVE_SECONDS):
        await migrating
    assert await sql.fetchval("select count(later) from messages") == 0
