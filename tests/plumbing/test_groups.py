"""Look-ups and commits in groups: several items at once, and none that holds up the others."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from aiohttp import web

import messenger
from plumbing import database, groups
from plumbing.deadline import WorkFor, party
from plumbing.groups import GroupReader, Pieces
from plumbing.guard import Rate
from plumbing.process import Tasks
from support.databases import LATER
from support.people import SOON_SECONDS, Line, Person
from support.posts import numbers_of, post, written
from support.writers import Echo


async def crowd(
    people: Callable[[str], Awaitable[Person]], founder: Person, number: int
) -> tuple[int, list[Person], list[Line]]:
    """Make a group of so many people, each with a socket."""
    others = [await people(f"person_{each}") for each in range(number)]
    chat = await founder.founds(*others)
    return chat, others, [await each.listens_live(chat) for each in others]


async def commits(app: web.Application, sql: asyncpg.Connection) -> int:
    """Ask PostgreSQL how many transactions of this database were committed."""
    flush = "select pg_stat_force_next_flush(), pg_sleep(0.2)"
    everyone = database.CONNECTIONS_MAX  # each connection counts for itself
    await asyncio.gather(*[app[messenger.DATABASE].rows(flush) for _ in range(everyone)])
    await sql.execute("select pg_stat_clear_snapshot()")
    count = "select xact_commit from pg_stat_database where datname = current_database()"
    return int(await sql.fetchval(count))


async def test_things_of_a_key_are_done_piece_by_piece() -> None:
    """The things of a key are done in the order in which they were asked for, so many at a time and
    each once; those of another key meanwhile."""
    done: list[tuple[str, int]] = []
    free = {"a": asyncio.Semaphore(0), "b": asyncio.Semaphore(0)}

    async def do(key: str, things: list[int]) -> None:
        await free[key].acquire()
        done.extend((key, thing) for thing in things)
        assert len(things) <= 2

    sent_back: list[str] = []
    pieces = Pieces(Tasks(), do, 2, 3, sent_back.append)
    for key, thing in (("a", 1), ("a", 2), ("a", 3), ("a", 2), ("b", 1)):
        pieces.put(key, thing)
    for key in ("b", "a"):
        free[key].release()
        await asyncio.sleep(0.01)
    pieces.put("a", 3)  # which is being done: something may be new since
    pieces.put("b", 1)
    for key in ("a", "a", "b"):
        free[key].release()
        await asyncio.sleep(0.01)
    assert done == [("b", 1), ("a", 1), ("a", 2), ("a", 3), ("a", 3), ("b", 1)]
    assert sent_back == []


async def test_of_each_key_so_many_things_may_wait() -> None:
    """Beyond as many things as may wait none is taken, unless it waits already; another key's is.
    Whose was not taken is told once those that wait are done, and may ask again."""
    done: list[int] = []
    sent_back: list[str] = []
    free = asyncio.Semaphore(0)

    async def do(_key: str, things: list[int]) -> None:
        await free.acquire()
        done.extend(things)

    pieces = Pieces(Tasks(), do, 1, 2, sent_back.append)
    for thing in (1, 2, 3, 1):
        pieces.put("a", thing)
    pieces.put("b", 4)
    free.release()
    await asyncio.sleep(0.01)
    assert (done, sent_back) == ([1], [])
    pieces.put("a", 5)  # there is room again, but it is to be sent back soon
    for _ in range(2):
        free.release()
    await asyncio.sleep(0.01)
    assert (sorted(done), sent_back) == ([1, 2, 4], ["a"])
    pieces.put("a", 3)
    free.release()
    await asyncio.sleep(0.01)
    assert (sorted(done), sent_back) == ([1, 2, 3, 4], ["a"])


async def test_bad_item_fails_alone(
    app: web.Application, alice: Person, bob: Person, carol: Person
) -> None:
    """An item that makes its whole group fail is refused alone; its neighbours are committed in
    their order."""
    chat, other = await alice.opens(bob), await bob.founds(carol)
    line = await bob.listens_live(chat)
    outcomes = await written(
        app,
        post(chat, alice, "one"),
        post(chat, alice, "a\0b"),  # PostgreSQL cannot take it: the statement fails
        post(chat, bob, "two"),
        post(other, alice, "not hers"),
        post(2**62, alice, "no such chat"),
        post(chat, alice, "three", reply_to=messenger.uuid7()),
        post(chat, alice, "three"),
    )
    no_chat = messenger.ChatNotFound
    assert numbers_of(outcomes) == [
        1, asyncpg.CharacterNotInRepertoireError, 2, no_chat, no_chat, messenger.ReplyNotFound, 3,
    ]
    assert [(await line.hears("message"))["data"]["seq"] for _ in range(3)] == [1, 2, 3]
    assert await alice.history(chat) == ["one", "two", "three"]


async def test_what_is_late_delays_nothing(
    app: web.Application, alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is past its deadline is refused without a commit; what comes with it is not."""
    chat, writer = await alice.opens(bob), app[messenger.POSTS]
    commit, sizes = writer.commit, []

    async def note(items: list[Any]) -> Any:
        sizes.append(len(items))
        return await commit(items)

    monkeypatch.setattr(writer, "commit", note)
    monkeypatch.setattr(groups, "WRITE_SECONDS", -1)
    late = [asyncio.create_task(writer.submit(post(chat, alice, "late"), "")) for _ in range(3)]
    await asyncio.sleep(0)
    monkeypatch.undo()
    monkeypatch.setattr(writer, "commit", note)
    in_time = asyncio.create_task(writer.submit(post(chat, alice, "in time"), ""))
    refused = await asyncio.gather(*late, return_exceptions=True)
    assert [type(each) for each in refused] == [database.Unavailable] * 3
    assert (await in_time).is_new
    assert sizes == [1]
    assert await alice.history(chat) == ["in time"]


async def posts_in_turn(app: web.Application, chat: int, sender: Person, end: float) -> list[Any]:
    """Post one message after the other until a time by the loop's clock; answer the outcomes."""
    outcomes: list[Any] = []
    while asyncio.get_running_loop().time() < end:
        outcomes += await written(app, post(chat, sender))
        await asyncio.sleep(0.02)
    return outcomes


@pytest.mark.real_deadlines
async def test_chat_whose_row_is_held_delays_no_other(
    app: web.Application, sql: asyncpg.Connection, alice: Person, bob: Person
) -> None:
    """While somebody holds a chat's row for seconds, what is posted there is refused in time; every
    post to the other chats is committed, most of them at once; then the chat goes on by itself."""
    held, *others = [await alice.founds(bob) for _ in range(4)]
    loop = asyncio.get_running_loop()
    async with sql.transaction():
        await sql.execute("select 1 from chats where id = $1 for update", held)
        end = loop.time() + 4
        refused, *posted = await asyncio.gather(
            *[posts_in_turn(app, chat, alice, end) for chat in (held, *others)])
    assert set(numbers_of(refused)) == {database.Unavailable}
    for outcomes in posted:
        assert numbers_of(outcomes) == list(range(1, len(outcomes) + 1))
        assert len(outcomes) >= 30, "it waited for the chat that is held again and again"
    first, *others = numbers_of(await written(app, *[post(held, alice) for _ in range(3)]))
    assert others == [first + 1, first + 2]  # what was refused may have been committed after all


@pytest.mark.real_deadlines
async def test_posts_to_a_held_chat_keep_their_order(
    app: web.Application, sql: asyncpg.Connection, alice: Person, bob: Person
) -> None:
    """What waits for a held chat is posted in its order once the chat is free, before what came
    later; it is written out in that order too."""
    held, other = await alice.founds(bob), await alice.founds(bob)
    line = await bob.listens_live(held)
    texts = [str(number) for number in range(60)]
    async with sql.transaction():
        await sql.execute("select 1 from chats where id = $1 for update", held)
        first = asyncio.create_task(
            written(app, post(other, alice), *[post(held, alice, text) for text in texts[:20]]))
        await asyncio.sleep(1.1)  # now they wait aside
        second = asyncio.create_task(
            written(app, *[post(held, alice, text) for text in texts[20:40]]))
        await asyncio.sleep(0.1)
    third = asyncio.create_task(written(app, *[post(held, alice, text) for text in texts[40:]]))
    assert numbers_of(await first) == [1, *range(1, 21)]
    assert numbers_of(await second + await third) == list(range(21, 61))
    assert [(await line.hears("message"))["data"]["text"] for _ in texts] == texts


@pytest.mark.real_deadlines
async def test_many_held_chats_delay_no_other(
    app: web.Application, sql: asyncpg.Connection, alice: Person, bob: Person
) -> None:
    """Somebody holds more chats than the server has connections: the other chat goes on, and once
    they are free so does each of them."""
    *held, other = [await alice.founds(bob) for _ in range(database.CONNECTIONS_MAX + 5)]
    loop = asyncio.get_running_loop()
    async with sql.transaction():
        await sql.execute("select 1 from chats where id = any ($1) for update", held)
        end = loop.time() + 3
        *refused, posted = await asyncio.gather(
            *[posts_in_turn(app, chat, alice, end) for chat in (*held, other)])
    assert {database.Unavailable} == {outcome for each in refused for outcome in numbers_of(each)}
    assert numbers_of(posted) == list(range(1, len(posted) + 1))
    assert len(posted) >= 15, "it waited for one chat after the other"
    outcomes = await written(app, *[post(chat, alice) for chat in held])
    assert set(map(type, outcomes)) == {messenger.Posted}


class Noting(Echo[str]):
    """A writer of texts, as large as they are long, that notes its groups."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[list[str]] = []

    def size_of(self, item: str) -> int:
        """Tell how long a text is."""
        return len(item)

    async def commit(self, items: list[str]) -> list[str]:
        """Note a group, once others had a turn."""
        self.groups.append(items)
        await asyncio.sleep(0)
        return items


async def test_parties_take_turns_in_groups() -> None:
    """Whatever one party put in, another's item is in the next group, before most of the flood;
    what each put in keeps its order."""
    writer = Noting()
    for number in range(5_000):
        writer.put(f"flood {number}", "flood", str)
    for number in range(3):
        writer.put(f"{number}", "another", str)
    await writer.finish()
    assert {"0", "1", "2"} < set(writer.groups[0][:6])
    written = list(itertools.chain.from_iterable(writer.groups))
    assert [each for each in written if len(each) == 1] == ["0", "1", "2"]
    assert [each for each in written if len(each) > 1] == [f"flood {each}" for each in range(5_000)]


async def test_items_of_a_lock_keep_their_order_where_their_group_fails() -> None:
    """Where a group is written item by item and a lock is held for a moment, what was in its lane
    is written before what comes behind it."""
    written: list[str] = []

    class Failing(Noting):
        """A writer whose groups fail, and whose first item finds its lock held."""

        held = True

        async def commit(self, items: list[str]) -> list[str]:
            if len(items) > 1:
                raise ValueError
            if items == ["a1"] and self.held:
                self.held = False
                raise database.Unavailable from asyncpg.LockNotAvailableError()
            await asyncio.sleep(0.01)
            written.extend(items)
            return items

        def lock_of(self, item: str) -> str:
            return item[0]

    writer = Failing()
    for item in ("a1", "a2", "b1", "b2", "a3"):
        writer.put(item, "", str)
    await writer.finish()
    assert [each for each in written if each[0] == "a"] == ["a1", "a2", "a3"]
    assert sorted(written) == ["a1", "a2", "a3", "b1", "b2"]


async def test_lanes_end_with_what_waits_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items whose locks are held for too long are refused, and nothing of their lanes stays."""
    monkeypatch.setattr(groups, "WRITE_SECONDS", 0.3)

    class Held(Noting):
        """A writer whose locks are all held by somebody else."""

        async def commit(self, items: list[str]) -> list[str]:
            await asyncio.sleep(0.05)
            raise database.Unavailable from asyncpg.LockNotAvailableError()

        def lock_of(self, item: str) -> str:
            return item

    writer, outcomes = Held(), []
    for number in range(100):
        writer.put(str(number), "", outcomes.append)
    await writer.finish()
    assert [type(outcome) for outcome in outcomes] == [database.Unavailable] * 100
    assert not writer._lanes


async def test_group_is_bounded_by_what_its_items_are_worth() -> None:
    """Of large items fewer share a commit, and one alone may be larger than a group."""
    writer = Noting()
    for size in (100, 200, 300, 9_000, 100, 100):
        writer.put("a" * size, "", str)
    await writer.finish()
    sizes = [sum(map(len, group)) for group in writer.groups]
    assert sum(sizes) == 9_800
    assert max(sizes) <= 9_000 + groups.GROUP_SIZE_MAX
    assert sizes[0] == 600


async def test_long_posts_share_a_commit_with_few(
    app: web.Application, alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit takes many short messages, but few long ones; so with edits."""
    chat, sizes = await alice.opens(bob), []
    for key in (messenger.POSTS, messenger.CHANGES):
        commit = app[key].commit

        async def note(items: list[Any], commit: Any = commit) -> Any:
            sizes.append(len(items))
            return await commit(items)

        monkeypatch.setattr(app[key], "commit", note)
    long = [post(chat, alice, "x" * 4_096) for _ in range(200)]
    assert numbers_of(await written(app, *long)) == list(range(1, 201))
    changes = [
        messenger.NewChange(chat, alice.id, each.id, "y" * 4_096, LATER) for each in long]
    await asyncio.gather(*[app[messenger.CHANGES].submit(each, "") for each in changes])
    assert max(sizes) < 60
    sizes.clear()
    await written(app, *[post(chat, alice) for _ in range(200)])
    assert max(sizes) > 60


@pytest.mark.real_deadlines
async def test_held_reader_delays_no_other(
    app: web.Application, sql: asyncpg.Connection, alice: Person, bob: Person
) -> None:
    """While somebody holds one reader's row, the steps of other readers are committed."""
    chat = await alice.founds(bob)
    ids = [(await alice.says(chat, str(number)))["id"] for number in range(3)]
    reads = app[messenger.READS]
    stuck = messenger.NewRead(chat, bob.id, UUID(ids[0]))
    async with sql.transaction():
        await sql.execute(
            "select 1 from participants where chat_id = $1 and user_id = $2 for update",
            chat, bob.id)
        waits = asyncio.create_task(reads.submit(stuck, ""))
        for number in ids:
            moved = await reads.submit(messenger.NewRead(chat, alice.id, UUID(number)), "")
            assert str(moved.message_id) == number
        with pytest.raises(database.Unavailable):
            await waits
    assert (await reads.submit(stuck, "")).seq == 1


@pytest.mark.real_deadlines
async def test_writer_that_ends_answers_what_waits_for_a_held_chat(
    app: web.Application, sql: asyncpg.Connection, alice: Person, bob: Person
) -> None:
    """When the server stops, what waits aside is still committed, or refused; none is left."""
    held, other = await alice.founds(bob), await alice.founds(bob)
    async with sql.transaction():
        await sql.execute("select 1 from chats where id = $1 for update", held)
        late = asyncio.create_task(written(app, post(held, alice)))
        waits = asyncio.create_task(written(app, post(other, alice), post(held, alice, "aside")))
        await asyncio.sleep(1.2)
        ends = asyncio.create_task(app[messenger.POSTS].finish())
        await asyncio.sleep(0.1)
        assert not ends.done()
    async with asyncio.timeout(5):
        await ends
    assert numbers_of(await waits) == [1, 2]
    assert numbers_of(await late) == [1]


@pytest.mark.real_deadlines
async def test_held_chat_leaves_connections_for_others(
    sql: asyncpg.Connection, alice: Person, bob: Person
) -> None:
    """However many rename a chat that somebody holds, one connection waits for it."""
    held = await alice.founds(bob)
    async with sql.transaction():
        await sql.execute("select 1 from chats where id = $1 for update", held)
        renames = [asyncio.create_task(alice.asks("PATCH", f"/chats/{held}", {"name": "new"}))
                   for _ in range(3 * database.CONNECTIONS_MAX)]
        waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
        async with asyncio.timeout(SOON_SECONDS):
            while not await sql.fetchval(waiting):
                await sql.execute("select pg_stat_clear_snapshot()")
                await asyncio.sleep(0.05)
        await bob.gets("/chats")
        await sql.execute("select pg_stat_clear_snapshot()")
        assert await sql.fetchval(waiting) == 1
    answers = await asyncio.gather(*renames)
    assert {answer.status for answer in answers} <= {200, 503}


async def test_many_senders_are_committed_in_groups(
    app: web.Application,
    sql: asyncpg.Connection,
    alice: Person,
    people: Callable[[str], Awaitable[Person]],
) -> None:
    """Of 64 senders at once several messages share a commit, by PostgreSQL's own counter."""
    chat, _, lines = await crowd(people, alice, 64)
    app[messenger.RATES][messenger.DELIVERIES] = Rate(10**6, 10**6)  # all come from one address
    before = await commits(app, sql)

    async def sends(line: Line) -> None:
        for number in range(8):
            await line.says("hello", ref=number)
            assert (await line.hears("ack", "error"))["ref"] == number

    await asyncio.gather(*[sends(line) for line in lines])
    made = await commits(app, sql) - before
    assert (await alice.gets(f"/chats/{chat}"))["last_rev"] == 64 * 8
    assert made < 64 * 8 / 3, f"{made} commits for {64 * 8} messages"


async def test_look_ups_share_a_statement_and_an_answer() -> None:
    """What is asked for while a look-up runs is looked up together, and each item once."""
    groups, go_on = [], asyncio.Event()

    async def look_up(items: list[str]) -> list[str]:
        groups.append(items)
        await go_on.wait()
        return [item.upper() for item in items]

    reader = GroupReader(look_up)
    asked = [asyncio.create_task(reader.get(item)) for item in ("a", "b", "c", "b")]
    await asyncio.sleep(0)
    asked.append(asyncio.create_task(reader.get("a")))  # it is under way: this one comes later
    await asyncio.sleep(0)
    asked[2].cancel()
    go_on.set()
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert [each for each in found if isinstance(each, str)] == ["A", "B", "B", "A"]
    assert isinstance(found[2], asyncio.CancelledError)
    assert sum(map(len, groups)) <= len(asked)
    assert len(groups) < len(asked)


async def test_what_is_done_for_many_is_done_for_none_of_them() -> None:
    """A group counts neither as its first one's work nor as that of the others: else it would wait
    for the database behind all that one of them asks."""
    async def look_up(items: list[int]) -> list[Any]:
        return [party() for _ in items]

    class Noted(Echo):
        async def commit(self, items: list[int]) -> list[int]:
            parties.append(party())
            return await super().commit(items)

    reader, writer, parties = GroupReader(look_up), Noted(), []
    with WorkFor("somebody"):
        assert await reader.get(1) is reader
        await writer.submit(1, "somebody")
    assert parties == [writer]


async def test_several_things_are_looked_up_together() -> None:
    """Things that one asks for at once are one look-up, and answered in their order; where it fails
    they fail together."""
    asked: list[list[int]] = []

    async def squares(items: list[int]) -> list[int]:
        asked.append(items)
        if 0 in items:
            raise database.Unavailable("away")
        return [item * item for item in items]

    reader = GroupReader(squares)
    assert await reader.get_all([3, 1, 2]) == [9, 1, 4]
    assert await reader.get_all([4]) == [16]
    with pytest.raises(database.Unavailable):
        await reader.get_all([1, 0, 2])
    assert asked == [[3, 1, 2], [4], [1, 0, 2]]


async def test_who_looked_up_the_same_goes_on_in_turn_with_others() -> None:
    """Of many who are told at once each goes on in a turn of its own, and a later look-up does not
    wait for that: what they do with a long answer may take a while."""
    turns = 0  # of the loop, until the last of them went on
    went_on: list[int] = []  # in which turn each did

    async def look_up(items: list[int]) -> list[int]:
        return items

    async def goes_on() -> None:
        await reader.get(1)
        went_on.append(turns)

    reader = GroupReader(look_up)
    asked = [asyncio.create_task(goes_on()) for _ in range(50)]
    while not went_on:
        await asyncio.sleep(0)
        turns += 1
    later = asyncio.create_task(reader.get(2))
    while not later.done():
        await asyncio.sleep(0)
        turns += 1
    assert len(went_on) < len(asked)
    while len(went_on) < len(asked):
        await asyncio.sleep(0)
        turns += 1
    assert len(set(went_on)) == len(asked)


async def test_who_asks_while_the_database_is_away_is_refused_with_the_others() -> None:
    """Where a look-up finds the database away, who waits for the next one does not wait for it."""
    looked_up = []

    async def look_up(items: list[int]) -> list[int]:
        looked_up.append(items)
        await asyncio.sleep(0.05)
        raise database.Unavailable

    reader = GroupReader(look_up)
    first = asyncio.create_task(reader.get(1))
    await asyncio.sleep(0.01)
    outcomes = await asyncio.gather(first, reader.get(2), reader.get(3), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [database.Unavailable] * 3
    assert looked_up == [[1]]


async def test_look_up_that_fails_for_one_group_leaves_the_next_alone() -> None:
    """Any other failure is told to who asked, and the next look-up is tried."""
    async def look_up(items: list[int]) -> list[int]:
        await asyncio.sleep(0.01)
        return [10 // item for item in items]

    reader = GroupReader(look_up)
    first = asyncio.create_task(reader.get(0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    second = await reader.get(5)
    with pytest.raises(ZeroDivisionError):
        await first
    assert second == 2
