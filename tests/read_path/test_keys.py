"""Keys: equal in every process for what is equal, and different for all that differs."""

from __future__ import annotations

import datetime as dt
import enum
import math
import sqlite3
import threading
from collections.abc import Callable
from decimal import Decimal
from ipaddress import IPv4Address, IPv4Interface
from itertools import combinations
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from psycopg import Binary
from psycopg.types.json import Json, Jsonb
from psycopg.types.multirange import Multirange
from psycopg.types.range import Range
from sqlalchemy import Engine, column, create_engine, inspect, select, table, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Mapper,
    Session,
    immediateload,
    lazyload,
    mapped_column,
    raiseload,
    relationship,
    selectin_polymorphic,
    selectinload,
    sessionmaker,
    subqueryload,
    with_loader_criteria,
)
from sqlalchemy.pool import NullPool, QueuePool, SingletonThreadPool, StaticPool

from querycache import FromCache, QueryCache, RelationshipCache
from querycache.databases import bind_identity, own_database
from querycache.keys import UnkeyableValue, canonical, digest, structure_digest
from querycache.sa_internals import cache_key_of
from tests.read_path.kinds import KINDS, kinds_for
from tests.read_path.models import Employee, Engineer, Manager, Post, Role, User
from tests.read_path.process import Process

# --- Across processes ------------------------------------------------------------------------------


def keys_of(url: str, names: list[str]) -> dict[str, list[str]]:
    """What the answers of each kind of statement are stored under, as far as events tell."""
    engine = create_engine(url)
    maker = sessionmaker(engine)
    cache = QueryCache().attach(maker)
    keys = {}
    for name in names:
        with cache.recording() as events, maker() as db:
            KINDS[name](db, {"cache_key": True})
        keys[name] = [event.key for event in events]
    engine.dispose()
    return keys


def hash_of_a_word() -> int:
    return hash("word")


def test_keys_are_equal_in_every_process(sqlite_forum: Engine, process: Process) -> None:
    url, names = sqlite_forum.url.render_as_string(), kinds_for("sqlite")
    assert process.call(hash_of_a_word) != hash_of_a_word(), "keys made with hash() would differ"
    expected = keys_of(url, names)
    assert all(expected.values())
    assert process.call(keys_of, url, names) == expected
    with Process(seed=0) as restarted:
        assert restarted.call(keys_of, url, names) == expected


# --- Parameters ------------------------------------------------------------------------------------


class Number(enum.IntEnum):
    ONE = 1


DIFFERENT: list[Any] = [
    *(
        1,
        True,
        1.0,
        "1",
        b"1",
        Decimal(1),
        Decimal("1.0"),
        Decimal("1.00"),
        Number.ONE,
        (1,),
        [1],
        {1},
        {1: 1},
    ),
    *(0, False, 0.0, -0.0, "", b"", None, (), [], {}, set(), frozenset(), bytearray(), memoryview(b"")),
    *("None", "True", "'1'", "(1,)", "[1]", "[1, 2]", "1, 2", "é", "e\u0301", "☃", "\ud800", "\x00", "\\x00"),
    *((1, 2), [1, 2], ((1,), 2), (1, (2,)), [[1], 2], [1, [2]], ([1, 2],), ["1, 2"], ["1", "2"], ["1', '2"]),
    *(
        {"a": 1, "b": 2},
        {"a": 2, "b": 1},
        {"a": [1, {"b": 2}]},
        {"a": {"b": [1, 2]}},
        {"a": None},
        {None: "a"},
    ),
    *(math.inf, -math.inf, math.nan, "nan", 2**64, -(2**64), 1e300),
    *(dt.date(2024, 1, 1), dt.datetime(2024, 1, 1), dt.time(0, 0), dt.timedelta(0), "2024-01-01"),
    dt.datetime(2024, 1, 1, tzinfo=dt.timezone.utc),
    dt.datetime(2024, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1))),
    dt.datetime(2024, 1, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1))),
    dt.datetime(2024, 7, 1, tzinfo=ZoneInfo("Europe/Rome")),
    dt.datetime(2024, 7, 1, tzinfo=ZoneInfo("America/New_York")),
    dt.datetime(2024, 1, 1, 0, 0, 0, 1),
    dt.time(0, 0, tzinfo=dt.timezone.utc),
    *(UUID(int=1), str(UUID(int=1)), IPv4Address("1.2.3.4"), IPv4Interface("1.2.3.4"), "1.2.3.4"),
    *(Role.READER, Role.AUTHOR, "READER"),
    *(Json({"a": 1}), Jsonb({"a": 1}), Json({"a": 2}), Jsonb([1]), Jsonb("a"), Jsonb(None)),
    *(Binary(b"a"), b"a", bytearray(b"a"), memoryview(b"a")),
    *(Range(1, 2), Range(1, 2, "[]"), Range(1, None), Range(empty=True), Range(Decimal(1), Decimal(2))),
    *(Multirange([]), Multirange([Range(1, 2)]), Multirange([Range(1, 2), Range(5, 6)]), [Range(1, 2)]),
]


def test_no_two_different_values_have_one_form() -> None:
    forms = [canonical(value) for value in DIFFERENT]
    assert [
        (one, other) for (one, first), (other, second) in combinations(zip(DIFFERENT, forms, strict=True), 2)
        if first == second
    ] == []  # fmt: skip


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=3)
    | st.decimals()
    | st.dates()
    | st.datetimes(timezones=st.none() | st.timezones())
    | st.times()
    | st.timedeltas()
    | st.uuids()
)
nested = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2) | st.integers(0, 2), inner, max_size=3)
    ),
    max_leaves=6,
)


def same(one: Any, other: Any) -> bool:
    """Equal and of the same types all the way down, as the database would see it."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        pairs = [(key, item, other_key, other[other_key]) for key, item in one.items() for other_key in other
                 if same(key, other_key)]  # fmt: skip
        return len(one) == len(other) == len(pairs) and all(same(each[1], each[3]) for each in pairs)
    if isinstance(one, (dt.datetime, dt.time)):
        naive = [each.replace(tzinfo=None) for each in (one, other)]
        return naive[0] == naive[1] and one.fold == other.fold and one.utcoffset() == other.utcoffset()
    return repr(one) == repr(other)


@given(nested, nested)
@example([1, 2], [12])
@example({"a": 1}, {"a": True})
def test_forms_are_equal_exactly_for_equal_values(one: Any, other: Any) -> None:
    assert (canonical(one) == canonical(other)) == same(one, other)
    assert canonical([one, other]) != canonical([other, one]) or same(one, other)


@given(
    st.dictionaries(st.text(max_size=3), st.integers(), min_size=2), st.sets(st.text(max_size=3), min_size=2)
)
def test_the_order_of_dicts_and_sets_is_no_matter(mapping: dict[str, int], members: set[str]) -> None:
    assert canonical(mapping) == canonical(dict(reversed(mapping.items())))
    shuffled = sorted(members, reverse=True)
    assert canonical(members) == canonical(set(shuffled))


class Word(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value", [object(), Word("a"), iter([]), [object()], {"a": object()}, lambda: None, Session]
)
def test_a_value_without_a_form_is_named_by_its_type(value: Any) -> None:
    """Its repr() would hold an address, or might be the same for another value."""
    with pytest.raises(UnkeyableValue) as refusal:
        canonical(value)
    assert "0x" not in str(refusal.value)
    assert refusal.value.reason.startswith("parameter type ")


@given(
    st.lists(st.text(max_size=3) | st.binary(max_size=3)),
    st.lists(st.text(max_size=3) | st.binary(max_size=3)),
)
@example(["ab", "c"], ["a", "bc"])
@example(["a", ""], ["a"])
def test_digests_do_not_run_together(one: list[str | bytes], other: list[str | bytes]) -> None:
    def as_bytes(parts: list[str | bytes]) -> list[bytes]:
        return [part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part for part in parts]

    assert (digest(one) == digest(other)) == (as_bytes(one) == as_bytes(other))


# --- Structures ------------------------------------------------------------------------------------

SAME_TEXT = {
    "entity": select(User),
    "columns": select(
        User.id, User.team_id, User.name, User.age, User.role, User.settings, User.street, User.city
    ),
    "selectin": select(User).options(selectinload(User.posts)),
    "selectin another": select(User).options(selectinload(User.comments)),
    "selectin both": select(User).options(selectinload(User.posts), selectinload(User.comments)),
    "selectin nested": select(User).options(selectinload(User.posts).selectinload(Post.comments)),
    "selectin then joined": select(User).options(selectinload(User.posts).joinedload(Post.comments)),
    "selectin with criteria": select(User).options(selectinload(User.posts.and_(Post.score > 1))),
    "selectin with other criteria": select(User).options(selectinload(User.posts.and_(Post.score < 1))),
    "selectin without a column": select(User).options(selectinload(User.posts).defer(Post.title)),
    "subquery": select(User).options(subqueryload(User.posts)),
    "immediate": select(User).options(immediateload(User.posts)),
    "lazy": select(User).options(lazyload(User.posts)),
    "raise": select(User).options(raiseload(User.posts)),
    "raise on sql": select(User).options(raiseload(User.posts, sql_only=True)),
    "criteria elsewhere": select(User).options(
        selectinload(User.posts), with_loader_criteria(Post, Post.score > 1)
    ),
}


def structure(statement: Any) -> bytes:
    return structure_digest(cache_key_of(statement))


def test_statements_of_one_text_have_structures_of_their_own() -> None:
    assert len({str(statement) for statement in SAME_TEXT.values()}) == 1
    assert len({structure(statement) for statement in SAME_TEXT.values()}) == len(SAME_TEXT)


def test_a_structure_does_not_tell_parameters() -> None:
    """They are part of the key on their own; here they would make every execution a new structure."""
    assert structure(select(User).where(User.id == 1)) == structure(select(User).where(User.id == 2))
    assert structure(select(User).where(User.id == 1)) != structure(select(User).where(User.id > 1))


@pytest.mark.parametrize("nested", ["in", "join", "column", "cte"])
def test_a_structure_does_not_depend_on_earlier_executions(sqlite_forum: Engine, nested: str) -> None:
    """The ORM completes a select when it is first compiled, nested ones too, and what is made from it later differs."""
    authors = select(Post.author_id).where(Post.score > 1)
    statement = {
        "in": select(User).where(User.id.in_(authors)),
        "join": select(User).join(authors.subquery(), text("true")),
        "column": select(User, authors.limit(1).scalar_subquery().label("author")),
        "cte": select(User).where(User.id.in_(select(authors.cte("authors")))),
    }[nested]

    def made_from_it() -> bytes:
        return structure(statement.where(User.age > 3).options(selectinload(User.posts)).limit(3))

    before = made_from_it()
    with Session(sqlite_forum) as db:
        db.execute(statement).all()
    assert made_from_it() == before


@pytest.mark.parametrize("others", [[], [selectinload(User.posts)]], ids=["alone", "beside another"])
def test_a_structure_does_not_tell_who_asks_for_the_cache(others: list[Any]) -> None:
    """So that answers are shared, and a statement given to invalidate() stands for them all."""
    asking = FromCache(ttl=60), RelationshipCache(User.comments)
    plain = select(User).options(*others)
    assert structure(select(User).options(asking[0], *others, asking[1])) == structure(plain)
    assert structure(select(Post).options(*asking)) != structure(select(User).options(*asking))


def test_a_structure_does_not_depend_on_addresses() -> None:
    """selectin_polymorphic sorts its classes by id()."""
    classes = inspect(Engineer), inspect(Manager)
    assert structure_digest(classes) == structure_digest(classes[::-1])
    assert structure_digest(classes) != structure_digest(classes[:1])
    statement = select(Employee).options(selectin_polymorphic(Employee, [Engineer, Manager]))
    key = cache_key_of(statement)
    assert key != reordered(key)
    assert structure_digest(key) == structure_digest(reordered(key))


def reordered(value: Any) -> Any:
    """A statement's key as it is in a process where the classes have other addresses."""
    if not isinstance(value, tuple):
        return value
    mappers = [each for item in value for each in (item if isinstance(item, tuple) else (item,))]
    if len(value) > 1 and all(isinstance(each, Mapper) for each in mappers):
        return value[::-1]
    return tuple(map(reordered, value))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, 23), (12, 3)),
        (("a", "b"), ("a'b",)),
        (((1,), 2), (1, (2,))),
        ((), None),
        ((1,), (True,)),
        (("1",), (1,)),
        (({"a": 1},), ({"a": 2},)),
        ((frozenset({1, 2}),), (frozenset({1}),)),
    ],
)
def test_structures_do_not_run_together(one: Any, other: Any) -> None:
    assert structure_digest(one) != structure_digest(other)


# --- Databases -------------------------------------------------------------------------------------


def test_databases_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [
        "postgresql+psycopg://me:secret@db1/a",
        "postgresql+psycopg://me:secret@db2/a",
        "postgresql+psycopg://me:secret@db1:5433/a",
        "postgresql+psycopg://me:secret@db1/b",
        "postgresql+psycopg://you:secret@db1/a",
        "postgresql+psycopg://me:secret@db1/a?options=-csearch_path%3Dtenant",
        "mysql+pymysql://me:secret@db1/a",
        f"sqlite:///{tmp_path}/a.db",
        f"sqlite:///{tmp_path}/b.db",
        "sqlite://",
        "sqlite://",
        "sqlite:///:memory:",
    ]
    identities = [bind_identity(create_engine(url)) for url in urls]
    assert len(set(identities)) == len(urls)
    assert "secret" not in "".join(identities)

    changed = create_engine("postgresql+psycopg://me:changed@db1/a")
    assert bind_identity(changed) == identities[0], "a new password is no new database"
    monkeypatch.chdir(tmp_path)
    assert bind_identity(create_engine("sqlite:///a.db")) == bind_identity(create_engine(urls[7]))
    private = create_engine("sqlite://")
    assert bind_identity(private) == bind_identity(private.execution_options(isolation_level="AUTOCOMMIT"))
    relative = create_engine("sqlite:///a.db")
    identity = bind_identity(relative)
    monkeypatch.chdir("/")
    assert bind_identity(relative) == identity, "an engine does not follow the process"


def in_memory(url: str = "sqlite://", **arguments: Any) -> tuple[Engine, Callable[[], tuple[list[int], str]]]:
    """An engine, and what asks it for the numbers of its users and tells what the cache did."""
    engine = create_engine(url, **arguments)
    sessions = sessionmaker(engine)
    cache = QueryCache("memory://").attach(sessions)

    def ask() -> tuple[list[int], str]:
        with sessions() as session, cache.recording() as events:
            numbers = session.scalars(
                select(column("id")).select_from(table("number")).execution_options(cache_key=True)
            ).all()
        return list(numbers), events[-1].outcome

    return engine, ask


def make(engine: Engine, number: int) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE number (id INTEGER)")
        connection.exec_driver_sql(f"INSERT INTO number VALUES ({number})")


def connect_in_memory() -> sqlite3.Connection:
    return sqlite3.connect(":memory:")


@pytest.mark.filterwarnings("ignore:.*uri=true:sqlalchemy.exc.SAWarning")
@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("sqlite://", dict),
        ("sqlite:///:memory:?cache=shared", dict),  # which is not told to SQLite
        ("sqlite:///file:?uri=true", lambda: {"poolclass": SingletonThreadPool}),
        ("sqlite:///file:one?vfs=memdb&uri=true", lambda: {"poolclass": SingletonThreadPool}),
        ("sqlite://", lambda: {"creator": connect_in_memory}),
        ("sqlite://", lambda: {"pool": SingletonThreadPool(connect_in_memory)}),
    ],
    ids=["usual", "not shared", "without a name", "memdb", "creator", "pool"],
)
def test_each_thread_has_its_database_in_memory(url: str, told: Any) -> None:
    engine, ask = in_memory(url, **told())
    make(engine, 1)
    assert [ask() for _ in range(2)] == [([1], "fill"), ([1], "hit")]
    found: list[Any] = []

    def other() -> None:
        with pytest.raises(OperationalError, match="no such table"):
            ask()
        make(engine, 2)
        found.extend([ask() for _ in range(2)])
        engine.dispose()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == [([2], "fill"), ([2], "hit")]


@pytest.mark.parametrize(
    ("url", "in_memory"),
    [
        ("sqlite:///file:?mode=memory", False),  # a file of that name: nobody has said uri
        ("sqlite:///file:one?mode=memory&uri=no", False),
        ("sqlite:///file:one?mode=memory&uri=yes", True),
        ("sqlite:///file::memory:?uri=1", True),
        ("sqlite:///one.db?mode=memory&uri=true", True),
        ("sqlite:///one.db", False),
        ("sqlite://", True),
    ],
)
@pytest.mark.filterwarnings("ignore:.*uri=true:sqlalchemy.exc.SAWarning")
def test_what_is_in_memory_the_url_tells(url: str, in_memory: bool) -> None:
    assert bool(own_database(create_engine(url, poolclass=SingletonThreadPool))) == in_memory


class Base(DeclarativeBase):
    pass


class Page(Base):
    __tablename__ = "page"

    id: Mapped[int] = mapped_column(primary_key=True)
    marks: Mapped[list[Mark]] = relationship(primaryjoin="Page.id == foreign(Mark.page_id)", viewonly=True)


class Mark(Base):
    __tablename__ = "mark"

    id: Mapped[int] = mapped_column(primary_key=True)
    page_id: Mapped[int]
    name: Mapped[str]


def test_what_completes_an_answer_is_of_the_thread_that_asks(tmp_path: Path) -> None:
    """Where that alone is in memory."""
    pages, marks = create_engine(f"sqlite:///{tmp_path}/pages.db"), create_engine("sqlite://")
    sessions = sessionmaker(binds={Page: pages, Mark: marks})
    cache = QueryCache("memory://").attach(sessions)
    Base.metadata.tables["page"].create(pages)
    with sessions.begin() as session:
        session.add(Page(id=1))

    def ask(options: Any) -> list[str]:
        with sessions() as session:
            statement = select(Page).options(options).execution_options(cache_key=True)
            return [mark.name for mark in session.scalars(statement).one().marks]

    def look(name: str) -> None:
        Base.metadata.tables["mark"].create(marks)
        with sessions.begin() as session:
            session.add(Mark(page_id=1, name=name))
        ready.wait(10)  # from now on nobody writes
        with cache.recording() as events:
            found[name] = [
                ask(options)
                for options in (selectinload(Page.marks), immediateload(Page.marks))
                for _ in "ab"
            ]
        assert {event.outcome for event in events} >= {"fill", "hit"}

    found: dict[str, Any] = {}
    ready = threading.Barrier(2)
    threads = [threading.Thread(target=look, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"one": [["one"]] * 4, "two": [["two"]] * 4}


@pytest.mark.parametrize(
    ("url", "pool"),
    [
        ("sqlite://", SingletonThreadPool),
        ("sqlite://", StaticPool),
        ("sqlite:///file:one?mode=memory&cache=shared&uri=true", SingletonThreadPool),
        ("sqlite:///file:two?mode=memory&cache=shared&uri=true", QueuePool),
    ],
)
def test_a_database_in_memory_is_lost_with_its_pool(url: str, pool: Any) -> None:
    engine, ask = in_memory(url, poolclass=pool)
    make(engine, 1)
    assert [ask() for _ in range(2)] == [([1], "fill"), ([1], "hit")]
    engine.dispose()
    with pytest.raises(OperationalError, match="no such table"):
        ask()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("sqlite:///file:three?mode=memory&cache=shared&uri=true", {"poolclass": SingletonThreadPool}),
        ("sqlite:///file:/four?vfs=memdb&uri=true", {"poolclass": SingletonThreadPool}),
        ("sqlite://", {"poolclass": QueuePool}),
    ],
    ids=["shared", "memdb", "creator"],
)
def test_one_database_for_all_threads(tmp_path: Path, url: str, told: dict[str, Any]) -> None:
    """Since the URL says so, or the application connects by itself."""
    creator = {"creator": lambda: sqlite3.connect(tmp_path / "x.db")} if url == "sqlite://" else {}
    engine, ask = in_memory(url, **told, **creator)
    make(engine, 1)
    assert ask() == ([1], "fill")
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(ask()))
    thread.start()
    thread.join()
    assert found == [([1], "hit")]


@pytest.mark.parametrize("pool", [QueuePool, NullPool])
def test_a_database_in_memory_for_each_connection(pool: Any) -> None:
    engine, ask = in_memory(poolclass=pool)
    for _ in range(2):
        with pytest.raises(OperationalError, match="no such table"):
            ask()
    if pool is QueuePool:
        make(engine, 1)
        assert [ask() for _ in range(2)] == [([1], "bypass")] * 2
