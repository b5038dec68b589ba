"""Servers: the application's settings in this process, and real processes of the messenger."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiohttp import web
from prometheus_client.mmap_dict import MmapedDict

import messenger
from plumbing import endpoints, metrics
from support.people import SOON_SECONDS, Line, Person

ROOT = Path(__file__).parents[2]
SECRET_KEY = "a key of the tests, longer than 32 bytes"
ENOUGH = 1_000_000
SETTINGS = messenger.Settings(
    bcrypt_cost=4, messages_burst=ENOUGH, messages_per_second=ENOUGH, typing_per_second=ENOUGH,
    changes_burst=ENOUGH, changes_per_minute=ENOUGH, reads_per_user=ENOUGH,
    calls_per_user=ENOUGH,
    sockets_per_user=ENOUGH, refused_handshakes_per_second=ENOUGH, calls_per_address=ENOUGH,
    registrations_per_address=ENOUGH, login_failures_per_address=ENOUGH)
START_SECONDS = 40  # generous deadlines: what they bound takes a second or two
STOP_SECONDS = 15


def settings_for(url: str, folder: Path) -> messenger.Settings:
    """Make the settings of a server on a database, or on the embedded one in a folder."""
    return msgspec.structs.replace(
        SETTINGS, database_url=url, secret_key=SECRET_KEY if url else "", data_dir=str(folder))


def slots_of(app: web.Application) -> endpoints.CallSlots:
    """Find the slots and turns of an application's calls."""
    return next(
        cell.cell_contents for cell in app.middlewares[-1].__closure__
        if isinstance(cell.cell_contents, endpoints.CallSlots))


# ---- A server of its own process


def processes_in(folder: Path) -> set[int]:
    """Answer the pids of every process whose working folder is `folder` or below it."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if (entry / "cwd").readlink().is_relative_to(folder):
                found.add(int(entry.name))
    return found


def environment(**settings: Any) -> dict[str, str]:
    """Make the environment of a server, with nothing in it that it was not given."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    usual = {"BCRYPT_COST": "4", "PORT": "0", "RATE_LIMITS": "off"}
    return kept | usual | {n: str(v) for n, v in settings.items()}


class Server:
    """A messenger of its own process, on a data folder of its own."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder  # the working folder too, by which its processes are found
        self.settings = settings
        self.before: tuple[str, ...] = ()  # a program that starts it, with its arguments
        self.program = ROOT / "tests/support/launch_messenger.py"
        self.data = folder / "data"
        self.url = self.said = ""
        self.process: asyncio.subprocess.Process

    async def starts(self) -> "Server":
        """Start it; returns once it has printed its URL."""
        with (self.folder / "stderr").open("w") as stderr:
            self.process = await asyncio.create_subprocess_exec(
                *self.before, sys.executable, str(self.program),
                cwd=self.folder, env=environment(DATA_DIR=self.data, **self.settings),
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=stderr,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        self.said = self.url = ""
        async with asyncio.timeout(START_SECONDS):
            while "next" not in self.said:
                line = (await self.process.stdout.readline()).decode()
                assert line, self.complaints()
                self.said += line
        self.url = re.findall(r"http://\S+", self.said)[0]
        return self

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    def log(self) -> str:
        """Answer all that it wrote to stderr."""
        return (self.folder / "stderr").read_text()

    def complaints(self) -> str:
        """Answer what it wrote to stderr, but for what is no complaint."""
        lines = self.log().splitlines(keepends=True)
        return "".join(line for line in lines if " INFO " not in line)

    def memory_mb(self) -> float:
        """Answer its resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
        assert found is not None
        return int(found[1]) / 1024

    def postmaster(self) -> int:
        """Answer the pid of its PostgreSQL."""
        return int((self.data / "postgres/postmaster.pid").read_text().split()[0])

    async def ends(self) -> int:
        """Wait until it has ended; answer its status."""
        async with asyncio.timeout(START_SECONDS):
            await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode

    async def stops(self, signal_number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to stop; answer its status."""
        self.process.send_signal(signal_number)
        return await self.ends()

    async def dies(self) -> None:
        """Kill it and all its processes at once, those too that were started meanwhile."""
        async with asyncio.timeout(START_SECONDS):
            while running := processes_in(self.folder):
                for pid in running:
                    with contextlib.suppress(ProcessLookupError):  # it may go with the one before
                        os.kill(pid, signal.SIGKILL)
                await asyncio.sleep(0.01)
        await self.ends()


async def refused(tmp_path: Path, command: tuple[str, ...] = (), **settings: Any) -> str:
    """Start a server that cannot; answer its one line, which may follow others of the log that say
    what it waited for."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *(command or (str(ROOT / "messenger.py"),)),
        cwd=tmp_path, env=environment(**settings),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(START_SECONDS):
            stdout, stderr = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode not in (0, None)
    assert stdout == b""
    *logged, line = stderr.decode().splitlines()
    assert all(" WARNING waiting for " in each for each in logged), stderr
    return line


@contextlib.contextmanager
def nothing_left_in(folder: Path) -> Iterator[None]:
    """See that whatever was started in a folder has ended, and if not, end it now."""
    yield
    left = processes_in(folder)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder)
    assert left == set()


@contextlib.asynccontextmanager
async def people_elsewhere() -> AsyncIterator[Callable[..., Awaitable[Person]]]:
    """Make people of a server in another process: `await people_of(server, "alice")`."""
    made: list[tuple[aiohttp.ClientSession, Person]] = []

    async def make(server: Server, name: str, known: Person | None = None) -> Person:
        session = aiohttp.ClientSession(server.url)
        person = Person(session, name)  # type: ignore[arg-type]
        made.append((session, person))
        if known is None:
            await person.register()
            await person.logs_in()
        else:
            person.id, person.access, person.refresh = known.id, known.access, known.refresh
        return person

    yield make
    for session, person in made:
        for line in person.lines:
            await line.close()
        await session.close()


# ---- Several workers


def free_port() -> int:
    """A port that is free."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def workers_of(server: Server) -> set[int]:
    """The pids of its workers: children of the started process, told by their command line."""
    return {pid for pid in processes_in(server.folder) if _is_worker(pid, server.process.pid)}


def _is_worker(pid: int, parent: int) -> bool:
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        status = Path(f"/proc/{pid}/stat").read_text()
        return b"messenger.py" in command and status.rsplit(")", 1)[1].split()[1] == str(parent)
    return False


def sockets_at(server: Server) -> list[float]:
    """How many sockets each worker says that it has; only of those that have started."""
    counts = []
    for pid in workers_of(server):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            environ = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            folder = dict(each.split("=", 1) for each in environ if "=" in each)[metrics.FOLDER]
            if gauge(f"{folder}/gauge_livemin_{pid}.db", "messenger_database_up"):
                counts.append(gauge(f"{folder}/gauge_livesum_{pid}.db", "messenger_sockets"))
    return counts


def gauge(file: str, name: str) -> float:
    """What a process says of a metric, in its file."""
    told = MmapedDict.read_all_values_from_file(file)
    return sum(float(value) for key, value, *_ in told if f'"{name}"' in key)


# ---- Two servers on one database


class Elsewhere:
    """A second server on the same database, and the way of people to it."""

    def __init__(self, app: web.Application, make_client: Callable[[], Awaitable[Any]]) -> None:
        self.app = app
        self.people: list[Person] = []
        self._make_client = make_client

    async def takes(self, person: Person) -> Person:
        """Answer the same person, with the same session, as a client of this server."""
        same = Person(await self._make_client(), person.name)
        same.id, same.access, same.refresh = person.id, person.access, person.refresh
        self.people.append(same)
        return same


async def knows(person: Person, chat: int, line: Line) -> None:
    """Post until a line at another server hears it: from then on both listen for hints."""
    async with asyncio.timeout(SOON_SECONDS):
        hearing = asyncio.create_task(line.hears("message"))
        posted = 0
        while not hearing.done():
            posted = (await person.says(chat, "knock"))["seq"]
            await asyncio.wait([hearing], timeout=0.05)
        while (await hearing)["data"]["seq"] < posted:
            hearing = asyncio.create_task(line.hears("message"))
