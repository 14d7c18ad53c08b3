"""Rows that a statement can only join with those it pins: an answer depends on these alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import pytest
from sqlalchemy import Column, Engine, ForeignKey, String, and_, select
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    joinedload,
    mapped_column,
    relationship,
    sessionmaker,
    with_parent,
    with_polymorphic,
)

from querycache import QueryCache, pins


class Base(DeclarativeBase):
    pass


class Port(Base):
    __tablename__ = "port"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(10))
    name: Mapped[str] = mapped_column(String(10), default="")
    ships: Mapped[list[Ship]] = relationship(back_populates="port")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "port"}


class FreePort(Port):
    __tablename__ = "free_port"
    id: Mapped[int] = mapped_column(ForeignKey("port.id"), primary_key=True)
    since: Mapped[int]
    __mapper_args__ = {"polymorphic_identity": "free"}


class Ship(Base):
    __tablename__ = "ship"
    id: Mapped[int] = mapped_column(primary_key=True)
    port_id: Mapped[int] = mapped_column(ForeignKey("port.id"))
    name: Mapped[str] = mapped_column(String(10), default="")
    port: Mapped[Port] = relationship(back_populates="ships")


PORT = Port(id=1)
SHAPES = {
    "joined inheritance": select(FreePort).where(FreePort.id == 1),
    "polymorphic": select(with_polymorphic(Port, [FreePort])).where(Port.id == 1),
    "joined collection": select(Port).where(Port.id == 1).options(joinedload(Port.ships)),
    "list of keys": select(Port).where(Port.id.in_([1])).options(joinedload(Port.ships)),
    "relationship": select(Ship).where(Ship.port == PORT),
    "with_parent": select(Ship).where(with_parent(PORT, Port.ships)),
    "join": select(Ship).join(Ship.port).where(Port.id == 1),
    "without JOIN": select(Ship, Port).where(Ship.port_id == Port.id, Port.id == 1),
    "outer join": select(Port.name, Ship.name).outerjoin(Port.ships).where(Port.id == 1),
    "aliased": select(aliased(Ship, name="s")),
}
s = aliased(Ship, name="s")
SHAPES["aliased"] = select(s.name).join(s.port).where(Port.id == 1)


def _seen(result: Any) -> object:
    return sorted(
        [
            [
                (each.id, each.name, getattr(each, "since", 0)) if isinstance(each, Base) else each
                for each in row
            ]
            for row in result.unique()
        ],
        key=repr,
    )


def _ports() -> list[Any]:
    ports = [FreePort(id=n, since=n, ships=[Ship(id=n, name="a"), Ship(id=10 + n)]) for n in (1, 2)]
    return [*ports, FreePort(id=3, since=3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_an_answer_falls_with_its_own_rows_alone(sqlite_engine: Engine, shape: str) -> None:
    Base.metadata.create_all(sqlite_engine)
    sessions = sessionmaker(sqlite_engine)
    cache = QueryCache()
    cache.attach(sessions)
    with sessions.begin() as session:
        session.add_all(_ports())

    def outcome() -> str:
        with sessions() as session, cache.recording() as events:
            found = _seen(session.execute(SHAPES[shape], execution_options={"cache_key": True}))
            cached = events[-1].outcome
            plain = {"cache_mode": "bypass"}
            session.expunge_all()
            assert found == _seen(session.execute(SHAPES[shape], execution_options=plain))
        return cached

    assert [outcome(), outcome()] == ["fill", "hit"]
    with sessions.begin() as session:
        session.get_one(FreePort, 2).since = 20
        session.get_one(Ship, 2).name = "other"
        session.add(Ship(id=20, port_id=3))
    assert outcome() == "hit"
    with sessions.begin() as session:
        session.get_one(FreePort, 1).name = "new"
        session.get_one(FreePort, 1).since = 10
        session.get_one(Ship, 1).name = "new"
    outcome()
    with sessions.begin() as session:
        session.get_one(Ship, 2).port_id = 1
    outcome()
    with sessions.begin() as session:
        session.delete(session.get_one(Ship, 1))
        session.add(Ship(id=21, port_id=1))
    outcome()


def test_the_object_that_is_compared_with_has_another_key_now(sqlite_engine: Engine) -> None:
    Base.metadata.create_all(sqlite_engine)
    sessions = sessionmaker(sqlite_engine)
    QueryCache().attach(sessions)
    with sessions.begin() as session:
        session.add_all(_ports())
    port = Port(id=1)
    statement = select(Ship.id).where(Ship.port == port).order_by(Ship.id).execution_options(cache_key=True)
    for key in (1, 2, 1, 2):
        port.id = key
        with sessions() as session:
            assert session.scalars(statement).all() == [key, 10 + key]
    with sessions.begin() as session:
        session.add(Ship(id=22, port_id=2))
    with sessions() as session:
        assert session.scalars(statement).all() == [2, 12, 22]


# --- whatever is joined ----------------------------------------------------------------------------------------


class Others(DeclarativeBase):
    pass


class Root(Others):
    __tablename__ = "root_of_pins"
    id: Mapped[int] = mapped_column(primary_key=True)


class _Row:
    id: Mapped[int] = mapped_column(primary_key=True)
    x: Mapped[int | None] = mapped_column(ForeignKey("root_of_pins.id"))
    y: Mapped[int | None] = mapped_column(ForeignKey("root_of_pins.id"))


CLASSES: list[Any] = [type(f"Joined{n}", (_Row, Others), {"__tablename__": f"joined_{n}"}) for n in range(4)]
SEEDS = range(6)


def _column(random: Random, tables: Sequence[Any]) -> Column[Any]:
    return random.choice(list(random.choice(tables).__table__.c))


def _tree(random: Random, tables: list[Any]) -> Any:
    """Tables joined in whatever order, on whatever columns."""
    if len(tables) == 1:
        return tables[0].__table__
    place = random.randrange(1, len(tables))
    left, right = tables[:place], tables[place:]
    condition = [_column(random, left) == _column(random, right)]
    if random.random() < 0.4:
        condition.append(_column(random, tables) == _column(random, tables))
    if random.random() < 0.1:
        condition.append(_column(random, tables) == 1)
    how = random.choice(({}, {}, {"isouter": True}, {"isouter": True}, {"full": True}))
    return _tree(random, left).join(_tree(random, right), and_(*condition), **how)


def _statement(random: Random) -> Any:
    tables = random.sample(CLASSES, random.choice((2, 3, 4)))
    statement = select(*(table.__table__ for table in tables)).select_from(_tree(random, tables))
    for _ in range(random.choice((1, 1, 2))):
        statement = statement.where(_column(random, tables) == random.choice((1, 2)))
    if random.random() < 0.2:
        statement = statement.where(_column(random, tables) == _column(random, tables))
    return statement.execution_options(cache_key=True)


def _write(random: Random, session: Session) -> None:
    row = session.get(random.choice(CLASSES), random.randrange(1, 4))
    if row is None:
        row = random.choice(CLASSES)(id=random.randrange(4, 100_000))
        session.add(row)
    elif random.random() < 0.3:
        session.delete(row)
        return
    setattr(row, random.choice("xy"), random.choice((1, 2, None)))


def _wrong(engine: Engine, seed: int) -> Iterator[str]:
    """The statements that are not answered as the database answers them."""
    random = Random(seed)
    Others.metadata.create_all(engine)
    sessions = sessionmaker(engine)
    cache = QueryCache()
    cache.attach(sessions)
    with sessions.begin() as session:
        session.add_all(Root(id=n) for n in (1, 2))
    for _ in range(40):
        with sessions.begin() as session:
            for cls in CLASSES:
                session.execute(cls.__table__.delete())
                for number in range(1, 4):
                    values = {"x": random.choice((1, 2)), "y": random.choice((1, 2))}
                    session.add(cls(id=number, **values))
        statements = [_statement(random) for _ in range(6)]
        for _ in range(8):
            for statement in statements:
                with sessions() as session:
                    found = sorted(session.execute(statement).all(), key=repr)
                    plain = session.execute(statement, execution_options={"cache_mode": "bypass"})
                    if found != sorted(plain.all(), key=repr):
                        yield str(statement)
            with sessions.begin() as session:
                _write(random, session)
    assert cache.stats().hits > 100


@pytest.mark.parametrize("seed", SEEDS)
def test_joins_of_any_kind(sqlite_engine: Engine, seed: int) -> None:
    assert list(_wrong(sqlite_engine, seed)) == []


def test_to_take_each_condition_for_true_is_found(
    sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if an outer join did not keep what its condition does not hold for."""

    def naive(conjuncts: Any, joins: Any, read: Any) -> Iterator[Any]:
        yield from pins._equal(conjuncts, read)
        for join in joins:
            yield from pins._equal(pins._conjuncts(join.onclause), read)

    monkeypatch.setattr(pins, "_equal_columns", naive)
    assert next(_wrong(sqlite_engine, 0))
