"""Whatever ends is freed at once: nothing is left that only a collection of cycles would find.

The messenger collects hardly ever, for a collection stands still. So a call or a socket whose end
left objects that refer to each other would take memory for long.
"""

import asyncio
import signal
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from support.hostile import frame
from support.people import HEAR_SECONDS, Person
from support.raw import CLOSE, TEXT, RawConnection, handshake
from support.servers import ROOT, SECRET_KEY, Server

pytestmark = pytest.mark.usefixtures("nothing_left")

REPEATED = 20  # times, of each kind

# A server that is started by way of this tells how much it collects whenever it is asked.
COUNTING = f"""
import gc, signal, sys
sys.path[:0] = {str(ROOT)!r}, {str(ROOT / "tests")!r}
import messenger
from support import patience
patience.begin()
signal.signal(signal.SIGUSR1, lambda *_: print("collected", gc.collect(), file=sys.stderr))
sys.exit(messenger.main())
"""


@pytest.fixture
async def server(database_url: str, tmp_path: Path) -> AsyncIterator[Server]:
    """A server that tells how much it collects."""
    server = Server(tmp_path, DATABASE_URL=database_url, SECRET_KEY=SECRET_KEY)
    server.program = tmp_path / "launch_messenger.py"
    server.program.write_text(COUNTING)
    await server.starts()
    yield server
    await server.stops()


async def collected(server: Server) -> int:
    """Have everything collected that is left; answer how many objects that were."""
    before = server.log().count("collected")
    server.process.send_signal(signal.SIGUSR1)
    async with asyncio.timeout(HEAR_SECONDS):
        while server.log().count("collected") == before:
            await asyncio.sleep(0.01)
    return int(server.log().rsplit("collected", 1)[1])


def call(method: str, path: str, token: str, body: bytes = b"", more: str = "") -> bytes:
    """Write a request, after whose answer the connection is closed."""
    return (f"{method} /api/v1{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
            f"Connection: close\r\nContent-Type: application/json\r\n{more}"
            f"Content-Length: {len(body)}\r\n\r\n").encode() + body


async def test_calls_and_sockets_that_end_leave_nothing_to_collect(
    server: Server, people_of: Callable[..., Awaitable[Person]]
) -> None:
    """Calls that are answered or refused in any way, connections that are cut at any moment, and
    sockets that are refused, closed by either side or cut."""
    alice, bob = [await people_of(server, name) for name in ("alice", "bob")]
    chat, long = await alice.founds(bob), await alice.founds(bob)
    for _ in range(100):
        await alice.says(long, "字" * 4_000)
    token, port = alice.access, server.port
    text = b'{"text":"hello"}'
    opens = handshake(port, "/ws", token)
    close = frame(CLOSE, (1000).to_bytes(2, "big"))
    kinds = {
        "read": call("GET", "/chats", token),
        "posted": call("POST", f"/chats/{chat}/messages", token, text),
        "of no shape": call("POST", f"/chats/{chat}/messages", token, b'{"text":1}'),
        "no JSON": call("POST", f"/chats/{chat}/messages", token, b"{"),
        "of a stranger": call("POST", "/chats/999999/messages", token, text),
        "of nobody": call("GET", "/users/me", "nothing"),
        "no path": call("GET", "/nothing", token),
        "no method": call("PUT", "/users", token),
        "expecting": call("GET", "/chats", token, more="Expect: x\r\n"),
        "taken": call("POST", "/users", token, b'{"username":"bob","email":"bob@example.com",'
                      b'"password":"correct horse 1"}'),
        "no login": call("POST", "/users/login", "", b'{"email":"bob@example.com",'
                         b'"password":"another one 1"}'),
        "unreadable": b"nothing\r\n\r\n",
        "too long": b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 5_000,
        "cut head": b"GET / HTTP/1.1\r\n",
        "cut body": call("POST", f"/chats/{chat}/messages", token, text)[:-5],
        "cut after the answer": call("POST", "/nothing", token, text)[:-5],
        "cut answer": call("GET", "/chats", token),
        "cut while it is written": call("GET", f"/chats/{long}/messages?limit=100", token),
        "ahead": call("GET", "/chats", token).replace(b"Connection: close\r\n", b"") * 10,
        "ahead and reset": call("POST", "/nothing", "", b"x" * 1_000).replace(
            b"Connection: close\r\n", b"") * 2,
        "socket": opens + frame(TEXT, b'{"type":"sync","chats":{"%d":0}}' % chat) + close,
        "wrong frames": opens + frame(TEXT, b"{") + frame(TEXT, b'{"type":"x"}') + close,
        "no text": opens + frame(TEXT, b"\xff"),
        "no continuation": opens + frame(0x80, b"x"),
        "wrong close": opens + frame(CLOSE, b"x"),
        "pinged and reset": opens + frame(0x89, b"") * 300,
        "expecting and reset": call(
            "POST", "/users/login", "", text, more="Expect: 100-continue\r\n"),
        "cut before no text": handshake(port, f"/ws/{chat}", token) + frame(
            TEXT, b'{"type":"sync","chats":{"%d":1,"999999":0}}' % chat) * 4 + frame(
            TEXT, b"\xff"),
        "cut before no continuation": opens + frame(
            TEXT, b'{"type":"sync","chats":{"999999":0}}') * 4 + frame(0x80, b"x"),
        "broken frame": opens + b"\xff\xff\xff",
        "cut socket": opens,
        "refused socket": handshake(port, "/ws", "nothing"),
        "socket of no chat": handshake(port, "/ws/999999", token),
        "refused and pinged": handshake(port, "/ws", "nothing") + frame(0x89, b""),
        "of no chat and pinged": handshake(port, "/ws/999999", token) + frame(0x89, b""),
        "refused and asked": handshake(port, "/ws", "nothing") + call("GET", "/chats", token),
        "sync of no chat": opens + frame(TEXT, b'{"type":"sync","chats":{"999999":0}}') + close,
    }
    await collected(server)
    left = {}
    for name, sent in kinds.items():
        for number in range(REPEATED):
            connection = await RawConnection.opens(port, sent)
            if name.endswith("reset"):
                end = connection.writer.get_extra_info("socket")
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                await asyncio.sleep(0.002 if name.startswith("pinged") else 0)
                connection.writer.transport.abort()
            elif name.startswith("cut"):
                await asyncio.sleep(number / 2000 if name.startswith("cut before") else 0.02)
                connection.writer.transport.abort()
            elif name == "ahead":
                await asyncio.sleep(0.02)
                connection.close()
            else:
                await connection.hears_all()
                connection.close()
        await asyncio.sleep(0.2)
        left[name] = await collected(server)
    assert {name: count for name, count in left.items() if count > 3 * REPEATED} == {}
