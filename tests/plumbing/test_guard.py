"""The guard by itself: rates, addresses behind proxies, origins; what browsers may do."""

import asyncio
import functools
import ipaddress
import itertools
import json
import os
import re
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import bcrypt
import msgspec
import pytest
from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.test_utils import TestClient, make_mocked_request
from multidict import CIMultiDict

import messenger
from plumbing import guard
from plumbing.guard import (
    PromptConnection,
    Rate,
    Signer,
    Trusted,
    client_address,
    is_early,
    read_address,
    read_networks,
    read_origin,
    read_origins,
    token_of,
)
from plumbing.process import DESCRIPTORS_SPARE, StartError
from support.people import HEAR_SECONDS, PASSWORD, SOON_SECONDS, Line, Person, login
from support.raw import HANDSHAKE, RawConnection, handshake
from support.servers import SECRET_KEY, SETTINGS

Client = TestClient[Any, Any]
PROXIES = read_networks("10.0.0.0/8, 127.0.0.1, 2001:db8:ffff::/48")
ALLOWED, FOREIGN = "https://app.example.com", "https://evil.example"


# ---- Connections


def fields(count: int) -> bytes:
    """Write so many header fields of a thousand bytes each."""
    return b"".join(b"X-%d: %s\r\n" % (number, b"a" * 990) for number in range(count))


@pytest.mark.parametrize("opening", [
    b"GET /api/v1/users/me HTTP/1.1\r\nHost: x\r\n", handshake(0, "/ws", "x")])
async def test_headers_that_are_too_large_together_are_refused(
    anyone: Client, opening: bytes
) -> None:
    """A request may have many fields, but not more than HEAD_BYTES_MAX of them in all; it is
    refused once so much has come, not only when it is whole. So is a handshake."""
    opening = opening.rstrip() + b"\r\n"
    fitting = await RawConnection.opens(anyone.port, opening + fields(14) + b"\r\n")
    assert (await fitting.hears())[0] == 401
    fitting.close()
    for sent in (fields(18) + b"\r\n", fields(18)):
        large = await RawConnection.opens(anyone.port, opening + sent)
        status, _, body = await large.hears()
        assert (status, json.loads(body)["type"]) == (400, "malformed-request")
        assert await large.is_cut()
        large.close()


async def test_headers_behind_a_body_are_counted_by_themselves(anyone: Client) -> None:
    """A body counts for no headers, in one block with them or not; what follows it does."""
    large, small = [
        b"POST /api/v1/users/login HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
        % (size, b" " * size) for size in (60_000, 3_000)]
    get = b"GET /api/v1/users/me HTTP/1.1\r\nHost: x\r\n"
    caller = await RawConnection.opens(anyone.port, large + small + get + fields(12) + b"\r\n")
    assert [(await caller.hears())[0] for _ in range(3)] == [400, 400, 401]
    caller.writer.write(large + get + fields(50))
    assert (await caller.hears_all()).count(b" 400 Bad Request") >= 1
    caller.close()


async def test_many_requests_in_one_block_are_answered_in_order(anyone: Client) -> None:
    """Of requests that come without waiting for answers none is lost, nor counted as the head of
    another; the head behind them is."""
    asked = [b"GET /api/v1/%d HTTP/1.1\r\nHost: x\r\nX-Request-Id: n%d\r\n\r\n" % (n, n)
             for n in range(2_000)]
    caller = await RawConnection.opens(anyone.port, b"")
    for start in range(0, 2_000, 500):
        caller.writer.write(b"".join(asked[start : start + 500]))
        ids = [(await caller.hears())[1]["X-Request-Id"] for _ in range(500)]
        assert ids == [f"n{number}" for number in range(start, start + 500)]
    caller.writer.write(b"".join(asked[:100]) + asked[0].rstrip() + b"\r\n" + fields(40))
    assert (await caller.hears_all()).endswith(b"}\n")
    caller.close()


@pytest.mark.parametrize("request_bytes", [100, 1_000, 9_000])
@pytest.mark.parametrize("kind", ["fields", "body"])
async def test_requests_that_come_ahead_are_bounded_in_bytes(
    anyone: Client, kind: str, request_bytes: int
) -> None:
    """Behind a request that waits to be answered may come more, but not of any size: a connection
    over which too much comes is refused and closed, and nothing of it stays."""
    if kind == "fields":
        line = b"GET /api/v1/users/me HTTP/1.1\r\nHost: x\r\nX-A: %s\r\nX-B: %s\r\n\r\n"
        asked = line % (b"a" * (request_bytes // 2), b"b" * (request_bytes // 2))
    else:
        line = b"POST /api/v1/users/login HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
        asked = line % (request_bytes, b" " * request_bytes)
    fitting = 32_000 // len(asked)
    caller = await RawConnection.opens(anyone.port, asked * fitting)
    status = 401 if kind == "fields" else 400
    assert [(await caller.hears())[0] for _ in range(fitting)] == [status] * fitting
    caller.writer.write(asked * (200_000 // len(asked)))
    heard = await caller.hears_all()
    assert heard.count(b"HTTP/1.1 ") <= 1_000
    assert b"malformed-request" in heard.split(b"HTTP/1.1 ")[-1]
    caller.close()


async def test_nothing_is_parsed_behind_a_refusal() -> None:
    """A connection whose request was refused may stay until its earlier answers are read: what
    comes over it meanwhile is dropped, whole requests too."""
    get, loop = b"GET / HTTP/1.1\r\nHost: x\r\n", asyncio.get_running_loop()
    for refused in (get + fields(50), b"\x00\x01\r\n\r\n"):
        parser = guard.HeadParser(BaseProtocol(loop), loop, 65_536, max_msg_queue_size=1)
        assert len(parser.feed_data(get + b"\r\n")[0]) == 1
        parser.message_consumed()
        with pytest.raises(HttpProcessingError):
            parser.feed_data(refused)
        parser.message_consumed()
        for more in (get + b"\r\n", fields(50), b"\x00"):
            assert parser.feed_data(more) == ([], False, b"")


async def test_blank_lines_and_zeros_before_a_request_cost_nothing() -> None:
    """Blank lines before a request are passed over, however many come in one block, and zeros
    before its length."""
    loop = asyncio.get_running_loop()
    parser = guard.HeadParser(BaseProtocol(loop), loop, 65_536, max_msg_queue_size=1)
    began = time.process_time()
    assert parser.feed_data(b"\r\n\r\n" * 500_000)[0] == []
    assert time.process_time() - began < 5  # quadratic it took 20 s
    post = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %s2\r\n\r\n{}" % (b"0" * 5_000)
    [(_, body)], _, _ = parser.feed_data(b"\r\n" + post)
    assert body.is_eof()
    assert body.read_nowait() == b"{}"


async def test_requests_behind_one_that_waits_are_not_parsed() -> None:
    """Short fields take thirty times as much memory once they are parsed: of the requests that come
    without waiting for answers, one is parsed after the other has begun, also behind a body."""
    loop = asyncio.get_running_loop()
    parser = guard.HeadParser(BaseProtocol(loop), loop, 65_536, max_msg_queue_size=1)
    get = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a:\r\n" * 100 + b"\r\n"
    post = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
    methods = []
    for data in (get * 70 + post + b"{", b"}" + get * 70):
        found = parser.feed_data(data)[0]
        while found:
            [(head, _)] = found
            methods.append(head.method)
            parser.message_consumed()
            found = parser.feed_data(b"")[0]
    assert methods == ["GET"] * 70 + ["POST"] + ["GET"] * 70


async def test_connection_that_rests_is_not_read_by_another_way(
    anyone: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that has been read too often rests until its turn, also where its waiting
    requests have been answered meanwhile."""
    reads, resting = [], []
    data_received = PromptConnection.data_received

    def note(self: PromptConnection, data: bytes) -> None:
        if data:
            reads.append(self._rests)
        data_received(self, data)
        if len(reads) == 1 and self.rest():
            resting.append(self)

    monkeypatch.setattr(PromptConnection, "data_received", note)
    get = b"GET /api/v1/health/liveness HTTP/1.1\r\nHost: x\r\n\r\n"
    caller = await RawConnection.opens(anyone.port, get * 40)  # more than may wait
    assert [(await caller.hears())[0] for _ in range(40)] == [200] * 40
    caller.writer.write(get)
    await asyncio.sleep(0.2)
    assert reads == [False]
    resting[0].read_on()
    assert (await caller.hears())[0] == 200
    caller.close()


async def test_connection_is_read_after_a_rest_though_a_request_waits(
    anyone: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nobody would notice that its client has hung up."""
    connections: list[PromptConnection] = []
    connection_made = PromptConnection.connection_made

    def note(self: PromptConnection, transport: Any) -> None:
        connection_made(self, transport)
        connections.append(self)

    monkeypatch.setattr(PromptConnection, "connection_made", note)
    caller = await RawConnection.opens(anyone.port, b"GET / HTTP/1.1\r\n")
    async with asyncio.timeout(HEAR_SECONDS):
        while not connections:
            await asyncio.sleep(0.01)
    [connection] = connections
    transport = cast("asyncio.Transport", connection.transport)
    connection._pause_reading_for_buffer()  # as where a request waits
    assert transport.is_reading()
    assert connection.rest()
    assert not transport.is_reading()
    connection.read_on()
    assert transport.is_reading()
    caller.close()


@pytest.mark.parametrize("unsent_bytes", [20_000, 300_000])
async def test_answer_that_is_not_read_ends_its_connection(
    aiohttp_client: Callable[..., Awaitable[Client]], unsent_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However little of an answer is left that its client does not read, the connection is cut in
    a while; one whose client reads on is kept."""
    monkeypatch.setattr(guard, "STALLED_SECONDS", 0.5)
    connections: list[PromptConnection] = []
    connection_made = PromptConnection.connection_made

    def note(self: PromptConnection, transport: Any) -> None:
        connection_made(self, transport)
        connections.append(self)

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=bytes(int(request.query["size"])))

    monkeypatch.setattr(PromptConnection, "connection_made", note)
    app = web.Application()
    app.router.add_get("/", answer)
    port = (await aiohttp_client(app)).port or 0

    def asks(size: int) -> socket.socket:
        end = socket.socket()
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        end.connect(("127.0.0.1", port))
        end.sendall(b"GET /?size=%d HTTP/1.1\r\nHost: x\r\n\r\n" % size)
        return end

    async def unsent_of(number: int) -> int:
        while len(connections) <= number or connections[number].transport is None:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        return connections[number].transport.get_write_buffer_size()

    async with asyncio.timeout(HEAR_SECONDS):
        ends = [asks(20_000_000)]
        taken = 20_000_000 - await unsent_of(0)  # by the system
        ends.append(asks(taken + unsent_bytes))
        ends.append(asks(10))
        assert 0 < await unsent_of(1) < 2 * unsent_bytes
        while connections[0].transport is not None or connections[1].transport is not None:
            await asyncio.sleep(0.01)
    assert connections[2].transport is not None
    for end in ends:
        end.close()


async def test_body_of_many_chunks_is_parsed_in_many_turns(
    aiohttp_client: Callable[..., Awaitable[Client]],
) -> None:
    """While a body comes in chunks of one byte, others have their turn after a few of them, and few
    are parsed before they are read: each takes fifty times as much memory then."""
    chunks, turns, sent = 60_000, 0, threading.Event()

    async def take(request: web.Request) -> web.Response:
        nonlocal turns
        await asyncio.to_thread(sent.wait)
        assert request.content._http_chunk_splits is not None
        assert len(request.content._http_chunk_splits) < 2 * guard.CHUNKS_AHEAD_MAX

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        size = len(await request.read())
        counting.cancel()
        return web.Response(text=str(size))

    def send(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), SOON_SECONDS) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
                           + b"1\r\nx\r\n" * chunks + b"0\r\n\r\n")
            sent.set()
            return client.recv(65_536)

    app = web.Application()
    app.router.add_post("/", take)
    client = await aiohttp_client(app)
    assert str(chunks).encode() in await asyncio.to_thread(send, client.port)
    assert turns > 10


def test_connections_of_each_address_are_bounded() -> None:
    """An address may have so many connections, however it is spelt; each that ends makes room for
    one, and other addresses have their own. An IPv6 network is one address."""
    connections = guard.Connections(2, PROXIES)
    for spellings in (
        ("192.0.2.60", "::ffff:192.0.2.60"), ("192.0.2.61", "192.0.2.61"),
        ("2001:db8:1:2::3", "2001:db8:1:2:4::5"), ("fe80::1%eth0", "fe80::1%eth0"),
    ):
        guest, other = [connections.admit(each) for each in spellings]
        assert guest is not None
        assert other is not None
        assert [connections.admit(each) for each in spellings] == [None, None]
        guest.leave()
        assert connections.admit(spellings[1]) is not None
        assert connections.admit(spellings[0]) is None


@pytest.mark.parametrize("peer", ["10.1.2.3", "::ffff:127.0.0.1", "2001:db8:ffff::1", ""])
def test_connections_of_proxies_are_not_counted(peer: str) -> None:
    """A trusted proxy may have any number of connections, and so may who comes by a Unix socket."""
    connections = guard.Connections(1, PROXIES)
    assert None not in [connections.admit(peer) for _ in range(100)]


def test_connections_may_be_without_bound() -> None:
    """With a bound of 0 an address may have any number of connections."""
    connections = guard.Connections(0, [])
    assert None not in [connections.admit("192.0.2.60") for _ in range(100)]


def test_connections_of_an_address_leave_half_of_the_descriptors(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the bound is, one address does not take more than half of the descriptors."""
    for limit, most in ((DESCRIPTORS_SPARE + 20, 10), (2, 1)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        connections = guard.Connections(1000, [])
        let_in = [connections.admit("192.0.2.60") is not None for _ in range(30)]
        assert let_in == [True] * most + [False] * (30 - most)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, 0))
    assert guard.half_of_descriptors() > 1_000_000


# ---- Rates


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stop the clock of the limits, and move it by hand."""
    now = time.monotonic()

    def passes(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(guard.time, "monotonic", lambda: now)
    return passes


def test_rate_allows_a_burst_and_then_so_many_a_second(clock: Callable[[float], None]) -> None:
    """A rate allows its whole burst at first, then one more at each step, and never more than the
    burst."""
    rate = Rate(burst=3, per_second=2)
    assert [rate.charge("a") for _ in range(4)] == [0, 0, 0, pytest.approx(0.5)]
    clock(0.49)
    assert rate.charge("a") == pytest.approx(0.01)
    clock(0.02)
    assert rate.charge("a") == 0
    assert rate.charge("a") > 0
    clock(3600)
    assert [rate.charge("a") > 0 for _ in range(4)] == [False, False, False, True]


def test_rate_counts_nothing_for_who_is_refused(clock: Callable[[float], None]) -> None:
    """A refused call does not put off the next allowed one."""
    rate = Rate(burst=1, per_second=1)
    allowed = 0
    for _ in range(100):
        allowed += rate.charge("a") == 0
        clock(0.101)
    assert allowed == 10


def test_rate_of_one_at_once_allows_each_first() -> None:
    """With a burst of one the first call is allowed, whatever the clock shows."""
    for number in range(1000):
        assert Rate(burst=1, per_second=20).charge(number) == 0


def test_rate_keeps_keys_apart(clock: Callable[[float], None]) -> None:
    """What one key has spent another still has."""
    rate = Rate(burst=1, per_second=1)
    assert rate.charge("a") == 0
    assert rate.charge("a") > 0
    assert rate.charge("b") == 0


def test_rate_forgets_only_those_that_are_whole_again(clock: Callable[[float], None]) -> None:
    """However many keys come by, memory stays bounded, and a key that has spent everything is not
    forgotten."""
    rate = Rate(burst=1000, per_second=1)
    assert [rate.charge("due") for _ in range(1000)] == [0] * 1000
    for number in range(10 * guard.KEYS_MIN):
        rate.charge(number)
        clock(0.001)
    assert len(rate._full_at._of) <= 2 * guard.KEYS_MIN
    assert [rate.charge("due") == 0 for _ in range(102)].count(True) == 100  # one for each second


def test_rate_does_not_search_its_keys_at_every_call(clock: Callable[[float], None]) -> None:
    """While many keys are remembered at once, they are searched only a few times in all."""
    rate = Rate(burst=1, per_second=0.001)
    began = time.perf_counter()
    for number in range(10 * guard.KEYS_MIN):
        rate.charge(number)
    assert time.perf_counter() - began < 10  # some 0.2 s; a search at each call takes minutes
    assert rate.charge(0) > 0


# ---- Addresses


@pytest.mark.parametrize(
    ("node", "address"),
    [
        ("192.0.2.60", "192.0.2.60"),
        (" 192.0.2.60 ", "192.0.2.60"),
        ("192.0.2.60:4711", "192.0.2.60"),
        ("2001:db8::17", "2001:db8::17"),
        ("[2001:db8::17]", "2001:db8::17"),
        ("[2001:DB8::17]:4711", "2001:db8::17"),
        ("::ffff:192.0.2.60", "192.0.2.60"),
        ("[::ffff:192.0.2.60]:80", "192.0.2.60"),
        *((junk, None) for junk in (
            "", "unknown", "_hidden", "localhost", "1.2.3", "1.2.3.4.5", "256.1.1.1", "1.2.3.4:",
            "1.2.3.4:x", "[1.2.3.4", "[]:1", "[::1]x", "::1]:80", "01.2.3.4", "١.٢.٣.٤", "1" * 5000,
            "1.2.3.4\n5.6.7.8", "1.2.3.4/8", ":" * 5000, "['']", "0x7f.1",
        )),
        ("fe80::1%eth0", "fe80::1"), ("[fe80::1%any text]:80", "fe80::1"),
        ("fe80::%\udcff", "fe80::"),
    ],
)
def test_address_is_read_as_proxies_write_it(node: str, address: str | None) -> None:
    """An address is read with a port and without; text that is not an address is not read as
    one."""
    found = read_address(node)
    assert (None if found is None else str(found)) == address


def asked_by(peer: str, *headers: tuple[str, str]) -> str:
    """Whose request it is that comes from a peer with these headers."""
    request = make_mocked_request("GET", "/", headers=CIMultiDict(headers)).clone(remote=peer)
    return client_address(request, PROXIES)  # type: ignore[arg-type]


XFF, FORWARDED = "X-Forwarded-For", "Forwarded"
STRANGER, PROXY, CLIENT, OTHER = "198.51.100.7", "10.0.0.1", "203.0.113.9", "203.0.113.10"


def test_stranger_names_nobody() -> None:
    """No header of a peer that is not a trusted proxy is believed."""
    for headers in (
        [],
        [(XFF, CLIENT)],
        [(XFF, PROXY)],
        [(FORWARDED, f"for={CLIENT}")],
        [(XFF, CLIENT), (FORWARDED, f"for={CLIENT}")],
    ):
        assert asked_by(STRANGER, *headers) == STRANGER


def test_trusted_proxy_names_the_client() -> None:
    """The client is the one that the last trusted proxy on the way names, in either header."""
    for headers, client in (
        ([], PROXY),
        ([(XFF, CLIENT)], CLIENT),
        ([(XFF, f"{CLIENT}, 10.9.9.9")], CLIENT),
        ([(XFF, f"{CLIENT},10.9.9.9 , 10.1.1.1")], CLIENT),
        ([(XFF, CLIENT), (XFF, "10.9.9.9")], CLIENT),
        ([(XFF, f"{CLIENT}:5678")], CLIENT),
        ([(XFF, "10.9.9.9")], "10.9.9.9"),
        ([(FORWARDED, f"for={CLIENT}")], CLIENT),
        ([(FORWARDED, f'For="{CLIENT}:5678";proto=https;by=10.0.0.1')], CLIENT),
        ([(FORWARDED, f"proto=https;for={CLIENT}, for=10.9.9.9")], CLIENT),
        ([(FORWARDED, f"for={CLIENT}"), (FORWARDED, "for=10.9.9.9")], CLIENT),
        ([(FORWARDED, f"for={CLIENT}:5678")], CLIENT),
        ([(FORWARDED, f'x="a,b";for={CLIENT}')], PROXY),
        ([(FORWARDED, f'for={CLIENT};host="x,for={OTHER}"')], PROXY),
        ([(FORWARDED, f'for={CLIENT};host="x,for={OTHER};y";proto="https"')], PROXY),
        ([(FORWARDED, "proto=https"), (XFF, OTHER)], PROXY),
        ([(XFF, CLIENT), (FORWARDED, f"for={CLIENT}")], CLIENT),
        ([(XFF, ""), (FORWARDED, f"for={CLIENT}")], CLIENT),
        ([(XFF, CLIENT), (FORWARDED, "")], CLIENT),
        ([(XFF, ""), (FORWARDED, "")], PROXY),
        ([(XFF, ", ,")], PROXY),
    ):
        assert asked_by(PROXY, *headers) == client, headers


def test_what_the_client_wrote_itself_is_not_believed() -> None:
    """What stands before the first trusted proxy's own entry changes nothing."""
    for own in (
        OTHER, PROXY, "127.0.0.1", "unknown", "", "x" * 4000, f"{OTHER}, {PROXY}", '"', '"a, ',
        ", ".join([OTHER] * 500),
    ):
        assert asked_by(PROXY, (XFF, f"{own}, {CLIENT}")) == CLIENT, own
        assert asked_by(PROXY, (XFF, own), (XFF, f"{CLIENT}, 10.9.9.9")) == CLIENT, own


def test_what_the_client_wrote_itself_cannot_swallow_the_proxys_word() -> None:
    """A Forwarded header that the client left unfinished does not change what the proxy's part of
    it says."""
    seen = set()
    for own in (
        f"for={OTHER}", f'for="{OTHER}', f'for={OTHER};x="a', f'for={OTHER};x="a\\',
        f"for={OTHER};", f"for={OTHER};x=", f'for="{OTHER}";', f'for={OTHER};x="a", "',
        f"for={OTHER},", f'for={OTHER}, x="', f"for={OTHER} for", f"for={OTHER}\t",
        "for", "=", '"', ";;;", "(",
    ):
        for word in (f"for={CLIENT}", f'for="{CLIENT}"', f'for="{CLIENT}:5678";proto="https"'):
            seen.add(asked_by(PROXY, (FORWARDED, f"{own}, {word}")))
            seen.add(asked_by(PROXY, (FORWARDED, own), (FORWARDED, word)))
    assert seen == {CLIENT}


def test_headers_that_differ_are_both_not_believed() -> None:
    """Where the two headers differ, neither is believed: a proxy adds to one, and the client may
    have written the other."""
    for other in (OTHER, "unknown", "127.0.0.1"):
        assert asked_by(PROXY, (XFF, other), (FORWARDED, f"for={CLIENT}")) == PROXY
        assert asked_by(PROXY, (XFF, CLIENT), (FORWARDED, f"for={other}")) == PROXY


def test_proxy_that_hides_the_client_is_the_client() -> None:
    """Where a proxy names nobody, its own address counts, and nothing beyond."""
    for headers in (
        [(XFF, f"{CLIENT}, unknown")],
        [(FORWARDED, f"for={CLIENT}, for=unknown")],
        [(FORWARDED, f"for={CLIENT}, for=_hidden")],
        [(FORWARDED, f"for={CLIENT}, proto=https")],
    ):
        assert asked_by(PROXY, *headers) == PROXY
    assert asked_by(PROXY, (XFF, f"{CLIENT}, unknown, 10.9.9.9")) == "10.9.9.9"


def test_network_stands_for_an_ipv6_address() -> None:
    """An IPv6 client is known by its network: the 64 bits that it can choose make no other client
    of it."""
    for headers, peer in (
        ([], "2001:db8:1:2:3:4:5:6"),
        ([(XFF, "2001:db8:1:2:3:4:5:6")], PROXY),
        ([(XFF, "2001:db8:1:2:3:4:5:6")], "2001:db8:ffff::1"),
        ([(FORWARDED, 'for="[2001:db8:1:2::7]:4711"')], PROXY),
        ([(FORWARDED, 'for="[2001:db8:1:2::7]"')], "::ffff:10.0.0.1"),
    ):
        assert asked_by(peer, *headers) == "2001:db8:1:2::/64", headers
    assert asked_by("::ffff:198.51.100.7") == STRANGER
    assert asked_by("::ffff:10.0.0.1", (XFF, "::ffff:203.0.113.9")) == CLIENT


def test_unix_socket_has_no_address() -> None:
    """A client without an address has an empty one, whatever the headers say."""
    assert asked_by("", (XFF, CLIENT)) == ""


def test_settings_of_networks_and_origins_are_read() -> None:
    """Both settings are lists with commas; spaces and empty parts do not count."""
    assert [str(one) for one in PROXIES] == ["10.0.0.0/8", "127.0.0.1/32", "2001:db8:ffff::/48"]
    assert read_networks("") == read_networks(" , ") == []
    assert read_networks("::ffff:10.0.0.0/104") == read_networks("10.0.0.0/8")
    assert ipaddress.ip_address("10.1.2.3") in read_networks("10.0.0.0/8,")[0]
    assert read_origins(" https://App.example.com/ ,http://localhost:3000,") == {
        "https://app.example.com", "http://localhost:3000"
    }
    assert read_origins("") == frozenset()


@pytest.mark.parametrize(
    ("origin", "spellings"),
    [
        ("https://app.example.com",
         ("https://app.example.com:443", "HTTPS://App.Example.COM", "https://app.example.com:0443")),
        ("http://app.example.com", ("http://app.example.com:80", "Http://APP.example.com:")),
        ("http://app.example.com:443", ("http://app.example.com:443",)),
        ("https://app.example.com:80", ("https://app.example.com:80",)),
        ("https://xn--bcher-kva.example", ("https://bücher.example", "https://BÜCHER.example:443")),
        ("http://[::1]:3000", ("http://[::1]:3000", "http://[0:0:0:0:0:0:0:1]:3000")),
        *((each, (each, each.upper())) for each in (
            "capacitor://localhost", "tauri://localhost", "ionic://localhost", "app://-", "app://.",
            "chrome-extension://abcdefghijklmnopabcdefghijklmnop",
            "moz-extension://0f0e0d0c-1111-2222-3333-444455556666", "app://localhost:443")),
        (None, (
            "", "null", "app.example.com", "https://", "https:app.example.com", "https://a/",
            "https://a/b", "https://a?b", "https://a#b", "https://u@a", "https://a b", "https://a:b",
            "https://a:99999", "https://[::1", "https://[x]", "https://*.example.com",
            "https://\udcff", "https://a,b", "//a", "://a", "1a://b", "https://a%20b",
            "https://a\\b", "x" * 8000)),
    ],
)
def test_spellings_of_an_origin_are_one(origin: str | None, spellings: tuple[str, ...]) -> None:
    """However an origin is spelled it is the same one; what is none is none."""
    assert {each: read_origin(each) for each in spellings} == dict.fromkeys(spellings, origin)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("TRUSTED_PROXIES", value) for value in ("localhost", "10.0.0.1/8", "10.0.0.0/33", "*")),
        *(("CORS_ORIGINS", value) for value in (
            "*", "null", "app.example.com", "https://app.example.com/x", "https://", "ftp://x",
            "wss://app.example.com", "https://*.example.com", "https://a.example https://b.example",
        )),
    ],
)
def test_wrong_network_or_origin_is_named(name: str, value: str) -> None:
    """A wrong network or origin keeps the server from starting, with the name of its setting."""
    with pytest.raises(StartError, match=f"^{name}="):
        messenger.Settings.load({name: value})


def test_password_in_an_origin_is_not_shown() -> None:
    """An origin with a password in it is refused without showing it."""
    with pytest.raises(StartError, match=r"app.example.com' must be like") as refusal:
        read_origins("https://root:hunter2@app.example.com")
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize("name", ["Forwarded", "X-Forwarded-For"])
@pytest.mark.parametrize("noise", ["for=192.0.2.1,", ",", "for=\"[", "1:2,", "9" * 8000])
def test_long_way_is_not_read_to_its_beginning(name: str, noise: str) -> None:
    """However much stands before the word of a trusted proxy, the address is the one that it names,
    and found at once."""
    told = "for=192.0.2.60" if name == "Forwarded" else "192.0.2.60"
    headers = [(name, noise * (8000 // len(noise)))] * 120
    began = time.process_time()
    for _ in range(20):
        assert asked_by(PROXY, *headers, (name, told)) == "192.0.2.60"
    assert time.process_time() - began < 1  # of the processor; it took 2 s and more


def test_way_of_a_stranger_is_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a client writes is taken apart where no trusted proxy sent it, nor what stands
    behind the first proxy's word."""
    looked_into = []
    monkeypatch.setattr(guard, "named_by", lambda element: looked_into.append(element) or "")
    forged = ("Forwarded", "for=127.0.0.1," * 100)
    assert asked_by("203.0.113.9", forged) == "203.0.113.9"
    assert looked_into == []
    assert asked_by(PROXY, forged) == PROXY
    assert len(looked_into) == 1


# ---- Passwords


async def test_flood_of_logins_does_not_slow_the_loop(
    alice: Person, bob: Person, app: web.Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passwords are hashed a few at a time in threads of lower priority; meanwhile the event loop
    goes on, and messages are posted."""
    threads, turns, turns_in_a_hash = set(), 0, []
    real = bcrypt.checkpw

    def spy(password: bytes, hashed: bytes) -> bool:
        niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        threads.add((threading.current_thread().name, niceness))
        before = turns
        try:
            return real(password, hashed)
        finally:
            turns_in_a_hash.append(turns - before)

    monkeypatch.setattr(bcrypt, "checkpw", spy)
    app[messenger.PASSWORDS].nobodys = f"$2b$12${'.' * 53}"  # a quarter of a second each
    chat, posted = await alice.opens(bob), 0
    names = [f"nobody{number}@example.com" for number in range(6)]
    flood = [asyncio.create_task(login(alice, name)) for name in names]
    while not all(one.done() for one in flood):
        await asyncio.sleep(0.005)
        turns += 1
        if app[messenger.PASSWORDS]._waiting > guard.PASSWORD_THREADS:
            await bob.says(chat, "meanwhile")
            posted += 1
    assert {await one for one in flood} == {401}
    assert len(turns_in_a_hash) == 6
    assert min(turns_in_a_hash) > 0
    assert posted > 0
    assert {name.rsplit("_", 1)[0] for name, _ in threads} == {"bcrypt"}
    assert len(threads) <= guard.PASSWORD_THREADS
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert {niceness for _, niceness in threads} == {min(19, own + guard.PASSWORD_NICENESS)}


async def test_queue_of_passwords_is_bounded(
    alice: Person, app: web.Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login beyond the queue is 503 with Retry-After at once; those in the queue are answered,
    and then there is room again."""
    gate = threading.Event()
    real = bcrypt.checkpw

    def slow(password: bytes, hashed: bytes) -> bool:
        gate.wait(SOON_SECONDS)
        return real(password, hashed)

    monkeypatch.setattr(guard, "PASSWORD_QUEUE_MAX", 5)
    monkeypatch.setattr(bcrypt, "checkpw", slow)
    waiting = [asyncio.create_task(login(alice, alice.email)) for _ in range(5)]
    async with asyncio.timeout(SOON_SECONDS):
        while app[messenger.PASSWORDS]._waiting < 5:
            await asyncio.sleep(0.01)
    body = {"email": alice.email, "password": PASSWORD}
    async with alice.client.post("/api/v1/users/login", json=body) as answer:
        assert (answer.status, (await answer.json())["type"]) == (503, "service-unavailable")
        assert int(answer.headers["Retry-After"]) >= 1
    gate.set()
    assert set(await asyncio.gather(*waiting)) == {200}
    assert await login(alice, alice.email) == 200


async def test_full_queue_has_room_for_another_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many passwords of some addresses wait: of another an equal share may, too."""
    gate = threading.Event()
    monkeypatch.setattr(bcrypt, "checkpw", lambda *_: gate.wait(SOON_SECONDS))
    monkeypatch.setattr(guard, "PASSWORD_QUEUE_MAX", 8)
    monkeypatch.setattr(guard, "PASSWORD_QUEUE_OF_ONE_MAX", 4)
    passwords = guard.Passwords(4)
    keys = ["flood", "another flood"] * 4 + ["honest"] * 2
    checks = [asyncio.create_task(passwords.matching("x", "hash", key)) for key in keys]
    await asyncio.sleep(0)
    for key in set(keys):
        with pytest.raises(guard.Busy):
            await passwords.matching("x", "hash", key)
    gate.set()
    assert await asyncio.gather(*checks) == ["x"] * len(keys)
    passwords.close()


async def test_addresses_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many passwords come from one address, those of others are checked in turn with
    them."""
    gate, order = threading.Event(), []

    def notes(password: bytes, hashed: bytes) -> bool:
        gate.wait(SOON_SECONDS)
        order.append(hashed.decode())
        return True

    monkeypatch.setattr(bcrypt, "checkpw", notes)
    monkeypatch.setattr(guard, "PASSWORD_THREADS", 1)  # of two, one may be late by all the others
    passwords = guard.Passwords(4)
    asked = [("flood", f"flood {n}") for n in range(20)] + [
        ("one", "one 0"), ("other", "other 0"), ("other", "other 1")]
    checks = [asyncio.create_task(passwords.matching("x", name, key)) for key, name in asked]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*checks)
    passwords.close()
    assert len(order) == 23
    # One is under way; then each address has its turn.
    places = {name: order.index(name) for name in ("one 0", "other 0", "other 1")}
    assert places["one 0"] <= 3
    assert places["other 0"] <= 4
    assert places["other 1"] <= 7
    assert [name for name in order if name.startswith("flood")] == [
        f"flood {number}" for number in range(20)]


async def test_address_has_a_part_of_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once so many of one address wait its next is refused as Busy; another address is not, and
    who gave up waiting leaves the place and the turn to others."""
    gate = threading.Event()

    def waits(password: bytes, hashed: bytes) -> bool:
        return gate.wait(SOON_SECONDS)

    monkeypatch.setattr(bcrypt, "checkpw", waits)
    monkeypatch.setattr(guard, "PASSWORD_QUEUE_OF_ONE_MAX", 6)
    passwords = guard.Passwords(4)

    def comes(address: str) -> asyncio.Task[str | None]:
        return asyncio.create_task(passwords.matching("password", "hash", address))

    flood = [comes("flood") for _ in range(6)]
    await asyncio.sleep(0)
    with pytest.raises(guard.Busy):
        await comes("flood")
    with pytest.raises(guard.Busy):
        passwords.check_queue("flood")
    passwords.check_queue("other")
    other = comes("other")
    await asyncio.sleep(0)
    for gone in (flood[2], flood[5]):
        gone.cancel()
    await asyncio.wait([flood[2], flood[5]])
    passwords.check_queue("flood")
    flood.append(comes("flood"))
    gate.set()
    still = [one for one in flood if not one.cancelled()]
    assert await asyncio.gather(*still, other) == ["password"] * 6
    for _ in range(3):  # every turn was given back
        assert await asyncio.gather(comes("a"), comes("b"), comes("c")) == ["password"] * 3
    passwords.close()


async def test_logins_of_one_address_do_not_hold_up_another(
    database_url: str, aiohttp_client: Callable[..., Awaitable[Client]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 96 logins with the right password at once from one address some are 503; a login from
    another one is answered before the rest of them."""
    settings = msgspec.structs.replace(SETTINGS, trusted_proxies="127.0.0.1", rate_limits="off")
    client = await aiohttp_client(messenger.make_app(settings, database_url, SECRET_KEY))
    people = [Person(client, name) for name in ("alice", "bob")]
    for person in people:
        await person.register()
    real = bcrypt.checkpw

    def slow(password: bytes, hashed: bytes) -> bool:
        time.sleep(0.05)
        return real(password, hashed)

    monkeypatch.setattr(bcrypt, "checkpw", slow)
    answered: list[str] = []

    async def logs_in(person: Person, origin: str) -> int:
        body = {"email": person.email, "password": PASSWORD}
        headers = {"X-Forwarded-For": origin}
        async with client.post("/api/v1/users/login", json=body, headers=headers) as answer:
            answered.append(origin)
            return answer.status

    flood = [asyncio.create_task(logs_in(people[0], "203.0.113.1")) for _ in range(96)]
    async with asyncio.timeout(SOON_SECONDS):
        while not answered:
            await asyncio.sleep(0.01)
    assert await logs_in(people[1], "203.0.113.2") == 200
    statuses = [await one for one in flood]
    assert set(statuses) == {200, 503}
    assert answered.index("203.0.113.2") < 96 - 10


# ---- Browsers


@pytest.fixture
async def anyone(
    database_url: str, aiohttp_client: Callable[..., Awaitable[Client]]
) -> AsyncIterator[Client]:
    """A client of a server that allows the pages of one other site."""
    settings = msgspec.structs.replace(SETTINGS, cors_origins=f"{ALLOWED}, http://localhost:3000")
    return await aiohttp_client(messenger.make_app(settings, database_url, SECRET_KEY))


@pytest.fixture
async def user(anyone: Client) -> Person:
    """Somebody who is signed in there."""
    person = Person(anyone, "somebody")
    await person.register()
    await person.logs_in()
    return person


EXPOSED = {"Link", "Location", "Retry-After", "WWW-Authenticate", "X-Request-Id"}
CALLS = [
    # what kind of answer, method, path, with a token, status
    ("JSON", "GET", "/api/v1/users/me", True, 200),
    ("no token", "GET", "/api/v1/users/me", False, 401),
    ("nothing there", "GET", "/nothing", False, 404),
    ("wrong method", "PATCH", "/api/v1/users/me", True, 405),
    ("no preflight", "OPTIONS", "/api/v1/users/me", True, 405),
    ("bad body", "POST", "/api/v1/chats", True, 400),
    ("page", "GET", "/", False, 200),
    ("document", "GET", "/api/v1/openapi.json", False, 200),
    ("health", "HEAD", "/api/v1/health/liveness", False, 200),
    ("no websocket", "GET", "/ws", True, 426),
    ("no content", "POST", "/api/v1/users/logout", True, 204),
]


async def test_pages_of_allowed_sites_may_read_every_answer(anyone: Client, user: Person) -> None:
    """Every answer, a refusal too, names the allowed Origin that asked, and no other."""
    for what, method, path, signed_in, status in CALLS:
        for origin in (ALLOWED, "http://localhost:3000", FOREIGN, "null", "", None):
            if method == "POST" and status == 204:
                await user.logs_in()
            if origin in (FOREIGN, "null") and (path == "/ws" or method in ("POST", "PATCH")):
                continue  # refused before anything else
            headers = {} if origin is None else {"Origin": origin}
            headers |= user.headers if signed_in else {}
            async with anyone.request(method, path, headers=headers) as answer:
                assert answer.status == status, (what, origin)
                is_allowed = origin in (ALLOWED, "http://localhost:3000")
                told = answer.headers.get("Access-Control-Allow-Origin")
                assert told == (origin if is_allowed else None), (what, origin)
                exposed = answer.headers.get("Access-Control-Expose-Headers", "")
                assert set(exposed.split(", ")) == (EXPOSED if is_allowed else {""}), what
                assert "Origin" in answer.headers["Vary"], what
                assert "Access-Control-Allow-Credentials" not in answer.headers


async def test_preflight_is_answered_for_allowed_sites_only(anyone: Client) -> None:
    """A preflight tells an allowed site which methods and headers it may use, and another site
    nothing."""
    asking = {"Access-Control-Request-Method": "PATCH", "Access-Control-Request-Headers": "x"}
    for path in ("/api/v1/users/me", "/api/v1/chats/1/messages/x", "/nothing"):
        async with anyone.options(path, headers=asking | {"Origin": ALLOWED}) as answer:
            assert (answer.status, await answer.read()) == (204, b"")
            assert answer.headers["Access-Control-Allow-Origin"] == ALLOWED
            methods = answer.headers["Access-Control-Allow-Methods"]
            assert set(methods.split(", ")) >= {e.method for e in messenger.ENDPOINTS}
            names = answer.headers["Access-Control-Allow-Headers"].lower().split(", ")
            assert {"authorization", "content-type"} <= set(names)
            assert int(answer.headers["Access-Control-Max-Age"]) > 0
            assert answer.headers["Vary"] == "Origin"
        for origin in (FOREIGN, "null", f"{ALLOWED}.evil.example", f"{ALLOWED}:444"):
            async with anyone.options(path, headers=asking | {"Origin": origin}) as answer:
                assert answer.status in (404, 405)
                assert not [name for name in answer.headers if name.startswith("Access-Control")]


@pytest.mark.parametrize(
    ("asked", "added"),
    [
        ("traceparent", ["traceparent"]),
        ("authorization,x-requested-with, X-B3-TraceId", ["x-requested-with", "X-B3-TraceId"]),
        ("sentry-trace, baggage", ["sentry-trace", "baggage"]),
        ("", []),
        (", ,", []),
        ("x y, ok, z:, (b), ü, " + "a" * 65, ["ok"]),
        (",".join(f"x{n}" for n in range(500)), [f"x{n}" for n in range(32)]),
    ],
)
async def test_page_of_an_allowed_site_may_send_any_header(
    anyone: Client, asked: str, added: list[str]
) -> None:
    """What a browser's libraries add to a request is allowed as it is asked for; what is no name
    of a header is left out, and so is what is beyond any measure."""
    headers = {"Origin": ALLOWED, "Access-Control-Request-Method": "POST",
               "Access-Control-Request-Headers": asked}
    async with anyone.options("/api/v1/users/login", headers=headers) as answer:
        assert answer.status == 204
        allowed = answer.headers["Access-Control-Allow-Headers"].split(", ")
    assert allowed[:2] == ["Authorization", "Content-Type"]
    assert [name for name in allowed[2:] if name != "authorization"] == added


async def test_page_of_another_site_may_do_nothing(anyone: Client, user: Person) -> None:
    """Whatever may change something is refused to a page of another site, also as a form would send
    it; what it sends is not even counted, so nobody is locked out by it."""
    own = f"{anyone.host}:{anyone.port}"
    new = {"email": "a@example.com", "username": "a_b", "password": PASSWORD}
    calls = (
        ("POST", "/api/v1/users", new),
        ("POST", "/api/v1/users/login", {"email": user.email, "password": "a wrong password"}),
        ("PUT", f"/api/v1/users/{user.id}", {"username": "another"}),
        ("DELETE", f"/api/v1/users/{user.id}", None),
        ("PATCH", "/nothing", None),
    )
    for origin in (FOREIGN, "null", f"http://{own}.evil.example", "capacitor://localhost"):
        headers = user.headers | {"Origin": origin, "Content-Type": "text/plain"}
        for method, path, body in calls * 3:
            data = None if body is None else json.dumps(body)
            async with anyone.request(method, path, data=data, headers=headers) as answer:
                assert (answer.status, (await answer.json())["type"]) == (403, "foreign-origin")
        async with anyone.get("/api/v1/users/me", headers=headers) as answer:
            assert answer.status == 200
            assert "Access-Control-Allow-Origin" not in answer.headers
    await user.logs_in()
    for number, ours in enumerate((f"http://{own}", f"https://{own}", ALLOWED, None)):
        body = new | {"email": f"a{number}@example.com", "username": f"a_{number}"}
        headers = {} if ours is None else {"Origin": ours}
        async with anyone.post("/api/v1/users", json=body, headers=headers) as answer:
            assert answer.status == 201, ours


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("chat.example.com:443", "https://chat.example.com", 401),
        ("chat.example.com", "https://chat.example.com:443", 401),
        ("chat.example.com:80", "http://chat.example.com", 401),
        ("Chat.Example.com", "https://chat.example.com", 401),
        ("chat.example.com:8443", "https://chat.example.com:8443", 401),
        ("[::1]:443", "https://[::1]", 401),
        ("chat.example.com:8443", "https://chat.example.com", 403),
        ("chat.example.com:443", "http://chat.example.com", 403),
        ("chat.example.com", "https://chat.example.com.evil.example", 403),
        ("chat.example.com", "capacitor://chat.example.com", 403),
        ("[", "https://[", 403),
    ],
)
async def test_own_pages_are_known_however_the_port_is_written(
    anyone: Client, host: str, origin: str, status: int
) -> None:
    """A page of the host that is asked is no foreign one, whether the port of http or https is
    written out or not: on sockets and in calls alike."""
    headers = {"Host": host, "Origin": origin}
    async with anyone.get("/ws", headers=headers | HANDSHAKE) as answer:
        assert answer.status == status
    async with anyone.post("/api/v1/users/logout", headers=headers) as answer:
        assert answer.status == status


async def test_origin_that_is_set_is_found_however_it_is_written(
    database_url: str, aiohttp_client: Callable[..., Awaitable[Client]]
) -> None:
    """What CORS_ORIGINS accepts matches what browsers and the shells of apps send for it."""
    sent = {
        "https://app.example.com:443": "https://app.example.com",
        "HTTPS://Two.example.com/": "https://two.example.com",
        "https://bücher.example": "https://xn--bcher-kva.example",
        "capacitor://localhost": "capacitor://localhost",
        "tauri://localhost": "tauri://localhost",
        "chrome-extension://abcdefgh": "chrome-extension://abcdefgh",
    }
    settings = messenger.Settings.load({"CORS_ORIGINS": ",".join(sent), "BCRYPT_COST": "4"})
    client = await aiohttp_client(messenger.make_app(settings, database_url, SECRET_KEY))
    for written, origin in sent.items():
        async with client.post("/api/v1/users/logout", headers={"Origin": origin}) as answer:
            assert answer.status == 401, written
            assert answer.headers["Access-Control-Allow-Origin"] == origin


async def test_without_allowed_sites_nothing_is_told_to_any(alice: Person) -> None:
    """Where CORS_ORIGINS is empty, no answer has a CORS header."""
    for origin in (ALLOWED, "null", f"http://{alice.client.host}:{alice.client.port}"):
        answer = await alice.asks("GET", "/users/me")
        assert answer.status == 200
        headers = {"Origin": origin, "Access-Control-Request-Method": "GET"}
        async with alice.client.options("/api/v1/users/me", headers=headers) as refused:
            assert refused.status == 405
        assert not [n for n in (*answer.headers, *refused.headers) if n.startswith("Access-Con")]


async def test_socket_is_open_to_allowed_sites(anyone: Client, user: Person) -> None:
    """A page of an allowed site may open a socket and a page of another may not."""
    for origin in (ALLOWED, ALLOWED.upper(), "http://localhost:3000"):
        line = Line(await anyone.ws_connect("/ws", headers=user.headers, origin=origin))
        await line.sends(type="typing")
        assert (await line.hears("error"))["data"]["type"] == "invalid-input"
        await line.close()
    for origin in (FOREIGN, "null", "https://app.example.com.evil.example"):
        headers = user.headers | {"Origin": origin}
        async with anyone.get("/ws", headers=headers) as answer:
            assert (answer.status, (await answer.json())["type"]) == (403, "foreign-origin")


async def test_every_answer_has_the_headers_for_browsers(anyone: Client, user: Person) -> None:
    """No answer is sniffed, sends a Referer or is kept in a cache, except that pages and documents
    are kept and asked for anew each time."""
    for what, method, path, signed_in, status in CALLS:
        headers = user.headers if signed_in else {}
        async with anyone.request(method, path, headers=headers) as answer:
            assert answer.status == status, what
            assert answer.headers["X-Content-Type-Options"] == "nosniff", what
            assert answer.headers["Referrer-Policy"] == "no-referrer", what
            assert answer.headers["Server"] == "messenger", what
            kept = "no-cache" if what in ("page", "document") else "no-store"
            assert answer.headers["Cache-Control"] == kept, what
            assert ("Content-Security-Policy" in answer.headers) == (what == "page"), what
    await user.logs_in()
    body = {"refresh_token": user.refresh}
    async with anyone.post("/api/v1/users/refresh", json=body) as answer:
        assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")


async def test_page_runs_its_own_script_alone(anyone: Client) -> None:
    """The policy of a page allows nothing but what its hashes name, and no other page may frame
    it."""
    for path in ("/", "/docs"):
        async with anyone.get(path) as answer:
            policy = answer.headers["Content-Security-Policy"]
            page = await answer.text()
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules["default-src"] == rules["frame-ancestors"] == rules["base-uri"] == "'none'"
        assert "unsafe" not in policy
        assert policy.count("'sha256-") == len(re.findall("<script|<style", page)) > 1
        assert not re.search(r"<\w[^>]*\s(on\w+|style)\s*=", page)


# ---- Slots


async def test_slots_let_so_many_of_each_key_in() -> None:
    """Of each key so many are let in, then whoever waited first for each that has ended; another
    key has slots of its own."""
    slots, order = guard.Slots(2), []

    async def works(number: int) -> None:
        give_back = await slots.take("a")
        order.append(number)
        await asyncio.sleep(0)
        give_back()

    first, second = await slots.take("a"), await slots.take("a")
    waiting = [asyncio.create_task(works(number)) for number in range(5)]
    await asyncio.sleep(0)
    assert order == []
    (await slots.take("b"))()
    waiting[1].cancel()
    first()
    second()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert order == [0, 2, 3, 4]
    begun = [await asyncio.wait_for(slots.take("a"), HEAR_SECONDS) for _ in range(2)]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(slots.take("a"), 0.01)
    for give_back in begun:
        give_back()


async def test_slot_is_taken_at_once_only_where_it_is_free() -> None:
    """Nothing is taken where it would have to be waited for; nor before who waits already."""
    slots = guard.Slots(1)
    give_back = slots.take_now("a")
    assert give_back is not None
    assert slots.take_now("a") is None
    assert slots.take_now("b") is not None
    waiting = asyncio.create_task(slots.take("a"))
    await asyncio.sleep(0)
    give_back()
    assert slots.take_now("a") is None
    (await asyncio.wait_for(waiting, HEAR_SECONDS))()
    assert slots.take_now("a") is not None


async def test_slots_may_be_without_bound() -> None:
    """With a bound of 0 any number is let in."""
    slots = guard.Slots(0)
    for _ in range(100):
        await asyncio.wait_for(slots.take("a"), HEAR_SECONDS)


async def test_work_that_fails_gives_its_slot_back() -> None:
    """A slot is free again however the work has ended."""
    slots = guard.Slots(1)

    async def fails(number: int) -> None:
        raise ValueError(number)

    for number in range(3):
        with pytest.raises(ValueError, match=str(number)):
            await asyncio.wait_for(slots.run("a", fails, number), HEAR_SECONDS)


async def test_turns_are_never_all_of_one_key() -> None:
    """Of each key at most so many work at once, though turns are free; the others get those, and
    who waited is let in as soon as one of the same key has ended."""
    turns, working = guard.Turns(3, of_each=2), Counter[str]()

    async def works(key: str, end: asyncio.Event) -> None:
        await turns.take(key)
        working[key] += 1
        await end.wait()
        working[key] -= 1
        turns.give_back(key)

    ends = [asyncio.Event() for _ in range(5)]
    tasks = [asyncio.create_task(works("a", end)) for end in ends[:4]]
    tasks.append(asyncio.create_task(works("b", ends[4])))
    await asyncio.sleep(0)
    assert working == {"a": 2, "b": 1}
    tasks[2].cancel()
    ends[0].set()
    for _ in range(4):
        await asyncio.sleep(0)
    assert working == {"a": 2, "b": 1}
    for end in ends:
        end.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    for key in "abc":
        await asyncio.wait_for(turns.take(key), HEAR_SECONDS)


async def test_turn_that_is_refused_and_cancelled_at_once_was_never_taken() -> None:
    """Who gives up in the same moment in which they are refused gives no turn back."""
    turns = guard.Turns(1)
    await turns.take("a")
    waiting = asyncio.create_task(turns.take("a"))
    await asyncio.sleep(0)
    turns.refuse("a", guard.Busy("away"))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    other = asyncio.create_task(turns.take("b"))
    await asyncio.sleep(0)
    assert not other.done()
    turns.give_back("a")
    await asyncio.wait_for(other, HEAR_SECONDS)


async def test_long_work_leaves_the_loop_to_others_for_as_long() -> None:
    """Work that keeps the loop for long is not followed at once by more of its kind, and who gets
    a turn without waiting begins in another round."""
    turns, times = guard.Turns(1), list[float]()

    def works() -> None:
        times.append(time.monotonic())
        time.sleep(0.05)
        times.append(time.monotonic())

    first = asyncio.create_task(turns.call("a", works))
    await asyncio.sleep(0)
    assert not times
    await asyncio.gather(first, turns.call("b", works), turns.call("a", works))
    rests = [later - before for before, later in itertools.pairwise(times)][1::2]
    assert len(rests) == 2
    assert min(rests) > 0.04


async def work_in_turn(
    turns: guard.FairTurns, order: list[str], clock: Callable[[float], None], key: str,
    seconds: float,
) -> None:
    """Wait for a key's turn, note whose it is, and work for so long by the clock."""
    await turns.take(key)
    order.append(key)
    await asyncio.sleep(0)
    clock(seconds)
    turns.give_back(key)


async def test_key_whose_turns_are_short_goes_before_those_with_long_ones(
    clock: Callable[[float], None],
) -> None:
    """Of keys that wait for turns which may take long, the one that used the least goes next: it
    waits for no more than is under way, however many others wait."""
    turns, order = guard.FairTurns(1), list[str]()
    works = functools.partial(work_in_turn, turns, order, clock)
    flood = [asyncio.create_task(works(f"long {number % 8}", 0.05)) for number in range(80)]
    while len(order) < 16:  # each of them has had a turn
        await asyncio.sleep(0)
    await works("short", 0.001)  # as who comes anew
    before = len(order)
    for _ in range(5):
        await works("short", 0.001)
    assert len(order) - before <= 5 * 2, order  # itself, and the one that is under way
    await asyncio.gather(*flood)
    assert not turns._began
    await asyncio.wait_for(turns.take("short"), HEAR_SECONDS)


async def test_key_that_comes_now_and_then_waits_only_for_what_is_under_way(
    clock: Callable[[float], None],
) -> None:
    """Of keys that used no more than those that always want a turn, the one whose turn was longest
    ago goes next."""
    turns, order = guard.FairTurns(1), list[str]()
    works = functools.partial(work_in_turn, turns, order, clock)
    flood = [asyncio.create_task(works(f"flood {number % 5}", 0.04 + 0.001 * (number % 7)))
             for number in range(200)]
    await asyncio.sleep(0)
    await works("rare", 0.02)
    for _ in range(8):
        began = len(order)
        while len(order) < began + 5:
            await asyncio.sleep(0)
        before = len(order)
        await works("rare", 0.02)
        assert order.index("rare", before) - before <= 1, order
    await asyncio.gather(*flood)


async def test_key_that_comes_anew_does_not_go_before_others_for_long(
    clock: Callable[[float], None],
) -> None:
    """Whoever used much while others waited has the next turn but one when others come who used
    nothing, and one that was away has no more in store than they."""
    turns, order = guard.FairTurns(1), []

    async def works(key: str) -> None:
        await turns.take(key)
        order.append(key)
        clock(0.04)
        await asyncio.sleep(0)
        turns.give_back(key)

    for _ in range(100):
        await asyncio.gather(*(works(key) for key in ("keeper", "honest", "keeper")))
    await works("away")
    for _ in range(100):
        await asyncio.gather(*(works(key) for key in ("keeper", "honest", "keeper")))
    order.clear()
    await turns.take("keeper")
    later = [asyncio.create_task(works(key)) for key in 5 * ["fresh", "away", "honest", "fresher"]]
    await asyncio.sleep(0)
    clock(0.04)
    turns.give_back("keeper")
    await asyncio.gather(*later)
    for begin in range(0, len(order), 4):
        assert sorted(order[begin:begin + 4]) == ["away", "fresh", "fresher", "honest"], order


async def test_key_waits_for_few_of_those_who_never_end_to_come(
    clock: Callable[[float], None],
) -> None:
    """Whoever had a turn has the next though there are always others that had none."""
    turns, order = guard.FairTurns(1), []
    comers = (f"comer {number}" for number in range(200))

    async def works(key: str) -> None:
        await turns.take(key)
        order.append(key)
        clock(0.04)
        if (comer := next(comers, "")) and key != "honest":
            group.create_task(works(comer))
        await asyncio.sleep(0)
        turns.give_back(key)

    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(works(next(comers)))
        for _ in range(5):
            await works("honest")
    places = [place for place, key in enumerate(order) if key == "honest"]
    assert max(later - before for before, later in itertools.pairwise(places)) <= 8, places


async def test_turns_forget_whose_they_were(clock: Callable[[float], None]) -> None:
    """However many keys have turns, and though somebody always waits, memory stays bounded."""
    turns = guard.FairTurns(1)
    await turns.take("keeper")
    for number in range(3 * guard.KEYS_MIN):
        waiting = asyncio.create_task(turns.take(number))
        await asyncio.sleep(0)
        clock(1)
        turns.give_back(number - 1 if number else "keeper")
        await waiting
    assert max(len(turns._used._of), len(turns._long_until._of)) <= 2 * guard.KEYS_MIN
    assert len(turns._began) == 1


async def test_keys_with_long_turns_leave_one_to_others(clock: Callable[[float], None]) -> None:
    """Whoever had a long turn lately does not take the last one, though it is free: who comes with
    a short one finds it so."""
    turns = guard.FairTurns(2)
    for key in ("long", "longer"):
        await turns.take(key)
        clock(1)
        turns.give_back(key)
    assert turns.take_now("long")
    assert not turns.take_now("longer")
    waiting = asyncio.create_task(turns.take("longer"))
    await asyncio.sleep(0)
    assert turns.take_now("short")
    turns.give_back("short")
    await asyncio.sleep(0)
    assert not waiting.done()
    turns.give_back("long")
    await asyncio.wait_for(waiting, HEAR_SECONDS)
    turns.give_back("longer")
    clock(guard.LONG_KEPT_SECONDS)  # it is forgotten
    assert turns.take_now("long")
    assert turns.take_now("longer")


async def test_turn_that_was_hardly_long_is_soon_forgotten(clock: Callable[[float], None]) -> None:
    """Whoever had a turn that took a little too long, as on a busy machine, may soon have the last
    one."""
    turns = guard.FairTurns(2)
    for key, seconds in (("very long", 60), ("hardly long", 0.21)):
        await turns.take(key)
        clock(seconds)
        turns.give_back(key)
    assert turns.take_now("very long")
    assert not turns.take_now("hardly long")
    clock(4.5)
    assert turns.take_now("hardly long")
    turns.give_back("hardly long")


# ---- What is believed


def test_fact_is_believed_for_a_while() -> None:
    """A fact is believed of its key alone, from when it was asked for, until its time is over."""
    trusted, now = Trusted(60), time.monotonic()
    assert trusted.put(1, "fact", now)
    assert trusted.put(2, "fact", now - 61)
    assert trusted.holds(1, "fact")
    assert not any((trusted.holds(1, "other"), trusted.holds(2, "fact"), trusted.holds(3, None)))
    trusted.forget()
    assert not trusted.holds(1, "fact")


def test_ends_are_remembered_however_many_there_are() -> None:
    """What ended a moment ago is not believed by an older answer, though very many others ended."""
    trusted, asked_at = Trusted(60), time.monotonic()
    time.sleep(0.01)
    trusted.end([-1])
    for _ in range(2):
        trusted.end(range(guard.FACTS_MAX + 1))
    assert not trusted.put(-1, "fact", asked_at)


def test_what_ended_while_it_was_asked_about_is_not_believed() -> None:
    """An answer may be older than the end; who asks after the end may be told anew."""
    trusted, asked_at = Trusted(60), time.monotonic()
    trusted.put(1, "fact", asked_at)
    time.sleep(0.01)
    trusted.end([1, 2])
    assert not trusted.holds(1, "fact")
    assert not trusted.put(2, "fact", asked_at)
    time.sleep(0.01)
    assert trusted.put(2, "fact", time.monotonic())
    assert trusted.holds(2, "fact")


# ---- Tokens


def test_token_is_read_with_the_key_or_the_old_one() -> None:
    """A token is believed if it was signed with either key, is of the kind that is asked for, has
    what it needs and did not expire."""
    now, key, old = time.time(), "k" * 32, "o" * 32
    token = Signer(old).sign(now, 60, typ="access", sub="7")
    claims = Signer(key, old).read(token, "access", 10, "sub")
    assert claims == {"typ": "access", "sub": "7", "iat": int(now), "exp": int(now) + 60}
    late = Signer(key).sign(now - 65, 60, typ="access")
    assert Signer(key).read(late, "access", 10)
    for signer, given, kind, leeway, needed in (
        (Signer(key), token, "access", 10, "sub"), (Signer(key, old), token, "refresh", 10, "sub"),
        (Signer(key, old), token, "access", 10, "sid"), (Signer(key), late, "access", 1, "typ"),
        (Signer(key, old), token[:-2], "access", 10, "sub"), (Signer(key), "", "access", 10, "typ"),
    ):
        assert signer.read(given, kind, leeway, needed) is None


def test_token_of_a_clock_that_was_ahead_is_early() -> None:
    """A token that says it was signed later than it can have been is told."""
    assert is_early({"iat": time.time() + 100}, 60)
    assert not is_early({"iat": time.time() + 30}, 60)


@pytest.mark.parametrize(("headers", "query", "of_call", "of_socket"), [
    ({"Authorization": "Bearer abc"}, "", "abc", "abc"),
    ({"Authorization": "bearer  abc"}, "?token=x", "abc", "abc"),
    ({"Authorization": "Basic abc"}, "", "", ""), ({"Authorization": "Bearer"}, "", "", ""),
    ({"Sec-WebSocket-Protocol": "v1, abc"}, "?token=x", "", "abc"),
    ({"Sec-WebSocket-Protocol": "v2, abc"}, "", "", ""),
    ({"Sec-WebSocket-Protocol": "v1"}, "?token=x", "", "x"),
])
def test_token_of_a_request_is_found(
    headers: dict[str, str], query: str, of_call: str, of_socket: str
) -> None:
    """A token stands in Authorization; of a handshake also behind the subprotocol, or in the
    query."""
    request = make_mocked_request("GET", f"/{query}", headers=CIMultiDict(headers))
    assert token_of(request, None) == of_call
    assert token_of(request, "v1") == of_socket
