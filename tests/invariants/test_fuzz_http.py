"""Requests that are no HTTP, or more than one: each is refused, and none is smuggled in."""

import re
from typing import Any

import pytest

from support.raw import HANDSHAKE, RawConnection
from support.servers import Server

pytestmark = pytest.mark.usefixtures("nothing_left")

ALIVE = b"/api/v1/health/liveness"
SMUGGLED = b"GET " + ALIVE + b" HTTP/1.1\r\nHost: x\r\n\r\n"
LOGIN = b"POST /api/v1/users/login HTTP/1.1\r\nHost: x\r\n"


def get(target: bytes = ALIVE, *headers: bytes) -> bytes:
    """Write a request that is right, but for what is given."""
    return b"\r\n".join((b"GET " + target + b" HTTP/1.1", b"Host: x", *headers, b"", b""))


def line(first: bytes) -> bytes:
    """Write a request with a first line of its own."""
    return first + b"\r\nHost: x\r\nConnection: close\r\n\r\n"


def post(headers: bytes, body: bytes) -> bytes:
    """Write a request with a body, the smuggled one behind it."""
    return LOGIN + headers + b"\r\n\r\n" + body + SMUGGLED


def chunked(body: bytes) -> bytes:
    """Write a request whose body comes in chunks, the smuggled one behind it."""
    return post(b"Transfer-Encoding: chunked", body)


REQUESTS = {
    # First lines.
    "word": line(b"GARBAGE"),
    "method only": line(b"GET"),
    "HTTP/9.9": line(b"GET / HTTP/9.9"),
    "HTTP/1.10": line(b"GET / HTTP/1.10"),
    "http/1.1": line(b"GET / http/1.1"),
    "four words": line(b"GET / HTTP/1.1 x"),
    "tab": line(b"GET\t/\tHTTP/1.1"),
    "blank in the path": line(b"GET /a b HTTP/1.1"),
    "NUL in the path": line(b"GET /\0 HTTP/1.1"),
    "no path": line(b"GET HTTP/1.1"),
    "path without a slash": line(b"GET api HTTP/1.1"),
    "raw bytes in the path": line(b"GET /\xff\xfe HTTP/1.1"),
    "raw UTF-8 in the path": line("GET /ж HTTP/1.1".encode()),
    "absolute, elsewhere": line(b"GET http://elsewhere.example/nothing HTTP/1.1"),
    "absolute, no host": line(b"GET http:// HTTP/1.1"),
    "absolute, bad port": line(b"GET http://x:99999999/ HTTP/1.1"),
    "absolute, bad IPv6": line(b"GET http://[::1/ HTTP/1.1"),
    "another scheme": line(b"GET file:///etc/passwd HTTP/1.1"),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "only NULs": bytes(500) + b"\r\n\r\n",
    "response": b"HTTP/1.1 200 OK\r\n\r\n",
    # Methods.
    "unknown method": line(b"FOO / HTTP/1.1"),
    "long method": line(b"A" * 5000 + b" / HTTP/1.1"),
    "lower case": line(b"get /nothing HTTP/1.1"),
    "method with <": line(b"G<T / HTTP/1.1"),
    "method of bytes": line(b"\xc3\x84 / HTTP/1.1"),
    "CONNECT": line(b"CONNECT elsewhere.example:443 HTTP/1.1"),
    "CONNECT /": line(b"CONNECT / HTTP/1.1"),
    "TRACE": line(b"TRACE / HTTP/1.1"),
    "OPTIONS *": line(b"OPTIONS * HTTP/1.1"),
    "GET *": line(b"GET * HTTP/1.1"),
    # Headers.
    "NUL in a value": get(ALIVE, b"X: a\0b"),
    "NUL in a name": get(ALIVE, b"X\0: a"),
    "bare CR in a value": get(ALIVE, b"X: a\rY: b"),
    "blank before the colon": get(ALIVE, b"X : a"),
    "blank before the name": b"GET / HTTP/1.1\r\n X: a\r\nHost: x\r\n\r\n",
    "folded": get(ALIVE, b"X: a", b" b"),
    "folded by a tab": get(ALIVE, b"X: a", b"\tb"),
    "no colon": get(ALIVE, b"nothing"),
    "no name": get(ALIVE, b": a"),
    "name of bytes": get(ALIVE, b"\xc3\x84: a"),
    "name with (": get(ALIVE, b"X(: a"),
    "long value": get(ALIVE, b"X: " + b"a" * 9000),
    "endless value": get(ALIVE, b"X: " + b"a" * 300_000),
    "long name": get(ALIVE, b"X" * 9000 + b": a"),
    "very many": get(ALIVE, *(b"X%d: a" % n for n in range(20_000))),
    "long first line": get(b"/" + b"a" * 9000),
    "endless first line": get(b"/" + b"a" * 300_000),
    "long query": get(ALIVE + b"?q=" + b"a" * 9000),
    "Expect": get(ALIVE, b"Expect: nonsense", b"Connection: close"),
    # One body, two lengths.
    "length and chunks": post(b"Content-Length: 4\r\nTransfer-Encoding: chunked", b"0\r\n\r\n"),
    "chunks and length": post(b"Transfer-Encoding: chunked\r\nContent-Length: 5", b"0\r\n\r\n"),
    "two lengths": post(b"Content-Length: 2\r\nContent-Length: 70", b"{}"),
    "the same length twice": post(b"Content-Length: 2\r\nContent-Length: 2", b"{}"),
    "lengths in a list": post(b"Content-Length: 2, 70", b"{}"),
    "length +2": post(b"Content-Length: +2", b"{}"),
    "length -1": post(b"Content-Length: -1", b"{}"),
    "length 0x2": post(b"Content-Length: 0x2", b"{}"),
    "length 2_0": post(b"Content-Length: 2_0", b"{}"),
    "length 2 0": post(b"Content-Length: 2 0", b"{}"),
    "length of another script": post("Content-Length: ٢".encode(), b"{}"),
    "no length": post(b"Content-Length:", b"{}"),
    "length of 10**30": post(b"Content-Length: 1" + b"0" * 30, b"{}"),
    "length, blank before the colon": post(b"Content-Length : 2", b"{}"),
    "unknown coding": post(b"Transfer-Encoding: xchunked", b"0\r\n\r\n"),
    "chunked, then identity": post(b"Transfer-Encoding: chunked, identity", b"0\r\n\r\n"),
    "chunked twice": post(b"Transfer-Encoding: chunked, chunked", b"0\r\n\r\n"),
    "two codings": post(
        b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked", b"0\r\n\r\n"),
    "coding with a vertical tab": post(b"Transfer-Encoding: \x0bchunked", b"0\r\n\r\n"),
    "folded coding": post(b"Transfer-Encoding:\r\n chunked", b"0\r\n\r\n"),
    "bare LF": post(b"Content-Length: 2", b"{}").replace(b"\r\n", b"\n"),
    "bare LF in the headers": post(b"X: a\nTransfer-Encoding: chunked", b"0\r\n\r\n"),
    "chunks in HTTP/1.0": post(b"Transfer-Encoding: chunked", b"0\r\n\r\n").replace(
        b"HTTP/1.1", b"HTTP/1.0", 1),
    # Chunks.
    "chunk of -2": chunked(b"-2\r\n{}\r\n0\r\n\r\n"),
    "chunk of +2": chunked(b"+2\r\n{}\r\n0\r\n\r\n"),
    "chunk of 0x2": chunked(b"0x2\r\n{}\r\n0\r\n\r\n"),
    "chunk of 2_0": chunked(b"2_0\r\n{}\r\n0\r\n\r\n"),
    "chunk of G": chunked(b"G\r\n{}\r\n0\r\n\r\n"),
    "chunk of nothing": chunked(b"\r\n{}\r\n0\r\n\r\n"),
    "chunk of 2**68": chunked(b"1" + b"0" * 17 + b"\r\n{}\r\n0\r\n\r\n"),
    "chunk of a blank and 2": chunked(b" 2\r\n{}\r\n0\r\n\r\n"),
    "chunk that is longer": chunked(b"1\r\n{}\r\n0\r\n\r\n"),
    "chunk ended by LF": chunked(b"2\n{}\n0\n\n"),
    "chunk with LF in its extension": chunked(b"2;\n0\r\n{}\r\n0\r\n\r\n"),
    "bad trailer": chunked(b"2\r\n{}\r\n0\r\nX : a\r\n\r\n"),
}


# Read by HTTP, and refused by the messenger.
TARGETS = (
    b"/%00", b"/%2F", b"/%", b"/%zz", b"/%e2%82", b"/%FF", b"/%ED%A0%80", b"/%25%30%30",
    b"/../../etc/passwd", b"/%2e%2e/%2e%2e/etc/passwd", b"//", b"//api/v1/users/me", b"/;a=b",
    b"/api/v1/users/me/", b"/api/v1/users/1%00", b"/api/v1/users/%31%2F",
    b"/api/v1/users/0x1", b"/api/v1/users/+1", b"/api/v1/users/%D9%A1", b"/api/v1/chats/1%0A",
    b"/api/v1/chats/9223372036854775808", b"/api/v1/chats/" + b"9" * 5000, b"/api/v1/chats/1/",
    b"/api/v1/chats/1/messages/%7B00000000-0000-4000-8000-000000000000%7D", b"/ws/%2F", b"/ws/1%00",
    b"/api/v1/users?limit=1&limit=1", b"/api/v1/users?limit=1&%6Cimit=2", b"/api/v1/users?limit=",
    b"/api/v1/users?limit=%D9%A1", b"/api/v1/users?limit=%00", b"/api/v1/users?limit=1%zz",
    b"/api/v1/users?after=9223372036854775808", b"/api/v1/users?after=-0x1", b"/api/v1/users?q=%00",
    b"/api/v1/users?q=" + b"x" * 5000, b"/api/v1/chats?cursor=%FF.%FF", b"/ws/1?after=1&after=2",
)
# Headers of a handshake, each without something, or with something else.
SHAKES = {
    **{name.encode(): value.encode() for name, value in HANDSHAKE.items()},
    b"Connection": b"Upgrade, close",
}
HANDSHAKES = [
    SHAKES | spoilt
    for spoilt in (
        {b"Upgrade": b"h2c"}, {b"Upgrade": b""}, {b"Connection": b"close"},
        {b"Sec-WebSocket-Version": b"99"}, {b"Sec-WebSocket-Version": b"x"},
        {b"Sec-WebSocket-Version": b""}, {b"Sec-WebSocket-Key": b"AAAA"},
        {b"Sec-WebSocket-Key": b""}, {b"Sec-WebSocket-Key": b"=" * 24},
        {b"Sec-WebSocket-Key": b"A" * 1000},
    )
]


async def answer_to(server: Server, request: bytes) -> bytes:
    """Send bytes and read all that comes back until the server hangs up."""
    connection = await RawConnection.opens(server.port, request)
    try:
        return await connection.hears_all()
    finally:
        connection.close()


def is_one_refusal(read: bytes) -> bool:
    """Tell whether a connection brought one answer, of a 4xx, and nothing of what was smuggled."""
    is_one = read.count(b"\r\nServer: ") == 1 and b'"alive"' not in read
    return is_one and re.match(rb"HTTP/1\.[01] 4\d\d ", read) is not None


async def test_what_is_no_http_is_refused(fuzzed: Server) -> None:
    """Whatever HTTP does not allow gets a 4xx or no answer at all and ends the connection, and no
    request that hides behind it is answered."""
    found = {name: await answer_to(fuzzed, request) for name, request in REQUESTS.items()}
    assert {name: read for name, read in found.items() if read and not is_one_refusal(read)} == {}
    assert b'"alive"' in await answer_to(fuzzed, get(ALIVE, b"Connection: close"))
    smuggled = get(b"/nothing") + get(ALIVE, b"Connection: close")
    assert not is_one_refusal(await answer_to(fuzzed, smuggled))


async def test_what_is_http_and_wrong_is_a_problem(
    fuzzed: Server, people_of: Any
) -> None:
    """A bad path, a bad query and a bad handshake are each a 4xx problem."""
    alice = await people_of(fuzzed, "alice")
    token = b"Authorization: Bearer " + alice.access.encode()
    requests = [get(target, token, b"Connection: close") for target in TARGETS]
    for shakes in HANDSHAKES:
        headers = (name + b": " + value for name, value in shakes.items())
        requests.append(get(b"/ws", token, *headers))
    found = {request: await answer_to(fuzzed, request) for request in requests}
    wrong = {
        request[:100]: read
        for request, read in found.items()
        if not is_one_refusal(read) or b"\r\nContent-Type: application/problem+json" not in read
    }
    assert wrong == {}
