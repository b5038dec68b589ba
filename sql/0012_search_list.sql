-- What the index of the search put off before it was told not to; apart from that, whose lock would
-- keep all searches waiting meanwhile.
do $$ begin perform gin_clean_pending_list('message_words_search'); end $$;
