"""Personal and group chats: making them, listing them, who is in them and as what."""

import asyncio
import re
from collections.abc import Coroutine
from typing import Any
from uuid import uuid4

import aiohttp
import asyncpg
import pytest

import messenger
from plumbing.guard import Slots
from support.databases import crowd, until_waiting
from support.people import SOON_SECONDS, Person, pages, puts, roles
from support.valid_calls import requests_about

CHAT = {
    "id", "name", "is_group", "created_at", "participants", "participant_count", "last_message",
    "last_rev", "position", "version", "unread_count",
}
PARTICIPANT = {"user_id", "username", "role", "last_read_seq"}


async def creates(person: Person, is_group: bool, ids: list[Any], **more: Any) -> tuple[int, Any]:
    """Ask for a chat; answer the status and the JSON."""
    body = {"is_group": is_group, "participant_ids": ids} | more
    answer = await person.asks("POST", "/chats", body)
    return answer.status, await answer.json()


async def removes(person: Person, chat: int, who: Any) -> Any:
    """Take somebody out of a group; answer 204 or the type of the problem."""
    user_id = who.id if isinstance(who, Person) else who
    answer = await person.asks("DELETE", f"/chats/{chat}/participants/{user_id}")
    return 204 if answer.status == 204 else (answer.status, (await answer.json())["type"])


@pytest.fixture(autouse=True)
def no_turns(app: Any) -> None:
    """Meet at the chat's lock in PostgreSQL, not before: as if each came to a server of its own."""
    app[messenger.TURNS] = Slots(0)


async def at_once(sql: asyncpg.Connection, chat: int, *requests: Coroutine[Any, Any, Any]) -> Any:
    """Send requests that meet at the chat's lock: held until all of them wait; answer them."""
    async with sql.transaction(), asyncio.timeout(SOON_SECONDS):
        await sql.execute("select from chats where id = $1 for update", chat)
        sent = [asyncio.create_task(request) for request in requests]
        await until_waiting(sql, len(sent))
    return await asyncio.gather(*sent)


# ---- Personal chats


async def test_personal_chat_is_one_for_both(alice: Person, bob: Person) -> None:
    """The first to ask gets 201 with the chat and its Location; later both get 200 with the same
    chat."""
    answer = await alice.asks("POST", "/chats", {"is_group": False, "participant_ids": [bob.id]})
    chat = await answer.json()
    assert answer.status == 201
    assert answer.headers["Location"] == f"/api/v1/chats/{chat['id']}"
    assert chat.keys() == CHAT
    assert re.fullmatch(r"[0-9T:.-]+Z", chat["created_at"])
    assert (chat["name"], chat["is_group"], chat["participant_count"]) == (None, False, 2)
    assert (chat["last_message"], chat["last_rev"], chat["unread_count"]) == (None, 0, 0)
    assert all(one.keys() == PARTICIPANT for one in chat["participants"])
    assert await roles(alice, chat["id"]) == {alice.id: "member", bob.id: "member"}
    assert await alice.gets(answer.headers["Location"]) == chat
    assert await creates(bob, False, [alice.id]) == (200, chat)
    assert await creates(alice, False, [bob.id]) == (200, chat)
    assert await bob.gets("/chats") == [chat]


async def test_personal_chat_is_made_once_by_many_at_once(alice: Person, bob: Person) -> None:
    """Of twenty requests for it at the same time, from both sides, one makes the chat and all get
    it."""
    answers = await asyncio.gather(
        *(creates(alice, False, [bob.id]) for _ in range(10)),
        *(creates(bob, False, [alice.id]) for _ in range(10)),
    )
    assert sorted(status for status, _ in answers) == [200] * 19 + [201]
    assert len({chat["id"] for _, chat in answers}) == 1


async def test_personal_chat_is_with_exactly_one_other(
    alice: Person, bob: Person, carol: Person
) -> None:
    """A personal chat with nobody, with oneself alone, with two others, with an unknown user or
    with a name is 422; an id that is repeated counts once."""
    for ids, more in (
        ([], {}),
        ([alice.id], {}),
        ([bob.id, carol.id], {}),
        ([bob.id], {"name": "a name"}),
        ([carol.id + 1], {}),
    ):
        status, problem = await creates(alice, False, ids, **more)
        assert (status, problem["type"]) == (422, "invalid-input"), (ids, more)
    assert str(carol.id + 1) in problem["errors"][0]["msg"]
    assert problem["errors"][0]["loc"].startswith("$.participant_ids")
    status, chat = await creates(alice, False, [bob.id, alice.id, bob.id])
    assert status == 201
    assert await creates(alice, False, [bob.id], name=None) == (200, chat)


async def test_personal_chat_keeps_its_two(alice: Person, bob: Person, carol: Person) -> None:
    """Nobody joins a personal chat and nobody leaves it: 409."""
    chat = await alice.opens(bob)
    assert await puts(alice, chat, carol) == (409, "personal-chat")
    assert await puts(alice, chat, bob, "owner") == (409, "personal-chat")
    assert await removes(alice, chat, alice) == (409, "personal-chat")
    assert await removes(alice, chat, bob) == (409, "personal-chat")
    assert await roles(bob, chat) == {alice.id: "member", bob.id: "member"}


# ---- Groups


async def test_group_is_its_creators(alice: Person, bob: Person, carol: Person) -> None:
    """The creator becomes the owner and is named first; the others follow in the order given."""
    ids = [carol.id, alice.id, bob.id, carol.id]
    body = {"is_group": True, "name": "Наша группа", "participant_ids": ids}
    answer = await alice.asks("POST", "/chats", body)
    chat = await answer.json()
    assert answer.status == 201
    assert answer.headers["Location"] == f"/api/v1/chats/{chat['id']}"
    assert chat.keys() == CHAT
    assert (chat["name"], chat["is_group"], chat["participant_count"]) == ("Наша группа", True, 3)
    assert list((await roles(bob, chat["id"])).items()) == [
        (alice.id, "owner"), (carol.id, "member"), (bob.id, "member")
    ]
    assert [one["username"] for one in chat["participants"]] == ["alice", "carol", "bob"]
    for person in (alice, bob, carol):
        assert await person.gets(f"/chats/{chat['id']}") == chat
        assert await person.gets("/chats") == [chat]
    assert (await creates(alice, True, ids, name="Наша группа"))[1]["id"] != chat["id"]


async def test_group_has_a_name_of_1_to_100_characters(alice: Person, bob: Person) -> None:
    """A group whose name is missing, empty, too long or cannot be stored is 422."""
    for name in ("x", "🙂" * 100, " "):
        status, chat = await creates(alice, True, [bob.id], name=name)
        assert (status, chat.get("name")) == (201, name)
    for more in ({}, {"name": None}, {"name": ""}, {"name": "x" * 101}, {"name": "a\0b"}):
        status, problem = await creates(alice, True, [bob.id], **more)
        assert (status, problem["errors"][0]["loc"]) == (422, "$.name"), more


async def test_group_of_oneself_alone_is_refused(alice: Person) -> None:
    """A group without another user is 422, whether its creator is named or not."""
    answers = [await creates(alice, True, ids, name="x") for ids in ([], [alice.id])]
    assert [status for status, _ in answers] == [422, 422]
    assert await alice.gets("/chats") == []


async def test_unknown_participants_are_named(alice: Person, bob: Person) -> None:
    """Ids of nobody are 422, the error names all of them, and no group is made."""
    strange = [bob.id + 7, bob.id + 3, 2**63 - 1]
    status, problem = await creates(alice, True, [strange[0], bob.id, *strange[1:]], name="x")
    assert (status, problem["type"]) == (422, "invalid-input")
    named = " ".join(error["msg"] for error in problem["errors"])
    assert {int(number) for number in re.findall(r"\d+", named)} == set(strange)
    assert await alice.gets("/chats") == []


async def test_group_has_up_to_1000_participants(alice: Person, sql: asyncpg.Connection) -> None:
    """999 others make a group of 1,000 however often they are named; 1,000 others are 422."""
    others = await crowd(sql, 1000)
    status, problem = await creates(alice, True, others, name="x")
    assert (status, problem["type"]) == (422, "invalid-input")
    assert problem["errors"][0]["loc"] == "$.participant_ids"
    status, chat = await creates(alice, True, [*others[1:], alice.id, *others[1:]], name="x")
    assert (status, chat["participant_count"]) == (201, 1000)
    assert [one["user_id"] for one in chat["participants"]] == [alice.id, *others[1:100]]


async def test_owner_and_admins_rename(
    alice: Person, bob: Person, carol: Person, dave: Person
) -> None:
    """A new name raises the chat's `version` and is told to all; it takes no number and does not
    move the chat in the list. A member gets 403."""
    chat = await alice.founds(bob, carol, name="one")
    newer = await alice.founds(bob)
    await puts(alice, chat, bob, "admin")
    line, before = await carol.listens_live(chat), await alice.gets(f"/chats/{chat}")
    version = before["version"]
    for person, name in ((alice, "Два 🙂"), (bob, "x" * 100)):
        version += 1
        renamed = await person.expects(200, "PATCH", f"/chats/{chat}", {"name": name})
        assert renamed == before | {"name": name, "version": version}
        assert await carol.gets(f"/chats/{chat}") == renamed
        assert await line.hears() == {"type": "chat_updated", "data": {
            "chat_id": chat, "version": version, "name": name, "participants": [], "left": [],
        }}
    problem = await carol.expects(403, "PATCH", f"/chats/{chat}", {"name": "hers"})
    assert problem["type"] == "not-allowed"
    problem = await dave.expects(404, "PATCH", f"/chats/{chat}", {"name": "his"})
    assert problem["type"] == "chat-not-found"
    for name in ("", "x" * 101, "a\0b", None):
        problem = await alice.expects(422, "PATCH", f"/chats/{chat}", {"name": name})
        assert problem["errors"][0]["loc"] == "$.name"
    assert await alice.expects(200, "PATCH", f"/chats/{chat}", {"name": "x" * 100}) == renamed
    assert [one["id"] for one in await alice.gets("/chats")] == [newer, chat]
    await removes(bob, chat, bob)
    await bob.expects(404, "PATCH", f"/chats/{chat}", {"name": "too late"})
    assert (await line.hears())["data"]["version"] == version + 1


async def test_personal_chat_has_no_name(alice: Person, bob: Person) -> None:
    """Naming a personal chat is 409."""
    chat = await alice.opens(bob)
    problem = await alice.expects(409, "PATCH", f"/chats/{chat}", {"name": "us"})
    assert problem["type"] == "personal-chat"
    assert (await bob.gets(f"/chats/{chat}"))["name"] is None


# ---- The list


async def test_chats_are_listed_by_activity(alice: Person, bob: Person, carol: Person) -> None:
    """The caller's own chats are listed, the most recently active first, by the last message posted
    or else the chat's creation."""
    one = await alice.founds(bob, name="one")
    two = await alice.founds(bob, name="two")
    three = await alice.opens(bob)
    await carol.opens(alice)
    await carol.founds(alice, name="without bob")

    async def listed() -> list[int]:
        return [chat["id"] for chat in await bob.gets("/chats")]

    assert await listed() == [three, two, one]
    sent = await alice.says(one, "up")
    assert await listed() == [one, three, two]
    await bob.says(two, "up")
    assert await listed() == [two, one, three]
    await bob.reads(one, sent)
    await puts(alice, one, carol)
    assert await listed() == [two, one, three]
    assert (await bob.gets("/chats"))[1] == await bob.gets(f"/chats/{one}")
    assert (await bob.gets("/chats"))[1]["last_message"] == await bob.gets(
        f"/chats/{one}/messages/{sent['id']}"
    )


async def test_list_of_chats_is_paged_to_the_end(alice: Person, bob: Person) -> None:
    """`limit` and the Link lead through all chats once, and the Link is absent at the end."""
    made = [await alice.founds(bob, name=f"group {number}") for number in range(5)]
    expected = made[::-1]
    for limit, sizes in ((1, [1] * 5), (2, [2, 2, 1]), (4, [4, 1]), (5, [5]), (100, [5])):
        found = await pages(bob, f"/chats?limit={limit}")
        assert [len(page) for page in found] == sizes, limit
        assert [chat["id"] for page in found for chat in page] == expected, limit


async def test_paging_survives_equal_times(
    alice: Person, bob: Person, sql: asyncpg.Connection
) -> None:
    """Chats that were active at one and the same moment are each listed once."""
    made = [await alice.founds(bob, name=f"group {number}") for number in range(5)]
    await sql.execute("update chats set active_at = '2026-11-22 20:15:37.123456Z'")
    found = await pages(bob, "/chats?limit=2")
    assert sorted(chat["id"] for page in found for chat in page) == made


async def test_fifty_chats_are_listed_unless_asked_otherwise(
    alice: Person, bob: Person, sql: asyncpg.Connection
) -> None:
    """A page has 50 by default and 100 at most."""
    await sql.execute(
        "with made as (insert into chats (is_group, name, participant_count)"
        " select true, 'x', 1 from generate_series(1, 101) returning id)"
        " insert into participants (chat_id, user_id, role) select id, $1, 'owner' from made",
        alice.id,
    )
    assert [len(page) for page in await pages(alice, "/chats")] == [50, 50, 1]
    assert [len(page) for page in await pages(alice, "/chats?limit=100")] == [100, 1]
    assert await bob.gets("/chats") == []


async def unread(person: Person, chat: int) -> int:
    """The unread count, which the list and the chat itself agree on."""
    (listed,) = [one for one in await person.gets("/chats") if one["id"] == chat]
    assert listed == await person.gets(f"/chats/{chat}")
    return int(listed["unread_count"])


async def test_unread_are_the_messages_of_others(
    alice: Person, bob: Person, sql: asyncpg.Connection
) -> None:
    """Others' messages above the watermark are unread; one's own and tombstones never are, and
    posting reads nothing."""
    chat = await alice.opens(bob)
    first = await alice.says(chat, "1")
    second = await alice.says(chat, "2")
    assert (await unread(alice, chat), await unread(bob, chat)) == (0, 2)
    await bob.says(chat, "3")
    assert (await unread(alice, chat), await unread(bob, chat)) == (1, 2)
    await bob.reads(chat, first)
    assert (await unread(alice, chat), await unread(bob, chat)) == (1, 1)
    await sql.execute(
        "update messages set text = '', deleted_at = now() where id = $1", second["id"]
    )
    assert (await unread(alice, chat), await unread(bob, chat)) == (1, 0)


async def test_unread_is_counted_up_to_100(alice: Person, bob: Person) -> None:
    """101 unread messages are shown as 100, 99 as 99."""
    chat = await alice.opens(bob)
    await asyncio.gather(*(alice.says(chat, "x") for _ in range(99)))
    assert await unread(bob, chat) == 99
    await alice.says(chat, "x")
    assert await unread(bob, chat) == 100
    await alice.says(chat, "x")
    assert await unread(bob, chat) == 100


# ---- Participants


async def test_any_participant_adds(
    alice: Person, bob: Person, carol: Person, dave: Person
) -> None:
    """Any member may add a user, by body or by path: 201 with a Location, and 200 once the user is
    in."""
    chat = await alice.founds(bob)
    version = (await bob.gets(f"/chats/{chat}"))["version"]
    answer = await bob.asks("POST", f"/chats/{chat}/participants", {"user_id": carol.id})
    assert answer.status == 201
    assert answer.headers["Location"] == f"/api/v1/chats/{chat}/participants/{carol.id}"
    participant = await answer.json()
    assert participant == {
        "user_id": carol.id, "username": "carol", "role": "member", "last_read_seq": 0,
    }
    assert (await bob.gets(f"/chats/{chat}"))["version"] > version
    version = (await bob.gets(f"/chats/{chat}"))["version"]
    path = f"/chats/{chat}/participants"
    assert await bob.posts(path, {"user_id": carol.id}, 200) == participant
    assert await alice.posts(f"{path}/{carol.id}", None, 200) == participant
    assert await bob.posts(f"{path}/{alice.id}", {}, 200)
    assert (await bob.gets(f"/chats/{chat}"))["version"] == version
    answer = await carol.asks("POST", f"/chats/{chat}/participants/{dave.id}")
    assert answer.status == 201
    assert answer.headers["Location"] == f"/api/v1/chats/{chat}/participants/{dave.id}"
    assert list(await roles(dave, chat)) == [alice.id, bob.id, carol.id, dave.id]
    assert (await dave.gets(f"/chats/{chat}"))["participant_count"] == 4


async def test_only_the_owner_gives_roles(alice: Person, bob: Person, carol: Person) -> None:
    """The owner may add with a role and change a role (200); from anybody else a role is 403."""
    chat = await alice.founds(bob)
    assert await puts(bob, chat, carol, "member") == (403, "owner-only")
    assert await puts(bob, chat, carol, "admin") == (403, "owner-only")
    assert await puts(bob, chat, bob, "owner") == (403, "owner-only")
    assert await puts(alice, chat, carol, "admin") == (201, "admin")
    assert await puts(carol, chat, bob, "admin") == (403, "owner-only")
    assert await puts(carol, chat, carol, "member") == (403, "owner-only")
    version = (await bob.gets(f"/chats/{chat}"))["version"]
    assert await puts(alice, chat, bob, "admin") == (200, "admin")
    assert (await bob.gets(f"/chats/{chat}"))["version"] > version
    assert await puts(alice, chat, bob) == (200, "admin")
    assert (await alice.posts(f"/chats/{chat}/participants/{carol.id}", {"role": "member"}, 200))[
        "role"
    ] == "member"
    assert await roles(carol, chat) == {alice.id: "owner", bob.id: "admin", carol.id: "member"}
    status, problem = await puts(alice, chat, bob, "king")
    assert (status, problem) == (422, "invalid-input")


async def test_owner_hands_ownership_on(
    alice: Person, bob: Person, carol: Person, dave: Person
) -> None:
    """Giving `owner` to another, also to a newcomer, makes the caller an admin."""
    chat = await alice.founds(bob)
    assert await puts(alice, chat, bob, "owner") == (200, "owner")
    assert await roles(alice, chat) == {alice.id: "admin", bob.id: "owner"}
    assert await puts(alice, chat, alice, "owner") == (403, "owner-only")
    assert await puts(bob, chat, carol, "owner") == (201, "owner")
    assert await roles(alice, chat) == {alice.id: "admin", bob.id: "admin", carol.id: "owner"}


async def test_owner_does_not_step_down_alone(alice: Person, bob: Person) -> None:
    """An owner who gives themself another role gets 409; giving the role that they have is 200."""
    chat = await alice.founds(bob)
    assert await puts(alice, chat, alice, "admin") == (409, "owner-stays")
    assert await puts(alice, chat, alice, "member") == (409, "owner-stays")
    assert await puts(alice, chat, alice, "owner") == (200, "owner")
    assert await puts(alice, chat, alice) == (200, "owner")
    assert await roles(bob, chat) == {alice.id: "owner", bob.id: "member"}


async def test_ownership_is_handed_to_one_of_many_at_once(
    alice: Person, bob: Person, carol: Person, sql: asyncpg.Connection
) -> None:
    """Two transfers of ownership at the same time leave one owner."""
    chat = await alice.founds(bob, carol)
    answers = await at_once(
        sql, chat, puts(alice, chat, bob, "owner"), puts(alice, chat, carol, "owner")
    )
    assert sorted(answers) == [(200, "owner"), (403, "owner-only")]
    assert sorted((await roles(alice, chat)).values()) == ["admin", "member", "owner"]


async def test_unknown_user_cannot_be_added(alice: Person, bob: Person) -> None:
    """Adding an id of nobody is 404 user-not-found, by body and by path, with a role and
    without."""
    chat = await alice.founds(bob)
    version = (await bob.gets(f"/chats/{chat}"))["version"]
    for user_id in (bob.id + 1, 2**63 - 1):
        assert await puts(alice, chat, user_id) == (404, "user-not-found")
        assert await puts(alice, chat, user_id, "owner") == (404, "user-not-found")
        answer = await bob.asks("POST", f"/chats/{chat}/participants/{user_id}")
        assert (answer.status, (await answer.json())["type"]) == (404, "user-not-found")
    assert await roles(bob, chat) == {alice.id: "owner", bob.id: "member"}
    assert (await bob.gets(f"/chats/{chat}"))["version"] == version


async def test_group_is_full_at_1000(
    alice: Person, bob: Person, carol: Person, sql: asyncpg.Connection
) -> None:
    """Of two who would join as the 1,000th one is refused with 409; for whoever is already in it is
    200."""
    others = await crowd(sql, 998)
    _, chat = await creates(alice, True, others, name="x")
    assert chat["participant_count"] == 999
    coming = (puts(alice, chat["id"], one) for one in (bob, carol))
    answers = await at_once(sql, chat["id"], *coming)
    assert sorted(answers) == [(201, "member"), (409, "group-full")]
    assert await puts(alice, chat["id"], others[0]) == (200, "member")
    assert await puts(alice, chat["id"], others[0], "admin") == (200, "admin")
    assert (await alice.gets(f"/chats/{chat['id']}"))["participant_count"] == 1000
    assert await removes(alice, chat["id"], others[1]) == 204
    assert (await alice.gets(f"/chats/{chat['id']}"))["participant_count"] == 999


async def test_who_may_remove_whom(
    alice: Person, bob: Person, carol: Person, dave: Person, people: Any
) -> None:
    """The owner removes anyone, an admin removes members, a member nobody; whoever may not gets
    403."""
    erin = await people("erin")
    chat = await alice.founds(bob, carol, dave, erin)
    await puts(alice, chat, bob, "admin")
    await puts(alice, chat, carol, "admin")
    for person, target in (
        (dave, alice), (dave, bob), (dave, erin), (bob, alice), (bob, carol),
    ):
        assert await removes(person, chat, target) == (403, "not-allowed")
    version = (await bob.gets(f"/chats/{chat}"))["version"]
    assert await removes(bob, chat, dave) == 204
    assert (await bob.gets(f"/chats/{chat}"))["version"] > version
    assert await removes(bob, chat, dave) == (404, "user-not-found")
    assert await removes(bob, chat, erin.id + 1) == (404, "user-not-found")
    assert await removes(alice, chat, carol) == 204
    assert await removes(alice, chat, erin) == 204
    assert await roles(alice, chat) == {alice.id: "owner", bob.id: "admin"}
    assert (await alice.gets(f"/chats/{chat}"))["participant_count"] == 2


async def test_who_leaves_is_a_stranger(alice: Person, bob: Person, carol: Person) -> None:
    """Anyone may leave, with 204; from then on the chat is 404 to them and not in their list."""
    chat = await alice.founds(bob, carol)
    await puts(alice, chat, bob, "admin")
    message = await bob.says(chat, "before")
    for person in (bob, carol):
        assert await removes(person, chat, person) == 204
        assert await person.gets("/chats") == []
        assert (await person.gets(f"/chats/{chat}", 404))["type"] == "chat-not-found"
        await person.gets(f"/chats/{chat}/messages", 404)
        await person.gets(f"/chats/{chat}/messages/{message['id']}", 404)
        await person.says(chat, "after", 404)
        await person.says(chat, "before", 404, id=message["id"])
        assert await removes(person, chat, person) == (404, "chat-not-found")
        assert await puts(person, chat, person) == (404, "chat-not-found")
    assert await alice.history(chat) == ["before"]
    assert (await alice.gets(f"/chats/{chat}"))["last_rev"] == 1


async def test_owner_who_leaves_is_followed(
    alice: Person, bob: Person, carol: Person, dave: Person
) -> None:
    """The longest-standing admin follows an owner who leaves, else the longest-standing member;
    with the last participant the chat goes."""
    chat = await alice.founds(dave, carol)
    await puts(alice, chat, bob, "admin")
    await puts(alice, chat, carol, "admin")
    assert await removes(alice, chat, alice) == 204
    assert await roles(dave, chat) == {dave.id: "member", carol.id: "owner", bob.id: "admin"}
    assert await removes(carol, chat, carol) == 204
    assert await roles(dave, chat) == {dave.id: "member", bob.id: "owner"}
    await puts(bob, chat, alice)
    assert await removes(bob, chat, bob) == 204
    assert await roles(dave, chat) == {dave.id: "owner", alice.id: "member"}
    assert await removes(dave, chat, alice) == 204
    assert await removes(dave, chat, dave) == 204
    for person in (alice, bob, carol, dave):
        await person.gets(f"/chats/{chat}", 404)
        assert await person.gets("/chats") == []


async def test_joiner_sees_everything_and_has_read_it(
    alice: Person, bob: Person, carol: Person
) -> None:
    """Whoever joins sees the whole history as read: their watermark is its newest `seq`."""
    chat = await alice.founds(bob)
    assert (await alice.posts(f"/chats/{chat}/participants/{carol.id}"))["last_read_seq"] == 0
    for text in ("1", "2", "3"):
        await alice.says(chat, text)
    assert await unread(carol, chat) == 3
    assert await removes(carol, chat, carol) == 204
    assert (await bob.posts(f"/chats/{chat}/participants/{carol.id}"))["last_read_seq"] == 3
    assert await carol.history(chat) == ["1", "2", "3"]
    assert await unread(carol, chat) == 0
    await alice.says(chat, "4")
    assert await unread(carol, chat) == 1
    assert await unread(bob, chat) == 4


async def test_first_hundred_participants_are_named(
    alice: Person, bob: Person, sql: asyncpg.Connection
) -> None:
    """A chat counts everybody and names the first hundred, oldest members first."""
    others = await crowd(sql, 120)
    _, chat = await creates(alice, True, others[::-1], name="x")
    await puts(alice, chat["id"], bob)
    for person in (alice, bob):
        shown = await person.gets(f"/chats/{chat['id']}")
        assert shown["participant_count"] == 122
        named = [one["user_id"] for one in shown["participants"]]
        assert named == [alice.id, *others[:20:-1]]


async def test_participants_are_listed_by_id(
    alice: Person, bob: Person, carol: Person, sql: asyncpg.Connection
) -> None:
    """`limit` and the Link lead through all participants once, by user id and not by when they
    joined; a page has 50 by default and 100 at most."""
    chat, personal = await carol.founds(bob), await carol.opens(bob)
    read = await bob.says(chat, "x")
    await carol.reads(chat, read)
    await puts(bob, chat, alice, None)
    for one in (alice, carol):
        assert await one.gets(f"/chats/{chat}/participants") == [
            {"user_id": alice.id, "username": "alice", "role": "member", "last_read_seq": 1},
            {"user_id": bob.id, "username": "bob", "role": "member", "last_read_seq": 0},
            {"user_id": carol.id, "username": "carol", "role": "owner", "last_read_seq": 1},
        ]
    listed = await bob.gets(f"/chats/{personal}/participants")
    assert [(one["user_id"], one["role"]) for one in listed] == [
        (bob.id, "member"), (carol.id, "member")
    ]
    path, others = f"/chats/{chat}/participants", await crowd(sql, 99)
    await sql.execute(
        "insert into participants (chat_id, user_id, role)"
        " select $1, id, 'member' from unnest($2::bigint[]) id order by id desc",
        chat, others,
    )
    everyone = [alice.id, bob.id, carol.id, *others]
    for limit, sizes in (("", [50, 50, 2]), ("?limit=100", [100, 2]), ("?limit=51", [51, 51])):
        found = await pages(alice, path + limit)
        assert [len(page) for page in found] == sizes
        assert [one["user_id"] for page in found for one in page] == everyone
    assert [one["user_id"] for one in await alice.gets(f"{path}?after={others[-2]}")] == others[-1:]
    for after in (others[-1], 2**63 - 1):
        assert await alice.gets(f"{path}?after={after}") == []


# ---- Strangers


async def test_stranger_finds_no_chat(alice: Person, bob: Person, carol: Person) -> None:
    """To a stranger every endpoint of a chat answers as if the chat did not exist: the same 404."""
    assert len(requests_about(1, "x", 1)) >= 14
    for chat in (await alice.opens(bob), await alice.founds(bob)):
        message = (await alice.says(chat, "secret"))["id"]
        there = requests_about(chat, message, bob.id)
        nowhere = requests_about(2**40, str(uuid4()), bob.id)
        for one, other in zip(there, nowhere, strict=True):
            seen = []
            for method, path, body in (one, other):
                async with carol.client.request(
                    method, path, json=body, headers=carol.headers | {"X-Request-Id": "same"}
                ) as answer:
                    seen.append((answer.status, await answer.text()))
            assert seen[0] == seen[1], one
            assert seen[0][0] == 404, one
            assert '"chat-not-found"' in seen[0][1], one
        with pytest.raises(aiohttp.WSServerHandshakeError, match="404"):
            await carol.listens(chat)
        assert await carol.gets("/chats") == []
        assert await alice.history(chat) == ["secret"]
        assert (await alice.gets(f"/chats/{chat}"))["participant_count"] == 2


async def test_participant_is_served_where_a_stranger_is_not(alice: Person, bob: Person) -> None:
    """The same requests are answered when a participant sends them: it is the stranger who is
    refused."""
    chat = await alice.founds(bob)
    message = (await alice.says(chat, "secret"))["id"]
    for method, path, body in requests_about(chat, message, bob.id):
        async with alice.client.request(method, path, json=body, headers=alice.headers) as answer:
            upgrade = path.startswith("/ws")
            assert answer.status < 400 or (upgrade and answer.status == 426), (method, path)
