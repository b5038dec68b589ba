"""Sites by themselves: that they serve, and in which order they end."""

import asyncio
import contextlib
import sys
from typing import Any

import aiohttp
from aiohttp import web

from plumbing import metrics, process, serving
from plumbing.serving import MetricsPage, metrics_app, start_metrics, start_site
from support.servers import ROOT, free_port


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


def test_metrics_are_put_together_a_tenth_of_the_time(monkeypatch: Any) -> None:
    """Whoever asks for the metrics all the time is given again what was put together."""
    made = []

    def expose(folder: None) -> bytes:
        made.append(folder)
        return str(len(made)).encode()

    clock = iter([0.0, 1.0, 5.0, 10.9, 11.1, 12.1])  # it takes a second
    monkeypatch.setattr(metrics, "exposition", expose)
    monkeypatch.setattr(serving.time, "perf_counter", lambda: next(clock))
    page = MetricsPage(None)
    assert [page.body() for _ in range(4)] == [b"1", b"1", b"1", b"2"]


async def test_connections_to_the_metrics_are_bounded(monkeypatch: Any) -> None:
    """An address may have so many connections to the port of the metrics, and no more."""
    monkeypatch.setattr(serving, "METRICS_CONNECTIONS_MAX", 3)
    port = free_port()
    async with contextlib.AsyncExitStack() as stack:
        await start_metrics(stack, "127.0.0.1", port)
        streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
        for _, writer in streams:
            stack.callback(writer.close)
        async with asyncio.timeout(10):
            assert await streams[3][0].read() == b""  # hung up
            streams[0][1].write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await streams[0][0].readline()).startswith(b"HTTP/1.1 200")


async def test_few_cycles_that_hold_much_are_collected() -> None:
    """Cycles of few objects that hold much memory are collected once it grew by them."""
    code = """
import asyncio, sys
from plumbing import process, serving

class Node:
    pass

async def leak():
    for _ in range(400):
        node = Node()
        node.itself, node.held = node, bytearray(b"x" * 2 ** 20)
        del node
        await asyncio.sleep(0.001)

async def main():
    serving.GROWTH_SECONDS = 0.01
    collecting = asyncio.create_task(serving.collect_rarely())
    before = process.resident_bytes()
    await leak()
    print((process.resident_bytes() - before) // 2 ** 20)

asyncio.run(main())
"""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, cwd=ROOT)
    output, _ = await child.communicate()
    assert child.returncode == 0
    assert int(output) < 200
