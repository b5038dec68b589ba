-- The whole of what the messenger keeps: accounts, chats, messages, who read what.
-- Every statement may run twice: a server killed between a migration and its mark runs it again.
-- Keys that ignore case (*_key) and words for search are folded by the server, never by the
-- database's locale, and compare by bytes (collate "C").

create table if not exists users (
    id            bigint generated always as identity primary key,
    -- null once the account is deleted: the email and the name are free again
    email         text,
    email_key     text collate "C",
    username      text,
    username_key  text collate "C",
    password_hash text,
    is_active     boolean     not null default true,
    created_at    timestamptz not null default now(),
    deleted_at    timestamptz
);
create unique index if not exists users_email_taken on users (email_key);
create unique index if not exists users_username_taken on users (username_key);

create table if not exists sessions (
    id           bigint generated always as identity primary key,
    user_id      bigint      not null references users (id),
    -- how often it was refreshed; a refresh token names the generation that it belongs to
    generation   bigint      not null default 0,
    rotated_at   timestamptz not null default now(),
    created_at   timestamptz not null default now(),
    last_used_at timestamptz not null default now(),
    user_agent   text,
    ended_at     timestamptz
);
create index if not exists sessions_of_user on sessions (user_id) where ended_at is null;
create index if not exists sessions_ended on sessions (ended_at) where ended_at is not null;

-- What is counted to slow down guessing: 'login:<email key>' and the like, one row each attempt.
create table if not exists attempts (
    key text collate "C" not null,
    at  timestamptz      not null default now()
);
create index if not exists attempts_by_key on attempts (key, at);
create index if not exists attempts_by_age on attempts (at);

-- A chat's row is its lock: whoever changes the chat, its participants or its messages takes it
-- first. Free space on each page keeps the update of every post in place (HOT).
create table if not exists chats (
    id                bigint generated always as identity primary key,
    is_group          boolean     not null,
    name              text,
    -- the two users of a personal chat, the smaller id first; null in a group
    low_user_id       bigint,
    high_user_id      bigint,
    created_at        timestamptz not null default now(),
    active_at         timestamptz not null default now(),
    last_rev          bigint      not null default 0,  -- the last number that was taken
    last_seq          bigint      not null default 0,  -- the newest message's
    version           bigint      not null default 1,  -- of name and participants
    participant_count int         not null default 0,
    indexed_rev       bigint      not null default 0,  -- changes up to here are in message_words
    constraint chats_pair unique (low_user_id, high_user_id)
) with (fillfactor = 50);
create index if not exists chats_empty on chats (id) where participant_count = 0;

create table if not exists participants (
    chat_id       bigint      not null references chats (id),
    user_id       bigint      not null references users (id),
    role          text        not null check (role in ('owner', 'admin', 'member')),
    ordinal       bigint generated always as identity,    -- the order of joining
    joined_at     timestamptz not null default now(),
    joined_seq    bigint      not null default 0,         -- the newest message at that time
    last_read_seq bigint      not null default 0,
    last_read_at  timestamptz not null default now(),
    version       bigint      not null default 1,         -- the chat's at joining or a new role
    primary key (chat_id, user_id)
) with (fillfactor = 80);
create index if not exists participants_of_user on participants (user_id, chat_id);
create index if not exists participants_by_ordinal on participants (chat_id, ordinal);
create index if not exists participants_joined on participants (joined_at);

-- Who left, at which version of the chat: so that a process that knows an older version can tell.
create table if not exists departures (
    chat_id bigint      not null,
    version bigint      not null,
    user_id bigint      not null,
    left_at timestamptz not null default now(),
    primary key (chat_id, version, user_id)
);

-- No foreign keys here: they would deadlock with removals. The id is unique within its chat, so
-- that the chat's lock covers it.
create table if not exists messages (
    chat_id    bigint      not null,
    seq        bigint      not null,
    rev        bigint      not null,
    id         uuid        not null,
    sender_id  bigint      not null,
    text       text        not null,
    reply_to   uuid,
    created_at timestamptz not null,
    edited_at  timestamptz,
    deleted_at timestamptz,
    primary key (chat_id, seq),
    constraint messages_id unique (chat_id, id)
);
create index if not exists messages_changed on messages (chat_id, rev) where rev <> seq;

-- One row for each step forward of a reader, covering the messages (from_seq, seq].
create table if not exists reads (
    chat_id  bigint      not null,
    user_id  bigint      not null,
    from_seq bigint      not null,
    seq      bigint      not null,
    read_at  timestamptz not null,
    primary key (chat_id, user_id, seq)
);
create index if not exists reads_by_age on reads (read_at);

-- The words of a message for search, each as '<chat id>:<word>', so that a search inside one chat
-- is one look-up for each word. Filled in the background, up to chats.indexed_rev.
create table if not exists message_words (
    chat_id bigint not null,
    seq     bigint not null,
    words   text[] not null,
    primary key (chat_id, seq)
);
create index if not exists message_words_search on message_words using gin (words);
