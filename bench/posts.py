"""Posting: `./run bench posts [--rounds N] [--quick]`.

One sender, 64 senders in 64 chats or in one, one socket that pipelines; beside each the posting
function called alone. The senders use sockets of their chats, as clients do: who sends also gets
every message of the chat.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ceilings import call_posts
from clients import Sender, keep_open, open_all, post_for, post_frame
from rig import TEXT, Bench, Figures, Measurement, Person, Row, Server, run

SENDERS = 64
PIPELINED = 256  # under way at once, on one socket
ONE_BY_ONE = Path(__file__).parent / "one_by_one.py"


async def open_senders(
    server: Server, chats: Sequence[int], people: Sequence[Person]
) -> list[Sender]:
    """Open a socket for each of some people, on the chats in turn."""
    again = itertools.repeat(post_frame(TEXT))
    paths = [f"/ws/{chat}" for _, chat in zip(people, itertools.cycle(chats), strict=False)]
    tokens = [person.token for person in people]
    return await open_all(
        server.port,
        [partial(Sender, path, token, again) for path, token in zip(paths, tokens, strict=True)],
    )


def posting(
    bench: Bench, server: Server, senders: Sequence[Sender], window: int = 1
) -> Measurement:
    """Make the measurement of some senders."""

    async def measure() -> Figures:
        keep_open(senders)
        return await bench.loaded(server, lambda: post_for(senders, bench.seconds, window))

    return measure


def calling(
    bench: Bench, server: Server, chats: Sequence[int], people: Sequence[Person], group: int
) -> Measurement:
    """Make the measurement of a ceiling: the posting function alone."""
    ids = [person.id for person in people]

    async def measure() -> Figures:
        return await bench.ceiling(call_posts, server.dsn, chats, ids, group, bench.seconds)

    return measure


async def people_apart(server: Server) -> tuple[list[Person], list[int], list[int]]:
    """Make senders, a chat for each, and as many chats again that no socket follows."""
    *people, partner = await server.people(SENDERS + 1)
    pairs = [[person, partner] for person in people]
    return people, await server.groups(pairs), await server.groups(pairs)


async def rows(bench: Bench) -> list[Row]:
    """Measure, and answer the rows."""
    bench.tell("posts: preparing")
    async with Server(bench) as server, Server(bench, ONE_BY_ONE) as lone:
        people, chats, same_chats = await people_apart(server)
        crowd, same_crowd, single = await server.groups([people, people, people[:2]])
        lone_people, lone_chats, _ = await people_apart(lone)
        await server.settle()
        await lone.settle()
        apart = await open_senders(server, chats, people)
        together = await open_senders(server, [crowd], people)
        [alone] = await open_senders(server, [single], people[:1])
        lone_apart = await open_senders(lone, lone_chats, lone_people)
        found = await bench.alternate(
            "posts",
            one=posting(bench, server, [alone]),
            one_ceiling=calling(bench, server, same_chats[:1], people[:1], 1),
            apart=posting(bench, server, apart),
            apart_ceiling=calling(bench, server, same_chats, people, SENDERS),
            one_by_one=posting(bench, lone, lone_apart),
            together=posting(bench, server, together),
            pipelined=posting(bench, server, [alone], PIPELINED),
            together_ceiling=calling(bench, server, [same_crowd], people, SENDERS),
        )
    return rows_of(found)


def rows_of(found: dict[str, Figures]) -> list[Row]:
    """Put the figures into rows."""
    one, ceiling = found["one"], found["one_ceiling"]
    rows = [
        Row(
            "one sender awaiting each answer, p50",
            f"{one['p50']:.2f} ms", f"{ceiling['p50']:.2f} ms",
            one["p50"] / ceiling["p50"], "x the ceiling", at_most=1.6, figures=one, key="one",
        )
    ]
    for work, key, limit, least in (
        ("64 senders in 64 chats, each awaiting its answer", "apart", "apart_ceiling", 0.6),
        ("64 senders in one chat, each awaiting its answer", "together", "together_ceiling", 0.5),
        ("one socket pipelining", "pipelined", "together_ceiling", 0.5),
    ):
        mine, best = found[key], found[limit]
        rows.append(
            Row(
                work, f"{mine['rate']:,.0f}/s", f"{best['rate']:,.0f}/s",
                mine["rate"] / best["rate"], "of the ceiling",
                at_least=least, figures=mine, key=key,
            )
        )
    apart, lone = found["apart"], found["one_by_one"]
    rows.insert(
        2,
        Row(
            "64 senders in 64 chats, against groups of one",
            f"{apart['rate']:,.0f}/s", f"{lone['rate']:,.0f}/s",
            apart["rate"] / lone["rate"], "x groups of one", at_least=5, figures=apart,
        ),
    )
    return rows


if __name__ == "__main__":
    run(rows, __doc__)
