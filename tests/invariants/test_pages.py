"""What is put together of plain rows is what the views say of each message and each chat alone."""

import random
from datetime import timedelta
from typing import Any

import asyncpg
import msgspec
import pytest

import messenger
from plumbing import marks
from support.databases import crowd
from support.people import Person

MESSAGES = 40
SEEDS = range(4)
VIEWED = "select row_to_json(v) from message_view v where v.chat_id = $1 order by v.seq"
LISTED = """
    select row_to_json(v) from chat_view v where v.reader_id = $1
    order by v.active_at desc, v.id desc"""


def as_shape(shape: Any, value: Any) -> Any:
    """Read JSON, or what was JSON, as its shape."""
    if isinstance(value, str):
        return msgspec.json.decode(value, type=shape)
    return msgspec.convert(value, shape)


async def fill(sql: asyncpg.Connection, chance: random.Random, chat: int, users: list[int]) -> None:
    """Put messages into a chat whose numbers have holes, and have its participants read them:
    some steps are remembered and some are not, some joined late, some stopped on the way.
    """
    seqs = sorted(chance.sample(range(1, 3 * MESSAGES), MESSAGES))
    await sql.executemany(
        "insert into messages (chat_id, seq, rev, id, sender_id, text, created_at, deleted_at)"
        " values ($1, $2, $2, gen_random_uuid(), $3, 'text', now(),"
        " case when $4 then now() end)",
        [(chat, seq, chance.choice(users), chance.random() < 0.1) for seq in seqs],
    )
    for user in users:
        joined = chance.choice([0, 0, *seqs])
        stops = sorted(chance.sample(seqs, chance.randint(0, 8)))
        stops = [stop for stop in stops if stop > joined]
        if chance.random() < 0.3:
            stops = [*stops[:-1], seqs[-1]] if joined < seqs[-1] else stops
        at = joined
        for second, stop in enumerate(stops, chance.randint(1, 5)):
            if chance.random() < 0.7:
                await sql.execute(
                    "insert into reads select $1, $2, $3, $4, 'epoch'::timestamptz + $5",
                    chat, user, at, stop, timedelta(seconds=second))
            at = stop
            await sql.execute(
                "update participants set last_read_seq = $3, joined_seq = $4,"
                " last_read_at = 'epoch'::timestamptz + $5 where chat_id = $1 and user_id = $2",
                chat, user, stop, joined, timedelta(seconds=second))
    await sql.execute(
        "update chats set last_seq = $2, last_rev = $2, active_at = now() where id = $1",
        chat, seqs[-1])


async def peopled(sql: asyncpg.Connection, people: Any, seed: int) -> tuple[Person, list[int]]:
    """Make a person and groups of theirs: a small one, one of over 100, and an empty one; of their
    users one is gone, and one's account is deleted but has not left yet.
    """
    alice, chance = await people("alice"), random.Random(seed)
    others, chats = await crowd(sql, 120), []
    for size in (8, 120, 3):
        ids = others[:size]
        body = {"is_group": True, "name": "a group", "participant_ids": ids}
        chats.append((await alice.posts("/chats", body))["id"])
        if size > 3:
            await fill(sql, chance, chats[-1], [alice.id, *ids])
    await sql.fetch("select remove_participant($1, $2, $3)", chats[0], alice.id, others[1])
    await sql.execute("select delete_user($1)", others[0])
    return alice, chats


@pytest.mark.parametrize("seed", SEEDS)
async def test_page_says_what_the_view_says(
    sql: asyncpg.Connection, people: Any, seed: int
) -> None:
    """Each page of history, each message and each list of chats is what the views say."""
    alice, chats = await peopled(sql, people, seed)
    for chat in chats[:2]:
        viewed = [as_shape(messenger.Message, row[0]) for row in await sql.fetch(VIEWED, chat)]
        assert any(message.read_count for message in viewed)
        for limit in (1, 7, MESSAGES):
            for bound in range(0, viewed[-1].seq + 2, 5):
                before = [each for each in viewed if each.seq < bound][-limit:]
                after = [each for each in viewed if each.seq > bound][:limit]
                for query, expected in ((f"before={bound}", before), (f"after={bound}", after)):
                    path = f"/chats/{chat}/messages?limit={limit}&{query}"
                    assert as_shape(list[messenger.Message], await alice.gets(path)) == expected
        for message in viewed[::9]:
            got = await alice.gets(f"/chats/{chat}/messages/{message.id}")
            assert as_shape(messenger.Message, got) == message


@pytest.mark.parametrize("seed", SEEDS)
async def test_changes_say_what_the_view_says(
    sql: asyncpg.Connection, people: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes, which may lie anywhere in a chat and so in several runs, are what the view says."""
    monkeypatch.setattr(marks, "RUN_GAP", 3)
    alice, chats = await peopled(sql, people, seed)
    for chat in chats[:2]:
        await sql.execute(
            "update messages set rev = 1000 + seq where chat_id = $1 and seq % 5 = 0", chat)
        viewed = [as_shape(messenger.Message, row[0]) for row in await sql.fetch(VIEWED, chat)]
        viewed.sort(key=lambda message: message.rev)
        for after in range(0, viewed[-1].rev + 2, 35):
            changed = [each for each in viewed if each.rev > after]
            got = await alice.gets(f"/chats/{chat}/changes?after={after}")
            assert as_shape(list[messenger.Message], got) == changed


@pytest.mark.parametrize("seed", SEEDS)
async def test_list_says_what_the_view_says(
    sql: asyncpg.Connection, people: Any, seed: int
) -> None:
    """Each chat of a list, and each chat alone, is what the view says."""
    alice, _chats = await peopled(sql, people, seed)
    listed = [as_shape(messenger.Chat, row[0]) for row in await sql.fetch(LISTED, alice.id)]
    assert [len(chat.participants) for chat in listed] == [3, 100, 7]
    assert as_shape(list[messenger.Chat], await alice.gets("/chats")) == listed
    for chat in listed:
        assert as_shape(messenger.Chat, await alice.gets(f"/chats/{chat.id}")) == chat
