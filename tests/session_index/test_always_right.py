"""What can happen to an object, one kind at a time; the state machine mixes them."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from sqlalchemy import insert, select
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    joinedload,
    make_transient,
    mapped_column,
    selectinload,
    sessionmaker,
)
from sqlalchemy.orm.attributes import flag_modified

from querycache.session_index import SessionIndex
from tests.session_index.conftest import Statements
from tests.session_index.models import Clerk, Country, Item, Label, Manager, Person, Point


@pytest.fixture
def person(session: Session) -> Person:
    person = Person(name="a", age=1)
    session.add(person)
    session.commit()
    assert person.name == "a"
    return person


class TestRollback:
    def test_of_a_mutation(self, indexes: SessionIndex, session: Session, person: Person) -> None:
        by_name = indexes.index(Person.name)
        person.name = "b"
        session.flush()
        assert by_name(session, "b") == {person}
        session.rollback()
        assert by_name.lookup(session, "a").unknown == {person}
        assert person.name == "a"
        assert by_name(session, "a") == {person}

    def test_of_a_savepoint(self, indexes: SessionIndex, session: Session, person: Person) -> None:
        by_name = indexes.index(Person.name)
        person.name = "b"
        with session.begin_nested() as savepoint:
            person.name = "c"
            inner = Person(name="c")
            session.add(inner)
            assert by_name(session, "c") == {person, inner}
            session.flush()
            assert by_name(session, "c") == {person, inner}
            savepoint.rollback()
        assert by_name(session, "c", unknown="load") == set()
        assert by_name(session, "b") == {person}

    def test_of_a_deletion_in_a_savepoint(
        self, indexes: SessionIndex, session: Session, person: Person
    ) -> None:
        by_name = indexes.index(Person.name)
        with session.begin_nested() as savepoint:
            session.delete(person)
            session.flush()
            assert by_name(session, "a") == set()
            savepoint.rollback()
        assert by_name(session, "a", unknown="load") == {person}

    def test_of_a_failed_flush(self, indexes: SessionIndex, session: Session, person: Person) -> None:
        by_id = indexes.index(Person.id)
        twin = Person(id=person.id, name="b")
        session.add(twin)
        assert by_id(session, person.id) == {person, twin}
        with pytest.warns(), pytest.raises(Exception, match="UNIQUE constraint"):
            session.flush()
        session.rollback()
        assert by_id(session, 1, unknown="load") == {person}


class TestComingAndGoing:
    def test_undelete(self, indexes: SessionIndex, session: Session, person: Person) -> None:
        by_name = indexes.index(Person.name)
        session.delete(person)
        session.add(person)
        session.flush()
        assert by_name(session, "a") == {person}

    def test_reattach_changed_in_between(
        self, indexes: SessionIndex, session: Session, person: Person
    ) -> None:
        by_name = indexes.index(Person.name)
        assert by_name(session, "a") == {person}
        session.expunge(person)
        person.name = "b"
        assert by_name(session, "a") == by_name(session, "b") == set()
        session.add(person)
        assert by_name(session, "b") == {person}

    def test_expunge_and_reattach_between_lookups(
        self, indexes: SessionIndex, session: Session, person: Person
    ) -> None:
        by_name = indexes.index(Person.name)
        assert by_name(session, "a") == {person}
        session.expunge(person)
        person.name = "b"
        session.add(person)
        assert by_name(session, "a") == set()
        assert by_name(session, "b") == {person}

    def test_moving_to_another_session(
        self, indexes: SessionIndex, session: Session, factory: sessionmaker[Session], person: Person
    ) -> None:
        by_name = indexes.index(Person.name)
        with factory() as other:
            assert by_name(session, "a") == {person} and by_name(other, "a") == set()
            session.expunge(person)
            other.add(person)
            assert by_name(session, "a") == set() and by_name(other, "a") == {person}
            person.name = "b"
            assert by_name(session, "b") == set() and by_name(other, "b") == {person}

    def test_make_transient(self, indexes: SessionIndex, session: Session, person: Person) -> None:
        by_name = indexes.index(Person.name)
        assert by_name(session, "a") == {person}
        make_transient(person)
        assert by_name(session, "a") == set()

    def test_pickled_objects(self, indexes: SessionIndex, session: Session, person: Person) -> None:
        by_name = indexes.index(Person.name)
        assert by_name(session, "a") == {person}
        session.expunge(person)
        other = pickle.loads(pickle.dumps(person))
        session.add(other)
        assert by_name(session, "a") == {other}
        other.name = "b"
        assert by_name(session, "b") == {other}

    def test_close_and_use_again(self, indexes: SessionIndex, session: Session, person: Person) -> None:
        by_name = indexes.index(Person.name)
        assert by_name(session, "a") == {person}
        session.close()
        again = session.get_one(Person, person.id)
        assert again is not person
        assert by_name(session, "a") == {again}

    def test_row_switch(self, indexes: SessionIndex, session: Session, person: Person) -> None:
        """A delete and an insert of one primary key become one UPDATE."""
        by_name = indexes.index(Person.name)
        session.delete(person)
        other = Person(id=person.id, name="b")
        session.add(other)
        assert by_name(session, "a") == {person}
        session.flush()
        assert by_name(session, "a") == set()
        assert by_name(session, "b") == {other}

    def test_delete_orphans_children(self, indexes: SessionIndex, session: Session, person: Person) -> None:
        by_owner, by_owner_id = indexes.index(Item.owner), indexes.index(Item.owner_id)
        item = Item(owner=person)
        session.add(item)
        session.flush()
        assert by_owner_id(session, person.id) == {item}
        session.delete(person)
        session.flush()
        assert by_owner_id(session, None) == {item}
        assert by_owner(session, person) == {item}  # as item.owner says until it is expired
        session.commit()
        assert by_owner(session, None, unknown="load") == {item}

    def test_merge_into_a_loaded_object(
        self, indexes: SessionIndex, session: Session, person: Person
    ) -> None:
        by_name = indexes.index(Person.name)
        assert by_name(session, "a") == {person}
        assert session.merge(Person(id=person.id, name="b")) is person
        assert by_name(session, "b") == {person}


class TestReparenting:
    def test_from_either_side(self, indexes: SessionIndex, session: Session) -> None:
        by_owner = indexes.index(Item.owner)
        ann, bob, item = Person(name="ann"), Person(name="bob"), Item()
        session.add_all([ann, bob, item])
        assert by_owner(session, None) == {item}
        item.owner = ann
        assert by_owner(session, ann) == {item}
        bob.items.append(item)
        assert by_owner(session, ann) == set() and by_owner(session, bob) == {item}
        session.flush()
        assert by_owner(session, ann) == set() and by_owner(session, bob) == {item}
        bob.items.remove(item)
        assert by_owner(session, None) == {item}
        ann.items = [item]
        assert by_owner(session, ann) == {item}

    def test_by_foreign_key_while_the_parent_is_not_loaded(
        self, indexes: SessionIndex, session: Session, statements: Statements
    ) -> None:
        by_owner = indexes.index(Item.owner)
        session.execute(insert(Person), [{"id": i, "kind": "person"} for i in (1, 2)])
        session.execute(insert(Item), [{"id": 1, "owner_id": 1}])
        item = session.scalars(select(Item)).one()
        ann, bob = session.scalars(select(Person).order_by(Person.id))
        with statements.none():
            assert by_owner(session, ann) == {item}
            item.owner_id = 2
            assert by_owner(session, ann) == set() and by_owner(session, bob) == {item}
            assert item.owner is bob  # silently loaded
            assert by_owner(session, ann) == set() and by_owner(session, bob) == {item}
            assert indexes.verify(session) == []

    def test_parent_becomes_persistent(self, indexes: SessionIndex, session: Session) -> None:
        by_owner = indexes.index(Item.owner)
        ann, item = Person(), Item()
        item.owner = ann
        session.add(item)
        assert by_owner(session, ann) == {item}
        session.flush()
        assert by_owner(session, ann) == {item}
        session.expire(item, ["owner"])
        assert by_owner(session, ann) == {item}
        session.expire(item)
        assert by_owner.lookup(session, ann).unknown == {item}

    def test_by_a_copy_of_the_parent(self, indexes: SessionIndex, session: Session) -> None:
        """An object of elsewhere stands for this session's object of the same identity."""
        by_owner, by_label = indexes.index(Item.owner), indexes.index(Item.labels)
        item = Item(owner=Person(), labels=[Label()])
        session.add(item)
        session.flush()
        assert by_owner(session, pickle.loads(pickle.dumps(item.owner))) == {item}
        assert by_label(session, pickle.loads(pickle.dumps(item.labels[0]))) == {item}
        assert by_owner(session, Person()) == set()

    def test_by_an_object_that_has_left_the_session(self, indexes: SessionIndex, session: Session) -> None:
        """Children keep the parent that they have loaded, though the session has another of its identity."""
        by_owner, by_label = indexes.index(Item.owner), indexes.index(Item.labels)
        by_both = indexes.index(Item.owner, Item.title)
        indexes.indexed(Item, "owner_of", depends_on=[Item.owner])(lambda item: item.owner)
        ann, label = Person(), Label()
        item = Item(title="t", owner=ann, labels=[label])
        session.add(item)
        session.flush()
        session.expunge(ann)
        session.expunge(label)
        others = session.get(Person, ann.id), session.get(Label, label.id)
        assert others[0] is not item.owner is ann and others[1] is not item.labels[0] is label
        assert by_owner(session, ann) == by_label(session, label) == {item}
        assert by_both(session, (ann, "t")) == indexes.owner_of(session, ann) == {item}
        assert indexes.verify(session) == []

    def test_of_itself(self, indexes: SessionIndex, session: Session) -> None:
        by_parent = indexes.index(Item.parent)
        root, child = Item(), Item()
        child.parent = root
        session.add(child)
        assert by_parent(session, root) == {child}
        assert by_parent(session, None) == {root}
        root.children.remove(child)
        assert by_parent(session, None) == {root, child}


class TestInheritance:
    def test_an_index_on_the_base_holds_subclasses(self, indexes: SessionIndex, session: Session) -> None:
        by_name, by_grade, by_desk = (indexes.index(a) for a in (Person.name, Manager.grade, Clerk.desk))
        person, manager, clerk = Person(name="x"), Manager(name="x", grade=1), Clerk(name="x", desk=2)
        session.add_all([person, manager, clerk])
        assert by_name(session, "x") == {person, manager, clerk}
        assert by_grade(session, 1) == {manager}
        assert by_desk(session, 2) == {clerk}
        assert by_grade(session, None) == by_desk(session, None) == set()
        manager.grade, manager.name = 3, "y"
        clerk.desk = 4
        assert by_name(session, "x") == {person, clerk}
        assert by_grade(session, 3) == {manager}
        assert by_desk(session, 4) == {clerk}

    def test_an_inherited_attribute_of_a_subclass(self, indexes: SessionIndex, session: Session) -> None:
        managers_by_name = indexes.index(Manager.name)
        pair = indexes.index(Manager.name, Manager.grade)
        person, manager = Person(name="x"), Manager(name="x", grade=1)
        session.add_all([person, manager])
        assert managers_by_name(session, "x") == {manager}
        assert pair(session, ("x", 1)) == {manager}
        manager.name = "y"
        assert managers_by_name(session, "y") == {manager}
        assert pair(session, ("y", 1)) == {manager}

    def test_a_function_over_attributes_of_subclasses(self, indexes: SessionIndex, session: Session) -> None:
        indexes.indexed(Person, "rank_or_grade")(lambda person: getattr(person, "grade", "none"))
        indexes.indexed(Person, "declared", depends_on=[Manager.grade])(
            lambda person: getattr(person, "grade", "none")
        )
        person, manager = Person(), Manager(grade=1)
        session.add_all([person, manager])
        for index in (indexes.rank_or_grade, indexes.declared):
            assert index(session, "none") == {person}
            assert index(session, 1) == {manager}
        manager.grade = 2
        for index in (indexes.rank_or_grade, indexes.declared):
            assert index(session, 2) == {manager}

    def test_a_row_loaded_through_the_base(
        self, indexes: SessionIndex, session: Session, statements: Statements
    ) -> None:
        by_grade = indexes.index(Manager.grade)
        session.add(Manager(id=1, grade=5))
        session.commit()
        session.expunge_all()
        manager = session.scalars(select(Person)).one()
        with statements.none():
            assert by_grade.lookup(session, 5).unknown == {manager}
        assert by_grade(session, 5, unknown="load") == {manager}

    def test_concrete_inheritance(self, indexes: SessionIndex, session: Session) -> None:
        class Other(DeclarativeBase):
            pass

        class Animal(Other):
            __tablename__ = "animal"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str | None]
            legs: Mapped[int | None]

        class Cat(Animal):
            __tablename__ = "cat"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str | None]
            __mapper_args__ = {"concrete": True}

        by_name = indexes.index(Animal.name)
        indexes.indexed(Animal, "upper")(lambda animal: animal.name and animal.name.upper())
        cats_by_name = indexes.index(Cat.name)
        animal, cat = Animal(name="x"), Cat(name="x")
        session.add_all([animal, cat])
        assert by_name(session, "x") == indexes.upper(session, "X") == {animal, cat}
        assert cats_by_name(session, "x") == {cat}
        cat.name = "y"
        assert by_name(session, "y") == indexes.upper(session, "Y") == cats_by_name(session, "y") == {cat}

    def test_classes_mapped_after_the_index(self, indexes: SessionIndex, session: Session) -> None:
        class Other(DeclarativeBase):
            pass

        class Animal(Other):
            __tablename__ = "animal"
            id: Mapped[int] = mapped_column(primary_key=True)
            kind: Mapped[str]
            name: Mapped[str | None]
            __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}

        by_name = indexes.index(Animal.name)
        indexes.indexed(Animal, "lives")(lambda animal: getattr(animal, "lives", 1))
        animal = Animal(name="x")
        session.add(animal)
        assert by_name(session, "x") == indexes.lives(session, 1) == {animal}

        class Cat(Animal):
            lives: Mapped[int | None] = mapped_column()
            __mapper_args__ = {"polymorphic_identity": "cat"}

        cat = Cat(name="x", lives=9)
        session.add(cat)
        assert by_name(session, "x") == {animal, cat}
        assert indexes.lives(session, 9) == {cat}
        cat.name, cat.lives = "y", 8
        assert by_name(session, "y") == indexes.lives(session, 8) == {cat}
        assert indexes.verify(session) == []


class TestKindsOfValues:
    def test_composite_attributes(self, indexes: SessionIndex, session: Session) -> None:
        by_position = indexes.index(Item.position)
        item = Item(position=Point(1, 2))
        session.add(item)
        assert by_position(session, Point(1, 2)) == by_position(session, (1, 2)) == {item}
        item.position = Point(3, 4)
        assert by_position(session, Point(3, 4)) == {item}
        item.x = 5
        assert by_position(session, Point(5, 4)) == {item}
        session.flush()
        session.expire(item, ["y"])
        assert by_position.lookup(session, Point(5, 4)).unknown == {item}
        setattr(item, "position", None)  # noqa: B010 - the declaration does not say that it may
        assert by_position(session, None) == by_position(session, Point(None, None)) == {item}

    def test_natural_key_change(self, indexes: SessionIndex, session: Session) -> None:
        by_code, by_country = indexes.index(Country.code), indexes.index(Person.country)
        country = Country(code="x", people=[Person()])
        session.add(country)
        session.commit()
        (person,) = country.people
        assert by_code(session, "x") == {country}
        country.code = "y"
        assert by_code(session, "y") == {country}
        session.flush()
        assert by_code(session, "y") == {country}
        assert by_country(session, country) == {person}
        session.expire(person, ["country"])
        assert by_country(session, country) == {person}
        session.rollback()
        assert by_code(session, "x", unknown="load") == {country}
        assert by_country(session, country, unknown="load") == {person}

    def test_changed_in_place_with_flag_modified(self, indexes: SessionIndex, session: Session) -> None:
        by_raw = indexes.index(Item.raw, multi=True)
        item = Item(raw=["a"])
        session.add(item)
        assert by_raw(session, "a") == {item}
        item.raw.append("b")
        flag_modified(item, "raw")
        assert by_raw(session, "b") == {item}

    def test_sql_expressions_are_unknown_until_they_are_flushed(
        self, indexes: SessionIndex, session: Session, person: Person
    ) -> None:
        by_age = indexes.index(Person.age, ordered=True)
        indexes.indexed(Person, "grown", depends_on=[Person.age])(lambda p: p.age is not None and p.age > 1)
        person.age = Person.age + 1
        for index in (by_age, indexes.grown):
            assert index.lookup(session, 2).unknown == {person}
        session.flush()
        assert by_age(session, 2, unknown="load") == {person}
        assert indexes.grown(session, True) == {person}

    def test_collections_changed_and_loaded_in_every_way(
        self, indexes: SessionIndex, session: Session, statements: Statements
    ) -> None:
        by_label = indexes.index(Item.labels)
        one, two = Label(), Label()
        item = Item(labels=[one])
        session.add_all([item, two])
        assert by_label(session, one) == {item}
        item.labels.append(two)
        item.labels.remove(one)
        assert by_label(session, one) == set() and by_label(session, two) == {item}
        item.labels[0] = one
        assert by_label(session, one) == {item} and by_label(session, two) == set()
        item.labels = [one, two]
        session.commit()
        assert by_label.lookup(session, one).unknown == {item}
        assert len(item.labels) == 2  # a lazy load, of which no event of a row tells
        with statements.none():
            assert by_label(session, one) == by_label(session, two) == {item}
        for option in (joinedload, selectinload):
            session.expire_all()
            assert by_label(session, one) == set()
            session.scalars(select(Item).options(option(Item.labels))).unique().all()
            with statements.none():
                assert by_label(session, one) == by_label(session, two) == {item}

    def test_attribute_deleted(self, indexes: SessionIndex, session: Session, person: Person) -> None:
        by_name = indexes.index(Person.name)
        assert by_name(session, "a") == {person}
        del person.name
        assert person.name is None
        assert by_name(session, None) == {person}

    def test_a_synonym_is_what_it_stands_for(self, indexes: SessionIndex, session: Session) -> None:
        by_nick = indexes.index(Person.nick)
        person = Person(nick="x")
        session.add(person)
        assert by_nick(session, "x") == {person}
        person.name = "y"
        assert by_nick(session, "y") == {person}


class TestReadingOtherObjects:
    @pytest.fixture
    def by_owner_name(self, indexes: SessionIndex) -> Any:
        indexes.indexed(Item, "by_owner_name", depends_on=[Item.owner, Person.name])(
            lambda item: item.owner and item.owner.name
        )
        return indexes.by_owner_name

    def test_the_other_object_changes(self, by_owner_name: Any, session: Session) -> None:
        ann, item, other = Person(name="ann"), Item(), Item()
        item.owner = ann
        session.add_all([item, other])
        assert by_owner_name(session, "ann") == {item}
        assert by_owner_name(session, None) == {other}
        ann.name = "eve"
        assert by_owner_name(session, "eve") == {item}
        other.owner = ann
        assert by_owner_name(session, "eve") == {item, other}
        item.owner = None
        ann.name = "zoe"
        assert by_owner_name(session, "zoe") == {other}
        assert by_owner_name(session, None) == {item}

    def test_the_other_object_is_expired_and_reloaded(
        self, by_owner_name: Any, session: Session, statements: Statements
    ) -> None:
        ann, item = Person(name="ann"), Item()
        item.owner = ann
        session.add(item)
        session.flush()
        session.expire(ann)
        with statements.none():
            assert by_owner_name.lookup(session, "ann").unknown == {item}
        assert ann.name == "ann"
        assert by_owner_name(session, "ann") == {item}
        session.expire(item)
        assert item.title is None
        with statements.none():
            assert by_owner_name.lookup(session, "ann").unknown == {item}
        assert item.owner is ann  # from the identity map: no SQL, no event
        with statements.none():
            assert by_owner_name(session, "ann") == {item}

    def test_the_other_object_has_left_the_session(self, by_owner_name: Any, session: Session) -> None:
        ann, item = Person(name="ann"), Item()
        item.owner = ann
        session.add(item)
        session.flush()
        assert by_owner_name(session, "ann") == {item}
        session.expunge(ann)
        ann.name = "eve"
        assert item.owner is ann
        assert by_owner_name(session, "eve") == {item}

    def test_bulk_update_of_the_other_objects(self, by_owner_name: Any, session: Session) -> None:
        ann, item = Person(name="ann"), Item()
        item.owner = ann
        session.add(item)
        session.flush()
        assert by_owner_name(session, "ann") == {item}
        session.query(Person).update({Person.name: "eve"})
        assert by_owner_name(session, "eve", unknown="load") == {item}

    def test_a_chain_to_itself(self, indexes: SessionIndex, session: Session) -> None:
        @indexes.indexed(Item, "by_root", depends_on=[Item.parent, Item.title])
        def by_root(item: Item) -> str | None:
            while item.parent is not None:
                item = item.parent
            return item.title

        root, middle, leaf = Item(title="r"), Item(title="m"), Item(title="l")
        leaf.parent, middle.parent = middle, root
        session.add(leaf)
        assert indexes.by_root(session, "r") == {root, middle, leaf}
        root.title = "x"
        assert indexes.by_root(session, "x") == {root, middle, leaf}
        middle.parent = None
        assert indexes.by_root(session, "m") == {middle, leaf}
        leaf.parent = root
        assert indexes.by_root(session, "x") == {root, leaf}
        assert indexes.verify(session) == []

    def test_through_collections(self, indexes: SessionIndex, session: Session) -> None:
        indexes.indexed(Item, "by_text", depends_on=[Item.labels, Label.text], multi=True)(
            lambda item: (label.text for label in item.labels)
        )
        one, two = Label(text="1"), Label(text="2")
        item = Item(labels=[one, two])
        session.add(item)
        assert indexes.by_text(session, "1") == indexes.by_text(session, "2") == {item}
        two.text = "3"
        assert indexes.by_text(session, "2") == set()
        assert indexes.by_text(session, "3") == {item}
        item.labels.remove(two)
        two.text = "4"
        assert indexes.by_text(session, "4") == set()
        assert indexes.verify(session) == []


def test_many_loads_between_two_lookups(indexes: SessionIndex, session: Session) -> None:
    """More than are remembered one by one."""
    by_age = indexes.index(Person.age)
    assert by_age(session, 1) == set()
    record = by_age._tracker.records[session.hash_key]
    assert record.loaded.maxlen
    session.execute(
        insert(Person), [{"id": i, "kind": "person", "age": i % 2} for i in range(record.loaded.maxlen + 9)]
    )
    people = session.scalars(select(Person)).all()
    assert len(record.loaded) == record.loaded.maxlen
    assert len(by_age(session, 1)) == len(people) // 2
    assert len(record.loaded) == 0
    assert by_age.verify(session) == []
