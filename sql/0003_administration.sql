-- An administrator disables accounts, old rows are purged, and a login may make a hash dearer.
-- Other than is_active, which a login sets again, this keeps its user out.
alter table users add column if not exists is_disabled boolean not null default false;

-- For the purge of sessions whose refresh token has expired.
create index if not exists sessions_by_rotation on sessions (rotated_at);

-- It now takes the dearer hash and the address's attempt, too.
drop function if exists start_session(bigint, text, text, text);
