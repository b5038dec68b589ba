"""Who may do what: a row for each endpoint and each thing that it can be asked about.

The columns are the callers. Nobody has no token, the expired one is the owner's; the stranger was
never in the group, the former member was taken out of it. A cell is the status, and for refusals a
letter of the problem's type:

    400  malformed-request
    401  unauthorized        c  invalid-credentials  i  invalid-token
    403  not-allowed         o  owner-only           s  sender-only
                             p  wrong-password       f  foreign-origin
    404  c  chat-not-found   u  user-not-found       m  message-not-found   s  session-not-found
    409  p  personal-chat    g  partner-gone         o  owner-stays         i  message-id-taken
                             e  email-taken          n  username-taken
    422  invalid-input       r  reply-not-found
    426  upgrade-required

What a row is about is named first by the chat: `group` (member, admin, owner, and of others a mate,
who is a member, and an aide, who is an admin), `foreign` (a group that no caller was ever in),
`personal` (each caller's own, with one partner), `partner gone` (another such, whose partner
deleted their account), `missing` (an id that nobody has), `no id` (what cannot be one); then by the
user, message or session, and how it is asked.
"""

import re
from dataclasses import dataclass

CALLERS = ("nobody", "expired", "stranger", "member", "admin", "owner", "former")

CALLS = """
#                                   nobody  expired stranger member  admin   owner   former

POST /api/v1/users
    new account                     201     201     201     201     201     201     201
    taken email                     409e    409e    409e    409e    409e    409e    409e
    taken username                  409n    409n    409n    409n    409n    409n    409n
POST /api/v1/users/login
    own password                    200     200     200     200     200     200     200
    wrong password                  401c    401c    401c    401c    401c    401c    401c
    unknown email                   401c    401c    401c    401c    401c    401c    401c
POST /api/v1/users/refresh
    as Bearer                       401i    401i    200     200     200     200     200
    in the body                     401i    401i    200     200     200     200     200
    access token                    401i    401i    401i    401i    401i    401i    401i
POST /api/v1/users/logout
    this session                    401     401     204     204     204     204     204

GET /api/v1/users
    all                             401     401     200     200     200     200     200
    by name                         401     401     200     200     200     200     200
GET /api/v1/users/me
    oneself                         401     401     200     200     200     200     200
GET /api/v1/users/{user_id}
    oneself                         401     401     200     200     200     200     200
    another                         401     401     200     200     200     200     200
    deleted                         401     401     404u    404u    404u    404u    404u
    missing                         401     401     404u    404u    404u    404u    404u
    no id                           401     401     404u    404u    404u    404u    404u
PUT /api/v1/users/{user_id}
    oneself, new name               401     401     200     200     200     200     200
    oneself, new email              401     401     200     200     200     200     200
    oneself, new password           401     401     200     200     200     200     200
    oneself, inactive               401     401     200     200     200     200     200
    oneself, wrong password         401     401     403p    403p    403p    403p    403p
    oneself, no password            401     401     422     422     422     422     422
    oneself, taken name             401     401     409n    409n    409n    409n    409n
    another, new name               401     401     403     403     403     403     403
    another, new email              401     401     403     403     403     403     403
    another, new password           401     401     403     403     403     403     403
    another, inactive               401     401     403     403     403     403     403
    deleted, new name               401     401     404u    404u    404u    404u    404u
    missing, new name               401     401     404u    404u    404u    404u    404u
    no id, new name                 401     401     404u    404u    404u    404u    404u
DELETE /api/v1/users/{user_id}
    oneself                         401     401     204     204     204     204     204
    another                         401     401     403     403     403     403     403
    deleted                         401     401     404u    404u    404u    404u    404u
    missing                         401     401     404u    404u    404u    404u    404u
    no id                           401     401     404u    404u    404u    404u    404u

GET /api/v1/users/me/sessions
    all                             401     401     200     200     200     200     200
DELETE /api/v1/users/me/sessions/{session_id}
    own                             401     401     204     204     204     204     204
    current                         401     401     204     204     204     204     204
    ended                           401     401     404s    404s    404s    404s    404s
    another's                       401     401     404s    404s    404s    404s    404s
    missing                         401     401     404s    404s    404s    404s    404s
    no id                           401     401     404s    404s    404s    404s    404s

POST /api/v1/chats
    with one more                   401     401     201     201     201     201     201
    with the partner again          401     401     200     200     200     200     200
    with a deleted user             401     401     422     422     422     422     422
    with a missing user             401     401     422     422     422     422     422
    with oneself                    401     401     422     422     422     422     422
    group                           401     401     201     201     201     201     201
    group with a deleted user       401     401     422     422     422     422     422
    group with a missing user       401     401     422     422     422     422     422
    group of oneself                401     401     422     422     422     422     422
GET /api/v1/chats
    all                             401     401     200     200     200     200     200
GET /api/v1/chats/{chat_id}
    group                           401     401     404c    200     200     200     404c
    foreign                         401     401     404c    404c    404c    404c    404c
    missing                         401     401     404c    404c    404c    404c    404c
    no id                           401     401     404c    404c    404c    404c    404c
    personal                        401     401     200     200     200     200     200
    partner gone                    401     401     200     200     200     200     200
PATCH /api/v1/chats/{chat_id}
    group                           401     401     404c    403     200     200     404c
    foreign                         401     401     404c    404c    404c    404c    404c
    missing                         401     401     404c    404c    404c    404c    404c
    no id                           401     401     404c    404c    404c    404c    404c
    personal                        401     401     409p    409p    409p    409p    409p
    partner gone                    401     401     409p    409p    409p    409p    409p

GET /api/v1/chats/{chat_id}/participants
    group                           401     401     404c    200     200     200     404c
    group, after the last           401     401     404c    200     200     200     404c
    foreign                         401     401     404c    404c    404c    404c    404c
    foreign, after the last         401     401     404c    404c    404c    404c    404c
    missing                         401     401     404c    404c    404c    404c    404c
    no id                           401     401     404c    404c    404c    404c    404c
    personal                        401     401     200     200     200     200     200
    partner gone                    401     401     200     200     200     200     200
POST /api/v1/chats/{chat_id}/participants
    group, newcomer                 401     401     404c    201     201     201     404c
    group, newcomer as member       401     401     404c    403o    403o    201     404c
    group, newcomer as admin        401     401     404c    403o    403o    201     404c
    group, newcomer as owner        401     401     404c    403o    403o    201     404c
    group, mate                     401     401     404c    200     200     200     404c
    group, mate as admin            401     401     404c    403o    403o    200     404c
    group, mate as owner            401     401     404c    403o    403o    200     404c
    group, aide as member           401     401     404c    403o    403o    200     404c
    group, owner as member          401     401     404c    403o    403o    409o    404c
    group, oneself                  401     401     404c    200     200     200     404c
    group, oneself as member        401     401     404c    403o    403o    409o    404c
    group, oneself as admin         401     401     404c    403o    403o    409o    404c
    group, oneself as owner         401     401     404c    403o    403o    200     404c
    group, deleted                  401     401     404c    404u    404u    404u    404c
    group, missing                  401     401     404c    404u    404u    404u    404c
    foreign, newcomer               401     401     404c    404c    404c    404c    404c
    foreign, oneself                401     401     404c    404c    404c    404c    404c
    foreign, oneself as owner       401     401     404c    404c    404c    404c    404c
    foreign, missing                401     401     404c    404c    404c    404c    404c
    missing, newcomer               401     401     404c    404c    404c    404c    404c
    no id, newcomer                 401     401     404c    404c    404c    404c    404c
    personal, newcomer              401     401     409p    409p    409p    409p    409p
    personal, oneself               401     401     409p    409p    409p    409p    409p
    personal, oneself as owner      401     401     409p    409p    409p    409p    409p
    partner gone, newcomer          401     401     409p    409p    409p    409p    409p
POST /api/v1/chats/{chat_id}/participants/{user_id}
    group, newcomer                 401     401     404c    201     201     201     404c
    group, newcomer as member       401     401     404c    403o    403o    201     404c
    group, newcomer as admin        401     401     404c    403o    403o    201     404c
    group, newcomer as owner        401     401     404c    403o    403o    201     404c
    group, mate                     401     401     404c    200     200     200     404c
    group, mate as admin            401     401     404c    403o    403o    200     404c
    group, mate as owner            401     401     404c    403o    403o    200     404c
    group, aide as member           401     401     404c    403o    403o    200     404c
    group, owner as member          401     401     404c    403o    403o    409o    404c
    group, oneself                  401     401     404c    200     200     200     404c
    group, oneself as member        401     401     404c    403o    403o    409o    404c
    group, oneself as owner         401     401     404c    403o    403o    200     404c
    group, deleted                  401     401     404c    404u    404u    404u    404c
    group, missing                  401     401     404c    404u    404u    404u    404c
    group, no id                    401     401     404u    404u    404u    404u    404u
    foreign, newcomer               401     401     404c    404c    404c    404c    404c
    foreign, oneself                401     401     404c    404c    404c    404c    404c
    foreign, oneself as owner       401     401     404c    404c    404c    404c    404c
    foreign, missing                401     401     404c    404c    404c    404c    404c
    missing, newcomer               401     401     404c    404c    404c    404c    404c
    no id, newcomer                 401     401     404c    404c    404c    404c    404c
    personal, newcomer              401     401     409p    409p    409p    409p    409p
    personal, oneself               401     401     409p    409p    409p    409p    409p
    personal, oneself as owner      401     401     409p    409p    409p    409p    409p
    partner gone, newcomer          401     401     409p    409p    409p    409p    409p
DELETE /api/v1/chats/{chat_id}/participants/{user_id}
    group, oneself                  401     401     404c    204     204     204     404c
    group, mate                     401     401     404c    403     204     204     404c
    group, aide                     401     401     404c    403     403     204     404c
    group, owner                    401     401     404c    403     403     204     404c
    group, newcomer                 401     401     404c    404u    404u    404u    404c
    group, former                   401     401     404c    404u    404u    404u    404c
    group, deleted                  401     401     404c    404u    404u    404u    404c
    group, missing                  401     401     404c    404u    404u    404u    404c
    group, no id                    401     401     404u    404u    404u    404u    404u
    foreign, oneself                401     401     404c    404c    404c    404c    404c
    foreign, theirs                 401     401     404c    404c    404c    404c    404c
    missing, oneself                401     401     404c    404c    404c    404c    404c
    no id, oneself                  401     401     404c    404c    404c    404c    404c
    personal, oneself               401     401     409p    409p    409p    409p    409p
    personal, partner               401     401     409p    409p    409p    409p    409p
    personal, newcomer              401     401     409p    409p    409p    409p    409p
    partner gone, oneself           401     401     409p    409p    409p    409p    409p

POST /api/v1/chats/{chat_id}/messages
    group                           401     401     404c    201     201     201     404c
    group, id of own                401     401     404c    200     200     200     404c
    group, id of mate's             401     401     404c    409i    409i    409i    404c
    group, id of foreign            401     401     404c    201     201     201     404c
    group, reply to mate's          401     401     404c    201     201     201     404c
    group, reply to foreign         401     401     404c    422r    422r    422r    404c
    group, reply to missing         401     401     404c    422r    422r    422r    404c
    foreign                         401     401     404c    404c    404c    404c    404c
    foreign, id of theirs           401     401     404c    404c    404c    404c    404c
    foreign, reply to theirs        401     401     404c    404c    404c    404c    404c
    missing                         401     401     404c    404c    404c    404c    404c
    no id                           401     401     404c    404c    404c    404c    404c
    personal                        401     401     201     201     201     201     201
    personal, id of partner's       401     401     409i    409i    409i    409i    409i
    personal, reply to foreign      401     401     422r    422r    422r    422r    422r
    partner gone                    401     401     409g    409g    409g    409g    409g
    partner gone, id of own         401     401     200     200     200     200     200
GET /api/v1/chats/{chat_id}/messages
    group                           401     401     404c    200     200     200     404c
    group, before                   401     401     404c    200     200     200     404c
    group, before all               401     401     404c    200     200     200     404c
    group, after                    401     401     404c    200     200     200     404c
    group, after all                401     401     404c    200     200     200     404c
    group, words                    401     401     404c    200     200     200     404c
    group, words before             401     401     404c    200     200     200     404c
    group, words of none            401     401     404c    200     200     200     404c
    group, no word                  401     401     404c    200     200     200     404c
    foreign                         401     401     404c    404c    404c    404c    404c
    foreign, before                 401     401     404c    404c    404c    404c    404c
    foreign, after                  401     401     404c    404c    404c    404c    404c
    foreign, words                  401     401     404c    404c    404c    404c    404c
    foreign, words of none          401     401     404c    404c    404c    404c    404c
    foreign, no word                401     401     404c    404c    404c    404c    404c
    missing                         401     401     404c    404c    404c    404c    404c
    missing, words                  401     401     404c    404c    404c    404c    404c
    no id                           401     401     404c    404c    404c    404c    404c
    personal                        401     401     200     200     200     200     200
    personal, words                 401     401     200     200     200     200     200
    partner gone                    401     401     200     200     200     200     200
    partner gone, words             401     401     200     200     200     200     200
GET /api/v1/chats/{chat_id}/messages/{message_id}
    group, own                      401     401     404c    200     200     200     404c
    group, mate's                   401     401     404c    200     200     200     404c
    group, former's                 401     401     404c    200     200     200     404c
    group, own deleted              401     401     404c    200     200     200     404c
    group, foreign                  401     401     404c    404m    404m    404m    404c
    group, missing                  401     401     404c    404m    404m    404m    404c
    group, no id                    401     401     404m    404m    404m    404m    404m
    foreign, theirs                 401     401     404c    404c    404c    404c    404c
    foreign, missing                401     401     404c    404c    404c    404c    404c
    missing, missing                401     401     404c    404c    404c    404c    404c
    missing, foreign                401     401     404c    404c    404c    404c    404c
    no id, missing                  401     401     404c    404c    404c    404c    404c
    personal, own                   401     401     200     200     200     200     200
    personal, partner's             401     401     200     200     200     200     200
    personal, foreign               401     401     404m    404m    404m    404m    404m
    partner gone, own               401     401     200     200     200     200     200
    partner gone, partner's         401     401     200     200     200     200     200
PATCH /api/v1/chats/{chat_id}/messages/{message_id}
    group, own                      401     401     404c    200     200     200     404c
    group, mate's                   401     401     404c    403s    403s    403s    404c
    group, former's                 401     401     404c    403s    403s    403s    404c
    group, own deleted              401     401     404c    404m    404m    404m    404c
    group, foreign                  401     401     404c    404m    404m    404m    404c
    group, missing                  401     401     404c    404m    404m    404m    404c
    group, no id                    401     401     404m    404m    404m    404m    404m
    foreign, theirs                 401     401     404c    404c    404c    404c    404c
    foreign, missing                401     401     404c    404c    404c    404c    404c
    missing, missing                401     401     404c    404c    404c    404c    404c
    missing, foreign                401     401     404c    404c    404c    404c    404c
    no id, missing                  401     401     404c    404c    404c    404c    404c
    personal, own                   401     401     200     200     200     200     200
    personal, partner's             401     401     403s    403s    403s    403s    403s
    personal, foreign               401     401     404m    404m    404m    404m    404m
    partner gone, own               401     401     200     200     200     200     200
    partner gone, partner's         401     401     403s    403s    403s    403s    403s
DELETE /api/v1/chats/{chat_id}/messages/{message_id}
    group, own                      401     401     404c    204     204     204     404c
    group, own deleted              401     401     404c    204     204     204     404c
    group, mate's                   401     401     404c    403s    204     204     404c
    group, owner's                  401     401     404c    403s    204     204     404c
    group, former's                 401     401     404c    403s    204     204     404c
    group, foreign                  401     401     404c    404m    404m    404m    404c
    group, missing                  401     401     404c    404m    404m    404m    404c
    group, no id                    401     401     404m    404m    404m    404m    404m
    foreign, theirs                 401     401     404c    404c    404c    404c    404c
    foreign, missing                401     401     404c    404c    404c    404c    404c
    missing, missing                401     401     404c    404c    404c    404c    404c
    missing, foreign                401     401     404c    404c    404c    404c    404c
    no id, missing                  401     401     404c    404c    404c    404c    404c
    personal, own                   401     401     204     204     204     204     204
    personal, partner's             401     401     403s    403s    403s    403s    403s
    personal, foreign               401     401     404m    404m    404m    404m    404m
    partner gone, own               401     401     204     204     204     204     204
    partner gone, partner's         401     401     403s    403s    403s    403s    403s
GET /api/v1/chats/{chat_id}/changes
    group                           401     401     404c    200     200     200     404c
    group, after all                401     401     404c    200     200     200     404c
    foreign                         401     401     404c    404c    404c    404c    404c
    foreign, after all              401     401     404c    404c    404c    404c    404c
    missing                         401     401     404c    404c    404c    404c    404c
    no id                           401     401     404c    404c    404c    404c    404c
    personal                        401     401     200     200     200     200     200
    partner gone                    401     401     200     200     200     200     200
POST /api/v1/chats/{chat_id}/read
    group, own                      401     401     404c    200     200     200     404c
    group, mate's                   401     401     404c    200     200     200     404c
    group, foreign                  401     401     404c    404m    404m    404m    404c
    group, missing                  401     401     404c    404m    404m    404m    404c
    group, no id                    401     401     422     422     422     422     422
    foreign, theirs                 401     401     404c    404c    404c    404c    404c
    foreign, missing                401     401     404c    404c    404c    404c    404c
    missing, missing                401     401     404c    404c    404c    404c    404c
    missing, foreign                401     401     404c    404c    404c    404c    404c
    no id, missing                  401     401     404c    404c    404c    404c    404c
    personal, partner's             401     401     200     200     200     200     200
    personal, foreign               401     401     404m    404m    404m    404m    404m
    partner gone, partner's         401     401     200     200     200     200     200

GET /ws/{chat_id}
    group                           401     401     404c    101     101     101     404c
    group, after                    401     401     404c    101     101     101     404c
    group, no handshake             401     401     404c    426     426     426     404c
    group, foreign page             403f    403f    403f    403f    403f    403f    403f
    foreign                         401     401     404c    404c    404c    404c    404c
    foreign, after                  401     401     404c    404c    404c    404c    404c
    foreign, no handshake           401     401     404c    404c    404c    404c    404c
    missing                         401     401     404c    404c    404c    404c    404c
    no id                           401     401     404c    404c    404c    404c    404c
    personal                        401     401     101     101     101     101     101
    partner gone                    401     401     101     101     101     101     101
GET /ws
    all                             401     401     101     101     101     101     101
    all, no handshake               401     401     426     426     426     426     426
    all, foreign page               403f    403f    403f    403f    403f    403f    403f

GET /
    page                            200     200     200     200     200     200     200
GET /docs
    page                            200     200     200     200     200     200     200
GET /api/v1/openapi.json
    page                            200     200     200     200     200     200     200
GET /api/v1/asyncapi.json
    page                            200     200     200     200     200     200     200
GET /api/v1/health/liveness
    page                            200     200     200     200     200     200     200
GET /api/v1/health/readiness
    page                            200     200     200     200     200     200     200
"""

# A frame on a socket. `x` is a refused handshake; else the type of the frame that answers, or the
# problem of an `error`; `-` is no answer, but for the others in the chat. On /ws the frame names
# the chat of its row, on /ws/{chat_id} it is sent on the socket of that chat.
FRAMES = """
#                                   nobody  expired stranger member  admin   owner   former

message on /ws/{chat_id}
    group                           x401    x401    x404    ack     ack     ack     x404
    group, naming group             x401    x401    x404    ack     ack     ack     x404
    group, naming foreign           x401    x401    x404    404c    404c    404c    x404
    group, naming missing           x401    x401    x404    404c    404c    404c    x404
    group, naming personal          x401    x401    x404    404c    404c    404c    x404
    group, id of own                x401    x401    x404    ack     ack     ack     x404
    group, id of mate's             x401    x401    x404    409i    409i    409i    x404
    group, reply to mate's          x401    x401    x404    ack     ack     ack     x404
    group, reply to foreign         x401    x401    x404    422r    422r    422r    x404
    personal                        x401    x401    ack     ack     ack     ack     ack
    personal, naming foreign        x401    x401    404c    404c    404c    404c    404c
    partner gone                    x401    x401    409g    409g    409g    409g    409g
message on /ws
    group                           x401    x401    404c    ack     ack     ack     404c
    group, id of own                x401    x401    404c    ack     ack     ack     404c
    group, id of mate's             x401    x401    404c    409i    409i    409i    404c
    group, reply to mate's          x401    x401    404c    ack     ack     ack     404c
    group, reply to foreign         x401    x401    404c    422r    422r    422r    404c
    foreign                         x401    x401    404c    404c    404c    404c    404c
    foreign, id of theirs           x401    x401    404c    404c    404c    404c    404c
    missing                         x401    x401    404c    404c    404c    404c    404c
    no id                           x401    x401    422     422     422     422     422
    personal                        x401    x401    ack     ack     ack     ack     ack
    partner gone                    x401    x401    409g    409g    409g    409g    409g
read on /ws/{chat_id}
    group, mate's                   x401    x401    x404    read    read    read    x404
    group, foreign                  x401    x401    x404    404m    404m    404m    x404
    group, missing                  x401    x401    x404    404m    404m    404m    x404
    group, mate's, naming foreign   x401    x401    x404    404c    404c    404c    x404
    personal, partner's             x401    x401    read    read    read    read    read
    personal, foreign               x401    x401    404m    404m    404m    404m    404m
    partner gone, partner's         x401    x401    read    read    read    read    read
read on /ws
    group, mate's                   x401    x401    404c    read    read    read    404c
    group, foreign                  x401    x401    404c    404m    404m    404m    404c
    group, missing                  x401    x401    404c    404m    404m    404m    404c
    foreign, theirs                 x401    x401    404c    404c    404c    404c    404c
    missing, foreign                x401    x401    404c    404c    404c    404c    404c
    no id, missing                  x401    x401    422     422     422     422     422
    personal, partner's             x401    x401    read    read    read    read    read
typing on /ws/{chat_id}
    group                           x401    x401    x404    ack     ack     ack     x404
    group, naming foreign           x401    x401    x404    404c    404c    404c    x404
    personal                        x401    x401    ack     ack     ack     ack     ack
    partner gone                    x401    x401    ack     ack     ack     ack     ack
typing on /ws
    group                           x401    x401    404c    ack     ack     ack     404c
    foreign                         x401    x401    404c    404c    404c    404c    404c
    missing                         x401    x401    404c    404c    404c    404c    404c
    no id                           x401    x401    422     422     422     422     422
    personal                        x401    x401    ack     ack     ack     ack     ack
    partner gone                    x401    x401    ack     ack     ack     ack     ack
sync on /ws/{chat_id}
    group                           x401    x401    x404    ready   ready   ready   x404
    group, naming foreign           x401    x401    x404    404c    404c    404c    x404
    group, among chats              x401    x401    x404    ready   ready   ready   x404
    group, foreign among chats      x401    x401    x404    404c    404c    404c    x404
    personal                        x401    x401    ready   ready   ready   ready   ready
    partner gone                    x401    x401    ready   ready   ready   ready   ready
sync on /ws
    group                           x401    x401    404c    ready   ready   ready   404c
    group, among chats              x401    x401    404c    ready   ready   ready   404c
    foreign                         x401    x401    404c    404c    404c    404c    404c
    foreign, among chats            x401    x401    404c    404c    404c    404c    404c
    missing                         x401    x401    404c    404c    404c    404c    404c
    missing, among chats            x401    x401    404c    404c    404c    404c    404c
    no id                           x401    x401    422     422     422     422     422
    personal                        x401    x401    ready   ready   ready   ready   ready
    personal, among chats           x401    x401    ready   ready   ready   ready   ready
    partner gone                    x401    x401    ready   ready   ready   ready   ready
auth on /ws/{chat_id}
    group, own token                x401    x401    x404    auth    auth    auth    x404
    group, another's token          x401    x401    x404    401     401     401     x404
    group, expired token            x401    x401    x404    401     401     401     x404
    group, ended token              x401    x401    x404    401     401     401     x404
    group, refresh token            x401    x401    x404    401     401     401     x404
    personal, own token             x401    x401    auth    auth    auth    auth    auth
    personal, another's token       x401    x401    401     401     401     401     401
auth on /ws
    all, own token                  x401    x401    auth    auth    auth    auth    auth
    all, another's token            x401    x401    401     401     401     401     401
    all, expired token              x401    x401    401     401     401     401     401
    all, ended token                x401    x401    401     401     401     401     401
    all, refresh token              x401    x401    401     401     401     401     401
ping on /ws/{chat_id}
    group                           x401    x401    x404    pong    pong    pong    x404
    personal                        x401    x401    pong    pong    pong    pong    pong
ping on /ws
    all                             x401    x401    pong    pong    pong    pong    pong
"""

PROBLEMS = {
    "400": "malformed-request",
    "401": "unauthorized", "401c": "invalid-credentials", "401i": "invalid-token",
    "403": "not-allowed", "403o": "owner-only", "403s": "sender-only", "403p": "wrong-password",
    "403f": "foreign-origin",
    "404c": "chat-not-found", "404u": "user-not-found", "404m": "message-not-found",
    "404s": "session-not-found",
    "409p": "personal-chat", "409g": "partner-gone", "409o": "owner-stays",
    "409i": "message-id-taken", "409e": "email-taken", "409n": "username-taken",
    "422": "invalid-input", "422r": "reply-not-found", "426": "upgrade-required",
}


@dataclass(frozen=True)
class Row:
    """A line of a table: what is called, what it is about, and what each caller shall get."""

    called: tuple[str, str]  # method and path of a call; type and path of a frame
    about: str
    cells: dict[str, str]  # by caller

    def __str__(self) -> str:
        return f"{' '.join(self.called)}, {self.about}"


def read_table(text: str) -> list[Row]:
    """Read the rows of a table."""
    rows = []
    called = ("", "")
    for line in text.splitlines():
        if line.startswith("    "):
            about, *cells = re.split(" {2,}", line.strip())
            rows.append(Row(called, about, dict(zip(CALLERS, cells, strict=True))))
        elif line and not line.startswith("#"):
            first, _, path = line.replace(" on ", " ").partition(" ")
            called = (first, path)
    return rows


CALL_ROWS, FRAME_ROWS = read_table(CALLS), read_table(FRAMES)
