"""What every measurement stands on: the pinned server, its people and chats, rounds, medians.

The server is started as a user starts it, with its embedded PostgreSQL, and pinned to the first
core once it serves: PostgreSQL, which it has started by then, floats. This process is the load
generator and is pinned to the second core. Ceilings are measured in a process of their own on the
server's core, while the server is stopped (SIGSTOP), so that neither takes the other's time.

A measurement is a function that answers figures by name, such as {"rate": 1234.5, "p50": 0.6}.
`alternate` runs several of them in turn, round after round, and answers the median of each figure.
"""

import argparse
import asyncio
import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import asyncpg
import uvloop

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import messenger  # noqa: E402
from plumbing import database, embedded, websocket  # noqa: E402, F401

ALL_CORES = os.sched_getaffinity(0)
SERVER_CORE, LOAD_CORE = (*sorted(ALL_CORES), 0)[:2]
SECRET_KEY = "a key of the bench, longer than 32 bytes"
TEXT = "The quick brown fox jumps over the lazy dog, and nobody in this chat has ever asked why. "
ROUND_SECONDS = 2.0
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
SETTLE_SECONDS = 0.3

Figures = dict[str, float]
Measurement = Callable[[], Awaitable[Figures]]


def pin(core: int) -> None:
    """Keep this process on one core."""
    os.sched_setaffinity(0, {core})


# ---- The server


@dataclass(frozen=True)
class Person:
    """A user who is signed in."""

    id: int
    token: str


class Server:
    """A messenger with its own data, pinned to the server's core; PostgreSQL floats."""

    def __init__(
        self, bench: "Bench", program: Path = ROOT / "messenger.py", **settings: object
    ) -> None:
        self._bench = bench
        self._program = program
        self._settings = {name: str(value) for name, value in settings.items()}
        self._stack = contextlib.AsyncExitStack()
        self.port = 0
        self.sql: Any = None  # a connection of the bench's own

    async def __aenter__(self) -> "Server":
        self._folder = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix="messenger-bench-"))
        self._stack.push_async_callback(self.stop)
        self._bench.servers.append(self)
        self._stack.callback(self._bench.servers.remove, self)
        self.dsn = embedded.Postgres(Path(self._folder)).dsn
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def start(self) -> None:
        """Start the server, on the port that it had if it was stopped."""
        self._start()
        self.sql = await asyncpg.connect(self.dsn)

    async def stop(self) -> float:
        """Ask the server to stop; answer how many seconds passed until its process had ended."""
        await self.sql.close()
        began = time.perf_counter()
        self._process.terminate()
        await asyncio.to_thread(self._process.wait)
        return time.perf_counter() - began

    def _start(self) -> None:
        settings = {
            "PORT": str(self.port), "DATA_DIR": self._folder, "SECRET_KEY": SECRET_KEY,
            "RATE_LIMITS": "off",
        }
        environment = os.environ | settings | {"PYTHONWARNINGS": "ignore"} | self._settings
        environment.pop("DATABASE_URL", None)
        os.sched_setaffinity(0, ALL_CORES)  # a child inherits it, and PostgreSQL must float
        self._process = subprocess.Popen(
            [sys.executable, self._program], env=environment, stdout=subprocess.PIPE, text=True
        )
        pin(LOAD_CORE)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert "serves" in line, "the server did not start"
        self.port = int(line.rsplit(":", 1)[1])
        self.pids = self._find_processes()
        for pid, core in zip(self.pids, (SERVER_CORE, LOAD_CORE), strict=False):
            for thread in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(thread), {core})

    def _find_processes(self) -> list[int]:
        """Answer the processes that serve: the server's own, or its workers'."""
        workers = int(self._settings.get("WORKERS", 1))
        if workers == 1:
            return [self._process.pid]
        deadline = time.monotonic() + 10
        while True:
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
            found = [int(pid) for pid in children.read_text().split()
                     if b"messenger.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            if len(found) == workers and time.monotonic() > deadline - 8:  # both listen by then
                return found
            assert time.monotonic() < deadline, "the workers did not start"
            time.sleep(0.1)

    async def rest(self) -> None:
        """Wait until the server has ended what it was asked for, which may be after its answer."""
        used = -1.0
        while (now := self.cpu_seconds()) - used > 0.1:
            used = now
            await asyncio.sleep(1)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to what serves."""
        for pid in self.pids:
            os.kill(pid, number)

    def cpu_seconds(self) -> float:
        """Answer the processor time that the server has used."""
        return sum(cpu_seconds(pid) for pid in self.pids)

    def postgresql_cpu_seconds(self) -> float:
        """Answer the processor time that its PostgreSQL has used."""
        return postgresql_cpu_seconds(Path(self._folder))

    # ---- What is in it: by SQL, for ten thousand calls would take long

    async def people(self, count: int) -> list[Person]:
        """Make users who are signed in."""
        rows = await self.sql.fetch(
            """with fresh as (
                   insert into users (email, email_key, username, username_key)
                   select name || '@example.com', name || '@example.com', name, name
                   from (select 'user_' || ((select count(*) from users) + g) as name
                         from generate_series(1, $1) g) named returning id
               )
               insert into sessions (user_id) select id from fresh order by id
               returning id, user_id, generation, rotated_at, secret""",
            count,
        )
        await self.sql.execute("analyze users, sessions")
        settings = messenger.Settings(access_token_expire_minutes=1440)
        sessions = messenger.Sessions(settings, SECRET_KEY, messenger.Database(""))
        return [Person(row["user_id"], sessions.tokens(row["user_id"], row).access_token)
                for row in rows]

    async def groups(
        self, members: Sequence[Sequence[Person]], analyze: bool = True
    ) -> list[int]:
        """Make a group of each of some lists of people, who have been in it for a while."""
        chats = []
        async with self.sql.transaction():
            for owner, *others in members:
                ids = [other.id for other in others]
                row = await self.sql.fetchrow(messenger.CREATE_GROUP, owner.id, "a group", ids)
                chats.append(row["chat_id"])
        await self.sql.execute(
            "update participants set joined_at = now() - interval '1 day' where chat_id = any ($1)",
            chats,
        )
        if analyze:
            await self.sql.execute("vacuum analyze chats, participants")
        return chats

    async def fill(self, chats: Sequence[int], count: int, sender: Person) -> None:
        """Put so many messages into each chat, as if they had been posted and indexed."""
        await self.sql.execute(
            """insert into messages (chat_id, seq, rev, id, sender_id, text, created_at)
               select c.id, s, s, uuidv7(), $3, $4 || s, now() + s * interval '1 microsecond'
               from unnest($1::bigint[]) c (id), generate_series(1, $2::bigint) s""",
            chats, count, sender.id, TEXT, timeout=300,
        )
        await self.sql.execute(
            "update chats set last_rev = $2, last_seq = $2, active_at = clock_timestamp()"
            " where id = any ($1)", chats, count,
        )
        await self.sql.execute(
            "insert into search_positions (chat_id, rev) select unnest($1::bigint[]), $2",
            chats, count,
        )

    async def settle(self) -> None:
        """Let PostgreSQL finish what filling has left to do, so that no round pays for it."""
        await self.sql.execute("vacuum analyze", timeout=300)
        await self.sql.execute("checkpoint", timeout=300)


def cpu_seconds(pid: int) -> float:
    """Answer the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def postgresql_cpu_seconds(folder: Path) -> float:
    """Answer the processor time of a PostgreSQL, also of its processes that have ended."""
    postmaster = (folder / "postgres/postmaster.pid").read_text().split()[0]
    children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
    fields = Path(f"/proc/{postmaster}/stat").read_text().rpartition(")")[2].split()
    ended = (int(fields[13]) + int(fields[14])) / TICKS_PER_SECOND
    return ended + sum(cpu_seconds(int(pid)) for pid in (postmaster, *children))


def cpu_milliseconds(pids: Iterable[int]) -> float:
    """Answer the processor time that processes have used, to the nanosecond, by their threads."""
    files = [file for pid in pids for file in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(file.read_text().split()[0]) for file in files) / 1e6


async def processor_time(work: Awaitable[object], *sides: Sequence[int]) -> list[float]:
    """Await some work; answer the milliseconds of processor time that each side's processes took.
    """
    before = [cpu_milliseconds(pids) for pids in sides]
    await work
    return [cpu_milliseconds(pids) - used for pids, used in zip(sides, before, strict=True)]


def resident_bytes(pid: int) -> int:
    """Answer the resident memory of a process."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def kernel_bytes() -> int:
    """Answer what the kernel holds for the whole machine: its objects, and TCP's buffers.

    A connection of this machine with itself has both its ends in it.
    """
    memory = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    pages = re.search(r"TCP: .* mem (\d+)", Path("/proc/net/sockstat").read_text())
    assert pages is not None
    slab = (int(memory["SReclaimable"]) + int(memory["SUnreclaim"])) * 1024
    return slab + int(pages[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- Rounds


class Bench:
    """How long and how often to measure; runs the rounds and tells where it is."""

    def __init__(self, rounds: int, quick: bool) -> None:
        self.rounds = 1 if quick else rounds
        self.seconds = ROUND_SECONDS / 4 if quick else ROUND_SECONDS
        self.quick = quick
        self.servers: list[Server] = []
        self._pool = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=pin, initargs=(SERVER_CORE,)
        )

    def close(self) -> None:
        """End the process of the ceilings."""
        self._pool.shutdown()

    def tell(self, text: str) -> None:
        """Say where the bench is."""
        print(f"{datetime.now(UTC):%H:%M:%S}  {text}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def only(self, server: Server | None) -> Iterator[None]:
        """Let no server, or no other one, use any time while something is measured."""
        others = [each for each in self.servers if each is not server]
        for each in others:
            each.send(signal.SIGSTOP)
        try:
            yield
        finally:
            for each in others:
                each.send(signal.SIGCONT)

    async def ceiling(self, function: Callable[..., Figures], *arguments: object) -> Figures:
        """Run a function of ceilings.py on the server's core, with every server stopped."""
        with self.only(None):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, function, *arguments)

    async def loaded(self, server: Server, measurement: Measurement) -> Figures:
        """Measure a server, and what part of the two cores it and the load used."""
        with self.only(server):
            await asyncio.sleep(SETTLE_SECONDS)
            return await self._shares(server, measurement)

    async def _shares(self, server: Server, measurement: Measurement) -> Figures:
        before, began = (server.cpu_seconds(), time.process_time()), time.monotonic()
        figures = await measurement()
        passed = time.monotonic() - began
        figures["core"] = (server.cpu_seconds() - before[0]) / passed
        figures["load"] = (time.process_time() - before[1]) / passed
        return figures

    async def alternate(self, title: str, **measurements: Measurement) -> dict[str, Figures]:
        """Run measurements in turn (A B A B ...); answer the median of each one's figures."""
        results: dict[str, list[Figures]] = {name: [] for name in measurements}
        for number in range(self.rounds):
            for name, measurement in measurements.items():
                figures = await measurement()
                results[name].append(figures)
                shown = "  ".join(f"{key} {value:,.2f}" for key, value in figures.items())
                self.tell(f"{title}, round {number + 1} of {self.rounds}, {name}: {shown}")
        return {name: medians(figures) for name, figures in results.items()}


def medians(results: list[Figures]) -> Figures:
    """Answer the median of each figure."""
    return {key: statistics.median(each[key] for each in results) for key in results[0]}


def percentile(values: Sequence[float], percent: int) -> float:
    """Answer the value below which so many percent are."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


# ---- Results


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, beside what, and how far it had to come."""

    work: str
    server: str
    ceiling: str
    value: float  # what is held against the bound
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    figures: Figures | None = None  # of the server: also its and the load's share of their cores
    key: str = ""  # where it stands beside others

    def reach(self) -> float | None:
        """Answer how much better than wanted it is: 1 is just reached, None nothing is wanted."""
        if self.at_least is not None:
            return self.value / self.at_least
        return self.at_most / self.value if self.at_most is not None else None

    def wanted(self) -> str:
        """Say what is to be reached."""
        if self.at_least is not None:
            return f"at least {self.at_least:g} {self.unit}"
        return f"at most {self.at_most:g} {self.unit}" if self.at_most is not None else "reported"


Rows = Callable[[Bench], Awaitable[list[Row]]]


def markdown(rows: Sequence[Row]) -> str:
    """Draw the rows as a table."""
    lines = [
        "| work | server | ceiling | came to | to reach | reached | server's core | load's core |",
        "|---|---|---|---|---|---|--:|--:|",
    ]
    for row in rows:
        reach, shares = row.reach(), row.figures or {}
        reached = "" if reach is None else "yes" if reach >= 1 else "**no**"
        cores = [f"{shares[key]:.0%}" if key in shares else "" for key in ("core", "load")]
        cells = [row.work, row.server, row.ceiling, f"{row.value:.3g} {row.unit}", row.wanted()]
        lines.append("| " + " | ".join([*cells, reached, *cores]) + " |")
    return "\n".join(lines)


@contextlib.asynccontextmanager
async def bench_of(options: argparse.Namespace) -> AsyncIterator[Bench]:
    """A bench that is ended in order."""
    pin(LOAD_CORE)
    bench = Bench(options.rounds, options.quick)
    try:
        yield bench
    finally:
        bench.close()


def options_of(description: str | None) -> argparse.Namespace:
    """Read the options that every part of the bench has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement (5)")
    parser.add_argument("--quick", action="store_true", help="one short round: does it run?")
    options = parser.parse_args()
    if len(ALL_CORES) < 2:
        sys.exit("the bench needs two cores: one for the server, one for the load")
    return options


def run(rows: Rows, description: str | None) -> None:
    """Run one part of the bench alone and print its rows."""
    options = options_of(description)

    async def measure() -> None:
        async with bench_of(options) as bench:
            print(markdown(await rows(bench)))

    uvloop.run(measure())
