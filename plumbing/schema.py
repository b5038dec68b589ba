"""The schema of a database, and a start that waits for what may pass.

What is started is only what will work: the start connects as those who serve will, and says in a
line what it waits for, or why it cannot be.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

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
POSTGRESQL_VERSION_MIN = 150_000  # as PostgreSQL counts them: 15.0

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


class Sessions:
    """The connections of a migration, which another thread may watch, and end."""

    def __init__(self, url: str) -> None:
        self._conninfo = make_conninfo("", **read_address(url).parameters)
        self._opened: list[psycopg.Connection[Any]] = []
        self._is_ended = False
        self.pids: list[int] = []  # of PostgreSQL's processes

    def open(self) -> psycopg.Connection[Any]:
        """Connect. Raises psycopg.Error."""
        connection = psycopg.connect(self._conninfo, autocommit=True)
        self._opened.append(connection)
        if self._is_ended:
            connection.close()
        settings = [*MIGRATION], [*MIGRATION.values()]
        [(pid, _)] = connection.execute(OPEN_SESSION, settings).fetchall()
        self.pids.append(pid)
        return connection

    def end(self) -> None:
        """Interrupt what runs, which else would go on to wait in PostgreSQL, and hang up."""
        self._is_ended = True
        for connection in self._opened:
            with contextlib.suppress(psycopg.Error, OSError):
                connection.cancel_safe(timeout=CANCEL_SECONDS)
                with socket.socket(fileno=os.dup(connection.fileno())) as line:
                    line.shutdown(socket.SHUT_RDWR)


class Yoyo(PostgresqlPsycopgBackend):  # type: ignore[misc]
    """Yoyo's way to PostgreSQL, over sessions of ours."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        nowhere = DatabaseURI("postgresql", None, None, None, None, "", {})
        super().__init__(nowhere, yoyo.default_migration_table)

    def connect(self, dburi: object) -> psycopg.Connection[Any]:
        """Connect, by the sessions: `dburi` says nothing."""
        return self._sessions.open()

    def copy(self) -> "Yoyo":
        """Connect once more."""
        return Yoyo(self._sessions)

    def lock(self, timeout: float = 0) -> contextlib.AbstractContextManager[None]:
        """Lock nothing: who migrates holds PostgreSQL's own lock."""
        return contextlib.nullcontext()


def migrate(url: str, folder: Path, sessions: Sessions | None = None) -> None:
    """Apply the numbered migrations of a folder; processes that start together wait for each other.

    views.sql and functions.sql are applied after them, each where it has changed or a migration was
    new. What was applied stands in the table schema_files, which a migration makes; who is killed
    before it is noted applies it again. Raises psycopg.Error.
    """
    os.environ.setdefault("LOGNAME", "messenger")  # yoyo asks, and not every user has a name
    sessions = sessions or Sessions(url)
    with sessions.open() as connection:
        connection.execute("select pg_advisory_lock(hashtext('messenger schema'))")
        with Yoyo(sessions) as backend:
            backend.create_lock_table()
            backend.break_lock()  # ours by the lock above: what is left is a dead server's
            files = yoyo.read_migrations(str(folder))
            new = backend.to_apply(files.filter(lambda file: file.id[0].isdigit()))
            backend.apply_migrations_only(new)
        if new:
            log.info("migrations were applied: %s", ", ".join(file.id for file in new))
        noted = connection.execute("select name, digest from schema_files").fetchall()
        applied: dict[str, str] = dict(noted)
        for name in ("views.sql", "functions.sql"):
            text = (folder / name).read_bytes()
            digest = hashlib.sha256(text).hexdigest()
            if applied.get(name) == digest and not new:
                continue  # to apply it again would block the servers that are running
            connection.execute(text)
            connection.execute(
                "insert into schema_files (name, digest) values (%s, %s)"
                " on conflict (name) do update set digest = excluded.digest", (name, digest))


# ---- The start

SELECT_SERVER = """
    select current_setting('server_version_num')::int as version,
           current_setting('server_encoding') as encoding,
           coalesce(has_schema_privilege(public.oid, 'usage'), false) as may_use,
           coalesce(has_schema_privilege(public.oid, 'create'), false) as may_create,
           exists (
               select from pg_class where relnamespace = public.oid and relname = 'schema_files'
           ) as is_made
    from (select to_regnamespace('public')::oid) as public (oid)"""
SELECT_PID = "select pg_backend_pid()"
SELECT_HOLDERS = """
    select array_agg(distinct holder)
    from unnest($1::int[]) as waiting, unnest(pg_blocking_pids(waiting)) as holder"""
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
        await _require_fit(first, second)
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


async def _require_fit(first: Any, second: Any) -> None:
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
    """Log who holds a lock that the sessions wait for, each time that it is another."""
    told = None
    with contextlib.suppress(*FAILURES, TimeoutError):
        while True:
            await asyncio.sleep(SILENT_SECONDS)
            holders = await watcher.fetchval(SELECT_HOLDERS, sessions.pids)
            if holders and holders != told:
                log.warning(
                    "waiting for a lock in PostgreSQL that its process %s holds",
                    ", ".join(map(str, holders)))
            told = holders
