"""The messenger that is tortured: its processes, its database, and the tally of a run."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg

from support.servers import processes_in
from torture.postgres import Copy, contents_of, copy_cluster

WORKERS = 2
START_SECONDS = 60.0
BACK_SECONDS = 60.0
TOLD = 8  # findings of each kind that are told in words

# ---- The tally

class Tally:
    """What was counted, and what was found wrong."""

    kinds = ("lost", "doubled", "missed", "misordered", "leaked", "fooled", "wrong")

    def __init__(self, speaks: bool) -> None:
        self.began = time.monotonic()
        self.speaks = speaks
        self.sent = self.acknowledged = self.changed = self.delivered = 0
        self.undone = 0  # acknowledged, and rightly gone with a database that went back
        self.returns = 0  # of the database to what it was
        self.told = 0  # clients that were told so
        self.found: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.recovery: dict[str, float] = {}  # kind of fault: the slowest
        self.slowest_delivery = 0.0  # with the hints dropped
        # While a chat was held: what became of posts to it and to the others, slowest answers.
        self.beside: Counter[str] = Counter()
        self.slowest_beside = 0.0

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

    def note_beside(self, is_held: bool, status: int, took: float) -> None:
        """Count what a post was answered while a chat was held: it, or another."""
        whose = "its own" if is_held else "the others'"
        what = {200: "accepted", 201: "accepted", 503: "refused", 0: "unanswered"}.get(status)
        if what is not None:  # else the sender is out
            self.beside[f"{whose} {what}"] += 1
            self.slowest_beside = max(self.slowest_beside, 0.0 if is_held else took)

    def progress(self) -> str:
        """What a line of progress says."""
        return f"{self._flow()}  faults {self.faults.total()}  {self.verdict()}"

    def _flow(self) -> str:
        return (
            f"sent {self.sent}  acknowledged {self.acknowledged}  changed {self.changed}"
            f"  delivered {self.delivered}")

    def verdict(self) -> str:
        """The counts that must be 0."""
        return "  ".join(f"{kind} {self.found[kind]}" for kind in self.kinds)

    def summary(self) -> Iterator[str]:
        """What the run ends with."""
        yield self._flow()
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items()))
        yield f"faults {self.faults.total()}: {kinds}"
        yield (
            f"acknowledged, and undone with a database that went back: {self.undone};"
            f" {self.told} times a client was told of it")
        yield self.verdict()
        slowest = sorted(self.recovery.items(), key=lambda each: -each[1])
        yield "slowest recovery: " + ", ".join(f"{kind} {took:.2f} s" for kind, took in slowest)
        yield f"slowest delivery with the hints dropped: {self.slowest_delivery:.2f} s"
        beside = ", ".join(f"{what} {count}" for what, count in sorted(self.beside.items()))
        yield (
            f"posts while a chat was held: {beside or 'none'};"
            f" the others' slowest answer {self.slowest_beside:.2f} s")


# ---- The server

# The parent and each worker are started by way of this, which patches from outside: while the file
# TORTURE_MUTE exists no hint is published. And no server outlives the checker.
LAUNCHER = '''
import os
import sys
sys.path.insert(0, os.environ["TORTURE_TREE"])
import messenger
from plumbing import bus, process
messenger.__file__ = os.path.abspath(__file__)  # by which the parent starts its workers
publish = bus.Bus.notify
def publish_unless_mute(self, key, hint):
    if not os.path.exists(os.environ["TORTURE_MUTE"]):
        publish(self, key, hint)
bus.Bus.notify = publish_unless_mute
if process.PARENT not in os.environ:
    process.die_with(int(os.environ["TORTURE_PID"]))
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
        }

    def start(self) -> None:
        """Start the parent; it serves a little later."""
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(self._launcher)], cwd=self.folder, env=self._environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )

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
            return (self.cluster / "postmaster.pid").read_text().splitlines()
        return []

    @property
    def cluster(self) -> Path:
        """The folder of the database."""
        return self.folder / "data/postgres"

    async def copy_to(self, folder: Path) -> Copy:
        """Copy the database into a folder; answer what the copy holds."""
        await copy_cluster(self.postmaster()[4], 5432, folder / "postgres")
        return await contents_of(folder)

    @contextlib.contextmanager
    def swapped(self, folder: Path) -> Iterator[datetime]:
        """Put a copy in the place of the database, while the parent sees nothing.

        Answers a time after all that the old one did. Nothing may await here.
        """
        kill(self.process.pid, signal.SIGSTOP)
        try:
            while pids := processes_in(self.cluster):
                for pid in pids:
                    kill(pid, signal.SIGKILL)
                time.sleep(0.005)
            self.cluster.rename(folder / "undone")
            (folder / "postgres").rename(self.cluster)
            yield datetime.now(UTC)
        finally:
            kill(self.process.pid, signal.SIGCONT)

    async def sql(self, query: str, *arguments: Any) -> list[Any]:
        """Ask PostgreSQL behind the messenger's back, waiting until it is there."""
        deadline = time.monotonic() + BACK_SECONDS
        while True:
            try:
                connection = await asyncpg.connect(
                    host=self.postmaster()[4], port=5432, user="messenger", database="postgres",
                    timeout=5, server_settings={
                        "application_name": "torture", "default_transaction_read_only": "off"})
                try:
                    rows = list(await connection.fetch(query, *arguments))
                    await connection.close(timeout=5)
                    return rows
                finally:
                    connection.terminate()
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
