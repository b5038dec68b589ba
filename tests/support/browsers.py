"""Real browsers, each driven by what its maker has for it: Chromium by the DevTools protocol,
Firefox by WebDriver BiDi, WebKitGTK by WebDriver. What a test does with a page is in web_page.py.
"""

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import aiohttp

START_SECONDS = 50
SEE_SECONDS = 30  # a generous deadline: nothing waits that long unless it is broken
LOOK_SECONDS = 0.05
CLICK = """(find => {
    const ready = () => { const found = find(); return found && !found.disabled && found; };
    const click = () => {
        const found = ready();
        if (found) found.click(); else setTimeout(click, 50);
    };
    return !!ready() && !!setTimeout(click, %d);
})(() => %s)"""


class Tab:
    """A page in a browser: what all three can do with one."""

    CLICK_MILLISECONDS = 0  # after which a click is made

    def __init__(self) -> None:
        self.complaints: list[str] = []  # what its console was told: errors, violations of policy
        self.asked: list[str] = []  # what it was asked to confirm
        self.requested: list[str] = []  # the URLs, where the browser tells of them

    async def goes(self, url: str) -> None:
        """Open a URL."""
        raise NotImplementedError

    async def reloads(self) -> None:
        """Load the page again."""
        raise NotImplementedError

    async def finds(self, script: str) -> Any:
        """Answer what an expression is in the page, once it is settled."""
        raise NotImplementedError

    async def clicks(self, element: str) -> bool:
        """Click on an element if it is there and enabled; tell whether it was. What the click opens
        may have to be answered, so this does not wait for it. What is redrawn or rests by then is
        clicked anew.
        """
        return bool(await self.finds(CLICK % (self.CLICK_MILLISECONDS, element)))

    async def writes(self, text: str) -> None:
        """Write into what has the focus, as keys or an input method do."""
        raise NotImplementedError

    async def presses(self, key: str) -> None:
        """Press a key: Enter or Shift, in Chromium also Tab or a character."""
        raise NotImplementedError

    async def question(self) -> str:
        """Wait until the page asks something, and answer what."""
        async with asyncio.timeout(SEE_SECONDS):
            while not self.asked:
                await asyncio.sleep(LOOK_SECONDS)
        return self.asked.pop()

    async def answers(self, text: str) -> None:
        """Say yes to what the page asked, or the text."""
        raise NotImplementedError

    async def blocks(self, *parts: str) -> None:
        """Let no request leave whose path holds one of these; none given: let all."""
        raise NotImplementedError

    async def goes_offline(self, offline: bool) -> None:
        """Take the network away, or give it back."""
        raise NotImplementedError

    async def resizes(self, width: int, height: int) -> None:
        """Give the page a size."""
        raise NotImplementedError

    async def closes(self) -> None:
        """Close it with all that it stored."""
        raise NotImplementedError


class Driver:
    """A connection to a browser's program: commands go out with a number, answers and events come
    in."""

    NEEDS: ClassVar[tuple[str, ...]] = ()  # programs, any of which does
    PACKAGE: ClassVar[str] = ""
    BLOCKS: ClassVar[bool] = True  # whether it can keep requests from leaving
    FLAGS: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def program(cls) -> str | None:
        """Find the program."""
        return next(filter(None, map(shutil.which, cls.NEEDS)), None)

    @classmethod
    @contextlib.contextmanager
    def started(cls, folder: Path) -> Iterator[str]:
        """Run the program; the address at which it is driven."""
        raise NotImplementedError
        yield

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws
        self.tabs: list[Tab] = []
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Any]] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(cls, address: str) -> Any:
        """Connect to a program; its pages are closed in the end."""
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(address, max_msg_size=0) as ws,
        ):
            made = cls(ws)
            listening = asyncio.create_task(made._listen())
            await made.begins()
            yield made
            for tab in made.tabs:
                await tab.closes()
            await made.ends()
            await ws.close()
            await listening

    async def begins(self) -> None:
        """Do what comes before the first page."""

    async def ends(self) -> None:
        """Do what comes after the last one."""

    async def opens(self, url: str, beside: Tab | None = None) -> Tab:
        """Open a page: as if in a browser of its own, or as another tab beside one."""
        raise NotImplementedError

    def hears(self, told: Any) -> None:
        """Take an event."""
        raise NotImplementedError

    async def _listen(self) -> None:
        async for heard in self.ws:
            told = heard.json()
            if told.get("id") is not None:
                self._asked.pop(told["id"]).set_result(told)
            else:
                self.hears(told)

    async def commands(self, method: str, **command: Any) -> Any:
        """Give a command, answer its result."""
        number = next(self._numbers)
        self._asked[number] = asyncio.get_running_loop().create_future()
        await self.ws.send_json({"id": number, "method": method, **command})
        async with asyncio.timeout(START_SECONDS):
            answer = await self._asked[number]
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]


@contextlib.contextmanager
def running(command: list[str], folder: Path, **environment: str) -> Iterator[Any]:
    """Run a program in a folder, and end it and what it started."""
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env=os.environ | environment, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()  # it ends its own processes
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(START_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(look: Any, what: str) -> Any:
    """Wait until a program has said where it listens."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError, KeyError):
            return look()
        time.sleep(LOOK_SECONDS)
    raise AssertionError(f"{what} does not start")


# ---- Chromium


class Chromium(Driver):
    """Chromium, without a window."""

    NEEDS = ("chromium", "chromium-browser")
    PACKAGE = "chromium"
    FLAGS = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", "--disable-breakpad", "--remote-debugging-port=0",
        # A mouse: headless it has none, and the page spares touch screens the keyboard.
        "--blink-settings=primaryHoverType=2,availableHoverTypes=2",
    )

    @classmethod
    @contextlib.contextmanager
    def started(cls, folder: Path) -> Iterator[str]:
        """Run it; the address at which it is driven."""
        command = [str(cls.program()), *cls.FLAGS, f"--user-data-dir={folder}", "about:blank"]

        def address() -> str:
            port, path = (folder / "DevToolsActivePort").read_text().splitlines()
            return f"ws://127.0.0.1:{port}{path}"

        with running(command, folder):
            yield until(address, "chromium")

    async def opens(self, url: str, beside: Tab | None = None) -> Tab:
        """Open a page."""
        assert beside is None or isinstance(beside, ChromiumTab)
        context = beside.context if beside else await self.does(
            "Target.createBrowserContext", disposeOnDetach=True)
        target = await self.does("Target.createTarget", url="about:blank", **context)
        attached = await self.does("Target.attachToTarget", flatten=True, **target)
        tab = ChromiumTab(self, attached["sessionId"], context)
        self.tabs.append(tab)
        for domain in ("Page", "Runtime", "Log", "Network"):
            await tab.does(f"{domain}.enable")
        await tab.goes(url)
        return tab

    async def does(self, method: str, session: str = "", **params: Any) -> Any:
        """Give a command, to a page's session or to the browser; answer its result."""
        to = {"sessionId": session} if session else {}
        return await self.commands(method, params=params, **to)

    def hears(self, told: Any) -> None:
        """Take an event."""
        for tab in self.tabs:
            if isinstance(tab, ChromiumTab) and tab.session == told.get("sessionId"):
                tab.hears(told["method"], told["params"])


class ChromiumTab(Tab):
    """A page in Chromium."""

    KEYS: ClassVar[dict[str, dict[str, Any]]] = {
        "Enter": {"text": "\r", "windowsVirtualKeyCode": 13}, "Tab": {"windowsVirtualKeyCode": 9},
        "/": {"text": "/"}}

    def __init__(self, browser: Chromium, session: str, context: dict[str, str]) -> None:
        super().__init__()
        self.browser = browser
        self.session = session
        self.context = context  # whose storage it has

    def hears(self, method: str, params: Any) -> None:
        """Note what the page complains of, asks and requests."""
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

    async def does(self, method: str, **params: Any) -> Any:
        """Give a command to this page."""
        return await self.browser.does(method, self.session, **params)

    async def goes(self, url: str) -> None:
        """Open a URL."""
        await self.does("Page.navigate", url=url)

    async def reloads(self) -> None:
        """Load the page again."""
        await self.does("Page.reload")

    async def finds(self, script: str) -> Any:
        """Answer what an expression is in the page."""
        answer = await self.does(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def writes(self, text: str) -> None:
        """Write into what has the focus."""
        await self.does("Input.insertText", text=text)

    async def presses(self, key: str) -> None:
        """Press a key."""
        more = self.KEYS.get(key, {})
        for kind in ("keyDown", "keyUp"):
            await self.does("Input.dispatchKeyEvent", type=kind, key=key, **more)

    async def answers(self, text: str) -> None:
        """Say yes to what the page asked, or the text."""
        await self.does("Page.handleJavaScriptDialog", accept=True, promptText=text)

    async def blocks(self, *parts: str) -> None:
        """Let no request leave whose path holds one of these."""
        await self.does("Network.setBlockedURLs", urls=[f"*{part}*" for part in parts])

    async def goes_offline(self, offline: bool) -> None:
        """Take the network away, or give it back."""
        await self.does("Network.emulateNetworkConditions", offline=offline, latency=0,
                        downloadThroughput=-1, uploadThroughput=-1)

    async def resizes(self, width: int, height: int) -> None:
        """Give the page a size."""
        await self.does("Emulation.setDeviceMetricsOverride", width=width, height=height,
                        deviceScaleFactor=1, mobile=False)

    async def closes(self) -> None:
        """Close it with all that it stored."""
        if self.context["browserContextId"]:
            await self.browser.does("Target.disposeBrowserContext", **self.context)
            self.context["browserContextId"] = ""  # of the tabs beside it, too


# ---- Firefox


class Firefox(Driver):
    """Firefox, without a window."""

    NEEDS = ("firefox-esr", "firefox")
    PACKAGE = "firefox-esr"
    # A mouse, as above.
    PROFILE = """
user_pref("ui.primaryPointerCapabilities", 6);
user_pref("ui.allPointerCapabilities", 6);
"""

    @classmethod
    @contextlib.contextmanager
    def started(cls, folder: Path) -> Iterator[str]:
        """Run it; the address at which it is driven."""
        (folder / "user.js").write_text(cls.PROFILE)
        command = [str(cls.program()), "--headless", "--no-remote", "--profile", str(folder),
                   "--remote-debugging-port=0"]

        def address() -> str:
            told = json.loads((folder / "WebDriverBiDiServer.json").read_text())
            return f"ws://{told['ws_host']}:{told['ws_port']}/session"

        with running(command, folder, HOME=str(folder)):
            yield until(address, "firefox")

    async def begins(self) -> None:
        """Start a session, and hear what pages do."""
        await self.does("session.new", capabilities={
            "alwaysMatch": {"unhandledPromptBehavior": {"default": "ignore"}}})
        await self.does("session.subscribe", events=[
            "log.entryAdded", "browsingContext.userPromptOpened", "network.beforeRequestSent"])

    async def ends(self) -> None:
        """End the session, for the next one."""
        await self.does("session.end")

    async def opens(self, url: str, beside: Tab | None = None) -> Tab:
        """Open a page, in a window: in a tab that is hidden nothing is read."""
        assert beside is None or isinstance(beside, FirefoxTab)
        user = beside.user if beside else (
            await self.does("browser.createUserContext"))["userContext"]
        made = await self.does("browsingContext.create", type="window", userContext=user)
        tab = FirefoxTab(self, made["context"], user, beside is None)
        self.tabs.append(tab)
        await tab.goes(url)
        return tab

    async def does(self, method: str, **params: Any) -> Any:
        """Give a command; answer its result."""
        return await self.commands(method, params=params)

    def hears(self, told: Any) -> None:
        """Take an event."""
        params = told.get("params", {})
        context = params.get("context") or params.get("source", {}).get("context")
        for tab in self.tabs:
            if isinstance(tab, FirefoxTab) and tab.context == context:
                tab.hears(told["method"], params)


class FirefoxTab(Tab):
    """A page in Firefox."""

    def __init__(self, browser: Firefox, context: str, user: str, is_first: bool) -> None:
        super().__init__()
        self.browser = browser
        self.context = context
        self.user = user  # whose storage it has
        self.is_first = is_first  # of its user
        self._blocked: tuple[str, ...] = ()
        self._intercept = ""
        self._failing: set[asyncio.Task[Any]] = set()

    def hears(self, method: str, params: Any) -> None:
        """Note what the page complains of, asks and requests."""
        if method == "log.entryAdded":
            self.complaints.append(params["text"])
        elif method == "browsingContext.userPromptOpened":
            self.asked.append(params["message"])
        elif method == "network.beforeRequestSent":
            self.requested.append(params["request"]["url"])
            if params["isBlocked"]:
                self._failing.add(asyncio.ensure_future(self._decide(params["request"])))

    async def _decide(self, request: Any) -> None:
        fails = any(part in request["url"] for part in self._blocked)
        with contextlib.suppress(AssertionError):  # a page that was left takes its requests along
            await self.browser.does(
                f"network.{'fail' if fails else 'continue'}Request", request=request["request"])

    async def goes(self, url: str) -> None:
        """Open a URL."""
        await self.browser.does("browsingContext.navigate", context=self.context, url=url,
                                wait="interactive")

    async def reloads(self) -> None:
        """Load the page again."""
        await self.browser.does("browsingContext.reload", context=self.context, wait="none")

    async def finds(self, script: str) -> Any:
        """Answer what an expression is in the page."""
        answer = await self.browser.does(
            "script.evaluate", target={"context": self.context}, awaitPromise=True,
            expression=f"(async value => JSON.stringify(await value))(({script}))",
            userActivation=True)
        assert answer["type"] == "success", answer["exceptionDetails"]["text"]
        return json.loads(answer["result"].get("value", "null"))

    async def _keys(self, *actions: dict[str, str]) -> None:
        await self.browser.does("input.performActions", context=self.context, actions=[
            {"type": "key", "id": "keys", "actions": actions}])

    async def writes(self, text: str) -> None:
        """Write into what has the focus, by keys; a long text as if it were pasted."""
        if len(text) > 200:
            await self.finds(f"document.execCommand('insertText', false, {json.dumps(text)})")
        else:
            await self._keys(*({"type": kind, "value": each} for each in text
                               for kind in ("keyDown", "keyUp")))

    async def presses(self, key: str) -> None:
        """Press a key."""
        value = {"Enter": "\ue007", "Shift": "\ue008"}[key]
        await self._keys(*({"type": kind, "value": value} for kind in ("keyDown", "keyUp")))

    async def answers(self, text: str) -> None:
        """Say yes to what the page asked, or the text."""
        await self.browser.does("browsingContext.handleUserPrompt", context=self.context,
                                accept=True, userText=text)

    async def blocks(self, *parts: str) -> None:
        """Let no request leave whose path holds one of these."""
        self._blocked = parts
        if parts and not self._intercept:
            self._intercept = (await self.browser.does(
                "network.addIntercept", phases=["beforeRequestSent"],
                contexts=[self.context]))["intercept"]
        elif not parts and self._intercept:
            await self.browser.does("network.removeIntercept", intercept=self._intercept)
            self._intercept = ""

    async def goes_offline(self, offline: bool) -> None:
        """Take the network away, or give it back."""
        await self.browser.does(
            "emulation.setNetworkConditions", contexts=[self.context],
            networkConditions={"type": "offline"} if offline else None)

    async def resizes(self, width: int, height: int) -> None:
        """Give the page a size."""
        await self.browser.does("browsingContext.setViewport", context=self.context,
                                viewport={"width": width, "height": height})

    async def closes(self) -> None:
        """Close it with all that it stored."""
        if self.is_first:
            await self.browser.does("browser.removeUserContext", userContext=self.user)


# ---- WebKit


class WebKit(Driver):
    """WebKitGTK in a window of its own program, on a screen that nobody sees; each person has a
    driver of their own. It cannot keep requests from leaving, nor tell of them or of complaints.
    """

    NEEDS = ("WebKitWebDriver",)
    PACKAGE = "webkit2gtk-driver xvfb python3-gi gir1.2-webkit2-4.1"
    BLOCKS = False
    WINDOW = Path(__file__).with_name("webkit_window.py")

    @classmethod
    def program(cls) -> str | None:
        """Find the driver, where there is a screen for it, too."""
        return super().program() if shutil.which("Xvfb") else None

    @classmethod
    @contextlib.contextmanager
    def started(cls, folder: Path) -> Iterator[str]:
        """Run the screen; its name."""
        read, write = os.pipe()
        with (folder / "screen").open("wb") as output:
            screen = subprocess.Popen(
                ["Xvfb", "-displayfd", str(write), "-screen", "0", "1600x1200x24", "-nolisten",
                 "tcp"], pass_fds=[write], stdout=output, stderr=output)
        os.close(write)
        try:
            with os.fdopen(read) as number:
                yield f":{number.readline().strip()}"
        finally:
            screen.terminate()
            screen.wait(START_SECONDS)

    def __init__(self, display: str) -> None:
        self.display = display
        self.tabs = []

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(cls, address: str) -> Any:
        """Begin; the pages are closed in the end."""
        made = cls(address)
        try:
            yield made
        finally:
            for tab in made.tabs:
                await tab.closes()

    async def opens(self, url: str, beside: Tab | None = None) -> Tab:
        """Open a page."""
        assert beside is None, "WebKit's driver has one page"
        tab = WebKitTab(self.display)
        self.tabs.append(tab)
        await tab.begins()
        await tab.goes(url)
        return tab


class WebKitTab(Tab):
    """A page in WebKit."""

    CLICK_MILLISECONDS = 100  # a question that comes while a script runs ends the script
    EVALUATE = """const done = arguments[arguments.length - 1];
(async () => (%s))().then(value => done([JSON.stringify(value)]), error => done(String(error)))"""

    def __init__(self, display: str) -> None:
        super().__init__()
        self.display = display
        self.session = ""

    async def begins(self) -> None:
        """Start a driver and its window."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.process = subprocess.Popen(
            ["WebKitWebDriver", f"--port={port}"], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"DISPLAY": self.display})
        self.http = aiohttp.ClientSession(f"http://127.0.0.1:{port}")
        async with asyncio.timeout(START_SECONDS):
            while True:
                with contextlib.suppress(aiohttp.ClientConnectorError):
                    await self.http.get("/status")
                    break
                await asyncio.sleep(LOOK_SECONDS)
        options = {"binary": str(WebKit.WINDOW), "args": ["--automation"]}
        told = await self._does("POST", "/session", capabilities={"alwaysMatch": {
            "webkitgtk:browserOptions": options, "unhandledPromptBehavior": "ignore"}})
        self.session = f"/session/{told['sessionId']}"
        await self.does("POST", "/timeouts", script=START_SECONDS * 1000)

    async def _does(self, method: str, path: str, **body: Any) -> Any:
        json_body = body if method == "POST" else None
        async with asyncio.timeout(START_SECONDS):
            async with self.http.request(method, path, json=json_body) as answer:
                told = (await answer.json(content_type=None))["value"]
        if answer.status != 200:
            raise DriverError(told["error"], told["message"])
        return told

    async def does(self, method: str, path: str, **body: Any) -> Any:
        """Give a command; answer its result. Raises DriverError."""
        return await self._does(method, f"{self.session}{path}", **body)

    async def goes(self, url: str) -> None:
        """Open a URL."""
        await self.does("POST", "/url", url=url)

    async def reloads(self) -> None:
        """Load the page again."""
        await self.does("POST", "/refresh")

    async def finds(self, script: str) -> Any:
        """Answer what an expression is in the page."""
        await asyncio.sleep(0.02)
        told = await self.does(
            "POST", "/execute/async", script=self.EVALUATE % script, args=[])
        assert isinstance(told, list), told
        return json.loads(told[0] or "null")

    async def clicks(self, element: str) -> bool:
        """Click on an element if it is there; tell whether it was."""
        found = await super().clicks(element)
        if found:
            await asyncio.sleep(0.3)
        return found

    async def _keys(self, *actions: dict[str, str]) -> None:
        await self.does("POST", "/actions", actions=[
            {"type": "key", "id": "keys", "actions": actions}])

    async def writes(self, text: str) -> None:
        """Write into what has the focus, as if it were pasted."""
        await self.finds(f"document.execCommand('insertText', false, {json.dumps(text)})")

    async def presses(self, key: str) -> None:
        """Press a key."""
        value = {"Enter": "\ue007", "Shift": "\ue008"}[key]
        await self._keys(*({"type": kind, "value": value} for kind in ("keyDown", "keyUp")))

    async def question(self) -> str:
        """Wait until the page asks something, and answer what."""
        async with asyncio.timeout(SEE_SECONDS):
            while True:
                with contextlib.suppress(DriverError):
                    return str(await self.does("GET", "/alert/text"))
                await asyncio.sleep(0.1)

    async def answers(self, text: str) -> None:
        """Say yes to what the page asked, or the text."""
        if text:
            await self.does("POST", "/alert/text", text=text)
        await self.does("POST", "/alert/accept")

    async def resizes(self, width: int, height: int) -> None:
        """Give the page a size."""
        await self.does("POST", "/window/rect", width=width, height=height)

    async def closes(self) -> None:
        """Close the window, and end its driver."""
        with contextlib.suppress(DriverError, TimeoutError, aiohttp.ClientError):
            await self.does("DELETE", "")
        await self.http.close()
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class DriverError(Exception):
    """What the driver of WebKit refuses."""


BROWSERS: dict[str, type[Driver]] = {"chromium": Chromium, "firefox": Firefox, "webkit": WebKit}
