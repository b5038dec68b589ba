"""Sites by themselves: that they serve, and in which order they end."""

import contextlib

import aiohttp
from aiohttp import web

from plumbing import metrics, process
from plumbing.serving import metrics_app, start_site


async def test_site_serves_until_its_stack_ends() -> None:
    """A site answers; at the end it is closed before its application is cleaned up, and nobody
    listens any more."""
    ends = []

    async def close(app: web.Application) -> None:
        ends.append("closed")

    async def clean_up(app: web.Application) -> None:
        ends.append("cleaned up")

    app = metrics_app(None)
    app.on_cleanup.append(clean_up)
    metrics.observe_request("test_of_a_site", 200, 0.5)
    async with contextlib.AsyncExitStack() as stack, aiohttp.ClientSession() as client:
        listener = stack.enter_context(process.listen_on("127.0.0.1", 0))
        port = listener.getsockname()[1]
        await start_site(stack, listener, app, close)
        async with client.get(f"http://127.0.0.1:{port}/metrics") as answer:
            assert answer.status == 200
            assert 'operation="test_of_a_site",status="200"' in await answer.text()
        assert ends == []
    assert ends == ["closed", "cleaned up"]
    process.listen_on("127.0.0.1", port).close()
