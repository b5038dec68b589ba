"""What the contract says of users, chats, messages and roles, as plain data in memory.

One call at a time, no sockets, no SQL: so small that it can be read beside the contract. A function
of "What is done" changes the world and answers the status and the body that the server has to
answer; one of "What is looked at" answers a page. Both raise Refused for what is refused. Where the
server chooses (ids, times, versions) the model takes over what it sees first, and holds the server
to it from then on.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

Shown = dict[str, Any]
Answer = tuple[int, Any]

STATUS_OF = {
    "unauthorized": 401, "invalid-credentials": 401,
    "owner-only": 403, "not-allowed": 403, "sender-only": 403, "wrong-password": 403,
    "chat-not-found": 404, "message-not-found": 404, "user-not-found": 404,
    "email-taken": 409, "username-taken": 409, "message-id-taken": 409, "partner-gone": 409,
    "personal-chat": 409, "owner-stays": 409,
    "invalid-input": 422, "reply-not-found": 422,
}


class Refused(Exception):
    """A call is refused, for one of these reasons: the contract does not rank them."""

    def __init__(self, *reasons: str) -> None:
        super().__init__(*reasons)
        self.reasons = reasons


def refuse(reasons: dict[str, Any]) -> None:
    """Raise Refused if any of the reasons holds."""
    if holding := [reason for reason, holds in reasons.items() if holds]:
        raise Refused(*holding)


# ---- What the server chooses


@dataclass(eq=False)
class Time:
    """A moment: any time in UTC where it is first seen, the same ever after."""

    seen: str = ""

    def __eq__(self, told: object) -> bool:
        if not self.seen and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", str(told)):
            self.seen = str(told)
        return self.seen == told


@dataclass(eq=False)
class Version:
    """A chat's version: a larger one after each change of name or members, else the same."""

    seen: int | None = None
    least: int = 1

    def rises(self) -> None:
        """Expect another one, at least one larger for each change since the last look."""
        self.least, self.seen = (self.seen or self.least) + 1, None

    def __eq__(self, told: object) -> bool:
        if self.seen is None and isinstance(told, int) and told >= self.least:
            self.seen = told
        return self.seen == told


@dataclass(eq=False)
class Position:
    """The position of a number: any mark where it is first seen, the same ever after."""

    number: int
    seen: str = ""

    def __eq__(self, told: object) -> bool:
        if not self.seen and re.fullmatch(rf"{self.number}\.[\w-]{{11}}", str(told)):
            self.seen = str(told)
        return told == (self.seen if self.number else "0")


# ---- The world


@dataclass(eq=False)
class Session:
    """A login."""

    token: str
    is_ended: bool = False


@dataclass(eq=False)
class Person:
    """A user, also after the account was deleted."""

    id: int
    name: str
    email: str
    password: str
    is_active: bool = True
    is_deleted: bool = False
    created_at: Time = field(default_factory=Time)
    sessions: list[Session] = field(default_factory=list)

    @property
    def session(self) -> Session | None:
        """The latest login that has not ended."""
        return next((each for each in reversed(self.sessions) if not each.is_ended), None)


@dataclass(eq=False)
class Member:
    """Somebody's stay in a chat. `steps` tells up to which number they had read everything, and
    since when; the first one is joining, which reads without being named as a reader."""

    person: Person
    role: str
    steps: list[tuple[int, Time]]

    @property
    def last_read_seq(self) -> int:
        """Up to which number everything is read."""
        return self.steps[-1][0]


@dataclass(eq=False)
class Message:
    """A message, or its tombstone."""

    id: str
    sender: Person
    text: str
    reply_to: str | None
    seq: int
    rev: int
    created_at: Time = field(default_factory=Time)
    edited_at: Time | None = None
    deleted_at: Time | None = None


@dataclass(eq=False)
class Chat:
    """A chat; members in the order of their joining, messages in that of their numbers."""

    id: int
    name: str | None
    is_group: bool
    active: int  # the greater, the more recent was its last activity
    members: list[Member]
    messages: list[Message] = field(default_factory=list)
    positions: list[Position] = field(default_factory=lambda: [Position(0)])  # of each number
    version: Version = field(default_factory=Version)
    created_at: Time = field(default_factory=Time)

    @property
    def last_seq(self) -> int:
        """The number of the newest message."""
        return self.messages[-1].seq if self.messages else 0

    def member(self, person: Person) -> Member | None:
        """The stay of somebody who is in the chat."""
        return next((each for each in self.members if each.person is person), None)

    def seen_by(self, asker: Person) -> Member:
        """The asker's stay; for anybody else the chat does not exist."""
        if member := self.member(asker):
            return member
        raise Refused("chat-not-found")

    def message(self, message_id: str) -> Message | None:
        """The message with an id."""
        return next((each for each in self.messages if each.id == message_id), None)

    @property
    def last_rev(self) -> int:
        """The last number that was taken."""
        return self.positions[-1].number

    def takes_number(self) -> int:
        """The number of the next change."""
        self.positions.append(Position(self.last_rev + 1))
        return self.last_rev


@dataclass(eq=False)
class World:
    """Everybody and everything."""

    people: list[Person] = field(default_factory=list)
    chats: list[Chat] = field(default_factory=list)
    moments: int = 0  # rises with each activity of a chat

    def now(self) -> int:
        """A moment later than all before."""
        self.moments += 1
        return self.moments

    def with_ids(self, ids: Iterable[int]) -> list[Person | None]:
        """The people with these ids, None for an id of nobody."""
        living = {person.id: person for person in self.people if not person.is_deleted}
        return [living.get(each) for each in ids]


# ---- What is shown


def shown_user(person: Person, asker: Person | None = None) -> Shown:
    """A `User`; the email is shown to themself alone."""
    shown = {
        "id": person.id, "username": person.name, "is_active": person.is_active,
        "created_at": person.created_at,
    }
    return shown | {"email": person.email} if person is asker else shown


def shown_participant(member: Member) -> Shown:
    """A `Participant`."""
    return {
        "user_id": member.person.id, "username": member.person.name, "role": member.role,
        "last_read_seq": member.last_read_seq,
    }


def readers(chat: Chat, message: Message) -> list[Shown]:
    """Who read a message, by user id: not its sender, nor who joined after it."""
    found = []
    for member in sorted(chat.members, key=lambda each: each.person.id):
        (joined_seq, _), *steps = member.steps
        passed = next((at for seq, at in steps if seq >= message.seq), None)
        if passed and joined_seq < message.seq and member.person is not message.sender:
            who = {"user_id": member.person.id, "username": member.person.name}
            found.append(who | {"read_at": passed})
    return found


def shown_message(chat: Chat, message: Message) -> Shown:
    """A `Message`, its readers by user id."""
    read_by = readers(chat, message)
    return {
        "id": message.id, "chat_id": chat.id, "seq": message.seq, "rev": message.rev,
        "position": chat.positions[message.rev],
        "sender_id": None if message.sender.is_deleted else message.sender.id,
        "text": message.text, "reply_to": message.reply_to,
        "created_at": message.created_at, "edited_at": message.edited_at,
        "deleted_at": message.deleted_at, "read_by": read_by, "read_count": len(read_by),
    }


def shown_chat(chat: Chat, reader: Member) -> Shown:
    """A `Chat` as one of its participants sees it."""
    unread = [
        each for each in chat.messages
        if each.seq > reader.last_read_seq
        and each.sender is not reader.person and each.deleted_at is None
    ]
    return {
        "id": chat.id, "name": chat.name, "is_group": chat.is_group, "created_at": chat.created_at,
        "participants": [shown_participant(member) for member in chat.members],
        "participant_count": len(chat.members),
        "last_message": shown_message(chat, chat.messages[-1]) if chat.messages else None,
        "last_rev": chat.last_rev, "position": chat.positions[-1], "version": chat.version,
        "unread_count": len(unread),
    }


# ---- What is done: accounts


def register(world: World, told: Shown, body: Shown) -> Answer:
    """POST /users"""
    name, email = body["username"], body["email"]
    refuse({"email-taken": has(world, "email", email), "username-taken": has(world, "name", name)})
    world.people.append(Person(told.get("id", 0), name, email, body["password"]))
    return 201, shown_user(world.people[-1], world.people[-1])


def has(world: World, what: str, value: str, but: Person | None = None) -> bool:
    """Whether another has the same email or name, in any case."""
    others = (each for each in world.people if not each.is_deleted and each is not but)
    return any(getattr(each, what).casefold() == value.casefold() for each in others)


def login(world: World, told: Shown, body: Shown) -> Answer:
    """POST /users/login"""
    living = (each for each in world.people if not each.is_deleted)
    email = body["email"].casefold()
    person = next((each for each in living if each.email.casefold() == email), None)
    if person is None or person.password != body["password"]:
        raise Refused("invalid-credentials")
    person.is_active = True
    person.sessions.append(Session(told.get("access_token", "")))
    given = {"token_type": "bearer", "expires_in": 1800}
    return 200, given | {name: told.get(name) for name in ("access_token", "refresh_token")}


def logout(asker: Person) -> Answer:
    """POST /users/logout"""
    end_sessions(asker, lambda session: session is asker.session)
    return 204, None


def end_sessions(person: Person, these: Callable[[Session], bool]) -> None:
    """End some of a user's sessions."""
    for session in [each for each in person.sessions if these(each)]:
        session.is_ended = True


def change_user(world: World, asker: Person, target: Person, body: Shown) -> Answer:
    """PUT /users/{user_id}"""
    check_self(asker, target)
    name, password = body.get("username", asker.name), body.get("password")
    refuse({
        "username-taken": has(world, "name", name, but=asker),
        "wrong-password": password and body["current_password"] != asker.password,
    })
    kept, asker.name = asker.session, name
    if password:
        asker.password = password
        end_sessions(asker, lambda session: session is not kept)
    if body.get("is_active") is False:
        asker.is_active = False
        end_sessions(asker, lambda session: True)
    return 200, shown_user(asker, asker)


def check_self(asker: Person, target: Person) -> None:
    """Only one's own account is changed or deleted."""
    if target.is_deleted:
        raise Refused("user-not-found")
    if target is not asker:
        raise Refused("not-allowed")


def delete_user(world: World, asker: Person, target: Person) -> Answer:
    """DELETE /users/{user_id}"""
    check_self(asker, target)
    asker.is_deleted = True
    end_sessions(asker, lambda session: True)
    for each in world.chats:
        if member := each.member(asker):
            depart(each, member)
    return 204, None


# ---- What is done: chats


def create_chat(world: World, asker: Person, told: Shown, body: Shown) -> Answer:
    """POST /chats"""
    others = world.with_ids(dict.fromkeys(body["participant_ids"]))
    others = [each for each in others if each is not asker]
    if None in others or not others or (len(others) > 1 and not body["is_group"]):
        raise Refused("invalid-input")
    people = [asker, *(each for each in others if each)]
    if not body["is_group"] and (known := personal_chat(world, people)):
        return 200, shown_chat(known, known.seen_by(asker))
    first = "owner" if body["is_group"] else "member"
    members = [
        Member(person, "member" if place else first, [(0, Time())])
        for place, person in enumerate(people)
    ]
    made = Chat(told.get("id", 0), body.get("name"), body["is_group"], world.now(), members)
    world.chats.append(made)
    return 201, shown_chat(made, members[0])


def personal_chat(world: World, people: list[Person]) -> Chat | None:
    """The personal chat of two, which is one for both."""
    chats = (each for each in world.chats if not each.is_group)
    return next((each for each in chats if all(map(each.member, people))), None)


def rename(chat: Chat, asker: Person, name: str) -> Answer:
    """PATCH /chats/{chat_id}"""
    me = chat.seen_by(asker)
    refuse({"personal-chat": not chat.is_group, "not-allowed": me.role == "member"})
    if name != chat.name:
        chat.name = name
        chat.version.rises()
    return 200, shown_chat(chat, me)


def put(chat: Chat, asker: Person, target: Person, role: str | None) -> Answer:
    """POST /chats/{chat_id}/participants"""
    me, there = chat.seen_by(asker), chat.member(target)
    refuse({
        "personal-chat": not chat.is_group,
        "owner-only": role is not None and me.role != "owner",
        "owner-stays": target is asker and me.role == "owner" and role in ("admin", "member"),
        "user-not-found": target.is_deleted,
    })
    status = 200
    if there is None:
        status, there = 201, Member(target, role or "member", [(chat.last_seq, Time())])
        chat.members.append(there)
        chat.version.rises()
    elif role not in (None, there.role):
        there.role = role or there.role
        chat.version.rises()
    if role == "owner" and there is not me:
        me.role = "admin"
    return status, shown_participant(there)


def remove(chat: Chat, asker: Person, target: Person) -> Answer:
    """DELETE /chats/{chat_id}/participants/{user_id}"""
    me, there = chat.seen_by(asker), chat.member(target)
    refuse({"personal-chat": not chat.is_group, "user-not-found": there is None})
    assert there is not None
    below = {"owner": ("admin", "member"), "admin": ("member",), "member": ()}
    refuse({"not-allowed": there is not me and there.role not in below[me.role]})
    depart(chat, there)
    return 204, None


def depart(chat: Chat, leaving: Member) -> None:
    """Somebody is no longer in a chat: an owner is followed by the longest-standing admin, else
    member; of those who came at once, by the one named first."""
    chat.members.remove(leaving)
    chat.version.rises()
    if leaving.role == "owner" and chat.members:
        admins = [each for each in chat.members if each.role == "admin"]
        (admins or chat.members)[0].role = "owner"


# ---- What is done: messages


def post(world: World, chat: Chat, asker: Person, told: Shown, body: Shown) -> Answer:
    """POST /chats/{chat_id}/messages"""
    chat.seen_by(asker)
    known = chat.message(body["id"]) if body.get("id") else None
    if known and known.sender is asker:
        return 200, shown_message(chat, known)
    reply_to = body.get("reply_to")
    refuse({
        "message-id-taken": known is not None,
        "partner-gone": not chat.is_group and len(chat.members) < 2,
        "reply-not-found": reply_to is not None and chat.message(reply_to) is None,
    })
    seq, made_id = chat.takes_number(), body.get("id") or told.get("id", "")
    chat.messages.append(Message(made_id, asker, body["text"], reply_to, seq, seq))
    chat.active = world.now()
    return 201, shown_message(chat, chat.messages[-1])


def of_chat(chat: Chat, asker: Person, message_id: str) -> tuple[Member, Message]:
    """Who asks, and for which message of the chat."""
    me, found = chat.seen_by(asker), chat.message(message_id)
    if found is None:
        raise Refused("message-not-found")
    return me, found


def edit(chat: Chat, asker: Person, message_id: str, text: str) -> Answer:
    """PATCH /chats/{chat_id}/messages/{message_id}"""
    _, found = of_chat(chat, asker, message_id)
    refuse({
        "sender-only": found.sender is not asker,
        "message-not-found": found.deleted_at is not None,
    })
    if text != found.text:
        found.text, found.rev, found.edited_at = text, chat.takes_number(), Time()
    return 200, shown_message(chat, found)


def delete(chat: Chat, asker: Person, message_id: str) -> Answer:
    """DELETE /chats/{chat_id}/messages/{message_id}"""
    me, found = of_chat(chat, asker, message_id)
    refuse({"sender-only": found.sender is not asker and me.role not in ("owner", "admin")})
    if found.deleted_at is None:
        found.text, found.rev, found.deleted_at = "", chat.takes_number(), Time()
    return 204, None


def read(chat: Chat, asker: Person, message_id: str) -> Answer:
    """POST /chats/{chat_id}/read"""
    me, found = of_chat(chat, asker, message_id)
    if found.seq > me.last_read_seq:
        me.steps.append((found.seq, Time()))
    seq, read_at = me.steps[-1]
    (stand,) = [each for each in chat.messages if each.seq == seq]
    return 200, {
        "chat_id": chat.id, "message_id": stand.id, "seq": seq, "reader_id": asker.id,
        "read_at": read_at,
    }


# ---- What is looked at


def get_user(asker: Person, target: Person) -> Answer:
    """GET /users/{user_id}"""
    if target.is_deleted:
        raise Refused("user-not-found")
    return 200, shown_user(target, asker)


def get_chat(chat: Chat, asker: Person) -> Answer:
    """GET /chats/{chat_id}"""
    return 200, shown_chat(chat, chat.seen_by(asker))


def get_message(chat: Chat, asker: Person, message_id: str) -> Answer:
    """GET /chats/{chat_id}/messages/{message_id}"""
    _, found = of_chat(chat, asker, message_id)
    return 200, shown_message(chat, found)


@dataclass
class Page:
    """A page of a list, and by the name of each link the query that leads to the same page."""

    values: list[Shown]
    more: dict[str, Shown] = field(default_factory=dict)


def first_of(values: list[Any], limit: int) -> tuple[list[Any], bool]:
    """The first values, and whether there are others."""
    return values[:limit], len(values) > limit


def page_of_users(world: World, limit: int, q: str, after: int = 0) -> Page:
    """GET /users?q; whether it shows the asker's own email is left open"""
    living = (each for each in world.people if not each.is_deleted and each.id > after)
    named = [each for each in living if each.name.casefold().startswith(q.casefold())]
    some, is_more = first_of(sorted(named, key=lambda each: each.id), limit)
    more = {"next": {"limit": limit, "q": q, "after": some[-1].id}} if is_more else {}
    return Page([shown_user(each) for each in some], more)


def page_of_chats(world: World, asker: Person, limit: int, skipped: int = 0) -> Page:
    """GET /chats; `skipped` stands for the cursor, so many chats are on the pages before"""
    mine = [each for each in world.chats if each.member(asker)]
    mine.sort(key=lambda each: each.active, reverse=True)
    some, is_more = first_of(mine[skipped:], limit)
    more = {"next": {"limit": limit, "skipped": skipped + limit}} if is_more else {}
    return Page([shown_chat(each, each.seen_by(asker)) for each in some], more)


def page_of_participants(chat: Chat, asker: Person, limit: int, after: int = 0) -> Page:
    """GET /chats/{chat_id}/participants"""
    chat.seen_by(asker)
    shown = sorted(map(shown_participant, chat.members), key=lambda each: each["user_id"])
    some, is_more = first_of([each for each in shown if each["user_id"] > after], limit)
    return Page(some, {"next": {"limit": limit, "after": some[-1]["user_id"]}} if is_more else {})


def page_of_history(
    chat: Chat, asker: Person, limit: int, before: int | None = None, after: int | None = None
) -> Page:
    """GET /chats/{chat_id}/messages"""
    both = before is not None and after is not None
    refuse({"chat-not-found": chat.member(asker) is None, "invalid-input": both})
    if after is not None:
        found = [each for each in chat.messages if each.seq > after][:limit]
    else:
        older = (each for each in chat.messages if before is None or each.seq < before)
        found = list(older)[-limit:]
    # Beyond an empty page lies what is on the other side of its bound.
    oldest = found[0].seq if found else (before or 0) if after is None else after + 1
    newest = found[-1].seq if found else oldest - 1
    more = {}
    if any(each.seq < oldest for each in chat.messages):
        more["next"] = {"limit": limit, "before": oldest}
    if any(each.seq > newest for each in chat.messages):
        more["prev"] = {"limit": limit, "after": newest}
    return Page([shown_message(chat, each) for each in found], more)


def page_of_changes(chat: Chat, asker: Person, limit: int, after: int = 0) -> Page:
    """GET /chats/{chat_id}/changes"""
    chat.seen_by(asker)
    changed = sorted(chat.messages, key=lambda each: each.rev)
    some, is_more = first_of([each for each in changed if each.rev > after], limit)
    more = {"next": {"limit": limit, "after": some[-1].rev}} if is_more else {}
    return Page([shown_message(chat, each) for each in some], more)


def page_found(chat: Chat, asker: Person, limit: int, q: str, before: int | None = None) -> Page:
    """GET /chats/{chat_id}/messages?q"""
    chat.seen_by(asker)
    wanted = set(q.casefold().split())
    older = [each for each in chat.messages if before is None or each.seq < before]
    found = [each for each in older if wanted and wanted <= set(each.text.casefold().split())]
    some, is_more = first_of(found[::-1], limit)
    more = {"next": {"limit": limit, "q": q, "before": some[-1].seq}} if is_more else {}
    return Page([shown_message(chat, each) for each in some], more)
