"""The socket: how one gets in, what is heard on it, what is refused, and how it ends."""

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import jwt
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from conftest import HEAR_SECONDS, SECRET_KEY, Heard, Line, Person, new_id

import messenger
from edge import Rate

NOBODYS = "00000000-0000-4000-8000-000000000000"
TEXT, BINARY, CLOSE, PING, PONG = 0x81, 0x82, 0x88, 0x89, 0x8A


class RawLine:
    """A websocket by hand: it reads when it is told to, and answers nothing by itself."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self._read = bytearray()

    async def opens(
        self, port: int, path: str, token: str, receive_bytes: int | None = None
    ) -> "RawLine":
        """Connect and do the handshake; `receive_bytes` makes the kernel's buffer small."""
        loop = asyncio.get_running_loop()
        if receive_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        await loop.sock_connect(self.socket, ("127.0.0.1", port))
        await self.gives(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            f"Authorization: Bearer {token}\r\n\r\n".encode()
        )
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += await self._takes_bytes(1)
        assert head.startswith(b"HTTP/1.1 101 "), head
        return self

    def __del__(self) -> None:
        self.socket.close()

    async def gives(self, data: bytes) -> None:
        """Send bytes as they are."""
        async with asyncio.timeout(HEAR_SECONDS):
            await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def sends(self, opcode: int, payload: bytes = b"") -> None:
        """Send a frame, masked by zeros."""
        size = len(payload)
        if size < 126:
            head = bytes((opcode, 0x80 | size))
        elif size < 65_536:
            head = bytes((opcode, 0xFE)) + size.to_bytes(2, "big")
        else:
            head = bytes((opcode, 0xFF)) + size.to_bytes(8, "big")
        await self.gives(head + bytes(4) + payload)

    async def takes(self) -> tuple[int, bytes]:
        """Read a frame: its first byte and its payload. Raises EOFError, ConnectionError."""
        first, size = await self._takes_bytes(2)
        if size >= 126:
            size = int.from_bytes(await self._takes_bytes(2 if size == 126 else 8), "big")
        return first, await self._takes_bytes(size)

    async def hears(self, *types: str) -> Heard:
        """Wait for the next text frame of one of the types (any, if none is named)."""
        while True:
            first, payload = await self.takes()
            if first == TEXT and (not types or json.loads(payload)["type"] in types):
                return Heard(json.loads(payload))

    async def _takes_bytes(self, size: int) -> bytes:
        async with asyncio.timeout(HEAR_SECONDS):
            while len(self._read) < size:
                more = await asyncio.get_running_loop().sock_recv(self.socket, 65_536)
                if not more:
                    raise EOFError
                self._read += more
        taken = bytes(self._read[:size])
        del self._read[:size]
        return taken


@pytest.fixture
async def raw(server: TestServer) -> AsyncIterator[Callable[..., Awaitable[RawLine]]]:
    """Open raw sockets on a chat: `await raw(person, chat, query, receive_bytes=...)`."""
    opened: list[RawLine] = []

    async def open_raw(person: Person, chat: int, query: str = "", **options: Any) -> RawLine:
        opened.append(RawLine())
        path = f"/ws/{chat}{query}"
        return await opened[-1].opens(server.port or 0, path, person.access, **options)

    yield open_raw
    for line in opened:
        line.socket.close()


async def refusal(person: Person, path: str, **options: Any) -> int:
    """Try to open a socket; answer the status by which it is refused."""
    options.setdefault("headers", person.headers)
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await person.client.ws_connect(path, **options)
    return refused.value.status


async def drains(line: Line, number: int) -> list[Heard]:
    """Hear frames up to the message of a number."""
    heard = []
    while not heard or heard[-1]["type"] != "message" or heard[-1]["data"]["seq"] < number:
        heard.append(await line.hears())
    return heard


def messages(heard: list[Heard]) -> list[int]:
    """Answer the numbers of the messages among frames."""
    return [frame["data"]["rev"] for frame in heard if frame["type"].startswith("message")]


# ---- Getting in


async def test_token_is_taken_from_header_subprotocol_and_query(alice: Person, bob: Person) -> None:
    """Each of the three ways to bring the token opens the socket."""
    chat = await alice.opens(bob)
    ways: list[tuple[str, dict[str, Any]]] = [
        ("", {"headers": alice.headers}),
        ("", {"headers": {}, "protocols": ("messenger.v1", alice.access)}),
        (f"?token={alice.access}", {"headers": {}}),
        (f"?token={alice.access}&after=0", {"headers": {}}),
    ]
    for query, options in ways:
        line = await alice.listens(chat, query, **options)
        assert (await line.hears())["type"] == "ready"
        assert line.ws.protocol == ("messenger.v1" if "protocols" in options else None)


async def test_handshake_without_a_valid_access_token_is_401(alice: Person, bob: Person) -> None:
    """No token, junk and a refresh token are refused in all three places."""
    chat = await alice.opens(bob)
    assert await refusal(alice, f"/ws/{chat}", headers={}) == 401
    for token in ("junk", alice.refresh, alice.access[:-4], f"{alice.access}x"):
        bearer = {"Authorization": f"Bearer {token}"}
        pair = ("messenger.v1", token)
        assert await refusal(alice, f"/ws/{chat}", headers=bearer) == 401
        assert await refusal(alice, f"/ws/{chat}", headers={}, protocols=pair) == 401
        assert await refusal(alice, f"/ws/{chat}?token={token}", headers={}) == 401


async def test_handshake_after_logout_is_401(alice: Person, bob: Person) -> None:
    """The token of an ended session opens nothing."""
    chat = await alice.opens(bob)
    await alice.posts("/users/logout", status=204)
    assert await refusal(alice, f"/ws/{chat}") == 401


async def test_handshake_for_what_is_no_chat_is_404(alice: Person) -> None:
    """A chat that does not exist, and what can be no id, are not there."""
    junk = ["0", "-1", "junk", "1.5", "٣", "+1", "01", "%00", str(2**63), str(2**70), "999999999"]
    for chat in junk:
        assert await refusal(alice, f"/ws/{chat}") == 404, chat


async def test_handshake_of_a_stranger_is_404(alice: Person, bob: Person, carol: Person) -> None:
    """A chat of others does not exist for a stranger, and the answer is a problem."""
    chat = await alice.opens(bob)
    assert await refusal(carol, f"/ws/{chat}") == 404
    answer = await carol.client.get(f"/ws/{chat}", headers=carol.headers)
    assert (answer.status, answer.content_type) == (404, "application/problem+json")
    assert (await answer.json())["type"] == "chat-not-found"


async def test_handshake_of_a_foreign_page_is_403(alice: Person, bob: Person) -> None:
    """Only pages of this site may open a socket; programs, which send no Origin, all may."""
    chat = await alice.opens(bob)
    host = f"{alice.client.host}:{alice.client.port}"
    for origin in ("http://evil.example", f"http://{host}.evil.example", "null", f"http://x{host}"):
        assert await refusal(alice, f"/ws/{chat}", origin=origin) == 403, origin
    line = await alice.listens(chat, headers=alice.headers, origin=f"http://{host}")
    assert await line.hears("ready")


async def test_handshake_with_a_broken_origin_is_403(alice: Person, bob: Person) -> None:
    """An Origin that is no URL is a foreign one."""
    chat = await alice.opens(bob)
    for origin in ("http://[", "http://[x]/", "//", "http://a:b:c"):
        assert await refusal(alice, f"/ws/{chat}", origin=origin) == 403, origin


async def test_plain_get_is_426(alice: Person, bob: Person) -> None:
    """A GET that asks for no websocket is told to, with a problem."""
    chat = await alice.opens(bob)
    answer = await alice.client.get(f"/ws/{chat}", headers=alice.headers)
    assert (answer.status, answer.headers["Upgrade"]) == (426, "websocket")
    assert (await answer.json())["type"] == "upgrade-required"


async def test_handshake_with_a_wrong_number_is_422(alice: Person, bob: Person) -> None:
    """An `after` that is no number is refused before the socket opens."""
    chat = await alice.opens(bob)
    for after in ("junk", "-1", "1.5", "", str(2**63), "1&after=2"):
        assert await refusal(alice, f"/ws/{chat}?after={after}") == 422, after


# ---- Messages


async def test_ready_tells_the_last_number(alice: Person, bob: Person) -> None:
    """`ready` comes first and names the chat and its number: 0 in a new chat."""
    chat = await alice.opens(bob)
    for number in range(3):
        line = await bob.listens(chat)
        assert await line.hears() == {"type": "ready", "data": {"chat_id": chat, "rev": number}}
        await alice.says(chat, "more")


async def test_message_over_rest_is_heard_by_all(alice: Person, bob: Person) -> None:
    """What is posted over REST is heard as it was answered, on the sender's own sockets too."""
    chat = await alice.opens(bob)
    lines = [await who.listens_live(chat) for who in (alice, alice, bob, bob)]
    sent = await alice.says(chat, "Привет, 世界 🙂\n\ttab ")
    for line in lines:
        assert await line.hears() == {"type": "message", "data": sent}


async def test_message_over_a_socket_is_heard_by_all_and_stored(alice: Person, bob: Person) -> None:
    """What is posted over a socket is heard on every socket, and reads the same over REST."""
    chat = await alice.opens(bob)
    lines = [await who.listens_live(chat) for who in (alice, alice, bob)]
    first = await alice.says(chat, "question")
    message_id = new_id()
    await lines[0].says("answer", id=message_id, reply_to=first["id"])
    heard = [(await line.hears_text("answer"))["data"] for line in lines]
    assert heard[0] == heard[1] == heard[2] == (await bob.gets(f"/chats/{chat}/messages"))[1]
    assert (heard[0]["id"], heard[0]["reply_to"], heard[0]["seq"]) == (message_id, first["id"], 2)
    assert heard[0]["sender_id"] == alice.id
    await lines[0].hears_nothing()  # without `ref` there is no `ack`


async def test_longest_text_passes(alice: Person, bob: Person) -> None:
    """4096 characters of four bytes each, escaped even, arrive as they were sent."""
    chat = await alice.opens(bob)
    line = await bob.listens_live(chat)
    await line.ws.send_str(json.dumps({"type": "message", "text": "🙂" * 4096}))
    assert (await line.hears("message", "error"))["data"].get("text") == "🙂" * 4096


async def test_ack_carries_the_ref(alice: Person, bob: Person) -> None:
    """A message with a `ref`, any string or number, is acknowledged under just that."""
    chat = await alice.opens(bob)
    line = await alice.listens_live(chat)
    strings = ["a", "", "🙂", "r" * 1000, "a\0b"]
    for ref in [*strings, 0, 7, -7, 2.5, 1e300, 2**53 + 1, -(2**63), 2**63, 2**64, 10**30]:
        await line.says("hello", ref=ref)
        ack = await line.hears("ack", "error")
        stored = (await alice.gets(f"/chats/{chat}/messages"))[-1]
        told = {name: stored[name] for name in ("id", "chat_id", "seq", "created_at")}
        assert ack == {"type": "ack", "ref": ref, "data": told}
        assert type(ack["ref"]) is type(ref)


async def test_message_sent_again_is_acknowledged_again(alice: Person, bob: Person) -> None:
    """The same id over the socket is acknowledged alike, and heard once."""
    chat = await alice.opens(bob)
    line, other = await alice.listens_live(chat), await bob.listens_live(chat)
    message_id = new_id()
    await line.says("once", id=message_id, ref=1)
    await line.says("once", id=message_id, ref=2)
    acks = [await line.hears("ack"), await line.hears("ack")]
    assert [ack["ref"] for ack in acks] == [1, 2]
    assert acks[0]["data"] == acks[1]["data"]
    assert (await other.hears())["data"]["id"] == message_id
    await other.hears_nothing()


async def test_thousand_pipelined_messages_keep_their_order(alice: Person, bob: Person) -> None:
    """1,000 frames sent without waiting are all acknowledged, numbered in the order sent."""
    chat = await alice.opens(bob)
    line, other = await alice.listens_live(chat), await bob.listens_live(chat)
    heard = asyncio.create_task(drains(other, 1000))
    for number in range(1, 1001):
        await line.says(f"message {number}", ref=number)
    acks = {}
    while len(acks) < 1000:
        ack = await line.hears("ack", "error")
        acks[ack["ref"]] = ack["data"]["seq"]
    assert acks == {number: number for number in range(1, 1001)}
    assert [frame["data"]["text"] for frame in await heard] == [
        f"message {number}" for number in range(1, 1001)
    ]


# ---- What is refused


def message(**fields: Any) -> str:
    """Write a message frame that is right but for some fields."""
    return json.dumps({"type": "message", "text": "hello", "ref": "r"} | fields)


def read(**fields: Any) -> str:
    """Write a read frame."""
    return json.dumps({"type": "read", "message_id": NOBODYS, "ref": "r"} | fields)


BAD_FRAMES = [
    # frame, status, whether its ref can be told
    ("", 400, False),
    ("hello", 400, False),
    ('{"type":"message","text":"hello","ref":"r"', 400, False),
    ("[" * 60_000, 400, False),
    ('{"type":"message","ref":"r","text":' + "[" * 60_000, 400, False),
    ('{"a":' * 13_000, 400, False),
    ('{"type":"message","text":"\\ud800","ref":"r"}', 400, False),
    ("[]", 422, False),
    ("null", 422, False),
    ("7", 422, False),
    ("{}", 422, False),
    ('{"text":"hello","ref":"r"}', 422, True),
    (message(type="shout"), 422, True),
    (message(type=5), 422, True),
    (message(colour="red"), 422, True),
    (message(text=None), 422, True),
    (message(text=5), 422, True),
    (message(text=""), 422, True),
    (message(text="a\0b"), 422, True),
    (message(text="x" * 4097), 422, True),
    (message(id="junk"), 422, True),
    (message(id=5), 422, True),
    (message(reply_to="junk"), 422, True),
    (message(reply_to=NOBODYS), 422, True),
    (message(chat_id=987654321), 404, True),
    (message(ref=[]), 422, False),
    (message(ref={}), 422, False),
    (message(ref=True), 422, False),
    ('{"type":"read","ref":"r"}', 422, True),
    (read(message_id="junk"), 422, True),
    (read(message_id=None), 422, True),
    (read(after=1), 422, True),
    (read(), 404, True),
    (read(chat_id=987654321), 404, True),
]


async def test_bad_frame_is_refused_and_the_socket_stays_open(alice: Person, bob: Person) -> None:
    """A bad frame gets one `error` with its `ref` and a problem, and takes no number."""
    chat = await alice.opens(bob)
    line = await alice.listens_live(chat)
    for number, (frame, status, has_ref) in enumerate(BAD_FRAMES, 1):
        await line.ws.send_str(frame)
        error = await line.hears()
        assert (error["type"], error["data"]["status"]) == ("error", status), frame[:80]
        assert {"type", "title", "detail"} <= error["data"].keys()
        assert error.get("ref") == ("r" if has_ref else None), frame[:80]
        await line.says("still here")
        heard = await line.hears()
        assert (heard["type"], heard["data"]["seq"]) == ("message", number), frame[:80]


async def test_frame_with_a_wrong_chat_id_is_refused_with_its_ref(
    alice: Person, bob: Person
) -> None:
    """A `chat_id` that is none does not keep the `ref` from coming back."""
    chat = await alice.opens(bob)
    line = await alice.listens_live(chat)
    for chat_id in ("junk", 1.5, [], 0, -1, 2**63, 2**64, 10**30):
        await line.says("hello", ref="r", chat_id=chat_id)
        error = await line.hears()
        assert (error["type"], error.get("ref"), error["data"]["status"]) == ("error", "r", 422)


async def test_binary_frame_is_refused_and_the_socket_stays_open(
    alice: Person, bob: Person
) -> None:
    """A binary frame is refused, JSON or not."""
    chat = await alice.opens(bob)
    line = await alice.listens_live(chat)
    for data in (b"", b"\xff\x00", message().encode()):
        await line.ws.send_bytes(data)
        assert (await line.hears())["data"]["status"] == 400
    await line.says("still here")
    assert (await line.hears())["data"]["seq"] == 1


async def test_error_names_the_chat_that_its_frame_named(alice: Person, bob: Person) -> None:
    """`ref` and `chat_id` of a refused frame come back in its `error`; its own may be named."""
    chat = await alice.opens(bob)
    line = await alice.listens_live(chat)
    await line.says("hello", chat_id=chat, ref=1)
    assert {(await line.hears())["type"], (await line.hears())["type"]} == {"message", "ack"}
    await line.says("hello", chat_id=chat, ref=2, reply_to=NOBODYS)
    error = await line.hears()
    assert (error["type"], error["ref"], error["chat_id"]) == ("error", 2, chat)
    assert error["data"]["type"] == "reply-not-found"
    assert [each["loc"] for each in error["data"]["errors"]] == ["$.reply_to"]
    await line.says("hello", chat_id=chat + 1000, ref=3)
    error = await line.hears()
    assert (error["type"], error["ref"], error["chat_id"]) == ("error", 3, chat + 1000)
    await line.says("", chat_id=chat)
    error = await line.hears()
    assert (error["chat_id"], "ref" in error) == (chat, False)


async def test_reply_to_a_message_of_another_chat_is_refused(
    alice: Person, bob: Person, carol: Person
) -> None:
    """`reply_to` names a message of this chat, even where the sender sees the other one."""
    chat, other = await alice.opens(bob), await alice.opens(carol)
    foreign = await alice.says(other, "elsewhere")
    line = await alice.listens_live(chat)
    await line.says("hello", reply_to=foreign["id"], ref=1)
    error = await line.hears()
    assert (error["type"], error["data"]["status"]) == ("error", 422)


async def test_id_of_anothers_message_is_refused(alice: Person, bob: Person) -> None:
    """An id that another took in this chat is a conflict, and burns no number."""
    chat = await alice.opens(bob)
    taken = await bob.says(chat, "mine")
    line = await alice.listens_live(chat)
    await line.says("hello", id=taken["id"], ref=1)
    error = await line.hears()
    assert (error["data"]["status"], error["data"]["type"]) == (409, "message-id-taken")
    assert (await alice.says(chat, "next"))["seq"] == 2


async def test_invalid_utf8_closes_with_1007(alice: Person, bob: Person, raw: Any) -> None:
    """Text that is no UTF-8 ends the socket."""
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
    """A frame may have 65,536 bytes."""
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
    """Cutting a message into pieces does not make it smaller; a small one in pieces is read."""
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


# ---- Reads


async def test_read_frame_is_told_to_all(alice: Person, bob: Person) -> None:
    """A `read` frame moves the watermark and is heard on every socket, the reader's too."""
    chat = await alice.opens(bob)
    lines = [await who.listens_live(chat) for who in (alice, bob, bob)]
    sent = await alice.says(chat, "read this")
    await lines[1].sends(type="read", message_id=sent["id"])
    heard = [await line.hears("read") for line in lines]
    [reader] = (await alice.gets(f"/chats/{chat}/messages"))[0]["read_by"]
    assert heard[0] == heard[1] == heard[2]
    assert heard[0]["data"] == {
        "chat_id": chat, "message_id": sent["id"], "seq": 1, "reader_id": bob.id,
        "read_at": reader["read_at"],
    }


async def test_reading_backwards_is_told_to_nobody(alice: Person, bob: Person) -> None:
    """A `read` of what was read already changes nothing and makes no event."""
    chat = await alice.opens(bob)
    first, second = await alice.says(chat, "one"), await alice.says(chat, "two")
    line, other = await bob.listens_live(chat), await alice.listens_live(chat)
    for sent in (second, first, second):
        await line.sends(type="read", message_id=sent["id"])
    assert (await other.hears())["data"]["seq"] == 2
    await other.hears_nothing()


async def test_read_takes_effect_after_the_message_before_it(alice: Person, bob: Person) -> None:
    """A message and a read of it, sent without waiting, take effect in that order."""
    chat = await alice.opens(bob)
    line = await alice.listens_live(chat)
    ids = [new_id() for _ in range(30)]
    for message_id in ids:
        await line.says("mine", id=message_id)
        await line.sends(type="read", message_id=message_id)
    told = []
    while len(told) < len(ids):
        told.append((await line.hears("read", "error"))["data"].get("message_id"))
    assert told == ids


async def test_message_takes_effect_after_the_read_before_it(alice: Person, bob: Person) -> None:
    """A read and a reply, sent without waiting, are heard in that order."""
    chat = await alice.opens(bob)
    sent = await alice.says(chat, "question")
    line = await bob.listens_live(chat)
    await line.sends(type="read", message_id=sent["id"])
    await line.says("answer")
    assert [(await line.hears())["type"] for _ in range(2)] == ["read", "message"]


# ---- Coming back with a number


async def test_after_replays_exactly_what_was_missed(
    alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 0, after one in the middle, at the edges of pages, and after the last number."""
    monkeypatch.setattr(messenger, "REPLAY_PAGE", 3)
    chat = await alice.opens(bob)
    sent = [await alice.says(chat, f"message {number}") for number in range(1, 11)]
    for after in (0, 1, 3, 4, 6, 7, 9, 10):
        line = await bob.listens(chat, f"?after={after}")
        heard = [await line.hears() for _ in range(10 - after + 1)]
        assert heard.pop() == {"type": "ready", "data": {"chat_id": chat, "rev": 10}}
        assert heard == [{"type": "message", "data": one} for one in sent[after:]]


async def test_number_beyond_the_last_is_answered_by_the_lower_one(
    alice: Person, bob: Person
) -> None:
    """Who comes with a number that was never given hears the true one, and then is live."""
    chat = await alice.opens(bob)
    await alice.says(chat, "one")
    for after in (2, 100, 2**63 - 1):
        line = await bob.listens(chat, f"?after={after}")
        assert await line.hears() == {"type": "ready", "data": {"chat_id": chat, "rev": 1}}
    await alice.says(chat, "two")
    assert (await line.hears())["data"]["seq"] == 2


async def test_coming_back_has_no_hole_while_others_post(
    alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever one comes and from whatever number, every later number is heard once, in order."""
    monkeypatch.setattr(messenger, "REPLAY_PAGE", 7)
    chat = await alice.opens(bob)
    for number in range(40):
        await alice.says(chat, f"before {number}")
    stop = asyncio.Event()

    async def keeps_posting(person: Person) -> None:
        while not stop.is_set():
            await person.says(chat, "meanwhile")

    async def comes_back(after: int) -> tuple[int, asyncio.Task[list[Heard]]]:
        line = await bob.listens(chat, f"?after={after}")
        return after, asyncio.create_task(hears_until_marked(line))

    async def hears_until_marked(line: Line) -> list[Heard]:
        heard = [await line.hears()]
        while {"ready", "the last"} - {str(f["data"].get("text", f["type"])) for f in heard}:
            heard.append(await line.hears())
        return heard

    posting = [asyncio.create_task(keeps_posting(who)) for who in (alice, alice, bob)]
    listening = []
    for number in range(15):
        listening.append(await comes_back(number * 3))
        await asyncio.sleep(0.02)
    stop.set()
    await asyncio.gather(*posting)
    last = (await alice.says(chat, "the last"))["seq"]
    assert last > 60
    for after, task in listening:
        heard = await task
        assert messages(heard) == list(range(after + 1, last + 1))
        assert [frame["type"] for frame in heard].count("ready") == 1


async def test_socket_is_live_from_its_handshake_on(alice: Person, bob: Person) -> None:
    """What is posted as soon as the handshake was answered is heard, `ready` or not."""
    chat = await alice.opens(bob)
    for number in range(1, 21):
        line = await bob.listens(chat)
        await alice.says(chat, "right away")
        assert (await line.hears("message"))["data"]["seq"] == number
        await line.close()


# ---- Participants come and go


async def test_joining_and_leaving_is_told_with_the_version(
    alice: Person, bob: Person, carol: Person
) -> None:
    """Who stays hears who came, got a role and left, each with the chat's version at that time."""
    chat = await alice.founds(bob, name="us")
    line = await bob.listens_live(chat)
    joined = await alice.posts(f"/chats/{chat}/participants", {"user_id": carol.id})
    version = (await alice.gets(f"/chats/{chat}"))["version"]
    data = {"chat_id": chat, "version": version, "name": "us"}
    assert (await line.hears("chat_updated"))["data"] == {
        **data, "participants": [joined], "left": []
    }
    body = {"user_id": carol.id, "role": "admin"}
    changed = await alice.posts(f"/chats/{chat}/participants", body, status=200)
    assert (await line.hears("chat_updated"))["data"] == {
        **data, "version": version + 1, "participants": [changed], "left": []
    }
    await alice.expects(204, "DELETE", f"/chats/{chat}/participants/{carol.id}")
    assert (await line.hears("chat_updated"))["data"] == {
        **data, "version": version + 2, "participants": [], "left": [carol.id]
    }
    assert (await alice.gets(f"/chats/{chat}"))["version"] == version + 2


async def test_removed_participant_is_closed_with_4403_and_hears_nothing_more(
    alice: Person, bob: Person, carol: Person
) -> None:
    """A removal closes the removed one's sockets on the chat, on no other, before the next post."""
    chat, other = await alice.founds(bob, carol), await alice.opens(carol)
    lines = [await carol.listens(chat), await carol.listens(chat)]
    elsewhere, bobs = await carol.listens_live(other), await bob.listens_live(chat)
    await alice.says(chat, "before")
    await alice.expects(204, "DELETE", f"/chats/{chat}/participants/{carol.id}")
    await alice.says(chat, "after")
    for line in lines:
        texts = []
        with contextlib.suppress(AssertionError):
            while True:
                texts.append((await line.hears("message"))["data"]["text"])
        assert (texts, line.ws.close_code) == (["before"], 4403)
    assert await bobs.hears_text("after")
    await alice.says(other, "still here")
    assert await elsewhere.hears_text("still here")
    assert await refusal(carol, f"/ws/{chat}") == 404


async def test_removed_participant_can_post_nothing_more(
    alice: Person, bob: Person, carol: Person
) -> None:
    """What comes in on the socket of somebody who was removed is not posted."""
    chat = await alice.founds(bob, carol)
    line = await carol.listens_live(chat)

    async def keeps_posting() -> None:
        with contextlib.suppress(ConnectionError):
            while not line.ws.closed:
                await line.says("spam")
                await asyncio.sleep(0)

    posting = asyncio.create_task(keeps_posting())
    await line.hears("message")
    await alice.expects(204, "DELETE", f"/chats/{chat}/participants/{carol.id}")
    count = (await alice.gets(f"/chats/{chat}"))["last_rev"]
    assert await line.is_closed() == 4403
    await posting
    assert (await alice.gets(f"/chats/{chat}"))["last_rev"] == count


async def test_leaving_closes_with_4403(alice: Person, bob: Person) -> None:
    """Who leaves a group loses it on their sockets."""
    chat = await alice.founds(bob)
    line = await bob.listens_live(chat)
    await bob.expects(204, "DELETE", f"/chats/{chat}/participants/{bob.id}")
    assert await line.is_closed() == 4403


async def test_last_one_leaving_closes_with_4403(alice: Person, bob: Person) -> None:
    """The socket of the last participant does not outlive the chat."""
    chat = await alice.founds(bob)
    await bob.expects(204, "DELETE", f"/chats/{chat}/participants/{bob.id}")
    line = await alice.listens_live(chat)
    await alice.expects(204, "DELETE", f"/chats/{chat}/participants/{alice.id}")
    assert await line.is_closed() == 4403


async def test_joiner_may_open_a_socket_at_once(alice: Person, bob: Person, carol: Person) -> None:
    """Who was put into a group follows it, and may have its history replayed."""
    chat = await alice.founds(bob)
    await alice.says(chat, "before")
    await bob.posts(f"/chats/{chat}/participants/{carol.id}")
    line = await carol.listens(chat, "?after=0")
    assert await line.hears_text("before")


# ---- How it ends


async def test_logout_closes_with_4401(alice: Person, bob: Person) -> None:
    """A logout closes the sockets of its session, and no other session's."""
    chat = await alice.opens(bob)
    kept = await alice.listens_live(chat)
    await alice.logs_in()
    line = await alice.listens_live(chat)
    await alice.posts("/users/logout", status=204)
    assert await line.is_closed() == 4401
    await bob.says(chat, "still here")
    assert await kept.hears_text("still here")


async def test_expired_token_closes_with_4401(
    alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket lives no longer than its token, to which the leeway belongs."""
    chat = await alice.opens(bob)
    claims = jwt.decode(alice.access, SECRET_KEY, algorithms=["HS256"])
    tokens = [
        jwt.encode(claims | {"exp": int(time.time()) + seconds}, SECRET_KEY, "HS256")
        for seconds in (60, 3600)
    ]
    lines = [await alice.listens(chat, f"?token={token}", headers={}) for token in tokens]
    await bob.says(chat, "early")
    assert await lines[0].hears_text("early")
    with monkeypatch.context() as patch:
        patch.setattr(messenger, "TOKEN_LEEWAY_SECONDS", -120)  # as if two minutes had passed
        assert await lines[0].is_closed() == 4401
    await bob.says(chat, "late")
    assert await lines[1].hears_text("late")


async def test_silent_peer_is_pinged_and_dropped_if_it_does_not_answer(
    alice: Person, bob: Person, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server pings who is silent; who answers stays, who does not is dropped."""
    monkeypatch.setattr(messenger, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(messenger, "PONG_SECONDS", 1)
    chat = await alice.opens(bob)
    answering, dead = await alice.listens_live(chat), await raw(bob, chat)
    reading = asyncio.create_task(answering.hears_text("still here"))
    await dead.hears("ready")
    assert await dead.takes() == (PING, b"")
    with pytest.raises((EOFError, ConnectionError)):
        await dead.hears("message")
    await bob.says(chat, "still here")
    await reading


async def test_ping_is_answered_with_its_payload(alice: Person, bob: Person, raw: Any) -> None:
    """A client's ping gets a pong with the same payload, and nothing else comes of it."""
    chat = await alice.opens(bob)
    line = await raw(alice, chat)
    await line.hears("ready")
    for payload in (b"", b"\x00\xff are you there?", os.urandom(125)):
        await line.sends(PING, payload)
        assert await line.takes() == (PONG, payload)
    await line.sends(PONG, b"unasked")
    await line.sends(TEXT, message(ref=1).encode())
    assert (await line.hears("ack"))["ref"] == 1


async def test_close_is_answered_with_close(alice: Person, bob: Person, raw: Any) -> None:
    """Who hangs up in order gets a close frame back and then the end of the stream."""
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
    """Messages that came in before the connection broke are posted, answered or not."""
    chat = await alice.opens(bob)
    other, line = await bob.listens_live(chat), await raw(alice, chat)
    for number in range(50):
        await line.sends(TEXT, json.dumps({"type": "message", "text": f"{number}"}).encode())
    await line.sends(CLOSE, (1000).to_bytes(2, "big"))
    heard = await drains(other, 50)
    assert [frame["data"]["text"] for frame in heard] == [str(number) for number in range(50)]


async def test_flood_is_refused_and_then_closed(
    app: web.Application, alice: Person, bob: Person
) -> None:
    """Frames beyond the allowance are refused, by their `ref`; who goes on is closed with 4429.
    Others are not concerned, and the allowance grows again."""
    app[messenger.RATES][messenger.TooManyFrames] = Rate(20, 2)
    app[messenger.RATES][messenger.WS_FLOODING] = Rate(20, 2)
    chat = await alice.opens(bob)
    line, other = await alice.listens_live(chat), await bob.listens_live(chat)
    for number in range(23):
        await line.says("hello", ref=number)
    refused = [(await line.hears("error"))]
    assert refused[0]["data"]["type"] == "too-many-frames"
    assert refused[0]["data"]["status"] == 429
    assert refused[0]["ref"] >= 20
    await asyncio.sleep(2)
    await line.says("calm again", ref="calm")
    while (heard := await line.hears("ack", "error"))["ref"] != "calm":
        pass
    assert heard["type"] == "ack"
    for _ in range(60):
        await line.says("hello", ref=0)
    assert await line.is_closed() == 4429
    await other.says("still here", ref="other")
    while (await other.hears("ack", "message")).get("ref") != "other":
        pass
