"""PITFALLS E: writes and transactions, each line with what must hold, and where it can be shown, the naive way.

A *naive way* is the same check with one protection taken out: it must fail then, or the check proves nothing.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from dogpile.cache import register_backend
from redis import Redis
from sqlalchemy import (
    Boolean,
    Column,
    Computed,
    Connection,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    Sequence,
    String,
    Table,
    and_,
    bindparam,
    create_engine,
    delete,
    event,
    exc,
    exists,
    func,
    insert,
    literal_column,
    not_,
    or_,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    mapped_column,
    sessionmaker,
)
from sqlalchemy.pool import StaticPool
from sqlalchemy.schema import CreateSequence

from querycache import QueryCache, dependencies, pins, sa_internals, tables
from querycache.backends.memory import MemoryBackend
from querycache.changes import changes_of
from querycache.errors import CacheUnavailable
from querycache.flushed import FlushedRows
from querycache.store import Mark
from querycache.transactions import Transactions
from querycache.writes import Writes
from tests.servers import Server
from tests.writes.library import (
    Author,
    Base,
    Book,
    Commit,
    Loan,
    Tag,
    book_tag,
    configure_sqlite,
    fill_library,
)


class Library:
    """The library of :mod:`tests.writes.library` behind a cache."""

    def __init__(self, engine: Engine, store: Any = "memory://", **arguments: Any) -> None:
        self.engine = engine
        commit = engine.dialect.__dict__.get("test_commit")
        self._commit: Commit = commit or engine.dialect.__dict__.setdefault("test_commit", Commit(engine))
        self.cache = QueryCache(store, **{"lease": 0.3, **arguments}).attach(engine)
        self.sessions = sessionmaker(engine)
        self.cache.attach(self.sessions)
        engine.clear_compiled_cache()  # what is known of statements is remembered there
        Base.metadata.create_all(engine)
        with engine.begin() as connection:
            fill_library(connection)

    def ask(self, statement: Any, session: Session | None = None) -> list[Any]:
        """The rows, through the cache; in a session of their own unless one is given."""
        statement = statement.execution_options(cache_key=True)
        if session is not None:
            return list(map(tuple, session.execute(statement)))
        with self.sessions() as own:
            return list(map(tuple, own.execute(statement)))

    def outcome(self, statement: Any, session: Session | None = None) -> str:
        """What the cache did when asked: "hit", "miss fill", "bypass own write" …"""
        with self.cache.recording() as events:
            self.ask(statement, session)
        return " ".join(f"{event.outcome} {event.reason}".strip() for event in events)

    def fill(self, *statements: Any) -> None:
        """Ask until the cache answers; a store that has lost its versions may take a lease."""
        for statement in statements:
            for _ in range(5_000):
                if self.outcome(statement) == "hit":
                    break
            else:
                raise AssertionError(f"never answered from the cache: {statement}")

    def write(self, *statements: Any) -> None:
        with self.engine.begin() as connection:
            for statement in statements:
                connection.execute(statement)

    @contextlib.contextmanager
    def committing(self, instead: Callable[[Callable[[Any], None], Any], None] | None) -> Iterator[None]:
        """Something else than COMMIT is done when it is asked for; for None, COMMIT itself."""
        with mock.patch.object(self._commit, "instead", instead):
            yield

    def database(self, statement: Any) -> list[Any]:
        with self.engine.connect() as connection:
            return list(map(tuple, connection.execute(statement)))

    def is_right(self, statement: Any) -> bool:
        """Whether the cache says what the database says."""
        return self.ask(statement) == self.database(statement)


@pytest.fixture
def library(sqlite_engine: Engine) -> Library:
    return Library(sqlite_engine)


def point(number: int) -> Any:
    return select(Book.id, Book.title, Book.price).where(Book.id == number)


PRICES = select(Book.id, Book.price).order_by(Book.id)
AUTHORS = select(Author.id, Author.name).order_by(Author.id)
LOANS = select(Loan.id, Loan.book_id).order_by(Loan.id)
RAISE_PRICE = update(Book).where(Book.id == 2).values(price=77)


@contextlib.contextmanager
def naive(target: Any, name: str, replacement: Any) -> Iterator[None]:
    """Take a protection out; what stands in the block must then fail."""
    with mock.patch.object(target, name, replacement), pytest.raises(AssertionError):
        yield


# --- E1: savepoints and close() -----------------------------------------------------------------------


def check_savepoint(library: Library) -> None:
    library.fill(PRICES)
    with library.sessions() as session:
        with session.begin_nested():
            session.get_one(Book, 1).price = 70
        session.commit()
    assert library.is_right(PRICES)


def test_E1_a_released_savepoint_is_not_the_commit(postgresql_engine: Engine) -> None:
    library = Library(postgresql_engine)
    library.fill(PRICES)
    with library.sessions() as session:
        with session.begin_nested():
            session.get_one(Book, 1).price = 70
        assert library.outcome(PRICES) == "hit", "nothing is committed yet"
        assert library.outcome(PRICES, session) == "bypass own write"
        session.commit()
    assert library.outcome(PRICES) == "stale fill"


def test_E1_what_was_written_before_a_savepoint_is_not_forgotten(postgresql_engine: Engine) -> None:
    check_savepoint(Library(postgresql_engine))

    listeners = Writes.session_listeners

    def with_after_commit(self: Writes) -> Mapping[str, Any]:
        """As if the event told of a COMMIT, and no more."""

        def forget(session: Session) -> None:
            for connection in sa_internals.connections(session):
                self.end(connection.info, "over")

        return {**listeners(self), "after_commit": forget}

    with naive(Writes, "session_listeners", with_after_commit):
        check_savepoint(Library(postgresql_engine))


def test_E1_on_sqlite_a_savepoint_may_be_the_transaction(library: Library) -> None:
    """Its driver begins none before SAVEPOINT, so that RELEASE commits."""
    library.fill(PRICES)
    with library.sessions() as session:
        with session.begin_nested():
            session.execute(RAISE_PRICE)
        session.rollback()
    assert library.is_right(PRICES)


@pytest.mark.parametrize("end", [Session.close, Session.rollback])
def test_E1_what_is_not_committed_leaves_entries_valid(
    library: Library, end: Callable[[Session], None]
) -> None:
    library.fill(PRICES)
    session = library.sessions()
    session.get_one(Book, 1).price = 70
    session.flush()
    end(session)
    assert library.outcome(PRICES) == "hit"


# --- E2, E3, E4: writes without objects -------------------------------------------------------------


def without_core(self: Writes, connection: Connection, context: Any) -> bool:
    """As libraries do that listen to the unit of work."""
    flush = sa_internals.flush_of(context)
    if flush is None:
        return False
    for table in changes_of(context).tables:
        self._expect_rows(self._ensure(connection), flush, table, {}, context)
    return True


def check_bulk(library: Library) -> None:
    library.fill(PRICES)
    with library.sessions.begin() as session:
        session.execute(RAISE_PRICE)
    assert library.is_right(PRICES)
    library.fill(PRICES)
    with library.sessions.begin() as session:
        session.connection().execute(delete(Book.__table__).where(Book.id == 1))  # type: ignore[arg-type]
    assert library.is_right(PRICES)


def test_E2_bulk_statements_and_core(library: Library) -> None:
    check_bulk(library)
    with naive(Writes, "_note_dml", without_core):
        check_bulk(Library(library.engine))


def check_secondary(library: Library) -> None:
    tagged = select(book_tag.c.book_id, book_tag.c.tag_id).order_by(*book_tag.c)
    library.fill(tagged)
    with library.sessions.begin() as session:
        book = session.get_one(Book, 3)
        book.tags.append(session.get_one(Tag, 1))
    assert library.is_right(tagged)


def test_E3_secondary_tables(library: Library) -> None:
    check_secondary(library)
    with naive(Writes, "_note_dml", without_core):
        check_secondary(Library(library.engine))


def forget_declarations() -> None:
    """What follows from the declared tables is found anew."""
    sa_internals.mapping._forget()


def check_cascade(library: Library) -> None:
    library.fill(PRICES, LOANS)
    with library.sessions.begin() as session:
        session.delete(session.get_one(Author, 1))
    assert library.is_right(PRICES), "ON DELETE CASCADE"
    assert library.is_right(LOANS), "ON DELETE SET NULL, one step further"


def test_E4_the_databases_own_cascades(library: Library) -> None:
    check_cascade(library)
    forget_declarations()
    with naive(tables, "_cascades", lambda *_: tables.Reached(frozenset(), frozenset())):
        check_cascade(Library(library.engine))
    forget_declarations()


def check_cascade_of_bulk_delete(library: Library) -> None:
    forget_declarations()
    library.fill(PRICES, LOANS)
    with library.sessions.begin() as session:
        # first with the table as the ORM has it, a copy with annotations, for which nothing may be remembered
        session.execute(delete(Author).where(Author.id == 77))
    with library.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM author WHERE id = 1")
    assert library.is_right(PRICES)
    assert library.is_right(LOANS)


def test_E4_cascades_of_a_bulk_delete(library: Library) -> None:
    check_cascade_of_bulk_delete(library)
    with naive(tables, "_cascades", lambda *_: tables.Reached(frozenset(), frozenset())):
        check_cascade_of_bulk_delete(Library(library.engine))
    forget_declarations()


def test_E4_a_table_declared_later_is_followed_too(sqlite_engine: Engine) -> None:
    library = Library(sqlite_engine)
    metadata = MetaData()
    parent = Table("parent", metadata, sa_column("id"))
    assert tables.cascades(parent, delete=True).tables == frozenset()
    child = Table("child", metadata, sa_column("id"), sa_column("parent_id", "parent.id"))
    metadata.create_all(sqlite_engine)
    library.write(parent.insert().values(id=1), child.insert().values(id=1, parent_id=1))
    library.fill(select(child))
    library.write(parent.delete())
    assert library.ask(select(child)) == []


def sa_column(name: str, target: str | None = None) -> Any:
    if target is None:
        return Column(name, Integer, primary_key=name == "id")
    return Column(name, ForeignKey(target, ondelete="CASCADE"))


def test_E4_a_reference_to_a_table_that_is_not_declared_does_not_break_writes(library: Library) -> None:
    metadata = MetaData()
    lonely = Table("lonely", metadata, sa_column("id"), sa_column("elsewhere_id", "elsewhere.id"))
    with library.engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE lonely (id INTEGER PRIMARY KEY, elsewhere_id INTEGER)")
        connection.execute(lonely.insert().values(id=1))
        connection.execute(lonely.delete())
    assert library.database(select(lonely)) == []


# --- E5, E7: versions that are gone, clocks that are wrong ------------------------------------------


def test_E5_an_entry_outlives_its_version_and_is_not_served(
    sqlite_engine: Engine, redis_store_url: str
) -> None:
    library = Library(sqlite_engine, redis_store_url)
    library.fill(PRICES)
    with Redis.from_url(redis_store_url) as client:
        client.delete(*client.keys("*:t:*"))
        assert client.keys("*:e:*"), "the entry is still there"
    assert library.outcome(PRICES) != "hit"
    library.write(RAISE_PRICE)
    assert library.is_right(PRICES)


@pytest.mark.parametrize("drift", [-3600.0, 3600.0])
def test_E7_no_clock_decides(library: Library, monkeypatch: pytest.MonkeyPatch, drift: float) -> None:
    library.fill(PRICES)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + drift)
    library.write(RAISE_PRICE)
    monkeypatch.undo()
    assert library.is_right(PRICES)
    assert library.outcome(PRICES) == "hit"


# --- E8, E9: the end of COMMIT ---------------------------------------------------------------------------


def check_unknown_outcome(library: Library) -> None:
    library.fill(PRICES)

    def lost(real: Callable[[Any], None], connection: Any) -> None:
        real(connection)
        raise OSError("lost")

    with library.sessions() as session:
        session.execute(RAISE_PRICE)
        with library.committing(lost), pytest.raises(OSError, match="lost"):
            session.commit()
    assert library.is_right(PRICES)


def test_E8_a_commit_whose_outcome_is_unknown(library: Library) -> None:
    check_unknown_outcome(library)

    end = Writes.end

    def only_after_success(self: Writes, info: dict[Any, Any], outcome: sa_internals.Outcome) -> None:
        if outcome == "over":
            end(self, info, outcome)
        self._transactions.end(info)

    with naive(Writes, "end", only_after_success):
        check_unknown_outcome(Library(library.engine, consistency="commit"))


def test_E9_the_mark_of_one_writer_is_not_wiped_by_another(postgresql_engine: Engine) -> None:
    library = Library(postgresql_engine)
    library.fill(PRICES)
    seen = []

    def slow(real: Callable[[Any], None], connection: Any) -> None:
        with library.committing(None):
            library.write(
                update(Book).where(Book.id == 1).values(price=71)
            )  # another writer, begun and ended
            seen.append(library.outcome(PRICES))
        real(connection)

    with library.sessions() as session:
        session.execute(RAISE_PRICE)
        with library.committing(slow):
            session.commit()
    assert seen == ["stale bypass pending"]
    assert library.is_right(PRICES)


def test_E9_what_a_listener_of_commit_writes_is_marked_too(library: Library) -> None:
    library.fill(AUTHORS, PRICES)

    @event.listens_for(library.engine, "commit")
    def write_more(connection: Connection) -> None:
        connection.execute(update(Author).values(name="renamed"))

    library.write(RAISE_PRICE)
    event.remove(library.engine, "commit", write_more)
    assert library.is_right(AUTHORS)
    assert library.is_right(PRICES)


# --- E10: snapshots -------------------------------------------------------------------------------------


def check_snapshot(library: Library, begin: Callable[[Library], Session]) -> None:
    library.fill(AUTHORS)
    with begin(library) as old:
        old.execute(text("SELECT count(*) FROM tag"))  # the snapshot is taken
        library.write(RAISE_PRICE)
        first = library.ask(point(2), old)
        assert library.is_right(point(2)), "filled from an old snapshot"
        assert library.ask(point(2), old) == first, "two reads of one snapshot differ"
    assert library.is_right(point(2))


def repeatable_read(library: Library) -> Session:
    return library.sessions(bind=library.engine.execution_options(isolation_level="REPEATABLE READ"))


@pytest.mark.parametrize("database", ["postgresql", "mariadb"])
def test_E10_an_old_snapshot_neither_fills_nor_is_answered(
    request: pytest.FixtureRequest, database: str
) -> None:
    library = Library(request.getfixturevalue(f"{database}_engine"))
    check_snapshot(library, repeatable_read)
    with library.engine.begin() as connection:
        fill_library(connection)
    with naive(Transactions, "takes_snapshots", lambda self, connection: False):
        check_snapshot(Library(library.engine), repeatable_read)


def test_E10_mariadb_takes_snapshots_unasked(mariadb_engine: Engine) -> None:
    check_snapshot(Library(mariadb_engine), lambda library: library.sessions())


def test_E10_an_isolation_level_set_in_text_is_noticed_for_good(postgresql_engine: Engine) -> None:
    def begin(library: Library) -> Session:
        connection = library.engine.connect()
        connection.exec_driver_sql(
            "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ"
        )
        connection.commit()
        return library.sessions(bind=connection)

    check_snapshot(Library(postgresql_engine), begin)


def test_E10_a_snapshot_that_nobody_has_written_since_hits_and_fills(postgresql_engine: Engine) -> None:
    library = Library(postgresql_engine)
    library.fill(AUTHORS)
    with repeatable_read(library) as session:
        session.execute(text("SELECT 1"))
        assert library.outcome(AUTHORS, session) == "hit"
        assert library.outcome(PRICES, session) == "miss fill"


@pytest.mark.parametrize("store", ["redis", "memcached"])
def test_E10_a_snapshot_is_answered_with_what_was_not_written_since(
    request: pytest.FixtureRequest, store: str, postgresql_engine: Engine
) -> None:
    library = Library(postgresql_engine, request.getfixturevalue(f"{store}_store_url"))
    with repeatable_read(library) as session:
        session.execute(text("SELECT 1"))  # from now on it is remembered which versions were seen
    library.fill(AUTHORS, point(1), point(2))
    with repeatable_read(library) as old:
        old.execute(text("SELECT 1"))
        library.write(RAISE_PRICE)
        library.fill(PRICES, point(2))  # by others, and later
        assert library.outcome(AUTHORS, old) == "hit"
        assert library.outcome(PRICES, old) == library.outcome(point(2), old) == "bypass snapshot"
        library.cache.invalidate(tables=["author"])
        library.ask(AUTHORS)
        assert library.outcome(AUTHORS, old) == "bypass snapshot"
    assert library.is_right(point(2))


def test_E10_what_is_answered_before_the_snapshot_begins_is_current(postgresql_engine: Engine) -> None:
    library = Library(postgresql_engine)
    library.fill(AUTHORS, point(2))
    with repeatable_read(library) as session:
        assert library.outcome(AUTHORS, session) == "hit"  # the database knows nothing of it
        library.write(RAISE_PRICE)
        library.fill(point(2))
        assert library.ask(point(2), session) == library.database(point(2))
        session.execute(text("SELECT 1"))
        library.write(update(Book).where(Book.id == 2).values(price=78))
        library.fill(point(2))
        assert library.outcome(point(2), session) == "bypass snapshot"


class SettlesLate(MemoryBackend):
    """Others may come between a lookup that finds no versions and the next step, which creates them."""

    between: Callable[[], object] = staticmethod(lambda: None)

    def settle(self, counters: list[str], witness: str) -> list[int | None]:
        self.between()
        return super().settle(counters, witness)


def test_E10_versions_that_are_made_after_a_commit(postgresql_engine: Engine) -> None:
    """The snapshot is from before it, and so was the witness that was read with the missing versions."""
    register_backend("tests.settles_late", __name__, "SettlesLate")
    library = Library(postgresql_engine, store={"default": {"backend": "tests.settles_late"}})
    library.fill(AUTHORS)
    with repeatable_read(library) as old:
        old.execute(text("SELECT count(*) FROM tag"))  # the snapshot is taken

        [ledger] = library.cache._regions.ledgers
        for counter in ledger.store._counters.keys() - {ledger._witness}:  # type: ignore[attr-defined]
            del ledger.store._counters[counter]  # type: ignore[attr-defined]

        def between() -> None:
            SettlesLate.between = staticmethod(lambda: None)
            library.write(RAISE_PRICE)

        with mock.patch.object(SettlesLate, "between", staticmethod(between)):
            library.ask(point(2), old)
    assert library.is_right(point(2)), "filled from an old snapshot"


def test_E10_a_transaction_of_sqlite_begun_by_hand(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'wal.db'}")

    @event.listens_for(engine, "connect")
    def connect(connection: Any, record: object) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    library = Library(engine)
    check_snapshot(library, lambda library: library.sessions())
    library.write(update(Book).where(Book.id == 2).values(price=20))
    check_snapshot(library, lambda library: library.sessions())  # it is known by now how this engine begins
    with library.sessions() as session:
        assert library.outcome(PRICES, session) == "miss fill"
        assert library.outcome(PRICES, session) == "hit"
    engine.dispose()


# --- E11, E12: what others see, and rows that move -----------------------------------------------------


def test_E11_another_cache_on_the_same_store(sqlite_engine: Engine, redis_store_url: str) -> None:
    here, there = Library(sqlite_engine, redis_store_url), Library(sqlite_engine, redis_store_url)
    for library in (here, there):
        library.fill(PRICES)
    with here.sessions() as session:
        session.add(Book(id=9, title="new", price=1, author_id=1))
        session.commit()
    assert there.is_right(PRICES)


def test_E11_uncommitted_reads_are_not_served_to_others(postgresql_engine: Engine) -> None:
    library = Library(postgresql_engine)
    with library.sessions() as session:
        session.execute(RAISE_PRICE)
        assert library.ask(point(2), session) == [(2, "book 2", 77)]
        assert library.outcome(AUTHORS, session) == "miss bypass after write"
        assert library.ask(point(2)) == [(2, "book 2", 20)]
    assert library.ask(point(2)) == [(2, "book 2", 20)]


def test_E12_rows_that_move_into_an_answer(library: Library) -> None:
    cheap = select(Book.id).where(Book.price < 15).order_by(Book.id)
    nobody = select(Book.id).where(Book.author_id == 3)
    how_many = select(func.count()).select_from(Book)
    library.fill(cheap, nobody, how_many)
    with library.sessions.begin() as session:
        session.add(Book(id=9, title="new", price=1, author_id=3))
        session.get_one(Book, 4).price = 2
    for statement in (cheap, nobody, how_many):
        assert library.is_right(statement)


# --- E13, E15, E16: what pins --------------------------------------------------------------------------------


class Pins(DeclarativeBase):
    pass


def token(number: int) -> uuid.UUID:
    """One whose text has letters: one of digits alone could be a number as well, and is followed by no row."""
    return uuid.UUID(int=0xA << 64 | number)


class Member(Pins):
    __tablename__ = "member"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(String(40, collation="NOCASE"), unique=True)
    token: Mapped[uuid.UUID] = mapped_column(unique=True)
    number: Mapped[int]


class Doubled(Pins):
    __tablename__ = "doubled"
    __mapper_args__ = {"eager_defaults": False}

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]
    twice: Mapped[int] = mapped_column(Computed("number * 2"), unique=True)


@pytest.fixture
def members(sqlite_engine: Engine) -> Library:
    library = Library(sqlite_engine)
    Pins.metadata.create_all(sqlite_engine)
    with library.sessions.begin() as session:
        session.add_all(Member(id=n, email=f"m{n}@x", token=token(n), number=n) for n in range(1, 5))
    return library


def rename_member(library: Library, row: int, /, **values: object) -> None:
    with library.sessions.begin() as session:
        member = session.get_one(Member, row)
        for name, value in values.items():
            setattr(member, name, value)


def add_member(library: Library, row: int) -> None:
    with library.sessions.begin() as session:
        session.add(Member(id=row, email=f"m{row}@x", token=token(row), number=row))


def check_collation(library: Library) -> None:
    library.write(delete(Member).where(Member.id == 9))
    by_email = select(Member.id, Member.number).where(Member.email == "M9@X")
    library.fill(by_email)
    add_member(library, 9)
    assert library.is_right(by_email)


def test_E13_strings_do_not_pin(members: Library) -> None:
    check_collation(members)

    def every_column(table: Table) -> tuple[Any, ...]:
        return tuple(table.columns)

    def hashed(value: object, slots: int) -> int:
        return hash(value) % slots

    with (
        mock.patch("querycache.changes.tracked_columns", every_column),
        mock.patch.object(tables, "tracked_columns", every_column),
        mock.patch.object(tables, "slot_of", hashed),
        mock.patch.object(dependencies, "slot_of", hashed),
        mock.patch.object(pins, "is_exact", lambda kind: True),
        naive(pins, "tracked_columns", every_column),
    ):
        forget_declarations()  # and what was found out about the tables
        check_collation(members_again(members))
    forget_declarations()


def members_again(library: Library) -> Library:
    """The same rows behind a new cache."""
    return Library(library.engine)


@pytest.mark.parametrize(
    "pinned",
    [
        select(Member.number).where(Member.id == 1),
        select(Member.number).where(Member.id.in_([1, 3])),
        select(Member.number).where(Member.token == token(1)),
        select(Member.number).where(and_(Member.number > 0, Member.id == 1)),
        select(Member.number).where(Member.id == 1, Member.email == "m1@x"),
    ],
    ids=str,
)
def test_E13_integers_and_uuids_pin(members: Library, pinned: Any) -> None:
    members.fill(pinned)
    add_member(members, 7)
    assert members.outcome(pinned) == "hit"
    rename_member(members, 1, number=101)
    assert members.outcome(pinned) == "stale fill"
    assert members.is_right(pinned)


@pytest.mark.parametrize("value", [1, True, Decimal("1.00"), 1.0, "1"], ids=repr)
def test_E13_what_the_database_calls_equal(members: Library, value: Any) -> None:
    pinned = select(Member.number).where(Member.id == value)
    members.fill(pinned)
    rename_member(members, 1, number=100)
    assert members.is_right(pinned)


def test_E13_a_key_given_as_text_is_the_same_row(members: Library) -> None:
    pinned = select(Member.email).where(Member.id == 9)
    members.fill(pinned)
    with members.sessions.begin() as session:
        session.add(Member(id="9", email="m9@x", token=token(9), number=9))
    assert members.is_right(pinned)


def check_computed(library: Library) -> None:
    twice = select(Doubled.id).where(Doubled.twice == 100)
    with library.sessions.begin() as session:
        session.execute(delete(Doubled))
    library.fill(twice)
    with library.sessions.begin() as session:
        session.add(Doubled(id=1, number=50))
    assert library.is_right(twice)


def test_E15_a_tracked_column_that_the_server_computes(members: Library) -> None:
    check_computed(members)

    def from_objects_only(state: Any, columns: Any) -> list[tuple[object, object]]:
        values = [state.dict.get(column.key) for column in columns]
        return list(zip(values, values, strict=True))

    with naive(sa_internals, "old_and_new", from_objects_only):
        check_computed(members_again(members))


other = aliased(Member)


@pytest.mark.parametrize(
    "statement",
    [
        select(Member.id).where(or_(Member.id == 1, Member.number > 50)),
        select(Member.id).where(not_(Member.id == 1), Member.number > 50),
        select(func.count(other.id))
        .select_from(Member)
        .join(other, other.id != Member.id)
        .where(Member.id == 1, other.number > 50),
        select(Member.id).where(Member.id == 1, select(other.id).where(other.number > 50).exists()),
        select(Member.id).where(Member.number == select(func.max(other.number)).scalar_subquery()),
        select(select(Member.id).where(Member.number > 50).subquery()),
        select(Author.id, other.id).outerjoin(other, and_(other.id == 2, other.number > 50)),
        select(Member.id).where(Member.id == 1).union_all(select(other.id).where(other.number > 50)),
        # What SQLAlchemy puts into no parentheses.
        select(Member.id).where(Member.id == 1, text("number < 0 OR number > 50")),
        select(Member.id).where(
            text("number > 50 -- or else"), Member.id == bindparam("id", 1, literal_execute=True)
        ),
        select(Member.id).where(Member.id == 1, literal_column("number < 0 OR number > 50")),
        select(Member.id).where(Member.id == 1, type_coerce(text("number < 0 OR number > 50"), Boolean)),
        select(Member.id).where(
            Member.id == 1, (Member.number < 0).op("OR", precedence=20)(Member.number > 50)
        ),
        select(Member.id).where(Member.id == 1).suffix_with("OR number > 50"),
    ],
    ids=str,
)
def test_E16_only_top_level_conjuncts_pin(members: Library, statement: Any) -> None:
    members.fill(statement)
    rename_member(members, 2, number=60)
    assert members.is_right(statement)
    assert members.outcome(statement) == "hit"


@pytest.mark.parametrize(
    "beside",
    [
        exists().where(aliased(Author).id == 1),
        select(func.count()).select_from(aliased(Author)).scalar_subquery() > 0,
    ],
    ids=["exists", "count"],
)
def test_a_star_leaves_a_pin(library: Library, beside: Any) -> None:
    statement = select(Book.price).where(Book.id == 1, beside)
    library.fill(statement)
    with library.sessions.begin() as session:
        session.get_one(Book, 2).price = 1000
    assert library.outcome(statement) == "hit"


@pytest.mark.parametrize(
    "sql", ["number = 1", "number is not null", "number > :least", "email <> 'x y'", "number"]
)
def test_a_comparison_in_text_leaves_a_pin(members: Library, sql: str) -> None:
    statement = select(Member.id).where(
        Member.id == 1, text(sql).bindparams(**{"least": 0} if ":" in sql else {})
    )
    members.fill(statement)
    rename_member(members, 2, number=60)
    assert members.outcome(statement) == "hit"


def test_E16_a_naive_way_takes_or_for_and(members: Library) -> None:
    statement = select(Member.id).where(or_(Member.id == 1, Member.number > 50))

    def check(library: Library) -> None:
        library.fill(statement)
        rename_member(library, 2, number=61)
        assert library.is_right(statement)

    def every_clause(clause: Any) -> Iterator[Any]:
        yield from getattr(clause, "clauses", [clause])

    with naive(pins, "_conjuncts", every_clause):
        check(members)


# --- old values that are older than the row ------------------------------------------------------------------


def check_outdated_object(library: Library, use: Callable[[Session, Book], object]) -> None:
    of_author_3 = select(Book.id, Book.price).where(Book.author_id == 3)
    library.write(update(Book).where(Book.id == 2).values(author_id=1))
    with library.sessions() as session:
        book = session.get_one(Book, 2)  # of author 1, as far as this session knows
        library.write(update(Book).where(Book.id == 2).values(author_id=3))
        library.fill(of_author_3)
        use(session, book)
        session.commit()
    assert library.is_right(of_author_3)


def reprice(session: Session, book: Book) -> None:
    book.price = 99


def move(session: Session, book: Book) -> None:
    book.author_id = 2


def reprice_many(session: Session, book: Book) -> None:
    session.add_all([Book(id=n, title="new", price=n, author_id=2) for n in range(100, 200)])
    session.flush()
    for each in session.scalars(select(Book).where(Book.id >= 100)):
        each.price += 1
    book.price = 98


def test_an_object_that_does_not_know_where_its_row_has_moved(postgresql_engine: Engine) -> None:
    library = Library(postgresql_engine)
    for use in (reprice, move, reprice_many, Session.delete):
        check_outdated_object(library, use)
        library.write(
            delete(Book).where(Book.id == 2), insert(Book).values(id=2, title="again", price=2, author_id=1)
        )
    with naive(FlushedRows, "look_at", lambda *arguments: None):
        check_outdated_object(Library(postgresql_engine), reprice)
    for use in (move, Session.delete):
        with naive(dependencies, "change_tag", lambda label: f"table:nothing-{label}-{uuid.uuid4()}"):
            check_outdated_object(Library(postgresql_engine), use)


def test_lists_by_foreign_key_survive_changes_of_rows_of_other_parents(library: Library) -> None:
    of_author_1 = select(Book.id, Book.price).where(Book.author_id == 1)
    library.fill(of_author_1)
    with library.sessions.begin() as session:
        session.get_one(Book, 3).price = 70  # of author 2
    assert library.outcome(of_author_1) == "hit"
    with library.sessions.begin() as session:
        session.get_one(Book, 1).price = 71
    assert library.is_right(of_author_1)


def test_lists_by_foreign_key_survive_inserts_for_other_parents(library: Library) -> None:
    of_author_1 = select(Book.id, Book.price).where(Book.author_id == 1)
    library.fill(of_author_1)
    with library.sessions.begin() as session:
        session.add(Book(id=9, title="new", price=1, author_id=2))
    assert library.outcome(of_author_1) == "hit"
    with library.sessions.begin() as session:
        session.add(Book(id=10, title="new", price=1, author_id=1))
    assert library.outcome(of_author_1) == "stale fill"


# --- E14: answers that change by themselves --------------------------------------------------------------------


@pytest.mark.parametrize(
    "volatile",
    [
        select(func.random()),
        select(Book.id, func.now()),
        select(Book.id).where(func.current_date() > "2000-01-01"),
        select(Book.id).order_by(func.random()),
        select(Book.id).where(text("price > random()")),
        select(literal_column("current_timestamp")),
        select(Book.id).where(literal_column("date('now')") > "2000-01-01"),
        select(func.my_own_function(Book.id)),
    ],
    ids=str,
)
def test_E14_answers_that_change_by_themselves(library: Library, volatile: Any) -> None:
    with library.engine.connect() as connection:
        connection.connection.dbapi_connection.create_function(  # type: ignore[union-attr]
            "my_own_function", 1, lambda value: value
        )
    assert library.outcome(volatile).startswith("bypass function")
    for_a_minute = volatile.execution_options(cache_ttl=60)
    assert library.outcome(for_a_minute) == "miss fill"
    assert library.outcome(for_a_minute) == "hit"


def test_E14_a_sequence_is_never_answered_from_the_cache(postgresql_engine: Engine) -> None:
    library = Library(postgresql_engine)
    numbers = Sequence("numbers")
    library.write(CreateSequence(numbers))
    assert library.outcome(select(numbers.next_value())) == "bypass function next_value"


def test_E14_a_declared_function_is_cached_and_follows_its_tables(library: Library) -> None:
    statement = select(func.my_own_function(Tag.id)).order_by(Tag.id)
    with library.engine.connect() as connection:
        connection.connection.dbapi_connection.create_function(  # type: ignore[union-attr]
            "my_own_function", 1, lambda value: value
        )
    library.cache.depends("my_own_function", on=["book"])
    library.fill(statement)
    library.write(update(Author).values(name="x"))
    assert library.outcome(statement) == "hit"
    library.write(RAISE_PRICE)
    assert library.outcome(statement) == "stale fill"


# --- E17, E18: the events ---------------------------------------------------------------------------------------


def test_E17_a_refused_commit_leaves_nothing_behind(
    postgresql_engine: Engine, private_server: Callable[[str], Server]
) -> None:
    server = private_server("redis")
    library = Library(postgresql_engine, server.url, on_outage="refuse")
    server.kill()
    for write in (
        lambda session: session.execute(RAISE_PRICE),
        lambda session: session.add(Tag(id=9, name="n")),
    ):
        with library.sessions() as session:
            write(session)  # type: ignore[no-untyped-call]
            with pytest.raises(CacheUnavailable):
                session.commit()
    with (
        library.engine.begin() as connection
    ):  # the same connection of the pool: its transaction must be over
        assert connection.scalar(select(Book.price).where(Book.id == 2)) == 20
    assert library.database(select(Book.price).where(Book.id == 2)) == [(20,)]
    assert library.database(select(Tag.id).where(Tag.id == 9)) == []


@pytest.mark.parametrize("fault", [KeyboardInterrupt, TypeError])
def test_E17_a_commit_that_anything_else_stops_leaves_nothing_behind(
    postgresql_engine: Engine, fault: type[BaseException]
) -> None:
    library = Library(postgresql_engine)
    library.fill(PRICES)

    def fail(*_: object) -> None:
        raise fault

    with mock.patch.object(MemoryBackend, "begin", fail), pytest.raises(fault), library.sessions() as session:
        session.execute(RAISE_PRICE)
        session.commit()
    library.write(update(Author).values(name="x"))  # on the same connection of the pool
    assert library.database(select(Book.price).where(Book.id == 2)) == [(20,)]
    assert library.is_right(PRICES)


def test_E17_a_statement_that_was_refused_in_autocommit_mode_is_marked_when_it_is_tried_again(
    library: Library,
) -> None:
    library = Library(library.engine, on_outage="refuse")
    library.fill(PRICES)

    def fail(*_: object) -> None:
        raise CacheUnavailable("it does not answer")

    with library.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        with mock.patch.object(MemoryBackend, "begin", fail), pytest.raises(CacheUnavailable):
            connection.execute(RAISE_PRICE)
        assert library.outcome(PRICES) == "hit"
        connection.execute(RAISE_PRICE)
        assert library.is_right(PRICES)


def test_E18_core_alone_and_autocommit(library: Library) -> None:
    library.fill(PRICES)
    library.write(RAISE_PRICE)
    assert library.is_right(PRICES)
    library.fill(PRICES)
    autocommit = library.engine.execution_options(isolation_level="AUTOCOMMIT")
    with autocommit.connect() as connection:
        connection.execute(update(Book).values(price=5))
        assert library.is_right(PRICES), "committed, though the connection is not given back"
        assert library.outcome(PRICES) == "hit", "and over"


# --- what must stay ------------------------------------------------------------------------------------------


def test_a_point_lookup_survives_writes_to_other_rows_and_lists_of_other_tables_survive_all(
    library: Library,
) -> None:
    library.fill(point(1), AUTHORS, LOANS)
    with library.sessions.begin() as session:
        session.get_one(Book, 2).price = 77
        session.add(Book(id=9, title="new", price=1, author_id=1))
    with library.sessions.begin() as session:
        session.delete(session.get_one(Book, 9))
    assert library.outcome(point(1)) == "hit"
    assert library.outcome(AUTHORS) == "hit"


@pytest.mark.parametrize("database", ["sqlite", "postgresql", "mariadb"])
def test_textual_writes_with_parameters_invalidate_their_table_alone(
    request: pytest.FixtureRequest, database: str
) -> None:
    library = Library(request.getfixturevalue(f"{database}_engine"))
    library.fill(AUTHORS, PRICES)
    library.write(text("UPDATE book SET price = :price WHERE id = :id").bindparams(price=3, id=1))
    assert library.outcome(AUTHORS) == "hit"
    assert library.is_right(PRICES)


def test_clean_tags_hit_inside_a_writing_transaction(library: Library) -> None:
    library.fill(AUTHORS, PRICES)
    with library.sessions() as session:
        session.execute(RAISE_PRICE)
        assert library.outcome(AUTHORS, session) == "hit"
        assert library.outcome(PRICES, session) == "bypass own write"


# --- isolation, outages, choices ----------------------------------------------------------------------------------


def test_reads_of_what_is_not_committed_are_never_filled(mariadb_engine: Engine) -> None:
    library = Library(mariadb_engine)
    dirty = library.engine.execution_options(isolation_level="READ UNCOMMITTED")
    with library.sessions() as writer, library.sessions(bind=dirty) as reader:
        writer.execute(RAISE_PRICE)
        assert library.ask(point(2), reader) == [(2, "book 2", 77)]
        writer.rollback()
    assert library.ask(point(2)) == [(2, "book 2", 20)]


@pytest.mark.parametrize("fault", [Server.kill, Server.pause])
def test_while_the_server_is_away_commits_go_through_and_this_process_asks_the_database(
    sqlite_engine: Engine, private_server: Callable[[str], Server], fault: Callable[[Server], None]
) -> None:
    server = private_server("redis")
    library = Library(sqlite_engine, f"{server.url}?timeout=0.2")
    library.fill(PRICES)
    fault(server)
    library.write(RAISE_PRICE)
    assert library.is_right(PRICES)
    server.resume() if fault is Server.pause else server.start()
    for _ in range(5_000):
        assert library.is_right(PRICES)
        if library.outcome(PRICES) == "hit":
            break
    assert library.is_right(PRICES)


def test_consistency_commit_tells_after_the_commit(library: Library) -> None:
    library = Library(library.engine, consistency="commit")
    library.fill(PRICES, AUTHORS)
    with library.sessions.begin() as session:
        session.execute(RAISE_PRICE)
    assert library.outcome(PRICES) == "stale fill"
    assert library.outcome(AUTHORS) == "hit"


# --- by hand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "named",
    [
        {"tables": ["book"]},
        {"tables": ["main.book"]},
        {"entities": [Book]},
        {"statement": PRICES.execution_options(cache_key=True)},
        {"region": "default"},
        {"everything": True},
    ],
    ids=lambda named: next(iter(named)),
)
def test_invalidate_joined_to_a_transaction(library: Library, named: dict[str, Any]) -> None:
    library.fill(PRICES, AUTHORS)
    for end, after in ((Session.rollback, "hit"), (Session.commit, "stale fill")):
        with library.sessions() as session:
            library.cache.invalidate(**named, session=session)
            assert library.outcome(PRICES) == "hit", "not before the transaction ends"
            end(session)
        assert library.outcome(PRICES) == after
    assert library.outcome(AUTHORS) == ("stale fill" if {"region", "everything"} & set(named) else "hit")
    library.cache.invalidate(**named)
    assert library.outcome(PRICES) == "stale fill"


def test_views_and_triggers_are_declared(library: Library) -> None:
    with library.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE VIEW v_totals AS SELECT author_id, sum(price) AS total FROM book GROUP BY 1"
        )
        connection.exec_driver_sql("CREATE TABLE log (id INTEGER PRIMARY KEY, book_id INTEGER)")
        connection.exec_driver_sql(
            "CREATE TRIGGER log_it AFTER UPDATE ON book BEGIN INSERT INTO log (book_id) VALUES (new.id); END"
        )
    metadata = MetaData()
    view = Table("v_totals", metadata, sa_column("author_id"), sa_column("total"))
    log = Table("log", metadata, sa_column("id"), sa_column("book_id"))
    library.cache.depends("v_totals", on=["book"])
    library.cache.depends("log", on=["book"])
    totals, logged, one = select(view), select(log), select(log).where(log.c.id == 1)
    library.fill(totals, logged, one)
    with library.sessions.begin() as session:
        session.get_one(Book, 1).price = 1000
    for statement in (totals, logged, one):
        assert library.is_right(statement)
        assert library.outcome(statement) == "hit"


# --- transactions that are not what they seem ----------------------------------------------------------------------


def test_a_session_joined_to_a_connection_sees_what_that_has_written(library: Library) -> None:
    library.fill(PRICES)
    with library.engine.connect() as connection:
        connection.execute(RAISE_PRICE)
        session = library.sessions(bind=connection)
        assert (2, 77) in library.ask(PRICES, session)
        session.close()
        connection.rollback()
    assert library.is_right(PRICES)


def test_two_sessions_on_one_connection_of_the_driver() -> None:
    engine = configure_sqlite(create_engine("sqlite://", poolclass=StaticPool))
    library = Library(engine)
    library.fill(PRICES)
    with library.sessions() as writer, library.sessions() as other_session:
        writer.execute(RAISE_PRICE)
        other_session.execute(select(Tag.id))
        other_session.commit()  # and with it what the writer has written
    assert library.is_right(PRICES)
    engine.dispose()


def test_prepared_and_committed_by_somebody_else(postgresql_engine: Engine) -> None:
    library = Library(postgresql_engine)
    library.fill(PRICES)
    name = f"querycache-{uuid.uuid4()}"
    with library.engine.connect() as connection:
        connection.execute(RAISE_PRICE)
        connection.exec_driver_sql(f"PREPARE TRANSACTION '{name}'")
    library.fill(PRICES)
    with library.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql(f"COMMIT PREPARED '{name}'")
    assert library.database(point(2)) == [(2, "book 2", 77)]
    assert library.is_right(PRICES)


def test_reading_in_two_phases_invalidates_nothing(postgresql_engine: Engine) -> None:
    library = Library(postgresql_engine)
    library.fill(PRICES)
    with library.sessions(twophase=True) as session:
        session.execute(text("SELECT 1"))
        session.commit()
    assert library.outcome(PRICES) == "hit"


def test_schemas_are_translated_for_cascades_too(postgresql_engine: Engine) -> None:
    metadata = MetaData(schema="tenant")
    parent = Table("parent", metadata, sa_column("id"))
    child = Table("child", metadata, sa_column("id"), sa_column("parent_id", "tenant.parent.id"))

    class Tenants(DeclarativeBase):
        pass

    class Parent(Tenants):
        __table__ = parent

    engine = postgresql_engine.execution_options(schema_translate_map={"tenant": "tenant_1"})
    library = Library(engine)
    library.write(text("CREATE SCHEMA tenant_1"))
    metadata.create_all(engine)
    library.write(insert(parent).values(id=1), insert(child).values(id=1, parent_id=1))
    library.fill(select(child))
    with library.sessions.begin() as session:
        session.delete(session.get_one(Parent, 1))
    assert library.ask(select(child)) == []


def test_a_failed_executemany_in_autocommit_keeps_some_rows(library: Library) -> None:
    library.fill(PRICES)
    engine = library.engine.execution_options(isolation_level="AUTOCOMMIT")
    rows = [{"id": n, "title": "t", "price": 1, "author_id": 1} for n in (10, 11, 1)]
    with engine.connect() as connection, pytest.raises(exc.IntegrityError):
        connection.execute(insert(Book.__table__), rows)  # type: ignore[arg-type]
    assert library.is_right(PRICES)


# --- E10: the first transactions of a process --------------------------------------------------------------------


def test_E10_two_first_transactions_at_once(mariadb_engine: Engine) -> None:
    """Of two threads one finds out how transactions are isolated; the other must not go ahead meanwhile."""
    library = Library(mariadb_engine)
    other = create_engine(mariadb_engine.url)
    library.cache.attach(other)
    expect, reached, go_on = Transactions.expect_old_views, threading.Event(), threading.Event()

    def slowly(self: Transactions, dialect: Any) -> None:
        if threading.current_thread() is first and not reached.is_set():
            reached.set()
            go_on.wait(10)
        expect(self, dialect)

    first = threading.Thread(target=lambda: Session(other).execute(select(Book.id)).all())
    try:
        with mock.patch.object(Transactions, "expect_old_views", slowly):
            first.start()
            assert reached.wait(10)
            late = sessionmaker(other)
            library.cache.attach(late)
            library.fill(PRICES)
            with late() as old:
                old.execute(select(Book.id)).all()
                library.write(RAISE_PRICE)
                library.ask(PRICES, old)
            assert library.is_right(PRICES)
    finally:
        go_on.set()
        first.join()
        other.dispose()


class EndsInParts(MemoryBackend):
    """Takes phase two as memcached does: one tag after the other, and the witness of all writers last."""

    between: Callable[[], object] = staticmethod(lambda: None)

    def end(self, marks: Mapping[str, Mark]) -> None:
        witness, *tags = marks.items()
        super().end(dict(tags))
        self.between()
        super().end(dict([witness]))


def test_E10_a_snapshot_from_before_a_commit_whose_writer_is_not_done(postgresql_engine: Engine) -> None:
    """The writer's mark was on the witness when the snapshot began, and still is, but its tags are new already."""
    register_backend("tests.ends_in_parts", __name__, "EndsInParts")
    library = Library(postgresql_engine, store={"default": {"backend": "tests.ends_in_parts"}})
    library.fill(point(2))
    with repeatable_read(library) as old:

        def commit(commit: Callable[[Any], None], connection: Any) -> None:
            old.execute(text("SELECT count(*) FROM tag"))  # the snapshot is taken
            commit(connection)

        def ask() -> None:
            if old.in_transaction():
                library.ask(point(2), old)

        with mock.patch.object(EndsInParts, "between", staticmethod(ask)), library.committing(commit):
            library.write(RAISE_PRICE)
    assert library.is_right(point(2)), "filled from an old snapshot"


def test_E10_a_snapshot_from_before_an_invalidation_by_hand(postgresql_engine: Engine) -> None:
    library = Library(postgresql_engine)
    library.fill(AUTHORS)
    with repeatable_read(library) as old:
        old.execute(text("SELECT count(*) FROM tag"))  # the snapshot is taken
        unseen = create_engine(postgresql_engine.url)
        with unseen.begin() as connection:
            connection.execute(RAISE_PRICE)
        unseen.dispose()
        library.cache.invalidate(tables=["book"])
        library.ask(point(2), old)
    assert library.is_right(point(2)), "filled from an old snapshot"
