"""The promises about order and delivery: numbers, groups, slow readers, and two servers."""

import asyncio
import random
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from aiohttp import web

import messenger
from plumbing.database import Unavailable
from plumbing.groups import GROUP_SIZE_MAX
from support.databases import until_waiting
from support.people import SOON_SECONDS, Heard, Line, Person, new_id
from support.posts import numbers_of, post, written
from support.servers import Elsewhere, knows


async def sockets_of(person: Person, chat: int, number: int) -> list[Line]:
    """Open several sockets of a person."""
    return [await person.listens_live(chat) for _ in range(number)]


async def told(line: Line, *types: str) -> list[Heard]:
    """Hear a frame of each type, in any order."""
    return [await line.hears(*types) for _ in types]


# ---- One id is one message


async def test_posts_of_one_id_at_once_are_one_message(
    alice: Person, bob: Person, elsewhere: Elsewhere
) -> None:
    """Twenty posts of one id over sockets and REST, at two servers, are one message with one
    number."""
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
    """Of equal ids the first counts: the same sender's others get its answer, and another sender's
    fails."""
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
    """A post that was committed but not answered is tried again by the server: it is one message,
    and everybody hears it."""
    chat = await alice.opens(bob)
    line = await bob.listens_live(chat)
    database, lost = app[messenger.DATABASE], []
    rows = database.rows

    async def loses_the_answer(query: str, *arguments: Any) -> Any:
        found = await rows(query, *arguments)
        if query in (messenger.POST_MESSAGE, messenger.POST_MESSAGES) and len(lost) < 2:
            lost.append(query)
            raise Unavailable("lost")
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
    """Where the server gave up with a 503 on a post that was committed, everybody hears it and the
    client's retry gets it."""
    chat = await alice.opens(bob)
    line = await bob.listens_live(chat)
    database, body = app[messenger.DATABASE], {"text": "a", "id": new_id()}
    rows = database.rows

    async def loses_every_answer(query: str, *arguments: Any) -> Any:
        found = await rows(query, *arguments)
        if query in (messenger.POST_MESSAGE, messenger.POST_MESSAGES):
            raise Unavailable("lost")
        return found

    monkeypatch.setattr("plumbing.groups.WRITE_SECONDS", 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(database, "rows", loses_every_answer)
        refused = await alice.asks("POST", f"/chats/{chat}/messages", body)
    assert (refused.status, "Retry-After" in refused.headers) == (503, True)
    heard = (await line.hears("message"))["data"]
    assert await alice.says(chat, status=200, **body) == heard
    assert (await alice.says(chat, "b"))["seq"] == 2


# ---- Groups


async def test_refused_items_in_a_group_burn_no_number(
    app: web.Application, alice: Person, bob: Person, carol: Person
) -> None:
    """An item that is refused within a commit takes no number."""
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
    """A reply may name an earlier item of its group; one to a later item or a refused one is
    refused."""
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
    """In a full group each replies to the one before, from a refused one on: all are decided, and a
    neighbour is posted."""
    chat = await alice.opens(bob)
    ids = [messenger.uuid7() for _ in range(GROUP_SIZE_MAX)]
    chain = [
        post(chat, alice, id=one, reply_to=before)
        for before, one in zip([messenger.uuid7(), *ids], ids[:-1], strict=False)
    ]
    outcomes = await written(app, *chain, post(chat, bob, "fine"))
    assert numbers_of(outcomes) == [messenger.ReplyNotFound] * len(chain) + [1]


async def test_post_that_waits_for_a_removal_is_refused(
    app: web.Application, sql: asyncpg.Connection, alice: Person, bob: Person
) -> None:
    """A post that waits behind its sender's removal is refused: membership is asked after the
    chat's lock."""
    chat = await alice.founds(bob)
    async with sql.transaction():
        await sql.execute("select remove_participant($1, $2, $3)", chat, alice.id, bob.id)
        outcome = asyncio.create_task(written(app, post(chat, bob, "too late")))
        await until_waiting(sql)
    assert numbers_of(await outcome) == [messenger.ChatNotFound]
    assert (await alice.says(chat, "next"))["seq"] == 1


async def test_numbers_have_no_holes_and_rise_with_time_at_two_servers(
    sql: asyncpg.Connection, alice: Person, bob: Person, elsewhere: Elsewhere
) -> None:
    """Posts to one chat at two servers at once get the numbers 1 to n in order of time, and are
    heard so at both."""
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
    monkeypatch.setattr(app[messenger.BUS], "notify", lambda key, hint: None)
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
    """Whoever heard a message at one server is not given a lower number by another that lags
    behind."""
    monkeypatch.setattr(app[messenger.BUS], "notify", lambda key, hint: None)
    chat = await alice.opens(bob)
    there = await elsewhere.takes(bob)
    await there.listens_live(chat)  # so that the other server knows the chat, at number 0
    last = (await alice.says(chat, "hello"))["seq"]
    line = await there.listens(chat, f"?after={last}")
    assert (await line.hears("ready"))["data"]["rev"] == last
    await there.says(chat, "next")
    assert (await line.hears("message"))["data"]["seq"] == last + 1


async def test_removal_at_one_server_closes_the_sockets_at_the_other(
    alice: Person, bob: Person, carol: Person, elsewhere: Elsewhere, hints: str
) -> None:
    """A removal at one server closes the user's sockets on the chat at the other."""
    chat = await alice.founds(bob, carol)
    line = await (await elsewhere.takes(carol)).listens_live(chat)
    await alice.expects(204, "DELETE", f"/chats/{chat}/participants/{carol.id}")
    async with asyncio.timeout(SOON_SECONDS):
        assert await line.is_closed() == 4403


async def test_nothing_posted_after_a_removal_leaks_at_another_server(
    alice: Person, bob: Person, carol: Person, elsewhere: Elsewhere, hints: str
) -> None:
    """A user who is removed at one server does not hear what is posted at the other right after."""
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
    """A user who joins at one server is announced at the other before their first message."""
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
    """A logout at one server ends the session's sockets and its token at the other too."""
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
    """Each of several readers' steps in one group is answered with where its reader stands."""
    chat = await alice.opens(bob)
    sent = [await alice.says(chat, f"{number}") for number in range(4)]
    steps = [(bob, 2), (alice, 0), (bob, 0), (bob, 3), (alice, 1)]
    reads = [messenger.NewRead(chat, who.id, UUID(sent[place]["id"])) for who, place in steps]
    reads.append(messenger.NewRead(chat, bob.id, messenger.uuid7()))
    reads.append(messenger.NewRead(2**62, bob.id, UUID(sent[0]["id"])))
    futures = [asyncio.create_task(app[messenger.READS].submit(each, "")) for each in reads]
    *stood, unknown, nowhere = await asyncio.gather(*futures, return_exceptions=True)
    assert [getattr(each, "seq", each) for each in stood] == [4, 2, 4, 4, 2]
    assert isinstance(unknown, messenger.MessageNotFound)
    assert isinstance(nowhere, messenger.ChatNotFound)


async def test_read_is_told_though_its_answer_was_lost(
    app: web.Application, sql: asyncpg.Connection, alice: Person, bob: Person
) -> None:
    """Where the database was lost between a read's commit and its answer, the second try moves
    nothing, and yet is told."""
    chat = await alice.opens(bob)
    line, sent = await alice.listens_live(chat), await alice.says(chat, "x")
    for is_repeated in (False, True):
        rows = await sql.fetch(messenger.READ_MESSAGES, [chat], [bob.id], [UUID(sent["id"])])
        assert rows[0]["moved"] != is_repeated
    read = messenger.NewRead(chat, bob.id, UUID(sent["id"]))
    app[messenger.READS].publish([read], rows, [True])
    assert (await line.hears("read"))["data"]["message_id"] == sent["id"]
