"""The docs page in Chromium: calls are sent from it, and a socket's frames are shown."""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Iterator

import pytest
from aiohttp.test_utils import TestServer

from support.browsers import Chromium
from support.people import PASSWORD, Person
from support.web_page import Browser, Page, one

pytestmark = pytest.mark.skipif(
    Chromium.program() is None, reason="no chromium (apt-get install chromium)")


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address at which a browser is driven, which every test of this file uses."""
    with Chromium.started(tmp_path_factory.mktemp("chromium")) as address:
        yield address


@pytest.fixture
async def browser(driven: str) -> AsyncIterator[Browser]:
    """The browser; the pages of a test go with it, before their server."""
    async with Chromium.connected(driven) as driver:
        yield Browser(driver)


@pytest.fixture
async def docs(server: TestServer, browser: Browser, alice: Person) -> Page:
    """The docs page, on which Alice has signed in."""
    page = await browser.opens(str(server.make_url("/docs")))
    await page.waits("document.querySelector('main')?.ariaBusy === 'false'")
    await page.types("#login [name=email]", alice.email)
    await page.types("#login [name=password]", PASSWORD)
    await page.clicks("#login button")
    await page.sees(f"Signed in as {alice.name}", "#who")
    return page


async def fills_in(page: Page, call: str, **values: str) -> None:
    """Open a call's form on the docs page and fill it in."""
    await page.finds(f"{one(f'#{call} form.call')}.closest('details').open = true")
    for name, value in values.items():
        await page.types(f"#{call} form [name={name}]", value)


async def sends(page: Page, call: str, **values: str) -> str:
    """Send a call from the docs page; answer what it shows."""
    await fills_in(page, call, **values)
    await page.clicks(f"#{call} form .main")
    return str(await page.waits(f"{one(f'#{call} .output .good, #{call} .output .bad')} && "
                                f"{one(f'#{call} .output')}.innerText"))


async def test_docs_send_any_call(docs: Page, server: TestServer, bob: Person) -> None:
    """Who signed in once sends calls from the page, its own id filled in; a refusal is shown like
    an answer, and nothing is asked of another host."""
    assert "201 in" in await sends(
        docs, "create_chat", body=json.dumps({"is_group": False, "participant_ids": [bob.id]}))
    [chat] = await bob.gets("/chats")
    assert "201 in" in await sends(
        docs, "send_message", chat_id=str(chat["id"]), body='{"text": "it\'s \\"I\\" & co"}')
    shown = await sends(docs, "list_messages")
    assert "200 in" in shown, "the chat's id is filled in where it is needed"
    assert f'  "chat_id": {chat["id"]},' in shown
    assert "it's" in shown
    refused = await sends(docs, "get_chat", chat_id="9223372036854775807")
    assert "404 in" in refused
    assert '"type": "chat-not-found"' in refused
    assert "X-Request-Id" in refused
    assert "200 in" in await sends(docs, "get_user"), "one's own id is filled in"
    await docs.finds("location.reload()")
    await docs.sees("Signed in as alice", "#who")
    await docs.clicks("#signed-in button")
    await docs.waits(f"{one('#login')}.checkVisibility()")
    assert "401 in" in await sends(docs, "get_me")
    origin = str(server.make_url("/"))
    assert len(docs.tab.requested) > 8
    assert [url for url in docs.tab.requested if not url.startswith((origin, "data:"))] == []
    assert [each for each in docs.complaints if "404" not in each and "401" not in each] == []


async def test_docs_show_json_as_it_came(docs: Page) -> None:
    """An answer is laid out, and no id in it loses a digit; what is no JSON is shown as it is."""
    for text, laid_out in (
        ('{"id":9223372036854775807,"a":[]}', '{\n  "id": 9223372036854775807,\n  "a": []\n}'),
        (r'[{},"x: {\"y\\"]', r'[|  {},|  "x: {\"y\\"|]'.replace("|", "\n")),
        ("[1.50,true]", "[\n  1.50,\n  true\n]"),
        ("<p>{x:1}</p>", "<p>{x:1}</p>"),
        ('"x"', '"x"'),
    ):
        assert await docs.finds(f"pretty({json.dumps(text)})") == laid_out


async def test_docs_copy_a_call_as_curl(docs: Page, alice: Person, bob: Person) -> None:
    """A call copied as curl does the same in a shell."""
    chat = await bob.founds(alice)
    await fills_in(docs, "send_message", chat_id=str(chat), body='{"text": "it\'s $HOME"}')
    await docs.clicks("#send_message button", "Copy as curl")
    command = await docs.waits(f"{one('#send_message .output pre')}?.innerText")
    done = await asyncio.to_thread(
        subprocess.run, ["sh", "-c", command], capture_output=True, text=True, timeout=50)
    assert json.loads(done.stdout)["text"] == "it's $HOME", done


async def test_docs_show_the_frames_of_a_socket(
    docs: Page, alice: Person, bob: Person
) -> None:
    """The console opens a socket, shows what comes, sends what is written, and tells why it was
    closed."""
    chat = await bob.founds(alice)
    await docs.clicks("#connect .main")
    await docs.sees("Connected to /ws.", "#socket-state")
    await docs.sees("chats", "#log")
    await bob.says(chat, "Hello from Bob")
    await docs.sees("Hello from Bob", "#log")
    await docs.types("#send textarea", '{"type": "ping", "ref": "mine"}')
    await docs.clicks("#send-frame")
    await docs.sees('"pong","data":{},"ref":"mine"', "#log")
    await docs.types("#connect [name=chat_id]", str(chat))
    await docs.types("#connect [name=after]", "0")
    await docs.clicks("#connect .main")
    await docs.sees(f"Connected to /ws/{chat}?after=0", "#socket-state")
    await bob.expects(204, "DELETE", f"/chats/{chat}/participants/{alice.id}")
    await docs.sees("4403, the user is no longer in this chat", "#socket-state")
    assert docs.complaints == []


async def test_docs_are_used_with_keys_alone(docs: Page) -> None:
    """A slash leads to the search; what is sent is reached and sent by keys."""
    await docs.finds("document.activeElement.blur()")
    await docs.tab.presses("/")
    await docs.waits("document.activeElement.id === 'filter'")
    await docs.tab.writes("your own account")
    await docs.waits(f"!{one('#create_chat')}.checkVisibility()")
    await docs.finds(f"{one('#get_me details:last-of-type summary')}.focus()")
    for key in ("Enter", "Tab", "Enter"):
        await docs.tab.presses(key)
    await docs.sees("200 in", "#get_me .output")


@pytest.mark.parametrize("width", [390, 320, 768, 1400])
async def test_docs_fit_every_screen(
    server: TestServer, browser: Browser, width: int
) -> None:
    """On a phone as on a desk the page is read by scrolling down alone, with all of it open."""
    page = await browser.opens(str(server.make_url("/docs")))
    await page.tab.resizes(width, 844)
    await page.sees("entries", "#count")
    assert await page.finds("innerWidth") == width
    await page.finds("for (const one of document.querySelectorAll('details')) one.open = true")
    right = "one.getBoundingClientRect().right"
    wide = f"[...document.querySelectorAll('body *')].filter(one => {right} > innerWidth)"
    assert await page.finds(f"{wide}.slice(0, 9).map(one => one.outerHTML)") == []
    assert await page.finds("document.documentElement.scrollWidth <= innerWidth")
