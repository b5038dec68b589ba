"""What an administrator does by hand: `messenger.py user COMMAND`.

    messenger.py user list                      every account: id, state, email, username
    messenger.py user create EMAIL USERNAME     make one, and print its first password
    messenger.py user disable EMAIL             sign it out everywhere, and keep it out
    messenger.py user enable EMAIL              let it in again
    messenger.py user reset-password EMAIL      print a new password, and sign it out everywhere
    messenger.py user delete EMAIL              delete it, as its owner could; its messages stay

It takes the settings of the server from the environment, and works beside a running server or
without one. A running server acts on it within two seconds.
"""

import contextlib
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from asyncpg import UniqueViolationError

import messenger as m
from plumbing.credentials import checked_email, checked_username
from plumbing.database import Database, Unavailable
from plumbing.embedded import Postgres
from plumbing.endpoints import InternalError, Problem, as_problem
from plumbing.guard import Passwords
from plumbing.process import StartError
from plumbing.schema import migrate_when_up
from tools.databases import run

# How many arguments each command takes.
COMMANDS = {
    "list": 0, "create": 2, "disable": 1, "enable": 1, "reset-password": 1, "delete": 1}
PAGE_ROWS = 1000
PASSWORD_BYTES = 12  # of randomness, in a password that is printed

SELECT_ACCOUNT = """  -- email_key
    -- users_email_taken
    select id from users where email_key = $1"""

SELECT_ACCOUNTS = """  -- after, limit
    -- users_pkey
    select u.id, u.email, u.username,
           case when u.is_disabled then 'disabled' when u.is_active then 'active'
                else 'inactive' end as state
    from users u where u.id > $1 and u.deleted_at is null order by u.id limit $2"""

DISABLE_USER = """  -- user_id, disabled, until
    -- users_pkey, sessions_of_user; locks the user
    select ended from disable_user(target => $1, disabled => $2) ended where in_time(until => $3)"""

RESET_PASSWORD = """  -- user_id, password_hash, until
    -- users_pkey, attempts_by_key, sessions_of_user; locks the user
    select ended from reset_password(target => $1, new_hash => $2) ended
    where in_time(until => $3)"""  # noqa: S105


async def list_accounts(database: Database) -> None:
    """Print every account."""
    last = 0
    while rows := await database.rows(SELECT_ACCOUNTS, last, PAGE_ROWS):
        for row in rows:
            print("{id:>8}  {state:8}  {email}  {username}".format(**row))
        last = rows[-1]["id"]


async def create_account(
    database: Database, passwords: Passwords, email: str, username: str
) -> None:
    """Make an account, and print its first password. Raises Problem."""
    names = *checked_email(email), *checked_username(username)
    password = secrets.token_urlsafe(PASSWORD_BYTES)
    try:
        row = await database.row(m.INSERT_USER, *names, await passwords.hash(password))
    except UniqueViolationError as error:
        raise as_problem(error) or error from None
    print(f"user {row['id']} has the password {password}")


async def change_account(
    database: Database, passwords: Passwords, verb: str, email: str
) -> None:
    """Disable, enable or delete an account, or give it another password. Raises Problem."""
    user_id = await database.value(SELECT_ACCOUNT, checked_email(email)[1])
    if user_id is None:
        raise m.UserNotFound
    if verb == "reset-password":
        password = secrets.token_urlsafe(PASSWORD_BYTES)
        await database.change(RESET_PASSWORD, user_id, await passwords.hash(password))
        print(f"user {user_id} has the password {password}")
        return
    if verb == "delete":
        await database.change(m.DELETE_USER, user_id)
        while await database.row(m.LEAVE_NEXT_CHAT, user_id):
            pass  # each chat in a transaction of its own
    else:
        await database.change(DISABLE_USER, user_id, verb == "disable")
    print(f"user {user_id} is {verb}d")


async def obey(
    database: Database, passwords: Passwords, command: str, arguments: Sequence[str]
) -> None:
    """Do what the command line asks for. Raises Problem."""
    if command == "list":
        await list_accounts(database)
    elif command == "create":
        await create_account(database, passwords, *arguments)
    else:
        await change_account(database, passwords, command, *arguments)


async def administer(settings: m.Settings, command: str, arguments: Sequence[str]) -> None:
    """Find the database, starting it where no server runs, and obey. Raises StartError, Problem."""
    async with contextlib.AsyncExitStack() as stack:
        url, name = settings.database, "DATABASE_URL"
        if not url:
            server = Postgres(Path(settings.data_dir))
            stack.push_async_callback(server.stop)
            await server.start_or_join()
            url, name = server.dsn, "the embedded PostgreSQL"
        await migrate_when_up(url, m.SQL, name)
        database = Database(url)
        stack.push_async_callback(database.close)
        passwords = Passwords(settings.bcrypt_cost)
        stack.callback(passwords.close)
        await obey(database, passwords, command, arguments)


def read_command(line: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Read a command and its arguments. Raises StartError, before anything is started for it."""
    if len(line) < 2 or line[0] != "user" or COMMANDS.get(line[1]) != len(line) - 2:
        raise StartError(f"no such command\n\n{__doc__}")
    return line[1], line[2:]


async def answer(settings: m.Settings, command: str, arguments: Sequence[str]) -> int:
    """Administer, and answer the exit status. Raises StartError."""
    try:
        await administer(settings, command, arguments)
    except (Problem, Unavailable) as error:
        raise StartError((as_problem(error) or InternalError()).detail) from None
    sys.stdout.flush()
    return 0


def main(line: Sequence[str]) -> int:
    """Obey the command line; answer the exit status."""
    return run(lambda settings: answer(settings, *read_command(line)))
