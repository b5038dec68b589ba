"""People who use a messenger, their sockets, and what they do there."""

import asyncio
from typing import Any
from uuid import uuid4

import aiohttp
import pytest
from aiohttp.test_utils import TestClient

PASSWORD = "correct horse"
NOBODYS = "00000000-0000-4000-8000-000000000000"  # an id that no message has
SOON_SECONDS = 15  # a generous deadline for what takes up to 2 s
HEAR_SECONDS = 30  # a generous deadline: nothing waits that long unless it is broken


class Heard(dict[str, Any]):
    """A frame that a socket was sent."""

OPENING = ("hello", "chats", "replay")


class Line:
    """An open websocket: what is said on it, what is heard on it."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws

    async def sends(self, **frame: Any) -> None:
        """Send a frame."""
        await self.ws.send_json(frame)

    async def says(self, text: str, **frame: Any) -> None:
        """Post a message."""
        await self.sends(type="message", text=text, **frame)

    async def hears(self, *types: str) -> Heard:
        """Wait for the next frame of one of the types; if none is named, for any that is not told
        on opening or before a replay.
        """
        async with asyncio.timeout(HEAR_SECONDS):
            while True:
                heard = await self.ws.receive()
                if heard.type is not aiohttp.WSMsgType.TEXT:
                    raise AssertionError(f"closed with {self.ws.close_code}, awaiting {types}")
                frame = Heard(heard.json())
                if frame["type"] in types or not (types or frame["type"] in OPENING):
                    return frame

    async def hears_text(self, text: str) -> Heard:
        """Wait for the message with a text."""
        while True:
            frame = await self.hears("message", "message_updated")
            if frame["data"]["text"] == text:
                return frame

    async def is_closed(self) -> int | None:
        """Wait until the server closes the socket, and answer the code."""
        async with asyncio.timeout(HEAR_SECONDS):
            while not self.ws.closed:
                await self.ws.receive()
        return self.ws.close_code

    async def close(self) -> None:
        """Hang up."""
        await self.ws.close()


class Person:
    """Somebody with an account, a session and an HTTP client of their own."""

    def __init__(self, client: TestClient[Any, Any], name: str) -> None:
        self.client = client
        self.name = name
        self.email = f"{name}@example.com"
        self.id = 0
        self.access = self.refresh = ""
        self.lines: list[Line] = []

    async def register(self) -> None:
        """Make the account."""
        body = {"email": self.email, "username": self.name, "password": PASSWORD}
        answer = await self.client.post("/api/v1/users", json=body)
        assert answer.status == 201, await answer.text()
        self.id = (await answer.json())["id"]

    async def logs_in(self) -> None:
        """Start a session."""
        body = {"email": self.email, "password": PASSWORD}
        answer = await self.client.post("/api/v1/users/login", json=body)
        assert answer.status == 200, await answer.text()
        tokens = await answer.json()
        self.access, self.refresh = tokens["access_token"], tokens["refresh_token"]

    @property
    def headers(self) -> dict[str, str]:
        """The header that says who is asking."""
        return {"Authorization": f"Bearer {self.access}"}

    async def asks(
        self, method: str, path: str, body: Any = None, **options: Any
    ) -> aiohttp.ClientResponse:
        """Send a request under /api/v1 (or to an absolute path of a Link) and read the answer."""
        if not path.startswith("/api/"):
            path = f"/api/v1{path}"
        if body is not None:
            options["json"] = body
        headers = self.headers | options.pop("headers", {})
        answer = await self.client.request(method, path, headers=headers, **options)
        await answer.read()
        return answer

    async def gets(self, path: str, status: int = 200) -> Any:
        """GET and expect a status."""
        return await self.expects(status, "GET", path)

    async def posts(self, path: str, body: Any = None, status: int = 201) -> Any:
        """POST and expect a status."""
        return await self.expects(status, "POST", path, body)

    async def expects(self, status: int, method: str, path: str, body: Any = None) -> Any:
        """Send a request, expect a status, answer the JSON."""
        answer = await self.asks(method, path, body)
        assert answer.status == status, f"{method} {path}: {answer.status} {await answer.text()}"
        return None if status == 204 else await answer.json()

    async def opens(self, *others: "Person") -> int:
        """Open the personal chat with another; answer its id."""
        body = {"is_group": False, "participant_ids": [other.id for other in others]}
        answer = await self.asks("POST", "/chats", body)
        assert answer.status in (200, 201), await answer.text()
        return int((await answer.json())["id"])

    async def founds(self, *others: "Person", name: str = "a group") -> int:
        """Create a group; answer its id."""
        ids = [other.id for other in others]
        body = {"is_group": True, "name": name, "participant_ids": ids}
        return int((await self.posts("/chats", body))["id"])

    async def says(self, chat: int, text: str, status: int = 201, **body: Any) -> Any:
        """Post a message over REST."""
        return await self.posts(f"/chats/{chat}/messages", {"text": text, **body}, status)

    async def reads(self, chat: int, message: Any) -> Any:
        """Read up to a message."""
        return await self.posts(f"/chats/{chat}/read", {"message_id": message["id"]}, 200)

    async def history(self, chat: int, query: str = "") -> list[str]:
        """Answer the texts of a page of the history."""
        return [m["text"] for m in await self.gets(f"/chats/{chat}/messages{query}")]

    async def listens(self, chat: int, query: str = "", **options: Any) -> Line:
        """Open a socket on a chat."""
        options.setdefault("headers", self.headers)
        line = Line(await self.client.ws_connect(f"/ws/{chat}{query}", **options))
        self.lines.append(line)
        return line

    async def listens_live(self, chat: int, query: str = "") -> Line:
        """Open a socket on a chat and wait until it is live."""
        line = await self.listens(chat, query)
        await line.hears("ready")
        return line


async def pages(person: Person, path: str) -> list[list[Any]]:
    """Follow `next` from a page of a list to the end."""
    found = []
    start = f"/api/v1{path.split('?')[0]}?"
    while path:
        answer = await person.asks("GET", path)
        assert answer.status == 200, await answer.text()
        found.append(await answer.json())
        link = answer.links.get("next")
        path = str(link["url"].relative()) if link else ""
        assert path.startswith(start) or not path
        assert "prev" not in answer.links
    return found


def new_id() -> str:
    """Make a message id, as a client does."""
    return str(uuid4())


async def login(person: Person, email: str, password: str = PASSWORD) -> int:
    """Try to log in; answer the status."""
    body = {"email": email, "password": password}
    return (await person.client.post("/api/v1/users/login", json=body)).status


# ---- What people do in chats


async def follows(person: Person, query: str = "", **options: Any) -> Line:
    """Open a socket on every chat of a person."""
    options.setdefault("headers", person.headers)
    line = Line(await person.client.ws_connect(f"/ws{query}", **options))
    person.lines.append(line)
    return line


async def adds(person: Person, chat: int, other: Person) -> Any:
    """Put somebody into a group."""
    return await person.posts(f"/chats/{chat}/participants/{other.id}")


async def removes(person: Person, chat: int, other: Person) -> None:
    """Take somebody out of a group, or leave it."""
    await person.expects(204, "DELETE", f"/chats/{chat}/participants/{other.id}")


async def logs_out(person: Person, access: str) -> None:
    """End the session of a token."""
    headers = {"Authorization": f"Bearer {access}"}
    answer = await person.client.post("/api/v1/users/logout", headers=headers)
    assert answer.status == 204


async def puts(person: Person, chat: int, who: Any, role: str | None = None) -> tuple[int, Any]:
    """Put somebody into a group or give a role; answer the status and the role or the problem."""
    user_id = who.id if isinstance(who, Person) else who
    body = {"user_id": user_id} if role is None else {"user_id": user_id, "role": role}
    answer = await person.asks("POST", f"/chats/{chat}/participants", body)
    told = await answer.json()
    return answer.status, told["type" if answer.status >= 400 else "role"]


async def roles(person: Person, chat: int) -> dict[int, str]:
    """Who is in a chat and as what, in the order that it names them."""
    named = (await person.gets(f"/chats/{chat}"))["participants"]
    return {one["user_id"]: one["role"] for one in named}


def path_of(message: Any) -> str:
    """The path of a message."""
    return f"/chats/{message['chat_id']}/messages/{message['id']}"


async def edits(person: Person, message: Any, text: str, status: int = 200) -> Any:
    """Edit a message; answer it, or the type of the problem."""
    told = await person.expects(status, "PATCH", path_of(message), {"text": text})
    return told if status == 200 else told["type"]


async def deletes(person: Person, message: Any, status: int = 204) -> Any:
    """Delete a message; answer nothing, or the type of the problem."""
    told = await person.expects(status, "DELETE", path_of(message))
    return told if status == 204 else told["type"]


async def refusal(person: Person, path: str, **options: Any) -> int:
    """Try to open a socket; answer the status by which it is refused."""
    options.setdefault("headers", person.headers)
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await person.client.ws_connect(path, **options)
    return refused.value.status
