"""What reviewers have found: each of these failed when it was written."""

from __future__ import annotations

import enum
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import sqlglot
from dogpile.cache import make_region
from sqlalchemy import (
    ARRAY,
    Column,
    DateTime,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    Numeric,
    String,
    Table,
    bindparam,
    cast,
    column,
    create_engine,
    event,
    func,
    literal,
    literal_column,
    select,
    table,
    text,
    type_coerce,
    update,
    values,
)
from sqlalchemy.exc import ArgumentError, InvalidRequestError, ResourceClosedError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    relationship,
    scoped_session,
    selectinload,
    sessionmaker,
)
from sqlalchemy.schema import CreateTable
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

from querycache import ConfigurationError, QueryCache
from querycache.analysis import analyse
from querycache.textual import read_text

_shift: ContextVar[int] = ContextVar("shift", default=0)


class Base(DeclarativeBase):
    pass


class Shifted(TypeDecorator[int]):
    """As a type does that reads the time zone, the tenant or the encryption key of the current request."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value + _shift.get()


class Shouted(TypeDecorator[str]):
    impl = String
    cache_ok = True


class Item(Base):
    __tablename__ = "found_item"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(10), default="special")
    name: Mapped[str] = mapped_column(String(20), default="")
    place: Mapped[int] = mapped_column(Shifted, default=0)
    parts: Mapped[list[Part]] = relationship()
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "item"}


class Special(Item):
    __mapper_args__ = {"polymorphic_identity": "special"}


class Part(Base):
    __tablename__ = "found_part"
    id: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[int] = mapped_column(ForeignKey("found_item.id"))
    amount: Mapped[int] = mapped_column(default=0)


class utcnow(FunctionElement[Any]):
    """The recipe of SQLAlchemy's documentation, "UTC timestamp" function."""

    type = String()
    inherit_cache = True


@compiles(utcnow)
def _compile_utcnow(element: Any, compiler: Any, **kwargs: Any) -> str:
    return "hex(randomblob(8))" if compiler.dialect.name == "sqlite" else "cast(clock_timestamp() as text)"


class amount_of_all_parts(FunctionElement[int]):
    type = Integer()
    inherit_cache = True


@compiles(amount_of_all_parts)
def _compile_amount(element: Any, compiler: Any, **kwargs: Any) -> str:
    return "(SELECT sum(amount) FROM found_part)"


def _fill(engine: Engine) -> None:
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with Session(engine) as db, db.begin():
        db.add_all(Special(id=n, name=f"n{n}", parts=[Part(id=n, amount=1)]) for n in range(1, 6))


@pytest.fixture
def cache() -> QueryCache:
    return QueryCache()


@pytest.fixture
def Sessions(sqlite_engine: Engine, cache: QueryCache) -> sessionmaker[Session]:
    _fill(sqlite_engine)
    made = sessionmaker(sqlite_engine)
    cache.attach(made)
    return made


def test_found_a_statement_kept_whose_type_reads_the_context(Sessions: sessionmaker[Session]) -> None:
    """Plan.repeatable takes the processed parameters of a statement object for good."""
    with Sessions() as db, db.begin():
        db.add(Special(id=10, name="mine", place=100))
        db.add(Special(id=11, name="theirs", place=107))
    statement = select(Item.name).where(Item.place == 100)
    cached = statement.execution_options(cache_key=True)
    with Sessions() as db:
        assert db.scalars(cached).all() == ["mine"]
        token = _shift.set(7)
        try:
            assert db.scalars(statement).all() == ["theirs"]
            assert db.scalars(cached).all() == ["theirs"]
        finally:
            _shift.reset(token)


def test_found_flags_without_a_name(Sessions: sessionmaker[Session]) -> None:
    """0 and what has bits that are not declared are called None; below 3.11 every combination is."""

    class Right(enum.IntFlag):
        READ = 1
        WRITE = 2

    with Sessions() as db:
        for value in (Right(0), Right(8), Right(16)):
            statement = select(literal(value, Integer)).execution_options(cache_key=True)
            assert db.scalars(statement).all() == [int(value)]


def test_found_a_member_of_an_enum_whose_value_has_changed(Sessions: sessionmaker[Session]) -> None:
    """As a release does that renumbers the members; the driver is given the value, and the key has the name."""
    with Sessions() as db:
        for number in (1, 2):
            state = enum.IntEnum("State", {"OPEN": number})  # type: ignore[misc]
            statement = select(literal(state.OPEN, Integer)).execution_options(cache_key=True)  # type: ignore[attr-defined]
            assert db.scalars(statement).all() == [number]


def test_found_a_function_of_the_application_that_renders_the_clock(Sessions: sessionmaker[Session]) -> None:
    statement = select(Item.id, utcnow()).where(Item.id == 1).execution_options(cache_key=True)
    with Sessions() as db:
        assert db.execute(statement).one() != db.execute(statement).one()


def test_found_a_function_of_the_application_that_renders_a_subquery(Sessions: sessionmaker[Session]) -> None:
    statement = select(Item.id, amount_of_all_parts()).where(Item.id == 1)
    cached = statement.execution_options(cache_key=True)
    with Sessions() as db:
        db.execute(cached).all()
    with Sessions() as db, db.begin():
        db.execute(update(Part).values(amount=2))
    with Sessions() as db:
        assert db.execute(cached).all() == db.execute(statement).all()


class WithAmount(TypeDecorator[str]):
    impl = String
    cache_ok = True

    def column_expression(self, column: Any) -> Any:
        return column.op("||")(amount_of_all_parts())


class FromAmount(TypeDecorator[int]):
    impl = Integer
    cache_ok = True

    def bind_expression(self, bindvalue: Any) -> Any:
        return bindvalue + amount_of_all_parts()


@pytest.mark.parametrize(
    "statement",
    [
        select(type_coerce(Item.name, WithAmount)).where(Item.id == 1),
        select(Item.name, literal(1, FromAmount)).where(Item.id == 1),
    ],
    ids=["column", "parameter"],
)
def test_found_such_a_function_that_a_type_makes(Sessions: sessionmaker[Session], statement: Any) -> None:
    cached = statement.execution_options(cache_key=True)
    for _ in range(2):
        with Sessions() as db:
            db.execute(cached).all()
    with Sessions() as db, db.begin():
        db.execute(update(Part).values(amount=2))
    with Sessions() as db:
        assert db.execute(cached).all() == db.execute(statement).all()


def test_found_such_a_function_that_a_type_makes_of_values(postgresql_engine: Engine) -> None:
    made = values(column("k", FromAmount), name="v").data([(1,)])
    compiled: Any = select(made.c.k).compile(postgresql_engine)
    assert analyse(compiled).functions == {"@compiles.amount_of_all_parts"}


@pytest.fixture
def running_listener() -> Iterator[None]:
    def run(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
        cursor.execute(statement, parameters)
        return True

    event.listen(Engine, "do_execute", run)
    yield
    event.remove(Engine, "do_execute", run)


@pytest.mark.usefixtures("running_listener")
def test_found_a_listener_of_all_engines_that_runs_statements(Sessions: sessionmaker[Session]) -> None:
    """heed_others() looks at the dialect's own listeners, and not at those of its class."""
    cached = select(Item.name).where(Item.id == 1).execution_options(cache_key=True)
    with Sessions() as db:
        db.scalars(cached).all()
    with Sessions() as db, db.begin():
        db.execute(update(Item).values(name="new"))
    with Sessions() as db:
        assert db.scalars(cached).all() == ["new"]


def test_found_two_databases_behind_one_url(tmp_path: Path) -> None:
    """A creator (or do_connect) decides what is connected to, whatever the URL says: then `scope` must."""
    made: sessionmaker[Session] = sessionmaker()
    QueryCache(scope=lambda session: session.info["tenant"]).attach(made)
    found = []
    for tenant in ("a", "b"):
        path = tmp_path / tenant
        engine = create_engine("sqlite:///tenants.db", creator=lambda path=path: sqlite3.connect(path))  # type: ignore[misc]
        _fill(engine)
        with Session(engine) as db, db.begin():
            db.execute(update(Item).values(name=tenant))
        with made(bind=engine, info={"tenant": tenant}) as db:
            found.append(db.scalar(select(Item.name).execution_options(cache_key=True)))
        engine.dispose()
    assert found == ["a", "b"]


def test_found_an_entry_that_grows_with_each_value(
    Sessions: sessionmaker[Session], cache: QueryCache
) -> None:
    """discriminators() compares numbers of parameters, and single inheritance compiles one of its own."""
    keys = set()
    with Sessions() as db:
        for bound in range(5):
            parts = Special.parts.and_(Part.amount > bound)
            statement = select(Special).options(selectinload(parts)).execution_options(cache_key=True)
            db.scalars(statement).all()
            keys.add(cache.explain(db, statement).key)
    assert len(keys) == 5


@pytest.mark.parametrize("options", [{"stream_results": True}, {"yield_per": 2}], ids=repr)
def test_found_an_engine_that_streams(
    postgresql_engine: Engine, cache: QueryCache, options: dict[str, Any]
) -> None:
    """partitions() and fetchmany() begin with the first row each time, and never end."""
    _fill(postgresql_engine)
    made = sessionmaker(postgresql_engine.execution_options(**options))
    cache.attach(made)
    statement = select(Item.id).order_by(Item.id)
    for each in (statement, *[statement.execution_options(cache_key=True)] * 2):
        with made() as db:
            pieces = [[row[0] for row in piece] for piece in islice(db.execute(each).partitions(2), 10)]
            assert pieces == [[1, 2], [3, 4], [5]]


def test_found_snapshots_that_a_listener_asks_for(postgresql_engine: Engine, cache: QueryCache) -> None:
    """The driver's own isolation level is not looked at, as its autocommit is."""
    psycopg = pytest.importorskip("psycopg")
    _fill(postgresql_engine)
    other = create_engine(postgresql_engine.url)

    @event.listens_for(other, "connect")
    def repeatable(connection: Any, record: Any) -> None:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ

    cached = select(Item.name).where(Item.id == 1).execution_options(cache_key=True)
    now, then = sessionmaker(postgresql_engine), sessionmaker(other)
    cache.attach(now).attach(then)
    try:
        with then() as old:
            old.execute(select(Item.id)).all()
            with now() as db, db.begin():
                db.execute(update(Item).values(name="new"))
            assert old.scalars(cached).all() == ["n1"]
        with now() as db:
            assert db.scalars(cached).all() == ["new"]
    finally:
        other.dispose()


def test_found_a_wire_that_was_interrupted(redis_store_url: str) -> None:
    """A time limit (Celery's, gunicorn's) that strikes in Wire._finish() leaves a reply that nobody reads."""
    import redis

    from querycache.backends.redis import RedisBackend

    class TimeIsUp(Exception):
        pass

    def strike(*args: Any) -> None:
        raise TimeIsUp

    busy = (
        "local function now() local t = redis.call('TIME') return t[1] * 1000000 + t[2] end "
        "local till = now() + 300000 repeat until now() > till return 1"
    )
    store = RedisBackend({"url": redis_store_url})
    store.store("entry", b"content")
    marks = store.begin(["tag"])
    client = redis.Redis.from_url(redis_store_url.partition("?")[0])
    blocker = threading.Thread(target=client.eval, args=(busy, 0))
    before = signal.signal(signal.SIGALRM, strike)
    try:
        blocker.start()
        time.sleep(0.05)
        store.end(marks)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(TimeIsUp):
            store.fetch("entry", ["tag"])
        assert store.fetch("entry", ["tag"])[0] == b"content"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        blocker.join()
        client.close()
        store.close()


def test_found_a_bad_option_that_nobody_is_told_of() -> None:
    with pytest.raises(ConfigurationError, match="ssl_cert_reqs"):
        QueryCache("rediss://localhost:6379/0?ssl_cert_reqs=requierd")


def test_found_a_policy_of_what_is_not_mapped() -> None:
    from querycache import Policy

    with pytest.raises(ConfigurationError, match="not a mapped class"):
        QueryCache(policies={int: Policy()})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_found_a_process_forked_during_a_flight(
    Sessions: sessionmaker[Session], sqlite_engine: Engine
) -> None:
    """The child waits a second for a flight whose pilot is not in it."""
    statement = select(Item.name).execution_options(cache_key=True)
    flying, landing = threading.Event(), threading.Event()

    def stop(*args: Any) -> None:
        if threading.current_thread() is pilot:
            flying.set()
            landing.wait(10)

    def fly() -> None:
        with Sessions() as db:
            db.scalars(statement).all()

    event.listen(sqlite_engine, "before_cursor_execute", stop)
    pilot = threading.Thread(target=fly)
    pilot.start()
    assert flying.wait(10)
    child = os.fork()
    if child == 0:
        took = 9.0
        try:
            sqlite_engine.dispose(close=False)
            begun = time.monotonic()
            fly()
            took = time.monotonic() - begun
        finally:
            os._exit(int(took > 0.5))
    _, status = os.waitpid(child, 0)
    landing.set()
    pilot.join()
    assert status == 0


def test_found_a_function_of_a_schema_that_is_called_like_a_known_one(
    Sessions: sessionmaker[Session],
) -> None:
    """app.total() is not SQLite's total(), nor stats.count() SQL's count()."""
    cache = QueryCache()
    with Sessions() as db:
        cache.attach(db)
        for function in (func.app.total(), func.stats.count()):
            explanation = cache.explain(db, select(Item.id, function).execution_options(cache_key=True))
            assert not explanation.cacheable


@pytest.mark.parametrize(
    ("call", "stable"),
    [
        ("app.total(price)", False),
        ('"app"."total"(price)', False),
        ("app . total (price)", False),
        ("pg_catalog.count(*)", True),
        ("count(*)", True),
    ],
)
def test_found_the_same_in_text(
    Sessions: sessionmaker[Session], cache: QueryCache, call: str, stable: bool
) -> None:
    with Sessions() as db:
        piece = select(Item.id, literal_column(call)).execution_options(cache_key=True)
        whole = text(f"SELECT {call} FROM found_item").columns(column("a")).execution_options(cache_key=True)
        assert [cache.explain(db, each).cacheable for each in (piece, whole)] == [stable, stable]
        cache.depends("total", on=["found_part"])
        assert cache.explain(db, piece).cacheable


@pytest.mark.parametrize(
    "words",
    [
        "'now'::timestamp",
        "timestamp 'now'",
        "cast('today' as date)",
        "timestamp 'today 08:00'",
        "$$now$$::timestamp",
        "$a$tomorrow 09:30$a$::timestamp",
    ],
)
def test_found_a_literal_that_is_the_clock(postgresql_engine: Engine, cache: QueryCache, words: str) -> None:
    _fill(postgresql_engine)
    with Session(postgresql_engine) as db:
        cache.attach(db)
        statement = select(Item.id, literal_column(words)).execution_options(cache_key=True)
        assert not cache.explain(db, statement).cacheable


def test_found_a_parameter_that_is_the_clock(postgresql_engine: Engine, cache: QueryCache) -> None:
    """PostgreSQL takes the text for a moment where a moment is wanted, and for itself where a text is."""
    _fill(postgresql_engine)
    with Session(postgresql_engine) as db:
        cache.attach(db)
        moments = [
            select(Item.id, cast(" Now", DateTime)),
            select(cast("today 08:00", DateTime)),
            select(cast(literal("now"), DateTime)),
            select(cast(bindparam("moment", "now"), DateTime)),
            select(cast(["2026-01-01", "now"], ARRAY(DateTime))),
            select(cast(literal("{now}"), ARRAY(DateTime))),
            text("SELECT cast(:moment AS timestamp) FROM found_item").bindparams(moment="now"),
        ]
        words = [
            select(Item.id).where(literal("now") != "then"),
            select(Item.id).where(literal("buy now") != "then", cast("then", Shouted) != "now or never"),
            select(Item.id).where(literal("today", Shouted) != "then"),
            select(Item.id).where(cast(literal("knowing"), String) != "then"),
        ]
        for statements, cacheable in ((moments, False), (words, True)):
            for statement in statements:
                explained = cache.explain(db, statement.execution_options(cache_key=True))
                assert explained.cacheable is cacheable, (str(statement), explained)


@pytest.mark.parametrize(
    ("words", "stable"),
    [("@counter", False), ("@@timestamp", False), ("utc_timestamp", False), ("'me@example.org'", True)],
)
def test_found_variables_and_clocks_of_mariadb(
    mariadb_engine: Engine, cache: QueryCache, words: str, stable: bool
) -> None:
    _fill(mariadb_engine)
    with Session(mariadb_engine) as db:
        cache.attach(db)
        piece = select(Item.id, literal_column(words)).execution_options(cache_key=True)
        whole = text(f"SELECT {words} FROM found_item").columns(column("a")).execution_options(cache_key=True)
        assert [cache.explain(db, each).cacheable for each in (piece, whole)] == [stable, stable]


def test_found_a_catalog_that_ddl_changes(Sessions: sessionmaker[Session], cache: QueryCache) -> None:
    statement = text("SELECT name FROM sqlite_master WHERE name = 'found_new'").columns(column("name"))
    cached = statement.execution_options(cache_key=True)
    with Sessions() as db:
        assert db.scalars(cached).all() == []
        db.execute(CreateTable(Table("found_new", MetaData(), Column("id", Integer))))
        db.commit()
        assert db.scalars(cached).all() == ["found_new"]


def test_found_a_replay_begun_before_the_session_was_emptied(
    sqlite_engine: Engine, redis_store_url: str
) -> None:
    """What is begun while the cache server is at work holds the identity map that the session had then."""
    _fill(sqlite_engine)
    cache = QueryCache(redis_store_url, lease=0.1)
    made = sessionmaker(sqlite_engine)
    cache.attach(made)
    statement = select(Part).order_by(Part.id)
    cached = statement.execution_options(cache_key=True, cache_mode="refresh")
    for _ in range(3):
        with made() as db:
            assert len(db.scalars(cached).all()) == 5
    event.listen(made, "after_begin", lambda session, transaction, connection: session.expunge_all())
    with made() as db:
        assert len(db.scalars(statement).all()) == 5
    with made() as db:
        assert len(db.scalars(cached).all()) == 5


def test_found_an_answer_from_before_a_view_was_declared(sqlite_engine: Engine) -> None:
    """What was stored by who did not know what the view is made of does not have the tags that it needs."""
    _fill(sqlite_engine)
    with sqlite_engine.begin() as connection:
        connection.execute(text("CREATE VIEW found_view AS SELECT count(*) AS n FROM found_part"))
    store = make_region().configure("querycache.memory")
    view = table("found_view", column("n"))
    kept = select(view.c.n).execution_options(cache_key="view")

    def process() -> tuple[QueryCache, sessionmaker[Session]]:
        cache, made = QueryCache(store), sessionmaker(sqlite_engine)
        cache.attach(made)
        return cache, made

    def look(made: sessionmaker[Session], statement: Any) -> Any:
        with made() as db:
            return db.scalar(statement)

    cache, made = process()
    try:
        assert look(made, kept) == 5
        cache.depends("found_view", on=["found_part"])
        with made.begin() as db:
            db.add(Part(id=6, item_id=1))
        assert look(made, kept) == look(made, select(view.c.n).execution_options(cache_key="view")) == 6
        later, made = process()
        later.depends("found_view", on=["found_part"])
        with made.begin() as db:
            db.add(Part(id=7, item_id=1))
        assert look(made, kept) == 7
    finally:
        with sqlite_engine.begin() as connection:
            connection.execute(text("DROP VIEW found_view"))


def test_found_another_number_of_slots_after_a_restart(sqlite_engine: Engine) -> None:
    _fill(sqlite_engine)
    with Session(sqlite_engine) as db, db.begin():
        db.add(Special(id=2000, name="new"))
    store = make_region().configure("querycache.memory")
    statement = select(Item.name).where(Item.id == 2000).execution_options(cache_key=True)
    for slots, name in ((1024, "first"), (4096, "second")):
        engine = create_engine(sqlite_engine.url)  # as another process has
        cache, made = QueryCache(store, slots=slots), sessionmaker(engine)
        cache.attach(made)
        with made.begin() as db:
            db.get_one(Item, 2000).name = name
        with made() as db:
            assert [db.scalar(statement) for _ in range(2)] == [name, name]


def test_found_invalidate_with_a_session_that_nobody_watches(
    Sessions: sessionmaker[Session], cache: QueryCache, tmp_path: Path
) -> None:
    statement = select(Part.amount).where(Part.id == 1).execution_options(cache_key="k")

    def look() -> str:
        with Sessions() as db, cache.recording() as events:
            db.scalars(statement).all()
        return events[0].outcome

    assert [look(), look()] == ["miss", "hit"]
    with Session(create_engine(f"sqlite:///{tmp_path}/other.db")) as other, other.begin():
        cache.invalidate(key="k", session=other)
        assert look() == "hit"
    assert look() == "stale"


def test_found_invalidate_with_a_session_that_cannot_tell_its_database(
    Sessions: sessionmaker[Session], cache: QueryCache, sqlite_engine: Engine
) -> None:
    def choose(*arguments: Any, **named: Any) -> str:
        return "a"

    sharded = ShardedSession(
        shards={"a": sqlite_engine},
        shard_chooser=choose,
        identity_chooser=lambda *arguments, **named: ["a"],
        execute_chooser=lambda state: ["a"],
    )
    for session in (sharded, Session(binds={Part: sqlite_engine}), Session()):
        with session, pytest.raises(ConfigurationError, match=r"connection\(bind_arguments=…\)"):
            cache.invalidate(key="k", session=session)
    with pytest.raises(ConfigurationError, match="give a Session"):
        cache.invalidate(key="k", session="x")  # type: ignore[arg-type]
    statement = select(Part.amount).where(Part.id == 1).execution_options(cache_key="k")
    with Session(binds={Part: sqlite_engine}) as db:
        cache.attach(db)
        db.scalars(statement).all()
        cache.invalidate(key="k", session=db)
        db.commit()
        with cache.recording() as events:
            db.scalars(statement).all()
    assert events[0].outcome in ("stale", "miss")
    scoped = scoped_session(Sessions)
    cache.invalidate(key="k", session=scoped)
    scoped.remove()


def test_found_texts_in_the_style_of_dogpile() -> None:
    """Its configure_from_config takes what an .ini file has, which is texts."""
    cache = QueryCache.from_config(
        {"cache.a.backend": "querycache.memory", "cache.a.expiration_time": "60"}, lease=1.0
    )
    assert cache._regions.get("a").ttl == 60


def test_found_a_parser_that_speaks_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        read_text("ALTER TABLE found_item ENGINE = InnoDB, ALGORITHM = WHATEVER, LOCK", "mysql")
    assert not caplog.records
    sqlglot.parse("ALTER TABLE found_item ENGINE = InnoDB, ALGORITHM = WHATEVER, LOCK", dialect="mysql")
    assert caplog.records


def test_found_a_hit_where_the_transaction_has_ended(Sessions: sessionmaker[Session]) -> None:
    statement = select(Item.id).execution_options(cache_key=True)
    with Sessions() as db:
        db.scalars(statement).all()
        for begin in (db.begin_nested, db.get_transaction):
            with pytest.raises(InvalidRequestError, match="closed transaction"), begin() as transaction:  # type: ignore[union-attr]
                transaction.rollback()
                db.scalars(statement)


def test_found_a_hit_where_the_connection_is_closed(
    sqlite_engine: Engine, Sessions: sessionmaker[Session]
) -> None:
    statement = select(Item.id).execution_options(cache_key=True)
    with Sessions() as db:
        db.scalars(statement).all()
    with sqlite_engine.connect() as connection:
        db = Sessions(bind=connection)
    with db, pytest.raises(ResourceClosedError):
        db.scalars(statement)


@pytest.mark.parametrize("given", [(1, 2), "ab", 5, [1]])
def test_found_parameters_that_are_none(Sessions: sessionmaker[Session], given: Any) -> None:
    statement = select(Item.id).execution_options(cache_key=True)
    with Sessions() as db:
        db.scalars(statement).all()
        with pytest.raises(ArgumentError):
            db.execute(statement, given)


def test_found_a_number_that_looks_like_a_uuid(Sessions: sessionmaker[Session]) -> None:
    """SQLite compares the text with an integer column as the number that it is."""
    with Sessions.begin() as db:
        db.add(Special(id=30))
    for number in (f"{30:032}", f"{'3e1':>032}"):
        statement = select(Item.name).where(Item.id == bindparam("id")).execution_options(cache_key=True)
        with Sessions.begin() as db:
            before = db.scalars(statement, {"id": number}).one()
            db.get_one(Item, 30).name = f"{before}!"
        with Sessions() as db:
            assert db.scalars(statement, {"id": number}).one() == f"{before}!"


def test_found_a_parameter_that_is_no_number(Sessions: sessionmaker[Session], cache: QueryCache) -> None:
    """It does not equal itself, which is no sign that somebody has rewritten the statement."""
    with Sessions() as db:
        statement = select(literal(Decimal("NaN"), Numeric)).execution_options(cache_key=True)
        with cache.recording() as events:
            for _ in range(2):
                db.scalars(statement).one()
    assert [each.outcome for each in events] == ["miss", "fill", "hit"]


@pytest.mark.parametrize("cached", [True, False])
def test_found_objects_that_are_loaded_at_once(
    sqlite_engine: Engine, Sessions: sessionmaker[Session], cached: bool
) -> None:
    """As the README says: what is read after a commit was loaded before it."""
    statement = select(Item)
    if cached:
        statement = statement.execution_options(cache_key=True)
    statements: list[str] = []
    event.listen(sqlite_engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    with Sessions() as db:
        result = db.scalars(statement)
        db.commit()
        statements.clear()
        assert [item.name for item in result] == [f"n{number}" for number in range(1, 6)]
    assert len(statements) == (5 if cached else 0)
