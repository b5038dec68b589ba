"""Hints from one process to all others that serve the same database, over LISTEN and NOTIFY."""

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Hashable
from typing import Any

import msgspec

from plumbing import metrics
from plumbing.address import connect
from plumbing.database import (
    CONNECT_SECONDS,
    SESSION,
    WAIT_SECONDS,
    Database,
    keep_alive,
    reason_of,
)

LISTEN_CHECK_SECONDS = 3.0
LISTEN_PAUSE_SECONDS = 0.2
ALONE_SECONDS = 10.0  # without a word of others
NOTIFY_BYTES_MAX = 7900  # PostgreSQL allows 7,999
NOTIFY_HINTS_MAX = 500
ORIGIN_CHARS = 8
NOTIFY = "select pg_notify($1, $2)"

ENCODER = msgspec.json.Encoder()
log = logging.getLogger("messenger.bus")


class Bus:
    """Carries hints to the other processes. They may be lost: who listens also polls.

    NOTIFY runs in a statement of its own, after the commit that it tells of: inside that
    transaction it would hold PostgreSQL's one queue lock while the commit is flushed to disk.

    Every few seconds each process greets the others; who has heard nobody for a while is alone, and
    does not notify.
    """

    channel = "messenger"

    def __init__(self, database: Database) -> None:
        self._database = database
        self._origin = secrets.token_hex(ORIGIN_CHARS // 2)
        self._greeting = f"{self._origin}[]"
        self._alone_at = time.monotonic() + ALONE_SECONDS
        self._pending: dict[Hashable, Any] = {}
        self._sending: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None

    def notify(self, key: Hashable, hint: Any) -> None:
        """Send a hint to the other processes soon, as JSON; of several of one key the greatest.

        Never waits.
        """
        if time.monotonic() > self._alone_at:
            return
        if key not in self._pending or self._pending[key] < hint:
            self._pending[key] = hint
        if self._sending is None:
            self._sending = asyncio.create_task(self._send())

    def _take_payload(self) -> str:
        """Take as many hints from the pending as fit into one notification."""
        payload: list[bytes] = []
        size = NOTIFY_BYTES_MAX
        for key in list(itertools.islice(self._pending, NOTIFY_HINTS_MAX)):
            encoded = ENCODER.encode(self._pending[key])
            size -= len(encoded) + 1
            if size < 0 and payload:
                break
            del self._pending[key]
            payload.append(encoded)
        return f'{self._origin}[{b",".join(payload).decode()}]'

    async def _send(self) -> None:
        try:
            while self._pending:
                payload = self._take_payload()
                await self._database.rows(NOTIFY, self.channel, payload)
        except Exception as error:
            log.debug("%r", error)
            self._pending.clear()  # the polls of the others find what counts
        finally:
            self._sending = None

    def subscribe(self, hear_others: Callable[[str], None], poll_now: Callable[[], None]) -> None:
        """Call `hear_others` with each JSON array of hints of other processes, and `poll_now` when
        some may have been lost: each time that listening begins.
        """
        self._listening = asyncio.create_task(self._listen(hear_others, poll_now))

    async def _listen(
        self, hear_others: Callable[[str], None], poll_now: Callable[[], None]
    ) -> None:
        def receive(_connection: Any, _pid: int, _channel: str, payload: Any) -> None:
            if not payload.startswith(self._origin):
                self._alone_at = time.monotonic() + ALONE_SECONDS
                hear_others(payload[ORIGIN_CHARS:])
            elif payload == self._greeting:
                metrics.HINTS.observe(time.perf_counter() - greeted_at)

        greeted_at = 0.0
        is_deaf = False
        while True:
            connection = None
            try:
                connection = await connect(self._database.url, SESSION, CONNECT_SECONDS)
                keep_alive(connection)
                await connection.add_listener(self.channel, receive)
                if is_deaf:
                    log.warning("hints of other processes are heard again")
                    is_deaf = False
                poll_now()
                while True:
                    greeted_at = time.perf_counter()
                    await connection.execute(
                        NOTIFY, self.channel, self._greeting, timeout=WAIT_SECONDS)
                    await asyncio.sleep(LISTEN_CHECK_SECONDS)
            except Exception as error:  # whatever it is: else nobody would listen
                self._alone_at = time.monotonic() + ALONE_SECONDS  # others may hear us
                is_deaf = is_deaf or await self._tell_loss(error)
                await asyncio.sleep(LISTEN_PAUSE_SECONDS)
            finally:
                if connection is not None:
                    connection.terminate()

    async def _tell_loss(self, error: Exception) -> bool:
        """Log that nothing is heard, and answer True; unless the whole database is away, which is
        logged where statements are run.
        """
        try:
            await self._database.rows(NOTIFY, self.channel, self._greeting)
        except Exception as reason:
            log.debug("%r", reason)
            return False
        log.warning("no hints of other processes are heard (%s)", reason_of(error))
        return True

    async def close(self) -> None:
        """Stop listening and sending."""
        running = [task for task in (self._listening, self._sending) if task is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
