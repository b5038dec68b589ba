"""What readers that stall cost the others: `./run bench stalled [--rounds N]`.

One group, 1,000 sockets that read and, every other round, 100 more that do not. A sender posts
messages of 4,000 characters, each with the time in it; the time from the post to each healthy
socket is taken, and the server's memory. Rounds alternate, so what else the machine does falls on
both. Prints the two p99, their ratio (promised: at most 1.5) and the memory that a stalled socket
costs (promised: at most 1.5 MB); exits with 1 where one is more.
"""

import argparse
import asyncio
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

ROOT = Path(__file__).parent.parent
HEALTHY, STALLED, USERS = 1000, 100, 50
ROUND_SECONDS, POSTS_PER_SECOND = 12, 8
RATIO_MAX, MEGABYTES_MAX = 1.5, 1.5
SENT_AT = re.compile(rb"at (\d{19}) ")


class Reader(asyncio.Protocol):
    """A websocket client that reads, and takes the time of each message."""

    def __init__(self, delays: list[float]) -> None:
        self.delays = delays
        self.rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        """Find the messages in what has come; the rest of it is ASCII, but for the pings."""
        now = time.time_ns()
        if b"\x89\x00" in data:
            self.transport.write(b"\x8a\x80mask")
        data = self.rest + data
        end = 0
        for found in SENT_AT.finditer(data):
            self.delays.append((now - int(found[1])) / 1e6)
            end = found.end()
        self.rest = data[max(end, len(data) - 30) :]


def handshake(port: int, chat: int, token: str) -> bytes:
    """The request that opens a websocket (RFC 6455, section 1.2)."""
    return (
        f"GET /ws/{chat} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {token}\r\n"
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    ).encode()


class Bench:
    """A server, its users, one group, and those who listen to it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.api = f"http://127.0.0.1:{port}/api/v1"
        self.tokens: list[str] = []
        self.chat = 0
        self.delays: list[float] = []

    async def prepare(self, http: aiohttp.ClientSession) -> None:
        """Register the users, found the group, open the healthy sockets."""
        ids = []
        for number in range(USERS):
            name = f"user{number}"
            account = {"email": f"{name}@example.com", "password": "correct horse"}
            ids.append((await self.posts(http, "/users", account | {"username": name}))["id"])
            tokens = await self.posts(http, "/users/login", account)
            self.tokens.append(tokens["access_token"])
        group = {"is_group": True, "name": "all", "participant_ids": ids[1:]}
        self.chat = (await self.posts(http, "/chats", group))["id"]
        loop = asyncio.get_running_loop()
        for number in range(HEALTHY):
            transport, _ = await loop.create_connection(
                lambda: Reader(self.delays), "127.0.0.1", self.port
            )
            transport.write(handshake(self.port, self.chat, self.tokens[number % USERS]))

    async def posts(self, http: aiohttp.ClientSession, path: str, body: Any) -> Any:
        """Post, as the first user."""
        headers = {"Authorization": f"Bearer {self.tokens[0]}"} if self.tokens else {}
        async with http.post(self.api + path, json=body, headers=headers) as answer:
            answer.raise_for_status()
            return await answer.json()

    def stall(self) -> list[socket.socket]:
        """Open the sockets that never read."""
        opened = []
        for number in range(STALLED):
            peer = socket.socket()
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.connect(("127.0.0.1", self.port))
            peer.sendall(handshake(self.port, self.chat, self.tokens[number % USERS]))
            opened.append(peer)
        return opened

    async def round(self, http: aiohttp.ClientSession, stalled: int, server: int) -> list[float]:
        """Post for a while; answer p99 in milliseconds and the server's megabytes at the end."""
        peers = self.stall() if stalled else []
        await asyncio.sleep(1)
        self.delays.clear()
        text = "x" * 3970
        for _ in range(ROUND_SECONDS * POSTS_PER_SECOND):
            asked = time.monotonic()
            sent = {"text": f"at {time.time_ns()} {text}"}
            await self.posts(http, f"/chats/{self.chat}/messages", sent)
            await asyncio.sleep(max(0, 1 / POSTS_PER_SECOND - (time.monotonic() - asked)))
        expected = HEALTHY * ROUND_SECONDS * POSTS_PER_SECOND
        deadline = time.monotonic() + 30
        while len(self.delays) < expected:
            assert time.monotonic() < deadline, f"{len(self.delays)} of {expected} deliveries"
            await asyncio.sleep(0.1)
        megabytes = memory(server)
        for peer in peers:
            peer.close()
        return [statistics.quantiles(self.delays, n=100)[98], megabytes]


def memory(pid: int) -> float:
    """The resident memory of a process, in megabytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) / 1024


async def measure(rounds: int, port: int, server: int) -> int:
    """Run the rounds and print what they show."""
    bench = Bench(port)
    without: list[list[float]] = []
    beside: list[list[float]] = []
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        await bench.prepare(http)
        await bench.round(http, 0, server)  # to warm up
        for number in range(rounds):
            for stalled, results in ((0, without), (STALLED, beside)):
                results.append(await bench.round(http, stalled, server))
                p99, megabytes = results[-1]
                print(
                    f"round {number + 1}: {stalled:3} stalled, p99 {p99:.1f} ms, "
                    f"{megabytes:.0f} MB", flush=True,
                )
    plain, mixed = (statistics.median(p99 for p99, _ in each) for each in (without, beside))
    cost = max(b[1] - without[0][1] for b in beside) / STALLED
    ratio = mixed / plain
    print(f"p99 {plain:.1f} ms without, {mixed:.1f} ms beside {STALLED} stalled: {ratio:.2f}")
    print(f"memory: {cost:.2f} MB for each stalled socket")
    return int(ratio > RATIO_MAX or cost > MEGABYTES_MAX)


def main() -> int:
    """Start a server of its own, measure, end it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--port", type=int, default=8199)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="messenger-stalled-") as folder:
        settings = {"PORT": str(options.port), "DATA_DIR": folder, "RATE_LIMITS": "off"}
        server = subprocess.Popen(
            [sys.executable, ROOT / "messenger.py"],
            env=os.environ | settings | {"BCRYPT_COST": "4", "PYTHONWARNINGS": "ignore"},
            stdout=subprocess.PIPE, text=True,
        )
        try:
            assert server.stdout is not None
            for line in server.stdout:
                if line.startswith("next"):
                    break
            return uvloop.run(measure(options.rounds, options.port, server.pid))
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    sys.exit(main())
