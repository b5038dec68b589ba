"""Two messengers on a primary and its standby, each given both hosts in one of the two forms."""

import random
import time
from pathlib import Path
from typing import Any

from torture.postgres import Cluster
from torture.server import Server, free_port

SECRET_KEY = "a key of the torture, longer than 32 bytes"


class Couple:
    """Two servers on two databases, of which one follows the other; a call goes to any server."""

    disk = None

    def __init__(self, folder: Path, tree: Path) -> None:
        self.folder = folder
        self.primary, self.standby = [
            Cluster(folder / f"postgres{number}", free_port()) for number in (1, 2)]
        one, other = self.primary.port, self.standby.port
        user, wanted = "postgresql://messenger@", "target_session_attrs=read-write"
        self.forms = (
            f"{user}/postgres?host=127.0.0.1,127.0.0.1&port={one},{other}&{wanted}",
            f"{user}127.0.0.1:{one},127.0.0.1:{other}/postgres?{wanted}")
        self.servers = []
        for name, form in zip(("a", "b"), self.forms, strict=True):
            (folder / name).mkdir()
            self.servers.append(Server(
                folder / name, tree, DATABASE_URL=form, SECRET_KEY=SECRET_KEY, WORKERS="1"))

    @property
    def url(self) -> str:
        """Where the next call goes."""
        return random.choice(self.servers).url

    async def prepare(self) -> None:
        """Make the primary, still alone."""
        await self.primary.make()
        await self.primary.start()

    def start(self) -> None:
        """Start both servers; they serve a little later."""
        for server in self.servers:
            server.start()

    async def crash(self) -> None:
        """Kill both servers, and start them again."""
        for server in self.servers:
            await server.crash()

    def ended_itself(self) -> int | None:
        """Answer the status of a server that nobody has ended."""
        return next(filter(None, [server.ended_itself() for server in self.servers]), None)

    async def stop(self) -> list[str]:
        """Stop both; answer what was wrong with that, and what they complained of meanwhile."""
        return [line for server in self.servers for line in await server.stop()]

    async def sql(self, query: str, *arguments: Any) -> list[Any]:
        """Ask the primary behind the messengers' backs."""
        return await self.primary.sql(query, *arguments)

    async def pair_up(self, is_synchronous: bool) -> None:
        """Let the primary have a standby, which has everything before anybody is answered, or soon
        afterwards.
        """
        await self.primary.stop_waiting()
        self.standby.destroy()
        await self.standby.follow(self.primary)
        await self.standby.start()
        await self.primary.be_followed(is_synchronous)

    async def promote(self) -> float:
        """Let the standby be the primary; answer when it was told."""
        self.primary, self.standby = self.standby, self.primary
        told_at = time.monotonic()
        await self.primary.sql("select pg_promote(wait => false)")
        return told_at

    def destroy(self) -> None:
        """Kill what is left."""
        for each in (*self.servers, self.primary, self.standby):
            each.destroy()
