"""The shapes of reads: cached statements, and what their answers tell of which rows.

A part of an answer has a *scope*, which says what rows it must contain:

    ========  ===================================================
    book      the book of this number, if there is one
    shelf     the shelf of this number
    on shelf  the books that stand on this shelf
    colour    the books of this colour
    marks     the marks on this book
    ========  ===================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from itertools import accumulate
from random import Random
from typing import Any

from sqlalchemy import BigInteger, Integer, func, select, text
from sqlalchemy.orm import Session, joinedload, selectinload

from tests.torture.history import Part
from tests.torture.schema import (
    BOOKS,
    COLOURS,
    SHELVES,
    Book,
    Shelf,
    State,
    book_row,
    link_row,
    links,
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
    found = _books(session.scalars(_several(book)))
    parts = []
    for each in _neighbours(book):
        row = book_row(each)
        parts.append(Part("book", each, {row: found.pop(row)} if row in found else {}))
    assert not found, f"rows that nobody asked for: {found}"
    return [parts]


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


SHAPES: dict[str, tuple[Shape, int, int]] = {
    "point": (point, BOOKS, 38),
    "columns": (columns, BOOKS, 22),
    "shelf": (shelf_point, SHELVES, 8),
    "several": (several, BOOKS, 5),
    "on shelf": (on_shelf, SHELVES, 8),
    "colour": (by_colour, COLOURS, 3),
    "count": (count, SHELVES, 5),
    "selectin": (selectin, SHELVES, 2),
    "joined": (joined, SHELVES, 2),
    "with marks": (with_marks, BOOKS, 2),
    "marks": (marks, BOOKS, 4),
    "textual": (textual, BOOKS, 1),
}
"""For each shape: the function, the number of its arguments, and of a hundred reads how many are of it."""

_NAMES = list(SHAPES)
_UP_TO = list(accumulate(weight for _, _, weight in SHAPES.values()))


def choose(random: Random) -> tuple[str, Shape, int]:
    """A shape and its argument, small arguments more often."""
    [name] = random.choices(_NAMES, cum_weights=_UP_TO)
    shape, arguments, _ = SHAPES[name]
    return name, shape, int(random.random() ** 3 * arguments)
