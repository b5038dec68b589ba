"""deploy/install.sh in a Debian of its own, and the service that it makes under a real systemd.

systemd runs in a container (systemd-nspawn) on that Debian's files, never on this machine's.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.debian import Debian, Failed, does, running, until
from support.servers import ROOT

DOMAIN = "chat.example.com"
SOURCE = "/root/messenger"
BOOT_SECONDS = 90
EXPOSURE_MAX = 20  # of systemd-analyze security, in tenths: 100 is a service without any guard
ANN = '{"email": "ann@example.com", "username": "ann", "password": "correct horse"}'
README = (ROOT / "README.md").read_text(encoding="utf-8")
ADMINISTRATION = (ROOT / "docs/administration.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def machine(debian: Debian, scratch: Path) -> Debian:
    """A fresh Debian as a provider hands it out, with systemd, on which install.sh was run."""
    made = debian.copy(scratch / "machine")
    made.installs("systemd", "systemd-sysv", "dbus")
    made.takes_tree(SOURCE)
    made.file("/etc/hosts", f"127.0.0.1 localhost {DOMAIN}\n")
    said = made.does("sh", f"{SOURCE}/deploy/install.sh", DOMAIN, seconds=400)
    assert f"https://{DOMAIN}" in said.splitlines()[-1]
    return made


def test_install_script_needs_no_caddy(debian: Debian, scratch: Path) -> None:
    """Where somebody has a proxy of their own, Caddy is neither installed nor set up."""
    made = debian.copy(scratch / "without")
    made.installs("systemd", "systemd-sysv", "dbus")
    made.takes_tree(SOURCE)
    said = made.does("sh", f"{SOURCE}/deploy/install.sh", "--no-caddy", seconds=400)
    assert "127.0.0.1:8080" in said.splitlines()[-1]
    assert not made.path("/etc/caddy").exists()
    assert made.does("systemctl", "is-enabled", "messenger").strip() == "enabled"


def test_install_script_does_what_it_says(machine: Debian) -> None:
    """The code is root's, the settings are nobody else's to read, the service is enabled, and Caddy
    has the domain; `systemd-analyze` finds nothing wrong with the unit and little that it may do.
    """
    assert machine.path("/opt/messenger/messenger.py").stat().st_uid == 0
    assert machine.path("/etc/messenger.env").stat().st_mode & 0o777 == 0o600
    assert machine.does("systemctl", "is-enabled", "messenger").strip() == "enabled"
    assert machine.path("/etc/caddy/Caddyfile").read_text().count(f"{DOMAIN} {{") == 1
    machine.does("caddy", "validate", "--adapter", "caddyfile", "--config", "/etc/caddy/Caddyfile")
    units = "/etc/systemd/system"
    for name in ("messenger.service", "messenger-backup.service", "messenger-backup.timer"):
        assert machine.does(
            "systemd-analyze", "verify", "--man=no", f"{units}/{name}").strip() == ""
    unit = f"{units}/messenger.service"
    told = machine.does(
        "systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE_MAX}", unit)
    print(told.splitlines()[-1])


def test_install_script_may_run_again(machine: Debian) -> None:
    """It leaves the settings and Caddy's file as they are, and refuses what is no host's name."""
    before = {}
    for name in ("/etc/messenger.env", "/etc/caddy/Caddyfile"):
        machine.path(name).write_text(machine.path(name).read_text() + "# mine\n")
        before[name] = machine.path(name).read_text()
    machine.path(f"{SOURCE}/web/new.txt").write_text("new")
    machine.path("/etc/messenger.env").chmod(0o644)
    said = machine.does("sh", f"{SOURCE}/deploy/install.sh", "other.example.com", seconds=200)
    assert "where other.example.com is none" in said.splitlines()[-1]
    assert {name: machine.path(name).read_text() for name in before} == before
    assert machine.path("/etc/messenger.env").stat().st_mode & 0o777 == 0o600
    assert machine.path("/opt/messenger/web/new.txt").exists()
    for wrong in ("", "a/b", "a b", "$(id)", "-x"):
        with pytest.raises(Failed, match="is not the name of a host"):
            machine.does("sh", f"{SOURCE}/deploy/install.sh", wrong)


@pytest.fixture(scope="module")
def home(debian: Debian, scratch: Path) -> Debian:
    """A Debian with a copy of the repository in the home of a plain user."""
    made = debian.copy(scratch / "home")
    made.installs("python3")
    made.does("useradd", "--create-home", "ann")
    made.takes_tree("/home/ann/messenger", owner="ann")
    return made


def test_plain_user_runs_it(home: Debian, scratch: Path) -> None:
    """`./run` of a plain user says in a line what root has to install; then it makes what it needs
    and serves."""
    start = home.command("runuser", "-u", "ann", "--", "env", "PORT=0", "/home/ann/messenger/run")
    with pytest.raises(Failed, match="sudo apt-get install -y python3-venv\n"):
        does(*start)
    home.installs("python3-venv")
    log = scratch / "plain.log"
    with running(*start, log=log) as process:
        said = until(lambda: "next" in log.read_text() and log.read_text(), 300, log.read_text)
        assert ready(re.findall(r"http://\S+", said)[0])
        [pid] = server_pids(process.pid)
        assert os.stat(f"/proc/{pid}").st_uid == home.path("/home/ann").stat().st_uid


def test_root_runs_it(home: Debian, scratch: Path) -> None:
    """`./run` of root serves, with its PostgreSQL in a user namespace, since that refuses root."""
    home.does("cp", "-a", "/home/ann/messenger", "/root/messenger", seconds=120)
    home.does("rm", "-rf", "/root/messenger/data")
    # Not in a chroot, where the kernel makes no user namespace.
    command = [
        "systemd-nspawn", "--quiet", f"--directory={home.root}", "--register=no", "--keep-unit",
        "--console=pipe", "--machine=messenger-root", "--resolv-conf=off", "--as-pid2",
        "env", "PORT=0", "/root/messenger/run"]
    log = scratch / "root.log"
    with running(*command, log=log):
        said = until(lambda: "next" in log.read_text() and log.read_text(), 300, log.read_text)
        assert ready(re.findall(r"http://\S+", said)[0])


def ready(url: str, *curl: str) -> bool:
    """Tell whether the server is ready."""
    path = f"{url}/api/v1/health/readiness"
    return json.loads(does(*curl, "curl", "-sSfk", path)) == {"status": "ready"}


def server_pids(parent: int) -> list[int]:
    """Find the messengers below a process."""
    found = []
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        command = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        named = b"python" in command[0] and any(b"messenger.py" in word for word in command)
        found += [int(child)] if named else server_pids(int(child))
    return found


class Booted:
    """The machine with its systemd running, in a container without a network but its own."""

    def __init__(self, leader: int) -> None:
        self.leader = leader
        self.network = ("nsenter", f"--target={leader}", "--net")

    def does(self, *command: str, seconds: float = 60) -> str:
        """Run a command inside. Raises Failed."""
        return does("nsenter", f"--target={self.leader}", "--all", *command, seconds=seconds)

    def asks(self, *curl: str) -> str:
        """Ask Caddy, as one who has the certificate's word taken for granted."""
        return does(*self.network, "curl", "-sSfk", "--resolve", f"{DOMAIN}:443:127.0.0.1", *curl)

    def main_pid(self) -> int:
        """Tell the service's main process, by its number inside."""
        return int(self.does("systemctl", "show", "--value", "-p", "MainPID", "messenger"))

    def is_ready(self) -> bool:
        """Tell whether the server is ready."""
        return ready("http://localhost:8080", *self.network)


@pytest.fixture(scope="module")
def booted(machine: Debian, scratch: Path) -> Iterator[Booted]:
    """The machine, booted."""
    if shutil.which("systemd-nspawn") is None:
        pytest.skip("no systemd-nspawn: ./run deploy-test installs it")
    site = machine.path("/etc/caddy/Caddyfile")
    site.write_text("{\n\tlocal_certs\n\tskip_install_trust\n}\n" + site.read_text())
    log = scratch / "boot.log"
    command = [
        "systemd-nspawn", "--quiet", f"--directory={machine.root}", "--boot", "--private-network",
        "--machine=messenger-deploy", "--register=no", "--keep-unit", "--console=pipe",
        "--resolv-conf=off"]
    # SIGTERM lets it shut down.
    with running(*command, log=log) as process:
        try:
            leader = until(lambda: init_of(process), 20, log.read_text)
        except Failed as error:
            pytest.skip(f"systemd-nspawn does not boot here: {str(error)[-300:]}")
        made = Booted(leader)
        until(made.is_ready, BOOT_SECONDS,
              lambda: made.does("journalctl", "--no-pager", "-n", "40"))
        yield made


def init_of(process: "subprocess.Popen[bytes]") -> int:
    """Find the first process in a container. Raises Failed if the container has ended."""
    if process.poll() is not None:
        raise AssertionError("systemd-nspawn has ended")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next((int(child) for child in children if is_init(int(child))), 0)


def is_init(pid: int) -> bool:
    """Tell whether a process is the first of its namespace, and systemd by now."""
    status = Path(f"/proc/{pid}/status").read_text()
    own = re.search(r"NSpid:\s+(.*)", status)
    return bool(own) and own[1].split()[-1] == "1" and "systemd\n" in status.split("Name:\t")[1]


def test_service_serves_over_tls(booted: Booted) -> None:
    """Caddy and the service come up with the machine; the page and the API are there by https."""
    until(lambda: "<html" in booted.asks(f"https://{DOMAIN}/"), BOOT_SECONDS)
    told = booted.asks(f"https://{DOMAIN}/api/v1/users", "-d", ANN)
    assert json.loads(told)["username"] == "ann"
    assert booted.does("systemctl", "--failed", "--no-legend").strip() == ""


def test_service_has_its_limits_and_its_user(booted: Booted) -> None:
    """It runs as its own user, with as many descriptors as the unit says, and no capability."""
    pid = booted.main_pid()
    status = booted.does("cat", f"/proc/{pid}/status")
    user = booted.does("id", "-u", "messenger").strip()
    assert re.search(r"Uid:\s+(\d+)", status)[1] == user  # type: ignore[index]
    assert re.search(r"CapBnd:\s+(\w+)", status)[1] == "0" * 16  # type: ignore[index]
    assert re.search(r"NoNewPrivs:\s+1", status)
    files, allowed = (
        re.findall(r"Max open files +(\d+) +(\d+)", booted.does("cat", f"/proc/{number}/limits"))
        for number in (pid, 1))
    least = min(262_144, int(allowed[0][1]))  # the container's own bound, where it is lower
    assert files == [(str(least), str(least))]
    assert booted.does("stat", "-c", "%U %a", "/var/lib/messenger").split() == ["messenger", "700"]


def test_readme_administers_the_service(booted: Booted) -> None:
    """The README's line for an administrator of the service lists its accounts."""
    [line] = re.findall(r"(?m)^sudo (systemd-run .* /opt/messenger/run user) list", README)
    assert "ann@example.com" in booted.does(*line.split(), "list")


def test_nightly_backup_is_made(booted: Booted) -> None:
    """The timer that docs/administration.md has enabled waits for the night; its service makes a
    backup of the day, with its key, which ./run verify accepts, and a failure is seen."""
    [enable] = re.findall(r"(?m)^sudo (systemctl enable --now messenger-backup.timer)$",
                          ADMINISTRATION)
    booted.does(*enable.split())
    assert "messenger-backup.service" in booted.does("systemctl", "list-timers", "--no-legend")
    booted.does("systemctl", "start", "messenger-backup")
    file = f"/var/lib/messenger/messenger-{booted.does('date', '+%u').strip()}.backup"
    assert booted.does("ls", file, f"{file}.key").split() == [file, f"{file}.key"]
    [command] = re.findall(r"(?m)^sudo (systemd-run .* /opt/messenger/run) user list", README)
    booted.does(*command.split(), "verify", file, seconds=120)
    booted.does("sh", "-c", f"rm {file} && mkdir {file}")
    with pytest.raises(Failed):
        booted.does("systemctl", "start", "messenger-backup")
    assert "messenger-backup" in booted.does("systemctl", "--failed", "--no-legend")
    booted.does("rmdir", file)
    booted.does("systemctl", "reset-failed")


def test_install_script_lets_a_stopped_server_be(booted: Booted) -> None:
    """Whoever stopped the server, to restore a backup into another release, starts it again."""
    booted.does("systemctl", "stop", "messenger")
    install = ("sh", f"{SOURCE}/deploy/install.sh", "--no-caddy")
    said = booted.does(*install, seconds=200)
    assert "stays stopped" in said.splitlines()[-1]
    assert booted.main_pid() == 0
    booted.does("systemctl", "start", "messenger")
    until(booted.is_ready, BOOT_SECONDS)
    booted.does(*install, seconds=200)
    until(booted.is_ready, BOOT_SECONDS)


def test_service_comes_back_and_stops(booted: Booted) -> None:
    """After `kill -9` it is back with what it had; stopped, it leaves no process and no failure."""
    before = booted.main_pid()
    booted.does("systemctl", "kill", "--signal=KILL", "--kill-who=main", "messenger")
    until(lambda: booted.main_pid() not in (0, before) and booted.is_ready(), BOOT_SECONDS)
    body = '{"email": "ann@example.com", "password": "correct horse"}'
    until(lambda: booted.asks(f"https://{DOMAIN}/api/v1/users/login", "-d", body), 20)
    booted.does("systemctl", "stop", "messenger")
    assert "Result=success" in booted.does("systemctl", "show", "messenger", "-p", "Result")
    assert "postgres" not in booted.does("sh", "-c", "cat /proc/[0-9]*/comm")
    booted.does("systemctl", "start", "messenger")
    until(booted.is_ready, BOOT_SECONDS)


def test_uninstalling_leaves_nothing(booted: Booted) -> None:
    """The lines of docs/administration.md take away all that the script installed."""
    [lines] = re.findall(r"## Uninstall\n.*?```sh\n(.*?)```", ADMINISTRATION, re.DOTALL)
    booted.does("sh", "-euc", lines.replace("sudo ", ""), seconds=120)
    booted.does("systemctl", "daemon-reload")
    places = "/opt/messenger /etc/messenger.env /var/lib/messenger /etc/caddy"
    assert booted.does("sh", "-c", f"ls -d {places} 2>&-; id -u messenger 2>&-; true") == ""
    assert "messenger" not in booted.does("systemctl", "list-unit-files", "--no-legend")
