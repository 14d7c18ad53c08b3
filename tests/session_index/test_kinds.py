"""The kinds of indexes, and what they refuse."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import ForeignKey, select
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import (
    DeclarativeBase,
    DynamicMapped,
    Mapped,
    Session,
    WriteOnlyMapped,
    aliased,
    mapped_column,
    relationship,
    sessionmaker,
)

from querycache.errors import ConfigurationError, QueryCacheError
from querycache.session_index import InvalidKey, ObjectSet, SessionIndex, UniqueConflict
from tests.session_index.conftest import Statements
from tests.session_index.models import Country, Item, Label, Manager, Person, Point


def add(session: Session, *objects: Any) -> list[Any]:
    session.add_all(objects)
    return list(objects)


class TestEquality:
    def test_keys_are_equal_as_in_python(self, indexes: SessionIndex, session: Session) -> None:
        by_raw = indexes.index(Item.raw)
        (item,) = add(session, Item(raw=1))
        assert by_raw(session, 1) == by_raw(session, 1.0) == by_raw(session, Decimal(1)) == {item}
        assert by_raw(session, "1") == set()

    def test_several_attributes(self, indexes: SessionIndex, session: Session) -> None:
        pair = indexes.index(Person.name, Person.age)
        one, other = add(session, Person(name="x", age=1), Person(name="x", age=2))
        assert pair(session, ("x", 1)) == {one}
        assert pair(session, ("x", 2)) == {other}
        for wrong in ("x", ("x",), ("x", 1, 2), ["x", 1]):
            with pytest.raises(InvalidKey, match="looked up by a tuple of 2 values, not by"):
                pair(session, wrong)

    def test_a_relationship_and_an_attribute(self, indexes: SessionIndex, session: Session) -> None:
        by_owner_and_title = indexes.index(Item.owner, Item.title)
        ann = Person()
        one, _, orphan = add(session, Item(owner=ann, title="x"), Item(owner=ann, title="y"), Item(title="x"))
        assert by_owner_and_title(session, (ann, "x")) == {one}
        assert by_owner_and_title(session, (None, "x")) == {orphan}
        session.flush()
        session.expire(one, ["owner"])
        assert by_owner_and_title(session, (ann, "x")) == {one}


class TestMany:
    def test_of_an_attribute(self, indexes: SessionIndex, session: Session) -> None:
        by_tag = indexes.index(Item.tags, multi=True)
        both, one, none, empty = add(
            session, Item(tags=["a", "b", "a"]), Item(tags=["b"]), Item(tags=None), Item(tags=[])
        )
        assert by_tag(session, "a") == {both}
        assert by_tag(session, "b") == {both, one}
        assert by_tag(session, None) == set()
        none.tags, empty.tags = ["a"], ["c"]
        assert by_tag(session, "a") == {both, none}
        assert by_tag(session, "c") == {empty}

    def test_one_string_is_not_many_keys(self, indexes: SessionIndex, session: Session) -> None:
        by_letter = indexes.index(Person.name, multi=True)
        (person,) = add(session, Person(name="ann"))
        with pytest.raises(InvalidKey, match=r"takes an iterable of them or None; <Person .* has 'ann'"):
            by_letter(session, "a")
        person.name = None
        assert by_letter(session, "a") == set()

    def test_a_number_is_not_many_keys(self, indexes: SessionIndex, session: Session) -> None:
        by_age = indexes.index(Person.age, multi=True)
        add(session, Person(age=1))
        with pytest.raises(InvalidKey, match="takes an iterable of them or None"):
            by_age(session, 1)

    def test_of_several_attributes_is_refused(self, indexes: SessionIndex) -> None:
        with pytest.raises(ConfigurationError, match="has one attribute or function, not 2"):
            indexes.index(Item.title, Item.tags, multi=True)
        with pytest.raises(ConfigurationError, match="has one attribute or function, not 2"):
            indexes.index(Item.title, Item.labels)


class TestUnique:
    def test_a_conflict_is_found_before_the_flush(
        self, indexes: SessionIndex, session: Session, statements: Statements
    ) -> None:
        by_name = indexes.index(Person.name, name="by_name", unique=True)
        one, other = add(session, Person(name="x"), Person(name="x"))
        with (
            statements.none(),
            pytest.raises(
                UniqueConflict,
                match=r"index Person.by_name is unique, and <Person .*> and <Person .*> have the key 'x'",
            ) as caught,
        ):
            session.flush()
        assert caught.value.index == "Person.by_name"
        assert caught.value.key == "x"
        assert set(caught.value.objects) == {one, other}
        other.name = "y"
        session.flush()
        assert by_name.get(session, "x") is one
        assert by_name.get(session, "z") is None
        other.name = "x"
        with pytest.raises(UniqueConflict):
            by_name.get(session, "x")
        with pytest.raises(UniqueConflict):
            session.flush()

    def test_swapping_is_no_conflict(self, indexes: SessionIndex, session: Session) -> None:
        indexes.index(Person.name, unique=True)
        one, other = add(session, Person(name="x"), Person(name="y"))
        session.flush()
        one.name, other.name = other.name, one.name
        session.flush()

    def test_none_conflicts_with_nothing(self, indexes: SessionIndex, session: Session) -> None:
        indexes.index(Person.name, unique=True)
        indexes.index(Person.name, Person.age, unique=True)
        add(session, Person(age=1), Person(age=1))
        session.flush()

    def test_what_is_to_be_deleted_conflicts_with_nothing(
        self, indexes: SessionIndex, session: Session
    ) -> None:
        indexes.index(Person.name, unique=True)
        (one,) = add(session, Person(name="x"))
        session.flush()
        session.delete(one)
        add(session, Person(name="x"))
        session.flush()

    def test_of_a_parent_in_either_form(self, indexes: SessionIndex, session: Session) -> None:
        """One child knows its parent by the relationship, the other by the foreign key only."""
        indexes.index(Item.owner, Item.title, unique=True)
        ann = Person()
        (one,) = add(session, Item(owner=ann, title="x"))
        session.flush()
        session.expire(one, ["owner"])
        add(session, Item(owner=ann, title="x"))
        with pytest.raises(UniqueConflict):
            session.flush()

    def test_of_a_parent_known_by_the_foreign_key_only(self, indexes: SessionIndex, session: Session) -> None:
        indexes.index(Item.owner, unique=True)
        ann = Person(id=1)
        one, other = add(session, Item(owner_id=1), Item(owner_id=2))
        add(session, ann)
        session.flush()
        other.owner_id = 1
        with pytest.raises(UniqueConflict) as caught:
            session.flush()
        assert set(caught.value.objects) == {one, other}

    def test_many_keys(self, indexes: SessionIndex, session: Session) -> None:
        indexes.index(Item.tags, multi=True, unique=True)
        add(session, Item(tags=["a", "b"]), Item(tags=["c", "b"]))
        with pytest.raises(UniqueConflict, match="'b'"):
            session.flush()

    def test_autoflush_and_commit_check_as_well(self, indexes: SessionIndex, session: Session) -> None:
        indexes.index(Person.name, unique=True)
        add(session, Person(name="x"), Person(name="x"))
        with pytest.raises(UniqueConflict):
            session.scalars(select(Label)).all()
        with pytest.raises(UniqueConflict):
            session.commit()
        session.rollback()
        session.commit()

    def test_an_unrelated_flush_reads_nothing(self, indexes: SessionIndex, session: Session) -> None:
        by_name = indexes.index(Person.name, unique=True)
        add(session, Label())
        session.flush()
        assert session.hash_key not in by_name._tracker.records

    def test_get_needs_it(self, indexes: SessionIndex, session: Session) -> None:
        with pytest.raises(
            ConfigurationError, match=r"is not unique: declare it with unique=True for get\(\)"
        ):
            indexes.index(Person.name).get(session, "x")


class TestOrdered:
    @given(
        ages=st.lists(st.none() | st.integers(0, 9), max_size=12),
        limits=st.tuples(*[st.none() | st.integers(-1, 10)] * 2),
        inclusive=st.tuples(st.booleans(), st.booleans()),
        reverse=st.booleans(),
    )
    def test_ranges(
        self,
        ages: list[int | None],
        limits: tuple[int | None, int | None],
        inclusive: tuple[bool, bool],
        reverse: bool,
    ) -> None:
        maker = sessionmaker()
        indexes = SessionIndex(maker)
        try:
            by_age = indexes.index(Person.age, ordered=True)
            with maker() as session:
                people = add(session, *(Person(age=age) for age in ages))
                low, high = limits
                found = by_age.range(session, low, high, inclusive=inclusive, reverse=reverse)
                expected = [
                    person
                    for person in people
                    if person.age is not None
                    and (low is None or person.age > low or (inclusive[0] and person.age == low))
                    and (high is None or person.age < high or (inclusive[1] and person.age == high))
                ]
                assert set(found) == set(expected) and len(found) == len(expected)
                assert [person.age for person in found] == sorted((p.age for p in expected), reverse=reverse)
                present = sorted(age for age in ages if age is not None)
                first, last = by_age.first(session), by_age.last(session)
                assert (first and first.age) == (present[0] if present else None)
                assert (last and last.age) == (present[-1] if present else None)
                assert by_age(session, 3) == {person for person in people if person.age == 3}
        finally:
            indexes.detach()

    def test_several_attributes(self, indexes: SessionIndex, session: Session) -> None:
        order = indexes.index(Person.name, Person.age, ordered=True)
        b1, a2, a1, _ = add(
            session,
            Person(name="b", age=1),
            Person(name="a", age=2),
            Person(name="a", age=1),
            Person(name="a"),
        )
        assert order.range(session) == [a1, a2, b1]
        assert order.range(session, ("a", 2)) == [a2, b1]
        assert order.last(session) is b1

    def test_many_keys(self, indexes: SessionIndex, session: Session) -> None:
        """An object comes once, where the first of its keys in the range puts it."""
        order = indexes.index(Item.tags, multi=True, ordered=True)
        both, late, none = add(session, Item(tags=["c", "a"]), Item(tags=["b", "d"]), Item(tags=[]))
        assert order.range(session) == [both, late]
        assert order.range(session, "b") == [late, both]
        assert order.range(session, reverse=True) == [late, both]
        assert order.range(session, high="c", reverse=True) == [both, late]
        assert order.first(session) is both
        assert order.last(session) is late
        assert none not in order.range(session)

    def test_composite(self, indexes: SessionIndex, session: Session) -> None:
        order = indexes.index(Item.position, ordered=True)
        two, one = add(session, Item(position=Point(2, 0)), Item(position=Point(1, 5)))
        assert order.range(session, Point(0, 0), Point(1, 9)) == [one]
        assert order.range(session) == [one, two]

    @pytest.mark.parametrize("key", ["text", (1, 2), math.nan, Decimal("NaN")])
    def test_keys_without_a_place_are_refused(
        self, indexes: SessionIndex, session: Session, key: Any
    ) -> None:
        order = indexes.index(Item.raw, ordered=True)
        one, item, two = add(session, Item(raw=1), Item(raw=key), Item(raw=2))
        with pytest.raises(
            InvalidKey, match=r"is ordered, and the key of <Item .* has no place among its keys"
        ):
            order.range(session)
        item.raw = 3
        assert order.range(session) == [one, two, item]

    def test_limits_of_another_type(self, indexes: SessionIndex, session: Session) -> None:
        order = indexes.index(Person.age, ordered=True)
        add(session, Person(age=1))
        with pytest.raises(InvalidKey, match=r"range\('a', None\)"):
            order.range(session, "a")

    def test_unknown_objects(self, indexes: SessionIndex, session: Session) -> None:
        order = indexes.index(Person.age, ordered=True)
        one, two = add(session, Person(age=1), Person(age=2))
        session.flush()
        session.expire(one)
        assert order.range(session) == [two]
        assert order.first(session) is two
        with pytest.raises(QueryCacheError):
            order.first(session, unknown="raise")
        assert order.first(session, unknown="load") is one
        assert order.range(session, unknown="raise") == [one, two]

    def test_objects_have_no_order(self, indexes: SessionIndex) -> None:
        for attributes in ([Item.owner], [Item.title, Item.owner], [Item.labels]):
            with pytest.raises(ConfigurationError, match="objects have no order"):
                indexes.index(*attributes, ordered=True)

    def test_it_has_to_be_declared(self, indexes: SessionIndex, session: Session) -> None:
        by_age = indexes.index(Person.age)
        for method in (by_age.range, by_age.first, by_age.last):
            with pytest.raises(ConfigurationError, match=r"has no order: declare it with ordered=True for"):
                method(session)


class TestPartial:
    def test_objects_enter_and_leave(self, indexes: SessionIndex, session: Session) -> None:
        grown = indexes.index(
            Person.name, where=lambda p: p.age is not None and p.age > 17, depends_on=[Person.age]
        )
        one, other = add(session, Person(name="x", age=18), Person(name="x"))
        assert grown(session, "x") == {one}
        other.age = 20
        one.age = 1
        assert grown(session, "x") == {other}

    def test_it_holds_nothing_of_the_others(self, indexes: SessionIndex, session: Session) -> None:
        never = indexes.index(Person.name, where=lambda person: False)
        add(session, *(Person(name="x") for _ in range(10)))
        assert never(session, "x") == set()
        record = never._tracker.records[session.hash_key]
        assert not record._entries and not record.views[never, False].placed

    def test_over_another_object(self, indexes: SessionIndex, session: Session) -> None:
        of_grown = indexes.index(
            Item.title,
            where=lambda item: item.owner is not None and (item.owner.age or 0) > 17,
            depends_on=[Item.owner, Person.age],
        )
        ann = Person(age=3)
        (item,) = add(session, Item(title="x", owner=ann))
        assert of_grown(session, "x") == set()
        ann.age = 18
        assert of_grown(session, "x") == {item}
        ann.age = 2
        assert of_grown(session, "x") == set()
        assert indexes.verify(session) == []


class TestPersisted:
    def test_beside_the_current_one(
        self, indexes: SessionIndex, session: Session, statements: Statements
    ) -> None:
        by_name = indexes.index(Person.name)
        order = indexes.index(Person.age, ordered=True)
        indexes.indexed(Person, "by_initial")(lambda person: person.initial)
        (person,) = add(session, Person(name="ann", age=1))
        assert by_name(session, "ann", persisted=True) == set()
        session.flush()
        person.name, person.age = "bob", 5
        with statements.none():
            assert by_name(session, "ann", persisted=True) == {person}
            assert by_name(session, "bob", persisted=True) == set()
            assert by_name(session, "bob") == {person}
            assert indexes.by_initial(session, "a", persisted=True) == {person}
            assert indexes.by_initial(session, "b") == {person}
            assert order.range(session, 1, 1, persisted=True) == [person]
            assert order.first(session, persisted=True) is person
            assert by_name.lookup(session, "ann", persisted=True).known == {person}
            assert indexes.verify(session) == []
        session.flush()
        assert by_name(session, "ann", persisted=True) == set()
        assert by_name(session, "bob", persisted=True) == {person}
        session.delete(person)
        assert by_name(session, "bob", persisted=True) == {person}
        session.flush()
        assert by_name(session, "bob", persisted=True) == set()

    def test_a_value_that_was_set_before_it_was_loaded_is_unknown(
        self, indexes: SessionIndex, session: Session, statements: Statements
    ) -> None:
        by_name = indexes.index(Person.name)
        indexes.indexed(Person, "by_initial")(lambda person: person.initial)
        (person,) = add(session, Person(name="ann"))
        session.commit()
        person.name = "bob"
        with statements.none():
            for index, key in ((by_name, "bob"), (indexes.by_initial, "b")):
                assert index(session, key) == {person}
                assert index.lookup(session, key, persisted=True).known == set()
                assert index.lookup(session, key, persisted=True).unknown == {person}

    def test_functions_see_every_kind_of_attribute(self, indexes: SessionIndex, session: Session) -> None:
        @indexes.indexed(Item, "summary")
        def summary(item: Item) -> Any:
            tags = item.tags
            return (
                item.title,
                tuple(tags) if tags is not None else None,
                item.position.x,
                item.owner,
                frozenset(id(label) for label in item.labels),
                type(item),
            )

        ann, bob, label = Person(name="ann"), Person(name="bob"), Label()
        (item,) = add(session, Item(title="t", tags=["a"], position=Point(1, 2), owner=ann, labels=[label]))
        session.flush()
        item.title, item.position, item.owner = "u", Point(3, 4), bob
        item.labels.append(Label())
        item.tags = ["b"]
        before = ("t", ("a",), 1, ann, frozenset({id(label)}), Item)
        assert indexes.summary(session, before, persisted=True) == {item}
        assert indexes.summary(session, before) == set()
        assert (item.title, item.owner, item.tags) == ("u", bob, ["b"])
        assert indexes.verify(session) == []

    def test_by_parent(self, indexes: SessionIndex, session: Session) -> None:
        by_owner = indexes.index(Item.owner)
        ann, bob = Person(), Person()
        (item,) = add(session, Item(owner=ann))
        add(session, bob)
        session.flush()
        item.owner = bob
        assert by_owner(session, ann, persisted=True) == by_owner(session, bob) == {item}
        assert by_owner(session, bob, persisted=True) == by_owner(session, ann) == set()
        session.flush()
        assert by_owner(session, bob, persisted=True) == {item}

    def test_by_a_parent_that_was_loaded_by_a_foreign_key_not_flushed_yet(
        self, indexes: SessionIndex, session: Session, statements: Statements
    ) -> None:
        by_owner = indexes.index(Item.owner)
        indexes.indexed(Item, "owner_of", depends_on=[Item.owner])(lambda item: item.owner)
        ann, bob = add(session, Person(), Person())
        (item,) = add(session, Item(owner=ann))
        session.commit()
        assert item.owner_id == ann.id and bob.id
        with session.no_autoflush:
            item.owner_id = bob.id
            assert by_owner(session, ann, persisted=True) == {item}
            assert item.owner is bob  # as SQLAlchemy loads it
        with statements.none():
            assert by_owner(session, bob) == {item}
            assert by_owner(session, ann, persisted=True) == {item}
            assert by_owner(session, bob, persisted=True) == set()
            assert indexes.owner_of.lookup(session, bob, persisted=True).known == set()
            assert indexes.owner_of.lookup(session, bob, persisted=True).unknown == {item}
            assert indexes.verify(session) == []
        item.owner_id = ann.id
        assert by_owner(session, ann, persisted=True) == {item}
        item.owner_id = bob.id
        session.flush()
        assert by_owner(session, bob, persisted=True) == indexes.owner_of(session, bob, persisted=True)
        assert by_owner(session, bob, persisted=True) == {item}
        assert indexes.verify(session) == []

    def test_a_value_set_and_deleted_before_it_was_loaded_is_unknown(
        self, indexes: SessionIndex, session: Session
    ) -> None:
        by_name = indexes.index(Person.name)
        indexes.indexed(Person, "by_initial")(lambda person: person.initial)
        (person,) = add(session, Person(name="ann"))
        session.commit()
        person.name = "bob"
        with session.no_autoflush:
            assert person.age is None  # loads everything but the name
        del person.name
        for index in (by_name, indexes.by_initial):
            assert index.lookup(session, None, persisted=True).known == set()
            assert index.lookup(session, None, persisted=True).unknown == {person}

    def test_not_where_other_objects_are_read(self, indexes: SessionIndex, session: Session) -> None:
        indexes.indexed(Item, "by_owner_name", depends_on=[Item.owner, Person.name])(
            lambda item: item.owner.name
        )
        with pytest.raises(ConfigurationError, match="reads other objects, whose state as of the last flush"):
            indexes.by_owner_name(session, "x", persisted=True)


class TestByParent:
    def test_another_class_is_refused(self, indexes: SessionIndex, session: Session) -> None:
        by_owner = indexes.index(Item.owner)
        for wrong in (1, "x", Label(), Person):
            with pytest.raises(InvalidKey, match="is looked up by a Person object or None, not by"):
                by_owner(session, wrong)
        assert by_owner(session, Manager()) == set()

    def test_not_by_the_primary_key_of_the_parent(self, indexes: SessionIndex, session: Session) -> None:
        """A foreign key to something else than the primary key does not tell the identity."""

        class Other(DeclarativeBase):
            pass

        class Town(Other):
            __tablename__ = "town"
            id: Mapped[int] = mapped_column(primary_key=True)
            zip: Mapped[str] = mapped_column(unique=True)

        class House(Other):
            __tablename__ = "house"
            id: Mapped[int] = mapped_column(primary_key=True)
            zip: Mapped[str] = mapped_column(ForeignKey("town.zip"))
            town: Mapped[Town] = relationship()

        by_town = indexes.index(House.town)
        Other.metadata.create_all(session.connection())
        town, house = add(session, Town(zip="1"), House())
        house.town = town
        session.flush()
        assert by_town(session, town) == {house}
        session.expire(house, ["town"])
        assert by_town.lookup(session, town).unknown == {house}
        assert house.town is town
        assert by_town(session, town) == {house}


class TestRefusals:
    def test_unhashable_keys(self, indexes: SessionIndex, session: Session) -> None:
        by_raw = indexes.index(Item.raw)
        (item,) = add(session, Item(raw=["a"]))
        with pytest.raises(
            InvalidKey, match=r"the key \['a'\] of <Item .* is not hashable; use a tuple"
        ) as caught:
            by_raw(session, "a")
        assert isinstance(caught.value, TypeError) and isinstance(caught.value, QueryCacheError)
        item.raw = "a"
        assert by_raw(session, "a") == {item}
        with pytest.raises(InvalidKey, match=r"the key \['a'\] is not hashable"):
            by_raw(session, ["a"])

    def test_looking_up_by_sql(self, indexes: SessionIndex, session: Session) -> None:
        pair = indexes.index(Person.name, Person.age)
        for index, value in ((indexes.index(Person.name), Person.name == "x"), (pair, ("x", Person.age))):
            with pytest.raises(InvalidKey, match="is looked up by values, not by SQL"):
                index(session, value)

    @pytest.mark.parametrize("value", [1, "xy", (1,), (1, 2, 3), Label()])
    def test_looking_up_a_composite_by_something_else(
        self, indexes: SessionIndex, session: Session, value: Any
    ) -> None:
        with pytest.raises(InvalidKey, match="is looked up by a Point or a tuple of 2 values, not by"):
            indexes.index(Item.position)(session, value)

    @pytest.mark.parametrize(
        "attribute",
        [
            "name",
            Person,
            Person.__table__.c.name,
            aliased(Person).name,
            None,
            lambda p: p.name,
            Person.initial,
        ],
    )
    def test_what_is_no_attribute(self, indexes: SessionIndex, attribute: Any) -> None:
        with pytest.raises(ConfigurationError, match="is not a mapped attribute; give column, composite or"):
            indexes.index(attribute)
        with pytest.raises(ConfigurationError, match="is not a mapped attribute; give column, composite or"):
            indexes.indexed(Person, "x", depends_on=[attribute])(lambda p: 1)

    def test_hybrids_and_loaders_that_hold_nothing(self, indexes: SessionIndex) -> None:
        class Other(DeclarativeBase):
            pass

        class Parent(Other):
            __tablename__ = "parent"
            id: Mapped[int] = mapped_column(primary_key=True)
            dynamic: DynamicMapped[Child] = relationship(viewonly=True)
            write_only: WriteOnlyMapped[Child] = relationship(viewonly=True)

            @hybrid_property
            def double(self) -> int:
                return self.id * 2

        class Child(Other):
            __tablename__ = "child"
            id: Mapped[int] = mapped_column(primary_key=True)
            parent_id: Mapped[int] = mapped_column(ForeignKey("parent.id"))

        with pytest.raises(ConfigurationError, match="is not a mapped attribute"):
            indexes.index(Parent.double)
        other = SessionIndex()
        try:
            other.index(Parent.dynamic)
            with pytest.raises(ConfigurationError, match="lazy='dynamic' and holds no objects in memory"):
                Parent()
            with pytest.raises(ConfigurationError, match="lazy='dynamic' and holds no objects in memory"):
                other._all[0](Session(), Child())
        finally:
            other.detach()
        with pytest.raises(ConfigurationError, match="lazy='write_only' and holds no objects in memory"):
            indexes.index(Parent.write_only)
        with pytest.raises(ConfigurationError, match="lazy='dynamic' and holds no objects in memory"):
            indexes.indexed(Parent, "x", depends_on=[Parent.dynamic])(lambda parent: 1)

    def test_no_attribute(self, indexes: SessionIndex) -> None:
        with pytest.raises(ConfigurationError, match="give one or more attributes"):
            indexes.index()

    def test_attributes_of_two_classes(self, indexes: SessionIndex) -> None:
        with pytest.raises(ConfigurationError, match=r"Item.title is not an attribute of Person"):
            indexes.index(Person.name, Item.title)

    @pytest.mark.parametrize("cls", [int, DeclarativeBase, None, "Person", Person()])
    def test_a_class_that_is_not_mapped(self, indexes: SessionIndex, cls: Any) -> None:
        with pytest.raises(ConfigurationError, match="is not a mapped class"):
            indexes.indexed(cls, "x")

    def test_names_that_are_taken(self, indexes: SessionIndex) -> None:
        indexes.index(Person.name, name="by_name")
        for name in ("by_name", "verify", "detach", "index", "_scope"):
            with pytest.raises(
                ConfigurationError, match=f"of the name '{name}' for Person; give another name"
            ):
                indexes.index(Person.age, name=name)
        with pytest.raises(ConfigurationError):
            indexes.indexed(Person, "by_name")(lambda person: person.age)
        assert indexes.index(Country.title, name="by_name") is indexes[Country, "by_name"]

    def test_names_that_are_not(self, indexes: SessionIndex) -> None:
        with pytest.raises(AttributeError, match="there is no session index 'nothing'"):
            indexes.nothing  # noqa: B018
        with pytest.raises(KeyError, match="there is no session index"):
            indexes[Person, "nothing"]
        assert not hasattr(indexes, "__len__")

    def test_dependencies_that_lead_nowhere(self, indexes: SessionIndex) -> None:
        with pytest.raises(
            ConfigurationError, match=r"depends_on has Person.name, but no relationship to Person"
        ):
            indexes.indexed(Item, "x", depends_on=[Person.name])(lambda item: 1)
        with pytest.raises(
            ConfigurationError, match=r"depends_on has Country.title, but no relationship to Country"
        ):
            indexes.indexed(Item, "x", depends_on=[Item.owner, Country.title])(lambda item: 1)
        indexes.indexed(Item, "x", depends_on=[Item.owner, Person.country, Country.title])(lambda item: 1)


class TestObjectSet:
    def test_it_is_by_identity_and_compares_with_sets(self) -> None:
        one, two, three = Label(), Label(), Label()
        found = ObjectSet([one, two])
        assert found == {one, two} and {one, two} == found and found != {one} and {one} < found
        assert (
            found | {three} == {one, two, three} and found - {one} == {two} and {one, three} & found == {one}
        )
        assert one in found and three not in found and len(found) == 2 and list(found) == [one, two]
        found.add(three)
        found.discard(one)
        assert found == {two, three}
        assert repr(ObjectSet([1])) == "ObjectSet([1])"

    def test_it_belongs_to_its_caller(self, indexes: SessionIndex, session: Session) -> None:
        by_name = indexes.index(Person.name)
        (person,) = add(session, Person(name="x"))
        by_name(session, "x").clear()
        assert by_name(session, "x") == {person}
