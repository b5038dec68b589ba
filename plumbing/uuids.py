"""Ids that sort by time."""

import random
import time
from uuid import UUID

VERSION_7 = 0x7 << 76 | 0b10 << 62  # and the variant
CHANCE = 0x0FFF_3FFF_FFFF_FFFF_FFFF  # the bits below the time that are neither


def uuid7() -> UUID:
    """Make a UUID that sorts by time (RFC 9562, section 5.7)."""
    milliseconds = time.time_ns() // 1_000_000
    return UUID(int=milliseconds << 80 | random.getrandbits(80) & CHANCE | VERSION_7)
