"""Hostile frames: each is answered as it must be, and nobody else notices."""

import asyncio
import json
import time
from collections import Counter
from typing import Any

import pytest
import requests

from support.fuzzing import LONG, SEED, Population
from support.hostile import (
    CLOSE,
    FIN,
    GONE,
    PONG,
    PONGED,
    REFUSED,
    TAKEN,
    TEXT,
    Hostile,
    Hostility,
    frame,
)
from support.people import HEAR_SECONDS, Person
from support.raw import Wire
from support.recorder import documents, pointer

pytestmark = pytest.mark.usefixtures("nothing_left")

FRAMES = 100_000 if LONG else 2_000
WARM_UP = FRAMES // 5
GROWTH_MB_MAX = 4.0  # of the server's memory, after the warm-up
BATCH = 12  # frames that are sent at once, at most
CHAT_FRAMES = 1000  # then another chat is taken, lest every replay becomes long
LOOKS = 50  # batches between two looks at how others are served


def heard(payload: bytes) -> dict[str, Any]:
    """Read a frame of the server's, and see that it is one that the document describes."""
    told: dict[str, Any] = json.loads(payload)
    at = pointer("components", "messages", f"server_{told['type']}", "payload")
    assert documents()[1].faults(at, told) == [], payload
    return told


def hears(wire: Wire) -> dict[str, Any]:
    """Read a text frame, and see that it is one that the document describes."""
    first, payload = wire.takes()
    assert first == FIN | TEXT, (first, payload)
    return heard(payload)


class Attack:
    """A client that sends hostile frames, and a bystander who must not notice."""

    def __init__(self, population: Population) -> None:
        self.population = population
        self.port = population.server.port
        self.hostility = Hostility(SEED, population.alice.access)
        self.sent = self.probes = self.closed = self.told = 0
        self.memory: list[float] = []  # MB, after the warm-up and at the end
        self.wire = self.bystander = Wire(self.port, "/ws", population.alice.access)
        self.begins_chat()

    def begins_chat(self) -> None:
        """Go on in a chat that has nothing in it but what somebody else said."""
        self.wire.close()
        self.bystander.close()
        alice, bob = self.population.alice, self.population.bob
        body = {"is_group": True, "name": "attacked", "participant_ids": [bob.id]}
        chat = self.asks(alice, "POST", "/chats", body)["id"]
        said = self.asks(bob, "POST", f"/chats/{chat}/messages", {"text": "hello"})
        self.hostility.chat = chat
        self.hostility.messages = [said["id"]] * 3 + self.population.messages[:1]
        self.hostility.names_chat = not self.hostility.names_chat
        self.bystander = Wire(self.port, f"/ws/{chat}", bob.access)
        self.connects()

    def connects(self) -> None:
        """Open another socket, on the chat or on all."""
        path = "/ws" if self.hostility.names_chat else f"/ws/{self.hostility.chat}"
        self.wire = Wire(self.port, path, self.population.alice.access)
        while path != "/ws" and hears(self.wire)["type"] != "ready":
            pass  # what the connection before had posted

    def asks(self, person: Person, method: str, path: str, body: Any = None) -> Any:
        """Ask over REST; anything but success fails."""
        url = f"{self.population.server.url}/api/v1{path}"
        answer = requests.request(
            method, url, json=body, headers=person.headers, timeout=HEAR_SECONDS)
        assert answer.status_code < 300, answer.text
        return answer.json()

    def runs(self, frames: int) -> None:
        """Send as many frames, in batches."""
        batches = 0
        while self.sent < frames:
            batch = [self.hostility.make()]
            size = self.hostility.random.randint(1, BATCH)
            while len(batch) < size and not batch[-1].is_last:
                batch.append(self.hostility.make())
            before = self.sent
            self.attacks(batch)
            batches += 1
            if batches % LOOKS == 0:
                self.looks()
            if before // CHAT_FRAMES != self.sent // CHAT_FRAMES:
                self.begins_chat()
            if before < WARM_UP <= self.sent:
                self.memory.append(self.population.server.memory_mb())
        self.looks()
        self.memory.append(self.population.server.memory_mb())

    def attacks(self, batch: list[Hostile]) -> None:
        """Send frames and a last one that is sure to be answered, and judge what comes back."""
        self.sent += len(batch)
        data = b"".join(each.data for each in batch)
        try:
            if batch[-1].ends_in == GONE:
                self.wire.gives(data)
                self.wire.close()
                self.connects()
                return
            self.probes += 1
            probe = {"type": "auth", "token": "none", "ref": f"probe {self.probes}"}
            self.wire.gives(data + frame(FIN | TEXT, json.dumps(probe).encode()))
            if batch[-1].is_last:
                self.is_closed(batch)
            else:
                self.is_answered(batch)
        except (AssertionError, OSError, EOFError) as error:
            sent = "\n".join(map(str, batch))
            raise AssertionError(
                f"{error!r}\nafter these frames on {self.wire.path}:\n{sent}") from error

    def is_answered(self, batch: list[Hostile]) -> None:
        """Read up to the answer to the probe: before it every frame has got what it is owed."""
        answers, pongs = [], []
        while True:
            first, payload = self.wire.takes()
            if first == FIN | PONG:
                pongs.append(payload)
                continue
            assert first == FIN | TEXT, (first, payload)
            told = heard(payload)
            if told["type"] in ("error", "ack", "auth", "pong"):
                answers.append(told)
            if told.get("ref") == f"probe {self.probes}":
                break
        assert answers.pop()["data"]["status"] == 401
        assert pongs == [each.payload for each in batch if each.ends_in == PONGED]
        self.judges(batch, answers)
        refs = Counter(each.ref for each in batch if each.ref is not None)
        assert refs <= Counter(told.get("ref") for told in answers), answers

    def is_closed(self, batch: list[Hostile]) -> None:
        """Read up to the close frame, see its code and that nothing follows, and come back."""
        answers = []
        first, payload = self.wire.takes()
        while first != FIN | CLOSE:
            if first == FIN | TEXT:
                answers.append(heard(payload))
            first, payload = self.wire.takes()
        assert int.from_bytes(payload[:2], "big") == batch[-1].ends_in, payload
        self.judges(batch, answers)
        with pytest.raises((EOFError, ConnectionError)):
            self.wire.takes()
        self.closed += 1
        self.wire.close()
        self.connects()

    def judges(self, batch: list[Hostile], answers: list[dict[str, Any]]) -> None:
        """Count the refusals: one for each frame that is wrong, at most one for any other."""
        refused = [told for told in answers if told["type"] == "error"]
        self.told += len(refused)
        least = sum(each.ends_in == REFUSED for each in batch)
        most = least + sum(each.ends_in == TAKEN for each in batch)
        assert least <= len(refused) <= most, (least, most, answers)
        wrong = [told for told in refused if not 400 <= told["data"]["status"] < 500]
        assert wrong == []

    def looks(self) -> None:
        """See that the bystander is served: over REST, and live on the socket."""
        text = f"after {self.sent}"
        path = f"/chats/{self.hostility.chat}/messages"
        self.asks(self.population.bob, "POST", path, {"text": text})
        deadline = time.monotonic() + HEAR_SECONDS
        while (told := hears(self.bystander))["data"].get("text") != text:
            assert told["type"] != "error", told
            assert time.monotonic() < deadline


@pytest.mark.timeout(3600 if LONG else 120)
async def test_hostile_frames_are_refused_and_nobody_else_notices(
    population: Population, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong frame gets one error, and one that breaks the protocol its close code; a bystander is
    served all along, and the server's memory does not grow."""
    attack = Attack(population)
    try:
        await asyncio.to_thread(attack.runs, FRAMES)
    finally:
        attack.wire.close()
        attack.bystander.close()
    before, after = attack.memory
    if LONG:
        with capsys.disabled():
            print(f"\n{attack.sent} frames, {attack.told} refused, {attack.closed} times closed; "
                  f"{before:.1f} MB after {WARM_UP}, {after:.1f} MB in the end")
    assert attack.told > FRAMES // 3
    assert attack.closed > FRAMES // 100
    assert after - before < GROWTH_MB_MAX
