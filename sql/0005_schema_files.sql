-- Which text of views.sql and functions.sql a database has stands in this table, and no longer in a
-- comment on message_view. That comment stays as it is: a server of the last release that starts
-- again finds its own digest there, and does not put its functions in place of the new ones.
create table if not exists schema_files (
    name   text primary key,
    digest text not null  -- SHA-256, in hexadecimal, of the file as it was last applied
);

-- The statements of the release before this one call the functions below, which a new database does
-- not get. A database that has them keeps them while servers of that release may still run on it;
-- the next release may drop them:
--     accounts_after, chats_before, chats_followed, history_after, history_before, history_found,
--     lately_joined, message_changes, missed_messages, participants_after, purge_old, room_news,
--     sessions_after, start_session, unindexed_messages, users_after
