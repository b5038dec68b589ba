-- room_news now takes how far to look back, and answers which sessions have ended, too.
drop function if exists room_news(bigint, bigint, bigint, int);
