"""People, servers and databases for the tests: real PostgreSQL, real sockets, real processes."""

import asyncio
import contextlib
import itertools
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import aiohttp
import asyncpg
import psycopg
import pytest
import uvloop
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import messenger  # noqa: E402
from postgres import Postgres, migrate  # noqa: E402


def pytest_asyncio_loop_factories() -> dict[str, Any]:
    """Run every test on uvloop, as the server does: its transports are not asyncio's."""
    return {"uvloop": uvloop.new_event_loop}


ENOUGH = 1_000_000
SETTINGS = messenger.Settings(
    bcrypt_cost=4, messages_burst=ENOUGH, messages_per_second=ENOUGH, typing_per_second=ENOUGH,
    sockets_per_user=ENOUGH, refused_handshakes_per_second=ENOUGH,
    registrations_per_address=ENOUGH, login_failures_per_address=ENOUGH)
SECRET_KEY = "a key of the tests, longer than 32 bytes"
PASSWORD = "correct horse"
SOON_SECONDS = 5  # a generous deadline for what takes up to 2 s
HEAR_SECONDS = 10  # a generous deadline: nothing waits that long unless it is broken


def with_database(url: str, name: str) -> str:
    """Name another database of the same server."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL whose database `template` has the schema.

    TEST_DATABASE_URL names one of your own, whose role may create databases.
    """
    given = os.environ.get("TEST_DATABASE_URL")
    with asyncio.Runner() as runner:
        postgres = None if given else Postgres(tmp_path_factory.mktemp("data"))
        if postgres is not None:
            runner.run(postgres.start())
        url = given or postgres.dsn
        if postgres is not None:  # durability has tests with servers of their own
            runner.run(on_cluster(url, "alter system set fsync = off", "select pg_reload_conf()"))
        runner.run(on_cluster(url, "drop database if exists messenger_template"))
        runner.run(on_cluster(url, "create database messenger_template"))
        migrate(with_database(url, "messenger_template"), messenger.SQL)
        yield url
        runner.run(on_cluster(url, "drop database messenger_template"))
        if postgres is not None:
            runner.run(postgres.stop())


async def on_cluster(url: str, *statements: str) -> None:
    """Run statements that belong to no database."""
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


class Databases:
    """Clones of the template, each made while the test before runs: copying takes a while."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._numbers = itertools.count(1)
        self._thread = ThreadPoolExecutor(1)
        self._next = self._thread.submit(self._make)

    def _make(self) -> str:
        name = f"messenger_test_{os.getpid()}_{next(self._numbers)}"
        self._run(f"create database {name} template messenger_template strategy file_copy")
        return name

    def _run(self, statement: str) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            connection.execute(statement.encode())

    async def take(self) -> str:
        """Name a database that nobody else has."""
        made = self._next
        self._next = self._thread.submit(self._make)
        return await asyncio.wrap_future(made)

    def drop(self, name: str) -> None:
        """Drop a database, soon."""
        self._thread.submit(self._run, f"drop database {name} with (force)")

    def close(self) -> None:
        """Drop what is left."""
        self.drop(self._next.result())
        self._thread.shutdown()


@pytest.fixture(scope="session")
def databases(cluster: str) -> Iterator[Databases]:
    """The databases of the tests."""
    made = Databases(cluster)
    yield made
    made.close()


@pytest.fixture
async def database_url(cluster: str, databases: Databases) -> AsyncIterator[str]:
    """A database of the test's own, with the schema and nothing in it."""
    name = await databases.take()
    yield with_database(cluster, name)
    databases.drop(name)


@pytest.fixture
async def sql(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to the test's database, to look behind the server."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


@pytest.fixture
def app(database_url: str) -> web.Application:
    """The application on the test's database."""
    return messenger.make_app(SETTINGS, database_url, SECRET_KEY)


@pytest.fixture
async def server(app: Any, aiohttp_server: Callable[..., Awaitable[TestServer]]) -> TestServer:
    """The application, served on a free port."""
    return await aiohttp_server(app)


class Heard(dict[str, Any]):
    """A frame that a socket was sent."""


class Line:
    """An open websocket: what is said on it, what is heard on it."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws

    async def sends(self, **frame: Any) -> None:
        """Send a frame."""
        await self.ws.send_json(frame)

    async def says(self, text: str, **frame: Any) -> None:
        """Post a message."""
        await self.sends(type="message", text=text, **frame)

    async def hears(self, *types: str) -> Heard:
        """Wait for the next frame of one of the types (any, if none is named)."""
        async with asyncio.timeout(HEAR_SECONDS):
            while True:
                heard = await self.ws.receive()
                if heard.type is not aiohttp.WSMsgType.TEXT:
                    raise AssertionError(f"closed with {self.ws.close_code}, awaiting {types}")
                frame = Heard(heard.json())
                if not types or frame["type"] in types:
                    return frame

    async def hears_text(self, text: str) -> Heard:
        """Wait for the message with a text."""
        while True:
            frame = await self.hears("message", "message_updated")
            if frame["data"]["text"] == text:
                return frame

    async def hears_nothing(self, seconds: float = 0.3) -> None:
        """See that nothing comes for a moment."""
        with pytest.raises(asyncio.TimeoutError):
            await self.ws.receive(timeout=seconds)

    async def is_closed(self) -> int | None:
        """Wait until the server closes the socket, and answer the code."""
        async with asyncio.timeout(HEAR_SECONDS):
            while not self.ws.closed:
                await self.ws.receive()
        return self.ws.close_code

    async def close(self) -> None:
        """Hang up."""
        await self.ws.close()


class Person:
    """Somebody with an account, a session and an HTTP client of their own."""

    def __init__(self, client: TestClient[Any, Any], name: str) -> None:
        self.client = client
        self.name = name
        self.email = f"{name}@example.com"
        self.id = 0
        self.access = self.refresh = ""
        self.lines: list[Line] = []

    async def register(self) -> None:
        """Make the account."""
        body = {"email": self.email, "username": self.name, "password": PASSWORD}
        answer = await self.client.post("/api/v1/users", json=body)
        assert answer.status == 201, await answer.text()
        self.id = (await answer.json())["id"]

    async def logs_in(self) -> None:
        """Start a session."""
        body = {"email": self.email, "password": PASSWORD}
        answer = await self.client.post("/api/v1/users/login", json=body)
        assert answer.status == 200, await answer.text()
        tokens = await answer.json()
        self.access, self.refresh = tokens["access_token"], tokens["refresh_token"]

    @property
    def headers(self) -> dict[str, str]:
        """The header that says who is asking."""
        return {"Authorization": f"Bearer {self.access}"}

    async def asks(
        self, method: str, path: str, body: Any = None, **options: Any
    ) -> aiohttp.ClientResponse:
        """Send a request under /api/v1 (or to an absolute path of a Link) and read the answer."""
        if not path.startswith("/api/"):
            path = f"/api/v1{path}"
        if body is not None:
            options["json"] = body
        answer = await self.client.request(method, path, headers=self.headers, **options)
        await answer.read()
        return answer

    async def gets(self, path: str, status: int = 200) -> Any:
        """GET and expect a status."""
        return await self.expects(status, "GET", path)

    async def posts(self, path: str, body: Any = None, status: int = 201) -> Any:
        """POST and expect a status."""
        return await self.expects(status, "POST", path, body)

    async def expects(self, status: int, method: str, path: str, body: Any = None) -> Any:
        """Send a request, expect a status, answer the JSON."""
        answer = await self.asks(method, path, body)
        assert answer.status == status, f"{method} {path}: {answer.status} {await answer.text()}"
        return None if status == 204 else await answer.json()

    async def opens(self, *others: "Person") -> int:
        """Open the personal chat with another; answer its id."""
        body = {"is_group": False, "participant_ids": [other.id for other in others]}
        answer = await self.asks("POST", "/chats", body)
        assert answer.status in (200, 201), await answer.text()
        return int((await answer.json())["id"])

    async def founds(self, *others: "Person", name: str = "a group") -> int:
        """Create a group; answer its id."""
        ids = [other.id for other in others]
        body = {"is_group": True, "name": name, "participant_ids": ids}
        return int((await self.posts("/chats", body))["id"])

    async def says(self, chat: int, text: str, status: int = 201, **body: Any) -> Any:
        """Post a message over REST."""
        return await self.posts(f"/chats/{chat}/messages", {"text": text, **body}, status)

    async def reads(self, chat: int, message: Any) -> Any:
        """Read up to a message."""
        return await self.posts(f"/chats/{chat}/read", {"message_id": message["id"]}, 200)

    async def history(self, chat: int, query: str = "") -> list[str]:
        """Answer the texts of a page of the history."""
        return [m["text"] for m in await self.gets(f"/chats/{chat}/messages{query}")]

    async def listens(self, chat: int, query: str = "", **options: Any) -> Line:
        """Open a socket on a chat."""
        options.setdefault("headers", self.headers)
        line = Line(await self.client.ws_connect(f"/ws/{chat}{query}", **options))
        self.lines.append(line)
        return line

    async def listens_live(self, chat: int, query: str = "") -> Line:
        """Open a socket on a chat and wait until it is live."""
        line = await self.listens(chat, query)
        await line.hears("ready")
        return line


async def pages(person: Person, path: str) -> list[list[Any]]:
    """Follow `next` from a page of a list to the end."""
    found = []
    start = f"/api/v1{path.split('?')[0]}?"
    while path:
        answer = await person.asks("GET", path)
        assert answer.status == 200, await answer.text()
        found.append(await answer.json())
        link = answer.links.get("next")
        path = str(link["url"].relative()) if link else ""
        assert path.startswith(start) or not path
        assert "prev" not in answer.links
    return found


def processes_in(folder: Path) -> set[int]:
    """Answer the pids of every process whose working folder is `folder` or below it."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if (entry / "cwd").readlink().is_relative_to(folder):
                found.add(int(entry.name))
    return found


@pytest.fixture
async def people(
    server: TestServer, aiohttp_client: Callable[..., Awaitable[TestClient[Any, Any]]]
) -> AsyncIterator[Callable[[str], Awaitable[Person]]]:
    """Make people by name: registered and logged in, each with a client of their own."""
    made: list[Person] = []

    async def make(name: str) -> Person:
        person = Person(await aiohttp_client(server), name)
        made.append(person)
        await person.register()
        await person.logs_in()
        return person

    yield make
    for person in made:
        for line in person.lines:
            await line.close()


@pytest.fixture
async def alice(people: Callable[[str], Awaitable[Person]]) -> Person:
    """Alice."""
    return await people("alice")


@pytest.fixture
async def bob(people: Callable[[str], Awaitable[Person]]) -> Person:
    """Bob."""
    return await people("bob")


@pytest.fixture
async def carol(people: Callable[[str], Awaitable[Person]]) -> Person:
    """Carol."""
    return await people("carol")


def new_id() -> str:
    """Make a message id, as a client does."""
    return str(uuid4())


# ---- Two servers on one database


class Elsewhere:
    """A second server on the same database, and the way of people to it."""

    def __init__(self, app: web.Application, make_client: Callable[[], Awaitable[Any]]) -> None:
        self.app = app
        self.people: list[Person] = []
        self._make_client = make_client

    async def takes(self, person: Person) -> Person:
        """Answer the same person, with the same session, as a client of this server."""
        same = Person(await self._make_client(), person.name)
        same.id, same.access, same.refresh = person.id, person.access, person.refresh
        self.people.append(same)
        return same


@pytest.fixture
async def elsewhere(
    database_url: str,
    aiohttp_server: Callable[..., Awaitable[TestServer]],
    aiohttp_client: Callable[..., Awaitable[TestClient[Any, Any]]],
) -> AsyncIterator[Elsewhere]:
    """A second server on the test's database."""
    app = messenger.make_app(SETTINGS, database_url, SECRET_KEY)
    server = await aiohttp_server(app)
    made = Elsewhere(app, lambda: aiohttp_client(server))
    yield made
    for person in made.people:
        for line in person.lines:
            await line.close()
    await server.close()


@pytest.fixture(params=["with hints", "without hints"])
def hints(
    request: pytest.FixtureRequest, app: web.Application, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Once with the hints of the first server, once with all of them lost."""
    if request.param == "without hints":
        monkeypatch.setattr(app[messenger.BUS], "publish", lambda key, hint: None)
    return str(request.param)


@pytest.fixture
def no_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make what is heard be heard by hint alone. Comes before `app`."""
    monkeypatch.setattr(messenger, "POLL_SECONDS", 3600)


async def knows(person: Person, chat: int, line: Line) -> None:
    """Post until a line at another server hears it: from then on both listen for hints."""
    async with asyncio.timeout(SOON_SECONDS):
        hearing = asyncio.create_task(line.hears("message"))
        posted = 0
        while not hearing.done():
            posted = (await person.says(chat, "knock"))["seq"]
            await asyncio.wait([hearing], timeout=0.05)
        while (await hearing)["data"]["seq"] < posted:
            hearing = asyncio.create_task(line.hears("message"))
