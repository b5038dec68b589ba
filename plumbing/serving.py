"""A program that serves an application: its start, its database, its ports, its workers, its end.

Everything ends with the stack that it was started on, the last first.
"""

import asyncio
import contextlib
import functools
import gc
import logging
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar, cast

import uvloop
from aiohttp import web

from plumbing import guard, metrics, process
from plumbing.embedded import Postgres
from plumbing.process import Listener, StartError
from plumbing.schema import migrate_when_up
from plumbing.settings import ServerSettings

IDLE_SECONDS = 620  # of a connection: longer than balancers keep theirs, which is up to 600
SHUTDOWN_SECONDS = 2
METRICS_CONNECTIONS_MAX = 100  # of an address, to the port of the metrics
METRICS_REST = 10  # times what it took, until the metrics are put together again
COLLECTED_AFTER = 500_000  # objects more than were there at the last time
COLLECTED_BYTES = 64 * 1024 * 1024  # that the memory grew since
GROWTH_SECONDS = 0.5  # between two looks at the memory
log = logging.getLogger("messenger.serving")

SettingsT = TypeVar("SettingsT", bound=ServerSettings)

# ---- Memory


async def collect_rarely() -> None:
    """Collect cycles of references only once there are very many new objects, or the memory grew by
    much. Does not end.

    Whatever ends leaves no cycles, so that it is freed at once. A collection hardly ever finds
    anything, and of everything beside ten thousand sockets it takes up to a second. But where
    something does leave cycles, few of them may hold much, so the new objects are looked through
    when the memory grows.
    """
    gc.freeze()
    gc.set_threshold(COLLECTED_AFTER)
    least = process.resident_bytes()
    while True:
        await asyncio.sleep(GROWTH_SECONDS)
        taken = process.resident_bytes()
        least = min(least, taken)
        if taken > least + COLLECTED_BYTES:
            gc.collect(0)
            least = process.resident_bytes()


# ---- Sites


async def start_site(
    stack: AsyncExitStack, listener: Listener, app: web.Application,
    close: Callable[[web.Application], Awaitable[None]] | None = None,
    admit: Callable[[str], process.Guest | None] = process.admit_all,
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


class MetricsPage:
    """What Prometheus collects. To put it together takes milliseconds: what was is given again for
    a while, so that whoever asks all the time takes a tenth of ours at most.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._body = b""
        self._until = 0.0

    def body(self) -> bytes:
        """Answer the page."""
        began = time.perf_counter()
        if began >= self._until:
            self._body = metrics.exposition(self._folder)
            now = time.perf_counter()
            self._until = now + METRICS_REST * (now - began)
        return self._body


METRICS = web.AppKey("metrics", MetricsPage)


def metrics_app(folder: Path | None) -> web.Application:
    """Make the application that answers at /metrics what Prometheus collects: of this process, or
    the sum of those that share a folder.
    """
    app = web.Application()
    app[METRICS] = MetricsPage(folder)
    app.router.add_get("/metrics", get_metrics)
    app.on_response_prepare.append(process.show_request_id)
    return app


async def get_metrics(request: web.Request) -> web.Response:
    """Get what Prometheus collects; on a port of its own, so that it can be kept private."""
    body = request.app[METRICS].body()
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
        admit = guard.Connections(METRICS_CONNECTIONS_MAX, []).admit
        await start_site(stack, listener, metrics_app(folder), admit=admit)


# ---- Workers


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


# ---- The program


@dataclass(frozen=True, slots=True)
class Store:
    """The database that a program serves, and the key that signs its tokens."""

    url: str
    secret_key: str
    where: str  # in words: where the data are
    name: str  # in words: what is blamed while it cannot be reached


async def open_store(settings: ServerSettings, stack: AsyncExitStack) -> Store:
    """Find the database of one's own, or start the embedded one. Raises StartError."""
    if settings.database:
        where, name = "your PostgreSQL (DATABASE_URL)", "DATABASE_URL"
        return Store(settings.database, settings.secret_key, where, name)
    server = Postgres(Path(settings.data_dir))
    stack.push_async_callback(server.stop)
    await server.start()
    secret_key = settings.secret_key or guard.kept_secret(server.folder / "secret_key")
    where = f"{server.folder} (embedded PostgreSQL)"
    return Store(server.dsn, secret_key, where, "the embedded PostgreSQL")


async def start_sites(
    settings: ServerSettings, stack: AsyncExitStack, listener: Listener, app: web.Application,
    close_sockets: Callable[[web.Application], Awaitable[None]],
) -> None:
    """Serve an application, and the metrics on a port of their own. Raises StartError."""
    await start_metrics(stack, settings.metrics_host, settings.metrics_port)
    at_most = settings.bound(settings.connections_per_address)
    admit = guard.Connections(at_most, guard.read_networks(settings.trusted_proxies)).admit
    # Its sockets are closed first: once the runner cleans up, they answer no close.
    await start_site(stack, listener, app, close=close_sockets, admit=admit)


@dataclass(frozen=True, slots=True)
class Program(Generic[SettingsT]):
    """A program that serves an application; with workers it runs itself so many times, and serves
    nothing but their metrics.
    """

    settings: type[SettingsT]
    sql: Path  # the folder of its schema
    file: Path  # the program itself
    # Is given the settings, a connection string and the secret key.
    make_app: Callable[[SettingsT, str, str], web.Application]
    # Is called before the application ends.
    close_sockets: Callable[[web.Application], Awaitable[None]]
    # Is told, once all is up, the settings, the URL of the page and where the data are.
    tell_start: Callable[[SettingsT, str, str], None]

    def run(self) -> int:
        """Serve as the environment says until SIGTERM or SIGINT; answer the exit status.

        Whatever keeps it from starting is one line.
        """
        process.die_with_parent()
        try:
            process.require_parser()
            process.raise_descriptor_limit()
            settings = self.settings.load(os.environ)
            process.escape_unwritable(sys.stdout)
            process.start_logs(settings.access_log == "on", settings.log_format == "json")
            with contextlib.suppress(asyncio.CancelledError):
                uvloop.run(self.serve(settings))
        except StartError as error:
            print(f"messenger: {error}", file=sys.stderr)
            return 1
        return 0

    async def serve(self, settings: SettingsT) -> None:
        """Serve until SIGTERM or SIGINT. Raises StartError."""
        process.end_on_signals()
        is_worker, has_workers = process.has_parent(), settings.workers > 1
        async with AsyncExitStack() as stack:
            listener = stack.enter_context(
                process.hold_port(settings.host, settings.port) if has_workers
                else process.listen_on(settings.host, settings.port, shared=is_worker))
            store = await open_store(settings, stack)
            if not is_worker:
                await migrate_when_up(store.url, self.sql, store.name)
            if has_workers:
                await self._serve_by_workers(settings, stack, listener, store)
            else:
                app = self.make_app(settings, store.url, store.secret_key)
                await start_sites(settings, stack, listener, app, self.close_sockets)
            if not is_worker:
                stack.callback(log.info, "stopping")
                self.tell_start(settings, process.url_of(listener), store.where)
            await collect_rarely()

    async def _serve_by_workers(
        self, settings: SettingsT, stack: AsyncExitStack, listener: Listener, store: Store
    ) -> None:
        port = listener.getsockname()[1]
        own = {"DATABASE_URL": store.url, "SECRET_KEY": store.secret_key, "PORT": str(port),
               "WORKERS": "1"}
        metrics_at = settings.metrics_host, settings.metrics_port
        command = [sys.executable, str(self.file)]
        await run_workers(stack, command, own, settings.workers, metrics_at)
        await process.until_listening(settings.host, port)
