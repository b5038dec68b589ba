"""./run itself: that it makes .venv once, repairs it, and says in one line what it cannot do.

Each test has a copy of ./run in a small tree of its own, whose requirements are empty and whose
messenger.py only tells how it was started. Nothing here reaches the network.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from support.servers import ROOT

RUN = ROOT / "run"
TELL = "import json, os, sys; print(json.dumps([sys.argv, sys.prefix, os.environ['DATA_DIR']]))\n"
# A Python that passes for one of an older version.
OLD = f"exec '{sys.executable}' -Ic \"import sys; sys.version_info = (3, 10, 9); $2\"\n"
# What a ./run needs besides a Python, for a PATH on which there is none.
TOOLS = ["sh", "cat", "cksum", "dirname", "grep", "readlink", "rm", "tail"]
UNSATISFIABLE = "nothing-of-this-name==1 --hash=sha256:" + "0" * 64 + "\n"


class Tree:
    """A folder with ./run in it, and the words for starting it."""

    def __init__(self, folder):
        self.folder = folder
        self.venv = folder / ".venv"
        self.made = folder / "made.log"
        self.env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "PIP_NO_INDEX": "1"}
        self.env |= {"HOME": "", "PIP_NO_CACHE_DIR": "1"}
        folder.mkdir()
        shutil.copy(RUN, folder / "run")
        for name, text in {
            "requirements.txt": "",
            "requirements-dev.txt": "",
            "messenger.py": TELL,
        }.items():
            (folder / name).write_text(text)

    def start(self, *arguments, path=None, cwd=None, **env):
        return subprocess.Popen(
            [path or self.folder / "run", *arguments],
            cwd=cwd or self.folder,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments, **how):
        with self.start(*arguments, **how) as process:
            try:
                out, err = process.communicate(timeout=50)
            except BaseException:
                kill(process)
                raise
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def killed_once_there_is(self, path, **how):
        """Starts ./run and sends kill -9 to all of it as soon as that path exists."""
        with self.start(**how) as process:
            try:
                while not path.exists():
                    time.sleep(0.01)
            finally:
                kill(process)

    def serves(self, **how):
        """Starts the messenger, which must succeed; returns what ./run said before it."""
        done = self.run(**how)
        assert done.returncode == 0, done.stderr
        argv, prefix, data = json.loads(done.stdout)
        assert argv == [str(self.folder / "messenger.py")]
        assert prefix == str(self.venv)
        assert data == str(self.folder / "data")
        return done.stderr

    def program(self, name, script):
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(0o755)
        return path

    def times_made(self):
        return len(self.made.read_text().splitlines()) if self.made.exists() else 0


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A tree whose .venv was really made, by the Python that runs the tests."""
    tree = Tree(tmp_path_factory.mktemp("real").resolve() / "tree")
    tree.said_at_first = tree.serves()
    return tree


@pytest.fixture
def tree(real, tmp_path):
    """A tree without .venv, whose Python counts how often it makes one, and copies the real one.

    Copying takes no time, because lib is shared: with empty requirements nothing is written there.
    """
    tree = Tree(tmp_path.resolve() / "a tree")
    python = tree.program(
        "python",
        f"""
        case "$*" in
        "-Im venv "*)
            echo made >>'{tree.made}'
            [ -z "${{SLOWLY-}}" ] || {{ mkdir "$3" && sleep "$SLOWLY"; }}
            mkdir -p "$3" && cp -R '{real.venv}/bin' '{real.venv}/pyvenv.cfg' "$3" &&
            ln -s '{real.venv}/lib' "$3/lib"
            ;;
        *) exec '{sys.executable}' "$@" ;;
        esac
        """,
    )
    tree.env["PYTHON"] = str(python)
    return tree


@pytest.fixture
def started(tree):
    """A tree that has served once."""
    tree.serves()
    assert tree.times_made() == 1
    return tree


@pytest.fixture
def bare(tree):
    """A tree on a machine with the tools of every Unix and nothing else."""
    tree.program("bin/unused", "")
    for name in TOOLS:
        (tree.folder / "bin" / name).symlink_to(shutil.which(name))
    tree.env["PATH"] = str(tree.folder / "bin")
    del tree.env["PYTHON"]
    return tree


@pytest.fixture
def without_venv(bare):
    """A bare machine whose only Python lacks its venv module, as Debian's does at first."""
    bare.program(
        "bin/python3",
        f"""
        case "$*" in
        *ensurepip*) [ -e '{bare.folder}/apt.log' ] ;;
        *) exec '{bare.folder}/python' "$@" ;;
        esac
        """,
    )
    bare.program("bin/apt-get", f"echo \"$*\" >>'{bare.folder}/apt.log'")
    for name in ("cp", "ln", "mkdir"):
        (bare.folder / "bin" / name).symlink_to(shutil.which(name))
    return bare


def kill(process):
    """Kills what was started and what it started in turn."""
    os.killpg(process.pid, signal.SIGKILL)


def one_line(done):
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr


# ---- Starting --------------------------------------------------------------------------------


def test_first_start_makes_a_venv_and_serves(real):
    """The first start says in one line that it installs, and becomes messenger.py in .venv."""
    assert real.said_at_first == "Installing dependencies into .venv ...\n"


def test_second_start_installs_nothing(started):
    """Once installed, a start says nothing of its own, looks for no Python and calls no pip."""
    log = started.venv / "pip.log"
    log.unlink()
    started.program("python", f"echo \"$*\" >>'{log}'")
    assert started.serves() == ""
    assert not log.exists()


def test_it_starts_from_anywhere_through_symlinks(started, tmp_path):
    """A chain of symlinks leads to the same tree and the same data from any folder."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "first").symlink_to("../a tree/run")
    (tmp_path / "second").symlink_to(tmp_path / "bin" / "first")
    assert started.serves(path="./second", cwd=tmp_path) == ""


def test_the_data_folder_can_be_named(started):
    """DATA_DIR reaches the messenger as it was given."""
    done = started.run(DATA_DIR="elsewhere")
    assert json.loads(done.stdout)[2] == "elsewhere"


def test_a_warning_of_python_is_not_shown(started):
    """Deprecation warnings of a newer Python are not shown to whoever runs the messenger."""
    (started.folder / "messenger.py").write_text(
        "import warnings; warnings.warn('old', DeprecationWarning)\n" + TELL
    )
    assert started.serves() == ""


# ---- Repairing -------------------------------------------------------------------------------


def test_a_changed_lock_is_installed_into_the_same_venv(started):
    """A start after an upgrade installs the new requirements without making .venv anew."""
    (started.folder / "requirements.txt").write_text("# newer\n")
    assert started.serves().startswith("Installing")
    assert started.times_made() == 1
    assert started.serves() == ""


def test_a_start_killed_in_the_middle_is_made_good_by_the_next(tree):
    """kill -9 while .venv is being made leaves nothing that the next start trips over."""
    tree.killed_once_there_is(tree.venv, SLOWLY="60")
    assert tree.serves().startswith("Installing")
    assert tree.times_made() == 2


def test_a_start_killed_while_pip_installs_is_made_good_by_the_next(started):
    """After pip was killed a package may be half installed, so the next start makes .venv anew."""
    (started.venv / "bin" / "python").rename(started.venv / "bin" / "real")
    started.program(
        ".venv/bin/python",
        f"""
        case "$*" in
        *pip*) : >'{started.folder}/pip runs' && sleep 60 ;;
        *) exec '{started.venv}/bin/real' "$@" ;;
        esac
        """,
    )
    (started.folder / "requirements.txt").write_text("# newer\n")
    started.killed_once_there_is(started.folder / "pip runs")
    (started.folder / "requirements.txt").write_text("")
    assert started.serves().startswith("Installing")
    assert started.times_made() == 2


def test_a_failing_pip_is_told_in_one_line(tree):
    """Where pip fails, the reason and its log are named; once the cause is gone, it starts."""
    (tree.folder / "requirements.txt").write_text(UNSATISFIABLE)
    done = tree.run()
    assert done.returncode == 1
    assert done.stdout == ""
    installing, failed = done.stderr.splitlines()
    assert installing == "Installing dependencies into .venv ..."
    assert "No matching distribution found for nothing-of-this-name==1" in failed
    assert f"{tree.venv}/pip.log" in failed
    (tree.folder / "requirements.txt").write_text("")
    tree.serves()


def test_a_failed_installation_of_the_test_tools_leaves_the_server_startable(started):
    """Without network ./run test fails, and ./run still starts what was installed before."""
    (started.folder / "requirements-dev.txt").write_text(UNSATISFIABLE)
    assert started.run("test").returncode == 1
    assert started.serves() == ""


@pytest.mark.parametrize("harm", ["interpreter gone", "interpreter of another version"])
def test_a_venv_that_lost_its_python_is_made_anew(started, harm):
    """After Python was moved or upgraded, the next start makes a .venv for the new one."""
    if harm == "interpreter gone":
        (started.venv / "bin" / "python").unlink()
        (started.venv / "bin" / "python").symlink_to("/nowhere/python3")
    else:
        stamp = started.venv / "installed"
        stamp.write_text(stamp.read_text().replace("cpython-3", "cpython-2"))
    assert started.serves().startswith("Installing")
    assert started.times_made() == 2


def test_two_starts_at_once_make_one_venv(tree):
    """The second of two first starts waits for the first and finds everything done."""
    both = [tree.start(SLOWLY="0.5") for _ in range(2)]
    said = [process.communicate(timeout=50) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(err for _, err in said) == ["", "Installing dependencies into .venv ...\n"]
    assert tree.times_made() == 1


# ---- Finding a Python ------------------------------------------------------------------------


def test_a_machine_without_python_is_told_in_one_line(bare):
    """Where no Python is new enough, one line says which versions are."""
    bare.program("bin/python3", OLD)
    done = bare.run()
    assert done.returncode == 1
    assert "3.11 or newer" in one_line(done)


def test_a_newer_python_beside_an_old_one_is_found(bare):
    """Where python3 is too old, the newest of the versioned names is taken."""
    bare.program("bin/python3", OLD)
    for name in ("cp", "ln", "mkdir"):
        (bare.folder / "bin" / name).symlink_to(shutil.which(name))
    (bare.folder / "bin" / "python3.11").symlink_to(bare.folder / "python")
    bare.serves()


def test_a_plain_user_without_the_venv_module_is_told_the_command(without_venv):
    """A user who cannot install Python's missing venv module is told the one command that does."""
    without_venv.program("bin/id", "echo 1000")
    done = without_venv.run()
    assert done.returncode == 1
    major, minor = sys.version_info[:2]
    assert one_line(done).endswith(f" sudo apt-get install -y python{major}.{minor}-venv\n")
    assert not (without_venv.folder / "apt.log").exists()


def test_root_without_the_venv_module_gets_it_installed(without_venv):
    """As root, ./run says that it installs the missing module, does so, and starts."""
    without_venv.program("bin/id", "echo 0")
    said = without_venv.serves()
    assert "has no venv module: installing python3" in said
    (installed,) = (without_venv.folder / "apt.log").read_text().splitlines()
    assert installed.startswith("install ")


# ---- The other commands ----------------------------------------------------------------------


def test_an_unknown_command_is_one_line(tree):
    """A word that is no command is named, with exit status 2, and nothing is installed for it."""
    done = tree.run("serf")
    assert done.returncode == 2
    assert "serf" in one_line(done)
    assert not tree.venv.exists()


def test_help_lists_the_commands(tree):
    """./run help names every command and installs nothing."""
    done = tree.run("help")
    assert done.returncode == 0
    commands = (
        "install", "compose-env", "test", "fuzz", "check", "deploy-test", "documents", "lock",
        "help")
    assert all(f"./run {command}" in done.stdout for command in commands)
    assert not tree.venv.exists()


def test_install_starts_nothing(tree):
    """./run install makes .venv and is done; once more it does nothing."""
    assert tree.run("install").stderr.startswith("Installing")
    done = tree.run("install")
    assert (done.returncode, done.stdout, done.stderr, tree.times_made()) == (0, "", "", 1)


def test_secrets_of_compose_are_made_once(tree):
    """./run compose-env makes .env with two secrets, readable by its owner alone; several at once
    make one, and none replaces what is there. It needs no Python."""
    tree.env["PYTHON"] = "/nowhere"
    with tree.start("compose-env") as first, tree.start("compose-env") as second:
        said = [process.communicate(timeout=50)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    env = tree.folder / ".env"
    assert sorted(text.startswith(f"made {env}:") for text in said) == [False, True]
    assert env.stat().st_mode & 0o777 == 0o600
    made = env.read_text()
    key, password = re.fullmatch(
        "SECRET_KEY=([0-9a-f]{64})\nPOSTGRES_PASSWORD=([0-9a-f]{64})\n", made).groups()
    assert key != password
    tree.run("compose-env")
    assert env.read_text() == made
    assert [path.name for path in tree.folder.glob(".env*")] == [".env"]


def test_arguments_after_test_reach_pytest(started):
    """./run test hands what follows it to pytest as it stands, and answers pytest's exit status."""
    (started.folder / "pytest.py").write_text("import sys; print(sys.argv[1:]); sys.exit(3)\n")
    done = started.run("test", "-k", "two words")
    assert done.returncode == 3
    assert done.stdout == "['-k', 'two words']\n"


def test_fuzz_runs_the_long_form_of_some_tests(started):
    """./run fuzz hands pytest what follows it and the tests that are there, and sets FUZZ=long."""
    (started.folder / "pytest.py").write_text(
        "import os, sys; print(os.environ['FUZZ'], sys.argv[1:]); sys.exit(3)\n")
    folder = started.folder / "tests/invariants"
    folder.mkdir(parents=True)
    for name in ("test_fuzz_b.py", "test_fuzz_a.py", "test_other.py"):
        (folder / name).touch()
    done = started.run("fuzz", "-k", "two words")
    assert done.returncode == 3
    fuzz = "'tests/invariants/test_fuzz_a.py', 'tests/invariants/test_fuzz_b.py'"
    names = (
        "invariants/test_model", "invariants/test_resuming", "processes/test_revocation",
        "live/test_far")
    others = ", ".join(f"'tests/{name}.py'" for name in names)
    assert done.stdout == f"long ['-k', 'two words', {fuzz}, {others}]\n"


def test_documents_are_made_by_their_tool(started):
    """./run documents starts tools/documents.py, and answers its exit status."""
    (started.folder / "tools").mkdir()
    (started.folder / "tools/documents.py").write_text("print('made'); raise SystemExit(3)\n")
    done = started.run("documents")
    assert (done.returncode, done.stdout) == (3, "made\n")


@pytest.mark.parametrize("failing", ["ruff", "mypy", "tools/code_lines", "none"])
def test_check_fails_when_one_of_its_tools_does(started, failing):
    """./run check succeeds only where ruff, mypy and the count of lines of code do."""
    (started.folder / "tools").mkdir()
    for tool in ("ruff", "mypy", "tools/code_lines"):
        (started.folder / f"{tool}.py").write_text(f"import sys; sys.exit({tool == failing})\n")
    assert (started.run("check").returncode == 0) == (failing == "none")
