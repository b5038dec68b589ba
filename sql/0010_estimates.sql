-- Two indexes of a table begin with the chat. Where the planner believes that a chat has one row, it
-- takes either for a look-up, and may read the whole chat instead of one row: so it believed of all
-- chats when it last looked while each had one message. These are the rows of a chat that it shall
-- count with, whatever it finds: a hundred messages, five participants.
alter table messages alter column chat_id set (n_distinct = -0.01);
alter table participants alter column chat_id set (n_distinct = -0.2);
analyze messages (chat_id);
analyze participants (chat_id);
