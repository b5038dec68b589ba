"""Where and how many may come: addresses, the queue of who waits to be accepted, descriptors."""

import asyncio
import contextlib
import itertools
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from yarl import URL

from plumbing import embedded, process
from support.people import HEAR_SECONDS, SOON_SECONDS
from support.servers import START_SECONDS, Server, free_port

Starts = Callable[..., Awaitable[Server]]

COMING = 600  # at once; the system's own default lets 128 wait
ROOM = 20  # connections that may still come until descriptors run short
REQUEST = b"GET /api/v1/health/liveness HTTP/1.1\r\nHost: x\r\n\r\n"
REFUSING, WELL = "no connection is accepted", "connections are accepted again"


async def test_hundreds_come_while_nobody_is_accepted(running: Server) -> None:
    """While the server is busy, hundreds connect: it accepts them once it has time."""
    os.kill(running.process.pid, signal.SIGSTOP)
    coming = [socket.socket() for _ in range(COMING)]
    try:
        for each in coming:
            each.setblocking(False)
        connecting = [asyncio.get_running_loop().sock_connect(each, ("127.0.0.1", running.port))
                      for each in coming]
        async with asyncio.timeout(50):  # whom there is no room for tries for minutes
            await asyncio.gather(*connecting)
    finally:
        os.kill(running.process.pid, signal.SIGCONT)
        for each in coming:
            each.close()
    assert await running.stops() == 0


async def test_server_takes_as_many_descriptors_as_it_may(starts: Starts) -> None:
    """The soft limit of descriptors, which is low by default, is raised to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, soft), hard))
    try:
        server = await starts()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    limits: dict[str, Any] = {}
    for line in Path(f"/proc/{server.process.pid}/limits").read_text().splitlines():
        if line.startswith("Max open files"):
            limits["soft"], limits["hard"] = line.split()[3:5]
    assert limits["soft"] == limits["hard"]
    assert limits["soft"] != "512"


@contextlib.contextmanager
def asking(port: int, count: int) -> Iterator[list[socket.socket]]:
    """Connect so many times; each connection asks for something and stays."""
    coming = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    try:
        for each in coming:
            each.setblocking(False)
            each.sendall(REQUEST)
        yield coming
    finally:
        for each in coming:
            each.close()


def limit_descriptors(server: Server, room: int) -> None:
    """Let a server have only so many descriptors beside those that it has."""
    pid = server.process.pid
    used = set(map(int, os.listdir(f"/proc/{pid}/fd")))
    free = (number for number in itertools.count() if number not in used)
    limit = next(itertools.islice(free, room, None))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, hard))


async def answered(connection: socket.socket) -> bytes:
    """Wait for an answer; nothing but the end is b""."""
    async with asyncio.timeout(HEAR_SECONDS):
        return await asyncio.get_running_loop().sock_recv(connection, 4096)


def waits(connection: socket.socket) -> bool:
    """Tell whether a connection was neither answered nor ended."""
    with contextlib.suppress(BlockingIOError):
        connection.recv(1, socket.MSG_PEEK)
        return False
    return True


async def until_logged(server: Server, line: str) -> None:
    """Wait until something stands in the log of a server."""
    async with asyncio.timeout(SOON_SECONDS):
        while line not in server.complaints():
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("room", [process.DESCRIPTORS_SPARE + ROOM, ROOM, 0])
async def test_who_comes_when_descriptors_have_run_out_waits(
    running: Server, people_of: Any, room: int
) -> None:
    """Where descriptors run out, who is connected notices nothing, and who comes waits and is
    answered once there are some again; the log tells of it once.
    """
    alice, bob = await people_of(running, "alice"), await people_of(running, "bob")
    chat = await alice.opens(bob)
    line = await bob.listens_live(chat)
    limit_descriptors(running, room)
    with asking(running.port, room + ROOM) as coming:
        await until_logged(running, REFUSING)
        for number in range(3):
            await alice.says(chat, f"still here {number}")
            await line.hears_text(f"still here {number}")
        waiting = [each for each in coming if waits(each)]
        assert len(waiting) >= ROOM
        for each in coming:
            if each not in waiting:
                each.close()
        if len(waiting) == len(coming):
            limit_descriptors(running, process.DESCRIPTORS_SPARE + len(coming) + 1)
        for each in waiting:
            assert (await answered(each)).startswith(b"HTTP/1.1 200")
            each.close()
        await until_logged(running, WELL)
    assert running.complaints().count("\n") == 2, running.complaints()


async def test_connections_take_no_descriptors_that_the_database_needs(
    running: Server, people_of: Any
) -> None:
    """Where connections have used up their descriptors, the database is connected to anew."""
    alice, bob = await people_of(running, "alice"), await people_of(running, "bob")
    chat = await alice.opens(bob)
    line = await bob.listens_live(chat)
    limit_descriptors(running, process.DESCRIPTORS_SPARE + ROOM)
    with asking(running.port, process.DESCRIPTORS_SPARE + 2 * ROOM):
        await until_logged(running, REFUSING)
        sql = await asyncpg.connect(embedded.Postgres(running.data).dsn)
        await sql.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where application_name = 'messenger'")
        await sql.close()
        await alice.says(chat, "still here")
        await line.hears_text("still here")


async def test_half_open_connections_of_an_address_keep_no_other_out(starts: Starts) -> None:
    """Of hundreds of connections from one address, as many stay open as it may have; other
    addresses are served, and so is that one once it has hung up. The log tells of it once."""
    server = await starts(RATE_LIMITS="on", CONNECTIONS_PER_ADDRESS=ROOM)

    def comes(origin: str) -> socket.socket:
        here = ("127.0.0.1", server.port)
        connection = socket.create_connection(here, HEAR_SECONDS, source_address=(origin, 0))
        connection.setblocking(False)
        return connection

    async def is_served(origin: str) -> bool:
        with comes(origin) as connection, contextlib.suppress(ConnectionError):
            await asyncio.get_running_loop().sock_sendall(connection, REQUEST)
            return (await answered(connection)).startswith(b"HTTP/1.1 200")
        return False

    coming = [comes("127.0.0.3") for _ in range(300)]
    for each in coming[ROOM:]:
        assert await answered(each) == b""
    assert all(map(waits, coming[:ROOM]))
    assert await is_served("127.0.0.4")
    assert not await is_served("127.0.0.3")
    for each in coming:
        each.close()
    async with asyncio.timeout(SOON_SECONDS):
        while not await is_served("127.0.0.3"):
            await asyncio.sleep(0.05)
    assert server.complaints().count("\n") == 1, server.complaints()
    assert f"{ROOM} connections are open from one address" in server.complaints()


@pytest.fixture
async def starts(data_folder: Path) -> AsyncIterator[Starts]:
    """Start a server with some settings; it is stopped after the test."""
    made = []

    async def start(**settings: Any) -> Server:
        made.append(Server(data_folder.parent, **settings))
        return await made[-1].starts()

    yield start
    for server in made:
        assert await server.stops() == 0


async def status_at(host: str, port: int, path: str) -> int:
    """Ask at an address; answer the status, 0 where nobody listens."""
    url = URL.build(scheme="http", host=host, port=port, path=path)
    try:
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            return answer.status
    except aiohttp.ClientConnectorError:
        return 0


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
async def test_host_of_all_addresses_is_for_people_alone(starts: Starts) -> None:
    """With HOST=:: workers are reached by IPv4 and IPv6; the metrics are not: they stay on
    loopback."""
    metrics = free_port()
    server = await starts(HOST="::", WORKERS=2, METRICS_PORT=metrics)
    assert server.url == f"http://localhost:{server.port}"
    hosts = ("localhost", "::1", "127.0.0.1", "127.0.0.2")
    path = "/api/v1/health/liveness"
    assert [await status_at(host, server.port, path) for host in hosts] == [200] * 4
    async with asyncio.timeout(START_SECONDS):  # the first worker may be the second to be there
        while await status_at("127.0.0.1", metrics, "/metrics") != 200:
            await asyncio.sleep(0.05)
    assert [await status_at(host, metrics, "/metrics") for host in ("::1", "127.0.0.2")] == [0, 0]


async def test_metrics_listen_where_they_are_told_to(starts: Starts) -> None:
    """METRICS_HOST is where the metrics listen, wherever people come."""
    metrics = free_port()
    await starts(METRICS_HOST="127.0.0.2", METRICS_PORT=metrics)
    assert await status_at("127.0.0.2", metrics, "/metrics") == 200
    assert await status_at("127.0.0.1", metrics, "/metrics") == 0
