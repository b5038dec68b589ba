"""Writers that have no database: to see what a GroupWriter does by itself."""

from collections.abc import Sequence

from plumbing.groups import GroupWriter, Item


class Echo(GroupWriter[Item, Item]):
    """A writer whose outcomes are the items themselves. Nobody holds any lock, and each item has
    one of its own.
    """

    async def commit(self, items: list[Item]) -> list[Item]:
        """Answer the items."""
        return items

    def publish(
        self, items: list[Item], rows: Sequence[Item], again: list[bool]
    ) -> list[Item | Exception]:
        """Answer the rows."""
        return list(rows)

    def lock_of(self, item: Item) -> Item:
        """Lock nothing in common."""
        return item

    async def free(self, locks: list[Item]) -> set[Item]:
        """Answer that nobody holds any lock."""
        return set(locks)
