"""The ceilings: what the machine can do where nothing but the unavoidable is done.

They run on the server's core, in Python on uvloop and asyncpg as the server does.
"""

import asyncio
import itertools
import os
import time
from collections.abc import Sequence
from typing import Any

import asyncpg
import msgspec
import uvloop
from aiohttp import WSMsgType, web
from rig import (
    SERVER_CORE,
    TEXT,
    Figures,
    cpu_milliseconds,
    database,
    messenger,
    percentile,
    pin,
    websocket,
)

LATE_SECONDS = 0.2
SESSION = {"jit": "off", "timezone": "UTC"}

# What reading is held against: the same rows, without readers, counts or permission.
PLAIN_PAGE = """
    select id, chat_id, seq, rev, sender_id, text, reply_to, created_at, edited_at, deleted_at
    from messages where chat_id = $1 and seq < $2 order by seq desc limit $3"""
PLAIN_CHANGES = """
    select id, chat_id, seq, rev, sender_id, text, reply_to, created_at, edited_at, deleted_at
    from messages where chat_id = $1 and seq > $2 order by seq limit $3"""
PLAIN_LIST = """
    select c.id, c.name, c.is_group, c.created_at, c.participant_count, c.last_rev, c.version
    from participants p join chats c on c.id = p.chat_id
    where p.user_id = $1 order by c.active_at desc, c.id desc limit $2"""
PLAIN_LOOK_UPS = """
    select id, name, is_group, created_at, participant_count, last_rev, version
    from chats where id = any ($1)"""

# What posting is held against: the same rows and a commit, without a lock, a check or a number.
INSERT_ONE = """
    insert into messages (chat_id, seq, rev, id, sender_id, text, created_at)
    values ($1, $2, $2, $3, $4, $5, clock_timestamp())"""
INSERT_MANY = """
    insert into messages (chat_id, seq, rev, id, sender_id, text, created_at)
    select chat_id, seq, seq, id, sender_id, text, clock_timestamp()
    from unnest($1::bigint[], $2::bigint[], $3::uuid[], $4::bigint[], $5::text[])
         as i (chat_id, seq, id, sender_id, text)"""


async def as_it_is(_connection: Any) -> None:
    """Leave a connection as it is between two users."""



def call_posts(
    dsn: str, chats: Sequence[int], senders: Sequence[int], group: int, seconds: float
) -> Figures:
    """Call the posting function alone, a group at a time, over the chats in turn."""

    async def call() -> Figures:
        connection = await asyncpg.connect(dsn, server_settings=SESSION)
        delays: list[float] = []
        place = 0
        began = now = time.perf_counter()
        while now < began + seconds:
            items = range(place, place + group)
            place += group
            arguments: list[list[Any]] = [
                [chats[item % len(chats)] for item in items],
                [senders[item % len(senders)] for item in items],
                [messenger.uuid7() for _ in items],
                [TEXT] * group,
                [None] * group,
            ]
            rows = await connection.fetch(
                messenger.POST_MESSAGES, *arguments, messenger.new_mark())
            assert all(row["outcome"] == "posted" for row in rows)
            before, now = now, time.perf_counter()
            delays.append((now - before) * 1000)
        await connection.close()
        return {"rate": place / (now - began), "p50": percentile(delays, 50)}

    return uvloop.run(call())


def call_inserts(
    dsn: str, chats: Sequence[int], senders: Sequence[int], group: int, seconds: float
) -> Figures:
    """Insert messages by a plain statement, a group at a time, over the chats in turn; also
    answers the processor time that each statement took its backend.
    """
    async def call() -> Figures:
        connection = await asyncpg.connect(dsn, server_settings=SESSION)
        pids = [connection.get_server_pid()]
        delays: list[float] = []
        place = 0
        numbers = itertools.count(time.time_ns())  # which no message of ours comes to
        began = now = time.perf_counter()
        used = cpu_milliseconds(pids)
        while now < began + seconds:
            items = range(place, place + group)
            place += group
            columns: list[list[Any]] = [
                [chats[item % len(chats)] for item in items],
                [next(numbers) for _ in items],
                [messenger.uuid7() for _ in items],
                [senders[item % len(senders)] for item in items],
                [TEXT] * group,
            ]
            if group == 1:
                await connection.fetch(INSERT_ONE, *(column[0] for column in columns))
            else:
                await connection.fetch(INSERT_MANY, *columns)
            before, now = now, time.perf_counter()
            delays.append((now - before) * 1000)
        used = cpu_milliseconds(pids) - used
        await connection.close()
        return {"rate": place / (now - began), "p50": percentile(delays, 50),
                "postgresql": used / len(delays)}

    return uvloop.run(call())


def call_select(
    dsn: str, query: str, arguments: Sequence[object], at_once: int, seconds: float
) -> Figures:
    """Run a plain SELECT alone, and fetch its rows."""
    delays: list[float] = []

    async def repeat(pool: Any, until: float) -> None:
        while (began := time.perf_counter()) < until:
            async with pool.acquire() as connection:
                await connection.fetch(query, *arguments)
            delays.append((time.perf_counter() - began) * 1000)

    async def call() -> Figures:
        most = min(at_once, database.CONNECTIONS_MAX)
        pool = await asyncpg.create_pool(
            dsn, min_size=most, max_size=most, server_settings=SESSION,
            reset=as_it_is,  # nothing is ever set on a connection
        )
        began = time.perf_counter()
        await asyncio.gather(*(repeat(pool, began + seconds) for _ in range(at_once)))
        passed = time.perf_counter() - began
        await pool.close()
        return {"rate": len(delays) / passed, "p50": percentile(delays, 50)}

    return uvloop.run(call())


def call_plain(
    dsn: str, query: str, arguments: Sequence[object], count: int, seconds: float
) -> Figures:
    """Run a plain SELECT of so many rows: milliseconds of processor time that each takes its
    backend, and its fetch.
    """
    async def repeat(connection: Any, until: float) -> int:
        done = 0
        while time.perf_counter() < until:
            assert len(await connection.fetch(query, *arguments)) == count
            done += 1
        return done

    async def call() -> Figures:
        connection = await asyncpg.connect(dsn, server_settings=SESSION)
        pids = [connection.get_server_pid()]
        await repeat(connection, time.perf_counter() + seconds / 8)
        before = cpu_milliseconds(pids), time.thread_time()
        done = await repeat(connection, time.perf_counter() + seconds)
        backend, own = cpu_milliseconds(pids) - before[0], time.thread_time() - before[1]
        await connection.close()
        return {"postgresql": backend / done, "fetch": own * 1000 / done}

    return uvloop.run(call())


def call_missed(dsn: str, chat: int, after: int, upto: int) -> Figures:
    """Read the messages of a catch-up by plain SELECTs alone, one after the other."""

    async def call() -> Figures:
        connection = await asyncpg.connect(dsn, server_settings=SESSION)
        began, at = time.perf_counter(), after
        while at < upto:
            missed = await connection.fetch(PLAIN_CHANGES, chat, at, messenger.REPLAY_PAGE)
            at += len(missed)
        passed = time.perf_counter() - began
        await connection.close()
        return {"rate": (upto - after) / passed, "seconds": passed}

    return uvloop.run(call())


class Listener(asyncio.Protocol):
    """A connection that gets everything; what it sends after its handshake is a post."""

    def __init__(self, room: "BareRoom") -> None:
        self.room = room
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way to the client."""
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        """Write to it no longer."""
        self.room.listeners.discard(self)

    def data_received(self, data: bytes) -> None:
        """Take a handshake, or a post."""
        if data.startswith(b"GET"):
            self.transport.write(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
            self.room.listeners.add(self)
        else:
            self.room.post(self)


class BareRoom:
    """Writes the same bytes to every socket for each post, so many posts at a time."""

    def __init__(self, delivery: bytes, ack: bytes, group: int) -> None:
        self.delivery, self.ack, self.group = delivery * group, ack, group
        self.listeners: set[Listener] = set()
        self.waiting: list[Listener] = []
        self.late = asyncio.get_running_loop().call_soon(self.write)

    def post(self, sender: Listener) -> None:
        """Write as soon as there is a whole group; at the end of a round there may be none."""
        self.waiting.append(sender)
        if len(self.waiting) >= self.group:
            self.write()
        elif len(self.waiting) == 1:
            self.late = asyncio.get_running_loop().call_later(LATE_SECONDS, self.write)

    def write(self) -> None:
        """Write to all, then answer the senders."""
        self.late.cancel()
        if not self.waiting:
            return
        for listener in self.listeners:
            listener.transport.write(self.delivery)
        for each in self.waiting:
            each.transport.write(self.ack)
        self.waiting.clear()


def serve_writes(port: Any, delivery: bytes, ack: bytes, group: int) -> None:
    """Serve a bare room until killed; `port` is told where."""
    pin(SERVER_CORE)

    async def serve() -> None:
        room = BareRoom(delivery, ack, group)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Listener(room), "127.0.0.1", 0, backlog=1024)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(serve())


async def serve_app(app: web.Application, port: Any, *more: object) -> None:
    """Serve an application for ever; `port` is told where, our process, and what more there is."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    port.send((runner.addresses[0][1], os.getpid(), *more))
    await asyncio.Event().wait()


def serve_bare(port: Any, dsn: str, query: str, arguments: Sequence[object]) -> None:
    """Serve by a bare aiohttp, until killed: an empty answer at `/`, and at `/page` the messages
    that a plain SELECT finds. `port` is told where, and the processes of both sides.
    """
    pin(SERVER_CORE)

    async def serve() -> None:
        connection = await asyncpg.connect(dsn, server_settings=SESSION)

        async def answer_nothing(_request: web.Request) -> web.Response:
            return web.Response()

        async def answer_page(_request: web.Request) -> web.Response:
            found = [messenger.Message(*row) for row in await connection.fetch(query, *arguments)]
            return web.Response(body=messenger.ENCODER.encode(found))

        app = web.Application()
        app.router.add_get("/", answer_nothing)
        app.router.add_get("/page", answer_page)
        await serve_app(app, port, connection.get_server_pid())

    uvloop.run(serve())


def serve_inserts(port: Any, dsn: str, chat: int, sender: int) -> None:
    """Serve a websocket of aiohttp that puts each text by a plain INSERT and acknowledges it, until
    killed.
    """
    pin(SERVER_CORE)
    ack = '{"type":"ack","data":{}}'

    async def serve() -> None:
        connection = await asyncpg.connect(dsn, server_settings=SESSION)
        numbers = itertools.count(time.time_ns())

        async def follow(request: web.Request) -> web.WebSocketResponse:
            ws = web.WebSocketResponse(compress=False)
            await ws.prepare(request)
            async for message in ws:
                if message.type is WSMsgType.TEXT:
                    text = msgspec.json.decode(message.data)["text"]
                    await connection.fetch(
                        INSERT_ONE, chat, next(numbers), messenger.uuid7(), sender, text)
                    await ws.send_str(ack)
            return ws

        app = web.Application()
        app.router.add_get("/ws", follow)
        await serve_app(app, port)

    uvloop.run(serve())


def serve_bare_websockets(port: Any) -> None:
    """Serve aiohttp's websockets as its documentation shows them, until killed."""
    pin(SERVER_CORE)

    async def follow(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse(heartbeat=websocket.HEARTBEAT_SECONDS, compress=False)
        await ws.prepare(request)
        async for message in ws:
            if message.type is WSMsgType.ERROR:
                break
        return ws

    async def serve() -> None:
        app = web.Application()
        app.router.add_get("/ws", follow)
        await serve_app(app, port)

    uvloop.run(serve())
