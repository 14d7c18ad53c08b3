"""Columns that the application has declared to be tracked: lists by them survive writes to other rows, and no others."""

from __future__ import annotations

import itertools
import uuid
from random import Random
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Computed,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Uuid,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, attributes, mapped_column, sessionmaker

from querycache import ConfigurationError, QueryCache, tables

STATES = 5
KINDS = [uuid.uuid5(uuid.NAMESPACE_DNS, name) for name in ("letter", "box", "pallet")]


class Base(DeclarativeBase):
    pass


class Parcel(Base):
    __tablename__ = "parcel"

    id: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[int | None] = mapped_column(info={"cache_tracked": True})
    kind: Mapped[uuid.UUID] = mapped_column(Uuid, default=KINDS[0], info={"cache_tracked": True})
    weight: Mapped[int] = mapped_column(default=0)


class Made(Base):
    """Of one column the database makes the values, and of the other nobody knows what they were when it is not loaded."""

    __tablename__ = "made"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(default=0)
    rest: Mapped[int] = mapped_column(Computed("number % 4", persisted=True), info={"cache_tracked": True})
    kind: Mapped[str] = mapped_column(String(5))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "made"}


class Further(Made):
    __mapper_args__ = {"polymorphic_identity": "more"}

    grade: Mapped[int | None] = mapped_column(info={"cache_tracked": True})


class Assigned(Base):
    """A declared column beside a foreign key."""

    __tablename__ = "assigned"

    id: Mapped[int] = mapped_column(primary_key=True)
    tenant: Mapped[int] = mapped_column(info={"cache_tracked": True})
    parcel_id: Mapped[int] = mapped_column(ForeignKey(Parcel.id))


class Depot:
    """Parcels behind a cache."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        Base.metadata.create_all(engine)
        self.sessions = sessionmaker(engine)
        self.cache = QueryCache("memory://", lease=0.1).attach(engine)
        self.cache.attach(self.sessions)
        with self.sessions.begin() as session:
            session.add_all(
                Parcel(id=number, state=number % STATES, kind=KINDS[number % 3]) for number in range(1, 31)
            )

    def ask(self, statement: Any) -> tuple[list[Any], str]:
        """Its rows, and what the cache did."""
        with self.sessions() as session, self.cache.recording() as events:
            rows = session.execute(statement.execution_options(cache_key=True)).all()
        return list(map(tuple, rows)), events[0].outcome

    def fill(self, *statements: Any) -> None:
        for statement in statements:
            while self.ask(statement)[1] != "hit":
                pass

    def is_right(self, statement: Any) -> bool:
        with Session(self.engine) as session:
            return self.ask(statement)[0] == list(map(tuple, session.execute(statement)))


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def depot(request: pytest.FixtureRequest) -> Depot:
    return Depot(request.getfixturevalue(f"{request.param}_engine"))


def in_state(*states: int) -> Any:
    condition = Parcel.state == states[0] if len(states) == 1 else Parcel.state.in_(states)
    return select(Parcel.id, Parcel.weight).where(condition).order_by(Parcel.id)


def of_kind(kind: uuid.UUID) -> Any:
    return select(func.count(), func.sum(Parcel.weight)).where(Parcel.kind == kind)


ASKED = [*map(in_state, range(STATES)), in_state(1, 2), *map(of_kind, KINDS)]


def test_a_list_by_a_declared_column_survives_writes_to_other_rows(depot: Depot) -> None:
    depot.fill(*ASKED)
    with depot.sessions.begin() as session:
        session.get_one(Parcel, 1).weight = 7  # in state 1, of kind 1
    found = {number: depot.ask(statement)[1] for number, statement in enumerate(ASKED)}
    assert [number for number, outcome in found.items() if outcome != "hit"] == [1, 5, 7]
    assert all(map(depot.is_right, ASKED))


def test_without_the_declaration_it_does_not(depot: Depot) -> None:
    light = select(Parcel.id).where(Parcel.weight == 0).order_by(Parcel.id)
    depot.fill(light)
    with depot.sessions.begin() as session:
        session.get_one(Parcel, 1).state = 4
    assert depot.ask(light)[1] == "stale"


def test_who_does_not_follow_a_declared_column_is_found_out(
    depot: Depot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a reader goes by the declaration and a writer does not."""
    depot.fill(*ASKED)
    followed = tables.row_tags

    def without_state(label: str, values: Any, slots: int, *, moved: bool) -> Any:
        return followed(label, [each for each in values if each[0] != "state"], slots, moved=moved)

    monkeypatch.setattr("querycache.flushed.row_tags", without_state)
    with depot.sessions.begin() as session:
        session.get_one(Parcel, 1).weight = 7
    assert not depot.is_right(in_state(1))


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_written_is_seen(depot: Depot, seed: int) -> None:
    random, new = Random(seed), itertools.count(100)

    def some() -> int:
        return random.randint(1, 30)

    def change(session: Session) -> None:
        parcel = session.get(Parcel, some())
        if parcel is not None:
            parcel.state = random.choice([None, *range(STATES)])
            parcel.weight += 1

    def change_outdated(session: Session) -> None:
        """It is another state meanwhile than the object tells."""
        parcel = session.get(Parcel, some())
        session.commit()
        if parcel is not None:
            attributes.set_committed_value(parcel, "state", random.randrange(STATES))
            parcel.weight += 1

    def add(session: Session) -> None:
        session.add(
            Parcel(id=next(new), state=random.choice([None, *range(STATES)]), kind=random.choice(KINDS))
        )

    def remove(session: Session) -> None:
        parcel = session.get(Parcel, some())
        if parcel is not None:
            session.delete(parcel)

    def write_in_bulk(session: Session) -> None:
        raised = (
            update(Parcel).where(Parcel.state == random.randrange(STATES)).values(weight=Parcel.weight + 1)
        )
        moved = update(Parcel).where(Parcel.id == some()).values(state=random.randrange(STATES))
        added = insert(Parcel).values(
            id=next(new), state=random.randrange(STATES), kind=random.choice(KINDS), weight=1
        )
        gone = delete(Parcel).where(Parcel.id == some())
        session.execute(random.choice([raised, moved, added, gone]))

    writes = [change, change, change_outdated, add, remove, write_in_bulk]
    for _ in range(15):
        depot.fill(*random.sample(ASKED, 4))
        with depot.sessions(expire_on_commit=False) as session:
            for _ in range(random.randint(1, 3)):
                random.choice(writes)(session)
            if random.random() < 0.2:
                session.rollback()
            else:
                session.commit()
        for statement in ASKED:
            assert depot.is_right(statement), statement


@pytest.mark.parametrize("cls", [Made, Further])
def test_lookups_by_key_survive_where_the_values_of_a_declared_column_are_not_known(
    depot: Depot, cls: type[Made]
) -> None:
    with depot.sessions.begin() as session:
        session.add_all(cls(id=number, number=number) for number in range(1, 5))
    by_key, by_rest = (select(Made.id, Made.number).where(each) for each in (Made.id == 2, Made.rest == 3))
    of_grade = select(Further.id, Further.grade).where(Further.grade == 1)

    def check() -> None:
        assert depot.ask(by_key)[1] == "hit"
        assert depot.is_right(by_rest) and depot.is_right(of_grade)

    depot.fill(by_key, by_rest, of_grade)
    with depot.sessions.begin() as session:
        session.get_one(Made, 1).number = 3
    check()
    with depot.sessions.begin() as session:
        session.add(cls(id=9, number=7))
    check()
    with depot.sessions.begin() as session:
        session.delete(session.get_one(Made, 1))
    check()


def test_of_two_columns_a_foreign_key_is_followed_rather(depot: Depot) -> None:
    with depot.sessions.begin() as session:
        session.add_all(Assigned(id=number, tenant=1, parcel_id=number) for number in (1, 2))
    statement = select(Assigned.id).where(Assigned.tenant == 1, Assigned.parcel_id == 1)
    depot.fill(statement)
    with depot.sessions.begin() as session:
        session.add(Assigned(id=3, tenant=1, parcel_id=2))
    assert depot.ask(statement)[1] == "hit"


def test_a_declared_foreign_key_to_what_is_not_declared_yet(sqlite_engine: Engine) -> None:
    """It has no type until then, and is written nevertheless."""
    metadata = MetaData()
    key = Column("owner_id", ForeignKey("owner.id"), info={"cache_tracked": True})
    odd = Table("odd", metadata, Column("id", Integer, primary_key=True), key)
    with sqlite_engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE odd (id INTEGER PRIMARY KEY, owner_id INTEGER)")
    QueryCache("memory://").attach(sqlite_engine)
    with sqlite_engine.begin() as connection:
        connection.execute(insert(odd).values(id=1, owner_id=2))
        assert connection.execute(select(odd)).all() == [(1, 2)]
    assert tables.tracked_columns(odd) == (odd.c.id,)
    Table("owner", metadata, Column("id", Integer, primary_key=True))
    assert tables.tracked_columns(odd) == (odd.c.id, odd.c.owner_id)


@pytest.mark.parametrize(
    ("column", "names"),
    [
        (Column("state", String(5), info={"cache_tracked": True}), ["state", "String", "integers and UUIDs"]),
        (Column("state", Integer, info={"cache_tracked": "yes"}), ["state", "'yes'", "give True"]),
        (
            Column("state", Integer().with_variant(String(), "mysql"), info={"cache_tracked": True}),
            ["state", "Integer()", "without variants"],
        ),
    ],
)
def test_what_cannot_be_tracked_is_refused(sqlite_engine: Engine, column: Any, names: list[str]) -> None:
    odd = Table("odd", MetaData(), Column("id", Integer, primary_key=True), column)
    odd.create(sqlite_engine)
    sessions = sessionmaker(sqlite_engine)
    QueryCache("memory://").attach(sessions)
    with sessions() as session, pytest.raises(ConfigurationError) as refused:
        session.execute(select(odd).where(odd.c.id == 1).execution_options(cache_key=True))
    assert all(name in str(refused.value) for name in names)
