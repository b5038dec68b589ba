"""A change that was given up while PostgreSQL stood still: it is never made over a newer one."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest
from aiohttp import web

import messenger
from plumbing import database
from support.people import PASSWORD, SOON_SECONDS, Person
from support.servers import Elsewhere
from tools import administer

pytestmark = pytest.mark.real_deadlines

EARLIER = datetime(2020, 1, 1, tzinfo=UTC)

Stall = Callable[[str], None]


@pytest.fixture
async def stall(
    app: web.Application, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Stall, Callable[[], Awaitable[None]]]]:
    """Two functions: one lets the backend that is sent a statement next stop before; the other lets
    it go on, and waits until it has done that and ended."""
    if "TEST_DATABASE_URL" in os.environ:
        pytest.skip("that PostgreSQL's processes are not ours")
    pool, rows, stopped = app[messenger.DATABASE]._pool, app[messenger.DATABASE].rows, list[int]()

    def stop_at(statement: str) -> None:
        async def stop_first(query: str, *arguments: Any) -> Any:
            if query == statement and not stopped:
                pooled = pool.take() or await pool.wait(asyncio.get_running_loop().time() + 1)
                await pool._prepare_ahead(pooled)  # else only that would be sent
                await pooled.connection.execute("select")  # and it waits for a call
                pool.put_back(pooled)  # the next statement takes it
                stopped.append(pooled.connection.get_server_pid())
                os.kill(stopped[0], signal.SIGSTOP)
            return await rows(query, *arguments)

        monkeypatch.setattr(app[messenger.DATABASE], "rows", stop_first)

    async def go_on() -> None:
        pid = stopped.pop()
        os.kill(pid, signal.SIGCONT)
        async with asyncio.timeout(SOON_SECONDS):
            while await sql.fetchval("select count(*) from pg_stat_activity where pid = $1", pid):
                await asyncio.sleep(0.02)

    yield stop_at, go_on
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    "kind", ["edit", "deletion", "rename", "role", "removal", "username", "group"])
async def test_change_answered_503_is_not_made_over_a_newer_one(
    alice: Person, bob: Person, elsewhere: Elsewhere, stall: Any, kind: str
) -> None:
    """While the backend that was sent a change stands still, the change is answered 503 and another
    server makes a newer one; when the backend goes on, the newer one stays."""
    stop_at, go_on = stall
    chat = await alice.founds(bob)
    message = f"/chats/{chat}/messages/{(await alice.says(chat, 'first'))['id']}"
    here, people = f"/chats/{chat}", f"/chats/{chat}/participants"
    group = {"is_group": True, "name": "tried again", "participant_ids": [bob.id]}
    statement, older, newer = {
        "edit": (messenger.CHANGE_MESSAGES, ("PATCH", message, {"text": "older"}),
                 ("PATCH", message, {"text": "newer"})),
        "deletion": (messenger.CHANGE_MESSAGES, ("DELETE", message, None),
                     ("PATCH", message, {"text": "newer"})),
        "rename": (messenger.RENAME_CHAT, ("PATCH", here, {"name": "older"}),
                   ("PATCH", here, {"name": "newer"})),
        "role": (messenger.PUT_PARTICIPANT, ("POST", f"{people}/{bob.id}", {"role": "admin"}),
                 ("POST", f"{people}/{bob.id}", {"role": "member"})),
        "removal": (messenger.REMOVE_PARTICIPANT, ("DELETE", f"{people}/{bob.id}", None),
                    ("POST", people, {"user_id": bob.id})),
        "username": (messenger.CHANGE_USER, ("PUT", f"/users/{alice.id}", {"username": "older"}),
                     ("PUT", f"/users/{alice.id}", {"username": "newer"})),
        "group": (messenger.CREATE_GROUP, ("POST", "/chats", group), ("GET", "/chats", None)),
    }[kind]
    there = await elsewhere.takes(alice)
    stop_at(statement)
    assert (await alice.asks(*older)).status == 503
    assert (await there.asks(*newer)).status == 200
    paths = (message, here, "/users/me", "/chats")
    seen = [await there.gets(path) for path in paths]
    await go_on()
    assert [await there.gets(path) for path in paths] == seen


async def test_login_answered_503_does_not_wake_an_account_that_was_signed_out_since(
    alice: Person, elsewhere: Elsewhere, stall: Any, sql: asyncpg.Connection
) -> None:
    """A login whose backend stood still starts no session, and the account stays inactive."""
    stop_at, go_on = stall
    there = await elsewhere.takes(alice)
    stop_at(messenger.START_SESSION)
    login = {"email": alice.email, "password": PASSWORD}
    assert (await alice.asks("POST", "/users/login", login)).status == 503
    await there.expects(200, "PUT", f"/users/{alice.id}", {"is_active": False})
    await go_on()
    assert await sql.fetchval("select is_active from users where id = $1", alice.id) is False
    assert await sql.fetchval("select count(*) from sessions where ended_at is null") == 0


@pytest.mark.parametrize(
    ("statement", "arguments"),
    [(messenger.DELETE_USER, []), (administer.DISABLE_USER, [True]),
     (administer.RESET_PASSWORD, ["hash"])])
async def test_statement_past_its_time_changes_nothing(
    alice: Person, sql: asyncpg.Connection, statement: str, arguments: list[Any]
) -> None:
    """An account is neither deleted nor disabled, nor given a password, after the time."""
    before = await sql.fetch("select * from users")
    with pytest.raises(asyncpg.QueryCanceledError):
        await sql.fetch(statement, alice.id, *arguments, EARLIER)
    assert await sql.fetch("select * from users") == before


async def test_clock_of_the_database_that_was_put_forward_is_looked_at_again(
    alice: Person, app: web.Application
) -> None:
    """A server that was right about the database's clock until somebody put that forward refuses
    changes for a moment; then it makes them."""
    zeros = app[messenger.DATABASE]._pool._zeros
    zeros.extend([zeros[-1] - 3600] * 2)
    await alice.expects(503, "PUT", f"/users/{alice.id}", {"username": "otto"})
    async with asyncio.timeout(SOON_SECONDS):
        while (await alice.asks("PUT", f"/users/{alice.id}", {"username": "otto"})).status == 503:
            await asyncio.sleep(0.1)
    assert (await alice.gets("/users/me"))["username"] == "otto"


@pytest.mark.parametrize("ahead", [-86_400, 0, 1, 86_400])
async def test_lost_connection_is_told_only_once_the_change_cannot_be_made_any_more(
    alice: Person, bob: Person, app: web.Application, elsewhere: Elsewhere, stall: Any,
    monkeypatch: pytest.MonkeyPatch, ahead: float,
) -> None:
    """Where the connection breaks while a backend stands still, the change is not tried again on
    another, for the first try may still be made: it is 503 when that is over, by the database's
    clock, which the server's own may be ahead of or behind."""
    stop_at, go_on = stall
    clock = SimpleNamespace(monotonic=time.monotonic, time=lambda: time.time() + ahead)
    monkeypatch.setattr(database, "time", clock)
    chat = await alice.founds(bob)
    message = f"/chats/{chat}/messages/{(await alice.says(chat, 'first'))['id']}"
    stop_at(messenger.CHANGE_MESSAGES)
    asked = asyncio.create_task(alice.asks("PATCH", message, {"text": "older"}))
    await asyncio.sleep(0.3)
    for pooled in list(app[messenger.DATABASE]._pool._lent):
        pooled.connection._transport.abort()
    assert (await asked).status == 503
    there = await elsewhere.takes(alice)
    newer = await there.expects(200, "PATCH", message, {"text": "newer"})
    await go_on()
    assert await there.gets(message) == newer
