"""What a process wrote a moment ago is there, or the database went back in time."""

import re
from collections.abc import AsyncIterator
from typing import Any, cast

import asyncpg
import pytest

from plumbing.database import Database, Unavailable
from plumbing.heartbeat import HEARTBEAT, Heartbeat


@pytest.fixture
async def there(database_url: str) -> AsyncIterator[Database]:
    """The test's database."""
    made = Database(database_url)
    yield made
    await made.close()


async def test_database_that_went_back_is_told_once(
    there: Database, sql: asyncpg.Connection
) -> None:
    """Whatever a restored backup has of the process, an older beat or none, it is told; then it
    goes on."""
    heart, other = Heartbeat(there), Heartbeat(there)
    for lose in ("update heartbeats set beat = $1", "delete from heartbeats where beat <> $1"):
        assert [await each.beat(True) for each in (heart, other, heart)] == [True] * 3
        before = await sql.fetchval("select beat from heartbeats limit 1")
        assert await heart.beat(True)
        await sql.execute(lose, before)
        assert [await heart.beat(True) for _ in range(3)] == [False, True, True]


@pytest.mark.parametrize("count", [0, 1, 2])
async def test_beat_whose_answer_was_lost_is_no_loss(
    there: Database, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """A beat that was written, or not, and not answered counts either way, however often."""
    heart, row = Heartbeat(there), there.row
    for _ in range(count):
        assert await heart.beat(True)

    async def loses_the_answer(*arguments: Any) -> Any:
        await row(*arguments)
        raise Unavailable("lost")

    async def loses_the_call(*_: Any) -> Any:
        raise Unavailable("lost")

    for lost in (loses_the_answer, loses_the_answer, loses_the_call):
        monkeypatch.setattr(there, "row", lost)
        with pytest.raises(Unavailable):
            await heart.beat(True)
    monkeypatch.setattr(there, "row", row)
    assert [await heart.beat(True) for _ in range(3)] == [True] * 3


async def test_late_beat_puts_nothing_back(sql: asyncpg.Connection) -> None:
    """A beat that PostgreSQL makes after newer ones, for it stood still, changes nothing."""
    for known, following in ([], "1"), (["1"], "2"), (["2"], "3"):
        assert await sql.fetchval(HEARTBEAT, "p", known, following) == following
    for known, following in ([], "1"), (["1"], "2"), (["2"], "3"):
        await sql.fetchval(HEARTBEAT, "p", known, following)
        assert await sql.fetchval("select beat from heartbeats") == "3"


async def test_database_that_can_only_be_read_is_looked_at(
    there: Database, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing can be written, the last beat is looked for; before the first there is none."""
    heart, late = Heartbeat(there), Heartbeat(there)
    assert await heart.beat(True)

    async def row(query: str, *arguments: Any) -> Any:
        async with sql.transaction(readonly=True):
            return await sql.fetchrow(query, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(there, "row", row)
        assert [await each.beat(True) for each in (heart, late, heart, late)] == [True] * 4
    assert [await each.beat(True) for each in (heart, late)] == [True] * 2
    await sql.execute("delete from heartbeats")
    monkeypatch.setattr(there, "row", row)
    assert not await heart.beat(True)


async def test_row_of_a_process_that_is_no_more_goes(
    there: Database, sql: asyncpg.Connection
) -> None:
    """A process that begins deletes what others left more than a day ago."""
    await sql.execute(
        "insert into heartbeats values"
        " ('old', '1', now() - interval '25 hours'), ('new', '1', now())")
    assert await Heartbeat(there).beat(True)
    assert await sql.fetchval("select count(*) from heartbeats where process = 'old'") == 0
    assert await sql.fetchval("select count(*) from heartbeats") == 2  # and its own


async def test_process_that_needs_no_beat_leaves_no_trace_and_tells_of_nothing(
    there: Database, sql: asyncpg.Connection
) -> None:
    """Who has nobody to tell does not write, and begins anew once there is somebody."""
    heart = Heartbeat(there)
    assert await heart.beat(False)
    assert await sql.fetchval("select count(*) from heartbeats") == 0
    assert await heart.beat(True)
    assert await heart.beat(False)
    await sql.execute("delete from heartbeats")
    assert [await heart.beat(True) for _ in range(2)] == [True, True]


async def test_promoted_standby_is_told_once(
    there: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database of another timeline is told, though the last beat is there; one that does not tell
    its timeline for a while is not, nor a promotion that no socket saw."""
    heart, row, timeline = Heartbeat(there), there.row, cast("str | None", "")

    async def on_timeline(*arguments: Any) -> Any:
        stands, told = await row(*arguments)
        assert re.fullmatch("[0-9A-F]{8}", told)
        return stands, timeline if timeline is None else timeline or told

    monkeypatch.setattr(there, "row", on_timeline)
    assert [await heart.beat(True) for _ in range(2)] == [True, True]
    timeline = None
    assert await heart.beat(True)
    timeline = "00000FFF"
    assert not await heart.beat(True)
    assert await heart.beat(False)  # nobody came back
    timeline = "00001000"
    assert [await heart.beat(True) for _ in range(2)] == [True, True]
