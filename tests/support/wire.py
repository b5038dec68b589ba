"""The way between a server and its PostgreSQL: it may be long, or swallow what passes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from urllib.parse import parse_qs, unquote, urlsplit, urlunsplit


class Wire:
    """A proxy before a PostgreSQL; `delay` is in seconds, for each direction."""

    def __init__(self, url: str) -> None:
        self._behind = urlsplit(url)
        self._links: list[list[asyncio.StreamWriter]] = []
        self._deaf: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.delay = 0.0
        self.url = ""

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if host := parse_qs(self._behind.query).get("host"):
            return await asyncio.open_unix_connection(f"{host[0]}/.s.PGSQL.5432")
        return await asyncio.open_connection(self._behind.hostname, self._behind.port or 5432)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await self._connect()
        self._links.append([writer, to_writer])
        for source, target in ((reader, to_writer), (to_reader, writer)):
            task = asyncio.create_task(self._pass_on(source, target))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            while passing := await source.read(65536):
                if target not in self._deaf:
                    loop.call_later(self.delay, target.write, passing)
        if target not in self._deaf:
            loop.call_later(self.delay, target.close)

    @property
    def port(self) -> int:
        """Where it listens."""
        return urlsplit(self.url).port or 0

    def swallow(self) -> None:
        """From now on, pass nothing on that comes on the connections that there are."""
        for writers in self._links:
            self._deaf.update(writers)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator["Wire"]:
        """Listen."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        name, password = self._behind.username or "messenger", self._behind.password
        whom = f"{name}:{password}" if password else unquote(name)
        self.url = urlunsplit((
            self._behind.scheme, f"{whom}@127.0.0.1:{port}", self._behind.path, "", ""))
        yield self
        server.close()
        for task in self._tasks:
            task.cancel()
        for writers in self._links:
            for writer in writers:
                writer.transport.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)
