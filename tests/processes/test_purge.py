"""What has grown old goes, in pieces, and nothing else does."""

import asyncio
from typing import Any

import asyncpg
import pytest
from aiohttp import web

import messenger
from support.people import Person
from support.servers import SETTINGS

DAY = 86_400
LIFE = SETTINGS.refresh_token_expire_days * DAY
AGES = DAY, LIFE, 900, 90 * DAY, 2 * DAY  # as in PURGE_OLD
keep_tidy = messenger.keep_tidy
pytestmark = pytest.mark.usefixtures("no_upkeep")


async def session_ids(sql: asyncpg.Connection) -> set[int]:
    """The ids of the sessions that there are."""
    return {row["id"] for row in await sql.fetch("select id from sessions")}


async def add_session(sql: asyncpg.Connection, user: Person, ended: Any, rotated: int) -> int:
    """Insert a session that ended and was refreshed so many seconds ago; answer its id."""
    found: int = await sql.fetchval(
        "insert into sessions (user_id, ended_at, rotated_at) values"
        " ($1, now() - make_interval(secs => $2), now() - make_interval(secs => $3)) returning id",
        user.id, ended, rotated)
    return found


async def test_old_sessions_go(app: web.Application, alice: Person, sql: Any) -> None:
    """A session is kept for a day after it ended, or after its refresh token expired."""
    kept = await session_ids(sql)
    for ended, rotated, is_kept in (
        (None, 0, True),
        (None, LIFE + DAY - 60, True),
        (None, LIFE + DAY + 60, False),
        (DAY - 60, LIFE, True),
        (DAY + 60, DAY, False),
        (DAY - 60, LIFE + 2 * DAY, True),
    ):
        added = await add_session(sql, alice, ended, rotated)
        kept |= {added} if is_kept else set()
    await keep_tidy(app)
    assert await session_ids(sql) == kept
    await alice.gets("/users/me")


async def test_token_of_a_session_that_is_gone_is_refused(
    app: web.Application, alice: Person, sql: Any
) -> None:
    """Neither token of a session lets in once its row is gone, and no other session is affected."""
    access, refresh = alice.access, alice.refresh
    await alice.posts("/users/logout", status=204)
    await alice.logs_in()
    await sql.execute(
        "update sessions set ended_at = now() - interval '2 days' where ended_at is not null")
    await keep_tidy(app)
    assert len(await session_ids(sql)) == 1
    body = {"refresh_token": refresh}
    async with alice.client.post("/api/v1/users/refresh", json=body) as answer:
        assert answer.status == 401
    headers = {"Authorization": f"Bearer {access}"}
    async with alice.client.get("/api/v1/users/me", headers=headers) as answer:
        assert answer.status == 401
    await alice.gets("/users/me")


async def test_old_attempts_go(app: web.Application, server: Any, sql: Any) -> None:
    """Failures are kept for as long as they count."""
    await sql.executemany(
        "insert into attempts values ($1, now() - make_interval(secs => $2))",
        [("old", 901), ("old", 5000), ("mixed", 901), ("mixed", 850), ("young", 1)])
    await keep_tidy(app)
    rows = await sql.fetch("select key from attempts order by key")
    assert [row["key"] for row in rows] == ["mixed", "young"]


async def test_reader_of_a_purged_step_is_still_named(
    app: web.Application, alice: Person, bob: Person, sql: Any
) -> None:
    """Where it is no longer known when a message was read, its reader is named with the next known
    time and still counted; younger steps stay as they are."""
    chat = await alice.opens(bob)
    sent = [await alice.says(chat, text) for text in ("first", "second", "third", "unread")]
    for message in sent[:3]:
        await bob.reads(chat, message)
    step = "update reads set read_at = read_at - interval '91 days' where seq <= $1"

    async def readers() -> list[Any]:
        messages = await alice.gets(f"/chats/{chat}/messages")
        assert [m["read_count"] for m in messages] == [1, 1, 1, 0]
        return [[(r["user_id"], r["read_at"]) for r in m["read_by"]] for m in messages]

    first, second, third, unread = await readers()
    assert unread == []
    assert len({*first, *second, *third}) == 3
    await sql.execute(step, sent[0]["seq"])
    await keep_tidy(app)
    assert await readers() == [second, second, third, []]
    await sql.execute(step, sent[2]["seq"])
    await keep_tidy(app)
    assert await sql.fetchval("select count(*) from reads") == 0
    assert await readers() == [third, third, third, []]  # when they last moved
    assert (await bob.gets(f"/chats/{chat}"))["unread_count"] == 1


async def test_old_departures_go(
    app: web.Application, alice: Person, bob: Person, carol: Person, sql: Any
) -> None:
    """That somebody left is kept for two days, which is longer than any socket lives without the
    database; who comes later sees who is in."""
    chat = await alice.founds(bob, carol)
    line = await alice.listens_live(chat)
    for someone in (bob, carol):
        await alice.expects(204, "DELETE", f"/chats/{chat}/participants/{someone.id}")
        while (await line.hears("chat_updated"))["data"]["left"] != [someone.id]:
            pass
    age = "update departures set left_at = now() - make_interval(secs => $1) where user_id = $2"
    await sql.execute(age, 2 * DAY - 60, bob.id)
    await sql.execute(age, 2 * DAY + 60, carol.id)
    await keep_tidy(app)
    assert [row["user_id"] for row in await sql.fetch("select user_id from departures")] == [bob.id]
    assert [each["user_id"] for each in await alice.gets(f"/chats/{chat}/participants")] == [
        alice.id]
    await sql.execute(
        "insert into departures select 0, n, n, now() - interval '3 days'"
        " from generate_series(1, 2500) n")
    await keep_tidy(app)
    assert await sql.fetchval("select count(*) from departures") == 1


async def test_purge_goes_in_pieces(
    app: web.Application, alice: Person, sql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each statement of a purge deletes no more rows of a kind than its limit, and in the end all
    old rows are gone."""
    monkeypatch.setattr(messenger, "UPKEEP_ROWS", 100)
    await sql.execute(
        "insert into attempts select 'x' || n, now() - interval '1 day'"
        " from generate_series(1, 250) n")
    pieces = [
        await sql.fetchval(messenger.PURGE_OLD, *AGES, 100) for _ in range(4)]
    assert pieces == [100, 100, 50, 0]
    await sql.execute(
        "insert into reads select 1, n, 0, 1, now() - interval '91 days'"
        " from generate_series(1, 250) n")
    for _ in range(250):
        await add_session(sql, alice, 2 * DAY, 0)
    await keep_tidy(app)
    for table, left in (("sessions", 1), ("reads", 0), ("attempts", 1)):
        assert await sql.fetchval(f"select count(*) from {table}") == left, table


async def test_purges_of_several_workers_do_not_disturb_each_other(
    app: web.Application, alice: Person, sql: Any, database_url: str
) -> None:
    """Four purges at the same time all come to their end, in whatever order they find rows."""
    await sql.execute(
        "insert into attempts select 'login:' || n % 7, now() - interval '1 day'"
        " from generate_series(1, 4000) n order by random()")
    await sql.execute(
        "insert into reads select n % 50, n, 0, 1, now() - interval '91 days'"
        " from generate_series(1, 4000) n order by random()")
    connections = [await asyncpg.connect(database_url) for _ in range(4)]

    async def purges(connection: asyncpg.Connection) -> int:
        purged = 0
        while more := await connection.fetchval(messenger.PURGE_OLD, *AGES, 300):
            purged += more
        return purged

    counts = await asyncio.gather(*map(purges, connections))
    for connection in connections:
        await connection.close()
    assert sum(counts) > 0
    await keep_tidy(app)
    for table, left in (("reads", 0), ("attempts", 1)):
        assert await sql.fetchval(f"select count(*) from {table}") == left, table


async def test_purge_waits_for_no_lock(app: web.Application, server: Any, sql: Any) -> None:
    """A purge leaves rows that are locked at the moment for the next time."""
    await sql.execute(
        "insert into attempts select 'x' || n, now() - interval '1 day'"
        " from generate_series(1, 10) n")
    async with sql.transaction():
        await sql.execute("select from attempts where key = 'x3' for update")
        await keep_tidy(app)
        assert [row["key"] for row in await sql.fetch("select key from attempts")] == ["x3"]
    await keep_tidy(app)
    assert await sql.fetch("select from attempts") == []
