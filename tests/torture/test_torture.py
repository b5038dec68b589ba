"""The checker's short runs: each kind of fault once; `--prove` is part of .ci/run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.servers import ROOT
from torture.faults import FAILOVERS, USUAL

SEED = 4
ENOUGH = "0.1"  # minutes; it goes on until there were so many faults
DONE_SECONDS = 400


def torture(folder: Path, *options: str) -> str:
    """Run the checker, which finds nothing, in a folder; answer what it says."""
    path = f"{ROOT}:{ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, "-m", "torture", *options, "--seed", str(SEED)], capture_output=True,
        env=os.environ | {"PYTHONPATH": path, "TMPDIR": str(folder)}, text=True,
        timeout=DONE_SECONDS)
    print(done.stdout)  # with the seed, for pytest to show
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(DONE_SECONDS + 20)  # it lasts a minute, on a busy machine longer
def test_nothing_is_lost_while_everything_is_killed(tmp_path: Path) -> None:
    """Clients that retry until they are answered end up with every message and change, each once;
    what a copy of the database does not have that is put in its place, they learn of."""
    with_disk = len(USUAL) + 1  # which is full once, where there can be one
    said = torture(tmp_path, "--minutes", ENOUGH, "--faults", str(with_disk))
    faults = re.search(r"(?m)^faults \d+: .*$", said)
    assert faults is not None
    assert [kind for kind in USUAL if f"{kind} " not in faults[0]] == []


@pytest.mark.timeout(DONE_SECONDS + 20)  # it lasts half a minute
def test_nothing_is_lost_with_a_primary_whose_standby_is_promoted(tmp_path: Path) -> None:
    """What was acknowledged is there when a standby in step takes over; what one that is behind
    does not have, every client is told of; and a page tells so."""
    page = tmp_path / "page.md"
    said = torture(
        tmp_path, "--failover", "--minutes", ENOUGH, "--faults", str(len(FAILOVERS)),
        "--report", str(page))
    assert "lost 0  doubled 0  missed 0  misordered 0  leaked 0  fooled 0  wrong 0" in said
    assert "| failover | 0 | 0 | 0 | 0 | 0 | 0 | 0 |" in page.read_text()
    assert [kind for kind in FAILOVERS if f"failover: {kind} |" not in page.read_text()] == []
