"""Registering, logging in, tokens and sessions, and looking people up."""

import asyncio
import base64
import hashlib
import json
import re
import time
import unicodedata
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

import aiohttp
import asyncpg
import bcrypt
import jwt
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

import messenger
from plumbing import endpoints, guard
from plumbing.text import folded
from support.databases import LATER
from support.people import PASSWORD, Line, Person, logs_out, pages
from support.raw import RawConnection
from support.servers import SECRET_KEY, SETTINGS

Client = TestClient[Any, Any]
RFC3339_UTC = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"


@pytest.fixture
async def anyone(server: TestServer, aiohttp_client: Callable[..., Awaitable[Client]]) -> Client:
    """A client of nobody's."""
    return await aiohttp_client(server)


async def posts(
    client: Client, path: str, body: Any = None, token: str | None = None
) -> tuple[int, Any]:
    """POST and answer the status and the JSON."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with client.post(f"/api/v1{path}", json=body, headers=headers) as answer:
        return answer.status, await answer.json() if answer.status != 204 else None


names = iter(f"user_{number}" for number in range(10**6))


async def registers(client: Client, **given: str) -> tuple[int, Any]:
    """Register; what is not given is made up."""
    name = next(names)
    body = {"email": f"{name}@example.com", "username": name, "password": PASSWORD} | given
    return await posts(client, "/users", body)


async def logs_in(client: Client, email: str, password: str = PASSWORD) -> tuple[int, Any]:
    """Try to log in."""
    return await posts(client, "/users/login", {"email": email, "password": password})


def checked_hashes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The hashes that a password is checked against from now on: each costs a bcrypt call."""
    hashes: list[bytes] = []
    real = bcrypt.checkpw

    def spy(password: bytes, hashed: bytes) -> bool:
        hashes.append(hashed)
        return real(password, hashed)

    monkeypatch.setattr(bcrypt, "checkpw", spy)
    return hashes


async def refreshes(client: Client, token: str) -> tuple[int, Any]:
    """Refresh with a token in the body."""
    return await posts(client, "/users/refresh", {"refresh_token": token})


async def may_ask(client: Client, token: str) -> bool:
    """Tell whether an access token is let in; a refusal is always 401."""
    headers = {"Authorization": f"Bearer {token}"}
    async with client.get("/api/v1/users/me", headers=headers) as answer:
        assert answer.status in (200, 401)
        return answer.status == 200


def at(answer: tuple[int, Any]) -> tuple[int, str]:
    """The status of a refusal and the field that it names."""
    status, problem = answer
    return status, problem["errors"][0]["loc"] if "errors" in problem else problem.get("type", "")


# ---- Registering


async def test_registration_answers_the_user_and_where_it_is(anyone: Client) -> None:
    """Registering answers 201 with the user, a Location that leads to it, and no password."""
    body = {"email": "Alice@example.com", "username": "Алиса_1", "password": PASSWORD}
    async with anyone.post("/api/v1/users", json=body) as answer:
        user = await answer.json()
        assert answer.status == 201
        assert answer.headers["Location"] == f"/api/v1/users/{user['id']}"
        assert (await answer.text()).endswith("\n")
    assert user.keys() == {"id", "username", "is_active", "created_at", "email"}
    assert (user["username"], user["email"]) == ("Алиса_1", "Alice@example.com")
    assert user["is_active"] is True
    assert user["id"] > 0
    assert re.fullmatch(RFC3339_UTC, user["created_at"])
    _, tokens = await logs_in(anyone, "alice@example.com")
    headers = {"Authorization": f"Bearer {tokens['access_token']}"}
    async with anyone.get(answer.headers["Location"], headers=headers) as found:
        assert await found.json() == user


@pytest.mark.parametrize(
    ("field", "pairs"),
    [
        (
            "email",
            [
                ("alice@example.com", "ALICE@Example.COM"),
                ("почта@example.com", "ПОЧТА@example.com"),
                ("a@bücher.example", "A@BÜCHER.EXAMPLE"),
                ("b@bücher.example", "b@xn--bcher-kva.example"),
                ("σίσυφος@example.com", "ΣΊΣΥΦΟΣ@example.com"),
            ],
        ),
        (
            "username",
            [
                ("alice", "ALICE"),
                ("Привет", "пРИВЕТ"),
                ("σίσυφος", "ΣΊΣΥΦΟΣ"),
                ("İzmir", "İzmir".lower()),
                ("straße", "STRASSE"),
                ("ﬁsh_1", "FISH_1"),
                ("Ａｌｉｃｅ１", "alice1"),
                ("Zoe\u0308", "ZOË"),
                ("ǆungla", "ǅungla"),
            ],
        ),
    ],
)
async def test_names_are_unique_in_any_case_and_script(
    anyone: Client, field: str, pairs: list[tuple[str, str]]
) -> None:
    """A name or email that differs only in case or in compatible characters is taken: 409, in every
    script."""
    for first, second in pairs:
        status, problem = await registers(anyone, **{field: first})
        assert status == 201, (first, problem)
        for again in (second, first):
            status, problem = await registers(anyone, **{field: again})
            assert (status, problem.get("type")) == (409, f"{field}-taken"), (first, again)


async def test_a_name_is_given_once_to_many_at_once(anyone: Client) -> None:
    """Of ten people who register one name at the same time one gets it, and nine get a 409."""
    answers = await asyncio.gather(*(registers(anyone, username="Жанна") for _ in range(10)))
    assert sorted(status for status, _ in answers) == [201] + [409] * 9


async def test_username_is_letters_digits_and_underscores(anyone: Client) -> None:
    """A username is 3 to 50 letters of any script, digits and underscores; else 422 says so."""
    for name in ("abc", "a" * 50, "Їжак_7", "李小龍", "काली", "مریم", "___", "007", "й" * 50):
        status, user = await registers(anyone, username=name)
        assert (status, user.get("username")) == (201, name)
    wrong = (
        "", "ab", "a" * 51, "a b", "a-b", "a.b", "a@b", "abc\n", " abc", "a\0bc", "🙂🙂🙂",
        "a\u200bbc", "a\u202ebc", "\u0301abc", "abc\u00a0", "a/b", "<b>x</b>", "abc\ufeff",
    )
    for name in wrong:
        assert at(await registers(anyone, username=name)) == (422, "$.username"), repr(name)


@pytest.mark.parametrize("name", [
    *(f"ann{hidden}" for hidden in (
        "\u3164", "\uffa0", "\u115f", "\ufe0f", "\u034f", "\U000e0100", "\u180b", "\u17b4",
        "\U000e01ef", "\u00ad", "\u200d", "\u2060")),
    "\u3164" * 3, "a\u034fnn", "ann" + "\u0336" * 40, "ann" + "\u0301" * 5,
    "a\u0323\u0336\u0335\u0337\u0338nn",
])
async def test_username_holds_nothing_unseen(anyone: Client, name: str) -> None:
    """A username with a character that shows nothing, or with over three marks on a letter, would
    look like another's: 422, as a new name too."""
    assert at(await registers(anyone, username=name)) == (422, "$.username")


async def test_username_is_measured_in_nfc(anyone: Client) -> None:
    """A username has 3 to 50 characters however its accents are written, and up to three marks on
    each letter."""
    for written in ("ếộữ" * 7, "ü" * 50, "ắị_", "한국어"):
        sent = unicodedata.normalize("NFD", written)
        status, user = await registers(anyone, username=sent)
        assert (status, user.get("username")) == (201, written)
        assert (await registers(anyone, username=written))[0] == 409
    status, _ = await registers(anyone, username="a\u0336\u0335\u0337bc")
    assert status == 201
    for written in ("ü" * 51, "üü", "ế" * 51):
        sent = unicodedata.normalize("NFD", written)
        assert at(await registers(anyone, username=sent)) == (422, "$.username")


async def test_name_of_before_the_rule_is_kept(alice: Person, sql: asyncpg.Connection) -> None:
    """An account keeps the name that it has, and changes other things beside it."""
    old = "ann\u3164"
    await sql.execute("update users set username = $2, username_key = $3 where id = $1",
                      alice.id, old, folded(old))
    assert (await alice.gets("/users/me"))["username"] == old
    body = {"password": "another password", "current_password": PASSWORD}
    assert (await alice.expects(200, "PUT", f"/users/{alice.id}", body))["username"] == old
    assert (await logs_in(alice.client, alice.email, "another password"))[0] == 200


async def test_email_is_validated(anyone: Client) -> None:
    """Text that is not an email is refused with a 422 that names the field."""
    for email in ("a+b@example.com", "почта@пример.рф", "x@sub.example.org", "o'neil@example.com"):
        status, _ = await registers(anyone, email=email)
        assert status == 201, email
    wrong = (
        "", "a", "a@", "@example.com", "a b@example.com", "a@b c.com", "a@example..com",
        "a@@example.com", ".a@example.com", "a@-example.com", "a\0@example.com", "a@example.com\n",
        "a@example.com,b@example.com", "A <a@example.com>", "a@" + "b" * 64 + ".com",
        "a" * 60 + "@" + "b.co" * 60,
    )
    for email in wrong:
        assert at(await registers(anyone, email=email)) == (422, "$.email"), repr(email)


async def test_password_is_8_to_100_characters_of_any_kind(anyone: Client) -> None:
    """A password of 8 to 100 characters, whichever they are, registers and logs in again."""
    for password in ("x" * 8, "п" * 100, "🙂" * 100, "\0" * 8, " " * 8, '"\\\n\r\t/\u200b\u0301'):
        status, user = await registers(anyone, password=password)
        assert status == 201, repr(password)
        assert (await logs_in(anyone, user["email"], password))[0] == 200, repr(password)
        assert (await logs_in(anyone, user["email"], password[:-1]))[0] == 401, repr(password)
    for password in ("", "x" * 7, "🙂" * 7, "x" * 101):
        assert at(await registers(anyone, password=password)) == (422, "$.password"), password


COMPOSED = "pässwörd ế 각"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)


@pytest.mark.parametrize(("first", "then"), [
    (COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED), ("\u212bngström", "Ångström"),
])
async def test_password_is_the_same_however_it_is_written(
    anyone: Client, first: str, then: str
) -> None:
    """Keyboards differ in how they write an accent: a password logs in from each of them, confirms
    a change, and is measured alike."""
    _, user = await registers(anyone, password=first)
    for written in (first, then):
        assert (await logs_in(anyone, user["email"], written))[0] == 200
        assert (await logs_in(anyone, user["email"], written + "\u0301"))[0] == 401
    _, tokens = await logs_in(anyone, user["email"], then)
    body = {"password": "neü" + first, "current_password": then}
    headers = {"Authorization": f"Bearer {tokens['access_token']}"}
    path = f"/api/v1/users/{user['id']}"
    async with anyone.put(path, json=body, headers=headers) as answer:
        assert answer.status == 200
    assert (await logs_in(anyone, user["email"], "neu\u0308" + then))[0] == 200
    body = {"password": "u\u0308" * 7, "current_password": "neü" + then}
    async with anyone.put(path, json=body, headers=headers) as answer:
        assert at((answer.status, await answer.json())) == (422, "$.password")


async def test_password_is_measured_in_nfc(anyone: Client) -> None:
    """A password has 8 to 100 characters however its accents are written."""
    for password in ("u\u0308" * 8, "u\u0308" * 100, "\u1112\u1161\u11ab" * 100):
        status, user = await registers(anyone, password=password)
        assert status == 201
        assert (await logs_in(anyone, user["email"], password))[0] == 200
    for password in ("u\u0308" * 7, "u\u0308" * 101, "\U0001d160" * 34, "x" * 401):
        assert at(await registers(anyone, password=password)) == (422, "$.password")


async def test_password_of_the_old_rule_still_counts(
    alice: Person, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A password that was hashed as it was sent logs in as it was, and is hashed anew, so that then
    each way to write it does; an unknown email takes as many hashes."""
    digest = base64.b64encode(hashlib.sha256(DECOMPOSED.encode()).digest())
    old = bcrypt.hashpw(digest, bcrypt.gensalt(4)).decode()
    await sql.execute("update users set password_hash = $1", old)
    body = {"email": "new@example.com", "current_password": DECOMPOSED}
    assert (await alice.asks("PUT", f"/users/{alice.id}", body)).status == 200
    assert (await logs_in(alice.client, "new@example.com", COMPOSED))[0] == 401
    assert (await logs_in(alice.client, "new@example.com", DECOMPOSED))[0] == 200
    assert (await logs_in(alice.client, "new@example.com", COMPOSED))[0] == 200

    hashes = checked_hashes(monkeypatch)
    for password, status, count in (
        (COMPOSED, 200, 1), (DECOMPOSED, 200, 1), ("wröng password", 401, 1),
        ("wro\u0308ng password", 401, 2), ("u\u0308" * 7_000, 401, 1),
    ):
        for email in ("new@example.com", "nobody@example.com"):
            hashes.clear()
            told = (await logs_in(alice.client, email, password))[0]
            if email.startswith("new"):
                assert (told, len(hashes)) == (status, count), password
            elif status == 401:
                assert (told, len(hashes)) == (401, count), password


async def test_every_character_of_a_password_counts(anyone: Client) -> None:
    """Passwords that differ after their 72nd byte, after a NUL or in case only are different."""
    for password, other in (
        ("x" * 72 + "a", "x" * 72 + "b"),
        ("п" * 36 + "вечер", "п" * 36 + "утро!"),
        ("abc\0defgh", "abc\0defgi"),
        ("Вечером в саду", "вечером в саду"),
        ("x" * 100, "x" * 99),
    ):
        _, user = await registers(anyone, password=password)
        assert (await logs_in(anyone, user["email"], other))[0] == 401
        assert (await logs_in(anyone, user["email"], password))[0] == 200


async def test_password_is_stored_hashed(anyone: Client, sql: asyncpg.Connection) -> None:
    """The database keeps a bcrypt hash of the configured cost, never the password."""
    await registers(anyone, password=PASSWORD)
    row = str(await sql.fetchrow("select * from users"))
    assert f"$2b${SETTINGS.bcrypt_cost:02d}$" in row
    assert PASSWORD not in row


# ---- Logging in


async def test_login_answers_tokens(alice: Person) -> None:
    """A login answers exactly the Tokens; access lives 30 minutes, refresh 7 days."""
    status, tokens = await logs_in(alice.client, alice.email)
    assert status == 200
    assert tokens.keys() == {"access_token", "refresh_token", "token_type", "expires_in"}
    assert (tokens["token_type"], tokens["expires_in"]) == ("bearer", 1800)
    for kind, seconds in (("access_token", 1800), ("refresh_token", 7 * 86_400)):
        claims = jwt.decode(tokens[kind], options={"verify_signature": False})
        assert abs(claims["exp"] - time.time() - seconds) < 10, kind
    assert await may_ask(alice.client, tokens["access_token"])


async def test_user_logs_in_with_the_email_they_registered(anyone: Client) -> None:
    """Every email that registration took can log in, in any case; the punycode form of a domain and
    full-width dots in it mean the same domain."""
    refused: list[str] = []
    for email in (
        "Alice@Example.COM",
        "Почта@Example.com",
        "a@bücher.example",
        "b@xn--bcher-kva.example",
        "c@example。com",
        "Ａ１@example.com",
    ):
        status, problem = await registers(anyone, email=email)
        assert status == 201, (email, problem)
        typed = (email, email.lower(), email.upper())
        refused += [one for one in typed if (await logs_in(anyone, one))[0] != 200]
    assert refused == []


async def test_unknown_email_is_refused_like_a_wrong_password(
    alice: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two refusals are byte-identical, and each costs one bcrypt call of the same cost."""
    hashes = checked_hashes(monkeypatch)
    answers = []
    for email in (alice.email, "nobody@example.com", "no address at all", ""):
        body = {"email": email, "password": "wrong password"}
        own = {"X-Request-Id": "own"}
        async with alice.client.post("/api/v1/users/login", json=body, headers=own) as answer:
            headers = {name: text for name, text in answer.headers.items() if name != "Date"}
            answers.append((answer.status, headers, await answer.read()))
        assert len(hashes) == len(answers)
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0] == 401
    assert json.loads(answers[0][2])["type"] == "invalid-credentials"
    assert {hashed[:7] for hashed in hashes} == {b"$2b$04$"}


async def test_failed_logins_are_limited(alice: Person, bob: Person) -> None:
    """After ten failures an account answers 429 with Retry-After, to the right password too."""
    for number in range(10):
        email = alice.email.upper() if number % 2 else alice.email
        assert (await logs_in(alice.client, email, "wrong password"))[0] == 401
    for password in ("wrong password", PASSWORD):
        body = {"email": alice.email, "password": password}
        async with alice.client.post("/api/v1/users/login", json=body) as answer:
            assert answer.status == 429
            assert (await answer.json())["type"] == "too-many-attempts"
            assert 1 <= int(answer.headers["Retry-After"]) <= 900
    assert (await logs_in(alice.client, bob.email))[0] == 200
    assert await may_ask(alice.client, alice.access)


async def test_login_with_a_password_that_was_just_changed_forgives_nothing(
    alice: Person, sql: asyncpg.Connection
) -> None:
    """Where the verified password is the account's no longer, failed logins still count."""
    keys = ["login:alice", "login from:here"]
    await sql.execute("insert into attempts (key, at) select unnest($1::text[]), now()", keys)
    row = await sql.fetchrow(
        messenger.START_SESSION, alice.id, "an older hash", None, "", *keys, "secret", LATER)
    assert row is None
    assert await sql.fetchval("select count(*) from attempts where key = any ($1)", keys) == 2


async def test_many_guesses_at_once_are_limited_too(alice: Person) -> None:
    """Of forty wrong passwords at the same time, ten are tried."""
    guesses = [logs_in(alice.client, alice.email, "wrong password") for _ in range(40)]
    answers = [status for status, *_ in await asyncio.gather(*guesses)]
    assert sorted(answers) == [401] * 10 + [429] * 30


async def test_unknown_email_is_limited_too(anyone: Client) -> None:
    """The limit does not reveal which emails have an account."""
    for _ in range(10):
        assert (await logs_in(anyone, "nobody@example.com"))[0] == 401
    assert (await logs_in(anyone, "nobody@example.com"))[0] == 429


async def test_limit_passes_with_time(alice: Person, sql: asyncpg.Connection) -> None:
    """Failures of long ago do not count: after nine new ones the right password still logs in."""
    for _ in range(10):
        await logs_in(alice.client, alice.email, "wrong password")
    assert (await logs_in(alice.client, alice.email))[0] == 429
    await sql.execute("update attempts set at = at - interval '16 minutes'")
    for _ in range(9):
        assert (await logs_in(alice.client, alice.email, "wrong password"))[0] == 401
    assert (await logs_in(alice.client, alice.email))[0] == 200


async def test_rate_limits_can_be_switched_off(
    aiohttp_client: Callable[..., Awaitable[Client]], database_url: str
) -> None:
    """RATE_LIMITS=off answers the 12th failure like the first, and takes the right password."""
    settings = msgspec.structs.replace(SETTINGS, rate_limits="off")
    client = await aiohttp_client(messenger.make_app(settings, database_url, SECRET_KEY))
    _, user = await registers(client)
    for _ in range(12):
        assert (await logs_in(client, user["email"], "wrong password"))[0] == 401
    assert (await logs_in(client, user["email"]))[0] == 200


async def test_hash_follows_the_raised_cost_at_the_next_login(
    alice: Person, sql: asyncpg.Connection, database_url: str, aiohttp_client: Any
) -> None:
    """Where the cost was raised, a login makes the hash anew, once; a wrong password does not."""

    async def cost() -> str:
        hashed: str = await sql.fetchval("select password_hash from users")
        return hashed[:7]

    settings = msgspec.structs.replace(SETTINGS, bcrypt_cost=5)
    dearer = await aiohttp_client(messenger.make_app(settings, database_url, SECRET_KEY))
    assert (await logs_in(dearer, alice.email, "wrong password"))[0] == 401
    assert await cost() == "$2b$04$"
    assert (await logs_in(dearer, alice.email))[0] == 200
    assert await cost() == "$2b$05$"
    after = await sql.fetchval("select password_hash from users")
    for client in (dearer, alice.client):  # a server of the lower cost makes it no cheaper
        assert (await logs_in(client, alice.email))[0] == 200
        assert (await logs_in(client, alice.email, "wrong password"))[0] == 401
    assert await sql.fetchval("select password_hash from users") == after
    assert await may_ask(alice.client, alice.access)


async def test_logins_at_once_all_get_in_while_the_hash_is_made_anew(
    alice: Person, database_url: str, aiohttp_client: Any
) -> None:
    """Of ten logins at once that each make the hash anew none is refused, and each has its
    session."""
    settings = msgspec.structs.replace(SETTINGS, bcrypt_cost=5)
    dearer = await aiohttp_client(messenger.make_app(settings, database_url, SECRET_KEY))
    answers = await asyncio.gather(*(logs_in(dearer, alice.email) for _ in range(10)))
    assert {status for status, _ in answers} == {200}
    assert len(await alice.gets("/users/me/sessions")) == 11
    assert (await logs_in(dearer, alice.email))[0] == 200


async def test_user_has_fifty_sessions_at_most(alice: Person, sql: asyncpg.Connection) -> None:
    """A login beyond fifty live sessions ends the one that was used longest ago, its tokens and its
    sockets too; no other is touched, and ended ones do not count."""
    await alice.posts("/users/logout", status=204)
    logins = [(await logs_in(alice.client, alice.email))[1] for _ in range(50)]
    _, used = await refreshes(alice.client, logins[0]["refresh_token"])
    lines = []
    for tokens in (logins[1], logins[2], used):
        headers = {"Authorization": f"Bearer {tokens['access_token']}"}
        lines.append(Line(await alice.client.ws_connect("/ws", headers=headers)))
    alice.lines += lines
    assert await may_ask(alice.client, logins[1]["access_token"])
    oldest = jwt.decode(logins[1]["access_token"], options={"verify_signature": False})["sid"]
    await sql.execute(
        "update sessions set last_used_at = now() - interval '1 hour' where id = $1", oldest)
    await alice.logs_in()
    assert await lines[0].is_closed() == 4401
    assert not await may_ask(alice.client, logins[1]["access_token"])
    assert (await refreshes(alice.client, logins[1]["refresh_token"]))[0] == 401
    for line in lines[1:]:
        await line.sends(type="typing")
        assert await line.hears("error")
    assert len(await alice.gets("/users/me/sessions?limit=100")) == 50
    assert await sql.fetchval("select count(*) from sessions where ended_at is null") == 50


async def test_logins_at_once_leave_fifty_sessions(alice: Person, sql: asyncpg.Connection) -> None:
    """However many log in at the same moment, fifty sessions are live in the end, theirs among
    them; none stays because it seems to be used in the future."""
    await sql.execute(
        "insert into sessions (user_id, rotated_at, last_used_at)"
        " select $1, now(), now() + interval '400 days' from generate_series(1, 60)", alice.id)
    answers = await asyncio.gather(*(logs_in(alice.client, alice.email) for _ in range(10)))
    assert {status for status, _ in answers} == {200}
    for _, tokens in answers:
        assert await may_ask(alice.client, tokens["access_token"])
    assert await sql.fetchval("select count(*) from sessions where ended_at is null") == 50


# ---- Refreshing


async def test_fifty_refreshes_at_once_leave_one_successor(alice: Person) -> None:
    """However many use one refresh token at the same moment, one successor lives; once that was
    used, the first token ends the session."""
    answers = await asyncio.gather(*(refreshes(alice.client, alice.refresh) for _ in range(50)))
    assert {status for status, _ in answers} == {200}
    [successor] = {tokens["refresh_token"] for _, tokens in answers}
    assert await may_ask(alice.client, answers[0][1]["access_token"])
    status, last = await refreshes(alice.client, successor)
    assert status == 200
    again = await asyncio.gather(*(refreshes(alice.client, alice.refresh) for _ in range(50)))
    assert {status for status, _ in again} == {401}
    assert not await may_ask(alice.client, last["access_token"])
    assert (await refreshes(alice.client, last["refresh_token"]))[0] == 401


async def test_reuse_of_a_refresh_token_closes_the_sockets_of_its_session(alice: Person) -> None:
    """The sockets of the thief and of the victim are closed with 4401; that of another session is
    not."""
    _, tokens = await refreshes(alice.client, alice.refresh)
    await refreshes(alice.client, tokens["refresh_token"])
    lines = []
    _, other = await logs_in(alice.client, alice.email)
    for access in (alice.access, tokens["access_token"], other["access_token"]):
        headers = {"Authorization": f"Bearer {access}"}
        lines.append(Line(await alice.client.ws_connect("/ws", headers=headers)))
    alice.lines += lines
    assert (await refreshes(alice.client, alice.refresh))[0] == 401
    assert [await line.is_closed() for line in lines[:2]] == [4401, 4401]
    await lines[2].sends(type="typing")
    assert (await lines[2].hears("error"))["data"]["type"] == "invalid-input"


async def test_tokens_of_the_old_key_count_and_new_ones_have_the_new(
    alice: Person, database_url: str, aiohttp_client: Any
) -> None:
    """After a change of keys both kinds of token of the old key still work, they are exchanged for
    tokens of the new key, and a third key is not believed."""

    async def server(key: str, old: str) -> Any:
        settings = msgspec.structs.replace(SETTINGS, secret_key_old=old)
        return await aiohttp_client(messenger.make_app(settings, database_url, key))

    new_key = "a new key of the tests, longer than 32 bytes"
    client = await server(new_key, SECRET_KEY)
    assert await may_ask(client, alice.access)
    line = Line(await client.ws_connect(f"/ws?token={alice.access}"))
    alice.lines.append(line)
    status, tokens = await refreshes(client, alice.refresh)
    assert status == 200
    assert await may_ask(client, tokens["access_token"])
    for token in (tokens["access_token"], tokens["refresh_token"]):
        jwt.decode(token, new_key, ["HS256"])
    assert not await may_ask(alice.client, tokens["access_token"])  # it has the old key alone
    await line.sends(type="auth", token=tokens["access_token"])
    assert await line.hears("auth")

    later = await server("a third key of the tests, longer than 32 bytes", new_key)
    for access in (alice.access, alice.refresh):
        assert not await may_ask(later, access)
    assert (await refreshes(later, alice.refresh))[0] == 401
    assert await may_ask(later, tokens["access_token"])
    assert (await refreshes(later, tokens["refresh_token"]))[0] == 200
    without = await server("a third key of the tests, longer than 32 bytes", "")
    assert not await may_ask(without, tokens["access_token"])


async def test_forgeries_are_no_better_with_two_keys(
    alice: Person, database_url: str, aiohttp_client: Any
) -> None:
    """A second key lets in only what it signed: no other algorithm, and no expired token."""
    settings = msgspec.structs.replace(SETTINGS, secret_key_old="x" * 40)
    client = await aiohttp_client(messenger.make_app(settings, database_url, SECRET_KEY))
    for what, token in forgeries(alice.access).items():
        assert not await may_ask(client, token), what
    assert await may_ask(client, alice.access)


async def test_refresh_rotates_as_bearer_and_in_the_body(alice: Person) -> None:
    """The refresh token may come as Bearer or in the body; both answer new tokens that work."""
    status, second = await posts(alice.client, "/users/refresh", token=alice.refresh)
    assert status == 200
    assert second.keys() == {"access_token", "refresh_token", "token_type", "expires_in"}
    status, third = await refreshes(alice.client, second["refresh_token"])
    assert status == 200
    refresh_tokens = {alice.refresh, second["refresh_token"], third["refresh_token"]}
    assert len(refresh_tokens) == 3
    assert len({alice.access, second["access_token"], third["access_token"]}) == 3
    assert await may_ask(alice.client, third["access_token"])


async def test_reuse_of_an_old_refresh_token_ends_the_session(alice: Person) -> None:
    """Once its successor was used, an old refresh token is refused and ends the whole session."""
    _, other = await logs_in(alice.client, alice.email)
    _, second = await refreshes(alice.client, alice.refresh)
    _, third = await refreshes(alice.client, second["refresh_token"])
    assert await may_ask(alice.client, third["access_token"])
    status, problem = await refreshes(alice.client, alice.refresh)
    assert (status, problem["type"]) == (401, "invalid-token")
    for access in (alice.access, second["access_token"], third["access_token"]):
        assert not await may_ask(alice.client, access)
    assert (await refreshes(alice.client, third["refresh_token"]))[0] == 401
    assert await may_ask(alice.client, other["access_token"])


async def test_lost_answer_may_be_asked_for_again(alice: Person) -> None:
    """The same refresh, repeated ten times at once, gets one and the same successor."""
    answers = await asyncio.gather(*(refreshes(alice.client, alice.refresh) for _ in range(10)))
    assert {status for status, _ in answers} == {200}
    assert len({tokens["refresh_token"] for _, tokens in answers}) == 1
    successor = answers[0][1]["refresh_token"]
    assert successor != alice.refresh
    assert (await refreshes(alice.client, successor))[0] == 200


async def test_lost_answer_may_be_asked_for_within_30_seconds(
    alice: Person, sql: asyncpg.Connection
) -> None:
    """A refresh whose answer is in use is repeated 25 seconds after the first with success; 31
    seconds after it ends the session."""
    _, tokens = await refreshes(alice.client, alice.refresh)
    assert await may_ask(alice.client, tokens["access_token"])
    await sql.execute("update sessions set rotated_at = now() - interval '25 seconds'")
    assert (await refreshes(alice.client, alice.refresh))[0] == 200
    await sql.execute("update sessions set rotated_at = now() - interval '31 seconds'")
    assert (await refreshes(alice.client, alice.refresh))[0] == 401
    assert not await may_ask(alice.client, tokens["access_token"])
    assert (await refreshes(alice.client, tokens["refresh_token"]))[0] == 401


async def test_kinds_of_tokens_are_not_interchangeable(alice: Person) -> None:
    """An access token does not refresh and a refresh token does not let in; trying ends nothing."""
    assert (await refreshes(alice.client, alice.access))[0] == 401
    assert (await posts(alice.client, "/users/refresh", token=alice.access))[0] == 401
    assert not await may_ask(alice.client, alice.refresh)
    assert await may_ask(alice.client, alice.access)
    assert (await refreshes(alice.client, alice.refresh))[0] == 200


def forgeries(token: str) -> dict[str, str]:
    """Tokens that were made from a good one and must be refused, by what is wrong with them."""
    claims = jwt.decode(token, options={"verify_signature": False})
    header, payload, signature = token.split(".")
    deep = base64.urlsafe_b64encode(b"[" * 5000).decode()
    other_key = "another key of the tests, longer than 32 bytes"
    now = int(time.time())
    forged = {
        "other key": jwt.encode(claims, other_key, algorithm="HS256"),
        "other algorithm": jwt.encode(claims, SECRET_KEY * 2, algorithm="HS512"),
        "no algorithm": jwt.encode(claims, "", algorithm="none"),
        "no signature": f"{header}.{payload}.",
        "other payload": f"{header}.{payload[:-4]}AAAA.{signature}",
        "expired": jwt.encode(claims | {"exp": now - 60}, SECRET_KEY, algorithm="HS256"),
        "other user": jwt.encode(
            claims | {"sub": str(int(claims["sub"]) + 1)}, SECRET_KEY, algorithm="HS256"
        ),
        "other kind": jwt.encode(claims | {"typ": "other"}, SECRET_KEY, algorithm="HS256"),
        "deep header": f"{deep}.{payload}.{signature}",
        "deep payload": f"{header}.{deep}.{signature}",
        "junk": "x",
        "dots": "..",
        "not base64": "é.é.é",
    }
    for claim in ("exp", "sub", "sid", "typ", "jti", "iat"):
        less = {name: value for name, value in claims.items() if name != claim}
        forged[f"without {claim}"] = jwt.encode(less, SECRET_KEY, algorithm="HS256")
    return forged


async def test_forged_and_expired_tokens_are_refused(alice: Person) -> None:
    """A token that was forged, altered or has expired is 401 everywhere and ends nothing."""
    let_in = []
    for what, token in forgeries(alice.access).items():
        headers = {"Authorization": f"Bearer {token}"}
        async with alice.client.get("/api/v1/users/me", headers=headers) as answer:
            if (answer.status, (await answer.json())["type"]) != (401, "unauthorized"):
                let_in.append(("access", what, answer.status))
    of_refresh = forgeries(alice.refresh)
    del of_refresh["other user"]  # nobody has our key: such a thief is not told from the holder
    for what, token in of_refresh.items():
        status, problem = await refreshes(alice.client, token)
        if (status, problem.get("type")) != (401, "invalid-token"):
            let_in.append(("refresh", what, status))
    assert let_in == []
    # The forger's means are right: what is signed anew but unchanged is let in.
    claims = jwt.decode(alice.access, options={"verify_signature": False})
    assert await may_ask(alice.client, jwt.encode(claims, SECRET_KEY, algorithm="HS256"))
    assert (await refreshes(alice.client, alice.refresh))[0] == 200


async def test_refresh_without_a_token_is_401(anyone: Client) -> None:
    """A refresh that brings no token, neither as Bearer nor in the body, is refused like one with a
    bad token."""
    for body in (None, {}, {"refresh_token": None}, {"refresh_token": ""}):
        assert (await posts(anyone, "/users/refresh", body))[0] == 401
    async with anyone.post("/api/v1/users/refresh") as answer:
        assert answer.status == 401


async def test_logout_ends_the_tokens_at_once(alice: Person) -> None:
    """After the 204 neither token lets in, although both were just used; the user's other session
    goes on."""
    _, other = await logs_in(alice.client, alice.email)
    assert await may_ask(alice.client, alice.access)
    async with alice.client.post("/api/v1/users/logout", headers=alice.headers) as answer:
        assert (answer.status, await answer.read()) == (204, b"")
    assert not await may_ask(alice.client, alice.access)
    assert (await refreshes(alice.client, alice.refresh))[0] == 401
    assert (await posts(alice.client, "/users/logout", token=alice.access))[0] == 401
    assert await may_ask(alice.client, other["access_token"])
    assert (await logs_in(alice.client, alice.email))[0] == 200


async def test_ask_under_way_does_not_outlive_logout(alice: Person) -> None:
    """No request that starts after the logout was answered is let in, however many are under
    way."""

    async def asks() -> None:
        while await may_ask(alice.client, alice.access):
            pass

    asking = [asyncio.create_task(asks()) for _ in range(5)]
    assert (await posts(alice.client, "/users/logout", token=alice.access))[0] == 204
    assert not await may_ask(alice.client, alice.access)
    await asyncio.wait_for(asyncio.gather(*asking), 2)


# ---- Looking people up


async def crowd(sql: asyncpg.Connection, *names: str) -> list[int]:
    """Insert users who only have to be there; answer their ids."""
    ids = []
    for name in names:
        key = folded(name)
        ids.append(
            await sql.fetchval(
                "insert into users (email, email_key, username, username_key, password_hash)"
                " values ($1, $1, $2, $3, '') returning id",
                f"{key}@example.com", name, key,
            )
        )
    return ids


def ids_of(found: list[list[Any]]) -> list[list[int]]:
    """The ids on each page."""
    return [[item["id"] for item in page] for page in found]


async def test_users_are_listed_by_id(alice: Person, sql: asyncpg.Connection) -> None:
    """The list is ordered by id, `limit` at a time, and its Link leads on until nothing more
    comes."""
    others = await crowd(sql, *(f"other_{number}" for number in range(5)))
    everybody = [alice.id, *others]
    assert ids_of(await pages(alice, "/users?limit=2")) == [
        everybody[:2], everybody[2:4], everybody[4:]
    ]
    assert ids_of(await pages(alice, "/users?limit=4")) == [everybody[:4], everybody[4:]]
    assert ids_of(await pages(alice, "/users?limit=6")) == [everybody]
    assert ids_of(await pages(alice, "/users")) == [everybody]
    assert ids_of(await pages(alice, f"/users?after={others[2]}")) == [others[3:]]
    assert ids_of(await pages(alice, f"/users?after={others[-1]}")) == [[]]
    assert ids_of(await pages(alice, f"/users?after={2**63 - 1}")) == [[]]


async def test_fifty_users_are_listed_unless_asked_otherwise(
    alice: Person, sql: asyncpg.Connection
) -> None:
    """A page has 50 by default and 100 at most."""
    await crowd(sql, *(f"other_{number}" for number in range(104)))
    assert [len(page) for page in await pages(alice, "/users")] == [50, 50, 5]
    assert [len(page) for page in await pages(alice, "/users?limit=100")] == [100, 5]


async def test_users_are_found_by_the_start_of_their_name(
    alice: Person, sql: asyncpg.Connection
) -> None:
    """`q` is the start of a username, in any case and script, and is not a pattern."""
    ids = await crowd(sql, "Анна", "аННушка", "Жанна", "a_1", "ab1", "a_2", "İzmir", "ΣΟΦΟΣ")
    anna, annushka, _, a_1, ab1, a_2, izmir, sofos = ids

    async def found(q: str, query: str = "") -> list[int]:
        listed = ids_of(await pages(alice, f"/users?q={quote(q)}{query}"))
        return [one for page in listed for one in page]

    assert await found("анн") == await found("АНН") == [anna, annushka]
    assert await found("АНН", "&limit=1") == [anna, annushka]
    assert await found("анна") == [anna]
    assert await found("a_") == await found("A_", "&limit=1") == [a_1, a_2]
    assert await found("A") == [alice.id, a_1, ab1, a_2]
    assert await found("İZ") == [izmir]
    assert await found("σοφός"[:3]) == await found("σοφος") == [sofos]
    for q in ("%", "_", "*", "nobody", "ann\\", "'", "\U0010ffff"):
        assert await found(q) == [], q


async def test_email_is_seen_by_its_owner_only(alice: Person, bob: Person) -> None:
    """A user sees their own email, under `me` and under their id, and nobody else's."""
    me = await alice.gets("/users/me")
    assert me["email"] == alice.email
    assert await alice.gets(f"/users/{alice.id}") == me
    other = await alice.gets(f"/users/{bob.id}")
    assert other == {k: v for k, v in (await bob.gets("/users/me")).items() if k != "email"}
    assert other.keys() == {"id", "username", "is_active", "created_at"}
    assert bob.email not in json.dumps(await alice.gets("/users"))
    chat = await alice.opens(bob)
    assert bob.email not in json.dumps(await alice.gets(f"/chats/{chat}"))


async def test_unknown_user_is_404(alice: Person) -> None:
    """An id that nobody has is a 404: the user is not found."""
    for user_id in (alice.id + 1, 2**63 - 1):
        assert (await alice.gets(f"/users/{user_id}", 404))["type"] == "user-not-found"


async def test_token_is_read_whatever_the_case_of_bearer(alice: Person) -> None:
    """`Bearer` may be written in any case; another scheme does not let in, nor does `?token=`
    here."""
    for header, status in ((f"bearer {alice.access}", 200), (f"Basic {alice.access}", 401)):
        async with alice.client.get("/api/v1/users/me", headers={"Authorization": header}) as a:
            assert a.status == status
    answer: aiohttp.ClientResponse
    async with alice.client.get(f"/api/v1/users/me?token={alice.access}") as answer:
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"


# ---- What began before a session ended


@pytest.mark.parametrize(("method", "path", "body"), [
    ("POST", "/chats/{chat}/messages", b'{"text":"hi"}'),
    ("POST", "/chats", b'{"is_group":true,"name":"g","participant_ids":[{other}]}'),
    ("PUT", "/users/{me}", b'{"username":"another"}'),
    ("POST", "/chats/{chat}/read", b'{"message_id":"{message}"}'),
])
async def test_call_whose_body_comes_after_its_session_ended_is_refused(
    alice: Person, bob: Person, method: str, path: str, body: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A call may wait for the rest of its body for seconds: it does nothing where its session ended
    meanwhile. One that waits as long in a session that goes on is worked on."""
    monkeypatch.setattr(endpoints, "BELIEVED_SECONDS", 0.01)
    chat = await bob.founds(alice)
    message = (await bob.says(chat, "before"))["id"]
    thiefs = alice.access
    await alice.logs_in()
    names = {"chat": chat, "me": alice.id, "other": bob.id, "message": message}
    for name, value in names.items():
        path = path.replace(f"{{{name}}}", str(value))
        body = body.replace(f"{{{name}}}".encode(), str(value).encode())
    calls = [await RawConnection.opens(alice.client.port, (
        f"{method} /api/v1{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {access}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body[:-1]) for access in (thiefs, alice.access)]
    await asyncio.sleep(0.2)
    await logs_out(alice, thiefs)
    statuses = []
    for call in calls:
        call.writer.write(body[-1:])
        statuses.append((await call.hears())[0])
        call.close()
    assert statuses[0] == 401
    assert statuses[1] in (200, 201)


@pytest.mark.parametrize("path", ["/users/me", "/chats"])
async def test_call_whose_turn_comes_after_its_session_ended_is_refused(
    alice: Person, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call may wait for its turn for seconds: it reads nothing where its session ended meanwhile.
    """
    monkeypatch.setattr(endpoints, "BELIEVED_SECONDS", 0.01)
    waiting, going_on = asyncio.Event(), asyncio.Event()

    async def wait(_request: web.Request, do: Any, *arguments: Any) -> Any:
        if do is endpoints.wait_patiently:
            waiting.set()
            await going_on.wait()
        return await do(*arguments)

    access = alice.access
    await alice.logs_in()
    with monkeypatch.context() as patch:
        patch.setattr(guard.Slots, "take_now", lambda *_: None)
        patch.setattr(endpoints, "unless_gone", wait)
        headers = {"Authorization": f"Bearer {access}"}
        call = asyncio.create_task(alice.client.get(f"/api/v1{path}", headers=headers))
        await waiting.wait()
    await logs_out(alice, access)
    await asyncio.sleep(0.05)
    going_on.set()
    assert (await call).status == 401
