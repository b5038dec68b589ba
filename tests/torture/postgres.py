"""PostgreSQL beneath what is tortured: copies of a database."""

import asyncio
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from plumbing import embedded


@dataclass(frozen=True)
class Copy:
    """What a copy of the database holds."""

    last: dict[int, int]  # by chat: its last number ...
    posts: dict[int, int]  # ... and how many messages there are
    changed: dict[str, str]  # by id: the texts of those that were edited or deleted


LAST = "select id, last_rev, (select count(*) from messages where chat_id = c.id) from chats c"
CHANGED = "select id::text, text from messages where rev <> seq"


async def copy_cluster(host: str, port: int, into: Path, *options: str) -> None:
    """Copy a database that is used, as an operator does."""
    await execute(
        into.parent, "pg_basebackup", f"--pgdata={into}", f"--host={host}", f"--port={port}",
        "--username=messenger", "--checkpoint=fast", "--no-sync", *options)


async def contents_of(folder: Path) -> Copy:
    """Start the copy in a folder on its own; answer what it holds."""
    server = embedded.Postgres(folder)
    await server.start()
    try:
        connection = await asyncpg.connect(server.dsn)
        try:
            chats = await connection.fetch(LAST)
            changed = await connection.fetch(CHANGED)
        finally:
            await connection.close()
    finally:
        await server.stop()
    return Copy({row[0]: row[1] for row in chats}, {row[0]: row[2] for row in chats}, dict(changed))


def command_of(program: str, *arguments: str, death: signal.Signals = signal.SIGKILL) -> list[str]:
    """Answer the command that becomes one of PostgreSQL's programs and does not outlive us."""
    path = embedded._find_binaries() / program
    script = [sys.executable, "-I", "-S", embedded.__file__, str(os.getpid()), str(int(death))]
    return [*script, str(path), *arguments]


async def execute(folder: Path, program: str, *arguments: str) -> None:
    """Run one of PostgreSQL's programs to its end. Raises RuntimeError where it fails."""
    folder.mkdir(exist_ok=True)
    process = await asyncio.create_subprocess_exec(
        *command_of(program, *arguments), cwd=folder, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
    said, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{program}: {said.decode()}")
