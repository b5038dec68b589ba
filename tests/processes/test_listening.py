"""How many may come at once: the queue of who waits to be accepted, and the descriptors."""

import asyncio
import os
import resource
import signal
import socket
from pathlib import Path
from typing import Any

from yarl import URL

from support.servers import Server

COMING = 600  # at once; the system's own default lets 128 wait


async def test_hundreds_come_while_nobody_is_accepted(tmp_path: Path) -> None:
    """While the server is busy, hundreds connect: it accepts them once it has time."""
    server = await Server(tmp_path).starts()
    port = URL(server.url).port or 0
    os.kill(server.process.pid, signal.SIGSTOP)
    coming = [socket.socket() for _ in range(COMING)]
    try:
        for each in coming:
            each.setblocking(False)
        connecting = [asyncio.get_running_loop().sock_connect(each, ("127.0.0.1", port))
                      for each in coming]
        async with asyncio.timeout(50):  # whom there is no room for tries for minutes
            await asyncio.gather(*connecting)
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
        for each in coming:
            each.close()
    assert await server.stops() == 0


async def test_server_takes_as_many_descriptors_as_it_may(tmp_path: Path) -> None:
    """The soft limit of descriptors, which is low by default, is raised to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, soft), hard))
    try:
        server = await Server(tmp_path).starts()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    limits: dict[str, Any] = {}
    for line in Path(f"/proc/{server.process.pid}/limits").read_text().splitlines():
        if line.startswith("Max open files"):
            limits["soft"], limits["hard"] = line.split()[3:5]
    assert await server.stops() == 0
    assert limits["soft"] == limits["hard"]
    assert limits["soft"] != "512"
