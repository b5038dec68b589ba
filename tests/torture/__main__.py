"""The checker: clients that use the messenger while everything beneath them is killed, and count.

    ./run torture --minutes 10 --seed 7     exits 0 if nothing was lost, doubled, missed, ...
    ./run torture --prove                   plant bugs, one at a time, and see each one caught

It starts the messenger with two workers in a folder of its own. In four chats four members each
post, edit, delete and read; each action has its own id and is tried again until it is answered. A
keeper, who owns the chats, removes members and puts them back. Every member follows the chats on
sockets of both kinds, which come back with their number whenever they were cut. Meanwhile the
faults, drawn from the seed: SIGKILL, SIGTERM and SIGSTOP of workers and of their parent, SIGKILL of
the postmaster and of backends, all connections ended, the listening one cut, all hints dropped,
a chat's row held by somebody else for seconds, the database read-only for a while.

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

The clients are in clients.py, the server and the tally in server.py, the planted bugs in
tests/support/mutations.py. Here are the faults, the check at the end, and the command.
"""

import argparse
import asyncio
import contextlib
import itertools
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from support.mutations import MUTATIONS, Mutation, mutated
from support.servers import ROOT, processes_in
from torture.clients import ASK_SECONDS, LIVE, Chat, Device, Run, Seat
from torture.server import BACK_SECONDS, WORKERS, Server, Tally, kill

START_SECONDS = 60.0
LATE_SECONDS = 20.0  # with the hints dropped; it takes little more than a second
HOLD_SECONDS = (2.0, 6.0)  # longer than what waits for the lock
READ_ONLY_SECONDS = (0.5, 3.0)  # shorter and longer than a post is tried
REST_SECONDS = (0.3, 0.9)  # between two faults
DYING_SECONDS = 0.1  # for so long what was not killed itself may still answer
PROGRESS_SECONDS = 10
TIMES_LONGER = 9  # than was asked for, until there were so many faults
PATIENCE_SECONDS = 60.0  # until everybody must have everything in the end
PROOF_SECONDS = 10.0  # without a bug
PROOF_PATIENCE_SECONDS = 4.0  # with one
PROOF_TRIES = 3

# ---- Faults

BACKENDS = "select pid from pg_stat_activity where application_name = 'messenger'"
END_BACKENDS = """
    select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'messenger'"""
# The listening connections are those without a name.
CUT_LISTENERS = """
    select pg_terminate_backend(pid) from pg_stat_activity
    where backend_type = 'client backend' and application_name = ''"""
HOLD_CHAT = "select pg_sleep($2) from (select from chats where id = $1 for update) held"
# This reaches every connection at its next transaction, and so does its end ...
READ_ONLY_DATABASE = (
    "alter system set default_transaction_read_only = on", "select pg_reload_conf()")
# ... and this is taken up by new connections only, which keep it for as long as they live.
READ_ONLY_CONNECTIONS = (
    "alter role messenger set default_transaction_read_only = on", END_BACKENDS)
WRITABLE = (
    "alter system reset default_transaction_read_only", "select pg_reload_conf()",
    "alter role messenger reset default_transaction_read_only",
)


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
            "chat held": (2, self._hold_chat),
            "database read-only": (1, lambda: self._forbid_writing(READ_ONLY_DATABASE)),
            "connections read-only": (1, lambda: self._forbid_writing(READ_ONLY_CONNECTIONS)),
        }
        self.kinds = {kind: self.kinds[kind] for kind in allowed or self.kinds}
        self._since = float("inf")
        self._waiting: set[Chat] = set()  # chats without an acknowledgement since the fault
        self._held: Chat | None = None
        run.watching = self._note_post

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

    def _note_post(self, chat: Chat, began: float, status: int) -> None:
        """Take note of the answer to a post."""
        if status in (200, 201) and began > self._since + DYING_SECONDS:
            self._waiting.discard(chat)
        if self._held is not None:
            self.tally.note_beside(chat is self._held, status, time.monotonic() - began)

    async def _recover(self, kind: str) -> None:
        """Measure from the fault until each chat has a post acknowledged that was sent after it."""
        self._waiting = set(self.run.chats)
        patience = min(BACK_SECONDS, self.run.patience)
        await self.run.until(lambda: not self._waiting, patience)
        self.tally.blame("wrong", f"after {kind}: a chat without posts", len(self._waiting))
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
        worker, parent = await self._worker(), self.server.process.pid
        async with asyncio.TaskGroup() as stopping:
            stopping.create_task(self._stop(parent, self.random.uniform(0.2, 1.5)))
            await asyncio.sleep(0.05)
            kill(worker, signal.SIGKILL)
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
        try:
            self.server.mute.touch()
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
            self.run.spawn(device.hang_up())
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

        await self.run.until(lambda: not late(), min(LATE_SECONDS, self.run.patience))
        self.tally.blame("missed", "not delivered while the hints were dropped", len(late()))
        took = time.monotonic() - sent
        self.tally.slowest_delivery = max(self.tally.slowest_delivery, took)

    async def _hold_chat(self) -> float:
        """Hold a chat's row; note how its posts fare meanwhile, and those of the other chats."""
        self._held = self.random.choice(self.run.chats)
        try:
            await self.server.sql(HOLD_CHAT, self._held.id, self.random.uniform(*HOLD_SECONDS))
        finally:
            self._held = None
        return time.monotonic()

    async def _forbid_writing(self, statements: Sequence[str]) -> float:
        """Make the database, or every new connection to it, read-only for a while."""
        try:
            for statement in statements:
                await self.server.sql(statement)
            await asyncio.sleep(self.random.uniform(*READ_ONLY_SECONDS))
        finally:
            for statement in WRITABLE:
                await self.server.sql(statement)
        return time.monotonic()


# ---- The check at the end

STORED = """
    select chat_id, seq, rev, id::text, sender_id, text, created_at,
           deleted_at is not null as is_deleted
    from messages where chat_id = any ($1) order by chat_id, seq"""


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
        chats = [chat.id for chat in self.run.chats]
        rows = await self.server.sql(STORED, chats)
        numbers = await self.server.sql("select id, last_rev from chats where id = any ($1)", chats)
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
            # A change that was not answered until the end is made, or is not.
            _, text = self.run.unchanged.get(message.id, (message, message.text))
            if now not in (was, (*was[:3], text or "", was[4])):
                self.blame("lost", f"answered as {was}, stored as {now}")
        unknown = by_id.keys() - self.run.unanswered.keys()
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


# ---- The command


async def prove(seed: int) -> bool:
    """Find nothing in a copy as it is, and each bug that is planted in one; tell whether so."""
    proven = await is_seen(None, seed)
    for mutation in MUTATIONS:
        for again in range(PROOF_TRIES):  # a bug may not have had its chance
            if await is_seen(mutation, seed + again):
                break
        else:
            proven = False
    return proven


async def is_seen(mutation: Mutation | None, seed: int) -> bool:
    """Run a copy with a bug, or without; tell whether that is what was found."""
    began = time.monotonic()
    with scratch() as folder:
        tree = mutated(folder, mutation)
        if mutation is None:
            tally = await torture(folder, tree, PROOF_SECONDS, seed)
        else:
            tally = await torture(
                folder, tree, mutation.seconds, seed, mutation.faults, PROOF_PATIENCE_SECONDS)
    seen = any(map(tally.found.get, mutation.told_by)) if mutation is not None else not tally.found
    print(
        f"{mutation.name if mutation is not None else 'as it is'}: {tally.verdict()}"
        f"  {'as it must be' if seen else 'WHICH IS WRONG'}"
        f" ({tally.acknowledged} acknowledged, {time.monotonic() - began:.1f} s)", flush=True)
    return seen


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Make a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        yield Path(folder).resolve()


async def torture(
    folder: Path, tree: Path, seconds: float, seed: int, faults: Sequence[str] = (),
    patience: float = PATIENCE_SECONDS, speaks: bool = False, least: int = 0,
) -> Tally:
    """Run the clients and the faults for a while, then check; answer what was counted."""
    server = Server(folder, tree)
    tally = Tally(speaks)
    run = Run(server, seed, tally, patience)
    try:
        server.start()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as run.http:
            await torment(run, Faults(run, seed, faults), seconds, least)
            await judge(run)
            for task in run.tasks:
                task.cancel()
            await asyncio.gather(*run.tasks, return_exceptions=True)
        await see_it_off(server, tally)
    finally:
        server.destroy()
    return tally


async def torment(run: Run, faults: Faults, seconds: float, least: int) -> None:
    """Let everybody do what they do for so long; then kill it all in the middle of that."""
    async with asyncio.timeout(START_SECONDS):
        await run.set_up()
    await run.begin()
    going = run.spawn(faults.go_on())
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0 or run.tally.faults.total() < least:
        await asyncio.sleep(min(PROGRESS_SECONDS, max(1, left)))
        run.tally.say(run.tally.progress())
        if going.done() or left < -TIMES_LONGER * seconds:
            break
    going.cancel()
    await asyncio.wait([going])  # for what it undoes
    run.server.process.kill()
    await run.cut_short()
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
    if not run.messages:
        run.tally.blame("wrong", "nothing was ever acknowledged")
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
    parser.add_argument("--faults", type=int, default=0, help="and until there were so many (0)")
    parser.add_argument("--prove", action="store_true", help="see planted bugs caught")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if given.prove:
        return 0 if uvloop.run(prove(given.seed)) else 1
    with scratch() as folder:
        tally = uvloop.run(torture(
            folder, ROOT, given.minutes * 60, given.seed, speaks=True, least=given.faults))
    print(f"seed {given.seed}, {given.minutes:g} minutes, {WORKERS} workers")
    print("\n".join(tally.summary()))
    return 1 if tally.found else 0


if __name__ == "__main__":
    sys.exit(main())
