"""What is left after a power cut, on a disk of the test's own (which takes root)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.servers import ROOT

KEEPS_A_SECRET = """
import sys
from pathlib import Path
from plumbing.guard import kept_secret
from torture.disk import Disk, why_none
if reason := why_none():
    sys.exit(reason)
disk = Disk(Path("image"), Path("disk"), 16 << 20)
disk.mount()
before = kept_secret(disk.place / "secret_key")
disk.cut_power()
disk.unmount()
disk.mount()
print(kept_secret(disk.place / "secret_key") == before)
disk.unmount()
"""


def test_secret_key_outlasts_a_power_cut(tmp_path: Path) -> None:
    """The key that was made at the first start is the same after a power cut: nobody has to sign in
    again."""
    done = subprocess.run(
        [sys.executable, "-c", KEEPS_A_SECRET], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    if done.returncode == 1 and "Traceback" not in done.stderr:
        pytest.skip(f"no disk of one's own: {done.stderr.strip()}")
    assert done.stdout == "True\n", done.stderr
