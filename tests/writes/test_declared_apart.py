"""Tables of one database that several packages declare, each as far as it needs them.

Of a foreign key one package may know, and of the table that it refers to another; a third declares the same table without
it. Whatever is written through the classes of one, the others are not answered from before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from sqlalchemy import Column, ForeignKey, Integer, MetaData, Table, create_engine, event, select, text
from sqlalchemy.orm import Session, registry, sessionmaker

from querycache import QueryCache, tables
from querycache.tables import Reached

TABLES = 5
PACKAGES = 3
ROWS = 6


@dataclass
class Package:
    """Classes on some of the tables, by the number of the table; and whether the foreign keys of each can be resolved."""

    classes: dict[int, Any]
    resolved: dict[int, bool]


def _parents(random: Random) -> dict[int, tuple[int, str]]:
    """For each table but the first the one that it refers to, and the action."""
    return {
        child: (random.randrange(child), random.choice(["CASCADE", "CASCADE", "SET NULL"]))
        for child in range(1, TABLES)
    }


def _packages(name: str, parents: dict[int, tuple[int, str]], random: Random) -> list[Package]:
    """Every foreign key is declared by some package, if need be the last one."""
    told: set[int] = set()
    packages = []
    for number in range(PACKAGES):
        is_last = number == PACKAGES - 1
        chosen = [table for table in range(TABLES) if is_last or random.random() < 0.6]
        metadata = MetaData()
        classes, knows = {}, {}
        for table in chosen:
            knows[table] = table in parents and (random.random() < 0.5 or (is_last and table not in told))
            key = []
            if knows[table]:
                parent, action = parents[table]
                key = [ForeignKey(f"{name}{parent}.id", ondelete=action)]
                told.add(table)
            declared = Table(
                f"{name}{table}",
                metadata,
                Column("id", Integer, primary_key=True),
                Column("parent_id", Integer, *key),
                Column("number", Integer),
            )
            cls = type(f"Class{table}", (), {})
            registry(metadata=metadata).map_imperatively(cls, declared)
            classes[table] = cls
        resolved = {table: not knows[table] or parents[table][0] in classes for table in chosen}
        packages.append(Package(classes, resolved))
    return packages


class Apart:
    """A database, the packages that speak to it, and a cache for all of them."""

    def __init__(self, path: Path, seed: int) -> None:
        self.random = Random(seed)
        self.name = f"apart{seed}_"
        self.parents = _parents(self.random)
        self.packages = _packages(self.name, self.parents, self.random)
        self.engine = create_engine(f"sqlite:///{path}/apart.db")
        event.listen(self.engine, "connect", lambda raw, record: raw.execute("PRAGMA foreign_keys = ON"))
        with self.engine.begin() as connection:
            for table in range(TABLES):
                reference = ""
                if table in self.parents:
                    parent, action = self.parents[table]
                    reference = f"REFERENCES {self.name}{parent} ON DELETE {action}"
                connection.execute(
                    text(
                        f"CREATE TABLE {self.name}{table} "
                        f"(id INTEGER PRIMARY KEY, parent_id INTEGER {reference}, number INTEGER)"
                    )
                )
        self.fill()
        self.sessions = sessionmaker(self.engine)
        self.cache = QueryCache("memory://").attach(self.engine)
        self.cache.attach(self.sessions)

    def fill(self) -> None:
        with self.engine.begin() as connection:
            for table in range(TABLES):
                for row in range(1, ROWS + 1):
                    parent = self.random.randint(1, ROWS) if table in self.parents else None
                    connection.execute(
                        text(f"INSERT OR IGNORE INTO {self.name}{table} VALUES (:id, :parent, 0)"),
                        {"id": row, "parent": parent},
                    )

    def statements(self) -> Iterator[Any]:
        for package in self.packages:
            for cls in package.classes.values():
                columns = select(cls.id, cls.parent_id, cls.number).order_by(cls.id)
                yield columns
                yield from (columns.where(cls.parent_id == row) for row in (1, 2, 3))
                yield columns.where(cls.id == 1)

    def ask(self, statement: Any) -> list[tuple[Any, ...]]:
        with self.sessions() as session:
            return list(map(tuple, session.execute(statement.execution_options(cache_key=True))))

    def wrong(self) -> list[str]:
        with Session(self.engine) as plain:
            return [
                f"{statement} {statement.compile().params}"
                for statement in self.statements()
                if self.ask(statement) != list(map(tuple, plain.execute(statement)))
            ]

    def write(self) -> None:
        """One row or some of them, through the classes of one package or without."""
        package = self.random.choice(self.packages)
        table, cls = self.random.choice(list(package.classes.items()))
        row, parent = self.random.randint(1, ROWS), self.random.randint(1, ROWS)
        core: Any = cls.__table__
        by_unit_of_work: list[Callable[[Session], object]] = [
            lambda session: [
                session.delete(each) for each in session.scalars(select(cls).where(cls.id == row))
            ],
            lambda session: [
                setattr(each, "number", 7) for each in session.scalars(select(cls).where(cls.id == row))
            ],
            lambda session: [
                setattr(each, "parent_id", parent if table in self.parents else None)
                for each in session.scalars(select(cls).where(cls.id == row))
            ],
        ]
        others: list[Callable[[Session], object]] = [
            lambda session: session.execute(core.delete().where(core.c.id == row)),
            lambda session: session.execute(core.delete().where(core.c.id.in_([row, parent]))),
            lambda session: session.execute(core.update().where(core.c.id == row).values(number=8)),
            lambda session: session.execute(text(f"DELETE FROM {core.name} WHERE id = {row}")),
            lambda session: session.connection().exec_driver_sql(f"DELETE FROM {core.name} WHERE id = {row}"),
        ]
        with self.sessions.begin() as session:
            self.random.choice([*others, *(by_unit_of_work if package.resolved[table] else [])])(session)


@pytest.fixture
def apart(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Apart]:
    there = Apart(tmp_path, request.param)
    yield there
    there.engine.dispose()


def missed(apart: Apart, writes: int) -> Iterator[str]:
    """What is told from before one of some writes."""
    for _ in range(writes):
        apart.fill()
        yield from apart.wrong()  # which fills the cache
        apart.write()
        yield from apart.wrong()


@pytest.mark.parametrize("apart", range(20), indirect=True)
def test_whatever_is_written_is_seen_by_all(apart: Apart) -> None:
    assert list(missed(apart, writes=8)) == []


def test_who_goes_by_one_declaration_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tables that refer to others elsewhere it knows nothing."""
    reached = tables.cascades
    monkeypatch.setattr(
        "querycache.changes.cascades",
        lambda table, *, delete: Reached(reached(table, delete=delete).tables, frozenset()),
    )
    for seed in range(100, 120):
        path = tmp_path / str(seed)
        path.mkdir()
        apart = Apart(path, seed)
        found = next(missed(apart, writes=8), None)
        apart.engine.dispose()
        if found is not None:
            return
    pytest.fail("nothing is missed")
