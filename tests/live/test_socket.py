"""The socket: how one gets in, what is heard on it, what is refused, and how it ends."""

import asyncio
import contextlib
import json

import pytest
from aiohttp import web

import messenger
from plumbing.guard import Rate
from support.frames import drains, ready
from support.people import NOBODYS, Heard, Line, Person, refusal


def messages(heard: list[Heard]) -> list[int]:
    """Answer the numbers of the messages among frames."""
    return [frame["data"]["rev"] for frame in heard if frame["type"].startswith("message")]


# ---- Getting in


async def test_handshake_for_what_is_no_chat_is_404(alice: Person) -> None:
    """A chat that does not exist, and text that cannot be an id, are 404."""
    junk = ["0", "-1", "junk", "1.5", "٣", "+1", "01", "%00", str(2**63), str(2**70), "999999999"]
    for chat in junk:
        assert await refusal(alice, f"/ws/{chat}") == 404, chat


async def test_handshake_of_a_stranger_is_404(alice: Person, bob: Person, carol: Person) -> None:
    """To a stranger a chat of others does not exist: the answer is a 404 problem."""
    chat = await alice.opens(bob)
    assert await refusal(carol, f"/ws/{chat}") == 404
    answer = await carol.client.get(f"/ws/{chat}", headers=carol.headers)
    assert (answer.status, answer.content_type) == (404, "application/problem+json")
    assert (await answer.json())["type"] == "chat-not-found"


async def test_handshake_with_a_wrong_number_is_422(alice: Person, bob: Person) -> None:
    """An `after` that is neither a number nor a position is refused before the socket opens."""
    chat = await alice.opens(bob)
    for after in ("junk", "-1", "1.", "", str(2**63), "1&after=2"):
        assert await refusal(alice, f"/ws/{chat}?after={after}") == 422, after


# ---- Messages


async def test_ready_tells_the_last_number(alice: Person, bob: Person) -> None:
    """`ready` comes first and names the chat and its number: 0 in a new chat."""
    chat = await alice.opens(bob)
    for number in range(3):
        line = await bob.listens(chat)
        assert await line.hears() == ready(chat, number)
        await alice.says(chat, "more")


async def test_message_over_rest_is_heard_by_all(alice: Person, bob: Person) -> None:
    """What is posted over REST is heard as it was answered, on every socket, the sender's own
    too."""
    chat = await alice.opens(bob)
    lines = [await who.listens_live(chat) for who in (alice, alice, bob, bob)]
    sent = await alice.says(chat, "Привет, 世界 🙂\n\ttab ")
    for line in lines:
        assert await line.hears() == {"type": "message", "data": sent}


async def test_longest_text_passes(alice: Person, bob: Person) -> None:
    """4,096 characters of four bytes each arrive as they were sent, even when they are escaped."""
    chat = await alice.opens(bob)
    line = await bob.listens_live(chat)
    await line.ws.send_str(json.dumps({"type": "message", "text": "🙂" * 4096}))
    assert (await line.hears("message", "error"))["data"].get("text") == "🙂" * 4096


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


async def test_frame_with_a_wrong_chat_id_is_refused_with_its_ref(
    alice: Person, bob: Person
) -> None:
    """A frame whose `chat_id` is invalid is refused with its `ref`."""
    chat = await alice.opens(bob)
    line = await alice.listens_live(chat)
    for chat_id in ("junk", 1.5, [], 0, -1, 2**63, 2**64, 10**30):
        await line.says("hello", ref="r", chat_id=chat_id)
        error = await line.hears()
        assert (error["type"], error.get("ref"), error["data"]["status"]) == ("error", "r", 422)


async def test_error_names_the_chat_that_its_frame_named(alice: Person, bob: Person) -> None:
    """The `error` of a refused frame has the frame's `ref` and `chat_id`; a frame may name the
    socket's own chat."""
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
    """`reply_to` names a message of this chat: one of another is refused, even if the sender sees
    it."""
    chat, other = await alice.opens(bob), await alice.opens(carol)
    foreign = await alice.says(other, "elsewhere")
    line = await alice.listens_live(chat)
    await line.says("hello", reply_to=foreign["id"], ref=1)
    error = await line.hears()
    assert (error["type"], error["data"]["status"]) == ("error", 422)


async def test_id_of_anothers_message_is_refused(alice: Person, bob: Person) -> None:
    """An id that another's message has in this chat is a conflict, and takes no number."""
    chat = await alice.opens(bob)
    taken = await bob.says(chat, "mine")
    line = await alice.listens_live(chat)
    await line.says("hello", id=taken["id"], ref=1)
    error = await line.hears()
    assert (error["data"]["status"], error["data"]["type"]) == (409, "message-id-taken")
    assert (await alice.says(chat, "next"))["seq"] == 2


# ---- Coming back with a number


async def test_after_replays_exactly_what_was_missed(
    alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`after` 0, in the middle, at the edges of pages and at the last number replays exactly what
    came later."""
    monkeypatch.setattr(messenger, "REPLAY_PAGE", 3)
    chat = await alice.opens(bob)
    sent = [await alice.says(chat, f"message {number}") for number in range(1, 11)]
    for after in (0, 1, 3, 4, 6, 7, 9, 10):
        line = await bob.listens(chat, f"?after={after}")
        heard = [await line.hears() for _ in range(10 - after + 1)]
        assert heard.pop() == ready(chat, 10)
        assert heard == [{"type": "message", "data": one} for one in sent[after:]]


async def test_number_beyond_the_last_is_answered_by_the_lower_one(
    alice: Person, bob: Person
) -> None:
    """Whoever comes with a number that was never given is told the chat's last number, and then is
    live."""
    chat = await alice.opens(bob)
    await alice.says(chat, "one")
    for after in (2, 100, 2**63 - 1):
        line = await bob.listens(chat, f"?after={after}")
        assert await line.hears() == ready(chat, 1)
    await alice.says(chat, "two")
    assert (await line.hears())["data"]["seq"] == 2


async def test_coming_back_has_no_hole_while_others_post(
    alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever a socket comes back, and from whatever number, it hears every later number once and
    in order."""
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
    """What is posted right after the handshake is heard, even before `ready`."""
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
    """The others hear who joined, who got a role and who left, each with the chat's version of that
    time."""
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
    """A removal closes the user's sockets on that chat and on no other, before the next post is
    heard."""
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
    """What a removed user sends on a socket is not posted."""
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
    """Whoever leaves a group has their sockets on it closed."""
    chat = await alice.founds(bob)
    line = await bob.listens_live(chat)
    await bob.expects(204, "DELETE", f"/chats/{chat}/participants/{bob.id}")
    assert await line.is_closed() == 4403


async def test_last_one_leaving_closes_with_4403(alice: Person, bob: Person) -> None:
    """The socket of the last participant is closed when they leave, as the chat ends."""
    chat = await alice.founds(bob)
    await bob.expects(204, "DELETE", f"/chats/{chat}/participants/{bob.id}")
    line = await alice.listens_live(chat)
    await alice.expects(204, "DELETE", f"/chats/{chat}/participants/{alice.id}")
    assert await line.is_closed() == 4403


async def test_joiner_may_open_a_socket_at_once(alice: Person, bob: Person, carol: Person) -> None:
    """Whoever joins a group may open a socket on it at once, and have its history replayed."""
    chat = await alice.founds(bob)
    await alice.says(chat, "before")
    await bob.posts(f"/chats/{chat}/participants/{carol.id}")
    line = await carol.listens(chat, "?after=0")
    assert await line.hears_text("before")


# ---- How it ends


async def test_flood_is_refused_and_then_closed(
    app: web.Application, alice: Person, bob: Person
) -> None:
    """Frames beyond the allowance are refused with their `ref`, and a socket that goes on is closed
    with 4429; others are not affected, and the allowance grows again."""
    app[messenger.RATES][messenger.TooManyFrames] = Rate(20, 2)
    app[messenger.RATES][messenger.FLOODING] = Rate(20, 2)
    chat = await alice.opens(bob)
    line, other = await alice.listens_live(chat), await bob.listens_live(chat)
    for number in range(35):
        await line.says("hello", ref=number)
    refused = [(await line.hears("error"))]
    assert refused[0]["data"]["type"] == "too-many-frames"
    assert refused[0]["data"]["status"] == 429
    assert refused[0]["ref"] >= 20
    await asyncio.sleep(1)
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
