"""The promises of process 1: in a container without an init of its own, the messenger is one."""

import asyncio
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from support.servers import START_SECONDS, Server, processes_in

CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
TRIED = subprocess.run(["sh", "-c", '"$@"', "sh", *CONTAINER, "true"], capture_output=True)
pytestmark = [
    pytest.mark.usefixtures("nothing_left"),
    pytest.mark.skipif(TRIED.returncode != 0, reason=f"no containers here: {TRIED.stderr!r}"),
]


def state_of(pid: int) -> tuple[str, str, int]:
    """Answer the name of a process, the letter of its state and its parent; ("", "", 0) of none."""
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(") ")
    except (FileNotFoundError, ProcessLookupError):
        return "", "", 0
    return name, rest.split()[0], int(rest.split()[1])


def below(pid: int) -> dict[int, str]:
    """Answer the pids of all that descend from a process, and their names."""
    every = {int(each): state_of(int(each)) for each in filter(str.isdecimal, os.listdir("/proc"))}
    found: dict[int, str] = {}
    before = -1
    while len(found) > before:
        before = len(found)
        found |= {each: name for each, (name, _, parent) in every.items()
                  if parent == pid or parent in found}
    return found


def postgres_of(server: Server) -> tuple[int, set[int]]:
    """Answer the pid of the postmaster of a server, and those of its children."""
    every = {pid for pid, name in below(server.process.pid).items() if name == "postgres"}
    [postmaster] = [pid for pid in every if state_of(pid)[2] not in every]
    return postmaster, every - {postmaster}


@pytest.fixture
async def contained(data_folder: Path) -> Any:
    """A server that is process 1, and its pid as it is seen from here."""
    server = Server(data_folder.parent)
    server.before = CONTAINER
    await server.starts()
    [first] = [pid for pid in below(server.process.pid) if state_of(pid)[2] == server.process.pid]
    yield server, first
    if server.process.returncode is None:
        os.kill(first, signal.SIGKILL)
        await server.ends()


async def test_process_1_leaves_no_zombies(contained: Any) -> None:
    """What outlives its parent in the container and ends, such as a killed PostgreSQL's backends,
    is gone; the server goes on, and a signal stops it in order."""
    server, first = contained
    postmaster, orphans = postgres_of(server)
    assert orphans
    os.kill(postmaster, signal.SIGKILL)
    async with asyncio.timeout(START_SECONDS):
        while any(state_of(pid)[1] for pid in (postmaster, *orphans)):
            await asyncio.sleep(0.05)
    async with asyncio.timeout(START_SECONDS), aiohttp.ClientSession(server.url) as session:
        while True:
            async with session.get("/api/v1/health/readiness") as answer:
                if answer.status == 200:
                    break
            await asyncio.sleep(0.05)
    os.kill(first, signal.SIGTERM)
    assert await server.ends() == 0
    assert processes_in(server.folder) == set()


async def test_process_1_ends_with_the_server(contained: Any) -> None:
    """Whatever ends the server ends the container, with its status, and leaves nothing."""
    server, first = contained
    [child] = [pid for pid in below(first) if state_of(pid)[2] == first]
    os.kill(child, signal.SIGKILL)
    assert await server.ends() == 128 + signal.SIGKILL
    async with asyncio.timeout(START_SECONDS):
        while processes_in(server.folder):
            await asyncio.sleep(0.05)
