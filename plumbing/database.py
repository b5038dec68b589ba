"""Any PostgreSQL: connections that are used in turn, and statements on them.

Every wait is bounded. When PostgreSQL does not answer, for whatever reason, Unavailable is raised:
it is not the caller's fault, and the call may be tried again.
"""

import asyncio
import contextlib
import logging
import math
import os
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import asyncpg

from plumbing import metrics
from plumbing.address import connect
from plumbing.deadline import deadline, party
from plumbing.queues import Queues

CONNECTIONS_MAX = 10  # of a process, where nobody says otherwise
CONNECT_SECONDS = 5.0  # which no request waits for: on a slow line it takes several round trips
RETRY_SECONDS = 0.2  # before work that found the database away is tried again
RECONNECT_SECONDS = 0.1  # after a failure to connect, until the next try
FULL_SECONDS = 1.0  # the same where some connections are open, and more are refused
WAIT_SECONDS = 1.8  # for a statement outside of a request, and for any by PostgreSQL's own clock
TEND_SECONDS = 0.25
READ_SECONDS = 0.01  # in which an answer that has come already is read
QUIET_SECONDS = 5.0  # after which an idle connection is asked whether it still answers
LEAST_SECONDS = 0.05  # for a statement: one that is cancelled costs its connection
CLOCK_SECONDS = 1.0  # between two looks at the database's clock
DOUBT_SECONDS = 0.5  # without an answer on any connection: each idle one is asked
SILENCE_SECONDS = 1.5  # and then the database is away
FAR_SECONDS = 0.05  # a round trip that makes it worth while to prepare statements ahead
FAR_SPARES = 3  # idle connections there
FAR_QUERIES_MAX = 90  # prepared ahead; asyncpg keeps 100 on a connection
COMPLAINT_SECONDS = 60.0  # before the same trouble is logged again
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # seconds, seconds, probes
UNACKNOWLEDGED_MILLISECONDS = 10_000  # data, until the kernel gives a connection up
CLOSING_SECONDS = 2.0

# Each statement is planned once, and through its indexes: a plan that was made while a table was
# small would scan it for as long as the connection lives. A bitmap is made of all that an index
# has, even where the first hundred rows are enough. A function may set otherwise for itself.
PLANS = {
    "plan_cache_mode": "force_generic_plan", "enable_seqscan": "off", "enable_hashjoin": "off",
    "enable_mergejoin": "off", "enable_bitmapscan": "off",
}

# What each connection has, whatever its role or database has set otherwise.
SESSION = {
    "search_path": "public", "timezone": "UTC", "jit": "off",
    "max_parallel_workers_per_gather": "0",  # other statements need the cores
    "default_transaction_isolation": "read committed", "synchronous_commit": "on",
    "statement_timeout": str(int(WAIT_SECONDS * 1000)),
    "lock_timeout": str(int(WAIT_SECONDS * 500)),
    "transaction_timeout": "0", "idle_session_timeout": "0",
    # PostgreSQL ends a session within two minutes of the loss of its client's host.
    "tcp_keepalives_idle": "60", "tcp_keepalives_interval": "15", "tcp_keepalives_count": "4",
    **PLANS,
}

Result = TypeVar("Result")
log = logging.getLogger("messenger.database")


class Unavailable(Exception):
    """The database is away, or too busy to answer in time."""


ABSENT = "The database cannot be reached right now."

# ---- What is wrong, by SQLSTATE (appendix A of PostgreSQL's manual)

# What says that the database is away, also to a connection that was good before: a lost connection,
# one that was ended, a standby or whatever else can only be read (maybe the next one is not) ...
AWAY_STATES = ("08", "25006", "25P0", "57P")
LOST_STATES = ("08",)  # asyncpg's own: nobody knows what became of the statement
AWAY_ERRORS = (asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)
# ... and what says that it cannot now: deadlocks, no disk or memory, held locks, cancelled, I/O.
BUSY_STATES = ("40", "53", "55006", "55P03", "57", "58")
GRAVE_STATES = ("53", "58")  # of these, what an operator must hear of


def has_state(error: BaseException, states: tuple[str, ...]) -> bool:
    """Tell whether PostgreSQL said one of these, or of their classes."""
    return isinstance(error, asyncpg.PostgresError) and str(error.sqlstate).startswith(states)


def is_away(error: BaseException) -> bool:
    """Tell whether an error says that its connection will not do any more."""
    is_lost = isinstance(error, AWAY_ERRORS) and not isinstance(error, TimeoutError)
    return is_lost or has_state(error, AWAY_STATES)


def is_unavailable(error: Exception) -> bool:
    """Tell whether an error is the database's own: away, or too busy to answer in time."""
    return isinstance(error, TimeoutError) or is_away(error) or has_state(error, BUSY_STATES)


def is_open(error: BaseException | None) -> bool:
    """Tell whether PostgreSQL may still run the statement that failed with an error."""
    if isinstance(error, asyncpg.PostgresError):
        return has_state(error, LOST_STATES)
    return error is not None


def reason_of(error: BaseException) -> str:
    """Name the reason of a failure in a line for whoever runs the server.

    PostgreSQL's own words name at most a role, a database or a file.
    """
    if isinstance(error, asyncpg.PostgresError):
        return f"{str(error).partition(chr(10))[0]}, SQLSTATE {error.sqlstate}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno).lower()
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return type(error).__name__


# ---- Connections


def is_writable(connection: Any) -> bool:
    """Tell whether a connection can write, by what PostgreSQL says of itself without being asked.
    """
    told = connection.get_settings()
    names = ("default_transaction_read_only", "in_hot_standby")
    return "on" not in [getattr(told, name, "off") for name in names]


def keep_alive(connection: Any) -> None:
    """Let the kernel notice that the other end of a connection is gone."""
    wire = connection._transport.get_extra_info("socket")
    if wire.family not in (socket.AF_INET, socket.AF_INET6):
        return
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = KEEPALIVE | {"TCP_USER_TIMEOUT": UNACKNOWLEDGED_MILLISECONDS}
    for name, value in options.items():
        if hasattr(socket, name):  # not every system has each
            wire.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


ASK = "select clock_timestamp()"  # whether there is an answer, and the time there
# asyncpg asks PostgreSQL for what it does not know of a type, in half a dozen round trips.
KNOW_TYPES = """
    select null::smallint[], null::int[], null::bigint[], null::bool[], null::text[], null::uuid[],
        null::timestamptz[]"""


@dataclass(slots=True, eq=False)
class Pooled:
    """A connection of a pool; times are by the loop's clock."""

    connection: Any
    generation: int  # the pool's when it was opened
    heard_at: float  # when it last answered
    asked_at: float = 0.0  # when it was last lent


class Pool:
    """Connections that are used in turn, the one used last first.

    Tasks of its own open them, as calls need them: a call waits until its deadline, and what was
    begun for it is there for the next. Where PostgreSQL allows no more, calls share what there is.

    The database is away when no connection can be had, when one is told so, or when none answers.
    Then a new generation begins: no connection of an older one is used again. Each reason is logged
    once, and so is the return.
    """

    def __init__(self, url: str, size: int, queries: Iterable[str]) -> None:
        self.url = url
        self._size = size
        self._queries = list(queries)[:FAR_QUERIES_MAX]  # to prepare ahead on a far database
        self._idle: list[Pooled] = []
        self._lent: set[Pooled] = set()
        # Calls that wait for a connection, by whom they are for.
        self._waiting: Queues[asyncio.Future[Pooled]] = Queues()
        self._opening: set[asyncio.Task[None]] = set()
        self._tending: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False
        self._dropped = asyncio.Event()  # a connection was given up
        self._generation = 0
        self._count = 0  # of this generation's connections, idle and lent
        self._is_paused = False  # after a failure to connect
        self._heard_at = 0.0  # when any connection last answered
        self._reasons: set[str] = set()  # logged ones, while the database is away
        self._complaints: dict[str, float] = {}  # by SQLSTATE or class: when it was logged
        self._is_far = False
        self.is_clock_known = False  # of this generation's host
        self._clock_at = 0.0  # when the database's clock was last looked at
        self._zeros: deque[float] = deque(maxlen=2)  # what the last looks told

    async def close(self) -> None:
        """Close every connection, by force where one does not answer."""
        self._closed = True
        keepers = [*self._opening, *self._tending, *([self._keeper] if self._keeper else [])]
        for task in keepers:
            task.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CLOSING_SECONDS):
                while self._lent:  # until nobody uses one
                    self._dropped.clear()
                    await self._dropped.wait()
                await asyncio.gather(*[each.connection.close() for each in self._idle])
        for pooled in (*self._idle, *self._lent):
            pooled.connection.terminate()

    async def _connect(self) -> Any:
        """Connect. Raises Unavailable, whatever the reason."""
        try:
            return await connect(self.url, SESSION, CONNECT_SECONDS)
        except Exception as error:
            self._lose(error)
            raise Unavailable(ABSENT) from error

    def _lose(self, error: BaseException) -> None:
        """Take note of a lost connection, or one that was refused: which does not count while there
        are others that work, unless nobody is let in at all.
        """
        if self._count and not is_away(error):
            self.complain("no more connections can be had", error)
        else:
            self._begin_anew(reason_of(error))

    def _begin_anew(self, reason: str) -> None:
        """Take note that the database is away: every connection made until now is in doubt."""
        self._note_away(reason)
        for pooled in self._idle:
            pooled.connection.terminate()
        self._idle.clear()
        self._generation += 1
        self._count = 0
        self.is_clock_known = False  # it may be another host

    def _note_away(self, reason: str) -> None:
        if reason not in self._reasons:
            self._reasons.add(reason)
            log.warning("the database is away (%s)", reason)

    def complain(self, what: str, error: BaseException) -> None:
        """Log what is wrong, unless it was logged within the last minute."""
        key, now = getattr(error, "sqlstate", type(error).__name__), time.monotonic()
        if now > self._complaints.get(key, -math.inf) + COMPLAINT_SECONDS:
            self._complaints[key] = now
            log.warning("%s (%s)", what, reason_of(error))

    # ---- Lending

    def take(self) -> Pooled | None:
        """Lend an idle connection, if there is one."""
        while self._idle:
            pooled = self._idle.pop()
            if not pooled.connection.is_closed():
                return self._lend(pooled)
            self._count -= 1
        return None

    def _lend(self, pooled: Pooled) -> Pooled:
        pooled.asked_at = asyncio.get_running_loop().time()
        self._lent.add(pooled)
        return pooled

    async def wait(self, until: float) -> Pooled:
        """Wait for a connection, and lend it. Raises Unavailable, TimeoutError."""
        if self._closed:
            raise Unavailable(ABSENT)
        waiter: asyncio.Future[Pooled] = asyncio.get_running_loop().create_future()
        key = party()
        self._waiting.append(key, waiter)
        self._open_more()
        try:
            async with asyncio.timeout_at(until):
                return await waiter
        except BaseException:
            if not waiter.done() or waiter.cancelled():
                self._waiting.remove(key, waiter)
            elif waiter.exception() is None:
                self.put_back(waiter.result())  # lent at the moment when nobody waited any more
            raise

    def put_back(self, pooled: Pooled) -> None:
        """Take back a connection that answered, and lend it to a call that waits, of each party in
        turn.
        """
        self._lent.discard(pooled)
        if pooled.generation != self._generation or self._closed:
            self._drop(pooled)
            return
        pooled.heard_at = self._heard_at = asyncio.get_running_loop().time()
        if self._reasons:
            self._note_return(pooled.connection)
        while following := self._waiting.take():
            _, waiter = following
            if not waiter.done():
                waiter.set_result(self._lend(pooled))
                return
        self._idle.append(pooled)

    def _note_return(self, connection: Any) -> None:
        if is_writable(connection):
            self._reasons.clear()
            log.warning("the database is back")
        else:
            self._note_away("it can only be read")

    def fail(self, pooled: Pooled, error: BaseException) -> None:
        """Take back a connection on which a statement failed; it is kept where it answered."""
        answered = isinstance(error, asyncpg.PostgresError) and not is_away(error)
        if answered and not pooled.connection.is_closed():
            self.put_back(pooled)
            return
        self._lent.discard(pooled)
        self._drop(pooled)
        if pooled.generation == self._generation:
            self._count -= 1
            if is_away(error):
                self._lose(error)
        if not self._closed:
            self._open_more()

    def _drop(self, pooled: Pooled) -> None:
        pooled.connection.terminate()
        self._dropped.set()

    # ---- Opening

    def _open_more(self, least: int = 0) -> None:
        """Open connections for the calls that wait, and some to spare on a far database, where each
        takes seconds; while the database is away, one at a time.
        """
        if self._closed or self._is_paused:
            return
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep())
        limit = 1 if self._reasons and not self._count else self._size - self._count
        spare = FAR_SPARES - len(self._idle) if self._is_far else 0
        wanted = min(max(len(self._waiting) + spare, least), limit)
        for _ in range(wanted - len(self._opening)):
            task = asyncio.create_task(self._open())
            self._opening.add(task)
            task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._opening.discard(task)
        if not self._closed:
            self._open_more()

    async def _open(self) -> None:
        """Open a connection and make it ready; where that fails and there is none, nobody waits."""
        try:
            connection = await self._connect()
        except Unavailable:
            self._pause()
            return
        pooled = Pooled(connection, self._generation, 0.0)
        try:
            await self._make_ready(pooled)
        except BaseException as error:
            connection.terminate()
            if not isinstance(error, Exception):
                raise
            self._lose(error)
            self._pause()
            return
        if pooled.generation == self._generation:
            self._count += 1
        self.put_back(pooled)

    async def _make_ready(self, pooled: Pooled) -> None:
        """Do on a new connection what takes several round trips."""
        keep_alive(pooled.connection)
        async with asyncio.timeout(CONNECT_SECONDS):
            began = time.monotonic()
            await pooled.connection.execute(ASK)
            self._is_far = time.monotonic() - began > FAR_SECONDS
            await pooled.connection.fetch(KNOW_TYPES)
            await self._look_at_clock(pooled)
        if self._is_far:
            await self._prepare_ahead(pooled)

    async def _prepare_ahead(self, pooled: Pooled) -> None:
        """Prepare on a connection to a far database what will be run, before anybody gets it.

        Else a request whose statements are all new to its connection would hardly be in time, since
        each takes two round trips; and a connection on which a statement was late is dropped.
        """
        for query in self._queries:
            try:
                await pooled.connection._get_statement(query, WAIT_SECONDS)
            except asyncpg.PostgresError as error:
                if is_away(error):
                    raise
            self._heard_at = asyncio.get_running_loop().time()

    async def _look_at_clock(self, pooled: Pooled) -> None:
        """See that a connection answers, and what time it is there."""
        asked_at = time.monotonic()
        there = await pooled.connection.fetchval(ASK, timeout=WAIT_SECONDS)
        if pooled.generation != self._generation:
            return
        self._clock_at = time.monotonic()
        if not self.is_clock_known:
            self._zeros.clear()
        if self._clock_at - asked_at < DOUBT_SECONDS or not self._zeros:
            self._zeros.append(there.timestamp() - self._clock_at)
            self.is_clock_known = True

    def zero(self) -> float:
        """Tell what time it was there when the loop's clock was at 0, in seconds since the epoch,
        once there was a connection.

        It was never earlier: an answer takes its time. The better of the last two looks counts.
        """
        return max(self._zeros)

    def _pause(self) -> None:
        """Try again to open a connection in a while; where there is none, tell all who wait."""
        self._is_paused = True
        seconds = FULL_SECONDS if self._count else RECONNECT_SECONDS
        asyncio.get_running_loop().call_later(seconds, self._go_on)
        if not self._count:
            while following := self._waiting.take():
                _, waiter = following
                if not waiter.done():
                    waiter.set_exception(Unavailable(ABSENT))

    def _go_on(self) -> None:
        self._is_paused = False
        self._open_more()

    # ---- Tending

    async def _keep(self) -> None:
        """Look after the connections, for as long as there is the pool."""
        while True:
            await asyncio.sleep(TEND_SECONDS)
            await asyncio.sleep(READ_SECONDS)  # this process may have stood still
            try:
                self._tend()
            except Exception:
                log.exception("the connections could not be looked after")

    def _tend(self) -> None:
        """See that the database answers. Nothing may await here."""
        metrics.CONNECTIONS.set(self._count)
        metrics.DATABASE.set(self._count > 0 and not self._reasons)
        now = asyncio.get_running_loop().time()
        lent = [each.asked_at for each in self._lent if each.generation == self._generation]
        asked_at = min(lent, default=now)
        silent = now - asked_at if self._heard_at <= asked_at else 0.0
        if silent > SILENCE_SECONDS:
            self._begin_anew("no answer in time")
        heard_before = asked_at if silent > DOUBT_SECONDS else now - QUIET_SECONDS
        if self._idle and now - self._clock_at > CLOCK_SECONDS:
            heard_before = max(heard_before, self._idle[0].heard_at)
        for pooled in list(self._idle):
            if pooled.connection.is_closed():
                self._idle.remove(pooled)
                self._count -= 1
            elif pooled.heard_at <= heard_before:
                self._idle.remove(pooled)
                task = asyncio.create_task(self._ask(self._lend(pooled)))
                self._tending.add(task)
                task.add_done_callback(self._tending.discard)
        is_unsure = not self._count or (silent > DOUBT_SECONDS and not self._tending)
        self._open_more(least=1 if is_unsure else 0)

    async def _ask(self, pooled: Pooled) -> None:
        """See that a connection answers."""
        try:
            await self._look_at_clock(pooled)
        except BaseException as error:
            self.fail(pooled, error)
            if not isinstance(error, Exception):
                raise
        else:
            self.put_back(pooled)


class Database:
    """A database by its statements, each on a connection that it has for as long as it runs.

    A statement waits, its connection included, until the deadline of the request that it serves, or
    for WAIT_SECONDS. `queries` are those that will be run: on a far database they are prepared
    before they are needed.
    """

    def __init__(
        self, url: str, connections: int = CONNECTIONS_MAX, queries: Iterable[str] = ()
    ) -> None:
        self.url = url
        self.refusal = ""  # why every statement is refused, where it is
        self._pool = Pool(url, connections, queries)

    async def close(self) -> None:
        """Close every connection, by force where one does not answer."""
        await self._pool.close()

    async def rows(self, query: str, *arguments: Any) -> list[Any]:
        """Run a statement and answer its rows.

        Raises Unavailable, asyncpg.PostgresError for the rest.
        """
        if self.refusal:
            raise Unavailable(ABSENT)
        return await self.fetch(query, *arguments)

    async def fetch(self, query: str, *arguments: Any) -> list[Any]:
        """Do what `rows` does, even where every statement is refused."""
        pool, loop = self._pool, asyncio.get_running_loop()
        now = loop.time()
        until = deadline() or now + WAIT_SECONDS
        if until <= now:
            raise Unavailable(ABSENT)
        try:
            pooled = pool.take() or await pool.wait(until - LEAST_SECONDS)
            try:
                found: list[Any] = await pooled.connection.fetch(
                    query, *arguments, timeout=until - loop.time())
            except BaseException as error:
                pool.fail(pooled, error)
                raise
        except Exception as error:
            if not is_unavailable(error):
                raise
            if has_state(error, GRAVE_STATES):
                pool.complain("the database cannot do what it is asked", error)
            raise Unavailable(ABSENT) from error
        pool.put_back(pooled)
        return found

    async def row(self, query: str, *arguments: Any) -> Any:
        """Run a statement and answer its first row, or None; raises what `rows` does."""
        found = await self.rows(query, *arguments)
        return found[0] if found else None

    async def value(self, query: str, *arguments: Any) -> Any:
        """Run a statement and answer its only value, or None; raises what `rows` does."""
        found = await self.rows(query, *arguments)
        return found[0][0] if found else None

    # ---- Changes that another one may replace

    async def until(self) -> datetime:
        """Tell when whoever asks gives up, by the database's clock. Raises Unavailable.

        A statement that is given up by then may still be run, where PostgreSQL had stopped for a
        while: so it takes this time, and in_time of sql/functions.sql refuses it from then on.
        """
        pool, until = self._pool, deadline() or asyncio.get_running_loop().time() + WAIT_SECONDS
        if not pool.is_clock_known:
            try:
                pool.put_back(await pool.wait(until))  # each new connection is asked for the time
            except TimeoutError:
                raise Unavailable(ABSENT) from None
        return datetime.fromtimestamp(pool.zero() + until, UTC)

    async def change(self, query: str, *arguments: Any) -> Any:
        """Run a statement whose last parameter is the time until which it counts; answer its first
        row. Raises what `rows` does, but only after that time where it may still be run.
        """
        until = await self.until()
        rows = await self.known_by(until, self.rows(query, *arguments, until))
        return rows[0] if rows else None

    async def known_by(self, until: datetime, running: Awaitable[Result]) -> Result:
        """Await what runs statements that count until a time; while one that failed may still be
        run, nobody is told of it.
        """
        try:
            return await running
        except Unavailable as error:
            if is_open(error.__cause__):
                now = asyncio.get_running_loop().time()
                left = until.timestamp() - self._pool.zero() - now
                await asyncio.sleep(min(left, (deadline() or now + 2 * WAIT_SECONDS) - now))
            raise


async def until_available(work: Callable[..., Awaitable[Result]], *arguments: Any) -> Result:
    """Await `work`, again a little later for as long as it raises Unavailable."""
    while True:
        try:
            return await work(*arguments)
        except Unavailable:
            await asyncio.sleep(RETRY_SECONDS)


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
