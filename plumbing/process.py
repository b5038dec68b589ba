"""What the process needs of the system: ports, signals, children, logs, and a word for a bad start.

A port is taken before anything else is started. A child ends with the process that started it,
however that ends, and is started again if it ends before. The log holds nothing that a client sent,
but for the id of a request: of an exception its kind and place, of a library's record only its
place.
"""

import asyncio
import contextlib
import copy
import ctypes
import errno
import io
import json
import logging
import os
import re
import resource
import secrets
import signal
import socket
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, cast

from aiohttp import http_parser, web

BACKLOG = 4096  # connections that wait to be accepted: as many as Linux lets wait by default
UNSENT_BYTES_MAX = 8 * 1024  # that the kernel takes of a connection; by itself it takes megabytes
ACCEPTED_AT_ONCE = 64  # connections, until what else is to do had its turn
ACCEPT_REST_SECONDS = 0.5  # where none can be accepted
DESCRIPTORS_SPARE = 64  # that connections may not take
CHILD_STOP_SECONDS = 2.7  # until a child that does not stop is killed
CHILD_PAUSE_SECONDS = 0.2
PR_SET_PDEATHSIG = 1  # of Linux's prctl: which signal the end of the parent sends
PARENT = "MESSENGER_PARENT"  # in the environment of a child: its parent's pid
REQUEST_ID_HEADER = "X-Request-Id"

Listener = socket.socket
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
log = logging.getLogger("messenger.process")


class StartError(Exception):
    """One line fit to be shown to the person who starts the server."""


# ---- Ports


def require_parser() -> None:
    """Insist on aiohttp's HTTP parser in C: the one in Python let requests be smuggled.

    Raises StartError.
    """
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise StartError("aiohttp was installed without its HTTP parser in C, which is needed")


def listen_on(
    host: str, port: int, shared: bool = False, names: tuple[str, str] = ("HOST", "PORT")
) -> socket.socket:
    """Listen on a port, which workers share; `::` is every address of both IPv6 and IPv4.

    Raises StartError, which tells of the settings of these names.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(
            address, family=family, backlog=BACKLOG, reuse_port=shared,
            dualstack_ipv6=family == socket.AF_INET6 and socket.has_dualstack_ipv6())
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # what is accepted inherits it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES_MAX)
        return listener
    except (OSError, UnicodeError) as error:  # the latter for a name that cannot be one
        reason = getattr(error, "strerror", None) or str(error)
        where = f"{names[0]} {host}, {names[1]} {port}"
        raise StartError(f"cannot listen on {where}: {reason}") from None


def hold_port(host: str, port: int) -> socket.socket:
    """Take a port for workers to listen on, without listening. Raises StartError."""
    with listen_on(host, port) as free:  # fails where somebody listens, which sharing would hide
        held = socket.socket(free.family, socket.SOCK_STREAM)
        address = free.getsockname()
        if free.family == socket.AF_INET6:
            only_ipv6 = free.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_ipv6)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(address)
    return held


def url_of(listener: socket.socket) -> str:
    """Tell the URL at which a browser of this machine finds what listens."""
    address, port = listener.getsockname()[:2]
    if address in ("127.0.0.1", "0.0.0.0", "::"):  # noqa: S104
        return f"http://localhost:{port}"
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


async def until_listening(host: str, port: int) -> None:
    """Return once somebody listens on a port."""
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host, port)
            return writer.close()
        await asyncio.sleep(0.05)


def raise_descriptor_limit() -> None:
    """Let this process have as many descriptors as it may: each connection takes one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # "unlimited", where the kernel has a limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def half_of_descriptors() -> int:
    """Tell how many descriptors are half of those that connections may take."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, (limit - DESCRIPTORS_SPARE) // 2) if limit > 0 else sys.maxsize


def resident_bytes() -> int:
    """Tell how much memory this process takes; 0 where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_bytes().split()[1]
    except OSError:
        return 0
    return int(pages) * resource.getpagesize()


def nothing() -> None:
    """Do nothing."""


def drop_frames(error: BaseException) -> None:
    """Let an exception that was dealt with hold no frames. They may hold what holds the exception,
    like a future or a reader, and would not be freed before a collection of such cycles.
    """
    error.__traceback__ = error.__context__ = error.__cause__ = None


class Guest:
    """Whose connection was accepted: may delay reads, and the end. This one delays nothing."""

    __slots__ = ()  # there are many

    def begin(self, connection: Any) -> None:
        """Take note of the connection."""

    def note_read(self, connection: Any) -> None:
        """Take note that the connection was read."""

    def go_on(self, work: Callable[[], object]) -> None:
        """Have something done for the connection in another round of the event loop."""
        asyncio.get_running_loop().call_soon(work)

    def hold(self, _size: int) -> bool:
        """Take note that requests over the connection take so many bytes more, and tell whether
        they may.
        """
        return True

    def let_go(self, but: int = 0) -> None:
        """Take note that they take no more than so many bytes any longer."""

    def end(self, connection: Any, end: Callable[[], object]) -> None:
        """Let the connection end, now or later."""
        end()

    def leave(self) -> None:
        """Take note that nothing is done any more for the connection."""


def admit_all(peer: str) -> Guest | None:
    """Let everybody in."""
    return Guest()


class Acceptor:
    """Accepts the connections that come to a port, until it is stopped.

    `admit` is told the address of who comes, and answers what `guest` of the connection's protocol
    is to be; None where they are to be hung up on.

    Some descriptors are kept back: for connections to the database, for files. Where no others are
    left, or the kernel refuses for another reason, who comes waits in the port's queue until it is
    well again. That is logged once, and so is its end.
    """

    def __init__(
        self, listener: Listener, make_protocol: Callable[[], Any],
        admit: Callable[[str], Guest | None] = admit_all,
    ) -> None:
        self._listener = listener
        self._make_protocol = make_protocol
        self._admit = admit
        self._loop = asyncio.get_running_loop()
        self._opening = Tasks()
        self._resting: asyncio.TimerHandle | None = None
        self._refusal = ""  # why none was accepted lately
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    def stop(self) -> None:
        """Accept no more, and hang up on who waits."""
        self._rest()
        self._listener.close()

    def _resume(self) -> None:
        self._resting = None
        self._loop.add_reader(self._listener, self._accept)
        self._accept()  # where nobody waits any longer, nothing else would tell

    def _rest(self) -> None:
        if self._resting is not None:
            self._resting.cancel()
        self._loop.remove_reader(self._listener)

    def _accept(self) -> None:
        """Accept who waits, some at a time, so that the others have their turn."""
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                require_descriptors(self._listener)
                connection, peer = self._listener.accept()
            except BlockingIOError:  # nobody waits
                if self._refusal:
                    self._refusal = ""
                    log.warning("connections are accepted again")
                return
            except ConnectionAbortedError:  # by who came
                continue
            except OSError as error:
                if not self._refusal:
                    self._refusal = os.strerror(error.errno or 0)
                    log.warning("no connection is accepted (%s)", self._refusal)
                self._rest()
                self._resting = self._loop.call_later(ACCEPT_REST_SECONDS, self._resume)
                return
            guest = self._admit(peer[0])
            if guest is None:
                connection.close()
                continue
            connection.setblocking(False)
            self._opening.spawn(self._open(connection, guest))

    async def _open(self, connection: socket.socket, guest: Guest) -> None:
        def make_protocol() -> Any:
            protocol = self._make_protocol()
            protocol.guest = guest
            return protocol

        try:
            await self._loop.connect_accepted_socket(make_protocol, connection)
        except OSError:  # it has gone
            guest.leave()


def require_descriptors(file: socket.socket) -> None:
    """Insist on free descriptors beside those kept back. Raises OSError."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(file.fileno())  # of those that are free
    os.close(lowest)
    if 0 <= limit - DESCRIPTORS_SPARE <= lowest:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


# ---- Process 1


def be_init() -> None:
    """Where we are process 1, of a container, return in a child and be its init here.

    An init hands the signals on that end the server, takes the end of every process that lost its
    parent (nobody else would, and it would stay a zombie), and ends as the server does.
    """
    if os.getpid() != 1:
        return
    heard = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
    signal.pthread_sigmask(signal.SIG_BLOCK, heard)  # so that they wait for sigwait
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)
        os.setpgid(0, 0)  # Ctrl-C reaches process 1 alone, and us once
        return
    while True:
        number = signal.sigwait(heard)
        if number != signal.SIGCHLD:
            os.kill(child, number)
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG):
            if ended.si_pid == child:
                sys.exit(ended.si_status + (0 if ended.si_code == os.CLD_EXITED else 128))


# ---- Signals


def end_on_signals() -> None:
    """Let SIGTERM and SIGINT cancel the task that asks."""
    loop = asyncio.get_running_loop()
    task = cast("asyncio.Task[None]", asyncio.current_task())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)


# ---- Children


def has_parent() -> bool:
    """Tell whether a process of ours started this one as a child."""
    return PARENT in os.environ


def die_with_parent() -> None:
    """Let a child end with its parent, however that ends: the kernel sends SIGKILL."""
    if has_parent():
        die_with(int(os.environ[PARENT]))


def die_with(parent: int) -> None:
    """Let this process end with its parent, however that ends: the kernel sends SIGKILL."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before
        sys.exit(1)


async def keep_running(
    command: list[str], environment: Mapping[str, str], note_end: Callable[[int], None]
) -> None:
    """Run a program, and again whenever it has ended: then `note_end` is called with its pid.

    When cancelled, end it by SIGTERM.
    """
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
        note_end(child.pid)
        await asyncio.sleep(CHILD_PAUSE_SECONDS)


async def _end_within(child: asyncio.subprocess.Process, seconds: float) -> None:
    """Wait for the end of a process, and kill it where it takes too long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await child.wait()
    if child.returncode is None:
        child.kill()
        await child.wait()


# ---- Tasks


class Tasks:
    """Tasks that end with the application."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def cancel(self) -> None:
        """Cancel those that run, and wait for their end."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


# ---- Requests, as logs name them

REQUEST_ID = web.RequestKey("request_id", str)
FIT_FOR_A_LOG = re.compile("[A-Za-z0-9._-]{1,64}")


def request_id(request: web.BaseRequest) -> str:
    """Tell the id of a request: its client's own, if that is fit for a log, else one made here."""
    known = request.get(REQUEST_ID)
    if known is None:
        given = request.headers.get(REQUEST_ID_HEADER, "")
        known = given if FIT_FOR_A_LOG.fullmatch(given) else secrets.token_hex(8)
        request[REQUEST_ID] = known
    return known


async def show_request_id(request: web.BaseRequest, answer: web.StreamResponse) -> None:
    """Put the id of a request into its answer. aiohttp calls this before each goes out."""
    answer.headers[REQUEST_ID_HEADER] = request_id(request)


def called(request: web.Request) -> str:
    """Name what a request calls by its route alone, like `GET /users/{user_id}`."""
    resource = request.match_info.route.resource
    return f"{request.method} {resource.canonical}" if resource is not None else "- -"


# ---- Logs


class NamelessFormatter(logging.Formatter):
    """Tells of an exception by its kind and place alone: its text may hold what somebody sent.

    So may whatever a library logs: of that only the place is told.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Format a record of ours; of a library's, where in it that was written."""
        if record.name.partition(".")[0] != "messenger":
            record = copy.copy(record)
            record.msg, record.args = "%s:%d", (record.name, record.lineno)
        return super().format(record)

    def formatException(self, ei: Any) -> str:
        """Format where an exception came from, without what it says."""
        return "".join([*traceback.format_tb(ei[2]), ei[0].__name__])


def escape_unwritable(stream: TextIO) -> None:
    """Let a stream write as escapes what its encoding cannot, such as a folder's name."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


class JsonFormatter(NamelessFormatter):
    """Writes each record as one line of JSON: `time` (ISO 8601), `level`, `logger`, `message`."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; the message ends with where its exception came from, if any."""
        written = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname, "logger": record.name, "message": super().format(record)}
        return json.dumps(written)


def start_logs(access_log: bool, as_json: bool) -> None:
    """Log to stderr what happens to the server, what is wrong and, if wanted, every call."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter() if as_json
        else NamelessFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("messenger").setLevel(logging.INFO)
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)  # it tells of what strangers send
    logging.getLogger("messenger.access").setLevel(logging.INFO if access_log else logging.ERROR)


def log_access(address_of: Callable[[web.Request], str]) -> Any:
    """Make the middleware that logs a call once it is answered, a websocket once it has ended.

    A line has the address, the route, the status, the seconds that it took, and the request's id.
    """
    log = logging.getLogger("messenger.access")

    @web.middleware
    async def write(request: web.Request, handler: Handler) -> web.StreamResponse:
        began, status = time.monotonic(), "-"
        try:
            answer = await handler(request)
            status = str(answer.status)
            return answer
        finally:
            if log.isEnabledFor(logging.INFO):
                seconds, id_ = time.monotonic() - began, request_id(request)
                log.info(
                    "%s %s %s %.3f s %s",
                    address_of(request), called(request), status, seconds, id_)

    return write
