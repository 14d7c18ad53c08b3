"""The judge: explains each read by the writes, or says why it cannot be explained.

The versions of a row are the states that committed transactions left it in, in the order in which their commits were
called: the transactions held its lock from before they read it until after they had committed.

A version was **in the database at the latest** when its commit returned; when a read that saw it (or a later one)
ended; or, where its writer was killed, when the locks of the dead were found gone and the log table showed it. It was
there **at the earliest** when its commit was called. So a read sees one of the versions from the newest that was there
at the latest before it began, to the newest that was there at the earliest when it ended.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tests.torture.history import Intent, Outcome, Part, Read
from tests.torture.schema import (
    BOOKS,
    COLOURS,
    MARKS,
    ROWS,
    SHEETS,
    State,
    book_row,
    chart_row,
    initial_state,
    link_row,
    name_of,
    sheet_row,
    shelf_row,
)

__all__ = ["Illegal", "Judge"]

_NEVER = 1 << 62


@dataclass(frozen=True)
class Illegal:
    """A read that no write explains.

    Attributes:
        kind: "stale" (older than it may be), "early" (committed later), "dirty" (never committed), "misplaced" (it
            does not belong into this answer), "own" (not what its own transaction wrote), "torn" (rows of one
            statement that never were there together) or "count".
    """

    kind: str
    shape: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.shape}): {self.detail}"


@dataclass
class _Versions:
    """The versions of one row, oldest first; times in nanoseconds.

    Attributes:
        earliest: when each can have appeared.
        latest: when each was there, or one after it.
    """

    row: int
    states: list[State | None]
    earliest: list[int] = field(default_factory=lambda: [0])
    latest: list[int] = field(default_factory=lambda: [0])
    writers: list[str] = field(default_factory=lambda: ["the beginning"])

    def add(self, state: State | None, earliest: int, latest: int, writer: str) -> None:
        self.states.append(state)
        self.earliest.append(earliest)
        self.latest.append(latest)
        self.writers.append(writer)

    def settle(self) -> None:
        """A version was overwritten at the latest when the next one was there, so these times only grow."""
        bound = _NEVER
        for index in range(len(self.latest) - 1, -1, -1):
            bound = self.latest[index] = min(bound, self.latest[index])

    def at(self, time: int) -> State | None:
        """The version that was there at a time at which none can have appeared."""
        return self.states[bisect_right(self.earliest, time) - 1]

    def window(self, begin: int, end: int) -> tuple[int, int]:
        """The first and the last version that may be seen."""
        first = bisect_left(self.latest, begin) - 1
        last = bisect_right(self.earliest, end) - 1
        return max(first, 0), last


class Judge:
    """All that was written in a round, and the judgement of what was read.

    Args:
        intents: the commits that were called.
        outcomes: of those that returned or raised, by transaction.
        committed: the transactions that the log table shows.
        buried: for each process that was killed, when it was certain that none of its transactions goes on.
    """

    def __init__(
        self,
        intents: Iterable[Intent],
        outcomes: Mapping[str, Outcome],
        committed: frozenset[str],
        buried: Mapping[int, int],
    ) -> None:
        self._rows = [_Versions(row, [initial_state(row)]) for row in range(ROWS)]
        self.commits = 0
        self.contradictions: list[str] = []
        """Where histories and database do not agree, so that nothing can be judged."""
        for intent in sorted(intents, key=lambda each: each.time):
            outcome = outcomes.get(intent.txn)
            if intent.txn not in committed:
                if outcome is not None and not outcome.raised:
                    self.contradictions.append(f"commit() of {intent.txn} returned, but it is not committed")
                continue
            self.commits += 1
            process = int(intent.txn.partition("-")[0])
            latest = outcome.time if outcome is not None else buried.get(process, _NEVER)
            for row, state in intent.writes.items():
                self._rows[row].add(state, intent.time, latest, f"{intent.txn} ({', '.join(intent.steps)})")
        self._expected: dict[tuple[int, str, int], dict[int, State]] = {}
        self._of_stamp: list[dict[State | None, list[int]]] = []
        for versions in self._rows:
            versions.settle()
            found: dict[State | None, list[int]] = {}
            for index, state in enumerate(versions.states):
                found.setdefault(state, []).append(index)
            self._of_stamp.append(found)
        self._changes = self._all_changes()

    def learn(self, reads: Iterable[Read]) -> None:
        """What a read has seen was there when it ended."""
        for read in reads:
            for parts in read.statements:
                for part in parts:
                    for row, state in part.rows.items():
                        if state and row not in read.own:
                            for index in self._of_stamp[row].get(state, ())[:1]:
                                versions = self._rows[row]
                                versions.latest[index] = min(versions.latest[index], read.end)
        for versions in self._rows:
            versions.settle()
        self._changes = self._all_changes()
        self._expected.clear()

    def _all_changes(self) -> tuple[list[int], list[int]]:
        """When something was changing: begins and ends of the times between which some version may have appeared."""
        begins: list[int] = []
        ends: list[int] = []
        for begin, end in sorted(
            times for each in self._rows for times in zip(each.earliest[1:], each.latest[1:], strict=True)
        ):
            if ends and begin <= ends[-1]:
                ends[-1] = max(ends[-1], end)
            else:
                begins.append(begin)
                ends.append(end)
        return begins, ends

    def compare(self, contents: Mapping[int, State]) -> None:
        """Compare what the writes have left with what is in the database at the end: a check of the judge itself."""
        for versions in self._rows:
            found = contents.get(versions.row)
            if versions.states[-1] != found:
                self.contradictions.append(
                    f"{name_of(versions.row)} is {found} in the end, but {versions.writers[-1]} left it "
                    f"as {versions.states[-1]}"
                )

    def judge(self, read: Read) -> Iterator[Illegal]:
        """Why this read is illegal; nothing where it is not."""
        if self._is_plain(read):
            return
        for parts in read.statements:
            appeared, vanished = 0, _NEVER
            seen: set[str] = set()
            missed: set[str] = set()
            for part in parts:
                if part.count >= 0:
                    yield from self._count(read, part)
                    continue
                for row in _rows_of(part):
                    state = part.rows.get(row)
                    if row in read.own:
                        if state != _within(part, read.own[row]):
                            yield self._illegal("own", read, row, state, 0, 0)
                        continue
                    versions = self._rows[row]
                    first, last = versions.window(read.begin, read.end)
                    if state is None:
                        if first == last:
                            explained = _within(part, versions.states[first]) is None
                        else:
                            explained = any(
                                _within(part, versions.states[index]) is None
                                for index in range(first, last + 1)
                            )
                    else:
                        explained = _within(part, state) is not None and (
                            state in versions.states[first : last + 1]
                        )
                    if not explained:
                        yield self._illegal(
                            self._kind(part, row, state, first, last), read, row, state, first, last
                        )
                    elif state:
                        [index] = self._of_stamp[row][state]
                        appeared = max(appeared, versions.earliest[index])
                        seen.add(versions.writers[index])
                        if index + 1 < len(versions.latest):
                            vanished = min(vanished, versions.latest[index + 1])
                            missed.add(versions.writers[index + 1])
            if appeared > vanished:
                yield Illegal("torn", read.shape, f"{parts}: {appeared - vanished} ns apart")
            elif not seen.isdisjoint(missed):
                yield Illegal("torn", read.shape, f"{parts}: a part of what {seen & missed} wrote")

    def _is_plain(self, read: Read) -> bool:
        """True if nothing changed from its begin to its end, and it saw just what was there: most reads are so."""
        begins, ends = self._changes
        number = bisect_right(begins, read.end)
        if read.own or (number and ends[number - 1] >= read.begin):
            return False
        return all(self._shows(part, number, read.end) for parts in read.statements for part in parts)

    def _shows(self, part: Part, number: int, time: int) -> bool:
        """Whether a part tells what was there after so many changes, at a time when there were no others."""
        key = number, part.scope, part.argument
        expected = self._expected.get(key)
        if expected is None:
            expected = self._expected[key] = {
                row: state
                for row in _rows_of(part)
                if (state := _within(part, self._rows[row].at(time))) is not None
            }
        return part.count == min(len(expected), part.most) if part.count >= 0 else part.rows == expected

    def _count(self, read: Read, part: Part) -> Iterator[Illegal]:
        """A count lies between the rows that must, and those that may have been there.

        Where one row alone is uncertain that is exact.
        """
        must = may = 0
        for row in _rows_of(part):
            if row in read.own:
                states: Sequence[State | None] = [read.own[row]]
            else:
                first, last = self._rows[row].window(read.begin, read.end)
                states = self._rows[row].states[first : last + 1]
            there = [_within(part, state) is not None for state in states]
            must += all(there)
            may += any(there)
        must, may = min(must, part.most), min(may, part.most)
        if not must <= part.count <= may:
            yield Illegal("count", read.shape, f"{part.count} for {part.argument}, not {must} to {may}")

    def _kind(self, part: Part, row: int, state: State | None, first: int, last: int) -> str:
        if state is not None and _within(part, state) is None:
            return "misplaced"
        shown = [_within(part, each) for each in self._rows[row].states]
        if state in shown[:first]:
            return "stale"
        return "early" if state in shown[last + 1 :] else "dirty"

    def _illegal(
        self, kind: str, read: Read, row: int, state: State | None, first: int, last: int
    ) -> Illegal:
        versions = self._rows[row]
        if kind == "own":
            allowed = f"its own transaction wrote {read.own[row]}"
        else:
            allowed = (
                f"allowed were {versions.states[first : last + 1]}, by {versions.writers[first : last + 1]}"
            )
            if kind == "stale":
                late = (read.begin - versions.latest[first]) / 1e6
                allowed += f", there for {late:.1f} ms when it began"
        return Illegal(kind, read.shape, f"{name_of(row)} was {state} at {read.begin}; {allowed}")


def _rows_of(part: Part) -> Sequence[int]:
    """The rows that a part tells of, by being in it or not."""
    if part.scope == "book":
        return (book_row(part.argument),)
    if part.scope == "shelf":
        return (shelf_row(part.argument),)
    if part.scope == "sheet":
        return (sheet_row(part.argument),)
    if part.scope == "chart":
        return (chart_row(part.argument),)
    if part.scope == "marks":
        return _MARKS_OF[part.argument]
    return _SHEETS if part.scope == "sheets" else _BOOKS


_BOOKS = range(book_row(0), book_row(BOOKS))
_SHEETS = range(sheet_row(0), sheet_row(SHEETS))
_MARKS_OF = [[link_row(book, mark) for mark in range(MARKS)] for book in range(BOOKS)]


def _within(part: Part, state: State | None) -> State | None:
    """What a part shows of a row in this state: None where it is not in its scope."""
    if state is None or part.scope in _BY_ITSELF:
        return state
    if part.scope == "colour":
        inside = state[2] == part.argument
    elif part.scope == "of colour on shelf":
        inside = (state[1], state[2]) == divmod(part.argument, COLOURS)
    else:  # "on shelf" and "sheets"
        inside = state[1] == part.argument
    return state if inside else None


_BY_ITSELF = frozenset(["book", "shelf", "sheet", "chart", "marks"])
