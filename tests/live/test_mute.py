"""No socket stays open and hears nothing: what cannot go on closes its sockets with 1001."""

import asyncio
import contextlib
from typing import Any

import pytest
from aiohttp import WSMsgType, web

import messenger
from support.people import SOON_SECONDS, Person


async def test_room_that_fails_to_read_closes_its_sockets(
    app: web.Application, alice: Person, bob: Person, monkeypatch: Any, caplog: Any
) -> None:
    """Where what a room missed cannot be read, for whatever reason, its sockets end with 1001, and
    say so in the log; those of other chats stay.
    """
    chat, other = await alice.opens(bob), await alice.founds(bob)
    lines = [await alice.listens_live(chat), await bob.listens_live(chat)]
    quiet = await bob.listens_live(other)

    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(messenger, "deliver_snapshot", fail)
    app[messenger.ROOMS].advance(chat, 1, 1)
    assert [await line.is_closed() for line in lines] == [1001, 1001]
    assert f"chat {chat}: closing its sockets" in caplog.text
    monkeypatch.undo()
    await alice.says(other, "still here")
    assert (await quiet.hears("message"))["data"]["text"] == "still here"
    line = await alice.listens_live(chat)
    await bob.says(chat, "again")
    assert (await line.hears("message"))["data"]["text"] == "again"


@pytest.mark.parametrize("path", ["/ws/{}", "/ws"])
async def test_handshake_ends_where_the_version_went_back(
    app: web.Application, alice: Person, bob: Person, path: str
) -> None:
    """A handshake on a chat whose version is lower in the database than in its room is answered, or
    its socket sent back with those who were there before; then it hears what is said.
    """
    chat = await alice.founds(bob)
    before = await bob.listens_live(chat)
    app[messenger.ROOMS]._rooms[chat].version = 7  # of a history that is no more
    line = await alice.client.ws_connect(path.format(chat), headers=alice.headers)
    assert await before.is_closed() == 1001
    with contextlib.suppress(TimeoutError):
        while (await line.receive(timeout=0.5)).type is not WSMsgType.CLOSED:
            pass
    if line.closed:
        assert line.close_code == 1001
        line = await alice.client.ws_connect(path.format(chat), headers=alice.headers)
    await bob.says(chat, "a text")
    while (await line.receive_json(timeout=SOON_SECONDS))["type"] != "message":
        pass
    await line.close()


async def test_joining_ends_where_the_version_went_back(
    app: web.Application, alice: Person, bob: Person, carol: Person
) -> None:
    """Who comes into such a chat by another's doing is sent back, too, and then follows it."""
    everything = await carol.client.ws_connect("/ws", headers=carol.headers)
    chat = await alice.founds(bob)
    before = await bob.listens_live(chat)
    app[messenger.ROOMS]._rooms[chat].version = 1_000
    await alice.posts(f"/chats/{chat}/participants", {"user_id": carol.id})
    assert await before.is_closed() == 1001
    while not everything.closed:
        await everything.receive(timeout=SOON_SECONDS)
    assert everything.close_code == 1001
    again = await carol.client.ws_connect("/ws", headers=carol.headers)
    while (await again.receive_json(timeout=SOON_SECONDS))["type"] != "chats":
        pass
    await bob.says(chat, "news")
    while (await again.receive_json(timeout=SOON_SECONDS))["type"] != "message":
        pass
    await again.close()


async def test_poll_sees_that_the_version_went_back(
    app: web.Application, alice: Person, bob: Person
) -> None:
    """The sockets of a chat whose version went back in the database start over."""
    chat = await alice.founds(bob)
    line = await bob.listens_live(chat)
    app[messenger.ROOMS]._rooms[chat].version = 7
    assert await line.is_closed() == 1001


async def test_frame_that_fails_is_refused(
    app: web.Application, alice: Person, bob: Person, monkeypatch: Any, caplog: Any
) -> None:
    """A frame at which the server fails is answered, and the socket lives on."""
    chat = await alice.opens(bob)
    line = await alice.listens_live(chat)

    async def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setitem(messenger.FRAME_HANDLERS, messenger.TypingIn, fail)
    await line.sends(type="typing", ref=5)
    refused = await line.hears("error")
    assert (refused["data"]["type"], refused["ref"]) == ("internal-error", 5)
    await line.says("a text", ref=6)
    assert (await line.hears("ack"))["ref"] == 6
    assert "a frame could not be taken" in caplog.text


async def test_failure_to_bring_in_closes_the_socket(
    app: web.Application, alice: Person, bob: Person, monkeypatch: Any
) -> None:
    """A socket which cannot be brought into a chat comes back, instead of missing it for ever."""
    everything = await bob.client.ws_connect("/ws", headers=bob.headers)
    other = await alice.founds(bob, name="before")
    while (await everything.receive_json(timeout=SOON_SECONDS))["type"] != "ready":
        pass

    async def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(messenger.Rooms, "_join_chats", fail)
    await alice.founds(bob)
    async with asyncio.timeout(SOON_SECONDS):
        while not everything.closed:
            await everything.receive()
    assert everything.close_code == 1001
    assert other
