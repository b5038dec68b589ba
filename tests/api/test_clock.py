"""A clock that was ahead: once it is right again, what was stamped meanwhile steers nothing."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import jwt
import pytest
from aiohttp import web

import messenger
from support.people import PASSWORD, Person, edits, follows, login
from support.servers import SECRET_KEY

AHEAD = "interval '400 days'"
SOON = timedelta(seconds=90)  # a minute, on a busy machine
keep_tidy = messenger.keep_tidy
pytestmark = pytest.mark.usefixtures("no_upkeep")


def since_now(told: Any) -> timedelta:
    """How far ahead of now a time is."""
    return datetime.fromisoformat(told) - datetime.now(UTC)


async def refreshes(person: Person, token: str) -> int:
    """Try to refresh; answer the status."""
    body = {"refresh_token": token}
    return (await person.client.post("/api/v1/users/refresh", json=body)).status


# ---- Chats


async def test_message_follows_the_last_one_by_a_minute_at_most(
    alice: Person, bob: Person, sql: asyncpg.Connection
) -> None:
    """What is posted, alone or in a group, and edited in a chat that was used while the clock was
    ahead is stamped at most a minute ahead; in the order of the numbers."""
    chat = await alice.opens(bob)
    await alice.says(chat, "of the future")
    await sql.execute(f"update messages set created_at = now() + {AHEAD}")
    await sql.execute(f"update chats set active_at = now() + {AHEAD}")
    sent = [await alice.says(chat, "alone")]
    await sql.execute(f"update chats set active_at = now() + {AHEAD}")
    sent += await asyncio.gather(*(who.says(chat, "beside") for who in (alice, bob) * 5))
    sent.append(await alice.says(chat, "alone again"))
    assert all(since_now(message["created_at"]) < SOON for message in sent)
    after = sorted(sent[1:], key=lambda message: message["seq"])
    stamps = [message["created_at"] for message in after]
    assert stamps == sorted(stamps)
    edited = await edits(alice, sent[0], "edited")
    assert since_now(edited["edited_at"]) < SOON
    assert since_now((await bob.gets("/chats"))[0]["last_message"]["created_at"]) < SOON


async def test_clock_that_steps_back_a_little_keeps_the_order(
    alice: Person, bob: Person, sql: asyncpg.Connection
) -> None:
    """Within a minute a message is stamped no earlier than the one before it."""
    chat = await alice.opens(bob)
    ahead = await sql.fetchval(
        "update chats set active_at = now() + interval '30 seconds' returning active_at")
    for _ in range(2):
        sent = await alice.says(chat, "a moment later")
        assert datetime.fromisoformat(sent["created_at"]) == ahead


async def test_reading_follows_the_last_time_by_a_minute_at_most(
    alice: Person, bob: Person, sql: asyncpg.Connection
) -> None:
    """So it is with when a message was read."""
    chat = await alice.opens(bob)
    sent = await alice.says(chat, "read me")
    await sql.execute(f"update participants set last_read_at = now() + {AHEAD}")
    assert since_now((await bob.reads(chat, sent))["read_at"]) < SOON


# ---- Attempts


@pytest.mark.parametrize("key", ["login:alice@example.com", "login from:127.0.0.1"])
async def test_failures_of_the_future_lock_nobody_out(
    app: web.Application, alice: Person, sql: asyncpg.Connection, key: str
) -> None:
    """Failures that were counted while the clock was ahead do not count, are forgiven to nobody,
    and go."""
    await sql.execute(
        f"insert into attempts select $1, now() + {AHEAD} from generate_series(1, 100)", key)
    assert await login(alice, alice.email) == 200
    for _ in range(10):
        assert await login(alice, alice.email, "wrong password") == 401
    assert await login(alice, alice.email) == 429
    await keep_tidy(app)
    future = "select count(*) from attempts where at > now() + interval '1 minute'"
    assert await sql.fetchval(future) == 0
    assert await sql.fetchval("select count(*) from attempts where at < now()") > 10


async def test_wrong_present_passwords_of_the_future_lock_nobody_out(
    alice: Person, sql: asyncpg.Connection
) -> None:
    """Nor do those that were tried to change an account, nor registrations."""
    await sql.execute(
        f"insert into attempts select key, now() + {AHEAD} from generate_series(1, 100),"
        " unnest(array['password:' || $1::text, 'register:127.0.0.1']) key", str(alice.id))
    body = {"password": "another password", "current_password": PASSWORD}
    await alice.expects(200, "PUT", f"/users/{alice.id}", body)
    alice.name, alice.email = "alice2", "alice2@example.com"
    await alice.register()


async def test_attempts_counted_at_once_still_count(sql: asyncpg.Connection) -> None:
    """An attempt that another has counted since this transaction began is not of the future."""
    async with sql.transaction():
        await sql.execute("select pg_sleep(0.01)")
        await sql.execute("insert into attempts values ('k', clock_timestamp())")
        assert await sql.fetchval(messenger.COUNT_ATTEMPT, "k", 900, 1) is not None


# ---- Sessions


async def test_old_refresh_token_is_refused_though_it_was_refreshed_in_the_future(
    alice: Person, sql: asyncpg.Connection
) -> None:
    """Who lost the answer may repeat a refresh for 30 seconds, not until a clock that was ahead is
    right."""
    assert await refreshes(alice, alice.refresh) == 200
    await sql.execute(f"update sessions set is_used = true, rotated_at = now() + {AHEAD}")
    assert await refreshes(alice, alice.refresh) == 401


async def test_access_token_of_the_future_counts_no_longer(
    alice: Person, sql: asyncpg.Connection
) -> None:
    """A token that was signed while the clock was ahead would live on until then: it is refused,
    and the refresh token of that time gets another."""
    claims = jwt.decode(alice.access, options={"verify_signature": False})
    refreshing = jwt.decode(alice.refresh, options={"verify_signature": False})
    for days, status in ((0, 200), (400, 401)):
        later = {name: claims[name] + days * 86_400 for name in ("iat", "exp")}
        token = jwt.encode(claims | later, SECRET_KEY, algorithm="HS256")
        headers = {"Authorization": f"Bearer {token}"}
        assert (await alice.client.get("/api/v1/users/me", headers=headers)).status == status
    later = {name: refreshing[name] + 400 * 86_400 for name in ("iat", "exp")}
    token = jwt.encode(refreshing | later, SECRET_KEY, algorithm="HS256")
    assert await refreshes(alice, token) == 200


async def test_sessions_and_joinings_of_the_future_count_as_of_now(
    app: web.Application, alice: Person, bob: Person, sql: asyncpg.Connection
) -> None:
    """A session that was refreshed while the clock was ahead lives seven days from now, one that
    ended then is told of for ten more seconds, and so is who joined; what goes on is not ended."""
    await bob.opens(alice)
    await bob.logs_in()
    await sql.execute(
        "update sessions set rotated_at = rotated_at + $2 * interval '1 day',"
        " last_used_at = last_used_at + $2 * interval '1 day' where user_id = $1", alice.id, 400)
    await sql.execute(
        f"update sessions set ended_at = now() + {AHEAD} where id = ("
        " select min(id) from sessions where user_id = $1)", bob.id)
    await sql.execute(f"update participants set joined_at = now() + {AHEAD}")
    before = await sql.fetchval("select count(*) from sessions where ended_at is null")
    await keep_tidy(app)
    await keep_tidy(app)
    for column, table in (
        ("rotated_at", "sessions"), ("last_used_at", "sessions"), ("ended_at", "sessions"),
        ("joined_at", "participants"),
    ):
        ahead = f"select count(*) from {table} where {column} > now()"
        assert await sql.fetchval(ahead) == 0, column
    assert await sql.fetchval("select count(*) from sessions where ended_at is null") == before
    ended = "select count(*) from sessions where ended_at > now() - interval '10 seconds'"
    assert await sql.fetchval(ended) == 1
    await alice.gets("/users/me")
    line = await follows(alice)
    await alice.says((await alice.gets("/chats"))[0]["id"], "still here")
    assert await line.hears_text("still here")


async def test_clock_is_settled_in_pieces(
    app: web.Application, alice: Person, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than the limit of each kind is put right at once, and in the end all is; what lies
    within a minute stays."""
    monkeypatch.setattr(messenger, "UPKEEP_ROWS", 100)
    await sql.execute(
        f"insert into sessions (user_id, rotated_at, ended_at)"
        f" select $1, now() + {AHEAD}, now() + {AHEAD} from generate_series(1, 250)", alice.id)
    await sql.execute(
        f"insert into attempts select 'x', now() + {AHEAD} from generate_series(1, 250)")
    await sql.execute("insert into attempts values ('y', now() + interval '50 seconds')")
    assert 100 <= await sql.fetchval(messenger.SETTLE_CLOCK, 100) <= 300
    await keep_tidy(app)
    assert await sql.fetchval(messenger.SETTLE_CLOCK, 100) == 0
    assert await sql.fetchval("select count(*) from attempts where key in ('x', 'y')") == 1
