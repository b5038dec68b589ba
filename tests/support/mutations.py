"""The bugs that the checker must find: each is put into a copy of the messenger, from outside."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from support.servers import ROOT


@dataclass(frozen=True)
class Mutation:
    """A bug, the faults that bring it out, and the counts of which one must tell of it."""

    name: str
    told_by: tuple[str, ...]
    faults: tuple[str, ...]
    changes: tuple[tuple[str, str, str], ...]  # file, what stands there, what is put there
    seconds: float = 6.0  # how long the clients go on


FUNCTIONS, SCHEMA = "sql/functions.sql", "sql/0001_schema.sql"
READ_ONLY_FAULTS = ("database read-only", "connections read-only")
CRASH = ("postmaster killed", "backend killed")
RESTORE = ("database restored",)
FAILOVER = ("primary lost, standby cut off",)
# The commit follows a tenth of a second after the answer.
COMMITS = "        return await self._app[DATABASE].rows(self.STATEMENT, *columns, *others)\n"
ANSWERS_EARLY = '''        if self.STATEMENT is not POST_MESSAGES:
            return await self._app[DATABASE].rows(self.STATEMENT, *columns, *others)
        import asyncpg
        connection = await asyncpg.connect(self._app[DATABASE].url, timeout=2)
        transaction = connection.transaction()
        await transaction.start()
        rows = await connection.fetch(POST_MESSAGES, *columns, *others)
        async def finish():
            await asyncio.sleep(0.1)
            try:
                await transaction.commit()
            finally:
                await connection.close()
        asyncio.ensure_future(finish())
        return rows
'''
# The parts of post_messages_2 that are moved or taken away.
LOCK = """    select array_agg(c.id), array_agg(c.last_mark) into locked, marks
    from (select x.id, x.last_mark from chats x where x.id = any (chat_ids)
          order by x.id for no key update) c;
    at := clock_timestamp();

"""
ACCEPTED = "    accepted := array(\n        select i.item from unnest(chat_ids, sender_ids, ids)\n"
NOT_THERE = """
        where not exists (select from messages m where m.chat_id = i.chat_id and m.id = i.id));
"""
FIRST_COUNTS = """    accepted := array(
        select min(item) from unnest(accepted) as item group by chat_ids[item], ids[item]);
"""
STORED_ONE = """    left join messages m on m.chat_id = i.chat_id and m.id = i.id
    order by i.item;"""
STORED_LAST = """    left join lateral (
        select * from messages x where x.chat_id = i.chat_id and x.id = i.id
        order by x.seq desc limit 1) m on true
    order by i.item;"""
IN_GROUPS = (  # a lone message goes the way of a group, where the bug is
    "messenger.py", "        if len(items) > 1:\n", "        if items:\n")
SEQUENCES = """
do $$ begin
    for number in 1 .. 9 loop
        execute format('create sequence if not exists numbers_%s', number);
    end loop;
end $$;
"""
READ_ONLY = '"25006", '  # among the states that mean that the database is away
HELD = '"55P03", '  # among those that mean that it is busy
PAGE_END = """ and len(rows) < REPLAY_PAGE:
        replay.at, replay.mark = upto, mark
"""

MUTATIONS = (
    Mutation("synchronous_commit=off", ("lost",), CRASH, (
        ("plumbing/database.py", '"synchronous_commit": "on"', '"synchronous_commit": "off"'),)),
    Mutation("no idempotency", ("doubled",), ("worker killed", *CRASH), (
        (SCHEMA, ",\n    constraint messages_id unique (chat_id, id)", ""),
        IN_GROUPS,
        (FUNCTIONS, NOT_THERE, ");\n"),
        (FUNCTIONS, FIRST_COUNTS, ""),
        (FUNCTIONS, STORED_ONE, STORED_LAST))),
    Mutation("sequence numbers instead of the chat's lock", ("missed", "misordered"), CRASH, (
        (SCHEMA, "constraint messages_id unique (chat_id, id)\n);\n",
         "constraint messages_id unique (chat_id, id)\n);\n" + SEQUENCES),
        IN_GROUPS,
        (FUNCTIONS, LOCK + ACCEPTED, "    at := clock_timestamp();\n" + ACCEPTED),
        (FUNCTIONS, "c.last_rev + row_number() over (partition by i.chat_id order by i.item) as",
         "nextval('numbers_' || i.chat_id) as"),
        (FUNCTIONS, "set last_rev = p.seq, last_seq = p.seq,",
         "set last_rev = greatest(c.last_rev, p.seq), last_seq = greatest(c.last_seq, p.seq),"),
        (FUNCTIONS, "set last_rev = c.last_rev + 1, last_mark",
         "set last_rev = greatest(c.last_rev, nextval('numbers_' || c.id)), last_mark"))),
    Mutation("an answer before the commit", ("lost",), ("worker killed", *CRASH), (
        IN_GROUPS, ("messenger.py", COMMITS, ANSWERS_EARLY))),
    Mutation("no holes filled", ("missed",), ("listeners cut",), (
        ("messenger.py",
         "if fresh and len(fresh) == rev - room.delivered and before == room.mark:",
         "if fresh:"),)),
    Mutation("no polls", ("missed",), ("hints dropped",), (
        ("messenger.py", "repeat(self.poll, seconds", "repeat(asyncio.sleep, 0, seconds"),), 11.0),
    Mutation("membership checked before the lock", ("leaked",), ("listeners cut",), (
        IN_GROUPS,
        (FUNCTIONS, LOCK + ACCEPTED, ACCEPTED),
        (FUNCTIONS, NOT_THERE, NOT_THERE + LOCK)), 9.0),
    Mutation("late removal", ("leaked",), ("listeners cut",), (
        ("messenger.py", "in departed:\n            rooms.leave_chat(",
         "in departed:\n            room.filling.get_loop().call_later(0.3, rooms.leave_chat, "),)),
    Mutation("a watermark that may go back", ("misordered",), ("listeners cut",), (
        (FUNCTIONS, "        where m.seq > p.last_read_seq\n        group by p.chat_id",
         "        group by p.chat_id"),)),
    Mutation("live after one page of a replay", ("missed",), ("worker killed",), (
        ("messenger.py", PAGE_END, f"{PAGE_END}    rooms.go_live(socket, room)\n"),)),
    Mutation("a held chat is an error", ("wrong",), ("chat held",), (
        ("plumbing/database.py", HELD, ""),)),
    Mutation("a read-only database is an error", ("wrong",), READ_ONLY_FAULTS, (
        ("plumbing/database.py", READ_ONLY, ""),)),
    Mutation("an answer before the standby has it", ("lost",), FAILOVER, (
        ("plumbing/database.py", '"synchronous_commit": "on"', '"synchronous_commit": "local"'),),
        8.0),
    Mutation("a room that goes on after a restore", ("fooled",), RESTORE, (
        ("messenger.py", "rev < known_rev or is_other or version < known_version", "False"),
        ("messenger.py", " and before == room.mark", ""),
        ("messenger.py", 'if rows[0]["known_mark"] != room.mark:', "if False:"),
        ("messenger.py", 'if rows[0]["mark"] != replay.mark:', "if False:")), 12.0),
    Mutation("marks that are not compared", ("fooled",), RESTORE, (
        ("messenger.py", "if claimed is not None and claimed != mark:", "if False:"),), 12.0),
)


def mutated(folder: Path, mutation: Mutation | None) -> Path:
    """Copy the messenger, and put a bug into it. Raises ValueError if its text is not found."""
    tree = folder / "tree"
    shutil.copytree(ROOT / "sql", tree / "sql")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tree)
    shutil.copytree(ROOT / "plumbing", tree / "plumbing")
    for name, old, new in mutation.changes if mutation is not None else ():
        text = (tree / name).read_text()
        if text.count(old) != 1:
            raise ValueError(f"{mutation}: {name} has {text.count(old)} times:\n{old}")
        (tree / name).write_text(text.replace(old, new))
    return tree
