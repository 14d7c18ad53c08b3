"""One writing transaction, at random: locks, then steps on every path by which rows can change, then its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from sqlalchemy import delete, insert, select, text, update
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, load_only

from tests.torture.schema import (
    BOOKS,
    COLOURS,
    MARKS,
    SHELVES,
    Book,
    Mark,
    Shelf,
    State,
    book_row,
    link_row,
    links,
    locks,
    shelf_row,
)

__all__ = ["Writing"]

Executor = Session | Connection


class Writing:
    """The steps of one transaction, and what the rows are after them.

    Args:
        stamps: gives values that nobody else ever writes.
    """

    def __init__(self, random: Random, stamps: Iterator[int]) -> None:
        self.random = random
        self._stamps = stamps
        self.own: dict[int, State | None] = {}
        self.steps: list[str] = []
        self._found: dict[int, State | None] = {}
        few = random.choice((1, 1, 2, 4))
        self._books = sorted({int(random.random() ** 2 * BOOKS) for _ in range(few)})
        self._shelves = sorted({random.randrange(SHELVES) for _ in range(2)})

    def lock(self, executor: Executor) -> None:
        """Lock all rows that may be changed, in the order that everybody keeps, and see what they are."""
        rows = [*map(shelf_row, self._shelves), *map(book_row, self._books)]
        # The row of a lock has the number of the row that it locks.
        executor.execute(
            select(locks.c.id).where(locks.c.id.in_(rows)).order_by(locks.c.id).with_for_update()
        )
        self._found = dict.fromkeys(map(book_row, self._books))
        books = select(Book.id, Book.stamp, Book.shelf_id, Book.colour).where(Book.id.in_(self._books))
        for book in executor.execute(books.with_for_update()):
            self._found[book_row(book.id)] = (book.stamp, book.shelf_id, book.colour)
        marks = select(links).where(links.c.book_id.in_(self._books))
        for book, mark in executor.execute(marks.with_for_update()):
            self._found[link_row(book, mark)] = ()

    def step(self, executor: Executor) -> None:
        """Change something."""
        step = self.random.choice(_STEPS if isinstance(executor, Session) else _CORE_STEPS)
        self.steps.append(step.__name__)
        step(self, executor)

    # --- what is there, and what will be --------------------------------------------------------------

    def _state(self, row: int) -> State | None:
        return self.own[row] if row in self.own else self._found.get(row)

    def _there(self) -> list[int]:
        return [book for book in self._books if self._state(book_row(book)) is not None]

    def _missing(self) -> list[int]:
        return [book for book in self._books if self._state(book_row(book)) is None]

    def _free(self, book: int) -> bool:
        """Whether a missing book may be inserted. One deleted in the same flush would not be deleted at all."""
        return book_row(book) not in self.own

    def _change(self, book: int) -> dict[str, int]:
        """New values for some columns of a book, noted as its state."""
        state = self._state(book_row(book))
        assert state is not None
        _, shelf, colour = state
        values = {"stamp": next(self._stamps)}
        if self.random.random() < 0.4:
            values["shelf_id"] = self.random.choice(self._shelves)
        if self.random.random() < 0.3:
            values["colour"] = self.random.randrange(COLOURS)
        self.own[book_row(book)] = (
            values["stamp"],
            values.get("shelf_id", shelf),
            values.get("colour", colour),
        )
        return values

    def _new(self, book: int) -> dict[str, int]:
        values = {
            "id": book,
            "stamp": next(self._stamps),
            "shelf_id": self.random.choice(self._shelves),
            "colour": self.random.randrange(COLOURS),
        }
        self.own[book_row(book)] = (values["stamp"], values["shelf_id"], values["colour"])
        return values

    def _gone(self, book: int) -> None:
        self.own[book_row(book)] = None
        for mark in range(MARKS):
            if self._state(link_row(book, mark)) is not None:
                self.own[link_row(book, mark)] = None

    # --- the unit of work --------------------------------------------------------------------------------

    def unit_of_work(self, session: Session) -> None:
        for number in self._there():
            book = session.get_one(Book, number, with_for_update=True)
            if self.random.random() < 0.2:
                session.delete(book)
                self._gone(number)
            else:
                for name, value in self._change(number).items():
                    setattr(book, name, value)
        for number in self._missing():
            if self._free(number) and self.random.random() < 0.8:
                session.add(Book(**self._new(number)))
        session.flush()

    def blindly(self, session: Session) -> None:
        """Old values are not known to the unit of work."""
        for number in self._there():
            options = [load_only(Book.id)]
            book = session.get_one(Book, number, with_for_update=True, options=options)
            for name, value in self._change(number).items():
                setattr(book, name, value)
        session.flush()

    def by_relationship(self, session: Session) -> None:
        for number in self._there():
            book = session.get_one(Book, number, with_for_update=True)
            values = self._change(number)
            book.stamp = values["stamp"]
            book.colour = values.get("colour", book.colour)
            if "shelf_id" in values:
                book.shelf = session.get_one(Shelf, values["shelf_id"])
        session.flush()

    def marks(self, session: Session) -> None:
        for number in self._there():
            book = session.get_one(Book, number, with_for_update=True)
            mark = session.get_one(Mark, self.random.randrange(MARKS))
            row = link_row(number, mark.id)
            known = {each.id for each in book.marks}
            # An old snapshot may not show all marks; then the database refuses.
            if mark.id in known:
                book.marks.remove(mark)
                self.own[row] = None
            else:
                book.marks.append(mark)
                self.own[row] = ()
        session.flush()

    def shelf(self, session: Session) -> None:
        for number in self._shelves:
            shelf = session.get_one(Shelf, number, with_for_update=True)
            shelf.stamp = next(self._stamps)
            self.own[shelf_row(number)] = (shelf.stamp,)
        session.flush()

    # --- in bulk -----------------------------------------------------------------------------------------

    def bulk_update(self, session: Session) -> None:
        books = self._there()
        if not books:
            return
        values = self._change(books[0])
        for book in books[1:]:
            _, shelf, colour = self._state(book_row(book)) or ()
            self.own[book_row(book)] = (
                values["stamp"],
                values.get("shelf_id", shelf),
                values.get("colour", colour),
            )
        how = self.random.choice(("auto", "fetch", False))
        statement = update(Book).where(Book.id.in_(books)).values(**values)
        session.execute(statement.execution_options(synchronize_session=how))

    def bulk_update_by_key(self, session: Session) -> None:
        rows = [{"id": book, **self._change(book)} for book in self._there()]
        if rows and self.random.random() < 0.5:
            session.bulk_update_mappings(Book, rows)
        else:
            for row in rows:
                session.execute(update(Book), [row])

    def bulk_insert(self, session: Session) -> None:
        rows = [self._new(book) for book in self._missing() if self._free(book)]
        if rows and self.random.random() < 0.5:
            session.bulk_save_objects([Book(**row) for row in rows])
        elif rows:
            session.execute(insert(Book), rows)

    def bulk_delete(self, session: Session) -> None:
        books = self._there()[:2]
        session.execute(delete(Book).where(Book.id.in_(books)))
        for book in books:
            self._gone(book)

    # --- Core and text, through a session or without ------------------------------------------------------

    def core(self, executor: Executor) -> None:
        table: Any = Book.__table__
        for book in self._there():
            _connection(executor).execute(
                update(table).where(table.c.id == book).values(**self._change(book))
            )
        for book in self._missing():
            if self._free(book):
                _connection(executor).execute(insert(table).values(**self._new(book)))

    def core_marks(self, executor: Executor) -> None:
        for book in self._there():
            mark = self.random.randrange(MARKS)
            row = link_row(book, mark)
            if self._state(row) is None:
                statement: Any = insert(links).values(book_id=book, mark_id=mark)
                self.own[row] = ()
            else:
                statement = delete(links).where(links.c.book_id == book, links.c.mark_id == mark)
                self.own[row] = None
            _connection(executor).execute(statement)

    def textual(self, executor: Executor) -> None:
        for book in self._there():
            values = self._change(book)
            columns = ", ".join(f"{name} = :{name}" for name in values)
            executor.execute(
                text(f"UPDATE torture_books SET {columns} WHERE id = :id"), {"id": book, **values}
            )

    def driver_sql(self, executor: Executor) -> None:
        for book in self._there()[:1]:
            _connection(executor).exec_driver_sql(f"DELETE FROM torture_books WHERE id = {book}")
            self._gone(book)

    def core_shelf(self, executor: Executor) -> None:
        table: Any = Shelf.__table__
        stamp = next(self._stamps)
        # One stamp for all: readers that see two of them see them together.
        _connection(executor).execute(update(table).where(table.c.id.in_(self._shelves)).values(stamp=stamp))
        for shelf in self._shelves:
            self.own[shelf_row(shelf)] = (stamp,)


def _connection(executor: Executor) -> Connection:
    return executor.connection() if isinstance(executor, Session) else executor


_CORE_STEPS: Sequence[Any] = (
    Writing.core,
    Writing.core_marks,
    Writing.textual,
    Writing.driver_sql,
    Writing.core_shelf,
)
# The unit of work more often than the others, as in life; it alone writes rows rather than sets.
_STEPS: Sequence[Any] = (
    *[Writing.unit_of_work] * 5,
    *[Writing.by_relationship] * 2,
    *[Writing.shelf] * 3,
    Writing.marks,
    Writing.marks,
    Writing.blindly,
    Writing.bulk_update,
    Writing.bulk_update_by_key,
    Writing.bulk_insert,
    Writing.bulk_delete,
    *_CORE_STEPS,
)
