-- transactional: false
--
-- (Each statement by itself: a transaction would hold the lock on one table while it waits for the
-- next, and servers that are running do it the other way round.)
--
-- Marks. A mark is random, and made once for each call that posts, edits or deletes; every change of
-- that call carries it. So a number with its mark vouches for all changes up to it: the chat's lock
-- orders commits, and who has seen the same mark has seen the same history. What is from before
-- this migration has the mark '0'.
alter table messages add column if not exists mark text collate "C" not null default '0';
alter table messages add column if not exists changed_mark text collate "C";  -- null: as posted
alter table chats add column if not exists last_mark text collate "C" not null default '0';

-- The marks of edits and deletions; those of posts stand with the messages. Swept with the chat.
create table if not exists revisions (
    chat_id bigint           not null,
    rev     bigint           not null,
    mark    text collate "C" not null,
    primary key (chat_id, rev)
);

-- The secret stands in the session's tokens too: a restored database gives ids again, and an old
-- token must not become somebody else's. Tokens of sessions from before have none.
-- Whether a token of the newest generation was used: until then the one before may be used again.
alter table sessions add column if not exists secret text collate "C" not null default '';
alter table sessions add column if not exists is_used boolean not null default false;
