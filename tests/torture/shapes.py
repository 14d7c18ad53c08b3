"""The shapes of reads: cached statements, and what their answers tell of which rows.

A part of an answer has a *scope*, which says what rows it must contain:

    ==================  =====================================================================
    book                the book of this number, if there is one
    shelf               the shelf of this number
    on shelf            the books that stand on this shelf
    colour              the books of this colour
    of colour on shelf  the books of colour `argument % COLOURS` on shelf `argument // COLOURS`
    marks               the marks on this book
    sheet               the sheet of this number, if there is one: the columns of the base class
    chart               what the chart of this number has besides, if there is one
    sheets              the sheets of this colour, charts and others
    ==================  =====================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from itertools import accumulate
from random import Random
from typing import Any

from sqlalchemy import BigInteger, Integer, func, select, text
from sqlalchemy.orm import Session, aliased, joinedload, selectinload

from tests.torture.history import Part
from tests.torture.schema import (
    BOOKS,
    COLOURS,
    SHEETS,
    SHELVES,
    Book,
    Chart,
    Sheet,
    Shelf,
    State,
    book_row,
    chart_row,
    is_chart,
    link_row,
    links,
    sheet_row,
    shelf_row,
)

__all__ = ["SHAPES", "Answer", "Shape", "choose"]

Answer = list[list[Part]]
Shape = Callable[[Session, int], Answer]

CACHED = {"cache_key": True}


def _books(books: Iterable[Any]) -> dict[int, State]:
    """From books, or rows with the same columns."""
    return {book_row(book.id): (book.stamp, book.shelf_id, book.colour) for book in books}


# Statements are made once, as an application would keep them, so that a hit costs what a hit costs.


@cache
def _book(book: int) -> Any:
    return select(Book).where(Book.id == book).execution_options(**CACHED)


def point(session: Session, book: int) -> Answer:
    return [[Part("book", book, _books(session.scalars(_book(book))))]]


@cache
def _columns(book: int) -> Any:
    columns = select(Book.id, Book.stamp, Book.shelf_id, Book.colour)
    return columns.where(Book.id == book).execution_options(**CACHED)


def columns(session: Session, book: int) -> Answer:
    return [[Part("book", book, _books(session.execute(_columns(book))))]]


@cache
def _shelf(shelf: int) -> Any:
    return select(Shelf).where(Shelf.id == shelf).execution_options(**CACHED)


def shelf_point(session: Session, shelf: int) -> Answer:
    return [[_shelf_part(shelf, session.scalars(_shelf(shelf)))]]


def _shelf_part(shelf: int, found: Iterable[Shelf]) -> Part:
    return Part("shelf", shelf, {shelf_row(each.id): (each.stamp,) for each in found})


@cache
def _several(book: int) -> Any:
    return select(Book).where(Book.id.in_(_neighbours(book))).execution_options(**CACHED)


def _neighbours(book: int) -> list[int]:
    return sorted({book, (book + 1) % BOOKS, (book + 7) % BOOKS})


def several(session: Session, book: int) -> Answer:
    return [_several_parts(book, session.scalars(_several(book)))]


def _several_parts(book: int, books: Iterable[Book]) -> list[Part]:
    found = _books(books)
    parts = []
    for each in _neighbours(book):
        row = book_row(each)
        parts.append(Part("book", each, {row: found.pop(row)} if row in found else {}))
    assert not found, f"rows that nobody asked for: {found}"
    return parts


@cache
def _on_shelf(shelf: int) -> Any:
    return select(Book).where(Book.shelf_id == shelf).execution_options(**CACHED)


def on_shelf(session: Session, shelf: int) -> Answer:
    return [[Part("on shelf", shelf, _books(session.scalars(_on_shelf(shelf))))]]


@cache
def _colour(colour: int) -> Any:
    return select(Book).where(Book.colour == colour).order_by(Book.id).execution_options(**CACHED)


def by_colour(session: Session, colour: int) -> Answer:
    return [[Part("colour", colour, _books(session.scalars(_colour(colour))))]]


@cache
def _count(shelf: int) -> Any:
    count = select(func.count()).select_from(Book).where(Book.shelf_id == shelf)
    return count.execution_options(**CACHED)


def count(session: Session, shelf: int) -> Answer:
    return [[Part("on shelf", shelf, {}, session.scalars(_count(shelf)).one())]]


@cache
def _selectin(shelf: int) -> Any:
    return _shelf(shelf).options(selectinload(Shelf.books))


def selectin(session: Session, shelf: int) -> Answer:
    found = session.scalars(_selectin(shelf)).all()
    books = [book for each in found for book in each.books]
    return [[_shelf_part(shelf, found)], [Part("on shelf", shelf, _books(books))]]


@cache
def _joined(shelf: int) -> Any:
    return _shelf(shelf).options(joinedload(Shelf.books))


def joined(session: Session, shelf: int) -> Answer:
    found = session.scalars(_joined(shelf)).unique().all()
    books = [book for each in found for book in each.books]
    return [[_shelf_part(shelf, found), Part("on shelf", shelf, _books(books))]]


@cache
def _with_shelves(book: int) -> Any:
    return _several(book).options(selectinload(Book.shelf))


def with_shelves(session: Session, book: int) -> Answer:
    """Many books to one shelf: rows that many answers have in common."""
    found = session.scalars(_with_shelves(book)).all()
    shelves = {each.shelf.id: each.shelf for each in found}
    # of those that nobody asked for, nothing is known
    parts = [_shelf_part(number, [shelf]) for number, shelf in shelves.items()]
    return [_several_parts(book, found), *([parts] if parts else [])]


@cache
def _with_marks(book: int) -> Any:
    return _book(book).options(selectinload(Book.marks))


def with_marks(session: Session, book: int) -> Answer:
    found = session.scalars(_with_marks(book)).all()
    # without the book nobody asks for its marks
    marks = [[Part("marks", book, {link_row(book, mark.id): () for mark in found[0].marks})]] if found else []
    return [[Part("book", book, _books(found))], *marks]


@cache
def _marks(book: int) -> Any:
    return select(links.c.mark_id).where(links.c.book_id == book).execution_options(**CACHED)


def marks(session: Session, book: int) -> Answer:
    return [[Part("marks", book, {link_row(book, mark): () for mark in session.scalars(_marks(book))})]]


_TEXT = (
    text("SELECT id, stamp, shelf_id, colour FROM torture_books WHERE id = :book")
    .columns(id=Integer, stamp=BigInteger, shelf_id=Integer, colour=Integer)
    .execution_options(**CACHED)
)


def textual(session: Session, book: int) -> Answer:
    return [[Part("book", book, _books(session.execute(_TEXT, {"book": book})))]]


@cache
def _some_of_colour(argument: int) -> Any:
    shelf, colour = divmod(argument, COLOURS)
    return _shelf(shelf).where(Shelf.books.any(Book.colour == colour))


def exists(session: Session, argument: int) -> Answer:
    """The shelf, if there is a book of this colour on it."""
    found = session.scalars(_some_of_colour(argument)).all()
    parts = [Part("of colour on shelf", argument, {}, len(found), most=1)]
    return [[*parts, *(_shelf_part(each.id, [each]) for each in found)]]


@cache
def _with_count(shelf: int) -> Any:
    number = select(func.count()).where(Book.shelf_id == Shelf.id).scalar_subquery()
    return select(Shelf.id, Shelf.stamp, number).where(Shelf.id == shelf).execution_options(**CACHED)


def with_count(session: Session, shelf: int) -> Answer:
    """A subquery among the columns."""
    [(number, stamp, books)] = session.execute(_with_count(shelf))
    return [
        [
            Part("shelf", shelf, {shelf_row(number): (stamp,)}),
            Part("on shelf", shelf, {}, books),
        ]
    ]


@cache
def _from_subquery(argument: int) -> Any:
    shelf, colour = divmod(argument, COLOURS)
    inner = select(Book).where(Book.colour == colour).subquery()
    book = aliased(Book, inner)
    return select(book).where(book.shelf_id == shelf).execution_options(**CACHED)


def from_subquery(session: Session, argument: int) -> Answer:
    found = _books(session.scalars(_from_subquery(argument)))
    return [[Part("of colour on shelf", argument, found)]]


@cache
def _from_cte(colour: int) -> Any:
    chosen = select(Book.id).where(Book.colour == colour).cte("chosen")
    return select(Book).join(chosen, Book.id == chosen.c.id).execution_options(**CACHED)


def from_cte(session: Session, colour: int) -> Answer:
    return [[Part("colour", colour, _books(session.scalars(_from_cte(colour))))]]


@cache
def _chart(sheet: int) -> Any:
    return select(Chart).where(Chart.id == sheet).execution_options(**CACHED)


def chart(session: Session, sheet: int) -> Answer:
    """One object from the rows of two tables. A sheet that is no chart is in none."""
    found = session.scalars(_chart(sheet)).all()
    if not is_chart(sheet):
        return [[Part("chart", sheet, _scales(found))]]
    return [[Part("sheet", sheet, _sheets(found)), Part("chart", sheet, _scales(found))]]


def _sheets(sheets: Iterable[Sheet]) -> dict[int, State]:
    return {sheet_row(sheet.id): (sheet.stamp, sheet.colour) for sheet in sheets}


def _scales(charts: Iterable[Chart]) -> dict[int, State]:
    return {chart_row(chart.id): (chart.scale,) for chart in charts}


@cache
def _of_colour(colour: int) -> Any:
    return select(Sheet).where(Sheet.colour == colour).execution_options(**CACHED)


def sheets(session: Session, colour: int) -> Answer:
    """Sheets of every kind; a second statement completes the charts among them."""
    found = session.scalars(_of_colour(colour)).all()
    charts = [sheet for sheet in found if isinstance(sheet, Chart)]
    # one that was deleted meanwhile is not completed
    parts = [Part("chart", each.id, _scales([each] if "scale" in vars(each) else [])) for each in charts]
    return [[Part("sheets", colour, _sheets(found))], *([parts] if parts else [])]


SHAPES: dict[str, tuple[Shape, int, int]] = {
    "point": (point, BOOKS, 38),
    "columns": (columns, BOOKS, 23),
    "shelf": (shelf_point, SHELVES, 7),
    "several": (several, BOOKS, 4),
    "with shelves": (with_shelves, BOOKS, 2),
    "on shelf": (on_shelf, SHELVES, 6),
    "colour": (by_colour, COLOURS, 2),
    "count": (count, SHELVES, 3),
    "selectin": (selectin, SHELVES, 1),
    "joined": (joined, SHELVES, 2),
    "with marks": (with_marks, BOOKS, 1),
    "marks": (marks, BOOKS, 3),
    "textual": (textual, BOOKS, 1),
    "exists": (exists, SHELVES * COLOURS, 1),
    "with count": (with_count, SHELVES, 1),
    "subquery": (from_subquery, SHELVES * COLOURS, 1),
    "CTE": (from_cte, COLOURS, 1),
    "chart": (chart, SHEETS, 2),
    "sheets": (sheets, COLOURS, 1),
}
"""For each shape: the function, the number of its arguments, and of a hundred reads how many are of it."""

_NAMES = list(SHAPES)
_UP_TO = list(accumulate(weight for _, _, weight in SHAPES.values()))


def choose(random: Random) -> tuple[str, Shape, int]:
    """A shape and its argument, small arguments more often."""
    [name] = random.choices(_NAMES, cum_weights=_UP_TO)
    shape, arguments, _ = SHAPES[name]
    return name, shape, int(random.random() ** 3 * arguments)
