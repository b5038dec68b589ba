"""Edits and deletions: who may, what stays, and how everybody learns of each of them."""

import asyncio
import random
from typing import Any

import asyncpg
import pytest
from aiohttp import web

import messenger
from plumbing.database import Unavailable
from support.databases import LATER, until_waiting
from support.frames import ready
from support.model import Position
from support.people import (
    SOON_SECONDS,
    Line,
    Person,
    deletes,
    edits,
    follows,
    new_id,
    pages,
    path_of,
    removes,
)
from support.servers import Elsewhere, knows


async def changes(person: Person, chat: int, after: int = 0) -> list[tuple[int, int, str]]:
    """Everything that changed after a number: its rev, its seq, its text."""
    found = await person.gets(f"/chats/{chat}/changes?after={after}&limit=100")
    return [(m["rev"], m["seq"], m["text"]) for m in found]


async def last_rev(person: Person, chat: int) -> int:
    """The last number of a chat."""
    return int((await person.gets(f"/chats/{chat}"))["last_rev"])


async def hears_change(line: Line) -> tuple[str, int, int, str]:
    """Wait for the next message or change: its type, rev, seq and text."""
    frame = await line.hears("message", "message_updated")
    return (frame["type"], *(frame["data"][name] for name in ("rev", "seq", "text")))


# ---- Editing


async def test_edit_takes_the_next_number_and_keeps_the_rest(alice: Person, bob: Person) -> None:
    """An edited message has a new text, `rev` and `edited_at`; its place, its readers and the order
    of the chats stay."""
    chat = await alice.opens(bob)
    first = await alice.says(chat, "one")
    sent = await alice.says(chat, "two", reply_to=first["id"])
    await bob.reads(chat, sent)
    busier = await alice.founds(bob)
    sent = await bob.gets(path_of(sent))
    edited = await edits(alice, sent, "zwei 🙂\n")
    assert edited["edited_at"] > sent["created_at"]
    assert edited == sent | {
        "text": "zwei 🙂\n", "rev": 3, "edited_at": edited["edited_at"], "position": Position(3)}
    assert [one["user_id"] for one in edited["read_by"]] == [bob.id]
    assert await bob.gets(path_of(sent)) == edited
    assert await bob.history(chat) == ["one", "zwei 🙂\n"]
    assert [one["id"] for one in await bob.gets("/chats")] == [busier, chat]
    shown = await bob.gets(f"/chats/{chat}")
    assert (shown["last_message"], shown["last_rev"], shown["unread_count"]) == (edited, 3, 0)
    again = await edits(alice, first, "eins")
    assert (again["seq"], again["rev"]) == (1, 4)
    assert (await alice.says(chat, "three"))["seq"] == 5
    assert (await edits(alice, first, "x" * 4096))["rev"] == 6
    assert await edits(alice, first, "x" * 4097, 422) == "invalid-input"
    assert await last_rev(bob, chat) == 6


async def test_same_text_takes_no_number(alice: Person, bob: Person) -> None:
    """An edit to the text that the message already has answers it unchanged, and nobody hears of
    it."""
    chat = await alice.opens(bob)
    sent = await alice.says(chat, "one")
    line = await bob.listens_live(chat)
    assert await edits(alice, sent, "one") == sent
    edited = await edits(alice, sent, "two")
    assert await edits(alice, sent, "two") == edited
    assert await last_rev(bob, chat) == 2
    assert await hears_change(line) == ("message_updated", 2, 1, "two")
    await alice.says(chat, "next")
    assert await hears_change(line) == ("message", 3, 3, "next")


async def test_only_the_sender_edits(alice: Person, bob: Person, carol: Person) -> None:
    """Another's message is 403 even to the owner; a message of another chat, of none, or of a chat
    that the caller is not in is 404."""
    chat, other = await alice.founds(bob), await alice.founds(bob)
    sent = await bob.says(chat, "mine")
    assert await edits(alice, sent, "yours", 403) == "sender-only"
    assert await edits(carol, sent, "yours", 404) == "chat-not-found"
    assert await edits(bob, sent | {"id": new_id()}, "x", 404) == "message-not-found"
    assert await edits(bob, sent | {"chat_id": other}, "x", 404) == "message-not-found"
    await removes(alice, chat, bob)
    assert await edits(bob, sent, "too late", 404) == "chat-not-found"
    assert await deletes(bob, sent, 404) == "chat-not-found"
    assert await alice.gets(path_of(sent)) == sent
    assert (await last_rev(alice, chat), await last_rev(alice, other)) == (1, 0)


# ---- Deleting


async def test_tombstone_stays(alice: Person, bob: Person) -> None:
    """A deleted message keeps its place and sender, without its text, and is no longer unread;
    deleting it again changes nothing, and editing it is 404."""
    chat = await alice.opens(bob)
    first, sent = await alice.says(chat, "one"), await alice.says(chat, "two", id=new_id())
    edited = await edits(alice, sent, "zwei")
    await deletes(alice, sent)
    tombstone = await bob.gets(path_of(sent))
    assert tombstone["deleted_at"] >= edited["edited_at"]
    assert tombstone == edited | {
        "text": "", "rev": 4, "deleted_at": tombstone["deleted_at"], "position": Position(4)}
    await deletes(alice, sent)
    assert await edits(alice, sent, "again", 404) == "message-not-found"
    assert await alice.says(chat, "two", 200, id=sent["id"]) == tombstone
    shown = await bob.gets(f"/chats/{chat}")
    assert (shown["last_message"], shown["last_rev"], shown["unread_count"]) == (tombstone, 4, 1)
    assert await bob.gets(f"/chats/{chat}/messages") == [first, tombstone]
    assert (await bob.reads(chat, sent))["seq"] == 2
    assert (await alice.says(chat, "next"))["seq"] == 5


async def test_who_may_delete_what(alice: Person, bob: Person, carol: Person, people: Any) -> None:
    """The sender may delete a message, and in a group its owner and admins may too; a member and
    the partner of a personal chat get 403."""
    dave = await people("dave")
    chat, personal = await alice.founds(bob, carol, dave), await alice.opens(bob)
    await alice.posts(
        f"/chats/{chat}/participants", {"user_id": bob.id, "role": "admin"}, status=200
    )
    by_alice, by_bob, by_carol, by_dave = [
        await one.says(chat, one.name) for one in (alice, bob, carol, dave)
    ]
    for sent in (by_alice, by_bob, by_carol):
        assert await deletes(dave, sent, 403) == "sender-only"
    await deletes(bob, by_alice)
    assert await deletes(carol, by_alice, 403) == "sender-only"
    await deletes(alice, by_bob)
    await deletes(bob, by_carol)
    await deletes(dave, by_dave)
    assert await bob.history(chat) == [""] * 4
    sent = await alice.says(personal, "mine")
    assert await deletes(bob, sent, 403) == "sender-only"
    assert await deletes(carol, sent, 404) == "chat-not-found"
    assert await deletes(alice, sent | {"id": new_id()}, 404) == "message-not-found"
    await deletes(alice, sent)


# ---- Changes since a number


async def test_changes_are_each_told_once_as_they_are_now(
    alice: Person, bob: Person, sql: asyncpg.Connection
) -> None:
    """Everything posted, edited or deleted after a number is listed once, by `rev`, as it is now; a
    page has 50 by default and 100 at most."""
    chat = await alice.opens(bob)
    sent = [await alice.says(chat, str(number)) for number in range(1, 6)]
    await edits(alice, sent[1], "2b")  # 6
    await deletes(alice, sent[3])  # 7
    await edits(alice, sent[1], "2c")  # 8
    await alice.says(chat, "9")
    everything = [(1, 1, "1"), (3, 3, "3"), (5, 5, "5"), (7, 4, ""), (8, 2, "2c"), (9, 9, "9")]
    for after in range(11):
        expected = [one for one in everything if one[0] > after]
        assert await changes(bob, chat, after) == expected, after
    assert await changes(bob, chat, 2**63 - 1) == []
    listed = await bob.gets(f"/chats/{chat}/changes?after=6")
    assert listed == [await bob.gets(path_of(one)) for one in (sent[3], sent[1], listed[-1])]
    for limit, sizes in ((1, [1] * 6), (4, [4, 2]), (6, [6]), (100, [6])):
        found = await pages(bob, f"/chats/{chat}/changes?limit={limit}")
        assert [len(page) for page in found] == sizes
        assert [m["rev"] for page in found for m in page] == [one[0] for one in everything]
    await sql.execute(
        "insert into messages (chat_id, seq, rev, id, sender_id, text, created_at)"
        " select $1, n, n, gen_random_uuid(), $2, 'x', now() from generate_series(10, 104) n",
        chat, alice.id,
    )
    await sql.execute("update chats set last_rev = 104, last_seq = 104 where id = $1", chat)
    for limit, sizes in (("", [50, 50, 1]), ("?limit=100", [100, 1])):
        found = await pages(bob, f"/chats/{chat}/changes{limit}")
        assert [len(page) for page in found] == sizes


# ---- Live


async def test_changes_are_heard_by_all(alice: Person, bob: Person, carol: Person) -> None:
    """Both kinds of socket hear an edit and a deletion whole, the sender's own too; whoever comes
    back hears what changed since, as a new message or an updated one."""
    chat = await alice.founds(bob, carol)
    first, second = await alice.says(chat, "one"), await alice.says(chat, "two")
    lines = [await alice.listens_live(chat), await bob.listens_live(chat), await follows(carol)]
    edited = await edits(alice, first, "eins")
    await deletes(alice, second)
    deleted = await bob.gets(path_of(second))
    for line in lines:
        assert await line.hears() == {"type": "message_updated", "data": edited}
        assert await line.hears() == {"type": "message_updated", "data": deleted}
    third = await bob.says(chat, "three")
    await edits(bob, third, "drei")
    late = await carol.listens(chat, "?after=3")
    assert await hears_change(late) == ("message_updated", 4, 2, "")
    assert await hears_change(late) == ("message", 6, 5, "drei")
    assert await late.hears() == ready(chat, 6)
    await lines[2].sends(type="sync", chat_id=chat, after=5)
    assert [await hears_change(lines[2]) for _ in range(3)][-1] == ("message_updated", 6, 5, "drei")


@pytest.mark.usefixtures("no_polls")
async def test_changes_are_heard_at_another_server_by_hint(
    alice: Person, bob: Person, elsewhere: Elsewhere
) -> None:
    """An edit and a deletion at one server are heard at the other without any poll."""
    chat = await alice.opens(bob)
    sent = await alice.says(chat, "one")
    line = await (await elsewhere.takes(bob)).listens_live(chat)
    await knows(alice, chat, line)
    last = await last_rev(alice, chat)
    await edits(alice, sent, "eins")
    assert await hears_change(line) == ("message_updated", last + 1, 1, "eins")
    await deletes(alice, sent)
    assert await hears_change(line) == ("message_updated", last + 2, 1, "")


async def test_changes_are_heard_at_another_server_with_every_hint_lost(
    app: web.Application, alice: Person, bob: Person, elsewhere: Elsewhere,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without hints the poll finds an edit and a deletion, in order, within 2 s."""
    monkeypatch.setattr(app[messenger.BUS], "notify", lambda key, hint: None)
    chat = await alice.opens(bob)
    first, second = await alice.says(chat, "one"), await alice.says(chat, "two")
    line = await (await elsewhere.takes(bob)).listens_live(chat)
    await edits(alice, second, "zwei")
    await deletes(alice, first)
    async with asyncio.timeout(SOON_SECONDS):
        assert await hears_change(line) == ("message_updated", 3, 2, "zwei")
        assert await hears_change(line) == ("message_updated", 4, 1, "")


# ---- Order


@pytest.mark.usefixtures("no_polls")
async def test_edit_whose_answer_was_lost_is_one_change_and_is_heard(
    app: web.Application, alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit that was committed but not answered is tried again by the server: it takes one
    number, and everybody hears it."""
    chat = await alice.opens(bob)
    sent = await alice.says(chat, "one")
    line = await bob.listens_live(chat)
    database, lost = app[messenger.DATABASE], []
    rows = database.rows

    async def loses_the_answer(query: str, *arguments: Any) -> Any:
        found = await rows(query, *arguments)
        if query == messenger.CHANGE_MESSAGES and len(lost) < 2:
            lost.append(query)
            raise Unavailable("lost")
        return found

    monkeypatch.setattr(database, "rows", loses_the_answer)
    assert (await edits(alice, sent, "two"))["rev"] == 2
    assert await hears_change(line) == ("message_updated", 2, 1, "two")
    lost.clear()
    await deletes(alice, sent)
    assert await hears_change(line) == ("message_updated", 3, 1, "")
    assert await last_rev(bob, chat) == 3


async def test_bad_change_fails_alone(
    app: web.Application, alice: Person, bob: Person, carol: Person
) -> None:
    """Each change of a group is decided by itself and in order, even where one of them makes the
    statement fail; what is refused takes no number."""
    chat, other = await alice.founds(bob), await bob.founds(carol)
    sent = await alice.says(chat, "one")
    line = await bob.listens_live(chat)

    async def written(*asked: tuple[int, Person, str | None]) -> list[Any]:
        items = [messenger.NewChange(at, who.id, sent["id"], text, LATER)
                 for at, who, text in asked]
        futures = [asyncio.create_task(app[messenger.CHANGES].submit(item, "")) for item in items]
        return [type(one) for one in await asyncio.gather(*futures, return_exceptions=True)]

    nothing, gone, no_chat = type(None), messenger.MessageNotFound, messenger.ChatNotFound
    assert await written(
        (chat, alice, "two"), (chat, alice, "a\0b"), (chat, bob, "his"), (other, alice, "x"),
        (other, bob, "x"), (2**62, alice, "x"), (chat, alice, "three"), (chat, alice, "three"),
    ) == [
        nothing, asyncpg.CharacterNotInRepertoireError, messenger.SenderOnly, no_chat,
        gone, no_chat, nothing, nothing,
    ]
    asked = ((chat, alice, None), (chat, alice, None), (chat, alice, "four"), (chat, bob, None))
    assert await written(*asked) == [nothing, nothing, gone, messenger.SenderOnly]
    heard = [await hears_change(line)]
    while heard[-1][1] < 4:
        heard.append(await hears_change(line))
    assert heard[-1] == ("message_updated", 4, 1, "")
    assert await changes(bob, chat) == [(4, 1, "")]


async def test_change_that_waits_for_a_removal_is_refused(
    sql: asyncpg.Connection, alice: Person, bob: Person
) -> None:
    """An edit that waits behind its sender's removal is refused: membership is asked after the
    chat's lock."""
    chat = await alice.founds(bob)
    sent = await bob.says(chat, "one")
    async with sql.transaction():
        await sql.execute("select remove_participant($1, $2, $3)", chat, alice.id, bob.id)
        asked = asyncio.create_task(edits(bob, sent, "too late", 404))
        await until_waiting(sql)
    assert await asked == "chat-not-found"
    assert await changes(alice, chat) == [(1, 1, "one")]


async def test_numbers_have_no_holes_whatever_takes_them(
    alice: Person, bob: Person, elsewhere: Elsewhere
) -> None:
    """Posts over sockets and REST, edits and deletions at two servers at once take as many numbers
    as there are changes; each socket hears them rise, and whoever asks after a number misses
    nothing."""
    chat = await alice.opens(bob)
    there = await elsewhere.takes(alice)
    lines = [await bob.listens_live(chat), await (await elsewhere.takes(bob)).listens_live(chat)]
    senders = [await alice.listens_live(chat), await there.listens_live(chat)]
    sent = [await alice.says(chat, "first") for _ in range(10)]
    dice, taken = random.Random(7), [len(sent)]

    async def posts(line: Line) -> None:
        for number in range(25):
            await line.says("over a socket", ref=number)
            assert (await line.hears("ack", "error"))["ref"] == number
            taken[0] += 1

    async def disturbs(who: Person, number: int) -> None:
        for turn in range(10):
            target = dice.choice(sent)
            if turn % 5 == 4:
                sent.append(await who.says(chat, "over REST"))
                taken[0] += 1
            elif turn % 5 == 3:
                path = path_of(await who.says(chat, "to be deleted"))
                answers = await asyncio.gather(*[who.asks("DELETE", path) for _ in range(2)])
                assert [answer.status for answer in answers] == [204, 204]
                taken[0] += 2
            else:
                await edits(who, target, f"{number}.{turn}")
                taken[0] += 1

    async def asks(who: Person) -> dict[str, Any]:
        known: dict[str, Any] = {}
        after = 0
        while not done.is_set() or after < taken[0]:
            page = await who.gets(f"/chats/{chat}/changes?after={after}")
            assert [m["rev"] for m in page] == sorted({m["rev"] for m in page})
            known |= {m["id"]: m for m in page}
            after = page[-1]["rev"] if page else after
        return known

    async def hears(line: Line) -> dict[str, Any]:
        known: dict[str, Any] = {}
        last = 0
        while not done.is_set() or last < taken[0]:
            heard = (await line.hears("message", "message_updated"))["data"]
            assert heard["rev"] > last
            last = heard["rev"]
            known[heard["id"]] = heard
        return known

    done = asyncio.Event()
    asking = [asyncio.create_task(work) for work in (asks(bob), *map(hears, lines))]
    await asyncio.gather(
        *map(posts, senders), *[disturbs(who, n) for n, who in enumerate((alice, there) * 2)]
    )
    taken[0] += 1
    done.set()
    await alice.says(chat, "the last")
    known, *heard = await asyncio.gather(*asking)
    assert await last_rev(bob, chat) == taken[0]
    stored = {m["id"]: m for page in await pages(bob, f"/chats/{chat}/changes") for m in page}
    assert known == stored
    assert heard == [stored] * 2
