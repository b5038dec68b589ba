"""Queues whose keys take turns."""

from plumbing.queues import Queues


def queues_of(*things: str) -> Queues[str]:
    """Let things wait, each under its first letter."""
    queues: Queues[str] = Queues()
    for thing in things:
        queues.append(thing[0], thing)
    return queues


def taken(queues: Queues[str]) -> list[str]:
    """Take all that waits."""
    things = []
    while following := queues.take():
        things.append(following[1])
    return things


def test_keys_take_turns_and_things_of_a_key_keep_their_order() -> None:
    """Of each key that has something one thing is taken after the other, the first first."""
    queues = queues_of("a1", "a2", "a3", "b1", "c1", "c2")
    assert len(queues) == 6
    assert sorted(queues) == ["a1", "a2", "a3", "b1", "c1", "c2"]
    assert taken(queues) == ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert len(queues) == 0
    assert queues.take() is None


def test_thing_that_is_removed_is_not_taken() -> None:
    """A thing may be taken out wherever it stands; where it is not, nothing happens."""
    queues = queues_of("a1", "a2", "b1")
    for key, thing in (("a", "a2"), ("b", "b1"), ("b", "b1"), ("c", "c1"), ("a", "a3")):
        queues.remove(key, thing)
    assert len(queues) == 1
    assert list(queues.keys()) == ["a"]
    assert taken(queues) == ["a1"]


def test_nobody_in_particular_has_turns_as_others_do() -> None:
    """None is a key like any other."""
    queues = queues_of("a1", "a2")
    queues.append(None, "nobody's")
    assert taken(queues) == ["a1", "nobody's", "a2"]


def test_what_is_put_back_comes_before_all_others_of_its_key() -> None:
    """A thing that is put back is the next of its key."""
    queues = queues_of("a2", "b1")
    queues.put_back("a", "a1")
    assert len(queues) == 3
    assert taken(queues) == ["a1", "b1", "a2"]


def test_key_that_is_not_free_is_passed_over() -> None:
    """It keeps its place: it is the next once it is free."""
    queues = queues_of("a1", "b1", "b2")
    assert queues.take(lambda key: key != "a") == ("b", "b1")
    assert queues.take(lambda key: key not in "ab") is None
    assert taken(queues) == ["a1", "b2"]


def test_things_of_a_key_are_dropped_together() -> None:
    """What is dropped is answered, and nothing of it waits any longer."""
    queues = queues_of("a1", "b1", "a2")
    assert list(queues.drop("a")) == ["a1", "a2"]
    assert list(queues.drop("a")) == []
    assert taken(queues) == ["b1"]
