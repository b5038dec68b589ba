-- What each process that has sockets wrote last: once a second a token that nobody else knows. Where
-- it is gone, the database went back in time beneath the process.
create table if not exists heartbeats (
    process   text primary key,
    beat      text not null,
    beaten_at timestamptz not null default now()
);
-- Those of processes that are no more are deleted, and found by this.
create index if not exists heartbeats_by_age on heartbeats (beaten_at);
