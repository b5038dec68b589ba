-- Who left is told to processes that know an older version of the chat. None can need that once
-- every token of the time has expired, so old ones are purged, and found by this.
create index if not exists departures_by_age on departures (left_at);
