"""Pitfalls A, the handler. Where it is short, the naive way stands beside the promise that it breaks.

A8, handlers that come later, is in `tests/test_other_handlers.py`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import (
    Engine,
    FrozenResult,
    Result,
    column,
    create_engine,
    event,
    func,
    insert,
    select,
    text,
    union,
    update,
)
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import ORMExecuteState, Session, joinedload, selectinload, sessionmaker
from sqlalchemy.orm.loading import merge_frozen_result

from querycache import CacheMiss, Policy, QueryCache
from tests.read_path.models import Post, Tag, Team, User
from tests.read_path.observe import traffic

Sessions = Callable[[Engine], sessionmaker[Session]]


@contextmanager
def recipe(maker: sessionmaker[Session]) -> Iterator[dict[Any, FrozenResult[Any]]]:
    """The way of SQLAlchemy's documentation, shortened: freeze the result under the key that was given."""
    stored: dict[Any, FrozenResult[Any]] = {}

    def answer(state: ORMExecuteState) -> Any:
        key = state.execution_options.get("naive_key")
        if key is None:
            return None
        if key not in stored:
            stored[key] = state.invoke_statement().freeze()
        return merge_frozen_result(state.session, state.statement, stored[key], load=False)()

    event.listen(maker, "do_orm_execute", answer)
    try:
        yield stored
    finally:
        event.remove(maker, "do_orm_execute", answer)


# --- A1 --------------------------------------------------------------------------------------------


def test_A1_options_that_reach_post_loads_are_not_their_key(
    sqlite_forum: Engine, cache: QueryCache, sessions: Sessions
) -> None:
    maker = sessions(sqlite_forum)
    statement = select(User).options(selectinload(User.posts).selectinload(Post.comments)).order_by(User.id)
    reached = []
    event.listen(
        maker, "do_orm_execute", lambda state: reached.append(state.execution_options.get("cache_key"))
    )
    for _ in range(3):
        with maker() as db:
            users = db.scalars(statement, execution_options={"cache_key": "users"}).all()
            assert [[post.id for post in user.posts] for user in users] == [[1, 2], [3], [4, 5], []]
            assert [len(post.comments) for user in users for post in user.posts] == [3, 1, 1, 1, 0]
    assert reached == ["users"] * 9, "the option does reach the loads of posts and comments"
    assert (cache.stats().misses, cache.stats().fills, cache.stats().hits) == (1, 1, 2)


def test_A1_the_naive_way_waits_for_itself(sqlite_forum: Engine) -> None:
    maker = sessionmaker(sqlite_forum)
    making: list[str] = []

    def answer(state: ORMExecuteState) -> Any:
        key = state.execution_options["naive_key"]
        assert key not in making, "here stands the lock that is held by the load of the parents"
        making.append(key)
        return state.invoke_statement().freeze()()

    event.listen(maker, "do_orm_execute", answer)
    users = select(User).options(selectinload(User.posts))
    with maker() as db, pytest.raises(AssertionError, match="the lock"):
        db.scalars(users, execution_options={"naive_key": "users"}).all()


# --- A2 --------------------------------------------------------------------------------------------


class TaskSession(Session):
    """The synchronous half of the sessions of asyncio below."""


async def _two_tasks(url: str, cache: QueryCache) -> list[list[str]]:
    engine = create_async_engine(url)
    cache.attach(TaskSession)
    maker = async_sessionmaker(engine, sync_session_class=TaskSession)

    async def ask() -> list[str]:
        async with maker() as db:
            statement = select(Team).options(selectinload(Team.users)).order_by(Team.id)
            teams = (await db.scalars(statement, execution_options={"cache_key": "teams"})).all()
            return [user.name for team in teams for user in team.users]

    try:
        return await asyncio.gather(ask(), ask(), ask())
    finally:
        cache.detach(TaskSession)
        await engine.dispose()


def test_A2_tasks_that_miss_one_key_do_not_wait_for_each_other(
    sqlite_forum: Engine, cache: QueryCache
) -> None:
    url = sqlite_forum.url.set(drivername="sqlite+aiosqlite").render_as_string()
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(asyncio.run(_two_tasks(url, cache))), daemon=True)
    thread.start()
    thread.join(60)
    assert answers == [[["ann", "bob", "çem"]] * 3], "the loop stands still"


# --- A3 --------------------------------------------------------------------------------------------


def test_A3_miss_and_hit_return_results(sqlite_forum: Engine, cache: QueryCache, sessions: Sessions) -> None:
    statement = select(User).order_by(User.id).execution_options(cache_key=True)
    for _ in range(2):
        with sessions(sqlite_forum)() as db:
            result = db.execute(statement)
            assert isinstance(result, Result)
            assert [user.id for (user,) in result] == [1, 2, 3, 4]
            assert not callable(result)


# --- A4 --------------------------------------------------------------------------------------------


def test_A4_one_key_given_to_session_get(sqlite_forum: Engine, cache: QueryCache, sessions: Sessions) -> None:
    maker, options = sessions(sqlite_forum), {"cache_key": "user"}
    for _ in range(2):
        with maker() as db:
            found = [db.get(User, number, execution_options=options) for number in (1, 2, 99, 3)]
            assert [user and user.id for user in found] == [1, 2, None, 3]
            team = db.get(Team, 1, execution_options=options)
            assert isinstance(team, Team)
    assert cache.stats().hits == 5


def test_A4_the_naive_way_gets_the_wrong_object(sqlite_forum: Engine) -> None:
    maker = sessionmaker(sqlite_forum)
    with recipe(maker):
        for number in (1, 2):
            with maker() as db:
                user = db.get(User, number, execution_options={"naive_key": "user"})
        assert user is not None
        assert user.id == 1


def test_A4_one_key_given_to_everything(sqlite_forum: Engine, cache: QueryCache) -> None:
    """As the options of a Session of 2.1 do, and handlers that put an option on what comes along."""
    maker = sessionmaker(sqlite_forum)
    event.listen(maker, "do_orm_execute", lambda state: state.update_execution_options(cache_key="all"))
    cache.attach(maker)
    for _ in range(2):
        with maker() as db:
            assert [user.id for user in db.scalars(select(User).order_by(User.id))] == [1, 2, 3, 4]
            assert [tag.name for tag in db.scalars(select(Tag).order_by(Tag.id))] == ["sql", "orm", "unused"]
            assert db.scalar(select(func.count(Post.id))) == 5
            assert db.scalar(select(func.count(Post.id)).where(Post.score > 4)) == 2
            user = db.get_one(User, 1)
            assert [post.id for post in user.posts] == [1, 2]
            assert user.motto == "more"
    assert cache.stats().fills == cache.stats().hits == 6


# --- A5 --------------------------------------------------------------------------------------------

A5 = {
    "text with columns": text("SELECT id, name FROM tag ORDER BY id").columns(Tag.id, Tag.name),
    "entities from text": select(Tag).from_statement(text("SELECT * FROM tag ORDER BY id")),
    "union": union(select(Tag.id, Tag.name), select(Team.id, Team.name)).order_by("id", "name"),
    "entities from a union": select(Tag).from_statement(
        union(select(Tag).where(Tag.id == 1), select(Tag).where(Tag.id == 2)).order_by("id")
    ),
}


@pytest.mark.parametrize("statement", A5.values(), ids=A5)
def test_A5_text_and_unions(
    statement: Any, sqlite_forum: Engine, cache: QueryCache, sessions: Sessions
) -> None:
    maker = sessions(sqlite_forum)

    def rows(options: dict[str, Any]) -> list[Any]:
        with maker() as db:
            return [
                [getattr(each, "name", each) for each in row]
                for row in db.execute(statement, execution_options=options)
            ]

    expected = rows({})
    assert expected
    assert rows({"cache_key": True}) == expected
    assert rows({"cache_key": True}) == expected
    assert cache.stats().hits == 1


def test_A5_the_naive_way_raises(sqlite_forum: Engine) -> None:
    maker = sessionmaker(sqlite_forum)
    with (
        recipe(maker),
        maker() as db,
        pytest.raises((InvalidRequestError, AttributeError, NotImplementedError)),
    ):
        db.execute(A5["union"], execution_options={"naive_key": 1})


# --- A6 --------------------------------------------------------------------------------------------


def test_A6_only_from_the_cache(sqlite_forum: Engine, cache: QueryCache, sessions: Sessions) -> None:
    statement = select(User.name).order_by(User.id).execution_options(cache_key="names")
    only = statement.execution_options(cache_mode="only")
    with sessions(sqlite_forum)() as db:
        with (
            traffic(sqlite_forum) as seen,
            pytest.raises(CacheMiss, match=r"'default'.*'names'.*cache_mode='only'"),
        ):
            db.scalars(only)
        assert seen.nothing
        expected = db.scalars(statement).all()
        assert db.scalars(only).all() == expected
        cache.invalidate(key="names")
        with pytest.raises(CacheMiss, match="stale"):
            db.scalars(only)
        derived = statement.execution_options(cache_key=True, cache_mode="only")
        with pytest.raises(CacheMiss, match=r"no answer for '\w+' \(miss\)"):
            db.scalars(derived)
    assert (cache.stats().hits, cache.stats().misses, cache.stats().stale) == (1, 3, 1)


def test_A6_only_from_the_cache_also_where_it_is_bypassed(own_forum: Engine, sessions: Sessions) -> None:
    only = {"cache_key": "names", "cache_mode": "only"}
    statement = select(User).order_by(User.id)
    with sessions(own_forum)() as db:
        db.scalars(statement.execution_options(cache_key="names")).all()
        with pytest.raises(CacheMiss, match="for update"):
            db.scalars(statement.with_for_update().execution_options(**only))
        # near relatives of what is stored, which need more than that
        with pytest.raises(CacheMiss):
            db.scalars(statement.options(selectinload(User.posts)).execution_options(**only)).all()
        db.execute(update(User).values(name="new"))
        with pytest.raises(CacheMiss, match="own write"):
            db.scalars(statement.execution_options(**only))


# --- A7 --------------------------------------------------------------------------------------------

NEVER = {
    "for update": (select(User).with_for_update(), {}),
    "skip locked": (select(User).with_for_update(skip_locked=True), {}),
    "for share": (select(User).with_for_update(read=True), {}),
    "lock in a subquery": (select(User).where(User.id.in_(select(Post.author_id).with_for_update())), {}),
    "insert returning": (insert(Team).values(id=90, name="new").returning(Team), {}),
    "update returning": (update(Team).values(name="new").returning(Team.id), {}),
    "entities from an update": (
        select(Team).from_statement(update(Team).values(name="x").returning(Team)),
        {},
    ),
    "populate_existing": (select(User), {"populate_existing": True}),
    "yield_per": (select(User), {"yield_per": 2}),
    "stream_results": (select(User), {"stream_results": True}),
}


@pytest.mark.parametrize(("statement", "options"), NEVER.values(), ids=NEVER)
def test_A7_never_cached(
    statement: Any, options: dict[str, Any], sqlite_forum: Engine, cache: QueryCache, sessions: Sessions
) -> None:
    maker = sessions(sqlite_forum)
    with cache.recording() as events:
        for _ in range(2):
            with maker() as db, traffic(sqlite_forum) as seen:
                db.execute(statement, execution_options={**options, "cache_key": True}).all()
                assert len(seen.statements) == 1
                db.rollback()
    assert [event.outcome for event in events] == ["bypass", "bypass"]
    assert all(event.reason for event in events)


def test_A7_the_naive_way_stores_locks(sqlite_forum: Engine) -> None:
    maker = sessionmaker(sqlite_forum)
    with recipe(maker) as stored, maker() as db:
        db.execute(NEVER["for update"][0], execution_options={"naive_key": 1}).all()
        with traffic(sqlite_forum) as seen:
            db.execute(NEVER["for update"][0], execution_options={"naive_key": 1}).all()
    assert stored
    assert seen.nothing, "and so gives a lock that nobody holds"


LOCKS = [
    "FOR UPDATE",
    "for share",
    "FOR NO KEY UPDATE SKIP LOCKED",
    "FOR /* the reader */ KEY  SHARE",
    "LOCK IN SHARE MODE",
]
LOCKED_BY_TEXT: dict[str, Callable[[str], Any]] = {
    "text": lambda lock: text(f"SELECT id FROM tag {lock}"),
    "entities from text": lambda lock: select(Tag).from_statement(text(f"SELECT * FROM tag {lock}")),
    "text with columns": lambda lock: text(f"SELECT id FROM tag {lock}").columns(Tag.id),
    "suffix": lambda lock: select(Tag).suffix_with(text(lock)),
    "two suffixes": lambda lock: select(Tag).suffix_with(lock.split()[0]).suffix_with(lock.split(None, 1)[1]),
    "hint": lambda lock: select(Tag.id).with_statement_hint(lock),
    "text in FROM": lambda lock: select(text("x.id")).select_from(text(f"(SELECT id FROM tag {lock}) AS x")),
}


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("make", LOCKED_BY_TEXT.values(), ids=LOCKED_BY_TEXT)
def test_A7_locks_that_text_takes(
    make: Callable[[str], Any], lock: str, cache: QueryCache, sessions: Sessions
) -> None:
    """Whatever else is said of the text."""
    with sessions(create_engine("postgresql+psycopg://"))() as db:  # which is not asked
        for options in ({}, {"cache_ttl": 60, "cache_tables": ["tag"]}):
            told = cache.explain(db, make(lock).execution_options(cache_key=True, **options))
            assert told.reason == "for update"


NO_QUERIES = [
    "UPDATE tag SET name = name RETURNING id",
    "/* a */ DELETE FROM tag WHERE id = 1 RETURNING id",
    "INSERT INTO tag (name) VALUES ('new') RETURNING id",
    "WITH gone AS (DELETE FROM tag RETURNING id) SELECT id FROM gone",
    "FETCH 2 IN numbers",
    "EXECUTE raise_prices",
    "CALL raise_prices()",
    "HANDLER tag READ FIRST",
    "SHOW application_name",
    "DESCRIBE tag",
    "PRAGMA user_version",
    "EXPLAIN SELECT * FROM tag",
    "EXPLAIN ANALYZE DELETE FROM tag",
    "",
]
WHOLE: dict[str, Callable[[str], Any]] = {
    "text": text,
    "columns": lambda sql: text(sql).columns(column("id")),
    "entities": lambda sql: select(Tag).from_statement(text(sql)),
    "entities of columns": lambda sql: select(Tag).from_statement(text(sql).columns(Tag.id)),
    "CTE": lambda sql: select(text(sql).columns(column("id")).cte("x")),
    "subquery": lambda sql: select(text(sql).columns(column("id")).subquery("x")),
}


@pytest.mark.parametrize("sql", NO_QUERIES)
@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
def test_A7_text_that_is_no_query(
    make: Callable[[str], Any], sql: str, cache: QueryCache, sessions: Sessions
) -> None:
    with sessions(create_engine("postgresql+psycopg://"))() as db:
        for options in ({}, {"cache_ttl": 60, "cache_tables": ["tag"]}):
            told = cache.explain(db, make(sql).execution_options(cache_key=True, **options))
            assert told.reason == "not a select"


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT id FROM tag",
        "(SELECT id FROM tag) UNION ALL (SELECT id FROM tag)",
        "-- all of them\nSELECT id FROM tag",
        "/* all */ WITH x AS (SELECT id FROM tag) SELECT id FROM x",
    ],
)
@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
def test_A7_text_that_is_a_query_is_cached(
    make: Callable[[str], Any], sql: str, cache: QueryCache, sessions: Sessions
) -> None:
    with sessions(create_engine("postgresql+psycopg://"))() as db:
        assert cache.explain(db, make(sql).execution_options(cache_key=True)).cacheable


def test_A7_pieces_of_text_are_no_statements(cache: QueryCache, sessions: Sessions) -> None:
    pieces = select(Tag.id, text("1 AS one")).where(text("name <> 'x'")).order_by(text("id DESC"))
    with sessions(create_engine("postgresql+psycopg://"))() as db:
        assert cache.explain(db, pieces.execution_options(cache_key=True)).cacheable


@pytest.mark.parametrize("expire", ["expire", "refresh", "commit", "deferred"])
def test_A7_refreshes_are_asked_of_the_database(expire: str, own_forum: Engine) -> None:
    """Also under a policy, and also where the very row is in the cache."""
    cache = QueryCache(policies={User: Policy()})
    maker = sessionmaker(own_forum)
    cache.attach(maker)
    behind = create_engine(own_forum.url)
    for name in ("one", "two"):
        with maker() as db:
            user = db.get_one(User, 1)
            with behind.begin() as connection:
                connection.execute(update(User).where(User.id == 1).values(name=name, bio=name))
            if expire == "refresh":
                db.refresh(user)
            elif expire == "commit":
                db.commit()
            elif expire == "expire":
                db.expire(user, ["name"])
            assert (user.bio if expire == "deferred" else user.name) == name
    behind.dispose()
    assert cache.stats().hits == 1, "the first load of each session is no refresh"


def test_A7_yield_per_gives_chunks(sqlite_forum: Engine, cache: QueryCache, sessions: Sessions) -> None:
    maker = sessions(sqlite_forum)
    for _ in range(2):
        with maker() as db:
            result = db.execute(select(User), execution_options={"cache_key": True, "yield_per": 3})
            assert [len(chunk) for chunk in result.partitions()] == [3, 1]


def test_A7_a_joined_collection_under_yield_per_raises_as_ever(
    sqlite_forum: Engine, cache: QueryCache, sessions: Sessions
) -> None:
    statement = select(User).options(joinedload(User.posts))
    with sessions(sqlite_forum)() as db, pytest.raises(InvalidRequestError, match="yield_per"):
        db.execute(statement, execution_options={"cache_key": True, "yield_per": 3}).unique().all()
