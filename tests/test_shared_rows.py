"""Rows that many answers have in common: one answer is told by the database, the others know."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest
from dogpile.cache import CacheRegion, make_region
from sqlalchemy import (
    JSON,
    Engine,
    ForeignKey,
    Integer,
    String,
    TypeDecorator,
    create_engine,
    event,
    func,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    immediateload,
    joinedload,
    mapped_column,
    relationship,
    selectinload,
    sessionmaker,
    subqueryload,
    with_loader_criteria,
)
from sqlalchemy.pool import StaticPool
from sqlalchemy.sql import quoted_name

from querycache import QueryCache, analysis, shared_rows, versions
from querycache.frozen import Entry, freeze
from querycache.interceptor import Interceptor
from querycache.ledger import Reading
from querycache.load import Load
from querycache.shared_rows import SharedRows, Vectors


class Base(DeclarativeBase):
    pass


class Writer(Base):
    __tablename__ = "shared_writers"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(2000), default="")
    notes: Mapped[list[Note]] = relationship(back_populates="writer")
    marks: Mapped[list[Mark]] = relationship()


class Note(Base):
    __tablename__ = "shared_notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    page: Mapped[int]
    writer_id: Mapped[int] = mapped_column(ForeignKey(Writer.id))
    topic_id: Mapped[int | None] = mapped_column(ForeignKey("shared_topics.id"))
    writer: Mapped[Writer | None] = relationship(back_populates="notes")
    topic: Mapped[Topic | None] = relationship()


class Mark(Base):
    __tablename__ = "shared_marks"

    note_id: Mapped[int] = mapped_column(ForeignKey(Note.id), primary_key=True)
    writer_id: Mapped[int] = mapped_column(ForeignKey(Writer.id), primary_key=True)


class Topic(Base):
    __tablename__ = "shared_topics"

    id: Mapped[int] = mapped_column(primary_key=True)
    words: Mapped[dict[str, Any]] = mapped_column(JSON)


PAGES = 4


def fill(engine: Engine) -> None:
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with sessionmaker(engine).begin() as session:
        session.add_all([Writer(id=n) for n in range(1, 6)] + [Topic(id=1, words={"a": 1})])
        session.flush()
        session.add_all(
            Note(page=page, writer_id=n, topic_id=1) for page in range(PAGES) for n in range(1, 6)
        )


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    fill(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def asked(engine: Engine) -> Iterator[list[str]]:
    """The tables that the database was asked for."""
    yield from note_asked(engine)


def note_asked(engine: Engine) -> Iterator[list[str]]:
    tables: list[str] = []

    def note(connection: object, cursor: object, sql: str, *rest: object) -> None:
        if sql.startswith("SELECT") and "FROM shared_" in sql:
            tables.append(sql.split("FROM shared_")[1].split()[0])

    event.listen(engine, "before_cursor_execute", note)
    yield tables
    event.remove(engine, "before_cursor_execute", note)


@pytest.fixture
def store() -> CacheRegion:
    return make_region().configure("querycache.memory")


@pytest.fixture
def sessions(engine: Engine, store: CacheRegion) -> Any:
    return attached(engine, store)


def attached(engine: Engine, store: CacheRegion, **arguments: Any) -> Any:
    """A factory of sessions of a process that has a cache of its own, on a store that it shares with others."""
    factory: Any = sessionmaker(engine)
    factory.cache = QueryCache(store, lease=0.1, **arguments).attach(factory)
    return factory


def page(number: int, *options: Any, **execution_options: Any) -> Any:
    return (
        select(Note)
        .where(Note.page == number)
        .order_by(Note.id)
        .options(selectinload(Note.writer), *options)
        .execution_options(**{"cache_key": True, **execution_options})
    )


def names(factory: Any, number: int, **execution_options: Any) -> list[str | None]:
    with factory() as session:
        notes = session.scalars(page(number, **execution_options)).all()
        return [None if note.writer is None else note.writer.name for note in notes]


def rename(factory: Any, name: str, number: int = 3) -> None:
    with factory.begin() as session:
        session.get_one(Writer, number).name = name


def warm_up(factory: Any, **execution_options: Any) -> None:
    for number in range(PAGES):
        names(factory, number, **execution_options)


def test_one_page_asks_for_a_changed_writer_and_the_others_know(sessions: Any, asked: list[str]) -> None:
    warm_up(sessions)
    rename(sessions, "Zoe")
    asked.clear()
    with sessions.cache.recording() as events:
        assert [names(sessions, number)[2] for number in range(PAGES)] == ["Zoe"] * PAGES
    assert asked == ["writers"]
    assert [(each.outcome, each.reason) for each in events] == [("stale", "in part"), ("fill", "")] * PAGES
    with sessions.cache.recording() as events:
        warm_up(sessions)
    assert {each.outcome for each in events} == {"hit"}, "completed with them, they are stored"


def test_what_still_stands_of_a_page_is_known_to_others(
    engine: Engine, store: CacheRegion, sessions: Any, asked: list[str]
) -> None:
    """One process has stored the pages, and another learns from them as it meets them."""
    warm_up(sessions)
    rename(sessions, "Zoe")
    other = attached(engine, store)
    asked.clear()
    assert [names(other, number)[2] for number in range(PAGES)] == ["Zoe"] * PAGES
    assert asked == ["writers"]
    rename(sessions, "Amy", 1)
    rename(sessions, "Max", 2)
    asked.clear()
    assert names(other, 0)[:3] == ["Amy", "Max", "Zoe"]
    with other.begin() as session:
        session.execute(update(Note).where(Note.writer_id > 2, Note.page == 1).values(writer_id=1))
    assert names(other, 1)[:3] == ["Amy", "Max", "Amy"]
    assert asked == ["writers", "notes"]


def test_a_page_that_is_asked_again_knows_its_writers(sessions: Any, asked: list[str]) -> None:
    warm_up(sessions)
    with sessions.begin() as session:
        session.add(Note(page=0, writer_id=2))
    asked.clear()
    assert len(names(sessions, 0)) == 6
    assert asked == ["notes"]


def test_no_page_is_given_a_writer_from_before_a_change(sessions: Any, asked: list[str]) -> None:
    warm_up(sessions)
    for number in range(PAGES):
        rename(sessions, f"Zoe {number}")
        asked.clear()
        assert names(sessions, number)[2] == f"Zoe {number}"
        assert asked == ["writers"]


@pytest.mark.parametrize("bulk", [False, True])
def test_nor_from_before_a_change_by_another_process(
    engine: Engine, store: CacheRegion, sessions: Any, bulk: bool
) -> None:
    warm_up(sessions)
    other = attached(engine, store)
    with other.begin() as session:
        if bulk:
            session.execute(update(Writer).where(Writer.name == "").values(name="Zoe"))
        else:
            session.get_one(Writer, 3).name = "Zoe"
    assert [names(sessions, number)[2] for number in range(PAGES)] == ["Zoe"] * PAGES


def test_a_writer_that_is_not_there_is_known_too(sessions: Any, asked: list[str]) -> None:
    with sessions.begin() as session:
        session.execute(update(Note).where(Note.writer_id == 5).values(writer_id=50))
    warm_up(sessions)
    rename(sessions, "Zoe")
    asked.clear()
    assert [names(sessions, number)[2:] for number in range(PAGES)] == [["Zoe", "", None]] * PAGES
    assert asked == ["writers"]
    with sessions.begin() as session:
        session.add(Writer(id=50, name="Max"))
    assert [names(sessions, number)[2:] for number in range(PAGES)] == [["Zoe", "", "Max"]] * PAGES


def test_what_a_transaction_has_written_is_its_own(sessions: Any, asked: list[str]) -> None:
    """The database is asked by who has written what is asked for, and a rollback leaves no trace."""
    warm_up(sessions)
    rename(sessions, "Zoe")
    names(sessions, 0)
    with sessions() as session:
        session.add(Topic(id=2, words={}))
        session.flush()
        asked.clear()
        assert session.scalars(page(1)).all()[2].writer.name == "Zoe"
        assert asked == []
    with sessions() as session:
        session.get_one(Writer, 3).name = "Amy"
        session.flush()
        assert session.scalars(page(1)).all()[2].writer.name == "Amy"
    assert names(sessions, 1)[2] == "Zoe"


def test_a_refresh_asks_for_all_of_it(sessions: Any, asked: list[str]) -> None:
    warm_up(sessions)
    asked.clear()
    names(sessions, 0, cache_mode="refresh")
    assert asked == ["notes", "writers"]


@pytest.mark.parametrize(
    "by_hand",
    [
        {"everything": True},
        {"region": "default"},
        {"tags": ["pages"]},
        {"tables": ["shared_writers"]},
        {"entities": [Writer]},
        {"statement": page(0)},
    ],
    ids=lambda each: next(iter(each)),
)
def test_what_is_invalid_by_hand_is_asked_again(
    sessions: Any, asked: list[str], by_hand: dict[str, Any]
) -> None:
    """Who says so knows of something that the cache does not: the database was written by somebody else."""
    warm_up(sessions, cache_tags=["pages"])
    warm_up(sessions)
    with sessions() as session:
        session.connection().connection.dbapi_connection.execute("UPDATE shared_writers SET name = 'Zoe'")
        session.connection().connection.dbapi_connection.commit()
    sessions.cache.invalidate(**by_hand)
    tags = {"cache_tags": ["pages"]} if "tags" in by_hand else {}
    assert [names(sessions, number, **tags)[2] for number in range(PAGES)] == ["Zoe"] * PAGES


def test_a_key_of_its_own_shares_with_nobody(sessions: Any, asked: list[str]) -> None:
    for number in range(2):
        names(sessions, number, cache_key=f"page {number}")
    rename(sessions, "Zoe")
    asked.clear()
    for number in range(2):
        assert names(sessions, number, cache_key=f"page {number}")[2] == "Zoe"
    assert asked == ["writers", "writers"]


@pytest.mark.parametrize("of_region", [False, True])
def test_what_expires_is_not_completed_with_what_was_told_long_ago(
    engine: Engine, store: CacheRegion, asked: list[str], of_region: bool
) -> None:
    sessions = attached(engine, store, ttl=100.0 if of_region else None)
    options: dict[str, Any] = {} if of_region else {"cache_ttl": 100}
    warm_up(sessions, **options)
    rename(sessions, "Zoe")
    asked.clear()
    warm_up(sessions, **options)
    assert asked == ["writers"] * PAGES


def test_scopes_share_nothing(engine: Engine, store: CacheRegion, asked: list[str]) -> None:
    tenant = "one"
    sessions = attached(engine, store, scope=lambda session: tenant)
    names(sessions, 0)
    for tenant in ("two", "one"):
        asked.clear()
        names(sessions, 1)
        assert asked == (["notes", "writers"] if tenant == "two" else ["notes"])


def test_criteria_on_writers_share_nothing(sessions: Any) -> None:
    for name in ("", "nobody", ""):
        for number in range(PAGES):
            statement = page(number, with_loader_criteria(Writer, Writer.name == name))
            with sessions() as session:
                notes = session.scalars(statement).all()
                assert [note.writer is None for note in notes] == [name == "nobody"] * 5


@pytest.mark.parametrize(
    "database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.server("postgresql"))]
)
def test_what_could_be_changed_in_place_is_not_shared(
    request: pytest.FixtureRequest, store: CacheRegion, database: str
) -> None:
    """On PostgreSQL the driver gives JSON as dictionaries."""
    engine: Engine = request.getfixturevalue(f"{database}_engine")
    fill(engine)
    sessions = attached(engine, store)

    def look(number: int) -> list[dict[str, Any]]:
        statement = page(number).options(selectinload(Note.topic))
        with sessions() as session:
            notes = session.scalars(statement).all()
            found = [note.topic.words.copy() for note in notes]
            notes[0].topic.words["b"] = 2
            return found

    for number in range(PAGES):
        assert look(number) == [{"a": 1}] * 5
    with sessions.begin() as session:
        session.get_one(Topic, 1).words = {"a": 2}
    for _ in range(2):
        for number in range(PAGES):
            assert look(number) == [{"a": 2}] * 5


@pytest.mark.parametrize(
    "database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.server("postgresql"))]
)
def test_keys_that_the_driver_gives_in_another_form(
    request: pytest.FixtureRequest, store: CacheRegion, database: str
) -> None:
    """UUIDs are text in SQLite: nobody can tell which row is whose before SQLAlchemy has read it."""

    class Owned(DeclarativeBase):
        pass

    class Owner(Owned):
        __tablename__ = "shared_owners"
        id: Mapped[UUID] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(default="")

    class Thing(Owned):
        __tablename__ = "shared_things"
        id: Mapped[int] = mapped_column(primary_key=True)
        owner_id: Mapped[UUID] = mapped_column(ForeignKey(Owner.id))
        owner: Mapped[Owner] = relationship()

    engine: Engine = request.getfixturevalue(f"{database}_engine")
    Owned.metadata.create_all(engine)
    sessions = attached(engine, store)
    with sessions.begin() as session:
        session.add_all(Owner(id=UUID(int=n)) for n in (1, 2))
        session.flush()
        session.add_all(Thing(id=n, owner_id=UUID(int=n % 2 + 1)) for n in range(8))

    def look() -> list[list[str]]:
        found = []
        for number in range(4):
            statement = select(Thing).where(Thing.id.in_([number, number + 1])).order_by(Thing.id)
            statement = statement.options(selectinload(Thing.owner)).execution_options(cache_key=True)
            with sessions() as session:
                found.append([thing.owner.name for thing in session.scalars(statement)])
        return found

    assert look() == [["", ""]] * 4
    with sessions.begin() as session:
        session.get_one(Owner, UUID(int=2)).name = "Zoe"
    asked = note_asked(engine)
    tables = next(asked)
    assert look() == [["", "Zoe"], ["Zoe", ""]] * 2
    assert tables == ["owners"] * (1 if database == "postgresql" else 4)
    asked.close()


def test_keys_of_text_are_followed_by_no_row(store: CacheRegion) -> None:
    class Coded(DeclarativeBase):
        pass

    class Country(Coded):
        __tablename__ = "shared_countries"
        code: Mapped[str] = mapped_column(primary_key=True)
        name: Mapped[str]

    class Town(Coded):
        __tablename__ = "shared_towns"
        id: Mapped[int] = mapped_column(primary_key=True)
        code: Mapped[str] = mapped_column(ForeignKey(Country.code))
        country: Mapped[Country] = relationship()

    engine = create_engine("sqlite://", poolclass=StaticPool)
    Coded.metadata.create_all(engine)
    sessions = attached(engine, store)
    with sessions.begin() as session:
        session.add_all([Country(code="nl", name="Holland"), Town(id=1, code="nl"), Town(id=2, code="nl")])
    for name in ("Holland", "Nederland"):
        with sessions.begin() as session:
            session.get_one(Country, "nl").name = name
        for number in (1, 2):
            statement = select(Town).where(Town.id == number).options(selectinload(Town.country))
            with sessions() as session:
                town = session.scalars(statement.execution_options(cache_key=True)).one()
                assert town.country.name == name
    engine.dispose()


def test_more_keys_than_are_followed(sessions: Any) -> None:
    with sessions.begin() as session:
        session.add_all(Writer(id=n, name="Amy") for n in range(100, 200))
        session.flush()
        session.add_all(Note(page=number, writer_id=n) for n in range(100, 200) for number in (0, 1))
    for name in ("Amy", "Zoe"):
        with sessions.begin() as session:
            session.get_one(Writer, 150).name = name
        assert [names(sessions, number)[55] for number in (0, 1)] == [name] * 2


def test_large_rows_are_not_remembered(sessions: Any, asked: list[str]) -> None:
    for number in range(1, 6):
        rename(sessions, "Z" * 1500, number)
    warm_up(sessions)
    rename(sessions, "Y" * 1500)
    asked.clear()
    warm_up(sessions)
    assert asked == ["writers"] * PAGES


def test_it_starts_anew_when_there_are_many(
    sessions: Any, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_rows, "_MOST_ROWS", 7)
    known = sessions.cache._regions.get().shared_rows
    for number in range(6):
        names(sessions, number % PAGES, cache_tags=[str(number)])
        assert 5 <= sum(len(each.rows) for each in known._known.values()) <= 12
    warm_up(sessions)
    rename(sessions, "Zoe")
    assert [names(sessions, number)[2] for number in range(PAGES)] == ["Zoe"] * PAGES


def test_writers_of_different_databases_are_not_mixed(tmp_path: Path, store: CacheRegion) -> None:
    engines = [create_engine(f"sqlite:///{tmp_path / name}.db") for name in ("notes", "one", "two")]
    for engine in engines:
        fill(engine)
    notes, *others = engines
    for name, engine in zip(("Amy", "Zoe"), others, strict=True):
        with engine.begin() as connection:
            connection.execute(update(Writer).values(name=name))
    makers = [sessionmaker(binds={Note: notes, Writer: each}) for each in others]
    cache = QueryCache(store)
    for maker in makers:
        cache.attach(maker)
    for number in range(PAGES):
        assert [set(names(maker, number)) for maker in makers] == [{"Amy"}, {"Zoe"}]
    for engine in engines:
        engine.dispose()


def test_writers_of_different_schemas_are_not_mixed(store: CacheRegion) -> None:
    class Elsewhere(DeclarativeBase):
        pass

    class Author(Elsewhere):
        __tablename__ = "authors"
        __table_args__ = {"schema": "theirs"}
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    class Article(Elsewhere):
        __tablename__ = "articles"
        id: Mapped[int] = mapped_column(primary_key=True)
        author_id: Mapped[int] = mapped_column(ForeignKey("theirs.authors.id"))
        author: Mapped[Author] = relationship()

    engine = create_engine("sqlite://", poolclass=StaticPool)
    cache, articles = QueryCache(store), select(Article).options(selectinload(Article.author))
    with engine.connect() as connection:
        for schema in ("one", "two"):
            connection.exec_driver_sql(f"ATTACH DATABASE ':memory:' AS {schema}")
    makers = {}
    for schema in ("one", "two"):
        translated = engine.execution_options(schema_translate_map={"theirs": schema})
        Elsewhere.metadata.create_all(translated)
        makers[schema] = sessionmaker(translated)
        cache.attach(makers[schema])
        with makers[schema].begin() as session:
            session.add(Author(id=1, name=schema))
    with makers["one"].begin() as session:
        session.add_all(Article(id=n, author_id=1) for n in range(1, 4))
    for number in range(1, 4):
        for schema, maker in makers.items():
            with maker() as session:
                found = session.scalars(
                    articles.where(Article.id == number).execution_options(cache_key=True)
                ).one()
                assert found.author.name == schema
    engine.dispose()


def test_columns_of_another_kind_replace_what_was_known() -> None:
    """As when a column is given another type, while the versions stand."""
    known, both = shared_rows.SharedRows(), shared_rows.Vectors((), {1: 7, 2: 7})
    one = shared_rows.Vectors((), {1: 7})
    for code, values, vectors in (
        (23, [(1, 5), (2, 6)], both),
        (25, [(1, "5"), (2, "6")], both),
        (23, [(1, 5), (2, 6)], one),
    ):
        frozen = freeze([("id", 23), ("value", code)], values, len(values))
        known.learn(b"family", [1, 2], vectors, frozen, 0)
    assert known.find(b"family", both) is None
    found = known.find(b"family", one)
    assert found is not None and (found.unpack(), found.rowcount) == ([(1, 5)], 1)
    assert found.columns == [("id", 23), ("value", 23)]


def key_place(statement: Any, **given: Any) -> int | None:
    """What is seen in a statement that a Session executes."""
    found: list[Any] = []
    engine = create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(engine)

    def look(connection: object, cursor: object, sql: str, given: object, context: Any, many: object) -> None:
        found.append(analysis.analyse(context.compiled).key_place)

    event.listen(engine, "before_cursor_execute", look)
    with Session(engine) as session:
        session.execute(statement, given)
    engine.dispose()
    [only] = found
    assert only is None or isinstance(only, int)
    return only


W = aliased(Writer)


@pytest.mark.parametrize(
    ("statement", "place"),
    [
        (select(Writer).where(Writer.id == 1), 0),
        (select(Writer.name, Writer.id).where(Writer.id == 1), 1),
        (select(Writer).where(Writer.id.in_([1, 2])), 0),
        (select(W).where(W.id == 1), None),
        (select(Writer.name).where(Writer.id == 1), None),
        (select(Writer).where(Writer.id > 1), None),
        (select(Writer).where(Writer.id.not_in([1])), None),
        (select(Writer).where(Writer.id == 1, Writer.id < 5), None),
        (select(Writer).where(Writer.id == 1, Writer.name.is_(None)), None),
        (select(Mark).where(Mark.writer_id == 1), None),
        (select(Writer).where(Writer.name == "x"), None),
        (select(Note).where(Note.writer_id == 1), None),
        (select(Writer).where(Writer.id == 1).limit(1), None),
        (select(Writer).where(Writer.id == 1).offset(1), None),
        (select(Writer).where(Writer.id == 1).distinct(), None),
        (select(Writer.id).where(Writer.id.in_([1])).group_by(Writer.id), None),
        (select(Writer.id).where(Writer.id == 1).add_cte(select(Note.id).cte()), None),
        (select(Writer.id, literal_column("7")).where(Writer.id == 1), None),
        (select(Writer.id, func.abs(Writer.id)).where(Writer.id == 1), None),
        (select(Writer).where(Writer.id == 1).prefix_with("ALL"), None),
        (select(Writer, (Writer.id + 7).label("n")).where(Writer.id == 1), None),
        (select(Writer).where(Writer.id == select(func.max(Note.writer_id)).scalar_subquery()), None),
        (select(Writer).where(text("shared_writers.id = 1")), None),
        (select(Writer).where(Writer.id == 1).union(select(Writer).where(Writer.id == 2)), None),
    ],
    ids=lambda each: "" if each is None or isinstance(each, int) else str(each).replace("\n", " ")[-60:],
)
def test_what_asks_by_key(statement: Any, place: int | None) -> None:
    assert key_place(statement) == place


LOADERS = {
    "selectinload": lambda: selectinload(Note.writer),
    "immediateload": lambda: immediateload(Note.writer),
    "subqueryload": lambda: subqueryload(Note.writer),
    "joinedload": lambda: joinedload(Note.writer),
    "and back": lambda: selectinload(Note.writer).selectinload(Writer.notes),
    "joined within": lambda: selectinload(Note.writer).joinedload(Writer.notes),
    "some columns": lambda: selectinload(Note.writer).load_only(Writer.id),
}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_whatever_completes_them_answers_are_the_databases(
    engine: Engine, store: CacheRegion, loader: Callable[[], Any]
) -> None:
    """Two processes write and read at random."""
    chance = random.Random(7)
    processes = [attached(engine, store) for _ in range(2)]
    plain = sessionmaker(engine)

    def look(factory: Any, number: int) -> object:
        statement = select(Note).where(Note.page == number).order_by(Note.id).options(loader())
        with factory() as session:
            return [
                (note.id, note.writer and (note.writer.id, note.writer.name, len(note.writer.notes)))
                for note in session.scalars(statement.execution_options(cache_key=True)).unique()
            ]

    for step in range(200):
        factory = chance.choice(processes)
        what = chance.random()
        with factory.begin() as session:
            if what < 0.15:
                session.get_one(Writer, chance.randint(1, 4)).name = f"name {step}"
            elif what < 0.2:
                session.add(Note(page=chance.randrange(PAGES), writer_id=chance.randint(1, 6)))
            elif what < 0.25:
                session.get_one(Note, chance.randint(1, 20)).writer_id = chance.randint(1, 6)
            elif what < 0.3:
                gone = session.get(Writer, 5)
                if gone is None:
                    session.add(Writer(id=5, name=f"back {step}"))
                else:
                    session.execute(text("DELETE FROM shared_writers WHERE id = 5"))
        number = chance.randrange(PAGES)
        assert look(chance.choice(processes), number) == look(plain, number), step


def when_asked_for_notes(engine: Engine, when: str, act: Callable[[], object]) -> None:
    """Do something once, just before or just after the database is asked for notes."""

    done: list[object] = []

    def listen(connection: object, cursor: object, sql: str, *rest: object) -> None:
        if "FROM shared_notes" in sql and not done:
            done.append(sql)
            act()

    event.listen(engine, when, listen)


def test_writers_are_no_older_than_their_notes(tmp_path: Path, store: CacheRegion) -> None:
    """What the database is asked for sees a commit that came after the versions were read, so the rest must, too."""
    engine = create_engine(f"sqlite:///{tmp_path / 'notes.db'}")
    fill(engine)
    sessions = attached(engine, store)
    warm_up(sessions)
    with sessions.begin() as session:
        session.add(Note(page=0, writer_id=2))
    when_asked_for_notes(engine, "before_cursor_execute", lambda: rename(sessions, "Zoe"))
    assert names(sessions, 0)[2] == "Zoe"
    assert names(sessions, 0)[2] == "Zoe"
    engine.dispose()


@pytest.mark.server("postgresql")
def test_writers_are_of_the_snapshot_of_their_notes(postgresql_engine: Engine, store: CacheRegion) -> None:
    fill(postgresql_engine)
    sessions = attached(postgresql_engine, store)
    snapshots = postgresql_engine.execution_options(isolation_level="REPEATABLE READ")
    readers = sessionmaker(snapshots)
    sessions.cache.attach(readers)
    warm_up(sessions)
    with sessions.begin() as session:
        session.add(Note(page=0, writer_id=2))

    def meanwhile() -> None:
        rename(sessions, "Zoe")
        names(sessions, 1)

    when_asked_for_notes(snapshots, "after_cursor_execute", meanwhile)
    assert names(readers, 0)[2] == ""
    assert names(readers, 0)[2] == "Zoe"


@pytest.mark.server("postgresql")
@pytest.mark.server("redis")
def test_a_snapshot_is_shown_as_it_is(postgresql_engine: Engine, redis_store_url: str) -> None:
    fill(postgresql_engine)
    engine = postgresql_engine.execution_options(isolation_level="REPEATABLE READ")
    readers, writers = sessionmaker(engine), sessionmaker(postgresql_engine)
    QueryCache(redis_store_url, lease=0.1).attach(readers).attach(writers)
    warm_up(writers)
    rename(writers, "Amy")
    warm_up(writers)
    with readers() as session:
        session.scalars(select(Topic)).all()
        rename(writers, "Zoe")
        warm_up(writers)
        assert session.scalars(page(1, cache_mode="use")).all()[2].writer.name == "Amy"
        session.expunge_all()
        # asked of the database, and so is what completes it
        statement = page(1).where(Note.id > 0)
        assert session.scalars(statement).all()[2].writer.name == "Amy"


@pytest.mark.parametrize("loader", [selectinload, immediateload])
def test_keys_that_are_followed_by_no_row(store: CacheRegion, loader: Any) -> None:
    """A key that is none of its column's type, as where the foreign key is a NUMERIC of the database."""

    class Numbered(DeclarativeBase):
        pass

    class Inexact(TypeDecorator[float]):
        impl = Integer
        cache_ok = True

        def process_result_value(self, value: Any, dialect: Any) -> Any:
            return None if value is None else float(value)

    class Person(Numbered):
        __tablename__ = "shared_people"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Letter(Numbered):
        __tablename__ = "shared_letters"
        id: Mapped[int] = mapped_column(primary_key=True)
        person_id: Mapped[float] = mapped_column(Inexact, ForeignKey(Person.id))
        person: Mapped[Person | None] = relationship()

    engine = create_engine("sqlite://", poolclass=StaticPool)
    Numbered.metadata.create_all(engine)
    processes = [attached(engine, store) for _ in range(2)]
    with processes[0].begin() as session:
        session.add_all([Person(id=1), Person(id=2), *(Letter(id=n, person_id=n) for n in (1, 2, 77))])
    for number in (77, 1, 2, 77):
        for sessions in processes:
            statement = select(Letter).where(Letter.id == number).options(loader(Letter.person))
            with sessions() as session:
                letter = session.scalars(statement.execution_options(cache_key=True)).one()
                assert (letter.person and letter.person.id) == (number if number < 3 else None)
    engine.dispose()


def begins_by_hand(path: Path) -> Engine:
    """SQLite whose transactions have snapshots: the recipe of SQLAlchemy's documentation, in WAL mode."""
    engine = create_engine(f"sqlite:///{path / 'wal.db'}")

    def connect(connection: Any, record: object) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")

    event.listen(engine, "connect", connect)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


def test_writers_are_of_the_snapshot_of_their_notes_in_sqlite(tmp_path: Path, store: CacheRegion) -> None:
    engine = begins_by_hand(tmp_path)
    fill(engine)
    sessions = attached(engine, store)
    warm_up(sessions)
    with sessions.begin() as session:
        session.add(Note(page=0, writer_id=2))

    def meanwhile() -> None:
        rename(sessions, "Zoe")
        names(sessions, 1)

    when_asked_for_notes(engine, "after_cursor_execute", meanwhile)
    with sessions() as session:
        found = session.scalars(page(0)).all()[2].writer
        assert found.name == session.scalar(text("SELECT name FROM shared_writers WHERE id = 3"))
    engine.dispose()


def test_what_was_kept_is_of_the_snapshot_of_the_rest_in_sqlite(
    tmp_path: Path, store: CacheRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = begins_by_hand(tmp_path)
    fill(engine)
    sessions = attached(engine, store)
    warm_up(sessions)
    rename(sessions, "Zoe")
    known_rows, done = Interceptor._known_rows, []

    def meanwhile(*given: Any) -> Any:
        if not done:
            done.append(1)
            with sessions.begin() as session:
                session.get_one(Writer, 3).name = "Amy"
                session.get_one(Note, 3).page = 30
        return known_rows(*given)

    monkeypatch.setattr(Interceptor, "_known_rows", meanwhile)
    with sessions() as session:
        kept = [note.id for note in session.scalars(page(0))]
        assert kept == session.scalars(text("SELECT id FROM shared_notes WHERE page = 0 ORDER BY id")).all()
    engine.dispose()


@pytest.mark.server("postgresql")
def test_what_completes_known_writers_is_of_their_time(
    engine: Engine, postgresql_engine: Engine, store: CacheRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Notes are elsewhere, so the snapshot of writers begins with what completes them."""
    Base.metadata.create_all(postgresql_engine)
    snapshots = postgresql_engine.execution_options(isolation_level="REPEATABLE READ")
    sessions = sessionmaker(binds={Note: engine, Writer: snapshots, Mark: snapshots})
    plain = sessionmaker(binds={Note: engine, Writer: postgresql_engine, Mark: postgresql_engine})
    QueryCache(store, lease=0.1).attach(sessions).attach(plain)
    with postgresql_engine.begin() as connection:
        connection.execute(text("ALTER TABLE shared_marks DROP CONSTRAINT shared_marks_note_id_fkey"))
        connection.execute(text("INSERT INTO shared_writers SELECT n, '' FROM generate_series(1, 5) n"))
    statement = page(0).options(selectinload(Note.writer).selectinload(Writer.marks))
    with sessions() as session:
        session.scalars(statement).all()
    with sessions() as session:
        session.scalars(statement.where(Note.id > 0)).all()
    find, done = SharedRows.find, []

    def meanwhile(self: SharedRows, *given: Any) -> Any:
        found = find(self, *given)
        if found is not None and not done:
            done.append(1)
            with plain.begin() as session:
                session.get_one(Writer, 3).name = "Zoe"
                session.add(Mark(note_id=1, writer_id=3))
        return found

    monkeypatch.setattr(SharedRows, "find", meanwhile)
    with sessions() as session:
        writer = (
            session.scalars(page(1).options(selectinload(Note.writer).selectinload(Writer.marks)))
            .all()[2]
            .writer
        )
        assert writer is not None and (writer.name == "Zoe") == bool(writer.marks)


def test_writers_on_a_connection_that_was_given_for_them(tmp_path: Path, store: CacheRegion) -> None:
    engines = [create_engine(f"sqlite:///{tmp_path / name}.db") for name in ("notes", "writers")]
    for each in engines:
        fill(each)
    given: list[Any] = []

    class Bound(Session):
        def get_bind(self, mapper: Any = None, **arguments: Any) -> Any:
            if mapper is not None and mapper.class_ is Writer:
                return given[0] if given else engines[1]
            return engines[0]

    sessions = sessionmaker(class_=Bound)
    QueryCache(store).attach(sessions)
    for number in (0, 1):
        assert names(sessions, number)[2] == ""
    with engines[1].connect() as connection:
        given.append(connection)
        connection.execute(update(Writer).values(name="mine"))
        assert [names(sessions, number)[2] for number in (2, 0)] == ["mine", "mine"]
        connection.rollback()
        given.clear()
    assert names(sessions, 0)[2] == ""
    for each in engines:
        each.dispose()


@pytest.mark.parametrize("known", [True, False], ids=["of the entry", "of other answers"])
def test_writers_on_a_snapshot_that_was_given_for_them(
    postgresql_engine: Engine, store: CacheRegion, known: bool
) -> None:
    fill(postgresql_engine)
    notes = create_engine(postgresql_engine.url)
    given: list[Any] = []

    class Bound(Session):
        def get_bind(self, mapper: Any = None, **arguments: Any) -> Any:
            return given[0] if given and mapper is not None and mapper.class_ is Writer else notes

    sessions: Any = sessionmaker(class_=Bound)
    sessions.cache = QueryCache(store, lease=0.1).attach(sessions)
    sessions.cache.attach(postgresql_engine)
    warm_up(sessions)
    with postgresql_engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        connection.execute(select(Writer.id))
        rename(sessions, "Zoe")
        warm_up(sessions)
        if not known:
            with sessions.begin() as session:
                session.add(Note(page=0, writer_id=2))
        given.append(connection)
        assert names(sessions, 0)[2] == ""
        given.clear()
    assert names(sessions, 0)[2] == "Zoe"
    notes.dispose()


def test_what_completes_after_the_database_was_asked_is_no_older(engine: Engine, store: CacheRegion) -> None:
    """The topic is asked for first, and while it is, both it and a writer change."""
    sessions, other = attached(engine, store), attached(engine, store)
    statement = page(0, selectinload(Note.topic))

    def look(session: Session) -> tuple[Any, str]:
        note = session.scalars(statement).all()[2]
        assert note.topic is not None and note.writer is not None
        return note.topic.words["a"], note.writer.name

    def change(number: int, name: str) -> None:
        with other.begin() as session:
            session.get_one(Topic, 1).words = {"a": number}
            session.get_one(Writer, 3).name = name

    def interfere(connection: Any, cursor: object, sql: str, *rest: object) -> None:
        if "FROM shared_topics" in sql and todo:
            change(*todo.pop())

    todo: list[tuple[int, str]] = []
    with sessions() as session:
        assert look(session) == (1, "")
    with other.begin() as session:
        session.get_one(Topic, 1).words = {"a": 2}
    event.listen(engine, "before_cursor_execute", interfere)
    todo.append((3, "Zoe"))
    with sessions() as session:
        assert look(session) == (3, "Zoe")
    event.remove(engine, "before_cursor_execute", interfere)


def test_where_commits_are_not_marked_the_database_is_asked(
    engine: Engine, store: CacheRegion, asked: list[str]
) -> None:
    """A commit may be seen in the notes then before anybody is told of the writers."""
    sessions = attached(engine, store, consistency="commit")
    warm_up(sessions)
    with sessions.begin() as session:
        session.add(Note(page=0, writer_id=2))
    asked.clear()
    names(sessions, 0)
    assert asked == ["notes", "writers"]


def test_once_versions_were_read_again_nothing_of_the_entry_is_used() -> None:
    """It is of the time of the first reading, and what SQLAlchemy asks later is to be no older than what it asked before."""

    def read(*tags: str) -> Reading:
        return Reading(tags, (versions.fresh(),) * len(tags), None, False)

    frozen = freeze([("id", None)], [(1,)], -1)
    region = SimpleNamespace(tag_keys=tuple, observe=lambda keys: read(*keys))
    request: Any = SimpleNamespace(region=region)
    asked: Any = SimpleNamespace(mark=b"mark")
    load = Load(request, read("known"), set(), 0, Entry(0.0, frozen, {b"mark": frozen}))
    load.observe(["known"])
    assert load.find(asked) is frozen
    load.observe(["another"])
    assert load.find(asked) is None


class _Swapped(TypeDecorator[int]):
    """Ids that are stored so that nobody can guess the next."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: object) -> int | None:
        return None if value is None else value ^ 1

    process_result_value = process_bind_param


class _OwnInteger(Integer):
    cache_ok = True

    def bind_processor(self, dialect: object) -> Any:
        return lambda value: None if value is None else value ^ 1

    def result_processor(self, dialect: object, coltype: object) -> Any:
        return self.bind_processor(dialect)


@pytest.mark.parametrize("kind", [Integer().with_variant(_Swapped(), "sqlite"), _OwnInteger()], ids=repr)
def test_keys_that_a_type_maps_to_others(store: CacheRegion, kind: Any) -> None:
    """The rows have them as they are in the database, the parameters as the application knows them."""

    class Own(DeclarativeBase):
        pass

    class Author(Own):
        __tablename__ = "mapped_authors"

        id: Mapped[int] = mapped_column(kind, primary_key=True, autoincrement=False)
        name: Mapped[str]

    class Text(Own):
        __tablename__ = "mapped_texts"

        id: Mapped[int] = mapped_column(primary_key=True)
        page: Mapped[int]
        author_id: Mapped[int] = mapped_column(kind, ForeignKey(Author.id))
        author: Mapped[Author] = relationship()

    engine = create_engine("sqlite://", poolclass=StaticPool)
    Own.metadata.create_all(engine)
    sessions = attached(engine, store)
    with sessions.begin() as session:
        session.add_all([Author(id=2, name="two"), Author(id=3, name="three")])
        session.flush()
        session.add_all(
            Text(page=page, author_id=author) for page, author in ((0, 2), (0, 3), (1, 2), (2, 3))
        )
    statement = select(Text).options(selectinload(Text.author)).execution_options(cache_key=True)
    for _ in range(2):
        for number, expected in ((0, ["two", "three"]), (1, ["two"]), (2, ["three"])):
            with sessions() as session:
                texts = session.scalars(statement.where(Text.page == number).order_by(Text.id))
                assert [text.author and text.author.name for text in texts] == expected
    engine.dispose()


def test_schemas_of_quoted_names(store: CacheRegion) -> None:
    class Own(DeclarativeBase):
        pass

    class Author(Own):
        __tablename__ = "quoted_authors"
        __table_args__ = {"schema": "theirs"}

        id: Mapped[int] = mapped_column(primary_key=True)

    class Text(Own):
        __tablename__ = "quoted_texts"
        __table_args__ = {"schema": "theirs"}

        id: Mapped[int] = mapped_column(primary_key=True)
        author_id: Mapped[int] = mapped_column(ForeignKey(Author.id))
        author: Mapped[Author] = relationship()

    engine = create_engine("sqlite://", poolclass=StaticPool)
    with engine.connect() as connection:
        connection.exec_driver_sql("ATTACH DATABASE ':memory:' AS own")
    translated = engine.execution_options(schema_translate_map={"theirs": quoted_name("own", True)})
    Own.metadata.create_all(translated)
    sessions = attached(translated, store)
    with sessions.begin() as session:
        session.add(Author(id=1))
        session.flush()
        session.add(Text(id=1, author_id=1))
    statement = select(Text).options(selectinload(Text.author)).execution_options(cache_key=True)
    for _ in range(2):
        with sessions() as session:
            assert session.scalars(statement).one().author.id == 1
    engine.dispose()


@pytest.mark.parametrize(
    "database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.server("postgresql"))]
)
def test_a_snapshot_is_not_completed_with_what_was_written_since_it_was_answered(
    request: pytest.FixtureRequest, store: CacheRegion, tmp_path: Path, database: str
) -> None:
    """The writer of a note has moved to another topic, of which the entry knows nothing; both change meanwhile."""

    class Own(DeclarativeBase):
        pass

    class Company(Own):
        __tablename__ = "moment_companies"

        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    class Author(Own):
        __tablename__ = "moment_authors"

        id: Mapped[int] = mapped_column(primary_key=True)
        company_id: Mapped[int] = mapped_column(ForeignKey(Company.id))
        company: Mapped[Company] = relationship()

    class Text(Own):
        __tablename__ = "moment_texts"

        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str]
        author_id: Mapped[int] = mapped_column(ForeignKey(Author.id))
        author: Mapped[Author] = relationship()

    if database == "sqlite":
        engine = create_engine(f"sqlite:///{tmp_path}/moments.db")

        @event.listens_for(engine, "connect")
        def own_transactions(connection: Any, record: object) -> None:
            connection.isolation_level = None
            connection.execute("PRAGMA journal_mode=WAL")

        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
        readers = engine
    else:
        engine = request.getfixturevalue("postgresql_engine")
        readers = engine.execution_options(isolation_level="REPEATABLE READ")
    Own.metadata.create_all(engine)
    writing, reading = sessionmaker(engine), sessionmaker(readers)
    QueryCache(store, lease=0.1).attach(writing).attach(reading)
    with writing.begin() as session:
        session.add_all([Company(id=1, name="old"), Company(id=2, name="old")])
        session.flush()
        session.add_all([Author(id=1, company_id=1), Author(id=2, company_id=2)])
        session.flush()
        session.add_all(Text(id=n, title="old", author_id=max(1, n - 1)) for n in (1, 2, 3))

    def look(sessions: Any, number: int) -> tuple[str, str]:
        loads = selectinload(Text.author).selectinload(Author.company)
        statement = select(Text).where(Text.id == number).options(loads).execution_options(cache_key=True)
        with sessions() as session:
            text = session.scalars(statement).one()
            return text.title, text.author.company.name

    for number in (1, 2, 3):
        look(writing, number)
    with writing.begin() as session:
        session.get_one(Author, 1).company_id = 2
    look(writing, 2)
    loading = True

    @event.listens_for(Author, "load")
    def meanwhile(author: Author, context: object) -> None:
        nonlocal loading
        if loading and author.id == 1:
            loading = False
            with writing.begin() as session:
                session.get_one(Text, 1).title = "new"
                session.get_one(Company, 2).name = "new"
            look(writing, 3)  # which others know now

    title, name = look(reading, 1)
    assert title == name
    Own.metadata.drop_all(engine)


def _learned(rows: list[tuple[object, ...]], keys: list[int]) -> SharedRows:
    known = SharedRows()
    vectors = Vectors((), dict.fromkeys(keys, 1))
    known.learn(b"family", keys, vectors, freeze([("id", None), ("name", None)], rows, -1), 0)
    return known


def test_a_large_row_among_small_ones_is_not_remembered() -> None:
    small = [(number, "x") for number in range(60)]
    keys = list(range(60))
    assert _learned(small, keys).has(b"family", keys)
    assert not _learned([*small, (60, "x" * 20_000)], [*keys, 60]).has(b"family", [60])


def test_a_key_that_was_told_twice_is_not_remembered() -> None:
    assert _learned([(1, "one"), (2, "two")], [1, 2]).has(b"family", [1, 2])
    assert not _learned([(1, "one"), (1, "another")], [1, 2]).has(b"family", [1])


def test_what_is_replayed_depends_on_its_own_tags_alone() -> None:
    """Whatever else has changed is no reason to give an answer up."""
    reading = Reading(("a", "b", "c"), (1, 2, 3), None, stale=False, fallen=frozenset("bc"))
    load = Load(cast("Any", None), reading, set(), 0)
    assert load.not_replayed(reading) == set("abc")
    load.borrowed.add("c")
    assert load.not_replayed(reading) == set("ab")
    load.entry = cast(
        "Any", "what was stored"
    )  # of which a statement has fallen, and is taken from other answers
    assert load.not_replayed(reading) == set("b")
    load.found, load.reading = reading, reading.union(Reading(("d",), (4,), None, stale=False))
    assert load.not_replayed(load.reading) == set("bd")
