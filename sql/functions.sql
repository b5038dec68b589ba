-- The functions as they are now: what needs a lock and then a fresh snapshot or pinned plans, and
-- what several statements share. Every other statement is written out where it is used. Applied
-- after views.sql whenever this file has changed or a migration is new.
--
-- A function that the last release calls keeps its parameters and its answer; one that takes or
-- answers more has another number at its end. What only the last release calls stands behind what
-- does it now, or is no longer here: a database that has it keeps it until the next.
--
-- Volatile: each statement of such a function sees what was committed before it, and so what the
-- lock in the statement before waited for.
-- A time that must not be before the one stored follows it by a minute at most: what was stored
-- while the clock was ahead steers nothing for longer.
-- set enable_... = off, jit = off: plans are pinned to index scans. One that was made while a table
-- was small would scan the table for as long as the connection lives.
-- set plan_cache_mode = force_generic_plan: for arrays PostgreSQL would plan anew at each call,
-- which takes longer than all the rest of posting one message.

-- True until a time at which the server gives up the statement that asks; after it the statement
-- fails. A backend that had stopped for a while would else make its change later than newer ones
-- that were answered. To be asked under the lock: in a condition on what a function answers.
create or replace function in_time(until timestamptz) returns boolean
language plpgsql volatile as $$
begin
    if clock_timestamp() > until then
        raise query_canceled using message = 'too late: the server has given this up';
    end if;
    return true;
end
$$;

-- What changed in a chat after one number and up to another, by rev, each message once. Two scans,
-- each in order: messages that were never changed, by messages_unchanged, and those that were, by
-- messages_changed. The planner puts it into the statement that calls it.
create or replace function changed_messages(
    chat bigint, after_rev bigint, upto_rev bigint, at_most int)
returns setof message_rows language sql stable as $$
    (select m.* from message_rows m
     where m.chat_id = chat and m.seq > after_rev and m.seq <= upto_rev and m.rev = m.seq
     order by m.seq limit at_most)
    union all
    (select m.* from message_rows m
     where m.chat_id = chat and m.rev > after_rev and m.rev <= upto_rev and m.rev <> m.seq
     order by m.rev limit at_most)
    order by rev limit at_most
$$;

-- Who read the messages of some runs, each from its first number to its last, in rising order: in
-- one row, as arrays. A reader is in them once for each number where they stopped, and with when
-- that was: where they stand now, of which the participant's own row tells, and of each run at the
-- steps that end within it and at the first beyond it. Whatever lies between two stops was passed
-- at the second; what is up to joined_seq was not read. In chats of more than 100, and of a reader
-- who deleted the account, there is no name; such readers are counted only. `offset 0`: each user
-- is looked up; else the planner may read all. The planner puts it into the statement that calls
-- it.
create or replace function select_readers(chat bigint, firsts bigint[], lasts bigint[])
returns table (
    user_ids bigint[], usernames text[], joined_seqs bigint[], read_seqs bigint[],
    read_ats timestamptz[])
language sql stable as $$
    select array_agg(p.user_id) as user_ids, array_agg(u.username) as usernames,
           array_agg(p.joined_seq) as joined_seqs, array_agg(stop.seq) as read_seqs,
           array_agg(stop.read_at) as read_ats
    from chats c
    join participants p on p.chat_id = c.id
    left join lateral (
        select u.username from users u where u.id = p.user_id and u.deleted_at is null offset 0
    ) u on c.participant_count <= 100
    cross join lateral (
        select p.last_read_seq as seq, p.last_read_at as read_at
        union all
        select step.seq, step.read_at
        from unnest(firsts, lasts) run (first, last)
        cross join lateral (
            select r.seq, r.read_at from reads r
            where r.chat_id = p.chat_id and r.user_id = p.user_id
              and r.seq >= run.first and r.seq < least(run.last, p.last_read_seq)
            union all
            (select r.seq, r.read_at from reads r
             where r.chat_id = p.chat_id and r.user_id = p.user_id
               and r.seq >= run.last and r.seq < p.last_read_seq
             order by r.seq limit 1)
        ) step
        where c.participant_count <= 100
    ) stop
    where c.id = chat and p.last_read_seq >= (firsts)[1]
      and p.joined_seq < (lasts)[cardinality(lasts)]
$$;

-- Words in the form that message_words has.
create or replace function search_keys(chat bigint, stretch bigint, words text[])
returns text[] language sql immutable as $$
    select array(select chat || ':' || stretch || ':' || word from unnest(words) as word)
$$;

-- The numbers of messages that hold all of some words, newest first. The index knows the words by
-- stretches of 65,536 messages: one after the other is asked, until the page is full.
create or replace function found_messages(
    chat bigint, before bigint, at_most int, wanted text[])
returns table (seq bigint) language plpgsql stable
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
set enable_bitmapscan = on set jit = off  -- a GIN index knows nothing but bitmaps
as $$
#variable_conflict use_column
declare
    sofar int := 0;
    more  int;
begin
    if wanted = '{}' then
        return;
    end if;
    for stretch in reverse before >> 16 .. 0 loop
        -- offset 0: first all that the index has, newest first; then, of as many as are needed,
        -- whether they still stand. Else the planner may go through the whole chat.
        return query select w.seq
            from (
                select w.seq from message_words w
                where w.words @> search_keys(chat, stretch, wanted) and w.seq < before
                order by w.seq desc offset 0) w
            cross join lateral (
                select from messages m
                where m.chat_id = chat and m.seq = w.seq and m.deleted_at is null offset 0) m
            order by w.seq desc limit at_most - sofar;
        get diagnostics more = row_count;
        sofar := sofar + more;
        exit when sofar >= at_most;
    end loop;
end
$$;

-- The numbers of messages that the index does not know as they are, newest first: those that were
-- posted, or changed, after what it has taken in.
create or replace function unindexed_messages(chat bigint, before bigint, at_most int)
returns table (seq bigint) language sql stable as $$
    (select m.seq from messages m
     where m.chat_id = chat and m.rev = m.seq and m.seq < before and m.deleted_at is null
       and m.seq > coalesce((select i.rev from search_positions i where i.chat_id = chat), 0)
     order by m.seq desc limit at_most)
    union all
    (select m.seq from messages m
     where m.chat_id = chat and m.rev <> m.seq and m.seq < before and m.deleted_at is null
       and m.rev > coalesce((select i.rev from search_positions i where i.chat_id = chat), 0)
     order by m.seq desc limit at_most)
$$;

-- Takes in the words of the messages between two numbers, each message's joined by spaces; tells
-- whether it did. Where another was faster it does nothing: the words may be older than what that
-- one has seen. What a crash loses is indexed again, so this does not wait for the posts' flush.
create or replace function index_words_2(
    chat bigint, since bigint, upto bigint, seqs bigint[], words text[])
returns boolean language plpgsql volatile set plan_cache_mode = force_generic_plan as $$
begin
    perform set_config('synchronous_commit', 'off', true);  -- of this transaction
    -- Of a chat that was swept away meanwhile nothing may be left; this one stays until we are done.
    perform 1 from chats c where c.id = chat for key share;
    if not found then
        return false;
    end if;
    insert into search_positions as i (chat_id, rev) values (chat, upto)
    on conflict (chat_id) do update set rev = upto where i.rev = since;
    if not found then
        return false;
    end if;
    insert into message_words (chat_id, seq, words)
    select chat, m.seq, search_keys(chat, m.seq >> 16, string_to_array(m.words, ' '))
    from unnest(seqs, index_words_2.words) as m (seq, words)
    on conflict (chat_id, seq) do update set words = excluded.words;
    return true;
end
$$;

-- What the last release calls.
create or replace function index_words(
    chat bigint, since bigint, upto bigint, seqs bigint[], words text[])
returns void language sql volatile as $$
    select from index_words_2(chat, since, upto, seqs, words)
$$;

-- The mark of a number of a chat; null where the chat has not come to it.
create or replace function mark_at(chat bigint, number bigint) returns text
language sql stable as $$
    select coalesce(
        (select m.mark from messages m where m.chat_id = chat and m.seq = number),
        (select r.mark from revisions r where r.chat_id = chat and r.rev = number),
        '0')
    from chats c where c.id = chat and c.last_rev >= number
$$;

-- Posts one message, by the same rules as post_messages_2: without arrays each step is a look-up by
-- key, and costs half.
create or replace function post_message(
    chat bigint, sender bigint, message uuid, body text, reply uuid, mark text)
returns table (
    outcome text, seq bigint, created_at timestamptz, last_rev bigint, version bigint,
    last_mark text, mark_before text)
language plpgsql volatile
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
    at     timestamptz;
    c      record;  -- the chat, locked
    stored record;  -- the asker's membership, the message of this id, the message replied to
begin
    select x.is_group, x.participant_count, x.last_rev, x.last_mark, x.version, x.active_at into c
    from chats x where x.id = chat for no key update;

    select p.user_id, m.seq, m.sender_id, m.created_at, r.seq as reply_seq into stored
    from participants p
    left join messages m on m.chat_id = p.chat_id and m.id = message
    left join messages r on r.chat_id = p.chat_id and r.id = reply
    where p.chat_id = chat and p.user_id = sender;

    last_rev := c.last_rev;
    last_mark := c.last_mark;
    mark_before := c.last_mark;
    version := c.version;
    seq := stored.seq;
    created_at := stored.created_at;
    outcome := case
        when stored.user_id is null then 'chat-not-found'
        when stored.sender_id = sender then 'stored'
        when stored.sender_id is not null then 'message-id-taken'
        when not c.is_group and c.participant_count < 2 then 'partner-gone'
        when reply is not null and stored.reply_seq is null then 'reply-not-found'
        else 'posted' end;
    if outcome = 'posted' then
        last_rev := c.last_rev + 1;
        last_mark := post_message.mark;
        seq := last_rev;
        at := clock_timestamp();
        created_at := greatest(at, least(c.active_at, at + interval '1 minute'));
        insert into messages (chat_id, seq, rev, id, sender_id, text, reply_to, created_at, mark)
        values (chat, post_message.seq, post_message.seq, message, sender, body, reply,
                post_message.created_at, post_message.mark);
        update chats x set last_rev = post_message.seq, last_seq = post_message.seq,
                           last_mark = post_message.mark, active_at = post_message.created_at
        where x.id = chat;
    end if;
    return next;
end
$$;

-- Posts a group of messages, given as arrays, and answers one row an item, in order: its outcome
-- (posted, stored before, or why not), its number, where its chat stands, and the mark of the number
-- at which it stood before.
create or replace function post_messages_2(
    chat_ids bigint[], sender_ids bigint[], ids uuid[], texts text[], reply_tos uuid[], mark text)
returns table (
    outcome text, seq bigint, created_at timestamptz, last_rev bigint, version bigint,
    last_mark text, mark_before text)
language plpgsql volatile
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
    at       timestamptz;
    locked   bigint[];  -- the chats ...
    marks    text[];    -- ... and where each stood
    accepted int[];  -- the items to post: places in the arrays
    kept     int[];
    item     int;
begin
    select array_agg(c.id), array_agg(c.last_mark) into locked, marks
    from (select x.id, x.last_mark from chats x where x.id = any (chat_ids)
          order by x.id for no key update) c;
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
               greatest(at, least(c.active_at, at + interval '1 minute')) as created_at
        from unnest(chat_ids, sender_ids, ids, texts, reply_tos)
             with ordinality as i (chat_id, sender_id, id, text, reply_to, item)
        join chats c on c.id = i.chat_id
        where i.item = any (accepted)
    ), posted as (
        insert into messages (chat_id, seq, rev, id, sender_id, text, reply_to, created_at, mark)
        select n.chat_id, n.seq, n.seq, n.id, n.sender_id, n.text, n.reply_to, n.created_at,
               post_messages_2.mark
        from numbered n
        returning chat_id, seq, created_at
    )
    update chats c set last_rev = p.seq, last_seq = p.seq, last_mark = post_messages_2.mark,
                       active_at = p.created_at
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
           m.seq, m.created_at, c.last_rev, c.version, c.last_mark,
           marks[array_position(locked, c.id)]
    from unnest(chat_ids, sender_ids, ids) with ordinality as i (chat_id, sender_id, id, item)
    left join chats c on c.id = i.chat_id
    left join participants p on p.chat_id = i.chat_id and p.user_id = i.sender_id
    left join messages m on m.chat_id = i.chat_id and m.id = i.id
    order by i.item;
end
$$;

-- A mark for those servers of the last release that give none.
create or replace function new_mark() returns text language sql volatile as $$
    select left(translate(encode(uuid_send(gen_random_uuid()), 'base64'), '+/', '-_'), 11)
$$;

-- What the last release calls.
create or replace function post_messages(
    chat_ids bigint[], sender_ids bigint[], ids uuid[], texts text[], reply_tos uuid[])
returns table (outcome text, seq bigint, created_at timestamptz, last_rev bigint, version bigint)
language sql volatile as $$
    select g.outcome, g.seq, g.created_at, g.last_rev, g.version
    from post_messages_2(chat_ids, sender_ids, ids, texts, reply_tos, new_mark()) g
$$;

-- Edits (a text) and deletes (null) a group of messages, given as arrays, each until a time as in
-- in_time, and answers one row an item, in order: changed, unchanged or why not, and where its chat
-- stands.
create or replace function change_messages_3(
    chat_ids bigint[], user_ids bigint[], ids uuid[], texts text[], untils timestamptz[], mark text)
returns table (outcome text, last_rev bigint, version bigint)
language plpgsql volatile
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
    at      timestamptz;
    m       messages;
    my_role text;
begin
    perform 1 from chats c where c.id = any (chat_ids) order by c.id for no key update;
    at := clock_timestamp();
    for item in 1 .. cardinality(ids) loop
        my_role := (select p.role from participants p
                    where p.chat_id = chat_ids[item] and p.user_id = user_ids[item]);
        select * into m from messages x where x.chat_id = chat_ids[item] and x.id = ids[item];
        outcome := case
            when at > untils[item] then 'service-unavailable'
            when my_role is null then 'chat-not-found'
            when m.id is null then 'message-not-found'
            when m.sender_id <> user_ids[item] and (texts[item] is not null or my_role = 'member')
                then 'sender-only'
            when m.deleted_at is not null and texts[item] is null then 'unchanged'
            when m.deleted_at is not null then 'message-not-found'
            when m.text = texts[item] then 'unchanged'
            else 'changed' end;
        if outcome = 'changed' then
            update chats c set last_rev = c.last_rev + 1, last_mark = change_messages_3.mark
            where c.id = m.chat_id
            returning c.last_rev into m.rev;
            insert into revisions (chat_id, rev, mark)
            values (m.chat_id, m.rev, change_messages_3.mark);
            update messages x
            set rev = m.rev, changed_mark = change_messages_3.mark, text = coalesce(texts[item], ''),
                edited_at = case when texts[item] is null then x.edited_at else at end,
                deleted_at = case when texts[item] is null then at end
            where x.chat_id = m.chat_id and x.seq = m.seq;
        end if;
        select c.last_rev, c.version into last_rev, version
        from chats c where c.id = chat_ids[item];
        return next;
    end loop;
end
$$;

-- What the last release calls.
create or replace function change_messages_2(
    chat_ids bigint[], user_ids bigint[], ids uuid[], texts text[], mark text)
returns table (outcome text, last_rev bigint, version bigint) language sql volatile as $$
    select * from change_messages_3(chat_ids, user_ids, ids, texts, '{}', mark)
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
set plan_cache_mode = force_generic_plan
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
               greatest(at, least(p.last_read_at, at + interval '1 minute')) as read_at,
               min(i.item)::int as item
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
    -- Both by i: by p.chat_id and i.message_id the planner would look through the whole chat.
    left join messages m on m.chat_id = i.chat_id and m.id = i.message_id
    left join messages stand on stand.chat_id = p.chat_id and stand.seq = p.last_read_seq
    order by i.item;
end
$$;

-- Keeps users from being deleted until the transaction ends, and answers the ids that are nobody's.
create or replace function hold_users(ids bigint[]) returns bigint[]
language plpgsql volatile set plan_cache_mode = force_generic_plan as $$
begin
    perform 1 from users u where u.id = any (ids) and u.deleted_at is null
    order by u.id for key share;
    return array(
        select distinct i.id from unnest(ids) as i (id)
        where not exists (select from users u where u.id = i.id and u.deleted_at is null)
        order by 1);
end
$$;

-- Opens the personal chat of two users, once: the same chat for both, whoever asks, however often.
-- Answers its id and whether it is new, or the ids that are nobody's.
create or replace function open_personal_chat(me bigint, other bigint)
returns table (chat_id bigint, is_new boolean, unknown_ids bigint[])
language plpgsql volatile as $$
#variable_conflict use_column
begin
    unknown_ids := hold_users(array[me, other]);
    if unknown_ids <> '{}' then
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

-- Creates a group of its owner and the members. Answers its id, or the ids that are nobody's.
create or replace function create_group(owner bigint, name text, member_ids bigint[])
returns table (chat_id bigint, is_new boolean, unknown_ids bigint[])
language plpgsql volatile set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
    unknown_ids := hold_users(member_ids || owner);
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

-- Locks a chat, then answers how it is, the role of a user in it (null: none), and why that user
-- cannot administer it as a group (null: their role decides).
create or replace function lock_chat(
    chat bigint, me bigint, out name text, out last_seq bigint, out last_rev bigint,
    out version bigint, out participant_count int, out my_role text, out refusal text)
language plpgsql volatile as $$
#variable_conflict use_column
declare
    is_group boolean;
begin
    select c.name, c.last_seq, c.last_rev, c.version, c.participant_count, c.is_group
    into name, last_seq, last_rev, version, participant_count, is_group
    from chats c where c.id = chat for no key update;
    my_role := (select p.role from participants p where p.chat_id = chat and p.user_id = me);
    refusal := case
        when my_role is null then 'chat-not-found'
        when not is_group then 'personal-chat' end;
end
$$;

-- Renames a group, for its owner and admins. Answers renamed, unchanged or why not.
create or replace function rename_chat(chat bigint, me bigint, new_name text)
returns table (outcome text, last_rev bigint, version bigint)
language plpgsql volatile as $$
#variable_conflict use_column
declare
    c record;
begin
    select * into c from lock_chat(chat, me);
    last_rev := c.last_rev;
    version := c.version;
    outcome := coalesce(c.refusal, case
        when c.my_role = 'member' then 'not-allowed'
        when c.name = new_name then 'unchanged'
        else 'renamed' end);
    if outcome = 'renamed' then
        version := c.version + 1;
        update chats set name = new_name, version = c.version + 1 where id = chat;
    end if;
    return next;
end
$$;

-- Puts a user into a group, or gives a role to one who is in (null: leaves it as it is).
-- Answers joined, set, unchanged or why not, the chat's version after it, and the participant.
create or replace function put_participant(
    chat bigint, me bigint, target bigint, new_role text, at_most int)
returns table (outcome text, last_rev bigint, version bigint, participant json)
language plpgsql volatile as $$
#variable_conflict use_column
declare
    c        record;
    old_role text;
begin
    select * into c from lock_chat(chat, me);
    old_role := (select p.role from participants p where p.chat_id = chat and p.user_id = target);
    last_rev := c.last_rev;
    version := c.version;
    outcome := coalesce(c.refusal, case
        when new_role is not null and c.my_role <> 'owner' then 'owner-only'
        when target = me and new_role <> 'owner' then 'owner-stays'
        when hold_users(array[target]) <> '{}' then 'user-not-found'
        when old_role = coalesce(new_role, old_role) then 'unchanged'
        when old_role is not null then 'set'
        when c.participant_count >= at_most then 'group-full'
        else 'joined' end);
    if outcome in ('set', 'joined') then
        version := c.version + 1;
        insert into participants as p (
            chat_id, user_id, role, joined_seq, last_read_seq, version)
        values (chat, target, coalesce(new_role, 'member'), c.last_seq, c.last_seq, version)
        on conflict (chat_id, user_id) do update set role = new_role, version = excluded.version;
        if new_role = 'owner' then
            update participants p set role = 'admin', version = put_participant.version
            where p.chat_id = chat and p.user_id = me;
        end if;
        update chats set version = put_participant.version,
            participant_count = participant_count + (outcome = 'joined')::int
        where id = chat;
    end if;
    participant := (select row_to_json(v) from participant_view v
                    where v.chat_id = chat and v.user_id = target);
    return next;
end
$$;

-- Takes a user out of a group: any participant may leave; an admin may remove those with the role
-- member, the owner anybody. The longest-standing admin follows an owner, else the longest-standing
-- member. Answers removed or why not.
create or replace function remove_participant(chat bigint, me bigint, target bigint)
returns table (outcome text, last_rev bigint, version bigint)
language plpgsql volatile as $$
#variable_conflict use_column
declare
    c           record;
    target_role text;
begin
    select * into c from lock_chat(chat, me);
    target_role := (select p.role from participants p
                    where p.chat_id = chat and p.user_id = target);
    last_rev := c.last_rev;
    version := c.version + 1;
    outcome := coalesce(c.refusal, case
        when target_role is null then 'user-not-found'
        when target = me or c.my_role = 'owner'
          or (c.my_role = 'admin' and target_role = 'member') then 'removed'
        else 'not-allowed' end);
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

-- Takes a deleted user out of one of their chats, group or personal, and answers where it stands;
-- no row once they are in none. Each chat in a transaction of its own: no lock is held for long.
create or replace function leave_next_chat(target bigint)
returns table (chat_id bigint, last_rev bigint, version bigint)
language plpgsql volatile as $$
#variable_conflict use_column
declare
    c record;
begin
    loop
        chat_id := (select p.chat_id from participants p where p.user_id = target
                    order by p.chat_id limit 1);
        if chat_id is null then
            update users set is_leaving = false where id = target and is_leaving;
            return;
        end if;
        select * into c from lock_chat(chat_id, target);
        exit when c.my_role is not null;  -- else another process was faster
    end loop;
    last_rev := c.last_rev;
    version := c.version + 1;
    perform depart(chat_id, target, c.my_role, version);
    return next;
end
$$;

-- A page of users by id: all, or those whose username has a key between two.
create or replace function select_users(
    first_key text, beyond_key text, after bigint, at_most int)
returns table (id bigint, username text, is_active boolean, created_at timestamptz)
language plpgsql stable
set plan_cache_mode = force_custom_plan  -- a plan for any start would go through all users
as $$
begin
    if first_key = '' then
        return query select u.id, u.username, u.is_active, u.created_at from users u
        where u.id > after and u.deleted_at is null order by u.id limit at_most;
    else
        return query select u.id, u.username, u.is_active, u.created_at from users u
        where u.username_key >= first_key and u.username_key < beyond_key and u.id > after
        order by u.id limit at_most;
    end if;
end
$$;

-- Signs a user out everywhere and keeps them out, or lets them in again. Answers the ended
-- sessions.
create or replace function disable_user(target bigint, disabled boolean) returns bigint[]
language plpgsql volatile as $$
begin
    update users set is_disabled = disabled, is_active = not disabled
    where id = target and deleted_at is null;
    return case when disabled then end_sessions(target, 0) else '{}' end;
end
$$;

-- Gives a user another password, forgives the attempts at the old one and signs them out
-- everywhere. Answers the ended sessions.
create or replace function reset_password(target bigint, new_hash text) returns bigint[]
language plpgsql volatile as $$
begin
    update users set password_hash = new_hash where id = target and deleted_at is null;
    delete from attempts where key in (
        'password:' || target, 'login:' || (select email_key from users where id = target));
    return end_sessions(target, 0);
end
$$;

-- Changes what is given (not null) of an account whose password was verified, where that was
-- needed. A new password ends every other session, an account made inactive also this one.
-- Answers the ended sessions; null where the password is no longer the verified one.
create or replace function change_user(
    me bigint, my_session bigint, verified_hash text, new_email text, new_email_key text,
    new_username text, new_username_key text, new_hash text, active boolean)
returns bigint[] language plpgsql volatile as $$
begin
    update users u set
        email = coalesce(new_email, u.email), email_key = coalesce(new_email_key, u.email_key),
        username = coalesce(new_username, u.username),
        username_key = coalesce(new_username_key, u.username_key),
        password_hash = coalesce(new_hash, u.password_hash),
        is_active = coalesce(active, u.is_active)
    where u.id = me and u.deleted_at is null
      and u.password_hash = coalesce(verified_hash, u.password_hash);
    if not found then
        return null;
    end if;
    delete from attempts where verified_hash is not null and key = 'password:' || me;
    if active is false then
        return end_sessions(me, 0);
    elsif new_hash is not null then
        return end_sessions(me, my_session);
    end if;
    return '{}';
end
$$;

-- Deletes an account: email and name are free again, its messages become nobody's. It leaves its
-- chats afterwards (leave_next_chat). Answers the ended sessions.
create or replace function delete_user(me bigint) returns bigint[]
language plpgsql volatile as $$
begin
    update users set email = null, email_key = null, username = null, username_key = null,
        password_hash = null, is_active = false, is_leaving = true, deleted_at = now()
    where id = me and deleted_at is null;
    return end_sessions(me, 0);
end
$$;

-- Ends the sessions of a user but one, and answers which: a statement of its own, after the lock
-- on the user, so that it sees those of a login that was faster.
create or replace function end_sessions(of_user bigint, but bigint) returns bigint[]
language sql volatile as $$
    with ended as (
        update sessions set ended_at = clock_timestamp()
        where user_id = of_user and id <> but and ended_at is null returning id
    )
    select coalesce(array_agg(id), '{}') from ended
$$;

-- Deletes a piece of what a chat without participants leaves, and answers how many rows it was.
create or replace function sweep_empty_chat(at_most int) returns bigint
language plpgsql volatile as $$
declare
    chat  bigint;
    swept bigint;
begin
    select id into chat from chats where participant_count = 0 limit 1 for update skip locked;
    if chat is null then
        return 0;
    end if;
    with message as (
        delete from messages m using (
            select seq from messages where chat_id = chat order by seq limit at_most) old
        where m.chat_id = chat and m.seq = old.seq returning m.seq
    ), word as (
        delete from message_words w using (
            select seq from message_words where chat_id = chat order by seq limit at_most) old
        where w.chat_id = chat and w.seq = old.seq returning w.seq
    ), step as (
        delete from reads r using (
            select user_id, seq from reads where chat_id = chat limit at_most) old
        where r.chat_id = chat and r.user_id = old.user_id and r.seq = old.seq returning r.seq
    ), revision as (
        delete from revisions v where v.chat_id = chat and v.rev = any (array(
            select rev from revisions where chat_id = chat order by rev limit at_most))
        returning v.rev
    ), departure as (
        delete from departures d where d.chat_id = chat and d.version = any (array(
            select version from departures where chat_id = chat order by version limit at_most))
        returning d.version
    )
    select count(*) into swept
    from (select from message union all select from word union all select from step
          union all select from revision union all select from departure) gone;
    if swept = 0 then
        delete from search_positions where chat_id = chat;
        delete from chats where id = chat;
    end if;
    return swept + 1;
end
$$;

-- Takes a session to its next generation, or answers it again to a client that lost it: within the
-- grace while nobody refreshed from there, and later as long as no token of it was used. Else no
-- row. A generation that the database has not reached, for it was restored, counts as the newest.
create or replace function refresh_session(
    session_id bigint, me bigint, my_secret text, known_generation bigint, grace_seconds float8)
returns table (id bigint, generation bigint, rotated_at timestamptz, secret text)
language plpgsql volatile as $$
#variable_conflict use_column
begin
    return query update sessions s
    set generation = known_generation + 1, is_used = false, rotated_at = now(),
        last_used_at = now()
    where s.id = session_id and s.user_id = me and s.secret = my_secret
      and s.generation <= known_generation and s.ended_at is null
    returning s.id, s.generation, s.rotated_at, s.secret;
    if not found then
        return query select s.id, s.generation, s.rotated_at, s.secret from sessions s
        where s.id = session_id and s.user_id = me and s.secret = my_secret
          and s.generation = known_generation + 1 and s.ended_at is null
          and (not s.is_used or abs(extract(epoch from now() - s.rotated_at)) < grace_seconds);
    end if;
end
$$;

-- What the last release calls; it makes tokens without a secret.
create or replace function rotate_session(
    session_id bigint, me bigint, known_generation bigint, grace_seconds float8)
returns table (id bigint, generation bigint, rotated_at timestamptz) language sql volatile as $$
    update sessions s set secret = '' where s.id = session_id and s.user_id = me;
    select r.id, r.generation, r.rotated_at
    from refresh_session(session_id, me, '', known_generation, grace_seconds) r
$$;

-- Counts an attempt at something, unless the allowed number within the window is used up: then
-- answers in how many seconds the next one is allowed. Two at once are counted one after the other.
create or replace function count_attempt(attempt text, window_seconds float8, allowed int)
returns int language plpgsql volatile as $$
declare
    oldest timestamptz;  -- of the newest that use the allowance up
begin
    perform pg_advisory_xact_lock(hashtext(attempt));
    select a.at into oldest from attempts a
    where a.key = attempt and a.at > now() - make_interval(secs => window_seconds)
      and a.at < clock_timestamp() + interval '1 minute'
    order by a.at desc offset allowed - 1 limit 1;
    if oldest is null then
        insert into attempts (key, at) values (attempt, clock_timestamp());
        return null;
    end if;
    return greatest(1, ceil(extract(epoch from
        oldest + make_interval(secs => window_seconds) - now()))::int);
end
$$;

-- Puts the next token of a process in the place of a known one, or (known '{}') the first, and
-- answers which of these stands there now: null where none does, for the database went back in time,
-- or can only be read and never had one. The same call again answers the same. The timeline is
-- another one once a standby was promoted; null where it is not told.
create or replace function heartbeat(of_process text, known text[], following text)
returns table (stands text, timeline text) language plpgsql volatile
set enable_seqscan = off set enable_bitmapscan = off set plan_cache_mode = force_generic_plan as $$
begin
    if current_setting('transaction_read_only') = 'off' then
        if known = '{}' then
            -- By the newest: those of a time when the clock was ahead are no measure, nor is now()
            -- where it is.
            delete from heartbeats h where h.beaten_at
                < least(now(), (select max(x.beaten_at) from heartbeats x)) - interval '1 day';
            insert into heartbeats (process, beat) values (of_process, following)
            on conflict (process) do nothing;
        else
            update heartbeats h set beat = following, beaten_at = now()
            where h.process = of_process and h.beat = any (known);
        end if;
    end if;
    stands := (select h.beat from heartbeats h
               where h.process = of_process and h.beat = any (known || following));
    if not pg_is_in_recovery() then
        begin
            timeline := left(pg_walfile_name(pg_current_wal_insert_lsn()), 8);
        exception when others then  -- there are services that do not say
        end;
    end if;
    return next;
end
$$;
