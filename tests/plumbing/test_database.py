"""The pool of connections: lines that fail, databases that are full, hang or are far away."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest

from plumbing import database, deadline
from plumbing.database import Database, Unavailable
from plumbing.deadline import RequestDeadline, WorkFor
from support.people import SOON_SECONDS
from support.wire import Wire

pytestmark = pytest.mark.real_deadlines

NAP = "select pg_sleep(0.2)"
ONE = "select 1"
Make = Callable[..., Database]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Make databases that are closed after the test."""
    async with contextlib.AsyncExitStack() as stack:
        def made(url: str, *arguments: Any) -> Database:
            one = Database(url, *arguments)
            stack.push_async_callback(one.close)
            return one

        yield made


@pytest.fixture
async def wire(database_url: str) -> AsyncIterator[Wire]:
    """The way to the test's database."""
    async with Wire(database_url).open() as wire:
        yield wire


async def many(there: Database, query: str, number: int) -> list[Any]:
    """Run a statement so many times at once; answer the values, and the exceptions."""
    return await asyncio.gather(
        *[there.value(query) for _ in range(number)], return_exceptions=True)


async def answers_soon(there: Database) -> None:
    """Wait until a statement is answered."""
    async with asyncio.timeout(SOON_SECONDS):
        while True:
            with contextlib.suppress(Unavailable):
                assert await there.value(ONE) == 1
                return
            await asyncio.sleep(0.05)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says of the database."""
    return [
        each.getMessage() for each in caplog.records
        if each.levelno >= logging.WARNING and each.name == "messenger.database"]


async def test_swallowed_connections_are_replaced_together(wire: Wire, make: Make) -> None:
    """Where a firewall forgot every connection, one call that fails is enough for the others."""
    there = make(wire.url)
    await many(there, NAP, 10)
    wire.swallow()
    await answers_soon(there)
    assert await many(there, ONE, 20) == [1] * 20


async def test_connections_swallowed_while_idle_fail_no_call(
    wire: Wire, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle connections are asked whether they answer, before a call is."""
    monkeypatch.setattr(database, "QUIET_SECONDS", 0.2, raising=False)
    there = make(wire.url)
    await many(there, NAP, 10)
    wire.swallow()
    await asyncio.sleep(4)
    assert await many(there, ONE, 20) == [1] * 20


async def test_calls_under_way_on_swallowed_connections_hold_up_no_later_one(
    wire: Wire, make: Make
) -> None:
    """While ten calls wait on dead connections, new connections serve those that come after."""
    there = make(wire.url)
    await many(there, NAP, 10)
    naps = asyncio.create_task(many(there, NAP, 10))
    await asyncio.sleep(0.05)
    wire.swallow()
    await asyncio.sleep(1.7)
    later = await many(there, ONE, 20)
    assert later == [1] * 20
    assert {type(each) for each in await naps} == {Unavailable}


async def test_statement_on_a_far_database_is_served(wire: Wire, make: Make) -> None:
    """With a round trip of 400 ms a connection comes to be, though no call waits so long for it,
    and a statement with arrays is served."""
    wire.delay = 0.2
    there = make(wire.url)
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(Unavailable):
                sizes = "select cardinality($1::bigint[]) + cardinality($2::uuid[])"
                assert await there.value(sizes, [1, 2], []) == 2
                return


async def test_call_that_was_given_up_leaves_its_connection_to_the_next(
    wire: Wire, make: Make
) -> None:
    """A call does not wait for a slow connect beyond its deadline, but the connect goes on."""
    wire.delay = 0.3
    there = make(wire.url)
    with pytest.raises(Unavailable):
        await there.value(ONE)
    wire.delay = 0.0
    await answers_soon(there)


@pytest.mark.parametrize("size", [1, 3, 12])
async def test_pool_has_as_many_connections_as_it_is_told(
    database_url: str, sql: asyncpg.Connection, make: Make, size: int
) -> None:
    """However many calls there are, no more connections are open at once."""
    there = make(database_url, size)
    calls = asyncio.create_task(many(there, "select pg_sleep(0.05)", 20))
    seen = set()
    while not calls.done():
        await asyncio.sleep(0.01)
        seen.add(await sql.fetchval(
            "select count(*) from pg_stat_activity where application_name = 'messenger'"
            " and datname = current_database()"))
    assert max(seen) == size
    assert not any(isinstance(each, Exception) for each in await calls)


@pytest.mark.parametrize("state", [
    "53000", "53100", "53200", "53300", "53400",  # no disk, no memory, no connections
    "55P03", "40P01", "40001", "55006",  # locks
    "25006",  # read-only
    "57014", "57P01", "57P02", "57P03", "57P05",  # cancelled, shut down, starting up
    "58000", "58030", "08006",  # input and output
])
async def test_trouble_of_the_database_is_unavailable(
    database_url: str, make: Make, state: str
) -> None:
    """What is the database's own trouble may be tried again; afterwards it is as good as before."""
    there = make(database_url)
    with pytest.raises(Unavailable):
        await there.rows(
            f"do $$ begin raise exception 'trouble' using errcode = '{state}'; end $$")
    await answers_soon(there)


@pytest.mark.parametrize("state", ["22012", "23505", "42P01", "P0001", "XX000"])
async def test_fault_of_a_statement_is_not(database_url: str, make: Make, state: str) -> None:
    """What is a statement's own fault is raised as it is, and its connection goes on."""
    there = make(database_url, 1)
    pid = await there.value("select pg_backend_pid()")
    with pytest.raises(asyncpg.PostgresError):
        await there.rows(f"do $$ begin raise exception 'fault' using errcode = '{state}'; end $$")
    assert await there.value("select pg_backend_pid()") == pid


async def test_full_disk_is_logged_once(
    database_url: str, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Trouble that an operator must end is logged once, not with each call."""
    there = make(database_url)
    full = "do $$ begin raise exception 'no space left' using errcode = '53100'; end $$"
    for _ in range(3):
        with pytest.raises(Unavailable):
            await there.rows(full)
    assert told(caplog) == [
        "the database cannot do what it is asked (no space left, SQLSTATE 53100)"]


async def test_silence_is_logged_once_and_so_is_its_end(
    wire: Wire, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A database that does not answer is away, though no connection was lost."""
    there = make(wire.url)
    await many(there, NAP, 3)
    wire.delay = 3600
    assert {type(each) for each in await many(there, ONE, 3)} == {Unavailable}
    assert {type(each) for each in await many(there, ONE, 3)} == {Unavailable}
    assert told(caplog) == ["the database is away (no answer in time)"]
    wire.delay = 0
    async with asyncio.timeout(4 * SOON_SECONDS):
        while len(told(caplog)) < 2:
            await asyncio.sleep(0.05)
    assert told(caplog)[1:] == ["the database is back"]
    await answers_soon(there)


async def test_slow_statement_is_no_silence(
    database_url: str, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A statement that PostgreSQL ends because it takes too long does not make it away."""
    there = make(database_url)
    with pytest.raises(Unavailable):
        await there.rows("select pg_sleep(30)")
    assert await there.value(ONE) == 1
    assert told(caplog) == []


async def test_connection_lost_alone_is_replaced(
    database_url: str, sql: asyncpg.Connection, make: Make
) -> None:
    """After its backends were ended, idle as they were, a call is served at once."""
    there = make(database_url)
    await many(there, NAP, 3)
    ended = await sql.fetch(
        "select pg_terminate_backend(pid, 1000) from pg_stat_activity"
        " where application_name = 'messenger' and datname = current_database()")
    assert len(ended) >= 3
    await asyncio.sleep(0.1)
    assert await many(there, ONE, 5) == [1] * 5


async def test_cancelled_statement_costs_its_connection(database_url: str, make: Make) -> None:
    """No later call gets a connection on which a statement was cancelled."""
    there = make(database_url, 1)
    pid = await there.value("select pg_backend_pid()")
    call = asyncio.create_task(there.rows("select pg_sleep(30)"))
    await asyncio.sleep(0.1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await there.value("select pg_backend_pid()") != pid


async def test_statement_that_has_no_time_left_is_not_begun(
    database_url: str, make: Make
) -> None:
    """Who gets a connection so late that the statement would be cancelled at once is told that, and
    the connection stays as it is."""
    there = make(database_url, 1)
    pid = await there.value("select pg_backend_pid()")
    for left in (0.01, 0.02, 0.03):
        napping = asyncio.create_task(there.value("select pg_sleep(0.5)"))
        await asyncio.sleep(0)
        with RequestDeadline():
            until = asyncio.get_running_loop().time() + 0.5 + left
            deadline._deadlines[asyncio.current_task()] = until
            with pytest.raises(Unavailable):
                await there.value("select pg_sleep(1)")
        await napping
    assert await there.value("select pg_backend_pid()") == pid


async def test_call_cancelled_while_it_waits_loses_no_connection(
    database_url: str, make: Make
) -> None:
    """Calls that are cancelled while they wait for the only connection leave it to the others."""
    there = make(database_url, 1)
    nap = asyncio.create_task(there.rows("select pg_sleep(0.1)"))
    await asyncio.sleep(0.05)
    calls = [asyncio.create_task(there.value(ONE)) for _ in range(20)]
    await asyncio.sleep(0)
    for call in calls[::2]:
        call.cancel()
    await nap
    for call in calls[1::4]:
        call.cancel()  # maybe just as it is lent the connection
    assert await there.value(ONE) == 1
    done = await asyncio.gather(*calls, return_exceptions=True)
    assert done[3::4] == [1] * 5


async def test_parties_have_connections_in_turn(database_url: str, make: Make) -> None:
    """However many statements of a party wait for a connection, another's has one of the next."""
    there, order = make(database_url, 1), []

    async def calls(party: str) -> None:
        with WorkFor(party):
            await there.rows("select pg_sleep(0.01)")
        order.append(party)

    waiting = [asyncio.create_task(calls(party)) for party in ["many"] * 30 + ["few", "one"]]
    await asyncio.wait_for(asyncio.gather(*waiting), SOON_SECONDS)
    assert {"few", "one"} <= set(order[:4])


async def test_calls_that_gave_up_cost_their_party_no_turn(
    database_url: str, make: Make
) -> None:
    """A call waits for none of its party that gave up before."""
    there, order = make(database_url, 1), []

    async def calls(name: str) -> None:
        with WorkFor(name[0]):
            await there.rows("select pg_sleep(0.01)")
        order.append(name)

    first = asyncio.create_task(calls("x"))
    await asyncio.sleep(0)
    given_up = [asyncio.create_task(calls("a")) for _ in range(10)]
    await asyncio.sleep(0)
    for call in given_up:
        call.cancel()
    await asyncio.wait(given_up)
    waiting = [asyncio.create_task(calls(name)) for name in (["a live"] + ["b"] * 5 + ["c"] * 5)]
    await asyncio.wait_for(asyncio.gather(first, *waiting), SOON_SECONDS)
    assert "a live" in order[:4]


async def test_closed_database_refuses(database_url: str) -> None:
    """After its end a database opens no connection any more."""
    there = Database(database_url)
    await there.rows(ONE)
    await there.close()
    with pytest.raises(Unavailable):
        await there.rows(ONE)


async def test_kernel_watches_the_connection(wire: Wire, make: Make) -> None:
    """Keepalive and the bound of unacknowledged data are set on each connection."""
    await make(wire.url).rows(ONE)
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as wired:
            if wired.family == socket.AF_INET and wired.getpeername()[1] == wire.port:
                tcp = socket.IPPROTO_TCP
                found.append((
                    wired.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                    wired.getsockopt(tcp, socket.TCP_KEEPIDLE),
                    wired.getsockopt(tcp, socket.TCP_USER_TIMEOUT)))
    assert found == [(1, 10, 10_000)]
