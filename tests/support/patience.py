"""More patience with the database than the messenger has by itself.

No request waits over two seconds: it is refused then. On a machine that is busy with other things
that may happen to any, and is no fault. So the servers of the tests wait longer: those in the
tests' own process by the fixture `patience`, those of their own by launch_messenger.py. A test that
is about the deadlines is marked `real_deadlines`.
"""

from typing import Any

import pytest

from plumbing import database, deadline, groups

SECONDS = 15.0
BOUNDS = (
    (database, "CONNECT_SECONDS"), (database, "WAIT_SECONDS"), (database, "SILENCE_SECONDS"),
    (groups, "WRITE_SECONDS"), (deadline, "REQUEST_SECONDS"))
TIMEOUTS = {"statement_timeout": "15000", "lock_timeout": "7500"}


def begin(patch: Any = None) -> None:
    """Have more patience in this process from now on, or as long as pytest's patch lasts."""
    patch = patch or pytest.MonkeyPatch()
    for module, name in BOUNDS:
        patch.setattr(module, name, SECONDS)
    for name, value in TIMEOUTS.items():
        patch.setitem(database.SESSION, name, value)
