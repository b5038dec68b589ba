"""Random calls by a few people, each answer held against a model of the contract in memory.

`./run test` makes a few short runs, always the same ones. With FUZZ=long there are many, others
each time; a failure tells its FUZZ_SEED, which makes the same runs again, and every call of the
shortest one that fails.
"""

import asyncio
import itertools
import json
import os
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlencode

import aiohttp
import hypothesis
import pytest
import uvloop
from aiohttp.test_utils import TestServer
from hypothesis import HealthCheck, Phase, note
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import messenger
from plumbing import search
from support import model
from support.databases import Databases, with_database
from support.fuzzing import LONG
from support.model import Answer, Chat, Page, Person, Refused, Shown, World
from support.people import HEAR_SECONDS, NOBODYS, new_id
from support.servers import SECRET_KEY

RUNS = 500 if LONG else 25
STEPS = 30
SETTINGS = messenger.Settings(bcrypt_cost=4, rate_limits="off")
PEOPLE_MAX = 7
LIMIT_MAX = 100
TOLD_CHARS = 200  # of an answer, in the report of a failure
SIGNED_IN_MIN = 2  # nobody signs out or goes where fewer would be left

ValueT = TypeVar("ValueT")


class Site:
    """A server on a database of its own, and the way to it; the loop runs during calls only."""

    def __init__(self, runner: asyncio.Runner, cluster: str, databases: Databases) -> None:
        self.runs = itertools.count(1)
        self._wait: Callable[[Awaitable[Any]], Any] = runner.get_loop().run_until_complete
        self._databases = databases
        self._database = self._wait(databases.take())
        url = with_database(cluster, self._database)
        self._server = TestServer(messenger.make_app(SETTINGS, url, SECRET_KEY))
        self._wait(self._open())

    async def _open(self) -> None:
        await self._server.start_server()
        timeout = aiohttp.ClientTimeout(total=HEAR_SECONDS)
        self._client = aiohttp.ClientSession(self._server.make_url("/"), timeout=timeout)

    async def _close(self) -> None:
        await self._client.close()
        await self._server.close()

    def close(self) -> None:
        """Stop the server, and drop its database."""
        self._wait(self._close())
        self._databases.drop(self._database)

    def ask(
        self, method: str, path: str, body: Any, token: str | None
    ) -> tuple[aiohttp.ClientResponse, Any]:
        """Send a request and read the answer, and its JSON if it has any."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}

        async def ask() -> tuple[aiohttp.ClientResponse, Any]:
            answer = await self._client.request(method, path, json=body, headers=headers)
            text = await answer.text()
            return answer, json.loads(text) if text else None

        found: tuple[aiohttp.ClientResponse, Any] = self._wait(ask())
        return found


@pytest.fixture
def site(cluster: str, databases: Databases, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The server that every run of the machine talks to. What it answers does not depend on how
    busy the machine is."""
    monkeypatch.setattr(messenger, "LEAVING_SECONDS", HEAR_SECONDS)
    monkeypatch.setattr(search, "INDEX_SECONDS", HEAR_SECONDS)
    with asyncio.Runner(debug=True, loop_factory=uvloop.new_event_loop) as runner:
        made = Site(runner, cluster, databases)
        yield made
        made.close()


def in_order(told: Any) -> Any:
    """The same JSON with its readers by user id: the contract does not order them."""
    if isinstance(told, list):
        return [in_order(each) for each in told]
    if isinstance(told, dict):
        told = {name: in_order(value) for name, value in told.items()}
        if "read_by" in told:
            told["read_by"].sort(key=lambda reader: reader["user_id"])
    return told


def pick(values: Sequence[ValueT], number: int) -> ValueT:
    """One of some values, the first for 0."""
    return values[number % len(values)]


# What the rules draw. A number is a place in a list that is known only then.
NUMBER = st.integers(0, 23)
LETTER = st.sampled_from("abcdefgABC")  # of a name
NEW_LETTER = st.sampled_from("fghijA")
WORD = st.sampled_from(("tea", "Tea", "чай", "ЧАЙ", "milk"))
TEXT = st.lists(WORD, min_size=1, max_size=3).map(" ".join)
ROLE = st.sampled_from((None, None, "member", "admin", "owner"))
LIMIT = st.integers(1, 4)
SEQ = st.none() | st.integers(0, 8)
WAY = st.sampled_from(("next", "prev"))
RARELY = st.sampled_from((False, False, False, True))


def can_go(machine: "Conversations") -> bool:
    """Whether enough people would be left."""
    return len(machine.signed_in()) > SIGNED_IN_MIN


def has_group(machine: "Conversations") -> bool:
    """Whether there is a group of more than one."""
    return any(each.is_group and len(each.members) > 1 for each in machine.world.chats)


class Conversations(RuleBasedStateMachine):
    """A few people who do and look at whatever comes to mind, where they may and where not."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.prefix = f"run{next(site.runs)}_"
        self.world = World()
        self.concerned: list[Chat] = []  # what the step is about
        self.touched: list[Chat] = []  # what of that it changed
        self.numbers: dict[Chat, int] = {}  # up to which each chat's changes were followed
        self.watermarks: dict[tuple[int, int], int] = {}  # by the ids of chat and reader
        self.looks = 0

    # ---- Calls

    def ask(
        self, asker: Person | None, method: str, path: str, body: Any = None
    ) -> tuple[aiohttp.ClientResponse, Any]:
        """Send a request of somebody who is signed in, or of anybody."""
        token = asker.session.token if asker and asker.session else None
        path = path if path.startswith("/api/") else f"/api/v1{path}"
        answer, told = self.site.ask(method, path, body, token)
        who = asker.name if asker else "-"
        note(f"{who} {method} {path} {body or ''}: {answer.status} {str(told)[:TOLD_CHARS]}")
        return answer, in_order(told)

    def call(
        self, asker: Person | None, method: str, path: str, decide: Callable[[Any], Answer],
        body: Any = None,
    ) -> None:
        """Send a request, and hold the answer against what the model decides."""
        answer, told = self.ask(asker, method, path, body)
        try:
            expected = decide(told or {})
        except Refused as refused:
            self.expect_refusal(answer, told, refused)
        else:
            assert (answer.status, told) == expected
            assert ("Location" in answer.headers) == (answer.status == 201)
            if method != "GET":
                self.touched = self.concerned

    def expect_refusal(self, answer: aiohttp.ClientResponse, told: Any, refused: Refused) -> None:
        """Hold an answer against a refusal by the model."""
        assert answer.status in {model.STATUS_OF[reason] for reason in refused.reasons}, told
        assert answer.content_type == "application/problem+json"
        assert told["type"] in refused.reasons
        assert answer.status == told["status"] == model.STATUS_OF[told["type"]]
        assert told["title"]
        assert told["detail"]
        assert bool(told.get("errors")) == (answer.status == 422)

    def look(
        self, asker: Person, path: str, page: Callable[..., Page], query: Shown,
        way: str = "next", hops: int = 2,
    ) -> None:
        """Hold a page of a list against the model's, and some of the pages that it links to."""
        query = {name: value for name, value in query.items() if value is not None}
        path = f"{path}?{urlencode(query)}"
        for _ in range(1 + hops):
            answer, told = self.ask(asker, "GET", path)
            try:
                expected = page(**query)
            except Refused as refused:
                return self.expect_refusal(answer, told, refused)
            assert (answer.status, told) == (200, expected.values)
            assert answer.links.keys() == expected.more.keys()
            if way not in answer.links:
                return None
            assert answer.headers["Link"].startswith("</api/v1/")
            path, query = str(answer.links[way]["url"].relative()), expected.more[way]
        return None

    # ---- Who and what

    def signed_in(self) -> list[Person]:
        """The people who can ask."""
        return [person for person in self.world.people if person.session]

    def anybody(self, number: int) -> Person:
        """Somebody who can ask."""
        return pick(self.signed_in(), number)

    def about(self, where: int, who: int, groups: bool = False) -> tuple[Chat, Person, str]:
        """A chat (most often a group, if that is asked for), somebody who asks for it, and its
        path. Participants ask more often than others, its owner and admins more often still."""
        living = [each for each in self.world.chats if len(each.members) > 1]
        some = [each for each in living if each.is_group or not groups]
        found = pick(some * 4 + self.world.chats, where)
        self.concerned = [found]
        inside = [each for each in found.members if each.person.session]
        leading = [each for each in inside if each.role != "member"]
        asker = pick([each.person for each in (leading + inside) * 2] + self.signed_in(), who)
        return found, asker, f"/chats/{found.id}"

    def message_id(self, chat: Chat, number: int) -> str:
        """The id of a message of a chat, the newest ones first; or one of another chat, or none."""
        here = [message.id for message in reversed(chat.messages)]
        elsewhere = [each.messages[-1].id for each in self.world.chats if each.messages]
        return pick([NOBODYS, *elsewhere] if number > 18 or not here else here, number)

    def about_message(self, where: int, who: int, which: int) -> tuple[Chat, Person, str, str]:
        """The same, and the id of a message, the asker's own more often than others'."""
        found, asker, path = self.about(where, who)
        own = [message.id for message in reversed(found.messages) if message.sender is asker]
        any_other = self.message_id(found, which)
        return found, asker, path, pick(own, which // 2) if own and which % 2 == 0 else any_other

    # ---- Accounts

    @initialize()
    def meet(self) -> None:
        """Five people: four of them share a group that has an admin, two a personal chat."""
        for number, letter in enumerate("abcde"):
            self.registers(letter, letter)
            self.logs_in(number, False)
        self.creates(0, [1, 2, 3], "the first")
        self.creates(1, [0], None)
        self.gives_role(0, 0, 1, "admin", True)
        for where, who in ((0, 0), (0, 3), (1, 0)):
            self.posts(where, who, "tea")
        self.touched = list(self.world.chats)

    @rule(letter=NEW_LETTER, mailbox=NEW_LETTER)
    @precondition(lambda self: len(self.world.people) < PEOPLE_MAX)
    def registers(self, letter: str, mailbox: str) -> None:
        """Somebody makes an account, and may find name or email taken."""
        body = {
            "username": self.prefix + letter, "email": f"{self.prefix}{mailbox}@example.com",
            "password": "a first password",
        }
        self.call(
            None, "POST", "/users", lambda told: model.register(self.world, told, body), body
        )

    @rule(number=NUMBER, wrong=RARELY)
    def logs_in(self, number: int, wrong: bool) -> None:
        """Anybody logs in, also who is signed in, inactive or deleted."""
        person = pick(self.world.people, number)
        body = {"email": person.email.upper(), "password": person.password + "!" * wrong}
        self.call(
            None, "POST", "/users/login", lambda told: model.login(self.world, told, body), body
        )
        self.tries_every_session(person)

    def account(self, who: int, whose: int) -> tuple[Person, Person, str]:
        """Somebody who asks, the account that it is about, most often their own, and its path."""
        asker = self.anybody(who)
        target = pick([asker] * 8 + self.world.people, whose)
        self.concerned = [chat for chat in self.world.chats if chat.member(target)]
        return asker, target, f"/users/{target.id}"

    def changes_user(self, who: int, whose: int, body: Shown) -> Person:
        """Somebody changes an account."""
        asker, target, path = self.account(who, whose)
        if "password" in body:
            body["current_password"] += asker.password
        self.call(
            asker, "PUT", path, lambda told: model.change_user(self.world, asker, target, body),
            body,
        )
        return asker

    @rule(who=NUMBER, whose=NUMBER, letter=LETTER, is_name=st.booleans(), wrong=RARELY)
    def changes(self, who: int, whose: int, letter: str, is_name: bool, wrong: bool) -> None:
        """Somebody takes another name, or another password, which ends their other sessions."""
        body = {"username": self.prefix + letter}
        if not is_name:
            body = {"password": letter * 8, "current_password": "!" * wrong}
        self.tries_every_session(self.changes_user(who, whose, body))

    @rule(who=NUMBER, whose=NUMBER, how=st.sampled_from(("logs out", "is inactive", "deletes")))
    @precondition(can_go)
    def goes(self, who: int, whose: int, how: str) -> None:
        """Somebody ends their latest session, or makes inactive or deletes an account, which ends
        all of them."""
        asker, target, path = self.account(who, whose)
        if how == "is inactive":
            self.changes_user(who, whose, {"is_active": False})
        elif how == "deletes":
            self.call(
                asker, "DELETE", path, lambda told: model.delete_user(self.world, asker, target)
            )
        else:
            self.call(asker, "POST", "/users/logout", lambda told: model.logout(asker))
        self.tries_every_session(asker)

    def tries_every_session(self, person: Person) -> None:
        """See which sessions of somebody have ended."""
        for session in person.sessions:
            answer, told = self.site.ask("GET", "/api/v1/users/me", None, session.token)
            if session.is_ended:
                self.expect_refusal(answer, told, Refused("unauthorized"))
            else:
                assert (answer.status, told) == (200, model.shown_user(person, person))

    @rule(who=NUMBER, whose=NUMBER, limit=LIMIT, letter=st.just("") | LETTER)
    def looks_at_users(self, who: int, whose: int, limit: int, letter: str) -> None:
        """Somebody looks at an account, and for others by the start of their names."""
        asker, target, path = self.account(who, whose)
        self.call(asker, "GET", path, lambda told: model.get_user(asker, target))
        query = {"limit": limit, "q": self.prefix.upper() + letter}
        self.look(asker, "/users", partial(model.page_of_users, self.world), query)

    # ---- Chats

    @rule(who=NUMBER, whom=st.lists(NUMBER, max_size=4), name=st.none() | TEXT)
    def creates(self, who: int, whom: list[int], name: str | None) -> None:
        """Somebody asks for a group, or (without a name) for a personal chat: perhaps with nobody
        else, with too many or with the deleted."""
        asker = self.anybody(who)
        others = [pick(self.world.people, each).id for each in whom]
        body = {"is_group": name is not None, "participant_ids": others}
        body |= {"name": name} if name else {}
        self.call(
            asker, "POST", "/chats", lambda told: model.create_chat(self.world, asker, told, body),
            body,
        )
        self.touched = self.world.chats[-1:]

    @rule(where=NUMBER, who=NUMBER, name=TEXT)
    @precondition(has_group)
    def renames(self, where: int, who: int, name: str) -> None:
        """Somebody renames a chat."""
        chat, asker, path = self.about(where, who, groups=True)
        self.call(
            asker, "PATCH", path, lambda told: model.rename(chat, asker, name), {"name": name}
        )

    @rule(where=NUMBER, who=NUMBER, whom=NUMBER, role=ROLE, by_path=st.booleans())
    @precondition(has_group)
    def adds(self, where: int, who: int, whom: int, role: str | None, by_path: bool) -> None:
        """Somebody adds somebody, with a role or without."""
        chat, asker, path = self.about(where, who, groups=True)
        outside = [each for each in self.world.people if not chat.member(each)]
        target = pick(outside * 3 + self.world.people, whom)
        self.puts(chat, asker, path, target, role, by_path)

    @rule(where=NUMBER, who=NUMBER, whom=NUMBER, role=ROLE, by_path=st.booleans())
    @precondition(has_group)
    def gives_role(self, where: int, who: int, whom: int, role: str | None, by_path: bool) -> None:
        """Somebody gives a participant a role, perhaps themself, or hands ownership on."""
        chat, asker, path = self.about(where, who, groups=True)
        inside = [each.person for each in chat.members[::-1]]
        target = pick(inside * 3 + self.world.people, whom)
        self.puts(chat, asker, path, target, role, by_path)

    def puts(
        self, chat: Chat, asker: Person, path: str, target: Person, role: str | None, by_path: bool
    ) -> None:
        """Put somebody into a chat, named by the path or by the body."""
        body = {"user_id": target.id} if not by_path else {}
        body |= {"role": role} if role else {}
        self.call(
            asker, "POST", f"{path}/participants" + f"/{target.id}" * by_path,
            lambda told: model.put(chat, asker, target, role), body or None,
        )

    @rule(where=NUMBER, who=NUMBER, whom=NUMBER)
    @precondition(has_group)
    def removes(self, where: int, who: int, whom: int) -> None:
        """Somebody takes somebody out."""
        chat, asker, path = self.about(where, who, groups=True)
        inside = [each.person for each in chat.members]
        self.takes_out(chat, asker, path, pick(inside * 3 + self.world.people, whom))

    @rule(where=NUMBER, who=NUMBER)
    @precondition(has_group)
    def leaves(self, where: int, who: int) -> None:
        """Somebody leaves."""
        chat, asker, path = self.about(where, who, groups=True)
        self.takes_out(chat, asker, path, asker)

    def takes_out(self, chat: Chat, asker: Person, path: str, target: Person) -> None:
        """Take somebody out of a chat."""
        self.call(
            asker, "DELETE", f"{path}/participants/{target.id}",
            lambda told: model.remove(chat, asker, target),
        )

    @rule(where=NUMBER, who=NUMBER, limit=LIMIT)
    def looks_at_chats(self, where: int, who: int, limit: int) -> None:
        """Somebody looks at a chat and who is in it, and lists their own."""
        chat, asker, path = self.about(where, who)
        self.call(asker, "GET", path, lambda told: model.get_chat(chat, asker))
        page = partial(model.page_of_participants, chat, asker)
        self.look(asker, f"{path}/participants", page, {"limit": limit})
        page = partial(model.page_of_chats, self.world, asker)
        self.look(asker, "/chats", page, {"limit": limit})

    # ---- Messages

    def sends(self, chat: Chat, asker: Person, path: str, **body: Any) -> None:
        """Post a message."""
        self.call(
            asker, "POST", f"{path}/messages",
            lambda told: model.post(self.world, chat, asker, told, body), body,
        )

    @rule(where=NUMBER, who=NUMBER, text=TEXT)
    def posts(self, where: int, who: int, text: str) -> None:
        """Somebody posts, and the server chooses the id."""
        self.sends(*self.about(where, who), text=text)

    @rule(where=NUMBER, who=NUMBER, text=TEXT, reply=NUMBER)
    def replies(self, where: int, who: int, text: str, reply: int) -> None:
        """Somebody replies, under a fresh id of their own."""
        chat, asker, path = self.about(where, who)
        reply_to = self.message_id(chat, reply)
        self.sends(chat, asker, path, text=text, id=new_id(), reply_to=reply_to)

    @rule(where=NUMBER, who=NUMBER, which=NUMBER, text=TEXT, reply=st.none() | NUMBER)
    def posts_again(self, where: int, who: int, which: int, text: str, reply: int | None) -> None:
        """Somebody posts under an id that is used already, most often by themself."""
        chat, asker, path, message_id = self.about_message(where, who, which)
        more = {} if reply is None else {"reply_to": self.message_id(chat, reply)}
        self.sends(chat, asker, path, text=text, id=message_id, **more)

    @rule(where=NUMBER, who=NUMBER, which=NUMBER, text=st.none() | TEXT)
    def edits(self, where: int, who: int, which: int, text: str | None) -> None:
        """Somebody edits a message, theirs more often than others', perhaps into what it is."""
        chat, asker, path, message_id = self.about_message(where, who, which)
        now = chat.message(message_id)
        new = text or (now.text if now else "") or "tea"
        self.call(
            asker, "PATCH", f"{path}/messages/{message_id}",
            lambda told: model.edit(chat, asker, message_id, new), {"text": new},
        )

    @rule(where=NUMBER, who=NUMBER, which=NUMBER)
    def deletes(self, where: int, who: int, which: int) -> None:
        """Somebody deletes a message."""
        chat, asker, path, message_id = self.about_message(where, who, which)
        self.call(
            asker, "DELETE", f"{path}/messages/{message_id}",
            lambda told: model.delete(chat, asker, message_id),
        )

    @rule(where=NUMBER, who=NUMBER, which=st.lists(NUMBER, min_size=1, max_size=3))
    def reads(self, where: int, who: int, which: list[int]) -> None:
        """Somebody reads up to one message after the other, forward or back."""
        chat, asker, path = self.about(where, who)
        for each in which:
            body = {"message_id": self.message_id(chat, each)}
            self.call(
                asker, "POST", f"{path}/read",
                lambda told, body=body: model.read(chat, asker, body["message_id"]), body,
            )

    @rule(where=NUMBER, who=NUMBER, which=NUMBER, q=WORD | TEXT | st.just("?"))
    def looks_at_messages(self, where: int, who: int, which: int, q: str) -> None:
        """Somebody looks at a message, and searches for words before it."""
        chat, asker, path = self.about(where, who)
        message_id = self.message_id(chat, which)
        self.call(
            asker, "GET", f"{path}/messages/{message_id}",
            lambda told: model.get_message(chat, asker, message_id),
        )
        query = {"limit": 2, "q": q, "before": which if which % 2 else None}
        self.look(asker, f"{path}/messages", partial(model.page_found, chat, asker), query)

    @rule(where=NUMBER, who=NUMBER, limit=LIMIT, before=SEQ, after=SEQ, way=WAY, both=RARELY)
    def looks_at_history(
        self, where: int, who: int, limit: int, before: int | None, after: int | None, way: str,
        both: bool,
    ) -> None:
        """Somebody pages through a chat, one way or the other, and through what has changed."""
        chat, asker, path = self.about(where, who)
        page = partial(model.page_of_changes, chat, asker)
        self.look(asker, f"{path}/changes", page, {"limit": limit, "after": after})
        if not both and before is not None:
            after = None
        page = partial(model.page_of_history, chat, asker)
        query = {"limit": limit, "before": before, "after": after}
        self.look(asker, f"{path}/messages", page, query, way)

    # ---- After each step

    @invariant()
    def chats_are_what_they_should_be(self) -> None:
        """What the step changed is as the model has it, for one participant or another, and their
        other chats still are."""
        self.looks += 1
        for chat in self.touched:
            inside = [each for each in self.signed_in() if chat.member(each)]
            if inside:
                reader = pick(inside, self.looks)
                self.lists(reader)
                self.follows(chat, reader)
        self.concerned = self.touched = []

    def lists(self, reader: Person) -> None:
        """See all chats of somebody as they are now; no watermark has gone back."""
        _, told = self.ask(reader, "GET", f"/chats?limit={LIMIT_MAX}")
        assert told == model.page_of_chats(self.world, reader, LIMIT_MAX).values
        for chat in told:
            for each in chat["participants"]:
                key = (chat["id"], each["user_id"])
                assert each["last_read_seq"] >= self.watermarks.get(key, 0)
                self.watermarks[key] = each["last_read_seq"]

    def follows(self, chat: Chat, reader: Person) -> None:
        """See every message as it is now; each step took one number at most, so the changes after
        what was known have the next ones, without a hole."""
        _, told = self.ask(reader, "GET", f"/chats/{chat.id}/changes?limit={LIMIT_MAX}")
        assert told == model.page_of_changes(chat, reader, LIMIT_MAX).values
        known = self.numbers.get(chat, 0)
        after = [each["rev"] for each in told if each["rev"] > known]
        assert after == list(range(known + 1, known + 1 + len(after)))
        self.numbers[chat] = known + len(after)


@pytest.mark.timeout(0 if LONG else 600)  # shrinking a failure takes up to five minutes
def test_the_server_does_what_the_contract_says(site: Site) -> None:
    """Whatever a few people do, in whatever order, every answer is the one that the contract says,
    to participants, outsiders and former members."""
    settings = hypothesis.settings(
        max_examples=RUNS, stateful_step_count=STEPS, derandomize=not LONG, print_blob=LONG,
        database=None, deadline=None, report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )

    def begin() -> Conversations:
        return Conversations(site)

    if LONG:
        number = int(os.environ.get("FUZZ_SEED") or secrets.randbits(32))
        print(f"FUZZ_SEED={number}")  # shown by pytest if it fails
        hypothesis.seed(number)(begin)
    run_state_machine_as_test(begin, settings=settings)
