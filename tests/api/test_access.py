"""Who may do what: every endpoint and every frame, for every kind of caller and of target.

What shall be answered stands in access_table.py, one row a target; access_cast.py asks it.
"""

import asyncio
import itertools
import typing
from collections import Counter
from collections.abc import Awaitable, Callable

import asyncpg
import pytest
from access_cast import OUTSIDE, Cast, claims_of
from access_table import CALL_ROWS, CALLERS, FRAME_ROWS, PROBLEMS
from aiohttp import web

import messenger
from plumbing.endpoints import Problem
from support.people import Person
from support.servers import SECRET_KEY

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
}


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
    """Each parameter of a path has rows for the caller's own id, for another's and for nobody's."""
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
    """No row is there twice, and every answer is one that the legend explains."""
    for rows in (CALL_ROWS, FRAME_ROWS):
        assert Counter((row.called, row.about) for row in rows).most_common(1)[0][1] == 1
    for row in CALL_ROWS:
        for cell in row.cells.values():
            assert cell in PROBLEMS or cell < "300", (str(row), cell)
    answers = {"ack", "read", "ready", "auth", "pong", "x401", "x404"}
    for row in FRAME_ROWS:
        assert set(row.cells.values()) <= answers | PROBLEMS.keys(), str(row)
    assert set(PROBLEMS.values()) <= Problem.named.keys()


@pytest.fixture
async def cast(people: Callable[[str], Awaitable[Person]], sql: asyncpg.Connection) -> Cast:
    """Everybody that the tables speak of."""
    asyncio.get_running_loop().set_debug(False)  # which takes as long as the rest together
    return await Cast(people, sql).begin()


# ---- Calls


async def test_every_call_is_answered_as_its_row_says(cast: Cast) -> None:
    """Every endpoint answers every caller about every target with the table's status and type, GET
    and HEAD alike; what is not there and what one may not see read the same, and a refused call
    changes nothing."""
    for row in CALL_ROWS:
        await cast.checks_calls(row)
    assert cast.wrong == []
    hidden = {code: said for code, said in cast.details.items() if code.startswith("404")}
    assert {code: len(said) for code, said in hidden.items()} == dict.fromkeys(
        ("404c", "404m", "404s", "404u"), 1)


async def test_lists_hold_what_is_ones_own(cast: Cast) -> None:
    """The list of chats has the caller's own chats, the list of sessions their own sessions, and
    nobody sees another's email."""
    for caller in CALLERS[2:]:
        person = cast.people[caller]
        chats = {cast.personal[caller], cast.widowed[caller]}
        if caller not in OUTSIDE:
            chats.add(cast.scene.group)
        assert {chat["id"] for chat in await person.gets("/chats")} == chats
        [session] = await person.gets("/users/me/sessions")
        assert session["id"] == claims_of(person.access)["sid"]
        users = await person.gets("/users")
        users.append(await person.gets(f"/users/{cast.people['mate'].id}"))
        assert len(users) > len(cast.people)
        assert [user for user in users if "email" in user and user["id"] != person.id] == []


# ---- Frames


async def test_every_frame_is_answered_as_its_row_says(cast: Cast) -> None:
    """Every frame on each socket gets the table's frame or problem, whoever sends it and whatever
    it is about; the others in the chat hear what was taken and nothing else, and a refused frame or
    handshake changes nothing."""
    await cast.watch()
    for row in FRAME_ROWS:
        await cast.checks_frames(row)
    assert cast.wrong == []
