"""The releases before this one, from the repository's own history."""

import subprocess
from pathlib import Path

import pytest

from support.servers import ROOT

LAST_RELEASE = "97f3782"  # a commit whose servers may still serve while this one's start
BEFORE_THAT = "9da4898"  # and an earlier one, with fewer migrations


def files_of(commit: str, folder: Path) -> Path:
    """Put the files of a release into a folder, and answer it; skip where there is no history."""
    command = ["git", "-C", str(ROOT), "archive", commit]
    try:
        packed = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no git to get an earlier release with")
    if packed.returncode:
        pytest.skip(f"the history has no commit {commit}: {packed.stderr.decode().strip()}")
    folder.mkdir(exist_ok=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed.stdout, check=True)
    return folder
