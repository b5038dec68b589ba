"""A page that tells what was done in a run, and what was counted."""

import argparse
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

import messenger
from plumbing import embedded
from torture.tally import Tally

MEANINGS = {
    "lost": "answered, or shown to somebody, and afterwards not in the database, or not as it was",
    "doubled": "more than once in the database, or answered with two numbers",
    "missed": "a member who followed did not end with it",
    "misordered": "numbers or watermarks that went back, or had holes",
    "leaked": "shown to, or accepted from, somebody who had been removed",
    "fooled": "in a client's own store, and not in the database, though nobody had told the client",
    "wrong": "an answer that nobody should get, a server that ended or complained by itself",
}
INTRODUCTION = """\
Clients post, edit, delete, read, are removed and come back, while everything beneath them is
killed, stopped, filled, cut off or put back to what it was. What each was answered and shown, and
what each keeps in a store of its own, is then held against the database.
`./run torture --help` tells how to repeat it."""

UNDONE = """\
*Undone*: acknowledged after the copy that the database went back to, or before a standby that was
behind had it. *Told*: how often a client learned that the history is another."""
RECOVERY = """\
Recovery ends when each chat has had a post accepted that was sent after the fault. After the loss
of a primary it begins with the promotion of its standby; after a copy was put in the database's
place, with the end of the old one; after a full disk, when there is room again."""


def page(
    given: argparse.Namespace, told: Sequence[tuple[str, Tally]], control: Tally | None,
    no_disk: str | None,
) -> str:
    """Write the page: its parts, each with what was counted; the control, what was skipped."""
    when = (
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, Python {platform.python_version()},"
        f" PostgreSQL {embedded.VERSION}, Linux {platform.release().partition('-')[0]};"
        f" seed {given.seed}.")
    zeros = [f"- **{kind}**: {meaning}" for kind, meaning in MEANINGS.items()]
    sections = [
        f"# Torture of messenger {messenger.VERSION}", INTRODUCTION, when,
        "## What must be 0", "\n".join(_zeros(told)), "\n".join(zeros),
        "## What was done", "\n".join(_flow(told)), UNDONE,
        "## Faults", RECOVERY, "\n".join(_faults(told)), *_rest(told, control, no_disk)]
    return "\n\n".join(sections) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|---|{'--:|' * (len(head) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _zeros(told: Sequence[tuple[str, Tally]]) -> Iterator[str]:
    rows = [[name, *(str(tally.found[kind]) for kind in MEANINGS)] for name, tally in told]
    return _table(["", *MEANINGS], rows)


def _flow(told: Sequence[tuple[str, Tally]]) -> Iterator[str]:
    head = ["", "minutes", "acknowledged", "edited, deleted", "delivered", "faults", "undone",
            "told"]
    rows = [[name, f"{tally.seconds / 60:.1f}", *(f"{number:,}" for number in (
        tally.acknowledged, tally.changed, tally.delivered, tally.faults.total(), tally.undone,
        tally.told))] for name, tally in told]
    return _table(head, rows)


def _faults(told: Sequence[tuple[str, Tally]]) -> Iterator[str]:
    rows = []
    for name, tally in told:
        for kind, times in sorted(tally.faults.items()):
            took = tally.recovery.get(kind)
            measured = (statistics.median(took), max(took)) if took else ()
            cells = [f"{seconds:.2f} s" for seconds in measured] or ["", ""]
            rows.append([f"{name}: {kind}", str(times), *cells])
    return _table(["", "times", "recovery, median", "slowest"], rows)


def _rest(
    told: Sequence[tuple[str, Tally]], control: Tally | None, no_disk: str | None
) -> Iterator[str]:
    for name, tally in told:
        if tally.slowest_delivery:
            yield (f"{name.capitalize()}: with all hints between the workers dropped, a message"
                   f" reached every socket within {tally.slowest_delivery:.2f} s.")
        if tally.returns:
            yield (f"{name.capitalize()}: once the database had gone back, every client had what it"
                   f" has after {tally.slowest_return:.2f} s at the latest.")
    if control is not None:
        counted = ", ".join(f"{kind} {count:,}" for kind, count in control.found.items())
        yield (
            "The control: a power cut with `fsync = off` was"
            + (f" found ({counted})." if counted else " NOT FOUND."))
    if no_disk:
        yield f"No disk was full, and no power cut: {no_disk}."
