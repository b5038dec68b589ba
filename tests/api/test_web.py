"""The web client and the docs page in a real browser: Chromium, or the one that BROWSER names."""

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import asyncpg
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

import messenger
from support.browsers import BROWSERS
from support.people import NOBODYS, PASSWORD, Person
from support.resuming import Held, number_of
from support.servers import SECRET_KEY, SETTINGS
from support.web_page import TEXTS, Browser, Page

DRIVER = BROWSERS[os.environ.get("BROWSER", "chromium")]
pytestmark = pytest.mark.skipif(
    DRIVER.program() is None, reason=f"no browser (apt-get install {DRIVER.PACKAGE})")
blocking = pytest.mark.skipif(
    not DRIVER.BLOCKS, reason="this browser's driver keeps no request from leaving")

UP_TO_DATE = "isConnected() && failures === 0 && !replaying.size && $('connection').hidden"
FRAME_MILLISECONDS = 600 if DRIVER is BROWSERS["chromium"] else 10_000


# ==== The browser =================================================================================


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address at which a browser is driven, which every test of this file uses."""
    with DRIVER.started(tmp_path_factory.mktemp("browser")) as address:
        yield address


@pytest.fixture
async def browser(driven: str) -> AsyncIterator[Browser]:
    """The browser; the pages of a test go with it, before their server."""
    async with DRIVER.connected(driven) as driver:
        yield Browser(driver)


# ==== The client ==================================================================================


async def test_two_people_talk(server: TestServer, browser: Browser) -> None:
    """Two people who registered find each other and talk live: each sees who types, and what was
    read."""
    ann, ben = [await browser.opens(str(server.make_url("/"))) for _ in range(2)]
    await ann.registers("ann_web")
    await ben.registers("ben_web")
    await ann.opens_chat_with("ben_web")
    await ann.says("Hello, Ben!")
    await ann.sees_message("Hello, Ben!")
    await ben.sees("1", "#chats .badge")
    await ben.clicks("#chats a", "ann_web")
    await ben.sees_message("Hello, Ben!")
    await ann.waits("!!document.querySelector('.mark[aria-label*=ben_web]')")
    await ben.types("#text", "H")
    await ann.sees("ben_web typing", "#typing")
    await ben.does("reply", "Hello, Ben!")
    await ben.says("Hi, Ann!")
    await ann.sees_message("Hi, Ann!")
    await ann.sees("You: Hello, Ben!", ".quote:not([hidden])")
    assert await ann.texts() == await ben.texts() == ["Hello, Ben!", "Hi, Ann!"]
    assert ann.complaints == ben.complaints == []


async def test_edits_and_deletions_are_shown_to_the_other(
    alice: Person, bob: Person, server: TestServer, browser: Browser
) -> None:
    """An edit or a deletion appears at once on the other's screen."""
    chat = await alice.opens(bob)
    await alice.says(chat, "a slip")
    await alice.says(chat, "a secret")
    pages = [await browser.opens(f"{server.make_url('/')}#{chat}") for _ in range(2)]
    for page, person in zip(pages, (alice, bob), strict=True):
        await page.enters(person.name)
        await page.sees_message("a secret")
    mine, theirs = pages
    await mine.does("edit", "a slip")
    await mine.sees("Editing")
    await mine.says("as it was meant")
    await theirs.sees_message("as it was meant")
    await theirs.sees("edited", "#messages")
    await mine.does("remove", "a secret")
    await mine.confirms()
    await theirs.sees_message("This message was deleted.")
    assert await theirs.texts() == ["as it was meant", "This message was deleted."]
    assert mine.complaints == theirs.complaints == []


async def test_what_was_written_without_a_server_is_sent_exactly_once(
    database_url: str, sql: asyncpg.Connection, aiohttp_server: Any, aiohttp_client: Any,
    browser: Browser,
) -> None:
    """A page whose server comes back gets what it missed and sends what it still has to send
    exactly once; the first answer is cut off, so the page must send again."""

    async def serve(*middlewares: Any, port: int | None = None) -> TestServer:
        app = messenger.make_app(SETTINGS, database_url, SECRET_KEY)
        app.middlewares[:0] = middlewares
        started: TestServer = await aiohttp_server(app, port=port)
        return started

    first = await serve()
    ann, ben = [Person(await aiohttp_client(first), name) for name in ("ann", "ben")]
    await ann.register()
    await ben.register()
    await ben.logs_in()
    page = await browser.opens(str(first.make_url("/")))
    await page.enters("ann")
    chat = await ben.opens(ann)
    message = await ben.says(chat, "before")
    await page.clicks("#chats a", "ben")
    await page.sees_message("before")
    port = first.port
    await first.close()
    await page.says("written meanwhile")
    await page.sees("sending", "#messages")

    elsewhere = await serve()
    ben.client = await aiohttp_client(elsewhere)
    for n in range(3):
        await ben.says(chat, f"missed {n}")
    await ben.expects(200, "PATCH", f"/chats/{chat}/messages/{message['id']}", {"text": "edited"})
    await elsewhere.close()

    lost = []

    @web.middleware
    async def lose_the_first_answer(request: web.Request, handler: Any) -> Any:
        answer = await handler(request)
        if request.method == "POST" and request.path.endswith("/messages"):
            lost.append(answer.status)
            if len(lost) == 1 and request.transport is not None:
                request.transport.abort()
        return answer

    await serve(lose_the_first_answer, port=port)
    await page.sees_message("written meanwhile")
    await page.sees("missed 2", "#messages")
    await page.waits("document.querySelector('#connection').hidden")
    expected = ["edited", "missed 0", "missed 1", "missed 2", "written meanwhile"]
    assert await page.texts() == expected
    assert await sql.fetchval("select count(*) from messages where text like 'written%'") == 1
    assert lost in ([201], [201, 200])  # the socket may tell of it before it is sent again
    await page.tab.reloads()
    await page.sees_message("written meanwhile")
    assert await page.texts() == expected


@blocking
async def test_what_was_not_sent_outlives_the_page(
    alice: Person, bob: Person, server: TestServer, browser: Browser
) -> None:
    """A page that was closed before its message was answered sends it when it is opened again."""
    chat = await alice.opens(bob)
    page = await browser.opens(f"{server.make_url('/')}#{chat}")
    await page.enters("alice")
    await page.tab.blocks("/messages")
    await page.says("Wait for me")
    await page.sees("sending", "#messages")
    await page.tab.blocks()
    await page.tab.reloads()
    await page.sees_message("Wait for me")
    assert await bob.history(chat) == ["Wait for me"]


HOSTILE = (
    "<img src=x onerror=\"document.title='taken'\">",
    "</script><script>document.title = 'taken'</script>",
    "<b>bold</b> &amp; {{7*7}} javascript:alert(1)",
)


async def test_hostile_text_is_shown_as_text(
    alice: Person, bob: Person, server: TestServer, browser: Browser
) -> None:
    """Text that looks like markup stays text, as message, quote, name and search result."""
    chat = await alice.founds(bob, name=HOSTILE[0])
    for text in HOSTILE:
        message = await alice.says(chat, text)
    await alice.says(chat, "what?", reply_to=message["id"])
    page = await browser.opens(f"{server.make_url('/')}#{chat}")
    await page.enters("bob")
    await page.sees_message("what?")
    assert await page.texts() == [*HOSTILE, "what?"]
    await page.sees(HOSTILE[0], "#title")
    await page.sees(HOSTILE[2], ".quote:not([hidden])")
    await page.clicks("#find")
    await page.types("#words", "taken")
    await page.tab.presses("Enter")
    await page.waits("document.querySelectorAll('.message').length === 2")
    assert await page.texts() == list(HOSTILE[:2])
    assert await page.finds("document.querySelectorAll('img, b b, script').length") == 1
    assert "taken" not in await page.finds("document.title")
    assert page.complaints == []


async def opens_long_chat(
    alice: Person, bob: Person, server: TestServer, browser: Browser, lines: int
) -> Page:
    """Let Alice open a chat in which Bob wrote so many lines, a hundred or more."""
    chat = await bob.opens(alice)
    for n in range(lines):
        await bob.says(chat, f"line {n}")
    page = await browser.opens(str(server.make_url("/")))
    await page.enters("alice")
    await page.sees("99+", "#chats .badge")
    await page.clicks("#chats a", "bob")
    await page.sees_message(f"line {lines - 1}")
    return page


async def test_scrolling_on_while_a_page_comes_loads_no_other(
    alice: Person, bob: Person, server: TestServer, browser: Browser
) -> None:
    """Whoever goes on scrolling at the top while older messages come gets one page of them, and
    keeps in place what was on the screen."""
    page = await opens_long_chat(alice, bob, server, browser, 155)
    await page.finds(
        "draw = () => setTimeout(drawAll, 300),"  # a busy machine draws late
        " setInterval(() => $('log').dispatchEvent(new Event('scroll')), 5),"
        " $('log').scrollTop = 0")
    await page.waits("document.querySelectorAll('.message').length >= 100")
    await asyncio.sleep(1)
    assert len(await page.texts()) == 100
    assert await page.finds("$('log').scrollTop > 100")


async def test_a_session_of_use_leaves_the_console_empty(
    alice: Person, bob: Person, carol: Person, server: TestServer, browser: Browser
) -> None:
    """A long history, a group from its creation to leaving it, and logging out leave no complaint
    in the console."""
    page = await opens_long_chat(alice, bob, server, browser, 105)
    for count in (100, 105):  # upwards, page by page; what was on the screen stays there
        await page.finds("$('log').scrollTop = 0")
        again = "following && ($('log').scrollTop = 0)"  # what came meanwhile led to the end
        await page.waits(f"({again}, document.querySelectorAll('.message').length === {count})")
        assert await page.finds("$('log').scrollTop > 100")
    assert await page.texts() == [f"line {n}" for n in range(105)]

    await page.tab.reloads()
    await page.sees_message("line 104")
    await page.clicks("#find")
    await page.types("#words", "3 line")
    await page.tab.presses("Enter")
    await page.sees_no_more("line 104", "#messages")
    await page.sees("line 3", "#messages")
    assert await page.texts() == ["line 3"]
    await page.does("show", "line 3")
    await page.waits("document.activeElement.querySelector('.text')?.innerText === 'line 3'")
    assert "line 104" in await page.texts()

    await page.clicks("#new-group")
    await page.types("#group-name", "Friends")
    await page.types("#query", "BO")
    await page.clicks("#found li button", "Choose")
    await page.clicks("#create")
    await page.sees("Friends", "#title")
    await page.clicks("#about")
    await page.sees("Friends: 2 in it", "#group")
    await page.clicks("#add")
    await page.types("#query", "carol")
    await page.clicks("#found li button", "Choose")
    await page.sees("Friends: 3 in it", "#group")
    await page.clicks("#rename")
    await page.confirms("Old friends")
    await page.sees("Old friends: 3 in it", "#group")
    await page.clicks("#members button[aria-label='Remove bob']")
    assert await page.confirms() == "Remove bob?"
    await page.sees("Old friends: 2 in it", "#group")
    group = next(each for each in await carol.gets("/chats") if each["is_group"])
    assert [each["username"] for each in group["participants"]] == ["alice", "carol"]
    await page.clicks("#leave")
    await page.confirms()
    await page.sees_no_more("Old friends", "#chats")
    await page.clicks("#logout")
    await page.sees("Log in", "#door")
    await page.enters("alice")
    await page.sees("line 104", "#chats")
    assert page.complaints == []


@blocking
async def test_only_one_tab_renews_the_tokens(
    alice: Person, server: TestServer, browser: Browser
) -> None:
    """While one tab renews the tokens another waits, and goes on with what the first one got."""
    first = await browser.opens(str(server.make_url("/")))
    await first.enters("alice")
    await first.waits("socket?.readyState === 1")
    second = await browser.opens(str(server.make_url("/")), beside=first)
    await second.sees("alice", "#my-name")
    await first.finds("void alone(() => new Promise(done => { window.letGo = done; }))")
    for worn in ("{...session, renew_at: 0}", "session"):
        await first.finds(f"localStorage.setItem('session', JSON.stringify({worn}))")
        await asyncio.sleep(0.3)  # it reaches other tabs in a while
        if worn != "session":
            second.tab.requested.clear()
            await second.tab.reloads()
            await second.waits("document.readyState === 'complete' && !me")
    await first.finds("letGo()")
    await second.waits("socket?.readyState === 1")
    assert not [url for url in second.tab.requested if url.endswith("/refresh")]
    assert first.complaints == second.complaints == []


async def test_an_open_socket_is_told_of_the_next_token(
    alice: Person, server: TestServer, browser: Browser
) -> None:
    """A token that grows old is renewed and sent on the socket, which stays open."""
    page = await browser.opens(str(server.make_url("/")))
    await page.enters("alice")
    await page.waits("socket?.readyState === 1")
    old = await page.finds("window.first = socket, session.refresh_token")
    await page.finds("session.renew_at = 0, localStorage.session = JSON.stringify(session)")
    await page.finds("checkLife()")
    await page.waits("shownToken === session.access_token && heardAt >= askedAt")
    assert await page.finds("storedSession().refresh_token") != old
    assert await page.finds("socket === first && isConnected()")
    assert page.complaints == []


async def test_a_session_that_was_ended_elsewhere_leads_to_the_login(
    alice: Person, server: TestServer, browser: Browser
) -> None:
    """A browser whose session is ended from another device shows the login at once."""
    page = await browser.opens(str(server.make_url("/")))
    await page.enters("alice")
    await page.waits("socket?.readyState === 1")
    for each in await alice.gets("/users/me/sessions"):
        if not each["current"]:
            await alice.expects(204, "DELETE", f"/users/me/sessions/{each['id']}")
    await page.sees("Your session has ended. Please log in again.", "#door")
    assert await page.finds("localStorage.length") == 0


# ==== Resuming ====================================================================================


async def tells(page: Page, kind: str, **data: Any) -> None:
    """Hand a frame to a page as if the server had sent it."""
    text = json.dumps({"type": kind, "data": data})
    await page.finds(f"takeFrame({{data: {json.dumps(text)}}}), drawAll()")


async def test_page_resumes_from_what_a_replay_vouches_for(
    alice: Person, bob: Person, server: TestServer, browser: Browser
) -> None:
    """What is heard before a replay is shown but moves no position, and a new socket undoes it: an
    edited message is again what it was."""
    chat = await alice.opens(bob)
    said = await bob.says(chat, "first")
    page = await browser.opens(f"{server.make_url('/')}#{chat}")
    await page.enters("alice")
    await page.sees_message("first")
    await page.waits(UP_TO_DATE)
    await page.finds("socket.onmessage = null")
    second = {**said, "id": NOBODYS, "seq": 2, "rev": 2, "text": "second", "position": "2.b"}
    third = {**said, "rev": 3, "text": "edited", "position": "3.c"}

    await tells(page, "hello", ping_seconds=25)
    await tells(page, "message", **second)
    await tells(page, "message_updated", **third)
    await tells(page, "ready", chat_id=chat, rev=3, position="3.c")
    assert await page.texts() == ["edited", "second"]
    assert await page.finds("current.position") == said["position"]

    await tells(page, "hello", ping_seconds=25)
    assert await page.texts() == ["first"]
    await tells(page, "replay", chat_id=chat, position=said["position"])
    await tells(page, "message", **second)
    assert await page.finds("current.position") == "2.b"
    await page.finds(f"store({json.dumps(third)})")  # as a page of history brings it

    await tells(page, "hello", ping_seconds=25)
    assert await page.texts() == ["first", "second"]
    await tells(page, "chats", chats={str(chat): ["2.b", 1]}, more=True)
    await tells(page, "message_updated", **third)
    assert await page.texts() == ["edited", "second"]
    assert await page.finds("current.position") == "3.c"
    assert page.complaints == []


PLAY = """schedules => {
    me = {id: 1};
    const full = one => ({chat_id: 7, sender_id: 2, read_by: [], read_count: 0, text: "", ...one});
    return schedules.map(schedule => {
        chats.clear();
        const given = {id: 7, position: "0", participants: [], version: 1, last_rev: 0};
        learn(given);
        const chat = chats.get(7);
        return schedule.map(([kind, data]) => {
            if (kind === "opens") chats.forEach(comeBack);
            else if (kind === "shows") store(full(data));
            else if (kind === "message") hear(full(data));
            else frames[kind]({chat_id: 7, ...data}, {ref: SYNC});
            const kept = {};
            for (const [id, copy] of chat.messages) {
                const sure = copy.above && kind !== "opens" ? copy.under : copy;
                if (sure) kept[id] = sure.position;
            }
            return [chat.position, kept];
        });
    });
}"""


def random_schedule(chance: random.Random) -> tuple[list[Any], list[Any]]:
    """Make what a page may hear and be shown of a chat; answer it, and after each step what it has
    to hold: its position, and the position of each message that counts.
    """
    held = Held(position="0")
    schedule, expected = [], []
    for _ in range(40):
        at = number_of(held.position or "0")
        low, high = (at + 1, at + 3) if held.is_moving else (max(1, at - 3), at + 6)
        later = f"{max(at, chance.randint(low, high))}.m"
        rev, name = chance.randint(low, high), chance.randint(1, 4)
        message = {"id": f"m{name}", "seq": min(name, rev), "rev": rev, "position": f"{rev}.m"}
        kind, data = chance.choice([
            ("opens", None), ("replay", {"position": held.position}),
            ("ready", {"position": later}), ("message", message), ("message", message),
            ("shows", message)])
        if kind == "opens":
            held.opens()
        elif kind == "shows":
            held.shows(message)
        else:
            held.take({"type": kind, "data": data})
        schedule.append([kind, data])
        expected.append(
            [held.position, {each["id"]: each["position"] for each in held.messages.values()}])
    return schedule, expected


async def test_page_keeps_what_the_rule_of_resuming_says(
    server: TestServer, browser: Browser
) -> None:
    """Whatever a page hears and is shown, in whatever order, it holds what the rule says."""
    page = await browser.opens(str(server.make_url("/")))
    await page.waits("document.readyState === 'complete'")
    played = [random_schedule(random.Random(seed)) for seed in range(300)]
    held = await page.finds(f"({PLAY})({json.dumps([schedule for schedule, _ in played])})")
    for seed, (_, expected) in enumerate(played):
        assert held[seed] == expected, seed


async def restore(sql: asyncpg.Connection, chat: int, number: int) -> None:
    """Make of a chat what a backup holds that was taken when it had come to a number."""
    await sql.execute("delete from messages where chat_id = $1 and seq > $2", chat, number)
    await sql.execute("delete from revisions where chat_id = $1 and rev > $2", chat, number)
    await sql.execute(
        "update chats set last_rev = $2, last_seq = $2, last_mark = coalesce(mark_at(id, $2), '0')"
        " where id = $1", chat, number)


async def test_what_a_restored_server_lost_is_offered_again(
    alice: Person, bob: Person, server: TestServer, sql: asyncpg.Connection, browser: Browser
) -> None:
    """A page whose history was rewritten forgets what is gone. Its own messages are offered, over a
    reload too, and sent once somebody says so."""
    chat = await alice.opens(bob)
    page = await browser.opens(f"{server.make_url('/')}#{chat}")
    await page.enters("alice")
    for text in ("kept", "mine, lost"):
        await page.says(text)
        await page.sees_message(text)
    await bob.says(chat, "theirs, lost")
    await page.sees_message("theirs, lost")
    await page.waits(UP_TO_DATE)
    await restore(sql, chat, 1)
    await page.finds("socket.close()")
    await page.sees("Not sent", "#messages")
    await page.sees("kept", "#messages")
    assert await page.texts() == ["kept", "mine, lost"]
    await page.tab.reloads()
    await page.sees("Not sent", "#messages")
    await page.sees("kept", "#messages")
    assert await page.texts() == ["kept", "mine, lost"]
    assert await bob.history(chat) == ["kept"]
    await page.does("retry", "mine, lost")
    await page.sees_no_more("Not sent", "#messages")
    await page.sees_no_more("sending", "#messages")
    assert await bob.history(chat) == ["kept", "mine, lost"]
    assert all("404" in complaint for complaint in page.complaints)  # it asked for what is gone


async def test_silent_socket_is_replaced(
    alice: Person, server: TestServer, browser: Browser
) -> None:
    """A page that hears nothing for long, not even an answer to its ping, comes back."""
    page = await browser.opens(str(server.make_url("/")))
    await page.enters("alice")
    await page.waits(UP_TO_DATE)
    await page.finds("window.sent = [], socket.send = text => sent.push(JSON.parse(text).type)")
    await page.finds("window.first = socket, checkLife()")
    await page.waits("sent.join() === 'ping'")
    await page.finds("heardAt -= 2000 * pingSeconds, checkLife()")
    await page.waits(f"socket !== first && {UP_TO_DATE}")
    assert page.complaints == []


async def test_page_comes_back_only_where_it_is_of_use(
    alice: Person, server: TestServer, browser: Browser
) -> None:
    """After 4401 the next socket has a fresh token; after 1009 there is none."""
    page = await browser.opens(str(server.make_url("/")))
    await page.enters("alice")
    await page.waits(UP_TO_DATE)
    old = await page.finds("window.first = socket, session.access_token")
    await page.finds("socket.onclose({code: 4401})")
    await page.waits(f"socket !== first && {UP_TO_DATE}")
    assert old != await page.finds("session.access_token")
    await page.finds("window.second = socket, socket.onclose({code: 1009})")
    await page.sees("Please reload the page")
    assert await page.finds("socket === second")
    assert page.complaints == []


# ==== What somebody writes ========================================================================


async def test_long_text_is_counted_and_sent_in_parts(
    alice: Person, bob: Person, server: TestServer, browser: Browser
) -> None:
    """A text that is too long for one message is kept whole: its characters are counted, and it is
    sent in parts that together are the text, or none of it is."""
    chat = await alice.opens(bob)
    page = await browser.opens(f"{server.make_url('/')}#{chat}")
    await page.enters("alice")
    await page.types("#text", "\N{GRINNING FACE}" * 3499)
    await page.sees_no_more("3,499", "#composer")
    await page.types("#text", "\N{GRINNING FACE}" * 3500)
    await page.sees("3,500 of 4,096", "#composer")
    text = "word " * 1000
    await page.says(text)
    await page.sees("5,000 of 4,096", "#composer")
    await page.clicks("#split", "Send in 2 parts")
    await page.sees_message("word")
    await page.waits("document.querySelectorAll('.message').length === 2 && !outbox.messages.size")
    parts = await bob.history(chat)
    assert "".join(parts) == text
    assert [len(part) for part in parts] == [4095, 905]
    assert await page.finds("$('text').value") == ""
    assert page.complaints == []


async def test_drafts_outlive_reloads_and_edits(
    alice: Person, bob: Person, carol: Person, server: TestServer, browser: Browser
) -> None:
    """What is written in a chat stays there: in another chat, over a reload, and beside an edit."""
    first, second = await alice.opens(bob), await alice.opens(carol)
    await alice.says(first, "a slip")
    page = await browser.opens(f"{server.make_url('/')}#{first}")
    await page.enters("alice")
    await page.sees_message("a slip")
    await page.types("#text", "for Bob")
    await page.finds(f"location.hash = {second}")
    await page.sees("carol", "#title")
    assert await page.finds("$('text').value") == ""
    await page.types("#text", "for Carol")
    await page.tab.reloads()
    await page.waits("document.querySelector('#text')?.value === 'for Carol'")
    await page.finds(f"location.hash = {first}")
    await page.waits("$('text').value === 'for Bob'")
    await page.does("edit", "a slip")
    await page.waits("$('text').value === 'a slip'")
    await page.says("as meant")
    await page.sees_message("as meant")
    await page.waits("$('text').value === 'for Bob'")
    await page.says("for Bob")
    await page.sees_message("for Bob")
    await page.tab.reloads()
    await page.sees_message("for Bob")
    assert await page.finds("$('text').value") == ""
    assert page.complaints == []


async def test_group_is_made_once_and_only_when_asked_for(
    alice: Person, bob: Person, server: TestServer, browser: Browser
) -> None:
    """Enter while looking for people makes no group; a double click makes one."""
    page = await browser.opens(str(server.make_url("/")))
    await page.enters("alice")
    await page.waits("isConnected()")
    await page.clicks("#new-group")
    await page.types("#group-name", "Friends")
    await page.types("#query", "bob")
    await page.tab.presses("Enter")
    await page.clicks("#found li button", "Choose")
    await page.sees("bob", "#picked")
    await page.tab.presses("Enter")
    assert await page.finds("$('picker').open")
    await page.finds("$('create').click(), $('create').click()")
    await page.sees("Friends", "#title")
    [group] = await alice.gets("/chats")
    assert group["participant_count"] == 2
    assert page.complaints == []


async def test_only_what_somebody_looked_at_is_read(
    alice: Person, bob: Person, server: TestServer, browser: Browser
) -> None:
    """What appears while nobody is there is not read, until there is a sign of somebody; what they
    have not scrolled to is not read either."""
    chat = await alice.opens(bob)
    page = await browser.opens(f"{server.make_url('/')}#{chat}")
    await page.enters("bob")
    await page.waits(UP_TO_DATE)
    await page.finds("touchedAt = 0")
    for n in range(30):
        await alice.says(chat, f"line {n}")
    await page.sees_message("line 29")
    await page.sees("30", "#chats .badge")

    await page.finds("$('log').scrollTop = 0")
    await page.waits("!following")
    await page.tab.presses("Shift")
    await page.waits("current.unread_count && current.unread_count < 30")
    [chat_of_bob] = await bob.gets("/chats")
    assert 0 < chat_of_bob["unread_count"] < 30
    await page.finds("$('log').scrollTop = 1e6")
    await page.waits("!current.unread_count")
    await page.waits("current.people.get(me.id).last_read_seq === 30")  # the server said so
    assert page.complaints == []


# ==== What somebody sees ==========================================================================


async def test_frame_leaves_the_rows_alone_that_it_does_not_change(
    alice: Person, bob: Person, server: TestServer, browser: Browser
) -> None:
    """With 10,000 messages loaded a new one, an edit and a name are drawn, each row once."""
    chat = await alice.opens(bob)
    said = await bob.says(chat, "line 0")
    page = await browser.opens(f"{server.make_url('/')}#{chat}")
    await page.enters("alice")
    await page.sees_message("line 0")
    await page.waits(UP_TO_DATE)
    await page.waits("current.people.get(me.id).last_read_seq === 1")  # which draws the row anew
    await page.finds(f"""(() => {{
        window.line = (n, more) => ({{...{json.dumps(said)}, seq: n + 1, rev: n + 1,
            position: `${{n + 1}}.m`, text: `line ${{n}}`, id: `line-${{n}}`, ...more}});
        for (let n = 1; n < 10_000; n++) store(line(n));
        let filled = 0;
        fillMessage = (fill => (...given) => {{ filled++; fill(...given); }})(fillMessage);
        window.draws = (change) => {{  // how many rows, in how many milliseconds
            drawAll();  // what has come in the meantime
            filled = 0;
            const start = performance.now();
            change();
            drawAll();
            $("log").getBoundingClientRect();
            return [filled, performance.now() - start];
        }};
    }})()""")
    drawn = await page.finds("[10_000, 10_001, 10_002].map(n => draws(() => hear(line(n))))")
    assert [filled for filled, _ in drawn] == [1, 1, 1]
    assert min(took for _, took in drawn) < FRAME_MILLISECONDS, drawn
    edited = "{rev: 10_004, position: '10004.e', text: 'edited'}"
    [filled, _] = await page.finds(f"draws(() => hear(line(5_000, {edited})))")
    assert filled == 1
    assert "edited" in await page.texts()
    [filled, _] = await page.finds(f"draws(() => setName({bob.id}, 'robert'))")
    assert filled == 10_003
    assert page.complaints == []


@blocking
async def test_loading_empty_and_failed_are_told_apart(
    alice: Person, bob: Person, server: TestServer, browser: Browser
) -> None:
    """A chat without messages says so, one that cannot be loaded says that and can be tried again,
    and one that is still being loaded says neither."""
    chat = await alice.opens(bob)
    page = await browser.opens(f"{server.make_url('/')}#{chat}")
    await page.enters("alice")
    await page.sees("No messages yet.", "#log")
    await bob.says(chat, "there")
    await page.sees_message("there")
    await page.tab.blocks("/messages")
    await page.tab.reloads()
    await page.sees("The server cannot be reached.", "#log")
    assert await page.finds("document.body.innerText.split('cannot be reached').length") == 2
    await page.tab.blocks()
    await page.clicks("#again")
    await page.sees_message("there")
    await page.sees_no_more("reached", "#log")
    await page.finds("current.view = {loading: true}, drawAll()")
    assert await page.finds("$('note').innerText") == "Loading …"


async def test_refusal_is_told_once_where_it_belongs(
    alice: Person, bob: Person, server: TestServer, browser: Browser
) -> None:
    """A refusal stands in its own form, once, in words for people."""
    page = await browser.opens(str(server.make_url("/")))
    await page.types("[name=username]", "al")
    await page.types("[name=email]", "al@example.com")
    await page.types("[name=password]", PASSWORD)
    await page.clicks("#enter button", "Make an account")
    await page.sees("The username must", "#enter .problem")
    assert "$" not in await page.finds("$('enter').innerText")
    await page.enters("alice")
    await page.clicks("#new-group")
    await page.clicks("#create")
    await page.sees("name", "#picker .problem")
    filled = "[...document.querySelectorAll('.problem')].filter(one => one.textContent).length"
    assert await page.finds(filled) == 1
    assert await page.finds("$('create').disabled") is False


@blocking
async def test_page_without_a_network_says_so(
    alice: Person, server: TestServer, browser: Browser
) -> None:
    """A page that is offline, or whose socket ended, says so, also where a chat covers the list."""
    page = await browser.opens(str(server.make_url("/")))
    await page.enters("alice")
    await page.waits(UP_TO_DATE)
    await page.tab.goes_offline(True)
    await page.waits("$('connection').checkVisibility()")
    await page.sees("offline", "#connection")
    await page.tab.goes_offline(False)
    await page.waits("!$('connection').checkVisibility()")
    await page.finds("socket.close()")
    await page.sees("No connection", "#connection")
    await page.waits("!$('connection').checkVisibility()")


async def test_focus_goes_where_it_was_asked_for(
    alice: Person, bob: Person, server: TestServer, browser: Browser
) -> None:
    """A page that opens on a chat has its focus in the composer, after a jump on the message."""
    chat = await alice.opens(bob)
    first = await bob.says(chat, "first")
    for n in range(60):
        await bob.says(chat, f"line {n}")
    await bob.says(chat, "answer", reply_to=first["id"])
    page = await browser.opens(f"{server.make_url('/')}#{chat}")
    await page.enters("alice")
    await page.sees_message("answer")
    await page.waits("document.activeElement === $('text')")
    await page.waits("current.messages.has(current.last_message.reply_to)")
    await page.does("jump", "answer")
    await page.waits("document.activeElement.innerText.includes('first')")
    assert await page.finds("document.activeElement.matches('.message')")
    assert page.complaints == []


async def test_everything_fits_on_a_narrow_screen(
    alice: Person, bob: Person, server: TestServer, browser: Browser
) -> None:
    """At 360 pixels nothing is cut off, the buttons of a group's dialog least of all."""
    chat = await alice.founds(bob, name="Friends of long names")
    page = await browser.opens(f"{server.make_url('/')}#{chat}")
    await page.tab.resizes(360, 640)
    await page.enters("alice")
    await page.clicks("#about")
    await page.sees("2 in it", "#group")
    inside = """(element => { const {left, right} = element.getBoundingClientRect();
        return left >= 0 && right <= innerWidth; })"""
    dialog = "$('group').getBoundingClientRect()"
    buttons = "[...document.querySelectorAll('#group .row button')]"
    assert await page.finds(f"{buttons}.every({inside})")
    assert await page.finds(
        f"{buttons}.every(one => one.getBoundingClientRect().left >= {dialog}.left)")
    assert await page.finds("$('group').scrollWidth <= $('group').clientWidth")
    assert await page.finds("document.documentElement.scrollWidth <= innerWidth")
    assert page.complaints == []


# ==== The docs ====================================================================================


VERBS = ("get", "post", "put", "patch", "delete")


async def test_docs_show_every_operation_and_frame(server: TestServer, browser: Browser) -> None:
    """Every operation and frame of the two documents is on the page; its links lead somewhere."""
    async with aiohttp.ClientSession() as session:
        async with session.get(server.make_url("/api/v1/openapi.json")) as answer:
            api = await answer.json()
        async with session.get(server.make_url("/api/v1/asyncapi.json")) as answer:
            frames = await answer.json()
    page = await browser.opens(str(server.make_url("/docs")))
    await page.sees("entries", "#count")
    paths = api["paths"].items()
    operations = [f"{verb} {path}" for path, item in paths for verb in VERBS if verb in item]
    titles = await page.finds(TEXTS.format(".operation h3"))
    assert sorted(text.lower() for text in titles) == sorted(operations)
    messages = frames["components"]["messages"].items()
    titles = await page.finds(TEXTS.format(".frame h3"))
    assert sorted(titles) == sorted(message.get("name", name) for name, message in messages)
    links = "[...document.querySelectorAll('a[href^=\"#\"]')].map(one => one.hash.slice(1))"
    assert await page.finds(f"{links}.filter(id => !document.getElementById(id))") == []
    assert "undefined" not in await page.finds("document.body.innerText")
    assert "[object" not in await page.finds("document.body.innerText")
    await page.types("#filter", "participants")
    await page.waits("document.querySelector('#count').innerText.match(/^[1-9]/)")
    assert not await page.finds("document.querySelector('#create_user').checkVisibility()")
    assert page.complaints == []


@pytest.mark.parametrize("fragment", ["%E0%A4%A", "%", "%ff%", "nothing", "rest-%55ser"])
async def test_docs_are_shown_whatever_the_link_names(
    server: TestServer, browser: Browser, fragment: str
) -> None:
    """A link to what is not there, or whose name is broken, leads to the page."""
    page = await browser.opens(f"{server.make_url('/docs')}#{fragment}")
    await page.sees("entries", "#count")
    await page.waits("document.querySelector('main').ariaBusy === 'false'")
    assert "could not be read" not in await page.finds("document.body.innerText")
    await page.finds(f"(location.hash = '#x', location.hash = '#{fragment}', null)")
    await page.types("#filter", "participants")
    await page.waits("document.querySelector('#count').innerText.match(/^[1-9]/)")
    assert page.complaints == []


@pytest.mark.parametrize("width", [390, 320, 768])
async def test_docs_fit_a_narrow_screen(
    server: TestServer, browser: Browser, width: int
) -> None:
    """On a phone the page is read by scrolling down alone."""
    page = await browser.opens(str(server.make_url("/docs")))
    await page.tab.resizes(width, 844)
    await page.sees("entries", "#count")
    assert await page.finds("innerWidth") == width
    right = "one.getBoundingClientRect().right"
    wide = f"[...document.querySelectorAll('body *')].filter(one => {right} > innerWidth)"
    assert await page.finds(f"{wide}.slice(0, 9).map(one => one.outerHTML)") == []
    assert await page.finds("document.documentElement.scrollWidth <= innerWidth")
