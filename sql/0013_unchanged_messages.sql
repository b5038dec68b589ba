-- What changed in a chat is read in two scans: of messages that were changed, and of those that never
-- were. The second went through all the others by the primary key, and a chat may hold millions that
-- were deleted or edited.
create index if not exists messages_unchanged on messages (chat_id, seq) where rev = seq;
