"""A small machine: `./run bench small`, in 2 minutes; as root, for the limits are the kernel's.

The server and its PostgreSQL share one core and 1 GB of memory, the cache of files included, by a
control group (version 1 or 2, whichever there is; without either, by a limit of each process's
address space, which bounds no sum). The load has another core. Told are the first start, which
makes the database, and the second; the disk; the memory of both sides, as shares that add up
(PSS), idle and with sockets open; how fast posts are; and the most that the group ever held.
"""

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import uvloop
from clients import Sender, Socket, close_all, open_all, post_for
from posts import open_senders
from rig import LOAD_CORE, ROOT, SECRET_KEY, SERVER_CORE, Bench, Server, bench_of, options_of, pin

MEMORY_BYTES = 1 << 30
SOCKETS = 5_000
SENDERS = 64
POST_SECONDS = 10.0
REST_SECONDS = 5
GROUPS = Path("/sys/fs/cgroup")
NAME = "messenger-bench-small"
MEGA = 1_000_000


class Limits:
    """What bounds the server's memory: `join` is the shell's command by which it comes in."""

    def __init__(self, name: str, join: str, folder: Path | None, most: str = "") -> None:
        self.name = name
        self.join = join
        self._folder = folder
        self._most = most

    def most_bytes(self) -> int | None:
        """Tell the most memory that there ever was in it; None where nobody counts."""
        if self._folder is None or not (self._folder / self._most).exists():
            return None
        return int((self._folder / self._most).read_text())


@contextlib.contextmanager
def limits() -> Iterator[Limits]:
    """Make the bound, by the first of the ways that works here."""
    for version, place, limit, most in (
        (2, GROUPS, "memory.max", "memory.peak"),
        (1, GROUPS / "memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    ):
        folder = place / NAME
        if not (place / "cgroup.procs").exists():
            continue  # not of this version
        try:
            folder.mkdir(exist_ok=True)
            with (folder / limit).open("r+") as file:
                file.write(str(MEMORY_BYTES))
        except OSError:  # not root, or memory is bounded in the other version
            with contextlib.suppress(OSError):
                folder.rmdir()
            continue
        try:
            join = f"echo $$ >{folder}/cgroup.procs"
            yield Limits(f"control group, version {version}", join, folder, most)
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()
        return
    yield Limits("address space of each process", f"ulimit -v {MEMORY_BYTES // 1024}", None)


class SmallServer(Server):
    """A messenger that has, with its PostgreSQL, one core and little memory."""

    bounds: Limits
    started_in = 0.0

    def _start(self) -> None:
        settings = {"PORT": str(self.port), "DATA_DIR": self._folder, "SECRET_KEY": SECRET_KEY,
                    "RATE_LIMITS": "off", "PYTHONWARNINGS": "ignore"}
        environment = os.environ | settings
        environment.pop("DATABASE_URL", None)
        began = time.perf_counter()
        self._process = subprocess.Popen(
            ["sh", "-c", f'{self.bounds.join}; exec taskset -c {SERVER_CORE} "$@"', "sh",
             sys.executable, self._program], env=environment, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if "serves" in line:
                self.port = int(line.rsplit(":", 1)[1])
            if line.startswith("next"):
                break
        self.started_in = time.perf_counter() - began
        assert self.port, "the server did not start"
        self.pids = [self._process.pid]

    def disk_bytes(self) -> int:
        """Tell what its data take on the disk."""
        return disk_bytes(Path(self._folder))

    def memory(self) -> tuple[float, float]:
        """Tell the memory of the server and of its PostgreSQL, in MB."""
        below = list(descendants(self._process.pid))
        return pss_bytes([self._process.pid]) / MEGA, pss_bytes(below) / MEGA


def descendants(pid: int) -> Iterator[int]:
    """Find the processes below one."""
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            yield child
            yield from descendants(child)


def pss_bytes(pids: Iterable[int]) -> int:
    """Add up the memory of processes; what several share counts in parts, once in all."""
    found = [re.search(r"(?m)^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())
             for pid in pids]
    return sum(int(each[1]) * 1024 for each in found if each)


def dependencies_bytes() -> int:
    """Tell what the packages take that the server runs on, PostgreSQL among them."""
    lock = (ROOT / "requirements.txt").read_text()
    files = []
    for name in re.findall(r"(?m)^([\w.-]+)==", lock):
        with contextlib.suppress(PackageNotFoundError):  # not for this platform
            files += distribution(name).files or []
    places = {Path(str(file.locate())) for file in files}
    return sum(place.stat().st_size for place in places if place.exists())


def disk_bytes(folder: Path) -> int:
    """Tell what a folder takes on the disk."""
    done = subprocess.run(["du", "-sk", folder], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0]) * 1024


async def measure(bench: Bench, bounds: Limits) -> list[tuple[str, str]]:
    """Measure, and answer what there is to tell."""
    SmallServer.bounds = bounds
    seconds, count = (1.0, 500) if bench.quick else (POST_SECONDS, SOCKETS)
    pin(LOAD_CORE)
    async with SmallServer(bench) as server:
        first = server.started_in
        await server.stop()
        disk = server.disk_bytes()
        await server.start()
        second = server.started_in
        await asyncio.sleep(REST_SECONDS)
        idle = server.memory()
        bench.tell(f"small: {count:,} sockets")
        people = await server.people(count)
        await server.groups(list(zip(people[::2], people[1::2], strict=True)))
        sockets = await open_all(
            server.port, [partial(Socket, "/ws", who.token) for who in people])
        await asyncio.sleep(REST_SECONDS)
        full = server.memory()
        bench.tell("small: posts")
        chats = await server.groups([[who, people[0]] for who in people[1 : SENDERS + 1]])
        senders: list[Sender] = await open_senders(server, chats, people[1 : SENDERS + 1])
        alone = await post_for(senders[:1], seconds)
        together = await post_for(senders, seconds)
        assert not any(each.transport.is_closing() for each in (*sockets, *senders))
        close_all([*sockets, *senders])
        most = bounds.most_bytes()
    return [
        ("first start, later starts (packages already installed)",
         f"{first:.1f} s, {second:.1f} s"),
        ("disk: the packages in `.venv`", f"{dependencies_bytes() / MEGA:.0f} MB"),
        ("disk: an empty database", f"{disk / MEGA:.0f} MB"),
        ("memory, idle: server, PostgreSQL", f"{idle[0]:.0f} MB, {idle[1]:.0f} MB"),
        (f"memory, {count:,} sockets open: server, PostgreSQL",
         f"{full[0]:.0f} MB, {full[1]:.0f} MB"),
        ("one sender beside them, from a message to its acknowledgement, median",
         f"{alone['p50']:.2f} ms"),
        (f"{SENDERS} senders beside them", f"{together['rate']:,.0f} messages/s"),
        ("the most memory at any time, the cache of files included",
         f"{most / MEGA:,.0f} MB" if most else "not counted"),
    ]


def main() -> None:
    """Measure, and print a table."""
    options = options_of(__doc__)

    async def everything(bounds: Limits) -> list[tuple[str, str]]:
        async with bench_of(options) as bench:
            return await measure(bench, bounds)

    with limits() as bounds:
        rows = uvloop.run(everything(bounds))
    print(f"one core, {MEMORY_BYTES / 2**30:.0f} GB of memory ({bounds.name})\n")
    print("| on a small machine | |\n|---|--:|")
    for what, figure in rows:
        print(f"| {what} | {figure} |")


if __name__ == "__main__":
    main()
