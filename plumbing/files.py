"""Files that last: each is there whole or not at all, also after a power cut."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from plumbing.process import StartError

# Who may write into a folder may not read it, and some network file systems flush no folder.
NOT_FLUSHED = (errno.EACCES, errno.EINVAL)


def sync_folder(folder: Path) -> None:
    """Make what was created or renamed in a folder outlast a power cut, where that can be had.

    Raises OSError.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NOT_FLUSHED:
            raise


def is_there(path: Path) -> bool:
    """Tell whether there is a file or a folder. Raises StartError where we may not look."""
    try:
        return path.exists()
    except OSError as error:
        raise StartError(f"cannot read {path}: {error.strerror}") from None


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[int]:
    """Open what will take the place of a file, for us alone, once it is written and will last.

    Raises StartError, also where something else than a file has its name: root would replace
    /dev/null.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        if is_there(file) and not file.is_file():
            raise StartError(f"{file} is there already, and is no ordinary file")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            yield descriptor
            os.fsync(descriptor)
            partial.replace(file)
        finally:
            os.close(descriptor)
            partial.unlink(missing_ok=True)
        sync_folder(file.parent)
    except OSError as error:
        raise StartError(f"cannot write {file}: {error.strerror}") from None


def write_private(file: Path, text: str) -> None:
    """Write a file that only we can read, in the place of one there is. Raises StartError."""
    with (
        replacing(file) as descriptor,
        open(descriptor, "w", encoding="utf-8", closefd=False) as opened,
    ):
        opened.write(text)
