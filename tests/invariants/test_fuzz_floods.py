"""Floods of every kind from a stranger: an honest user beside them is served, and refused nothing.
"""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import messenger
from support.floods import BLOCKS, CALLS, HASTE, LISTENING, SILENCE, Flood, flood
from support.fuzzing import LONG
from support.hostile import CLOSE, CONTINUATION, FIN, PING, PONG, TEXT, frame
from support.people import HEAR_SECONDS, PASSWORD, Line, Person
from support.raw import handshake
from support.servers import SECRET_KEY, Server

pytestmark = pytest.mark.usefixtures("nothing_left")

STRANGER = "127.0.0.2"  # where the floods come from
LISTENERS_AT = [f"127.0.0.{n}" for n in range(3, 7)]  # where the stranger listens to them
FLOOD_SECONDS = 5.0 if LONG else 1.0
P99_SECONDS = 0.1 if LONG else HEAR_SECONDS  # of an honest call; long: on a quiet machine
PAUSE_SECONDS = 0.02  # between two honest calls
CONNECTIONS = 200
LISTENERS = 1_500 if LONG else 40  # sockets of the stranger, at a second address
OPENING_SECONDS = 6.0 if LONG else 1.0  # until they are open
MEMORY_MB_MAX = 250
ACCOMPLICES = 49 if LONG else 4  # other accounts of the stranger
BLOCK = 4_000  # control frames in one write
ENDING = ("refresh", "logout", "delete_user", "delete_session")  # calls that end a session
REFUSED = {  # floods that may be answered 401
    "calls", "marks in a login", "deletions that many watch", "renames while many sync", *ENDING}
MARKS = "\u0344" * 16_000 + "\u0323" * 15_900

# A hundred groups of a hundred, each with a long message: the dearest list of chats that there is.
GROUPS = """
insert into users (email, email_key, username, username_key, password_hash)
select n || '@x.y', n || '@x.y', 'user' || n, 'user' || n, 'x' from generate_series(1, 99) n;
insert into chats (is_group, name, participant_count, last_rev, last_seq)
select true, 'group', 100, 1, 1 from generate_series(1, 100);
insert into participants (chat_id, user_id, role)
select c.id, u.id, case when u.id = {owner} then 'owner' else 'member' end
from chats c, (select id from users where username like 'user%' or id = {owner}) u
where c.name = 'group';
insert into messages (chat_id, seq, rev, id, sender_id, text, created_at)
select id, 1, 1, gen_random_uuid(), {owner}, repeat('x', 4096), now() from chats
where name = 'group';
"""

# $1 accomplices: each owns a group of all of them.
WATCHED = """
with made as (
    insert into chats (is_group, name, participant_count)
    select true, owner::text, cardinality($1::bigint[]) from unnest($1::bigint[]) owner
    returning id, name)
insert into participants (chat_id, user_id, role)
select made.id, n, case when made.name = n::text then 'owner' else 'member' end
from made, unnest($1::bigint[]) n
"""


class Stranger:
    """Somebody with an account, who floods."""

    def __init__(self, port: int, person: Person, chat: int, message: str) -> None:
        self.port, self.person, self.chat, self.message = port, person, chat, message

    def request(
        self, method: str, path: str, body: Any = None, token: str | None = None
    ) -> str:
        """Write a request."""
        sent = "" if body is None else json.dumps(body, ensure_ascii=False)
        head = (f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(sent.encode())}\r\n"
                f"Authorization: Bearer {token or self.person.access}\r\n\r\n")
        return (head + sent).encode().decode("latin-1")

    def of_calls(self, spent: Person, victim: int) -> list[Flood]:
        """Make a flood of each call; those that end sessions end those of `spent`."""
        login = {"email": spent.email, "password": PASSWORD}  # the 51st ends the first session
        bodies = {
            "create_user": {"email": "a@x.org", "username": "a_a", "password": PASSWORD},
            "login": login,
            "refresh": {"refresh_token": spent.refresh},
            "change_user": {"username": "mallory_2"},
            "create_chat": {"is_group": True, "name": "x", "participant_ids": [victim]},
            "change_chat": {"name": "y"},
            "add_participant": {"user_id": victim},
            "send_message": {"text": "x"},
            "change_message": {"text": "y"},
            "read_message": {"message_id": self.message},
        }
        floods = []
        for one in messenger.ENDPOINTS:
            name = one.handler.__name__
            who = spent if name in ENDING else self.person
            user = who.id if name in ("change_user", "delete_user") else victim
            path = one.path.format(
                chat_id=self.chat, message_id=self.message, user_id=user, session_id=1)
            path += "?limit=100" if name.startswith("list_") else ""
            sent = self.request(one.method, path, bodies.get(name), who.access)
            floods.append(Flood(name, CALLS, [sent], 96 if name == "login" else 30))
        return floods

    def of_texts(self) -> list[Flood]:
        """Make floods of texts that take long to look into."""
        messages = f"/api/v1/chats/{self.chat}/messages"
        return [
            Flood("marks in a login", CALLS, [self.request("POST", "/api/v1/users/login", {
                "email": f"a{MARKS}@x.y", "password": MARKS[:100]})]),
            Flood("marks in texts", CALLS, [
                self.request("POST", messages, {"text": "\u0344" * 2_700 + "\u0323" * 1_395}),
                self.request("POST", messages, {"text": "\ufdfa" * 4_096}),
                self.request("GET", f"{messages}?q=x")]),
            Flood("marks in names", CALLS, [self.request(
                "PUT", f"/api/v1/users/{self.person.id}", {"username": MARKS})]),
        ]

    def of_frames(self, groups: list[int]) -> list[Flood]:
        """Make floods of frames over sockets, and of sockets that come and go."""
        def of(name: str, block: bytes, connections: int = 1, path: str = "") -> Flood:
            opening = handshake(self.port, path or f"/ws/{self.chat}", self.person.access)
            sends = [opening.decode("latin-1"), block.decode("latin-1")]
            return Flood(name, BLOCKS, sends, connections)

        def text(**told: Any) -> bytes:
            return frame(FIN | TEXT, json.dumps(told).encode()) * 100

        return [
            of("pings", frame(FIN | PING, b"") * BLOCK),
            of("pongs", frame(FIN | PONG, b"") * BLOCK),
            of("fragments", frame(TEXT, b"") + frame(CONTINUATION, b"") * BLOCK),
            of("messages", text(type="message", text="x")),
            of("reads", text(type="read", message_id=self.message)),
            of("typing", text(type="typing")),
            of("wrong frames", text(type="nothing")),
            of("tokens", text(type="auth", token="x" * 1_000)),
            of("replays", text(type="sync", after=0), 20),
            of("long replays", text(type="sync", chats=dict.fromkeys(groups, 0)), 20, "/ws"),
            of("handshakes", frame(FIN | CLOSE, b""), 30, "/ws"),
        ]

    def of_many(self, accomplices: dict[Person, int]) -> list[Flood]:
        """Make floods by many accounts, each with a chat of its own."""
        tokens = [person.access for person in (self.person, *accomplices)]
        asked = [self.request("GET", "/api/v1/users/me", token=token) for token in tokens]
        opened = [handshake(self.port, "/ws", token).decode("latin-1") for token in tokens]
        texts = [
            json.dumps({"type": "message", "text": "字" * 4_096, "chat_id": chat}).encode()
            for chat in (self.chat, *accomplices.values())]
        bursts = [(frame(FIN | TEXT, text) * 20).decode("latin-1") for text in texts]
        posted = itertools.chain.from_iterable(zip(opened, bursts, strict=True))
        return [
            Flood("light calls of many", CALLS, asked, 4 * len(tokens)),
            Flood("long messages of many", BLOCKS, list(posted), len(tokens)),
            Flood("handshakes that are cut off", HASTE, opened, 10),
        ]

    def of_watched(self, accomplices: dict[Person, int]) -> list[tuple[Flood, Flood]]:
        """Make floods of what many sockets are told, each after the flood of those sockets;
        `accomplices` name the group that each owns. Half of them are deleted in the third.
        """
        def owned(method: str, path: str, body: Any) -> list[str]:
            return [self.request(method, f"/api/v1/chats/{chat}{path}", body, each.access)
                    for each, chat in accomplices.items()]

        opened = [handshake(self.port, "/ws", each.access).decode("latin-1")
                  for each in accomplices]
        sync = json.dumps({"type": "sync", "chats": dict.fromkeys(accomplices.values(), 0)})
        synced = (frame(FIN | TEXT, sync.encode()) * 2).decode("latin-1")
        again = list(itertools.chain.from_iterable((each, synced) for each in opened))
        listening = Flood("", LISTENING, opened, LISTENERS)
        deleted = [self.request("DELETE", f"/api/v1/users/{each.id}", None, each.access)
                   for each in list(accomplices)[::2]]
        renamed = owned("PATCH", "", {"name": "y"})
        return [
            (listening, Flood("renames that many watch", CALLS, renamed)),
            (listening, Flood("long messages that many watch", CALLS, owned(
                "POST", "/messages", {"text": "x" * 4_096}))),
            (listening, Flood("deletions that many watch", CALLS, deleted)),
            (Flood("", BLOCKS, again, LISTENERS), Flood(
                "renames while many sync", CALLS, renamed)),
        ]

    def of_connections(self) -> list[Flood]:
        """Make floods of connections that are held, with nothing or with an unread answer."""
        return [
            Flood("half-open connections", SILENCE, [""], 2 * CONNECTIONS),
            Flood("half of the headers", SILENCE, ["GET / HTTP/1.1\r\nX: "], 2 * CONNECTIONS),
            Flood("unread answers", SILENCE, [
                self.request("GET", "/api/v1/chats?limit=100")], CONNECTIONS),
            Flood("requests that wait for no answer", SILENCE, [
                self.request("GET", "/api/v1/users/me", token="x" * 7_900) * 100,
                self.request("POST", "/api/v1/users/refresh", "x" * 60_000) * 20], CONNECTIONS),
            Flood("bodies that are cut off", HASTE, [
                self.request("POST", "/api/v1/users/login", {"email": "x" * 100})[:-1]],
                CONNECTIONS),
        ]


class Honest:
    """Somebody who does all that people do, at a person's pace, and times each call."""

    def __init__(self, person: Person, chat: int, line: Line) -> None:
        self.person, self.chat, self.line = person, chat, line
        self.seconds: list[float] = []
        self.sent: Any = None  # the last message posted over REST

    async def lives(self, beside: "asyncio.Task[Any]") -> None:
        """Do one thing after the other, until what is done beside it has ended."""
        page = f"/chats/{self.chat}/messages?limit"
        calls = [
            self.posts, lambda: self.person.reads(self.chat, self.sent),
            lambda: self.person.gets("/chats"), self.says, lambda: self.person.gets("/users/me"),
            lambda: self.person.gets(f"{page}=10"), lambda: self.person.gets(f"{page}=5&q=socket")]
        for call in itertools.cycle(calls):
            began = time.perf_counter()
            await call()
            self.seconds.append(time.perf_counter() - began)
            if beside.done():
                break
            await asyncio.sleep(PAUSE_SECONDS)

    async def posts(self) -> None:
        """Post over REST."""
        self.sent = await self.person.says(self.chat, f"number {len(self.seconds)}")

    async def says(self) -> None:
        """Post over a socket, and hear that it is durable."""
        await self.line.says("over a socket", ref=len(self.seconds))
        assert (await self.line.hears("ack", "error"))["type"] == "ack"


@pytest.fixture
async def flooded(
    request: pytest.FixtureRequest, database_url: str, tmp_path: Path
) -> AsyncIterator[Server]:
    """A server with its usual limits, but for how many connections an address may have; afterwards
    it is still up, and has logged no error."""
    server = await Server(
        tmp_path, DATABASE_URL=database_url, SECRET_KEY=SECRET_KEY, RATE_LIMITS="on",
        CONNECTIONS_PER_ADDRESS=getattr(request, "param", CONNECTIONS), BCRYPT_COST=10).starts()
    yield server
    assert server.process.returncode is None, server.complaints()
    assert await server.stops() == 0, server.complaints()
    assert "ERROR" not in server.complaints()


class Watch:
    """Watches an honest user beside floods of a server."""

    def __init__(self, server: Server, honest: Person, chat: int, line: Line) -> None:
        self.server, self.person, self.chat, self.line = server, honest, chat, line
        self.slow: dict[str, float] = {}  # the floods beside which a call took too long

    async def sees_served(self, name: str, flooding: "asyncio.Task[dict[str, int]]") -> None:
        """See that the honest user is served until a flood ends, which must be one."""
        honest = Honest(self.person, self.chat, self.line)
        await honest.lives(flooding)
        heard = await flooding
        times = sorted(honest.seconds)
        p99 = times[int(len(times) * 0.99)]
        if LONG:
            told = f"{len(times)} calls, p50 {times[len(times) // 2] * 1000:.0f} ms, "
            print(f"\n{name}: {told}p99 {p99 * 1000:.0f} ms beside {heard}", end="")
        if not set(name.split(", ")) & REFUSED:
            assert "401" not in heard, f"nothing was flooded by {name}: signed out"
        if p99 > P99_SECONDS:
            self.slow[name] = p99
        assert self.server.memory_mb() < MEMORY_MB_MAX, name


@pytest.mark.timeout(3600 if LONG else 120)
async def test_honest_user_is_served_beside_floods(
    flooded: Server, people_of: Any, sql: asyncpg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a stranger floods with, an honest user is refused nothing, and waits for no call
    long; and the server takes no more memory than its limits allow."""
    mallory, spent, alice, bob = [
        await people_of(flooded, name) for name in ("mallory", "spent", "alice", "bob")]
    await sql.execute(GROUPS.format(owner=mallory.id))
    await sql.execute("analyze")
    theirs = await mallory.founds(bob)
    message = await mallory.says(theirs, "x")
    stranger = Stranger(flooded.port, mallory, theirs, message["id"])
    groups = [row["id"] for row in await sql.fetch("select id from chats where name = 'group'")]
    calls = stranger.of_calls(spent, bob.id)
    accomplices = [
        await people_of(flooded, f"accomplice_{number}") for number in range(ACCOMPLICES)]
    many = stranger.of_many({each: await each.founds(bob) for each in accomplices})
    others = stranger.of_texts() + stranger.of_frames(groups) + many
    floods = [[each] for each in calls + others + stranger.of_connections()]
    if not LONG:  # all calls in turn, then all else, then the connections
        sends = [sent for each in calls for sent in each.sends]
        texts, frames = stranger.of_texts(), stranger.of_frames(groups)
        floods = [[Flood("calls", CALLS, sends)], texts, frames, many, stranger.of_connections()]
    chat = await alice.opens(bob)
    watch = Watch(flooded, alice, chat, await alice.listens_live(chat))
    asyncio.get_running_loop().set_debug(False)  # what the honest user takes is not the server's
    with capsys.disabled():
        for at_once in floods:
            await watch.sees_served(
                ", ".join(each.name for each in at_once),
                asyncio.create_task(flood(flooded.port, STRANGER, FLOOD_SECONDS, at_once)))
    assert watch.slow == {}


@pytest.mark.timeout(3600 if LONG else 120)
@pytest.mark.parametrize("flooded", [LISTENERS + 100], indirect=True)
async def test_honest_user_is_served_beside_what_many_sockets_are_told(
    flooded: Server, people_of: Any, sql: asyncpg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a stranger has written to very many sockets of their own, an honest user is served
    as usual."""
    mallory, alice, bob = [
        await people_of(flooded, name) for name in ("mallory", "alice", "bob")]
    accomplices = [
        await people_of(flooded, f"accomplice_{number}") for number in range(ACCOMPLICES)]
    await sql.execute(WATCHED, [each.id for each in accomplices])
    owned = {each: await sql.fetchval("select id from chats where name = $1", str(each.id))
             for each in accomplices}
    stranger = Stranger(flooded.port, mallory, 0, "")
    chat = await alice.opens(bob)
    watch = Watch(flooded, alice, chat, await alice.listens_live(chat))
    asyncio.get_running_loop().set_debug(False)  # what the honest user takes is not the server's
    with capsys.disabled():
        for origin, (sockets, told) in zip(LISTENERS_AT, stranger.of_watched(owned), strict=True):
            listening = asyncio.create_task(flood(
                flooded.port, origin, OPENING_SECONDS + FLOOD_SECONDS + 1, [sockets]))
            await asyncio.sleep(OPENING_SECONDS)
            await watch.sees_served(told.name, asyncio.create_task(
                flood(flooded.port, STRANGER, FLOOD_SECONDS, [told])))
            assert (await listening)["101"] > LISTENERS / 3  # of fewer accounts at the end
    assert watch.slow == {}
