"""The rule of resuming, held against random schedules of everything that may come between.

One chat, one client, and a server that is only its contract: sockets are cut, slow or synced twice,
frames are lost with them, databases restored from a copy. However it goes, a client that follows
the rule ends with what the server has; each way of bending the rule loses something somewhere.

One thing is left out. A replay passes over a change whose message was changed again later, for that
comes later; and one that begins below what its client has, finds it with the later copy. Who is cut
off between the two, while the database goes back to between them too, has not got the earlier one,
and is not told: its position is of the history that there is.
"""

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from support.fuzzing import LONG
from support.resuming import Frame, Held, number_of

SCHEDULES = 20_000 if LONG else 3_000
STEPS = 60
PAGE = 3


class Server:
    """A chat as the contract tells of it: numbers with marks, and one socket."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.changes: list[Frame] = []  # each the message as it was after that number
        self.out: deque[Frame] = deque()  # frames on their way to the client
        self.syncs: deque[str] = deque()  # on their way to the server
        self.is_open = self.is_live = False
        self.at = self.since = 0
        self.due = 0  # how many `ready` the end of the replay owes
        self.known_from = 0  # what comes after it the client has to have
        self.told = 0  # the highest number that went out on this socket
        self.passed = (0, 0)  # from where to where no database goes back here

    def position(self, number: int | None = None) -> str:
        """The position of a number, or of the last."""
        number = len(self.changes) if number is None else number
        return str(self.changes[number - 1]["position"]) if number else "0"

    def now(self) -> dict[str, Frame]:
        """Every message as it is now."""
        return {change["id"]: change for change in self.changes}

    def change(self, message_id: str) -> Frame:
        """Post or edit a message."""
        number = len(self.changes) + 1
        seq = self.now()[message_id]["seq"] if message_id in self.now() else number
        mark = self.chance.getrandbits(60)
        made = {"id": message_id, "seq": seq, "rev": number, "position": f"{number}.{mark}"}
        self.changes.append(made)
        if self.is_live:
            self.tell("message" if seq == number else "message_updated", made)
        return made

    def tell(self, kind: str, data: Frame) -> None:
        """Send a frame."""
        self.told = max(self.told, data.get("rev", 0))
        self.out.append({"type": kind, "data": data})

    def open(self) -> None:
        """Take a new socket: it is live at once, and told where the chat stands."""
        self.out.clear()
        self.syncs.clear()
        self.is_open = self.is_live = True
        self.due = self.told = 0
        self.tell("chats", {"position": self.position()})

    def cut(self) -> None:
        """Lose the socket, with what was on its way."""
        self.is_open = self.is_live = False
        self.out.clear()
        self.syncs.clear()

    def restore(self, number: int) -> None:
        """Go back to what a copy has; whoever is connected is sent away."""
        self.cut()
        first, last = self.passed
        del self.changes[last if first <= number < last else number :]

    def take_sync(self) -> None:
        """Begin a replay, or go on from the smaller number."""
        after = self.syncs.popleft()
        number = number_of(after)
        if number > len(self.changes) or (number and self.position(number) != after):
            self.tell("error", {"type": "history-rewritten"})
            return
        self.at = number if self.is_live else min(self.at, number)
        self.since = number if self.is_live else min(self.since, number)
        self.due = 1 if self.is_live else self.due + 1
        self.is_live = False
        if self.at < self.told:
            self.pass_over(self.at, self.told)
        self.tell("replay", {"position": self.position(self.at)})

    def pass_over(self, number: int, later: int) -> None:
        """Note that a change is not told, or not again, before a later one."""
        first, last = self.passed
        self.passed = min(first or number, number), max(last, later)

    def fall_behind(self) -> None:
        """Find that the client is slow: it is brought up to date, and told only when it is."""
        self.is_live, self.at, self.since, self.due = False, len(self.changes), len(self.changes), 1

    def go_on(self) -> None:
        """Replay a page; at the end the socket is live."""
        end = min(self.at + PAGE, len(self.changes))
        newest = self.now()
        for change in self.changes[self.at : end]:
            now = newest[change["id"]]
            if now is change:  # each message once, as it is now
                self.tell("message" if change["seq"] > self.since else "message_updated", change)
            else:
                self.pass_over(change["rev"], now["rev"])
        self.at = end
        if end == len(self.changes):
            self.is_live = True
            for _ in range(self.due):
                self.tell("ready", {"position": self.position()})


def play(seed: int, held: Held) -> Server:
    """Play a schedule, then let everything arrive."""
    chance = random.Random(seed)
    server = Server(chance)
    for step in range(STEPS):
        steps: list[Callable[[], Any]] = [
            lambda step=step: server.change(f"m{step}"),
            lambda step=step: server.change(f"m{step}"),
            lambda: server.change(chance.choice(list(server.now()) or ["m"])),
        ]
        if chance.random() < 0.1:
            steps = [lambda: server.restore(chance.randint(0, len(server.changes))), server.cut]
        elif not server.is_open:
            steps.append(lambda: opens(server, held))
        else:
            steps += [lambda: hears(server, held)] * 4
            steps.append(lambda: server.syncs.append(held.position or "0"))
            if server.syncs:
                steps += [server.take_sync] * 2
            steps += [server.fall_behind if server.is_live else server.go_on] * 2
            steps.append(lambda step=step: held.shows(server.change(f"answered{step}")))
        chance.choice(steps)()
    server.cut()
    for _ in range(2):  # the first may tell that the history is another
        opens(server, held)
        server.syncs.append(held.position or "0")
        while server.syncs or server.out or not server.is_live:
            if server.syncs:
                server.take_sync()
            if not server.is_live:
                server.go_on()
            hears(server, held)
    return server


def opens(server: Server, held: Held) -> None:
    """Come back."""
    server.open()
    held.opens()


def hears(server: Server, held: Held) -> None:
    """Take some of the frames that are on their way."""
    for _ in range(server.chance.randint(1, 4)):
        if server.out:
            was_unknown = held.position is None
            held.take(server.out.popleft())
            if was_unknown and held.position is not None:
                server.known_from = number_of(held.position)


def is_fooled(seed: int, held: Held) -> bool:
    """Tell whether a client ends with anything else than the server has."""
    server = play(seed, held)
    messages = server.now()
    expected = {key: each for key, each in messages.items() if each["rev"] > server.known_from}
    return any(held.messages.get(key) != each for key, each in expected.items()) or any(
        messages.get(key) != each for key, each in held.messages.items())


def test_who_follows_the_rule_has_everything() -> None:
    """In no schedule does the rule lose a change, or keep one that the server has not."""
    assert [seed for seed in range(SCHEDULES) if is_fooled(seed, Held())] == []


class EveryFrameCounts(Held):
    """Lets frames from before the replay move the position."""

    def opens(self) -> None:
        super().opens()
        self.is_moving = True


class NeverBack(Held):
    """Keeps the largest number instead of what the replay says."""

    def take(self, frame: Frame) -> None:
        before = self.position
        super().take(frame)
        if before and self.position and number_of(self.position) < number_of(before):
            self.position = before


class AnswersCount(Held):
    """Lets the answer to a post move the position."""

    def shows(self, message: Any) -> None:
        super().shows(message)
        if self.position is not None:
            self.position = message["position"]


class KeepsWhatIsAbove(Held):
    """Keeps what is above the position like what is not."""

    def shows(self, message: Any) -> None:
        if message["rev"] >= self.messages.get(message["id"], message)["rev"]:
            self.messages[message["id"]] = message


class KeepsRewritten(Held):
    """Goes on where it is told that the history is another."""

    def forget(self) -> None:
        self.is_moving = False


class TrustsNumbers(Held):
    """Comes back with the bare number of where it was, as if the mark did not matter."""

    def take(self, frame: Frame) -> None:
        if frame["type"] != "error":
            super().take(frame)


class AnyCopyCounts(Held):
    """Takes the copy that came last."""

    def shows(self, message: Any) -> None:
        self.messages[message["id"]] = message


@pytest.mark.parametrize("bent", [
    EveryFrameCounts, NeverBack, AnswersCount, KeepsWhatIsAbove, KeepsRewritten, TrustsNumbers,
    AnyCopyCounts])
def test_who_bends_the_rule_loses_something(bent: type[Held]) -> None:
    """Each way of bending the rule is found out."""
    assert any(is_fooled(seed, bent()) for seed in range(SCHEDULES))
