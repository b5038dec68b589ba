"""Any PostgreSQL: connections that are used in turn, commits in groups, the schema.

Every wait is bounded. When PostgreSQL does not answer, for whatever reason, Unavailable is raised:
it is not the caller's fault, and the call may be tried again.
"""

import abc
import asyncio
import contextlib
import hashlib
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import asyncpg
import psycopg
import yoyo
from psycopg.conninfo import make_conninfo
from yoyo.backends.core.postgresql import PostgresqlPsycopgBackend
from yoyo.connections import DatabaseURI

from plumbing.address import POOLED, connect, explain, read_address, shield_libpq
from plumbing.process import StartError

CONNECTIONS_MAX = 10
CONNECT_SECONDS = 1.7
WAIT_SECONDS = 1.8  # for a statement, with its connection: a request never waits over 2 s
START_SECONDS = 15.0  # for a database of one's own that is still starting
START_PAUSE_SECONDS = 0.2
SILENT_SECONDS = 0.5  # for which a start may wait without a word
CANCEL_SECONDS = 0.5
CLOSING_SECONDS = 2.0
WRITE_SECONDS = 1.8  # how long a write is tried again where the connection was lost
WRITE_PAUSE_SECONDS = 0.05
GROUP_ITEMS_MAX = 512  # in one commit
PENDING_MAX = 20_000  # items that wait for a commit
POSTGRESQL_VERSION_MIN = 150_000  # as PostgreSQL counts them: 15.0

# Each statement is planned once, and through its indexes: a plan that was made while a table was
# small would scan it for as long as the connection lives. A function may set otherwise for itself.
PLANS = {
    "plan_cache_mode": "force_generic_plan", "enable_seqscan": "off", "enable_hashjoin": "off",
    "enable_mergejoin": "off",
}

# What each connection has, whatever its role or database has set otherwise.
SESSION = {
    "search_path": "public", "timezone": "UTC", "jit": "off",
    "default_transaction_isolation": "read committed", "synchronous_commit": "on",
    "statement_timeout": str(int(WAIT_SECONDS * 1000)),
    "lock_timeout": str(int(WAIT_SECONDS * 500)),
    "transaction_timeout": "0", "idle_session_timeout": "0",
    # PostgreSQL ends a session within two minutes of the loss of its client's host.
    "tcp_keepalives_idle": "60", "tcp_keepalives_interval": "15", "tcp_keepalives_count": "4",
    **PLANS,
}

log = logging.getLogger("messenger.database")


class Unavailable(Exception):
    """The database is away, or too busy to answer in time."""


ABSENT = "The database cannot be reached right now."

# ---- Connections

# What says that the database is away, also to a connection that was good before ...
AWAY = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.ReadOnlySQLTransactionError,  # a standby, or told to be: maybe its next one is not
    OSError,
)
# ... and what says that it is too busy to answer in time.
BUSY = (
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.LockNotAvailableError,
    asyncpg.DeadlockDetectedError,
    TimeoutError,
)


def is_writable(connection: Any) -> bool:
    """Tell whether a connection can write, by what PostgreSQL says of itself without being asked.
    """
    told = connection.get_settings()
    names = ("default_transaction_read_only", "in_hot_standby")
    return "on" not in [getattr(told, name, "off") for name in names]


class Database:
    """Connections that are used in turn; not one of them is held by anybody for longer than a call.

    Any failure to connect means that the database is away. That is logged once, with its reason,
    and so is its return.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._idle: list[Any] = []  # connections that nobody uses
        self._free = asyncio.Semaphore(CONNECTIONS_MAX)  # how many more may be in use
        self._doubtful: set[Any] = set()  # connections made before the database was away
        self._in_use: set[Any] = set()
        self._away = ""  # the reason, while the database is away

    async def close(self) -> None:
        """Close every connection, by force where one does not answer."""
        with contextlib.suppress(*AWAY, *BUSY):
            async with asyncio.timeout(CLOSING_SECONDS):
                for _ in range(CONNECTIONS_MAX):  # once nobody uses one
                    await self._free.acquire()
                await asyncio.gather(*[connection.close() for connection in self._idle])
        for connection in self._idle:
            connection.terminate()

    async def _connect(self) -> Any:
        """Connect. Raises Unavailable, whatever the reason."""
        try:
            return await connect(self.url, SESSION, CONNECT_SECONDS)
        except Exception as error:
            self._lose(error)
            raise Unavailable(ABSENT) from error

    def _lose(self, error: Exception) -> None:
        """Take note that the database is away: every connection made until now is in doubt."""
        if not self._away:
            self._away = type(error).__name__
            log.warning("the database is away (%s)", self._away)
        for connection in self._idle:
            connection.terminate()
        self._idle.clear()
        self._doubtful |= self._in_use

    async def rows(self, query: str, *arguments: Any) -> list[Any]:
        """Run a statement and answer its rows.

        Raises Unavailable, asyncpg.PostgresError for the rest.
        """
        try:
            async with asyncio.timeout(WAIT_SECONDS), self._free:
                while self._idle and self._idle[-1].is_closed():
                    self._idle.pop()
                connection = self._idle.pop() if self._idle else await self._connect()
                return await self._fetch(connection, query, arguments)
        except asyncpg.DataError:  # an InterfaceError by class, but about a value
            raise
        except (*AWAY, *BUSY) as error:
            log.debug("%r", error)
            raise Unavailable(ABSENT) from error

    async def _fetch(self, connection: Any, query: str, arguments: Sequence[Any]) -> list[Any]:
        """Run a statement on a connection; where no answer came the connection is dropped."""
        is_sound = False
        self._in_use.add(connection)
        try:
            found: list[Any] = await connection.fetch(query, *arguments)
            is_sound = True
            return found
        except asyncpg.DataError:
            is_sound = not connection.is_closed()
            raise
        except AWAY as error:
            self._lose(error)
            raise
        except asyncpg.PostgresError:
            is_sound = not connection.is_closed()
            raise
        finally:
            self._in_use.discard(connection)
            self._put_back(connection, is_sound)

    def _put_back(self, connection: Any, is_sound: bool) -> None:
        """Keep a connection for the next statement, or close it."""
        is_doubtful = connection in self._doubtful
        self._doubtful.discard(connection)
        if not is_sound or is_doubtful:
            connection.terminate()
            return
        self._idle.append(connection)
        if self._away and is_writable(connection):
            self._away = ""
            log.warning("the database is back")

    async def row(self, query: str, *arguments: Any) -> Any:
        """Run a statement and answer its first row, or None; raises what `rows` does."""
        found = await self.rows(query, *arguments)
        return found[0] if found else None

    async def value(self, query: str, *arguments: Any) -> Any:
        """Run a statement and answer its only value, or None; raises what `rows` does."""
        found = await self.rows(query, *arguments)
        return found[0][0] if found else None


async def repeat(
    work: Callable[..., Awaitable[None]], *arguments: Any, seconds: float,
    woken: asyncio.Event | None = None,
) -> None:
    """Await `work` every so many seconds, or when woken, even where it fails."""
    woken = woken or asyncio.Event()
    while True:
        try:
            await work(*arguments)
        except Unavailable:
            pass  # the next round does it
        except Exception:
            log.exception("%s failed", work.__qualname__)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await woken.wait()
        woken.clear()


# ---- Commits in groups

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")
# An item, whom to tell what became of it, until when it is tried (by the loop's clock).
Entry = tuple[Item, Callable[[Outcome | Exception], None], float]


def is_held(error: Exception) -> bool:
    """Tell whether a statement failed because somebody else held the lock that it needs."""
    return isinstance(error.__cause__, asyncpg.LockNotAvailableError)


@dataclass(slots=True)
class Written(Generic[Item, Outcome]):
    """A group that was committed, or why it was not; empty where its parts were written alone."""

    group: list[Entry[Item, Outcome]]
    rows: list[Any] = field(default_factory=list)
    again: bool = False  # whether the items may have been committed before
    error: Exception | None = None


class GroupWriter(abc.ABC, Generic[Item, Outcome]):
    """Commits in groups: of what piled up while another commit ran.

    There is no timer: an idle writer commits a lone item at once. An item that makes its group fail
    fails alone, for the group is sent again in parts; a group whose answer was lost is sent again
    as it is. So committing an item twice must be the same as once.

    A subclass says how: `commit`, `publish` and `lock_of`.
    """

    def __init__(self) -> None:
        self._pending: deque[Entry[Item, Outcome]] = deque()
        self._running: asyncio.Task[None] | None = None

    @abc.abstractmethod
    async def commit(self, items: list[Item]) -> list[Any]:
        """Commit a group; answer a row for each item. Raises Unavailable, asyncpg.PostgresError."""

    @abc.abstractmethod
    def publish(
        self, items: list[Item], rows: list[Any], again: bool
    ) -> Sequence[Outcome | Exception]:
        """Let everybody know what became of items, by their rows; answer the outcome of each.

        `again` tells whether they may have been committed before. It must not wait.
        """

    @abc.abstractmethod
    def lock_of(self, item: Item) -> Hashable:
        """Tell what committing an item locks."""

    def put(self, item: Item, answer: Callable[[Outcome | Exception], None]) -> None:
        """Add an item. Raises Unavailable where too much waits.

        `answer` is called with its outcome or the exception that prevented it, right after the item
        is published: what both write leaves together. `answer` must not wait.
        """
        if len(self._pending) >= PENDING_MAX:
            raise Unavailable("Too much is waiting to be written.")
        deadline = asyncio.get_running_loop().time() + WRITE_SECONDS
        self._pending.append((item, answer, deadline))
        if self._running is None:
            self._running = asyncio.create_task(self._run())

    async def submit(self, item: Item) -> Outcome:
        """Add an item, and wait for its outcome; raises the exception that prevented it."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

        def settle(outcome: Outcome | Exception) -> None:
            if future.done():
                return
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        self.put(item, settle)
        return await future

    async def finish(self) -> None:
        """Wait until everything that was put is answered."""
        while self._running is not None:
            await asyncio.wait([self._running])

    async def _run(self) -> None:
        """Write group after group. One is published while the next is already with PostgreSQL, so
        that neither side waits for the other.
        """
        written: Written[Item, Outcome] | None = None
        size = 0
        try:
            while self._pending or written is not None:
                writing = None
                if self._pending:
                    # Behind another group take half: else the two sides take turns, and each waits
                    # for the other.
                    share = (size + len(self._pending) + 1) // 2 if written else GROUP_ITEMS_MAX
                    size = min(len(self._pending), share, GROUP_ITEMS_MAX)
                    group = [self._pending.popleft() for _ in range(size)]
                    writing = asyncio.create_task(self._write(group))
                    await asyncio.sleep(0)  # now it is on its way
                if written is not None:
                    self._publish_group(written)
                written = await writing if writing is not None else None
        finally:
            self._running = None

    async def _write(self, group: list[Entry[Item, Outcome]]) -> "Written[Item, Outcome]":
        """Commit a group; it is left to publish it. Never raises.

        A failed group is divided by lock, so that a held lock delays only its own items; within one
        lock, item by item in order. Its parts are published here.
        """
        try:
            rows, again = await self._persist([item for item, _, _ in group], group[0][2])
        except Exception as error:
            is_absent = isinstance(error, Unavailable)
            parts: dict[Hashable, list[Entry[Item, Outcome]]] = {}
            for entry in group:
                parts.setdefault(self.lock_of(entry[0]), []).append(entry)
            if len(parts) > 1 and (is_held(error) or not is_absent):
                await asyncio.gather(*map(self._write_part, parts.values()))
            elif len(group) > 1 and not is_absent:
                for entry in group:
                    await self._write_part([entry])
            else:
                return Written(group, error=error)
            return Written([])
        return Written(group, rows, again)

    async def _write_part(self, part: list[Entry[Item, Outcome]]) -> None:
        self._publish_group(await self._write(part))

    def _publish_group(self, written: "Written[Item, Outcome]") -> None:
        """Publish a group that was written, then answer each of its items."""
        items = [item for item, _, _ in written.group]
        outcomes: Sequence[Outcome | Exception]
        if written.error is not None:
            outcomes = [written.error] * len(items)
        else:
            try:
                outcomes = self.publish(items, written.rows, written.again)
            except Exception as error:
                log.exception("what was committed could not be published")
                outcomes = [error] * len(items)
        _answer(written.group, outcomes)

    async def _persist(self, items: list[Item], deadline: float) -> tuple[list[Any], bool]:
        """Commit, again while the connection is lost, until the first item's deadline.

        Answers the rows, and whether the items may have been committed before.
        """
        again = False
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    return await self.commit(items), again
            except TimeoutError:
                raise Unavailable(ABSENT) from None
            except Unavailable as error:
                if is_held(error) or asyncio.get_running_loop().time() > deadline:
                    raise
            again = True
            await asyncio.sleep(WRITE_PAUSE_SECONDS)


def _answer(group: list[Entry[Item, Outcome]], outcomes: Sequence[Outcome | Exception]) -> None:
    """Call back for each item."""
    for (_, answer, _), outcome in zip(group, outcomes, strict=True):
        try:
            answer(outcome)
        except Exception:
            log.exception("an outcome could not be told")


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
    with contextlib.suppress(*AWAY, *BUSY):
        while True:
            await asyncio.sleep(SILENT_SECONDS)
            holders = await watcher.fetchval(SELECT_HOLDERS, sessions.pids)
            if holders and holders != told:
                log.warning(
                    "waiting for a lock in PostgreSQL that its process %s holds",
                    ", ".join(map(str, holders)))
            told = holders
