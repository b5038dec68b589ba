"""The edge: what stands between the network and the handlers.

It knows nothing of messages. The rooms of this file:

    Ports           listen on one, alone or together with other workers
    Addresses       who is at the other end, also behind proxies
    Rates           so many at once, then so many a second
    Passwords       hashed in threads of their own, so that nobody else waits for them
    Browsers        which sites' pages may use the server, and what its own pages may do
    Frames          of websockets, as they go over the wire
    Logs            without anything that was sent
"""

import asyncio
import base64
import contextlib
import copy
import functools
import hashlib
import ipaddress
import logging
import os
import re
import resource
import socket
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import bcrypt
from aiohttp import http_parser, web

from postgres import StartError

BACKLOG = 4096  # connections that wait to be accepted: as many as Linux lets wait by default
KEYS_MIN = 10_000  # that a limit remembers before it looks for those which it can forget
ROUNDING_SECONDS = 1e-6  # more than sums of times are off
PASSWORD_THREADS = 2
PASSWORD_QUEUE_MAX = 64  # hashes waiting for a thread
PASSWORD_NICENESS = 10  # the event loop goes before the threads
PREFLIGHT_SECONDS = 600  # for which a browser remembers what it was allowed

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Answer = TypeVar("Answer")

# ---------------------------------------------------------------------------------------- Ports


def require_parser() -> None:
    """Insist on aiohttp's HTTP parser in C: the one in Python let requests be smuggled.

    Raises StartError.
    """
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise StartError("aiohttp was installed without its HTTP parser in C, which is needed")


def listen_on(host: str, port: int, shared: bool = False) -> socket.socket:
    """Listen before anything else is started; workers share their port. Raises StartError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG, reuse_port=shared)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StartError(f"cannot listen on HOST {host}, PORT {port}: {reason}") from None


def raise_descriptor_limit() -> None:
    """Let this process have as many descriptors as it may: each connection takes one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # "unlimited", where the kernel has a limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def until_listening(host: str, port: int) -> None:
    """Return once somebody listens on a port."""
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host, port)
            return writer.close()
        await asyncio.sleep(0.05)


def hold_port(host: str, port: int) -> socket.socket:
    """Take a port for workers to listen on, without listening. Raises StartError."""
    with listen_on(host, port) as free:  # nobody else does, whom sharing would let in unseen
        held = socket.socket(free.family, socket.SOCK_STREAM)
        address = free.getsockname()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(address)
    return held


# ------------------------------------------------------------------------------------- Addresses


def read_networks(text: str) -> list[Network]:
    """Read addresses and networks that are separated by commas. Raises StartError."""
    try:
        return [ipaddress.ip_network(each.strip()) for each in text.split(",") if each.strip()]
    except ValueError as error:
        raise StartError(f"TRUSTED_PROXIES={text!r}: {error}") from None


def read_address(node: str) -> Address | None:
    """Read an address as proxies write it, maybe with a port; None for what is none.

    Like `192.0.2.60`, `192.0.2.60:4711`, `2001:db8::17` or `[2001:db8::17]:4711` (RFC 7239).
    """
    match = re.fullmatch(r"\[([^\]]+)\](?::\d+)?|([\d.]+):\d+|(.+)", node.strip())
    try:
        address = ipaddress.ip_address(match[match.lastindex or 0] if match else "")
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def named_by(element: str) -> str:
    """Tell whom an element of Forwarded names (RFC 7239, section 4); nobody unless all of it is
    right: what a client left open, or had put into quotes, must not pass for a proxy's word.
    """
    pairs = [
        re.fullmatch(r'\s*([\w-]+)=(?:"([^"\\]*)"|([^\s"\\]*))\s*', pair)
        for pair in element.split(";")]
    named = {pair[1].lower(): pair[2] or pair[3] for pair in pairs if pair}
    return named.get("for", "") if all(pairs) else ""


def nearest_stranger(peer: Address, way: Sequence[str], trusted: list[Network]) -> Address:
    """Follow a request's way back for as long as trusted proxies tell of it.

    `way` is what the proxies wrote, the last one's word last. What a client wrote itself stands
    before the word of the first trusted proxy, and is never reached.
    """
    for node in reversed(way):
        told = read_address(node)
        if told is None or not any(peer in network for network in trusted):
            break
        peer = told
    return peer


def client_address(request: web.Request, trusted: list[Network]) -> str:
    """Tell whose request it is: the peer's, or whom trusted proxies name.

    They name them in X-Forwarded-For or in Forwarded (RFC 7239). A proxy adds to one of the two and
    lets the other pass, so where they differ, neither is believed. A client that has an IPv6
    address has a whole network of them: the network stands for it.
    """
    peer = read_address(request.remote or "")
    if peer is None:
        return ""  # a Unix socket
    listed = ",".join(request.headers.getall("X-Forwarded-For", ())).split(",")
    elements = ",".join(request.headers.getall("Forwarded", ())).split(",")
    named = [named_by(element) for element in elements]
    told = {
        nearest_stranger(peer, way, trusted)
        for way, header in ((listed, listed), (named, elements)) if any(header)}
    address = told.pop() if len(told) == 1 else peer
    return str(ipaddress.ip_network((address, 64), strict=False) if address.version == 6
               else address)


# ----------------------------------------------------------------------------------------- Rates


class Rate:
    """So many at once, then so many a second, of each key by itself.

    Of a key only the moment is kept at which its whole allowance is there again (the generic cell
    rate algorithm, ITU-T I.371); once that has passed, the key may be forgotten.
    """

    def __init__(self, burst: int, per_second: float) -> None:
        self._step = 1 / per_second
        self._most = (burst - 1) * self._step  # how far ahead of now that moment may be
        self._full_at: dict[Hashable, float] = {}
        self._keys_max = KEYS_MIN

    def spend(self, key: Hashable) -> float:
        """Count one more; answer 0, or after how many seconds it is allowed: then it is not."""
        now = time.monotonic()
        full_at = max(now, self._full_at.get(key, now))
        if full_at - now > self._most + ROUNDING_SECONDS:
            return full_at - now - self._most
        self._full_at[key] = full_at + self._step
        if len(self._full_at) > self._keys_max:
            self._full_at = {each: at for each, at in self._full_at.items() if at > now}
            self._keys_max = max(KEYS_MIN, 2 * len(self._full_at))
        return 0.0


# ------------------------------------------------------------------------------------- Passwords


def _let_others_go_first() -> None:
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.nice(PASSWORD_NICENESS)


class Passwords:
    """Hashes and verifies passwords, a bounded number at a time.

    By bcrypt over a SHA-2 digest: bcrypt itself stops at 72 bytes and at NUL.
    """

    def __init__(self, cost: int, unavailable: type[Exception]) -> None:
        self.cost = cost
        self._unavailable = unavailable
        self._waiting = 0
        self._threads = ThreadPoolExecutor(
            PASSWORD_THREADS, "bcrypt", initializer=_let_others_go_first)
        # Verified against for an unknown address, so that it takes as long as a known one.
        self.nobodys = f"$2b${cost:02d}${'.' * 53}"

    async def hash(self, password: str) -> str:
        """Hash a password for storing. Raises the exception for being too busy."""
        hashed = await self._run(bcrypt.hashpw, self._digest(password), bcrypt.gensalt(self.cost))
        return hashed.decode()

    async def matches(self, password: str, hashed: str) -> bool:
        """Tell whether a password is the one that was hashed; raises what `hash` does."""
        return await self._run(bcrypt.checkpw, self._digest(password), hashed.encode())

    def is_cheap(self, hashed: str) -> bool:
        """Tell whether a hash was made when hashes cost less."""
        return int(hashed.split("$")[2]) < self.cost

    @staticmethod
    def _digest(password: str) -> bytes:
        return base64.b64encode(hashlib.sha256(password.encode()).digest())

    def check_room(self) -> None:
        """Raise the exception for being too busy, if so many wait already."""
        if self._waiting >= PASSWORD_QUEUE_MAX:
            raise self._unavailable("Too many passwords are being checked.")

    async def _run(self, function: Callable[..., Answer], *args: bytes) -> Answer:
        self.check_room()
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """End the threads; what still waits is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)


# -------------------------------------------------------------------------------------- Browsers

SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store"}
PREFLIGHT_HEADERS = {
    "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, PATCH, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type",
    "Access-Control-Max-Age": str(PREFLIGHT_SECONDS)}


def read_origins(text: str) -> frozenset[str]:
    """Read the origins of sites, separated by commas. Raises StartError."""
    origins = frozenset(each.strip().lower() for each in text.split(",") if each.strip())
    for origin in origins:
        if not re.fullmatch(r"https?://[^/\s]+", origin):
            raise StartError(f"CORS_ORIGINS={text!r}: {origin} is not like https://app.example.com")
    return origins


def is_foreign(request: web.Request, origins: frozenset[str]) -> bool:
    """Tell whether a page of a site sent this that is neither ours nor one of those allowed."""
    origin = request.headers.get("Origin", "").lower()
    host = request.host.lower()
    return origin not in ("", f"http://{host}", f"https://{host}", *origins)


def guard_browsers(origins: frozenset[str]) -> Any:
    """Make the middleware for browsers: pages of these origins may read the answers (CORS, the
    Fetch standard), none is kept in a cache unless its handler says so, none is taken for a page.
    """
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        origin = request.headers.get("Origin", "").lower()
        is_asking = "Access-Control-Request-Method" in request.headers
        if origin in origins and request.method == "OPTIONS" and is_asking:
            answer: web.StreamResponse = web.Response(status=204, headers=PREFLIGHT_HEADERS)
        else:
            answer = await handler(request)
        if answer.prepared:
            return answer  # a websocket
        for name, value in SAFE_HEADERS.items():
            answer.headers.setdefault(name, value)
        if origins:
            answer.headers["Vary"] = "Origin"
        if origin in origins:
            answer.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
            answer.headers["Access-Control-Expose-Headers"] = "Link, Location, Retry-After"
        return answer

    return guard


@functools.cache
def page_headers(page: Path) -> Mapping[str, str]:
    """Let a page run the script and the style within it, and nothing else (CSP 3)."""
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'")
    for tag, text in re.findall(r"(?s)<(script|style)>(.*?)</\1>", page.read_text()):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        policy += f"; {tag}-src 'sha256-{digest}'"
    return {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}


# ---------------------------------------------------------------------------------------- Frames


def text_frame(payload: bytes) -> bytes:
    """Frame a text for a websocket: final and unmasked (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < 126:
        return bytes((0x81, size)) + payload
    if size < 65_536:
        return b"\x81\x7e" + size.to_bytes(2, "big") + payload
    return b"\x81\x7f" + size.to_bytes(8, "big") + payload


# ------------------------------------------------------------------------------------------ Logs


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


def start_logs(access_log: bool) -> None:
    """Log to stderr, what is wrong and, if wanted, every call."""
    handler = logging.StreamHandler()
    handler.setFormatter(NamelessFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)  # it tells of what strangers send
    logging.getLogger("messenger.access").setLevel(logging.INFO if access_log else logging.ERROR)


def log_access(address_of: Callable[[web.Request], str]) -> Any:
    """Make the middleware that logs a call once it is answered, a websocket once it has ended.

    What follows the `?` in a URL is left out: there may be a token in it.
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
                path, seconds = request.rel_url.raw_path, time.monotonic() - began
                log.info(
                    "%s %s %s %s %.3f s",
                    address_of(request), request.method, path, status, seconds)

    return write
