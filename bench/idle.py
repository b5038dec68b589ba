"""Idle sockets: `./run bench idle [--quick]`.

10,000 users in 5,000 chats, each with a socket that follows all of theirs and says nothing; the
memory of each after 1,000 and 10,000, in the server's process and, as a figure of its own, in the
kernel, and the processor time of all. Beside it aiohttp's bare WebSocket. Memory does not vary from
run to run, so there is one round.
"""

import asyncio
import gc
from collections.abc import Callable, Sequence
from functools import partial

import ceilings
from clients import Socket, close_all, open_all
from fan_out import serving
from rig import Bench, Figures, Row, Server, cpu_seconds, kernel_bytes, resident_bytes, run

COUNTS = (1_000, 10_000)
WATCH_SECONDS = 30
REST_SECONDS = 3
WARM_UP = 50

Maker = Callable[[], Socket]


async def idle(bench: Bench, title: str, pid: int, port: int, makers: Sequence[Maker]) -> Figures:
    """Open the sockets and see what each costs."""
    close_all(await open_all(port, makers[:WARM_UP]))
    await asyncio.sleep(REST_SECONDS)
    empty, kernel, figures = resident_bytes(pid), kernel_bytes(), {}
    sockets: list[Socket] = []
    gc.freeze()  # ten thousand clients are no garbage: looking through them takes the load's time
    for count in COUNTS if not bench.quick else COUNTS[:1]:
        bench.tell(f"idle: {count:,} at {title}")
        sockets += await open_all(port, makers[len(sockets) : count])
        await asyncio.sleep(REST_SECONDS)
        figures[f"{count} bytes"] = (resident_bytes(pid) - empty) / count
        figures[f"{count} kernel bytes"] = (kernel_bytes() - kernel) / count
    seconds = 3 if bench.quick else WATCH_SECONDS
    before = cpu_seconds(pid)
    await asyncio.sleep(seconds)
    figures["core"] = (cpu_seconds(pid) - before) / seconds
    assert not any(socket.transport.is_closing() for socket in sockets)
    close_all(sockets)
    bench.tell("idle: " + "  ".join(f"{key} {value:,.3f}" for key, value in figures.items()))
    return figures


async def rows(bench: Bench) -> list[Row]:
    """Measure, and answer the rows."""
    bench.tell("idle: preparing")
    counts = COUNTS if not bench.quick else COUNTS[:1]
    async with Server(bench) as server:
        people = await server.people(counts[-1])
        await server.groups(list(zip(people[::2], people[1::2], strict=True)))
        mine = await idle(
            bench, "the messenger", server.pids[0], server.port,
            [partial(Socket, "/ws", who.token) for who in people],
        )
    with serving(ceilings.serve_bare_websockets) as (port, pid):
        makers = [partial(Socket, "/ws", "")] * counts[-1]
        best = await idle(bench, "aiohttp's bare WebSocket", pid, port, makers)
    made = [
        Row(
            f"{count:,} idle sockets, memory of each",
            f"{mine[f'{count} bytes'] / 1024:.1f} KB", f"{best[f'{count} bytes'] / 1024:.1f} KB",
            mine[f"{count} bytes"] / 1024, "KB", at_most=20, key=f"idle {count}",
            figures={"kilobytes": mine[f"{count} bytes"] / 1024},
        )
        for count in counts
    ]
    theirs, bare = (found[f"{counts[-1]} kernel bytes"] / 1024 for found in (mine, best))
    return [
        *made,
        Row(
            f"{counts[-1]:,} idle sockets, the kernel's memory of both ends of each",
            f"{theirs:.1f} KB", f"{bare:.1f} KB", theirs, "KB",
        ),
        Row(
            f"{counts[-1]:,} idle sockets, of a core",
            f"{mine['core']:.1%}", f"{best['core']:.1%}", mine["core"] * 100, "%", at_most=10,
        ),
    ]


if __name__ == "__main__":
    run(rows, __doc__)
