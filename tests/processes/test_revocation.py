"""What is revoked at one server is closed at another: in time, and nothing is delivered after.

In each round somebody's socket is held by one server, and at another they are taken out of the
group, or lose their session in one of five ways, while a third member keeps posting there. As a
part of the tests there are a few rounds between two servers in this process; FUZZ=long makes 200
between two processes, and some more between two workers.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest

import messenger
from support.fuzzing import LONG
from support.people import PASSWORD, SOON_SECONDS, Line, Person
from support.servers import ROOT, SECRET_KEY, Elsewhere, Server, sockets_at

pytestmark = pytest.mark.usefixtures("nothing_left")

ROUNDS = 200
AT_ONCE = 4
HINTED_SECONDS, UNHINTED_SECONDS = 1.0, 2.0  # how soon a socket is closed
NOISE_SECONDS = 1.0  # what a busy machine may add
PAUSE_SECONDS = 0.005  # between two posts

KINDS = ("removed", "logged out", "session ended", "password changed", "deactivated", "deleted")

# A server that is started by way of this publishes no hints.
MUTE = f"""
import sys
sys.path[:0] = {str(ROOT)!r}, {str(ROOT / "tests")!r}
import messenger
from plumbing import bus
from support import patience
patience.begin()
bus.Bus.notify = lambda self, key, hint: None
sys.exit(messenger.main())
"""


# ---- A round


@dataclass
class Talk:
    """What somebody keeps posting: the numbers from 1 on."""

    talker: Person
    chat: int
    begun: int = 0  # the number whose post was begun last
    answered: int = 0
    is_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def goes_on(self) -> None:
        """Post, one after the other."""
        while await self.is_on.wait():
            self.begun += 1
            await self.talker.says(self.chat, str(self.begun))
            self.answered = self.begun
            await asyncio.sleep(PAUSE_SECONDS)

    async def reaches(self, number: int) -> None:
        """Wait until a number was posted."""
        while self.answered < number:
            await asyncio.sleep(PAUSE_SECONDS)


@dataclass
class Ear:
    """A socket and what is heard on it."""

    line: Line
    chat: int
    follows_all: bool  # of its user's chats
    heard: list[int] = field(default_factory=list)  # numbers of a talk
    ended_at: float = 0.0  # when it was closed, or told that the chat is gone
    code: int | None = None  # None for `chat_removed`
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)
    is_marked: bool = False  # something else was heard at last

    async def listens(self) -> None:
        """Hear everything until the socket is closed, or what was said in another chat."""
        while not self.is_marked:
            heard = await self.line.ws.receive()
            if heard.type is not aiohttp.WSMsgType.TEXT:
                self.ended_at, self.code = time.monotonic(), self.line.ws.close_code
                return
            frame = heard.json()
            if frame["type"] == "chat_removed":
                self.ended_at = time.monotonic()
            elif frame["type"] == "message":
                self.is_marked = frame["data"]["chat_id"] != self.chat
                self.heard += [] if self.is_marked else [int(frame["data"]["text"])]
                self.has_begun.set()


MakePerson = Callable[[str], Awaitable[Person]]
OpenEars = Callable[[Person, int, bool], Awaitable[list[Ear]]]


@dataclass
class Round:
    """One revocation, of whoever the ears belong to."""

    kind: str
    owner: Person
    victim: Person  # at the server where it is revoked
    talk: Talk
    ears: list[Ear]
    other_chat: int  # the owner's with the victim, which stays
    is_quiet: bool  # nobody posts until the sockets have ended: nothing else tells of it
    took: float = 0.0  # seconds, until the last ear had ended
    leaked: list[int] = field(default_factory=list)

    async def runs(self) -> "Round":
        """Revoke while there is talk; see the sockets end and nothing come after."""
        other = Person(self.victim.client, self.victim.name)
        await other.logs_in()
        talking = asyncio.create_task(self.talk.goes_on())
        self.talk.is_on.set()
        listening = [asyncio.create_task(ear.listens()) for ear in self.ears]
        try:
            async with asyncio.timeout(SOON_SECONDS):
                await asyncio.gather(*[ear.has_begun.wait() for ear in self.ears])
                if self.is_quiet:
                    await self._falls_silent()
            await self._revoke(other)
            revoked_at, last = time.monotonic(), self.talk.begun
            async with asyncio.timeout(SOON_SECONDS):
                await self._ends(last, listening)
        except TimeoutError:
            raise AssertionError(f"{self.kind}: the sockets did not end in time") from None
        finally:
            for task in (talking, *listening):
                task.cancel()
            await asyncio.gather(talking, *listening, return_exceptions=True)
            await asyncio.gather(*[ear.line.close() for ear in self.ears])
        self.took = max(ear.ended_at for ear in self.ears) - revoked_at
        self.leaked = [number for ear in self.ears for number in ear.heard if number > last]
        return self

    async def _falls_silent(self) -> None:
        """Let the talk rest, and wait until all of it was heard."""
        self.talk.is_on.clear()
        await self.talk.reaches(self.talk.begun)
        while any(ear.heard[-1] < self.talk.begun for ear in self.ears):
            await asyncio.sleep(PAUSE_SECONDS)

    async def _ends(self, last: int, listening: list["asyncio.Task[None]"]) -> None:
        """Wait until every socket has ended, and the talk has gone on; hear what is left."""
        while not all(ear.ended_at for ear in self.ears):
            await asyncio.sleep(PAUSE_SECONDS)
        self.talk.is_on.set()
        await self.talk.reaches(last + 5)
        if self.kind == "removed":
            await self.owner.says(self.other_chat, "that is all")
        await asyncio.gather(*listening)

    async def _revoke(self, other: Person) -> None:
        """Revoke as the round's kind says; `other` is another session of the same user."""
        victim, account = self.victim, f"/users/{self.victim.id}"
        known = {"current_password": PASSWORD}
        if self.kind == "removed":
            path = f"/chats/{self.talk.chat}/participants/{victim.id}"
            await self.owner.expects(204, "DELETE", path)
        elif self.kind == "logged out":
            await victim.posts("/users/logout", status=204)
        elif self.kind == "session ended":
            session = jwt.decode(victim.access, SECRET_KEY, algorithms=["HS256"])["sid"]
            await other.expects(204, "DELETE", f"/users/me/sessions/{session}")
        elif self.kind == "password changed":
            body = known | {"password": "another horse"}
            await other.expects(200, "PUT", account, body)
        elif self.kind == "deactivated":
            await other.expects(200, "PUT", account, {"is_active": False})
        else:
            await victim.expects(204, "DELETE", account)

    def wrong(self) -> Iterator[str]:
        """Tell what was not as it should be."""
        if self.leaked:
            yield f"{self.kind}: what was posted after the answer was delivered: {self.leaked}"
        for ear in self.ears:
            if ear.code not in self._codes(ear):
                yield f"{self.kind}: closed with {ear.code}"

    def _codes(self, ear: Ear) -> set[int | None]:
        """Answer the codes that an ear may end with; None is for a socket that stays open."""
        if self.kind == "removed":
            return {None if ear.follows_all else 4403}
        both_are_true = self.kind == "deleted" and not ear.follows_all
        return {4401, 4403} if both_are_true else {4401}


async def ear_of(person: Person, chat: int, follows_all: bool) -> Ear:
    """Open a socket, on one chat or on all of them."""
    path = "/ws" if follows_all else f"/ws/{chat}"
    line = Line(await person.client.ws_connect(path, headers=person.headers))
    person.lines.append(line)
    return Ear(line, chat, follows_all)


class Stage:
    """Makes rounds, each with a victim of its own; two people are in all of them."""

    def __init__(self, make_person: MakePerson, open_ears: OpenEars) -> None:
        self._make_person = make_person
        self._open_ears = open_ears

    async def begin(self) -> "Stage":
        """Make the two."""
        self.owner = await self._make_person("owner")
        self.talker = await self._make_person("talker")
        return self

    async def plays(self, number: int) -> Round:
        """Make a round and run it: each kind on a socket of one chat, then on one of all chats,
        then both in silence."""
        kind, turn = KINDS[number % len(KINDS)], number // len(KINDS)
        follows_all, is_quiet = turn % 2 == 1, turn // 2 % 2 == 1
        victim = await self._make_person(f"victim_{number}")
        chat = await self.owner.founds(victim, self.talker)
        other_chat = await self.owner.opens(victim)
        ears = await self._open_ears(victim, chat, follows_all)
        talk = Talk(self.talker, chat)
        return await Round(kind, self.owner, victim, talk, ears, other_chat, is_quiet).runs()


def ear_at(takes: Callable[[Person], Awaitable[Person]]) -> OpenEars:
    """Open one socket, at another server."""

    async def open_ears(victim: Person, chat: int, follows_all: bool) -> list[Ear]:
        return [await ear_of(await takes(victim), chat, follows_all)]

    return open_ears


def ears_at_both(server: Server) -> OpenEars:
    """Open sockets until each of two workers has one: the kernel chooses."""

    async def open_ears(victim: Person, chat: int, follows_all: bool) -> list[Ear]:
        ears: list[Ear] = []
        async with asyncio.timeout(SOON_SECONDS):
            while any(sockets_at(server)):
                await asyncio.sleep(0.05)  # until those of the round before are gone
            while not all(sockets_at(server)):
                ears.append(await ear_of(victim, chat, follows_all))
        return ears

    return open_ears


def judge(rounds: Iterable[Round]) -> None:
    """See that nothing was wrong in any of the rounds."""
    assert [problem for each in rounds for problem in each.wrong()] == []


# ---- Between two servers in this process


async def test_revocation_reaches_another_server_by_hint(
    no_polls: None, people: MakePerson, elsewhere: Elsewhere
) -> None:
    """Each kind of revocation closes a socket at another server by hint alone, during talk and
    during silence, and nothing posted after its answer is delivered there."""
    stage = await Stage(people, ear_at(elsewhere.takes)).begin()
    judge(await asyncio.gather(*map(stage.plays, (*range(6), *range(18, 24)))))


async def test_revocation_reaches_another_server_with_every_hint_lost(
    people: MakePerson, elsewhere: Elsewhere, app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any hint a poll finds each revocation, before it delivers what was posted later."""
    monkeypatch.setattr(app[messenger.BUS], "notify", lambda key, hint: None)
    stage = await Stage(people, ear_at(elsewhere.takes)).begin()
    judge(await asyncio.gather(*map(stage.plays, range(6, 12))))


# ---- Between processes


@pytest.fixture
async def start(database_url: str, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Start servers on the test's database: `await start("here", WORKERS=2)`."""
    started: list[Server] = []

    async def make(name: str, is_mute: bool = False, **settings: Any) -> Server:
        (tmp_path / name).mkdir()
        own = {"DATABASE_URL": database_url, "SECRET_KEY": SECRET_KEY} | settings
        server = Server(tmp_path / name, **own)
        if is_mute:
            server.program = tmp_path / name / "messenger.py"
            server.program.write_text(MUTE)
        started.append(server)
        return await server.starts()

    yield make
    for server in started:
        if server.process.returncode is None:
            assert await server.stops() == 0


@pytest.mark.skipif(not LONG, reason="takes minutes: FUZZ=long")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("is_mute", [False, True], ids=["with hints", "without hints"])
async def test_revocation_reaches_another_process(
    start: Any, people_of: Any, is_mute: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hundred times with hints and a hundred times without, the socket at another process is
    closed in time, and nothing posted after the answer is delivered."""
    here, there = await start("here", is_mute), await start("there")
    takes = ear_at(lambda person: people_of(there, person.name, person))
    stage = await Stage(lambda name: people_of(here, name), takes).begin()
    rounds: list[Round] = []
    for first in range(0, ROUNDS // 2, AT_ONCE):
        rounds += await asyncio.gather(*map(stage.plays, range(first, first + AT_ONCE)))
    told = "without hints" if is_mute else "with hints"
    slowest = max(each.took for each in rounds)
    with capsys.disabled():
        print(f"\n{len(rounds)} revocations {told}: the slowest socket closed in {slowest:.2f} s")
    judge(rounds)
    assert slowest < (UNHINTED_SECONDS if is_mute else HINTED_SECONDS) + NOISE_SECONDS


@pytest.mark.skipif(not LONG, reason="takes minutes: FUZZ=long")
@pytest.mark.timeout(300)
async def test_revocation_reaches_every_worker(start: Any, people_of: Any) -> None:
    """Whichever of two workers is asked, the sockets at both are closed and hear nothing more."""
    server = await start("workers", WORKERS=2)
    stage = await Stage(lambda name: people_of(server, name), ears_at_both(server)).begin()
    judge([await stage.plays(number) for number in range(4 * len(KINDS))])
