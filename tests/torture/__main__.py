"""The checker: clients that use the messenger while everything beneath them is killed, and count.

    ./run torture --minutes 10 --seed 7     exits 0 if nothing was lost, doubled, missed, ...
    ./run torture --failover                two servers on a primary and a standby
    ./run torture --power                   on a disk that loses what was not flushed (as root)
    ./run torture --all --report FILE       all three, and a page about it
    ./run torture --prove                   plant bugs, one at a time, and see each one caught

It starts the messenger with two workers in a folder of its own. In four chats four members each
post, edit, delete and read; each action has its own id and is tried again until it is answered. A
keeper, who owns the chats, removes members and puts them back. Every member follows the chats on
sockets of both kinds, which come back with their position whenever they were cut, and keep a store
of their own by the rule of resuming. Meanwhile the faults, drawn from the seed: SIGKILL, SIGTERM
and SIGSTOP of workers and of their parent, SIGKILL of the postmaster and of backends, all
connections ended, the listening one cut, all hints dropped, a chat's row held by somebody else for
seconds, the database read-only for a while, its disk full (as root), a copy of the database put in
its place. What such a copy does not have is rightly gone; everybody must have learned so.

With --failover two servers, each given both hosts in one of the two forms, use a primary and its
standby. The primary is killed, and the standby promoted: one in step, which must have all that was
acknowledged, also after it was cut off for a while; or one that was behind, as above.

With --power the data lie on a disk of the checker's own. All processes are stopped, the file system
is cut off from it without a flush, and what is there then is served. What the file system had
written by itself survives; so a control with fsync = off must be found wanting.

What is counted, each of which must be 0:

    lost        answered, or shown to somebody, and afterwards not in the database, or not as it was
    doubled     more than once in the database, or answered with two numbers
    missed      a member who followed did not end with it; or, with the hints dropped, got it late
    misordered  `rev` did not rise on a socket between two syncs; a sender's own order was broken;
                the numbers of a chat have holes; a watermark went back
    leaked      posted after somebody's removal and shown to them, or posted by them and accepted
    fooled      in somebody's store, and not in the database, or not as it is; or a position of
                another history. Looked at in the end and whenever the database went back
    wrong       an answer that nobody should get (a 500, a member's 404), an end of its own accord

Inside the database a trigger, the witness, notes the chat's number at every coming and leaving:
those happen under the chat's lock, so it tells exactly what was posted after a removal.

The clients are in clients.py (who they are in cast.py, their sockets in devices.py), the faults in
faults.py, the comparison in check.py, what is counted in tally.py and told in report.py. What is
tortured is in server.py and couple.py, on postgres.py and disk.py; the planted bugs are in
tests/support/mutations.py. Here is the command.
"""

import argparse
import asyncio
import contextlib
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import uvloop

from support.mutations import MUTATIONS, Mutation, mutated
from support.quick import quick_folder
from support.servers import ROOT
from torture.check import Check
from torture.clients import Run
from torture.couple import Couple
from torture.disk import Disk, why_none
from torture.faults import DISK_FAULTS, FAILOVERS, KINDS, POWER_CUTS, USUAL, Faults
from torture.report import page
from torture.server import START_SECONDS, WORKERS, Server
from torture.tally import Tally

PROGRESS_SECONDS = 10
PATIENCE_SECONDS = 60.0  # until everybody must have everything in the end
PROOF_SECONDS = 10.0  # without a bug
PROOF_PATIENCE_SECONDS = 4.0  # with one
PROOF_TRIES = 3
CONTROL_SECONDS = 4.0

OF_RETURN = re.compile(r"(chat \d+|the database): (its history was rewritten|closing its sockets)")
# What a server may say of a fault.
SAID = {
    **dict.fromkeys(("database restored", *FAILOVERS), OF_RETURN),
    "disk full": re.compile("No space left on device|trying again in"),
}

# ---- Planted bugs


async def prove(seed: int) -> bool:
    """Find nothing in a copy as it is, and each bug that is planted in one; tell whether so."""
    proven = await is_seen(None, seed)
    for mutation in MUTATIONS:
        for again in range(PROOF_TRIES):  # a bug may not have had its chance
            if await is_seen(mutation, seed + again):
                break
        else:
            proven = False
    return proven


async def is_seen(mutation: Mutation | None, seed: int) -> bool:
    """Run a copy with a bug, or without; tell whether that is what was found."""
    began = time.monotonic()
    with scratch() as folder:
        tree = mutated(folder, mutation)
        if mutation is None:
            tally = await torture(folder, tree, PROOF_SECONDS, seed)
        else:
            tally = await torture(
                folder, tree, mutation.seconds, seed, mutation.faults, PROOF_PATIENCE_SECONDS)
    seen = any(map(tally.found.get, mutation.told_by)) if mutation is not None else not tally.found
    print(
        f"{mutation.name if mutation is not None else 'as it is'}: {tally.verdict()}"
        f"  {'as it must be' if seen else 'WHICH IS WRONG'}"
        f" ({tally.acknowledged} acknowledged, {time.monotonic() - began:.1f} s)", flush=True)
    return seen


@contextlib.contextmanager
def scratch(kinds: Sequence[str] = ()) -> Iterator[Path]:
    """Make a folder that is gone afterwards, for such faults."""
    place = quick_folder() if kinds is POWER_CUTS else None  # else few would be acknowledged
    with tempfile.TemporaryDirectory(prefix="torture-", dir=place) as folder:
        yield Path(folder).resolve()


async def torture(
    folder: Path, tree: Path, seconds: float, seed: int, kinds: Sequence[str] = USUAL,
    patience: float = PATIENCE_SECONDS, speaks: bool = False, least: int = 0, flushes: bool = True,
) -> Tally:
    """Run the clients and the faults for a while, then check; answer what was counted."""
    tally = Tally(speaks)
    server = server_for(kinds, folder, tree)
    run = Run(server, seed, tally, patience)
    try:
        await server.prepare()
        server.start()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as run.http:
            async with asyncio.timeout(START_SECONDS):
                await run.set_up()
            if not flushes:
                await server.sql("alter system set fsync = off")
                await server.sql("select pg_reload_conf()")
            await torment(run, Faults(run, seed, kinds), seconds, least)
            await judge(run)
            for task in run.tasks:
                task.cancel()
            await asyncio.gather(*run.tasks, return_exceptions=True)
        await see_it_off(server, tally)
    finally:
        server.destroy()
    tally.seconds = time.monotonic() - tally.began
    return tally


def server_for(kinds: Sequence[str], folder: Path, tree: Path) -> Server | Couple:
    """Make the server to which all this can be done."""
    if set(kinds) & set(FAILOVERS):
        return Couple(folder, tree)
    disk = Disk(folder / "disk", folder / "data") if set(kinds) & set(DISK_FAULTS) else None
    return Server(folder, tree, disk)


async def torment(run: Run, faults: Faults, seconds: float, least: int) -> None:
    """Let everybody do what they do for so long; then kill it all in the middle of that."""
    await run.begin()
    going = run.spawn(faults.go_on(seconds, least))
    while not going.done():
        await asyncio.wait([going], timeout=PROGRESS_SECONDS)
        run.tally.say(run.tally.progress())
    await run.cut_short()
    run.tally.faults["parent killed"] += 1
    await run.server.crash()


async def judge(run: Run) -> None:
    """Check what was left unanswered, let everybody come back, check everything."""
    check = Check(run)
    try:
        async with asyncio.timeout(run.patience):
            await check.unanswered()
            await run.conclude()
    except TimeoutError:
        left = len(run.unanswered) + len(run.unchanged)
        run.tally.blame("wrong", f"{left} things are not answered in the end", max(left, 1))
        if not await check.is_there():
            return
    if not run.messages:
        run.tally.blame("wrong", "nothing was ever acknowledged")
    for chat in run.chats:
        await run.look_at_watermarks(chat)
    await check.everything()


async def see_it_off(server: Server | Couple, tally: Tally) -> None:
    """Stop the server; see that it ends well, leaves nothing behind and complained of nothing."""
    for line in await server.stop():
        if not any(kind in tally.faults and said.search(line) for kind, said in SAID.items()):
            tally.blame("wrong", f"the server: {line}")


# ---- The command


@dataclass(frozen=True)
class Part:
    """What is tortured in which way, and how much of the time it gets beside the others."""

    name: str
    kinds: Sequence[str]
    share: float


async def run_part(part: Part, seconds: float, seed: int, least: int) -> Tally:
    """Torture in one way; answer what was counted."""
    with scratch(part.kinds) as folder:
        tally = await torture(folder, ROOT, seconds, seed, part.kinds, speaks=True, least=least)
    print(f"{part.name}: seed {seed}, {tally.seconds / 60:.1f} minutes, {WORKERS} workers")
    print("\n".join(tally.summary()), flush=True)
    return tally


async def control(seed: int) -> Tally:
    """Cut the power of a database that does not flush, until that is found; answer what was."""
    for again in range(PROOF_TRIES):
        with scratch(POWER_CUTS) as folder:
            tally = await torture(
                folder, ROOT, CONTROL_SECONDS, seed + again, POWER_CUTS,
                PROOF_PATIENCE_SECONDS, least=1, flushes=False)
        print(f"power cut, with fsync = off: {tally.verdict()}", flush=True)
        if tally.found:
            break
    return tally


def parts_of(given: argparse.Namespace, no_disk: str | None) -> list[Part]:
    """Tell what to do, and say what cannot be had here."""
    if no_disk:
        print(f"no disk of the checker's own, so none is full, and no power cut: {no_disk}")
    usual = given.only or (USUAL if no_disk else (*USUAL, "disk full"))
    parts = [Part(", ".join(given.only) or "one server", usual, 0.6)]
    failover, power = Part("failover", FAILOVERS, 0.2), Part("power", POWER_CUTS, 0.2)
    if given.failover or given.power:
        parts = [failover] * given.failover + [power] * given.power
    elif given.all:
        parts += [failover, power]
    return [part for part in parts if part is not power or not no_disk]


async def do(given: argparse.Namespace) -> int:
    """Do what was asked for; answer the exit status."""
    if given.prove:
        return 0 if await prove(given.seed) else 1
    wants_disk = given.power or given.all or not (given.only or given.failover)
    no_disk = why_none() if wants_disk or set(given.only) & set(DISK_FAULTS) else None
    parts = parts_of(given, no_disk)
    share = sum(part.share for part in parts) / (given.minutes * 60)
    told = [(part, await run_part(part, part.share / share, given.seed, given.faults))
            for part in parts]
    caught = None
    if any(part.kinds is POWER_CUTS for part in parts):
        caught = await control(given.seed)
    if given.report is not None:
        given.report.write_text(page(
            given, [(part.name, tally) for part, tally in told], caught, no_disk))
    is_wrong = any(tally.found for _, tally in told) or (caught is not None and not caught.found)
    return 1 if is_wrong else 0


def main() -> int:
    """Do what the command line says; answer the exit status."""
    parser = argparse.ArgumentParser(prog="./run torture", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (1)")
    parser.add_argument("--seed", type=int, default=1, help="what the faults are drawn from (1)")
    parser.add_argument("--faults", type=int, default=0, help="and until there were so many (0)")
    parser.add_argument(
        "--only", action="append", default=[], choices=KINDS, metavar="KIND",
        help="this kind of fault, and no others that are not named so, too")
    parser.add_argument(
        "--failover", action="store_true", help="lose the primary, and promote its standby")
    parser.add_argument(
        "--power", action="store_true", help="cut the power: what was not flushed is lost (root)")
    parser.add_argument("--all", action="store_true", help="one server, failover, and power")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a page about it")
    parser.add_argument("--prove", action="store_true", help="see planted bugs caught")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return uvloop.run(do(given))


if __name__ == "__main__":
    sys.exit(main())
