"""What the database holds in the end, against what was answered and what was shown."""

import asyncio
import itertools
import sys
from collections import Counter
from typing import Any

import asyncpg

from support.resuming import number_of
from torture.cast import Chat, Seat
from torture.clients import Run
from torture.devices import Book, Data, Device

STORED = """
    select chat_id, seq, rev, position, id::text, sender_id, text, created_at,
           deleted_at is not null as is_deleted
    from message_rows where chat_id = any ($1) order by chat_id, seq"""
PLACES = "select chat_id, id::text, rev, position from message_rows where chat_id = any ($1)"
ENDS = """
    select id, last_rev, case when last_rev = 0 then '0' else last_rev || '.' || last_mark end
        as position
    from chats where id = any ($1)"""


class Check:
    """Holds what the clients have and were told against the database."""

    def __init__(self, run: Run) -> None:
        self.run, self.server, self.blame = run, run.server, run.tally.blame

    async def in_quiet(self) -> None:
        """Let everybody pause and come to the end of every chat; look at each device's store."""
        self.run.open.clear()
        try:
            if await self.run.settles(self.run.patience):
                await self.stores()
            else:
                self.blame("missed", "somebody is not live, though all is quiet")
        finally:
            self.run.open.set()

    async def stores(self) -> None:
        """Every device comes to the end of each of its chats; then its store is the database's."""
        chats = [chat.id for chat in self.run.chats]
        ends = {row["id"]: row for row in await self.server.sql(ENDS, chats)}

        def is_there(chat_id: int, book: Book) -> bool:
            return book.is_live() and self._is_same(book.held.position, ends[chat_id]["position"])

        await self.run.until(lambda: all(is_there(*each[1:]) for each in self._followed()),
                             self.run.patience)
        stored: dict[int, dict[str, Any]] = {chat_id: {} for chat_id in chats}
        for row in await self.server.sql(PLACES, chats):
            stored[row["chat_id"]][row["id"]] = row
        for device, chat_id, book in self._followed():
            if book.is_live() and book.last >= ends[chat_id]["last_rev"]:
                self._compare(device, book, stored[chat_id], ends[chat_id]["position"])
            else:
                self.blame("missed", "a socket does not come to the last number")

    def _followed(self) -> list[tuple[Device, int, Book]]:
        """List each device with each chat that it is to hear of."""
        return [(device, chat_id, book) for device in self.run.devices
                for chat_id, book in device.books.items() if device.follows(chat_id)]

    def _compare(self, device: Device, book: Book, stored: dict[str, Any], end: str) -> None:
        """Nobody keeps what is not there, or lacks what is; an older copy lacks the newer one."""
        kept: dict[str, Data] = book.held.messages
        lacking = sum(
            message_id not in kept or kept[message_id].rev < row["rev"]
            for message_id, row in stored.items())
        self.blame("missed", f"{device.user.name} lacks changes", lacking)
        fooled = 0
        for message_id, message in kept.items():
            row = stored.get(message_id)
            if row is None or message.rev > row["rev"]:
                fooled += 1
            elif message.rev == row["rev"]:
                fooled += not self._is_same(message.position, row["position"])
        self.blame("fooled", f"{device.user.name} keeps what is not there", fooled)
        if not self._is_same(book.held.position, end):
            self.blame("fooled", f"{device.user.name} is at {book.held.position}, not {end}")

    def _is_same(self, position: str | None, stored: str) -> bool:
        """Tell whether positions are the same; servers of 0.1.0 gave no marks."""
        return position == stored or (
            not self.run.knows_marks and position is not None
            and number_of(position) == number_of(stored))

    async def is_there(self) -> bool:
        """Tell whether there is a database."""
        try:
            async with asyncio.timeout(self.run.patience):
                await self.server.sql(ENDS, [])
        except (OSError, TimeoutError, asyncpg.PostgresError):
            self.blame("wrong", "the database does not come back")
            return False
        return True

    async def unanswered(self) -> None:
        """What was not answered is there once, or not at all."""
        ids = list(self.run.unanswered)
        rows = await self.server.sql(
            "select id from messages where id = any ($1::uuid[]) group by id having count(*) > 1",
            ids)
        self.blame("doubled", "not answered, and there more than once", len(rows))

    async def everything(self) -> None:
        """Everything else, once everybody is back."""
        chats = [chat.id for chat in self.run.chats]
        rows = await self.server.sql(STORED, chats)
        numbers = await self.server.sql(ENDS, chats)
        turns = await self.server.sql("select * from torture.turns order by at")
        await self.stores()
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
            was = (seat.chat.id, message.seq, seat.user.id, message.stands, message.created_at)
            now = tuple(row[name] for name in ("chat_id", "seq", "sender_id", "text", "created_at"))
            # A change that was not answered until the end is made, or is not.
            _, text = self.run.unchanged.get(message.id, (message, message.stands))
            if now not in (was, (*was[:3], text or "", was[4])):
                self.blame("lost", f"answered as {was}, stored as {now}")
        unknown = by_id.keys() - self.run.unanswered.keys() - self.run.undone
        self.blame("doubled", "there, and never sent", len(unknown))

    def _numbered(self, chat: Chat, stored: list[Any], last: int) -> None:
        """The numbers have no holes, none was given twice, and times follow them."""
        unsure = sum(message.seat.chat is chat for message, _ in self.run.unchanged.values())
        sure = len(stored) + chat.changes
        if not max([sure, *[row["rev"] for row in stored]]) <= last <= sure + unsure:
            text = f"{len(stored)} posts and {chat.changes} changes took {last} numbers"
            self.blame("misordered", text)
        taken = Counter(number for row in stored for number in {row["seq"], row["rev"]})
        twice = sum(times > 1 for times in taken.values())
        self.blame("misordered", "a number was given twice", twice)
        for one, other in itertools.pairwise(stored):
            if one["created_at"] > other["created_at"]:
                self.blame("misordered", f"{other['seq']} is older than {one['seq']}")

    def _shown(self, chat: Chat, stored: list[Any]) -> None:
        """Whatever was shown is there, and as it was shown, unless the database went back."""
        shown = [data for data in chat.said.values()
                 if not self.run.was_undone(chat, data.rev, data.changed_at())]
        by_rev: dict[int, Data] = {}
        for data in shown:
            if by_rev.setdefault(data.rev, data).content() != data.content():
                self.blame("lost", f"rev {data.rev} was two things")
        there = {row["id"]: row for row in stored}
        gone = sum(data.id not in there or data.rev > there[data.id]["rev"] for data in shown)
        self.blame("lost", "shown to somebody, and not there", gone)
        changed = 0
        for row in stored:
            now = row["id"], row["seq"], row["text"], row["is_deleted"]
            changed += row["rev"] in by_rev and by_rev[row["rev"]].content() != now
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
