"""Everything, one part after the other: `./run bench [--rounds N] [--quick]`.

Writes the table into bench/README.md, with the machine, and draws it as bench/results.svg;
`--quick` writes neither, for one short round says nothing. Takes about 20 minutes.
"""

import os
import platform
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import fan_out
import growth
import idle
import logins
import posts
import read_costs
import reads
import reconnect
import uvloop
import workers
from picture import drawn
from rig import ALL_CORES, Bench, Row, Server, bench_of, markdown, options_of

PARTS = (posts, fan_out, reads, read_costs, idle, reconnect, workers, logins, growth)
HERE = Path(__file__).parent
QUIET_LOAD = 0.5  # processes that ran in the minute before
README, PICTURE = HERE / "README.md", HERE / "results.svg"

# What others did on such a machine with the same pinning, the best of them in each column:
# the row's key, which of its figures, whether more is better, the other's figure, and whose it is.
PEERS = (
    ("one", "p50", "ms", False, 0.70, "ejabberd 23.01"),
    ("apart", "rate", "/s", True, 4340, "ejabberd 23.01"),
    ("fan_out_100_1", "deliveries", "/s", True, 36_000, "ejabberd 23.01"),
    ("fan_out_1000_1", "deliveries", "/s", True, 33_600, "ejabberd 23.01"),
    ("fan_out_1000_16", "deliveries", "/s", True, 156_000, "NATS, which stores nothing"),
    ("history newest of 100,000", "rate", "/s", True, 191, "Synapse 1.163"),
    ("history far end of 100,000", "rate", "/s", True, 24, "ejabberd 23.01"),
    ("list 200", "p50", "ms", False, 72, "ejabberd 23.01"),
    ("idle 10000", "kilobytes", "KB", False, 34, "Prosody 0.12"),
)


def peers_table(rows: list[Row]) -> str:
    """Hold our figures against the best of the others."""
    by_key = {row.key: row for row in rows if row.key}
    lines = ["| work | ours | the best of the others | ahead by |", "|---|--:|---|--:|"]
    for key, figure, unit, more_is_better, best, whose in PEERS:
        row = by_key.get(key)
        if row is None or row.figures is None:
            continue
        ours = row.figures[figure]
        ahead = ours / best if more_is_better else best / ours
        lines.append(
            f"| {row.work} | {shown(ours, unit)} | {shown(best, unit)} ({whose}) | {ahead:.1f} x |"
        )
    return "\n".join(lines)


def shown(value: float, unit: str) -> str:
    """Write a figure."""
    return f"{value:,.0f}{unit}" if unit == "/s" else f"{value:,.2f} {unit}"


def machine() -> str:
    """Describe what this runs on, without its name."""
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    model = found[1] if found else platform.machine()
    kilobytes = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    gigabytes = int(kilobytes[1]) / 2**20 if kilobytes else 0
    kernel = re.match(r"[\d.]+", platform.release())
    return (
        f"{len(ALL_CORES)} cores of {model}, {gigabytes:.0f} GB, Linux {kernel and kernel[0]}, "
        f"Python {platform.python_version()}"
    )


async def postgresql(bench: Bench) -> str:
    """Answer the version of the embedded PostgreSQL."""
    async with Server(bench) as server:
        version: str = await server.sql.fetchval("show server_version")
        return version.split()[0]


async def measure(bench: Bench) -> tuple[str, list[Row]]:
    """Run every part."""
    where = f"{machine()}, PostgreSQL {await postgresql(bench)}"
    rows: list[Row] = []
    for number, part in enumerate(PARTS, 1):
        bench.tell(f"==== part {number} of {len(PARTS)}: {part.__name__}")
        rows += await part.rows(bench)
    return where, rows


def write_down(text: str) -> None:
    """Put the results between their marks in the README."""
    readme = README.read_text()
    start, end = "<!-- results -->\n", "<!-- end of results -->"
    before, _, rest = readme.partition(start)
    _, _, after = rest.partition(end)
    README.write_text(f"{before}{start}{text}\n{end}{after}")


def main() -> None:
    """Measure everything, then write and draw it."""
    options = options_of(__doc__)
    began, busy = time.monotonic(), os.getloadavg()[0]
    if busy > QUIET_LOAD:
        print(f"the machine is busy (load {busy:.1f}): figures will be noise", file=sys.stderr)

    async def everything() -> tuple[str, list[Row]]:
        async with bench_of(options) as bench:
            return await measure(bench)

    where, rows = uvloop.run(everything())
    minutes = (time.monotonic() - began) / 60
    caption = (
        f"{datetime.now(UTC):%Y-%m-%d}, {where}; {options.rounds} rounds in {minutes:.0f} minutes; "
        f"load of the machine before them {busy:.1f}."
    )
    tables = f"{caption}\n\n{markdown(rows)}\n\nBeside others:\n\n{peers_table(rows)}"
    print(tables)
    if not options.quick:
        write_down(tables)
        PICTURE.write_text(drawn(rows, caption))


if __name__ == "__main__":
    main()
