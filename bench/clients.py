"""The load: clients that cost less than the server they measure.

Requests are encoded before they are needed; a masking key of zeros leaves them as they are (the
server unmasks them all the same). Answers are not parsed but searched for what ends them. So one
delivery costs a client one read and one search. That the load was not the limit is seen in the
table: beside each row stands what part of its own core the load used.
"""

import asyncio
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rig import Figures, Server, percentile

PING, PONG = b"\x89\x00", b"\x8a\x80\x00\x00\x00\x00"
ACK, READY = b'"type":"ack"', b'"type":"ready"'
SENT_AT = re.compile(rb"at (\d{19})")
HEAD_END = b"\r\n\r\n"
LENGTH = re.compile(rb"\r\nContent-Length: (\d+)", re.IGNORECASE)
GENEROUS_SECONDS = 60
HANDSHAKES_AT_ONCE = 20  # two questions to PostgreSQL each


def frame(text: str) -> bytes:
    """Encode a text for a server (RFC 6455, section 5.2)."""
    payload = text.encode()
    assert len(payload) < 65_536
    size = len(payload)
    head = bytes((0x81, 0x80 | size)) if size < 126 else b"\x81\xfe" + size.to_bytes(2, "big")
    return head + bytes(4) + payload


def post_frame(text: str, chat: int | None = None) -> bytes:
    """Encode a message frame that asks for an acknowledgement."""
    named = f'"chat_id":{chat},' if chat is not None else ""
    return frame(f'{{"type":"message",{named}"ref":1,"text":"{text}"}}')


def post_frames_now(text: str) -> Iterator[bytes]:
    """Encode message frames that tell when they were sent."""
    start, end = post_frame(f"at {0:019} {text}").split(b"0" * 19)
    while True:
        yield b"%b%019d%b" % (start, time.time_ns(), end)


def handshake(path: str, token: str) -> bytes:
    """The request that opens a websocket (RFC 6455, section 1.2)."""
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    ).encode()


def get_request(path: str, token: str) -> bytes:
    """A GET on a connection that is kept."""
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n"
    ).encode()


class Socket(asyncio.Protocol):
    """A websocket that counts the bytes that come, and answers pings."""

    def __init__(self, path: str, token: str) -> None:
        self.request = handshake(path, token)
        self.opened = asyncio.get_running_loop().create_future()
        self.bytes = 0
        self.is_open = False
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the websocket."""
        self.transport = transport
        self.transport.write(self.request)

    def connection_lost(self, error: Exception | None) -> None:
        """Fail whoever waits for it."""
        if not self.opened.done():
            self.opened.set_exception(error or ConnectionError("hung up"))

    def data_received(self, data: bytes) -> None:
        """Count; the first that comes is the answer to the handshake."""
        self.bytes += len(data)
        if PING in data:  # a text here is ASCII
            self.bytes -= len(PING)
            self.transport.write(PONG)
        if self.is_open:
            self.take(data)
        elif data.startswith(b"HTTP/1.1 101"):
            self.is_open = True
            self.opened.set_result(None)
            self.take(data.partition(HEAD_END)[2])
        else:
            self.opened.set_exception(ConnectionError(data[:300].decode()))

    def take(self, data: bytes) -> None:
        """Do something with what has come."""


class TimedSocket(Socket):
    """A websocket that takes the time of messages that tell when they were sent."""

    def __init__(self, path: str, token: str, delays: list[float]) -> None:
        super().__init__(path, token)
        self.delays = delays
        self.rest = b""

    def take(self, data: bytes) -> None:
        """Find the times, also one that came in two pieces."""
        now, data, end = time.time_ns(), self.rest + data, 0
        for found in SENT_AT.finditer(data):
            self.delays.append((now - int(found[1])) / 1e6)
            end = found.end()
        self.rest = data[max(end, len(data) - 21) :]


class Sender(Socket):
    """A websocket that posts, and posts again once it is answered; `window` at a time."""

    def __init__(self, path: str, token: str, frames: Iterator[bytes]) -> None:
        super().__init__(path, token)
        self.frames = frames
        self.rest = b""
        self.outstanding = self.answered = 0
        self.until = self.sent_at = 0.0
        self.delays: list[float] = []
        self.done = self.opened

    def start(self, until: float, window: int = 1) -> "asyncio.Future[None]":
        """Begin; what is answered is done once the time is over and nothing is outstanding."""
        self.until, self.outstanding, self.answered = until, window, 0
        self.delays = []
        self.done = asyncio.get_running_loop().create_future()
        self.sent_at = time.perf_counter()
        self.transport.write(b"".join(next(self.frames) for _ in range(window)))
        return self.done

    def take(self, data: bytes) -> None:
        """Find the acknowledgements."""
        data = self.rest + data
        self.rest = data[1 - len(ACK) :]
        found = data.count(ACK)
        if found:
            self.go_on(found, time.perf_counter())

    def go_on(self, found: int, now: float) -> None:
        """Post as many as were answered, while there is time."""
        self.answered += found
        self.delays.append((now - self.sent_at) * 1000)
        if now < self.until:
            self.sent_at = now
            self.transport.write(b"".join([next(self.frames) for _ in range(found)]))
        else:
            self.outstanding -= found
            if self.outstanding <= 0 and not self.done.done():
                self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """Fail whoever waits for it."""
        super().connection_lost(error)
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("hung up"))


class Getter(asyncio.Protocol):
    """A connection that asks for the same again once it is answered."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.transport: Any = None
        self.got = bytearray()
        self.until = self.sent_at = 0.0
        self.delays: list[float] = []
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way to the server."""
        self.transport = transport

    def start(self, until: float) -> "asyncio.Future[None]":
        """Begin; what is answered is done at the first answer after the time is over."""
        self.until, self.delays = until, []
        self.done = asyncio.get_running_loop().create_future()
        self.ask()
        return self.done

    def ask(self) -> None:
        """Send the request."""
        self.sent_at = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Take a piece of an answer; at its end ask again."""
        self.got += data
        head = self.got.find(HEAD_END)
        length = LENGTH.search(self.got, 0, head) if head >= 0 else None
        if length is None or len(self.got) < head + len(HEAD_END) + int(length[1]):
            return
        now = time.perf_counter()
        self.delays.append((now - self.sent_at) * 1000)
        if not self.got.startswith(b"HTTP/1.1 200"):
            self.done.set_exception(ConnectionError(self.got[:300].decode(errors="replace")))
        elif now < self.until:
            self.got.clear()
            self.ask()
        else:
            self.got.clear()
            self.done.set_result(None)


async def connect(port: int, protocol: Callable[[], Any]) -> Any:
    """Connect, and answer the client."""
    loop = asyncio.get_running_loop()
    return (await loop.create_connection(protocol, "127.0.0.1", port))[1]


async def open_all(port: int, makers: Sequence[Callable[[], Socket]]) -> list[Any]:
    """Open websockets, some at a time."""
    opened: list[Socket] = []
    for start in range(0, len(makers), HANDSHAKES_AT_ONCE):
        pending = makers[start : start + HANDSHAKES_AT_ONCE]
        fresh = await asyncio.gather(*(connect(port, maker) for maker in pending))
        async with asyncio.timeout(GENEROUS_SECONDS):
            await asyncio.gather(*(socket.opened for socket in fresh))
        opened += fresh
    return opened


def close_all(clients: Sequence[Any]) -> None:
    """Hang up, at once."""
    for client in clients:
        client.transport.abort()


def keep_open(sockets: Sequence[Socket]) -> None:
    """Let the server hear of each socket: it pings none while it is measured."""
    for socket in sockets:
        socket.transport.write(PONG)


async def post_for(senders: Sequence[Sender], seconds: float, window: int = 1) -> Figures:
    """Let senders post for a while; the rate counts what was acknowledged."""
    began = time.perf_counter()
    async with asyncio.timeout(seconds + GENEROUS_SECONDS):
        await asyncio.gather(*(sender.start(began + seconds, window) for sender in senders))
    passed = time.perf_counter() - began
    delays = [delay for sender in senders for delay in sender.delays]
    answered = sum(sender.answered for sender in senders)
    return {"rate": answered / passed, "p50": percentile(delays, 50), "p99": percentile(delays, 99)}


async def get_for(server: Server, request: bytes, at_once: int, seconds: float) -> Figures:
    """Ask for the same for a while, so many at a time."""
    getters = [await connect(server.port, lambda: Getter(request)) for _ in range(at_once)]
    began = time.perf_counter()
    async with asyncio.timeout(seconds + GENEROUS_SECONDS):
        await asyncio.gather(*(getter.start(began + seconds) for getter in getters))
    passed = time.perf_counter() - began
    close_all(getters)
    delays = [delay for getter in getters for delay in getter.delays]
    return {"rate": len(delays) / passed, "p50": percentile(delays, 50)}
