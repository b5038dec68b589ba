-- transactional: false
-- Chinese, Japanese, Thai and others put no spaces between words: a message is now found by any
-- part of such a run. All messages are indexed again, in the background and before a search.
delete from search_positions;

-- A long text of such a script has some 8,000 keys. What the index puts off is put in order by
-- whoever fills the list: of 4 MB, the default, that took longer than a statement may.
alter index message_words_search set (gin_pending_list_limit = 512);
