"""Positions: who comes back with what is no longer the server's history is told so, and who stayed
is sent back to ask.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest

import messenger
from support.people import HEAR_SECONDS, SOON_SECONDS, Line, Person, adds
from support.servers import Elsewhere


async def restore(sql: asyncpg.Connection, chat: int, number: int) -> None:
    """Make of a chat what a backup holds that was taken when it had come to a number."""
    await sql.execute("delete from messages where chat_id = $1 and seq > $2", chat, number)
    await sql.execute("delete from revisions where chat_id = $1 and rev > $2", chat, number)
    await sql.execute("update messages set rev = seq, changed_mark = null"
                      " where chat_id = $1 and rev > $2", chat, number)
    await sql.execute(
        "update chats set last_rev = $2, last_seq = $2, last_mark = coalesce(mark_at(id, $2), '0')"
        " where id = $1", chat, number)


async def says_many(person: Person, chat: int, count: int) -> list[str]:
    """Post so many messages; answer their positions."""
    return [(await person.says(chat, f"text {n}"))["position"] for n in range(count)]


async def problem_of(person: Person, path: str) -> tuple[int, str]:
    """Ask for something that is refused; answer status and type."""
    answer = await person.asks("GET", path)
    return answer.status, (await answer.json()).get("type")


async def all_frames(line: Line, until: str, count: int = 1) -> list[Any]:
    """Hear everything up to so many frames of a type."""
    frames: list[Any] = []
    while [frame["type"] for frame in frames].count(until) < count:
        frames.append(await line.ws.receive_json(timeout=HEAR_SECONDS))
    return frames


async def test_everything_tells_its_position(alice: Person, bob: Person) -> None:
    """What a post answers, its frames, pages, changes, the chat and the list tell one position."""
    chat = await alice.founds(bob)
    line = await bob.listens(chat)
    hello, ready = await all_frames(line, "ready")
    assert hello["type"] == "hello"
    assert ready["data"] == {"chat_id": chat, "rev": 0, "position": "0"}
    assert (await alice.gets(f"/chats/{chat}"))["position"] == "0"
    [first, second] = await says_many(alice, chat, 2)
    assert first.startswith("1.")
    assert second.startswith("2.")
    assert first[2:] != second[2:]
    heard = [(await line.hears("message"))["data"]["position"] for _ in range(2)]
    page = [each["position"] for each in await alice.gets(f"/chats/{chat}/messages")]
    changes = [each["position"] for each in await alice.gets(f"/chats/{chat}/changes")]
    assert heard == page == changes == [first, second]
    assert (await alice.gets(f"/chats/{chat}"))["position"] == second
    [listed] = await bob.gets("/chats")
    assert listed["position"] == listed["last_message"]["position"] == second
    late = await bob.listens(chat, f"?after={first}")
    frames = await all_frames(late, "ready")
    assert [frame["type"] for frame in frames] == ["hello", "replay", "message", "ready"]
    assert frames[1]["data"] == {"chat_id": chat, "position": first}
    assert frames[3]["data"] == {"chat_id": chat, "rev": 2, "position": second}


async def test_edit_and_deletion_have_positions(alice: Person, bob: Person) -> None:
    """A change of a message takes a position of its own; that of its post still counts."""
    chat = await alice.founds(bob)
    posted = await alice.says(chat, "one")
    path = f"/chats/{chat}/messages/{posted['id']}"
    edited = await alice.expects(200, "PATCH", path, {"text": "two"})
    assert edited["position"].startswith("2.")
    assert edited["position"] != posted["position"]
    await alice.expects(204, "DELETE", path)
    [gone] = await bob.gets(f"/chats/{chat}/changes?after={posted['position']}")
    assert gone["position"].startswith("3.")
    assert (await alice.gets(f"/chats/{chat}"))["position"] == gone["position"]
    assert await bob.gets(f"/chats/{chat}/changes?after={edited['position']}") == [gone]
    assert await bob.gets(f"/chats/{chat}/changes?after={gone['position']}") == []


async def test_next_page_of_changes_goes_on_from_a_position(alice: Person, bob: Person) -> None:
    """The Link of a page of changes holds a position, which the server takes."""
    chat = await alice.founds(bob)
    positions = await says_many(alice, chat, 3)
    answer = await bob.asks("GET", f"/chats/{chat}/changes?limit=2")
    assert f"after={positions[1]}" in answer.headers["Link"]
    [last] = await bob.gets(answer.links["next"]["url"].path_qs)
    assert last["position"] == positions[2]


async def test_position_of_a_lost_history_is_refused(
    sql: asyncpg.Connection, alice: Person, bob: Person
) -> None:
    """A client that was at 15 while the database was restored at 10 and grew to 17 is told, on
    every way; one that was at 10 goes on.
    """
    chat = await alice.founds(bob)
    positions = await says_many(alice, chat, 15)
    await restore(sql, chat, 10)
    await says_many(alice, chat, 7)
    rewritten = (409, "history-rewritten")
    assert await problem_of(bob, f"/chats/{chat}/changes?after={positions[14]}") == rewritten
    assert len(await bob.gets(f"/chats/{chat}/changes?after={positions[9]}")) == 7
    line = await bob.listens(chat, f"?after={positions[14]}")
    frames = await all_frames(line, "ready")
    assert [frame["type"] for frame in frames] == ["hello", "error", "ready"]
    assert frames[1]["data"]["type"] == "history-rewritten"
    assert frames[1]["chat_id"] == chat
    everything = Line(await bob.client.ws_connect("/ws", headers=bob.headers))
    _, told = await all_frames(everything, "chats")
    version = (await bob.gets(f"/chats/{chat}"))["version"]
    position = (await bob.gets(f"/chats/{chat}"))["position"]
    assert told["data"] == {"chats": {str(chat): [position, version]}, "more": False}
    await everything.sends(type="sync", chats={chat: positions[14]}, ref="old")
    refused = await everything.hears("error")
    assert (refused["data"]["type"], refused["ref"]) == ("history-rewritten", "old")
    await alice.says(chat, "live all the same")
    assert (await everything.hears("message"))["data"]["text"] == "live all the same"
    await everything.sends(type="sync", chats={chat: positions[9]}, ref="good")
    heard = await all_frames(everything, "ready")
    assert [frame["type"] for frame in heard] == ["replay", *["message"] * 8, "ready"]
    await everything.close()


async def test_edit_that_was_lost_is_told(
    sql: asyncpg.Connection, alice: Person, bob: Person
) -> None:
    """The same number, taken by another edit after a restore, is another history."""
    chat = await alice.founds(bob)
    posted = await alice.says(chat, "one")
    path = f"/chats/{chat}/messages/{posted['id']}"
    edited = await alice.expects(200, "PATCH", path, {"text": "two"})
    await restore(sql, chat, 1)
    await alice.expects(200, "PATCH", path, {"text": "three"})
    after = f"/chats/{chat}/changes?after={edited['position']}"
    assert await problem_of(bob, after) == (409, "history-rewritten")
    assert len(await bob.gets(f"/chats/{chat}/changes?after={posted['position']}")) == 1


async def test_what_vouches_for_nothing_here_is_refused(alice: Person, bob: Person) -> None:
    """A position of another chat or beyond the last number is refused; a bare number is believed,
    and what is no position at all is 422.
    """
    chat, other = await alice.founds(bob), await alice.founds(bob)
    [position] = await says_many(alice, chat, 1)
    [foreign] = await says_many(alice, other, 1)
    rewritten = (409, "history-rewritten")
    for wrong in (foreign, "7.AAAAAAAAAAA", f"2.{position[2:]}"):
        assert await problem_of(bob, f"/chats/{chat}/changes?after={wrong}") == rewritten
    for number in ("1", "7", "0", "0.whatever"):
        assert (await bob.asks("GET", f"/chats/{chat}/changes?after={number}")).status == 200
    for nonsense in ("x", "1.", "1.a.b", "-1", "1.ä", "99999999999999999999", "9" * 19 + ".a"):
        answer = await bob.asks("GET", f"/chats/{chat}/changes", params={"after": nonsense})
        assert answer.status == 422, nonsense
    line = await bob.listens(chat, "?after=9")
    frames = await all_frames(line, "ready")
    assert frames[-1]["data"] == {"chat_id": chat, "rev": 1, "position": position}


@pytest.mark.parametrize("grown", [10, 15, 20])
async def test_who_stayed_is_sent_back(
    sql: asyncpg.Connection, alice: Person, bob: Person, elsewhere: Elsewhere, grown: int
) -> None:
    """Beneath running servers a chat goes back from 15 to 10 and grows again, to less, as much or
    more: within two seconds its sockets end with 1001, at whichever server.
    """
    chat = await alice.founds(bob)
    positions = await says_many(alice, chat, 15)
    everything = Line(await bob.client.ws_connect("/ws", headers=bob.headers))
    there = await elsewhere.takes(alice)
    lines = [await bob.listens_live(chat), everything, await there.listens_live(chat)]
    await asyncio.sleep(1.2)
    async with sql.transaction():
        await restore(sql, chat, 10)
        for _ in range(grown - 10):
            await sql.fetch(
                messenger.POST_MESSAGE, chat, bob.id, messenger.uuid7(), "other", None, "other")
    async with asyncio.timeout(2 + SOON_SECONDS):
        assert [await line.is_closed() for line in lines] == [1001] * 3
    back = await bob.listens(chat, f"?after={positions[14]}")
    assert (await back.hears("error"))["data"]["type"] == "history-rewritten"


async def test_post_after_a_silent_restore_is_not_told_as_the_next(
    sql: asyncpg.Connection, alice: Person, bob: Person
) -> None:
    """The next post at our own server, within the second in which nobody has polled yet, is not
    written out behind a history that is gone.
    """
    chat = await alice.founds(bob)
    await says_many(alice, chat, 5)
    line = await bob.listens_live(chat)
    async with sql.transaction():
        await restore(sql, chat, 4)
        await sql.fetch(
            messenger.POST_MESSAGE, chat, bob.id, messenger.uuid7(), "other", None, "other")
    await alice.says(chat, "six")
    with pytest.raises(AssertionError, match="closed with 1001"):
        await line.hears("message")


async def test_each_sync_has_its_own_replay_and_ready(alice: Person, bob: Person) -> None:
    """A second sync during a replay goes on from the smaller number; each gets its answers, with
    its `ref`, and numbers rise from each `replay` on.
    """
    chat = await alice.founds(bob)
    positions = await says_many(alice, chat, 30)
    everything = Line(await bob.client.ws_connect("/ws", headers=bob.headers))
    await everything.hears("chats")
    await everything.sends(type="sync", chats={chat: positions[19]}, ref=1)
    await everything.sends(type="sync", chats={chat: positions[4]}, ref=2)
    frames = await all_frames(everything, "ready", 2)
    assert [frame.get("ref") for frame in frames if frame["type"] == "replay"] == [1, 2]
    assert sorted(frame["ref"] for frame in frames if frame["type"] == "ready") == [1, 2]
    [*_, last] = [at for at, frame in enumerate(frames) if frame["type"] == "replay"]
    numbers = [frame["data"]["rev"] for frame in frames[last:] if frame["type"] == "message"]
    assert numbers == list(range(6, 31))
    assert frames[-1]["data"]["position"] == positions[29]
    await everything.close()


async def test_token_of_a_lost_account_is_nobody_elses(
    sql: asyncpg.Connection, alice: Person, bob: Person
) -> None:
    """After a restore another session gets the same id, of another user with the same id: the old
    tokens are refused.
    """
    [session] = await sql.fetch("select id from sessions where user_id = $1", bob.id)
    await sql.execute("update sessions set secret = 'another' where id = $1", session["id"])
    await asyncio.sleep(messenger.SESSION_TRUST_SECONDS + 0.1)
    assert (await bob.asks("GET", "/users/me")).status == 401
    answer = await bob.client.post(
        "/api/v1/users/refresh", json={"refresh_token": bob.refresh})
    assert answer.status == 401
    [row] = await sql.fetch("select ended_at from sessions where id = $1", session["id"])
    assert row["ended_at"] is None  # it is somebody else's, and goes on


async def test_socket_of_a_lost_session_is_closed(
    sql: asyncpg.Connection, alice: Person, bob: Person
) -> None:
    """After a restore that nobody noticed a socket does not go on as another user's, or where its
    user cannot end it: its session is not there, or is somebody else's. A renewed one stays."""
    lines = [Line(await each.client.ws_connect("/ws", headers=each.headers))
             for each in (alice, bob, bob)]
    for line in lines:
        await line.hears("chats")
    lost, other, kept = lines
    await bob.logs_in()
    await kept.sends(type="auth", token=bob.access, ref=1)
    await kept.hears("auth")
    await sql.execute("delete from sessions where user_id = $1", alice.id)
    await sql.execute(
        "update sessions set secret = 'another' where id = ("
        " select min(id) from sessions where user_id = $1)", bob.id)
    for line in (lost, other):
        with pytest.raises(AssertionError, match="closed with 4401"):
            await line.hears("chat")
    await kept.sends(type="ping", ref=2)
    await kept.hears("pong")
    await kept.close()


async def test_restore_that_only_undid_changes_of_members_closes_all_sockets(
    sql: asyncpg.Connection, alice: Person, bob: Person
) -> None:
    """Where the restored database has all messages of a chat, but members as they were before, all
    sockets are closed: who is a member again would hear nothing."""
    chats = [await alice.founds(bob) for _ in range(2)]
    line, other = await alice.listens_live(chats[0]), await bob.listens_live(chats[1])
    await sql.execute("update chats set version = version - 1 where id = $1", chats[0])
    for each in (line, other):
        with pytest.raises(AssertionError, match="closed with 1001"):
            await each.hears("message")


async def keep(sql: asyncpg.Connection) -> Callable[[], Awaitable[None]]:
    """Keep what the database has; answer what puts all of it back at once, as a restore does."""
    tables = [row["tablename"] for row in await sql.fetch(
        "select tablename from pg_tables where schemaname = 'public' and tablename !~ 'yoyo'")]
    await sql.execute("create schema past")
    for table in tables:
        await sql.execute(f"create table past.{table} as table {table}")

    async def put_back() -> None:
        async with sql.transaction():
            await sql.execute(f"truncate {', '.join(tables)}")
            await sql.execute("set local session_replication_role = replica")  # in any order
            for table in tables:
                await sql.execute(
                    f"insert into {table} overriding system value table past.{table}")
            await sql.execute("select setval('chats_id_seq', (select max(id) from chats))")

    return put_back


async def test_restore_that_no_chat_shows_closes_all_sockets(
    sql: asyncpg.Connection, alice: Person, bob: Person, carol: Person
) -> None:
    """Where as much was changed again after a restore as it undid, or another chat got the id of a
    lost one before anything was posted in either, all sockets are closed."""
    chat = await alice.founds(bob)
    watching = await alice.listens_live(chat)
    async with asyncio.timeout(SOON_SECONDS):
        while not await sql.fetchval("select count(*) from heartbeats"):
            await asyncio.sleep(0.05)
    past = await keep(sql)
    lost = await carol.founds(alice)
    await adds(alice, chat, carol)
    lines = [await carol.listens_live(lost), await carol.listens_live(chat), watching]
    await asyncio.sleep(2 * messenger.POLL_SECONDS)  # a beat, at least
    await past()
    await alice.expects(200, "PATCH", f"/chats/{chat}", {"name": "again"})
    assert await bob.founds(alice) == lost
    for line in lines:
        with pytest.raises(AssertionError, match="closed with 1001"):
            await line.hears("never")
    assert (await carol.asks("GET", f"/chats/{lost}")).status == 404


async def test_lost_refresh_may_be_repeated_until_its_answer_is_used(
    sql: asyncpg.Connection, alice: Person
) -> None:
    """After the 30 seconds too a lost answer is given again, as long as neither of its tokens was
    used; then the old one ends the session.
    """
    async def refreshes(token: str) -> Any:
        answer = await alice.client.post("/api/v1/users/refresh", json={"refresh_token": token})
        return answer.status, await answer.json()

    _, lost = await refreshes(alice.refresh)
    await sql.execute("update sessions set rotated_at = rotated_at - interval '5 minutes'")
    status, again = await refreshes(alice.refresh)
    assert status == 200
    alice.access = again["access_token"]
    await alice.gets("/users/me")
    assert (await refreshes(alice.refresh))[0] == 401
    assert (await refreshes(again["refresh_token"]))[0] == 401  # the session has ended
    assert lost["refresh_token"]


async def test_refresh_of_a_generation_that_was_lost_goes_on(
    sql: asyncpg.Connection, alice: Person
) -> None:
    """Restored to an older generation, the database takes the client's newer one as the newest."""
    token = alice.refresh
    for _ in range(3):
        answer = await alice.client.post("/api/v1/users/refresh", json={"refresh_token": token})
        token = (await answer.json())["refresh_token"]
    await sql.execute("update sessions set generation = 1, is_used = true")
    answer = await alice.client.post("/api/v1/users/refresh", json={"refresh_token": token})
    assert answer.status == 200
    alice.access = (await answer.json())["access_token"]
    assert (await alice.gets("/users/me"))["id"] == alice.id
