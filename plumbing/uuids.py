"""Ids that sort by time."""

import random
import time
from uuid import UUID


def uuid7() -> UUID:
    """Make a UUID that sorts by time (RFC 9562, section 5.7)."""
    milliseconds = time.time_ns() // 1_000_000
    chance = random.getrandbits(74)
    value = milliseconds << 80 | 0x7 << 76 | (chance >> 62) << 64 | 0b10 << 62
    return UUID(int=value | chance & (2**62 - 1))
