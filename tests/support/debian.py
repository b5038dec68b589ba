"""A Debian of the tests' own, made by debootstrap, and programs that are ended by their pid."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from support.servers import ROOT

SUITE = "bookworm"
END_SECONDS = 20
LOOK_SECONDS = 0.2
# What lets this machine reach its packages; a machine elsewhere has none of these and needs none.
OURS = ("/etc/resolv.conf", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")
TREE = ("run", "messenger.py", "requirements.txt", "plumbing", "sql", "tools", "web", "deploy")


class Failed(AssertionError):
    """A command that did not do what it was for."""


def does(*command: Any, seconds: float = 60, **options: Any) -> str:
    """Run a command; answer what it wrote. Raises Failed unless it succeeds in time."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", timeout=seconds, **options)
    except (subprocess.TimeoutExpired, OSError) as error:
        raise Failed(f"{' '.join(words)}: {error}") from None
    if done.returncode:
        raise Failed(f"{' '.join(words)}: {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout


@contextlib.contextmanager
def running(
    *command: Any, log: Path, signal_number: signal.Signals = signal.SIGTERM, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program beside; end it, and what is left of its group, afterwards."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=output,
            stderr=output, start_new_session=True, **options)
    try:
        yield process
    finally:
        process.send_signal(signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(END_SECONDS)


def until(condition: Callable[[], Any], seconds: float, told: Callable[[], str] = str) -> Any:
    """Wait until a condition holds, and answer what it answers. Raises Failed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(Failed, OSError):
            if found := condition():
                return found
        time.sleep(LOOK_SECONDS)
    raise Failed(f"not within {seconds:.0f} s\n{told()[-3000:]}")


class Debian:
    """A root folder with Debian in it, which shares this machine's network and nothing else."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def make(cls, root: Path) -> "Debian":
        """Make a minimal one. Raises Failed."""
        does("debootstrap", "--variant=minbase", SUITE, root, seconds=300)
        made = cls(root)
        made.file("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", mode=0o755)  # starts nothing
        made.file("/etc/hosts", "127.0.0.1 localhost\n")
        made.installs("ca-certificates")
        return made

    def copy(self, root: Path) -> "Debian":
        """Make another like this one."""
        does("cp", "-a", self.root, root, seconds=120)
        return Debian(root)

    def resembles(self) -> None:
        """Let it reach its packages as this machine does."""
        for name in filter(os.path.exists, OURS):
            self.path(name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(os.path.realpath(name), self.path(name))

    def path(self, name: str) -> Path:
        """Tell where a file of it is for us."""
        return self.root / name.lstrip("/")

    def file(self, name: str, text: str, mode: int = 0o644) -> None:
        """Write a file."""
        self.path(name).write_text(text)
        self.path(name).chmod(mode)

    def command(self, *command: Any) -> list[Any]:
        """Make the command that runs one inside: with its own processes, which end with it."""
        return [
            "unshare", "--mount", "--pid", "--fork", "--kill-child",
            f"--mount-proc={self.root}/proc", "chroot", self.root,
            "/usr/bin/env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root",
            "DEBIAN_FRONTEND=noninteractive", *command]

    def does(self, *command: Any, seconds: float = 60) -> str:
        """Run a command inside; answer what it wrote. Raises Failed."""
        return does(*self.command(*command), seconds=seconds)

    def installs(self, *packages: str) -> None:
        """Install packages. Raises Failed."""
        self.resembles()
        self.does("apt-get", "update", "-qq", seconds=120)
        self.does("apt-get", "install", "-qq", "-y", "--no-install-recommends", *packages,
                  seconds=300)
        self.resembles()  # in place of what a package brought

    def takes_tree(self, place: str, owner: str = "root") -> None:
        """Put a copy of this repository into it."""
        folder = self.path(place)
        folder.mkdir(parents=True)
        for name in TREE:
            does("cp", "-r", ROOT / name, folder)
        self.does("chown", "-R", f"{owner}:", place)
