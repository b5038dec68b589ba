"""Backups of one's own PostgreSQL, and what the commands refuse: each in this process."""

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest

import messenger
from plumbing.process import StartError
from plumbing.schema import migrate
from support.databases import fills_with_life, on_cluster, with_database
from support.servers import settings_for
from tools import backup, databases, move, restore, verify

pytestmark = pytest.mark.usefixtures("nothing_left")


async def counts_of(url: str, folder: Path) -> Any:
    """What is in a database, in which nothing is wrong."""
    async with databases.opened(settings_for(url, folder)) as place:
        found = await verify.examine_place(place)
    assert found.broken == {}
    return found.counts


@pytest.fixture
async def file(database_url: str, sql: asyncpg.Connection, tmp_path: Path) -> Path:
    """A backup of a database of one's own in which something of everything is."""
    await fills_with_life(sql)
    await backup.back_up(settings_for(database_url, tmp_path), tmp_path / "backup", False)
    return tmp_path / "backup"


async def test_stopped_server_is_backed_up_and_restored_into_an_empty_folder(
    database_url: str, file: Path, tmp_path: Path
) -> None:
    """A folder with nothing in it takes a backup without a word of force, also that of another
    PostgreSQL; where no server runs the embedded one is started for the time."""
    settings, again = settings_for("", tmp_path / "new"), tmp_path / "again"
    await restore.restore(settings, file, False, False)
    assert not (tmp_path / "new/secret_key").exists()
    await backup.back_up(settings, again, False)
    assert await counts_of("", tmp_path / "new") == await counts_of(database_url, tmp_path)
    assert again.stat().st_size > 10_000


@pytest.mark.parametrize("role", ["may make databases", "may not"])
async def test_own_database_is_restored(
    database_url: str, empty_url: str, cluster: str, file: Path, tmp_path: Path, role: str
) -> None:
    """A backup goes into another database, whether its role may make more or not; in the latter
    case only into one without tables."""
    url = empty_url
    if role == "may not":
        name = f"plain_{os.getpid()}"
        try:
            await on_cluster(cluster, f"create role {name} login password 'x'")
        except asyncpg.InsufficientPrivilegeError:
            pytest.skip("the role of the tests may not make roles")
        await on_cluster(empty_url, f"grant all on schema public to {name}")
        url = f"{empty_url}{'&' if '?' in empty_url else '?'}user={name}&password=x"
    try:
        await restore.restore(settings_for(url, tmp_path), file, False, False)
        assert await counts_of(url, tmp_path) == await counts_of(database_url, tmp_path)
        if role == "may not":
            with pytest.raises(StartError, match="createdb"):
                await restore.restore(settings_for(url, tmp_path), file, True, False)
    finally:
        if role == "may not":
            await on_cluster(empty_url, f"drop owned by {name} cascade", f"drop role {name}")


async def test_what_is_replaced_stays_until_the_next_restore(
    empty_url: str, cluster: str, file: Path, tmp_path: Path
) -> None:
    """With force a backup replaces a database that has accounts, which is kept; a backup that does
    not verify replaces nothing."""
    settings = settings_for(empty_url, tmp_path)
    await restore.restore(settings, file, False, False)
    await on_cluster(empty_url, "update users set email = 'kept' where id = 1")
    await restore.restore(settings, file, True, False)
    async with databases.opened(settings) as place:
        kept = place.beside(f"{place.database}_before")
    async with databases.connected(kept) as connection:
        assert await connection.fetchval("select email from users where id = 1") == "kept"

    await on_cluster(empty_url, "update chats set last_seq = 1 where id = 1")
    await backup.back_up(settings, tmp_path / "wrong", False)
    await on_cluster(empty_url, "update users set email = 'present' where id = 1")
    with pytest.raises(StartError, match="breaks the rules above"):
        await restore.restore(settings, tmp_path / "wrong", True, False)
    async with databases.connected(place) as connection:
        assert await connection.fetchval("select email from users where id = 1") == "present"
    assert await verify.verify(settings, None) == 1
    await on_cluster(cluster, f"drop database {kept.database}")


async def test_database_with_a_long_name_is_restored(
    cluster: str, file: Path, tmp_path: Path
) -> None:
    """PostgreSQL cuts the names of databases at 63 bytes: those of the copies are no other's."""
    for name in ("群" * 21, "x" * 63):
        await on_cluster(cluster, f'create database "{name}" template template0')
        settings = settings_for(with_database(cluster, quote(name)), tmp_path)
        try:
            for _ in range(2):
                await restore.restore(settings, file, True, False)
            async with (
                databases.opened(settings) as place, databases.connected(place) as connection
            ):
                assert await connection.fetchval("select current_database()") == name
        finally:
            cut = name.encode()[:50].decode(errors="ignore")
            for each in (name, f"{cut}_before", f"{cut}_restored"):
                await on_cluster(cluster, f'drop database if exists "{each}"')


def newer_migrations(_folder: str, names: list[str]) -> list[str]:
    """Name the migrations beyond a schema without versions."""
    return [name for name in names if name[0].isdigit() and name >= "0008"]


async def test_backup_of_the_release_before_is_brought_up_to_date(
    database_url: str, empty_url: str, tmp_path: Path
) -> None:
    """A backup of an older schema is restored as a database of this one's, in which nothing is
    wrong."""
    older = tmp_path / "older"
    shutil.copytree(messenger.SQL, older, ignore=newer_migrations)
    await asyncio.to_thread(migrate, empty_url, older)
    connection = await asyncpg.connect(empty_url)
    await fills_with_life(connection)
    await connection.close()
    await backup.back_up(settings_for(empty_url, tmp_path), tmp_path / "backup", False)
    await restore.restore(settings_for(database_url, tmp_path), tmp_path / "backup", False, False)
    assert (await counts_of(database_url, tmp_path))["messages"] == 16


async def truncated(file: Path) -> None:
    """Cut a backup in half."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


async def of_words(file: Path) -> None:
    """Write something else in the place of a backup."""
    file.write_text("words")


async def missing(file: Path) -> None:
    """Take a backup away."""
    file.unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(truncated, "pg_restore: error"), (of_words, "is no backup"), (missing, "cannot read")])
async def test_file_that_is_no_backup_is_refused(
    empty_url: str, file: Path, tmp_path: Path, spoil: Any, reason: str
) -> None:
    """What is no backup, or not all of one, is refused in one line, and changes nothing."""
    await spoil(file)
    with pytest.raises(StartError) as raised:
        await restore.restore(settings_for(empty_url, tmp_path), file, True, False)
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)
    async with databases.opened(settings_for(empty_url, tmp_path)) as place:
        assert await place.tables() == 0


async def test_restore_refuses_what_it_would_break(
    database_url: str, empty_url: str, sql: asyncpg.Connection, file: Path, tmp_path: Path
) -> None:
    """A backup of a newer schema is refused, and so is a database that somebody uses or that has
    accounts."""
    with pytest.raises(StartError, match="1 other sessions"):  # `sql` is connected
        await restore.restore(settings_for(database_url, tmp_path), file, True, False)
    await restore.restore(settings_for(empty_url, tmp_path), file, False, False)
    with pytest.raises(StartError, match="has 5 accounts: --force"):
        await restore.restore(settings_for(empty_url, tmp_path), file, False, False)
    await sql.execute("update _yoyo_migration set migration_id = '9998_newer'"
                      " where migration_id like '0001%'")
    await backup.back_up(settings_for(database_url, tmp_path), tmp_path / "newer", False)
    with pytest.raises(StartError, match="newer messenger: of schema 9998"):
        await restore.restore(settings_for(empty_url, tmp_path), tmp_path / "newer", True, False)
    with pytest.raises(StartError, match="is of a newer messenger"):
        await verify.verify(settings_for(database_url, tmp_path), None)


async def test_commands_refuse_what_they_cannot_do(
    database_url: str, empty_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command says in one line why it cannot."""
    monkeypatch.setattr(databases, "PATIENCE_SECONDS", 0.0)
    nothing, own = settings_for("", tmp_path), settings_for(database_url, tmp_path)
    away = settings_for("postgresql://nobody@127.0.0.1:1/nothing", tmp_path)
    file = tmp_path / "file"
    for work, reason in (
        (backup.back_up(nothing, file, False), "there is no database in"),
        (backup.back_up(nothing, file, True), "there is no key"),
        (backup.back_up(own, tmp_path / "none" / "file", False), "cannot write"),
        (backup.back_up(settings_for(empty_url, tmp_path), file, False), "has no tables"),
        (backup.back_up(away, file, False), "DATABASE_URL: Connection refused"),
        (restore.restore(own, file, False, True), "SECRET_KEY is set"),
        (restore.restore(nothing, file, False, True), "there is no "),
        (move.move(own, empty_url), "DATABASE_URL is set"),
        (verify.verify(nothing, None), "there is no database in"),
        (verify.verify(settings_for(empty_url, tmp_path), None), "schema 0"),
    ):
        with pytest.raises(StartError) as raised:
            await work
        assert reason in str(raised.value)
        assert "\n" not in str(raised.value)
    with pytest.raises(StartError, match="pg_dump of PostgreSQL 99 or later is needed"):
        databases.find_programs(99, needs_tls=False)
    assert not file.exists()
