"""Posting, history and read status over REST."""

import asyncio
import re
from typing import Any
from uuid import UUID

import asyncpg

from support.model import Position
from support.people import Person, new_id

RFC3339_UTC = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"
NIL = "00000000-0000-0000-0000-000000000000"


async def sends(person: Person, chat: int, **body: Any) -> tuple[int, Any]:
    """Post a message; answer the status and the JSON."""
    answer = await person.asks("POST", f"/chats/{chat}/messages", body)
    return answer.status, await answer.json()


async def last_rev(person: Person, chat: int) -> int:
    """The last number of a chat."""
    return int((await person.gets(f"/chats/{chat}"))["last_rev"])


# ---- Posting


async def test_message_is_stored_as_sent(alice: Person, bob: Person) -> None:
    """A posted message is answered whole with 201 and its Location, and the partner reads the
    same."""
    chat = await alice.opens(bob)
    text = "Привет, 世界 🙂\n "
    answer = await alice.asks("POST", f"/chats/{chat}/messages", {"text": text})
    sent = await answer.json()
    assert answer.status == 201
    assert answer.headers["Location"] == f"/api/v1/chats/{chat}/messages/{sent['id']}"
    assert re.fullmatch(RFC3339_UTC, sent["created_at"])
    assert sent == {
        "id": sent["id"], "chat_id": chat, "seq": 1, "rev": 1, "sender_id": alice.id,
        "text": text, "reply_to": None, "created_at": sent["created_at"], "edited_at": None,
        "deleted_at": None, "read_by": [], "read_count": 0, "position": Position(1),
    }
    for person in (alice, bob):
        assert await person.gets(answer.headers["Location"]) == sent
        assert await person.gets(f"/chats/{chat}/messages") == [sent]
        shown = await person.gets(f"/chats/{chat}")
        assert (shown["last_message"], shown["last_rev"]) == (sent, 1)


async def test_text_is_1_to_4096_characters_kept_as_sent(alice: Person, bob: Person) -> None:
    """A text has 1 to 4,096 code points, whatever their bytes, and is neither trimmed nor
    normalized; an empty one, a longer one and NUL are 422."""
    chat = await alice.opens(bob)
    kept = (
        "x", " ", "\n", "x" * 4096, "🙂" * 4096, "e\u0301", "é", " a \r\n\t b ", "\u202eabc",
        "\ufeffa\u0001\u007f\u0085\u2028", "<script>&amp;</script>", "\\u0000", "\U0010ffff",
        "'); --", '{"a": "b"}', "%s $1 {0}",
    )
    for text in kept:
        status, message = await sends(alice, chat, text=text)
        assert (status, message.get("text")) == (201, text), repr(text[:20])
    assert await bob.history(chat) == list(kept)
    for text in ("", "x" * 4097, "🙂" * 4097, "\0", "a\0b"):
        status, problem = await sends(alice, chat, text=text)
        assert (status, problem["type"]) == (422, "invalid-input"), repr(text[:20])
        assert problem["errors"][0]["loc"] == "$.text"
    assert await last_rev(alice, chat) == len(kept)


async def test_server_chooses_ids_of_version_7(alice: Person, bob: Person) -> None:
    """An id that the server chooses is a UUID of version 7, and later ones sort later."""
    chat = await alice.opens(bob)
    ids = []
    for _ in range(3):
        ids.append(UUID((await alice.says(chat, "x", id=None))["id"]))
        await asyncio.sleep(0.002)
    assert {one.version for one in ids} == {7}
    assert ids == sorted(set(ids))


async def test_message_sent_again_is_the_same_message(alice: Person, bob: Person) -> None:
    """The same id by the same sender answers 200 with the message as it is now, whatever else is
    wrong with the repetition, and takes no number."""
    chat = await alice.opens(bob)
    name = new_id()
    first = await alice.says(chat, "hello", id=name)
    assert first["id"] == name
    assert await sends(alice, chat, text="hello", id=name) == (200, first)
    assert await sends(alice, chat, text="hello", id=name.upper()) == (200, first)
    await bob.reads(chat, first)
    now = await alice.gets(f"/chats/{chat}/messages/{name}")
    assert [reader["user_id"] for reader in now["read_by"]] == [bob.id]
    assert await sends(alice, chat, text="other", id=name) == (200, now)
    assert await sends(alice, chat, text="hello", id=name, reply_to=new_id()) == (200, now)
    assert await sends(alice, chat, text="hello", id=name, reply_to=name) == (200, now)
    assert await last_rev(alice, chat) == 1
    assert (await alice.says(chat, "next"))["seq"] == 2


async def test_message_sent_again_after_a_change_is_answered_changed(
    alice: Person, bob: Person, sql: asyncpg.Connection
) -> None:
    """A message that is sent again after it was deleted is answered with the tombstone and its
    `rev`."""
    chat = await alice.opens(bob)
    sent = await alice.says(chat, "hello", id=new_id())
    await sql.execute("update messages set text = '', rev = 2, deleted_at = now()")
    await sql.execute("update chats set last_rev = 2")
    status, message = await sends(alice, chat, text="hello", id=sent["id"])
    assert (status, message["seq"], message["rev"], message["text"]) == (200, 1, 2, "")
    assert message["deleted_at"] is not None


async def test_message_sent_many_times_at_once_is_one(alice: Person, bob: Person) -> None:
    """Twenty posts of one id at once are one message under one number: one 201, the rest 200."""
    chat = await alice.opens(bob)
    name = new_id()
    answers = await asyncio.gather(*(sends(alice, chat, text="x", id=name) for _ in range(20)))
    assert sorted(status for status, _ in answers) == [200] * 19 + [201]
    assert len({str(message) for _, message in answers}) == 1
    assert await last_rev(alice, chat) == 1
    assert await bob.history(chat) == ["x"]


async def test_id_of_anothers_message_is_taken(alice: Person, bob: Person, carol: Person) -> None:
    """The id of another's message is 409 in this chat; in another chat the same id is free."""
    chat, elsewhere = await alice.founds(bob), await bob.founds(carol)
    sent = await alice.says(chat, "mine", id=new_id())
    status, problem = await sends(bob, chat, text="mine", id=sent["id"])
    assert (status, problem["type"]) == (409, "message-id-taken")
    assert await bob.history(chat) == ["mine"]
    assert await last_rev(bob, chat) == 1
    there = await bob.says(elsewhere, "mine too", id=sent["id"])
    assert (there["chat_id"], there["seq"]) == (elsewhere, 1)
    assert (await bob.gets(f"/chats/{chat}/messages/{sent['id']}"))["text"] == "mine"
    assert (await bob.gets(f"/chats/{elsewhere}/messages/{sent['id']}"))["text"] == "mine too"


async def test_id_may_be_any_uuid(alice: Person, bob: Person) -> None:
    """The client's id may be a UUID of any version, the nil one too."""
    chat = await alice.opens(bob)
    for name in (NIL, NIL.replace("0", "f"), "01890a5d-ac96-774b-bcce-b302099a8057"):
        assert (await alice.says(chat, "x", id=name))["id"] == name
        assert (await bob.gets(f"/chats/{chat}/messages/{name}"))["id"] == name


async def test_reply_is_to_a_message_of_the_chat(alice: Person, bob: Person, carol: Person) -> None:
    """`reply_to` names a message of the same chat: one of another chat, of none, or the reply
    itself is 422 and takes no number."""
    chat, elsewhere = await alice.opens(bob), await alice.opens(carol)
    asked = await alice.says(chat, "question")
    reply = await bob.says(chat, "answer", reply_to=asked["id"])
    assert reply["reply_to"] == asked["id"]
    assert (await alice.says(chat, "thanks", reply_to=reply["id"]))["reply_to"] == reply["id"]
    strange = (await alice.says(elsewhere, "elsewhere"))["id"]
    itself = new_id()
    for body in ({"reply_to": strange}, {"reply_to": new_id()}, {"reply_to": itself, "id": itself}):
        status, problem = await sends(alice, chat, text="x", **body)
        assert (status, problem["errors"][0]["loc"]) == (422, "$.reply_to"), body
    assert await last_rev(alice, chat) == 3
    await alice.gets(f"/chats/{chat}/messages/{itself}", 404)


async def test_numbers_have_no_holes_and_follow_time(alice: Person, bob: Person) -> None:
    """Forty posts at once by two people, some of them refused, take the numbers from 1 on without a
    hole, and their times rise with the numbers."""
    chat = await alice.opens(bob)
    answers = await asyncio.gather(
        *(sends(alice, chat, text=f"a{number}") for number in range(20)),
        *(sends(bob, chat, text="x", reply_to=new_id()) for _ in range(5)),
        *(sends(bob, chat, text=f"b{number}") for number in range(20)),
    )
    sent = sorted((message for status, message in answers if status == 201), key=lambda m: m["seq"])
    assert [status for status, _ in answers].count(422) == 5
    assert [message["seq"] for message in sent] == list(range(1, 41))
    assert all(message["rev"] == message["seq"] for message in sent)
    times = [message["created_at"] for message in sent]
    assert times == sorted(times)
    assert await bob.gets(f"/chats/{chat}/messages") == sent


async def test_one_bad_post_fails_alone(alice: Person, bob: Person, carol: Person) -> None:
    """Of posts that are committed together a refused one takes none of the others with it."""
    chat, closed = await alice.opens(bob), await bob.opens(carol)
    taken = (await bob.says(chat, "taken", id=new_id()))["id"]
    answers = await asyncio.gather(
        sends(alice, chat, text="1"),
        sends(alice, closed, text="not mine"),
        sends(alice, chat, text="2", id=taken),
        sends(alice, chat, text="3", reply_to=new_id()),
        sends(alice, 2**50, text="nowhere"),
        sends(alice, chat, text="4"),
    )
    assert [status for status, _ in answers] == [201, 404, 409, 422, 404, 201]
    assert sorted(await bob.history(chat)) == ["1", "4", "taken"]
    assert await last_rev(alice, chat) == 3
    assert await bob.history(closed) == []


# ---- History


async def walk(person: Person, path: str, relation: str) -> list[list[int]]:
    """Follow one relation from a page on; answer the numbers on each page."""
    found = []
    while path:
        answer = await person.asks("GET", path)
        assert answer.status == 200, await answer.text()
        found.append([message["seq"] for message in await answer.json()])
        link = answer.links.get(relation)
        assert not link or "</api/v1/chats/" in answer.headers["Link"]
        path = str(link["url"].relative()) if link else ""
    return found


async def relations(person: Person, path: str) -> set[str]:
    """Which ways lead on from a page."""
    return set((await person.asks("GET", path)).links)


async def test_history_is_walked_both_ways_to_the_ends(alice: Person, bob: Person) -> None:
    """`next` leads to the oldest message and `prev` to the newest, each message once and oldest
    first in a page; at either end its Link is absent."""
    chat = await alice.opens(bob)
    await asyncio.gather(*(alice.says(chat, "x") for _ in range(7)))
    path = f"/chats/{chat}/messages"
    assert await walk(bob, f"{path}?limit=3", "next") == [[5, 6, 7], [2, 3, 4], [1]]
    assert await walk(bob, f"{path}?limit=3&after=0", "prev") == [[1, 2, 3], [4, 5, 6], [7]]
    assert await walk(bob, f"{path}?limit=3&before=3", "prev") == [[1, 2], [3, 4, 5], [6, 7]]
    assert await walk(bob, f"{path}?limit=3&after=5", "next") == [[6, 7], [3, 4, 5], [1, 2]]
    assert await walk(bob, f"{path}?limit=7", "next") == [[1, 2, 3, 4, 5, 6, 7]]
    assert await walk(bob, f"{path}?limit=7", "prev") == [[1, 2, 3, 4, 5, 6, 7]]
    assert await relations(bob, f"{path}?limit=3") == {"next"}
    assert await relations(bob, f"{path}?limit=3&before=5") == {"next", "prev"}
    assert await relations(bob, f"{path}?limit=3&before=4") == {"prev"}
    assert await relations(bob, f"{path}?limit=3&after=4") == {"next"}
    assert await relations(bob, f"{path}?limit=3&after=3") == {"next", "prev"}
    assert await relations(bob, path) == set()


async def test_before_and_after_are_exclusive(alice: Person, bob: Person) -> None:
    """`before` and `after` leave out their own number; beyond the ends the page is empty."""
    chat = await alice.opens(bob)
    for number in range(1, 6):
        await alice.says(chat, str(number))
    assert await bob.history(chat, "?before=3") == ["1", "2"]
    assert await bob.history(chat, "?after=3") == ["4", "5"]
    assert await bob.history(chat, "?before=5&limit=2") == ["3", "4"]
    assert await bob.history(chat, "?after=1&limit=2") == ["2", "3"]
    for query in ("before=1", "before=0", "after=5", f"after={2**63 - 1}"):
        assert await bob.history(chat, f"?{query}") == [], query
    assert await bob.history(chat, f"?before={2**63 - 1}&limit=1") == ["5"]
    path = f"/chats/{chat}/messages"
    assert await walk(bob, f"{path}?after=9&limit=2", "next") == [[], [4, 5], [2, 3], [1]]
    assert await walk(bob, f"{path}?before=1&limit=2", "prev") == [[], [1, 2], [3, 4], [5]]


async def test_both_bounds_at_once_are_refused(alice: Person, bob: Person) -> None:
    """`before` together with `after` is 422, whatever their values."""
    chat = await alice.opens(bob)
    for query in ("before=5&after=1", "after=0&before=0"):
        problem = await alice.gets(f"/chats/{chat}/messages?{query}", 422)
        assert problem["type"] == "invalid-input"


async def test_history_comes_fifty_at_a_time_unless_asked_otherwise(
    alice: Person, bob: Person
) -> None:
    """A page has 50 by default; `limit` may be 1 to 100."""
    chat = await alice.opens(bob)
    assert await walk(alice, f"/chats/{chat}/messages", "next") == [[]]
    assert await relations(alice, f"/chats/{chat}/messages") == set()
    await asyncio.gather(*(alice.says(chat, "x") for _ in range(101)))
    path = f"/chats/{chat}/messages"
    assert [len(page) for page in await walk(bob, path, "next")] == [50, 50, 1]
    assert [len(page) for page in await walk(bob, f"{path}?limit=100", "next")] == [100, 1]
    assert [len(page) for page in await walk(bob, f"{path}?after=0", "prev")] == [50, 50, 1]
    assert await walk(bob, f"{path}?limit=1&before=3", "next") == [[2], [1]]
    for limit in (0, 101, -1, "x", ""):
        problem = await bob.gets(f"{path}?limit={limit}", 422)
        assert problem["errors"][0]["loc"] == "$.limit", limit


async def test_tombstones_are_in_the_history(
    alice: Person, bob: Person, sql: asyncpg.Connection
) -> None:
    """A deleted message keeps its place and number, also as the chat's newest; its text is gone."""
    chat = await alice.opens(bob)
    for number in range(3):
        await alice.says(chat, str(number))
    await sql.execute("update messages set text = '', deleted_at = now() where seq <> 1")
    history = await bob.gets(f"/chats/{chat}/messages")
    assert [(m["seq"], m["text"], m["deleted_at"] is None) for m in history] == [
        (1, "0", True), (2, "", False), (3, "", False)
    ]
    assert (await bob.gets(f"/chats/{chat}"))["last_message"] == history[2]


async def test_unknown_message_is_404(alice: Person, bob: Person, carol: Person) -> None:
    """A message of no chat, or of another chat of the same user, can be neither fetched nor
    read."""
    chat, elsewhere = await alice.opens(bob), await alice.opens(carol)
    strange = (await alice.says(elsewhere, "x"))["id"]
    for name in (strange, new_id(), NIL):
        assert (await alice.gets(f"/chats/{chat}/messages/{name}", 404))["type"] == (
            "message-not-found"
        )
        body = {"message_id": name}
        problem = await alice.posts(f"/chats/{chat}/read", body, 404)
        assert problem["type"] == "message-not-found"


# ---- Reading


async def test_reading_is_shown_to_all(alice: Person, bob: Person, carol: Person) -> None:
    """Everything up to the message is read: read_by and read_count show it, unread_count falls, and
    the sender is not a reader of their own message."""
    chat = await alice.founds(bob, carol)
    sent = [await alice.says(chat, str(number)) for number in range(1, 4)]
    await bob.says(chat, "4")
    read = await bob.reads(chat, sent[1])
    assert re.fullmatch(RFC3339_UTC, read["read_at"])
    assert read == {
        "chat_id": chat, "message_id": sent[1]["id"], "seq": 2, "reader_id": bob.id,
        "read_at": read["read_at"],
    }
    by_bob = {"user_id": bob.id, "username": "bob", "read_at": read["read_at"]}
    history = await alice.gets(f"/chats/{chat}/messages")
    assert [m["read_by"] for m in history] == [[by_bob], [by_bob], [], []]
    assert [m["read_count"] for m in history] == [1, 1, 0, 0]
    assert await carol.gets(f"/chats/{chat}/messages/{sent[0]['id']}") == history[0]
    shown = await bob.gets(f"/chats/{chat}")
    assert shown["unread_count"] == 1
    assert {p["user_id"]: p["last_read_seq"] for p in shown["participants"]} == {
        alice.id: 0, bob.id: 2, carol.id: 0
    }
    await alice.reads(chat, history[3])
    await carol.reads(chat, history[3])
    history = await alice.gets(f"/chats/{chat}/messages")
    names = [[reader["username"] for reader in m["read_by"]] for m in history]
    assert names == [["bob", "carol"], ["bob", "carol"], ["carol"], ["alice", "carol"]]
    assert [m["read_count"] for m in history] == [2, 2, 1, 2]
    assert (await alice.gets(f"/chats/{chat}"))["last_message"] == history[3]


async def test_watermark_never_goes_back(alice: Person, bob: Person) -> None:
    """Reading an older message answers where the reader already stands, and changes nothing."""
    chat = await alice.opens(bob)
    sent = [await alice.says(chat, str(number)) for number in range(3)]
    stand = await bob.reads(chat, sent[1])
    for message in (sent[0], sent[1]):
        assert await bob.reads(chat, message) == stand
    assert (await bob.gets(f"/chats/{chat}"))["unread_count"] == 1
    before = await alice.gets(f"/chats/{chat}/messages")
    await bob.reads(chat, sent[0])
    assert await alice.gets(f"/chats/{chat}/messages") == before


async def test_reads_at_once_end_at_the_newest(alice: Person, bob: Person) -> None:
    """In whatever order a reader's steps arrive, the farthest one counts."""
    chat = await alice.opens(bob)
    sent = [await alice.says(chat, str(number)) for number in range(10)]
    scattered = [sent[number * 7 % 10] for number in range(10)]
    answers = await asyncio.gather(*(bob.reads(chat, message) for message in scattered))
    assert all(read["seq"] >= m["seq"] for m, read in zip(scattered, answers, strict=True))
    assert (await bob.reads(chat, sent[0]))["seq"] == 10
    assert (await bob.gets(f"/chats/{chat}"))["unread_count"] == 0
    history = await alice.gets(f"/chats/{chat}/messages")
    assert [m["read_count"] for m in history] == [1] * 10
    assert [len(m["read_by"]) for m in history] == [1] * 10


async def test_read_at_is_when_a_message_was_first_passed(alice: Person, bob: Person) -> None:
    """A later step does not change when earlier messages were read."""
    chat = await alice.opens(bob)
    sent = [await alice.says(chat, str(number)) for number in range(4)]
    steps = [await bob.reads(chat, sent[number]) for number in (0, 2, 3)]
    assert steps[0]["read_at"] < steps[1]["read_at"] < steps[2]["read_at"]
    history = await alice.gets(f"/chats/{chat}/messages")
    times = [m["read_by"][0]["read_at"] for m in history]
    assert times == [steps[number]["read_at"] for number in (0, 1, 1, 2)]


async def test_joiner_is_no_reader_of_what_was_before(
    alice: Person, bob: Person, carol: Person, sql: asyncpg.Connection
) -> None:
    """Whoever joins later is not a reader of earlier messages; reading one of those leaves them at
    the newest message, read when they joined."""
    chat = await alice.founds(bob)
    old = [await alice.says(chat, str(number)) for number in range(2)]
    await alice.posts(f"/chats/{chat}/participants", {"user_id": carol.id})
    stand = await carol.reads(chat, old[0])
    assert (stand["message_id"], stand["seq"], stand["reader_id"]) == (old[1]["id"], 2, carol.id)
    joined_at = await sql.fetchval(
        "select joined_at from participants where chat_id = $1 and user_id = $2", chat, carol.id
    )
    assert stand["read_at"] == joined_at.isoformat().replace("+00:00", "Z")
    new = await alice.says(chat, "new")
    await carol.reads(chat, new)
    history = await bob.gets(f"/chats/{chat}/messages")
    assert [[r["user_id"] for r in m["read_by"]] for m in history] == [[], [], [carol.id]]
    assert [m["read_count"] for m in history] == [0, 0, 1]


async def test_reader_who_left_is_not_named(alice: Person, bob: Person, carol: Person) -> None:
    """read_by and read_count are of present participants; whoever comes back joins anew."""
    chat = await alice.founds(bob, carol)
    sent = await alice.says(chat, "x")
    await carol.reads(chat, sent)
    await bob.reads(chat, sent)
    for back in (False, True):
        if back:
            await alice.posts(f"/chats/{chat}/participants", {"user_id": carol.id})
        else:
            await alice.expects(204, "DELETE", f"/chats/{chat}/participants/{carol.id}")
        (message,) = await bob.gets(f"/chats/{chat}/messages")
        assert [reader["user_id"] for reader in message["read_by"]] == [bob.id], back
        assert message["read_count"] == 1, back


async def test_who_was_away_is_no_reader_of_what_came_meanwhile(
    alice: Person, bob: Person, carol: Person
) -> None:
    """Whoever left and came back has read what they read before or after, but not what was posted
    while they were away: on a page as by the message itself."""
    chat = await alice.founds(bob, carol)
    sent = [await alice.says(chat, str(number)) for number in range(3)]
    await bob.reads(chat, sent[1])
    await bob.reads(chat, sent[2])
    await alice.expects(204, "DELETE", f"/chats/{chat}/participants/{bob.id}")
    sent += [await alice.says(chat, "away") for _ in range(3)]
    await alice.posts(f"/chats/{chat}/participants", {"user_id": bob.id})
    sent += [await alice.says(chat, "back") for _ in range(2)]
    await bob.reads(chat, sent[-1])
    on_page = await carol.gets(f"/chats/{chat}/messages")
    alone = [await carol.gets(f"/chats/{chat}/messages/{each['id']}") for each in sent]
    assert on_page == alone
    assert [each["read_count"] for each in alone] == [0] * 6 + [1] * 2
    changes = await carol.gets(f"/chats/{chat}/changes?after=0")
    assert changes == alone


async def test_large_chats_only_count_readers(
    alice: Person, bob: Person, carol: Person, sql: asyncpg.Connection
) -> None:
    """With 100 participants readers are named; with 101 read_by is empty and read_count counts."""
    rows = await sql.fetch(
        "insert into users (email, email_key, username, username_key, password_hash)"
        " select n || '@crowd', n || '@crowd', 'crowd' || n, 'crowd' || n, ''"
        " from generate_series(1, 98) n returning id"
    )
    ids = [bob.id, *(row["id"] for row in rows)]
    body = {"is_group": True, "name": "x", "participant_ids": ids}
    chat = (await alice.posts("/chats", body))["id"]
    sent = await alice.says(chat, "1")
    await bob.reads(chat, sent)
    (message,) = await alice.gets(f"/chats/{chat}/messages")
    assert ([r["user_id"] for r in message["read_by"]], message["read_count"]) == ([bob.id], 1)
    await alice.posts(f"/chats/{chat}/participants", {"user_id": carol.id})
    sent = await alice.says(chat, "2")
    await bob.reads(chat, sent)
    await carol.reads(chat, sent)
    history = await alice.gets(f"/chats/{chat}/messages")
    assert [(m["read_by"], m["read_count"]) for m in history] == [([], 1), ([], 2)]
    shown = await alice.gets(f"/chats/{chat}")
    assert shown["last_message"] == history[1]
    assert {p["user_id"]: p["last_read_seq"] for p in shown["participants"]}[bob.id] == 2
    # Small again, it names them all, those who read meanwhile too.
    await alice.expects(204, "DELETE", f"/chats/{chat}/participants/{ids[-1]}")
    history = await alice.gets(f"/chats/{chat}/messages")
    named = [sorted(r["user_id"] for r in m["read_by"]) for m in history]
    assert named == [[bob.id], sorted((bob.id, carol.id))]
    assert history[0]["read_by"][0]["read_at"] == message["read_by"][0]["read_at"]
    assert all(r["read_at"] > history[1]["created_at"] for r in history[1]["read_by"])
