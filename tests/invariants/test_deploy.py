"""The files of deploy/, docker-compose.yml and the README agree; `./run deploy-test` runs them."""

import re

import yaml

from support.servers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DEPLOY = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "deploy").iterdir()}
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")


def test_compose_is_closed_unless_it_is_told_otherwise() -> None:
    """No secret has a default, the one port is on loopback, and each container has a read-only
    root, no capability, a limit of memory, and an init that reaps."""
    services = yaml.safe_load(COMPOSE)["services"]
    secrets = re.findall(r"\$\{(\w*(?:PASSWORD|KEY)\w*)(:[-?])", COMPOSE)
    assert secrets
    assert all(how == ":?" for _, how in secrets)
    assert services["messenger"]["ports"] == ["${LISTEN:-127.0.0.1:8080}:8080"]
    assert "ports" not in services["postgres"]
    for service in services.values():
        assert service["read_only"] is service["init"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["mem_limit"]
        assert "cap_add" not in service
        assert "privileged" not in service


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
