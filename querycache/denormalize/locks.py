"""Locks: the rows that one flush reads old values from, held until its transaction ends.

A delta is right only if the value it starts from cannot change before it is written. So every touched row is locked
before its old image is read, and so is every row above it, up to the level below the parent: a comment's thread
must not move to another forum between the moment the comment's forum is read and the moment it is incremented.

Locks are taken level by level, children before their parents, each level in the order of its keys, so two flushes
that meet meet in the same order. The parents themselves are locked by the UPDATE, which comes last; except on
MariaDB and MySQL, where the INSERT of a child takes a shared lock on its parent for the foreign key check, and two
transactions holding one each would both wait for the other's: there the parents are locked first. PostgreSQL's
check takes KEY SHARE, with which FOR NO KEY UPDATE, the lock taken here, does not conflict.

Under REPEATABLE READ PostgreSQL tells a transaction of the changes it cannot see only where a row was *updated*, not
where it was locked, so there the locked rows are written with their own values. MariaDB reads current rows in
locking reads, so there the images are locking reads. SQLite has one lock, taken by any write.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, Select, Table, false, func, literal_column, select, update
from sqlalchemy.orm import Mapper

from querycache.denormalize.attributes import KEYS, Key, in_order, key_condition, primary_keys
from querycache.denormalize.chain import Chain
from querycache.denormalize.errors import DenormalizeError
from querycache.denormalize.plan import Place, Plan

__all__ = ["CHUNK", "OWN", "Locks", "chunks", "keys_of", "parameters"]

CHUNK: Final = 1000
"""Keys in one statement; SQLite takes 32 766 parameters, PostgreSQL 65 535."""

OWN: Final = {"denormalize": "own"}
"""The execution options that tell the guard (`guard.py`) a statement of this package."""

_CHANGES_NOTHING: Final = {**OWN, "cache_changes_nothing": True}
"""The same, of one that takes SQLite's lock and leaves every row as it is, which a cache could not tell."""

_MYSQL = ("mysql", "mariadb")


def chunks(keys: Iterable[Key]) -> Iterator[list[Key]]:
    """`keys` in order, in lists of at most CHUNK."""
    ordered = in_order(keys)
    for start in range(0, len(ordered), CHUNK):
        yield ordered[start : start + CHUNK]


def parameters(keys: Sequence[Key]) -> dict[str, Any]:
    """The parameters of `key_condition`."""
    return {KEYS: [key[0] for key in keys] if keys and len(keys[0]) == 1 else list(keys)}


def keys_of(rows: Iterable[Any], width: int) -> list[Key]:
    return [tuple(row[:width]) for row in rows]


class Locks:
    """What one flush (or bulk statement, or repair) has locked on one connection.

    Args:
        reads_only: take no locks, also where only locking reads show the rows as they are.

    Raises:
        DenormalizeError: for a database whose locks are not known here.
    """

    def __init__(self, connection: Connection, plan: Plan, *, reads_only: bool = False) -> None:
        self.connection = connection
        self.reads_only = reads_only
        self.plan = plan
        self.dialect = connection.dialect.name
        if self.dialect not in ("sqlite", "postgresql", *_MYSQL):
            raise DenormalizeError(
                f"denormalized columns are kept on SQLite, PostgreSQL, MariaDB and MySQL, not on {self.dialect}"
            )
        self.isolation: str | None = None
        self._passed: set[tuple[Place, Key]] = set()
        self._locked: dict[Mapper[Any], set[Key]] = {}
        self._written = False

    @property
    def parents_first(self) -> bool:
        """Whether a foreign key check locks the parent in a way that conflicts with updating it."""
        return self.dialect in _MYSQL

    @property
    def snapshot(self) -> bool:
        """Whether plain reads show the rows as they were when the transaction began, and locking reads as they are; and the
        latter are wanted."""
        if self.reads_only:
            return False
        return self.dialect in _MYSQL and (self.isolation or "REPEATABLE-READ") != "READ-COMMITTED"

    def read(self, statement: Select[Any]) -> Select[Any]:
        """`statement` as a read of current rows, where the snapshot of the transaction would not show them.

        That does not reach its subqueries.
        """
        return statement.with_for_update(read=True) if self.snapshot else statement

    def claim(self, statement: Select[Any]) -> Select[Any]:
        """`statement` as a read of current rows that are about to be changed."""
        return statement.with_for_update() if self.snapshot else statement

    def lock(self, wanted: Mapping[Place, Iterable[Key]], *, roots: bool) -> None:
        """Lock the rows of each place, and all above them; the parents (level 0) too if `roots`."""
        if self.dialect == "sqlite":
            if not self._written and any(wanted.values()):
                first = next(place for place, keys in wanted.items() if keys)
                table = first.chain.mappers[first.level].base_mapper.local_table
                assert isinstance(table, Table)
                self._write_nothing(table)
            return
        queue: dict[Mapper[Any], dict[Place, set[Key]]] = {}

        def push(place: Place, keys: Iterable[Key]) -> None:
            if place.level == 0 and not roots:
                return
            fresh = {key for key in keys if None not in key and (place, key) not in self._passed}
            if fresh:
                self._passed.update((place, key) for key in fresh)
                queue.setdefault(place.chain.mappers[place.level], {}).setdefault(place, set()).update(fresh)

        for place, keys in wanted.items():
            push(place, keys)
        while queue:
            mapper = min(queue, key=lambda held: (self.plan.rank(held), held.class_.__name__))
            places = queue.pop(mapper)
            for place, keys in self._lock_mapper(mapper, places):
                push(place, keys)

    def for_delete(self, table: Table, keys: Iterable[Key]) -> None:
        """Lock rows against new references too, as deleting them will."""
        if self.dialect == "sqlite":
            if not self._written:
                self._write_nothing(table)
            return
        key = self.plan.key_of(table)
        statement = self.plan.memo(
            ("for delete", table),
            lambda: select(*key).where(key_condition(key)).order_by(*key).with_for_update(),
        )
        for chunk in chunks(keys):
            self.connection.execute(statement, parameters(chunk))

    def _lock_mapper(
        self, mapper: Mapper[Any], places: dict[Place, set[Key]]
    ) -> Iterator[tuple[Place, Iterable[Key]]]:
        names = sorted({name for place in places for name in _link(place.chain, place.level)})
        statement, width = self.plan.memo(
            ("lock", self.dialect, mapper, *names), lambda: self._statement(mapper, names)
        )
        locked = self._locked.setdefault(mapper, set())
        above: dict[Place, set[Key]] = {}
        for chunk in chunks(set().union(*places.values())):
            for row in self.connection.execute(statement, parameters(chunk)):
                self.isolation = row[-1]
                key = tuple(row[:width])
                held = dict(zip(names, row[width:], strict=False))
                for place, keys in places.items():
                    if key in keys and place.level > 0:
                        attributes = _link(place.chain, place.level)
                        if attributes:
                            upper = Place(place.chain, place.level - 1)
                            above.setdefault(upper, set()).add(tuple(held[name] for name in attributes))
            if self.dialect == "postgresql" and self.isolation == "repeatable read":
                self._write(mapper, [key for key in chunk if key not in locked])
            locked.update(chunk)
        yield from above.items()
        for place, keys in places.items():
            if place.level > 0 and place.chain.links[place.level - 1].secondary is not None:
                yield Place(place.chain, place.level - 1), self._through(place, keys)

    def _statement(self, mapper: Mapper[Any], names: Sequence[str]) -> tuple[Select[Any], int]:
        keys = [mapper.columns[name] for name in primary_keys(mapper)]
        if self.dialect == "postgresql":
            isolation: Any = func.current_setting("transaction_isolation")
        else:
            mariadb = getattr(self.connection.dialect, "is_mariadb", False)
            isolation = literal_column("@@tx_isolation" if mariadb else "@@transaction_isolation")
        # The tables of the mapper itself: what it selects from may join those of its subclasses as well, which need no lock,
        # and PostgreSQL locks nothing that is joined outerly.
        statement = (
            select(*keys, *(mapper.columns[name] for name in names), isolation)
            .select_from(mapper.persist_selectable)
            .where(key_condition(keys))
            .order_by(*keys)
            .with_for_update(key_share=True)
        )
        return statement, len(keys)

    def _through(self, place: Place, keys: Iterable[Key]) -> set[Key]:
        """The upper keys of rows joined by a secondary table."""
        link = place.chain.links[place.level - 1]
        statement = self.plan.memo(
            ("through", place), lambda: select(*link.upper).where(key_condition(link.lower)).distinct()
        )
        found: set[Key] = set()
        for chunk in chunks(keys):
            result = self.connection.execute(self.read(statement), parameters(chunk))
            found.update(keys_of(result, len(link.upper)))
        return found

    def _write(self, mapper: Mapper[Any], keys: Sequence[Key]) -> None:
        """Write rows with their own values, so that transactions with an older snapshot fail instead of erring."""
        if not keys:
            return
        table = mapper.base_mapper.local_table
        assert isinstance(table, Table)
        statement = self.plan.memo(
            ("write", mapper.base_mapper),
            lambda: (
                update(table)
                .where(key_condition(tuple(mapper.base_mapper.primary_key)))
                .values({column: column for column in (_harmless(table), *_on_update(table))})
            ),
        )
        self.connection.execute(statement, parameters(keys), execution_options=OWN)

    def _write_nothing(self, table: Table) -> None:
        statement = self.plan.memo(
            ("write lock", table),
            lambda: update(table).where(false()).values({_harmless(table): _harmless(table)}),
        )
        self.connection.execute(statement, execution_options=_CHANGES_NOTHING)
        self._written = True


def _link(chain: Chain, level: int) -> tuple[str, ...]:
    return chain.links[level - 1].attributes if level else ()


def _on_update(table: Table) -> list[Any]:
    """The columns that any UPDATE changes which does not set them."""
    return [column for column in table.columns if column.onupdate is not None]


def _harmless(table: Table) -> Any:
    """A column whose rewriting takes no stronger lock than any update: not a key, if there is another. What the database
    generates cannot be written at all."""
    writable = [c for c in table.columns if c.computed is None and c.identity is None]
    return next(
        (c for c in writable if not c.primary_key and not c.unique and c.onupdate is None),
        writable[0] if writable else table.c[0],
    )
