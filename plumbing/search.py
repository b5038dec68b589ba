"""Texts taken apart for a search.

A long text takes milliseconds. So one is taken apart in a round of the loop, and those who ask for
it take turns.
"""

import time
from collections.abc import Hashable, Sequence

from plumbing.guard import Turns
from plumbing.text import holds_runs, words_of


class Texts:
    """Takes texts apart, one at a time; the keys of those who ask take turns."""

    def __init__(self, seconds: float) -> None:
        self._turns = Turns(1)
        self._seconds = seconds  # that a search may take

    async def words_of(self, asker: Hashable, text: str) -> set[str]:
        """Tell what an index of words has of a text (text.words_of)."""
        return await self._turns.call(asker, words_of, text)

    async def find(
        self, asker: Hashable, texts: Sequence[str], runs: Sequence[str], at_most: int
    ) -> tuple[list[int], int]:
        """Find those texts that hold each of some runs as it stands, at most so many.

        Answers their places, and how many texts were looked through before so many were found or
        the time was over.
        """
        long_runs = [run for run in runs if len(run) > 2]  # what an index has is sure of others
        if not long_runs:
            count = min(at_most, len(texts))
            return list(range(count)), count
        until = time.monotonic() + self._seconds
        found: list[int] = []
        for place, text in enumerate(texts):
            if await self._turns.call(asker, holds_runs, text, long_runs):
                found.append(place)
            if len(found) == at_most or time.monotonic() > until:
                return found, place + 1
        return found, len(texts)
