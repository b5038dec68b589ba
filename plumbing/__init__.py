"""What knows nothing of chats and messages, one concept a file.

A file imports only those above it in this list, and none imports the application:

    text         text that compares without regard to case, and its words
    uuids        ids that sort by time
    metrics      what is counted and timed for Prometheus
    process      a port, signals, children, logs, and a word for a bad start
    files        files that are whole, and outlast a power cut
    address      where PostgreSQL is, and the one way to connect
    embedded     the embedded PostgreSQL
    deadline     how long a request may wait
    queues       things that wait, of many keys in turn
    database     any PostgreSQL: connections, and statements on them
    groups       look-ups and commits in groups
    schema       the schema, and the start
    heartbeat    whether the database went back in time
    bus          hints from one process to the others
    guard        who may ask: addresses, rates, passwords, tokens, browsers
    search       texts taken apart for a search, and an index of their words
    settings     settings from the environment
    serving      a program that serves an application: start, database, ports, workers, end
    websocket    one connection of a websocket
    validation   what is wrong with a value, in words for people
    endpoints    from a handler's signature to validation to an answer
    marks        numbers of a count, with the marks that vouch for them
    credentials  emails, usernames, passwords: their shapes and spelling
"""
