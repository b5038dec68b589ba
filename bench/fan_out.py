"""Fan-out: `./run bench fan_out [--rounds N] [--quick]`.

Groups of 100 and 1,000 members, each with a socket; one sender or 16 of them post and await their
answers. Beside it a server that does nothing but write the same bytes to as many sockets: for each
post, or for as many posts at a time as the messenger committed together. Every delivery is counted.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from typing import Any

import ceilings
from clients import (
    GENEROUS_SECONDS,
    Sender,
    Socket,
    TimedSocket,
    close_all,
    keep_open,
    open_all,
    post_for,
    post_frames_now,
)
from rig import (
    SETTLE_SECONDS,
    TEXT,
    Bench,
    Figures,
    Person,
    Row,
    Server,
    messenger,
    percentile,
    run,
)

TIMED = 20  # of the sockets take times; the others only count bytes


class Crowd:
    """The sockets of a group's members at one server, some of them senders."""

    def __init__(self, port: int, chat: int, members: Sequence[Person], senders: int) -> None:
        self.port, self.chat, self.members = port, chat, members
        self.sender_count = senders
        self.delays: list[float] = []
        self.senders: list[Sender] = []
        self.listeners: list[Socket] = []
        self.timed: list[TimedSocket] = []

    async def come(self) -> None:
        """Open the sockets."""
        path, cut = f"/ws/{self.chat}", self.sender_count
        tokens = [member.token for member in self.members]
        senders, timed, others = tokens[:cut], tokens[cut : cut + TIMED], tokens[cut + TIMED :]
        self.senders = await open_all(
            self.port, [partial(Sender, path, each, post_frames_now(TEXT)) for each in senders]
        )
        self.timed = await open_all(
            self.port, [partial(TimedSocket, path, each, []) for each in timed]
        )
        quiet = await open_all(self.port, [partial(Socket, path, each) for each in others])
        self.listeners = [*self.timed, *quiet]
        await asyncio.sleep(SETTLE_SECONDS)  # `ready` comes to all: it is no delivery

    def leave(self) -> None:
        """Hang up."""
        close_all([*self.senders, *self.listeners])

    async def post(self, seconds: float) -> Figures:
        """Let the senders post until the time is over and everybody has got everything."""
        for each in self.timed:
            each.delays.clear()
        before = [listener.bytes for listener in self.listeners]
        began = time.perf_counter()
        figures = await post_for(self.senders, seconds)
        posted = sum(sender.answered for sender in self.senders)
        async with asyncio.timeout(GENEROUS_SECONDS):
            while not self.has_all(before, posted):  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.001)
        passed = time.perf_counter() - began
        delays = [delay for each in self.timed for delay in each.delays]
        figures["deliveries"] = posted * len(self.members) / passed
        figures["heard_p99"] = percentile(delays, 99)  # of the bare room: nothing, its text is old
        return figures

    def has_all(self, before: Sequence[int], posted: int) -> bool:
        """Tell whether the first has got each post, and the others as many bytes as the first."""
        if len(self.timed[0].delays) < posted:
            return False
        got = [now.bytes - then for now, then in zip(self.listeners, before, strict=True)]
        return min(got) == max(got)


@contextlib.contextmanager
def bare_room(chat: int, sender: Person, group: int) -> Iterator[int]:
    """Serve a room that only writes; answers its port."""
    at, new = datetime.now(UTC), messenger.uuid7()
    text = f"at {time.time_ns()} {TEXT}"
    message = messenger.Message(new, chat, 1000, 1000, sender.id, text, None, at)
    ack = messenger.encode_frame(
        messenger.AckOut(data=messenger.Ack(new, chat, 1000, at), ref=1))
    with serving(ceilings.serve_writes, messenger.encode_change(message, 0), ack, group) as port:
        yield port


@contextlib.contextmanager
def serving(function: Any, *arguments: Any) -> Iterator[Any]:
    """Run a server of ceilings.py in a process of its own; answers what it tells first."""
    spawn = get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=function, args=(there, *arguments), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        process.kill()
        process.join()


async def groups_committed(server: Server, chat: int) -> float:
    """Answer how many messages of a chat were committed together, on average."""
    counted = "select count(*)::float / count(distinct created_at) from messages where chat_id = $1"
    return float(await server.sql.fetchval(counted, chat))


async def measured(
    bench: Bench, server: Server, members: Sequence[Person], senders: int
) -> dict[str, Figures]:
    """Measure one crowd and its ceiling in turn."""
    [chat] = await server.groups([members])
    title = f"fan-out to {len(members):,}, senders: {senders}"
    bench.tell(f"{title}: the members come")
    crowd = Crowd(server.port, chat, members, senders)
    await crowd.come()
    await crowd.post(bench.seconds / 2)
    group = round(await groups_committed(server, chat))
    with bare_room(chat, members[0], group) as port:
        bare = Crowd(port, chat, members, senders)
        await bare.come()

        async def post() -> Figures:
            keep_open([*crowd.senders, *crowd.listeners])
            return await bench.loaded(server, lambda: crowd.post(bench.seconds))

        async def write() -> Figures:
            with bench.only(None):
                return await bare.post(bench.seconds)

        found = await bench.alternate(f"{title} (groups of {group})", server=post, ceiling=write)
        bare.leave()
    crowd.leave()
    return found


async def rows(bench: Bench) -> list[Row]:
    """Measure, and answer the rows."""
    bench.tell("fan-out: preparing")
    made = []
    async with Server(bench) as server:
        people = await server.people(1000)
        for members, senders, least in ((100, 1, 0.5), (1000, 1, 0.8), (1000, 16, 0.7)):
            found = await measured(bench, server, people[:members], senders)
            mine, best = found["server"], found["ceiling"]
            who = "one sender" if senders == 1 else f"{senders} senders"
            work = f"fan-out to {members:,} members, {who}"
            made.append(
                Row(
                    work,
                    f"{mine['deliveries']:,.0f}/s", f"{best['deliveries']:,.0f}/s",
                    mine["deliveries"] / best["deliveries"], "of the ceiling",
                    at_least=least, figures=mine, key=f"fan_out_{members}_{senders}",
                )
            )
        made.append(
            Row(
                f"{work}, p99 send-to-receive",
                f"{mine['heard_p99']:.1f} ms", "",
                mine["heard_p99"], "ms", at_most=100, figures=mine,
            )
        )
    return made


if __name__ == "__main__":
    run(rows, __doc__)
