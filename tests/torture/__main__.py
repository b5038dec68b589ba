"""The checker: clients that use the messenger while everything beneath them is killed, and count.

    ./run torture --minutes 10 --seed 7     exits 0 if nothing was lost, doubled, missed, ...
    ./run torture --prove                   plant bugs, one at a time, and see each one caught

It starts the messenger with two workers in a folder of its own. In four chats four members each
post, edit, delete and read; each action has its own id and is tried again until it is answered. A
keeper, who owns the chats, removes members and puts them back. Every member follows the chats on
sockets of both kinds, which come back with their position whenever they were cut, and keep a store
of their own by the rule of resuming. Meanwhile the faults, drawn from the seed: SIGKILL, SIGTERM
and SIGSTOP of workers and of their parent, SIGKILL of the postmaster and of backends, all
connections ended, the listening one cut, all hints dropped, a chat's row held by somebody else for
seconds, the database read-only for a while, a copy of the database put in its place. What such a
copy does not have is rightly gone; everybody must have learned so.

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
faults.py, the comparison in check.py, the server and the tally in server.py, copies of a database
in postgres.py, the planted bugs in tests/support/mutations.py. Here is the command.
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
from pathlib import Path

import aiohttp
import uvloop

from support.mutations import MUTATIONS, Mutation, mutated
from support.servers import ROOT, processes_in
from torture.check import Check
from torture.clients import Run
from torture.faults import Faults
from torture.server import START_SECONDS, WORKERS, Server, Tally

PROGRESS_SECONDS = 10
TIMES_LONGER = 9  # than was asked for, until there were so many faults
PATIENCE_SECONDS = 60.0  # until everybody must have everything in the end
PROOF_SECONDS = 10.0  # without a bug
PROOF_PATIENCE_SECONDS = 4.0  # with one
PROOF_TRIES = 3

COMPLAINT = re.compile("^Traceback| ERROR ")
# What a server says of a database that went back.
OF_RETURN = re.compile(r"chat \d+: (its history was rewritten|closing its sockets)")

# ---- The command


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
def scratch() -> Iterator[Path]:
    """Make a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        yield Path(folder).resolve()


async def torture(
    folder: Path, tree: Path, seconds: float, seed: int, faults: Sequence[str] = (),
    patience: float = PATIENCE_SECONDS, speaks: bool = False, least: int = 0,
) -> Tally:
    """Run the clients and the faults for a while, then check; answer what was counted."""
    server = Server(folder, tree)
    tally = Tally(speaks)
    run = Run(server, seed, tally, patience)
    try:
        server.start()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as run.http:
            await torment(run, Faults(run, seed, faults), seconds, least)
            await judge(run)
            for task in run.tasks:
                task.cancel()
            await asyncio.gather(*run.tasks, return_exceptions=True)
        await see_it_off(server, tally)
    finally:
        server.destroy()
    return tally


async def torment(run: Run, faults: Faults, seconds: float, least: int) -> None:
    """Let everybody do what they do for so long; then kill it all in the middle of that."""
    async with asyncio.timeout(START_SECONDS):
        await run.set_up()
    await run.begin()
    going = run.spawn(faults.go_on())
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0 or run.tally.faults.total() < least:
        await asyncio.sleep(min(PROGRESS_SECONDS, max(1, left)))
        run.tally.say(run.tally.progress())
        if going.done() or left < -TIMES_LONGER * seconds:
            break
    going.cancel()
    await asyncio.wait([going])  # for what it undoes
    run.server.process.kill()
    await run.cut_short()
    run.tally.faults["parent killed"] += 1
    await run.server.ended(START_SECONDS)
    run.server.start()


async def judge(run: Run) -> None:
    """Check what was left unanswered, let everybody come back, check everything."""
    check = Check(run)
    await check.unanswered()
    try:
        async with asyncio.timeout(run.patience):
            await run.conclude()
    except TimeoutError:
        left = len(run.unanswered) + len(run.unchanged)
        run.tally.blame("wrong", f"{left} things are not answered in the end")
    if not run.messages:
        run.tally.blame("wrong", "nothing was ever acknowledged")
    for chat in run.chats:
        await run.look_at_watermarks(chat)
    await check.everything()


async def see_it_off(server: Server, tally: Tally) -> None:
    """Stop the server; see that it ends well, leaves nothing behind and complained of nothing."""
    server.process.terminate()
    status = await server.ended(START_SECONDS)
    left = processes_in(server.folder)
    if status != 0 or left:
        tally.blame("wrong", f"the server ended with {status} and left {left}")
    log = (server.folder / "server.log").read_text()
    complaints = [line for line in log.splitlines() if COMPLAINT.search(line)]
    if [line for line in complaints if not (tally.returns and OF_RETURN.search(line))]:
        tally.blame("wrong", f"the server complained:\n{log}")


def main() -> int:
    """Do what the command line says; answer the exit status."""
    parser = argparse.ArgumentParser(prog="./run torture", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (1)")
    parser.add_argument("--seed", type=int, default=1, help="what the faults are drawn from (1)")
    parser.add_argument("--faults", type=int, default=0, help="and until there were so many (0)")
    parser.add_argument("--only", action="append", default=[], help="a kind of fault, the only one")
    parser.add_argument("--prove", action="store_true", help="see planted bugs caught")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if given.prove:
        return 0 if uvloop.run(prove(given.seed)) else 1
    with scratch() as folder:
        tally = uvloop.run(torture(
            folder, ROOT, given.minutes * 60, given.seed, given.only, speaks=True,
            least=given.faults))
    print(f"seed {given.seed}, {given.minutes:g} minutes, {WORKERS} workers")
    print("\n".join(tally.summary()))
    return 1 if tally.found else 0


if __name__ == "__main__":
    sys.exit(main())
