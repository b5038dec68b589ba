"""Reading: `./run bench reads [--rounds N] [--quick]`.

History, the list of chats, and what a socket missed; beside each a plain SELECT of the same rows
alone, without who read them, counts or JSON. 16 at a time on connections that are kept.
"""

import asyncio
import time
from collections.abc import Sequence

from ceilings import PLAIN_LIST, PLAIN_PAGE, call_missed, call_select
from clients import GENEROUS_SECONDS, READY, Socket, close_all, connect, get_for, get_request
from rig import Bench, Figures, Measurement, Person, Row, Server, messenger, run

AT_ONCE = 16
PAGE = messenger.PAGE_DEFAULT
MISSED = 10_000
SIZES = (100_000, 1_000_000)
LISTS = (200, 2_000)
MESSAGES_EACH = 100


def getting(
    bench: Bench, server: Server, path: str, token: str, at_once: int = AT_ONCE
) -> Measurement:
    """Make the measurement of a GET."""
    request = get_request(f"/api/v1{path}", token)

    async def measure() -> Figures:
        return await bench.loaded(server, lambda: get_for(server, request, at_once, bench.seconds))

    return measure


def selecting(
    bench: Bench, server: Server, query: str, arguments: Sequence[object]
) -> Measurement:
    """Make the measurement of a plain SELECT alone."""

    async def measure() -> Figures:
        return await bench.ceiling(
            call_select, server.dsn, query, arguments, AT_ONCE, bench.seconds
        )

    return measure


class CatchUp(Socket):
    """A socket that comes with a number and waits until it is live."""

    def __init__(self, path: str, token: str) -> None:
        super().__init__(path, token)
        self.ready = asyncio.get_running_loop().create_future()
        self.messages = 0
        self.rest = b""

    def take(self, data: bytes) -> None:
        """Count the messages; look for the end."""
        data = self.rest + data
        self.messages += data.count(b'"type":"message"')
        if READY in data and not self.ready.done():
            self.ready.set_result(None)
        self.rest = data[1 - len(READY) :]


def catching_up(bench: Bench, server: Server, chat: int, size: int, who: Person) -> Measurement:
    """Make the measurement of a socket that missed the newest messages."""

    async def once() -> Figures:
        began = time.perf_counter()
        path = f"/ws/{chat}?after={size - MISSED}"
        socket = await connect(server.port, lambda: CatchUp(path, who.token))
        async with asyncio.timeout(GENEROUS_SECONDS):
            await socket.ready
        passed = time.perf_counter() - began
        close_all([socket])
        assert socket.messages == MISSED, f"{socket.messages} came"
        return {"rate": MISSED / passed, "seconds": passed}

    async def measure() -> Figures:
        return await bench.loaded(server, once)

    return measure


async def rows(bench: Bench) -> list[Row]:
    """Measure, and answer the rows."""
    bench.tell("reads: filling chats with messages")
    async with Server(bench) as server:
        reader, other, lister, long_lister = await server.people(4)
        chats = dict(zip(SIZES, await server.groups([[reader, other]] * len(SIZES)), strict=True))
        for size, chat in chats.items():
            await server.fill([chat], size, other)
        for who, count in ((lister, LISTS[0]), (long_lister, LISTS[1])):
            await server.fill(await server.groups([[who, other]] * count), MESSAGES_EACH, other)
        await server.settle()
        made = await history_rows(bench, server, chats, reader)
        for who, count in ((lister, LISTS[0]), (long_lister, LISTS[1])):
            made += await list_rows(bench, server, who, count)
        return [*made, await catch_up_row(bench, server, chats[SIZES[0]], reader)]


async def history_rows(
    bench: Bench, server: Server, chats: dict[int, int], reader: Person
) -> list[Row]:
    """Measure the newest page and the far end of each chat."""
    measurements = {}
    for size, chat in chats.items():
        for place, bound, query in (
            ("newest", messenger.INT8_MAX, ""), ("far end", PAGE + 1, f"?before={PAGE + 1}"),
        ):
            path, arguments = f"/chats/{chat}/messages{query}", (chat, bound, PAGE)
            measurements[f"{place} of {size:,}"] = getting(bench, server, path, reader.token)
            measurements[f"{place} of {size:,}, ceiling"] = selecting(
                bench, server, PLAIN_PAGE, arguments
            )
    found = await bench.alternate("history", **measurements)
    made = []
    for place in [name for name in found if not name.endswith("ceiling")]:
        mine, best = found[place], found[f"{place}, ceiling"]
        made.append(
            Row(
                f"history, {place}", f"{mine['rate']:,.0f}/s", f"{best['rate']:,.0f}/s",
                mine["rate"] / best["rate"], "of the ceiling",
                at_least=0.5, figures=mine, key=f"history {place}",
            )
        )
    for size in chats:
        newest, far = found[f"newest of {size:,}"], found[f"far end of {size:,}"]
        made.append(
            Row(
                f"history, far end of {size:,} against its newest page",
                f"{far['p50']:.1f} ms", f"{newest['p50']:.1f} ms",
                newest["rate"] / far["rate"], "x newest", at_most=1.1, figures=far,
            )
        )
    return made


async def list_rows(bench: Bench, server: Server, who: Person, count: int) -> list[Row]:
    """Measure a page of a list of chats."""
    found = await bench.alternate(
        f"list of {count:,} chats",
        server=getting(bench, server, "/chats", who.token),
        ceiling=selecting(bench, server, PLAIN_LIST, (who.id, PAGE + 1)),
        alone=getting(bench, server, "/chats", who.token, at_once=1),
    )
    mine, best, alone = found["server"], found["ceiling"], found["alone"]
    work = f"list of {count:,} chats, page of {PAGE}"
    return [
        Row(
            work, f"{mine['rate']:,.0f}/s", f"{best['rate']:,.0f}/s",
            mine["rate"] / best["rate"], "of the ceiling", figures=mine,
        ),
        Row(
            f"{work}, one at a time, p50", f"{alone['p50']:.1f} ms", "",
            alone["p50"], "ms", at_most=10, figures=alone, key=f"list {count}",
        ),
    ]


async def catch_up_row(bench: Bench, server: Server, chat: int, reader: Person) -> Row:
    """Measure a socket that catches up."""
    size = SIZES[0]

    async def select() -> Figures:
        return await bench.ceiling(call_missed, server.dsn, chat, size - MISSED, size)

    found = await bench.alternate(
        "catch-up", server=catching_up(bench, server, chat, size, reader), ceiling=select
    )
    mine, best = found["server"], found["ceiling"]
    return Row(
        f"catch-up of {MISSED:,} missed messages over a socket",
        f"{mine['rate']:,.0f}/s", f"{best['rate']:,.0f}/s",
        mine["rate"] / best["rate"], "of the ceiling", at_least=0.4, figures=mine,
    )


if __name__ == "__main__":
    run(rows, __doc__)
