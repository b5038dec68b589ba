"""Search in a history: words of every script, every change at once, pages, one's own chats."""

import asyncio
import random
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest
from aiohttp import web

import messenger
from plumbing import search
from plumbing.search import Texts
from support.people import Person, deletes, edits, pages
from support.servers import Elsewhere

SQL = messenger.SQL
STRETCH = 65_536  # the index knows words by stretches of so many messages


def query(chat: int, q: str, more: str = "") -> str:
    """The path of a search."""
    return f"/chats/{chat}/messages?q={quote(q)}{more}"


async def finds(person: Person, chat: int, q: str, more: str = "") -> list[str]:
    """Search in a chat; answer the texts found."""
    return [m["text"] for m in await person.gets(query(chat, q, more))]


@pytest.fixture(params=["indexed", "not indexed"])
def index(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches that find what they need in the index, and those that came too early for that."""
    if request.param == "not indexed":
        monkeypatch.setattr(search, "INDEX_SECONDS", -1)


pytestmark = pytest.mark.usefixtures("index")
of_the_index = pytest.mark.parametrize("index", ["indexed"], indirect=True)


# ---- Words


async def test_all_whole_words_are_found(alice: Person, bob: Person) -> None:
    """A message is found by all of its words in any order and case, newest first; part of a word
    does not find it, nor does one word too many."""
    chat = await alice.opens(bob)
    sent = [await alice.says(chat, text) for text in (
        "The quick brown fox", "quick, \"brown\" (foxes)!", "BROWN-quick_fox", "brown\nFox\tquick",
        "don't 3.14 user@example.com", "%_ \\ ' \" :* & | ! <-> $$",
    )]
    fox, foxes, snake, lines, marks, _ = [one["text"] for one in sent]
    for q, expected in (
        ("quick", [lines, snake, foxes, fox]), ("FOX brown", [lines, snake, fox]),
        ("foxes", [foxes]), ("the fox", [fox]), ("fox the wolf", []), ("fo", []), ("ox", []),
        ("quick brown quick BROWN", [lines, snake, foxes, fox]),
        ("«brown», fox?", [lines, snake, fox]), ("!fox the", [fox]), ("fox:*", [lines, snake, fox]),
        ("don't", [marks]), ("t don", [marks]), ("14", [marks]), ("3,14", [marks]), ("1", []),
        ("example.com", [marks]), ("fox | foxes", []), ("fox & foxes", []),
    ):
        assert await finds(bob, chat, q) == expected, q
    found = await bob.gets(query(chat, "the"))
    assert found == [sent[0]]


SCRIPTS = {
    # what is written, by what it is found, by what it is not
    "Съешь ЕЩЁ этих Булок": (("ещё съешь", "БУЛОК", "ЭТИХ"), ("булк", "еще")),
    "ὈΔΥΣΣΕΎΣ και Οδός": (("ὀδυσσεύς", "ὀδυσσεύσ", "ΟΔΌΣ ΚΑΙ"), ("οδο",)),
    "Straße GROẞ": (("STRASSE", "straße", "groß", "GROSS"), ("strase",)),
    "नमस्ते दुनिया की": (("नमस्ते", "दुनिया नमस्ते", "की"), ("क", "नमस", "दुनय")),
    "สวัสดี ชาวโลก": (("สวัสดี", "ชาวโลก", "ชาว", "โลก"), ("สวสด", "โลกชาว")),
    "漢字テスト。你好，世界": (("漢字テスト", "世界 你好", "漢", "字テ"), ("你好世界", "字漢")),
    "한국어 안녕": (("한국어", "\u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165"), ("한국",)),
    "caf\u00e9 nai\u0308ve": (("cafe\u0301", "CAF\u00c9", "NA\u00cfVE", "na\u00efve"), ("cafe",)),
    "ＦＵＬＬ　ｗｉｄｔｈ　１２３": (("full", "WIDTH 123", "ｆｕｌｌ"), ("12",)),
    "ﬁn ①② Ⅷ": (("fin", "12", "VIII", "viii"), ("f", "i")),
    "שָׁלוֹם עולם": (("שָׁלוֹם", "עולם"), ("שלו",)),
    "مرحبا بالعالم ٤٢": (("مرحبا", "٤٢ بالعالم"), ("مرح",)),
    "ԲԱՐԵՎ 𐐀𐐁": (("բարեվ", "𐐨𐐩"), ("բար",)),
    "می‌خواهم": (("می‌خواهم",), ("می‌خواه",)),
    "x²y great🙂party I❤️NY": (("x2y", "great party", "party🎉", "ny"), ("greatparty", "iny")),
}


async def test_each_of_many_words_is_wanted(alice: Person, bob: Person) -> None:
    """A search for more words than the index is asked for finds what holds all of them, whichever
    of them others lack."""
    chat = await alice.opens(bob)
    words = ["word" + "x" * number for number in range(12)] + list("abcdefghij")
    whole = " ".join(words)
    await alice.says(chat, whole)
    for left_out in words:
        await alice.says(chat, " ".join(word for word in words if word != left_out))
    assert await finds(bob, chat, whole) == [whole]
    assert await finds(bob, chat, whole + " k") == []


async def test_words_of_any_script_are_found_in_any_case(alice: Person, bob: Person) -> None:
    """Letters, marks and digits of a script make a word; case, width and how accents are written
    do not matter."""
    chat = await alice.opens(bob)
    for text in SCRIPTS:
        await alice.says(chat, text)
    for text, (found, missed) in SCRIPTS.items():
        for q in found:
            assert await finds(bob, chat, q) == [text], (text, q)
        for q in missed:
            assert text not in await finds(bob, chat, q), (text, q)


async def test_turkish_is_found_in_any_case(alice: Person, bob: Person) -> None:
    """The dotted and the dotless i have capitals of their own, and both are found in either."""
    chat = await alice.opens(bob)
    for text in ("İstanbul", "ısparta", "DİYARBAKIR"):
        await alice.says(chat, text)
    for q, expected in (
        ("İSTANBUL", "İstanbul"), ("istanbul", "İstanbul"), ("ısparta", "ısparta"),
        ("ISPARTA", "ısparta"), ("diyarbakır", "DİYARBAKIR"),
    ):
        assert await finds(bob, chat, q) == [expected], q


RUNS = {
    # what is written, by what it is found, by what it is not
    "我家在上海东边。": (
        ("上海", "上", "上海东边", "我家在上海东边", "东边 我家"), ("海上", "上东", "家上")),
    "海上生明月，天涯共此时": (("海上", "明月 天涯"), ("上海", "月天", "明月天涯")),
    "東京タワーに行った": (("東京", "タワー", "行った", "ﾀﾜｰに"), ("京東", "ワタ")),
    "ฉันรักภาษาไทยมาก": (("ภาษา", "ภาษาไทย", "รัก"), ("ไทยภาษา",)),
    "ខ្ញុំស្រឡាញ់\u200bភាសាខ្មែរ": (("ភាសា", "ភាសា\u200bខ្មែរ", "ស្រឡាញ់ភាសា"), ("ខ្មែរភាសា",)),
    "ພາສາລາວ": (("ພາສາ", "ລາວ"), ("ລາວພາ",)),
    "မြန်မာဘာသာ": (("မြန်မာ", "ဘာသာ"), ("ဘာသာမြန်မာ",)),
    "我买了iPhone15手机": (
        ("iphone15", "手机 IPHONE15", "我买了", "iPhone15手机"), ("iphone", "了手")),
    "葛\U000e0100飾区": (("葛飾", "葛\U000e0100飾区"), ("飾葛",)),
}


async def test_part_of_a_run_is_found_as_it_stands(alice: Person, bob: Person) -> None:
    """In scripts that put no spaces between words any part of a run finds a message, and only as it
    stands; beside it, words of other scripts are whole."""
    chat = await alice.opens(bob)
    for text in RUNS:
        await alice.says(chat, text)
    for text, (found, missed) in RUNS.items():
        for q in found:
            assert text in await finds(bob, chat, q), (text, q)
        for q in missed:
            assert text not in await finds(bob, chat, q), (text, q)


@of_the_index
async def test_run_whose_pairs_stand_apart_is_not_found(
    app: web.Application, alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that holds each pair of a run, but not the run, is not found, however many of them
    there are between those that are: pages are filled from what comes after, and lead on."""
    monkeypatch.setattr(messenger, "SEARCH_SECONDS", 0)  # a message a page, found or not
    monkeypatch.setattr(search, "MOMENT_SECONDS", 0)
    app[messenger.INDEX].texts = Texts(0)
    chat = await alice.opens(bob)
    for number in range(20):
        await alice.says(chat, f"甲乙丙 {number}" if number % 7 == 0 else f"甲乙。乙丙 {number}")
    expected = [f"甲乙丙 {number}" for number in (14, 7, 0)]
    read = await pages(bob, query(chat, "甲乙丙", "&limit=20"))
    assert [len(one) for one in read].count(0) > 10
    assert [message["text"] for one in read for message in one] == expected
    assert len(await finds(bob, chat, "甲乙 乙丙", "&limit=20")) == 20  # needs no looking
    monkeypatch.setattr(messenger, "SEARCH_SECONDS", 60)
    assert await finds(bob, chat, "甲乙丙", "&limit=20") == expected
    assert await finds(bob, chat, "甲乙 乙丙", "&limit=20") == await finds(bob, chat, "乙丙")
    for limit in (1, 2, 3, 5, 7):
        read = await pages(bob, query(chat, "甲乙丙", f"&limit={limit}"))
        assert all(len(one) <= limit for one in read)
        assert [message["text"] for one in read for message in one] == expected


async def test_slow_database_does_not_make_pages_small(
    alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time that a search may look through texts is not spent while it waits for them."""
    chat, messages_of = await alice.opens(bob), messenger.messages_of
    for number in range(10):
        await alice.says(chat, f"甲乙丙 {number}")

    async def slowly(*args: Any) -> Any:
        await asyncio.sleep(2 * messenger.SEARCH_SECONDS)
        return await messages_of(*args)

    monkeypatch.setattr(messenger, "messages_of", slowly)
    for q in ("甲乙丙", "甲乙"):
        assert [len(one) for one in await pages(bob, query(chat, q, "&limit=10"))] == [10]


@of_the_index
async def test_messages_of_many_words_are_indexed_in_pieces(
    app: web.Application, alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece of the index takes in no more words than its limit, but for the last text."""
    monkeypatch.setattr(search, "INDEX_WORDS_MAX", 5000)
    monkeypatch.setattr(search, "MOMENT_SECONDS", 60)  # all texts are taken apart in a moment
    dice, pieces = random.Random(7), []
    database = app[messenger.DATABASE]
    rows = database.rows

    async def notes(statement: str, *arguments: Any) -> Any:
        if statement == messenger.INDEX_WORDS:
            pieces.append(sum(len(words.split()) for words in arguments[4]))
        return await rows(statement, *arguments)

    chat = await alice.opens(bob)
    texts = ["".join(chr(dice.randrange(0x4E00, 0x9FFF)) for _ in range(1500)) for _ in range(6)]
    for text in texts:
        await alice.says(chat, text)
    monkeypatch.setattr(database, "rows", notes)
    for text in texts:
        assert await finds(bob, chat, text[700:800]) == [text]
    assert len(pieces) > 2
    assert max(pieces) <= 5000 + 3000


@of_the_index
async def test_index_puts_nothing_off(sql: asyncpg.Connection) -> None:
    """Nobody has to put other messages' words in order, nor to read them one by one: that took
    longer than a statement may."""
    options = await sql.fetchval(
        "select reloptions from pg_class where relname = 'message_words_search'")
    assert options == ["fastupdate=off"]


@of_the_index
async def test_nothing_is_indexed_of_a_chat_that_is_gone(
    alice: Person, bob: Person, sql: asyncpg.Connection
) -> None:
    """Words that come after their chat was swept away are dropped: they would outlast it."""
    chat = await alice.founds(bob)
    await sql.execute("delete from participants where chat_id = $1", chat)
    await sql.execute("delete from chats where id = $1", chat)
    await sql.fetch(messenger.INDEX_WORDS, chat, 0, 1, [1], ["word"])
    assert await sql.fetchval("select count(*) from message_words") == 0
    assert await sql.fetchval("select count(*) from search_positions") == 0


@of_the_index
async def test_words_of_the_old_rule_are_indexed_anew(
    alice: Person, bob: Person, sql: asyncpg.Connection
) -> None:
    """After the migration what was indexed as whole words before is found by its parts."""
    chat = await alice.opens(bob)
    sent = await alice.says(chat, "我家在上海东边。")
    await sql.execute("insert into search_positions values ($1, 1)", chat)
    await sql.execute(
        "insert into message_words values ($1, 1, array[$2])", chat, f"{chat}:0:我家在上海东边")
    assert await finds(bob, chat, "上海") == []
    await sql.execute((SQL / "0006_runs_in_search.sql").read_text())
    assert await finds(bob, chat, "上海") == [sent["text"]]


async def test_query_is_measured_in_nfc(alice: Person, bob: Person) -> None:
    """A query has up to 200 characters however its accents are written, a name's start up to 50."""
    chat = await alice.opens(bob)
    await alice.says(chat, "ế" * 200)
    for letter in ("ế", "e\u0302\u0301"):
        assert await finds(bob, chat, letter * 200) == ["ế" * 200]
        problem = await bob.gets(query(chat, letter * 201), 422)
        assert problem["errors"][0]["loc"] == "$.q"
        assert await bob.gets(f"/users?q={quote(letter * 50)}") == []
        problem = await bob.gets(f"/users?q={quote(letter * 51)}", 422)
        assert problem["errors"][0]["loc"] == "$.q"


async def test_query_without_a_word_finds_nothing(alice: Person, bob: Person) -> None:
    """An empty query, punctuation and emoji are not words: the answer is an empty list, and a
    message of emoji cannot be found."""
    chat = await alice.opens(bob)
    for text in ("🙂🎉", "❤️ 1️⃣ 👍🏽 👨‍👩‍👧", "... \u0301", "love ❤️"):
        await alice.says(chat, text)
    for q in (
        "", " ", "...", "!? -", "🙂", "❤️", "👍🏽", "👨‍👩‍👧",
        "\u0301", "\u200d", "\ufe0f", "%", "_",
    ):
        answer = await bob.asks("GET", f"/chats/{chat}/messages", params={"q": q})
        assert (answer.status, await answer.json()) == (200, []), q
        assert "Link" not in answer.headers
    assert await finds(bob, chat, "❤️ love") == ["love ❤️"]


async def test_long_words_do_no_harm(alice: Person, bob: Person) -> None:
    """A message of one word of 4,096 characters, in any script, is indexed like any other."""
    chat = await alice.opens(bob)
    dice = random.Random(7)
    word = "".join(chr(dice.randrange(0x4E00, 0x9FFF)) for _ in range(4096))
    wide = "\ufdfa" * 4096  # each of them folds to 18 characters, spaces among them
    for text in (word, wide, "".join(dice.choices("abcdefghij0123456789", k=4096))):
        await alice.says(chat, text)
    many = " ".join(str(number) for number in range(1000))
    await alice.says(chat, many)
    await alice.says(chat, "after it")
    assert await finds(bob, chat, "after") == ["after it"]
    assert await finds(bob, chat, "7 999") == [many]
    assert await finds(bob, chat, word[:200]) == [word]
    assert await finds(bob, chat, word[199::-1]) == []
    assert await finds(bob, chat, "\ufdfa" * 200) == [wide]


@of_the_index
async def test_message_that_is_edited_during_a_search_is_not_found_by_its_old_words(
    alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a search answers holds its words as it is answered, also where it was edited after
    the search had begun."""
    chat = await alice.opens(bob)
    first = await alice.says(chat, "apple pie")
    await alice.says(chat, "apple tart")
    index_for_search = search.SearchIndex.index_for_search

    async def edit_then(index: Any, *arguments: Any) -> bool:
        is_whole = await index_for_search(index, *arguments)
        await edits(alice, first, "banana split")
        return is_whole

    monkeypatch.setattr(search.SearchIndex, "index_for_search", edit_then)
    assert await finds(bob, chat, "apple") == ["apple tart"]


# ---- What changes


async def test_change_is_found_at_once(
    alice: Person, bob: Person, elsewhere: Elsewhere
) -> None:
    """A message is found as it is at the time of the search, at any server: posted, edited or
    deleted."""
    chat = await alice.opens(bob)
    there = await elsewhere.takes(bob)
    for number in range(5):
        sent = await alice.says(chat, f"old {number}")
        assert await finds(there, chat, f"old {number}") == [f"old {number}"]
        await edits(alice, sent, f"new {number}")
        assert await finds(bob, chat, f"old {number}") == []
        assert await finds(there, chat, f"{number} new") == [f"new {number}"]
    await deletes(alice, sent)
    for who in (bob, there):
        assert await finds(who, chat, "4") == []
        assert await finds(who, chat, "new") == [f"new {number}" for number in (3, 2, 1, 0)]


@of_the_index
async def test_indexers_that_race_leave_no_stale_word(
    app: web.Application, alice: Person, bob: Person, elsewhere: Elsewhere
) -> None:
    """An indexer that read a message before an edit and writes after another has indexed the edit
    changes nothing: only the new words are found."""
    chat = await alice.opens(bob)
    sent = await alice.says(chat, "old")
    slow, fast = app[messenger.INDEX], elsewhere.app[messenger.INDEX]
    database = app[messenger.DATABASE]
    rows, held, go_on = database.rows, asyncio.Event(), asyncio.Event()

    async def stops_before_writing(statement: str, *arguments: Any) -> Any:
        if statement == messenger.INDEX_WORDS and not held.is_set():
            held.set()
            await go_on.wait()
        return await rows(statement, *arguments)

    for first in ("old", "older"):  # the first words of the chat, and later ones
        database.rows = stops_before_writing  # type: ignore[method-assign]
        racing = asyncio.create_task(slow.index(chat))
        await held.wait()
        await edits(alice, sent, f"new {first}er")
        await fast.index(chat)
        go_on.set()
        await racing
        assert await finds(bob, chat, first) == []
        assert await finds(bob, chat, "new") == [f"new {first}er"]
        await edits(alice, sent, "older")
        held.clear()
        go_on.clear()
    del database.rows


class Forgetful(set[int]):
    """Leaves nothing to the background."""

    def add(self, _chat: int) -> None:
        """Forget a chat."""

    def update(self, *_chats: Iterable[int]) -> None:
        """Forget chats."""


@of_the_index
async def test_chat_that_is_hard_to_index_makes_few_searches_wait(
    app: web.Application, alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While somebody indexes a chat, and for a while after it took a search long, searches there do
    not; they find everything in the messages themselves."""
    index, database = app[messenger.INDEX], app[messenger.DATABASE]
    rows, held, go_on, indexed = database.rows, asyncio.Event(), asyncio.Event(), []

    async def waits(statement: str, *arguments: Any) -> Any:
        if statement == messenger.INDEX_WORDS:
            indexed.append(arguments[0])
            held.set()
            await go_on.wait()
        return await rows(statement, *arguments)

    chat, other = await alice.opens(bob), await alice.founds(bob)
    monkeypatch.setattr(index, "_waiting", Forgetful())
    await alice.says(chat, "the first word")
    monkeypatch.setattr(database, "rows", waits)
    indexing = asyncio.create_task(index.index_for_search(chat, ""))
    await held.wait()
    await alice.says(chat, "the second word")
    assert await finds(bob, chat, "word") == ["the second word", "the first word"]
    assert indexed == [chat]
    await asyncio.sleep(0.5)
    go_on.set()
    await indexing
    indexed.clear()
    await alice.says(chat, "the third word")
    await alice.says(other, "another word")
    assert await finds(bob, chat, "third") == ["the third word"]
    assert await finds(bob, other, "another") == ["another word"]
    assert indexed == [other]


async def test_search_finds_what_is_posted_while_many_index(
    alice: Person, bob: Person, elsewhere: Elsewhere,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While others post, edit and search at two servers, each finds at once the word that they
    wrote last."""
    monkeypatch.setattr(search, "INDEX_PAGE", 3)
    chat = await alice.opens(bob)

    async def works(who: Person, name: str) -> None:
        for number in range(4):
            sent = await who.says(chat, f"{name} a{number}")
            await edits(who, sent, f"{name} b{number}")
            assert await finds(who, chat, f"{name} a{number}") == []
            assert await finds(who, chat, f"b{number} {name}") == [f"{name} b{number}"]

    there = await elsewhere.takes(bob)
    await asyncio.gather(*[works(who, f"n{n}") for n, who in enumerate((alice, bob, there) * 2)])
    found = await finds(bob, chat, "b3")
    assert sorted(found) == [f"n{n} b3" for n in range(6)]


@of_the_index
async def test_words_are_taken_in_without_a_search(
    app: web.Application, alice: Person, bob: Person, sql: asyncpg.Connection
) -> None:
    """The words of what was posted and edited are indexed in the background, without a search."""
    chat = await alice.opens(bob)
    sent = await alice.says(chat, "old")
    await app[messenger.INDEX].run()
    words = "select words from message_words where chat_id = $1"
    assert await sql.fetchval(words, chat) == [f"{chat}:0:old"]
    await edits(alice, sent, "new")
    await app[messenger.INDEX].run()
    assert await sql.fetchval(words, chat) == [f"{chat}:0:new"]
    assert await sql.fetchval("select rev from search_positions where chat_id = $1", chat) == 2


# ---- Pages


async def test_search_is_paged_to_the_end(alice: Person, bob: Person) -> None:
    """`limit` and the Link lead through all matches once, newest first; `before` is an exclusive
    number; `after`, a query that is too long and NUL are 422."""
    chat = await alice.opens(bob)
    for number in range(1, 12):
        await alice.says(chat, f"word & {number}" if number % 2 else "another")
    expected = [11, 9, 7, 5, 3, 1]
    for limit, sizes in ((1, [1] * 6), (4, [4, 2]), (5, [5, 1]), (6, [6]), (100, [6])):
        found = await pages(bob, query(chat, "Word & word", f"&limit={limit}"))
        assert [len(page) for page in found] == sizes, limit
        assert [m["seq"] for page in found for m in page] == expected, limit
    for before in (0, 1, 2, 7, 12, 2**63 - 1):
        found = await bob.gets(query(chat, "word", f"&before={before}"))
        assert [m["seq"] for m in found] == [seq for seq in expected if seq < before]
    for more in ("&after=0", "&after=1&before=3"):
        problem = await bob.gets(query(chat, "word", more), 422)
        assert problem["errors"][0]["loc"] == "$.after"
    for q in ("x" * 201, "a%00b"):
        problem = await bob.gets(f"/chats/{chat}/messages?q={q}", 422)
        assert problem["errors"][0]["loc"] == "$.q"


async def test_search_passes_from_stretch_to_stretch(
    alice: Person, bob: Person, sql: asyncpg.Connection
) -> None:
    """In a chat of more numbers than one stretch of the index holds, a word is found on both sides
    of each border, page by page, and so is an edit."""
    chat, last = await alice.opens(bob), 2 * STRETCH + 2
    borders = [n for n in range(last, 0, -1) if n % STRETCH in (0, 1, STRETCH - 1)]
    assert len(borders) == 7
    await sql.execute(  # what lies between was taken by edits
        "insert into messages (chat_id, seq, rev, id, sender_id, text, created_at)"
        " select $1, n, n, gen_random_uuid(), $2, 'border', now() from unnest($3::bigint[]) n",
        chat, alice.id, borders,
    )
    await sql.execute("update chats set last_rev = $2, last_seq = $2 where id = $1", chat, last)
    for limit in (1, 2, 3, 7):
        found = await pages(bob, query(chat, "border", f"&limit={limit}"))
        assert [m["seq"] for page in found for m in page] == borders
    sent = (await bob.gets(f"/chats/{chat}/messages?before={STRETCH + 1}&limit=1"))[0]
    await edits(alice, sent, "moved BORDER")
    await alice.says(chat, "moved too")
    found = await bob.gets(query(chat, "moved"))
    assert [m["seq"] for m in found] == [last + 2, STRETCH]
    assert [m["seq"] for m in await bob.gets(query(chat, "border moved"))] == [STRETCH]
    assert await finds(bob, chat, "border", f"&before={STRETCH + 1}&limit=1") == ["moved BORDER"]


# ---- Whose


async def test_search_stays_in_its_chat(
    alice: Person, bob: Person, carol: Person
) -> None:
    """Only messages of this chat are found; a stranger gets the same 404 whatever is in it."""
    chat, other, foreign = await alice.opens(bob), await alice.founds(bob), await alice.opens(carol)
    for place in (chat, other, foreign):
        await alice.says(place, f"word in {place}")
        await alice.says(place, f"{chat}:0:word {other}:0:word")
    assert await finds(bob, chat, "in") == [f"word in {chat}"]
    assert await finds(bob, other, "in") == [f"word in {other}"]
    assert await finds(bob, other, f"{other}:0:word") == [f"{chat}:0:word {other}:0:word"]
    nowhere = await bob.gets(query(2**40, "word"), 404)
    assert nowhere["type"] == "chat-not-found"
    for q in ("word", "nothing", ""):
        refused = await bob.gets(query(foreign, q), 404)
        assert refused == nowhere | {"request_id": refused["request_id"]}
    await alice.says(foreign, "not indexed yet")
    refused = await bob.gets(query(foreign, "indexed"), 404)
    assert refused == nowhere | {"request_id": refused["request_id"]}
    assert await finds(carol, foreign, "indexed") == ["not indexed yet"]
