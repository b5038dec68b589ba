"""From a handler's signature to validation to an answer, and the problems of HTTP itself.

A handler's signature is the contract of its endpoint: path parameters, `body`, and after the star
the query. What it returns is the answer; what it refuses is raised as a `Problem`, anywhere, and
rendered here in one place.
"""

import asyncio
import contextlib
import functools
import inspect
import logging
import math
import os
import re
import sys
import time
import types
import typing
import zlib
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, Self, TypeVar
from urllib.parse import urlencode
from uuid import UUID

import asyncpg
import msgspec
from aiohttp import web, web_urldispatcher
from msgspec import UNSET, Meta, Struct, UnsetType

from plumbing.database import ABSENT, Unavailable
from plumbing.deadline import RequestDeadline, WorkFor, deadline, uncounted
from plumbing.guard import (
    GIVE_BACK,
    SAFE_HEADERS,
    Busy,
    FairTurns,
    Slots,
    Tally,
    Turns,
    unless_gone,
)
from plumbing.process import REQUEST_ID_HEADER, Handler, called, drop_frames, request_id
from plumbing.settings import ServerSettings
from plumbing.text import COMPOSED_FROM_MAX, composed
from plumbing.validation import describe

INT8_MAX = 2**63 - 1
STARTS_AT_ONCE = 3  # calls that begin in one round of the loop, each of another address
BODY_SECONDS = 15
HEAVY_OF_ADDRESS_MAX = 32  # `heavy` calls at once, whose answers may be megabytes
UNREAD_OF_ADDRESS_MAX = 16 * 1024 * 1024  # bytes of their answers, with which no more are begun
LINGERING_OF_ADDRESS_MAX = 3  # `lingering` calls at once
SLOT_SECONDS = 15  # for which a call waits until its asker has fewer under way
BELIEVED_SECONDS = 0.5  # for which a call that waits is believed to be its asker's still
ZLIB_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
SWITCHING = 101  # the status of a websocket
PLACES = ("before", "after", "cursor")  # the parameters of a query that say where a page is
PROBLEM_JSON = "application/problem+json"
RETRY_SECONDS = 1  # after which to try again, where nothing better is known
ENCODER = msgspec.json.Encoder()
RAW = msgspec.json.Decoder(msgspec.Raw)  # reads any JSON, and makes nothing of it
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # what is no JSON raises

BELIEVED_UNTIL = web.RequestKey("believed_until", float)

ShapeT = TypeVar("ShapeT")
TakenT = TypeVar("TakenT")
log = logging.getLogger("messenger.endpoints")


# ---- Problems (RFC 9457)


class FieldError(Struct):
    """What is wrong with one field of a body or one parameter.

    loc: The field or the parameter, like `$.text`.
    msg: What is wrong with it, for people.
    """
    loc: str
    msg: str


class ProblemDetails(Struct, omit_defaults=True):
    """A refusal (RFC 9457).

    type: What went wrong, for programs: a name that stays the same in later versions.
    title: What went wrong, for people; it is the same for each problem of the type.
    status: The HTTP status, also over a socket.
    detail: What went wrong this time, for people.
    request_id: The `X-Request-Id` of the answer; over a socket, that of its handshake.
    errors: Which fields or parameters are wrong, and how.
    retry_after: With 429 and 503: how many seconds to wait before you try again.
    """
    type: str
    title: str
    status: int
    detail: str
    request_id: str
    errors: list[FieldError] = []
    retry_after: Annotated[int, Meta(ge=1)] | UnsetType = UNSET


class Problem(Exception):
    """A refusal that the client may read; a subclass is one line of status and title."""

    status: int
    title: str
    slug: str
    named: typing.ClassVar[dict[str, type["Problem"]]] = {}  # every kind by its slug
    of_constraint: typing.ClassVar[dict[str, type["Problem"]]] = {}  # whose violation it tells of

    def __init_subclass__(cls, status: int, title: str, constraint: str = "") -> None:
        cls.status, cls.title = status, title
        cls.slug = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()
        Problem.named[cls.slug] = cls
        if constraint:
            Problem.of_constraint[constraint] = cls

    def __init__(
        self,
        detail: str = "",
        errors: Sequence[FieldError] = (),
        retry_after: int = RETRY_SECONDS,
    ) -> None:
        super().__init__(detail)
        self.errors = list(errors)
        self.detail = detail or "; ".join(f"{e.loc} {e.msg}" for e in errors) or f"{self.title}."
        self.headers = dict(PROBLEM_HEADERS.get(self.status, {}))
        self.retry_after: int | UnsetType = UNSET
        if self.status in (429, 503):
            self.retry_after = retry_after
            self.headers["Retry-After"] = str(retry_after)

    @classmethod
    def until(cls, seconds: float) -> "Problem":
        """Make one that tells after how many seconds to come back."""
        wait = max(1, math.ceil(seconds))
        return cls(f"{cls.title}. Try again in {wait} s.", retry_after=wait)

    def details(self, request_id: str) -> ProblemDetails:
        """Describe the problem as clients see it, as the refusal of one request."""
        return ProblemDetails(
            self.slug, self.title, self.status, self.detail, request_id, self.errors,
            self.retry_after)

PROBLEM_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    426: {"Upgrade": "websocket", "Sec-WebSocket-Version": "13"}}


class MalformedRequest(Problem, status=400, title="The request cannot be read"): ...
class Unauthorized(Problem, status=401, title="Sign in: a valid access token is needed"): ...
class NotFound(Problem, status=404, title="There is nothing here"): ...
class MethodNotAllowed(Problem, status=405, title="This method is not allowed here"): ...
class RequestTimeout(Problem, status=408, title="The body took too long to arrive"): ...
class BodyTooLarge(Problem, status=413, title="The body is too large"): ...
class ExpectationFailed(Problem, status=417, title="Expect may only be 100-continue"): ...
class InvalidInput(Problem, status=422, title="Some of the input is not valid"): ...
class TooManyCalls(Problem, status=429, title="You have too many calls under way"): ...
class UpgradeRequired(Problem, status=426, title="Only websockets can connect here"): ...
class InternalError(Problem, status=500, title="Something went wrong on the server"): ...
class ServiceUnavailable(Problem, status=503, title="The server cannot answer right now"): ...


HTTP_PROBLEMS: Mapping[int, type[Problem]] = {
    404: NotFound, 405: MethodNotAllowed, 413: BodyTooLarge}  # for what aiohttp refuses by itself


def invalid(loc: str, msg: str) -> InvalidInput:
    """Say what is wrong with one field, named like `$.text`."""
    return InvalidInput(errors=[FieldError(loc, msg)])


def composed_text(loc: str, text: str, least: int, most: int) -> str:
    """Answer a text in NFC. Raises InvalidInput unless it has so many characters then."""
    is_short = len(text) <= most * COMPOSED_FROM_MAX  # first: to compose many marks takes long
    normal = composed(text) if is_short else text
    if len(normal) < least:
        raise invalid(loc, f"must have at least {least} characters")
    if len(normal) > most:
        raise invalid(loc, f"must have at most {most} characters")
    return normal


def decode_json(decoder: msgspec.json.Decoder[ShapeT], text: bytes | str) -> ShapeT:
    """Decode JSON into its declared shape.

    Raises MalformedRequest for what is no JSON, InvalidInput for JSON of another shape.
    """
    try:
        try:
            return decoder.decode(text)
        except msgspec.ValidationError as error:
            check_json(text)  # the shape was wrong before the end: is the rest JSON?
            raise invalid(*describe(error, decoder.type)) from None
    except UNREADABLE:
        raise MalformedRequest("What was sent is not JSON.") from None


def check_json(text: bytes | str) -> None:
    """Raise one of UNREADABLE where a text is no JSON."""
    if isinstance(text, bytes):
        text.decode()
    RAW.decode(text)


def peek(text: bytes | str, **kinds: Sequence[type]) -> dict[str, Any]:
    """Read fields of a JSON object as far as it can be read: None for one of another type. Nothing
    else in it is made into objects, of which there might be very many.
    """
    found: dict[str, Any] = {}
    with contextlib.suppress(*UNREADABLE):
        raw = peeking(*kinds).decode(text)
        for name in kinds:
            value: msgspec.Raw = getattr(raw, name)
            if bytes(memoryview(value)[:1]) not in (b"[", b"{"):
                found[name] = msgspec.json.decode(value)
    return {name: found[name] if type(found.get(name)) in kinds[name] else None for name in kinds}


@functools.cache
def peeking(*names: str) -> msgspec.json.Decoder[Any]:
    """Make the decoder of an object of which only some fields are looked at."""
    nothing = msgspec.Raw(b"null")
    fields = [(name, msgspec.Raw, nothing) for name in names]
    return msgspec.json.Decoder(msgspec.defstruct("Peeked", fields))


# ---- Endpoints and answers


def never(_arguments: Mapping[str, Any]) -> bool:
    """Answer False."""
    return False


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One line of the table: what a method on a path calls, and the status of success.

    A parameter of the query that its handler does not name is refused, unless it takes `any_query`.
    Of those that are `heavy` somebody has fewer under way at once. Whose arguments are `slow` takes
    long, and delays no others. What `joint` ones change is committed together. Those that are
    `lingering` also wait for other things than the database.
    """

    method: str
    path: str
    handler: Callable[..., Awaitable[Any]]
    status: int = 200
    public: bool = False
    any_query: bool = False
    heavy: bool = False
    slow: Callable[[Mapping[str, Any]], bool] = never
    joint: bool = False
    lingering: bool = False


@dataclass(frozen=True, slots=True)
class Answer(Generic[ShapeT]):
    """An answer that differs from its endpoint's usual one: another status, or headers."""

    value: ShapeT
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def created(value: ShapeT, location: str) -> Answer[ShapeT]:
    """Answer 201 with where the new thing is."""
    return Answer(value, 201, {"Location": location})


def page(request: web.Request, values: ShapeT, **links: dict[str, Any] | None) -> Answer[ShapeT]:
    """Answer a page with links to its neighbours (RFC 8288): for each the query that differs."""
    path = request.rel_url.raw_path
    kept = {name: each for name, each in request.query.items() if name not in PLACES}
    shown = [
        f'<{path}?{urlencode(kept | to)}>; rel="{name}"' for name, to in links.items() if to]
    return Answer(values, headers={"Link": ", ".join(shown)} if shown else {})


def beyond(
    rows: Sequence[Any], limit: int, place: Callable[[Any], dict[str, Any]]
) -> dict[str, Any] | None:
    """Tell where the next page begins, by the last row of this one; None unless more were read."""
    return place(rows[limit - 1]) if len(rows) > limit else None


def read_cursor(cursor: str, *most: int) -> tuple[int, ...]:
    """Read the numbers of a cursor, which dots part; where there is none, the most that each may
    be. Raises InvalidInput.
    """
    numbers = cursor.split(".") if cursor else [str(each) for each in most]
    if len(numbers) != len(most) or not all(
        re.fullmatch(f"[0-9]{{1,{len(str(limit))}}}", number) and int(number) <= limit
        for number, limit in zip(numbers, most, strict=True)
    ):
        raise invalid("$.cursor", "is not a cursor of this list")
    return tuple(map(int, numbers))


@dataclass(frozen=True, slots=True)
class Signature:
    """What a handler takes, read from its annotations."""

    path: dict[str, type]  # path parameter: its type, int or UUID
    query: type[Struct]
    body: msgspec.json.Decoder[Any] | None
    body_required: bool

    @classmethod
    def of(cls, endpoint: Endpoint) -> "Signature":
        """Read a handler's signature."""
        hints = typing.get_type_hints(endpoint.handler, include_extras=True)
        parameters = inspect.signature(endpoint.handler).parameters
        in_path = re.findall(r"\{(\w+)\}", endpoint.path)
        query = [
            (name, without_none(hints[name]), parameter.default)
            for name, parameter in parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        ]
        body = parameters.get("body")
        return cls(
            {name: hints[name].__origin__ for name in in_path},
            msgspec.defstruct(f"{endpoint.handler.__name__}_query", query),
            msgspec.json.Decoder(hints["body"]) if body else None,
            body is not None and body.default is body.empty,
        )


def without_none(hint: Any) -> Any:
    """Answer the type of a parameter where it is given: a query has no null."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint)[0] if is_union else hint


async def read_body(request: web.Request) -> bytes:
    """Read a body. Raises MalformedRequest, RequestTimeout, BodyTooLarge (also by aiohttp)."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            with uncounted():
                body = await request.read()
    except TimeoutError:
        raise RequestTimeout from None
    except (web.RequestPayloadError, ConnectionError, RuntimeError) as error:
        # Of a lost connection, or (RuntimeError) of one that was lost before; nobody hears it.
        drop_frames(error)  # the reader of the body holds it
        raise MalformedRequest("The body arrived incomplete.") from None
    encoding = request.headers.get("Content-Encoding", "").lower()
    return unfold(body, encoding, request.client_max_size) if body else body


def unfold(body: bytes, encoding: str, bytes_max: int) -> bytes:
    """Undo the Content-Encoding of a body: `gzip` or `deflate`; any other is let pass.

    Raises MalformedRequest, BodyTooLarge.
    """
    if encoding not in ZLIB_WINDOWS:
        return body
    unpacker = zlib.decompressobj(ZLIB_WINDOWS[encoding])
    try:
        unfolded = unpacker.decompress(body, bytes_max + 1)
    except zlib.error:
        unfolded = b""
    if len(unfolded) > bytes_max:
        raise BodyTooLarge
    if not unpacker.eof:
        raise MalformedRequest("The body does not match its Content-Encoding.")
    return unfolded


def read_path(kind: type, text: str, problem: type[Problem]) -> Any:
    """Read an id in a path; anything else does not exist."""
    if kind is UUID:
        if not re.fullmatch("[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}", text):
            raise problem
        return UUID(text)
    if not re.fullmatch("[1-9][0-9]{0,18}", text) or int(text) > INT8_MAX:
        raise problem
    return int(text)


def read_query(request: web.Request, shape: type[Struct], any_query: bool) -> dict[str, Any]:
    """Read the parameters of a query that a handler takes; with `any_query` there may be others.

    Raises InvalidInput.
    """
    given: dict[str, str] = {}
    for name, value in request.query.items():
        if name in given:
            raise invalid(f"$.{name}", "is given more than once")
        if name in shape.__struct_fields__:
            given[name] = value
        elif not any_query:
            raise invalid(f"$.{name}", "is not a parameter here")
    try:
        return msgspec.structs.asdict(msgspec.convert(given, shape, strict=False))
    except msgspec.ValidationError as error:
        raise invalid(*describe(error, shape)) from None


@dataclass(frozen=True, slots=True)
class CallSlots:
    """How many calls may be under way at once (0: any number); further ones wait.

    A call of a known user takes one of the user's slots, any other and a refused one takes one of
    its address. A `heavy` call also takes one of its address, since its answer may be large.

    Each call also needs turns, which addresses take: to begin (`starts`; None: it needs none), and
    to have its statements run, but for `joint` ones.
    """

    light: Slots  # of a user
    heavy: Slots  # of a user
    address: Slots
    heavy_of_address: Slots
    starts: Turns | None  # keys: addresses, here and below
    reading: Turns
    heavy_reading: Turns
    slow_reading: Turns
    writing: Turns
    slow_writing: Turns
    lingering: Turns
    address_of: Callable[[web.Request], str]
    unread: Tally  # bytes of heavy answers that are not taken yet, by address

    @classmethod
    def of(cls, settings: ServerSettings, address_of: Callable[[web.Request], str]) -> Self:
        """Make those of an application.

        Heavy calls on more than half of the database's connections, or on more than there are
        cores, would not read more; they would only delay the light ones. So would slow ones. An
        address has few of their turns, at first a single one: two large pages at a time would take
        all of a core. Of those of light calls it has a half, and of changes a third: a client that
        writes a proxy's header itself may count as two addresses (guard.client_address). Who
        lingers in a turn holds up nobody at another address.
        """
        light, heavy, of_address, heavy_of_address = [
            Slots(settings.bound(limit)) for limit in (
                settings.calls_per_user, settings.reads_per_user, settings.calls_per_address,
                HEAVY_OF_ADDRESS_MAX)]
        connections = settings.database_connections
        at_once = max(2, connections // 2)
        heavy_at_once = max(2, min(at_once, os.cpu_count() or 1))
        heavy_reading, slow_reading, slow_writing = [
            FairTurns(heavy_at_once, of_each=settings.bound(max(1, heavy_at_once // 5)))
            for _ in range(3)]
        reading = Turns(connections, of_each=settings.bound(max(1, connections // 2)))
        writing = Turns(2 * at_once, of_each=settings.bound(2 * at_once // 3))
        lingering = Turns(sys.maxsize, of_each=settings.bound(LINGERING_OF_ADDRESS_MAX))
        starts = Turns(STARTS_AT_ONCE, of_each=1) if settings.rate_limits == "on" else None
        return cls(
            light, heavy, of_address, heavy_of_address, starts, reading, heavy_reading,
            slow_reading, writing, slow_writing, lingering, address_of, Tally())

    async def let_begin(self, request: web.Request) -> None:
        """Let a call begin in a round of the loop in which few others do, none of its address:
        whatever came at the same time, addresses take turns.
        """
        if self.starts is not None:
            await unless_gone(request, self.starts.come, self.address_of(request))

    async def hold(self, request: web.Request, endpoint: Endpoint, asker: Hashable) -> None:
        """Hold the slots that a call of an endpoint takes. Raises TooManyCalls."""
        wanted = [(self.address if endpoint.public else self.light, asker)]
        if endpoint.heavy:
            wanted = [
                (self.heavy, asker), (self.heavy_of_address, self.address_of(request))]
        wait = functools.partial(unless_gone, request, wait_patiently)
        await hold_slots(request, wait, *wanted)

    def hold_answer(self, request: web.Request, size: int) -> None:
        """Count the bytes of a heavy answer until it was taken."""
        address, give_back = self.address_of(request), request[GIVE_BACK]

        def let_go() -> None:
            give_back()
            self.unread.drop(address, size)

        self.unread[address] += size
        request[GIVE_BACK] = let_go

    def check_unread(self, address: str) -> None:
        """Raises TooManyCalls where heavy answers that are not taken yet take too much."""
        if self.unread[address] > UNREAD_OF_ADDRESS_MAX:
            raise TooManyCalls


async def hold_slots(
    request: web.Request,
    wait: Callable[..., Awaitable[Callable[[], None]]],
    *wanted: tuple[Slots, Hashable],
) -> None:
    """Hold one of the slots of each key until the answer was taken. Raises TooManyCalls.

    `wait` is called like wait_patiently for a slot that cannot be had at once.
    """
    with contextlib.ExitStack() as held:
        for slots, key in wanted:
            held.callback(slots.take_now(key) or await wait(slots.take, key))
        request[GIVE_BACK] = held.pop_all().close


async def wait_patiently(take: Callable[[Hashable], Awaitable[TakenT]], key: Hashable) -> TakenT:
    """Wait until a slot or a turn of a key is taken, for as long as others may be slow to take
    their answers. Raises TooManyCalls.
    """
    try:
        async with asyncio.timeout(SLOT_SECONDS):
            with uncounted():
                return await take(key)
    except TimeoutError:
        raise TooManyCalls from None


async def wait_in_time(wait: Callable[[Any], Awaitable[Any]], argument: Any) -> None:
    """Await something within the time of the request. Raises Unavailable."""
    try:
        async with asyncio.timeout_at(deadline()):
            await wait(argument)
    except TimeoutError:
        raise Unavailable(ABSENT) from None


def asking_again(
    handler: Callable[..., Awaitable[Any]],
    authenticate: Callable[[web.Request], Awaitable[Hashable]],
) -> Callable[..., Awaitable[Any]]:
    """Let a handler refuse whom it may not work for any longer: the session may have ended while
    the call waited, for its body, a slot or a turn.
    """
    async def work(request: web.Request, **arguments: Any) -> Any:
        if time.monotonic() > request[BELIEVED_UNTIL]:
            await wait_in_time(authenticate, request)
        return await handler(request, **arguments)

    return work


def in_turns(
    endpoint: Endpoint, handler: Callable[..., Awaitable[Any]], slots: CallSlots
) -> Callable[..., Awaitable[Any]]:
    """Bound how many calls the handler of an endpoint works on at once; addresses take turns.

    What takes long may wait long. So where one such call finds the database away, those of its
    address that wait are refused with it: else each would find it out by itself, one after the
    other.
    """
    is_short = endpoint.method == "GET" and not endpoint.heavy
    usual = slots.reading if is_short else slots.writing
    if endpoint.heavy:
        usual = slots.heavy_reading
    elif endpoint.lingering:
        usual = slots.lingering
    slow = slots.slow_reading if endpoint.method == "GET" else slots.slow_writing
    wait = wait_in_time if is_short else wait_patiently

    async def work(request: web.Request, **arguments: Any) -> Any:
        address = slots.address_of(request)
        turns = slow if endpoint.slow(arguments) else usual
        if not turns.take_now(address):
            await unless_gone(request, wait, turns.take, address)
        try:
            if endpoint.heavy:
                slots.check_unread(address)
            return await handler(request, **arguments)
        except Unavailable as error:
            if not is_short and str(error) == ABSENT:  # else it is the call's own trouble
                turns.refuse(address, error)
            raise
        finally:
            turns.give_back(address)

    return work


def bind(
    endpoint: Endpoint,
    authenticate: Callable[[web.Request], Awaitable[Hashable]],
    path_problems: Mapping[str, type[Problem]],
    slots: CallSlots,
) -> Handler:
    """Make the aiohttp handler of an endpoint.

    `authenticate` is awaited first, unless the endpoint is public, and answers who asks: the call
    takes one of their slots, else one of its address, but for a websocket. After a long wait it is
    awaited again. A malformed id in a path is refused with the problem of its name. One deadline
    bounds all that is waited for.
    """
    signature = Signature.of(endpoint)
    work = endpoint.handler
    if not endpoint.public and endpoint.status != SWITCHING:
        work = asking_again(work, authenticate)
        work = work if endpoint.joint else in_turns(endpoint, work, slots)

    async def handle(request: web.Request) -> web.StreamResponse:
        with RequestDeadline(), WorkFor(slots.address_of(request)):
            request[BELIEVED_UNTIL] = time.monotonic() + BELIEVED_SECONDS
            asker: Hashable = (
                slots.address_of(request) if endpoint.public else await authenticate(request))
            arguments = {
                name: read_path(kind, request.match_info[name], path_problems[name])
                for name, kind in signature.path.items()
            }
            if request.rel_url.raw_query_string:
                arguments |= read_query(request, signature.query, endpoint.any_query)
            body = b"" if signature.body is None else await read_body(request)
            if endpoint.status != SWITCHING:
                await slots.hold(request, endpoint, asker)
            if signature.body is not None and (body or signature.body_required):
                arguments["body"] = decode_json(signature.body, body)
            answer = respond(endpoint, await work(request, **arguments))
            if endpoint.heavy:
                slots.hold_answer(request, answer.content_length or 0)
            return answer

    return handle


def route_path(path: str, paths: Iterable[str]) -> str:
    """Write a path for aiohttp's router; an id that it ends in is never a word of another path.

    So a method that `/users/me` does not have is not looked for at `/users/{user_id}`.
    """
    ends_in = re.fullmatch(r"(.*)\{(\w+)\}", path)
    if ends_in is None:
        return path
    start, name = ends_in.groups()
    rests = [other.removeprefix(start) for other in paths if other.startswith(start)]
    words = "|".join(re.escape(rest) for rest in rests if re.fullmatch(r"[\w-]+", rest))
    return f"{start}{{{name}:(?!(?:{words})$)[^{{}}/]+}}" if words else path


def add_routes(
    app: web.Application, endpoints: Sequence[Endpoint],
    authenticate: Callable[[web.Request], Awaitable[Hashable]],
    path_problems: Mapping[str, type[Problem]], slots: CallSlots,
) -> None:
    """Let an application answer at endpoints, each bound (`bind`); what answers GET, also HEAD."""
    paths = [endpoint.path for endpoint in endpoints]
    for endpoint in endpoints:
        name = endpoint.handler.__name__
        handler = bind(endpoint, authenticate, path_problems, slots)
        path = route_path(endpoint.path, paths)
        for method in ("GET", "HEAD") if endpoint.method == "GET" else (endpoint.method,):
            app.router.add_route(method, path, handler, name=name)


def respond(endpoint: Endpoint, answer: Any) -> web.StreamResponse:
    """Turn what a handler returned into a response."""
    if isinstance(answer, web.StreamResponse):
        return answer
    if not isinstance(answer, Answer):
        answer = Answer(answer)
    status = answer.status or endpoint.status
    if status == 204:
        return web.Response(status=status, headers=answer.headers)
    return json_answer(answer.value, status, answer.headers)


def problem_answer(problem: Problem, request: web.BaseRequest) -> web.Response:
    """Answer a request with a problem."""
    details = problem.details(request_id(request))
    return json_answer(details, problem.status, problem.headers, PROBLEM_JSON)


def json_answer(
    value: Any, status: int, headers: Mapping[str, str], kind: str = "application/json"
) -> web.Response:
    """Answer with JSON that ends with a newline."""
    return web.Response(
        body=ENCODER.encode(value) + b"\n", status=status, headers=headers, content_type=kind)


def as_problem(error: Exception) -> Problem | None:
    """Answer the problem that an exception stands for; None for one that nobody foresaw.

    One that was foreseen holds no frames any more: nobody asks where it was raised.
    """
    problem: Problem | None = None
    if isinstance(error, Problem):
        problem = error
    elif isinstance(error, Unavailable | Busy):
        problem = ServiceUnavailable(str(error))
    elif isinstance(error, asyncpg.UniqueViolationError):
        kind = Problem.of_constraint.get(str(error.constraint_name))
        problem = kind() if kind else None
    elif isinstance(error, web.HTTPException):  # aiohttp refused by itself
        problem = HTTP_PROBLEMS.get(error.status, MalformedRequest)()
        if "Allow" in error.headers:
            problem.headers["Allow"] = error.headers["Allow"]
    if problem is not None:
        drop_frames(error)
    return problem


def answer_problems(
    observe_request: Callable[[str, int, float], None],
    refuse_foreign_page: Callable[[web.Request], None],
    slots: CallSlots,
) -> Any:
    """Make the middleware that answers what was refused as a problem, and what nobody foresaw as a
    blank 500, logged. What is refused before it took a slot takes one of its address.

    `refuse_foreign_page` is called before any handler, and may raise a Problem.
    Once a call is answered, `observe_request` is told its operation, its status and the seconds
    that it took; of a websocket it is not told.
    """

    @web.middleware
    async def answer_problem(request: web.Request, handler: Handler) -> web.StreamResponse:
        began = time.perf_counter()
        try:
            await slots.let_begin(request)
            check_expectation(request)
            check_dates(request)
            refuse_foreign_page(request)
            answer = await handler(request)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception as error:
            problem = as_problem(error)
            if problem is None:
                log.exception("%s failed, request %s", called(request), request_id(request))
            answer = problem_answer(problem or InternalError(), request)
        if answer.status >= 400 and GIVE_BACK not in request:
            with contextlib.suppress(TooManyCalls):  # it waited long enough
                own = slots.address, slots.address_of(request)
                await hold_slots(request, wait_patiently, own)
        if answer.status != SWITCHING:
            operation = request.match_info.route.name or "none"
            observe_request(operation, answer.status, time.perf_counter() - began)
        return answer

    return answer_problem


def check_expectation(request: web.Request) -> None:
    """Raise ExpectationFailed where a client expects what nobody here does."""
    if request.headers.get("Expect", "").lower() not in ("", "100-continue"):
        raise ExpectationFailed


def check_dates(request: web.Request) -> None:
    """Raise MalformedRequest where a header names a date that there is not, which aiohttp finds out
    when it is too late to answer.
    """
    try:
        _ = request.if_modified_since, request.if_unmodified_since, request.if_range
    except (OverflowError, ValueError):
        raise MalformedRequest("A header has a date that does not exist.") from None


async def continue_if_expected(route: web.AbstractRoute, request: web.Request) -> None:
    """Tell a client to go on that waits for it; what else is expected is refused as a problem."""
    # The second is raised for what it cannot repeat, the third where the client has hung up.
    with contextlib.suppress(web.HTTPExpectationFailed, UnicodeEncodeError, ConnectionError):
        await HANDLE_EXPECTATION(route, request)


def refuse_unreadable(
    _connection: web.RequestHandler, request: web.BaseRequest, status: int = 500, *_: Any
) -> web.Response:
    """Answer what aiohttp could not even parse like anything else that is refused."""
    if request.writer.output_size > 0:
        raise ConnectionError  # a part of another answer is out
    answer = problem_answer(MalformedRequest() if status < 500 else InternalError(), request)
    answer.headers.update(SAFE_HEADERS)
    answer.headers[REQUEST_ID_HEADER] = request_id(request)
    answer.force_close()
    return answer


class FailedRoute(web_urldispatcher.SystemRoute):
    """Answers a call of no endpoint, which gets one of its own; it does not refer to itself."""

    def __init__(self, http_exception: web.HTTPException) -> None:
        super().__init__(http_exception)
        self._handler = None  # type: ignore[assignment]

    @property
    def handler(self) -> Any:
        """What answers such a call."""
        return self._handle


# aiohttp calls these for a request with `Expect`, before any middleware, and for one that it cannot
# parse.
HANDLE_EXPECTATION = web.AbstractRoute.handle_expect_header
web.AbstractRoute.handle_expect_header = continue_if_expected  # type: ignore[assignment]
web.RequestHandler.handle_error = refuse_unreadable  # type: ignore[assignment]
web_urldispatcher.SystemRoute = FailedRoute  # type: ignore[misc]
