"""Pitfalls B, keys. The naive way to make a key stands beside the statements that it confuses.

B4 by handlers (schemas, shards and tenants chosen there) is in `tests/test_other_handlers.py`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import (
    Engine,
    Integer,
    String,
    TypeDecorator,
    bindparam,
    column,
    create_engine,
    event,
    func,
    literal,
    select,
    values,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session, selectinload, sessionmaker, with_loader_criteria, with_parent
from sqlalchemy.sql.expression import ColumnElement

from querycache import Policy, QueryCache
from querycache.analysis import Analysis
from querycache.options import CacheOptions
from querycache.sa_internals import Plan, cache_key_of
from tests.read_path.models import Base, Post, Tag, Team, User
from tests.read_path.observe import Observer, outcome_of
from tests.read_path.test_keys import SAME_TEXT

pytestmark = pytest.mark.usefixtures("small_heap")

Sessions = Callable[[Engine], sessionmaker[Session]]
CACHED = {"cache_key": "the same for all"}


def answers(maker: sessionmaker[Session], statements: list[Any], options: dict[str, Any]) -> list[Any]:
    """What each statement gives in a session of its own, with what its objects give when they are touched."""
    found = []
    for statement in statements:
        observer = Observer()
        with maker() as db:
            engine = db.get_bind()
            assert isinstance(engine, Engine)
            result = observer.describe(
                outcome_of(lambda: db.execute(statement, execution_options=options).unique().all())  # noqa: B023
            )
            found.append((result, observer.touch(engine)))
    return found


def each_has_its_own_answer(maker: sessionmaker[Session], cache: QueryCache, statements: list[Any]) -> None:
    expected = answers(maker, statements, {})
    assert answers(maker, statements, CACHED) == expected
    with cache.recording() as events:
        assert answers(maker, statements, CACHED) == expected
    assert [event.outcome for event in events] == ["hit"] * len(statements)


# --- B1 --------------------------------------------------------------------------------------------


def of_parents(db: Session) -> list[list[Any]]:
    """Selects that say the same of one parent and of another."""
    users = db.scalars(select(User).order_by(User.id)).all()
    posts = db.scalars(select(Post).order_by(Post.id)).all()
    return [
        [select(Post).where(Post.author == user).order_by(Post.id) for user in users],
        [select(Post).where(Post.author != user).order_by(Post.id) for user in users],
        [select(Post).where(with_parent(user, User.posts)).order_by(Post.id) for user in users],
        [select(User).where(User.posts.contains(post)) for post in posts],
        [select(Tag).where(Tag.posts.contains(post)) for post in posts],
        [select(Post).where(Post.id == bindparam("id", callable_=lambda n=n: n)) for n in (1, 2)],  # type: ignore[misc]
    ]


def test_B1_the_parent_is_part_of_the_key(
    sqlite_forum: Engine, cache: QueryCache, sessions: Sessions
) -> None:
    maker = sessions(sqlite_forum)
    with maker() as db:
        statements = [statement for group in of_parents(db) for statement in group]
        each_has_its_own_answer(maker, cache, statements)


def test_B1_the_naive_way_sees_no_value(sqlite_forum: Engine) -> None:
    with Session(sqlite_forum) as db:
        for group in of_parents(db):
            keys = [statement._generate_cache_key() for statement in group]
            assert len({(str(key.key), str([each.value for each in key.bindparams])) for key in keys}) == 1


def test_B1_the_value_is_the_one_of_the_moment(
    sqlite_forum: Engine, cache: QueryCache, sessions: Sessions
) -> None:
    """A parent that is changed after the statement was made is compared as it is now."""
    with sessions(sqlite_forum)() as db, db.no_autoflush:
        post = db.get_one(Post, 1)
        statement = select(User).where(with_parent(post, Post.author)).execution_options(cache_key=True)
        for author in (1, 2, 3, 1):
            post.author_id = author
            assert [user.id for user in db.scalars(statement)] == [author]


# --- B2 --------------------------------------------------------------------------------------------


def with_params() -> list[Any]:
    statement = select(User.name).where(User.id == bindparam("q"))
    core = select(User.__table__.c.name).where(User.__table__.c.id == bindparam("q"))
    return [each.params(q=number) for each in (statement, core) for number in (1, 2)]


def test_B2_params_are_part_of_the_key(sqlite_forum: Engine, cache: QueryCache, sessions: Sessions) -> None:
    each_has_its_own_answer(sessions(sqlite_forum), cache, with_params())


def test_B2_the_naive_way_ignores_params() -> None:
    """Since 2.1; 2.0 copied the parameters into the statement."""
    keys = [statement._generate_cache_key() for statement in with_params()]
    found = [[each.effective_value for each in key.bindparams] for key in keys]
    assert (found[0] == found[1]) == (sqlalchemy.__version__ >= "2.1")


def test_B2_parameters_given_apart(sqlite_forum: Engine, cache: QueryCache, sessions: Sessions) -> None:
    statement = select(User.name).where(User.id == bindparam("q"), User.age > bindparam("a", 0))
    given: list[dict[str, Any]] = [{"q": 1}, {"q": 2}, {"q": 1, "a": 99}, {"a": 99, "q": 2}]
    for _ in range(2):
        with sessions(sqlite_forum)() as db:
            found = [db.scalars(statement, each, execution_options=CACHED).all() for each in given]
            assert found == [["ann"], ["bob"], [], []]
    assert cache.stats().hits == 4


# --- B3 --------------------------------------------------------------------------------------------


def test_B3_statements_of_one_text(sqlite_forum: Engine, cache: QueryCache, sessions: Sessions) -> None:
    statements = list(SAME_TEXT.values())
    assert len(set(map(str, statements))) == 1, "the naive way has one key for all"
    each_has_its_own_answer(sessions(sqlite_forum), cache, statements)


def test_B3_criteria_that_only_post_loads_see(
    sqlite_forum: Engine, cache: QueryCache, sessions: Sessions
) -> None:
    """The values do not show in the statement at all, neither in its text nor in its parameters."""
    statements = [
        *(select(User).options(selectinload(User.posts.and_(Post.score > least))) for least in (0, 3, 4, 9)),
        *(
            select(User).options(selectinload(User.posts), with_loader_criteria(Post, Post.score > least))
            for least in (0, 3, 4, 9)
        ),
    ]
    assert len({(str(each), str(each.compile().params)) for each in statements}) == 1
    each_has_its_own_answer(sessions(sqlite_forum), cache, statements)


def test_B3_criteria_of_lambdas(sqlite_forum: Engine, cache: QueryCache, sessions: Sessions) -> None:
    def statement(least: int) -> Any:
        criteria = with_loader_criteria(Post, lambda cls: cls.score > least)
        return select(User).options(selectinload(User.posts), criteria).order_by(User.id)

    each_has_its_own_answer(sessions(sqlite_forum), cache, [statement(0), statement(4)])


# --- B4 --------------------------------------------------------------------------------------------


def test_B4_distinct_on(postgresql_forum: Engine, cache: QueryCache, sessions: Sessions) -> None:
    def distinct(*columns: Any) -> Any:
        first = select(Post.author_id, Post.score).order_by(*columns, Post.id)
        # 2.0 knows the one way only, 2.1 deprecates it
        if hasattr(postgresql, "distinct_on"):
            return first.ext(postgresql.distinct_on(*columns))
        return first.distinct(*columns)

    plain = select(Post.author_id, Post.score).order_by(Post.author_id, Post.id)
    statements = [plain, distinct(Post.author_id), distinct(Post.author_id, Post.score)]
    each_has_its_own_answer(sessions(postgresql_forum), cache, statements)


def test_B4_skip_locked_is_no_answer_to_share(
    postgresql_forum: Engine, cache: QueryCache, sessions: Sessions
) -> None:
    maker = sessions(postgresql_forum)
    statement = select(Tag.id).where(Tag.id == 1)
    skipping = statement.with_for_update(skip_locked=True)
    with maker() as holder, maker() as other:
        assert holder.scalars(statement.with_for_update()).all() == [1]
        assert other.scalars(statement, execution_options=CACHED).all() == [1]
        assert other.scalars(skipping, execution_options=CACHED).all() == []
    with maker() as other:
        assert other.scalars(skipping, execution_options=CACHED).all() == [1]


@pytest.fixture
def schemas(tmp_path: Path) -> Engine:
    """A database with two schemas, which have the same tables; each has one tag, named like the schema."""
    engine = create_engine("sqlite://")

    @event.listens_for(engine, "connect")
    def attach(connection: Any, record: object) -> None:
        for name in ("rome", "oslo"):
            connection.execute(f"ATTACH DATABASE '{tmp_path / name}.db' AS {name}")

    with engine.connect() as connection:
        for name in ("rome", "oslo"):
            inside = connection.execution_options(schema_translate_map={None: name})
            Base.metadata.create_all(inside)
            inside.execute(Tag.__table__.insert(), {"id": 1, "name": name})
        connection.commit()
    return engine


@pytest.mark.parametrize("where", ["statement", "connection", "engine"])
def test_B4_schema_translate_map(where: str, schemas: Engine, cache: QueryCache) -> None:
    statement = select(Tag.name)
    for _ in range(2):
        for name in ("rome", "oslo"):
            options = {"schema_translate_map": {None: name}}
            bind: Any = schemas
            if where == "engine":
                bind = schemas.execution_options(**options)
            with Session(bind) as db:
                cache.attach(db)
                if where == "connection":
                    db.connection(execution_options=options)
                inner = options if where == "statement" else {}
                assert db.scalars(statement, execution_options={**inner, **CACHED}).all() == [name]
    assert cache.stats().hits == 2


def test_B4_databases(tmp_path: Path, cache: QueryCache) -> None:
    engines = {}
    for name in ("rome", "oslo"):
        engines[name] = create_engine(f"sqlite:///{tmp_path / name}.db")
        Base.metadata.create_all(engines[name])
        with engines[name].begin() as connection:
            connection.execute(Tag.__table__.insert(), {"id": 1, "name": name})
    statement = select(Tag.name)
    maker = sessionmaker()
    cache.attach(maker)
    for _ in range(2):
        for name, engine in engines.items():
            with maker(bind=engine) as db:
                assert db.scalars(statement, execution_options=CACHED).all() == [name]
            with maker() as db:
                bound = db.scalars(statement, execution_options=CACHED, bind_arguments={"bind": engine})
                assert bound.all() == [name]
            with engine.connect() as connection, maker(bind=connection) as db:
                assert db.scalars(statement, execution_options=CACHED).all() == [name]
    assert (cache.stats().fills, cache.stats().hits) == (2, 10)
    for engine in engines.values():
        engine.dispose()


def test_B4_tenants(sqlite_forum: Engine) -> None:
    """What decides of the answer without a word in the statement: row-level security, say."""
    cache = QueryCache(scope=lambda session: session.info["tenant"])
    maker = sessionmaker(sqlite_forum)
    cache.attach(maker)
    statement = select(func.count(User.id)).execution_options(**CACHED)
    tenants: list[Any] = [1, "1", True, None, ("a", 1), ["a", 1], {"a": 1}, "é"]
    for outcome in ("miss", "hit"):
        for tenant in tenants:
            with maker(info={"tenant": tenant}) as db, cache.recording() as events:
                assert db.scalar(statement) == 4
                assert events[0].outcome == outcome, tenant


def test_B4_a_scope_that_asks_the_database(sqlite_forum: Engine) -> None:
    """Of what is cached otherwise, too; for its own key it would need itself."""
    named = select(User.name).where(User.id == 1).execution_options(**CACHED)
    cache = QueryCache(scope=lambda session: session.scalar(named), policies={User: Policy()})
    maker = sessionmaker(sqlite_forum)
    cache.attach(maker)
    for outcome in ("miss", "hit"):
        with maker() as db, cache.recording() as events:
            assert len(db.scalars(select(User)).all()) == 4
        assert events[0].outcome == outcome


# --- B5 --------------------------------------------------------------------------------------------


class Opaque(ColumnElement[int]):
    """An element of an application, of which SQLAlchemy cannot tell whether two are the same."""

    inherit_cache = False
    type = Integer()

    def __init__(self, number: int) -> None:
        self.number = number


@compiles(Opaque)
def _compile_opaque(element: Opaque, compiler: Any, **kwargs: Any) -> str:
    return f"({element.number} + 0)"


class Loud(TypeDecorator[str]):
    """A type of an application that does not say whether it can be part of a cache key."""

    impl = String
    cache_ok = False

    def __init__(self, mark: str) -> None:
        super().__init__()
        self.mark = mark

    def process_result_value(self, value: Any, dialect: Any) -> str:
        return f"{value}{self.mark}"


def without_a_cache_key() -> list[Any]:
    rows = [
        values(column("n", Integer), name="v").data([(number,), (number + 1,)]) for number in (1, 2)
    ]  # fmt: skip
    return [
        *(select(Opaque(number), User.name).where(User.id == other) for number in (1, 2) for other in (1, 2)),
        *(select(sqlalchemy.type_coerce(User.name, Loud(mark))).order_by(User.id) for mark in "!?"),
        *(
            select(User).where(User.id == Opaque(number)).options(selectinload(User.posts))
            for number in (1, 2)
        ),
        *(select(User.id, Opaque(number).label("x")).where(User.id < 3) for number in (1, 2)),
        *(select(data.c.n) for data in rows),
    ]


@pytest.mark.filterwarnings("ignore:.*will not produce a cache key:sqlalchemy.exc.SAWarning")
def test_B5_elements_without_a_cache_key(
    postgresql_forum: Engine, cache: QueryCache, sessions: Sessions
) -> None:
    statements = without_a_cache_key()
    assert [cache_key_of(each) for each in statements[:2]] == [None, None]
    maker = sessions(postgresql_forum)
    expected = answers(maker, statements, {})
    for _ in range(2):
        with cache.recording() as events:
            assert answers(maker, statements, CACHED) == expected
    assert all(event.outcome == "hit" or event.reason for event in events)


# --- B6 --------------------------------------------------------------------------------------------

VALUES: list[Any] = [
    1,
    True,
    1.0,
    "1",
    b"1",
    Decimal("1.0"),
    "é",
    "e\u0301",
    "☃",
    "",
    None,
    "None",
    0,
    -0.0,
    2**62,
]


def test_B6_values_are_told_apart_by_their_types(
    sqlite_forum: Engine, cache: QueryCache, sessions: Sessions
) -> None:
    assert hash(1) == hash(True) == hash(1.0) and str(1) == "1", "the naive ways confuse them"
    statements = [select(literal(value).label("x"), Team.id).order_by(Team.id) for value in VALUES]
    statements += [select(Team.id).where(literal(value, String()) == "1") for value in ("1", "é", "☃")]
    each_has_its_own_answer(sessions(sqlite_forum), cache, statements)


class Address:
    """A parameter as a driver may know it: its repr() tells where it lies in memory."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __conform__(self, protocol: object) -> int:
        return self.number


class Adapted(TypeDecorator[Any]):
    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return Address(value)


def test_B6_a_value_without_a_form_is_never_part_of_a_key(
    sqlite_forum: Engine, cache: QueryCache, sessions: Sessions
) -> None:
    assert repr(Address(1)) != repr(Address(1)), "the naive way never hits, or hits what lay there before"
    with sessions(sqlite_forum)() as db, cache.recording() as events:
        for number in (1, 2, 1):
            statement = select(User.id).where(User.id == bindparam("n", number, Adapted))
            assert db.scalars(statement, execution_options=CACHED).all() == [number]
    assert [(each.outcome, each.reason) for each in events] == [("bypass", "parameter type Address")] * 3


# --- B7 --------------------------------------------------------------------------------------------


def alive(kind: type) -> int:
    gc.collect()
    return sum(type(each) is kind for each in gc.get_objects())


def plans_for(value: int) -> list[Plan]:
    """The plans that are remembered for a single parameter of this value."""
    return [each for each in gc.get_objects() if type(each) is Plan and list(each.values.values()) == [value]]


def test_B7_what_is_remembered_of_statements_is_bounded(tmp_path: Path, cache: QueryCache) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'bounded.db'}", query_cache_size=20)
    Base.metadata.create_all(engine)
    before = alive(Analysis), alive(Plan)
    with Session(engine) as db:
        cache.attach(db)
        for number in range(200):
            db.execute(select(Tag.id.label(f"x{number}")), execution_options=CACHED)
        # another 50 % is what SQLAlchemy's own cache takes before it forgets
        assert alive(Analysis) - before[0] <= 35
        assert alive(Plan) - before[1] <= 35
    engine.dispose()


def test_B7_what_is_remembered_of_options_and_parameters_is_bounded(
    tmp_path: Path, cache: QueryCache
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'bounded.db'}")
    Base.metadata.create_all(engine)
    before = alive(CacheOptions), alive(Plan)
    with Session(engine) as db:
        cache.attach(db)
        for number in (-1, -1, -2, -2):  # both were used again once
            db.execute(select(Tag.id).where(Tag.id == number), execution_options=CACHED)
        [hot] = plans_for(-1)
        assert len(plans_for(-2)) == 1
        for number in range(2400):
            statement = select(Tag.id).where(Tag.id == number)
            db.execute(statement, execution_options={"cache_key": f"key {number}"})
            db.execute(select(Tag.id).where(Tag.id == -1), execution_options=CACHED)
        assert alive(CacheOptions) - before[0] <= 2100
        assert alive(Plan) - before[1] <= 1010
        assert [each is hot for each in plans_for(-1)] == [True], "what is used stays"
        assert plans_for(-2) == [], "what is not used any more goes"
    engine.dispose()
