"""What a stranger sends costs the server no more than it cost them."""

import asyncio
import contextlib
import dataclasses
import gc
import itertools
import json
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer, make_mocked_request

import messenger
from plumbing import database, endpoints, guard, search, websocket
from plumbing.credentials import checked_email
from plumbing.endpoints import Problem
from plumbing.guard import PromptConnection, Rate
from plumbing.process import Guest
from plumbing.text import DECOMPOSED_CHARS_MAX, words_of
from support import hostile
from support.databases import crowd
from support.people import HEAR_SECONDS, PASSWORD, Line, Person, adds, follows, pages, removes
from support.raw import HANDSHAKE, TEXT, RawConnection, RawLine
from support.servers import ROOT, Server, slots_of

FLOOD = 60  # connections
PING, PONG, CLOSE, CONTINUED = 0x89, 0x8A, 0x88, 0x00
MARKS = "\u0344" * 16_000 + "\u0323" * 15_900  # to be sorted, in quadratic time


@pytest.mark.parametrize("email", [
    f"a{MARKS}@x.y", f"a@{MARKS}x.y", "a" * 60_000 + "@x.y", "\u0f73\uff9e\u0323" * 7_000 + "@x.y",
])
async def test_login_with_a_long_email_is_refused_unread(
    client: TestClient[Any, Any], alice: Person, email: str
) -> None:
    """However long the email of a login is, it is refused as an unknown one is, and at once."""
    answers = []
    began = time.process_time()
    for given in ("nobody@example.com", *[email] * 5):
        body = f'{{"email": "{given}", "password": "{PASSWORD}"}}'.encode()
        same = {"X-Request-Id": "same"}
        async with client.post("/api/v1/users/login", data=body, headers=same) as answer:
            answers.append((answer.status, await answer.json()))
    assert time.process_time() - began < 4  # of the processor; it took 15 s and more
    assert answers == [answers[0]] * 6
    assert answers[0][0] == 401


@pytest.mark.parametrize("marks", [
    "\u0344" * 2_700 + "\u0323" * 1_395, "\uff9e\u0323" * 2_047, "\u0f73\u0f71" * 2_047,
])
async def test_words_of_many_marks_take_no_time(marks: str) -> None:
    """A text is searched for its words as fast when it consists of marks."""
    began = time.process_time()
    for _ in range(200):
        words_of("a" + marks)
    assert time.process_time() - began < 1.5  # of the processor; it took 2.7 to 8.6 s
    assert words_of("re\u0301sume\u0301 " + "n\u0303" * 40) == words_of(
        "résumé " + "ñ" * 40)


@pytest.mark.parametrize("text", [
    "\ufdfa" * 4096,  # each is 18 characters once it is folded
    "\ufdfa\u0344" * 2048,
    "\ufdfa\ufdfb" * 2048,
    "㌖" * 4096,  # each is 6, of a script without spaces
    "".join(map(chr, range(0x4E00, 0x4E00 + 4096))),
    "ß\u0390" * 2048,
    "\u200b" * 4095 + "上",
    "上\u200b" * 2048,
], ids=[
    "ligatures", "with marks", "two kinds", "squares", "characters", "long folds", "breaks",
    "broken run"])
def test_words_of_texts_that_grow_take_no_time(text: str) -> None:
    """A text that becomes much longer by folding takes a few times what another takes that is as
    long as it may become, and makes a bounded number of words."""

    def takes(text: str) -> float:
        times = []
        for _ in range(10):
            began = time.process_time()
            words_of(text)
            times.append(time.process_time() - began)
        return min(times)

    assert len(words_of(text)) < 10_000
    assert takes(text) < 3 * takes("привет мир, " * (DECOMPOSED_CHARS_MAX // 12))


def test_end_of_a_text_that_grows_is_left_out() -> None:
    """What follows 12,288 characters of a decomposed text is not looked into; a text of a language
    is never as long."""
    assert "end" in words_of("\ufdfa" * 600 + " end")
    assert "end" not in words_of("\ufdfa" * 4000 + " end")
    assert "end" in words_of("각" * 4092 + " end")


@pytest.fixture
async def client(server: Any, aiohttp_client: Any) -> TestClient[Any, Any]:
    """A client that is nobody's."""
    return await aiohttp_client(server)


async def reads_until_closed(line: RawLine) -> tuple[int, int]:
    """Read until the server closes; answer how many pongs came before, and the code."""
    pongs = 0
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            first, payload = await line.takes()
            pongs += first == PONG
            if first == CLOSE:
                return pongs, int.from_bytes(payload[:2], "big")
    return pongs, 1006


@pytest.mark.parametrize(("opening", "opcode", "size"), [
    ("", PING, 0), ("", PONG, 0),
    ("01 80 00000000", CONTINUED, 0),  # a text in empty fragments
    ("02 80 00000000", CONTINUED, 1),  # a binary one, a byte in each
    ("01 81 00000000 7b 89 80 00000000", CONTINUED, 0),  # with a ping between
], ids=["pings", "pongs", "empty fragments", "small fragments", "fragments beside pings"])
async def test_any_frames_count_like_messages(
    app: web.Application, alice: Person, bob: Person, raw: Any, opening: str, opcode: int,
    size: int,
) -> None:
    """Pings, pongs and fragments are counted as frames: beyond the limit pings go unanswered, and
    who goes on is closed with 4429; meanwhile others are served."""
    app[messenger.RATES][messenger.TooManyFrames] = Rate(100, 1)
    app[messenger.RATES][messenger.FLOODING] = Rate(100, 1)
    chat = await alice.opens(bob)
    line = await raw(alice, chat)
    await line.gives(bytes.fromhex(opening))
    await line.gives(bytes((opcode, 0x80 + size, 0, 0, 0, 0, *[65] * size)) * 4_000)
    await bob.gets("/users/me")
    pongs, code = await reads_until_closed(line)
    assert code == 4429
    assert pongs == (100 if opcode == PING else "89" in opening)


async def test_message_in_many_fragments_is_read(alice: Person, bob: Person, raw: Any) -> None:
    """A message may come in fragments, empty ones and pings among them; its last one ends it."""
    chat = await alice.opens(bob)
    line = await raw(alice, chat)
    frame = b'{"type":"message","text":"whole","ref":"r"}'
    await line.sends(0x01, b"")
    for byte in frame:
        await line.sends(CONTINUED, bytes((byte,)))
        await line.sends(CONTINUED)
    await line.sends(PING)
    await line.sends(0x80)
    assert (await line.hears("ack", "error"))["type"] == "ack"
    assert await bob.history(chat) == ["whole"]


class Turns:
    """Somebody who has a round of the loop whenever it comes round, until so much was done."""

    def __init__(self, enough: int) -> None:
        self.done = 0  # is counted up by whoever does it
        self._enough = enough
        self._seen: list[int] = []  # how much was done by each turn
        self._have_one()

    def _have_one(self) -> None:
        self._seen.append(self.done)
        if self.done < self._enough:
            asyncio.get_running_loop().call_soon(self._have_one)

    async def most(self) -> int:
        """Wait until enough was done; answer the most that was done between two turns."""
        async with asyncio.timeout(HEAR_SECONDS):
            while self.done < self._enough:
                await asyncio.sleep(0.01)
        return max(later - before for before, later in itertools.pairwise(self._seen))


@pytest.mark.parametrize("opcode", [PING, CONTINUED])
async def test_frames_are_taken_in_turn_with_others(
    app: web.Application, alice: Person, bob: Person, raw: Any, monkeypatch: Any, opcode: int
) -> None:
    """What one socket sends in one block is not all taken before anybody else has a turn."""
    chat = await alice.opens(bob)
    line = await raw(alice, chat)
    turns = Turns(1_000)

    def take(*_: Any) -> None:
        turns.done += 1

    monkeypatch.setattr(messenger, "take_control", take)
    if opcode == CONTINUED:
        await line.sends(0x01)
    await line.gives(bytes((opcode, 0x80, 0, 0, 0, 0)) * 1_000)
    assert await turns.most() <= messenger.FRAMES_AT_ONCE


async def test_few_long_frames_are_taken_in_turn_with_others(
    app: web.Application, alice: Person, bob: Person, raw: Any, monkeypatch: Any
) -> None:
    """Of long frames in one block fewer are taken before anybody else has a turn."""
    line = await raw(alice, await alice.opens(bob))
    turns = Turns(40)

    def count(*_: Any) -> None:
        turns.done += 1

    monkeypatch.setattr(messenger, "take_message", count)
    await line.gives(hostile.frame(TEXT, b'{"type":"message","text":"%s"}' % (b"x" * 4_096)) * 40)
    assert await turns.most() <= 2


class Counted:
    """Counts every connection that comes as one of the address `party`."""

    def __init__(self) -> None:
        self.party = "flood"
        self.rounds, self.opened, self.held_by = guard.Rounds(), guard.Tally(), guard.Tally()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """How the connections to the server of a test are counted."""
    counted, connection_made = Counted(), PromptConnection.connection_made

    def come_in(self: PromptConnection, transport: Any) -> None:
        self.guest = guard.CountedGuest(
            counted.party, counted.opened, counted.rounds, counted.held_by)
        connection_made(self, transport)

    monkeypatch.setattr(PromptConnection, "connection_made", come_in)
    return counted


async def test_connections_that_are_read_too_often_are_read_in_turns(
    server: TestServer, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what comes over many connections of an address in the same moment, that of few is taken in
    each round of the loop; none is forgotten, and a connection of another address has its turn at
    once."""
    turns, data_received = Turns(0), PromptConnection.data_received

    def count(self: PromptConnection, data: bytes) -> None:
        if self.guest._party == "flood":
            turns.done += bool(data)
        else:
            done_before.append(turns.done)
        data_received(self, data)

    monkeypatch.setattr(PromptConnection, "data_received", count)
    done_before: list[int] = []  # when the other connection was read
    flood = [await RawConnection.opens(server.port, b"GET /nothing HTTP/1.1\r\n")
             for _ in range(FLOOD)]
    async with asyncio.timeout(HEAR_SECONDS):
        while turns.done < FLOOD:
            await asyncio.sleep(0.01)
    counted.party = "another"
    another = await RawConnection.opens(server.port, b"")
    turns = Turns(FLOOD)
    for connection in flood:
        connection.writer.write(b"Host: x\r\n\r\n")
    another.writer.write(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await another.hears())[0] == 404
    assert done_before[0] < FLOOD
    assert await turns.most() <= guard.READS_A_ROUND
    assert [(await connection.hears())[0] for connection in flood] == [404] * FLOOD
    assert not any(connection._rests for connection in counted.rounds._open["flood"])
    for connection in (*flood, another):
        connection.close()


async def test_connections_that_all_end_at_once_end_in_turns(
    server: TestServer, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where somebody hangs up on many connections at once, few of them end in each turn of the
    loop; all of them are told, and the address may have others."""
    turns, end = Turns(FLOOD), PromptConnection._end

    def count(self: PromptConnection) -> None:
        turns.done += 1
        end(self)

    monkeypatch.setattr(PromptConnection, "_end", count)
    body = b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{"
    flood = [await RawConnection.opens(server.port, body) for _ in range(FLOOD)]
    async with asyncio.timeout(HEAR_SECONDS):
        while counted.opened["flood"] < FLOOD:
            await asyncio.sleep(0.01)
        for connection in flood:
            connection.writer.transport.abort()
        assert await turns.most() <= guard.READS_A_ROUND
        while counted.opened["flood"]:
            await asyncio.sleep(0.01)
    assert not counted.rounds._open


async def test_bodies_of_many_chunks_are_parsed_in_turns(
    server: TestServer, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many connections bring bodies in small chunks, few of them are parsed on in each turn
    of the loop."""
    turns, resume = Turns(FLOOD * 10), PromptConnection._resume

    def count(self: PromptConnection) -> None:
        turns.done += 1
        resume(self)

    monkeypatch.setattr(PromptConnection, "_resume", count)
    head = b"POST /api/v1/users/login HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = b"2\r\nxy\r\n" * 2000 + b"0\r\n\r\n"
    flood = [await RawConnection.opens(server.port, head + body) for _ in range(FLOOD)]
    assert await turns.most() <= guard.READS_A_ROUND
    assert {(await connection.hears())[0] for connection in flood} == {400}
    for connection in flood:
        connection.close()


async def test_request_counts_until_the_rest_of_its_body_was_dropped(
    server: TestServer, counted: Counted
) -> None:
    """While the server waits for the rest of a body that nobody reads, its request counts; no
    longer once the rest has come, or the client has gone."""
    refused = (b"POST /nothing HTTP/1.1\r\nHost: x\r\n" + b"x:\r\n" * 50
               + b"Content-Length: 20000\r\n\r\n" + b" " * 10_000)
    caller, leaver = [await RawConnection.opens(server.port, refused) for _ in range(2)]
    for connection in (caller, leaver):
        assert (await connection.hears())[0] == 404
    both = counted.held_by["flood"]
    assert both > 2 * 50 * guard.FIELD_BYTES
    leaver.writer.transport.abort()
    async with asyncio.timeout(5):  # aiohttp waits for ten
        while counted.held_by["flood"] > both / 2:
            await asyncio.sleep(0.01)
    caller.writer.write(b" " * 10_000)
    async with asyncio.timeout(5):
        while counted.held_by:
            await asyncio.sleep(0.01)
    caller.writer.write(refused)
    assert (await caller.hears())[0] == 404
    caller.close()


@pytest.mark.parametrize(
    "sent",
    [b"Content-Length: 60000\r\n\r\n" + b" " * 30_000,
     b"x:\r\n" * 90 + b"Content-Length: 9\r\n\r\n"],
    ids=["bodies", "headers"])
async def test_what_the_requests_of_an_address_take_is_bounded(
    server: TestServer, counted: Counted, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """Where requests of an address that are not answered yet take too much together, whose they are
    are cut; what is answered counts no longer, and another address has its own."""
    monkeypatch.setattr(guard, "HELD_BYTES_MAX", 100_000)
    login = b"POST /api/v1/users/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    nothing = b"GET /nothing HTTP/1.1\r\nHost: x\r\n" + b"x:\r\n" * 50
    served = await RawConnection.opens(server.port, b"")
    for _ in range(30):  # one after the other they take little
        served.writer.write(nothing + b"\r\n")
        assert (await served.hears())[0] == 404
    served.writer.write(b"POST /api/v1/chats HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n")
    assert (await served.hears())[0] == 401
    served.writer.write(b" " * 60_000)  # a body that nobody reads any more
    async with asyncio.timeout(HEAR_SECONDS):
        while counted.held_by:
            await asyncio.sleep(0.01)
    flood = [await RawConnection.opens(server.port, login + sent) for _ in range(10)]
    async with asyncio.timeout(HEAR_SECONDS):
        while sum(bool(each.reader.at_eof() or each.reader.exception()) for each in flood) < 7:
            await asyncio.sleep(0.01)
        while counted.opened["flood"] > 4:  # the three that fit, and the one that was served
            await asyncio.sleep(0.01)
    counted.party = "another"
    others = await RawConnection.opens(server.port, nothing + b"\r\n")
    assert (await others.hears())[0] == 404
    for connection in (*flood, others, served):
        connection.close()
    async with asyncio.timeout(HEAR_SECONDS):
        while counted.held_by or counted.opened:
            await asyncio.sleep(0.01)


async def test_sockets_whose_tokens_end_together_are_closed_in_turns(
    app: web.Application, alice: Person, monkeypatch: Any
) -> None:
    """Of sockets whose tokens have expired in the same second, one is closed in each turn of the
    loop."""
    rooms = app[messenger.ROOMS]
    lines = [await alice.client.ws_connect("/ws", headers=alice.headers) for _ in range(20)]
    for socket in rooms.sockets_of(None):
        socket.asker = dataclasses.replace(socket.asker, expires_at=0)
    turns, leave = Turns(20), messenger.Rooms.leave

    def count(*args: Any) -> None:
        turns.done += 1
        leave(*args)

    monkeypatch.setattr(messenger.Rooms, "leave", count)
    await messenger.Watch(rooms).check_sockets()
    assert await turns.most() == 1
    assert rooms.sockets_of(None) == []
    for line in lines:
        while not line.closed:
            await line.receive(HEAR_SECONDS)
        assert line.close_code == messenger.TOKEN_ENDED


async def test_syncs_are_done_in_turn_with_others(
    alice: Person, bob: Person, raw: Any, monkeypatch: Any
) -> None:
    """Of the syncs that a user sends in one block, which ask for nothing of the database, no more
    are done at once than their replays may be."""
    chat = await alice.opens(bob)
    lines = [await raw(alice, chat) for _ in range(3)]
    turns, put_replay = Turns(300), messenger.Rooms._put_replay

    def count(*args: Any) -> Any:
        turns.done += 1
        return put_replay(*args)

    monkeypatch.setattr(messenger.Rooms, "_put_replay", count)
    frame = b'{"type":"sync","after":0}'
    for line in lines:
        await line.gives(bytes((0x81, 0x80 + len(frame), 0, 0, 0, 0, *frame)) * 100)
    assert await turns.most() <= messenger.REPLAYS_PER_USER


async def test_sync_of_many_chats_is_done_in_turn_with_others(
    app: web.Application, alice: Person, bob: Person, monkeypatch: Any
) -> None:
    """Of one sync that names many chats, only a few begin to be replayed in a round of the loop."""
    chats = [await alice.founds(bob) for _ in range(3 * messenger.CHATS_PIECE)]
    line = await alice.client.ws_connect("/ws", headers=alice.headers)
    turns, put_replay = Turns(len(chats)), messenger.Rooms._put_replay

    def count(*args: Any) -> Any:
        turns.done += 1
        return put_replay(*args)

    monkeypatch.setattr(messenger.Rooms, "_put_replay", count)
    await line.send_json({"type": "sync", "chats": dict.fromkeys(map(str, chats), 0)})
    assert await turns.most() <= messenger.CHATS_PIECE


async def test_refusals_of_syncs_are_told_in_turn_with_others(
    app: web.Application, alice: Person, monkeypatch: Any
) -> None:
    """However many sockets name chats that are refused: a few are told of in a round of the loop.
    """
    monkeypatch.setattr(messenger, "CHATS_PIECE", 1)
    lines = [await alice.client.ws_connect("/ws", headers=alice.headers) for _ in range(5)]
    turns, refuse_frame = Turns(5 * 20), messenger.refuse_frame

    def count(*args: Any) -> None:
        turns.done += 1
        refuse_frame(*args)

    monkeypatch.setattr(messenger, "refuse_frame", count)
    strange = dict.fromkeys(map(str, range(10**9, 10**9 + 20)), 0)
    for line in lines:
        await line.send_json({"type": "sync", "chats": strange})
    assert await turns.most() == 1


async def test_sockets_that_come_into_a_chat_do_so_in_turn_with_others(
    app: web.Application, alice: Person, bob: Person, monkeypatch: Any
) -> None:
    """Of the sockets of who comes into a chat, one joins it in each round of the loop; where it
    changes meanwhile, those to come are shown it as it is then."""
    lines = [await bob.client.ws_connect("/ws", headers=bob.headers) for _ in range(20)]
    turns, show_chats = Turns(len(lines)), messenger.Rooms._show_chats
    seen = []

    def count(rooms: Any, *arguments: Any) -> None:
        turns.done += 1
        if turns.done == 10:  # of its participants more is known than was read
            seen[:] = [room.version for room in rooms._rooms.values()]
            for room in rooms._rooms.values():
                room.version += 1
        show_chats(rooms, *arguments)

    async def wait(rooms: Any, _: float) -> None:
        for room in rooms._rooms.values():  # what was read next would know it, too
            room.version -= 1

    monkeypatch.setattr(messenger.Rooms, "_show_chats", count)
    monkeypatch.setattr(messenger.Rooms, "_wait_for_version", wait)
    chat = await alice.founds(bob)
    assert await turns.most() == 1
    for line in lines:
        async with asyncio.timeout(HEAR_SECONDS):
            while (frame := await line.receive_json())["type"] != "chat":
                pass
        assert frame["data"]["id"] == chat
    assert seen
    assert turns.done > len(lines)  # some were to be shown it again


async def test_sockets_leave_very_many_chats_in_turn_with_others(
    app: web.Application, alice: Person, bob: Person, monkeypatch: Any
) -> None:
    """A socket that closes leaves a few of its rooms in a round of the loop, and all of them in the
    end; who joins meanwhile hears what comes."""
    monkeypatch.setattr(messenger, "FOLLOWED_PAGE", 5)
    chats = [await alice.founds(bob) for _ in range(60)]
    rooms = app[messenger.ROOMS]
    line = await bob.client.ws_connect("/ws", headers=bob.headers)
    async with asyncio.timeout(HEAR_SECONDS):
        while len(rooms.chat_ids()) < len(chats):
            await asyncio.sleep(0.01)
    turns, leave_room = Turns(len(chats)), messenger.Rooms._leave_room

    def count(*arguments: Any) -> None:
        turns.done += 1
        leave_room(*arguments)

    monkeypatch.setattr(messenger.Rooms, "_leave_room", count)
    for socket in rooms.sockets_of(None):
        rooms.close(websocket.GOING_AWAY, socket)
    assert rooms.sockets_of(None) == []
    assert rooms.sockets_of(bob.id) == []
    assert await turns.most() <= 10
    other = await bob.listens_live(chats[-1])
    assert rooms.chat_ids() == [chats[-1]]
    await alice.says(chats[-1], "still here")
    await other.hears_text("still here")
    await line.close()


@pytest.mark.parametrize(
    "how", [messenger.Rooms.close_room, lambda rooms, chat: rooms.start_over(f"chat {chat}")])
async def test_room_of_sockets_that_still_leave_serves_nobody_else(
    app: web.Application, alice: Person, bob: Person, monkeypatch: Any, how: Any
) -> None:
    """Where a room was given up, who joins gets a new one, though some are still leaving it."""
    monkeypatch.setattr(messenger, "FOLLOWED_PAGE", 1)
    chats = [await alice.founds(bob) for _ in range(20)]
    rooms = app[messenger.ROOMS]
    await bob.client.ws_connect("/ws", headers=bob.headers)
    async with asyncio.timeout(HEAR_SECONDS):
        while len(rooms.chat_ids()) < len(chats):
            await asyncio.sleep(0.01)
    room = rooms._rooms[chats[0]]
    with monkeypatch.context() as patch:
        patch.setattr(guard.Turns, "call", lambda *_: asyncio.sleep(0.5))
        how(rooms, chats[0])
        assert room.sockets
    for socket in list(room.sockets):
        rooms.leave(socket)
    other = await alice.listens_live(chats[0])
    assert rooms._rooms[chats[0]] is not room
    async with asyncio.timeout(HEAR_SECONDS):
        while room.sockets:
            await asyncio.sleep(0.01)
    await bob.says(chats[0], "news")
    await other.hears_text("news")


async def test_slow_handshake_closes_no_others_socket(
    app: web.Application, alice: Person, bob: Person, monkeypatch: Any
) -> None:
    """While participants of a chat change faster than a new socket can be told, it is the new one
    that is refused: who follows the chat already goes on."""
    chat = await alice.founds(bob)
    line = await alice.listens_live(chat)
    monkeypatch.setattr(messenger, "VERSION_SECONDS", 0.1)
    monkeypatch.setattr(messenger.Rooms, "_may_have_left", lambda *_: True)
    for path in (f"/ws/{chat}", "/ws"):
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await bob.client.ws_connect(path, headers=bob.headers)
        assert refused.value.status == 503
    await bob.says(chat, "still here")
    await line.hears_text("still here")

async def test_pages_that_sockets_missed_are_read_one_by_one_of_an_address(
    app: web.Application, alice: Person, bob: Person, carol: Person, monkeypatch: Any
) -> None:
    """However many sockets of an address catch up, whoever has them: one page at a time is read for
    them, so that others find a connection to the database."""
    chat = await alice.founds(bob, carol)
    for _ in range(3):
        await alice.says(chat, "missed")
    rows, reading, most = app[messenger.DATABASE].rows, 0, 0

    async def count(statement: str, *arguments: Any) -> Any:
        nonlocal reading, most
        if statement != messenger.SELECT_MISSED:
            return await rows(statement, *arguments)
        reading += 1
        most = max(most, reading)
        await asyncio.sleep(0.05)
        found = await rows(statement, *arguments)
        reading -= 1
        return found

    monkeypatch.setattr(app[messenger.DATABASE], "rows", count)
    lines = await asyncio.gather(*(
        person.listens(chat, "?after=0") for person in (alice, bob, carol) * 2))
    for line in lines:
        await line.hears("ready")
    assert most == 1


async def changes_after_each_look_up(
    app: web.Application, chat: int, monkeypatch: Any, change: Callable[[], Awaitable[Any]]
) -> None:
    """Let the participants of a chat change after each look-up of a new socket, and its room know
    that before the socket joins."""
    rooms, looks_up = app[messenger.ROOMS], messenger.Rooms._followed_by

    async def change_then(asked: Any) -> Any:
        found = await looks_up(rooms, asked)
        version = rooms._rooms[chat].version
        await change()
        async with asyncio.timeout(HEAR_SECONDS):
            while rooms._rooms[chat].version == version:
                await asyncio.sleep(0.01)
        return found

    monkeypatch.setattr(rooms._look_ups, "_look_up", change_then)


@pytest.mark.parametrize("path", ["/ws/{}", "/ws"])
async def test_socket_opens_while_others_come_and_go(
    app: web.Application, alice: Person, bob: Person, carol: Person, monkeypatch: Any, path: str
) -> None:
    """However often the participants of a chat change, a new socket of one who stays opens, and
    hears what is said."""
    monkeypatch.setattr(messenger, "VERSION_SECONDS", 0.2)
    chat = await alice.founds(bob, carol)
    line = await alice.listens_live(chat)
    turn = itertools.cycle([removes, adds])
    await changes_after_each_look_up(app, chat, monkeypatch, lambda: next(turn)(alice, chat, carol))
    other = Line(await bob.client.ws_connect(path.format(chat), headers=bob.headers))
    await alice.says(chat, "here")
    await other.hears_text("here")
    await other.close()
    await line.close()


@pytest.mark.parametrize("changes", [1, 2])
async def test_socket_does_not_join_a_room_that_began_after_its_user_left(
    app: web.Application, alice: Person, bob: Person, carol: Person, monkeypatch: Any, changes: int
) -> None:
    """A socket that looked its chat up before its user was removed does not join the room that
    another's later look-up made, though the news of the removal was lost."""
    chat = await alice.founds(bob, carol)
    rooms, looks_up, is_late = app[messenger.ROOMS], messenger.Rooms._followed_by, True

    async def let_another_be_first(asked: Any) -> Any:
        nonlocal is_late
        found = await looks_up(rooms, asked)
        if is_late:
            is_late = False
            with monkeypatch.context() as patch:
                patch.setattr(messenger.Rooms, "note_left", lambda *_: None)
                for number in range(1, changes):
                    await alice.expects(200, "PATCH", f"/chats/{chat}", {"name": str(number)})
                await removes(alice, chat, bob)
            [[(chat_id, rev, mark, version)]] = await looks_up(rooms, [(chat, carol.id, 2**63 - 1)])
            rooms._rooms[chat_id] = messenger.Room(chat_id, rev, mark, version, version)
        return found

    monkeypatch.setattr(rooms._look_ups, "_look_up", let_another_be_first)
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await bob.client.ws_connect(f"/ws/{chat}", headers=bob.headers)
    assert refused.value.status == 404


@pytest.mark.parametrize("path", ["/ws/{}", "/ws"])
async def test_socket_does_not_follow_a_chat_that_its_user_just_left(
    app: web.Application, alice: Person, bob: Person, monkeypatch: Any, path: str
) -> None:
    """Who is taken out of a chat that nobody has a socket in, after a new socket looked it up, does
    not follow it: they would hear what others read there."""
    chat = await alice.founds(bob)
    rooms, looks_up = app[messenger.ROOMS], messenger.Rooms._followed_by

    async def remove_then(asked: Any) -> Any:
        found = await looks_up(rooms, asked)
        if any(found):
            await removes(alice, chat, bob)
        return found

    monkeypatch.setattr(rooms._look_ups, "_look_up", remove_then)
    opening = bob.client.ws_connect(path.format(chat), headers=bob.headers)
    if path == "/ws":
        line = Line(await opening)
        assert (await line.hears("chats"))["data"]["chats"] == {}
        assert rooms.chat_ids() == []
        await line.close()
        return
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await opening
    assert refused.value.status == 404


async def test_socket_does_not_open_where_its_user_was_removed_meanwhile(
    app: web.Application, alice: Person, bob: Person, monkeypatch: Any
) -> None:
    """Who is taken out of a chat after the look-up of a new socket does not follow it."""
    chat = await alice.founds(bob)
    await alice.listens_live(chat)
    left = False

    async def once() -> None:
        nonlocal left
        await (alice.expects(200, "PATCH", f"/chats/{chat}", {"name": str(time.monotonic())})
               if left else removes(alice, chat, bob))
        left = True

    await changes_after_each_look_up(app, chat, monkeypatch, once)
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await bob.client.ws_connect(f"/ws/{chat}", headers=bob.headers)
    assert refused.value.status == 404


async def test_socket_opens_while_its_user_comes_into_one_chat_after_the_other(
    app: web.Application, alice: Person, bob: Person, monkeypatch: Any
) -> None:
    """However many chats a user comes into while a new socket joins those there are, it opens."""
    monkeypatch.setattr(messenger, "FOLLOWED_PAGE", 1)
    for _ in range(3):
        await alice.founds(bob)
    rooms, looks_up = app[messenger.ROOMS], messenger.Rooms._followed_by

    async def come_into_another(asked: Any) -> Any:
        await alice.founds(bob)
        return await looks_up(rooms, asked)

    monkeypatch.setattr(rooms._look_ups, "_look_up", come_into_another)
    async with asyncio.timeout(HEAR_SECONDS):
        line = await bob.client.ws_connect("/ws", headers=bob.headers)
    chats = {chat["id"] for chat in await bob.gets("/chats")}
    async with asyncio.timeout(HEAR_SECONDS):
        while set(rooms.chat_ids()) != chats:
            await asyncio.sleep(0.01)
    await line.close()


async def test_who_comes_into_very_many_chats_delays_no_other_address(
    app: web.Application, alice: Person, bob: Person, carol: Person, dave: Person, monkeypatch: Any
) -> None:
    """Chats that users of an address came into are read one at a time, and another address is shown
    its chat at once. Who came into more than may wait is closed after those, to come back."""
    settings = msgspec.structs.replace(app[messenger.SETTINGS], rate_limits="on")
    rooms = app[messenger.ROOMS]
    monkeypatch.setattr(rooms, "background", guard.Turns(2, of_each=settings.bound(1)))
    monkeypatch.setattr(rooms._coming, "_at_most", 5)
    lines = [await person.client.ws_connect("/ws", headers=person.headers)
             for person in (bob, dave, carol)]
    [of_carol] = [each for each in rooms.sockets_of(None) if each.asker.user_id == carol.id]
    of_carol.address = "another"
    reads, reading, going_on = messenger.read_chats, 0, asyncio.Event()

    async def read(database: Any, chat_ids: list[int], asker_id: int) -> Any:
        nonlocal reading
        if asker_id in (bob.id, dave.id):
            reading += 1
            await going_on.wait()
        return await reads(database, chat_ids, asker_id)

    monkeypatch.setattr(messenger, "read_chats", read)
    for _ in range(4):
        await alice.founds(bob, dave)
    chat = await alice.founds(carol)
    async with asyncio.timeout(HEAR_SECONDS):
        while (frame := await lines[-1].receive_json())["type"] != "chat":
            pass
    assert (frame["data"]["id"], reading, len(rooms.sockets_of(bob.id))) == (chat, 1, 1)
    for chat in range(1_000, 1_010):
        rooms.join_users(chat, [bob.id])
    assert len(rooms.sockets_of(bob.id)) == 1
    going_on.set()
    async with asyncio.timeout(HEAR_SECONDS):
        while len(rooms.sockets_of(bob.id)):
            await asyncio.sleep(0.01)
    assert len(rooms.sockets_of(dave.id)) == 1
    for line in lines:
        await line.close()


async def test_history_of_a_chat_that_everybody_left_is_not_rewritten(
    app: web.Application, alice: Person, bob: Person, sql: asyncpg.Connection, monkeypatch: Any
) -> None:
    """What upkeep sweeps away of a chat whose last member has just left closes nobody's sockets,
    though a room still knew its history."""
    chat, other = await alice.opens(bob), await bob.founds(alice)
    line = await alice.listens_live(chat)
    last = await bob.listens_live(other)
    await bob.says(other, "history")
    await alice.expects(204, "DELETE", f"/chats/{other}/participants/{alice.id}")
    await last.hears("chat_updated")  # the room has read that; what it reads next is that bob left
    rows, swept = app[messenger.DATABASE].rows, asyncio.Event()

    async def sweep_first(statement: str, *arguments: Any) -> Any:
        is_asked = statement == messenger.SELECT_ROOM and arguments[0] == other
        if is_asked and (await rows(messenger.SWEEP_EMPTY_CHAT, 1000))[0][0]:
            assert not await sql.fetch("select from messages where chat_id = $1", other)
            swept.set()
        return await rows(statement, *arguments)

    monkeypatch.setattr(app[messenger.DATABASE], "rows", sweep_first)
    await bob.expects(204, "DELETE", f"/chats/{other}/participants/{bob.id}")
    await asyncio.wait_for(swept.wait(), HEAR_SECONDS)
    await bob.says(chat, "still open")
    await line.hears_text("still open")


async def test_syncs_that_are_repeated_are_bounded(
    alice: Person, bob: Person, raw: Any, monkeypatch: Any
) -> None:
    """While a replay is under way only so much is kept of the syncs that repeat it; each that was
    accepted gets its answer, and then there is room again."""
    chat, let_go, replay_page = await alice.opens(bob), asyncio.Event(), messenger.replay_page

    async def hold(*args: Any) -> None:
        await let_go.wait()
        await replay_page(*args)

    monkeypatch.setattr(messenger, "OWED_BYTES_MAX", 50_000)
    monkeypatch.setattr(messenger, "replay_page", hold)
    line = await raw(alice, chat)
    await alice.says(chat, "hello")
    await line.hears("message")
    for round_ in range(2):
        let_go.clear()
        for number in range(20):
            ref = f"{round_} {number} {'字' * 3_000}"
            await line.sends(0x81, json.dumps({"type": "sync", "after": 0, "ref": ref}).encode())
        told = [await line.hears("replay", "error") for _ in range(20)]
        kinds = [each["type"] for each in told]
        assert kinds == ["replay"] * 6 + ["error"] * 14
        assert {each["data"]["type"] for each in told[6:]} == {"too-many-frames"}
        assert {each["data"]["retry_after"] for each in told[6:]} == {1}
        let_go.set()
        for each in told[:6]:
            assert (await line.hears("ready"))["ref"] == each["ref"]


async def test_rest_of_a_compressed_body_is_not_unfolded(client: TestClient[Any, Any]) -> None:
    """A body that unfolds to 200 MB costs no more than what is read of it."""
    packer, zeros = zlib.compressobj(), bytes(1_000_000)
    bomb = b"".join([*(packer.compress(zeros) for _ in range(200)), packer.flush()])
    calls = [
        ("POST", "/users/login", 413), ("GET", "/health/liveness", 200), ("GET", "/users/me", 401)]
    began = time.process_time()
    for method, path, status in calls * 2:
        headers = {"Content-Encoding": "deflate"}
        async with client.request(
            method, f"/api/v1{path}", data=bomb, headers=headers
        ) as answer:
            assert answer.status == status
            await answer.read()
    assert time.process_time() - began < 0.7  # of the processor; it took 2 s and more


@pytest.mark.parametrize("name", ["\u0130." * 2_500, "\u00e4" * 3_900, "a." * 4_000])
def test_long_origin_is_refused_unread(name: str) -> None:
    """However long the origin is that somebody sends, it is refused at once."""
    began = time.process_time()
    assert {guard.read_origin(f"https://{name}{number}") for number in range(20)} == {None}
    assert time.process_time() - began < 0.1  # of the processor; it took 0.5 s and more


def test_origin_in_other_letters_is_refused_unread() -> None:
    """An origin or a host that somebody sends in other letters than ASCII is not encoded."""
    names = ["".join(chr(0x4E00 + 61 * i + j) for i in range(250)) for j in range(20)]
    requests = [
        make_mocked_request("POST", "/", headers={"Origin": f"http://{name}", "Host": name})
        for name in names]
    began = time.process_time()
    assert all(guard.is_foreign(request, frozenset()) for request in requests)
    assert time.process_time() - began < 0.2  # of the processor; it took 1 s and more


def test_email_of_long_labels_is_refused_unread() -> None:
    """A domain that nobody can have is not encoded."""
    emails = [f"a@{chr(0x4E00 + j)}{'甲' * 200}.com" for j in range(40)]
    began = time.process_time()
    for email in emails:
        with pytest.raises(Problem):
            checked_email(email)
    assert time.process_time() - began < 0.1  # of the processor; it took 0.4 s and more


async def test_emails_in_other_letters_are_checked_one_at_a_time(
    client: TestClient[Any, Any], monkeypatch: Any
) -> None:
    """Of the registrations and logins of an address one has its domain encoded in a turn."""
    turns, check = Turns(20), messenger.checked_email

    def count(email: str) -> Any:
        turns.done += 1
        return check(email)

    monkeypatch.setattr(messenger, "checked_email", count)
    calls = []
    for number in range(20):
        given = {"email": f"a{number}@甲乙.example", "password": "short"}
        path = "login" if number % 2 else ""
        calls.append(client.post(
            f"/api/v1/users/{path}".rstrip("/"), json=given | ({} if path else {"username": "x"})))
    answers = asyncio.gather(*calls)
    assert await turns.most() == 1
    assert {answer.status for answer in await answers} <= {401, 422}


async def test_auth_frames_are_few(alice: Person, bob: Person, raw: Any, monkeypatch: Any) -> None:
    """To check tokens takes long: an `auth` counts for many frames, whether its token is right."""
    line = await raw(alice, await alice.opens(bob))
    checked, read = [], messenger.Sessions.read

    def count(*args: Any) -> Any:
        checked.append(args)
        return read(*args)

    monkeypatch.setattr(messenger.Sessions, "read", count)
    text = json.dumps({"type": "auth", "token": f"{alice.access}x"}).encode()
    for _ in range(100):
        await line.sends(0x81, text)
    kinds = [(await line.hears("error"))["data"]["type"] for _ in range(100)]
    assert set(kinds) == {"unauthorized", "too-many-frames"}
    assert len(checked) < 40


@pytest.mark.parametrize(("seconds", "most"), [(0, 1), (60, 20)], ids=["long", "short"])
async def test_texts_of_all_searches_are_looked_through_in_turns(
    alice: Person, bob: Person, monkeypatch: Any, seconds: float, most: int
) -> None:
    """Of searches at once, whoever asks them, one looks through a long text in a turn, or through
    as many short ones as it can in a moment."""
    monkeypatch.setattr(search, "MOMENT_SECONDS", seconds)
    chat = await alice.opens(bob)
    for _ in range(20):
        await alice.says(chat, "甲乙。乙丙")
    turns, holds = Turns(80), search.holds_runs

    def count(*args: Any) -> Any:
        turns.done += 1
        return holds(*args)

    monkeypatch.setattr(search, "holds_runs", count)
    found = asyncio.gather(*(
        person.gets(f"/chats/{chat}/messages?q=甲乙丙") for person in (alice, bob) * 2))
    assert await turns.most() == most
    assert await found == [[]] * 4


async def test_replays_are_written_in_small_pieces(
    alice: Person, bob: Person, raw: Any, monkeypatch: Any
) -> None:
    """A socket that does not read holds no more than a small piece of its replay."""
    chat = await alice.opens(bob)
    for _ in range(40):
        await alice.says(chat, "🙂" * 4096)
    sizes, write = [], messenger.Socket.write

    def measure(socket: Any, frames: bytes) -> None:
        sizes.append(len(frames))
        write(socket, frames)

    line = await raw(alice, chat)
    monkeypatch.setattr(messenger.Socket, "write", measure)
    await line.sends(0x81, b'{"type":"sync","after":0,"ref":"all"}')
    while (await line.hears("ready")).get("ref") != "all":
        pass
    assert sum(sizes) > 40 * 16_384
    assert max(sizes) < messenger.REPLAY_BYTES + 20_000


async def test_chats_that_users_come_into_are_read_a_few_at_a_time(
    alice: Person, bob: Person, carol: Person, monkeypatch: Any
) -> None:
    """Of chats that somebody makes, each is read once for all sockets of a user who came into it,
    and few at once: the calls of others come in between."""
    chats, lines = 6, [await follows(each) for each in (bob, carol) for _ in range(5)]
    under_way, at_once, read, read_chats = 0, [0], [], messenger.read_chats

    async def count(database: Any, chat_ids: list[int], asker_id: int) -> Any:
        nonlocal under_way
        if asker_id == alice.id:
            return await read_chats(database, chat_ids, asker_id)
        read.extend((chat_id, asker_id) for chat_id in chat_ids)
        under_way += 1
        at_once.append(under_way)
        await asyncio.sleep(0.05)
        try:
            return await read_chats(database, chat_ids, asker_id)
        finally:
            under_way -= 1

    monkeypatch.setattr(messenger, "read_chats", count)
    made = await asyncio.gather(*[alice.founds(bob, carol) for _ in range(chats)])
    for line in lines:
        heard = [(await line.hears("chat"))["data"]["id"] for _ in made]
        assert sorted(heard) == sorted(made)
    assert len(read) == 2 * chats
    assert max(at_once) <= messenger.BACKGROUND_READS


@pytest.mark.parametrize("ref", ["x" * 40_000, 10**4_000], ids=["text", "number"])
async def test_ref_of_a_sync_does_not_come_back_for_very_many_chats(
    alice: Person, ref: str | int
) -> None:
    """A long `ref` is refused once where it would come back for each of many chats; for one chat,
    and a usual one for very many, it comes back."""
    line = await follows(alice)
    await line.sends(type="sync", chats={str(10**9 + each): 0 for each in range(100)}, ref=ref)
    await line.sends(type="sync", chats={str(10**9): 0}, ref=ref)
    refused, foreign = [await line.hears("error") for _ in range(2)]
    assert refused["data"]["type"] == "invalid-input"
    assert [each["loc"] for each in refused["data"]["errors"]] == ["$.ref"]
    assert (foreign["data"]["type"], foreign["ref"]) == ("chat-not-found", ref)
    many = range(10**9, 10**9 + 1_000)
    await line.sends(type="sync", chats={str(each): 0 for each in many}, ref="x" * 36)
    assert {(await line.hears("error"))["chat_id"] for _ in many} == set(many)


async def test_refusals_of_a_sync_are_no_garbage(alice: Person) -> None:
    """What a sync refuses is gone with it, and waits for no collection, which stops everything."""
    line, many = await follows(alice), range(10**9, 10**9 + 100)
    gc.collect()
    gc.disable()
    try:
        await line.sends(type="sync", chats={str(each): 0 for each in many})
        await line.sends(type="ping")
        await line.hears("pong")
        left = [each for each in gc.get_objects() if isinstance(each, messenger.ChatNotFound)]
    finally:
        gc.enable()
    assert len(left) <= 1


async def test_chats_of_a_sync_are_refused_in_turn_with_others(
    alice: Person, monkeypatch: Any
) -> None:
    """Of the chats of a sync that are not the user's, a few are refused before anybody else has a
    turn."""
    line = await follows(alice)
    turns, refuse_frame = Turns(1_000), messenger.refuse_frame

    def count(*args: Any) -> None:
        turns.done += 1
        refuse_frame(*args)

    monkeypatch.setattr(messenger, "refuse_frame", count)
    await line.sends(type="sync", chats={str(10**9 + each): 0 for each in range(1_000)})
    assert await turns.most() <= messenger.CHATS_PIECE


@pytest.mark.parametrize("text", [
    '{"type":"nothing"}', '{"type":"message","text":5}', '{"type":"sync","chats":{"x":1}}',
    '{"type":"read","message_id":"x"}', "[" * 60, '{"type":"typing","x":1}',
])
def test_frame_of_another_shape_is_refused_as_fast_as_any(text: str) -> None:
    """What is wrong with a frame is found in no time, whatever it is."""
    began = time.process_time()
    for _ in range(2_000):
        with pytest.raises(Problem):
            endpoints.decode_json(messenger.CLIENT_FRAME, text)
    assert time.process_time() - began < 0.6  # of the processor; an unknown type took 1.1 s


async def test_frames_after_the_close_are_taken_in_turn_with_others(
    app: web.Application, alice: Person, bob: Person, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket that was told to close and goes on sending lets others have their turns, too."""
    app[messenger.RATES][messenger.TooManyFrames] = Rate(1, 1)
    app[messenger.RATES][messenger.FLOODING] = Rate(1, 1)
    line = await raw(alice, await alice.opens(bob))
    turns, receive = Turns(4_000), web.WebSocketResponse.receive

    async def count(self: web.WebSocketResponse, timeout: float | None = None) -> Any:
        message = await receive(self, timeout)
        turns.done += 1
        return message

    monkeypatch.setattr(web.WebSocketResponse, "receive", count)
    await line.gives(bytes((PING, 0x80, 0, 0, 0, 0)) * 5_000)
    assert await turns.most() <= messenger.FRAMES_AT_ONCE


async def test_token_under_another_subprotocol_is_not_logged(
    data_folder: Path, people_of: Any
) -> None:
    """A token that was offered under a subprotocol which the server does not know is in no log."""
    server = await Server(data_folder.parent, ACCESS_LOG="on").starts()
    alice = await people_of(server, "alice")
    for protocols in (
        ("messenger.v2", alice.access), (alice.access,), (alice.access, "messenger.v1"),
    ):
        for headers in ({}, alice.headers):
            with contextlib.suppress(aiohttp.WSServerHandshakeError):
                options = {"protocols": protocols, "headers": headers}
                await (await alice.client.ws_connect("/ws", **options)).close()
    await server.stops()
    assert alice.access not in server.log()
    assert "GET /ws 401" in server.log()


def test_library_that_logs_is_named_and_not_quoted(
    capfd: pytest.CaptureFixture[str]
) -> None:
    """Of what a library logs the log says only where it came from, whatever it holds."""
    code = (
        "import logging; from plumbing import process; process.start_logs(False, False);"
        "logging.getLogger('some.library').error('a %s', 'secret');"
        "logging.getLogger('aiohttp.websocket').warning('a secret');"
        "logging.getLogger('messenger').warning('of %s', 'ours')")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    _, written = capfd.readouterr()
    assert "secret" not in written
    assert re.search(r" ERROR some\.library:\d+\n", written)
    assert written.count("\n") == 2
    assert " WARNING of ours\n" in written


SMUGGLED = b"GET /api/v1/health/liveness HTTP/1.1\r\nHost: a\r\nX-Request-Id: smuggled\r\n\r\n"


@pytest.mark.parametrize("head", [
    "CONNECT /x HTTP/1.1", "CONNECT a:80 HTTP/1.1", "CONNECT /api/v1/users HTTP/1.1",
    "GET /x HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: h2c",
    "POST /api/v1/users HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket",
])
async def test_body_of_a_request_is_never_another_request(server: TestServer, head: str) -> None:
    """What a request before another protocol carries is not answered as a request: behind a proxy
    that answer would go to somebody else. The connection ends with the one answer."""
    text = f"{head}\r\nHost: a\r\nContent-Length: {len(SMUGGLED)}\r\n\r\n".encode() + SMUGGLED
    raw = await RawConnection.opens(server.port, text)
    heard = await raw.hears_all()
    raw.close()
    assert heard.count(b"HTTP/1.1 ") == 1
    assert b"smuggled" not in heard
    assert b"\r\nConnection: close\r\n" in heard


@pytest.mark.parametrize(
    ("path", "name"), [("/docs", "Expect"), *(("/ws", name) for name in HANDSHAKE)])
async def test_header_beyond_ascii_is_a_refusal(
    server: TestServer, alice: Person, caplog: pytest.LogCaptureFixture, path: str, name: str
) -> None:
    """A header that no client writes is a 4xx, and nothing in the log."""
    headers = {"Host": "a", **HANDSHAKE, "Authorization": f"Bearer {alice.access}", name: "\xff"}
    lines = "".join(f"{each}: {value}\r\n" for each, value in headers.items())
    raw = await RawConnection.opens(
        server.port, f"GET {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1"))
    status, *_ = await raw.hears()
    raw.close()
    assert 400 <= status < 500
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def well_read(alice: Person, bob: Person, sql: asyncpg.Connection) -> int:
    """Make a group of 100 in which everybody has read each of 100 messages by itself."""
    chat = await alice.founds(bob)
    ids = await crowd(sql, 98)
    await sql.execute(
        "with joined as (insert into participants (chat_id, user_id, role)"
        " select $1, id, 'member' from unnest($2::bigint[]) id)"
        " update chats set participant_count = 100 where id = $1", chat, ids)
    for number in range(100):
        await alice.says(chat, str(number))
    await sql.execute(
        "with passed as (insert into reads (chat_id, user_id, from_seq, seq, read_at)"
        " select $1, p.user_id, seq - 1, seq, now() from participants p, generate_series(1, 99) seq"
        " where p.chat_id = $1)"
        " update participants set last_read_seq = 100, last_read_at = now() where chat_id = $1",
        chat)
    return chat


async def test_readers_of_a_page_are_named_in_turn_with_others(
    alice: Person, bob: Person, sql: asyncpg.Connection, monkeypatch: Any
) -> None:
    """Ten thousand readers of a page are not all named before anybody else has a turn."""
    chat = await well_read(alice, bob, sql)
    turns, reader = Turns(9_900), messenger.Reader

    def count(*args: Any) -> Any:
        turns.done += 1
        return reader(*args)

    monkeypatch.setattr(messenger, "Reader", count)
    page = asyncio.create_task(bob.gets(f"/chats/{chat}/messages?limit=100"))
    assert await turns.most() <= 100 * messenger.READERS_AT_ONCE
    assert [len(each["read_by"]) for each in await page] == [99] * 100


async def test_readers_that_are_not_sent_are_not_named(
    alice: Person, bob: Person, sql: asyncpg.Connection, monkeypatch: Any
) -> None:
    """A replay names the readers of what it writes, and few others."""
    chat = await well_read(alice, bob, sql)
    named, reader = 0, messenger.Reader

    def count(*args: Any) -> Any:
        nonlocal named
        named += 1
        return reader(*args)

    line = await bob.listens_live(chat)
    monkeypatch.setattr(messenger, "Reader", count)
    await line.sends(type="sync", after=0, ref="all")
    sent = 0
    while (frame := await line.hears("message", "ready"))["type"] == "message":
        sent += len(frame["data"]["read_by"])
    assert sent == 99 * 100
    assert named < 2 * sent


async def test_deliveries_of_an_address_are_bounded(
    app: web.Application, alice: Person, bob: Person, carol: Person, monkeypatch: Any
) -> None:
    """What is written to sockets counts against the address of whoever had it written: beyond the
    limit each kind of news is refused, until there is room again; chats without sockets are free.
    """
    chat, quiet = await alice.founds(bob, carol), await alice.founds(bob)
    lines = [await bob.listens_live(chat) for _ in range(4)]
    sent = await alice.says(chat, "first")
    monkeypatch.setattr(messenger, "FEW_DELIVERIES", 3)
    app[messenger.RATES][messenger.DELIVERIES] = Rate(8, 1)
    speaker = await alice.listens_live(chat)
    await alice.says(chat, "1")
    while (answer := await alice.asks(
            "POST", f"/chats/{chat}/messages", {"text": "2"})).status == 201:
        pass
    refused = await answer.json()
    assert (answer.status, refused["type"]) == (429, "too-many-messages")
    assert 1 <= int(answer.headers["Retry-After"]) <= 10
    path = f"/chats/{chat}/messages/{sent['id']}"
    assert (await alice.asks("PATCH", path, {"text": "x"})).status == 429
    assert (await alice.asks("DELETE", path)).status == 429
    assert (await alice.asks("PATCH", f"/chats/{chat}", {"name": "x"})).status == 429
    assert (await bob.asks("POST", f"/chats/{chat}/read", {"message_id": sent["id"]})).status == 429
    for frame in ({"type": "message", "text": "3"}, {"type": "typing"},
                  {"type": "read", "message_id": sent["id"]}):
        await speaker.sends(**frame, ref="r")
        assert (await speaker.hears("ack", "error"))["data"]["status"] == 429
    await alice.says(quiet, "free")
    assert len(lines) == 4


async def test_deliveries_of_long_texts_and_to_who_catches_up_count(
    app: web.Application, alice: Person, bob: Person
) -> None:
    """A long text counts several times, and so does each socket that will be given it later."""
    chat, rooms = await alice.founds(bob), app[messenger.ROOMS]
    lines = [await bob.listens_live(chat) for _ in range(5)]
    assert rooms.count_deliveries(chat, "a" * 999) == 5
    assert rooms.count_deliveries(chat, "a" * 4096) == 5 * 5
    socket, *_ = rooms.sockets_of(None)
    socket.rooms[chat].live.discard(socket)
    assert rooms.count_deliveries(chat) == 5
    assert rooms.count_deliveries(chat + 1) == 0
    app[messenger.RATES][messenger.DELIVERIES] = Rate(30, 0.01)
    await alice.says(chat, "a" * 4096)
    await alice.says(chat, "a" * 4096)  # which goes beyond it
    await alice.says(chat, "a" * 4096, 429)
    await lines[0].says("a" * 4096, ref="r")
    assert (await lines[0].hears("ack", "error"))["data"]["status"] == 429


async def test_stranger_does_not_learn_who_follows_a_chat(
    app: web.Application, alice: Person, bob: Person, carol: Person, monkeypatch: Any
) -> None:
    """What somebody tries in a chat that is not theirs does not count by its sockets, and is
    answered as if there were no chat, however often."""
    chat = await alice.founds(bob)
    lines = [await bob.listens_live(chat) for _ in range(4)]
    monkeypatch.setattr(messenger, "FEW_DELIVERIES", 3)
    app[messenger.RATES][messenger.DELIVERIES] = Rate(8, 1)
    every = await follows(carol)
    for number in range(5):
        await carol.says(chat, "x", 404)
        assert (await carol.asks("PATCH", f"/chats/{chat}", {"name": "x"})).status == 404
        await every.says("x", chat_id=chat, ref=number)
        assert (await every.hears("error"))["data"]["status"] == 404
    await alice.says(chat, "y")
    assert len(lines) == 4


async def test_heavy_answers_of_an_address_that_are_not_read_are_bounded(
    app: web.Application, client: TestClient[Any, Any], alice: Person, bob: Person,
    monkeypatch: Any
) -> None:
    """So many heavy calls of an address are under way at once, whoever makes them."""
    chat = await alice.opens(bob)
    monkeypatch.setattr(endpoints, "SLOT_SECONDS", 0.2)
    slots = slots_of(app)
    address = "127.0.0.1"
    held = [await slots.heavy_of_address.take(address)
            for _ in range(endpoints.HEAVY_OF_ADDRESS_MAX)]
    for person in (alice, bob):
        assert (await person.asks("GET", f"/chats/{chat}/messages")).status == 429
        assert (await person.asks("GET", "/users/me")).status == 200
    held.pop()()
    assert (await bob.asks("GET", f"/chats/{chat}/messages")).status == 200


@pytest.mark.real_deadlines
async def test_heavy_call_waits_for_its_turn_no_longer_than_for_the_database(
    app: web.Application, alice: Person, bob: Person, monkeypatch: Any
) -> None:
    """While the database hangs, the heavy calls of an address are refused in time, also those that
    wait for the one that waits for the database."""
    chat = await alice.opens(bob)
    rows = app[messenger.DATABASE].rows

    async def hang(statement: str, *arguments: Any) -> Any:
        if statement == messenger.SELECT_MESSAGES_BEFORE:
            await asyncio.sleep(1)
            raise messenger.Unavailable(database.ABSENT)
        return await rows(statement, *arguments)

    monkeypatch.setattr(app[messenger.DATABASE], "rows", hang)
    began = time.monotonic()
    answers = await asyncio.gather(*(
        person.asks("GET", f"/chats/{chat}/messages") for person in (alice, bob) * 2))
    assert [answer.status for answer in answers] == [503] * 4
    assert time.monotonic() - began < 3


async def test_search_that_is_refused_refuses_no_other_call(
    app: web.Application, alice: Person, bob: Person, monkeypatch: Any
) -> None:
    """Where a search cannot be answered, the heavy calls of the same address that wait behind it
    are: it is not the database that is away."""
    chat = await alice.opens(bob)
    searching = asyncio.Event()

    async def fail(*_: Any) -> None:
        searching.set()
        await asyncio.sleep(0.3)
        raise messenger.Unavailable("The search takes too long.")

    monkeypatch.setattr(app[messenger.INDEX], "index", fail)
    search_call = asyncio.create_task(alice.asks("GET", f"/chats/{chat}/messages?q=x"))
    await searching.wait()
    assert (await bob.asks("GET", "/chats")).status == 200
    assert (await search_call).status == 503


async def test_search_that_has_much_to_index_ends_soon(
    alice: Person, bob: Person, monkeypatch: Any
) -> None:
    """A search of a chat in which much is to be indexed is answered after a moment, also from texts
    that are not, as far as it came, and each time more is indexed: whoever floods a chat with long
    texts shuts nobody out of its searches."""
    chat = await alice.opens(bob)
    for number in range(40):
        await alice.says(chat, f"word{number}")
    words = search.words_of

    def slow(text: str) -> set[str]:
        time.sleep(0.01)
        return words(text)

    monkeypatch.setattr(search, "words_of", slow)
    monkeypatch.setattr(search, "INDEX_SECONDS", 0.1)
    for word in ("word39", "word0"):
        found = await pages(bob, f"/chats/{chat}/messages?q={word}")
        assert [each["text"] for one in found for each in one] == [word]
        assert len(found) < 20
    assert not await alice.gets(f"/chats/{chat}/messages?q=word")


async def test_users_who_delete_their_accounts_leave_one_after_the_other(
    app: web.Application, alice: Person, bob: Person, carol: Person, monkeypatch: Any
) -> None:
    """Of many who delete their accounts at once, one leaves a chat at a time, in turns."""
    chats = [await alice.founds(bob, carol) for _ in range(5)]
    row, order, at_once = app[messenger.DATABASE].row, [], 0

    async def count(statement: str, *arguments: Any) -> Any:
        nonlocal at_once
        if statement != messenger.LEAVE_NEXT_CHAT:
            return await row(statement, *arguments)
        at_once += 1
        assert at_once == 1
        async with asyncio.timeout(HEAR_SECONDS):
            while not order and not app[messenger.TURNS]._of["leaving"]._waiting:
                await asyncio.sleep(0.01)  # until the other waits
        order.append(arguments[0])
        left = await row(statement, *arguments)
        at_once -= 1
        return left

    monkeypatch.setattr(app[messenger.DATABASE], "row", count)
    await asyncio.gather(*(
        person.expects(204, "DELETE", f"/users/{person.id}") for person in (bob, carol)))
    assert sorted(order[:2]) == sorted([bob.id, carol.id])
    assert len(order) == 2 * (len(chats) + 1)


async def test_answer_that_was_taken_takes_no_memory(
    server: TestServer, alice: Person, bob: Person
) -> None:
    """An idle connection does not hold the last answer: a page may have megabytes."""
    chat = await alice.opens(bob)
    for _ in range(20):
        await alice.says(chat, "🙂" * 4096)
    head = f"GET /api/v1/chats/{chat}/messages HTTP/1.1\r\nHost: a\r\n"
    raw = await RawConnection.opens(
        server.port, f"{head}Authorization: Bearer {bob.access}\r\n\r\n".encode())
    status, _, body = await raw.hears()
    assert (status, len(body) > 300_000) == (200, True)
    await alice.gets("/users/me")  # by now the server waits for the next request
    held = [each for each in gc.get_objects() if isinstance(each, web.Response) and each.body]
    assert max((len(each.body) for each in held), default=0) < 10_000
    raw.close()


async def test_frames_of_an_address_are_taken_at_a_pace(
    alice: Person, bob: Person, raw: Any, monkeypatch: Any
) -> None:
    """However many sockets an address has, their frames are taken one socket after the other, with
    a pause; and not very many are read ahead."""
    chat = await alice.opens(bob)
    lines = [await raw(alice, chat) for _ in range(4)]
    taken, began = 0, time.monotonic()

    def count(*_: Any) -> None:
        nonlocal taken
        taken += 1

    monkeypatch.setattr(messenger, "take_control", count)
    monkeypatch.setattr(messenger, "FRAMES_PAUSE_SECONDS", 0.004)
    await asyncio.gather(*(line.gives(bytes((PING, 0x80, 0, 0, 0, 0)) * 160) for line in lines))
    async with asyncio.timeout(HEAR_SECONDS):
        while taken < 640:
            await asyncio.sleep(0.01)
    assert time.monotonic() - began >= 4 * 9 * 0.004


async def test_call_of_who_has_gone_counts_until_it_ends(monkeypatch: Any) -> None:
    """A connection whose client has gone counts for its address as long as its call is worked on:
    it holds as much as one that is open."""
    left, working, end = [], asyncio.Event(), asyncio.Event()
    lost = guard.PromptConnection.connection_lost

    class Leaving(Guest):
        def leave(self) -> None:
            left.append(self)

    def note(connection: Any, exc: BaseException | None) -> None:
        connection.guest = Leaving()
        lost(connection, exc)

    async def work(_request: web.Request) -> web.Response:
        working.set()
        await end.wait()
        return web.Response()

    monkeypatch.setattr(guard.PromptConnection, "connection_lost", note)
    app = web.Application()
    app.router.add_get("/", work)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    raw = await RawConnection.opens(
        runner.addresses[0][1], b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    await working.wait()
    raw.writer.transport.abort()
    await asyncio.sleep(0.1)
    assert left == []
    end.set()
    async with asyncio.timeout(HEAR_SECONDS):
        while not left:
            await asyncio.sleep(0.01)
    await runner.cleanup()
