"""What is counted and timed for Prometheus, one place for all names but the application's own.

With several processes each writes what it counts into a shared folder, and one that is no worker
sums it up. The folder is named in the environment before a worker starts: prometheus_client chooses
once, when it is imported, where values live.
"""

import functools
import os
from pathlib import Path

import prometheus_client
from prometheus_client import multiprocess

FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # as prometheus_client calls it
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

REQUESTS = prometheus_client.Histogram(
    "messenger_request_seconds", "Time to answer a call.", ["operation", "status"])
COMMITS = prometheus_client.Histogram(
    "messenger_commit_seconds", "Time to commit a group.", ["kind"],
    buckets=(.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5))
GROUPS = prometheus_client.Histogram(
    "messenger_group_items", "Items committed in one group.", ["kind"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512))
HINTS = prometheus_client.Histogram(
    "messenger_hint_seconds", "Time in which a hint comes back through PostgreSQL.",
    buckets=(.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1))
DATABASE = prometheus_client.Gauge(
    "messenger_database_up", "Whether the database answers and can be written to.",
    multiprocess_mode="livemin")
CONNECTIONS = prometheus_client.Gauge(
    "messenger_database_connections", "Open connections to the database.",
    multiprocess_mode="livesum")

request_timer = functools.cache(REQUESTS.labels)  # to find one takes longer than to count


def observe_request(operation: str, status: int, seconds: float) -> None:
    """Count a call that was answered."""
    request_timer(operation, str(status)).observe(seconds)


def exposition(folder: Path | None = None) -> bytes:
    """Write down, as Prometheus reads it, what this process counted; or all that share a folder."""
    registry = prometheus_client.REGISTRY
    if folder is not None:
        registry = prometheus_client.CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, str(folder))  # type: ignore[no-untyped-call]
    return prometheus_client.generate_latest(registry)


def forget_process(folder: Path, pid: int) -> None:
    """Count no longer what a process that ended had open; what it did stays counted."""
    multiprocess.mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]


def environment(folder: Path) -> dict[str, str]:
    """Answer what lets a process write into a folder what it counts."""
    return {FOLDER: os.fspath(folder)}
