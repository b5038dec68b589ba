"""The messenger that is fuzzed: a process of its own, and people who have something in it.

As a part of the tests the fuzzing is short, and always the same. `./run fuzz` sets FUZZ=long.
"""

import contextlib
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from support.people import Person
from support.servers import ROOT, SECRET_KEY, Server

LONG = os.environ.get("FUZZ") == "long"
SEED = int(os.environ.get("FUZZ_SEED", "1"))

# The messenger as it is, but that aiohttp's server logs its errors: they cite addresses, which may
# hold a token, so they are logged only here. That it could not read a request is no error of ours.
LAUNCHER = f"""
import logging
import sys
sys.path[:0] = {str(ROOT)!r}, {str(ROOT / "tests")!r}
import aiohttp.http_exceptions
import messenger
from support import patience
patience.begin()
def is_ours(record):
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or not issubclass(kind, aiohttp.http_exceptions.BadHttpMessage)
log = logging.getLogger("aiohttp.server")
log.addFilter(is_ours)
log.setLevel = lambda level: None
sys.exit(messenger.main())
"""


@contextlib.asynccontextmanager
async def fuzzed_server(database_url: str, tmp_path: Path) -> AsyncIterator[Server]:
    """A server that limits nobody's rate; afterwards it is still up, and has logged no error."""
    server = Server(
        tmp_path, DATABASE_URL=database_url, SECRET_KEY=SECRET_KEY, RATE_LIMITS="off",
        ACCESS_TOKEN_EXPIRE_MINUTES=1440)
    server.program = tmp_path / "launch_messenger.py"
    server.program.write_text(LAUNCHER)
    await server.starts()
    yield server
    assert server.process.returncode is None, server.complaints()
    assert await server.stops() == 0, server.complaints()
    assert server.complaints() == "", server.complaints()


class Population:
    """People with accounts, sessions, chats and messages, so that ids lead somewhere."""

    alice: Person
    bob: Person
    chats: list[int]  # in the last of them alice is not
    messages: list[str]
    sessions: list[int]  # alice's

    def __init__(self, server: Server, people_of: Callable[..., Awaitable[Person]]) -> None:
        self.server = server
        self.people: list[Person] = []
        self.filled = 0
        self._people_of = people_of
        self._random = random.Random(SEED)

    async def fills(self) -> "Population":
        """Let people in who were not there before, and let them talk."""
        self.filled += 1
        names = [f"{name}{self.filled}" for name in ("dave", "carol", "bob", "alice")]
        self.people = [await self._people_of(self.server, name) for name in names]
        dave, carol, bob, alice = self.people
        self.alice, self.bob = alice, bob
        await alice.logs_in()
        self.chats = [
            await alice.opens(bob), await alice.founds(bob, carol), await bob.founds(alice, dave),
            await bob.founds(carol, dave),
        ]
        self.messages = []
        for chat, sender in zip(self.chats, (alice, alice, bob, bob), strict=True):
            for number in range(3):
                await self.says(sender, chat, f"number {number}")
            await sender.reads(chat, {"id": self.messages[-1]})
        await self.says(bob, self.chats[0], "a reply", reply_to=self.messages[0])
        gone = await self.says(alice, self.chats[1], "deleted soon")
        await alice.expects(204, "DELETE", f"/chats/{self.chats[1]}/messages/{gone}")
        self.sessions = [each["id"] for each in await alice.gets("/users/me/sessions")]
        return self

    async def says(self, sender: Person, chat: int, text: str, **body: Any) -> str:
        """Post a message under the same id in every run; answer the id."""
        message_id = str(UUID(int=self._random.getrandbits(128)))
        await sender.says(chat, text, id=message_id, **body)
        self.messages.append(message_id)
        return message_id
