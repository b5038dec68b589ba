"""Every call, fuzzed by schemathesis against web/openapi.json with every check that it has.

(One of them, object_level_authorization, compares several askers, and has nothing to do here.)
What it draws is examples, the edges of every schema, random values, and chains of calls that use
one another's answers; ids that lead somewhere are drawn often.
"""

import asyncio
import json
import re
from collections import Counter
from typing import Any

import pytest
import requests
import schemathesis
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.engine import events, from_schema
from schemathesis.openapi.checks import JsonSchemaError, RejectedPositiveData

from support.fuzzing import LONG, SEED, Population
from support.people import PASSWORD
from support.servers import ROOT

pytestmark = pytest.mark.usefixtures("nothing_left")

DOCUMENT = json.loads((ROOT / "web/openapi.json").read_text())
CASES = 20_000 if LONG else 300
EXAMPLES = 60 if LONG else 2  # drawn for each operation, and as many chains, in one round
TOLD_CHARS = 1500  # of a failure

# ---- Who asks


# These may end the session or the account that asks: each has somebody of its own, who is replaced.
SPENDING = ("refresh", "logout", "delete_session", "change_user", "delete_user")


class Actors:
    """Gives a call its token: alice's, or that of somebody who may be spent."""

    population: Population

    def __init__(self) -> None:
        self.api = f"{self.population.server.url}/api/v1"
        self.spendable: dict[str, dict[str, Any]] = {}
        self.made = 0

    def get(self, case: schemathesis.Case, context: Any) -> dict[str, Any]:
        """Answer who asks."""
        name = operation_id(case)
        if name not in SPENDING:
            return {"token": self.population.alice.access}
        if name not in self.spendable or not self.is_alive(self.spendable[name]):
            self.spendable[name] = self.register(name)
        return self.spendable[name]

    def set(self, case: schemathesis.Case, actor: dict[str, Any], context: Any) -> None:
        """Sign the call; who may be spent asks about their own account, or else about Bob's."""
        case.headers["Authorization"] = f"Bearer {actor['token']}"
        path = case.path_parameters
        others = {person.id for person in self.population.people} - {self.population.bob.id}
        if "id" in actor and path.get("user_id") in others:
            path["user_id"] = actor["id"]
        if "id" in actor and path.get("session_id") in self.population.sessions:
            path["session_id"] = actor["session"]

    def is_alive(self, actor: dict[str, Any]) -> bool:
        """Tell whether somebody's session has not ended."""
        answer = requests.get(f"{self.api}/users/me", headers=actor["headers"], timeout=50)
        return answer.status_code == 200

    def register(self, name: str) -> dict[str, Any]:
        """Make somebody for an operation."""
        self.made += 1
        unique = f"{name}_{self.population.filled}_{self.made}"
        body = {"email": f"{unique}@example.com", "username": unique, "password": PASSWORD}
        user = requests.post(f"{self.api}/users", json=body, timeout=50).json()
        del body["username"]
        tokens = requests.post(f"{self.api}/users/login", json=body, timeout=50).json()
        headers = {"Authorization": f"Bearer {tokens['access_token']}"}
        path = f"{self.api}/users/me/sessions"
        sessions = requests.get(path, headers=headers, timeout=50).json()
        kind = "refresh_token" if name == "refresh" else "access_token"
        return {
            "token": tokens[kind], "headers": headers, "id": user["id"],
            "session": sessions[0]["id"]}


def operation_id(case: schemathesis.Case) -> str:
    """Answer the name of the handler that a case is for."""
    return str(case.operation.definition.raw["operationId"])


# ---- What is right although a check says otherwise

# What no schema tells: rules between fields, whether an id is somebody's, what an email is.
REFUSED_FOR = {
    "create_user": {"$.email", "$.username"},
    "change_user": {"$.email", "$.username", "$.current_password"},
    "create_chat": {"$.name", "$.participant_ids"},
    "list_chats": {"$.cursor"},
    "list_messages": {"$.after"},
    "send_message": {"$.reply_to"},
}


def is_a_fault(
    context: Any, failure: Any, case: schemathesis.Case, response: schemathesis.Response
) -> bool:
    """Tell whether a failed check is a fault of the messenger."""
    name = operation_id(case)
    if isinstance(failure, RejectedPositiveData) and response.status_code == 426:
        return not name.startswith("follow_")  # they speak websocket only
    if isinstance(failure, RejectedPositiveData) and response.status_code == 422:
        if re.search(rb"[0-9]\.0\b", response.request.body or b""):
            return False  # to JSON Schema 1.0 is an integer, too
        located = {each["loc"].partition("[")[0] for each in response.json()["errors"]}
        return not located <= REFUSED_FOR.get(name, set())
    if isinstance(failure, JsonSchemaError) and response.status_code == 404:
        # A path with a brace is no path at all to aiohttp's router.
        return "{" not in str(case.path_parameters) and "}" not in str(case.path_parameters)
    return True


# ---- The run


def config(population: Population, seed: int) -> schemathesis.Config:
    """Say how to fuzz: with every check, with ids that lead somewhere, from a seed."""
    values = {
        "chats": population.chats, "messages": population.messages, "sessions": population.sessions,
        "users": [person.id for person in population.people],
        "me": [population.alice.id], "my email": [population.alice.email], "password": [PASSWORD],
        "usernames": [f"name_{population.filled}_{number}" for number in range(100)],
        "emails": [f"{population.filled}-{number}@example.com" for number in range(100)],
    }
    drawn = {
        "path.chat_id": "chats", "path.user_id": "users", "path.message_id": "messages",
        "path.session_id": "sessions", "body.participant_ids[*]": "users", "body.user_id": "users",
        "body.message_id": "messages", "body.reply_to": "messages",
        "body.current_password": "password", "body.username": "usernames", "body.email": "emails",
    }
    own = [
        {"include-operation-id": name, "parameters": bindings(each)}
        for name, each in {
            "login": {"body.email": "my email", "body.password": "password"},
            "change_user": {"path.user_id": "me"}, "delete_user": {"path.user_id": "me"},
        }.items()
    ]
    rejections = ["400", "401", "403", "404", "405", "409", "413", "422"]
    return schemathesis.Config.from_dict({
        "seed": seed,
        "base-url": population.server.url,
        "continue-on-failure": True,
        "suppress-health-check": ["all"],
        "cache": {"enabled": False},  # of an earlier run
        "dictionaries": {name: {"values": each} for name, each in values.items()},
        "parameters": bindings(drawn),
        "operations": own,
        "checks": {"enabled": True, "negative_data_rejection": {"expected-statuses": rejections}},
        "generation": {"max-examples": EXAMPLES, "deterministic": True, "database": "none"},
    })


def bindings(dictionaries: dict[str, str]) -> dict[str, Any]:
    """Say from which dictionary parameters are often drawn."""
    return {name: {"dictionary": each, "probability": 0.7} for name, each in dictionaries.items()}


class Tally:
    """What was asked and answered, which checks looked at it, and what they found."""

    def __init__(self) -> None:
        self.phases: Counter[str] = Counter()
        self.answers: Counter[tuple[str, int]] = Counter()
        self.checks: set[str] = set()
        self.failures: dict[tuple[str, ...], str] = {}

    def takes(self, event: Any) -> None:
        """Count what an event of the run tells."""
        if isinstance(event, events.NonFatalError):
            self.failures["error", event.label] = f"{event.label}: {event.value!r}"[:TOLD_CHARS]
        if not isinstance(event, events.ScenarioFinished):
            return
        recorder = event.recorder
        self.phases[event.phase.value] += len(recorder.interactions)
        for name, interaction in recorder.interactions.items():
            if interaction.response is not None:
                operation = operation_id(recorder.cases[name].value)
                self.answers[operation, interaction.response.status_code] += 1
        for checks in recorder.checks.values():
            for check in checks:
                self.checks.add(check.name)
                if check.failure_info is not None:
                    self.blames(check)

    def blames(self, check: Any) -> None:
        """Keep the first failure of a kind."""
        failure = check.failure_info.failure
        told = f"{check.name}: {failure.operation}\n{failure.message}"[:TOLD_CHARS]
        told += f"\n{check.failure_info.code_sample[:TOLD_CHARS]}"
        self.failures.setdefault((check.name, str(failure.operation), failure.title), told)


def fuzz(population: Population, seed: int, tally: Tally) -> None:
    """Fuzz every call for a round."""
    schema = schemathesis.openapi.from_dict(DOCUMENT, config=config(population, seed))
    schema.auth(refresh_interval=None)(type("Actors", (Actors,), {"population": population}))
    schema.hook("filter_failure")(is_a_fault)
    for event in from_schema(schema).execute():
        tally.takes(event)


@pytest.mark.timeout(3600 if LONG else 120)
async def test_every_answer_is_as_the_document_says(
    population: Population, capsys: pytest.CaptureFixture[str]
) -> None:
    """No call that can be drawn makes a 5xx or an answer that the document does not describe;
    what it forbids is refused, what it allows is taken, and nobody is let in without a token."""
    tally, seed = Tally(), SEED
    while tally.phases.total() < CASES and not tally.failures:
        await asyncio.to_thread(fuzz, population, seed, tally)
        seed += 1
        await population.fills()
    if LONG:
        with capsys.disabled():
            print(f"\n{tally.phases.total()} cases: {dict(tally.phases)}")
    assert not tally.failures, "\n\n".join(tally.failures.values())
    load_all_checks()
    assert tally.checks == set(CHECKS.get_all_names())
    asked = {name for name, _ in tally.answers}
    answered = {name for name, status in tally.answers if status < 300}
    assert asked - answered == {"follow_chat", "follow_chats"}
