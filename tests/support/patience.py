"""More patience with the database than the messenger has by itself.

No request waits over two seconds: it is refused then. On a machine that is busy with other things
that may happen to any, and is no fault. So the servers of the tests wait longer: those in the
tests' own process by the fixture `patience`, those of their own by launch_messenger.py. A test that
is about the deadlines is marked `real_deadlines`.
"""

from plumbing import database

PATIENCE = {"CONNECT_SECONDS": 14.0, "WAIT_SECONDS": 15.0, "WRITE_SECONDS": 15.0}


def begin() -> None:
    """Have more patience in this process from now on."""
    for name, seconds in PATIENCE.items():
        assert hasattr(database, name), name
        setattr(database, name, seconds)
