"""Where PostgreSQL is: a connection string, read as libpq reads it, and the one way to connect.

All is taken from the string: no variable PG… counts, no service, and no file that it does not name,
but for ~/.pgpass. What it says is never told to anybody: where it was misread, any part of it may
be a part of the password.
"""

import asyncio
import os
import pwd
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import asyncpg
import psycopg
from psycopg.conninfo import conninfo_to_dict

from plumbing.process import StartError

PORT = "5432"
HOSTS = "/var/run/postgresql,/tmp,localhost"
# An @ that is neither the one before the host nor escaped comes of a password.
FORM = re.compile(r"postgres(?:ql)?://(?:[^@/?]*@)?[^@]*")
MALFORMED = (
    "DATABASE_URL must be like postgresql://user:password@host/database; / ? # % @ in the password"
    " are written %2F %3F %23 %25 %40, or the password is set as DATABASE_PASSWORD"
)

TLS_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
TARGETS = ("any", "primary", "standby", "prefer-standby", "read-write", "read-only")
CHOICES = {
    "sslmode": TLS_MODES, "target_session_attrs": TARGETS, "sslnegotiation": ("postgres", "direct")}
USED = {
    "host", "hostaddr", "port", "user", "password", "passfile", "dbname", "options",
    "application_name", "sslrootcert", "sslcert", "sslkey", "sslpassword", "sslcrl", *CHOICES,
}
# So that PostgreSQL learns that a client is gone: libpq's name of it, and the session's.
KEEPALIVES = {
    "keepalives_idle": "tcp_keepalives_idle", "keepalives_interval": "tcp_keepalives_interval",
    "keepalives_count": "tcp_keepalives_count", "tcp_user_timeout": "tcp_user_timeout",
}

# By statement: a pooler refuses them at the start of a connection. Older versions lack some.
SET_SESSION = """
    select set_config(name, value, false)
    from unnest($1::text[], $2::text[]) as given (name, value)
    where current_setting(name, true) is not null"""

POOLED = (
    "a pooler lends out its connections by the transaction or statement: it must do so by the"
    " session (pool_mode = session), or be passed by")
REASONS = {
    "08P01": "the pooler or server refuses such a connection: its log says why",
    "25006": "the database may only be read",
    "26000": POOLED,
    "28000": "the user may not log in from here: see pg_hba.conf and the role's right to log in",
    "28P01": "the password is wrong or missing",
    "3D000": "there is no such database",
    "42501": "the user has no right to connect to the database",
    "42P05": POOLED,
    "53300": "no connection is free",
    "57P03": "it is starting up or shutting down",
}
# What gets better by waiting, by its class: connection lost, conflict, no room, shutting down.
PASSING = ("08", "40", "53", "57")


@dataclass(frozen=True, slots=True)
class Address:
    """A connection string that was read."""

    parameters: dict[str, str]  # of libpq, with what it would have taken from elsewhere
    unused: tuple[str, ...]  # parameters of libpq in it that have no effect here

    @property
    def hosts(self) -> list[str]:
        """Where to try, one after the other: names, addresses, folders of sockets."""
        return self.parameters["host"].split(",")


def shield_libpq() -> None:
    """Take away the variables that libpq would follow, and show it the system's certificates."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]
    paths = ssl.get_default_verify_paths()  # libpq may come with an OpenSSL of its own
    os.environ.setdefault(paths.openssl_cafile_env, paths.cafile or "")
    os.environ.setdefault(paths.openssl_capath_env, paths.capath or "")


def with_password(url: str, password: str) -> str:
    """Put a password, if there is one, into a connection string, before any that it has."""
    if not password:
        return url
    mark = "&" if "?" in url else "?"
    return f"{url}{mark}password={quote(password, safe='', errors='surrogateescape')}"


def read_address(url: str) -> Address:
    """Read a connection string. Raises StartError, which tells at most a parameter's name."""
    if not FORM.fullmatch(url):
        raise StartError(MALFORMED)
    try:
        given = {name: str(value) for name, value in conninfo_to_dict(url).items() if value != ""}
    except (psycopg.Error, ValueError):
        raise StartError(MALFORMED) from None
    if "service" in given:
        raise StartError("DATABASE_URL: services are not known here; write out what it stands for")
    for name, choices in CHOICES.items():
        if given.get(name, choices[0]) not in choices:
            raise StartError(f"DATABASE_URL: {name} must be one of {', '.join(choices)}")
    known = {name: value for name, value in given.items() if name in {*USED, *KEEPALIVES}}
    filled = known | _place(known) | _tls(known)
    filled.setdefault("application_name", "messenger")
    filled |= {"client_encoding": "utf8", "gssencmode": "disable", "connect_timeout": "2"}
    filled.pop("hostaddr", None)
    return Address(filled, tuple(sorted(given.keys() - known.keys())))


def _place(given: Mapping[str, str]) -> dict[str, str]:
    """Tell where to connect, as whom: what libpq would have filled in. Raises StartError."""
    hosts = (given.get("hostaddr") or given.get("host") or HOSTS).split(",")
    ports = given.get("port", PORT).split(",")
    if len(ports) == 1:
        ports *= len(hosts)
    ports = [port or PORT for port in ports]
    if not all(hosts) or len(hosts) != len(ports) or not all(map(_is_port, ports)):
        raise StartError(MALFORMED)
    try:
        user = given.get("user") or pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise StartError("DATABASE_URL must name a user") from None
    return {
        "host": ",".join(hosts), "port": ",".join(ports), "user": user,
        "dbname": given.get("dbname", user)}


def _is_port(text: str) -> bool:
    return re.fullmatch("[0-9]{1,5}", text) is not None and 0 < int(text) < 1 << 16


def _tls(given: Mapping[str, str]) -> dict[str, str]:
    """Tell how to encrypt: what is given, and nothing of the home folder. Raises StartError."""
    root = given.get("sslrootcert", "")
    mode = given.get("sslmode", "verify-full" if root == "system" else "prefer")
    if mode.startswith("verify") and not root:
        raise StartError(f"DATABASE_URL: sslmode={mode} needs sslrootcert, a file or system")
    if root == "system" and mode != "verify-full":
        raise StartError("DATABASE_URL: sslrootcert=system needs sslmode=verify-full")
    filled = {"sslmode": mode}
    if "sslcert" not in given:
        filled["sslcertmode"] = "disable"
    return filled


def _make_context(parameters: Mapping[str, str]) -> ssl.SSLContext:
    """Make what asyncpg encrypts with, of the files that are named. Raises OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = parameters["sslmode"] == "verify-full"
    context.set_alpn_protocols(["postgresql"])
    root = parameters.get("sslrootcert")
    if root == "system":
        context.load_default_certs()
    elif root and parameters["sslmode"] not in ("allow", "prefer"):
        context.load_verify_locations(root)
    else:
        context.verify_mode = ssl.CERT_NONE
    if "sslcrl" in parameters:
        context.load_verify_locations(parameters["sslcrl"])
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    if "sslcert" in parameters:
        password = parameters.get("sslpassword", "")
        context.load_cert_chain(
            parameters["sslcert"], parameters.get("sslkey"), lambda: password)
    return context


def _encryptions(address: Address) -> list[ssl.SSLContext | bool]:
    """Answer how to try to connect, one after the other: encrypted by a context, or not.

    Raises StartError.
    """
    mode = address.parameters["sslmode"]
    if mode == "disable" or all(host.startswith("/") for host in address.hosts):
        return [False]
    try:
        context = _make_context(address.parameters)
    except OSError as error:
        raise StartError(
            "DATABASE_URL: a file of sslrootcert, sslcrl, sslcert or sslkey cannot be used:"
            f" {error.strerror}") from None
    if mode == "allow":
        return [False, context]
    return [context, False] if mode == "prefer" else [context]


async def _open(address: Address) -> Any:
    """Connect by asyncpg, which is told all that it would else look for by itself."""
    given = address.parameters
    arguments: dict[str, Any] = {
        "host": address.hosts, "port": [int(port) for port in given["port"].split(",")],
        "user": given["user"], "password": given.get("password"),
        "passfile": given.get("passfile"), "database": given["dbname"], "timeout": None,
        "direct_tls": given.get("sslnegotiation") == "direct",
        "target_session_attrs": given.get("target_session_attrs", "any"),
        "max_cached_statement_lifetime": 0,  # as long as the connection
        "server_settings": {
            name: given[name] for name in ("application_name", "options") if name in given},
    }
    encryptions = _encryptions(address)
    for encryption in encryptions:
        try:
            return await asyncpg.connect(ssl=encryption, **arguments)
        except (OSError, asyncpg.InvalidAuthorizationSpecificationError) as error:
            is_wrong_password = isinstance(error, asyncpg.InvalidPasswordError)
            if encryption is encryptions[-1] or is_wrong_password:
                raise
    raise AssertionError("there is always a way to try")


async def connect(url: str, session: Mapping[str, str], seconds: float) -> Any:
    """Connect by a connection string, and set what a session is to have, in so many seconds.

    With nothing to set the session stays as it is. Raises StartError, OSError and TimeoutError,
    and asyncpg's PostgresError, InterfaceError and InternalClientError.
    """
    address = read_address(url)
    async with asyncio.timeout(seconds):
        connection = await _open(address)
        if not session:
            return connection
        given = {KEEPALIVES[n]: v for n, v in address.parameters.items() if n in KEEPALIVES}
        settings = {**session, **given}
        try:
            await connection.fetch(SET_SESSION, [*settings], [*settings.values()])
        except BaseException:
            connection.terminate()
            raise
        return connection


def explain(error: Exception) -> tuple[str, bool]:
    """Tell why a connection failed, and whether that may pass.

    By the error's kind and SQLSTATE alone: its text is in any language, and may quote the address.
    """
    if isinstance(error, psycopg.Error) and error.sqlstate is None:
        return "the connection was lost", True
    state = getattr(error, "sqlstate", None)
    if state:
        may_pass = (state.startswith(PASSING) and state != "08P01") or state == "25006"
        return REASONS.get(state, f"{type(error).__name__} (SQLSTATE {state})"), may_pass
    if isinstance(error, asyncpg.TargetServerAttributeNotMatched):
        return "no server is as target_session_attrs wants it", True
    if isinstance(error, TimeoutError):
        return "it does not answer", True
    if isinstance(error, ssl.SSLCertVerificationError):
        return "the server's certificate is not to be trusted", False
    if type(error) is ConnectionError:  # asyncpg's own
        return "the server refuses to encrypt", True
    if isinstance(error, OSError):
        number = error.errno or 0  # below 0 for a name that is not known
        reason = os.strerror(number) if number > 0 else "it cannot be reached"
        return reason, not isinstance(error, PermissionError | ssl.SSLError)
    return f"no connection can be made like this ({type(error).__name__})", False
