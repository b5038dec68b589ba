"""The database that a command works on, and PostgreSQL's own programs, which back it up.

The embedded database has those of its wheel. For one's own those of its version are looked for, on
the PATH and where Debian keeps them, and then the newest: they work with older servers too, but
what a server keeps for itself only those of its version know to leave out.
"""

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from psycopg.conninfo import make_conninfo

import messenger as m
from plumbing.address import connect, explain, read_address, shield_libpq
from plumbing.embedded import Postgres, find_binaries
from plumbing.files import replacing
from plumbing.process import StartError, end_on_signals, escape_unwritable, start_logs
from plumbing.schema import FAILURES, SELECT_NUMBER, migrate, schema_number

CONNECT_SECONDS = 5.0
PATIENCE_SECONDS = 10.0  # for a database that is starting
PAUSE_SECONDS = 0.2
PROGRESS_SECONDS = 2.0
PROGRAMS = Path("/usr/lib/postgresql")  # where Debian keeps those of each version
TLS_WANTED = ("require", "verify-ca", "verify-full")
SCRIPT_HEAD_LINES = 30  # of comments and settings, in what pg_restore writes
CHUNK_BYTES = 1 << 16
Streams = tuple[
    asyncio.StreamReader, asyncio.StreamReader, asyncio.StreamWriter, asyncio.StreamReader]
MIGRATIONS = re.compile(r"\t(\d{4})_\w+\t")  # of yoyo's table, in pg_restore's words

SESSION = {"search_path": "public", "statement_timeout": "0", "lock_timeout": "0"}
SELECT_HAS_SCHEMA = "select to_regclass('public._yoyo_migration') is not null"
SELECT_TABLES = """
    select count(*) from pg_class
    where relnamespace = 'public'::regnamespace and relkind in ('r', 'p')"""
FORGET_MOVE = "update schema_needs set moved_at = null"


# ---- Where it is


@dataclass(frozen=True)
class Place:
    """A database, and the programs for it."""

    url: str
    name: str  # for people
    programs: Path  # their folder

    @property
    def database(self) -> str:
        """The database's own name."""
        return read_address(self.url).parameters["dbname"]

    def beside(self, database: str) -> "Place":
        """Name another database of the same PostgreSQL."""
        mark = "&" if "?" in self.url else "?"
        return replace(self, url=f"{self.url}{mark}dbname={quote(database, safe='')}")

    async def schema(self) -> int:
        """Tell the number of its schema, 0 where there is none. Raises StartError."""
        async with connected(self) as connection:
            has_schema = await connection.fetchval(SELECT_HAS_SCHEMA)
            return await connection.fetchval(SELECT_NUMBER) if has_schema else 0

    async def tables(self) -> int:
        """Count the tables in it. Raises StartError."""
        async with connected(self) as connection:
            count: int = await connection.fetchval(SELECT_TABLES)
            return count


@contextlib.asynccontextmanager
async def opened(
    settings: m.Settings, alone: bool = False, may_make: bool = False
) -> AsyncIterator[Place]:
    """Find the database of the settings; start an embedded one for the time, where no server runs.

    `alone`: a server that keeps an embedded one up is refused. Raises StartError.
    """
    if settings.database:
        yield await own_place(settings.database, "DATABASE_URL")
        return
    folder = Path(settings.data_dir)
    if not may_make and not (folder / "postgres").exists():
        raise StartError(f"there is no database in {folder} (DATA_DIR)")
    server = Postgres(folder)
    try:
        await (server.start() if alone else server.start_or_join())
        yield Place(server.dsn, f"the embedded PostgreSQL in {server.folder}", find_binaries())
    finally:
        await server.stop()


async def own_place(url: str, name: str) -> Place:
    """Find a database of one's own, and programs for its version. Raises StartError."""
    async with connected(Place(url, name, Path())) as connection:
        version = connection.get_server_version().major
    mode = read_address(url).parameters["sslmode"]
    return Place(url, name, find_programs(version, needs_tls=mode in TLS_WANTED))


@contextlib.asynccontextmanager
async def connected(place: Place) -> AsyncIterator[Any]:
    """Connect to a database, which may still be starting. Raises StartError where that fails, or
    what is done then.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            connection = await connect(place.url, SESSION, CONNECT_SECONDS)
            break
        except FAILURES as error:
            reason, may_pass = explain(error)
            if not may_pass or time.monotonic() > deadline:
                raise StartError(f"{place.name}: {reason}") from None
        await asyncio.sleep(PAUSE_SECONDS)
    try:
        yield connection
    except FAILURES as error:
        raise StartError(f"{place.name}: {explain(error)[0]}") from error
    finally:
        connection.terminate()


# ---- PostgreSQL's programs


def version_of(programs: Path) -> int:
    """Tell which PostgreSQL programs are of, 0 where there are none."""
    try:
        told = subprocess.run(
            [programs / "pg_dump", "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return 0
    found = re.search(r"\(PostgreSQL\) (\d+)", told.stdout)
    return int(found[1]) if found else 0


def find_programs(version: int, needs_tls: bool) -> Path:
    """Find PostgreSQL's programs of a version, else the newest there are, if they are newer.

    Those of the wheel cannot encrypt. Raises StartError.
    """
    folders = [Path(found).parent for found in [shutil.which("pg_dump")] if found]
    folders += PROGRAMS.glob("*/bin")
    with contextlib.suppress(StartError):
        folders += [] if needs_tls else [find_binaries()]
    known = {folder: version_of(folder) for folder in folders}
    best = max(known, key=lambda folder: (known[folder] == version, known[folder]), default=Path())
    if not known.get(best) or known[best] < version:
        what = f"pg_dump of PostgreSQL {version} or later" if version else "pg_dump"
        raise StartError(f"{what} is needed on the PATH (Debian: postgresql-client)")
    return best


def reach(place: Place) -> tuple[str, dict[str, str]]:
    """Tell a program where a database is: by an argument and the environment, in which a password
    is in no list of processes.
    """
    given = read_address(place.url).parameters
    hidden = {"PGPASSWORD": given.get("password"), "PGSSLCERTMODE": given.get("sslcertmode")}
    shown = {k: v for k, v in given.items() if k not in ("password", "sslcertmode")}
    return make_conninfo("", **shown), {name: value for name, value in hidden.items() if value}


async def spawn(
    program: Path, *arguments: str, environment: Mapping[str, str], **streams: Any
) -> Process:
    """Start a program, which speaks English on its stderr."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return await asyncio.create_subprocess_exec(
        program, *arguments, env={**kept, "LC_ALL": "C", **environment},
        **{"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, **streams})


async def end(*processes: Process) -> None:
    """Kill the processes that still run."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def complaint(program: str, told: bytes) -> StartError:
    """Make a line of what a program told before it failed."""
    lines = told.decode(errors="replace").splitlines() or ["it failed"]
    line = next((line for line in lines if "error:" in line.lower()), lines[-1])
    return StartError(line if line.startswith(program) else f"{program}: {line}")


async def run_program(
    place: Place, program: str, option: str, *arguments: str, **streams: Any
) -> str:
    """Run one of the programs on a database, which it takes by an option; answer what it prints.

    Raises StartError with its first complaint.
    """
    where, environment = reach(place)
    return await run_bare(
        place.programs / program, f"--{option}={where}", *arguments, environment=environment,
        **streams)


async def run_bare(program: Path, *arguments: str, **streams: Any) -> str:
    """Run a program to its end; answer what it prints. Raises StartError."""
    options = {"environment": {}, "stdout": subprocess.PIPE, **streams}
    process = await spawn(program, *arguments, **options)
    try:
        out, err = await process.communicate()
    finally:
        await end(process)
    if process.returncode:
        raise complaint(program.name, err)
    return (out or b"").decode(errors="replace")


@contextlib.asynccontextmanager
async def progress(what: str, count_bytes: Callable[[], int]) -> AsyncIterator[None]:
    """Tell on stderr, every other second and at the end, how far something is."""

    def tell(end: str = "") -> None:
        print(f"{what}: {count_bytes() / 1e6:,.1f} MB{end}", file=sys.stderr, flush=True)

    async def keep_telling() -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            tell(" so far")

    telling = asyncio.create_task(keep_telling())
    try:
        yield
    finally:
        telling.cancel()
    tell()


# ---- Archives


async def dump(place: Place, file: Path) -> None:
    """Write a database as it is at this moment into a file. Raises StartError."""
    with replacing(file) as descriptor:
        async with progress("dumped", lambda: os.fstat(descriptor).st_size):
            await run_program(
                place, "pg_dump", "dbname", "--format=custom", "--schema=public",
                "--no-owner", "--no-privileges", stdout=descriptor)


async def schema_of(file: Path) -> int:
    """Tell the number of the schema of a backup. Raises StartError where it is none."""
    try:
        file.open("rb").close()
    except OSError as error:
        raise StartError(f"cannot read {file}: {error.strerror}") from None
    restore = find_programs(0, needs_tls=False) / "pg_restore"
    try:
        text = await run_bare(
            restore, "--data-only", "--table=_yoyo_migration", "--file=-", str(file))
    except StartError as error:
        raise StartError(f"{file} is no backup: {error}") from None
    numbers = [int(found) for found in MIGRATIONS.findall(text)]
    if not numbers:
        raise StartError(f"{file} is no backup of a messenger")
    return max(numbers)


async def require_backup(file: Path) -> None:
    """Insist that a file is a backup that this messenger understands. Raises StartError."""
    number = await schema_of(file)
    if number > (ours := schema_number(m.SQL)):
        raise StartError(
            f"{file} is of a newer messenger: of schema {number}, and this one knows {ours}")


async def replay(place: Place, archive: int) -> None:
    """Do what an archive says, in one transaction. Raises StartError.

    By way of psql: what pg_restore sets first is not known to PostgreSQL before 17, and that of an
    older server may not be able to read the archive.
    """
    where, environment = reach(place)
    restoring = await spawn(
        find_programs(0, needs_tls=False) / "pg_restore", "--file=-", "--schema=public",
        "--no-owner", "--no-privileges", environment={}, stdin=archive, stdout=subprocess.PIPE)
    doing = await spawn(
        place.programs / "psql", f"--dbname={where}", "--no-psqlrc", "--quiet",
        "--set=ON_ERROR_STOP=1", environment=environment, stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL)
    streams = restoring.stdout, restoring.stderr, doing.stdin, doing.stderr
    script, reason, statements, refusal = cast("Streams", streams)
    told = asyncio.gather(reason.read(), refusal.read())
    try:
        with contextlib.suppress(ConnectionError):  # psql has ended, and tells why
            await pass_on(script, statements)
            if await restoring.wait() == 0:
                statements.write(b"commit;\n")
            statements.close()
            await doing.wait()
    finally:
        await end(restoring, doing)
        reasons = await told
    if restoring.returncode and restoring.returncode > 0:  # else it was ended here
        raise complaint("pg_restore", reasons[0])
    if doing.returncode:
        raise complaint("psql", reasons[1])


async def pass_on(script: asyncio.StreamReader, statements: asyncio.StreamWriter) -> None:
    """Pass a script on as a transaction that is left open, without what servers may not know."""
    statements.write(b"begin;\n")
    for _ in range(SCRIPT_HEAD_LINES):
        line = await script.readline()
        if not line.startswith(b"SET transaction_timeout"):
            statements.write(line)
    while chunk := await script.read(CHUNK_BYTES):
        statements.write(chunk)
        await statements.drain()


async def load(place: Place, file: Path) -> None:
    """Put a backup into a database without tables, and bring its schema up to date.

    Raises StartError.
    """
    descriptor = os.open(file, os.O_RDONLY)
    try:
        async with progress("restored", lambda: os.lseek(descriptor, 0, os.SEEK_CUR)):
            await replay(place, descriptor)
    finally:
        os.close(descriptor)
    await update_schema(place)
    async with connected(place) as connection:
        await connection.execute(FORGET_MOVE)
        await connection.execute("analyze")


async def update_schema(place: Place) -> None:
    """Bring the schema of a database up to date. Raises StartError."""
    try:
        await asyncio.to_thread(migrate, place.url, m.SQL)
    except FAILURES as error:
        raise StartError(f"{place.name}: {explain(error)[0]}") from error


# ---- Commands


def run(work: Callable[[m.Settings], Awaitable[int]]) -> int:
    """Do the work of a command with the settings of the environment; answer the exit status."""

    async def obey(settings: m.Settings) -> int:
        end_on_signals()
        return await work(settings)

    start_logs(access_log=False, as_json=False)
    escape_unwritable(sys.stdout)
    shield_libpq()
    try:
        return asyncio.run(obey(m.Settings.load(os.environ)))
    except StartError as error:
        print(f"messenger: {error}", file=sys.stderr)
    except asyncio.CancelledError:
        print("messenger: interrupted", file=sys.stderr)
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
