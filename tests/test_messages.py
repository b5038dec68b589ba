"""Posting, history and read status over REST."""

from conftest import Person, new_id


async def test_message_is_stored_as_sent(alice: Person, bob: Person) -> None:
    """A posted message is answered whole, and the partner reads the same."""
    chat = await alice.opens(bob)
    sent = await alice.says(chat, "Привет, 世界 🙂\n ")
    assert sent["seq"] == sent["rev"] == 1
    assert sent["sender_id"] == alice.id
    assert await bob.gets(f"/chats/{chat}/messages") == [sent]


async def test_socket_hears(alice: Person, bob: Person) -> None:
    """What is posted is heard live."""
    chat = await alice.opens(bob)
    line = await bob.listens_live(chat)
    await alice.says(chat, "one")
    m = (await line.hears("message"))["data"]
    await line.says("two", ref=7, id=new_id())
    assert {(await line.hears())["type"], (await line.hears())["type"]} == {"message", "ack"}
    await bob.reads(chat, m)
    print(await line.hears("read"))
    print(await alice.gets("/chats"))
