"""The Dockerfile and docker-compose.yml by Docker itself, on a base image made by debootstrap.

The daemon is the tests' own, with its own data. It builds in this machine's network, from which the
packages come, and runs in a network namespace of its own, where it may make bridges. What it stands
on is a stand-in: Debian's Python for the image `python`, Debian's PostgreSQL for `postgres`.
Layers are mounted where the kernel can (overlay2), and copied where not (vfs).
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from support.debian import TREE, Debian, Failed, does, running, until
from support.pages import block
from support.servers import ROOT

READY_SECONDS = 90
ANN = '{"email": "ann@example.com", "username": "ann", "password": "correct horse"}'
LOGIN = '{"email": "ann@example.com", "password": "correct horse"}'
GUARDS = ("--read-only", "--tmpfs=/tmp", "--security-opt=no-new-privileges:true", "--memory=512m",
          "--init")
COMPOSE = "docker-compose"
# Debian's Compose is one of version 1, which has no `cp`, and asks for a terminal.
COMPOSE_OF_DEBIAN = f"""
docker() {{
    case "$1 $2" in
    'compose cp') docker cp "$({COMPOSE} ps -q messenger):${{3#messenger:}}" "$4" ;;
    'compose exec') shift 2 && {COMPOSE} exec -T "$@" ;;
    'compose '*) shift && {COMPOSE} "$@" ;;
    *) command docker "$@" ;;
    esac
}}
"""
ADMINISTRATION = "docs/administration.md"
BEN, LOGIN_OF_BEN = [each.replace("ann", "ben") for each in (ANN, LOGIN)]
# What the image `postgres` does at its first start, as its user.
POSTGRES = """#!/bin/sh
set -eu
if [ ! -e "$PGDATA/PG_VERSION" ]; then
    echo "$POSTGRES_PASSWORD" >/tmp/password
    initdb --username="$POSTGRES_USER" --pwfile=/tmp/password --auth=scram-sha-256 --encoding=UTF8
    echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
    echo "create database $POSTGRES_DB" | postgres --single postgres
fi
exec postgres -c listen_addresses='*'
"""
POSTGRES_FILE = """FROM standin
RUN apt-get update -qq && apt-get install -qq -y --no-install-recommends postgresql-15 >/dev/null \\
    && install --directory --owner=postgres --mode=1777 /var/lib/postgresql \\
    && install --directory --owner=postgres --mode=3777 /var/run/postgresql
ENV PATH=/usr/lib/postgresql/15/bin:/usr/bin:/bin PGDATA=/var/lib/postgresql/15/docker
COPY start.sh /start.sh
VOLUME /var/lib/postgresql
STOPSIGNAL SIGINT
CMD ["sh", "/start.sh"]
"""
# By the Python of Debian and its python3-yaml.
YAML_TO_JSON = "import json, sys, yaml; print(json.dumps(yaml.safe_load(open(sys.argv[1]))))"
pytestmark = pytest.mark.timeout(900)


class Docker:
    """A daemon of our own, and its client."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "DOCKER_HOST": f"unix://{folder}/socket", "DOCKER_BUILDKIT": "0",
            "DOCKER_CONFIG": str(folder / "config")}
        self.network: tuple[str, ...] = ()
        self.storage = "overlay2"

    @contextlib.contextmanager
    def started(self, *apart: str) -> Iterator["Docker"]:
        """Run the daemon. Raises Failed where it does not start."""
        log = self.folder / "log"
        options = [
            f"--storage-driver={self.storage}", *([] if apart else ["--bridge=none"]),
            "--iptables=false", "--ip6tables=false",
            f"--data-root={self.folder}/data", f"--exec-root={self.folder}/exec",
            f"--pidfile={self.folder}/pid", f"--host=unix://{self.folder}/socket"]
        with running(*apart, "dockerd", *options, log=log) as process:
            until(lambda: process.poll() or self.does("info"), 40, log.read_text)
            if process.poll() is not None:
                raise Failed(f"dockerd has ended\n{log.read_text()[-600:]}")
            self.network = ("nsenter", f"--target={process.pid}", "--net")
            yield self

    def does(self, *command: Any, seconds: float = 60) -> str:
        """Run a command of the client; answer what it wrote. Raises Failed."""
        return does("docker", *command, seconds=seconds, env=self.environment)

    def composes(self, folder: Path, *command: str, seconds: float = 60) -> str:
        """Run a command of Compose in a folder. Raises Failed."""
        return does(COMPOSE, *command, seconds=seconds, env=self.environment, cwd=folder)

    def follows(self, page: str, holding: str, folder: Path, seconds: float = 200) -> str:
        """Do what a block of a page shows, in a folder; answer what it wrote. Raises Failed."""
        text = block(page, "sh", holding)
        text = re.sub("(?m)^docker build .*", "", text)  # which takes a network: see `build`
        return does("sh", "-euc", f"{COMPOSE_OF_DEBIAN}{text}", seconds=seconds,
                    env=self.environment, cwd=folder)

    def asks(self, port: int, path: str, *curl: str) -> Any:
        """Ask a server in the daemon's network. Raises Failed."""
        url = f"http://127.0.0.1:{port}/api/v1{path}"
        return json.loads(does(*self.network, "curl", "-sSf", url, *curl))


@pytest.fixture(scope="module")
def docker(debian: Debian, scratch: Path) -> Iterator[Docker]:
    """Docker, with the images built and the network its own."""
    if shutil.which("dockerd") is None:
        pytest.skip("no dockerd: ./run deploy-test installs it")
    (scratch / "docker").mkdir()
    made = Docker(scratch / "docker")
    try:
        with made.started():
            pass
    except Failed:
        made.storage = "vfs"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(made.started())
        except Failed as error:
            pytest.skip(f"dockerd does not run here: {error}")
        build(made, debian.copy(scratch / "base"))
    with made.started("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"):
        yield made


def build(docker: Docker, base: Debian) -> None:
    """Build the image by the Dockerfile, and the stand-in for `postgres`."""
    base.installs("python3-pip")
    base.path("/usr/bin/python").symlink_to("python3")
    for marker in base.root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        marker.unlink()
    with subprocess.Popen(
        ["tar", "-C", base.root, "-c", "."], stdout=subprocess.PIPE
    ) as packed:
        subprocess.run(["docker", "import", "-", "python:3.13-slim"], stdin=packed.stdout,
                       env=docker.environment, check=True, capture_output=True, timeout=200)
    docker.does("tag", "python:3.13-slim", "standin")
    docker.does("build", "--network=host", "-t", "messenger", ROOT, seconds=600)
    folder = docker.folder / "postgres"
    folder.mkdir()
    (folder / "Dockerfile").write_text(POSTGRES_FILE)
    (folder / "start.sh").write_text(POSTGRES)
    docker.does("build", "--network=host", "-t", "postgres:18", folder, seconds=300)


@pytest.fixture(scope="module")
def database(docker: Docker) -> Iterator[str]:
    """A network with a PostgreSQL in it, to which DATABASE_URL leads; the network's name."""
    docker.does("network", "create", "apart")
    docker.does(
        "run", "-d", "--name=db", "--network=apart", "--user=postgres", "-e", "POSTGRES_DB=chat",
        "-e", "POSTGRES_USER=chat", "-e", "POSTGRES_PASSWORD=of the tests", "postgres:18")
    yield "apart"
    docker.does("rm", "--force", "--volumes", "db")


def health(docker: Docker, name: str) -> str:
    """Tell a container's state of health."""
    return docker.does("inspect", "-f", "{{.State.Health.Status}}", name).strip()


@pytest.mark.parametrize("user", ["messenger", "root"])
@pytest.mark.parametrize("place", ["embedded", "url"])
def test_image_runs(docker: Docker, database: str, user: str, place: str) -> None:
    """As a plain user and as root, on a volume and on a database elsewhere, the image becomes
    healthy, keeps what it was told over a restart, and stops in order; with a read-only root, and
    without capabilities but for root's on a volume, which becomes the plain user by them."""
    name = f"{user}-{place}"
    options = [f"--name={name}", f"--user={user}", *GUARDS, "--network=apart", "-p",
               "127.0.0.1:8080:8080"]
    if (user, place) != ("root", "embedded"):
        options.append("--cap-drop=ALL")
    if place == "embedded":
        options.append(f"--volume={name}:/data")
    else:
        options += [
            "-e", "DATABASE_URL=postgresql://chat@db/chat", "-e", f"SECRET_KEY={'k' * 40}",
            "-e", "DATABASE_PASSWORD=of the tests"]
    ann = ANN.replace("ann", name.replace("-", "_"))
    login = LOGIN.replace("ann", name.replace("-", "_"))
    docker.does("run", "-d", *options, "messenger")
    try:
        for _ in range(2):
            until(lambda: health(docker, name) == "healthy", READY_SECONDS,
                  lambda: docker.does("logs", name))
            if ann:
                docker.asks(8080, "/users", "-d", ann)
                ann = ""
            assert docker.asks(8080, "/users/login", "-d", login)["access_token"]
            docker.does("restart", "--time=20", name)
        until(lambda: health(docker, name) == "healthy", READY_SECONDS)
        [owner] = {line.split()[1] for line in docker.does("top", name, "-eo", "pid,user,args")
                   .splitlines() if "messenger.py" in line and "docker-init" not in line}
        assert (owner in ("root", "0")) == ((user, place) == ("root", "url"))
        docker.does("stop", "--time=20", name)
        assert docker.does("inspect", "-f", "{{.State.ExitCode}}", name).strip() == "0"
    finally:
        docker.does("rm", "--force", "--volumes", name)


def test_image_alone_is_backed_up_and_restored_as_shown(docker: Docker, tmp_path: Path) -> None:
    """Started by the line of the README, and by the lines of docs/administration.md, the image is
    what it was at its backup: also where it starts anew, with its key."""
    docker.follows("README.md", "docker run", tmp_path)
    try:
        until(lambda: docker.asks(8080, "/users", "-d", ANN), READY_SECONDS)
        token = docker.asks(8080, "/users/login", "-d", LOGIN)["access_token"]
        docker.follows(ADMINISTRATION, "docker exec", tmp_path)
        docker.asks(8080, "/users", "-d", BEN)
        assert "is restored" in docker.follows(ADMINISTRATION, "docker run", tmp_path)
        until(lambda: docker.asks(8080, "/users/me", "-H", f"Authorization: Bearer {token}"),
              READY_SECONDS, lambda: docker.does("logs", "messenger"))
        with pytest.raises(Failed, match="401"):
            docker.asks(8080, "/users/login", "-d", LOGIN_OF_BEN)

        docker.does("rm", "--force", "messenger")
        docker.does("volume", "rm", "messenger")
        docker.follows("README.md", "docker run", tmp_path)
        until(lambda: docker.asks(8080, "/health/readiness"), READY_SECONDS)
        docker.follows(ADMINISTRATION, "docker run", tmp_path)
        until(lambda: docker.asks(8080, "/users/me", "-H", f"Authorization: Bearer {token}"),
              READY_SECONDS, lambda: docker.does("logs", "messenger"))
    finally:
        docker.does("rm", "--force", "messenger")
        docker.does("volume", "rm", "--force", "messenger")


def test_image_holds_what_the_server_runs_on_alone(docker: Docker) -> None:
    """Neither the tests, nor the developers' tools, nor anybody's secrets are in the image."""
    found = docker.does("run", "--rm", "--network=none", "messenger", "find", "/app", "-maxdepth",
                        "2", "-not", "-name", "*.sql", "-type", "f").split()
    kept = ("/app/plumbing/", "/app/web/", "/app/tools/", "/app/messenger.py",
            "/app/requirements.txt", "/app/deploy/container.sh")
    assert [name for name in found if not name.startswith(kept)] == []
    assert "/app/tools/restore.py" in found
    assert {"/app/tools/code_lines.py", "/app/tools/documents.py"}.isdisjoint(found)


# ---- Compose


@pytest.fixture
def composed(tmp_path: Path) -> Path:
    """A copy of the repository, for its .env."""
    for name in (*TREE, "Dockerfile", ".dockerignore", "docker-compose.yml"):
        does("cp", "-r", ROOT / name, tmp_path)
    return tmp_path


def test_compose_file_keeps_its_schema() -> None:
    """The schema of the Compose Specification, as the package `dclint` brings it, holds."""
    if "COMPOSE_SCHEMA" not in os.environ:
        pytest.skip("no schema of Compose: ./run deploy-test fetches it, where npm is")
    schema = json.loads(Path(os.environ["COMPOSE_SCHEMA"]).read_text())
    told = does("/usr/bin/python3", "-c", YAML_TO_JSON, ROOT / "docker-compose.yml")
    validator = jsonschema.Draft7Validator(schema)  # the file names its draft by another URL
    validator.validate(json.loads(told))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({"services": {"messenger": {"imaeg": "x"}}})


def test_compose_makes_a_server(docker: Docker, composed: Path) -> None:
    """Without the secrets it says how to make them; with them a server is up on loopback alone,
    on a database with that password, both with a read-only root; a restart loses nothing."""
    with pytest.raises(Failed, match=r"run \./run compose-env first"):
        docker.composes(composed, "config")
    does(composed / "run", "compose-env")
    told = docker.composes(composed, "config")
    [password] = re.findall("POSTGRES_PASSWORD=(.+)", (composed / ".env").read_text())
    assert told.count(password) == 2
    try:
        docker.does("tag", "messenger", f"{composed.name}_messenger")
        try:
            docker.composes(composed, "up", "-d", "--no-build", seconds=200)
        except Failed as error:
            state = docker.does("ps", "-a", "--format", "{{.Names}} {{.Status}}")
            raise Failed(f"{error}\n{state}{docker.composes(composed, 'logs')}") from None
        until(lambda: docker.asks(8080, "/health/readiness"), READY_SECONDS,
              lambda: docker.composes(composed, "logs"))
        docker.asks(8080, "/users", "-d", ANN)
        listening = does(*docker.network, "ss", "-Hltn", "sport", "=", ":8080")
        assert re.findall(r"(\S+):8080", listening) == ["127.0.0.1"]
        for service, path in (("messenger", "/app/new"), ("postgres", "/new")):
            with pytest.raises(Failed, match="Read-only file system"):
                docker.composes(composed, "exec", "-T", service, "touch", path)
            status = docker.composes(composed, "exec", "-T", service, "cat", "/proc/1/status")
            assert re.search(r"CapBnd:\s+0+\n", status)
        accounts = docker.composes(
            composed, "exec", "-T", "messenger", "python", "messenger.py", "user", "list")
        assert "ann@example.com" in accounts
        docker.composes(composed, "down", "--timeout", "20", seconds=100)
        docker.composes(composed, "up", "-d", "--no-build", seconds=200)
        until(lambda: docker.asks(8080, "/users/login", "-d", LOGIN), READY_SECONDS)
    finally:
        docker.composes(composed, "down", "--volumes", "--timeout", "20", seconds=100)


def test_compose_is_backed_up_and_restored_as_shown(docker: Docker, composed: Path) -> None:
    """Started by the lines of the README, and by those of docs/administration.md, a server is what
    it was at its backup: where it is, and on a machine that has nothing but the files."""
    docker.does("tag", "messenger", f"{composed.name}_messenger")
    try:
        docker.follows("README.md", "docker compose", composed)
        until(lambda: docker.asks(8080, "/users", "-d", ANN), READY_SECONDS,
              lambda: docker.composes(composed, "logs"))
        assert "rules hold" in docker.follows(ADMINISTRATION, "docker compose exec", composed)
        [line] = re.findall(r"(?m)^15 3 \* \* \* root (.*)$", (ROOT / ADMINISTRATION).read_text())
        line = line.replace("\\%", "%").replace("/srv/messenger", str(composed))  # as cron does
        does("sh", "-euc", f"{COMPOSE_OF_DEBIAN}{line}", env=docker.environment, seconds=100)
        assert len(list(composed.glob("messenger-[1-7].backup"))) == 1
        docker.asks(8080, "/users", "-d", BEN)
        docker.follows(ADMINISTRATION, "docker compose run", composed)
        until(lambda: docker.asks(8080, "/users/login", "-d", LOGIN), READY_SECONDS,
              lambda: docker.composes(composed, "logs"))
        with pytest.raises(Failed, match="401"):
            docker.asks(8080, "/users/login", "-d", LOGIN_OF_BEN)

        docker.composes(composed, "down", "--volumes", "--timeout", "20", seconds=100)
        assert "is restored" in docker.follows(ADMINISTRATION, "docker compose run", composed)
        until(lambda: docker.asks(8080, "/users/login", "-d", LOGIN), READY_SECONDS,
              lambda: docker.composes(composed, "logs"))
    finally:
        docker.composes(composed, "down", "--volumes", "--timeout", "20", seconds=100)
