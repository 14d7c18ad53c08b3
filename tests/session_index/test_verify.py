"""``verify`` reports every way in which an index can be wrong."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import inspect
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import set_committed_value

from querycache.session_index import Difference, SessionIndex
from tests.session_index.conftest import Statements
from tests.session_index.models import Item, Label, Person


@pytest.fixture
def person(session: Session) -> Person:
    person = Person(name="a")
    session.add(person)
    session.flush()
    return person


def test_a_right_index_has_no_differences(
    indexes: SessionIndex, session: Session, person: Person, statements: Statements
) -> None:
    index = indexes.index(Person.name)
    indexes.index(Item.labels)
    item = Item(labels=[Label()])
    session.add(item)
    session.expire(person)
    with statements.none():
        assert index.verify(session) == indexes.verify(session) == []


def test_a_wrong_key(indexes: SessionIndex, session: Session, person: Person) -> None:
    index = indexes.index(Person.name, name="by_name")
    index(session, "a")
    person.__dict__["name"] = "b"
    assert index.verify(session) == [Difference("Person.by_name", person, ("b",), ("a",))]


def test_known_and_unknown(indexes: SessionIndex, session: Session, person: Person) -> None:
    index = indexes.index(Person.name, name="by_name")
    session.expire(person)
    index(session, "a")
    set_committed_value(person, "name", "b")
    assert index.verify(session) == [Difference("Person.by_name", person, ("b",), None)]
    indexes.touch(person)
    index(session, "a")
    del person.__dict__["name"]
    inspect(person).expired_attributes.add("name")
    assert index.verify(session) == [Difference("Person.by_name", person, None, ("b",))]


def test_missing_and_left_over(indexes: SessionIndex, session: Session, person: Person) -> None:
    index = indexes.index(Person.name, name="by_name", where=lambda p: p.age != 1)
    index(session, "a")
    person.__dict__["age"] = 1
    assert index.verify(session) == [Difference("Person.by_name", person, (), ("a",))]
    indexes.touch(person)
    index(session, "a")
    person.__dict__["age"] = 2
    assert index.verify(session) == [Difference("Person.by_name", person, ("a",), ())]


def test_an_object_that_left_unnoticed(indexes: SessionIndex, session: Session, person: Person) -> None:
    index = indexes.index(Person.name, name="by_name")
    index(session, "a")
    session.identity_map.safe_discard(inspect(person))
    assert index.verify(session) == [Difference("Person.by_name", person, (), ("a",))]


def test_the_view_as_of_the_last_flush(indexes: SessionIndex, session: Session, person: Person) -> None:
    index = indexes.index(Person.name, name="by_name")
    index(session, "a", persisted=True)
    person.name = "b"
    index(session, "a", persisted=True)
    index(session, "a")
    set_committed_value(person, "name", "c")
    differences = index.verify(session)
    assert differences == [
        Difference("Person.by_name", person, ("c",), ("b",)),
        Difference("Person.by_name", person, ("c",), ("a",), persisted=True),
    ]


def test_a_function_that_reads_more_than_it_declares(indexes: SessionIndex, session: Session) -> None:
    indexes.indexed(Item, "by_owner_name")(lambda item: item.owner and item.owner.name)
    ann = Person(name="ann")
    item = Item(owner=ann)
    session.add(item)
    assert indexes.by_owner_name(session, "ann") == {item}
    ann.name = "eve"
    assert indexes.verify(session) == [Difference("Item.by_owner_name", item, ("eve",), ("ann",))]


def test_many_keys(indexes: SessionIndex, session: Session) -> None:
    index = indexes.index(Item.raw, name="by_raw", multi=True)
    item = Item(raw=["a", "b"])
    session.add(item)
    index(session, "a")
    item.raw.append("c")  # a plain list: nothing tells of it
    (difference,) = index.verify(session)
    assert set(difference.expected or ()) == {"a", "b", "c"} and set(difference.found or ()) == {"a", "b"}


def test_touch_reaches_what_is_read_from_other_objects(indexes: SessionIndex, session: Session) -> None:
    indexes.indexed(Item, "by_owner_name", depends_on=[Item.owner, Person.name])(
        lambda item: item.owner and item.owner.name
    )
    ann = Person(name="ann")
    item = Item(owner=ann)
    session.add(item)
    assert indexes.by_owner_name(session, "ann") == {item}
    set_committed_value(ann, "name", "eve")
    assert len(indexes.verify(session)) == 1
    indexes.touch(ann)
    assert indexes.by_owner_name(session, "eve") == {item}
    found: Any = indexes.verify(session)
    assert found == []
