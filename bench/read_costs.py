"""What reading costs in processor time: `./run bench read_costs [--rounds N] [--quick]`.

One reader, one request at a time. Of each answer the time of the server and of its PostgreSQL
backends is counted together, to the nanosecond (schedstat), and held against floors measured in
the same rounds, none of which is a function of ours: a plain SELECT of the same rows (by its
backend), its fetch by asyncpg, and an empty answer of a bare aiohttp. What such a bare aiohttp
takes to fetch and encode a page for anybody is told beside them. Last, how long the list of chats
takes right after they were filled, and once the tables were analyzed.
"""

import time
from collections.abc import Sequence
from functools import partial

import ceilings
from clients import Getter, close_all, connect, get_for, get_request
from fan_out import serving
from rig import Bench, Figures, Person, Row, Server, messenger, processor_time, run

PAGE = messenger.PAGE_DEFAULT
MEMBERS, READERS = 16, 10
MESSAGES = 10_000
CHATS, UNREAD = 120, 40
FRESH_CHATS, MESSAGES_EACH = 200, 100

BACKENDS = "select pid from pg_stat_activity where application_name = 'messenger'"


async def getting(bench: Bench, server: Server, path: str, token: str) -> Figures:
    """Ask the messenger for the same for a while."""
    path = f"/api/v1{path}"
    with bench.only(server):
        await get_for(server, get_request(path, token), 1, bench.seconds / 8)  # it is connected
        backends = [row["pid"] for row in await server.sql.fetch(BACKENDS)]
        return await asking(bench, server.port, path, token, server.pids, backends)


async def asking(
    bench: Bench, port: int, path: str, token: str, pids: Sequence[int], backends: Sequence[int]
) -> Figures:
    """Ask for the same for a while, and answer what an answer cost both sides."""
    getter = await connect(port, lambda: Getter(get_request(path, token)))
    await getter.start(time.perf_counter() + bench.seconds / 8)  # statements are prepared
    own, theirs = await processor_time(
        getter.start(time.perf_counter() + bench.seconds), pids, backends)
    close_all([getter])
    count = len(getter.delays)
    return {"server": own / count, "postgresql": theirs / count}


async def bare(bench: Bench, path: str, port: int, pid: int, backend: int) -> Figures:
    """Ask a bare aiohttp for the same for a while."""
    with bench.only(None):
        return await asking(bench, port, path, "", [pid], [backend])


async def rows(bench: Bench) -> list[Row]:
    """Measure, and answer the rows."""
    bench.tell("read costs: filling chats with messages")
    async with Server(bench) as server:
        people = await server.people(MEMBERS + 4)
        crowd, (other, lister, reader, fresh) = people[:MEMBERS], people[MEMBERS:]
        read, unread = await server.groups([crowd, crowd[:2]])
        await server.fill([read, unread], MESSAGES, crowd[0])
        await read_all(server, [read], crowd[1 : READERS + 1])
        lists = {}
        for who in (lister, reader):
            lists[who.id] = await server.groups([[who, other]] * CHATS)
            await server.fill(lists[who.id], UNREAD, other)
        await read_all(server, lists[reader.id], [reader])
        await server.settle()
        page = unread, MESSAGES + 1, PAGE
        with serving(ceilings.serve_bare, server.dsn, ceilings.PLAIN_PAGE, page) as told:
            found = await bench.alternate("read costs", **{
                "page": partial(plain, bench, server, ceilings.PLAIN_PAGE, *page),
                "look-ups": partial(
                    plain, bench, server, ceilings.PLAIN_LOOK_UPS, lists[lister.id][:PAGE]),
                "empty": partial(bare, bench, "/", *told),
                "bare": partial(bare, bench, "/page", *told),
                "read": partial(page_of, bench, server, read, crowd[1]),
                "unread": partial(page_of, bench, server, unread, crowd[1]),
                "list": partial(getting, bench, server, "/chats", lister.token),
                "list, all read": partial(getting, bench, server, "/chats", reader.token),
            })
        return [*cost_rows(found), await fresh_row(bench, server, fresh, other)]


async def plain(bench: Bench, server: Server, query: str, *arguments: object) -> Figures:
    """Run a plain SELECT for a while."""
    return await bench.ceiling(
        ceilings.call_plain, server.dsn, query, arguments, PAGE, bench.seconds)


async def page_of(bench: Bench, server: Server, chat: int, who: Person) -> Figures:
    """Read the newest page of a chat for a while."""
    return await getting(bench, server, f"/chats/{chat}/messages", who.token)


async def read_all(server: Server, chats: Sequence[int], who: Sequence[Person]) -> None:
    """Have some people read everything in some chats."""
    newest = await server.sql.fetch(
        "select m.chat_id, m.id from chats c join messages m"
        " on m.chat_id = c.id and m.seq = c.last_seq where c.id = any ($1)", chats)
    for one in who:
        await server.sql.fetch(
            messenger.READ_MESSAGES, [row["chat_id"] for row in newest], [one.id] * len(newest),
            [row["id"] for row in newest])


def cost_rows(found: dict[str, Figures]) -> list[Row]:
    """Hold what each answer cost against its floor."""
    page, look_ups, empty = found["page"], found["look-ups"], found["empty"]["server"]
    selected = page["postgresql"] + empty
    looked_up = look_ups["postgresql"] + empty
    few = f"list of {PAGE} of {CHATS} chats"
    compared = (
        ("read", f"page of {PAGE}, {READERS} of {MEMBERS} have read all", selected, 4,
         "a plain select + an empty answer"),
        ("unread", f"page of {PAGE}, nobody read, 2 members", selected + page["fetch"], 1.5,
         "a plain select + its fetch + an empty answer"),
        ("bare", f"page of {PAGE} for anybody, by a bare aiohttp", selected + page["fetch"], None,
         "a plain select + its fetch + an empty answer"),
        ("list", f"{few}, {UNREAD} unread each", looked_up, 8,
         f"{PAGE} look-ups by key + an empty answer"),
        ("list, all read", f"{few}, nothing unread", looked_up, 5,
         f"{PAGE} look-ups by key + an empty answer"),
    )
    made = []
    for name, work, floor, most, of_what in compared:
        mine = found[name]
        both = mine["server"] + mine["postgresql"]
        made.append(
            Row(
                f"{work}: processor time of PostgreSQL and server",
                f"{mine['postgresql']:.2f} + {mine['server']:.2f} ms", f"{floor:.2f} ms",
                both / floor, f"x {of_what}", at_most=most, figures=mine,
            )
        )
    return made


async def fresh_row(bench: Bench, server: Server, who: Person, other: Person) -> Row:
    """Measure the list of chats that were just filled, and again once they are analyzed."""
    chats = await server.groups([[who, other]] * FRESH_CHATS, analyze=False)
    await server.fill(chats, MESSAGES_EACH, other)
    request = get_request("/api/v1/chats", who.token)
    asked = partial(get_for, server, request, 1, bench.seconds / 4)
    before = await bench.loaded(server, asked)
    await server.settle()
    after = await bench.loaded(server, asked)
    bench.tell(f"read costs, list of fresh chats: {before['p50']:.2f}, then {after['p50']:.2f} ms")
    return Row(
        f"list of {FRESH_CHATS} chats right after they were filled, p50",
        f"{before['p50']:.1f} ms", f"{after['p50']:.1f} ms",
        before["p50"] / after["p50"], "x the same once analyzed", at_most=1.5, figures=before,
    )


if __name__ == "__main__":
    run(rows, __doc__)
