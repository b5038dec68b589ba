"""What is done to a messenger beneath its clients, one fault after the other."""

import asyncio
import random
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime

from torture.cast import Chat
from torture.check import Check
from torture.clients import Run
from torture.devices import ASK_SECONDS, Device
from torture.postgres import BACK_SECONDS, contents_of
from torture.server import START_SECONDS, WORKERS, kill

LONGER_SECONDS = 300.0  # than was asked for, at most, until there were so many faults
LATE_SECONDS = 20.0  # with the hints dropped; it takes little more than a second
HOLD_SECONDS = (2.0, 6.0)  # longer than what waits for the lock
READ_ONLY_SECONDS = (0.5, 3.0)  # shorter and longer than a post is tried
REST_SECONDS = (0.3, 0.9)  # between two faults
UNDONE_SECONDS = (0.3, 2.0)  # what a database loses that goes back
FULL_SECONDS = (0.3, 3.0)
CUT_OFF_SECONDS = 4.0  # a standby: longer than a statement may take
DYING_SECONDS = 0.1  # for so long what was not killed itself may still answer

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
        self.kinds = {kind: KINDS[kind] for kind in allowed}
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

    async def go_on(self, seconds: float, least: int) -> None:
        """Do one after the other for a while, and until there were so many; after each the clients
        get an answer, and a moment of rest.
        """
        began = time.monotonic()
        await asyncio.sleep(max(REST_SECONDS))
        for kind in self._drawn():
            over = time.monotonic() - began - seconds
            if over > (0 if self.tally.count_recoveries() >= least else LONGER_SECONDS):
                return
            self._see_alive()
            self.tally.faults[kind] += 1
            self._since = since = await self.kinds[kind][1](self)
            await self._recover(kind)
            if not self.run.keeping.is_set():  # the database went back
                await Check(self.run).in_quiet()
                self.tally.note_return(time.monotonic() - since)
                self.run.keeping.set()
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
        self.tally.recovery.setdefault(kind, []).append(took)

    def _see_alive(self) -> None:
        status = self.server.ended_itself()
        if status is not None:
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
        if not await self.run.settles(BACK_SECONDS):
            self.tally.blame("missed", "somebody is not live, though all is quiet")

    async def _time_delivery(self, chat: Chat) -> None:
        """Post one message, and see when the last socket of the chat has it."""
        message = self.run.compose(self.random.choice(chat.seats))
        open_sockets = {each: each.ws for each in self.run.devices if chat.id in each.books}
        await self.run.persist(message, None)
        sent = time.monotonic()

        def late() -> list[Device]:
            return [each for each, ws in open_sockets.items() if ws is each.ws
                    and each.follows(chat.id)
                    and message.id not in each.books[chat.id].held.messages]

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

    async def _forbid_database(self) -> float:
        return await self._forbid_writing(READ_ONLY_DATABASE)

    async def _forbid_connections(self) -> float:
        return await self._forbid_writing(READ_ONLY_CONNECTIONS)

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

    async def _restore(self) -> float:
        """Copy the database while it is used, and some time later put the copy in its place."""
        await self._pause_keepers()
        folder = self.server.cluster.with_name("copy")
        copy = await self.server.copy_to(folder)
        await asyncio.sleep(self.random.uniform(*UNDONE_SECONDS))
        since = time.monotonic()
        with self.server.swapped(folder) as at:
            self.run.go_back(copy, at)
        await asyncio.to_thread(shutil.rmtree, folder)
        return since

    async def _fill_disk(self) -> float:
        """Fill the disk of the database, and free it again."""
        self.server.disk.fill()
        try:
            await asyncio.sleep(self.random.uniform(*FULL_SECONDS))
        finally:
            self.server.disk.free()
        return time.monotonic()

    async def _cut_power(self) -> float:
        """Stop every process; start again with what was flushed to the disk."""
        began = time.monotonic()
        self.server.cut_power()
        return began

    async def _lose_primary(self) -> float:
        """Lose the primary under load, and promote its standby, which has everything."""
        await self.server.pair_up(is_synchronous=True)
        await asyncio.sleep(self.random.uniform(*UNDONE_SECONDS))
        self.server.primary.destroy()
        return await self.server.promote()

    async def _lose_waiting_primary(self) -> float:
        """The same after nothing reached the standby for longer than anybody waits for an answer:
        nothing may have been acknowledged, or shown, meanwhile.
        """
        await self.server.pair_up(is_synchronous=True)
        await self.server.standby.stop_following()
        await asyncio.sleep(CUT_OFF_SECONDS)
        self.server.primary.destroy()
        return await self.server.promote()

    async def _promote_outdated(self) -> float:
        """Lose the primary, and promote a standby that has heard nothing for a while."""
        await self._pause_keepers()
        await self.server.pair_up(is_synchronous=False)
        await self.server.standby.stop_following()
        await asyncio.sleep(self.random.uniform(*UNDONE_SECONDS))
        self.server.primary.destroy()
        await self.server.standby.replay_all()
        self.run.go_back(await contents_of(self.server.standby.dsn), datetime.now(UTC))
        return await self.server.promote()


    async def _pause_keepers(self) -> None:
        """Let nobody be removed until the stores were looked at, and wait until all are back."""
        self.run.keeping.clear()
        if not await self.run.until(lambda: not self.run.busy, BACK_SECONDS):
            self.tally.blame("wrong", "members are not put back")


KINDS: dict[str, tuple[int, Callable[[Faults], Awaitable[float]]]] = {
    # kind: how often among the others, how (which answers since when it is over)
    "worker killed": (6, Faults._kill_worker),
    "worker ended": (4, Faults._end_worker),
    "worker stopped": (6, Faults._stop_worker),
    "parent killed": (1, Faults._kill_parent),
    "parent ended": (1, Faults._end_parent),
    "parent stopped": (2, Faults._stop_parent),
    "postmaster killed": (4, Faults._kill_postmaster),
    "backend killed": (4, Faults._kill_backend),
    "backends ended": (5, Faults._end_backends),
    "listeners cut": (5, Faults._cut_listeners),
    "hints dropped": (1, Faults._drop_hints),
    "chat held": (2, Faults._hold_chat),
    "database read-only": (1, Faults._forbid_database),
    "connections read-only": (1, Faults._forbid_connections),
    "database restored": (2, Faults._restore),
    "disk full": (1, Faults._fill_disk),
    "power cut": (1, Faults._cut_power),
    "primary lost, standby in step": (1, Faults._lose_primary),
    "primary lost, standby cut off": (1, Faults._lose_waiting_primary),
    "primary lost, standby behind": (1, Faults._promote_outdated),
}
FAILOVERS = tuple(kind for kind in KINDS if kind.startswith("primary lost"))
POWER_CUTS = ("power cut",)
DISK_FAULTS = ("disk full", *POWER_CUTS)
USUAL = tuple(kind for kind in KINDS if kind not in {*FAILOVERS, *DISK_FAULTS})
