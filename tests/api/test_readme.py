"""README.md and the pages of docs/: their commands and examples are run as they stand there, and
what they name is there."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import messenger
from support.pages import PAGES, block
from support.servers import ROOT, settings_for
from tools import administer

README = PAGES["README.md"]
README_LINES_MAX = 250


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


def test_calls_that_are_shown_work(address: str, tmp_path: Path) -> None:
    """The README's block of curl, pasted in order, then the client of docs/api.md print what they
    promise; and the refusal that is shown there is that of a message without a text."""
    client = tmp_path / "client.py"
    code = block("docs/api.md", "python", "ws_connect")
    client.write_text(code.replace("localhost:8080", address))
    shell = block("README.md", "sh", "API=").replace("localhost:8080", address)
    run_client = f"BEN=$BEN CHAT=$CHAT {sys.executable} {client}"
    assert "BEN=$BEN CHAT=$CHAT .venv/bin/python client.py" in PAGES["docs/api.md"]
    refusal = json.loads(block("docs/api.md", "json", "invalid-input"))
    provoke = (
        "curl -s $API/chats/$CHAT/messages -d '{\"text\": \"\"}' -H \"Authorization: Bearer $BEN\""
        f" -H 'X-Request-Id: {refusal['request_id']}'")
    done = subprocess.run(
        ["sh", "-euc", f"{shell}\n{run_client}\n{provoke}"],
        capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert '"unread_count":1' in done.stdout
    assert '"seq":1,"reader_id"' in done.stdout
    heard = [line for line in done.stdout.splitlines() if line.startswith("{'type'")]
    for text in ("Hello, Ben!", "Hi, Ann!", "I am back."):
        assert sum(text in line for line in heard) == 1, f"{text} is heard once, in: {heard}"
    assert json.loads(done.stdout.splitlines()[-1]) == refusal


def test_administration_that_is_shown_works(tmp_path: Path, empty_url: str) -> None:
    """The commands of docs/administration.md that back up and verify, beside the server, that
    restore, without it, and that move to another PostgreSQL, where the server then is."""
    def follow(holding: str) -> str:
        text = block("docs/administration.md", "sh", holding)
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


async def test_commands_for_accounts_work_as_shown(
    database_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lines of docs/administration.md about accounts, in order, end with the account gone.
    Each is obeyed in this process: tests/processes/test_administer.py starts them as programs."""
    settings = settings_for(database_url, tmp_path)
    lines = block("docs/administration.md", "sh", "./run user").splitlines()
    for line in [*lines, lines[0]]:
        _, *words = shlex.split(line, comments=True)
        await administer.administer(settings, *administer.read_command(words))
    told = re.sub("password .*", "password", capsys.readouterr().out)
    number = told.split()[1]
    assert told == (
        "user N has the password\nuser N has the password\n"
        "user N is disabled\nuser N is enabled\nuser N is deleted\n").replace("N", number)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an archive cannot be cloned")
def test_start_that_is_shown_works(tmp_path: Path) -> None:
    """Cloned as the README says, the repository has a `./run` that starts. It only lists its
    commands here: tests/processes/test_run.py shows what it installs."""
    start = block("README.md", "sh", "git clone")
    start = start.replace("URL-of-this-repository", str(ROOT)).replace("./run", "./run help")
    done = subprocess.run(
        ["sh", "-euc", start], cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert "./run user COMMAND" in done.stdout


def test_commands_that_are_named_exist() -> None:
    """Each `./run COMMAND` of the pages is one that `./run help` lists."""
    told = subprocess.run(
        [ROOT / "run", "help"], capture_output=True, text=True, timeout=50, check=True).stdout
    listed = set(re.findall(r"(?m)^\./run ([a-z-]+)", told))
    named = {name for page in PAGES.values() for name in re.findall(r"\./run ([a-z][a-z-]*)", page)}
    assert len(named) > 12
    assert named <= listed


def test_page_of_the_api_lists_every_call() -> None:
    """The two tables of docs/api.md have each line of the server's own, and no other."""
    under, others = PAGES["docs/api.md"].split("These paths do not begin")
    call = re.compile("`(GET|POST|PUT|PATCH|DELETE) (/[^?`]*)")
    under = under.split("## Calls")[1]
    listed = {(method, f"/api/v1{path}") for method, path in call.findall(under)}
    listed |= set(call.findall(others.split("## Refusals")[0]))
    assert listed == {(each.method, each.path) for each in messenger.ENDPOINTS}


def anchors(page: str) -> set[str]:
    """Make the anchors of a page's headings, as GitHub does."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?s)```.*?```", "", page))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    """Each link of a page to a file of the repository finds it, and its heading if it names one."""
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", PAGES[name])
    for target in [one or other for one, other in targets]:
        if re.match("https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_settings_that_are_named_exist() -> None:
    """Whatever the pages call by a name in capitals is a setting; and docs/security.md names each
    limit that is one."""
    fields = msgspec.structs.fields(messenger.Settings)
    settings = {field.encode_name for field in fields}
    compose = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    for name, page in PAGES.items():
        prose = re.sub(r"(?s)```(?:python|sh|json).*?```", "", page)
        named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)[`=]", prose))
        assert named <= settings | compose, name
    limits = {field.encode_name for field in fields if field.type is messenger.Count}
    assert len(limits) > 12
    assert {each for each in limits if each in PAGES["docs/security.md"]} == limits


def test_readme_is_short() -> None:
    """It is read in five minutes, and leads to every page of docs/."""
    assert len(README.splitlines()) < README_LINES_MAX
    assert {name for name in PAGES if name != "README.md" and f"]({name})" not in README} == set()
