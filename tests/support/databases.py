"""The databases of the tests: a cluster with a template, its clones, and what is put into them."""

import asyncio
import contextlib
import itertools
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import psycopg

import messenger
from plumbing.embedded import Postgres
from plumbing.marks import new_mark
from plumbing.schema import migrate

LATER = datetime(2100, 1, 1, tzinfo=UTC)  # until when a change counts that a test makes itself
# Each worker of pytest has its own, though they may share a server.
TEMPLATE = f"messenger_template_{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"


def with_database(url: str, name: str) -> str:
    """Name another database of the same server."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


async def on_cluster(url: str, *statements: str) -> None:
    """Run statements that belong to no database."""
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


END_SESSIONS = """
    select pg_terminate_backend(pid, 5000) from pg_stat_activity
    where datname = %s and backend_type = 'client backend'"""


def drop_database(url: str, name: str) -> None:
    """Drop a database, and end the sessions in it.

    `with (force)` does not do: it fails whenever autovacuum is at work there, unless one is a
    superuser. A plain drop ends autovacuum for anybody.
    """
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(END_SESSIONS, [name])
        connection.execute(f"drop database {name}".encode())


@contextlib.contextmanager
def cluster_with_template(make_folder: Callable[[], Path]) -> Iterator[str]:
    """Answer the URL of a PostgreSQL whose database TEMPLATE has the schema.

    TEST_DATABASE_URL names one of your own, whose role may create databases.
    """
    given = os.environ.get("TEST_DATABASE_URL")
    with asyncio.Runner() as runner:
        postgres = None if given else Postgres(make_folder())
        if postgres is not None:
            runner.run(postgres.start())
        url = given or postgres.dsn
        if postgres is not None:  # durability has tests with servers of their own
            runner.run(on_cluster(url, "alter system set fsync = off", "select pg_reload_conf()"))
        runner.run(on_cluster(url, f"drop database if exists {TEMPLATE}"))
        runner.run(on_cluster(url, f"create database {TEMPLATE}"))
        migrate(with_database(url, TEMPLATE), messenger.SQL)
        yield url
        runner.run(on_cluster(url, f"drop database {TEMPLATE}"))
        if postgres is not None:
            runner.run(postgres.stop())


class Databases:
    """Clones of the template, each made while the test before runs: copying takes a while."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._numbers = itertools.count(1)
        self._thread = ThreadPoolExecutor(1)
        self._next = self._thread.submit(self._make)

    def _make(self) -> str:
        name = f"messenger_test_{os.getpid()}_{next(self._numbers)}"
        create = f"create database {name} template {TEMPLATE} strategy file_copy"
        with psycopg.connect(self._url, autocommit=True) as connection:
            connection.execute(create.encode())
        return name

    async def take(self) -> str:
        """Name a database that nobody else has."""
        made = self._next
        self._next = self._thread.submit(self._make)
        return await asyncio.wrap_future(made)

    def drop(self, name: str) -> None:
        """Drop a database, soon."""
        self._thread.submit(drop_database, self._url, name)

    def close(self) -> None:
        """Drop what is left."""
        self.drop(self._next.result())
        self._thread.shutdown()


@contextlib.asynccontextmanager
async def over_tcp(folder: str, port: int = 0) -> AsyncIterator[int]:
    """Let the PostgreSQL whose socket is in a folder be reached over TCP, too; the port."""
    writers: list[asyncio.StreamWriter] = []

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_unix_connection(f"{folder}/.s.PGSQL.5432")
        await asyncio.gather(pass_on(reader, there[1]), pass_on(there[0], writer))

    server = await asyncio.start_server(connect, "127.0.0.1", port)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0.05)  # they end by it


async def until_waiting(sql: asyncpg.Connection, number: int = 1) -> None:
    """Wait until so many connections of this database wait for a lock."""
    waiting = """
        select count(*) from pg_stat_activity
        where wait_event_type = 'Lock' and datname = current_database()"""
    while await sql.fetchval(waiting) < number:
        await asyncio.sleep(0.01)
        await sql.execute("select pg_stat_clear_snapshot()")


# ---- What is put in behind the server


async def fills(sql: asyncpg.Connection, chat: int, number: int) -> None:
    """Put so many more into a group, behind the server."""
    await sql.execute(
        "with made as ("
        " insert into users (email) select gen_random_uuid()::text from generate_series(1, $2::int)"
        " returning id), joined as ("
        " insert into participants (chat_id, user_id, role) select $1, id, 'member' from made)"
        " update chats set participant_count = participant_count + $2 where id = $1",
        chat, number,
    )


async def crowd(sql: asyncpg.Connection, size: int) -> list[int]:
    """Insert users who only have to be there; answer their ids."""
    rows = await sql.fetch(
        "insert into users (email, email_key, username, username_key, password_hash)"
        " select n || '@crowd', n || '@crowd', 'crowd' || n, 'crowd' || n, ''"
        " from generate_series(1, $1::int) n returning id",
        size,
    )
    return [row["id"] for row in rows]


POST = """
    select * from post_messages_2(array[$1::bigint], array[$2::bigint], array[$3::uuid],
                                  array[$4::text], array[$5::uuid], $6)"""
CHANGE = """
    select * from change_messages_3(array[$1::bigint], array[$2::bigint], array[$3::uuid],
                                    array[$4::text], array['infinity'::timestamptz], $5)"""
READ = "select * from read_messages(array[$1::bigint], array[$2::bigint], array[$3::uuid])"
INDEX = """
    select index_words($1, 0, 12, array(select seq from messages where chat_id = $1),
                       array(select 'word' from messages where chat_id = $1))"""


async def fills_with_life(sql: asyncpg.Connection) -> None:
    """Let five users do what there is to do: in a group (1) and in a personal chat (2)."""
    ann, ben, cem, dan, eva = await crowd(sql, 5)
    group = await sql.fetchval("select chat_id from create_group($1, 'all', $2)", ann,
                               [ben, cem, dan, eva])
    pair = await sql.fetchval("select chat_id from open_personal_chat($1, $2)", ann, ben)
    for chat in (group, pair):
        ids = [uuid.uuid4() for _ in range(8)]
        for number, each in enumerate(ids):
            reply = ids[0] if number == 5 else None
            await sql.execute(POST, chat, (ann, ben)[number % 2], each, "text", reply, new_mark())
        for number, text in ((1, "once"), (1, "twice"), (2, "once"), (3, None)):
            await sql.execute(CHANGE, chat, (ann, ben)[number % 2], ids[number], text, new_mark())
        for number in (2, 6):
            await sql.execute(READ, chat, ben, ids[number])
        await sql.execute(INDEX, chat)
    await sql.execute("insert into sessions (user_id) select id from users")
    await sql.execute("select remove_participant($1, $2, $3)", group, ann, cem)
    await sql.execute("select delete_user($1)", dan)
    while await sql.fetchrow("select * from leave_next_chat($1)", dan):
        pass
