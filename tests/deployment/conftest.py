"""What the checks of deploy/ share: a Debian made once, and folders that go with the run."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.debian import Debian


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A folder that is empty at first, and gone afterwards: even where pytest is killed, since
    deploy-test's own is around it."""
    around = os.environ.get("DEPLOY_FOLDER")
    with tempfile.TemporaryDirectory(prefix="messenger-deploy-", dir=around) as folder:
        yield Path(folder)
        for mounted in re.findall(rf" ({folder}/\S+) ", Path("/proc/self/mounts").read_text()):
            subprocess.run(["umount", mounted], timeout=60)  # what a daemon may have left


@pytest.fixture(scope="session")
def debian(scratch: Path) -> Debian:
    """A Debian with the Python of Debian, to be copied."""
    if shutil.which("debootstrap") is None:
        pytest.skip("no debootstrap: ./run deploy-test installs it")
    return Debian.make(scratch / "debian")
