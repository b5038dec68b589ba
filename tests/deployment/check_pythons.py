"""Each Python that is supported: `./run` with those that are here, the lock resolved for all, on
both architectures that there are wheels for."""

import os
import re
import shutil
from pathlib import Path

import pytest

from support.debian import TREE, does, running, until
from support.servers import ROOT

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28")
pytestmark = pytest.mark.timeout(600)


def interpreter(version: str) -> str | None:
    """Find a Python of a version, on the way or among pyenv's."""
    kept = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python"))
    return shutil.which(f"/usr/bin/python{version}") or (str(kept[-1]) if kept else None)


@pytest.mark.parametrize("version", PYTHONS)
def test_run_serves_with_python(version: str, scratch: Path) -> None:
    """`./run` makes its .venv of the Python that is named, and serves."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    folder = scratch / version
    folder.mkdir()
    for name in TREE:
        does("cp", "-r", ROOT / name, folder)
    log = folder / "log"
    environment = {"PATH": os.environ["PATH"], "PYTHON": python, "PORT": "0"}
    with running(folder / "run", log=log, env=environment):
        said = until(lambda: "next" in log.read_text() and log.read_text(), 400, log.read_text)
        url = re.findall(r"http://\S+", said)[0]
        assert does("curl", "-sSf", f"{url}/api/v1/health/readiness") == '{"status":"ready"}\n'
    assert f"Python {version}." in does(folder / ".venv/bin/python", "--version")


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("version", PYTHONS)
def test_lock_resolves_to_wheels(version: str, platform: str, scratch: Path) -> None:
    """Every package of the lock has a wheel of the hash that the lock names: nothing is compiled.
    Only resolved: nothing runs here."""
    uv = os.environ.get("UV", "uv")
    if shutil.which(uv) is None:
        pytest.skip("no uv: ./run deploy-test fetches it")
    told = does(
        uv, "pip", "install", "--dry-run", "--target", scratch / "target", "--python-version",
        version, "--python-platform", platform, "--only-binary", ":all:", "--require-hashes",
        "-r", ROOT / "requirements.txt", seconds=200)
    assert "aiohttp==" in told
