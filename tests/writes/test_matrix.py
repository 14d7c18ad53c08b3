"""The matrix: every kind of write, ended in every way, and then nobody anywhere is answered from before it.

One test is one kind of write on one *world* (a database and a store) in one *way* (whose transaction it is part of).
All readers of :mod:`tests.writes.library` are answered from the cache first. Then the write happens, once for
each way to end it, and after each the answers here and in another process must be those of the database. Inside
the transaction, its own writes must show.

Three tables make the matrix: ``WRITES``, ``WAYS`` and ``ENDS``. A new kind of write is a new line in the first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
from redis import Redis
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    ForeignKeyConstraint,
    Integer,
    Table,
    and_,
    create_engine,
    delete,
    exc,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import Session, sessionmaker

from querycache import QueryCache
from querycache.transactions import Transactions
from tests.writes.library import (
    READERS,
    Author,
    Base,
    Book,
    Commit,
    Employee,
    Engineer,
    Loan,
    Manager,
    Tag,
    book_tag,
    configure_sqlite,
    fill_library,
    read,
    read_and_tell,
)
from tests.writes.process import OtherProcess

# What has raised in COMMIT leaves marks, and those heal after two of these; nobody reads while others commit here.
LEASE = 0.02

# --- worlds ---------------------------------------------------------------------------------------

# COMMIT fails while a row of this table refers to nothing; MariaDB has no such constraints.
DEFERRING = ("sqlite", "postgresql")
deferred = Table(
    "deferred",
    Base.metadata,
    Column("author_id", Integer, primary_key=True, autoincrement=False),
    ForeignKeyConstraint(["author_id"], ["author.id"], deferrable=True, initially="DEFERRED").ddl_if(
        callable_=lambda *_, dialect, **__: dialect.name in DEFERRING
    ),
)


# The rows of each table.
Content = tuple[frozenset[tuple[Any, ...]], ...]


def _differences(found: Content, wanted: Content) -> list[Any]:
    """The statements that make one content of the other, and touch nothing that is the same."""
    writes: list[Any] = []
    deletions: list[Any] = []
    for table, rows, wanted_rows in zip(Base.metadata.sorted_tables, found, wanted, strict=True):
        keys = [table.columns.keys().index(column.key) for column in table.primary_key]
        known = {tuple(row[n] for n in keys): row for row in rows}
        for row in wanted_rows - rows:
            values = dict(zip(table.columns.keys(), row, strict=True))
            key = tuple(row[n] for n in keys)
            same = and_(*(column == values[column.key] for column in table.primary_key))
            writes.append(
                update(table).where(same).values(values)
                if known.pop(key, None)
                else insert(table).values(values)
            )
        wanted_keys = {tuple(row[n] for n in keys) for row in wanted_rows}
        for key in known.keys() - wanted_keys:
            gone = (column == value for column, value in zip(table.primary_key, key, strict=True))
            deletions.append(delete(table).where(and_(*gone)))
    return writes + deletions[::-1]


@dataclass
class World:
    """A database, a store, a cache between them, and another process on both."""

    name: str
    engine: Engine
    commit: Commit
    prepare: Commit
    cache: QueryCache
    sessions: sessionmaker[Session]
    other: OtherProcess | None
    _known: dict[object, dict[str, object]] = field(default_factory=dict)
    _first: Content = ()
    _unanswered: list[str] = field(default_factory=lambda: list(READERS))

    @property
    def dialect(self) -> str:
        return self.engine.dialect.name

    def fill(self) -> None:
        with self.engine.begin() as connection:
            fill_library(connection)
        self._first = self._content()
        self._ask_until_all_hit()

    def reset(self) -> None:
        """The library as it was, and every answer in the cache."""
        found = self._content()
        if found != self._first:
            with self.engine.begin() as connection:
                for statement in _differences(found, self._first):
                    connection.execute(statement)
            self._unanswered = list(READERS)
        self._ask_until_all_hit()

    def _ask_until_all_hit(self) -> None:
        for _ in range(2_000):
            if not self._unanswered:
                return
            # each time a transaction of its own: where it has a snapshot, that is as old as its beginning
            with self.sessions() as session:
                _, self._unanswered = read_and_tell(session, self.cache, self._unanswered)
        raise AssertionError(f"the cache does not fill: {self._unanswered}")

    def _content(self, session: Session | None = None) -> Content:
        with contextlib.nullcontext(session) if session else self.sessions() as session:
            return tuple(
                frozenset(map(tuple, session.execute(select(table)))) for table in Base.metadata.sorted_tables
            )

    def expected(self, session: Session | None = None) -> dict[str, object]:
        """What the database answers; asked once for each content that it has.

        Args:
            session: in whose transaction it is asked; None for one of its own.
        """
        content = self._content(session)
        if content not in self._known:
            with contextlib.nullcontext(session) if session else self.sessions() as session:
                self._known[content] = read(session, cached=False)
        return self._known[content]

    def check_within(self, unit: Unit, when: str) -> None:
        """A transaction is told what it sees itself."""
        unit.session.flush()
        answers = read(unit.session, cached=True)
        assert _wrong(answers, self.expected(unit.session)) == [], f"within the transaction, {when}"

    def check(self, after: str, *, here_first: bool) -> None:
        """Everyone is told what the database says. Who asks first may store what the other is told."""
        expected = self.expected()
        for here in (here_first, not here_first):
            if here:
                with self.sessions() as session:
                    answers, self._unanswered = read_and_tell(session, self.cache)
                assert _wrong(answers, expected) == [], f"after {after}"
            elif self.other is not None:
                answers, _ = self.other.read()
                assert _wrong(answers, expected) == [], f"in another process, after {after}"


def _wrong(answers: Mapping[str, object], expected: Mapping[str, object]) -> list[str]:
    return [
        f"{reader}: {answers[reader]}, not {expected[reader]}"
        for reader in expected
        if answers[reader] != expected[reader]
    ]


@contextlib.contextmanager
def _world(name: str, database: str, store: str) -> Iterator[World]:
    engine = configure_sqlite(create_engine(database))
    commit = Commit(engine, "do_commit", "do_commit_twophase")
    prepare = Commit(engine, "do_prepare_twophase")
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    cache = QueryCache(store, lease=LEASE).attach(engine)
    sessions = sessionmaker(engine)
    cache.attach(sessions)
    with contextlib.ExitStack() as stack:
        other = None
        if store != "memory://":
            other = stack.enter_context(OtherProcess.running(database, store, lease=LEASE))
        world = World(name, engine, commit, prepare, cache, sessions, other)
        _warm_up(world)
        yield world
    cache.detach(engine)
    Base.metadata.drop_all(engine)
    engine.dispose()


def _warm_up(world: World) -> None:
    """A store that has lost its versions may be used again after a lease; then all answer from the cache."""
    world.fill()
    if world.other is not None:
        assert world.other.read() == (world.expected(), []), "in another process"


WORLDS: Mapping[str, Sequence[str]] = {
    "sqlite memory": (),
    "sqlite redis": ("redis",),
    "postgresql redis": ("postgresql", "redis"),
    "mariadb redis": ("mariadb", "redis"),
}


class Worlds:
    """The world of the last test, which the next one goes on with if it is the same.

    A fixture that is parametrized together with others is made anew for each test, whatever its scope.
    """

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()
        self._name = ""
        self._world: World | None = None

    def enter(self, name: str, make: Callable[[], contextlib.AbstractContextManager[World]]) -> World:
        if self._world is None or name != self._name:
            self.close()
            self._name, self._world = name, self._open.enter_context(make())
        return self._world

    def close(self) -> None:
        self._world = None
        self._open.close()


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    worlds = Worlds()
    yield worlds
    worlds.close()


@pytest.fixture
def world(
    request: pytest.FixtureRequest, worlds: Worlds, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    database, store = request.param.split()

    def make() -> contextlib.AbstractContextManager[World]:
        if store == "redis":
            store_url = request.getfixturevalue("redis_url")
            with Redis.from_url(store_url) as client:
                client.flushdb()
        else:
            store_url = "memory://"
        if database == "sqlite":
            database_url = f"sqlite:///{tmp_path_factory.mktemp('matrix') / 'library.db'}"
        else:
            database_url = request.getfixturevalue(f"{database}_url")
        return _world(request.param, database_url, store_url)

    yield worlds.enter(request.param, make)
    if "DROP" in request.node.callspec.params.get("name", ""):
        worlds.close()  # its tables are not what they were


# --- ways: whose transaction it is -----------------------------------------------------------------


@dataclass
class Unit:
    """A transaction to write in.

    Attributes:
        session: to write objects and to read with.
        execute: what Core statements are executed by: a Session or a Connection.
        savepoint: begins a savepoint.
    """

    session: Session
    execute: Any
    savepoint: Callable[[], Any]
    commit: Callable[[], object]
    rollback: Callable[[], object]


@contextlib.contextmanager
def _in_session(world: World) -> Iterator[Unit]:
    with world.sessions() as session:
        yield Unit(session, session, session.begin_nested, session.commit, session.rollback)


@contextlib.contextmanager
def _in_connection_of_session(world: World) -> Iterator[Unit]:
    with world.sessions() as session:
        connection = session.connection()
        yield Unit(session, connection, session.begin_nested, session.commit, session.rollback)


@contextlib.contextmanager
def _in_engine(world: World) -> Iterator[Unit]:
    with world.engine.connect() as connection:
        session = world.sessions(bind=connection, join_transaction_mode="rollback_only")
        yield Unit(session, connection, connection.begin_nested, connection.commit, connection.rollback)
        session.close()


@contextlib.contextmanager
def _in_outer_transaction(world: World) -> Iterator[Unit]:
    with world.engine.connect() as connection:
        outer = connection.begin()
        session = world.sessions(bind=connection, join_transaction_mode="create_savepoint")

        failed = False

        def commit() -> None:
            nonlocal failed
            failed = True
            session.commit()
            outer.commit()
            failed = False

        def rollback() -> None:
            if failed:
                session.close()
            else:
                session.commit()
            outer.rollback()

        yield Unit(session, session, session.begin_nested, commit, rollback)
        session.close()


@contextlib.contextmanager
def _in_two_phases(world: World) -> Iterator[Unit]:
    with world.sessions(twophase=True) as session:
        yield Unit(session, session, session.begin_nested, session.commit, session.rollback)


@contextlib.contextmanager
def _in_autocommit(world: World) -> Iterator[Unit]:
    engine = world.engine.execution_options(isolation_level="AUTOCOMMIT")
    with world.sessions(bind=engine) as session:
        yield Unit(session, session.connection(), contextlib.nullcontext, session.commit, session.rollback)


Way = Callable[[World], contextlib.AbstractContextManager[Unit]]

WAYS: Mapping[str, Way] = {
    "Session": _in_session,
    "Session.connection()": _in_connection_of_session,
    "Engine": _in_engine,
    "outer transaction": _in_outer_transaction,
    "two-phase": _in_two_phases,
    "AUTOCOMMIT": _in_autocommit,
}


# --- ends --------------------------------------------------------------------------------------------

Change = Callable[[Unit], object]


def _commit(world: World, unit: Unit, change: Change) -> None:
    change(unit)
    world.check_within(unit, "after its own writes")
    unit.commit()


def _rollback(world: World, unit: Unit, change: Change) -> None:
    change(unit)
    unit.session.flush()
    read(unit.session, cached=True)
    unit.rollback()


def _write_before(unit: Unit) -> None:
    """What a transaction has written before its savepoint: rows that are written in it, too, and others."""
    for statement in (
        update(Author).where(Author.id == 3).values(name="before"),
        update(Book).where(Book.id == 2).values(price=21),
        update(Tag).where(Tag.id == 1).values(name="before"),
        update(Employee.__table__).where(Employee.id == 3).values(name="before"),
    ):
        unit.execute.execute(statement)


def _release(world: World, unit: Unit, change: Change) -> None:
    with unit.savepoint():
        change(unit)
        unit.session.flush()
    unit.commit()


def _write_and_release(world: World, unit: Unit, change: Change) -> None:
    _write_before(unit)
    _release(world, unit, change)


def _release_and_roll_back(world: World, unit: Unit, change: Change) -> None:
    with unit.savepoint():
        change(unit)
        unit.session.flush()
    unit.rollback()


def _roll_back_to_savepoint(world: World, unit: Unit, change: Change) -> None:
    savepoint = unit.savepoint()
    change(unit)
    unit.session.flush()
    read(unit.session, cached=True)
    savepoint.rollback()
    unit.commit()


def _write_and_roll_back_to_savepoint(world: World, unit: Unit, change: Change) -> None:
    _write_before(unit)
    savepoint = unit.savepoint()
    change(unit)
    unit.session.flush()
    savepoint.rollback()
    world.check_within(unit, "after a rollback to a savepoint")
    unit.commit()


@contextlib.contextmanager
def _failing_commit(world: World, *, carried_out: bool) -> Iterator[None]:
    """COMMIT raises, before or after the database has done it."""

    def fail(real: Callable[[Any], None], connection: Any) -> None:
        if carried_out:
            real(connection)
        raise OSError("connection lost in COMMIT")

    # of two phases the first fails, or what was prepared would keep its locks
    for step in (world.commit,) if carried_out else (world.commit, world.prepare):
        step.instead = fail
    try:
        with pytest.raises(OSError, match="connection lost"):
            yield
    finally:
        world.commit.instead = world.prepare.instead = None


def _fail_before_commit(world: World, unit: Unit, change: Change) -> None:
    change(unit)
    with _failing_commit(world, carried_out=False):
        unit.commit()
    unit.rollback()


def _fail_after_commit(world: World, unit: Unit, change: Change) -> None:
    change(unit)
    with _failing_commit(world, carried_out=True):
        unit.commit()
    unit.rollback()


def _fail_deferred(world: World, unit: Unit, change: Change) -> None:
    change(unit)
    unit.session.flush()
    unit.execute.execute(insert(deferred).values(author_id=77))
    # an IntegrityError, unless psycopg then fails to roll back what it could not prepare
    with pytest.raises(exc.DBAPIError):
        unit.commit()
    unit.rollback()


End = Callable[[World, Unit, Change], None]

ENDS: Mapping[str, End] = {
    "rollback": _rollback,
    "savepoint rollback": _roll_back_to_savepoint,
    "savepoint release, then rollback": _release_and_roll_back,
    "deferred constraint fails COMMIT": _fail_deferred,
    "COMMIT fails": _fail_before_commit,
    "COMMIT succeeds and raises": _fail_after_commit,
    "write, then savepoint rollback": _write_and_roll_back_to_savepoint,
    "write, then savepoint release": _write_and_release,
    "savepoint release": _release,
    "commit": _commit,
}


# --- writes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Write:
    """A kind of write.

    Attributes:
        change: does it, in a unit.
        only: dialects that have it; empty for all.
        core: True if it goes through ``unit.execute`` and needs no Session.
        sample: True if it stands for its like in the ways that are less used.
    """

    change: Change
    only: tuple[str, ...] = ()
    core: bool = False
    sample: bool = False


_NEW: dict[str, Any] = {"id": 9, "title": "new", "price": 12, "author_id": 1}
_MOVED: dict[str, Any] = {"id": 2, "title": "moved", "author_id": 3, "price": 90}
_books: Any = Book.__table__
_authors: Any = Author.__table__


def _core(statement: Any, *parameters: Any, only: tuple[str, ...] = (), sample: bool = False) -> Write:
    return Write(lambda unit: unit.execute.execute(statement, *parameters), only, core=True, sample=sample)


def _text(sql: str, only: tuple[str, ...] = (), sample: bool = False, **parameters: object) -> Write:
    return _core(text(sql), parameters, only=only, sample=sample)


def _driver(sql: str, only: tuple[str, ...] = ()) -> Write:
    def change(unit: Unit) -> None:
        executor = unit.execute.connection() if isinstance(unit.execute, Session) else unit.execute
        executor.exec_driver_sql(sql)

    return Write(change, only, core=True)


def _add(unit: Unit) -> None:
    unit.session.add(Book(**_NEW, loans=[Loan(id=9, reader="new")]))


def _move(unit: Unit) -> None:
    book = unit.session.get_one(Book, 2)
    book.author = unit.session.get_one(Author, 3)
    book.title, book.price = "moved", 90


def _move_without_old_value(unit: Unit) -> None:
    book = unit.session.get_one(Book, 2)
    unit.session.expire(book)
    book.author_id = 3


def _delete_author(unit: Unit) -> None:
    unit.session.delete(unit.session.get_one(Author, 1))


def _delete_book(unit: Unit) -> None:
    unit.session.delete(unit.session.get_one(Book, 1))


def _replace(unit: Unit) -> None:
    """Deleted and added under one primary key: the unit of work sends an UPDATE."""
    unit.session.delete(unit.session.get_one(Book, 2))
    unit.session.add(Book(**_MOVED))


def _rename_key(unit: Unit) -> None:
    unit.session.get_one(Tag, 3).id = 8


def _tag(unit: Unit) -> None:
    book = unit.session.get_one(Book, 3)
    book.tags.append(unit.session.get_one(Tag, 1))


def _untag(unit: Unit) -> None:
    book = unit.session.get_one(Book, 1)
    book.tags.clear()


def _hire(unit: Unit) -> None:
    unit.session.add_all([Engineer(id=8, name="Eva", skill="E"), Manager(id=9, name="Fay", bonus=1)])


def _promote(unit: Unit) -> None:
    unit.session.get_one(Engineer, 3).skill = "C++"
    unit.session.get_one(Manager, 2).bonus = 50


def _dismiss(unit: Unit) -> None:
    unit.session.delete(unit.session.get_one(Engineer, 3))
    unit.session.delete(unit.session.get_one(Manager, 2))


def _recreate(unit: Unit) -> None:
    bind = unit.execute.connection() if isinstance(unit.execute, Session) else unit.execute
    book_tag.drop(bind)
    book_tag.create(bind)


def _merge(unit: Unit) -> None:
    unit.session.merge(Book(**_MOVED))


def _save_objects(unit: Unit) -> None:
    book = unit.session.get_one(Book, 2)
    unit.session.expunge(book)
    book.author_id, book.price = 3, 90
    unit.session.bulk_save_objects([book, Book(**_NEW)])


PG, MY, LITE = ("postgresql",), ("mysql",), ("sqlite",)

WRITES: Mapping[str, Write] = {
    # the unit of work
    "objects: insert": Write(_add, sample=True),
    "objects: update": Write(_move, sample=True),
    "objects: update, old value unknown": Write(_move_without_old_value),
    "objects: merge": Write(_merge),
    "objects: delete": Write(_delete_book, sample=True),
    "objects: delete, ON DELETE CASCADE": Write(_delete_author),
    "objects: delete and insert under one key": Write(_replace),
    "objects: update of a primary key": Write(_rename_key),
    "objects: many-to-many append": Write(_tag),
    "objects: many-to-many remove": Write(_untag),
    "objects: inheritance insert": Write(_hire),
    "objects: inheritance update": Write(_promote),
    "objects: inheritance delete": Write(_dismiss),
    # bulk statements and methods of the Session
    "ORM insert": Write(lambda unit: unit.session.execute(insert(Book).values(_NEW))),
    "ORM bulk insert": Write(lambda unit: unit.session.execute(insert(Book), [_NEW, {**_NEW, "id": 10}])),
    "ORM bulk insert, inheritance": Write(
        lambda unit: unit.session.execute(insert(Engineer), [{"id": 8, "name": "Eva", "skill": "E"}])
    ),
    "ORM update": Write(lambda unit: unit.session.execute(update(Book).values(price=Book.price + 10))),
    "ORM update, fetch": Write(
        lambda unit: unit.session.execute(
            update(Book).where(Book.id == 2).values(author_id=3),
            execution_options={"synchronize_session": "fetch"},
        )
    ),
    "ORM update by primary key": Write(lambda unit: unit.session.execute(update(Book), [_MOVED])),
    "ORM delete": Write(lambda unit: unit.session.execute(delete(Author).where(Author.id == 2))),
    "ORM delete, inheritance": Write(
        lambda unit: unit.session.execute(delete(Employee).where(Employee.name == "Cid"))
    ),
    "Query.update": Write(lambda unit: unit.session.query(Book).filter_by(id=2).update({"author_id": 3})),
    "Query.delete": Write(lambda unit: unit.session.query(Book).filter_by(id=2).delete()),
    "bulk_insert_mappings": Write(lambda unit: unit.session.bulk_insert_mappings(Book.__mapper__, [_NEW])),
    "bulk_update_mappings": Write(lambda unit: unit.session.bulk_update_mappings(Book.__mapper__, [_MOVED])),
    "bulk_save_objects": Write(_save_objects),
    # Core
    "Core insert": _core(_books.insert().values(_NEW), sample=True),
    "Core insert of several": _core(_books.insert(), [_NEW, {**_NEW, "id": 10}]),
    "Core insert from select": _core(
        _books.insert().from_select(
            ["id", "title", "price", "author_id"],
            select(_books.c.id + 10, _books.c.title, _books.c.price, _books.c.author_id),
        )
    ),
    "Core update": _core(
        _books.update().where(_books.c.id == 2).values(author_id=3, title="moved"), sample=True
    ),
    "Core delete": _core(_books.delete().where(_books.c.id == 2), sample=True),
    "Core delete, ON DELETE CASCADE": _core(_authors.delete().where(_authors.c.id == 1)),
    "Core insert or replace": _core(
        _authors.insert().prefix_with("OR REPLACE").values(id=1, name="again"), only=LITE
    ),
    "Core upsert on SQLite": _core(
        sqlite.insert(Book)
        .values(_MOVED)
        .on_conflict_do_update(index_elements=["id"], set_={"author_id": 3}),
        only=LITE,
    ),
    "Core upsert on PostgreSQL": _core(
        postgresql.insert(Book)
        .values(_MOVED)
        .on_conflict_do_update(index_elements=["id"], set_={"author_id": 3}),
        only=PG,
    ),
    "Core upsert on MariaDB": _core(
        mysql.insert(Book).values(_MOVED).on_duplicate_key_update(author_id=3), only=MY
    ),
    "Core CTE that deletes": _core(
        select((_books.delete().where(_books.c.id == 2).returning(_books.c.id)).cte("gone").c.id), only=PG
    ),
    "secondary table insert": _core(book_tag.insert().values(book_id=3, tag_id=1)),
    "secondary table delete": _core(book_tag.delete().where(book_tag.c.tag_id == 1)),
    # textual SQL
    "text insert": _text(
        "INSERT INTO book (id, title, price, author_id) VALUES (:id, :title, :price, :author_id)",
        sample=True,
        **_NEW,
    ),
    "text update": _text("UPDATE book SET author_id = :author WHERE id = :id", author=3, id=2, sample=True),
    "text delete, ON DELETE CASCADE": _text("DELETE FROM author WHERE id = :id", id=1, sample=True),
    "text with a CTE": _text(
        "WITH gone AS (SELECT 2 AS id) DELETE FROM book WHERE id IN (SELECT id FROM gone)", only=(*LITE, *PG)
    ),
    "text, not understood": _text("REPLACE INTO author (id, name) VALUES (1, 'again')", only=(*LITE, *MY)),
    "driver update": _driver("UPDATE book SET author_id = 3 WHERE id = 2"),
    "driver delete": _driver("DELETE FROM book WHERE id = 2"),
    "driver COMMIT": Write(
        lambda unit: (_driver("UPDATE book SET price = 1").change(unit), _driver("COMMIT").change(unit)),
        core=True,
    ),
    # definitions
    "TRUNCATE": _text("TRUNCATE TABLE book_tag", only=(*PG, *MY)),
    "TRUNCATE CASCADE": _text("TRUNCATE author CASCADE", only=PG),
    "DROP and CREATE": Write(_recreate, core=True),
    "driver DROP and CREATE": Write(
        lambda unit: (
            _driver("DROP TABLE book_tag").change(unit),
            _driver("CREATE TABLE book_tag (book_id INTEGER, tag_id INTEGER)").change(unit),
        ),
        core=True,
    ),
}


# --- the matrix -----------------------------------------------------------------------------------------


def _commits_by_itself(dialect: str, name: str) -> bool:
    """True where the database ends the transaction: it has no savepoints then to go back to."""
    return name == "driver COMMIT" or (dialect == "mysql" and ("DROP" in name or "TRUNCATE" in name))


def _ends(world: str, way: str, name: str) -> Iterator[tuple[str, End]]:
    """All ends but those that cannot be.

    A deferred constraint fails in COMMIT where there are such constraints and a transaction. Savepoints need a transaction,
    too, which is still the same after the write.

    Every kind of write has them all in the Session's transaction, on each database and with another process; samples of
    them in every way and with every store. What differs between ends does not differ between like writes elsewhere.
    """
    dialect = _dialect(world)
    in_full = WRITES[name].sample or (way == "Session" and world != "sqlite memory")
    for end_name, end in ENDS.items():
        if not in_full and end not in (_rollback, _commit):
            continue
        if not WRITES[name].sample and end in (_roll_back_to_savepoint, _release):
            continue  # those that write before the savepoint do all of it
        if end is _fail_deferred and (dialect not in DEFERRING or way == "AUTOCOMMIT"):
            continue
        if "savepoint" in end_name and (way == "AUTOCOMMIT" or _commits_by_itself(dialect, name)):
            continue
        yield end_name, end


def _dialect(world: str) -> str:
    return world.split()[0].replace("mariadb", "mysql")


def _cases() -> Iterator[Any]:
    for world, servers in WORLDS.items():
        dialect = _dialect(world)
        marks = [pytest.mark.server(server) for server in servers]
        for way in WAYS:
            for name, write in WRITES.items():
                if (
                    (not write.only or dialect in write.only)
                    and (write.core or way not in ("Session.connection()", "Engine"))
                    and (write.sample or way in ("Session", "Engine"))
                    and (dialect != "sqlite" or way != "two-phase")
                    and not (_commits_by_itself(dialect, name) and way == "two-phase")
                ):
                    yield pytest.param(world, way, name, marks=marks)


@pytest.mark.parametrize(("world", "way", "name"), list(_cases()), indirect=["world"])
def test_the_next_read_is_the_databases(world: World, way: str, name: str) -> None:
    for number, (end_name, end) in enumerate(_ends(world.name, way, name)):
        world.reset()
        with WAYS[way](world) as unit:
            end(world, unit, WRITES[name].change)
        world.check(end_name, here_first=number % 2 == 0)


# --- the naive ways ---------------------------------------------------------------------------------------

_ends_savepoint = Transactions.ends_savepoint


def _forgets_all(self: Transactions, connection: Connection, word: str) -> bool:
    """ROLLBACK TO takes everything back that the transaction has noted."""
    if word == "rollback_to":
        self.forget(connection.info)
    return _ends_savepoint(self, connection, word)


def _forgets_its_own(self: Transactions, connection: Connection, word: str) -> bool:
    """ROLLBACK TO takes back what was noted since SAVEPOINT, also where it had been noted before that already."""
    if word == "savepoint":
        connection.info["test before"] = set(self.ensure(connection.info).tags)
        self.ensure(connection.info).tags.clear()
    elif word == "rollback_to":
        self.ensure(connection.info).tags = connection.info["test before"] - self.ensure(connection.info).tags
    elif word == "release":
        self.ensure(connection.info).tags |= connection.info["test before"]
    return _ends_savepoint(self, connection, word)


def _releases_all(self: Transactions, connection: Connection, word: str) -> bool:
    """RELEASE is taken for the end of what was written."""
    ends = _ends_savepoint(self, connection, word)
    if word == "release" and not ends:
        self.forget(connection.info)
    return ends


# of the transaction itself, or of those after it
_ROLLED_BACK = "after (a rollback to a savepoint|write, then savepoint rollback)"
NAIVE = {
    "ROLLBACK TO forgets all": (_forgets_all, _ROLLED_BACK),
    "ROLLBACK TO forgets what was before it, too": (_forgets_its_own, _ROLLED_BACK),
    "RELEASE forgets all": (_releases_all, "after write, then savepoint release"),
}


@pytest.mark.parametrize(
    ("world", "naive"),
    [
        pytest.param(world, naive, marks=[pytest.mark.server(server) for server in servers])
        for world, servers in WORLDS.items()
        for naive in NAIVE
    ],
    indirect=["world"],
)
def test_it_fails_where_a_savepoint_takes_too_much_with_it(world: World, naive: str) -> None:
    replacement, where = NAIVE[naive]
    with (
        mock.patch.object(Transactions, "ends_savepoint", replacement),
        pytest.raises(AssertionError, match=where),
    ):
        test_the_next_read_is_the_databases(world, "Session", "objects: update")
