"""The promises about processes: real servers that are killed, stopped and started wrongly."""

import asyncio
import base64
import contextlib
import hashlib
import os
import re
import shutil
import signal
import socket
import stat
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

import messenger
from plumbing import guard
from plumbing.process import StartError
from support.people import HEAR_SECONDS, Person, new_id
from support.raw import RawLine
from support.servers import ROOT, STOP_SECONDS, Server, environment, processes_in, refused

pytestmark = pytest.mark.usefixtures("nothing_left")

BACK_SECONDS = 15


# ---- Start and stop


def test_start_tells_where_it_serves_and_warns_of_nothing(template: Server) -> None:
    """The first start, without a data folder, prints where the page and the docs are, the folder of
    the data and the next step, and no warning."""
    assert re.fullmatch(r"http://localhost:[1-9]\d*", template.url)
    page, docs, data, following = template.said.splitlines()
    assert page.endswith(f" serves its page at {template.url}")
    assert docs.startswith(f"docs      {template.url}/docs")
    assert data == f"data      {template.data} (embedded PostgreSQL)"
    assert following.startswith("next      open the page and make an account")
    assert template.complaints() == ""


def test_secret_key_is_for_its_owner_only(template: Server) -> None:
    """The key that the first start makes can be read by its owner only."""
    key = template.data / "secret_key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(key.read_bytes()) >= 32


async def test_messages_and_tokens_survive_a_restart(running: Server, people_of: Any) -> None:
    """After a restart the key, every message and every token are the same."""
    alice = await people_of(running, "alice")
    chat = await alice.founds(await people_of(running, "bob"))
    sent = await alice.says(chat, "kept")
    key = (running.data / "secret_key").read_bytes()
    assert await running.stops() == 0
    alice = await people_of(await running.starts(), "alice", alice)
    assert (running.data / "secret_key").read_bytes() == key
    assert await alice.gets(f"/chats/{chat}/messages") == [sent]
    await alice.posts("/users/refresh", {"refresh_token": alice.refresh}, status=200)
    assert running.complaints() == ""


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
async def test_stop_closes_sockets_with_1001_and_leaves_nothing(
    running: Server, people_of: Any, signal_number: signal.Signals
) -> None:
    """A stop by either signal soon closes every socket with 1001 and ends PostgreSQL."""
    alice, bob = await people_of(running, "alice"), await people_of(running, "bob")
    chat = await alice.opens(bob)
    lines = [await who.listens_live(chat) for who in (alice, bob, bob)]
    started = time.monotonic()
    closed = asyncio.gather(*[line.is_closed() for line in lines])
    assert await running.stops(signal_number) == 0
    assert time.monotonic() - started < STOP_SECONDS
    assert await closed == [1001] * 3
    assert processes_in(running.folder) == set()
    assert running.complaints() == ""


async def test_stop_waits_for_no_reader_and_no_writer(running: Server, people_of: Any) -> None:
    """A peer that reads nothing, one that never stops sending and half a request do not delay a
    stop."""
    alice, bob = await people_of(running, "alice"), await people_of(running, "bob")
    chat = await alice.opens(bob)
    port = running.port
    stalled = await RawLine().opens(port, f"/ws/{chat}", bob.access, receive_bytes=4096)
    half = RawLine()
    await asyncio.get_running_loop().sock_connect(half.socket, ("127.0.0.1", port))
    await half.gives(b"POST /api/v1/users HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    line = await alice.listens_live(chat)
    reading = asyncio.create_task(line.is_closed())

    async def keeps_sending() -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                await line.says("x" * 4000)

    sending = asyncio.create_task(keeps_sending())
    await asyncio.sleep(0.5)
    started = time.monotonic()
    assert await running.stops() == 0
    assert time.monotonic() - started < STOP_SECONDS
    assert processes_in(running.folder) == set()
    assert running.complaints() == ""
    await reading
    await sending
    stalled.socket.close()


async def test_locale_changes_nothing(template: Server, tmp_path: Path) -> None:
    """Where the system's encoding is not UTF-8, pages run their own script and style all the same,
    and a folder is told of whose name cannot be written."""
    server = Server(
        tmp_path, LC_ALL="C", PYTHONUTF8=0, PYTHONCOERCECLOCALE=0, PYTHONIOENCODING="ascii")
    server.data = tmp_path / "данные"
    shutil.copytree(template.data, server.data)
    await server.starts()
    async with aiohttp.ClientSession(server.url) as session:
        for path in ("/", "/docs"):
            async with session.get(path) as answer:
                page = await answer.read()
                assert answer.status == 200
                policy = answer.headers["Content-Security-Policy"]
            for _, text in re.findall(rb"(?s)<(script|style)>(.*?)</\1>", page):
                assert base64.b64encode(hashlib.sha256(text).digest()).decode() in policy
    assert await server.stops() == 0
    assert server.complaints() == ""


async def test_stop_while_starting_ends_it(tmp_path: Path) -> None:
    """A signal ends a server that still waits for its database."""
    settings = environment(DATABASE_URL="postgresql://a@127.0.0.1:1/b", SECRET_KEY="k" * 32)
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "messenger.py"), cwd=tmp_path, env=settings,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )
    try:
        await asyncio.sleep(2)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOP_SECONDS):
            _, stderr = await process.communicate()
        assert b"Traceback" not in stderr
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


# ---- Killed


async def keeps_posting(
    person: Person, chat: int, sent: list[str], answered: list[dict[str, Any]]
) -> None:
    """Post over REST until the server is gone, keeping what was answered."""
    with contextlib.suppress(aiohttp.ClientError):
        while True:
            sent.append(new_id())
            answered.append(await person.says(chat, f"text of {sent[-1]}", id=sent[-1]))


async def keeps_sending(
    person: Person, chat: int, sent: list[str], answered: list[dict[str, Any]]
) -> None:
    """Post over a socket, some at a time, until the server is gone."""
    line = await person.listens_live(chat)
    unanswered = 0
    with contextlib.suppress(aiohttp.ClientError, AssertionError, ConnectionError):
        while True:
            sent.append(new_id())
            await line.says(f"text of {sent[-1]}", id=sent[-1], ref=sent[-1])
            unanswered += 1
            while unanswered >= 10:
                answered.append((await line.hears("ack"))["data"])
                unanswered -= 1


async def whole_history(person: Person, chat: int) -> list[dict[str, Any]]:
    """Read every message of a chat, page by page."""
    found: list[dict[str, Any]] = []
    while True:
        after = found[-1]["seq"] if found else 0
        page = await person.gets(f"/chats/{chat}/messages?limit=100&after={after}")
        if not page:
            return found
        found += page


async def test_what_was_answered_outlives_kill_9_of_everything(
    running: Server, people_of: Any
) -> None:
    """After kill -9 of all processes every acknowledged message is there, exactly once."""
    alice, bob = await people_of(running, "alice"), await people_of(running, "bob")
    chat = await alice.opens(bob)
    sent: list[str] = []
    answered: list[dict[str, Any]] = []
    posting = [
        asyncio.create_task(way(who, chat, sent, answered))
        for way in (keeps_posting, keeps_sending) for who in (alice, bob, alice)
    ]
    async with asyncio.timeout(HEAR_SECONDS):
        while len(answered) < 300:
            await asyncio.sleep(0.01)
    await running.dies()
    await asyncio.gather(*posting)

    alice = await people_of(await running.starts(), "alice", alice)
    stored = await whole_history(alice, chat)
    assert [message["seq"] for message in stored] == list(range(1, len(stored) + 1))
    by_id = {message["id"]: message for message in stored}
    assert len(by_id) == len(stored)
    for one in answered:
        assert (by_id[one["id"]]["seq"], by_id[one["id"]]["created_at"]) == (
            one["seq"], one["created_at"],
        )
    # Who sends again what was not answered makes no second one of it.
    bob = await people_of(running, "bob", bob)
    for sender in {message["sender_id"]: message for message in stored}.values():
        who = alice if sender["sender_id"] == alice.id else bob
        assert (await who.says(chat, "again", status=200, id=sender["id"]))["text"] != "again"
    assert len(await whole_history(alice, chat)) == len(stored)
    assert running.complaints() == ""


@pytest.mark.real_deadlines
async def test_postgres_killed_is_back_soon_and_sockets_stay(
    running: Server, people_of: Any
) -> None:
    """After kill -9 of the postmaster sockets stay open, requests succeed or answer 503, and
    PostgreSQL is soon back."""
    alice, bob = await people_of(running, "alice"), await people_of(running, "bob")
    chat = await alice.opens(bob)
    line, sender = await bob.listens_live(chat), await alice.listens_live(chat)
    await alice.says(chat, "before")
    statuses, slowest, stop = [], 0.0, asyncio.Event()

    async def asks(method: str, path: str, body: Any = None) -> None:
        nonlocal slowest
        while not stop.is_set():
            started = time.monotonic()
            answer = await alice.asks(method, path, body)
            slowest = max(slowest, time.monotonic() - started)
            statuses.append(answer.status)
            assert answer.status in (200, 201, 503), await answer.text()
            if answer.status == 503:
                assert int(answer.headers["Retry-After"]) >= 1
            await asyncio.sleep(0.02)

    asking = [
        asyncio.create_task(asks("GET", f"/chats/{chat}")),
        asyncio.create_task(asks("POST", f"/chats/{chat}/messages", {"text": "during"})),
        asyncio.create_task(asks("GET", "/health/readiness")),
    ]
    os.kill(running.postmaster(), signal.SIGKILL)
    started = time.monotonic()
    await sender.says("in the middle", ref="r")
    await sender.hears("ack", "error")
    for ask in asking:
        assert not ask.done() or ask.result() is None
    async with asyncio.timeout(BACK_SECONDS):
        message_id = new_id()
        while (await alice.asks(
            "POST", f"/chats/{chat}/messages", {"text": "after", "id": message_id}
        )).status == 503:
            await asyncio.sleep(0.02)
    back = time.monotonic() - started
    stop.set()
    await asyncio.gather(*asking)
    assert 200 in statuses
    assert slowest < BACK_SECONDS
    assert back < BACK_SECONDS
    heard = await line.hears_text("after")
    numbers = [m["seq"] for m in await whole_history(bob, chat)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert heard["data"]["id"] == message_id
    assert not sender.ws.closed
    await sender.says("goes on", ref="s")
    assert (await sender.hears("ack"))["ref"] == "s"
    assert await line.hears_text("goes on")


@pytest.mark.real_deadlines
async def test_frozen_postgres_keeps_nobody_waiting(running: Server, people_of: Any) -> None:
    """While PostgreSQL answers nothing every request is 503 within about two seconds, even behind a
    queue; once it goes on everything is served, and sockets have stayed open."""
    alice, bob = await people_of(running, "alice"), await people_of(running, "bob")
    chat = await alice.opens(bob)
    line = await bob.listens_live(chat)
    calls = [("POST", f"/chats/{chat}/messages", {"text": "lost?", "id": new_id()})] * 20
    calls += [("GET", f"/chats/{chat}", None), ("GET", "/health/readiness", None)] * 20
    pids = processes_in(running.folder) - {running.process.pid}
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for _ in range(2):
        async with asyncio.timeout(3.3):  # two waits of 1.8 s, one after the other, are too long
            answers = await asyncio.gather(*[alice.asks(*call) for call in calls])
        assert {answer.status for answer in answers} == {503}
        assert all(int(answer.headers["Retry-After"]) > 0 for answer in answers)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    async with asyncio.timeout(BACK_SECONDS):
        while (await alice.asks("GET", "/health/readiness")).status != 200:
            await asyncio.sleep(0.05)
    answer = await alice.asks(*calls[0])
    assert answer.status in (200, 201)
    assert (await line.hears("message"))["data"]["id"] == (await answer.json())["id"]
    assert len(await alice.history(chat)) == 1


@pytest.mark.real_deadlines
async def test_stop_while_postgres_is_away_leaves_nothing(running: Server, people_of: Any) -> None:
    """SIGTERM right after PostgreSQL died, with a post under way, ends the server as soon as
    ever."""
    alice = await people_of(running, "alice")
    chat = await alice.founds(await people_of(running, "bob"))
    os.kill(running.postmaster(), signal.SIGKILL)
    asking = asyncio.create_task(alice.asks("POST", f"/chats/{chat}/messages", {"text": "a"}))
    await asyncio.sleep(0.05)
    started = time.monotonic()
    assert await running.stops() == 0
    assert time.monotonic() - started < STOP_SECONDS
    with contextlib.suppress(aiohttp.ClientError):
        assert (await asking).status in (201, 503)
    assert processes_in(running.folder) == set()


# ---- Started wrongly


KEY = "k" * 32
SHORT_WAIT = """
import sys
sys.path.insert(0, sys.argv.pop())
import messenger
from plumbing import schema
schema.START_SECONDS = 1
sys.exit(messenger.main())
"""
IMPATIENT = ("-c", SHORT_WAIT, str(ROOT))


WRONG_SETTINGS: list[tuple[dict[str, str], tuple[str, ...]]] = [
    # what is set, the words that tell of it
    ({"PORT": "abc"}, ("PORT", "abc")),
    ({"HOST": "256.1.1.1"}, ("HOST", "256.1.1.1")),
    ({"BCRYPT_COST": "99"}, ("BCRYPT_COST", "99")),
    ({"REGISTRATION": "maybe"}, ("REGISTRATION='maybe': must be open or closed",)),
    ({"PORT": "8123", "METRICS_PORT": "8123"}, ("METRICS_PORT=8123: ", "PORT=8123")),
    ({"SECRET_KEY": "short"}, ("SECRET_KEY", "32")),
    ({"DATABASE_URL": "postgresql://x@localhost/y"}, ("SECRET_KEY", "DATABASE_URL")),
    ({"DATABASE_URL": "mysql://root:hunter2@db/y", "SECRET_KEY": KEY}, ("DATABASE_URL",)),
]


async def test_wrong_setting_is_refused_in_one_line(tmp_path: Path) -> None:
    """A wrong setting ends the start with one line that names it and reveals no password."""
    both_cores = asyncio.Semaphore(2)

    async def start(settings: dict[str, str]) -> str:
        async with both_cores:
            return await refused(tmp_path, **settings)

    lines = await asyncio.gather(*[start(settings) for settings, _ in WRONG_SETTINGS])
    for line, (settings, told) in zip(lines, WRONG_SETTINGS, strict=True):
        assert all(word in line for word in told), (settings, line)
        assert "hunter2" not in line
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("PORT", "65536"), ("PORT", ""), ("ACCESS_TOKEN_EXPIRE_MINUTES", "0")]
)
def test_setting_out_of_bounds_is_named(name: str, value: str) -> None:
    """A setting beyond its bounds is refused with its name."""
    with pytest.raises(StartError, match=name):
        messenger.Settings.load({name: value})


async def test_database_that_never_comes_is_one_line(tmp_path: Path) -> None:
    """A database that cannot be reached ends the start, after a while, with one line."""
    urls = [
        f"postgresql://x:hunter2@{host}/y"
        for host in ("127.0.0.1:1", "no-such-host.invalid", "localhost:port")
    ]
    for line in await asyncio.gather(
        *[refused(tmp_path, IMPATIENT, DATABASE_URL=url, SECRET_KEY=KEY) for url in urls]
    ):
        assert "DATABASE_URL" in line
        assert "hunter2" not in line


@pytest.mark.parametrize(
    ("name", "choices"),
    [("REGISTRATION", "open or closed"), ("RATE_LIMITS", "on or off"), ("ACCESS_LOG", "on or off")],
)
def test_wrong_choice_names_the_choices(name: str, choices: str) -> None:
    """What is none of a setting's choices is answered by them."""
    for value in ("maybe", "", "ON"):
        with pytest.raises(StartError, match=f"^{name}='{value}': must be {choices}$"):
            messenger.Settings.load({name: value})


def test_setting_that_is_no_text_is_one_line_without_its_value() -> None:
    """Bytes that are not UTF-8 are refused in every setting but the one that is a path."""
    value = "hunter2" * 8 + "\udcff"
    names = {field.encode_name for field in msgspec.structs.fields(messenger.Settings)}
    for name in names - {"DATA_DIR"}:
        with pytest.raises(StartError, match=f"^{name} must be in UTF-8$"):
            messenger.Settings.load({name: value})
    assert messenger.Settings.load({"DATA_DIR": value}).data_dir == value


def test_secret_key_file_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    """A key's file that holds other bytes is refused without showing them."""
    (tmp_path / "secret_key").write_bytes(b"hunter2" * 8 + b"\xff")
    with pytest.raises(StartError, match=r"^[^\n]*secret_key must hold text in UTF-8$") as refusal:
        guard.kept_secret(tmp_path / "secret_key")
    assert "hunter2" not in str(refusal.value)


async def test_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    """A port that another holds ends the start with one line, before any data are made."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = await refused(tmp_path, PORT=port)
    assert "PORT" in line
    assert str(port) in line
    assert not (tmp_path / "data").exists()


async def test_data_folder_that_is_taken_is_one_line(running: Server) -> None:
    """A second server on the same folder says so and leaves the first alone."""
    line = await refused(running.folder, DATA_DIR=running.data)
    assert str(running.data) in line
    async with aiohttp.ClientSession(running.url) as session:
        assert (await session.get("/api/v1/health/readiness")).status == 200


async def test_data_folder_that_is_none_is_one_line(tmp_path: Path) -> None:
    """A DATA_DIR that is a file ends the start with one line."""
    (tmp_path / "data").write_text("a file")
    assert str(tmp_path / "data") in await refused(tmp_path, DATA_DIR=tmp_path / "data")


async def test_secret_key_file_that_is_too_short_is_one_line(
    data_folder: Path, tmp_path: Path
) -> None:
    """A key that somebody shortened by hand is not used, and PostgreSQL is not left running."""
    (data_folder / "secret_key").write_text("short")
    assert "secret_key" in await refused(tmp_path, DATA_DIR=data_folder)
    assert processes_in(tmp_path) == set()
