"""Two workers against one: `./run bench workers [--rounds N] [--quick]`.

The second worker runs on the core of the load, so on two cores this tells what a second one costs
rather than what it brings; it is reported and holds no promise.
"""

from clients import get_for, get_request, keep_open
from fan_out import Crowd
from posts import open_senders, people_apart, posting
from rig import Bench, Figures, Measurement, Row, Server, run

MEMBERS, SENDERS = 1000, 16
MESSAGES = 10_000


async def works(bench: Bench, server: Server) -> dict[str, Measurement]:
    """Prepare a server, and make the measurements of it."""
    people, chats, _ = await people_apart(server)
    members = await server.people(MEMBERS)
    [chat, full] = await server.groups([members, members[:2]])
    await server.fill([full], MESSAGES, members[1])
    await server.settle()
    crowd = Crowd(server.port, chat, members, SENDERS)
    await crowd.come()
    request = get_request(f"/api/v1/chats/{full}/messages", members[0].token)

    async def fan_out() -> Figures:
        keep_open([*crowd.senders, *crowd.listeners])
        return await bench.loaded(server, lambda: crowd.post(bench.seconds))

    async def reads() -> Figures:
        return await bench.loaded(server, lambda: get_for(server, request, 16, bench.seconds))

    senders = await open_senders(server, chats, people)
    return {"sockets": fan_out, "reads": reads, "posts": posting(bench, server, senders)}


async def rows(bench: Bench) -> list[Row]:
    """Measure, and answer the rows."""
    bench.tell("workers: preparing")
    async with Server(bench) as one, Server(bench, WORKERS=2) as two:
        first, second = await works(bench, one), await works(bench, two)
        measurements = {}
        for name in first:
            measurements[f"{name}, one"] = first[name]
            measurements[f"{name}, two"] = second[name]
        found = await bench.alternate("workers", **measurements)
    made = []
    for name, work, key in (
        ("sockets", f"fan-out to {MEMBERS:,} members, {SENDERS} senders", "deliveries"),
        ("reads", "history, newest page", "rate"),
        ("posts", "64 senders in 64 chats", "rate"),
    ):
        one_figures, two_figures = found[f"{name}, one"], found[f"{name}, two"]
        made.append(
            Row(
                f"two workers against one: {work}",
                f"{two_figures[key]:,.0f}/s", f"{one_figures[key]:,.0f}/s",
                two_figures[key] / one_figures[key], "x one", figures=two_figures,
            )
        )
    return made


if __name__ == "__main__":
    run(rows, __doc__)
