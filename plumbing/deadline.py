"""For whom a task works, and one deadline over all that a request waits for.

Both belong to the task that serves the request, and a frame of a websocket counts as a request. A
task that a request starts has neither: what it does may go on after the answer.
"""

import asyncio
import contextlib
from collections.abc import Hashable, Iterator
from typing import Any

REQUEST_SECONDS = 1.9  # for all waits of a request together, so that its answer takes no 2 s

_deadlines: dict[asyncio.Task[Any] | None, float] = {}  # by the loop's clock
_parties: dict[asyncio.Task[Any] | None, Hashable] = {}


def deadline() -> float | None:
    """Tell until when the task that asks may wait, by the loop's clock; None for ever."""
    return _deadlines.get(asyncio.current_task())


def party() -> Hashable:
    """Tell for whom the task that asks works; None for nobody in particular."""
    return _parties.get(asyncio.current_task())


class RequestDeadline:
    """Whatever runs inside counts as one request, whose time starts now.

    A socket stays inside for as long as it is open, so this is a class with slots, which takes less
    memory than a generator.
    """

    __slots__ = ("_outer", "_task")

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._outer = _deadlines.get(self._task)
        _deadlines[self._task] = asyncio.get_running_loop().time() + REQUEST_SECONDS

    def __exit__(self, *_: object) -> None:
        if self._outer is None:
            del _deadlines[self._task]
        else:
            _deadlines[self._task] = self._outer


class WorkFor:
    """Whatever runs inside is done for a party: those who wait for the database take turns. Not
    within another.
    """

    __slots__ = ("_party", "_task")

    def __init__(self, of: Hashable) -> None:
        self._party = of

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        _parties[self._task] = self._party

    def __exit__(self, *_: object) -> None:
        del _parties[self._task]


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Put the deadline off by the time that is spent within: it has a bound of its own."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    began = loop.time()
    try:
        yield
    finally:
        if task in _deadlines:
            _deadlines[task] += loop.time() - began


async def linger(task: asyncio.Task[None], seconds: float) -> None:
    """Wait for a task, so many seconds at most and not beyond the deadline; it goes on."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(deadline()):
            await asyncio.wait([task], timeout=seconds)
