"""What it costs to count: `./run bench counting`, in 10 seconds.

The metrics of one lone post and of one call, as the server counts them, by a process on its own and
by one of several workers, which keep their counts in a shared folder.
"""

import os
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path

from rig import SERVER_CORE, pin

import messenger
from plumbing import metrics

NUMBER, REPEATS = 20_000, 7  # the quickest of so many repeats counts: the others were disturbed
WORK = "times"
TIMER, SIZES = metrics.COMMITS.labels("post"), metrics.GROUPS.labels("post")


def count_post() -> None:
    """Count what a lone post to two sockets counts."""
    TIMER.observe(0.0005)
    SIZES.observe(1)
    messenger.POSTED.inc(1)
    messenger.DELIVERED.inc(2)


def count_call() -> None:
    """Count what a call counts."""
    metrics.observe_request("get_me", 200, 0.001)


def microseconds(work: Callable[[], None]) -> float:
    """Time some work."""
    return min(timeit.repeat(work, number=NUMBER, repeat=REPEATS)) / NUMBER * 1e6


def main() -> None:
    """Time both kinds of process, each as one of its own."""
    print("| what is counted | one process | one of several workers |")
    print("|---|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        alone, together = [
            subprocess.run(
                [sys.executable, __file__, WORK], check=True, capture_output=True, text=True,
                env=os.environ | more).stdout.split()
            for more in ({}, metrics.environment(Path(folder)))]
    for name, one, other in zip(("a lone post", "a call"), alone, together, strict=True):
        print(f"| {name} | {one} µs | {other} µs |")


if __name__ == "__main__":
    if sys.argv[1:] == [WORK]:
        pin(SERVER_CORE)
        print(*(f"{microseconds(work):.1f}" for work in (count_post, count_call)))
    else:
        main()
