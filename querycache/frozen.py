"""Freeze and replay: an answer as data, and the data as an answer.

A *frozen statement* is what the database driver returned for one statement: the description of its columns
and its rows, before any result processor has seen them. An *entry* is what is stored under one key: the
frozen statement that was asked for, and those that SQLAlchemy ran to complete its objects (``selectinload``
and its like), each found again by a fingerprint of its own SQL and parameters.

:func:`merge_frozen_result` turns a frozen statement back into the result that the statement would have given,
by feeding the rows to SQLAlchemy's own loader.

Only rows are stored, never objects (SQLAlchemy's :class:`~sqlalchemy.engine.FrozenResult`, pickled), not for results
that no single statement gave either. A result that is merged from several executions, as that of a ShardedSession,
consists of answers that are each stored by themselves: other selects share them, and each has its own tags. And one
that a handler has made of something else could not be looked up before that handler has run, nor could anybody tell
when it is stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import msgspec
from sqlalchemy import FromClause, inspect
from sqlalchemy.engine import Result

from querycache.codec import RowSet, Unstorable, pack_rows, unpack_rows
from querycache.databases import bind_identity
from querycache.keys import UnkeyableValue, canonical, digest
from querycache.sa_internals import Plan, Prepared, json_serializer

__all__ = [
    "Entry",
    "FrozenStatement",
    "canonical_parameters",
    "discriminators",
    "fingerprint",
    "fits",
    "freeze",
    "how_given",
    "layout",
    "merge_frozen_result",
]


class FrozenStatement(msgspec.Struct, array_like=True, frozen=True, dict=True):
    """What the driver returned for one statement.

    Attributes:
        columns: (name, type code) of each column, as in a DBAPI cursor's description. Result processors of some
            types are chosen by the code.
        rowcount: the cursor's ``rowcount``, -1 where the driver does not tell.
        rows: the rows.
    """

    columns: list[tuple[str, int | str | None]]
    rowcount: int
    rows: RowSet

    @cached_property
    def description(self) -> list[tuple[Any, ...]]:
        """As a DBAPI cursor has it."""
        return [(name, code, None, None, None, None, None) for name, code in self.columns]

    @cached_property
    def _shared_rows(self) -> list[tuple[object, ...]] | None:
        return unpack_rows(self.rows) if self.rows.immutable else None

    def unpack(self) -> list[tuple[object, ...]]:
        """The rows. What could be changed in place is made anew each time.

        Raises:
            Corrupt: they cannot be read.
        """
        shared = self._shared_rows
        return unpack_rows(self.rows) if shared is None else shared


class Entry(msgspec.Struct, array_like=True, frozen=True):
    """What is stored under a key.

    Attributes:
        created: when the main statement was asked, in seconds since 1970 by the clock of the process that did. Shown to
            people, and counts for the time to live where the entry is completed later; no invalidation goes by it.
        main: the statement that was asked for.
        loads: the statements that came with it, by fingerprint.
        layout: what each row holds, where the entry is found without its statement; empty elsewhere.
    """

    created: float
    main: FrozenStatement
    loads: dict[bytes, FrozenStatement]
    layout: str = ""

    @property
    def immutable(self) -> bool:
        """True if no value in it can be changed in place."""
        return self.main.rows.immutable and all(each.rows.immutable for each in self.loads.values())


def fingerprint(plan: Plan) -> bytes:
    """16 bytes that tell a statement, with its parameters and its database, from the others in an entry.

    Raises:
        UnkeyableValue: a parameter has no canonical form.
    """
    parts = bind_identity(plan.engine), plan.sql, canonical_parameters(plan), how_given(plan)
    return digest(parts, size=16)


def how_given(plan: Plan) -> str:
    """How the driver is given the parameters: with ``no_parameters`` it reads the same SQL otherwise where there are
    none."""
    return "alone" if plan.options.get("no_parameters") else ""


def canonical_parameters(plan: Plan) -> str:
    """The statement's parameters, as given to the driver, in canonical form."""
    parameters: Any = plan.parameters
    # drivers may ask for their own kind of sequence
    given = dict(parameters) if hasattr(parameters, "keys") else tuple(parameters)
    return canonical(given, json_serializer(plan.engine.dialect))


def discriminators(plan: Plan) -> str:
    """Values that do not reach this statement but those that complete it: criteria on a post-load's target.

    They only keep entries apart, so a value without a canonical form is represented by its type.
    """
    values = []
    for value in plan.unrendered:
        try:
            values.append(canonical(value))
        except UnkeyableValue as refusal:
            values.append(refusal.reason)
    return ",".join(values)


def layout(statement: Any) -> str:
    """What a row of a select is made of: the classes of entities, the types and owners of columns.

    Where that and the names of the columns are equal, rows of one statement can be read as rows of the other.
    """
    parts = []
    for column in getattr(statement, "column_descriptions", ()):
        kind, owner = column["type"], column.get("entity")
        if not isinstance(kind, type):
            kind = type(kind)
        if owner is None:
            owner = getattr(column["expr"], "table", None)
        parts.append(f"{kind.__module__}.{kind.__qualname__} of {_owner(owner)}")
    return ", ".join(parts)


def _owner(owner: Any) -> str:
    """A name for a mapped class, an alias of one, or a table, the same in every process."""
    if isinstance(owner, FromClause):
        return str(getattr(owner, "fullname", owner.description))
    if owner is None:
        return "none"
    cls = inspect(owner).mapper.class_
    return f"{cls.__module__}.{cls.__qualname__}"


def fits(entry: Entry, prepared: Prepared) -> bool:
    """True if the rows of an entry that was found without its statement can be read as this statement's."""
    names = [name for name, _ in entry.main.columns]
    return names == prepared.column_names() and entry.layout == layout(prepared.invocation.statement)


def freeze(
    description: Sequence[Sequence[Any]], rows: Sequence[Sequence[object]], rowcount: int
) -> FrozenStatement:
    """Pack what a driver returned.

    Raises:
        Unstorable: a value, or the type code of a column, cannot be stored as data.
    """
    columns: list[tuple[str, int | str | None]] = []
    for column in description:
        name, code = column[0], column[1]
        if code is not None and type(code) is not int and type(code) is not str:
            raise Unstorable(f"type code {type(code).__name__}")
        columns.append((name, code))
    return FrozenStatement(columns, rowcount, pack_rows(rows, len(columns)))


def merge_frozen_result(prepared: Prepared, frozen: FrozenStatement) -> Result[Any]:
    """The result of a statement from what was stored for it, its objects merged into the Session.

    Args:
        prepared: the statement that asks.
        frozen: what was stored.
    """
    return prepared.replay(frozen.description, frozen.unpack(), frozen.rowcount)
