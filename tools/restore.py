"""Restores a backup: `messenger.py restore FILE`, while no server runs.

It goes into a new database of the same PostgreSQL, where it is verified; only then the two change
names. A database that had accounts stays, as ..._before, until the next restore. Where one's own
PostgreSQL does not let the role make databases, the backup goes into the one that is named, if that
has no tables.
"""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

import messenger as m
from plumbing import guard
from plumbing.files import is_there, write_private
from plumbing.process import StartError
from tools.backup import key_file
from tools.databases import Place, connected, load, opened, require_backup, run, run_program
from tools.verify import examine_place

SELECT_STATE = """
    select (select count(*) from pg_stat_activity
            where datname = current_database() and backend_type = 'client backend'
              and pid <> pg_backend_pid()) as others,
           to_regclass('public.users') is not null as has_users,
           (select r.rolsuper or (r.rolcreatedb and pg_has_role(d.datdba, 'usage'))
            from pg_roles r, pg_database d
            where r.rolname = current_user and d.datname = current_database()) as may_create"""
SELECT_ACCOUNTS = "select count(*) from users"
NAME_DATABASES = """
    select set_config('messenger.present', $1, false), set_config('messenger.fresh', $2, false),
           set_config('messenger.kept', $3, false)"""
SWAP_DATABASES = """
    do $$ begin
        execute format('alter database %I rename to %I', current_setting('messenger.present'),
                       current_setting('messenger.kept'));
        execute format('alter database %I rename to %I', current_setting('messenger.fresh'),
                       current_setting('messenger.present'));
    end $$"""
DATABASE_BYTES_MAX = 50  # of a name, so that what is added fits: PostgreSQL cuts it at 63


async def restore(settings: m.Settings, file: Path, force: bool, with_key: bool) -> int:
    """Put a backup in the place of the database, once it is verified. Raises StartError."""
    key = read_key(settings, file) if with_key else ""
    await require_backup(file)
    async with opened(settings, alone=True, may_make=True) as place:
        accounts, may_create = await look_at(place)
        if accounts and not force:
            raise StartError(
                f"{place.name} has {accounts:,} accounts: --force puts the backup in its place")
        if may_create:
            await replace_database(place, file, keeps=bool(accounts))
        elif await place.tables():
            raise StartError(
                f"{place.name}: the role may not make databases (createdb), and this one has"
                " tables: empty it, or let the role")
        else:
            await load_verified(place, file)
    if key:
        keep_key(Path(settings.data_dir) / "secret_key", key)
    print(f"{file} is restored: start the server")
    return 0


async def look_at(place: Place) -> tuple[int, bool]:
    """Tell how many accounts a database has, and whether databases can be made beside it.

    Raises StartError where somebody uses it.
    """
    async with connected(place) as connection:
        state = await connection.fetchrow(SELECT_STATE)
        if state["others"]:
            raise StartError(
                f"{place.name} has {state['others']} other sessions: stop the servers first")
        accounts = await connection.fetchval(SELECT_ACCOUNTS) if state["has_users"] else 0
    return accounts, state["may_create"]


async def load_verified(place: Place, file: Path) -> None:
    """Put a backup into a database without tables, and verify it. Raises StartError."""
    await load(place, file)
    findings = await examine_place(place)
    findings.tell()
    if findings.broken:
        raise StartError(f"{file} breaks the rules above")


async def replace_database(place: Place, file: Path, keeps: bool) -> None:
    """Put a backup into a new database, and let it change names with the one there is.

    Raises StartError, with the one there is in its place.
    """
    present = place.database
    stem = present.encode()[:DATABASE_BYTES_MAX].decode(errors="ignore")
    fresh, kept = f"{stem}_restored", f"{stem}_before"
    if present in (fresh, kept):
        raise StartError(f"the database is called {present}, as a restore would call another")
    outside = place.beside("template1")
    await drop(outside, fresh)
    try:
        await run_program(
            outside, "createdb", "maintenance-db", "--template=template0", "--encoding=UTF8", fresh)
        await load_verified(place.beside(fresh), file)
        await drop(outside, kept)
        async with connected(outside) as connection:
            await connection.fetch(NAME_DATABASES, present, fresh, kept)
            await connection.execute(SWAP_DATABASES)
    except BaseException:
        with contextlib.suppress(StartError):
            await drop(outside, fresh)
        raise
    if keeps:
        print(f"what was there before is kept as the database {kept}, until the next restore")
    else:
        await drop(outside, kept)


async def drop(outside: Place, database: str) -> None:
    """Drop a database, if there is one of this name. Raises StartError."""
    await run_program(outside, "dropdb", "maintenance-db", "--if-exists", "--force", database)


def read_key(settings: m.Settings, file: Path) -> str:
    """Read the key of a backup. Raises StartError where there is none, or it would not count."""
    if settings.secret_key:
        raise StartError("--with-key: SECRET_KEY is set, and is the key that counts")
    if not is_there(key_file(file)):
        raise StartError(f"--with-key: there is no {key_file(file)}")
    return guard.kept_secret(key_file(file))


def keep_key(file: Path, key: str) -> None:
    """Let a key sign tokens; one that did before is kept beside it. Raises StartError."""
    if file.exists() and guard.kept_secret(file) != key:
        write_private(file.with_name("secret_key.before"), guard.kept_secret(file))
    write_private(file, key)


def main(line: Sequence[str]) -> int:
    """Obey the command line; answer the exit status."""
    parser = argparse.ArgumentParser(
        prog="./run restore", description="put a backup in the place of the database")
    parser.add_argument("file", type=Path)
    parser.add_argument("--force", action="store_true", help="also where there are accounts")
    parser.add_argument(
        "--with-key", action="store_true", help="take the key that signs tokens from FILE.key")
    given = parser.parse_args(line)
    return run(lambda settings: restore(settings, given.file, given.force, given.with_key))
