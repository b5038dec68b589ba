"""Frames that were heard: waiting for some, telling which chat they are about, picking some."""

import itertools
from typing import Any

from support.model import Position
from support.people import Heard, Line


async def until(line: Line, text: str) -> list[Heard]:
    """Hear frames up to the message with a text."""
    heard = [await line.hears()]
    while heard[-1]["data"].get("text") != text:
        heard.append(await line.hears())
    return heard


async def until_all(line: Line, *chats: int, text: str) -> list[Heard]:
    """Hear frames up to the message with a text in each of some chats."""
    heard: list[Heard] = []
    while {chat_of(each) for each in heard if each["data"].get("text") == text} < set(chats):
        heard.append(await line.hears())
    return heard


def chat_of(frame: Heard) -> Any:
    """Tell which chat a frame is about."""
    data = frame["data"]
    return data["id"] if frame["type"] == "chat" else data.get("chat_id", frame.get("chat_id"))


def of_type(heard: list[Heard], *types: str) -> list[Heard]:
    """Pick the frames of some types."""
    return [frame for frame in heard if frame["type"] in types]


def about(chat: int, heard: list[Heard]) -> list[Heard]:
    """Pick the frames about a chat."""
    return [frame for frame in heard if chat_of(frame) == chat]


def numbers(heard: list[Heard], chat: int) -> list[int]:
    """Answer the numbers of a chat's messages, as they were heard."""
    changes = of_type(heard, "message", "message_updated")
    return [frame["data"]["rev"] for frame in about(chat, changes)]


def runs(rising: list[int]) -> list[list[int]]:
    """Cut numbers where they do not rise: there is one run more than there were cuts."""
    found: list[list[int]] = [[]]
    for before, number in itertools.pairwise([0, *rising]):
        if number <= before:
            found.append([])
        found[-1].append(number)
    return found


def message(sent: Any) -> Heard:
    """The frame in which a message is heard that nobody has read."""
    return Heard({"type": "message", "data": sent})


def ready(chat: int, rev: int) -> Heard:
    """The frame that says that a chat is live."""
    data = {"chat_id": chat, "rev": rev, "position": Position(rev)}
    return Heard({"type": "ready", "data": data})


async def drains(line: Line, number: int) -> list[Heard]:
    """Hear frames up to the message of a number."""
    heard = []
    while not heard or heard[-1]["type"] != "message" or heard[-1]["data"]["seq"] < number:
        heard.append(await line.hears())
    return heard
