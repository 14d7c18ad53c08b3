"""What is remembered of a statement that is executed again, and what must not be.

A statement object remembers what it was compiled to, and what was compiled remembers plans by the values of parameters
(`querycache/sa_internals/planning.py`). Whatever differs between two executions must not get lost by that.
"""

from __future__ import annotations

import gc
import json
import sqlite3
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from datetime import datetime
from decimal import Decimal
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    JSON,
    DateTime,
    Engine,
    Float,
    ForeignKey,
    Integer,
    Numeric,
    String,
    and_,
    bindparam,
    create_engine,
    event,
    literal,
    select,
    type_coerce,
)
from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    joinedload,
    load_only,
    mapped_column,
    relationship,
    selectinload,
    sessionmaker,
    subqueryload,
)
from sqlalchemy.types import TypeDecorator

from querycache import QueryCache
from querycache.sa_internals import Plan
from tests.read_path.models import Post, User

pytestmark = pytest.mark.usefixtures("small_heap")

CACHED = {"cache_key": True}

OF_SESSION = ["session"] if "execution_options" in signature(Session.__init__).parameters else []
"""2.0 has none."""


class Own(DeclarativeBase):
    pass


class Setting(Own):
    __tablename__ = "setting"
    __table_args__ = {"schema": "tenant"}
    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[str]


@pytest.fixture
def tenants(tmp_path: Path) -> Engine:
    """An engine with the schemas a and b, whose setting 1 is called like them."""
    engine = create_engine(f"sqlite:///{tmp_path / 'main.db'}")

    @event.listens_for(engine, "connect")
    def attach(connection: sqlite3.Connection, record: object) -> None:
        for name in "ab":
            connection.execute(f"ATTACH '{tmp_path / name}.db' AS {name}")

    for name in "ab":
        translated = engine.execution_options(schema_translate_map={"tenant": name})
        Own.metadata.create_all(translated)
        with Session(translated) as session, session.begin():
            session.add(Setting(id=1, value=name))
    return engine


@pytest.mark.parametrize("level", ["statement", "call", "engine", "connection", *OF_SESSION])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_map_of_schemas_that_is_changed_in_place(tenants: Engine, level: str, times: int) -> None:
    schemas: dict[str | None, str | None] = {"tenant": "a"}
    options = {"schema_translate_map": schemas}
    sessions = sessionmaker(tenants)
    QueryCache().attach(sessions)
    statement = select(Setting.value).execution_options(cache_key=True)
    if level == "statement":
        statement = statement.execution_options(**options)
    bind = tenants.execution_options(**options) if level == "engine" else tenants

    def ask() -> str:
        of_session: Any = {"execution_options": options} if level == "session" else {}
        with sessions(bind=bind, **of_session) as session:
            if level == "connection":
                session.connection(execution_options=options)
            return session.scalars(statement, execution_options=options if level == "call" else {}).one()

    assert [ask() for _ in range(times)] == ["a"] * times
    schemas["tenant"] = "b"
    assert [ask() for _ in range(3)] == ["b"] * 3


class Ambiguous:
    """Compared to anything it gives what is neither true nor false, as arrays and data frames do."""

    def __eq__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise ValueError("the truth value is ambiguous")

    __hash__ = object.__hash__


@pytest.mark.parametrize("level", ["statement", "call", *OF_SESSION])
def test_options_of_the_application_are_neither_compared_nor_kept(sqlite_forum: Engine, level: str) -> None:
    sessions = sessionmaker(sqlite_forum)
    cache = QueryCache().attach(sessions)
    kept = select(User.name).where(User.id == 1).execution_options(cache_key=True)
    gone: list[weakref.ref[Ambiguous]] = []
    outcomes = []
    for _ in range(5):
        own: Any = {"weights": Ambiguous()}
        gone.append(weakref.ref(own["weights"]))
        statement = kept.execution_options(**own) if level == "statement" else kept
        of_session: Any = {"execution_options": own} if level == "session" else {}
        with sessions(**of_session) as session, cache.recording() as events:
            session.scalars(statement, execution_options=own if level == "call" else {}).one()
        outcomes.append(events[-1].outcome)
    del own, statement, of_session, session
    gc.collect()
    assert outcomes == ["fill"] + ["hit"] * 4
    # SQLAlchemy keeps the statement that it has compiled
    assert sum(each() is not None for each in gone) <= (1 if level == "statement" else 0)


NUMBER = bindparam("number", type_=Integer)
GIVEN: list[tuple[Any, list[Any]]] = [
    (String, ["1", "one", "", None]),
    (Integer, [1, True, 0, False, None]),
    (Numeric(asdecimal=True), [Decimal("1.0"), Decimal("1.00"), Decimal("-0")]),
    (DateTime, [datetime(2026, 1, 1), datetime(2026, 1, 1, fold=1)]),
    (Float, [0.0, -0.0]),
]


@pytest.mark.parametrize("place", ["given", "in the statement", "by params()"])
def test_values_that_are_equal_and_not_alike(sqlite_forum: Engine, place: str) -> None:
    sessions = sessionmaker(sqlite_forum)
    QueryCache().attach(sessions)
    for kind, values in GIVEN:
        parameter = bindparam("value", type_=kind)
        whole = select(type_coerce(parameter, kind))
        for value in values * 3:
            if place == "given":
                statement, given = whole, {"value": value}
            elif place == "by params()":
                statement, given = whole.params(value=value), {}
            else:
                statement, given = select(literal(value, kind)), {}
            with sessions() as session, Session(sqlite_forum) as plain:
                answer = session.execute(statement, given, execution_options=CACHED).scalar_one()
                expected = plain.execute(statement, given).scalar_one()
            assert repr(answer) == repr(expected), (kind, value)


def test_lists_of_an_in_that_differ_in_one_place(sqlite_forum: Engine) -> None:
    sessions = sessionmaker(sqlite_forum)
    QueryCache().attach(sessions)
    given = select(User.id).where(User.id.in_(bindparam("ids", expanding=True))).order_by(User.id)
    for ids in ([1, 2], [1, 3], [1], [], [1, 2]) * 2:
        for statement, parameters in (
            (given, {"ids": ids}),
            (select(User.id).where(User.id.in_(ids)).order_by(User.id), {}),
        ):
            with sessions() as session:
                assert session.scalars(statement, parameters, execution_options=CACHED).all() == ids
    changed = [1]
    for more in (2, 3):
        with sessions() as session:
            answer = session.scalars(given, {"ids": changed}, execution_options=CACHED).all()
            assert answer == changed
        changed.append(more)


def test_other_parameters_than_before(sqlite_forum: Engine) -> None:
    """Names that are given or left out are part of how a statement is compiled."""
    sessions = sessionmaker(sqlite_forum)
    QueryCache().attach(sessions)
    statement = select(User.id).where(User.id == bindparam("id", 1)).execution_options(cache_key=True)
    for given, expected in (({}, 1), ({"id": 2}, 2), ({}, 1), ({"id": 2}, 2)) * 2:
        with sessions() as session:
            assert session.scalars(statement, given).all() == [expected]


def test_a_statement_made_of_one_that_was_executed(sqlite_forum: Engine) -> None:
    """It takes over all attributes, and the memory of a statement that is gone may be another's."""
    sessions = sessionmaker(sqlite_forum)
    QueryCache().attach(sessions)
    for _ in range(50):
        statement = select(User.id).execution_options(cache_key=True).order_by(User.id)
        for number in (1, 2):
            with sessions() as session:
                session.scalars(statement, {"unused": number} if number > 2 else {}).all()
            statement = statement.where(User.id >= number).limit(2)
        with sessions() as session, Session(sqlite_forum) as plain:
            assert session.scalars(statement).all() == plain.scalars(statement).all()


def test_core_rows_are_found_by_the_columns_of_the_statement_that_was_executed(sqlite_forum: Engine) -> None:
    sessions = sessionmaker(sqlite_forum)
    QueryCache().attach(sessions)
    table = User.__table__

    def made() -> tuple[Any, Any]:
        column = (table.c.id + 1).label("next")
        return column, select(column).where(table.c.id == 1)

    kept = made()
    for column, statement in (kept, kept, kept, made(), kept, made(), made()):
        with sessions() as session:
            row = session.execute(statement, execution_options=CACHED).one()
        assert row._mapping[column] == 2


@pytest.mark.parametrize("form", ["value", "list"])
def test_answers_are_kept_apart_by_values_that_are_equal_and_not_alike(
    sqlite_forum: Engine, form: str
) -> None:
    """Not every driver takes True for 1."""
    sessions = sessionmaker(sqlite_forum)
    cache = QueryCache().attach(sessions)
    keys: dict[str, set[str]] = {"1": set(), "True": set()}
    for value in (1, True) * 3:
        if form == "list":
            parameter = bindparam("ids", [value], type_=Integer, expanding=True)
            statement: Any = select(User.id).where(User.id.in_(parameter))
        else:
            statement = select(literal(value, Integer))
        with sessions() as session:
            keys[repr(value)].add(cache.explain(session, statement.execution_options(cache_key=True)).key)
    assert [len(each) for each in keys.values()] == [1, 1]
    assert keys["1"] != keys["True"]


@pytest.mark.parametrize("dialect", ["of each engine", "of both"])
def test_two_databases_with_one_compiled_cache(tmp_path: Path, dialect: str) -> None:
    compiled_cache: dict[Any, Any] = {}
    engines = []
    for name in ("a", "b"):
        engine = create_engine(f"sqlite:///{tmp_path / name}.db")
        if engines and dialect == "of both":
            engine = Engine(engine.pool, engines[0].dialect, engine.url)
        engines.append(engine)
        Ctx.metadata.create_all(engine)
        with Session(engine) as session, session.begin():
            session.add(Leaf(id=1, tree_id=1, kind=name))
    sessions = [sessionmaker(engine.execution_options(compiled_cache=compiled_cache)) for engine in engines]
    cache = QueryCache()
    for each in sessions:
        cache.attach(each)
    kept = select(Leaf.kind).where(Leaf.id == 1).execution_options(cache_key=True)
    for statement in (
        kept,
        kept,
        kept,
        select(Leaf.kind).where(Leaf.id == 1).execution_options(cache_key=True),
    ):
        for each, name in zip(sessions, "ab", strict=True):
            with each() as session:
                assert session.scalars(statement).all() == [name]


def test_further_statements_keep_nothing_of_the_session(sqlite_forum: Engine) -> None:
    sessions = sessionmaker(sqlite_forum)
    QueryCache().attach(sessions)
    statement = select(User).options(selectinload(User.posts)).execution_options(cache_key=True)
    gone: list[weakref.ref[Session]] = []
    for _ in range(4):
        session = sessions()
        gone.append(weakref.ref(session))
        users = session.scalars(statement).all()
        assert any(user.posts for user in users)
        session.close()
        del session, users
    gc.collect()
    assert [each() for each in gone] == [None] * 4


def test_the_errors_of_sqlite_are_its_own(sqlite_forum: Engine) -> None:
    """The library asks SQLite whether a result is open, which SQLite refuses to answer."""
    sessions = sessionmaker(sqlite_forum)
    QueryCache().attach(sessions)
    statement = select(Post.id).where(Post.author_id == bindparam("author"))
    with sessions() as session:
        session.scalars(select(User.id), execution_options=CACHED).all()
        with pytest.raises(
            DBAPIError, match=r"type 'object' is not supported|unsupported type"
        ):  # (Python 3.10)
            session.execute(statement, {"author": object()})


def test_a_list_that_is_changed_after_it_was_given(own_forum: Engine) -> None:
    """The plan that is remembered for what it held then must not hold it."""
    sessions = sessionmaker(own_forum)
    cache = QueryCache().attach(sessions)
    names = select(User.name).where(User.id.in_(bindparam("ids", expanding=True)))
    ids = [1]
    with sessions() as session:
        session.scalars(names, {"ids": ids}, execution_options=CACHED).all()
        ids[0] = 2
        cache.depends("a view", on=["a table"])  # so tags are found anew
        session.scalars(names, {"ids": [1]}, execution_options=CACHED).all()
    with sessions.begin() as session:
        session.get_one(User, 1).name = "another"
    with sessions() as session:
        assert session.scalars(names, {"ids": [1]}, execution_options=CACHED).all() == ["another"]


@pytest.mark.parametrize("first", ["required", "optional"])
def test_a_parameter_that_is_required_beside_one_that_is_not(own_forum: Engine, first: str) -> None:
    """As without the cache, where it depends on which of them was compiled first."""

    def outcomes(sessions: sessionmaker[Session]) -> list[object]:
        own_forum.clear_compiled_cache()
        found: list[object] = []
        for kind in (first, "required", "optional") * 2:
            parameter = bindparam("id") if kind == "required" else bindparam("id", None)
            with sessions() as session:
                try:
                    found.append(
                        session.scalars(select(User.id).where(User.id == parameter), **options).all()
                    )
                except StatementError as error:
                    found.append(str(error))
        return found

    options: dict[str, Any] = {}
    plain, cached = sessionmaker(own_forum), sessionmaker(own_forum)
    QueryCache().attach(cached)
    expected = outcomes(plain)
    options["execution_options"] = CACHED
    assert outcomes(cached) == expected


@pytest.mark.parametrize("value", ["x" * 100_000, ["x"] * 1_000, ["x" * 100_000]])
def test_long_values_are_not_remembered(sqlite_forum: Engine, value: Any) -> None:
    sessions = sessionmaker(sqlite_forum)
    QueryCache().attach(sessions)
    kind = bindparam("name", expanding=True) if isinstance(value, list) else bindparam("name")
    statement = select(User.id).where(User.name.in_(kind) if isinstance(value, list) else User.name == kind)
    before = remembered()
    for _ in range(3):
        with sessions() as session:
            assert session.scalars(statement, {"name": value}, execution_options=CACHED).all() == []
            assert session.scalars(statement, {"name": value[:1]}, execution_options=CACHED).all() == []
    assert remembered() - before <= 1


def remembered() -> int:
    gc.collect()
    return sum(type(each) is Plan for each in gc.get_objects())


# --- what the values do not tell ----------------------------------------------------------------------------------

_shown: ContextVar[str] = ContextVar("shown", default="one")


class Shown(TypeDecorator[str]):
    """Its column expression is another in each context."""

    impl = String
    cache_ok = False

    def column_expression(self, column: Any) -> Any:
        return literal(_shown.get()) + "/" + type_coerce(column, String)


class Ctx(DeclarativeBase):
    pass


class Leaf(Ctx):
    __tablename__ = "leaf"
    id: Mapped[int] = mapped_column(primary_key=True)
    tree_id: Mapped[int] = mapped_column(ForeignKey("tree.id"))
    kind: Mapped[str]


class Tree(Ctx):
    __tablename__ = "tree"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(Shown)
    leaves: Mapped[list[Leaf]] = relationship(
        primaryjoin=lambda: and_(
            Tree.id == Leaf.tree_id, Leaf.kind == bindparam("kind", type_=String, callable_=_shown.get)
        ),
        viewonly=True,
    )


@pytest.fixture
def trees(tmp_path: Path) -> Engine:
    engine = create_engine(f"sqlite:///{tmp_path / 'trees.db'}")
    Ctx.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add(Tree(id=1, name="oak"))
        session.flush()
        session.add_all([Leaf(id=1, tree_id=1, kind="one"), Leaf(id=2, tree_id=1, kind="two")])
    return engine


TREE = select(Tree).where(Tree.id == 1).options(load_only(Tree.id))
IN_CONTEXT: dict[str, Callable[[], Any]] = {
    "joined": lambda: select(Tree.id, Leaf.kind).join(Tree.leaves),
    "joinedload": lambda: (
        select(Tree).where(Tree.id == 1).options(load_only(Tree.id), joinedload(Tree.leaves))
    ),
    "selectinload": lambda: TREE.options(selectinload(Tree.leaves)),
    "subqueryload": lambda: TREE.options(subqueryload(Tree.leaves)),
    "type": lambda: select(Tree.name),
}


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("case", IN_CONTEXT)
def test_functions_of_the_application_are_asked_each_time(trees: Engine, case: str, kept: bool) -> None:
    cached = sessionmaker(trees)
    QueryCache().attach(cached)
    one = IN_CONTEXT[case]()
    for shown in ("one", "two", "one", "two"):
        token = _shown.set(shown)
        try:
            answers = []
            for sessions in (cached, sessionmaker(trees)):
                statement = one if kept else IN_CONTEXT[case]()
                with sessions() as session:
                    rows = session.execute(
                        statement, execution_options={"cache_key": True, "cache_ttl": 60}
                    ).unique()
                    answers.append(
                        [
                            [leaf.kind for leaf in row[0].leaves] if isinstance(row[0], Tree) else tuple(row)
                            for row in rows
                        ]
                    )
        finally:
            _shown.reset(token)
        assert answers[0] == answers[1], shown


def test_a_serializer_is_asked_each_time(tmp_path: Path) -> None:
    engine = create_engine(
        f"sqlite:///{tmp_path / 'json.db'}", json_serializer=lambda value: json.dumps([_shown.get(), value])
    )
    sessions = sessionmaker(engine)
    QueryCache().attach(sessions)
    statement = select(bindparam("value", type_=JSON))
    for shown in ("one", "two", "one"):
        token = _shown.set(shown)
        try:
            with sessions() as session:
                answer = session.scalars(statement, {"value": "x"}, execution_options=CACHED).one()
        finally:
            _shown.reset(token)
        assert answer == [shown, "x"]


def test_values_that_are_changed_in_a_statement(sqlite_forum: Engine) -> None:
    sessions = sessionmaker(sqlite_forum)
    QueryCache().attach(sessions)
    ids = [1]
    parameter = bindparam("ids", ids, expanding=True)
    statement = select(User.id).where(User.id.in_(parameter)).execution_options(cache_key=True)
    for _ in range(3):
        for number in (1, 2):
            ids[0] = number
            with sessions() as session:
                assert session.scalars(statement).all() == [number]


def test_a_single_set_of_parameters(sqlite_forum: Engine) -> None:
    sessions = sessionmaker(sqlite_forum)
    QueryCache().attach(sessions)
    statement = select(User.id).where(User.id == bindparam("id"))
    for given in ({"id": 1}, [{"id": 1}], ({"id": 1},)):
        for _ in range(2):
            with sessions() as session:
                assert session.execute(statement, given, execution_options=CACHED).scalars().all() == [1]  # type: ignore[arg-type]
