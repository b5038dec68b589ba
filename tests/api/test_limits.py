"""The limits: where each begins, what is heard beyond it, whom it concerns, and when it ends."""

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import aiohttp
import asyncpg
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

import messenger
from plumbing import database, endpoints, guard
from plumbing.deadline import REQUEST_SECONDS, party
from plumbing.guard import Rate
from support.databases import crowd, until_waiting
from support.people import PASSWORD, SOON_SECONDS, Line, Person, new_id
from support.raw import HANDSHAKE, TEXT, RawConnection, RawLine, handshake, transport_of
from support.servers import SECRET_KEY, SETTINGS, slots_of

Client = TestClient[Any, Any]
SLOW = 1000  # seconds until a spent allowance has one more: no test waits for it by chance
WRONG = "wrong password"


class House:
    """Servers on one database behind a proxy that is trusted, and the way of people to them."""

    def __init__(
        self, database_url: str, serve: Callable[..., Awaitable[TestServer]],
        client: Callable[..., Awaitable[Client]],
    ) -> None:
        self._database_url, self._serve, self._client = database_url, serve, client
        self.people: list[Person] = []

    async def opens(self, **settings: Any) -> Client:
        """Start a server with other settings; answer a client of it."""
        settings.setdefault("trusted_proxies", "127.0.0.1")
        changed = msgspec.structs.replace(SETTINGS, **settings)
        app = messenger.make_app(changed, self._database_url, SECRET_KEY)
        return await self._client(await self._serve(app))

    async def takes_in(self, client: Client, name: str) -> Person:
        """Register somebody there and log them in."""
        person = Person(client, name)
        await person.register()
        await person.logs_in()
        self.people.append(person)
        return person


@pytest.fixture
async def house(
    database_url: str, aiohttp_server: Any, aiohttp_client: Any
) -> AsyncIterator[House]:
    """Where servers are opened."""
    made = House(database_url, aiohttp_server, aiohttp_client)
    yield made
    for person in made.people:
        for line in person.lines:
            await line.close()


def goes_on_without_clients(client: Client) -> None:
    """Let calls go on whose clients hang up, as they do outside of tests."""
    runner = cast("TestServer", client.server).runner
    assert runner is not None
    assert runner.server is not None
    runner.server.handler_cancellation = False


async def posts(client: Client, path: str, body: Any, origin: str) -> tuple[int, str, int]:
    """POST from an address; answer the status, the kind of a refusal and its Retry-After."""
    headers = {"X-Forwarded-For": origin}
    async with client.post(f"/api/v1{path}", json=body, headers=headers) as answer:
        kind = (await answer.json()).get("type", "")
        return answer.status, kind, int(answer.headers.get("Retry-After", 0))


async def logs_in(
    client: Client, email: str, password: str = PASSWORD, origin: str = "203.0.113.1"
) -> tuple[int, str, int]:
    """Try to log in."""
    return await posts(client, "/users/login", {"email": email, "password": password}, origin)


async def registers(client: Client, name: str, origin: str = "203.0.113.1") -> tuple[int, str, int]:
    """Try to register."""
    body = {"email": f"{name}@example.com", "username": name, "password": PASSWORD}
    return await posts(client, "/users", body, origin)


async def attempts(sql: asyncpg.Connection) -> dict[str, int]:
    """What is counted in the database, by the first word of its key."""
    rows = await sql.fetch("select split_part(key, ':', 1), count(*) from attempts group by 1")
    return dict(rows)


# ---- Failed logins


async def test_failed_logins_of_an_address_are_limited(house: House) -> None:
    """So many logins from one address may fail, whatever the account; the next is 429 even with the
    right password, at every server, and other addresses are not affected."""
    here = await house.opens(login_failures_per_address=3)
    elsewhere = await house.opens(login_failures_per_address=3)
    await house.takes_in(here, "alice")
    for server, name in ((here, "alice"), (elsewhere, "bob"), (here, "no address")):
        refused = await logs_in(server, f"{name}@example.com", WRONG)
        assert refused == (401, "invalid-credentials", 0)
    for server in (here, elsewhere):
        status, kind, wait = await logs_in(server, "alice@example.com")
        assert (status, kind) == (429, "too-many-attempts")
        assert 890 < wait <= 900
        assert (await logs_in(server, "alice@example.com", origin="203.0.113.2"))[0] == 200
    # Whoever has an IPv6 address has many of them.
    for number in range(3):
        origin = f"2001:db8:1:2::{number}"
        assert (await logs_in(here, f"{number}@example.com", WRONG, origin))[0] == 401
    assert (await logs_in(here, "alice@example.com", origin="2001:db8:1:2:3::4"))[0] == 429
    assert (await logs_in(here, "alice@example.com", origin="2001:db8:1:3::4"))[0] == 200


async def test_failed_logins_of_an_account_are_limited_at_all_servers(house: House) -> None:
    """Failures at any server and from any address count against the account, and against no
    other."""
    servers = [await house.opens(login_failures_per_account=4) for _ in range(2)]
    for name in ("alice", "bob"):
        await house.takes_in(servers[0], name)
    for number in range(4):
        origin = f"203.0.113.{number}"
        assert (await logs_in(servers[number % 2], "ALICE@example.com", WRONG, origin))[0] == 401
    for server in servers:
        status, kind, wait = await logs_in(server, "alice@example.com", origin="203.0.113.9")
        assert (status, kind) == (429, "too-many-attempts")
        assert 890 < wait <= 900
        assert (await logs_in(server, "bob@example.com"))[0] == 200


async def test_limit_lets_one_in_when_the_oldest_failure_is_past(
    house: House, sql: asyncpg.Connection
) -> None:
    """Retry-After says when the oldest failure stops counting; then one more try is allowed."""
    here = await house.opens(login_failures_per_account=2)
    await house.takes_in(here, "alice")
    for _ in range(2):
        await logs_in(here, "alice@example.com", WRONG)
        await sql.execute("update attempts set at = at - interval '5 minutes'")
    status, _, wait = await logs_in(here, "alice@example.com")
    assert status == 429
    assert 290 < wait <= 300
    await sql.execute("update attempts set at = at - interval '301 seconds'")
    assert (await logs_in(here, "alice@example.com", WRONG))[0] == 401
    status, _, wait = await logs_in(here, "alice@example.com", WRONG)
    assert status == 429
    assert 280 < wait <= 300


async def test_login_forgives_one_try_of_the_address_and_all_of_the_account(
    house: House, sql: asyncpg.Connection
) -> None:
    """A login that succeeds clears the failures of its account, and takes back its own try from the
    address's count."""
    here = await house.opens(login_failures_per_account=3, login_failures_per_address=4)
    await house.takes_in(here, "alice")
    for _ in range(2):
        await logs_in(here, "alice@example.com", WRONG)
    for _ in range(10):
        assert (await logs_in(here, "alice@example.com"))[0] == 200
    assert await attempts(sql) == {"login from": 2, "register": 1}
    for _ in range(2):
        assert (await logs_in(here, "alice@example.com", WRONG))[0] == 401
    assert (await logs_in(here, "alice@example.com"))[:2] == (429, "too-many-attempts")
    assert (await logs_in(here, "alice@example.com", origin="203.0.113.2"))[0] == 200


async def test_logins_at_once_forgive_one_try_each(house: House, sql: asyncpg.Connection) -> None:
    """A household behind one address whose members all log in at once leaves nothing counted
    against it."""
    here = await house.opens(login_failures_per_address=30)
    for number in range(5):
        await house.takes_in(here, f"user_{number}")
    for _ in range(3):
        answers = await asyncio.gather(
            *(logs_in(here, f"user_{number % 5}@example.com") for number in range(20)))
        assert {status for status, *_ in answers} == {200}
    assert "login from" not in await attempts(sql)


async def test_tries_at_the_present_password_are_limited(house: House) -> None:
    """Whoever holds a token may guess the password no more often than at a login, and their guesses
    do not keep the owner from logging in."""
    here = await house.opens(login_failures_per_account=3)
    alice = await house.takes_in(here, "alice")
    body = {"email": "new@example.com", "current_password": WRONG}
    for _ in range(3):
        assert (await alice.asks("PUT", f"/users/{alice.id}", body)).status == 403
    answer = await alice.asks("PUT", f"/users/{alice.id}", body | {"current_password": PASSWORD})
    assert (answer.status, (await answer.json())["type"]) == (429, "too-many-attempts")
    assert int(answer.headers["Retry-After"]) > 890
    assert (await logs_in(here, alice.email))[0] == 200


async def test_a_server_that_is_too_busy_counts_no_failure(
    house: House, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login that is refused because others flood the server counts as no failure: a 503 leads to
    no 429."""
    here = await house.opens(login_failures_per_account=2, login_failures_per_address=2)
    await house.takes_in(here, "alice")
    before = await attempts(sql)
    with monkeypatch.context() as patch:
        patch.setattr(guard, "PASSWORD_QUEUE_MAX", 0)
        for _ in range(4):
            assert (await logs_in(here, "alice@example.com")) == (503, "service-unavailable", 1)
            assert (await registers(here, "bob")) == (503, "service-unavailable", 1)
    assert await attempts(sql) == before
    assert (await logs_in(here, "alice@example.com"))[0] == 200


async def test_tries_at_once_are_counted_one_after_the_other(
    sql: asyncpg.Connection, database_url: str
) -> None:
    """A try that is counted but not yet committed keeps the next from passing beside it."""
    other = await asyncpg.connect(database_url)
    async with sql.transaction():
        assert await sql.fetchval(messenger.COUNT_ATTEMPT, "somebody", 900, 1) is None
        beside = asyncio.create_task(other.fetchval(messenger.COUNT_ATTEMPT, "somebody", 900, 1))
        await until_waiting(sql)
        assert not beside.done()
    assert await beside == 900
    assert await other.fetchval(messenger.COUNT_ATTEMPT, "nobody", 900, 1) is None
    await other.close()


async def test_tries_of_an_address_hold_one_connection_to_the_database(
    house: House, sql: asyncpg.Connection
) -> None:
    """Tries of one address wait for one another outside the database: its connections are there for
    everybody else."""
    here = await house.opens(database_connections=3)
    alice = await house.takes_in(here, "alice")
    async with sql.transaction():
        await sql.fetchval(messenger.COUNT_ATTEMPT, "login from:203.0.113.1", 900, 100)
        trying = [asyncio.create_task(logs_in(here, f"{n}@example.com")) for n in range(20)]
        await until_waiting(sql)
        for _ in range(10):
            await alice.gets("/chats")
        assert (await logs_in(here, "nobody@example.com", origin="203.0.113.2"))[0] == 401
        assert not any(each.done() for each in trying)
    assert {status for status, *_ in await asyncio.gather(*trying)} <= {401, 503}


# ---- Registrations


async def test_registrations_of_an_address_are_limited(house: House) -> None:
    """So many registrations from one address are tried, at all servers together; a request that is
    invalid does not count."""
    servers = [await house.opens(registrations_per_address=3) for _ in range(2)]
    for _ in range(5):
        assert (await registers(servers[0], "no name"))[0] == 422
    assert (await registers(servers[0], "alice"))[0] == 201
    assert (await registers(servers[1], "alice"))[:2] == (409, "email-taken")
    assert (await registers(servers[1], "bob"))[0] == 201
    for server in servers:
        status, kind, wait = await registers(server, "carol")
        assert (status, kind) == (429, "too-many-attempts")
        assert 890 < wait <= 900
        assert (await logs_in(server, "alice@example.com"))[0] == 200
    assert (await registers(servers[0], "carol", "203.0.113.2"))[0] == 201


async def test_registrations_at_once_are_limited_too(house: House) -> None:
    """Of many registrations at the same moment as many get through as one after the other."""
    here = await house.opens(registrations_per_address=5)
    answers = await asyncio.gather(*(registers(here, f"user_{n}") for n in range(20)))
    assert sorted(status for status, *_ in answers) == [201] * 5 + [429] * 15


async def test_closed_registration_is_403(house: House, sql: asyncpg.Connection) -> None:
    """With REGISTRATION=closed nobody can make an account, and nothing is counted."""
    here = await house.opens(registration="closed")
    for name in ("alice", "no name"):
        assert (await registers(here, name))[:2] == (403, "registration-closed")
    assert await sql.fetchval("select count(*) from users") == 0
    assert await attempts(sql) == {}


# ---- Messages


async def test_messages_over_rest_and_sockets_share_one_allowance(house: House) -> None:
    """A user's messages and edits count together, over REST and sockets; beyond the burst REST
    answers 429, and a socket gets an `error` with the frame's `ref` and `chat_id` and stays open;
    reading, deleting and other users go on."""
    here = await house.opens(messages_burst=5, messages_per_second=1)
    here.app[messenger.RATES][messenger.TooManyMessages] = Rate(5, 1 / SLOW)
    alice, bob = [await house.takes_in(here, name) for name in ("alice", "bob")]
    chat = await alice.opens(bob)
    one, all_chats = await alice.listens_live(chat), Line(
        await here.ws_connect("/ws", headers=alice.headers))
    alice.lines.append(all_chats)
    sent = await alice.says(chat, "1")
    await alice.expects(200, "PATCH", f"/chats/{chat}/messages/{sent['id']}", {"text": "2"})
    await one.says("3", ref="three")
    await one.hears("ack")
    await all_chats.says("4", ref="four", chat_id=chat)
    await all_chats.hears("ack")
    await alice.says(chat, "5")

    answer = await alice.asks("POST", f"/chats/{chat}/messages", {"text": "6"})
    assert (answer.status, (await answer.json())["type"]) == (429, "too-many-messages")
    assert SLOW - 10 < int(answer.headers["Retry-After"]) <= SLOW
    answer = await alice.asks("PATCH", f"/chats/{chat}/messages/{sent['id']}", {"text": "6"})
    assert (answer.status, (await answer.json())["type"]) == (429, "too-many-messages")
    for line, named in ((one, {}), (all_chats, {"chat_id": chat})):
        await line.says("7", ref="seven", **named)
        heard = await line.hears("error")
        assert (heard["data"]["type"], heard["data"]["status"]) == ("too-many-messages", 429)
        assert heard["ref"] == "seven"
        assert heard.get("chat_id") == named.get("chat_id")
        await line.sends(type="read", message_id=sent["id"], **named)  # and it stays open
    await alice.reads(chat, sent)
    await alice.expects(204, "DELETE", f"/chats/{chat}/messages/{sent['id']}")
    for text in "12345":
        await bob.says(chat, text)
    assert await one.hears_text("5")
    assert await alice.history(chat) == ["", "3", "4", "5", *"12345"]


async def test_allowance_of_messages_grows_again(house: House) -> None:
    """After the seconds of Retry-After the next message is taken."""
    here = await house.opens(messages_burst=1, messages_per_second=1)
    alice, bob = [await house.takes_in(here, name) for name in ("alice", "bob")]
    chat = await alice.opens(bob)
    await alice.says(chat, "first")
    answer = await alice.asks("POST", f"/chats/{chat}/messages", {"text": "too soon"})
    assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
    await asyncio.sleep(1)
    await alice.says(chat, "second")
    assert await alice.history(chat) == ["first", "second"]


async def test_bad_input_costs_no_message(house: House) -> None:
    """A message whose shape is refused does not count; one that is sent again does."""
    here = await house.opens(messages_burst=2, messages_per_second=1)
    here.app[messenger.RATES][messenger.TooManyMessages] = Rate(2, 1 / SLOW)
    alice, bob = [await house.takes_in(here, name) for name in ("alice", "bob")]
    chat = await alice.opens(bob)
    line = await alice.listens_live(chat)
    for _ in range(3):
        await alice.says(chat, "", status=422)
        await line.sends(type="message")
        await line.hears("error")
    body = {"text": "once", "id": new_id()}
    for status in (201, 200, 429):
        answer = await alice.asks("POST", f"/chats/{chat}/messages", body)
        assert answer.status == status
    assert await alice.history(chat) == ["once"]


async def test_socket_is_closed_only_for_who_goes_on(house: House) -> None:
    """Refusals alone close no socket; only a socket that goes on sending is closed with 4429."""
    here = await house.opens(messages_burst=1, messages_per_second=1)
    here.app[messenger.RATES][messenger.TooManyMessages] = Rate(1, 1 / SLOW)
    here.app[messenger.RATES][messenger.FLOODING] = Rate(20, 1 / SLOW)
    alice, bob = [await house.takes_in(here, name) for name in ("alice", "bob")]
    chat = await alice.opens(bob)
    flooding, calm, other = [await who.listens_live(chat) for who in (alice, alice, bob)]
    for number in range(21):
        await flooding.says("hello", ref=number)
    for number in range(1, 21):
        assert (await flooding.hears("error"))["ref"] == number
    await flooding.sends(type="typing")
    assert await other.hears("typing")
    await flooding.says("and on")
    assert await flooding.is_closed() == 4429
    await calm.sends(type="typing")
    assert await other.hears("typing")


@pytest.mark.parametrize("flood", ["binary", "text"])
async def test_flood_of_any_frames_is_closed(
    app: web.Application, alice: Person, bob: Person, flood: str
) -> None:
    """Whatever a socket floods with, it is closed with 4429 in the end."""
    app[messenger.RATES][messenger.TooManyFrames] = Rate(20, 1 / SLOW)
    app[messenger.RATES][messenger.FLOODING] = Rate(20, 1 / SLOW)
    chat = await alice.opens(bob)
    line = await alice.listens_live(chat)
    with contextlib.suppress(aiohttp.ClientConnectionResetError, ConnectionError):
        for _ in range(100):
            if flood == "binary":
                await line.ws.send_bytes(b"{}")
            else:
                await line.ws.send_str("{}")
    assert await line.is_closed() == 4429


async def test_new_socket_has_an_allowance_of_its_own(app: web.Application, alice: Person) -> None:
    """A new socket does not pay for what closed sockets have spent."""
    app[messenger.RATES][messenger.TooManyFrames] = Rate(1, 1 / SLOW)
    for _ in range(150):  # enough for one to get the memory of another
        line = Line(await alice.client.ws_connect("/ws", headers=alice.headers))
        for kind in ("invalid-input", "too-many-frames"):
            await line.ws.send_str("{}")
            assert (await line.hears("error"))["data"]["type"] == kind
        await line.close()


async def test_deletions_and_read_marks_are_limited_by_themselves(house: House) -> None:
    """Deletions have an allowance as large as that of messages, read marks one five times as large,
    over REST and sockets together; neither takes from another, nor from somebody else's."""
    here = await house.opens(messages_burst=2, messages_per_second=1)
    here.app[messenger.RATES][messenger.TooManyMessages] = Rate(2, 1 / SLOW)
    here.app[messenger.RATES][messenger.TooMuchReading] = Rate(10, 1 / SLOW)
    alice, bob = [await house.takes_in(here, name) for name in ("alice", "bob")]
    chat = await alice.opens(bob)
    line = await alice.listens_live(chat)
    sent = [await alice.says(chat, text) for text in "12"]
    for message in (*sent, sent[0]):
        answer = await alice.asks("DELETE", f"/chats/{chat}/messages/{message['id']}")
    assert (answer.status, (await answer.json())["type"]) == (429, "too-many-messages")
    for number in range(5):
        await alice.reads(chat, sent[1])
        await line.sends(type="read", message_id=sent[1]["id"], ref=number)
        assert (await line.hears("ack"))["ref"] == number
    answer = await alice.asks("POST", f"/chats/{chat}/read", {"message_id": sent[1]["id"]})
    assert (answer.status, (await answer.json())["type"]) == (429, "too-much-reading")
    await line.sends(type="read", message_id=sent[1]["id"], ref="last")
    heard = await line.hears("error")
    assert (heard["data"]["type"], heard["ref"]) == ("too-much-reading", "last")
    said = await bob.says(chat, "3")
    await bob.reads(chat, said)
    await bob.expects(204, "DELETE", f"/chats/{chat}/messages/{said['id']}")


# ---- Changes of chats and accounts


async def test_changes_of_each_kind_are_limited(house: House) -> None:
    """Of each kind of change a user has so many at once, whatever chat it is of; the next is 429
    with Retry-After. What is invalid, other kinds and other users are not counted with it."""
    here = await house.opens(changes_burst=2, changes_per_minute=1)
    alice, bob = [await house.takes_in(here, name) for name in ("alice", "bob")]
    chats = [await alice.founds(bob) for _ in range(2)]
    group = {"is_group": True, "name": "x", "participant_ids": [bob.id]}
    person = f"participants/{bob.id}"
    for path in ("/chats", f"/chats/{chats[0]}"):  # is refused unseen
        await alice.expects(422, "POST" if path == "/chats" else "PATCH", path, {"name": ""})
    kinds = (
        ("POST", ["/chats"], group),
        ("PATCH", [f"/chats/{chat}" for chat in chats], {"name": "another"}),
        ("DELETE", [f"/chats/{chat}/{person}" for chat in chats], None),
        ("POST", [f"/chats/{chat}/{person}" for chat in chats], None),
        ("PUT", [f"/users/{alice.id}"], {"username": "alice_2"}),
    )
    for method, paths, body in kinds:
        statuses = [] if body is group else [
            (await alice.asks(method, (paths * 2)[number], body)).status for number in range(2)]
        assert 429 not in statuses
        answer = await alice.asks(method, paths[0], body)
        assert (answer.status, (await answer.json())["type"]) == (429, "too-many-changes")
        assert 50 < int(answer.headers["Retry-After"]) <= 60
    for status in (200, 200, 429):
        body = {"refresh_token": alice.refresh}
        async with here.post("/api/v1/users/refresh", json=body) as answer:
            assert answer.status == status
    await bob.founds(alice)
    assert len(await alice.gets("/chats")) == 3


async def test_large_groups_count_for_more(house: House) -> None:
    """A group that somebody makes of many counts for several changes, for each of its people has
    work; a small one counts for one."""
    here = await house.opens(changes_burst=22, changes_per_minute=1)
    alice, bob = [await house.takes_in(here, name) for name in ("alice", "bob")]
    many = {"is_group": True, "name": "x", "participant_ids": [*range(9_000, 9_100), bob.id]}
    for status in (422, 422, 429):  # 11 each; what is refused for its people was looked for
        answer = await alice.asks("POST", "/chats", many)
        assert answer.status == status, await answer.text()
    for _ in range(6):
        await bob.founds(alice)


async def test_tokens_of_an_ended_session_spend_nobody_elses_refreshes(house: House) -> None:
    """Refreshes are counted by the session: who holds the token of one that has ended keeps its
    user from nothing."""
    here = await house.opens(changes_burst=2, changes_per_minute=1)
    alice = await house.takes_in(here, "alice")
    stolen = alice.refresh
    await alice.posts("/users/logout", status=204)
    await alice.logs_in()
    for token, statuses in ((stolen, [401, 401, 429]), (alice.refresh, [200, 200, 429])):
        for status in statuses:
            async with here.post("/api/v1/users/refresh", json={"refresh_token": token}) as answer:
                assert answer.status == status


# ---- Calls under way


@pytest.fixture
async def readers(house: House) -> tuple[Person, Person, int]:
    """Alice and Bob, and a chat of theirs whose newest page has 1.6 MB, where a user may have one
    heavy read under way."""
    here = await house.opens(reads_per_user=1)
    alice, bob = [await house.takes_in(here, name) for name in ("alice", "bob")]
    chat = await alice.opens(bob)
    for _ in range(100):
        await alice.says(chat, "🙂" * 4096)
    return alice, bob, chat


class Held:
    """Work that is held until it is let go, and how much of it is under way."""

    def __init__(self) -> None:
        self.working = 0
        self._permits = asyncio.Semaphore(0)

    async def waits(self) -> None:
        """Work, as long as it is held."""
        self.working += 1
        try:
            await self._permits.acquire()
        finally:
            self.working -= 1

    def let_go(self, count: int = 100) -> None:
        """Let so much of it go on."""
        for _ in range(count):
            self._permits.release()


async def until(is_so: Callable[[], bool]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(SOON_SECONDS):
        while not is_so():
            await asyncio.sleep(0.01)


def app_of(client: Client) -> web.Application:
    """Answer the application that a client asks."""
    return cast("TestServer", client.server).app


def waiting_for(turns: guard.Turns) -> int:
    """Count who waits for a turn."""
    return len(turns._waiting)


async def test_heavy_calls_of_an_address_take_turns_with_others(house: House) -> None:
    """Heavy calls of all are worked on a few at a time; of those that wait, each address has one in
    its turn: many accounts of one address hold up another's only for one call."""
    here = await house.opens(
        database_connections=1, calls_per_user=0, reads_per_user=0, trusted_proxies="127.0.0.1")
    alice, bob = [await house.takes_in(here, name) for name in ("alice", "bob")]
    chat = await alice.opens(bob)
    for _ in range(50):
        await alice.says(chat, "🙂" * 4096)
    came: list[str] = []

    async def asks(person: Person, address: str) -> None:
        headers = {**person.headers, "X-Forwarded-For": address}
        async with here.get(f"/api/v1/chats/{chat}/messages", headers=headers) as answer:
            assert answer.status == 200, await answer.text()
        came.append(address)

    flood = [asyncio.create_task(asks(alice, "192.0.2.1")) for _ in range(30)]
    await asyncio.sleep(0.05)
    await asks(bob, "192.0.2.2")
    await asyncio.gather(*flood)
    assert came.index("192.0.2.2") < 20


@pytest.fixture
async def flooded(
    house: House, monkeypatch: Any, request: pytest.FixtureRequest
) -> tuple[Client, list[Person], Held]:
    """A server, maybe with other settings, and its users; the light reads and the handshakes of all
    but the first are held."""
    here = await house.opens(**getattr(request, "param", {"calls_per_user": 0}))
    goes_on_without_clients(here)
    people = [await house.takes_in(here, f"user_{number}") for number in range(7)]
    held = Held()
    get_user, join_rooms = messenger.Database.row, messenger.Rooms._join_rooms

    async def read_slowly(self: messenger.Database, statement: str, *arguments: Any) -> Any:
        if statement == messenger.SELECT_USER and arguments[0] != people[0].id:
            await held.waits()
        return await get_user(self, statement, *arguments)

    async def join_slowly(self: messenger.Rooms, socket: messenger.Socket) -> None:
        if socket.asker.user_id != people[0].id:
            await held.waits()
        await join_rooms(self, socket)

    monkeypatch.setattr(messenger.Database, "row", read_slowly)
    monkeypatch.setattr(messenger.Rooms, "_join_rooms", join_slowly)
    return here, people, held


FLOODING, ANOTHER = {"X-Forwarded-For": "192.0.2.1"}, {"X-Forwarded-For": "192.0.2.2"}


async def test_searches_hold_up_no_other_heavy_calls(house: House) -> None:
    """Searches may take long, and wait for one another; pages and lists do not wait for them, nor
    they for those."""
    here = await house.opens()
    alice, bob = [await house.takes_in(here, name) for name in ("alice", "bob")]
    chat = await alice.opens(bob)
    slots = slots_of(app_of(here))
    pages = (f"/chats/{chat}/messages", "/chats", f"/chats/{chat}/changes", "/users")
    for turns, free, held in (
        (slots.slow_reading, pages, [f"{pages[0]}?q=x"]),
        (slots.heavy_reading, [f"{pages[0]}?q=x"], pages),
    ):
        takers = [f"192.0.2.{number}" for number in range(turns._free)]
        for taker in takers:
            await turns.take(taker)
        for path in free:
            await alice.gets(path)
        for path in held:
            waiting = asyncio.create_task(alice.asks("GET", path))
            await until(lambda turns=turns: waiting_for(turns) == 1)
            turns.give_back(takers[0])
            assert (await waiting).status == 200
            await turns.take(takers[0])
        for taker in takers:
            turns.give_back(taker)


async def test_light_reads_of_an_address_take_turns_with_others(
    flooded: tuple[Client, list[Person], Held]
) -> None:
    """However many light calls of an address wait, of whatever users: half of the connections to
    the database are left to others, and another's call has its turn at once."""
    here, (bob, *strangers), held = flooded
    turns = slots_of(app_of(here)).reading

    async def asks(user: Person, origin: dict[str, str]) -> None:
        async with here.get("/api/v1/users/me", headers=user.headers | origin) as answer:
            assert answer.status == 200, await answer.text()

    flood = [asyncio.create_task(asks(user, FLOODING)) for user in strangers * 5]
    at_once = SETTINGS.database_connections // 2
    await until(lambda: waiting_for(turns) == len(flood) - at_once)
    await asyncio.wait_for(asks(bob, ANOTHER), SOON_SECONDS)
    assert held.working == at_once
    held.let_go()
    await asyncio.gather(*flood)


async def test_changes_of_an_address_leave_turns_to_others(house: House, monkeypatch: Any) -> None:
    """However many changes of an address wait for the database, of whatever users: another's is
    made at once. So it is beside a client that counts as two addresses."""
    here = await house.opens(calls_per_user=0)
    bob, *strangers = [await house.takes_in(here, f"user_{number}") for number in range(4)]
    held, rows = Held(), messenger.Database.rows
    flood_ids = {user.id for user in strangers}

    async def change_slowly(self: messenger.Database, statement: str, *arguments: Any) -> Any:
        if statement == messenger.END_SESSION and flood_ids & set(arguments):
            await held.waits()
        return await rows(self, statement, *arguments)

    async def ends(user: Person, origin: dict[str, str]) -> None:
        path = "/api/v1/users/me/sessions/999999"
        async with here.delete(path, headers=user.headers | origin) as answer:
            assert answer.status == 404, await answer.text()

    monkeypatch.setattr(messenger.Database, "rows", change_slowly)
    as_proxy = FLOODING | {"Forwarded": "for=192.0.2.9"}  # the two differ: it is the proxy's
    flood = [
        asyncio.create_task(ends(user, origin))
        for user in strangers * 10 for origin in (FLOODING, as_proxy)]
    writing, third = slots_of(app_of(here)).writing, SETTINGS.database_connections // 3
    await until(lambda: held.working == 2 * third)
    await until(lambda: waiting_for(writing) == len(flood) - 2 * third)
    await ends(bob, ANOTHER)
    held.let_go()
    await asyncio.gather(*flood)


async def test_large_groups_are_created_few_at_a_time(
    house: House, sql: asyncpg.Connection, monkeypatch: Any
) -> None:
    """However many large groups are created from however many addresses, few are worked on at once,
    one of each address, and other changes do not wait for them."""
    here = await house.opens(calls_per_user=0)
    users = [await house.takes_in(here, f"user_{number}") for number in range(4)]
    ids = await crowd(sql, 60)
    held, rows = Held(), messenger.Database.rows

    async def create_slowly(self: messenger.Database, statement: str, *arguments: Any) -> Any:
        if statement == messenger.CREATE_GROUP and len(arguments[2]) == len(ids):
            await held.waits()
        return await rows(self, statement, *arguments)

    async def creates(user: Person, address: int, members: list[int]) -> int:
        body = {"is_group": True, "name": "x", "participant_ids": members}
        origin = {"X-Forwarded-For": f"192.0.2.{address}"}
        async with here.post("/api/v1/chats", json=body, headers=user.headers | origin) as answer:
            return answer.status

    monkeypatch.setattr(messenger.Database, "rows", create_slowly)
    flood = [asyncio.create_task(creates(user, number, ids))
             for number, user in enumerate(users, 1) for _ in range(2)]
    slow = slots_of(app_of(here)).slow_writing
    at_once = max(2, min(5, os.cpu_count() or 1))
    await until(lambda: waiting_for(slow) == len(flood) - min(4, at_once))
    assert held.working == min(4, at_once)
    assert await creates(users[0], 1, ids[:3]) == 201
    held.let_go()
    assert set(await asyncio.gather(*flood)) == {201}


async def test_statements_belong_to_the_address_that_they_are_for(
    house: House, monkeypatch: Any
) -> None:
    """What is read for calls, frames and sockets waits for the database in turn with other
    addresses, also where a thousand chats are synced or changed."""
    here = await house.opens()
    alice, bob = [await house.takes_in(here, name) for name in ("alice", "bob")]
    chat = await alice.opens(bob)
    await alice.says(chat, "hello")
    fetch, asked = messenger.Database.fetch, []

    async def note(self: messenger.Database, statement: str, *arguments: Any) -> Any:
        asked.append((statement, party()))
        return await fetch(self, statement, *arguments)

    monkeypatch.setattr(messenger.Database, "fetch", note)
    assert (await bob.asks("GET", f"/users/{alice.id}", headers=ANOTHER)).status == 200
    assert (messenger.SELECT_USER, "192.0.2.2") in asked
    line = Line(await here.ws_connect("/ws", headers=bob.headers | FLOODING))
    await line.hears("chats")
    background = app_of(here)[messenger.ROOMS].background
    for number in range(background._free):
        await background.take(f"198.51.100.{number}")
    await line.sends(type="sync", chats={str(chat): 0})
    await until(lambda: waiting_for(background) == 1)
    background.give_back("198.51.100.0")
    await line.hears_text("hello")
    assert (messenger.SELECT_MARKS, "192.0.2.1") in asked
    assert (messenger.SELECT_MISSED, "192.0.2.1") in asked
    newest = (await alice.gets(f"/chats/{chat}"))["last_message"]["id"]
    await alice.expects(200, "PATCH", f"/chats/{chat}/messages/{newest}", {"text": "changed"})
    await line.hears("message_updated")
    assert (messenger.SELECT_ROOM, "192.0.2.1") in asked


async def test_passwords_that_are_changed_hold_up_nobody_elses_changes(
    house: House, monkeypatch: Any
) -> None:
    """However many addresses wait for their passwords to be hashed, or for chats to be left: what
    others change of chats and accounts is done at once."""
    here = await house.opens()
    bob, *strangers = [await house.takes_in(here, f"user_{number}") for number in range(6)]
    chat, held = await bob.founds(strangers[0]), Held()
    matching, leaving = messenger.Passwords.matching, messenger.leave_chats

    async def match_slowly(self: Any, password: str, hashed: str, party: str) -> Any:
        await held.waits()
        return await matching(self, password, hashed, party)

    async def leave_slowly(*args: Any) -> None:
        await held.waits()
        await leaving(*args)

    async def changes(user: Person, number: int) -> None:
        origin = {"X-Forwarded-For": f"192.0.2.{number}"}
        new = {"current_password": PASSWORD, "password": PASSWORD}
        method, body = ("DELETE", None) if number == 1 else ("PUT", new)
        async with here.request(
            method, f"/api/v1/users/{user.id}", json=body, headers=user.headers | origin
        ) as answer:
            assert answer.status in (200, 204, 403), await answer.text()  # who changed first

    monkeypatch.setattr(messenger.Passwords, "matching", match_slowly)
    monkeypatch.setattr(messenger, "leave_chats", leave_slowly)
    flood = [
        asyncio.create_task(changes(user, number))
        for number, user in enumerate(strangers) for _ in range(1 if number == 1 else 5)]
    await until(lambda: held.working == 1 + 3 * 4)
    async with asyncio.timeout(SOON_SECONDS):
        await bob.expects(200, "PATCH", f"/chats/{chat}", {"name": "another"})
        await bob.expects(200, "PUT", f"/users/{bob.id}", {"username": "robert"})
        await bob.expects(204, "DELETE", f"/chats/{chat}/participants/{bob.id}")
    held.let_go()
    await asyncio.gather(*flood)


async def test_what_is_written_belongs_to_the_address_that_it_came_from(
    house: House, monkeypatch: Any
) -> None:
    """Posts, edits, deletions and read marks take turns by their address, over REST and sockets."""
    here = await house.opens()
    alice, bob = [await house.takes_in(here, name) for name in ("alice", "bob")]
    chat = await alice.opens(bob)
    put, parties = messenger.ChatWriter.put, []

    def note(self: Any, item: Any, party: Any, *more: Any) -> None:
        parties.append((type(item).__name__, party))
        put(self, item, party, *more)

    monkeypatch.setattr(messenger.ChatWriter, "put", note)
    messages = f"/chats/{chat}/messages"
    for origin in (FLOODING, ANOTHER):
        parties.clear()
        sent = await (await alice.asks("POST", messages, {"text": "a"}, headers=origin)).json()
        for method, path, body in (
            ("PATCH", f"{messages}/{sent['id']}", {"text": "b"}),
            ("POST", f"/chats/{chat}/read", {"message_id": sent["id"]}),
            ("DELETE", f"{messages}/{sent['id']}", None),
        ):
            assert (await alice.asks(method, path, body, headers=origin)).status in (200, 204)
        line = Line(await here.ws_connect(f"/ws/{chat}", headers=alice.headers | origin))
        await line.sends(type="message", text="c", ref=1)
        await line.sends(type="read", message_id=sent["id"], ref=2)
        while (await line.hears("ack"))["ref"] != 2:
            pass
        await line.close()
        assert parties == [(kind, origin["X-Forwarded-For"]) for kind in (
            "NewPost", "NewChange", "NewRead", "NewChange", "NewPost", "NewRead")]


async def test_calls_of_an_address_begin_in_turns_with_others(house: House) -> None:
    """Of all calls that come at the same time few begin in each round of the loop, one of each
    address, and addresses take turns: many of one hold up no other's, whatever they ask for."""
    here = await house.opens()
    starts = slots_of(app_of(here)).starts
    assert starts is not None
    began: list[str] = []

    async def comes(address: str) -> None:
        await starts.come(address)
        began.append(address)

    for held in range(endpoints.STARTS_AT_ONCE):
        await starts.take(held)
    calls = [asyncio.create_task(comes("192.0.2.1")) for _ in range(50)]
    asked = asyncio.create_task(
        cast("Any", here.get("/nothing", headers=ANOTHER)).__aenter__())
    await until(lambda: waiting_for(starts) == 51)
    for held in range(endpoints.STARTS_AT_ONCE):
        starts.give_back(held)
    assert (await asked).status == 404
    assert len(began) < 25, "the call began when its turn came"
    await asyncio.gather(*calls)


async def test_body_of_who_has_gone_before_the_call_begins_is_no_error(
    house: House, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    """Whose call is yet to begin may hang up with half of a body sent: nothing is logged of it."""
    here = await house.opens()
    goes_on_without_clients(here)
    handle, lost = guard.PromptConnection._handle_request, asyncio.Event()

    async def lose(connection: guard.PromptConnection, *arguments: Any) -> Any:
        connection._end()  # as in the round of the loop before
        lost.set()
        return await handle(connection, *arguments)

    monkeypatch.setattr(guard.PromptConnection, "_handle_request", lose)
    caller = await RawConnection.opens(here.port, (
        b"POST /api/v1/users/login HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n{"))
    await lost.wait()
    await asyncio.sleep(0.1)
    assert "failed" not in caplog.text
    caller.close()


async def test_handshakes_of_an_address_take_turns_with_others(
    house: House, monkeypatch: Any
) -> None:
    """However many new sockets of an address wait to join their rooms, of whatever users: another's
    has the next turn but one."""
    here = await house.opens()
    bob, *strangers = [await house.takes_in(here, f"user_{number}") for number in range(7)]
    rooms, joined = app_of(here)[messenger.ROOMS], []
    join_piece = messenger.Rooms._join_piece

    def note(self: messenger.Rooms, socket: messenger.Socket, *args: Any) -> set[int]:
        joined.append(socket.address)
        return join_piece(self, socket, *args)

    async def comes(user: Person, origin: dict[str, str]) -> None:
        async with here.ws_connect("/ws", headers=user.headers | origin) as ws:
            assert (await ws.receive_json(timeout=SOON_SECONDS))["type"] == "hello"

    monkeypatch.setattr(messenger.Rooms, "_join_piece", note)
    await rooms.pieces.take("held")
    coming = [asyncio.create_task(comes(user, FLOODING)) for user in strangers]
    await until(lambda: waiting_for(rooms.pieces) == len(coming))
    coming.append(asyncio.create_task(comes(bob, ANOTHER)))
    await until(lambda: waiting_for(rooms.pieces) == len(coming))
    rooms.pieces.give_back("held")
    await asyncio.gather(*coming)
    assert joined.index("192.0.2.2") == 1


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_read_of_who_hangs_up_waits_for_no_turn(
    flooded: tuple[Client, list[Person], Held], method: str
) -> None:
    """A call that reads is given up once its client is gone, while it waits for its turn."""
    here, (_, *strangers), held = flooded
    turns, at_once = slots_of(app_of(here)).reading, SETTINGS.database_connections // 2
    callers = [
        await RawConnection.opens(here.port, (
            f"{method} /api/v1/users/me HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: Bearer {user.access}\r\n\r\n").encode())
        for user in strangers * 3]
    await until(lambda: waiting_for(turns) == len(callers) - at_once)
    for caller in callers:
        caller.writer.transport.abort()
    async with asyncio.timeout(SOON_SECONDS / 3):  # before they have waited too long
        while any(not turn.done() for turn in turns._waiting):
            await asyncio.sleep(0.01)
    assert held.working == at_once, "what has a connection to the database keeps it"
    held.let_go()
    await until(lambda: turns._free == SETTINGS.database_connections)


async def test_handshake_of_who_hangs_up_is_given_up(
    flooded: tuple[Client, list[Person], Held]
) -> None:
    """A handshake is given up once its client is gone, while it is to join its rooms."""
    here, (_, *strangers), held = flooded
    callers = [
        await RawConnection.opens(here.port, handshake(here.port, "/ws", user.access))
        for user in strangers * 3]
    await until(lambda: held.working == 2 * len(strangers))  # REPLAYS_PER_USER
    for caller in callers:
        caller.writer.transport.abort()
    rooms = app_of(here)[messenger.ROOMS]
    await until(lambda: rooms.sockets_of(None) == [])
    assert held.working == 0


@pytest.mark.real_deadlines
async def test_handshakes_are_refused_together_while_the_database_hangs(
    house: House, monkeypatch: Any
) -> None:
    """However many users of an address come, none of them waits for the others' handshakes."""
    here = await house.opens()
    people = [await house.takes_in(here, f"user_{number}") for number in range(7)]
    rows = messenger.Database.rows

    async def hang(self: messenger.Database, statement: str, *arguments: Any) -> Any:
        if statement == messenger.SELECT_FOLLOWED:
            await asyncio.sleep(1)
            raise messenger.Unavailable(database.ABSENT)
        return await rows(self, statement, *arguments)

    monkeypatch.setattr(messenger.Database, "rows", hang)
    began = time.monotonic()
    answers = await asyncio.gather(*(
        here.get("/ws", headers=person.headers | HANDSHAKE) for person in people * 2))
    assert {answer.status for answer in answers} == {503}
    assert time.monotonic() - began < 3


async def test_frames_of_who_hangs_up_after_an_auth_are_taken(
    house: House, monkeypatch: Any
) -> None:
    """A socket that is lost while its `auth` is looked up is not given up: what was sent behind it
    is taken."""
    here = await house.opens()
    cast("Any", here.server).runner.server.handler_cancellation = False  # as outside of tests
    alice, bob = [await house.takes_in(here, name) for name in ("alice", "bob")]
    chat = await alice.opens(bob)
    line = await RawLine().opens(here.port, f"/ws/{chat}", alice.access)
    held, rows = Held(), messenger.Database.rows

    async def look_up_slowly(self: messenger.Database, statement: str, *arguments: Any) -> Any:
        if statement == messenger.SELECT_SESSIONS_ALIVE:
            await held.waits()
        return await rows(self, statement, *arguments)

    app_of(here)[messenger.SESSIONS].trusted.forget()
    monkeypatch.setattr(messenger.Database, "rows", look_up_slowly)
    for sent in ({"type": "auth", "token": alice.access}, {"type": "message", "text": "behind it"}):
        await line.sends(TEXT, json.dumps(sent).encode())
    await until(lambda: held.working == 1)
    line.socket.close()
    await asyncio.sleep(0.2)  # the server hears of it
    held.let_go()
    async with asyncio.timeout(SOON_SECONDS):
        while await bob.history(chat) != ["behind it"]:
            await asyncio.sleep(0.01)


async def test_refused_call_of_who_hangs_up_takes_its_slot(house: House) -> None:
    """Who is refused rests in a slot of the address, even if they hang up at once: a flood of
    refusals costs as little as before."""
    here = await house.opens(calls_per_address=1)
    slots, address = slots_of(app_of(here)).address, "127.0.0.1"
    give_back = await slots.take(address)
    caller = await RawConnection.opens(here.port, (
        b"GET /api/v1/users/me HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer x\r\n\r\n"))
    await until(lambda: waiting_for(slots._of[address]) == 1)
    caller.writer.transport.abort()
    await asyncio.sleep(0.2)  # the server hears of it
    assert waiting_for(slots._of[address]) == 1
    give_back()


@pytest.mark.parametrize("flooded", [{"calls_per_user": 1}], indirect=True)
async def test_change_of_who_hangs_up_is_made(flooded: tuple[Client, list[Person], Held]) -> None:
    """A message is posted though its sender hung up while it waited for a slot."""
    here, (bob, carol, *_), held = flooded
    chat = await bob.opens(carol)
    reading = asyncio.create_task(carol.asks("GET", "/users/me"))
    await until(lambda: held.working == 1)
    caller = await RawConnection.opens(here.port, (
        f"POST /api/v1/chats/{chat}/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n"
        f'Authorization: Bearer {carol.access}\r\n\r\n{{"text": "gone"}}').encode())
    slots = slots_of(app_of(here)).light
    await until(lambda: waiting_for(slots._of[carol.id]) == 1)
    caller.writer.transport.abort()
    await asyncio.sleep(0.2)  # the server hears of it
    assert await bob.history(chat) == []
    held.let_go()
    assert (await reading).status == 200
    async with asyncio.timeout(SOON_SECONDS):
        while await bob.history(chat) != ["gone"]:
            await asyncio.sleep(0.01)


async def asks_unread(client: Client, path: str, token: str = "") -> socket.socket:
    """Send a request whose answer is not read, over a connection with small buffers."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", client.port))
    connection.setblocking(False)
    server = cast("TestServer", client.server)
    async with asyncio.timeout(SOON_SECONDS):
        while True:
            with contextlib.suppress(ValueError):  # it is not accepted yet
                transport_of(server, connection)
                break
            await asyncio.sleep(0.01)
    connection.sendall(
        f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        f"Authorization: Bearer {token}\r\n\r\n".encode())
    return connection


async def asks_for_unread_page(person: Person, chat: int) -> socket.socket:
    """Ask for a large page of a chat, which is not read."""
    return await asks_unread(
        person.client, f"/api/v1/chats/{chat}/messages?limit=100", person.access)


async def reads_to_the_end(connection: socket.socket) -> int:
    """Read all that comes; answer how many bytes came."""
    count = 0
    with contextlib.suppress(ConnectionError):
        while more := await asyncio.get_running_loop().sock_recv(connection, 1 << 20):
            count += len(more)
    return count


@pytest.mark.parametrize("end", ["reads", "hangs up", "stalls"])
async def test_answer_that_is_not_read_holds_a_slot(
    readers: tuple[Person, Person, int], monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Until a large answer was taken, its user's heavy reads wait for a while and are refused;
    others' are not, nor is what is light. It ends with the reading, or with the connection, which
    is cut where nothing is taken for long."""
    alice, bob, chat = readers
    monkeypatch.setattr(endpoints, "SLOT_SECONDS", 0.5)
    monkeypatch.setattr(guard, "STALLED_SECONDS", 3 if end == "stalls" else 300)
    heavy = f"/chats/{chat}/messages?limit=100"
    with await asks_for_unread_page(alice, chat) as unread:
        async with asyncio.timeout(SOON_SECONDS):
            while (await alice.asks("GET", "/chats")).status == 200:
                await asyncio.sleep(0.01)
        for path in (heavy, "/chats", f"/chats/{chat}/changes", f"/chats/{chat}/messages?q=x"):
            answer = await alice.asks("GET", path)
            assert (answer.status, (await answer.json())["type"]) == (429, "too-many-calls")
            assert answer.headers["Retry-After"] == "1"
            await bob.gets(path)
        await alice.gets(f"/chats/{chat}")
        await alice.says(chat, "and on")
        if end == "reads":
            assert await reads_to_the_end(unread) > 1_600_000
        elif end == "hangs up":
            unread.close()
        async with asyncio.timeout(SOON_SECONDS):
            while (await alice.asks("GET", heavy)).status == 429:
                await asyncio.sleep(0.01)
        if end == "stalls":
            assert await reads_to_the_end(unread) < 1_600_000


async def test_large_answers_of_an_address_that_are_not_read_are_bounded_together(
    readers: tuple[Person, Person, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While an address has not read so many bytes of heavy answers, no other is read for it,
    whoever asks; what is light is."""
    alice, bob, chat = readers
    heavy = f"/chats/{chat}/messages?limit=100"
    monkeypatch.setattr(endpoints, "UNREAD_OF_ADDRESS_MAX", 1_000_000)
    with await asks_for_unread_page(alice, chat) as unread:
        async with asyncio.timeout(SOON_SECONDS):
            while (await bob.asks("GET", heavy)).status == 200:
                await asyncio.sleep(0.01)
        answer = await bob.asks("GET", "/chats")
        assert (answer.status, (await answer.json())["type"]) == (429, "too-many-calls")
        await bob.gets(f"/chats/{chat}")
        assert await reads_to_the_end(unread) > 1_600_000
    async with asyncio.timeout(SOON_SECONDS):
        while (await bob.asks("GET", heavy)).status == 429:
            await asyncio.sleep(0.01)


async def test_small_answer_that_is_not_read_holds_a_slot(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that would fit into the buffers of both sides holds its slot until it is taken."""
    monkeypatch.setattr(endpoints, "SLOT_SECONDS", 0.3)
    here = await house.opens(calls_per_address=1)
    with await asks_unread(here, "/") as unread:
        async with asyncio.timeout(SOON_SECONDS):
            while (await here.get("/docs")).status == 200:
                await asyncio.sleep(0.01)
        assert (await here.get("/docs")).status == 429
        assert 30_000 < await reads_to_the_end(unread) < 64_000
    assert (await here.get("/docs")).status == 200


async def test_call_waits_for_a_slow_reader_longer_than_for_the_database(
    readers: tuple[Person, Person, int]
) -> None:
    """While somebody's answers are taken over a slow line, their next calls wait and are answered;
    the time until then is not taken from what the database has."""
    alice, _, chat = readers
    with await asks_for_unread_page(alice, chat) as slow:
        waiting = [asyncio.create_task(alice.asks("GET", "/chats")) for _ in range(3)]
        await asyncio.sleep(REQUEST_SECONDS + 0.3)
        assert await reads_to_the_end(slow) > 1_600_000
        assert {answer.status for answer in await asyncio.gather(*waiting)} == {200}


async def test_slow_reader_is_not_cut(
    readers: tuple[Person, Person, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who takes a part of a large answer now and then gets all of it."""
    alice, _, chat = readers
    monkeypatch.setattr(guard, "STALLED_SECONDS", 2)
    with await asks_for_unread_page(alice, chat) as slow:
        count, began = 0, time.monotonic()
        while time.monotonic() - began < 2 * guard.STALLED_SECONDS:
            await asyncio.sleep(0.25)
            count += len(await asyncio.get_running_loop().sock_recv(slow, 100_000))
        monkeypatch.setattr(guard, "STALLED_SECONDS", 300)
        assert count + await reads_to_the_end(slow) > 1_600_000


async def test_body_that_does_not_come_holds_no_slot(house: House) -> None:
    """A call is under way once its body is there: who sends it slowly may call meanwhile."""
    here = await house.opens(calls_per_user=1)
    alice = await house.takes_in(here, "alice")
    raw = await RawConnection.opens(here.port, (
        "POST /api/v1/chats HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n"
        f"Authorization: Bearer {alice.access}\r\n\r\n").encode())
    assert b"100 Continue" in await raw.reader.readuntil(b"\r\n\r\n")
    for _ in range(3):
        await alice.gets("/users/me")
    raw.writer.write(b"{}")
    assert (await raw.hears())[0] == 422
    raw.close()


async def test_calls_at_once_are_all_answered(house: House) -> None:
    """Of many calls of a user at once each is answered, one after the other; a socket is none."""
    here = await house.opens(reads_per_user=1, calls_per_user=1)
    alice, bob = [await house.takes_in(here, name) for name in ("alice", "bob")]
    chat = await alice.opens(bob)
    await alice.listens_live(chat)
    paths = ("/chats", f"/chats/{chat}/messages", f"/chats/{chat}/changes", "/users/me") * 5
    answers = await asyncio.gather(*(alice.asks("GET", path) for path in paths))
    assert {answer.status for answer in answers} == {200}


UNKNOWN = {  # a call of nobody known that is refused, and whether it keeps its slot for a while
    "without a token": ("GET", "/api/v1/users/me", 401, True),
    "of a socket that is none": ("GET", "/ws", 426, True),
    "that does not exist": ("GET", "/api/v1/nothing", 404, False),
    "of another shape": ("POST", "/api/v1/users/login", 400, False),
}


@pytest.mark.parametrize("call", UNKNOWN)
async def test_refused_calls_of_an_address_are_few_at_once(
    house: House, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Of an address so many calls are under way of which nobody knows whose they are; one that was
    refused for nothing that it cost keeps its slot for a while. Others do not wait: other
    addresses, and whoever is signed in."""
    method, path, status, keeps = UNKNOWN[call]
    here = await house.opens(calls_per_address=1)
    alice = await house.takes_in(here, "alice")
    monkeypatch.setattr(endpoints, "SLOT_SECONDS", 0.2)
    monkeypatch.setattr(guard, "REST_SECONDS", SLOW)
    origin = {"X-Forwarded-For": "203.0.113.1"}
    theirs = origin | ({"Authorization": f"Bearer {alice.access}"} if status == 426 else {})
    for _ in range(2):  # it is refused all the same, though later
        async with here.request(method, path, headers=theirs) as answer:
            assert answer.status == status
    for address, refused in (("203.0.113.1", keeps), ("203.0.113.2", False)):
        headers = {"X-Forwarded-For": address}
        async with here.get("/api/v1/health/liveness", headers=headers) as answer:
            assert answer.status == (429 if refused else 200)
    async with here.get("/api/v1/users/me", headers=origin | alice.headers) as answer:
        assert answer.status == 200


async def test_call_that_is_one_too_many_keeps_its_slot(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose call was refused with 429 has its slot back a little later; another user's calls wait
    for nothing."""
    here = await house.opens(calls_per_user=1, changes_burst=1, changes_per_minute=1)
    alice, bob = [await house.takes_in(here, name) for name in ("alice", "bob")]
    await alice.founds(bob)
    monkeypatch.setattr(endpoints, "SLOT_SECONDS", 0.2)
    monkeypatch.setattr(guard, "REST_SECONDS", SLOW)
    body = {"is_group": True, "name": "one more", "participant_ids": [bob.id]}
    for kind in ("too-many-changes", "too-many-calls"):
        assert (await alice.expects(429, "POST", "/chats", body))["type"] == kind
    await bob.founds(alice)


async def test_replays_of_a_user_are_read_two_at_once(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many sockets of a user that catch up at once two read a page; all get everything."""
    here = await house.opens()
    alice, bob = [await house.takes_in(here, name) for name in ("alice", "bob")]
    chat = await alice.opens(bob)
    for number in range(20):
        await alice.says(chat, f"number {number}")
    under_way, most = 0, 0
    replay_page = messenger.replay_page

    async def count(*args: Any) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await replay_page(*args)
        under_way -= 1

    monkeypatch.setattr(messenger, "replay_page", count)
    lines = await asyncio.gather(*(alice.listens(chat, "?after=0") for _ in range(20)))
    for line in lines:
        heard = [await line.hears("message") for _ in range(20)]
        assert [frame["data"]["seq"] for frame in heard] == list(range(1, 21))
        assert (await line.hears("ready"))["data"]["rev"] == 20
    assert most == messenger.REPLAYS_PER_USER


# ---- Typing


async def test_typing_is_limited(house: House) -> None:
    """So many `typing` frames of a user are told, over all of their sockets; then each is an
    `error` that nobody else hears."""
    here = await house.opens(typing_per_second=3)
    here.app[messenger.RATES][messenger.TooMuchTyping] = Rate(3, 1 / SLOW)
    alice, bob = [await house.takes_in(here, name) for name in ("alice", "bob")]
    chat = await alice.opens(bob)
    lines = [await alice.listens_live(chat) for _ in range(2)]
    other = await bob.listens_live(chat)
    for line in (*lines, lines[0]):
        await line.sends(type="typing", ref="yes")
        assert await other.hears("typing")
    for line in lines:
        await line.sends(type="typing", ref="no")
        heard = await line.hears("error")
        assert (heard["data"]["type"], heard["data"]["status"]) == ("too-much-typing", 429)
        assert heard["ref"] == "no"
    await other.sends(type="typing")
    assert await lines[0].hears("typing")
    await lines[0].says("marker")
    assert (await other.hears())["type"] == "message"  # and no more typing before it


# ---- Sockets


async def refusal(client: Client, path: str, headers: dict[str, str]) -> tuple[int, str, int]:
    """Try to open a socket; answer the status, kind and Retry-After of its refusal."""
    async with client.get(path, headers=HANDSHAKE | headers) as answer:
        kind = "" if answer.status == 101 else (await answer.json())["type"]
        return answer.status, kind, int(answer.headers.get("Retry-After", 0))


async def test_sockets_of_a_user_are_limited(house: House) -> None:
    """A user may have so many sockets open at once, of both kinds together; each that closes makes
    room for another, a refused one takes none, and other users have their own."""
    here = await house.opens(sockets_per_user=3)
    alice, bob = [await house.takes_in(here, name) for name in ("alice", "bob")]
    chat = await alice.opens(bob)
    lines = [await alice.listens_live(chat) for _ in range(2)]
    lines.append(Line(await here.ws_connect("/ws", headers=alice.headers)))
    alice.lines.append(lines[2])
    for path in ("/ws", f"/ws/{chat}"):
        assert await refusal(here, path, alice.headers) == (429, "too-many-sockets", 1)
    await bob.listens_live(chat)
    for line, path in ((lines[0], "/ws"), (lines[2], f"/ws/{chat}")):
        await line.close()
        async with asyncio.timeout(SOON_SECONDS):
            while (await refusal(here, "/ws/999999", alice.headers))[0] == 429:
                await asyncio.sleep(0.01)
        assert (await refusal(here, "/ws/999999", alice.headers))[0] == 404
        alice.lines.append(Line(await here.ws_connect(path, headers=alice.headers)))
        assert (await refusal(here, "/ws", alice.headers))[0] == 429


async def test_sockets_at_once_are_limited_too(house: House) -> None:
    """Of many handshakes at the same moment as many get through as one after the other."""
    here = await house.opens(sockets_per_user=4)
    alice = await house.takes_in(here, "alice")

    async def opens() -> int:
        try:
            alice.lines.append(Line(await here.ws_connect("/ws", headers=alice.headers)))
        except aiohttp.WSServerHandshakeError as refused:
            return refused.status
        return 101

    answers = await asyncio.gather(*(opens() for _ in range(20)))
    assert sorted(answers) == [101] * 4 + [429] * 16


async def test_refused_handshakes_are_limited(house: House) -> None:
    """So many handshakes from one address without a valid token are answered 401, on both paths
    together; the next are 429, but a valid token gets in, and other calls are not counted."""
    here = await house.opens(refused_handshakes_per_second=1)
    here.app[messenger.RATES][messenger.TooManyHandshakes] = Rate(3, 1 / SLOW)
    alice = await house.takes_in(here, "alice")
    origin = {"X-Forwarded-For": "203.0.113.1"}
    junk = {"Authorization": "Bearer junk"}
    for path, headers in (("/ws", {}), ("/ws/1", junk), ("/ws?token=junk", {})):
        assert (await refusal(here, path, origin | headers))[:2] == (401, "unauthorized")
    for path, headers in (("/ws", {}), ("/ws/1", junk), ("/ws", {"Authorization": "x"})):
        status, kind, wait = await refusal(here, path, origin | headers)
        assert (status, kind) == (429, "too-many-handshakes")
        assert SLOW - 10 < wait <= SLOW
    alice.lines.append(Line(await here.ws_connect("/ws", headers=alice.headers | origin)))
    assert (await refusal(here, "/ws", {"X-Forwarded-For": "203.0.113.2"}))[0] == 401
    async with here.get("/api/v1/users/me", headers=origin | junk) as answer:
        assert answer.status == 401


# ---- Without limits


async def test_rate_limits_off_lifts_them_all(house: House) -> None:
    """With RATE_LIMITS=off no setting of a limit has any effect."""
    names = (
        "login_failures_per_account", "login_failures_per_address", "registrations_per_address",
        "messages_burst", "messages_per_second", "typing_per_second", "sockets_per_user",
        "refused_handshakes_per_second", "changes_burst", "changes_per_minute",
    )
    here = await house.opens(rate_limits="off", **dict.fromkeys(names, 1))
    rates = here.app[messenger.RATES]
    for problem in rates:
        rates[problem] = Rate(1, 1 / SLOW)
    alice, bob = [await house.takes_in(here, name) for name in ("alice", "bob")]
    chat = await alice.opens(bob)
    for _ in range(3):
        assert (await logs_in(here, alice.email, WRONG))[0] == 401
        assert (await refusal(here, "/ws", {}))[0] == 401
        line, other = await alice.listens_live(chat), await bob.listens_live(chat)
        await alice.reads(chat, await alice.says(chat, "over REST"))
        await alice.founds(bob)
        await line.says("over a socket", ref=1)
        await line.hears("ack")
        await line.sends(type="typing")
        assert await other.hears("typing")


async def test_every_limit_is_a_setting() -> None:
    """Each rate allows what its settings say."""
    numbers = {
        "messages_burst": 7, "messages_per_second": 2, "typing_per_second": 3,
        "refused_handshakes_per_second": 4, "changes_burst": 5, "changes_per_minute": 120,
    }
    rates = messenger.make_rates(msgspec.structs.replace(SETTINGS, **numbers))
    for problem, burst in (
        (messenger.TooManyMessages, 7),
        (messenger.TooMuchReading, 35),
        (messenger.TooManyChanges, 5),
        (messenger.TooMuchTyping, 3),
        (messenger.TooManyHandshakes, 4),
    ):
        spent = [rates[problem].charge("somebody") for _ in range(burst + 1)]
        assert spent[:-1] == [0.0] * burst
        assert 0 < spent[-1] <= 0.5
    usual = messenger.Settings()
    assert (usual.messages_burst, usual.messages_per_second, usual.sockets_per_user) == (60, 20, 50)


async def test_what_tells_of_a_deleted_account_is_counted(house: House) -> None:
    """Who is in the chats of a deleted account is told at the pace of all that an address may have
    written to others."""
    here = await house.opens(deliveries_per_second=4)
    alice, bob = await house.takes_in(here, "alice"), await house.takes_in(here, "bob")
    chats = [await alice.founds(bob) for _ in range(4)]
    lines = [await alice.listens_live(chat) for chat in chats for _ in range(2)]
    began = time.monotonic()
    await bob.expects(204, "DELETE", f"/users/{bob.id}")
    for line in lines:
        await line.hears("chat_updated")
    assert time.monotonic() - began >= 3 * 2 / 4
