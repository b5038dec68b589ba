"""The checker's short run, half a minute of every kind of fault; `--prove` is part of .ci/run."""

import os
import re
import subprocess
import sys

import pytest

from support.servers import ROOT

SEED = 4
KINDS = 13  # of faults: each is done once before any is done again


@pytest.mark.timeout(420)  # it lasts half a minute, on a busy machine until it had its faults
def test_nothing_is_lost_while_everything_is_killed() -> None:
    """Clients that retry until they are answered end up with every message and change, each
    once."""
    command = [sys.executable, "-m", "torture"]
    options = ["--minutes", "0.5", "--faults", str(KINDS), "--seed", str(SEED)]
    done = subprocess.run(
        [*command, *options], env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True, text=True, timeout=400)
    print(done.stdout)  # with the seed, for pytest to show
    assert done.returncode == 0, done.stdout + done.stderr
    faults = re.search(r"(?m)^faults (\d+)", done.stdout)
    assert faults is not None
    assert int(faults[1]) >= KINDS
