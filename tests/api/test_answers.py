"""What every answer has, whatever it is: the id of its request, and when to try again."""

import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import msgspec
import pytest
from aiohttp.test_utils import TestClient, TestServer

import messenger
from plumbing.guard import Rate
from support.databases import on_cluster
from support.people import Line, Person, follows
from support.raw import RawConnection
from support.servers import SECRET_KEY, SETTINGS
from support.valid_calls import ValidCalls

HEADER = "X-Request-Id"
MADE = re.compile("[A-Za-z0-9._-]{8,64}")  # unlike any of those that are sent here
FIT = ("a", "7", ".", "-_-", "Zz09._-", "x" * 64)
UNFIT = ("", "x" * 65, "a b", "a,b", "a/b", '"x"', "<x>", "a:b", "é", "a\tb", "%41", "x" * 2000)
SITE = "https://app.example"
SLOW = 900  # seconds until a limit allows one more

# ---- The id of a request


async def test_request_keeps_the_id_that_its_client_gave(calls: ValidCalls) -> None:
    """Each endpoint answers with its caller's own id, whether it takes or refuses the request, and
    each problem tells it."""
    for endpoint in messenger.ENDPOINTS:
        if endpoint.handler is messenger.delete_user:
            continue  # alice is needed
        bad = endpoint.path.format(**dict.fromkeys(calls.ids, "x"))
        for path, raw, token in (
            (calls.path(endpoint), b"{", calls.alice.headers["Authorization"]),
            (bad, None, calls.alice.headers["Authorization"]),
            (calls.path(endpoint), None, "Bearer x"),
            (calls.path(endpoint), None, calls.alice.headers["Authorization"]),
        ):
            for method in {endpoint.method, "HEAD", "PROPFIND"}:
                headers = {"Authorization": token, HEADER: f"own.{method}"}
                answer = await calls.client.request(method, path, data=raw, headers=headers)
                assert answer.headers.getall(HEADER) == [f"own.{method}"], (method, path)
                if answer.content_type == "application/problem+json" and method != "HEAD":
                    assert (await answer.json())["request_id"] == f"own.{method}", (method, path)
        if endpoint.handler is messenger.logout:
            await calls.alice.logs_in()


async def test_only_an_id_that_is_fit_for_a_log_is_kept(alice: Person) -> None:
    """An id of other characters, an empty or a long one is replaced, each time by another."""
    for given in FIT:
        answer = await alice.asks("GET", "/users/0", headers={HEADER: given})
        assert answer.headers[HEADER] == (await answer.json())["request_id"] == given
    made = []
    for given in (None, *UNFIT):
        more = {} if given is None else {HEADER: given}
        answer = await alice.asks("GET", "/users/0", headers=more)
        assert answer.headers[HEADER] == (await answer.json())["request_id"], given
        made.append(answer.headers[HEADER])
    assert all(MADE.fullmatch(each) for each in made), made
    assert len(set(made)) == len(made)


async def test_every_kind_of_answer_has_an_id(
    database_url: str, aiohttp_client: Callable[..., Awaitable[TestClient[Any, Any]]]
) -> None:
    """A page, a document, what a cache has already, a preflight, an unknown path and an expectation
    that nobody can meet are answered with an id; a site's pages may read and send it."""
    settings = msgspec.structs.replace(SETTINGS, cors_origins=SITE)
    client = await aiohttp_client(messenger.make_app(settings, database_url, SECRET_KEY))
    asking = {"Origin": SITE, "Access-Control-Request-Method": "GET",
              "Access-Control-Request-Headers": HEADER}
    later = {"If-Modified-Since": "Fri, 01 Jan 2100 00:00:00 GMT"}
    for method, path, status, headers in (
        ("GET", "/", 200, {}), ("GET", "/docs", 200, {}), ("GET", "/", 304, later),
        ("GET", "/api/v1/openapi.json", 200, {}), ("HEAD", "/api/v1/asyncapi.json", 200, {}),
        ("GET", "/api/v1/health/readiness", 200, {}), ("OPTIONS", "/api/v1/chats", 204, asking),
        ("OPTIONS", "/nothing", 204, asking), ("GET", "/nothing", 404, {}),
        ("OPTIONS", "/", 405, {}), ("GET", "/", 417, {"Expect": "nonsense"}),
        ("GET", "/nothing", 417, {"Expect": "nonsense"}),
    ):
        answer = await client.request(method, path, headers=headers | {HEADER: "mine"})
        assert (answer.status, answer.headers.getall(HEADER)) == (status, ["mine"]), path
        if status >= 400:
            assert (await answer.json())["request_id"] == "mine", path
        if headers is asking:
            assert HEADER in answer.headers["Access-Control-Allow-Headers"].split(", ")
            assert HEADER in answer.headers["Access-Control-Expose-Headers"].split(", ")


async def test_socket_tells_the_id_of_its_handshake(alice: Person, bob: Person) -> None:
    """The answer to a handshake has an id, whether it opens a socket or not, and each error frame
    of the socket tells it: of what is no JSON, of a wrong frame, of one refused later."""
    chat = await alice.opens(bob)
    named = alice.headers | {HEADER: "shake.1"}
    for path in (f"/ws/{chat}", "/ws"):
        answer = await alice.client.get(path, headers=named)
        assert (answer.status, answer.headers[HEADER]) == (426, "shake.1")
        answer = await alice.client.get(path, headers={HEADER: "shake.2"})
        assert (answer.status, (await answer.json())["request_id"]) == (401, "shake.2")
    open_each = (alice.listens(chat, headers=named), follows(alice, headers=named))
    for line in [await each for each in open_each]:
        assert shown(line) == "shake.1"
        await line.ws.send_str("{")
        await line.sends(type="message", chat_id=chat)
        await line.sends(type="message", chat_id=chat, text="x", reply_to=str(messenger.uuid7()))
        await line.sends(type="sync", chats={"999999": 0})
        for _ in range(4):
            assert (await line.hears("error"))["data"]["request_id"] == "shake.1"
    line = await alice.listens(chat)
    await line.sends(type="nothing")
    assert (await line.hears("error"))["data"]["request_id"] == shown(line)
    assert MADE.fullmatch(shown(line))


def shown(line: Line) -> str:
    """The id that the answer to a socket's handshake has."""
    [told] = line.ws._response.headers.getall(HEADER)
    return str(told)


@pytest.fixture
async def wire(server: TestServer) -> AsyncIterator[RawConnection]:
    """A connection over which anything can be sent."""
    raw = await RawConnection.opens(server.port, b"")
    yield raw
    raw.close()


async def test_request_that_cannot_be_parsed_gets_an_id(wire: RawConnection) -> None:
    """What is no HTTP is answered with an id that was made for it, also after a good request."""
    wire.writer.write(b"GET /docs HTTP/1.1\r\nHost: a\r\nX-Request-Id: good\r\n\r\n")
    assert (await wire.hears())[1][HEADER] == "good"
    wire.writer.write(b"GET / HTTP/9.9\r\nX-Request-Id: bad\r\n\r\n")
    status, headers, body = await wire.hears()
    assert (status, headers[HEADER]) == (400, msgspec.json.decode(body)["request_id"])
    assert MADE.fullmatch(headers[HEADER])


async def test_fault_is_logged_under_the_id_of_its_request(
    alice: Person, bob: Person, sql: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody foresaw is logged with the route and the id, of a frame with its handshake's id;
    nothing else that was sent is in that line."""
    chat = await alice.opens(bob)
    line = await alice.listens(chat, headers=alice.headers | {HEADER: "shake"})
    every = await follows(alice, headers=alice.headers | {HEADER: "all"})
    await line.hears("ready")
    await sql.execute("alter table participants rename column user_id to gone")
    caplog.set_level(logging.ERROR, "messenger")
    caplog.clear()
    for path, named in ((f"/chats/{chat}", "one"), ("/chats?limit=1", "two")):
        answer = await alice.asks("GET", path, headers={HEADER: named})
        assert (answer.status, (await answer.json())["request_id"]) == (500, named)
    await line.says("x", ref=1)
    await every.sends(type="typing", chat_id=chat)
    for each in (line, every):
        assert (await each.hears("error"))["data"]["type"] == "internal-error"
    messages = [record.getMessage() for record in caplog.records]
    for expected in (
        "GET /api/v1/chats/{chat_id} failed, request one",
        "GET /api/v1/chats failed, request two",
        "a frame could not be taken, request shake",
        "a frame could not be taken, request all",
    ):
        assert messages.count(expected) == 1, (expected, messages)


# ---- When to try again


async def test_problem_tells_when_to_try_again(
    alice: Person, bob: Person, database_url: str, cluster: str, sql: asyncpg.Connection,
    aiohttp_client: Callable[..., Awaitable[TestClient[Any, Any]]],
) -> None:
    """A problem with 429 or 503 tells `retry_after` in seconds, over REST as Retry-After does, and
    so does an error frame; no other problem has it."""
    strict = msgspec.structs.replace(
        SETTINGS, sockets_per_user=1, login_failures_per_account=1)
    app = messenger.make_app(strict, database_url, SECRET_KEY)
    app[messenger.RATES][messenger.TooManyMessages] = Rate(1, 1 / SLOW)
    app[messenger.RATES][messenger.TooMuchTyping] = Rate(1, 1 / SLOW)
    here = Person(await aiohttp_client(app), "alice")
    here.access, chat = alice.access, await alice.opens(bob)
    line = await here.listens_live(chat)
    await here.says(chat, "first")
    wrong = {"email": bob.email, "password": "a wrong one"}
    await here.client.post("/api/v1/users/login", json=wrong)
    for method, path, body, kind in (
        ("POST", f"/api/v1/chats/{chat}/messages", {"text": "x"}, "too-many-messages"),
        ("POST", "/api/v1/users/login", wrong, "too-many-attempts"),
        ("GET", "/ws", None, "too-many-sockets"),
    ):
        answer = await here.client.request(method, path, json=body, headers=here.headers)
        assert (answer.status, (await answer.json())["type"]) == (429, kind)
        told = (await answer.json())["retry_after"]
        assert type(told) is int
        assert told == int(answer.headers["Retry-After"]) >= 1
    for frame in ({"type": "typing"}, {"type": "typing"}, {"type": "message", "text": "x"}):
        await line.sends(**frame)
    for kind in ("too-much-typing", "too-many-messages"):
        problem = (await line.hears("error"))["data"]
        assert (problem["type"], problem["retry_after"] >= 1) == (kind, True)
    await line.sends(type="nothing")
    assert "retry_after" not in (await line.hears("error"))["data"]

    name = await sql.fetchval("select current_database()")
    ended = f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'"
    await on_cluster(cluster, f"alter database {name} allow_connections false", ended)
    answer = await alice.asks("GET", "/chats")
    told = (await answer.json())["retry_after"]
    assert (answer.status, told) == (503, int(answer.headers["Retry-After"]))
    await line.sends(type="read", message_id=str(messenger.uuid7()))
    problem = (await line.hears("error"))["data"]
    assert (problem["type"], problem["retry_after"]) == ("service-unavailable", 1)
    await on_cluster(cluster, f"alter database {name} allow_connections true")
    answer = await alice.asks("GET", "/users/0")
    assert "retry_after" not in await answer.json()
