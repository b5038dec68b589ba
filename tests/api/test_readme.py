"""What the README shows is run as it stands there, against a server started as it says."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.servers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, holding: str) -> str:
    """Find the code block of a language that holds a text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    [found] = [block for block in blocks if holding in block]
    return str(found)


def environment(folder: Path) -> dict[str, str]:
    """Make the environment of a server whose data are in a folder."""
    made = os.environ | {"DATA_DIR": str(folder / "data"), "PORT": "0", "BCRYPT_COST": "4"}
    made.pop("DATABASE_URL", None)
    return made


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Start a server on a free port; the address that it prints."""
    command = [sys.executable, str(ROOT / "messenger.py")]
    with subprocess.Popen(
        command, env=environment(folder), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split("//")[1].strip()
        process.terminate()
        process.communicate(timeout=50)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Start a server on a free port; the address that it prints."""
    with served(tmp_path) as address:
        yield address


def test_what_the_readme_shows_works(address: str, tmp_path: Path) -> None:
    """The README's block of curl, pasted in order, and then its client print what they promise."""
    client = tmp_path / "client.py"
    client.write_text(block("python", "ws_connect").replace("localhost:8080", address))
    shell = block("sh", "API=").replace("localhost:8080", address)
    run_client = f"BEN=$BEN CHAT=$CHAT {sys.executable} {client}"
    assert "BEN=$BEN CHAT=$CHAT .venv/bin/python client.py" in README
    done = subprocess.run(
        ["sh", "-euc", f"{shell}\n{run_client}"], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert '"unread_count":1' in done.stdout
    assert '"seq":1,"reader_id"' in done.stdout
    heard = [line for line in done.stdout.splitlines() if line.startswith("{'type'")]
    for text in ("Hello, Ben!", "Hi, Ann!", "I am back."):
        assert sum(text in line for line in heard) == 1, f"{text} is heard once, in: {heard}"


def test_what_the_readme_says_of_backups_works(
    tmp_path: Path, empty_url: str
) -> None:
    """The README's commands that back up and verify, beside the server, that restore, without it,
    and that move to another PostgreSQL, where the server then is."""
    def follow(holding: str) -> str:
        text = block("sh", holding)
        text = text.replace("postgresql://messenger@db.example.com/messenger", empty_url)
        text = re.sub(r"^[.]/run$", "./run verify", text, flags=re.MULTILINE)
        text = text.replace("./run", f"{sys.executable} {ROOT / 'messenger.py'}")
        done = subprocess.run(
            ["sh", "-euc", text], capture_output=True, text=True, timeout=100, cwd=tmp_path,
            env=environment(tmp_path))
        assert done.returncode == 0, done.stderr
        return done.stdout

    with served(tmp_path):
        assert follow("./run backup").count("rules hold") == 2
    assert "is restored" in follow("./run restore")
    assert "moved; stop the server" in follow("./run move")
    assert (tmp_path / "messenger.backup.key").exists()
