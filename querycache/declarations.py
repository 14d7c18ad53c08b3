"""What the application has said about its database, and triggers of denormalized columns: what is made from what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from sqlalchemy import Table

from querycache.keys import canonical, digest
from querycache.tables import reader_labels
from querycache.temporary import temporary_tables

__all__ = ["DEFAULT_SLOTS", "Declarations", "spellings", "written_by_triggers"]

DEFAULT_SLOTS = 1024


@dataclass(slots=True)
class Declarations:
    """What the application has said about its database: views, tables written by triggers, functions.

    Attributes:
        sources: for a view, table or function, the tables that its content is made from.
        slots: number of slots a tracked column is divided into.
        temporary: names of temporary tables and views that this process has made; each connection has its own.
        digest: 16 bytes that are the same in every process that has declared the same. Triggers of denormalized columns are
            not in it: which of them a process knows is a matter of what it imports.
        of_triggers: the number of dependencies that triggers make, as far as this process knows.
    """

    sources: dict[str, frozenset[str]] = field(default_factory=dict)
    slots: int = DEFAULT_SLOTS
    temporary: set[str] = field(default_factory=set)
    digest: bytes = field(init=False)

    of_triggers: ClassVar[int] = 0

    def __post_init__(self) -> None:
        self._change()

    def _change(self) -> None:
        self.digest = digest(map(canonical, (self.sources, self.slots)), size=16)

    def depends(self, name: str, on: Iterable[str]) -> None:
        """Note that what ``name`` gives changes when one of the tables in ``on`` is written.

        A name with a schema is known without it as well, as a statement may have it.
        """
        for spelling in spellings(name.lower()):
            known = self.sources.get(spelling, frozenset())
            self.sources[spelling] = known | {each.lower() for each in on}
        self._change()

    def made_from(self, names: Iterable[str]) -> set[str]:
        """All that the names are made from, step by step; with a name itself only if it is made from itself."""
        found: set[str] = set()
        todo = [name.lower() for name in names]
        while todo:
            for name in spellings(todo.pop()):
                fresh = {*self.sources.get(name, ()), *_by_triggers.get(name, ())} - found
                found |= fresh
                todo.extend(fresh)
        return found

    def note_temporary(self, sql: str, dialect: str) -> None:
        """Note what a statement makes that each connection has for itself."""
        self.temporary |= temporary_tables(sql, dialect, self.temporary)

    def closure(self, names: Iterable[str]) -> set[str]:
        """The names, and all that they are made from."""
        given = {name.lower() for name in names}
        return given | self.made_from(given)


_by_triggers: dict[str, frozenset[str]] = {}
"""For a table that triggers write, the tables that fire them; for every cache of the process."""


def written_by_triggers(table: Table, on: Iterable[Table]) -> None:
    """Note, for every cache of the process, that triggers on the tables in `on` write rows of `table`.

    Schemas make no difference: they are translated by connection, and a table that is taken to be written too often
    is answered by the database.
    """
    labels = {label for each in on for label in reader_labels(None, each.name)}
    name = table.name.lower()
    _by_triggers[name] = _by_triggers.get(name, frozenset()) | labels
    Declarations.of_triggers = sum(map(len, _by_triggers.values()))


def spellings(name: str) -> tuple[str, ...]:
    """How a name may have been declared: with its schema, or without."""
    return (name, name.rpartition(".")[2]) if "." in name else (name,)
