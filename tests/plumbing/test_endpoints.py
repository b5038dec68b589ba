"""What no handler sees: requests that cannot be parsed, and those that come too slowly."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

import messenger
from plumbing import endpoints, process
from support.people import HEAR_SECONDS
from support.raw import RawConnection
from support.servers import SETTINGS

Connects = Callable[[bytes], Awaitable[RawConnection]]


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
        assert headers["Cache-Control"] == "no-store"
        assert problem.keys() == {"type", "title", "status", "detail", "request_id"}
        assert problem["request_id"] == headers["X-Request-Id"]
        assert await raw.is_cut(), text[:60]


@pytest.fixture
async def hasty(
    app: web.Application, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Connects]:
    """Connect to a server that waits for no request over a second, nor for a body."""
    monkeypatch.setattr(messenger, "IDLE_SECONDS", 1)
    monkeypatch.setattr(endpoints, "BODY_SECONDS", 1)
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(process.listen_on("127.0.0.1", 0))
        await messenger.start_sites(SETTINGS, stack, listener, app)
        port = listener.getsockname()[1]

        async def call(text: bytes) -> RawConnection:
            raw = await RawConnection.opens(port, text)
            stack.callback(raw.close)
            return raw

        yield call


async def test_slow_headers_are_cut(hasty: Any) -> None:
    """A connection that sends nothing, stops in its headers or sends them letter by letter is
    closed, also after a first good request."""
    whole = b"GET /api/v1/health/liveness HTTP/1.1\r\nHost: a\r\n\r\n"

    async def dribbles(raw: RawConnection) -> bool:
        with_cut = asyncio.create_task(raw.is_cut())
        while not with_cut.done():
            raw.writer.write(b"X")
            await asyncio.wait([with_cut], timeout=0.2)
        return await with_cut

    async def after_a_good_one(rest: bytes) -> bool:
        raw = await hasty(whole)
        assert (await raw.hears())[0] == 200
        raw.writer.write(rest)
        return await (dribbles(raw) if rest else raw.is_cut())

    async with asyncio.timeout(HEAR_SECONDS):
        cut = await asyncio.gather(
            (await hasty(b"")).is_cut(),
            (await hasty(b"GET / HT")).is_cut(),
            (await hasty(b"GET / HTTP/1.1\r\nHost: a\r\nX")).is_cut(),
            dribbles(await hasty(b"GET / HTTP/1.1\r\nHost: a\r\nX: ")),
            after_a_good_one(b""),
            after_a_good_one(whole[:-2]),
        )
    assert cut == [True] * 6


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
