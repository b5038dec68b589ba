"""The schema of a database, and a start that waits for what may pass.

What is started is only what will work: the start connects as those who serve will, and says in a
line what it waits for, or why it cannot be.

The number of a schema is that of its newest migration. A server leaves a schema of a higher number
as it is, and uses it unless the database says that it needs newer servers.
"""

import asyncio
import contextlib
import functools
import hashlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import psycopg
import yoyo
from psycopg.conninfo import make_conninfo
from yoyo.backends.core.postgresql import PostgresqlPsycopgBackend
from yoyo.connections import DatabaseURI

from plumbing.address import POOLED, connect, explain, read_address, shield_libpq
from plumbing.database import CONNECT_SECONDS, WAIT_SECONDS, Database, Unavailable, is_writable
from plumbing.process import StartError

START_SECONDS = 15.0  # for a database of one's own that is still starting
START_PAUSE_SECONDS = 0.2
SILENT_SECONDS = 0.5  # for which a start may wait without a word
CANCEL_SECONDS = 0.5
LOCK_PAUSE_SECONDS_MIN, LOCK_PAUSE_SECONDS_MAX = 0.5, 5.0
WATCH_SECONDS = 0.1
POSTGRESQL_VERSION_MIN = 150_000  # as PostgreSQL counts them: 15.0

T = TypeVar("T")
log = logging.getLogger("messenger.schema")

# ---- The schema

MIGRATION = {
    "search_path": "public", "statement_timeout": "0", "lock_timeout": "0",
    "transaction_timeout": "0", "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0", "default_transaction_isolation": "read committed",
    "timezone": "UTC",
}
OPEN_SESSION = """
    select pg_backend_pid(), count(set_config(name, value, false))
    from unnest(%s::text[], %s::text[]) as given (name, value)
    where current_setting(name, true) is not null"""
SET_SHORT_LOCKS = "set lock_timeout = '300ms'"  # for which who serves may wait, too
SELECT_NUMBER = "select coalesce(max(left(migration_id, 4)), '0')::int from _yoyo_migration"


class Sessions:
    """The connections of a migration, which another thread may watch, and end."""

    def __init__(self, url: str) -> None:
        self._conninfo = make_conninfo("", **read_address(url).parameters)
        self._opened: list[psycopg.Connection[Any]] = []
        self._ended = threading.Event()
        self.pids: list[int] = []  # of PostgreSQL's processes

    def open(self) -> psycopg.Connection[Any]:
        """Connect. Raises psycopg.Error."""
        connection = psycopg.connect(self._conninfo, autocommit=True)
        self._opened.append(connection)
        if self._ended.is_set():
            connection.close()
        settings = [*MIGRATION], [*MIGRATION.values()]
        [(pid, _)] = connection.execute(OPEN_SESSION, settings).fetchall()
        self.pids.append(pid)
        return connection

    def end(self) -> None:
        """Interrupt what runs, which else would go on to wait in PostgreSQL, and hang up."""
        self._ended.set()
        for connection in self._opened:
            with contextlib.suppress(psycopg.Error, OSError):
                connection.cancel_safe(timeout=CANCEL_SECONDS)
                with socket.socket(fileno=os.dup(connection.fileno())) as line:
                    line.shutdown(socket.SHUT_RDWR)

    def until_unlocked(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do what takes locks, and again where others hold one: whoever serves queues behind who
        waits for a lock, so nobody waits for long, and they have their turn in between.
        """
        pause = LOCK_PAUSE_SECONDS_MIN
        while True:
            try:
                return work(*arguments)
            except psycopg.errors.LockNotAvailable:
                if self._ended.wait(pause):
                    raise
            pause = min(2 * pause, LOCK_PAUSE_SECONDS_MAX)


class Yoyo(PostgresqlPsycopgBackend):  # type: ignore[misc]
    """Yoyo's way to PostgreSQL, over sessions of ours."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        nowhere = DatabaseURI("postgresql", None, None, None, None, "", {})
        super().__init__(nowhere, yoyo.default_migration_table)

    def connect(self, dburi: object) -> psycopg.Connection[Any]:
        """Connect, by the sessions: `dburi` says nothing."""
        connection = self._sessions.open()
        connection.execute(SET_SHORT_LOCKS)
        return connection

    def copy(self) -> "Yoyo":
        """Connect once more."""
        return Yoyo(self._sessions)

    def lock(self, timeout: float = 0) -> contextlib.AbstractContextManager[None]:
        """Lock nothing: who migrates holds PostgreSQL's own lock."""
        return contextlib.nullcontext()


@functools.cache
def schema_number(folder: Path) -> int:
    """Tell the number of the schema that a folder's files make."""
    return max(int(path.name[:4]) for path in folder.glob("[0-9]*.sql"))


def migrate(url: str, folder: Path, sessions: Sessions | None = None) -> None:
    """Apply the numbered migrations of a folder; processes that start together wait for each other.

    views.sql and functions.sql are applied after them, each where it has changed or a migration was
    new. What was applied stands in the table schema_files, which a migration makes; who is killed
    before it is noted applies it again. A schema of a higher number stays as it is.
    Raises psycopg.Error.
    """
    os.environ.setdefault("LOGNAME", "messenger")  # yoyo asks, and not every user has a name
    sessions = sessions or Sessions(url)
    with sessions.open() as connection:
        connection.execute("select pg_advisory_lock(hashtext('messenger schema'))")
        connection.execute(SET_SHORT_LOCKS)
        is_new = sessions.until_unlocked(_apply_migrations, sessions, folder)
        for name in ("views", "functions") if is_new is not None else ():
            sessions.until_unlocked(_apply_text, connection, folder, name, is_new)


def _apply_migrations(sessions: Sessions, folder: Path) -> bool | None:
    """Apply the migrations that a database lacks; tell whether there were any, and None where its
    schema has a higher number. Raises psycopg.Error.
    """
    with Yoyo(sessions) as backend:
        backend.create_lock_table()
        backend.break_lock()  # ours by the lock above: what is left is a dead server's
        files = yoyo.read_migrations(str(folder))
        new = backend.to_apply(files.filter(lambda file: file.id[0].isdigit()))
        [(number,)] = backend.execute(SELECT_NUMBER).fetchall()
        if number > schema_number(folder):
            return None
        backend.apply_migrations_only(new)
        if new:
            log.info("migrations were applied: %s", ", ".join(file.id for file in new))
        return bool(new)


def _apply_text(
    connection: psycopg.Connection[Any], folder: Path, name: str, is_forced: bool | None
) -> None:
    """Apply views.sql or functions.sql, where the database has another. Raises psycopg.Error."""
    connection.rollback()  # what an attempt before may have begun
    noted = connection.execute("select digest from schema_files where name = %s", [name]).fetchone()
    digest = hashlib.sha256((folder / f"{name}.sql").read_bytes()).hexdigest()
    if noted == (digest,) and not is_forced:
        return  # to apply it again would block the servers that are running
    connection.execute((folder / f"{name}.sql").read_bytes())
    connection.execute(
        "insert into schema_files (name, digest) values (%s, %s)"
        " on conflict (name) do update set digest = excluded.digest", (name, digest))


# ---- Which servers a database needs

SELECT_NEEDS = "select oldest, moved_at is not null as is_moved from schema_needs"


def _misfit(needs: Any, folder: Path) -> str:
    """Tell why a server with the files of a folder may not use a database; empty if it may."""
    if needs["is_moved"]:
        return "its data were moved to another PostgreSQL, and are used there"
    number = schema_number(folder)
    if needs["oldest"] > number:
        return f"it needs a newer messenger, of schema {needs['oldest']}; this one is of {number}"
    return ""


async def is_outgrown(database: Database, folder: Path) -> bool:
    """See whether a database still is for servers with the files of a folder, and while it is not,
    let every statement be refused. Raises Unavailable.
    """
    try:
        [needs] = await database.fetch(SELECT_NEEDS)
    except asyncpg.UndefinedTableError:  # an older database was put in the place of ours
        return False
    refusal = _misfit(needs, folder)
    if refusal != database.refusal:
        log.warning("the database is %s", f"refused: {refusal}" if refusal else "used again")
        database.refusal = refusal
    return bool(refusal)


# ---- The start

SELECT_SERVER = """
    select current_setting('server_version_num')::int as version,
           current_setting('server_encoding') as encoding,
           coalesce(has_schema_privilege(public.oid, 'usage'), false) as may_use,
           coalesce(has_schema_privilege(public.oid, 'create'), false) as may_create,
           exists (
               select from pg_class where relnamespace = public.oid and relname = 'schema_files'
           ) as is_made,
           to_regclass('public.schema_needs') is not null as has_needs
    from (select to_regnamespace('public')::oid) as public (oid)"""
SELECT_PID = "select pg_backend_pid()"
SELECT_HOLDERS = """
    select string_agg(distinct holder || coalesce(' (' || nullif(application_name, '') || ')', ''),
                      ', ')
    from unnest($1::int[]) as waiting
    cross join unnest(pg_blocking_pids(waiting)) as holder
    left join pg_stat_activity on pid = holder"""
SELECT_APPLIED = "select name from schema_files"

FAILURES = (
    OSError, ValueError, Unavailable, asyncpg.PostgresError, asyncpg.InterfaceError,
    asyncpg.InternalClientError, psycopg.Error,
)


class Unfit(Exception):
    """A database that will not do, in words fit to be shown."""


async def migrate_when_up(url: str, folder: Path, name: str = "DATABASE_URL") -> None:
    """Bring the schema of a database up to date, and see that what serves can use it.

    What may pass is waited for, and the log says so. Raises StartError, with the name of where the
    database was set.
    """
    shield_libpq()
    if unused := read_address(url).unused:
        log.warning("%s: without effect here: %s", name, ", ".join(unused))
    deadline = time.monotonic() + START_SECONDS
    told = ""
    while True:
        try:
            return await _migrate_once(url, folder)
        except Unfit as error:
            raise StartError(f"{name}: {error}") from None
        except FAILURES as error:
            reason, may_pass = _explain(error)
            if not may_pass or time.monotonic() > deadline:
                raise StartError(f"{name}: {reason}") from None
        if reason != told:
            log.warning("waiting for PostgreSQL: %s", reason)
            told = reason
        await asyncio.sleep(START_PAUSE_SECONDS)


def _explain(error: Exception) -> tuple[str, bool]:
    """Tell what failed, and whether that may pass."""
    if isinstance(error, Unavailable) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    reason, may_pass = explain(error)
    if isinstance(error, psycopg.Error) and error.diag.message_primary:  # logged in: all was right
        reason = f"the schema cannot be made: {error.diag.message_primary.splitlines()[0]}"
    return reason, may_pass


async def _migrate_once(url: str, folder: Path) -> None:
    """Look at a database, migrate it, and use it. Raises Unfit and each of FAILURES."""
    async with contextlib.AsyncExitStack() as stack:
        waiting = asyncio.get_running_loop().call_later(
            SILENT_SECONDS, log.warning, "waiting for PostgreSQL to let us in")
        stack.callback(waiting.cancel)
        first, second = [await _bare_connection(url, stack) for _ in range(2)]
        await _require_fit(first, second, folder)
        waiting.cancel()
        await _migrate_watched(url, folder, first)
    database = Database(url)
    try:
        await database.rows(SELECT_APPLIED)
    finally:
        await database.close()


async def _bare_connection(url: str, stack: contextlib.AsyncExitStack) -> Any:
    """Connect, and set nothing: behind some poolers that would be set for others."""
    connection = await connect(url, {}, CONNECT_SECONDS)
    stack.callback(connection.terminate)
    return connection


async def _require_fit(first: Any, second: Any, folder: Path) -> None:
    """Look at the server, over two connections. Raises Unfit where it will not do, asyncpg's
    ReadOnlySQLTransactionError where it may do later.
    """
    async with asyncio.timeout(WAIT_SECONDS):
        if not await _are_sessions(first, second):
            raise Unfit(POOLED)
        server = await first.fetchrow(SELECT_SERVER)
    if server["version"] < POSTGRESQL_VERSION_MIN:
        raise Unfit(f"PostgreSQL 15 or later is needed, not {server['version'] // 10_000}")
    if server["encoding"] != "UTF8":
        raise Unfit(f"the database must be in UTF8, not {server['encoding']}")
    if not server["may_use"] or not (server["may_create"] or server["is_made"]):
        raise Unfit("the user needs the rights usage and create on the database's schema public")
    if server["has_needs"]:
        for needs in await first.fetch(SELECT_NEEDS):
            if refusal := _misfit(needs, folder):
                raise Unfit(refusal)
    if not is_writable(first):
        raise asyncpg.ReadOnlySQLTransactionError


async def _are_sessions(first: Any, second: Any) -> bool:
    """Tell whether each of two connections has a process of PostgreSQL for itself.

    Behind a pooler that lends one out by the transaction both get the same one, or each another
    every time, whichever way it chooses: twice in a row, and in turns.
    """
    pids = [
        [await each.fetchval(SELECT_PID) for each in (first, first, second)] for _ in range(3)]
    return {(a == b, b == c) for a, b, c in pids} == {(True, False)}


async def _migrate_watched(url: str, folder: Path, watcher: Any) -> None:
    """Migrate in a thread; say what that waits for, and interrupt it when cancelled."""
    sessions = Sessions(url)
    migrating = asyncio.create_task(asyncio.to_thread(migrate, url, folder, sessions))
    watching = asyncio.create_task(_tell_holders(watcher, sessions))
    try:
        await asyncio.shield(migrating)
    finally:
        watching.cancel()
        while not migrating.done():
            await asyncio.to_thread(sessions.end)
            await asyncio.wait([migrating], timeout=START_PAUSE_SECONDS)


async def _tell_holders(watcher: Any, sessions: Sessions) -> None:
    """Log who holds a lock that the sessions wait for, each time that it is another; not what is
    held for a moment only.
    """
    told = before = None
    with contextlib.suppress(*FAILURES, TimeoutError):
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            holders = await watcher.fetchval(SELECT_HOLDERS, sessions.pids)
            if holders and holders == before != told:
                log.warning("waiting for a lock in PostgreSQL that its process %s holds", holders)
                told = holders
            before = holders
