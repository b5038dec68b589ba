"""The start with a database of one's own: what it takes, refuses and waits for, and how it ends."""

import asyncio
import contextlib
import itertools
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import asyncpg
import pytest

import messenger
from plumbing import embedded
from plumbing.embedded import Postgres
from plumbing.process import StartError
from support.databases import drop_database, on_cluster, over_tcp
from support.servers import (
    ROOT,
    SECRET_KEY,
    START_SECONDS,
    STOP_SECONDS,
    Server,
    environment,
    refused,
)

# A server that never gives up what it waits for: a test that it ends at once cannot pass by luck.
PATIENT = ("-c", f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import messenger
from plumbing import schema
schema.START_SECONDS = 3600
sys.exit(messenger.main())
""")
PASSWORD = "hunter2"
numbers = itertools.count(1)


class Place:
    """A database of the test's own, and a role that owns it and needs a password."""

    def __init__(self, postgres: Postgres, folder: str, name: str) -> None:
        self.postgres, self.folder, self.name = postgres, folder, name

    def url(self, query: str = "", host: str = "", **other: str) -> str:
        """A connection string to it."""
        given = {"user": self.name, "password": PASSWORD, "database": self.name} | other
        user, password = quote(given["user"], safe=""), quote(given["password"], safe="")
        query = query if host else f"?host={self.folder}{query.replace('?', '&')}"
        return f"postgresql://{user}:{password}@{host}/{quote(given['database'])}{query}"

    async def does(self, *statements: str) -> None:
        """Run statements in it as the superuser; {0} is its name, and its role's."""
        connection = await self.connects()
        try:
            for statement in statements:
                await connection.execute(statement.format(self.name))
        finally:
            await connection.close()

    async def connects(self) -> Any:
        """Connect as the superuser."""
        return await asyncpg.connect(
            host=self.folder, user="messenger", database=self.name,
            server_settings={"default_transaction_read_only": "off", "search_path": "public"})


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A PostgreSQL where every role but the superuser needs its password."""
    with asyncio.Runner() as runner:
        made = Postgres(tmp_path_factory.mktemp("postgres"))
        runner.run(made.start())
        access = made.folder / "postgres/pg_hba.conf"
        access.write_text("local all messenger trust\nlocal all all scram-sha-256\n")
        runner.run(on_cluster(made.dsn, "select pg_reload_conf()"))
        yield made
        runner.run(made.stop())


@pytest.fixture
async def place(postgres: Postgres) -> AsyncIterator[Place]:
    """An empty database."""
    name = f"start_{next(numbers)}"
    await on_cluster(
        postgres.dsn, f"create role {name} login password '{PASSWORD}'",
        f"create database {name} owner {name}")
    folder = re.findall("host=([^&]+)", postgres.dsn)[0]
    yield Place(postgres, folder, name)
    drop_database(postgres.dsn, name)
    await on_cluster(postgres.dsn, f"drop role {name}")


async def serves(folder: Path, **settings: Any) -> str:
    """See that a server starts, is ready and takes a user; what it wrote to stderr."""
    server = await Server(folder, **settings).starts()
    try:
        async with aiohttp.ClientSession(server.url) as session:
            assert (await session.get("/api/v1/health/readiness")).status == 200
            body = {"email": "a@example.com", "username": "alice", "password": "correct horse"}
            answer = await session.post("/api/v1/users", json=body)
            assert answer.status == 201, await answer.text()
    finally:
        await server.stops()
    return server.complaints()


async def is_refused(folder: Path, url: str, **settings: Any) -> str:
    """See that a server ends without waiting; its one line."""
    line = await refused(folder, PATIENT, DATABASE_URL=url, SECRET_KEY=SECRET_KEY, **settings)
    assert line.startswith("messenger: DATABASE_URL")
    return line


@contextlib.asynccontextmanager
async def ending(
    process: asyncio.subprocess.Process
) -> AsyncIterator[asyncio.subprocess.Process]:
    """See that a process has ended afterwards."""
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def comes_up(process: asyncio.subprocess.Process) -> str:
    """Wait until a server serves; the line that says so."""
    assert process.stdout is not None
    async with asyncio.timeout(START_SECONDS):
        line = (await process.stdout.readline()).decode()
    assert "serves" in line
    return line


# ---- What it takes


async def test_first_output_names_the_way_to_an_account(tmp_path: Path, place: Place) -> None:
    """Where nobody may register, the next step is an administrator's."""
    server = await Server(tmp_path, DATABASE_URL=place.url(), SECRET_KEY=SECRET_KEY,
                          REGISTRATION="closed").starts()
    await server.stops()
    assert "data      your PostgreSQL (DATABASE_URL)\n" in server.said
    assert server.said.endswith("next      make the first account: ./run user create\n")


@pytest.mark.parametrize("query", [
    "?connect_timeout=10", "?channel_binding=require", "?gssencmode=disable&sslsni=1",
    "?keepalives=1&keepalives_idle=30&tcp_user_timeout=9000", "?options=-c%20geqo%3Doff",
    "?application_name=mine&fallback_application_name=other", "\n", "  ",
])
async def test_each_parameter_of_libpq_serves(tmp_path: Path, place: Place, query: str) -> None:
    """Whatever libpq knows may stand in the string; what has no effect is named in the log."""
    said = await serves(tmp_path, DATABASE_URL=place.url(query), SECRET_KEY=SECRET_KEY)
    assert ("without effect" in said) == ("timeout=10" in query or "require" in query
                                          or "=disable" in query or "=mine" in query
                                          or "keepalives=1" in query), said
    assert PASSWORD not in said


@pytest.mark.parametrize("password", ["a/b+c==", "#1 %2F@home:?&", "'\"\\ $x {} ü"])
async def test_password_of_any_characters_serves(
    tmp_path: Path, place: Place, password: str
) -> None:
    """A password that is set beside the string needs nothing escaped; with workers, too."""
    connection = await place.connects()
    quoted = await connection.fetchval("select quote_literal($1)", password)
    await connection.execute(f"alter role {place.name} password {quoted}")
    await connection.close()
    url = place.url().replace(f":{PASSWORD}@", "@")
    said = await serves(
        tmp_path, DATABASE_URL=url, DATABASE_PASSWORD=password, SECRET_KEY=SECRET_KEY, WORKERS=2)
    assert said == ""


def test_compose_puts_no_password_into_a_string() -> None:
    """What docker compose sets as the password is taken as it is: it stands in no URL."""
    text = (ROOT / "docker-compose.yml").read_text()
    [url] = re.findall("DATABASE_URL: (.+)", text)
    assert url == "postgresql://messenger@postgres:5432/messenger"
    assert re.findall("DATABASE_PASSWORD: (.+)", text) == re.findall(
        "POSTGRES_PASSWORD: (.+)", text)


ROLE_SETTINGS = [
    "search_path = nowhere", "search_path = '$user'", "statement_timeout = 50",
    "lock_timeout = 1", "default_transaction_isolation = serializable", "timezone = 'Asia/Tokyo'",
    "enable_indexscan = on", "idle_session_timeout = 100", "client_encoding = latin1",
    "transaction_timeout = 50", "datestyle = 'SQL, DMY'", "synchronous_commit = off",
]


async def test_settings_of_the_role_do_not_count(tmp_path: Path, place: Place) -> None:
    """Whatever a role has set, the schema is made, in public, and used."""
    await place.does("create schema {0}", *[
        f"alter role {place.name} set {setting}" for setting in ROLE_SETTINGS])
    assert await serves(tmp_path, DATABASE_URL=place.url(), SECRET_KEY=SECRET_KEY) == ""
    connection = await place.connects()
    assert await connection.fetchval("select count(*) from public.users") == 1
    await connection.close()


async def test_several_hosts_serve(tmp_path: Path, place: Place) -> None:
    """Of several hosts one that answers is enough."""
    async with over_tcp(place.folder) as port:
        url = place.url("?target_session_attrs=primary", f"127.0.0.1:1,localhost:{port}")
        assert await serves(tmp_path, DATABASE_URL=url, SECRET_KEY=SECRET_KEY) == ""


ENVIRONMENT = [
    {"PGSSLMODE": "verify-full", "PGSSLROOTCERT": "/nowhere"}, {"PGSERVICE": "none"},
    {"PGOPTIONS": "-c nonsense=1"}, {"PGHOST": "nowhere.invalid", "PGPASSWORD": "wrong"},
    {"PGTARGETSESSIONATTRS": "standby", "PGCONNECT_TIMEOUT": "x", "PGTZ": "nowhere"},
]


@pytest.mark.parametrize("environ", ENVIRONMENT, ids=lambda each: "+".join(each))
async def test_variables_of_libpq_do_not_count(
    tmp_path: Path, place: Place, environ: dict[str, str]
) -> None:
    """An embedded PostgreSQL, from its making on, and one of one's own are served whatever libpq
    would make of the environment, and by workers, too."""
    (tmp_path / "embedded").mkdir()
    assert await serves(tmp_path / "embedded", **environ) == ""
    own = {"DATABASE_URL": place.url(), "SECRET_KEY": SECRET_KEY, "WORKERS": 2}
    assert await serves(tmp_path, **own, **environ) == ""


async def test_home_of_another_serves(tmp_path: Path, place: Place) -> None:
    """A home folder that may not be entered, as after a change of user, is not looked into."""
    home = tmp_path / "home"
    home.mkdir(mode=0)
    async with over_tcp(place.folder) as port:
        # As root the server would enter it: so it runs as PostgreSQL is run for root.
        command = [sys.executable, "-I", "-S", embedded.__file__, str(os.getpid()), "9",
                   sys.executable, str(ROOT / "messenger.py")]
        settings = environment(
            DATABASE_URL=place.url(host=f"127.0.0.1:{port}"), SECRET_KEY=SECRET_KEY) | {
            "HOME": str(home)}
        async with ending(await asyncio.create_subprocess_exec(
            *command, cwd=tmp_path, env=settings,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)) as process:
            url = (await comes_up(process)).split()[-1]
            async with aiohttp.ClientSession(url) as session:
                assert (await session.get("/api/v1/health/readiness")).status == 200
            process.send_signal(signal.SIGTERM)
            await process.communicate()


# ---- What it refuses

REFUSALS = {
    # what is done to the database or put into the string, and the words that tell of it
    "wrong password": ("", {"password": "wrong"}, "password is wrong"),
    "no such role": ("", {"user": "starting up"}, "password is wrong"),
    "no such database": ("", {"database": "too many connections"}, "no such database"),
    "no login": ("alter role {0} nologin", {}, "may not log in"),
    "no right to connect": (
        "revoke connect on database {0} from public, {0}; alter database {0} owner to messenger",
        {}, "no right to connect"),
    "no right in public": (
        "alter database {0} owner to messenger", {}, "schema public"),
    "no schema public": ("drop schema public", {}, "schema public"),
    "must encrypt": ("", {"query": "?sslmode=require&sslrootcert=/nowhere", "host": "127.0.0.1:1"},
                     "cannot be used"),
}


@pytest.mark.parametrize("why", REFUSALS)
async def test_what_cannot_get_better_ends_the_start(
    tmp_path: Path, place: Place, why: str
) -> None:
    """What waiting does not mend is one line at once, in plain words, whatever the names in it."""
    statement, how, words = REFUSALS[why]
    await place.does(statement or "select 1")
    line = await is_refused(tmp_path, place.url(**how))
    assert words in line
    assert PASSWORD not in line


async def test_name_that_another_thing_holds_ends_the_start(tmp_path: Path, place: Place) -> None:
    """A migration that fails is one line, too, with what PostgreSQL says."""
    await place.does("create view chats as select 1 as one", "alter view chats owner to {0}")
    line = await is_refused(tmp_path, place.url())
    assert line.endswith('the schema cannot be made: column "participant_count" does not exist')


WRONG = [
    "postgresql://{user}:{half}/{half}@{host}/{name}", "postgresql://{user}:{half}@{half}@{host}/x",
    "postgresql://{user}:{half}#{half}@{host}/{name}", "postgresql://{user}:{half}?{half}@{host}/x",
    "postgresql://{user}:{half}%{half}@{host}/x", "postgresql://{user}:{half}", "{half}",
    "postgresql://{half}@{host}/{name}", "postgresql://{user}:x@{host}/{half}",
    "postgresql://{user}@{half}/{name}", "postgresql://{user}@{host}/{name}?password={half}",
    "postgresql://{user}@{host}/{name}?options=-c%20{half}%3D1&password=hunter1",
    "postgresql://{user}:hunter1@{host}/{name}?target_session_attrs={half}",
    "postgresql://{user}:hunter1@{host}/{name}?keepalives_idle={half}",
    "postgresql://{user}:hunter1@{host}/{name}?sslcert={half}&sslmode=require&host=localhost",
    "postgresql://{user}:{half}@{half}..x/{name}", "postgresql://{user}@{host}:{half}/{name}",
]
IMPATIENT = (PATIENT[0], PATIENT[1].replace("3600", "1"))


@pytest.mark.parametrize("form", WRONG)
async def test_no_part_of_a_password_is_told(tmp_path: Path, place: Place, form: str) -> None:
    """However a string is wrong, nothing of what may be its password is in the output."""
    half = "S3cret"
    url = form.format(
        user=place.name, half=half, host=quote(place.folder, safe=""), name=place.name)
    process = await asyncio.create_subprocess_exec(
        sys.executable, *IMPATIENT, cwd=tmp_path,
        env=environment(DATABASE_URL=url, SECRET_KEY=SECRET_KEY),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
    said = (await process.communicate())[0].decode()
    assert process.returncode == 1, said
    assert "DATABASE_URL" in said
    assert half.lower() not in said.lower()
    assert "Traceback" not in said


# ---- What it waits for


async def starts(folder: Path, url: str) -> asyncio.subprocess.Process:
    """Start a server, and do not wait for it."""
    return await asyncio.create_subprocess_exec(
        sys.executable, *PATIENT, cwd=folder,
        env=environment(DATABASE_URL=url, SECRET_KEY=SECRET_KEY),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)


async def says(process: asyncio.subprocess.Process, words: str) -> str:
    """Read its log up to a line with these words."""
    assert process.stderr is not None
    read = ""
    async with asyncio.timeout(START_SECONDS):
        while words not in read:
            line = (await process.stderr.readline()).decode()
            assert line, read
            read += line
    return read


async def stops_at_once(process: asyncio.subprocess.Process) -> None:
    """Send it SIGTERM, and see that it ends without a complaint."""
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(STOP_SECONDS):
        stdout, stderr = await process.communicate()
    assert (process.returncode, stdout) == (0, b"")
    assert b"Traceback" not in stderr


async def test_database_that_comes_late_is_waited_for(tmp_path: Path, place: Place) -> None:
    """While nobody listens the log says that it waits and why; then the server serves."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with ending(await starts(tmp_path, place.url(host=f"127.0.0.1:{port}"))) as process:
        said = await says(process, "waiting for PostgreSQL: Connection refused")
        assert place.name not in said
        async with over_tcp(place.folder, port):
            await comes_up(process)
            process.send_signal(signal.SIGTERM)
            await process.communicate()


PASSING = {
    "no connection free": (
        'alter role {0} connection limit 0', 'alter role {0} connection limit 99',
        "no connection is free"),
    "read only": (
        "alter role {0} set default_transaction_read_only = on",
        "alter role {0} reset default_transaction_read_only", "may only be read"),
}


@pytest.mark.parametrize("why", PASSING)
async def test_what_may_pass_is_waited_for(tmp_path: Path, place: Place, why: str) -> None:
    """What passes by itself delays the start, which says so, and then serves."""
    before, after, words = PASSING[why]
    await place.does(before)
    async with ending(await starts(tmp_path, place.url())) as process:
        await says(process, words)
        await place.does(after)
        await comes_up(process)
        process.send_signal(signal.SIGTERM)
        await process.communicate()


async def test_server_that_does_not_answer_is_told_and_left(tmp_path: Path, place: Place) -> None:
    """A host that takes connections and says nothing: the log says so, and a signal ends it."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        host = f"127.0.0.1:{mute.getsockname()[1]}"
        async with ending(await starts(tmp_path, place.url(host=host))) as process:
            await says(process, "waiting for PostgreSQL to let us in")
            await stops_at_once(process)


LOCKS = {
    "another that migrates": "select pg_advisory_lock(hashtext('messenger schema'))",
    "a table that is made": "begin; create table participants ()",
    "yoyo's own table": "begin; create table yoyo_lock ()",
    "a view that is made": "begin; create view message_view as select 1",
}


@pytest.mark.parametrize("how", LOCKS)
async def test_lock_is_told_and_left(tmp_path: Path, place: Place, how: str) -> None:
    """A start that waits for a lock says who holds it; a signal ends it, and its wait in
    PostgreSQL, too."""
    holder = await place.connects()
    await holder.execute(LOCKS[how])
    pid = await holder.fetchval("select pg_backend_pid()")
    async with ending(await starts(tmp_path, place.url())) as process:
        await says(process, f"waiting for a lock in PostgreSQL that its process {pid} holds")
        await stops_at_once(process)
    count = "select count(*) from pg_stat_activity where usename = $1"
    async with asyncio.timeout(START_SECONDS):
        while await holder.fetchval(count, place.name):
            await holder.execute("select pg_stat_clear_snapshot()")
            await asyncio.sleep(0.05)
    await holder.close()
    assert await serves(tmp_path, DATABASE_URL=place.url(), SECRET_KEY=SECRET_KEY) == ""


def test_wrong_string_stops_before_anything_is_started() -> None:
    """The string is read with the other settings."""
    for url in ("postgresql://u:a/b@h/d", "postgresql://u@h:x/d", "mysql://h"):
        with pytest.raises(StartError, match="DATABASE_URL"):
            messenger.Settings.load({"DATABASE_URL": url, "SECRET_KEY": SECRET_KEY})
