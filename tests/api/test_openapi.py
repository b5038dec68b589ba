"""The two documents: made anew, valid, complete, and what the server really does."""

import asyncio
import functools
import itertools
import re
import shutil
import subprocess
import sys
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import aiohttp
import asyncpg
import msgspec
import openapi_spec_validator
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from jsonschema import Draft202012Validator

import messenger
from plumbing import endpoints
from plumbing.endpoints import Problem
from support.databases import on_cluster, until_waiting
from support.people import PASSWORD, Line, Person, new_id
from support.recorder import Document, Json, Recorder, documents, kinds, pointer
from support.servers import ROOT, SECRET_KEY, SETTINGS

OPENAPI, ASYNCAPI = documents()
NOBODYS = new_id()
both_documents = pytest.mark.parametrize(
    "document", [OPENAPI, ASYNCAPI], ids=["openapi", "asyncapi"])

# ---- The documents by themselves


def tool(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run tools/documents.py of a folder."""
    command = [sys.executable, str(root / "tools/documents.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_both_documents_are_up_to_date() -> None:
    """What is committed is what messenger.py declares."""
    done = tool(ROOT, "--check")
    assert (done.returncode, done.stderr) == (0, "")


def test_stale_document_is_told_in_one_line(tmp_path: Path) -> None:
    """A document that differs or is missing is named in one line; making it again gives the same
    bytes."""
    for name in ("messenger.py", "plumbing", "tools", "web"):
        copied = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copied(ROOT / name, tmp_path / name)
    openapi, asyncapi = tmp_path / "web/openapi.json", tmp_path / "web/asyncapi.json"
    openapi.write_text(openapi.read_text().replace("Register a user", "Register"))
    asyncapi.unlink()
    done = tool(tmp_path, "--check")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "openapi.json, asyncapi.json" in done.stderr
    assert "Traceback" not in done.stderr
    assert not asyncapi.exists()
    assert tool(tmp_path).returncode == 0
    for path in (openapi, asyncapi):
        assert path.read_bytes() == (ROOT / "web" / path.name).read_bytes()
        assert path.read_bytes().endswith(b"}\n")


def test_openapi_document_is_valid() -> None:
    """It is an OpenAPI 3.1 document."""
    openapi_spec_validator.validate(OPENAPI.content)
    assert OPENAPI.content["openapi"].startswith("3.1.")


def one_of_these(required: str, optional: str = "", **shapes: Any) -> Json:
    """Make a schema of an object with these fields and no others."""
    fields = [*required.split(), *optional.split()]
    properties = {field: shapes.get(field, {"type": "string", "minLength": 1}) for field in fields}
    return {"type": "object", "properties": properties, "required": required.split(),
            "additionalProperties": False}


def map_of(value: Json) -> Json:
    """Make a schema of an object from names to values of one kind."""
    names = {"pattern": r"^[a-zA-Z0-9._-]+$"}
    return {"type": "object", "additionalProperties": value, "propertyNames": names}


SCHEMA = {"type": "object"}
REFERENCE = one_of_these("$ref")
REFERENCES = {"type": "array", "items": REFERENCE, "minItems": 1, "uniqueItems": True}
ACCESS = {"oneOf": [
    one_of_these("type scheme", "description bearerFormat", type={"const": "http"}),
    one_of_these("type in name", "description", type={"const": "httpApiKey"},
                 **{"in": {"enum": ["header", "query"]}}),
]}
WEBSOCKET = one_of_these(
    "", "method query bindingVersion", method={"const": "GET"}, query=one_of_these(
        "type properties", type={"const": "object"}, properties=map_of(SCHEMA)))
MESSAGE = one_of_these(
    "name payload examples", "title summary", payload=REFERENCE,
    examples={"type": "array", "minItems": 1, "items": one_of_these(
        "name payload", "summary", payload=SCHEMA, name={"enum": ["both", "one", "every"]})})
# The parts of AsyncAPI 3.0 that are used here.
ASYNCAPI_3 = one_of_these(
    "asyncapi info servers channels operations components", "defaultContentType",
    asyncapi={"const": "3.0.0"},
    info=one_of_these("title version", "description license", license=one_of_these("name")),
    servers=map_of(one_of_these("host protocol", "description security", security=REFERENCES)),
    channels=map_of(one_of_these(
        "address messages", "summary description servers parameters bindings",
        messages=map_of(REFERENCE), servers=REFERENCES, bindings=one_of_these("ws", ws=WEBSOCKET),
        parameters=map_of(one_of_these("", "description")))),
    operations=map_of(one_of_these(
        "action channel messages", "summary", channel=REFERENCE, messages=REFERENCES,
        action={"enum": ["send", "receive"]})),
    components=one_of_these(
        "schemas messages securitySchemes", schemas=map_of(SCHEMA), messages=map_of(MESSAGE),
        securitySchemes=map_of(ACCESS)),
)


def test_asyncapi_document_is_valid() -> None:
    """It has the structure of an AsyncAPI 3.0 document."""
    assert list(Draft202012Validator(ASYNCAPI_3).iter_errors(ASYNCAPI.content)) == []
    for operation in ASYNCAPI.content["operations"].values():
        here = operation["channel"]["$ref"]
        assert all(each["$ref"].startswith(f"{here}/messages/") for each in operation["messages"])
    for channel in ASYNCAPI.content["channels"].values():
        in_address = set(re.findall(r"\{(\w+)\}", channel["address"]))
        assert in_address == channel.get("parameters", {}).keys()


@pytest.mark.parametrize("path", [
    "info/extra", "operations/follow_chat_sends/action", "channels/follow_chat/messages",
    "components/messages/x y"])
def test_broken_asyncapi_document_is_seen(path: str) -> None:
    """An unknown field, a wrong value and a wrong name are what the test before would find."""
    spoilt = ASYNCAPI.copy().content
    *parents, last = path.split("/")
    functools.reduce(lambda at, step: at[step], parents, spoilt)[last] = "spoilt"
    assert not Draft202012Validator(ASYNCAPI_3).is_valid(spoilt)


def references(value: Any) -> Iterator[str]:
    """Find every reference in a part of a document."""
    if isinstance(value, dict):
        yield from [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        for each in value.values():
            yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


@both_documents
def test_every_reference_leads_somewhere_and_every_shape_is_used(document: Document) -> None:
    """References stay inside the document and lead somewhere, and every shape is referred to."""
    found = set(references(document.content))
    assert len(found) > 20
    for reference in found:
        assert document.at(reference)
    shapes = {pointer("components", "schemas", name)
              for name in document.content["components"]["schemas"]}
    assert shapes - found == set()


@both_documents
def test_every_example_fits_its_schema(document: Document) -> None:
    """Every shape has an example, and each one is as its schema says."""
    components = document.content["components"]
    for name, schema in components["schemas"].items():
        assert schema["examples"], name
        for example in schema["examples"]:
            assert document.faults(pointer("components", "schemas", name), example) == [], name
    for name, message in components["messages"].items() if document is ASYNCAPI else ():
        for example in message["examples"]:
            at = pointer("components", "messages", name, "payload")
            assert document.faults(at, example["payload"]) == [], name


def contents() -> Iterator[tuple[str, Json]]:
    """Find the content of every body and every answer: a pointer to its schema, and what it is."""
    for path, method, operation in operations():
        here = ["paths", path, method.lower()]
        parts = [(operation.get("requestBody", {}), [*here, "requestBody"])]
        parts += [(one, [*here, "responses", status])
                  for status, one in operation["responses"].items()]
        for part, steps in parts:
            if "$ref" in part:
                part, steps = OPENAPI.at(part["$ref"]), part["$ref"].split("/")[1:]
            for kind, content in part.get("content", {}).items():
                yield pointer(*steps, "content", kind, "schema"), content


def test_every_body_and_answer_has_an_example() -> None:
    """What is sent to an endpoint and what it answers is shown by an example that fits."""
    found = list(contents())
    assert len(found) > 150
    for at, content in found:
        named = [OPENAPI.at(each["$ref"])["value"] if "$ref" in each else each["value"]
                 for each in content.get("examples", {}).values()]
        for example in named or [content["example"]]:
            assert OPENAPI.faults(at, example) == [], at


def test_every_frame_has_an_example_for_each_kind_of_socket() -> None:
    """Of each frame there is an example for a socket of one chat and one for a socket of every
    chat, unless it is the same on both; on the latter the client's frames name their chat."""
    for name, message in ASYNCAPI.content["components"]["messages"].items():
        shown = {one["name"] for one in message["examples"]}
        is_every_only = message["name"] in ("chats", "chat", "chat_removed")
        assert shown in ([{"every"}] if is_every_only else [{"both"}, {"one", "every"}]), name
        for example in message["examples"]:
            if name.startswith("client_") and message["name"] not in ("auth", "ping"):
                names_its_chat = {"chat_id", "chats"} & example["payload"].keys() != set()
                assert names_its_chat == (example["name"] == "every"), name


def properties(value: Any, path: str = "") -> Iterator[tuple[str, Json]]:
    """Find every property of every schema in a part of a document, each with where it is."""
    if isinstance(value, dict):
        for name, one in value.get("properties", {}).items():
            yield f"{path}.{name}", one
        for name, each in value.items():
            if name not in ("example", "examples"):
                yield from properties(each, f"{path}/{name}")
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from properties(each, f"{path}/{number}")


@both_documents
def test_every_property_is_described(document: Document) -> None:
    """Each property of each schema is described in a sentence, and so is each parameter."""
    found = dict(properties(document.content))
    assert len(found) > 100
    for where, one in found.items():
        assert re.search(r"^[A-Z`1-9].*\.$", one.get("description", "")), where
    for path, method, operation in operations():
        for parameter in operation.get("parameters", []):
            assert parameter["description"].endswith("."), (path, method, parameter["name"])


# Of a schema's property: the limits that the contract has for it.
LIMITS: dict[str, Json] = {
    "Chat.unread_count": {"minimum": 0, "maximum": 100},
    "Chat.participant_count": {"minimum": 1, "maximum": 1000},
    "Chat.participants": {"maxItems": 100},
    "Chat.last_rev": {"minimum": 0, "maximum": 2**63 - 1},
    "Chat.version": {"minimum": 1},
    "ChangedChat.name": {"minLength": 1, "maxLength": 100},
    "Message.text": {"maxLength": 4096},
    "Message.read_by": {"maxItems": 100},
    "Message.read_count": {"minimum": 0, "maximum": 1000},
    "Message.id": {"format": "uuid"},
    "Message.created_at": {"format": "date-time"},
    "Message.position": {"maxLength": 64},
    "NewChat.participant_ids": {"minItems": 1},
    "NewMessage.text": {"minLength": 1, "maxLength": 4096},
    "NewUser.email": {"minLength": 3, "maxLength": 254},
    "NewUser.username": {"minLength": 3, "maxLength": 50},
    "NewUser.password": {"minLength": 8, "maxLength": 100},
    "Participant.username": {"minLength": 3, "maxLength": 50},
    "ProblemDetails.retry_after": {"minimum": 1},
    "ReadUpTo.message_id": {"format": "uuid"},
    "Session.user_agent": {"maxLength": 200},
    "Tokens.expires_in": {"minimum": 1},
    "User.id": {"minimum": 1, "maximum": 2**63 - 1},
    "ChatPositions.chats": {"maxProperties": 1000},
    "ChatUpdate.participants": {"maxItems": 1000},
    "Hello.ping_seconds": {"minimum": 1},
}


def test_schemas_have_the_limits_of_the_contract() -> None:
    """What the contract bounds is bounded in the schemas."""
    schemas = OPENAPI.content["components"]["schemas"] | ASYNCAPI.content["components"]["schemas"]
    for name, limits in LIMITS.items():
        shape, _, field = name.partition(".")
        assert schemas[shape]["properties"][field].items() >= limits.items(), name


def test_every_problem_is_a_schema_of_its_own() -> None:
    """Each type of problem has a schema that fixes its type and its status, and no other fits."""
    for slug, kind in Problem.named.items():
        if kind in (messenger.TooManyFrames, messenger.TooMuchTyping):  # of sockets only
            continue
        schema = OPENAPI.content["components"]["schemas"][kind.__name__]
        base, own = schema["allOf"]
        assert base == {"$ref": "#/components/schemas/ProblemDetails"}
        assert own["properties"]["type"] == {
            "type": "string", "enum": [slug], "description": f"{kind.title}."}
        assert own["properties"]["status"]["enum"] == [kind.status]
        assert own["properties"]["status"]["type"] == "integer"
        others = {"status": 999}, {"type": "other"}
        [example] = schema["examples"]
        at = pointer("components", "schemas", kind.__name__)
        assert all(OPENAPI.faults(at, example | other) for other in others)


# ---- That nothing is left out


def operations() -> Iterator[tuple[str, str, Json]]:
    """Every operation of the OpenAPI document: path, method, description."""
    for path, methods in OPENAPI.content["paths"].items():
        for method, operation in methods.items():
            yield path, method.upper(), operation


def refusals(path: str, method: str) -> dict[str, int]:
    """The types of problem that an operation may answer, and their statuses."""
    responses = pointer("paths", path, method.lower(), "responses")
    return {
        kind: int(status)
        for status in OPENAPI.at(responses)
        for kind in kinds(OPENAPI.at(f"{responses}/{status}"))
        if kind
    }


def test_every_endpoint_is_described() -> None:
    """The document has exactly the endpoints of the table, under the names of their handlers."""
    described = [(method, path, one["operationId"]) for path, method, one in operations()]
    table = [(one.method, one.path, one.handler.__name__) for one in messenger.ENDPOINTS]
    assert sorted(described) == sorted(table)
    tags = [tag["name"] for tag in OPENAPI.content["tags"]]
    assert all(one["tags"][0] in tags for _, _, one in operations())


def test_every_endpoint_says_who_may_call_it() -> None:
    """Public endpoints need nothing; all others need a token, and describe the 401 without one."""
    public = {one.handler.__name__ for one in messenger.ENDPOINTS if one.public}
    for path, method, one in operations():
        needs = one.get("security", OPENAPI.content["security"])
        is_open = needs == [] or {} in needs
        assert is_open == (one["operationId"] in public), one["operationId"]
        assert is_open != ("unauthorized" in refusals(path, method)), one["operationId"]


def test_every_change_is_limited() -> None:
    """Each call that changes something is 429 for who makes it too often, but for those that end
    what a login or a registration began: these are limited."""
    ends = {"logout", "delete_session", "delete_user"}
    rates = {one.slug for one in Problem.named.values() if one.status == 429} - {
        endpoints.TooManyCalls.slug}
    free = {one["operationId"] for path, method, one in operations()
            if method != "GET" and not rates & refusals(path, method).keys()}
    assert free == ends


def test_every_problem_is_described() -> None:
    """Each kind of problem is a described answer of some endpoint, with its status, or one of the
    general ones."""
    found = {kind: status for path, method, _ in operations()
             for kind, status in refusals(path, method).items()}
    general = (
        endpoints.NotFound, endpoints.MethodNotAllowed, endpoints.ExpectationFailed,
        endpoints.InternalError)
    found |= {one.slug: one.status for one in general}
    for flood in (messenger.TooManyFrames, messenger.TooMuchTyping):  # of sockets only
        found[flood.slug] = flood.status
        assert f"`{flood.slug}`" in ASYNCAPI.content["info"]["description"]
    assert found == {slug: one.status for slug, one in Problem.named.items()}
    responses = OPENAPI.content["components"]["responses"]
    assert all(kinds(responses[one.__name__]) == [one.slug] for one in general)
    assert all(f"`{one.slug}`" in OPENAPI.content["info"]["description"] for one in general)


def test_every_frame_is_described() -> None:
    """Each frame is described, in both directions and on both sockets, and so is each code that
    closes them."""
    frames = typing.get_args(messenger.ServerFrames)
    sent = {f"server_{frame.__struct_config__.tag}" for frame in frames}
    shapes = typing.get_args(messenger.ClientFrame)
    received = {f"client_{shape.__struct_config__.tag}" for shape in shapes}
    assert ASYNCAPI.content["components"]["messages"].keys() == sent | received
    one_chat = sent - {"server_chats", "server_chat", "server_chat_removed"}
    assert {name: {ref["$ref"].rpartition("/")[2] for ref in one["messages"]}
            for name, one in ASYNCAPI.content["operations"].items()} == {
        "follow_chat_sends": one_chat, "follow_chat_receives": received,
        "follow_chats_sends": sent, "follow_chats_receives": received}
    codes = list(messenger.CLOSE_CODES)
    for code in [*codes, 1001, 1007, 1009, 4401, 4403, 4408, 4429]:
        assert f"\n- {code}: " in ASYNCAPI.content["info"]["description"]


# ---- That the recorder sees what it is for


def test_recorder_sees_what_does_not_fit() -> None:
    """The recorder finds each way in which an answer may differ from its description."""
    recorder = Recorder(OPENAPI, ASYNCAPI)
    user = b'{"id":1,"username":"ann","is_active":true,"created_at":"2026-11-22T20:15:37.1Z"}\n'
    problem = (b'{"type":"user-not-found","title":"x","status":404,"detail":"x",'
               b'"request_id":"x"}\n')
    always = {"X-Request-Id": "x"}
    json_type = {"Content-Type": "application/json; charset=utf-8", **always}
    problem_type = {"Content-Type": "application/problem+json", **always}
    link = {"Link": "<x>", **json_type}

    def hears(*answer: Any, method: str = "GET", path: str = "/users/7", sent: bytes = b"") -> str:
        return "; ".join(recorder.hear_answer(method, f"/api/v1{path}", sent, *answer))

    assert hears(200, json_type, user) == ""
    assert hears(404, problem_type, problem) == ""
    assert "is not described" in hears(202, json_type, user)
    assert "username" in hears(200, json_type, user.replace(b"username", b"name"))
    assert "created_at" in hears(200, json_type, user.replace(b"T20", b" at 20"))
    assert "'1' is not of type" in hears(200, json_type, user.replace(b":1,", b':"1",'))
    assert "undescribed header Link" in hears(200, link, user)
    assert "undescribed content" in hears(200, {"Content-Type": "text/html", **always}, user)
    assert "lacks the header X-Request-Id" in hears(200, {"Content-Type": "application/json"}, user)
    assert "request_id" in hears(404, problem_type, problem.replace(b"request", b"query"))
    assert "has no content" in hears(200, json_type, b"")
    assert "a newline" in hears(200, json_type, user.rstrip())
    assert "is not one of" in hears(404, problem_type, problem.replace(b"user", b"chat"))
    assert "is not one of" in hears(404, problem_type, problem.replace(b"404", b"400"))
    post = {"method": "POST", "path": "/users"}
    assert "lacks the header Location" in hears(201, json_type, user, **post)
    assert "additional" in hears(201, json_type, user, sent=b'{"admin":true}', **post).lower()
    assert "undescribed content" in hears(204, json_type, user, method="DELETE")
    assert "not one of ['not-found']" in hears(404, problem_type, problem, path="/nowhere")
    assert "lacks the header Allow" in hears(405, problem_type, problem, method="POST")
    assert ("get_user", 200, "") in recorder.answers
    assert ("get_user", 200, "") not in recorder.unheard()
    assert ("get_me", 200, "") in recorder.unheard()


def test_recorder_sees_frames_that_do_not_fit() -> None:
    """The recorder finds each way in which a frame may differ from its description."""
    recorder = Recorder(OPENAPI, ASYNCAPI)
    ready: Json = {"type": "ready", "data": {"chat_id": 7, "rev": 1, "position": "1.k3J9xQabcde"}}
    ack = {"id": NOBODYS, "chat_id": 7, "seq": 1, "created_at": "2026-11-22T20:15:37.1Z"}
    assert recorder.hear_frame("/ws/7", "send", ready) == []
    assert recorder.frames == {("follow_chat_sends", "server_ready")}
    assert ("follow_chats_sends", "server_ready") in recorder.unheard()
    for path, action, frame in (
        ("/ws/7", "receive", ready),
        ("/ws/7", "send", {"type": "ready", "data": {"chat_id": 7}}),
        ("/ws/7", "send", ready | {"type": "steady"}),
        ("/ws/7", "send", {"type": "ack", "data": ack}),
        ("/ws/7", "send", {"type": "chat_removed", "data": {"chat_id": 7}}),
        ("/ws", "receive", {"type": "typing", "data": {}}),
        ("/ws", "receive", {"type": "message", "text": ""}),
    ):
        assert recorder.hear_frame(path, action, frame), frame
    assert recorder.hear_frame("/ws/7", "send", {"type": "ack", "data": ack, "ref": 1}) == []
    removed = {"type": "chat_removed", "data": {"chat_id": 7}}
    assert recorder.hear_frame("/ws", "send", removed) == []


# ---- That it is what the server really does


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """Hears all that the people of a test say and are answered; whatever does not fit fails it."""
    recorder = Recorder(OPENAPI, ASYNCAPI)
    yield recorder
    assert recorder.faults == []


@pytest.fixture
def aiohttp_client_cls(recorder: Recorder) -> Callable[..., TestClient[Any, Any]]:
    """The client that everybody has here."""
    heard = {"middlewares": (recorder.answer,), "ws_response_class": recorder.socket_class}
    return functools.partial(TestClient, **heard)


# How to be refused before a handler is called, in ways that many endpoints share.
SPOILT: dict[str, Json] = {
    "unauthorized": {"headers": {}},
    "malformed-request": {"data": b"{"},
    "body-too-large": {"data": b" " * (messenger.BODY_BYTES_MAX + 1)},
    "invalid-input": {"data": b'{"nothing": 1}'},
    "upgrade-required": {},
    "foreign-origin": {"headers": {"Origin": "http://elsewhere.example"}},
}


def example_of(operation: Json) -> Any:
    """The body that the document shows for an operation."""
    if (body := operation.get("requestBody")) is None:
        return None
    schema = body["content"]["application/json"]["schema"]
    [shape, *_] = schema.get("anyOf", [schema])  # an optional one may also be null
    return OPENAPI.at(shape["$ref"])["examples"][0]


async def is_refused_everywhere(alice: Person, chat: int) -> None:
    """Get from each endpoint the refusals that come before its handler."""
    for path, method, operation in operations():
        ids = {"chat_id": chat, "user_id": alice.id, "message_id": NOBODYS, "session_id": 1}
        for kind in refusals(path, method).keys() & SPOILT.keys():
            options = {"headers": alice.headers} | SPOILT[kind]
            if kind == "foreign-origin":
                options["headers"] = options["headers"] | alice.headers
            if kind == "invalid-input" and "requestBody" not in operation:
                options = {"headers": alice.headers, "params": {"nothing": "1"}}
                if path.startswith("/ws"):
                    options["params"] = {"after": "x"}
            await alice.client.request(method, path.format(**ids), **options)
        body = example_of(operation)
        for parameter, other in itertools.product(re.findall(r"\{(\w+)\}", path), (0, 10**9)):
            absent = path.format(**(ids | {parameter: other}))
            await alice.client.request(method, absent, headers=alice.headers, json=body)


async def pages_are_turned(person: Person, paths: list[str]) -> None:
    """Get the first of several pages of lists."""
    for path in paths:
        answer = await person.asks("GET", f"{path}?limit=1")
        assert (answer.status, "Link" in answer.headers) == (200, True), path


async def try_accounts(
    alice: Person, bob: Person, people: Callable[[str], Awaitable[Person]]
) -> None:
    """Do everything with accounts and sessions, and be refused everything."""
    account = {"email": "new@example.com", "username": "новый", "password": PASSWORD}
    for taken in ({"email": bob.email}, {"username": bob.name}):
        await alice.posts("/users", account | taken, 409)
        known = {"current_password": PASSWORD}
        await alice.expects(409, "PUT", f"/users/{alice.id}", known | taken)
    await alice.gets("/users/me")
    await alice.gets(f"/users/{bob.id}")
    await alice.gets("/users?q=BO")
    await alice.expects(200, "PUT", f"/users/{alice.id}", {"username": "alice2"})
    await alice.expects(403, "PUT", f"/users/{bob.id}", {"username": "x_x"})
    await alice.expects(403, "DELETE", f"/users/{bob.id}")
    await alice.logs_in()
    await pages_are_turned(alice, ["/users", "/users/me/sessions"])
    [other, *_] = [one for one in await alice.gets("/users/me/sessions") if not one["current"]]
    await alice.expects(204, "DELETE", f"/users/me/sessions/{other['id']}")

    dave = await people("dave")
    await dave.posts("/users/refresh", {"refresh_token": dave.refresh}, 200)
    await dave.posts("/users/refresh", {"refresh_token": "x"}, 401)
    dave.access = dave.refresh
    await dave.posts("/users/refresh", status=200)
    await dave.logs_in()
    guess = {"email": "dave2@example.com", "current_password": "a wrong one"}
    for status in [403] * SETTINGS.login_failures_per_account + [429]:
        await dave.expects(status, "PUT", f"/users/{dave.id}", guess)
    for status in [401] * SETTINGS.login_failures_per_account + [429]:
        await dave.posts("/users/login", {"email": dave.email, "password": "a wrong one"}, status)
    await dave.expects(204, "DELETE", f"/users/{dave.id}")


async def try_chats(alice: Person, bob: Person, carol: Person, sql: asyncpg.Connection) -> None:
    """Do everything with chats and participants, and be refused everything."""
    personal = await alice.opens(bob)
    assert await alice.opens(bob) == personal
    group = await alice.founds(bob)
    ids = await sql.fetch(
        "insert into users (username, username_key) select 'user' || n, 'user' || n"
        " from generate_series(1, 998) n returning id")
    members = [bob.id, *(row["id"] for row in ids)]
    everyone = {"is_group": True, "name": "full", "participant_ids": members}
    full = (await alice.posts("/chats", everyone))["id"]

    await pages_are_turned(alice, ["/chats", f"/chats/{group}/participants"])
    await alice.gets(f"/chats/{group}")
    await alice.expects(200, "PATCH", f"/chats/{group}", {"name": "Другое"})
    await bob.expects(403, "PATCH", f"/chats/{group}", {"name": "x"})
    await alice.expects(409, "PATCH", f"/chats/{personal}", {"name": "x"})
    for by_id in (False, True):
        async def puts(
            person: Person, status: int, chat: int, user_id: int, by_id: bool = by_id, **role: str
        ) -> None:
            path = f"/chats/{chat}/participants"
            body = role or None if by_id else {"user_id": user_id} | role
            await person.posts(f"{path}/{user_id}" if by_id else path, body, status)

        await puts(alice, 201, group, carol.id)
        await puts(alice, 200, group, carol.id, role="admin")
        await puts(bob, 403, group, carol.id, role="member")
        await puts(alice, 409, group, alice.id, role="member")
        await puts(alice, 409, full, carol.id)
        await puts(alice, 409, personal, carol.id)
        await puts(alice, 404, group, 10**9)
        await bob.expects(403, "DELETE", f"/chats/{group}/participants/{carol.id}")
        await alice.expects(204, "DELETE", f"/chats/{group}/participants/{carol.id}")
    await alice.expects(409, "DELETE", f"/chats/{personal}/participants/{bob.id}")


async def try_messages(alice: Person, bob: Person, carol: Person) -> None:
    """Do everything with messages, and be refused everything."""
    chat = await alice.founds(bob)
    first = await alice.says(chat, "hello, world", id=new_id())
    await alice.says(chat, "hello, world", 200, id=first["id"])
    await bob.says(chat, "x", 409, id=first["id"])
    second = await bob.says(chat, "hello, you", reply_to=first["id"])
    await bob.says(chat, "x", 422, reply_to=NOBODYS)
    await bob.reads(chat, first)
    await bob.posts(f"/chats/{chat}/read", {"message_id": NOBODYS}, 404)
    here = f"/chats/{chat}/messages"
    await alice.gets(f"{here}/{first['id']}")
    await alice.gets(f"{here}?q=hello")
    await pages_are_turned(alice, [here, f"/chats/{chat}/changes"])
    await alice.expects(200, "PATCH", f"{here}/{first['id']}", {"text": "hello, all"})
    await bob.expects(403, "PATCH", f"{here}/{first['id']}", {"text": "x"})
    await bob.expects(403, "DELETE", f"{here}/{first['id']}")
    await alice.expects(204, "DELETE", f"{here}/{second['id']}")
    for method, body in (("GET", None), ("PATCH", {"text": "x"}), ("DELETE", None)):
        await alice.expects(404, method, f"{here}/{NOBODYS}", body)
    await alice.gets(here)
    await alice.gets(f"/chats/{chat}/changes")
    await alice.gets(f"/chats/{chat}/changes?after=99.of-another", 409)
    await alice.gets("/chats")
    left = await carol.opens(bob)
    await carol.says(left, "good bye")
    await carol.expects(204, "DELETE", f"/users/{carol.id}")
    await bob.says(left, "x", 409)
    await bob.gets(f"/chats/{left}")
    await bob.gets(f"/chats/{left}/messages")


async def talk(alice: Person, bob: Person, chat: int, line: Line, **named: int) -> None:
    """Send every frame over a socket of Alice's, and hear what comes of it and from Bob."""
    posted: str = new_id()
    for ref in ("first", 1, 1.5):
        await line.says("x", id=posted, ref=ref, **named)
        assert (await line.hears("ack"))["ref"] == ref
    await bob.says(chat, "hello", reply_to=posted)
    await line.hears_text("hello")
    await line.sends(type="read", message_id=posted, ref=2, **named)
    await line.hears("read")
    assert (await line.hears("ack"))["data"] == {"chat_id": chat}
    await line.sends(type="sync", after=0, **named)
    await line.hears("ready")
    await line.sends(type="sync", chats={str(chat): 1})
    await line.hears("ready")
    await line.sends(type="auth", token=alice.access, ref="new")
    assert (await line.hears("auth"))["ref"] == "new"
    await line.sends(type="ping")
    await line.sends(type="ping", ref=3)
    assert await line.hears("pong") == {"type": "pong", "data": {}}
    assert await line.hears("pong") == {"type": "pong", "data": {}, "ref": 3}
    await line.sends(type="typing", **named)
    await bob.lines[0].sends(type="typing")
    await line.hears("typing")
    edit = {"text": new_id()}
    await alice.expects(200, "PATCH", f"/chats/{chat}/messages/{posted}", edit)
    await line.hears_text(edit["text"])
    await alice.expects(200, "PATCH", f"/chats/{chat}", {"name": new_id()})
    await line.hears("chat_updated")
    await line.ws.send_str("{")
    assert (await line.hears("error"))["data"]["type"] == "malformed-request"
    await line.sends(type="typing", chat_id=10**9, ref="mine")
    refused = await line.hears("error")
    assert (refused["ref"], refused["chat_id"]) == ("mine", 10**9)
    await line.ws.send_bytes(b"x")
    await line.hears("error")


async def try_sockets(alice: Person, bob: Person) -> None:
    """Send and hear every frame on both kinds of socket."""
    chat = await alice.founds(bob)
    every = Line(await alice.client.ws_connect("/ws", headers=alice.headers))
    one = await alice.listens(chat, "?after=0")
    alice.lines.append(every)
    await one.hears("ready")
    await bob.listens_live(chat)
    await talk(alice, bob, chat, one)
    await talk(alice, bob, chat, every, chat_id=chat)
    other = await bob.founds(alice)
    assert (await every.hears("chat"))["data"]["id"] == other
    await every.hears("ready")
    await bob.expects(204, "DELETE", f"/chats/{other}/participants/{alice.id}")
    assert (await every.hears("chat_removed"))["data"] == {"chat_id": other}


MakeClient = Callable[..., Awaitable[TestClient[Any, Any]]]


async def meets(alice: Person, make_client: MakeClient, url: str, **settings: Any) -> Person:
    """Answer Alice as a client of another server on the same database, with other settings."""
    strict = msgspec.structs.replace(SETTINGS, **settings)
    same = Person(await make_client(messenger.make_app(strict, url, SECRET_KEY)), alice.name)
    same.id, same.access = alice.id, alice.access
    return same


async def try_limits(
    alice: Person, chat: int, make_client: MakeClient, url: str
) -> None:
    """Go beyond every limit that answers over HTTP."""
    hasty = await meets(
        alice, make_client, url, messages_burst=1, messages_per_second=1, sockets_per_user=1,
        changes_burst=1, changes_per_minute=1,
        refused_handshakes_per_second=1, registrations_per_address=1)
    message = await hasty.says(chat, "once")
    await hasty.says(chat, "twice", 429)
    at = f"/chats/{chat}/messages/{message['id']}"
    await hasty.expects(429, "PATCH", at, {"text": "x"})
    await hasty.expects(204, "DELETE", at)
    await hasty.expects(429, "DELETE", at)
    for _ in range(7):
        await hasty.asks("POST", f"/chats/{chat}/read", {"message_id": message["id"]})
    person = f"/chats/{chat}/participants/{alice.id}"
    for method, path, body in (
        ("POST", "/chats", {"is_group": False, "participant_ids": [alice.id]}),
        ("PATCH", f"/chats/{chat}", {"name": "another"}),
        ("POST", f"/chats/{chat}/participants", {"user_id": alice.id}),
        ("POST", person, None),
        ("DELETE", f"/chats/{chat}/participants/{2**63 - 1}", None),
        ("PUT", f"/users/{alice.id}", {"is_active": True}),
        ("POST", "/users/refresh", {"refresh_token": alice.refresh}),
    ):
        await hasty.asks(method, path, body)
        await hasty.expects(429, method, path, body)
    line = await hasty.listens(chat)
    for path in ("/ws", f"/ws/{chat}"):
        for _ in range(2):
            await hasty.client.get(path)
        assert (await hasty.client.get(path, headers=hasty.headers)).status == 429
    await line.close()
    account = {"email": "one@example.com", "username": "one_one", "password": PASSWORD}
    await hasty.posts("/users", account, 429)
    closed = await meets(alice, make_client, url, registration="closed")
    await closed.posts("/users", account, 403)


async def try_too_many(
    alice: Person, chat: int, make_client: MakeClient, url: str, sql: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Make each call while others are under way, a heavy and a light one."""
    monkeypatch.setattr(endpoints, "SLOT_SECONDS", 0.05)
    hasty = await meets(alice, make_client, url, calls_per_user=1, reads_per_user=1)
    await hasty.gets("/users/me")
    ids = {"chat_id": chat, "user_id": alice.id, "message_id": NOBODYS, "session_id": 1}
    async with sql.transaction():
        await sql.execute("lock table chats in access exclusive mode")
        waiting = asyncio.gather(
            hasty.asks("GET", "/chats"), hasty.asks("GET", f"/chats/{chat}"))
        await until_waiting(sql, 2)
        for path, method, _ in operations():
            if "too-many-calls" in refusals(path, method):
                await hasty.expects(429, method, path.format(**ids))
    await waiting
    monkeypatch.undo()


async def try_slow_bodies(
    alice: Person, chat: int, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Send each body so slowly that it is not waited for, by a client that sends piece by piece."""
    async def slowly() -> AsyncIterator[bytes]:
        for piece in (b"{", b" ", b"}"):  # the first waits for the second
            yield piece
            await asyncio.sleep(0.2)

    monkeypatch.setattr(endpoints, "BODY_SECONDS", 0.1)
    ids = {"chat_id": chat, "user_id": alice.id, "message_id": NOBODYS, "session_id": 1}
    async with aiohttp.ClientSession(headers=alice.headers) as session:
        for path, method, operation in operations():
            if "requestBody" in operation:
                path = path.format(**ids)
                url = alice.client.make_url(path)
                async with session.request(method, url, data=slowly()) as answer:
                    recorder.faults += recorder.hear_answer(
                        method, path, b"{}", answer.status, answer.headers, await answer.read())
    monkeypatch.undo()


async def is_unavailable_everywhere(alice: Person, chat: int) -> None:
    """Get from each endpoint what it answers while the database cannot be reached; all of them ask
    it whether the session is alive."""
    cast("web.Application", alice.client.app)[messenger.SESSIONS].trusted.forget()
    ids = {"chat_id": chat, "user_id": alice.id, "message_id": NOBODYS, "session_id": 1}
    known = {"refresh": {"refresh_token": alice.refresh}}
    await asyncio.gather(*(
        alice.client.request(method, path.format(**ids), headers=alice.headers,
                             json=known.get(one["operationId"], example_of(one)))
        for path, method, one in operations()))


def needs_no_database(path: str, method: str) -> bool:
    """Tell whether an endpoint answers anyone who asks, whatever else is there."""
    operation = OPENAPI.content["paths"][path][method.lower()]
    return method == "GET" and operation.get("security") == [] and not path.endswith("readiness")


async def test_what_is_said_is_described(
    recorder: Recorder, alice: Person, bob: Person, carol: Person, sql: asyncpg.Connection,
    people: Callable[[str], Awaitable[Person]], cluster: str, database_url: str,
    aiohttp_client: MakeClient, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every answer and every frame is as the documents describe it, and everything that they
    describe was seen."""
    for path, method, operation in operations():
        if operation.get("security") == [] and method == "GET":
            await alice.client.request(method, path)
    await try_accounts(alice, bob, people)
    await try_chats(alice, bob, carol, sql)
    await try_messages(alice, bob, carol)
    await try_sockets(alice, bob)
    await is_refused_everywhere(alice, await alice.opens(bob))
    chat = await alice.founds(bob)
    await try_limits(alice, chat, aiohttp_client, database_url)
    await try_too_many(alice, chat, aiohttp_client, database_url, sql, monkeypatch)
    await try_slow_bodies(alice, chat, recorder, monkeypatch)
    name = await sql.fetchval("select current_database()")
    away = f"alter database {name} allow_connections false"
    ended = f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'"
    await on_cluster(cluster, away, ended)
    await is_unavailable_everywhere(alice, chat)
    await on_cluster(cluster, f"alter database {name} allow_connections true")
    await alice.posts("/users/logout", status=204)

    # Only where the account is deleted meanwhile:
    never = {("get_me", 404, "user-not-found"), ("get_me", 404, "X-Request-Id")}
    for path, method, one in operations():
        if needs_no_database(path, method):
            unavailable = {"service-unavailable", "Retry-After", "X-Request-Id"}
            never |= {(one["operationId"], 503, each) for each in unavailable}
    assert recorder.unheard() - never == set()
