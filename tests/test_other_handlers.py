"""Other ``do_orm_execute`` handlers beside the cache: whatever they do, registered before it or after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, ForeignKey, Select, create_engine, event, func, inspect, select, text
from sqlalchemy.engine import IteratorResult
from sqlalchemy.engine.result import SimpleResultMetaData
from sqlalchemy.ext.horizontal_shard import ShardedSession, set_shard_id
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    ORMExecuteState,
    Session,
    immediateload,
    joinedload,
    lazyload,
    mapped_column,
    relationship,
    selectinload,
    sessionmaker,
    subqueryload,
    with_loader_criteria,
)
from sqlalchemy.pool import StaticPool

from querycache import CacheMiss, FromCache, Policy, QueryCache, RelationshipCache

Handler = Callable[[ORMExecuteState], Any]
LOADERS = {
    "selectin": selectinload,
    "joined": joinedload,
    "subquery": subqueryload,
    "immediate": immediateload,
    "lazy": lazyload,
}
ORDERS = ("before", "after", "on the session")
START = datetime(2025, 1, 1)


class Base(DeclarativeBase):
    pass


class Kept:
    """What every row has: a tenant, a time, and perhaps a time of deletion."""

    tenant: Mapped[str] = mapped_column()
    at: Mapped[datetime] = mapped_column()
    deleted_at: Mapped[datetime | None] = mapped_column()


class Doc(Kept, Base):
    __tablename__ = "docs"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    notes: Mapped[list[Note]] = relationship(order_by="Note.id", back_populates="doc")


class Note(Kept, Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    doc_id: Mapped[int] = mapped_column(ForeignKey(Doc.id))
    doc: Mapped[Doc] = relationship(back_populates="notes")


def make_engine(prefix: str = "", first_id: int = 1) -> Engine:
    """Eight documents of two tenants, each with a note of each tenant; every third row is deleted."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        for number in range(8):
            deleted_at = START if number % 3 == 0 else None
            doc = Doc(
                id=first_id + number,
                name=f"{prefix}doc {number}",
                tenant="ab"[number % 2],
                at=START + timedelta(days=number),
                deleted_at=deleted_at,
            )
            doc.notes = [
                Note(
                    id=first_id + 2 * number + index,
                    name=f"{prefix}note {number} of {tenant}",
                    tenant=tenant,
                    at=START + timedelta(days=index),
                    deleted_at=deleted_at if index else None,
                )
                for index, tenant in enumerate("ab")
            ]
            session.add(doc)
        session.commit()
    return engine


class House:
    """A database, a cache, and Sessions with a handler that stands before the cache, or after it."""

    def __init__(self, engine: Engine, handler: Handler, order: str, **options: Any) -> None:
        self.engine = engine
        self.cache = QueryCache(**options)
        self.statements = 0
        self._handler = handler
        self._order = order
        self._factory = sessionmaker(engine)
        self._uncached = sessionmaker(engine)
        event.listen(engine, "before_cursor_execute", self._count)
        event.listen(self._uncached, "do_orm_execute", handler)
        if order == "before":
            event.listen(self._factory, "do_orm_execute", handler)
        self.cache.attach(self._factory)
        if order == "after":
            event.listen(self._factory, "do_orm_execute", handler)

    def _count(self, *_: object) -> None:
        self.statements += 1

    def session(self) -> Session:
        session = self._factory()
        if self._order == "on the session":
            event.listen(session, "do_orm_execute", self._handler)
        return session

    def ask(self, use: Callable[[Session], Any]) -> tuple[Any, list[str], int]:
        """What ``use`` makes of a new Session, the cache's outcomes and reasons, the number of statements."""
        before = self.statements
        with self.cache.recording() as events, self.session() as session:
            answer = use(session)
        outcomes = [f"{each.outcome} {each.reason}".strip() for each in events]
        return answer, outcomes, self.statements - before

    def truth(self, use: Callable[[Session], Any]) -> Any:
        """The same without a cache."""
        with self._uncached() as session:
            return use(session)


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = make_engine()
    yield engine
    engine.dispose()


def docs_with_notes(statement: Select[Any]) -> Callable[[Session], Any]:
    def use(session: Session) -> Any:
        docs = session.scalars(statement).unique()
        return [(doc.name, [note.name for note in doc.notes]) for doc in docs]

    return use


# --- Criteria: tenants, soft delete, time windows -------------------------------------------------

tenant: ContextVar[str] = ContextVar("tenant")
window: ContextVar[tuple[datetime, datetime]] = ContextVar("window")


def only_my_tenant(state: ORMExecuteState) -> None:
    if state.is_select and not state.is_column_load and not state.is_relationship_load:
        mine = tenant.get()
        criteria = with_loader_criteria(Kept, lambda cls: cls.tenant == mine, include_aliases=True)
        state.statement = state.statement.options(criteria)


def only_in_the_window(state: ORMExecuteState) -> None:
    if state.is_select and not state.is_column_load and not state.is_relationship_load:
        first, last = window.get()
        criteria = with_loader_criteria(Kept, lambda cls: cls.at.between(first, last), include_aliases=True)
        state.statement = state.statement.options(criteria)


def no_deleted_rows(state: ORMExecuteState) -> None:
    if (
        state.is_select
        and not state.is_column_load
        and not state.is_relationship_load
        and not state.execution_options.get("include_deleted", False)
    ):
        criteria = with_loader_criteria(Kept, lambda cls: cls.deleted_at.is_(None), include_aliases=True)
        state.statement = state.statement.options(criteria)


ASKED_BY = {
    "option": lambda statement: statement.execution_options(cache_key="docs"),
    "FromCache": lambda statement: statement.options(FromCache(key="docs")),
    "lazy loads": lambda statement: statement.options(
        FromCache(key="docs"), RelationshipCache(Doc.notes, key="docs")
    ),
    "policy": lambda statement: statement,
}
POLICIES = {Doc: Policy(), Note: Policy()}
STATEMENTS: list[Select[Any]] = [
    select(Doc).order_by(Doc.id),
    select(Doc).join(Doc.notes).order_by(Doc.id, Note.id),
    select(Doc).where(Doc.id.in_(select(Note.doc_id))).order_by(Doc.id.desc()).limit(3),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("asked_by", ASKED_BY)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, len(STATEMENTS) - 1), st.sampled_from(list(LOADERS))),
        min_size=2,
        max_size=8,
    )
)
def test_A8_no_tenant_gets_rows_of_another(
    engine: Engine, order: str, asked_by: str, asked: list[tuple[str, int, str]]
) -> None:
    policies = POLICIES if asked_by == "policy" else {}
    house = House(engine, only_my_tenant, order, policies=policies)
    for who, which, loader in [*asked, *asked]:
        tenant.set(who)
        use = docs_with_notes(ASKED_BY[asked_by](STATEMENTS[which].options(LOADERS[loader](Doc.notes))))
        answer, outcomes, _ = house.ask(use)
        assert answer == house.truth(use)
        assert not any(outcome.startswith(("bypass", "error")) for outcome in outcomes)
    assert outcomes == ["hit"] * len(outcomes) and outcomes


@pytest.mark.parametrize("order", ORDERS)
def test_A8_each_tenant_has_a_hit_of_its_own(engine: Engine, order: str) -> None:
    house = House(engine, only_my_tenant, order)
    use = docs_with_notes(select(Doc).options(selectinload(Doc.notes)).execution_options(cache_key="docs"))
    for expected, statements in (["miss", "fill"], 2), (["hit"], 0), (["hit"], 0):
        for who in "ab":
            tenant.set(who)
            answer, outcomes, emitted = house.ask(use)
            assert (outcomes, emitted) == (expected, statements)
            assert len(answer) == 4 and all(name.endswith(who) for _, (name,) in answer)


@pytest.mark.parametrize("order", ORDERS)
def test_A8_a_tenant_that_changes_within_a_session(engine: Engine, order: str) -> None:
    house = House(engine, only_my_tenant, order)
    statement = select(Doc.name).execution_options(cache_key="docs")

    def use(session: Session) -> Any:
        names = []
        for who in "abab":
            tenant.set(who)
            names.append(session.scalars(statement).all())
        return names

    answer, outcomes, _ = house.ask(use)
    assert answer == house.truth(use)
    assert outcomes == ["miss", "fill", "miss", "fill", "hit", "hit"]


def test_scope_keeps_tenants_apart_where_the_key_alone_decides(engine: Engine) -> None:
    house = House(engine, only_my_tenant, "after", scope=lambda session: tenant.get())
    statement = select(Doc.name).execution_options(cache_key="docs", cache_exact=True)
    for who in "abab":
        tenant.set(who)
        answer, *_ = house.ask(lambda session: session.scalars(statement).all())
        assert len(answer) == 4 and answer == house.truth(lambda session: session.scalars(statement).all())


@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    windows=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 4), st.sampled_from(list(LOADERS))),
        min_size=2,
        max_size=8,
    )
)
def test_A8_each_time_window_has_its_own_answer(
    engine: Engine, order: str, windows: list[tuple[int, int, str]]
) -> None:
    house = House(engine, only_in_the_window, order)
    for first, days, loader in [*windows, *windows]:
        window.set((START + timedelta(days=first), START + timedelta(days=first + days)))
        statement = select(Doc).order_by(Doc.id).options(LOADERS[loader](Doc.notes))
        use = docs_with_notes(statement.execution_options(cache_key="docs"))
        answer, outcomes, _ = house.ask(use)
        assert answer == house.truth(use)
    assert outcomes == ["hit"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("loader", LOADERS)
def test_A8_deleted_rows_come_only_where_they_are_asked_for(engine: Engine, order: str, loader: str) -> None:
    house = House(engine, no_deleted_rows, order)
    statement = select(Doc).options(LOADERS[loader](Doc.notes)).execution_options(cache_key="docs")
    everything = statement.execution_options(include_deleted=True)
    for outcomes in ["miss", "fill"], ["hit"]:
        for each, docs in (statement, 5), (everything, 8):
            use = docs_with_notes(each)
            answer, seen, _ = house.ask(use)
            assert (seen, len(answer)) == (outcomes, docs)
            assert answer == house.truth(use)


# --- Rewriting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_A8_the_rewritten_statement_is_the_one_that_is_cached(engine: Engine, order: str) -> None:
    limit = 0

    def first_few(state: ORMExecuteState) -> None:
        if state.is_select:
            statement: Any = state.statement
            state.statement = statement.where(Doc.id <= limit)

    house = House(engine, first_few, order)
    statement = select(Doc.id).order_by(Doc.id).execution_options(cache_key="docs")
    for outcomes in ["miss", "fill"], ["hit"]:
        for limit in (2, 5):
            answer, seen, _ = house.ask(lambda session: session.scalars(statement).all())
            assert (answer, seen) == (list(range(1, limit + 1)), outcomes)


@pytest.mark.parametrize("order", ORDERS)
def test_A8_a_statement_replaced_by_another(engine: Engine, order: str) -> None:
    def notes_instead(state: ORMExecuteState) -> None:
        state.statement = select(Note.id, Note.name).where(Note.id == 3).execution_options(cache_key="note")

    house = House(engine, notes_instead, order)
    statement = select(Doc.name).execution_options(cache_key="docs")
    for outcomes in ["miss", "fill"], ["hit"]:
        answer, seen, _ = house.ask(lambda session: session.execute(statement).all())
        assert (answer, seen) == ([(3, "note 1 of a")], outcomes)


@pytest.mark.parametrize("order", ORDERS)
def test_A8_parameters_given_by_a_handler(engine: Engine, order: str) -> None:
    wanted = ""

    def with_parameter(state: ORMExecuteState) -> Any:
        return state.invoke_statement(params={"wanted": wanted})

    house = House(engine, with_parameter, order)
    statement = select(Doc.id).where(text("name = :wanted")).execution_options(cache_key="docs")
    for outcomes in ["miss", "fill"], ["hit"]:
        for wanted, number in ("doc 1", 2), ("doc 4", 5):  # noqa: B007
            answer, seen, _ = house.ask(
                lambda session: session.scalars(statement, {"wanted": "nobody"}).all()
            )
            assert (answer, seen) == ([number], outcomes)


@pytest.mark.parametrize("order", ORDERS)
def test_B4_a_schema_given_by_a_handler(order: str) -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    schema: str | None = None
    with engine.begin() as connection:
        for name in ("one", "other"):
            connection.exec_driver_sql(f"ATTACH DATABASE ':memory:' AS {name}")
            translated = connection.execution_options(schema_translate_map={None: name})
            Base.metadata.create_all(translated)
            connection.exec_driver_sql(
                f"INSERT INTO {name}.docs (id, name, tenant, at) VALUES (1, '{name}', 'a', '2025-01-01')"
            )

    def translate(state: ORMExecuteState) -> None:
        state.update_execution_options(schema_translate_map={None: schema})

    house = House(engine, translate, order)
    statement = select(Doc.name).execution_options(cache_key="docs")
    for outcomes in ["miss", "fill"], ["hit"]:
        for schema in ("one", "other"):
            answer, seen, _ = house.ask(lambda session: session.scalars(statement).all())
            assert (answer, seen) == ([schema], outcomes)
    engine.dispose()


# --- Listeners of the engine that rewrite ------------------------------------------------------------------


@pytest.mark.parametrize("loader", ["selectin", "joined", "subquery", "immediate"])
def test_what_a_listener_of_the_engine_rewrites_is_given_and_not_stored(engine: Engine, loader: str) -> None:
    """Nor does what was loaded for one statement answer another that was to be rewritten otherwise."""
    house = House(engine, lambda state: None, "after")

    @event.listens_for(engine, "before_cursor_execute", retval=True)
    def rewrite(connection: Any, cursor: Any, sql: str, parameters: Any, *_: Any) -> tuple[str, Any]:
        return sql.replace("docs.name", f"'{tenant.get()}'"), parameters

    use = docs_with_notes(
        select(Doc).options(LOADERS[loader](Doc.notes)).where(Doc.id == 1).execution_options(cache_key="docs")
    )
    for who in "abab":
        tenant.set(who)
        answer, outcomes, _ = house.ask(use)
        assert answer[0][0] == who and len(answer[0][1]) == 2
        assert outcomes == ["miss", "bypass rewritten"]


def test_parameters_that_a_listener_of_the_engine_changes(engine: Engine) -> None:
    house = House(engine, lambda state: None, "after")

    @event.listens_for(engine, "before_cursor_execute", retval=True)
    def change(connection: Any, cursor: Any, sql: str, parameters: Any, *_: Any) -> tuple[str, Any]:
        return sql, (tenant.get(),)

    statement = select(Doc.id).where(Doc.tenant == "nobody").execution_options(cache_key="docs")
    for who, first in ("a", 1), ("b", 2), ("a", 1):
        tenant.set(who)
        answer, outcomes, _ = house.ask(lambda session: session.scalars(statement).all())
        assert (answer[0], outcomes) == (first, ["miss", "bypass rewritten"])


def test_a_statement_that_a_listener_of_the_engine_replaces(engine: Engine) -> None:
    house = House(engine, lambda state: None, "after")
    wanted = 1

    @event.listens_for(engine, "before_execute", retval=True)
    def replace(connection: Any, element: Any, multiparams: Any, params: Any, options: Any) -> Any:
        return element.where(Doc.id == wanted), multiparams, params

    statement = select(Doc.id).execution_options(cache_key="docs")
    for wanted in (1, 2, 1):
        answer, outcomes, _ = house.ask(lambda session: session.scalars(statement).all())
        assert (answer, outcomes) == ([wanted], ["miss", "bypass rewritten"])


@pytest.mark.parametrize("form", ["{} /*traceparent='00-1-{}'*/", "/* {1} */ {0}", "-- {1}\n{0}", "{} -- {}"])
def test_comments_that_tracing_adds_do_no_harm(engine: Engine, form: str) -> None:
    house = House(engine, lambda state: None, "after")
    number = 0

    @event.listens_for(engine, "before_cursor_execute", retval=True)
    def comment(connection: Any, cursor: Any, sql: str, parameters: Any, *_: Any) -> tuple[str, Any]:
        nonlocal number
        number += 1
        return form.format(sql, number), parameters

    statement = select(Doc).options(selectinload(Doc.notes)).execution_options(cache_key="docs")
    without_parameters = select(Doc.id).execution_options(cache_key="ids", no_parameters=True)
    for use in docs_with_notes(statement), lambda session: session.scalars(without_parameters).all():
        first, outcomes, _ = house.ask(use)
        assert outcomes == ["miss", "fill"]
        assert house.ask(use) == (first, ["hit"], 0)


# --- Options that keep the cache out --------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_A7_populate_existing_set_by_a_handler(order: str) -> None:
    engine = make_engine()

    def populate(state: ORMExecuteState) -> None:
        if state.execution_options.get("fresh"):
            state.update_execution_options(populate_existing=True)

    house = House(engine, populate, order)
    statement = select(Doc).where(Doc.id == 1).execution_options(cache_key="doc")
    house.ask(lambda session: session.scalars(statement).one().name)

    def use(session: Session) -> Any:
        doc = session.scalars(statement).one()
        before = doc.name
        with engine.begin() as connection:
            connection.execute(text("UPDATE docs SET name = 'newer' WHERE id = 1"))
        return before, session.scalars(statement.execution_options(fresh=True)).one().name, doc.name

    answer, outcomes, _ = house.ask(use)
    assert answer == ("doc 0", "newer", "newer")
    assert outcomes == ["hit", "bypass populate_existing"]
    engine.dispose()


@pytest.mark.parametrize("order", ORDERS)
def test_A7_a_lock_added_by_a_handler(engine: Engine, order: str) -> None:
    def lock(state: ORMExecuteState) -> None:
        statement: Any = state.statement
        state.statement = statement.with_for_update()

    house = House(engine, lock, order)
    statement = select(Doc.id).execution_options(cache_key="docs")
    for _ in range(2):
        _, outcomes, emitted = house.ask(lambda session: session.scalars(statement).all())
        assert (outcomes, emitted) == (["bypass for update"], 1)


@pytest.mark.parametrize("order", ORDERS)
def test_the_cache_told_to_keep_out_by_a_handler(engine: Engine, order: str) -> None:
    house = House(engine, lambda state: state.update_execution_options(cache_mode="bypass"), order)
    statement = select(Doc.id).execution_options(cache_key="docs")
    for _ in range(2):
        _, outcomes, emitted = house.ask(lambda session: session.scalars(statement).all())
        assert (outcomes, emitted) == (["bypass mode"], 1)


def test_the_cache_asked_for_by_a_handler_registered_before_it(engine: Engine) -> None:
    house = House(engine, lambda state: state.update_execution_options(cache_key="docs"), "before")
    for expected in (["miss", "fill"], 1), (["hit"], 0):
        _, *seen = house.ask(lambda session: session.scalars(select(Doc.id)).all())
        assert tuple(seen) == expected


# --- Handlers that answer -------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_a_handler_that_answers_itself_is_neither_cached_nor_overruled(engine: Engine, order: str) -> None:
    answering = False

    def answer(state: ORMExecuteState) -> Any:
        if answering:
            return IteratorResult(SimpleResultMetaData(["id"]), iter([(42,)]))
        return None

    house = House(engine, answer, order)
    statement = select(Doc.id).order_by(Doc.id).limit(1).execution_options(cache_key="first")
    # one that stands before the cache is all that is run
    left = [] if order == "before" else ["bypass answered by a handler"]

    def use(session: Session) -> Any:
        return session.execute(statement).scalars().all()

    for answering, expected in (  # noqa: B007
        (True, ([42], left, 0)),
        (False, ([1], ["miss", "fill"], 1)),
        (True, ([42], left, 0)),
        (False, ([1], ["hit"], 0)),
    ):
        assert house.ask(use) == expected


@pytest.mark.parametrize("order", ORDERS)
def test_an_answer_of_a_handler_is_explained(engine: Engine, order: str) -> None:
    house = House(engine, lambda state: IteratorResult(SimpleResultMetaData(["id"]), iter([(42,)])), order)
    statement = select(Doc.id).execution_options(cache_key="first")
    with house.session() as session:
        explanation = house.cache.explain(session, statement)
        assert (explanation.cacheable, explanation.reason) == (False, "answered by a handler")


@pytest.mark.parametrize("order", ORDERS)
def test_what_a_handler_asks_itself_is_not_explained(engine: Engine, order: str) -> None:
    def handler(state: ORMExecuteState) -> None:
        if "mine" not in state.execution_options:
            state.session.execute(select(Doc.name), execution_options={"mine": True}).all()

    house = House(engine, handler, order)
    statement = select(Doc.id).execution_options(cache_key="first")
    with house.session() as session:
        assert house.cache.explain(session, statement).reason == "miss"
        session.scalars(statement).all()
        assert house.cache.explain(session, statement).stored


def test_what_a_scope_asks_is_not_explained(engine: Engine) -> None:
    cache = QueryCache(scope=lambda session: session.scalars(select(Doc.id)).first())
    factory = sessionmaker(engine)
    cache.attach(factory)
    with factory() as session:
        assert cache.explain(session, select(Doc.id).execution_options(cache_key="first")).reason == "miss"


@pytest.mark.parametrize("order", ["after", "on the session"])
def test_an_answer_of_a_handler_is_not_the_caches(engine: Engine, order: str) -> None:
    house = House(engine, lambda state: IteratorResult(SimpleResultMetaData(["id"]), iter([(42,)])), order)
    statement = select(Doc.id).execution_options(cache_key="first", cache_mode="only")
    with pytest.raises(CacheMiss, match="answered by a handler"):
        house.ask(lambda session: session.scalars(statement).all())


@pytest.mark.parametrize("order", ORDERS)
def test_a_handler_that_changes_the_result_changes_hits_too(engine: Engine, order: str) -> None:
    def shout(state: ORMExecuteState) -> Any:
        result = state.invoke_statement()
        rows = [(name.upper(),) for (name,) in result]
        return IteratorResult(SimpleResultMetaData(["name"]), iter(rows))

    house = House(engine, shout, order)
    statement = select(Doc.name).where(Doc.id == 1).execution_options(cache_key="name")

    def use(session: Session) -> Any:
        return session.execute(statement).scalars().all()

    assert house.ask(use) == (["DOC 0"], ["miss", "fill"], 1)
    assert house.ask(use) == (["DOC 0"], ["hit"], 0)


@pytest.mark.parametrize("order", ORDERS)
def test_a_handler_that_asks_something_itself(engine: Engine, order: str) -> None:
    inner = select(func.count(Doc.id)).execution_options(cache_key="inner")

    def limited_by_count(state: ORMExecuteState) -> None:
        if state.execution_options.get("cache_key") == "outer" and not state.is_relationship_load:
            statement: Any = state.statement
            state.statement = statement.where(Doc.id > state.session.scalars(inner).one() - 2)

    house = House(engine, limited_by_count, order)
    statement = select(Doc).options(selectinload(Doc.notes)).execution_options(cache_key="outer")
    use = docs_with_notes(statement)
    first, outcomes, _ = house.ask(use)
    assert outcomes == ["miss", "fill", "miss", "fill"] and len(first) == 2
    assert house.ask(use) == (first, ["hit", "hit"], 0)


@pytest.mark.parametrize("order", ORDERS)
def test_a_handler_that_raises_leaves_nothing_behind(engine: Engine, order: str) -> None:
    failing = True

    def fail(state: ORMExecuteState) -> None:
        if failing:
            raise LookupError("not today")

    house = House(engine, fail, order)
    statement = select(Doc.id).order_by(Doc.id).execution_options(cache_key="docs")
    with pytest.raises(LookupError):
        house.ask(lambda session: session.scalars(statement).all())
    failing = False
    use = docs_with_notes(select(Doc).options(selectinload(Doc.notes)).execution_options(cache_key="docs"))
    assert house.ask(use)[1:] == (["miss", "fill"], 2)
    assert house.ask(use)[1:] == (["hit"], 0)


# --- The cache beside itself ----------------------------------------------------------------------


def test_a_cache_that_is_attached_twice_answers_once(engine: Engine) -> None:
    class OwnSession(Session):
        pass

    cache, factory = QueryCache(), sessionmaker(engine, class_=OwnSession)
    cache.attach(OwnSession).attach(factory).attach(factory)
    statement = select(Doc).options(selectinload(Doc.notes)).execution_options(cache_key="docs")
    for expected in ["miss", "fill"], ["hit"]:
        with factory() as session, cache.attach(session).recording() as events:
            session.scalars(statement).all()
            assert [each.outcome for each in events] == expected
            assert cache.explain(session, statement).reason == "hit"
    cache.detach(factory).detach(OwnSession)
    with factory() as session, cache.recording() as events:
        session.scalars(statement).all()
    assert events == []


def test_two_caches_on_one_session(engine: Engine) -> None:
    """The one that was attached first answers, after the other as after any handler, and the other says so."""
    first, second, factory = QueryCache(), QueryCache(), sessionmaker(engine)
    first.attach(factory)
    second.attach(factory)
    statement = select(Doc.id).execution_options(cache_key="docs")
    for expected in ["miss", "fill"], ["hit"]:
        with factory() as session, first.recording() as answered, second.recording() as left:
            session.scalars(statement).all()
        assert [each.outcome for each in answered] == expected
        assert [(each.outcome, each.reason) for each in left] == [("bypass", "answered by a handler")]


# --- Several databases ----------------------------------------------------------------------------


@pytest.fixture
def shards() -> Iterator[dict[str, Engine]]:
    shards = {"eu": make_engine("eu "), "us": make_engine("us ", first_id=101)}
    yield shards
    for engine in shards.values():
        engine.dispose()


@pytest.mark.parametrize("order", ORDERS)
def test_each_database_chosen_by_a_handler_has_its_own_answer(shards: dict[str, Engine], order: str) -> None:
    chosen = ""

    def choose(state: ORMExecuteState) -> Any:
        return state.invoke_statement(bind_arguments={"bind": shards[chosen]})

    house = House(shards["eu"], choose, order)
    statement = select(Doc.name).where(Doc.name.like("%doc 1")).execution_options(cache_key="doc")
    for outcomes in ["miss", "fill"], ["hit"]:
        for chosen in shards:
            answer, seen, _ = house.ask(lambda session: session.scalars(statement).all())
            assert (answer, seen) == ([f"{chosen} doc 1"], outcomes)


@pytest.mark.parametrize("order", ORDERS)
def test_a_result_merged_from_several_databases(shards: dict[str, Engine], order: str) -> None:
    def everywhere(state: ORMExecuteState) -> Any:
        results = [state.invoke_statement(bind_arguments={"bind": shards[name]}) for name in sorted(shards)]
        return results[0].merge(*results[1:])

    house = House(shards["eu"], everywhere, order)
    statement = select(Doc.name).where(Doc.name.like("%doc 1")).execution_options(cache_key="doc")

    def use(session: Session) -> Any:
        return session.scalars(statement).all()

    expected = ["eu doc 1", "us doc 1"]
    assert house.ask(use)[:2] == (expected, ["miss", "fill"] * 2)
    assert house.ask(use) == (expected, ["hit", "hit"], 0)


@pytest.mark.parametrize("order", ORDERS)
def test_a_key_that_decides_alone_does_so_in_one_database(shards: dict[str, Engine], order: str) -> None:
    chosen = ""

    def choose(state: ORMExecuteState) -> Any:
        return state.invoke_statement(bind_arguments={"bind": shards[chosen]})

    house = House(shards["eu"], choose, order)
    options = {"cache_key": "doc", "cache_exact": True}
    statement = select(Doc.name).where(Doc.name.like("%doc 1")).execution_options(**options)
    other = select(Doc.name).execution_options(**options)
    for each, outcomes in (statement, ["miss", "fill"]), (other, ["hit"]):
        for chosen in shards:
            answer, seen, _ = house.ask(lambda session: session.scalars(each).all())  # noqa: B023
            assert (answer, seen) == ([f"{chosen} doc 1"], outcomes)


class Shards:
    """A ShardedSession over two databases, with a cache and without."""

    def __init__(self, engines: dict[str, Engine]) -> None:
        self.cache = QueryCache()
        self.statements = 0
        self.asked: list[str] = list(engines)
        options: dict[str, Any] = {
            "class_": ShardedSession,
            "shards": engines,
            "shard_chooser": lambda mapper, instance, clause=None: "eu",
            "identity_chooser": self._of_identity,
            "execute_chooser": lambda state: self.asked,
        }
        self.cached: sessionmaker[Any] = sessionmaker(**options)
        self.uncached: sessionmaker[Any] = sessionmaker(**options)
        self.cache.attach(self.cached)
        for engine in engines.values():
            event.listen(engine, "before_cursor_execute", self._count)

    def _count(self, *_: object) -> None:
        self.statements += 1

    @staticmethod
    def _of_identity(mapper: Any, key: tuple[int], *, lazy_loaded_from: Any = None, **_: Any) -> list[str]:
        return [lazy_loaded_from.identity_token] if lazy_loaded_from else ["eu" if key[0] < 100 else "us"]

    def ask(self, use: Callable[[Any], Any]) -> tuple[list[str], int]:
        """Compare with the answer without a cache; give outcomes and the number of statements."""
        before = self.statements
        with self.cache.recording() as events, self.cached() as session:
            answer = use(session)
        emitted = self.statements - before
        with self.uncached() as session:
            assert answer == use(session)
        assert answer
        return [each.outcome for each in events], emitted


def token(thing: object) -> Any:
    return inspect(thing, raiseerr=True).identity_token


def everything(statement: Select[Any]) -> Callable[[Session], Any]:
    def use(session: Session) -> Any:
        docs = session.scalars(statement).unique().all()
        return [(doc.name, token(doc), [(note.name, token(note)) for note in doc.notes]) for doc in docs]

    return use


@pytest.mark.parametrize("loader", ["selectin", "joined", "subquery", "immediate"])
def test_sharded_hits_emit_no_sql(shards: dict[str, Engine], loader: str) -> None:
    house = Shards(shards)
    statement = select(Doc).order_by(Doc.id).options(LOADERS[loader](Doc.notes))
    use = everything(statement.execution_options(cache_key="docs"))
    outcomes, _ = house.ask(use)
    assert outcomes == ["miss", "fill", "miss", "fill"]
    for _ in range(2):
        assert house.ask(use) == (["hit", "hit"], 0)


def test_sharded_lazy_loads_from_the_cache(shards: dict[str, Engine]) -> None:
    house = Shards(shards)
    options = FromCache(key="docs"), RelationshipCache(Doc.notes)
    use = everything(select(Doc).order_by(Doc.id).options(*options))
    house.ask(use)
    outcomes, emitted = house.ask(use)
    assert set(outcomes) == {"hit"} and emitted == 0


def test_sharded_each_shard_is_an_answer_of_its_own(shards: dict[str, Engine]) -> None:
    house = Shards(shards)
    statement = select(Doc).order_by(Doc.id).execution_options(cache_key="docs")

    def use(session: Any) -> Any:
        return [(doc.name, token(doc)) for doc in session.scalars(statement)]

    house.asked = ["eu"]
    assert house.ask(use)[0] == ["miss", "fill"]
    house.asked = ["us", "eu"]
    assert house.ask(use)[0] == ["miss", "fill", "hit"]
    house.asked = ["us"]
    assert house.ask(use) == (["hit"], 0)


def test_sharded_a_key_that_decides_alone_does_so_for_each_shard(shards: dict[str, Engine]) -> None:
    house = Shards(shards)
    statement = select(Doc).order_by(Doc.id).execution_options(cache_key="docs", cache_exact=True)

    def use(session: Any) -> Any:
        return [(doc.name, token(doc)) for doc in session.scalars(statement)]

    assert house.ask(use)[0] == ["miss", "fill", "miss", "fill"]
    assert house.ask(use) == (["hit", "hit"], 0)
    house.asked = ["us"]
    assert house.ask(use) == (["hit"], 0)


@pytest.mark.parametrize(
    "choose",
    [
        lambda session, statement: session.scalars(statement.options(set_shard_id("us"))),
        lambda session, statement: session.scalars(statement, bind_arguments={"shard_id": "us"}),
        lambda session, statement: session.scalars(statement, execution_options={"_sa_shard_id": "us"}),
    ],
    ids=["set_shard_id", "bind_arguments", "execution option"],
)
def test_sharded_a_shard_that_is_named(shards: dict[str, Engine], choose: Any) -> None:
    house = Shards(shards)
    statement = select(Doc).order_by(Doc.id).execution_options(cache_key="docs")

    def use(session: Any) -> Any:
        return [(doc.name, token(doc)) for doc in choose(session, statement)]

    assert house.ask(use) == (["miss", "fill"], 1)
    assert house.ask(use) == (["hit"], 0)


def test_sharded_columns_aggregates_queries_and_gets(shards: dict[str, Engine]) -> None:
    house = Shards(shards)
    options = {"cache_key": "docs"}
    for use, lookups in (
        (lambda session: session.execute(select(Doc.id, Doc.name).execution_options(**options)).all(), 2),
        (lambda session: session.scalars(select(func.count(Doc.id)).execution_options(**options)).all(), 2),
        (lambda session: [each.id for each in session.query(Doc).execution_options(**options).all()], 2),
        (lambda session: session.get(Doc, 101, execution_options=options).name, 2),
        (lambda session: session.get(Doc, 101, identity_token="us", execution_options=options).name, 1),
    ):
        house.ask(use)
        assert house.ask(use) == (["hit"] * lookups, 0)


def test_two_caches_on_one_session_and_statements_on_a_connection(engine: Engine) -> None:
    sessions = sessionmaker(engine)
    caches = [QueryCache().attach(sessions) for _ in range(2)]
    statement = select(Doc.id).order_by(Doc.id).execution_options(cache_key=True)
    answers = []
    with caches[0].recording() as first, caches[1].recording() as second:
        for _ in range(2):
            with sessions() as db:
                answers.append(db.scalars(statement).all())
        with engine.connect() as connection:
            answers.append(connection.scalars(statement).all())
    assert answers[0] and answers == [answers[0]] * 3
    assert sorted([each.outcome for each in events] for events in (first, second)) == [
        ["bypass", "bypass"],
        ["miss", "fill", "hit"],
    ]
