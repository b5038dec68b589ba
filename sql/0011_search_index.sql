-- What the index of the search puts off, whoever fills its list puts in order, and every search reads
-- the list. Of long texts in scripts without spaces that took longer than a statement may: it was
-- given up and begun again each time, while the list grew. Now each text is put in order at once,
-- which takes less time altogether.
alter index message_words_search set (fastupdate = off);
alter index message_words_search reset (gin_pending_list_limit);
