"""Posting: `./run bench posts [--rounds N] [--quick]`.

One sender, 64 senders in 64 chats or in one, one socket that pipelines; beside each the posting
function called alone, and a plain INSERT of the same rows and its commit, which is no function of
ours: one by one, or 64 in one statement. The senders use sockets of their chats, as clients do: who
sends also gets every message of the chat.

Of a lone message the processor time is counted too, of the server and of PostgreSQL each: beside an
empty answer of a bare aiohttp, and the plain INSERT. By then the server has been alone for a while,
and notifies nobody.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import ceilings
from clients import Sender, close_all, keep_open, open_all, post_for, post_frame
from fan_out import serving
from read_costs import BACKENDS, bare
from rig import TEXT, Bench, Figures, Measurement, Person, Row, Server, processor_time, run

SENDERS = 64
PIPELINED = 256  # under way at once, on one socket
ALONE_SECONDS = 11  # after which a server that is alone does not notify
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
    bench: Bench, server: Server, function: Callable[..., Figures], chats: Sequence[int],
    people: Sequence[Person], group: int,
) -> Measurement:
    """Make the measurement of a ceiling: the posting function, or a plain INSERT, alone."""
    ids = [person.id for person in people]
    return partial(bench.ceiling, function, server.dsn, chats, ids, group, bench.seconds)


async def behind_bare_socket(bench: Bench, port: int, pid: int) -> Figures:
    """Measure one sender at a bare socket of aiohttp in front of the plain INSERT, and what each of
    its messages costs that server.
    """
    again = itertools.repeat(post_frame(TEXT))
    senders = await open_all(port, [partial(Sender, "/ws", "", again)])
    figures: Figures = {}

    async def post() -> None:
        figures.update(await post_for(senders, bench.seconds))

    with bench.only(None):
        [own] = await processor_time(post(), [pid])
    figures["server"] = own / senders[0].answered
    close_all(senders)
    return figures


async def costing(bench: Bench, server: Server, sender: Sender) -> Figures:
    """Measure what a lone message costs both sides: from its frame to its acknowledgement."""
    keep_open([sender])
    with bench.only(server):
        await post_for([sender], bench.seconds / 8)
        pids = [row["pid"] for row in await server.sql.fetch(BACKENDS)]
        own, backends = await processor_time(
            post_for([sender], bench.seconds), server.pids, pids)
    return {"server": own / sender.answered, "postgresql": backends / sender.answered}


async def people_apart(server: Server) -> tuple[list[Person], list[int], list[int]]:
    """Make senders, a chat for each, and as many chats again that no socket follows."""
    *people, partner = await server.people(SENDERS + 1)
    pairs = [[person, partner] for person in people]
    return people, await server.groups(pairs), await server.groups(pairs)


async def rows(bench: Bench) -> list[Row]:
    """Measure, and answer the rows."""
    bench.tell("posts: preparing")
    async with Server(bench) as server, Server(bench, ONE_BY_ONE) as lone:
        served_at = time.monotonic()
        people, chats, same_chats = await people_apart(server)
        crowd, same_crowd, single = await server.groups([people, people, people[:2]])
        lone_people, lone_chats, _ = await people_apart(lone)
        await server.settle()
        await lone.settle()
        apart = await open_senders(server, chats, people)
        together = await open_senders(server, [crowd], people)
        [alone] = await open_senders(server, [single], people[:1])
        lone_apart = await open_senders(lone, lone_chats, lone_people)
        behind = (ceilings.serve_inserts, server.dsn, same_chats[0], people[0].id)
        nothing = (ceilings.serve_bare, server.dsn, ceilings.PLAIN_PAGE, (single, 1, 1))
        call, insert = ceilings.call_posts, ceilings.call_inserts
        await asyncio.sleep(served_at + ALONE_SECONDS - time.monotonic())
        with serving(*behind) as behind_told, serving(*nothing) as told:
            found = await bench.alternate(
                "posts",
                one=posting(bench, server, [alone]),
                one_bare=partial(behind_bare_socket, bench, *behind_told),
                one_ceiling=calling(bench, server, call, same_chats[:1], people[:1], 1),
                one_insert=calling(bench, server, insert, same_chats[:1], people[:1], 1),
                cost=partial(costing, bench, server, alone),
                empty=partial(bare, bench, "/", *told),
                apart=posting(bench, server, apart),
                apart_ceiling=calling(bench, server, call, same_chats, people, SENDERS),
                apart_insert=calling(bench, server, insert, same_chats, people, SENDERS),
                one_by_one=posting(bench, lone, lone_apart),
                together=posting(bench, server, together),
                pipelined=posting(bench, server, [alone], PIPELINED),
                together_ceiling=calling(bench, server, call, [same_crowd], people, SENDERS),
                together_insert=calling(bench, server, insert, [same_crowd], people, SENDERS),
            )
    return [*rows_of(found), *insert_rows(found)]


def rows_of(found: dict[str, Figures]) -> list[Row]:
    """Hold the figures against the posting function alone."""
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


def insert_rows(found: dict[str, Figures]) -> list[Row]:
    """Hold the figures against plain INSERTs of the same rows."""
    one, bare, insert, cost = (found[key] for key in ("one", "one_bare", "one_insert", "cost"))
    empty = found["empty"]["server"]
    rows = [
        Row(
            "one sender awaiting each answer, p50, against a bare socket",
            f"{one['p50']:.2f} ms", f"{bare['p50']:.2f} ms", one["p50"] / bare["p50"],
            "x a bare socket before a plain insert", at_most=1.7, figures=one,
        ),
        Row(
            "a lone message over a socket: processor time of PostgreSQL",
            f"{cost['postgresql']:.2f} ms", f"{insert['postgresql']:.2f} ms",
            cost["postgresql"] / insert["postgresql"], "x a plain insert", at_most=2.5,
            figures=cost,
        ),
        Row(
            "a lone message over a socket: processor time of the server",
            f"{cost['server']:.2f} ms", f"{empty:.2f} ms", cost["server"] / empty,
            "x an empty answer", at_most=2.5, figures=cost,
        ),
        Row(
            "the same of a bare socket before a plain insert",
            f"{bare['server']:.2f} ms", f"{empty:.2f} ms", bare["server"] / empty,
            "x an empty answer", figures=bare,
        ),
    ]
    for work, key, limit in (
        ("64 senders in 64 chats, against plain inserts of 64", "apart", "apart_insert"),
        ("64 senders in one chat, against plain inserts of 64", "together", "together_insert"),
        ("one socket pipelining, against plain inserts of 64", "pipelined", "together_insert"),
    ):
        mine, best = found[key], found[limit]
        rows.append(
            Row(
                work, f"{mine['rate']:,.0f}/s", f"{best['rate']:,.0f}/s",
                mine["rate"] / best["rate"], "of plain inserts", figures=mine,
            )
        )
    return rows


if __name__ == "__main__":
    run(rows, __doc__)
