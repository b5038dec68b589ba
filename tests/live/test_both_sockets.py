"""What both sockets promise alike: that of one chat, `/ws/{chat_id}`, and that of all, `/ws`."""

import json
import time
from dataclasses import dataclass
from typing import Any

import jwt
import pytest

import messenger
from support.frames import message, until
from support.people import NOBODYS, Line, Person, follows, new_id, refusal
from support.raw import HANDSHAKE
from support.servers import SECRET_KEY, Elsewhere, knows


@dataclass(frozen=True)
class Kind:
    """One of the two sockets: how it is opened, and how a frame on it names its chat."""

    path: str

    def at(self, chat: int) -> str:
        """Answer the path of the socket on which a chat is heard."""
        return self.path.format(chat_id=chat)

    def names(self, chat: int) -> dict[str, int]:
        """Answer what a frame needs so that it is about a chat."""
        return {} if "chat_id" in self.path else {"chat_id": chat}

    async def opens(self, person: Person, chat: int, query: str = "", **options: Any) -> Line:
        """Open a socket on which a chat is heard."""
        if "chat_id" in self.path:
            return await person.listens(chat, query, **options)
        return await follows(person, query, **options)

    async def live(self, person: Person, chat: int) -> Line:
        """Open such a socket, on which the next frame is of what happens from now on."""
        line = await self.opens(person, chat)
        if "chat_id" in self.path:
            await line.hears("ready")
        return line


KINDS = [Kind("/ws/{chat_id}"), Kind("/ws")]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.path)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each of the two sockets."""
    assert isinstance(request.param, Kind)
    return request.param


def message_frame(**fields: Any) -> dict[str, Any]:
    """Make a message frame that is right but for some fields."""
    return {"type": "message", "text": "hello", "ref": "r"} | fields


def read_frame(**fields: Any) -> dict[str, Any]:
    """Make a read frame, of a message that is not there."""
    return {"type": "read", "message_id": NOBODYS, "ref": "r"} | fields


# ---- Getting in


async def test_token_is_taken_from_header_subprotocol_and_query(
    kind: Kind, alice: Person, bob: Person
) -> None:
    """Each of the three ways to bring the token opens the socket."""
    chat = await alice.opens(bob)
    ways: list[tuple[str, dict[str, Any]]] = [
        ("", {"headers": alice.headers}),
        ("", {"headers": {}, "protocols": ("messenger.v1", alice.access)}),
        (f"?token={alice.access}", {"headers": {}}),
    ]
    if kind.path != "/ws":  # first, while there is nothing to be replayed
        ways.insert(0, (f"?token={alice.access}&after=0", {"headers": {}}))
    for query, options in ways:
        line = await kind.opens(alice, chat, query, **options)
        assert line.ws.protocol == ("messenger.v1" if "protocols" in options else None)
        if kind.path != "/ws":
            assert (await line.hears())["type"] == "ready"
        posted = await bob.says(chat, "hello")
        assert await line.hears() == message(posted)


async def test_handshake_without_a_valid_access_token_is_401(
    kind: Kind, alice: Person, bob: Person
) -> None:
    """No token, junk and a refresh token are refused, wherever they are put."""
    path = kind.at(await alice.opens(bob))
    assert await refusal(alice, path, headers={}) == 401
    for token in ("junk", alice.refresh, alice.access[:-4], f"{alice.access}x"):
        bearer = {"Authorization": f"Bearer {token}"}
        pair = ("messenger.v1", token)
        assert await refusal(alice, path, headers=bearer) == 401
        assert await refusal(alice, path, headers={}, protocols=pair) == 401
        assert await refusal(alice, f"{path}?token={token}", headers={}) == 401


async def test_handshake_after_logout_is_401(kind: Kind, alice: Person, bob: Person) -> None:
    """The token of a session that has ended opens no socket."""
    path = kind.at(await alice.opens(bob))
    await alice.posts("/users/logout", status=204)
    assert await refusal(alice, path) == 401


async def test_handshake_of_a_foreign_page_is_403(kind: Kind, alice: Person, bob: Person) -> None:
    """Of pages only this site's may open a socket; programs, which send no Origin, may too."""
    chat = await alice.opens(bob)
    host = f"{alice.client.host}:{alice.client.port}"
    for origin in ("http://evil.example", f"http://{host}.evil.example", "null", f"http://x{host}"):
        assert await refusal(alice, kind.at(chat), origin=origin) == 403, origin
    line = await kind.opens(alice, chat, origin=f"http://{host}")
    sent = await bob.says(chat, "hello")
    assert await line.hears("message") == message(sent)


async def test_handshake_with_a_broken_origin_is_403(
    kind: Kind, alice: Person, bob: Person
) -> None:
    """An Origin that is not a URL counts as a foreign one."""
    path = kind.at(await alice.opens(bob))
    for origin in ("http://[", "http://[x]/", "//", "http://a:b:c"):
        assert await refusal(alice, path, origin=origin) == 403, origin


async def test_what_is_no_handshake_is_426(kind: Kind, alice: Person, bob: Person) -> None:
    """A GET that asks for no websocket, or for one of another version, is told to upgrade, with a
    problem; so is a HEAD, whatever it asks for, and its connection goes on."""
    path = kind.at(await alice.opens(bob))
    for method, asked in (
        ("GET", {}), ("GET", HANDSHAKE | {"Sec-WebSocket-Version": "14"}),
        ("HEAD", {}), ("HEAD", HANDSHAKE),
    ):
        async with alice.client.request(method, path, headers=alice.headers | asked) as answer:
            assert (answer.status, answer.headers["Upgrade"]) == (426, "websocket"), (method, asked)
            assert answer.headers["Sec-WebSocket-Version"] == "13"
            if method == "GET":
                assert (await answer.json())["type"] == "upgrade-required"
    for asked in ({}, HANDSHAKE):
        headers = alice.headers | asked | {"Origin": "http://evil.example"}
        async with alice.client.head(path, headers=headers) as answer:
            assert answer.status == 403
    assert (await alice.asks("GET", "/users/me")).status == 200


# ---- Messages


async def test_message_is_heard_by_all_acknowledged_and_stored(
    kind: Kind, alice: Person, bob: Person
) -> None:
    """What is posted over a socket is acknowledged there, heard on every socket of both kinds, the
    sender's too, and reads the same over REST."""
    chat = await alice.opens(bob)
    first = await alice.says(chat, "question")
    sending = await kind.live(alice, chat)
    others = [await each.live(who, chat) for each in KINDS for who in (alice, bob)]
    message_id = new_id()
    own = {"id": message_id, "reply_to": first["id"], "ref": "r"}
    await sending.says("answer", **kind.names(chat), **own)
    heard = [await sending.hears(), await sending.hears()]
    stored = (await bob.gets(f"/chats/{chat}/messages"))[1]
    told = {name: stored[name] for name in ("id", "chat_id", "seq", "created_at")}
    assert sorted(heard, key=lambda frame: str(frame["type"])) == [
        {"type": "ack", "ref": "r", "data": told}, message(stored)]
    for line in others:
        assert await line.hears() == message(stored)
    assert (stored["id"], stored["reply_to"], stored["seq"]) == (message_id, first["id"], 2)
    assert (stored["chat_id"], stored["sender_id"]) == (chat, alice.id)


async def test_message_without_a_ref_is_not_acknowledged(
    kind: Kind, alice: Person, bob: Person
) -> None:
    """A frame without a `ref` gets no `ack`."""
    chat = await alice.opens(bob)
    line = await kind.live(alice, chat)
    await line.says("without", **kind.names(chat))
    await line.says("marker", **kind.names(chat), ref="marker")
    heard = [await line.hears() for _ in range(3)]
    assert [frame["ref"] for frame in heard if frame["type"] == "ack"] == ["marker"]
    posted = [frame["data"]["text"] for frame in heard if frame["type"] == "message"]
    assert posted == ["without", "marker"]


async def test_ack_carries_the_ref(kind: Kind, alice: Person, bob: Person) -> None:
    """A message is acknowledged under its own `ref`, any string or number."""
    chat = await alice.opens(bob)
    line = await kind.live(alice, chat)
    strings = ["a", "", "🙂", "r" * 1000, "a\0b"]
    for ref in [*strings, 0, 7, -7, 2.5, 1e300, 2**53 + 1, -(2**63), 2**63, 2**64, 10**30]:
        await line.says("hello", **kind.names(chat), ref=ref)
        ack = await line.hears("ack", "error")
        stored = (await alice.gets(f"/chats/{chat}/messages"))[-1]
        told = {name: stored[name] for name in ("id", "chat_id", "seq", "created_at")}
        assert ack == {"type": "ack", "ref": ref, "data": told}
        assert type(ack["ref"]) is type(ref)


async def test_message_sent_again_is_acknowledged_again(
    kind: Kind, alice: Person, bob: Person
) -> None:
    """A message that is sent again is acknowledged again, alike, and heard once."""
    chat = await alice.opens(bob)
    line, other = await kind.live(alice, chat), await kind.live(bob, chat)
    message_id = new_id()
    await line.says("once", **kind.names(chat), id=message_id, ref=1)
    await line.says("once", **kind.names(chat), id=message_id, ref=2)
    acks = [await line.hears("ack"), await line.hears("ack")]
    assert [ack["ref"] for ack in acks] == [1, 2]
    assert acks[0]["data"] == acks[1]["data"]
    assert (await other.hears())["data"]["id"] == message_id
    await line.says("marker", **kind.names(chat))
    assert (await other.hears())["data"]["text"] == "marker"


# ---- What is refused


BAD_FRAMES: list[tuple[str | dict[str, Any], int, bool]] = [
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
    (message_frame(type="shout"), 422, True),
    (message_frame(type=5), 422, True),
    (message_frame(colour="red"), 422, True),
    (message_frame(text=None), 422, True),
    (message_frame(text=5), 422, True),
    (message_frame(text=""), 422, True),
    (message_frame(text="a\0b"), 422, True),
    (message_frame(text="x" * 4097), 422, True),
    (message_frame(id="junk"), 422, True),
    (message_frame(id=5), 422, True),
    (message_frame(reply_to="junk"), 422, True),
    (message_frame(reply_to=NOBODYS), 422, True),
    (message_frame(chat_id=987654321), 404, True),
    (message_frame(ref=[]), 422, False),
    (message_frame(ref={}), 422, False),
    (message_frame(ref=True), 422, False),
    ({"type": "read", "ref": "r"}, 422, True),
    (read_frame(message_id="junk"), 422, True),
    (read_frame(message_id=None), 422, True),
    (read_frame(after=1), 422, True),
    (read_frame(), 404, True),
    (read_frame(chat_id=987654321), 404, True),
    ({"type": "shout", "ref": "r"}, 422, True),
    ({"type": "typing", "text": "hello", "ref": "r"}, 422, True),
    ({"type": "sync", "after": -1, "ref": "r"}, 422, True),
    ({"type": "sync", "after": 2**63, "ref": "r"}, 422, True),
]


async def test_bad_frame_is_refused_and_the_socket_stays_open(
    kind: Kind, alice: Person, bob: Person
) -> None:
    """A bad frame gets one `error` with a problem, its `ref` and its `chat_id`, and takes no
    number."""
    chat = await alice.opens(bob)
    line = await kind.live(alice, chat)
    for number, (frame, status, has_ref) in enumerate(BAD_FRAMES, 1):
        sent = frame if isinstance(frame, str) else kind.names(chat) | frame
        await line.ws.send_str(sent if isinstance(sent, str) else json.dumps(sent))
        error = await line.hears()
        assert (error["type"], error["data"]["status"]) == ("error", status), str(sent)[:80]
        assert {"type", "title", "detail"} <= error["data"].keys()
        assert error.get("ref") == ("r" if has_ref else None), str(sent)[:80]
        if has_ref and "chat_id" in sent:
            assert error["chat_id"] == sent["chat_id"], sent
        await line.says("still here", **kind.names(chat))
        heard = await line.hears()
        assert (heard["type"], heard["data"]["seq"]) == ("message", number), str(sent)[:80]


async def test_binary_frame_is_refused_and_the_socket_stays_open(
    kind: Kind, alice: Person, bob: Person
) -> None:
    """A binary frame is refused, JSON or not."""
    chat = await alice.opens(bob)
    line = await kind.live(alice, chat)
    right = json.dumps(message_frame() | kind.names(chat)).encode()
    for data in (b"", b"\xff\x00", right):
        await line.ws.send_bytes(data)
        assert (await line.hears())["data"]["status"] == 400
    await line.says("still here", **kind.names(chat))
    assert (await line.hears())["data"]["seq"] == 1


# ---- Acknowledgements, pings


@pytest.mark.parametrize("ref", ["r", "", 0, 17, 1.5, -(2**60)])
async def test_ref_comes_back_in_what_answers(
    kind: Kind, alice: Person, bob: Person, ref: str | float
) -> None:
    """A `read` or `typing` with a `ref` is acknowledged with its chat, once it took effect; a ping
    is answered by a pong and `auth` by `auth`, and each has the `ref`."""
    chat = await alice.opens(bob)
    sent = await alice.says(chat, "read this")
    line = await kind.live(bob, chat)
    for _ in range(2):  # the second time there is nothing new to tell
        await line.sends(type="read", **kind.names(chat), message_id=sent["id"], ref=ref)
        ack = {"type": "ack", "data": {"chat_id": chat}, "ref": ref}
        assert await line.hears("ack", "error") == ack
        assert (await bob.gets(f"/chats/{chat}"))["unread_count"] == 0
    await line.sends(type="typing", **kind.names(chat), ref=ref)
    assert await line.hears() == {"type": "ack", "data": {"chat_id": chat}, "ref": ref}
    await line.sends(type="ping", ref=ref)
    assert await line.hears() == {"type": "pong", "data": {}, "ref": ref}
    await line.sends(type="auth", token=bob.access, ref=ref)
    answered = await line.hears()
    assert (answered["type"], answered["ref"]) == ("auth", ref)


async def test_what_has_no_ref_is_not_acknowledged(kind: Kind, alice: Person, bob: Person) -> None:
    """A frame without a `ref` gets no `ack`; a ping is answered all the same, in its turn."""
    chat = await alice.opens(bob)
    sent = await alice.says(chat, "read this")
    line = await kind.live(bob, chat)
    await line.sends(type="typing", **kind.names(chat))
    await line.sends(type="read", **kind.names(chat), message_id=sent["id"])
    await line.says("hello", **kind.names(chat))
    await line.sends(type="ping")
    heard = [await line.hears() for _ in range(3)]
    assert [each["type"] for each in heard] == ["read", "message", "pong"]
    assert heard[-1] == {"type": "pong", "data": {}}


async def test_ping_takes_nothing_but_a_ref(kind: Kind, alice: Person, bob: Person) -> None:
    """A ping with another field is refused like any frame."""
    chat = await alice.opens(bob)
    line = await kind.live(bob, chat)
    for more in ({"data": {}}, {"chat_id": chat}, {"ref": []}):
        await line.sends(type="ping", **more)
        assert (await line.hears())["data"]["status"] == 422, more


# ---- Reads


async def test_read_is_told_to_all(kind: Kind, alice: Person, bob: Person) -> None:
    """A read, by frame or over REST, is heard on every socket of the chat, the reader's too."""
    chat = await alice.opens(bob)
    line = await kind.live(bob, chat)
    others = [await each.live(who, chat) for each in KINDS for who in (bob, alice)]
    first, second = await alice.says(chat, "one"), await alice.says(chat, "two")
    await line.sends(type="read", **kind.names(chat), message_id=first["id"])
    read = await line.hears("read")
    [reader] = (await alice.gets(f"/chats/{chat}/messages"))[0]["read_by"]
    assert read["data"] == {
        "chat_id": chat, "message_id": first["id"], "seq": 1, "reader_id": bob.id,
        "read_at": reader["read_at"],
    }
    rest = await bob.reads(chat, second)
    assert await line.hears() == {"type": "read", "data": rest}
    for each in others:
        assert await each.hears("read") == read
        assert await each.hears() == {"type": "read", "data": rest}


async def test_reading_backwards_is_told_to_nobody(kind: Kind, alice: Person, bob: Person) -> None:
    """A `read` of what was read already changes nothing, and nobody hears of it."""
    chat = await alice.opens(bob)
    first, second = await alice.says(chat, "one"), await alice.says(chat, "two")
    line, other = await kind.live(bob, chat), await kind.live(alice, chat)
    for sent in (second, first, second):
        await line.sends(type="read", **kind.names(chat), message_id=sent["id"])
    await line.says("marker", **kind.names(chat))
    assert (await other.hears())["data"]["seq"] == 2
    assert (await other.hears())["data"].get("text") == "marker"


async def test_read_takes_effect_after_the_message_before_it(
    kind: Kind, alice: Person, bob: Person
) -> None:
    """A message and a read of it, sent without waiting, take effect in that order."""
    chat = await alice.opens(bob)
    line = await kind.live(alice, chat)
    ids = [new_id() for _ in range(30)]
    for message_id in ids:
        await line.says("mine", **kind.names(chat), id=message_id)
        await line.sends(type="read", **kind.names(chat), message_id=message_id)
    told = []
    while len(told) < len(ids):
        told.append((await line.hears("read", "error"))["data"].get("message_id"))
    assert told == ids


async def test_message_takes_effect_after_the_read_before_it(
    kind: Kind, alice: Person, bob: Person
) -> None:
    """A read and a reply, sent without waiting, are heard in that order."""
    chat = await alice.opens(bob)
    sent = await alice.says(chat, "question")
    line = await kind.live(bob, chat)
    await line.sends(type="read", **kind.names(chat), message_id=sent["id"])
    await line.says("answer", **kind.names(chat))
    assert [(await line.hears())["type"] for _ in range(2)] == ["read", "message"]


@pytest.mark.usefixtures("no_polls")
async def test_typing_and_read_are_heard_at_another_server(
    kind: Kind, alice: Person, bob: Person, elsewhere: Elsewhere
) -> None:
    """A user's typing and reading at one server are heard at the other; their own sockets hear only
    the reading."""
    chat = await alice.opens(bob)
    there = await elsewhere.takes(alice), await elsewhere.takes(bob)
    line, (alices, bobs) = await kind.live(bob, chat), [await kind.live(who, chat) for who in there]
    await knows(alice, chat, alices)
    sent = await alice.says(chat, "read this")
    await until(alices, "read this")
    await until(bobs, "read this")
    await line.sends(type="typing", **kind.names(chat))
    await line.sends(type="read", **kind.names(chat), message_id=sent["id"])
    typing = {"type": "typing", "data": {"chat_id": chat, "user_id": bob.id}}
    assert await alices.hears() == typing
    read = await alices.hears()
    assert (read["type"], read["data"]["message_id"]) == ("read", sent["id"])
    assert await bobs.hears() == read
    sent = await alice.says(chat, "read this over REST")
    read_over_rest = await bob.reads(chat, sent)
    for each in (alices, bobs):
        assert (await each.hears("read"))["data"] == read_over_rest


# ---- How it ends


async def test_logout_closes_with_4401(kind: Kind, alice: Person, bob: Person) -> None:
    """A logout closes the sockets of its session, and no other session's."""
    chat = await alice.opens(bob)
    kept = await kind.live(alice, chat)
    await alice.logs_in()
    line = await kind.live(alice, chat)
    await alice.posts("/users/logout", status=204)
    assert await line.is_closed() == 4401
    await bob.says(chat, "still here")
    assert await kept.hears_text("still here")


async def test_expired_token_closes_with_4401(
    kind: Kind, alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket is closed when its token has expired and the leeway is over, and not before."""
    chat = await alice.opens(bob)
    claims = jwt.decode(alice.access, SECRET_KEY, algorithms=["HS256"])
    tokens = [
        jwt.encode(claims | {"exp": int(time.time()) + seconds}, SECRET_KEY, "HS256")
        for seconds in (60, 3600)
    ]
    lines = [await kind.opens(alice, chat, f"?token={token}", headers={}) for token in tokens]
    await bob.says(chat, "early")
    assert await lines[0].hears_text("early")
    with monkeypatch.context() as patch:
        patch.setattr(messenger, "TOKEN_LEEWAY_SECONDS", -120)  # as if two minutes had passed
        assert await lines[0].is_closed() == 4401
    await bob.says(chat, "late")
    assert await lines[1].hears_text("late")
