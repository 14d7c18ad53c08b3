"""Bulk statements through the Session: `session.execute(update(Comment).where(…).values(…))` and its siblings.

They pass the unit of work by, but not the Session. The rows that an UPDATE or DELETE will change are found and locked
first, and the statement is held to exactly those; an INSERT is made to return the keys of its rows. From there on
it is as in a flush: image before, statement, image after, one UPDATE per parent. Covered for every strategy
but "trigger", which needs no help.

All this is done after the application's own handlers of `do_orm_execute`, which may have the Session write something else
before the statement, or in place of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import ClauseElement, Delete, Insert, Result, Table, Update, literal, or_, select, tuple_
from sqlalchemy.orm import Mapper, ORMExecuteState, Session

from querycache.denormalize import guard
from querycache.denormalize.aggregate import Aggregate
from querycache.denormalize.attributes import Key, attribute_columns, in_order, primary_keys
from querycache.denormalize.chain import Chain
from querycache.denormalize.dml import columns_written, is_upsert, keys_upserted, literal_rows
from querycache.denormalize.errors import UncoveredChange
from querycache.denormalize.keeping import keeper_of
from querycache.denormalize.locks import keys_of
from querycache.denormalize.plan import Place, Plan, plan_of
from querycache.denormalize.strategies.trigger import parents_in
from querycache.denormalize.touched import Touched
from querycache.denormalize.work import Work
from querycache.sa_internals import (
    columns_set,
    inserts_one,
    is_flushing,
    later_handlers,
    names_entity,
    run_later_handlers,
    run_statement,
)

__all__ = ["do_orm_execute"]

LIMIT: Final = 30_000
"""Key values that one statement is held to: below SQLite's limit of 32 766 parameters."""


def do_orm_execute(state: ORMExecuteState) -> Result[Any] | None:
    """The Session's event."""
    found = _accounted_for(state)
    if found is None:
        return None
    if later_handlers(state):
        return run_later_handlers(state, _last)
    return _execute(state, *found)


def _last(state: ORMExecuteState) -> Result[Any]:
    """Execute what other handlers have made of the statement. They may also have written something themselves, so that
    nothing is looked at before."""
    found = _accounted_for(state)
    return run_statement(state) if found is None else _execute(state, *found)


def _accounted_for(state: ORMExecuteState) -> tuple[Plan, Table, Insert | Update | Delete] | None:
    """The statement, if its table is one of a plan."""
    statement = state.statement
    if not isinstance(statement, (Insert, Update, Delete)):
        return None
    table = statement.table
    plan = plan_of(table) if isinstance(table, Table) else None
    if plan is None or not isinstance(table, Table):
        return None
    if state.execution_options.get("denormalize") == "unchecked":
        return None
    return plan, table, statement


def _execute(
    state: ORMExecuteState, plan: Plan, table: Table, statement: Insert | Update | Delete
) -> Result[Any]:
    target = _Target(plan, table, state.bind_mapper, state, statement)
    target.refuse_aggregates()
    target.refuse_unseen()
    guard.check_elsewhere(statement, target.tables)
    if target.concerns():
        keeper_of(state.session).check(plan)
        target.refuse_within_flush()
        if _flushes_before(state):
            state.session.flush()
    with guard.covered():
        if not target.concerns():
            result = state.invoke_statement()
        elif isinstance(statement, Insert):
            result = _insert(target, statement)
        else:
            result = _change(target, statement)
    kept_elsewhere = [held for held in plan.depending_on(table) if held.strategy == "trigger"]
    if kept_elsewhere:
        keeper_of(state.session).after_bulk(state.session, parents_in(state.session, kept_elsewhere))
    return result


def _flushes_before(state: ORMExecuteState) -> bool:
    """Whether SQLAlchemy would flush before a statement of entities."""
    session = state.session
    wanted = session.autoflush and state.execution_options.get("autoflush", True)
    return bool(wanted) and not is_flushing(session)


class _Target:
    """The table (and mapper) of one bulk statement, and what depends on it."""

    def __init__(
        self,
        plan: Plan,
        table: Table,
        mapper: Mapper[Any] | None,
        state: ORMExecuteState,
        statement: Insert | Update | Delete,
    ) -> None:
        self.plan = plan
        self.statement = statement
        self.table = table
        self.mapper = mapper
        self.state = state
        self.session: Session = state.session
        self.rows: list[dict[str, Any]] = _parameter_rows(state.parameters)
        self.by_key = (
            isinstance(statement, Update)
            and isinstance(state.parameters, list)
            and names_entity(statement)
            and state.execution_options.get("dml_strategy", "auto") in ("auto", "bulk")
        )
        """Whether it is an UPDATE of the rows whose keys are in its parameter sets."""
        self.dialect = self.session.get_bind(mapper=mapper, clause=statement).dialect
        self.columns = self._columns()
        self.aggregates: dict[Chain, list[Aggregate]] = {}
        for chain, held in plan.by_chain.items():
            kept = [one for one in held if one.strategy != "trigger"]
            if kept:
                self.aggregates[chain] = kept
        self.places: list[Place] = []
        self.pairs: list[Place] = []
        for place in plan.relevant:
            if place.chain not in self.aggregates:
                continue
            watched = place.chain.mappers[place.level]
            if table is place.chain.links[place.level - 1].secondary:
                self.pairs.append(place)
            elif (
                (mapper.isa(watched) or watched.isa(mapper))
                if mapper is not None
                else table in watched.tables
            ):
                self.places.append(place)

    def _columns(self) -> set[str] | None:
        """What it sets, by the names of columns and attributes; None if that cannot be told.

        Parameters may be values of columns, or of `bindparam()`s anywhere in the statement: only its text tells.
        """
        names = {name for row in self.rows for name in row}
        if self.by_key or (names and isinstance(self.statement, Insert) and names_entity(self.statement)):
            # Row by row, which has no text of its own; VALUES in the statement are those of each row.
            given = names | {str(getattr(each, "key", each)) for each in columns_set(self.statement)}
            return given | keys_upserted(self.statement) if isinstance(self.statement, Insert) else given
        found = columns_written(
            self.statement.compile(dialect=self.dialect, column_keys=sorted(names) if names else None)
        )
        # Those of an entity are given by attribute, which the text does not show.
        return found if found is None or isinstance(self.statement, Delete) else found | names

    @property
    def parameters(self) -> dict[str, Any]:
        """Of the statement as a whole, where it has not one set a row."""
        return self.rows[0] if self.rows else {}

    @property
    def name(self) -> str:
        return self.table.fullname

    @property
    def kind(self) -> str:
        """Of statement."""
        return self.statement.__visit_name__.upper()

    @property
    def tables(self) -> set[Table]:
        mapped = self.mapper.tables if self.mapper is not None else ()
        return {self.table, *(table for table in mapped if isinstance(table, Table))}

    def refuse_aggregates(self) -> None:
        for table in self.tables:
            # Of a joined subclass the tables above it are written as well, row by row.
            guard.refuse_aggregates(table, self.columns, self.statement, by_attribute=True)
            guard.refuse_replacing(table, self.statement)

    def refuse_within_flush(self) -> None:
        connection = self.work(Touched()).connection
        what = f"{self.kind} on {self.name}"
        guard.refuse_within_flush(self.session, connection, what, _dependents(self))

    def refuse_unseen(self) -> None:
        """Refuse what a class writes that has but the table in common with the one by which aggregates are kept."""
        if self.mapper is None:
            return
        columns = self.columns if isinstance(self.statement, Update) else None
        if columns is not None and self.by_key:
            columns = columns - set(self.key_names)
        for table, names in self.plan.watch(self.mapper).unseen.items():
            if columns is None or columns & (names | self.plan.column_keys(table)):
                raise self.plan.unseen_change(self.mapper, table)

    def concerns(self) -> bool:
        if isinstance(self.statement, Delete):
            return bool(self.places or self.pairs or self.table in self.plan.edges)
        if isinstance(self.statement, Insert) or self.columns is None:
            return bool(self.places or self.pairs)
        return bool(self.pairs) or any(
            self.plan.relevant[place] & self.columns or self._column_names(place) & self.columns
            for place in self.places
        )

    def _column_names(self, place: Place) -> set[str]:
        mapper = place.chain.mappers[place.level]
        return {
            column.key
            for name in self.plan.relevant[place]
            if name in mapper.column_attrs
            for column in mapper.column_attrs[name].columns
        }

    def work(self, touched: Touched) -> Work:
        """Work on the connection that the Session will choose for the statement."""
        return Work(self.session, self.plan, touched, self.state.bind_arguments)

    @property
    def key(self) -> tuple[Any, ...]:
        if self.mapper is not None:
            return attribute_columns(self.mapper.class_, primary_keys(self.mapper))
        key = self.plan.key_of(self.table) or self._joined_by()
        if not key:
            raise UncoveredChange(
                f"{self.name} has no primary key to tell its rows by, so {_dependents(self)} would be wrong; declare one"
            )
        return key

    def _joined_by(self) -> tuple[Any, ...]:
        """What tells the rows of a secondary table without a primary key; nothing if relationships join by several."""
        links = [place.chain.links[place.level - 1] for place in self.pairs]
        found = {frozenset(str(column.key) for column in (*link.lower, *link.upper)) for link in links}
        if len(found) != 1 or self.table in self.plan.edges:
            return ()
        (names,) = found
        return tuple(column for column in self.table.columns if column.key in names)

    @property
    def key_names(self) -> tuple[str, ...]:
        if self.mapper is not None:
            return primary_keys(self.mapper)
        return tuple(column.key for column in self.plan.key_of(self.table))


def _insert(target: _Target, statement: Insert) -> Result[Any]:
    if is_upsert(statement):
        raise UncoveredChange(
            f"an upsert on {target.name} may change rows whose old contribution to"
            f" {_dependents(target)} is unknown; insert and update in two statements"
        )
    if target.columns is None:
        raise UncoveredChange(
            f"a statement of your own in place of INSERT on {target.name} may do more than insert rows, and"
            f" {_dependents(target)} would be wrong; insert, update and delete in statements of SQLAlchemy"
        )
    touched = Touched()
    work = target.work(touched)
    for place in target.pairs:
        touched.rows.setdefault(place, set()).update(_pair_keys(target, statement, place))
    for place in target.places:
        _expected_parents(target, place, touched)
    work.look_before(target.aggregates)
    if target.places and _tells_its_key(target, statement):
        result = target.state.invoke_statement()
        new = {_key_told(target, result)}
    elif target.places:
        new, result = _returning_keys(target, statement)
    else:
        new, result = set(), target.state.invoke_statement()
    after = {place: set(keys) for place, keys in touched.rows.items()}
    for place in target.places:
        after.setdefault(place, set()).update(new)
    _finish(target, work, after)
    return result


def _tells_its_key(target: _Target, statement: Insert) -> bool:
    """Whether the result of an INSERT tells the key of its row by itself; it is the caller's as it is then."""
    by_sets = target.rows and (names_entity(statement) or not isinstance(target.state.parameters, Mapping))
    return (
        target.dialect.insert_returning
        and not by_sets
        and inserts_one(statement)
        and len(statement.exported_columns) == 0
        and set(target.table.primary_key) == set(target.plan.key_of(target.table))
        and set(_table_key(target)) == set(target.key_names)
    )


def _table_key(target: _Target) -> dict[str, int]:
    """The names of `key_names`, with their place in the primary key of the table."""
    columns = enumerate(target.table.primary_key)
    if target.mapper is None:
        return {str(column.key): place for place, column in columns}
    mapper = target.mapper
    return {mapper.get_property_by_column(target.table.c[c.key]).key: place for place, c in columns}


def _key_told(target: _Target, result: Any) -> Key:
    told, places = result.inserted_primary_key, _table_key(target)
    key = tuple(told[places[name]] for name in target.key_names)
    if None in key:
        raise UncoveredChange(
            f"the key of the row inserted into {target.name} cannot be told, so {_dependents(target)} would be wrong;"
            " give the key as a plain value, or add an object to the Session"
        )
    return key


def _returning_keys(target: _Target, statement: Insert) -> tuple[set[Key], Result[Any]]:
    """Run an INSERT so that the keys of its rows are known; give the caller the result that it expects."""
    dialect = target.dialect
    if not dialect.insert_returning or not dialect.insert_executemany_returning:
        raise UncoveredChange(
            f"{dialect.name} cannot tell which rows a bulk INSERT on {target.name} has made, so"
            f" {_dependents(target)} would be wrong; add objects to the Session instead"
        )
    width = len(target.key)
    asked = len(statement.exported_columns) > 0
    result = target.state.invoke_statement(statement=statement.returning(*target.key))
    frozen = result.freeze()
    keys = {tuple(row[-width:]) for row in frozen()}
    return keys, frozen().columns(*range(len(frozen().keys()) - width)) if asked else result


def _change(target: _Target, statement: Update | Delete) -> Result[Any]:
    if (
        isinstance(statement, Update)
        and target.places
        and (
            target.columns is None
            or target.columns
            & {str(c.key) for c in (*target.table.primary_key, *target.plan.key_of(target.table))}
        )
        and not target.by_key
    ):
        raise UncoveredChange(
            f"a bulk UPDATE of the primary key of {target.name} cannot be followed; change the objects in the Session"
        )
    if len(target.rows) > 1 and not target.by_key:
        raise UncoveredChange(
            f"{target.kind} on {target.name} with {len(target.rows)} sets of parameters cannot be"
            f" followed; {_dependents(target)} would be wrong. Execute it once for each set"
        )
    touched = Touched()
    work = target.work(touched)
    restricted: Any = statement
    if target.by_key:
        keys = _row_keys(target)
    else:
        keys = _matching(target, work, statement)
        if len(keys) * max(1, len(target.key)) > LIMIT:
            raise UncoveredChange(
                f"{target.kind} on {target.name} changes {len(keys)} rows; more than {LIMIT} key values"
                " cannot be accounted for in one statement. Do it in portions, or with the execution option"
                ' {"denormalize": "unchecked"} and repair() afterwards'
            )
        # Held to these rows: what another transaction commits between the two statements must not slip in.
        among = _among(target.key, keys)
        if target.mapper is None and not target.plan.key_of(target.table):
            # A row of a secondary table that lacks a key joins nothing, and is not found by its key.
            among = or_(among, *(column.is_(None) for column in target.key))
        restricted = statement.where(among)
    for place in target.places:
        touched.rows[place] = set(keys)
        _expected_parents(target, place, touched)
    for place in target.pairs:
        touched.rows.setdefault(place, set()).update(_pair_keys(target, statement, place))
    if isinstance(statement, Delete):
        for table in target.tables & target.plan.edges.keys():
            touched.deleted[table] = set(keys)
    work.look_before(target.aggregates)
    result = target.state.invoke_statement(statement=restricted)
    _finish(target, work, {place: set(held) for place, held in touched.rows.items()})
    return result


def _finish(target: _Target, work: Work, after: dict[Place, set[Key]]) -> None:
    stale = work.write_difference(target.aggregates, after, {})
    keeper_of(target.session).after_bulk(target.session, stale)


def _matching(target: _Target, work: Work, statement: Update | Delete) -> set[Key]:
    query = select(*target.key)
    if statement.whereclause is not None:
        query = query.where(statement.whereclause)
    result = work.connection.execute(work.locks.claim(query), target.parameters)
    return {key for key in keys_of(result, len(target.key)) if None not in key}


def _among(columns: Sequence[Any], keys: Iterable[Key]) -> Any:
    ordered = in_order(keys)
    if not ordered:
        return literal(1) == literal(0)
    if len(columns) == 1:
        return columns[0].in_([key[0] for key in ordered])
    return tuple_(*columns).in_(ordered)


def _row_keys(target: _Target) -> set[Key]:
    """The keys in the parameter sets of an UPDATE by primary key."""
    try:
        return {tuple(row[name] for name in target.key_names) for row in target.rows}
    except KeyError as error:
        raise UncoveredChange(
            f"a bulk UPDATE on {target.name} with parameter sets needs the primary key in each; {error} is missing"
        ) from None


def _pair_keys(target: _Target, statement: Any, place: Place) -> set[Key]:
    """The child side keys of the rows of a secondary table that the statement makes, changes or removes."""
    link = place.chain.links[place.level - 1]
    names = [str(column.key) for column in link.lower]
    if isinstance(statement, Delete):
        query = select(*link.lower)
        if statement.whereclause is not None:
            query = query.where(statement.whereclause)
        work = target.work(Touched())
        result = work.connection.execute(work.locks.claim(query), target.parameters)
        return {key for key in keys_of(result, len(names)) if None not in key}
    if isinstance(statement, Insert):
        rows = target.rows or literal_rows(statement, target.dialect)
        if rows and all(name in row for row in rows for name in names):
            keys = {tuple(row[name] for name in names) for row in rows}
            return {key for key in keys if None not in key}
    raise UncoveredChange(
        f"{target.kind} on the secondary table {target.name} without plain values cannot be followed;"
        f" {_dependents(target)} would be wrong. Delete rows and insert rows with values, or change the relationship"
    )


def _expected_parents(target: _Target, place: Place, touched: Touched) -> None:
    """The parents that plain values name, so that they can be locked before the statement."""
    names = place.chain.links[place.level - 1].attributes
    if not names:
        return
    for row in target.rows or literal_rows(target.statement, target.dialect):
        key = tuple(row.get(name) for name in names)
        if not any(part is None or isinstance(part, ClauseElement) for part in key):
            touched.parents.setdefault(Place(place.chain, place.level - 1), set()).add(key)


def _dependents(target: _Target) -> str:
    return ", ".join(sorted(held.name for held in target.plan.depending_on(target.table)))


def _parameter_rows(parameters: Any) -> list[dict[str, Any]]:
    if not parameters:
        return []
    return [dict(parameters)] if isinstance(parameters, Mapping) else [dict(row) for row in parameters]
