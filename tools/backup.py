"""Writes a backup: `messenger.py backup FILE`, beside a running server or without one.

The backup is an archive of pg_dump, of one moment: everything that was acknowledged before it began
is in it. It holds every message, the hashes of passwords and the secrets of sessions. The key that
signs tokens is not in it; --with-key writes it beside it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import messenger as m
from plumbing import guard
from plumbing.files import is_there, write_private
from plumbing.process import StartError
from tools.databases import dump, opened, run

HELD = """\
{file} holds every message, the hashes of passwords and the secrets of sessions:
keep it as safe as the database. {key}"""
NO_KEY = "Without the key that signs tokens (--with-key), everybody signs in again."
KEY = "{file} holds the key that signs tokens: whoever has both is anybody."


def key_file(file: Path) -> Path:
    """Tell where the key of a backup is."""
    return file.with_name(f"{file.name}.key")


def signing_key(settings: m.Settings) -> str:
    """Find the key that signs tokens. Raises StartError."""
    kept = Path(settings.data_dir) / "secret_key"
    if not settings.secret_key and not is_there(kept):
        raise StartError(f"there is no key: {kept} is made when the server first starts")
    return settings.secret_key or guard.kept_secret(kept)


async def back_up(settings: m.Settings, file: Path, with_key: bool) -> int:
    """Write a backup, and the key beside it if wanted. Raises StartError."""
    key = signing_key(settings) if with_key else ""
    async with opened(settings) as place:
        if not await place.schema():
            raise StartError(f"{place.name} has no tables of a messenger")
        await dump(place, file)
    if key:
        write_private(key_file(file), key + "\n")
    print(HELD.format(file=file, key=KEY.format(file=key_file(file)) if key else NO_KEY))
    return 0


def main(line: Sequence[str]) -> int:
    """Obey the command line; answer the exit status."""
    parser = argparse.ArgumentParser(
        prog="./run backup", description="write a backup, beside a running server or without one")
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--with-key", action="store_true", help="write the key that signs tokens to FILE.key")
    given = parser.parse_args(line)
    return run(lambda settings: back_up(settings, given.file, given.with_key))
