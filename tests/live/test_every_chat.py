"""The socket of all chats: what is heard on it, how chats come and go, `sync`, `typing`, `auth`."""

import asyncio
import gc
import itertools
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import aiohttp
import asyncpg
import jwt
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

import messenger
from plumbing.database import ABSENT, Unavailable
from support.databases import fills
from support.frames import about, chat_of, message, numbers, of_type, ready, runs, until, until_all
from support.people import (
    NOBODYS,
    SOON_SECONDS,
    Heard,
    Person,
    adds,
    follows,
    logs_out,
    refusal,
    removes,
)
from support.raw import CLOSE, LONG, RawLine, transport_of
from support.resuming import number_of
from support.servers import SECRET_KEY, Elsewhere, knows

# ---- What is heard, and said


async def test_every_chat_is_live_from_the_handshake_on(
    alice: Person, bob: Person, carol: Person
) -> None:
    """What is posted right after the handshake is heard, in all of the user's chats and in no
    other."""
    chats = [await alice.opens(bob), await carol.opens(alice), await bob.founds(alice, carol)]
    foreign = await bob.opens(carol)
    senders = [bob, carol, bob]
    for _ in range(10):
        line = await follows(alice)
        await bob.says(foreign, "not for alice")
        sent = [await who.says(chat, "hi") for who, chat in zip(senders, chats, strict=True)]
        heard = [await line.hears() for _ in chats]  # no `ready` either
        assert sorted(heard, key=chat_of) == sorted(map(message, sent), key=chat_of)
        await line.close()


async def test_pipelined_messages_to_several_chats_keep_their_order(
    alice: Person, bob: Person, carol: Person
) -> None:
    """Of 300 frames sent without waiting to three chats in turn, each chat gets its own in
    order."""
    chats = [await alice.opens(bob), await alice.founds(bob), await alice.founds(bob, carol)]
    line, other = await follows(alice), await follows(bob)
    for number in range(100):
        for chat in chats:
            await line.says(f"{number}", chat_id=chat, ref=number)
    acks: dict[int, list[tuple[int, int]]] = {chat: [] for chat in chats}
    for _ in range(300):
        ack = await line.hears("ack", "error")
        acks[ack["data"]["chat_id"]].append((ack["ref"], ack["data"]["seq"]))
    heard = await until_all(other, *chats, text="99")
    for chat in chats:
        assert acks[chat] == [(number, number + 1) for number in range(100)]
        texts = [frame["data"]["text"] for frame in about(chat, heard)]
        assert texts == [str(number) for number in range(100)]


# ---- What is refused

FRAMES: list[dict[str, Any]] = [
    {"type": "message", "text": "hello"},
    {"type": "read", "message_id": NOBODYS},
    {"type": "typing"},
    {"type": "sync", "after": 0},
]


async def test_frame_without_a_chat_is_refused(alice: Person, bob: Person) -> None:
    """A frame that names no chat is 422 at $.chat_id, with its `ref`, even for a user who has only
    one chat."""
    chat = await alice.opens(bob)
    line = await follows(alice)
    nowhere: list[dict[str, Any]] = [{}, {"chat_id": None}]
    for frame, missing, ref in itertools.product(FRAMES, nowhere, ("r", 0, 2.5)):
        await line.sends(**frame, **missing, ref=ref)
        error = await line.hears()
        assert (error["type"], error["ref"], error["data"]["status"]) == ("error", ref, 422), frame
        assert [each["loc"] for each in error["data"]["errors"]] == ["$.chat_id"], frame
        assert "chat_id" not in error
    assert (await alice.says(chat, "first"))["seq"] == 1


async def test_frame_for_a_foreign_chat_is_refused(
    alice: Person, bob: Person, carol: Person
) -> None:
    """A frame for a chat of others, or for none, is 404 with its `chat_id` and `ref`."""
    own, foreign = await alice.opens(bob), await bob.opens(carol)
    line, other = await follows(alice), await follows(carol)
    for frame, chat in itertools.product(FRAMES, (foreign, foreign + 1000, 2**63 - 1)):
        await line.sends(**frame, chat_id=chat, ref=7)
        error = await line.hears()
        assert (error["type"], error["ref"], error["chat_id"]) == ("error", 7, chat), frame
        assert (error["data"]["status"], error["data"]["type"]) == (404, "chat-not-found")
    sent = await bob.says(foreign, "the first")
    assert (sent["seq"], await other.hears()) == (1, message(sent))
    await line.says("still open", chat_id=own)
    assert (await line.hears())["data"]["text"] == "still open"


# ---- Coming into a chat


@pytest.mark.usefixtures("no_polls")
async def test_personal_chat_opened_by_another_is_told_to_both(alice: Person, bob: Person) -> None:
    """A new personal chat is heard at once as `chat`, `ready` and then its messages, by its creator
    as well."""
    lines = [await follows(who) for who in (alice, alice, bob)]
    chat = await alice.opens(bob)
    for who, line in zip([alice, alice, bob], lines, strict=True):
        assert await line.hears() == {"type": "chat", "data": await who.gets(f"/chats/{chat}")}
        assert await line.hears() == ready(chat, 0)
    assert await bob.opens(alice) == chat  # it is there already: nothing is told
    await lines[2].says("hello", chat_id=chat)
    for line in lines:
        assert (await line.hears())["data"]["text"] == "hello"


@pytest.mark.usefixtures("no_polls")
async def test_group_founded_by_another_is_told_to_its_participants(
    alice: Person, bob: Person, carol: Person
) -> None:
    """A new group is heard at once as `chat`, `ready` and then its messages, by its creator as
    well."""
    before = await alice.opens(bob)
    people = [alice, bob, carol]
    lines = [await follows(who) for who in people]
    chat = await alice.founds(bob, carol, name="us")
    for who, line in zip(people, lines, strict=True):
        assert await line.hears() == {"type": "chat", "data": await who.gets(f"/chats/{chat}")}
        assert await line.hears() == ready(chat, 0)
    sent = await carol.says(chat, "hello")
    for line in lines:
        assert await line.hears() == message(sent)
    await bob.says(before, "still live")
    assert (await lines[0].hears())["data"]["text"] == "still live"


async def test_who_is_put_into_a_group_is_told_and_the_others_too(
    alice: Person, bob: Person, carol: Person
) -> None:
    """Whoever joins hears `chat` once, `ready` and then what is new; the others hear
    `chat_updated`."""
    chat = await alice.founds(bob)
    await alice.says(chat, "before")
    last = await bob.says(chat, "also before")
    lines = [await follows(carol), await follows(carol)]
    others = [await follows(alice), await follows(bob)]
    joined = await bob.posts(f"/chats/{chat}/participants", {"user_id": carol.id})
    for line in lines:
        told = await line.hears("chat", "message")
        assert told == {"type": "chat", "data": await carol.gets(f"/chats/{chat}")}
        assert told["data"]["last_message"] == last
        assert await line.hears("ready", "message") == ready(chat, 2)
    sent = await alice.says(chat, "after")
    for line in lines:
        heard = await until(line, "after")
        assert of_type(heard, "chat", "ready", "message") == [message(sent)]
    for line in others:
        update, *heard = await until(line, "after")
        assert update["type"] == "chat_updated"
        assert update["data"]["participants"] == [joined]
        assert heard == [message(sent)]


async def test_joining_and_leaving_while_others_post_has_no_hole(
    alice: Person, bob: Person, carol: Person
) -> None:
    """Each stay in a chat is heard as `chat`, every number after its `last_rev`, one `ready`, and
    `chat_removed`."""
    chat = await alice.founds(bob)
    line, stop = await follows(carol), asyncio.Event()

    async def keeps_posting(person: Person) -> None:
        while not stop.is_set():
            await person.says(chat, "meanwhile")

    posting = [asyncio.create_task(keeps_posting(who)) for who in (alice, bob, bob)]
    try:
        for _ in range(4):
            await adds(alice, chat, carol)
            told = await line.hears()
            assert told["type"] == "chat"  # and nothing since the last stay
            heard = [await line.hears("message", "ready") for _ in range(20)]
            await removes(alice, chat, carol)
            last = (await alice.gets(f"/chats/{chat}"))["last_rev"]
            while heard[-1]["type"] != "chat_removed":
                heard.append(await line.hears("message", "ready", "chat", "chat_removed"))
            assert heard[-1] == {"type": "chat_removed", "data": {"chat_id": chat}}
            assert not of_type(heard, "chat")
            after, stay = told["data"]["last_rev"], numbers(heard, chat)
            assert stay == list(range(after + 1, after + 1 + len(stay)))
            assert after <= stay[-1] <= last
            [is_ready] = of_type(heard, "ready")
            assert is_ready["data"]["rev"] in (after, *stay)
    finally:
        stop.set()
        await asyncio.gather(*posting)


# ---- Out of a chat


async def test_removed_participant_hears_chat_removed_and_nothing_posted_later(
    alice: Person, bob: Person, carol: Person
) -> None:
    """A removal takes the chat from all of the user's sockets before the next post is heard, and no
    other chat."""
    chat, other = await alice.founds(bob, carol), await alice.opens(carol)
    lines = [await follows(carol), await follows(carol)]
    bobs = await follows(bob)
    for number in range(4):
        await alice.says(chat, f"before {number}")
        await removes(alice, chat, carol)
        await bob.says(chat, f"secret {number}")
        await until(bobs, f"secret {number}")
        await alice.says(other, f"marker {number}")
        for line in lines:
            heard = about(chat, await until(line, f"marker {number}"))
            changes = of_type(heard, "message", "chat_removed")
            assert [each["data"].get("text") for each in changes] == [f"before {number}", None]
            assert heard[-1] == {"type": "chat_removed", "data": {"chat_id": chat}}
        await adds(alice, chat, carol)
        for line in lines:
            assert (await line.hears("chat"))["data"]["last_rev"] == 2 * number + 2
            await line.hears("ready")


@pytest.mark.usefixtures("no_polls")
async def test_who_leaves_hears_chat_removed(alice: Person, bob: Person) -> None:
    """Whoever leaves hears `chat_removed` on their own sockets, the last participant too; the
    others hear who left."""
    chat, other = await alice.founds(bob), await alice.opens(bob)
    line, stays = await follows(bob), await follows(alice)
    removed = {"type": "chat_removed", "data": {"chat_id": chat}}
    await removes(bob, chat, bob)
    assert await line.hears() == removed
    update = await stays.hears()
    assert (update["type"], update["data"]["left"]) == ("chat_updated", [bob.id])
    await removes(alice, chat, alice)  # and that is the end of it
    assert await stays.hears() == removed
    sent = await bob.says(other, "still live")
    for each in (line, stays):
        assert await each.hears() == message(sent)


async def test_rejoining_brings_the_chat_back(alice: Person, bob: Person, carol: Person) -> None:
    """Whoever rejoins hears `chat` and `ready` as at first, with the number of that time."""
    chat = await alice.founds(bob, carol)
    line = await follows(carol)
    for number in range(3):
        await removes(alice, chat, carol)
        assert await line.hears("chat_removed", "message")
        await bob.says(chat, "missed")
        await adds(bob, chat, carol)
        told = await line.hears()
        assert told == {"type": "chat", "data": await carol.gets(f"/chats/{chat}")}
        assert await line.hears("ready", "message") == ready(chat, 2 * number + 1)
        sent = await bob.says(chat, "welcome")
        assert await line.hears("message") == message(sent)
        await line.says("thanks", chat_id=chat, id=sent["id"], ref="r")
        assert (await line.hears("ack", "error"))["data"]["status"] == 409


async def test_frame_of_a_removed_participant_is_refused(
    alice: Person, bob: Person, carol: Person
) -> None:
    """After a removal the user's frames to the chat are refused like a stranger's."""
    chat = await alice.founds(bob, carol)
    await alice.says(chat, "one")
    line, bobs = await follows(carol), await follows(bob)
    await removes(alice, chat, carol)
    await line.hears("chat_removed")  # until then a `sync` may be answered by just that
    for frame in FRAMES:
        await line.sends(**frame, chat_id=chat, ref="r")
        error = await line.hears()
        assert (error["type"], error["ref"], error["chat_id"]) == ("error", "r", chat), frame
        assert error["data"]["type"] == "chat-not-found"
    sent = await alice.says(chat, "two")
    assert of_type(await until(bobs, "two"), "message", "typing", "read") == [message(sent)]
    assert sent["seq"] == 2


# ---- Sync


async def test_sync_replays_exactly_what_was_missed(
    alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sync after 0, in the middle, at the edges of pages and after the last number replays what
    came later; then the chat is live."""
    monkeypatch.setattr(messenger, "REPLAY_PAGE", 3)
    other, chat = await alice.founds(bob), await alice.opens(bob)
    await alice.says(other, "elsewhere")
    sent = [await alice.says(chat, f"message {number}") for number in range(1, 8)]
    line = await follows(bob)
    for after in (0, 1, 3, 4, 6, 7):
        await line.sends(type="sync", chat_id=chat, after=after)
        heard = [await line.hears() for _ in range(7 - after + 1)]
        assert heard == [*map(message, sent[after:]), ready(chat, 7)]
    posted = await alice.says(chat, "live")
    assert await line.hears() == message(posted)


async def test_sync_of_several_chats_replays_each(
    alice: Person, bob: Person, carol: Person
) -> None:
    """`chats` names a number for each chat to replay; chats that it does not name stay as they
    are."""
    chats = [await alice.opens(bob), await alice.founds(bob), await alice.founds(bob, carol)]
    sent = {chat: [await alice.says(chat, f"{n}") for n in range(5)] for chat in chats}
    line = await follows(bob)
    await line.sends(type="sync", chats={str(chats[0]): 3, str(chats[1]): 0})
    heard = [await line.hears() for _ in range(2 + 1 + 5 + 1)]
    for chat, after in ((chats[0], 3), (chats[1], 0)):
        told = about(chat, heard)
        assert told == [*map(message, sent[chat][after:]), ready(chat, 5)]
    for chat in chats:
        posted = await alice.says(chat, "live")
        assert await line.hears() == message(posted)


async def test_foreign_chat_in_a_sync_is_refused_and_the_others_are_synced(
    alice: Person, bob: Person, carol: Person
) -> None:
    """Each chat of `chats` that is not the user's gets an `error` of its own, with `ref`; the
    others are replayed."""
    chats = [await alice.opens(bob), await alice.founds(bob)]
    foreign = [await alice.opens(carol), chats[1] + 1000]
    sent = [await alice.says(chat, "hello") for chat in (*chats, foreign[0])]
    line = await follows(bob)
    named = [chats[0], foreign[0], foreign[1], chats[1]]
    await line.sends(type="sync", chats={str(chat): 0 for chat in named}, ref="r")
    heard = [await line.hears() for _ in range(2 + 2 * 2)]
    for chat in foreign:
        [error] = about(chat, heard)
        assert (error["type"], error["ref"], error["chat_id"]) == ("error", "r", chat)
        assert error["data"]["type"] == "chat-not-found"
    for chat, one in zip(chats, sent, strict=False):
        told = about(chat, heard)
        assert told == [message(one), ready(chat, 1) | {"ref": "r"}]
    await alice.says(foreign[0], "not for bob")
    posted = await alice.says(chats[0], "live")
    assert await line.hears() == message(posted)


async def test_sync_names_a_number_or_chats(alice: Person, bob: Person) -> None:
    """A sync with both, with neither, or with keys that are not chats is refused, and replays
    nothing."""
    chat = await alice.opens(bob)
    await alice.says(chat, "one")
    line = await follows(bob)
    bad: list[dict[str, Any]] = [
        {"chat_id": chat},
        {"chat_id": chat, "after": 0, "chats": {str(chat): 0}},
        {"after": 0, "chats": {str(chat): 0}},
        {"chat_id": chat, "after": None, "chats": None},
        {"chats": {"junk": 0}},
        {"chats": {str(chat): -1}},
        {"chats": {"0": 0, str(chat): 0}},
        {"chats": [chat]},
        {},
    ]
    for frame in bad:
        await line.sends(type="sync", **frame, ref="r")
        error = await line.hears()
        assert (error["type"], error["ref"], error["data"]["status"]) == ("error", "r", 422), frame
        assert error.get("chat_id") == frame.get("chat_id"), frame
    posted = await alice.says(chat, "two")
    assert await line.hears() == message(posted)


async def test_number_beyond_the_last_is_answered_by_the_lower_one(
    alice: Person, bob: Person
) -> None:
    """A sync from a number that was never given is answered with the chat's last number, and the
    chat is live."""
    chat, other = await alice.opens(bob), await alice.founds(bob)
    await alice.says(chat, "one")
    line = await follows(bob)
    for after in (2, 100, 2**63 - 1):
        await line.sends(type="sync", chat_id=chat, after=after)
        assert await line.hears() == ready(chat, 1)
        await line.sends(type="sync", chats={str(chat): after, str(other): after})
        heard = sorted([await line.hears(), await line.hears()], key=chat_of)
        assert heard == [ready(chat, 1), ready(other, 0)]
    posted = await alice.says(chat, "two")
    assert await line.hears() == message(posted)


async def test_sync_goes_live_without_a_hole_while_others_post(
    alice: Person, bob: Person, carol: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever a sync comes, every later number is heard once and in order, and other chats go
    on."""
    monkeypatch.setattr(messenger, "REPLAY_PAGE", 7)
    chats = [await alice.opens(bob), await alice.founds(bob, carol)]
    quiet = await carol.founds(alice, bob)  # never synced
    await asyncio.gather(*[alice.says(chat, "before") for chat in chats * 30])
    stop = asyncio.Event()

    async def keeps_posting(person: Person, chat: int) -> None:
        while not stop.is_set():
            await person.says(chat, "meanwhile")

    posters = [(alice, chats[0]), (bob, chats[0]), (carol, chats[1]), (carol, quiet)]
    posting = [asyncio.create_task(keeps_posting(*each)) for each in posters]
    listening = []
    for number in range(8):
        line, after = await follows(bob), {chats[0]: number * 4, chats[1]: 28 - number * 4}
        hearing = asyncio.create_task(until_all(line, *chats, quiet, text="the last"))
        await asyncio.sleep(0.02)  # some are heard live before the sync
        await line.sends(type="sync", chats={str(chat): each for chat, each in after.items()})
        listening.append((line, after, hearing))
    stop.set()
    await asyncio.gather(*posting)
    last = {chat: (await carol.says(chat, "the last"))["seq"] for chat in (chats[1], quiet)}
    last[chats[0]] = (await alice.says(chats[0], "the last"))["seq"]
    for line, after, hearing in listening:
        heard = await hearing
        while len(of_type(heard, "ready")) < len(chats):
            heard.append(await line.hears())
        for chat, since in after.items():
            *live_before, replayed = runs(numbers(heard, chat))
            assert replayed == list(range(since + 1, last[chat] + 1))
            assert len(live_before) <= 1
            for run in live_before:
                assert run == list(range(run[0], run[-1] + 1))
            assert len(about(chat, of_type(heard, "ready"))) == 1
        undisturbed = numbers(heard, quiet)
        assert undisturbed == list(range(undisturbed[0], last[quiet] + 1))
        assert {chat_of(each) for each in of_type(heard, "ready")} == set(chats)


async def test_chat_is_not_live_while_it_is_replayed(
    alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is posted during a replay is heard in its turn, after everything before it."""
    monkeypatch.setattr(messenger, "REPLAY_PAGE", 1)
    chat = await alice.opens(bob)
    await asyncio.gather(*[alice.says(chat, "before") for _ in range(60)])
    line, alices = await follows(bob), await follows(alice)
    await line.sends(type="sync", chat_id=chat, after=0)
    heard = [await line.hears()]
    await alices.says("meanwhile", chat_id=chat)
    heard += await until(line, "meanwhile")
    assert numbers(heard, chat) == list(range(1, 62))


@pytest.mark.parametrize("second", [2, 60], ids=["going back", "going on"])
async def test_second_sync_goes_on_from_the_smaller_number(
    alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch, second: int
) -> None:
    """A second sync during a replay goes on from the smaller of its number and where the replay is;
    each has its `ready`, both at the end.
    """
    monkeypatch.setattr(messenger, "REPLAY_PAGE", 1)
    chat = await alice.opens(bob)
    await asyncio.gather(*[alice.says(chat, "before") for _ in range(60)])
    line = await follows(bob)
    await line.sends(type="sync", chat_id=chat, after=5, ref=1)
    await line.hears()
    await line.sends(type="sync", chats={str(chat): second}, ref=2)
    begun = number_of((await line.hears("replay"))["data"]["position"])
    heard: list[Heard] = []
    while len(of_type(heard, "ready")) < 2:
        heard.append(await line.hears())
    assert heard[-2:] == [ready(chat, 60) | {"ref": number} for number in (1, 2)]
    assert begun < 60, "the first was over before the second came"
    assert begun == second or second > begun
    assert numbers(heard, chat) == list(range(begun + 1, 61))
    sent = await alice.says(chat, "live")
    assert await until(line, "live") == [message(sent)]  # and no third `ready`


async def test_sync_without_waiting_takes_effect_after_the_message_before_it(
    alice: Person, bob: Person
) -> None:
    """A message and a sync to its number, sent without waiting, take effect in that order."""
    chat = await alice.opens(bob)
    for number in range(1, 11):
        line = await follows(alice)
        await line.says("hello", chat_id=chat)
        await line.sends(type="sync", chat_id=chat, after=number)
        heard = [await line.hears(), await line.hears()]
        assert [frame["type"] for frame in heard] == ["message", "ready"]
        assert heard[1] == ready(chat, number)


# ---- Slow readers


@pytest.fixture
async def stalled(server: TestServer, bob: Person) -> AsyncIterator[RawLine]:
    """Bob's socket on all of his chats, unread until it is told to, with small buffers."""
    line = RawLine()
    await line.opens(server.port or 0, "/ws", bob.access, receive_bytes=4096)
    transport_of(server, line.socket)
    yield line
    line.socket.close()


async def test_stalled_reader_catches_up_in_every_chat(
    app: web.Application, alice: Person, bob: Person, carol: Person, stalled: RawLine
) -> None:
    """A socket that was not read for a while catches up in every chat, with a `ready` at the end of
    each."""
    chats = [await alice.opens(bob), await alice.founds(bob, carol)]
    gone = await alice.founds(bob, carol)
    [socket] = app[messenger.ROOMS].sockets_of(bob.id)
    async with asyncio.timeout(SOON_SECONDS):
        while not socket.rooms.keys() >= {*chats, gone}:
            await asyncio.sleep(0.01)
    for _ in range(40):
        await asyncio.gather(*[alice.says(chat, "x" * 4000) for chat in (*chats, gone)])
    await removes(alice, gone, bob)
    for chat in chats:
        await alice.says(chat, "the last")
    heard: list[Heard] = []
    caught_up: set[int] = set()
    while caught_up < set(chats):
        heard.append(await stalled.hears())
        if heard[-1]["type"] == "ready" and heard[-1]["data"]["rev"] == 41:  # not of its joining
            caught_up.add(chat_of(heard[-1]))
    for chat in chats:
        assert numbers(heard, chat) == list(range(1, 42))
    assert about(gone, heard)[-1]["type"] == "chat_removed"


async def test_chat_taken_away_during_a_stalled_replay_is_no_fault(
    alice: Person,
    bob: Person,
    carol: Person,
    stalled: RawLine,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A user who is removed while a replay waits for their socket to be read hears of it, and
    nothing breaks."""
    monkeypatch.setattr(messenger, "REPLAY_PAGE", 10)
    group, chat = await alice.founds(bob, carol), await alice.opens(bob)
    await asyncio.gather(*[alice.says(group, "x" * 4000) for _ in range(50)])
    await alice.says(chat, "before")
    await stalled.sends(0x81, b'{"type":"sync","chat_id":%d,"after":0}' % group)
    witness = await follows(alice)
    await stalled.sends(0x81, b'{"type":"typing","chat_id":%d}' % chat)
    await witness.hears("typing")  # the sync was begun
    await removes(alice, group, bob)
    await witness.hears("chat_updated")
    while (await stalled.hears())["type"] != "chat_removed":
        pass
    await stalled.sends(0x81, b'{"type":"sync","chat_id":%d,"after":0}' % chat)
    heard = [await stalled.hears("message", "ready") for _ in range(2)]
    assert [frame["type"] for frame in heard] == ["message", "ready"]
    gc.collect()  # tells of a task whose exception nobody took
    slow = "Executing %s took %.3f seconds"  # asyncio's debug mode on a busy machine
    assert not [record for record in caplog.records if record.msg != slow]


# ---- Typing


async def test_typing_is_told_to_the_others(alice: Person, bob: Person, carol: Person) -> None:
    """`typing` reaches all sockets of the others in the chat, in its turn, and none of the user's
    own."""
    chat, other = await alice.founds(bob, carol), await alice.opens(carol)
    line, own = await follows(alice), [await follows(alice), await alice.listens_live(chat)]
    others = [await follows(bob), await bob.listens_live(chat), await follows(carol)]
    elsewhere_line = await carol.listens_live(other)
    await line.says("before", chat_id=chat)
    await line.sends(type="typing", chat_id=chat)
    await line.says("done", chat_id=chat)
    await line.says("done", chat_id=other)
    typing = {"type": "typing", "data": {"chat_id": chat, "user_id": alice.id}}
    for each in others:
        heard = await until(each, "done")
        assert (heard[1], numbers(heard, chat)) == (typing, [1, 2])
        assert len(heard) == 3
    for each in [*own, line, elsewhere_line]:
        assert not of_type(await until(each, "done"), "typing")


async def test_typing_is_not_told_in_large_groups(
    alice: Person, bob: Person, sql: asyncpg.Connection
) -> None:
    """`typing` is told in a chat of 100; in one of 101 it is not, and that is not an error."""
    chat = await alice.founds(bob)
    await fills(sql, chat, 98)
    line, other = await follows(alice), await follows(bob)
    await line.sends(type="typing", chat_id=chat)
    assert (await other.hears())["type"] == "typing"
    await fills(sql, chat, 1)
    await line.sends(type="typing", chat_id=chat, ref="r")
    await line.says("done", chat_id=chat)
    assert (await other.hears())["type"] == "message"
    assert [(await line.hears())["type"] for _ in range(2)] == ["ack", "message"]


# ---- Reads


async def test_read_in_a_large_group_is_told_to_its_reader_and_sender_only(
    alice: Person, bob: Person, carol: Person, sql: asyncpg.Connection
) -> None:
    """With 100 participants all hear a read; with 101 only the sockets of the reader and of the
    message's sender do."""
    chat = await alice.founds(bob, carol)
    lines = {who.name: [await follows(who), await follows(who)] for who in (alice, bob, carol)}
    for size, hearers in ((97, {"alice", "bob", "carol"}), (1, {"alice", "bob"})):
        await fills(sql, chat, size)
        await carol.says(chat, "somebody else's")
        sent = await alice.says(chat, "read this")
        read = {"type": "read", "data": await bob.reads(chat, sent)}
        await carol.says(chat, f"done {size}")
        for name, theirs in lines.items():
            for line in theirs:
                heard = of_type(await until(line, f"done {size}"), "read")
                assert heard == ([read] if name in hearers else []), (size, name)


# ---- Auth


async def test_socket_outlives_its_first_session_by_a_fresh_token(
    alice: Person, bob: Person
) -> None:
    """After `auth` the socket belongs to the new token's session and ends with that one."""
    chat, old = await alice.opens(bob), alice.access
    line, control = await follows(alice), await follows(alice)
    await alice.logs_in()
    new = alice.access
    await line.sends(type="auth", token=new, ref="r")
    answer = await line.hears()
    exp = jwt.decode(new, SECRET_KEY, algorithms=["HS256"])["exp"]
    assert answer["type"] == "auth"
    assert answer["data"].keys() == {"expires_at"}
    assert datetime.fromisoformat(answer["data"]["expires_at"]).timestamp() == exp
    await logs_out(alice, old)
    assert await control.is_closed() == 4401
    await line.says("still here", chat_id=chat, ref="r")
    assert {(await line.hears())["type"], (await line.hears())["type"]} == {"ack", "message"}
    await logs_out(alice, new)
    assert await line.is_closed() == 4401


async def test_refreshed_token_lets_the_socket_outlive_the_old_ones_expiry(
    alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket of either kind lives as long as the last token that it was given."""
    chat = await alice.opens(bob)
    claims = jwt.decode(alice.access, SECRET_KEY, algorithms=["HS256"])
    short = jwt.encode(claims | {"exp": int(time.time()) + 60}, SECRET_KEY, "HS256")
    alice.access = short
    control, lines = await follows(alice), [await follows(alice), await alice.listens_live(chat)]
    bearer = {"Authorization": f"Bearer {alice.refresh}"}
    answer = await alice.client.post("/api/v1/users/refresh", headers=bearer)
    alice.access = (await answer.json())["access_token"]
    for line in lines:
        await line.sends(type="auth", token=alice.access)
        assert (await line.hears())["type"] == "auth"
    with monkeypatch.context() as patch:
        patch.setattr(messenger, "TOKEN_LEEWAY_SECONDS", -120)  # as if two minutes had passed
        assert await control.is_closed() == 4401
    sent = await bob.says(chat, "still here")
    for line in lines:
        assert await line.hears() == message(sent)


async def test_token_that_does_not_count_leaves_the_old_one(alice: Person, bob: Person) -> None:
    """An `auth` with another's token, junk, a refresh token or an ended session's token is 401, and
    the old token still counts."""
    chat, old, refresh = await alice.opens(bob), alice.access, alice.refresh
    line, other = await follows(alice), await follows(bob)
    await alice.logs_in()
    ended = alice.access
    await logs_out(alice, ended)
    for number, token in enumerate((bob.access, "junk", "", refresh, ended, old[:-4])):
        await line.sends(type="auth", token=token, ref=number)
        error = await line.hears()
        assert (error["type"], error["ref"], error["data"]["status"]) == ("error", number, 401)
        assert error["data"]["type"] == "unauthorized"
    for body in ({}, {"token": None}, {"token": 5}, {"token": old, "after": 0}):
        await line.sends(type="auth", **body, ref="r")
        assert (await line.hears())["data"]["status"] == 422
    bobs = bob.access
    await bob.logs_in()
    await logs_out(bob, bobs)
    assert await other.is_closed() == 4401
    await line.says("still alice", chat_id=chat)
    assert (await line.hears())["data"]["sender_id"] == alice.id
    await logs_out(alice, old)
    assert await line.is_closed() == 4401


# ---- Two servers


async def test_new_chat_and_joining_are_heard_at_another_server(
    alice: Person,
    bob: Person,
    carol: Person,
    elsewhere: Elsewhere,
    hints: str,
) -> None:
    """Chats that are created or joined at one server are heard on a socket at the other, with hints
    and without."""
    group = await alice.founds(bob)
    await bob.says(group, "before")
    line = await follows(await elsewhere.takes(carol))
    await adds(alice, group, carol)
    personal = await bob.opens(carol)
    chats = {chat: await carol.gets(f"/chats/{chat}") for chat in (group, personal)}
    async with asyncio.timeout(SOON_SECONDS):
        heard = [await line.hears("chat", "ready", "message") for _ in range(4)]
    for chat, told in chats.items():
        expected = [{"type": "chat", "data": told}, ready(chat, told["last_rev"])]
        assert about(chat, heard) == expected
    sent = [await bob.says(chat, "hello") for chat in chats]
    async with asyncio.timeout(SOON_SECONDS):
        heard = [await line.hears("chat", "ready", "message") for _ in chats]
    assert sorted(heard, key=chat_of) == [message(one) for one in sent]


@pytest.mark.usefixtures("no_polls")
async def test_chats_are_heard_at_another_server_by_hint(
    alice: Person,
    bob: Person,
    carol: Person,
    elsewhere: Elsewhere,
) -> None:
    """A user who joins a group or gets a new chat at one server hears of it at the other without a
    poll."""
    known, chat = await alice.opens(carol), await alice.founds(bob)
    line = await follows(await elsewhere.takes(carol))
    await knows(alice, known, line)
    await adds(alice, chat, carol)
    assert (await line.hears())["data"]["id"] == chat
    assert await line.hears("ready", "message") == ready(chat, 0)
    await bob.says(chat, "hello")
    assert (await line.hears("message"))["data"]["text"] == "hello"
    chat = await bob.opens(carol)
    assert (await line.hears())["data"]["id"] == chat
    assert await line.hears() == ready(chat, 0)


async def test_removal_is_heard_at_another_server_and_nothing_leaks(
    alice: Person,
    bob: Person,
    carol: Person,
    elsewhere: Elsewhere,
    hints: str,
) -> None:
    """A user who is removed at one server does not hear what is posted at the other right after."""
    chat, silent = await alice.founds(bob, carol), await alice.founds(bob, carol)
    other = await alice.opens(carol)
    bob_there, carol_there = await elsewhere.takes(bob), await elsewhere.takes(carol)
    bobs, line = await follows(bob_there), await follows(carol_there)
    await removes(alice, chat, carol)
    await bob_there.says(chat, "secret")
    await until(bobs, "secret")
    await carol_there.says(other, "marker")
    heard = about(chat, await until(line, "marker"))
    assert heard == [{"type": "chat_removed", "data": {"chat_id": chat}}]
    await removes(alice, silent, carol)
    async with asyncio.timeout(SOON_SECONDS):
        assert await line.hears() == {"type": "chat_removed", "data": {"chat_id": silent}}


async def test_who_was_out_for_a_moment_hears_on_at_another_server(
    alice: Person,
    bob: Person,
    carol: Person,
    elsewhere: Elsewhere,
    hints: str,
) -> None:
    """A user who was removed and put back before the other server looked hears each later message
    once."""
    chat = await alice.founds(bob, carol)
    line = await follows(await elsewhere.takes(carol))
    await removes(alice, chat, carol)
    await adds(alice, chat, carol)
    sent = [await bob.says(chat, f"{number}") for number in range(3)]
    told = 0
    async with asyncio.timeout(SOON_SECONDS):
        while told < 3:
            heard = await line.hears("chat", "message")
            if heard["type"] == "chat":  # where the removal was seen
                assert told <= heard["data"]["last_rev"]
                told = heard["data"]["last_rev"]
            else:
                assert heard == message(sent[told])
                told += 1


@pytest.mark.usefixtures("no_polls")
async def test_socket_ends_with_its_new_session_at_another_server(
    alice: Person,
    bob: Person,
    elsewhere: Elsewhere,
) -> None:
    """After `auth` a logout at another server closes the socket if it ends the new session, and not
    if it ends the old one."""
    chat, old = await alice.opens(bob), alice.access
    there = await elsewhere.takes(alice)
    line, control = await follows(there), await follows(there)
    await knows(bob, chat, line)
    await control.hears_text("knock")
    await alice.logs_in()
    await line.sends(type="auth", token=alice.access)
    assert await line.hears("auth", "error")
    await logs_out(alice, old)
    assert await control.is_closed() == 4401
    await line.says("still here", chat_id=chat)
    assert await line.hears_text("still here")
    await logs_out(alice, alice.access)
    assert await line.is_closed() == 4401


# ---- Very many chats


async def test_very_many_chats_are_joined_in_pieces(
    alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket joins its chats piece by piece, and others have their turn between two; what is
    posted meanwhile is heard after the place that it was told, without a hole."""
    monkeypatch.setattr(messenger, "FOLLOWED_PAGE", 2)
    chats = [await alice.founds(bob) for _ in range(7)]
    is_over = False

    async def goes_on() -> None:
        for number in itertools.count(1):
            await asyncio.gather(*(bob.says(chat, f"number {number}") for chat in chats))
            if is_over:
                return

    posting = asyncio.create_task(goes_on())
    for _ in range(10):
        line = await follows(alice)
        frames = [await line.hears("chats", "message")]
        while {chat_of(frame) for frame in of_type(frames, "message")} != set(chats):
            frames.append(await line.hears("chats", "message"))
        told = of_type(frames, "chats")
        assert [frame["data"]["more"] for frame in told] == [True, True, True, False]
        stands = {
            int(chat): number_of(position)
            for frame in told for chat, (position, _) in frame["data"]["chats"].items()}
        assert stands.keys() == set(chats)
        for chat in chats:
            heard = [frame["data"]["seq"] for frame in of_type(frames, "message")
                     if chat_of(frame) == chat]
            assert heard == [stands[chat] + count for count, _ in enumerate(heard, 1)]
        await line.close()
    is_over = True
    await posting


async def test_chat_that_changes_while_others_are_joined_is_as_it_is_then(
    app: Any, alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a chat which somebody is taken out of while a socket joins the ones before it, the socket
    is told nothing; with another that changed meanwhile it joins the chat as it is."""
    monkeypatch.setattr(messenger, "FOLLOWED_PAGE", 3)
    chats = [await bob.founds(alice) for _ in range(3)]
    lines = [await bob.listens_live(chat) for chat in chats[1:]]
    rooms, changed = app[messenger.ROOMS], asyncio.Event()
    followed_by = rooms._followed_by

    async def changes_after(asked: Any) -> Any:
        followed = await followed_by(asked)
        if not changed.is_set():
            changed.set()
            await removes(bob, chats[1], alice)
            await bob.expects(200, "PATCH", f"/chats/{chats[2]}", {"name": "renamed"})
            for line in lines:
                await line.hears("chat_updated")  # now the room knows
        return followed

    rooms._look_ups._look_up = changes_after
    line = await follows(alice)
    frames = [await line.hears("chats", "chat", "chat_removed")]
    while frames[-1]["data"].get("more", True):
        frames.append(await line.hears("chats", "chat", "chat_removed"))
    told = {int(chat): stand for frame in of_type(frames, "chats")
            for chat, stand in frame["data"]["chats"].items()}
    assert told.keys() == {chats[0], chats[2]}
    assert told[chats[2]][1] == (await bob.gets(f"/chats/{chats[2]}"))["version"]
    await bob.says(chats[1], "not for alice")
    await bob.says(chats[2], "for alice")
    assert (await line.hears("message", "chat_removed"))["data"]["text"] == "for alice"


def hold_rooms(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Let no room read what is new in its chat, until the event that this answers is set."""
    goes_on, rows = asyncio.Event(), messenger.Database.rows

    async def read_slowly(self: messenger.Database, statement: str, *arguments: Any) -> Any:
        if statement == messenger.SELECT_ROOM:
            await goes_on.wait()
        return await rows(self, statement, *arguments)

    monkeypatch.setattr(messenger.Database, "rows", read_slowly)
    return goes_on


@pytest.mark.parametrize("told", ["typing", "read"])
async def test_who_was_removed_hears_nothing_that_came_after(
    alice: Person, bob: Person, carol: Person, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    """That somebody reads or writes is told to nobody who was taken out of the chat before, also
    while the server has yet to find out who that was; that they write is told to nobody then."""
    chat = await alice.founds(bob, carol)
    said = await alice.says(chat, "hi")
    line, removed = await alice.listens_live(chat), await follows(bob)
    writing = await carol.listens_live(chat)
    goes_on = hold_rooms(monkeypatch)
    await removes(alice, chat, bob)
    await writing.sends(type=told, ref=1, **({"message_id": said["id"]} if told == "read" else {}))
    await writing.hears("ack")
    goes_on.set()
    assert (await line.hears())["type"] == "chat_updated"
    if told == "typing":
        await alice.says(chat, "later")
    assert (await line.hears())["type"] == ("read" if told == "read" else "message")
    assert (await removed.hears("chat_removed", told))["type"] == "chat_removed"


async def test_room_that_everybody_leaves_while_it_reads_costs_no_connection(
    app: Any, alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last socket of a chat that has changed is closed while the server reads what is new: the
    connections to PostgreSQL stay."""
    chat = await alice.founds(bob)
    pool, rows, reading = app[messenger.DATABASE]._pool, messenger.Database.rows, asyncio.Event()

    def backends() -> set[int]:
        return {each.connection.get_server_pid() for each in (*pool._idle, *pool._lent)}

    async def read_slowly(self: messenger.Database, statement: str, *arguments: Any) -> Any:
        if statement == messenger.SELECT_ROOM:
            reading.set()
            await rows(self, "select pg_sleep(0.2)")
        return await rows(self, statement, *arguments)

    monkeypatch.setattr(messenger.Database, "rows", read_slowly)
    for name in ("one", "two", "three"):
        line = await bob.listens_live(chat)
        before = backends()
        reading.clear()
        await alice.expects(200, "PATCH", f"/chats/{chat}", {"name": name})
        await reading.wait()
        await line.close()
        await asyncio.sleep(0.5)
        assert before <= backends()


async def test_sync_that_sees_a_removal_tells_of_it_and_of_the_return(
    alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user is taken out and put in again before the server has read either; a `sync` in between
    is refused, so `chat_removed` comes, and then the chat again."""
    chat = await alice.founds(bob)
    await alice.says(chat, "hi")
    line = await follows(bob)
    await line.hears("chats")
    goes_on = hold_rooms(monkeypatch)
    await removes(alice, chat, bob)
    await line.sends(type="sync", chat_id=chat, after="0", ref="mine")
    assert (await line.hears())["type"] == "chat_removed"
    assert (await line.hears("error"))["data"]["type"] == "chat-not-found"
    await adds(alice, chat, bob)
    goes_on.set()
    shown = await line.hears("chat")
    assert shown["data"]["id"] == chat
    assert (await line.hears("ready"))["data"]["chat_id"] == chat
    await alice.says(chat, "again")
    assert await line.hears_text("again")


@pytest.mark.parametrize("replays", ["asked for", "of a new chat"])
async def test_what_has_no_number_is_told_while_a_socket_catches_up(
    app: Any, alice: Person, bob: Person, carol: Person, monkeypatch: pytest.MonkeyPatch,
    replays: str,
) -> None:
    """That a chat is renamed, read or written in during the replay that a socket asked for, or
    between `chat` and `ready`, is told to that socket."""
    chat = await bob.founds(alice, carol)
    for _ in range(3):
        said = await bob.says(chat, "missed")
    line = await follows(alice)
    await line.hears("chats")
    asked, goes_on = asyncio.Event(), asyncio.Event()
    rows = messenger.Database.rows

    async def read_slowly(self: messenger.Database, statement: str, *arguments: Any) -> Any:
        if statement == messenger.SELECT_MISSED:
            asked.set()
            await goes_on.wait()
        return await rows(self, statement, *arguments)

    monkeypatch.setattr(messenger.Database, "rows", read_slowly)
    if replays == "asked for":
        await line.sends(type="sync", chat_id=chat, after="0", ref="mine")
    else:
        go_on = messenger.Rooms._go_on
        monkeypatch.setattr(messenger.Rooms, "_go_on", lambda rooms, socket, room: (
            asked.set(), rooms._tasks.spawn(goes_on.wait()).add_done_callback(
                lambda _: go_on(rooms, socket, room))))
        chat = await bob.founds(alice, carol)
        said = await bob.says(chat, "new")
    await asked.wait()
    await bob.expects(200, "PATCH", f"/chats/{chat}", {"name": "renamed"})
    update = await line.hears("chat_updated")
    assert (update["data"]["chat_id"], update["data"]["name"]) == (chat, "renamed")
    await carol.reads(chat, said)
    assert (await line.hears("read"))["data"]["seq"] == said["seq"]
    await (await carol.listens_live(chat)).sends(type="typing")
    assert (await line.hears("typing"))["data"]["user_id"] == carol.id
    goes_on.set()
    assert (await line.hears("ready"))["data"]["chat_id"] == chat


async def falls_silent(
    app: Any, server: TestServer, sender: Person, reader: Person, chat: int
) -> tuple[RawLine, messenger.Socket]:
    """Open a person's first socket, which reads nothing until it is behind; and the server's end of
    it."""
    line = await RawLine().opens(server.port, "/ws", reader.access, receive_bytes=4096)
    await line.hears("chats")
    transport_of(server, line.socket)
    [socket] = app[messenger.ROOMS]._of_users[reader.id]
    while socket.unsent() <= messenger.BEHIND_BYTES:
        await sender.says(chat, LONG)
    return line, socket


async def test_slow_reader_is_shown_new_chats_later_and_holds_up_nobody(
    app: Any, server: TestServer, alice: Person, bob: Person
) -> None:
    """While one socket of a user reads nothing, another is shown each chat that the user comes
    into; the slow one is shown them all once it reads."""
    chat = await alice.opens(bob)
    slow, _ = await falls_silent(app, server, alice, bob, chat)
    fast = await follows(bob)
    await fast.hears("chats")
    groups = []
    for _ in range(3):
        groups.append(await alice.founds(bob))
        assert (await fast.hears("chat"))["data"]["id"] == groups[-1]
    heard = [(await slow.hears("chat"))["data"]["id"] for _ in groups]
    assert sorted(heard) == groups
    await alice.says(groups[-1], "live")
    while (await slow.hears("message"))["data"]["text"] != "live":
        pass


async def test_sync_of_a_slow_reader_is_refused_only_for_chats_that_it_was_not_shown(
    app: Any, server: TestServer, alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a socket that reads too slowly asks for chats, those that it follows are replayed; the
    others are refused for the moment, and it is not closed for them."""
    monkeypatch.setattr(app[messenger.ROOMS]._late, "_at_most", 2)
    chat = await alice.opens(bob)
    said = await alice.says(chat, "hi")
    slow, socket = await falls_silent(app, server, alice, bob, chat)
    others = [10**9 + number for number in range(5)]
    refused = await app[messenger.ROOMS].sync(
        socket, dict.fromkeys((chat, *others), (0, None)), "mine")
    assert {each: type(error) for each, error in refused.items()} == dict.fromkeys(
        others, Unavailable)
    while (await slow.hears("replay")).get("ref") != "mine":
        pass
    assert (await slow.hears("message"))["data"]["id"] == said["id"]
    while (await slow.hears("ready")).get("ref") != "mine":
        pass
    await alice.says(chat, "live")
    while (await slow.hears("message"))["data"]["text"] != "live":
        pass


async def test_slow_reader_for_whom_too_many_new_chats_wait_comes_back_once_it_has_read(
    app: Any, server: TestServer, alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a socket that reads nothing few new chats wait; where there were more, it is closed after
    it has read what was written to it."""
    monkeypatch.setattr(app[messenger.ROOMS]._late, "_at_most", 2)
    chat = await alice.opens(bob)
    slow, _ = await falls_silent(app, server, alice, bob, chat)
    fast = await follows(bob)
    for _ in range(5):
        group = await alice.founds(bob)
        assert (await fast.hears("chat"))["data"]["id"] == group
    await slow.hears("chat")
    while (await slow.takes())[0] != CLOSE:
        pass


async def test_chats_that_the_sockets_of_a_user_follow_are_bounded(
    alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A further socket of a user is refused where all of them together would follow too many chats;
    the first may follow any number, and the sockets of others count for nothing."""
    chats = [await alice.founds(bob) for _ in range(3)]
    monkeypatch.setattr(messenger, "FREE_SOCKETS", 1)
    monkeypatch.setattr(messenger, "FOLLOWED_PER_USER_MAX", 2)
    first = await follows(alice)
    assert await refusal(alice, "/ws") == 429
    assert await refusal(alice, f"/ws/{chats[0]}") == 429
    await follows(bob)
    monkeypatch.setattr(messenger, "FOLLOWED_PER_USER_MAX", 4)
    assert await refusal(alice, "/ws") == 429
    await alice.listens_live(chats[0])
    await first.close()
    async with asyncio.timeout(SOON_SECONDS):
        while await is_refused(alice):
            await asyncio.sleep(0.01)


async def test_chats_that_the_sockets_of_an_address_follow_are_bounded(
    alice: Person, bob: Person, carol: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So are those that all sockets of an address follow, whoever they belong to; the first of
    each user may follow any number, and what has closed counts no more."""
    for _ in range(3):
        await alice.founds(bob, carol)
    monkeypatch.setattr(messenger, "FOLLOWED_PER_ADDRESS_MAX", 8)
    lines = [await follows(person) for person in (alice, bob, carol)]
    for person in (alice, bob, carol):
        assert await refusal(person, "/ws") == 429
    await asyncio.gather(*(line.close() for line in lines[1:]))
    async with asyncio.timeout(SOON_SECONDS):
        while await is_refused(alice):
            await asyncio.sleep(0.01)


async def test_chats_that_open_sockets_come_to_follow_are_bounded(
    alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a user comes into so many chats that their open sockets would follow too many, all of
    them but one are closed, to come back; that one follows any number."""
    monkeypatch.setattr(messenger, "FREE_SOCKETS", 1)
    monkeypatch.setattr(messenger, "FOLLOWED_PER_USER_MAX", 3)
    lines = [await follows(alice) for _ in range(3)]
    made = [await bob.founds(alice) for _ in range(5)]
    heard, codes = [], []
    for line in lines:
        chats: list[int] = []
        async with asyncio.timeout(SOON_SECONDS):
            while len(chats) < len(made) and not line.ws.closed:
                frame = await line.ws.receive()
                if frame.type is aiohttp.WSMsgType.TEXT and frame.json()["type"] == "chat":
                    chats.append(frame.json()["data"]["id"])
        heard.append(chats)
        codes.append(line.ws.close_code)
    assert sorted(codes, key=str) == [1001, 1001, None]
    assert heard[codes.index(None)] == made


async def is_refused(person: Person) -> bool:
    """Tell whether a socket on all chats of somebody is refused right now."""
    try:
        await follows(person)
    except aiohttp.WSServerHandshakeError:
        return True
    return False


@pytest.mark.parametrize("is_seen", [True, False], ids=["before the look-up", "after it"])
async def test_chat_that_one_comes_into_during_the_handshake_is_told_once(
    app: Any, alice: Person, bob: Person, is_seen: bool
) -> None:
    """A chat that is made while a socket joins is told by `chats`, or by `chat` behind it."""
    rooms = app[messenger.ROOMS]
    followed_by = rooms._followed_by
    made = []

    async def makes_a_chat(asked: Any) -> Any:
        followed = await followed_by(asked)
        made.append(await bob.founds(alice))
        await asyncio.sleep(0.1)  # its hint was heard long ago
        return await followed_by(asked) if is_seen else followed

    rooms._look_ups._look_up = makes_a_chat
    line = await follows(alice)
    first = await line.hears("chats", "chat")
    assert first["type"] == "chats"
    assert (str(made[0]) in first["data"]["chats"]) == is_seen
    if not is_seen:
        assert (await line.hears("chat"))["data"]["id"] == made[0]
    await bob.says(made[0], "hi")
    assert (await line.hears("message", "chat"))["type"] == "message"


async def test_chat_is_shown_once_the_database_is_back(
    app: web.Application, alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chat that could not be read when its user came into it is shown later, also where the poll
    looks no further back."""
    rows, reads, tries = app[messenger.DATABASE].rows, messenger.read_chats, 0

    async def polls_nothing(statement: str, *arguments: Any) -> Any:
        return [] if statement == messenger.SELECT_JOINED else await rows(statement, *arguments)

    async def fails_at_first(*arguments: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries <= 3:
            raise Unavailable(ABSENT)
        return await reads(*arguments)

    line = await follows(bob)
    await line.hears("chats")
    monkeypatch.setattr(app[messenger.DATABASE], "rows", polls_nothing)
    monkeypatch.setattr(messenger, "read_chats", fails_at_first)
    body = {"is_group": True, "name": "late", "participant_ids": [bob.id]}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(alice.asks("POST", "/chats", body))
        assert (await line.hears("chat"))["data"]["name"] == "late"
    assert tries > 3


async def test_slow_reader_hears_a_ready_of_its_own_beside_that_of_the_chat(
    app: web.Application, alice: Person, bob: Person
) -> None:
    """A socket that is shown a chat, and is too slow before the chat's `ready`, gets another one:
    by that it knows that something without a number may have been left out."""
    chat, rooms = await alice.founds(bob), app[messenger.ROOMS]
    line = await bob.listens_live(chat)
    [socket] = rooms.sockets_of(bob.id)
    room = socket.rooms[chat]
    replay = messenger.Replay(room.delivered, room.delivered, room.mark, (None,))
    rooms._put_replay(socket, chat, replay)  # as `chat` does, and `after`
    for _ in range(3):
        rooms._fall_behind(socket, room)
    for _ in range(2):
        assert "ref" not in await line.hears("ready")
    await line.sends(type="ping", ref=1)
    assert (await line.hears("ready", "pong"))["type"] == "pong"
