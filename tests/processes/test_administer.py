"""An administrator's commands: each as a process, beside a running server and without one."""

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import msgspec
import pytest
from aiohttp import web

import messenger
from plumbing.endpoints import Problem
from plumbing.process import StartError
from support.databases import LATER
from support.people import PASSWORD, SOON_SECONDS, Line, Person
from support.servers import ROOT, SECRET_KEY, SETTINGS, START_SECONDS, Server, environment
from tools import administer

pytestmark = pytest.mark.usefixtures("nothing_left")

Command = Callable[..., Awaitable[tuple[int, str, str]]]


async def administers(
    folder: Path, *arguments: str | bytes, **settings: Any
) -> tuple[int, str, str]:
    """Run `messenger.py ARGUMENTS`; answer its status and what it wrote to stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "messenger.py"), *arguments,
        cwd=folder, env=environment(**settings), stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(START_SECONDS):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def refused(arguments: tuple[str, ...], database_url: str) -> str:
    """Obey a command line in this process; answer the one line by which it is refused."""
    settings = msgspec.structs.replace(
        SETTINGS, database_url=database_url, secret_key=SECRET_KEY, registration="closed")
    with pytest.raises(Problem) as raised:
        await administer.administer(settings, *administer.read_command(("user", *arguments))[:2])
    assert "\n" not in raised.value.detail
    return raised.value.detail


@pytest.fixture
def user(tmp_path: Path, database_url: str) -> Command:
    """Run `messenger.py user ARGUMENTS` on the test's database."""

    async def run(*arguments: str | bytes, **settings: Any) -> tuple[int, str, str]:
        settings |= {"DATABASE_URL": database_url, "SECRET_KEY": SECRET_KEY}
        return await administers(tmp_path, "user", *arguments, **settings)

    return run


async def login(person: Person, password: str = PASSWORD) -> tuple[int, str]:
    """Try to log in; answer the status and the body of a refusal."""
    body = {"email": person.email, "password": password}
    same = {"X-Request-Id": "same"}
    async with person.client.post("/api/v1/users/login", json=body, headers=same) as answer:
        return answer.status, "" if answer.status == 200 else await answer.text()


async def is_let_in(person: Person) -> bool:
    """Whether the person's access token counts."""
    answer = await person.asks("GET", "/users/me")
    assert answer.status in (200, 401)
    return answer.status == 200


async def test_disabled_account_is_signed_out_and_kept_out(
    user: Command, alice: Person, bob: Person, sql: asyncpg.Connection
) -> None:
    """Disabling an account soon ends its tokens and sockets at a running server; logins are refused
    like those of an unknown email until the account is enabled again."""
    chat = await alice.opens(bob)
    lines = [await alice.listens_live(chat), Line(
        await alice.client.ws_connect("/ws", headers=alice.headers))]
    alice.lines.append(lines[1])
    unknown = Person(alice.client, "nobody")
    assert await user("disable", "ALICE@Example.com") == (0, f"user {alice.id} is disabled\n", "")
    async with asyncio.timeout(SOON_SECONDS):
        assert [await line.is_closed() for line in lines] == [4401, 4401]
        while await is_let_in(alice):
            await asyncio.sleep(0.05)
    refused = await login(unknown)
    assert refused[0] == 401
    assert await login(alice) == refused
    assert await login(alice, "wrong password") == refused
    body = {"refresh_token": alice.refresh}
    async with alice.client.post("/api/v1/users/refresh", json=body) as answer:
        assert answer.status == 401
    assert (await bob.gets(f"/users/{alice.id}"))["is_active"] is False
    assert (await user("list"))[1].splitlines()[0].split() == [
        str(alice.id), "disabled", alice.email, "alice"]
    assert await is_let_in(bob)

    assert await user("enable", alice.email) == (0, f"user {alice.id} is enabled\n", "")
    assert not await is_let_in(alice)  # what was ended stays ended
    await alice.logs_in()
    assert await is_let_in(alice)
    assert (await bob.gets(f"/users/{alice.id}"))["is_active"] is True
    await alice.listens_live(chat)


async def test_login_under_way_does_not_outlive_the_disabling(
    alice: Person, sql: asyncpg.Connection
) -> None:
    """A login whose password was already verified gets no session once the account is disabled."""
    hashed = await sql.fetchval("select password_hash from users")
    await sql.fetch(administer.DISABLE_USER, alice.id, True, LATER)
    started = await sql.fetch(
        messenger.START_SESSION, alice.id, hashed, None, "", "", "", "", LATER)
    assert started == []


async def test_reset_password_signs_out_and_forgives(user: Command, alice: Person) -> None:
    """A reset ends every session and forgives failed logins; from then on only the printed password
    counts."""
    for _ in range(SETTINGS.login_failures_per_account):
        assert (await login(alice, "wrong password"))[0] == 401
    assert (await login(alice))[0] == 429
    status, out, err = await user("reset-password", alice.email)
    assert (status, err) == (0, "")
    printed = re.fullmatch(rf"user {alice.id} has the password (\S{{12,}})\n", out)
    assert printed is not None
    async with asyncio.timeout(SOON_SECONDS):
        while await is_let_in(alice):
            await asyncio.sleep(0.05)
    assert (await login(alice))[0] == 401
    assert (await login(alice, printed[1]))[0] == 200


async def test_deleted_account_leaves_its_messages(
    user: Command, alice: Person, bob: Person, carol: Person, database_url: str
) -> None:
    """Deleting does what the owner could do: messages stay and are nobody's, groups pass on, names
    are free and sockets end; others hear of it."""
    chat = await alice.founds(bob, carol)
    await alice.says(chat, "kept")
    line, other = await alice.listens_live(chat), await bob.listens_live(chat)
    assert await user("delete", alice.email) == (0, f"user {alice.id} is deleted\n", "")
    assert await line.is_closed() == 4401
    assert (await other.hears("chat_updated"))["data"]["left"] == [alice.id]
    [message] = await bob.gets(f"/chats/{chat}/messages")
    assert (message["sender_id"], message["text"]) == (None, "kept")
    members = (await bob.gets(f"/chats/{chat}"))["participants"]
    assert [(m["user_id"], m["role"]) for m in members] == [(bob.id, "owner"), (carol.id, "member")]
    assert (await login(alice))[0] == 401
    assert await refused(("delete", alice.email), database_url) == "There is no such user."
    await Person(alice.client, "alice").register()


async def test_socket_of_a_deleted_account_is_closed_as_of_an_ended_session(
    app: web.Application, sql: asyncpg.Connection, alice: Person, bob: Person,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So it is, too, where the server first sees that the account left the chat."""
    monkeypatch.setattr(app[messenger.ROOMS], "end_sessions", lambda _: None)
    chat = await alice.founds(bob)
    line, other = await alice.listens_live(chat), await bob.listens_live(chat)
    async with sql.transaction():
        await sql.fetch("select delete_user($1)", alice.id)
        await sql.fetch("select leave_next_chat($1)", alice.id)
    assert await line.is_closed() == 4401
    assert (await other.hears("chat_updated"))["data"]["left"] == [alice.id]


async def test_accounts_are_made_where_registration_is_closed(
    user: Command, database_url: str, aiohttp_client: Any
) -> None:
    """With REGISTRATION=closed an administrator can still make an account, which logs in with the
    printed password and whose names are checked as ever."""
    settings = msgspec.structs.replace(SETTINGS, registration="closed")
    client = await aiohttp_client(messenger.make_app(settings, database_url, SECRET_KEY))
    closed = {"REGISTRATION": "closed"}
    status, out, err = await user("create", "Ann@Example.com", "Анна", **closed)
    assert (status, err) == (0, "")
    printed = re.fullmatch(r"user (\d+) has the password (\S{12,})\n", out)
    assert printed is not None
    ann = Person(client, "ann")
    assert (await login(ann, printed[2]))[0] == 200
    body = {"email": "ben@example.com", "username": "ben", "password": PASSWORD}
    async with client.post("/api/v1/users", json=body) as answer:
        assert (answer.status, (await answer.json())["type"]) == (403, "registration-closed")
    status, out, err = await user("create", "ANN@example.com", "ben")
    assert (status, out, err) == (1, "", "messenger: The email is taken.\n")
    for arguments, told in (
        (("ben@example.com", "аННА"), "The username is taken."),
        (("ben", "ben"), "$.email is not an email address"),
        (("ben@example.com", "b n"), "$.username must be"),
        (("ben@example.com", ""), "$.username must have"),
        (("", "ben"), "$.email is not an email address"),
        (("ben\udcff@example.com", "ben"), "$.email is not an email address"),
        (("ben@example.com", "ben\udcff"), "$.username must be"),
    ):
        assert (await refused(("create", *arguments), database_url)).startswith(told), arguments


async def test_list_tells_of_everybody(
    user: Command, alice: Person, bob: Person, sql: asyncpg.Connection
) -> None:
    """The list has each account once, by id and with its state, however many there are, even if a
    name cannot be printed."""
    await bob.expects(200, "PUT", f"/users/{bob.id}", {"is_active": False})
    await sql.execute(
        "insert into users (email, email_key, username, username_key, password_hash)"
        " select n || '@x.de', n || '@x.de', 'имя_' || n, 'имя_' || n, ''"
        " from generate_series(1, 2500) n")
    status, out, err = await user("list", PYTHONIOENCODING="utf-8")
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == [str(alice.id), "active", alice.email, "alice"]
    assert rows[1] == [str(bob.id), "inactive", bob.email, "bob"]
    ids = [int(row[0]) for row in rows]
    assert len(ids) == 2502
    assert ids == sorted(set(ids))
    assert rows[-1][1:] == ["active", "2500@x.de", "имя_2500"]
    status, out, err = await user("list", PYTHONIOENCODING="ascii")
    assert (status, len(out.splitlines()), err) == (0, 2502, "")


async def test_list_may_be_cut_short(
    user: Command, sql: asyncpg.Connection, tmp_path: Path, database_url: str
) -> None:
    """`head` may cut the list short without a complaint."""
    await sql.execute(
        "insert into users (email, email_key, username, username_key, password_hash)"
        " select n || '@x.de', n || '@x.de', 'name' || n, 'name' || n, ''"
        " from generate_series(1, 5000) n")
    process = await asyncio.create_subprocess_shell(
        f"'{sys.executable}' '{ROOT / 'messenger.py'}' user list | head -n 1", cwd=tmp_path,
        env=environment(DATABASE_URL=database_url, SECRET_KEY=SECRET_KEY),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    async with asyncio.timeout(START_SECONDS):
        out, err = await process.communicate()
    assert (len(out.splitlines()), err) == (1, b"")


async def test_unknown_email_is_one_line(alice: Person, database_url: str) -> None:
    """A command about an email that nobody has is refused in one line, and changes nobody."""
    for verb in ("disable", "enable", "reset-password", "delete"):
        told = await refused((verb, "nobody@example.com"), database_url)
        assert told == "There is no such user."
        for email in ("nobody", "", "%", "\udcff@example.com"):
            told = await refused((verb, email), database_url)
            assert told == "$.email is not an email address", (verb, email)
    assert await is_let_in(alice)


@pytest.mark.parametrize(
    "arguments",
    [
        (), ("user",), ("user", "lst"), ("user", "list", "x"), ("user", "create", "a@example.com"),
        ("user", "disable"), ("user", "delete", "a", "b"), ("users", "list"), ("--help",), ("",),
    ],
)
def test_wrong_usage_is_told(arguments: tuple[str, ...]) -> None:
    """A wrong command, or too few or too many arguments, is refused with the right usage."""
    with pytest.raises(StartError, match="reset-password EMAIL"):
        administer.read_command(arguments)


async def test_wrong_usage_starts_nothing(tmp_path: Path) -> None:
    """A wrong command ends with status 1 and the list of commands, and makes no data."""
    status, out, err = await administers(tmp_path, "--help", DATA_DIR=tmp_path / "data")
    assert (status, out) == (1, "")
    assert err.startswith("messenger: no such command")
    assert "messenger.py user reset-password EMAIL" in err
    assert not (tmp_path / "data").exists()


async def test_wrong_setting_is_one_line(tmp_path: Path) -> None:
    """The commands read the server's settings, and refuse what the server refuses."""
    url = "postgresql://x@localhost/y"
    status, out, err = await administers(tmp_path, "user", "list", DATABASE_URL=url)
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert "SECRET_KEY" in err


async def test_commands_work_beside_a_running_server(running: Server, people_of: Any) -> None:
    """Beside a server that keeps PostgreSQL itself a command uses that one, and leaves it up."""
    alice = await people_of(running, "alice")
    line = Line(await alice.client.ws_connect("/ws", headers=alice.headers))
    alice.lines.append(line)
    postmaster = running.postmaster()
    status, out, err = await administers(
        running.folder, "user", "disable", alice.email, DATA_DIR=running.data)
    assert (status, out, err) == (0, f"user {alice.id} is disabled\n", "")
    assert await line.is_closed() == 4401
    assert running.postmaster() == postmaster
    await people_of(running, "bob")
    assert running.complaints() == ""


async def test_commands_work_without_a_server(tmp_path: Path) -> None:
    """Where no server runs a command starts PostgreSQL, and leaves nothing running; a server that
    starts later finds what was done."""
    data = tmp_path / "data"
    status, out, _ = await administers(
        tmp_path, "user", "create", "alice@example.com", "alice", DATA_DIR=data)
    assert status == 0
    assert (data / "postgres").is_dir()
    assert not (data / "postgres/postmaster.pid").exists()
    server = await Server(tmp_path).starts()
    async with aiohttp.ClientSession(server.url) as session:
        alice = Person(session, "alice")  # type: ignore[arg-type]
        assert (await login(alice, out.split()[-1]))[0] == 200
    assert await server.stops() == 0
