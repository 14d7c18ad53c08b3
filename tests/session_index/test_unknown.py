"""Never SQL, never a lie: what is known, what is not, and what a lookup does about it."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import event, insert, inspect, select, text
from sqlalchemy.orm import Session, defer, load_only, raiseload

from querycache.errors import ConfigurationError
from querycache.session_index import IndexFunctionError, Matches, SessionIndex, UnknownKeys
from tests.session_index.conftest import Statements
from tests.session_index.models import Item, Label, Manager, Person


@pytest.fixture
def people(session: Session) -> list[Person]:
    session.execute(
        insert(Person), [{"id": i, "kind": "person", "name": n, "bio": n} for i, n in enumerate("abb", 1)]
    )
    session.commit()
    return list(session.scalars(select(Person).order_by(Person.id)))


def test_lookup_gives_both(indexes: SessionIndex, session: Session, people: list[Person]) -> None:
    by_name = indexes.index(Person.name)
    session.expire(people[2])
    matches = by_name.lookup(session, "b")
    assert isinstance(matches, Matches)
    assert matches.known == {people[1]} and matches.unknown == {people[2]}
    known, unknown = matches
    assert known == {people[1]} and unknown == {people[2]}


def test_skip_load_raise(
    indexes: SessionIndex, session: Session, people: list[Person], statements: Statements
) -> None:
    by_name = indexes.index(Person.name)
    session.expire(people[2])
    with statements.none():
        assert by_name(session, "b") == by_name(session, "b", unknown="skip") == {people[1]}
        with pytest.raises(
            UnknownKeys, match=r"keys of 1 objects are not loaded, <Person \(3\) at"
        ) as caught:
            by_name(session, "b", unknown="raise")
        assert caught.value.objects == (people[2],)
    with statements.counted(1):
        assert by_name(session, "b", unknown="load") == {people[1], people[2]}
    with statements.none():
        assert by_name(session, "b", unknown="raise") == {people[1], people[2]}


def test_any_other_policy_is_refused(indexes: SessionIndex, session: Session) -> None:
    by_name: Any = indexes.index(Person.name)
    with pytest.raises(ConfigurationError, match="unknown='ignore': it is one of"):
        by_name(session, "b", unknown="ignore")


def test_many_are_loaded_with_few_statements(
    indexes: SessionIndex, session: Session, statements: Statements
) -> None:
    by_bio = indexes.index(Person.bio)
    session.execute(insert(Person), [{"id": i, "kind": "person", "bio": "x"} for i in range(1, 1201)])
    people = session.scalars(select(Person)).all()
    with statements.counted(3):
        assert len(by_bio(session, "x", unknown="load")) == len(people) == 1200


def test_loading_does_not_flush(indexes: SessionIndex, session: Session, people: list[Person]) -> None:
    by_name = indexes.index(Person.name)
    session.expire(people[0])
    pending = Person(name="a")
    session.add(pending)
    assert by_name(session, "a", unknown="load") == {people[0], pending}
    assert inspect(pending).pending


def test_loading_where_the_row_is_gone(indexes: SessionIndex, session: Session, people: list[Person]) -> None:
    by_name = indexes.index(Person.name)
    session.connection().execute(text("DELETE FROM person WHERE id = 3"))
    session.expire_all()
    assert by_name(session, "b", unknown="load") == {people[1]}
    assert by_name.lookup(session, "b").unknown == {people[2]}


def test_loading_keeps_unflushed_changes(
    indexes: SessionIndex, session: Session, people: list[Person]
) -> None:
    by_bio = indexes.index(Person.bio)
    people[0].name = "changed"
    assert by_bio(session, "a", unknown="load") == {people[0]}
    assert people[0].name == "changed" and session.is_modified(people[0])


def test_loading_relationships_and_what_lies_behind(
    indexes: SessionIndex, session: Session, statements: Statements
) -> None:
    indexes.indexed(Item, "by_owner_name", depends_on=[Item.owner, Person.name])(
        lambda item: item.owner and item.owner.name
    )
    by_label = indexes.index(Item.labels)
    item = Item(owner=Person(name="x"), labels=[Label()])
    session.add(item)
    session.commit()
    label = item.labels[0]
    session.expire_all()
    assert indexes.by_owner_name(session, "x", unknown="load") == {item}
    assert by_label(session, label, unknown="load") == {item}
    with statements.none():
        assert indexes.by_owner_name(session, "x", unknown="raise") == {item}
        assert by_label(session, label, unknown="raise") == {item}


def test_a_deferred_attribute_that_was_deleted_is_none(
    indexes: SessionIndex, session: Session, people: list[Person], statements: Statements
) -> None:
    """As SQLAlchemy says by itself, which does not load what was deleted."""
    by_name = indexes.index(Person.name)
    deferred = select(Person).options(defer(Person.name)).execution_options(populate_existing=True)
    session.scalars(deferred).all()
    with statements.none():
        del people[0].name
        matches = by_name.lookup(session, None)
        assert people[0].name is None
    assert matches.known == {people[0]} and people[0] not in matches.unknown


def test_loading_subclasses_through_the_base(indexes: SessionIndex, session: Session) -> None:
    indexes.indexed(Person, "by_grade", depends_on=[Manager.grade])(lambda p: getattr(p, "grade", None))
    session.add_all([Manager(grade=3), Person()])
    session.commit()
    held = session.scalars(select(Person)).all()
    session.expire_all()
    assert len(indexes.by_grade(session, 3, unknown="load")) == 1
    assert len(indexes.by_grade(session, None, unknown="raise")) == 1
    del held


class TestEveryWayOfNotBeingLoaded:
    @pytest.mark.parametrize(
        "option", [defer(Person.name), defer(Person.name, raiseload=True), load_only(Person.id)]
    )
    def test_loader_options(
        self,
        indexes: SessionIndex,
        session: Session,
        people: list[Person],
        statements: Statements,
        option: Any,
    ) -> None:
        by_name = indexes.index(Person.name)
        indexes.indexed(Person, "declared", depends_on=[Person.name])(lambda person: person.name)
        indexes.indexed(Person, "undeclared")(lambda person: person.name)
        session.expunge_all()
        loaded = session.scalars(select(Person).options(option)).all()
        with statements.none():
            for index in (by_name, indexes.declared, indexes.undeclared):
                assert index.lookup(session, "b").known == set()
                assert index.lookup(session, "b").unknown == set(loaded)
        session.scalars(select(Person)).all()
        with statements.none():
            for index in (by_name, indexes.declared, indexes.undeclared):
                assert {person.name for person in index(session, "b", unknown="raise")} == {"b"}

    def test_raiseload_of_a_relationship(
        self, indexes: SessionIndex, session: Session, statements: Statements
    ) -> None:
        indexes.indexed(Item, "by_owner_name", depends_on=[Item.owner, Person.name])(
            lambda item: item.owner and item.owner.name
        )
        indexes.indexed(Item, "undeclared")(lambda item: item.owner and item.owner.name)
        session.add(Item(owner=Person(name="x")))
        session.commit()
        session.expunge_all()
        item = session.scalars(select(Item).options(raiseload("*"))).one()
        with statements.none():
            for index in (indexes.by_owner_name, indexes.undeclared):
                assert index.lookup(session, "x").unknown == {item}

    def test_a_function_that_queries(
        self, indexes: SessionIndex, session: Session, people: list[Person], statements: Statements
    ) -> None:
        @indexes.indexed(Person, "counted")
        def counted(person: Person) -> int:
            return len(session.scalars(select(Person)).all())

        session.add(Item())
        with statements.none():
            assert indexes.counted.lookup(session, 3).unknown == set(people)
        assert session.new  # nothing was flushed either

    def test_a_session_works_on_after_a_refusal(
        self, indexes: SessionIndex, session: Session, people: list[Person]
    ) -> None:
        indexes.indexed(Person, "by_bio")(lambda person: person.bio)
        assert len(indexes.by_bio.lookup(session, "a").unknown) == 3
        assert session.autoflush
        assert [person.bio for person in people] == ["a", "b", "b"]
        assert indexes.by_bio(session, "a") == {people[0]}

    def test_an_attribute_that_was_never_set_is_none(
        self, indexes: SessionIndex, session: Session, statements: Statements
    ) -> None:
        """SQLAlchemy gives None for it without asking, also once it is persistent."""
        by_name = indexes.index(Person.name)
        indexes.indexed(Person, "by_upper")(lambda person: person.name and person.name.upper())
        person = Person()
        session.add(person)
        for _ in range(2):
            with statements.none():
                assert by_name(session, None) == indexes.by_upper(session, None) == {person}
            session.flush()

    def test_no_sql_and_no_loading_from_the_handlers_of_the_application(
        self, indexes: SessionIndex, session: Session, people: list[Person]
    ) -> None:
        seen = []

        @event.listens_for(session, "do_orm_execute")
        def handler(execute_state: Any) -> None:
            seen.append(execute_state)

        indexes.indexed(Person, "by_bio")(lambda person: person.bio)
        assert len(indexes.by_bio.lookup(session, "a").unknown) == 3
        assert seen == []


class TestFunctionsThatRaise:
    def test_the_error_names_index_and_object(
        self, indexes: SessionIndex, session: Session, people: list[Person]
    ) -> None:
        indexes.indexed(Person, "by_upper")(lambda person: person.name.upper())
        by_name = indexes.index(Person.name)
        nameless = Person()
        session.add(nameless)
        for _ in range(2):
            with pytest.raises(
                IndexFunctionError,
                match=r"index Person.by_upper: its function raised AttributeError\(.*<Person \(pending\) at",
            ) as caught:
                indexes.by_upper(session, "B")
            assert isinstance(caught.value.__cause__, AttributeError)
        assert by_name(session, None) == {nameless}  # other indexes go on
        nameless.name = "b"
        assert indexes.by_upper(session, "B") == {people[1], people[2], nameless}
        assert indexes.verify(session) == []

    def test_the_condition_of_a_partial_index(self, indexes: SessionIndex, session: Session) -> None:
        grown = indexes.index(Person.name, name="grown", where=lambda person: person.age > 17)
        person = Person(name="x", age=20)
        session.add(person)
        assert grown(session, "x") == {person}
        person.age = None
        with pytest.raises(IndexFunctionError, match=r"index Person.grown: its function raised TypeError"):
            grown(session, "x")
        person.age = 3
        assert grown(session, "x") == set()

    def test_a_function_that_looks_up_its_own_index(
        self, indexes: SessionIndex, session: Session, people: list[Person]
    ) -> None:
        indexes.indexed(Person, "namesakes")(lambda person: len(indexes.namesakes(session, 1)))
        with pytest.raises(
            IndexFunctionError, match=r"index Person.namesakes: its function looks up this index"
        ):
            indexes.namesakes(session, 2)
        with pytest.raises(IndexFunctionError):
            indexes.namesakes(session, 2)

    def test_a_function_may_look_up_in_other_indexes(
        self, indexes: SessionIndex, session: Session, people: list[Person]
    ) -> None:
        by_name = indexes.index(Person.name)
        indexes.indexed(Person, "namesakes")(lambda person: len(by_name(session, person.name)))
        assert indexes.namesakes(session, 2) == {people[1], people[2]}
