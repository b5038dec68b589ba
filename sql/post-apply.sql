-- The views and functions as they are now; applied after the migrations where this file changed.
-- A change of a view's columns or of a function's answer drops the old one in a migration first.

-- One row is one Message of the contract. read_by is told in chats of up to 100; who joined later
-- than the message is not among its readers.
create or replace view message_view as
select m.id, m.chat_id, m.seq, m.rev, u.id as sender_id, m.text, m.reply_to,
       m.created_at, m.edited_at, m.deleted_at,
       case when c.participant_count <= 100 then (
           select coalesce(json_agg(json_build_object(
                      'user_id', p.user_id, 'username', reader.username, 'read_at', step.read_at)
                      order by step.read_at, p.user_id), '[]')
           from participants p
           join users reader on reader.id = p.user_id
           cross join lateral (
               select r.read_at, r.from_seq from reads r
               where r.chat_id = p.chat_id and r.user_id = p.user_id and r.seq >= m.seq
               order by r.seq limit 1) step
           where p.chat_id = m.chat_id and p.user_id <> m.sender_id
             and p.joined_seq < m.seq and p.last_read_seq >= m.seq and step.from_seq < m.seq
       ) else '[]' end as read_by,
       (select count(*) from participants p
        where p.chat_id = m.chat_id and p.user_id <> m.sender_id
          and p.joined_seq < m.seq and p.last_read_seq >= m.seq) as read_count
from messages m
join chats c on c.id = m.chat_id
left join users u on u.id = m.sender_id and u.deleted_at is null;

-- One row is one Participant, with the order of joining.
create or replace view participant_view as
select p.chat_id, p.user_id, u.username, p.role, p.last_read_seq, p.ordinal, p.version
from participants p
join users u on u.id = p.user_id;

-- One row is one Chat as one of its participants (reader_id) sees it.
create or replace view chat_view as
select c.id, c.name, c.is_group, c.created_at,
       (select json_agg(first) from (
           select v.user_id, v.username, v.role, v.last_read_seq
           from participant_view v where v.chat_id = c.id order by v.ordinal limit 100) first
       ) as participants,
       c.participant_count,
       (select row_to_json(m) from message_view m
        where m.chat_id = c.id and m.seq = c.last_seq) as last_message,
       c.last_rev, c.version,
       (select count(*) from (
           select from messages m
           where m.chat_id = c.id and m.seq > me.last_read_seq
             and m.sender_id <> me.user_id and m.deleted_at is null
           limit 100) unread) as unread_count,
       me.user_id as reader_id, c.active_at
from participants me
join chats c on c.id = me.chat_id;

-- What of a chat changed after a number and up to another, by rev, each message once. Two scans
-- in order: the posted and never changed by the primary key, the changed by messages_changed.
create or replace function message_changes(
    chat bigint, after_rev bigint, upto_rev bigint, at_most int)
returns setof message_view language sql stable as $$
    (select v.* from message_view v
     where v.chat_id = chat and v.seq > after_rev and v.seq <= upto_rev and v.rev = v.seq
     order by v.seq limit at_most)
    union all
    (select v.* from message_view v
     where v.chat_id = chat and v.rev > after_rev and v.rev <= upto_rev and v.rev <> v.seq
     order by v.rev limit at_most)
    order by rev limit at_most
$$;

-- Posts a group of messages, given as arrays, and answers one row an item, in order: its outcome
-- (posted, stored before, or why not), its number, and where its chat stands.
-- Volatile, so that each statement sees what was committed before it: first the locks, then the
-- questions. Plans are pinned to index scans: one made while a table was small would scan it.
create or replace function post_messages(
    chat_ids bigint[], sender_ids bigint[], ids uuid[], texts text[], reply_tos uuid[])
returns table (outcome text, seq bigint, created_at timestamptz, last_rev bigint, version bigint)
language plpgsql volatile
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
#variable_conflict use_column
declare
    at       timestamptz;
    accepted int[];  -- the items to post: places in the arrays
    kept     int[];
    item     int;
begin
    perform 1 from chats c where c.id = any (chat_ids) order by c.id for no key update;
    at := clock_timestamp();

    accepted := array(
        select i.item from unnest(chat_ids, sender_ids, ids)
                      with ordinality as i (chat_id, sender_id, id, item)
        join participants p on p.chat_id = i.chat_id and p.user_id = i.sender_id
        join chats c on c.id = i.chat_id and (c.is_group or c.participant_count = 2)
        where not exists (select from messages m where m.chat_id = i.chat_id and m.id = i.id));

    -- A reply names a message of the chat, or an accepted item before it.
    if exists (select from unnest(reply_tos) as reply_to where reply_to is not null) then
        kept := '{}';
        for item in select unnest(accepted) order by 1 loop
            if reply_tos[item] is null
               or exists (select from messages m
                          where m.chat_id = chat_ids[item] and m.id = reply_tos[item])
               or exists (select from unnest(kept) as earlier
                          where chat_ids[earlier] = chat_ids[item]
                            and ids[earlier] = reply_tos[item]) then
                kept := kept || item;
            end if;
        end loop;
        accepted := kept;
    end if;

    -- Of equal ids the first counts; the others find it stored.
    accepted := array(
        select min(item) from unnest(accepted) as item group by chat_ids[item], ids[item]);

    with numbered as (
        select i.*, c.last_rev + row_number() over (partition by i.chat_id order by i.item) as seq,
               greatest(at, c.active_at) as created_at
        from unnest(chat_ids, sender_ids, ids, texts, reply_tos)
             with ordinality as i (chat_id, sender_id, id, text, reply_to, item)
        join chats c on c.id = i.chat_id
        where i.item = any (accepted)
    ), posted as (
        insert into messages (chat_id, seq, rev, id, sender_id, text, reply_to, created_at)
        select n.chat_id, n.seq, n.seq, n.id, n.sender_id, n.text, n.reply_to, n.created_at
        from numbered n
        returning chat_id, seq, created_at
    )
    update chats c set last_rev = p.seq, last_seq = p.seq, active_at = p.created_at
    from (select chat_id, max(seq) as seq, max(created_at) as created_at
          from posted group by chat_id) p
    where c.id = p.chat_id;

    return query
    select case
               when p.user_id is null then 'chat-not-found'
               when i.item = any (accepted) then 'posted'
               when m.sender_id = i.sender_id then 'stored'
               when m.sender_id is not null then 'message-id-taken'
               when not c.is_group and c.participant_count < 2 then 'partner-gone'
               else 'reply-not-found'
           end,
           m.seq, m.created_at, c.last_rev, c.version
    from unnest(chat_ids, sender_ids, ids) with ordinality as i (chat_id, sender_id, id, item)
    left join chats c on c.id = i.chat_id
    left join participants p on p.chat_id = i.chat_id and p.user_id = i.sender_id
    left join messages m on m.chat_id = i.chat_id and m.id = i.id
    order by i.item;
end
$$;

-- Moves watermarks forward for a group of readers, given as arrays, and answers one row an item,
-- in order, with where its reader stands now; several steps of one reader become the last.
-- Rows are locked in order of chat and user, so that two groups never wait for each other.
create or replace function read_messages(
    chat_ids bigint[], user_ids bigint[], message_ids uuid[])
returns table (
    outcome text, message_id uuid, seq bigint, read_at timestamptz, moved boolean,
    sender_id bigint, participant_count int)
language plpgsql volatile
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
#variable_conflict use_column
declare
    at    timestamptz;
    moved int[];  -- for each reader who moved, one item
begin
    perform 1 from participants p
    where (p.chat_id, p.user_id) in (select * from unnest(chat_ids, user_ids))
    order by p.chat_id, p.user_id for no key update;
    at := clock_timestamp();

    with steps as (
        select p.chat_id, p.user_id, p.last_read_seq as from_seq, max(m.seq) as seq,
               greatest(at, p.last_read_at) as read_at, min(i.item)::int as item
        from unnest(chat_ids, user_ids, message_ids)
             with ordinality as i (chat_id, user_id, message_id, item)
        join participants p on p.chat_id = i.chat_id and p.user_id = i.user_id
        join messages m on m.chat_id = i.chat_id and m.id = i.message_id
        where m.seq > p.last_read_seq
        group by p.chat_id, p.user_id
    ), moving as (
        update participants p set last_read_seq = s.seq, last_read_at = s.read_at
        from steps s where p.chat_id = s.chat_id and p.user_id = s.user_id
    ), remembered as (
        insert into reads (chat_id, user_id, from_seq, seq, read_at)
        select s.chat_id, s.user_id, s.from_seq, s.seq, s.read_at
        from steps s
        join chats c on c.id = s.chat_id and c.participant_count <= 100
    )
    select coalesce(array_agg(s.item), '{}') into moved from steps s;

    return query
    select case when p.user_id is null then 'chat-not-found'
                when m.id is null then 'message-not-found'
                else 'read' end,
           stand.id, stand.seq, p.last_read_at,
           i.item = any (moved),
           stand.sender_id, c.participant_count
    from unnest(chat_ids, user_ids, message_ids)
         with ordinality as i (chat_id, user_id, message_id, item)
    left join participants p on p.chat_id = i.chat_id and p.user_id = i.user_id
    left join chats c on c.id = p.chat_id
    left join messages m on m.chat_id = p.chat_id and m.id = i.message_id
    left join messages stand on stand.chat_id = p.chat_id and stand.seq = p.last_read_seq
    order by i.item;
end
$$;

-- Opens the personal chat of two users, once: the same chat for both, whoever asks, however often.
-- Answers its id and whether it is new, or the id of nobody's.
create or replace function open_personal_chat(me bigint, other bigint)
returns table (chat_id bigint, is_new boolean, unknown_ids bigint[])
language plpgsql volatile as $$
#variable_conflict use_column
begin
    -- Both are kept from being deleted until the chat stands.
    perform 1 from users u where u.id in (me, other) and u.deleted_at is null
    order by u.id for key share;
    if not exists (select from users u where u.id = other and u.deleted_at is null) then
        unknown_ids := array[other];
        return next;
        return;
    end if;
    insert into chats (is_group, low_user_id, high_user_id, participant_count)
    values (false, least(me, other), greatest(me, other), 2)
    on conflict on constraint chats_pair do nothing
    returning id, true into chat_id, is_new;
    if chat_id is null then
        return query select c.id, false, null::bigint[] from chats c
        where c.low_user_id = least(me, other) and c.high_user_id = greatest(me, other);
        return;
    end if;
    insert into participants (chat_id, user_id, role)
    values (chat_id, me, 'member'), (chat_id, other, 'member');
    return next;
end
$$;

-- Creates a group of its owner and the members. Answers its id, or the ids of nobody's.
create or replace function create_group(owner bigint, name text, member_ids bigint[])
returns table (chat_id bigint, is_new boolean, unknown_ids bigint[])
language plpgsql volatile as $$
#variable_conflict use_column
begin
    perform 1 from users u where u.id = any (member_ids || owner) and u.deleted_at is null
    order by u.id for key share;
    unknown_ids := array(
        select distinct m.id from unnest(member_ids) as m (id)
        where not exists (select from users u where u.id = m.id and u.deleted_at is null)
        order by 1);
    if unknown_ids <> '{}' then
        return next;
        return;
    end if;
    insert into chats (is_group, name, participant_count)
    select true, create_group.name, 1 + count(distinct m.id)
    from unnest(member_ids) as m (id) where m.id <> owner
    returning id into chat_id;
    is_new := true;
    insert into participants (chat_id, user_id, role) values (chat_id, owner, 'owner');
    insert into participants (chat_id, user_id, role)
    select chat_id, m.id, 'member'
    from (select id, min(place) as place from unnest(member_ids) with ordinality as i (id, place)
          where id <> owner group by id) m
    order by m.place;
    return next;
end
$$;

-- Puts a user into a group, or gives a role to one who is in (null: leaves it as it is).
-- Answers its outcome: joined, set, unchanged or why not; and the chat's version after it.
create or replace function put_participant(
    chat bigint, me bigint, target bigint, new_role text, at_most int)
returns table (outcome text, last_rev bigint, version bigint)
language plpgsql volatile as $$
#variable_conflict use_column
declare
    c        chats;
    my_role  text;
    old_role text;
begin
    select * into c from chats where id = chat for no key update;
    select p.role into my_role from participants p where p.chat_id = chat and p.user_id = me;
    select p.role into old_role from participants p where p.chat_id = chat and p.user_id = target;
    last_rev := c.last_rev;
    version := c.version;
    outcome := case
        when my_role is null then 'chat-not-found'
        when not c.is_group then 'personal-chat'
        when new_role is not null and my_role <> 'owner' then 'owner-only'
        when target = me and new_role <> 'owner' then 'owner-stays'
        when old_role = coalesce(new_role, old_role) then 'unchanged'
        when old_role is not null then 'set'
        when c.participant_count >= at_most then 'group-full'
        else 'joined' end;
    if outcome not in ('set', 'joined') then
        return next;
        return;
    end if;
    version := c.version + 1;
    if outcome = 'set' then
        update participants p set role = new_role, version = put_participant.version
        where p.chat_id = chat and p.user_id = target;
    else
        perform 1 from users u where u.id = target and u.deleted_at is null for key share;
        if not found then
            outcome := 'user-not-found';
            return next;
            return;
        end if;
        insert into participants (
            chat_id, user_id, role, joined_seq, last_read_seq, version)
        values (chat, target, coalesce(new_role, 'member'), c.last_seq, c.last_seq, version);
    end if;
    if new_role = 'owner' then
        update participants p set role = 'admin', version = put_participant.version
        where p.chat_id = chat and p.user_id = me;
    end if;
    update chats set version = put_participant.version,
        participant_count = participant_count + (outcome = 'joined')::int
    where id = chat;
    return next;
end
$$;

-- Takes a user out of a group: themself, or as its owner anyone, as an admin a member. An owner
-- is followed by the longest-standing admin, else member. Answers removed or why not.
create or replace function remove_participant(chat bigint, me bigint, target bigint)
returns table (outcome text, last_rev bigint, version bigint)
language plpgsql volatile as $$
#variable_conflict use_column
declare
    c           chats;
    my_role     text;
    target_role text;
begin
    select * into c from chats where id = chat for no key update;
    select p.role into my_role from participants p where p.chat_id = chat and p.user_id = me;
    select p.role into target_role
    from participants p where p.chat_id = chat and p.user_id = target;
    last_rev := c.last_rev;
    version := c.version + 1;
    outcome := case
        when my_role is null then 'chat-not-found'
        when not c.is_group then 'personal-chat'
        when target_role is null then 'user-not-found'
        when target = me or my_role = 'owner' or (my_role = 'admin' and target_role = 'member')
            then 'removed'
        else 'not-allowed' end;
    if outcome = 'removed' then
        perform depart(chat, target, target_role, version);
    end if;
    return next;
end
$$;

-- The departure itself, under the chat's lock: for whoever leaves, is removed or deleted.
create or replace function depart(chat bigint, target bigint, target_role text, new_version bigint)
returns void language plpgsql volatile as $$
begin
    delete from participants p where p.chat_id = chat and p.user_id = target;
    insert into departures (chat_id, version, user_id) values (chat, new_version, target);
    update chats set version = new_version, participant_count = participant_count - 1
    where id = chat;
    if target_role = 'owner' then
        update participants p set role = 'owner', version = new_version
        where p.chat_id = chat and p.user_id = (
            select s.user_id from participants s where s.chat_id = chat
            order by s.role = 'admin' desc, s.ordinal limit 1);
    end if;
end
$$;

-- Counts a try at something, unless the allowed number within the window is used up: then answers
-- in how many seconds the next one is allowed. Two at once are counted one after the other.
create or replace function count_attempt(attempt text, window_seconds float8, allowed int)
returns int language plpgsql volatile as $$
declare
    oldest timestamptz;  -- of the newest that use the allowance up
begin
    perform pg_advisory_xact_lock(hashtext(attempt));
    select a.at into oldest from attempts a
    where a.key = attempt and a.at > now() - make_interval(secs => window_seconds)
    order by a.at desc offset allowed - 1 limit 1;
    if oldest is null then
        insert into attempts (key, at) values (attempt, clock_timestamp());
        return null;
    end if;
    return greatest(1, ceil(extract(epoch from
        oldest + make_interval(secs => window_seconds) - now()))::int);
end
$$;
