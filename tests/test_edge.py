"""The edge by itself: addresses behind proxies, rates, origins; what browsers and parsers get."""

import asyncio
import contextlib
import io
import ipaddress
import json
import logging
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer, make_mocked_request
from conftest import HEAR_SECONDS, ROOT, SECRET_KEY, SETTINGS, Line, Person
from multidict import CIMultiDict

import edge
import messenger
from edge import Rate, StartError, client_address, read_address, read_networks, read_origins

Client = TestClient[Any, Any]
PROXIES = read_networks("10.0.0.0/8, 127.0.0.1, 2001:db8:ffff::/48")
ALLOWED, FOREIGN = "https://app.example.com", "https://evil.example"


# ---- Rates


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stop the clock of the limits, and move it by hand."""
    now = time.monotonic()

    def passes(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(edge.time, "monotonic", lambda: now)
    return passes


def test_rate_allows_a_burst_and_then_so_many_a_second(clock: Callable[[float], None]) -> None:
    """At first the whole burst is there, then one more each step, and never more than the burst."""
    rate = Rate(burst=3, per_second=2)
    assert [rate.spend("a") for _ in range(4)] == [0, 0, 0, pytest.approx(0.5)]
    clock(0.49)
    assert rate.spend("a") == pytest.approx(0.01)
    clock(0.02)
    assert rate.spend("a") == 0
    assert rate.spend("a") > 0
    clock(3600)
    assert [rate.spend("a") > 0 for _ in range(4)] == [False, False, False, True]


def test_rate_counts_nothing_for_who_is_refused(clock: Callable[[float], None]) -> None:
    """A refusal does not put off the next allowed one: who goes on gets the same rate."""
    rate = Rate(burst=1, per_second=1)
    allowed = 0
    for _ in range(100):
        allowed += rate.spend("a") == 0
        clock(0.101)
    assert allowed == 10


def test_rate_of_one_at_once_allows_each_first() -> None:
    """Whatever the clock shows, one call is allowed where the burst is one."""
    for number in range(1000):
        assert Rate(burst=1, per_second=20).spend(number) == 0


def test_rate_keeps_keys_apart(clock: Callable[[float], None]) -> None:
    """What one key spent, another still has."""
    rate = Rate(burst=1, per_second=1)
    assert rate.spend("a") == 0
    assert rate.spend("a") > 0
    assert rate.spend("b") == 0


def test_rate_forgets_only_those_that_are_whole_again(clock: Callable[[float], None]) -> None:
    """However many keys come by, memory stays bounded, and who has spent all is not forgiven."""
    rate = Rate(burst=1000, per_second=1)
    assert [rate.spend("due") for _ in range(1000)] == [0] * 1000
    for number in range(10 * edge.KEYS_MIN):
        rate.spend(number)
        clock(0.001)
    assert len(rate._full_at) <= 2 * edge.KEYS_MIN
    assert [rate.spend("due") == 0 for _ in range(102)].count(True) == 100  # one for each second


def test_rate_does_not_search_its_keys_at_every_call(clock: Callable[[float], None]) -> None:
    """While many keys are due at once, they are looked through a few times in all."""
    rate = Rate(burst=1, per_second=0.001)
    began = time.perf_counter()
    for number in range(10 * edge.KEYS_MIN):
        rate.spend(number)
    assert time.perf_counter() - began < 10  # some 0.2 s; a search at each call takes minutes
    assert rate.spend(0) > 0


# ---- Addresses


@pytest.mark.parametrize(
    ("node", "address"),
    [
        ("192.0.2.60", "192.0.2.60"),
        (" 192.0.2.60 ", "192.0.2.60"),
        ("192.0.2.60:4711", "192.0.2.60"),
        ("2001:db8::17", "2001:db8::17"),
        ("[2001:db8::17]", "2001:db8::17"),
        ("[2001:DB8::17]:4711", "2001:db8::17"),
        ("::ffff:192.0.2.60", "192.0.2.60"),
        ("[::ffff:192.0.2.60]:80", "192.0.2.60"),
        *((junk, None) for junk in (
            "", "unknown", "_hidden", "localhost", "1.2.3", "1.2.3.4.5", "256.1.1.1", "1.2.3.4:",
            "1.2.3.4:x", "[1.2.3.4", "[]:1", "[::1]x", "::1]:80", "01.2.3.4", "١.٢.٣.٤", "1" * 5000,
            "1.2.3.4\n5.6.7.8", "1.2.3.4/8", ":" * 5000, "['']", "0x7f.1",
        )),
    ],
)  # fmt: skip
def test_address_is_read_as_proxies_write_it(node: str, address: str | None) -> None:
    """An address is read with a port and without; what is none is nobody's."""
    found = read_address(node)
    assert (None if found is None else str(found)) == address


def asked_by(peer: str, *headers: tuple[str, str]) -> str:
    """Whose request it is that comes from a peer with these headers."""
    request = make_mocked_request("GET", "/", headers=CIMultiDict(headers)).clone(remote=peer)
    return client_address(request, PROXIES)  # type: ignore[arg-type]


XFF, FORWARDED = "X-Forwarded-For", "Forwarded"
STRANGER, PROXY, CLIENT, OTHER = "198.51.100.7", "10.0.0.1", "203.0.113.9", "203.0.113.10"


def test_stranger_names_nobody() -> None:
    """From a peer that is no trusted proxy, no header is believed."""
    for headers in (
        [],
        [(XFF, CLIENT)],
        [(XFF, PROXY)],
        [(FORWARDED, f"for={CLIENT}")],
        [(XFF, CLIENT), (FORWARDED, f"for={CLIENT}")],
    ):
        assert asked_by(STRANGER, *headers) == STRANGER


def test_trusted_proxy_names_the_client() -> None:
    """The client is whom the last trusted proxy on the way names, in either header."""
    for headers, client in (
        ([], PROXY),
        ([(XFF, CLIENT)], CLIENT),
        ([(XFF, f"{CLIENT}, 10.9.9.9")], CLIENT),
        ([(XFF, f"{CLIENT},10.9.9.9 , 10.1.1.1")], CLIENT),
        ([(XFF, CLIENT), (XFF, "10.9.9.9")], CLIENT),
        ([(XFF, f"{CLIENT}:5678")], CLIENT),
        ([(XFF, "10.9.9.9")], "10.9.9.9"),
        ([(FORWARDED, f"for={CLIENT}")], CLIENT),
        ([(FORWARDED, f'For="{CLIENT}:5678";proto=https;by=10.0.0.1')], CLIENT),
        ([(FORWARDED, f"proto=https;for={CLIENT}, for=10.9.9.9")], CLIENT),
        ([(FORWARDED, f"for={CLIENT}"), (FORWARDED, "for=10.9.9.9")], CLIENT),
        ([(FORWARDED, f"for={CLIENT}:5678")], CLIENT),
        ([(FORWARDED, f'x="a,b";for={CLIENT}')], PROXY),
        ([(FORWARDED, f'for={CLIENT};host="x,for={OTHER}"')], PROXY),
        ([(FORWARDED, f'for={CLIENT};host="x,for={OTHER};y";proto="https"')], PROXY),
        ([(FORWARDED, "proto=https"), (XFF, OTHER)], PROXY),
        ([(XFF, CLIENT), (FORWARDED, f"for={CLIENT}")], CLIENT),
        ([(XFF, ""), (FORWARDED, f"for={CLIENT}")], CLIENT),
        ([(XFF, CLIENT), (FORWARDED, "")], CLIENT),
        ([(XFF, ""), (FORWARDED, "")], PROXY),
        ([(XFF, ", ,")], PROXY),
    ):
        assert asked_by(PROXY, *headers) == client, headers


def test_what_the_client_wrote_itself_is_not_believed() -> None:
    """What stands before the word of the first trusted proxy changes nothing."""
    for own in (
        OTHER, PROXY, "127.0.0.1", "unknown", "", "x" * 4000, f"{OTHER}, {PROXY}", '"', '"a, ',
        ", ".join([OTHER] * 500),
    ):  # fmt: skip
        assert asked_by(PROXY, (XFF, f"{own}, {CLIENT}")) == CLIENT, own
        assert asked_by(PROXY, (XFF, own), (XFF, f"{CLIENT}, 10.9.9.9")) == CLIENT, own


def test_what_the_client_wrote_itself_cannot_swallow_the_proxys_word() -> None:
    """A Forwarded that the client left open does not change what the proxy's part of it says."""
    seen = set()
    for own in (
        f"for={OTHER}", f'for="{OTHER}', f'for={OTHER};x="a', f'for={OTHER};x="a\\',
        f"for={OTHER};", f"for={OTHER};x=", f'for="{OTHER}";', f'for={OTHER};x="a", "',
        f"for={OTHER},", f'for={OTHER}, x="', f"for={OTHER} for", f"for={OTHER}\t",
        "for", "=", '"', ";;;", "(",
    ):  # fmt: skip
        for word in (f"for={CLIENT}", f'for="{CLIENT}"', f'for="{CLIENT}:5678";proto="https"'):
            seen.add(asked_by(PROXY, (FORWARDED, f"{own}, {word}")))
            seen.add(asked_by(PROXY, (FORWARDED, own), (FORWARDED, word)))
    assert seen == {CLIENT}


def test_headers_that_differ_are_both_not_believed() -> None:
    """A proxy adds to one header and lets the other pass: the client wrote one of the two."""
    for other in (OTHER, "unknown", "127.0.0.1"):
        assert asked_by(PROXY, (XFF, other), (FORWARDED, f"for={CLIENT}")) == PROXY
        assert asked_by(PROXY, (XFF, CLIENT), (FORWARDED, f"for={other}")) == PROXY


def test_proxy_that_hides_the_client_is_the_client() -> None:
    """Where a proxy names nobody, its own address counts, and nothing beyond."""
    for headers in (
        [(XFF, f"{CLIENT}, unknown")],
        [(FORWARDED, f"for={CLIENT}, for=unknown")],
        [(FORWARDED, f"for={CLIENT}, for=_hidden")],
        [(FORWARDED, f"for={CLIENT}, proto=https")],
    ):
        assert asked_by(PROXY, *headers) == PROXY
    assert asked_by(PROXY, (XFF, f"{CLIENT}, unknown, 10.9.9.9")) == "10.9.9.9"


def test_network_stands_for_an_ipv6_address() -> None:
    """The 64 bits that a client can choose by itself make no other client of it."""
    for headers, peer in (
        ([], "2001:db8:1:2:3:4:5:6"),
        ([(XFF, "2001:db8:1:2:3:4:5:6")], PROXY),
        ([(XFF, "2001:db8:1:2:3:4:5:6")], "2001:db8:ffff::1"),
        ([(FORWARDED, 'for="[2001:db8:1:2::7]:4711"')], PROXY),
        ([(FORWARDED, 'for="[2001:db8:1:2::7]"')], "::ffff:10.0.0.1"),
    ):
        assert asked_by(peer, *headers) == "2001:db8:1:2::/64", headers
    assert asked_by("::ffff:198.51.100.7") == STRANGER
    assert asked_by("::ffff:10.0.0.1", (XFF, "::ffff:203.0.113.9")) == CLIENT


def test_unix_socket_has_no_address() -> None:
    """Who comes without an address has an empty one, whatever the headers say."""
    assert asked_by("", (XFF, CLIENT)) == ""


def test_settings_of_networks_and_origins_are_read() -> None:
    """Both are lists with commas; spaces and empty parts are nothing."""
    assert [str(one) for one in PROXIES] == ["10.0.0.0/8", "127.0.0.1/32", "2001:db8:ffff::/48"]
    assert read_networks("") == read_networks(" , ") == []
    assert ipaddress.ip_address("10.1.2.3") in read_networks("10.0.0.0/8,")[0]
    assert read_origins(" https://App.example.com ,http://localhost:3000,") == {
        "https://app.example.com", "http://localhost:3000"
    }  # fmt: skip
    assert read_origins("") == frozenset()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("TRUSTED_PROXIES", value) for value in ("localhost", "10.0.0.1/8", "10.0.0.0/33", "*")),
        *(("CORS_ORIGINS", value) for value in (
            "*", "null", "app.example.com", "https://app.example.com/", "https://", "ftp://x",
            "https://a.example https://b.example",
        )),
    ],
)  # fmt: skip
def test_wrong_network_or_origin_is_named(name: str, value: str) -> None:
    """What is no network, or no origin, keeps the server from starting, with its name."""
    with pytest.raises(StartError, match=f"^{name}="):
        messenger.Settings.load({name: value})


# ---- Logs


def test_log_tells_where_an_exception_was_raised_and_not_what_it_says() -> None:
    """The text of an exception, and of the one that caused it, stays out of the log."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(edge.NamelessFormatter("%(levelname)s %(message)s"))
    log = logging.getLogger("of this test")
    log.propagate = False
    log.addHandler(handler)
    try:
        try:
            raise KeyError("what alice wrote")
        except KeyError as error:
            raise ValueError("what bob wrote") from error
    except ValueError:
        log.exception("failed")
    written = stream.getvalue()
    assert written.startswith("ERROR failed\n")
    assert "test_edge.py" in written
    assert written.endswith("ValueError\n")
    assert "wrote" not in re.sub(r"raise .*", "", written)


# ---- Browsers


@pytest.fixture
async def anyone(
    database_url: str, aiohttp_client: Callable[..., Awaitable[Client]]
) -> AsyncIterator[Client]:
    """A client of a server that allows the pages of one other site."""
    settings = msgspec.structs.replace(SETTINGS, cors_origins=f"{ALLOWED}, http://localhost:3000")
    return await aiohttp_client(messenger.make_app(settings, database_url, SECRET_KEY))


@pytest.fixture
async def user(anyone: Client) -> Person:
    """Somebody who is signed in there."""
    person = Person(anyone, "somebody")
    await person.register()
    await person.logs_in()
    return person


CALLS = [
    # what kind of answer, method, path, with a token, status
    ("JSON", "GET", "/api/v1/users/me", True, 200),
    ("no token", "GET", "/api/v1/users/me", False, 401),
    ("nothing there", "GET", "/nothing", False, 404),
    ("wrong method", "PATCH", "/api/v1/users/me", True, 405),
    ("no preflight", "OPTIONS", "/api/v1/users/me", True, 405),
    ("bad body", "POST", "/api/v1/chats", True, 400),
    ("page", "GET", "/", False, 200),
    ("document", "GET", "/api/v1/openapi.json", False, 200),
    ("health", "HEAD", "/api/v1/health/liveness", False, 200),
    ("no websocket", "GET", "/ws", True, 426),
    ("no content", "POST", "/api/v1/users/logout", True, 204),
]


async def test_pages_of_allowed_sites_may_read_every_answer(anyone: Client, user: Person) -> None:
    """An answer, also a refusal, names the allowed Origin that asked, and no other."""
    for what, method, path, signed_in, status in CALLS:
        for origin in (ALLOWED, "http://localhost:3000", FOREIGN, "null", "", None):
            if method == "POST" and status == 204:
                await user.logs_in()
            if path == "/ws" and origin in (FOREIGN, "null"):
                continue  # refused before anything else
            headers = {} if origin is None else {"Origin": origin}
            headers |= user.headers if signed_in else {}
            async with anyone.request(method, path, headers=headers) as answer:
                assert answer.status == status, (what, origin)
                is_allowed = origin in (ALLOWED, "http://localhost:3000")
                told = answer.headers.get("Access-Control-Allow-Origin")
                assert told == (origin if is_allowed else None), (what, origin)
                exposed = answer.headers.get("Access-Control-Expose-Headers", "")
                assert ("Retry-After" in exposed) == is_allowed, (what, origin)
                assert "Origin" in answer.headers["Vary"], what
                assert "Access-Control-Allow-Credentials" not in answer.headers


async def test_preflight_is_answered_for_allowed_sites_only(anyone: Client) -> None:
    """A browser that asks beforehand hears which methods and headers an allowed site may use."""
    asking = {"Access-Control-Request-Method": "PATCH", "Access-Control-Request-Headers": "x"}
    for path in ("/api/v1/users/me", "/api/v1/chats/1/messages/x", "/nothing"):
        async with anyone.options(path, headers=asking | {"Origin": ALLOWED}) as answer:
            assert (answer.status, await answer.read()) == (204, b"")
            assert answer.headers["Access-Control-Allow-Origin"] == ALLOWED
            methods = answer.headers["Access-Control-Allow-Methods"]
            assert set(methods.split(", ")) >= {e.method for e in messenger.ENDPOINTS}
            names = answer.headers["Access-Control-Allow-Headers"].lower().split(", ")
            assert {"authorization", "content-type"} <= set(names)
            assert int(answer.headers["Access-Control-Max-Age"]) > 0
            assert answer.headers["Vary"] == "Origin"
        for origin in (FOREIGN, "null", f"{ALLOWED}.evil.example", f"{ALLOWED}:444"):
            async with anyone.options(path, headers=asking | {"Origin": origin}) as answer:
                assert answer.status in (404, 405)
                assert not [name for name in answer.headers if name.startswith("Access-Control")]


async def test_without_allowed_sites_nothing_is_told_to_any(alice: Person) -> None:
    """Where CORS_ORIGINS is empty, no answer has a header of CORS."""
    for origin in (ALLOWED, "null", f"http://{alice.client.host}:{alice.client.port}"):
        answer = await alice.asks("GET", "/users/me")
        assert answer.status == 200
        headers = {"Origin": origin, "Access-Control-Request-Method": "GET"}
        async with alice.client.options("/api/v1/users/me", headers=headers) as refused:
            assert refused.status == 405
        assert not [n for n in (*answer.headers, *refused.headers) if n.startswith("Access-Con")]


async def test_socket_is_open_to_allowed_sites(anyone: Client, user: Person) -> None:
    """A page of an allowed site may open a socket, one of another may not; a limit is as readable
    there as any refusal."""
    for origin in (ALLOWED, ALLOWED.upper(), "http://localhost:3000"):
        line = Line(await anyone.ws_connect("/ws", headers=user.headers, origin=origin))
        await line.sends(type="typing")
        assert (await line.hears("error"))["data"]["type"] == "invalid-input"
        await line.close()
    for origin in (FOREIGN, "null", "https://app.example.com.evil.example"):
        headers = user.headers | {"Origin": origin}
        async with anyone.get("/ws", headers=headers) as answer:
            assert (answer.status, (await answer.json())["type"]) == (403, "foreign-origin")


async def test_every_answer_has_the_headers_for_browsers(anyone: Client, user: Person) -> None:
    """Whatever is answered is not sniffed, sends no Referer, and is kept in no cache unless it is
    a page or a document; these are asked for anew each time."""
    for what, method, path, signed_in, status in CALLS:
        headers = user.headers if signed_in else {}
        async with anyone.request(method, path, headers=headers) as answer:
            assert answer.status == status, what
            assert answer.headers["X-Content-Type-Options"] == "nosniff", what
            assert answer.headers["Referrer-Policy"] == "no-referrer", what
            kept = "no-cache" if what in ("page", "document") else "no-store"
            assert answer.headers["Cache-Control"] == kept, what
            assert ("Content-Security-Policy" in answer.headers) == (what == "page"), what
    await user.logs_in()
    body = {"refresh_token": user.refresh}
    async with anyone.post("/api/v1/users/refresh", json=body) as answer:
        assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")


async def test_page_runs_its_own_script_alone(anyone: Client) -> None:
    """The policy of a page lets nothing in but what its hashes name, and no page frames it."""
    for path in ("/", "/docs"):
        async with anyone.get(path) as answer:
            policy = answer.headers["Content-Security-Policy"]
            page = await answer.text()
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules["default-src"] == rules["frame-ancestors"] == rules["base-uri"] == "'none'"
        assert "unsafe" not in policy
        assert policy.count("'sha256-") == len(re.findall("<script|<style", page)) > 1
        assert not re.search(r"<\w[^>]*\s(on\w+|style)\s*=", page)


# ---- What cannot be parsed, what is too slow


class Raw:
    """A connection over which anything can be sent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def hears(self) -> tuple[int, dict[str, str], bytes]:
        """Read an answer: status, headers, body."""
        async with asyncio.timeout(HEAR_SECONDS):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            lines = head.rstrip().split("\r\n")
            headers = {n.title(): v for n, v in (line.split(": ", 1) for line in lines[1:])}
            body = await self.reader.readexactly(int(headers["Content-Length"]))
        return int(lines[0].split()[1]), headers, body

    async def is_cut(self) -> bool:
        """Tell that the server has hung up, without another word."""
        async with asyncio.timeout(HEAR_SECONDS):
            try:
                return await self.reader.read() == b""
            except ConnectionError:
                return True


@pytest.fixture
async def calls(server: TestServer) -> AsyncIterator[Callable[[bytes], Awaitable[Raw]]]:
    """Connect to the server and send something."""
    made = []

    async def call(text: bytes) -> Raw:
        made.append(Raw(*await asyncio.open_connection("127.0.0.1", server.port)))
        made[-1].writer.write(text)
        return made[-1]

    yield call
    for raw in made:
        raw.writer.close()


UNREADABLE = [
    b"\x00\x01\x02\r\n\r\n",
    b"hello\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nA\x00b: c\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
    b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
    b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
]


async def test_what_cannot_be_parsed_is_a_problem(calls: Any, caplog: Any) -> None:
    """A request that is no HTTP is refused like any other, in JSON with its headers, nothing of it
    is repeated, and the connection ends."""
    caplog.set_level(logging.DEBUG, "aiohttp")
    for text in UNREADABLE:
        raw = await calls(text)
        status, headers, body = await raw.hears()
        problem = json.loads(body)
        assert (status, problem["type"]) == (400, "malformed-request"), text[:60]
        assert headers["Content-Type"].startswith("application/problem+json"), text[:60]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert problem.keys() == {"type", "title", "status", "detail"}
        assert await raw.is_cut(), text[:60]


@pytest.fixture
async def hasty(
    app: web.Application, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[[bytes], Awaitable[Raw]]]:
    """Connect to a server that waits for no request over a second, nor for a body."""
    monkeypatch.setattr(messenger, "IDLE_SECONDS", 1)
    monkeypatch.setattr(messenger, "BODY_SECONDS", 1)
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(edge.listen_on("127.0.0.1", 0))
        await messenger.start_sites(SETTINGS, stack, listener, app)
        port = listener.getsockname()[1]

        async def call(text: bytes) -> Raw:
            raw = Raw(*await asyncio.open_connection("127.0.0.1", port))
            stack.callback(raw.writer.close)
            raw.writer.write(text)
            return raw

        yield call


async def test_slow_headers_are_cut(hasty: Any) -> None:
    """Who says nothing, begins and stops, or comes letter by letter is hung up on; so is one that
    does it after a first good request."""
    whole = b"GET /api/v1/health/liveness HTTP/1.1\r\nHost: a\r\n\r\n"

    async def dribbles(raw: Raw) -> bool:
        with_cut = asyncio.create_task(raw.is_cut())
        while not with_cut.done():
            raw.writer.write(b"X")
            await asyncio.wait([with_cut], timeout=0.2)
        return await with_cut

    async def after_a_good_one(rest: bytes) -> bool:
        raw = await hasty(whole)
        assert (await raw.hears())[0] == 200
        raw.writer.write(rest)
        return await (dribbles(raw) if rest else raw.is_cut())

    async with asyncio.timeout(HEAR_SECONDS):
        cut = await asyncio.gather(
            (await hasty(b"")).is_cut(),
            (await hasty(b"GET / HT")).is_cut(),
            (await hasty(b"GET / HTTP/1.1\r\nHost: a\r\nX")).is_cut(),
            dribbles(await hasty(b"GET / HTTP/1.1\r\nHost: a\r\nX: ")),
            after_a_good_one(b""),
            after_a_good_one(whole[:-2]),
        )
    assert cut == [True] * 6


async def test_slow_body_is_408(hasty: Any) -> None:
    """A body that does not come in time is refused and its connection ends, however it dribbles."""
    head = b"POST /api/v1/users/login HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{"
    for dribble in (b"", b" "):
        raw = await hasty(head)
        heard = asyncio.create_task(raw.hears())
        while not heard.done():
            raw.writer.write(dribble)
            await asyncio.wait([heard], timeout=0.2)
        status, _, body = await heard
        assert (status, json.loads(body)["type"]) == (408, "request-timeout")


async def test_parser_in_c_is_required(tmp_path: Any) -> None:
    """Without aiohttp's parser in C the start ends in one line, before any data are made."""
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "messenger.py"), cwd=tmp_path,
        env=env | {"AIOHTTP_NO_EXTENSIONS": "1", "DATA_DIR": str(tmp_path / "data"), "PORT": "0"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(HEAR_SECONDS):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert (process.returncode, out) == (1, b"")
    assert re.fullmatch(r"messenger: .*parser in C.*\n", err.decode())
    assert not (tmp_path / "data").exists()
