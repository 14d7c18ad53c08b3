"""Both phases of the ledger's protocol, for the transactions of a database.

**Phase one**, just before COMMIT: every tag that a transaction has changed is marked in every ledger, so that no lookup
hits or fills under it while the commit becomes visible. **Phase two**, just after: each tag gets a new version; always,
also where COMMIT failed or its outcome is unknown.

A ledger that cannot be reached in phase one is tried once more after the COMMIT, and then owed the new versions. As long as
they are owed, this process takes no answer from it, and a thread tries to tell it.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from querycache import forks
from querycache.errors import CacheUnavailable
from querycache.events import Telemetry
from querycache.ledger import Ledger, Marks
from querycache.regions import Regions
from querycache.tags import EVERYTHING

__all__ = ["MOST_OWED", "Consistency", "Marking", "OnOutage", "Phases"]

_log = logging.getLogger("querycache")

MOST_OWED = 20_000
"""Tags that a ledger may be owed; of more than these it is told that everything is invalid, which takes it less time."""

Consistency = Literal["strict", "commit"]
OnOutage = Literal["available", "refuse"]


@dataclass(slots=True)
class Marking:
    """What phase one has done for a transaction.

    Attributes:
        tags: those that it was to mark; None before it.
        marks: those that it has made.
        unmarked: ledgers that it could not reach, or was not to.
    """

    tags: set[str] | None = None
    marks: list[tuple[Ledger, Marks]] = field(default_factory=list)
    unmarked: list[Ledger] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Commit:
    """One that a ledger was not told of.

    Attributes:
        certain: False where nobody knows whether it has taken place yet.
    """

    certain: bool


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
        self._lock = forks.lock()
        # By tag, for the commit that owes it last: what is owed anew while it is told is owed still.
        self._owed: dict[Ledger, dict[str, _Commit]] = {}
        self._payer: threading.Thread | None = None
        self._complained = False

    def one(self, marking: Marking, tags: set[str]) -> None:
        """Phase one, before COMMIT: mark those tags that are not marked yet.

        Raises:
            CacheUnavailable: a cache server does not answer, and commits are to be refused then.
        """
        marked = marking.tags or set()
        new = tags - marked
        marking.tags = marked | new
        if self._consistency == "commit":
            marking.unmarked = list(self._regions.ledgers)
        try:
            keys = self._regions.tag_keys(new)
            for ledger in self._regions.ledgers if keys else ():
                if ledger not in marking.unmarked:
                    self._mark(marking, ledger, keys)
        except BaseException:
            self.two(marking)  # it is not committed now; where it is tried again, all is marked again
            raise

    def _mark(self, marking: Marking, ledger: Ledger, keys: list[str]) -> None:
        try:
            marking.marks.append((ledger, ledger.begin(keys)))
        except CacheUnavailable:
            if self._on_outage == "refuse":
                raise
            marking.unmarked.append(ledger)

    def two(self, marking: Marking, certain: bool = True) -> None:
        """Phase two, after COMMIT: new versions for what phase one was to mark, and the marks taken off.

        Args:
            marking: what phase one has done.
            certain: False where the COMMIT may be under way still. Then the marks stay, and heal as those of a writer that
                died.
        """
        if marking.tags is None:
            return
        marks, unmarked, tags = marking.marks, marking.unmarked, marking.tags
        # where nothing was marked, what is not told now is owed, also where a signal comes between
        left = [*unmarked, *(ledger for ledger, _ in marks if not ledger.store.atomic)]
        commit = _Commit(certain)
        try:
            marking.marks, marking.unmarked, marking.tags = [], [], None
            if self._consistency == "strict":
                for ledger in unmarked:
                    self._owe(ledger, self._debts(tags, commit))
            for ledger, marks_there in marks:
                if not certain and ledger.store.atomic:
                    continue
                try:
                    ledger.end(marks_there)
                except CacheUnavailable:
                    # the marks stay, where there are any: nothing that depends on them is served until they have healed
                    self._telemetry.emit("error", "", "", "unavailable after commit")
                else:
                    if not ledger.store.atomic:
                        left.remove(ledger)
            for ledger in unmarked:
                debts = self._debts(tags, commit)
                if self._tell(ledger, debts, essential=True):
                    self._settle(ledger, debts)
                    left.remove(ledger)
                else:
                    self._telemetry.emit("error", "", "", "unavailable at commit")
        finally:
            for ledger in left:
                self._owe(ledger, self._debts(tags, commit))
            if self._owed and any(list(self._owed.values())):
                self._pay_later()

    def _debts(self, tags: set[str], commit: _Commit) -> dict[str, _Commit]:
        return dict.fromkeys(self._regions.tag_keys(tags), commit)

    def _tell(self, ledger: Ledger, debts: dict[str, _Commit], *, essential: bool = False) -> bool:
        """Tell a ledger of tags that have changed. Returns False if it cannot be reached.

        Args:
            essential: try it although the server failed a moment ago.
        """
        try:
            ledger.bump(list(debts), essential=essential)
            uncertain = [tag for tag, commit in debts.items() if not commit.certain]
            if uncertain and ledger.store.atomic:
                ledger.begin(uncertain)  # to heal, as the marks of a writer that died
        except CacheUnavailable:
            return False
        return True

    # The debts of a ledger are changed in place: a signal, or an object that is deleted, may commit in between.

    def _owe(self, ledger: Ledger, debts: dict[str, _Commit]) -> None:
        with self._lock:
            owed = self._owed.setdefault(ledger, {})
            paid: list[str] = []
            if len(owed) + len(debts) > MOST_OWED:
                certain = all(commit.certain for each in (owed, debts) for commit in list(each.values()))
                paid = list(owed)
                debts = dict.fromkeys(self._regions.tag_keys([EVERYTHING]), _Commit(certain))
            for tag, commit in debts.items():
                before = owed.get(tag)
                # what nobody knows of a commit, a later one does not tell
                owed[tag] = commit if before is None or before.certain else _Commit(False)
            for tag in paid:
                if tag not in debts:
                    owed.pop(tag, None)

    def _settle(self, ledger: Ledger, debts: dict[str, _Commit]) -> None:
        """Forget what was told, unless it is owed anew."""
        with self._lock:
            owed = self._owed.get(ledger, {})
            for tag, commit in debts.items():
                found = owed.pop(tag, commit)
                if found is not commit:
                    owed.setdefault(tag, found)

    def _pay_later(self) -> None:
        """Have a thread pay what is owed, since nobody may ask or commit here for a long time."""
        if sys.is_finalizing():
            return  # no thread begins any more, and start() would wait for it
        with self._lock:
            if self._payer is None or not self._payer.is_alive():  # as after a fork
                payer = threading.Thread(
                    target=_pay, args=(weakref.ref(self),), name="querycache-debts", daemon=True
                )
                with suppress(RuntimeError):  # where the interpreter is about to end
                    payer.start()
                    self._payer = payer

    def pay(self) -> bool:
        """Tell the ledgers what they are owed, as far as they can be reached. Returns True while there is some left.

        For the thread that does nothing else.
        """
        for ledger, owed in list(self._owed.items()):
            debts = dict(owed)
            try:
                if debts and self._tell(ledger, debts):
                    self._settle(ledger, debts)
            except Exception:  # noqa: BLE001 - without this thread nobody would pay
                if not self._complained:
                    _log.exception("what is owed could not be paid; trying again every %g s", _PAY_EVERY)
                self._complained = True
        with self._lock:
            left = any(list(self._owed.values()))
            if not left and self._payer is threading.current_thread():
                self._payer = None  # it ends now, and must not be taken for one that pays what is owed next
            return left

    def owes(self, ledger: Ledger) -> bool:
        """True while a ledger could not be told of a commit."""
        if not self._owed:
            return False
        with self._lock:
            owed = bool(self._owed.get(ledger))
        if owed:
            self._pay_later()  # the thread is not there any more after a fork
        return owed

    def marks(self, ledger: Ledger) -> bool:
        """True if no commit becomes visible before its tags were marked in a ledger, so that what is clean is current."""
        return self._consistency == "strict" and ledger.store.atomic


_PAY_EVERY = 0.5
"""Seconds between two attempts."""


def _pay(reference: weakref.ref[Phases]) -> None:
    """What the thread does until nothing is owed any more, or nobody needs it."""
    while True:
        time.sleep(_PAY_EVERY)
        phases = reference()
        if phases is None or not phases.pay():
            return
        del phases
