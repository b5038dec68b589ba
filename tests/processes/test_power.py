"""What is left after a power cut, on a disk of the test's own (which takes root)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.servers import ROOT

CUT_OFF = """
import os, shutil, subprocess, sys
from pathlib import Path
from plumbing import guard
from tools import backup, databases
from torture.disk import Disk, why_none
if reason := why_none():
    sys.exit(reason)
disk = Disk(Path("image"), Path("disk"), 16 << 20)
disk.mount()
file = disk.place / "file"
os.sync()
{work}
written = file.read_text()
disk.cut_power()
disk.unmount()
disk.mount()
print(file.read_text() == written if file.exists() else "it is gone")
disk.unmount()
"""
WORKS = {
    "secret key": "guard.kept_secret(file)",
    "key of a backup": "backup.write_private(file, 'the key')",
    "backup in the place of another": """
file.write_text("before")
os.sync()
with databases.replacing(file) as descriptor:
    os.write(descriptor, b"after")
""",
    "secrets of Compose": f"""
shutil.copy("{ROOT / 'run'}", disk.place)
os.sync()
subprocess.run([disk.place / "run", "compose-env"], check=True, capture_output=True)
file = disk.place / ".env"
""",
}


@pytest.mark.parametrize("work", WORKS)
def test_file_outlasts_a_power_cut(tmp_path: Path, work: str) -> None:
    """What nobody could make again is there after a power cut as it was written: with another key
    everybody would have to sign in again, and with another password Compose's database is lost."""
    done = subprocess.run(
        [sys.executable, "-c", CUT_OFF.format(work=WORKS[work])], cwd=tmp_path,
        capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    if done.returncode == 1 and "Traceback" not in done.stderr:
        pytest.skip(f"no disk of one's own: {done.stderr.strip()}")
    assert done.stdout == "True\n", done.stderr
