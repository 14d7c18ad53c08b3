"""The tags of the statements that complete objects: few, of these objects, and in one round trip."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from dogpile.cache import CacheRegion, make_region
from sqlalchemy import Engine, ForeignKey, create_engine, event, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload, sessionmaker

from querycache import CacheMiss, QueryCache
from querycache.backends.memory import MemoryBackend


class Base(DeclarativeBase):
    pass


class Parent(Base):
    __tablename__ = "parents"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="")
    children: Mapped[list[Child]] = relationship(order_by="Child.id")


class Child(Base):
    __tablename__ = "children"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="")
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


@pytest.fixture
def asked(engine: Engine) -> Iterator[list[str]]:
    """The tables that the database was asked for."""
    tables: list[str] = []

    def note(connection: object, cursor: object, sql: str, *rest: object) -> None:
        if sql.startswith("SELECT"):
            tables.append(sql.split("FROM ")[1].split()[0])

    event.listen(engine, "before_cursor_execute", note)
    yield tables
    event.remove(engine, "before_cursor_execute", note)


def family(factory: Any, number: int = 1) -> list[list[int]]:
    """The toys of each child, as the session shows them."""
    with factory() as session:
        parent = session.scalars(whole_family(number)).one()
        return [[toy.id for toy in child.toys] for child in parent.children]


def whole_family(number: int, **options: Any) -> Any:
    return (
        select(Parent)
        .where(Parent.id == number)
        .options(selectinload(Parent.children).selectinload(Child.toys))
        .execution_options(cache_key="parent", **options)
    )


def test_only_what_was_written_is_asked_again(engine: Engine, store: CacheRegion, asked: list[str]) -> None:
    cache, factory = attached(engine, store)
    ask(cache, factory, 1)
    before = family(factory)
    with factory.begin() as session:
        session.add(Toy(child_id=2))
    asked.clear()
    with cache.recording() as events:
        after = family(factory)
    assert asked == ["toys"]
    assert [(each.outcome, each.reason) for each in events] == [("stale", "in part"), ("fill", "")]
    assert [len(toys) for toys in after] == [len(before[0]), len(before[1]) + 1]
    asked.clear()
    assert ask(cache, factory, 1) == "hit"
    assert family(factory) == after and not asked


def test_what_comes_after_it_is_asked_again_too(engine: Engine, store: CacheRegion, asked: list[str]) -> None:
    """The database shows a later statement no less than an earlier one, so toys are never older than children."""
    cache, factory = attached(engine, store)
    family(factory)
    with factory.begin() as session:
        session.get_one(Child, 2).name = "Zoe"
    asked.clear()
    family(factory)
    assert asked == ["children", "toys"]
    assert ask(cache, factory, 1) == "hit"


def test_the_statement_itself_was_written_so_all_is_asked_again(
    engine: Engine, store: CacheRegion, asked: list[str]
) -> None:
    cache, factory = attached(engine, store)
    family(factory)
    with factory.begin() as session:
        session.get_one(Parent, 1).name = "Ann"
    asked.clear()
    family(factory)
    assert asked == ["parents", "children", "toys"]
    assert ask(cache, factory, 1) == "hit"


def test_what_was_kept_is_still_followed(engine: Engine, store: CacheRegion) -> None:
    _, factory = attached(engine, store)
    family(factory)
    with factory.begin() as session:
        session.add(Toy(child_id=2))
    family(factory)  # the children are kept, the toys asked again
    with factory.begin() as session:
        session.add(Child(parent_id=1))
    assert len(family(factory)) == 3


def test_the_rest_of_an_answer_lives_no_longer_for_that(
    engine: Engine, store: CacheRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is filled in later must not give another time to live to what was read long ago."""
    _, factory = attached(engine, store)
    kept: list[float | None] = []
    fill = MemoryBackend.store

    def noted(self: MemoryBackend, key: str, payload: bytes, ttl: float | None = None) -> bool:
        kept.append(ttl)
        return fill(self, key, payload, ttl)

    monkeypatch.setattr(MemoryBackend, "store", noted)
    with factory() as session:
        session.scalars(whole_family(1, cache_ttl=1000)).one()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 800)
    with factory.begin() as session:
        session.add(Toy(child_id=2))
    for _ in range(2):
        with factory() as session:
            session.scalars(whole_family(1, cache_ttl=1000)).one()
    monkeypatch.setattr(time, "time", lambda: now + 1000)
    with factory.begin() as session:
        session.add(Toy(child_id=2))
    with factory() as session:
        session.scalars(whole_family(1, cache_ttl=1000)).one()
    first, second = (seconds for seconds in kept if seconds is not None)
    assert first >= 900 and 0 < second <= 200


def test_what_is_only_valid_in_part_is_no_hit(engine: Engine, store: CacheRegion) -> None:
    cache, factory = attached(engine, store)
    family(factory)
    with factory.begin() as session:
        session.add(Toy(child_id=2))
    with factory() as session:
        assert not cache.explain(session, whole_family(1)).stored
        with pytest.raises(CacheMiss):
            session.scalars(whole_family(1, cache_mode="only")).one()


def test_a_string_alone_finds_no_answer_that_is_valid_in_part(
    engine: Engine, store: CacheRegion, asked: list[str]
) -> None:
    _, factory = attached(engine, store)
    with factory() as session:
        session.scalars(whole_family(1, cache_exact=True)).one()
    with factory.begin() as session:
        session.add(Toy(child_id=2))
    asked.clear()
    with factory() as session:
        session.scalars(whole_family(1, cache_exact=True)).one()
    assert asked == ["parents", "children", "toys"]


def test_a_part_that_is_being_written_is_not_stored(engine: Engine, store: CacheRegion) -> None:
    cache, factory = attached(engine, store)
    family(factory)
    ledger = next(iter(cache._regions)).ledger
    tags = [tag for tag in store.backend._counters if "toys" in tag]
    marks = ledger.begin(tags)
    for _ in range(2):
        with cache.recording() as events:
            family(factory)
        assert [(each.outcome, each.reason) for each in events] == [
            ("stale", "in part"),
            ("bypass", "pending"),
        ]
    ledger.end(marks)
    assert [ask(cache, factory, 1) for _ in range(2)] == ["stale", "hit"]
