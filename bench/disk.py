"""What a message takes on the disk: `./run bench disk`, in half a minute.

People post for a while over sockets: pieces of this repository's pages, of three to thirty words.
Then each chat is searched, so that the index has all of its words. What the database has grown by
is told of each message, with what each large table has of it, indexes included. PostgreSQL's log of
the last changes (WAL) is not in it: it takes up to 1 GB more, however many messages there are.
"""

import random
from collections.abc import Iterator
from functools import partial

import aiohttp
import uvloop
from clients import Sender, close_all, open_all, post_for, post_frame
from rig import ROOT, Bench, Person, Server, bench_of, options_of

PEOPLE, SECONDS, WINDOW = 16, 5.0, 64
WORDS_LEAST, WORDS_MOST = 3, 30
SIZE = "select pg_database_size(current_database())"
LARGE = """
    select relname as name, pg_total_relation_size(oid) as bytes from pg_class
    where relkind = 'r' and relnamespace = 'public'::regnamespace and relname ~ '^message'
    order by 2 desc"""


def texts(words: list[str], seed: int) -> Iterator[bytes]:
    """Encode messages, each with other words."""
    chance = random.Random(seed)
    while True:
        size = chance.randint(WORDS_LEAST, WORDS_MOST)
        start = chance.randrange(len(words) - size)
        yield post_frame(" ".join(words[start : start + size]))


async def index(server: Server, chats: list[int], person: Person) -> None:
    """Have every chat searched: its index takes in what is new first."""
    headers = {"Authorization": f"Bearer {person.token}"}
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}", headers=headers) as client:
        for chat in chats:
            status = 503  # while that takes longer than a second
            while status == 503:
                async with client.get(f"/api/v1/chats/{chat}/messages", params={"q": "x"}) as told:
                    status = told.status


async def measure(bench: Bench) -> list[tuple[str, float]]:
    """Post, and answer what each message takes, in bytes, and how many characters it has."""
    words = [word for page in sorted((ROOT / "docs").glob("*.md"))
             for word in page.read_text(encoding="utf-8").split() if word.isalnum()]
    async with Server(bench) as server:
        people = await server.people(PEOPLE)
        chats = await server.groups([people] * PEOPLE)
        await server.settle()
        before = await server.sql.fetchval(SIZE)
        bench.tell("disk: posts")
        senders = await open_all(server.port, [
            partial(Sender, f"/ws/{chat}", person.token, texts(words, chat))
            for chat, person in zip(chats, people, strict=True)])
        await post_for(senders, SECONDS / 5 if bench.quick else SECONDS, WINDOW)
        close_all(senders)
        bench.tell("disk: their words")
        await index(server, chats, people[0])
        count, characters = await server.sql.fetchrow(
            "select count(*), avg(length(text)) from messages")
        grown = await server.sql.fetchval(SIZE) - before
        tables = await server.sql.fetch(LARGE)
    print(f"{count:,} messages\n\n| each message has | |\n|---|--:|")
    return [("characters", float(characters)), ("bytes", grown / count),
            *((f"bytes in {table['name']}", table["bytes"] / count) for table in tables)]


async def everything() -> None:
    """Measure, and print a table."""
    async with bench_of(options_of(__doc__)) as bench:
        for what, figure in await measure(bench):
            print(f"| {what} | {figure:.0f} |")


if __name__ == "__main__":
    uvloop.run(everything())
