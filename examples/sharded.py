"""Shards: one select, answered by several databases, each answer cached by itself.

A ShardedSession runs a statement once per shard and merges the results. Each of these executions passes the
cache, so what is stored are the rows of one shard under that shard's database: a select that concerns one
shard shares its answer with one that concerns all.
"""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import ForeignKey, create_engine, event, func, inspect, select
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    ORMExecuteState,
    mapped_column,
    relationship,
    selectinload,
    sessionmaker,
)

from querycache import QueryCache


class Base(DeclarativeBase):
    pass


class Station(Base):
    __tablename__ = "stations"

    id: Mapped[int] = mapped_column(primary_key=True)
    continent: Mapped[str]
    name: Mapped[str]
    readings: Mapped[list["Reading"]] = relationship(order_by="Reading.id")


class Reading(Base):
    __tablename__ = "readings"

    id: Mapped[int] = mapped_column(primary_key=True)
    station_id: Mapped[int] = mapped_column(ForeignKey(Station.id))
    degrees: Mapped[float]


shards = {"asia": create_engine("sqlite://"), "europe": create_engine("sqlite://")}
emitted: list[str] = []
for engine in shards.values():
    Base.metadata.create_all(engine)
    event.listen(engine, "before_cursor_execute", lambda *args: emitted.append(args[2]))


def shard_of(mapper: Any, instance: Any, clause: Any = None) -> Any:
    return instance.continent if isinstance(instance, Station) else inspect(instance).identity_token


def shards_of_key(mapper: Any, key: Any, *, lazy_loaded_from: Any = None, **_: Any) -> Iterable[str]:
    return [lazy_loaded_from.identity_token] if lazy_loaded_from else shards


def shards_of_statement(state: ORMExecuteState) -> Iterable[str]:
    continents: Iterable[str] = state.execution_options.get("continents", shards)
    return continents


Session = sessionmaker(
    class_=ShardedSession,
    shards=shards,
    shard_chooser=shard_of,
    identity_chooser=shards_of_key,
    execute_chooser=shards_of_statement,
)
cache = QueryCache("memory://")
cache.attach(Session)

for number, (continent, engine) in enumerate(shards.items()):
    # straight into each database; ids do not collide, so that rows of several can be merged
    with sessionmaker(engine).begin() as session:
        station = Station(id=number, continent=continent, name=f"somewhere in {continent}")
        station.readings = [Reading(id=10 * number + each, degrees=20 + each) for each in range(3)]
        session.add(station)

stations = select(Station).options(selectinload(Station.readings)).execution_options(cache_key="stations")
for expected in (["miss", "miss"], ["hit", "hit"]):
    emitted.clear()
    with cache.recording() as events, Session() as session:
        found = [(each.name, len(each.readings)) for each in session.scalars(stations)]
    outcomes = [each.outcome for each in events if each.outcome != "fill"]
    print(f"all shards   {outcomes} {len(emitted)} statements: {found}")
    assert outcomes == expected
    assert found == [("somewhere in asia", 3), ("somewhere in europe", 3)]
assert not emitted

# one shard: its part of the answer is there already
with cache.recording() as events, Session() as session:
    only = session.scalars(stations, execution_options={"continents": ["europe"]}).all()
    print(f"one of them  {[each.outcome for each in events]} {len(emitted)} statements: {only[0].name}")
assert [each.outcome for each in events] == ["hit"] and not emitted

# columns and aggregates are merged just the same
counts = select(Station.continent, func.count(Reading.id)).join(Station.readings).group_by(Station.continent)
counts = counts.execution_options(cache_key="counts")
with Session() as session:
    session.execute(counts).all()
emitted.clear()
with Session() as session:
    rows = session.execute(counts).all()
    print(f"an aggregate {len(emitted)} statements: {rows}")
assert [tuple(row) for row in rows] == [("asia", 3), ("europe", 3)] and not emitted
