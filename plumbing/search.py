"""Texts taken apart for a search, and an index of their words.

A long text takes milliseconds. So one is taken apart in a round of the loop, or short ones for a
moment, and those who ask for it take turns.
"""

import asyncio
import time
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, TypeVar

from plumbing.database import Database, Unavailable
from plumbing.guard import MOMENT_SECONDS, FairTurns, Marks
from plumbing.text import holds_runs, words_of

INDEX_PAGE = 500  # texts that are indexed at once
INDEX_WORDS_MAX = 10_000  # of them together, but for the last
INDEX_SECONDS = 0.1  # how long a search waits for its texts to be indexed
INDEX_REST = 9  # times as long as the indexing of a chat took, or that in the background

Thing = TypeVar("Thing")


class Texts:
    """Takes texts apart, a long one at a time; of those who ask, the key goes next whose texts took
    the least time.
    """

    def __init__(self, seconds: float) -> None:
        self._turns = FairTurns(1)
        self._seconds = seconds  # that a search may take

    async def words_of(
        self, asker: Hashable, texts: Iterable[str], words_max: int
    ) -> list[set[str]]:
        """Tell what an index of words has of each of the first of some texts (text.words_of): of as
        many as are taken apart in one turn, and of no more once there are more than so many words.
        """
        def take_apart() -> list[set[str]]:
            found: list[set[str]] = []
            count = 0
            for text in for_a_moment(texts):
                found.append(words_of(text))
                count += len(found[-1])
                if count > words_max:
                    break
            return found

        return await self._turns.call(asker, take_apart)

    async def find(
        self, asker: Hashable, texts: Sequence[str], runs: Sequence[str], at_most: int,
        unsure_of: Collection[str] = (),
    ) -> tuple[list[int], int]:
        """Find those texts that hold each of some runs as it stands, at most so many, and of words
        that an index is not sure of all.

        Answers their places, and how many texts were looked through before so many were found or
        the time was over.
        """
        long_runs = [run for run in runs if len(run) > 2]  # what an index has is sure of others
        if not long_runs and not unsure_of:
            count = min(at_most, len(texts))
            return list(range(count)), count
        until = time.monotonic() + self._seconds
        found: list[int] = []
        seen = 0

        def look_on() -> int:
            for place in for_a_moment(range(seen, len(texts))):
                if holds(texts[place], unsure_of, long_runs):
                    found.append(place)
                if len(found) == at_most:
                    break
            return place + 1

        while seen < len(texts):
            seen = await self._turns.call(asker, look_on)
            if len(found) == at_most or time.monotonic() > until:
                break
        return found, seen


def for_a_moment(things: Iterable[Thing]) -> Iterator[Thing]:
    """Pass on as many things as MOMENT_SECONDS allow, and the first in any case."""
    rest_at = time.monotonic() + MOMENT_SECONDS
    for thing in things:
        yield thing
        if time.monotonic() > rest_at:
            break


def holds(text: str, words: Collection[str], runs: Sequence[str]) -> bool:
    """Tell whether a text holds all of some words of an index, and each of some runs."""
    return (not words or words_of(text).issuperset(words)) and (
        not runs or holds_runs(text, runs))


class SearchIndex:
    """Takes in the words of texts a little later than the texts, so that who writes them does not
    wait.

    In the background it works a tenth of the time at most. A search first has its own chat taken
    in, so it finds what was posted a moment ago, by whomever.

    `select_unindexed` is a statement that takes a chat and how many texts, and answers rows of
    since, seq, rev and text, by rev; `index_words` one that takes the chat, since and the last rev,
    the seqs, and of each the words, joined by spaces, and answers whether nobody was faster.
    """

    def __init__(
        self, database: Database, seconds: float, select_unindexed: str, index_words: str
    ) -> None:
        self._database = database
        self._select_unindexed, self._index_words = select_unindexed, index_words
        self._waiting: set[int] = set()  # chats in which something changed
        self._indexing: set[int] = set()  # chats
        self._rests_until = Marks()  # by chat: when a search may have it indexed again
        self.texts = Texts(seconds)

    def note(self, chat_ids: Iterable[int]) -> None:
        """Take note of chats in which something changed: they are indexed soon."""
        self._waiting.update(chat_ids)

    async def index_for_search(self, chat_id: int, asker: Hashable) -> bool:
        """Do what `index` does, but leave it all for later where somebody does it for the chat
        already, or where searches of the chat took long for it a moment ago: a chat that grows
        faster than it can be indexed would make each of them wait.
        """
        began = time.monotonic()
        if chat_id in self._indexing or self._rests_until.of(chat_id, began) > began:
            self._waiting.add(chat_id)
            return not await self._database.rows(self._select_unindexed, chat_id, 1)
        try:
            return await self.index(chat_id, asker)
        finally:
            ended = time.monotonic()
            self._rests_until.put(chat_id, ended + INDEX_REST * (ended - began), ended)

    async def index(self, chat_id: int, asker: Hashable = "") -> bool:
        """Index what is new in a chat; askers take turns. Answers whether that is all: where it
        takes long the rest is left for later. Raises Unavailable.
        """
        deadline = time.monotonic() + INDEX_SECONDS
        self._indexing.add(chat_id)
        try:
            while rows := await self._database.rows(self._select_unindexed, chat_id, INDEX_PAGE):
                if time.monotonic() > deadline:
                    self._waiting.add(chat_id)
                    return False
                if await self._take_in(chat_id, asker, rows, deadline) and len(rows) < INDEX_PAGE:
                    break
        finally:
            self._indexing.discard(chat_id)
        return True

    async def _take_in(
        self, chat_id: int, asker: Hashable, rows: Sequence[Mapping[str, Any]], deadline: float
    ) -> bool:
        """Index the first of some texts of a chat: not too many words, nor beyond a deadline. Tells
        whether that was all.
        """
        words: list[str] = []
        count = 0
        while len(words) < len(rows):
            texts = map(itemgetter("text"), rows[len(words):])
            some = await self.texts.words_of(asker, texts, INDEX_WORDS_MAX - count)
            words += map(" ".join, some)
            count += sum(map(len, some))
            if count > INDEX_WORDS_MAX or time.monotonic() > deadline:
                break
        seqs = [row["seq"] for row in rows[:len(words)]]
        upto = rows[len(words) - 1]["rev"]
        is_done = await self._database.value(
            self._index_words, chat_id, rows[0]["since"], upto, seqs, words)
        return is_done and len(words) == len(rows)

    async def run(self) -> None:
        """Index what was posted here, chat by chat."""
        for chat_id in list(self._waiting):
            began = time.monotonic()
            self._waiting.discard(chat_id)
            try:
                await self.index(chat_id)
            except Unavailable:
                self._waiting.add(chat_id)
            await asyncio.sleep(INDEX_REST * (time.monotonic() - began))
