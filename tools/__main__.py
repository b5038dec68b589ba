"""What is done by hand: `messenger.py COMMAND`, each command a program of this folder.

    user       accounts, by an administrator
    backup     write a backup
    restore    put a backup in the place of the database
    verify     check a database or a backup
    move       carry an embedded database to one's own PostgreSQL
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)
from tools import administer, backup, move, restore, verify  # noqa: E402

PROGRAMS = {
    "backup": backup.main, "restore": restore.main, "verify": verify.main, "move": move.main}


def main() -> int:
    """Obey the command line; answer the exit status."""
    program = PROGRAMS.get(sys.argv[1]) if sys.argv[1:] else None
    return program(sys.argv[2:]) if program else administer.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
