"""The clients of the checker: they post, edit, delete, read and follow, and do not give up.

What they are told they hold against the contract at once; what they were answered, and what they
have in the end, is for the check at the end (check.py). Who they are is in cast.py, their sockets
are in devices.py.
"""

import asyncio
import contextlib
import itertools
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import aiohttp
import msgspec

from torture.cast import INSIDE, OUT, RECENT, Chat, Message, Removal, Seat, User
from torture.devices import ASK_SECONDS, LIVE, NOTHING, Data, Device
from torture.postgres import BACK_SECONDS, Copy
from torture.server import WITNESS, Server
from torture.tally import Tally

CHATS, USERS, MEMBERS = 4, 8, 4
REMOVED_SECONDS = (1.0, 2.0)  # longer than what an abandoned statement may still wait for a lock
PAUSE_SECONDS = 0.05  # of a sender, on average
BURST = 6  # messages at once on one socket
LAST_WORDS = 16  # of who is just being removed
KEEPERS = 2  # at work at once

DATA = msgspec.json.Decoder(Data | list[Data])


@dataclass(frozen=True)
class Return:
    """A database that went back: whatever is numbered above `last`, and older, is undone."""

    at: datetime
    last: dict[int, int]  # by chat


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
        self.messages: list[Message] = []  # all that were acknowledged, and not undone
        self.undone: set[str] = set()  # acknowledged, and gone with a database that went back
        self.returns: list[Return] = []
        self.knows_marks = True  # or comes back with bare numbers, which 0.1.0 knew alone
        self.unanswered: dict[str, Message] = {}
        self.unchanged: dict[str, tuple[Message, str | None]] = {}  # changes without an answer
        self.open = asyncio.Event()  # cleared for a moment of quiet
        self.keeping = asyncio.Event()  # cleared while nobody may be removed
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
        message_id = str(UUID(int=self.random.getrandbits(128)))
        message = Message(seat, message_id, text, seat.floor, stands=text)
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
        is_undone = self.was_undone(seat.chat, answer.seq, answer.created_at)
        if message.seq:
            if message.seq != answer.seq and not (is_undone or message.is_undone):
                self.tally.blame("doubled", f"{message.id} is {message.seq} and {answer.seq}")
            return
        if answer.seq <= message.floor and not is_undone:
            text = f"{answer.seq} was posted after {message.floor}, of the same sender"
            self.tally.blame("misordered", text)
        message.seq, message.created_at = answer.seq, answer.created_at
        del self.unanswered[message.id]
        self.tally.acknowledged += 1
        if is_undone:
            self._undo(message)
            return
        seat.floor = max(seat.floor, message.seq)
        seat.chat.latest = message.id
        seat.recent.append(message)
        self.messages.append(message)

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
        taken = [message.seq for message in batch if message.seq and not message.is_undone]
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
        is_edit = message.stands == message.text and self.random.random() < 0.8
        if not is_edit:
            seat.recent.remove(message)
        await self.change(message, f"edited {message.text}" if is_edit else None)

    async def change(self, message: Message, text: str | None) -> None:
        """Edit a message, or (None) delete it, until that is answered, or the message undone."""
        self.unchanged[message.id] = message, text
        seat, path = message.seat, f"/chats/{message.seat.chat.id}/messages/{message.id}"
        how = ("DELETE", path) if text is None else ("PATCH", path, {"text": text})
        status, returns = 0, 0
        while not message.is_undone and (
            status not in (200, 204) or returns != len(self.returns)  # what was answered is undone
        ):
            returns = len(self.returns)
            status, _ = await self.as_member(seat, self.ask(seat.user, *how), "a change")
            if status == 404:
                await seat.inside.wait()
            if status not in (200, 204):
                await asyncio.sleep(self.random.uniform(0.02, 0.1))
        self.unchanged.pop(message.id, None)
        if not message.is_undone and message.stands != (text or ""):  # else a copy had it
            message.stands = text or ""
            seat.chat.changes += 1
            self.tally.changed += 1

    # A database that goes back

    def was_undone(self, chat: Chat, number: int, at: datetime | None) -> bool:
        """Tell whether what took a number at a time is gone with a database that went back."""
        return at is not None and any(
            number > each.last[chat.id] and at < each.at for each in self.returns)

    def go_back(self, copy: Copy, at: datetime) -> None:
        """Take note that the database has become a copy of what it was, before which the last
        answer of the old one was made, and after which the first of the new one will be.
        """
        self.returns.append(Return(at, copy.last))
        self.tally.returns += 1
        for message in [each for each in self.messages if each.seq > copy.last[each.seat.chat.id]]:
            self._undo(message)
        self.messages = [message for message in self.messages if not message.is_undone]
        for message in self.messages:
            if message.stands != message.text or message.id in self.unchanged:
                message.stands = copy.changed.get(message.id, message.text)
        for message in self.unanswered.values():
            message.floor = 0
        for seat in self.seats:
            seat.turn += 4  # whatever was asked before is not judged
            seat.floor = seat.watermark = 0
            kept = [message for message in seat.recent if not message.is_undone]
            seat.recent = deque(kept, maxlen=RECENT)
        for chat in self.chats:
            chat.latest, chat.changes = "", copy.last[chat.id] - copy.posts[chat.id]

    def _undo(self, message: Message) -> None:
        """An acknowledged message is gone, which is right: its sender does not send it again."""
        message.is_undone = True
        self.undone.add(message.id)
        self.unchanged.pop(message.id, None)
        self.tally.undone += 1

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
        floor, path = (seat.watermark, len(self.returns)), f"/chats/{seat.chat.id}/read"
        call = self.ask(seat.user, "POST", path, {"message_id": message_id})
        status, stand = await self.as_member(seat, call, "a read")
        if status == 200:
            self._see_watermark(seat, floor, stand.seq)

    async def look_at_watermarks(self, chat: Chat) -> None:
        """Ask where everybody in a chat stands."""
        floors = {seat.user.id: (seat, (seat.watermark, len(self.returns))) for seat in chat.seats}
        status, people = await self.ask(self.keeper, "GET", f"/chats/{chat.id}/participants")
        for person in people if status == 200 else ():
            if person.user_id in floors:
                self._see_watermark(*floors[person.user_id], person.last_read_seq)

    def _see_watermark(self, seat: Seat, floor: tuple[int, int], seq: int) -> None:
        """See that a watermark has not gone back; `floor`: what it was, after how many returns."""
        if floor[1] != len(self.returns):
            return
        if seq < floor[0]:
            self.tally.blame("misordered", f"a watermark went back from {floor[0]} to {seq}")
        seat.watermark = max(seat.watermark, seq)

    async def keep(self) -> None:
        """Remove members and put them back."""
        while True:
            await asyncio.sleep(self.random.uniform(0.5, 1.5))
            await self.open.wait()
            await self.keeping.wait()
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
            elif book.state == LIVE and book.past and self.keeping.is_set():
                after = self.random.choice(book.past)
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
        self.keeping.set()
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

    async def settles(self, seconds: float) -> bool:
        """Wait until all is settled; tell whether it came to that. It is given so long again, a few
        times, as long as there are deliveries: a long history is told anew where the database has
        another.
        """
        for _ in range(5):
            delivered = self.tally.delivered
            if await self.until(self.is_settled, seconds) or self.tally.delivered == delivered:
                break
        return self.is_settled()

    def is_settled(self) -> bool:
        """Tell whether nobody waits for anything and every device is live wherever it may be."""
        return not self.unanswered and not self.unchanged and not self.busy and all(
            book.is_live() for device in self.devices for book in device.books.values())
