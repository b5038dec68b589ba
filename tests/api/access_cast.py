"""The people and chats that the rows of access_table.py speak of, and who asks what they say."""

import itertools
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import aiohttp
import asyncpg
import jwt
from access_table import CALL_ROWS, CALLERS, PROBLEMS, Row

from support.people import PASSWORD, Line, Person
from support.raw import HANDSHAKE
from support.servers import SECRET_KEY

NOBODYS = 2**62  # an id that nobody has
NO_IDS = ("x", "0", "-1", "01", "1.5", "%D9%A1", "9223372036854775808")  # one for each caller
CODES = {(code[:3], slug): code for code, slug in PROBLEMS.items()}
TOLD = ("message", "read", "typing")  # frames that others in the chat hear of
OUTSIDE = ("nobody", "expired", "stranger", "former")  # of the group, or as good as
ROLES = {"member": "member", "admin": "admin", "owner": "owner", "mate": "member", "aide": "admin"}
QUERIES = {  # of a page of a history, or of another list
    "": "", "before": "?before=2", "before all": "?before=1", "after": "?after=1",
    "after all": "?after=1000000", "after the last": "?after=1000000", "words": "?q=hello",
    "words before": "?q=hello&before=2", "words of none": "?q=nothing", "no word": "?q=",
}

# Everything that a refused call must leave as it was.
EVERYTHING = """
    select md5(string_agg(row, '|' order by row)) from (
        select t::text as row from users t union all
        select (t.id, t.user_id, t.generation, t.rotated_at, t.ended_at)::text from sessions t
        union all
        select t::text from chats t union all select t::text from participants t union all
        select t::text from departures t union all select t::text from messages t union all
        select t::text from reads t) everything"""

# A group as Cast.found makes it, at once.
FOUND = """
    with chat as (
        insert into chats (is_group, name, participant_count, last_rev, last_seq)
        values (true, 'a group', cardinality($1::bigint[]), 1, 1) returning id
    ), joined as (
        insert into participants (chat_id, user_id, role)
        select chat.id, p.id, p.role from chat, unnest($1, $2::text[]) as p (id, role)
    ), said as (
        insert into messages (chat_id, seq, rev, id, sender_id, text, created_at)
        select chat.id, 1, 1, $3::uuid, $4::bigint, 'hello', now() from chat
    )
    select id from chat"""


def acting(caller: str) -> str:
    """Name the person of a caller: who has no token, or an expired one, would be the owner."""
    return "owner" if caller in ("nobody", "expired") else caller


def claims_of(token: str) -> dict[str, Any]:
    """Read a token."""
    claims: dict[str, Any] = jwt.decode(token, SECRET_KEY, algorithms=["HS256"])
    return claims


def expired(token: str) -> str:
    """Make a token's double that expired a minute ago."""
    claims = claims_of(token) | {"exp": int(time.time()) - 60}
    return jwt.encode(claims, SECRET_KEY, algorithm="HS256")


@dataclass
class Scene:
    """A group of certain people, and what they said there and in other chats."""

    people: dict[str, Person]
    group: int
    said: dict[tuple[int, str], str] = field(default_factory=dict)  # chat and whose: the message


@dataclass
class Call:
    """A request, ready to be sent."""

    path: str
    token: str = ""
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


class Cast:
    """Everybody, and their chats; `scene` is the group that only refused calls may ask about."""

    def __init__(self, make: Callable[[str], Awaitable[Person]], sql: asyncpg.Connection) -> None:
        self._make = make
        self._sql = sql
        self._numbers = itertools.count()
        self.people: dict[str, Person] = {}
        self.foreign = 0
        self.personal: dict[str, int] = {}  # caller: their chat with the partner
        self.widowed: dict[str, int] = {}  # caller: their chat with who is deleted
        self.scene: Scene
        self._said: dict[tuple[int, str], str] = {}  # in the chats with who is deleted
        self.details: dict[str, set[str]] = {}  # code: what the problem said
        self.wrong: list[str] = []
        self._watching: list[tuple[Person, Line, list[int]]] = []  # with the chats of each

    async def begin(self) -> "Cast":
        """Make the people, and the chats that stay as they are."""
        names = (*CALLERS[2:], "mate", "aide", "newcomer", "partner", "deleted")
        self.people = {name: await self.new_person() for name in names}
        partner, deleted = self.people["partner"], self.people["deleted"]
        self.foreign = await partner.founds(await self.new_person(), name="foreign")
        for caller in CALLERS[2:]:
            person = self.people[caller]
            self.personal[caller] = await person.opens(partner)
            widowed = self.widowed[caller] = await person.opens(deleted)
            self._said[widowed, f"{caller}'s"] = (await person.says(widowed, "hello"))["id"]
            self._said[widowed, "partner's"] = (await deleted.says(widowed, "hello"))["id"]
        await deleted.expects(204, "DELETE", f"/users/{deleted.id}")
        self.scene = await self.found()
        return self

    async def new_person(self) -> Person:
        """Make another person."""
        return await self._make(f"person_{next(self._numbers)}")

    async def found(self, **instead: Person) -> Scene:
        """Found a group of everybody in their roles, or of others instead of some."""
        people = self.people | instead
        owner, former = people["owner"], people["former"]
        others = [people[name] for name in ROLES if name != "owner"]
        group = await owner.founds(*others, former)
        path = f"/chats/{group}/participants"
        for name in ("admin", "aide"):
            await owner.posts(path, {"user_id": people[name].id, "role": "admin"}, 200)
        said = (await former.says(group, "hello"))["id"]
        await owner.expects(204, "DELETE", f"{path}/{former.id}")
        return Scene(people, group, {(group, "former's"): said})

    async def found_again(self, **instead: Person) -> Scene:
        """Found such a group behind the server's back, which is quicker."""
        people = self.people | instead
        ids, said = [people[name].id for name in ROLES], uuid4()
        former = people["former"].id
        group = await self._sql.fetchval(FOUND, ids, list(ROLES.values()), said, former)
        return Scene(people, group, {(group, "former's"): str(said)})

    async def everything(self) -> str:
        """Answer a digest of all that is stored."""
        digest: str = await self._sql.fetchval(EVERYTHING)
        return digest

    def judge(self, row: Row, caller: str, got: str, expected: str) -> None:
        """Note a cell that is not as it should be."""
        if got != expected:
            self.wrong.append(f"{row}, by {caller}: {got}, not {expected}")

    # ---- What a word of the table stands for

    def chat(self, word: str, caller: str, scene: Scene) -> Any:
        """Answer the id of a chat."""
        me = acting(caller)
        chats = {
            "group": scene.group, "foreign": self.foreign, "personal": self.personal[me],
            "partner gone": self.widowed[me], "missing": NOBODYS,
            "no id": NO_IDS[CALLERS.index(caller)],
        }
        return chats[word]

    def user(self, word: str, caller: str, scene: Scene) -> Any:
        """Answer the id of a user."""
        if word in ("missing", "no id"):
            return NOBODYS if word == "missing" else NO_IDS[CALLERS.index(caller)]
        names = {"oneself": acting(caller), "another": "mate", "theirs": "partner"}
        return scene.people[names.get(word, word)].id

    async def message(self, word: str, chat: Any, caller: str, scene: Scene) -> str:
        """Answer the id of a message, which is said now if it was not before."""
        if word in ("missing", "no id"):
            return str(uuid4()) if word == "missing" else "x"
        if word in ("foreign", "theirs"):
            chat, word = self.foreign, "partner's"
        outside = chat == scene.group and caller in OUTSIDE
        me = "mate" if outside else acting(caller)
        whose = re.sub(r"\bown\b", f"{me}'s", word)
        if known := (self._said | scene.said).get((chat, whose)):
            return known
        speaker = scene.people[whose.split("'")[0]]
        said = scene.said[chat, whose] = (await speaker.says(chat, "hello"))["id"]
        if word == "own deleted":
            await speaker.expects(204, "DELETE", f"/chats/{chat}/messages/{said}")
        return said

    async def again(self, person: Person) -> Person:
        """Answer somebody with another session."""
        same = Person(person.client, person.name)
        await same.logs_in()
        return same

    # ---- What a row of calls asks

    async def aim(self, row: Row, caller: str, scene: Scene) -> Call:
        """Make the request of a cell."""
        person, call = scene.people[acting(caller)], Call(row.called[1])
        if caller != "nobody":
            call.token = expired(person.access) if caller == "expired" else person.access
        if call.path.startswith("/ws"):
            self._aim_at_socket(row, call)
        if "{chat_id}" in call.path:
            await self._aim_at_chat(row, caller, scene, call)
        elif "{user_id}" in call.path:
            self._aim_at_user(row, caller, scene, call)
        elif "{session_id}" in call.path:
            await self._aim_at_session(row, caller, scene, call)
        elif row.called[0] == "POST":
            await self._aim_at_door(row, caller, scene, call)
        elif row.about == "by name":
            call.path += "?q=person"
        return call

    def _aim_at_socket(self, row: Row, call: Call) -> None:
        if "no handshake" not in row.about:
            call.headers |= HANDSHAKE
        if "foreign page" in row.about:
            call.headers["Origin"] = "http://evil.example"

    async def _aim_at_chat(self, row: Row, caller: str, scene: Scene, call: Call) -> None:
        method, path = row.called
        where, _, what = row.about.partition(", ")
        chat = self.chat(where, caller, scene)
        call.path = call.path.replace("{chat_id}", str(chat))
        if path.startswith("/ws"):
            call.path += "?after=0" if what == "after" else ""
        elif "/participants" in path and method != "GET":
            self._aim_at_participant(method, what, caller, scene, call)
        elif "{message_id}" in path or path.endswith("/read"):
            message = await self.message(what, chat, caller, scene)
            call.path = call.path.replace("{message_id}", message)
            call.body = {"PATCH": {"text": "x"}, "POST": {"message_id": message}}.get(method)
        elif method == "POST":
            call.body = await self.new_message(what, chat, caller, scene)
        elif method == "PATCH":
            call.body = {"name": "renamed"}
        else:
            call.path += QUERIES[what]

    def _aim_at_participant(
        self, method: str, what: str, caller: str, scene: Scene, call: Call
    ) -> None:
        who, _, role = what.partition(" as ")
        user = self.user(who, caller, scene)
        if method == "POST" and role:
            call.body = {"role": role}
        if method == "POST" and "{user_id}" not in call.path:
            call.body = {"user_id": user} | (call.body or {})
        call.path = call.path.replace("{user_id}", str(user))

    async def new_message(self, what: str, chat: Any, caller: str, scene: Scene) -> dict[str, Any]:
        """Make a message: new, or with a known id, or in reply to another."""
        message = {"text": "hello"}
        for start, name in (("id of ", "id"), ("reply to ", "reply_to")):
            if what.startswith(start):
                known = await self.message(what.removeprefix(start), chat, caller, scene)
                message[name] = known
        return message

    def _aim_at_user(self, row: Row, caller: str, scene: Scene, call: Call) -> None:
        who, _, what = row.about.partition(", ")
        call.path = call.path.replace("{user_id}", str(self.user(who, caller, scene)))
        name, known = self.new_name(), {"current_password": PASSWORD}
        email = {"email": f"{name}@example.com"}
        bodies: dict[str, Any] = {
            "": None, "new name": {"username": name},
            "taken name": {"username": self.people["mate"].name}, "inactive": {"is_active": False},
            "new email": email | known, "new password": {"password": PASSWORD} | known,
            "wrong password": email | {"current_password": "wrong"}, "no password": email,
        }
        call.body = bodies[what]

    async def _aim_at_session(self, row: Row, caller: str, scene: Scene, call: Call) -> None:
        me, token = scene.people[acting(caller)], call.token
        if row.about != "current":
            whose = scene.people["mate"] if row.about == "another's" else me
            other = await self.again(whose)
            token = other.access
            if row.about == "ended":
                await other.posts("/users/logout", status=204)
        known = claims_of(me.access if caller in ("nobody", "expired") else token)["sid"]
        ids = {"missing": NOBODYS, "no id": NO_IDS[CALLERS.index(caller)]}
        call.path = call.path.replace("{session_id}", str(ids.get(row.about, known)))

    async def _aim_at_door(self, row: Row, caller: str, scene: Scene, call: Call) -> None:
        me, name, about = scene.people[acting(caller)], self.new_name(), row.about
        if call.path.endswith("/refresh") and about != "access token" and call.token:
            call.token = expired(me.refresh) if caller == "expired" else me.refresh
            if about == "in the body":
                call.body, call.token = {"refresh_token": call.token}, ""
        elif call.path.endswith("/login"):
            email = f"{name}@example.com" if about == "unknown email" else me.email
            call.body = {"email": email, "password": PASSWORD}
            if about == "wrong password":
                call.body["password"] = "wrong horse"
        elif call.path == "/api/v1/users":
            call.body = {"email": f"{name}@example.com", "username": name, "password": PASSWORD}
            if about.startswith("taken"):
                call.body |= {"email": me.email} if "email" in about else {"username": me.name}
        elif call.path == "/api/v1/chats":
            call.body = await self._new_chat(about, caller, scene)

    async def _new_chat(self, about: str, caller: str, scene: Scene) -> dict[str, Any]:
        named = re.search("partner|deleted|missing|oneself", about)
        who = self.user(named[0], caller, scene) if named else (await self.new_person()).id
        body = {"is_group": about.startswith("group"), "participant_ids": [who]}
        return body | ({"name": "a group"} if body["is_group"] else {})

    def new_name(self) -> str:
        """Make a name that nobody has."""
        return f"person_{next(self._numbers)}"

    # ---- What a row of calls is answered

    async def checks_calls(self, row: Row) -> None:
        """Send what a row says: first what must leave everything as it was, then the rest."""
        method, handshake = row.called[0], "101" in row.cells.values()
        first = next(each for each in CALL_ROWS if each.called == row.called)
        harmless = [who for who in CALLERS if method == "GET" or row.cells[who] >= "300"]
        calls = {who: await self.aim(row, who, self.scene) for who in harmless}
        before = await self.everything()
        for caller, call in calls.items():
            got = await self.asks(method, call)
            self.judge(row, caller, got, row.cells[caller])
            is_shown = row.about in ("foreign", first.about) or "no handshake" in row.about
            if method == "GET" and not handshake and is_shown:
                got = await self.asks("HEAD", call)
                self.judge(row, f"HEAD of {caller}", got, row.cells[caller][:3])
        if await self.everything() != before:
            self.wrong.append(f"{row}: what was refused or read changed something")
        for caller in [who for who in CALLERS if who not in harmless]:
            call = await self.aim(row, caller, await self.fresh_scene(row, caller))
            self.judge(row, caller, await self.asks(method, call), row.cells[caller])

    async def fresh_scene(self, row: Row, caller: str) -> Scene:
        """Make a scene that a call may change, or where there is no account, take the usual."""
        if "{chat_id}" in row.called[1]:
            return await self.found_again()
        if caller in ("nobody", "expired") or row.called[1] == "/api/v1/chats":
            return self.scene
        return await self.found_again(**{caller: await self.new_person()})

    async def asks(self, method: str, call: Call) -> str:
        """Send a request and answer the code of its answer."""
        headers = dict(call.headers)
        if call.token:
            headers["Authorization"] = f"Bearer {call.token}"
        client = self.people["owner"].client
        answer = await client.request(method, call.path, json=call.body, headers=headers)
        if answer.status == 101:
            answer.close()
            return "101"
        text = await answer.read()
        if answer.status < 400 or method == "HEAD":
            return str(answer.status) + (" with a body" if method == "HEAD" and text else "")
        assert answer.content_type == "application/problem+json"
        problem = await answer.json()
        assert problem["status"] == answer.status
        code = code_of(problem)
        self.details.setdefault(code, set()).add(problem["detail"])
        return code

    # ---- What a row of frames is answered

    async def checks_frames(self, row: Row) -> None:
        """Send what a row says: first what is refused, then the rest; and hear what others do."""
        refused = [who for who in CALLERS if row.cells[who][0] in "x4"]
        taken = [who for who in CALLERS if who not in refused]
        for caller in refused + taken:
            scene = self.scene if caller in refused else replace(self.scene, said={})
            got, changed = await self._sends_frame(row, caller, scene)
            self.judge(row, caller, got, row.cells[caller])
            if caller in refused and changed:
                self.wrong.append(f"{row}, by {caller}: what was refused changed something")
        kind, is_told = row.called[0], row.called[0] in TOLD and "partner gone" not in row.about
        expected = Counter((kind, self.people[who].id) for who in taken if is_told)
        heard = await self._heard()
        if heard != expected:
            self.wrong.append(f"{row}: the others heard {heard}, not {expected}")

    async def _sends_frame(self, row: Row, caller: str, scene: Scene) -> tuple[str, bool]:
        """Send a frame on a new socket; answer what came back, and whether anything changed."""
        where, *how = row.about.split(", ")
        chat = None if where == "all" else self.chat(where, caller, scene)
        person, headers = self.people[acting(caller)], {}
        if caller != "nobody":
            token = expired(person.access) if caller == "expired" else person.access
            headers = {"Authorization": f"Bearer {token}"}
        path = row.called[1].replace("{chat_id}", str(chat))
        try:
            line = Line(await person.client.ws_connect(path, headers=headers))
        except aiohttp.WSServerHandshakeError as refusal:
            return f"x{refusal.status}", False
        person.lines.append(line)
        if path != "/ws":
            await line.hears("ready")
        frame = await self._new_frame(row, how, chat, caller, scene)
        before = await self.everything()
        got = await self._answer(line, frame, row.cells[caller], person)
        after = await self.everything()
        await line.close()
        return got, after != before

    async def _new_frame(
        self, row: Row, how: list[str], chat: Any, caller: str, scene: Scene
    ) -> dict[str, Any]:
        kind, path = row.called
        frame: dict[str, Any] = {"type": kind, "ref": "asked"}
        what = how.pop(0) if how and not how[0].startswith("naming ") else ""
        if kind == "message":
            frame |= await self.new_message(what, chat, caller, scene)
        elif kind == "read":
            frame["message_id"] = await self.message(what, chat, caller, scene)
        elif kind == "auth":
            frame["token"] = await self._other_token(what, caller)
        elif kind == "sync" and "among" in what:
            frame["chats"] = {str(self.foreign if "foreign" in what else chat): 0}
        elif kind == "sync":
            frame["after"] = 0
        if how:
            frame["chat_id"] = self.chat(how[0].removeprefix("naming "), caller, scene)
        elif path == "/ws" and kind not in ("auth", "ping") and "chats" not in frame:
            frame["chat_id"] = chat
        return frame

    async def _other_token(self, what: str, caller: str) -> str:
        again = await self.again(self.people["mate" if "another's" in what else acting(caller)])
        if what == "ended token":  # at another server, and no hint of it was heard
            session = claims_of(again.access)["sid"]
            await self._sql.execute("update sessions set ended_at = now() where id = $1", session)
        if what == "refresh token":
            return again.refresh
        return expired(again.access) if what == "expired token" else again.access

    async def _answer(
        self, line: Line, frame: dict[str, Any], expected: str, person: Person
    ) -> str:
        """Send a frame; answer what came back, before the refusal of one sent after it or later."""
        await line.sends(**frame)
        end = {"type": "read", "chat_id": NOBODYS, "message_id": str(uuid4()), "ref": "end"}
        await line.sends(**end)
        # Of chats that it came into lately a socket may still hear that they are live.
        asked = {frame.get("chat_id"), *map(int, frame.get("chats", ()))} - {None}
        answers: list[str] = []
        is_end = False
        while not is_end or (not answers and expected in ("read", "ready")):
            heard = await line.hears("ack", "read", "ready", "auth", "pong", "error")
            is_end = is_end or heard.get("ref") == "end"
            if heard["type"] == "read" and heard["data"]["reader_id"] != person.id:
                continue
            if heard["type"] == "ready" and asked and heard["data"]["chat_id"] not in asked:
                continue
            if heard["type"] != "error":
                answers.append(heard["type"])
            elif heard["ref"] == "asked":
                answers.append(code_of(heard["data"]))
        if frame["type"] == "read" and answers == ["read", "ack"]:
            answers.pop()  # both come
        return " ".join(answers) or "-"

    async def watch(self) -> None:
        """Let others in the chats listen to what becomes of the frames."""
        for person, chats in (
            (self.people["mate"], [self.scene.group]),
            (self.people["partner"], [self.foreign, *self.personal.values()]),
        ):
            line = Line(await person.client.ws_connect("/ws", headers=person.headers))
            person.lines.append(line)
            self._watching.append((person, line, chats))

    async def _heard(self) -> Counter[tuple[str, int]]:
        """Answer what those were told since they were last asked, and of whom."""
        heard: Counter[tuple[str, int]] = Counter()
        for person, line, chats in self._watching:
            marks = {(await person.says(chat, "a mark"))["id"] for chat in chats}
            while marks:
                frame = await line.hears("message", "read", "typing")
                data, actors = frame["data"], {"sender_id", "reader_id", "user_id"}
                [actor] = [data[name] for name in actors & data.keys()]
                marks -= {data.get("id")}
                if actor not in [watching.id for watching, _, _ in self._watching]:
                    heard[frame["type"], actor] += 1
        return heard


def code_of(problem: dict[str, Any]) -> str:
    """Answer the table's code of a problem."""
    status, slug = str(problem["status"]), problem["type"]
    return CODES.get((status, slug), f"{status} {slug}")
