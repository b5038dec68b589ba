"""What no handler sees: requests that cannot be parsed, come too slowly or expect too much."""

import asyncio
import contextlib
import json
import logging
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

import messenger
from plumbing import endpoints, guard, process, serving
from support.people import HEAR_SECONDS
from support.raw import RawConnection
from support.servers import SETTINGS

Connects = Callable[[bytes], Awaitable[RawConnection]]
ALIVE = b"GET /api/v1/health/liveness HTTP/1.1\r\nHost: a\r\n\r\n"


async def hears_alive(raw: RawConnection) -> RawConnection:
    """Read the answer that the server is alive."""
    assert (await raw.hears())[0] == 200
    return raw


@pytest.fixture
async def connects(server: TestServer) -> AsyncIterator[Connects]:
    """Connect to the server and send something."""
    made = []

    async def call(text: bytes) -> RawConnection:
        made.append(await RawConnection.opens(server.port, text))
        return made[-1]

    yield call
    for raw in made:
        raw.close()


UNREADABLE = [
    b"\x00\x01\x02\r\n\r\n",
    b"hello\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nA\x00b: c\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
    b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
    b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
]


async def test_what_cannot_be_parsed_is_a_problem(connects: Any, caplog: Any) -> None:
    """A request that is not HTTP is refused with a JSON problem and its headers, which repeats
    nothing of it, and the connection ends."""
    caplog.set_level(logging.DEBUG, "aiohttp")
    for text in UNREADABLE:
        raw = await connects(text)
        status, headers, body = await raw.hears()
        problem = json.loads(body)
        assert (status, problem["type"]) == (400, "malformed-request"), text[:60]
        assert headers["Content-Type"].startswith("application/problem+json"), text[:60]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Server"] == "messenger"
        assert headers["Cache-Control"] == "no-store"
        assert problem.keys() == {"type", "title", "status", "detail", "request_id"}
        assert problem["request_id"] == headers["X-Request-Id"]
        assert await raw.is_cut(), text[:60]


@pytest.fixture
async def hasty(
    app: web.Application, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Connects]:
    """Connect to a server that waits for no headers over a second, nor for a body."""
    monkeypatch.setattr(guard, "HEAD_SECONDS", 1)
    monkeypatch.setattr(endpoints, "BODY_SECONDS", 1)
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(process.listen_on("127.0.0.1", 0))
        await serving.start_sites(
            SETTINGS, stack, listener, app, messenger.close_sockets)
        port = listener.getsockname()[1]

        async def call(text: bytes) -> RawConnection:
            raw = await RawConnection.opens(port, text)
            stack.callback(raw.close)
            return raw

        yield call


async def test_slow_headers_are_cut(hasty: Any) -> None:
    """A connection that sends nothing, stops in its headers or sends them letter by letter is
    closed, also after a first good request, or behind one in its packet."""

    async def dribbles(raw: RawConnection) -> bool:
        with_cut = asyncio.create_task(raw.is_cut())
        while not with_cut.done():
            raw.writer.write(b"X")
            await asyncio.wait([with_cut], timeout=0.2)
        return await with_cut

    async def after_a_good_one(rest: bytes) -> bool:
        raw = await hears_alive(await hasty(ALIVE))
        raw.writer.write(rest)
        return await dribbles(raw)

    async with asyncio.timeout(HEAR_SECONDS):
        cut = await asyncio.gather(
            (await hasty(b"")).is_cut(),
            (await hasty(b"GET / HT")).is_cut(),
            (await hasty(b"GET / HTTP/1.1\r\nHost: a\r\nX")).is_cut(),
            dribbles(await hasty(b"GET / HTTP/1.1\r\nHost: a\r\nX: ")),
            after_a_good_one(ALIVE[:-2]),
            after_a_good_one(b"\r\nGET /"),
            dribbles(await hears_alive(await hasty(ALIVE + ALIVE[:-2]))),
        )
    assert cut == [True] * 7


async def test_idle_connection_is_kept_for_longer_than_a_proxy_keeps_it(hasty: Any) -> None:
    """Between two requests a connection may wait for longer than headers may take, again and again;
    proxies, which keep theirs for 60 s to 600 s, are the first to close."""
    assert serving.IDLE_SECONDS > 600
    raw = await hasty(ALIVE)
    for _ in range(2):
        await hears_alive(raw)
        await asyncio.sleep(1.5 * guard.HEAD_SECONDS)
        raw.writer.write(ALIVE[:20])
        await asyncio.sleep(guard.HEAD_SECONDS / 4)
        raw.writer.write(ALIVE[20:])
    await hears_alive(raw)


async def test_idle_connection_is_closed_at_last(
    app: web.Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection on which nothing more is asked is closed after its time."""
    monkeypatch.setattr(serving, "IDLE_SECONDS", 1)
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(process.listen_on("127.0.0.1", 0))
        await serving.start_sites(
            SETTINGS, stack, listener, app, messenger.close_sockets)
        raw = await RawConnection.opens(listener.getsockname()[1], ALIVE)
        stack.callback(raw.close)
        assert await (await hears_alive(raw)).is_cut()


EXPECTING = [  # a request, and what it expects
    (b"POST /api/v1/users/login", b"x"), (b"GET /nothing", b"200-ok"),
    (b"GET /", b"100-continue, x"), (b"DELETE /ws", b"x"),
]


async def test_what_nobody_does_cannot_be_expected(hasty: Any) -> None:
    """Whatever is expected but 100-continue is refused as any other wrong request is, on every
    path; who waits for 100 Continue gets it first."""
    for target, expected in EXPECTING:
        raw = await hasty(target + b" HTTP/1.1\r\nHost: a\r\nExpect: " + expected + b"\r\n\r\n")
        status, headers, body = await raw.hears()
        assert headers["Content-Type"].startswith("application/problem+json"), target
        assert (status, json.loads(body)["type"]) == (417, "expectation-failed"), target
        assert headers["X-Content-Type-Options"] == "nosniff"
    for expected in (b"100-continue", b"100-Continue"):
        raw = await hasty(
            b"POST /api/v1/users/login HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: "
            + expected + b"\r\n\r\n")
        assert await raw.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        raw.writer.write(b"{}")
        assert (await raw.hears())[0] == 422


async def test_slow_body_is_408(hasty: Any) -> None:
    """A body that does not arrive in time is refused and its connection ends, even if it trickles
    in."""
    head = b"POST /api/v1/users/login HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{"
    for dribble in (b"", b" "):
        raw = await hasty(head)
        heard = asyncio.create_task(raw.hears())
        while not heard.done():
            raw.writer.write(dribble)
            await asyncio.wait([heard], timeout=0.2)
        status, _, body = await heard
        assert (status, json.loads(body)["type"]) == (408, "request-timeout")


@pytest.mark.parametrize(("encoding", "window"), [("gzip", 31), ("deflate", 15), ("", 0)])
def test_compressed_body_is_unfolded(encoding: str, window: int) -> None:
    """A body comes out as it was before its encoding, if it is whole and not too large then."""
    def folded(text: bytes) -> bytes:
        packer = zlib.compressobj(wbits=window or 15)
        return packer.compress(text) + packer.flush() if window else text

    assert endpoints.unfold(folded(b"{}" * 50), encoding, 100) == b"{}" * 50
    if window:
        with pytest.raises(endpoints.BodyTooLarge):
            endpoints.unfold(folded(b"{}" * 50 + b" "), encoding, 100)
        for broken in (folded(b"{}")[:-1], b"{}", folded(b"{}")[1:]):
            with pytest.raises(endpoints.MalformedRequest):
                endpoints.unfold(broken, encoding, 100)


def test_next_page_begins_after_the_last_row() -> None:
    """Only where more was read than a page holds is there a next one."""
    assert endpoints.beyond([1, 2, 3], 2, lambda row: {"after": row}) == {"after": 2}
    assert endpoints.beyond([1, 2], 2, lambda row: {"after": row}) is None
    assert endpoints.beyond([], 2, lambda row: {"after": row}) is None


@pytest.mark.parametrize("cursor", ["7", "7.8.9", "7.", "100.8", "7.10", "-1.8", "7.8 ", "٧.8"])
def test_wrong_cursor_is_refused(cursor: str) -> None:
    """A cursor has as many numbers as its list needs, each up to the most that it may be."""
    assert endpoints.read_cursor("", 99, 9) == (99, 9)
    assert endpoints.read_cursor("07.8", 99, 9) == (7, 8)
    with pytest.raises(endpoints.InvalidInput):
        endpoints.read_cursor(cursor, 99, 9)


@pytest.mark.parametrize(("text", "found"), [
    ('{"a": 1, "b": "x", "c": 2}', {"a": 1, "b": "x"}), (b'{"a": 1}', {"a": 1, "b": None}),
    ('{"a": true, "b": []}', {"a": None, "b": None}), ("[1]", {"a": None, "b": None}),
    (b"\xff", {"a": None, "b": None}), ("[" * 100_000, {"a": None, "b": None}),
])
def test_fields_are_read_as_far_as_they_can_be(
    text: str | bytes, found: dict[str, Any]
) -> None:
    """Fields of the right types are found; of anything else, whatever it is, nothing."""
    assert endpoints.peek(text, a=(int,), b=(str, int)) == found


@pytest.mark.parametrize("look", [
    lambda text: endpoints.peek(text, a=(int,), x=(int,)),
    lambda text: endpoints.decode_json(msgspec.json.Decoder(messenger.Login), text)])
@pytest.mark.parametrize("text", [
    b'{"x": [' + b"[]," * 20_000 + b"1]}", b'{"' + b'": 1, "'.join(b"%d" % n for n in range(6_000))
    + b'": 1}'])
def test_nothing_is_made_of_what_is_not_wanted(look: Callable[[bytes], Any], text: bytes) -> None:
    """Of a text of another shape no objects are made, of which there would be thousands."""
    with contextlib.suppress(endpoints.InvalidInput):
        look(text)  # what it needs itself is there now
    tracemalloc.start()
    try:
        with contextlib.suppress(endpoints.InvalidInput):
            look(text)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(text)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", [b'{"email": 1, "x": "\xff"}', b'{"email": 1, "x": tru}'])
def test_text_of_a_wrong_shape_is_json_to_its_end(text: bytes) -> None:
    """What is no JSON is refused as such, though its shape was wrong before."""
    with pytest.raises(endpoints.MalformedRequest):
        endpoints.decode_json(msgspec.json.Decoder(messenger.Login), text)


@pytest.mark.parametrize("name", ["If-Modified-Since", "If-Unmodified-Since", "If-Range"])
@pytest.mark.parametrize("year", ["99999999999999999999", "9999999"])
async def test_date_that_does_not_exist_is_answered(
    server: TestServer, name: str, year: str
) -> None:
    """A request with a date beyond the calendar is refused or answered, and not hung up on."""
    for path in ("/", "/docs", "/api/v1/openapi.json", "/api/v1/health/liveness"):
        raw = await RawConnection.opens(server.port or 0, (
            f"GET {path} HTTP/1.1\r\nHost: a\r\nRange: bytes=0-1\r\n"
            f"{name}: Sun, 06 Nov {year} 08:49:37 GMT\r\n\r\n").encode())
        try:
            status, _, body = await raw.hears()
        finally:
            raw.close()
        assert status in (200, 206, 400), path
        assert status < 400 or json.loads(body)["type"] == "malformed-request"
