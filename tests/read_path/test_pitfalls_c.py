"""Pitfalls C: what merging frozen objects does to a session, and what replaying rows must not inherit.

The naive way is that of SQLAlchemy's documentation: `merge_frozen_result(load=False)` over objects, pickled as
they are for a server. C7 is a matter of speed, and is measured by the benchmarks.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, inspect, literal, select, text, update
from sqlalchemy.exc import InvalidRequestError, NoSuchColumnError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import (
    Session,
    joinedload,
    lazyload,
    selectinload,
    sessionmaker,
    subqueryload,
    with_loader_criteria,
)
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.orm.loading import merge_frozen_result

from querycache import QueryCache
from tests.read_path.models import Comment, Counter, Post, Tag, Team, User
from tests.read_path.observe import traffic

Sessions = Callable[[Engine], sessionmaker[Session]]
CACHED = {"cache_key": True}

USERS = select(User).order_by(User.id)


@pytest.fixture
def maker(own_forum: Engine, cache: QueryCache, sessions: Sessions) -> sessionmaker[Session]:
    return sessions(own_forum)


@pytest.fixture
def behind(own_forum: Engine) -> Iterator[Engine]:
    """Another way to the same database, of which the cache knows nothing: what is written here it serves stale."""
    engine = create_engine(own_forum.url)
    yield engine
    engine.dispose()


def fill(maker: sessionmaker[Session], statement: Any) -> Any:
    """Put the answer into the cache; give what the naive way would have stored."""
    with maker() as db:
        db.execute(statement, execution_options=CACHED).unique().all()
        db.expunge_all()
        return db.execute(statement).unique().freeze()


def naively(db: Session, statement: Any, frozen: Any) -> Any:
    return merge_frozen_result(db, statement, frozen, load=False)()


# --- C1 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", ["miss", "hit"])
def test_C1_unflushed_changes_stay(found: str, maker: sessionmaker[Session]) -> None:
    frozen = fill(maker, USERS) if found == "hit" else None
    with maker(autoflush=False) as db:
        user = db.get_one(User, 1)
        user.name, user.settings = "changed", {"new": 1}
        user.posts = []
        with_posts = USERS.options(selectinload(User.posts))
        for statement in (USERS, with_posts):
            assert db.scalars(statement, execution_options=CACHED).all()[0] is user
            assert (user.name, user.settings, user.posts) == ("changed", {"new": 1}, [])
            assert user in db.dirty
        if frozen is not None:
            naively(db, USERS, frozen)
            assert user.name == "ann", "the naive way loses the change"
        db.rollback()


# --- C2 --------------------------------------------------------------------------------------------


def test_C2_a_hit_flushes_first(maker: sessionmaker[Session]) -> None:
    fill(maker, USERS)
    with maker() as db:
        db.get_one(User, 1).name = "flushed"
        assert db.scalars(USERS, execution_options=CACHED).all()[0].name == "flushed"
        assert not db.dirty
        db.get_one(User, 2).name = "zoe"
        named = select(User.name).where(User.name == "zoe")
        assert db.scalars(named, execution_options=CACHED).all() == ["zoe"]


@pytest.mark.parametrize(
    "statement", [select(User.__table__.c.id), select(literal(1)), text("SELECT 1")], ids=str
)
def test_C2_what_does_not_flush_without_the_cache_does_not_with_it(
    statement: Any, maker: sessionmaker[Session], own_forum: Engine
) -> None:
    """SQLAlchemy 2.1 flushes before a statement that names no mapped class; 2.0 does not."""
    pending = []
    with Session(own_forum) as uncached, maker() as cached:
        for db, options in ((uncached, {}), (cached, CACHED), (cached, CACHED)):
            tag = Tag(name="pending")
            db.add(tag)
            db.execute(statement, execution_options=options)
            pending.append(tag in db.new)
            db.rollback()
    assert pending == [pending[0]] * 3


def test_C2_a_hit_flushes_what_it_does_not_depend_on_too(
    maker: sessionmaker[Session], cache: QueryCache
) -> None:
    fill(maker, USERS)
    with maker() as db:
        tag = Tag(name="pending")
        db.add(tag)
        with cache.recording() as events:
            db.scalars(USERS, execution_options=CACHED).all()
        assert [event.outcome for event in events] == ["hit"]
        assert inspect(tag).persistent


def test_C2_newer_values_stay(maker: sessionmaker[Session], behind: Engine) -> None:
    frozen = fill(maker, USERS)
    with behind.begin() as connection:
        connection.execute(update(User).where(User.id == 1).values(name="newer"))
    with maker() as db:
        user = db.get_one(User, 1)
        assert user.name == "newer"
        assert db.scalars(USERS, execution_options=CACHED).all()[0] is user
        assert user.name == "newer"
        assert user not in db.dirty
        naively(db, USERS, frozen)
        assert user.name == "ann", "the naive way brings back the old value"


# --- C3 --------------------------------------------------------------------------------------------


def test_C3_a_deleted_object_stays_deleted(maker: sessionmaker[Session]) -> None:
    with_posts = USERS.options(joinedload(User.posts))
    through_posts = select(Post).options(joinedload(Post.author)).order_by(Post.id)
    for statement in (USERS, with_posts, through_posts):
        fill(maker, statement)
    with maker() as db:
        user = db.get_one(User, 4)
        db.delete(user)
        db.flush()
        for statement in (USERS, with_posts, through_posts):
            found = db.scalars(statement, execution_options=CACHED).unique().all()
            assert user not in found
            assert inspect(user).deleted
        db.commit()
        assert inspect(user).detached
    with maker() as db:
        assert [user.id for user in db.scalars(USERS, execution_options=CACHED)] == [1, 2, 3]


def test_C3_an_object_that_is_to_be_deleted_still_is(maker: sessionmaker[Session]) -> None:
    fill(maker, USERS)
    with maker(autoflush=False) as db:
        user = db.get_one(User, 4)
        db.delete(user)
        assert user in db.scalars(USERS, execution_options=CACHED).all()
        assert user in db.deleted
        db.commit()
    with maker() as db:
        assert db.get(User, 4) is None


# --- C4 --------------------------------------------------------------------------------------------


def test_C4_reading_another_version_is_no_error(maker: sessionmaker[Session], behind: Engine) -> None:
    statement = select(Counter)
    frozen = fill(maker, statement)
    with behind.begin() as connection:
        connection.execute(update(Counter).values(value=11, version=Counter.version + 1))
    with maker() as db:
        counter = db.get_one(Counter, 1)
        assert db.scalars(statement, execution_options=CACHED).all() == [counter]
        assert (counter.value, counter.version) == (11, 2)
        with pytest.raises(StaleDataError):
            naively(db, statement, frozen)
        counter.value = 12
        db.commit()
    with maker() as db:
        assert db.get_one(Counter, 1).version == 3


# --- C5 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["rollback", "close", "savepoint"])
def test_C5_what_is_rolled_back_leaves_nothing(end: str, maker: sessionmaker[Session]) -> None:
    names = select(Tag.name).order_by(Tag.id)
    with maker() as db:
        inner = db.begin_nested() if end == "savepoint" else None
        db.add(Tag(name="never"))
        db.get_one(Tag, 1).name = "neither"
        assert db.scalars(names, execution_options=CACHED).all() == ["neither", "orm", "unused", "never"]
        if inner is not None:
            inner.rollback()
            assert db.scalars(names, execution_options=CACHED).all() == ["sql", "orm", "unused"]
        elif end == "rollback":
            db.rollback()
    for _ in range(2):
        with maker() as db:
            assert db.scalars(names, execution_options=CACHED).all() == ["sql", "orm", "unused"]


def test_C5_dirty_objects_do_not_get_into_the_answer(maker: sessionmaker[Session]) -> None:
    with maker(autoflush=False) as db:
        user = db.get_one(User, 1)
        user.name, user.posts = "dirty", []
        statement = USERS.options(selectinload(User.posts))
        assert db.scalars(statement, execution_options=CACHED).all()[0].name == "dirty"
        with pytest.raises(InvalidRequestError):
            naively(Session(db.get_bind()), statement, db.execute(statement).freeze())
    with maker() as db:
        user = db.scalars(statement, execution_options=CACHED).all()[0]
        assert (user.name, [post.id for post in user.posts]) == ("ann", [1, 2])


# --- C6 --------------------------------------------------------------------------------------------


def test_C6_sessions_share_no_values(maker: sessionmaker[Session], cache: QueryCache) -> None:
    columns = select(User.settings).order_by(User.id)
    found = []
    with maker() as one, maker() as two, maker() as three:
        for db in (one, two, three):
            settings = db.scalars(USERS, execution_options=CACHED).all()[0].settings
            plain = db.scalars(columns, execution_options=CACHED).all()[0]
            assert settings is not None
            assert settings == plain == {"theme": "dark", "sizes": [1, 2.5, None]}
            settings["theme"] = plain["theme"] = "mutated"
            settings["sizes"].append("mutated")
            plain["sizes"].append("mutated")
            found += [settings, plain, settings["sizes"], plain["sizes"]]
    assert len(set(map(id, found))) == 12
    assert cache.stats().hits == 4


def test_C6_a_commit_elsewhere_expires_nothing_here(
    own_forum: Engine, maker: sessionmaker[Session], cache: QueryCache
) -> None:
    """Live objects from a cache belong to the session that made them, and expire with its commit."""
    with maker() as one:
        first = one.scalars(USERS, execution_options=CACHED).all()
        with maker() as other:
            second = other.scalars(USERS, execution_options=CACHED).all()
            one.commit()
            with traffic(own_forum) as seen:
                assert [user.name for user in second] == ["ann", "bob", "çem", "dan"]
            assert seen.nothing
            assert all(inspect(user).expired for user in first)
            assert set(map(id, first)).isdisjoint(map(id, second))


# --- C8 --------------------------------------------------------------------------------------------


def test_C8_joined_collections_ask_for_unique(maker: sessionmaker[Session]) -> None:
    statement = USERS.options(joinedload(User.posts))
    two = select(User, Post).join(User.posts).options(joinedload(User.comments)).order_by(Post.id)
    fill(maker, statement)
    fill(maker, two)
    with maker() as db:
        for each in (statement, two):
            with pytest.raises(InvalidRequestError, match=r"unique\(\) method must be invoked"):
                db.execute(each, execution_options=CACHED).all()
        assert len(db.scalars(statement, execution_options=CACHED).unique().all()) == 4
        assert len(db.execute(two, execution_options=CACHED).unique().all()) == 5


def test_C8_the_naive_way_drops_the_guard(maker: sessionmaker[Session]) -> None:
    statement = USERS.options(joinedload(User.posts))
    frozen = fill(maker, statement)
    with maker() as db:
        assert len(naively(db, statement, frozen).all()) == 6, "two users twice, and nobody is told"


# --- C9 --------------------------------------------------------------------------------------------


def test_C9_rows_are_addressed_by_what_was_selected(maker: sessionmaker[Session]) -> None:
    statement = select(User, Post.id, User.id, Post).join(User.posts).order_by(Post.id)
    frozen = fill(maker, statement)
    with maker() as db:
        row = db.execute(statement, execution_options=CACHED).all()[2]
        assert isinstance(row._mapping[User], User)
        assert (row._mapping[Post.id], row._mapping[User.id]) == (3, 2)
        assert row._mapping[Post] is row.Post is row[3]
        assert db.execute(statement, execution_options=CACHED).scalars(3).first() is db.get(Post, 1)
        assert db.execute(statement, execution_options=CACHED).columns(User.id).all()[2] == (2,)
    with maker() as db:
        row = pickle.loads(pickle.dumps(naively(db, statement, frozen).all()))[2]
        with pytest.raises((KeyError, NoSuchColumnError)):
            row._mapping[User]


def test_C9_an_ambiguous_name_stays_ambiguous(maker: sessionmaker[Session]) -> None:
    tag = Tag.__table__
    statement = select(tag.c.id.label("same"), tag.c.name.label("same")).where(tag.c.id == 1)
    for _ in range(2):
        with maker() as db:
            row = db.execute(statement, execution_options=CACHED).one()
            assert tuple(row) == (1, "sql")
            with pytest.raises(InvalidRequestError, match="Ambiguous"):
                _ = row._mapping["same"]


# --- C10 -------------------------------------------------------------------------------------------

CRITERIA = {
    "of a class": USERS.options(
        selectinload(User.posts), with_loader_criteria(Post, lambda cls: cls.score > 3, include_aliases=True)
    ),
    "of a relationship": USERS.options(selectinload(User.posts.and_(Post.score > 3))),
    "of a joined one": USERS.options(joinedload(User.posts.and_(Post.score > 3))),
}


@pytest.mark.parametrize("statement", CRITERIA.values(), ids=CRITERIA)
def test_C10_criteria_can_be_cached(statement: Any, maker: sessionmaker[Session], cache: QueryCache) -> None:
    for _ in range(2):
        with maker() as db:
            users = db.scalars(statement, execution_options=CACHED).unique().all()
            assert [[post.id for post in user.posts] for user in users] == [[1], [3], [], []]
    assert cache.stats().hits == 1


def test_C10_the_naive_way_cannot_pickle_them(maker: sessionmaker[Session]) -> None:
    with maker() as db:
        users = db.scalars(CRITERIA["of a class"]).all()
        with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
            pickle.dumps(users)


# --- C11 -------------------------------------------------------------------------------------------


def test_C11_an_object_keeps_the_options_it_was_loaded_with(maker: sessionmaker[Session]) -> None:
    strict = USERS.options(lazyload(User.posts).raiseload(Post.comments))
    frozen = fill(maker, strict)
    with maker() as db:
        first, second = db.get_one(User, 1), db.get_one(User, 2)
        third = db.scalars(strict, execution_options=CACHED).all()[2]
        assert [len(post.comments) for post in first.posts] == [3, 1]
        with pytest.raises(InvalidRequestError, match="raise"):
            _ = third.posts[0].comments
        naively(db, strict, frozen)
        with pytest.raises(InvalidRequestError, match="raise"):
            _ = second.posts[0].comments


def test_C11_an_object_loaded_strictly_stays_strict(maker: sessionmaker[Session]) -> None:
    fill(maker, USERS)
    with maker() as db:
        user = db.scalars(USERS.options(lazyload(User.posts).raiseload(Post.comments))).all()[0]
        assert db.scalars(USERS, execution_options=CACHED).all()[0] is user
        with pytest.raises(InvalidRequestError, match="raise"):
            _ = user.posts[0].comments


# --- C12 -------------------------------------------------------------------------------------------

EAGER = {
    "selectin": USERS.options(selectinload(User.posts).selectinload(Post.comments), selectinload(User.team)),
    "joined": USERS.options(joinedload(User.posts).joinedload(Post.comments), joinedload(User.team)),
    "subquery": USERS.options(subqueryload(User.posts).subqueryload(Post.comments), subqueryload(User.team)),
}


def walk(users: Any) -> list[Any]:
    return [
        (
            user.name,
            user.team and user.team.name,
            [[comment.text for comment in post.comments] for post in user.posts],
        )
        for user in users
    ]


@pytest.mark.parametrize("statement", EAGER.values(), ids=EAGER)
def test_C12_what_was_loaded_eagerly_is_there(
    statement: Any, own_forum: Engine, maker: sessionmaker[Session], cache: QueryCache
) -> None:
    with maker() as db:
        expected = walk(db.scalars(statement, execution_options=CACHED).unique())
    with maker() as db, traffic(own_forum) as seen:
        assert walk(db.scalars(statement, execution_options=CACHED).unique()) == expected
    assert seen.nothing


class AsyncioSession(Session):
    """The synchronous half of the sessions of asyncio below."""


@pytest.mark.parametrize("statement", EAGER.values(), ids=EAGER)
def test_C12_under_asyncio_nothing_is_left_to_load(
    statement: Any, own_forum: Engine, cache: QueryCache
) -> None:
    url = own_forum.url.set(drivername="sqlite+aiosqlite")

    async def ask() -> list[Any]:
        engine = create_async_engine(url)
        found = []
        for _ in range(2):
            async with AsyncSession(engine, sync_session_class=AsyncioSession) as db:
                found.append(walk((await db.scalars(statement, execution_options=CACHED)).unique()))
        await engine.dispose()
        return found

    cache.attach(AsyncioSession)
    try:
        first, second = asyncio.run(ask())
    finally:
        cache.detach(AsyncioSession)
    assert first == second
    assert first[0][2] == [["comment 1", "comment 2", "comment 3"], ["comment 4"]]
    assert cache.stats().hits == 0  # not there yet


def test_C12_a_hit_of_many_rows_takes_no_statement_a_row(
    own_forum: Engine, maker: sessionmaker[Session]
) -> None:
    statement = (
        select(Comment).options(joinedload(Comment.post), joinedload(Comment.author)).order_by(Comment.id)
    )
    teams = select(Team).options(selectinload(Team.users))
    fill(maker, statement)
    fill(maker, teams)
    with maker() as db, traffic(own_forum) as seen:
        for comment in db.scalars(statement, execution_options=CACHED):
            assert comment.post.title
            assert comment.author is None or comment.author.name
        for team in db.scalars(teams, execution_options=CACHED):
            assert all(user.name for user in team.users)
    assert seen.nothing
