"""A test for every line of section G of the pitfalls, each failing on the naive way."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import delete, event, insert, inspect, select, text, update
from sqlalchemy.orm import Session, SessionEvents, object_session
from sqlalchemy.orm.attributes import set_committed_value

from querycache.session_index import SessionIndex
from tests.session_index.conftest import Statements
from tests.session_index.models import Item, Label, Note, Person, Topic


@pytest.fixture
def people(session: Session) -> list[Person]:
    """Three people in the database, loaded."""
    session.execute(
        insert(Person), [{"id": i, "kind": "person", "name": n, "age": i} for i, n in enumerate("abb", 1)]
    )
    session.commit()
    return list(session.scalars(select(Person).order_by(Person.id)))


class TestG1TheRecipeStillMatches:
    def test_G1_after_mutation(self, indexes: SessionIndex, session: Session, people: list[Person]) -> None:
        by_name = indexes.index(Person.name)
        assert by_name(session, "b") == {people[1], people[2]}
        people[1].name = "c"
        assert by_name(session, "b") == {people[2]}
        assert by_name(session, "c") == {people[1]}

    def test_G1_after_rollback_of_a_pending_object(self, indexes: SessionIndex, session: Session) -> None:
        by_name = indexes.index(Person.name)
        person = Person(name="x")
        session.add(person)
        assert by_name(session, "x") == {person}
        session.rollback()
        assert person.name == "x"
        assert by_name(session, "x") == set()

    def test_G1_after_delete(self, indexes: SessionIndex, session: Session, people: list[Person]) -> None:
        by_name = indexes.index(Person.name)
        session.delete(people[0])
        assert by_name(session, "a") == {people[0]}  # persistent until it is flushed
        session.flush()
        assert by_name(session, "a") == set()

    def test_G1_after_expunge_and_close(
        self, indexes: SessionIndex, session: Session, people: list[Person]
    ) -> None:
        by_name = indexes.index(Person.name)
        assert by_name(session, "b") == {people[1], people[2]}
        session.expunge(people[1])
        assert by_name(session, "b") == {people[2]}
        session.close()
        assert by_name(session, "b") == set()

    def test_G1_add_then_set(self, indexes: SessionIndex, session: Session) -> None:
        by_name = indexes.index(Person.name)
        person = Person()
        session.add(person)
        assert by_name(session, None) == {person}
        person.name = "x"
        assert by_name(session, None) == set()
        assert by_name(session, "x") == {person}

    def test_G1_indexes_of_two_classes_share_a_name(self, indexes: SessionIndex, session: Session) -> None:
        indexes.indexed(Person, "by_text")(lambda person: person.name)
        indexes.indexed(Label, "by_text")(lambda label: label.text)
        person, label = Person(name="x"), Label(text="x")
        session.add_all([person, label])
        assert indexes[Person, "by_text"](session, "x") == {person}
        assert indexes[Label, "by_text"](session, "x") == {label}
        with pytest.raises(AttributeError, match=r"Label, Person each have .*indexes\[Class, \"by_text\"\]"):
            indexes.by_text(session, "x")

    def test_G1_no_listener_on_session_leaks(
        self, new_index: Callable[..., SessionIndex], session: Session
    ) -> None:
        before = session_listeners(session)
        assert "after_attach" in before
        indexes = new_index()
        by_name = indexes.index(Person.name)
        by_name(session, "a")
        assert session_listeners(session) != before
        assert session_listeners(Session()) == before  # other sessions are left alone
        by_age = indexes.index(Person.age, unique=True)
        by_age(session, 1)
        indexes.detach()
        assert session_listeners(session) == session_listeners(Session()) == before


class TestG2ObjectsThatBreakTheRecipe:
    def test_G2_merge_of_a_new_row(
        self, indexes: SessionIndex, session: Session, people: list[Person]
    ) -> None:
        by_name = indexes.index(Person.name)
        assert by_name(session, "x") == set()
        merged = session.merge(Person(id=9, name="x"))
        assert by_name(session, "x") == {merged}

    def test_G2_dataclasses_are_unhashable(self, indexes: SessionIndex, session: Session) -> None:
        by_text = indexes.index(Note.text)
        one, other = Note(text="x"), Note(text="x")
        assert one == other
        session.add_all([one, other])
        found = by_text(session, "x")
        assert len(found) == 2
        assert {id(note) for note in found} == {id(one), id(other)}

    def test_G2_unhashable_objects_as_keys(self, indexes: SessionIndex, session: Session) -> None:
        by_topic = indexes.index(Note.topic)
        indexes.indexed(Note, "by_topic_and_text")(lambda note: (note.topic, note.text))
        one, other = Topic(title="x"), Topic(title="x")
        note = Note(text="t", topic=one)
        session.add_all([note, other])
        assert list(by_topic(session, one)) == [note]
        assert list(by_topic(session, other)) == []
        assert list(indexes.by_topic_and_text(session, (one, "t"))) == [note]
        assert list(indexes.by_topic_and_text(session, (other, "t"))) == []


class TestG3NoSQL:
    def test_G3_expired(
        self, indexes: SessionIndex, session: Session, people: list[Person], statements: Statements
    ) -> None:
        by_name = indexes.index(Person.name)
        indexes.indexed(Person, "by_upper")(lambda person: person.name.upper())
        session.commit()
        with statements.none():
            for index, key in ((by_name, "b"), (indexes.by_upper, "B")):
                known, unknown = index.lookup(session, key)
                assert known == set() and unknown == set(people)

    def test_G3_deferred(
        self, indexes: SessionIndex, session: Session, people: list[Person], statements: Statements
    ) -> None:
        by_bio = indexes.index(Person.bio)
        indexes.indexed(Person, "by_length")(lambda person: len(person.bio or ""))
        with statements.none():
            assert by_bio.lookup(session, None).unknown == set(people)
            assert indexes.by_length.lookup(session, 0).unknown == set(people)
        assert people[0].bio is None
        with statements.none():
            assert by_bio.lookup(session, None) == by_bio.lookup(session, None)
            assert by_bio(session, None) == {people[0]}
            assert indexes.by_length(session, 0) == {people[0]}

    def test_G3_a_function_cannot_hide_that_it_needed_sql(
        self, indexes: SessionIndex, session: Session, people: list[Person], statements: Statements
    ) -> None:
        @indexes.indexed(Person, "by_bio")
        def by_bio(person: Person) -> str:
            try:
                return person.bio or ""
            except Exception:  # noqa: BLE001 - what it is about
                return "hidden"

        with statements.none():
            assert indexes.by_bio.lookup(session, "hidden").known == set()
            assert indexes.by_bio.lookup(session, "hidden").unknown == set(people)


class TestG4WhichEventTells:
    def test_G4_commit_and_rollback_expire(
        self, indexes: SessionIndex, session: Session, people: list[Person]
    ) -> None:
        by_name = indexes.index(Person.name)
        for end in (session.commit, session.rollback):
            assert people[0].name == "a"
            people[0].name = "a"
            assert by_name(session, "a") == {people[0]}
            end()
            assert by_name.lookup(session, "a").known == set()
            assert people[0] in by_name.lookup(session, "a").unknown

    def test_G4_reload_refreshes(self, indexes: SessionIndex, session: Session, people: list[Person]) -> None:
        by_name = indexes.index(Person.name)
        assert by_name(session, "a") == {people[0]}
        session.connection().execute(text("UPDATE person SET name = 'z'"))
        assert by_name(session, "a") == {people[0]}  # what the object holds
        session.refresh(people[0])
        assert by_name(session, "z") == {people[0]}
        session.scalars(select(Person).execution_options(populate_existing=True)).all()
        assert by_name(session, "z") == set(people)

    @pytest.mark.parametrize("how", ["evaluate", "fetch", "auto"])
    def test_G4_bulk_update(
        self, indexes: SessionIndex, session: Session, people: list[Person], how: str
    ) -> None:
        by_name = indexes.index(Person.name)
        assert by_name(session, "b") == {people[1], people[2]}
        session.execute(
            update(Person).where(Person.age < 3).values(name="z"),
            execution_options={"synchronize_session": how},
        )
        found = by_name.lookup(session, "z")
        assert found.known | found.unknown == {people[0], people[1]}
        assert by_name(session, "z", unknown="load") == {people[0], people[1]}
        assert by_name(session, "b") == {people[2]}

    @pytest.mark.parametrize("how", ["evaluate", "fetch", "auto"])
    def test_G4_bulk_delete(
        self, indexes: SessionIndex, session: Session, people: list[Person], how: str
    ) -> None:
        by_name = indexes.index(Person.name)
        assert by_name(session, "b") == {people[1], people[2]}
        session.execute(delete(Person).where(Person.age < 3), execution_options={"synchronize_session": how})
        assert by_name(session, "b") == {people[2]}

    def test_G4_rollback_of_a_delete(
        self, indexes: SessionIndex, session: Session, people: list[Person]
    ) -> None:
        by_name = indexes.index(Person.name)
        session.delete(people[0])
        session.flush()
        assert by_name.lookup(session, "a").unknown == set()
        session.rollback()
        assert by_name(session, "a", unknown="load") == {people[0]}

    def test_G4_rollback_of_a_flushed_insert(self, indexes: SessionIndex, session: Session) -> None:
        by_name = indexes.index(Person.name)
        person = Person(name="x")
        session.add(person)
        session.flush()
        assert by_name(session, "x") == {person}
        session.rollback()
        assert by_name.lookup(session, "x").known == set()
        assert by_name.lookup(session, "x").unknown == set()

    def test_G4_mutable_in_place(self, indexes: SessionIndex, session: Session) -> None:
        by_tag = indexes.index(Item.tags, multi=True)
        item = Item(tags=["t"])
        session.add(item)
        session.flush()
        assert by_tag(session, "t") == {item}
        item.tags.append("u")
        item.tags.remove("t")
        assert by_tag(session, "t") == set()
        assert by_tag(session, "u") == {item}

    def test_G4_values_made_by_the_flush(self, indexes: SessionIndex, session: Session) -> None:
        by_id, by_rank, by_score = (indexes.index(a) for a in (Person.id, Person.rank, Person.score))
        person = Person(name="x")
        session.add(person)
        assert by_id(session, None) == by_rank(session, None) == by_score(session, None) == {person}
        session.flush()
        assert by_id(session, None) == by_rank(session, None) == by_score(session, None) == set()
        assert by_id(session, person.id) == {person}
        assert by_rank(session, 3) == {person}  # the default
        found = by_score.lookup(session, 7)  # the server's default: fetched by RETURNING, or expired
        assert found.known | found.unknown == {person}
        assert by_score(session, 7, unknown="load") == {person}
        person.name = "y"
        session.flush()
        assert by_rank(session, 4) == {person}  # onupdate

    def test_G4_synchronize_session_false(
        self, indexes: SessionIndex, session: Session, people: list[Person]
    ) -> None:
        """The objects keep their old values, and so does the index: it is about what the Session holds."""
        by_name = indexes.index(Person.name)
        session.execute(update(Person).values(name="z"), execution_options={"synchronize_session": False})
        assert [person.name for person in people] == ["a", "b", "b"]
        assert by_name(session, "b") == {people[1], people[2]}
        assert by_name.verify(session) == []

    def test_G4_set_committed_value(
        self, indexes: SessionIndex, session: Session, people: list[Person]
    ) -> None:
        """No event tells of it: ``verify`` does, and ``touch`` says so."""
        by_name = indexes.index(Person.name)
        assert by_name(session, "a") == {people[0]}
        set_committed_value(people[0], "name", "z")
        (difference,) = by_name.verify(session)
        assert (difference.obj, difference.expected, difference.found) == (people[0], ("z",), ("a",))
        indexes.touch(people[0])
        assert by_name.verify(session) == []
        assert by_name(session, "z") == {people[0]}

    def test_G4_the_private_event_is_still_there(self) -> None:
        """``merge(load=False)`` into an object of the session is told of by no public event."""
        seen = []

        def on_merge(state: Any, context: Any) -> None:
            seen.append(state.obj())

        event.listen(Label, "_sa_event_merge_wo_load", on_merge, raw=True)
        try:
            with Session() as session:
                first = session.merge(detached_label("a"), load=False)
                session.merge(detached_label("b"), load=False)
                assert first.text == "b"
            assert seen == [first, first]
        finally:
            event.remove(Label, "_sa_event_merge_wo_load", on_merge)

    def test_G4_merge_without_load(self, indexes: SessionIndex, session: Session) -> None:
        by_text = indexes.index(Label.text)
        label = session.merge(detached_label("a"), load=False)
        assert by_text(session, "a") == {label}
        assert session.merge(detached_label("b"), load=False) is label
        assert by_text(session, "a") == set()
        assert by_text(session, "b") == {label}


def test_G5_removal_does_not_recompute_the_key(indexes: SessionIndex, session: Session) -> None:
    """The key that an object lies under is remembered: by the time it is removed it may have another."""
    by_tags = indexes.indexed(Item, "by_tags", multi=True)
    by_tags(lambda item: list(item.tags or ()))
    item = Item(tags=["a", "b"])
    session.add(item)
    assert indexes.by_tags(session, "a") == {item}
    item.tags[:] = ["c"]
    item.tags[0] = "d"
    for gone in "abc":
        assert indexes.by_tags(session, gone) == set()
    item.tags.append("e")
    session.expunge(item)
    item.tags.append("f")
    for gone in "abcdef":
        assert indexes.by_tags(session, gone) == set()
    assert indexes.by_tags.verify(session) == []


class TestG6Weakness:
    def test_G6_clean_objects_are_let_go(
        self, indexes: SessionIndex, session: Session, people: list[Person]
    ) -> None:
        by_name = indexes.index(Person.name)
        by_id = indexes.index(Person.id, ordered=True)
        assert len(by_name(session, "b")) == 2 and len(by_id.range(session)) == 3
        gone = weakref.ref(people[2])
        people.pop()
        gc.collect()
        assert gone() is None
        assert by_name(session, "b") == {people[1]}
        assert by_id.range(session) == people

    def test_G6_pending_and_modified_objects_are_not_lost(
        self, indexes: SessionIndex, session: Session, people: list[Person]
    ) -> None:
        by_name = indexes.index(Person.name)
        session.add(Person(name="pending"))
        people[0].name = "modified"
        people.clear()
        gc.collect()
        assert len(by_name(session, "pending")) == 1
        assert len(by_name(session, "modified")) == 1

    def test_G6_empty_buckets_go(self, indexes: SessionIndex, session: Session) -> None:
        by_name = indexes.index(Person.name, ordered=True)
        for number in range(100):
            session.add(Person(name=f"n{number}"))
        assert len(by_name.range(session)) == 100
        session.rollback()
        gc.collect()
        assert by_name(session, "n1") == set()
        contents = by_name._tracker.records[session.hash_key].views[by_name, False]
        assert not contents.buckets and not contents.placed and not contents.order and not contents.unknown

    def test_G6_empty_buckets_go_when_objects_are_collected_without_another_lookup(
        self, indexes: SessionIndex, session: Session, people: list[Person]
    ) -> None:
        by_name = indexes.index(Person.name, ordered=True)
        assert len(by_name.range(session)) == 3
        people.clear()
        gc.collect()
        contents = by_name._tracker.records[session.hash_key].views[by_name, False]
        assert not contents.buckets and not contents.placed and not contents.order


def detached_label(text: str) -> Label:
    """A label as if it came out of a cache."""
    label = Label()
    set_committed_value(label, "id", 1)
    set_committed_value(label, "text", text)
    inspect(label).key = (Label, (1,), None)
    assert object_session(label) is None
    return label


def session_listeners(session: Session) -> dict[str, int]:
    """How many listeners each event of a session has, those of its class included."""
    names = [name for name in vars(SessionEvents) if not name.startswith("_") and name != "dispatch"]
    return {name: len(list(getattr(session.dispatch, name))) for name in names}
