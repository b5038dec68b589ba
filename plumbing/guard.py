"""Who may ask, from where, how often: addresses, connections, rates, what is believed, passwords,
signed tokens, browsers.

Nothing here knows what is asked for.
"""

import asyncio
import base64
import contextlib
import functools
import hashlib
import ipaddress
import itertools
import logging
import os
import re
import secrets
import sys
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

import bcrypt
import jwt
from aiohttp import web, web_protocol, web_response, web_server
from aiohttp.http_exceptions import BadHttpMessage, HttpProcessingError
from aiohttp.http_parser import HttpRequestParser
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import _ErrInfo
from yarl import URL

from plumbing.deadline import uncounted
from plumbing.files import is_there, write_private
from plumbing.process import (
    REQUEST_ID_HEADER,
    Guest,
    Handler,
    StartError,
    drop_frames,
    half_of_descriptors,
    nothing,
)
from plumbing.queues import Queues
from plumbing.text import composed

HEAD_END = b"\r\n\r\n"
HEAD_BYTES_MAX = 16 * 1024  # of all headers of a request
SEPARATORS_BYTES = 512  # beside them
AHEAD_BYTES_MAX = 32 * 1024  # of requests that come before the one in front of them is answered
FIELD_BYTES = 300  # that a header takes beside its own, once it is parsed
HELD_BYTES_MAX = 32 * 1024 * 1024  # of requests of an address that are not answered yet
HELD_OF_ONE_MAX = 512 * 1024  # of one connection: more of them is not kept
READS_A_ROUND = 10  # of all connections of an address in a round of the loop, and of their ends
HEAD_SECONDS = 30  # from a connection, or the first byte of a request, to the end of its headers
BUFFER_BYTES = 65_536  # of a body in memory, twice; in a turn it parses a 16th as many chunks
STALLED_SECONDS = 30  # in which a client takes not a byte of what waits to be sent
FORWARDED_CHARS_MAX = 2000  # the last of what proxies say: that is where ours stand
KEYS_MIN = 10_000  # that a limit remembers before it looks for those which it can forget
MOMENT_SECONDS = 0.001  # for which work may keep the loop without a rest
LONG_SECONDS = 0.2  # of a turn; who had one leaves one to others ...
LONG_FACTOR = 20  # ... for so many times as long ...
LONG_KEPT_SECONDS = 10  # ... but no longer than so
CHUNKS_AHEAD_MAX = 64  # of a body, that were parsed and are not read yet
REST_SECONDS = 0.1  # for which a call keeps its slot after ...
RESTING = (401, 426, 429)  # ... these refusals, which cost who floods nothing
REFUSALS_TOLD_SECONDS = 60  # from one line of the log about refused connections to the next
ROUNDING_SECONDS = 1e-6  # above the rounding error of summed times
PASSWORD_THREADS = 2
PASSWORD_QUEUE_MAX = 128  # hashes that wait or are under way, until addresses must share them
PASSWORD_QUEUE_OF_ONE_MAX = 32  # of them from one address
PASSWORD_CHARS_MAX = 1000  # of one that is looked into: a longer one is nobody's
PASSWORD_NICENESS = 10  # the event loop goes before the threads
FACTS_MAX = 10_000  # believed at once
ENDS_KEPT_SECONDS = 60  # at least: longer than anybody asks about a fact
TOKENS_REMEMBERED_MAX = 10_000
TOKEN_CHARS_MAX = 2000
SECRET_BYTES_MIN = 32
ORIGINS_REMEMBERED_MAX = 1000
ORIGIN_CHARS_MAX = 300  # a name in DNS has 253
HEADERS_ASKED_MAX = 32  # which a page may ask to send beside the usual ones
PREFLIGHT_SECONDS = 600  # for which a browser remembers what it was allowed

MAPPED_PREFIX = 96  # bits before the IPv4 address in ::ffff:192.0.2.60

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")
Thing = TypeVar("Thing", bound=Hashable)
PROXIES = web.AppKey("proxies", list[Network])
ADDRESS = web.RequestKey("address", str)  # that it comes from, once it was asked for
# What a request calls once its answer was taken: it holds a slot until then.
GIVE_BACK: web.RequestKey[Callable[[], None]] = web.RequestKey("give_back")
log = logging.getLogger("messenger.guard")

# ---- Addresses


def read_networks(text: str) -> list[Network]:
    """Read addresses and networks that are separated by commas. Raises StartError."""
    try:
        return [read_network(each.strip()) for each in text.split(",") if each.strip()]
    except ValueError as error:
        raise StartError(f"TRUSTED_PROXIES={text!r}: {error}") from None


def read_network(text: str) -> Network:
    """Read an address or a network; one of IPv4 in IPv6's spelling is one of IPv4, as addresses
    are (read_address). Raises ValueError.
    """
    network = ipaddress.ip_network(text)
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped is None or network.prefixlen < MAPPED_PREFIX:
        return network
    return ipaddress.ip_network((mapped, network.prefixlen - MAPPED_PREFIX))


def read_address(node: str) -> Address | None:
    """Read an address as proxies write it, maybe with a port; None for what is none.

    Like `192.0.2.60`, `192.0.2.60:4711`, `2001:db8::17` or `[2001:db8::17]:4711` (RFC 7239). The
    zone of an address (`%eth0`), which may be any text, is left out.
    """
    match = re.fullmatch(r"\[([^\]]+)\](?::\d+)?|([\d.]+):\d+|(.+)", node.strip())
    try:
        address = ipaddress.ip_address(
            match[match.lastindex or 0].partition("%")[0] if match else "")
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


def is_trusted(address: Address, trusted: list[Network]) -> bool:
    """Tell whether an address is one of a trusted proxy."""
    return any(address in network for network in trusted)


def nearest_stranger(peer: Address, way: Iterable[str], trusted: list[Network]) -> Address:
    """Follow a request's way back for as long as trusted proxies tell of it.

    `way` is what the proxies wrote, the last one's word first. What a client wrote itself stands
    behind the word of the first trusted proxy, and is never reached, nor looked into.
    """
    for node in way:
        told = read_address(node)
        if told is None or not is_trusted(peer, trusted):
            break
        peer = told
    return peer


def address_of(request: web.Request) -> str:
    """Tell whose request it is to the proxies that its application trusts (client_address); this is
    found out once for each request.
    """
    if ADDRESS not in request:
        request[ADDRESS] = client_address(request, request.app[PROXIES])
    return request[ADDRESS]


def client_address(request: web.Request, trusted: list[Network]) -> str:
    """Tell whose request it is: the peer's, or whom trusted proxies name.

    They name them in X-Forwarded-For or in Forwarded (RFC 7239). A proxy adds to one of the two and
    lets the other pass, so where they differ, neither is believed.
    """
    peer = read_address(request.remote or "")
    if peer is None:
        return ""  # a Unix socket
    if not is_trusted(peer, trusted):
        return party_of(peer)
    listed, elements = (
        ",".join(request.headers.getall(name, ()))[-FORWARDED_CHARS_MAX:].split(",")[::-1]
        for name in ("X-Forwarded-For", "Forwarded"))
    told = {
        nearest_stranger(peer, way, trusted)
        for way, header in ((listed, listed), (map(named_by, elements), elements)) if any(header)}
    return party_of(told.pop() if len(told) == 1 else peer)


def party_of(address: Address) -> str:
    """Name whom an address stands for: one of IPv6 for its network, which is one client's."""
    return str(ipaddress.ip_network((address, 64), strict=False) if address.version == 6
               else address)


# ---- Connections


class HeadParser(HttpRequestParser):
    """Parses requests like aiohttp's own, but a head only once it is whole, and refuses one with
    more than HEAD_BYTES_MAX: aiohttp takes 128 fields of 8 KB each, which stay for as long as the
    connection is a websocket.

    Behind a request that waits for the answer of another (RFC 9112, section 9.3.2) nothing is
    parsed: short fields take thirty times as much memory once they are. AHEAD_BYTES_MAX may come.
    A request whose body comes in chunks is the last of its connection: aiohttp parses on behind
    them.
    """

    __slots__ = ("_behind", "_body", "_has_paused", "_is_over", "_left", "_waiting", "fields")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._behind = b""  # what is not parsed yet
        self._body: Any = EMPTY_PAYLOAD  # of the last request ...
        self._left = 0  # ... and how many bytes of it are to come
        self._has_paused = False  # aiohttp, at the end of a request: it only tells when it goes on
        self._is_over = False  # for good: what comes from now on is dropped
        self._waiting = 0  # requests that were parsed and wait
        self.fields = 0  # that were parsed, of all headers

    def message_consumed(self) -> None:
        """Take note that one of the requests that wait is being answered."""
        super().message_consumed()
        if self._waiting:  # else it is a refusal
            self._waiting -= 1

    def count_ahead(self) -> int:
        """Tell how many bytes came that are not parsed yet."""
        return len(self._behind)

    def feed_data(self, data: bytes) -> tuple[Any, bool, bytes]:  # type: ignore[override]
        """Parse bytes; answer the requests whose heads are whole, and whether another protocol
        comes behind them, with its bytes. Raises HttpProcessingError.
        """
        if self._is_over:
            return [], False, b""
        data, self._behind = self._behind + data, b""
        with contextlib.suppress(HttpProcessingError):
            return self._feed_pieces(data)
        self._is_over = True
        raise BadHttpMessage("malformed")  # in place of one whose text quotes much of what came

    def _feed_pieces(self, data: bytes) -> tuple[Any, bool, bytes]:
        """Parse bytes piece by piece: a whole head, or what has come of a body."""
        found: list[Any] = []
        while True:
            is_body = not self._body.is_eof()
            if self._waiting and not is_body:
                break
            if not (is_body or self._has_paused):
                data = data.lstrip(b"\r\n")  # RFC 9112, section 2.2
            size = 0 if self._has_paused else self._size_of_piece(data)
            if not (size or is_body or self._has_paused):
                break
            requests, is_other, tail = super().feed_data(data[:size])
            self._left -= size if is_body else 0
            data = data[size:]
            found += [self._begin(*request) for request in requests]
            self._has_paused = bool(requests or is_body) and self._body.is_eof()
            if is_other:
                return found, True, tail + data
            if is_body and not self._body.is_eof():
                break
            if is_body and self._left:  # it came in chunks
                self._is_over, data = True, b""
                break
        if len(data) > AHEAD_BYTES_MAX and self._body.is_eof():  # else nothing more is read
            raise BadHttpMessage("too much came ahead")
        self._behind = data
        return found, False, b""

    def _size_of_piece(self, data: bytes) -> int:
        return size_of_head(data) if self._body.is_eof() else min(self._left, len(data))

    def _begin(self, head: Any, body: Any) -> tuple[Any, Any]:
        """Take note of a request. Raises BadHttpMessage."""
        if size_of_fields(head) > HEAD_BYTES_MAX:
            raise BadHttpMessage("the head is too long")
        self.fields += len(head.raw_headers)
        self._waiting += 1
        self._body = body
        length = head.headers.get("Content-Length", "").lstrip("0")
        self._left = sys.maxsize if head.chunked else int(length or 0)
        if not head.chunked:
            return head, body
        # By itself it has thousands parsed ahead, each of which takes a hundred bytes.
        body._high_water_chunks, body._low_water_chunks = CHUNKS_AHEAD_MAX, CHUNKS_AHEAD_MAX // 2
        return as_last(head), body


def size_of_head(data: bytes) -> int:
    """Tell how many of some bytes are the head of a request; none where it is not whole yet.

    Raises BadHttpMessage where it is too long or cannot be one: who speaks TLS, or ends lines by LF
    alone, would else wait for long.
    """
    end = data.find(HEAD_END)
    if end >= 0:
        return end + len(HEAD_END)
    if len(data) - data.find(b"\n") > HEAD_BYTES_MAX + SEPARATORS_BYTES:
        raise BadHttpMessage("the head is too long")
    if data and not (data[:1].isalpha() and data.count(b"\n") == data.count(b"\r\n")):
        raise BadHttpMessage("this is no head")
    return 0


def size_of_fields(head: Any) -> int:
    """Tell how many bytes the names and values of a request's headers have."""
    return sum(map(len, itertools.chain(*head.raw_headers)))


def as_last(head: Any) -> Any:
    """Have the connection closed after a request, whatever its answer."""
    return head._replace(should_close=True)


class PromptConnection(web.RequestHandler):
    """A connection that is closed unless the headers of a request are whole within HEAD_SECONDS,
    and bytes of an answer that waits to be sent are taken every STALLED_SECONDS.

    Bodies come as they were sent, compressed or not: aiohttp unfolds without bound what it drops.
    One of many small chunks is not parsed in a single round of the loop.

    A request after which another protocol would be spoken (`CONNECT`, `Upgrade`) is the last of its
    connection, whatever its answer: aiohttp takes the body of a CONNECT for the next request, which
    behind a proxy would be answered to somebody else (RFC 9112, section 11.2).

    aiohttp has one timer for a connection that awaits a request, and what comes of the headers does
    not stop it. It is set to the time that an idle connection is kept, and brought forward here.
    """

    __slots__ = (
        "_dropped", "_is_idle", "_progress", "_rests", "_resumes", "give_up", "guest")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(
            *args, **options | {"auto_decompress": False, "read_bufsize": BUFFER_BYTES})
        self.guest = Guest()  # whose it is
        self.give_up: Callable[[], object] = nothing  # called when it is lost (unless_gone)
        self._is_idle = True  # no request came that is not answered yet
        self._dropped: Any = EMPTY_PAYLOAD  # the body of the last that was, where more of it comes
        self._progress: asyncio.TimerHandle | None = None  # when the next is due
        self._resumes = False  # whether reading is to go on soon
        self._rests = False  # whether it is not read until its turn comes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin: a first request has to come at all."""
        super().connection_made(transport)
        # An answer is sent once the system took all of it.
        cast("asyncio.Transport", transport).set_write_buffer_limits(0)
        self.guest.begin(self)
        self._await_head()

    def connection_lost(self, _exc: BaseException | None) -> None:
        """End: where very many do, in a turn of its own."""
        self.guest.end(self, self._end)

    def _end(self) -> None:
        """End: another may come instead, once nothing is done any more for this one. Whatever waits
        to write more just ends: an error would keep the frames that await it, and the answer.
        """
        working = self._task_handler
        super().connection_lost(None)
        self._dropped.feed_eof()  # else aiohttp awaits it for long
        self._dropped = EMPTY_PAYLOAD  # it has hold of its connection
        if self._waiter is None:  # else the only one is taken in a moment
            self._messages.clear()  # the body of each has hold of its connection
        self.give_up()
        self._expect_nothing()
        self._resumes = False
        if working is None or working.done():
            self.guest.leave()
        else:
            working.add_done_callback(lambda _: self.guest.leave())

    def pause_writing(self) -> None:
        """Expect progress: more is to be sent than the system takes."""
        super().pause_writing()
        if self._current_request is None:  # else it is a websocket, which looks after itself
            self._expect_progress(self.transport, sys.maxsize)

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Go on with what has come of a body, but not in this turn: whoever empties the stream of
        a body would go on until all that has come is parsed.
        """
        if self._upgraded or not resume_parser:
            self._resumes = False
            super().resume_reading(resume_parser)
        elif not self._resumes:
            self._resumes = True
            self.guest.go_on(self._resume)

    def _resume(self) -> None:
        if self._resumes:  # else it is not to any more
            self._resumes = False
            super().resume_reading()
            self._go_on_reading()

    def _go_on_reading(self) -> None:
        """Read again, unless there is a reason not to; that a request waits is none."""
        if not self._reading_paused and not (self._buffer_paused and self._upgraded):
            self._resume_transport_reading()

    def _pause_reading_for_buffer(self) -> None:
        """Have what comes behind a request parsed once that is begun. Until then it is read, and
        bounded by HeadParser; behind a request for another protocol BUFFER_BYTES are read.
        """
        if self._upgraded:
            super()._pause_reading_for_buffer()
        else:
            self._buffer_paused = True

    def _resume_transport_reading(self) -> None:
        """Read again, unless it rests."""
        if not self._rests:
            super()._resume_transport_reading()

    def _expect_progress(self, transport: asyncio.Transport | None, unsent_before: int) -> None:
        """Cut the connection unless some of what was unsent has been taken; look again later, until
        nothing is unsent.
        """
        self._expect_nothing()
        if transport is None:
            return
        unsent = transport.get_write_buffer_size()
        if unsent >= unsent_before:
            transport.abort()
        elif unsent:
            self._progress = self._loop.call_later(
                STALLED_SECONDS, self._expect_progress, transport, unsent)

    def _expect_nothing(self) -> None:
        if self._progress is not None:
            self._progress.cancel()
            self._progress = None

    async def _handle_request(
        self, request: web.BaseRequest, *others: Any
    ) -> tuple[web.StreamResponse, bool]:
        """Answer a request; it gives its slot back once the answer was taken.

        After some refusals it does so later: else a flood of them would take all our time.
        """
        message, rests = request._message, False
        if request.method == "CONNECT" or message.upgrade:
            request._message = as_last(message)
        try:
            answer, reset = await super()._handle_request(request, *others)
            rests = answer.status in RESTING
            if isinstance(answer, web.Response):
                answer._body = None  # aiohttp keeps the answer until the next request
            return answer, reset
        finally:
            self._is_idle = not self._messages
            if self.transport is not None and not request._payload.is_eof():
                self._dropped = request._payload  # aiohttp reads on for a while
            else:
                self.guest.let_go(self._count_ahead())
            give_back = request.get(GIVE_BACK, nothing)
            if rests:
                self._loop.call_later(REST_SECONDS, give_back)
            else:
                give_back()

    def _count_ahead(self) -> int:
        """Tell how many bytes are held for requests that come behind the one under way."""
        if self._parser is None:
            return 0
        sizes = [
            size_of_fields(head) + FIELD_BYTES * len(head.raw_headers) + body.total_bytes
            for head, body in self._messages if not isinstance(head, _ErrInfo)]
        return cast("HeadParser", self._parser).count_ahead() + sum(sizes)

    def set_parser(self, *args: Any, **options: Any) -> None:
        """Go on as a websocket, whose frames count by themselves."""
        early = len(self._message_tail)
        super().set_parser(*args, **options)
        self.guest.hold(-early)

    async def finish_response(
        self, request: web.BaseRequest, *others: Any
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer. What came behind a request for another protocol is not parsed where the
        answer refuses it: it is the last of its connection.
        """
        if self._payload_parser is None:
            self._message_tail = b""
        return await super().finish_response(request, *others)

    def data_received(self, data: bytes) -> None:
        """Take bytes; where they end no request that is awaited, they begin one, or go on with it.
        """
        if data:  # else what came before is to be parsed
            self.guest.note_read(self)
        parser = cast("HeadParser | None", self._parser)
        if parser is None:  # the connection was lost before this was parsed
            return
        fields = parser.fields
        if self._payload_parser is None and not self.guest.hold(len(data)):
            self._cut()
            return
        super().data_received(data)
        if parser.fields > fields and not self.guest.hold(FIELD_BYTES * (parser.fields - fields)):
            self._cut()
        self._is_idle &= not self._messages
        if self._is_idle and self._dropped.is_eof():
            self._dropped = EMPTY_PAYLOAD
            self.guest.let_go(parser.count_ahead())
        if self._messages and isinstance(self._messages[-1][0], _ErrInfo):
            drop_frames(self._messages[-1][0].exc)  # else all that came stays until it is answered
        if self._waiter is not None and not self._waiter.done():
            self._await_head()

    def _cut(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def rest(self) -> bool:
        """Read nothing more, until `read_on`; False where it rests already."""
        is_new = not self._rests
        if is_new:
            self._rests = True
            self._pause_transport_reading()
        return is_new

    def read_on(self) -> None:
        """Read again, unless there is another reason not to."""
        self._rests = False
        self._go_on_reading()

    def _await_head(self) -> None:
        """Bring the timer forward; of several times the first one stays."""
        close_at = self._loop.time() + HEAD_SECONDS
        if self._keepalive_handle is not None and close_at < self._next_keepalive_close_time:
            self._keepalive_handle.cancel()
            self._keepalive_handle = self._loop.call_at(close_at, self._process_keepalive)
            self._next_keepalive_close_time = close_at


async def unless_gone(
    request: web.BaseRequest | None, wait: Callable[..., Awaitable[Result]], *args: Any
) -> Result:
    """Await what may be given up at any moment: where the client of a call that only reads hangs up
    before it or meanwhile, the handler is cancelled. Else clients who come and go would leave
    thousands of calls waiting. A call that changes something goes on without its client.

    Raises asyncio.CancelledError.
    """
    task = asyncio.current_task()
    if request is None or request.method not in ("GET", "HEAD") or task is None:
        return await wait(*args)
    connection = cast("PromptConnection", request.protocol)
    if connection.transport is None:
        raise asyncio.CancelledError
    connection.give_up = task.cancel
    try:
        return await wait(*args)
    finally:
        connection.give_up = nothing


# What aiohttp makes of each connection, and what it tells of itself in each answer: no versions.
web_protocol.HttpRequestParser = HeadParser  # type: ignore[attr-defined]
web_protocol.MAX_MSG_QUEUE_SIZE = 1  # requests that are parsed and wait
web_server.RequestHandler = PromptConnection  # type: ignore[attr-defined]
web_response.SERVER_SOFTWARE = "messenger"  # type: ignore[attr-defined]


# ---- Counts


class Tally(Counter[Hashable]):
    """Counts by key, which is forgotten once nothing is left."""

    def drop(self, key: Hashable, count: int = 1) -> None:
        """Count so many less."""
        self[key] -= count
        if not self[key]:
            del self[key]


class Sets(dict[Key, set[Thing]]):
    """Sets by key, which is forgotten once nothing is left."""

    def put(self, key: Key, thing: Thing) -> None:
        """Put a thing into the set of a key."""
        self.setdefault(key, set()).add(thing)

    def drop(self, key: Key, thing: Thing) -> None:
        """Take a thing from the set of a key, if it is there."""
        things: set[Thing] = self.get(key, set())
        things.discard(thing)
        if not things:
            self.pop(key, None)


class Marks:
    """How far each key has come, of those that are ahead of a floor; it rises, and a key that it
    has reached may be forgotten.
    """

    def __init__(self) -> None:
        self._of: dict[Hashable, float] = {}
        self._keys_max = KEYS_MIN

    def of(self, key: Hashable, floor: float) -> float:
        """Tell how far a key has come, at least to the floor."""
        return max(floor, self.last_of(key, floor))

    def last_of(self, key: Hashable, otherwise: float) -> float:
        """Tell how far a key has come, though the floor may have passed it; or that is forgotten.
        """
        return self._of.get(key, otherwise)

    def put(self, key: Hashable, mark: float, floor: float) -> None:
        """Take note of how far a key has come."""
        self._of[key] = mark
        if len(self._of) > self._keys_max:
            self._of = {each: far for each, far in self._of.items() if far > floor}
            self._keys_max = max(KEYS_MIN, 2 * len(self._of))


# ---- Rates


class Rate:
    """So many at once, then so many a second, of each key by itself.

    Of a key only the moment is kept at which its whole allowance is there again (the generic cell
    rate algorithm, ITU-T I.371).
    """

    def __init__(self, burst: int, per_second: float) -> None:
        self._step = 1 / per_second
        self._most = (burst - 1) * self._step  # how far ahead of now that moment may be
        self._full_at = Marks()

    def charge(self, key: Hashable, weight: float = 1) -> float:
        """Count one more, or something of more weight, and answer 0; or do not, and answer in how
        many seconds one more would be allowed.
        """
        now = time.monotonic()
        full_at = self._full_at.of(key, now)
        if full_at - now > self._most + ROUNDING_SECONDS:
            return full_at - now - self._most
        self._full_at.put(key, full_at + weight * self._step, now)
        return 0.0


class Rounds:
    """Lets connections be read, and end, only so often in a round of the event loop: READS_A_ROUND
    of each address. What ends beyond that waits. What is read beyond that has all connections of
    the address rest, also those over which nothing has come: the system is not even asked. They go
    on in turns, of all addresses one in each round, or up to READS_A_ROUND where nothing was read
    in the one before; so does what is put off. Else what comes over thousands of connections in the
    same moment, or the ends of all of them, would be all that the loop finds to do.
    """

    def __init__(self) -> None:
        self._open: Sets[str, PromptConnection] = Sets()  # by address
        self._done: Counter[str] = Counter()  # in this round, by address: reads and ends
        self._waiting: Queues[Callable[[], object]] = Queues()  # by address
        self._resting: set[str] = set()  # addresses, since this round
        self._is_due = False  # whether another round begins soon

    def begin(self, party: str, connection: PromptConnection) -> None:
        """Take note of a connection from an address."""
        self._open.put(party, connection)

    def note_read(self, party: str, connection: PromptConnection) -> None:
        """Take note that a connection from an address was read."""
        if self._may_go_on(party):
            return
        is_first = party not in self._resting  # else the others rest already
        self._resting.add(party)
        for each in self._open[party] if is_first else (connection,):
            if each.rest():
                self._waiting.append(party, each.read_on)

    def put_off(self, party: str, work: Callable[[], object]) -> None:
        """Do something for an address in a round to come."""
        self._waiting.append(party, work)
        self._look_again()

    def end(self, party: str, connection: PromptConnection, end: Callable[[], object]) -> None:
        """Let a connection from an address end, now or later."""
        self._open.drop(party, connection)
        if self._may_go_on(party):
            end()
        else:
            self._waiting.append(party, end)

    def _may_go_on(self, party: str) -> bool:
        """Count one thing done for an address, and tell whether more may be in this round."""
        self._done[party] += 1
        self._look_again()
        return self._done[party] < READS_A_ROUND

    def _look_again(self) -> None:
        """Begin another round soon."""
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._begin_round)

    def _begin_round(self) -> None:
        # Where those before had nothing to be read, to let others be read takes no time.
        count = 1 if self._done else READS_A_ROUND
        self._is_due = False
        self._done.clear()
        self._resting.clear()
        if self._waiting:
            self._look_again()
        for _ in range(count):
            if following := self._waiting.take():
                following[1]()


class CountedGuest(Guest):
    """A guest from an address whose connections are counted, and what their requests take."""

    __slots__ = ("_held", "_held_by", "_open", "_party", "_rounds")

    def __init__(
        self, party: str, opened: Tally, rounds: Rounds, held_by: Tally
    ) -> None:
        self._party, self._open, self._rounds = party, opened, rounds
        self._held_by = held_by  # bytes by address
        self._held = 0
        opened[party] += 1

    def begin(self, connection: PromptConnection) -> None:
        """Take note of the connection."""
        self._rounds.begin(self._party, connection)

    def note_read(self, connection: PromptConnection) -> None:
        """Take note that the connection was read."""
        self._rounds.note_read(self._party, connection)

    def go_on(self, work: Callable[[], object]) -> None:
        """Have something done for the connection in another round of the event loop."""
        self._rounds.put_off(self._party, work)

    def hold(self, size: int) -> bool:
        """Take note that requests over the connection take so many bytes more, and tell whether
        they may. What is dropped, of a body that is too large, counts no further than so.
        """
        size = min(size, HELD_OF_ONE_MAX - self._held)
        self._held += size
        self._held_by[self._party] += size
        return self._held_by[self._party] <= HELD_BYTES_MAX

    def let_go(self, but: int = 0) -> None:
        """Take note that they take no more than so many bytes any longer."""
        self._held_by.drop(self._party, self._held - but)
        self._held = but

    def end(self, connection: PromptConnection, end: Callable[[], object]) -> None:
        """Let the connection end, now or later."""
        self._rounds.end(self._party, connection, end)

    def leave(self) -> None:
        """Take note that nothing is done any more for the connection."""
        self.let_go()
        self._open.drop(self._party)


class Connections:
    """Counts the open connections of each address, and lets in only so many (0: any number), which
    take half of the descriptors at most. Bounded are, too, how often they are read and end (Rounds)
    and what their requests take (CountedGuest).

    Those of trusted proxies are not counted: they are everybody's.
    """

    def __init__(self, at_most: int, trusted: list[Network]) -> None:
        self._at_most = min(at_most, half_of_descriptors())
        self._trusted = trusted
        self._open = Tally()
        self._rounds = Rounds()
        self._held_by = Tally()
        self._told = Rate(1, 1 / REFUSALS_TOLD_SECONDS)

    def admit(self, peer: str) -> Guest | None:
        """Let somebody in who comes from an address; None where they may not come in."""
        address = read_address(peer) if self._at_most else None
        if address is None or is_trusted(address, self._trusted):
            return Guest()
        party = party_of(address)
        if self._open[party] >= self._at_most:
            if not self._told.charge(""):
                log.warning(
                    "%d connections are open from one address: no more of it are accepted",
                    self._at_most)
            return None
        return CountedGuest(party, self._open, self._rounds, self._held_by)


# ---- Turns


class Busy(Exception):
    """More is waiting than may wait."""


class Turns:
    """Lets so many work at once, and of each key at most so many; the keys of those who wait take
    turns, one of them each time.
    """

    def __init__(self, at_once: int, of_each: int | None = None) -> None:
        self._free = at_once
        self._of_each = of_each or at_once
        self._working = Tally()  # by key
        self._waiting: Queues[asyncio.Future[None]] = Queues()  # by key

    def take_now(self, key: Hashable) -> bool:
        """Take a turn if there is one right now, and tell whether it did."""
        if is_free := self._free > 0 and self._may_begin(key):
            self._begin(key)
        return is_free

    async def take(self, key: Hashable) -> bool:
        """Wait for a turn, which `give_back` ends; tell whether there was a wait: then the caller
        goes on in another round of the loop.
        """
        if self.take_now(key):
            return False
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(key, turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled() and turn.exception() is None:  # it was given a moment ago
                self.give_back(key)
            raise
        return True

    def _may_begin(self, key: Hashable) -> bool:
        return self._working[key] < self._of_each

    def _begin(self, key: Hashable) -> None:
        self._free -= 1
        self._working[key] += 1

    def give_back(self, key: Hashable) -> None:
        """End a turn of a key: the next is let in."""
        self._free += 1
        self._working.drop(key)
        while self._free and (following := self._next()):
            waiting, turn = following
            if not turn.cancelled():
                self._begin(waiting)
                turn.set_result(None)

    def _next(self) -> tuple[Hashable, asyncio.Future[None]] | None:
        """Take whose turn it is of those who wait."""
        return self._waiting.take(self._may_begin)

    async def come(self, key: Hashable) -> None:
        """Wait for a turn that lasts for a round of the loop: of all who come, one goes on in each.
        """
        await self.call(key, nothing)

    def refuse(self, key: Hashable, error: Exception) -> None:
        """Refuse the turns of all of a key that wait: `take` raises such an error."""
        for turn in self._waiting.drop(key):
            if not turn.cancelled():
                turn.set_exception(type(error)(str(error)))

    async def run(
        self, key: Hashable, work: Callable[..., Awaitable[Result]], *args: Any
    ) -> Result:
        """Do some work in a turn, and in a round of the loop of its own: others come in between,
        even where nothing of it awaits anything.
        """
        has_waited = await self.take(key)
        try:
            if not has_waited:
                await asyncio.sleep(0)
            return await work(*args)
        finally:
            self.give_back(key)

    async def call(self, key: Hashable, work: Callable[..., Result], *args: Any) -> Result:
        """Do what `run` does, with work that awaits nothing; where it took more than a moment the
        loop is left to others for as long before the turn ends.
        """
        async def answer() -> Result:
            began = time.monotonic()
            result = work(*args)
            rest = time.monotonic() - began - MOMENT_SECONDS
            if rest > 0:
                await asyncio.sleep(rest)
            return result

        return await self.run(key, answer)


class FairTurns(Turns):
    """Turns that may take long: of those who wait the key goes next whose turns took the least time
    together, so a key with short ones waits for few long ones. Each counts as having used at least
    what a key has that always wants a turn, so who comes anew, or was away, does not go before the
    others for long (fair queueing: A. Demers, S. Keshav, S. Shenker, 1989; by start times as of
    P. Goyal, H. Vin, H. Cheng, 1996). Of those that used no more than that, the one whose turn was
    longest ago goes first: who comes now and then waits only for what is under way.

    Keys that had a long turn leave one for the others for some time, which is short where the turn
    was hardly long: on a busy machine anybody's may be.
    """

    def __init__(self, at_once: int, of_each: int | None = None) -> None:
        super().__init__(at_once, of_each)
        self._long_at_most = max(1, at_once - 1)
        self._working_long = 0
        # By key: when each of its turns began, what the key had used by then, and is it long.
        self._began: dict[Hashable, deque[tuple[float, float, bool]]] = {}
        self._used = Marks()  # seconds
        self._least_used = 0.0
        self._long_until = Marks()

    def _is_long(self, key: Hashable) -> bool:
        now = time.monotonic()
        return self._long_until.of(key, now) > now

    def _may_begin(self, key: Hashable) -> bool:
        may_be_long = self._working_long < self._long_at_most
        return super()._may_begin(key) and (may_be_long or not self._is_long(key))

    def _begin(self, key: Hashable) -> None:
        super()._begin(key)
        self._least_used = self._used.of(key, self._least_used)
        is_long = self._is_long(key)
        self._working_long += is_long
        self._began.setdefault(key, deque()).append(
            (time.monotonic(), self._least_used, is_long))

    def give_back(self, key: Hashable) -> None:
        """End a turn of a key, its first: the next is let in."""
        turns = self._began[key]
        began, used, was_long = turns.popleft()
        if not turns:
            del self._began[key]
        now = time.monotonic()
        self._least_used += (now - began) / len(self._waiting.keys() | {key, *self._began})
        self._working_long -= was_long
        if now - began > LONG_SECONDS:
            until = self._long_until.of(key, now) + LONG_FACTOR * (now - began)
            self._long_until.put(key, min(until, now + LONG_KEPT_SECONDS), now)
        self._used.put(key, self._used.of(key, used) + now - began, self._least_used)
        super().give_back(key)

    def _next(self) -> tuple[Hashable, asyncio.Future[None]] | None:
        return self._waiting.take(self._may_begin, self._used_last)

    def _used_last(self, key: Hashable) -> float:
        return self._used.last_of(key, self._least_used)


class Slots:
    """Lets each key have so many things under way at once (0: any number); who comes beyond waits,
    the first first.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        # An entry lives as long as somebody has or awaits a slot.
        self._of: WeakValueDictionary[Hashable, Turns] = WeakValueDictionary()

    def take_now(self, key: Hashable) -> Callable[[], None] | None:
        """Take a slot if there is one right now; answer what is to be called at its end, or None.
        """
        if not self._at_once:
            return nothing
        turns = self._of.setdefault(key, Turns(self._at_once))
        return functools.partial(turns.give_back, key) if turns.take_now(key) else None

    async def take(self, key: Hashable) -> Callable[[], None]:
        """Wait for a slot, and answer what is to be called at its end."""
        if give_back := self.take_now(key):
            return give_back
        turns = self._of[key]  # whoever has the others keeps it
        await turns.take(key)
        return functools.partial(turns.give_back, key)

    async def run(
        self, key: Hashable, work: Callable[..., Awaitable[Result]], *args: Any
    ) -> Result:
        """Do some work in a slot, and in a round of the loop of its own (Turns.run)."""
        if not self._at_once:
            return await work(*args)
        return await self._of.setdefault(key, Turns(self._at_once)).run(key, work, *args)


# ---- What is believed


class Trusted:
    """Facts that are believed for a while without asking again, each by its key.

    What ended while it was asked about is not: the answer may be older than its end.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._facts: dict[Hashable, tuple[object, float]] = {}  # until when (monotonic)
        self._ended: dict[Hashable, float] = {}  # when it ended

    def holds(self, key: Hashable, fact: object) -> bool:
        """Tell whether this fact is believed of a key right now."""
        known, until = self._facts.get(key, (None, 0.0))
        return known == fact and until >= time.monotonic()

    def put(self, key: Hashable, fact: object, asked_at: float) -> bool:
        """Believe a fact, from when it was asked for; False where the key ended meanwhile."""
        if self._ended.get(key, 0) > asked_at:
            return False
        if len(self._facts) > FACTS_MAX:
            self._facts.clear()
        self._facts[key] = fact, asked_at + self._seconds
        return True

    def forget(self) -> None:
        """Believe nothing."""
        self._facts.clear()

    def end(self, keys: Iterable[Hashable]) -> None:
        """Believe nothing of these keys, nor what is being asked about them right now."""
        now = time.monotonic()
        if len(self._ended) > FACTS_MAX:
            kept = now - ENDS_KEPT_SECONDS
            self._ended = {key: at for key, at in self._ended.items() if at > kept}
        for key in keys:
            self._facts.pop(key, None)
            self._ended[key] = now


# ---- Passwords


def _let_others_go_first() -> None:
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.nice(PASSWORD_NICENESS)


class Passwords:
    """Hashes and verifies passwords, a bounded number at a time, of each address in turn.

    By bcrypt over a SHA-2 digest: bcrypt itself stops at 72 bytes and at NUL. Of the composed form
    (NFC): keyboards differ in how they write an accent.
    """

    def __init__(self, cost: int) -> None:
        self.cost = cost
        self._waiting = 0
        self._waiting_of = Tally()  # by address
        self._turns = Turns(PASSWORD_THREADS)
        # The tries of an address are counted one after the other: each waits for the one before,
        # and would hold a connection to the database meanwhile.
        self.counting = Slots(1)
        self.spelling = Turns(1)  # of emails in other letters, each of which takes milliseconds
        self._threads = ThreadPoolExecutor(
            PASSWORD_THREADS, "bcrypt", initializer=_let_others_go_first)
        # Verified against for an unknown email, so that it takes as long as a known one.
        self.nobodys = f"$2b${cost:02d}${'.' * 53}"

    async def hash(self, password: str, address: str = "") -> str:
        """Hash a password for storing. Raises Busy."""
        digest = self._digest(composed(password))
        hashed = await self._run(address, bcrypt.hashpw, digest, bcrypt.gensalt(self.cost))
        return hashed.decode()

    async def matching(self, password: str, hashed: str, address: str) -> str | None:
        """Answer in which form a password was hashed; None if it is another. Raises Busy.

        Once passwords were hashed as they were sent: that is tried too, where it differs.
        """
        is_short = len(password) <= PASSWORD_CHARS_MAX
        for form in dict.fromkeys((composed(password) if is_short else password, password)):
            if await self._run(address, bcrypt.checkpw, self._digest(form), hashed.encode()):
                return form
        return None

    async def renewed(self, form: str, hashed: str, address: str) -> str | None:
        """Hash a password anew where its hash was made of another form than now, or when hashes
        cost less; else answer None. Raises Busy.
        """
        is_outdated = form != composed(form) or int(hashed.split("$")[2]) < self.cost
        return await self.hash(form, address) if is_outdated else None

    @staticmethod
    def _digest(password: str) -> bytes:
        return base64.b64encode(hashlib.sha256(password.encode()).digest())

    def check_queue(self, address: str) -> None:
        """Raise Busy if so many wait already of an address. Where many wait in all, that is its
        share of those; where twice as many do, none.
        """
        at_most = PASSWORD_QUEUE_OF_ONE_MAX
        if self._waiting >= 2 * PASSWORD_QUEUE_MAX:
            at_most = 0
        elif self._waiting >= PASSWORD_QUEUE_MAX:
            addresses = len(self._waiting_of) + (address not in self._waiting_of)
            at_most = min(at_most, max(1, PASSWORD_QUEUE_MAX // addresses))
        if self._waiting_of[address] >= at_most:
            raise Busy("Too many passwords are being checked.")

    async def _run(self, address: str, function: Callable[..., Result], *args: bytes) -> Result:
        self.check_queue(address)
        self._waiting += 1
        self._waiting_of[address] += 1
        try:
            with uncounted():  # the length of the queue bounds it
                await self._turns.take(address)
                job = asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
                job.add_done_callback(lambda _: self._turns.give_back(address))
                return await job
        finally:
            self._waiting -= 1
            self._waiting_of.drop(address)

    def close(self) -> None:
        """End the threads; what still waits is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)


# ---- Signed tokens


def token_of(request: web.Request, subprotocol: str | None) -> str:
    """Find the token of a request in Authorization (RFC 6750), and of a handshake, which may offer
    the subprotocol, also where browsers can put one: behind that, or in the query. Empty where
    there is none.
    """
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return token.strip()
    if subprotocol is None:
        return ""
    offered = request.headers.get("Sec-WebSocket-Protocol", "").split(",")
    protocols = [protocol.strip() for protocol in offered]
    if protocols[0] == subprotocol and len(protocols) == 2:
        return protocols[1]
    return request.query.get("token", "")


@functools.lru_cache(TOKENS_REMEMBERED_MAX)  # it takes as long as a small answer
def signed_claims(token: str, key: str, *required: str) -> dict[str, Any]:
    """Answer the claims of a token (JWT, RFC 7519) signed with a key, expired or not.

    Raises jwt.InvalidTokenError, ValueError.
    """
    if len(token) > TOKEN_CHARS_MAX:
        raise ValueError("too long for a token")
    claims: dict[str, Any] = jwt.decode(token, key, ["HS256"], {
        "require": list(required),
        "verify_exp": False,  # by whoever asks
        "verify_iat": False,  # PostgreSQL's clock may be ahead of ours
    })
    return claims


class Signer:
    """Makes tokens with a key, and believes those made with it or with an old one."""

    def __init__(self, key: str, old_key: str = "") -> None:
        self._key = key
        self._believed = [each for each in (key, old_key) if each]

    def sign(self, since: float, seconds: int, **claims: Any) -> str:
        """Make a token of claims that is good from a time on (since the epoch), for so long."""
        claims |= {"iat": int(since), "exp": int(since) + seconds}
        return jwt.encode(claims, self._key, algorithm="HS256")

    def read(self, token: str, kind: str, leeway: float, *required: str) -> dict[str, Any] | None:
        """Read a token's claims; None unless it is ours, of this kind (`typ`) and did not expire
        over so many seconds ago. It has those required, `typ`, `iat` and `exp`.
        """
        for key in self._believed:
            with contextlib.suppress(jwt.InvalidTokenError, ValueError):
                claims = signed_claims(token, key, "typ", "iat", "exp", *required)
                is_expired = claims["exp"] + leeway <= time.time()
                return claims if claims["typ"] == kind and not is_expired else None
        return None


class SessionTokens:
    """The tokens of sessions: to each generation belong an access and a refresh token."""

    def __init__(
        self, key: str, old_key: str, access_seconds: int, refresh_seconds: int
    ) -> None:
        self._signer = Signer(key, old_key)
        self._access_seconds = access_seconds
        self._refresh_seconds = refresh_seconds

    def pair(self, user_id: int, session: Mapping[str, Any]) -> tuple[str, str, int]:
        """Make the tokens of a session's generation; its refresh token is always the same.

        `session` has `id`, `generation`, `rotated_at` and `secret`. Answers the access token, the
        refresh token, and for how many seconds the former is good.
        """
        generation = session["generation"]
        own = {
            "sub": str(user_id), "sid": session["id"], "key": session["secret"],
            "gen": generation}
        access = self._signer.sign(
            time.time(), self._access_seconds, typ="access", jti=secrets.token_hex(8), **own)
        refresh = self._signer.sign(
            int(session["rotated_at"].timestamp()), self._refresh_seconds, typ="refresh",
            jti=str(generation), **own)
        return access, refresh, self._access_seconds

    def read(self, token: str, kind: str, leeway: float) -> dict[str, Any] | None:
        """Read a token's claims; None unless it is ours, of this kind, and did not expire over so
        many seconds ago.

        Nor may an access token be of the future, when some clock was ahead; a refresh token may:
        the time of its session is set right.
        """
        claims = self._signer.read(token, kind, leeway, "sub", "sid", "jti")
        if claims is None or kind == "refresh" or not is_early(claims, self._access_seconds):
            return claims
        return None


def is_early(claims: Mapping[str, Any], seconds: float) -> bool:
    """Tell whether a token says that it was signed over so many seconds from now: some clock was
    ahead.
    """
    return bool(claims["iat"] > time.time() + seconds)


def check_secret(name: str, secret: str) -> None:
    """Insist that a secret is long enough where there is one. Raises StartError."""
    if 0 < len(secret.encode()) < SECRET_BYTES_MIN:
        raise StartError(f"{name} must have at least {SECRET_BYTES_MIN} bytes")


def kept_secret(path: Path) -> str:
    """Read a secret from its file; the first time, make the secret and write the file.

    Raises StartError.
    """
    if not is_there(path):
        write_private(path, secrets.token_urlsafe(SECRET_BYTES_MIN + 16))
    try:
        secret = path.read_text("utf-8").strip()
    except OSError as error:
        raise StartError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise StartError(f"{path} must hold text in UTF-8") from None
    if len(secret.encode()) < SECRET_BYTES_MIN:
        raise StartError(f"{path} must hold at least {SECRET_BYTES_MIN} bytes")
    return secret


# ---- Browsers

SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store"}
EXPOSED_HEADERS = f"Link, Location, Retry-After, WWW-Authenticate, {REQUEST_ID_HEADER}"
HEADER_NAME = re.compile(r"[!#$%&'*+.^`|~\w-]{1,64}", re.ASCII)  # a token (RFC 9110, 5.6.2)
DEFAULT_PORTS = {"http": 80, "https": 443}
PAGELESS = ("file:", "ftp:", "ws:", "wss:")  # no page has such an origin (URL standard)


@functools.lru_cache(ORIGINS_REMEMBERED_MAX)
def read_origin(text: str) -> str | None:
    """Read an origin, like `https://app.example.com` or `capacitor://localhost`, into the one form
    that all its spellings share; None for what is none.

    Scheme and host are in small letters, the host in ASCII (IDNA); a scheme's own port is left out.
    """
    is_short = len(text) <= ORIGIN_CHARS_MAX  # first: to encode a long name takes quadratic time
    if not is_short or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/?#@\\]+", text):
        return None
    try:
        url = URL(text)
        host, port = url.host_subcomponent or "", url.port
    except ValueError:
        return None
    if not re.fullmatch(r"[\w.-]+|\[[\da-f:.]+\]", host, re.ASCII):
        return None
    is_usual = port in (None, DEFAULT_PORTS.get(url.scheme))
    return f"{url.scheme}://{host}" if is_usual else f"{url.scheme}://{host}:{port}"


def read_origins(text: str) -> frozenset[str]:
    """Read the origins of sites and apps, separated by commas; a `/` at the end does not count.

    Raises StartError.
    """
    origins = set()
    for each in filter(None, map(str.strip, text.split(","))):
        origin = read_origin(each.removesuffix("/"))
        if origin is None or origin.startswith(PAGELESS):
            shown = each.rpartition("@")[2]  # without a password, which would be wrong, too
            raise StartError(
                f"CORS_ORIGINS={shown!r} must be like https://app.example.com, without a path")
        origins.add(origin)
    return frozenset(origins)


def sent_origin(text: str) -> str | None:
    """Read an origin that somebody sent: in ASCII, as browsers do, for others take long to encode.
    """
    return read_origin(text) if text.isascii() else None


def is_foreign(request: web.Request, origins: frozenset[str]) -> bool:
    """Tell whether a page of a site that is neither ours nor allowed sent this.

    Ours is the host that was asked (`Host`), by http or https: a proxy in front may speak TLS.
    """
    sent = request.headers.get("Origin")
    if not sent:
        return False
    origin, host = sent_origin(sent), request.headers.get("Host", "")
    ours = [sent_origin(f"{scheme}://{host}") for scheme in DEFAULT_PORTS]
    return origin is None or origin not in (*ours, *origins)


def preflight_headers(asked: str) -> dict[str, str]:
    """Answer what an allowed page may send: any method, and whatever headers it asks for.

    Names of headers are no secret and give no power: there are no cookies.
    """
    named = [name for each in asked.split(",") if HEADER_NAME.fullmatch(name := each.strip())]
    allowed = dict.fromkeys(["Authorization", "Content-Type", *named[:HEADERS_ASKED_MAX]])
    return {
        "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, PATCH, DELETE",
        "Access-Control-Allow-Headers": ", ".join(allowed),
        "Access-Control-Max-Age": str(PREFLIGHT_SECONDS)}


def guard_browsers(origins: frozenset[str]) -> Any:
    """Make the middleware for browsers: pages of these origins may read the answers (CORS, the
    Fetch standard), none is kept in a cache unless its handler says so, none is taken for a page.
    """
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        is_allowed = sent_origin(request.headers.get("Origin", "")) in origins
        is_asking = "Access-Control-Request-Method" in request.headers
        if is_allowed and request.method == "OPTIONS" and is_asking:
            asked = request.headers.get("Access-Control-Request-Headers", "")
            answer: web.StreamResponse = web.Response(
                status=204, headers=preflight_headers(asked))
        else:
            answer = await handler(request)
        if answer.prepared:
            return answer  # a websocket
        for name, value in SAFE_HEADERS.items():
            answer.headers.setdefault(name, value)
        if origins:
            answer.headers["Vary"] = "Origin"
        if is_allowed:
            answer.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
            answer.headers["Access-Control-Expose-Headers"] = EXPOSED_HEADERS
        return answer

    return guard


@functools.cache
def page_headers(page: Path) -> Mapping[str, str]:
    """Let a page run the script and the style within it, and nothing else (CSP 3)."""
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'")
    for tag, text in re.findall(r"(?s)<(script|style)>(.*?)</\1>", page.read_text("utf-8")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        policy += f"; {tag}-src 'sha256-{digest}'"
    return {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
