"""Verifying finds each thing that can be wrong in a database, and names who has it."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest

from support.databases import (
    TEMPLATE,
    drop_database,
    fills_with_life,
    on_cluster,
    with_database,
)
from tools.verify import RULES, examine


@pytest.fixture(scope="module")
def lively_url(cluster: str) -> Iterator[str]:
    """A database in which something of everything is."""
    name = f"messenger_lively_{os.getpid()}"
    url = with_database(cluster, name)

    async def make() -> None:
        await on_cluster(cluster, f"create database {name} template {TEMPLATE}")
        connection = await asyncpg.connect(url)
        await fills_with_life(connection)
        await connection.close()

    asyncio.run(make())
    yield url
    drop_database(cluster, name)


@pytest.fixture
async def lively(lively_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to it; what is done over it is undone."""
    connection = await asyncpg.connect(lively_url)
    await connection.execute("begin; set local session_replication_role = replica")  # no keys
    yield connection
    await connection.execute("rollback")
    await connection.close()


async def test_nothing_is_wrong_where_everything_was_used(lively: asyncpg.Connection) -> None:
    """A database that only the messenger wrote to keeps every rule, and what is in it is counted.
    """
    found = await examine(lively)
    assert found.broken == {}
    assert found.counts["accounts"] == 4
    assert found.counts["deleted accounts"] == 1
    assert found.counts["messages"] == 16
    assert found.counts["edits and deletions"] == 8
    assert min(found.counts.values()) > 0


async def test_what_was_written_before_marks_came_breaks_no_rule(
    lively: asyncpg.Connection
) -> None:
    """Where changes have no marks, an edit that was edited again leaves no trace, and that is no
    fault; what came later is looked into all the same."""
    await lively.execute("""
        update messages set mark = '0', changed_mark = null where chat_id = 1;
        delete from revisions where chat_id = 1;
        update chats set last_mark = '0' where id = 1""")
    assert (await examine(lively)).broken == {}
    await lively.execute("""
        insert into revisions values (1, 14, 'later');
        update messages set rev = 14, changed_mark = 'later' where chat_id = 1 and seq = 3;
        update chats set last_rev = 14, last_mark = 'later' where id = 1""")
    assert (await examine(lively)).broken == {}
    await lively.execute("update chats set last_rev = 15 where id = 1")
    assert (await examine(lively)).broken == {
        "the numbers of a chat have no holes, and none is taken twice": ["chat 1 lacks 15"],
        "last_mark is the mark of last_rev": ["chat 1"]}


PLANTED = [
    ("no holes", "delete from messages where chat_id = 1 and seq = 6", "chat 1 lacks 6"),
    ("no holes", "delete from messages where chat_id = 2 and seq = 1", "chat 2 lacks 1"),
    ("no holes", "delete from revisions where chat_id = 1 and rev = 9", "lacks 9"),
    ("no holes", "update chats set last_rev = last_rev + 1 where id = 2", "chat 2"),
    ("no holes", "insert into revisions values (1, 5, 'mark')", "chat 1 has two of 5"),
    ("last_rev and last_seq", "update chats set last_seq = 7 where id = 1", "chat 1"),
    ("last_rev and last_seq", "update chats set last_rev = 3 where id = 2", "chat 2"),
    ("last_rev and last_seq", "delete from messages where chat_id = 2", "chat 2"),
    ("rev of a message", "update messages set rev = 1 where chat_id = 1 and seq = 5", "message 5"),
    ("rev of a message", "update messages set rev = 11 where chat_id = 1 and seq = 8", "message 8"),
    ("noted with its mark", "update revisions set mark = 'x' where chat_id = 1 and rev = 11",
     "chat 1, message 3"),
    ("noted with its mark", "update messages set changed_mark = null where seq = 3", "message 3"),
    ("noted with its mark", "update messages set changed_mark = 'x' where seq = 8", "message 8"),
    ("last_mark", "update chats set last_mark = 'x' where id = 1", "chat 1"),
    ("message id is one", """alter table messages drop constraint messages_id;
     update messages set id = (select id from messages where chat_id = 1 and seq = 7)
     where chat_id = 1 and seq = 8""", "chat 1, id"),
    ("a reply", "update messages set reply_to = gen_random_uuid() where seq = 6", "message 6"),
    ("no text", "update messages set text = 'left' where deleted_at is not null", "message 4"),
    ("no text", "update messages set text = '' where seq = 8", "message 8"),
    ("watermark is between", "update participants set last_read_seq = 9 where user_id = 2",
     "user 2"),
    ("watermark is between", "update participants set joined_seq = 8 where user_id = 2", "user 2"),
    ("step of a reader", "update reads set seq = 8 where seq = 7", "user 2"),
    ("step of a reader", "update reads set from_seq = seq", "user 2"),
    ("are counted", "update chats set participant_count = 9 where id = 1", "chat 1 says 9"),
    ("are counted", "delete from participants where chat_id = 2 and user_id = 1", "chat 2 says 2"),
    ("one owner", "update participants set role = 'owner' where user_id = 2 and chat_id = 1",
     "chat 1"),
    ("one owner", "update participants set role = 'member' where chat_id = 1", "chat 1"),
    ("one owner", "update participants set user_id = 5 where chat_id = 2 and user_id = 1",
     "chat 2"),
    ("one owner", "update chats set low_user_id = null where id = 2", "chat 2"),
    ("one after the other", """alter table participants alter ordinal set generated by default;
     update participants set ordinal = 1 where chat_id = 1""", "chat 1, ordinal 1"),
    ("later version", "update departures set version = 99", "chat 1"),
    ("in a chat has its chat", "delete from chats where id = 2", "chat 2 is none, and has"),
    ("in a chat has its chat", "insert into reads values (7, 1, 0, 1, now())", "chat 7"),
    ("in a chat has its chat", "insert into message_words values (7, 1, '{}')", "has words"),
    ("of a user has its user", "delete from users where id = 2", "user 2 is none, and has"),
    ("of a user has its user", "update messages set sender_id = 77 where seq = 1", "has messages"),
    ("deleted account", "update users set email = 'back' where id = 4", "user 4"),
    ("deleted account", "insert into sessions (user_id) values (4)", "user 4"),
    ("index of words", "delete from message_words where chat_id = 1 and seq = 3", "message 3"),
    ("index of words", "update search_positions set rev = 99 where chat_id = 2", "up to 99"),
    ("index of words", "insert into message_words values (1, 99, '{}')", "message 99 is none"),
    ("given next", "alter table users alter id restart with 2", "users"),
    ("given next", "alter table chats alter id restart with 1", "chats"),
]


@pytest.mark.parametrize(("rule", "change", "named"), PLANTED, ids=[each[1] for each in PLANTED])
async def test_what_was_changed_by_hand_is_found(
    lively: asyncpg.Connection, rule: str, change: str, named: str, capsys: Any
) -> None:
    """Where a row is changed by hand, the rule that it breaks is told, with who breaks it."""
    await lively.execute(change)
    found = await examine(lively)
    [broken] = [each for each in found.broken if rule in each]
    assert any(named in each for each in found.broken[broken]), found.broken
    found.tell()
    told = capsys.readouterr().out
    assert f"WRONG: {broken}" in told
    assert f"{len(RULES) - len(found.broken)} of {len(RULES)} rules hold" in told


def test_each_rule_is_broken_once() -> None:
    """Each rule is broken by at least one of the changes."""
    assert {each for each in RULES if not any(rule in each for rule, _, _ in PLANTED)} == set()
