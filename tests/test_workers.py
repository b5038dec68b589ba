"""The promises of several workers: one port, one parent, and nothing left of either."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import SOON_SECONDS, Person, new_id, processes_in
from test_faults import (  # noqa: F401 - fixtures
    STOP_SECONDS,
    Server,
    nothing_left,
    people_of,
    template,
)

import messenger


def workers_of(server: Server) -> set[int]:
    """The pids of a parent's workers, by their command line."""
    return {pid for pid in processes_in(server.folder) if is_worker(pid, server.process.pid)}


def is_worker(pid: int, parent: int) -> bool:
    """Whether a process is a messenger, and a child of this one."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        status = Path(f"/proc/{pid}/stat").read_text()
        return b"messenger.py" in command and status.rsplit(")", 1)[1].split()[1] == str(parent)
    return False


def free_ports() -> int:
    """A port that is free, and so is the one after it."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port


@pytest.fixture
async def pair(template: Server, tmp_path: Path) -> AsyncIterator[Server]:  # noqa: F811
    """A server of two workers, with metrics."""
    shutil.copytree(template.data, tmp_path / "data")
    server = await Server(tmp_path, WORKERS=2, METRICS_PORT=free_ports()).starts()
    async with asyncio.timeout(SOON_SECONDS):
        while None in await sockets_at(server):
            await asyncio.sleep(0.05)
    yield server
    if server.process.returncode is None:
        await server.stops()


async def sockets_at(server: Server) -> list[float | None]:
    """How many sockets each worker says that it has; None where it is still starting."""
    counts: list[float | None] = []
    async with aiohttp.ClientSession() as session:
        for number in range(2):
            url = f"http://127.0.0.1:{server.settings['METRICS_PORT'] + number}/metrics"
            try:
                async with session.get(url) as answer:
                    found = re.search(r"\nmessenger_sockets (\S+)", await answer.text())
                    counts.append(float(found[1]) if found else None)
            except aiohttp.ClientConnectorError:
                counts.append(None)
    return counts


async def sockets_on_both(person: Person, server: Server, chat: int) -> list[Any]:
    """Open sockets of a person until each worker has one: the kernel chooses."""
    lines: list[Any] = []
    async with asyncio.timeout(SOON_SECONDS):
        while not lines or not all(await sockets_at(server)):
            lines.append(await person.listens_live(chat))
    return lines


async def test_workers_share_a_port_and_are_replaced(pair: Server, people_of: Any) -> None:  # noqa: F811
    """What is said at one worker is heard at the other; each answers for its metrics; one that is
    killed is followed by another, and the other's sockets never notice."""
    alice, bob = await people_of(pair, "alice"), await people_of(pair, "bob")
    chat = await alice.opens(bob)
    lines = await sockets_on_both(bob, pair, chat)
    sent = await alice.says(chat, "to both")
    for line in lines:
        assert (await line.hears("message"))["data"]["id"] == sent["id"]
    before = workers_of(pair)
    os.kill(min(before), signal.SIGKILL)
    body = {"text": "to those who are left", "id": new_id()}
    with contextlib.suppress(aiohttp.ClientError):  # the connection may be the killed one's, too
        await alice.asks("POST", f"/chats/{chat}/messages", body)
    assert (await alice.asks("POST", f"/chats/{chat}/messages", body)).status in (200, 201)
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


async def test_stop_of_the_parent_stops_all(pair: Server, people_of: Any) -> None:  # noqa: F811
    """SIGTERM closes the sockets of every worker with 1001; nothing is left."""
    alice, bob = await people_of(pair, "alice"), await people_of(pair, "bob")
    chat = await alice.opens(bob)
    lines = await sockets_on_both(bob, pair, chat)
    async with asyncio.timeout(STOP_SECONDS):
        status, *codes = await asyncio.gather(pair.stops(), *[line.is_closed() for line in lines])
    assert (status, set(codes)) == (0, {1001})
    assert processes_in(pair.folder) == set()


async def test_workers_die_with_their_parent(pair: Server) -> None:
    """Whatever ends the parent ends its workers and PostgreSQL, even those that are stopped."""
    os.kill(max(workers_of(pair)), signal.SIGSTOP)
    pair.process.kill()
    await pair.ends()
    async with asyncio.timeout(STOP_SECONDS):
        while processes_in(pair.folder):
            await asyncio.sleep(0.05)


async def test_port_of_workers_is_not_shared_with_strangers(pair: Server, tmp_path: Path) -> None:
    """A second server on the port of the first is refused in one line, workers or not."""
    (tmp_path / "second").mkdir()
    port = pair.url.rsplit(":", 1)[1]
    for workers in (1, 2):
        second = Server(tmp_path / "second", PORT=port, WORKERS=workers)
        with pytest.raises(AssertionError, match=f"cannot listen on HOST 127.0.0.1, PORT {port}"):
            await second.starts()
        assert await second.ends() == 1


def test_a_worker_whose_parent_is_gone_does_not_start() -> None:
    """A parent that ended while its worker started is noticed."""
    assert messenger.PARENT == "MESSENGER_PARENT"
    with pytest.raises(SystemExit):
        messenger.postgres.die_with(os.getpid())  # nobody is their own parent
