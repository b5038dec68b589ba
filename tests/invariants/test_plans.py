"""Every statement reads through an index and touches few rows, however many messages there are.

Each SQL constant is run on a database where one chat has most of the messages, which is the worst
case for the planner: that a message is of this chat then says next to nothing. EXPLAIN shows the
plans, but not those within functions; so PostgreSQL's own counters are asked as well, which count
every scan of a table and every row that was touched, functions included. As the server
has statements planned, that holds whatever the planner knows of the tables.

What is held here for sixty thousand messages holds for a million: no statement touches more
rows than its page needs, wherever in the chat that is; and the more rows there are, the dearer is
the scan of a table against a walk down an index, to the planner too.
"""

import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import psycopg
import pytest

import messenger
from plumbing import database
from support.databases import LATER, TEMPLATE, drop_database, with_database
from support.source import statements

USERS, CHATS = 5_000, 10_000
MESSAGES = 60_000  # in the large chat
MESSAGES_EACH = 2  # in each of the others
PAGE = 20
# More than any step needs: of 20 chats up to 100 unread messages each are counted.
ROWS_MAX = 2_500

COMMON = 2_000  # messages that hold the same words: up to a stretch of them is looked through

ERASED_MESSAGES = 5_000  # of the erased chat
# Chats: the large one; one of which everything was deleted; one of many people; one of nobody.
BIG, ERASED, CROWD, EMPTY = 1, 40, 41, CHATS
READER, LEAVER, DELETED = 1, 2, 3  # users: one in many chats; one in few, who deleted the account
JOINER = USERS  # in no chat
CROWDED = USERS - 1  # in the crowd alone
FAR, NEAR = 50, MESSAGES - 50  # places in the large chat, near its two ends

EVERYBODY = f"""
insert into users (email, email_key, username, username_key, password_hash)
select e, e, n, n, 'hash'
from (select 'u' || g || '@example.com' as e, 'u' || g as n from generate_series(1, {USERS}) g) u;
update users set is_leaving = true, deleted_at = now() where id = {DELETED};
insert into sessions (user_id, ended_at, last_used_at)
select g % {USERS} + 1, case when g > {USERS} then now() - interval '1 day' end, now()
from generate_series(1, 2 * {USERS}) g;
insert into attempts (key, at)
select 'login:u' || g % {USERS}, now() - g * interval '1 minute' from generate_series(1, {USERS}) g;

insert into chats (
    is_group, name, version, participant_count, low_user_id, high_user_id, active_at,
    last_rev, last_seq)
select g % 2 = 1, 'chat', {CHATS} + 1, case g when {BIG} then 50 when {CROWD} then 3000
       when {EMPTY} then 0 else 2 end,
       case when g % 2 = 0 then g end, case when g % 2 = 0 then g + 1 end,
       now() - g * interval '1 second', {MESSAGES_EACH}, {MESSAGES_EACH}
from generate_series(1, {CHATS}) g;
insert into departures (chat_id, version, user_id)
select case when g <= 1000 then {BIG} else g end, g, g from generate_series(1, {CHATS}) g;
insert into search_positions (chat_id, rev)
select c, case c when {BIG} then {NEAR} else {MESSAGES_EACH} end
from generate_series(1, {CHATS}) c;
"""

SMALL_CHATS = f"""
insert into participants (chat_id, user_id, role, joined_at)
select g, case when g <= 40 then {READER} else g % 4000 + 60 end, 'owner', now() - interval '1 day'
from generate_series(2, {CHATS} - 1) g;
insert into messages (chat_id, seq, rev, id, sender_id, text, created_at)
select c, 1, 1, md5(c || '.1')::uuid, c % {USERS} + 1, 'some words', now()
from generate_series(2, {CHATS}) c;
insert into reads (chat_id, user_id, from_seq, seq, read_at)
select c, c % 4000 + 60, 0, 1, now() from generate_series(100, 3000) c;
insert into message_words (chat_id, seq, words)
select c, 1, search_keys(c, 0, array['some', 'words']) from generate_series(100, 3000) c;
"""

LARGE_CHAT = f"""
insert into participants (chat_id, user_id, role, joined_at)
select {CROWD}, g, 'member', now() - interval '1 day' from generate_series(2001, {CROWDED}) g
union all
select {BIG}, g, case g when 1 then 'owner' else 'member' end, now() - interval '1 day'
from generate_series(1, 50) g
union all
select g, case when g <= 20 then {DELETED} else (g + 7) % 4000 + 60 end, 'member',
       now() - interval '1 day'
from generate_series(2, {CHATS} - 1) g;
insert into messages (chat_id, seq, rev, id, sender_id, text, created_at)
select {BIG}, g, case when g % 100 = 0 then {MESSAGES} + g / 100 else g end,
       md5('big' || g)::uuid, g % 50 + 1, 'some words', now()
from generate_series(1, {MESSAGES}) g;
insert into messages (chat_id, seq, rev, id, sender_id, text, created_at)
select c, g, g, md5(c || '.' || g)::uuid, c % {USERS} + 1, 'some words', now()
from generate_series(2, {CHATS}) c, generate_series(2, {MESSAGES_EACH}) g;
insert into messages (chat_id, seq, rev, id, sender_id, text, created_at, deleted_at)
select {ERASED}, g, {ERASED_MESSAGES} + g, md5('erased' || g)::uuid, {USERS}, '', now(), now()
from generate_series({MESSAGES_EACH} + 1, {ERASED_MESSAGES}) g;
update chats set last_rev = {MESSAGES} + {MESSAGES} / 100, last_seq = {MESSAGES} where id = {BIG};
update chats set last_rev = 2 * {ERASED_MESSAGES}, last_seq = {ERASED_MESSAGES} where id = {ERASED};
insert into revisions (chat_id, rev, mark)
select {BIG}, {MESSAGES} + g, 'mark' from generate_series(1, {MESSAGES} / 100) g;
insert into reads (chat_id, user_id, from_seq, seq, read_at)
select {BIG}, u, s * 1000 - 1000, s * 1000, now()
from generate_series(1, 50) u, generate_series(1, {MESSAGES} / 1000) s;
update participants set last_read_seq = {MESSAGES} - 10 where chat_id = {BIG} and user_id > 1;
insert into message_words (chat_id, seq, words)
select {BIG}, g, search_keys({BIG}, g >> 16, case when g <= {COMMON} then array['some', 'words']
                                                  else array['w' || g] end)
from generate_series(1, 20000) g;
"""

SEQUENCES = "from pg_class where relkind = 'S' and relnamespace = 'public'::regnamespace"

# A first hour: a few people, a chat of three and two of two, some messages. Then all of it goes.
FIRST_HOUR = f"""
insert into users (id, email, email_key, username, username_key, password_hash)
overriding system value
select i, n, n, n, n, 'hash'
from unnest(array[1, 2, 3, 4, 5, 50, 51, 77, {CROWDED} - 1, {CROWDED}, {JOINER}]) i,
     cast('u' || i as text) n;
insert into sessions (id, user_id, last_used_at) overriding system value
values (77, 77, now()), (78, {READER}, now());
insert into chats (id, is_group, version, participant_count, low_user_id, high_user_id, active_at,
                   last_rev, last_seq) overriding system value
values ({BIG}, true, 3, 3, null, null, now(), {FAR}, {FAR}), (2, false, 2, 2, 1, 2, now(), 1, 1),
       ({CROWD}, true, 2, 2, null, null, now(), 1, 1);
insert into participants (chat_id, user_id, role)
values ({BIG}, 1, 'owner'), ({BIG}, 2, 'member'), ({BIG}, {FAR} + 1, 'member'),
       (2, 1, 'member'), (2, 2, 'member'),
       ({CROWD}, {CROWDED} - 1, 'owner'), ({CROWD}, {CROWDED}, 'member');
insert into messages (chat_id, seq, rev, id, sender_id, text, created_at)
values ({BIG}, {FAR}, {FAR}, md5('big{FAR}')::uuid, {FAR} + 1, 'some words', now()),
       (2, 1, 1, md5('2.1')::uuid, 1, 'words', now()),
       ({CROWD}, 1, 1, md5('{CROWD}.1')::uuid, {CROWDED}, 'words', now());
select setval(oid::regclass, {2 * CHATS}) {SEQUENCES};
"""
ALL_OF_IT_GOES = f"""
delete from messages; delete from participants; delete from sessions; delete from chats;
delete from users;
select setval(oid::regclass, 1, false) {SEQUENCES};
"""

ANALYZED = (EVERYBODY, LARGE_CHAT, SMALL_CHATS, "vacuum analyze")
NEVER_ANALYZED = (EVERYBODY, LARGE_CHAT, SMALL_CHATS)
ANALYZED_WHILE_SMALL = (EVERYBODY, SMALL_CHATS, "vacuum analyze", LARGE_CHAT)

# What each statement is asked, at the far end where it pages: the arguments by its name.
ID = UUID(int=0)
NEWEST = messenger.INT8_MAX


def arguments(stored: UUID, crowds: UUID) -> dict[str, list[tuple[Any, ...]]]:
    """Name what each statement is run with; some of them with more than one thing.

    One message is stored in the large chat, and one in the crowd's.
    """
    return {
        "INSERT_USER": [("a@b.de", "a@b.de", "newcomer", "newcomer", "hash")],
        "SELECT_USER": [(READER,)],
        "SELECT_LOGIN": [("u77@example.com",)],
        "SELECT_HASH": [(READER,)],
        "SELECT_LEAVING": [()],
        "SELECT_SESSIONS_ALIVE": [([77], [78], [""])],
        "USE_SESSION": [(77, 0)],
        "SELECT_SESSIONS": [(READER, 604_800, 0, PAGE)],
        "END_SESSION": [(77, 78, None), (77, 78, "")],
        "SELECT_CHATS": [
            (READER, None, messenger.PLACE_MAX, NEWEST, PAGE),
            (READER, [BIG], messenger.PLACE_MAX, NEWEST, 1),
            (READER, [2, 3, 4], messenger.PLACE_MAX, NEWEST, 3),
            (READER, [ERASED], messenger.PLACE_MAX, NEWEST, 1),
        ],
        "SELECT_PARTICIPANTS": [(BIG, READER, 0, PAGE), (CROWD, CROWDED, 0, PAGE)],
        "SELECT_MESSAGE": [(BIG, READER, stored)],
        "SELECT_MEMBERSHIP": [(BIG, READER), (CROWD, CROWDED)],
        "SELECT_FOLLOWED": [
            ([None], [READER], [NEWEST], 100), ([BIG], [READER], [NEWEST], 100),
            ([CROWD], [CROWDED], [NEWEST], 100)],
        "SELECT_JOINED": [(11,)],
        "CHECK_WRITABLE": [()],
        "HEARTBEAT": [("p", [], "1"), ("p", ["1"], "2")],
        "SELECT_POSITIONS": [([BIG, 2, 3],)],
        "SELECT_USERS": [("", "\U0010ffff", 100, PAGE), ("u777", "u777\U0010ffff", 0, PAGE)],
        "CHANGE_USER": [
            (READER, 1, "hash", "n@b.de", "n@b.de", "other", "other", "new", None, LATER),
            (READER, 1, None, None, None, None, None, None, False, LATER),
        ],
        "DELETE_USER": [(READER, LATER)],
        "LEAVE_NEXT_CHAT": [(DELETED,), (READER,)],
        "START_SESSION": [
            (READER, "hash", None, "agent", "login:u1", "login from:1.1.1.1", "k", LATER)],
        "PURGE_OLD": [(86_400, 604_800, 900, 7_776_000, 172_800, PAGE)],
        "SETTLE_CLOCK": [(PAGE,)],
        "END_OLDEST_SESSIONS": [(READER, 50)],
        "REFRESH_SESSION": [(77, 78, "", 0, 30, LATER), (77, 78, "", 7, 30, LATER)],
        "COUNT_ATTEMPT": [("login:u1", 900, 10)],
        "CREATE_GROUP": [(READER, "a group", [LEAVER, JOINER], LATER)],
        "OPEN_PERSONAL_CHAT": [(4, 5, LATER), (READER, JOINER, LATER)],
        "RENAME_CHAT": [
            (BIG, READER, "another name", LATER), (CROWD, CROWDED, "another name", LATER)],
        "PUT_PARTICIPANT": [
            (BIG, READER, JOINER, None, 1000, LATER), (BIG, READER, 2, "owner", 1000, LATER),
            (CROWD, CROWDED, JOINER, None, 9000, LATER)],
        "REMOVE_PARTICIPANT": [
            (BIG, READER, 2, LATER), (BIG, READER, READER, LATER),
            (CROWD, CROWDED, CROWDED, LATER)],
        "POST_MESSAGES": [
            ([BIG, 2, 4], [READER] * 3, [uuid4() for _ in range(3)], ["text"] * 3,
             [stored, None, ID], "m"),
            ([CROWD] * 2, [CROWDED - 1, CROWDED], [uuid4(), uuid4()], ["text"] * 2,
             [None, crowds], "m"),
        ],
        "POST_MESSAGE": [
            (BIG, READER, uuid4(), "text", None, "m"), (2, READER, uuid4(), "text", ID, "m"),
            (CROWD, CROWDED, uuid4(), "text", None, "m")],
        "SELECT_MARKS": [([BIG, 2, EMPTY], READER, [FAR, 1, 1]), ([CROWD], CROWDED, [1])],
        "SELECT_FREE_CHATS": [([BIG, 2, 3],)],
        "SELECT_FREE_PARTICIPANTS": [
            ([BIG, 2, 3], [READER, READER, JOINER]), ([CROWD], [CROWDED])],
        "CHANGE_MESSAGES": [
            ([BIG], [FAR + 1], [stored], ["text"], [LATER], "m"),
            ([BIG], [1], [stored], [None], [LATER], "m"),
            ([CROWD], [CROWDED], [crowds], ["text"], [LATER], "m")],
        "READ_MESSAGES": [
            ([BIG, 2], [READER, READER], [stored, ID]), ([CROWD], [CROWDED], [crowds])],
        "SELECT_MESSAGES_BEFORE": [
            (BIG, READER, NEWEST, PAGE), (BIG, READER, FAR, PAGE)],
        "SELECT_MESSAGES_AFTER": [
            (BIG, READER, FAR, PAGE), (BIG, READER, NEAR, PAGE)],
        "SELECT_MESSAGES_FOUND": [
            (BIG, READER, NEWEST, ["w7777"], PAGE, True),
            (BIG, READER, FAR, ["some", "words"], PAGE, True),
            (BIG, READER, NEWEST, ["w7777"], PAGE, False),
            (BIG, READER, FAR, ["some", "words"], PAGE, False),
        ],
        "SELECT_MISSED": [
            (BIG, READER, FAR, NEWEST, PAGE), (BIG, READER, NEAR, NEAR + 10, PAGE),
            (BIG, READER, MESSAGES + 10, NEWEST, PAGE), (ERASED, READER, 0, NEWEST, PAGE),
        ],
        "SELECT_READERS": [
            (BIG, [NEAR], [NEAR + PAGE]),
            (BIG, [*range(FAR, NEAR, NEAR // PAGE)], [*range(FAR, NEAR, NEAR // PAGE)]),
        ],
        "SELECT_UNINDEXED": [(BIG, PAGE), (ERASED, PAGE)],
        "INDEX_WORDS": [(BIG, NEAR, NEAR + 2, [NEAR + 1, NEAR + 2], ["some words", "more"])],
        "SWEEP_EMPTY_CHAT": [(PAGE,)],
        "SELECT_ACCOUNT": [("u77@example.com",)],
        "SELECT_ACCOUNTS": [(100, PAGE)],
        "DISABLE_USER": [(READER, True, LATER), (READER, False, LATER)],
        "RESET_PASSWORD": [(READER, "hash", LATER)],
        "SELECT_ROOM": [
            (BIG, NEAR, 990, 10, PAGE), (BIG, FAR, 990, 10, PAGE), (ERASED, 0, 0, 10, PAGE)],
    }


# ---- What PostgreSQL tells

COUNTERS = """
    select c.relname as name, c.relkind = 'r' as is_table,
           pg_stat_get_xact_numscans(c.oid) as scans,
           greatest(pg_stat_get_xact_tuples_returned(c.oid),
                    pg_stat_get_xact_tuples_fetched(c.oid)) as touched
    from pg_class c
    where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'i')
      and c.relname !~ 'yoyo'"""
TABLES = """
    select relname from pg_class where relnamespace = 'public'::regnamespace and relkind = 'r'"""


@contextlib.contextmanager
def filled(cluster: str, steps: Sequence[str]) -> Iterator[str]:
    """Make a database with one large chat among many, in some steps, for a while; answer its URL.
    The planner learns of it only what the steps have it learn.
    """
    name = f"messenger_full_{uuid4().hex}"
    with psycopg.connect(cluster, autocommit=True) as connection:
        connection.execute(f"create database {name} template {TEMPLATE}".encode())
        url = with_database(cluster, name)
        with psycopg.connect(url, autocommit=True) as altering:
            for (table,) in altering.execute(TABLES).fetchall():
                altering.execute(f"alter table {table} set (autovacuum_enabled = off)".encode())
        fill(url, steps)
        try:
            yield url
        finally:
            drop_database(cluster, name)


def fill(url: str, steps: Sequence[str]) -> None:
    """Fill a database in some steps."""
    with psycopg.connect(url, autocommit=True) as filling:
        for step in steps:
            filling.execute(step.encode())


@contextlib.asynccontextmanager
async def undone(url: str, **settings: str) -> AsyncIterator[asyncpg.Connection]:
    """Connect to a database; what is done there is taken back."""
    connection = await asyncpg.connect(url, server_settings={"jit": "off", **settings})
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield connection
    finally:
        await transaction.rollback()
        await connection.close()


@pytest.fixture(scope="module")
def full_url(cluster: str) -> Iterator[str]:
    """The URL of a database with one large chat among many, of which the planner knows."""
    with filled(cluster, ANALYZED) as url:
        yield url


@pytest.fixture
async def full(full_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to that database; what is done there is taken back."""
    async with undone(full_url) as connection:
        yield connection


async def asked(sql: asyncpg.Connection) -> list[tuple[str, str, tuple[Any, ...]]]:
    """Every statement with each thing that it is asked."""
    stored, crowds = [
        await sql.fetchval("select id from messages where chat_id = $1 and seq = $2", chat, seq)
        for chat, seq in ((BIG, FAR), (CROWD, 1))]
    questions = arguments(stored, crowds)
    assert set(questions) == {name for name, _ in statements()}
    return [(name, text, one) for name, text in statements() for one in questions[name]]


async def complaints(sql: asyncpg.Connection, text: str, given: tuple[Any, ...]) -> list[str]:
    """What is wrong with what a statement did: it read a whole table, or touched many rows."""
    before = await sql.fetch(COUNTERS)
    await sql.fetch(text, *given)
    after = await sql.fetch(COUNTERS)
    found = []
    for then, now in zip(before, after, strict=True):
        touched = now["touched"] - then["touched"]
        if now["is_table"] and now["scans"] > then["scans"]:
            found.append(f"reads all of {now['name']}")
        elif touched > ROWS_MAX:
            found.append(f"touches {touched} rows of {now['name']}")
    return found


async def complaints_of_all(sql: asyncpg.Connection) -> set[str]:
    """What is wrong with any statement, as it is planned here."""
    found = set()
    for name, text, given in await asked(sql):
        transaction = sql.transaction()
        await transaction.start()
        found |= {f"{name} {why}" for why in await complaints(sql, text, given)}
        await transaction.rollback()
    return found


async def all_complaints(sql: asyncpg.Connection) -> set[str]:
    """What is wrong with any statement: planned for what it is asked, for anything, and as the
    server has it planned.
    """
    found = set()
    for settings in (
        {"plan_cache_mode": "force_custom_plan"}, {"plan_cache_mode": "force_generic_plan"},
        database.PLANS,
    ):
        for name, value in settings.items():
            await sql.execute(f"set {name} = {value}")
        await sql.execute("discard plans")
        found |= await complaints_of_all(sql)
    return found


def scanned(plan: dict[str, Any]) -> Iterator[str]:
    """The tables that a plan reads whole."""
    if plan["Node Type"] == "Seq Scan":
        yield plan["Relation Name"]
    for part in plan.get("Plans", ()):
        yield from scanned(part)


async def test_every_statement_touches_few_rows(full: asyncpg.Connection) -> None:
    """No statement, functions included, reads a whole table or more rows than its page needs."""
    assert await all_complaints(full) == set()


@pytest.mark.parametrize("steps", [
    pytest.param(NEVER_ANALYZED, id="never"), pytest.param(ANALYZED_WHILE_SMALL, id="too early")])
async def test_it_does_not_matter_when_the_planner_looked(cluster: str, steps: Any) -> None:
    """As the server has them planned, no statement does that where the planner knows nothing of the
    tables, or what was there before one chat of many became the large one."""
    with filled(cluster, steps) as url:
        async with undone(url, **database.PLANS) as connection:
            assert await complaints_of_all(connection) == set()


async def test_plans_from_before_there_was_anything_hold(cluster: str) -> None:
    """No statement does that by the plan that a connection made in a messenger's first hour; the
    purge, which comes once an hour, may go through all sessions by it."""
    with filled(cluster, (FIRST_HOUR,)) as url:
        async with undone(url, **database.PLANS) as connection:
            await complaints_of_all(connection)
            fill(url, (ALL_OF_IT_GOES, *NEVER_ANALYZED))
            found = await complaints_of_all(connection)
            assert {why for why in found if not why.startswith("PURGE_OLD")} == set()


async def test_every_plan_goes_through_an_index(full: asyncpg.Connection) -> None:
    """EXPLAIN shows no scan of a whole table, neither in a plan for given arguments nor in a
    generic one."""
    found = set()
    for name, text, given in await asked(full):
        told = await full.fetchval(f"explain (format json) {text}", *given)
        found |= {f"{name} reads all of {table}" for table in scanned(json.loads(told)[0]["Plan"])}
    assert found == set()


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ("drop index messages_changed", "SELECT_MISSED touches"),
        ("drop index messages_unchanged", "SELECT_ROOM touches"),
        ("alter table messages drop constraint messages_id", "POST_MESSAGES touches"),
        ("drop index participants_of_user", "SELECT_CHATS reads all of participants"),
    ],
)
async def test_a_missing_index_is_seen(full: asyncpg.Connection, change: str, seen: str) -> None:
    """Where one of its indexes is missing, a statement does what the tests before complain of."""
    await full.execute(change)
    found = await all_complaints(full)
    assert [why for why in found if why.startswith(seen)], found
