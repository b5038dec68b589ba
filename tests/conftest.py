"""The fixtures that several modules use; what they make is in tests/support."""

import asyncio
import itertools
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import uvloop
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

import messenger
from support.databases import (
    Databases,
    cluster_with_template,
    drop_database,
    on_cluster,
    with_database,
)
from support.fuzzing import Population, fuzzed_server
from support.patience import begin
from support.people import Person
from support.quick import keep_data_in_memory, shorten_stacks
from support.raw import RawLine
from support.servers import (
    ROOT,
    SECRET_KEY,
    SETTINGS,
    Elsewhere,
    Server,
    nothing_left_in,
    people_elsewhere,
)
from support.valid_calls import ValidCalls, make_valid_calls

keep_data_in_memory()
shorten_stacks()
numbers = itertools.count(1)

TESTS = Path(__file__).parent
# The files that take longest.
LONGEST = [
    "torture/test_torture.py", "api/test_web.py", "processes/test_start.py",
    "invariants/test_invariants.py", "processes/test_listening.py",
    "invariants/test_fuzz_api.py", "invariants/test_model.py", "api/test_access.py",
    "processes/test_workers.py", "processes/test_backup.py", "processes/test_administer.py",
    "processes/test_run.py", "processes/test_rolling.py", "plumbing/test_websocket.py",
]


def pytest_asyncio_loop_factories() -> dict[str, Any]:
    """Run every test on uvloop, as the server does: its transports are not asyncio's."""
    return {"uvloop": uvloop.new_event_loop}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: else one worker is left with them in the end."""
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(autouse=True)
def patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether servers wait longer than usual for their database; see tests/support/patience.py."""
    is_longer = request.node.get_closest_marker("real_deadlines") is None
    if is_longer:
        begin(monkeypatch)
    return is_longer


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL whose database TEMPLATE has the schema."""
    with cluster_with_template(lambda: tmp_path_factory.mktemp("data")) as url:
        yield url


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
async def empty_url(cluster: str) -> AsyncIterator[str]:
    """A database of the test's own with nothing in it."""
    name = f"messenger_empty_{os.getpid()}_{next(numbers)}"
    await on_cluster(cluster, f"create database {name} template template0")
    yield with_database(cluster, name)
    drop_database(cluster, name)


@pytest.fixture
async def sql(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to the test's database, to look behind the server."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


@pytest.fixture
def no_upkeep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the server from tidying up by itself, which could come between. Comes before `app`."""

    async def does_nothing(app: web.Application) -> None:
        pass

    monkeypatch.setattr(messenger, "keep_tidy", does_nothing)


@pytest.fixture
def app(database_url: str) -> web.Application:
    """The application on the test's database."""
    return messenger.make_app(SETTINGS, database_url, SECRET_KEY)


@pytest.fixture
async def server(app: Any, aiohttp_server: Callable[..., Awaitable[TestServer]]) -> TestServer:
    """The application, served on a free port."""
    return await aiohttp_server(app)


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


@pytest.fixture
async def dave(people: Callable[[str], Awaitable[Person]]) -> Person:
    """Dave."""
    return await people("dave")


# ---- Two servers on one database


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
        monkeypatch.setattr(app[messenger.BUS], "notify", lambda key, hint: None)
    return str(request.param)


@pytest.fixture
def no_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make what is heard be heard by hint alone. Comes before `app`."""
    monkeypatch.setattr(messenger, "POLL_SECONDS", 3600)


# ---- Raw sockets


@pytest.fixture
async def raw(server: TestServer) -> AsyncIterator[Callable[..., Awaitable[RawLine]]]:
    """Open raw sockets on a chat: `await raw(person, chat, query, receive_bytes=...)`."""
    opened: list[RawLine] = []

    async def open_raw(person: Person, chat: int, query: str = "", **options: Any) -> RawLine:
        opened.append(RawLine())
        path = f"/ws/{chat}{query}"
        return await opened[-1].opens(server.port or 0, path, person.access, **options)

    yield open_raw
    for line in opened:
        line.socket.close()


# ---- Servers of their own processes


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that was started on nothing and stopped again: what it said, and its data."""
    server = Server(tmp_path_factory.mktemp("template"))

    async def make() -> None:
        await server.starts()
        assert await server.stops() == 0

    asyncio.run(make())
    yield server
    shutil.rmtree(server.folder)


@pytest.fixture
def data_folder(template: Server, tmp_path: Path) -> Path:
    """The data folder of a server in the test's folder: its first start is over."""
    return Path(shutil.copytree(template.data, tmp_path / "data"))


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """Whatever a test starts in its folder has ended with it, and if not, ends now."""
    with nothing_left_in(tmp_path):
        yield


@pytest.fixture
async def running(data_folder: Path, patience: bool) -> AsyncIterator[Server]:
    """A started server, stopped after the test."""
    server = Server(data_folder.parent)
    if not patience:
        server.program = ROOT / "messenger.py"
    yield await server.starts()
    if server.process.returncode is None:
        await server.stops()


@pytest.fixture
async def people_of() -> AsyncIterator[Callable[..., Awaitable[Person]]]:
    """Make people of a server in another process: `await people_of(server, "alice")`."""
    async with people_elsewhere() as make:
        yield make


# ---- What is asked wrongly


@pytest.fixture
async def calls(alice: Person, bob: Person, carol: Person) -> ValidCalls:
    """A valid call of every endpoint."""
    return await make_valid_calls(alice, bob, carol)


@pytest.fixture
async def fuzzed(database_url: str, tmp_path: Path) -> AsyncIterator[Server]:
    """A server that limits nobody's rate; afterwards it is still up, and has logged no error."""
    async with fuzzed_server(database_url, tmp_path) as server:
        yield server


@pytest.fixture
async def population(fuzzed: Server, people_of: Any) -> Population:
    """The people of the fuzzed server."""
    return await Population(fuzzed, people_of).fills()
