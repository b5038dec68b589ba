"""Things that wait, of many keys in turn: whatever one of them puts in, another's turn comes soon.
"""

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Set
from typing import Generic, TypeVar

Thing = TypeVar("Thing")
NO_KEY = object()


def any_key(_key: Hashable) -> bool:
    """Let every key have its turn."""
    return True


class Queues(Generic[Thing]):
    """Things that wait, in a queue of each key. Keys take turns: the key of what was taken comes
    behind all others.
    """

    def __init__(self) -> None:
        # The key whose turn is next stands first; of a plain dict, to take the first of very many
        # again and again takes longer each time.
        self._of: OrderedDict[Hashable, deque[Thing]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Thing]:
        return itertools.chain.from_iterable(self._of.values())

    def keys(self) -> Set[Hashable]:
        """Tell of which keys something waits."""
        return self._of.keys()

    def append(self, key: Hashable, thing: Thing) -> None:
        """Let a thing wait behind those of its key."""
        self._of.setdefault(key, deque()).append(thing)
        self._count += 1

    def put_back(self, key: Hashable, thing: Thing) -> None:
        """Let a thing wait before those of its key; a key of which nothing waits comes last."""
        self._of.setdefault(key, deque()).appendleft(thing)
        self._count += 1

    def take(
        self, is_free: Callable[[Hashable], bool] = any_key,
        cost: Callable[[Hashable], float] | None = None,
    ) -> tuple[Hashable, Thing] | None:
        """Take the first thing of the first key that is free, or of the one with the least cost;
        that key then comes behind all others. Answer both, or None where nothing could be taken.
        """
        free = filter(is_free, self._of)
        key = next(free, NO_KEY) if cost is None else min(free, key=cost, default=NO_KEY)
        if key is NO_KEY:
            return None
        queue = self._of[key]
        thing = queue.popleft()
        if queue:
            self._of.move_to_end(key)
        else:
            del self._of[key]
        self._count -= 1
        return key, thing

    def remove(self, key: Hashable, thing: Thing) -> None:
        """Take a thing of a key, if it is there."""
        queue = self._of.get(key, ())
        if thing in queue:
            self._count -= 1
            self._of[key].remove(thing)
            if not queue:
                del self._of[key]

    def drop(self, key: Hashable) -> Iterable[Thing]:
        """Take all things of a key."""
        dropped = self._of.pop(key, deque())
        self._count -= len(dropped)
        return dropped
