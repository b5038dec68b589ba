"""The promises about order and delivery: numbers, groups, slow readers, and two servers."""

import asyncio
import json
import random
import socket
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from conftest import SOON_SECONDS, Elsewhere, Heard, Line, Person, knows, new_id
from test_socket import RawLine, raw  # noqa: F401 - a fixture

import messenger
import postgres


async def sockets_of(person: Person, chat: int, number: int) -> list[Line]:
    """Open several sockets of a person."""
    return [await person.listens_live(chat) for _ in range(number)]


async def told(line: Line, *types: str) -> list[Heard]:
    """Hear a frame of each type, in any order."""
    return [await line.hears(*types) for _ in types]


async def crowd(
    people: Callable[[str], Awaitable[Person]], founder: Person, number: int
) -> tuple[int, list[Person], list[Line]]:
    """Make a group of so many people, each with a socket."""
    others = [await people(f"person_{each}") for each in range(number)]
    chat = await founder.founds(*others)
    return chat, others, [await each.listens_live(chat) for each in others]


def post(chat: int, sender: Person, text: str = "hello", **fields: Any) -> messenger.NewPost:
    """Make an item for the writer."""
    post_id, reply_to = fields.get("id") or messenger.uuid7(), fields.get("reply_to")
    return messenger.NewPost(chat, sender.id, post_id, text, reply_to)


async def written(app: web.Application, *posts: messenger.NewPost) -> list[Any]:
    """Put items into the writer as one group; answer what became of each."""
    futures = [asyncio.create_task(app[messenger.POSTS].written(each)) for each in posts]
    async with asyncio.timeout(20):
        return list(await asyncio.gather(*futures, return_exceptions=True))


def numbers_of(outcomes: list[Any]) -> list[Any]:
    """Show outcomes shortly: the number of what was posted, the class of what was refused."""
    return [type(each) if isinstance(each, Exception) else each.ack.seq for each in outcomes]


# ---- One id is one message


async def test_posts_of_one_id_at_once_are_one_message(
    alice: Person, bob: Person, elsewhere: Elsewhere
) -> None:
    """20 posts of one id from sockets and REST, at two servers, are one message with one number."""
    chat = await alice.opens(bob)
    there = await elsewhere.takes(alice)
    listener, message_id = await bob.listens_live(chat), new_id()
    lines = await sockets_of(alice, chat, 3) + await sockets_of(there, chat, 2)
    body = {"text": "once", "id": message_id}
    path = f"/chats/{chat}/messages"
    answers, *_ = await asyncio.gather(
        asyncio.gather(*[who.asks("POST", path, body) for who in [alice, there] * 5]),
        *[line.says("once", id=message_id, ref=ref) for line in lines for ref in range(2)],
    )
    acks = [(await line.hears("ack", "error"))["data"] for line in lines for _ in range(2)]
    assert sorted(answer.status for answer in answers)[:-1] == [200] * 9
    assert answers[0].status in (200, 201)
    told = [await answer.json() for answer in answers]
    assert all(each == told[0] for each in told)
    assert acks == [{n: told[0][n] for n in ("id", "chat_id", "seq", "created_at")}] * 10
    assert (await alice.says(chat, "next"))["seq"] == 2
    assert [(await listener.hears("message"))["data"]["seq"] for _ in range(2)] == [1, 2]


async def test_equal_ids_in_a_group_are_one_message(
    app: web.Application, alice: Person, bob: Person
) -> None:
    """The first of equal ids counts, the same sender's others get its answer, another's fails."""
    chat, other = await alice.opens(bob), await alice.founds(bob)
    line = await bob.listens_live(chat)
    same = messenger.uuid7()
    outcomes = await written(
        app,
        post(chat, alice, "before"),
        post(chat, alice, "first", id=same),
        post(chat, alice, "second", id=same),
        post(chat, bob, "third", id=same),
        post(other, bob, "elsewhere", id=same),
        post(chat, alice, "after"),
    )
    assert numbers_of(outcomes) == [1, 2, 2, messenger.MessageIdTaken, 1, 3]
    assert outcomes[1].ack == outcomes[2].ack
    texts = [(await line.hears("message"))["data"]["text"] for _ in range(3)]
    assert texts == ["before", "first", "after"] == await alice.history(chat)
    assert await alice.history(other) == ["elsewhere"]


@pytest.mark.usefixtures("no_polls")
async def test_commit_whose_answer_was_lost_is_one_message_and_is_heard(
    app: web.Application, alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Committed but not answered: the server tries again, the message is one, and all hear it."""
    chat = await alice.opens(bob)
    line = await bob.listens_live(chat)
    database, lost = app[messenger.DATABASE], []
    rows = database.rows

    async def loses_the_answer(query: str, *arguments: Any) -> Any:
        found = await rows(query, *arguments)
        if query == messenger.POST_MESSAGES and len(lost) < 2:
            lost.append(query)
            raise messenger.ServiceUnavailable("lost")
        return found

    monkeypatch.setattr(database, "rows", loses_the_answer)
    answer = await alice.asks("POST", f"/chats/{chat}/messages", {"text": "once"})
    assert (answer.status, len(lost)) == (201, 2)
    assert (await line.hears("message"))["data"]["id"] == (await answer.json())["id"]
    await alice.says(chat, "next")
    assert (await line.hears("message"))["data"]["seq"] == 2
    assert await alice.history(chat) == ["once", "next"]


async def test_commit_that_was_never_answered_is_heard_and_its_retry_is_one_message(
    app: web.Application, alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the server gave up with 503 on what was committed, the client's retry gets it."""
    chat = await alice.opens(bob)
    line = await bob.listens_live(chat)
    database, body = app[messenger.DATABASE], {"text": "a", "id": new_id()}
    rows = database.rows

    async def loses_every_answer(query: str, *arguments: Any) -> Any:
        found = await rows(query, *arguments)
        if query == messenger.POST_MESSAGES:
            raise messenger.ServiceUnavailable("lost")
        return found

    monkeypatch.setattr(postgres, "WRITE_SECONDS", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(database, "rows", loses_every_answer)
        refused = await alice.asks("POST", f"/chats/{chat}/messages", body)
    assert (refused.status, "Retry-After" in refused.headers) == (503, True)
    heard = (await line.hears("message"))["data"]
    assert await alice.says(chat, status=200, **body) == heard
    assert (await alice.says(chat, "b"))["seq"] == 2


# ---- Groups


async def test_bad_item_fails_alone(
    app: web.Application, alice: Person, bob: Person, carol: Person
) -> None:
    """An item that makes its whole group fail is refused, its neighbours keep their order."""
    chat, other = await alice.opens(bob), await bob.founds(carol)
    line = await bob.listens_live(chat)
    outcomes = await written(
        app,
        post(chat, alice, "one"),
        post(chat, alice, "a\0b"),  # PostgreSQL cannot take it: the statement fails
        post(chat, bob, "two"),
        post(other, alice, "not hers"),
        post(2**62, alice, "no such chat"),
        post(chat, alice, "three", reply_to=messenger.uuid7()),
        post(chat, alice, "three"),
    )
    no_chat = messenger.ChatNotFound
    assert numbers_of(outcomes) == [
        1, asyncpg.CharacterNotInRepertoireError, 2, no_chat, no_chat, messenger.ReplyNotFound, 3,
    ]
    assert [(await line.hears("message"))["data"]["seq"] for _ in range(3)] == [1, 2, 3]
    assert await alice.history(chat) == ["one", "two", "three"]


async def test_refused_items_in_a_group_burn_no_number(
    app: web.Application, alice: Person, bob: Person, carol: Person
) -> None:
    """The same without a hard failure: what is refused within one commit takes no number."""
    chat, other = await alice.opens(bob), await bob.founds(carol)
    outcomes = await written(
        app,
        post(other, alice, "not hers"),
        post(chat, alice, "one"),
        post(chat, alice, "no reply", reply_to=messenger.uuid7()),
        post(chat, alice, "two"),
    )
    no_chat, no_reply = messenger.ChatNotFound, messenger.ReplyNotFound
    assert numbers_of(outcomes) == [no_chat, 1, no_reply, 2]


async def test_reply_may_name_an_earlier_item_of_its_group(
    app: web.Application, alice: Person, bob: Person
) -> None:
    """A reply to an earlier item of the group is posted; to a later or a refused one it is not."""
    chat, other = await alice.opens(bob), await alice.founds(bob)
    ids = [messenger.uuid7() for _ in range(8)]
    outcomes = await written(
        app,
        post(chat, alice, id=ids[0]),
        post(chat, bob, id=ids[1], reply_to=ids[0]),
        post(chat, alice, id=ids[2], reply_to=ids[1]),
        post(chat, bob, id=ids[3], reply_to=ids[4]),  # a later one
        post(chat, bob, id=ids[4], reply_to=ids[3]),  # a refused one
        post(chat, bob, id=ids[5], reply_to=ids[4]),  # refused as a reply to a refused one
        post(chat, bob, id=ids[6], reply_to=ids[6]),  # itself
        post(other, bob, id=ids[7], reply_to=ids[0]),  # of another chat
    )
    refused = messenger.ReplyNotFound
    assert numbers_of(outcomes) == [1, 2, 3] + [refused] * 5
    replies = [m["reply_to"] for m in await alice.gets(f"/chats/{chat}/messages")]
    assert replies == [None, str(ids[0]), str(ids[1])]


async def test_chain_of_replies_to_a_refused_one_delays_nobody(
    app: web.Application, alice: Person, bob: Person
) -> None:
    """A full group in which each replies to the one before it is decided, and its neighbour too."""
    chat = await alice.opens(bob)
    ids = [messenger.uuid7() for _ in range(postgres.GROUP_ITEMS_MAX)]
    chain = [
        post(chat, alice, id=one, reply_to=before)
        for before, one in zip([messenger.uuid7(), *ids], ids[:-1], strict=False)
    ]
    outcomes = await written(app, *chain, post(chat, bob, "fine"))
    assert numbers_of(outcomes) == [messenger.ReplyNotFound] * len(chain) + [1]


async def test_chat_whose_row_is_held_delays_no_other(
    app: web.Application, sql: asyncpg.Connection, alice: Person, bob: Person
) -> None:
    """While somebody else holds a chat's lock, the others' posts are committed all the same."""
    held, free = await alice.opens(bob), await alice.founds(bob)
    line = await bob.listens_live(held)
    stuck = post(held, alice, "later")
    async with sql.transaction():
        await sql.execute("select 1 from chats where id = $1 for update", held)
        first, *others = await written(app, stuck, *[post(free, alice) for _ in range(3)])
        assert numbers_of(others) == [1, 2, 3]
    assert isinstance(first, messenger.ServiceUnavailable)
    assert numbers_of(await written(app, stuck, post(held, alice))) == [1, 2]
    assert (await line.hears("message"))["data"]["text"] == "later"


async def test_post_that_waits_for_a_removal_is_refused(
    app: web.Application, sql: asyncpg.Connection, alice: Person, bob: Person
) -> None:
    """Membership is asked after the chat's lock: a removal under way lets nothing in behind it."""
    chat = await alice.founds(bob)
    waiting = """
        select count(*) from pg_stat_activity
        where wait_event_type = 'Lock' and datname = current_database()
    """
    async with sql.transaction():
        await sql.execute("select remove_participant($1, $2, $3)", chat, alice.id, bob.id)
        outcome = asyncio.create_task(written(app, post(chat, bob, "too late")))
        while not await sql.fetchval(waiting):
            await sql.execute("select pg_stat_clear_snapshot()")
            await asyncio.sleep(0.01)
    assert numbers_of(await outcome) == [messenger.ChatNotFound]
    assert (await alice.says(chat, "next"))["seq"] == 1


async def commits(app: web.Application, sql: asyncpg.Connection) -> int:
    """Ask PostgreSQL how many transactions of this database were committed."""
    flush = "select pg_stat_force_next_flush(), pg_sleep(0.2)"
    everyone = postgres.CONNECTIONS_MAX  # each connection counts for itself
    await asyncio.gather(*[app[messenger.DATABASE].rows(flush) for _ in range(everyone)])
    await sql.execute("select pg_stat_clear_snapshot()")
    count = "select xact_commit from pg_stat_database where datname = current_database()"
    return int(await sql.fetchval(count))


async def test_many_senders_are_committed_in_groups(
    app: web.Application,
    sql: asyncpg.Connection,
    alice: Person,
    people: Callable[[str], Awaitable[Person]],
) -> None:
    """64 senders at once: by PostgreSQL's own counter, several messages to a commit."""
    chat, _, lines = await crowd(people, alice, 64)
    before = await commits(app, sql)

    async def sends(line: Line) -> None:
        for number in range(8):
            await line.says("hello", ref=number)
            assert (await line.hears("ack", "error"))["ref"] == number

    await asyncio.gather(*[sends(line) for line in lines])
    made = await commits(app, sql) - before
    assert (await alice.gets(f"/chats/{chat}"))["last_rev"] == 64 * 8
    assert made < 64 * 8 / 3, f"{made} commits for {64 * 8} messages"


async def test_numbers_have_no_holes_and_rise_with_time_at_two_servers(
    sql: asyncpg.Connection, alice: Person, bob: Person, elsewhere: Elsewhere
) -> None:
    """Two servers post to one chat at once: numbers 1 to n, in order of time, heard so at both."""
    chat = await alice.opens(bob)
    there = await elsewhere.takes(bob)
    listeners = [await bob.listens_live(chat), await there.listens_live(chat)]
    lines = await sockets_of(alice, chat, 4) + await sockets_of(there, chat, 4)

    async def posts(line: Line) -> None:
        for number in range(40):
            await line.says("hello", ref=number)
            if number % 10 == 9:
                await line.hears("ack")

    async def hears(line: Line) -> list[int]:
        return [(await line.hears("message"))["data"]["seq"] for _ in range(320)]

    heard, *_ = await asyncio.gather(
        asyncio.gather(*map(hears, listeners)), *[posts(line) for line in lines]
    )
    assert heard == [list(range(1, 321))] * 2
    rows = await sql.fetch("select seq, rev, created_at from messages order by seq")
    assert [row["seq"] for row in rows] == [row["rev"] for row in rows] == list(range(1, 321))
    times = [row["created_at"] for row in rows]
    assert times == sorted(times)


# ---- Slow readers

LONG = "x" * 4000


async def stalls(
    server: TestServer, open_raw: Any, person: Person, chat: int
) -> tuple[RawLine, asyncio.Transport]:
    """Open a socket that does not read, with small buffers in the kernel; and its server's end."""
    line = await open_raw(person, chat, receive_bytes=4096)
    await line.hears("ready")
    name = line.socket.getsockname()
    assert server.runner is not None
    assert server.runner.server is not None
    transports = [each.transport for each in server.runner.server.connections]
    [transport] = [t for t in transports if t and t.get_extra_info("peername") == name]
    end = transport.get_extra_info("socket")
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
    return line, transport


async def test_stalled_reader_delays_nobody_and_catches_up(
    server: TestServer, raw: Any, alice: Person, bob: Person  # noqa: F811
) -> None:
    """While one does not read, others hear all, its buffer is bounded; later it hears all too."""
    chat = await alice.opens(bob)
    stalled, transport = await stalls(server, raw, bob, chat)
    other, sender = await bob.listens_live(chat), await alice.listens_live(chat)
    number = 0
    buffered = []
    for _ in range(20):
        for _ in range(50):
            number += 1
            await sender.says(LONG, ref=number)
        while (await sender.hears("ack"))["ref"] < number:
            pass
        while (await other.hears("message"))["data"]["seq"] < number:
            pass
        buffered.append(transport.get_write_buffer_size())
    assert max(buffered) > 100_000, "it was no stalled reader"
    assert max(buffered) < messenger.BEHIND_BYTES + 50 * 5000
    assert not transport.is_closing()
    await sender.says("the end")
    numbers, frames = [], []
    while not numbers or numbers[-1] <= number:
        frame = await stalled.hears()
        frames.append(frame["type"])
        if frame["type"] == "message":
            numbers.append(frame["data"]["seq"])
    assert numbers == list(range(1, number + 2))
    while "ready" not in frames:
        frames.append((await stalled.hears())["type"])
    await alice.says(chat, "live again")
    assert (await stalled.hears("message"))["data"]["text"] == "live again"


async def test_reader_that_takes_nothing_is_dropped(
    server: TestServer, raw: Any, alice: Person, bob: Person,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that takes no byte for STALLED_SECONDS is cut off; one that takes some is kept."""
    monkeypatch.setattr(messenger, "STALLED_SECONDS", 2)
    monkeypatch.setattr(messenger, "CLOSE_SECONDS", 0.5)
    chat = await alice.opens(bob)
    _stalled, transport = await stalls(server, raw, bob, chat)
    slow, slow_transport = await stalls(server, raw, bob, chat)
    await asyncio.gather(*[alice.says(chat, LONG) for _ in range(200)])
    async with asyncio.timeout(20):
        while not transport.is_closing():
            assert (await slow.hears("message"))["data"]["text"] == LONG
            await asyncio.sleep(0.1)
    assert not slow_transport.is_closing()
    await alice.says(chat, "after")
    while (await slow.hears("message"))["data"]["text"] != "after":
        pass


async def test_reads_do_not_pile_up_for_a_stalled_reader(
    server: TestServer, app: web.Application, raw: Any, alice: Person, bob: Person  # noqa: F811
) -> None:
    """Frames without a number stay bounded too; a `ready` tells that some were missed."""
    chat = await alice.opens(bob)
    sent = await alice.says(chat, "read me")
    stalled, transport = await stalls(server, raw, bob, chat)
    read = await bob.reads(chat, sent)
    hint = messenger.FrameHint(chat, json.dumps({"type": "read", "data": read}))
    for _ in range(20_000):
        app[messenger.LIVE].tell(hint)
    assert transport.get_write_buffer_size() < 2 * messenger.BEHIND_BYTES
    await alice.says(chat, "the end")
    heard = []
    while heard[-2:] not in (["message", "ready"], ["ready", "message"]):
        heard.append((await stalled.hears())["type"])


async def test_who_does_not_read_answers_is_not_read(
    server: TestServer, raw: Any, alice: Person, bob: Person  # noqa: F811
) -> None:
    """One that sends without reading what comes back fills neither memory nor the others' time."""
    chat = await alice.opens(bob)
    flooder, transport = await stalls(server, raw, bob, chat)
    bad = b'{"type":"message","text":"","ref":"' + b"r" * 60_000 + b'"}'

    async def floods() -> None:
        while True:
            await flooder.sends(0x81, bad)

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(floods(), 1)
    assert transport.get_write_buffer_size() < messenger.BEHIND_BYTES + 200_000
    assert (await alice.says(chat, "in time"))["seq"] == 1


# ---- Two servers


@pytest.mark.usefixtures("no_polls")
async def test_message_is_heard_at_another_server_by_hint(
    alice: Person, bob: Person, elsewhere: Elsewhere
) -> None:
    """What is posted at one server is heard at the other without any poll."""
    chat = await alice.opens(bob)
    line = await (await elsewhere.takes(bob)).listens_live(chat)
    await knows(alice, chat, line)
    for number in range(20):
        await alice.says(chat, f"hint {number}")
        assert (await line.hears("message"))["data"]["text"] == f"hint {number}"


async def test_message_is_heard_at_another_server_with_every_hint_lost(
    app: web.Application, alice: Person, bob: Person, elsewhere: Elsewhere,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without hints the poll finds what was posted, whole and in order, within 2 s."""
    monkeypatch.setattr(app[messenger.BUS], "publish", lambda key, hint: None)
    chat = await alice.opens(bob)
    line = await (await elsewhere.takes(bob)).listens_live(chat)
    for _ in range(5):
        await alice.says(chat, "hello")
    async with asyncio.timeout(SOON_SECONDS):
        assert [(await line.hears("message"))["data"]["seq"] for _ in range(5)] == [1, 2, 3, 4, 5]


@pytest.mark.usefixtures("no_polls")
async def test_coming_back_to_a_server_that_lags_gets_no_lower_number(
    app: web.Application, alice: Person, bob: Person, elsewhere: Elsewhere,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who heard of a message at one server is not told a lower number by another, which lags."""
    monkeypatch.setattr(app[messenger.BUS], "publish", lambda key, hint: None)
    chat = await alice.opens(bob)
    there = await elsewhere.takes(bob)
    await there.listens_live(chat)  # so that the other server knows the chat, at number 0
    last = (await alice.says(chat, "hello"))["seq"]
    line = await there.listens(chat, f"?after={last}")
    assert (await line.hears("ready"))["data"]["rev"] == last
    await there.says(chat, "next")
    assert (await line.hears("message"))["data"]["seq"] == last + 1


@pytest.mark.usefixtures("no_polls")
async def test_read_is_heard_at_another_server(
    alice: Person, bob: Person, elsewhere: Elsewhere
) -> None:
    """Who reads at one server is heard to at the other."""
    chat = await alice.opens(bob)
    line = await (await elsewhere.takes(alice)).listens_live(chat)
    await knows(alice, chat, line)
    sent = await alice.says(chat, "read this")
    read = await bob.reads(chat, sent)
    assert (await line.hears("read"))["data"] == read


async def test_removal_at_one_server_closes_the_sockets_at_the_other(
    alice: Person, bob: Person, carol: Person, elsewhere: Elsewhere, hints: str
) -> None:
    """A removal reaches a socket at another server by itself."""
    chat = await alice.founds(bob, carol)
    line = await (await elsewhere.takes(carol)).listens_live(chat)
    await alice.expects(204, "DELETE", f"/chats/{chat}/participants/{carol.id}")
    async with asyncio.timeout(SOON_SECONDS):
        assert await line.is_closed() == 4403


async def test_nothing_posted_after_a_removal_leaks_at_another_server(
    alice: Person, bob: Person, carol: Person, elsewhere: Elsewhere, hints: str
) -> None:
    """Removed at one server, with a post at the other right after it: that post is not heard."""
    chat = await alice.founds(bob, carol)
    bob_there, carol_there = await elsewhere.takes(bob), await elsewhere.takes(carol)
    bobs = await bob_there.listens_live(chat)
    for round_number in range(3):
        await alice.posts(f"/chats/{chat}/participants/{carol.id}", status=200 + (round_number > 0))
        line = await carol_there.listens_live(chat)
        await alice.expects(204, "DELETE", f"/chats/{chat}/participants/{carol.id}")
        await bob_there.says(chat, f"secret {round_number}")
        await bobs.hears_text(f"secret {round_number}")
        with pytest.raises(AssertionError, match="closed with 4403"):
            await line.hears("message")


async def test_joining_at_one_server_is_heard_at_the_other(
    alice: Person, bob: Person, carol: Person, elsewhere: Elsewhere, hints: str
) -> None:
    """Who was put into a group at one server is announced at the other before their first word."""
    chat = await alice.founds(bob)
    line = await (await elsewhere.takes(bob)).listens_live(chat)
    joined = await alice.posts(f"/chats/{chat}/participants/{carol.id}")
    await carol.says(chat, "hello")
    async with asyncio.timeout(SOON_SECONDS):
        assert (await line.hears())["data"]["participants"] == [joined]
        assert (await line.hears())["data"]["text"] == "hello"


async def test_logout_at_one_server_closes_the_sockets_at_the_other(
    alice: Person, bob: Person, elsewhere: Elsewhere, hints: str
) -> None:
    """A logout ends the session's sockets and its token at another server too."""
    chat = await alice.opens(bob)
    there = await elsewhere.takes(alice)
    line = await there.listens_live(chat)
    await alice.posts("/users/logout", status=204)
    async with asyncio.timeout(SOON_SECONDS):
        assert await line.is_closed() == 4401
    assert (await there.asks("GET", "/users/me")).status == 401


# ---- Reads


async def test_watermark_never_goes_back(
    sql: asyncpg.Connection, alice: Person, bob: Person, elsewhere: Elsewhere
) -> None:
    """Reads in any order, at two servers at once, only ever move a reader forward."""
    chat = await alice.opens(bob)
    sent = [await alice.says(chat, f"{number}") for number in range(30)]
    there = await elsewhere.takes(bob)
    shuffled = [(who, one) for one in sent for who in (bob, there)]
    random.Random(7).shuffle(shuffled)
    seen: list[int] = []
    stop = asyncio.Event()

    async def watches() -> None:
        query = "select last_read_seq from participants where user_id = $1"
        while not stop.is_set():
            seen.append(await sql.fetchval(query, bob.id))

    watching = asyncio.create_task(watches())
    answers = await asyncio.gather(*[who.reads(chat, one) for who, one in shuffled])
    stop.set()
    await watching
    for (_, one), answer in zip(shuffled, answers, strict=True):
        assert answer["seq"] >= one["seq"]
    assert seen == sorted(seen)
    # The steps that were remembered follow one another, and lead from the start to the end.
    query = "select from_seq, seq from reads where user_id = $1 order by seq"
    steps = await sql.fetch(query, bob.id)
    assert [step["from_seq"] for step in steps] == [0, *[step["seq"] for step in steps]][:-1]
    assert steps[-1]["seq"] == 30


async def test_reads_of_many_in_one_group_are_each_answered(
    app: web.Application, alice: Person, bob: Person
) -> None:
    """Several steps of several readers in one group: each is answered where its reader stands."""
    chat = await alice.opens(bob)
    sent = [await alice.says(chat, f"{number}") for number in range(4)]
    steps = [(bob, 2), (alice, 0), (bob, 0), (bob, 3), (alice, 1)]
    reads = [messenger.NewRead(chat, who.id, UUID(sent[place]["id"])) for who, place in steps]
    reads.append(messenger.NewRead(chat, bob.id, messenger.uuid7()))
    reads.append(messenger.NewRead(2**62, bob.id, UUID(sent[0]["id"])))
    futures = [asyncio.create_task(app[messenger.READS].written(each)) for each in reads]
    *stood, unknown, nowhere = await asyncio.gather(*futures, return_exceptions=True)
    assert [getattr(each, "seq", each) for each in stood] == [4, 2, 4, 4, 2]
    assert isinstance(unknown, messenger.MessageNotFound)
    assert isinstance(nowhere, messenger.ChatNotFound)


# ---- What one may not do to the others


async def test_held_chat_with_many_waiting_delays_no_other(
    app: web.Application, sql: asyncpg.Connection, alice: Person, bob: Person
) -> None:
    """However many posts wait for a chat that is held, a post to another is soon committed."""
    held, free = await alice.opens(bob), await alice.founds(bob)
    async with sql.transaction():
        await sql.execute("select 1 from chats where id = $1 for update", held)
        outcomes = await written(app, *[post(held, alice) for _ in range(40)], post(free, alice))
        assert numbers_of(outcomes) == [messenger.ServiceUnavailable] * 40 + [1]


async def test_connection_that_is_lost_but_not_yet_left_disturbs_nobody(
    app: web.Application, server: TestServer, raw: Any, alice: Person, bob: Person  # noqa: F811
) -> None:
    """What goes out to a room passes over a transport that is closed already."""
    chat = await alice.opens(bob)
    _, transport = await stalls(server, raw, bob, chat)
    line = await alice.listens_live(chat)
    transport.abort()
    for _ in range(10):  # in each of the turns until the handler learns of it
        app[messenger.LIVE].tell(messenger.FrameHint(chat, '{"type": "typing"}'))
        await asyncio.sleep(0)
    assert [(await line.hears())["type"] for _ in range(10)] == ["typing"] * 10
