"""Applications on ports: a site with its time limits, the metrics on a site of their own, workers.

Everything ends with the stack that it was started on, the last first.
"""

import asyncio
import functools
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from typing import cast

import prometheus_client
from aiohttp import web

from plumbing import process
from plumbing.process import Listener

IDLE_SECONDS = 620  # of a connection: longer than balancers keep theirs, which is up to 600
SHUTDOWN_SECONDS = 2

REQUESTS = prometheus_client.Histogram(
    "messenger_request_seconds", "Time to answer a call.", ["operation", "status"])
request_timer = functools.cache(REQUESTS.labels)  # to find one takes longer than to count


def observe_request(operation: str, status: int, seconds: float) -> None:
    """Count a call that was answered."""
    request_timer(operation, status).observe(seconds)


async def start_site(
    stack: AsyncExitStack, listener: Listener, app: web.Application,
    close: Callable[[web.Application], Awaitable[None]] | None = None,
    admit: Callable[[str], Callable[[], None] | None] = process.admit_all,
) -> None:
    """Serve an application; `close` is called at the end, before its runner cleans up.

    `admit` is asked about each connection (process.Acceptor).
    """
    runner = web.AppRunner(
        app, access_log=None, handle_signals=False, keepalive_timeout=IDLE_SECONDS,
        shutdown_timeout=SHUTDOWN_SECONDS)
    stack.push_async_callback(runner.cleanup)
    await runner.setup()
    if close is not None:
        stack.push_async_callback(close, app)
    stack.callback(process.Acceptor(listener, cast(web.Server, runner.server), admit).stop)


def metrics_app() -> web.Application:
    """Make the application that answers at /metrics what Prometheus collects."""
    app = web.Application()
    app.router.add_get("/metrics", get_metrics)
    app.on_response_prepare.append(process.show_request_id)
    return app


async def get_metrics(request: web.Request) -> web.Response:
    """Get what Prometheus collects; on a port of its own, so that it can be kept private."""
    headers = {"Content-Type": prometheus_client.CONTENT_TYPE_LATEST}
    return web.Response(body=prometheus_client.generate_latest(), headers=headers)


async def run_workers(
    stack: AsyncExitStack, command: list[str], each: Iterable[Mapping[str, str]]
) -> None:
    """Start a worker with each of some environments beside ours, and keep them all up."""
    parent = {process.PARENT: str(os.getpid())}
    workers = await stack.enter_async_context(asyncio.TaskGroup())
    for own in each:
        workers.create_task(process.keep_running(command, {**os.environ, **own, **parent}))
