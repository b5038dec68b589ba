-- Chinese, Japanese, Thai and others put no spaces between words: a message is now found by any
-- part of such a run. All messages are indexed again, in the background and before a search.
delete from search_positions;
