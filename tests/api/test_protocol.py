"""What docs/protocol.md shows: its frames are those of the document, its client loses nothing."""

import asyncio
import contextlib
import json
import os
import re
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from support.people import PASSWORD, new_id
from support.recorder import Recorder, documents
from support.servers import ROOT, Server

PAGE = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")
LOOK_SECONDS = 0.1
CAUGHT_UP_SECONDS = 40  # a client that was refused comes back after a random pause

pytestmark = pytest.mark.usefixtures("nothing_left")


def blocks(language: str) -> list[str]:
    """Find the code blocks of a language."""
    return [str(found) for found in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)]


def test_frames_of_the_page_fit_the_document() -> None:
    """Each frame that the page shows is one that a client sends or hears on `/ws`."""
    recorder = Recorder(*documents())
    frames = [json.loads(block) for block in blocks("json")]
    for frame in frames:
        action = "send" if "data" in frame else "receive"
        assert recorder.hear_frame("/ws", action, frame) == [], frame
    assert len(frames) >= 8


def test_close_codes_of_the_page_are_those_of_the_server() -> None:
    """The page says of each code with which the server closes whether to come back."""
    told = set(re.findall(r"\b(\d{4})\b", PAGE[PAGE.index("| ended with |") :].split("\n\n")[0]))
    in_document = re.findall(r"\n- (\d{4}): ", documents()[1].content["info"]["description"])
    assert told == {*in_document, "1006"}


def test_page_lists_every_frame() -> None:
    """The page's two tables have each frame of the document that a client sends or hears."""
    in_document = {"client": set(), "server": set()}
    for name in documents()[1].content["components"]["messages"]:
        side, _, kind = name.partition("_")
        in_document[side].add(kind)
    section = PAGE.split("## Every frame")[1].split("\n## ")[0]
    sent = set(re.findall(r'(?m)^\| `{"type": "(\w+)"', section))
    heard = set(re.findall(r"(?m)^\| `(\w+)` \|", section))
    assert {"client": sent, "server": heard} == in_document


def test_page_tells_what_each_frame_of_the_server_has() -> None:
    """Where the table names the fields of a frame's `data`, they are those of the document."""
    schemas = documents()[1].content["components"]["schemas"]
    section = PAGE.split("## Every frame")[1].split("\n## ")[0]
    told = re.findall(r"(?m)^\| `(\w+)` \|.*\| (.*) \|$", section)
    assert len(told) >= 15
    for frame, cell in told:
        name = "".join(part.title() for part in frame.split("_")) + "Out"
        data = schemas[name]["properties"]["data"]
        fields = {field for each in data.get("anyOf", [data])
                  for field in schemas[each["$ref"].rpartition("/")[2]].get("properties", ())}
        assert set(re.findall(r"`(\w+)`", cell)) in (fields, set()), frame


class Client:
    """The page's client, in a process of its own."""

    def __init__(self, folder: Path, url: str) -> None:
        self.program, self.store = folder / "client.py", folder / "messages.db"
        [source] = blocks("python")
        self.program.write_text(source)
        self.environment = os.environ | {
            "URL": url, "EMAIL": "ann@example.com", "PASSWORD": PASSWORD, "STORE": str(self.store)}

    async def starts(self) -> None:
        """Start it."""
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, str(self.program), env=self.environment, cwd=self.program.parent,
            stdout=asyncio.subprocess.DEVNULL)

    async def dies(self) -> None:
        """Kill it."""
        assert self.process.returncode is None, "it has ended by itself"
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()

    def holds(self) -> list[Any]:
        """List the chat, the id and the text of each message that it has stored."""
        rows = []
        with (
            contextlib.closing(sqlite3.connect(self.store)) as db,
            contextlib.suppress(sqlite3.OperationalError),  # it has not begun, or is writing
        ):
            rows = db.execute("select chat, message from messages").fetchall()
        return sorted((chat, *map(json.loads(each).get, ("id", "text"))) for chat, each in rows)


@pytest.fixture
async def killed(tmp_path: Path) -> AsyncIterator[Server]:
    """A server that may be killed: it comes back on the same port."""
    folder = tmp_path / "server"  # whatever runs in it is killed
    folder.mkdir()
    server = await Server(folder).starts()
    server.settings["PORT"] = server.port
    yield server
    await server.dies()


@pytest.fixture
async def client(writer: "Writer", killed: Server, tmp_path: Path) -> AsyncIterator[Client]:
    """The page's client, which is ended with the test."""
    made = Client(tmp_path, killed.url)
    await made.starts()
    yield made
    await made.dies()


@pytest.fixture
async def writer(killed: Server) -> AsyncIterator["Writer"]:
    """Ben, registered like Ann."""
    async with aiohttp.ClientSession(raise_for_status=True) as session:
        made = Writer(session, killed.url)
        await made.begins()
        yield made


class Writer:
    """Ben, who writes in chats with Ann, and knows what the server has."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self.http, self.api = http, f"{url}/api/v1"
        self.chats: list[int] = []

    async def asks(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request; answer the JSON."""
        async with self.http.request(method, f"{self.api}{path}", json=body) as answer:
            return await answer.json() if answer.status != 204 else None

    async def begins(self) -> None:
        """Register both, and log in."""
        users = [
            await self.asks("POST", "/users", {
                "email": f"{name}@example.com", "username": name, "password": PASSWORD})
            for name in ("ann", "ben")]
        self.ann = users[0]["id"]
        login = {"email": "ben@example.com", "password": PASSWORD}
        tokens = await self.asks("POST", "/users/login", login)
        self.http.headers["Authorization"] = f"Bearer {tokens['access_token']}"

    async def founds(self) -> None:
        """Make one more group with Ann."""
        body = {"is_group": True, "name": "a group", "participant_ids": [self.ann]}
        self.chats.append((await self.asks("POST", "/chats", body))["id"])

    async def writes(self) -> None:
        """In every chat post three messages, edit one, and delete one."""
        for chat in self.chats:
            path = f"/chats/{chat}/messages"
            ids = [new_id() for _ in range(3)]
            for each in ids:
                await self.asks("POST", path, {"text": f"text of {each}", "id": each})
            await self.asks("PATCH", f"{path}/{ids[0]}", {"text": "edited"})
            await self.asks("DELETE", f"{path}/{ids[1]}")

    async def has(self) -> list[Any]:
        """List what the server has, as `Client.holds` lists it."""
        return sorted([
            (chat, message["id"], message["text"]) for chat in self.chats
            for message in await self.asks("GET", f"/chats/{chat}/changes?limit=100")])


async def holds_all(client: Client, writer: Writer) -> None:
    """Wait until the client has stored what the server has."""
    expected = await writer.has()
    async with asyncio.timeout(CAUGHT_UP_SECONDS):
        while client.holds() != expected:
            assert client.process.returncode is None, "it has ended by itself"
            await asyncio.sleep(LOOK_SECONDS)


async def test_client_of_the_page_loses_nothing(
    killed: Server, writer: Writer, client: Client
) -> None:
    """Killed like the server, it ends with what the server has: what was posted, edited and
    deleted while it was there and while it was not, in chats old and new."""
    await writer.founds()
    await writer.writes()
    await holds_all(client, writer)
    await client.dies()
    await writer.writes()
    await writer.founds()
    await client.starts()
    await writer.writes()
    await killed.dies()
    await killed.starts()
    await writer.writes()
    await holds_all(client, writer)
    await writer.asks("DELETE", f"/chats/{writer.chats[0]}/participants/{writer.ann}")
    del writer.chats[0]
    await holds_all(client, writer)
