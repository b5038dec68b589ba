"""Hostile input: every endpoint of the table, every kind of bad body, path and query."""

import json
import re
import typing
import zlib
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote, unquote
from uuid import uuid4

import aiohttp
import asyncpg
import msgspec
import pytest
from yarl import URL

import messenger
from messenger import ENDPOINTS
from support.databases import on_cluster
from support.people import PASSWORD, Line, Person, follows
from support.valid_calls import ValidCalls, body_is_optional, kinds, of_body, of_query

KIB_64 = 64 * 1024

NO_JSON = {
    "empty": b"",
    "blank": b" \n",
    "cut": b'{"text": "x"',
    "word": b"hello",
    "NaN": b"NaN",
    "two": b"{} {}",
    "after a wrong shape": b'{"nothing": 1} x',
    "quotes": b"{'text': 'x'}",
    "comma": b'{"text": "x",}',
    "comment": b"{} // x",
    "not UTF-8": b'{"text": "\xff\xfe"}',
    "overlong": b'{"text": "\xc0\x80"}',
    "surrogate in UTF-8": b'{"text": "\xed\xa0\x80"}',
    "UTF-16": '{"text": "x"}'.encode("utf-16"),
    "raw control": b'{"text": "\x00"}',
    "NUL after": b"{}\x00",
    "deep list": b"[" * 60_000,
    "deep object": b'{"a":' * 10_000,
    "deep in a field": b'{"text":' + b"[" * 50_000,
    "bomb": b"\x1f\x8b\x08\x00",
}
WRONG_SHAPES = (b"null", b"[]", b'"x"', b"1", b"1.5", b"true", b'[{"text": "x"}]', b'""')

# What a field of a kind does not take.
HUGE = (0, -1, 2**63, 2**64, -(2**63), 10**30, 10**400, 1.5)
WRONG_VALUES: dict[type, tuple[Any, ...]] = {
    msgspec.inspect.StrType: (1, 1.5, True, [], {}, ["x"]),
    msgspec.inspect.IntType: ("1", "١", True, [], {}, *HUGE),
    msgspec.inspect.BoolType: (0, 1, "true", [], {}),
    msgspec.inspect.ListType: (1, "1", {}, [None], ["1"], [[1]], [1.5], *([one] for one in HUGE)),
    msgspec.inspect.UUIDType: (
        1,
        "",
        "x",
        "1" * 31,
        str(uuid4()) + "0",
        str(uuid4())[:-1] + "g",
        [],
    ),
    msgspec.inspect.LiteralType: (1, "", "Owner", "king", True, []),
}
# Fields of text that PostgreSQL must be able to store, and that have bounds.
NUL_REFUSED = {"text", "name", "username", "email"}

BAD_INTEGERS = (
    "", "x", "%D9%A1", "05", "%2B5", "%205", "5%20", "1_0", "-1", "0x5", str(2**63), str(10**30),
    "9" * 5000, "1.5", "1e999", "NaN", "true", "%00", "5%00", "%ED%A0%80", "%FF",
)
BAD_IDS = (
    "0", "-1", "%2B1", "01", "x", "1.0", "1e0", "0x1", "%D9%A1", "%EF%BC%91", "1%00", "%00", "1%20",
    "%201", str(2**63), str(2**64 + 1), str(10**30), "9" * 5000, "null", "1;", "1%0A", "%ED%A0%80",
    "%FF", "1%2F2", "'", "$1", "%25",
)
BAD_UUIDS = (
    "0", "1", "x", "null", str(uuid4())[:-1], str(uuid4()) + "0", uuid4().hex, f"%7B{uuid4()}%7D",
    f"urn:uuid:{uuid4()}", str(uuid4())[:-1] + "g", str(uuid4())[:-1] + "%D9%A1",
    f"{uuid4()}%00", f"{uuid4()}%0A", "%ED%A0%80", "%FF", "-" * 36, "9" * 5000,
)


# What programmers would say, in a sentence for people.
JARGON = re.compile(r"`|[Ee]xpected|regex|object|array|null|enum|\\u|\b(int|str|bool)\b")


async def wrong(
    answer: aiohttp.ClientResponse, status: int | tuple[int, ...], kind: str = ""
) -> str:
    """What is wrong with a refusal: nothing, if it is a problem of that status and type."""
    text = await answer.text(errors="replace")
    expected = status if isinstance(status, tuple) else (status,)
    if answer.status not in expected:
        return f"{answer.status}, not {status}: {text[:200]}"
    if answer.content_type != "application/problem+json" or not text.endswith("}\n"):
        return f"{answer.content_type}: {text[:200]!r}"
    problem = json.loads(text)
    expected_fields = {"type", "title", "status", "detail", "request_id"}
    expected_fields |= {"retry_after"} if answer.status in (429, 503) else set()
    if problem.keys() - {"errors"} != expected_fields:
        return f"fields: {text}"
    if problem["request_id"] != answer.headers["X-Request-Id"]:
        return f"request_id: {text}"
    if problem["status"] != answer.status or not re.fullmatch("[a-z]+(-[a-z]+)*", problem["type"]):
        return f"status or type: {text}"
    if not all(isinstance(problem[name], str) and problem[name] for name in ("title", "detail")):
        return f"title or detail: {text}"
    errors = problem.get("errors", ())
    if any(not error["loc"].startswith("$") or not error["msg"] for error in errors):
        return f"errors: {text}"
    if any(JARGON.search(error["msg"]) or error["msg"] == "is not valid" for error in errors):
        return f"no plain words: {text}"
    if kind and problem["type"] != kind:
        return f"{problem['type']}, not {kind}"
    return ""


WITH_BODY = [endpoint for endpoint in ENDPOINTS if of_body(endpoint)]


def failures(found: dict[str, str]) -> dict[str, str]:
    """Those that went wrong."""
    return {what: reason for what, reason in found.items() if reason}


async def test_valid_request_is_taken(calls: ValidCalls) -> None:
    """The requests that the other tests spoil are valid: each endpoint takes its own, and the
    answer ends with a newline."""
    last = next(one for one in ENDPOINTS if one.handler is messenger.delete_user)
    for endpoint in [*(one for one in ENDPOINTS if one is not last), last]:
        answer = await calls.asks(endpoint)
        text = await answer.text()
        if endpoint.path.startswith("/ws"):
            assert await wrong(answer, 426) == ""
            continue
        allowed = (endpoint.status, 200) if endpoint.method == "POST" else (endpoint.status,)
        assert answer.status in allowed, (endpoint, text)
        ends = ("</html>\n",) if endpoint.path in ("/", "/docs") else ("}\n", "]\n")
        assert text == "" if answer.status == 204 else text.endswith(ends)
        if endpoint.handler is messenger.change_user:
            calls.alice.email = calls.bodies["change_user"]["email"]
            calls.bodies["login"]["email"] = calls.alice.email
        if endpoint.handler is messenger.logout:
            await calls.alice.logs_in()
        if answer.status == 204:
            continue
        page = endpoint.path in ("/", "/docs")
        assert answer.content_type == ("text/html" if page else "application/json")
        assert ("Location" in answer.headers) == (answer.status == 201), endpoint


async def test_every_endpoint_is_closed_by_default(calls: ValidCalls) -> None:
    """Without a good access token all endpoints but the public ones are 401, before anything else
    is checked."""
    public = {(one.method, one.path) for one in ENDPOINTS if one.public}
    assert public == {
        ("POST", "/api/v1/users"),
        ("POST", "/api/v1/users/login"),
        ("POST", "/api/v1/users/refresh"),
        ("GET", "/"),
        ("GET", "/docs"),
        ("GET", "/api/v1/openapi.json"),
        ("GET", "/api/v1/asyncapi.json"),
        ("GET", "/api/v1/health/liveness"),
        ("GET", "/api/v1/health/readiness"),
    }
    found = {}
    for endpoint in ENDPOINTS:
        if endpoint.public:
            continue
        bad = dict.fromkeys(calls.ids, "x")
        for path in (calls.path(endpoint), calls.path(endpoint, **bad)):
            for header in ("", "Bearer", "Bearer ", "Bearer x.y.z", f"Basic {calls.alice.access}"):
                answer = await calls.asks(endpoint, path, b"{", Authorization=header)
                what = f"{endpoint.method} {path} {header}"
                found[what] = await wrong(answer, 401, "unauthorized")
                if answer.headers.get("WWW-Authenticate") != "Bearer":
                    found[f"{what}: WWW-Authenticate"] = "missing"
    assert failures(found) == {}


async def test_body_that_is_no_json_is_400(calls: ValidCalls) -> None:
    """A body that cannot be read as JSON in UTF-8 is 400, whatever the endpoint."""
    found = {}
    for endpoint in WITH_BODY:
        for what, raw in NO_JSON.items():
            if not raw and body_is_optional(endpoint):
                continue
            answer = await calls.asks(endpoint, raw=raw)
            found[f"{endpoint.handler.__name__}: {what}"] = await wrong(
                answer, 400, "malformed-request"
            )
    assert failures(found) == {}


async def test_lone_surrogates_are_refused(calls: ValidCalls) -> None:
    """An escaped half of a surrogate pair, which is no character, is a 4xx in every field."""
    found = {}
    for endpoint in WITH_BODY:
        for name in (*calls.bodies[endpoint.handler.__name__], "nothing"):
            for half in ("\\ud800", "\\udc00", "\\udc00\\ud800", "\\ud800x", "x\\udfff"):
                spoilt = calls.bodies[endpoint.handler.__name__] | {name: "@@"}
                raw = json.dumps(spoilt).replace("@@", half).encode()
                answer = await calls.asks(endpoint, raw=raw)
                found[f"{endpoint.handler.__name__}.{name}: {half}"] = await wrong(
                    answer, (400, 422)
                )
    assert failures(found) == {}


async def test_body_of_another_shape_is_422(calls: ValidCalls) -> None:
    """JSON that is not an object, has an unknown field or lacks one is a 422 that says which."""
    found = {}
    for endpoint in WITH_BODY:
        name = endpoint.handler.__name__
        for raw in WRONG_SHAPES[body_is_optional(endpoint) :]:
            answer = await calls.asks(endpoint, raw=raw)
            found[f"{name}: {raw!r}"] = await wrong(answer, 422, "invalid-input")
        for unknown in ("nothing", "", "Text", "a b", "__class__", "$.x`"):
            spoilt = calls.bodies[name] | {unknown: 1}
            answer = await calls.asks(endpoint, raw=json.dumps(spoilt).encode())
            found[f"{name}: unknown {unknown}"] = await wrong(answer, 422, "invalid-input")
        for field in msgspec.structs.fields(of_body(endpoint)):
            if not field.required:
                continue
            spoilt = {k: v for k, v in calls.bodies[name].items() if k != field.name}
            answer = await calls.asks(endpoint, raw=json.dumps(spoilt).encode())
            found[f"{name}: without {field.name}"] = await wrong(answer, 422, "invalid-input")
            if f'"$.{field.name}"' not in await answer.text():
                found[f"{name}: {field.name} is named"] = await answer.text()
    assert failures(found) == {}


async def test_field_of_a_wrong_value_is_422(calls: ValidCalls) -> None:
    """A field of another type, out of its bounds, or null where that is not allowed is a 422 that
    names the field."""
    found, tried = {}, 0
    for endpoint in WITH_BODY:
        name = endpoint.handler.__name__
        for field in msgspec.inspect.type_info(of_body(endpoint)).fields:
            takes = kinds(field.type)
            values = [v for kind in takes if kind in WRONG_VALUES for v in WRONG_VALUES[kind]]
            assert values, (name, field.name, takes)
            if msgspec.inspect.NoneType not in takes:
                values.append(None)
            if field.name in NUL_REFUSED and endpoint.handler is not messenger.login:
                values += ["a\0b", "\0" * 10, "", "x" * 5000]
            for value in values:
                tried += 1
                spoilt = calls.bodies[name] | {field.name: value}
                answer = await calls.asks(endpoint, raw=json.dumps(spoilt).encode())
                what = f"{name}.{field.name} = {str(value)[:30]!r}"
                found[what] = await wrong(answer, 422, "invalid-input")
                if not found[what] and f'"$.{field.name}' not in await answer.text():
                    found[what] = f"does not name the field: {await answer.text()}"
    assert tried > 100
    assert failures(found) == {}


async def test_login_with_strange_strings_is_refused(calls: ValidCalls) -> None:
    """Whatever strings are sent as email and password, a login is 401 and not a fault."""
    login = next(one for one in ENDPOINTS if one.handler is messenger.login)
    found = {}
    texts = ("", "\0", "a\0b@x.com", "x" * 20_000, "🙂" * 4000, "\ufdfa" * 3000, "İ" * 99)
    for text in texts:
        for body in ({"email": text, "password": PASSWORD}, {"email": "a@b.c", "password": text}):
            answer = await calls.asks(login, raw=json.dumps(body, ensure_ascii=False).encode())
            found[repr(text[:9])] = await wrong(answer, 401, "invalid-credentials")
    assert failures(found) == {}


async def test_body_is_json_whatever_its_content_type(calls: ValidCalls) -> None:
    """A body is read as JSON under any Content-Type, also a wrong or a broken one."""
    endpoint = next(one for one in ENDPOINTS if one.handler is messenger.send_message)
    for content_type in (
        "application/json", "text/plain", "application/x-www-form-urlencoded", "x", "",
        "multipart/form-data", "application/json; charset=utf-16", "text/html; charset=nonsense",
        "application/octet-stream",
    ):
        raw = json.dumps({"text": f"as {content_type} Ж"}, ensure_ascii=False).encode()
        answer = await calls.asks(endpoint, raw=raw, **{"Content-Type": content_type})
        assert answer.status == 201, (content_type, await answer.text())
        assert (await answer.json())["text"] == f"as {content_type} Ж"


async def test_body_of_over_64_kib_is_413(calls: ValidCalls) -> None:
    """A body of 64 KiB is read and one byte more is 413, whether its length is declared or not."""

    async def chunks(raw: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(raw), 8192):
            yield raw[start : start + 8192]

    found = {}
    for endpoint in WITH_BODY:
        name = endpoint.handler.__name__
        valid = json.dumps(calls.bodies[name]).encode()
        for size in (KIB_64 + 1, 100_000, 900_000):
            raw = valid + b" " * (size - len(valid))
            answer = await calls.asks(endpoint, raw=raw)
            found[f"{name}: {size}"] = await wrong(answer, 413, "body-too-large")
            answer = await calls.asks(endpoint, raw=chunks(raw))
            found[f"{name}: {size} in chunks"] = await wrong(answer, 413, "body-too-large")
        raw = b"[" * KIB_64
        found[f"{name}: 64 KiB"] = await wrong(await calls.asks(endpoint, raw=raw), 400)
        answer = await calls.asks(endpoint, raw=chunks(raw))
        found[f"{name}: 64 KiB in chunks"] = await wrong(answer, 400)
    assert failures(found) == {}


async def test_compressed_body_cannot_hurt(calls: ValidCalls) -> None:
    """A body that is not compressed as its header says is a 4xx problem; one that unfolds beyond 64
    KiB is 413."""
    found = {}
    for endpoint in WITH_BODY:
        name = endpoint.handler.__name__
        for encoding in ("gzip", "deflate", "x-nonsense"):
            headers = {"Content-Encoding": encoding, "Connection": "close"}
            answer = await calls.asks(endpoint, raw=b"\x00junk" * 9, **headers)
            found[f"{name}: {encoding}"] = await wrong(answer, (400, 413, 415))
        bomb = zlib.compress(b" " * 5_000_000)
        headers = {"Content-Encoding": "deflate", "Connection": "close"}
        answer = await calls.asks(endpoint, raw=bomb, **headers)
        found[f"{name}: bomb"] = await wrong(answer, 413)
    assert failures(found) == {}


async def test_id_that_is_none_is_404(calls: ValidCalls) -> None:
    """An id in a path that is not a positive int64, or not a UUID, is the 404 of what it would
    name."""
    found, tried = {}, 0
    for endpoint in ENDPOINTS:
        for name in re.findall(r"\{(\w+)\}", endpoint.path):
            for bad in BAD_UUIDS if name == "message_id" else BAD_IDS:
                tried += 1
                answer = await calls.asks(endpoint, calls.path(endpoint, **{name: bad}))
                what = f"{endpoint.method} {calls.path(endpoint, **{name: bad[:40]})}"
                kind = "" if "%7B" in bad else name.replace("_id", "-not-found")
                found[what] = await wrong(answer, 404, kind)
    assert tried > 200
    assert failures(found) == {}


async def test_bad_query_is_422(calls: ValidCalls) -> None:
    """A query with a bad number, one out of bounds, or any parameter given twice is a 422 that
    names the parameter."""
    found, tried = {}, 0
    for endpoint in ENDPOINTS:
        for name, takes in of_query(endpoint).items():
            values = list(BAD_INTEGERS) if msgspec.inspect.IntType in takes else []
            if name == "limit":
                values += ["0", "101"]
            queries = [f"{name}={value}" for value in values]
            queries += [f"{name}=1&{name}=1", f"{name}=1&{name}=2&x=1", f"{name}&{name}=1"]
            for query in queries:
                tried += 1
                answer = await calls.asks(endpoint, f"{calls.path(endpoint)}?{query}")
                what = f"{endpoint.handler.__name__}?{query[:40]}"
                found[what] = await wrong(answer, 422, "invalid-input")
                if not found[what] and f'"$.{name}"' not in await answer.text():
                    found[what] = f"does not name the parameter: {await answer.text()}"
    assert tried > 100
    assert failures(found) == {}


async def test_null_in_a_query_is_no_number(calls: ValidCalls) -> None:
    """`null` is refused like any other word where a query takes a number, also an optional one."""
    found = {}
    for endpoint in ENDPOINTS:
        for name, takes in of_query(endpoint).items():
            if msgspec.inspect.IntType not in takes:
                continue
            for word in ("null", "NULL", "None"):
                answer = await calls.asks(endpoint, f"{calls.path(endpoint)}?{name}={word}")
                what = f"{endpoint.handler.__name__}?{name}={word}"
                found[what] = await wrong(answer, 422, "invalid-input")
    assert failures(found) == {}


async def test_strange_texts_in_a_query_do_no_harm(calls: ValidCalls) -> None:
    """Any text in a parameter that takes text is answered, or is 422."""
    found = {}
    texts = (
        "", "%00", "a%00", "%ED%A0%80", "%FF", "%", "%zz", "%25", "'", "x" * 51, "x" * 5000,
        "%F0%9F%99%82" * 50, "%EF%B7%BA" * 50, "1.2.3", "1.", ".1", "1.%D9%A1", "-1.1",
        f"{10**16}.{2**63 - 1}", f"{10**17 - 1}.1", f"{10**17}.1", f"1.{2**63}", f"1.{10**30}",
        "9" * 5000 + ".1", "0.0", "1.1%0A",
    )
    for endpoint in ENDPOINTS:
        for name, takes in of_query(endpoint).items():
            if msgspec.inspect.StrType not in takes:
                continue
            for text in texts:
                answer = await calls.asks(endpoint, f"{calls.path(endpoint)}?{name}={text}")
                is_position = name == "after" and re.fullmatch(r"\d{1,19}\.\w+", unquote(text))
                if answer.status != 200 and not (is_position and answer.status in (409, 426)):
                    what = f"{endpoint.handler.__name__}?{name}={text[:40]}"
                    found[what] = await wrong(answer, 422, "invalid-input")
    assert found
    assert failures(found) == {}


async def test_link_cannot_be_broken_from_outside(calls: ValidCalls) -> None:
    """Whatever is searched for, the Link of a page is one valid header that works."""
    endpoint = next(one for one in ENDPOINTS if one.handler is messenger.list_messages)
    for text in ("a\r\nSet-Cookie: b=c", 'a>,<http://evil/>; rel="next"', "a;&b=c#d", "%0d%0aa"):
        for _ in range(2):
            await calls.alice.says(calls.ids["chat_id"], text)
        path = f"{calls.path(endpoint)}?limit=1&q={quote(text)}"
        answer = await calls.asks(endpoint, path)
        assert answer.status == 200, text
        link = answer.headers["Link"]
        assert re.fullmatch(r'</api/v1/chats/\d+/messages\?[!#-;=?-~]*>; rel="next"', link), link
        assert "Set-Cookie" not in answer.headers
        following = re.match("<(.*?)>", link)
        assert following is not None
        answer = await calls.asks(endpoint, following[1])
        assert [message["text"] for message in await answer.json()] == [text]


async def test_unknown_parameter_is_422(calls: ValidCalls) -> None:
    """A parameter that a call under /api/v1 does not take is refused and named, whatever the
    method; health, the two documents, the pages and sockets pass over it."""
    found, passed = {}, []
    for endpoint in sorted(ENDPOINTS, key=lambda one: one.handler is messenger.delete_user):
        for query, loc in (
            ("nothing=1", "$.nothing"), ("Limit=1", "$.Limit"), ("=1", "$."), ("x", "$.x"),
            ("%6Cimits=1", "$.limits"), ("a%60b=c", "$.a`b"), ("token=x", "$.token"),
        ):
            answer = await calls.asks(endpoint, f"{calls.path(endpoint)}?{query}")
            what = f"{endpoint.method} {endpoint.path}?{query}"
            if answer.status in (200, 426):
                passed.append(endpoint.path)
                continue
            found[what] = await wrong(answer, 422, "invalid-input")
            if not found[what]:
                [told] = (await answer.json())["errors"]
                if told != {"loc": loc, "msg": "is not a parameter here"}:
                    found[what] = str(told)
        assert (await calls.asks(endpoint, calls.path(endpoint) + "?&")).status < 500
        if endpoint.handler is messenger.logout:
            await calls.alice.logs_in()
        if endpoint.handler is messenger.change_user:
            calls.alice.email = calls.bodies["change_user"]["email"]
    assert failures(found) == {}
    assert set(passed) == {
        "/", "/docs", "/ws", "/ws/{chat_id}", "/api/v1/openapi.json", "/api/v1/asyncapi.json",
        "/api/v1/health/liveness", "/api/v1/health/readiness"}


async def test_unknown_parameter_of_a_handshake_is_passed_over(alice: Person, bob: Person) -> None:
    """A socket opens whatever else stands in its query, beside what it takes."""
    chat = await alice.opens(bob)
    for path in (f"/ws/{chat}?after=0&since=x", "/ws?x=1&x=2&after=0"):
        line = Line(await alice.client.ws_connect(f"{path}&token={alice.access}"))
        await line.sends(type="ping")
        assert await line.hears("pong")
        await line.close()


async def test_wrong_input_is_told_in_plain_words(calls: ValidCalls) -> None:
    """Each kind of wrong input has a sentence of its own: lengths and bounds in numbers, choices by
    their names."""
    chat = f"/chats/{calls.ids['chat_id']}"
    user = {"email": "a@b.cd", "username": "ann_", "password": "12345678"}
    group = {"is_group": True, "name": "x", "participant_ids": [calls.ids["user_id"]]}
    for path, body, loc, msg in (
        ("/users", user | {"username": "ab"}, "$.username", "must have at least 3 characters"),
        ("/users", user | {"password": "x" * 101}, "$.password",
         "must have at most 100 characters"),
        ("/users", user | {"email": 1}, "$.email", "must be text"),
        ("/users", {}, "$.email", "is missing"),
        ("/users", user | {"x": 1}, "$.x", "is not a field here"),
        ("/users", user | {"x` - at `$.y": 1}, "$.y.x", "is not a field here"),
        ("/users", [], "$", "must be named fields in braces"),
        ("/users/refresh", 1, "$", "must be named fields in braces"),
        ("/chats", group | {"is_group": 1}, "$.is_group", "must be true or false"),
        ("/chats", group | {"participant_ids": 1}, "$.participant_ids", "must be a list"),
        ("/chats", group | {"participant_ids": [1, "1"]}, "$.participant_ids[1]",
         "must be a whole number"),
        ("/chats", group | {"participant_ids": [0]}, "$.participant_ids[0]", "must be at least 1"),
        ("/chats", group | {"participant_ids": [1] * 10_001}, "$.participant_ids",
         "must have at most 10000 entries"),
        ("/chats", group | {"name": None}, "$.name", "must be given for a group"),
        ("/chats", group | {"participant_ids": [10**9]}, "$.participant_ids",
         "has unknown users: 1000000000"),
        (f"{chat}/participants", {"user_id": 1, "role": "king"}, "$.role",
         "must be one of admin, member, owner"),
        (f"{chat}/messages", {"text": ""}, "$.text", "must not be empty"),
        (f"{chat}/messages", {"text": "a\0"}, "$.text", "must not contain U+0000"),
        (f"{chat}/messages", {"text": "a", "id": "x"}, "$.id",
         "must be a UUID, like 01a204e6-62a3-7c4a-8d5e-1f2a3b4c5d6e"),
        (f"{chat}/messages", {"text": "a", "id": 1}, "$.id", "must be a UUID"),
    ):
        problem = await calls.alice.posts(path, body, 422)
        assert problem["errors"] == [{"loc": loc, "msg": msg}], body
        assert problem["detail"] == f"{loc} {msg}"
    for query, msg in (
        ("limit=x", "must be a whole number"), ("limit=101", "must be at most 100"),
        ("limit=0", "must be at least 1"), ("limit=1&limit=1", "is given more than once"),
    ):
        problem = await calls.alice.gets(f"/chats?{query}", 422)
        assert problem["errors"] == [{"loc": "$.limit", "msg": msg}], query


async def test_wrong_frame_is_told_in_plain_words(calls: ValidCalls) -> None:
    """Each field of each frame that is missing, unknown or of a wrong value is named, with a
    sentence in plain words."""
    line = await follows(calls.alice)
    chat, message = calls.ids["chat_id"], calls.ids["message_id"]
    valid: dict[str, dict[str, Any]] = {
        "message": {"text": "x", "chat_id": chat}, "read": {"message_id": message, "chat_id": chat},
        "typing": {"chat_id": chat}, "sync": {"after": 1, "chat_id": chat}, "auth": {"token": "x"},
        "ping": {}}
    tried: list[tuple[dict[str, Any], str]] = [
        ({"type": "nothing"}, "$.type"), ({"type": 1}, "$.type"), ({"text": "x"}, "$.type")]
    for shape in typing.get_args(messenger.ClientFrame):
        kind = shape.__struct_config__.tag
        frame = valid[kind] | {"type": kind}
        tried.append((frame | {"nothing": 1}, "$.nothing"))
        for field in msgspec.inspect.type_info(shape).fields:  # type: ignore[attr-defined]
            takes = kinds(field.type)
            if field.required:
                without = {name: each for name, each in frame.items() if name != field.name}
                tried.append((without, f"$.{field.name}"))
            values = [value for one in takes for value in WRONG_VALUES.get(one, ())
                      if field.name != "ref" or type(value) in (bool, list, dict)
                      if field.name != "after" or value not in (0, 1, "1")]
            if msgspec.inspect.DictType in takes:
                values = [1, [], {"x": 1}, {"0": 1}, {"1": -1}, {"1": "x"}, {"1": None}]
            tried += [(frame | {field.name: value}, f"$.{field.name}") for value in values]
    assert len(tried) > 60
    found = {}
    for frame, loc in tried:
        await line.sends(**frame)
        problem = (await line.hears("error"))["data"]
        told = problem.get("errors", [{"loc": "", "msg": str(problem)}])[0]
        is_named = re.sub(r"\[.*", "", told["loc"]) == loc
        if not is_named or JARGON.search(told["msg"]) or told["msg"] == "is not valid":
            found[str(frame)[:80]] = told
    assert found == {}
    await line.sends(type="nothing")
    [told] = (await line.hears("error"))["data"]["errors"]
    assert told["msg"] == "must be one of auth, message, ping, read, sync, typing"


async def test_unknown_path_is_404(calls: ValidCalls) -> None:
    """A path that is not in the table is 404, with a token and without."""
    found = {}
    for path in (
        "/api", "/api/v1", "/api/v1/", "/api/v1/nothing", "/api/v2/users", "/api/v1/users/",
        "/api/v1//users", "/API/v1/users", "/api/v1/users/1/2", "/api/v1/chats/1/nothing", "/%00",
        "/%ED%A0%80", "/%FF", "/..%2F..%2Fetc%2Fpasswd", "/api/v1/chats/1/messages/", "/ws/1/2",
        "/" + "x" * 5000,
    ):
        for method in ("GET", "POST", "DELETE"):
            async with calls.client.request(method, URL(path, encoded=True), data=b"[") as answer:
                found[f"{method} {path[:40]}"] = await wrong(answer, 404, "not-found")
    assert failures(found) == {}


async def test_wrong_method_is_405(calls: ValidCalls) -> None:
    """A method that a path does not have is 405, and Allow names those that it has: `me` and
    `login` are paths, and no ids of users."""
    found = {}
    by_path: dict[str, set[str]] = {}
    for endpoint in ENDPOINTS:
        by_path.setdefault(endpoint.path, set()).add(endpoint.method)
    for path, methods in by_path.items():
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"} - methods:
            url = path.format(**calls.ids)
            async with calls.client.request(method, url, headers=calls.alice.headers) as answer:
                what = f"{method} {path}"
                found[what] = await wrong(answer, 405, "method-not-allowed")
                allowed = set(re.findall("[A-Z]+", answer.headers.get("Allow", "")))
                if not found[what] and allowed - {"HEAD"} != methods:
                    found[what] = f"Allow: {allowed}"
    assert failures(found) == {}


async def test_fault_is_logged_and_not_told(
    calls: ValidCalls, caplog: pytest.LogCaptureFixture, sql: asyncpg.Connection
) -> None:
    """A 500 tells the client nothing of its cause, which is in the log."""
    await sql.execute("drop table participants cascade")
    endpoint = next(one for one in ENDPOINTS if one.handler is messenger.list_chats)
    answer = await calls.asks(endpoint)
    assert await wrong(answer, 500, "internal-error") == ""
    assert "participants" not in await answer.text()
    assert "chat_view" not in await answer.text()
    assert "GET /api/v1/chats failed, request " in caplog.text


async def test_health_is_told_to_anyone(
    calls: ValidCalls, sql: asyncpg.Connection, cluster: str
) -> None:
    """Liveness always answers; while the database cannot be reached readiness and other calls are
    503, and both come back by themselves."""

    async def asks(path: str) -> tuple[int, Any]:
        async with calls.client.get(f"/api/v1{path}") as answer:
            assert (await answer.text()).endswith("\n")
            return answer.status, await answer.json()

    assert await asks("/health/liveness") == (200, {"status": "alive"})
    assert await asks("/health/readiness") == (200, {"status": "ready"})
    name = await sql.fetchval("select current_database()")
    away = f"alter database {name} allow_connections false"
    ended = f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'"
    await on_cluster(cluster, away, ended)
    assert await asks("/health/readiness") == (503, {"status": "error"})
    assert await asks("/health/liveness") == (200, {"status": "alive"})
    endpoint = next(one for one in ENDPOINTS if one.handler is messenger.login)
    answer = await calls.asks(endpoint)
    assert await wrong(answer, 503, "service-unavailable") == ""
    assert int(answer.headers["Retry-After"]) >= 1
    await on_cluster(cluster, f"alter database {name} allow_connections true")
    assert await asks("/health/readiness") == (200, {"status": "ready"})
    assert (await calls.asks(endpoint)).status == 200


async def test_head_is_answered_like_get_without_a_body(calls: ValidCalls) -> None:
    """Every GET has a HEAD with the same status and headers, and no body."""
    for path in ("/api/v1/users/me", "/api/v1/health/liveness", "/docs", "/api/v1/chats/999999"):
        headers = calls.alice.headers
        got = await calls.client.get(path, headers=headers)
        head = await calls.client.head(path, headers=headers)
        assert (head.status, await head.read()) == (got.status, b"")
        assert head.headers["Content-Length"] == str(len(await got.read()))
