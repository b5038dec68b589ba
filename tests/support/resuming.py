"""What a client holds of a chat, by the contract's rule of resuming: the whole of it."""

from dataclasses import dataclass, field
from typing import Any

Frame = dict[str, Any]


def number_of(position: str) -> int:
    """The number of a position."""
    return int(position.partition(".")[0])


@dataclass
class Held:
    """A chat as a client holds it; `position` is what it comes back with, None: it knows nothing.

    `take` is given every frame of a socket that is about this chat; each new socket begins with
    `opens`. What a GET or the answer to a post brings is given to `shows`.
    """

    position: str | None = None
    messages: dict[str, Any] = field(default_factory=dict)  # by id, as they were at `position`
    above: dict[str, Any] = field(default_factory=dict)  # what was heard of later changes
    is_moving: bool = False  # whether frames of this socket set the position
    newest: int = 0  # the largest `rev` in `messages`

    def opens(self) -> None:
        """On a new socket the position stands still; what is above it is not kept."""
        self.is_moving = False
        self.above.clear()

    def take(self, frame: Frame) -> None:
        """Take a frame: `replay` lets the position move, and messages and `ready` move it."""
        kind, data = frame["type"], frame["data"]
        if kind == "error":
            if data["type"] == "history-rewritten":
                self.forget()
            return
        if kind == "replay" or (self.position is None and kind in ("ready", "chats")):
            self.is_moving = True
        if self.is_moving:
            self.position = data["position"]
        if kind in ("replay", "ready"):  # it may begin below what was held
            self.uncover()
        if kind in ("message", "message_updated"):
            self.shows(data)

    def shows(self, message: Any) -> None:
        """Of two copies of a message the one with the larger `rev` is true; what the position does
        not cover must not take the place of what it does.
        """
        is_covered = message["rev"] <= number_of(self.position or "0")
        copies = self.messages if is_covered else self.above
        if message["rev"] >= copies.get(message["id"], message)["rev"]:
            copies[message["id"]] = message
        if is_covered:
            self.newest = max(self.newest, message["rev"])

    def uncover(self) -> None:
        """Tell apart what a position that went back does not cover any more."""
        number = number_of(self.position or "0")
        if self.newest <= number:
            return
        for message in [each for each in self.messages.values() if each["rev"] > number]:
            del self.messages[message["id"]]
            self.shows(message)
        self.newest = number

    def forget(self) -> None:
        """The history is another: begin as with a chat that is not known."""
        self.position, self.is_moving = None, False
        self.messages.clear()
        self.above.clear()
