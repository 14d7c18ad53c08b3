"""The index keeps nothing alive, loses nothing, and leaves nothing behind."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, insert, inspect, select, update
from sqlalchemy.event import registry
from sqlalchemy.orm import Session, sessionmaker

from querycache.session_index import SessionIndex
from tests.session_index.conftest import make_engine
from tests.session_index.models import Item, Person
from tests.session_index.oracle import check_structure


def declare(indexes: SessionIndex) -> list[Any]:
    indexes.indexed(Person, "by_initial", depends_on=[Person.name])(lambda person: person.initial)
    indexes.indexed(Item, "by_owner_name", depends_on=[Item.owner, Person.name])(
        lambda item: item.owner and item.owner.name
    )
    return [
        indexes.index(Person.name),
        indexes.index(Person.name, Person.age, ordered=True),
        indexes.index(Person.id, unique=True),
        indexes.by_initial,
        indexes.by_owner_name,
    ]


def use(all_indexes: list[Any], session: Session) -> None:
    for index in all_indexes:
        index.lookup(session, ("x", 1) if index.ordered else None)
        if index is not all_indexes[-1]:
            index.lookup(session, ("x", 1) if index.ordered else None, persisted=True)


def test_100_000_objects(indexes: SessionIndex, session: Session) -> None:
    """Twenty times five thousand objects come and go; nothing of them stays."""
    by_name = indexes.index(Person.name)
    by_age = indexes.index(Person.age, ordered=True)
    assert by_name(session, "x") == by_name(session, "x", persisted=True) == set()
    rows = [{"id": i, "kind": "person", "name": f"n{i}", "age": i} for i in range(1, 5001)]
    session.execute(insert(Person), rows)
    blocks = []
    for _ in range(20):
        people = session.scalars(select(Person)).all()
        assert len(by_name(session, "n7")) == len(by_name(session, "n7", persisted=True)) == 1
        assert len(by_age.range(session)) == len(people) == 5000
        del people
        gc.collect()
        blocks.append(sys.getallocatedblocks())
    assert not len(session.identity_map)
    for index in (by_name, by_age):
        check_structure(index, session)
        record = index._tracker.records[session.hash_key]
        assert not record._entries and not record.marks and not record.loaded
        for contents in record.views.values():
            assert not contents.placed and not contents.buckets and not contents.unknown
    assert blocks[-1] < blocks[1] + 2_000, blocks  # an object takes some twenty


def test_loading_without_lookups_does_not_pile_up(indexes: SessionIndex, session: Session) -> None:
    by_name = indexes.index(Person.name)
    by_name(session, "x")
    session.execute(insert(Person), [{"id": i, "kind": "person"} for i in range(1, 20_001)])
    record = by_name._tracker.records[session.hash_key]
    for _ in range(5):
        for _row in session.scalars(select(Person).execution_options(yield_per=1000)):
            pass
    del _row
    assert len(record.loaded) <= (record.loaded.maxlen or 0) < 100_000
    assert by_name.lookup(session, None).known == set()
    assert not record.loaded and not record._entries


def test_setting_without_lookups_does_not_pile_up(indexes: SessionIndex, session: Session) -> None:
    by_name = indexes.index(Person.name)
    person = Person()
    session.add(person)
    by_name(session, "x")
    for number in range(1000):
        person.name = str(number)
    assert len(by_name._tracker.records[session.hash_key].marks) == 1


def test_1_000_sessions(indexes: SessionIndex, engine: Engine, factory: sessionmaker[Session]) -> None:
    """Closed or just dropped, with objects that live on or not."""
    all_indexes = declare(indexes)
    survivors = []
    registered = []
    for number in range(1000):
        session = factory()
        person = Person(name="x", age=number)
        session.add_all([person, Item(owner=person)])
        use(all_indexes, session)
        if number % 2:
            session.close()
        if number % 5 == 0:
            survivors.append(person)
        del session, person
        if number % 100 == 99:
            gc.collect()
            registered.append(len(registry._key_to_collection))
    assert not indexes._watches
    assert not any(
        tracker.records or tracker._marks or tracker._loaded for tracker in indexes._trackers.values()
    )
    assert len(set(registered)) == 1
    with factory() as session:
        session.add_all(survivors[1:3])
        assert len(all_indexes[0](session, "x")) == 2


def test_the_index_does_not_keep_a_session_alive(
    indexes: SessionIndex, factory: sessionmaker[Session]
) -> None:
    all_indexes = declare(indexes)
    session = factory()
    person = Person(name="x")
    session.add(person)
    use(all_indexes, session)
    gone = weakref.ref(session)
    session.expunge_all()
    del session
    gc.collect()
    assert gone() is None
    assert person.name == "x"


def test_objects_in_keys_are_not_kept_alive(indexes: SessionIndex, session: Session) -> None:
    indexes.indexed(Item, "owner_and_title")(lambda item: (item.owner, item.title))
    by_owner = indexes.index(Item.owner)
    item = Item(owner=Person(), title="x")
    session.add(item)
    session.commit()
    owner = item.owner
    assert by_owner(session, owner) == indexes.owner_and_title(session, (owner, item.title)) == {item}
    gone = weakref.ref(owner)
    session.expire(item)  # with this the session lets the owner go
    del owner
    gc.collect()
    assert gone() is None


def test_objects_of_the_session_are_not_lost(indexes: SessionIndex, session: Session) -> None:
    by_name = indexes.index(Person.name)
    by_name(session, "x")
    session.add_all([Person(name=f"n{i}") for i in range(100)])
    gc.collect()
    assert all(len(by_name(session, f"n{i}")) == 1 for i in range(100))
    gc.collect()
    assert all(len(by_name(session, f"n{i}")) == 1 for i in range(100))


def test_objects_collected_in_the_middle_of_a_lookup(indexes: SessionIndex, session: Session) -> None:
    """The garbage collector runs whenever it likes: here whenever a key is hashed."""

    class Key(str):
        def __hash__(self) -> int:
            gc.collect(0)
            return super().__hash__()

    indexes.indexed(Person, "by_key")(lambda person: Key(person.name))
    session.execute(insert(Person), [{"id": i, "kind": "person", "name": f"n{i % 3}"} for i in range(1, 31)])
    for _ in range(3):
        people: list[Any] = list(session.scalars(select(Person)))
        indexes.by_key(session, "n0")
        for person in people:
            person.knot = person  # only the collector can free it
        del person
        people = people[:1]
        gc.collect()
        session.scalars(select(Person)).all()
        found = indexes.by_key(session, "n1")
        assert {person.name for person in found} <= {"n1"}
        assert indexes.verify(session) == []
        check_structure(indexes.by_key, session)


def test_marks_of_objects_in_cycles_do_not_pile_up(indexes: SessionIndex, session: Session) -> None:
    """Such objects are collected later than others, which must not keep what belongs to them."""
    by_name, by_age = indexes.index(Person.name), indexes.index(Person.age)
    assert by_name(session, "x") == by_age(session, 1) == set()
    record = by_name._tracker.records[session.hash_key]
    others = []
    for looks_up in (False, True):
        for _ in range(10):
            # the person has the item as well
            session.add_all([Item(owner=Person(name="x")) for _ in range(100)])
            session.flush()
            session.expunge_all()
            if looks_up:
                assert by_name(session, "x") == set()
            gc.collect()
            others.append([Person(name="elsewhere") for _ in range(300)])  # so that no id is given out again
        assert len(record.marks) < 1_000
        assert len(record.views[by_age, False].stale) < 1_000
    assert by_age(session, 1) == set()
    assert not record.marks and not record.views[by_age, False].stale


@pytest.mark.parametrize("left", ["flushing", "modified"])
@pytest.mark.parametrize("persisted", [False, True])
def test_an_object_in_the_place_of_one_that_is_gone(
    indexes: SessionIndex, session: Session, left: str, persisted: bool
) -> None:
    """What a flush has noted of an object that is gone may bear the id of one that came after it: then it
    must not replace what is noted of that one."""
    by_name = indexes.index(Person.name)
    person = Person(name="a")
    session.add(person)
    session.flush()
    assert by_name(session, "a") == by_name(session, "a", persisted=True) == {person}
    record = by_name._tracker.records[session.hash_key]
    contents = record.views[by_name, True]
    noted = record.flushing if left == "flushing" else contents.modified

    session.connection().execute(update(Person).values(name="b"))
    session.refresh(person)
    if left == "modified" or persisted:
        by_name(session, "b")  # hands the mark on to the other view
    noted[id(inspect(person))] = weakref.ref(Person())
    if left == "modified" or not persisted:
        session.add(Person(name="another"))
        session.flush()
    assert by_name(session, "a", persisted=persisted) == set()
    assert by_name(session, "b", persisted=persisted) == {person}


def test_threads_with_sessions_of_their_own(new_index: Callable[..., SessionIndex]) -> None:
    """Each thread's objects are collected in any thread."""
    indexes = new_index()
    all_indexes = declare(indexes)
    failures: list[BaseException] = []
    barrier = threading.Barrier(6)

    def work(number: int) -> None:
        engine = make_engine()
        try:
            barrier.wait(30)
            for turn in range(15):
                with Session(engine) as session:
                    session.add_all([Person(name=f"{number}-{i % 4}", age=i) for i in range(20)])
                    session.flush()
                    held = session.scalars(select(Person).where(Person.age < 10)).all()
                    for person in held:
                        person.__dict__["knot"] = person
                    assert {p.name for p in all_indexes[0](session, f"{number}-1")} <= {f"{number}-1"}
                    held[0].name = "changed"
                    assert all_indexes[0](session, "changed") == {held[0]}
                    del held, person
                    if turn % 5 == 0:
                        gc.collect()
                    assert indexes.verify(session) == []
                    session.rollback()
        except BaseException as error:  # noqa: BLE001 - shown by the main thread
            failures.append(error)
        finally:
            engine.dispose()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_an_error_while_events_are_handled_leaves_the_index_usable(
    indexes: SessionIndex, session: Session
) -> None:
    by_name = indexes.index(Person.name, ordered=True)

    class Rude:
        def __lt__(self, other: object) -> bool:
            raise RuntimeError("no order today")

        def __eq__(self, other: object) -> bool:
            return self is other

        def __hash__(self) -> int:
            return 1

    polite, rude = Person(name="a"), Person(name=Rude())
    session.add_all([polite, rude])
    with pytest.raises(RuntimeError, match="no order today"):
        by_name.range(session)
    rude.name = "b"
    assert by_name.range(session) == [polite, rude]
    check_structure(by_name, session)
