"""Hears what clients and server say to each other, and compares it with the two documents."""

import copy
import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import aiohttp
from jsonschema import Draft202012Validator

from support.servers import ROOT

Json = dict[str, Any]
BODY_SHOWN = 300  # characters of what does not fit


class Document:
    """One of the documents, and the schemas in it."""

    def __init__(self, content: Json) -> None:
        self.content = content
        self._validators: dict[str, Draft202012Validator] = {}

    @classmethod
    def read(cls, name: str) -> "Document":
        """Read a document of the web folder."""
        return cls(json.loads((ROOT / "web" / name).read_text("utf-8")))

    def copy(self) -> "Document":
        """Answer one that may be spoilt."""
        return Document(copy.deepcopy(self.content))

    def at(self, pointer: str) -> Any:
        """Answer what a pointer (`#/a/b`) leads to, through references. Raises KeyError."""
        found: Any = self.content
        for step in pointer.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            found = found[int(step)] if isinstance(found, list) else found[step]
            while isinstance(found, dict) and "$ref" in found:
                found = self.at(found["$ref"])
        return found

    def faults(self, pointer: str, value: Any) -> list[str]:
        """Tell what of a value does not fit the schema at a pointer."""
        if pointer not in self._validators:
            self._validators[pointer] = Draft202012Validator(
                {**self.content, "$ref": pointer},
                format_checker=Draft202012Validator.FORMAT_CHECKER,
            )
        errors = self._validators[pointer].iter_errors(value)
        return [f"{error.json_path}: {error.message[:BODY_SHOWN]}" for error in errors]


def pointer(*steps: Any) -> str:
    """Make a pointer of its steps."""
    return "/".join(["#", *(str(step).replace("~", "~0").replace("/", "~1") for step in steps)])


class Recorder:
    """Collects what was exercised, and what of it does not fit."""

    def __init__(self, openapi: Document, asyncapi: Document) -> None:
        self.openapi = openapi
        self.asyncapi = asyncapi
        self.faults: list[str] = []
        self.answers: set[tuple[str, int, str]] = set()  # operationId, status, type of a problem
        self.headers: set[tuple[str, int, str]] = set()  # operationId, status, name
        self.frames: set[tuple[str, str]] = set()  # operation, message

    # ---- Requests and answers
    async def answer(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """Pass a request on and hear its answer: a middleware of aiohttp's client."""
        sent = await request.body.as_bytes() if request.body else b""
        answer = await handler(request)
        body = b"" if answer.status == 101 else await answer.read()
        name = f"{answer.method} {answer.url.raw_path_qs} -> {answer.status}"
        found = self.hear_answer(
            answer.method, answer.url.raw_path, sent, answer.status, answer.headers, body)
        self.faults += [f"{name}: {fault}" for fault in found]
        return answer

    def hear_answer(
        self, method: str, path: str, sent: bytes, status: int, headers: Any, body: bytes
    ) -> Iterator[str]:
        """Compare an answer, and the body that it is for, with what is described."""
        where = self.operation_at(method, path)
        if where is None:
            here = self.general(method, path)
            name = "general"
        else:
            here = pointer(*where, "responses", status)
            name = self.openapi.at(pointer(*where))["operationId"]
            if status < 300 and sent:
                at = pointer(*where, "requestBody", "content", "application/json", "schema")
                yield from self.openapi.faults(at, json.loads(sent))
        try:
            described = self.openapi.at(here)
        except KeyError:
            yield f"is not described: {body[:BODY_SHOWN]!r}"
            return
        yield from self.hear_headers(name, status, described.get("headers", {}), headers)
        content, kind = described.get("content", {}), ""
        content_type = headers.get("Content-Type", "").split(";")[0]
        if body and content_type not in content:
            yield f"has undescribed content, {content_type}: {body[:BODY_SHOWN]!r}"
        elif content and not body:
            yield "has no content"
        elif "json" in content_type and content:
            value = json.loads(body)
            yield from self.openapi.faults(self.at_schema(here, content_type), value)
            yield from [] if body.endswith(b"\n") else ["does not end with a newline"]
            kind = value["type"] if content_type == "application/problem+json" else ""
        self.answers.add((name, status, kind))

    def operation_at(self, method: str, path: str) -> tuple[str, str, str] | None:
        """Find the operation of a request, as the steps of a pointer."""
        paths = self.openapi.content["paths"]
        fits = [path] if path in paths else [
            template for template in paths
            if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path)]
        for template in fits:
            if method.lower() in paths[template]:
                return "paths", template, method.lower()
        return None

    def general(self, method: str, path: str) -> str:
        """Point to how a request is answered that no operation is for."""
        methods = ("GET", "POST", "PUT", "PATCH", "DELETE")
        known = any(self.operation_at(other, path) for other in methods)
        return pointer("components", "responses", "MethodNotAllowed" if known else "NotFound")

    def at_schema(self, response: str, content_type: str) -> str:
        """Point to the schema of a response's content, past the reference to the response."""
        steps = response.split("/")
        parent = self.openapi.at("/".join(steps[:-1]))[steps[-1]]
        if "$ref" in parent:
            response = parent["$ref"]
        return f"{response}/{pointer('content', content_type, 'schema')[2:]}"

    def hear_headers(
        self, name: str, status: int, described: Json, headers: Any
    ) -> Iterator[str]:
        """Compare the headers that the document knows of."""
        for header, meaning in self.openapi.content["components"]["headers"].items():
            if header in headers:
                self.headers.add((name, status, header))
            if header in headers and header not in described and status != 101:
                yield f"has an undescribed header {header}"
            if header not in headers and header in described and meaning["required"]:
                yield f"lacks the header {header}"

    # ---- Frames
    @property
    def socket_class(self) -> type[aiohttp.ClientWebSocketResponse]:
        """A websocket whose frames are heard; what is sent as text by hand is not."""
        recorder = self

        class Socket(aiohttp.ClientWebSocketResponse):
            async def receive(self, timeout: float | None = None) -> aiohttp.WSMessage:
                message = await super().receive(timeout)
                if message.type is aiohttp.WSMsgType.TEXT:
                    path = self._response.url.path
                    recorder.faults += recorder.hear_frame(path, "send", message.json())
                return message

            async def send_json(self, data: Any, *args: Any, **options: Any) -> None:
                recorder.faults += recorder.hear_frame(self._response.url.path, "receive", data)
                await super().send_json(data, *args, **options)

        return Socket

    def hear_frame(self, path: str, action: str, frame: Json) -> list[str]:
        """Compare a frame that the server sends or receives: it is one of its socket's messages,
        and only one."""
        address = "/ws" if path == "/ws" else "/ws/{chat_id}"
        channels = self.asyncapi.content["channels"]
        [channel] = [name for name, one in channels.items() if one["address"] == address]
        fits, reasons = [], []
        for name in channels[channel]["messages"]:
            found = self.asyncapi.faults(pointer("components", "messages", name, "payload"), frame)
            fits += [] if found else [name]
            if name.endswith(f"_{frame.get('type')}"):
                reasons += [f"{name}: {fault}" for fault in found]
        for operation, one in self.asyncapi.content["operations"].items():
            ours = [ref["$ref"].rpartition("/")[2] for ref in one["messages"]]
            here = one["channel"]["$ref"] == pointer("channels", channel)
            if here and one["action"] == action and len(fits) == 1 and fits[0] in ours:
                self.frames.add((operation, fits[0]))
                return []
        return [f"{path} {action} {str(frame)[:BODY_SHOWN]} fits {fits}: {reasons}"]

    # ---- What was not heard
    def unheard(self) -> set[tuple[Any, ...]]:
        """Answer what is described and was not exercised: answers, their headers, frames."""
        expected: set[tuple[Any, ...]] = set()
        for path, methods in self.openapi.content["paths"].items():
            for method, operation in methods.items():
                for status in operation["responses"]:
                    here = self.openapi.at(pointer("paths", path, method, "responses", status))
                    name = operation["operationId"], int(status)
                    expected |= {(*name, header) for header in here.get("headers", ())}
                    expected |= {(*name, kind) for kind in kinds(here)}
        for operation, one in self.asyncapi.content["operations"].items():
            expected |= {(operation, ref["$ref"].rpartition("/")[2]) for ref in one["messages"]}
        return expected - self.answers - self.headers - self.frames


def kinds(response: Json) -> list[str]:
    """Answer the types of problem that a response may be; one that is no problem is ''."""
    problem = response.get("content", {}).get("application/problem+json")
    return list(problem["examples"]) if problem else [""]


@functools.cache
def documents() -> tuple[Document, Document]:
    """Read both documents, once."""
    return Document.read("openapi.json"), Document.read("asyncapi.json")
