"""Chat while logins are tried: `./run bench logins [--rounds N] [--quick]`.

Four senders in a chat, each posting 50 times a second and awaiting its answer, alone and while 50
logins a second are tried with the right password at the default cost. The delay counts from when a
post was due, so a pause is not hidden by the posts that it held up.
"""

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import aiohttp
from clients import Sender, close_all, connect, keep_open
from posts import open_senders
from rig import Bench, Figures, Row, Server, percentile, run

SENDERS, POSTS_PER_SECOND = 4, 50
LOGINS_PER_SECOND = 50
SECONDS = 6
ACCOUNT = {"email": "known@example.com", "password": "correct horse"}
COUNTED = {"200": "let in", "503": "refused as too many at once"}


class Login(asyncio.Protocol):
    """One try to log in; its answer's status is counted."""

    def __init__(self, statuses: Counter[str]) -> None:
        self.statuses = statuses
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        self.transport = transport
        body = json.dumps(ACCOUNT)
        self.transport.write(
            "POST /api/v1/users/login HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )

    def data_received(self, data: bytes) -> None:
        """Count and hang up."""
        self.statuses[data[9:12].decode()] += 1
        self.transport.close()


async def try_logins(port: int, statuses: Counter[str]) -> None:
    """Try, as often as is due, until cancelled."""
    due, tries = time.monotonic(), []
    try:
        while True:
            tries.append(await connect(port, lambda: Login(statuses)))
            due += 1 / LOGINS_PER_SECOND
            await asyncio.sleep(max(0, due - time.monotonic()))
    finally:
        close_all(tries)


async def post_in_time(sender: Sender, seconds: float, first: float) -> list[float]:
    """Post when it is due and await each answer; answers the delays in milliseconds."""
    delays, due = [], time.monotonic() + first
    end = due + seconds
    while due < end:
        await asyncio.sleep(max(0, due - time.monotonic()))
        await sender.start(until=0)
        delays.append((time.monotonic() - due) * 1000)
        due += 1 / POSTS_PER_SECOND
    return delays


async def chat_for(senders: Sequence[Sender], seconds: float) -> Figures:
    """Let all of them chat for a while."""
    step = 1 / POSTS_PER_SECOND / len(senders)
    found = await asyncio.gather(
        *(post_in_time(sender, seconds, place * step) for place, sender in enumerate(senders))
    )
    delays = [delay for each in found for delay in each]
    return {"p50": percentile(delays, 50), "p99": percentile(delays, 99)}


async def rows(bench: Bench) -> list[Row]:
    """Measure, and answer the rows."""
    bench.tell("logins: preparing")
    seconds = 1 if bench.quick else SECONDS
    statuses: Counter[str] = Counter()
    async with Server(bench) as server:
        people = await server.people(SENDERS)
        [chat] = await server.groups([people])
        async with aiohttp.ClientSession() as http:
            url = f"http://127.0.0.1:{server.port}/api/v1/users"
            async with http.post(url, json=ACCOUNT | {"username": "known"}) as answer:
                answer.raise_for_status()
        senders = await open_senders(server, [chat], people)

        async def alone() -> Figures:
            keep_open(senders)
            return await bench.loaded(server, lambda: chat_for(senders, seconds))

        async def beside() -> Figures:
            trying = asyncio.create_task(try_logins(server.port, statuses))
            try:
                return await alone()
            finally:
                trying.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await trying
                await server.rest()  # the hashes that still wait for a thread are made all the same

        found = await bench.alternate("chat latency", without=alone, beside=beside)
    bench.tell(f"logins: {', '.join(f'{n} {COUNTED.get(s, s)}' for s, n in statuses.items())}")
    without, mixed = found["without"], found["beside"]
    return [
        Row(
            f"chat latency while {LOGINS_PER_SECOND} logins/s are tried, p99",
            f"{mixed['p99']:.1f} ms", f"{without['p99']:.1f} ms without",
            mixed["p99"] / without["p99"], "x without", at_most=2, figures=mixed,
        )
    ]


if __name__ == "__main__":
    run(rows, __doc__)
