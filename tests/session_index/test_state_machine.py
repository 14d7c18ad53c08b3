"""Two sessions, everything that can happen to their objects, and every index checked after each step.

What an index must hold is worked out anew from the objects by ``oracle.py``, and ``verify()`` has to agree.
Neither may emit SQL.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import delete, insert, inspect, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import (
    Session,
    defer,
    joinedload,
    load_only,
    make_transient,
    selectinload,
    sessionmaker,
    undefer,
)
from sqlalchemy.orm.attributes import flag_modified
from sqlalchemy.sql import ClauseElement

from querycache.session_index import SessionIndex, UniqueConflict
from tests.session_index.conftest import Statements, make_engine
from tests.session_index.models import Clerk, Country, Item, Label, Manager, Person, Point
from tests.session_index.oracle import UNKNOWN, Oracle, check, check_structure, column, parent, related

NAMES = ["a", "b", "c", None]
AGES = [0, 1, 2, None]
CODES = ["x", "y", "z"]
TAGS = ["t", "u", "v"]

sides = st.integers(0, 1)
picks = st.integers(0, 30)
names = st.sampled_from(NAMES)
ages = st.sampled_from(AGES)
synchronize = st.sampled_from(["evaluate", "fetch", "auto", False])


def one(value: Any) -> Any:
    return UNKNOWN if value is UNKNOWN else [value]


def of_column(key: str, persisted: bool = False) -> Oracle:
    return lambda obj: one(column(obj, key, persisted))


def of_parent(key: str, foreign: str, persisted: bool = False) -> Oracle:
    return lambda obj: one(parent(obj, key, foreign, persisted))


class SessionIndexMachine(RuleBasedStateMachine):
    make_session: ClassVar[Callable[..., Session]]

    @initialize()
    def start(self) -> None:
        self.statements = Statements()
        self.engines = [make_engine(), make_engine()]
        maker = sessionmaker()
        self.sessions = []
        for engine in self.engines:
            with Session(engine) as session:
                session.execute(insert(Country), [{"code": code, "title": code} for code in "xy"])
                session.execute(insert(Label), [{"id": i, "text": text} for i, text in enumerate("pq", 1)])
                session.execute(
                    insert(Person),
                    [
                        {"id": 1, "kind": "person", "name": "a", "age": 1, "bio": "a", "country_code": "x"},
                        {
                            "id": 2,
                            "kind": "clerk",
                            "name": "b",
                            "age": None,
                            "bio": None,
                            "country_code": None,
                        },
                    ],
                )
                session.execute(
                    insert(Manager), [{"id": 3, "kind": "manager", "name": "b", "age": 2, "grade": 1}]
                )
                session.execute(
                    insert(Item),
                    [
                        {"id": 1, "title": "a", "tags": ["t", "u"], "x": 0, "y": 0, "owner_id": 1},
                        {
                            "id": 2,
                            "title": "b",
                            "tags": None,
                            "x": 1,
                            "y": None,
                            "owner_id": 3,
                            "parent_id": 1,
                        },
                        {"id": 3, "title": None, "tags": [], "owner_id": None},
                    ],
                )
                session.commit()
            self.statements.watch(engine)
            self.sessions.append(maker(bind=engine))
        self.kept: list[Any] = []
        self.nested: list[list[Any]] = [[], []]
        indexes = self.indexes = SessionIndex(maker)
        self.by_name = indexes.index(Person.name)
        self.by_pair = indexes.index(Person.name, Person.age)
        self.by_age = indexes.index(Person.age, ordered=True)
        self.by_bio = indexes.index(Person.bio)
        self.by_id = indexes.index(Person.id)
        self.by_score = indexes.index(Person.score)
        self.by_rank = indexes.index(Person.rank)
        self.grown = indexes.index(Person.name, where=lambda p: p.age is not None and p.age >= 1)
        self.by_country = indexes.index(Person.country)
        self.by_grade = indexes.index(Manager.grade)
        self.by_tag = indexes.index(Item.tags, multi=True)
        self.by_position = indexes.index(Item.position)
        self.by_owner = indexes.index(Item.owner)
        self.by_owner_id = indexes.index(Item.owner_id)
        self.by_parent = indexes.index(Item.parent)
        self.by_label = indexes.index(Item.labels)
        self.unique_title = indexes.index(Item.title, unique=True)
        indexes.indexed(Person, "by_upper")(lambda p: p.name and p.name.upper())
        indexes.indexed(Person, "by_initial", depends_on=[Person.name])(lambda p: p.initial)
        indexes.indexed(Item, "by_owner_name", depends_on=[Item.owner, Person.name])(
            lambda i: i.owner and i.owner.name
        )
        indexes.indexed(Item, "by_label_text", depends_on=[Item.labels, Label.text], multi=True)(
            lambda i: [label.text for label in i.labels]
        )

    def teardown(self) -> None:
        if hasattr(self, "sessions"):
            for session in self.sessions:
                session.close()
            self.indexes.detach()
            for engine in self.engines:
                engine.dispose()

    # What the rules act on

    def objects(self, side: int, cls: type[Any]) -> list[Any]:
        found = [obj for obj in self.sessions[side] if isinstance(obj, cls)]
        return sorted(found, key=lambda obj: (inspect(obj).key is None, str(inspect(obj).key), id(obj)))

    def pick(self, side: int, number: int, cls: type[Any]) -> Any:
        found = self.objects(side, cls)
        return found[number % len(found)] if found else None

    def attempt(self, side: int, action: Callable[[], object]) -> None:
        """Do something that the database or SQLAlchemy may refuse."""
        session = self.sessions[side]
        try:
            action()
        except UniqueConflict as conflict:
            assert conflict.index == "Item.title"
            assert len({column(obj, "title") for obj in conflict.objects}) == 1
            session.rollback()
            self.nested[side].clear()
        except SQLAlchemyError:
            session.rollback()
            self.nested[side].clear()
        except (KeyError, AssertionError) as error:
            # SQLAlchemy's flush stumbles over some sequences by itself
            if "sqlalchemy" not in traceback.extract_tb(error.__traceback__)[-1].filename:
                raise
            session.rollback()
            self.nested[side].clear()

    # Objects come and go

    @rule(side=sides, cls=st.sampled_from([Person, Manager, Clerk]), name=names, age=ages)
    def add_person(self, side: int, cls: type[Person], name: str | None, age: int | None) -> None:
        person = cls(name=name, age=age)
        self.sessions[side].add(person)
        self.kept.append(person)

    @rule(side=sides)
    def add_blank(self, side: int) -> None:
        self.sessions[side].add(Person())

    @rule(side=sides, owner=picks, tags=st.none() | st.lists(st.sampled_from(TAGS), unique=True))
    def add_item(self, side: int, owner: int, tags: list[str] | None) -> None:
        item = Item(tags=tags, x=0, y=len(tags or ()))
        item.owner = self.pick(side, owner, Person)
        self.sessions[side].add(item)

    @rule(side=sides, cls=st.sampled_from([Person, Item, Label, Country]))
    def load(self, side: int, cls: type[Any]) -> None:
        self.attempt(side, lambda: self.kept.extend(self.sessions[side].scalars(select(cls)).all()))

    @rule(
        side=sides,
        option=st.sampled_from(
            [
                undefer(Person.bio),
                defer(Person.name),
                load_only(Person.id),
                joinedload(Person.items).joinedload(Item.owner),
                selectinload(Person.items).selectinload(Item.labels),
                joinedload(Person.country),
            ]
        ),
        populate_existing=st.booleans(),
        keep=st.booleans(),
    )
    def load_with(self, side: int, option: Any, populate_existing: bool, keep: bool) -> None:
        statement = select(Person).options(option)
        if populate_existing:
            statement = statement.execution_options(populate_existing=True)

        def action() -> None:
            found = self.sessions[side].scalars(statement).unique().all()
            if keep:
                self.kept.extend(found)

        self.attempt(side, action)

    @rule(side=sides, number=picks, key=st.sampled_from(["owner", "labels", "parent", "children", "tags"]))
    def lazy_load_of_item(self, side: int, number: int, key: str) -> None:
        item = self.pick(side, number, Item)
        if item is not None:
            self.attempt(side, lambda: getattr(item, key))

    @rule(side=sides, number=picks, key=st.sampled_from(["country", "items", "bio", "name"]))
    def lazy_load_of_person(self, side: int, number: int, key: str) -> None:
        person = self.pick(side, number, Person)
        if person is not None:
            self.attempt(side, lambda: getattr(person, key))

    @rule(side=sides, number=picks, cls=st.sampled_from([Person, Item, Label]))
    def delete(self, side: int, number: int, cls: type[Any]) -> None:
        obj = self.pick(side, number, cls)
        if obj is not None and inspect(obj).persistent:
            self.attempt(side, lambda: self.sessions[side].delete(obj))

    @rule(side=sides, number=picks)
    def undelete(self, side: int, number: int) -> None:
        deleted = sorted(self.sessions[side].deleted, key=id)
        if deleted:
            self.attempt(side, lambda: self.sessions[side].add(deleted[number % len(deleted)]))

    @rule(side=sides, number=picks, cls=st.sampled_from([Person, Item, Label]))
    def expunge(self, side: int, number: int, cls: type[Any]) -> None:
        obj = self.pick(side, number, cls)
        if obj is not None:
            self.kept.append(obj)
            self.attempt(side, lambda: self.sessions[side].expunge(obj))

    @rule(side=sides, number=picks, transient=st.booleans())
    def attach(self, side: int, number: int, transient: bool) -> None:
        free = [obj for obj in self.kept if inspect(obj).session is None]
        if free:
            obj = free[number % len(free)]
            if transient:
                make_transient(obj)
                for column_attribute in inspect(type(obj)).primary_key:
                    obj.__dict__.pop(column_attribute.key, None)
            self.attempt(side, lambda: self.sessions[side].add(obj))

    @rule(side=sides, number=picks, cls=st.sampled_from([Person, Item]), load=st.booleans())
    def merge_from_the_other(self, side: int, number: int, cls: type[Any], load: bool) -> None:
        obj = self.pick(1 - side, number, cls)
        if obj is not None:
            self.attempt(side, lambda: self.kept.append(self.sessions[side].merge(obj, load=load)))

    @rule(side=sides)
    def expunge_all(self, side: int) -> None:
        self.sessions[side].expunge_all()

    @rule(side=sides)
    def close(self, side: int) -> None:
        self.sessions[side].close()
        self.nested[side].clear()

    @rule()
    def collect(self) -> None:
        self.kept.clear()
        gc.collect()

    # Objects change

    @rule(side=sides, number=picks, name=names)
    def set_name(self, side: int, number: int, name: str | None) -> None:
        person = self.pick(side, number, Person)
        if person is not None:
            person.name = name

    @rule(side=sides, number=picks, age=ages)
    def set_age(self, side: int, number: int, age: int | None) -> None:
        person = self.pick(side, number, Person)
        if person is not None:
            person.age = age

    @rule(side=sides, number=picks)
    def set_to_sql_expression(self, side: int, number: int) -> None:
        person = self.pick(side, number, Person)
        if person is not None:
            person.age = Person.age + 1

    @rule(side=sides, number=picks, key=st.sampled_from(["name", "age"]))
    def delete_attribute(self, side: int, number: int, key: str) -> None:
        person = self.pick(side, number, Person)
        if person is not None and key in person.__dict__:
            delattr(person, key)

    @rule(side=sides, number=picks, bio=names)
    def set_bio(self, side: int, number: int, bio: str | None) -> None:
        person = self.pick(side, number, Person)
        if person is not None:
            person.bio = bio

    @rule(side=sides, number=picks, grade=ages)
    def set_grade(self, side: int, number: int, grade: int | None) -> None:
        manager = self.pick(side, number, Manager)
        if manager is not None:
            manager.grade = grade

    @rule(side=sides, number=picks, title=names)
    def set_title(self, side: int, number: int, title: str | None) -> None:
        item = self.pick(side, number, Item)
        if item is not None:
            item.title = title

    @rule(side=sides, number=picks, tag=st.sampled_from(TAGS))
    def change_tags_in_place(self, side: int, number: int, tag: str) -> None:
        item = self.pick(side, number, Item)
        if item is not None and item.__dict__.get("tags") is not None:
            if tag in item.tags:
                item.tags.remove(tag)
            else:
                item.tags.append(tag)

    @rule(side=sides, number=picks, tags=st.lists(st.sampled_from(TAGS), unique=True))
    def set_tags(self, side: int, number: int, tags: list[str]) -> None:
        item = self.pick(side, number, Item)
        if item is not None:
            item.tags = tags
            flag_modified(item, "tags")

    @rule(side=sides, number=picks, x=ages, whole=st.booleans())
    def move(self, side: int, number: int, x: int | None, whole: bool) -> None:
        item = self.pick(side, number, Item)
        if item is not None:
            if whole:
                item.position = Point(x, 1)
            else:
                item.x = x

    @rule(side=sides, number=picks, owner=picks, none=st.booleans())
    def set_owner(self, side: int, number: int, owner: int, none: bool) -> None:
        item = self.pick(side, number, Item)
        if item is not None:
            person = None if none else self.pick(side, owner, Person)
            self.attempt(side, lambda: setattr(item, "owner", person))

    @rule(side=sides, number=picks, owner_id=st.sampled_from([1, 2, 3, None]))
    def set_owner_id(self, side: int, number: int, owner_id: int | None) -> None:
        item = self.pick(side, number, Item)
        if item is not None:
            item.owner_id = owner_id

    @rule(side=sides, number=picks, owner=picks, remove=st.booleans())
    def change_items_of_owner(self, side: int, number: int, owner: int, remove: bool) -> None:
        person, item = self.pick(side, owner, Person), self.pick(side, number, Item)

        def action() -> None:
            if remove and person.items:
                person.items.pop()
            else:
                person.items.append(item)

        if person is not None and item is not None:
            self.attempt(side, action)

    @rule(side=sides, number=picks, other=picks)
    def set_parent(self, side: int, number: int, other: int) -> None:
        item, its_parent = self.pick(side, number, Item), self.pick(side, other, Item)
        if item is not None and item is not its_parent:
            self.attempt(side, lambda: setattr(item, "parent", its_parent))

    @rule(side=sides, number=picks, label=picks, replace=st.booleans())
    def change_labels(self, side: int, number: int, label: int, replace: bool) -> None:
        item, its_label = self.pick(side, number, Item), self.pick(side, label, Label)

        def action() -> None:
            if replace:
                item.labels = [its_label]
            elif its_label in item.labels:
                item.labels.remove(its_label)
            else:
                item.labels.append(its_label)

        if item is not None and its_label is not None:
            self.attempt(side, action)

    @rule(side=sides, number=picks, text=names)
    def set_label_text(self, side: int, number: int, text: str | None) -> None:
        label = self.pick(side, number, Label)
        if label is not None:
            label.text = text

    @rule(side=sides, number=picks, country=picks)
    def set_country(self, side: int, number: int, country: int) -> None:
        person = self.pick(side, number, Person)
        if person is not None:
            self.attempt(side, lambda: setattr(person, "country", self.pick(side, country, Country)))

    @rule(side=sides, number=picks, code=st.sampled_from(CODES))
    def change_natural_key(self, side: int, number: int, code: str) -> None:
        country = self.pick(side, number, Country)
        if country is not None:
            country.code = code
            self.attempt(side, self.sessions[side].flush)

    @rule(side=sides, number=picks)
    def swap_natural_keys(self, side: int, number: int) -> None:
        found = [c for c in self.objects(side, Country) if "code" in c.__dict__]
        if len(found) >= 2:
            one_country, other = found[:2]
            one_country.code, other.code = other.code, one_country.code

    # The session does something

    @rule(side=sides)
    def flush(self, side: int) -> None:
        self.attempt(side, self.sessions[side].flush)

    @rule(side=sides)
    def commit(self, side: int) -> None:
        def action() -> None:
            self.sessions[side].commit()
            self.nested[side].clear()

        self.attempt(side, action)

    @rule(side=sides, expire_on_commit=st.booleans())
    def switch_expire_on_commit(self, side: int, expire_on_commit: bool) -> None:
        self.sessions[side].expire_on_commit = expire_on_commit

    @rule(side=sides)
    def rollback(self, side: int) -> None:
        self.sessions[side].rollback()
        self.nested[side].clear()

    @rule(side=sides)
    def begin_savepoint(self, side: int) -> None:
        self.attempt(side, lambda: self.nested[side].append(self.sessions[side].begin_nested()))

    @precondition(lambda self: any(self.nested))
    @rule(side=sides, release=st.booleans())
    def end_savepoint(self, side: int, release: bool) -> None:
        if self.nested[side]:
            savepoint = self.nested[side].pop()
            self.attempt(side, savepoint.commit if release else savepoint.rollback)

    @rule(side=sides, number=picks, cls=st.sampled_from([Person, Item, Label]), keys=st.booleans())
    def expire(self, side: int, number: int, cls: type[Any], keys: bool) -> None:
        obj = self.pick(side, number, cls)
        if obj is not None and inspect(obj).persistent:
            attributes = {Person: ["name", "items"], Item: ["tags", "owner"], Label: ["text"]}[cls]
            self.sessions[side].expire(obj, attributes if keys else None)

    @rule(side=sides)
    def expire_all(self, side: int) -> None:
        self.sessions[side].expire_all()

    @rule(side=sides, number=picks, cls=st.sampled_from([Person, Item, Label]))
    def refresh(self, side: int, number: int, cls: type[Any]) -> None:
        obj = self.pick(side, number, cls)
        if obj is not None and inspect(obj).persistent:
            self.attempt(side, lambda: self.sessions[side].refresh(obj))

    @rule(side=sides, name=names, age=ages, how=synchronize)
    def bulk_update(self, side: int, name: str | None, age: int | None, how: Any) -> None:
        statement = update(Person).where(Person.name == name).values(age=age, name="c")
        self.attempt(
            side,
            lambda: self.sessions[side].execute(statement, execution_options={"synchronize_session": how}),
        )

    @rule(side=sides, age=ages)
    def bulk_update_by_primary_key(self, side: int, age: int | None) -> None:
        self.attempt(
            side,
            lambda: self.sessions[side].execute(update(Person), [{"id": 1, "age": age}, {"id": 2, "age": 1}]),
        )

    @rule(side=sides, tag=st.sampled_from(NAMES), how=synchronize)
    def bulk_delete(self, side: int, tag: str | None, how: Any) -> None:
        statement = delete(Item).where(Item.title == tag)
        self.attempt(
            side,
            lambda: self.sessions[side].execute(statement, execution_options={"synchronize_session": how}),
        )

    @rule(side=sides, name=names)
    def look_up_and_load(self, side: int, name: str | None) -> None:
        def action() -> None:
            found = self.by_name(self.sessions[side], name, unknown="load")
            assert all(person.name == name for person in found)

        self.attempt(side, action)

    # What must hold after each step

    @invariant()
    def every_index_is_right(self) -> None:
        if not hasattr(self, "sessions"):
            return
        with self.statements.none():
            for session in self.sessions:
                self.check_people(session)
                self.check_items(session)
                assert self.indexes.verify(session) == []
                for index in self.indexes._all:
                    check_structure(index, session)

    def check_people(self, session: Session) -> None:
        countries = [None, *(obj for obj in session if isinstance(obj, Country))]
        for persisted in (False, True):

            def pair(obj: Any, persisted: bool = persisted) -> Any:
                name, age = column(obj, "name", persisted), column(obj, "age", persisted)
                return UNKNOWN if UNKNOWN in (name, age) else [(name, age)]

            for index, key, values in (
                (self.by_name, "name", NAMES),
                (self.indexes.by_initial, "name", NAMES),
                (self.by_bio, "bio", NAMES),
                (self.by_score, "score", [None, 7]),
                (self.by_rank, "rank", [None, 3, 4]),
                (self.by_grade, "grade", AGES),
            ):
                check(index, session, of_column(key, persisted), values, persisted)
            check(self.by_pair, session, pair, [(n, a) for n in NAMES for a in AGES], persisted)
            check(
                self.by_country,
                session,
                of_parent("country", "country_code", persisted),
                countries,
                persisted,
                matches_parent,
            )
        check(self.by_id, session, of_column("id"), [None, *range(1, 12)])
        self.check_order(session)

        def upper(obj: Any) -> Any:
            name = column(obj, "name")
            return UNKNOWN if name is UNKNOWN or unsure(obj) else [name and name.upper()]

        check(self.indexes.by_upper, session, upper, ["A", "B", "C", None])

        def grown(obj: Any) -> Any:
            age = column(obj, "age")
            if age is UNKNOWN or unsure(obj):
                return UNKNOWN
            return one(column(obj, "name")) if age is not None and age >= 1 else []

        check(self.grown, session, grown, NAMES)

    def check_order(self, session: Session) -> None:
        people = [(column(obj, "age"), obj) for obj in session if isinstance(obj, Person)]
        ages = sorted(age for age, _ in people if age is not None and age is not UNKNOWN)
        for low, high in [(None, None), (1, None), (None, 1), (0, 1)]:
            found = self.by_age.range(session, low, high)
            assert [obj.__dict__["age"] for obj in found] == [
                age for age in ages if (low is None or age >= low) and (high is None or age <= high)
            ]
        first, last = self.by_age.first(session), self.by_age.last(session)
        assert [first and first.__dict__["age"], last and last.__dict__["age"]] == (
            [ages[0], ages[-1]] if ages else [None, None]
        )

    def check_items(self, session: Session) -> None:
        people = [None, *(obj for obj in session if isinstance(obj, Person))]
        items = [None, *(obj for obj in session if isinstance(obj, Item))]
        labels = [obj for obj in session if isinstance(obj, Label)]

        def tags(obj: Any) -> Any:
            value = column(obj, "tags")
            return value if value is UNKNOWN else list(value or ())

        def position(obj: Any) -> Any:
            x, y = column(obj, "x"), column(obj, "y")
            return UNKNOWN if UNKNOWN in (x, y) else [(x, y)]

        check(self.by_tag, session, tags, TAGS)
        check(
            self.by_position,
            session,
            position,
            [Point(x, y) for x in AGES for y in AGES],
            matches=lambda key, point: key == (point.x, point.y),
        )
        for persisted in (False, True):
            check(
                self.by_owner,
                session,
                of_parent("owner", "owner_id", persisted),
                people,
                persisted,
                matches_parent,
            )
            check(
                self.by_owner_id,
                session,
                of_column("owner_id", persisted),
                [1, 2, 3, None],
                persisted,
            )
        check(
            self.by_parent,
            session,
            of_parent("parent", "parent_id"),
            items,
            matches=matches_parent,
        )
        check(
            self.by_label,
            session,
            lambda o: related(o, "labels"),
            labels,
            matches=lambda key, value: key is value,
        )

        def owner_name(obj: Any) -> Any:
            owner = related(obj, "owner")
            if owner is UNKNOWN:
                return UNKNOWN
            return [None] if owner is None else one(column(owner, "name"))

        check(self.indexes.by_owner_name, session, owner_name, NAMES)

        def label_text(obj: Any) -> Any:
            its_labels = related(obj, "labels")
            if its_labels is UNKNOWN:
                return UNKNOWN
            texts = [column(label, "text") for label in its_labels]
            return UNKNOWN if UNKNOWN in texts else texts

        check(self.indexes.by_label_text, session, label_text, ["p", "q", *NAMES])


def unsure(obj: Any) -> bool:
    """Whether nothing can be said of a function that does not declare what it reads."""
    expressions = any(isinstance(value, ClauseElement) for value in obj.__dict__.values())
    state = inspect(obj)
    return expressions or (
        len(obj.__dict__) == 1 and (state.key is not None or bool(state.expired_attributes))
    )


def matches_parent(key: Any, value: Any) -> bool:
    """Whether a parent as the oracle knows it, by object or by primary key, is the one looked up."""
    if key is None or value is None or isinstance(key, (Person, Item, Country)):
        return key is value
    identity = inspect(value).identity
    return identity is not None and identity == (key,)


TestSessionIndex = SessionIndexMachine.TestCase
TestSessionIndex.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestSessionIndex = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")(TestSessionIndex)
