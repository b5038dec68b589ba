"""Many small things as few large ones: look-ups in groups, commits in groups.

Nothing waits for a timer: while one group is with PostgreSQL, the next piles up.
"""

import abc
import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import asyncpg

from plumbing import metrics
from plumbing.database import ABSENT, Unavailable
from plumbing.deadline import WorkFor, deadline
from plumbing.process import Tasks
from plumbing.queues import Queues

WRITE_SECONDS = 1.8  # how long a write is tried again where the connection was lost
WRITE_PAUSE_SECONDS = 0.05
GROUP_SIZE_MAX = 512  # of what one commit takes
LOOKED_UP_MAX = 32  # items at once
PENDING_MAX = 20_000  # items that wait for a commit

log = logging.getLogger("messenger.groups")

# ---- Look-ups in groups

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class GroupReader(Generic[Item, Outcome]):
    """Looks up in groups: what piled up while another look-up ran.

    There is no timer: an idle reader looks a lone item up at once. An item is looked up after it
    was asked for, and once for all who ask meanwhile. So many are told in a round of the loop: what
    each does then may take long, and others come in between.
    """

    def __init__(
        self, look_up: Callable[[list[Item]], Awaitable[list[Outcome]]], told_at_once: int = 1
    ) -> None:
        self._look_up = look_up  # answers an outcome for each item
        self._told_at_once = told_at_once
        self._pending: dict[Item, list[asyncio.Future[Outcome]]] = {}
        self._running: asyncio.Task[None] | None = None
        self._telling = Tasks()

    async def get(self, item: Item) -> Outcome:
        """Look an item up; raises what the look-up does."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._pending.setdefault(item, []).append(future)
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await future

    async def get_all(self, items: Sequence[Item]) -> list[Outcome]:
        """Look several items up together; raises what the look-up does."""
        if len(items) == 1:
            return [await self.get(items[0])]
        return await asyncio.gather(*map(self.get, items))

    async def _run(self) -> None:
        try:
            while self._pending:
                items = list(itertools.islice(self._pending, LOOKED_UP_MAX))
                waiting = [self._pending.pop(item) for item in items]
                try:
                    outcomes = await self._look_up_for_all(items)
                except Exception as error:
                    if isinstance(error, Unavailable):  # nor would the others get an answer in time
                        waiting += self._pending.values()
                        self._pending.clear()
                    for future in undone(waiting):
                        future.set_exception(error)
                else:
                    self._telling.spawn(self._tell(waiting, outcomes))
        finally:
            self._running = None

    async def _look_up_for_all(self, items: list[Item]) -> list[Outcome]:
        with WorkFor(self):
            return await self._look_up(items)

    async def _tell(
        self, waiting: list[list[asyncio.Future[Outcome]]], outcomes: list[Outcome]
    ) -> None:
        """Tell who waits what was found."""
        told = 0
        for futures, outcome in zip(waiting, outcomes, strict=True):
            for future in undone([futures]):
                future.set_result(outcome)
                told += 1
                if told % self._told_at_once == 0:
                    await asyncio.sleep(0)


def undone(waiting: Iterable[list[asyncio.Future[Any]]]) -> Iterator[asyncio.Future[Any]]:
    """List whom somebody still waits for."""
    return (future for futures in waiting for future in futures if not future.done())


def columns_of(rows: Iterable[Sequence[Any]]) -> list[list[Any]]:
    """Turn rows into columns, as a statement takes a group: an array of each."""
    return [list(column) for column in zip(*rows, strict=True)]


def by_place(rows: Iterable[Sequence[Any]], count: int) -> list[list[Any]]:
    """Sort rows by their first value, the place of an item among so many, counted from 1.

    Answers the rows of each item, without it.
    """
    found: list[list[Any]] = [[] for _ in range(count)]
    for place, *row in rows:
        found[place - 1].append(tuple(row))
    return found


# ---- Piece by piece

Key = TypeVar("Key", bound=Hashable)
Thing = TypeVar("Thing", bound=Hashable)


class Pieces(Generic[Key, Thing]):
    """Does the things of each key in their order, so many at once, in a task for as long as there
    are any.

    What is asked for again while it waits is done once; while it is being done, once more. Of each
    key so many may wait; where more was asked for, nothing more is taken, and `send_back` is called
    once all those are done.
    """

    def __init__(
        self, tasks: Tasks, do: Callable[[Key, list[Thing]], Awaitable[None]], at_once: int,
        at_most: int, send_back: Callable[[Key], None],
    ) -> None:
        self._tasks = tasks
        self._do = do  # raises nothing
        self._at_once = at_once
        self._at_most = at_most  # may wait
        self._send_back = send_back
        self._waiting: dict[Key, dict[Thing, None]] = {}  # in the order in which they came
        self._left_out: set[Key] = set()

    def put(self, key: Key, *wanted: Thing) -> None:
        """Ask for things to be done."""
        if key not in self._waiting:
            self._waiting[key] = {}
            self._tasks.spawn(self._run(key))
        things = self._waiting[key]
        for thing in wanted:
            if thing in things or (key not in self._left_out and len(things) < self._at_most):
                things[thing] = None
            else:
                self._left_out.add(key)

    async def _run(self, key: Key) -> None:
        things = self._waiting[key]
        try:
            while things:
                piece = list(itertools.islice(things, self._at_once))
                for thing in piece:
                    del things[thing]
                await self._do(key, piece)
        finally:
            del self._waiting[key]
            if key in self._left_out:
                self._left_out.remove(key)
                self._send_back(key)


# ---- Commits in groups


@dataclass(eq=False, slots=True)
class Entry(Generic[Item, Outcome]):
    """An item on its way."""

    item: Item
    party: Hashable  # whose it is
    answer: Callable[[Outcome | Exception], None]  # is told what became of it
    deadline: float  # until when it is tried, by the loop's clock
    again: bool = False  # whether it may have been committed before


@dataclass(slots=True)
class Written(Generic[Item, Outcome]):
    """Entries that were committed, with their rows, or why they were not."""

    group: Sequence[Entry[Item, Outcome]] = ()
    rows: Sequence[Any] = ()
    error: Exception | None = None


def is_held(error: Exception) -> bool:
    """Tell whether a statement failed because somebody else held a lock that it needs."""
    return isinstance(error.__cause__, asyncpg.LockNotAvailableError)


class GroupWriter(abc.ABC, Generic[Item, Outcome]):
    """Commits in groups: of what piled up while another commit ran.

    There is no timer: an idle writer commits a lone item at once. An item that makes its group fail
    fails alone, for the group is sent again item by item; a group whose answer was lost is sent
    again as it is. So committing an item twice must be the same as once.

    Parties take turns in a group, and what one commit takes is bounded by size: a flood of long
    items makes its own party wait, and another's item is in the next group but one.

    Items whose lock somebody else holds leave their group and wait in a lane, one for each lock,
    until one of them is written: they delay no others. Items of one party and lock always keep
    their order.

    A subclass says how: `commit`, `publish`, `lock_of` and `free`.
    """

    def __init__(self) -> None:
        self._pending: Queues[Entry[Item, Outcome]] = Queues()  # by party
        self._lanes: dict[Hashable, deque[Entry[Item, Outcome]]] = {}  # by the lock that is held
        self._running: asyncio.Task[None] | None = None
        self._trying: asyncio.Task[None] | None = None  # whether locks are free again
        kind = type(self).__name__.removesuffix("Writer").lower()
        self._timer, self._sizes = metrics.COMMITS.labels(kind), metrics.GROUPS.labels(kind)

    @abc.abstractmethod
    async def commit(self, items: list[Item]) -> Sequence[Any]:
        """Commit a group; answer a row for each item. Raises Unavailable, asyncpg.PostgresError."""

    @abc.abstractmethod
    def publish(
        self, items: list[Item], rows: Sequence[Any], again: list[bool]
    ) -> Sequence[Outcome | Exception]:
        """Let everybody know what became of items, by their rows; answer the outcome of each.

        `again` tells of each whether it may have been committed before. It must not wait.
        """

    @abc.abstractmethod
    def lock_of(self, item: Item) -> Hashable:
        """Tell what committing an item locks."""

    @abc.abstractmethod
    async def free(self, locks: list[Any]) -> set[Any]:
        """Answer those of some locks that nobody holds right now. Raises Unavailable."""

    def size_of(self, _item: Item) -> int:
        """Tell how much of a group an item is, where a small one is 1."""
        return 1

    def put(
        self, item: Item, party: Hashable, answer: Callable[[Outcome | Exception], None],
        until: float | None = None,
    ) -> None:
        """Add an item of a party, tried until a time. Raises Unavailable where too much waits.

        `answer` is called with its outcome or the exception that prevented it, right after the item
        is published. It must not wait.
        """
        if len(self._pending) + sum(map(len, self._lanes.values())) >= PENDING_MAX:
            raise Unavailable("Too much is waiting to be written.")
        until = until or asyncio.get_running_loop().time() + WRITE_SECONDS
        self._pending.append(party, Entry(item, party, answer, until))
        self._run()

    async def submit(self, item: Item, party: Hashable) -> Outcome:
        """Add an item of a party, and wait for its outcome; raises what prevented it."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

        def settle(outcome: Outcome | Exception) -> None:
            if future.done():
                return
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        self.put(item, party, settle, deadline())
        try:
            async with asyncio.timeout_at(deadline()):
                return await future
        except TimeoutError:  # it may still be committed
            raise Unavailable(ABSENT) from None

    async def finish(self) -> None:
        """Wait until everything that was put is answered."""
        while running := [task for task in (self._running, self._trying) if task is not None]:
            await asyncio.wait(running)

    def _run(self) -> None:
        if self._running is None:
            self._running = asyncio.create_task(self._write_groups())

    async def _write_groups(self) -> None:
        """Write group after group. One is published while the next is already with PostgreSQL, so
        that neither side waits for the other.
        """
        written: Written[Item, Outcome] | None = None
        count = 0
        try:
            while self._pending or written is not None:
                # Behind another group take half: else the two sides take turns, and each waits
                # for the other.
                count = (count + len(self._pending) + 1) // 2 if written else len(self._pending)
                group = self._take(count)
                count = len(group)
                if written is None:
                    written = await self._write(group)
                    continue
                writing = asyncio.create_task(self._write(group)) if group else None
                await asyncio.sleep(0)  # now it is on its way
                self._publish_group(written)
                written = await writing if writing is not None else None
        finally:
            self._running = None

    def _take(self, count: int) -> list[Entry[Item, Outcome]]:
        """Take so many of the pending entries, or fewer where they are large; what needs a held
        lock goes to its lane, and what is past its deadline is refused.
        """
        group: list[Entry[Item, Outcome]] = []
        now, size = asyncio.get_running_loop().time(), 0
        while len(group) < count and size < GROUP_SIZE_MAX and (following := self._pending.take()):
            _, entry = following
            if entry.deadline < now:  # a commit for nobody would make the next ones late, too
                _answer(entry, Unavailable(ABSENT))
            elif not self._queue_in_lane(entry):
                group.append(entry)
                size += self.size_of(entry.item)
        return group

    async def _write(self, group: list[Entry[Item, Outcome]]) -> Written[Item, Outcome]:
        """Commit a group; it is left to publish it. Never raises.

        Where that fails its items are written one by one, in order, and published here.
        """
        if not group:
            return Written()
        try:
            began = time.perf_counter()
            with WorkFor(self):
                rows = await self._persist(group)
            self._timer.observe(time.perf_counter() - began)
            self._sizes.observe(len(group))
        except Exception as error:
            if is_held(error):
                return await self._write(await self._set_aside(group))
            if len(group) == 1 or isinstance(error, Unavailable):
                return Written(group, error=error)
            rest = group
            # All that needs a held lock goes to its lane at once: later the lane could be gone.
            while rest := [entry for entry in rest if not self._queue_in_lane(entry)]:
                self._publish_group(await self._write([rest.pop(0)]))
            return Written()
        if self._lanes:
            self._close_lanes(group)
        return Written(group, rows)

    async def _persist(self, group: list[Entry[Item, Outcome]]) -> Sequence[Any]:
        """Commit, again while the connection is lost, until the last entry's deadline."""
        items, until = [entry.item for entry in group], max(entry.deadline for entry in group)
        while True:
            try:
                async with asyncio.timeout_at(until):
                    return await self.commit(items)
            except TimeoutError:
                raise Unavailable(ABSENT) from None
            except Unavailable as error:
                if is_held(error) or asyncio.get_running_loop().time() > until:
                    raise
            for entry in group:
                entry.again = True
            await asyncio.sleep(WRITE_PAUSE_SECONDS)

    def _publish_group(self, written: Written[Item, Outcome]) -> None:
        """Publish a group that was written, then answer each of its items."""
        group, error = written.group, written.error
        outcomes: Sequence[Outcome | Exception] = ()
        if group and error is None:
            try:
                outcomes = self.publish(
                    [entry.item for entry in group], written.rows, [each.again for each in group])
            except Exception as failure:
                log.exception("what was committed could not be published")
                error = failure
        if error is not None:
            outcomes = [error] * len(group)
        for entry, outcome in zip(group, outcomes, strict=True):
            _answer(entry, outcome)

    # Lanes: what waits because somebody else holds its lock

    async def _set_aside(self, group: list[Entry[Item, Outcome]]) -> list[Entry[Item, Outcome]]:
        """Put those of a group into lanes whose lock is held; answer the rest.

        What is pending may need held locks, too: that would be found out one wait at a time.
        """
        entries = (*group, *self._pending)
        locks = list(dict.fromkeys(self.lock_of(entry.item) for entry in entries))
        free = await self._free(locks) if len(locks) > 1 else set()
        held = [lock for lock in locks if lock not in free]
        if fresh := [lock for lock in held if lock not in self._lanes]:
            log.warning("somebody else holds a lock: %s of %s wait", fresh[:5], type(self).__name__)
        for lock in held:
            self._lanes.setdefault(lock, deque())
        rest = [entry for entry in reversed(group) if not self._queue_in_lane(entry, first=True)]
        return rest[::-1]

    def _queue_in_lane(self, entry: Entry[Item, Outcome], first: bool = False) -> bool:
        """Let an entry wait in the lane of its lock, until its deadline; False: there is none."""
        if not self._lanes or (lane := self._lanes.get(self.lock_of(entry.item))) is None:
            return False
        if first:
            lane.appendleft(entry)
        else:
            lane.append(entry)
        asyncio.get_running_loop().call_at(entry.deadline, _expire, lane, entry)
        if self._trying is None:
            self._trying = asyncio.create_task(self._try_lanes())
        return True

    async def _try_lanes(self) -> None:
        """Write the first of each lane whose lock is free; or else wait for one lock."""
        try:
            while waiting := [lock for lock, lane in self._lanes.items() if lane]:
                free = await self._free(waiting) if len(waiting) > 1 else set()
                for lock in [lock for lock in waiting if lock in free] or waiting[:1]:
                    await self._try_lane(lock)
            self._lanes.clear()  # nothing waits in any
        finally:
            self._trying = None

    async def _try_lane(self, lock: Hashable) -> None:
        """Write the first of a lane; then it is the last lane, so that each has its turn."""
        if lane := self._lanes.pop(lock, None):
            self._lanes[lock] = lane
            self._publish_group(await self._write([lane.popleft()]))

    async def _free(self, locks: list[Hashable]) -> set[Hashable]:
        try:
            return await self.free(locks)
        except Exception as error:
            log.debug("which locks are free is not known: %r", error)
            return set()

    def _close_lanes(self, group: list[Entry[Item, Outcome]]) -> None:
        """Let what waits for the locks of a group that was written go on as usual."""
        for entry in group:
            if lane := self._lanes.pop(self.lock_of(entry.item), None):
                for held in reversed(lane):
                    self._pending.put_back(held.party, held)
                lane.clear()  # so that _expire, which is still to come, finds none of them
                self._run()


def _expire(lane: deque[Entry[Item, Outcome]], entry: Entry[Item, Outcome]) -> None:
    """Refuse an entry that still waits in a lane at its deadline."""
    if entry in lane:
        lane.remove(entry)
        _answer(entry, Unavailable("Somebody else holds what this would change."))


def _answer(entry: Entry[Item, Outcome], outcome: Outcome | Exception) -> None:
    try:
        entry.answer(outcome)
    except Exception:
        log.exception("an outcome could not be told")
