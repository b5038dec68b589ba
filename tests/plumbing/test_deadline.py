"""One deadline over all that a request waits for, and what does not count."""

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import pytest
from aiohttp import web

from plumbing.database import Database, Unavailable
from plumbing.deadline import REQUEST_SECONDS, RequestDeadline, deadline, linger, uncounted
from plumbing.endpoints import CallSlots, Endpoint, answer_problems, bind
from plumbing.groups import Outcome
from plumbing.guard import Slots, Tally, Turns
from support.people import Person
from support.raw import RawConnection
from support.writers import Echo

pytestmark = pytest.mark.real_deadlines

BOUND_SECONDS = 7  # a generous deadline: what it bounds would take ten seconds without one
MANY = 17
DATABASE = web.AppKey("database", Database)


async def rest(request: web.Request, *, naps: Annotated[int, msgspec.Meta(ge=1)]) -> int:
    """Run several statements, each of which is quick enough by itself."""
    for _ in range(naps):
        await request.app[DATABASE].rows("select pg_sleep(0.6)")
    return naps


async def echo(request: web.Request, body: str) -> str:
    """Run a statement once the body is there."""
    await request.app[DATABASE].rows("select pg_sleep(0.1)")
    return body


async def everybody(_request: web.Request) -> int:
    """Let everybody in, as one person."""
    return 1


@pytest.fixture
async def resting(database_url: str, aiohttp_client: Callable[..., Any]) -> Any:
    """A client of a server with those two."""
    slots = CallSlots(
        Slots(0), Slots(0), Slots(0), Slots(0), None, Turns(80), *[Turns(1) for _ in range(5)],
        lambda _: "", Tally())
    app = web.Application(middlewares=[answer_problems(lambda *_: None, lambda _: None, slots)])
    app[DATABASE] = Database(database_url)
    for endpoint in (Endpoint("GET", "/rest", rest), Endpoint("POST", "/echo", echo)):
        handler = bind(endpoint, everybody, {}, slots)
        app.router.add_route(endpoint.method, endpoint.path, handler)
    client = await aiohttp_client(app)
    yield client
    await app[DATABASE].close()


async def test_statements_of_a_request_share_a_deadline(resting: Any) -> None:
    """A request of many statements is 503 once they took too long together."""
    assert (await resting.get("/rest?naps=1")).status == 200
    began = time.monotonic()
    assert (await resting.get(f"/rest?naps={MANY}")).status == 503
    assert time.monotonic() - began < BOUND_SECONDS


async def test_wait_for_a_connection_counts(resting: Any) -> None:
    """Of many requests at once those that get no connection in time are 503, the others served."""
    began = time.monotonic()
    answers = await asyncio.gather(*[resting.get("/rest?naps=2") for _ in range(80)])
    assert time.monotonic() - began < BOUND_SECONDS
    assert 503 in {answer.status for answer in answers} <= {200, 503}


async def test_body_that_takes_longer_is_not_cut_off(resting: Any) -> None:
    """The time in which a body arrives is its sender's, and does not count."""
    head = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"
    raw = await RawConnection.opens(resting.server.port, head + b'"a')
    await asyncio.sleep(REQUEST_SECONDS + 0.5)
    raw.writer.write(b'b"')
    status, _, body = await raw.hears()
    assert (status, body) == (200, b'"ab"\n')
    raw.close()


class Slow(Echo[int]):
    """A writer whose commits take a second each."""

    async def commit(self, items: list[int]) -> list[int]:
        """Answer the items."""
        await asyncio.sleep(1)
        return items


async def test_commit_that_comes_too_late_is_not_waited_for() -> None:
    """A request that spent its time waits no longer for a commit, which happens all the same."""
    writer = Slow()
    told: list[Outcome | Exception] = []
    with RequestDeadline():
        await asyncio.sleep(REQUEST_SECONDS - 0.3)
        with pytest.raises(Unavailable):
            await writer.submit(1, "")
    writer.put(2, "", told.append)
    await writer.finish()
    assert told == [2]


async def test_task_that_a_request_starts_has_no_deadline() -> None:
    """What goes on after the answer is not bounded by it; a frame has a deadline of its own."""
    async def work() -> float | None:
        return deadline()

    assert deadline() is None
    with RequestDeadline():
        of_request = deadline()
        assert of_request is not None
        assert await asyncio.create_task(work()) is None
        assert await work() == of_request
        await asyncio.sleep(0.05)
        with RequestDeadline():
            of_frame = deadline()
            assert of_frame is not None
            assert of_frame > of_request
        with uncounted():
            await asyncio.sleep(0.1)
        put_off = deadline()
        assert put_off is not None
        assert put_off - of_request >= 0.09
    assert deadline() is None


async def test_frame_is_a_request_of_its_own(alice: Person, bob: Person) -> None:
    """On a socket that is open for longer than a request may take, frames are served."""
    chat = await alice.opens(bob)
    posted = await alice.says(chat, "hello")
    line = await bob.listens_live(chat)
    await asyncio.sleep(REQUEST_SECONDS + 0.2)
    await line.sends(type="read", message_id=posted["id"])
    assert (await line.hears("read", "error"))["type"] == "read"
    await line.sends(type="sync", after=0)
    assert (await line.hears("message", "error"))["data"]["text"] == "hello"


async def test_task_that_is_waited_for_a_while_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who lingers waits for the end of a task, or as long as they may; the task itself goes on."""
    monkeypatch.setattr("plumbing.deadline.REQUEST_SECONDS", 0.1)
    done, loop = asyncio.Event(), asyncio.get_running_loop()
    task = loop.create_task(asyncio.wait_for(done.wait(), 60))
    began = loop.time()
    await linger(task, 0.05)
    with RequestDeadline():
        await linger(task, 60)
    assert loop.time() - began < BOUND_SECONDS
    assert not task.done()
    done.set()
    await linger(task, 60)
    assert task.done()
