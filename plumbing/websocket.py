"""One connection of a websocket: whole frames out, and whether its peer is still there.

Frames are written to the transport as they are: aiohttp's own writer waits where a peer is slow,
and nothing may wait in a loop over many connections. So every frame here is whole, and unmasked and
uncompressed (RFC 6455, section 5).
"""

import asyncio
import time
import typing
from collections.abc import Collection
from typing import Any

from aiohttp import WSMessage, WSMsgType, web, web_ws
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_websocket import WebSocketReader

from plumbing.guard import STALLED_SECONDS, Tally
from plumbing.process import drop_frames
from plumbing.queues import Queues

FRAGMENT = WSMessage(WSMsgType.CONTINUATION, b"", "")
PING, PONG = 0x89, 0x8A  # first bytes of whole frames (RFC 6455, section 5.2)
TEXT, CLOSE = 0x81, 0x88
DATA = (0x0, 0x1, 0x2)  # opcodes: a continuation, a text, a binary message

# Close codes: the protocol's own (RFC 6455, section 7.4.1), and one of those left to applications.
OK = 1000
GOING_AWAY = 1001
STALLED = 4408

READ_AHEAD_BYTES = 2048
HEARTBEAT_SECONDS = 25  # of silence, then a ping
PONG_SECONDS = 15  # for its answer
MUCH_UNREAD = 64 * 1024  # bytes, of one connection ...
UNREAD_MAX = 16 * 1024 * 1024  # ... and of all such connections of an address
FLUSH_SECONDS = 0.0005  # of a round of the loop, in which what was written is handed on
CLOSE_SECONDS = 5  # for the peer's answer to a close; then the connection is cut
CLOSE_ALL_SECONDS = 1  # the same for all connections together


def text_frame(payload: bytes) -> bytes:
    """Frame a text: final and unmasked (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < 126:
        return bytes((TEXT, size)) + payload
    if size < 65_536:
        return bytes((TEXT, 126)) + size.to_bytes(2, "big") + payload
    return bytes((TEXT, 127)) + size.to_bytes(8, "big") + payload


def close_frame(code: int) -> bytes:
    """Frame a close without a reason (RFC 6455, section 5.5.1)."""
    return bytes((CLOSE, 2)) + code.to_bytes(2, "big")


class FragmentReader(WebSocketReader):
    """Reads frames as aiohttp does, and tells of each fragment before a message's last one, too.

    aiohttp collects them without a word: empty ones came without end, uncounted. Here each stands
    in the queue like a frame of its own: who takes the frames may count it, and a full queue stops
    the reading.
    """

    __slots__ = ("_queue",)

    def __init__(self, queue: Any, *args: Any, **options: Any) -> None:
        super().__init__(queue, *args, **options)
        self._queue = queue

    def feed_data(self, data: bytes | bytearray | memoryview) -> tuple[bool, bytes]:
        """Read bytes; answer whether that is the end, and what is left. What is wrong with a frame
        is kept without what led to it, for this would be in it.
        """
        answer = super().feed_data(data)
        if (error := self._queue.exception()) is not None:
            drop_frames(error)
        return answer

    def _handle_frame(
        self, fin: bool, opcode: int, payload: bytes | bytearray, compressed: int
    ) -> None:
        WebSocketReader._handle_frame(self, fin, opcode, payload, compressed)  # each frame pays
        if opcode in DATA and not fin:
            self._queue.feed_data(FRAGMENT, 0)


# aiohttp lets nobody choose the reader, nor for how many bytes it reads ahead of who takes the
# frames: of empty ones very many would be parsed in one round of the loop, for each socket.
web_ws.WebSocketReader = FragmentReader  # type: ignore[attr-defined]
web_ws.DEFAULT_CHUNK_SIZE = READ_AHEAD_BYTES  # type: ignore[attr-defined]


class Outbox:
    """Hands what is written to connections to the system: for a moment in each round of the event
    loop, of one connection after the other; addresses take turns. To do so costs more than
    anything else that is done for a frame; so what is written to one meanwhile goes out
    together.
    """

    def __init__(self) -> None:
        self._waiting: Queues[Connection] = Queues()  # by address
        self._is_due = False  # whether the next round begins soon

    def put(self, connection: "Connection") -> None:
        """Let a connection be flushed soon."""
        self._waiting.append(connection.address, connection)
        self._look_again()

    def _look_again(self) -> None:
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._is_due = False
        rest_at = time.monotonic() + FLUSH_SECONDS
        while following := self._waiting.take():
            _, connection = following
            connection.flush()
            if time.monotonic() > rest_at and self._waiting:
                self._look_again()
                break


class Connection:
    """One websocket, from before its handshake to after its close; made in its handler's task."""

    # There are many, most of them idle.
    __slots__ = (
        "_opened", "_outbox", "_pinged_at", "_taken", "_took_at", "_transport", "_waiting",
        "_waiting_bytes", "_writer", "_written", "address", "close_code", "heard_at", "task", "ws")

    def __init__(
        self, subprotocol: str, message_bytes_max: int, outbox: Outbox, address: str
    ) -> None:
        self.address = address  # of its client
        self.task = typing.cast("asyncio.Task[Any]", asyncio.current_task())  # its handler's
        self.ws: web.WebSocketResponse = web.WebSocketResponse(
            protocols=(subprotocol,), autoping=False, compress=False,
            max_msg_size=message_bytes_max + 1, timeout=CLOSE_SECONDS, autoclose=False)
        self.close_code: int | None = None  # once it is being closed
        self.heard_at = self._took_at = self._pinged_at = time.monotonic()
        self._written = self._taken = 0  # bytes in all; taken: at the last check
        self._transport: asyncio.Transport | None = None
        self._writer: AbstractStreamWriter | None = None
        self._outbox = outbox
        self._waiting: list[bytes] = []  # frames, for the handshake or the outbox
        self._waiting_bytes = 0
        self._opened: asyncio.Future[None] | None = None  # who else waits for the handshake

    def can_open(self, request: web.Request) -> bool:
        """Tell whether a request is a handshake. aiohttp would take a HEAD for one."""
        try:
            return request.method == "GET" and bool(self.ws.can_prepare(request))
        except ValueError:  # a header is beyond ASCII
            return False

    async def open(self, request: web.Request) -> None:
        """Answer the handshake, then write what was to be written before.

        Raises web.HTTPBadRequest where the request is no handshake, ConnectionError.
        """
        self._writer = await self.ws.prepare(request)
        self._transport = request.transport
        self.heard_at = self._took_at = time.monotonic()
        self.flush()
        if self._opened is not None:
            self._opened.set_result(None)

    def is_open(self) -> bool:
        """Tell whether the handshake was answered."""
        return self._transport is not None

    async def drain(self) -> None:
        """Wait until most of what was written is taken, and the handshake was answered before.

        Raises ConnectionError.
        """
        if self._writer is None:
            self._opened = self._opened or asyncio.get_running_loop().create_future()
            await asyncio.wait([self.task, self._opened], return_when=asyncio.FIRST_COMPLETED)
        if self._writer is None:
            raise ConnectionError("the handshake was refused")
        self.flush()
        await self._writer.drain()
        if self._transport is None or self._transport.is_closing():
            raise ConnectionError("the connection is lost")

    async def receive(self) -> WSMessage:
        """Take the next frame. Where it breaks the protocol, aiohttp closes by itself: what was
        written before goes out before.
        """
        reader = self.ws._reader
        if reader is not None and reader.exception() is not None:
            self.flush()
        return await self.ws.receive()

    def write(self, frames: bytes) -> None:
        """Write whole frames, without waiting; none after the close began."""
        if self.close_code is not None:
            return
        if self._transport is not None and not self._waiting:
            self._outbox.put(self)
        self._waiting.append(frames)
        self._waiting_bytes += len(frames)
        self._written += len(frames)

    def flush(self) -> None:
        """Hand what was written to the system."""
        frames, self._waiting, self._waiting_bytes = b"".join(self._waiting), [], 0
        if frames and self._transport is not None and not self._transport.is_closing():
            self._transport.write(frames)

    def pong(self, payload: bytes) -> None:
        """Answer a ping."""
        self.write(bytes((PONG, len(payload))) + payload)

    def unsent(self) -> int:
        """Tell how many bytes the peer has not taken yet."""
        sending = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return self._waiting_bytes + sending

    def check_liveness(self, now: float, unread: Tally) -> int | None:
        """Ping a silent peer; answer the code to close with, if it stalls or is gone.

        To be called once a second. A slow peer that takes bytes lives, though it answers no ping.
        What peers do not read is summed up by their address, where it is much of one; those beyond
        UNREAD_MAX are cut at once.
        """
        unsent = self.unsent()
        if unsent > MUCH_UNREAD:
            unread[self.address] += unsent
            if unread[self.address] > UNREAD_MAX:
                unread[self.address] -= unsent
                self.cut()
        if unsent == 0 or self._written - unsent > self._taken:
            self._took_at = now
        self._taken = self._written - unsent
        if now - self._took_at > STALLED_SECONDS:
            return STALLED
        if unsent == 0 and self._pinged_at > self.heard_at:
            return GOING_AWAY if now - self._pinged_at > PONG_SECONDS else None
        if now - max(self.heard_at, self._pinged_at) > HEARTBEAT_SECONDS:
            self._pinged_at = now
            self.write(bytes((PING, 0)))
        return None

    def begin_close(self, code: int) -> None:
        """Send the close, after which nothing more goes out; cut the connection in a while.

        Its handler goes on until the peer has answered. Where the handshake is not answered yet,
        the handler is cancelled.
        """
        if self.close_code is not None:
            return
        if self._transport is None:
            self.task.cancel()
        else:
            self.write(close_frame(code))
            asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._transport.abort)
        self.close_code = code

    def finish(self) -> None:
        """Answer the peer's close, if it began, and end the connection."""
        self.write(close_frame(OK))
        self.flush()
        self.cut()
        # Else aiohttp closes it again, and what is raised then and it refer to each other; so do
        # what was wrong with a frame and its reader.
        self.ws._eof_sent, self.ws._exception = True, None
        reader = self.ws._reader
        if reader is not None and (error := reader.exception()) is not None:
            drop_frames(error)

    def cut(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()


async def await_ends(connections: Collection[Connection]) -> None:
    """Wait until connections that are being closed have ended; cut those that do not end soon."""
    if connections:
        await asyncio.wait([each.task for each in connections], timeout=CLOSE_ALL_SECONDS)
    for each in connections:
        each.cut()
