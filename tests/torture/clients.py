"""The clients of the checker: they post, edit, delete, read and follow, and do not give up.

What they are told they hold against the contract at once; what they were answered, and what they
have in the end, is for the check at the end (__main__.py).

    Who is there     users, chats, a user's seat in a chat, messages
    Sockets          a device: what it has of each chat, by the contract's rules, and its socket
    The run          all of them together: what they do, from the start to the end
"""

import asyncio
import contextlib
import itertools
import random
import time
from array import array
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import aiohttp
import msgspec

from torture.server import BACK_SECONDS, WITNESS, Server, Tally

# ---- Limits

CHATS, USERS, MEMBERS = 4, 8, 4
ASK_SECONDS = 3.0  # until a client takes an answer for lost; some stops of a worker last longer
REMOVED_SECONDS = (1.0, 2.0)  # longer than what an abandoned statement may still wait for a lock
PAUSE_SECONDS = 0.05  # of a sender, on average
BURST = 6  # messages at once on one socket
LAST_WORDS = 16  # of who is just being removed
KEEPERS = 2  # at work at once
READIES = 2  # of which one answers a sync
RECENT = 50  # messages of one's own that may still be changed

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
    # Once for each sync the revs may go down, from what came before it. Here is for how many more
    # `ready`s: the next may be one that nobody asked for, of a socket that fell behind.
    falls: list[int] = field(default_factory=list)
    counts: bool = False  # whether frames move the number: from a sync to its ready they do not

    def begins(self, after: int, by_frame: bool) -> None:
        """A sync begins: with the handshake, or by a frame, before which others may come."""
        self.state, self.after, self.counts = SYNCING, after, not by_frame
        if by_frame:
            self.falls.append(READIES)

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
        self.url = ""  # of the server that it is connected to
        self._hung_up: aiohttp.ClientWebSocketResponse | None = None  # by this side
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
        self.url, began, status = self.run.server.url, time.monotonic(), 0
        try:
            async with asyncio.timeout(ASK_SECONDS):
                ws = await self.run.http.ws_connect(
                    self.url + path, headers=self.user.headers,
                    timeout=aiohttp.ClientWSTimeout(ws_close=1.0))
            status = 200
        except aiohttp.WSServerHandshakeError as error:
            status = error.status
            return self.run.judge(seat, turn, status, f"the handshake of {path}")
        finally:
            self.run.noting(self.url, began, status, f"the handshake of {path}")
        self.run.judge(seat, turn, 200, f"the handshake of {path}")
        try:
            await self._listen(ws)
            if ws is not self._hung_up and (ws.close_code or 0) < 4000:  # else about the user
                self.run.noting(self.url, began, 0, f"{path}, closed with {ws.close_code}")
        finally:
            self.ws = None
            for ref in self._answers:
                self._answer(ref, 0, NOTHING)
            for book in self.books.values():
                book.pauses(AWAY)
            await ws.close()

    async def _listen(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        for book in self.books.values():
            book.last, book.falls = 0 if self.follows_all else book.number, []
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

    async def hang_up(self) -> None:
        """Close the socket, however the other side takes it."""
        if self.ws is not None:
            self._hung_up = self.ws
            with contextlib.suppress(aiohttp.ClientError, OSError):
                await self.ws.close()

    async def sync(self, chat_id: int, after: int) -> None:
        """Ask for everything after a number."""
        self.books[chat_id].begins(after, by_frame=True)
        await self._send({"type": "sync", "chat_id": chat_id, "after": after})

    async def posts(self, message: Message) -> tuple[int, Data]:
        """Post a message; answer 200 and the acknowledgement, an error's status, 0 for neither."""
        ref, is_open, began = next(self.run.numbers), self.ws is not None, time.monotonic()
        frame = {"type": "message", "chat_id": message.seat.chat.id, "ref": ref}
        answer = self._answers[ref] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(ASK_SECONDS if is_open else 0):
                await self._send(frame | {"id": message.id, "text": message.text})
                status, data = await answer
            if status:  # else the socket ended, which is noted where it is seen
                self.run.noting(self.url, began, status, "a post by frame")
            return status, data
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if is_open and isinstance(error, TimeoutError):
                self.run.noting(self.url, began, 0, "a post by frame")
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
            del book.falls[:1]
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
        book.falls = [each - 1 for each in book.falls if each > 1]

    async def _take_refusal(self, chat_id: int, status: int) -> None:
        """A sync was refused: the user is out, or the database away."""
        self.books[chat_id].pauses(AWAY)
        self.run.noting(self.url, time.monotonic(), status, "a sync")
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
        # Every answer to a post: its chat, when it was asked, the status (0: none came).
        self.watching: Callable[[Chat, float, int], None] = lambda *_answer: None
        # Every answer: the server's URL, when it was asked, the status (0: none came), and what.
        self.noting: Callable[[str, float, int, str], None] = lambda *_answer: None
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
        url, began = self.server.url, time.monotonic()
        try:
            async with self.http.request(
                method, f"{url}/api/v1{path}", headers=user.headers, json=body,
                timeout=aiohttp.ClientTimeout(seconds),
            ) as answer:
                text = await answer.read()
        except (aiohttp.ClientError, OSError, TimeoutError):
            self.noting(url, began, 0, f"{method} {path}")
            return 0, NOTHING
        self.noting(url, began, answer.status, f"{method} {path}")
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
            {"id": message.id, "text": message.text})
        status, answer = await self.as_member(seat, call, "a post")
        if status in (200, 201):
            self._acknowledge(message, answer)
        self.watching(seat.chat, began, status)
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
            seat = self.random.choice([seat for seat in self.seats if seat.inside.is_set()])
            if time.monotonic() - seat.came_at > max(REMOVED_SECONDS):
                self.busy += 1
                await self._remove(seat)
                self.busy -= 1

    async def _remove(self, seat: Seat) -> None:
        """Remove a member, who posts as fast as they can just then, and put them back."""
        path = f"/chats/{seat.chat.id}/participants/{seat.user.id}"
        seat.step()
        seat.removals.append(Removal())
        async with asyncio.TaskGroup() as removing:
            removing.create_task(self.insists(self.keeper, "DELETE", path))
            for _ in range(LAST_WORDS):
                self.spawn(self.persist(self.compose(seat), None))
                await asyncio.sleep(0.002)
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
                self.spawn(device.hang_up())
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
        for work in (self.read, self.churn, *[self.keep] * KEEPERS):
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
