"""What makes the tests quick and changes nothing that they see: files in memory, short stacks."""

import os
import traceback
from typing import Any

MEMORY, MEMORY_BYTES = "/dev/shm", 4 << 30  # where a flush takes no time, if there is so much free
STACK_FRAMES = 2


def quick_folder() -> str | None:
    """Tell where files are made and flushed quickly: in memory, if there is enough of it."""
    if not os.path.isdir(MEMORY):
        return None
    free = os.statvfs(MEMORY)
    return MEMORY if free.f_bavail * free.f_frsize > MEMORY_BYTES else None


def keep_data_in_memory() -> None:
    """Let pytest make its folders, and with them every database, in memory: a copy of a database is
    hundreds of files. PYTEST_DEBUG_TEMPROOT names another place."""
    if (place := quick_folder()) is not None:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", place)


def shorten_stacks() -> None:
    """Let asyncio's debug mode remember the last frames alone of the stack that made each future,
    task and handle: with pytest's own, that takes longer than all that is tested."""
    extract = traceback.StackSummary.extract

    def extract_few(frames: Any, **options: Any) -> traceback.StackSummary:
        if frames.__name__.startswith("walk_stack"):  # and not walk_tb, of an exception
            options |= {"limit": STACK_FRAMES, "lookup_lines": False}
        return extract(frames, **options)

    traceback.StackSummary.extract = extract_few  # type: ignore[method-assign,assignment]
