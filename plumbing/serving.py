"""Applications on ports: a site with its time limits, the metrics on a site of their own, workers.

Everything ends with the stack that it was started on, the last first.
"""

import asyncio
import functools
import os
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import cast

from aiohttp import web

from plumbing import metrics, process
from plumbing.process import Listener

IDLE_SECONDS = 620  # of a connection: longer than balancers keep theirs, which is up to 600
SHUTDOWN_SECONDS = 2
METRICS_FOLDER = web.AppKey("metrics_folder", Path)


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


def metrics_app(folder: Path | None) -> web.Application:
    """Make the application that answers at /metrics what Prometheus collects: of this process, or
    the sum of those that share a folder.
    """
    app = web.Application()
    if folder is not None:
        app[METRICS_FOLDER] = folder
    app.router.add_get("/metrics", get_metrics)
    app.on_response_prepare.append(process.show_request_id)
    return app


async def get_metrics(request: web.Request) -> web.Response:
    """Get what Prometheus collects; on a port of its own, so that it can be kept private."""
    body = metrics.exposition(request.app.get(METRICS_FOLDER))
    return web.Response(body=body, headers={"Content-Type": metrics.CONTENT_TYPE})


async def start_metrics(
    stack: AsyncExitStack, host: str, port: int, folder: Path | None = None
) -> None:
    """Serve the metrics on a port of their own (0: not at all): of this process, or of those that
    share a folder. Raises StartError.
    """
    if port:
        listener = stack.enter_context(
            process.listen_on(host, port, names=("METRICS_HOST", "METRICS_PORT")))
        await start_site(stack, listener, metrics_app(folder))


async def run_workers(
    stack: AsyncExitStack, command: list[str], own: Mapping[str, str], count: int,
    metrics_at: tuple[str, int],
) -> None:
    """Start so many workers with `own` in their environment beside ours, and keep them all up.

    The sum of their metrics is served at a host and a port, if any. Raises StartError.
    """
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    await start_metrics(stack, *metrics_at, folder)
    environment = os.environ | own | metrics.environment(folder)
    environment |= {process.PARENT: str(os.getpid()), "METRICS_PORT": "0"}

    note_end = functools.partial(metrics.forget_process, folder)
    workers = await stack.enter_async_context(asyncio.TaskGroup())
    for _ in range(count):
        workers.create_task(process.keep_running(command, environment, note_end))
