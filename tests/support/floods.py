"""Somebody who sends as much as they can, from an address and in a process of their own.

    python tests/support/floods.py PORT ORIGIN SECONDS < floods.json

What is sent is a list of floods, all at the same time. Tells on stdout, as JSON, how often each
status or close came.
"""

import asyncio
import contextlib
import itertools
import json
import os
import socket
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Literal

CALLS, BLOCKS, SILENCE, LISTENING, HASTE = "calls", "blocks", "silence", "listening", "haste"
HASTE_SECONDS = 0.004  # until who is in haste hangs up
SMALL_BYTES = 4096  # of the buffer of who does not read


@dataclass
class Flood:
    """What is sent over so many connections at once.

    `calls`: each sends a request, reads the answer, and goes on with the next. `blocks`: each sends
    the first once, then the second again and again, and passes over what it hears; who is hung up
    on comes back. `silence`: each sends the first, which may be nothing, and reads nothing.
    `listening`: each sends one, and reads whatever comes.
    `haste`: each sends one, hangs up before it can be answered, and comes back at once.
    """

    name: str
    kind: Literal["calls", "blocks", "silence", "listening", "haste"]
    sends: list[str]  # bytes, as Latin-1
    connections: int = 30


class Flooder:
    """Sends floods to a port until it is told to stop."""

    def __init__(self, port: int, origin: str) -> None:
        self.port, self.origin = port, origin
        self.heard: Counter[str] = Counter()

    async def sends(self, flood: Flood) -> None:
        """Send a flood over one connection after the other."""
        work = {CALLS: self.calls, BLOCKS: self.blocks, SILENCE: self.is_silent,
                LISTENING: self.listens, HASTE: self.hangs_up}[flood.kind]
        sends = itertools.cycle(each.encode("latin-1") for each in flood.sends)
        connections = [self.comes_back(work, sends, flood) for _ in range(flood.connections)]
        await asyncio.gather(*connections)

    async def comes_back(self, work, sends, flood: Flood) -> None:  # type: ignore[no-untyped-def]
        """Connect again whenever a connection has ended."""
        while True:
            end = socket.socket()
            if flood.kind == SILENCE:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BYTES)
            end.setblocking(False)
            end.bind((self.origin, 0))
            try:
                await asyncio.get_running_loop().sock_connect(end, ("127.0.0.1", self.port))
                reader, writer = await asyncio.open_connection(sock=end)
                try:
                    await work(reader, writer, sends)
                finally:
                    writer.close()
            except (OSError, EOFError, asyncio.IncompleteReadError):
                self.heard["closed"] += 1
            await asyncio.sleep(0 if flood.kind == HASTE else 0.05)

    async def calls(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
        sends: "itertools.cycle[bytes]",
    ) -> None:
        """Send a request and read its answer, again and again."""
        while True:
            writer.write(next(sends))
            head = await reader.readuntil(b"\r\n\r\n")
            self.heard[head[9:12].decode()] += 1
            for line in head.lower().split(b"\r\n"):
                if line.startswith(b"content-length: "):
                    await reader.readexactly(int(line[16:]))

    async def blocks(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
        sends: "itertools.cycle[bytes]",
    ) -> None:
        """Send the first once, then the second for as long as it is taken."""
        writer.write(next(sends))
        block = next(sends)
        head = await reader.readuntil(b"\r\n\r\n")
        self.heard[head[9:12].decode()] += 1

        async def goes_on() -> None:
            with contextlib.suppress(OSError):
                while True:
                    writer.write(block)
                    await writer.drain()

        going_on = asyncio.create_task(goes_on())
        try:
            while await reader.read(1 << 20):
                pass
        finally:
            going_on.cancel()
        raise EOFError

    async def is_silent(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
        sends: "itertools.cycle[bytes]",
    ) -> None:
        """Send something, and hold the connection for as long as that is possible."""
        writer.write(next(sends))
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(3600)

    async def listens(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
        sends: "itertools.cycle[bytes]",
    ) -> None:
        """Send something, and read whatever comes."""
        writer.write(next(sends))
        head = await reader.readuntil(b"\r\n\r\n")
        self.heard[head[9:12].decode()] += 1
        while await reader.read(1 << 20):
            pass
        raise EOFError

    async def hangs_up(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
        sends: "itertools.cycle[bytes]",
    ) -> None:
        """Send something, and hang up."""
        writer.write(next(sends))
        await asyncio.sleep(HASTE_SECONDS)
        writer.transport.abort()
        self.heard["hung up"] += 1


async def main() -> None:
    """Send what stdin says, for so many seconds.

    Whoever floods has a machine of their own: here they take what processor time the others leave.
    """
    os.nice(19)
    flooder = Flooder(int(sys.argv[1]), sys.argv[2])
    floods = [Flood(**each) for each in json.load(sys.stdin)]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(float(sys.argv[3])):
            await asyncio.gather(*map(flooder.sends, floods))
    print(json.dumps(flooder.heard))


async def flood(port: int, origin: str, seconds: float, floods: list[Flood]) -> dict[str, int]:
    """Send floods from a process of its own; answer what it heard."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, str(port), origin, str(seconds),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    try:
        said, _ = await process.communicate(json.dumps([asdict(each) for each in floods]).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    heard: dict[str, int] = json.loads(said)
    return heard


if __name__ == "__main__":
    asyncio.run(main())
