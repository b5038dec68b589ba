"""Changing an account, its sessions, and deleting it: what ends, what passes on, what stays."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

import asyncpg
import jwt
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

import messenger
from support.databases import until_waiting
from support.people import (
    PASSWORD,
    SOON_SECONDS,
    Person,
    follows,
    login,
    pages,
    puts,
    removes,
    roles,
)
from support.servers import SECRET_KEY, SETTINGS, Elsewhere

RFC3339_UTC = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"
NEW_PASSWORD = "battery staple"


async def changes(person: Person, status: int = 200, **given: Any) -> Any:
    """Change one's account; answer it, or the type of the problem."""
    told = await person.expects(status, "PUT", f"/users/{person.id}", given)
    return told if status == 200 else told["type"]


async def again(person: Person, agent: str = "another") -> Person:
    """Log the same person in once more, as a client of its own."""
    same = Person(person.client, person.name)
    same.id, same.lines = person.id, person.lines
    body = {"email": person.email, "password": PASSWORD}
    answer = await person.client.post(
        "/api/v1/users/login", json=body, headers={"User-Agent": agent}
    )
    tokens = await answer.json()
    same.access, same.refresh = tokens["access_token"], tokens["refresh_token"]
    return same


async def is_out(person: Person) -> bool:
    """Tell whether a session has ended: neither of its tokens counts."""
    asked = await person.asks("GET", "/users/me")
    body = {"refresh_token": person.refresh}
    refreshed = await person.client.post("/api/v1/users/refresh", json=body)
    assert asked.status in (200, 401)
    assert refreshed.status == asked.status
    return asked.status == 401


async def is_gone(person: Person) -> None:
    """Delete one's account."""
    await person.expects(204, "DELETE", f"/users/{person.id}")


# ---- Changing


async def test_change_of_an_account_that_is_deleted_meanwhile_is_refused_as_signed_out(
    alice: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new name that comes when the account is gone is no wrong password."""
    change = messenger.Database.change

    async def delete_first(self: messenger.Database, query: str, *arguments: Any) -> Any:
        if query == messenger.CHANGE_USER:
            await change(self, messenger.DELETE_USER, alice.id)
        return await change(self, query, *arguments)

    monkeypatch.setattr(messenger.Database, "change", delete_first)
    assert await changes(alice, 401, username="late") == "unauthorized"


async def test_name_and_email_are_changed(alice: Person, bob: Person, people: Any) -> None:
    """Everybody sees the new name and the new email logs in; the old ones are free for others."""
    chat = await alice.founds(bob)
    before = await alice.gets("/users/me")
    assert await changes(alice) == before
    assert await changes(alice, username="Алиса_1") == before | {"username": "Алиса_1"}
    changed = await changes(alice, email="new@example.com", current_password=PASSWORD)
    assert changed == before | {"username": "Алиса_1", "email": "new@example.com"}
    assert await alice.gets("/users/me") == changed
    assert await bob.gets(f"/users/{alice.id}") == {
        name: value for name, value in changed.items() if name != "email"
    }
    assert [one["id"] for one in await bob.gets("/users?q=аЛИ")] == [alice.id]
    assert await bob.gets("/users?q=alice") == []
    assert (await bob.gets(f"/chats/{chat}"))["participants"][0]["username"] == "Алиса_1"
    assert await login(alice, "alice@example.com") == 401
    assert await login(alice, "NEW@example.com") == 200
    assert (await people("alice")).id != alice.id


async def test_name_and_email_are_unique(alice: Person, bob: Person) -> None:
    """A name or email of another, in any case, is 409; one's own in another case is taken, and an
    invalid one is 422."""
    password = {"current_password": PASSWORD}
    assert await changes(alice, 409, username="BOB") == "username-taken"
    assert await changes(alice, 409, email="BOB@example.com", **password) == "email-taken"
    assert await changes(alice, 409, username="alice2", email=bob.email, **password)
    assert (await changes(alice, username="ALICE"))["username"] == "ALICE"
    assert (await changes(alice, email="ALICE@example.com", **password))["username"] == "ALICE"
    for given in (
        {"username": "a b"}, {"username": "xy"}, {"email": "x"}, {"password": "short"},
        {"password": "x" * 101}, {"username": None}, {"is_active": "no"}, {"id": 7},
    ):
        assert await changes(alice, 422, **given, **password) == "invalid-input", given
    assert (await alice.gets("/users/me"))["username"] == "ALICE"


async def test_only_oneself_is_changed_or_deleted(alice: Person, bob: Person) -> None:
    """Changing or deleting another's account is 403, and nobody's is 404."""
    for method, body in (("PUT", {"username": "other"}), ("DELETE", None)):
        problem = await bob.expects(403, method, f"/users/{alice.id}", body)
        assert problem["type"] == "not-allowed"
        problem = await bob.expects(404, method, f"/users/{bob.id + 1}", body)
        assert problem["type"] == "user-not-found"
    assert (await bob.gets(f"/users/{alice.id}"))["username"] == "alice"


async def test_present_password_is_needed(alice: Person) -> None:
    """A new email or password is 422 without the present password, 403 with a wrong one and 429
    after ten of those, and nothing changes."""
    for given in ({"email": "new@example.com"}, {"password": NEW_PASSWORD}):
        problem = await alice.expects(422, "PUT", f"/users/{alice.id}", given)
        assert problem["errors"][0]["loc"] == "$.current_password"
        wrong = given | {"current_password": NEW_PASSWORD, "username": "other"}
        assert await changes(alice, 403, **wrong) == "wrong-password"
    assert (await alice.gets("/users/me"))["username"] == "alice"
    await changes(alice, email="new@example.com", current_password=PASSWORD)
    for _ in range(SETTINGS.login_failures_per_account):
        await changes(alice, 403, password=NEW_PASSWORD, current_password="guess")
    body = {"password": NEW_PASSWORD, "current_password": PASSWORD}
    answer = await alice.asks("PUT", f"/users/{alice.id}", body)
    assert (answer.status, int(answer.headers["Retry-After"]) > 0) == (429, True)
    assert await login(alice, "new@example.com") == 200


async def test_new_password_ends_every_other_session(
    app: web.Application, alice: Person, bob: Person, elsewhere: Elsewhere,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A new password ends the tokens and sockets of every other session, at other servers too, even
    with every hint lost; the session that changed it goes on."""
    monkeypatch.setattr(app[messenger.BUS], "notify", lambda key, hint: None)
    chat = await alice.opens(bob)
    other, bobs = await again(alice), await bob.listens_live(chat)
    there = await elsewhere.takes(other)
    mine, theirs = await alice.listens_live(chat), await follows(other)
    far = await there.listens_live(chat)
    await changes(alice, password=NEW_PASSWORD, current_password=PASSWORD)
    assert await theirs.is_closed() == 4401
    assert await is_out(other)
    async with asyncio.timeout(SOON_SECONDS):
        assert await far.is_closed() == 4401
    assert await is_out(there)
    await mine.says("still here")
    assert await bobs.hears_text("still here")
    assert not await is_out(alice)
    assert await login(alice, alice.email) == 401
    assert await login(alice, alice.email, NEW_PASSWORD) == 200


async def test_of_two_new_passwords_at_once_one_counts(alice: Person) -> None:
    """A change that verified a password which was replaced meanwhile is refused with 403."""
    passwords = [f"new password {number}" for number in range(4)]
    answers = await asyncio.gather(*[
        alice.asks(
            "PUT", f"/users/{alice.id}", {"password": one, "current_password": PASSWORD}
        ) for one in passwords
    ])
    assert sorted(answer.status for answer in answers) == [200, 403, 403, 403]
    chosen = [answer.status for answer in answers].index(200)
    assert await login(alice, alice.email, passwords[chosen]) == 200


async def test_login_under_way_does_not_outlive_the_password(
    app: web.Application, alice: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login that verified the old password before the change gets no session after it."""
    database = app[messenger.DATABASE]
    change, held, go_on = database.change, asyncio.Event(), asyncio.Event()

    async def stops(statement: str, *arguments: Any) -> Any:
        if statement == messenger.START_SESSION:
            held.set()
            await go_on.wait()
        return await change(statement, *arguments)

    monkeypatch.setattr(database, "change", stops)
    trying = asyncio.create_task(login(alice, alice.email))
    await held.wait()
    await changes(alice, password=NEW_PASSWORD, current_password=PASSWORD)
    go_on.set()
    assert await trying == 401
    assert len(await alice.gets("/users/me/sessions")) == 1


async def test_inactive_account_is_signed_out_until_the_next_login(
    alice: Person, bob: Person
) -> None:
    """`is_active: false` ends every session, the caller's too; a login with the right password
    makes the account active again."""
    chat, other = await alice.opens(bob), await again(alice)
    lines = [await alice.listens_live(chat), await follows(other)]
    assert (await changes(alice, is_active=False))["is_active"] is False
    assert [await line.is_closed() for line in lines] == [4401, 4401]
    assert [await is_out(one) for one in (alice, other)] == [True, True]
    assert (await bob.gets(f"/users/{alice.id}"))["is_active"] is False
    await bob.says(chat, "for later")
    assert await login(alice, alice.email, NEW_PASSWORD) == 401
    assert (await bob.gets(f"/users/{alice.id}"))["is_active"] is False
    await alice.logs_in()
    assert (await alice.gets("/users/me"))["is_active"] is True
    assert await alice.history(chat) == ["for later"]
    assert (await changes(alice, is_active=True))["is_active"] is True
    assert not await is_out(alice)


# ---- Sessions


async def test_sessions_are_listed(
    alice: Person, bob: Person, sql: asyncpg.Connection
) -> None:
    """Each session that has not ended is listed, by id, with its client, when it was last used and
    when its refresh token expires; the caller's own is marked as current."""
    other = await again(alice, "Telescope/1.0")
    listed = await other.gets("/users/me/sessions")
    assert [one["current"] for one in listed] == [False, True]
    assert listed[1].keys() == {
        "id", "created_at", "last_used_at", "user_agent", "current", "expires_at"}
    assert listed[1]["user_agent"] == "Telescope/1.0"
    assert re.fullmatch(RFC3339_UTC, listed[1]["created_at"])
    assert [one["current"] for one in await alice.gets("/users/me/sessions")] == [True, False]
    tokens = await other.posts("/users/refresh", {"refresh_token": other.refresh}, status=200)
    used = (await alice.gets("/users/me/sessions"))[1]
    for one, refresh_token in ((listed[1], other.refresh), (used, tokens["refresh_token"])):
        assert re.fullmatch(RFC3339_UTC, one["expires_at"])
        expires_at = datetime.fromisoformat(one["expires_at"])
        claims = jwt.decode(refresh_token, options={"verify_signature": False})
        assert expires_at.timestamp() == claims["exp"]
    assert used["created_at"] == listed[1]["created_at"]
    moments = [datetime.fromisoformat(used[name]) for name in ("created_at", "last_used_at")]
    assert moments == sorted(set(moments))
    third, fourth = await again(alice), await again(alice)
    await fourth.posts("/users/logout", status=204)
    ids = [one["id"] for one in await third.gets("/users/me/sessions")]
    assert len(ids) == 3
    for limit, sizes in ((1, [1, 1, 1]), (2, [2, 1]), (3, [3])):
        found = await pages(alice, f"/users/me/sessions?limit={limit}")
        assert [len(page) for page in found] == sizes
        assert [one["id"] for page in found for one in page] == ids
    week = "update sessions set rotated_at = now() - interval '7 days 1 s' where id = $1"
    await sql.execute(week, ids[1])
    assert [one["id"] for one in await alice.gets("/users/me/sessions")] == [ids[0], ids[2]]


async def test_session_is_ended_from_another(alice: Person, bob: Person) -> None:
    """Ending a session answers 204 and ends its tokens and sockets and no others; again it is 404,
    and ending one's own is logging out."""
    chat, other = await alice.opens(bob), await again(alice)
    mine, theirs = await alice.listens_live(chat), await follows(other)
    current, ended = [one["id"] for one in await alice.gets("/users/me/sessions")]
    await alice.expects(204, "DELETE", f"/users/me/sessions/{ended}")
    assert await theirs.is_closed() == 4401
    assert await is_out(other)
    problem = await alice.expects(404, "DELETE", f"/users/me/sessions/{ended}")
    assert problem["type"] == "session-not-found"
    await mine.says("still here", ref="r")
    assert await mine.hears("ack")
    await alice.expects(204, "DELETE", f"/users/me/sessions/{current}")
    assert await mine.is_closed() == 4401
    assert await is_out(alice)


async def test_session_of_another_user_is_out_of_reach(alice: Person, bob: Person) -> None:
    """The id of another's session is 404 like an id of none, and neither token nor socket of theirs
    ends."""
    chat = await alice.opens(bob)
    line = await alice.listens_live(chat)
    (session,) = await alice.gets("/users/me/sessions")
    theirs, nobodys = [
        await bob.expects(404, "DELETE", f"/users/me/sessions/{each}")
        for each in (session["id"], 99999)]
    assert theirs == nobodys | {"request_id": theirs["request_id"]}
    assert not await is_out(alice)
    await bob.says(chat, "are you there?")
    assert await line.hears_text("are you there?")


# ---- Deleting


async def test_deleted_account_is_gone_and_its_messages_stay(
    alice: Person, bob: Person, carol: Person, people: Any
) -> None:
    """A deletion ends sessions and sockets, frees name and email and hides the user; their messages
    stay, with nobody as the sender, and no number is taken."""
    chat = await bob.founds(alice, carol)
    sent, theirs = await alice.says(chat, "words of mine"), await bob.says(chat, "of his")
    await alice.reads(chat, theirs)
    other, line = await again(alice), await follows(bob)
    lines = [await alice.listens_live(chat), await follows(other)]
    before = await bob.gets(f"/chats/{chat}")
    await is_gone(alice)
    assert [await closing.is_closed() for closing in lines] == [4401, 4401]
    assert [await is_out(one) for one in (alice, other)] == [True, True]
    assert await login(alice, alice.email) == 401
    update = await line.hears("chat_updated")
    assert (update["data"]["left"], update["data"]["participants"]) == ([alice.id], [])
    after = await bob.gets(f"/chats/{chat}")
    assert update["data"]["version"] == after["version"] == before["version"] + 1
    assert after["last_rev"] == before["last_rev"] == 2
    assert [one["user_id"] for one in after["participants"]] == [bob.id, carol.id]
    assert after["participants"] == await bob.gets(f"/chats/{chat}/participants")
    assert (after["participant_count"], after["unread_count"]) == (2, 1)
    kept = sent | {"sender_id": None}
    assert await bob.gets(f"/chats/{chat}/messages?q=words") == [kept]
    assert await bob.gets(f"/chats/{chat}/messages/{sent['id']}") == kept
    assert await bob.gets(f"/chats/{chat}/changes") == [kept, theirs]
    assert (await bob.gets(f"/users/{alice.id}", 404))["type"] == "user-not-found"
    assert [one["id"] for one in await bob.gets("/users")] == [bob.id, carol.id]
    assert await bob.gets("/users?q=alice") == []
    assert await puts(bob, chat, alice) == (404, "user-not-found")
    body = {"is_group": True, "name": "x", "participant_ids": [alice.id, carol.id]}
    assert str(alice.id) in (await bob.posts("/chats", body, 422))["errors"][0]["msg"]
    await bob.expects(204, "DELETE", f"/chats/{chat}/messages/{sent['id']}")
    assert (await line.hears("message_updated"))["data"]["sender_id"] is None
    namesake = await people("alice")
    assert namesake.id != alice.id
    assert await namesake.gets("/chats") == []


async def test_groups_pass_to_the_longest_standing(
    alice: Person, bob: Person, carol: Person, dave: Person
) -> None:
    """The longest-standing admin, else member, follows a deleted owner, and everybody is told."""
    led, flat = await alice.founds(bob, carol, dave), await alice.founds(carol, bob)
    alone = await alice.founds(dave)
    await removes(alice, alone, dave)
    await puts(alice, led, dave, "admin")
    await puts(alice, led, carol, "admin")
    lines = [await bob.listens_live(led), await bob.listens_live(flat)]
    await is_gone(alice)
    assert await roles(bob, led) == {bob.id: "member", carol.id: "owner", dave.id: "admin"}
    assert await roles(bob, flat) == {carol.id: "owner", bob.id: "member"}
    for line in lines:
        update = (await line.hears("chat_updated"))["data"]
        assert update["left"] == [alice.id]
        assert [(one["user_id"], one["role"]) for one in update["participants"]] == [
            (carol.id, "owner")
        ]


async def test_partner_of_a_deleted_account_reads_on(
    alice: Person, bob: Person, people: Any
) -> None:
    """A personal chat stays readable for the partner; posting is 409, over a socket too, and a new
    account of the same name gets a chat of its own."""
    chat = await alice.opens(bob)
    sent, last = await bob.says(chat, "hello"), await alice.says(chat, "goodbye")
    line = await bob.listens_live(chat)
    await is_gone(alice)
    assert (await line.hears("chat_updated"))["data"]["left"] == [alice.id]
    assert await bob.history(chat) == ["hello", "goodbye"]
    assert [one["id"] for one in await bob.gets("/chats")] == [chat]
    shown = await bob.gets(f"/chats/{chat}")
    assert list(await roles(bob, chat)) == [bob.id]
    assert (shown["participant_count"], shown["is_group"], shown["name"]) == (1, False, None)
    assert shown["last_message"] == last | {"sender_id": None}
    assert (shown["last_rev"], shown["unread_count"]) == (2, 1)
    assert (await bob.says(chat, "too late", 409))["type"] == "partner-gone"
    assert await bob.says(chat, "hello", 200, id=sent["id"]) == sent
    await line.says("too late", ref="r")
    assert (await line.hears("error"))["data"]["type"] == "partner-gone"
    assert (await bob.reads(chat, last))["seq"] == 2
    assert (await bob.gets(f"/chats/{chat}"))["unread_count"] == 0
    body = {"is_group": False, "participant_ids": [alice.id]}
    assert (await bob.posts("/chats", body, 422))["errors"][0]["loc"] == "$.participant_ids"
    assert await bob.opens(await people("alice")) != chat


@pytest.mark.usefixtures("no_polls")
async def test_deletion_is_heard_at_another_server_by_hint(
    alice: Person, bob: Person, elsewhere: Elsewhere
) -> None:
    """The deleted user's sockets at other servers end, and the others there are told."""
    chat = await alice.founds(bob)
    gone, stays = await elsewhere.takes(alice), await elsewhere.takes(bob)
    theirs, line = await gone.listens_live(chat), await follows(stays)
    await line.sends(type="sync", chats={str(chat): 0})
    await line.hears("ready")
    async with asyncio.timeout(SOON_SECONDS):  # until the servers hear each other
        heard = asyncio.create_task(line.hears("message"))
        while not heard.done():
            await bob.says(chat, "knock")
            await asyncio.wait([heard], timeout=0.05)
    await is_gone(alice)
    async with asyncio.timeout(SOON_SECONDS):
        assert await theirs.is_closed() == 4401
        assert (await line.hears("chat_updated"))["data"]["left"] == [alice.id]
    assert await is_out(gone)


async def test_who_is_added_while_being_deleted_does_not_stay(
    alice: Person, bob: Person, sql: asyncpg.Connection
) -> None:
    """A deletion waits for a group that the user is just joining, and leaves that too."""
    chat = await alice.founds(bob)
    await removes(alice, chat, bob)
    async with sql.transaction():
        await sql.execute(
            "select put_participant($1, $2, $3, null, 1000)", chat, alice.id, bob.id
        )
        deleting = asyncio.create_task(is_gone(bob))
        await until_waiting(sql)
    await deleting
    assert await roles(alice, chat) == {alice.id: "owner"}


async def test_half_deleted_account_is_seen_nowhere_and_finished_later(
    alice: Person, bob: Person, carol: Person, sql: asyncpg.Connection,
    aiohttp_server: Callable[..., Awaitable[TestServer]], database_url: str,
) -> None:
    """Where the server dies before a deleted user left their chats, everybody is served without
    them, and the next start finishes it."""
    group, personal = await alice.founds(bob, carol), await alice.opens(bob)
    sent = await bob.says(group, "read by alice")
    await alice.reads(group, sent)
    line = await follows(bob)
    await sql.execute("select delete_user($1)", alice.id)  # and not a step further
    assert await login(bob, alice.email) == 401
    for path in ("/chats", "/users", f"/chats/{personal}", f"/chats/{group}/messages",
                 f"/chats/{group}/changes", f"/chats/{group}/messages?q=read"):
        await bob.gets(path)
    assert list(await roles(bob, group)) == [bob.id, carol.id]
    assert [p["user_id"] for p in await bob.gets(f"/chats/{group}/participants")] == [
        bob.id, carol.id
    ]
    assert (await bob.gets(f"/chats/{group}/messages/{sent['id']}"))["read_by"] == []
    await puts(carol, group, carol)
    await bob.listens_live(group)
    await aiohttp_server(messenger.make_app(SETTINGS, database_url, SECRET_KEY))
    updates = [(await line.hears("chat_updated"))["data"] for _ in range(2)]
    assert {update["chat_id"] for update in updates} == {group, personal}
    assert [update["left"] for update in updates] == [[alice.id]] * 2
    assert await roles(bob, group) == {bob.id: "owner", carol.id: "member"}
    assert (await bob.says(personal, "too late", 409))["type"] == "partner-gone"
    async with asyncio.timeout(SOON_SECONDS):
        while await sql.fetchval("select is_leaving from users where id = $1", alice.id):
            await asyncio.sleep(0.01)


# ---- What nobody needs any more

OF_CHATS = (
    "chats", "participants", "messages", "reads", "departures", "revisions", "message_words",
    "search_positions",
)


async def test_empty_chats_are_swept_away_whole(
    app: web.Application, alice: Person, bob: Person, carol: Person, sql: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A group or personal chat that its last participant left is deleted from every table, piece by
    piece; other chats keep everything."""
    monkeypatch.setattr(messenger, "UPKEEP_ROWS", 3)
    tables = await sql.fetch(
        "select table_name::text from information_schema.columns"
        " where table_schema = 'public' and column_name = 'chat_id'"
        " and table_name in (select tablename from pg_tables)"
    )
    assert {row[0] for row in tables} == set(OF_CHATS) - {"chats"}
    group, personal, kept = await alice.founds(bob), await alice.opens(bob), await bob.founds(carol)
    for chat, who in ((group, alice), (personal, alice), (kept, bob)):
        for number in range(5):
            said = await who.says(chat, f"word {number}")
            path = f"/chats/{chat}/messages/{said['id']}"
            body = {"text": f"word, {number}"}
            await bob.reads(chat, await who.expects(200, "PATCH", path, body))
        await bob.gets(f"/chats/{chat}/messages?q=word")
    await removes(carol, kept, carol)

    async def rows_of(chat: int) -> list[int]:
        tables = {name: "id" if name == "chats" else "chat_id" for name in OF_CHATS}
        counts = (f"(select count(*) from {name} where {key} = $1)" for name, key in tables.items())
        return list(*await sql.fetch(f"select {', '.join(counts)}", chat))

    await removes(alice, group, bob)
    await removes(alice, group, alice)
    await is_gone(alice)
    before = [await rows_of(chat) for chat in (group, personal, kept)]
    assert all(before[1] + before[2] + before[0][2:])
    await messenger.keep_tidy(app)
    after = [await rows_of(chat) for chat in (group, personal, kept)]
    assert after == [[0] * len(OF_CHATS), *before[1:]]  # bob reads on in both
    await is_gone(bob)
    await messenger.keep_tidy(app)
    assert [await rows_of(chat) for chat in (personal, kept)] == [[0] * len(OF_CHATS)] * 2
