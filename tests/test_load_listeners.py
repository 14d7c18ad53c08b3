"""Listeners of an application that run while an answer is given: what they write, ask and end in their Session or another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from dogpile.cache import CacheRegion
from sqlalchemy import Engine, String, and_, bindparam, create_engine, event, func, select, text, update
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import (
    Mapped,
    Session,
    foreign,
    immediateload,
    mapped_column,
    relationship,
    scoped_session,
    selectinload,
    sessionmaker,
    subqueryload,
)

from querycache import CacheMiss, QueryCache
from querycache.backends.memory import MemoryBackend
from querycache.errors import CacheUnavailable
from tests.test_post_loads import (
    Base,
    Child,
    Parent,
    Place,
    Toy,
    any_store,
    asked,
    attached,
    engine,
    fill,
    snapshots,
    store,
)

__all__ = ["any_store", "asked", "engine", "snapshots", "store"]  # fixtures


@pytest.fixture
def on_file(tmp_path: Path) -> Iterator[Engine]:
    """A database to which another Session has a connection of its own."""
    engine = create_engine(f"sqlite:///{tmp_path}/family.db")
    fill(engine)
    yield engine
    engine.dispose()


@contextmanager
def listening(cls: type, name: str, listener: Callable[..., object]) -> Iterator[None]:
    event.listen(cls, name, listener, restore_load_context=True)
    try:
        yield
    finally:
        event.remove(cls, name, listener)


@pytest.mark.parametrize("loader", [selectinload, subqueryload, immediateload])
def test_what_a_listener_asks_while_an_answer_is_replayed(
    on_file: Engine, store: CacheRegion, loader: Any
) -> None:
    """What completes the objects of its statement is no part of that answer, and may be newer."""
    _, factory = attached(on_file, store)
    parent = select(Parent).where(Parent.id == 1).options(loader(Parent.children))
    found: list[list[str]] = []
    names = iter(["", "", "new"])

    def listen(toy: Toy, context: Any) -> None:
        if name := next(names):  # between the lookup and what is asked here
            with factory.begin() as session:
                session.execute(update(Child).values(name=name))
        found.append([child.name for child in context.session.scalars(parent).one().children])

    event.listen(Toy, "load", listen)
    try:
        for _ in range(3):
            with factory() as session:
                session.scalars(select(Toy).where(Toy.id == 1).execution_options(cache_key="toy")).one()
    finally:
        event.remove(Toy, "load", listen)
    assert found == [["", ""], ["", ""], ["new", "new"]]


@pytest.mark.parametrize("loader", [selectinload, subqueryload, immediateload])
def test_a_listener_that_asks_takes_nothing_from_an_answer(
    engine: Engine, store: CacheRegion, asked: list[str], loader: Any
) -> None:
    cache, factory = attached(engine, store)
    children = select(Child).where(Child.parent_id == 1).options(loader(Child.toys))
    cached = children.execution_options(cache_key="children")

    def listen(child: Child, context: Any) -> None:
        context.session.get(Place, 1)

    event.listen(Child, "load", listen)
    try:
        for _ in range(2):
            with factory() as session:
                session.scalars(cached).all()
        asked.clear()
        with factory() as session, cache.recording() as events:
            session.scalars(cached.execution_options(cache_mode="only")).all()
    finally:
        event.remove(Child, "load", listen)
    assert "toys" not in asked
    assert [each.outcome for each in events] == ["hit"]


def by_text(session: Session) -> None:
    session.execute(text("UPDATE family_children SET name = 'new' WHERE parent_id = 1"))


def on_the_connection(session: Session) -> None:
    session.connection().execute(update(Child).values(name="new"))


def in_bulk(session: Session) -> None:
    session.execute(update(Child).values(name="new"), execution_options={"synchronize_session": False})


def by_flushing(session: Session) -> None:
    """Another object for the same row is not there, so what completes the answer shows what was flushed, and no more."""
    session.add(Child(parent_id=1, name="new"))
    session.flush()


@pytest.mark.parametrize("write", [by_text, on_the_connection, in_bulk, by_flushing])
@pytest.mark.parametrize("loader", [selectinload, subqueryload, immediateload, None])
def test_what_a_listener_writes_while_an_answer_is_replayed(
    engine: Engine, store: CacheRegion, loader: Any, write: Any
) -> None:
    cache, factory = attached(engine, store)
    parent = select(Parent).where(Parent.id == 1)
    if loader is not None:
        parent = parent.options(loader(Parent.children))
    cached = parent.execution_options(cache_key="parent")

    def names(statement: Any, *, writing: bool) -> list[str]:
        lazily: list[str] = []

        def listen(parent: Parent, context: Any) -> None:
            if writing:
                write(context.session)
            if loader is None:
                lazily.extend(child.name for child in parent.children)

        event.listen(Parent, "load", listen)
        try:
            with factory() as session:
                found = [child.name for child in session.scalars(statement).one().children]
                assert loader is not None or found == lazily
                return found
        finally:
            event.remove(Parent, "load", listen)

    for _ in range(2):
        assert names(cached, writing=False) == ["", ""]
    written = names(parent, writing=True)
    assert ("new" in written) == (loader is not subqueryload)  # which asks before there is an object
    with cache.recording() as events:
        assert names(cached, writing=True) == written
        assert names(cached, writing=False) == ["", ""]  # it was rolled back
    assert {each.outcome for each in events} <= {"hit", "bypass"}


@pytest.mark.parametrize("how", ["refresh", "expire"])
def test_what_a_listener_refreshes_while_an_answer_is_replayed(
    on_file: Engine, store: CacheRegion, how: str
) -> None:
    """What completes an object that is refreshed is no older than the refresh."""
    _, factory = attached(on_file, store)
    statement = select(Parent).where(Parent.id == 1).options(selectinload(Parent.children))
    cached = statement.execution_options(cache_key="parent")
    found: list[list[str]] = []

    def listen(parent: Parent, context: Any) -> None:
        if len(found) == 2:  # between the lookup and the refresh
            with factory.begin() as session:
                session.execute(update(Child).values(name="new"))
        if how == "refresh":
            context.session.refresh(parent)
        else:
            context.session.expire(parent)
            assert parent.name == ""

    event.listen(Parent, "load", listen, restore_load_context=True)
    try:
        for _ in range(3):
            with factory() as session:
                found.append([child.name for child in session.scalars(cached).one().children])
    finally:
        event.remove(Parent, "load", listen)
    assert found == [["", ""], ["", ""], ["new", "new"]]


def elsewhere(factory: Any, name: str, *classes: type[Any]) -> None:
    """Rename all children, and others, in another thread, as another process does."""

    def write() -> None:
        with factory.begin() as session:
            for each in (Child, *classes):
                session.execute(update(each).values(name=name))

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()


WHOLE = select(Parent).where(Parent.id == 1).options(selectinload(Parent.children))
CACHED = WHOLE.execution_options(cache_key="parent")


def children(session: Session, statement: Any) -> list[str]:
    return [child.name for child in session.scalars(statement).one().children]


@pytest.mark.parametrize("write", [by_text, on_the_connection, in_bulk, by_flushing])
@pytest.mark.parametrize("level", [None, "AUTOCOMMIT"])
def test_what_a_listener_commits_while_an_answer_is_replayed(
    engine: Engine, store: CacheRegion, level: str | None, write: Any
) -> None:
    _, factory = attached(engine, store)
    bind = engine.execution_options(isolation_level=level) if level else engine
    for _ in range(2):
        with factory(bind=bind) as session:
            assert children(session, CACHED) == ["", ""]

    def listen(parent: Parent, context: Any) -> None:
        write(context.session)
        if level is None:
            context.session.commit()

    with listening(Parent, "load", listen), factory(bind=bind) as session:
        found = children(session, CACHED)
    assert "new" in found
    with factory(bind=bind) as session:
        assert children(session, WHOLE) == children(session, CACHED) == found


@pytest.mark.parametrize("how", ["rollback", "close", "lost"])
@pytest.mark.parametrize("in_part", [False, True])
def test_what_a_listener_writes_and_takes_back_is_not_stored(
    on_file: Engine, store: CacheRegion, how: str, in_part: bool
) -> None:
    """By then nothing is known any more of the transaction in which the answer was completed."""
    _, factory = attached(on_file, store)
    lazily = select(Parent).where(Parent.id == 1).execution_options(cache_key="lazily")
    if in_part:
        with listening(Parent, "load", lambda parent, context: parent.children), factory() as session:
            session.scalars(lazily).one()
        with factory.begin() as session:
            session.execute(update(Child).values(name="old"))

    def attempt(parent: Parent, context: Any) -> None:
        by_text(context.session)
        assert "new" in [child.name for child in parent.children]
        if how == "lost":
            context.session.connection().invalidate()
        if how == "close":
            context.session.close()
        else:
            context.session.rollback()

    with listening(Parent, "load", attempt), factory() as session:
        session.scalars(lazily).one()
    seen: list[list[str]] = []

    def look(parent: Parent, context: Any) -> None:
        seen.append([child.name for child in parent.children])

    with listening(Parent, "load", look):
        for _ in range(2):
            with factory() as session:
                session.scalars(lazily).one()
    assert seen == [["old", "old"] if in_part else ["", ""]] * 2


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_what_was_read_in_a_snapshot_that_a_listener_has_ended_is_not_stored(
    snapshots: Engine, any_store: CacheRegion, end: str
) -> None:
    _, factory = attached(snapshots, any_store)
    done: list[str] = []

    def write(parent: Parent, context: Any) -> None:
        if not done:
            done.append("written")
            with factory.begin() as other:  # as anybody may, in this moment
                other.execute(update(Child).values(name="new"))

    def end_it(child: Child, context: Any) -> None:
        if done == ["written"]:
            done.append("ended")
            getattr(context.session, end)()

    with listening(Parent, "load", write), listening(Child, "load", end_it), factory() as session:
        children(session, CACHED)
    assert done == ["written", "ended"]
    for _ in range(2):
        with factory() as session:
            assert children(session, CACHED) == ["new", "new"]


def test_a_listener_is_not_shown_how_an_answer_is_given_up(snapshots: Engine, any_store: CacheRegion) -> None:
    """What a snapshot must not show makes the database answer the whole statement, whatever a listener does with errors."""
    _, factory = attached(snapshots, any_store)
    parents = select(Parent).where(Parent.id == 1).execution_options(cache_key="parents")
    seen: list[Any] = []
    concurrently: list[str] = []

    def look(parent: Parent, context: Any) -> None:
        if concurrently:
            with factory.begin() as other:
                other.execute(update(Child).values(name=concurrently.pop()))
        try:
            seen.append([child.name for child in parent.children])
        except Exception as error:  # noqa: BLE001 - as an application may that logs it and goes on
            seen.append(error)

    with listening(Parent, "load", look):
        for _ in range(2):
            with factory() as session:
                session.scalars(parents).one()
        with factory.begin() as session:
            session.execute(update(Child).values(name="newer"))  # it is valid in part now
        concurrently.append("newest")
        with factory() as session:
            session.scalars(parents).one()
    assert not [each for each in seen if isinstance(each, Exception)]
    assert seen[-1] in (["newer"] * 2, ["newest"] * 2)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_parameter_of_the_application_may_have_any_name(
    on_file: Engine, store: CacheRegion, legacy: bool
) -> None:
    _, factory = attached(on_file, store)
    chosen = Child.id.in_(bindparam("primary_keys", expanding=True))
    seen: list[Any] = []

    def listen(parent: Parent, context: Any) -> None:
        if len(seen) == 2:
            elsewhere(factory, "new")
        if legacy:
            query = context.session.query(Child.name).filter(chosen).params(primary_keys=[1, 2])
            seen.append([name for (name,) in query])
        else:
            seen.append(
                context.session.scalars(select(Child.name).where(chosen), {"primary_keys": [1, 2]}).all()
            )

    with listening(Parent, "load", listen):
        for _ in range(3):
            with factory() as session:
                session.scalars(CACHED).one()
    assert seen == [["", ""], ["", ""], ["new", "new"]]


def test_a_listener_that_writes_when_a_transaction_begins(engine: Engine, store: CacheRegion) -> None:
    _, factory = attached(engine, store)
    for _ in range(2):
        with factory() as session:
            assert children(session, CACHED) == ["", ""]
    with factory() as session:
        event.listen(session, "after_transaction_create", lambda session, transaction: by_text(session))
        assert children(session, CACHED) == ["new", "new"]


class Audit(Base):
    __tablename__ = "family_audits"

    id: Mapped[int] = mapped_column(primary_key=True)
    what: Mapped[str] = mapped_column(String(20), default="by hand")


@pytest.mark.parametrize("statement", [select(Audit.what), select(func.now(), Audit.what)])
def test_a_statement_that_goes_to_the_database_is_flushed_for_once(
    engine: Engine, store: CacheRegion, statement: Any
) -> None:
    """What a listener adds in the flush is not to be flushed before the statement."""

    def rows(statement: Any) -> list[str]:
        flushes: list[object] = []

        def flushed(session: Session, context: object) -> None:
            flushes.append(context)
            if len(flushes) == 1:
                session.add(Audit(what="by the listener"))

        with factory() as session:
            event.listen(session, "after_flush", flushed)
            session.add(Audit())
            found = [row.what for row in session.execute(statement)]
            assert len(flushes) == 1
            assert session.new
            return found

    _, factory = attached(engine, store)
    assert rows(statement) == rows(statement.execution_options(cache_key=True)) == ["by hand"]


def test_a_scoped_session_is_configured_after_it_was_attached(engine: Engine) -> None:
    """As extensions of web frameworks do. One that has a Session already has what that is bound to noticed."""
    cache = QueryCache("memory://")
    sessions = scoped_session(sessionmaker())
    cache.attach(sessions)
    sessions.configure(bind=engine)
    for outcome in ("miss", "hit"):
        with cache.recording() as events:
            assert children(sessions(), CACHED) == ["", ""]
        assert events[0].outcome == outcome
        sessions.remove()
    sessions().execute(text("SELECT 1"))
    other = QueryCache("memory://").attach(sessions)
    for _ in range(2):
        assert children(sessions(), CACHED) == ["", ""]
        sessions.remove()
    with engine.begin() as connection:
        connection.execute(update(Child).values(name="new"))
    assert children(sessions(), CACHED) == ["new", "new"]
    sessions.remove()
    other.detach(sessions)


def test_an_unrelated_write_does_not_take_what_completes_an_answer_to_the_database(
    engine: Engine, store: CacheRegion, asked: list[str]
) -> None:
    _, factory = attached(engine, store)
    for _ in range(2):
        with factory() as session:
            children(session, CACHED)
    with factory() as session:
        session.add(Place())
        session.flush()
        asked.clear()
        assert children(session, CACHED) == ["", ""]
        assert asked == []


@pytest.mark.parametrize("options", [{}, {"populate_existing": True}, {"yield_per": 10}])
@pytest.mark.parametrize("loader", [selectinload, subqueryload, immediateload])
def test_what_completes_a_listeners_own_statement_is_no_part_of_the_answer_around_it(
    engine: Engine, store: CacheRegion, loader: Any, options: Any
) -> None:
    cache, factory = attached(engine, store)
    options = {} if loader is subqueryload and "yield_per" in options else options  # SQLAlchemy refuses these
    own = select(Child).options(loader(Child.toys)).execution_options(**options)
    toys: list[int] = []

    def listen(parent: Parent, context: Any) -> None:
        found = context.session.scalars(own.where(Child.id <= len(toys) + 1)).all()
        toys.append(sum(len(child.toys) for child in found))

    with listening(Parent, "load", listen), cache.recording() as events:
        for _ in range(3):
            with factory() as session:
                assert children(session, CACHED) == ["", ""]
        with factory() as session:  # without the database, but for what the listener asks
            assert children(session, CACHED.execution_options(cache_mode="only")) == ["", ""]
    assert toys == [1, 1, 2, 2]
    assert [each.outcome for each in events] == ["miss", "fill", "hit", "hit", "hit"]


def test_a_listeners_statement_that_is_handed_back_has_asked_the_database(
    on_file: Engine, store: CacheRegion
) -> None:
    """With a cache_key, and refused after the session was to be flushed for it."""
    _, factory = attached(on_file, store)
    refused = WHOLE.add_columns(func.now()).execution_options(cache_key=True)
    toy = select(Toy).where(Toy.id == 1).execution_options(cache_key="toy")
    seen: list[list[str]] = []

    def listen(toy: Toy, context: Any) -> None:
        if len(seen) == 2:
            elsewhere(factory, "new")
        context.session.add(Audit())
        seen.append([child.name for child in context.session.execute(refused).one()[0].children])

    with listening(Toy, "load", listen):
        for _ in range(3):
            with factory(autoflush=False) as session:
                session.scalars(toy).one()
    assert seen == [["", ""], ["", ""], ["new", "new"]]


@pytest.mark.parametrize("by", ["invalidate", "another cache"])
def test_what_a_listener_makes_known_is_in_what_completes_the_answer(
    on_file: Engine, tmp_path: Path, store: CacheRegion, by: str
) -> None:
    cache, factory = attached(on_file, store)
    beside = create_engine(f"sqlite:///{tmp_path}/family.db")
    _, other = attached(beside, store)
    for _ in range(2):
        with factory() as session:
            assert children(session, CACHED) == ["", ""]

    def listen(parent: Parent, context: Any) -> None:
        if by == "invalidate":
            raw = beside.raw_connection()
            raw.cursor().execute("UPDATE family_children SET name = 'new'")
            raw.commit()
            raw.close()
            cache.invalidate(tables=["family_children"])
        else:
            with other.begin() as session:
                session.execute(update(Child).values(name="new"))

    with listening(Parent, "load", listen), factory() as session:
        assert children(session, CACHED) == ["new", "new"]
    beside.dispose()


def test_explaining_and_refusing_begin_nothing(engine: Engine, store: CacheRegion) -> None:
    cache, factory = attached(engine, store)
    with factory(autobegin=False) as session:
        assert cache.explain(session, CACHED).reason == "miss"
        with session.begin():
            assert children(session, CACHED) == ["", ""]
    with factory() as session:
        with pytest.raises(CacheMiss):
            session.scalars(CACHED.execution_options(cache_mode="only", cache_key="another"))
        cache.explain(session, CACHED)
        with session.begin():
            assert children(session, CACHED) == ["", ""]


def test_a_registry_whose_scope_is_not_there_yet_is_attached(engine: Engine) -> None:
    scopes: list[int] = []
    sessions = scoped_session(sessionmaker(engine), scopefunc=lambda: scopes[0])
    QueryCache("memory://").attach(sessions)
    scopes.append(1)
    assert children(sessions(), CACHED) == ["", ""]
    sessions.remove()


def test_a_task_that_a_listener_begins_is_no_part_of_the_answer(on_file: Engine, store: CacheRegion) -> None:
    """It has the context of the load, and outlives it."""
    _, factory = attached(on_file, store)
    bare = select(Parent).where(Parent.id == 1).execution_options(cache_key="bare")
    contexts = []

    def listen(parent: Parent, context: Any) -> None:
        contexts.append(copy_context())
        if len(contexts) == 1:
            parent.children  # noqa: B018 - so that the entry has them

    with listening(Parent, "load", listen):
        with factory() as session:
            session.scalars(bare).one()
        with factory() as session:
            parent = session.scalars(bare).one()
            elsewhere(factory, "new")
            assert contexts[1].run(lambda: [child.name for child in parent.children]) == ["new", "new"]


@pytest.mark.parametrize("by", ["Core", "the ORM", "invalidate"])
def test_what_is_committed_as_the_transaction_begins(on_file: Engine, store: CacheRegion, by: str) -> None:
    """Which is after the lookup, and by another Session, whose transaction that of this one knows nothing of."""
    cache, factory = attached(on_file, store)
    for _ in range(2):
        with factory() as session:
            assert children(session, CACHED) == ["", ""]
    done = []

    def begun(session: Session, transaction: Any) -> None:
        if done:
            return
        done.append(by)
        if by == "the ORM":
            with factory.begin() as other:
                for each in other.scalars(select(Child).where(Child.parent_id == 1)):
                    each.name = "new"
                other.get_one(Parent, 1).name = "new"
            return
        with on_file.begin() as connection:
            connection.execute(update(Child).values(name="new"))
            connection.execute(update(Parent).values(name="new"))
        if by == "invalidate":
            cache.invalidate(everything=True)

    with factory() as session:
        event.listen(session, "after_transaction_create", begun)
        assert session.scalars(CACHED).one().name == "new"
        assert children(session, CACHED) == ["new", "new"]


def test_what_is_loaded_as_the_transaction_begins_stays_loaded(on_file: Engine, store: CacheRegion) -> None:
    """Also where something is written then, so that the database is asked; nothing was replayed yet."""
    _, factory = attached(on_file, store)
    toy = select(Toy).where(Toy.id == 1).execution_options(cache_key="toy")
    for _ in range(2):
        with factory() as session:
            session.scalars(toy).one()
    done: list[bool] = []
    kept: list[Parent] = []

    def begun(session: Session, transaction: Any) -> None:
        if not done:
            done.append(True)
            kept.append(session.get_one(Parent, 1))
            with factory.begin() as other:
                other.get_one(Child, 1).name = "new"

    with factory() as session:
        event.listen(session, "after_transaction_create", begun)
        session.scalars(toy).one()
    assert kept[0].name == ""


def test_what_completes_an_answer_begins_the_transaction_that_a_listener_has_ended(
    on_file: Engine, store: CacheRegion
) -> None:
    _, factory = attached(on_file, store)
    factory.configure(expire_on_commit=False)
    for _ in range(2):
        with factory() as session:
            assert children(session, CACHED) == ["", ""]

    def listen(parent: Parent, context: Any) -> None:
        context.session.commit()

    with listening(Parent, "load", listen):
        with factory() as session:
            session.scalars(CACHED).one()
            assert session.in_transaction()
        with (
            factory() as session,
            pytest.raises(InvalidRequestError, match="closed transaction"),
            session.begin(),
        ):
            session.scalars(CACHED).one()


def test_a_listeners_own_cached_statement_may_be_newer(on_file: Engine, store: CacheRegion) -> None:
    """And what completes its objects is no older."""
    _, factory = attached(on_file, store)
    toy = select(Toy).where(Toy.id == 1).execution_options(cache_key="toy")
    bare = select(Parent).where(Parent.id == 1).execution_options(cache_key="bare")
    seen: list[tuple[str, list[str]]] = []

    def listen(toy: Toy, context: Any) -> None:
        if len(seen) == 2:
            elsewhere(factory, "new", Parent)
        parent = context.session.scalars(bare).one()
        seen.append((parent.name, [child.name for child in parent.children]))

    with listening(Toy, "load", listen):
        for _ in range(3):
            with factory() as session:
                session.scalars(toy).one()
    assert seen == [("", ["", ""]), ("", ["", ""]), ("new", ["new", "new"])]


Parent.at_random = relationship(  # type: ignore[attr-defined]
    Toy,
    primaryjoin=and_(foreign(Toy.child_id) == Parent.id, Toy.id < 1000 + func.abs(func.random())),
    viewonly=True,
)
"""What the cache refuses, since it may be another answer each time."""


def test_what_completes_an_answer_is_no_older_than_what_was_refused(
    on_file: Engine, store: CacheRegion
) -> None:
    _, factory = attached(on_file, store)
    for _ in range(2):
        with factory() as session:
            assert children(session, CACHED) == ["", ""]
    seen = []

    def listen(parent: Parent, context: Any) -> None:
        elsewhere(factory, "new", Toy)
        seen.extend(toy.name for toy in parent.at_random)

    with listening(Parent, "load", listen), factory() as session:
        assert children(session, CACHED) == ["new", "new"]
    assert seen == ["new"]


def test_a_listener_within_a_load_of_another_session_asks_the_first(
    on_file: Engine, store: CacheRegion
) -> None:
    _, factory = attached(on_file, store)
    toy = select(Toy).where(Toy.id == 1).execution_options(cache_key="toy")
    for _ in range(2):
        with factory() as session:
            assert children(session, CACHED) == ["", ""]
            session.scalars(toy).one()
    outer: list[Session] = []
    seen: list[list[str]] = []

    def of_the_first(parent: Parent, context: Any) -> None:
        if not outer:
            outer.append(context.session)
            with factory() as second:
                second.scalars(toy).one()

    def of_the_second(toy: Toy, context: Any) -> None:
        elsewhere(factory, "new")
        other = select(Parent).where(Parent.id == 2)
        seen.append([child.name for child in outer[0].scalars(other).one().children])

    with listening(Parent, "load", of_the_first), listening(Toy, "load", of_the_second), factory() as session:
        assert children(session, CACHED) == ["new", "new"]
    assert seen == [[""] * 2] or seen == [["new"] * 2]


def test_what_could_not_be_told_is_in_what_completes_the_answer(
    on_file: Engine, store: CacheRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server refuses writes, and answers reads."""
    _, factory = attached(on_file, store)
    for _ in range(2):
        with factory() as session:
            assert children(session, CACHED) == ["", ""]

    def listen(parent: Parent, context: Any) -> None:
        for step in ("begin", "end", "bump"):
            monkeypatch.setattr(MemoryBackend, step, mock.Mock(side_effect=CacheUnavailable("full")))
        with factory.begin() as other:
            other.execute(update(Child).values(name="new"))

    with listening(Parent, "load", listen), factory() as session:
        assert children(session, CACHED) == ["new", "new"]
