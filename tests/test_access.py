"""Who may do what: every endpoint and every frame, for every kind of caller and of target.

What shall be answered stands in access_table.py, one row a target; access_world.py asks it.
"""

import asyncio
import itertools
import typing
from collections import Counter
from collections.abc import Awaitable, Callable

import asyncpg
import pytest
from access_table import CALL_ROWS, CALLERS, FRAME_ROWS, PROBLEMS
from access_world import OUTSIDE, World, claims_of
from aiohttp import web
from conftest import SECRET_KEY, Person

import messenger

TYPES = [frame.__struct_config__.tag for frame in typing.get_args(messenger.ClientFrame)]
SOCKETS = ("/ws/{chat_id}", "/ws")

# What every row of an endpoint's parameter must be there for.
KINDS = {
    "{chat_id}": ("group", "foreign", "missing", "no id", "personal", "partner gone"),
    "users/{user_id}": ("oneself", "another", "deleted", "missing", "no id"),
    "participants/{user_id}": ("group, oneself", "group, mate", "group, missing", "group, no id"),
    "{message_id}": (
        "group, own", "group, mate's", "group, foreign", "group, missing", "group, no id",
        "foreign, theirs", "personal, own", "personal, partner's",
    ),
    "{session_id}": ("own", "another's", "missing", "no id"),
}  # fmt: skip


@pytest.fixture
def app(database_url: str) -> web.Application:
    """The application, with no limit to how often it is asked."""
    settings = messenger.Settings(bcrypt_cost=4, rate_limits="off")
    return messenger.make_app(settings, database_url, SECRET_KEY)


# ---- The tables are whole


def test_every_endpoint_has_its_rows() -> None:
    """The table has each endpoint, no other, and each once."""
    called = [called for called, _ in itertools.groupby(CALL_ROWS, lambda row: row.called)]
    endpoints = [(endpoint.method, endpoint.path) for endpoint in messenger.ENDPOINTS]
    assert sorted(called) == sorted(endpoints)


def test_every_kind_of_id_has_its_row() -> None:
    """For each parameter of a path there are rows of one's own, of another's and of nobody's."""
    for endpoint in messenger.ENDPOINTS:
        own = [row for row in CALL_ROWS if row.called == (endpoint.method, endpoint.path)]
        for parameter, kinds in KINDS.items():
            for kind in kinds if parameter in endpoint.path else ():
                assert any(f"{row.about},".startswith(f"{kind},") for row in own), (
                    endpoint, kind)


def test_every_frame_has_its_rows() -> None:
    """The table has each frame that a client may send, on each of the two sockets, no other."""
    called = [called for called, _ in itertools.groupby(FRAME_ROWS, lambda row: row.called)]
    assert sorted(called) == sorted(itertools.product(TYPES, SOCKETS))


def test_every_row_is_one_and_has_known_answers() -> None:
    """No row is there twice, and every refusal is one of the legend."""
    for rows in (CALL_ROWS, FRAME_ROWS):
        assert Counter((row.called, row.about) for row in rows).most_common(1)[0][1] == 1
    for row in CALL_ROWS:
        for cell in row.cells.values():
            assert cell in PROBLEMS or cell < "300", (str(row), cell)
    answers = {"-", "ack", "read", "ready", "auth", "x401", "x404"}
    for row in FRAME_ROWS:
        assert set(row.cells.values()) <= answers | PROBLEMS.keys(), str(row)
    assert set(PROBLEMS.values()) <= messenger.Problem.named.keys()


@pytest.fixture
async def world(people: Callable[[str], Awaitable[Person]], sql: asyncpg.Connection) -> World:
    """Everybody that the tables speak of."""
    asyncio.get_running_loop().set_debug(False)  # which takes as long as the rest together
    return await World(people, sql).begin()


# ---- Calls


async def test_every_call_is_answered_as_its_row_says(world: World) -> None:
    """Every endpoint answers every caller about every target with the table's status and type,
    GET and HEAD alike; what is not there and what one may not see read the same; a refused call
    changes nothing."""
    for row in CALL_ROWS:
        await world.checks_calls(row)
    assert world.wrong == []
    hidden = {code: said for code, said in world.details.items() if code.startswith("404")}
    assert {code: len(said) for code, said in hidden.items()} == dict.fromkeys(
        ("404c", "404m", "404s", "404u"), 1)


async def test_lists_hold_what_is_ones_own(world: World) -> None:
    """The list of chats has those that one is in, the list of sessions one's own; nobody sees the
    address of another."""
    for caller in CALLERS[2:]:
        person = world.people[caller]
        chats = {world.personal[caller], world.widowed[caller]}
        if caller not in OUTSIDE:
            chats.add(world.scene.group)
        assert {chat["id"] for chat in await person.gets("/chats")} == chats
        [session] = await person.gets("/users/me/sessions")
        assert session["id"] == claims_of(person.access)["sid"]
        users = await person.gets("/users")
        users.append(await person.gets(f"/users/{world.people['mate'].id}"))
        assert len(users) > len(world.people)
        assert [user for user in users if "email" in user and user["id"] != person.id] == []


# ---- Frames


async def test_every_frame_is_answered_as_its_row_says(world: World) -> None:
    """Every frame on each socket is answered, by every caller about every target, with the table's
    frame or problem; the others in the chat hear of what was taken, and of nothing else; a refused
    frame or handshake changes nothing."""
    await world.watch()
    for row in FRAME_ROWS:
        await world.checks_frames(row)
    assert world.wrong == []
