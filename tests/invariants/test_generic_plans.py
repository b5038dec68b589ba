"""What is called with arrays of a few items is planned once, and not anew at each call."""

from typing import Any
from uuid import uuid4

import asyncpg
import pytest

import messenger
from support.databases import LATER
from support.people import Person

# A plan that is made once is kept; PostgreSQL tells what each session keeps. One that is made for
# a single call is not among it once the call has ended.
STATEMENTS_OF_ARRAYS = """
    select s.ident, exists (
        select from pg_backend_memory_contexts p where p.name = 'CachedPlan' and p.ident = s.ident)
    from pg_backend_memory_contexts s
    where s.name = 'CachedPlanSource'
      and s.ident ~ '(chat_ids|user_ids|message_ids|member_ids|ids|seqs)'
      and s.ident ~ '(from|update|insert|delete) '
      and s.ident !~ '(=>|pg_backend_memory_contexts)'  -- neither the call itself nor this"""


async def calls(sql: asyncpg.Connection, name: str, alice: Person, bob: Person, chat: int) -> None:
    """Call a function for a few items."""
    message = (await alice.says(chat, "a text"))["id"]
    given: dict[str, list[Any]] = {
        "POST_MESSAGES": [
            [chat] * 2, [alice.id] * 2, [uuid4(), uuid4()], ["a text"] * 2, [None] * 2,
            "mark"],
        "CHANGE_MESSAGES": [[chat], [alice.id], [message], ["another"], [LATER], "mark"],
        "READ_MESSAGES": [[chat], [bob.id], [message]],
        "CREATE_GROUP": [alice.id, "a group", [bob.id], LATER],
    }
    await sql.fetch(getattr(messenger, name), *given[name])


@pytest.mark.parametrize(
    "name", ["POST_MESSAGES", "CHANGE_MESSAGES", "READ_MESSAGES", "CREATE_GROUP"])
async def test_function_of_arrays_is_planned_once(
    sql: asyncpg.Connection, alice: Person, bob: Person, name: str
) -> None:
    """PostgreSQL keeps the plans of such a function from its first calls on."""
    may_look = await sql.fetchval("select pg_has_role('pg_read_all_stats', 'usage')")
    if not may_look:
        pytest.skip("only who may read all statistics may see what a session keeps")
    chat = await alice.opens(bob)
    for _ in range(2):  # from the sixth on PostgreSQL would choose for itself
        await calls(sql, name, alice, bob, chat)
    kept = dict(await sql.fetch(STATEMENTS_OF_ARRAYS))
    assert kept
    assert [text for text, is_kept in kept.items() if not is_kept] == []


async def test_function_planned_at_each_call_is_seen(
    sql: asyncpg.Connection, alice: Person, bob: Person
) -> None:
    """Without that setting PostgreSQL keeps no plans from the first calls."""
    chat = await alice.opens(bob)
    await sql.execute("alter function post_messages_2 reset plan_cache_mode")
    for _ in range(2):
        await calls(sql, "POST_MESSAGES", alice, bob, chat)
    kept = dict(await sql.fetch(STATEMENTS_OF_ARRAYS))
    assert not all(kept.values())
