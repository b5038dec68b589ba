"""The websocket by itself: frames as RFC 6455 has them, pings, closing, and slow readers."""

import asyncio
import json
import os
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

import messenger
from plumbing import websocket
from support.frames import drains
from support.people import HEAR_SECONDS, Person
from support.raw import CLOSE, LONG, PING, PONG, TEXT, RawLine, stalls


def message(**fields: Any) -> str:
    """Write a message frame that is right but for some fields."""
    return json.dumps({"type": "message", "text": "hello", "ref": "r"} | fields)


# ---- Frames


async def test_invalid_utf8_closes_with_1007(alice: Person, bob: Person, raw: Any) -> None:
    """Text that is not UTF-8 closes the socket."""
    chat = await alice.opens(bob)
    line = await raw(alice, chat)
    await line.sends(TEXT, b'{"type":"message","text":"\xff"}')
    assert (await line.hears("ready"))["type"] == "ready"
    assert await line.takes() == (CLOSE, (1007).to_bytes(2, "big"))
    assert await alice.history(chat) == []


async def test_nothing_follows_a_close_frame(alice: Person, bob: Person, raw: Any) -> None:
    """After its close frame the server sends nothing more (RFC 6455, section 5.5.1)."""
    chat = await alice.opens(bob)
    line = await raw(alice, chat)
    await line.hears("ready")
    await line.sends(TEXT, b"\xff")
    assert (await line.takes())[0] == CLOSE
    await bob.says(chat, "too late")
    with pytest.raises((EOFError, ConnectionError)):
        await line.takes()


async def test_frame_of_64_kib_is_read_and_one_byte_more_closes_with_1009(
    alice: Person, bob: Person, raw: Any
) -> None:
    """A frame may have 65,536 bytes; one byte more closes the socket."""
    chat = await alice.opens(bob)
    line = await raw(alice, chat)
    await line.hears("ready")
    frame = message(ref=1).encode().ljust(65_536)
    await line.sends(TEXT, frame)
    assert (await line.hears("ack", "error"))["type"] == "ack"
    await line.sends(TEXT, frame + b" ")
    while (taken := await line.takes())[0] != CLOSE:
        pass
    assert taken[1][:2] == (1009).to_bytes(2, "big")
    assert len(await alice.history(chat)) == 1


async def test_message_in_fragments_over_64_kib_closes_with_1009(
    alice: Person, bob: Person, raw: Any
) -> None:
    """A message in fragments may be no longer than a whole one; a small one in fragments is
    read."""
    chat = await alice.opens(bob)
    line = await raw(alice, chat)
    frame = message(ref=1).encode().ljust(40_000)
    await line.sends(0x01, frame[:20])
    await line.sends(0x80, frame[20:])
    assert (await line.hears("ack", "error"))["type"] == "ack"
    await line.sends(0x01, frame)
    await line.sends(0x80, frame)
    while (taken := await line.takes())[0] != CLOSE:
        pass
    assert taken[1][:2] == (1009).to_bytes(2, "big")


# ---- Pings and closing


async def test_ping_is_answered_with_its_payload(alice: Person, bob: Person, raw: Any) -> None:
    """A client's ping gets a pong with the same payload, and a pong that nobody asked for gets
    nothing."""
    chat = await alice.opens(bob)
    line = await raw(alice, chat)
    await line.hears("ready")
    for payload in (b"", b"\x00\xff are you there?", os.urandom(125)):
        await line.sends(PING, payload)
        assert await line.takes() == (PONG, payload)
    await line.sends(PONG, b"unasked")
    await line.sends(TEXT, message(ref=1).encode())
    assert (await line.hears("ack"))["ref"] == 1


async def test_silent_peer_is_pinged_and_dropped_if_it_does_not_answer(
    alice: Person, bob: Person, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server pings a silent peer; one that answers stays, and one that does not is dropped."""
    monkeypatch.setattr(websocket, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(websocket, "PONG_SECONDS", 1)
    chat = await alice.opens(bob)
    answering, dead = await alice.listens_live(chat), await raw(bob, chat)
    reading = asyncio.create_task(answering.hears_text("still here"))
    await dead.hears("ready")
    assert await dead.takes() == (PING, b"")
    with pytest.raises((EOFError, ConnectionError)):
        await dead.hears("message")
    await bob.says(chat, "still here")
    await reading


async def test_close_is_answered_with_close(alice: Person, bob: Person, raw: Any) -> None:
    """A close frame is answered with a close frame, and then the stream ends."""
    chat = await alice.opens(bob)
    line = await raw(alice, chat)
    await line.hears("ready")
    await line.sends(CLOSE, (1000).to_bytes(2, "big"))
    assert (await line.takes())[0] == CLOSE
    with pytest.raises(EOFError):
        await line.takes()


async def test_what_was_sent_before_hanging_up_is_posted(
    alice: Person, bob: Person, raw: Any
) -> None:
    """Messages that came before the connection was closed are posted, answered or not."""
    chat = await alice.opens(bob)
    other, line = await bob.listens_live(chat), await raw(alice, chat)
    for number in range(50):
        await line.sends(TEXT, json.dumps({"type": "message", "text": f"{number}"}).encode())
    await line.sends(CLOSE, (1000).to_bytes(2, "big"))
    heard = await drains(other, 50)
    assert [frame["data"]["text"] for frame in heard] == [str(number) for number in range(50)]


# ---- Slow readers


async def test_stalled_reader_delays_nobody_and_catches_up(
    server: TestServer, raw: Any, alice: Person, bob: Person
) -> None:
    """While one socket is not read the others hear everything and its buffer is bounded; later it
    catches up."""
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
    server: TestServer, raw: Any, alice: Person, bob: Person,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A socket that takes no byte for STALLED_SECONDS is dropped; one that takes some is kept."""
    monkeypatch.setattr(websocket, "STALLED_SECONDS", 2)
    monkeypatch.setattr(websocket, "CLOSE_SECONDS", 0.5)
    chat = await alice.opens(bob)
    _stalled, transport = await stalls(server, raw, bob, chat)
    slow, slow_transport = await stalls(server, raw, bob, chat)
    posting = asyncio.gather(*[alice.says(chat, LONG) for _ in range(200)])
    async with asyncio.timeout(HEAR_SECONDS):
        while not transport.is_closing():
            assert (await slow.hears("message"))["data"]["text"] == LONG
            await asyncio.sleep(0.1)
    assert not slow_transport.is_closing()
    await posting
    await alice.says(chat, "after")
    while (await slow.hears("message"))["data"]["text"] != "after":
        pass


async def test_who_waits_for_a_slow_reader_learns_that_it_is_gone(
    server: TestServer, app: web.Application, raw: Any, alice: Person, bob: Person
) -> None:
    """Waiting until a peer has taken what was written ends by an error once its connection is lost:
    else whoever goes on would write to nobody, and wait again for nothing."""
    chat = await alice.opens(bob)
    _stalled, transport = await stalls(server, raw, bob, chat)
    [socket] = app[messenger.ROOMS]._of_users[bob.id]
    while socket.unsent() <= messenger.BEHIND_BYTES:
        await alice.says(chat, LONG)
    waiting = asyncio.create_task(socket.drain())
    await asyncio.sleep(0)
    transport.abort()
    for _ in range(2):
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(waiting, HEAR_SECONDS)
        waiting = asyncio.create_task(socket.drain())


async def test_what_an_address_does_not_read_is_bounded(
    server: TestServer, raw: Any, alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the sockets of an address leave too much unread together, some of them are cut; those
    that read go on."""
    chat = await alice.opens(bob)
    monkeypatch.setattr(websocket, "UNREAD_MAX", 500_000)
    transports = [(await stalls(server, raw, bob, chat))[1] for _ in range(3)]
    line = await bob.listens_live(chat)
    await asyncio.gather(*[alice.says(chat, LONG) for _ in range(200)])
    async with asyncio.timeout(HEAR_SECONDS):
        while not any(transport.is_closing() for transport in transports):
            await asyncio.sleep(0.1)
    await asyncio.sleep(1.5)  # another check
    kept = [transport for transport in transports if not transport.is_closing()]
    assert 1 <= len(kept) <= 2
    await alice.says(chat, "after")
    await line.hears_text("after")


async def test_reads_do_not_pile_up_for_a_stalled_reader(
    server: TestServer, app: web.Application, raw: Any, alice: Person, bob: Person
) -> None:
    """Frames without a number do not pile up for a socket that is not read; a `ready` says that
    some were missed."""
    chat = await alice.opens(bob)
    sent = await alice.says(chat, "read me")
    stalled, transport = await stalls(server, raw, bob, chat)
    read = await bob.reads(chat, sent)
    hint = messenger.FrameHint(chat, json.dumps({"type": "read", "data": read}))
    for _ in range(20_000):
        app[messenger.ROOMS].broadcast(hint)
    assert transport.get_write_buffer_size() < 2 * messenger.BEHIND_BYTES
    await alice.says(chat, "the end")
    heard = []
    while heard[-2:] not in (["message", "ready"], ["ready", "message"]):
        heard.append((await stalled.hears())["type"])


async def test_little_waits_for_a_handshake_that_is_slow(
    app: web.Application, alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is posted while a handshake is not answered yet does not pile up in memory; the socket
    hears all of it, in order, once it is, and of a group that its user came into."""
    chat = await alice.opens(bob)
    answered, opening = asyncio.Event(), []
    open_now = messenger.Socket.open

    async def wait(socket: messenger.Socket, request: web.Request) -> None:
        opening.append(socket)
        await answered.wait()
        await open_now(socket, request)

    monkeypatch.setattr(messenger.Socket, "open", wait)
    coming = asyncio.create_task(bob.client.ws_connect("/ws", headers=bob.headers))
    async with asyncio.timeout(HEAR_SECONDS):
        while not opening:
            await asyncio.sleep(0.01)
    posted = [(await alice.says(chat, LONG))["seq"] for _ in range(200)]
    assert messenger.BEHIND_BYTES < opening[0].unsent() < messenger.BEHIND_BYTES + 20_000
    group = await alice.founds(bob)
    async with asyncio.timeout(HEAR_SECONDS):
        while opening[0] not in app[messenger.ROOMS]._late._waiting:
            await asyncio.sleep(0.01)
    answered.set()
    line, numbers, shown = await coming, [], []
    async with asyncio.timeout(HEAR_SECONDS):
        while len(numbers) < len(posted) or not shown:
            frame = await line.receive_json()
            if frame["type"] == "message":
                numbers.append(frame["data"]["seq"])
            elif frame["type"] == "chat":
                shown.append(frame["data"]["id"])
    assert (numbers, shown) == (posted, [group])


async def test_catch_up_ends_with_a_handshake_that_is_refused(
    app: web.Application, alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket that fell behind before its handshake was refused is forgotten."""
    chat = await alice.opens(bob)
    refused, opening = asyncio.Event(), []

    async def wait(socket: messenger.Socket, _request: web.Request) -> None:
        opening.append(socket)
        await refused.wait()
        raise messenger.TooManySockets

    monkeypatch.setattr(messenger.Socket, "open", wait)
    coming = asyncio.create_task(bob.client.ws_connect("/ws", headers=bob.headers))
    async with asyncio.timeout(HEAR_SECONDS):
        while not opening:
            await asyncio.sleep(0.01)
        for _ in range(100):
            await alice.says(chat, LONG)
        assert opening[0].catching_up is not None
        refused.set()
        with pytest.raises(aiohttp.WSServerHandshakeError):
            await coming
        while opening[0].catching_up is not None:
            await asyncio.sleep(0.01)
    assert app[messenger.ROOMS].sockets_of(None) == []


async def test_new_chats_do_not_pile_up_for_a_stalled_reader(
    server: TestServer, app: web.Application, alice: Person, bob: Person,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A socket that does not read is shown a chat that its user came into once it has read what
    waits for it; one that reads is shown it at once."""
    monkeypatch.setattr(messenger, "BEHIND_BYTES", 20_000)
    chat, rooms = await alice.opens(bob), app[messenger.ROOMS]
    stalled = await RawLine().opens(server.port or 0, "/ws", bob.access, receive_bytes=4096)
    await stalled.hears("chats")
    [socket] = rooms.sockets_of(None)
    line = await bob.client.ws_connect("/ws", headers=bob.headers)
    async with asyncio.timeout(HEAR_SECONDS):
        while socket.unsent() <= messenger.BEHIND_BYTES:
            await alice.says(chat, LONG)
        unsent = socket.unsent()
        group = await alice.founds(bob)
        while (frame := await line.receive_json())["type"] != "chat":
            pass
    assert frame["data"]["id"] == group
    assert (socket.unsent(), group in socket.rooms) == (unsent, False)
    assert (await stalled.hears("chat"))["data"]["id"] == group
    later = await alice.says(group, "later")
    while (await stalled.hears("message"))["data"]["id"] != later["id"]:
        pass
    stalled.socket.close()


async def test_answers_come_before_the_close_of_who_breaks_the_protocol(
    alice: Person, bob: Person, raw: Any
) -> None:
    """Frames before one that is none of RFC 6455 are answered, though all came in one block."""
    chat = await alice.opens(bob)
    line = await raw(alice, chat)
    await line.hears("ready")
    good = message(text="", ref="r").encode()
    await line.gives(
        bytes((TEXT, 0x80 + len(good), 0, 0, 0, 0, *good, 0xF9, 0x82, 0, 0, 0, 0)) + b"{}")
    assert (await line.hears("error"))["ref"] == "r"
    assert await line.takes() == (CLOSE, (1002).to_bytes(2, "big"))


class Noting:
    """A transport that notes what is written."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self.writes: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, frames: bytes) -> None:
        """Note a write, and do it."""
        self.writes.append(frames)
        self._transport.write(frames)


async def test_frames_of_a_round_of_the_loop_go_out_together(
    app: web.Application, alice: Person, bob: Person
) -> None:
    """What is written to a socket at one moment, of whatever chats, is one write to the system; it
    counts as unsent until then, and the close comes last."""
    chats = [await alice.founds(bob) for _ in range(20)]
    line = await bob.client.ws_connect("/ws", headers=bob.headers)
    while (await line.receive_json(timeout=HEAR_SECONDS))["type"] != "chats":
        pass
    rooms = app[messenger.ROOMS]
    [socket] = rooms.sockets_of(None)
    socket._transport = noting = Noting(socket._transport)
    for chat in chats:
        rooms.broadcast(messenger.FrameHint(chat, json.dumps({"type": "typing", "data": chat})))
    assert socket.unsent() > 20 * len('{"type":"typing","data":1}')
    rooms.close(messenger.GOING_AWAY, socket)
    heard = [await line.receive(HEAR_SECONDS) for _ in range(21)]
    assert [json.loads(each.data)["data"] for each in heard[:-1]] == chats
    assert heard[-1].type is aiohttp.WSMsgType.CLOSE
    assert len(noting.writes) == 1


async def test_addresses_take_turns_to_be_sent_what_was_written(
    app: web.Application, alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many sockets there is something to be sent to, the loop goes on after a moment; a
    socket of another address does not wait for all of them."""
    chat, rooms = await alice.opens(bob), app[messenger.ROOMS]
    lines = [await bob.listens_live(chat) for _ in range(20)]
    other = rooms.sockets_of(None)[-1]
    other.address = "192.0.2.1"
    flushed, rounds, flush = [], [0], messenger.Socket.flush

    def notes(socket: messenger.Socket) -> None:
        flushed.append((socket, rounds[0]))
        flush(socket)

    monkeypatch.setattr(messenger.Socket, "flush", notes)
    monkeypatch.setattr(websocket, "FLUSH_SECONDS", 0)
    rooms.broadcast(messenger.FrameHint(chat, json.dumps({"type": "typing", "data": {}})))
    while len(flushed) < 20:
        rounds[0] += 1
        await asyncio.sleep(0)
    assert [number for _, number in flushed] == list(range(1, 21))
    assert other in [socket for socket, _ in flushed[:2]]
    for line in lines:
        await line.hears("typing")


async def test_who_does_not_read_answers_is_not_read(
    server: TestServer, raw: Any, alice: Person, bob: Person
) -> None:
    """A client that sends without reading the answers is not read any more: it fills no memory and
    delays nobody."""
    chat = await alice.opens(bob)
    flooder, transport = await stalls(server, raw, bob, chat)
    bad = b'{"type":"message","text":"","ref":"' + b"r" * 60_000 + b'"}'

    async def floods() -> None:
        while True:
            await flooder.sends(0x81, bad)

    with pytest.raises(TimeoutError):  # that nothing is taken any more has no marker
        await asyncio.wait_for(floods(), 1)
    assert transport.get_write_buffer_size() < messenger.BEHIND_BYTES + 200_000
    assert (await alice.says(chat, "in time"))["seq"] == 1


async def test_connection_that_is_lost_but_not_yet_left_disturbs_nobody(
    app: web.Application, server: TestServer, raw: Any, alice: Person, bob: Person
) -> None:
    """A broadcast passes over a socket whose transport is closed but which has not left yet."""
    chat = await alice.opens(bob)
    _, transport = await stalls(server, raw, bob, chat)
    line = await alice.listens_live(chat)
    transport.abort()
    for _ in range(10):  # in each of the turns until the handler learns of it
        app[messenger.ROOMS].broadcast(messenger.FrameHint(chat, '{"type": "typing"}'))
        await asyncio.sleep(0)
    assert [(await line.hears())["type"] for _ in range(10)] == ["typing"] * 10
