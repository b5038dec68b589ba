"""Backups of the embedded PostgreSQL beside a server that is used, and its data moved elsewhere."""

import asyncio
import os
import shlex
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from plumbing.process import StartError
from support.people import SOON_SECONDS, Person, new_id
from support.servers import (
    ROOT,
    SECRET_KEY,
    START_SECONDS,
    Server,
    environment,
    settings_for,
)
from tools import databases, move, restore

pytestmark = pytest.mark.usefixtures("nothing_left")
ACKNOWLEDGED_MIN = 100  # before a backup begins


async def does(folder: Path, *arguments: object, **settings: Any) -> tuple[int, str, str]:
    """Run `messenger.py ARGUMENTS`; answer its status and what it wrote to stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "messenger.py"), *map(str, arguments),
        cwd=folder, env=environment(**settings), stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    async with asyncio.timeout(START_SECONDS):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def mode_of(file: Path) -> int:
    """Who may do what with a file."""
    return stat.S_IMODE(file.stat().st_mode)


async def ids_in(person: Person, chat: int) -> set[str]:
    """The ids of all messages of a chat."""
    found: set[str] = set()
    after = 0
    while page := await person.gets(f"/chats/{chat}/changes?limit=100&after={after}"):
        found |= {each["id"] for each in page}
        after = page[-1]["rev"]
    return found


async def test_backup_under_load_has_what_was_acknowledged_and_restores(
    running: Server, people_of: Any, tmp_path: Path
) -> None:
    """A backup beside a serving server holds everything that was acknowledged before it began; it
    verifies, and restored with its key the same people go on in it, but for what came later."""
    alice, bob = await people_of(running, "alice"), await people_of(running, "bob")
    chat = await alice.opens(bob)
    acknowledged: list[str] = []
    stop = asyncio.Event()

    async def posts(who: Person) -> None:
        while not stop.is_set():
            acknowledged.append((await who.says(chat, "hello", id=new_id()))["id"])

    posting = [asyncio.create_task(posts(who)) for who in (alice, bob, alice, bob)]
    async with asyncio.timeout(SOON_SECONDS):
        while len(acknowledged) < ACKNOWLEDGED_MIN:
            await asyncio.sleep(0.01)
    before = set(acknowledged)
    file, key = tmp_path / "a backup", tmp_path / "a backup.key"
    status, out, err = await does(
        tmp_path, "backup", file, "--with-key", DATA_DIR=running.data)
    during = len(acknowledged)
    stop.set()
    await asyncio.gather(*posting)
    assert status == 0, err
    assert "hashes of passwords" in out
    assert err.startswith("dumped: ")
    assert err.endswith(" MB\n")
    assert during > len(before)
    assert (mode_of(file), mode_of(key)) == (0o600, 0o600)
    assert not list(tmp_path.glob(".*partial"))
    lost = (await alice.says(chat, "after the backup"))["position"]

    with pytest.raises(StartError, match="is in use by another messenger"):
        await restore.restore(settings_for("", running.data), file, True, False)
    assert await running.stops() == 0
    with pytest.raises(StartError, match="has 2 accounts: --force puts the backup in its place"):
        await restore.restore(settings_for("", running.data), file, False, False)
    (running.data / "secret_key").write_text(SECRET_KEY)
    status, out, err = await does(
        tmp_path, "restore", file, "--force", "--with-key", DATA_DIR=running.data)
    assert status == 0, err
    assert "rules hold" in out
    assert "database postgres_before" in out
    assert (running.data / "secret_key.before").read_text().strip() == SECRET_KEY

    alice = await people_of(await running.starts(), "alice", alice)
    stored = await ids_in(alice, chat)
    assert before - stored == set()
    assert "after the backup" not in await alice.history(chat)
    refused = await alice.expects(409, "GET", f"/chats/{chat}/changes?after={lost}")
    assert refused["type"] == "history-rewritten"
    await alice.says(chat, "on we go")
    assert await running.stops() == 0


async def test_backup_takes_the_place_of_files_alone(tmp_path: Path) -> None:
    """What is no ordinary file, such as a device or a pipe, is not replaced by a backup."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for file in (pipe, tmp_path, Path("/dev/null")):
        with pytest.raises(StartError, match="is no ordinary file"):
            await databases.dump(databases.Place("postgresql://nobody@/none", "", tmp_path), file)
    assert pipe.is_fifo()
    assert Path("/dev/null").is_char_device()


async def test_move_takes_everybody_along(
    running: Server, people_of: Any, empty_url: str, tmp_path: Path
) -> None:
    """Moving sends the sockets away with 1001, and from then on the embedded database takes
    nothing; a server that is started with what was written has everybody signed in, and each client
    goes on from its position."""
    alice, bob = await people_of(running, "alice"), await people_of(running, "bob")
    chat = await alice.opens(bob)
    position = (await alice.says(chat, "before"))["position"]
    unseen = await alice.says(chat, "unseen")
    closing = asyncio.create_task((await bob.listens_live(chat)).is_closed())
    async with databases.opened(settings_for("", running.data)) as place:
        await move.close_to_writers(place)  # as a move that is killed leaves it
        assert await closing == 1001
        assert await move.cancel(settings_for("", running.data)) == 0
        async with asyncio.timeout(SOON_SECONDS):
            while (await bob.asks("GET", "/health/readiness")).status != 200:
                await asyncio.sleep(0.05)
        closing = asyncio.create_task((await bob.listens_live(chat)).is_closed())
        await move.close_to_writers(place)
    status, out, err = await does(tmp_path, "move", empty_url, DATA_DIR=running.data)
    assert status == 0, err
    key = (running.data / "secret_key").read_text()
    assert key not in out + err
    assert await closing == 1001
    await alice.says(chat, "too late", 503)
    assert await running.stops() == 0
    written = running.data / "moved.env"
    assert mode_of(written) == 0o600
    given = dict(each.split("=", 1) for each in shlex.split(written.read_text()))
    assert given == {"DATABASE_URL": empty_url, "SECRET_KEY": key}
    moved = Server(tmp_path, **given)
    alice, bob = [await people_of(await moved.starts() if who is alice else moved, who.name, who)
                  for who in (alice, bob)]
    line = await bob.listens(chat, f"?after={position}")
    assert (await line.hears("message", "error"))["data"]["id"] == unseen["id"]
    await alice.says(chat, "after")
    assert (await line.hears("message"))["data"]["text"] == "after"
    assert await moved.stops() == 0
