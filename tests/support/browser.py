"""A real browser: Chromium, driven by the DevTools protocol, and its pages, used as people do."""

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp

from support.people import PASSWORD

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--disable-breakpad", "--remote-debugging-port=0",
    # A mouse: headless it has none, and the page spares touch screens the keyboard.
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2",
)
START_SECONDS = 50
SEE_SECONDS = 30  # a generous deadline: nothing waits that long unless it is broken
LOOK_SECONDS = 0.05
TEXTS = "[...document.querySelectorAll('{}')].map(one => one.innerText)"


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[str]:
    """Run a browser in a folder; its DevTools address."""
    process = subprocess.Popen(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder}", "about:blank"],
        cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )
    try:
        yield devtools_address(folder)
    finally:
        process.terminate()  # it ends its own processes
        try:
            process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def devtools_address(folder: Path) -> str:
    """Wait until the browser has said where it listens."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            port, path = (folder / "DevToolsActivePort").read_text().splitlines()
            return f"ws://127.0.0.1:{port}{path}"
        time.sleep(LOOK_SECONDS)
    raise AssertionError("chromium does not start")


@contextlib.asynccontextmanager
async def browser_at(devtools: str) -> AsyncIterator["Browser"]:
    """Connect to a browser; the pages that are opened go with the connection."""
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(devtools, max_msg_size=0) as ws,
    ):
        made = Browser(ws)
        listening = asyncio.create_task(made.listen())
        yield made
        for context in {page.context["browserContextId"] for page in made.pages.values()}:
            await made.commands("Target.disposeBrowserContext", browserContextId=context)
        await ws.close()
        await listening


class Browser:
    """A connection to the browser: commands go out with a number, answers and events come in."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws
        self.numbers = itertools.count(1)
        self.asked: dict[int, asyncio.Future[Any]] = {}
        self.pages: dict[str, Page] = {}  # by DevTools session

    async def listen(self) -> None:
        """Take what the browser tells, until it hangs up."""
        async for heard in self.ws:
            told = heard.json()
            if "id" in told:
                self.asked.pop(told["id"]).set_result(told)
            elif told.get("sessionId") in self.pages:
                self.pages[told["sessionId"]].hears(told["method"], told["params"])

    async def commands(self, method: str, session: str = "", **params: Any) -> Any:
        """Give a command, answer its result."""
        number = next(self.numbers)
        command = {"id": number, "method": method, "params": params}
        self.asked[number] = asyncio.get_running_loop().create_future()
        await self.ws.send_json(command | ({"sessionId": session} if session else {}))
        async with asyncio.timeout(START_SECONDS):
            answer = await self.asked[number]
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    async def opens(self, url: str, beside: "Page | None" = None) -> "Page":
        """Open a page: as if in a browser of its own, or as another tab beside one."""
        context = beside.context if beside else await self.commands(
            "Target.createBrowserContext", disposeOnDetach=True
        )
        target = await self.commands("Target.createTarget", url="about:blank", **context)
        attached = await self.commands("Target.attachToTarget", flatten=True, **target)
        page = self.pages[attached["sessionId"]] = Page(self, attached["sessionId"], context)
        for domain in ("Page", "Runtime", "Log"):
            await page.commands(f"{domain}.enable")
        await page.commands("Page.navigate", url=url)
        return page


class Page:
    """A page, used as a person would: by what is seen on it, with keys and clicks."""

    def __init__(self, browser: Browser, session: str, context: dict[str, str]) -> None:
        self.browser = browser
        self.session = session
        self.context = context  # whose storage it has
        self.complaints: list[str] = []  # what its console was told: errors, violations of policy
        self.asked: list[str] = []  # what it was asked to confirm
        self.requested: list[str] = []  # the URLs, from when its network is watched

    def hears(self, method: str, params: Any) -> None:
        """Note what the page complains of."""
        if method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded":
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url')}")
        elif method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif method == "Page.javascriptDialogOpening":
            self.asked.append(params["message"])

    async def commands(self, method: str, **params: Any) -> Any:
        """Give a command to this page."""
        return await self.browser.commands(method, self.session, **params)

    async def finds(self, script: str) -> Any:
        """Answer what an expression is in the page."""
        answer = await self.commands(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

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
        await self.waits(f"(found => found && setTimeout(() => found.click()))({element})")

    async def types(self, selector: str, text: str) -> None:
        """Type into a field, in place of what was in it."""
        await self.waits(f"{one(selector)}?.checkVisibility()")
        await self.finds(f"{one(selector)}.focus(), {one(selector)}.select()")
        await self.commands("Input.insertText", text=text)

    async def presses(self, key: str, **key_event: Any) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            await self.commands("Input.dispatchKeyEvent", type=kind, key=key, **key_event)

    async def confirms(self, text: str = "") -> str:
        """Say yes to what the page asks, or what it asks for; answer the question."""
        async with asyncio.timeout(SEE_SECONDS):
            while not self.asked:
                await asyncio.sleep(LOOK_SECONDS)
        question = self.asked.pop()
        await self.commands("Page.handleJavaScriptDialog", accept=True, promptText=text)
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
        await self.presses("Enter", text="\r", windowsVirtualKeyCode=13)

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
