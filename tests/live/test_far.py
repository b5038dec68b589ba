"""The whole server on a database that is far: nobody is refused for the length of the line."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

import messenger
from support.people import Person, follows
from support.servers import SECRET_KEY, SETTINGS
from support.wire import Wire

pytestmark = pytest.mark.real_deadlines

IS_LONG = os.environ.get("FUZZ") == "long"
ROUND_TRIP_SECONDS = 0.3 if IS_LONG else 0.1
TIMES = 2 if IS_LONG else 1
PREPARED_SECONDS = 300 * ROUND_TRIP_SECONDS  # a generous deadline


@pytest.fixture
async def far(database_url: str) -> AsyncIterator[Wire]:
    """The way to the database."""
    async with Wire(database_url).open() as wire:
        wire.delay = ROUND_TRIP_SECONDS / 2
        yield wire


@pytest.fixture
def app(far: Wire) -> web.Application:
    """The application at the end of it."""
    return messenger.make_app(SETTINGS, far.url, SECRET_KEY)


async def meet(client: TestClient[Any, Any], number: int) -> None:
    """Let two new people do what people do; nothing may be refused."""
    alice, bob = Person(client, f"alice{number}"), Person(client, f"bob{number}")
    for person in (alice, bob):
        await person.register()
        await person.logs_in()
    chat = await alice.opens(bob)
    line = await follows(bob)
    posted = await alice.says(chat, "hello")
    assert (await line.hears_text("hello"))["data"]["id"] == posted["id"]
    await bob.reads(chat, posted)
    await alice.expects(200, "PATCH", f"/chats/{chat}/messages/{posted['id']}", {"text": "hi"})
    assert await bob.history(chat) == ["hi"]
    assert await bob.gets("/chats")
    await line.close()


async def test_calls_are_served_once_statements_are_prepared(
    server: TestServer, aiohttp_client: Callable[..., Awaitable[TestClient[Any, Any]]]
) -> None:
    """The first calls may be refused; within a while they all are served, each in time."""
    client, served = await aiohttp_client(server), 0
    async with asyncio.timeout(PREPARED_SECONDS):
        for number in itertools.count():
            try:
                await meet(client, number)
                served += 1
            except AssertionError as refused:
                if "service-unavailable" not in str(refused):
                    raise
                served = 0
                await asyncio.sleep(ROUND_TRIP_SECONDS)
            if served == TIMES:  # one after the other
                return
