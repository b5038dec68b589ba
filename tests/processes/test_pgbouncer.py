"""Behind PgBouncer: served where it hands out connections by the session, refused otherwise."""

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest

from plumbing import embedded
from plumbing.address import read_address
from plumbing.bus import Bus
from plumbing.database import Database
from support.people import SOON_SECONDS
from support.servers import SECRET_KEY, Server, refused

PROGRAM = shutil.which("pgbouncer", path="/usr/sbin:/usr/bin:/usr/local/bin")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="pgbouncer is not installed")

CONFIGURATION = """
[databases]
* = host={host} port={port} user={user}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = any
{settings}
"""
Starts = Callable[..., Awaitable[str]]


@pytest.fixture
async def bouncer(database_url: str, tmp_path: Path) -> AsyncIterator[Starts]:
    """Start a PgBouncer before the test's database, with these settings; the way to it."""
    running: list[subprocess.Popen[bytes]] = []
    place = read_address(database_url).parameters

    async def start(**settings: Any) -> str:
        with socket.create_server(("127.0.0.1", 0)) as free:
            listen = free.getsockname()[1]
        lines = "\n".join(f"{name} = {value}" for name, value in settings.items())
        file = tmp_path / "pgbouncer.ini"
        file.write_text(CONFIGURATION.format(listen=listen, settings=lines, **place))
        # It refuses root as PostgreSQL does, and ends with this process.
        command = [sys.executable, "-I", "-S", embedded.__file__, str(os.getpid()), "9"]
        with (tmp_path / "pgbouncer.log").open("wb") as log:
            running.append(subprocess.Popen(
                [*command, str(PROGRAM), str(file)], stdout=log, stderr=log, cwd=tmp_path))
        async with asyncio.timeout(SOON_SECONDS):
            while not await answers(listen):
                assert running[-1].poll() is None, (tmp_path / "pgbouncer.log").read_text()
                await asyncio.sleep(0.05)
        return f"postgresql://any:any@127.0.0.1:{listen}/{place['dbname']}"

    yield start
    for process in running:
        process.terminate()
        process.wait()


async def answers(port: int) -> bool:
    """Tell whether somebody listens."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


async def test_session_mode_serves(bouncer: Starts, tmp_path: Path) -> None:
    """In session mode the server starts and works, also after its backends were cleaned."""
    url = await bouncer(pool_mode="session", default_pool_size=30)
    for name in ("alice", "bob"):
        server = await Server(tmp_path, DATABASE_URL=url, SECRET_KEY=SECRET_KEY).starts()
        async with aiohttp.ClientSession(server.url) as session:
            body = {"email": f"{name}@example.com", "username": name, "password": "correct horse"}
            assert (await session.post("/api/v1/users", json=body)).status == 201
            assert (await session.get("/api/v1/health/readiness")).status == 200
        assert await server.stops() == 0
        assert server.complaints() == ""


async def test_session_mode_carries_hints(bouncer: Starts) -> None:
    """Listening works through it: a hint of one process reaches another."""
    url = await bouncer(pool_mode="session", default_pool_size=30)
    database, heard, listening = Database(url), asyncio.Event(), asyncio.Event()
    speaker, hearer = Bus(database), Bus(database)
    hearer.subscribe(lambda hints: heard.set() if "hello" in hints else None, listening.set)
    async with asyncio.timeout(SOON_SECONDS):
        await listening.wait()
        while not heard.is_set():
            speaker.notify("key", "hello")
            await asyncio.sleep(0.05)
    await asyncio.gather(speaker.close(), hearer.close())
    await database.close()


@pytest.mark.parametrize("turns", [0, 1], ids=["the last one first", "in turns"])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("mode", ["transaction", "statement"])
async def test_other_modes_are_refused(
    bouncer: Starts, tmp_path: Path, database_url: str, mode: str, size: int, turns: int
) -> None:
    """In the other modes one line says what to set, however many connections it has and in
    whichever order it lends them; those are left to others as they were."""
    url = await bouncer(
        pool_mode=mode, default_pool_size=size, min_pool_size=size, server_round_robin=turns)
    line = await refused(tmp_path, DATABASE_URL=url, SECRET_KEY=SECRET_KEY)
    assert re.search("pooler.*session", line)
    other = await asyncpg.connect(url, statement_cache_size=0)
    assert {await other.fetchval("show enable_seqscan") for _ in range(size * 2)} == {"on"}
    await other.close()
    direct = await asyncpg.connect(database_url)
    assert await direct.fetchval("select count(*) from users") == 0
    await direct.close()


async def test_what_it_does_not_take_is_one_line(bouncer: Starts, tmp_path: Path) -> None:
    """A parameter that PgBouncer refuses ends the start, and says where to look."""
    url = await bouncer(pool_mode="session")
    line = await refused(
        tmp_path, DATABASE_URL=f"{url}?options=-c%20geqo%3Doff", SECRET_KEY=SECRET_KEY)
    assert "its log" in line
