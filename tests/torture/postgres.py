"""PostgreSQL beneath what is tortured: copies of a database."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from plumbing import embedded
from support.servers import processes_in

BACK_SECONDS = 60.0  # until a database is there again


@dataclass(frozen=True)
class Copy:
    """What a copy of the database holds."""

    last: dict[int, int]  # by chat: its last number ...
    posts: dict[int, int]  # ... and how many messages there are
    changed: dict[str, str]  # by id: the texts of those that were edited or deleted


BESIDE = {"application_name": "torture", "default_transaction_read_only": "off"}
LAST = "select id, last_rev, (select count(*) from messages where chat_id = c.id) from chats c"
CHANGED = "select id::text, text from messages where rev <> seq"


async def ask(place: Callable[[], Mapping[str, Any]], query: str, *arguments: Any) -> list[Any]:
    """Ask PostgreSQL behind the messenger's back, waiting until it is there.

    `place` tells where it may be now: asyncpg's arguments, or none.
    """
    deadline = time.monotonic() + BACK_SECONDS
    while True:
        try:
            if not (where := place()):
                raise ConnectionError
            connection = await asyncpg.connect(**where, timeout=5, server_settings=BESIDE)
            try:
                rows = list(await connection.fetch(query, *arguments))
                await connection.close(timeout=5)
                return rows
            finally:
                connection.terminate()
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.05)


async def copy_cluster(host: str, port: int, into: Path, *options: str) -> None:
    """Copy a database that is used, as an operator does."""
    await execute(
        into.parent, "pg_basebackup", f"--pgdata={into}", f"--host={host}", f"--port={port}",
        "--username=messenger", "--checkpoint=fast", "--no-sync", *options)


async def look_into(folder: Path) -> Copy:
    """Start the copy in a folder on its own; answer what it holds."""
    server = embedded.Postgres(folder)
    await server.start()
    try:
        return await contents_of(server.dsn)
    finally:
        await server.stop()


async def contents_of(dsn: str) -> Copy:
    """Answer what a database holds."""
    connection = await asyncpg.connect(dsn)
    try:
        chats = await connection.fetch(LAST)
        changed = await connection.fetch(CHANGED)
    finally:
        await connection.close()
    return Copy({row[0]: row[1] for row in chats}, {row[0]: row[2] for row in chats}, dict(changed))


def command_of(program: str, *arguments: str, death: signal.Signals = signal.SIGKILL) -> list[str]:
    """Answer the command that becomes one of PostgreSQL's programs and does not outlive us."""
    path = embedded.find_binaries() / program
    script = [sys.executable, "-I", "-S", embedded.__file__, str(os.getpid()), str(int(death))]
    return [*script, str(path), *arguments]


def end_all_in(folder: Path) -> None:
    """Kill every process that works in a folder, and wait until none is left."""
    while pids := processes_in(folder):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


async def execute(folder: Path, program: str, *arguments: str) -> None:
    """Run one of PostgreSQL's programs to its end. Raises RuntimeError where it fails."""
    folder.mkdir(exist_ok=True)
    process = await asyncio.create_subprocess_exec(
        *command_of(program, *arguments), cwd=folder, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
    said, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{program}: {said.decode()}")


# ---- Two of them, of which one follows the other

OPTIONS = (
    "listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=100",
    "wal_keep_size=256MB", "recovery_init_sync_method=syncfs", "log_min_messages=warning",
    "dynamic_shared_memory_type=mmap")  # which is gone with the folder
REACHED = """
    select from pg_stat_replication
    where state = 'streaming' and sync_state = $1 and flush_lsn >= $2::text::pg_lsn"""
HAS_REPLAYED = """
    select from pg_stat_wal_receiver having count(*) = 0
    and pg_last_wal_replay_lsn() >= coalesce(pg_last_wal_receive_lsn(), '0/0')"""


class Cluster:
    """A PostgreSQL on a folder and a port, as an operator runs one: a primary, or a standby."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.dsn = f"postgresql://messenger@127.0.0.1:{port}/postgres"
        self._process: subprocess.Popen[bytes] | None = None

    async def make(self) -> None:
        """Make an empty one."""
        place = str(self.folder / "postgres")
        await execute(self.folder, "initdb", *embedded.INITDB_OPTIONS, place)

    async def follow(self, primary: "Cluster") -> None:
        """Become a standby: a copy of a primary, which goes on to follow it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        place = self.folder / "postgres"
        await copy_cluster("127.0.0.1", primary.port, place, "--write-recovery-conf")

    async def start(self) -> None:
        """Start it; return when it answers."""
        options = [f"-c{option}" for option in (*OPTIONS, f"port={self.port}")]
        command = command_of("postgres", "-D", str(self.folder / "postgres"), *options)
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True)
        await self.until("select")

    def destroy(self) -> None:
        """Kill all of its processes at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        end_all_in(self.folder)

    async def sql(self, query: str, *arguments: Any) -> list[Any]:
        """Ask it, waiting until it is there."""
        return await ask(lambda: {"dsn": self.dsn}, query, *arguments)

    async def until(self, query: str, *arguments: Any) -> None:
        """Wait until a query has rows."""
        while not await self.sql(query, *arguments):
            await asyncio.sleep(0.02)

    async def stop_waiting(self) -> None:
        """Answer everybody, whatever a standby has."""
        await self.sql("alter system reset synchronous_standby_names")
        await self.sql("select pg_reload_conf()")

    async def be_followed(self, is_synchronous: bool) -> None:
        """Answer nobody before the standby has it, or do; wait until the standby has all."""
        if is_synchronous:
            await self.sql("alter system set synchronous_standby_names = '*'")
            await self.sql("select pg_reload_conf()")
        [row] = await self.sql("select pg_current_wal_flush_lsn()::text")
        await self.until(REACHED, "sync" if is_synchronous else "async", row[0])

    async def stop_following(self) -> None:
        """Let a standby hear no more."""
        await self.sql("alter system set primary_conninfo = ''")
        await self.sql("select pg_reload_conf()")

    async def replay_all(self) -> None:
        """Wait until a standby that hears no more has taken up all that it heard."""
        await self.until(HAS_REPLAYED)
