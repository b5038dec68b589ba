"""The promises of several workers: one port, one parent, and nothing left of either."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from support.people import SOON_SECONDS, Person, new_id
from support.servers import (
    STOP_SECONDS,
    Server,
    free_port,
    processes_in,
    sockets_at,
    workers_of,
)

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
async def pair(data_folder: Path) -> AsyncIterator[Server]:
    """A server of two workers, with metrics."""
    server = await Server(data_folder.parent, WORKERS=2, METRICS_PORT=free_port()).starts()
    async with asyncio.timeout(SOON_SECONDS):
        while len(sockets_at(server)) < 2:
            await asyncio.sleep(0.05)
    yield server
    if server.process.returncode is None:
        await server.stops()


async def sockets_on_both(person: Person, server: Server, chat: int) -> list[Any]:
    """Open sockets of a person until each worker has one: the kernel chooses."""
    lines: list[Any] = []
    async with asyncio.timeout(SOON_SECONDS):
        while not lines or not all(sockets_at(server)):
            lines.append(await person.listens_live(chat))
    return lines


async def test_workers_share_a_port_and_are_replaced(pair: Server, people_of: Any) -> None:
    """What is posted at one worker is heard at the other, each serves its metrics, and a killed one
    is replaced without the other's sockets noticing."""
    alice, bob = await people_of(pair, "alice"), await people_of(pair, "bob")
    chat = await alice.opens(bob)
    lines = await sockets_on_both(bob, pair, chat)
    sent = await alice.says(chat, "to both")
    for line in lines:
        assert (await line.hears("message"))["data"]["id"] == sent["id"]
    before = workers_of(pair)
    os.kill(min(before), signal.SIGKILL)
    body = {"text": "to those who are left", "id": new_id()}
    status = 0
    async with asyncio.timeout(SOON_SECONDS):
        while not status:  # a connection, even a new one, may be the killed one's until it is gone
            with contextlib.suppress(aiohttp.ClientError):
                status = (await alice.asks("POST", f"/chats/{chat}/messages", body)).status
    assert status in (200, 201)
    heard = 0
    for line in lines:
        with contextlib.suppress(AssertionError):  # closed: it was the killed one's
            heard += (await line.hears("message"))["data"]["text"] == "to those who are left"
    assert 0 < heard < len(lines)
    async with asyncio.timeout(SOON_SECONDS):
        while len(workers_of(pair)) < 2:
            await asyncio.sleep(0.05)
    assert len(workers_of(pair) - before) == 1
    assert await (await bob.listens(chat, "?after=1")).hears_text("to those who are left")


async def test_stop_of_the_parent_stops_all(pair: Server, people_of: Any) -> None:
    """SIGTERM closes the sockets of every worker with 1001; nothing is left."""
    alice, bob = await people_of(pair, "alice"), await people_of(pair, "bob")
    chat = await alice.opens(bob)
    lines = await sockets_on_both(bob, pair, chat)
    async with asyncio.timeout(STOP_SECONDS):
        status, *codes = await asyncio.gather(pair.stops(), *[line.is_closed() for line in lines])
    assert (status, set(codes)) == (0, {1001})
    assert processes_in(pair.folder) == set()


async def test_workers_die_with_their_parent(pair: Server) -> None:
    """Whatever ends the parent ends its workers, even stopped ones, and PostgreSQL."""
    os.kill(max(workers_of(pair)), signal.SIGSTOP)
    pair.process.kill()
    await pair.ends()
    async with asyncio.timeout(STOP_SECONDS):
        while processes_in(pair.folder):
            await asyncio.sleep(0.05)


async def test_port_of_workers_is_not_shared_with_strangers(pair: Server, tmp_path: Path) -> None:
    """A second server on the first one's port is refused in one line, with workers or without."""
    (tmp_path / "second").mkdir()
    port = pair.url.rsplit(":", 1)[1]
    for workers in (1, 2):
        second = Server(tmp_path / "second", PORT=port, WORKERS=workers)
        with pytest.raises(AssertionError, match=f"cannot listen on HOST 127.0.0.1, PORT {port}"):
            await second.starts()
        assert await second.ends() == 1
