"""Hostile websocket frames: right ones that are spoilt, and what the server owes to each.

What it owes is decided here by other means than the server's: Python's json, and asyncapi.json.
"""

import json
import math
import random
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from support.recorder import documents, pointer

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
FIN = 0x80
FRAME_BYTES_MAX = 65_536
CONTROL_BYTES_MAX = 125

# What a hostile piece ends in, unless it is the number of a close code.
REFUSED = "refused"  # exactly one error frame
TAKEN = "taken"  # its effect, or one error frame
PONGED = "ponged"
IGNORED = "ignored"
GONE = "gone"  # it is the client who ends the connection
PROTOCOL_ERROR, NO_UTF8, TOO_BIG = 1002, 1007, 1009


@dataclass(frozen=True)
class Hostile:
    """Bytes that a client sends, and what they end in."""

    data: bytes
    ends_in: str | int
    payload: bytes = b""  # of a text or a ping, to be shown or to come back
    ref: str | None = None  # that its error or acknowledgement has

    @property
    def is_last(self) -> bool:
        """Whether the connection ends with it."""
        return self.ends_in == GONE or isinstance(self.ends_in, int)

    def __str__(self) -> str:
        shown = self.payload or self.data
        return f"{shown[:400]!r} ({len(self.data)} bytes, to be {self.ends_in})"


def frame(first: int, payload: bytes, mask: bytes = bytes(4), length: int | None = None) -> bytes:
    """Make a frame of a client (RFC 6455, section 5.2), claiming a length that may be wrong."""
    size = len(payload) if length is None else length
    if size < 126:
        head = bytes((first, 0x80 | size))
    elif size < 65_536:
        head = bytes((first, 0xFE)) + size.to_bytes(2, "big")
    else:
        head = bytes((first, 0xFF)) + size.to_bytes(8, "big")
    repeated = (mask * (len(payload) // 4 + 1))[: len(payload)]
    masked = int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")
    return head + mask + masked.to_bytes(len(payload), "big")


# ---- What is owed to a text

IDS = ("id", "reply_to", "message_id")


def is_exact(value: Any) -> bool:
    """Tell whether a text can be UTF-8: it has no half of a surrogate pair anywhere."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse_constant(name: str) -> Any:
    """Refuse what Python's json reads and JSON does not know: NaN, Infinity."""
    raise ValueError(name)


def read_float(digits: str) -> float:
    """Read a number, if a float can hold it. Raises ValueError."""
    if math.isinf(value := float(digits)):
        raise ValueError(digits)
    return value


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its fields. Raises KeyError where one is given twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise KeyError
    return made


def read_json(text: str) -> Any:
    """Read JSON as RFC 8259 has it.

    Raises ValueError, RecursionError for what is none, KeyError where a field is given twice: then
    it is the reader's choice which counts.
    """
    value = json.loads(
        text, parse_constant=refuse_constant, parse_float=read_float,
        object_pairs_hook=unrepeated)
    if not is_exact(value):
        raise ValueError("a lone surrogate")
    return value


def as_uuid(value: Any) -> Any:
    """Put the hyphens into a UUID that has none: the server takes both."""
    is_bare = isinstance(value, str) and re.fullmatch("[0-9A-Fa-f]{32}", value)
    return str(UUID(value)) if is_bare else value


def owed(payload: bytes) -> tuple[str | int, str | None]:
    """Tell what a text frame with this payload ends in, and the ref that must come back."""
    if len(payload) > FRAME_BYTES_MAX:
        return TOO_BIG, None
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        return NO_UTF8, None
    try:
        value = read_json(text)
    except (ValueError, RecursionError):
        return REFUSED, None
    except KeyError:
        return TAKEN, None
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        return REFUSED, None
    ref = value.get("ref") if isinstance(value.get("ref"), str) else None
    name = f"client_{value['type']}"
    if name not in documents()[1].content["components"]["messages"]:
        return REFUSED, ref
    hyphened = {field: as_uuid(each) if field in IDS else each for field, each in value.items()}
    at = pointer("components", "messages", name, "payload")
    is_right = not documents()[1].faults(at, hyphened)
    if not is_right:
        return REFUSED, ref
    return TAKEN, ref if value["type"] != "sync" else None  # which is not answered by its ref


# ---- Values

LONE = "\ud800"
STRINGS = (
    "", "\0", "a\0b", LONE, "\udfff\ud800", "x" * 4096, "x" * 4097, "🙂" * 4096, "🙂" * 4097,
    "ä" * 4096, "\u202e\ufeff\u200f", "١٢٣", "٧", "²", "12", "-1", "1e3", "0x1F", "null", "\r\n",
    "\\", '"', "\x1b[2J", "'; drop table messages; --", "%00", "{}", "$.text", "a`b",
    "00000000-0000-0000-0000-000000000000", "{00000000-0000-4000-8000-000000000000}",
    "urn:uuid:00000000-0000-4000-8000-000000000000", "0" * 32, "0" * 36,
    "00000000-0000-4000-8000-00000000000g", "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF",
    "٠0000000-0000-4000-8000-000000000000",
)
NUMBERS = (  # as they are written
    "0", "-0", "-0.0", "1", "-1", "1.0", "1.5", "1e0", "1e2", "1E400", "-1e400", "1e-400",
    "9223372036854775807", "9223372036854775808", "-9223372036854775808", "-9223372036854775809",
    "18446744073709551615", "18446744073709551616", "1" + "0" * 30, "9" * 400, "9" * 5000,
    "0.1e1", "4294967296", "NaN", "Infinity", "-Infinity", "01", "+1", ".5", "1.", "0x10", "1_0",
    "１",
)
LITERALS = (
    "null", "true", "false", "[]", "{}", "[[]]", "[null]", '{"":0}', "undefined", "None", "''",
    "[1,]", '{"a":1,}', "/**/1", "",
)
KEYS = (
    "type", "text", "id", "reply_to", "ref", "chat_id", "message_id", "after", "chats", "token",
    "", "Text", "__proto__", "__class__", "data", "\0", LONE, "x" * 10_000, "ключ", "$ref",
)


def written(value: Any, random: random.Random) -> str:
    """Write a value as JSON, with characters escaped or as they are."""
    return json.dumps(value, ensure_ascii=random.random() < 0.5)


def nested(random: random.Random) -> str:
    """Write something deep, or that begins so and never ends."""
    depth = random.choice((2, 50, 500, 1000, 1024, 5000, 20_000, 60_000, 100_000))
    opened, closed = random.choice((("[", "]"), ('{"a":', "}"), ('[{"":', "}]")))
    return opened * depth + "1" + (closed * depth if random.random() < 0.5 else "")


# ---- Frames


class Hostility:
    """Makes hostile frames for a socket, the same from the same seed."""

    def __init__(self, seed: int, token: str) -> None:
        self.random = random.Random(seed)
        self.token = token
        self.chat = 0
        self.names_chat = False  # whether frames name the chat: on /ws
        self.messages: list[str] = []
        self.made = 0
        self._kinds: list[tuple[int, Callable[[], Hostile]]] = [
            (50, self.spoilt), (10, self.worded), (8, self.mangled), (6, self.right),
            (3, self.deep), (3, self.of_a_size), (3, self.binary), (3, self.ping), (1, self.pong),
            (4, self.in_fragments), (1, self.out_of_turn), (1, self.no_utf8), (1, self.reserved),
            (1, self.bad_control), (1, self.bad_close), (1, self.bad_length), (1, self.unmasked),
            (1, self.cut_off), (1, self.garbage),
        ]

    def make(self) -> Hostile:
        """Make the next one."""
        self.made += 1
        weights, kinds = zip(*self._kinds, strict=True)
        [kind] = self.random.choices(kinds, weights)
        made: Hostile = kind()
        return made

    def text(self, payload: bytes) -> Hostile:
        """Send a text in one frame, masked as clients do."""
        ends_in, ref = owed(payload)
        data = frame(FIN | TEXT, payload, self.random.randbytes(4))
        return Hostile(data, ends_in, payload, ref)

    # ---- Texts
    def fields(self) -> dict[str, str]:
        """Write the fields of a frame that is right."""
        random = self.random
        made: dict[str, Any] = random.choice((
            {"type": "message", "text": f"number {self.made}"},
            {"type": "message", "text": "🙂 & é\n", "id": self.new_id()},
            {"type": "message", "text": "a reply", "reply_to": self.a_message()},
            {"type": "read", "message_id": self.a_message()},
            {"type": "typing"},
            {"type": "sync", "after": random.randrange(50)},
            {"type": "sync", "chats": {str(self.chat): random.randrange(50)}},
            {"type": "auth", "token": self.token},
            {"type": "ping"},
        ))
        if random.random() < 0.7:
            made["ref"] = f"ref {self.made}"
        if made["type"] not in ("auth", "ping") and (self.names_chat or random.random() < 0.1):
            made["chat_id"] = self.chat
        return {written(name, random): written(value, random) for name, value in made.items()}

    def new_id(self) -> str:
        """Make an id that is most likely nobody's, and remember it as a message's."""
        made = str(UUID(int=self.random.getrandbits(128)))
        self.messages[self.random.randrange(len(self.messages))] = made
        return made

    def a_message(self) -> str:
        """Name a message, most likely one of this chat."""
        return self.random.choice(self.messages)

    def joined(self, fields: Iterator[tuple[str, str]]) -> bytes:
        """Write an object; what cannot be UTF-8 goes as the bytes that it would be."""
        text = "{" + ",".join(f"{name}:{value}" for name, value in fields) + "}"
        return text.encode(errors="surrogatepass")

    def right(self) -> Hostile:
        """Send a frame as it should be."""
        return self.text(self.joined(iter(self.fields().items())))

    def worded(self) -> Hostile:
        """Send a right frame with a strange string where there may be any, or an id."""
        word = self.random.choice(STRINGS)
        made: dict[str, Any] = self.random.choice((
            {"type": "message", "text": word}, {"type": "message", "text": "x", "id": word},
            {"type": "read", "message_id": word}, {"type": "auth", "token": word},
            {"type": "message", "text": "x", "ref": word},
        ))
        if self.names_chat and made["type"] != "auth":
            made["chat_id"] = self.chat
        return self.text(written(made, self.random).encode(errors="surrogatepass"))

    def spoilt(self) -> Hostile:
        """Send a frame of which something is wrong."""
        random = self.random
        fields = list(self.fields().items())
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            place = random.randrange(len(fields) + 1)
            name, value = fields[place % len(fields)]
            change = random.randrange(6)
            if change == 0 and len(fields) > 1:
                del fields[place % len(fields)]
            elif change == 1:
                fields.insert(place, (written(random.choice(KEYS), random), self.value()))
            elif change == 2:
                fields.insert(place, (name, random.choice((value, self.value()))))
            else:
                fields[place % len(fields)] = name, self.value()
        return self.text(self.joined(iter(fields)))

    def value(self) -> str:
        """Write a value that is rarely the right one."""
        random = self.random
        kind = random.randrange(12)
        if kind < 4:
            return random.choice(NUMBERS)
        if kind < 8:
            return written(random.choice(STRINGS), random)
        if kind < 10:
            return random.choice(LITERALS)
        if kind == 10:
            key = random.choice((str(self.chat), "1.0", "-1", "٧", "1" + "0" * 19, ""))
            return written({key: 0}, random)
        return written(random.sample(STRINGS[:2] + STRINGS[10:], 3), random)

    def mangled(self) -> Hostile:
        """Send a right frame whose bytes were changed, cut, doubled or put elsewhere."""
        random = self.random
        payload = bytearray(self.joined(iter(self.fields().items())))
        place = random.randrange(len(payload))
        change = random.randrange(6)
        if change == 0:
            payload[place] ^= 1 << random.randrange(8)
        elif change == 1:
            del payload[place:]
        elif change == 2:
            payload[place:place] = random.choice(string.punctuation).encode()
        elif change == 3:
            payload[:0] = b"\xef\xbb\xbf"  # a byte order mark
        elif change == 4:
            payload *= 2
        else:
            payload = bytearray(payload.decode().encode(random.choice(("utf-16", "utf-32"))))
        return self.text(bytes(payload))

    def deep(self) -> Hostile:
        """Send something deep, as a frame or as a field of one."""
        deep = nested(self.random)
        if self.random.random() < 0.5:
            return self.text(deep.encode())
        fields = self.fields()
        fields[self.random.choice(list(fields))] = deep
        return self.text(self.joined(iter(fields.items())))

    def of_a_size(self) -> Hostile:
        """Send a right frame that is as large as it may be, or a little larger."""
        payload = self.joined(iter(self.fields().items()))
        size = self.random.choice((65_535, FRAME_BYTES_MAX, FRAME_BYTES_MAX + 1, 70_000))
        return self.text(payload.ljust(size))

    def no_utf8(self) -> Hostile:
        """Send a text that is no UTF-8."""
        bad = self.random.choice((
            b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x80", b"\xe2\x82",
        ))
        return self.text(b'{"type":"message","text":"' + bad + b'"}')

    # ---- Beneath the text
    def binary(self) -> Hostile:
        """Send a binary frame, JSON or not."""
        payload = self.random.choice((b"", b"\xff\x00", self.joined(iter(self.fields().items()))))
        return Hostile(frame(FIN | BINARY, payload, self.random.randbytes(4)), REFUSED)

    def ping(self) -> Hostile:
        """Send a ping with as much in it as it may have."""
        payload = self.random.randbytes(self.random.choice((0, 1, CONTROL_BYTES_MAX)))
        return Hostile(frame(FIN | PING, payload), PONGED, payload)

    def pong(self) -> Hostile:
        """Send a pong that nobody asked for."""
        return Hostile(frame(FIN | PONG, self.random.randbytes(9)), IGNORED)

    def in_fragments(self) -> Hostile:
        """Send a right frame in pieces, with a ping in between, characters cut in two."""
        payload = self.joined(iter(self.fields().items()))
        ends_in, ref = owed(payload)
        cuts = sorted(self.random.sample(range(1, len(payload)), 3))
        pieces = [payload[i:j] for i, j in zip([0, *cuts], [*cuts, None], strict=True)]
        data = frame(TEXT, pieces[0]) + frame(FIN | PONG, b"") + frame(CONTINUATION, pieces[1])
        data += frame(CONTINUATION, b"") + frame(CONTINUATION, pieces[2])
        data += frame(FIN | CONTINUATION, pieces[3])
        return Hostile(data, ends_in, payload, ref)

    def out_of_turn(self) -> Hostile:
        """Send a fragment that continues nothing, or begin anew before the last one."""
        begun = frame(TEXT, b'{"type":')
        return Hostile(self.random.choice((
            frame(FIN | CONTINUATION, b"{}"), frame(CONTINUATION, b"{}"),
            begun + frame(FIN | TEXT, b"{}"), begun + frame(TEXT, b"{}"),
            begun + frame(FIN | BINARY, b"{}"),
        )), PROTOCOL_ERROR)

    def reserved(self) -> Hostile:
        """Send a frame with a reserved opcode or a reserved bit."""
        opcode = self.random.choice((3, 4, 5, 6, 7, 11, 12, 13, 14, 15))
        bit = self.random.choice((0x40, 0x20, 0x10, 0x70))
        first = self.random.choice((FIN | opcode, FIN | bit | TEXT, FIN | bit | PING))
        return Hostile(frame(first, b"{}"), PROTOCOL_ERROR)

    def bad_control(self) -> Hostile:
        """Send a control frame that is too long, or in fragments."""
        kind = self.random.choice((PING, PONG, CLOSE))
        long = frame(FIN | kind, bytes(self.random.choice((126, 127, 65_536))))
        return Hostile(self.random.choice((long, frame(kind, b""))), PROTOCOL_ERROR)

    def bad_close(self) -> Hostile:
        """Close with a code or a reason that may not be."""
        code = self.random.choice((0, 1, 999, 1004, 1005, 1015, 2999)).to_bytes(2, "big")
        cut_off, bad_reason = frame(FIN | CLOSE, b"\x03"), frame(FIN | CLOSE, b"\x03\xe8\xff")
        if self.random.random() < 0.3:
            return Hostile(bad_reason, NO_UTF8)
        return Hostile(self.random.choice((cut_off, frame(FIN | CLOSE, code))), PROTOCOL_ERROR)

    def bad_length(self) -> Hostile:
        """Announce a frame that is far too long, or write a small length in eight bytes."""
        if self.random.random() < 0.3:
            payload = self.joined(iter(self.fields().items()))
            ends_in, ref = owed(payload)
            head = bytes((FIN | TEXT, 0xFF)) + len(payload).to_bytes(8, "big") + bytes(4)
            return Hostile(head + payload, ends_in, payload, ref)
        length = self.random.choice((FRAME_BYTES_MAX + 1, 2**31, 2**32, 2**63 - 1, 2**64 - 1))
        return Hostile(frame(FIN | TEXT, b"{}", length=length), TOO_BIG)

    def unmasked(self) -> Hostile:
        """Send a frame without a mask, as only servers do."""
        payload = self.joined(iter(self.fields().items()))[:125]
        ends_in, ref = owed(payload)
        return Hostile(bytes((FIN | TEXT, len(payload))) + payload, ends_in, payload, ref)

    def cut_off(self) -> Hostile:
        """Hang up in the middle of a frame."""
        data = self.right().data
        return Hostile(data[: self.random.randrange(1, len(data))], GONE)

    def garbage(self) -> Hostile:
        """Send anything, and hang up."""
        return Hostile(self.random.randbytes(self.random.choice((1, 2, 14, 300))), GONE)
