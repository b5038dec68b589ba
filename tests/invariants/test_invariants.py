"""The eight promises that everything else rests on, each in one test that says all of it."""

import asyncio
import contextlib
import itertools
import json
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from yarl import URL

import messenger
from support.people import (
    PASSWORD,
    SOON_SECONDS,
    Line,
    Person,
    adds,
    deletes,
    edits,
    follows,
    new_id,
    pages,
    removes,
)
from support.raw import LONG, stalls
from support.servers import SECRET_KEY, Elsewhere, Server
from support.valid_calls import ValidCalls, of_body, of_query, requests_about


@pytest.fixture
async def starts(data_folder: Path) -> AsyncIterator[Callable[..., Awaitable[Server]]]:
    """Start a server of its own process: `await starts(**settings)`; whatever is left of it ends
    with the test."""
    made: list[Server] = []

    async def start(**settings: Any) -> Server:
        made.append(Server(data_folder.parent, **settings))
        return await made[-1].starts()

    yield start
    for server in made:
        if server.process.returncode is None:
            await server.dies()


async def everything(person: Person, chat: int) -> dict[str, Any]:
    """Read a whole chat, by the ids of its messages."""
    found = await pages(person, f"/chats/{chat}/changes?limit=100")
    return {message["id"]: message for page in found for message in page}


async def until_gone(work: Any) -> None:
    """Do something again and again, until the server is gone."""
    with contextlib.suppress(aiohttp.ClientError, AssertionError, ConnectionError):
        while True:
            await work()


async def test_1_answered_means_durable(starts: Any, people_of: Any) -> None:
    """What was answered before kill -9 of every process is there after it: messages, edits,
    deletions, reads, names, participants and accounts."""
    running = await starts()
    alice, bob = await people_of(running, "alice"), await people_of(running, "bob")
    chat = await alice.founds(bob, name="0")
    target = await bob.says(chat, "0")
    acked: dict[str, Any] = {"deleted": [], "posted": [], "people": []}
    line = await alice.listens_live(chat)
    count = itertools.count(1)

    async def posts() -> None:
        await line.says("kept", id=new_id(), ref="r")
        acked["posted"].append((await line.hears("ack"))["data"]["id"])

    async def changes() -> None:
        name, path = f"{next(count)}", f"/chats/{chat}"
        acked["edited"] = await edits(bob, target, name)
        doomed = await bob.says(chat, name)
        acked["seq"] = (await alice.reads(chat, doomed))["seq"]
        await deletes(bob, doomed)
        acked["deleted"].append(doomed["id"])
        acked["name"] = (await alice.expects(200, "PATCH", path, {"name": name}))["name"]

    async def registers() -> None:
        name = f"person_{next(count)}"
        body = {"email": f"{name}@example.com", "username": name, "password": PASSWORD}
        user = await alice.posts("/users", body)
        await alice.posts(f"/chats/{chat}/participants/{user['id']}")
        acked["people"].append(user["id"])

    working = [asyncio.create_task(until_gone(one)) for one in (posts, changes, registers)]
    async with asyncio.timeout(SOON_SECONDS * 2):
        while min(len(acked[name]) for name in ("posted", "deleted", "people")) < 20:
            await asyncio.sleep(0.01)
    await running.dies()
    await asyncio.gather(*working)
    alice = await people_of(await running.starts(), "alice", alice)
    stored, shown = await everything(alice, chat), await alice.gets(f"/chats/{chat}")
    assert set(acked["posted"]) <= stored.keys()
    assert all(stored[one]["deleted_at"] for one in acked["deleted"])
    assert stored[target["id"]]["rev"] >= acked["edited"]["rev"]
    assert int(stored[target["id"]]["text"]) >= int(acked["edited"]["text"])
    assert int(shown["name"]) >= int(acked["name"])
    listed = await pages(alice, f"/chats/{chat}/participants?limit=100")
    there = {one["user_id"]: one for page in listed for one in page}
    assert set(acked["people"]) <= there.keys()
    assert there[alice.id]["last_read_seq"] >= acked["seq"]
    assert await running.stops() == 0


async def test_2_numbers_have_no_holes_and_never_repeat(
    sql: asyncpg.Connection, alice: Person, bob: Person, elsewhere: Elsewhere
) -> None:
    """At every moment the numbers of a chat are exactly 1 to its last, whatever is posted, edited,
    deleted and refused at two servers at once."""
    chat = await alice.opens(bob)
    there = await elsewhere.takes(alice)
    lines = [await alice.listens_live(chat), await there.listens_live(chat)]

    async def posts(line: Line) -> None:
        for number in range(30):
            await line.says("over a socket", ref="r")
            await line.says("refused", reply_to=new_id())
            if number % 5 == 4:
                await line.hears("ack")

    async def disturbs(who: Person) -> None:
        for number in range(15):
            sent = await who.says(chat, "over REST")
            if number % 3 == 0:  # each is changed once at most: so both of its numbers stay
                await deletes(who, sent)
            elif number % 3 == 1:
                await edits(who, sent, "changed")
                await edits(who, sent, "changed")
            await who.says(chat, "", 422)

    working = asyncio.gather(*map(posts, lines), *map(disturbs, (alice, there, alice)))
    seen: list[int] = []
    while not working.done() or seen[-1] < 2 * 30 + 3 * 25:
        numbers = await sql.fetchval(
            "select array(select seq from messages union all"
            " select rev from messages where rev <> seq order by 1)"
        )
        assert numbers == list(range(1, len(numbers) + 1))
        seen.append(len(numbers))
        await asyncio.sleep(0.005)
    await working
    assert seen == sorted(seen)
    assert len(set(seen)) > 5
    assert (await bob.gets(f"/chats/{chat}"))["last_rev"] == seen[-1] == 2 * 30 + 3 * 25


@pytest.fixture
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let changes be read in small pages, and be polled for often. Comes before `app`."""
    monkeypatch.setattr(messenger, "REPLAY_PAGE", 5)
    monkeypatch.setattr(messenger, "POLL_SECONDS", 0.1)


@pytest.mark.usefixtures("few_at_a_time")
async def test_3_who_comes_back_with_their_number_ends_up_with_everything(
    app: web.Application, alice: Person, bob: Person,
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever stays or reconnects, however often, to either server, with every hint lost, gets all
    changes, and on one socket the numbers only rise."""
    for each in (app, elsewhere.app):
        monkeypatch.setattr(each[messenger.BUS], "notify", lambda key, hint: None)
    chat = await alice.opens(bob)
    there, far = await elsewhere.takes(alice), await elsewhere.takes(bob)
    dice, end, made = random.Random(7), [10**9], [0]

    async def works(who: Person) -> None:
        sent: list[Any] = []
        for number in range(10):
            sent += await asyncio.gather(*[who.says(chat, f"{number}") for _ in range(8)])
            made[0] = (await edits(who, dice.choice(sent), f"edited {number}"))["rev"]
            if number % 4 == 3:
                await deletes(who, sent.pop(dice.randrange(len(sent))))

    async def keeps_coming_back() -> tuple[int, dict[str, Any]]:
        known: dict[str, Any] = {}
        last, times = 0, 0
        while last < end[0]:
            while times % 2 and made[0] < last + 15 and end[0] == 10**9:
                await asyncio.sleep(0.005)
            line = await dice.choice((bob, far)).listens(chat, f"?after={last}")
            times += 1
            heard_last = last
            for _ in range(dice.randrange(1, 20)):
                if last < end[0]:
                    heard = (await line.hears("message", "message_updated"))["data"]
                    assert heard["rev"] > heard_last
                    last = heard_last = heard["rev"]
                    known[heard["id"]] = heard
            await line.close()
        return times, known

    async def stays(line: Line) -> tuple[int, dict[str, Any]]:
        known: dict[str, Any] = {}
        last = 0
        while last < end[0]:
            heard = (await line.hears("message", "message_updated"))["data"]
            assert heard["rev"] > last
            last = heard["rev"]
            known[heard["id"]] = heard
        return 1, known

    lines = [await who.listens_live(chat) for who in (bob, far)]
    following = [asyncio.create_task(keeps_coming_back()) for _ in range(2)]
    following += [asyncio.create_task(stays(line)) for line in lines]
    await asyncio.gather(*map(works, (alice, there)))
    end[0] = (await alice.gets(f"/chats/{chat}"))["last_rev"] + 1
    await alice.says(chat, "the last")
    stored = await everything(bob, chat)
    reconnects = 0
    for times, known in await asyncio.gather(*following):
        assert known == stored
        reconnects += times
    assert reconnects > 6


async def test_4_an_id_is_one_message(
    database_url: str, starts: Any, people_of: Any
) -> None:
    """However often a message is sent, over REST and sockets, before kill -9 of the server and
    after it, it is stored once, under one number."""
    running = await starts(DATABASE_URL=database_url, SECRET_KEY=SECRET_KEY)
    alice, bob = await people_of(running, "alice"), await people_of(running, "bob")
    chat = await alice.opens(bob)
    ids = [new_id() for _ in range(150)]
    answered: list[Any] = []

    async def sends(who: Person, dice: random.Random) -> None:
        line = await who.listens_live(chat)

        async def once() -> None:
            name = dice.choice(ids)
            if dice.random() < 0.5:
                body = {"text": "once", "id": name}
                answer = await who.asks("POST", f"/chats/{chat}/messages", body)
                assert answer.status in (200, 201)
                answered.append(await answer.json())
            else:
                for _ in range(2):
                    await line.says("once", id=name, ref=name)
                answered.extend([(await line.hears("ack"))["data"] for _ in range(2)])

        await until_gone(once)

    sending = [asyncio.create_task(sends(alice, random.Random(each))) for each in range(4)]
    async with asyncio.timeout(SOON_SECONDS * 2):
        while len(answered) < 100:
            await asyncio.sleep(0.01)
    running.process.send_signal(signal.SIGKILL)
    await running.ends()
    await asyncio.gather(*sending)
    before = {one["id"]: one["seq"] for one in answered}
    assert {(one["id"], one["seq"]) for one in answered} == before.items()
    alice = await people_of(await running.starts(), "alice", alice)
    line = await alice.listens_live(chat)
    for name in ids:
        await line.says("once", id=name, ref=name)
    after = [(await line.hears("ack"))["data"] for _ in ids]
    assert before.items() <= {one["id"]: one["seq"] for one in after}.items()
    stored = await everything(alice, chat)
    assert stored.keys() == set(ids)
    assert sorted(one["seq"] for one in stored.values()) == list(range(1, len(ids) + 1))
    assert await running.stops() == 0


async def test_5_the_removed_hear_nothing_later_and_can_do_nothing(
    app: web.Application, alice: Person, bob: Person, carol: Person,
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once a removal was answered, the removed user's requests about the chat are 404, their frames
    are refused and they hear nothing posted later, at every server, even with all hints lost."""
    for each in (app, elsewhere.app):
        monkeypatch.setattr(each[messenger.BUS], "notify", lambda key, hint: None)
    chat = await alice.founds(bob, carol)
    sent, public = await carol.says(chat, "mine"), await alice.says(chat, "public")
    there, bob_there = await elsewhere.takes(carol), await elsewhere.takes(bob)
    lines = [await who.listens_live(chat) for who in (carol, there)]
    homes = [await follows(who) for who in (carol, there)]
    await removes(alice, chat, carol)
    await bob_there.says(chat, "secret")
    for line in (*lines, *homes):
        with contextlib.suppress(ConnectionError):  # it may be closed by now
            await line.says("uninvited", chat_id=chat)
            await line.sends(type="typing", chat_id=chat)
            await line.sends(type="sync", chat_id=chat, after=0)
    for who, (method, path, body) in itertools.product(
        (carol, there), requests_about(chat, sent["id"], bob.id)
    ):
        if not path.startswith("/ws"):
            problem = await who.expects(404, method, path, body)
            assert problem["type"] == "chat-not-found"
    await alice.says(chat, "secret")
    await edits(alice, public, "a secret too")
    for line in lines:
        while not line.ws.closed:
            frame = await line.ws.receive()
            assert frame.type is not aiohttp.WSMsgType.TEXT or "secret" not in frame.data
        assert line.ws.close_code == 4403
    for line in homes:
        heard = [await line.hears()]
        while heard[-1]["type"] != "chat_removed":
            heard.append(await line.hears())
        assert {frame["type"] for frame in heard} <= {"error", "chat_removed"}
    assert await bob.history(chat) == ["mine", "a secret too", "secret", "secret"]


async def test_6_watermarks_never_go_back(
    sql: asyncpg.Connection, alice: Person, bob: Person, elsewhere: Elsewhere
) -> None:
    """Reads in any order, over REST and sockets at two servers, and rejoining a group never make a
    watermark lower."""
    await sql.execute(
        "create table steps (user_id bigint, seq bigint, number bigint generated always as"
        " identity); create function note() returns trigger language plpgsql as"
        " 'begin insert into steps (user_id, seq) values (new.user_id, new.last_read_seq);"
        " return null; end'; create trigger note after insert or update on participants"
        " for each row execute function note()"
    )
    chat = await alice.founds(bob)
    there = await elsewhere.takes(bob)
    sent = [await alice.says(chat, str(number)) for number in range(30)]
    lines = [await bob.listens_live(chat), await there.listens_live(chat)]
    dice = random.Random(7)

    async def over_rest(who: Person) -> None:
        for one in dice.sample(sent[:-1], 15):
            assert (await who.reads(chat, one))["seq"] >= one["seq"]

    async def over_the_socket(line: Line) -> None:
        for one in dice.sample(sent[:-1], 15):
            await line.sends(type="read", message_id=one["id"])
        await line.says("done", ref="r")
        await line.hears("ack")

    await asyncio.gather(*map(over_rest, (bob, there)), *map(over_the_socket, lines))
    await removes(bob, chat, bob)
    assert (await adds(alice, chat, bob))["last_read_seq"] == 32
    assert (await bob.reads(chat, sent[0]))["seq"] == 32
    steps = "select seq from steps where user_id = $1 order by number"
    rising = [row["seq"] for row in await sql.fetch(steps, bob.id)]
    assert rising == sorted(rising)
    assert len(set(rising)) > 3


NASTY = (
    None, True, False, 0, -1, 1, 7, 1.5, 2**63 - 1, 2**63, 10**30, "", " ", "x", "\0", "a\0b",
    "x" * 101, "x" * 5000, "🙂" * 300, "İ", "\ufdfa" * 100, "\u202e", "❤️", "'", "%", "1", "null",
    "a@b.c", "2026-11-22T20:15:37Z", "owner", [], [1], [None], ["x"], {}, {"a": 1}, [[[]]],
    "00000000-0000-0000-0000-000000000000",
)


async def test_7_no_input_makes_a_5xx(
    calls: ValidCalls, caplog: pytest.LogCaptureFixture
) -> None:
    """Random requests to every endpoint and random frames, half valid and half anything, get no
    5xx, and nothing is logged as a fault."""
    dice, alice = random.Random(7), calls.alice

    def spoilt(given: dict[str, Any]) -> dict[str, Any]:
        changed = {name: dice.choice(NASTY) for name in given if dice.random() < 0.4}
        return {n: v for n, v in (given | changed).items() if dice.random() < 0.9}

    async def tries(endpoint: messenger.Endpoint) -> int:
        name, path = endpoint.handler.__name__, calls.path(endpoint)
        if dice.random() < 0.3 or endpoint.handler is messenger.delete_user:
            strange = {each: dice.choice((0, 7, 2**63 - 1, 2**63, new_id())) for each in calls.ids}
            path = endpoint.path.format(**strange)
        query = {each: str(dice.choice(NASTY)) for each in of_query(endpoint)}
        url = URL(path).update_query({n: v for n, v in query.items() if dice.random() < 0.8})
        body = None
        if of_body(endpoint):
            given = spoilt(calls.bodies[name])
            given |= {"current_password": "x"} if name == "change_user" else {}
            body = json.dumps(given if dice.random() < 0.9 else dice.choice(NASTY)).encode()
        answer = await alice.client.request(endpoint.method, url, data=body, headers=alice.headers)
        assert answer.status < 500, (endpoint.method, url, body, await answer.text())
        await answer.read()
        if answer.status == 401:
            await alice.logs_in()
        return answer.status

    statuses = [await tries(one) for one in messenger.ENDPOINTS for _ in range(20)]
    assert {200, 201, 204, 404, 422} <= set(statuses)
    await alice.logs_in()
    chat = await alice.opens(await someone(alice))
    lines = [await alice.listens_live(chat), await follows(alice)]
    fields = ("type", "chat_id", "text", "id", "ref", "after", "chats", "message_id", "token")
    for line, _ in itertools.product(lines, range(50)):
        kind = dice.choice(("message", "read", "typing", "sync", "auth", "ping"))
        frame = {each: dice.choice((*NASTY, chat)) for each in fields if dice.random() < 0.3}
        await line.sends(**({"type": kind} | frame))
    for line in lines:
        await line.says("still here", chat_id=chat, ref="the last")
        while (await line.hears("ack", "error")).get("ref") != "the last":
            pass
    assert [record for record in caplog.records if record.name == "messenger"] == []


async def someone(person: Person) -> Person:
    """Register somebody else."""
    other = Person(person.client, "someone_else")
    await other.register()
    return other


async def test_8_one_stalled_reader_costs_others_nothing(
    server: TestServer, raw: Any, alice: Person, bob: Person,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While one socket is not read the others hear every message at once and the memory for it is
    bounded; when it is read again it gets everything."""
    monkeypatch.setattr("plumbing.websocket.CLOSE_SECONDS", 0.2)
    chat = await alice.opens(bob)
    stalled, transport = await stalls(server, raw, bob, chat)
    lines = [await bob.listens_live(chat), await alice.listens_live(chat)]
    for number in range(1, 151):
        sent = await alice.says(chat, LONG)
        for line in lines:
            assert (await line.hears("message"))["data"]["seq"] == sent["seq"] == number
        assert transport.get_write_buffer_size() < messenger.BEHIND_BYTES + 2 * len(LONG)
    assert transport.get_write_buffer_size() > len(LONG), "it was no stalled reader"
    heard = [(await stalled.hears("message"))["data"]["seq"] for _ in range(number)]
    assert heard == list(range(1, number + 1))
    await stalled.hears("ready")
    await alice.says(chat, "live again")
    assert (await stalled.hears("message"))["data"]["text"] == "live again"
