"""A rolling restart from the version before: two servers on one database, replaced in turn.

Both serve the clients of the torture all the while; what these count must be 0. Beside them people
use what else there is: at the server that stays while the other is restarting, and then at both.
"""

import ast
import asyncio
import hashlib
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest

import messenger
from plumbing.embedded import Postgres
from support.databases import on_cluster
from support.people import Line, Person, follows
from support.releases import LAST_RELEASE, files_of
from support.servers import ROOT, SECRET_KEY, Server
from torture.__main__ import judge
from torture.clients import Run
from torture.server import free_port
from torture.tally import Tally

pytestmark = pytest.mark.usefixtures("nothing_left")

READERS = 4  # who list chats all the time: that reads each view
BESIDE_SECONDS = 1.0  # the clients have two servers for so long after each step
PATIENCE_SECONDS = 30.0  # until everybody must have everything in the end

# What must stay as it is when an old server starts on the schema of the new one.
SELECT_APPLIED = """
    select name || ' ' || digest from schema_files
    union all select pg_get_functiondef('post_messages'::regproc)
    union all select pg_get_viewdef('message_view'::regclass)
    order by 1"""


@pytest.fixture
def old_program(tmp_path: Path) -> Path:
    """The version before, from the repository's own history."""
    return files_of(LAST_RELEASE, tmp_path / "old") / "messenger.py"


@pytest.fixture
async def dsn(tmp_path: Path) -> AsyncIterator[str]:
    """A PostgreSQL of the test's own."""
    postgres = Postgres(tmp_path / "database")
    await postgres.start()
    # Nobody kills PostgreSQL here, and a slow disk is not what may delay an answer.
    await on_cluster(postgres.dsn, "alter system set fsync = off", "select pg_reload_conf()")
    yield postgres.dsn
    await postgres.stop()


async def test_every_statement_of_the_last_release_runs_on_a_new_database(
    old_program: Path, sql: asyncpg.Connection
) -> None:
    """Servers of the last release may be started again on a database that this one made."""
    statements = {
        node.value for node in ast.walk(ast.parse(old_program.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        and node.value.lstrip().startswith("-- ")}
    assert len(statements) > 40
    for statement in statements:
        await sql.prepare(statement)


class Pair:
    """Two servers on one database, of which each call goes to either; what the other refuses."""

    def __init__(self, folder: Path, dsn: str, program: Path) -> None:
        self._dsn = dsn
        self._random = random.Random(1)
        self._back: dict[str, float] = {}  # URL: since when it serves, inf while it restarts
        self.servers: list[Server] = []
        for name in ("a", "b"):
            (folder / name).mkdir()
            server = Server(
                folder / name, DATABASE_URL=dsn, SECRET_KEY=SECRET_KEY, PORT=free_port())
            server.program = program
            self.servers.append(server)
            self._back[url_of(server)] = 0.0
        self.refusals: list[tuple[str, float]] = []  # what was refused, and how long that took
        self.slowest = 0.0  # seconds that an answer took, of a server that was not restarting

    @property
    def url(self) -> str:
        """Where the next call goes."""
        return url_of(self._random.choice(self.servers))

    async def sql(self, query: str, *arguments: Any) -> list[Any]:
        """Ask PostgreSQL behind the servers' backs."""
        connection = await asyncpg.connect(self._dsn)
        try:
            return list(await connection.fetch(query, *arguments))
        finally:
            await connection.close()

    async def applied(self) -> list[str]:
        """Answer which functions and views there are, and which are said to be."""
        return [row[0] for row in await self.sql(SELECT_APPLIED)]

    def notes(self, url: str, began: float, status: int, what: str) -> None:
        """Look at an answer; 0 stands for none. Who restarts, or did meanwhile, is excused."""
        if began < self._back[url]:
            return
        took = time.monotonic() - began
        if status == 0 or status >= 500:
            self.refusals.append((f"{what} at {url}: {status}", took))
        else:
            self.slowest = max(self.slowest, took)

    async def restarts(self, server: Server, program: Path, killed: bool = False) -> float:
        """Stop a server and start a program in its place; answer how long it was away."""
        began = time.monotonic()
        self._back[url_of(server)] = math.inf
        if killed:
            await server.dies()
        else:
            assert await server.stops() == 0, server.complaints()
        assert not complains(server), server.complaints()
        server.program = program
        await server.starts()
        self._back[url_of(server)] = time.monotonic()
        return time.monotonic() - began


def url_of(server: Server) -> str:
    """Where a server is, also while it is not."""
    return f"http://127.0.0.1:{server.settings['PORT']}"


def complains(server: Server) -> bool:
    """Tell whether a server has logged an error since it started."""
    return "Traceback" in server.complaints() or " ERROR " in server.complaints()


# ---- What people do besides posting


async def texts_until_ready(line: Line) -> list[str]:
    """Answer the messages that a socket replays, and hang up."""
    texts = []
    while (frame := await line.hears("message", "ready"))["type"] == "message":
        texts.append(frame["data"]["text"])
    await line.close()
    return texts


class Talk:
    """Alice, a client of the one server, and Bob, of the other, and all that they said."""

    def __init__(self, alice: Person, bob: Person, chat: int) -> None:
        self.alice, self.bob, self.chat = alice, bob, chat
        self.said: list[str] = []

    async def goes_on(self) -> None:
        """Each uses their server, and what they post there is heard at the other one."""
        for here, there in ((self.alice, self.bob), (self.bob, self.alice)):
            line = await there.listens_live(self.chat)
            await self.uses(here)
            for text in self.said[-2:]:
                await line.hears_text(text)
            await line.close()
        await asyncio.sleep(BESIDE_SECONDS)

    async def goes_on_during(self, restart: Awaitable[float], person: Person) -> float:
        """One uses their server while the other is restarting; answer how long that took."""
        restarting = asyncio.ensure_future(restart)

        async def meanwhile(use: Callable[[], Awaitable[Any]]) -> None:
            while not restarting.done():
                await use()

        using = [meanwhile(lambda: self.uses(person))] + [
            meanwhile(lambda: person.gets("/chats")) for _ in range(READERS)]
        try:
            await asyncio.gather(*using)
        finally:
            await asyncio.wait([restarting])  # nobody else would stop what it starts
        return await restarting

    async def uses(self, person: Person) -> None:
        """Use what there is, each of which must succeed."""
        await person.logs_in()
        tokens = await person.posts("/users/refresh", {"refresh_token": person.refresh}, 200)
        person.access, person.refresh = tokens["access_token"], tokens["refresh_token"]
        text = f"word{len(self.said)}"
        await person.says(self.chat, text)
        self.said.append(text)
        assert await person.history(self.chat, f"?q={text}") == [text]
        line = await person.listens_live(self.chat)
        text = f"word{len(self.said)}"
        await line.says(text, ref=1)
        assert (await line.hears("ack", "error"))["type"] == "ack"
        self.said.append(text)
        await line.close()
        assert [each["last_message"]["text"] for each in await person.gets("/chats")] == [text]
        assert await person.history(self.chat, "?limit=10") == self.said[-10:]
        assert await texts_until_ready(await person.listens(self.chat, "?after=0")) == self.said
        everywhere = await follows(person)
        await everywhere.sends(type="sync", chats={str(self.chat): 0})
        assert await texts_until_ready(everywhere) == self.said


@pytest.fixture
async def pair(tmp_path: Path, old_program: Path, dsn: str) -> AsyncIterator[Pair]:
    """Two servers of the version before."""
    pair = Pair(tmp_path, dsn, old_program)
    for server in pair.servers:
        await server.starts()
    yield pair
    for server in pair.servers:
        if server.process.returncode is None:
            await server.stops()


@pytest.fixture
async def run(pair: Pair) -> AsyncIterator[Run]:
    """The clients of the torture, who use both servers."""
    run = Run(pair, 1, Tally(speaks=True), PATIENCE_SECONDS)
    run.noting = pair.notes
    run.knows_marks = False
    asyncio.get_running_loop().set_debug(False)  # the clients are to press the servers
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as run.http:
        await run.set_up()
        await run.begin()
        yield run
        tasks = list(run.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.timeout(240)  # it takes half a minute
async def test_rolling_restart_loses_and_refuses_nothing(
    pair: Pair, old_program: Path, run: Run, people_of: Any
) -> None:
    """Two servers of the version before are replaced in turn, the second after it was killed and
    started again on the new schema: nothing that was acknowledged is lost, and the server that is
    not restarting refuses nobody."""
    first, second = pair.servers
    alice, bob = await people_of(first, "alice"), await people_of(second, "bob")
    conversation = Talk(alice, bob, await alice.opens(bob))
    during = conversation.goes_on_during
    await conversation.goes_on()

    new_program = ROOT / "messenger.py"
    away = [await during(pair.restarts(first, new_program), bob)]
    await conversation.goes_on()
    applied = await pair.applied()
    for name in ("views", "functions"):
        digest = hashlib.sha256((messenger.SQL / f"{name}.sql").read_bytes()).hexdigest()
        assert f"{name} {digest}" in applied

    away.append(await during(pair.restarts(second, old_program, killed=True), alice))
    await conversation.goes_on()
    assert await pair.applied() == applied

    away.append(await during(pair.restarts(second, new_program), alice))
    await conversation.goes_on()

    await run.cut_short()
    await judge(run)
    times = ", ".join(f"{each:.1f} s" for each in away)
    print(f"away for {times}; slowest answer of a server that was not: {pair.slowest:.2f} s")
    assert run.tally.found == {}
    assert pair.refusals == []
    for server in pair.servers:
        assert await server.stops() == 0
        assert not complains(server), server.complaints()
