"""A database that refuses whom it let in before, hangs or may only be read: 503, and good after.
"""

import asyncio
import itertools
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import REGISTRY

import messenger
from plumbing.database import SILENCE_SECONDS, TEND_SECONDS
from plumbing.embedded import Postgres
from plumbing.schema import migrate
from support.people import SOON_SECONDS, Person, new_id
from support.servers import SECRET_KEY, SETTINGS


class Cluster:
    """A PostgreSQL of the test's own, with a role that the server uses, and a server on it."""

    def __init__(self, postgres: Postgres) -> None:
        self.postgres = postgres
        self.url = f"{postgres.dsn}&user=app&password=old".replace("messenger@", "")

    async def does(self, *statements: str) -> None:
        """Run statements as the superuser."""
        connection = await asyncpg.connect(
            self.postgres.dsn, server_settings={"default_transaction_read_only": "off"})
        for statement in statements:
            await connection.execute(statement)
        await connection.close()


pytestmark = pytest.mark.real_deadlines
HANG_UP = "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'app'"
RELOAD = "select pg_reload_conf()"


@pytest.fixture
async def cluster_of_one(tmp_path: Path) -> AsyncIterator[Cluster]:
    """Start it; the role needs its password."""
    postgres = Postgres(tmp_path)
    await postgres.start()
    cluster = Cluster(postgres)
    await cluster.does("create role app login password 'old'", "grant all on schema public to app")
    access = tmp_path / "postgres/pg_hba.conf"
    access.write_text(f"local all app scram-sha-256\n{access.read_text()}")
    await cluster.does(RELOAD)
    await asyncio.to_thread(migrate, cluster.url, messenger.SQL)
    yield cluster
    await postgres.stop()


@pytest.fixture
async def app_of_one(
    cluster_of_one: Cluster, aiohttp_server: Callable[..., Any], aiohttp_client: Callable[..., Any]
) -> tuple[TestServer, TestClient[Any, Any]]:
    """A server on it, and a client."""
    app = messenger.make_app(SETTINGS, cluster_of_one.url, SECRET_KEY)
    server = await aiohttp_server(app)
    return server, await aiohttp_client(server)


async def status(client: TestClient[Any, Any], path: str = "/api/v1/health/readiness") -> int:
    """Ask, and answer the status."""
    async with client.get(path) as answer:
        await answer.read()
        return answer.status


async def becomes_ready(client: TestClient[Any, Any]) -> None:
    """Wait until the server is ready again."""
    async with asyncio.timeout(SOON_SECONDS):
        while await status(client) != 200:
            await asyncio.sleep(0.05)


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says of the database; it says nothing twice."""
    said = [
        record.getMessage() for record in caplog.records
        if record.levelno >= logging.WARNING and record.name == "messenger.database"]
    assert len(set(said)) == len(said), said
    return said


async def until_up(value: float) -> None:
    """Wait until the metric of the database has a value."""
    async with asyncio.timeout(SOON_SECONDS):
        while REGISTRY.get_sample_value("messenger_database_up") != value:
            await asyncio.sleep(0.05)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Whether it is away or back by the log, however many reasons that had."""
    return [kind for kind, _ in itertools.groupby(
        each.split(" (")[0] for each in reasons(caplog))]


REFUSALS = {
    "rotated password": ("alter role app password 'new'", "alter role app password 'old'"),
    "role without login": ("alter role app nologin", "alter role app login"),
    "database without connections": (
        "alter database postgres connection limit 0", "alter database postgres connection limit 9"),
    "role that was renamed": ("alter role app rename to gone", "alter role gone rename to app"),
}


@pytest.mark.parametrize("why", REFUSALS)
async def test_refused_connection_is_503(
    cluster_of_one: Cluster, app_of_one: Any, caplog: Any, why: str
) -> None:
    """Whatever the reason for which PostgreSQL lets nobody in, calls are 503 and readiness too; it
    is logged once, and so is the return, after which everything works.
    """
    _, client = app_of_one
    alice = Person(client, "alice")
    await alice.register()
    await alice.logs_in()
    shut, opened = REFUSALS[why]
    superuser = await asyncpg.connect(cluster_of_one.postgres.dsn)
    await superuser.execute(shut)
    # A renamed role goes by its new name in the list, hence everybody but us.
    await superuser.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where pid <> pg_backend_pid() and usename in ('app', 'gone')")
    for _ in range(3):
        assert await status(client) == 503
        answer = await alice.asks("GET", "/chats")
        assert (answer.status, (await answer.json())["type"]) == (503, "service-unavailable")
    await superuser.execute(opened)
    if why == "role that was renamed":  # which takes its password away
        await superuser.execute("alter role app password 'old'")
    await superuser.close()
    await becomes_ready(client)
    await alice.gets("/chats")
    assert told(caplog) == ["the database is away", "the database is back"]


@pytest.mark.parametrize("how", [
    "alter role app set default_transaction_read_only = {}",
    "alter database postgres set default_transaction_read_only = {}",
    "alter system set default_transaction_read_only = {}",
])
async def test_read_only_database_is_503_and_heals(
    cluster_of_one: Cluster, app_of_one: Any, caplog: Any, how: str
) -> None:
    """While nothing may be written, posts are 503 and so is readiness; what was posted afterwards
    is there, though connections were opened in between.
    """
    _, client = app_of_one
    alice, bob = Person(client, "alice"), Person(client, "bob")
    for person in (alice, bob):
        await person.register()
        await person.logs_in()
    chat = await alice.opens(bob)
    await cluster_of_one.does(how.format("on"), RELOAD, HANG_UP)
    async with asyncio.timeout(SOON_SECONDS):
        while (await alice.asks("GET", "/chats")).status != 200:  # it learns of each lost one
            await asyncio.sleep(0.05)
    await asyncio.gather(*[alice.gets("/chats") for _ in range(10)])  # on ten new connections
    for _ in range(2):
        assert await status(client) == 503
        await alice.says(chat, "refused", 503)
        body = {"is_group": True, "name": "x", "participant_ids": [bob.id]}
        await alice.posts("/chats", body, 503)
        await alice.gets(f"/chats/{chat}/messages")
    await until_up(0)
    await cluster_of_one.does(how.format("off"), RELOAD)
    await becomes_ready(client)
    await until_up(1)
    texts = [f"text {number}" for number in range(12)]
    await asyncio.gather(*[alice.says(chat, text, id=new_id()) for text in texts])
    assert sorted(await alice.history(chat)) == sorted(texts)
    assert told(caplog) == ["the database is away", "the database is back"]


# ---- Why it is away


async def test_each_new_reason_is_logged(
    cluster_of_one: Cluster, app_of_one: Any, caplog: Any
) -> None:
    """Who runs the server reads why the database lets nobody in, and when that changes; never a
    password."""
    _, client = app_of_one
    assert await status(client) == 200
    await cluster_of_one.does("alter role app nologin", HANG_UP)
    wanted = ["is not permitted to log in, SQLSTATE 28000", "password authentication failed"]
    for reason, then in zip(
        wanted, (["alter role app login password 'new'"], ["alter role app password 'old'"]),
        strict=True,
    ):
        async with asyncio.timeout(SOON_SECONDS):
            while not any(reason in each for each in reasons(caplog)):
                assert await status(client) == 503
                await asyncio.sleep(0.05)
        await cluster_of_one.does(*then)
    await becomes_ready(client)
    assert told(caplog) == ["the database is away", "the database is back"]
    assert not any("old" in each or "new" in each for each in reasons(caplog))


async def test_stopped_database_is_logged_without_any_call(
    cluster_of_one: Cluster, app_of_one: Any, caplog: Any
) -> None:
    """That PostgreSQL was stopped, and that it is up again, the log and the metric tell though
    nobody asks."""
    _, client = app_of_one
    assert await status(client) == 200
    await until_up(1)
    await cluster_of_one.postgres.stop()
    async with asyncio.timeout(SOON_SECONDS):
        while told(caplog) != ["the database is away"]:
            await asyncio.sleep(0.05)
    await until_up(0)
    await cluster_of_one.postgres.start()
    async with asyncio.timeout(SOON_SECONDS):
        while told(caplog) != ["the database is away", "the database is back"]:
            await asyncio.sleep(0.05)
    await until_up(1)
    await becomes_ready(client)


async def test_hanging_database_is_503_and_logged(
    cluster_of_one: Cluster, app_of_one: Any, caplog: Any, tmp_path: Path
) -> None:
    """While PostgreSQL is there and does not answer, calls are 503; both ends of that are logged.
    """
    _, client = app_of_one
    assert await status(client) == 200
    postmaster = int((tmp_path / "postgres/postmaster.pid").read_text().split()[0])
    children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
    pids = [postmaster, *map(int, children)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(2):
            assert await status(client) == 503
        async with asyncio.timeout(SOON_SECONDS):
            while not reasons(caplog):  # where no connection was open, it is the next that tells
                assert await status(client) == 503
        assert reasons(caplog) == ["the database is away (no answer in time)"]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    async with asyncio.timeout(4 * SOON_SECONDS):
        while await status(client) != 200:
            await asyncio.sleep(0.05)
    assert told(caplog) == ["the database is away", "the database is back"]


async def test_server_that_stood_still_does_not_blame_the_database(
    app_of_one: Any, caplog: Any
) -> None:
    """An answer that came while the server itself stood still, as in a virtual machine that was
    paused, is read before anybody asks why there is none."""
    server, client = app_of_one
    assert await status(client) == 200
    database = server.app[messenger.DATABASE]
    for _ in range(3):
        asking = asyncio.create_task(database.rows("select pg_sleep(0.1)"))
        await asyncio.sleep(0.05)
        time.sleep(SILENCE_SECONDS + 0.1)
        await asking
        await asyncio.sleep(2 * TEND_SECONDS)
    assert reasons(caplog) == []


# ---- Few connections


@pytest.mark.parametrize("whose", ["role app", "database postgres"])
async def test_fewer_connections_than_wanted_serve_all(
    cluster_of_one: Cluster, app_of_one: Any, caplog: Any, whose: str
) -> None:
    """Where PostgreSQL allows five connections, thirty reads at once share them; once it allows
    more, more are opened."""
    _, client = app_of_one
    alice = Person(client, "alice")
    await alice.register()
    await alice.logs_in()
    await cluster_of_one.does(f"alter {whose} connection limit 5")
    for _ in range(3):
        answers = await asyncio.gather(*[alice.asks("GET", "/users/me") for _ in range(30)])
        assert [answer.status for answer in answers] == [200] * 30
    assert "the database is away" not in told(caplog)
    await cluster_of_one.does(f"alter {whose} connection limit 20")
    superuser = await asyncpg.connect(cluster_of_one.postgres.dsn)
    async with asyncio.timeout(SOON_SECONDS):
        while await superuser.fetchval(
            "select count(*) from pg_stat_activity where usename = 'app'") <= 5:
            await asyncio.gather(*[alice.asks("GET", "/users/me") for _ in range(30)])
    await superuser.close()
