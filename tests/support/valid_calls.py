"""A valid call of every endpoint, from which others are spoilt, and what its handler declares."""

import inspect
import itertools
import json
import typing
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
from aiohttp.test_utils import TestClient
from yarl import URL

import messenger
from messenger import Endpoint
from support.people import PASSWORD, Person, new_id

OF_ONESELF = (messenger.change_user, messenger.delete_user)
names = itertools.count(1)


@dataclass
class ValidCalls:
    """Alice, signed in, and what the paths and bodies of valid requests name."""

    alice: Person
    client: TestClient[Any, Any]
    ids: dict[str, Any]
    bodies: dict[str, dict[str, Any]]

    def path(self, endpoint: Endpoint, **other: str) -> str:
        """The path of an endpoint, with ids that are there unless others are given."""
        own = {"user_id": self.alice.id} if endpoint.handler in OF_ONESELF else {}
        return endpoint.path.format(**(self.ids | own | other))

    async def asks(
        self, endpoint: Endpoint, path: str = "", raw: Any = None, **headers: str
    ) -> aiohttp.ClientResponse:
        """Send a request with its path as it is, and with a valid body unless one is given."""
        name = endpoint.handler.__name__
        if raw is None and name in self.bodies:
            raw = json.dumps(self.bodies[name]).encode()
        answer = await self.client.request(
            endpoint.method,
            URL(path or self.path(endpoint), encoded=True),
            data=raw,
            headers=self.alice.headers | headers,
        )
        await answer.read()
        return answer


async def make_valid_calls(alice: Person, bob: Person, carol: Person) -> ValidCalls:
    """Make a group of Alice's with a message in it, and calls about both."""
    chat = await alice.founds(bob, carol)
    message = (await alice.says(chat, "x"))["id"]
    session = (await alice.gets("/users/me/sessions"))[0]["id"]
    await alice.logs_in()
    number = next(names)
    bodies = {
        "create_user": {
            "email": f"new{number}@example.com", "username": f"new{number}", "password": PASSWORD,
        },
        "login": {"email": alice.email, "password": PASSWORD},
        "refresh": {"refresh_token": alice.refresh},
        "change_user": {
            "email": f"other{number}@example.com", "username": f"other{number}",
            "password": PASSWORD, "current_password": PASSWORD, "is_active": True,
        },
        "create_chat": {"is_group": True, "name": "x", "participant_ids": [bob.id]},
        "change_chat": {"name": "y"},
        "add_participant": {"user_id": bob.id, "role": "admin"},
        "add_participant_by_id": {"role": "admin"},
        "send_message": {"text": "x", "id": new_id(), "reply_to": message},
        "change_message": {"text": "y"},
        "read_message": {"message_id": message},
    }
    ids = {"chat_id": chat, "user_id": bob.id, "message_id": message, "session_id": session}
    takers = {each.handler.__name__ for each in messenger.ENDPOINTS if of_body(each) is not None}
    assert bodies.keys() == takers, "each endpoint that takes a body has a valid one here"
    return ValidCalls(alice, alice.client, ids, bodies)


# ---- What a handler declares


def of_body(endpoint: Endpoint) -> Any:
    """The shape of an endpoint's body, if it takes one."""
    body = typing.get_type_hints(endpoint.handler, include_extras=True).get("body")
    return next((one for one in typing.get_args(body) if one is not type(None)), body)


def body_is_optional(endpoint: Endpoint) -> bool:
    """Whether a request may come without a body."""
    body = inspect.signature(endpoint.handler).parameters["body"]
    return body.default is not inspect.Parameter.empty


def of_query(endpoint: Endpoint) -> dict[str, set[type]]:
    """The kinds that each parameter of an endpoint's query may have."""
    hints = typing.get_type_hints(endpoint.handler, include_extras=True)
    parameters = inspect.signature(endpoint.handler).parameters.values()
    return {
        one.name: kinds(msgspec.inspect.type_info(hints[one.name]))
        for one in parameters
        if one.kind is one.KEYWORD_ONLY
    }


def kinds(info: msgspec.inspect.Type) -> set[type]:
    """The kinds of value that a declared type takes."""
    if isinstance(info, msgspec.inspect.Metadata):
        return kinds(info.type)
    if isinstance(info, msgspec.inspect.UnionType):
        return set().union(*(kinds(one) for one in info.types))
    return {type(info)}


def requests_about(chat: int, message: str, user: int) -> list[tuple[str, str, Any]]:
    """A valid request to each endpoint of a chat."""
    bodies = {
        "add_participant": {"user_id": user},
        "send_message": {"text": "x"},
        "read_message": {"message_id": message},
        "change_chat": {"name": "x"},
        "change_message": {"text": "x"},
    }
    return [
        (
            one.method,
            one.path.format(chat_id=chat, message_id=message, user_id=user),
            bodies.get(one.handler.__name__),
        )
        for one in messenger.ENDPOINTS
        if "{chat_id}" in one.path
    ]
