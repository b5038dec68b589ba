"""Whether a database holds what the messenger promises: `messenger.py verify [FILE]`.

Every rule is a statement that finds what breaks it: none finds anything in a sound database. All of
them see the same moment, so a server may go on beside them. A backup is put into a PostgreSQL of
its own first, which is thrown away.

What was written before marks came (schema 7) has no trace of edits that were edited again: there
numbers may be missing, and are not looked for.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import messenger as m
from plumbing.embedded import Postgres
from plumbing.process import StartError
from plumbing.schema import schema_number
from tools.databases import Place, connected, find_programs, load, opened, run

NAMED = 3  # of what breaks a rule, in words

SELECT_COUNTS = """
    select (select count(*) from users where deleted_at is null) as accounts,
           (select count(*) from users where deleted_at is not null) as "deleted accounts",
           (select count(*) from sessions where ended_at is null) as sessions,
           (select count(*) from chats) as chats,
           (select count(*) from participants) as participants,
           (select count(*) from messages) as messages,
           (select count(*) from messages where edited_at is not null) as "of them edited",
           (select count(*) from messages where deleted_at is not null) as "of them deleted",
           (select count(*) from revisions) as "edits and deletions",
           (select count(*) from reads) as "steps of readers",
           (select count(*) from message_words) as "messages indexed"
"""

# Each rule by what it says, and what finds those who break it, in words. A chat that nobody is in
# is being swept away, piece by piece.
RULES = {
    "the numbers of a chat have no holes, and none is taken twice": """
        with numbers as (
            select chat_id, seq as number from messages where mark <> '0'
            union all select chat_id, rev from revisions
            union all select id, 0 from chats where not exists (
                select from messages where chat_id = chats.id and mark = '0')
        ), steps as (
            select chat_id, number,
                   lead(number) over (partition by chat_id order by number) as following
            from numbers
        )
        select 'chat ' || c.id || case when s.following = s.number then ' has two of ' || s.number
                                       else ' lacks ' || s.number + 1 end
        from steps s join chats c on c.id = s.chat_id and c.participant_count > 0
        where coalesce(s.following, c.last_rev + 1) <> s.number + 1""",
    "last_rev and last_seq are the newest there are": """
        select 'chat ' || c.id from chats c
        left join (
            select chat_id, max(seq) as seq, max(rev) as rev from messages group by chat_id
        ) m on m.chat_id = c.id
        where c.participant_count > 0
          and (c.last_seq <> coalesce(m.seq, 0) or c.last_rev < coalesce(m.rev, 0)
               or (c.last_rev > 0) <> (m.seq is not null))""",
    "the rev of a message is its own, and not before its seq": """
        select 'chat ' || m.chat_id || ', message ' || m.seq from messages m
        left join (
            select chat_id, rev from messages group by chat_id, rev having count(*) > 1
        ) twice on twice.chat_id = m.chat_id and twice.rev = m.rev
        where m.rev < m.seq or twice.rev is not null""",
    "an edit or deletion is noted with its mark": """
        select 'chat ' || m.chat_id || ', message ' || m.seq from messages m
        left join revisions r on r.chat_id = m.chat_id and r.rev = m.rev
        where (m.changed_mark is not null and r.mark is distinct from m.changed_mark)
           or (m.rev <> m.seq and m.mark <> '0' and m.changed_mark is null)
           or (m.rev = m.seq and m.changed_mark is not null)""",
    "last_mark is the mark of last_rev": """
        select 'chat ' || c.id from chats c
        where c.participant_count > 0 and c.last_rev > 0
          and c.last_mark <> mark_at(chat => c.id, number => c.last_rev)""",
    "a message id is one message of its chat": """
        select 'chat ' || chat_id || ', id ' || id from messages
        group by chat_id, id having count(*) > 1""",
    "a reply is to a message of its chat": """
        select 'chat ' || m.chat_id || ', message ' || m.seq from messages m
        where m.reply_to is not null and not exists (
            select from messages r where r.chat_id = m.chat_id and r.id = m.reply_to)""",
    "a deleted message has no text, any other has": """
        select 'chat ' || chat_id || ', message ' || seq from messages
        where (deleted_at is not null) <> (text = '')""",
    "a watermark is between the joining and the newest message": """
        select 'chat ' || p.chat_id || ', user ' || p.user_id
        from participants p join chats c on c.id = p.chat_id
        where not p.joined_seq between 0 and p.last_read_seq or p.last_read_seq > c.last_seq""",
    "no step of a reader leads beyond the watermark": """
        select 'chat ' || r.chat_id || ', user ' || r.user_id
        from reads r join chats c on c.id = r.chat_id
        left join participants p on p.chat_id = r.chat_id and p.user_id = r.user_id
        where r.from_seq >= r.seq
           or (c.participant_count > 0 and r.seq > coalesce(p.last_read_seq, c.last_seq))""",
    "participants are counted": """
        select 'chat ' || c.id || ' says ' || c.participant_count from chats c
        left join (select chat_id, count(*) from participants group by chat_id) p
            on p.chat_id = c.id
        where c.participant_count <> coalesce(p.count, 0)""",
    "a group has one owner, a personal chat its two users as members": """
        select 'chat ' || c.id from chats c join participants p on p.chat_id = c.id
        group by c.id
        having (c.is_group and count(*) filter (where p.role = 'owner') <> 1)
            or (c.is_group <> (c.low_user_id is null))
            or (not c.is_group and (c.low_user_id >= c.high_user_id or bool_or(
                p.role <> 'member' or p.user_id not in (c.low_user_id, c.high_user_id))))""",
    "participants came one after the other": """
        select 'chat ' || chat_id || ', ordinal ' || ordinal from participants
        group by chat_id, ordinal having count(*) > 1""",
    "no participant or departure is of a later version than its chat": """
        select 'chat ' || p.chat_id || ', user ' || p.user_id
        from (select chat_id, user_id, version from participants
              union all select chat_id, user_id, version from departures) p
        join chats c on c.id = p.chat_id where p.version > c.version""",
    "everything in a chat has its chat": """
        select distinct 'chat ' || o.chat_id || ' is none, and has ' || o.kind
        from (select chat_id, 'messages' as kind from messages
              union all select chat_id, 'participants' from participants
              union all select chat_id, 'departures' from departures
              union all select chat_id, 'revisions' from revisions
              union all select chat_id, 'reads' from reads
              union all select chat_id, 'words' from message_words
              union all select chat_id, 'search_positions' from search_positions) o
        where not exists (select from chats c where c.id = o.chat_id)""",
    "everything of a user has its user": """
        select distinct 'user ' || o.user_id || ' is none, and has ' || o.kind
        from (select user_id, 'sessions' as kind from sessions
              union all select user_id, 'participants' from participants
              union all select user_id, 'departures' from departures
              union all select user_id, 'reads' from reads
              union all select sender_id, 'messages' from messages) o
        where not exists (select from users u where u.id = o.user_id)""",
    "a deleted account keeps no name, session or chat": """
        select 'user ' || u.id from users u
        where u.deleted_at is not null and (
            coalesce(u.email, u.email_key, u.username, u.username_key, u.password_hash) is not null
            or exists (select from sessions s where s.user_id = u.id and s.ended_at is null)
            or (not u.is_leaving
                and exists (select from participants p where p.user_id = u.id)))""",
    "the index of words has what it says": """
        select 'chat ' || i.chat_id || ', message ' || m.seq
        from search_positions i join chats c on c.id = i.chat_id and c.participant_count > 0
        join messages m on m.chat_id = i.chat_id and m.rev <= i.rev
        left join message_words w on w.chat_id = m.chat_id and w.seq = m.seq
        where w.seq is null
        union all
        select 'chat ' || i.chat_id || ' is indexed up to ' || i.rev
        from search_positions i join chats c on c.id = i.chat_id where i.rev > c.last_rev
        union all
        select 'chat ' || w.chat_id || ', message ' || w.seq || ' is none'
        from message_words w join chats c on c.id = w.chat_id and c.participant_count > 0
        left join messages m on m.chat_id = w.chat_id and m.seq = w.seq where m.seq is null""",
    "ids that are given next are new": """
        select s.name from (values
            ('users', pg_sequence_last_value(pg_get_serial_sequence('users', 'id')::regclass),
             (select max(id) from users)),
            ('chats', pg_sequence_last_value(pg_get_serial_sequence('chats', 'id')::regclass),
             (select max(id) from chats)),
            ('sessions',
             pg_sequence_last_value(pg_get_serial_sequence('sessions', 'id')::regclass),
             (select max(id) from sessions)),
            ('participants',
             pg_sequence_last_value(pg_get_serial_sequence('participants', 'ordinal')::regclass),
             (select max(ordinal) from participants))
        ) s (name, given, used) where s.used > coalesce(s.given, 0)""",
}


@dataclass(frozen=True)
class Findings:
    """What is in a database, and what is wrong with it."""

    counts: Mapping[str, int]
    broken: Mapping[str, list[str]]  # rule: who breaks it

    def tell(self) -> None:
        """Print the counts as a table, then each rule that is broken, with the first few."""
        for name, count in self.counts.items():
            print(f"{name:20}{count:>15,}")
        for rule, found in self.broken.items():
            named = "; ".join(found[:NAMED]) + ("; ..." if len(found) > NAMED else "")
            print(f"WRONG: {rule}: {len(found):,} times not ({named})")
        print(f"{len(RULES) - len(self.broken)} of {len(RULES)} rules hold", flush=True)


async def examine(connection: Any) -> Findings:
    """Hold what a connection sees against every rule."""
    counts = dict(await connection.fetchrow(SELECT_COUNTS))
    broken = {}
    for rule, statement in RULES.items():
        if found := await connection.fetch(statement):
            broken[rule] = [row[0] for row in found]
    return Findings(counts, broken)


async def examine_place(place: Place) -> Findings:
    """Hold one moment of a database against every rule. Raises StartError."""
    async with (
        connected(place) as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        return await examine(connection)


async def require_present_schema(place: Place) -> None:
    """Insist that a database has the schema that the rules are about. Raises StartError."""
    number = await place.schema()
    if number != (ours := schema_number(m.SQL)):
        raise StartError(
            f"{place.name} is of schema {number}, and this messenger of {ours}: start it once"
            if number < ours else f"{place.name} is of a newer messenger: use that one")


async def verify_file(file: Path) -> Findings:
    """Put a backup into a PostgreSQL that lasts as long as this, and examine it."""
    with tempfile.TemporaryDirectory(prefix="messenger-verify-") as folder:
        server = Postgres(Path(folder), scratch=True)
        try:
            await server.start()
            place = Place(server.dsn, str(file), find_programs(0, needs_tls=False))
            await load(place, file)
            return await examine_place(place)
        finally:
            await server.stop()


async def verify(settings: m.Settings, file: Path | None) -> int:
    """Tell what is in a database or a backup, and what is wrong; answer the exit status."""
    if file is not None:
        findings = await verify_file(file)
    else:
        async with opened(settings) as place:
            await require_present_schema(place)
            findings = await examine_place(place)
    findings.tell()
    return 1 if findings.broken else 0


def main(line: Sequence[str]) -> int:
    """Obey the command line; answer the exit status."""
    parser = argparse.ArgumentParser(
        prog="./run verify", description="check a database, or a backup, against every rule")
    parser.add_argument("file", type=Path, nargs="?", help="a backup; else: the server's database")
    given = parser.parse_args(line)
    return run(lambda settings: verify(settings, given.file))
