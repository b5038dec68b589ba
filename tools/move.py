"""Moves an embedded database to one's own PostgreSQL: `messenger.py move postgresql://...`.

From the moment at which the data are read nothing more is written to the embedded database: a
running server refuses every call with 503 and closes its sockets with 1001. What to start the
server with from then on, the key that signs tokens too, is written to moved.env in DATA_DIR; so all
stay signed in, and clients go on from their positions. Where something fails the embedded database
is used again; after a crash `--cancel` lets it be.
"""

import argparse
import asyncio
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import messenger as m
from plumbing.address import with_password
from plumbing.files import write_private
from plumbing.process import StartError
from tools.backup import signing_key
from tools.databases import (
    FORGET_MOVE,
    Place,
    connected,
    dump,
    load,
    opened,
    own_place,
    run,
    update_schema,
)
from tools.verify import examine_place

# The embedded database is always called postgres.
NOTE_MOVE = "update schema_needs set moved_at = now()"
LET_WRITE = "set default_transaction_read_only = off"
SELECT_READ_ONLY = "show default_transaction_read_only"
FORBID_WRITING = "alter database postgres set default_transaction_read_only = on"
ALLOW_WRITING = "alter database postgres reset default_transaction_read_only"
END_OTHERS = """
    select count(pg_terminate_backend(pid)) from pg_stat_activity
    where datname = current_database() and backend_type = 'client backend'
      and pid <> pg_backend_pid() and backend_start < $1"""
SELECT_NOW = "select clock_timestamp()"
PAUSE_SECONDS = 0.05


async def is_closed(place: Place) -> bool:
    """Tell whether the embedded database takes nothing."""
    async with connected(place) as connection:
        return bool(await connection.fetchval(SELECT_READ_ONLY) == "on")


async def close_to_writers(place: Place) -> None:
    """Let nobody write to the embedded database any more, nor start a server on it."""
    async with connected(place) as connection:
        await connection.execute(LET_WRITE)
        await connection.execute(NOTE_MOVE)
        await connection.execute(FORBID_WRITING)
        await end_others(connection)


async def open_to_writers(place: Place) -> None:
    """Let the embedded database be used again."""
    async with connected(place) as connection:
        await connection.execute(LET_WRITE)
        await connection.execute(ALLOW_WRITING)
        await connection.execute(FORGET_MOVE)
        await end_others(connection)


async def end_others(connection: Any) -> None:
    """End every session that began before now: the next ones are as the database says."""
    now = await connection.fetchval(SELECT_NOW)
    while await connection.fetchval(END_OTHERS, now):  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(PAUSE_SECONDS)


async def carry_over(source: Place, target: Place, folder: Path) -> None:
    """Put what is in one database into another, by way of a file in a folder, and see that it is
    the same. Raises StartError.
    """
    with tempfile.TemporaryDirectory(prefix="move.", dir=folder) as scratch:
        archive = Path(scratch, "archive")
        await dump(source, archive)
        await load(target, archive)
    before, after = await examine_place(source), await examine_place(target)
    after.tell()
    if after.broken != before.broken or after.counts != before.counts:
        raise StartError(f"{target.name} does not hold what {source.name} does: empty it")


async def move(settings: m.Settings, url: str) -> int:
    """Carry the embedded database to one's own PostgreSQL. Raises StartError."""
    if settings.database:
        raise StartError("DATABASE_URL is set: only an embedded database is moved")
    folder, password = Path(settings.data_dir), settings.database_password.rstrip("\r\n")
    key = signing_key(settings)
    async with opened(settings) as source:
        target = await own_place(with_password(url, password), "the database to move to")
        if await target.tables():
            raise StartError(f"{target.name} must have no tables")
        if await is_closed(source):  # by a move that was cut off
            await open_to_writers(source)
        await update_schema(source)
        try:
            await close_to_writers(source)
            await carry_over(source, target, folder)
            wanted = {"DATABASE_URL": url, "DATABASE_PASSWORD": password, "SECRET_KEY": key}
            lines = [f"{name}={shlex.quote(value)}\n" for name, value in wanted.items() if value]
            write_private(folder / "moved.env", "".join(lines))
        except BaseException:
            await open_to_writers(source)
            raise
    print(f"moved; stop the server, and start it with what is in {folder / 'moved.env'}:")
    print(f"    set -a; . {shlex.quote(str((folder / 'moved.env').absolute()))}; set +a; ./run")
    return 0


async def cancel(settings: m.Settings) -> int:
    """Let the embedded database be used again, after a move that was cut off. Raises StartError."""
    async with opened(settings) as source:
        await open_to_writers(source)
    print("the embedded database is used again")
    return 0


def main(line: Sequence[str]) -> int:
    """Obey the command line; answer the exit status."""
    parser = argparse.ArgumentParser(
        prog="./run move", description="carry the embedded database to your own PostgreSQL")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "url", nargs="?", help="like DATABASE_URL; a password is taken from DATABASE_PASSWORD")
    what.add_argument(
        "--cancel", action="store_true", help="use the embedded one again after a crash")
    given = parser.parse_args(line)
    return run(lambda settings: cancel(settings) if given.cancel else move(settings, given.url))
