#!/usr/bin/env python3
"""Makes web/openapi.json and web/asyncapi.json from what messenger.py declares.

Started as it is, this writes both; with `--check` it writes nothing, and fails where one is stale.

Addresses come from the table of endpoints; parameters, bodies and answers from the signatures of
the handlers; words from their docstrings: the first line is the summary, the last names the
problems, and a sentence with "answers 200" tells of a status beside the usual one. Schemas come
from the shapes. A field or a parameter is described by a line `name: …` in the docstring of its
shape or handler, else by the description of its type. What messenger.py declares nowhere stands
in the tables below.
"""

import inspect
import json
import re
import sys
import typing
from collections.abc import Container, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
from aiohttp import web

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import messenger as m  # noqa: E402
from plumbing import endpoints  # noqa: E402

Json = dict[str, Any]

# ==== What is declared nowhere else ===============================================================

ABOUT = """\
Accounts, personal and group chats, messages and their read status, live over websockets.

Bodies and answers are JSON in UTF-8; a body may have up to 64 KiB. Times are in UTC (RFC 3339).
Lists come in pages: the `Link` header has the paths of the next and the previous page. If the
server refuses a call, it answers with a problem (RFC 9457): programs can rely on its `type`, and
`detail` and the `msg` of `errors` are sentences for people. Every answer has an `X-Request-Id`,
which is also in problems and in the server's log. Besides what each call lists, every path may
answer:
"""
ABOUT_SOCKETS = """\
The frames of `/ws/{chat_id}`, which follows one chat, and of `/ws`, which follows every chat of the
user. Each frame is JSON, sent as text.

Send the access token in one of three ways: as the header `Authorization: Bearer …`; from a browser,
as the two subprotocols `messenger.v1, <token>`; or as `?token=`. If the server refuses the
handshake, it answers with an HTTP status and a problem, as it answers any other call.

On `/ws` each frame of the client needs a `chat_id`, except `auth`, `ping`, and a `sync` of several
`chats`. If a frame of the client has a `ref`, the server repeats it in the frame that answers. A
`ref` is a string or number; up to 65 characters are always accepted.

`message` and `message_updated` mean the same: show this message, unless you have a copy with a
larger `rev`. A client that reconnects sends the position that it has of a chat, by `?after=` or by
`sync`. It then gets every change after that position, in order, then a `ready`, and then what is
new. docs/protocol.md in the repository describes which position to store, and which messages to
store with it.

The server closes with one of these codes:
"""
TAGS = {  # by the start of a path: the first that fits
    "/api/v1/chats/[^/]+/(messages|changes|read)": ("messages", "Post, edit, read and search."),
    "/api/v1/chats": ("chats", "Personal and group chats, and who is in them."),
    "/api/v1/users": ("users", "Accounts and sessions."),
    "/ws": ("sockets", "Live delivery; asyncapi.json describes the frames."),
    "/api/v1/health": ("health", "Whether the server runs, and whether it can serve."),
    "/": ("pages", "The web client and the documents."),
}
GENERAL = (
    endpoints.NotFound, endpoints.MethodNotAllowed, endpoints.ExpectationFailed,
    endpoints.InternalError)
SUCCESSES = {  # by status; in braces goes what is answered
    101: "The socket is open.", 200: "The {}.", 201: "The new {}.", 204: "Done."}
FRAME_TYPE = "Which frame this is."
# By name: the statuses that always have it, what it says.
HEADERS: dict[str, tuple[Container[int], str]] = {
    "Allow": ((405,), "The methods that are allowed here."),
    "Link": ((), "The paths of the next and the previous page (RFC 8288), if there are any."),
    "Location": ((201,), "The path of what was created."),
    "Retry-After": ((429, 503), "How many seconds to wait before you try again."),
    "Sec-WebSocket-Version": ((426,), "The version of websockets to upgrade to."),
    "Upgrade": ((426,), "The protocol to upgrade to."),
    "WWW-Authenticate": ((401,), "How to sign in."),
    "X-Request-Id": (
        range(600), "The request's, if it is 1 to 64 of `A-Za-z0-9._-`, else a new one."),
}
BEARER = {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
ACCESS = {
    "access_token": BEARER | {"description": "The access token of a login."},
    "subprotocol": {
        "type": "apiKey", "in": "header", "name": "Sec-WebSocket-Protocol",
        "description": f"`{m.SUBPROTOCOL}, <access token>`: for sockets that a browser opens."},
    "query_token": {
        "type": "apiKey", "in": "query", "name": "token",
        "description": "The access token, for sockets. Any client can do this, but logs show it."},
}
REFRESH = {"refresh_token": BEARER | {"description": "The refresh token of a login."}}
SECURITY: dict[Any, list[Json]] = {m.refresh: [{"refresh_token": []}, {}]}  # {}: in the body
SOCKETS_ONLY = (m.TooManyFrames, m.TooMuchTyping)
EVERY_CHAT_ONLY = ("chats", "chat", "chat_removed")
# Frames of the server that have a `ref`.
ANSWERS = ("ack", "auth", "error", "pong", "ready", "replay")

AT = datetime(2026, 11, 22, 20, 15, 37, 123456, UTC)
ID = UUID("01a204e6-62a3-7c4a-8d5e-1f2a3b4c5d6e")
POSITION = "41.k3J9xQabcde"
REQUEST = "9f86d081884c7d65"
ANN, BEN = m.Participant(1, "ann", "owner", 40), m.Participant(2, "ben", "member", 41)
MESSAGE = m.Message(
    ID, 7, 41, 41, 1, "Hello, Ben!", None, AT, position=POSITION,
    read_by=[m.Reader(2, "ben", AT)], read_count=1)
EXAMPLES: tuple[msgspec.Struct, ...] = (
    m.NewUser("ann@example.com", "ann", "correct horse"),
    m.Login("ann@example.com", "correct horse"), m.RefreshRequest("eyJhbGciOi…"),
    m.ChangedUser(username="anna"), m.NewChat(True, [2, 3], "Friends"), m.NewChat(False, [2]),
    m.ChangedChat("Old friends"), m.NewParticipant(2), m.GivenRole("admin"),
    m.NewMessage("Hello, Ben!", ID), m.ChangedMessage("Hello, Ben and Cy!"), m.ReadUpTo(ID),
    m.User(1, "ann", True, AT, "ann@example.com"), m.Tokens("eyJhbGciOi…", "eyJhbGciOi…", 1800),
    m.Session(3, AT, AT, "curl/8.5", True, AT), BEN, m.Reader(2, "ben", AT), MESSAGE,
    m.Chat(7, "Friends", True, AT, [ANN, BEN], 2, MESSAGE, 41, POSITION, 1, 0),
    m.Read(7, ID, 41, 2, AT),
    m.Health("ready"), endpoints.FieldError("$.text", "is missing"),
    m.ChatNotFound().details(REQUEST), m.MessageIn("Hello, Ben!", ID, ref="first"), m.ReadIn(ID),
    m.TypingIn(), m.SyncIn(POSITION), m.SyncIn(chats={7: POSITION, 8: 12}),
    m.AuthIn("eyJhbGciOi…"), m.PingIn("alive?"), m.Ack(ID, 7, 41, AT), m.Taken(7), m.Pong(),
    m.Hello(1, 3, AT, AT, 25, m.VERSION), m.ChatPositions({7: (POSITION, 2)}, False),
    m.ReplayStart(7, "12.Zq0pLm4tYw8"), m.Ready(7, 41, POSITION),
    m.ChatUpdate(7, 2, "Friends", [BEN], [3]), m.Typing(7, 2), m.ChatRemoved(7),
    m.Expiry(AT))
# By handler and status: an answer that differs from the example of its shape.
MEMBERS = [m.Participant(1, "ann", "member", 0), m.Participant(2, "ben", "member", 0)]
SHOWN: dict[tuple[Any, int], Any] = {
    (m.create_chat, 200): m.Chat(8, None, False, AT, MEMBERS, 2, None, 0, "0", 1, 0),
    (m.get_liveness, 200): {"status": "alive"}, (m.get_readiness, 503): {"status": "error"},
    (m.get_user, 200): {"id": 2, "username": "ben", "is_active": True, "created_at": AT},
    (m.get_openapi, 200): {"openapi": "3.1.0"}, (m.get_asyncapi, 200): {"asyncapi": "3.0.0"},
    (m.get_web_client, 200): "<!doctype html>…", (m.get_docs, 200): "<!doctype html>…"}


FIELD = re.compile(r"^(\w+): (.+(?:\n +.+)*)\n*", re.MULTILINE)


def filled(made: Json) -> Json:
    """Leave out what is empty."""
    return {name: value for name, value in made.items() if value not in ("", None, [], {})}


def read_docstring(documented: Any) -> tuple[str, dict[str, str]]:
    """Part a docstring: what it says of the whole, and by its lines `name: …` of each name."""
    text = inspect.cleandoc(documented.__doc__ or "")
    told = {name: " ".join(line.split()) for name, line in FIELD.findall(text)}
    return FIELD.sub("", text).strip(), told


def describe(schema: Json, told: str | None) -> None:
    """Say in a schema what it is; what its type says, or one of several types, gives way."""
    parts = [schema, *schema.get("anyOf", [])]
    found = [part.pop("description") for part in parts if "description" in part]
    if told or found:
        schema["description"] = told or found[0]


# ==== Schemas =====================================================================================


class Schemas(dict[str, Json]):
    """The schemas of the shapes that are used, by name."""

    def of(self, kind: Any) -> Json:
        """Answer the schema of a type; those of the shapes in it are kept, and referred to."""
        reference = "#/components/schemas/{name}"
        [schema], found = msgspec.json.schema_components([kind], ref_template=reference)
        for name, shape in found.items():
            self[name] = exact(getattr(m, name), shape)
        return schema

    def named(self, name: str, schema: Json) -> Json:
        """Keep a schema, and answer a reference to it."""
        self[name] = schema
        return {"$ref": f"#/components/schemas/{name}"}


def examples(shape: Any) -> list[Any]:
    """Answer the examples of a type as they go over the wire."""
    if typing.get_origin(shape) is list:
        return [[examples(one)[0]] for one in typing.get_args(shape)]
    found = [msgspec.to_builtins(each, str_keys=True) for each in EXAMPLES if type(each) is shape]
    return [filled(each) for each in found] if issubclass(shape, m.Body) else found


def exact(shape: type[msgspec.Struct], schema: Json) -> Json:
    """Say of a shape what msgspec does not: times are times, answers hold all their fields, and
    what each field is.
    """
    fields, is_answer = msgspec.structs.fields(shape), not issubclass(shape, m.Body)
    about, _ = read_docstring(shape)
    told = told_of_fields(shape)
    for field in fields:
        value = schema["properties"][field.encode_name]
        if datetime in (field.type, *typing.get_args(field.type)):
            value.get("anyOf", [value])[0]["format"] = "date-time"
        if is_answer or field.default is None:  # null in a body: as if it were not given
            value.pop("default", None)
        describe(value, told.get(field.name))
    if tag := shape.__struct_config__.tag_field:
        schema["properties"][tag] |= {"description": FRAME_TYPE}
    if is_answer:
        omits = shape.__struct_config__.omit_defaults
        schema["required"] = [
            field.encode_name for field in fields
            if field.required or not (omits or field.default is msgspec.UNSET)]
    return filled(schema | {"description": about, "examples": examples(shape)})


def told_of_fields(shape: type[msgspec.Struct]) -> dict[str, str]:
    """Tell by name what the docstrings of a shape, and of those that it is made from, say."""
    made_from = [each for each in reversed(shape.__mro__) if issubclass(each, msgspec.Struct)]
    told: dict[str, str] = {}
    for each in made_from[1:]:
        told |= read_docstring(each)[1]
    assert told.keys() <= {*shape.__struct_fields__}, f"{shape.__name__} has no such fields"
    return told


def query_schemas(query: type[msgspec.Struct]) -> Json:
    """Answer the schemas of the parameters of a query."""
    schema = msgspec.json.schema(query)["$defs"][query.__name__]
    return {name: {word: value for word, value in each.items() if value is not None}
            for name, each in schema["properties"].items()}


# ==== OpenAPI =====================================================================================


class Described:
    """What an endpoint's line, signature and docstring say."""

    def __init__(self, endpoint: endpoints.Endpoint) -> None:
        self.endpoint, self.handler = endpoint, endpoint.handler
        self.is_socket = endpoint.status == 101
        self.signature = endpoints.Signature.of(endpoint)
        self.hints = typing.get_type_hints(self.handler, include_extras=True)
        text, self.told = read_docstring(self.handler)
        raised = re.search(r"\s*Raises ([\w,\s]+)\.$", text)
        self.raised = [getattr(m, name) for name in re.findall(r"\w+", raised[1] if raised else "")]
        summary, _, rest = text[: raised.start() if raised else None].partition("\n")
        self.summary = summary.rstrip(".")
        self.description = re.sub(r"(?<!\n)\n(?!\n)", " ", rest.strip())

    def answers(self) -> dict[int, str]:
        """Tell by status when it does not refuse."""
        usual = SUCCESSES[self.endpoint.status].format(self.answered())
        found = {self.endpoint.status: usual}
        for sentence in re.split(r"(?<=\.)\s+", self.description):
            if status := re.search(r"\banswers (\d{3})\b", sentence):
                found[int(status[1])] = sentence
        return found

    def kind(self) -> Any:
        """Answer the type of what it answers."""
        kind: Any = self.hints["return"]
        return typing.get_args(kind)[0] if typing.get_origin(kind) is endpoints.Answer else kind

    def answered(self) -> str:
        """Name what it answers."""
        kind = self.kind()
        if typing.get_origin(kind) is list:
            return f"page of `{typing.get_args(kind)[0].__name__}`"
        return f"`{kind.__name__}`" if issubclass(kind, msgspec.Struct) else "file"

    def problems(self) -> dict[int, list[type[endpoints.Problem]]]:
        """Tell by status how it refuses: by its docstring, and by the pipeline before it."""
        found = {endpoints.ServiceUnavailable, *self.raised}
        found |= {m.PATH_PROBLEMS[name] for name in self.signature.path}
        if not self.endpoint.public:
            found.add(endpoints.Unauthorized)
        if self.is_socket or self.endpoint.method != "GET":
            found.add(m.ForeignOrigin)
        if not self.endpoint.public and not self.is_socket:
            found.add(endpoints.TooManyCalls)
        if self.signature.body is not None:
            found |= {
                endpoints.MalformedRequest, endpoints.RequestTimeout, endpoints.BodyTooLarge,
                endpoints.InvalidInput}
        if self.signature.query.__struct_fields__ or not self.endpoint.any_query:
            found.add(endpoints.InvalidInput)
        by_status: dict[int, list[type[endpoints.Problem]]] = {}
        for problem in endpoints.Problem.named.values():
            if problem in found and problem.status not in self.answers():
                by_status.setdefault(problem.status, []).append(problem)
        return by_status

    def parameters(self, schemas: Schemas) -> list[Json]:
        """Describe what it takes in its path and its query."""
        found = {name: schemas.of(self.hints[name]) for name in self.signature.path}
        found |= query_schemas(self.signature.query)
        assert self.told.keys() <= found.keys(), f"{self.handler.__name__} does not take them"
        for name, schema in found.items():
            describe(schema, self.told.get(name))
        return [
            {"name": name, "in": "path" if name in self.signature.path else "query",
             "description": schema.pop("description"), "required": name in self.signature.path,
             "schema": schema}
            for name, schema in found.items()]

    def content(self, status: int, schemas: Schemas) -> tuple[Json, list[str]]:
        """Describe what it answers with a status, and the headers beside those of the status."""
        kind = self.kind()
        if kind is type(None) or self.is_socket:
            return {}, []
        shown = msgspec.to_builtins(SHOWN.get((self.handler, status)))
        if inspect.isclass(kind) and issubclass(kind, web.StreamResponse):  # a file as it is
            is_json = self.endpoint.path.endswith(".json")
            content_type, json_type = (
                ("application/json", "object") if is_json else ("text/html", "string"))
            return {content_type: {"schema": {"type": json_type}, "example": shown}}, []
        headers = ["Link"] if typing.get_origin(kind) is list else []
        example = shown or examples(kind)[0]
        return {"application/json": {"schema": schemas.of(kind), "example": example}}, headers


def response(status: int, description: str, content: Json, headers: Iterable[str] = ()) -> Json:
    """Describe an answer."""
    always = [name for name, (statuses, _) in HEADERS.items() if status in statuses]
    shown = {name: {"$ref": f"#/components/headers/{name}"} for name in [*always, *headers]}
    return filled({"description": description, "headers": shown, "content": content})


def problem_schema(kind: type[endpoints.Problem], example: Json) -> Json:
    """Describe one type of problem."""
    own = {
        "type": {"type": "string", "enum": [kind.slug], "description": f"{kind.title}."},
        # An enum, not a const: so generators of clients keep that it is an integer.
        "status": {"type": "integer", "enum": [kind.status], "description": "The HTTP status."}}
    of_all = {"$ref": "#/components/schemas/ProblemDetails"}
    return {"allOf": [of_all, {"properties": own, "required": [*own]}], "examples": [example]}


def refusal(status: int, kinds: Iterable[type[endpoints.Problem]]) -> tuple[str, Json]:
    """Describe the answer of the problems of one status, and give it a name."""
    schemas = [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in kinds]
    slugs = [kind.slug for kind in kinds]
    content = {"application/problem+json": {
        "schema": {"oneOf": schemas} if schemas[1:] else schemas[0],
        "examples": {slug: {"$ref": f"#/components/examples/{slug}"} for slug in slugs}}}
    name = "Or".join(kind.__name__ for kind in kinds)
    titles = "; ".join(kind.title for kind in kinds)
    told = f"One of these: {titles}." if schemas[1:] else f"{titles}."
    return name, response(status, told, content)


def operation(of: Described, schemas: Schemas, refusals: Json) -> Json:
    """Describe an endpoint."""
    responses = {status: response(status, when, *of.content(status, schemas))
                 for status, when in of.answers().items()}
    for status, kinds in of.problems().items():
        name, refusals[name] = refusal(status, kinds)
        responses[status] = {"$ref": f"#/components/responses/{name}"}
    tags = [tag for start, (tag, _) in TAGS.items() if re.match(start, of.endpoint.path)]
    made = filled({
        "operationId": of.handler.__name__,
        "summary": of.summary,
        "description": of.description,
        "tags": tags[:1],
        "parameters": of.parameters(schemas),
    })
    if of.signature.body is not None:
        hint = of.hints["body"]
        [shape, *_] = typing.get_args(hint) or [hint]
        shown = {str(number): {"value": each} for number, each in enumerate(examples(shape), 1)}
        made["requestBody"] = {
            "required": of.signature.body_required,
            "content": {"application/json": {"schema": schemas.of(hint), "examples": shown}}}
    made["responses"] = {str(status): responses[status] for status in sorted(responses)}
    if of.is_socket:
        made["security"] = [{name: []} for name in ACCESS]
    elif of.endpoint.public:
        made["security"] = SECURITY.get(of.handler, [])
    return made


def problem_examples() -> dict[str, Json]:
    """Show each type of problem, by its name."""
    found = {}
    for slug in sorted(endpoints.Problem.named):
        problem = m.refused(slug) or endpoints.InternalError()
        if slug == endpoints.InvalidInput.slug:
            problem = endpoints.invalid("$.text", "is missing")
        found[slug] = msgspec.to_builtins(problem.details(REQUEST))
    return found


def openapi() -> Json:
    """Describe the endpoints (OpenAPI 3.1)."""
    schemas, paths, shown = Schemas(), dict[str, Json](), problem_examples()
    refusals = dict(refusal(kind.status, [kind]) for kind in GENERAL)
    schemas.of(endpoints.ProblemDetails)
    for endpoint in m.ENDPOINTS:
        made = operation(Described(endpoint), schemas, refusals)
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = made
    for slug, kind in endpoints.Problem.named.items():
        if kind not in SOCKETS_ONLY:
            schemas[kind.__name__] = problem_schema(kind, shown[slug])
    general = "".join(f"\n- {kind.status} `{kind.slug}`: {kind.title}." for kind in GENERAL)
    return {
        "openapi": "3.1.0",
        "info": {"title": "messenger", "version": m.VERSION, "description": ABOUT + general,
                 "license": {"name": "MIT", "identifier": "MIT"}},
        "servers": [{"url": "/"}],
        "security": [{"access_token": []}],
        "tags": [{"name": name, "description": what} for name, what in TAGS.values()],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "responses": dict(sorted(refusals.items())),
            "examples": {slug: {"value": each} for slug, each in shown.items()},
            "headers": {
                name: {"description": what, "required": always != (), "schema": {"type": "string"}}
                for name, (always, what) in HEADERS.items()},
            "securitySchemes": ACCESS | REFRESH,
        },
    }


# ==== AsyncAPI ====================================================================================


# What the name of an example says of the sockets that it is for.
SOCKETS = {"both": "On both kinds of socket.", "one": "On `/ws/{chat_id}`.", "every": "On `/ws`."}


def shown_on(socket: str, payload: Json) -> Json:
    """Make the example of a frame on one kind of socket, or on both."""
    return {"name": socket, "summary": SOCKETS[socket], "payload": payload}


def client_examples(shape: type[msgspec.Struct]) -> list[Json]:
    """Show a frame of a client; where it names its chat, on each kind of socket."""
    found = []
    for each in examples(shape):
        frame = {"type": shape.__struct_config__.tag} | each
        if not issubclass(shape, m.FrameIn):
            found.append(shown_on("both", frame))
        elif "chats" in each:
            found.append(shown_on("every", frame))
        else:
            found.append(shown_on("one", frame))
            found.append(shown_on("every", {"type": frame["type"], "chat_id": 7} | each))
    return found


def client_messages(schemas: Schemas) -> Json:
    """Describe the frames that clients send."""
    return {
        f"client_{tag}": {
            "name": tag, "title": f"{tag}, from the client",
            "summary": read_docstring(shape)[0],
            "payload": schemas.of(shape), "examples": client_examples(shape)}
        for shape in typing.get_args(m.ClientFrame) for tag in [shape.__struct_config__.tag]}


def server_examples(frame: type[m.ServerFrame]) -> list[Json]:
    """Show a frame of the server, on each kind of socket where they differ."""
    name, data = frame.__struct_config__.tag, frame.__annotations__["data"]
    shown = [{"type": name, "data": examples(kind)[0]} for kind in typing.get_args(data) or (data,)]
    if name in ANSWERS:
        shown = [each | {"ref": "first"} for each in shown]
    if "chat_id" in frame.__annotations__:
        return [shown_on("one", shown[0]), shown_on("every", shown[0] | {"chat_id": 7})]
    return [shown_on("every" if name in EVERY_CHAT_ONLY else "both", each) for each in shown]


def server_messages(schemas: Schemas) -> Json:
    """Describe the frames that the server sends."""
    found = {}
    for frame in typing.get_args(m.ServerFrames):
        name, data = frame.__struct_config__.tag, frame.__annotations__["data"]
        (about, _), told = read_docstring(frame), told_of_fields(frame)
        described = [schemas.of(kind) for kind in typing.get_args(data) or (data,)]
        properties = {
            "type": {"type": "string", "enum": [name], "description": FRAME_TYPE},
            "data": {"anyOf": described} if described[1:] else described[0]}
        if name in ANSWERS:
            properties["ref"] = schemas.of(m.Ref)
        if "chat_id" in frame.__annotations__:
            properties["chat_id"] = {"type": "integer"}
        for field in properties.keys() - {"type"}:
            describe(properties[field], told[field])
        required = ["type", "data", "ref"] if name == "ack" else ["type", "data"]
        shown = server_examples(frame)
        payload = {
            "title": frame.__name__, "description": about, "type": "object",
            "properties": properties, "required": required,
            "examples": [each["payload"] for each in shown]}
        found[f"server_{name}"] = {
            "name": name, "title": f"{name}, from the server", "summary": about,
            "payload": schemas.named(frame.__name__, payload), "examples": shown}
    return found


def channel(of: Described, messages: Iterable[str], schemas: Schemas) -> Json:
    """Describe the address of a socket."""
    parameters = of.parameters(schemas)
    query = {one["name"]: one["schema"] | {"description": one["description"]}
             for one in parameters if one["in"] == "query"}
    token = {"type": "string", "description": ACCESS["query_token"]["description"]}
    return filled({
        "address": of.endpoint.path,
        "summary": of.summary,
        "description": of.description,
        "servers": [{"$ref": "#/servers/local"}],
        "parameters": {one["name"]: {"description": one["description"]}
                       for one in parameters if one["in"] == "path"},
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
        "bindings": {"ws": {
            "method": "GET", "query": {"type": "object", "properties": query | {"token": token}},
            "bindingVersion": "0.1.0"}},
    })


def asyncapi() -> Json:
    """Describe the frames of the sockets (AsyncAPI 3.0)."""
    schemas, channels, operations = Schemas(), {}, {}
    received, sent = client_messages(schemas), server_messages(schemas)
    for of in filter(lambda of: of.is_socket, map(Described, m.ENDPOINTS)):
        name = of.handler.__name__
        heard = [each for each, message in sent.items()
                 if not of.signature.path or message["name"] not in EVERY_CHAT_ONLY]
        channels[name] = channel(of, [*received, *heard], schemas)
        for action, messages in {"receive": [*received], "send": heard}.items():
            operations[f"{name}_{action}s"] = {
                "action": action, "channel": {"$ref": f"#/channels/{name}"},
                "messages": [{"$ref": f"#/channels/{name}/messages/{each}"} for each in messages]}
    access = {name: one | ({"type": "httpApiKey"} if one["type"] == "apiKey" else {})
              for name, one in ACCESS.items()}
    codes = "".join(f"\n- {code}: {meaning}" for code, meaning in m.CLOSE_CODES.items())
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "messenger", "version": m.VERSION, "description": ABOUT_SOCKETS + codes,
                 "license": {"name": "MIT"}},
        "defaultContentType": "application/json",
        "servers": {"local": {
            "host": "localhost:8080", "protocol": "ws", "description": "Where `./run` listens.",
            "security": [{"$ref": f"#/components/securitySchemes/{name}"} for name in access]}},
        "channels": channels,
        "operations": operations,
        "components": {"schemas": dict(sorted(schemas.items())), "messages": received | sent,
                       "securitySchemes": access},
    }


def main(arguments: list[str]) -> int:
    """Write the documents, or with `--check` tell which are stale; answer the exit status."""
    made = {ROOT / "web/openapi.json": openapi(), ROOT / "web/asyncapi.json": asyncapi()}
    stale = []
    for path, document in made.items():
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        if arguments != ["--check"]:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
        elif not path.exists() or path.read_text("utf-8") != text:
            stale.append(path.name)
    if stale:
        print(f"stale in web/: {', '.join(stale)} (./run documents makes them)", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
