"""Tells when the database went back in time beneath a running process."""

import secrets

from plumbing.database import Database

TOKEN_BYTES = 8

HEARTBEAT = """  -- process, known, following
    -- heartbeats_pkey, heartbeats_by_age
    select * from heartbeat(of_process => $1, known => $2, following => $3)"""


class Heartbeat:
    """Writes a token to the database again and again, each in the place of the last one: where that
    is not there any more, what was committed since an earlier beat is lost.

    So a restored backup is noticed, whatever it lacks. A promoted standby may lack what was
    committed after the last beat: each of them counts as such a loss.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._begin()

    def _begin(self) -> None:
        self._process = secrets.token_hex(TOKEN_BYTES)
        self._known: list[str] = []  # the last beat, once there was one
        self._following = secrets.token_hex(TOKEN_BYTES)  # the database may have it by now
        self._timeline: str | None = None

    async def beat(self, is_needed: bool) -> bool:
        """Beat; where the database can only be read, look whether the last beat is there. Tells
        whether nothing is lost. Raises Unavailable.

        Where it is not needed, the database is left alone, and what it loses is not told.
        """
        if not is_needed:
            if self._known or self._timeline:
                self._begin()
            return True
        stands, timeline = await self._database.row(
            HEARTBEAT, self._process, self._known, self._following)
        is_lost = (stands is None and bool(self._known)) or (
            None not in (timeline, self._timeline) and timeline != self._timeline)
        if is_lost:
            self._begin()
        elif stands == self._following:
            self._known, self._following = [stands], secrets.token_hex(TOKEN_BYTES)
        self._timeline = timeline or self._timeline
        return not is_lost
