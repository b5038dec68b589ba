"""The growth of cost: `./run bench growth [--rounds N] [--quick]`.

The time of a message, one sender awaiting each answer: in turn to 1, 10, 100 and 1,000 chats over
one socket that follows all of them; and to a chat that has 10,000, 100,000 or 1,000,000 messages.
"""

import itertools
from functools import partial

from clients import Sender, keep_open, open_all, post_for, post_frame
from rig import TEXT, Bench, Figures, Measurement, Row, Server, run

CHATS = (1, 10, 100, 1_000)
MESSAGES = (10_000, 100_000, 1_000_000)
FLAT = 1.3


def growth_row(work: str, found: dict[str, Figures]) -> Row:
    """Hold the longest time against the shortest."""
    times = {name: figures["p50"] for name, figures in found.items()}
    shown = ", ".join(f"{value:.2f}" for value in times.values())
    return Row(
        f"time per message {work}", f"{shown} ms", "", max(times.values()) / min(times.values()),
        "x the shortest", at_most=FLAT, figures=next(iter(found.values())),
    )


async def rows(bench: Bench) -> list[Row]:
    """Measure, and answer the rows."""
    bench.tell("growth: filling chats with messages")
    async with Server(bench) as server:
        sender, partner = await server.people(2)
        chats = await server.groups([[sender, partner]] * CHATS[-1])
        filled = await server.groups([[sender, partner]] * len(MESSAGES))
        for chat, count in zip(filled, MESSAGES, strict=True):
            await server.fill([chat], count, partner)
        await server.settle()

        def posting(posts: Sender) -> Measurement:
            async def measure() -> Figures:
                keep_open([posts])
                return await bench.loaded(server, lambda: post_for([posts], bench.seconds))

            return measure

        frames = [post_frame(TEXT, chat) for chat in chats + filled]
        places = [frames[:count] for count in CHATS] + [[one] for one in frames[CHATS[-1] :]]
        sockets = await open_all(
            server.port,
            [partial(Sender, "/ws", sender.token, itertools.cycle(turn)) for turn in places],
        )
        names = [f"{count:,} chats" for count in CHATS] + [f"{n:,} messages" for n in MESSAGES]
        measurements = {name: posting(one) for name, one in zip(names, sockets, strict=True)}
        found = await bench.alternate("growth", **measurements)
    over = {name: found[name] for name in names[: len(CHATS)]}
    within = {name: found[name] for name in names[len(CHATS) :]}
    return [
        growth_row("at 1, 10, 100, 1,000 chats", over),
        growth_row("at 10^4, 10^5, 10^6 messages in the chat", within),
    ]


if __name__ == "__main__":
    run(rows, __doc__)
