-- Search and the deletion of accounts come into use.
-- The words of messages are indexed in the background. How far they are in a chat stands beside
-- the chats, not in them: that row is the lock of every post. The words are now kept in stretches
-- of 65,536 messages, '<chat id>:<stretch>:<word>', so that a page of a word that everybody uses
-- costs one stretch and not the whole chat. Nothing was in the table yet.
alter table chats drop column if exists indexed_rev;

create table if not exists search_positions (
    chat_id bigint primary key,
    rev     bigint not null  -- changes up to here are in message_words
);

-- The deletion of an account leaves its chats one by one, and may be interrupted.
alter table users add column if not exists is_leaving boolean not null default false;
create index if not exists users_leaving on users (id) where is_leaving;

-- It now answers the participant, too.
drop function if exists put_participant(bigint, bigint, bigint, text, int);
