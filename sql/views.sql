-- Projections that several statements share, as they are now. Applied after the migrations whenever
-- this file has changed or a migration is new; a change of a view's columns, but for one added at
-- the end, needs a migration that drops the view first.
--
-- Each is replaced in a transaction of its own. That locks it, while the servers that are running
-- read chat_view and within it the other two: one transaction would hold message_view and wait for
-- chat_view, a reader the other way round.

-- One row is a message as it is stored, and whether its sender deleted the account.
begin;
create or replace view message_rows as
select m.id, m.chat_id, m.seq, m.rev, m.sender_id, m.text, m.reply_to, m.created_at, m.edited_at,
       m.deleted_at, m.rev || '.' || coalesce(m.changed_mark, m.mark) as position,
       (select true from users u where u.id = m.sender_id and u.deleted_at is not null) as is_gone
from messages m;
commit;

-- One row is one Message of the contract. read_by is told in chats of up to 100; who joined later
-- than the message is not among its readers. Where no step of a reader covers it (the chat was
-- larger then, or the row is old and gone), the next step tells until when they passed it. Servers
-- of the last release read it, and tests hold against it what messenger.py puts together.
begin;
create or replace view message_view as
select m.id, m.chat_id, m.seq, m.rev, u.id as sender_id, m.text, m.reply_to,
       m.created_at, m.edited_at, m.deleted_at,
       case when c.participant_count <= 100 then (
           select coalesce(json_agg(json_build_object(
                      'user_id', p.user_id, 'username', reader.username,
                      'read_at', coalesce(step.read_at, p.last_read_at))
                      order by coalesce(step.read_at, p.last_read_at), p.user_id), '[]')
           from participants p
           join users reader on reader.id = p.user_id and reader.deleted_at is null
           left join lateral (
               select r.read_at from reads r
               where r.chat_id = p.chat_id and r.user_id = p.user_id and r.seq >= m.seq
               order by r.seq limit 1) step on true
           where p.chat_id = m.chat_id and p.user_id <> m.sender_id
             and p.joined_seq < m.seq and p.last_read_seq >= m.seq
       ) else '[]' end as read_by,
       (select count(*) from participants p
        where p.chat_id = m.chat_id and p.user_id <> m.sender_id
          and p.joined_seq < m.seq and p.last_read_seq >= m.seq) as read_count,
       m.rev || '.' || coalesce(m.changed_mark, m.mark) as position
from messages m
join chats c on c.id = m.chat_id
left join users u on u.id = m.sender_id and u.deleted_at is null;
commit;

-- One row is one Participant, with the order of joining. `offset 0`: each user is looked up; else
-- the planner may read all.
begin;
create or replace view participant_view as
select p.chat_id, p.user_id, u.username, p.role, p.last_read_seq, p.ordinal, p.version
from participants p
cross join lateral (
    select u.username from users u where u.id = p.user_id and u.deleted_at is null offset 0) u;
commit;

-- One row is one Chat as one of its participants (reader_id) sees it. Servers of the last release
-- read it, and tests hold against it what messenger.py puts together; the next release may drop it.
begin;
create or replace view chat_view as
select c.id, c.name, c.is_group, c.created_at,
       (select coalesce(json_agg(first), '[]') from (
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
       me.user_id as reader_id, c.active_at,
       case when c.last_rev = 0 then '0' else c.last_rev || '.' || c.last_mark end as position
from participants me
join chats c on c.id = me.chat_id;
commit;

