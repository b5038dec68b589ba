"""Posts that are put into the writer as one group, behind the endpoints."""

import asyncio
from typing import Any

from aiohttp import web

import messenger
from support.people import Person


def post(chat: int, sender: Person, text: str = "hello", **fields: Any) -> messenger.NewPost:
    """Make an item for the writer."""
    post_id, reply_to = fields.get("id") or messenger.uuid7(), fields.get("reply_to")
    return messenger.NewPost(chat, sender.id, post_id, text, reply_to)


async def written(app: web.Application, *posts: messenger.NewPost) -> list[Any]:
    """Put items into the writer as one group; answer what became of each."""
    futures = [asyncio.create_task(app[messenger.POSTS].submit(each, "")) for each in posts]
    async with asyncio.timeout(50):
        return list(await asyncio.gather(*futures, return_exceptions=True))


def numbers_of(outcomes: list[Any]) -> list[Any]:
    """Show outcomes shortly: the number of what was posted, the class of what was refused."""
    return [type(each) if isinstance(each, Exception) else each.ack.seq for each in outcomes]
