"""Every private name that `querycache/sa_internals` takes from SQLAlchemy is where it is looked for.

When one moves, this says which, and what it was used for; everything else would only say that answers are wrong.
The names are read from the source, so that none can be used without standing here.
"""

from __future__ import annotations

import ast
import inspect as python
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    ColumnElement,
    CursorResult,
    Engine,
    ForeignKey,
    String,
    Table,
    column,
    create_engine,
    event,
    insert,
    inspect,
    select,
    text,
    update,
    values,
)
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_connection
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.engine import Connection
from sqlalchemy.engine.result import ChunkedIteratorResult
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    ORMExecuteState,
    Session,
    mapped_column,
    relationship,
    selectinload,
)
from sqlalchemy.orm import (
    registry as Registry,
)

from querycache import sa_internals

SOURCE = "\n".join(path.read_text() for path in sorted(Path(sa_internals.__file__).parent.glob("*.py")))


class Base(DeclarativeBase):
    pass


class Parent(Base):
    __tablename__ = "parent"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(String(10))
    children: Mapped[list[Child]] = relationship()


class Child(Base):
    __tablename__ = "child"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int] = mapped_column(ForeignKey("parent.id"))


@dataclass
class Live:
    """What SQLAlchemy hands out while a session works: caught in its events."""

    engine: Engine
    session: Session
    states: list[ORMExecuteState] = field(default_factory=list)
    contexts: dict[str, Any] = field(default_factory=dict)
    flush: Any = None
    loaded_result: Any = None

    @property
    def statement(self) -> Any:
        return select(Parent).where(Parent.name == "a").options(selectinload(Parent.children))

    @property
    def connection(self) -> Connection:
        return self.session.connection()

    @property
    def transaction(self) -> Any:
        return self.session.get_transaction()


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine) as db:
        live = Live(engine, db)
        event.listen(db, "do_orm_execute", live.states.append)
        event.listen(db, "after_flush", lambda session, context: setattr(live, "flush", dict(context.states)))

        @event.listens_for(engine, "after_cursor_execute")
        def note(connection: Any, cursor: Any, sql: str, parameters: Any, context: Any, many: bool) -> None:
            live.contexts.setdefault(sql.split()[0], context)

        db.add(Parent(id=1, name="a", children=[Child(id=1)]))
        db.flush()
        live.loaded_result = db.execute(live.statement)
        live.loaded_result.all()
        db.query(Parent).populate_existing().all()
        db.execute(update(Parent).values(name="b"))
        yield live


class Rendered(ColumnElement[int]):
    """By the application."""


@compiles(Rendered)
def _render(element: Any, compiler: Any, **options: Any) -> str:
    return "1"


def load_options_of(live: Live) -> Any:
    return live.states[-2].execution_options["_sa_orm_load_options"]


def post_load_options_of(live: Live) -> Any:
    post_load: Any = next(state.statement for state in live.states if state.is_relationship_load)
    assert not hasattr(live.statement._compile_options, "_use_legacy_query_style")  # by which it is told
    return post_load._compile_options


OWNERS: dict[str, Callable[[Live], Any]] = {
    "_all_registries": lambda live: import_module("sqlalchemy.orm.mapper"),
    "_NO_CURSOR_DML": lambda live: import_module("sqlalchemy.engine.cursor"),
    "_annotations": lambda live: insert(Parent),
    "_autobegin_t": lambda live: live.session,
    "_autoflush": lambda live: live.session,
    "_cache_key_bind_match": lambda live: live.contexts["SELECT"].compiled,
    "_column_tokens": lambda live: ForeignKey("parent.id"),
    "_column_args": lambda live: values(column("x"), name="v"),
    "_statement_hints": lambda live: live.statement,
    "_compile_options": lambda live: live.statement,
    "_compile_state_cls": lambda live: live.states[0],
    "_use_legacy_query_style": post_load_options_of,
    "_managers": lambda live: Parent.registry,
    "_new_runid": lambda live: import_module("sqlalchemy.orm.loading"),
    "_compile_w_cache": lambda live: live.statement,
    "_compiled_cache": lambda live: live.engine,
    "_compiler_dispatcher": lambda live: Rendered,
    "_connection_for_bind": lambda live: live.session,
    "_connection_record": lambda live: live.connection.connection,
    "_connections": lambda live: live.transaction,
    "_creator": lambda live: live.engine.pool,
    "_deleted": lambda live: live.session,
    "_dirty_states": lambda live: live.session,
    "_distinct": lambda live: live.statement,
    "_events_todo": lambda live: live.states[0],
    "_execution_options": lambda live: live.statement,
    "_expire": lambda live: inspect(Parent()),
    "_flushing": lambda live: live.session,
    "_generate_cache_key": lambda live: live.statement,
    "_group_by_clauses": lambda live: live.statement,
    "_has_events": lambda live: live.engine.dialect,
    "_init_compiled": lambda live: live.engine.dialect.execution_ctx_cls,
    "_is_autocommit_isolation": lambda live: live.connection,
    "_echo": lambda live: live.loaded_result.raw,
    "_is_clean": lambda live: live.session,
    "_json_deserializer": lambda live: create_engine("postgresql+psycopg://").dialect,
    "_json_serializer": lambda live: create_engine("postgresql+psycopg://").dialect,
    "_metadata": lambda live: live.loaded_result.raw,
    "_modified": lambda live: live.session.identity_map,
    "_multi_values": lambda live: insert(Parent),
    "_native_inet_types": lambda live: create_engine("postgresql+psycopg://").dialect,
    "_new": lambda live: live.session,
    "_on_connect_isolation_level": lambda live: live.engine.dialect,
    "_parent": lambda live: live.transaction,
    "_pending_mutations": lambda live: inspect(Parent()),
    "_populate_existing": load_options_of,
    "_post_values_clause": lambda live: upsert(Parent).on_conflict_do_nothing(),
    "_prefixes": lambda live: insert(Parent),
    "_prop_set": lambda live: inspect(Parent),
    "_propagate_attrs": lambda live: live.contexts["SELECT"].invoked_statement,
    "_props": lambda live: inspect(Parent),
    "_proxied": lambda live: live.engine.execution_options(a=1),
    "_refresh_state": load_options_of,
    "_remaining_events": lambda live: live.states[0],
    "_result": lambda live: import_module("pymysql").Connection(defer_connect=True),
    "_result_columns": lambda live: live.contexts["SELECT"].compiled,
    "_rowcount": lambda live: live.contexts["SELECT"],
    "_setup_result_proxy": lambda live: live.contexts["SELECT"],
    "_starting_event_idx": lambda live: live.states[0],
    "_suffixes": lambda live: live.statement,
    "_trans_ctx_check": lambda live: import_module("sqlalchemy.engine.util").TransactionalContext,
    "_transaction": lambda live: live.session,
    "_type_memos": lambda live: live.engine.dialect,
    "_variant_mapping": lambda live: Parent.__table__.c.id.type,
    "_values": lambda live: update(Parent).values(name="a"),
    "_where_criteria": lambda live: live.statement,
    "_with_options": lambda live: live.statement,
    "_yield_per": load_options_of,
}

# Looked for where some versions have it, and done without elsewhere.
# The last two are of one driver and of one driver's adapter.
OPTIONAL = {
    "_extra_froms",
    "_ordered_values",
    "_update_execution_options",
    "_in_transaction",
    "_started",
}


def private_names(source: str) -> set[str]:
    """Private names that a source takes from elsewhere: attributes, imports, and names given to getattr and attrgetter."""
    tree = ast.parse(source)
    own: set[str] = set()
    used: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                own.add(name)
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name):
                used.add(name)
            case ast.ImportFrom(names=aliases):
                used.update(alias.name for alias in aliases)
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]
            ):
                used.add(name)
            case ast.Call(func=ast.Name(id="attrgetter"), args=names):
                used.update(name.value for name in names if isinstance(name, ast.Constant))
    # these are names of this module's own as well
    own -= {"_compile_state_cls", "_compiled_cache", "_echo", "_prop_set"}
    return {name for name in used - own if name.startswith("_") and not name.startswith("__")}


def test_every_private_name_stands_here() -> None:
    assert private_names(SOURCE) == set(OWNERS) | OPTIONAL


def test_names_are_found_in_a_source() -> None:
    source = "from a import _b\nx._c\nself._d = 1\ngetattr(x, '_e')\nx.__dict__\n_f = 1\nx._f\nattrgetter('_g', '_h')"
    assert private_names(source) == {"_b", "_c", "_d", "_e", "_g", "_h"}


@pytest.mark.parametrize("name", sorted(OWNERS))
def test_it_is_there(name: str, live: Live) -> None:
    owner = OWNERS[name](live)
    assert hasattr(owner, name), f"{owner!r} has no {name!r} any more: see what sa_internals uses it for"


# --- What is expected of them ----------------------------------------------------------------------


def test_the_compiled_cache_answers_with_what_prepare_unpacks(live: Live) -> None:
    compiled, extracted, *rest, hit = live.statement._compile_w_cache(
        dialect=live.engine.dialect,
        compiled_cache={},
        column_keys=[],
        for_executemany=False,
        schema_translate_map=None,
        linting=live.engine.dialect.compiler_linting,
    )
    assert compiled.string.startswith("SELECT")
    assert [parameter.effective_value for parameter in extracted] == ["a"]
    assert len(rest) <= 1
    assert hit.name == "CACHE_MISS"
    assert [entry[0] for entry in compiled._result_columns] == ["id", "name"]
    assert compiled.cache_key is not None
    assert list(compiled.construct_params(extracted_parameters=extracted, escape_names=False).values()) == [
        "a"
    ]


def test_an_execution_context_is_made_of_what_plan_gives(live: Live) -> None:
    parameters = list(python.signature(live.engine.dialect.execution_ctx_cls._init_compiled).parameters)
    assert parameters[:7] == [
        "dialect", "connection", "dbapi_connection", "execution_options", "compiled", "parameters", "invoked_statement"
    ]  # fmt: skip
    assert parameters[7:] in (
        ["extracted_parameters", "cache_hit"],
        ["extracted_parameters", "cache_hit", "param_dict"],
    )


def test_orm_executions_are_prepared_and_loaded_in_two_steps(live: Live) -> None:
    compile_state = live.states[0]._compile_state_cls
    assert list(python.signature(compile_state.orm_pre_session_exec).parameters) == [
        "session", "statement", "params", "execution_options", "bind_arguments", "is_pre_event"
    ]  # fmt: skip
    prepared = compile_state.orm_pre_session_exec(live.session, live.statement, {}, {}, {}, False)
    assert len(prepared) in (2, 3)
    assert list(python.signature(compile_state.orm_setup_cursor_result).parameters) == [
        "session", "statement", "params", "execution_options", "bind_arguments", "result"
    ]  # fmt: skip
    assert isinstance(live.loaded_result, ChunkedIteratorResult)
    assert hasattr(live.loaded_result, "chunks")
    assert hasattr(live.loaded_result, "iterator")


def test_further_statements_come_in_order_of_the_attributes_names() -> None:
    """And not in the order of a set, in which another process would send others where they lead to the same objects."""
    names = ["g", "b", "h", "d", "a", "f", "c", "e"]
    registry = Registry()

    @registry.mapped
    class Hub:
        __tablename__ = "hub"
        id: Mapped[int] = mapped_column(primary_key=True)

    @registry.mapped
    class Spoke:
        __tablename__ = "spoke"
        id: Mapped[int] = mapped_column(ForeignKey(Hub.id), primary_key=True)

    def add(some: list[str]) -> None:
        attributes = {
            name: relationship(Spoke, viewonly=True, lazy="selectin", uselist=True) for name in some
        }
        inspect(Hub).add_properties(attributes)

    def found() -> list[str]:
        asked: list[Any] = []
        event.listen(db, "do_orm_execute", lambda state: asked.append(state.loader_strategy_path))
        db.execute(select(Hub)).all()
        return [path[-1].key for path in asked[1:]]

    engine = create_engine("sqlite://")
    registry.metadata.create_all(engine)
    with Session(engine) as db:
        db.add(Hub(id=1))
        db.flush()
        add(names[:4])
        assert set(found()) == set(names[:4])
        sa_internals.load_in_order()
        engine.clear_compiled_cache()
        assert found() == sorted(names[:4])
        add(names[4:])
        engine.clear_compiled_cache()
        assert found() == sorted(names)


def test_rows_are_fetched_from_the_cursor_by_its_strategy(live: Live) -> None:
    result: Any = live.connection.execute(text("SELECT 1 AS one"))
    assert isinstance(result, CursorResult)
    assert result.cursor_strategy.alternate_cursor_description is None
    assert result.cursor_strategy.fetchall(result, result.cursor) == [(1,)]
    assert result.context.parameters == [()]
    assert result.context.statement == "SELECT 1 AS one"


def test_a_result_has_no_more_than_what_is_copied(live: Live) -> None:
    slots = [name for each in CursorResult.__mro__ for name in vars(each).get("__slots__", ())]
    assert sorted(slots) == [
        "__dict__", "_echo", "_metadata", "connection", "context", "cursor", "cursor_strategy", "dialect"
    ]  # fmt: skip


def test_a_transaction_knows_its_connections(live: Live) -> None:
    connection = live.connection
    assert live.transaction._connections[live.engine][0] is connection
    with live.session.begin_nested():
        assert live.session._transaction._parent is not None


def test_the_adapter_of_asyncpg_keeps_the_transaction_that_it_has_begun() -> None:
    assert hasattr(AsyncAdapt_asyncpg_connection, "_transaction")


def test_a_connection_that_is_checked_out_is_found_without_the_sessions_checks(live: Live) -> None:
    with Session(live.engine) as db:
        assert sa_internals.checked_out(db, live.engine) is None
        connection = db.connection()
        assert sa_internals.checked_out(db, live.engine) is connection
        with db.begin_nested():
            assert sa_internals.checked_out(db, live.engine) is connection


def test_what_a_flush_would_write_is_what_the_session_says(live: Live) -> None:
    with Session(live.engine) as db:
        db.add_all([Parent(id=7), Parent(id=8)])
        db.flush()
        kept, gone = db.get_one(Parent, 7), db.get_one(Parent, 8)
        kept.name, gone.name = "changed", "changed too"
        db.delete(gone)
        db.add(Parent(id=9))
        new, dirty, deleted = sa_internals.unflushed(db)
        assert (new, dirty, deleted) == (list(db.new), list(db.dirty), list(db.deleted))
        assert (len(new), dirty, deleted) == (1, [kept], [gone])


def test_what_a_flush_has_written_is_what_it_would_write(live: Live) -> None:
    found = []

    def note(session: Session, context: Any) -> None:
        session.add(Parent(id=10))
        session.delete(other)
        found.append(sa_internals.just_flushed(session, context))

    with Session(live.engine) as db:
        db.add_all([Parent(id=7), Parent(id=8), Parent(id=9)])
        db.flush()
        kept, gone, other = (db.get_one(Parent, key) for key in (7, 8, 9))
        kept.name, gone.name = "changed", "changed too"
        db.delete(gone)
        db.add(made := Parent(id=11))
        event.listen(db, "after_flush", note)
        db.flush()
        assert found == [([made], [kept], [gone])]


def test_a_post_load_shows_what_runs_around_it(live: Live) -> None:
    first, second, third, _ = live.states
    assert "sa_top_level_orm_context" not in first.execution_options
    assert "sa_top_level_orm_context" in second.execution_options
    assert second.is_relationship_load
    assert first.bind_arguments["clause"] is first.statement
    assert third.execution_options["_sa_orm_load_options"]._populate_existing


def test_a_refresh_carries_its_object_in_the_load_options(live: Live) -> None:
    with Session(live.engine) as db:
        db.connection()
        parent = Parent(id=2)
        db.add(parent)
        db.flush()
        states: list[ORMExecuteState] = []
        event.listen(db, "do_orm_execute", states.append)
        db.refresh(parent)
    assert states[0].execution_options["_sa_orm_load_options"]._refresh_state is inspect(parent)


def tables_written(compiled: Any) -> set[Any]:
    return {table for table, _, _ in sa_internals.written(compiled)}


def test_the_unit_of_work_compiles_into_a_cache_of_its_own(live: Live) -> None:
    flushed, bulk = live.contexts["INSERT"], live.contexts["UPDATE"]
    assert sa_internals.is_unit_of_work(flushed)
    assert not sa_internals.is_unit_of_work(bulk)
    assert tables_written(flushed.compiled) <= {Parent.__table__, Child.__table__}
    assert tables_written(bulk.compiled) == {Parent.__table__}


def test_a_statement_of_the_unit_of_work_shows_whose_flush_sends_it(live: Live) -> None:
    """By the argument of a method of the unit of work; the ``bulk_…`` methods send theirs without."""
    seen: list[Session | None] = []

    def note(cursor: Any, sql: str, parameters: Any, context: Any) -> None:
        flush = sa_internals.flush_of(context)
        seen.append(None if flush is None else flush.session)
        assert sa_internals.is_of_flush(context) is (seen[-1] is not None)

    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine) as db:
        event.listen(engine, "do_execute", note)
        event.listen(engine, "do_executemany", note)
        child = Child(id=1, parent_id=1)
        for change in (
            lambda: db.add(child),
            lambda: setattr(child, "parent_id", 2),
            lambda: db.delete(child),
        ):
            change()
            db.flush()
        assert seen == [db, db, db]
        db.bulk_insert_mappings(inspect(Parent), [{"id": 2, "name": "c"}])
        db.bulk_update_mappings(inspect(Parent), [{"id": 2, "name": "d"}])
        db.execute(update(Parent).values(name="e"))
        assert seen[3:] == [None, None, None]


def test_a_flush_is_seen_to_write_a_secondary_table() -> None:
    """By the name of the method that does it."""
    registry = Registry()
    between = Table(
        "pairs",
        registry.metadata,
        Column("one_id", ForeignKey("one.id"), primary_key=True),
        Column("other_id", ForeignKey("other.id"), primary_key=True),
    )

    @registry.mapped
    class Other:
        __tablename__ = "other"
        id: Mapped[int] = mapped_column(primary_key=True)

    @registry.mapped
    class One:
        __tablename__ = "one"
        id: Mapped[int] = mapped_column(primary_key=True)
        others: Mapped[list[Other]] = relationship(secondary=between)

    engine = create_engine("sqlite://")
    registry.metadata.create_all(engine)
    seen: dict[str, bool] = {}

    @event.listens_for(engine, "do_execute")
    @event.listens_for(engine, "do_executemany")
    def note(cursor: Any, sql: str, parameters: Any, context: Any) -> None:
        seen[sql.split()[2].strip("(")] = sa_internals.is_of_relationship()

    with Session(engine) as db:
        db.add(One(others=[Other()]))
        db.flush()
        assert seen == {"one": False, "other": False, "pairs": True}
        db.execute(insert(between), [{"one_id": 2, "other_id": 2}])
        assert seen["pairs"] is False


def test_a_flush_tells_the_states_it_has_written(live: Live) -> None:
    states = list(sa_internals.flushed(SimpleNamespace(states=live.flush)))
    assert {(state.mapper.class_, deleted) for state, deleted in states} == {(Parent, False), (Child, False)}


def test_a_session_bound_to_connections_keeps_them(live: Live) -> None:
    with live.engine.connect() as connection:
        with Session(binds={Parent: connection}) as db:
            assert sa_internals.connections(db) == [connection]
        with Session(connection) as db:
            assert sa_internals.connections(db) == [connection]


def test_a_joined_subclass_notes_the_table_of_a_bulk_insert() -> None:
    class Special(Parent):
        __tablename__ = "special"
        id: Mapped[int] = mapped_column(ForeignKey("parent.id"), primary_key=True)
        more: Mapped[str] = mapped_column(String(10))

    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    tables = []

    @event.listens_for(engine, "after_cursor_execute")
    def note(connection: Any, cursor: Any, sql: str, parameters: Any, context: Any, many: bool) -> None:
        tables.append(tables_written(context.compiled))

    with Session(engine) as db:
        db.execute(insert(Special), [{"id": 1, "name": "a", "more": "b"}])
    assert set().union(*tables) == {Parent.__table__, Special.__table__}
