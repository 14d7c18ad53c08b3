"""The classic recipe: a query found again by its string."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import JSON, Engine, ForeignKey, create_engine, event, func, select
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    joinedload,
    mapped_column,
    relationship,
    selectinload,
    sessionmaker,
)

from querycache import ConfigurationError, QueryCache
from querycache.legacy import CachingQuery


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    settings: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    items: Mapped[list[Item]] = relationship(order_by="Item.id")


class Item(Base):
    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    user_id: Mapped[int | None] = mapped_column(ForeignKey(User.id))


class Team(Base):
    """Has the columns that User has, by name and type."""

    __tablename__ = "teams"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    settings: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)


class Place(Base):
    __tablename__ = "places"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "place"}


class City(Place):
    __mapper_args__ = {"polymorphic_identity": "city"}


class Statements(list[str]):
    """The SQL that an engine was given."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        event.listen(engine, "before_cursor_execute", lambda *args: self.append(args[2]))

    def take(self) -> int:
        """How many there were since the last call."""
        count = len(self)
        self.clear()
        return count


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        for number in range(1, 5):
            session.add(User(name=f"u{number}", settings={"n": number}, items=[Item(name=f"i{number}")]))
        session.add_all([Team(name="t1"), Place(kind="place"), City(kind="city")])
        session.commit()
    yield engine
    engine.dispose()


@pytest.fixture
def cache() -> QueryCache:
    return QueryCache()


@pytest.fixture
def factory(engine: Engine, cache: QueryCache) -> Any:
    factory = sessionmaker(engine, query_cls=CachingQuery)
    cache.attach(factory)
    return factory


@pytest.fixture
def statements(engine: Engine) -> Statements:
    return Statements(engine)


def names(users: Any) -> list[str]:
    return [user.name for user in users]


def fill(factory: Any) -> list[User]:
    with factory() as session:
        query = session.query(User).with_cache_key("u2andu3").filter(User.name.in_(["u2", "u3"]))
        users: list[User] = query.order_by(User.id).all()
    return users


def test_a_new_session_finds_the_result_by_the_key_alone(factory: Any, statements: Statements) -> None:
    first = fill(factory)
    assert names(first) == ["u2", "u3"]
    statements.take()
    with factory() as session:
        again = session.query(User).with_cache_key("u2andu3").all()
        assert names(again) == ["u2", "u3"]
        assert statements.take() == 0
        assert all(user in session for user in again)
        assert not {id(user) for user in first} & {id(user) for user in again}


def test_a_session_gets_copies_of_its_own(factory: Any) -> None:
    fill(factory)
    with factory() as one, factory() as other:
        mine = one.query(User).with_cache_key("u2andu3").all()
        mine[0].name = "changed"
        mine[0].settings["n"] = "changed"
        theirs = other.query(User).with_cache_key("u2andu3").all()
        assert (theirs[0].name, theirs[0].settings) == ("u2", {"n": 2})
        with factory() as third:
            assert third.query(User).with_cache_key("u2andu3").first().settings == {"n": 2}


def test_objects_in_the_session_stay_what_they_are(factory: Any) -> None:
    fill(factory)
    with factory(autoflush=False) as session:
        user = session.get(User, 2)
        user.name = "unflushed"
        found = session.query(User).with_cache_key("u2andu3").all()
        assert found[0] is user
        assert user.name == "unflushed" and user in session.dirty


def test_eager_loads_come_along(factory: Any, statements: Statements) -> None:
    for key, option in {"selectin": selectinload(User.items), "joined": joinedload(User.items)}.items():
        with factory() as session:
            session.query(User).with_cache_key(key).filter(User.id == 2).options(option).all()
        statements.take()
        with factory() as session:
            (user,) = session.query(User).options(option).with_cache_key(key).all()
            assert names(user.items) == ["i2"]
        assert statements.take() == 0


def test_an_empty_result_is_a_result(factory: Any, statements: Statements) -> None:
    with factory() as session:
        assert session.query(User).filter(User.id == 99).with_cache_key("nobody").all() == []
    statements.take()
    with factory() as session:
        assert session.query(User).with_cache_key("nobody").all() == []
    assert statements.take() == 0


def test_without_a_key_it_is_a_query_like_any_other(factory: Any, cache: QueryCache) -> None:
    with cache.recording() as events, factory() as session:
        assert session.query(User).count() == 4
        assert names(session.query(User).filter(User.id < 3).order_by(User.id)) == ["u1", "u2"]
    assert events == []


def test_invalidation_by_key(factory: Any, cache: QueryCache) -> None:
    fill(factory)
    cache.invalidate(key="u2andu3")
    with factory() as session:
        assert len(session.query(User).with_cache_key("u2andu3").all()) == 4


@pytest.mark.parametrize(
    ("stored", "asked"), [(User, Team), (Place, City), (User, func.count()), (User.id, Team.id)]
)
def test_rows_are_never_read_as_what_they_are_not(factory: Any, stored: Any, asked: Any) -> None:
    # by select(), which does not put the name of the table before that of the column
    options = {"cache_key": "shared", "cache_exact": True}
    with factory() as session:
        session.scalars(select(stored).execution_options(**options)).all()
    with factory() as session:
        with pytest.warns(RuntimeWarning, match="'shared' does not have the columns"):
            found = session.scalars(select(asked).execution_options(**options)).all()
        assert found == session.scalars(select(asked)).all()


def test_what_replaced_a_result_that_did_not_fit_is_stored(factory: Any, cache: QueryCache) -> None:
    fill(factory)
    with factory() as session, pytest.warns(RuntimeWarning):
        session.query(Item).with_cache_key("u2andu3").all()
    with cache.recording() as events, factory() as session:
        assert len(session.query(Item).with_cache_key("u2andu3").all()) == 4
    assert [each.outcome for each in events] == ["hit"]


def test_counts_and_gets_under_a_key_are_the_right_ones(factory: Any) -> None:
    fill(factory)
    for _ in range(2):
        with factory() as session:
            query = session.query(User).with_cache_key("u2andu3")
            assert query.filter(User.id > 1).count() == 3
            with pytest.warns(DeprecationWarning, match="Query.get"):
                assert query.get(4).name == "u4"
                assert query.get(1).name == "u1"
            assert query.with_entities(func.count(User.id)).with_cache_key("how many").scalar() == 4
            assert names(query) == ["u2", "u3"]


def test_a_session_without_a_cache_is_an_error(engine: Engine, factory: Any, cache: QueryCache) -> None:
    bare = Session(engine, query_cls=CachingQuery)
    with pytest.raises(ConfigurationError, match=r"'k'.*no cache is attached.*QueryCache.attach"):
        bare.query(User).with_cache_key("k")  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match="no cache is attached"):
        CachingQuery(User).with_cache_key("k").with_session(bare)
    with factory() as session:
        assert CachingQuery(User).with_cache_key("k").with_session(session).first() is not None
    cache.detach(factory)
    with factory() as session, pytest.raises(ConfigurationError, match="no cache is attached"):
        session.query(User).with_cache_key("k")
    cache.attach(bare)
    assert bare.query(User).with_cache_key("k").first() is not None  # type: ignore[attr-defined]
    bare.close()


@pytest.mark.parametrize("key", [None, "", 7, True, b"k"])
def test_a_key_that_is_no_string_is_an_error(factory: Any, key: Any) -> None:
    with factory() as session, pytest.raises(ConfigurationError, match="non-empty string"):
        session.query(User).with_cache_key(key)
