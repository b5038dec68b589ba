"""Connections by hand, over which anything can be sent: websockets, and plain HTTP."""

import asyncio
import contextlib
import json
import socket
from typing import Any

from aiohttp.test_utils import TestServer

from support.hostile import frame
from support.people import HEAR_SECONDS, Heard, Person

TEXT, BINARY, CLOSE, PING, PONG = 0x81, 0x82, 0x88, 0x89, 0x8A
HANDSHAKE = {
    "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
}
LONG = "x" * 4000  # a text, a few of which fill the buffers of a socket that is not read


def handshake(port: int, path: str, token: str) -> bytes:
    """Write the request that opens a websocket."""
    headers = {"Host": f"127.0.0.1:{port}", **HANDSHAKE, "Authorization": f"Bearer {token}"}
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


class RawLine:
    """A websocket by hand: it reads when it is told to, and answers nothing by itself."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self._read = bytearray()

    async def opens(
        self, port: int, path: str, token: str, receive_bytes: int | None = None
    ) -> "RawLine":
        """Connect and do the handshake; `receive_bytes` makes the kernel's buffer small."""
        loop = asyncio.get_running_loop()
        if receive_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        await loop.sock_connect(self.socket, ("127.0.0.1", port))
        await self.gives(handshake(port, path, token))
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += await self._takes_bytes(1)
        assert head.startswith(b"HTTP/1.1 101 "), head
        return self

    def __del__(self) -> None:
        self.socket.close()

    async def gives(self, data: bytes) -> None:
        """Send bytes as they are."""
        async with asyncio.timeout(HEAR_SECONDS):
            await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def sends(self, opcode: int, payload: bytes = b"") -> None:
        """Send a frame, masked by zeros."""
        await self.gives(frame(opcode, payload))

    async def takes(self) -> tuple[int, bytes]:
        """Read a frame: its first byte and its payload. Raises EOFError, ConnectionError."""
        first, size = await self._takes_bytes(2)
        if size >= 126:
            size = int.from_bytes(await self._takes_bytes(2 if size == 126 else 8), "big")
        return first, await self._takes_bytes(size)

    async def hears(self, *types: str) -> Heard:
        """Wait for the next text frame of one of the types (any, if none is named)."""
        while True:
            first, payload = await self.takes()
            if first == TEXT and (not types or json.loads(payload)["type"] in types):
                return Heard(json.loads(payload))

    async def _takes_bytes(self, size: int) -> bytes:
        async with asyncio.timeout(HEAR_SECONDS):
            while len(self._read) < size:
                more = await asyncio.get_running_loop().sock_recv(self.socket, 65_536)
                if not more:
                    raise EOFError
                self._read += more
        taken = bytes(self._read[:size])
        del self._read[:size]
        return taken


class Wire:
    """The same for a thread without an event loop: it sends whatever it is given."""

    def __init__(self, port: int, path: str, token: str) -> None:
        self.path = path
        self.socket = socket.create_connection(("127.0.0.1", port), HEAR_SECONDS)
        self.socket.sendall(handshake(port, path, token))
        self._read = bytearray()
        while b"\r\n\r\n" not in self._read:
            self._receive()
        head, _, self._read = self._read.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head

    def gives(self, data: bytes) -> None:
        """Send bytes; the server may have closed before it took all of them."""
        with contextlib.suppress(ConnectionError):  # why is told by what can still be read
            self.socket.sendall(data)

    def takes(self) -> tuple[int, bytes]:
        """Read a frame: its first byte and its payload. Raises EOFError, ConnectionError."""
        self._awaits(2)
        size, start = self._read[1], 2
        if size >= 126:
            start = 4 if size == 126 else 10
            self._awaits(start)
            size = int.from_bytes(self._read[2:start], "big")
        self._awaits(start + size)
        taken = self._read[0], bytes(self._read[start : start + size])
        del self._read[: start + size]
        return taken

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    def _awaits(self, size: int) -> None:
        while len(self._read) < size:
            self._receive()

    def _receive(self) -> None:
        more = self.socket.recv(262_144)
        if not more:
            raise EOFError
        self._read += more


def transport_of(server: TestServer, connection: socket.socket) -> asyncio.Transport:
    """Find the server's end of a connection, and make the kernel's buffer there small."""
    assert server.runner is not None
    assert server.runner.server is not None
    transports = [each.transport for each in server.runner.server.connections]
    name = connection.getsockname()
    [transport] = [t for t in transports if t and t.get_extra_info("peername") == name]
    end = transport.get_extra_info("socket")
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
    return transport


async def stalls(
    server: TestServer, open_raw: Any, person: Person, chat: int
) -> tuple[RawLine, asyncio.Transport]:
    """Open a socket that does not read, with small buffers in the kernel; and its server's end."""
    line = await open_raw(person, chat, receive_bytes=4096)
    await line.hears("ready")
    return line, transport_of(server, line.socket)


class RawConnection:
    """A connection over which anything can be sent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def opens(cls, port: int | None, text: bytes) -> "RawConnection":
        """Connect, and send something."""
        connection = cls(*await asyncio.open_connection("127.0.0.1", port))
        connection.writer.write(text)
        return connection

    def close(self) -> None:
        """Hang up."""
        self.writer.close()

    async def hears(self) -> tuple[int, dict[str, str], bytes]:
        """Read an answer: status, headers, body."""
        async with asyncio.timeout(HEAR_SECONDS):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            lines = head.rstrip().split("\r\n")
            assert lines[0].startswith(("HTTP/1.0 ", "HTTP/1.1 ")), lines[0]
            headers = {n.title(): v for n, v in (line.split(": ", 1) for line in lines[1:])}
            body = await self.reader.readexactly(int(headers["Content-Length"]))
        return int(lines[0].split()[1]), headers, body

    async def hears_all(self) -> bytes:
        """Read all that comes until the server hangs up."""
        read = b""
        async with asyncio.timeout(HEAR_SECONDS):
            # It hangs up before it took all of a long request: what it said came before.
            with contextlib.suppress(ConnectionError):
                while more := await self.reader.read(65_536):
                    read += more
        return read

    async def is_cut(self) -> bool:
        """Tell that the server has hung up, without another word."""
        async with asyncio.timeout(HEAR_SECONDS):
            try:
                return await self.reader.read() == b""
            except ConnectionError:
                return True
