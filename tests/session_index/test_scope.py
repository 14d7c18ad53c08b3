"""What an index is for, and that detaching leaves nothing."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, insert, inspect, select
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import (
    AttributeEvents,
    InstanceEvents,
    MapperEvents,
    Session,
    SessionEvents,
    scoped_session,
    sessionmaker,
)

from querycache.errors import ConfigurationError
from querycache.session_index import SessionIndex, UniqueConflict
from tests.session_index.models import Base, Clerk, Country, Item, Label, Manager, Person

NewIndex = Callable[..., SessionIndex]


class SpecialSession(Session):
    pass


class SpecialAsyncSession(AsyncSession):
    sync_session_class = SpecialSession


def accepts(indexes: SessionIndex, session: Any) -> bool:
    index = indexes.index(Person.name)
    try:
        index(session, "x")
    except ConfigurationError as error:
        assert "is not one of the sessions of this SessionIndex" in str(error)
        return False
    return True


def test_every_session_by_default(new_index: NewIndex) -> None:
    indexes = new_index()
    assert accepts(indexes, Session()) and accepts(indexes, SpecialSession())


def test_a_session_class(new_index: NewIndex) -> None:
    indexes = new_index(SpecialSession)
    assert accepts(indexes, SpecialSession()) and not accepts(indexes, Session())


def test_one_sessionmaker(new_index: NewIndex) -> None:
    mine, other = sessionmaker(), sessionmaker()
    indexes = new_index(mine)
    assert accepts(indexes, mine()) and not accepts(indexes, other()) and not accepts(indexes, Session())


def test_a_scoped_session(new_index: NewIndex) -> None:
    mine, other = scoped_session(sessionmaker()), scoped_session(sessionmaker())
    indexes = new_index(mine)
    assert accepts(indexes, mine) and accepts(indexes, mine()) and not accepts(indexes, other)


def test_one_session_which_is_not_kept_alive(new_index: NewIndex) -> None:
    session = Session()
    indexes = new_index(session)
    assert accepts(indexes, session) and not accepts(indexes, Session())
    indexes.index(Person.name, unique=True)
    gone = weakref.ref(session)
    del session
    gc.collect()
    assert gone() is None
    with pytest.raises(ConfigurationError, match="the session of this SessionIndex is gone"):
        indexes.index(Person.age)
    indexes.detach()


def test_asyncio(new_index: NewIndex) -> None:
    maker = async_sessionmaker(class_=SpecialAsyncSession)
    indexes = new_index(maker)
    session = maker()
    assert accepts(indexes, session) and accepts(indexes, session.sync_session)
    assert not accepts(indexes, AsyncSession()) and not accepts(indexes, SpecialSession())
    assert accepts(new_index(session), session) and not accepts(new_index(session), maker())
    assert accepts(new_index(SpecialAsyncSession), session)
    scoped = async_scoped_session(maker, scopefunc=lambda: 1)
    assert accepts(new_index(scoped), scoped)
    by_class = new_index(async_sessionmaker(sync_session_class=SpecialSession))
    assert accepts(by_class, AsyncSession(sync_session_class=SpecialSession))
    assert not accepts(by_class, AsyncSession())
    by_maker = new_index(async_sessionmaker(sync_session_class=sessionmaker(class_=SpecialSession)))
    assert not accepts(by_maker, AsyncSession(sync_session_class=SpecialSession))


def test_one_async_sessionmaker(new_index: NewIndex) -> None:
    mine, other = async_sessionmaker(), async_sessionmaker()
    indexes = new_index(mine)
    assert accepts(indexes, mine()) and not accepts(indexes, other()) and not accepts(indexes, AsyncSession())
    assert accepts(new_index(mine), mine()) and accepts(indexes, mine())


def test_an_async_session_is_looked_into_without_awaiting(new_index: NewIndex) -> None:
    async def main() -> None:
        engine = create_async_engine("sqlite+aiosqlite://")
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        maker = async_sessionmaker(engine)
        by_name = new_index(maker).index(Person.name)
        async with maker() as session:
            person = Person(name="x")
            session.add(person)
            assert by_name(session, "x") == {person}
            await session.commit()
            assert by_name.lookup(session, "x").unknown == {person}
            assert await session.run_sync(lambda sync: by_name(sync, "x", unknown="load")) == {person}
        await engine.dispose()

    asyncio.run(main())


@pytest.mark.parametrize("target", [None, 1, "sessions", object(), Person, int, create_engine("sqlite://")])
def test_other_targets_are_refused(target: Any) -> None:
    with pytest.raises(ConfigurationError, match="a session index is for a Session class, a sessionmaker"):
        SessionIndex(target)


@pytest.mark.parametrize("session", [None, Session, sessionmaker(), Person(name="x")])
def test_looking_into_something_else_is_refused(new_index: NewIndex, session: Any) -> None:
    by_name = new_index().index(Person.name)
    with pytest.raises(ConfigurationError, match="looks into a Session, an AsyncSession or a scoped_session"):
        by_name(session, "x")


def test_unique_indexes_check_their_own_sessions_only(new_index: NewIndex, engine: Engine) -> None:
    mine, other = sessionmaker(engine), sessionmaker(engine)
    new_index(mine).index(Person.name, unique=True)
    for maker, conflicts in ((other, False), (mine, True)):
        with maker() as session:
            session.add_all([Person(name="x"), Person(name="x")])
            if conflicts:
                with pytest.raises(UniqueConflict):
                    session.flush()
            else:
                session.flush()


def test_two_factories_with_the_same_classes(new_index: NewIndex, engine: Engine) -> None:
    one, other = sessionmaker(engine), sessionmaker(engine)
    of_one, of_other = new_index(one).index(Person.name), new_index(other).index(Person.name)
    with one() as first, other() as second:
        persons = [Person(name="x"), Person(name="x")]
        first.add(persons[0])
        second.add(persons[1])
        assert of_one(first, "x") == {persons[0]}
        assert of_other(second, "x") == {persons[1]}
        with pytest.raises(ConfigurationError):
            of_one(second, "x")


def listeners() -> dict[tuple[str, str], int]:
    """How many listeners every event has that an index could listen for."""
    found: dict[tuple[str, str], int] = {}
    session = Session()
    for name in events_of(SessionEvents):
        found["Session", name] = len(list(getattr(session.dispatch, name)))
    for cls in (Person, Manager, Clerk, Item, Label, Country):
        mapper: Any = inspect(cls)
        for name in events_of(InstanceEvents):
            found[cls.__name__, name] = len(list(getattr(mapper.class_manager.dispatch, name)))
        for name in events_of(MapperEvents):
            found[cls.__name__, name] = len(list(getattr(mapper.dispatch, name)))
        for attribute in mapper.all_orm_descriptors:
            for name in events_of(AttributeEvents) if hasattr(attribute, "dispatch") else ():
                found[str(attribute), name] = len(list(getattr(attribute.dispatch, name)))
    return found


def events_of(events: type[Any]) -> list[str]:
    private = {"_sa_event_merge_wo_load"}
    return [
        name for name in vars(events) if (not name.startswith("_") or name in private) and name != "dispatch"
    ]


def declare_everything(indexes: SessionIndex) -> None:
    indexes.index(Person.name, unique=True, ordered=True)
    indexes.index(Item.tags, multi=True)
    indexes.index(Item.owner, where=lambda item: item.title)
    indexes.index(Item.position)
    indexes.index(Manager.grade)
    indexes.index(Item.labels)
    indexes.indexed(Person, "by_upper")(lambda person: person.name)
    indexes.indexed(Item, "by_owner_name", depends_on=[Item.owner, Person.name])(
        lambda item: item.owner and item.owner.name
    )


def test_detach_leaves_no_listener(engine: Engine) -> None:
    before = listeners()
    indexes = SessionIndex()
    assert listeners() == before
    declare_everything(indexes)
    declared = listeners()
    assert declared["Label", "after_configured"] > before["Label", "after_configured"]
    assert sum(declared.values()) > sum(before.values())
    with Session(engine) as session:
        session.add(Person(name="x"))
        for index in indexes._all:
            index.lookup(session, None)
        assert {key for key, number in listeners().items() if number != declared[key]} == set()
        indexes.detach()
        assert listeners() == before
        assert not list(session.dispatch.do_orm_execute)
        session.flush()
        session.commit()


def test_detach_leaves_no_memory(engine: Engine) -> None:
    indexes = SessionIndex()
    declare_everything(indexes)
    with Session(engine) as session:
        person = Person(name="x")
        session.add(person)
        held: list[weakref.ref[Any]] = [weakref.ref(indexes), *(weakref.ref(index) for index in indexes._all)]
        assert indexes.by_upper(session, "x") == {person}
        held.extend(weakref.ref(record) for t in indexes._trackers.values() for record in t.records.values())
        indexes.detach()
        del indexes
        gc.collect()
        assert [reference for reference in held if reference() is not None] == []


def test_a_detached_index_says_so(engine: Engine) -> None:
    indexes = SessionIndex()
    by_name = indexes.index(Person.name)
    with Session(engine) as session:
        by_name(session, "x")
        indexes.detach()
        indexes.detach()
        with pytest.raises(ConfigurationError, match="detached; make a new one"):
            by_name(session, "x")
        with pytest.raises(ConfigurationError, match="detached; make a new one"):
            indexes.index(Person.age)


def test_a_session_without_lookups_has_no_listener(new_index: NewIndex, engine: Engine) -> None:
    by_name = new_index().index(Person.name)
    with Session(engine) as used, Session(engine) as unused:
        by_name(used, "x")
        assert list(used.dispatch.after_attach)
        assert [name for name in events_of(SessionEvents) if list(getattr(unused.dispatch, name))] == []


def test_a_class_without_indexes_has_no_listener(new_index: NewIndex, engine: Engine) -> None:
    def of_the_others() -> dict[tuple[str, str], int]:
        """``after_configured`` is one event of all mappers, and fires when they are configured."""
        return {
            (target, name): number
            for (target, name), number in listeners().items()
            if target.split(".")[0] in ("Label", "Country") and name != "after_configured"
        }

    before = of_the_others()
    indexes = new_index()
    indexes.index(Person.name)
    indexes.index(Item.owner)
    with Session(engine) as session:
        indexes.verify(session)
        assert of_the_others() == before


def test_objects_that_were_there_before_the_index(new_index: NewIndex, engine: Engine) -> None:
    with Session(engine) as session:
        session.execute(insert(Person), [{"id": 1, "kind": "person", "name": "a"}])
        loaded = session.scalars(select(Person)).one()
        pending = Person(name="a")
        session.add(pending)
        indexes = new_index()
        by_name = indexes.index(Person.name)
        assert by_name(session, "a") == {loaded, pending}
        by_age = indexes.index(Person.age)
        loaded.name, loaded.age = "b", 1
        assert by_age(session, 1) == {loaded}
        assert by_name(session, "b") == {loaded}


def test_an_event_listener_of_the_application_may_look_up(new_index: NewIndex, engine: Engine) -> None:
    """Also in the middle of a flush, where objects are neither here nor there."""
    maker = sessionmaker(engine)
    indexes = new_index(maker)
    by_name, by_id = indexes.index(Person.name), indexes.index(Person.id)
    seen: list[tuple[str, bool, bool]] = []

    def look(session: Session, name: str) -> None:
        seen.append((name, person in by_name(session, "y"), person in by_name(session, "y", persisted=True)))
        assert (person in by_id(session, None)) == (person.__dict__.get("id") is None)

    for name in ("before_flush", "after_flush", "after_flush_postexec", "pending_to_persistent"):
        event.listen(maker, name, lambda session, *_, name=name: look(session, name))
    with maker() as session:
        person = Person(name="y")
        session.add(person)
        session.flush()
        assert seen == [
            ("before_flush", True, False),
            ("after_flush", True, False),
            ("pending_to_persistent", True, True),
            ("after_flush_postexec", True, True),
        ]
        person.name = "x"
        session.flush()
        seen.clear()
        person.name = "y"
        session.flush()
        assert seen == [
            ("before_flush", True, False),
            ("after_flush", True, False),
            ("after_flush_postexec", True, True),
        ]
        assert by_id(session, person.id) == {person}
