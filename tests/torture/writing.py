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
    SHEETS,
    SHELVES,
    Book,
    Chart,
    Mark,
    Sheet,
    Shelf,
    State,
    book_row,
    chart_row,
    is_chart,
    link_row,
    links,
    locks,
    sheet_row,
    shelf_row,
)

__all__ = ["Writing"]

Executor = Session | Connection

_SHEETS: Any = Sheet.__table__
_CHARTS: Any = Chart.__table__


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
        sheet = random.randrange(SHEETS)
        self._charts = [sheet] if is_chart(sheet) else []

    def lock(self, executor: Executor) -> None:
        """Lock all rows that may be changed, in the order that everybody keeps, and see what they are."""
        rows = [*map(shelf_row, self._shelves), *map(book_row, self._books), *map(sheet_row, self._charts)]
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
        for number in self._charts:
            own = select(_SHEETS.c.stamp, _SHEETS.c.colour, _CHARTS.c.scale).where(_SHEETS.c.id == number)
            for stamp, colour, scale in executor.execute(own.join(_CHARTS).with_for_update()):
                self._found[sheet_row(number)] = (stamp, colour)
                self._found[chart_row(number)] = (scale,)

    def step(self, executor: Executor) -> None:
        """Change something."""
        if self._charts and self.random.random() < 0.2:
            step = self.random.choice(_CHART_STEPS if isinstance(executor, Session) else _CORE_CHART_STEPS)
        else:
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

    # --- objects that have rows in two tables ------------------------------------------------------------

    def _change_chart(self, chart: int) -> tuple[dict[str, int], dict[str, int]]:
        """New values for columns of the one table, of the other, or of both."""
        where = self.random.choice(("sheet", "chart", "both"))
        sheet, scale = {}, {}
        if where != "chart":
            _, colour = self._state(sheet_row(chart)) or ()
            sheet = {"stamp": next(self._stamps)}
            if self.random.random() < 0.5:
                colour = sheet["colour"] = self.random.randrange(COLOURS)
            self.own[sheet_row(chart)] = (sheet["stamp"], colour)
        if where != "sheet":
            scale = {"scale": next(self._stamps)}
            self.own[chart_row(chart)] = (scale["scale"],)
        return sheet, scale

    def _new_chart(self, chart: int) -> tuple[dict[str, int], dict[str, int]]:
        sheet = {"stamp": next(self._stamps), "colour": self.random.randrange(COLOURS)}
        scale = {"scale": next(self._stamps)}
        self.own[sheet_row(chart)] = (sheet["stamp"], sheet["colour"])
        self.own[chart_row(chart)] = (scale["scale"],)
        return sheet, scale

    def _chart_gone(self, chart: int) -> None:
        self.own[sheet_row(chart)] = self.own[chart_row(chart)] = None

    def charts(self, session: Session) -> None:
        for number in self._charts:
            if self._state(sheet_row(number)) is None:
                if sheet_row(number) not in self.own:
                    sheet, scale = self._new_chart(number)
                    session.add(Chart(id=number, **sheet, **scale))
                continue
            chart = session.get_one(Chart, number, with_for_update=True)
            if self.random.random() < 0.2:
                session.delete(chart)
                self._chart_gone(number)
            else:
                for values in self._change_chart(number):
                    for name, value in values.items():
                        setattr(chart, name, value)
        session.flush()

    def bulk_charts(self, session: Session) -> None:
        for number in self._charts:
            if self._state(sheet_row(number)) is None:
                continue
            if self.random.random() < 0.2:
                # The database deletes what the chart has besides.
                session.execute(delete(Sheet).where(Sheet.id == number))
                self._chart_gone(number)
            else:
                for entity, values in zip((Sheet, Chart), self._change_chart(number), strict=True):
                    if values:
                        session.execute(update(entity).where(entity.id == number).values(**values))

    def core_charts(self, executor: Executor) -> None:
        for number in self._charts:
            if self._state(sheet_row(number)) is not None:
                for table, values in zip((_SHEETS, _CHARTS), self._change_chart(number), strict=True):
                    if values:
                        statement = update(table).where(table.c.id == number).values(**values)
                        _connection(executor).execute(statement)
            elif sheet_row(number) not in self.own:
                sheet, scale = self._new_chart(number)
                _connection(executor).execute(insert(_SHEETS).values(id=number, kind="chart", **sheet))
                _connection(executor).execute(insert(_CHARTS).values(id=number, **scale))

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


_CORE_CHART_STEPS: Sequence[Any] = (Writing.core_charts,)
_CHART_STEPS: Sequence[Any] = (Writing.charts, Writing.charts, Writing.bulk_charts, Writing.core_charts)
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
