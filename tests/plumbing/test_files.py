"""Files that are there whole or not at all; tests/processes/test_power.py cuts the power."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from plumbing.files import is_there, write_private
from plumbing.guard import kept_secret
from plumbing.process import StartError

NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of nobody's, whose way there everybody may go."""
    made = Path(tempfile.mkdtemp(dir="/tmp"))
    os.chown(made, NOBODY, NOBODY)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def nobody() -> Iterator[None]:
    """Be nobody for the time: root may do what others may not."""
    os.seteuid(NOBODY)
    yield
    os.seteuid(0)


def test_file_is_private_and_nothing_else_is_left(tmp_path: Path) -> None:
    """What is written takes the place of what was there, for its owner alone."""
    file = tmp_path / "file"
    file.write_text("before")
    file.chmod(0o644)
    write_private(file, "größer")
    assert file.read_text("utf-8") == "größer"
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("before", [None, "before"])
def test_file_that_is_not_whole_replaces_nothing(tmp_path: Path, before: str | None) -> None:
    """Where the writing fails, all is as it was: the last character has no UTF-8."""
    file = tmp_path / "file"
    if before is not None:
        file.write_text(before)
    with pytest.raises(UnicodeEncodeError):
        write_private(file, "half" * 100_000 + "\ud800")
    assert [path.read_text() for path in tmp_path.iterdir()] == [before] * (before is not None)


def test_failure_is_one_line(tmp_path: Path) -> None:
    """A file that cannot be written says so."""
    with pytest.raises(StartError, match=r"^cannot write .*/none/file: No such file or directory$"):
        write_private(tmp_path / "none/file", "text")


def test_what_is_in_the_way_is_not_removed(tmp_path: Path) -> None:
    """Where somebody was there before with the name that a file has until it is whole, we say so
    and leave theirs alone: in a folder of everybody's we might not even remove it.
    """
    squatted = tmp_path / f".file.{os.getpid()}.partial"
    squatted.mkdir()
    with pytest.raises(StartError, match=r"^cannot write .*/file: File exists$"):
        write_private(tmp_path / "file", "text")
    assert list(tmp_path.iterdir()) == [squatted]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_folder_that_cannot_be_read_takes_files(folder: Path, nobody: None) -> None:
    """Who may write into a folder and not read it, and so not flush it, can put a file there."""
    folder.chmod(0o300)
    write_private(folder / "file", "text")
    assert (folder / "file").read_text() == "text"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_what_we_may_not_see_is_one_line(folder: Path, nobody: None) -> None:
    """In a folder that we may not enter a file can be neither looked for, nor written, nor read."""
    file = folder / "file"
    file.write_text("x" * 40)
    file.chmod(0)
    with pytest.raises(StartError, match=r"^cannot read .*/file: Permission denied$"):
        kept_secret(file)
    folder.chmod(0)
    for fails in (is_there, kept_secret, lambda file: write_private(file, "text")):
        with pytest.raises(StartError, match=r"^cannot read .*/file: Permission denied$"):
            fails(file)
