"""The messenger that is tortured: its processes, and its database."""

import asyncio
import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from support.servers import processes_in
from torture.disk import Disk
from torture.postgres import Copy, ask, copy_cluster, end_all_in, look_into

COMPLAINT = re.compile("^Traceback| ERROR ")
WORKERS = 2
START_SECONDS = 60.0
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
    "create schema if not exists torture",
    """create table if not exists torture.turns (
        at bigint generated always as identity, chat_id bigint, user_id bigint, rev bigint,
        came boolean)""",
    """create or replace function torture.note() returns trigger language plpgsql as $$
    declare
        p participants := case when tg_op = 'DELETE' then old else new end;
    begin
        insert into torture.turns (chat_id, user_id, rev, came)
        select c.id, p.user_id, c.last_rev, tg_op = 'INSERT' from chats c where c.id = p.chat_id;
        return null;
    end $$""",
    """create or replace trigger torture after insert or delete on participants
       for each row execute function torture.note()""",
)


class Server:
    """A messenger of its own processes, in a folder of its own, on a disk of its own or none."""

    def __init__(
        self, folder: Path, tree: Path, disk: Disk | None = None, **settings: str
    ) -> None:
        self.folder = folder
        self.disk = disk
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
            "TORTURE_PID": str(os.getpid()), **settings,
        }

    async def prepare(self) -> None:
        """Make what it stands on."""
        if self.disk is not None:
            self.disk.mount()

    def start(self) -> None:
        """Start the parent; it serves a little later."""
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(self._launcher)], cwd=self.folder, env=self._environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )

    async def crash(self) -> None:
        """Kill the parent, with which everything dies, and start again."""
        self.process.kill()
        await self.ended(START_SECONDS)
        self.start()

    def cut_power(self) -> None:
        """Lose all processes, and what was not flushed to the disk; start again.

        All are stopped first, so that none sees the others end. Nothing may await here.
        """
        for pid in processes_in(self.folder):
            kill(pid, signal.SIGSTOP)
        self.disk.cut_power()
        end_all_in(self.folder)
        self.process.wait()
        self.disk.unmount()
        self.disk.mount()
        self.start()

    def ended_itself(self) -> int | None:
        """Answer the status of a parent that nobody has ended."""
        return self.process.poll()

    async def stop(self) -> list[str]:
        """Stop it; answer what was wrong with that, and what it complained of meanwhile."""
        self.process.terminate()
        status = await self.ended(START_SECONDS)
        left = processes_in(self.folder)
        wrong = [f"the server ended with {status} and left {left}"] if status or left else []
        log = (self.folder / "server.log").read_text().splitlines()
        return wrong + [line for line in log if COMPLAINT.search(line)]

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
        return await look_into(folder)

    @contextlib.contextmanager
    def swapped(self, folder: Path) -> Iterator[datetime]:
        """Put a copy in the place of the database, while the parent sees nothing.

        Answers a time after all that the old one did. Nothing may await here.
        """
        kill(self.process.pid, signal.SIGSTOP)
        try:
            end_all_in(self.cluster)
            self.cluster.rename(folder / "undone")
            (folder / "postgres").rename(self.cluster)
            yield datetime.now(UTC)
        finally:
            kill(self.process.pid, signal.SIGCONT)

    async def sql(self, query: str, *arguments: Any) -> list[Any]:
        """Ask PostgreSQL behind the messenger's back, waiting until it is there."""
        return await ask(self._place, query, *arguments)

    def _place(self) -> dict[str, Any]:
        known = self.postmaster()
        if not known[4:] or not known[4]:  # while its files are made it listens nowhere
            return {}
        return {"host": known[4], "port": 5432, "user": "messenger", "database": "postgres"}

    def destroy(self) -> None:
        """Kill what is left of it: every process that works in its folder."""
        end_all_in(self.folder)
        if hasattr(self, "process"):
            self.process.wait()
        if self.disk is not None:
            self.disk.unmount()


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
