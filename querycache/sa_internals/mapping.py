"""What the application has mapped and declared: mappers, their tables, and where these are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import Any, TypeVar

from sqlalchemy import MetaData, Table, event, inspect, util
from sqlalchemy.orm import Mapper, MapperProperty
from sqlalchemy.orm.mapper import _all_registries

from querycache.errors import ConfigurationError

__all__ = ["known_metadata", "known_tables", "load_in_order", "mappers_of", "remembered", "tables_of"]

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
    """What a function makes of a table; kept with that, so that it goes with it, until the table is given more."""
    size = len(table.columns), len(table.constraints), len(table.indexes)
    known: tuple[tuple[int, int, int], dict[Any, Any]] | None = table.__dict__.get(_REMEMBERED)
    if known is None or known[0] != size:
        known = table.__dict__[_REMEMBERED] = size, {}
    made: T | None = known[1].get(make)
    if made is None:
        made = known[1][make] = make(table)
    return made


_REMEMBERED = "_querycache_remembered"


def mappers_of(registry: Any) -> Iterator[Mapper[Any]]:
    """The mappers of a registry. ``registry.mappers`` fails while one of its classes is declared, but not mapped yet."""
    for manager in list(registry._managers):
        if manager.is_mapped:
            yield manager.mapper


def known_metadata() -> frozenset[MetaData]:
    """Where the mapped tables are declared."""
    _follow()
    return _known_metadata(_mapped)


_mapped = object()
"""Another one whenever a class was mapped."""


@cache
def _follow() -> None:
    event.listen(Mapper, "after_mapper_constructed", _note_mapping)


def _note_mapping(mapper: Mapper[Any], cls: type[Any]) -> None:
    global _mapped
    _mapped = object()


@lru_cache(maxsize=1)
def _known_metadata(mapped: object) -> frozenset[MetaData]:
    """Kept until another class is mapped, since each write asks. The registries are not, or they would live for ever."""
    return frozenset(
        table.metadata
        for registry in _all_registries()
        for mapper in mappers_of(registry)
        for table in mapper.tables
        if isinstance(table, Table)
    )


def known_tables(name: str) -> list[Table]:
    """The tables of a name that are declared where the mapped ones are, in any schema; textual SQL knows only names."""
    return [
        table
        for metadata in known_metadata()
        for table in metadata.tables.values()
        if table.name.lower() == name.lower()
    ]


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
