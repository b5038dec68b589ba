"""Connection strings: read as libpq reads them, and connected by, with nothing from elsewhere."""

import ssl
import subprocess
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest

from plumbing import address
from plumbing.address import connect, explain, read_address, with_password
from plumbing.database import SESSION
from plumbing.process import StartError
from support.databases import over_tcp

SECONDS = 10


def folder_of(url: str) -> str:
    """The folder of a PostgreSQL's socket."""
    return read_address(url).parameters["host"]


SPELLINGS = {
    # how it is written: host, port, user, password, database
    "postgresql://u:p@h:1/d": ("h", "1", "u", "p", "d"),
    "postgres://u@h/d": ("h", "5432", "u", None, "d"),
    "postgresql://u:p@h1:1,h2:2/d": ("h1,h2", "1,2", "u", "p", "d"),
    "postgresql://u@h1,h2/d": ("h1,h2", "5432,5432", "u", None, "d"),
    "postgresql://u@h1,h2:7/d": ("h1,h2", "5432,7", "u", None, "d"),
    "postgresql://u@/d?host=h1,h2&port=1,2": ("h1,h2", "1,2", "u", None, "d"),
    "postgresql://u@/d?host=h1,h2&port=3": ("h1,h2", "3,3", "u", None, "d"),
    "postgresql://u@%2Frun%2Fpostgresql/d": ("/run/postgresql", "5432", "u", None, "d"),
    "postgresql://u@%2Frun%2Fpostgresql:7/d": ("/run/postgresql", "7", "u", None, "d"),
    "postgresql://u@/d?host=/run/postgresql": ("/run/postgresql", "5432", "u", None, "d"),
    "postgresql://u:p@[::1]:7/d": ("::1", "7", "u", "p", "d"),
    "postgresql://u@h?hostaddr=10.0.0.1&dbname=d": ("10.0.0.1", "5432", "u", None, "d"),
    "postgresql://u:%2F%23%25%40%3F%3A@h/d": ("h", "5432", "u", "/#%@?:", "d"),
    "postgresql://u:a#b:c@h/d": ("h", "5432", "u", "a#b:c", "d"),
    "postgresql://h/d?user=u&password=p": ("h", "5432", "u", "p", "d"),
    "postgresql://u@h": ("h", "5432", "u", None, "u"),
}


@pytest.mark.parametrize("url", SPELLINGS)
def test_each_spelling_of_libpq_is_read(url: str) -> None:
    """Hosts, ports, user, password and database are what libpq makes of the string."""
    found = read_address(url).parameters
    names = ("host", "port", "user", "password", "dbname")
    assert tuple(found.get(name) for name in names) == SPELLINGS[url]


SECRET = "Hunter2"
WRONG = [
    "mysql://u:{}@h/d", "u:{}@h/d", "postgresql:u:{}@h/d", "host=h password={}",
    "postgresql://u:{}/x@h/d", "postgresql://u:x/{}@h/d", "postgresql://u:12/{}@h:5432/d",
    "postgresql://u:{}@x@h/d", "postgresql://u:x@{}@h/d", "postgresql://u:{}?x@h/d",
    "postgresql://u:x?{}@h/d", "postgresql://u:{}%@h/d", "postgresql://u:{}%zz@h/d",
    "postgresql://u:{}%00@h/d", "postgresql://u:{}", "postgresql://u:{}/d",
    "postgresql://u@h:{}/d", "postgresql://u@h:1{}/d", "postgresql://u@h:99999/d?password={}",
    "postgresql://u@h:0/d?password={}", "postgresql://u@h/d?port=1,2&password={}",
    "postgresql://u@h/d?pasword={}", "postgresql://u@h/d?password=x&{}",
    "postgresql://u@h/d?password={}&sslmode=never", "postgresql://u@h/d?sslmode={}",
    "postgresql://u@h/d?target_session_attrs={}", "postgresql://u@h/d?service={}",
    "postgresql://u:{}@h,/d", "postgresql://u:{}@[::1/d", "postgresql://u:{}\udcff@h/d",
    "postgresql://u:{}@h/d?sslmode=verify-full",
    "postgresql://u:{}@h/d?sslrootcert=system&sslmode=require",
]


@pytest.mark.parametrize("url", WRONG)
def test_wrong_string_is_refused_and_not_told(url: str) -> None:
    """What cannot be read is one line that names DATABASE_URL and holds no part of the string."""
    with pytest.raises(StartError) as refused:
        read_address(url.format(SECRET))
    line = str(refused.value)
    assert "DATABASE_URL" in line
    assert SECRET not in line
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize("password", ["a/b", "a#b%c@d", "?&=+ ", "'\"\\$", "ü€", "%2F", ":,[]"])
def test_password_beside_the_string_is_taken_as_it_is(password: str) -> None:
    """A password that is set by itself needs nothing escaped, and goes before one in the string."""
    for url in ("postgresql://u@h/d", "postgresql://u:x@h/d?sslmode=disable"):
        assert read_address(with_password(url, password)).parameters["password"] == password
    assert with_password("postgresql://u:x@h/d", "") == "postgresql://u:x@h/d"


def test_what_has_no_effect_is_named() -> None:
    """Parameters of libpq that are of no use here are told, those that are used are not."""
    url = "postgresql://u@h/d?channel_binding=require&connect_timeout=9&keepalives_idle=9&sslsni=0"
    read = read_address(url)
    assert read.unused == ("channel_binding", "connect_timeout", "sslsni")
    assert read.parameters["connect_timeout"] != "9"


async def test_session_has_its_settings(database_url: str, sql: asyncpg.Connection) -> None:
    """A session has what it was to have, whatever its database says; one that was to have nothing
    is as its database says."""
    name = await sql.fetchval("select current_database()")
    await sql.execute(f"alter database {name} set search_path = nowhere")
    await sql.execute(f"alter database {name} set statement_timeout = 7777")
    url = f"{database_url}{'&' if '?' in database_url else '?'}keepalives_idle=77"
    connection = await connect(url, SESSION, SECONDS)
    for setting, value in SESSION.items():
        row = await connection.fetchrow("select * from pg_settings where name = $1", setting)
        if row is not None and "keepalives" not in setting:  # which a Unix socket does not have
            assert row["setting"] == value, setting
    await connection.close()
    bare = await connect(url, {}, SECONDS)
    assert await bare.fetchval("show search_path") == "nowhere"
    assert await bare.fetchval("show statement_timeout") == "7777ms"
    await bare.close()


async def test_hosts_are_tried_in_turn(database_url: str) -> None:
    """Of several hosts the first that answers is used, by either driver: names, ports, folders."""
    folder, name = folder_of(database_url), read_address(database_url).parameters
    own = f"{name['user']}@", f"/{name['dbname']}"
    quoted = folder.replace("/", "%2F")
    async with over_tcp(folder) as port:
        for hosts in (f"127.0.0.1:1,127.0.0.1:{port}", f"127.0.0.1:{port},127.0.0.1:1",
                      f"127.0.0.1:1,{quoted}", f"{quoted}:5432", f"%2Fnowhere,localhost:{port}"):
            url = f"postgresql://{own[0]}{hosts}{own[1]}?target_session_attrs=read-write"
            connection = await connect(url, SESSION, SECONDS)
            assert await connection.fetchval("select current_database()") == name["dbname"], hosts
            await connection.close()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for localhost, signed by itself, and its key."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", "key", "-out",
         "cert"], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


def test_certificates_are_checked_as_libpq_does(certificate: Path) -> None:
    """What is encrypted, and against what it is checked, follows sslmode and sslrootcert."""
    root = f"&sslrootcert={certificate}/cert"
    expected: dict[str, Any] = {
        # sslmode: whether the name and the certificate are checked
        "require": (False, ssl.CERT_NONE), f"require{root}": (False, ssl.CERT_REQUIRED),
        f"verify-ca{root}": (False, ssl.CERT_REQUIRED),
        f"verify-full{root}": (True, ssl.CERT_REQUIRED),
        "verify-full&sslrootcert=system": (True, ssl.CERT_REQUIRED),
    }
    for mode, checked in expected.items():
        read = read_address(f"postgresql://u@h/d?sslmode={mode}")
        [context] = address._encryptions(read)
        assert isinstance(context, ssl.SSLContext)
        assert (context.check_hostname, context.verify_mode) == checked, mode


@pytest.mark.parametrize("name", ["sslrootcert", "sslcrl", "sslcert"])
def test_file_that_cannot_be_read_is_one_line(tmp_path: Path, name: str) -> None:
    """A certificate that is not there, or is none, ends the start, and its name is not told."""
    (tmp_path / "Hunter2").write_text("no certificate")
    for path in (tmp_path / "Hunter2", tmp_path / "Hunter2/none", "/nowhere/Hunter2"):
        read = read_address(f"postgresql://u@h/d?sslmode=require&{name}={path}")
        with pytest.raises(StartError, match=r"DATABASE_URL: a file of .*cannot be used") as raised:
            address._encryptions(read)
        assert "Hunter2" not in str(raised.value)


async def test_server_without_tls_is_used_unless_it_must_encrypt(database_url: str) -> None:
    """A server that does not encrypt serves who prefers it to, and not who requires it."""
    name = read_address(database_url).parameters
    async with over_tcp(name["host"]) as port:
        url = f"postgresql://{name['user']}@127.0.0.1:{port}/{name['dbname']}?sslmode="
        for mode in ("disable", "allow", "prefer"):
            connection = await connect(url + mode, {}, SECONDS)
            await connection.close()
        with pytest.raises(ConnectionError) as raised:
            await connect(f"{url}require", {}, SECONDS)
    assert explain(raised.value) == ("the server refuses to encrypt", True)


@pytest.mark.parametrize(("error", "may_pass"), [
    (asyncpg.InvalidPasswordError("a"), False),
    (asyncpg.InvalidAuthorizationSpecificationError("a"), False),
    (asyncpg.InvalidCatalogNameError("a"), False),
    (asyncpg.InsufficientPrivilegeError("a"), False),
    (asyncpg.ProtocolViolationError("a"), False),
    (asyncpg.InterfaceError("a"), False),
    (UnicodeError("a"), False),
    (PermissionError(13, "a"), False),
    (ssl.SSLCertVerificationError("a"), False),
    (asyncpg.TooManyConnectionsError("a"), True),
    (asyncpg.CannotConnectNowError("a"), True),
    (asyncpg.AdminShutdownError("a"), True),
    (asyncpg.ReadOnlySQLTransactionError("a"), True),
    (asyncpg.DeadlockDetectedError("a"), True),
    (asyncpg.TargetServerAttributeNotMatched("a"), True),
    (psycopg.OperationalError("a"), True),
    (ConnectionRefusedError(111, "a"), True),
    (OSError("a"), True),
    (TimeoutError("a"), True),
])
def test_failure_is_told_by_its_kind(error: Exception, may_pass: bool) -> None:
    """What may pass is told from what may not without a look at the text, which is not repeated."""
    error.args = ("Hunter2", *error.args[1:]) if len(error.args) == 1 else error.args
    reason, found = explain(error)
    assert found == may_pass
    assert "Hunter2" not in reason
