"""A restart beneath many sockets: `./run bench reconnect [--rounds N] [--quick]`.

10,000 sockets of 200 users, half of them on one chat and half on all five of their user, are open
when the server is stopped (SIGTERM) and started again on the same data and port. Each must be told
1001. As soon as the server serves, all come back at once, with the numbers that they had, and each
waits until it is live in every chat; a socket that is refused tries again a moment later, as
clients do. What is counted of the processors is what was used from then until the last was live.
"""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from functools import partial

from clients import GENEROUS_SECONDS, READY, Socket, close_all, connect, frame, open_all
from rig import Bench, Figures, Person, Row, Server, percentile, run

SOCKETS, QUICK_SOCKETS = 10_000, 1_000
USERS, CHATS_EACH, MEMBERS = 200, 5, 20
MESSAGES = 20  # in each chat
STOP_SECONDS, BACK_SECONDS = 2, 10
PAUSE_SECONDS = (0.2, 1.0)  # before who was refused tries again

GOING_AWAY = b"\x88\x02\x03\xe9"  # a whole close frame of a server (RFC 6455, section 5.5.1)
GOODBYE = b"\x88\x82\x00\x00\x00\x00\x03\xe9"


class Returner(Socket):
    """A websocket that asks for what it missed, and answers a close."""

    def __init__(self, path: str, token: str, sync: bytes, chats: int) -> None:
        super().__init__(path, token)
        self.sync = sync  # what is sent once it is open
        self.missing = chats  # in which it is not live yet
        self.live = asyncio.get_running_loop().create_future()
        self.rest = b""
        self.was_told = False  # that the server goes away

    def take(self, data: bytes) -> None:
        """Ask, then count the chats that are live."""
        if self.sync:
            self.transport.write(self.sync)
            self.sync = b""
        data = self.rest + data
        self.rest = data[1 - len(READY) :]
        self.missing -= data.count(READY)
        if self.missing == 0 and not self.live.done():
            self.live.set_result(None)
        if GOING_AWAY in data and not self.was_told:
            self.was_told = True
            self.transport.write(GOODBYE)

    def connection_lost(self, error: Exception | None) -> None:
        """Wake whoever waits for it: it is live no longer, or never was."""
        super().connection_lost(error)
        if not self.live.done():
            self.live.set_result(None)


class Returners:
    """The sockets of some users, and how they come back."""

    def __init__(self, people: Sequence[Person], chats: Sequence[Sequence[int]]) -> None:
        self.people, self.chats = people, chats  # chats: those of each
        self.sockets: list[Returner] = []

    def maker(self, number: int) -> "partial[Returner]":
        """Make the socket with a number: the even ones follow one chat, the odd ones all."""
        who, turn = number % len(self.people), number // len(self.people)
        token, chats = self.people[who].token, self.chats[who]
        if turn % 2 == 0:
            chat = chats[turn // 2 % len(chats)]
            return partial(Returner, f"/ws/{chat}?after={MESSAGES}", token, b"", 1)
        known = {str(chat): MESSAGES for chat in chats}
        sync = frame(json.dumps({"type": "sync", "chats": known}))
        return partial(Returner, "/ws", token, sync, len(chats))

    async def come(self, port: int, count: int) -> None:
        """Open the sockets, and wait until all are live."""
        self.sockets = await open_all(port, [self.maker(number) for number in range(count)])
        await asyncio.gather(*(socket.live for socket in self.sockets))

    async def come_back(self, port: int) -> Figures:
        """Let all come back at once."""
        delays: list[float] = []
        refused = 0
        began = time.perf_counter()

        async def come_back(number: int) -> Returner:
            nonlocal refused
            while (socket := await self.attempt(port, number)) is None:
                refused += 1
                await asyncio.sleep(random.uniform(*PAUSE_SECONDS))
            delays.append(time.perf_counter() - began)
            return socket

        async with asyncio.timeout(GENEROUS_SECONDS):
            self.sockets = await asyncio.gather(*map(come_back, range(len(self.sockets))))
        return {
            "back": max(delays), "p50": percentile(delays, 50), "p99": percentile(delays, 99),
            "refused": refused,
        }

    async def attempt(self, port: int, number: int) -> Returner | None:
        """Connect one socket and wait until it is live; None if it is refused."""
        try:
            socket: Returner = await connect(port, self.maker(number))
        except OSError:
            return None
        try:
            await socket.opened
        except OSError:
            socket.transport.abort()
            return None
        await socket.live
        return socket if socket.missing == 0 else None


async def restart(server: Server, returners: Returners) -> Figures:
    """Stop the server and start it again, and let the sockets come back."""
    stopped = await server.stop()
    told = sum(socket.was_told for socket in returners.sockets)
    assert told == len(returners.sockets), f"{told} of {len(returners.sockets)} were told 1001"
    await server.start()
    before = server.cpu_seconds(), server.postgresql_cpu_seconds(), time.process_time()
    figures = await returners.come_back(server.port)
    figures["stop"] = stopped
    figures["server"] = server.cpu_seconds() - before[0]
    figures["postgresql"] = server.postgresql_cpu_seconds() - before[1]
    figures["core"] = figures["server"] / figures["back"]
    figures["load"] = (time.process_time() - before[2]) / figures["back"]
    await server.rest()
    return figures


async def rows(bench: Bench) -> list[Row]:
    """Measure, and answer the rows."""
    bench.tell("reconnect: preparing")
    count = QUICK_SOCKETS if bench.quick else SOCKETS
    async with Server(bench) as server:
        people = await server.people(USERS)
        size = USERS // MEMBERS
        groups = [people[start::size] for start in range(size)] * CHATS_EACH
        made = await server.groups(groups)
        await server.fill(made, MESSAGES, people[0])
        await server.settle()
        returners = Returners(people, [made[who % size :: size] for who in range(USERS)])
        bench.tell(f"reconnect: {count:,} sockets come")
        await returners.come(server.port, count)
        found = await bench.alternate(
            f"reconnect, {count:,} sockets", server=partial(restart, server, returners))
        close_all(returners.sockets)
    mine = found["server"]
    back = f"{count:,} sockets back at once after a restart"
    return [
        Row(
            f"{count:,} sockets told 1001, until the server has ended",
            f"{mine['stop']:.1f} s", "", mine["stop"], "s", at_most=STOP_SECONDS,
        ),
        Row(
            f"{back}, until all are live", f"{mine['back']:.1f} s", "",
            mine["back"], "s", at_most=BACK_SECONDS, figures=mine,
        ),
        Row(f"{back}, p50 of their times", f"{mine['p50']:.1f} s", "", mine["p50"], "s"),
        Row(f"{back}, p99 of their times", f"{mine['p99']:.1f} s", "", mine["p99"], "s"),
        Row(f"{back}, handshakes refused", f"{mine['refused']:,.0f}", "", mine["refused"], ""),
        Row(
            f"{back}, processor time of server + PostgreSQL",
            f"{mine['server']:.1f} + {mine['postgresql']:.1f} s", "",
            mine["server"] + mine["postgresql"], "s",
        ),
    ]


if __name__ == "__main__":
    run(rows, __doc__)
