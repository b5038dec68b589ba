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
    "lost": (
        "a message that was acknowledged, or shown to somebody, is gone from "
        "the database, or is not as it was"),
    "doubled": "a message is in the database twice, or was acknowledged with two numbers",
    "missed": "at the end, the client of a member does not have a message of the chat",
    "misordered": "the numbers of messages, or the read marks, went back or had holes",
    "leaked": "a message was shown to, or accepted from, somebody who had been removed",
    "fooled": "a client kept what the database had lost, because nobody told it of the new history",
    "wrong": (
        "somebody got an answer that nobody should get, or a server failed "
        "though it had no reason to"),
}
INTRODUCTION = """\
Clients post, edit, delete, read, are removed and come back, while everything beneath them is
killed, stopped, filled, cut off or replaced by an older copy. At the end, the answers and frames
that each client got, and what it stored itself, are compared with the database.
`./run torture --help` tells how to repeat it."""

UNDONE = """\
*Undone*: acknowledged messages that the torture itself removed, when it replaced the database with
an older copy, or promoted a standby that had not received them yet. *Told*: how often a client was
told that the history was rewritten."""
RECOVERY = """\
Recovery begins with the fault, and ends when each chat has accepted a post that was sent after it.
There are three exceptions. If a primary is lost, recovery begins when its standby is promoted. If
the database is replaced by a copy, it begins when the old database stops. If the disk is full, it
begins when there is room again. A row without a recovery time is the kill that ends
a run."""


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
    return _table(["", "count", "recovery, median", "slowest"], rows)


def _rest(
    told: Sequence[tuple[str, Tally]], control: Tally | None, no_disk: str | None
) -> Iterator[str]:
    for name, tally in told:
        if tally.slowest_delivery:
            yield (f"{name.capitalize()}: with all hints between the workers dropped, a message"
                   f" reached every socket within {tally.slowest_delivery:.2f} s.")
        if tally.returns:
            what = ("each promotion of a standby" if name == "failover"
                    else "each replacement by an older copy")
            yield (f"{name.capitalize()}: after {what}, the test stopped all posting, let every"
                   " client catch up, and compared what the clients had with the database. The"
                   f" comparison was finished {tally.slowest_return:.2f} s after the fault at the"
                   " latest.")
    if control is not None:
        counted = ", ".join(f"{kind} {count:,}" for kind, count in control.found.items())
        yield (
            "As a control, power was also cut with `fsync = off`, which must lose data. The torture"
            + (f" found it: {counted}." if counted else " DID NOT FIND IT."))
    if no_disk:
        yield f"No disk was full, and no power cut: {no_disk}."
