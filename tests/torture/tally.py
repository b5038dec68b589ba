"""What was counted in a run, and what was found wrong."""

import time
from collections import Counter
from collections.abc import Iterator

TOLD = 8  # findings of each kind that are told in words


class Tally:
    """What was counted, and what was found wrong."""

    kinds = ("lost", "doubled", "missed", "misordered", "leaked", "fooled", "wrong")

    def __init__(self, speaks: bool) -> None:
        self.began = time.monotonic()
        self.seconds = 0.0  # that it took, in the end
        self.speaks = speaks
        self.sent = self.acknowledged = self.changed = self.delivered = 0
        self.undone = 0  # acknowledged, and rightly gone with a database that went back
        self.returns = 0  # of the database to what it was
        self.told = 0  # clients that were told so
        self.slowest_return = 0.0  # seconds until every store was the database's again
        self.found: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.recovery: dict[str, list[float]] = {}  # by kind of fault: seconds
        self.slowest_delivery = 0.0  # with the hints dropped
        # While a chat was held: what became of posts to it and to the others, slowest answers.
        self.beside: Counter[str] = Counter()
        self.slowest_beside = 0.0

    def say(self, text: str) -> None:
        """Print a line with the time of the run."""
        if self.speaks:
            print(f"{time.monotonic() - self.began:7.1f} s  {text}", flush=True)

    def blame(self, kind: str, text: str, times: int = 1) -> None:
        """Count something that must not be, and tell of the first few in words."""
        if times:
            self.found[kind] += times
            if self.found[kind] - times < TOLD:
                self.say(f"{kind.upper()}: {text}" + f" ({times} times)" * (times > 1))

    def note_beside(self, is_held: bool, status: int, took: float) -> None:
        """Count what a post was answered while a chat was held: it, or another."""
        whose = "its own" if is_held else "the others'"
        what = {200: "accepted", 201: "accepted", 503: "refused", 0: "unanswered"}.get(status)
        if what is not None:  # else the sender is out
            self.beside[f"{whose} {what}"] += 1
            self.slowest_beside = max(self.slowest_beside, 0.0 if is_held else took)

    def note_return(self, took: float) -> None:
        """Note how long it took after a return until every store was the database's."""
        self.slowest_return = max(self.slowest_return, took)

    def progress(self) -> str:
        """What a line of progress says."""
        return f"{self._flow()}  faults {self.faults.total()}  {self.verdict()}"

    def _flow(self) -> str:
        return (
            f"sent {self.sent}  acknowledged {self.acknowledged}  changed {self.changed}"
            f"  delivered {self.delivered}")

    def count_recoveries(self) -> int:
        """Tell how many faults are over."""
        return sum(map(len, self.recovery.values()))

    def slowest(self) -> dict[str, float]:
        """The slowest recovery from each kind of fault, in seconds."""
        return {kind: max(times) for kind, times in self.recovery.items()}

    def verdict(self) -> str:
        """The counts that must be 0."""
        return "  ".join(f"{kind} {self.found[kind]}" for kind in self.kinds)

    def summary(self) -> Iterator[str]:
        """What the run ends with."""
        yield self._flow()
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items()))
        yield f"faults {self.faults.total()}: {kinds}"
        if self.returns:
            yield (
                f"acknowledged, and undone with a database that went back: {self.undone};"
                f" {self.told} times a client was told of it; after {self.slowest_return:.2f} s"
                " each had what the database has")
        yield self.verdict()
        slowest = sorted(self.slowest().items(), key=lambda each: -each[1])
        yield "slowest recovery: " + ", ".join(f"{kind} {took:.2f} s" for kind, took in slowest)
        if self.slowest_delivery:
            yield f"slowest delivery with the hints dropped: {self.slowest_delivery:.2f} s"
        if self.beside:
            beside = ", ".join(f"{what} {count}" for what, count in sorted(self.beside.items()))
            yield (
                f"posts while a chat was held: {beside};"
                f" the others' slowest answer {self.slowest_beside:.2f} s")
