"""A page in a browser, used as a person would: by what is seen on it, with keys and clicks.

Which browser it is in, and how that is driven, is in browsers.py.
"""

import asyncio
import json
import time
from typing import Any

from support.browsers import LOOK_SECONDS, SEE_SECONDS, Driver, Tab
from support.people import PASSWORD

TEXTS = "[...document.querySelectorAll('{}')].map(one => one.innerText)"


class Browser:
    """A browser, in which people open pages."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    async def opens(self, url: str, beside: "Page | None" = None) -> "Page":
        """Open a page: as if in a browser of its own, or as another tab beside one."""
        return Page(await self.driver.opens(url, beside.tab if beside else None))


class Page:
    """A page, used as a person would: by what is seen on it, with keys and clicks."""

    def __init__(self, tab: Tab) -> None:
        self.tab = tab
        self.finds = tab.finds
        self.complaints = tab.complaints

    async def waits(self, script: str, seconds: float = SEE_SECONDS) -> Any:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not (found := await self.finds(script)):
            if time.monotonic() > deadline:
                seen = await self.finds("document.body.innerText")
                raise AssertionError(f"never: {script}\nseen: {seen}\n{self.complaints}")
            await asyncio.sleep(LOOK_SECONDS)
        return found

    async def sees(self, text: str, where: str = "body") -> None:
        """Wait until a text is shown."""
        await self.waits(f"{one(where)}?.innerText.includes({json.dumps(text)})")

    async def sees_no_more(self, text: str, where: str = "body") -> None:
        """Wait until a text is not shown."""
        await self.waits(f"!{one(where)}?.innerText.includes({json.dumps(text)})")

    async def clicks(self, selector: str, text: str = "") -> None:
        """Click on what is shown: the first of a selector that has the text."""
        await self.clicks_on(shown(selector, text))

    async def clicks_on(self, element: str) -> None:
        """Click on an element once it is there; what it opens may have to be answered."""
        async with asyncio.timeout(SEE_SECONDS):
            while not await self.tab.clicks(element):
                await asyncio.sleep(LOOK_SECONDS)

    async def types(self, selector: str, text: str) -> None:
        """Type into a field, in place of what was in it."""
        await self.waits(f"{one(selector)}?.checkVisibility()")
        await self.finds(f"{one(selector)}.focus(), {one(selector)}.select()")
        await self.tab.writes(text)

    async def confirms(self, text: str = "") -> str:
        """Say yes to what the page asks, or what it asks for; answer the question."""
        question = await self.tab.question()
        await self.tab.answers(text)
        return question

    # ---- The client
    async def registers(self, name: str) -> None:
        """Make an account and come in."""
        await self.types("[name=username]", name)
        await self.enters(name, "Make an account")

    async def enters(self, name: str, button: str = "Log in") -> None:
        """Fill in the form and come in."""
        await self.types("[name=email]", f"{name}@example.com")
        await self.types("[name=password]", PASSWORD)
        await self.clicks("#enter button", button)
        await self.sees(name, "#my-name")

    async def opens_chat_with(self, name: str) -> None:
        """Look somebody up and open the chat with them."""
        await self.clicks("#new-chat")
        await self.types("#query", name)
        await self.clicks("#found li button", "Choose")
        await self.sees(name, "#title")

    async def says(self, text: str) -> None:
        """Write a message and send it."""
        await self.types("#text", text)
        await self.tab.presses("Enter")

    async def sees_message(self, text: str) -> None:
        """Wait until a message is shown, answered by the server."""
        await self.sees(text, "#messages")
        await self.sees_no_more("sending", "#messages")

    async def does(self, action: str, text: str) -> None:
        """Use a button of a message."""
        await self.clicks_on(f"{shown('.message', text)}?.querySelector('[data-do={action}]')")

    async def texts(self) -> list[str]:
        """Answer the texts of the messages that are shown, in order."""
        return [str(text) for text in await self.finds(TEXTS.format(".message .text"))]


def one(selector: str) -> str:
    """Answer the expression for the first element of a selector."""
    return f"document.querySelector({json.dumps(selector)})"


def shown(selector: str, text: str) -> str:
    """Answer the expression for the first visible element of a selector that has a text."""
    return (
        f"[...document.querySelectorAll({json.dumps(selector)})]"
        f".find(one => one.checkVisibility() && one.innerText.includes({json.dumps(text)}))"
    )
