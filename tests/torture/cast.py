"""Who is there: users, chats, a user's seat in a chat, and the messages that they post."""

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torture.devices import Device

RECENT = 50  # messages of one's own that may still be changed


@dataclass(eq=False)
class User:
    """Somebody with an account."""

    name: str
    id: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    seats: dict[int, "Seat"] = field(default_factory=dict)  # chat id: their seat there


@dataclass(eq=False)
class Chat:
    """A group."""

    id: int
    seats: list["Seat"] = field(default_factory=list)
    said: dict[str, Any] = field(default_factory=dict)  # position: what was shown there
    changes: int = 0  # edits and deletions that were answered
    latest: str = ""  # the id of a message


@dataclass(eq=False)
class Removal:
    """A member's time outside, from before it was asked for until they are asked back."""

    heard: list[int] = field(default_factory=list)  # the revs that their sockets got meanwhile


INSIDE, LEAVING, OUT, COMING = range(4)


@dataclass(eq=False)
class Seat:
    """A user's place in a chat, and what they do there."""

    user: User
    chat: Chat
    is_bursting: bool
    device: "Device | None" = None  # which posts; None: REST does
    turn: int = 0  # counts through INSIDE, LEAVING, OUT, COMING: which it is, modulo 4
    came_at: float = 0.0
    floor: int = 0  # the largest seq that was acknowledged
    watermark: int = 0
    recent: deque["Message"] = field(default_factory=lambda: deque(maxlen=RECENT))
    removals: list[Removal] = field(default_factory=list)
    inside: asyncio.Event = field(default_factory=asyncio.Event)

    def step(self) -> None:
        """Go on to the next of the four."""
        self.turn += 1
        if self.turn % 4 == INSIDE:
            self.came_at = time.monotonic()
            self.inside.set()
        else:
            self.inside.clear()


@dataclass(eq=False, slots=True)
class Message:
    """A message that a client posts; `seq` is 0 until it is acknowledged."""

    seat: Seat
    id: str
    text: str  # as it was posted
    floor: int  # of the sender's own that were acknowledged before: it comes after them
    seq: int = 0
    created_at: datetime | None = None
    stands: str = ""  # its text by the changes that were answered, "" once it is deleted
    is_undone: bool = False  # acknowledged, and gone with a database that went back
