"""The statements that complete objects: their tags, and answers of which nothing else has fallen."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from dogpile.cache import CacheRegion, make_region
from sqlalchemy import (
    Connection,
    Engine,
    ForeignKey,
    String,
    create_engine,
    event,
    func,
    select,
    text,
    update,
)
from sqlalchemy.exc import InternalError, ProgrammingError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    column_property,
    immediateload,
    mapped_column,
    relationship,
    selectin_polymorphic,
    selectinload,
    sessionmaker,
    subqueryload,
    with_loader_criteria,
)
from sqlalchemy.pool import StaticPool

from querycache import CacheMiss, QueryCache, declarations
from querycache.backends.memory import MemoryBackend
from querycache.ledger import Reading


class Base(DeclarativeBase):
    pass


class Parent(Base):
    __tablename__ = "family_parents"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20), default="")
    children: Mapped[list[Child]] = relationship(
        order_by="Child.id", back_populates="parent", cascade="save-update, merge, refresh-expire"
    )


class Child(Base):
    __tablename__ = "family_children"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20), default="")
    parent_id: Mapped[int] = mapped_column(ForeignKey(Parent.id))
    parent: Mapped[Parent] = relationship(back_populates="children")
    toys: Mapped[list[Toy]] = relationship(order_by="Toy.id")


class Toy(Base):
    __tablename__ = "family_toys"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20), default="")
    child_id: Mapped[int] = mapped_column(ForeignKey(Child.id))


def fill(engine: Engine) -> None:
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with sessionmaker(engine).begin() as session:
        session.add_all([Parent(children=[Child(toys=[Toy()]), Child()]) for _ in range(40)])


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    fill(engine)
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
    cache = QueryCache(store, lease=0.1)
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
            tables.append(sql.split("FROM family_")[1].split()[0])

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
    tags = [tag for tag in store.backend._counters if "family_toys" in tag]
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


class Place(Base):
    __tablename__ = "family_places"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(10))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "place"}


class House(Place):
    __tablename__ = "family_houses"

    id: Mapped[int] = mapped_column(ForeignKey(Place.id), primary_key=True)
    floors: Mapped[int]
    rooms: Mapped[list[Room]] = relationship(order_by="Room.id")
    __mapper_args__ = {"polymorphic_identity": "house"}


class Room(Base):
    __tablename__ = "family_rooms"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20))
    house_id: Mapped[int] = mapped_column(ForeignKey(House.id))


def once(engine: Engine, part: str, act: Any) -> None:
    """Do something just before the next statement with this text in it."""

    todo = [act]

    def before(connection: object, cursor: object, sql: str, *rest: object) -> None:
        if todo and sql.startswith("SELECT") and part in sql:
            todo.pop()()

    event.listen(engine, "before_cursor_execute", before)


def test_what_is_loaded_within_another_load_is_no_older(engine: Engine, store: CacheRegion) -> None:
    """SQLAlchemy loads the rooms while it still loads the houses."""
    _, factory = attached(engine, store)
    with factory.begin() as session:
        session.add(House(id=1, floors=1, rooms=[Room(name="1")]))

    def look() -> tuple[int, str]:
        statement = select(Place).options(selectin_polymorphic(Place, [House]), selectinload(House.rooms))
        with factory() as session:
            house = session.scalars(statement.execution_options(cache_key="places")).one()
            assert isinstance(house, House)
            return house.floors, house.rooms[0].name

    def write(number: int, *tables: Any) -> None:
        with factory.begin() as session:
            for table, values in tables:
                session.execute(update(table).values(values))

    houses, rooms = House.__table__, Room.__table__
    look()
    write(2, (houses, {"floors": 2}))
    once(engine, "JOIN family_houses", lambda: write(3, (houses, {"floors": 3}), (rooms, {"name": "3"})))
    assert look() == (3, "3")


@pytest.mark.parametrize("below", [selectinload, immediateload])
def test_nor_is_it_within_a_subquery_load(
    engine: Engine, store: CacheRegion, asked: list[str], below: Any
) -> None:
    _, factory = attached(engine, store)
    statement = (
        select(Parent).where(Parent.id == 1).options(subqueryload(Parent.children).options(below(Child.toys)))
    )

    def look() -> list[str]:
        with factory() as session:
            return [
                each.name
                for each in session.scalars(statement.execution_options(cache_key="p")).one().children
            ]

    look()
    with factory.begin() as session:
        session.get_one(Child, 1).name = "Zoe"
    asked.clear()
    assert look() == ["Zoe", ""]
    assert "toys" in asked


@pytest.fixture(params=["postgresql", "mariadb"])
def snapshots(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """A database whose transactions see one state of it."""
    engine: Engine = request.getfixturevalue(f"{request.param}_engine")
    fill(engine)
    yield engine.execution_options(isolation_level="REPEATABLE READ")


@pytest.fixture(params=["memory", "redis"])
def any_store(request: pytest.FixtureRequest, store: CacheRegion) -> CacheRegion:
    if request.param == "memory":
        return store
    url = request.getfixturevalue("redis_store_url")
    return make_region().configure("querycache.redis", arguments={"url": url})


def until_hit(cache: QueryCache, factory: Any) -> None:
    deadline = time.monotonic() + 10
    while ask(cache, factory, 1) != "hit":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def names(session: Session, statement: Any) -> list[str]:
    parent = session.scalars(statement).one()
    child = parent.children[0]
    return [parent.name, child.name, child.toys[0].name]


def rename_all(factory: Any, name: str) -> None:
    with factory.begin() as session:
        for each in (Parent, Child, Toy):
            session.get_one(each, 1).name = name


def begin_by_setting(cache: QueryCache, session: Session) -> None:
    setting = (
        "LOCAL work_mem = '4MB'" if session.get_bind().dialect.name == "postgresql" else "@querycache = 1"
    )
    session.execute(text(f"SET {setting}"))


def begin_by_locking(cache: QueryCache, session: Session) -> None:
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("LOCK TABLE family_rooms IN SHARE MODE"))
    else:
        session.execute(select(Room).with_for_update())


def begin_by_writing(cache: QueryCache, session: Session) -> None:
    session.execute(update(Room).values(name="other"))


def begin_by_invalidating(cache: QueryCache, session: Session) -> None:
    cache.invalidate(tags=["other"], session=session)


BEGINNINGS = [begin_by_setting, begin_by_locking, begin_by_writing, begin_by_invalidating]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("begin", [None, *BEGINNINGS])
def test_a_snapshot_shows_one_state(
    snapshots: Engine, any_store: CacheRegion, cached: bool, begin: Any
) -> None:
    """What was stored is from before the snapshot begins, with the first statement that completes it; a transaction that has
    begun before need not have one yet."""
    cache, factory = attached(snapshots, any_store)
    statement = whole_family(1) if cached else whole_family(1).execution_options(cache_key=None)
    until_hit(cache, factory)

    with factory.begin() as session:
        session.get_one(Toy, 1).name = "old"
    once(snapshots, "FROM family_toys", lambda: rename_all(factory, "new"))
    with factory() as session, cache.recording() as events:
        if begin is not None:
            begin(cache, session)
        found = names(session, statement)
    assert found in (["", "", "old"], ["new", "new", "new"])
    if cached:
        reasons = [(each.outcome, each.reason) for each in events]
        assert ("stale", "in part") in reasons


def test_an_answer_is_completed_in_a_snapshot_that_shows_what_was_stored(
    snapshots: Engine, any_store: CacheRegion
) -> None:
    """Somebody has written something else meanwhile."""
    cache, factory = attached(snapshots, any_store)
    until_hit(cache, factory)
    with factory.begin() as session:
        session.get_one(Toy, 1).name = "old"

    def write() -> None:
        with factory.begin() as session:
            session.execute(update(Room).values(name="other"))

    once(snapshots, "FROM family_toys", write)
    with factory() as session, cache.recording() as events:
        assert names(session, whole_family(1)) == ["", "", "old"]
    assert [(each.outcome, each.reason) for each in events][:2] == [("stale", "in part"), ("fill", "")]


def test_rows_of_other_answers_are_those_of_the_snapshot(snapshots: Engine, any_store: CacheRegion) -> None:
    """This answer lost them, and another had them asked for again."""
    cache, factory = attached(snapshots, any_store)
    until_hit(cache, factory)

    def ask(number: int) -> list[str]:
        statement = (
            select(Child)
            .where(Child.id == number)
            .options(selectinload(Child.parent), selectinload(Child.toys))
        )
        with factory() as session:
            child = session.scalars(statement.execution_options(cache_key="child")).one()
            return [child.parent.name, *(toy.name for toy in child.toys)]

    def rename(name: str) -> None:
        with factory.begin() as session:
            session.execute(update(Parent).where(Parent.id == 1).values(name=name))
            session.execute(update(Toy).where(Toy.id == 1).values(name=name))

    for _ in range(2):
        ask(1), ask(2)
    rename("mid")
    assert ask(2) == ["mid"]
    once(snapshots, "FROM family_toys", lambda: rename("new"))
    with cache.recording() as events:
        assert ask(1) in (["mid", "mid"], ["new", "new"])
    assert events[0].reason == "in part"


def test_a_snapshot_that_has_shown_what_was_replayed_is_not_asked_about_again(
    snapshots: Engine, any_store: CacheRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, factory = attached(snapshots, any_store)
    until_hit(cache, factory)
    with factory.begin() as session:
        session.get_one(Child, 1).name = session.get_one(Toy, 1).name = "new"
    confirmed = []
    confirms = Reading.confirms
    monkeypatch.setattr(Reading, "confirms", lambda *given: confirmed.append(given) or confirms(*given))
    with factory() as session, cache.recording() as events:
        assert names(session, whole_family(1)) == ["", "new", "new"]
    assert events[0].reason == "in part" and len(confirmed) == 1


class Clocked(Base):
    """Parents, as the cache refuses to tell of them."""

    __table__ = Parent.__table__
    now = column_property(func.now())


class Ward(Base):
    """Children, whose parents do not belong to what is stored: who stores it has them already."""

    __table__ = Child.__table__
    parent: Mapped[Parent] = relationship(Parent, viewonly=True)
    clocked: Mapped[Clocked] = relationship(Clocked, viewonly=True)


def ward_completed_by(
    attribute: Any, snapshots: Engine, store: CacheRegion, write: Any
) -> tuple[tuple[str, str], list[tuple[str, str]]]:
    """The names of a ward and its parent, and what the cache tells; somebody writes just before the parent is asked for."""
    cache, factory = attached(snapshots, store)
    until_hit(cache, factory)
    loaded = select(Ward).where(Ward.id == 1).options(immediateload(attribute))
    statement = loaded.execution_options(cache_key="ward")
    with sessionmaker(snapshots.execution_options(isolation_level="READ COMMITTED"))() as session:
        cache.attach(session)
        kept = session.get_one(attribute.entity.class_, 1)
        assert getattr(session.scalars(statement).one(), attribute.key) is kept
    once(snapshots, "FROM family_parents", lambda: write(factory))
    with factory() as session, cache.recording() as events:
        ward = session.scalars(statement).one()
        return (ward.name, getattr(ward, attribute.key).name), [(e.outcome, e.reason) for e in events]


@pytest.mark.parametrize("attribute", [Ward.parent, Ward.clocked], ids=["answered", "refused"])
def test_what_is_replayed_is_of_the_snapshot_that_a_further_statement_begins(
    snapshots: Engine, any_store: CacheRegion, attribute: Any
) -> None:
    """Also where the cache refuses that one."""
    found, events = ward_completed_by(
        attribute, snapshots, any_store, lambda factory: rename_all(factory, "new")
    )
    assert found == ("new", "new")
    assert ("hit", "") not in events


@pytest.mark.parametrize("attribute", [Ward.parent, Ward.clocked], ids=["answered", "refused"])
def test_what_is_not_replayed_may_change(snapshots: Engine, any_store: CacheRegion, attribute: Any) -> None:
    def write(factory: Any) -> None:
        with factory.begin() as session:
            session.get_one(Parent, 1).name = "new"

    found, events = ward_completed_by(attribute, snapshots, any_store, write)
    assert found == ("", "new")
    assert ("hit", "") in events


def test_snapshots_of_several_databases_show_one_state_each(
    snapshots: Engine, any_store: CacheRegion, request: pytest.FixtureRequest
) -> None:
    """The one that begins with a further statement is not that of the statement itself, but what was replayed of its
    database is as old."""
    other = "mariadb" if snapshots.dialect.name == "postgresql" else "postgresql"
    elsewhere: Engine = request.getfixturevalue(f"{other}_engine")
    fill(elsewhere)
    cache, factory = attached(snapshots, any_store)
    factory.configure(binds={Child: snapshots, Toy: snapshots, Parent: elsewhere})
    until_hit(cache, factory)

    with factory.begin() as session:
        session.get_one(Toy, 1).name = "old"
    once(snapshots, "FROM family_toys", lambda: rename_all(factory, "new"))
    with factory() as session, cache.recording() as events:
        found = names(session, whole_family(1))
    assert found[1:] in (["", "old"], ["new", "new"])
    assert events[0].reason == "in part"


def test_an_answer_that_is_given_up_takes_nothing_from_the_application(
    snapshots: Engine, any_store: CacheRegion
) -> None:
    """Not what it has changed in objects that are related to those of the answer; and nothing is left of the answer in
    objects that were there before."""
    cache, factory = attached(snapshots, any_store)
    factory.configure(autoflush=False, expire_on_commit=False)
    until_hit(cache, factory)
    with factory.begin() as session:
        session.get_one(Toy, 1).name = "old"

    def write() -> None:
        with factory.begin() as session:
            session.get_one(Toy, 1).name = "new"
            session.add(Child(parent_id=1, name="added"))

    once(snapshots, "FROM family_toys", write)
    with factory() as session, cache.recording() as events:
        parent, child = session.get_one(Parent, 1), session.get_one(Child, 2)
        session.commit()
        child.name = "mine"
        session.scalars(whole_family(1)).one()
        assert ("bypass", "snapshot") in [(each.outcome, each.reason) for each in events]
        assert child.name == "mine" and child in session.dirty
        toys, added = parent.children[0].toys[0].name, [each.name for each in parent.children][2:]
        assert (toys, added) in (("old", []), ("new", ["added"]))
        session.commit()
    with factory() as session:
        assert session.get_one(Child, 2).name == "mine"


def test_a_hit_does_not_look_at_all_objects_of_its_session(
    snapshots: Engine, any_store: CacheRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To know what to forget if it has to be given up: that would cost each hit more, the more objects there are."""
    cache, factory = attached(snapshots, any_store)
    until_hit(cache, factory)
    monkeypatch.setattr("querycache.sa_internals.loaded_objects", None)
    with factory() as session, cache.recording() as events:
        for _ in range(2):
            session.scalars(whole_family(1)).one()
    assert [each.outcome for each in events] == ["hit", "hit"]


def test_an_answer_that_is_given_up_leaves_expired_what_was(
    snapshots: Engine, any_store: CacheRegion
) -> None:
    """Or else lazy loads take an object for loaded that is not."""
    cache, factory = attached(snapshots, any_store)
    until_hit(cache, factory)
    statement = (
        select(Child).where(Child.id == 1).options(immediateload(Child.parent), selectinload(Child.toys))
    )
    cached = statement.execution_options(cache_key="expired")
    for _ in range(2):
        with factory() as session:
            session.scalars(cached).one()
    with factory.begin() as session:
        session.get_one(Toy, 1).name = "old"

    def write() -> None:
        with factory.begin() as session:
            session.get_one(Child, 1).name = "new"

    once(snapshots, "FROM family_toys", write)
    with factory() as session, cache.recording() as events:
        parent = session.get_one(Parent, 1)
        session.commit()
        child = session.scalars(cached).one()
        assert ("bypass", "snapshot") in [(each.outcome, each.reason) for each in events]
    assert child.parent is parent and parent.name == ""  # loaded, since no Session would do it now


def test_an_answer_that_is_given_up_leaves_pending_what_was(
    snapshots: Engine, any_store: CacheRegion
) -> None:
    """What was added to a collection that is not loaded is merged with the rows that are right."""
    cache, factory = attached(snapshots, any_store)
    factory.configure(autoflush=False, expire_on_commit=False)
    until_hit(cache, factory)
    with factory.begin() as session:
        session.get_one(Toy, 1).name = "old"

    def write() -> None:
        with factory.begin() as session:
            session.get_one(Toy, 1).name = "new"
            session.add(Child(parent_id=1, name="theirs"))

    once(snapshots, "FROM family_toys", write)
    with factory() as session, cache.recording() as events:
        parent = session.get_one(Parent, 1)
        session.commit()
        session.add(Child(parent=parent, name="mine"))
        assert "children" not in parent.__dict__
        session.scalars(whole_family(1)).one()
        assert ("bypass", "snapshot") in [(each.outcome, each.reason) for each in events]
        toy, added = parent.children[0].toys[0].name, [each.name for each in parent.children][2:]
        assert (toy, added) in (("old", ["mine"]), ("new", ["theirs", "mine"]))
        session.commit()
    with factory() as session:
        assert [each.name for each in session.get_one(Parent, 1).children] == ["", "", "theirs", "mine"]


def test_what_a_listener_has_set_is_given_up_with_the_answer(
    snapshots: Engine, any_store: CacheRegion
) -> None:
    """Or else the next flush writes what it has made of that."""
    cache, factory = attached(snapshots, any_store)
    factory.configure(autoflush=False)
    until_hit(cache, factory)
    statement = select(Parent).where(Parent.id == 1).execution_options(cache_key="listened")

    def write() -> None:
        with factory.begin() as session:
            session.execute(update(Parent).where(Parent.id == 1).values(name="theirs"))
            session.execute(update(Toy).values(name="new"))

    def listen(parent: Parent, context: Any) -> None:
        parent.name = parent.name or "nobody"
        parent.children[0].toys  # noqa: B018

    event.listen(Parent, "load", listen)
    try:
        for _ in range(2):
            with factory() as session:
                session.scalars(statement).one()
        with factory.begin() as session:
            session.execute(update(Toy).values(name="old"))
        once(snapshots, "FROM family_toys", write)
        with factory() as session, cache.recording() as events:
            parent = session.scalars(statement).one()
            assert ("bypass", "snapshot") in [(each.outcome, each.reason) for each in events]
            assert (parent.name, parent.children[0].toys[0].name) == ("theirs", "new")
            assert parent not in session.dirty
            session.commit()
    finally:
        event.remove(Parent, "load", listen)
    with factory() as session:
        assert session.get_one(Parent, 1).name == "theirs"


def test_a_snapshot_shows_one_state_also_where_the_entry_lacks_something(
    snapshots: Engine, any_store: CacheRegion
) -> None:
    cache, factory = attached(snapshots, any_store)
    until_hit(cache, factory)  # now the history of the store is known
    statement = select(Child).where(Child.id == 1).options(immediateload(Child.parent))
    cached = statement.execution_options(cache_key="child")
    with factory() as session:
        keep = session.get_one(Parent, 1)
        session.scalars(cached).one()
        assert keep.id == 1

    def rename() -> None:
        with factory.begin() as session:
            session.get_one(Parent, 1).name = session.get_one(Child, 1).name = "new"

    once(snapshots, "FROM family_parents", rename)
    with factory() as session, cache.recording() as events:
        child = session.scalars(cached).one()
        assert child.name == child.parent.name == "new"
    assert [(each.outcome, each.reason) for each in events][:1] == [("bypass", "snapshot")]


@pytest.fixture
def elsewhere(postgresql_engine: Engine) -> Iterator[Connection]:
    """A connection of another engine to the same database."""
    engine = create_engine(postgresql_engine.url)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def of_two_databases(factory: Any, other: Any) -> Session:
    """A Session that asks for the toys elsewhere."""
    session: Session = factory(binds={Parent: factory.kw["bind"], Child: factory.kw["bind"], Toy: other})
    return session


@pytest.mark.parametrize("cached", [False, True])
def test_what_is_completed_on_a_failed_connection_fails(
    postgresql_engine: Engine, elsewhere: Connection, store: CacheRegion, cached: bool
) -> None:
    fill(postgresql_engine)
    cache, factory = attached(postgresql_engine, store)
    statement = whole_family(1) if cached else whole_family(1).execution_options(cache_key=None)
    cache.attach(elsewhere.engine)
    until_hit(cache, factory)
    elsewhere.begin()
    with pytest.raises(ProgrammingError):
        elsewhere.execute(text("SELECT * FROM nowhere"))
    with of_two_databases(factory, elsewhere) as session, pytest.raises(InternalError):
        session.scalars(statement).one()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_what_is_completed_on_a_given_connection_begins_two_phases_there(
    postgresql_engine: Engine, elsewhere: Connection, store: CacheRegion, cached: bool, end: str
) -> None:
    fill(postgresql_engine)
    cache, factory = attached(postgresql_engine, store)
    factory.configure(twophase=True)
    statement = whole_family(1) if cached else whole_family(1).execution_options(cache_key=None)
    until_hit(cache, factory)
    with of_two_databases(factory, elsewhere) as session:
        session.scalars(statement).one()
        elsewhere.execute(update(Toy).values(name="new"))
        getattr(session, end)()
        assert not elsewhere.in_transaction()
    assert elsewhere.scalars(select(Toy.name)).all() == ["new" if end == "commit" else ""] * 40


def test_what_is_completed_on_a_serializable_database_is_asked_there(
    postgresql_engine: Engine, store: CacheRegion
) -> None:
    """It wants to know what was read."""
    fill(postgresql_engine)
    cache, factory = attached(postgresql_engine, store)
    strict = create_engine(postgresql_engine.url, isolation_level="SERIALIZABLE")
    until_hit(cache, factory)
    sent: list[str] = []
    event.listen(strict, "before_cursor_execute", lambda *given: sent.append(given[2]))
    for _ in range(2):
        sent.clear()
        with of_two_databases(factory, strict) as session:
            session.scalars(whole_family(1)).one()
        assert ["family_toys" in each for each in sent] == [True]
    strict.dispose()


def test_statements_of_the_application_within_a_load_are_its_own(
    engine: Engine, store: CacheRegion, asked: list[str]
) -> None:
    """A listener may ask what no entry should hold, or ask not to be answered from the cache."""
    _, factory = attached(engine, store)
    numbers = []

    def loaded(child: Child, context: Any) -> None:
        number = context.session.scalar(select(func.random()).select_from(Parent).limit(1))
        context.session.execute(text("SELECT 1 FROM family_parents"))
        numbers.append(number)

    event.listen(Child, "load", loaded)
    try:
        family(factory)
        asked.clear()
        family(factory)
    finally:
        event.remove(Child, "load", loaded)
    assert len(set(numbers)) == 4
    assert asked == ["parents"] * 4


def test_writes_to_another_database_of_an_answer_are_followed(tmp_path: Path, store: CacheRegion) -> None:
    """A process that was only ever answered from the cache writes through the engine of the children."""

    def process() -> tuple[QueryCache, sessionmaker[Session], Engine]:
        parents, others = (create_engine(f"sqlite:///{tmp_path}/{name}.db") for name in ("parents", "others"))
        for each in (parents, others):
            Base.metadata.create_all(each)

        class Routed(Session):
            def get_bind(self, mapper: Any = None, **arguments: Any) -> Any:
                return parents if mapper is not None and mapper.class_ is Parent else others

        cache = QueryCache(store)
        factory = sessionmaker(class_=Routed)
        cache.attach(factory)
        return cache, factory, others

    statement = select(Parent).options(selectinload(Parent.children)).execution_options(cache_key="p")

    def look(factory: sessionmaker[Session]) -> list[str]:
        with factory() as session:
            return [each.name for each in session.scalars(statement).one().children]

    _, first, _ = process()
    with first.begin() as session:
        session.add(Parent(id=1))
        session.flush()
        session.add(Child(id=1, parent_id=1, name="old"))
    assert look(first) == look(first) == ["old"]
    _, second, others = process()
    assert look(second) == ["old"]
    with others.begin() as connection:
        connection.execute(update(Child).values(name="new"))
    assert look(second) == look(first) == ["new"]


def test_what_was_stored_by_who_did_not_know_of_a_trigger(
    engine: Engine, store: CacheRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which triggers a process knows is a matter of the models that it imports."""
    _, unknowing = attached(engine, store)
    family(unknowing)
    monkeypatch.setattr(declarations, "_by_triggers", {})
    monkeypatch.setattr(declarations.Declarations, "of_triggers", 0)
    declarations.written_by_triggers(Toy.__table__, [Place.__table__])  # type: ignore[arg-type]
    cache, factory = attached(engine, store)
    with cache.recording() as events:
        family(factory)
    assert [each.outcome for each in events] == ["fill", "hit"]
    with factory.begin() as session:
        session.add(Place(id=1))
    assert ask(cache, factory, 1) == "stale"


def test_a_process_that_only_hits_forgets_tags_too(
    engine: Engine, store: CacheRegion, fetches: list[int]
) -> None:
    writer, reader = attached(engine, store), attached(engine, store)
    sizes = []
    for _ in range(10):
        with writer[1].begin() as session:
            for child in session.scalars(select(Child).where(Child.parent_id == 1)):
                child.parent_id = 2
            session.add(Child(parent_id=1))
        ask(*writer, 1)
        assert ask(*reader, 1) == "hit"
        fetches.clear()
        assert ask(*reader, 1) == "hit"
        sizes.append(tuple(fetches))
    assert len(set(sizes)) == 1 and len(sizes[0]) == 1


def test_an_entry_does_not_grow_for_ever(engine: Engine, store: CacheRegion) -> None:
    """Handlers may add to the further statements alone, each time something else."""
    _, factory = attached(engine, store)
    numbers = iter(range(1000))

    def window(state: Any) -> None:
        if state.is_relationship_load:
            state.statement = state.statement.options(with_loader_criteria(Child, Child.id > -next(numbers)))

    event.listen(factory, "do_orm_execute", window)
    sizes = []
    for _ in range(150):
        family(factory)
        [(payload, _, _)] = store.backend._entries.values()
        sizes.append(len(payload))
    assert max(sizes[100:]) <= max(sizes[:100])


def test_an_entry_of_many_loads_is_completed_for_good(engine: Engine, store: CacheRegion) -> None:
    """It was first asked for by a Session that had half of the parents already."""
    cache, factory = attached(engine, store)
    with factory.begin() as session:
        parents = [Parent() for _ in range(200)]
        session.add_all(parents)
        session.flush()
        numbers = [parent.id for parent in parents]
        session.add_all(Child(name="of many", parent_id=number) for number in numbers)
    statement = (
        select(Child)
        .where(Child.name == "of many")
        .options(immediateload(Child.parent))
        .execution_options(cache_key=True)
    )

    def ask(known: list[int]) -> list[str]:
        with cache.recording() as events, factory() as session:
            kept = session.scalars(select(Parent).where(Parent.id.in_(known))).all()
            assert len(session.scalars(statement).all()) == 200 >= len(kept)
        return sorted(event.outcome for event in events)

    assert ask(numbers[:100]) == ["fill", "miss"]
    assert ask(numbers[100:]) == ["fill", "hit"]
    assert ask([]) == ["fill", "hit"], "it had become large, and began anew with what that answer needed"
    assert [ask([]), ask(numbers[:100]), ask(numbers[100:])] == [["hit"]] * 3


@pytest.mark.parametrize("ahead", [3600.0, -3600.0])
def test_clocks_that_disagree_do_not_keep_an_answer_longer(
    engine: Engine, store: CacheRegion, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    cache, factory = attached(engine, store)
    now = time.time()
    statement = whole_family(1, cache_ttl=1000)
    monkeypatch.setattr(time, "time", lambda: now + ahead)
    with factory() as session:
        session.scalars(statement).one()
    monkeypatch.setattr(time, "time", lambda: now)
    with factory.begin() as session:
        session.add(Toy(child_id=2))
    with factory() as session, cache.recording() as events:
        session.scalars(statement).one()
    assert [(each.outcome, each.reason) for each in events] == [("stale", "in part"), ("bypass", "expired")]
