"""The bus: hints go to every other process, and may be lost where nobody listens."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from plumbing.bus import Bus
from plumbing.database import Database
from support.people import SOON_SECONDS


class Station:
    """A process on the bus: what it heard, and how often it was told to poll."""

    def __init__(self, url: str) -> None:
        self.database = Database(url)
        self.bus = Bus(self.database)
        self.heard: list[Any] = []
        self.polls = 0
        self.listening = asyncio.Event()

    def hear_others(self, hints: str) -> None:
        """Keep what others say."""
        self.heard += json.loads(hints)

    def poll_now(self) -> None:
        """Count it."""
        self.polls += 1
        self.listening.set()

    async def starts(self) -> None:
        """Begin to listen."""
        self.bus.subscribe(self.hear_others, self.poll_now)
        await self.listening.wait()

    async def hears(self, hint: str) -> None:
        """Wait until it has heard a hint."""
        async with asyncio.timeout(SOON_SECONDS):
            while hint not in self.heard:
                await asyncio.sleep(0.01)

    async def stops(self) -> None:
        """Leave the bus."""
        await self.bus.close()
        await self.database.close()


@pytest.fixture
async def stations(database_url: str) -> AsyncIterator[list[Station]]:
    """Two processes that listen."""
    made = [Station(database_url) for _ in range(2)]
    for station in made:
        await station.starts()
    yield made
    for station in made:
        await station.stops()


async def test_hint_reaches_the_others_and_not_oneself(stations: list[Station]) -> None:
    """Who notifies hears nothing of it; the other process hears it once."""
    here, there = stations
    here.bus.notify("a", "from here")
    await there.hears("from here")
    there.bus.notify("b", "from there")
    await here.hears("from there")
    assert (here.heard, there.heard) == (["from there"], ["from here"])


async def test_greatest_hint_of_a_key_is_sent(stations: list[Station]) -> None:
    """Of what was not sent yet the greatest of each key is sent, in whatever order they came; hints
    of other keys stay."""
    here, there = stations
    for number in (0, 2, 1):
        here.bus.notify("same", number)
        here.bus.notify(number, f"key {number}")
    here.bus.notify("end", "the end")
    await there.hears("the end")
    assert there.heard == [2, "key 0", "key 2", "key 1", "the end"]


async def test_more_hints_than_fit_are_sent_in_several(stations: list[Station]) -> None:
    """A notification has 8,000 bytes; all hints arrive, in order."""
    here, there = stations
    texts = [f"{number} " + "x" * 900 for number in range(40)]
    for text in texts:
        here.bus.notify(text, text)
    await there.hears(texts[-1])
    assert there.heard == texts


async def test_listener_that_was_cut_off_polls_and_hears_again(
    stations: list[Station], sql: Any
) -> None:
    """After its connection was lost a process polls, for what it may have missed, and hears on."""
    here, there = stations
    there.listening.clear()
    with contextlib.suppress(Exception):
        await sql.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where query ~ 'listen|pg_notify' and pid <> pg_backend_pid()"
            " and datname = current_database()")
    async with asyncio.timeout(2 * SOON_SECONDS):
        await there.listening.wait()
    assert there.polls == 2
    here.bus.notify("again", "again")
    await there.hears("again")


def spoken(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says of the bus."""
    return [each.getMessage() for each in caplog.records if each.name == "messenger.bus"]


async def test_listener_lost_alone_is_logged_once_and_so_is_its_return(
    stations: list[Station], sql: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Who runs the server reads that hints are not heard, while all else works, and when again."""
    _, there = stations
    there.listening.clear()
    await sql.fetch(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where query ~ 'pg_notify' and pid <> pg_backend_pid()"
        " and datname = current_database()")
    async with asyncio.timeout(2 * SOON_SECONDS):
        await there.listening.wait()
        while len(spoken(caplog)) < 4:  # two stations lost it
            await asyncio.sleep(0.05)
    assert sorted(each.split(" (")[0] for each in spoken(caplog)) == [
        "hints of other processes are heard again"] * 2 + [
        "no hints of other processes are heard"] * 2
    assert sum("SQLSTATE 57P01" in each for each in spoken(caplog)) <= 2
