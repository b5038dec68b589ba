"""The logs: nothing that somebody sent is in them, the access log has a line for each call, and
each line is JSON where that is wanted."""

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from yarl import URL

from plumbing.embedded import Postgres
from support.people import PASSWORD, Line, Person
from support.raw import RawConnection
from support.servers import ROOT, START_SECONDS, STOP_SECONDS, Server, environment

pytestmark = pytest.mark.usefixtures("nothing_left")

WRONG = "a wrong passphrase"
TEXT, LATE = "a text of a message", "a text that was lost"
SEARCHED = "wordinasearch"
ACCESS = re.compile(
    r"[-\d]{10} [:,\d]{12} INFO 127\.0\.0\.1 ([A-Z]+ /\S*|- -) (\d{3}|-) \d+\.\d{3} s [\w.-]+")

OWN = re.compile(r" INFO (migrations were applied: [\w, ]+|stopping)$")  # of no call


@pytest.fixture
async def logging_server(data_folder: Path) -> AsyncIterator[Server]:
    """A server that logs every call, and limits what is asked."""
    server = await Server(data_folder.parent, ACCESS_LOG="on", RATE_LIMITS="on").starts()
    yield server
    if server.process.returncode is None:
        await server.stops()


async def asks_raw(server: Server, text: bytes) -> int:
    """Send bytes as they are; answer the status that comes back."""
    connection = await RawConnection.opens(server.port, text)
    status, _, _ = await connection.hears()
    connection.close()
    return status


async def uses_everything(server: Server, alice: Person, bob: Person, chat: int) -> None:
    """Do what people do, and what they do wrong, with secrets in all of it."""
    for token in (alice.access, "junk.junk.junk", bob.refresh):
        with contextlib.suppress(aiohttp.WSServerHandshakeError):
            line = Line(await alice.client.ws_connect(f"/ws/{chat}?token={token}&after=0"))
            await line.says(TEXT, ref=1)
            await line.hears("ack")
            await line.sends(type="message", text=TEXT, id=TEXT)
            await line.sends(type="auth", token="junk" + token)
            assert await line.hears("error")
            await line.ws.send_str(TEXT)
            await line.close()
    for body in (
        {"email": alice.email, "password": WRONG},
        {"email": alice.email, "password": WRONG, "text": TEXT},
        {"email": 1, "password": WRONG},
    ):
        async with alice.client.post("/api/v1/users/login", json=body) as answer:
            assert answer.status in (401, 422)
    taken = {"email": bob.email, "username": "another", "password": WRONG}
    await alice.posts("/users", taken, 409)
    await alice.posts("/users/refresh", {"refresh_token": alice.refresh}, 200)
    await alice.expects(403, "PUT", f"/users/{alice.id}", {
        "email": "other@example.com", "current_password": WRONG})
    await alice.gets(f"/chats/{chat}/messages?q={SEARCHED}")
    await alice.gets(f"/chats/{chat}/messages?q={SEARCHED}&token={alice.access}", 422)
    await alice.gets(f"/chats/{chat}/messages?limit={WRONG}", 422)
    for path in ("/%0AINFO%20forged", "/%0D%0Aforged", "/%1b[31m", "/forged%E2%80%A8line"):
        async with alice.client.get(URL(path + f"?token={alice.access}", encoded=True)) as answer:
            assert answer.status == 404
    for head in (
        f"GET /ws?token={alice.access} HTTP/9.9\r\n\r\n".encode(),
        f"GET /?token={alice.access} HTTP/1.1\r\nHost: x\r\nno colon {WRONG}\r\n\r\n".encode(),
        f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {WRONG}\r\n\r\n{TEXT}".encode(),
        f"{WRONG} {TEXT}\r\n\r\n".encode(),
        "GET /\x85forged\u2028forged\x9b31m HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
        b"GET /\x9bforged\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\x1b[31mforged HTTP/1.1\r\nHost: x\r\n\r\n",
    ):
        assert 400 <= await asks_raw(server, head) < 500, head


async def breaks(server: Server, alice: Person, chat: int) -> None:
    """Make the server fail, while secrets are on their way through it."""
    database = await asyncpg.connect(Postgres(server.data).dsn)
    await database.execute(
        "create function tell() returns trigger language plpgsql set log_min_messages = panic"
        " as 'begin raise exception ''%'', new.text; end'")
    await database.execute(
        "create trigger tell before insert on messages for each row execute function tell()")
    await database.execute("alter table attempts rename column key to gone")
    await database.close()
    line = Line(await alice.client.ws_connect(f"/ws/{chat}?token={alice.access}"))
    answer = await alice.asks(
        "POST", f"/chats/{chat}/messages", {"text": LATE}, headers={"X-Request-Id": "own.id-1"})
    assert answer.status == 500
    await line.says(LATE, ref=1)
    assert (await line.hears("error"))["data"]["type"] == "internal-error"
    await line.close()
    body = {"email": alice.email, "password": WRONG}
    async with alice.client.post("/api/v1/users/login", json=body) as answer:
        assert answer.status == 500


async def test_logs_hold_nothing_that_was_sent(logging_server: Server, people_of: Any) -> None:
    """After use, misuse and faults no log holds a token, password, text, email or search; each call
    has its line, and no line is forged."""
    alice, bob = [await people_of(logging_server, name) for name in ("alice", "bob")]
    chat = await alice.opens(bob)
    await uses_everything(logging_server, alice, bob, chat)
    await breaks(logging_server, alice, chat)
    tokens = [alice.access, alice.refresh, bob.access, bob.refresh]
    await logging_server.stops()

    written = logging_server.log()
    postgres = (logging_server.data / "postgres.log").read_text()
    everything = logging_server.said + written + postgres
    secrets = [PASSWORD, WRONG, WRONG.split()[-1], TEXT, LATE, SEARCHED, alice.email, bob.email]
    for token in tokens:
        secrets += [token, token.rsplit(".", 1)[1]]
    assert [secret for secret in secrets if secret in everything] == []
    assert "token=" not in everything
    assert "?" not in written

    access = [line for line in written.split("\n") if " INFO " in line and not OWN.search(line)]
    assert [line for line in access if not ACCESS.fullmatch(line)] == []
    assert not re.search("[^\n -~]", written)
    for call, count in (
        ("POST /api/v1/users 201", 2),
        ("POST /api/v1/users 409", 1),
        ("POST /api/v1/users/login 200", 2),
        ("POST /api/v1/users/login 500", 1),
        ("GET /ws/{chat_id} 101", 2),
        ("GET /ws/{chat_id} 401", 2),
        ("POST /api/v1/chats/{chat_id}/messages 500", 1),
        ("- - 404", 4),
    ):
        assert sum(f" {call} " in line for line in access) == count, call
    assert " ERROR POST /api/v1/chats/{chat_id}/messages failed, request own.id-1\n" in written
    assert written.count("\nRaiseError\n") == 2  # of a message's text, which it names
    assert re.search(r"/messages 500 \d+\.\d{3} s own\.id-1\n", written)
    assert "forged" not in written
    assert "\nUndefinedColumnError\n" in written


async def test_access_log_has_the_calls_of_every_worker(
    data_folder: Path, people_of: Any
) -> None:
    """With several workers the calls of all are in one log, each on a line of its own."""
    server = await Server(data_folder.parent, ACCESS_LOG="on", WORKERS=2).starts()
    person = await people_of(server, "somebody")
    line = Line(await person.client.ws_connect("/ws", headers=person.headers))
    await line.close()
    await server.stops()
    lines = [line for line in server.log().splitlines() if not OWN.search(line)]
    assert len(lines) == 3
    assert all(ACCESS.fullmatch(line) for line in lines), lines


class JsonLog:
    """A server that logs as JSON, which is all that it says; its lines are read as they come."""

    def __init__(self, stderr: asyncio.StreamReader) -> None:
        self._stderr = stderr
        self.records: list[dict[str, str]] = []

    async def hears(self, told: str) -> str:
        """Read until a message tells of something; answer that message."""
        async with asyncio.timeout(START_SECONDS):
            while told not in (message := self._take(await self._stderr.readline())):
                pass
            return message

    async def hears_rest(self) -> None:
        """Read to the end."""
        for line in (await self._stderr.read()).splitlines():
            self._take(line)

    def _take(self, line: bytes) -> str:
        self.records.append(json.loads(line))
        return self.records[-1]["message"]


async def test_log_in_json_is_json_from_start_to_stop(tmp_path: Path) -> None:
    """With LOG_FORMAT=json each line has its time, level, logger and message, and nothing is on
    stdout: over the first start, a call to a worker, an outage of the database and the stop."""
    server = Server(tmp_path)
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "messenger.py"), cwd=tmp_path,
        env=environment(DATA_DIR=server.data, LOG_FORMAT="json", ACCESS_LOG="on", WORKERS=2),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    log = JsonLog(process.stderr)
    try:
        [url] = re.findall(r"http://\S+(?=,)", await log.hears("serving at "))
        async with aiohttp.ClientSession(url) as client:
            async with client.get("/api/v1/nowhere", headers={"X-Request-Id": "own.id"}):
                await log.hears(" 404 ")
            settings = server.data / "postgres/postgresql.conf"
            away = settings.rename(settings.with_suffix(".away"))  # it does not start without
            os.kill(server.postmaster(), signal.SIGKILL)
            await log.hears("PostgreSQL has ended")
            async with client.get("/api/v1/health/readiness") as answer:
                assert answer.status == 503
            await log.hears("the database is away")
            away.rename(settings)
            await log.hears("the database is back")
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOP_SECONDS):
            await log.hears_rest()
            assert await process.stdout.read() == b""
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    for record in log.records:
        assert list(record) == ["time", "level", "logger", "message"]
        assert datetime.fromisoformat(record["time"]).tzinfo is not None
        assert record["level"] in ("INFO", "WARNING", "ERROR")
        assert record["logger"].startswith("messenger")
    told = [record["message"] for record in log.records]
    for message in ("migrations were applied: ", "the database is away", "stopping"):
        assert sum(message in each for each in told) >= 1, message
    assert any(each.endswith(" own.id") for each in told)
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    shown = json.loads(re.findall(r"```json\n(.*?)```", page, re.DOTALL)[0])
    assert {**shown, "time": ""} in [{**record, "time": ""} for record in log.records]
