"""The sockets of the checker's clients: they come back by the contract's rule of resuming.

What a device holds of a chat is a store of its own (support/resuming.py: the rule as code). It
begins with nothing at 0, and so again when it is told that the history is another: so each store
is to be all that the database has.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec

from support.resuming import Held, number_of
from torture.cast import LEAVING, OUT, Chat, Message, User

if TYPE_CHECKING:
    from torture.clients import Run

ASK_SECONDS = 3.0  # until a client takes an answer for lost; some stops of a worker last longer
NOWHERE = "0"  # the position before the first change
PAST = 400  # positions that a device remembers, to ask for the changes since then again


class Data(msgspec.Struct):
    """Of any answer or frame what is looked at here."""

    id: int | str = ""
    type: str = ""
    chat_id: int = 0
    seq: int = 0
    rev: int = 0
    position: str = ""
    text: str = ""
    created_at: datetime | None = None
    edited_at: datetime | None = None
    deleted_at: datetime | None = None
    status: int | str = 0
    user_id: int = 0
    last_read_seq: int = 0
    access_token: str = ""

    def __getitem__(self, name: str) -> Any:
        """As Held takes it."""
        return getattr(self, name)

    def content(self) -> tuple[Any, ...]:
        """What a message says."""
        return self.id, self.seq, self.text, self.deleted_at is not None

    def changed_at(self) -> datetime:
        """When a message was last changed."""
        return max(filter(None, (self.created_at, self.edited_at, self.deleted_at)))


class Frame(msgspec.Struct):
    """What a socket is sent."""

    type: str
    data: Data
    ref: int | None = None
    chat_id: int | None = None

    def __getitem__(self, name: str) -> Any:
        """As Held takes it."""
        return getattr(self, name)


FRAME = msgspec.json.Decoder(Frame)
NOTHING = Data()
SYNCING, LIVE, JOINING, AWAY = "syncing", "live", "joining", "away"


@dataclass(eq=False)
class Book:
    """What a device has of one chat, and how it stands with it on its present socket."""

    held: Held = field(default_factory=lambda: Held(NOWHERE))
    past: deque[str] = field(default_factory=lambda: deque(maxlen=PAST))  # where it was
    state: str = AWAY
    last: int = 0  # the number of the last frame on this socket

    def opens(self, state: str) -> None:
        """On a new socket, or in a chat that is gone or back, the position stands still."""
        self.state, self.last = state, 0
        self.held.opens()

    def take(self, frame: Frame) -> None:
        """Take a frame about the chat."""
        self.held.take(frame)
        self.last = number_of(frame.data.position)
        if self.held.is_moving:
            self.past.append(frame.data.position)

    def forget(self) -> None:
        """Begin anew."""
        self.held.forget()
        self.held.position = NOWHERE
        self.past.clear()

    def is_live(self) -> bool:
        """Tell whether it has everything up to its position."""
        return self.state == LIVE and self.held.is_moving


class Device:
    """A socket that comes back whenever it is cut: on one chat, or on all of its user's."""

    def __init__(self, run: "Run", user: User, chats: Sequence[Chat], follows_all: bool) -> None:
        self.run, self.user = run, user
        self.chats = {chat.id: chat for chat in chats}
        self.books = {chat.id: Book() for chat in chats}
        self.follows_all = follows_all
        self.ws: aiohttp.ClientWebSocketResponse | None = None
        self.url = ""  # of the server that it is connected to
        self._is_greeted = False  # by `hello`, unlike by servers of 0.1.0
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
            path, seat = f"/ws/{chat_id}?after={self._after(book)}", self.user.seats[chat_id]
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
                book.opens(AWAY)
            await ws.close()

    def _after(self, book: Book) -> str:
        """Where to come back: to a server of 0.1.0, or one beside it, with the bare number."""
        position = book.held.position or NOWHERE
        return position if self.run.knows_marks else str(number_of(position))

    async def _listen(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self._is_greeted = False
        for book in self.books.values():
            book.opens(SYNCING)
        self.ws = ws
        if self.follows_all:
            known = {str(chat_id): self._after(book) for chat_id, book in self.books.items()}
            if not self.run.knows_marks:
                known = {chat_id: int(after) for chat_id, after in known.items()}
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

    async def sync(self, chat_id: int, after: str) -> None:
        """Ask for everything after a position."""
        self.books[chat_id].state = SYNCING
        given = after if self.run.knows_marks else number_of(after)
        await self._send({"type": "sync", "chat_id": chat_id, "after": given})

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
            self._take_message(frame)
        elif frame.type == "hello":
            self._is_greeted = True
        elif frame.ref is not None:
            self._answer(frame.ref, 200 if frame.type == "ack" else int(data.status), data)
        elif frame.type == "replay":
            self.books[data.chat_id].take(frame)
            self.books[data.chat_id].state = SYNCING
        elif frame.type == "ready":
            await self._take_ready(self.books[data.chat_id], frame)
        elif frame.type == "chat":
            self.books[int(data.id)].opens(JOINING)
        elif frame.type == "chat_removed":
            self.books[data.chat_id].opens(AWAY)
        elif frame.type == "error":
            await self._take_refusal(frame.chat_id or min(self.books), data)

    def _answer(self, ref: int, status: int, data: Data) -> None:
        if ref in self._answers and not self._answers[ref].done():
            self._answers[ref].set_result((status, data))
        if status not in (0, 200, 404, 503):
            self.run.tally.blame("wrong", f"a frame was answered {status}: {data}")

    def _take_message(self, frame: Frame) -> None:
        data = frame.data
        chat, book = self.chats[data.chat_id], self.books[data.chat_id]
        self.run.tally.delivered += 1
        data.position = data.position or str(data.rev)  # of a server of 0.1.0
        if self._is_greeted and data.rev <= book.last:  # else nobody says when a replay begins
            self.run.tally.blame("misordered", f"rev {data.rev} came after {book.last}")
        frame.data = chat.said.setdefault(data.position, data)
        if frame.data.content() != data.content():
            self.run.tally.blame("lost", f"position {data.position} was two things")
        book.take(frame)
        seat = self.user.seats.get(chat.id)
        if seat is not None and seat.turn % 4 in (LEAVING, OUT):
            seat.removals[-1].heard.append(data.rev)

    async def _take_ready(self, book: Book, frame: Frame) -> None:
        data = frame.data
        data.position = data.position or str(data.rev)
        if self._is_greeted and data.rev < book.last:
            self.run.tally.blame("misordered", f"ready at {data.rev} came after {book.last}")
        if book.state in (JOINING, AWAY):  # the chat is back: what was posted meanwhile?
            await self.sync(data.chat_id, book.held.position or NOWHERE)
            return
        if not self._is_greeted:  # by this the position moves, and what was heard before is covered
            book.held.is_moving = True
            book.held.position = data.position
            for message in list(book.held.above.values()):
                book.held.shows(message)
        book.take(frame)
        book.state = LIVE

    async def _take_refusal(self, chat_id: int, data: Data) -> None:
        """A sync was refused: the history is another, the user is out, or the database away."""
        book = self.books[chat_id]
        if data.type == "history-rewritten":
            self.run.tally.told += 1
            book.forget()
            await self.sync(chat_id, NOWHERE)
            return
        book.opens(AWAY)
        self.run.noting(self.url, time.monotonic(), int(data.status), "a sync")
        if data.status == 503:
            await asyncio.sleep(0.1)
            await self.sync(chat_id, book.held.position or NOWHERE)

    def follows(self, chat_id: int) -> bool:
        """Tell whether it is to hear of a chat: it is its keeper's, or of who is in it."""
        seat = self.user.seats.get(chat_id)
        return chat_id in self.books and (seat is None or seat.inside.is_set())
