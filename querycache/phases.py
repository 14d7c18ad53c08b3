"""Both phases of the ledger's protocol, for the transactions of a database.

**Phase one**, just before COMMIT: every tag that a transaction has changed is marked in every ledger, so that no lookup
hits or fills under it while the commit becomes visible. The ledgers may be told a little earlier, so that there is less to
wait for. **Phase two**, just after: each tag gets a new version; always, also where COMMIT failed or its outcome is
unknown.

A ledger that cannot be reached in phase one is owed the new versions where the transaction commits all the same. As long as
they are owed, this process takes no answer from it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

from querycache.errors import CacheUnavailable
from querycache.events import Telemetry
from querycache.ledger import Ledger, Marks
from querycache.regions import Regions

__all__ = ["Consistency", "Marking", "OnOutage", "Phases"]

Consistency = Literal["strict", "commit"]
OnOutage = Literal["available", "refuse"]


@dataclass(slots=True)
class Marking:
    """What the ledgers were told of one transaction.

    Attributes:
        told: the tags that they are to mark.
        since: when they were told first, in monotonic seconds.
        awaited: what waits for the marks.
        marks: those that were made.
        unmarked: ledgers that make none, and why; None where none is asked for.
        complete: True from the end of phase one until phase two.
    """

    told: set[str] = field(default_factory=set)
    since: float = 0.0
    awaited: list[tuple[Ledger, Callable[[], Marks]]] = field(default_factory=list)
    marks: list[tuple[Ledger, Marks]] = field(default_factory=list)
    unmarked: dict[Ledger, CacheUnavailable | None] = field(default_factory=dict)
    complete: bool = False


class Phases:
    """Tells the ledgers of the commits of this process.

    Args:
        regions: whose answers are made invalid.
        telemetry: is told of faults.
        consistency: "strict" for both phases; "commit" for the second alone.
        on_outage: whether a COMMIT goes through ("available") or is refused ("refuse") when a cache server cannot
            be reached before it.
    """

    def __init__(
        self, regions: Regions, telemetry: Telemetry, consistency: Consistency, on_outage: OnOutage
    ) -> None:
        self._regions = regions
        self._telemetry = telemetry
        self._consistency = consistency
        self._on_outage = on_outage
        self._patience = min(ledger.lease for ledger in regions.ledgers) / 4
        self._lock = threading.Lock()
        self._owed: dict[Ledger, set[str]] = {}

    def tell(self, marking: Marking, tags: Collection[str]) -> None:
        """Have tags marked that will be committed in a moment; :meth:`one` waits for it."""
        new = {tag for tag in tags if tag not in marking.told}
        if not new:
            return
        if not marking.told:
            marking.since = time.monotonic()
        marking.told |= new
        if self._consistency == "commit":
            marking.unmarked = dict.fromkeys(self._regions.ledgers)
        for ledger, keys in self._regions.tag_keys(new):
            if ledger in marking.unmarked:
                continue
            try:
                marking.awaited.append((ledger, ledger.send_begin(keys)))
            except CacheUnavailable as fault:
                marking.unmarked[ledger] = fault

    def one(self, marking: Marking, tags: Collection[str]) -> None:
        """Phase one, before COMMIT: until these tags are marked.

        Raises:
            CacheUnavailable: a cache server does not answer, and commits are to be refused then.
        """
        if marking.told and time.monotonic() - marking.since > self._patience:
            marking.told = set()  # somebody took their time: those marks could be given up while COMMIT runs
        self.tell(marking, tags)
        self._wait(marking)
        fault = next(iter(marking.unmarked.values()), None)
        if fault is not None and self._on_outage == "refuse":
            raise fault
        marking.complete = True

    @staticmethod
    def _wait(marking: Marking) -> None:
        awaited, marking.awaited = marking.awaited, []
        for ledger, marks in awaited:
            try:
                marking.marks.append((ledger, marks()))
            except CacheUnavailable as fault:
                marking.unmarked[ledger] = fault

    def two(self, marking: Marking) -> None:
        """Phase two, after COMMIT: new versions for what was marked, and the marks taken off.

        Also where there was no COMMIT after all; then nothing is owed to a ledger that could not be reached.
        """
        if not marking.told:
            return
        self._wait(marking)
        told, marks, owed = marking.told, marking.marks, marking.unmarked if marking.complete else ()
        marking.told, marking.marks, marking.unmarked, marking.complete = set(), [], {}, False
        for ledger, marks_there in marks:
            try:
                ledger.end(marks_there)
            except CacheUnavailable:
                # the marks stay: nothing that depends on them is served until they have healed
                self._telemetry.emit("error", "", "", "unavailable after commit")
        for ledger, keys in self._regions.tag_keys(told) if owed else ():
            if ledger in owed:
                with self._lock:
                    self._owed.setdefault(ledger, set()).update(keys)
                if self.owes(ledger):
                    self._telemetry.emit("error", "", "", "unavailable at commit")

    def owes(self, ledger: Ledger) -> bool:
        """True while a ledger could not be told of a commit; tells it, if it can be reached now."""
        if not self._owed:
            return False
        tags = self._owed.get(ledger)
        if tags is None:
            return False
        try:
            ledger.bump(sorted(tags))
        except CacheUnavailable:
            return True
        with self._lock:
            left = self._owed.get(ledger, set()) - tags
            if left:
                self._owed[ledger] = left
            else:
                self._owed.pop(ledger, None)
        return bool(left)

    def marks(self, ledger: Ledger) -> bool:
        """True if no commit becomes visible before its tags were marked in a ledger, so that what is clean is current."""
        return self._consistency == "strict" and ledger.store.atomic
