"""What a driver was told, and how it is given a statement: it decides what is stored, so it keeps answers apart."""

from __future__ import annotations

import datetime
import json
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from decimal import Decimal
from functools import partial
from typing import Any
from unittest import mock
from zoneinfo import ZoneInfo

import pytest
from dogpile.cache import make_region
from sqlalchemy import (
    JSON,
    Column,
    Engine,
    Float,
    Integer,
    MetaData,
    Table,
    Uuid,
    cast,
    create_engine,
    event,
    literal,
    literal_column,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import INET
from sqlalchemy.orm import Session, sessionmaker

from querycache import QueryCache
from querycache.databases import bind_identity
from querycache.keys import UnkeyableValue, canonical

POSTGRESQL = "postgresql+psycopg://me:secret@db/a"

exactly = partial(json.loads, parse_float=Decimal)


def test_drivers_are_told_apart() -> None:
    other = create_engine("mysql+mysqldb://me:secret@db/a", module=mock.Mock(__version__="2.2.7"))
    assert bind_identity(other) != bind_identity(create_engine("mysql+pymysql://me:secret@db/a"))


@pytest.mark.parametrize(
    "told",
    [
        {"json_deserializer": exactly},
        {"json_deserializer": partial(json.loads, parse_int=float)},
        {"json_deserializer": json.loads},
        {"json_serializer": json.dumps},
        {"json_serializer": partial(json.dumps, separators=(",", ":"))},
        {"native_inet_types": False},
        {"use_native_hstore": False},
    ],
    ids=["partial", "another partial", "function", "serializer", "partial with a tuple", "inet", "hstore"],
)
def test_what_an_engine_was_told_is_the_same_everywhere(told: dict[str, Any]) -> None:
    one, same, other = (create_engine(POSTGRESQL, **each) for each in (told, told, {}))
    assert bind_identity(one) == bind_identity(same) != bind_identity(other)


def _local() -> Callable[[str], object]:
    def loads(value: str) -> object:
        return json.loads(value)

    return loads


@pytest.mark.parametrize(
    "loads",
    [lambda value: json.loads(value), _local(), json.JSONDecoder().decode],
    ids=["lambda", "local", "method"],
)
def test_functions_without_a_name_keep_an_engine_apart(loads: Callable[[str], object]) -> None:
    one, other = (create_engine(POSTGRESQL, json_deserializer=loads) for _ in range(2))
    assert bind_identity(one) == bind_identity(one.execution_options(isolation_level="AUTOCOMMIT"))
    assert bind_identity(one) != bind_identity(other)
    # where SQLAlchemy calls them itself, it does so for each answer
    assert bind_identity(create_engine("mysql+pymysql://db/a", json_deserializer=loads)) == bind_identity(
        create_engine("mysql+pymysql://db/a")
    )


@pytest.fixture
def engine_told(postgresql_engine: Engine) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(**told: Any) -> Engine:
        made.append(create_engine(postgresql_engine.url, **told))
        return made[-1]

    yield make
    for each in made:
        each.dispose()


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        (select(literal_column("""'{"price": 1.1}'::json""", JSON)), {"json_deserializer": exactly}),
        (select(literal_column("'10.0.0.1'::inet", INET)), {"native_inet_types": False}),
    ],
)
def test_each_engine_is_given_its_own_values(
    engine_told: Callable[..., Engine], statement: Any, told: dict[str, Any]
) -> None:
    cache = QueryCache()
    engines = [engine_told(), engine_told(**told)]
    for _ in range(2):
        for engine in engines:
            with Session(engine) as plain, Session(engine) as session:
                cache.attach(session)
                answer = session.scalar(statement, execution_options={"cache_key": True})
                assert repr(answer) == repr(plain.scalar(statement))


_shown: ContextVar[str] = ContextVar("shown", default="")


def test_a_serializer_of_a_driver_is_asked_each_time(engine_told: Callable[..., Engine]) -> None:
    engine = engine_told(json_serializer=lambda value: json.dumps([_shown.get(), value]))
    sessions = sessionmaker(engine)
    QueryCache().attach(sessions)
    statement = select(literal("x", JSON)).execution_options(cache_key=True)
    for shown in ("one", "two", "one"):
        token = _shown.set(shown)
        try:
            with sessions() as session:
                assert session.scalar(statement) == [shown, "x"]
        finally:
            _shown.reset(token)


def test_json_has_an_order(engine_told: Callable[..., Engine]) -> None:
    sessions = sessionmaker(engine_told())
    QueryCache().attach(sessions)
    for value in ({"a": 1, "b": 2}, {"b": 2, "a": 1}):
        with sessions() as session:
            as_text = select(literal(value, JSON).op("::")(text("json")).op("::")(text("text")))
            answer = session.scalar(as_text, execution_options={"cache_key": True})
        assert answer == json.dumps(value)


@pytest.mark.parametrize("server", ["postgresql", "mariadb"])
def test_a_driver_that_is_given_no_parameters(server: str, request: pytest.FixtureRequest) -> None:
    """It does not turn two percent signs into one then."""
    sessions = sessionmaker(request.getfixturevalue(f"{server}_engine"))
    QueryCache().attach(sessions)
    statement = select(literal_column("'100%'"))
    answers = []
    for options in ({}, {"no_parameters": True}) * 2:
        with sessions() as session:
            answers.append(session.scalar(statement, execution_options={"cache_key": True, **options}))
    assert answers == ["100%", "100%%"] * 2


def test_a_time_of_day_whose_offset_nobody_knows() -> None:
    with pytest.raises(UnkeyableValue, match="parameter type time"):
        canonical(datetime.time(12, tzinfo=ZoneInfo("Europe/Berlin")))


def test_the_first_statement_of_an_engine(mariadb_engine: Engine) -> None:
    """Before it connects, a dialect does not know its server, nor what types that has."""
    given = uuid.UUID(int=1)
    things = Table("thing", MetaData(), Column("id", Integer, primary_key=True), Column("given", Uuid))
    things.metadata.create_all(mariadb_engine)
    with mariadb_engine.begin() as connection:
        connection.execute(things.insert().values(id=1, given=given))
    for statement in (select(things.c.given), select(things.c.given).where(things.c.given == given)):
        engine = create_engine(mariadb_engine.url)
        sessions = sessionmaker(engine)
        QueryCache().attach(sessions)
        for cached in (True, True, False):
            with sessions() as session:
                options = {"cache_key": True} if cached else {}
                assert session.scalars(statement.execution_options(**options)).all() == [given]
        engine.dispose()
    engine = create_engine(mariadb_engine.url)
    sessions = sessionmaker(engine)
    QueryCache().attach(sessions)
    with sessions() as session, warnings.catch_warnings():
        warnings.simplefilter("error")
        number = cast(things.c.id, Float)
        assert session.scalars(select(number).execution_options(cache_key=True)).all() == [1.0]
    engine.dispose()


def test_a_database_that_cannot_be_reached_is_tried_once_in_a_while(sqlite_engine: Engine) -> None:
    region = make_region().configure("querycache.memory")
    sessions = sessionmaker(sqlite_engine)
    QueryCache(region).attach(sessions)
    statement = select(literal(1)).execution_options(cache_key=True)
    with sessions() as session:
        session.scalars(statement).all()
    engine = create_engine(sqlite_engine.url)
    sessions = sessionmaker(engine)
    QueryCache(region).attach(sessions)
    tried = []

    def ask() -> list[int]:
        with sessions() as session:
            return list(session.scalars(statement))

    @event.listens_for(engine, "do_connect")
    def connect(*_: Any) -> None:
        tried.append(1)
        if len(tried) == 2:
            with ThreadPoolExecutor(1) as pool:  # others do not wait for it
                assert pool.submit(ask).result() == [1]
            time.sleep(0.5)
        raise ConnectionError

    assert [ask() for _ in range(5)] == [[1]] * 5
    assert len(tried) == 1
    engine.dialect.__dict__["_querycache_next_try"] = 0.0
    assert ask() == [1]
    assert len(tried) == 2
    assert engine.dialect.__dict__["_querycache_next_try"] - time.monotonic() > 9  # for what that took


def test_an_engine_whose_pool_another_has_filled_connects_once(sqlite_engine: Engine) -> None:
    sqlite_engine.connect().close()
    engine = create_engine(sqlite_engine.url, pool=sqlite_engine.pool)
    sessions = sessionmaker(engine)
    QueryCache().attach(sessions)
    statement = select(literal(1)).execution_options(cache_key=True)
    with sessions() as session:
        session.scalars(statement).all()
    taken = []
    event.listen(engine, "checkout", lambda *_: taken.append(1))
    for _ in range(3):
        with sessions() as session:
            assert session.scalars(statement).all() == [1]
    assert not taken


def test_what_is_compiled_before_the_database_can_be_reached_is_forgotten(mariadb_engine: Engine) -> None:
    given = uuid.UUID(int=2)
    things = Table("thing_2", MetaData(), Column("id", Integer, primary_key=True), Column("given", Uuid))
    things.metadata.create_all(mariadb_engine)
    with mariadb_engine.begin() as connection:
        connection.execute(things.insert().values(id=1, given=given))
    engine = create_engine(mariadb_engine.url)
    reachable = False

    @event.listens_for(engine, "do_connect")
    def connect(*_: Any) -> None:
        if not reachable:
            raise ConnectionError

    sessions = sessionmaker(engine)
    QueryCache().attach(sessions)
    statement = select(things.c.given).execution_options(cache_key=True)
    with sessions() as session, pytest.raises(ConnectionError):
        session.scalars(statement)
    reachable = True
    with sessions() as session:
        session.connection()
        assert session.scalars(statement).all() == [given]
    engine.dispose()
