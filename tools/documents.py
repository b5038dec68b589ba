#!/usr/bin/env python3
"""Makes web/openapi.json and web/asyncapi.json from what messenger.py declares.

Started as it is, this writes both; with `--check` it writes nothing, and fails where one is stale.

Addresses come from the table of endpoints; parameters, bodies and answers from the signatures of
the handlers; words from their docstrings: the first line is the summary, the last names the
problems, and a sentence with "answers 200" tells of a status beside the usual one. Schemas come
from the shapes. What messenger.py declares nowhere stands in the tables below.
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

Bodies and answers are JSON in UTF-8, times are RFC 3339 in UTC, lists are pages whose `Link` header
leads to their neighbours. A refusal is a problem (RFC 9457): `type` is stable, `detail` and the
`msg` of `errors` are for people. Every answer has an `X-Request-Id`; a problem and the server's log
tell it, too. Any address may also answer:
"""
ABOUT_SOCKETS = """\
What goes over `/ws/{chat_id}` (one chat) and `/ws` (every chat of the user). Frames are JSON text.

The access token comes as `Authorization: Bearer …`, as the pair of subprotocols
`messenger.v1, <token>` (browsers), or as `?token=`. A refused handshake is an HTTP answer.

On `/ws` each frame of the client but `auth`, `ping`, and `sync` of several `chats`, has a
`chat_id`. A `ref`, any string or number, comes back in the frame that answers.

Both `message` and `message_updated` mean: store this message by its id; the larger `rev` wins.
A client that comes back with the `rev` of its last frame, by `?after=` or by `sync`, gets every
change since, in order, then `ready`, then what is new.

The server closes with one of these codes:
"""
TAGS = {  # by the start of a path: the first that fits
    "/api/v1/chats/[^/]+/(messages|changes|read)": ("messages", "Post, edit, read and search."),
    "/api/v1/chats": ("chats", "Personal and group chats, and who is in them."),
    "/api/v1/users": ("users", "Accounts and sessions."),
    "/ws": ("sockets", "Live delivery; asyncapi.json describes the frames."),
    "/api/v1/health": ("health", "Is the server up."),
    "/": ("pages", "The web client and the documents."),
}
GENERAL = (
    endpoints.NotFound, endpoints.MethodNotAllowed, endpoints.ExpectationFailed,
    endpoints.InternalError)
SUCCESSES = {
    101: "The socket is open.", 200: "What was asked for.", 201: "What was created.", 204: "Done."}
# By name: the statuses that always have it, what it says.
HEADERS: dict[str, tuple[Container[int], str]] = {
    "Allow": ((405,), "The methods that are allowed here."),
    "Link": ((), "Pages beside this one, ready to follow (RFC 8288); absent where there is none."),
    "Location": ((201,), "Where the new one is."),
    "Retry-After": ((429, 503), "Seconds after which to try again."),
    "Sec-WebSocket-Version": ((426,), "The version of websockets to upgrade to."),
    "Upgrade": ((426,), "What to upgrade to."),
    "WWW-Authenticate": ((401,), "How to sign in."),
    "X-Request-Id": (
        range(600), "The request's own if it is 1 to 64 of `A-Za-z0-9._-`, else one made here."),
}
BEARER = {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
ACCESS = {
    "access_token": BEARER | {"description": "The access token of a login."},
    "subprotocol": {
        "type": "apiKey", "in": "header", "name": "Sec-WebSocket-Protocol",
        "description": f"`{m.SUBPROTOCOL}, <access token>`: for sockets of browsers."},
    "query_token": {
        "type": "apiKey", "in": "query", "name": "token",
        "description": "The access token, for sockets. It works everywhere, but gets logged."},
}
REFRESH = {"refresh_token": BEARER | {"description": "The refresh token of a login."}}
SECURITY: dict[Any, list[Json]] = {m.refresh: [{"refresh_token": []}, {}]}  # {}: in the body
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
    m.ChangedUser(username="anna"), m.NewChat(True, [2, 3], "Friends"),
    m.ChangedChat("Old friends"), m.NewParticipant(2), m.GivenRole("admin"),
    m.NewMessage("Hello, Ben!", ID), m.ChangedMessage("Hello, Ben and Cy!"), m.ReadUpTo(ID),
    m.User(1, "ann", True, AT, "ann@example.com"), m.Tokens("eyJhbGciOi…", "eyJhbGciOi…", 1800),
    m.Session(3, AT, AT, "curl/8.5", True, AT), BEN, m.Reader(2, "ben", AT), MESSAGE,
    m.Chat(7, "Friends", True, AT, [ANN, BEN], 2, MESSAGE, 41, POSITION, 1, 0),
    m.Read(7, ID, 41, 2, AT),
    m.Health("ready"), endpoints.FieldError("$.text", "is missing"),
    m.ChatNotFound().details(REQUEST), m.MessageIn("Hello, Ben!", ID, ref="first"), m.ReadIn(ID),
    m.TypingIn(chat_id=7), m.SyncIn(POSITION), m.SyncIn(chats={7: POSITION, 8: 12}),
    m.AuthIn("eyJhbGciOi…"), m.PingIn("alive?"), m.Ack(ID, 7, 41, AT), m.Taken(7), m.Pong(),
    m.Hello(1, 3, AT, AT, 25, m.VERSION), m.ChatPositions({7: (POSITION, 2)}, False),
    m.ReplayStart(7, "12.Zq0pLm4tYw8"), m.Ready(7, 41, POSITION),
    m.ChatUpdate(7, 2, "Friends", [BEN], [3]), m.Typing(7, 2), m.ChatRemoved(7),
    m.Expiry(AT))


def filled(made: Json) -> Json:
    """Leave out what is empty."""
    return {name: value for name, value in made.items() if value not in ("", None, [], {})}


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


def examples(shape: type[msgspec.Struct]) -> list[Json]:
    """Answer the examples of a shape as they go over the wire."""
    found = [msgspec.to_builtins(each, str_keys=True) for each in EXAMPLES if type(each) is shape]
    return [filled(each) for each in found] if issubclass(shape, m.Body) else found


def exact(shape: type[msgspec.Struct], schema: Json) -> Json:
    """Say of a shape what msgspec does not: times are times, and answers hold all their fields."""
    fields, is_answer = msgspec.structs.fields(shape), not issubclass(shape, m.Body)
    for field in fields:
        value = schema["properties"][field.encode_name]
        if datetime in (field.type, *typing.get_args(field.type)):
            value.get("anyOf", [value])[0]["format"] = "date-time"
        if is_answer or field.default is None:  # null in a body: as if it were not given
            value.pop("default", None)
    if is_answer:
        omits = shape.__struct_config__.omit_defaults
        schema["required"] = [
            field.encode_name for field in fields
            if field.required or not (omits or field.default is msgspec.UNSET)]
    return filled(schema | {"examples": examples(shape)})


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
        text = inspect.getdoc(self.handler) or ""
        raised = re.search(r"\s*Raises ([\w,\s]+)\.$", text)
        self.raised = [getattr(m, name) for name in re.findall(r"\w+", raised[1] if raised else "")]
        summary, _, rest = text[: raised.start() if raised else None].partition("\n")
        self.summary = summary.rstrip(".")
        self.description = re.sub(r"(?<!\n)\n(?!\n)", " ", rest.strip())

    def answers(self) -> dict[int, str]:
        """Tell by status when it does not refuse."""
        found = {self.endpoint.status: SUCCESSES[self.endpoint.status]}
        for sentence in re.split(r"(?<=\.)\s+", self.description):
            if status := re.search(r"\banswers (\d{3})\b", sentence):
                found[int(status[1])] = sentence
        return found

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

    def content(self, schemas: Schemas) -> tuple[Json, list[str]]:
        """Describe what it answers, and the headers beside those of its status."""
        kind: Any = self.hints["return"]
        [kind] = typing.get_args(kind) if typing.get_origin(kind) is endpoints.Answer else [kind]
        if kind is type(None) or self.is_socket:
            return {}, []
        if inspect.isclass(kind) and issubclass(kind, web.StreamResponse):  # a file as it is
            is_json = self.endpoint.path.endswith(".json")
            content_type, json_type = (
                ("application/json", "object") if is_json else ("text/html", "string"))
            return {content_type: {"schema": {"type": json_type}}}, []
        headers = ["Link"] if typing.get_origin(kind) is list else []
        return {"application/json": {"schema": schemas.of(kind)}}, headers


def response(status: int, description: str, content: Json, headers: Iterable[str] = ()) -> Json:
    """Describe an answer."""
    always = [name for name, (statuses, _) in HEADERS.items() if status in statuses]
    shown = {name: {"$ref": f"#/components/headers/{name}"} for name in [*always, *headers]}
    return filled({"description": description, "headers": shown, "content": content})


def refusal(status: int, kinds: Iterable[type[endpoints.Problem]]) -> tuple[str, Json]:
    """Describe the answer of the problems of one status, and give it a name."""
    slugs = [kind.slug for kind in kinds]
    named = {"properties": {"type": {"enum": slugs}, "status": {"const": status}}}
    content = {"application/problem+json": {
        "schema": {"allOf": [{"$ref": "#/components/schemas/ProblemDetails"}, named]},
        "examples": {slug: {"$ref": f"#/components/examples/{slug}"} for slug in slugs}}}
    name = "Or".join(kind.__name__ for kind in kinds)
    return name, response(status, " ".join(f"{kind.title}." for kind in kinds), content)


def operation(of: Described, schemas: Schemas, refusals: Json) -> Json:
    """Describe an endpoint."""
    content, headers = of.content(schemas)
    responses = {status: response(status, when, content, headers)
                 for status, when in of.answers().items()}
    for status, kinds in of.problems().items():
        name, refusals[name] = refusal(status, kinds)
        responses[status] = {"$ref": f"#/components/responses/{name}"}
    parameters = {name: schemas.of(of.hints[name]) for name in of.signature.path}
    parameters |= query_schemas(of.signature.query)
    tags = [tag for start, (tag, _) in TAGS.items() if re.match(start, of.endpoint.path)]
    made = filled({
        "operationId": of.handler.__name__,
        "summary": of.summary,
        "description": of.description,
        "tags": tags[:1],
        "parameters": [
            {"name": name, "in": "path" if name in of.signature.path else "query",
             "description": schema.pop("description", ""),
             "required": name in of.signature.path, "schema": schema}
            for name, schema in parameters.items()],
    })
    if of.signature.body is not None:
        body = {"schema": schemas.of(of.hints["body"])}
        made["requestBody"] = {
            "required": of.signature.body_required, "content": {"application/json": body}}
    made["responses"] = {str(status): responses[status] for status in sorted(responses)}
    if of.is_socket:
        made["security"] = [{name: []} for name in ACCESS]
    elif of.endpoint.public:
        made["security"] = SECURITY.get(of.handler, [])
    return made


def openapi() -> Json:
    """Describe the endpoints (OpenAPI 3.1)."""
    schemas, paths = Schemas(), dict[str, Json]()
    refusals = dict(refusal(kind.status, [kind]) for kind in GENERAL)
    schemas.of(endpoints.ProblemDetails)
    for endpoint in m.ENDPOINTS:
        made = operation(Described(endpoint), schemas, refusals)
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = made
    general = "".join(f"\n- {kind.status} `{kind.slug}`: {kind.title}." for kind in GENERAL)
    kinds = sorted(endpoints.Problem.named)
    problems = {slug: m.refused(slug) or endpoints.InternalError() for slug in kinds}
    problems["invalid-input"] = endpoints.invalid("$.text", "is missing")
    shown = {slug: problem.details(REQUEST) for slug, problem in problems.items()}
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
            "examples": {
                slug: {"value": msgspec.to_builtins(each)} for slug, each in shown.items()},
            "headers": {
                name: {"description": what, "required": always != (), "schema": {"type": "string"}}
                for name, (always, what) in HEADERS.items()},
            "securitySchemes": ACCESS | REFRESH,
        },
    }


# ==== AsyncAPI ====================================================================================


def client_messages(schemas: Schemas) -> Json:
    """Describe the frames that clients send."""
    return {
        f"client_{tag}": {
            "name": tag, "title": f"{tag}, from the client", "summary": inspect.getdoc(shape),
            "payload": schemas.of(shape),
            "examples": [{"payload": {"type": tag} | each} for each in examples(shape)]}
        for shape in typing.get_args(m.ClientFrame) for tag in [shape.__struct_config__.tag]}


def server_messages(schemas: Schemas) -> Json:
    """Describe the frames that the server sends."""
    found = {}
    for frame in typing.get_args(m.ServerFrames):
        name, data = frame.__struct_config__.tag, frame.__annotations__["data"]
        kinds = typing.get_args(data) or (data,)
        described = [schemas.of(kind) for kind in kinds]
        properties = {
            "type": {"const": name},
            "data": {"anyOf": described} if described[1:] else described[0]}
        shown = [{"type": name, "data": each} for kind in kinds for each in examples(kind)[:1]]
        if name in ANSWERS:
            properties["ref"] = schemas.of(m.Ref) | {"description": "As in the client's frame."}
            shown = [each | {"ref": "first"} for each in shown]
        if "chat_id" in frame.__annotations__:
            properties["chat_id"] = {"type": "integer", "description": "As in the client's frame."}
        required = ["type", "data", "ref"] if name == "ack" else ["type", "data"]
        found[f"server_{name}"] = {
            "name": name, "title": f"{name}, from the server", "summary": inspect.getdoc(frame),
            "payload": {"type": "object", "properties": properties, "required": required},
            "examples": [{"payload": each} for each in shown]}
    return found


def channel(of: Described, messages: Iterable[str], schemas: Schemas) -> Json:
    """Describe the address of a socket."""
    token = {"type": "string", "description": ACCESS["query_token"]["description"]}
    query = query_schemas(of.signature.query) | {"token": token}
    return filled({
        "address": of.endpoint.path,
        "summary": of.summary,
        "description": of.description,
        "servers": [{"$ref": "#/servers/local"}],
        "parameters": {name: {"description": schemas.of(of.hints[name])["description"]}
                       for name in of.signature.path},
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
        "bindings": {"ws": {"method": "GET", "query": {"type": "object", "properties": query},
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
