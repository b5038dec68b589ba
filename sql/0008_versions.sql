-- Which servers may use this database, in one row. A migration that older servers cannot live with
-- comes after one that raises `oldest`: then those that start refuse to, and those that serve turn
-- unready within a second or two.
create table if not exists schema_needs (
    one_row  boolean primary key default true check (one_row),
    oldest   int not null,  -- the number of the migration that a server must know at least
    moved_at timestamptz    -- since when its data are at another PostgreSQL, if they are
);
insert into schema_needs (oldest) values (8) on conflict do nothing;

-- Servers of 0.1.0 compare these rows with their own files, and put their functions in place of the
-- newer ones where they differ. So the rows stay as they are, or are what 0.1.0 would have written;
-- later servers have rows of other names, and leave alone what is of a newer schema than theirs.
insert into schema_files (name, digest) values
    ('views.sql', 'fc6d5a46b37d310eba0a1cc86a6306ad18700d3a3eca7e139683ba454bf63047'),
    ('functions.sql', 'abb4e4c9092474387796d05766bcfde46ddf5163e2324fc8e9e7035c072d5ce7')
on conflict (name) do nothing;
