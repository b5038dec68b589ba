"""The files of deploy/, docker-compose.yml and the README agree; `./run deploy-test` runs them."""

import contextlib
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deployment.__main__ import APART, contain, succeeds
from support.servers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DEPLOY = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "deploy").iterdir()}
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
CLOSED = {
    "    read_only: true", "    init: true", "    cap_drop: [ALL]",
    '    security_opt: ["no-new-privileges:true"]'}


def test_compose_is_closed_unless_it_is_told_otherwise() -> None:
    """No secret has a default, the one port is on loopback, and each container has a read-only
    root, no capability, a limit of memory, and an init that reaps."""
    [block] = re.findall(r"(?ms)^services:\n(.*?)^volumes:", COMPOSE)
    services = dict(re.findall(r"(?ms)^  (\w+):\n(.*?)(?=^  \w|\Z)", block))
    assert services.keys() == {"messenger", "postgres"}
    secrets = re.findall(r"\$\{(\w*(?:PASSWORD|KEY)\w*)(:[-?])", COMPOSE)
    assert secrets
    assert all(how == ":?" for _, how in secrets)
    assert COMPOSE.count("ports:") == 1
    [ports] = re.findall(r"(?m)^    ports:\n((?:      .*\n)+)", services["messenger"])
    assert re.findall("- (.*)", ports) == ['"${LISTEN:-127.0.0.1:8080}:8080"']
    for service in services.values():
        assert set(service.splitlines()) >= CLOSED
        assert "    mem_limit: " in service
        assert "cap_add" not in service
        assert "privileged:" not in service


def test_files_of_the_service_agree() -> None:
    """What install.sh puts where, the unit starts there; both proxies lead to the server's port,
    and the settings believe them."""
    unit, script, settings = (
        DEPLOY[name] for name in ("messenger.service", "install.sh", "messenger.env"))
    code = re.findall(r"(?m)^code=(\S+)", script)[0]
    assert f"ExecStart={code}/.venv/bin/python {code}/messenger.py\n" in unit
    assert "EnvironmentFile=/etc/messenger.env\n" in unit
    assert "StateDirectory=messenger\n" in unit
    assert "DATA_DIR=/var/lib/messenger\n" in settings
    assert "TRUSTED_PROXIES=127.0.0.1,::1\n" in settings
    for proxy in ("Caddyfile", "nginx.conf"):
        assert DEPLOY[proxy].count("127.0.0.1:8080") == 1
        assert "chat.example.com" in DEPLOY[proxy]
    [waits] = set(re.findall(r"proxy_(?:read|send)_timeout (\d+)s", DEPLOY["nginx.conf"]))
    assert int(waits) > 60
    assert "useradd" in script
    assert "User=messenger\n" in unit


def test_readme_names_what_there_is() -> None:
    """Each file of deploy/ that the README names is there, and it tells where things are."""
    [section] = re.findall(r"(?ms)^## On a server\n(.*?)^## ", README)
    named = set(re.findall(r"deploy/([\w.]+)", section))
    assert {"install.sh", "messenger.service", "Caddyfile", "nginx.conf"} <= named <= DEPLOY.keys()
    for place in ("/opt/messenger", "/etc/messenger.env", "/var/lib/messenger"):
        assert place in section
        assert place in DEPLOY["install.sh"] or place in DEPLOY["messenger.env"]
    assert "./run compose-env" in section
    assert "LISTEN=0.0.0.0:8080" in section


def test_readme_quotes_the_table_of_the_bench() -> None:
    """The rows of the README's table are those that `./run bench small` prints, in its order."""
    printed = re.findall(r'(?m)^        \(f?"([^"]+)",', (ROOT / "bench/small.py").read_text())
    [table] = re.findall(r"(?s)\| on a small machine \| \|\n\|---\|--:\|\n(.*?)\n\n", README)
    quoted = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()]
    assert len(quoted) == len(printed)
    for row, label in zip(quoted, printed, strict=True):
        pattern = re.sub(r"\\\{.*?\\\}", r"[\\d,]+", re.escape(label))
        assert re.fullmatch(pattern, row), row


needs_namespaces = pytest.mark.skipif(
    not succeeds(*APART, "true"), reason="no process namespaces here")


def orphan_of(test: str) -> list[str]:
    """Make the command that starts, in a session of its own, what never ends, and waits for it."""
    return [*APART, "sh", "-c", f"setsid sleep {test} & wait"]


def runs(test: str) -> bool:
    """Tell whether the orphan of a test runs."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes() == f"sleep\0{test}\0".encode():
                return True
    return False


def wait_until(running: bool, test: str) -> None:
    """Wait until the orphan of a test runs, or is gone."""
    deadline = time.monotonic() + 30
    while runs(test) != running:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@needs_namespaces
def test_part_that_takes_too_long_leaves_nothing() -> None:
    """What a part of `./run deploy-test` started ends with it, in whatever session it is."""
    assert contain(orphan_of("34567.1"), 2) is None
    wait_until(False, "34567.1")


@needs_namespaces
def test_killed_deploy_test_leaves_nothing() -> None:
    """What a part started ends where `./run deploy-test` itself is killed."""
    started = f"from deployment.__main__ import contain; contain({orphan_of('34567.2')}, 60)"
    with subprocess.Popen([sys.executable, "-c", started], cwd=ROOT / "tests") as killed:
        wait_until(True, "34567.2")
        killed.kill()
    wait_until(False, "34567.2")
