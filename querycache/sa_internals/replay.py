"""Results over rows that were stored earlier.

A :class:`~sqlalchemy.engine.CursorResult` needs an execution context, and an execution context needs a connection only
to open a cursor. So a context is built over a *replay connection*, whose cursor hands out stored rows. From there on
everything is SQLAlchemy's own: result metadata, result processors, the ORM's loader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

from sqlalchemy.engine import ChunkedIteratorResult, CursorResult, Engine, Result

from querycache.sa_internals.dialect import Row

__all__ = ["ReplayConnection", "ReplayCursor", "copied", "loaded"]


class ReplayCursor:
    """A DBAPI cursor over stored rows; only what SQLAlchemy calls once a statement was executed."""

    arraysize = 1
    lastrowid = None

    def __init__(self) -> None:
        self.description: Sequence[Sequence[Any]] | None = None
        self.rowcount = -1
        self.rows: Iterator[Row] = iter(())

    def fetchone(self) -> Row | None:
        return next(self.rows, None)

    def fetchmany(self, size: int | None = None) -> list[Row]:
        return [row for _, row in zip(range(size or self.arraysize), self.rows, strict=False)]

    def fetchall(self) -> list[Row]:
        return list(self.rows)

    def close(self) -> None:
        pass


class ReplayConnection:
    """Stands where an execution context expects a Connection and its DBAPI connection."""

    _echo = False
    closed = False

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.dialect = engine.dialect

    def cursor(self, *args: Any, **kwargs: Any) -> ReplayCursor:
        return ReplayCursor()

    def _safe_close_cursor(self, cursor: Any) -> None:
        pass

    def _handle_dbapi_exception(self, e: BaseException, *args: Any) -> None:
        """A signal came while rows were taken, for example: nothing of the database's."""
        raise e


def copied(result: CursorResult[Any]) -> CursorResult[Any]:
    """A result like one that nothing was taken from, with a cursor and an execution context of its own."""
    context = object.__new__(type(result.context))
    context.__dict__.update(result.context.__dict__)
    copy = object.__new__(CursorResult)
    copy.__dict__.update(result.__dict__)
    copy._metadata = result._metadata
    copy.dialect = result.dialect
    copy.cursor_strategy = result.cursor_strategy
    copy.connection = result.connection
    copy._echo = result._echo
    copy.context = context
    cursor: Any = ReplayCursor()
    cursor.description = result.context.cursor.description
    copy.cursor = context.cursor = cursor
    return copy


def loaded(result: Result[Any]) -> Result[Any]:
    """The same result with its objects loaded already.

    The ORM loads, and runs post-loads, when the result is consumed. The option ``prebuffer_rows``
    would make it do so at once, but post-loads inherit the option, and handlers see it.
    """
    if isinstance(result, ChunkedIteratorResult):
        rows = chain.from_iterable(list(result.chunks(None)))

        def chunks(size: int | None) -> Iterator[list[Any]]:
            # like a cursor: goes on where whoever asked before has stopped
            while chunk := list(islice(rows, size)):
                yield chunk

        result.chunks = chunks
        result.iterator = rows
    return result
