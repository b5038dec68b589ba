#!/usr/bin/env python3
"""The checker: clients that use the messenger while everything beneath them is killed, and count.

    ./run torture --minutes 10 --seed 7     exits 0 if nothing was lost, doubled, missed, ...
    ./run torture --prove                   plants bugs, one at a time, and sees each one caught

It starts the messenger with two workers in a folder of its own. In four chats four members each
post, edit, delete and read; each action has its own id and is tried again until it is answered. A
keeper, who owns the chats, removes members and puts them back. Every member follows the chats on
sockets of both kinds, which come back with their number whenever they were cut. Meanwhile the
faults, drawn from the seed: SIGKILL, SIGTERM and SIGSTOP of workers and of their parent, SIGKILL of
the postmaster and of backends, all connections ended, the listening one cut, all hints dropped.

What is counted, each of which must be 0:

    lost        answered, or shown to somebody, and afterwards not in the database, or not as it was
    doubled     more than once in the database, or answered with two numbers
    missed      a member who followed did not end with it; or, with the hints dropped, got it late
    misordered  `rev` did not rise on a socket between two syncs; a sender's own order was broken;
                the numbers of a chat have holes; a watermark went back
    leaked      posted after somebody's removal and shown to them, or posted by them and accepted
    wrong       an answer that nobody should get (a 500, a member's 404), an end of its own accord

Inside the database a trigger, the witness, notes the chat's number at every coming and leaving:
those happen under the chat's lock, so it tells exactly what was posted after a removal.

The rooms of this file: Limits, The tally, The server, Who is there, Sockets, The run, Faults, The
check at the end, The proof, The command.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from array import array
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import asyncpg
import msgspec
import uvloop
from conftest import ROOT, processes_in

# ---- Limits

CHATS, USERS, MEMBERS, WORKERS = 4, 8, 4, 2
ASK_SECONDS = 3.0  # until a client takes an answer for lost; some stops of a worker last longer
REMOVED_SECONDS = (1.0, 2.0)  # longer than what an abandoned statement may still wait for a lock
LATE_SECONDS = 5.0  # with the hints dropped; it takes little more than a second
BACK_SECONDS = 30.0
START_SECONDS = 30.0
PROGRESS_SECONDS = 10
REST_SECONDS = (0.3, 0.9)  # between two faults
PAUSE_SECONDS = 0.05  # of a sender, on average
BURST = 6  # messages at once on one socket
RECENT = 50  # messages of one's own that may still be changed
TOLD = 8  # findings of each kind that are told in words

# ---- The tally


class Tally:
    """What was counted, and what was found wrong."""

    kinds = ("lost", "doubled", "missed", "misordered", "leaked", "wrong")

    def __init__(self, speaks: bool) -> None:
        self.began = time.monotonic()
        self.speaks = speaks
        self.sent = self.acknowledged = self.changed = self.delivered = 0
        self.found: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.recovery: dict[str, float] = {}  # kind of fault: the slowest
        self.slowest_delivery = 0.0  # with the hints dropped

    def say(self, text: str) -> None:
        """Print a line with the time of the run."""
        if self.speaks:
            print(f"{time.monotonic() - self.began:7.1f} s  {text}", flush=True)

    def blame(self, kind: str, text: str, times: int = 1) -> None:
        """Count something that must not be, and tell of the first few in words."""
        if times:
            self.found[kind] += times
            if self.found[kind] - times < TOLD:
                self.say(f"{kind.upper()}: {text}" + f" ({times} times)" * (times > 1))

    def progress(self) -> str:
        """What a line of progress says."""
        return (
            f"sent {self.sent}  acknowledged {self.acknowledged}  changed {self.changed}"
            f"  delivered {self.delivered}  faults {self.faults.total()}  {self.verdict()}"
        )

    def verdict(self) -> str:
        """The counts that must be 0."""
        return "  ".join(f"{kind} {self.found[kind]}" for kind in self.kinds)

    def summary(self) -> Iterator[str]:
        """What the run ends with."""
        yield (
            f"sent {self.sent}  acknowledged {self.acknowledged}  changed {self.changed}"
            f"  delivered {self.delivered}"
        )
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items()))
        yield f"faults {self.faults.total()}: {kinds}"
        yield self.verdict()
        slowest = sorted(self.recovery.items(), key=lambda each: -each[1])
        yield "slowest recovery: " + ", ".join(f"{kind} {took:.2f} s" for kind, took in slowest)
        yield f"slowest delivery with the hints dropped: {self.slowest_delivery:.2f} s"


# ---- The server

# The parent and each worker are started by way of this, which patches from outside: while the file
# TORTURE_MUTE exists no hint is published. And no server outlives the checker.
LAUNCHER = '''
import os
import sys
sys.path.insert(0, os.environ["TORTURE_TREE"])
import messenger
import postgres
messenger.__file__ = os.path.abspath(__file__)  # by which the parent starts its workers
publish = postgres.Notifications.publish
def publish_unless_mute(self, hints):
    if not os.path.exists(os.environ["TORTURE_MUTE"]):
        publish(self, hints)
postgres.Notifications.publish = publish_unless_mute
if messenger.PARENT not in os.environ:
    postgres.die_with(int(os.environ["TORTURE_PID"]))
sys.exit(messenger.main())
'''

WITNESS = (
    "create schema torture",
    """create table torture.turns (
        at bigint generated always as identity, chat_id bigint, user_id bigint, rev bigint,
        came boolean)""",
    """create function torture.note() returns trigger language plpgsql as $$
    declare
        p participants := case when tg_op = 'DELETE' then old else new end;
    begin
        insert into torture.turns (chat_id, user_id, rev, came)
        select c.id, p.user_id, c.last_rev, tg_op = 'INSERT' from chats c where c.id = p.chat_id;
        return null;
    end $$""",
    """create trigger torture after insert or delete on participants
       for each row execute function torture.note()""",
)


class Server:
    """A messenger of its own processes, in a folder of its own."""

    def __init__(self, folder: Path, tree: Path) -> None:
        self.folder = folder
        self.mute = folder / "mute"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes]
        self._launcher = folder / "launch_messenger.py"
        self._launcher.write_text(LAUNCHER)
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        self._environment = kept | {
            "PORT": str(self.port), "DATA_DIR": str(folder / "data"), "WORKERS": str(WORKERS),
            "BCRYPT_COST": "4", "RATE_LIMITS": "off", "ACCESS_TOKEN_EXPIRE_MINUTES": "1440",
            "TORTURE_TREE": str(tree), "TORTURE_MUTE": str(self.mute),
            "TORTURE_PID": str(os.getpid()),
        }  # fmt: skip

    def start(self) -> None:
        """Start the parent; it serves a little later."""
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(self._launcher)], cwd=self.folder, env=self._environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    async def ended(self, seconds: float) -> int | None:
        """Wait until the parent has ended, and its workers with it; answer its status."""
        workers, deadline = self.workers(), time.monotonic() + seconds
        while self.process.poll() is None or any(map(runs, workers)):
            if time.monotonic() > deadline:
                return None
            await asyncio.sleep(0.01)
        return self.process.returncode

    def workers(self) -> list[int]:
        """Answer the pids of the workers that there are."""
        pid = self.process.pid
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return [int(child) for child in children if self._launcher.name in command(child)]
        return []

    def postmaster(self) -> list[str]:
        """Answer the lines of PostgreSQL's pid file, [] while there is none."""
        with contextlib.suppress(OSError):
            return (self.folder / "data/postgres/postmaster.pid").read_text().splitlines()
        return []

    async def sql(self, query: str, *arguments: Any) -> list[Any]:
        """Ask PostgreSQL behind the messenger's back, waiting until it is there."""
        deadline = time.monotonic() + BACK_SECONDS
        while True:
            try:
                connection = await asyncpg.connect(
                    host=self.postmaster()[4], port=5432, user="messenger", database="postgres",
                    timeout=5, server_settings={"application_name": "torture"})
                try:
                    return list(await connection.fetch(query, *arguments))
                finally:
                    await connection.close(timeout=5)
            except (IndexError, OSError, TimeoutError, asyncpg.PostgresError,
                    asyncpg.InterfaceError):
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.05)

    def destroy(self) -> None:
        """Kill what is left of it: every process that works in its folder."""
        for pid in processes_in(self.folder):
            kill(pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.wait()


def free_port() -> int:
    """Find a port below those that the kernel gives to clients: one of these could take it."""
    for port in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("no free port")


def command(pid: str | int) -> str:
    """Answer the command line of a process, '' if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def runs(pid: int) -> bool:
    """Tell whether a process has not ended."""
    return command(pid) != ""


def kill(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


# ---- Who is there


class Data(msgspec.Struct):
    """Of any answer or frame what is looked at here."""

    id: int | str = ""
    chat_id: int = 0
    seq: int = 0
    rev: int = 0
    text: str = ""
    created_at: datetime | None = None
    deleted_at: datetime | None = None
    status: int | str = 0
    user_id: int = 0
    last_read_seq: int = 0
    access_token: str = ""


class Frame(msgspec.Struct):
    """What a socket is sent."""

    type: str
    data: Data
    ref: int | None = None
    chat_id: int | None = None


FRAME = msgspec.json.Decoder(Frame)
DATA = msgspec.json.Decoder(Data | list[Data])
NOTHING = Data()


@dataclass(eq=False)
class User:
    """Somebody with an account."""

    name: str
    id: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    seats: dict[int, "Seat"] = field(default_factory=dict)  # chat id: their seat there


@dataclass(eq=False)
class Chat:
    """A group."""

    id: int
    seats: list["Seat"] = field(default_factory=list)
    said: dict[int, tuple[Any, ...]] = field(default_factory=dict)  # rev: what it stands for
    changes: int = 0  # edits and deletions that were answered
    latest: str = ""  # the id of a message


@dataclass(eq=False)
class Removal:
    """A member's time outside, from before it was asked for until they are asked back."""

    heard: list[int] = field(default_factory=list)  # the revs that their sockets got meanwhile


INSIDE, LEAVING, OUT, COMING = range(4)


@dataclass(eq=False)
class Seat:
    """A user's place in a chat, and what they do there."""

    user: User
    chat: Chat
    is_bursting: bool
    device: "Device | None" = None  # which posts; None: REST does
    turn: int = 0  # counts through INSIDE, LEAVING, OUT, COMING: which it is, modulo 4
    came_at: float = 0.0
    floor: int = 0  # the largest seq that was acknowledged
    watermark: int = 0
    recent: deque["Message"] = field(default_factory=lambda: deque(maxlen=RECENT))
    removals: list[Removal] = field(default_factory=list)
    inside: asyncio.Event = field(default_factory=asyncio.Event)

    def step(self) -> None:
        """Go on to the next of the four."""
        self.turn += 1
        if self.turn % 4 == INSIDE:
            self.came_at = time.monotonic()
            self.inside.set()
        else:
            self.inside.clear()


@dataclass(eq=False, slots=True)
class Message:
    """A message that a client posts; `seq` is 0 until it is acknowledged."""

    seat: Seat
    id: str
    text: str
    floor: int  # of the sender's own that were acknowledged before: it comes after them
    seq: int = 0
    created_at: datetime | None = None
    state: str = "posted"  # "edited", "deleted"


# ---- Sockets

SYNCING, LIVE, JOINING, AWAY = "syncing", "live", "joining", "away"


@dataclass(eq=False)
class Book:
    """What a device has of one chat, kept by the contract's rules."""

    number: int = 0  # to come back with
    revs: array = field(default_factory=lambda: array("q"))  # by seq: the rev of what is kept
    state: str = AWAY
    last: int = 0  # the rev of the last frame on this socket
    after: int = 0  # what the present sync asked for
    falls: int = 0  # once for each sync the revs may go down: from what came before it
    counts: bool = False  # whether frames move the number: from a sync to its ready they do not

    def begins(self, after: int, by_frame: bool) -> None:
        """A sync begins: with the handshake, or by a frame, before which others may come."""
        self.state, self.after, self.counts = SYNCING, after, not by_frame
        self.falls += by_frame

    def pauses(self, state: str) -> None:
        """The chat is gone, or back from here on: what was posted between is not here."""
        self.state, self.counts = state, False


class Device:
    """A socket that comes back whenever it is cut: on one chat, or on all of its user's."""

    def __init__(self, run: "Run", user: User, chats: Sequence[Chat], follows_all: bool) -> None:
        self.run, self.user = run, user
        self.chats = {chat.id: chat for chat in chats}
        self.books = {chat.id: Book() for chat in chats}
        self.follows_all = follows_all
        self.ws: aiohttp.ClientWebSocketResponse | None = None
        self._answers: dict[int, asyncio.Future[tuple[int, Data]]] = {}

    async def stay(self) -> None:
        """Be connected, again and again."""
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                await self._connect()
            await asyncio.sleep(self.run.random.uniform(0.02, 0.15))

    async def _connect(self) -> None:
        path, seat, turn = "/ws", None, 0
        if not self.follows_all:
            [(chat_id, book)] = self.books.items()
            path, seat = f"/ws/{chat_id}?after={book.number}", self.user.seats[chat_id]
            turn = seat.turn
        try:
            async with asyncio.timeout(ASK_SECONDS):
                ws = await self.run.http.ws_connect(
                    self.run.server.url + path, headers=self.user.headers,
                    timeout=aiohttp.ClientWSTimeout(ws_close=1.0))
        except aiohttp.WSServerHandshakeError as error:
            return self.run.judge(seat, turn, error.status, f"the handshake of {path}")
        self.run.judge(seat, turn, 200, f"the handshake of {path}")
        try:
            await self._listen(ws)
        finally:
            self.ws = None
            for ref in self._answers:
                self._answer(ref, 0, NOTHING)
            for book in self.books.values():
                book.pauses(AWAY)
            await ws.close()

    async def _listen(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        for book in self.books.values():
            book.last, book.falls = 0 if self.follows_all else book.number, 0
            book.begins(book.number, by_frame=self.follows_all)
        self.ws = ws
        if self.follows_all:
            known = {str(chat_id): book.number for chat_id, book in self.books.items()}
            await self._send({"type": "sync", "chats": known})
        async for frame in ws:
            if frame.type is aiohttp.WSMsgType.TEXT:
                await self._take(FRAME.decode(frame.data))

    async def _send(self, frame: dict[str, Any]) -> None:
        if self.ws is not None:
            await self.ws.send_str(msgspec.json.encode(frame).decode())

    async def sync(self, chat_id: int, after: int) -> None:
        """Ask for everything after a number."""
        self.books[chat_id].begins(after, by_frame=True)
        await self._send({"type": "sync", "chat_id": chat_id, "after": after})

    async def posts(self, message: Message) -> tuple[int, Data]:
        """Post a message; answer 200 and the acknowledgement, an error's status, 0 for neither."""
        ref = next(self.run.numbers)
        frame = {"type": "message", "chat_id": message.seat.chat.id, "ref": ref}
        answer = self._answers[ref] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(ASK_SECONDS if self.ws is not None else 0):
                await self._send(frame | {"id": message.id, "text": message.text})
                return await answer
        except (aiohttp.ClientError, OSError, TimeoutError):
            return 0, NOTHING
        finally:
            del self._answers[ref]

    async def _take(self, frame: Frame) -> None:
        data = frame.data
        if frame.type in ("message", "message_updated"):
            self._take_message(data)
        elif frame.ref is not None:
            self._answer(frame.ref, 200 if frame.type == "ack" else int(data.status), data)
        elif frame.type == "ready":
            await self._take_ready(self.books[data.chat_id], data)
        elif frame.type == "chat":
            self.books[int(data.id)].pauses(JOINING)
        elif frame.type == "chat_removed":
            self.books[data.chat_id].pauses(AWAY)
        elif frame.type == "error":
            await self._take_refusal(frame.chat_id or min(self.books), int(data.status))

    def _answer(self, ref: int, status: int, data: Data) -> None:
        if ref in self._answers and not self._answers[ref].done():
            self._answers[ref].set_result((status, data))
        if status not in (0, 200, 404, 503):
            self.run.tally.blame("wrong", f"a frame was answered {status}: {data}")

    def _take_message(self, data: Data) -> None:
        chat, book = self.chats[data.chat_id], self.books[data.chat_id]
        self.run.tally.delivered += 1
        if data.rev <= book.last:
            if not book.falls or data.rev <= book.after:
                self.run.tally.blame("misordered", f"rev {data.rev} came after {book.last}")
            book.falls -= 1
        book.last = data.rev
        if book.counts:
            book.number = data.rev
        if len(book.revs) <= data.seq:
            book.revs.extend([0] * (data.seq + 1 - len(book.revs)))
        book.revs[data.seq] = max(book.revs[data.seq], data.rev)
        content = (data.id, data.seq, data.text, data.deleted_at is not None)
        if chat.said.setdefault(data.rev, content) != content:
            self.run.tally.blame("lost", f"rev {data.rev} was two things")
        seat = self.user.seats.get(chat.id)
        if seat is not None and seat.turn % 4 in (LEAVING, OUT):
            seat.removals[-1].heard.append(data.rev)

    async def _take_ready(self, book: Book, data: Data) -> None:
        if data.rev < book.last:
            self.run.tally.blame("misordered", f"ready at {data.rev} came after {book.last}")
        book.last = data.rev
        if book.state in (JOINING, AWAY):  # the chat is back: what was posted meanwhile?
            await self.sync(data.chat_id, book.number)
            return
        if data.rev < book.number:
            self.run.tally.blame("lost", f"came with {book.number}, the chat is at {data.rev}")
        book.state, book.number, book.counts = LIVE, data.rev, True
        book.falls = max(0, book.falls - 1)

    async def _take_refusal(self, chat_id: int, status: int) -> None:
        """A sync was refused: the user is out, or the database away."""
        self.books[chat_id].pauses(AWAY)
        if status == 503:
            await asyncio.sleep(0.1)
            await self.sync(chat_id, self.books[chat_id].number)

    def lacks(self, seat: Seat | None, chat_id: int, seq: int, rev: int) -> bool:
        """Tell whether it follows a chat, and has not this of it."""
        book = self.books[chat_id]
        return (seat is None or seat.inside.is_set()) and (
            len(book.revs) <= seq or book.revs[seq] < rev)


# ---- The run


class Run:
    """The clients of one run, and what they have done."""

    def __init__(self, server: Server, seed: int, tally: Tally, patience: float) -> None:
        self.server, self.tally = server, tally
        self.patience = patience  # seconds until everybody must have everything
        self.random = random.Random(f"clients {seed}")
        self.numbers = itertools.count(1)
        self.users = [User(f"user{number}") for number in range(USERS)]
        self.keeper = User("keeper")
        self.chats: list[Chat] = []
        self.devices: list[Device] = []
        self.messages: list[Message] = []  # all that were acknowledged
        self.unanswered: dict[str, Message] = {}
        self.unchanged: dict[str, tuple[Message, str | None]] = {}  # changes without an answer
        self.open = asyncio.Event()  # cleared for a moment of quiet
        self.busy = 0  # members who are being removed and put back
        self.watching: Callable[[float], None] = lambda _began: None  # acknowledgements
        self.tasks: set[asyncio.Task[None]] = set()
        self.staying: set[asyncio.Task[None]] = set()  # of these the devices'
        self.http: aiohttp.ClientSession

    @property
    def seats(self) -> list[Seat]:
        """All members' places."""
        return [seat for chat in self.chats for seat in chat.seats]

    # What is asked

    async def ask(
        self, user: User, method: str, path: str, body: Any = None, seconds: float = ASK_SECONDS
    ) -> tuple[int, Any]:
        """Send a request; answer its status, 0 if there came none, and what came."""
        try:
            async with self.http.request(
                method, f"{self.server.url}/api/v1{path}", headers=user.headers, json=body,
                timeout=aiohttp.ClientTimeout(seconds),
            ) as answer:  # fmt: skip
                text = await answer.read()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return 0, NOTHING
        if answer.status not in (200, 201, 204, 404, 503):
            self.tally.blame("wrong", f"{method} {path}: {answer.status} {text.decode()}")
        return answer.status, DATA.decode(text) if text else NOTHING

    async def insists(
        self, user: User, method: str, path: str, body: Any = None, seconds: float = BACK_SECONDS
    ) -> tuple[int, Any]:
        """Ask until there is an answer. Who gives up early may be heard after all, much later."""
        while True:
            status, answer = await self.ask(user, method, path, body, seconds)
            if status not in (0, 503):
                return status, answer
            await asyncio.sleep(self.random.uniform(0.02, 0.1))

    async def as_member(
        self, seat: Seat, call: Awaitable[tuple[int, Any]], what: str
    ) -> tuple[int, Any]:
        """Do something that members may, and see that just they do."""
        turn = seat.turn
        status, answer = await call
        self.judge(seat, turn, status, what)
        return status, answer

    def judge(self, seat: Seat | None, turn: int, status: int, what: str) -> None:
        """Look at an answer to somebody who was inside, or outside, from the question on."""
        if seat is None or seat.turn != turn:
            return
        if turn % 4 == OUT and 200 <= status < 300:
            self.tally.blame("leaked", f"{what} of somebody removed was answered {status}")
        elif turn % 4 == INSIDE and status == 404:
            self.tally.blame("wrong", f"{what} of a member was answered {status}")

    # Posting

    def compose(self, seat: Seat) -> Message:
        """Think of a message."""
        number = next(self.numbers)
        text = f"{number} " + "ж" * self.random.choice((5, 20, 80, 400))
        message = Message(seat, str(UUID(int=self.random.getrandbits(128))), text, seat.floor)
        self.unanswered[message.id] = message
        self.tally.sent += 1
        return message

    async def attempt(self, message: Message, device: Device | None) -> int:
        """Send a message once, over a socket or by REST; answer the status."""
        began, seat = time.monotonic(), message.seat
        call = device.posts(message) if device is not None else self.ask(
            seat.user, "POST", f"/chats/{seat.chat.id}/messages",
            {"id": message.id, "text": message.text})  # fmt: skip
        status, answer = await self.as_member(seat, call, "a post")
        if status in (200, 201):
            self._acknowledge(message, answer)
            self.watching(began)
        return status

    def _acknowledge(self, message: Message, answer: Data) -> None:
        seat = message.seat
        if message.seq:
            if message.seq != answer.seq:
                self.tally.blame("doubled", f"{message.id} is {message.seq} and {answer.seq}")
            return
        if answer.seq <= message.floor:
            text = f"{answer.seq} was posted after {message.floor}, of the same sender"
            self.tally.blame("misordered", text)
        message.seq, message.created_at = answer.seq, answer.created_at
        seat.floor = max(seat.floor, message.seq)
        seat.chat.latest = message.id
        seat.recent.append(message)
        del self.unanswered[message.id]
        self.messages.append(message)
        self.tally.acknowledged += 1

    async def persist(self, message: Message, device: Device | None) -> None:
        """Send a message until it is acknowledged; who is out waits until they are back."""
        while not message.seq:
            status = await self.attempt(message, device)
            if status == 404:
                await message.seat.inside.wait()
            if not message.seq:
                await asyncio.sleep(self.random.uniform(0.02, 0.1))

    async def burst(self, batch: list[Message], device: Device) -> None:
        """Send messages on one socket without waiting: those that it took are in their order."""
        await asyncio.gather(*[self.attempt(message, device) for message in batch])
        taken = [message.seq for message in batch if message.seq]
        if taken != sorted(taken):
            self.tally.blame("misordered", f"sent in a row on one socket, numbered {taken}")

    async def send(self, seat: Seat) -> None:
        """Post, edit and delete as a member, one thing or one burst after the other."""
        while True:
            await self.open.wait()
            await seat.inside.wait()
            batch = [self.compose(seat) for _ in range(BURST if seat.is_bursting else 1)]
            if seat.is_bursting and seat.device is not None:
                await self.burst(batch, seat.device)
            elif self.random.random() < 0.03:  # impatience: both ways at once
                await asyncio.gather(*[self.attempt(batch[0], d) for d in (None, seat.device)])
            for message in batch:
                await self.persist(message, seat.device)
            if self.random.random() < 0.3 and seat.recent:
                await self._change_one(seat)
            await asyncio.sleep(self.random.expovariate(1 / PAUSE_SECONDS))

    async def _change_one(self, seat: Seat) -> None:
        """Edit a message once, or delete it.

        Never edit it twice: an edit that a stopped worker took up, and its client gave up, would
        come back over the second.
        """
        message = self.random.choice(seat.recent)
        is_edit = message.state == "posted" and self.random.random() < 0.8
        if not is_edit:
            seat.recent.remove(message)
        await self.change(message, f"edited {message.text}" if is_edit else None)

    async def change(self, message: Message, text: str | None) -> None:
        """Edit a message, or (None) delete it, until that is answered."""
        self.unchanged[message.id] = message, text
        seat, path = message.seat, f"/chats/{message.seat.chat.id}/messages/{message.id}"
        how = ("DELETE", path) if text is None else ("PATCH", path, {"text": text})
        status = 0
        while status not in (200, 204):
            status, _ = await self.as_member(seat, self.ask(seat.user, *how), "a change")
            if status == 404:
                await seat.inside.wait()
            if status not in (200, 204):
                await asyncio.sleep(self.random.uniform(0.02, 0.1))
        message.text, message.state = text or "", "edited" if text else "deleted"
        seat.chat.changes += 1
        self.tally.changed += 1
        del self.unchanged[message.id]

    # Reading, removing, reconnecting

    async def read(self) -> None:
        """Read as anybody, now and then; see that nobody's watermark goes back."""
        while True:
            await asyncio.sleep(self.random.uniform(0.01, 0.1))
            seat = self.random.choice(self.seats)
            message_id = self.random.choice([m.id for m in seat.recent] + [seat.chat.latest] * 3)
            if message_id:
                await self._read_up_to(seat, message_id)
            if self.random.random() < 0.2:
                await self.look_at_watermarks(seat.chat)

    async def _read_up_to(self, seat: Seat, message_id: str) -> None:
        floor, path = seat.watermark, f"/chats/{seat.chat.id}/read"
        call = self.ask(seat.user, "POST", path, {"message_id": message_id})
        status, stand = await self.as_member(seat, call, "a read")
        if status == 200:
            self._see_watermark(seat, floor, stand.seq)

    async def look_at_watermarks(self, chat: Chat) -> None:
        """Ask where everybody in a chat stands."""
        floors = {seat.user.id: (seat, seat.watermark) for seat in chat.seats}
        status, people = await self.ask(self.keeper, "GET", f"/chats/{chat.id}/participants")
        for person in people if status == 200 else ():
            if person.user_id in floors:
                self._see_watermark(*floors[person.user_id], person.last_read_seq)

    def _see_watermark(self, seat: Seat, floor: int, seq: int) -> None:
        if seq < floor:
            self.tally.blame("misordered", f"a watermark went back from {floor} to {seq}")
        seat.watermark = max(seat.watermark, seq)

    async def keep(self) -> None:
        """Remove members and put them back."""
        while True:
            await asyncio.sleep(self.random.uniform(0.5, 1.5))
            await self.open.wait()
            seat = self.random.choice(self.seats)
            if time.monotonic() - seat.came_at > max(REMOVED_SECONDS):
                self.busy += 1
                await self._remove(seat)
                self.busy -= 1

    async def _remove(self, seat: Seat) -> None:
        """Remove a member, who posts as fast as they can just then, and put them back."""
        path = f"/chats/{seat.chat.id}/participants/{seat.user.id}"
        seat.step()
        seat.removals.append(Removal())
        last_words = [self.compose(seat) for _ in range(8)]
        removing = asyncio.create_task(self.insists(self.keeper, "DELETE", path))
        for message in last_words:
            self.spawn(self.persist(message, None))
            await asyncio.sleep(0.001)
        await removing
        seat.step()
        await asyncio.sleep(self.random.uniform(*REMOVED_SECONDS))
        await self._put_back(seat, path)

    async def _put_back(self, seat: Seat, path: str) -> None:
        seat.step()
        await self.insists(self.keeper, "POST", path)
        seat.step()

    async def churn(self) -> None:
        """Hang up now and then, or ask for some of the past again."""
        while True:
            await asyncio.sleep(self.random.uniform(0.1, 0.6))
            await self.open.wait()
            device = self.random.choice(self.devices)
            chat_id, book = self.random.choice(list(device.books.items()))
            if device.ws is not None and self.random.random() < 0.5:
                self.spawn(hang_up(device.ws))
            elif book.state == LIVE:
                after = max(0, book.number - self.random.randrange(400))
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    await device.sync(chat_id, after)

    # From the start to the end

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Start what ends with the clients."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[None]") -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.tally.blame("wrong", f"the checker failed: {task.exception()!r}")

    async def set_up(self) -> None:
        """Make the accounts, the witness and the chats, and connect everybody's devices."""
        for statement in WITNESS:
            await self.server.sql(statement)
        for user in (*self.users, self.keeper):
            account = {"email": f"{user.name}@example.com", "password": "correct horse"}
            _, made = await self.insists(
                self.keeper, "POST", "/users", account | {"username": user.name})
            _, tokens = await self.insists(self.keeper, "POST", "/users/login", account)
            user.id = int(made.id)
            user.headers = {"Authorization": f"Bearer {tokens.access_token}"}
        for number in range(CHATS):
            await self._found(number)
        for user in self.users:
            seats = list(user.seats.values())
            device = self._connect(user, [seat.chat for seat in seats], follows_all=True)
            for seat in seats:
                if seat.is_bursting and seat.device is None:
                    seat.device = device
        self._connect(self.keeper, self.chats, follows_all=True)

    async def _found(self, number: int) -> None:
        members = [self.users[(2 * number + each) % USERS] for each in range(MEMBERS)]
        body = {"is_group": True, "name": "a", "participant_ids": [user.id for user in members]}
        _, made = await self.insists(self.keeper, "POST", "/chats", body)
        chat = Chat(int(made.id))
        self.chats.append(chat)
        for place, user in enumerate(members):
            seat = user.seats[chat.id] = Seat(user, chat, is_bursting=place >= 2)
            seat.inside.set()
            chat.seats.append(seat)
            device = self._connect(user, [chat], follows_all=False)
            seat.device = (None, device, device, None)[place]

    def _connect(self, user: User, chats: Sequence[Chat], follows_all: bool) -> Device:
        device = Device(self, user, chats, follows_all)
        self.devices.append(device)
        return device

    async def begin(self) -> None:
        """Let everybody begin."""
        for device in self.devices:
            self.staying.add(self.spawn(device.stay()))
        self.open.set()
        for work in (self.read, self.keep, self.churn):
            self.spawn(work())
        for seat in self.seats:
            self.spawn(self.send(seat))

    async def cut_short(self) -> None:
        """Stop everybody in the middle of what they do, but for the devices."""
        stopping = self.tasks - self.staying
        for task in stopping:
            task.cancel()
        await asyncio.gather(*stopping, return_exceptions=True)
        self.busy = 0

    async def conclude(self) -> None:
        """Everybody comes back; what was not answered is sent again."""
        for seat in self.seats:
            if not seat.inside.is_set():
                seat.turn = seat.turn // 4 * 4 + OUT
                await self._put_back(seat, f"/chats/{seat.chat.id}/participants/{seat.user.id}")
        for message in list(self.unanswered.values()):
            await self.persist(message, None)
        for message, text in list(self.unchanged.values()):
            await self.change(message, text)

    async def until(self, holds: Callable[[], bool], seconds: float) -> bool:
        """Wait until something holds; tell whether it came to that."""
        deadline = time.monotonic() + seconds
        while not holds() and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        return holds()

    def is_settled(self) -> bool:
        """Tell whether nobody waits for anything and every device is live wherever it may be."""
        return not self.unanswered and not self.unchanged and not self.busy and all(
            book.state == LIVE for device in self.devices for book in device.books.values())


async def hang_up(ws: aiohttp.ClientWebSocketResponse) -> None:
    """Close a socket, however the other side takes it."""
    with contextlib.suppress(aiohttp.ClientError, OSError):
        await ws.close()


# ---- Faults

BACKENDS = "select pid from pg_stat_activity where application_name = 'messenger'"
END_BACKENDS = """
    select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'messenger'"""
# The listening connections are those without a name.
CUT_LISTENERS = """
    select pg_terminate_backend(pid) from pg_stat_activity
    where backend_type = 'client backend' and application_name = ''"""


class Faults:
    """What is done to a server, one fault after the other, drawn from the seed."""

    def __init__(self, run: Run, seed: int, allowed: Sequence[str]) -> None:
        self.run, self.server, self.tally = run, run.server, run.tally
        self.random = random.Random(f"faults {seed}")
        self.kinds: dict[str, tuple[int, Callable[[], Awaitable[float]]]] = {
            # kind: how often among the others, how (which answers since when it is over)
            "worker killed": (6, self._kill_worker),
            "worker ended": (4, self._end_worker),
            "worker stopped": (6, self._stop_worker),
            "parent killed": (1, self._kill_parent),
            "parent ended": (1, self._end_parent),
            "parent stopped": (2, self._stop_parent),
            "postmaster killed": (4, self._kill_postmaster),
            "backend killed": (4, self._kill_backend),
            "backends ended": (5, self._end_backends),
            "listeners cut": (5, self._cut_listeners),
            "hints dropped": (1, self._drop_hints),
        }
        self.kinds = {kind: self.kinds[kind] for kind in allowed or self.kinds}
        self._since = float("inf")
        self._back = asyncio.Event()
        run.watching = self._acknowledged

    def _drawn(self) -> Iterator[str]:
        """Answer kind after kind: first each once, then as often as their weights say."""
        weights = dict.fromkeys(self.kinds, 1)
        while True:
            deck = [kind for kind, weight in weights.items() for _ in range(weight)]
            yield from self.random.sample(deck, len(deck))
            weights = {kind: weight for kind, (weight, _) in self.kinds.items()}

    async def go_on(self) -> None:
        """Do one after the other; after each the clients get an answer, and a moment of rest."""
        await asyncio.sleep(max(REST_SECONDS))
        for kind in self._drawn():
            self._see_alive()
            self.tally.faults[kind] += 1
            self._since = await self.kinds[kind][1]()
            await self._recover(kind)
            await asyncio.sleep(self.random.uniform(*REST_SECONDS))

    def _acknowledged(self, began: float) -> None:
        if began > self._since:
            self._back.set()

    async def _recover(self, kind: str) -> None:
        """Measure until a post that was sent after the fault is acknowledged."""
        self._back.clear()
        try:
            await asyncio.wait_for(self._back.wait(), BACK_SECONDS)
        except TimeoutError:
            self.tally.blame("wrong", f"no post was acknowledged after: {kind}")
        took = time.monotonic() - self._since
        self._since = float("inf")
        self.tally.say(f"{kind}: back after {took:.2f} s")
        self.tally.recovery[kind] = max(took, self.tally.recovery.get(kind, 0))

    def _see_alive(self) -> None:
        if self.server.process.poll() is not None:
            status = self.server.process.returncode
            self.tally.blame("wrong", f"the server ended by itself with {status}")
            self.server.start()

    async def _worker(self) -> int:
        """Choose a worker, waiting until there are all."""
        await self.run.until(lambda: len(self.server.workers()) == WORKERS, BACK_SECONDS)
        return self.random.choice(self.server.workers())

    async def _kill_worker(self) -> float:
        kill(await self._worker(), signal.SIGKILL)
        return time.monotonic()

    async def _end_worker(self) -> float:
        kill(await self._worker(), signal.SIGTERM)
        return time.monotonic()

    async def _stop_worker(self) -> float:
        """Stop a worker, at times for longer than its clients wait."""
        is_long = self.random.random() < 0.2
        seconds = ASK_SECONDS + 1 if is_long else self.random.uniform(0.1, 1.0)
        await self._stop(await self._worker(), seconds)
        return time.monotonic()

    async def _stop(self, pid: int, seconds: float) -> None:
        kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            kill(pid, signal.SIGCONT)

    async def _kill_parent(self) -> float:
        """Kill the parent, with which everything dies; what watches over it starts it again."""
        began = time.monotonic()
        self.server.process.kill()
        await self._restart()
        return began

    async def _end_parent(self) -> float:
        began = time.monotonic()
        self.server.process.terminate()
        status = await self._restart()
        if status != 0:
            self.tally.blame("wrong", f"asked to stop, the server answered {status}")
        return began

    async def _restart(self) -> int | None:
        status = await self.server.ended(START_SECONDS)
        if status is None:
            self.tally.blame("wrong", "the server does not end")
            self.server.destroy()
        self.server.start()
        return status

    async def _stop_parent(self) -> float:
        """Stop the parent, and kill a worker, which nobody replaces then."""
        pid = await self._worker()
        stopped = asyncio.create_task(
            self._stop(self.server.process.pid, self.random.uniform(0.2, 1.5)))
        await asyncio.sleep(0.05)
        kill(pid, signal.SIGKILL)
        await stopped
        return time.monotonic()

    async def _kill_postmaster(self) -> float:
        while not self.server.postmaster()[7:]:  # it is just being started
            await asyncio.sleep(0.01)
        kill(int(self.server.postmaster()[0]), signal.SIGKILL)
        return time.monotonic()

    async def _kill_backend(self) -> float:
        pids = [row["pid"] for row in await self.server.sql(BACKENDS)]
        if pids:
            kill(self.random.choice(pids), signal.SIGKILL)
        return time.monotonic()

    async def _end_backends(self) -> float:
        await self.server.sql(END_BACKENDS)
        return time.monotonic()

    async def _cut_listeners(self) -> float:
        await self.server.sql(CUT_LISTENERS)
        return time.monotonic()

    async def _drop_hints(self) -> float:
        """Drop all hints: measure deliveries while nobody else posts, then let everybody."""
        self.run.open.clear()
        self.server.mute.touch()
        try:
            for _ in range(3):
                await self._spread()
                await asyncio.gather(*[self._time_delivery(chat) for chat in self.run.chats])
            self.run.open.set()
            await asyncio.sleep(self.random.uniform(0.5, 2.0))
        finally:
            self.server.mute.unlink()
        return time.monotonic()

    async def _spread(self) -> None:
        """Let half of the devices come back, to any worker; wait until all are live."""
        await self._worker()
        for device in self.random.sample(self.run.devices, len(self.run.devices) // 2):
            if device.ws is not None:
                self.run.spawn(hang_up(device.ws))
        await asyncio.sleep(0.5)
        if not await self.run.until(self.run.is_settled, BACK_SECONDS):
            self.tally.blame("missed", "somebody is not live, though all is quiet")

    async def _time_delivery(self, chat: Chat) -> None:
        """Post one message, and see when the last socket of the chat has it."""
        message = self.run.compose(self.random.choice(chat.seats))
        open_sockets = {each: each.ws for each in self.run.devices if chat.id in each.books}
        await self.run.persist(message, None)
        sent = time.monotonic()

        def late() -> list[Device]:
            return [each for each, ws in open_sockets.items() if ws is each.ws
                    and each.lacks(each.user.seats.get(chat.id), chat.id, message.seq, 1)]

        await self.run.until(lambda: not late(), LATE_SECONDS)
        self.tally.blame("missed", "not delivered while the hints were dropped", len(late()))
        took = time.monotonic() - sent
        self.tally.slowest_delivery = max(self.tally.slowest_delivery, took)


# ---- The check at the end

STORED = """
    select chat_id, seq, rev, id::text, sender_id, text, created_at,
           deleted_at is not null as is_deleted
    from messages order by chat_id, seq"""


class Check:
    """What the database holds in the end, against what was answered and what was shown."""

    def __init__(self, run: Run) -> None:
        self.run, self.server, self.blame = run, run.server, run.tally.blame

    async def unanswered(self) -> None:
        """What was not answered is there once, or not at all."""
        ids = list(self.run.unanswered)
        rows = await self.server.sql(
            "select id from messages where id = any ($1::uuid[]) group by id having count(*) > 1",
            ids)
        self.blame("doubled", "not answered, and there more than once", len(rows))

    async def everything(self) -> None:
        """Everything else, once everybody is back."""
        rows = await self.server.sql(STORED)
        numbers = await self.server.sql("select id, last_rev from chats")
        turns = await self.server.sql("select * from torture.turns order by at")
        await self._arrived({row["id"]: row["last_rev"] for row in numbers})
        self._answered(rows)
        for row in numbers:
            chat = next(chat for chat in self.run.chats if chat.id == row["id"])
            stored = [each for each in rows if each["chat_id"] == chat.id]
            self._numbered(chat, stored, row["last_rev"])
            self._shown(chat, stored)
            for seat in chat.seats:
                self._kept_out(seat, stored, [
                    turn for turn in turns
                    if (turn["chat_id"], turn["user_id"]) == (chat.id, seat.user.id)])

    async def _arrived(self, last: dict[int, int]) -> None:
        """Wait until every device is live with the last number of each of its chats."""
        def lagging() -> int:
            return sum(book.state != LIVE or book.number < last[chat_id]
                       for device in self.run.devices for chat_id, book in device.books.items())

        await self.run.until(lambda: not lagging(), self.run.patience)
        self.blame("missed", "a socket does not come to the last number", lagging())

    def _answered(self, rows: list[Any]) -> None:
        """Every acknowledged id is there once, as it was, at its number; and nobody else's is."""
        by_id: dict[str, Any] = {}
        for row in rows:
            if by_id.setdefault(row["id"], row) is not row:
                self.blame("doubled", f"{row['id']} is {by_id[row['id']]['seq']} and {row['seq']}")
        for message in self.run.messages:
            row, seat = by_id.pop(message.id, None), message.seat
            if row is None:
                self.blame("lost", f"{message.id} was answered, and is not there")
                continue
            was = (seat.chat.id, message.seq, seat.user.id, message.text, message.created_at)
            now = tuple(row[name] for name in ("chat_id", "seq", "sender_id", "text", "created_at"))
            if was != now:
                self.blame("lost", f"answered as {was}, stored as {now}")
        unknown = by_id.keys() - self.run.unanswered.keys()
        self.blame("doubled", "there, and never sent", len(unknown))

    def _numbered(self, chat: Chat, stored: list[Any], last: int) -> None:
        """The numbers have no holes, none was given twice, and times follow them."""
        if last != len(stored) + chat.changes or last < max([row["rev"] for row in stored] or [0]):
            text = f"{len(stored)} posts and {chat.changes} changes took {last} numbers"
            self.blame("misordered", text)
        taken = Counter(number for row in stored for number in {row["seq"], row["rev"]})
        twice = sum(times > 1 for times in taken.values())
        self.blame("misordered", "a number was given twice", twice)
        for one, other in itertools.pairwise(stored):
            if one["created_at"] > other["created_at"]:
                self.blame("misordered", f"{other['seq']} is older than {one['seq']}")

    def _shown(self, chat: Chat, stored: list[Any]) -> None:
        """Every device has every message as it is; and nothing was shown that is not there."""
        for device in self.run.devices:
            if chat.id in device.books:
                seat = device.user.seats.get(chat.id)
                lacking = sum(
                    device.lacks(seat, chat.id, row["seq"], row["rev"]) for row in stored)
                self.blame("missed", f"{device.user.name} lacks changes", lacking)
        there = {row["id"] for row in stored}
        gone = sum(content[0] not in there for content in chat.said.values())
        self.blame("lost", "shown to somebody, and not there", gone)
        changed = sum(
            chat.said.get(row["rev"], now) != now for row in stored
            for now in [(row["id"], row["seq"], row["text"], row["is_deleted"])])
        self.blame("lost", "shown to somebody, and not as it is", changed)

    def _kept_out(self, seat: Seat, stored: list[Any], turns: list[Any]) -> None:
        """Who was removed was shown nothing newer, and posted nothing, until they were back."""
        left = [turn["rev"] for turn in turns if not turn["came"]]
        came = [turn["rev"] for turn in turns if turn["came"]][1:]
        for removal, rev in zip(seat.removals, left, strict=False):
            self.blame("leaked", "shown after a removal", sum(each > rev for each in removal.heard))
        for out, back in itertools.zip_longest(left, came, fillvalue=sys.maxsize):
            accepted = [row for row in stored if row["sender_id"] == seat.user.id
                        and (out < row["seq"] <= back or out < row["rev"] <= back)]
            self.blame("leaked", "accepted after a removal", len(accepted))


# ---- The proof


@dataclass(frozen=True)
class Plant:
    """A bug, the faults that bring it out, and the counts of which one must tell of it."""

    name: str
    told_by: tuple[str, ...]
    faults: tuple[str, ...]
    changes: tuple[tuple[str, str, str], ...]  # file, what stands there, what is put there


CRASH = ("postmaster killed", "backend killed")
COMMITS = "    rows = await app[DATABASE].rows(POST_MESSAGES, *columns(posts))\n"
ANSWERS_EARLY = '''    pool = app[DATABASE]._pool
    connection = await pool.acquire(timeout=2)
    transaction = connection.transaction()
    await transaction.start()
    rows = await connection.fetch(POST_MESSAGES, *columns(posts))
    async def commit():
        await asyncio.sleep(0.1)
        try:
            await transaction.commit()
        finally:
            await pool.release(connection)
    app[LIVE].spawn(commit())
'''
LOCK = """    perform 1 from chats c where c.id = any (chat_ids) order by c.id for no key update;
    at := clock_timestamp();

"""
ACCEPTED = "    accepted := array(\n        select i.item from unnest(chat_ids, sender_ids, ids)\n"
NOT_THERE = """
        where not exists (select from messages m where m.chat_id = i.chat_id and m.id = i.id));
"""
FIRST_COUNTS = """    accepted := array(
        select min(item) from unnest(accepted) as item group by chat_ids[item], ids[item]);
"""
STORED_ONE = """    left join messages m on m.chat_id = i.chat_id and m.id = i.id
    order by i.item;"""
STORED_LAST = """    left join lateral (
        select * from messages x where x.chat_id = i.chat_id and x.id = i.id
        order by x.seq desc limit 1) m on true
    order by i.item;"""
SEQUENCES = """
do $$ begin
    for number in 1 .. 9 loop
        execute format('create sequence if not exists numbers_%s', number);
    end loop;
end $$;
"""
FUNCTIONS, SCHEMA = "sql/post-apply.sql", "sql/0001_schema.sql"

PLANTS = (
    Plant("synchronous_commit=off", ("lost",), CRASH, (
        ("postgres.py", '"synchronous_commit": "on"', '"synchronous_commit": "off"'),)),
    Plant("no idempotency", ("doubled",), ("worker killed", *CRASH), (
        (SCHEMA, ",\n    constraint messages_id unique (chat_id, id)", ""),
        (FUNCTIONS, NOT_THERE, ");\n"),
        (FUNCTIONS, FIRST_COUNTS, ""),
        (FUNCTIONS, STORED_ONE, STORED_LAST))),
    Plant("sequence numbers instead of the chat's lock", ("missed", "misordered"), CRASH, (
        (SCHEMA, "constraint messages_id unique (chat_id, id)\n);\n",
         "constraint messages_id unique (chat_id, id)\n);\n" + SEQUENCES),
        (FUNCTIONS, LOCK + ACCEPTED, "    at := clock_timestamp();\n" + ACCEPTED),
        (FUNCTIONS, "c.last_rev + row_number() over (partition by i.chat_id order by i.item) as",
         "nextval('numbers_' || i.chat_id) as"),
        (FUNCTIONS, "set last_rev = p.seq, last_seq = p.seq,",
         "set last_rev = greatest(c.last_rev, p.seq), last_seq = greatest(c.last_seq, p.seq),"),
        (FUNCTIONS, "set last_rev = c.last_rev + 1 where",
         "set last_rev = greatest(c.last_rev, nextval('numbers_' || c.id)) where"))),
    Plant("an answer before the commit", ("lost",), ("worker killed", *CRASH), (
        ("messenger.py", COMMITS, ANSWERS_EARLY),)),
    Plant("no holes filled", ("missed",), ("listeners cut",), (
        ("messenger.py", "version <= room.version and len(fresh) == rev - room.delivered:",
         "version <= room.version:"),)),
    Plant("no polls", ("missed",), ("hints dropped",), (
        ("messenger.py", "self.spawn(self._database.repeat(self._poll, ", "len(("),)),
    Plant("membership checked before the lock", ("leaked",), ("listeners cut",), (
        (FUNCTIONS, LOCK + ACCEPTED, ACCEPTED),
        (FUNCTIONS, NOT_THERE, NOT_THERE + LOCK))),
    Plant("late removal", ("leaked",), ("listeners cut",), (
        ("messenger.py", "in departed]:\n            self.dismiss(",
         "in departed]:\n            asyncio.get_running_loop().call_later(0.3, self.dismiss, "),)),
    Plant("a watermark that may go back", ("misordered",), ("listeners cut",), (
        (FUNCTIONS, "        where m.seq > p.last_read_seq\n        group by p.chat_id",
         "        group by p.chat_id"),)),
    Plant("live after one page of a replay", ("missed",), ("worker killed",), (
        ("messenger.py",
         "        replay.at = messages[-1].rev if len(messages) == REPLAY_PAGE else upto\n",
         "        self._join(guest, room)\n"),)),
)  # fmt: skip


def planted(folder: Path, plant: Plant | None) -> Path:
    """Copy the messenger, and put a bug into it. Raises ValueError if its text is not found."""
    tree = folder / "tree"
    tree.mkdir()
    for name in ("messenger.py", "postgres.py"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "sql", tree / "sql")
    for name, old, new in plant.changes if plant is not None else ():
        text = (tree / name).read_text()
        if text.count(old) != 1:
            raise ValueError(f"{plant}: {name} has {text.count(old)} times:\n{old}")
        (tree / name).write_text(text.replace(old, new))
    return tree


async def prove(seed: int) -> bool:
    """Find nothing in a copy as it is, and each bug that is planted in one; tell whether so."""
    proven = True
    for plant in (None, *PLANTS):
        began = time.monotonic()
        with scratch() as folder:
            tree = planted(folder, plant)
            tally = await torture(
                folder, tree, 7, seed, plant.faults if plant else (), False, 5 if plant else 30)
        caught = not tally.found if plant is None else any(map(tally.found.get, plant.told_by))
        proven = proven and caught
        what = "as it is" if plant is None else f"planted: {plant.name}"
        found = tally.verdict() if tally.found else "nothing found"
        verdict = "as it must" if caught else "WHICH IS WRONG"
        took = time.monotonic() - began
        print(f"{what}: {found}, {verdict} ({tally.acknowledged} acknowledged, {took:.1f} s)",
              flush=True)
    return proven


# ---- The command


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Make a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        yield Path(folder).resolve()


async def torture(
    folder: Path, tree: Path, seconds: float, seed: int, faults: Sequence[str], speaks: bool,
    patience: float,
) -> Tally:
    """Run the clients and the faults for a while, then check; answer what was counted."""
    server = Server(folder, tree)
    tally = Tally(speaks)
    run = Run(server, seed, tally, patience)
    try:
        server.start()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as run.http:
            await torment(run, Faults(run, seed, faults), seconds)
            await judge(run)
            for task in run.tasks:
                task.cancel()
            await asyncio.gather(*run.tasks, return_exceptions=True)
        await see_it_off(server, tally)
    finally:
        server.destroy()
    return tally


async def torment(run: Run, faults: Faults, seconds: float) -> None:
    """Let everybody do what they do, for so long; then kill it all in the middle of that."""
    async with asyncio.timeout(START_SECONDS):
        await run.set_up()
    await run.begin()
    going = run.spawn(faults.go_on())
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not going.done():
        await asyncio.sleep(min(PROGRESS_SECONDS, max(0, deadline - time.monotonic())))
        run.tally.say(run.tally.progress())
    run.server.process.kill()
    await run.cut_short()
    run.server.mute.unlink(missing_ok=True)
    run.tally.faults["parent killed"] += 1
    await run.server.ended(START_SECONDS)
    run.server.start()


async def judge(run: Run) -> None:
    """Check what was left unanswered, let everybody come back, check everything."""
    check = Check(run)
    await check.unanswered()
    try:
        async with asyncio.timeout(run.patience):
            await run.conclude()
    except TimeoutError:
        left = len(run.unanswered) + len(run.unchanged)
        run.tally.blame("wrong", f"{left} things are not answered in the end")
    for chat in run.chats:
        await run.look_at_watermarks(chat)
    await check.everything()


async def see_it_off(server: Server, tally: Tally) -> None:
    """Stop the server; see that it ends well, leaves nothing behind and complained of nothing."""
    server.process.terminate()
    status = await server.ended(START_SECONDS)
    left = processes_in(server.folder)
    if status != 0 or left:
        tally.blame("wrong", f"the server ended with {status} and left {left}")
    log = (server.folder / "server.log").read_text()
    if "Traceback" in log or " ERROR " in log:
        tally.blame("wrong", f"the server complained:\n{log}")


def main() -> int:
    """Do what the command line says; answer the exit status."""
    parser = argparse.ArgumentParser(prog="./run torture", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (1)")
    parser.add_argument("--seed", type=int, default=1, help="what the faults are drawn from (1)")
    parser.add_argument("--prove", action="store_true", help="see planted bugs caught")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if given.prove:
        return 0 if uvloop.run(prove(given.seed)) else 1
    with scratch() as folder:
        tally = uvloop.run(torture(folder, ROOT, given.minutes * 60, given.seed, (), True, 60))
    print(f"seed {given.seed}, {given.minutes:g} minutes, {WORKERS} workers")
    print("\n".join(tally.summary()))
    return 1 if tally.found else 0


if __name__ == "__main__":
    sys.exit(main())
