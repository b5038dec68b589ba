"""Take the pictures of the web client for README.md, in light and in dark: `./run pictures`.

A scratch server, on which a few people talk, and Chromium, in which one of them looks at it.
"""

import asyncio
import base64
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp

from support.browsers import Chromium
from support.people import PASSWORD
from support.servers import ROOT, Server
from support.web_page import Browser, Page

WIDTH, HEIGHT, SCALE = 1080, 800, 1.5
DRAWN = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
BYTES_MAX = 200_000  # of a picture
PEOPLE = ("ann", "ben", "cleo", "dora")  # ann looks
TRIP = """\
ben: The cabin is ours from Friday to Sunday. Key under the blue pot.
cleo: Lovely! I can take three in the car, if nobody minds the dog.
ann: The dog is the main reason I am coming.
dora: I bring breakfast: bread, cheese, far too much coffee.
ann: Then soup on Friday. I have a good one with leeks.
cleo: We meet at 16:30 at the station, south side.
dora: Perfect, see you all there."""


class Voice:
    """Somebody who talks over REST."""

    def __init__(self, http: aiohttp.ClientSession, url: str, name: str) -> None:
        self.http, self.url, self.name = http, url, name
        self.headers: dict[str, str] = {}

    async def asks(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request; answer the JSON."""
        request = self.http.request(
            method, f"{self.url}/api/v1{path}", json=body, headers=self.headers)
        async with request as answer:
            return await answer.json()

    async def registers(self) -> None:
        """Make an account and log in."""
        account = {"email": f"{self.name}@example.com", "password": PASSWORD}
        self.id = (await self.asks("POST", "/users", account | {"username": self.name}))["id"]
        tokens = await self.asks("POST", "/users/login", account)
        self.headers = {"Authorization": f"Bearer {tokens['access_token']}"}

    async def opens(self, name: str | None, *others: "Voice") -> int:
        """Make a group, or without a name a personal chat; answer its id."""
        body = {"is_group": bool(name), "participant_ids": [other.id for other in others]}
        chat = await self.asks("POST", "/chats", body | ({"name": name} if name else {}))
        return int(chat["id"])

    async def says(self, chat: int, text: str, **more: str) -> str:
        """Post a message; answer its id."""
        posted = await self.asks("POST", f"/chats/{chat}/messages", {"text": text, **more})
        return str(posted["id"])

    async def types(self, chat: int) -> None:
        """Be seen writing, for five seconds."""
        async with self.http.ws_connect(
            f"{self.url}/ws/{chat}", headers=self.headers
        ) as ws:
            await ws.send_json({"type": "typing", "ref": "seen"})
            while (await ws.receive_json())["type"] != "ack":
                pass

    async def reads(self, chat: int, message: str) -> None:
        """Read up to a message."""
        await self.asks("POST", f"/chats/{chat}/read", {"message_id": message})


async def talk(ann: Voice, ben: Voice, cleo: Voice, dora: Voice) -> int:
    """Let people talk; answer the chat that is worth a look."""
    voices = {voice.name: voice for voice in (ann, ben, cleo, dora)}
    books = await dora.opens("Book club", ann, cleo)
    await dora.says(books, "Next time: chapters 5 to 8")
    photos = await ben.opens(None, ann)
    await ben.says(photos, "Here are the photos from Sunday")
    await ben.says(photos, "The one with the boat is my favourite")
    trip = await ben.opens("Weekend at the lake", ann, cleo, dora)
    said: list[str] = []
    for line in TRIP.splitlines():
        name, _, text = line.partition(": ")
        answered = {"reply_to": said[-1]} if text.startswith("The dog") else {}
        said.append(await voices[name].says(trip, text, **answered))
    soup = f"/chats/{trip}/messages/{said[4]}"
    await ann.asks("PATCH", soup, {"text": "Then soup on Friday. I have a good one, with leeks."})
    for voice in (ben, cleo, dora):
        await voice.reads(trip, said[-1])
    return trip


async def take(page: Page, scheme: str) -> bytes:
    """Take a picture of a page in one scheme of colours."""
    look = [{"name": "prefers-color-scheme", "value": scheme}]
    await page.tab.does("Emulation.setEmulatedMedia", features=look)
    await page.finds(DRAWN)
    shot = await page.tab.does("Page.captureScreenshot", format="png")
    return base64.b64decode(shot["data"])


async def look(browser: Browser, url: str) -> Page:
    """Open the web client as Ann, at a chat."""
    page = await browser.opens(url)
    await page.tab.does(
        "Emulation.setDeviceMetricsOverride", width=WIDTH, height=HEIGHT,
        deviceScaleFactor=SCALE, mobile=False)
    await page.tab.does("Emulation.setScrollbarsHidden", hidden=True)
    await page.tab.does("Emulation.setLocaleOverride", locale="en-GB")
    await page.enters("ann")
    await page.clicks("#chats a", "Weekend at the lake")
    await page.sees_message("see you all there")
    await page.finds("document.activeElement.blur()")
    return page


async def picture(browser: Browser, server: Server, http: aiohttp.ClientSession) -> None:
    """Take both pictures into docs/."""
    voices = [Voice(http, server.url, name) for name in PEOPLE]
    for voice in voices:
        await voice.registers()
    trip = await talk(*voices)
    page = await look(browser, server.url)
    await voices[2].types(trip)
    await page.sees("cleo typing", "#typing")
    for scheme in ("light", "dark"):
        taken = await take(page, scheme)
        assert len(taken) <= BYTES_MAX, f"{scheme}: {len(taken)} bytes"
        (ROOT / f"docs/page-{scheme}.png").write_bytes(taken)


async def main(folder: Path) -> None:
    """Start what is needed in a folder, take the pictures, and stop it."""
    server = await Server(folder).starts()
    profile = folder / "chromium"
    profile.mkdir()
    try:
        with Chromium.started(profile) as address:
            async with (
                Chromium.connected(address) as driver,
                aiohttp.ClientSession(raise_for_status=True) as http,
            ):
                await picture(Browser(driver), server, http)
    finally:
        await server.stops()


if __name__ == "__main__":
    if Chromium.program() is None:
        sys.exit("pictures: no chromium (apt-get install chromium)")
    with tempfile.TemporaryDirectory() as scratch:
        asyncio.run(main(Path(scratch)))
