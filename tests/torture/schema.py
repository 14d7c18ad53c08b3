"""The universe: a few shelves of books, with marks on the books; some sheets, most of which are charts; and what is never
cached: a log and locks.

A writer locks every row that it may change before it does anything else, in `torture_locks`, which has a row for each
shelf, each book and each sheet, whether that exists at the time or not. So the versions of a row have an order, and it
is that of the calls of ``commit()``: who gets a lock calls it after the one who had the lock was done.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import BigInteger, Column, ForeignKey, Integer, String, Table, insert, select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

__all__ = [
    "BOOKS",
    "COLOURS",
    "INITIAL",
    "MARKS",
    "ROWS",
    "SHEETS",
    "SHELVES",
    "Base",
    "Book",
    "Chart",
    "Mark",
    "Sheet",
    "Shelf",
    "State",
    "book_row",
    "chart_row",
    "contents",
    "create",
    "initial_state",
    "is_chart",
    "link_row",
    "links",
    "locks",
    "log",
    "name_of",
    "sheet_row",
    "shelf_row",
]

SHELVES = 8
BOOKS = 24
COLOURS = 4
MARKS = 3
SHEETS = 8

INITIAL = 0
"""The stamp of everything that is there at the beginning."""

State = tuple[int, ...]
"""What a row holds. A book: stamp, shelf, colour; a shelf: stamp; a mark on a book: nothing; a sheet: stamp, colour; what
a chart has besides: stamp. Where there is no row, the state is None."""


class Base(DeclarativeBase):
    pass


links = Table(
    "torture_links",
    Base.metadata,
    Column("book_id", ForeignKey("torture_books.id", ondelete="CASCADE"), primary_key=True),
    Column("mark_id", ForeignKey("torture_marks.id"), primary_key=True),
)


class Shelf(Base):
    __tablename__ = "torture_shelves"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    stamp: Mapped[int] = mapped_column(BigInteger)
    books: Mapped[list[Book]] = relationship(back_populates="shelf", order_by="Book.id")


class Book(Base):
    __tablename__ = "torture_books"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    shelf_id: Mapped[int] = mapped_column(ForeignKey("torture_shelves.id"), index=True)
    colour: Mapped[int] = mapped_column(Integer)
    stamp: Mapped[int] = mapped_column(BigInteger)
    shelf: Mapped[Shelf] = relationship(back_populates="books")
    # The database deletes the links of a book itself.
    marks: Mapped[list[Mark]] = relationship(secondary=links, order_by="Mark.id", passive_deletes=True)


class Mark(Base):
    __tablename__ = "torture_marks"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Sheet(Base):
    __tablename__ = "torture_sheets"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "sheet"}

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(10))
    colour: Mapped[int] = mapped_column(Integer)
    stamp: Mapped[int] = mapped_column(BigInteger)


class Chart(Sheet):
    """A sheet with a row of its own in a second table. Others than charts are never written."""

    __tablename__ = "torture_charts"
    __mapper_args__ = {"polymorphic_identity": "chart", "polymorphic_load": "selectin"}

    id: Mapped[int] = mapped_column(ForeignKey("torture_sheets.id", ondelete="CASCADE"), primary_key=True)
    scale: Mapped[int] = mapped_column(BigInteger)


locks = Table("torture_locks", Base.metadata, Column("id", Integer, primary_key=True, autoincrement=False))
log = Table("torture_log", Base.metadata, Column("txn", String(40), primary_key=True))


# Every row that there may be has a number: shelves, then books, then sheets, then what charts have besides, then the links
# of a book to each mark.

LOCKS = SHELVES + BOOKS + SHEETS
"""Links are locked with their book, and what charts have with their sheet."""
ROWS = LOCKS + SHEETS + BOOKS * MARKS


def shelf_row(shelf: int) -> int:
    return shelf


def book_row(book: int) -> int:
    return SHELVES + book


def link_row(book: int, mark: int) -> int:
    return LOCKS + SHEETS + book * MARKS + mark


def sheet_row(sheet: int) -> int:
    return SHELVES + BOOKS + sheet


def chart_row(sheet: int) -> int:
    return LOCKS + sheet


def is_chart(sheet: int) -> bool:
    return sheet % 4 != 3


def name_of(row: int) -> str:
    """What a row is called in reports."""
    if row < SHELVES:
        return f"shelf {row}"
    if row < SHELVES + BOOKS:
        return f"book {row - SHELVES}"
    if row < LOCKS:
        return f"sheet {row - SHELVES - BOOKS}"
    if row < LOCKS + SHEETS:
        return f"what chart {row - LOCKS} has"
    book, mark = divmod(row - LOCKS - SHEETS, MARKS)
    return f"mark {mark} on book {book}"


def initial_state(row: int) -> State | None:
    if row < SHELVES:
        return (INITIAL,)
    if row < SHELVES + BOOKS:
        book = row - SHELVES
        return (INITIAL, book % SHELVES, book % COLOURS)
    if row < LOCKS:
        return (INITIAL, (row - SHELVES - BOOKS) % COLOURS)
    if row < LOCKS + SHEETS:
        return (INITIAL,) if is_chart(row - LOCKS) else None
    book, mark = divmod(row - LOCKS - SHEETS, MARKS)
    return () if mark == book % MARKS else None


def _initial_books() -> Iterator[dict[str, int]]:
    for book in range(BOOKS):
        stamp, shelf, colour = initial_state(book_row(book)) or ()
        yield {"id": book, "stamp": stamp, "shelf_id": shelf, "colour": colour}


def _initial_sheets() -> Iterator[dict[str, object]]:
    for sheet in range(SHEETS):
        stamp, colour = initial_state(sheet_row(sheet)) or ()
        yield {
            "id": sheet,
            "stamp": stamp,
            "colour": colour,
            "kind": "chart" if is_chart(sheet) else "sheet",
        }


def contents(engine: Engine) -> dict[int, State]:
    """All rows as they are now."""
    with engine.connect() as connection:
        found: dict[int, State] = {}
        for shelf, stamp in connection.execute(select(Shelf.id, Shelf.stamp)):
            found[shelf_row(shelf)] = (stamp,)
        for book, *values in connection.execute(select(Book.id, Book.stamp, Book.shelf_id, Book.colour)):
            found[book_row(book)] = tuple(values)
        for book, mark in connection.execute(select(links)):
            found[link_row(book, mark)] = ()
        sheets, charts = Sheet.__table__, Chart.__table__
        for sheet, *values in connection.execute(select(sheets.c.id, sheets.c.stamp, sheets.c.colour)):
            found[sheet_row(sheet)] = tuple(values)
        for chart, scale in connection.execute(select(charts.c.id, charts.c.scale)):
            found[chart_row(chart)] = (scale,)
    return found


def create(engine: Engine) -> None:
    """Make the universe as it is at the beginning, whatever was there before."""
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(locks), [{"id": number} for number in range(LOCKS)])
        connection.execute(insert(Shelf), [{"id": number, "stamp": INITIAL} for number in range(SHELVES)])
        connection.execute(insert(Mark), [{"id": number} for number in range(MARKS)])
        connection.execute(insert(Book), list(_initial_books()))
        marked = [{"book_id": book, "mark_id": book % MARKS} for book in range(BOOKS)]
        connection.execute(insert(links), marked)
        sheets: Any = Sheet.__table__
        connection.execute(insert(sheets), list(_initial_sheets()))
        charts = [{"id": number, "scale": INITIAL} for number in range(SHEETS) if is_chart(number)]
        table: Any = Chart.__table__
        connection.execute(insert(table), charts)
