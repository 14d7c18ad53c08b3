"""The judge by itself, on small histories of which the judgement is known."""

from __future__ import annotations

from random import Random

import pytest

from tests.torture.history import Intent, Outcome, Part, Read
from tests.torture.judge import Judge
from tests.torture.schema import (
    BOOKS,
    COLOURS,
    SHELVES,
    State,
    book_row,
    chart_row,
    initial_state,
    link_row,
    sheet_row,
    shelf_row,
)

BOOK = book_row(0)
OTHER = book_row(8)
"""Another one on the same shelf."""
OLD = initial_state(BOOK)
NEW: State = (7, 0, 0)


def read(begin: int, end: int, *parts: Part, own: dict[int, State | None] | None = None) -> Read:
    return Read("test", begin, end, [list(parts)], own or {})


def point(begin: int, end: int, state: State | None, own: dict[int, State | None] | None = None) -> Read:
    return read(begin, end, Part("book", 0, {} if state is None else {BOOK: state}), own=own)


def verdict(judge: Judge, *reads: Read) -> list[str]:
    judge.learn(reads)
    return [illegal.kind for each in reads for illegal in judge.judge(each)]


def one_commit(writes: dict[int, State | None], *, committed: bool = True, returned: bool = True) -> Judge:
    """A commit called at 100 that returned at 200."""
    return Judge(
        [Intent("0-0-0", 100, writes)],
        {"0-0-0": Outcome("0-0-0", 200, "")} if returned else {},
        frozenset(["0-0-0"]) if committed else frozenset(),
        {} if returned else {0: 300},
    )


@pytest.mark.parametrize(
    ("begin", "end", "state", "expected"),
    [
        (0, 50, OLD, []),
        (0, 50, NEW, ["early"]),
        (0, 150, NEW, []),
        (150, 160, OLD, []),
        (150, 160, NEW, []),
        (201, 210, NEW, []),
        (201, 210, OLD, ["stale"]),
        (201, 210, None, ["dirty"]),
        (150, 160, (99, 0, 0), ["dirty"]),
    ],
)
def test_a_read_sees_what_was_there_between_its_begin_and_its_end(
    begin: int, end: int, state: State | None, expected: list[str]
) -> None:
    assert verdict(one_commit({BOOK: NEW}), point(begin, end, state)) == expected


def test_what_one_read_has_seen_no_later_one_may_miss() -> None:
    seen = point(120, 130, NEW)
    assert verdict(one_commit({BOOK: NEW}), seen, point(125, 140, OLD)) == []
    assert verdict(one_commit({BOOK: NEW}), seen, point(131, 140, OLD)) == ["stale"]


def test_a_killed_writer_has_committed_when_it_is_buried() -> None:
    judge = one_commit({BOOK: NEW}, returned=False)
    assert verdict(judge, point(250, 260, OLD), point(301, 310, OLD)) == ["stale"]


def test_a_killed_writer_without_its_row_in_the_log_has_not_committed() -> None:
    judge = one_commit({BOOK: NEW}, committed=False, returned=False)
    assert verdict(judge, point(301, 310, OLD), point(301, 310, NEW)) == ["dirty"]


def test_a_commit_that_returned_without_being_committed_is_noticed() -> None:
    assert one_commit({BOOK: NEW}, committed=False).contradictions


def test_own_writes_are_seen_whatever_others_committed() -> None:
    mine: State = (5, 0, 0)
    judge = one_commit({BOOK: NEW})
    assert verdict(judge, point(201, 210, mine, {BOOK: mine})) == []
    assert verdict(judge, point(201, 210, NEW, {BOOK: mine})) == ["own"]
    assert verdict(judge, point(201, 210, None, {BOOK: None})) == []
    assert verdict(judge, point(201, 210, NEW, {BOOK: None})) == ["own"]


def test_a_list_must_have_the_rows_that_belong_in_it_and_no_others() -> None:
    moved: State = (7, 1, 0)
    judge = one_commit({BOOK: moved})
    there = {book_row(number): initial_state(book_row(number)) or () for number in range(0, BOOKS, SHELVES)}
    without = {row: state for row, state in there.items() if row != BOOK}
    assert verdict(judge, read(0, 50, Part("on shelf", 0, there))) == []
    assert verdict(judge, read(0, 50, Part("on shelf", 0, without))) == ["early"]
    assert verdict(judge, read(201, 210, Part("on shelf", 0, without))) == []
    assert verdict(judge, read(201, 210, Part("on shelf", 0, there))) == ["stale"]
    assert verdict(judge, read(201, 210, Part("on shelf", 0, {**without, BOOK: moved}))) == ["misplaced"]


def test_a_count_lies_between_the_rows_that_must_and_that_may_be_there() -> None:
    judge = one_commit({BOOK: None})
    full = BOOKS // SHELVES
    for begin, end, legal in ((0, 50, {full}), (150, 160, {full - 1, full}), (201, 210, {full - 1})):
        for number in range(full - 2, full + 2):
            found = verdict(judge, read(begin, end, Part("on shelf", 0, {}, number)))
            assert found == ([] if number in legal else ["count"])


def test_rows_of_one_statement_were_there_together() -> None:
    first, second = (7, 0, 0), (8, 0, 0)
    judge = Judge(
        [Intent("0-0-0", 100, {BOOK: first}), Intent("0-0-1", 300, {OTHER: second})],
        {"0-0-0": Outcome("0-0-0", 200, ""), "0-0-1": Outcome("0-0-1", 400, "")},
        frozenset(["0-0-0", "0-0-1"]),
        {},
    )
    parts = Part("book", 0, {BOOK: initial_state(BOOK) or ()}), Part("book", 8, {OTHER: second})
    assert verdict(judge, read(50, 450, *parts)) == ["torn"]
    in_two_statements = Read("test", 50, 450, [[part] for part in parts], {})
    assert verdict(judge, in_two_statements) == []


def test_one_statement_does_not_see_a_part_of_a_commit() -> None:
    judge = one_commit({sheet_row(4): (7, 1), chart_row(4): (8,)})
    half = Part("sheet", 4, {sheet_row(4): (7, 1)}), Part("chart", 4, {chart_row(4): (0,)})
    assert verdict(judge, read(150, 160, *half)) == ["torn"]
    assert verdict(judge, Read("test", 150, 160, [[part] for part in half], {})) == []


def test_marks_are_judged_by_being_there() -> None:
    link, other = link_row(3, 1), link_row(3, 0)
    judge = one_commit({link: ()})
    assert verdict(judge, read(201, 210, Part("marks", 3, {link: (), other: ()}))) == []
    assert verdict(judge, read(201, 210, Part("marks", 3, {other: ()}))) == ["stale"]
    assert verdict(judge, read(0, 50, Part("marks", 3, {link: (), other: ()}))) == ["early"]


def test_shelves_are_judged() -> None:
    judge = one_commit({shelf_row(2): (7,)})
    assert verdict(judge, read(201, 210, Part("shelf", 2, {shelf_row(2): (0,)}))) == ["stale"]


def test_whether_there_is_any_row_is_judged() -> None:
    """Of books of colour 0, shelf 1 has none at first: the commit puts one there."""
    judge = one_commit({BOOK: (7, 1, 0)})
    for begin, end, legal in ((0, 50, {0}), (150, 160, {0, 1}), (201, 210, {1})):
        for number in range(3):
            part = Part("of colour on shelf", 1 * COLOURS + 0, {}, number, most=1)
            assert verdict(judge, read(begin, end, part)) == ([] if number in legal else ["count"])
    # shelf 0 had three, and two are left
    for begin, end in ((0, 50), (201, 210)):
        part = Part("of colour on shelf", 0, {}, 1, most=1)
        assert verdict(judge, read(begin, end, part)) == []


def test_charts_are_judged_in_both_their_tables() -> None:
    sheet, chart = sheet_row(4), chart_row(4)
    judge = one_commit({sheet: (7, 1), chart: (8,)})
    assert verdict(judge, read(201, 210, Part("sheet", 4, {sheet: (7, 1)}))) == []
    assert verdict(judge, read(201, 210, Part("chart", 4, {chart: (0,)}))) == ["stale"]
    assert verdict(judge, read(201, 210, Part("sheets", 0, {sheet: (0, 0), sheet_row(0): (0, 0)}))) == [
        "stale"
    ]
    gone = one_commit({sheet: None, chart: None})
    assert verdict(gone, read(201, 210, Part("chart", 4, {chart: (0,)}))) == ["stale"]


def test_reads_while_nothing_changes_are_judged_as_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are compared with what was there, without a look at the versions of each row."""
    random = Random(1)
    times = sorted(random.sample(range(1000), 40))
    intents, outcomes = [], {}
    for number, (begin, end) in enumerate(zip(times[::4], times[1::4], strict=True)):
        state = random.choice([None, (number + 1, random.randrange(2), 0)])
        intents.append(Intent(f"0-0-{number}", begin, {random.choice([BOOK, OTHER]): state}))
        outcomes[f"0-0-{number}"] = Outcome(f"0-0-{number}", end, "")
    states = [OLD, None, *(state for intent in intents for state in intent.writes.values())]
    reads = []
    for _ in range(3000):
        begin = random.randrange(1, 1000)
        seen = {row: state for row in (BOOK, OTHER) if (state := random.choice(states)) is not None}
        part = random.choice(
            [
                Part("book", 0, {row: state for row, state in seen.items() if row == BOOK}),
                Part("on shelf", 0, {row: state for row, state in seen.items() if state[1] == 0}),
                Part("on shelf", 1, {}, random.randrange(5)),
            ]
        )
        reads.append(read(begin, begin + random.randrange(30), part))
    judge = Judge(intents, outcomes, frozenset(outcomes), {})
    quickly = [[str(illegal) for illegal in judge.judge(each)] for each in reads]
    assert any(judge._is_plain(each) for each in reads)
    monkeypatch.setattr(judge, "_is_plain", lambda read: False)
    assert quickly == [[str(illegal) for illegal in judge.judge(each)] for each in reads]
    assert 0 < sum(map(bool, quickly)) < len(reads)
