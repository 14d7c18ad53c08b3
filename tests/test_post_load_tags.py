"""The tags of the statements that complete objects: few, of these objects, and in one round trip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from dogpile.cache import CacheRegion, make_region
from sqlalchemy import Engine, ForeignKey, create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload, sessionmaker

from querycache import QueryCache
from querycache.backends.memory import MemoryBackend


class Base(DeclarativeBase):
    pass


class Parent(Base):
    __tablename__ = "parents"

    id: Mapped[int] = mapped_column(primary_key=True)
    children: Mapped[list[Child]] = relationship(order_by="Child.id")


class Child(Base):
    __tablename__ = "children"

    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int] = mapped_column(ForeignKey(Parent.id))
    toys: Mapped[list[Toy]] = relationship(order_by="Toy.id")


class Toy(Base):
    __tablename__ = "toys"

    id: Mapped[int] = mapped_column(primary_key=True)
    child_id: Mapped[int] = mapped_column(ForeignKey(Child.id))


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with sessionmaker(engine).begin() as session:
        session.add_all([Parent(children=[Child(toys=[Toy()]), Child()]) for _ in range(40)])
    yield engine
    engine.dispose()


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of versions that each round trip to the store has read."""
    counts: list[int] = []
    fetch = MemoryBackend.fetch

    def counted(self: MemoryBackend, key: str | None, counters: Sequence[str] = (), *rest: Any) -> Any:
        counts.append(len(counters))
        return fetch(self, key, counters, *rest)

    monkeypatch.setattr(MemoryBackend, "fetch", counted)
    return counts


@pytest.fixture
def store() -> CacheRegion:
    return make_region().configure("querycache.memory")


def attached(engine: Engine, store: CacheRegion) -> tuple[QueryCache, Any]:
    """What a process has: a cache on a store that it shares with others, and a factory of sessions."""
    cache = QueryCache(store)
    factory = sessionmaker(engine)
    cache.attach(factory)
    return cache, factory


def ask(cache: QueryCache, factory: Any, number: int) -> str:
    statement = (
        select(Parent)
        .where(Parent.id == number)
        .options(selectinload(Parent.children).selectinload(Child.toys))
        .execution_options(cache_key="parent")
    )
    with cache.recording() as events, factory() as session:
        session.scalars(statement).one()
    return events[0].outcome


def test_the_tags_of_one_answer_are_not_those_of_another(
    engine: Engine, store: CacheRegion, fetches: list[int]
) -> None:
    cache, factory = attached(engine, store)
    lookups = []
    for number in range(1, 41):
        fetches.clear()
        assert ask(cache, factory, number) == "miss"
        lookups.append(fetches[0])
    assert len(set(lookups)) == 1
    hits = []
    for number in range(1, 41):
        fetches.clear()
        assert ask(cache, factory, number) == "hit"
        hits.append(list(fetches))
    assert all(hit == hits[0] and len(hit) == 1 for hit in hits)


def test_a_write_below_one_parent_leaves_the_others(engine: Engine, store: CacheRegion) -> None:
    cache, factory = attached(engine, store)
    for number in range(1, 6):
        ask(cache, factory, number)
    with factory.begin() as session:
        session.add(Child(parent_id=2))
    assert [ask(cache, factory, number) for number in range(1, 6)] == ["hit", "stale", "hit", "hit", "hit"]
    with factory.begin() as session:
        session.add(Toy(child_id=session.scalars(select(Child.id).where(Child.parent_id == 4)).first()))
    assert [ask(cache, factory, number) for number in range(1, 6)] == ["hit", "hit", "hit", "stale", "hit"]


def test_another_process_learns_them_with_its_first_hit(
    engine: Engine, store: CacheRegion, fetches: list[int]
) -> None:
    ask(*attached(engine, store), 1)
    other = attached(engine, store)
    fetches.clear()
    assert ask(*other, 1) == "hit"
    assert len(fetches) == 2
    fetches.clear()
    assert ask(*other, 1) == "hit"
    assert len(fetches) == 1


def test_an_answer_forgets_the_tags_of_what_it_no_longer_loads(
    engine: Engine, store: CacheRegion, fetches: list[int]
) -> None:
    cache, factory = attached(engine, store)
    sizes = []
    for _ in range(10):
        # another child each time, so other toys to load
        with factory.begin() as session:
            for child in session.scalars(select(Child).where(Child.parent_id == 1)):
                child.parent_id = 2
            session.add(Child(parent_id=1))
        assert ask(cache, factory, 1) in ("miss", "stale")
        fetches.clear()
        assert ask(cache, factory, 1) == "hit"
        sizes.append(fetches[0])
    assert len(set(sizes)) == 1
