"""Tells when the database went back in time beneath a running process."""

import secrets

from plumbing.database import Database

TOKEN_BYTES = 8

BEAT = """  -- process, known, following
    -- heartbeats_pkey
    select beat(of_process => $1, known => $2, following => $3)"""


class Heartbeat:
    """Writes a token to the database again and again, each in the place of the last one: where that
    is not there any more, what was committed since an earlier beat is lost.

    So a restored backup is noticed, and a standby that lacks the last commits, whatever they lack.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._begin()

    def _begin(self) -> None:
        self._process = secrets.token_hex(TOKEN_BYTES)
        self._known: list[str] = []  # the last beat, once there was one
        self._following = secrets.token_hex(TOKEN_BYTES)  # the database may have it by now

    async def beat(self) -> bool:
        """Beat; where the database can only be read, look whether the last beat is there. Tells
        whether nothing is lost. Raises Unavailable.
        """
        stands = await self._database.value(BEAT, self._process, self._known, self._following)
        if stands == self._following:
            self._known, self._following = [stands], secrets.token_hex(TOKEN_BYTES)
        is_lost = stands is None and bool(self._known)
        if is_lost:
            self._begin()
        return not is_lost
