"""What the application has mapped and declared: mappers, their tables, and where these are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, TypeVar

from sqlalchemy import (
    Column,
    Constraint,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Uuid,
    event,
    inspect,
    util,
)
from sqlalchemy.orm import Mapper, MapperProperty
from sqlalchemy.orm.mapper import _all_registries
from sqlalchemy.schema import SchemaItem

from querycache.errors import ConfigurationError

__all__ = [
    "declared",
    "is_exact",
    "is_made_by_database",
    "known_metadata",
    "known_tables",
    "load_in_order",
    "mappers_of",
    "name_of_target",
    "remembered",
    "tables_in",
    "tables_of",
]

T = TypeVar("T")


def tables_of(entity: Any) -> list[Table]:
    """The tables of a mapped class, those it inherits from included.

    Raises:
        ConfigurationError: it is not a mapped class.
    """
    mapper = inspect(entity, raiseerr=False)
    if not isinstance(mapper, Mapper):
        raise ConfigurationError(f"{entity!r} is not a mapped class")
    return [table for table in mapper.tables if isinstance(table, Table)]


def remembered(table: Table, make: Callable[[Table], T]) -> T:
    """What a function makes of a table; kept with that, so that it goes with it, until something is declared."""
    now = declared(table.metadata)
    known: tuple[object, dict[Any, Any]] | None = table.__dict__.get(_REMEMBERED)
    if known is None or known[0] is not now:
        known = table.__dict__[_REMEMBERED] = now, {}
    made: T | None = known[1].get(make)
    if made is None:
        made = known[1][make] = make(table)
    return made


_REMEMBERED = "_querycache_remembered"


def is_exact(kind: Any) -> bool:
    """True for a type of integers or UUIDs by which a value of a parameter is the one that the database has.

    One of the application's own may make another one of it, by its own code or by SQL.
    """
    return all(
        isinstance(each, (Integer, Uuid))
        and all(getattr(type(each), name).__module__.startswith("sqlalchemy.") for name in _PROCESSING)
        for each in (kind, *kind._variant_mapping.values())
    )


_PROCESSING = (
    "bind_expression",
    "bind_processor",
    "column_expression",
    "literal_processor",
    "result_processor",
)


def mappers_of(registry: Any) -> Iterator[Mapper[Any]]:
    """The mappers of a registry. ``registry.mappers`` fails while one of its classes is declared, but not mapped yet."""
    for manager in list(registry._managers):
        if manager.is_mapped:
            yield manager.mapper


def declared(metadata: MetaData | None = None) -> object:
    """Stands for all that is declared: another one whenever a class is mapped, or a table is declared or given more where
    mapped ones are, or where this was asked about.

    What was found out about tables is right as long as it is the one from before.
    """
    if metadata is not None and metadata not in _heeded:
        _heeded.add(metadata)
    return _declared


_declared = object()

_heeded: weakref.WeakSet[MetaData] = weakref.WeakSet()
"""Of others, which an application may make for each request, nothing is remembered."""


def _note(item: SchemaItem, parent: object) -> None:
    metadata = parent.metadata if isinstance(parent, Table) else parent
    if isinstance(metadata, MetaData) and metadata in _heeded:
        _forget()


def _forget(*_: object) -> None:
    global _declared
    _declared = object()


# Now, and not when it is asked for first: that may be in several threads, and listen() is for one alone.
event.listen(Mapper, "after_mapper_constructed", _forget)
for _kind in (Table, Column, Constraint, Index):
    event.listen(_kind, "after_parent_attach", _note)


def known_metadata() -> frozenset[MetaData]:
    """Where the mapped tables are declared."""
    return _known_metadata(declared())


@lru_cache(maxsize=1)
def _known_metadata(now: object) -> frozenset[MetaData]:
    """Kept, since each write asks. The registries are not, or they would live for ever."""
    found = frozenset(
        table.metadata
        for registry in _all_registries()
        for mapper in mappers_of(registry)
        # another thread may be just making a mapper, which will be told of
        for table in mapper.__dict__.get("tables", ())
        if isinstance(table, Table)
    )
    for metadata in found:
        _heeded.add(metadata)
    return found


def tables_in(metadata: MetaData) -> list[Table]:
    """The tables that are declared there; but for one that another thread is just making, which will be told of."""
    return [table for table in list(metadata.tables.values()) if "foreign_keys" in table.__dict__]


def known_tables(name: str) -> list[Table]:
    """The tables of a name that are declared where the mapped ones are, in any schema; textual SQL knows only names."""
    return _known_tables(declared()).get(name.lower(), [])


@lru_cache(maxsize=1)
def _known_tables(now: object) -> dict[str, list[Table]]:
    found: dict[str, list[Table]] = {}
    for metadata in _known_metadata(now):
        for table in tables_in(metadata):
            found.setdefault(table.name.lower(), []).append(table)
    return found


def name_of_target(key: ForeignKey) -> str:
    """The name of the table that a foreign key refers to, wherever that is declared."""
    return str(key._column_tokens[1])


def is_made_by_database(column: Column[Any]) -> bool:
    """True if a column is said to get values from the database when its row is updated."""
    return column.computed is not None or column.server_onupdate is not None


def load_in_order() -> None:
    """Make the ORM take the attributes of a class in the order of their names, as any other process does.

    Without that it takes them from a set in the order of their addresses. Where loaders of several attributes lead to
    the same objects, that order decides which of them asks for what, so what a hit needs would not be what the miss
    in another process has stored. Asked for when a cache is attached: who only imports this package is left alone.
    """
    if Mapper._prop_set is _in_order:
        return
    Mapper._prop_set = _in_order  # type: ignore[method-assign]
    for registry in _all_registries():
        for mapper in mappers_of(registry):
            mapper.__dict__.pop("_prop_set", None)  # remembered from before


def _prop_set(mapper: Mapper[Any]) -> util.OrderedSet[MapperProperty[Any]]:
    return util.OrderedSet([attribute for _, attribute in sorted(mapper._props.items())])


_in_order = util.HasMemoized.memoized_attribute(_prop_set)
